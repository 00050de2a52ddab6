"""Time a round of the local engine against what no simulator can beat, and against Flower's own runtime.

    python experiments/benchmarks/engine.py [--workloads A,B] [--rounds 20] [--ray] [--flower] [--json FILE]

Workload A: a CNN of two 5x5 convolutions (32, 64 channels), max-pools and a 512-unit layer on 28x28 inputs,
100 clients of 60 examples, 10 a round. Workload B: MLP 784-128-10, 1,000 clients of 60 examples, 100 a round.
Both: batch 20, one epoch, FedAvg, no evaluation. All runners do the very same SGD steps, interleaved round by round
in random order; every process has one torch thread.

    loop       one process: nn.Module, optim.SGD, running sum           the floor of workers1
    forked     two forked processes, weights in shared memory           the floor of workers2
    workers1   fedsparse, local engine, in this process
    workers2   fedsparse, local engine, two worker processes
    actors     two Ray actors, one call a round, partial sums come back (--ray)
    ray2       fedsparse, Ray engine, two workers (--ray)
    flower     Flower's simulation runtime on two Ray actors (--flower; a separate process, paused in between)

A ratio is the median over rounds of own time / floor's time in the same turn, with a 95 % bootstrap interval. The
floor of actors and ray2 is forked; ray2 is set beside workers2 too.
Before timing, each client's parameters after its local round are compared bit by bit with the loop's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import torch
from flwr.clientapp import ClientApp
from torch import Tensor
from torch.nn import functional

from fedsparse.client import client_app
from fedsparse.engine.grid import OwnGrid
from fedsparse.engine.local import LocalGrid
from fedsparse.method import build, load_method
from fedsparse.models import build_model
from fedsparse.packet import decode
from fedsparse.seeding import sample_cohort, torch_rng
from fedsparse.strategy import FederatedStrategy, Plan
from fedsparse.task import Client, Device, Split, Task

LR, BATCH, EXAMPLES, SEED = 0.05, 20, 60, 0
SHAPE, CLASSES = (1, 28, 28), 10


@dataclass(frozen=True)
class Workload:
    """A model and a federation. cohort: clients a round."""

    name: str
    model: str
    clients: int
    cohort: int


WORKLOADS = {"A": Workload("A", "cnn", 100, 10), "B": Workload("B", "mlp", 1000, 100)}


def make_task(work: Workload) -> Task:
    """The workload's model with fixed initial parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Task(build_model(work.model, SHAPE, CLASSES), SHAPE, CLASSES, SEED)


def make_data(work: Workload) -> tuple[Tensor, Tensor]:
    """Synthetic images and labels, client after client: (clients * EXAMPLES, 1, 28, 28) and (clients * EXAMPLES,)."""
    rng = torch_rng(SEED, "bench", work.name)
    x = torch.randn(work.clients * EXAMPLES, *SHAPE, generator=rng)
    return x, torch.randint(0, CLASSES, (len(x),), generator=rng)


def rows_of(i: int) -> slice:
    return slice(i * EXAMPLES, (i + 1) * EXAMPLES)


# --- the floors ------------------------------------------------------------------------------------------------------


class Loop:
    """The bare loop: one nn.Module, one optim.SGD, weights copied in, a running float32 sum."""

    def __init__(self, work: Workload, x: Tensor, y: Tensor) -> None:
        self.work, self.x, self.y = work, x, y
        self.model = make_task(work).model
        self.weights = [p.detach().clone() for p in self.model.parameters()]
        self.sums = [torch.zeros_like(w) for w in self.weights]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)

    def client(self, i: int, server_round: int, weights: list[Tensor]) -> None:
        """Local training from ``weights``; the result stays in the module."""
        with torch.no_grad():
            for p, w in zip(self.model.parameters(), weights, strict=True):
                p.copy_(w)
        x, y = self.x[rows_of(i)], self.y[rows_of(i)]
        order = torch.randperm(EXAMPLES, generator=torch_rng(SEED, server_round, i, "train"))
        for batch in order.split(BATCH):
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(x[batch]), y[batch]).backward()
            self.optimizer.step()

    def add(self, sums: list[Tensor]) -> None:
        with torch.no_grad():
            for s, p in zip(sums, self.model.parameters(), strict=True):
                s.add_(p, alpha=EXAMPLES)

    def round(self, server_round: int) -> None:
        cohort = sample_cohort(range(self.work.clients), self.work.cohort / self.work.clients, SEED, server_round)
        for s in self.sums:
            s.zero_()
        for i in cohort:
            self.client(i, server_round, self.weights)
            self.add(self.sums)
        for w, s in zip(self.weights, self.sums, strict=True):
            torch.div(s, EXAMPLES * len(cohort), out=w)


