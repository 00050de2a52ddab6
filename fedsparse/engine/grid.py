"""What our engines share: a Flower Grid whose clients run in processes that it owns, and how one client is called."""

from __future__ import annotations

import itertools
import time
import traceback
import uuid
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedsparse.engine.shared import Layout, Space, copied, lay, pick
from fedsparse.engine.store import MemoryStore
from fedsparse.errors import FAILED, UserError

_RUN_ID = 1

Job = tuple[int, str, str, int, Layout | None]  # partition, message type, group, which content, state
Failure = tuple[int, str]  # code and reason
Answer = tuple[Layout | None, Layout | None, Failure | None]  # content, new state, failure
Picked = tuple[RecordDict | None, RecordDict | None, Failure | None]  # the same, no longer laid out


class LocalContext(Context):
    """A Flower context on this machine. lend: the reply may be lent as it is, not encoded."""

    lend: bool = False


class OrderedReplies:
    """A stream of replies in partition order. Each is valid until the next one is asked for, or another exchange."""

    ordered = True

    def __init__(self, stream: Iterator[Message]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Message]:
        return self._stream


class _Sender(Grid):
    """Abstract: how all grids here make messages."""

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message from the server to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)


class GridAround(_Sender):
    """Abstract: a grid around another one, to which all that it does not do itself is handed."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Any) -> None:
        """The run is the inner grid's."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of the clients."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for their replies, in any order."""
        return self._grid.send_and_receive(messages, timeout=timeout)


class OwnGrid(_Sender):
    """Abstract: a Flower Grid over ``partitions`` clients, which the driver runs. An engine says how (``_answers``).

    own_replies: replies and downloads are the receiver's own (what a stock Flower app expects); False lends packets and
    views, valid until the next reply is asked for or another exchange begins, and is faster. store: of the clients'
    memories; None = all in RAM. Use it as a context manager, or call ``close``.
    """

    def __init__(self, partitions: int, workers: int, own_replies: bool, store: MemoryStore | None) -> None:
        if partitions < 1 or workers < 1:
            raise UserError(f"a grid needs at least one client and one worker, got {partitions} and {workers}")
        self.partitions = {i: i + 1 for i in range(partitions)}  # id -> node id
        self.workers = min(workers, partitions)
        self.busy_seconds = 0.0  # of the last exchange, over all workers
        self.lends = not own_replies
        self._own = own_replies
        self._states = MemoryStore() if store is None else store
        self._pending: dict[str, Message] = {}
        self._exchanges = 0
        identify()

    # --- Flower's Grid -----------------------------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        """A grid of ours has one run."""

    @property
    def run(self) -> Any:
        from flwr.supercore.run import Run

        return Run.create_empty(_RUN_ID)

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
        """Run the clients; replies in partition order. ``timeout`` is ignored: these clients always answer."""
        replies = self._exchange(list(messages))
        return list(replies) if self._own else OrderedReplies(replies)

    # --- ours --------------------------------------------------------------------------------------------------------

    def states(self) -> MemoryStore:
        """Each client's Flower state (its memory), by partition number."""
        return self._states

    def gather(self) -> None:
        """Bring all memories into the store: they are there."""

    @abstractmethod
    def close(self) -> None:
        """End the workers."""

    @abstractmethod
    def _answers(self, jobs: list[tuple[int, Message]]) -> Iterator[Picked]:
        """The answers to jobs (partition, message), which are in partition order, in the same order."""

    def __enter__(self) -> OwnGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, messages: list[Message]) -> Iterator[Message]:
        self._exchanges += 1
        this = self._exchanges
        self.busy_seconds = 0.0
        jobs = sorted(((m.metadata.dst_node_id - 1, m) for m in messages), key=lambda job: job[0])
        for i, _ in jobs:
            if i not in self.partitions:
                raise UserError(f"no client {i} on this grid of {len(self.partitions)}")
        for (i, _), (j, _) in itertools.pairwise(jobs):
            if i == j:
                raise UserError(f"two messages for client {i} in one exchange: its memory would follow neither")
        for (i, message), (content, state, error) in zip(jobs, self._answers(jobs), strict=True):
            if state is not None:
                self._states.put(i, state)
            if content is not None:
                yield Message(content, reply_to=message)
            else:
                yield Message(Error(*(error or (FAILED, ""))), reply_to=message)
            if self._exchanges != this:
                raise UserError("another exchange has begun on this grid: the replies of this one are gone")


def identify() -> None:
    """Flower messages need to know whose they are (flwr's one private import here; a test guards it)."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = _RUN_ID, 0, 0


class Runner:
    """Calls the app for one client. Its errors become Flower error replies."""

    def __init__(self, app: ClientApp, partitions: int, lend: bool) -> None:
        self._app = app
        self._partitions = partitions
        self.lends = lend
        torch.set_num_threads(1)  # one thread per client computation, whatever the engine

    def __call__(self, i: int, message: Message, content: RecordDict, state: RecordDict) -> Message:
        config: dict[str, bool | float | int | str] = {"partition-id": i, "num-partitions": self._partitions}
        context = LocalContext(_RUN_ID, i + 1, config, state, {})
        context.lend = self.lends
        asked = message
        if content is not message.content:
            asked = Message(content, i + 1, message.metadata.message_type, group_id=message.metadata.group_id)
        try:
            return self._app(asked, context)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            return Message(Error(FAILED, reason), reply_to=message)

    def here(self, i: int, message: Message, before: RecordDict) -> tuple[Picked, float]:
        """The answer of a client whose memory is in this process, and the seconds it took."""
        start = time.perf_counter()
        content = message.content if self.lends else copied(message.content)
        state = RecordDict(dict(before)) if self.lends else copied(before)  # a stock app may write into its records
        reply = self(i, message, content, state)
        kept = None if self.lends and not _changed(before, state) else state
        seconds = time.perf_counter() - start
        if reply.has_error():
            return (None, kept, (reply.error.code, reply.error.reason or "")), seconds
        return (reply.content, kept, None), seconds

    def there(self, job: Job, contents: Mapping[int, RecordDict], down: Space, up: Space) -> Answer:
        """The answer to a job in another process: the memory is read from ``down``, what comes back goes to ``up``."""
        i, message_type, group, which, state_layout = job
        state = RecordDict() if state_layout is None else pick(state_layout, down, copy=True)
        before = RecordDict(dict(state))
        content = contents[which] if self.lends else copied(contents[which])  # a stock app may write into its message
        reply = self(i, Message(content, i + 1, message_type, group_id=group), content, state)
        kept = not self.lends or _changed(before, state)  # a stock app may write into its records
        new_state = lay(state, up) if kept else None
        if reply.has_error():
            return None, new_state, (reply.error.code, reply.error.reason or "")
        return lay(reply.content, up), new_state, None


def picked(answer: Answer, space: Space, own: bool) -> Picked:
    """An answer's records; views of the space unless they are to be the receiver's own. Memories are always own."""
    content, state, error = answer
    return (
        None if content is None else pick(content, space, copy=own),
        None if state is None else pick(state, space, copy=True),
        error,
    )


def _changed(before: RecordDict, after: RecordDict) -> bool:
    """Whether other records are kept than before."""
    return before.keys() != after.keys() or any(after[name] is not before[name] for name in before)
