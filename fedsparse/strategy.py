"""FederatedStrategy: the base of every server half, and the one round loop of all engines (a Flower ``Strategy``)."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedsparse.aggregation import Aggregation
from fedsparse.budget import exceeded
from fedsparse.client import ONBOARD, RunWords
from fedsparse.errors import ClientError, UserError, one_line, shown
from fedsparse.lent import LentRecords
from fedsparse.models.norms import statistic_names
from fedsparse.packet import Packet, encode, wire_bytes
from fedsparse.replies import SCORING, is_count, not_finite, read, scalar_complaint
from fedsparse.replies import form as form
from fedsparse.replies import misfit as misfit
from fedsparse.rows import (
    POINTS,
    DenseCosts,
    Onboarding,
    Row,
    fill_row,
    mean_accuracy,
    new_row,
    scores_of,
    totals,
    violations,
)
from fedsparse.seeding import sample_cohort
from fedsparse.task import Client, Device, Split, Task

_MOST_CLIENTS = 1 << 20  # on a grid whose nodes say their own numbers: states have an entry a number
_log = logging.getLogger("fedsparse")
OnRound = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class State:
    """What a strategy keeps from round to round. params: parameters and buffers of the global model, or nothing.

    A method that keeps more derives its own frozen dataclass: tensors, mappings of tensors, numbers and words.
    """

    params: Mapping[str, Tensor]
    stage: str = "train"

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that make up the global model (a mask too, where ``params`` are compact)."""
        return dict(self.params)


@dataclass(frozen=True)
class Reply:
    """A client's answer in a round. Its tensors are valid until the next reply is asked for."""

    device: Device
    packet: Packet
    round: int = 0

    @property
    def weight(self) -> float:
        """The client's share in averages."""
        return float(self.packet.scalars["weight"])


@dataclass(frozen=True)
class Plan:
    """How a run goes, whatever the method: seed, participation, evaluation (every so many rounds and after the last;
    0 = never) and what happens on errors. novel: ids of clients that neither train nor are evaluated, see
    ``FederatedStrategy.onboard``."""

    seed: int = 0
    fraction: float = 1.0
    evaluate_every: int = 1
    evaluate_fraction: float = 1.0
    on_client_error: str = "stop"
    min_replies: int = 1
    on_over_budget: str = "stop"
    novel: tuple[int, ...] = ()

    def evaluates(self, server_round: int, rounds: int) -> bool:
        """Whether a round ends with an evaluation; round 0, the preparation, never does."""
        if not (server_round and self.evaluate_every):
            return False
        return server_round % self.evaluate_every == 0 or server_round == rounds


@dataclass
class _Session:
    """The running state of one ``start``: kept by the base class alone."""

    task: Task
    plan: Plan
    rounds: int
    devices: dict[int, Device]
    nodes: dict[int, int]  # device id -> Flower's node id
    state: State
    config: Mapping[str, Any]  # the client half's hyper-parameters
    rows: dict[int, Row] = field(default_factory=dict)  # of this round, by device id
    asked: set[int] = field(default_factory=set)  # device ids of this exchange
    waited: float = 0.0  # seconds spent waiting for replies in this exchange
    failures: int = 0
    evaluation_bytes: int = 0
    errors: list[ClientError] = field(default_factory=list)  # of this round, when failures are skipped

    def __post_init__(self) -> None:
        self.ids = {node: device for device, node in self.nodes.items()}
        self.participants = sorted(self.devices.keys() - set(self.plan.novel))
        self.dense = DenseCosts.of(self.task, self.config)

    def ask(self, server_round: int, device: Device, bytes_down: int | None) -> Row:
        """The device's row of this round; a new one if it has none."""
        return self.rows.setdefault(device.id, new_row(server_round, self.state.stage, device, bytes_down))


