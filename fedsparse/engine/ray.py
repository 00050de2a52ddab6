"""The Ray engine: the same grid over long-lived Ray actors, on this machine or on a cluster.

A worker gets a list of jobs and gives a list of answers, in one call; each distinct download is put into the object
store once. Workers on the driver's machine write answers into memory that the driver maps, others into the object
store. The driver owns all client memories: a worker or a node that is lost loses nothing, its lists go to others.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from fedsparse.engine.grid import Answer, Job, OwnGrid, Picked, Runner, identify, picked
from fedsparse.engine.shared import Arena, Buffer, Layout, attached, lay, pick
from fedsparse.engine.store import MemoryStore
from fedsparse.errors import ClientError, UserError
from fedsparse.events import tell
from fedsparse.packet import wire_bytes
from fedsparse.sources import BITS, same_bits

_SHARES = (4, 2, 1)  # of a worker in a window: lists get smaller, to even out unequal clients and to end together
_WINDOW_JOBS = 64  # jobs a worker of a window, at most
_WINDOW_BYTES = 256 << 20  # of answers in a window
_AHEAD = 2  # lists a worker has at hand
_TRIES = 3  # of a list whose workers die
_START_SECONDS, _REACH_SECONDS = 300.0, 5.0
_NO_DEATHS = ("RuntimeEnvSetupError", "ActorUnschedulableError", "OutOfDiskError", "ObjectStoreFullError")
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)  # of the memory of a process that has ended
_log = logging.getLogger("fedsparse")
_T = TypeVar("_T")
_PASSED_ON = ("FEDSPARSE_DATA", "FEDSPARSE_CACHE", *BITS)


@dataclass
class _List:
    """Jobs that one worker does in one call."""

    jobs: list[tuple[int, Message]]
    tries: int = 0


@dataclass
class _Slot:
    """Memory that a worker writes the answers of a list into, and that is mapped here."""

    number: int
    map: memoryview = field(default_factory=lambda: memoryview(b""))
    held: int = 0  # bytes, at most

    def read(self, path: str, size: int) -> memoryview:
        """The first ``size`` bytes. Raises one of ``_GONE`` if the worker is gone."""
        if len(self.map) < size:
            self.map = attached(path)
        if len(self.map) < size:
            raise FileNotFoundError(f"{path} is another worker's")
        self.held = max(self.held, size)
        return self.map[:size]


@dataclass
class _Hand:
    """A worker: its actor, whether it has said that it is there, and the lists that it has, each with its slot.

    near: it runs on this machine and answers in slots. has: the downloads of the list that it was given last; it keeps
    these until the next one.
    """

    actor: Any
    starting: Any
    at: dict[Any, tuple[_List, _Slot | None]] = field(default_factory=dict)
    near: bool = False
    slots: list[_Slot] = field(default_factory=list)
    free: list[_Slot] = field(default_factory=list)
    has: set[int] = field(default_factory=set)

    def forget(self) -> None:
        """What it has at hand is not wanted. It works in order: no later list is written before that one is done."""
        self.at.clear()
        self.has.clear()
        self.free = list(self.slots)

    def slot(self, size: int) -> _Slot | None:
        """One that nobody reads, for about ``size`` bytes; the smallest that will do, since they never shrink."""
        if not self.near:
            return None
        if not self.free:
            self.free.append(_Slot(len(self.slots)))
            self.slots.extend(self.free)
        enough = [slot for slot in self.free if slot.held >= size]
        held = attrgetter("held")
        found = min(enough, key=held) if enough else max(self.free, key=held)
        self.free.remove(found)
        return found

    def leave(self) -> None:
        """It is dead, or not wanted: its memory goes when nobody reads it."""
        self.forget()
        for slot in self.slots:
            slot.map = memoryview(b"")


@dataclass
class _Answers:
    """What a list of jobs gave: the bytes, how many answers were not taken yet, and what to do when none is left."""

    data: memoryview
    left: int
    release: Callable[[], None]


_Done = dict[int, tuple[Answer, _Answers]]  # by partition


class RayGrid(OwnGrid):
    """A grid over Ray actors.

    make: gives the ClientApp in a worker; it is pickled, so it should build data there, once a worker, rather than hold
    them. address: of a cluster to join ("auto" = one that runs here); "" = a Ray of our own, unless one is running.
    cpus, gpus: that a worker takes. sizes: work of a client, by partition; the largest go first. The rest: ``OwnGrid``.
    Raises UserError if Ray is not installed, the cluster is not there, or no worker starts.
    """

    def __init__(
        self,
        make: Callable[[], ClientApp],
        partitions: int,
        *,
        workers: int = 2,
        own_replies: bool = True,
        store: MemoryStore | None = None,
        address: str = "",
        cpus: float = 1.0,
        gpus: float = 0.0,
        sizes: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__(partitions, workers, own_replies, store)
        self._ray = _ray()
        self._same = same_bits()  # before anybody edits a file
        self.lost = 0  # workers that died
        self._sizes = dict(sizes or {})
        self._largest = 0  # bytes of an answer, over those so far
        self._failed_starts = 0  # in a row
        self._needs = f"{cpus:g} CPUs and {gpus:g} GPUs"
        self._arguments = (make, partitions, self.lends, os.getcwd())  # noqa: PTH109 - a word to send
        self._hands: list[_Hand] = []
        self._free: list[bytearray] = []  # to receive answers in: new memory costs as much as what is written to it
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "runtime_env": {"env_vars": _environment()}}
        try:
            self._actor = self._ray.remote(_Worker).options(**options)
        except ValueError as error:
            raise UserError(f"a Ray worker cannot take {self._needs}: {error}") from error
        self._started = _connect(self._ray, address, self.workers, cpus, gpus)
        try:
            self._hands.extend(self._hire() for _ in range(self.workers))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for hand in self._hands:
            self._ray.kill(hand.actor)
            hand.leave()
        self._hands = []
        if self._started:
            self._ray.shutdown()
            self._started = False

    def _hire(self) -> _Hand:
        actor = self._actor.remote(*self._arguments)
        return _Hand(actor, actor.ready.remote())

    # --- an exchange -------------------------------------------------------------------------------------------------

    def _answers(self, jobs: list[tuple[int, Message]]) -> Iterator[Picked]:
        for hand in self._hands:  # of an exchange whose caller stopped reading: what still comes is not wanted
            hand.forget()
        self.busy_seconds = 0.0
        contents = self._contents(jobs)
        windows = self._windows(jobs)
        waiting = deque(lists for window in windows[:1] for lists in window)
        following = deque(windows[1:])
        done: _Done = {}
        left = [sum(len(lists.jobs) for lists in window) for window in windows]
        for window, count in enumerate(left):
            if following:  # a window is read while the next one is done
                waiting.extend(following.popleft())
            start = sum(left[:window])
            for i, _ in jobs[start : start + count]:
                while i not in done:
                    self._step(waiting, contents, done)
                answer, answers = done.pop(i)
                yield picked(answer, Buffer(answers.data), self._own)
                answers.left -= 1
                if not answers.left:  # views were valid until now
                    answers.release()

    def _contents(self, jobs: list[tuple[int, Message]]) -> dict[int, Any]:
        """A reference to each distinct download, by the identity of its records, which the jobs keep alive."""
        refs: dict[int, Any] = {}
        for _, message in jobs:
            if id(message.content) not in refs:
                refs[id(message.content)] = self._ray.put(_laid(message.content))
        return refs

    def _windows(self, jobs: list[tuple[int, Message]]) -> list[list[_List]]:
        """Runs of jobs whose answers may lie about at once, each in lists, the largest clients and lists first.

        Clients of one size keep their order, so that answers can be taken while later lists are at work.
        """
        largest = self._largest or max((wire_bytes(m.content) for _, m in jobs[:1]), default=1)  # at first a download
        most = min(_WINDOW_JOBS * self.workers, max(1, _WINDOW_BYTES // max(1, largest)))
        windows, shares = [], [share for share in _SHARES for _ in range(self.workers)]
        for start in range(0, len(jobs), max(self.workers, most)):
            window = jobs[start : start + max(self.workers, most)]
            order = sorted(window, key=lambda job: (-self._size(job[0]), job[0]))
            parts = _parts(order, [self._size(i) for i, _ in order], shares)
            windows.append([_List(part) for part in parts])
        return windows

    def _size(self, partition: int) -> float:
        return self._sizes.get(partition, 1.0)

    def _step(self, waiting: deque[_List], contents: Mapping[int, Any], done: _Done) -> None:
        """Hand out what there is to do, and wait for one answer or one worker that starts."""
        for _ in range(_AHEAD):
            for hand in self._hands:
                if waiting and hand.starting is None and len(hand.at) < _AHEAD:
                    self._give(hand, waiting.popleft(), contents)
        refs = [ref for hand in self._hands for ref in (*hand.at, *([hand.starting] if hand.starting else ()))]
        busy = any(hand.at for hand in self._hands)
        ready, _ = self._ray.wait(refs, timeout=None if busy else _START_SECONDS)
        if not ready:
            have = self._ray.cluster_resources()
            raise UserError(
                f"no Ray worker was ready within {_START_SECONDS:.0f} s: each takes {self._needs}, the cluster has"
                f" {have.get('CPU', 0):g} and {have.get('GPU', 0):g}, and loads the data"
            )
        for hand in self._hands:
            if ready[0] == hand.starting or ready[0] in hand.at:
                self._take(hand, ready[0], waiting, done)
                return

    def _give(self, hand: _Hand, todo: _List, contents: Mapping[int, Any]) -> None:
        space, jobs = Buffer(), list[Job]()
        for i, message in todo.jobs:
            state = lay(self._states[i], space) if i in self._states else None
            jobs.append((i, message.metadata.message_type, message.metadata.group_id, id(message.content), state))
        down, slot = np.frombuffer(space.data, np.uint8), hand.slot(len(jobs) * self._largest)
        wanted = {which for *_, which, _ in jobs}
        fresh, number = list(wanted - hand.has), None if slot is None else slot.number
        call = hand.actor.work.remote(jobs, number, down, fresh, *(contents[key] for key in fresh))
        hand.at[call], hand.has = (todo, slot), wanted

    def _take(self, hand: _Hand, ref: Any, waiting: deque[_List], done: _Done) -> None:
        errors = self._ray.exceptions
        try:
            found = self._ray.get(ref)
            if ref == hand.starting:
                self._met(hand, *found)
            else:
                self._read(hand, ref, found, done)
        except errors.RayTaskError as error:
            raise ClientError(f"a Ray worker failed: {error.cause or error}") from error
        except tuple(getattr(errors, name) for name in _NO_DEATHS) as error:
            raise UserError(f"engine 'ray': {str(error).splitlines()[0]}") from error
        except (errors.RayError, *_GONE) as error:  # it may also have answered, died, and taken its memory along
            self._replace(hand, waiting, error)
        except OSError as error:
            raise UserError(f"engine 'ray': a worker's memory cannot be mapped: {error}") from error

    def _met(self, hand: _Hand, same: Mapping[str, str], reason: str, offer: tuple[str, bytes]) -> None:
        """A worker says that it is there."""
        if same != self._same:
            what = ", ".join(name for name in self._same if same.get(name) != self._same[name])
            raise UserError(f"the Ray workers have other {what} than the driver; give them the same")
        if reason:
            raise UserError(f"a Ray worker cannot work: {reason}")
        hand.starting, hand.near, self._failed_starts = None, _is_near(*offer), 0

    def _read(self, hand: _Hand, ref: Any, found: tuple[float, list[Answer], Any], done: _Done) -> None:
        """A worker gives the answers to a list."""
        seconds, answers, where = found
        todo, slot = hand.at[ref]
        if slot is None:
            space = self._room(len(where))  # a copy: to write where the object store has them is a crash
            data, release = memoryview(space)[: len(where)], partial(self._free.append, space)
            data[:] = where.data
        else:
            data, release = slot.read(*where), partial(hand.free.append, slot)
        del hand.at[ref]
        self.busy_seconds += seconds
        self._largest = max(self._largest, len(data) // len(answers))
        whole = _Answers(data, len(answers), release)
        done.update({i: (answer, whole) for (i, _), answer in zip(todo.jobs, answers, strict=True)})

    def _room(self, size: int) -> bytearray:
        """At least ``size`` bytes, if possible used before."""
        space = self._free.pop() if self._free else bytearray()
        return space if len(space) >= size else bytearray(size)

    def _replace(self, hand: _Hand, waiting: deque[_List], error: Exception) -> None:
        """A worker is dead: another one starts, and its lists are done again."""
        self.lost += 1
        reason = _reason(error)
        tell("worker_lost", lost=self.lost, reason=reason)
        lists = [todo for todo, _ in hand.at.values()]  # the first one was at work
        hand.leave()
        if lists:
            lists[0].tries += 1
            if lists[0].tries >= _TRIES:
                ids = [i for i, _ in lists[0].jobs]
                raise ClientError(f"{_TRIES} Ray workers died while they ran clients {ids[:5]}; out of memory?")
        waiting.extendleft(reversed(lists))
        self._failed_starts += hand.starting is not None
        if self._failed_starts > _TRIES * self.workers:
            raise UserError(f"Ray workers die while they start: {reason}")
        self._hands[self._hands.index(hand)] = self._hire()
        _log.warning("a Ray worker died, another one takes its place: %s", reason)
        tell("worker_replaced", lost=self.lost)


class _Worker:
    """An actor's life: an app that is made once, lists of jobs in, lists of answers out."""

    def __init__(self, make: Callable[[], ClientApp], partitions: int, lend: bool, folder: str) -> None:
        if os.path.isdir(folder):  # noqa: PTH112 - files that methods are in are named from where the driver is
            os.chdir(folder)
        identify()
        self._error = ""
        self._up = Buffer()
        self._slots: list[Arena] = []
        self._records: dict[int, RecordDict] = {}
        self._offer: Arena | None = None
        try:
            self._runner = Runner(make(), partitions, lend)
        except Exception as error:  # an actor whose making fails looks like one that died
            self._error = f"{type(error).__name__}: {error}"

    def ready(self) -> tuple[dict[str, str], str, tuple[str, bytes]]:
        """What must be the same as the driver's, why this worker cannot work, or "", and memory to look for."""
        token = os.urandom(16)
        try:
            self._offer = Arena()
            self._offer.place(len(token))[1][:] = token
        except OSError:  # then the object store has to do
            return same_bits(), self._error, ("", token)
        return same_bits(), self._error, (self._offer.path, token)

    def work(
        self,
        jobs: list[Job],
        slot: int | None,
        down: np.ndarray[Any, Any],
        fresh: list[int],
        *contents: tuple[Layout, np.ndarray[Any, Any]],
    ) -> tuple[float, list[Answer], Any]:
        """Seconds, answers, and what they lie in: the path and the size of a slot, or bytes.

        slot: its number. fresh: which downloads ``contents`` are; the others are kept from the last list.
        """
        start = time.perf_counter()
        old = {which for *_, which, _ in jobs} - set(fresh)
        self._records = records = {which: self._records[which] for which in old}
        for which, (layout, data) in zip(fresh, contents, strict=True):
            # a copy: a client half that writes into its packet gets an error, not a crash
            records[which] = pick(layout, Buffer(memoryview(bytearray(data))), copy=False)
        up = self._up if slot is None else self._slot(slot)
        up.reset()  # the object store has copied the last list's, and nobody reads a slot that is given
        states = Buffer(down.data)
        answers = [self._runner.there(job, records, states, up) for job in jobs]
        where = (up.path, up.used) if isinstance(up, Arena) else np.frombuffer(up.data, np.uint8)
        return time.perf_counter() - start, answers, where

    def _slot(self, number: int) -> Arena:
        while len(self._slots) <= number:
            self._slots.append(Arena())
        return self._slots[number]


