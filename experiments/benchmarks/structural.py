"""Time and weigh a local training step of pFedGate's structural mode against the dense model's.

    python experiments/benchmarks/structural.py --model leafcnn1 --density 0.3 --cost multiply_adds
    python experiments/benchmarks/structural.py --table [--json FILE]

A step is what a client does for one batch: for pFedGate gate, knapsack, gathering of the chosen blocks, forward,
backward, both optimisers; for the dense side forward, backward and SGD (FedAvg's client half). Both run their client
half's own ``train`` over the same local data, one thread, in turn; a round of the measurement is one local epoch a
side, a time is that of the epoch over its batches. A ratio is the median over rounds of pFedGate's time over the dense
one in the same round, with a 95 % bootstrap interval. The dense side runs in PyTorch's default layout, as every method
here does (``dense``), in channels-last (``channels_last``), which is faster for some, and in the default layout with
the max-pools that pFedGate's side computes by itself (``quick_pools``): what is saved by sparsity alone.

The budget is a share of the dense model's parameters, or of its forward multiply-adds, gate included. One mask a batch
(``--scope batch``, the paper's) or a round.

``memory_*``: what local training adds to a process: the peak of its resident set (VmHWM, set back through
/proc/self/clear_refs) during an epoch minus its resident set before, in a fresh process a side, with libraries loaded
by a tiny run, the packet and the data there already. Null where there is no Linux /proc. ``upload``: bytes of the
encoded reply over those of FedAvg's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import torch
from sparse_step import SHAPES, interval, machine, resident, weigh
from torch import Tensor

from clients.fedavg import FedAvgClient
from clients.pfedgate import PFedGateClient
from fedsparse.client import FederatedClient
from fedsparse.cost import forward_macs, trace
from fedsparse.models import build_model
from fedsparse.packet import Packet
from fedsparse.seeding import torch_rng
from fedsparse.sparse.pooling import quick_pools
from fedsparse.task import Budget, Client, Device, Split, Task
from strategies.pfedgate import PFedGate

SEED = 0
CLASSES = {"leafcnn1": 62}  # others: 10
BATCHES = {"resnet18": 2}  # a local epoch; others: 10
ROUNDS = {"resnet18": 3}  # others: 15
POOL = {"leafcnn1": 7, "lenet": 8, "resnet18": 8}  # of the gate's input
BOUNDS = {("leafcnn1", 0.3, "multiply_adds"): 0.55, ("resnet18", 0.3, "multiply_adds"): 0.6}
SIDES = ("sparse", "dense", "channels_last", "quick_pools")
Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, a budget and how it is trained."""

    model: str
    density: float
    cost: str = "multiply_adds"
    scope: str = "batch"
    batch: int = 32
    momentum: float = 0.0  # the default of both client halves

    @property
    def classes(self) -> int:
        return CLASSES.get(self.model, 10)

    @property
    def batches(self) -> int:
        return BATCHES.get(self.model, 10)


class Side:
    """A client half with its data, packet and memory."""

    def __init__(self, case: Case, side: str, batches: int) -> None:
        self.task = make_task(case)
        data = make_data(case, batches, self.task, channels_last=side == "channels_last")
        self.client = Client(Device(0, budget(case, self.task)), data, data, data)
        params = self.task.init_params()
        if side == "channels_last":
            params = {name: in_channels_last(t) for name, t in params.items()}
        common = {"lr": 0.05, "batch_size": case.batch, "momentum": case.momentum}
        self.memory: dict[str, Tensor] = {}
        self.half: FederatedClient
        if side == "sparse":
            options = {**common, "mask_scope": case.scope, "gate_pool": POOL.get(case.model, 0)}
            strategy = PFedGate(client_config=options)
            self.packet = strategy.broadcast(strategy.init(self.task, [self.client.device]), self.client.device)
            self.half = PFedGateClient(**options)  # type: ignore[arg-type]
        else:
            self.packet, self.half = Packet("train", params), FedAvgClient(**common)  # type: ignore[arg-type]
        self.reply = Packet("")
        self.pools: Callable[[], AbstractContextManager[None]]
        self.pools = partial(quick_pools, self.task.model) if side == "quick_pools" else nullcontext

    def epoch(self, number: int) -> float:
        """Seconds of a local epoch; the memory stays from one to the next."""
        start = time.perf_counter()
        rng = torch_rng(SEED, number, "epoch")
        with self.pools():
            self.reply, self.memory = self.half.train(self.task, self.client, self.packet, self.memory, rng)
        return time.perf_counter() - start


def make_task(case: Case) -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Task(build_model(case.model, SHAPES[case.model], case.classes), SHAPES[case.model], case.classes, SEED)


def make_data(case: Case, batches: int, task: Task, *, channels_last: bool) -> Split:
    rng, n = torch_rng(SEED, "data"), batches * case.batch
    x = torch.randn(n, *task.input_shape, generator=rng)
    return Split(in_channels_last(x) if channels_last else x, torch.randint(case.classes, (n,), generator=rng))


