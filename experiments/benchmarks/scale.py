"""What many clients cost: memory and time beyond RAM, time beside clients that are not there, and a long run's growth.

    python experiments/benchmarks/scale.py store       [--clients 10000] [--limit 256]
    python experiments/benchmarks/scale.py registered  [--clients 1000 10000 100000] [--cohort 1000]
    python experiments/benchmarks/scale.py soak        [--rounds 2000]
    (--json FILE: keep the figures)

store: pFedGate on synthetic 28x28 images, LeafCNN1 at a quarter of its width with gates of about 270 kB, two rounds of
all clients: ten clients; all, with their memories in RAM; all, with at most --limit MB (10^6 bytes) of them in RAM.
Peak of anonymous and shared memory of the process, as the kernel counts it; digests; seconds of the rounds.
registered: logistic regression on 20 features, FedAvg, --cohort clients a round out of so many. The sets run in turns,
round by round, in processes of their own; a ratio is the median over turns of time / the smallest set's in the same
turn. Then what is held for a registered client (memory after the first round, largest set less smallest, without the
examples) and for a client's row of a round (growth over the rounds of the smallest set, by client and round).
soak: pFedGate on the digits with two workers; memory, threads, open files and the run folder every hundred rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

import fedsparse
from fedsparse.experiment import from_dict

TRAIN, TEST = 8, 2  # examples of a synthetic client
FEATURES = 20  # of an example for logistic regression
SPAWN = multiprocessing.get_context("spawn")  # a process of its own, with nothing inherited
QUIET = {"every": 1 << 20, "fraction": 0.001}
MB = 10**6


# --- what the kernel says --------------------------------------------------------------------------------------------


def family() -> list[int]:
    """This process and its children."""
    here = os.getpid()
    children = Path(f"/proc/{here}/task/{here}/children").read_text().split()
    return [here, *map(int, children)]


def memory_bytes() -> int:
    """Anonymous and shared memory in RAM of this process and its children, each page once; no file cache."""
    total = 0
    for pid in family():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
        total += 1024 * (found["Pss_Anon"] + found["Pss_Shmem"])
    return total


class Peak:
    """The largest memory while the block runs, looked at every ``every`` seconds."""

    def __init__(self, every: float = 0.2) -> None:
        self.bytes, self._every, self._stop = 0, every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.bytes = max(self.bytes, memory_bytes())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """The result of ``work`` in a new process."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_there, args=(theirs, work, args))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def _there(pipe: Connection, work: Callable[..., Any], args: Sequence[Any]) -> None:
    pipe.send(work(*args))


def synthetic(folder: Path, clients: int, shape: tuple[int, ...], model: str) -> Path:
    """A .npz of noise with a weak signal, TRAIN + TEST examples a client, and its name."""
    path = folder / f"{model}{clients}.npz"
    rng, n = np.random.default_rng(0), clients * (TRAIN + TEST)
    y = rng.integers(0, 10, n)
    x = rng.standard_normal((n, *shape), dtype=np.float32) + 0.1 * y.reshape(-1, *[1] * len(shape)).astype(np.float32)
    part = np.tile(np.repeat([0, 1], [TRAIN, TEST]), clients).astype(np.uint8)
    np.savez(path, x=x, y=y, client=np.repeat(np.arange(clients), TRAIN + TEST), part=part)
    return path


# --- memories beyond RAM ---------------------------------------------------------------------------------------------


def store(clients: int, limit: int) -> dict[str, Any]:
    """The three runs, one after the other, and what they are held to."""
    found = {}
    for name, number, bound in (("ten", 10, 0), ("ram", clients, 0), ("disk", clients, limit)):
        found[name] = apart(one_store, number, bound)
        print(name, json.dumps(found[name]), flush=True)
    over = (found["disk"]["peak"] - found["ten"]["peak"]) / MB
    in_ram = (found["ram"]["peak"] - found["ten"]["peak"]) / MB
    print(f"peak above ten clients {over:.0f} MB, with all memories in RAM {in_ram:.0f}")
    print(f"same digest: {found['disk']['digest'] == found['ram']['digest']}")
    print(f"time of the rounds {found['disk']['rounds'] / found['ram']['rounds']:.3f} x that of memories in RAM")
    return found


