"""Clipping and noise: Flower's mods on whole models, our own on sparse uploads, and the server's on the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsparse.client import client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import ClientError, UserError
from fedsparse.packet import Packet
from fedsparse.privacy import clipping_norm_mod, sparse_dp_mod
from fedsparse.runner import digest
from fedsparse.seeding import numpy_rng, torch_rng
from fedsparse.sparse.codec import pack, pack_bits, unpack_bits
from fedsparse.sparse.masks import whole
from fedsparse.strategy import FederatedStrategy, Plan, Reply
from fedsparse.task import Device, Task
from tests.helpers import norm_task, small_clients, small_task, started
from tests.test_contract import halves

CLIP = 0.05


def updates(
    name: str, mods: Sequence[Any], *, rounds: int = 2, lend: bool = True, task: Task | None = None, **hyper: Any
) -> tuple[list[tuple[Any, Reply]], FederatedStrategy]:
    """All training replies of a run, each with the state before it; copies."""
    task, clients = task or small_task(), small_clients(3)
    strategy: Any = halves(name, batch_size=8, **hyper)[0]
    seen: list[tuple[Any, Reply]] = []
    plain = strategy.reduce

    def reduce(task: Task, state: Any, replies: Any) -> Any:
        def watched() -> Any:
            for reply in replies:
                tensors = {n: t.clone() for n, t in reply.packet.tensors.items()}
                seen.append((state, replace(reply, packet=replace(reply.packet, tensors=tensors))))
                yield reply

        return plain(task, state, watched())

    strategy.reduce = reduce
    with LocalGrid(client_app(task, clients.__getitem__, mods), 3, own_replies=not lend) as grid:
        plan = Plan(seed=7, on_over_budget="record")
        for _ in strategy.rounds(grid, rounds, task=task, devices=[c.device for c in clients], plan=plan):
            pass
    return seen, strategy


def norm(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float((t.double() - before[n].double()).square().sum()) for n, t in tensors.items()))


# --- Flower's mods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lend", [True, False], ids=["lent", "records"])
@pytest.mark.parametrize("mod", [fixedclipping_mod, adaptiveclipping_mod], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_flowers_clipping_mods_work_on_whole_models(name: str, mod: Any, lend: bool) -> None:
    seen, _ = updates(name, [clipping_norm_mod(CLIP), mod], lend=lend)
    plain, _ = updates(name, [], lend=lend)
    assert len(seen) == 6
    for state, reply in seen:
        assert norm(reply.packet.tensors, state.params) == pytest.approx(CLIP, rel=1e-3)
        if mod is adaptiveclipping_mod:
            assert reply.packet.scalars["norm_bit"] == 1
    assert all(norm(reply.packet.tensors, state.params) > 2 * CLIP for state, reply in plain)


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_flowers_local_noise_works_on_whole_models(name: str) -> None:
    before = np.random.get_state()  # noqa: NPY002 - Flower's mod draws from the global generator
    try:
        np.random.seed(0)  # noqa: NPY002
        seen, _ = updates(name, [LocalDpMod(CLIP, sensitivity=0.2, epsilon=4.0, delta=1e-3)], rounds=1)
    finally:
        np.random.set_state(before)  # noqa: NPY002
    want = 0.2 * math.sqrt(2 * math.log(1.25 / 1e-3)) / 4.0
    for state, reply in seen:
        moved = torch.cat([(t - state.params[n]).flatten() for n, t in reply.packet.tensors.items()])
        assert float(moved.std()) == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("budget", [None, 0.5], ids=["as many values", "fewer values"])
@pytest.mark.parametrize("mod", [fixedclipping_mod, LocalDpMod(CLIP, 0.2, 4.0, 1e-3)], ids=["fixed", "local"])
def test_flowers_mods_are_refused_on_sparse_uploads(mod: Any, budget: float | None) -> None:
    """A pFedGate upload of everything has the download's size, but another order."""
    task, clients = small_task(), small_clients(2, budget)
    strategy = halves("pfedgate", batch_size=8)[0]
    app = client_app(task, clients.__getitem__, [clipping_norm_mod(CLIP), mod])
    with LocalGrid(app, 2, own_replies=False) as grid:
        rounds = strategy.rounds(grid, 1, task=task, devices=[c.device for c in clients])
        with pytest.raises(ClientError, match="client 0, round 1, .*need an upload of the download's form"):
            next(rounds)


