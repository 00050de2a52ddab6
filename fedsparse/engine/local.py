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
import time
import traceback
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedsparse.engine.shared import Arena, Layout, chunks, copied, lay, pick
from fedsparse.engine.store import MemoryStore
from fedsparse.errors import ClientError, UserError

_RUN_ID = 1
_FAILED = 1000  # error code of a client that raised, in Flower's range for applications
_CHUNKS_PER_WORKER = 4  # enough to even out unequal clients, few enough to cost nothing
_CHUNK_BYTES = 16 << 20  # of what comes back; a list of jobs has no more, or one job
_FIRST_CHUNK = 16  # jobs in a list before anything has come back
_AHEAD = 2  # chunks a worker has at hand, so that it never waits for the next
_SLOTS = _AHEAD + 1  # lists of a worker that may lie in shared memory: at hand, or answered and not read
_SMALL = 1 << 15  # bytes; a larger list waits until its worker is idle, else both might block while sending


class LocalContext(Context):
    """A Flower context on this machine. lend: the reply may be lent as it is, not encoded."""

    lend: bool = False


class OrderedReplies:
    """A stream of replies in partition order. Each reply is valid until the next one is asked for."""

    ordered = True

    def __init__(self, stream: Iterator[Message]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Message]:
        return self._stream


