"""What pFedGate's personal choice of blocks is worth: own gate against other clients' gates on the same model.

    python experiments/swap.py wisdm [--seeds 0,1,2] [--budget 0.3] [--set key=value ...]     # run, measure, keep
    python experiments/swap.py table

After an ordinary run with one budget for all, each client's test data are scored with the final model and, in turn,

    own        its own deployed mask and gate values (its ``personal`` accuracy)
    gate       mask and values of another client, mean over ten others
    mask       the mask of another client with its own values
    majority   the mask of the most frequent blocks that fits the budget, with its own values
    ones       its own mask with all values at their mean over clients and blocks: what the values are worth

A figure is own minus that, paired over clients and pooled over seeds, with a 95 % bootstrap interval over clients. The
random controls are runs of their own: ``score = "random_client"`` (importances fixed by client) and "random_batch".
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.pfedgate import PFedGateClient
from fedsparse.experiment import Experiment, load_experiment
from fedsparse.method import build, load_method
from fedsparse.packet import Packet
from fedsparse.runner import Run, federation_of, run
from fedsparse.seeding import numpy_rng
from fedsparse.sparse.cut import Bools, Cut
from fedsparse.task import Client, Task, score
from strategies.pfedgate import PFedGate

HERE = Path(__file__).parent
KEPT = HERE / "results" / "swap.json"
SCORES = ("learned", "random_client", "random_batch")
OTHERS = 10  # other clients whose gate or mask a client tries
SWAPS = ("gate", "mask", "majority", "ones")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Deployed:
    """What a client deploys: its kept set (L,) and its gate values (L,), those of dropped blocks too."""

    kept: Bools
    values: Tensor


class Swapper:
    """Scores a finished run's model under any mask and values."""

    def __init__(self, experiment: Experiment, done: Run) -> None:
        federation = federation_of(experiment)
        self.task: Task = federation.task
        self.clients: tuple[Client, ...] = federation.clients
        strategy = build(load_method(experiment.method), experiment.hyper)
        assert isinstance(strategy, PFedGate)
        strategy.init(self.task, [c.device for c in self.clients])
        half = PFedGateClient(**strategy.client_config)
        said = strategy.broadcast(done.state, self.clients[0].device).scalars
        self.cut: Cut = strategy.gated.cut
        # the whole model, whatever is downloaded: any mask can be tried, and each client's own is in its memory
        self.packet: Packet = Packet("evaluate", done.state.params, said)
        self.deployed = [self._deployed(half, c, strategy, done) for c in self.clients]
        self.budget = half.choice(strategy.gated, self.clients[0].device, self.clients[0].device.budget.density)

    def _deployed(self, half: PFedGateClient, client: Client, strategy: PFedGate, done: Run) -> Deployed:
        memory = done.memories.get(client.id, {})
        kept, _ = half.deployed(self.task, client, self.packet, memory)
        gate = {n.removeprefix("gate/"): t for n, t in memory.items() if n.startswith("gate/")}
        gate = gate or strategy.gated.gate.init_params()
        values, _ = strategy.gated.client_gates(gate, client.train, per_client=half.gate_input == "client")
        return Deployed(kept, values)

    def accuracy(self, client: Client, kept: Bools, values: Tensor) -> float:
        """Of the final model on the client's held-out data."""
        self.task.model.eval()
        work = self.cut.working(self.task, self.packet.tensors, train=False)
        work.use(kept)
        shut = values.cpu() * torch.from_numpy(kept)
        found = score(lambda x: work.forward(shut, x), client.held_out, self.task.device)
        return found.correct / max(1, found.n)

    def _others(self, i: int) -> list[int]:
        """Up to OTHERS other clients, drawn by the client's number."""
        order = numpy_rng("swap", i).permutation(len(self.clients))
        return [int(j) for j in order if j != i][:OTHERS]

    def gains(self) -> dict[str, list[float]]:
        """Own accuracy, and own minus each swap's, by client."""
        majority = self.budget.kept(np.mean([d.kept for d in self.deployed], axis=0))
        mean = torch.stack([d.values[torch.from_numpy(d.kept)].mean() for d in self.deployed]).mean()
        out: dict[str, list[float]] = {name: [] for name in ("own", *SWAPS)}
        for i, (client, mine) in enumerate(zip(self.clients, self.deployed, strict=True)):
            own = self.accuracy(client, mine.kept, mine.values)
            others = [self.deployed[j] for j in self._others(i)]
            out["own"].append(own)
            out["gate"].append(own - float(np.mean([self.accuracy(client, d.kept, d.values) for d in others])))
            out["mask"].append(own - float(np.mean([self.accuracy(client, d.kept, mine.values) for d in others])))
            out["majority"].append(own - self.accuracy(client, majority, mine.values))
            out["ones"].append(own - self.accuracy(client, mine.kept, torch.full_like(mine.values, float(mean))))
        return out


