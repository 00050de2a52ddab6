"""Medians, trimmed means and clipped updates: oracles, reductions, and clients that send nonsense."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsparse.aggregation import KINDS, Aggregation, FixedMean, TrimmedMean, trimmed
from fedsparse.client import client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import UserError
from fedsparse.globalmask import unfolded
from fedsparse.method import method_names
from fedsparse.nested import level_of
from fedsparse.packet import decode, encode
from fedsparse.runner import digest
from fedsparse.seeding import numpy_rng, torch_rng
from fedsparse.sparse.blocks import structural_cut
from fedsparse.sparse.codec import pack
from fedsparse.sparse.cut import Cut
from fedsparse.sparse.flat import flat_cut
from fedsparse.strategy import Plan, Reply
from fedsparse.task import Device, Task
from tests.helpers import exchanged_by_hand, norm_task, small_clients, small_task, started
from tests.test_contract import SPARSE, halves, run_method
from tests.test_nested import BUDGETS, NESTED, clients_of, deep_task

AVERAGING = tuple(name for name in method_names() if name != "local")
FIXED: dict[str, dict[str, Any]] = {"feddst": {"r_stop": 1}}  # what a method needs for a median
MEDIAN, TRIMMED = Aggregation("median"), Aggregation("trimmed_mean", trim=0.2)


# --- oracles ---------------------------------------------------------------------------------------------------------


def slow(values: list[float], rule: Aggregation) -> float:
    """Of the values of one coordinate."""
    ordered = sorted(values)
    drop = (len(ordered) - 1) // 2 if rule.kind == "median" else math.ceil(round(rule.trim * len(ordered), 9))
    drop = min(drop, (len(ordered) - 1) // 2)
    inside = ordered[drop : len(ordered) - drop]
    return sum(inside) / len(inside)


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 10_000), st.sampled_from([0.01, 0.1, 0.2, 0.3, 0.49]))
def test_trimmed_means_are_those_of_sorted_values(clients: int, n: int, seed: int, trim: float) -> None:
    rng = numpy_rng(seed)
    values = rng.normal(size=(clients, n)).astype(np.float32)
    values[rng.random((clients, n)) < 0.3] = np.nan
    for rule in (MEDIAN, Aggregation("trimmed_mean", trim=trim)):
        got = trimmed(torch.from_numpy(values), rule.dropped)
        for column, one in zip(values.T, got.tolist(), strict=True):
            held = [float(v) for v in column if not np.isnan(v)]
            assert one == pytest.approx(slow(held, rule)) if held else math.isnan(one)
            if held and rule is MEDIAN:
                assert one == pytest.approx(float(np.median(held)))


def test_a_trimmed_mean_drops_at_least_its_share_and_leaves_somebody() -> None:
    for trim in (0.01, 0.1, 0.25, 0.3, 0.49):
        rule = Aggregation("trimmed_mean", trim=trim)
        for n in range(200):
            dropped = rule.dropped(n)
            assert dropped >= trim * n - 1e-9 or dropped == (n - 1) // 2 or n < 3
            assert n - 2 * dropped >= min(n, 1)
            assert (dropped > 0) == (n >= 3)
    assert Aggregation("trimmed_mean", trim=0.3).dropped(10) == 3  # and not 4, for 0.3 * 10 in floats


def cuts() -> list[tuple[Task, Cut]]:
    task = norm_task()
    return [(task, flat_cut(task.model, (1, 8, 8), blocks_per_tensor=4)), (task, structural_cut(task.model, (1, 8, 8)))]


def parts_sent(task: Task, cut: Cut, clients: int) -> list[tuple[dict[str, Tensor], np.ndarray[Any, Any]]]:
    sent = []
    for i in range(clients):
        kept = cut.forced | (numpy_rng(i, "kept").random(cut.blocks) < 0.2)
        params = {n: t + torch.randn(t.shape, generator=torch_rng(i, n)) for n, t in task.init_params().items()}
        sent.append((params, cut.touched(kept)))
    return sent


@pytest.mark.parametrize("which", [0, 1], ids=["flat", "channels"])
@pytest.mark.parametrize("rule", [MEDIAN, TRIMMED, Aggregation()], ids=KINDS[1:] + KINDS[:1])
def test_parts_are_aggregated_over_those_who_sent_them(rule: Aggregation, which: int) -> None:
    task, cut = cuts()[which]
    old, sent = task.init_params(), parts_sent(*cuts()[which], 5)
    mean = rule.parts(cut, old)
    for params, touched in sent:
        mean.add(pack(params, cut, touched), touched, 1.0)
    got = mean.result(old)
    marks = [{n: torch.zeros(t.shape, dtype=torch.bool) for n, t in old.items()} for _ in sent]
    for mark, (_, touched) in zip(marks, sent, strict=True):
        for region in cut.regions(touched):
            region.put_(mark[region.name], torch.ones(region.shape(task.shapes[region.name]), dtype=torch.bool))
    untouched = 0
    for name, before in old.items():
        columns = torch.stack([p[name].flatten() for p, _ in sent])
        held = torch.stack([mark[name].flatten() for mark in marks])
        for e in range(0, before.numel(), max(1, before.numel() // 60)):
            value = float(got[name].flatten()[e])
            values = columns[held[:, e], e].tolist()
            untouched += not values
            by_hand = (slow(values, rule) if rule.robust else sum(values) / len(values)) if values else None
            assert value == pytest.approx(by_hand, rel=1e-5, abs=1e-7) if values else value == before.flatten()[e]
    assert untouched


def test_holders_and_whole_models_have_the_same_medians() -> None:
    sizes, sent = {"w": 40}, [torch.randn(40, generator=torch_rng(i)) for i in range(5)]
    everything = {"w": torch.arange(40, dtype=torch.int32)}
    for rule in (MEDIAN, TRIMMED):
        models, holders = rule.whole(), rule.holders(sizes)
        for values in sent:
            models.add({"w": values}, 3.0)
            holders.add({"w": values}, everything, 3.0)
        at, found = holders.result("w")
        assert at.tolist() == list(range(40))
        assert torch.equal(found, models.result({"w": sent[0]})["w"])
        want = [slow([float(v[i]) for v in sent], rule) for i in range(40)]
        assert found.tolist() == pytest.approx(want, rel=1e-5)


def test_holders_leave_others_out() -> None:
    mean = MEDIAN.holders({"w": 6})
    for at, values in (([0, 2], [1.0, 5.0]), ([2, 3], [9.0, -1.0]), ([2, 5], [6.0, 0.0])):
        mean.add({"w": torch.tensor(values)}, {"w": torch.tensor(at, dtype=torch.int32)}, 1.0)
    at, values = mean.result("w")
    assert (at.tolist(), values.tolist()) == ([0, 2, 3, 5], [1.0, 6.0, -1.0, 0.0])
    assert len(MEDIAN.holders({"w": 6}).result("w")[0]) == 0


def test_replies_are_copied() -> None:
    """A reply's tensors are valid until the next one is asked for."""
    mean, value = TrimmedMean(MEDIAN.dropped), torch.ones(3)
    mean.add({"w": value}, 1.0)
    value.fill_(7.0)
    like = {"w": torch.zeros(3), "other": torch.full((2,), 4.0)}
    assert {n: t.tolist() for n, t in mean.result(like).items()} == {"w": [1.0] * 3, "other": [4.0] * 2}


