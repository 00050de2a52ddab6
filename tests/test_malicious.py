"""Replies of a stranger: whatever a client sends is a reply of the form that was asked for, or is refused by one line.

``FEDSPARSE_CASES`` is the number of generated replies of each exchange (20 by default).
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fedsparse
from fedsparse.client import client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import ClientError, UserError
from fedsparse.lent import LentRecords
from fedsparse.method import build, load_method, method_names
from fedsparse.packet import HEADER, Packet, decode, encode, wire_bytes
from fedsparse.rows import totals
from fedsparse.runner import digest
from fedsparse.strategy import FederatedStrategy, Plan, State, _Session
from tests.helpers import norm_task, small_clients, small_task
from tests.test_contract import QUICK, halves

CASES = int(os.environ.get("FEDSPARSE_CASES", "20"))
WORDS = 4_000_000  # bytes that reading a reply's words may take beside twice its size; their number is bounded
ROUNDS = 4

# method, hyper-parameters, budget: together they reach every stage and every form of a reply
RUNS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    **{name: (name, QUICK.get(name, {}), 0.7 if name == "pfedgate" else None) for name in method_names()},
    "feddst, own masks": ("feddst", {"delta_r": 1, "alpha": 0.5, "r_stop": 4}, None),
    "fedtiny, gradients": ("fedtiny", {"pool": 3, "delta_r": 1, "r_stop": 4, "variance": "total"}, None),
    "fedtiny, nested": ("fedtiny", {"density": 0, "nested": True, "pool": 1, "delta_r": 1, "r_stop": 4}, 0.3),
    "prunefl, squares": ("prunefl", {"initial": "magnitude", "delta_r": 1, "r_stop": 4}, None),
    "pfedgate, kept": ("pfedgate", {"mask_scope": "round", "download": "kept"}, 0.6),
    "pfedgate, changed": ("pfedgate", {"download": "changed"}, 0.6),
    "pfedgate, paper": ("pfedgate", {"mode": "paper"}, 0.6),
    "pfedgate, plateau": ("pfedgate", {"schedule": "plateau", "patience": 1}, 0.6),
    "fixed_mask, own norms": ("fixed_mask", {"local_norms": True}, None),
}


# --- genuine exchanges, from which the others are made ---------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """What the server asked in one stage, and what came back."""

    strategy: FederatedStrategy
    session: _Session
    number: int
    stage: str
    replies: tuple[Message, ...]

    @property
    def allowed(self) -> int:
        """Bytes of the largest genuine reply."""
        return max(wire_bytes(m.content) for m in self.replies)

    def open(self) -> _Session:
        """The session as it was when the replies came."""
        s = self.strategy._session = copy(self.session)
        s.rows, s.errors, s.failures = {}, [], 0
        s.asked = {s.ids[m.metadata.src_node_id] for m in self.replies}
        for i in s.asked:
            s.ask(self.number, s.devices[i], 100)
        return s

    def take(self, replies: list[Message], on_client_error: str = "stop") -> State:
        """The state after these replies, which are dealt with as the round loop does; the rows are good JSON."""
        s = self.open()
        s.plan = replace(s.plan, on_client_error=on_client_error)
        if self.stage in ("evaluate", "onboard"):
            self.strategy.aggregate_evaluate(self.number, replies)
        else:
            self.strategy.aggregate_train(self.number, replies)
            json.dumps(totals(s.rows.values()), allow_nan=False)
        json.dumps(list(s.rows.values()), allow_nan=False, default=vars)
        return self.strategy.state


class Recording(LocalGrid):
    """Keeps all exchanges."""

    def watch(self, strategy: FederatedStrategy) -> None:
        self.strategy, self.exchanges = strategy, list[Exchange]()

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        asked = list(messages)
        replies = list(super().send_and_receive(asked))
        session, kind = self.strategy._session, asked[0].metadata.message_type
        stage = session.state.stage if kind == "train" else decode(asked[0].content).kind
        number = int(asked[0].metadata.group_id)
        self.exchanges.append(Exchange(self.strategy, copy(session), number, stage, tuple(replies)))
        return replies


@cache
def exchanges(run: str) -> tuple[Exchange, ...]:
    """One exchange of each stage and form of reply."""
    name, hyper, budget = RUNS[run]
    clients, task = small_clients(5, budget), norm_task()
    if "nested" in hyper:
        clients = tuple(replace(c, device=replace(c.device, budget=small_clients(1, b)[0].device.budget))
                        for c, b in zip(clients, (0.6, 0.3, 0.12, 0.6, 0.3), strict=True))  # fmt: skip
    strategy, _ = halves(name, batch_size=8, **hyper)
    plan = Plan(seed=3, on_over_budget="record", evaluate_every=ROUNDS, novel=(4,))
    with Recording(client_app(task, clients.__getitem__), 5) as grid:
        grid.watch(strategy)
        strategy.start(grid, num_rounds=ROUNDS, task=task, devices=[c.device for c in clients], plan=plan)
    found: dict[Any, Exchange] = {}
    for exchange in grid.exchanges:
        if exchange.stage == "evaluate" and run != "fedavg":  # no method has a say in scores
            continue
        form = frozenset(name for m in exchange.replies for name in decode(m.content).tensors)
        found.setdefault((exchange.stage, form), exchange)
    return tuple(found.values())


# --- how replies are damaged -----------------------------------------------------------------------------------------


@dataclass
class Draft:
    """A reply in the making: a packet, and what is done to its records once it is encoded."""

    packet: Packet
    others: list[Packet]
    late: list[Callable[[RecordDict], None]]


Damage = Callable[[Draft, random.Random], None]
DAMAGES: dict[str, Damage] = {}
NUMBERS = (0, -1, 1, 2**31, 2**62, -(2**63), 2**63 - 1, 0.0, -0.5, 5e-324, 1e308, -1e308, 1e39)
NO_NUMBERS = (float("nan"), float("inf"), float("-inf"), "", "7", "\x1b[31mred", "x" * 5000, "0x10", "\u202e")
SCALARS = ("weight", "loss", "samples", "flops", "memory", "density_true", "train_seconds", "development",
           "square_rest", "validation_right", "validation_seen", "personal.n", "personal.correct", "personal.loss",
           "local.n", "local.correct", "failed.n", "client.n", "bytes_up.n", ".n", "forward_macs")  # fmt: skip
NAMES = ("x", "", "mask/fc1.weight", "__metadata__", "../../etc/passwd", "\x00", "\x1b[2J", "ü" * 300, "own/bn1.weight")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool)


def damage(function: Damage) -> Damage:
    DAMAGES[function.__name__] = function
    return function


def _tensors(draft: Draft, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    draft.packet = replace(draft.packet, tensors=change(dict(draft.packet.tensors)))


def _one(draft: Draft, rng: random.Random, change: Callable[[Tensor], Tensor], only: Any = None) -> None:
    """Change one tensor (that is ``only``)."""
    names = [n for n, t in draft.packet.tensors.items() if only is None or only(t)]
    if names:
        name = rng.choice(names)
        _tensors(draft, lambda t: {**t, name: change(t[name].clone())})


@damage
def drop(draft: Draft, rng: random.Random) -> None:
    if draft.packet.tensors:
        name = rng.choice(list(draft.packet.tensors))
        _tensors(draft, lambda t: {n: v for n, v in t.items() if n != name})


@damage
def rename(draft: Draft, rng: random.Random) -> None:
    if draft.packet.tensors:
        old, new = rng.choice(list(draft.packet.tensors)), rng.choice([*NAMES, *draft.packet.tensors])
        _tensors(draft, lambda t: {new if n == old else n: v for n, v in t.items()})


@damage
def add(draft: Draft, rng: random.Random) -> None:
    _tensors(draft, lambda t: {**t, rng.choice(NAMES): torch.zeros(rng.choice((0, 1, 7)), dtype=rng.choice(DTYPES))})


@damage
def reorder(draft: Draft, rng: random.Random) -> None:
    _tensors(draft, lambda t: dict(rng.sample(list(t.items()), len(t))))


@damage
def reshape(draft: Draft, rng: random.Random) -> None:
    how = rng.choice(
        (
            Tensor.flatten,
            lambda t: t.unsqueeze(0),
            lambda t: t.reshape(-1, 1),
            lambda t: t.transpose(0, -1).contiguous(),
        )
    )
    _one(draft, rng, how, lambda t: t.ndim in (1, 2))


@damage
def retype(draft: Draft, rng: random.Random) -> None:
    _one(draft, rng, lambda t: t.to(rng.choice(DTYPES)))


@damage
def truncate(draft: Draft, rng: random.Random) -> None:
    _one(draft, rng, lambda t: t[: rng.randrange(len(t))], lambda t: t.ndim and len(t))


@damage
def extend(draft: Draft, rng: random.Random) -> None:
    _one(draft, rng, lambda t: torch.cat([t] * rng.choice((2, 9))), lambda t: t.ndim)


@damage
def swap(draft: Draft, rng: random.Random) -> None:
    """The values of one tensor under the name of another."""
    if len(draft.packet.tensors) > 1:
        a, b = rng.sample(list(draft.packet.tensors), 2)
        _tensors(draft, lambda t: {**t, a: t[b], b: t[a]})


@damage
def not_finite(draft: Draft, rng: random.Random) -> None:
    def spoil(t: Tensor) -> Tensor:
        t.view(-1)[rng.randrange(t.numel())] = rng.choice((float("nan"), float("inf"), float("-inf")))
        return t

    _one(draft, rng, spoil, lambda t: t.is_floating_point() and t.numel())


@damage
def extreme(draft: Draft, rng: random.Random) -> None:
    """Values at the end of their range: their sums overflow."""
    value = rng.choice((3.4e38, -3.4e38, -1.0, 1e-45))
    _one(draft, rng, lambda t: t.fill_(value), lambda t: t.dtype == torch.float32)


@damage
def bits(draft: Draft, rng: random.Random) -> None:
    """Positions and bitmaps: outside, repeated, descending, all, none, any."""

    def spoil(t: Tensor) -> Tensor:
        how = rng.randrange(6)
        if how < 2:
            return t.fill_(255 * how)
        if how == 2:
            return t.flip(0)
        if how == 3:
            t.view(-1)[-1] = rng.randrange(256)
            return t
        if how == 4:
            return t.roll(1)
        return torch.tensor([rng.randrange(256) for _ in range(len(t))], dtype=torch.uint8)

    _one(draft, rng, spoil, lambda t: t.dtype == torch.uint8 and t.numel())


@damage
def integers(draft: Draft, rng: random.Random) -> None:
    value = rng.choice((-1, 2**31 - 1, -(2**31), 10**6))
    _one(draft, rng, lambda t: t.fill_(value), lambda t: t.dtype == torch.int32)


@damage
def kind(draft: Draft, rng: random.Random) -> None:
    kinds = ("update", "scores", "train", "evaluate", "partition", "losses", "statistics", "pruned", "", "x" * 99, "é")
    draft.packet = replace(draft.packet, kind=rng.choice(kinds))


@damage
def error(draft: Draft, rng: random.Random) -> None:
    long = rng.choice(("", "\x1b]0;owned\x07\x1b[2J", "a\nb\rc", "x" * 3_000_000, "\u202egnp.exe", "\ud7ff"))
    draft.packet = Packet("error", {}, {"message": long, "trace": long} if rng.random() < 0.8 else {"message": 3})


@damage
def another(draft: Draft, rng: random.Random) -> None:
    """The reply of another client, or of another stage."""
    draft.packet = rng.choice(draft.others)


@damage
def scalar(draft: Draft, rng: random.Random) -> None:
    name = rng.choice([*SCALARS, *draft.packet.scalars])
    value = rng.choice((*NUMBERS, *NO_NUMBERS))
    draft.packet = replace(draft.packet, scalars={**draft.packet.scalars, name: value})


@damage
def no_scalar(draft: Draft, rng: random.Random) -> None:
    if draft.packet.scalars:
        name = rng.choice(list(draft.packet.scalars))
        draft.packet = replace(draft.packet, scalars={n: v for n, v in draft.packet.scalars.items() if n != name})


@damage
def many_scalars(draft: Draft, rng: random.Random) -> None:
    more: dict[str, Any] = {f"s{i}": rng.choice(("w", 1)) for i in range(rng.choice((3, 2000)))}
    draft.packet = replace(draft.packet, scalars={**draft.packet.scalars, **more})


LAYOUTS = (
    "", "null", "{}", "3", "[]", "[[]]", "[" * 100_000, "[" * 60_000 + "]" * 60_000, "[" + "[]," * 40_000 + "[]]",
    '[["a","float32",[-1]]]', '[["a","float32",[1e999]]]', '[["a","float32",[NaN]]]', '[["a","float32",[true]]]',
    '[["a","float32",[9223372036854775808]]]', '[["a","float32",[4611686018427387904,4]]]', '[["a","float32","4"]]',
    '[["a","float32",[0,99999999999999999999]]]', '[["a","float32",[0,281474976710656,281474976710656]]]',
    '[["a","float32",[1.0]]]', f'[["a","float32",[{"1," * 5000}1]]]', f'[["a","float32",[{"9" * 5000}]]]',
    '[["a","float32",[0]],["a","float32",[0]]]', '[["a","object",[1]]]', '[["a",["float32"],[1]]]', '[[1,"int8",[]]]',
    '[["\\ud800","float32",[0]]]', '[["a","complex64",[1]]]', '[["a","float32",{"0":1}]]',
    f'[["{"n" * 9999}","int8",[0]]]',
    '[["a","float32",[1000000000000]]]', '[["a","int64",[1000000000000]]]', "[" + '["","int8",[0]],' * 9000 + "0]",
)  # fmt: skip


def _words(records: RecordDict) -> Any:
    """The packet's words; others, if an earlier damage has taken them away."""
    found = records.get("config")
    return found if isinstance(found, ConfigRecord) else ConfigRecord()


