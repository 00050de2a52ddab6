"""FedTiny for devices of different budgets: one model at the smallest, or parts of one at the largest ("nested")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedsparse.client import client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import UserError
from fedsparse.globalmask import prunable
from fedsparse.nested import chosen, level_of
from fedsparse.packet import decode
from fedsparse.regrow import named_counts
from fedsparse.runner import digest
from fedsparse.sparse.masks import whole
from fedsparse.sparse.positions import unpack_positions
from fedsparse.strategy import FederatedStrategy, Plan, Reply
from fedsparse.task import Budget, Client, Device, Task
from tests.helpers import CLASSES, chain_task, exchanged_by_hand, norm_task, small_clients, started
from tests.test_contract import halves
from tests.test_fine_tuning import MASKED

BUDGETS = (0.6, 0.3, 0.12, 0.6, 0.3)
STATISTICS = tuple(f"bn{i}.running_{what}" for i in (1, 2) for what in ("mean", "var"))
NESTED: dict[str, Any] = {
    "density": 0,
    "nested": True,
    "pool": 1,
    "delta_r": 2,
    "r_stop": 8,
    "batch_size": 8,
    "granularity": "entire",
}


def deep_task() -> Task:
    """Four layers that may be pruned, batch and group norm, and a layer so small that it may stay whole."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return chain_task(
            {
                "conv1": nn.Conv2d(1, 8, 3, padding=1),
                "bn1": nn.BatchNorm2d(8),
                "relu1": nn.ReLU(),
                "conv2": nn.Conv2d(8, 8, 1),
                "bn2": nn.BatchNorm2d(8),
                "relu2": nn.ReLU(),
                "conv3": nn.Conv2d(8, 16, 3, padding=1),
                "gn": nn.GroupNorm(2, 16),
                "relu3": nn.ReLU(),
                "pool": nn.MaxPool2d(2),
                "flatten": nn.Flatten(),
                "fc1": nn.Linear(256, 64),
                "relu4": nn.ReLU(),
                "fc2": nn.Linear(64, 64),
                "output": nn.Linear(64, CLASSES),
            }
        )


def clients_of(budgets: Sequence[float | None]) -> tuple[Client, ...]:
    return tuple(
        replace(client, device=Device(i, Budget(density=b)))
        for i, (client, b) in enumerate(zip(small_clients(len(budgets)), budgets, strict=True))
    )


def run_with(
    name: str,
    budgets: Sequence[float | None],
    *,
    workers: int = 1,
    fraction: float = 1.0,
    rounds: int = 9,
    **hyper: Any,
) -> tuple[FederatedStrategy, dict[int, dict[str, Tensor]], list[dict[str, Any]]]:
    """A run that stops at the first budget that is exceeded."""
    task, clients = deep_task(), clients_of(budgets)
    strategy, _ = halves(name, **{"batch_size": 8, **hyper})
    with LocalGrid(client_app(task, clients.__getitem__), len(clients), workers=workers, own_replies=False) as grid:
        devices, plan = [c.device for c in clients], Plan(seed=7, fraction=fraction)
        reports = list(strategy.rounds(grid, rounds, task=task, devices=devices, plan=plan))
        return strategy, {i: dict(decode(s).tensors) for i, s in grid.states().items() if len(s)}, reports


# --- one model at the smallest budget --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKED)
def test_density_zero_is_the_smallest_budget(name: str) -> None:
    task, devices = norm_task(), [c.device for c in clients_of((0.6, None, 0.3))]
    quick = {"initial": "magnitude"} if name == "prunefl" else {}
    smallest: Any = halves(name, density=0, **quick)[0].init(task, devices)
    by_hand: Any = halves(name, density=0.3, density_kind="true", **quick)[0].init(task, devices)
    assert digest(smallest, {}) == digest(by_hand, {})
    with pytest.raises(UserError, match="density = 0 takes the devices' density budgets, and no device has one"):
        halves(name, density=0)[0].init(task, [Device(0)])
    with pytest.raises(UserError, match=r"density must be in \(0, 1\], or 0 for what the budgets allow, got -0.1"):
        halves(name, density=-0.1)


