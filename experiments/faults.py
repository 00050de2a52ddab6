"""Seeded faults against real runs on the local engine: what is killed, raised, cut, altered, doubled or full.

    python experiments/faults.py --schedules 200 --seed 0        # a table of kinds, outcomes and counts
    python experiments/faults.py --schedules 1 --seed 137        # one schedule again

Each schedule is a small run with one fault, resumed (or begun anew, where there was no checkpoint yet) until it is
complete. It must end with the digest of the run without the fault; on its way it may stop with one clear line, and
nothing else. After every attempt no process may be left, and no file that is not whole may look as if it were.
Replies are altered in the client's process. What an altered reply with the right form and finite values says cannot be
noticed, by anybody: such are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

import fedsparse.runner as runner
from fedsparse.checkpoint import Checkpoints
from fedsparse.engine.grid import OrderedReplies
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import UserError
from fedsparse.events import EVENTS, read_events
from fedsparse.experiment import Experiment, from_dict
from fedsparse.final import FINAL
from fedsparse.lent import LentRecords
from fedsparse.method import load_method
from fedsparse.packet import Packet, decode, encode

CLIENTS = 4
METHODS = ("fedavg", "pfedgate", "fedtiny", "feddst")
MORE = {
    "pfedgate": ["budget.tiers=[1, 0.5]"],
    "fedtiny": ["method.batch_size=16", "method.delta_r=1", "method.r_stop=3"],
    "feddst": ["method.batch_size=16", "method.delta_r=1", "method.r_stop=3"],
}
KINDS = {
    "kill a worker": ("before", "after", "outside"),
    "kill the driver": ("outside", "outside", "client", "fsync", "replace", "rename", "unlink", "interrupt"),
    "raise": ("in the app", "around it", "exit"),
    "delay": ("before",),
    "truncate": ("tensor", "values", "bytes", "words", "records"),
    "corrupt": ("nan", "inf", "type", "kind", "weight", "name", "extra", "header", "layout", "numbers"),
    "duplicate or lose": ("twice", "late", "swapped", "lost"),
    "full disk": ("small disk", "small files"),
}
REPLY = ("truncate", "corrupt")  # kinds that alter a reply
DEAD, STOPPED, BROKEN, CTRL_C = -signal.SIGKILL, 2, 3, 130
LIMIT = 240.0  # seconds for an attempt: more is a hang
LINE = 600  # characters of a clear line, at most
HISTORY = ("rounds.jsonl", "clients.jsonl")


@dataclass(frozen=True)
class Schedule:
    """A run and its fault. round, client, stage: where a fault in a client strikes, from that round on, once.

    moments: when the driver or a worker is killed, as shares of the time that the run takes. number: of the call at
    which the driver dies, or of bytes. skip: whether failing clients are left out.
    """

    seed: int
    kind: str
    how: str
    method: str
    workers: int
    rounds: int
    every: int
    memory_mb: int
    round: int
    client: int
    stage: str
    moments: tuple[float, ...]
    number: int
    skip: bool

    @property
    def experiment(self) -> Experiment:
        """Without the fault."""
        settings = {
            "method": self.method,
            "dataset": "digits",
            "rounds": self.rounds,
            "fraction": 0.75,
            "partition.max_clients": CLIENTS,
            "engine.workers": self.workers,
            "engine.checkpoint_every": self.every,
            "engine.memory_mb": self.memory_mb,
            "engine.on_client_error": "skip" if self.skip else "stop",
        }
        return from_dict({}, [*(f"{key}={value}" for key, value in settings.items()), *MORE.get(self.method, ())])

    @property
    def in_client(self) -> bool:
        """Whether a client's call is where it strikes."""
        return self.how == "client" or (
            self.kind in ("kill a worker", "raise", "delay", *REPLY) and self.how != "outside"
        )