@damage
def layout(draft: Draft, rng: random.Random) -> None:
    text = rng.choice(LAYOUTS)
    draft.late.append(lambda records: _words(records).update({"layout": text}))


@damage
def layout_bytes(draft: Draft, rng: random.Random) -> None:
    def spoil(records: RecordDict) -> None:
        text = list(str(_words(records).get("layout", "")))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randrange(2)] = rng.choice(('"', "[", "]", ",", "9", "-", "\\", "\0", "e", ""))
        _words(records)["layout"] = "".join(text)

    draft.late.append(spoil)


@damage
def payload(draft: Draft, rng: random.Random) -> None:
    """The bytes of the floats: cut, longer, with another header, pickled objects."""

    def spoil(records: RecordDict) -> None:
        array = records["arrays"].get("flat") if isinstance(records.get("arrays"), ArrayRecord) else None
        if array is None:
            return
        data = array.data
        shape = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
        pickled = b"\x93NUMPY\x01\x00\x76\x00" + shape.ljust(117) + b"\n" + pickle.dumps(Bomb())
        array.data = rng.choice((b"", data[:7], data[:HEADER], data[:-1], data[:-4], data + b"\0" * 4, data * 2,
                                 pickled, data[:9] + b"\xff" + data[10:], b"\0" * len(data),
                                 data.replace(b"<f4", b">f4", 1),
                                 data.replace(b"False", b"True ", 1)))  # fmt: skip

    draft.late.append(spoil)