def test_it_keeps_to_all_budgets() -> None:
    _, _, reports = run_with("fedtiny", BUDGETS, density=0, rounds=2)
    rows = [row for report in reports for row in report["rows"] if row["bytes_up"] is not None and row["round"]]
    assert {row["over_budget"] for row in rows} == {0}
    assert all(0.115 < row["density_true"] <= 0.12 for row in rows)


# --- parts -----------------------------------------------------------------------------------------------------------


def nested(
    budgets: Sequence[float | None] = BUDGETS, rounds: int = 9, **hyper: Any
) -> tuple[Any, Any, Any, Any, tuple[Client, ...]]:
    task, clients = deep_task(), clients_of(budgets)
    strategy, half = halves("fedtiny", **{**NESTED, **hyper})
    return strategy, half, task, started(strategy, task, clients, rounds=rounds), clients


def kept_of(task: Task, shared: Any) -> dict[str, Tensor]:
    return {name: shared.mask.get(name, torch.arange(size)) for name, size in prunable(task).sizes.items()}


def has_the_largest(task: Task, state: Any) -> None:
    """Each part lies in the one before, fills its budget in one proportion, and has each layer's largest weights."""
    model, dense = prunable(task), whole(state.params, state.shared.mask, task.shapes)
    outer = whole_counts = {n: len(at) for n, at in kept_of(task, state.shared).items()}
    inside = kept_of(task, state.shared)
    for level in state.levels:
        kept = kept_of(task, level.shared)
        assert model.dense + sum(map(len, kept.values())) == int(level.density * model.total)
        share = sum(map(len, kept.values())) / sum(whole_counts.values())
        for name, at in kept.items():
            assert abs(len(at) - share * whole_counts[name]) <= 1 and len(at) <= outer[name]
            assert set(at.tolist()) <= set(inside[name].tolist())
            sizes = dense[name].flatten().abs()
            assert sizes[at.long()].min() >= sizes[inside[name].long()].sort(descending=True).values[: len(at)].min()
        outer, inside = {n: len(at) for n, at in kept.items()}, kept


@pytest.mark.parametrize("family", ["uniform", "erk"])
def test_parts_are_nested_fill_their_budgets_and_have_the_largest_weights(family: str) -> None:
    strategy, half, task, state, clients = nested(layer_densities=family)
    memories: dict[int, Any] = {}
    assert [level.density for level in state.levels] == [0.3, 0.12]
    has_the_largest(task, state)
    for _ in range(5):  # of nine rounds each ends with a new choice
        before = state
        _, state = exchanged_by_hand(strategy, half, task, state, clients, memories)
        has_the_largest(task, state)
        assert any(a.shared.version != b.shared.version for a, b in zip(before.levels, state.levels, strict=True))


def test_parts_stay_between_choices_and_travel_without_a_mask() -> None:
    strategy, half, task, state, clients = nested(progressive=False, nest_every=3)
    memories: dict[int, Any] = {}
    for turn in range(1, 8):
        before, chosen_now = state, turn % 3 == 0
        for client in clients[:3]:
            packet = strategy.broadcast(state, client.device)
            masked = any(name.startswith("mask/") for name in packet.tensors)
            assert masked == (turn == 1 or ((turn - 1) % 3 == 0 and client is not clients[0]))
        _, state = exchanged_by_hand(strategy, half, task, state, clients, memories)
        for old, new in zip(before.levels, state.levels, strict=True):
            same = all(torch.equal(old.shared.mask[n], at) for n, at in new.shared.mask.items())
            assert same == (not chosen_now) == (old.shared.version == new.shared.version)
            dense, part = (whole(s.params, s.shared.mask, task.shapes) for s in (state, new))
            for name in set(task.shapes) - set(STATISTICS):  # the model's values, whenever they were chosen
                held = new.shared.mask.get(name, torch.arange(dense[name].numel())).long()
                assert torch.equal(part[name].flatten()[held], dense[name].flatten()[held])
    assert state.shared.version == 1


def test_a_choice_that_changes_nothing_keeps_the_version() -> None:
    _, _, task, state, _ = nested()
    again = chosen(task, state.params, state.shared.mask, state.levels)
    assert [v.shared.version for v in again] == [v.shared.version for v in state.levels] == [1, 1]


