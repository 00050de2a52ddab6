"""Seeding, the task, local SGD, means, method loading, the summary's figures."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedsparse.client import client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import ClientError, UserError
from fedsparse.method import build, load_method
from fedsparse.packet import Packet
from fedsparse.report.summary import accuracy, noise_bottom_decile
from fedsparse.runner import digest
from fedsparse.seeding import numpy_rng, sample_cohort, seed_of, torch_rng
from fedsparse.sgd import batches, sgd
from fedsparse.sparse.mean import WeightedMean
from fedsparse.steps import clip_
from fedsparse.strategy import Plan, misfit
from fedsparse.task import Budget, Split
from tests.helpers import norm_task, small_clients, small_split, small_task

# --- seeding ---------------------------------------------------------------------------------------------------------


def test_a_path_names_the_same_seed_in_every_process() -> None:
    code = "from fedsparse.seeding import seed_of; print(seed_of(1, 2, 'train'))"
    there = {subprocess.check_output([sys.executable, "-c", code], text=True).strip() for _ in range(2)}
    assert there == {str(seed_of(1, 2, "train"))}


def test_paths_do_not_collide() -> None:
    paths = [(1,), ("1",), (1, 2), (12,), ("1, 2",), (1, "2"), (-1,), (0,)]
    assert len({seed_of(*path) for path in paths}) == len(paths)
    assert torch.rand(1, generator=torch_rng(1)) != torch.rand(1, generator=torch_rng(2))
    assert numpy_rng(1).random() == numpy_rng(1).random()


@given(st.integers(1, 60), st.floats(0.01, 1), st.integers(0, 9), st.integers(1, 99))
def test_cohorts_have_the_right_size_and_do_not_depend_on_order(n: int, share: float, seed: int, turn: int) -> None:
    ids = list(range(0, 3 * n, 3))
    cohort = sample_cohort(ids, share, seed, turn)
    assert len(cohort) == max(1, round(share * n))
    assert cohort == sorted(set(cohort) & set(ids))
    random.Random(0).shuffle(ids)
    assert sample_cohort(ids, share, seed, turn) == cohort


# --- the task and local SGD ------------------------------------------------------------------------------------------


def test_binding_is_functional_call_and_leaves_the_template_alone() -> None:
    task, data = norm_task(), small_split(9, "x")
    params = {k: v + 0.1 for k, v in task.init_params().items()}
    kept = task.init_params()
    own = {k: v.clone() for k, v in params.items()}
    task.model.train()
    expected = functional.cross_entropy(torch.func.functional_call(task.model, own, (data.x,)), data.y)
    assert torch.equal(task.loss(params, data.x, data.y, train=True), expected)
    assert all(torch.equal(params[k], own[k]) for k in params)  # batch norm moved both alike
    assert all(torch.equal(kept[k], v) for k, v in task.init_params().items())


def test_an_exception_inside_a_block_restores_the_template() -> None:
    task = small_task()
    before = task.init_params()
    with pytest.raises(RuntimeError), task.bound({k: v * 2 for k, v in before.items()}):
        raise RuntimeError
    assert all(torch.equal(before[k], v) for k, v in task.init_params().items())


@pytest.mark.parametrize(
    "how", [{}, {"momentum": 0.9}, {"weight_decay": 0.05}, {"momentum": 0.5, "weight_decay": 0.01}], ids=str
)
def test_sgd_is_torch_optim_bit_by_bit(how: dict[str, float]) -> None:
    task, data = norm_task(), small_split(23, "x")
    fit = sgd(task, task.init_params(), data, lr=0.1, epochs=2, batch_size=5, rng=torch_rng("r"), **how)
    model = norm_task().model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **how)
    model.train()
    losses = []
    for batch in batches(23, 5, 2, torch_rng("r")):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(data.x[batch]), data.y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(fit.params[name], tensor), name
    assert fit.loss == pytest.approx(np.mean(losses))
    assert (fit.steps, fit.samples) == (10, 46)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_adam_is_torch_optim_bit_by_bit(decay: float) -> None:
    task, data = norm_task(), small_split(23, "x")
    how = {"lr": 0.01, "weight_decay": decay}
    fit = sgd(task, task.init_params(), data, epochs=2, batch_size=5, rng=torch_rng("r"), optimizer="adam", **how)
    model = norm_task().model
    optimizer = torch.optim.Adam(model.parameters(), foreach=True, **how)
    model.train()
    for batch in batches(23, 5, 2, torch_rng("r")):
        optimizer.zero_grad()
        functional.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
        optimizer.step()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(fit.params[name], tensor), name


def test_the_proximal_term_is_the_gradient_of_its_loss() -> None:
    task, data, mu = small_task(), small_split(8, "x"), 0.7
    start = {k: v + 0.05 for k, v in task.init_params().items()}
    fit = sgd(task, start, data, lr=0.1, epochs=2, batch_size=8, rng=torch_rng("r"), proximal=mu)
    own = {k: v.clone().requires_grad_() for k, v in start.items()}
    for batch in batches(8, 8, 2, torch_rng("r")):
        loss = task.loss(own, data.x[batch], data.y[batch], train=True)
        loss = loss + mu / 2 * sum(((own[k] - start[k]) ** 2).sum() for k in own)
        grads = torch.autograd.grad(loss, list(own.values()))
        own = {k: (v - 0.1 * g).detach().requires_grad_() for (k, v), g in zip(own.items(), grads, strict=True)}
    for name in own:
        torch.testing.assert_close(fit.params[name], own[name].detach())


def test_clipping_bounds_the_joint_norm_and_leaves_small_gradients_alone() -> None:
    grads = [torch.full((3,), 2.0), torch.full((4,), 1.0)]
    clip_(grads, 10.0)
    assert grads[0][0] == 2
    clip_(grads, 1.0)
    assert math.isclose(float(torch.cat(grads).norm()), 1.0, rel_tol=1e-5)
    assert grads[0][0] / grads[1][0] == pytest.approx(2)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3))
def test_batches_cover_all_but_a_lonely_last_example(n: int, size: int, epochs: int) -> None:
    parts = list(batches(n, size, epochs, torch_rng("b")))
    lonely = n % size == 1 and n > 1 and size > 1
    assert sum(map(len, parts)) == epochs * (n - lonely)
    assert all(len(p) > 1 or n == 1 or size == 1 for p in parts)


def test_a_diverging_loss_is_an_error() -> None:
    task = small_task()
    with pytest.raises(UserError, match="training loss is .* at step"):
        sgd(task, task.init_params(), small_split(20, "x"), lr=1e30, epochs=20, batch_size=5, rng=torch_rng(0))


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 9)), min_size=1, max_size=6))
def test_the_weighted_mean_against_plain_python(clients: list[tuple[int, int]]) -> None:
    mean = WeightedMean()
    values = [torch.randn(3, generator=torch_rng(i, key)) for i, (_, key) in enumerate(clients)]
    for (n, _), value in zip(clients, values, strict=True):
        mean.add({"w": value}, n)
    result = mean.result({"w": torch.zeros(3), "other": torch.ones(2)})
    for j in range(3):
        total = 0.0
        for (n, _), value in zip(clients, values, strict=True):
            total += n * float(value[j])
        assert float(result["w"][j]) == np.float32(total / sum(n for n, _ in clients))
    assert torch.equal(result["other"], torch.ones(2))


# --- methods ---------------------------------------------------------------------------------------------------------

MINE = """
from dataclasses import dataclass
from fedsparse.client import SgdClient, update
from fedsparse.strategy import AveragingStrategy