@damage
def array(draft: Draft, rng: random.Random) -> None:
    """What the array says of itself."""
    how = rng.choice(({"dtype": "object"}, {"shape": ()}, {"shape": (10**18,)}, {"shape": (-1,)}, {"stype": "pickle"}))

    def spoil(records: RecordDict) -> None:
        if isinstance(records.get("arrays"), ArrayRecord):
            for one in records["arrays"].values():
                for name, value in how.items():
                    setattr(one, name, value)

    draft.late.append(spoil)


@damage
def records(draft: Draft, rng: random.Random) -> None:
    """Records, arrays and entries that are missing, more, or of another type."""

    def spoil(records: RecordDict) -> None:
        how, other = rng.randrange(8), rng.choice(("arrays", "config", "metrics", "more"))
        if how == 0:
            records.pop(other, None)
        elif how == 1:
            records[other] = rng.choice((MetricRecord({"x": 1}), ConfigRecord({"kind": "update"}), ArrayRecord()))
        elif how == 2 and isinstance(records.get("arrays"), ArrayRecord):
            records["arrays"]["more"] = Array("float32", (1,), "numpy.ndarray", b"1234")
        elif how == 3 and isinstance(records.get("metrics"), MetricRecord):
            records["metrics"][rng.choice(("weight", "x"))] = rng.choice(([1, 2], [], [0.5], 10**400))
        elif isinstance(records.get("config"), ConfigRecord):
            config = records["config"]
            names = [*config, "s.weight", "t.x", "x", "s.", "run"]
            config[rng.choice(names)] = rng.choice((b"", b"\2" * 9, 3, 0.5, True, [b"a"], ["a"], "text", [1], []))

    draft.late.append(spoil)


