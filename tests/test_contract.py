"""The contract that every discovered method keeps, and reductions to known cases, bit by bit."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsparse.client import FederatedClient, client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import UserError
from fedsparse.method import build, hyper_parameters, load_method, method_names
from fedsparse.packet import Packet, decode, encode, same
from fedsparse.runner import digest
from fedsparse.seeding import torch_rng
from fedsparse.strategy import FederatedStrategy, Plan, Reply
from fedsparse.task import Budget, Device, Task
from tests.helpers import dropout_task, norm_task, small_clients, small_split, small_task

METHODS = method_names()
TASKS = {"mlp": small_task, "batch norm": norm_task}
SPARSE: dict[str, dict[str, Any]] = {  # keep to a density of 0.6, with these hyper-parameters
    "pfedgate": {},
    "fixed_mask": {},
    "fedtiny": {},
    "feddst": {},
    "snip": {},
    "synflow": {},
    "ssfl": {},
    "prunefl": {"initial": "magnitude"},  # by default one client trains the dense model first
}
QUICK: dict[str, dict[str, Any]] = {"prunefl": {"initial_steps": 20, "initial_every": 5}}
DENSE_BEFORE = ("ssfl",)  # but not in the exchanges before round 1


def halves(name: str, **hyper: Any) -> tuple[FederatedStrategy, FederatedClient]:
    method = load_method(name)
    strategy = build(method, {**QUICK.get(name, {}), **hyper})
    strategy.server_data = small_split(12, "server")  # for the methods that need some
    return strategy, method.client(**strategy.client_config)


def first_exchange(name: str, task: Task, budget: float | None = None) -> tuple[Packet, Packet, dict[str, Tensor], Any]:
    """A client's first download, reply and memory."""
    client = small_clients(3, budget)[2]
    strategy, half = halves(name, batch_size=8)
    packet = strategy.broadcast(strategy.init(task, [client.device]), client.device)
    reply, memory = half.train(task, client, packet, {}, torch_rng(0, 1, client.id, "train"))
    return packet, reply, memory, (half, client)


def run_method(
    name: str, task: Task, *, workers: int = 1, budget: float | None = None, rounds: int = 3, **hyper: Any
) -> tuple[FederatedStrategy, dict[int, dict[str, Tensor]], list[dict[str, Any]]]:
    clients = small_clients(5, budget)
    strategy, _ = halves(name, batch_size=8, **hyper)
    with LocalGrid(client_app(task, clients.__getitem__), 5, workers=workers, own_replies=False) as grid:
        devices = [c.device for c in clients]
        plan = Plan(seed=7, fraction=0.8, on_over_budget="record")
        reports = list(strategy.rounds(grid, rounds, task=task, devices=devices, plan=plan))
        memories = {i: dict(decode(s).tensors) for i, s in grid.states().items() if len(s)}
    return strategy, memories, reports


def test_all_methods_of_this_version_are_discovered() -> None:
    dense = {"local", "fedavg", "fedavg_ft", "fedprox"}
    sparse = {"pfedgate", "fixed_mask", "fedtiny", "snip", "synflow", "ssfl", "feddst", "prunefl"}
    assert dense | sparse <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_hyper_parameters_are_flat_and_survive(name: str) -> None:
    method = load_method(name)
    known = hyper_parameters(method)
    assert all(isinstance(v, bool | int | float | str) for v in known.values())
    strategy, half = halves(name, **known)
    assert asdict(half).items() <= known.items()
    again = method.strategy(**{f.name: getattr(strategy, f.name) for f in fields(strategy)})
    assert again == strategy


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", METHODS)
def test_packets_survive_encoding_and_are_not_written_to(name: str, task: str) -> None:
    client = small_clients(3)[2]
    strategy, half = halves(name, batch_size=8)
    the_task = TASKS[task]()
    packet = strategy.broadcast(strategy.init(the_task, [client.device]), client.device)
    before = decode(encode(packet))
    assert same(before, packet)
    reply, memory = half.train(the_task, client, packet, {}, torch_rng(0, "x"))
    half.evaluate(the_task, client, Packet("evaluate", packet.tensors, packet.scalars), memory)
    assert same(packet, before)
    assert same(decode(encode(reply)), reply)
    assert float(reply.scalars["weight"]) == len(client.train)


@pytest.mark.parametrize("name", METHODS)
def test_the_task_is_left_as_it_was(name: str) -> None:
    task = norm_task()
    before = task.init_params()
    first_exchange(name, task)
    after = task.init_params()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", METHODS)
def test_same_path_of_randomness_same_reply(name: str) -> None:
    _, first, memory, _ = first_exchange(name, small_task())
    _, second, again, _ = first_exchange(name, small_task())
    assert same(first, second)
    assert all(torch.equal(memory[k], again[k]) for k in memory)


@pytest.mark.parametrize("name", METHODS)
def test_memory_is_a_flat_dict_of_tensors_and_is_not_written_to(name: str) -> None:
    task = norm_task()
    packet, _, memory, (half, client) = first_exchange(name, task)
    assert all(isinstance(k, str) and isinstance(v, Tensor) and not v.requires_grad for k, v in memory.items())
    kept = {k: v.clone() for k, v in memory.items()}
    half.train(task, client, packet, memory, torch_rng(1, "x"))
    half.evaluate(task, client, Packet("evaluate", packet.tensors), memory)
    assert all(torch.equal(kept[k], memory[k]) for k in kept)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", METHODS)
def test_one_digest_for_two_runs_and_any_number_of_workers(name: str, task: str) -> None:
    digests = set()
    for workers in (1, 1, 4):
        strategy, memories, _ = run_method(name, TASKS[task](), workers=workers, budget=0.7)
        digests.add(digest(strategy.state, memories))
    assert len(digests) == 1
    assert digest(*start_of(name, TASKS[task]())) not in digests  # something was learnt