@dataclass
class Mine(AveragingStrategy):
    client = {client!r}
    speed: float = 1.0

@dataclass(frozen=True)
class MyClient(SgdClient):
    shift: float = 0.5

    def train(self, task, client, packet, memory, rng):
        fit = self.fit(task, client, packet.tensors, rng)
        return update(client, fit), memory

    def evaluate(self, task, client, packet, memory):
        return {{"personal": task.score(packet.tensors, client.held_out)}}
"""


def test_a_users_method_is_one_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(client=f"{file}:MyClient"))
    method = load_method(str(file))
    assert method.name == "mine"
    clients, task = small_clients(3), small_task()
    strategy = build(method, {"shift": 1, "speed": 2.0, "lr": 0.1})
    assert strategy.client_config.items() >= {"shift": 1.0, "lr": 0.1, "epochs": 1}.items()
    with LocalGrid(client_app(task, clients.__getitem__), 3, workers=2, own_replies=False) as grid:
        report = next(strategy.rounds(grid, 1, task=task))
    assert report["accuracy"]["personal"] is not None
    assert report["accuracy"]["global"] is None


def test_a_users_client_half_goes_under_a_built_in_strategy(tmp_path: Path) -> None:
    file = tmp_path / "half.py"
    file.write_text(MINE.format(client="fedavg"))
    method = load_method("fedavg", f"{file}:MyClient")
    assert (method.name, method.client.__name__) == ("fedavg", "MyClient")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fedagv", "unknown method 'fedagv'; did you mean 'fedavg'"),
        ("no/such.py", "method file 'no/such.py' does not exist"),
        ("no.such.module:X", "method 'no.such.module': no such module"),
        ("strategies.fedavg:Nothing", "unknown FederatedStrategy in strategies.fedavg 'Nothing'"),
        ("fedsparse.errors", "must hold one FederatedStrategy, it holds none"),
    ],
)
def test_methods_that_cannot_be_loaded(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        load_method(spec)


def test_a_hyper_parameter_must_not_hide_a_method(tmp_path: Path) -> None:
    code = """