class Bomb:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> None:
    raise AssertionError("bytes of a client were unpickled")


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[int, list[tuple[str, int]], bool]:
    """Which reply, what is done to it, and whether it is lent as it is, as our engines do."""
    steps = st.tuples(st.sampled_from(sorted(DAMAGES)), st.integers(0, 2**20))
    return draw(st.integers(0, 99)), draw(st.lists(steps, min_size=1, max_size=3)), draw(st.integers(0, 3)) == 0


def spoil(exchange: Exchange, which: int, steps: list[tuple[str, int]], lend: bool) -> tuple[int, Message]:
    """Which of the replies it is, and the damaged one."""
    at = which % len(exchange.replies)
    message = exchange.replies[at]
    packets = [decode(m.content) for m in exchange.replies] + [Packet("scores", scalars={"personal.n": 1})]
    draft = Draft(packets[at], packets, [])
    for name, seed in steps:
        DAMAGES[name](draft, random.Random(seed))
    content: RecordDict
    if lend:
        content = LentRecords(draft.packet)
    else:
        try:
            content = encode(draft.packet)
        except UserError:  # our own client cannot send it; a stranger's would lie about its layout
            content = encode(replace(draft.packet, tensors={}))
        for change in draft.late:
            change(content)
    reply = Message(content, reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = message.metadata.src_node_id
    return at, reply


# --- the oracle ------------------------------------------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """Sums the sizes of all storages that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in _flat(args) if isinstance(t, Tensor)}
        for t in _flat((out,)):
            if isinstance(t, Tensor) and t.device.type != "meta" and t.untyped_storage()._cdata not in known:
                self.bytes += t.untyped_storage().nbytes()
        return out


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def checking_bytes(exchange: Exchange, reply: Message) -> int:
    """Bytes that are allocated while the reply is checked: the peak of Python's and numpy's, the sum of torch's."""
    _warm_up()
    s = exchange.open()
    device = s.devices[s.ids[reply.metadata.src_node_id]]
    tracemalloc.start()
    try:
        with Allocated() as torch_bytes:
            before = tracemalloc.get_traced_memory()[0]
            with suppress(ClientError):
                exchange.strategy._packet(exchange.number, exchange.stage, device, reply)
            peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    return int(peak) + torch_bytes.bytes


@cache
def _warm_up() -> None:
    """What torch imports when it is first watched is not counted."""
    with Allocated():
        torch.zeros(1).isfinite().all()


def bits_of(state: State) -> str:
    return digest(state, {})


def good_line(error: Exception, exchange: Exchange, node: int) -> None:
    line = str(error)
    client = exchange.session.ids[node]
    assert line.startswith(f"client {client}, round {exchange.number}, stage {exchange.stage}: ")
    assert line.isprintable() and len(line) < 1200


@pytest.mark.parametrize("which", range(len(RUNS)), ids=list(RUNS))
def test_a_damaged_reply_is_refused_or_harmless(which: int) -> None:
    for exchange in exchanges(list(RUNS)[which]):
        _hold(exchange)


def _hold(exchange: Exchange) -> None:
    genuine = list(exchange.replies)
    before = bits_of(exchange.session.state)

    @cache
    def without(at: int) -> str | None:
        """The bits of the state if that client had not answered; None where nobody is left."""
        try:
            return bits_of(exchange.take(genuine[:at] + genuine[at + 1 :], "skip"))
        except UserError:
            return None

    @settings(max_examples=CASES, database=None, suppress_health_check=list(HealthCheck))
    @given(spoilt())
    def check(case: tuple[int, list[tuple[str, int]], bool]) -> None:
        at, reply = spoil(exchange, *case)
        assert checking_bytes(exchange, reply) <= 2 * exchange.allowed + WORDS
        replies = [*genuine[:at], reply, *genuine[at + 1 :]]
        try:
            after = exchange.take(replies)
        except ClientError as error:
            good_line(error, exchange, reply.metadata.src_node_id)
            assert exchange.strategy.state is exchange.session.state
            expected = without(at)
            if expected is not None:  # and where failures are skipped it is as if the client had not answered
                assert bits_of(exchange.take(replies, "skip")) == expected
        else:
            assert all(bool(torch.isfinite(t).all()) for t in after.tensors().values() if t.is_floating_point())
            assert after.tensors().keys() or exchange.strategy.client == "local"
        assert bits_of(exchange.session.state) == before

    check()


@pytest.mark.parametrize("run", list(RUNS))
def test_genuine_replies_are_taken_and_checked_in_little_memory(run: str) -> None:
    for exchange in exchanges(run):
        exchange.take(list(exchange.replies))
        for reply in exchange.replies:
            assert checking_bytes(exchange, reply) <= 2 * exchange.allowed + 100_000


# --- who answers -----------------------------------------------------------------------------------------------------


class Twisted(LocalGrid):
    """Changes what comes back in round 2, in training."""

    def twist(self, how: Callable[[list[Message]], list[Message]]) -> None:
        self.how = how

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        asked = list(messages)
        replies = list(super().send_and_receive(asked))
        metadata = asked[0].metadata
        return self.how(replies) if (metadata.group_id, metadata.message_type) == ("2", "train") else replies


def from_node(message: Message, node: int) -> Message:
    content = message.error if message.has_error() else message.content
    forged = Message(content, reply_to=message)
    forged.metadata.__dict__["_src_node_id"] = node
    return forged


def twisted(how: Callable[[list[Message]], list[Message]], on_client_error: str, fraction: float = 1.0) -> Any:
    clients, task = small_clients(4), small_task()
    strategy = build(load_method("fedavg"), {"batch_size": 8})
    with Twisted(client_app(task, clients.__getitem__), 4) as grid:
        grid.twist(how)
        plan = Plan(fraction=fraction, on_client_error=on_client_error, evaluate_every=0)
        reports = list(strategy.rounds(grid, 3, task=task, plan=plan))
    return reports, bits_of(strategy.state)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        (lambda m: [*m, from_node(m[1], 3)], "client 2, round 2, stage train: it answered twice"),
        (lambda m: [*m, from_node(m[1], 77)], "node 77, round 2, stage train: it answered and was not asked"),
        (lambda m: [*m, from_node(m[1], -5)], "node -5, round 2, stage train: it answered and was not asked"),
        (lambda m: [*m, m[0], m[0]], "client 0, round 2, stage train: it answered twice"),
    ],
)
def test_replies_of_others_and_second_ones_are_refused_and_change_nothing(how: Any, line: str) -> None:
    with pytest.raises(ClientError) as caught:
        twisted(how, "stop")
    assert str(caught.value) == line
    reports, after = twisted(how, "skip")
    assert after == twisted(lambda m: m, "skip")[1]
    assert reports[1]["failures"] >= 1 and reports[1]["errors"][0] == line and reports[1]["clients"] == 4