class LocalGrid(Grid):
    """A Flower Grid over ``partitions`` clients in this process (``workers=1``) or on worker processes.

    app: a ClientApp. own_replies: replies and downloads are the receiver's own (what a stock Flower app expects);
    False lends packets and views of shared memory, valid until the next reply is asked for, and is faster.
    store: of the clients' memories; None = all in RAM. Use it as a context manager, or call ``close``.
    """

    def __init__(
        self,
        app: ClientApp,
        partitions: int,
        *,
        workers: int = 1,
        own_replies: bool = True,
        store: MemoryStore | None = None,
    ) -> None:
        if partitions < 1 or workers < 1:
            raise UserError(f"a grid needs at least one client and one worker, got {partitions} and {workers}")
        self.partitions = {i: i + 1 for i in range(partitions)}  # id -> node id
        self.workers = min(workers, partitions)
        self.busy_seconds = 0.0  # of the last exchange, over all workers
        self.lends = not own_replies
        self._own = own_replies
        self._states = MemoryStore() if store is None else store
        self._pending: dict[str, Message] = {}
        torch.set_num_threads(1)  # one thread per client computation, whatever the number of workers
        _identify(node=0)
        self._pool: _Pool | None = _Pool(app, partitions, self.workers, own_replies) if self.workers > 1 else None
        self._here = _Runner(app, partitions, self.lends)

    # --- Flower's Grid -------------------------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        """A local grid has one run."""

    @property
    def run(self) -> Any:
        from flwr.supercore.run import Run

        return Run.create_empty(_RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message from the server to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The node ids: partition number + 1."""
        return list(self.partitions.values())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; the work is done when their replies are pulled."""
        ids = []
        for message in messages:
            ids.append(uuid.uuid4().hex)
            message.metadata.__dict__["_message_id"] = ids[-1]  # as Flower's own grids do
            self._pending[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to pushed messages."""
        wanted = [self._pending.pop(i) for i in message_ids if i in self._pending]
        return list(self._exchange(wanted))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run the clients; replies in partition order. ``timeout`` is ignored: local clients always answer."""
        replies = self._exchange(list(messages))
        return list(replies) if self._own else OrderedReplies(replies)

    # --- client states -------------------------------------------------------------------------------------------

    def states(self) -> MemoryStore:
        """Each client's Flower state (its memory), by partition number."""
        return self._states

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, messages: list[Message]) -> Iterator[Message]:
        self.busy_seconds = 0.0
        jobs = sorted(((m.metadata.dst_node_id - 1, m) for m in messages), key=lambda job: job[0])
        for i, _ in jobs:
            if i not in self.partitions:
                raise UserError(f"no client {i} on this grid of {len(self.partitions)}")
        if self._pool is None or len(jobs) == 1:
            yield from self._run_here(jobs)
        else:
            yield from self._run_there(jobs)

    def _run_here(self, jobs: list[tuple[int, Message]]) -> Iterator[Message]:
        for i, message in jobs:
            start = time.perf_counter()
            content = copied(message.content) if self._own else message.content
            before = self._states.get(i, RecordDict())
            state = copied(before) if self._own else RecordDict(dict(before))  # a stock app may write into its records
            reply = self._here(i, message, content, state)
            if self._own or _changed(before, state):
                self._states.put(i, state)
            self.busy_seconds += time.perf_counter() - start
            yield reply

    def _run_there(self, jobs: list[tuple[int, Message]]) -> Iterator[Message]:
        assert self._pool is not None
        for (i, message), (content, state, error) in zip(jobs, self._pool.run(jobs, self._states), strict=True):
            if state is not None:
                self._states.put(i, state)
            if content is not None:
                yield Message(content, reply_to=message)
            else:
                code, reason = error or (_FAILED, "")
                yield Message(Error(code, reason), reply_to=message)
        self.busy_seconds = self._pool.busy_seconds


def _identify(node: int) -> None:
    """Flower messages need to know whose they are (flwr's one private import here; a test guards it)."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = _RUN_ID, 0, node


class _Runner:
    """Calls the app for one client. Its errors become Flower error replies."""

    def __init__(self, app: ClientApp, partitions: int, lend: bool) -> None:
        self._app = app
        self._partitions = partitions
        self.lends = lend

    def __call__(self, i: int, message: Message, content: RecordDict, state: RecordDict) -> Message:
        config: dict[str, bool | float | int | str] = {"partition-id": i, "num-partitions": self._partitions}
        context = LocalContext(_RUN_ID, i + 1, config, state, {})
        context.lend = self.lends
        asked = message
        if content is not message.content:
            asked = Message(content, i + 1, message.metadata.message_type, group_id=message.metadata.group_id)
        try:
            return self._app(asked, context)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            return Message(Error(_FAILED, reason), reply_to=message)


# --- worker processes ------------------------------------------------------------------------------------------------

_Job = tuple[int, str, str, int, Layout | None]  # partition, message type, group, which content, state
_Answer = tuple[Layout | None, Layout | None, tuple[int, str] | None]
_Replies = Iterator[tuple[RecordDict | None, RecordDict | None, tuple[int, str] | None]]


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
        fork = multiprocessing.get_context("fork")
        sys.stdout.flush()
        for slots in self._slots:
            ours, theirs = fork.Pipe()
            inherited = [*self._pipes, ours]
            process = fork.Process(
                target=_work,
                args=(_Runner(app, partitions, not own), theirs, inherited, self._down, slots),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, jobs: list[tuple[int, Message]], states: MemoryStore) -> _Replies:
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
        done: dict[int, tuple[_Slot, list[_Answer]]] = {}
        self._give_all()
        for number in range(len(lists)):
            while number not in done:
                self._collect(done)
            slot, answers = done.pop(number)
            for content, state, error in answers:
                yield (
                    None if content is None else pick(content, slot.up, copy=self._own),
                    None if state is None else pick(state, slot.up, copy=True),
                    error,
                )
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

    def _laid(self, jobs: list[tuple[int, Message, int]], arena: Arena) -> list[_Job]:
        """The jobs with their clients' memories in the arena."""
        arena.reset()
        sent = []
        for i, message, content in jobs:
            state = lay(self._states[i], arena) if i in self._states else None
            sent.append((i, message.metadata.message_type, message.metadata.group_id, content, state))
        return sent

    def _collect(self, done: dict[int, tuple[_Slot, list[_Answer]]]) -> None:
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


def _work(runner: _Runner, pipe: Connection, inherited: list[Connection], down: Arena, slots: list[_Slot]) -> None:
    """A worker's life: lists of jobs in, lists of answers out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's business
    for end in inherited:  # else a dead driver's pipes would stay open in its workers
        end.close()
    torch.set_num_threads(1)
    contents: list[RecordDict] = []
    try:
        while True:
            number, slot, layouts, jobs = pipe.recv()
            start = time.perf_counter()
            if layouts is not None:
                contents = [pick(layout, down, copy=False) for layout in layouts]
            slots[slot].up.reset()
            answers = [_answer(runner, job, contents, slots[slot]) for job in jobs]
            pipe.send((number, slot, time.perf_counter() - start, slots[slot].up.used, answers))
    except (EOFError, OSError, KeyboardInterrupt):
        os._exit(0)


def _answer(runner: _Runner, job: _Job, contents: list[RecordDict], slot: _Slot) -> _Answer:
    i, message_type, group, which, state_layout = job
    state = RecordDict() if state_layout is None else pick(state_layout, slot.down, copy=True)
    before = RecordDict(dict(state))
    content = contents[which] if runner.lends else copied(contents[which])  # a stock app may write into its message
    message = Message(content, i + 1, message_type, group_id=group)
    reply = runner(i, message, content, state)
    kept = not runner.lends or _changed(before, state)  # a stock app may write into its records
    new_state = lay(state, slot.up) if kept else None
    if reply.has_error():
        return None, new_state, (reply.error.code, reply.error.reason or "")
    return lay(reply.content, slot.up), new_state, None


def _changed(before: RecordDict, after: RecordDict) -> bool:
    """Whether other records are kept than before."""
    return before.keys() != after.keys() or any(after[name] is not before[name] for name in before)
