"""A fixed mask: reductions to FedAvg and to masked dense training, versions of the mask, densities, bytes, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsparse.client import client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import UserError
from fedsparse.globalmask import kept_counts, prunable, receive
from fedsparse.method import build, load_method
from fedsparse.models import build_model
from fedsparse.packet import Packet, decode
from fedsparse.runner import digest
from fedsparse.seeding import torch_rng
from fedsparse.sgd import batches
from fedsparse.sparse.masks import whole
from fedsparse.strategy import Plan
from fedsparse.task import Device, Params, Split, Task
from strategies.fixed_mask import FixedMask
from tests.helpers import norm_task, small_clients, small_task
from tests.test_contract import TASKS, halves, run_method

PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "clip": 0.0}
ALL = {"momentum": 0.9, "weight_decay": 0.01, "clip": 0.5}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("hyper", [PLAIN, ALL], ids=["plain", "all"])
def test_at_density_one_it_is_fedavg(task: str, hyper: dict[str, float]) -> None:
    avg, _, first = run_method("fedavg", TASKS[task](), **hyper)
    full, memories, second = run_method("fixed_mask", TASKS[task](), density=1.0, **hyper)
    assert digest(avg.state, {}) == digest(full.state, {})
    assert not memories
    same = ("density_true", "density_nominal", "flops", "forward_macs", "memory", "loss", "local", "personal", "global")
    for a, b in zip(first, second, strict=True):
        assert [[row[key] for key in same] for row in a["rows"]] == [[row[key] for key in same] for row in b["rows"]]


def masked_dense(task: Task, params: Params, keep: dict[str, Tensor], data: Split, rng: torch.Generator) -> Params:
    """The obvious version: dense weights, dense gradients, everything times the mask."""
    own = {name: t.clone() for name, t in params.items()}
    leaves = [own[name].requires_grad_() for name in task.trainable]
    optimizer = torch.optim.SGD(leaves, lr=0.1, momentum=0.9, weight_decay=0.01)
    for batch in batches(len(data), 8, 2, rng):
        optimizer.zero_grad()
        task.loss(own, data.x[batch], data.y[batch], train=True).backward()
        for name, mask in keep.items():
            own[name].grad.mul_(mask)
        optimizer.step()
        with torch.no_grad():
            for name, mask in keep.items():
                own[name].mul_(mask)
    return {name: t.detach() for name, t in own.items()}


@pytest.mark.parametrize("task", TASKS)
def test_training_is_masked_dense_training(task: str) -> None:
    the_task, client = TASKS[task](), small_clients(3)[2]
    strategy, half = halves("fixed_mask", batch_size=8, epochs=2, lr=0.1, momentum=0.9, weight_decay=0.01)
    packet = strategy.broadcast(strategy.init(the_task, [client.device]), client.device)
    reply, memory = half.train(the_task, client, packet, {}, torch_rng(3))
    got = receive(the_task, reply, memory)
    sparse = whole(got.params, got.mask, the_task.shapes)
    start = receive(the_task, packet, {})
    keep = {n: whole({n: torch.ones(len(k))}, {n: k}, the_task.shapes)[n] for n, k in start.mask.items()}
    params = whole(start.params, start.mask, the_task.shapes)
    dense = masked_dense(the_task, params, keep, client.train, torch_rng(3))
    assert all(torch.allclose(sparse[n], dense[n], atol=1e-5) for n in dense)
    assert all((sparse[n][mask == 0] == 0).all() for n, mask in keep.items())


# --- versions of the mask --------------------------------------------------------------------------------------------


def run_versions(rounds: int, fraction: float = 0.4) -> tuple[Any, dict[int, dict[str, Tensor]], list[dict[str, Any]]]:
    clients, task = small_clients(5), norm_task()
    strategy, _ = halves("fixed_mask", density=0.3)
    with LocalGrid(client_app(task, clients.__getitem__), 5, own_replies=False) as grid:
        plan = Plan(seed=1, fraction=fraction)
        reports = list(strategy.rounds(grid, rounds, task=task, devices=[c.device for c in clients], plan=plan))
        memories = {i: dict(decode(s).tensors) for i, s in grid.states().items() if len(s)}
    return strategy.state, memories, reports


def test_a_mask_travels_once_to_each_client_that_takes_part() -> None:
    state, memories, reports = run_versions(rounds=6)
    down: dict[int, list[int]] = {}
    for report in reports:
        for row in report["rows"]:
            if row["bytes_down"] is not None:
                down.setdefault(row["client"], []).append(row["bytes_down"])
    packed = sum(t.nbytes for t in state.shared.packed.values())
    later = {n for sizes in down.values() for n in sizes[1:]}
    assert len(down) > 2 and len(later) == 1  # values alone
    assert all(packed < sizes[0] - later.copy().pop() < packed + 100 for sizes in down.values())
    assert [int(v) for v in state.shared.held] == [int(i in down) for i in range(5)]
    assert memories.keys() == down.keys()
    for memory in memories.values():
        assert memory.keys() == {"version", "mask/fc1.weight"}
        assert torch.equal(memory["mask/fc1.weight"], state.shared.mask["fc1.weight"])


def test_evaluation_reaches_clients_that_never_trained() -> None:
    _, memories, reports = run_versions(rounds=1)
    assert len(memories) == 2
    rows = reports[0]["rows"]
    assert all(row["personal"] is not None and row["personal"] == row["global"] for row in rows) and len(rows) == 5
    assert sum(row["local"] is not None for row in rows) == 2


def test_a_client_that_lost_the_mask_says_so() -> None:
    task, client = small_task(), small_clients(1)[0]
    strategy, half = halves("fixed_mask")
    state = strategy.init(task, [client.device])
    values = strategy.broadcast(type(state)(state.params, shared=state.shared.held_by([0])), client.device)
    assert not [name for name in values.tensors if name.startswith("mask/")]
    with pytest.raises(UserError, match="builds on version 1 of the mask, this client holds none"):
        half.train(task, client, values, {}, torch_rng(0))


def test_a_failed_client_gets_the_mask_again() -> None:
    task, clients = small_task(), small_clients(2)
    app = client_app(task, clients.__getitem__)
    strategy, _ = halves("fixed_mask")
    fails = [True]
    train = type(load_method("fixed_mask").client()).train

    def failing(self: Any, task: Task, client: Any, *rest: Any) -> Any:
        if client.id == 1 and fails and fails.pop():
            raise RuntimeError("no power")
        return train(self, task, client, *rest)

    with pytest.MonkeyPatch.context() as patch, LocalGrid(app, 2, own_replies=False) as grid:
        patch.setattr(load_method("fixed_mask").client, "train", failing)
        plan = Plan(on_client_error="skip")
        reports = list(strategy.rounds(grid, 2, task=task, devices=[c.device for c in clients], plan=plan))
    first, second = ({row["client"]: row["bytes_down"] for row in r["rows"]} for r in reports)
    assert reports[0]["failures"] == 1
    assert second[0] < first[0] == first[1] == second[1]
    assert strategy.state.shared.held.tolist() == [1, 1]


# --- densities and bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["uniform", "er", "erk"])
@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_the_density_is_what_was_asked_for(family: str, criterion: str) -> None:
    task = norm_task()
    for kind in ("nominal", "true"):
        hyper = {"density": 0.2, "density_kind": kind, "layer_densities": family, "criterion": criterion}
        _, _, reports = run_method("fixed_mask", task, rounds=1, **hyper)
        row = next(row for row in reports[0]["rows"] if row["bytes_up"] is not None)
        scalars = sum(t.numel() for n, t in task.init_params().items() if n in task.trainable)
        assert math.isclose(row[f"density_{kind}"], 0.2, abs_tol=1 / 32768 if kind == "nominal" else 1 / scalars)
        assert row[f"density_{kind}"] <= 0.2


def test_the_first_convolution_the_classifier_biases_and_norms_stay_dense() -> None:
    strategy, _ = halves("fixed_mask", density=0.01)
    state = strategy.init(norm_task(), [Device(0)])
    assert set(state.shared.mask) == {"fc1.weight"}
    assert len(state.params["fc1.weight"]) == 327
    assert state.tensors().keys() == state.params.keys() | {"mask/fc1.weight"}


def test_magnitude_keeps_the_largest_weights_of_each_layer() -> None:
    task = norm_task()
    strategy, _ = halves("fixed_mask", criterion="magnitude", density=0.05)
    kept = strategy.init(task, [Device(0)]).params["fc1.weight"].abs()
    every = task.init_params()["fc1.weight"].abs().flatten().sort(descending=True).values
    assert torch.equal(kept.sort(descending=True).values, every[: len(kept)])


def resnet18() -> Task:
    torch.manual_seed(0)
    return Task(build_model("resnet18", (3, 32, 32), 10), (3, 32, 32), 10, 0)


def test_bytes_of_resnet18_at_one_percent() -> None:
    task = resnet18()
    strategy, _ = halves("fixed_mask", density=0.01)
    state = strategy.init(task, [Device(0)])
    dense = Packet("train", task.init_params()).nbytes
    first = strategy.broadcast(state, Device(0)).nbytes
    later = strategy.broadcast(type(state)(state.params, shared=state.shared.held_by([0])), Device(0)).nbytes
    assert later / dense < 0.013
    assert first / dense < 0.02
    assert sum(len(k) for k in state.shared.mask.values()) == 111_575  # 1 % of 11,157,504


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"density": -0.5}, r"density must be in \(0, 1\], or 0 for what the budgets allow, got -0.5"),
        ({"density": 1.5}, r"density must be in \(0, 1\], or 0 for what the budgets allow, got 1.5"),
        ({"criterion": "luck"}, "unknown criterion 'luck'"),
        ({"layer_densities": "erg"}, "unknown layer_densities 'erg'; did you mean 'er'"),
        ({"density_kind": "real"}, "unknown density_kind 'real'"),
    ],
)
def test_bad_hyper_parameters_are_refused(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(load_method("fixed_mask"), hyper)


def test_words_that_toml_reads_as_true_or_false_are_words() -> None:
    strategy = build(load_method("fixed_mask"), {"density_kind": True})
    assert isinstance(strategy, FixedMask)
    assert strategy.density_kind == "true"
    with pytest.raises(UserError, match="unknown criterion 'false'"):
        build(load_method("fixed_mask"), {"criterion": False})


def test_a_density_below_the_exempt_layers_names_the_smallest() -> None:
    task = norm_task()
    with pytest.raises(UserError, match=r"true density 0.01 is below the smallest possible one, 0.024908 ") as caught:
        kept_counts(task, 0.01, "true", "erk")
    smallest = float(str(caught.value).split("possible one, ")[1].split(" ")[0])
    assert kept_counts(task, smallest, "true", "erk") == {"fc1.weight": 1}


def test_a_model_without_a_hidden_layer_cannot_be_pruned() -> None:
    task = small_task("logistic")
    with pytest.raises(UserError, match="the model has nothing to prune"):
        kept_counts(task, 0.5, "nominal", "erk")
    assert kept_counts(task, 1.0, "nominal", "erk") == {}


def test_recurrent_layers_and_embeddings_stay_dense() -> None:
    task = Task(build_model("charlstm", (12,), 30, width=0.1, vocabulary=30), (12,), 30, 0, vocabulary=30)
    assert not prunable(task).weights