def schedule(seed: int, methods: Sequence[str] = METHODS) -> Schedule:
    """The schedule of a seed: the kinds take turns, all else is drawn."""
    rng = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    how, rounds = rng.choice(KINDS[kind]), rng.randint(3, 5)
    workers = rng.randint(1, 2)
    if kind == "kill a worker" or how == "client":  # a driver that is alone dies with its client
        workers = 2 if kind == "kill a worker" else 1
    stage = "train" if kind in REPLY else rng.choice(("train", "evaluate"))
    return Schedule(
        seed,
        kind,
        how=how,
        method=rng.choice(methods),
        workers=workers,
        rounds=rounds,
        every=rng.randint(1, 2),
        memory_mb=rng.randint(0, 1),
        round=rng.randint(1, rounds),
        client=rng.randrange(CLIENTS),
        stage=stage,
        moments=tuple(rng.uniform(0, 1.1) for _ in range(rng.randint(1, 2))),
        number=rng.randint(1, 40),
        skip=kind in ("raise", *REPLY) and rng.random() < 0.3,
    )


# --- faults in a client ----------------------------------------------------------------------------------------------


@dataclass
class Faulty:
    """A ClientApp in which the schedule's fault strikes once: ``mark`` is the file that says that it has."""

    app: ClientApp
    plan: Schedule
    mark: Path

    def __call__(self, message: Message, context: Context) -> Message:
        plan = self.plan
        asked = message.metadata
        here = context.node_config["partition-id"] == plan.client and asked.message_type == plan.stage
        if not here or int(asked.group_id) < plan.round or self.mark.exists():
            return self.app(message, context)
        self.mark.touch()
        if plan.how in ("before", "client") and plan.kind != "delay":
            os.kill(os.getpid(), signal.SIGKILL)
        if plan.kind == "delay":
            time.sleep(plan.number / 40)
        if plan.how == "around it":
            raise RuntimeError("out of luck")
        if plan.how == "exit":
            sys.exit(5)
        if plan.how == "in the app":
            message = Message(RecordDict(), context.node_id, asked.message_type, group_id=asked.group_id)
        reply = self.app(message, context)
        if plan.how == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return Message(altered(reply.content, plan), reply_to=message) if plan.kind in REPLY else reply


def altered(records: RecordDict, plan: Schedule) -> RecordDict:
    """A reply that is cut or altered so that it shows."""
    packet = decode(records)
    if plan.how in PACKETS:
        name = sorted(n for n, t in packet.tensors.items() if t.numel())[plan.number % len(packet.tensors)]
        return LentRecords(PACKETS[plan.how](packet, name, plan.number))
    raw = encode(packet)
    array, config = next(iter(raw.array_records.values()))["flat"], raw.config_records["config"]
    if plan.how == "bytes":
        array.data = array.data[: -plan.number]
    elif plan.how == "header":
        array.data = bytes(byte ^ 255 * (at == plan.number) for at, byte in enumerate(array.data))
    elif plan.how == "words":
        del raw["config"]
    elif plan.how == "layout":
        config["layout"] = str(config["layout"])[: -plan.number]
    elif plan.how == "numbers":
        raw["arrays"] = ArrayRecord()
        raw["metrics"] = MetricRecord({"weight": [1, 2]})
    return RecordDict() if plan.how == "records" else raw