def test_clipping_norms_must_be_above_zero() -> None:
    with pytest.raises(UserError, match="norm must be above 0, got 0"):
        clipping_norm_mod(0)
    with pytest.raises(UserError, match="clip must be above 0, got 0"):
        sparse_dp_mod(small_task(), 0.0, 1.0)
    with pytest.raises(UserError, match="noise_multiplier must be at least 0, got -1"):
        sparse_dp_mod(small_task(), 1.0, -1.0)


# --- our mod on sparse uploads ---------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {}),
    "fixed_mask": ("fixed_mask", {"density": 0.3}),
    "local norms": ("fixed_mask", {"density": 0.3, "local_norms": True}),
    "fedtiny": ("fedtiny", {"density": 0.3, "pool": 1, "progressive": False}),
    "feddst": ("feddst", {"density": 0.3, "delta_r": 1, "r_stop": 2, "alpha": 0.5}),
    "pfedgate": ("pfedgate", {}),
    "pfedgate changed": ("pfedgate", {"download": "changed"}),
    "pfedgate kept": ("pfedgate", {"download": "kept", "mask_scope": "round"}),
    "pfedgate paper": ("pfedgate", {"mode": "paper"}),
}


def own_update(task: Task, strategy: Any, state: Any, reply: Reply) -> Tensor:
    """What a client changed, (n,): over the places that it sends, found anew from the server's state."""
    tensors = reply.packet.tensors
    if "touched" in tensors:
        cut = strategy.gated.cut
        before = pack(state.params, cut, unpack_bits(tensors["touched"], cut.parts))
        return (tensors["values"].double() - before.double()).flatten()
    if not hasattr(state, "shared"):
        return torch.cat([(t.double() - state.params[n].double()).flatten() for n, t in tensors.items()])
    from fedsparse.globalmask import own_mask

    old = whole(state.params, state.shared.mask, task.shapes)
    mask = {**state.shared.mask, **own_mask(task, reply.packet)}
    moved = []
    for name, t in tensors.items():
        if t.is_floating_point():
            before = old[name].flatten()[mask[name].long()] if name in mask else old[name].flatten()
            moved.append(t.double().flatten() - before.double())
    return torch.cat(moved)


@pytest.mark.parametrize("case", CASES)
def test_sparse_updates_are_clipped_and_their_indices_stay(case: str) -> None:
    name, hyper = CASES[case]
    task = norm_task()
    first = len(small_clients(3))
    plain, _ = updates(name, [], task=task, **hyper)
    clipped, strategy = updates(name, [sparse_dp_mod(task, CLIP, 0.0)], task=task, **hyper)
    for state, reply in clipped:
        assert float(own_update(task, strategy, state, reply).norm()) == pytest.approx(CLIP, rel=1e-3)
    for (state, raw), (_, reply) in zip(plain[:first], clipped[:first], strict=True):  # the same state still
        moved, less = (own_update(task, strategy, state, r) for r in (raw, reply))
        assert float(moved.norm()) > CLIP
        torch.testing.assert_close(less, moved * CLIP / moved.norm(), rtol=1e-3, atol=1e-6)
        assert list(raw.packet.tensors) == list(reply.packet.tensors)
        for key, t in raw.packet.tensors.items():
            assert t.is_floating_point() or torch.equal(t, reply.packet.tensors[key])
        clock = {"train_seconds", "local_seconds"}
        assert {k: v for k, v in raw.packet.scalars.items() if k not in clock} == {
            k: v for k, v in reply.packet.scalars.items() if k not in clock
        }


