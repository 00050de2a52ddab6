"""Norm layers that stay with the clients ("+FedBN"), for every method with a global mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsparse.errors import UserError
from fedsparse.globalmask import masked_packet, receive
from fedsparse.masked import score_masked
from fedsparse.models.norms import norm_names
from fedsparse.packet import Packet
from fedsparse.runner import digest
from fedsparse.seeding import sample_cohort, torch_rng
from fedsparse.sparse.mean import WeightedMean
from fedsparse.strategy import Reply
from fedsparse.task import Device
from tests.helpers import norm_task, small_clients, small_task
from tests.test_contract import halves, run_method
from tests.test_fine_tuning import MASKED

BATCH_NORM = ("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")
SETTINGS: dict[str, dict[str, Any]] = {
    name: {"density": 0.5, "local_norms": True, **({"delta_r": 1} if name in ("fedtiny", "feddst", "prunefl") else {})}
    for name in MASKED
}


def test_norms_of_any_kind_are_found() -> None:
    assert set(norm_names(norm_task())) == set(BATCH_NORM)
    assert norm_names(small_task()) == ()


def test_without_a_mask_it_is_fedbn() -> None:
    """Against Algorithm 1 of FedBN by hand: everything but the norms is averaged, which start as the model's."""
    strategy, memories, _ = run_method("fixed_mask", norm_task(), density=1.0, local_norms=True)
    _, half = halves("fixed_mask", batch_size=8, density=1.0, local_norms=True)
    task, clients = norm_task(), small_clients(5)
    params, own = task.init_params(), dict[int, dict[str, torch.Tensor]]()
    for turn in (1, 2, 3):
        mean = WeightedMean()
        for i in sample_cohort(range(5), 0.8, 7, turn):
            rng = torch_rng(7, turn, i, "train")
            trained = half.fit(task, clients[i], {**params, **own.get(i, {})}, rng).params
            own[i] = {name: trained[name] for name in BATCH_NORM}
            mean.add({name: t for name, t in trained.items() if name not in BATCH_NORM}, len(clients[i].train))
        params = mean.result(params)
    assert all(torch.equal(strategy.state.params[name], t) for name, t in params.items())
    assert {i: set(m) for i, m in memories.items()} == {i: {f"own/{name}" for name in BATCH_NORM} for i in own}
    assert all(torch.equal(memories[i][f"own/{name}"], t) for i in own for name, t in own[i].items())


@pytest.mark.parametrize("name", MASKED)
def test_they_travel_once_down_and_never_up(name: str) -> None:
    task, clients = norm_task(), {c.device.id: c for c in small_clients(5)}
    strategy, half = halves(name, batch_size=8, **SETTINGS[name])
    state: Any = strategy.scheduled(task, strategy.init(task, [c.device for c in clients.values()]), 4)
    memories: dict[int, Any] = {}
    trained: set[int] = set()
    for turn in range(1, 9):
        replies, stage = [], state.stage
        for device in strategy.invited(state, [clients[i].device for i in sample_cohort(range(5), 0.6, 3, turn)]):
            packet = strategy.broadcast(state, device)
            first = device.id not in trained
            assert stage != "train" or (BATCH_NORM[0] in packet.tensors) == first
            reply, memories[device.id] = half.train(
                task, clients[device.id], packet, memories.get(device.id, {}), torch_rng(0, turn, device.id)
            )
            assert strategy.complaint(task, state, Reply(device, reply)) == ""
            if stage == "train":
                assert not reply.tensors.keys() & set(BATCH_NORM)
                trained.add(device.id)
                foreign = replace(reply, tensors={**reply.tensors, BATCH_NORM[0]: torch.ones(16)})
                assert strategy.complaint(task, state, Reply(device, foreign))
            replies.append(Reply(device, reply))
        before = state.params
        state = strategy.reduce(task, state, replies)
        if stage == "train":
            assert all(torch.equal(before[n], state.params[n]) for n in BATCH_NORM)
    own = [torch.cat([memories[i][f"own/{n}"] for n in BATCH_NORM]) for i in sorted(trained)]
    assert len(own) > 2 and not any(torch.equal(own[0], other) for other in own[1:])