class Forked:
    """Two forked processes with weights and partial sums in shared memory, each with half of the cohort."""

    def __init__(self, work: Workload, x: Tensor, y: Tensor, processes: int = 2) -> None:
        self.work = work
        loop = Loop(work, x, y)
        self.weights = [w.share_memory_() for w in loop.weights]
        self.sums = [[torch.zeros_like(w).share_memory_() for w in self.weights] for _ in range(processes)]
        fork = multiprocessing.get_context("fork")
        self.pipes = []
        for k in range(processes):
            ours, theirs = fork.Pipe()
            fork.Process(target=self._work, args=(loop, theirs, self.sums[k]), daemon=True).start()
            self.pipes.append(ours)

    def _work(self, loop: Loop, pipe: multiprocessing.connection.Connection, sums: list[Tensor]) -> None:
        torch.set_num_threads(1)
        while True:
            server_round, cohort = pipe.recv()
            for s in sums:
                s.zero_()
            for i in cohort:
                loop.client(i, server_round, self.weights)
                loop.add(sums)
            pipe.send(None)

    def round(self, server_round: int) -> None:
        cohort = sample_cohort(range(self.work.clients), self.work.cohort / self.work.clients, SEED, server_round)
        for k, pipe in enumerate(self.pipes):
            pipe.send((server_round, cohort[k :: len(self.pipes)]))
        for pipe in self.pipes:
            pipe.recv()
        with torch.no_grad():
            for parts in zip(self.weights, *self.sums, strict=True):
                torch.div(sum(parts[2:], start=parts[1]), EXAMPLES * len(cohort), out=parts[0])


# --- fedsparse -------------------------------------------------------------------------------------------------------


def app_of(work: Workload) -> ClientApp:
    """The workload's clients; a Ray worker makes them for itself."""
    x, y = make_data(work)
    data = [Split(x[rows_of(i)], y[rows_of(i)]) for i in range(work.clients)]
    empty = Split(x[:0], y[:0])
    clients = [Client(Device(i), split, empty, empty) for i, split in enumerate(data)]
    return client_app(make_task(work), clients.__getitem__)


def local(work: Workload, workers: int) -> LocalGrid:
    return LocalGrid(app_of(work), work.clients, workers=workers, own_replies=False)


class Ours:
    """FedAvg on one of our engines."""

    def __init__(self, work: Workload, grid: OwnGrid) -> None:
        self.task = make_task(work)
        self.grid = grid
        self.plan = Plan(seed=SEED, fraction=work.cohort / work.clients, evaluate_every=0)
        self._reports: Iterator[dict[str, object]] | None = None

    def strategy(self) -> FederatedStrategy:
        return build(load_method("fedavg"), {"lr": LR, "epochs": 1, "batch_size": BATCH})

    def round(self, server_round: int) -> None:
        if self._reports is None:
            self._reports = self.strategy().rounds(self.grid, 1 << 30, task=self.task, plan=self.plan)
        report = next(self._reports)
        assert report["round"] == server_round


def assert_same_bits(work: Workload, loop: Loop, ours: Ours) -> int:
    """Each client of round 1 ends with the loop's parameters, bit for bit; returns how many were compared."""
    strategy = ours.strategy()
    next(strategy.rounds(ours.grid, 1, task=ours.task, plan=ours.plan))  # opens the session
    strategy._session.state = strategy.init(ours.task, [])
    from flwr.app import ArrayRecord, ConfigRecord

    messages = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), ours.grid))
    start = [p.clone() for p in ours.task.init_params().values()]
    count = 0
    for reply in ours.grid.send_and_receive(messages):
        i = reply.metadata.src_node_id - 1
        loop.client(i, 1, start)
        got = decode(reply.content).tensors
        for (name, p), value in zip(loop.model.named_parameters(), got.values(), strict=True):
            assert torch.equal(p.detach(), value), f"workload {work.name}: client {i} differs from the loop in {name}"
        count += 1
    return count


# --- Ray -------------------------------------------------------------------------------------------------------------


class Actors:
    """Two Ray actors, each with half of the cohort in one call a round: what no engine over Ray can beat."""

    def __init__(self, work: Workload) -> None:
        import ray

        self.ray, self.work = ray, work
        self.weights = [p.detach().clone().numpy() for p in make_task(work).model.parameters()]
        actor = ray.remote(_Actor).options(num_cpus=0)
        self.hands = [actor.remote(work) for _ in range(2)]

    def round(self, server_round: int) -> None:
        cohort = sample_cohort(range(self.work.clients), self.work.cohort / self.work.clients, SEED, server_round)
        weights = self.ray.put(self.weights)
        calls = [hand.half.remote(server_round, cohort[k::2], weights) for k, hand in enumerate(self.hands)]
        sums = self.ray.get(calls)
        self.weights = [(a + b) / (EXAMPLES * len(cohort)) for a, b in zip(*sums, strict=True)]


class _Actor:
    def __init__(self, work: Workload) -> None:
        torch.set_num_threads(1)
        self.loop = Loop(work, *make_data(work))

    def half(self, server_round: int, cohort: list[int], weights: list[np.ndarray]) -> list[np.ndarray]:
        start = [torch.from_numpy(w.copy()) for w in weights]
        sums = [torch.zeros_like(w) for w in start]
        for i in cohort:
            self.loop.client(i, server_round, start)
            self.loop.add(sums)
        return [s.numpy() for s in sums]


# --- Flower's runtime ------------------------------------------------------------------------------------------------