from dataclasses import dataclass
from strategies.fedavg import FedAvg

@dataclass
class Mine(FedAvg):
    {name}: int = 1
"""
    (tmp_path / "mine.py").write_text(code.format(name="init"))
    with pytest.raises(UserError, match="hyper-parameter 'init' would hide the method of that name"):
        load_method(str(tmp_path / "mine.py"))
    (tmp_path / "other.py").write_text(code.format(name="mine"))
    assert load_method(str(tmp_path / "other.py")).strategy.__name__ == "Mine"


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"lrr": 0.1}, "unknown hyper-parameter of fedprox 'lrr'; did you mean 'lr'"),
        ({"lr": "big"}, "fedprox.lr must be a number, got 'big'"),
        ({"epochs": 1.5}, "fedprox.epochs must be a whole number, got 1.5"),
        ({"epochs": True}, "fedprox.epochs must be a whole number, got True"),
        ({"lr": -1.0}, "method fedprox: lr must be above 0, got -1.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"mu": -0.1}, "mu must be at least 0, got -0.1"),
    ],
)
def test_bad_hyper_parameters(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(load_method("fedprox"), hyper)


def test_budgets_are_checked() -> None:
    with pytest.raises(UserError, match=r"budget.density must be in \(0, 1\], got 0"):
        Budget(density=0)
    with pytest.raises(UserError, match="budget.bytes_up must be above 0, got -3"):
        Budget(bytes_up=-3)


# --- a grid that knows nothing of us --------------------------------------------------------------------------------


class StrangeGrid(Grid):
    """Like Flower's own: node ids are random, replies come in any order, nobody says who is who."""

    def __init__(self, inner: LocalGrid) -> None:
        self.inner = inner
        self.names = {node: 1000 + 17 * node % 101 for node in inner.get_node_ids()}

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return self.inner.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.inner.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return set(self.names.values())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        back = {name: node for node, name in self.names.items()}
        inner = [
            Message(RecordDict(dict(m.content)), back[m.metadata.dst_node_id], m.metadata.message_type)
            for m in messages
        ]
        replies = list(self.inner.send_and_receive(inner))
        for reply in replies:
            reply.metadata.__dict__["_src_node_id"] = self.names[reply.metadata.src_node_id]
        random.Random(1).shuffle(replies)
        return replies


@pytest.mark.parametrize("name", ["fedavg", "pfedgate"])
def test_strategies_run_on_any_flower_grid_with_the_same_digest(name: str) -> None:
    digests = set()
    for strange in (False, True):
        clients, task = small_clients(4), small_task()
        strategy = build(load_method(name), {})
        with LocalGrid(client_app(task, clients.__getitem__), 4) as local:
            grid = StrangeGrid(local) if strange else local
            strategy.start(grid, num_rounds=2, task=task, plan=Plan(seed=1, fraction=0.5))
            digests.add(digest(strategy.state, {}))
    assert len(digests) == 1