@pytest.mark.parametrize("name", MASKED)
def test_one_digest_and_no_global_model(name: str) -> None:
    digests = set()
    for workers in (1, 3):
        strategy, memories, reports = run_method(name, norm_task(), workers=workers, **SETTINGS[name])
        digests.add(digest(strategy.state, memories))
        rows = [row for report in reports for row in report["rows"] if report["round"]]
        assert all(row["global"] is None for row in rows) and any(row["personal"] is not None for row in rows)
    plain, others, _ = run_method(name, norm_task(), **{**SETTINGS[name], "local_norms": False})
    assert len(digests | {digest(plain.state, others)}) == 2


def test_a_client_deploys_its_own_norms_tuned_or_not() -> None:
    task, client, device = norm_task(), small_clients(1)[0], Device(0)
    strategy, half = halves("fixed_mask", density=0.5, local_norms=True, ft_epochs=1)
    state: Any = strategy.init(task, [device])
    first = strategy.broadcast(state, device)
    reply, memory = half.train(task, client, first, {}, torch_rng("any"))
    kept = state.shared.mask
    trained = {**reply.tensors, **trained_norms(memory)}
    local = half.evaluate(task, client, half.local(first, reply), memory)
    assert local == {"personal": score_masked(task, trained, kept, client.held_out)}
    packet = replace(masked_packet("evaluate", state.params, state.shared.held_by([0]), device))
    tuned = half.tuned(task, client, {**state.params, **trained_norms(memory)}, 1, 0.0, kept)
    assert half.evaluate(task, client, packet, memory)["personal"] == score_masked(task, tuned, kept, client.held_out)


def trained_norms(memory: Any) -> dict[str, torch.Tensor]:
    return {name: memory[f"own/{name}"] for name in BATCH_NORM}


def test_a_model_without_norms_and_a_lost_memory_are_refused() -> None:
    strategy, _ = halves("fixed_mask", density=0.5, local_norms=True)
    with pytest.raises(UserError, match="local_norms = true, but the model has no norm layer"):
        strategy.init(small_task(), [Device(0)])
    task = norm_task()
    state: Any = strategy.init(task, [Device(0)])
    later = masked_packet("train", state.params, state.shared.held_by([0]), Device(0))
    assert isinstance(later, Packet)
    with pytest.raises(UserError, match=r"the packet has no 'bn1\.weight', and this client holds none of its own"):
        receive(task, later, {})


def test_a_client_whose_reply_was_refused_begins_again_with_what_it_gets() -> None:
    """The server, which knows of no norms of its own, sends them again: they count."""
    task, client, device = norm_task(), small_clients(1)[0], Device(0)
    strategy, half = halves("fixed_mask", density=0.5, local_norms=True)
    state: Any = strategy.init(task, [device])
    packet = strategy.broadcast(state, device)
    first, memory = half.train(task, client, packet, {}, torch_rng("any"))
    again, same = half.train(task, client, packet, memory, torch_rng("any"))
    assert all(torch.equal(first.tensors[n], again.tensors[n]) for n in first.tensors)
    assert all(torch.equal(memory[n], same[n]) for n in memory)


def test_norms_that_are_not_finite_are_reported() -> None:
    task, client, device = norm_task(), small_clients(1)[0], Device(0)
    strategy, half = halves("fixed_mask", density=0.5, local_norms=True, lr=1e-9)
    client.train.x[0, 0, 0, 0] = 1e20
    state: Any = strategy.init(task, [device])
    with pytest.raises(UserError, match=r"after training 'bn1\.running_var' is not finite"):
        half.train(task, client, strategy.broadcast(state, device), {}, torch_rng("any"))
