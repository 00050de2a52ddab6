"""The local engine: a Flower Grid that runs ClientApps in this process, or on long-lived worker processes.

With one worker clients run one after the other right here, when their reply is asked for, so a debugger works. With N
workers, N processes of one thread each get lists of messages and return lists of replies through shared memory; there
is no server, no port, and no call per client. Data that exist before ``LocalGrid(...)`` are inherited, not copied.
Replies and client memories on their way are bounded by the number of workers, whatever the size of the cohort.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import FrameType

import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from fedsparse.engine.grid import Answer, Job, OwnGrid, Picked, Runner, picked
from fedsparse.engine.shared import Arena, Layout, chunks, lay, pick
from fedsparse.engine.store import MemoryStore
from fedsparse.errors import ClientError, UserError
from fedsparse.events import leave, tell

_CHUNKS_PER_WORKER = 8  # enough to even out unequal clients, few enough to cost nothing
_CHUNK_BYTES = 16 << 20  # of what comes back; a list of jobs has no more, or one job
_FIRST_CHUNK = 16  # jobs in a list before anything has come back
_AHEAD = 2  # chunks a worker has at hand, so that it never waits for the next
_SLOTS = _AHEAD + 1  # lists of a worker that may lie in shared memory: at hand, or answered and not read
_SMALL = 1 << 15  # bytes; a larger list waits until its worker is idle, else both might block while sending


class LocalGrid(OwnGrid):
    """A grid in this process (``workers=1``) or on forked worker processes. app: a ClientApp; the rest: ``OwnGrid``."""

    def __init__(
        self,
        app: ClientApp,
        partitions: int,
        *,
        workers: int = 1,
        own_replies: bool = True,
        store: MemoryStore | None = None,
    ) -> None:
        super().__init__(partitions, workers, own_replies, store)
        torch.set_num_threads(1)  # before the workers are forked
        self._pool: _Pool | None = _Pool(app, partitions, self.workers, own_replies) if self.workers > 1 else None
        self._here = Runner(app, partitions, self.lends)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _answers(self, jobs: list[tuple[int, Message]]) -> Iterator[Picked]:
        if self._pool is not None and len(jobs) > 1:
            yield from self._pool.run(jobs, self._states)
            self.busy_seconds = self._pool.busy_seconds
            return
        for i, message in jobs:
            answer, seconds = self._here.here(i, message, self._states.get(i, RecordDict()))
            self.busy_seconds += seconds
            yield answer


# --- worker processes ------------------------------------------------------------------------------------------------


class _Slot:
    """A place for one list of jobs: the memories that go along, and what comes back."""

    def __init__(self) -> None:
        self.down, self.up = Arena(), Arena()
        self.free = True


class _Pool:
    """Worker processes that live as long as the grid. Forked (or spawned) before any thread starts."""

    def __init__(self, app: ClientApp, partitions: int, workers: int, own: bool) -> None:
        self.busy_seconds = 0.0
        self._own = own
        self._jobs: deque[tuple[int, list[tuple[int, Message, int]]]] = deque()  # lists that nobody has
        self._states: MemoryStore = MemoryStore()
        self._load = [0] * workers  # lists that each worker has not answered
        self._fresh: list[list[Layout] | None] = [None] * workers  # downloads that a worker has not seen
        self._down = Arena()
        self._largest = 0  # bytes of an answer, over those so far
        self._slots = [[_Slot() for _ in range(_SLOTS)] for _ in range(workers)]
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        if "fork" not in multiprocessing.get_all_start_methods():
            raise UserError("engine.workers > 1 needs a system that can fork; use workers = 1")
        sys.stdout.flush()
        with _interrupts_wait():
            for slots in self._slots:
                self._start(Runner(app, partitions, not own), slots)

    def _start(self, runner: Runner, slots: list[_Slot]) -> None:
        """One worker more."""
        fork = multiprocessing.get_context("fork")
        ours, theirs = fork.Pipe()
        inherited = [*self._pipes, ours]
        process = fork.Process(target=_work, args=(runner, theirs, inherited, self._down, slots), daemon=True)
        process.start()
        theirs.close()
        self._pipes.append(ours)
        self._processes.append(process)

    def run(self, jobs: list[tuple[int, Message]], states: MemoryStore) -> Iterator[Picked]:
        """Answers in the order of ``jobs``, as a stream: content, new state, error."""
        self._jobs.clear()
        while any(self._load):  # of an exchange whose caller stopped reading: workers finish it first
            self._collect({})
        for slot in (slot for slots in self._slots for slot in slots):
            slot.free = True
        self._down.reset()
        self.busy_seconds, self._states = 0.0, states
        contents, which = self._contents(jobs)
        self._fresh = [contents] * len(self._pipes)
        work = [(i, message, number) for (i, message), number in zip(jobs, which, strict=True)]
        most = _CHUNK_BYTES // self._largest if self._largest else _FIRST_CHUNK
        lists = chunks(work, max(_CHUNKS_PER_WORKER * len(self._pipes), -(-len(work) // max(1, most))))
        self._jobs = deque(enumerate(lists))
        done: dict[int, tuple[_Slot, list[Answer]]] = {}
        self._give_all()
        for number in range(len(lists)):
            while number not in done:
                self._collect(done)
            slot, answers = done.pop(number)
            for answer in answers:
                yield picked(answer, slot.up, self._own)
            slot.free = True
            self._give_all()

    def _contents(self, jobs: list[tuple[int, Message]]) -> tuple[list[Layout], list[int]]:
        """Each distinct download laid out once, and which one each job has."""
        contents: list[Layout] = []
        index: dict[int, int] = {}
        for _, message in jobs:
            records = message.content
            if id(records) not in index:
                index[id(records)] = len(contents)
                contents.append(lay(records, self._down))
        return contents, [index[id(message.content)] for _, message in jobs]

    def _give_all(self) -> None:
        """Keep the workers busy, each in turn."""
        for _ in range(_AHEAD):
            for worker in range(len(self._pipes)):
                self._give(worker)

    def _give(self, worker: int) -> None:
        """Send the worker its next list, if there is one, a place for it, and sending it cannot block."""
        slot = next((n for n, slot in enumerate(self._slots[worker]) if slot.free), None)
        if not self._jobs or self._load[worker] >= _AHEAD or slot is None:
            return
        number, jobs = self._jobs[0]
        sent = self._laid(jobs, self._slots[worker][slot].down)
        data = bytes(ForkingPickler.dumps((number, slot, self._fresh[worker], sent)))
        if self._load[worker] and len(data) > _SMALL:
            return
        try:
            self._pipes[worker].send_bytes(data)
        except OSError as error:
            raise self._lost(worker) from error
        self._jobs.popleft()
        self._fresh[worker] = None
        self._load[worker] += 1
        self._slots[worker][slot].free = False

    def _laid(self, jobs: list[tuple[int, Message, int]], arena: Arena) -> list[Job]:
        """The jobs with their clients' memories in the arena."""
        arena.reset()
        sent = []
        for i, message, content in jobs:
            state = lay(self._states[i], arena) if i in self._states else None
            sent.append((i, message.metadata.message_type, message.metadata.group_id, content, state))
        return sent

    def _collect(self, done: dict[int, tuple[_Slot, list[Answer]]]) -> None:
        """Wait for answers and keep workers busy."""
        for pipe in wait(self._pipes):
            worker = self._pipes.index(pipe)  # type: ignore[arg-type]
            try:
                number, slot, seconds, size, answers = self._pipes[worker].recv()
            except (EOFError, OSError) as error:
                raise self._lost(worker) from error
            done[number] = self._slots[worker][slot], answers
            self._load[worker] -= 1
            self._largest = max(self._largest, size // len(answers))
            self.busy_seconds += seconds
            for _ in range(_AHEAD):
                self._give(worker)

    def _lost(self, worker: int) -> ClientError:
        self._processes[worker].join(1)
        code = self._processes[worker].exitcode
        tell("worker_lost", worker=worker + 1, workers=len(self._pipes), exit_code=code)
        return ClientError(f"worker process {worker + 1} of {len(self._pipes)} died (exit code {code}); out of memory?")

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        arenas = (arena for slots in self._slots for slot in slots for arena in (slot.down, slot.up))
        for arena in [self._down, *arenas]:
            arena.close()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C is noted and comes after the block. Amid a fork Python's own hooks would drop it, and a worker that does
    not ignore it yet would end with a traceback.

    The mask is for the workers; other threads of this process, such as torch's, take the signal all the same.
    """
    noted: list[tuple[int, FrameType | None]] = []
    handler, mask = signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    swapped = callable(handler) and threading.current_thread() is threading.main_thread()
    try:
        if swapped:
            signal.signal(signal.SIGINT, lambda *args: noted.append(args))
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if swapped:
            signal.signal(signal.SIGINT, handler)
        if noted and callable(handler):
            handler(*noted[0])


def _work(runner: Runner, pipe: Connection, inherited: list[Connection], down: Arena, slots: list[_Slot]) -> None:
    """A worker's life: lists of jobs in, lists of answers out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's business; one that waits is dropped
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    for end in inherited:  # else a dead driver's pipes would stay open in its workers
        end.close()
    torch.set_num_threads(1)
    contents: dict[int, RecordDict] = {}
    try:
        while True:
            number, slot, layouts, jobs = pipe.recv()
            start = time.perf_counter()
            if layouts is not None:
                contents = {i: pick(layout, down, copy=False) for i, layout in enumerate(layouts)}
            slots[slot].up.reset()
            answers = [runner.there(job, contents, slots[slot].down, slots[slot].up) for job in jobs]
            pipe.send((number, slot, time.perf_counter() - start, slots[slot].up.used, answers))
    except (EOFError, OSError, KeyboardInterrupt):
        leave()
        os._exit(0)