# --- clipping --------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_an_update_is_clipped_to_its_norm_and_keeps_its_direction(seed: int, clip: float) -> None:
    sent = {n: torch.randn(7, generator=torch_rng(seed, n)) for n in "ab"}
    values = {n: t + torch.randn(7, generator=torch_rng(seed, n, "u")) for n, t in sent.items()}
    got = Aggregation(clip=clip).clipped(values, sent)
    before, after = (torch.cat([v[n].double() - sent[n].double() for n in "ab"]) for v in (values, got))
    if float(before.norm()) <= clip:
        assert got is values
    else:
        assert float(after.norm()) == pytest.approx(clip, rel=1e-6)
        torch.testing.assert_close(after, before * clip / before.norm(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("which", [0, 1], ids=["flat", "channels"])
def test_parts_are_clipped_over_what_a_client_holds(which: int) -> None:
    task, cut = cuts()[which]
    old, rule = task.init_params(), Aggregation(clip=0.5)
    for params, touched in parts_sent(task, cut, 2):
        got = rule.clipped_parts(pack(params, cut, touched), cut, touched, old)
        assert float((got - pack(old, cut, touched).double()).norm()) == pytest.approx(0.5)
    same = pack(old, cut, touched)
    assert rule.clipped_parts(same, cut, touched, old) is same


def test_a_fixed_mean_counts_those_who_did_not_send() -> None:
    task, cut = cuts()[0]
    old = {n: torch.zeros_like(t) for n, t in task.init_params().items()}
    mean, sent = FixedMean(cut, old), parts_sent(task, cut, 4)
    for params, touched in sent:
        mean.add(pack(params, cut, touched), touched, 99.0)
    want = {n: torch.zeros_like(t) for n, t in old.items()}
    for params, touched in sent:
        for region in cut.regions(touched):
            total = want[region.name]
            region.put_(total, region.take(total) + region.take(params[region.name]) / 4)
    for name, t in mean.result(old).items():
        torch.testing.assert_close(t, want[name])


# --- methods ---------------------------------------------------------------------------------------------------------


def huge(message: Message, context: Context, call: ClientAppCallable) -> Message:
    """A client that multiplies all that it uploads."""
    reply = call(message, context)
    packet = decode(reply.content)
    if context.node_config["partition-id"] != 1 or packet.kind != "update":
        return reply
    tensors = {n: t * 1e5 if t.is_floating_point() else t for n, t in packet.tensors.items()}
    return Message(encode(replace(packet, tensors=tensors)), reply_to=message)


def largest_after(name: str, rounds: int = 2, **hyper: Any) -> float:
    """The largest parameter after some rounds with such a client."""
    task, clients = small_task(), small_clients(5)
    strategy, _ = halves(name, batch_size=8, **hyper)
    with LocalGrid(client_app(task, clients.__getitem__, [huge]), 5, own_replies=False) as grid:
        plan = Plan(seed=7, on_over_budget="record")
        for _ in strategy.rounds(grid, rounds, task=task, devices=[c.device for c in clients], plan=plan):
            pass
    return max(float(t.abs().max()) for t in strategy.state.params.values())


@pytest.mark.parametrize("name", AVERAGING)
def test_one_client_cannot_carry_the_model_away(name: str) -> None:
    assert largest_after(name, rounds=1) > 1000
    hyper = {"delta_r": 1, "r_stop": 2} if name in ("feddst", "prunefl", "fedtiny") else {}
    for kind in ("median", "trimmed_mean") if name in ("fedavg", "fixed_mask", "pfedgate") else ("median",):
        assert largest_after(name, aggregation=kind, trim=0.2, **{**hyper, **FIXED.get(name, {})}) < 5
    assert largest_after(name, clip_updates=0.5, **hyper) < 5


@pytest.mark.parametrize("name", [name for name in AVERAGING if name != "ssfl"])  # its mask comes with the first scores
def test_clipping_bounds_the_step_of_a_round(name: str) -> None:
    hyper = {**SPARSE.get(name, {}), **({"pool": 1} if name == "fedtiny" else {})}
    strategy, _, _ = run_method(name, small_task(), rounds=1, clip_updates=0.05, **hyper)
    start: Any = halves(name, **hyper)[0]
    state = start.init(small_task(), [c.device for c in small_clients(5)])
    moved = [strategy.state.params[n].double() - t.double() for n, t in state.params.items()]
    norm = math.sqrt(sum(float(m.square().sum()) for m in moved))
    # the mean of each block is over its senders, so that a step may be longer than a client's
    most = 0.05 * math.sqrt(5) if name == "pfedgate" else 0.05
    assert 0.001 < norm <= most + 1e-6


@pytest.mark.parametrize("name", AVERAGING)
def test_robust_runs_have_one_digest(name: str) -> None:
    options: dict[str, Any] = {
        "aggregation": "median",
        "clip_updates": 0.3,
        "budget": 0.7,
        "rounds": 2,
        **FIXED.get(name, {}),
    }
    runs = [run_method(name, norm_task(), workers=w, **options) for w in (1, 3)]
    digests = {digest(strategy.state, memories) for strategy, memories, _ in runs}
    assert len(digests) == 1
    plain, memories, _ = run_method(name, norm_task(), budget=0.7, rounds=2)
    loose, others, _ = run_method(name, norm_task(), budget=0.7, rounds=2, clip_updates=1e6)
    assert digest(plain.state, memories) == digest(loose.state, others)
    assert digest(plain.state, memories) not in digests


@pytest.mark.parametrize("kind", KINDS)
def test_with_everything_kept_all_are_fedavg(kind: str) -> None:
    plain = {"momentum": 0.0, "weight_decay": 0.0, "lr": 0.05, "epochs": 1, "aggregation": kind, "clip_updates": 0.1}
    want = digest(run_method("fedavg", norm_task(), **plain)[0].state, {})
    assert digest(run_method("fedprox", norm_task(), mu=0.0, **plain)[0].state, {}) == want
    assert digest(run_method("pfedgate", norm_task(), open_gate=True, clip=0.0, **plain)[0].state, {}) == want
    for name in ("fixed_mask", "fedtiny", "ssfl"):
        alone = {"progressive": False, "pool": 1} if name == "fedtiny" else {}
        assert digest(run_method(name, norm_task(), density=1.0, **alone, **plain)[0].state, {}) == want


def test_parts_of_a_nested_model_have_the_median_of_their_holders() -> None:
    task, clients = deep_task(), clients_of(BUDGETS)
    strategy, half = halves(
        "fedtiny", **{**NESTED, "progressive": False, "delta_r": 0, "r_stop": 0}, aggregation="median"
    )
    state = started(strategy, task, clients)
    replies, after = exchanged_by_hand(strategy, half, task, state, clients, {})
    old, kept = unfolded(task, state.params, state.shared.mask)
    new, _ = unfolded(task, after.params, after.shared.mask)
    several = 0
    for name, positions in kept.items():
        sent = []
        for reply in replies:
            held = level_of(state.levels, reply.device) or state
            at = unfolded(task, held.params, held.shared.mask)[1][name]
            sent.append(dict(zip(at.tolist(), reply.packet.tensors[name].flatten().tolist(), strict=True)))
        for i, position in enumerate(positions.tolist()):
            values = [own[position] for own in sent if position in own]
            several += 2 < len(values) < len(replies)
            want = float(np.median(values)) if values else float(old[name][i])
            assert float(new[name][i]) == pytest.approx(want, rel=1e-5)
    assert several


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"aggregation": "krum"}, "unknown aggregation 'krum'"),
        ({"trim": 0.5}, r"trim must be above 0 and below 0.5, got 0.5"),
        ({"clip_updates": -1.0}, "clip_updates must be at least 0, got -1"),
        ({"noise_multiplier": math.inf, "clip_updates": 1.0}, "noise_multiplier must be at least 0, got inf"),
        ({"noise_multiplier": 1.0}, "noise_multiplier = 1 needs clip_updates above 0"),
        ({"noise_multiplier": 1.0, "clip_updates": 1.0, "aggregation": "median"}, 'needs aggregation = "mean"'),
    ],
)
@pytest.mark.parametrize("name", AVERAGING)
def test_options_are_checked(name: str, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        halves(name, **hyper)


@pytest.mark.parametrize("name", AVERAGING)
def test_a_median_needs_three_clients(name: str) -> None:
    strategy, _ = halves(name, aggregation="median", **FIXED.get(name, {}))
    devices, task = [Device(i) for i in range(5)], small_task()
    strategy.init(task, devices)
    with pytest.raises(UserError, match="aggregation = 'median' needs at least 3 clients a round, there are 2"):
        strategy.foresee(task, devices, Plan(fraction=0.4))


def test_a_median_does_not_fit_masks_of_the_clients_own() -> None:
    with pytest.raises(UserError, match="aggregation = 'median' protects nothing while clients change the mask"):
        halves("feddst", aggregation="median")


def test_local_has_nothing_to_aggregate() -> None:
    with pytest.raises(UserError, match="aggregation"):
        halves("local", aggregation="median")


def test_fedtiny_says_what_a_median_does_not_reach() -> None:
    noted = halves("fedtiny", aggregation="median")[0].notes(small_task(), ())
    assert noted == ("aggregation = 'median' is of weights; candidates and new weights go by means of all clients",)
    assert halves("fedtiny", aggregation="median", pool=1, progressive=False)[0].notes(small_task(), ()) == ()
    assert halves("fedtiny")[0].notes(small_task(), ()) == ()


def test_a_reply_knows_its_round() -> None:
    seen: list[int] = []
    strategy: Any = halves("fedavg", batch_size=8)[0]
    plain = strategy.reduce

    def reduce(task: Task, state: Any, replies: Any) -> Any:
        kept: list[Reply] = []

        def watched() -> Any:
            for reply in replies:
                kept.append(reply)
                yield reply

        out = plain(task, state, watched())
        seen.extend(r.round for r in kept)
        return out

    strategy.reduce = reduce
    task, clients = small_task(), small_clients(2)
    with LocalGrid(client_app(task, clients.__getitem__), 2, own_replies=False) as grid:
        for _ in strategy.rounds(grid, 3, task=task, devices=[c.device for c in clients]):
            pass
    assert seen == [1, 1, 2, 2, 3, 3]