def test_a_client_that_was_not_asked_this_round_is_refused() -> None:
    def how(messages: list[Message]) -> list[Message]:
        idle = ({1, 2, 3, 4} - {m.metadata.src_node_id for m in messages}).pop()
        return [*messages, from_node(messages[0], idle)]

    with pytest.raises(ClientError, match=r"client \d, round 2, stage train: it answered and was not asked"):
        twisted(how, "stop", fraction=0.5)
    assert twisted(how, "skip", fraction=0.5)[1] == twisted(lambda m: m, "skip", fraction=0.5)[1]


def test_the_order_of_the_replies_of_a_foreign_grid_does_not_matter() -> None:
    assert twisted(lambda m: m[::-1], "stop")[1] == twisted(lambda m: m, "stop")[1]


class Asked(LocalGrid):
    """Like Flower's own grids: nodes are asked for their numbers; here some of them lie."""

    def lie(self, lies: Mapping[int, Packet | None]) -> None:
        self.hidden, self.lies = self.partitions, lies

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        self.partitions = self.hidden
        out = []
        for reply in super().send_and_receive(messages):
            node = reply.metadata.src_node_id
            if reply.metadata.message_type == "query" and node in self.lies:
                lie = self.lies[node]
                content = Error(7, "no\nway") if lie is None else encode(lie)
                out.append(from_node(Message(content, reply_to=reply), node))
            else:
                out.append(reply)
        del self.partitions
        return out

    def get_node_ids(self) -> Any:
        return list(self.hidden.values())