def in_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def budget(case: Case, task: Task) -> Budget:
    """The share of the dense model that the device may use; none at 1, where every block is kept."""
    if case.density == 1:
        return Budget()
    if case.cost == "parameters":
        return Budget(density=case.density)
    return Budget(forward_macs=case.density * forward_macs(trace(task.model, task.input_shape)))


# --- time and memory -------------------------------------------------------------------------------------------------


def measure_time(case: Case, rounds: int) -> Result:
    sides = {side: Side(case, side, case.batches) for side in SIDES}
    for side in sides.values():
        side.epoch(0)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, rounds + 1):
        for name, side in sides.items():
            seconds[name].append(side.epoch(number) / case.batches)
    out: Result = {f"seconds_{name}": float(np.median(values)) for name, values in seconds.items()}
    for name in SIDES[1:]:
        ratio = [a / b for a, b in zip(seconds["sparse"], seconds[name], strict=True)]
        out |= {f"ratio_to_{name}": float(np.median(ratio)), f"interval_to_{name}": interval(ratio)}
    facts = sides["sparse"].reply.scalars
    return out | {
        "rounds": rounds,
        "density_true": facts["density_true"],
        "macs_ratio": facts["forward_macs"] / forward_macs(trace(sides["dense"].task.model, SHAPES[case.model])),
        "upload": sides["sparse"].reply.nbytes / sides["dense"].reply.nbytes,
    }


def memory_of(case: Case, side: str) -> int | None:
    """Peak bytes that a local epoch adds to this process; see the head of this file."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    torch.set_num_threads(1)
    Side(replace(case, model="lenet" if case.model != "leafcnn1" else "leafcnn1", batch=4), side, 2).epoch(0)
    model = Side(case, side, 2)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    model.epoch(0)
    return resident("VmHWM") - before


def measure(case: Case, rounds: int) -> Result:
    """All figures of a case, and the bound for them."""
    result = asdict(case) | measure_time(case, rounds or ROUNDS.get(case.model, 15))
    result |= weigh(memory_of, case, "sparse", "dense")
    bound = BOUNDS.get((case.model, case.density, case.cost))
    return result | {"bound": bound, "passed": bound is None or result["ratio_to_dense"] <= bound}


# --- output ----------------------------------------------------------------------------------------------------------


def table_row(r: Result) -> str:
    """A Markdown row."""
    low, high = r["interval_to_dense"]
    memory = "-" if r["memory_ratio"] is None else f"{r['memory_sparse'] / 1e6:.0f} / {r['memory_dense'] / 1e6:.0f}"
    bound = "" if r["bound"] is None else f"{r['bound']:g}"
    return (
        f"| {r['model']} | {r['cost']} | {r['scope']} | {r['density']:g} |"
        f" {r['ratio_to_dense']:.3f} [{low:.3f}, {high:.3f}] |"
        f" {bound} | {r['ratio_to_channels_last']:.3f} | {r['ratio_to_quick_pools']:.3f} |"
        f" {1e3 * r['seconds_sparse']:.1f} | {r['macs_ratio']:.3f} |"
        f" {r['density_true']:.3f} | {memory} | {r['upload']:.3f} |"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=("leafcnn1", "lenet", "resnet18", "mlp"), default="leafcnn1")
    parser.add_argument("--density", type=float, default=0.3, help="share of the dense model's cost")
    parser.add_argument("--cost", choices=("parameters", "multiply_adds"), default="multiply_adds")
    parser.add_argument("--scope", choices=("batch", "round"), default="batch")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--momentum", type=float, default=0.0, help="of both sides; 0 is the default of both methods")
    parser.add_argument("--rounds", type=int, default=0, help="0 = 15, and 3 for resnet18")
    parser.add_argument("--table", action="store_true", help="all models, costs and shares")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def cases(args: argparse.Namespace) -> list[Case]:
    if not args.table:
        return [Case(args.model, args.density, args.cost, args.scope, args.batch, args.momentum)]
    models, shares, costs = ("leafcnn1", "lenet", "resnet18"), (1, 0.5, 0.3, 0.1), ("multiply_adds", "parameters")
    every = [Case(m, s, c) for m in models for c in costs for s in shares if s < 1 or c == costs[0]]
    return every + [Case(m, 0.3, c, "round") for m in models for c in costs]


def main() -> None:
    """Measure, print, write."""
    args = parse()
    torch.set_num_threads(1)
    print(
        "| model | budget of | scope | share | time / dense | bound | time / channels-last | time / dense, our pools |"
        " ms a step | multiply-adds | true density | MB pFedGate / dense | upload |"
    )
    print("|" + " --- |" * 13)
    results = []
    for case in cases(args):
        results.append(measure(case, args.rounds))
        print(table_row(results[-1]), flush=True)
        gc.collect()
        if args.json:
            out = {**machine(), "rows": results}
            args.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    print(f"\n{sum(r['passed'] for r in results)} of {len(results)} rows within their bounds")


if __name__ == "__main__":
    main()