class Flower:
    """Flower's message API on two Ray actors, in a process of its own; each round waits for a word."""

    def __init__(self, work: Workload) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        start = time.perf_counter()
        self.process = spawn.Process(target=flower_main, args=(work, theirs))
        self.process.start()
        assert self.pipe.recv() == "ready"
        self.start_seconds = time.perf_counter() - start

    def round(self, server_round: int) -> None:
        self.pipe.send(True)
        self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(False)
        self.process.join(60)
        if self.process.is_alive():
            self.process.terminate()


def flower_main(work: Workload, pipe: multiprocessing.connection.Connection) -> None:
    """A stock Flower app: flwr's FedAvg, a ClientApp that slices tensors as the loop does."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    os.environ["RAY_DEDUP_LOGS"] = "0"
    sys.path.insert(0, str(Path(__file__).parent))
    import ray
    from flwr.app import ArrayRecord, Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    server = ServerApp()

    class Paused(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):  # type: ignore[no-untyped-def]
            pipe.send("ready" if server_round == 1 else None)
            if not pipe.recv():
                raise SystemExit
            return super().configure_train(server_round, arrays, config, grid)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Paused(
            fraction_train=work.cohort / work.clients, fraction_evaluate=0.0, min_available_nodes=work.clients
        )
        strategy.start(grid, ArrayRecord(make_task(work).model.state_dict()), num_rounds=1 << 20)

    from engine_flower_client import make_app

    try:
        run_simulation(
            server,
            make_app(work.name),
            work.clients,
            backend_config={
                "init_args": {"logging_level": "error", "log_to_driver": False, "num_cpus": 2},
                "client_resources": {"num_cpus": 1, "num_gpus": 0},
            },
        )
    finally:
        ray.shutdown()


# --- timing ----------------------------------------------------------------------------------------------------------


def timed(action: Callable[[int], None], server_round: int) -> float:
    start = time.perf_counter()
    action(server_round)
    return time.perf_counter() - start


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    rng = np.random.default_rng(SEED)
    draws = np.median(rng.choice(np.array(values), size=(4000, len(values))), axis=1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def measure(work: Workload, rounds: int, *, over_ray: bool, flower: bool) -> dict[str, dict[str, object]]:
    """Median seconds a round of each runner, and the ratios to the floors."""
    x, y = make_data(work)
    x.share_memory_(), y.share_memory_()
    floors = {"workers1": "loop", **dict.fromkeys(("workers2", "actors", "ray2", "flower"), "forked")}
    runners = {"forked": Forked(work, x, y), "workers2": Ours(work, local(work, 2))}  # these fork: before anything else
    runners |= {"loop": Loop(work, x, y), "workers1": Ours(work, local(work, 1))}
    if over_ray:
        from fedsparse.engine.ray import RayGrid

        grid = RayGrid(partial(app_of, work), work.clients, workers=2, own_replies=False)
        runners |= {"ray2": Ours(work, grid), "actors": Actors(work)}
    for name in (name for name, runner in runners.items() if isinstance(runner, Ours)):
        same = assert_same_bits(work, Loop(work, x, y), runners[name])
        print(f"{work.name}: {name}: parameters of {same} clients bit-equal to the loop's", flush=True)
    if flower:
        runners["flower"] = Flower(work)
        print(f"{work.name}: flower started in {runners['flower'].start_seconds:.1f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in runners}
    order, shuffle = list(runners), random.Random(SEED)
    for server_round in range(1, rounds + 2):  # the first round warms up
        shuffle.shuffle(order)
        for name in order:
            seconds = timed(runners[name].round, server_round)
            if server_round > 1:
                times[name].append(seconds)
    if flower:
        runners["flower"].close()
    if over_ray:
        runners["ray2"].grid.close()
    out: dict[str, dict[str, object]] = {}
    for name, values in times.items():
        out[name] = {"seconds": float(np.median(values)), "best": min(values)}
        if name in floors:
            out[name] |= beside(values, times[floors[name]], floors[name])
    if over_ray:
        out["ray2 beside workers2"] = {**out["ray2"], **beside(times["ray2"], times["workers2"], "workers2")}
    return out


def beside(values: list[float], others: list[float], name: str) -> dict[str, object]:
    """The median ratio to the other's time in the same turn."""
    ratios = [a / b for a, b in zip(values, others, strict=True)]
    low, high = interval(ratios)
    return {"floor": name, "ratio_to_floor": float(np.median(ratios)), "low": low, "high": high}


def main() -> None:
    """Run the workloads and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", default="A,B")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--flower", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    which = {"over_ray": args.ray, "flower": args.flower}
    results = {name: measure(WORKLOADS[name], args.rounds, **which) for name in args.workloads.split(",")}
    for name, runners in results.items():
        print(f"\nworkload {name}: seconds a round, median (best) of {args.rounds}; ratio to its floor [95 % interval]")
        for runner, r in sorted(runners.items()):
            ratio = (
                f"  {r['ratio_to_floor']:.3f} [{r['low']:.3f}, {r['high']:.3f}] x {r['floor']}" if "floor" in r else ""
            )
            print(f"  {runner:20} {r['seconds']:.4f} ({r['best']:.4f}){ratio}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