def test_local_norms_of_parts_travel_once() -> None:
    strategy, half, task, state, clients = nested(local_norms=True)
    memories: dict[int, Any] = {}
    for turn in range(3):
        for client in clients:
            assert ("bn1.weight" in strategy.broadcast(state, client.device).tensors) == (turn == 0)
        _, state = exchanged_by_hand(strategy, half, task, state, clients, memories)


def test_averages_against_dense_masks() -> None:
    """Each coordinate over its holders, statistics over a level, the rest over all; nobody's coordinate stays."""
    strategy, half, task, state, clients = nested(progressive=False, nest_every=100)
    some = clients[1:3] + clients[4:]  # nobody holds the whole model in this round
    for taking_part in (clients, some):
        replies, after = exchanged_by_hand(strategy, half, task, state, taking_part, {})
        sums = {n: torch.zeros(s, dtype=torch.float64) for n, s in task.shapes.items()}
        weights = {n: torch.zeros(s, dtype=torch.float64) for n, s in task.shapes.items()}
        for r in replies:
            shared = (level_of(state.levels, r.device) or state).shared
            dense = whole({n: r.packet.tensors[n] for n in task.shapes}, shared.mask, task.shapes)
            for name, value in dense.items():
                held = torch.ones(value.numel())
                if name in shared.mask:
                    held = torch.zeros(value.numel()).index_fill(0, shared.mask[name].long(), 1.0)
                sums[name] += r.weight * value.double()
                weights[name] += r.weight * held.view(value.shape).double()
        old = whole(state.params, state.shared.mask, task.shapes)
        new = whole(after.params, after.shared.mask, task.shapes)
        for name in task.shapes:
            if name not in STATISTICS:
                mean = torch.where(weights[name] > 0, sums[name] / weights[name].clamp_min(1e-9), old[name].double())
                torch.testing.assert_close(new[name], mean.float(), rtol=1e-6, atol=1e-7)
        assert any(bool((w == 0).any()) for n, w in weights.items() if n in state.shared.mask)
        for place in (None, *range(len(state.levels))):
            wanted = None if place is None else state.levels[place]
            group = [r for r in replies if level_of(state.levels, r.device) is wanted]
            before, now = (s if place is None else s.levels[place] for s in (state, after))
            for name in STATISTICS:
                mean = sum(r.weight * r.packet.tensors[name].double() for r in group) if group else None
                want = before.params[name] if mean is None else (mean / sum(r.weight for r in group)).float()
                assert torch.equal(now.params[name], want)


def test_gradients_are_searched_outside_of_the_whole_model_and_the_largest_mean_grows() -> None:
    strategy, half, task, state, clients = nested()
    memories: dict[int, Any] = {}
    _, state = exchanged_by_hand(strategy, half, task, state, clients, memories)
    assert bool(state.grow.any())  # the second round is one of adjustment
    replies, after = exchanged_by_hand(strategy, half, task, state, clients, memories)
    sizes, found = prunable(task).sizes, 0
    means = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
    for r in replies:
        level = level_of(state.levels, r.device)
        row = state.grow if level is None else level.asked["grow"]
        for name, a in named_counts(row, prunable(task).weights).items():
            assert a < len((level or state).shared.mask[name])
            at = unpack_positions(r.packet.tensors[f"at/{name}"], sizes[name], a)
            assert not bool(torch.isin(at, state.shared.mask[name]).any())
            means[name][at.long()] += r.weight * r.packet.tensors[f"top/{name}"].double()
            found += level is not None
    assert found
    assert after.adjustments == 1 and after.shared.version == state.shared.version + 1
    for name, a in named_counts(state.grow, prunable(task).weights).items():
        old, new = (set(s.shared.mask[name].tolist()) for s in (state, after))
        assert new - old == set(torch.topk(means[name].abs(), a).indices.tolist())
    assert strategy.complaint(task, state, Reply(clients[0].device, replies[1].packet))  # not of that level's form
    assert strategy.complaint(task, state, Reply(clients[4].device, replies[1].packet)) == ""


def test_what_is_asked_goes_along_in_training_alone() -> None:
    strategy, half, task, state, clients = nested()
    _, state = exchanged_by_hand(strategy, half, task, state, clients, {})
    for client in clients:
        asked = set(strategy.broadcast(state, client.device).tensors)
        deployed = set(strategy.deployed(state, client.device).tensors)
        assert "grow" in asked - deployed and deployed < asked