def _with(packet: Packet, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Packet:
    return replace(packet, tensors={n: change(t) if n == name else t for n, t in packet.tensors.items()})


def _set(packet: Packet, name: str, number: int, value: float) -> Packet:
    """One element of the first float32 tensor from ``name`` on is ``value``."""
    names = [n for n, t in packet.tensors.items() if t.dtype == torch.float32 and t.numel()]
    name = name if name in names else names[0]
    at = number % packet.tensors[name].numel()

    def change(t: torch.Tensor) -> torch.Tensor:
        flat = t.clone().reshape(-1)
        flat[at] = value
        return flat.view(t.shape)

    return _with(packet, name, change)


def _weight(packet: Packet, number: int) -> Packet:
    wrong: tuple[Any, ...] = (0, -1, math.nan, math.inf, "1", -0.5)
    return replace(packet, scalars={**packet.scalars, "weight": wrong[number % len(wrong)]})


PACKETS: dict[str, Callable[[Packet, str, int], Packet]] = {
    "tensor": lambda p, n, _: replace(p, tensors={k: t for k, t in p.tensors.items() if k != n}),
    "values": lambda p, n, _: _with(p, n, lambda t: t.reshape(-1)[:-1].clone()),
    "nan": lambda p, n, k: _set(p, n, k, math.nan),
    "inf": lambda p, n, k: _set(p, n, k, -math.inf),
    "type": lambda p, n, _: _with(p, n, lambda t: t.to(torch.float64)),
    "kind": lambda p, *_: replace(p, kind=f"no {p.kind}"),
    "weight": lambda p, _, k: _weight(p, k),
    "name": lambda p, n, _: replace(p, tensors={(f"{k}s" if k == n else k): t for k, t in p.tensors.items()}),
    "extra": lambda p, *_: replace(p, tensors={**p.tensors, "one more": torch.ones(3)}),
}


# --- other faults, in the driver's process ---------------------------------------------------------------------------


def arm(plan: Schedule, mark: Path) -> None:
    """Prepare this process, which does nothing else afterwards, for its fault."""
    if plan.in_client:
        plain = runner.client_app
        runner.client_app = lambda *args: Faulty(plain(*args), plan, mark)  # type: ignore[assignment,return-value]
    if plan.kind == "duplicate or lose":
        _disorder(plan, mark)
    if plan.how in ("fsync", "replace", "rename", "unlink"):
        _die_at(plan, mark)
    if plan.how == "small files" and not mark.exists():
        mark.touch()
        size = 1000 * plan.number * plan.number
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _disorder(plan: Schedule, mark: Path) -> None:
    """One exchange's replies come twice, in another order, or not all."""
    plain = LocalGrid.send_and_receive

    def exchange(self: LocalGrid, messages: Any, *, timeout: float | None = None) -> Any:
        messages = list(messages)
        stream = plain(self, messages, timeout=timeout)
        first = messages[0].metadata
        if mark.exists() or first.message_type != plan.stage or int(first.group_id) < plan.round:
            return stream
        mark.touch()
        return OrderedReplies(_disordered(stream, plan))

    LocalGrid.send_and_receive = exchange  # type: ignore[method-assign]


def _disordered(stream: Any, plan: Schedule) -> Iterator[Message]:
    replies = [Message(encode(decode(m.content)), reply_to=_asked(m)) for m in stream]
    at = plan.number % len(replies)
    if plan.how == "twice":
        replies.insert(at, replies[at])
    elif plan.how == "late":
        replies.append(replies[0])
    elif plan.how == "swapped":
        at = at % (len(replies) - 1)
        replies[at], replies[at + 1] = replies[at + 1], replies[at]
    else:
        del replies[at]
    yield from replies


def _asked(reply: Message) -> Message:
    """A message that such a reply answers."""
    meta = reply.metadata
    return Message(RecordDict(), meta.src_node_id, meta.message_type, group_id=meta.group_id)


def _die_at(plan: Schedule, mark: Path) -> None:
    """The process ends at the so-manieth call of a function of ``os`` that the run's files need."""
    plain, seen = getattr(os, plan.how), Counter[str]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen[plan.how] += 1
        if seen[plan.how] == plan.number and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    setattr(os, plan.how, counted)


# --- attempts: processes of their own --------------------------------------------------------------------------------


@dataclass
class Attempt:
    """One process: its exit code (minus a signal, None = it hung), what it printed, the seconds it took."""

    code: int | None
    said: str
    seconds: float
    orphans: list[int] = field(default_factory=list)


def attempt(
    work: Callable[[], object],
    log: Path,
    meanwhile: Callable[[int, float], None] | None = None,
    limit: float = LIMIT,
) -> Attempt:
    """Do it in a forked process with a session of its own, at whose end no process of the session may be left.

    meanwhile: called all along with its id and the seconds so far. limit: seconds after which it hangs.
    """
    sys.stdout.flush()
    start = time.monotonic()
    child = os.fork()
    if not child:
        _child(work, log)
    code: int | None = None
    while code is None and time.monotonic() - start < limit:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
        elif meanwhile:
            meanwhile(child, time.monotonic() - start)
        time.sleep(0.002)
    seconds = time.monotonic() - start
    if code is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    left = orphans(child)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return Attempt(code, log.read_text(errors="replace"), seconds, left)


def _child(work: Callable[[], object], log: Path) -> None:
    code = BROKEN
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's jobs in the background ignore
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout = sys.stderr = os.fdopen(fd, "w")  # a test's are elsewhere
        work()
        code = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = STOPPED
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not get out of here
        code = CTRL_C
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def orphans(session: int, patience: float = 10.0) -> list[int]:
    """The processes of a session that do not end within so many seconds."""
    deadline = time.monotonic() + patience
    while (left := [pid for pid, stat in _processes() if stat[3] == str(session)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def workers_of(driver: int) -> list[int]:
    """Its children."""
    return [pid for pid, stat in _processes() if stat[1] == str(driver)]


def _processes() -> Iterator[tuple[int, list[str]]]:
    """Those that live, and what /proc says: state, parent, group, session."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has just ended
            continue
        if stat[0] not in "ZX":
            yield int(path.parent.name), stat


# --- what must hold --------------------------------------------------------------------------------------------------


def damage(folder: Path, digest: str) -> list[str]:
    """What of a run folder, complete or not, looks whole and is not."""
    found = []
    if (folder / "summary.json").exists():
        found += _incomplete(folder, digest)
    checkpoints = Checkpoints(folder, HISTORY)
    for name in checkpoints.names() if not (folder / "summary.json").exists() else ():
        try:
            checkpoints.read(name)
        except UserError as error:
            found.append(f"checkpoint {name}: {error}")
    if (folder / EVENTS).exists():
        try:
            read_events(folder / EVENTS)
        except UserError as error:
            found.append(str(error))
    for name in HISTORY:
        whole = (folder / name).read_bytes().split(b"\n")[:-1] if (folder / name).exists() else []
        found += [f"{name}, line {n}" for n, line in enumerate(whole) if not _is_json(line)]
    return found


def _incomplete(folder: Path, digest: str) -> list[str]:
    """What a folder with a summary lacks."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        load_file(folder / FINAL)
        rows = pq.read_table(folder / "clients.parquet").num_rows
        last = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])
        page = (folder / "report.html").read_text()
    except Exception as error:  # each reader has its own
        return [f"a summary without the rest: {error}"]
    wrong = [] if summary["digest"] == digest else [f"the digest is {summary['digest']}, not {digest}"]
    if last["round"] != last["rounds"] or not rows or not page.endswith("</html>\n"):
        wrong.append("tables or page are not complete")
    return wrong


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


# --- a schedule ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a schedule went. struck: the fault did. complaints: what must not be.

    stopped, killed: attempts that ended with one clear line (or Ctrl-C), or by SIGKILL. resumed, anew: attempts that
    went on from a checkpoint, or began anew for want of one. right: complete, with the digest wanted.
    """

    plan: Schedule
    struck: bool = False
    stopped: int = 0
    killed: int = 0
    resumed: int = 0
    anew: int = 0
    right: bool = False
    complaints: list[str] = field(default_factory=list)


class Faults:
    """Plays schedules in a folder. References, runs without a fault, are made once a method and number of rounds."""

    def __init__(self, place: Path, limit: float = LIMIT) -> None:
        self._place, self._limit = place, limit
        self._known: dict[tuple[str, int], tuple[str, float]] = {}
        for name in METHODS:  # once, for all processes that are forked
            load_method(name)

    def play(self, plan: Schedule) -> Outcome:
        """Run, and go on with the run until it is complete, or something is as it must not be."""
        place = Path(tempfile.mkdtemp(prefix=f"{plan.seed}-", dir=self._place))
        outcome, (digest, seconds) = Outcome(plan), self._reference(plan)
        with _disk(plan, place) as (disk, enlarge):
            folder = disk / "run0"
            for number in range(len(plan.moments) + 5):
                if _can_go_on(folder):
                    outcome.resumed += 1
                elif number:
                    outcome.anew += 1
                    folder = disk / f"run{number}"
                done = self._attempt(plan, place, folder, number, seconds)
                struck_before, outcome.struck = outcome.struck, (place / "mark").exists()
                judge(outcome, done, folder, digest, noticed=outcome.struck and not struck_before)
                enlarge()
                if outcome.right or outcome.complaints:
                    return outcome
        outcome.complaints.append("it does not come to an end")
        return outcome

    def _attempt(self, plan: Schedule, place: Path, folder: Path, number: int, seconds: float) -> Attempt:
        """The run, or its rest, with what is left of the fault."""
        mark = place / "mark"

        def work() -> None:
            arm(plan, mark)
            runner.resume(folder) if _can_go_on(folder) else runner.run(plan.experiment, out=folder)

        kill = None
        if plan.how in ("outside", "interrupt") and number < len(plan.moments):
            kill = Killer(plan, plan.moments[number] * seconds, mark)
        return attempt(work, place / f"log{number}", kill, self._limit)

    def _reference(self, plan: Schedule) -> tuple[str, float]:
        """The digest that is right, and about how long the run takes."""
        key = plan.method, plan.rounds
        if plan.skip:  # the same client must be missing, whatever the number of workers
            other = replace(plan, workers=3 - plan.workers)
            return self._digest(other, self._place / f"skip{plan.seed}")
        if key not in self._known:
            without = replace(plan, kind="none", how="", workers=1)
            self._known[key] = self._digest(without, self._place / f"{plan.method}{plan.rounds}")
        return self._known[key]

    def _digest(self, plan: Schedule, place: Path) -> tuple[str, float]:
        place.mkdir()
        done = self._attempt(plan, place, place / "run", 0, 0.0)
        if done.code:
            raise SystemExit(f"error: the reference of {plan} failed: {done.said}")
        return json.loads((place / "run" / "summary.json").read_text())["digest"], done.seconds


@dataclass
class Killer:
    """Once so many seconds have gone the driver is killed or interrupted, or one of its workers is killed."""

    plan: Schedule
    after: float
    mark: Path
    done: bool = False

    def __call__(self, driver: int, seconds: float) -> None:
        if self.done or seconds < self.after:
            return
        if self.plan.kind == "kill a worker":
            workers = workers_of(driver)
            if not workers:
                return
            os.kill(workers[self.plan.number % len(workers)], signal.SIGKILL)
        elif self.plan.how == "interrupt":
            os.killpg(driver, signal.SIGINT)  # as a terminal does
        else:
            os.kill(driver, signal.SIGKILL)
        self.mark.touch()
        self.done = True


def judge(outcome: Outcome, done: Attempt, folder: Path, digest: str, *, noticed: bool) -> None:
    """Count an attempt and complain of what must not be. noticed: whether the fault has struck in it."""
    plan, complain = outcome.plan, outcome.complaints.append
    outcome.complaints += [f"process {pid} was left" for pid in done.orphans]
    outcome.complaints += damage(folder, digest)
    complete = (folder / "summary.json").exists()
    outcome.right = complete and not outcome.complaints
    if done.code is None:
        complain(f"it hung: {done.said[-LINE:]}")
    elif done.code == 0:
        if not complete:
            complain("it ended without a summary")
        if noticed and not plan.skip and plan.kind in ("raise", "duplicate or lose", *REPLY):
            complain("nobody noticed")
    elif done.code == DEAD and plan.kind == "kill the driver":
        outcome.killed += 1
    elif done.code == STOPPED or (done.code == CTRL_C and plan.how == "interrupt"):
        outcome.stopped += 1
        lines = [line for line in done.said.splitlines() if line.startswith("error: ")]
        if len(lines) != (done.code == STOPPED) or "Traceback" in done.said or len(done.said) > LINE:
            complain(f"not one clear line: {done.said[:LINE]}")
        if complete:
            complain("it stopped, but has a summary")
    else:
        complain(f"exit code {done.code}: {done.said[-LINE:]}")


def _can_go_on(folder: Path) -> bool:
    return (folder / "config.toml").exists() and bool(Checkpoints(folder, HISTORY).names())


@contextmanager
def _disk(plan: Schedule, place: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Where the run writes, and what to call after its first attempt: it makes a small disk large."""
    disk = place / "disk"
    disk.mkdir()
    if plan.how != "small disk":
        yield disk, lambda: None
        return
    size = 8 * (3 + plan.number)  # kB
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)

    def enlarge() -> None:
        (place / "mark").touch()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)

    try:
        yield disk, enlarge
    finally:
        subprocess.run(["umount", disk], check=True)