@pytest.mark.parametrize("case", CASES)
def test_noise_has_its_scale_and_follows_its_path(case: str) -> None:
    name, hyper = CASES[case]
    task, z = norm_task(), 3.0
    clipped, strategy = updates(
        name, [sparse_dp_mod(task, CLIP, 0.0)], rounds=1 + (case == "feddst"), task=task, **hyper
    )
    rounds = 1 + (case == "feddst")
    runs = [
        updates(name, [sparse_dp_mod(task, CLIP, z, secret=secret)], rounds=rounds, task=task, **hyper)[0]
        for secret in ("", "", "mine")
    ]
    noises = []
    for i in range(3):
        parts = [own_update(task, strategy, clipped[i][0], seen[i][1]) for seen in runs]
        assert torch.equal(parts[0], parts[1])
        assert not torch.equal(parts[0], parts[2])
        noise = parts[0] - own_update(task, strategy, *clipped[i])
        n = len(noise)
        assert float(noise.std()) == pytest.approx(z * CLIP, rel=5 / math.sqrt(2 * n))
        assert abs(float(noise.mean())) < 5 * z * CLIP / math.sqrt(n)
        assert float((noise.abs() < z * CLIP).double().mean()) == pytest.approx(0.6827, abs=5 * 0.47 / math.sqrt(n))
        noises.append(noise)
    k = min(len(noise) for noise in noises)
    alike = torch.corrcoef(torch.stack([noise[:k] for noise in noises]))
    assert float((alike - torch.eye(3)).abs().max()) < 5 / math.sqrt(k)  # clients' noises know nothing of each other


def test_rounds_have_noise_of_their_own() -> None:
    task = norm_task()
    seen, strategy = updates("fixed_mask", [sparse_dp_mod(task, 1e-6, 1e6)], task=task, density=0.3)
    noises = torch.stack([own_update(task, strategy, *pair) for pair in seen])
    assert float((torch.corrcoef(noises) - torch.eye(6)).abs().max()) < 5 / math.sqrt(noises.shape[1])


@pytest.mark.parametrize(
    ("name", "hyper", "what"),
    [
        ("fedtiny", {"density": 0.3}, "a reply 'statistics' holds 'statistics'"),
        ("fedtiny", {"density": 0.3, "pool": 1, "delta_r": 1, "r_stop": 2}, "a reply 'update' holds 'top/"),
        ("ssfl", {"density": 0.3}, "a reply 'scores' holds"),
        (
            "prunefl",
            {"density": 0.3, "initial": "magnitude", "delta_r": 1, "r_stop": 2},
            "a reply 'update' holds 'square/",
        ),
    ],
)
def test_what_the_mod_does_not_cover_is_refused(name: str, hyper: dict[str, Any], what: str) -> None:
    task = norm_task()
    with pytest.raises(ClientError, match=f"client 0, round .*sparse_dp_mod covers the model alone, and {what}"):
        updates(name, [sparse_dp_mod(task, CLIP, 1.0)], task=task, **hyper)


def test_a_failed_client_stays_failed() -> None:
    task, clients = small_task(), small_clients(2)
    app = client_app(task, clients.__getitem__, [sparse_dp_mod(task, CLIP, 1.0)])
    strategy = halves("fedavg", lr=1e20, epochs=9)[0]
    with LocalGrid(app, 2, own_replies=False) as grid:
        rounds = strategy.rounds(grid, 1, task=task, devices=[c.device for c in clients])
        with pytest.raises(ClientError, match="client 0, round 1, stage train: the training loss is nan"):
            next(rounds)


# --- noise at the server ---------------------------------------------------------------------------------------------

SERVER: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {}),
    "fedprox": ("fedprox", {}),
    "fixed_mask": ("fixed_mask", {"density": 0.3}),
    "fedtiny": ("fedtiny", {"density": 0.3, "pool": 1, "progressive": False}),
    "feddst": ("feddst", {"density": 0.3, "r_stop": 1}),
    "prunefl": ("prunefl", {"density": 0.3, "initial": "magnitude", "r_stop": 1}),
    "pfedgate": ("pfedgate", {}),
    "pfedgate changed": ("pfedgate", {"download": "changed"}),
}