@pytest.mark.parametrize(
    ("lie", "line"),
    [
        (None, "node 2, query: no"),
        (Packet("error", scalars={"message": "a\nb\x1b[2J"}), "node 2, query: a b"),
        (Packet("partition"), "node 2, query: its partition-id is None"),
        (Packet("partition", scalars={"id": "1"}), "node 2, query: its partition-id is '1'"),
        (Packet("partition", scalars={"id": 1.0}), "node 2, query: its partition-id is 1.0"),
        (Packet("partition", scalars={"id": -1}), "node 2, query: its partition-id is -1"),
        (Packet("partition", scalars={"id": 2**40}), "node 2, query: its partition-id is 1099511627776"),
        (Packet("partition", {"x": torch.ones(1)}, {"id": 1}), "node 2, query: tensor 'x' is not wanted"),
        (Packet("update", scalars={"id": 1}), "node 2, query: a reply of kind 'update'"),
        (Packet("partition", scalars={"id": 2}), r"nodes [2, 3] all say that they are client 2"),
    ],
)
def test_nodes_that_lie_about_their_number_stop_the_run_or_are_left_out(
    lie: Packet | None, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    clients, task = small_clients(4), small_task()
    for on_client_error in ("stop", "skip"):
        with Asked(client_app(task, clients.__getitem__), 4) as grid:
            grid.lie({2: lie})
            del grid.partitions
            strategy = build(load_method("fedavg"), {})
            plan = Plan(on_client_error=on_client_error, evaluate_every=0)
            run = strategy.rounds(grid, 1, task=task, plan=plan)
            if on_client_error == "stop":
                with pytest.raises(ClientError, match=re.escape(line)):
                    list(run)
            else:
                rows = next(iter(run))["rows"]
                assert [row["client"] for row in rows] == ([0, 3] if "nodes" in line else [0, 2, 3])
                assert line in caplog.text and "it is left out" in caplog.text


# --- what is said, what is kept, what is never done ------------------------------------------------------------------


def test_what_a_client_says_is_one_short_printable_line() -> None:
    exchange = exchanges("fedavg")[0]
    for text in ("\x1b[2J\x1b]0;x\x07", "a\nb\r\nc", "x" * 3_000_000, "\u202eabc", "\u2028line"):
        reply = Message(encode(Packet("error", {}, {"message": text, "trace": text})), reply_to=exchange.replies[0])
        reply.metadata.__dict__["_src_node_id"] = exchange.replies[0].metadata.src_node_id
        with pytest.raises(ClientError) as caught:
            exchange.take([reply])
        good_line(caught.value, exchange, reply.metadata.src_node_id)
        assert len(caught.value.trace) <= 20_000 and caught.value.trace.replace("\n", "").isprintable()


def test_hostile_layouts_are_not_kept() -> None:
    """What was read is remembered, but not without bounds."""
    tracemalloc.start()
    try:
        sizes = []
        for n in range(300):
            records = encode(Packet("update", {"a": torch.ones(1)}))
            records["config"]["layout"] = f'[["{n}","int8",[1]]{" " * 100_000}]'
            with pytest.raises(UserError):
                decode(records)
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[-1] - sizes[0] < 2_000_000


def test_bytes_that_are_neither_true_nor_false_are_refused() -> None:
    records = encode(Packet("update", {"a": torch.tensor([True, False])}))
    records["config"]["t.a"] = b"\1\2"
    with pytest.raises(UserError, match="'a' has bytes that are neither true nor false"):
        decode(records)


ODD: dict[str, Callable[[], Packet]] = {
    "no packet": lambda: None,  # type: ignore[return-value,dict-item]
    "kind": lambda: Packet(3),  # type: ignore[arg-type]
    "no tensor": lambda: Packet("update", {"a": [1.0]}, {"weight": 1}),  # type: ignore[dict-item]
    "complex": lambda: Packet("update", {"a": torch.ones(2, dtype=torch.complex64)}, {"weight": 1}),
    "sparse": lambda: Packet("update", {"a": torch.eye(2).to_sparse()}, {"weight": 1}),
    "meta": lambda: Packet("update", {"a": torch.empty(10**12, device="meta")}, {"weight": 1}),
    "name": lambda: Packet("update", {3: torch.ones(1)}, {"weight": 1}),  # type: ignore[dict-item]
    "surrogate": lambda: Packet("update", {"\ud800": torch.ones(1)}, {"weight": 1}),
    "scalar": lambda: Packet("update", {}, {"weight": torch.ones(1)}),  # type: ignore[dict-item]
    "large": lambda: Packet("update", {}, {"weight": 10**5000}),
    "word": lambda: Packet("update", {}, {"weight": 1, "x": "\udfff"}),
    "truth": lambda: Packet("update", {}, {"weight": True}),
}


@dataclass(frozen=True)
class OddClient(load_method("fedavg").client):  # type: ignore[misc]
    """A client half whose replies are no packets that can be sent."""

    how: str = ""

    def train(self, *args: Any) -> Any:
        return ODD[self.how](), {}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", list(ODD))
def test_a_client_half_that_replies_with_anything_else_is_named(how: str, workers: int) -> None:
    clients, task = small_clients(2), small_task()
    for own in (True, False):
        strategy = build(load_method("fedavg", f"{__name__}:OddClient"), {"how": how})
        grid = LocalGrid(client_app(task, clients.__getitem__), 2, workers=workers, own_replies=own)
        with grid, pytest.raises(ClientError, match="client 0, round 1, stage train: ") as caught:
            list(strategy.rounds(grid, 1, task=task))
        assert str(caught.value).isprintable()


def test_lent_replies_are_checked_as_encoded_ones() -> None:
    """On our own engines nothing is decoded."""
    exchange = exchanges("fedavg")[0]
    for how, make in ODD.items():
        if how != "no packet":
            reply = Message(LentRecords(make()), reply_to=exchange.replies[0])
            reply.metadata.__dict__["_src_node_id"] = exchange.replies[0].metadata.src_node_id
            with pytest.raises(ClientError) as caught:
                exchange.take([reply])
            good_line(caught.value, exchange, reply.metadata.src_node_id)


def test_nothing_in_the_library_unpickles() -> None:
    """Pipes and Ray carry our own processes' envelopes; no byte of a client goes through these."""
    root = Path(fedsparse.__file__).parents[1]
    for path in [p for folder in ("fedsparse", "strategies", "clients") for p in (root / folder).rglob("*.py")]:
        assert not re.search(r"torch\.load\(|pickle\.load|Unpickler|allow_pickle\s*=\s*True", path.read_text()), path


def with_scalars(exchange: Exchange, **said: Any) -> list[Message]:
    """The genuine replies, the first one with other scalars; None = without."""
    first = exchange.replies[0]
    packet = decode(first.content)
    scalars = {name: v for name, v in {**packet.scalars, **said}.items() if v is not None}
    changed = Message(encode(replace(packet, scalars=scalars)), reply_to=first)
    return [from_node(changed, first.metadata.src_node_id), *exchange.replies[1:]]


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        *[("train", {"weight": w}) for w in (None, 0, -1, 1e17, 1e308, 2**60, "3", float("nan"), float("inf"))],
        *[("train", {"loss": x}) for x in (1e301, -1e308, "low", float("nan"))],
        *[("train", {n: x}) for n in ("samples", "flops", "memory", "train_seconds") for x in (-1, 1e301, "x")],
        *[("train", {"density_true": -0.1}), ("train", {"forward_macs_max": "many"})],
        *[("train", {"local.n": 3}), ("train", {"personal.n": 3, "personal.correct": 1, "personal.loss": 1.0})],
        *[("train", {"failed.n": 1, "failed.correct": 0, "failed.loss": 0.0}), ("train", {"client.n": 0})],
        *[("evaluate", {"personal.n": n}) for n in (None, -1, 2.0, "8", 2**60)],
        *[("evaluate", {"personal.correct": c}) for c in (None, -1, 1.0, 10**6)],
        *[("evaluate", {"personal.loss": x}) for x in (None, float("nan"), 1e301, "0")],
        *[("evaluate", {"mine.n": 1, "mine.correct": 1, "mine.loss": 0.0}), ("evaluate", {".n": 1})],
    ],
)
def test_numbers_that_cannot_be_are_refused(stage: str, said: Mapping[str, Any]) -> None:
    exchange = next(e for e in exchanges("fedavg") if e.stage == stage)
    with pytest.raises(ClientError) as caught:
        exchange.take(with_scalars(exchange, **said))
    good_line(caught.value, exchange, exchange.replies[0].metadata.src_node_id)
    name = next(iter(said))
    assert f"'{name.rpartition('.')[0] or name}" in str(caught.value) or name == ".n"


def test_the_largest_weight_and_values_leave_a_finite_state() -> None:
    exchange = next(e for e in exchanges("fedavg") if e.stage == "train")
    first, *others = with_scalars(exchange, weight=2**53)
    packet = decode(first.content)
    huge = replace(packet, tensors={n: torch.full_like(t, 3.4028234e38) for n, t in packet.tensors.items()})
    node = first.metadata.src_node_id
    after = exchange.take([from_node(Message(encode(huge), reply_to=exchange.replies[0]), node), *others])
    assert all(bool(torch.isfinite(t).all()) for t in after.tensors().values())