def can_mount() -> bool:
    """Whether small disks can be had; only root may, and not in every container."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
        return done and subprocess.run(["umount", folder], check=True).returncode == 0


# --- many schedules --------------------------------------------------------------------------------------------------


def play_all(seeds: Sequence[int], methods: Sequence[str], place: Path, limit: float = LIMIT) -> Iterator[Outcome]:
    """The outcomes of the schedules of these seeds. limit: seconds for an attempt."""
    faults, mounts = Faults(place, limit), can_mount()
    for seed in seeds:
        plan = schedule(seed, methods)
        yield faults.play(plan if mounts or plan.how != "small disk" else replace(plan, how="small files"))


COLUMNS: dict[str, Callable[[Outcome], int]] = {
    "schedules": lambda o: 1,
    "struck": lambda o: o.struck,
    "stopped": lambda o: o.stopped,
    "killed": lambda o: o.killed,
    "resumed": lambda o: o.resumed,
    "begun anew": lambda o: o.anew,
    "right digest": lambda o: o.right,
    "faults found": lambda o: bool(o.complaints),
}


def line(outcome: Outcome) -> str:
    """One schedule in words."""
    plan, ways = outcome.plan, ("struck", "stopped", "killed", "resumed", "begun anew", "right digest")
    counts = ", ".join(f"{way} {int(COLUMNS[way](outcome))}" for way in ways)
    return f"{plan.seed} {plan.kind} ({plan.how}), {plan.method}, {plan.workers} workers: {counts}"


def table(outcomes: Sequence[Outcome]) -> str:
    """A row a kind of fault."""
    lines = [f"{'fault':<18}" + "".join(f"{name:>13}" for name in COLUMNS)]
    for kind in (*KINDS, "all"):
        of = [o for o in outcomes if kind in (o.plan.kind, "all")]
        lines.append(f"{kind:<18}" + "".join(f"{sum(map(count, of)):>13}" for count in COLUMNS.values()))
    return "\n".join(lines)


def main() -> None:
    """The command line; exit code 1 if anything was as it must not be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds for one attempt; raise it on a busy machine"
    )
    args = parser.parse_args()
    outcomes, seeds = list[Outcome](), range(args.seed, args.seed + args.schedules)
    try:
        with tempfile.TemporaryDirectory(prefix="fedsparse-faults-") as place:
            for outcome in play_all(seeds, args.methods, Path(place), args.limit):
                outcomes.append(outcome)
                print(line(outcome), *outcome.complaints, sep="\n  ", flush=True)
    finally:
        print(table(outcomes))
    sys.exit(any(o.complaints for o in outcomes))


if __name__ == "__main__":
    main()
