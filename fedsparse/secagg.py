"""Secure aggregation (SecAgg+) around any grid: the server learns the weighted mean of the uploads, and no upload.

Source: Bell, Bonawitz, Gascón, Lepoint, Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead",
CCS 2020. The protocol is Flower's: ``SecAggPlusWorkflow`` at the server, ``secaggplus_mod`` at the clients. Both know
Flower's older strategies and messages alone, so this file stands between: around it the round loop and the clients are
the usual ones. Clients add random numbers to their values that cancel in the sum, so all must send the same tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_STATE
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.server import SimpleClientManager
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import Strategy as OldStrategy
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid

from fedsparse.aggregation import Aggregation
from fedsparse.client import client_app
from fedsparse.engine.grid import GridAround
from fedsparse.errors import FAILED, ClientError, UserError
from fedsparse.packet import Packet, decode, encode, shapes_of
from fedsparse.strategy import AggregatingStrategy, FederatedStrategy
from fedsparse.task import Client, Task

_LAYOUT, _KIND = "layout", "kind"  # words of a reply, beside its scalars
_QUANTA = 2**22  # steps into which a value is rounded, at random up or down; sums are modulo 2^32


def secure_app(task: Task, clients: Callable[[int], Client], mods: Sequence[Mod] = ()) -> ClientApp:
    """The ClientApp of :func:`fedsparse.client.client_app` for a :class:`SecureGrid`."""
    return client_app(task, clients, [secaggplus_mod, _upload_mod, *mods])


def why_not_secure(strategy: FederatedStrategy) -> str:
    """Why a method's uploads cannot be aggregated securely, or ""."""
    if not isinstance(strategy, AggregatingStrategy):
        return "its clients send no model"
    if strategy.private_support:
        return strategy.private_support
    if what := strategy.beside():
        return f"clients send {what} too, which are no sum"
    if strategy.rule != Aggregation(trim=strategy.trim):
        return "a server that sees no single update can neither clip it nor take a median (and noise needs clipping)"
    return ""


