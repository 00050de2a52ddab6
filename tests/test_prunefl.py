"""PruneFL: its decision against loops and all subsets, reductions, sizes, the initial pruning, costs, bad input."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.prunefl import PruneFLClient
from fedsparse.client import client_app
from fedsparse.cost import train_flops
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import UserError
from fedsparse.globalmask import prunable, receive
from fedsparse.masked import SquaredGradients
from fedsparse.method import build, load_method
from fedsparse.packet import Packet, decode
from fedsparse.runner import digest
from fedsparse.seeding import torch_rng
from fedsparse.sgd import sgd
from fedsparse.sparse.importance import largest_of_all, most_per_time, most_squared, prunable_share, untouchable
from fedsparse.sparse.masks import whole
from fedsparse.sparse.positions import pack_positions
from fedsparse.sparse.representation import ALWAYS, NEVER
from fedsparse.strategy import Plan, Reply
from fedsparse.task import Budget, Device, Task
from strategies.prunefl import PruneFL, PruneFLState
from tests.helpers import CLASSES, exchanged_by_hand, norm_task, small_clients, small_task, started
from tests.test_contract import TASKS, halves, run_method

SHORT = {"initial_steps": 24, "initial_every": 4, "above_chance": 0.0, "max_dec": 0.6}
LAYER = "fc1.weight"


def prune(**hyper: Any) -> tuple[PruneFL, PruneFLClient]:
    strategy, half = halves("prunefl", batch_size=8, **{"initial": "magnitude", **hyper})
    assert isinstance(strategy, PruneFL) and isinstance(half, PruneFLClient)
    return strategy, half


# --- the decision ----------------------------------------------------------------------------------------------------


def greedy(
    stay: dict[str, list[int]],
    squares: dict[str, list[float]],
    times: dict[str, float],
    c: float,
    rest: float,
    most: int,
) -> dict[str, set[int]]:
    """One weight after the other, as the paper words it."""
    chosen = {name: set(at) for name, at in stay.items()}
    left = [(i, j) for i, name in enumerate(squares) for j in range(len(squares[name])) if j not in chosen[name]]
    names = list(squares)
    while left and sum(map(len, chosen.values())) < most:
        gain = rest + sum(squares[name][j] for name in names for j in chosen[name])
        time = c + sum(times[name] for name in names for _ in chosen[name])
        i, j = max(left, key=lambda p: (squares[names[p[0]]][p[1]] / times[names[p[0]]], -p[0], -p[1]))
        if not squares[names[i]][j] / times[names[i]] > gain / time:
            break
        chosen[names[i]].add(j)
        left.remove((i, j))
    return chosen


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 12))
def test_the_choice_is_the_greedy_one_of_a_loop(seed: int, a: int, b: int, budget: int) -> None:
    rng = torch_rng(seed)
    sizes = {"a": a, "b": b}
    # eighths: sums are exact, whatever their order
    squares = {n: torch.randint(0, 9, (k,), generator=rng) / 8 for n, k in sizes.items()}
    stay = {n: torch.nonzero(torch.rand(k, generator=rng) < 0.3).view(-1).int() for n, k in sizes.items()}
    times = {"a": 0.5, "b": 2.0}
    got = most_per_time(stay, squares, times, fixed=1.0, rest=0.25, budget=budget)
    lists = {n: t.tolist() for n, t in stay.items()}
    want = greedy(lists, {n: t.tolist() for n, t in squares.items()}, times, 1.0, 0.25, budget)
    assert {n: set(t.tolist()) for n, t in got.items()} == want
    assert all(t.dtype == torch.int32 and t.tolist() == sorted(set(t.tolist())) for t in got.values())


def test_no_other_set_brings_more_for_its_time() -> None:
    for seed in range(20):
        rng = torch_rng(seed, "subsets")
        squares = {"a": torch.rand(4, generator=rng), "b": torch.rand(4, generator=rng)}
        times = {"a": 0.3, "b": 1.1}
        stay = {"a": torch.tensor([1], dtype=torch.int32), "b": torch.tensor([0], dtype=torch.int32)}
        got = most_per_time(stay, squares, times, fixed=0.5, rest=0.1, budget=8)

        def worth(chosen: list[tuple[str, int]], g: dict[str, Tensor] = squares, t: dict[str, float] = times) -> float:
            return (0.1 + sum(float(g[n][j]) for n, j in chosen)) / (0.5 + sum(t[n] for n, _ in chosen))

        fixed = [("a", 1), ("b", 0)]
        free = [p for p in itertools.product("ab", range(4)) if p not in fixed]
        every = (fixed + list(c) for k in range(7) for c in itertools.combinations(free, k))
        mine = [(n, j) for n, t in got.items() for j in t.tolist()]
        assert worth(mine) == pytest.approx(max(map(worth, every)), rel=1e-6)


def test_large_weights_stay_and_the_share_halves() -> None:
    values = {"a": torch.tensor([3.0, -1.0, 0.5, 0.5, -4.0]), "b": torch.tensor([1.0])}
    kept = {"a": torch.tensor([0, 2, 3, 7, 9], dtype=torch.int32), "b": torch.tensor([4], dtype=torch.int32)}
    stay = untouchable(values, kept, 0.5)  # floor(2.5) and floor(0.5) may go
    assert stay["a"].tolist() == [0, 2, 9] and stay["b"].tolist() == [4]
    assert untouchable(values, kept, 0.0)["a"].tolist() == kept["a"].tolist()
    assert prunable_share(0.3, 10_000, 0) == 0.3 and prunable_share(0.3, 10_000, 10_000) == pytest.approx(0.15)


def test_the_other_variant_keeps_each_layers_number() -> None:
    rng = torch_rng(1)
    squares = {"a": torch.rand(30, generator=rng), "b": torch.rand(6, generator=rng)}
    stay = {"a": torch.tensor([3, 5, 29], dtype=torch.int32), "b": torch.tensor([], dtype=torch.int32)}
    got = most_squared(stay, squares, {"a": 8, "b": 2})
    for name, count in (("a", 8), ("b", 2)):
        free = sorted((j for j in range(len(squares[name])) if j not in stay[name].tolist()),
                      key=lambda j: -float(squares[name][j]))  # fmt: skip
        assert set(got[name].tolist()) == set(stay[name].tolist()) | set(free[: count - len(stay[name])])
    full = torch.arange(6, dtype=torch.int32)
    assert most_squared({"b": full}, squares, {"b": 6})["b"].tolist() == full.tolist()


def test_the_cut_takes_the_largest_of_all_layers_and_empties_none() -> None:
    values = {"a": torch.tensor([9.0, 8.0, 7.0]), "b": torch.tensor([0.1, 0.2])}
    kept = {"a": torch.tensor([1, 4, 6], dtype=torch.int32), "b": torch.tensor([0, 5], dtype=torch.int32)}
    cut = largest_of_all(values, kept, 3)
    assert cut["a"].tolist() == [1, 4] and cut["b"].tolist() == [5]
    assert {n: t.tolist() for n, t in largest_of_all(values, kept, 9).items()} == {"a": [1, 4, 6], "b": [0, 5]}


@pytest.mark.parametrize("crossover", [ALWAYS, NEVER])
@pytest.mark.parametrize("masked", [True, False])
def test_squared_gradients_are_those_of_dense_autograd(crossover: float, masked: bool) -> None:
    task, client = norm_task(), small_clients(2)[1]
    task.crossover.update(dict.fromkeys(("conv1", "fc1", "output"), crossover))
    strategy, _ = prune(density=0.1 if masked else 1.0)
    state = started(strategy, task, (client,))
    sizes = prunable(task).sizes
    order = [torch.arange(0, 8), torch.arange(8, 16)]
    how: dict[str, Any] = {"lr": 0.0, "epochs": 1, "batch_size": 8, "rng": torch_rng(0), "mask": state.shared.mask}
    squares = SquaredGradients(sizes)
    sgd(task, state.params, client.train, order=order, squares=squares, **how)
    means, rest = squares.means()
    dense = whole(state.params, state.shared.mask, task.shapes)
    total, others = torch.zeros(sizes[LAYER]), 0.0
    for batch in order:
        own = {n: t.clone() for n, t in dense.items()}
        leaves = {n: own[n].requires_grad_() for n in task.trainable}
        loss = task.loss(own, client.train.x[batch], client.train.y[batch], train=True)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        total += grads[LAYER].flatten().square() / 2
        others += sum(float(g.square().sum()) for n, g in grads.items() if n != LAYER) / 2
    assert torch.allclose(means[LAYER], total, atol=1e-7, rtol=1e-3)
    assert rest == pytest.approx(others, rel=1e-4)


def test_looking_at_gradients_changes_no_bit_of_the_training() -> None:
    task, client = norm_task(), small_clients(3)[2]
    strategy, half = prune(density=0.1)
    state = started(strategy, task, (client,))
    got = receive(task, strategy.broadcast(state, client.device), {})
    squares = SquaredGradients(prunable(task).sizes)
    seen = half.fit(task, client, got.params, torch_rng(3), mask=got.mask, squares=squares)
    plain = half.fit(task, client, got.params, torch_rng(3), mask=got.mask)
    assert all(torch.equal(seen.params[n], plain.params[n]) for n in plain.params)


# --- reductions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", ["random", "magnitude"])
def test_without_reconfiguration_it_is_a_fixed_mask(initial: str) -> None:
    how = {"density": 0.2, "momentum": 0.9, "weight_decay": 0.01}
    fixed, first, _ = run_method("fixed_mask", norm_task(), criterion=initial, **how)
    never, second, _ = run_method("prunefl", norm_task(), initial=initial, r_stop=1, **how)
    assert digest(fixed.state, first) == digest(never.state, second)


@pytest.mark.parametrize("task", TASKS)
def test_at_density_one_the_variant_of_constant_size_is_fedavg(task: str) -> None:
    avg, _, first = run_method("fedavg", TASKS[task]())
    full, memories, second = run_method("prunefl", TASKS[task](), density=1.0, variant="top", initial="random")
    assert digest(avg.state, {}) == digest(full.state, {})
    assert not memories and [r["accuracy"] for r in first] == [r["accuracy"] for r in second]


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_a_reconfiguration_is_the_rule_on_means_weighted_by_examples() -> None:
    task, clients = norm_task(), small_clients(3)
    strategy, half = prune(density=0.1, delta_r=1)
    state = started(strategy, task, clients)
    replies, after = exchanged_by_hand(strategy, half, task, state, clients, {})
    n = [r.weight for r in replies]
    mean = sum(k * r.packet.tensors[f"square/{LAYER}"].double() for k, r in zip(n, replies, strict=True)) / sum(n)
    rest = sum(k * float(r.packet.scalars["square_rest"]) for k, r in zip(n, replies, strict=True)) / sum(n)
    weights = (sum(k * r.packet.tensors[LAYER].double() for k, r in zip(n, replies, strict=True)) / sum(n)).float()
    kept = state.shared.mask[LAYER].tolist()
    goes = math.floor(0.3 * 0.5 ** (1 / 10_000) * len(kept))
    small = torch.argsort(weights.abs(), stable=True)[:goes].tolist()
    stay = sorted(set(kept) - {kept[i] for i in small})
    size = prunable(task).sizes[LAYER]
    free = sorted(set(range(size)) - set(stay), key=lambda j: -float(mean.float()[j]))
    gain, time, chosen = rest + float(mean.float().double()[stay].sum()), 0.7 + len(stay) / size, set(stay)
    for j in free:
        if len(chosen) == state.budget or not float(mean.float()[j]) * size > gain / time:
            break
        gain, time = gain + float(mean.float()[j]), time + 1 / size
        chosen.add(j)
    assert set(after.shared.mask[LAYER].tolist()) == chosen
    values = dict(zip(after.shared.mask[LAYER].tolist(), after.params[LAYER].tolist(), strict=True))
    old = dict(zip(kept, weights.tolist(), strict=True))
    assert all(values[j] == pytest.approx(old.get(j, 0.0), rel=1e-6) for j in chosen)
    assert after.shared.version == 2 and after.adjustments == 1


@pytest.mark.parametrize("variant", ["adaptive", "top"])
def test_the_size_stays_within_the_density_and_constant_where_promised(variant: str) -> None:
    strategy, _, reports = run_method(
        "prunefl", norm_task(), rounds=5, initial="magnitude", variant=variant, delta_r=1, density=0.1
    )
    state = strategy.state
    assert isinstance(state, PruneFLState) and state.adjustments == 4
    size = prunable(norm_task()).sizes[LAYER]
    densities = [row["density_nominal"] for r in reports for row in r["rows"] if row["bytes_up"] is not None]
    assert max(densities) <= 0.1 and len(state.shared.mask[LAYER]) <= state.budget == int(0.1 * size)
    if variant == "top":
        assert min(densities) == max(densities) == int(0.1 * size) / size


@pytest.mark.parametrize("initial", ["client", "random"])
def test_one_digest_for_any_number_of_workers_while_the_mask_changes(initial: str) -> None:
    digests = set()
    for workers in (1, 2):
        strategy, memories, _ = run_method(
            "prunefl", norm_task(), workers=workers, rounds=4, delta_r=1, initial=initial, **SHORT
        )
        digests.add(digest(strategy.state, memories))
    assert len(digests) == 1


def test_partial_participation_keeps_track_of_the_versions() -> None:
    task, clients = norm_task(), small_clients(6)
    strategy, _ = prune(delta_r=2, r_stop=6)
    with LocalGrid(client_app(task, clients.__getitem__), 6, own_replies=False) as grid:
        plan = Plan(seed=3, fraction=0.34)
        list(strategy.rounds(grid, 6, task=task, devices=[c.device for c in clients], plan=plan))
        memories = {i: dict(decode(s).tensors) for i, s in grid.states().items() if len(s)}
    state = strategy.state
    assert isinstance(state, PruneFLState) and state.shared.version == 3
    versions = {i: int(m["version"]) for i, m in memories.items() if "version" in m}
    assert {i: v for i, v in enumerate(state.shared.held.tolist()) if v} == versions
    for i, v in versions.items():
        assert v < 3 or torch.equal(memories[i][f"mask/{LAYER}"], state.shared.mask[LAYER])


def test_a_mask_that_was_full_in_between_does_not_count_as_held() -> None:
    task, clients = norm_task(), small_clients(2)
    strategy, _ = prune(density=0.1)
    shared = started(strategy, task, clients).shared.held_by([0, 1])
    other = {LAYER: torch.arange(5, dtype=torch.int32)}
    full = shared.changed_to({}, task)
    assert full.version == 0 and all(full.holds(c.device) for c in clients)
    again = full.changed_to(other, task)
    assert again.version == 1 and not any(again.holds(c.device) for c in clients)


# --- the initial pruning ---------------------------------------------------------------------------------------------


def test_one_client_prunes_the_dense_model_before_round_one() -> None:
    strategy, _, reports = run_method("prunefl", norm_task(), rounds=2, initial="client", density=0.1, **SHORT)
    first, second = reports[0], reports[1]
    assert [(r["stage"], r["round"]) for r in reports] == [("prune", 0), ("train", 1), ("train", 2)]
    assert len(first["rows"]) == 1 and len(second["rows"]) > 1
    row = first["rows"][0]
    assert row["density_true"] == 1.0 and row["memory"] > second["rows"][0]["memory"]
    layers = prunable(norm_task()).layers
    assert 0 < row["flops"] < train_flops(layers, 24 * 8) * 2
    assert all(r["density_nominal"] <= 0.1 for r in second["rows"] if r["bytes_up"] is not None)
    assert strategy.notes(norm_task(), []) == ('initial = "client": one client trains the dense model before round 1',)


def test_the_client_of_largest_budget_is_asked_and_an_exceeded_one_stops_the_run() -> None:
    task, clients = norm_task(), list(small_clients(3, 0.3))
    clients[1] = replace(clients[1], device=replace(clients[1].device, budget=Budget(density=0.5)))
    strategy, _ = prune(initial="client", **SHORT)
    state = started(strategy, task, tuple(clients))
    assert [d.id for d in strategy.invited(state, [c.device for c in clients])] == [1]
    devices, message = [c.device for c in clients], r"client 1, round 0: density 1 exceeds its budget 0.5"
    with pytest.raises(UserError, match=message):  # before any work
        strategy.foresee(task, devices, Plan())
    strategy.foresee(task, devices, Plan(on_over_budget="record"))
    strategy.foresee(task, [replace(devices[0], budget=Budget(memory=10**6))], Plan())
    with pytest.raises(UserError, match=r"client 0, round 0: memory \d+ exceeds its budget 1000 "):
        strategy.foresee(task, [replace(devices[0], budget=Budget(memory=1000))], Plan())
    with LocalGrid(client_app(task, clients.__getitem__), 3, own_replies=False) as grid:
        rounds = strategy.rounds(grid, 1, task=task, devices=devices)
        with pytest.raises(UserError, match=message):
            next(rounds)


def test_the_initial_pruning_waits_for_the_accuracy_and_is_cut_to_the_density() -> None:
    task, clients = norm_task(), small_clients(1)
    for above, share in ((0.0, 0.6), (99.0, 0.6)):  # pruned step by step; never begun, so cut at once
        strategy, half = prune(initial="client", density=0.05, **{**SHORT, "above_chance": above, "max_dec": share})
        state = started(strategy, task, clients)
        replies, after = exchanged_by_hand(strategy, half, task, state, clients, {})
        assert after.stage == "train" and len(after.shared.mask[LAYER]) <= after.budget
        assert replies[0].packet.scalars["samples"] > 0
        replies, after = exchanged_by_hand(strategy, half, task, after, clients, {})
        assert replies[0].packet.scalars["density_nominal"] <= 0.05


def test_the_initial_pruning_ends_when_the_size_is_calm() -> None:
    task, clients = small_task(), small_clients(1)
    strategy, half = prune(initial="client", density=1.0, initial_steps=400, initial_every=4, above_chance=0.0)
    strategy.max_dec = 0.0  # nothing may go: calm from the first change on
    replies, _ = exchanged_by_hand(strategy, half, task, started(strategy, task, clients), clients, {})
    assert replies[0].packet.scalars["samples"] <= 5 * 4 * 8


# --- times and costs -------------------------------------------------------------------------------------------------


def test_times_follow_multiply_adds_and_add_up_to_one() -> None:
    from tests.test_fedtiny import stages_task

    task = stages_task()
    weights = prunable(task).weights
    sizes = torch.tensor([layer.weights for layer in weights.values()], dtype=torch.float64)
    macs = torch.tensor([float(layer.macs) for layer in weights.values()], dtype=torch.float64)
    for hyper, want in (
        ({"transmission": 0.0}, macs / sizes / macs.sum()),
        ({"transmission": 1.0}, torch.full_like(sizes, float(1 / sizes.sum()))),
        ({"variant": "top"}, torch.full_like(sizes, float(1 / sizes.sum()))),
        ({"layer_times": ",".join(["2"] * len(sizes))}, torch.full_like(sizes, float(1 / sizes.sum()))),
    ):
        times = started(prune(**hyper)[0], task, small_clients(1)).times
        assert torch.allclose(times, want) and float((times * sizes).sum()) == pytest.approx(1)


def test_dense_gradients_count_in_bytes_flops_and_memory() -> None:
    task, clients, memories = norm_task(), small_clients(2), {}
    strategy, half = prune(density=0.1, delta_r=2, variant="top")
    state = started(strategy, task, clients)
    plain, state = exchanged_by_hand(strategy, half, task, state, clients, memories)
    dense, state = exchanged_by_hand(strategy, half, task, state, clients, memories)
    (a, b), sizes, layers = (r[0].packet for r in (plain, dense)), prunable(task).sizes, prunable(task).layers
    assert b.nbytes - a.nbytes == pytest.approx(4 * sizes[LAYER], abs=200)
    layer = prunable(task).weights[LAYER]
    samples = int(a.scalars["samples"])
    more = float(b.scalars["flops"]) - float(a.scalars["flops"])
    assert more == pytest.approx(2 * samples * layer.macs * (1 - int(0.1 * layer.weights) / layer.weights))
    assert int(b.scalars["memory"]) - int(a.scalars["memory"]) == 4 * (sizes[LAYER] + 32768)
    forward = sum(x.macs for x in layers)
    assert float(b.scalars["flops"]) < 2 * samples * 3 * forward


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"density": -0.5}, r"density must be in \(0, 1\], or 0 for what the budgets allow, got -0.5"),
        ({"variant": "adaptiv"}, "unknown variant 'adaptiv'; did you mean 'adaptive'"),
        ({"initial": "server"}, "unknown initial 'server'"),
        ({"max_dec": 1.0}, r"max_dec must be in \[0, 1\), got 1.0"),
        ({"half_life": 0.0}, "half_life must be above 0, got 0"),
        ({"fixed_time": 0.0}, "fixed_time must be above 0, got 0"),
        ({"transmission": 1.5}, r"transmission must be in \[0, 1\], got 1.5"),
        ({"layer_times": "1,x"}, "layer_times must be numbers above 0 separated by commas, got '1,x'"),
        ({"layer_times": "1,-2"}, "layer_times must be numbers above 0 separated by commas, got '1,-2'"),
        ({"initial_every": 0}, "initial_every must be above 0, got 0"),
        ({"tolerance": -0.1}, "tolerance must be at least 0, got -0.1"),
        ({"delta_r": -1}, "delta_r and r_stop must be at least 0, got -1 and 0"),
    ],
)
def test_bad_hyper_parameters_are_refused(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(load_method("prunefl"), hyper)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"layer_times": "1,2"}, "layer_times has 2 numbers, the model 1 layers that are pruned"),
        ({"r_stop": 10}, "r_stop is 10, beyond the 9 rounds"),
        ({"delta_r": 9}, "delta_r is 9 and r_stop 9: the mask would never change"),
        ({"density": 1e-5}, "nominal density 1e-05 is below the smallest possible one"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(hyper: dict[str, Any], message: str) -> None:
    strategy, _ = prune(**hyper)
    with pytest.raises(UserError, match=message):
        started(strategy, norm_task(), small_clients(1))


def test_an_early_end_that_leaves_no_change_is_refused_and_one_says_never() -> None:
    with pytest.raises(UserError, match="delta_r is 10 and r_stop 5: the mask would never change"):
        prune(r_stop=5)[0].schedule(300)
    assert prune(r_stop=1, delta_r=5)[0].schedule(300) == (5, 1)


def test_the_interval_is_the_papers_in_long_runs() -> None:
    assert prune()[0].schedule(10_001) == (50, 10_001)
    assert prune()[0].schedule(60) == (2, 60)


@pytest.mark.parametrize("damage", ["negative", "missing", "short", "rest", "extra"])
def test_squared_gradients_that_do_not_fit_are_refused(damage: str) -> None:
    task, client = norm_task(), small_clients(1)[0]
    strategy, half = prune(delta_r=1)
    state = started(strategy, task, (client,))
    reply, _ = half.train(task, client, strategy.broadcast(state, client.device), {}, torch_rng(0))
    assert strategy.complaint(task, state, Reply(Device(0), reply)) == ""
    tensors, scalars, name = dict(reply.tensors), dict(reply.scalars), f"square/{LAYER}"
    if damage == "negative":
        tensors[name] = -1 - tensors[name]
    elif damage == "missing":
        del tensors[name]
    elif damage == "short":
        tensors[name] = tensors[name][:-1]
    elif damage == "extra":
        tensors["square/conv1.weight"] = torch.ones(3)
    else:
        del scalars["square_rest"]
    line = strategy.complaint(task, state, Reply(Device(0), Packet(reply.kind, tensors, scalars)))
    assert line and "\n" not in line


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("repeat", "mask of 'fc1.weight': packed positions are not 3 ascending ones"),
        ("outside", "mask of 'fc1.weight': packed positions are not 3 ascending ones"),
        ("many", "it keeps 32767 weights, 3276 are allowed"),
        ("whole", "it keeps 32768 weights, 3276 are allowed"),
        ("none", "tensor 'fc1.weight' has 0 kept weights of 32768"),
    ],
)
def test_a_pruned_model_that_does_not_fit_is_refused(damage: str, message: str) -> None:
    task, client = norm_task(), small_clients(1)[0]
    strategy, half = prune(initial="client", **{**SHORT, "initial_steps": 1})
    state = started(strategy, task, (client,))
    reply, _ = half.train(task, client, strategy.broadcast(state, client.device), {}, torch_rng(0))
    assert strategy.complaint(task, state, Reply(Device(0), reply)) == ""
    tensors = dict(reply.tensors)
    size = 32768
    positions = {"repeat": [5, 5, 9], "outside": [9, 5, 7], "many": list(range(size - 1)), "none": []}
    if damage == "whole":
        tensors[LAYER] = torch.zeros(task.shapes[LAYER])
        del tensors[f"mask/{LAYER}"]
    else:
        at = torch.tensor(positions[damage], dtype=torch.int32)
        tensors[LAYER], tensors[f"mask/{LAYER}"] = torch.zeros(len(at)), pack_positions(at, size)
    assert message in strategy.complaint(task, state, Reply(Device(0), replace(reply, tensors=tensors)))


@pytest.mark.parametrize("variant", ["adaptive", "top"])
def test_layers_that_are_full_and_layers_that_are_not_change_places(variant: str) -> None:
    """ERK at this density keeps all weights of the first stage, which are then in no mask."""
    from tests.test_fedtiny import stages_task

    task, clients, memories = stages_task(), small_clients(2), {}
    strategy, half = prune(density=0.2, variant=variant, delta_r=1)
    state = started(strategy, task, clients)
    sizes, seen = prunable(task).sizes, []
    for _ in range(3):
        _, state = exchanged_by_hand(strategy, half, task, state, clients, memories)
        seen.append({n: len(state.shared.mask[n]) if n in state.shared.mask else k for n, k in sizes.items()})
        assert all(t.shape == task.shapes[n] for n, t in state.params.items() if n not in state.shared.mask)
        assert sum(seen[-1].values()) <= state.budget and min(seen[-1].values()) > 0
    assert "layer1.0.conv1.weight" not in started(strategy, task, clients).shared.mask
    assert (seen[0] == seen[2]) == (variant == "top")


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", ["ssfl", "prunefl"])
def test_dense_work_is_refused_just_where_round_0_would_break_a_budget(name: str, narrow: bool) -> None:
    task, clients = norm_task(), small_clients(1)
    if narrow:
        wide = torch.nn.Sequential(task.model, torch.nn.Linear(CLASSES, 10_000))
        task = Task(task.model, task.input_shape, CLASSES, seed=0, reference=wide)
    options = {"initial": "client", "momentum": 0.9, **SHORT} if name == "prunefl" else {}
    strategy, _ = halves(name, batch_size=8, density=0.1, **options)
    with LocalGrid(client_app(task, clients.__getitem__), 1, own_replies=False) as grid:
        first = next(strategy.rounds(grid, 1, task=task, devices=[clients[0].device]))
    (row,) = first["rows"]
    assert first["round"] == 0 and (row["density_true"] < 0.5) == narrow
    spent = {"density": row["density_true"], "forward_macs": row["forward_macs_max"], "memory": row["memory"]}
    for what, value in spent.items():
        less = value - 1 if what == "memory" else value * 0.999
        strategy.foresee(task, [Device(0, Budget(**{what: value}))], Plan())
        with pytest.raises(UserError, match=f"client 0, round 0: {what} {value:g} exceeds its budget"):
            strategy.foresee(task, [Device(0, Budget(**{what: less}))], Plan())
