"""FedTiny for devices of different budgets: one model at the smallest, or parts of one at the largest ("nested")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsparse.client import client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import UserError
from fedsparse.globalmask import kept_counts, prunable
from fedsparse.nested import level_of
from fedsparse.packet import decode
from fedsparse.regrow import named_counts
from fedsparse.runner import digest
from fedsparse.sparse.masks import whole
from fedsparse.sparse.positions import unpack_positions
from fedsparse.strategy import FederatedStrategy, Plan, Reply
from fedsparse.task import Budget, Client, Device
from tests.helpers import exchanged_by_hand, norm_task, small_clients, started
from tests.test_contract import halves
from tests.test_fine_tuning import MASKED

BUDGETS = (0.6, 0.3, 0.12, 0.6, 0.3)
STATISTICS = ("bn1.running_mean", "bn1.running_var")
NESTED: dict[str, Any] = {"density": 0, "nested": True, "pool": 1, "delta_r": 2, "r_stop": 8, "batch_size": 8}


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
    task, clients = norm_task(), clients_of(budgets)
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


def nested(budgets: Sequence[float | None] = BUDGETS, **hyper: Any) -> tuple[Any, Any, Any, Any, tuple[Client, ...]]:
    task, clients = norm_task(), clients_of(budgets)
    strategy, half = halves("fedtiny", **{**NESTED, **hyper})
    return strategy, half, task, started(strategy, task, clients, rounds=9), clients


def test_parts_are_nested_and_fill_their_budgets() -> None:
    strategy, half, task, state, clients = nested()
    memories: dict[int, Any] = {}
    model = prunable(task)
    for _ in range(6):
        outer = {n: set(at.tolist()) for n, at in state.shared.mask.items()}
        assert [level.density for level in state.levels] == [0.3, 0.12]
        for level in state.levels:
            mask = level.shared.mask
            kept = sum(len(mask[name]) if name in mask else size for name, size in model.sizes.items())
            assert model.dense + kept == int(level.density * model.total)
            for name, at in mask.items():
                inner = set(at.tolist())
                assert inner < outer[name]
                outer[name] = inner
        _, state = exchanged_by_hand(strategy, half, task, state, clients, memories)


def test_a_part_has_the_largest_weights_of_each_layer() -> None:
    strategy, half, task, state, clients = nested()
    memories: dict[int, Any] = {}
    for _ in range(3):  # the mask changes in the second round, and the parts with it
        _, state = exchanged_by_hand(strategy, half, task, state, clients, memories)
    start = nested()[3]
    for level in start.levels:
        for name, at in level.shared.mask.items():
            sizes = whole(start.params, start.shared.mask, task.shapes)[name].abs().flatten()
            assert set(at.tolist()) == set(torch.topk(sizes, len(at)).indices.tolist())
    for level in state.levels:  # values are those of the model, whenever they were chosen
        dense, part = (whole(s.params, s.shared.mask, task.shapes) for s in (state, level))
        for name, at in level.shared.mask.items():
            assert torch.equal(part[name].flatten()[at.long()], dense[name].flatten()[at.long()])


def test_averages_against_dense_masks() -> None:
    """Each coordinate over its holders, statistics over a level, the rest over all; nobody's coordinate stays."""
    strategy, half, task, state, clients = nested((0.6, 0.3, 0.12, 0.6, 0.3), progressive=False, nest_every=100)
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
            group = [
                r
                for r in replies
                if level_of(state.levels, r.device) is (None if place is None else state.levels[place])
            ]
            before, now = (s if place is None else s.levels[place] for s in (state, after))
            for name in STATISTICS:
                mean = sum(r.weight * r.packet.tensors[name].double() for r in group) if group else None
                want = before.params[name] if mean is None else (mean / sum(r.weight for r in group)).float()
                assert torch.equal(now.params[name], want)


def test_gradients_are_searched_outside_of_the_whole_model() -> None:
    strategy, half, task, state, clients = nested()
    memories: dict[int, Any] = {}
    _, state = exchanged_by_hand(strategy, half, task, state, clients, memories)
    assert bool(state.grow.any())  # the second round is one of adjustment
    replies, after = exchanged_by_hand(strategy, half, task, state, clients, memories)
    sizes, found = prunable(task).sizes, 0
    for r in replies:
        level = level_of(state.levels, r.device)
        row = state.grow if level is None else level.asked["grow"]
        for name, a in named_counts(row, prunable(task).weights).items():
            assert a < len((level or state).shared.mask[name])
            at = unpack_positions(r.packet.tensors[f"at/{name}"], sizes[name], a)
            assert not bool(torch.isin(at, state.shared.mask[name]).any())
            found += level is not None
    assert found
    assert after.adjustments == 1 and after.shared.version == state.shared.version + 1
    assert strategy.complaint(task, state, Reply(clients[0].device, replies[1].packet))  # not of that level's form
    assert strategy.complaint(task, state, Reply(clients[4].device, replies[1].packet)) == ""


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
        assert row["personal"] is not None and row["personal"].n == 8
    up = {c: max(row["bytes_up"] for row in rows if row["client"] == c) for c in (0, 2)}
    assert up[2] < 0.6 * up[0]
    selecting = {row["client"] for report in reports for row in report["rows"] if not report["round"]}
    assert selecting <= {0, 3}


def test_without_smaller_budgets_it_is_fedtiny() -> None:
    how = {**NESTED, "density": 0.4, "fraction": 0.8}
    plain, memories, _ = run_with("fedtiny", (0.9, 0.6, None), **{**how, "nested": False})
    parts, same, _ = run_with("fedtiny", (0.9, 0.6, None), **how)
    assert digest(plain.state, memories) == digest(parts.state, same)


def test_what_cannot_be_is_refused() -> None:
    smallest = prunable(norm_task())
    assert smallest.dense / smallest.total > 0.01
    with pytest.raises(UserError, match=r"true density 0.01 is below the smallest possible one"):
        nested((0.6, 0.01))
    strategy, _, task, state, clients = nested((0.3, 0.6), pool=4, density=0.5)
    assert state.stage == "calibrate" and strategy.invited(state, [c.device for c in clients]) == [clients[1].device]
    with pytest.raises(UserError, match="none of the 1 clients that would select a candidate has the density budget"):
        strategy.invited(state, [clients[0].device])
    with pytest.raises(UserError, match="nest_every must be at least 0, got -1"):
        halves("fedtiny", nest_every=-1)
    assert kept_counts(task, 0.5, "nominal", "uniform")