def one_store(clients: int, limit: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        data = synthetic(Path(folder), clients, (1, 28, 28), "leafcnn1")
        experiment = from_dict(
            {
                "dataset": str(data),
                "model": "leafcnn1",
                "width": 0.25,
                "rounds": 2,
                "partition": {"scheme": "natural", "min_train": 1, "min_test": 1},
                "budget": {"tiers": [0.5], "on_over_budget": "record"},
                "evaluate": QUIET,
                "engine": {"memory_mb": limit, "checkpoint_every": 0},
                "method": {"name": "pfedgate", "blocks_per_layer": 12, "batch_size": TRAIN},
            }
        )
        done = fedsparse.run(experiment, out=Path(folder) / "run")
        held = sum(t.nbytes for t in done.memories[0].values()) * clients
        visited = len({row["client"] for row in done.clients})
        return {
            "clients": clients,
            "visited": visited,
            "memories": held,
            "peak": peak.bytes,
            "rounds": sum(r["seconds"]["wall"] for r in done.rounds),
            "wall": done.summary["seconds"]["wall"],
            "digest": done.summary["digest"],
        }


# --- clients that are registered and not there -----------------------------------------------------------------------


def registered(sizes: Sequence[int], cohort: int, rounds: int) -> dict[str, Any]:
    """Seconds a round for each number of registered clients, in turns."""
    pipes, processes = [], []
    for size in sizes:
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=waiting, args=(theirs, size, cohort, rounds), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
        print(f"{size} clients: ready after {ours.recv():.1f} s", flush=True)
    times: list[list[float]] = [[] for _ in sizes]
    first = [pipe.recv() for pipe in pipes]
    last = list(first)
    for turn in range(rounds):
        for i, pipe in enumerate(pipes):
            pipe.send(True)
            seconds, last[i] = pipe.recv()
            if turn:  # the first round warms up
                times[i].append(seconds)
    found: dict[str, Any] = {}
    for size, own in zip(sizes, times, strict=True):
        ratios = [a / b for a, b in zip(own, times[0], strict=True)]
        found[str(size)] = {"seconds": float(np.median(own)), "ratio": float(np.median(ratios))}
        print(f"{size:7} registered, {cohort} a round: {np.median(own):.3f} s a round, {np.median(ratios):.3f} x")
    for process in processes:
        process.terminate()
    examples = (TRAIN + TEST) * (FEATURES * 4 + 8)  # of a client: float32 features, an int64 label
    found["row_bytes"] = (last[0] - first[0]) / (rounds * cohort)
    print(f"a client's row of a round: {found['row_bytes']:.0f} bytes")
    if len(sizes) > 1:
        found["client_bytes"] = (first[-1] - first[0]) / (sizes[-1] - sizes[0]) - examples
        print(f"a registered client: {found['client_bytes']:.0f} bytes beside its examples of {examples}")
    return found


def waiting(pipe: Connection, clients: int, cohort: int, rounds: int) -> None:
    """A run that waits for a word before each round, and answers with the seconds that the round took and the memory
    that is held. Before, it says how long it took to be ready, and what it then held."""
    start = time.perf_counter()
    last = [0.0]

    def after(_: dict[str, Any]) -> None:
        seconds = time.perf_counter() - last[0]
        pipe.send((seconds, memory_bytes()))
        pipe.recv()
        last[0] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        data = synthetic(Path(folder), clients, (FEATURES,), "logistic")
        experiment = from_dict(
            {
                "dataset": str(data),
                "model": "logistic",
                "rounds": rounds + 1,
                "fraction": cohort / clients,
                "partition": {"scheme": "natural", "min_train": 1, "min_test": 1},
                "evaluate": QUIET,
                "engine": {"checkpoint_every": 0},
                "method": {"name": "fedavg", "batch_size": TRAIN},
            }
        )
        first = [True]

        def on_round(report: dict[str, Any]) -> None:
            if first[0]:  # the round in which everything is made does not count
                first[0] = False
                pipe.send(time.perf_counter() - start)
                pipe.send(memory_bytes())
                pipe.recv()
                last[0] = time.perf_counter()
            else:
                after(report)

        fedsparse.run(experiment, out=Path(folder) / "run", on_round=on_round)


# --- a long run ------------------------------------------------------------------------------------------------------


def soak(rounds: int) -> dict[str, Any]:
    """What a long run holds, every hundred rounds."""
    with tempfile.TemporaryDirectory() as folder:
        found = apart(one_soak, rounds, folder)
    for line in found:
        print(json.dumps(line))
    return {"lines": found}


def one_soak(rounds: int, folder: str) -> list[dict[str, Any]]:
    out = Path(folder) / "run"
    experiment = from_dict(
        {
            "dataset": "digits",
            "rounds": rounds,
            "fraction": 0.5,
            "budget": {"tiers": [1.0, 0.5]},
            "engine": {"workers": 2, "checkpoint_every": 10},
            "evaluate": {"every": 10},
            "method": {"name": "pfedgate"},
        }
    )
    lines: list[dict[str, Any]] = []

    def after(report: dict[str, Any]) -> None:
        if report["round"] % 100 == 50:
            lines.append({"round": report["round"], **held(out)})

    fedsparse.run(experiment, out=out, on_round=after)
    return lines


def held(out: Path) -> dict[str, int]:
    """Memory, threads and open files of this process and its children; bytes of the folder, history apart."""
    pids = family()
    files = [path for path in out.rglob("*") if path.is_file()]
    history = [path for path in files if path.suffix == ".jsonl"]
    return {
        "memory": memory_bytes(),
        "processes": len(pids),
        "threads": sum(_entries(f"/proc/{pid}/task") for pid in pids),
        "open_files": sum(_entries(f"/proc/{pid}/fd") for pid in pids),
        "history_bytes": sum(path.stat().st_size for path in history),
        "other_bytes": sum(path.stat().st_size for path in files) - sum(path.stat().st_size for path in history),
        "files": len(files),
    }


def _entries(folder: str) -> int:
    return len(list(Path(folder).iterdir()))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("store", "registered", "soak"))
    parser.add_argument("--clients", nargs="+", type=int, help="for store one number, for registered several")
    parser.add_argument("--limit", type=int, default=256, help="MB of memories in RAM, for store")
    parser.add_argument("--cohort", type=int, default=1000, help="clients a round, for registered")
    parser.add_argument("--rounds", type=int, help="for registered (20) and soak (2000)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.what == "store":
        found = store((args.clients or [10_000])[0], args.limit)
    elif args.what == "registered":
        found = registered(args.clients or [1000, 10_000, 100_000], args.cohort, args.rounds or 20)
    else:
        found = soak(args.rounds or 2000)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
