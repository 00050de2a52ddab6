"""Sparse computation beside masked dense: the same gradients, the same accuracy, less time.

    python experiments/sparse_and_dense.py gradients                # step by step, from equal weights
    python experiments/sparse_and_dense.py accuracy [--seeds 5]     # fixed ERK mask, sparse against dense, digests too
    python experiments/sparse_and_dense.py time [--rounds 3]        # FedTiny, ResNet18 at 1 %, 6,000 images of CIFAR-10

Each prints a table and writes ``experiments/results/sparse_and_dense_<name>.json``. Data: ``FEDSPARSE_DATA``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fedsparse
from fedsparse import cost
from fedsparse.experiment import from_dict
from fedsparse.masked import network
from fedsparse.runner import federation_of
from fedsparse.sparse.masks import compact
from fedsparse.sparse.program import read_program
from fedsparse.sparse.pruning import at_random, layer_counts
from fedsparse.steps import step_
from fedsparse.task import Task
from fedsparse.threads import one_thread

RESULTS = Path(__file__).parent / "results"
SIDES = ("sparse", "dense")
STEPS = 50
PAIRS = (("sparse", "dense"), ("sparse", "float64"), ("dense", "float64"), ("channels-last", "dense"))
MODELS = (("leafcnn1", "mnist", 0.1), ("lenet", "cifar10_small", 0.1), ("resnet18", "cifar10_small", 0.05))
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # Student's t, by number of seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gradients", "accuracy", "time"))
    parser.add_argument("--seeds", type=int, default=5, choices=sorted(T95))
    parser.add_argument("--rounds", type=int, default=0)
    args = parser.parse_args()
    tables = {"gradients": gradients, "accuracy": accuracy, "time": wall_clock}
    found = tables[args.what](args)
    path = RESULTS / f"sparse_and_dense_{args.what}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(args: argparse.Namespace) -> list[dict[str, Any]]:
    """50 steps of SGD with momentum under an ERK mask, each from the same weights on every side.

    The sides: sparse; masked dense; masked dense in channels-last; masked dense in float64, the reference. Last column:
    sparse and dense each on its own way from the same start.
    """
    rows = []
    print(f"relative distance of gradients (median / largest of {STEPS} steps)")
    print("model     density " + "".join(f"{f'{a} - {b}':>30s}" for a, b in PAIRS) + f"{'each its own way':>22s}")
    with one_thread():
        for model, data, density in MODELS:
            found = _distances(model, data, density)
            own = max(d["sparse", "dense"] for d in _distances(model, data, density, own_way=True))
            row: dict[str, Any] = {"model": model, "density": density, "own_way_largest": own}
            cells = ""
            for pair in PAIRS:
                distances = [d[pair] for d in found]
                row[" - ".join(pair)] = {"median": statistics.median(distances), "largest": max(distances)}
                cells += f"{statistics.median(distances):19.1e} / {max(distances):8.1e}"
            rows.append(row)
            print(f"{model:9s} {density:7}{cells}{own:22.1e}", flush=True)
    return rows


def _distances(model: str, data: str, density: float, *, own_way: bool = False) -> list[dict[tuple[str, str], float]]:
    settings = {"dataset": data, "model": model, "width": 0.25 if model == "resnet18" else 1.0, "method": "fedavg"}
    federation = federation_of(from_dict({**settings, "partition": {"scheme": "iid", "clients": 4}}))
    task, examples = federation.task, federation.clients[0].train
    mask = _erk(task, density)
    start = compact(task.init_params(), mask)
    sides = ("sparse", "dense") if own_way else ("sparse", "dense", "channels-last", "float64")
    own = {side: {name: t.clone() for name, t in start.items()} for side in sides}
    velocity: dict[str, list[Tensor]] = {side: [] for side in sides}
    rng = torch.Generator().manual_seed(0)
    task.model.train(True)
    found = []
    for _ in range(STEPS):
        chosen = torch.randperm(len(examples.y), generator=rng)[:32]
        x, y = examples.x[chosen], examples.y[chosen]
        grads = {side: _gradient(task, own[side], mask, x, y, side) for side in sides}
        found.append({(a, b): _distance(grads[a], grads[b]) for a, b in PAIRS if a in sides and b in sides})
        for side in ("sparse", "dense"):
            leaves = [own[side][name] for name in task.trainable]
            step_(leaves, [g.clone() for g in grads[side]], velocity[side], lr=0.02, momentum=0.9)
        if not own_way:
            own = {side: {name: t.clone() for name, t in own["dense"].items()} for side in sides}
    return found


def _gradient(
    task: Task, params: dict[str, Tensor], mask: dict[str, Tensor], x: Tensor, y: Tensor, side: str
) -> list[Tensor]:
    """The gradient on a batch; running statistics in ``params`` are updated."""
    names = [op.name for op in read_program(task.model, task.input_shape).ops if op.kind == "conv"]
    task.crossover = dict.fromkeys(names, 2.0 if side == "sparse" else 0.0)
    if side == "float64":
        params, x = {name: t.double() for name, t in params.items()}, x.double()
    elif side == "channels-last" and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    own = {name: t.requires_grad_() if name in task.trainable else t for name, t in params.items()}
    with network(task, own, mask) as forward:
        loss = task.criterion(forward(x), y)
        grads = torch.autograd.grad(loss, [own[name] for name in task.trainable])
    for name in task.trainable:
        params[name].requires_grad_(False)
    return list(grads)


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    one, two = (torch.cat([g.flatten() for g in side]).double() for side in (a, b))
    return float((one - two).norm() / two.norm())


def _erk(task: Task, density: float) -> dict[str, Tensor]:
    layers = cost.trace(task.model, task.input_shape)
    exempt = cost.exempt_layers(layers)
    maskable = {x.weight_name: task.shapes[x.weight_name] for x in layers if x.weights and x.name not in exempt}
    sizes = {name: math.prod(shape) for name, shape in maskable.items()}
    counts = layer_counts(maskable, "erk", round(density * sum(sizes.values())))
    rng = torch.Generator().manual_seed(1)
    return {name: at_random(sizes[name], k, rng) for name, k in counts.items() if k < sizes[name]}


# --- accuracy --------------------------------------------------------------------------------------------------------


def accuracy(args: argparse.Namespace) -> dict[str, Any]:
    """FedAvg on a fixed ERK mask at 10 %: LeNet on MNIST, 50 clients (Dirichlet 0.5), a tenth of them in each of 20
    rounds; accuracy on all test images after the last."""
    rows = []
    for seed in range(args.seeds):
        row: dict[str, Any] = {"seed": seed}
        for side in SIDES:
            runs = [_run(_mnist(seed, side, args.rounds or 20)) for _ in range(2 if seed == 0 else 1)]
            row[side] = runs[0].summary["accuracy"]["global"]["mean"]
            row[f"{side}_seconds"] = runs[0].summary["seconds"]["train"]
            row[f"{side}_digests"] = sorted({run.summary["digest"] for run in runs})
        rows.append(row)
        print(f"seed {seed}: sparse {row['sparse']:.4f} dense {row['dense']:.4f}", flush=True)
    differences = [100 * (row["sparse"] - row["dense"]) for row in rows]
    middle, spread = statistics.mean(differences), statistics.stdev(differences)
    half = T95[len(rows)] * spread / math.sqrt(len(rows))
    stable = all(len(rows[0][f"{side}_digests"]) == 1 for side in SIDES)
    print(f"sparse - dense: {middle:+.3f} points, 95 % interval [{middle - half:+.3f}, {middle + half:+.3f}]")
    print(f"the same digest twice on each side: {stable}")
    return {"rows": rows, "difference": middle, "interval": [middle - half, middle + half], "stable": stable}


def _mnist(seed: int, side: str, rounds: int) -> fedsparse.Experiment:
    return from_dict(
        {
            "dataset": "mnist", "model": "lenet", "rounds": rounds, "seed": seed, "sparse": side, "fraction": 0.1,
            "partition": {"scheme": "dirichlet", "alpha": 0.5, "clients": 50},
            "evaluate": {"every": rounds},
            "method": {"name": "fixed_mask", "density": 0.1, "lr": 0.05, "momentum": 0.9, "batch_size": 32},
        }
    )  # fmt: skip


# --- time ------------------------------------------------------------------------------------------------------------


def wall_clock(args: argparse.Namespace) -> list[dict[str, Any]]:
    """FedTiny at 1 % with the full-width ResNet18, every phase included."""
    rows = []
    print("computed   wall clock  training  evaluation  final accuracy")
    for side in SIDES:
        done = _run(_cifar(side, args.rounds or 3)).summary
        seconds, last = done["seconds"], done["accuracy"]["global"]["mean"]
        rows.append({"side": side, "seconds": seconds, "accuracy": last, "digest": done["digest"]})
        print(
            f"{side:10s} {seconds['wall']:8.1f} s {seconds['train']:7.1f} s {seconds['evaluate']:9.1f} s {last:12.4f}"
        )
    print(f"dense / sparse: {rows[1]['seconds']['wall'] / rows[0]['seconds']['wall']:.2f}")
    return rows


def _cifar(side: str, rounds: int) -> fedsparse.Experiment:
    return from_dict(
        {
            "dataset": "cifar10_small", "model": "resnet18", "rounds": rounds, "sparse": side,
            "partition": {"scheme": "dirichlet", "alpha": 0.5, "clients": 10, "max_clients": 2, "holdout": 5},
            "evaluate": {"every": rounds},
            "method": {
                "name": "fedtiny", "density": 0.01, "pool": 4, "pretrain": "holdout", "passes": 1,
                "averaging": "cumulative", "delta_r": 1, "r_stop": rounds, "lr": 0.05, "momentum": 0.9,
                "batch_size": 64,
            },
        }
    )  # fmt: skip


def _run(experiment: fedsparse.Experiment) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return fedsparse.run(experiment, out=Path(folder) / "run")


if __name__ == "__main__":
    main()