@pytest.mark.parametrize("hyper", [{}, {"local_norms": True}, {"pool": 4}], ids=["plain", "local norms", "selection"])
def test_budgets_are_kept_and_the_digest_is_one(hyper: dict[str, Any]) -> None:
    digests = set()
    for workers in (1, 3):
        how = {**NESTED, "density": 0.4, **hyper}
        strategy, memories, reports = run_with("fedtiny", BUDGETS, workers=workers, fraction=0.8, **how)
        digests.add(digest(strategy.state, memories))
    assert len(digests) == 1
    rows = [row for report in reports for row in report["rows"] if row["bytes_up"] is not None and row["round"]]
    for row in rows:
        assert row["density_true"] <= BUDGETS[row["client"]]
        assert row["personal"].n == 8 and row["global"] is None  # most devices cannot hold the global model
    up = {c: max(row["bytes_up"] for row in rows if row["client"] == c) for c in (0, 2)}
    assert up[2] < 0.8 * up[0]
    selecting = {row["client"] for report in reports for row in report["rows"] if not report["round"]}
    assert selecting <= {0, 3}


def test_without_smaller_budgets_it_is_fedtiny() -> None:
    how = {**NESTED, "density": 0.4, "fraction": 0.8}
    plain, memories, _ = run_with("fedtiny", (0.9, 0.6, None), **{**how, "nested": False})
    parts, same, _ = run_with("fedtiny", (0.9, 0.6, None), **how)
    assert digest(plain.state, memories) == digest(parts.state, same)


def test_parts_are_those_of_arrays_that_are_given() -> None:
    task, clients = deep_task(), clients_of(BUDGETS)
    strategy, _ = halves("fedtiny", **NESTED)
    devices = [c.device for c in clients]
    params: Any = strategy.init(task, devices).params
    given = ArrayRecord([torch.cat([torch.rand(t.numel()) for t in params.values()]).numpy()])
    state: Any = strategy.first_state(task, devices, Plan(), 9, given)
    has_the_largest(task, state)
    assert all(torch.equal(level.params["bn1.weight"], state.params["bn1.weight"]) for level in state.levels)


def test_what_cannot_be_is_refused() -> None:
    task = deep_task()

    def start(budgets: Sequence[float | None], plan: Plan = Plan(), **hyper: Any) -> Any:  # noqa: B008 - it is frozen
        strategy, _ = halves("fedtiny", **{**NESTED, **hyper})
        return strategy.first_state(task, [c.device for c in clients_of(budgets)], plan, 9)

    with pytest.raises(UserError, match=r"true density 0.01 is below the smallest possible one"):
        start((0.6, 0.01))
    with pytest.raises(UserError, match="nested = true needs density budgets: set budget.tiers"):
        start((None, None), density=0.5)
    with pytest.raises(UserError, match="the whole model of nominal density 0.8, their largest budget is 0.3"):
        start((0.3, 0.2), density=0.8)
    with pytest.raises(UserError, match=r"may hold the whole model of true density 0.6, their largest budget is 0.3"):
        start((0.3, 0.6, 0.2), Plan(novel=(1,)))
    with pytest.raises(UserError, match="none of the clients that would select a candidate may hold the whole model"):
        start((0.3, 0.3, 0.3, 0.3, 0.6), Plan(fraction=0.2, seed=1), pool=4)
    with pytest.raises(UserError, match="nest_every must be at least 0, got -1"):
        halves("fedtiny", nest_every=-1)
    with pytest.raises(UserError, match="nest_every is 3, which means something with nested = true alone"):
        halves("fedtiny", nest_every=3)


def test_a_device_between_the_density_and_its_densest_candidate_trains_a_part() -> None:
    """A nominal density's candidates may be 2 % denser: what does not fit them is no device of the whole model."""
    strategy, _, _, state, clients = nested((0.95, 0.32, 0.2), pool=5, density=0.3)
    assert state.stage == "calibrate" and [level.density for level in state.levels] == [0.32, 0.2]
    assert strategy.invited(state, [c.device for c in clients]) == [clients[0].device]
