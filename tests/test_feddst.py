"""FedDST: readjustment on the client and merging on the server against loops, reductions, densities, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.feddst import FedDSTClient
from fedsparse.client import client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import ClientError, UserError
from fedsparse.globalmask import own_mask, prunable, receive, with_mask
from fedsparse.masked import top_gradients
from fedsparse.method import build, load_method
from fedsparse.packet import Packet, decode
from fedsparse.runner import digest
from fedsparse.seeding import torch_rng
from fedsparse.sgd import batches
from fedsparse.sparse.masks import check_mask
from fedsparse.sparse.mean import HolderMean, WeightedMean
from fedsparse.sparse.positions import pack_positions
from fedsparse.strategy import Plan, Reply
from fedsparse.task import Client, Device, Split, Task
from strategies.feddst import FedDST, FedDSTState
from tests.helpers import exchanged_by_hand, norm_task, small_clients, small_task, started
from tests.test_contract import TASKS, halves, run_method
from tests.test_fedtiny import stages_task

LAYER = "fc1.weight"
FAST = {"alpha": 0.5, "delta_r": 1}
ALL = {"momentum": 0.9, "weight_decay": 0.01, "clip": 0.5}


def dst(**hyper: Any) -> tuple[FedDST, FedDSTClient]:
    strategy, half = halves("feddst", **{"batch_size": 8, **hyper})
    assert isinstance(strategy, FedDST) and isinstance(half, FedDSTClient)
    return strategy, half


# --- reductions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", ["random", "magnitude"])
@pytest.mark.parametrize("hyper", [{}, ALL], ids=["plain", "all"])
def test_without_readjustment_it_is_a_fixed_mask(initial: str, hyper: dict[str, float]) -> None:
    fixed, first, _ = run_method("fixed_mask", norm_task(), criterion=initial, density=0.2, **hyper)
    never, second, _ = run_method("feddst", norm_task(), initial=initial, density=0.2, r_stop=1, **hyper)
    assert digest(fixed.state, first) == digest(never.state, second)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("hyper", [{}, ALL], ids=["plain", "all"])
def test_at_density_one_it_is_fedavg(task: str, hyper: dict[str, float]) -> None:
    avg, _, first = run_method("fedavg", TASKS[task](), **hyper)
    full, memories, second = run_method("feddst", TASKS[task](), density=1.0, **FAST, **hyper)
    assert digest(avg.state, {}) == digest(full.state, {})
    assert not memories and [r["accuracy"] for r in first] == [r["accuracy"] for r in second]


def test_the_mean_over_holders_is_the_plain_one_where_all_hold_the_same() -> None:
    rng, at = torch_rng(0), torch.arange(3, 103, 2, dtype=torch.int32)
    plain, holders = WeightedMean(), HolderMean({"w": 120})
    for n in (3, 5, 17):
        values = {"w": torch.randn(50, generator=rng)}
        plain.add(values, n)
        holders.add(values, {"w": at}, n)
    positions, means = holders.result("w")
    assert torch.equal(positions, at) and torch.equal(means, plain.result({"w": torch.empty(50)})["w"])


# --- the client ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [{"momentum": 0.9}, {"optimizer": "adam", "lr": 0.001}], ids=["sgd", "adam"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_readjustment_prunes_the_smallest_and_grows_the_largest_gradients(
    share: float, optimizer: dict[str, Any]
) -> None:
    task, client = norm_task(), small_clients(4)[3]
    strategy, half = dst(density=0.05, adjust_at=share, epochs=2, **FAST, **optimizer)
    state = started(strategy, task, (client,))
    packet = strategy.broadcast(state, client.device)
    reply, memory = half.train(task, client, packet, {}, torch_rng(5))
    rng, got = torch_rng(5), receive(task, packet, {})
    order = list(batches(len(client.train), 8, 2, rng))
    before = math.ceil(share * len(order))
    middle = half.fit(task, client, got.params, rng, mask=got.mask, order=order[:before]).params
    chosen = torch.randperm(len(client.train), generator=rng)[:8]
    batch = Split(client.train.x[chosen], client.train.y[chosen])
    kept, a = got.mask[LAYER].tolist(), int(state.grow.sum())
    assert a == math.ceil(0.25 * (1 + math.cos(math.pi / state.r_stop)) * len(kept) - 1e-9)
    positions, _ = top_gradients(task, middle, got.mask, batch, {LAYER: a})[LAYER]
    smallest = torch.argsort(middle[LAYER].abs(), stable=True)[:a].tolist()
    want = (set(kept) - {kept[i] for i in smallest}) | set(positions.tolist())
    own = own_mask(task, reply)[LAYER].tolist()
    assert set(own) == want and len(own) == len(kept)
    values = dict(zip(own, reply.tensors[LAYER].tolist(), strict=True))
    grown = [values[j] for j in positions.tolist()]
    assert all(v == 0 for v in grown) if share == 1 else sum(v != 0 for v in grown) > a / 2
    assert torch.equal(memory[f"mask/{LAYER}"], got.mask[LAYER])  # the server's, until it sends another
    assert reply.scalars["samples"] == 2 * len(client.train)


def test_a_training_in_parts_is_the_whole_training() -> None:
    task, client = norm_task(), small_clients(3)[2]
    for how in ({"momentum": 0.9}, {"optimizer": "adam", "lr": 0.001}):
        _, half = dst(epochs=3, **how)
        whole = half.fit(task, client, task.init_params(), torch_rng(1))
        order, moments = list(batches(len(client.train), 8, 3, torch_rng(1))), []
        first = half.fit(task, client, task.init_params(), torch_rng(1), order=order[:4], moments=moments)
        last = half.fit(task, client, first.params, torch_rng(1), order=order[4:], moments=moments, done=first.steps)
        assert all(torch.equal(whole.params[n], last.params[n]) for n in whole.params)


# --- the server ------------------------------------------------------------------------------------------------------


def test_the_server_averages_over_holders_and_prunes_back() -> None:
    task, clients = norm_task(), small_clients(3)
    strategy, half = dst(density=0.05, **FAST)
    state = started(strategy, task, clients)
    replies, after = exchanged_by_hand(strategy, half, task, state, clients, {})
    sums: dict[int, float] = {}
    votes: dict[int, float] = {}
    for r in replies:
        held = own_mask(task, r.packet)[LAYER].tolist()
        for j, v in zip(held, r.packet.tensors[LAYER].tolist(), strict=True):
            sums[j] = sums.get(j, 0.0) + r.weight * v
            votes[j] = votes.get(j, 0.0) + r.weight
    means = {j: sums[j] / votes[j] for j in sums}
    count = len(state.shared.mask[LAYER])
    assert len(means) > count  # the clients do not agree
    best = sorted(means, key=lambda j: (-abs(means[j]), j))[:count]
    assert after.shared.mask[LAYER].tolist() == sorted(best)
    assert after.params[LAYER].tolist() == pytest.approx([means[j] for j in sorted(best)], rel=1e-5)
    bias = sum(r.weight * r.packet.tensors["fc1.bias"].double() for r in replies) / sum(r.weight for r in replies)
    assert torch.allclose(after.params["fc1.bias"], bias.float())
    assert after.shared.version == 2 and after.adjustments == 1 and not any(map(after.shared.holds, (
        c.device for c in clients)))  # fmt: skip


def test_layer_counts_and_density_are_constant_on_both_sides() -> None:
    task, clients, memories = stages_task(), small_clients(2), {}
    strategy, half = dst(density=0.2, layer_densities="uniform", alpha=0.3, delta_r=2, r_stop=6)
    state = started(strategy, task, clients)
    before = {n: len(kept) for n, kept in state.shared.mask.items()}
    assert sum(before.values()) == int(0.2 * sum(prunable(task).sizes.values()))
    changes = []
    for _ in range(6):
        old = state.shared
        replies, state = exchanged_by_hand(strategy, half, task, state, clients, memories)
        changes.append(old.version != state.shared.version)
        for r in replies:
            own = own_mask(task, r.packet) or old.mask
            check_mask(own, task.shapes)
            assert {n: len(kept) for n, kept in own.items()} == before
        assert {n: len(kept) for n, kept in state.shared.mask.items()} == before
        assert before == {n: len(state.params[n]) for n in before}
    assert changes == [False, True, False, True, False, False]
    densities = {r.packet.scalars["density_nominal"] for r in replies}
    assert max(densities) <= 0.2


def test_rounds_too_few_for_a_change_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fedsparse")
    assert dst(r_stop=1)[0].schedule(2) == (1, 1)
    assert dst()[0].schedule(4) == (1, 2)
    assert not caplog.records
    assert dst()[0].schedule(2) == (1, 1)
    assert "the mask never changes in 2 rounds unless r_stop is set" in caplog.text


def test_the_schedule() -> None:
    assert dst()[0].schedule(1000) == (15, 500)
    assert dst()[0].schedule(60) == (2, 30)
    task = small_task()
    strategy, _ = dst(alpha=0.1, delta_r=2, r_stop=9)
    state = started(strategy, task, small_clients(1), 12)
    grow = [int(strategy._announced(task, replace(state, round=r)).grow.sum()) for r in range(12)]
    assert [r + 1 for r, a in enumerate(grow) if a] == [2, 4, 6, 8] and grow[1] > grow[7]


def test_one_digest_for_any_number_of_workers_while_the_mask_changes() -> None:
    digests = set()
    for workers in (1, 2):
        strategy, memories, _ = run_method("feddst", norm_task(), workers=workers, rounds=4, r_stop=4, **FAST, **ALL)
        digests.add(digest(strategy.state, memories))
        assert isinstance(strategy.state, FedDSTState) and strategy.state.adjustments == 3
    assert len(digests) == 1


def test_partial_participation_keeps_track_of_the_versions() -> None:
    task, clients = norm_task(), small_clients(6)
    strategy, _ = dst(alpha=0.5, delta_r=2, r_stop=6)
    with LocalGrid(client_app(task, clients.__getitem__), 6, own_replies=False) as grid:
        plan = Plan(seed=3, fraction=0.34)
        reports = list(strategy.rounds(grid, 7, task=task, devices=[c.device for c in clients], plan=plan))
        memories = {i: dict(decode(s).tensors) for i, s in grid.states().items() if len(s)}
    state = strategy.state
    assert isinstance(state, FedDSTState) and state.shared.version == 3 and state.adjustments == 2
    versions = {i: int(m["version"]) for i, m in memories.items()}
    assert {i: v for i, v in enumerate(state.shared.held.tolist()) if v} == versions and len(set(versions.values())) > 1
    for i, v in versions.items():
        assert v < 3 or torch.equal(memories[i][f"mask/{LAYER}"], state.shared.mask[LAYER])
    assert all(row["personal"] is not None for row in reports[-1]["rows"])
    assert all(row["local"] is not None for r in reports for row in r["rows"] if row["bytes_up"] is not None)


# --- costs -----------------------------------------------------------------------------------------------------------


def test_only_a_readjustment_carries_a_mask_up() -> None:
    task, clients, memories = norm_task(), small_clients(2), {}
    strategy, half = dst(density=0.05, alpha=0.3, delta_r=2, r_stop=4)
    state, sizes, down, flops, memory = started(strategy, task, clients), [], [], [], []
    for _ in range(4):
        down.append(strategy.broadcast(state, clients[0].device).nbytes)
        replies, state = exchanged_by_hand(strategy, half, task, state, clients, memories)
        sizes.append(replies[0].packet.nbytes)
        flops.append(float(replies[0].packet.scalars["flops"]))
        memory.append(int(replies[0].packet.scalars["memory"]))
    packed = sum(t.nbytes for t in state.shared.packed.values())
    assert sizes[1] - sizes[0] == pytest.approx(packed, abs=150) and sizes[0] == pytest.approx(sizes[2], abs=20)
    assert down[2] - down[3] == pytest.approx(packed, abs=150)
    assert flops[1] > flops[0] == flops[2] == flops[3]
    assert memory[1] > memory[0] == memory[2]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"density": 2.0}, r"density must be in \(0, 1\], or 0 for what the budgets allow, got 2.0"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\], got 0"),
        ({"initial": "snip"}, "unknown initial 'snip'"),
        ({"adjust_at": 0.0}, r"adjust_at must be in \(0, 1\], got 0"),
        ({"adjust_at": 1.1}, r"adjust_at must be in \(0, 1\], got 1.1"),
        ({"layer_densities": "erks"}, "unknown layer_densities 'erks'; did you mean 'erk'"),
        ({"r_stop": -1}, "delta_r and r_stop must be at least 0, got 0 and -1"),
    ],
)
def test_bad_hyper_parameters_are_refused(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(load_method("feddst"), hyper)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("repeat", "mask of 'fc1.weight': packed positions are not 300 ascending ones"),
        ("order", "mask of 'fc1.weight': packed positions are not 300 ascending ones"),
        ("few", "tensor 'fc1.weight' is torch.float32 (299,), where torch.float32 (300,) is wanted"),
        ("missing", "tensor 'mask/fc1.weight' is missing"),
        ("extra", "tensor 'mask/output.weight' is not wanted"),
    ],
)
def test_masks_that_do_not_fit_are_refused(damage: str, message: str) -> None:
    task, client = norm_task(), small_clients(1)[0]
    strategy, half = dst(density=300 / 32768, **FAST)
    state = started(strategy, task, (client,))
    reply, _ = half.train(task, client, strategy.broadcast(state, client.device), {}, torch_rng(0))
    assert strategy.complaint(task, state, Reply(Device(0), reply)) == ""
    tensors = dict(reply.tensors)
    if damage in ("repeat", "order"):
        wrong = [7, *range(7, 306)] if damage == "repeat" else [9, 3, *range(10, 308)]
        tensors[f"mask/{LAYER}"] = pack_positions(torch.tensor(wrong), 32768)
    elif damage == "few":
        tensors = with_mask(task, {**{n: tensors[n] for n in task.shapes}, LAYER: tensors[LAYER][:-1]}, {
            LAYER: own_mask(task, reply)[LAYER][:-1]})  # fmt: skip
    elif damage == "missing":
        del tensors[f"mask/{LAYER}"]
    else:
        tensors["mask/output.weight"] = torch.zeros(3, dtype=torch.uint8)
    assert message in strategy.complaint(task, state, Reply(Device(0), Packet(reply.kind, tensors, reply.scalars)))


def test_positions_outside_are_refused() -> None:
    """In a layer of 5,000 weights, whose positions of 13 bits may name others."""
    task, client = small_task("mlp"), small_clients(1)[0]
    strategy, half = dst(density=0.02, **FAST)
    state = started(strategy, task, (client,))
    name, kept = next(iter(state.shared.mask.items()))
    size = prunable(task).sizes[name]
    reply, _ = half.train(task, client, strategy.broadcast(state, client.device), {}, torch_rng(0))
    wrong = pack_positions(torch.tensor([*range(len(kept) - 1), size]), size)
    line = strategy.complaint(
        task, state, Reply(Device(0), Packet(reply.kind, {**reply.tensors, f"mask/{name}": wrong}, reply.scalars))
    )
    assert line.startswith(f"mask of {name!r}: packed positions are not")


def test_values_that_are_not_finite_name_the_client() -> None:
    task, clients = norm_task(), small_clients(2)
    strategy, _ = dst(density=0.05, **FAST)
    train = FedDSTClient.train

    def broken(self: Any, task: Task, client: Client, *rest: Any) -> Any:
        reply, memory = train(self, task, client, *rest)
        bad = reply.tensors[LAYER].clone()
        bad[0] = math.nan
        return (replace(reply, tensors={**reply.tensors, LAYER: bad}) if client.id else reply), memory

    with pytest.MonkeyPatch.context() as patch, LocalGrid(client_app(task, clients.__getitem__), 2,
                                                          own_replies=False) as grid:  # fmt: skip
        patch.setattr(FedDSTClient, "train", broken)
        rounds = strategy.rounds(grid, 3, task=task, devices=[c.device for c in clients], plan=Plan(evaluate_every=0))
        with pytest.raises(ClientError, match="client 1, round 1, stage train: tensor 'fc1.weight' is not finite"):
            next(rounds)


class Odd(nn.Module):
    """A layer that is called so many times; 0: its weight is used without it."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls
        self.first, self.odd, self.output = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not self.calls:
            x = nn.functional.linear(x, self.odd.weight, self.odd.bias)
        for _ in range(self.calls):
            x = self.odd(x)
        return self.output(x)