def one_round(
    case: str, task: Task, noise: float, seed: int = 0, turn: int = 1, clients: int = 3
) -> tuple[Any, Any, list[Reply]]:
    """The state before, after and the replies of a round by hand."""
    name, hyper = SERVER[case]
    strategy, half = halves(name, batch_size=8, clip_updates=CLIP, noise_multiplier=noise, **hyper)
    people = small_clients(clients)
    state = started(strategy, task, people)
    replies = []
    for client in people:
        packet = strategy.broadcast(state, client.device)
        reply, _ = half.train(task, client, packet, {}, torch_rng(seed, client.id))
        replies.append(Reply(client.device, reply, turn))
    return state, strategy.reduce(task, state, replies), replies


def moved(before: Any, after: Any) -> Tensor:
    return torch.cat([(after.params[n].double() - t.double()).flatten() for n, t in before.params.items()])


@pytest.mark.parametrize("case", SERVER)
def test_the_servers_noise_is_on_every_coordinate(case: str) -> None:
    task, z = small_task(), 2.0
    (before, quiet, replies), (_, loud, _), (_, again, _), (_, later, _) = (
        one_round(case, task, noise, turn=turn) for noise, turn in ((1e-9, 1), (z, 1), (z, 1), (z, 2))
    )
    assert digest(loud, {}) == digest(again, {}) != digest(later, {})
    noise = moved(before, loud) - moved(before, quiet)
    scale, n = z * CLIP / len(replies), len(noise)
    assert float(noise.std()) == pytest.approx(scale, rel=5 / math.sqrt(2 * n))
    assert abs(float(noise.mean())) < 5 * scale / math.sqrt(n)
    assert float((noise.abs() < scale * 1e-4).double().mean()) < 0.01  # parts that nobody sent have some too
    if case == "pfedgate changed":
        assert bool((loud.changed == 1).all())  # which parts were trained is not told by what is sent


@pytest.mark.parametrize("name", ["fedavg", "fixed_mask", "pfedgate"])
def test_a_run_that_goes_on_has_the_noise_of_its_rounds(name: str) -> None:
    task, clients = small_task(), small_clients(3)
    hyper: dict[str, Any] = {"batch_size": 8, "clip_updates": CLIP, "noise_multiplier": 1.0}
    devices, plan = [c.device for c in clients], Plan(seed=7)
    states = []
    for stops in ((3,), (2, 3)):
        with LocalGrid(client_app(task, clients.__getitem__), 3, own_replies=False) as grid:
            state, done = None, 0
            for stop in stops:
                strategy: Any = halves(name, **hyper)[0]
                if state is not None:
                    strategy.init(task, devices)
                for _ in strategy.rounds(grid, stop, task=task, devices=devices, plan=plan, state=state, done=done):
                    pass
                state, done = strategy.state, stop
        states.append(digest(state, {}))
    assert states[0] == states[1]


@pytest.mark.parametrize("case", SERVER)
def test_with_noise_all_clients_weigh_the_same(case: str) -> None:
    task = small_task()
    before, after, replies = one_round(case, task, 1e-9)
    strategy: Any = halves(SERVER[case][0], batch_size=8, **SERVER[case][1])[0]
    strategy.init(task, [c.device for c in small_clients(3)])
    total = torch.zeros(sum(t.numel() for t in before.params.values()), dtype=torch.float64)
    for reply in replies:
        if "touched" in reply.packet.tensors:
            cut = strategy.gated.cut
            params = {n: t.double() for n, t in before.params.items()}
            from fedsparse.sparse.codec import unpack

            bits = unpack_bits(reply.packet.tensors["touched"], cut.parts)
            for region, value in unpack(reply.packet.tensors["values"], cut, bits, task.shapes):
                region.put_(params[region.name], value.double())
        else:
            params = {n: reply.packet.tensors[n].double() for n in before.params}
        step = torch.cat([(params[n] - t.double()).flatten() for n, t in before.params.items()])
        total += step * min(1.0, CLIP / float(step.norm()))
    torch.testing.assert_close(moved(before, after), total / len(replies), rtol=1e-3, atol=2e-7)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(["fedavg", "fixed_mask", "pfedgate"]))