@dataclass
class FederatedStrategy(Strategy):
    """A server half: a dataclass of flat hyper-parameters. Subclasses are final and define init, broadcast, reduce.

    masked: whether clients train compact parameters under an element mask.
    preparation: the stages that come before round 1; each is an exchange like a round, numbered 0, without evaluation.
    client_spec: another client half than the method's own. client_config: the client half's hyper-parameters.
    server_data: examples that the server has, None = none. server_source: where they come from, "holdout" (the clients'
    data set) or "public" (another one).
    """

    client: ClassVar[str]
    masked: ClassVar[bool] = False
    preparation: ClassVar[tuple[str, ...]] = ()
    client_spec: str = field(default="", kw_only=True)
    client_config: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    server_data: Split | None = field(default=None, kw_only=True, repr=False, compare=False)
    server_source: str = field(default="holdout", kw_only=True, repr=False, compare=False)

    @abstractmethod
    def init(self, task: Task, devices: Sequence[Device]) -> State:
        """The state before round 1. Raises UserError for budgets that the method cannot meet."""

    def foresee(self, task: Task, devices: Sequence[Device], plan: Plan) -> None:
        """Called after ``init``: refuse, with a UserError, what is known to break the plan, such as a budget."""

    def scheduled(self, task: Task, state: State, rounds: int) -> State:
        """The initial state once the number of rounds is known. Raises UserError for a schedule that does not fit."""
        return state

    def server_flops(self, task: Task, state: State) -> float:
        """Flops that the server itself spends in ``init``, on its own examples or on weights alone. Asked after it."""
        return 0.0

    @abstractmethod
    def broadcast(self, state: State, device: Device) -> Packet:
        """What a device gets. Packets of the same tensors are encoded once."""

    def deployed(self, state: State, device: Device) -> Packet:
        """What a device gets to be evaluated, or a novel one to be onboarded: by default the same."""
        return self.broadcast(state, device)

    @abstractmethod
    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        """The next state, from replies in device order. Keeps no view of a reply's tensors."""

    def invited(self, state: State, cohort: Sequence[Device]) -> Sequence[Device]:
        """Who of a cohort is asked in the state's stage: everybody, but a preparation may need one client alone."""
        return cohort

    def complaint(self, task: Task, state: State, reply: Reply) -> str:
        """What is wrong with a training reply's kind, names, shapes, types, or what else ``reduce`` relies on, or "".

        Checked before ``reduce``, on tensors whose values may still be anything. By default a reply may be of any form.
        """
        return ""

    def notes(self, task: Task, devices: Sequence[Device]) -> tuple[str, ...]:
        """What a user should know before training starts, one line each. Asked after ``init``."""
        return ()

    def diagnose(
        self, task: Task, state: State, clients: Sequence[Client], memories: Mapping[int, Mapping[str, Tensor]]
    ) -> Mapping[str, Any]:
        """What a simulation can say about the masks once the run is over: entries of ``masks`` in ``summary.json``.

        Its names are ``distinct`` (masks), ``mean_overlap`` (of two clients' masks), ``never_trained`` (share of the
        blocks) and ``agreement`` (of training and evaluation masks); others may be added. state: the final one;
        clients: those that took part in training; memories: by client id, of those that have one.
        """
        return {}

    # --- the round loop ------------------------------------------------------------------------------------------

    def first_state(
        self, task: Task, devices: Sequence[Device], plan: Plan, rounds: int, initial: ArrayRecord | None = None
    ) -> State:
        """The state before the first exchange: of ``init``, once ``foresee`` and ``scheduled`` have agreed.

        initial: one flat array in place of the initial global model. Raises UserError for whatever they refuse, and for
        a model with frozen parameters.
        """
        if task.frozen:
            raise UserError(
                f"frozen parameters are not supported, the model has {len(task.frozen)} with requires_grad = False:"
                f" {shown(task.frozen)}; make them buffers"
            )
        state = self.init(task, devices)
        self.foresee(task, devices, plan)
        if initial is not None and len(initial):
            state = replace(state, params=_unflatten(initial, state.params))
        return self.scheduled(task, state, rounds)

    def start(  # type: ignore[override]
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        task: Task,
        devices: Sequence[Device] = (),
        plan: Plan | None = None,
        state: State | None = None,
        done: int = 0,
        on_round: OnRound | None = None,
    ) -> Result:
        """Run ``num_rounds`` rounds over ``grid``; the same arguments as Flower's, and what a simulation needs.

        initial_arrays: replaces the initial global model (a record with one flat array). train_config and
        evaluate_config are ignored: what clients need rides with each packet. devices: with their
        budgets; those without one are unlimited. state: what this strategy's ``first_state`` gave for the same task,
        devices, plan and rounds, without initial_arrays; None = it is called here. done: rounds that led to the state,
        of a run that goes on. on_round: gets a report after each round, and the rows of the clients under ``"rows"``.
        Raises UserError or ClientError when a client fails or exceeds its budget.
        """
        result = Result()
        reports = self.rounds(
            grid, num_rounds, timeout, initial_arrays, task=task, devices=devices, plan=plan, state=state, done=done
        )
        for report in reports:
            server_round = report["round"]
            if server_round:
                result.train_metrics_clientapp[server_round] = MetricRecord({"loss": report["loss"] or 0.0})
            if report["accuracy"]:
                known = {name: value for name, value in report["accuracy"].items() if value is not None}
                result.evaluate_metrics_clientapp[server_round] = MetricRecord(known)
            if evaluate_fn and server_round and (central := evaluate_fn(server_round, self._arrays())) is not None:
                result.evaluate_metrics_serverapp[server_round] = central
            if on_round:
                on_round(report)
        result.arrays = self._arrays()
        return result

    def rounds(
        self,
        grid: Grid,
        num_rounds: int,
        timeout: float = 3600,
        initial_arrays: ArrayRecord | None = None,
        *,
        task: Task,
        devices: Sequence[Device] = (),
        plan: Plan | None = None,
        state: State | None = None,
        done: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """The loop of ``start`` as a generator: one report a round, so that the caller decides when to go on.

        The exchanges of the ``preparation`` come first; they all have round number 0, and so the same cohort.
        """
        self._session = self._open(grid, timeout, task, devices, plan or Plan(), num_rounds, initial_arrays, state)
        while self.state.stage in self.preparation:
            yield self._round(0, grid, timeout)
        for server_round in range(done + 1, num_rounds + 1):
            yield self._round(server_round, grid, timeout)

    @property
    def state(self) -> State:
        """The state after the last round."""
        return self._session.state

    def summary(self) -> None:
        """Flower's hook for logging hyper-parameters; the run directory has them all."""

    def _open(
        self,
        grid: Grid,
        timeout: float,
        task: Task,
        devices: Sequence[Device],
        plan: Plan,
        rounds: int,
        initial: ArrayRecord | None,
        state: State | None,
    ) -> _Session:
        nodes = _who_is_there(grid, timeout, plan.on_client_error)
        given = {d.id: d for d in devices}
        if missing := sorted(given.keys() - nodes.keys()):
            raise UserError(f"devices {missing[:5]} have no client on this grid of {len(nodes)}")
        if missing := sorted(set(plan.novel) - nodes.keys()):
            raise UserError(f"novel clients {missing[:5]} are not on this grid of {len(nodes)}")
        if len(set(plan.novel)) == len(nodes):
            raise UserError(f"all {len(nodes)} clients are novel: none is left to train")
        known = {i: given.get(i, Device(i)) for i in sorted(nodes)}
        if state is None:
            state = self.first_state(task, list(known.values()), plan, rounds, initial)
        elif initial is not None and len(initial):
            raise UserError("start takes initial_arrays or a state, not both")
        return _Session(task, plan, rounds, known, nodes, state, self.client_config)

    def _arrays(self) -> ArrayRecord:
        arrays: ArrayRecord = encode(Packet("state", self.state.params)).array_records["arrays"]
        return arrays

    def _round(self, server_round: int, grid: Grid, timeout: float) -> dict[str, Any]:
        session, start = self._session, time.perf_counter()
        stage = session.state.stage
        session.rows, session.failures, session.evaluation_bytes, session.errors = {}, 0, 0, []
        messages = list(self.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid))
        sent = time.perf_counter()
        self.aggregate_train(server_round, grid.send_and_receive(messages, timeout=timeout))
        trained, waited, busy = time.perf_counter(), session.waited, getattr(grid, "busy_seconds", None)
        trained_rows = list(session.rows.values())
        if evaluating := list(self.configure_evaluate(server_round, ArrayRecord(), ConfigRecord(), grid)):
            self.aggregate_evaluate(server_round, grid.send_and_receive(evaluating, timeout=timeout))
        end = time.perf_counter()
        in_training = sum(row["seconds"] for row in trained_rows)
        local = sum(row["_local_seconds"] for row in trained_rows)
        workers = getattr(grid, "workers", 1)
        busy = in_training + local if busy is None else busy
        seconds = {
            "train": in_training,
            "encode": sent - start + max(0.0, busy - in_training - local),
            "reduce": trained - sent - waited,
            "evaluate": end - trained + local,
            "idle": max(0.0, workers * waited - busy),
            "wall": end - start,
        }
        return self._report(server_round, stage, trained_rows, seconds)

    # --- Flower's four steps -------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each client of the cohort; the packet comes from the state, not from ``arrays``."""
        s = self._session
        cohort = sample_cohort(s.participants, s.plan.fraction, s.plan.seed, server_round)
        words = self._words(server_round, local=s.plan.evaluates(server_round, s.rounds))
        asked = self.invited(s.state, [s.devices[i] for i in cohort])
        s.asked = {device.id for device in asked}
        packets = ((device, self.broadcast(s.state, device)) for device in asked)
        for device, records, size in _encoded(packets, words, grid):
            s.ask(server_round, device, size)
            yield _message(records, s.nodes[device.id], MessageType.TRAIN, server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, account and reduce the replies; the new state is kept."""
        s = self._session
        stream = self._replies(server_round, replies)
        new = self.reduce(s.task, s.state, stream)
        for _ in stream:  # a method may stop reading early; the accounts may not
            pass
        self._count_lost(server_round)
        answered = sum(not row["failed"] for row in s.rows.values())
        least = s.plan.min_replies if server_round else min(s.plan.min_replies, len(s.rows))
        if answered < max(1, least):
            raise ClientError(
                f"round {server_round}: {answered} of {len(s.rows)} clients answered,"
                f" at least {least} must; the first failure: {s.errors[0] if s.errors else 'none'}",
                s.errors[0].trace if s.errors else "",
            )
        if bad := not_finite(new.tensors()):
            raise UserError(f"round {server_round}: once averaged {bad}, although all replies were; it is not kept")
        s.state = new
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """In evaluated rounds one message for each evaluated client, sampled or not in this round's training."""
        s = self._session
        s.asked = set()
        if not s.plan.evaluates(server_round, s.rounds):
            return
        ids = sample_cohort(s.participants, s.plan.evaluate_fraction, s.plan.seed, -server_round)
        s.asked = set(ids)
        packets = ((s.devices[i], replace(self.deployed(s.state, s.devices[i]), kind="evaluate")) for i in ids)
        for device, records, size in _encoded(packets, self._words(server_round), grid):
            s.evaluation_bytes += size
            yield _message(records, s.nodes[device.id], MessageType.EVALUATE, server_round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Put each client's scores in its row; returns the mean personal accuracy."""
        s = self._session
        left = set(s.asked)
        for device, message in self._answers(server_round, "evaluate", replies):
            left.discard(device.id)
            packet = self._packet(server_round, "evaluate", device, message)
            if packet is None:
                continue
            s.evaluation_bytes += wire_bytes(message.content)
            s.ask(server_round, device, None).update(scores_of(packet))
        for i in sorted(left):
            lost = ClientError(f"client {i}, round {server_round}, stage evaluate: no reply came")
            self._fail(s.devices[i], lost, training=False)
        mean = mean_accuracy(s.rows.values(), "personal")
        return None if mean is None else MetricRecord({"personal_accuracy": mean})

    # --- after the last round ------------------------------------------------------------------------------------

    def onboard(self, grid: Grid, timeout: float = 3600) -> Onboarding:
        """Send each of the plan's novel clients the final state, to adapt to it alone, and collect their scores.

        What that leaves in a client is not kept. Raises ClientError when one fails, unless failures are skipped.
        """
        s, start = self._session, time.perf_counter()
        s.failures, s.evaluation_bytes, s.errors = 0, 0, []
        novel = {i: s.devices[i] for i in sorted(s.plan.novel)}
        s.asked = set(novel)
        packets = ((d, replace(self.deployed(s.state, d), kind=ONBOARD)) for d in novel.values())
        messages, found = [], {}
        for device, records, size in _encoded(packets, self._words(s.rounds), grid):
            s.evaluation_bytes += size
            messages.append(_message(records, s.nodes[device.id], MessageType.EVALUATE, s.rounds))
        lost = dict(novel)
        for device, message in self._answers(s.rounds, ONBOARD, grid.send_and_receive(messages, timeout=timeout)):
            del lost[device.id]
            if packet := self._packet(s.rounds, ONBOARD, device, message):
                s.evaluation_bytes += wire_bytes(message.content)
                found[device.id] = {int(epochs): score for epochs, score in scores_of(packet).items()}
        for i, device in lost.items():
            self._fail(device, ClientError(f"client {i}, stage {ONBOARD}: no reply came"), training=False)
        return Onboarding(found, len(novel), s.evaluation_bytes, time.perf_counter() - start, tuple(s.errors))

    # --- replies -------------------------------------------------------------------------------------------------

    def _words(self, server_round: int, *, local: bool = False) -> str:
        spec = self.client_spec or self.client
        return RunWords(spec, self.client_config, self._session.plan.seed, server_round, local).dump()

    def _replies(self, server_round: int, messages: Iterable[Message]) -> Iterator[Reply]:
        s = self._session
        s.waited = 0.0
        for device, message in self._answers(server_round, s.state.stage, messages):
            packet = self._packet(server_round, s.state.stage, device, message)
            if packet is None:
                continue
            fill_row(s.rows[device.id], packet, wire_bytes(message.content), s.dense)
            self._check_budget(server_round, device, s.rows[device.id])
            yield Reply(device, packet, server_round)

    def _answers(self, server_round: int, stage: str, messages: Iterable[Message]) -> Iterator[tuple[Device, Message]]:
        """The replies of those that were asked, each once, in device order; timed. Our engines send them so, as a
        stream."""
        s, left, last = self._session, set(self._session.asked), -1
        pairs = ((s.ids.get(m.metadata.src_node_id, -1), m) for m in _timed(s, messages))
        for i, message in pairs if getattr(messages, "ordered", False) else sorted(pairs, key=lambda pair: pair[0]):
            if i not in left:
                who = f"client {i}" if i in s.devices else f"node {message.metadata.src_node_id}"
                why = "it answered twice" if i in s.asked else "it answered and was not asked"
                self._refuse(ClientError(f"{who}, round {server_round}, stage {stage}: {why}"))
                continue
            if i < last:
                raise ClientError(f"client {i}, round {server_round}, stage {stage}: it answered out of order")
            left.remove(i)
            last = i
            yield s.devices[i], message

    def _packet(self, server_round: int, stage: str, device: Device, message: Message) -> Packet | None:
        """The checked reply; None if it failed and failures are skipped."""
        s, training = self._session, stage not in SCORING
        where = f"client {device.id}, round {server_round}, stage {stage}"
        try:
            packet = read(where, message)
            bad = scalar_complaint(packet, stage)
            if training:  # the form comes before the values: it bounds what is looked at
                bad = bad or self.complaint(s.task, s.state, Reply(device, packet)) or not_finite(packet.tensors)
            if bad:
                raise ClientError(f"{where}: {one_line(bad)}")
        except ClientError as error:
            self._fail(device, error, training=training)
            return None
        return packet

    def _refuse(self, error: ClientError) -> None:
        """Stop the run, or count the failure."""
        if self._session.plan.on_client_error == "stop":
            raise error
        self._session.failures += 1
        self._session.errors.append(error)

    def _fail(self, device: Device, error: ClientError, *, training: bool) -> None:
        """Stop the run, or count the failure and leave the client out of this round."""
        self._refuse(error)
        if training:  # a failed evaluation leaves the accounts of training as they are
            self._session.rows[device.id]["failed"] = True

    def _count_lost(self, server_round: int) -> None:
        """Clients that were asked and never answered are failures."""
        s = self._session
        for i, row in s.rows.items():
            if row["bytes_up"] is None and not row["failed"]:
                lost = ClientError(f"client {i}, round {server_round}, stage {row['stage']}: no reply came")
                self._fail(s.devices[i], lost, training=True)

    def _check_budget(self, server_round: int, device: Device, row: Row) -> None:
        found = violations(device, row)
        row["over_budget"] = len(found)
        if found and self._session.plan.on_over_budget == "stop":
            raise exceeded(device.id, server_round, found[0])

    def _report(self, server_round: int, stage: str, trained: list[Row], seconds: dict[str, float]) -> dict[str, Any]:
        """One line of ``rounds.jsonl``, and the clients' rows under ``rows``."""
        s = self._session
        sums, rows = totals(trained), list(s.rows.values())
        evaluated = s.plan.evaluates(server_round, s.rounds)
        return {
            "round": server_round,
            "rounds": s.rounds,
            "stage": stage,
            "seconds": seconds,
            **sums,
            "bytes": {**sums["bytes"], "evaluation": s.evaluation_bytes},
            "accuracy": {point: mean_accuracy(rows, point) for point in POINTS} if evaluated else None,
            "failures": s.failures,
            "errors": [str(error) for error in s.errors[:5]],
            "traces": [error.trace for error in s.errors[:1]],
            "rows": rows,
        }


@dataclass
class AggregatingStrategy(FederatedStrategy):
    """Abstract: a server half whose next model comes from those that clients send (:class:`Aggregation`).

    aggregation: "mean" (weighted by examples), "median" or "trimmed_mean" of each coordinate over the clients that hold
    it; the two keep all replies of a round in memory. trim: share that the latter drops at either end, in (0, 0.5).
    clip_updates: largest L2 norm of a client's update, 0 = any. noise_multiplier: server-side differential privacy,
    noise on the mean of clipped updates, docs/privacy.md; 0 = none.
    private_support: why it must stay private which coordinates a client sends, "" = all send the same.
    """

    private_support: ClassVar[str] = ""
    aggregation: str = field(default="mean", kw_only=True)
    trim: float = field(default=0.1, kw_only=True)
    clip_updates: float = field(default=0.0, kw_only=True)
    noise_multiplier: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        self._check_noise()

    def _check_noise(self) -> None:
        if self.rule.noise and (what := self.beside()):
            raise UserError(
                f"noise_multiplier covers the model alone, and clients send {what} too: their privacy would be lost"
            )

    @property
    def rule(self) -> Aggregation:
        """How models are aggregated. Raises UserError for options that are not allowed."""
        return Aggregation(self.aggregation, self.trim, self.clip_updates, self.noise_multiplier)

    def beside(self) -> str:
        """What clients send beside the values of the model and the numbers of every reply, or ""."""
        return ""

    def foresee(self, task: Task, devices: Sequence[Device], plan: Plan) -> None:
        """Refuse an aggregation that a round's clients, or the model, do not fit."""
        self._check_noise()
        rule, ids = self.rule, sorted({d.id for d in devices} - set(plan.novel))
        asked = len(sample_cohort(ids, plan.fraction, plan.seed, 1)) if ids else 0
        if rule.robust and asked < 3:
            raise UserError(f"aggregation = {rule.kind!r} needs at least 3 clients a round, there are {asked}")
        if rule.noise and plan.on_client_error != "stop":
            raise UserError(
                f'noise_multiplier needs engine.on_client_error = "stop", got {plan.on_client_error!r}: noise is'
                " measured for a fixed number of clients a round"
            )
        local = self.client_config.get("local_norms", False)
        if rule.noise and not local and any(statistic_names(task)):
            raise UserError(
                "noise_multiplier makes no sense of batch norm's running statistics (a variance may end below 0): set"
                ' norm = "group", or local_norms where the method has it'
            )


@dataclass
class AveragingStrategy(AggregatingStrategy):
    """Abstract: a server half that sends the whole model and averages what comes back (McMahan et al. 2017).

    Weights are the numbers of training examples of those who took part. Batch norm's running statistics are part
    of the model and are averaged with it. A method adds its name and its client half.
    """

    def init(self, task: Task, devices: Sequence[Device]) -> State:
        return State(task.init_params())

    def broadcast(self, state: State, device: Device) -> Packet:
        return Packet("train", state.params)

    def complaint(self, task: Task, state: State, reply: Reply) -> str:
        return misfit(reply.packet, "update", state.params)

    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        params, _ = aggregated(self.rule, task, state.params, state.params, replies)
        return replace(state, params=params)


def aggregated(
    rule: Aggregation,
    task: Task,
    params: Mapping[str, Tensor],
    sent: Mapping[str, Tensor],
    replies: Iterable[Reply],
    see: Callable[[Reply], None] | None = None,
) -> tuple[dict[str, Tensor], list[int]]:
    """``params`` after a round of clients that all hold the same and train the tensors ``sent`` of them, and the ids of
    these clients; ``see`` gets each reply too."""
    mean, seen, turn = rule.whole(), [], 0
    for reply in replies:
        values = {name: reply.packet.tensors[name] for name in sent}
        mean.add(rule.clipped(values, sent), rule.weight(reply.weight))
        if see:
            see(reply)
        seen.append(reply.device.id)
        turn = reply.round
    return rule.noised(mean.result(params), sent.keys(), len(seen), task.seed, turn), seen


# --- helpers ---------------------------------------------------------------------------------------------------------


def _who_is_there(grid: Grid, timeout: float, on_error: str) -> dict[int, int]:
    """Device id (partition number) -> node id. Our engines know; others are asked with a query message each.

    A node without a proper answer, and all that claim one number, stop the run, or are left out with a warning.
    """
    known: dict[int, int] | None = getattr(grid, "partitions", None)
    if known is not None:
        return dict(known)
    asked = [_message(encode(Packet("query")), node, MessageType.QUERY, 0) for node in sorted(grid.get_node_ids())]
    claims: dict[int, set[int]] = {}
    for reply in grid.send_and_receive(asked, timeout=timeout):
        node = reply.metadata.src_node_id
        try:
            packet = read(f"node {node}, query", reply)
            number = packet.scalars.get("id")
            bad = misfit(packet, "partition", {})
            if bad or not is_count(number, 0, max(_MOST_CLIENTS, len(asked)) - 1):
                raise ClientError(f"node {node}, query: {bad or f'its partition-id is {shown(number)}'}")
            claims.setdefault(number, set()).add(node)
        except ClientError as error:
            _stop_or_warn(error, on_error)
    for number, nodes in claims.items():
        if len(nodes) > 1:
            _stop_or_warn(ClientError(f"nodes {sorted(nodes)[:5]} all say that they are client {number}"), on_error)
    return {number: next(iter(nodes)) for number, nodes in claims.items() if len(nodes) == 1}


def _stop_or_warn(error: ClientError, on_error: str) -> None:
    if on_error == "stop":
        raise error
    _log.warning("%s; it is left out", error)


def _message(records: RecordDict, node: int, kind: str, server_round: int) -> Message:
    return Message(records, node, kind, group_id=str(server_round))


def _encoded(
    packets: Iterable[tuple[Device, Packet]], words: str, grid: Grid
) -> Iterator[tuple[Device, RecordDict, int]]:
    """Each device's packet as records, with their bytes; encoded once per distinct packet."""
    seen: dict[Any, tuple[RecordDict, int, Packet]] = {}  # the packet stays alive, so that ids stay unique
    for device, packet in packets:
        key = (packet.kind, tuple((n, id(t)) for n, t in packet.tensors.items()), tuple(packet.scalars.items()))
        if key not in seen:
            records = LentRecords(packet, words) if getattr(grid, "lends", False) else encode(packet, run=words)
            seen[key] = records, wire_bytes(records), packet
        yield device, seen[key][0], seen[key][1]


def _timed(session: _Session, messages: Iterable[Message]) -> Iterator[Message]:
    start = time.perf_counter()
    for message in messages:
        session.waited += time.perf_counter() - start
        yield message
        start = time.perf_counter()
    session.waited += time.perf_counter() - start


def _unflatten(arrays: ArrayRecord, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flat = torch.from_numpy(next(iter(arrays.values())).numpy().copy())
    sizes = [t.numel() for t in like.values()]
    if len(flat) != sum(sizes):
        raise UserError(f"initial_arrays has {len(flat)} values, the model has {sum(sizes)}")
    return {name: part.view(t.shape) for (name, t), part in zip(like.items(), torch.split(flat, sizes), strict=True)}