def measure(dataset: str, seed: int, budget: float, settings: Sequence[str]) -> list[dict[str, Any]]:
    """One seed: the learned run with its swaps, and the two random controls."""
    found = []
    for name in SCORES:
        start = time.perf_counter()
        changes = ["method=pfedgate", f"seed={seed}", f"budget.tiers=[{budget}]", f"method.score={name}", *settings]
        experiment = load_experiment(HERE / f"{dataset}.toml", changes)
        if name == "random_batch" and experiment.hyper.get("mask_scope", "batch") != "batch":
            continue  # one mask a round has no batches to draw for
        with tempfile.TemporaryDirectory() as folder:
            done = run(experiment, out=Path(folder) / "run")
        entry: dict[str, Any] = {
            "dataset": dataset,
            "seed": seed,
            "budget": budget,
            "settings": list(settings),
            "score": name,
            "command": " ".join(["fedsparse run", f"experiments/{dataset}.toml", *(f"--set '{c}'" for c in changes)]),
            "digest": done.summary["digest"],
            "personal": done.summary["accuracy"]["personal"],
            "masks": done.summary["masks"],
        }
        if name == "learned":
            entry["gains"] = Swapper(experiment, done).gains()
        found.append(entry)
        print(f"{dataset} seed {seed} {name}: {entry['personal']['mean']:.4f} {entry['masks']}"
              f" ({time.perf_counter() - start:.0f} s)", flush=True)  # fmt: skip
        if "gains" in entry:
            print({key: round(float(np.mean(v)), 4) for key, v in entry["gains"].items()}, flush=True)
    return found


def keep(entries: list[dict[str, Any]]) -> None:
    """Put the entries in the file, in place of older ones of the same run."""
    old = json.loads(KEPT.read_text()) if KEPT.exists() else []
    new = {json.dumps([e[k] for k in ("dataset", "seed", "budget", "settings", "score")]): e for e in [*old, *entries]}
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(list(new.values()), indent=1) + "\n")


def interval(values: Floats) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    draws = np.random.default_rng(0).choice(values, size=(4000, len(values))).mean(axis=1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def table() -> None:
    """Markdown of what was kept."""
    entries = json.loads(KEPT.read_text())
    print("| run | settings | seeds | learned | random, a client | random, a batch | " + " | ".join(SWAPS) + " |")
    print("|" + " --- |" * (6 + len(SWAPS)))
    groups = {(e["dataset"], e["budget"], tuple(e["settings"])) for e in entries}
    for dataset, budget, settings in sorted(groups):
        mine = [e for e in entries if (e["dataset"], e["budget"], tuple(e["settings"])) == (dataset, budget, settings)]
        by = {name: [e for e in mine if e["score"] == name] for name in SCORES}
        cells = [spread([e["personal"]["mean"] for e in by[name]]) for name in SCORES]
        for swap in SWAPS:
            values = np.array([v for e in by["learned"] for v in e["gains"][swap]])
            cells.append(
                f"{values.mean():+.4f} [{', '.join(f'{v:+.4f}' for v in interval(values))}]" if len(values) else "-"
            )
        seeds = len({e["seed"] for e in mine})
        print(f"| {dataset} s={budget:g} | {' '.join(settings) or '-'} | {seeds} | {' | '.join(cells)} |")


def spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("experiment", help="a file of experiments/ without .toml, or table")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    if args.experiment == "table":
        table()
        return
    for seed in map(int, args.seeds.split(",")):
        keep(measure(args.experiment, seed, args.budget, args.set))


if __name__ == "__main__":
    main()