def test_devices_without_a_client_are_refused() -> None:
    clients, task = small_clients(3), small_task()
    with LocalGrid(client_app(task, clients.__getitem__), 2) as grid, pytest.raises(UserError, match=r"devices \[2\]"):
        build(load_method("fedavg"), {}).start(grid, num_rounds=1, task=task, devices=[c.device for c in clients])


def test_initial_arrays_replace_the_initial_model() -> None:
    clients, task = small_clients(2), small_task()
    with LocalGrid(client_app(task, clients.__getitem__), 2) as grid:
        strategy = build(load_method("fedavg"), {})
        first = strategy.start(grid, num_rounds=2, task=task, plan=Plan(evaluate_every=0))
        again = build(load_method("fedavg"), {})
        again.start(grid, first.arrays, num_rounds=1, task=task, plan=Plan(evaluate_every=0))
        assert digest(again.state, {}) != digest(strategy.state, {})
        with pytest.raises(UserError, match="initial_arrays has"):
            again.start(grid, type(first.arrays)([np.zeros(3, np.float32)]), num_rounds=1, task=task)


def test_a_packet_of_the_wrong_form_names_the_client() -> None:
    from flwr.app import MetricRecord
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Any) -> Message:
        return Message(RecordDict({"m": MetricRecord({"x": 1})}), reply_to=message)

    task = small_task()
    with LocalGrid(app, 2) as grid, pytest.raises(ClientError, match="client 0, round 1, stage train: not a fedsparse"):
        build(load_method("fedavg"), {}).start(grid, num_rounds=1, task=task)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Packet("trained", {}), "a reply of kind 'trained', where 'update' is wanted"),
        (Packet("update", {"a": torch.ones(2)}), "tensor 'b' is missing"),
        (Packet("update", {"a": torch.ones(2), "b": torch.ones(1), "c": torch.ones(1)}), "tensor 'c' is not wanted"),
        (Packet("update", {"a": torch.ones(3), "b": torch.ones(1)}), r"tensor 'a' is torch.float32 \(3,\), where"),
        (Packet("update", {"a": torch.ones(2).int(), "b": torch.ones(1)}), "tensor 'a' is torch.int32"),
    ],
)
def test_a_reply_that_does_not_fit_is_described(reply: Packet, message: str) -> None:
    like = {"a": torch.zeros(2), "b": torch.zeros(1)}
    assert re.search(message, misfit(reply, "update", like))
    assert misfit(Packet("update", like), "update", like) == ""


# --- the summary ----------------------------------------------------------------------------------------------------


def test_accuracy_figures_by_hand() -> None:
    rows = []
    for client in range(20):
        for turn in range(1, 8):  # the last five of seven count
            right = 0.0 if turn <= 2 else client / 20
            rows.append({"client": client, "round": turn, "personal": right, "n_test": 10 + client})
    got = accuracy(rows, "personal")
    values = np.arange(20) / 20
    weights = 10 + np.arange(20)
    assert got["mean"] == pytest.approx(values.mean())
    assert got["weighted"] == pytest.approx((values * weights).sum() / weights.sum())
    assert got["bottom_decile"] == pytest.approx((0 + 0.05) / 2)
    assert got["p10"] == pytest.approx(values[2])
    assert accuracy([{**r, "personal": None} for r in rows], "personal")["mean"] is None


def test_noise_alone_gives_the_binomial_bottom_decile() -> None:
    tests = np.full(10, 25)
    rng = np.random.default_rng(5)
    expected = np.mean([min(rng.binomial(25, 0.8, size=10)) / 25 for _ in range(4000)])
    assert noise_bottom_decile(0.8, tests) == pytest.approx(expected, abs=0.005)
    assert noise_bottom_decile(1.0, tests) == 1.0


def test_an_mlp_from_elsewhere_trains() -> None:
    """Any module that maps inputs to logits is a task, dropout-free or not named by us."""
    from fedsparse.task import Task

    task = Task(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), (1, 8, 8), 4, 0)
    data = small_split(64, "x")
    fit = sgd(task, task.init_params(), data, lr=0.1, epochs=10, batch_size=16, rng=torch_rng(0))
    assert task.score(fit.params, data).loss < task.score(task.init_params(), data).loss
    assert task.score(fit.params, Split(data.x[:0], data.y[:0])).n == 0