@pytest.mark.parametrize("name", METHODS)
def test_dropout_is_the_same_on_any_number_of_workers(name: str) -> None:
    """Dropout knows torch's global generator only."""
    task = dropout_task()
    before = torch.get_rng_state()
    digests = {digest(s.state, m) for s, m, _ in (run_method(name, task, workers=w) for w in (1, 3))}
    assert len(digests) == 1
    assert torch.equal(torch.get_rng_state(), before)
    dry, memories, _ = run_method(name, norm_task(), workers=1)
    assert digest(dry.state, memories) not in digests


def start_of(name: str, task: Task) -> tuple[Any, dict[int, dict[str, Tensor]]]:
    strategy, _ = halves(name)
    return strategy.init(task, [Device(0, Budget(density=0.7))]), {}


@pytest.mark.parametrize("name", METHODS)
def test_true_density_is_reported_and_sparse_methods_keep_to_their_budget(name: str) -> None:
    _, _, reports = run_method(name, small_task(), budget=0.6, **SPARSE.get(name, {}))
    rows = [row for report in reports for row in report["rows"] if row["bytes_up"] is not None]
    assert rows
    for row in rows:
        dense = name not in SPARSE or (name in DENSE_BEFORE and not row["round"])
        assert row["density_true"] == 1.0 if dense else 0 < row["density_true"] <= 0.6
        assert row["over_budget"] == int(dense)


@pytest.mark.parametrize("name", METHODS)
def test_an_exceeded_budget_stops_the_run_by_default(name: str) -> None:
    clients, task = small_clients(2, 0.6), small_task()
    strategy, _ = halves(name, **SPARSE.get(name, {}))
    with LocalGrid(client_app(task, clients.__getitem__), 2, own_replies=False) as grid:
        rounds = strategy.rounds(grid, 1, task=task, devices=[c.device for c in clients])
        if name in SPARSE and name not in DENSE_BEFORE:
            assert len(list(rounds)) >= 1
        else:
            first = 0 if name in DENSE_BEFORE else 1
            with pytest.raises(UserError, match=f"client 0, round {first}: density 1 exceeds its budget 0.6"):
                next(rounds)


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_those_of_the_encoded_messages(name: str) -> None:
    _, _, reports = run_method(name, small_task(), rounds=1)
    packet, reply, _, _ = first_exchange(name, small_task())
    row = next(r for r in reports[0]["rows"] if r["bytes_up"] is not None)
    floats = sum(t.nbytes for t in reply.tensors.values())
    assert floats < row["bytes_up"] < floats + 2500
    assert packet.nbytes < row["bytes_down"] < packet.nbytes + 1000


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("hyper", [{}, {"momentum": 0.9, "weight_decay": 0.01, "clip": 0.5}], ids=["plain", "all"])
def test_fedprox_without_its_term_is_fedavg(task: str, hyper: dict[str, float]) -> None:
    avg, _, _ = run_method("fedavg", TASKS[task](), **hyper)
    prox, _, _ = run_method("fedprox", TASKS[task](), mu=0.0, **hyper)
    other, _, _ = run_method("fedprox", TASKS[task](), mu=0.5, **hyper)
    assert digest(avg.state, {}) == digest(prox.state, {}) != digest(other.state, {})


def test_fine_tuning_leaves_the_global_model_alone() -> None:
    avg, _, first = run_method("fedavg", small_task())
    tuned, _, second = run_method("fedavg_ft", small_task())
    assert digest(avg.state, {}) == digest(tuned.state, {})
    assert first[-1]["accuracy"]["global"] == second[-1]["accuracy"]["global"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("hyper", [{}, {"momentum": 0.9, "weight_decay": 0.01, "clip": 0.5}], ids=["plain", "all"])
def test_pfedgate_with_open_gates_is_fedavg(task: str, hyper: dict[str, float]) -> None:
    plain = {"momentum": 0.0, "weight_decay": 0.0, "clip": 0.0, "lr": 0.05, "epochs": 1} | hyper
    avg, _, _ = run_method("fedavg", TASKS[task](), **plain)
    gated, _, _ = run_method("pfedgate", TASKS[task](), open_gate=True, **plain)
    assert digest(avg.state, {}) == digest(gated.state, {})


@pytest.mark.parametrize("damage", ["kind", "missing", "extra", "short", "dtype", "bitmap"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "local"])
def test_a_reply_of_the_wrong_form_is_refused(name: str, damage: str) -> None:
    task = small_task()
    _, reply, _, (_, client) = first_exchange(name, task)
    strategy, _ = halves(name, batch_size=8)
    state = strategy.init(task, [client.device])
    assert strategy.complaint(task, state, Reply(Device(0), reply)) == ""
    tensors, first = dict(reply.tensors), next(iter(reply.tensors))
    if damage == "missing":
        del tensors[first]
    elif damage == "extra":
        tensors["x"] = torch.ones(1)
    elif damage == "short":
        tensors[first] = tensors[first].flatten()[:-1]
    elif damage == "dtype":
        tensors[first] = tensors[first].double()
    elif damage == "bitmap":
        tensors[list(tensors)[-1]] = torch.ones(99, dtype=torch.uint8)
    assert strategy.complaint(
        task, state, Reply(Device(0), Packet("odd" if damage == "kind" else reply.kind, tensors, reply.scalars))
    )


def test_fine_tuning_does_not_touch_the_accuracy_before_aggregation() -> None:
    _, _, avg = run_method("fedavg", small_task(), rounds=1)
    _, _, tuned = run_method("fedavg_ft", small_task(), rounds=1, ft_epochs=9)
    assert avg[0]["accuracy"]["local"] == tuned[0]["accuracy"]["local"]