def _parts(items: Sequence[_T], sizes: Sequence[float], shares: Sequence[float]) -> list[list[_T]]:
    """``items`` in order, cut into runs whose sizes are to each other about as ``shares``; none is empty."""
    ends = np.cumsum(shares) / sum(shares)
    middles = (np.cumsum(sizes) - np.asarray(sizes) / 2) / max(sum(sizes), 1e-300)
    places = np.searchsorted(ends, middles)
    runs: list[list[_T]] = [[] for _ in shares]
    for item, place in zip(items, places, strict=True):
        runs[place].append(item)
    return [run for run in runs if run]


def _is_near(path: str, token: bytes) -> bool:
    """Whether a worker's memory can be mapped here: it runs on this machine, for the same user."""
    try:
        return bool(path) and bytes(attached(path)[: len(token)]) == token
    except _GONE:
        return False


def _reason(death: Exception) -> str:
    """The line that says why: of an actor that could not be made, that of the exception there."""
    lines = str(death).splitlines()
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return errors[-1] if errors else lines[0]


def _laid(records: RecordDict) -> tuple[Layout, np.ndarray[Any, Any]]:
    space = Buffer()
    layout = lay(records, space)
    return layout, np.frombuffer(space.data, np.uint8)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("engine 'ray' needs Ray: pip install 'fedsparse[ray]'") from error
    return ray


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {"OMP_NUM_THREADS": "1"}


def _connect(ray: Any, address: str, workers: int, cpus: float, gpus: float) -> bool:
    """Join the cluster, or start a Ray of our own, which is ours to end."""
    if ray.is_initialized():
        return False
    if ":" in address and "://" not in address:  # Ray itself tries for minutes
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), _REACH_SECONDS).close()
        except (OSError, ValueError) as error:
            raise UserError(f"engine 'ray', address {address!r}: no cluster answers there ({error})") from error
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    ours = {
        "num_cpus": max(1, round(workers * cpus + 0.5)),
        "num_gpus": round(workers * gpus + 0.5) if gpus else None,
        "include_dashboard": False,
    }
    try:
        with warnings.catch_warnings():  # of what Ray will do in future versions
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(address=address or "local", **quiet, **({} if address else ours))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"engine 'ray', address {address!r}: {error}") from error
    return True