def test_one_client_moves_the_mean_by_no_more_than_its_share(seed: int, case: str) -> None:
    """The sensitivity that the noise is for: a client's update against none of it, whatever the others send."""
    task, m = small_task(), 4
    strategy: Any = halves(SERVER[case][0], clip_updates=CLIP, noise_multiplier=1e-9, **SERVER[case][1])[0]
    devices = [Device(i) for i in range(m)]
    state = strategy.init(task, devices)
    size = 10.0 ** float(numpy_rng(seed).integers(-3, 3))

    def reply(i: int, *, absent: bool = False) -> Reply:
        new = {
            n: t if absent else t + size * torch.randn(t.shape, generator=torch_rng(seed, i, n))
            for n, t in state.params.items()
        }
        tensors: dict[str, Tensor] = new
        if case == "pfedgate":
            cut = strategy.gated.cut
            share = 0.0 if absent else 0.3
            kept = cut.forced | (numpy_rng(seed, i, "kept").random(cut.blocks) < share)
            touched = cut.touched(kept)
            tensors = {"values": pack(new, cut, touched), "touched": pack_bits(touched)}
        return Reply(devices[i], Packet("update", tensors, {"weight": 5 + 3 * i}), 1)

    everybody = strategy.reduce(task, state, [reply(i) for i in range(m)])
    without = strategy.reduce(task, state, [reply(i, absent=i == 2) for i in range(m)])
    far = float((moved(state, everybody) - moved(state, without)).norm())
    assert far <= CLIP / m * (1 + 1e-3) + 1e-5
    if case == "pfedgate" and size > 1:  # the mean over senders is why noise needs another one
        loose: Any = halves("pfedgate", clip_updates=CLIP)[0]
        loose.init(task, devices)
        a, b = (
            loose.reduce(task, state, [reply(i, absent=i == 2 and gone) for i in range(m)]) for gone in (False, True)
        )
        assert float((moved(state, a) - moved(state, b)).norm()) > CLIP / m * 1.01


@pytest.mark.parametrize(
    ("name", "hyper", "what"),
    [
        ("ssfl", {}, "scores of all weights"),
        ("feddst", {}, "masks of their own"),
        ("prunefl", {}, "a model that one of them has pruned"),
        ("prunefl", {"initial": "random"}, "squared gradients"),
        ("fedtiny", {}, "statistics and losses of candidates"),
        ("fedtiny", {"pool": 1}, "the largest gradients of pruned weights"),
        ("fedtiny", {"pool": 1, "progressive": False, "nested": True}, "parts of the model"),
        ("pfedgate", {"schedule": "plateau"}, "their validation accuracy"),
    ],
)
def test_noise_on_the_model_alone_is_refused_where_clients_send_more(
    name: str, hyper: dict[str, Any], what: str
) -> None:
    with pytest.raises(UserError, match=f"noise_multiplier covers the model alone, and clients send {what}"):
        halves(name, clip_updates=1.0, noise_multiplier=1.0, **hyper)


def test_noise_needs_a_fixed_number_of_clients_and_no_running_statistics() -> None:
    strategy, _ = halves("fedavg", clip_updates=1.0, noise_multiplier=1.0)
    with pytest.raises(UserError, match="needs engine.on_client_error = \"stop\", got 'skip'"):
        strategy.foresee(small_task(), [Device(0)], Plan(on_client_error="skip"))
    with pytest.raises(UserError, match="makes no sense of batch norm's running statistics"):
        strategy.foresee(norm_task(), [Device(0)], Plan())
    strategy.foresee(small_task(), [Device(0)], Plan())
    local, _ = halves("fixed_mask", clip_updates=1.0, noise_multiplier=1.0, local_norms=True)
    local.foresee(norm_task(), [Device(0)], Plan())
