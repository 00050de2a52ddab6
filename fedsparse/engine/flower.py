"""Flower's own runtime, simulation or deployment: its Grid as the runner needs it, and the ClientApp of its nodes.

Before anything else every node is greeted: it learns the resolved experiment, compares its source code and the
variables that change bits with the server's, and says which client it is. A client's memory lives in the ``state`` of
its node's Context. Those that training may have changed are fetched in pieces for each checkpoint and at the end, and
sent back when a run goes on: nothing that a node or a SuperLink held before is needed then.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from safetensors import SafetensorError
from torch import Tensor

from fedsparse.client import error_packet
from fedsparse.engine.grid import GridAround
from fedsparse.engine.store import MemoryStore, memory_bytes, memory_records
from fedsparse.errors import ClientError, UserError, named, shown
from fedsparse.packet import Packet, decode, encode, run_words
from fedsparse.replies import is_count
from fedsparse.sources import must_agree

Make = Callable[[str], ClientApp]  # the text of a resolved experiment -> its clients
_HELLO, _MEMORY, _RESTORE = "hello", "memory", "restore"  # kinds of query packets
_EXPERIMENT = "fedsparse.experiment"  # the record of a node's state that holds what it was greeted with
_PIECE, _WINDOW = 4 << 20, 64 << 20  # bytes of a memory in one message, and of all messages under way
_NOBODY = -1  # the id of a node that has none
_ANSWER = 3600.0  # seconds that a node which is there may take to answer a greeting
_POLL = 0.5  # seconds between looks at who is there
_log = logging.getLogger("fedsparse")


class FlowerGrid(GridAround):
    """The grid of a ServerApp whose nodes were greeted. config: the resolved experiment (TOML) that they run.

    clients: how many the experiment has; nodes with other partition ids stay idle. store: takes the memories; those
    that it has, of a run that goes on, are sent to their clients. most: bytes of a client's memory, at most. wait:
    seconds until all nodes must have come. Raises UserError when they are not, ClientError for a node that refuses.
    """

    def __init__(
        self, grid: Grid, config: str, clients: int, store: MemoryStore, most: int, *, wait: float = 60.0
    ) -> None:
        torch.set_num_threads(1)  # as in every engine
        super().__init__(grid)
        self._store = store
        self._most = most
        self.partitions = self._greeted(config, clients, wait)  # id -> node id
        self._trained: set[int] = set()  # the nodes whose memories may be newer than the store's
        self._restore()

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of the experiment's clients."""
        return list(self.partitions.values())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns their ids."""
        return super().push_messages(self._noted(messages))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for their replies, in any order."""
        return super().send_and_receive(self._noted(messages), timeout=timeout)

    # --- ours --------------------------------------------------------------------------------------------------------

    def gather(self) -> None:
        """Fetch the memories that training may have changed since the last call into the store."""
        clients = sorted(i for i, node in self.partitions.items() if node in self._trained)
        if not clients:
            return
        first = max(1, min(_PIECE, _WINDOW // len(clients)))  # a small memory comes whole at the first time
        found, sizes = dict[int, bytes](), dict[int, int]()
        for i, piece, sizes[i] in self._pieces([(i, 0, first) for i in clients]):
            self._take(i, piece, sizes[i], found)
        for group in _groups({i: sizes[i] for i in found}):
            while rest := [(i, len(found[i]), _PIECE) for i in group if i in found]:
                for i, piece, size in self._pieces(rest):
                    if size != sizes[i]:
                        raise ClientError(f"client {i}: its memory of {sizes[i]} bytes has become one of {size}")
                    self._take(i, found.pop(i) + piece, size, found)
        self._trained.clear()

    def __enter__(self) -> FlowerGrid:
        return self

    def __exit__(self, *_: object) -> None:
        """The runtime ends its nodes' work itself."""

    def _take(self, client: int, data: bytes, size: int, found: dict[int, bytes]) -> None:
        """A memory that is whole goes to the store, another one to those of which more is to come."""
        if len(data) < size:
            found[client] = data
        elif data:
            try:
                self._store.put(client, _memory(data))
            except UserError as error:
                raise ClientError(f"client {client} sent {error}") from error

    def _restore(self) -> None:
        """Send each client the memory that the store has of it, so many bytes at a time."""
        for group in _groups({i: kept.size for i, kept in self._store.flush().items()}):
            asked = {
                self.partitions[i]: Packet(_RESTORE, {"bytes": _tensor(memory_bytes(self._store[i]))}) for i in group
            }
            answers = self._answers(asked, timeout=None)
            for i in group:
                answer = answers.get(self.partitions[i], Packet("error", scalars={"message": "no answer"}))
                if answer.kind != _RESTORE:
                    raise ClientError(f"client {i} did not take its memory back: {_reason(answer)}", _trace(answer))

    def _noted(self, messages: Iterable[Message]) -> list[Message]:
        """The messages; who is told to train may change its memory, others do not."""
        noted = list(messages)
        self._trained |= {m.metadata.dst_node_id for m in noted if m.metadata.message_type == MessageType.TRAIN}
        return noted

    def _pieces(self, wanted: list[tuple[int, int, int]]) -> Iterator[tuple[int, bytes, int]]:
        """(client, bytes, size of the whole) for each (client, first byte, largest number of bytes) in that order."""
        asked = {
            self.partitions[i]: Packet(_MEMORY, scalars={"start": start, "length": length})
            for i, start, length in wanted
        }
        answers = self._answers(asked, timeout=None)
        for i, start, length in wanted:
            answer = answers.pop(self.partitions[i], None)
            if answer is None:
                raise ClientError(f"client {i} did not send its memory")
            if answer.kind != _MEMORY:
                raise ClientError(f"client {i}, memory: {_reason(answer)}", _trace(answer))
            piece, size = _bytes(answer.tensors.get("bytes")), answer.scalars.get("size")
            if not is_count(size, 0, self._most):
                raise ClientError(f"client {i}: its memory has {shown(size)} bytes, where 0 to {self._most} are taken")
            if len(piece) != min(length, size - start):
                raise ClientError(f"client {i} sent {len(piece)} bytes of its memory of {size}, from {start} on")
            yield i, piece, size

    def _answers(self, asked: Mapping[int, Packet], timeout: float | None) -> dict[int, Packet]:
        """The answers to queries, by node, of the nodes that did answer."""
        if not asked:
            return {}
        records = {id(packet): encode(packet) for packet in asked.values()}
        messages = [
            self.create_message(records[id(packet)], MessageType.QUERY, node, "0") for node, packet in asked.items()
        ]
        return {m.metadata.src_node_id: _answer(m) for m in self._grid.send_and_receive(messages, timeout=timeout)}

    def _greeted(self, config: str, clients: int, wait: float) -> dict[int, int]:
        """Greet nodes as they come until all clients are there."""
        hello = Packet(_HELLO, scalars={"config": config, "same": json.dumps(must_agree())})
        end, met = time.monotonic() + wait, dict[int, int]()
        while True:
            fresh = dict.fromkeys(sorted(set(self._grid.get_node_ids()) - set(met.values())), hello)
            for node, answer in self._answers(fresh, timeout=_ANSWER).items():
                said = answer.scalars.get("id")
                client = said if is_count(said, 0) else _NOBODY
                if answer.kind != _HELLO:
                    name = f"node {node}" if client == _NOBODY else f"client {client}"
                    raise ClientError(f"{name} cannot take part: {_reason(answer)}", _trace(answer))
                if client == _NOBODY:
                    raise ClientError(f"node {node}: its partition-id is {shown(said)}, a number from 0 is wanted")
                if client in met:
                    raise UserError(f"two nodes say that they are client {client}: give each its own partition-id")
                met[client] = node
            missing = [i for i in range(clients) if i not in met]
            if not missing:
                break
            if time.monotonic() > end:
                raise UserError(
                    f"{clients - len(missing)} of {clients} clients are there after {wait:g} s, client {missing[0]} is"
                    f" not: a simulation needs num-supernodes={clients}, a deployment a SuperNode for each partition-id"
                )
            time.sleep(_POLL)
        if len(met) > clients:
            _log.info("%d nodes stay idle: the experiment has %d clients", len(met) - clients, clients)
        return {i: met[i] for i in range(clients)}


def _answer(message: Message) -> Packet:
    """A node's answer; an error of Flower's as an error packet."""
    if message.has_error():
        return Packet("error", scalars={"message": message.error.reason or f"error {message.error.code}"})
    return decode(message.content)


def _bytes(tensor: Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.numpy().tobytes()


def _tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _memory(data: bytes) -> RecordDict:
    """The records of a memory that came over the wire. Raises UserError for all but tensors under names."""
    try:
        records = memory_records(data)
        packet = decode(records, alone=True)
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"a memory that cannot be read: {named(error)}") from error
    if packet.scalars or run_words(records):
        raise UserError("a memory that cannot be read: it holds more than tensors")
    return records


def _reason(answer: Packet) -> str:
    return str(answer.scalars.get("message", f"an answer of kind {answer.kind!r}"))


def _trace(answer: Packet) -> str:
    return str(answer.scalars.get("trace", ""))


def _groups(sizes: Mapping[int, int]) -> Iterator[list[int]]:
    """The clients in order, in lists of at most ``_WINDOW`` bytes, or one client."""
    group, total = list[int](), 0
    for i, size in sizes.items():
        if group and total + size > _WINDOW:
            yield group
            group, total = [], 0
        group.append(i)
        total += size
    if group:
        yield group


# --- at the nodes ----------------------------------------------------------------------------------------------------


def node_app(make: Make) -> ClientApp:
    """The ClientApp of a node: it is greeted, then does what the experiment's clients do. ``make`` is called once in a
    process, but for another experiment."""
    app = ClientApp()

    def work(message: Message, context: Context) -> Message:
        try:
            torch.set_num_threads(1)
            config = _agreed(context.state)
            return _made(make, config)(message, context)
        except Exception as error:
            return Message(encode(error_packet(error)), reply_to=message)

    app.train()(work)
    app.evaluate()(work)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        try:
            reply = _asked(decode(message.content), context)
        except Exception as error:
            failed = error_packet(error)
            me = int(context.node_config.get("partition-id", _NOBODY))
            reply = replace(failed, scalars={**failed.scalars, "id": me})
        return Message(encode(reply), reply_to=message)

    return app


@lru_cache(maxsize=1)
def _made(make: Make, config: str) -> ClientApp:
    """Kept by the module: a simulation pickles the app with every message."""
    return make(config)


def _asked(packet: Packet, context: Context) -> Packet:
    """The answer to a query."""
    if packet.kind == _HELLO:
        if "partition-id" not in context.node_config:
            raise UserError('a SuperNode needs --node-config "partition-id=N", N from 0')
        words = {name: str(packet.scalars[name]) for name in ("config", "same")}
        context.state.clear()  # a run begins with what the server knows
        context.state[_EXPERIMENT] = ConfigRecord(dict(words))
        _agreed(context.state)
        return Packet(_HELLO, scalars={"id": int(context.node_config["partition-id"])})
    if packet.kind == _MEMORY:
        _agreed(context.state)
        return _piece(context.state, **{name: int(packet.scalars[name]) for name in ("start", "length")})
    if packet.kind == _RESTORE:
        _agreed(context.state)
        context.state.update(_memory(_bytes(packet.tensors.get("bytes"))))
        return Packet(_RESTORE)
    raise UserError(f"a query of kind {packet.kind!r} is not known")


def _piece(state: RecordDict, start: int, length: int) -> Packet:
    """So many bytes of the memory's file; of none at all if there is no memory."""
    records = RecordDict({name: record for name, record in state.items() if name != _EXPERIMENT})
    data = memory_bytes(records) if records else b""
    return Packet(_MEMORY, {"bytes": _tensor(data[start : start + length])}, {"size": len(data)})


def _agreed(state: RecordDict) -> str:
    """The experiment of a node that was greeted. Raises UserError if it was not, or differs from the server."""
    if _EXPERIMENT not in state:
        raise UserError("this node has lost its state, or was never greeted: start the run again, or resume it")
    words: Any = state[_EXPERIMENT]
    server, here = json.loads(str(words["same"])), must_agree()
    different = [name for name in here if server.get(name) != here[name]]
    if different:
        shown = (f"{name} ({here[name][:12]!r} here, {server.get(name, '')[:12]!r} there)" for name in different)
        raise UserError(f"it differs from the server in {', '.join(shown)}; give both the same")
    return str(words["config"])