@pytest.mark.parametrize("name", ["feddst", "fedtiny"])
@pytest.mark.parametrize(("calls", "why"), [(0, "is not called"), (2, "is used more than once")])
def test_layers_that_cannot_be_searched_are_refused_before_training(name: str, calls: int, why: str) -> None:
    task = Task(Odd(calls), (6,), 4, seed=0)
    strategy, _ = halves(name, density=0.5, delta_r=2, r_stop=5)
    with pytest.raises(UserError, match=f"'odd.weight' cannot be searched: the layer {why}"):
        strategy.first_state(task, [Device(0)], Plan(), 9)
    still, _ = halves(name, density=0.5, r_stop=1)
    for half, model in ((still, Odd(calls)), (strategy, Odd(1))):
        half.first_state(Task(model, (6,), 4, seed=0), [Device(0)], Plan(), 9)


def test_only_layers_that_will_be_searched_must_be_searchable() -> None:
    task = Task(Odd(2), (6,), 4, seed=0)  # whose first layer is pruned too
    options = {"granularity": "layer", "order": "forward", "delta_r": 2, "density": 0.5}
    once, _ = halves("fedtiny", r_stop=3, **options)
    once.first_state(task, [Device(0)], Plan(), 9)  # one change, of the first layer
    twice, _ = halves("fedtiny", r_stop=5, **options)
    with pytest.raises(UserError, match="'odd.weight' cannot be searched"):
        twice.first_state(task, [Device(0)], Plan(), 9)
    for seed in range(10):  # the union of candidates may keep all of a layer that the selected one prunes
        task = Task(Odd(2), (6,), 4, seed=seed)
        full, _ = halves("fedtiny", density=0.85, pool=10, granularity="entire", delta_r=2, r_stop=5)
        with pytest.raises(UserError, match="'odd.weight' cannot be searched"):
            full.first_state(task, [Device(0)], Plan(), 9)