class SecureGrid(GridAround):
    """A grid in which every training reply holds the mean of all uploads, in the place of the client's own.

    grid: of clients with a :func:`secure_app`, whose replies are the receiver's own. max_weight: of a client (its
    number of training examples). clipping_range: largest magnitude of a value. shares, threshold: how many of a round's
    clients get a share of a client's key, and how many of those can undo what a lost client has left; in (0, 1].
    Scalars (loss, number of examples, scores) travel as they are. Replies are rounded at random: no two runs have one
    digest. Raises UserError for a method that does not fit.
    """

    def __init__(
        self,
        grid: Grid,
        strategy: FederatedStrategy,
        *,
        max_weight: float = 1000.0,
        clipping_range: float = 8.0,
        shares: float = 1.0,
        threshold: float = 0.67,
    ) -> None:
        if why := why_not_secure(strategy):
            raise UserError(f"no secure aggregation for {type(strategy).__name__.lower()}: {why}")
        if getattr(grid, "lends", False):
            raise UserError("SecureGrid needs a grid whose replies are its own: own_replies=True")
        super().__init__(grid)
        self._options = (float(shares), float(threshold), float(max_weight), float(clipping_range))
        self.workers = getattr(grid, "workers", 1)
        if (partitions := getattr(grid, "partitions", None)) is not None:
            self.partitions = partitions

    # --- Flower's Grid -----------------------------------------------------------------------------------------------

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise UserError("SecureGrid exchanges whole rounds: use send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise UserError("SecureGrid exchanges whole rounds: use send_and_receive")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies; those to training messages hold the mean."""
        asked = list(messages)
        if not asked or asked[0].metadata.message_type != MessageType.TRAIN:
            return self._grid.send_and_receive(asked, timeout=timeout)
        return self._trained({m.metadata.dst_node_id: m for m in asked}, timeout)

    # --- one round ---------------------------------------------------------------------------------------------------

    def _trained(self, asked: Mapping[int, Message], timeout: float | None) -> list[Message]:
        shares, threshold, max_weight, clipping_range = self._options
        if len(asked) > 2**32 // _QUANTA:
            raise UserError(f"secure aggregation adds up to {2**32 // _QUANTA} clients a round, {len(asked)} are asked")
        old, watched = _OldStrategy(list(asked)), _Watched(self._grid)
        context = LegacyContext(Context(1, 0, {}, RecordDict(), {}), strategy=old, client_manager=SimpleClientManager())
        turn = int(next(iter(asked.values())).metadata.group_id)
        context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: turn})
        context.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()
        workflow = _Workflow(asked, shares, threshold, max_weight, clipping_range, timeout)
        workflow(watched, context)  # type: ignore[arg-type]
        first = next(iter(watched.errors.values()), "too few clients took part")
        if not old.results:
            raise ClientError(f"round {turn}: secure aggregation came to no end: {first}")
        if len({(r.metrics[_KIND], r.metrics[_LAYOUT]) for r in old.results.values()}) > 1:
            raise ClientError(f"round {turn}: uploads of different forms cannot be added")
        return [self._reply(m, old.results.get(n), watched.errors.get(n, first)) for n, m in asked.items()]

    @staticmethod
    def _reply(message: Message, result: FitRes | None, error: str) -> Message:
        """To the strategy, from what the old one got."""
        if result is None:
            return Message(Error(FAILED, error), reply_to=message)
        (flat,) = parameters_to_ndarrays(result.parameters)
        shapes = json.loads(str(result.metrics[_LAYOUT]))
        parts = torch.split(torch.from_numpy(flat.astype(np.float32)), [int(np.prod(s)) for _, s in shapes])
        tensors = {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        scalars: dict[str, Any] = {n[2:]: v for n, v in result.metrics.items() if n.startswith("s.")}
        return Message(encode(Packet(str(result.metrics[_KIND]), tensors, scalars)), reply_to=message)


class _Watched:
    """What Flower's workflow needs of a grid. It goes through replies twice; errors: of the clients that failed."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.errors: dict[int, str] = {}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        failed = [m for m in replies if m.has_error()]
        self.errors |= {m.metadata.src_node_id: (m.error.reason or "").partition("\n")[0] for m in failed}
        return replies


class _Workflow(SecAggPlusWorkflow):
    """Flower's workflow that sends our packets in the place of its older messages."""

    def __init__(
        self,
        asked: Mapping[int, Message],
        shares: float,
        threshold: float,
        max_weight: float,
        clipping_range: float,
        timeout: float | None,
    ) -> None:
        super().__init__(
            shares,
            threshold,
            max_weight=max_weight,
            clipping_range=clipping_range,
            quantization_range=_QUANTA,
            modulus_range=2**32,
            timeout=timeout,
        )
        self._asked = asked

    def setup_stage(self, grid: Any, context: Any, state: Any) -> bool:
        done = super().setup_stage(grid, context, state)
        state.nid_to_fitins = {n: RecordDict(dict(m.content.items())) for n, m in self._asked.items()}
        return done


class _OldStrategy(OldStrategy):
    """The strategy that Flower's workflow calls: it asks whom ours asks, and keeps the results."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = nodes
        self.results: dict[int, FitRes] = {}

    def initialize_parameters(self, client_manager: Any) -> None:
        """None: parameters travel in packets."""

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> list[tuple[Any, FitIns]]:
        return [(_Node(node), FitIns(Parameters([], ""), {})) for node in self._nodes]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> tuple[None, dict[str, Any]]:
        self.results = {proxy.node_id: result for proxy, result in results}
        return None, {}

    def configure_evaluate(self, server_round: int, parameters: Any, client_manager: Any) -> list[Any]:
        return []

    def aggregate_evaluate(self, server_round: int, results: Any, failures: Any) -> tuple[None, dict[str, Any]]:
        return None, {}

    def evaluate(self, server_round: int, parameters: Any) -> None:
        """None: clients evaluate."""


@dataclass(frozen=True)
class _Node:
    """All that the workflow asks of a client's proxy."""

    node_id: int


# --- the client's side -----------------------------------------------------------------------------------------------


def _upload_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Inside Flower's mod: a reply in the form that it takes. Raises for one that must not, or cannot, be added."""
    reply = call_next(message, context)
    packet = decode(reply.content)
    if packet.kind == "error":
        raise ClientError(str(packet.scalars.get("message")))
    limits = context.state.config_records[RECORD_KEY_STATE]
    flat, weight = _addable(packet, float(limits["clipping_range"]), float(limits["max_weight"]))  # type: ignore[arg-type]
    shapes = [(name, shape) for name, _, shape in shapes_of(packet.tensors)]
    words: dict[str, Any] = {
        _KIND: packet.kind,
        _LAYOUT: json.dumps(shapes),
        **{f"s.{n}": v for n, v in packet.scalars.items()},
    }
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([flat]), weight, words)
    return Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)


def _addable(packet: Packet, clipping_range: float, max_weight: float) -> tuple[np.ndarray[Any, Any], int]:
    """All values of an upload and its weight."""
    if bare := [name for name, t in packet.tensors.items() if t.dtype != torch.float32]:
        raise UserError(
            f"secure aggregation adds float32 values alone, and the reply holds {bare[0]!r}: an index set would tell"
            " the server which weights this client uses"
        )
    flat = torch.cat([t.reshape(-1) for t in packet.tensors.values()] or [torch.empty(0)])
    largest = float(flat.abs().max()) if len(flat) else 0.0
    if not largest <= clipping_range:
        raise UserError(f"a value of {largest:.4g} is beyond clipping_range = {clipping_range:g}; raise it")
    weight = packet.scalars.get("weight")
    if not isinstance(weight, int) or not 0 < weight <= max_weight:
        raise UserError(f"the weight {weight!r} is no whole number from 1 to max_weight = {max_weight:g}; raise it")
    return flat.detach().numpy(), weight
