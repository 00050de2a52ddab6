"""One digest: a small experiment on every engine, to its end, and killed by SIGKILL and resumed.

    python experiments/one_digest.py [--methods fedavg,pfedgate,fedtiny] [--rounds 5] [--out DIR]

Prints the digests' first 8 digits, a row for each way to run and a column for each method. What the first run of a
method measured (the representation of a layer) holds for the others. Exit code 0; 1 if a column has two digests; 2 for
a run that failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.flower_runtime import KINDS, begin, checkpoint_after, go_on
from fedsparse.errors import UserError
from fedsparse.experiment import Experiment, from_dict, load_experiment
from fedsparse.verify import verify

OWN = (("local", 1), ("local", 4), ("ray", 1), ("ray", 2))
CLIENTS = 3  # and so many SuperNodes
KILL_AFTER = 3  # lines of rounds.jsonl
SHOWN = 8
FEDSPARSE = (sys.executable, "-m", "fedsparse")


def experiment_of(method: str, rounds: int) -> Experiment:
    """The digits on three clients, with a checkpoint a round."""
    small = ["dataset=digits", f"partition.clients={CLIENTS}", f"rounds={rounds}", f"evaluate.every={rounds}"]
    more = ["method.density=0.3"] if method == "fedtiny" else []
    return from_dict({}, [*small, f"method={method}", "engine.checkpoint_every=1", *more])


def digests(method: str, rounds: int, folder: Path) -> Iterator[tuple[str, str]]:
    """(row, digest) for each way to run a method."""
    yield from verify(experiment_of(method, rounds), OWN, out=folder)
    first = folder / "0-local-1" / "config.toml"
    for kind, workers in OWN:
        yield f"{kind}:{workers}, killed", killed(first, kind, workers, folder / f"{kind}-{workers}-killed")
    _close_when_ended()  # once more: Ray has taken the signal
    for kind in KINDS:
        yield f"flwr {kind}", begin(kind, load_experiment(first), folder / f"flwr-{kind}")
        place = folder / f"flwr-{kind}-killed"
        begin(kind, load_experiment(first), place, kill_after=KILL_AFTER)
        yield f"flwr {kind}, killed", go_on(kind, place)


def killed(config: Path, kind: str, workers: int, folder: Path) -> str:
    """The digest of ``fedsparse run``, killed once a checkpoint is there, and ``fedsparse resume``."""
    engine = ("--engine", kind, "--workers", str(workers))
    child = subprocess.Popen((*FEDSPARSE, "run", str(config), *engine, "--out", str(folder), "--quiet"))
    while child.poll() is None and not checkpoint_after(folder, KILL_AFTER):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    if child.wait() != -signal.SIGKILL:
        raise UserError(f"the run was over before it could be killed, with exit code {child.returncode}")
    if subprocess.run((*FEDSPARSE, "resume", str(folder), "--quiet"), check=False).returncode:
        raise UserError(f"the run that was killed on {kind}:{workers} cannot be resumed")
    return str(json.loads((folder / "summary.json").read_text())["digest"])


def _close_when_ended() -> None:
    """SIGTERM ends all processes, not this one alone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="fedavg,pfedgate,fedtiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    args = parser.parse_args(arguments)
    os.environ.setdefault("RAY_worker_niceness", "0")  # else a busy machine starves Ray's workers
    methods, table = args.methods.split(","), dict[str, dict[str, str]]()
    with tempfile.TemporaryDirectory(prefix="fedsparse-") as temporary:
        try:
            for method in methods:
                for name, digest in digests(method, args.rounds, (args.out or Path(temporary)) / method):
                    print(f"{method}, {name}: {digest}", file=sys.stderr, flush=True)
                    table.setdefault(name, {})[method] = digest
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    width = max(map(len, table))
    print(" " * width, *(f"{method:>{SHOWN}}" for method in methods), sep="  ")
    for name, row in table.items():
        print(f"{name:<{width}}", *(f"{row[method][:SHOWN]:>{SHOWN}}" for method in methods), sep="  ")
    return int(any(len({row[method] for row in table.values()}) > 1 for method in methods))


if __name__ == "__main__":
    _close_when_ended()
    sys.exit(main())
