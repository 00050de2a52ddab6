"""pFedGate: the budget in every batch, modes, scopes and downloads, and the reduction to FedAvg bit by bit."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.fedavg import FedAvgClient
from clients.pfedgate import PFedGateClient
from experiments import swap
from fedsparse.errors import UserError
from fedsparse.experiment import from_dict, load_experiment
from fedsparse.gating import Choice
from fedsparse.models import build_model
from fedsparse.models import gated as gated_module
from fedsparse.models.gated import Gated, Layout, gated_model
from fedsparse.packet import Packet, decode, encode, same
from fedsparse.runner import federation_of, run
from fedsparse.seeding import torch_rng
from fedsparse.sgd import batches
from fedsparse.sparse.codec import pack_bits, unpack_bits
from fedsparse.sparse.cut import Bools
from fedsparse.sparse.mean import WeightedMean
from fedsparse.strategy import Plan, Reply
from fedsparse.task import Budget, Client, Device, Split, Task
from strategies.fedavg import FedAvg
from strategies.pfedgate import GateState, PFedGate

SGD = {"lr": 0.1, "batch_size": 8, "momentum": 0.9, "weight_decay": 0.01, "clip": 1.0}
OPTIONS = {**SGD, "blocks_per_layer": 6, "gate_pool": 4}
Memory = dict[str, Tensor]


@lru_cache(maxsize=16)
def make_task(name: str = "mlp", shape: tuple[int, ...] = (1, 8, 8), width: float = 0.5, norm: str = "batch") -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Task(build_model(name, shape, 4, width=width, norm=norm), shape, 4, seed=7)


@lru_cache(maxsize=1)
def make_tokens_task() -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Task(build_model("charlstm", (12,), 20, width=0.25, vocabulary=20), (12,), 20, seed=7, vocabulary=20)


def make_client(task: Task, number: int = 0, density: float | None = None, n: int = 27) -> Client:
    rng = torch_rng("data", number)
    y = torch.randint(task.classes, (n,), generator=rng)
    if task.tokens:
        x = torch.randint(task.vocabulary, (n, *task.input_shape), generator=rng)
        x[:, -1] = y
    else:
        x = torch.randn(n, *task.input_shape, generator=rng) + y.view(-1, *[1] * len(task.input_shape))
    data = Split(x, y)
    return Client(Device(number, Budget(density=density)), data, data, data)


def half_of(**options: object) -> PFedGateClient:
    return PFedGateClient(**{**OPTIONS, **options})


def gated_of(task: Task, **options: object) -> Gated:
    return gated_model(task, half_of(**options).layout)


def train(
    task: Task, client: Client, packet: Packet | None = None, memory: Memory | None = None, **options: object
) -> tuple[Packet, Memory]:
    packet = packet or Packet("train", task.init_params())
    return half_of(**options).train(task, client, packet, memory or {}, torch_rng("train", client.id))


def server_of(task: Task, clients: list[Client], **options: object) -> tuple[PFedGate, GateState]:
    server = PFedGate(client_config={**OPTIONS, **options})
    state = server.scheduled(task, server.init(task, [c.device for c in clients]), 10)
    assert isinstance(state, GateState)
    return server, state


def play(
    task: Task, clients: list[Client], rounds: int, cohort: object = None, **options: object
) -> tuple[PFedGate, GateState, dict[int, Memory], list[Packet]]:
    """Rounds without an engine; ``cohort(round)`` names the clients of a round. The last value: all replies."""
    server, state = server_of(task, clients, **options)
    half, memories, replies = half_of(**options), {c.id: {} for c in clients}, []
    for number in range(rounds):
        answers = []
        for client in clients:
            if cohort is not None and client.id not in cohort(number):
                continue
            packet = decode(encode(server.broadcast(state, client.device)))
            rng = torch_rng("round", number, client.id)
            reply, memories[client.id] = half.train(task, client, packet, memories[client.id], rng)
            assert server.complaint(task, state, Reply(client.device, reply)) == ""
            answers.append(Reply(client.device, reply))
        state = server.reduce(task, state, iter(answers))
        replies += [a.packet for a in answers]
    return server, state, memories, replies


# --- the gate --------------------------------------------------------------------------------------------------------


def test_an_untrained_gate_is_near_one_half_and_the_same_for_all() -> None:
    task = make_task()
    x = torch.randn(64, 1, 8, 8, generator=torch_rng("x"))
    first = gated_of(task)
    gated_module.gated_model.cache_clear()
    again = gated_of(task).gate.init_params()
    assert all(torch.equal(a, b) for a, b in zip(first.gate.init_params().values(), again.values(), strict=True))
    for values in first.gate.model.train()(x):
        assert values.shape == (first.cut.blocks,)
        assert ((values > 0.45) & (values < 0.55)).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (6, 20), (13,), (1,)])
def test_a_single_example_has_finite_gates(shape: tuple[int, ...]) -> None:
    task = make_task("mlp", shape)
    reply, memory = train(task, make_client(task, n=1))
    assert torch.isfinite(reply.tensors["values"]).all()
    assert all(torch.isfinite(t).all() for t in memory.values())


def test_the_gate_learns_and_is_remembered() -> None:
    task = make_task()
    start = gated_of(task).gate.init_params()
    client = make_client(task, 1, 0.6)
    _reply, memory = train(task, client)
    assert {n.removeprefix("gate/") for n in memory if n.startswith("gate/")} == set(start)
    moved = [n for n in start if not torch.equal(memory[f"gate/{n}"], start[n])]
    assert set(moved) >= {n for n in start if "post_norm" in n and "running" not in n}
    _, later = train(task, client, memory=memory)
    assert any(not torch.equal(later[f"gate/{n}"], memory[f"gate/{n}"]) for n in moved)
    trained = gated_of(task).gate.trainable
    _, frozen = train(task, client, gate_lr=0.0)
    assert all(torch.equal(frozen[f"gate/{n}"], start[n]) for n in trained)
    _server, _state, _, replies = play(task, [client], 6, epochs=3)
    assert replies[-1].scalars["loss"] < 0.7 * replies[0].scalars["loss"]


@pytest.mark.parametrize(
    "options",
    [
        {"branches": "shared"},
        {"share_pre_norm": True},
        {"gate_pre_norm": "none"},
        {"gate_post_norm": "none"},
        {"gate_post_norm": "layer"},
        {"gate_bound": "none"},
        {"gate_start": 0.9},
        {"gate_input": "client"},
        {"score_noise": 0.3},
        {"score_smoothing": 0.5},
        {"score": "random_client"},
        {"score": "random_batch"},
        {"solver": "greedy_value"},
        {"solver": "greedy_ratio"},
        {"inference": "batch"},
        {"inference": "sample"},
        {"mode": "paper"},
        {"mode": "paper", "straight_through": "kept"},
        {"mode": "official"},
        {"mode": "official", "branches": "separate", "relu_logits": True},
    ],
    ids=lambda o: " ".join(map(str, o.values())),
)
def test_every_option_trains_and_repeats(options: dict[str, object]) -> None:
    task = make_task("cnn")
    client = make_client(task, 1, 0.7)
    first, memory = train(task, client, **options)
    second, again = train(task, client, **options)
    assert same(first, second)
    assert all(torch.equal(memory[k], again[k]) for k in memory)
    assert torch.isfinite(first.tensors["values"]).all()
    scores = half_of(**options).evaluate(task, client, Packet("evaluate", task.init_params()), memory)
    assert scores["personal"].n == len(client.test)
    plain, _ = train(task, client)
    if options.keys() & {"inference", "solver"} == set():  # blocks of equal size: one answer for all solvers
        assert not same(first, plain)


def test_smoothed_importances_are_a_running_mean_and_hold_the_mask_still() -> None:
    task = make_task("cnn")
    client = make_client(task, 1, 0.5, n=160)
    _, plain = train(task, client, gate_lr=0.0)
    _, smooth = train(task, client, gate_lr=0.0, score_smoothing=0.9)
    mixed = [int(((m["mask/used"] > 0) & (m["mask/used"] < 1)).sum()) for m in (plain, smooth)]
    assert mixed[1] < mixed[0]  # blocks that some batches used and others did not
    assert "mask/scores" not in plain
    half, gated = half_of(gate_lr=0.0, score_smoothing=0.9), gated_of(task)
    gate, want = gated.gate.init_params(), None
    for batch in batches(160, 8, 1, torch_rng("train", 1)):
        with gated.gate.bound(gate) as network, torch.no_grad():
            network.train()
            fresh = network(client.train.x[batch])[1].double()
        want = fresh if want is None else 0.9 * want + 0.1 * fresh
    torch.testing.assert_close(smooth["mask/scores"], want, rtol=1e-5, atol=1e-7)
    scene = half._scene(task, client, Packet("evaluate", task.init_params()), smooth)
    kept, _ = half._client_wide(scene)
    assert np.array_equal(kept, half._choice(scene).kept(want.numpy()))
    with pytest.raises(UserError, match=r"score_smoothing must be in \[0, 1\), got 1.0"):
        half_of(score_smoothing=1.0)


# --- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18"])
@settings(max_examples=8)
@given(density=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_true_density_is_within_the_budget_in_every_batch(name: str, density: float, seed: int) -> None:
    """Counted here from the masks that the batches really used, gate and forced blocks included."""
    task = make_task(name, (1, 8, 8), 0.1 if name == "resnet18" else 0.5)
    gated = gated_of(task)
    client = make_client(task, seed, density, n=20)
    smallest = (gated.smallest["parameters"] + gated.gate_size) / gated.dense
    if density < smallest:
        with pytest.raises(UserError, match=f"client {seed}: budget .* is below the smallest possible model"):
            train(task, client)
        return
    reply, memory = train(task, client)
    assert sum(memory[f"gate/{n}"].numel() for n in gated.gate.trainable) == gated.gate_size
    assert smallest <= reply.scalars["density_true"] <= density
    assert smallest - 1e-12 <= reply.scalars["density_mean"] <= reply.scalars["density_true"] + 1e-12
    forward = reply.scalars["forward_macs"]
    assert 0 < forward <= sum(layer.macs for layer in gated.layers) + gated.gate_macs
    cut = gated.cut
    rest = cut.everything & ~np.eye(cut.blocks, dtype=bool)  # all but one
    largest = max(
        cut.spent(cut.everything) - cut.spent(kept) for kept, must in zip(rest, cut.forced, strict=True) if not must
    )
    used = reply.scalars["density_true"]
    assert used == 1 or used > density - (largest + 1) / gated.dense  # up to one block


def test_the_smallest_budget_that_the_message_names_works() -> None:
    task = make_task()
    with pytest.raises(UserError, match=r"client 3: budget 0\.01 is below the smallest possible model 0") as error:
        train(task, make_client(task, 3, 0.01))
    named = float(str(error.value).split("model ")[1].split()[0])
    reply, _ = train(task, make_client(task, 3, named))
    assert reply.scalars["density_true"] <= named
    strategy = PFedGate(client_config=OPTIONS)
    with pytest.raises(UserError, match=r"client 3: budget 0\.01"):
        strategy.init(task, [Device(0, Budget(1.0)), Device(3, Budget(0.01))])


@pytest.mark.parametrize("others", [(0.5,), (1.0, 0.35), (0.6, 0.02)])
def test_of_budgets_that_are_too_small_the_smallest_is_named(others: tuple[float, ...]) -> None:
    """Also where the finest cut, whose gate is the largest, would not fit the others either."""
    task = make_task("mlp", (1, 8, 8), 8.0)
    devices = [Device(i, Budget(density)) for i, density in enumerate((*others, 0.01))]
    with pytest.raises(UserError, match=rf"client {len(others)}: budget 0\.01 is below") as error:
        PFedGate().init(task, devices)
    named = float(str(error.value).split("model ")[1].split()[0])
    assert named < min(d for d in others if d != 0.02)
    PFedGate().init(task, [*devices[:1], Device(9, Budget(named))])
    with pytest.raises(UserError, match="client 9"):
        PFedGate().init(task, [*devices[:1], Device(9, Budget(named * 0.99))])


def test_groups_become_small_enough_for_the_smallest_budget() -> None:
    task = make_task("mlp", (1, 8, 8), 4)
    devices = [Device(0, Budget(1.0)), Device(1, Budget(0.15))]
    with pytest.raises(UserError, match="client 1"):
        train(task, make_client(task, 1, 0.15), blocks_per_layer=4, max_block_frac=1.0)
    server = PFedGate(client_config={**OPTIONS, "blocks_per_layer": 4, "max_block_frac": 1.0})
    state = server.init(task, devices)
    assert isinstance(state, GateState)
    assert state.groups > 4
    packet = server.broadcast(state, devices[1])
    reply, _ = train(task, make_client(task, 1, 0.15), packet, blocks_per_layer=4, max_block_frac=1.0)
    assert reply.scalars["density_true"] <= 0.15
    assert server.complaint(task, state, Reply(Device(0), reply)) == ""


def test_without_a_budget_every_block_is_kept() -> None:
    task = make_task()
    reply, _ = train(task, make_client(task))
    gated = gated_of(task)
    assert unpack_bits(reply.tensors["touched"], gated.cut.parts).all()
    assert reply.scalars["density_true"] == 1 + gated.gate_size / gated.dense


@pytest.mark.parametrize("density", [0.3, 0.6])
@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_what_a_batch_computes_with_is_counted_and_fits(
    name: str, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the tensors that each batch's network really holds, beside the gate; not from what is reported."""
    task, sizes = make_task(name, (1, 8, 8), 0.1 if name == "resnet18" else 0.5), []

    def counting(module: torch.nn.Module, *rest: object) -> None:
        sizes.append(sum(p.numel() for m in task.model.modules() for p in m._parameters.values() if p is not None))

    gated_of(task)  # costs are traced with a copy of the model, once
    hook = task.model.register_forward_pre_hook(counting)
    reply, memory = train(task, make_client(task, 3, density, n=40))
    hook.remove()
    gate = sum(memory[f"gate/{name}"].numel() for name in gated_of(task).gate.trainable)
    dense = sum(p.numel() for p in task.model.parameters())
    assert len(sizes) > 1
    assert max(sizes) + gate <= density * dense
    assert reply.scalars["density_true"] == pytest.approx((max(sizes) + gate) / dense)


def test_budgets_of_multiply_adds_and_of_upload_bytes_hold() -> None:
    task = make_task("cnn")
    gated = gated_of(task)
    full = gated.cut.spent(gated.cut.everything, "multiply_adds")
    client = make_client(task, 1)
    macs = replace(client, device=Device(1, Budget(forward_macs=0.4 * full)))
    reply, _ = train(task, macs)
    assert 0.2 * full < reply.scalars["forward_macs_max"] <= 0.4 * full
    dense = Packet("update", task.init_params()).nbytes
    upload = replace(client, device=Device(1, Budget(bytes_up=dense // 2)))
    reply, _ = train(task, upload, mask_scope="round")
    assert 0.3 * dense < reply.nbytes <= dense // 2
    with pytest.raises(UserError, match='client 1 has a budget for its upload, which mask_scope = "batch"'):
        PFedGate(client_config=OPTIONS).init(task, [upload.device])
    both = replace(client, device=Device(1, Budget(density=0.5, forward_macs=0.4 * full)))
    reply, _ = train(task, both)
    assert reply.scalars["forward_macs_max"] <= 0.4 * full
    assert reply.scalars["density_true"] <= 0.5


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"), [("mlp", "structural"), ("cnn", "structural"), ("cnn", "paper"), ("tokens", "structural")]
)
def test_untouched_weights_keep_their_bits_and_touched_ones_move(name: str, mode: str) -> None:
    task = make_tokens_task() if name == "tokens" else make_task(name)
    options = {"mode": mode, "gate_pool": 0 if name == "tokens" else 4}
    old, cut = task.init_params(), gated_of(task, **options).cut
    reply, _ = train(task, make_client(task, 1, 0.6), **options)
    touched = unpack_bits(reply.tensors["touched"], cut.parts)
    assert not touched.all()
    half = half_of(**options)
    merged = half.local(Packet("train", old), reply)
    own = half._scene(task, make_client(task), merged, {}).whole()
    inside = {n: torch.zeros_like(t, dtype=torch.bool) for n, t in old.items()}
    for region in cut.regions(touched):
        region.put_(inside[region.name], torch.ones_like(region.take(inside[region.name])))
    for n in task.trainable:
        assert torch.equal(own[n][~inside[n]], old[n][~inside[n]]), n
    moved = sum(int((own[n][inside[n]] != old[n][inside[n]]).sum()) for n in task.trainable)
    assert moved > 0.05 * sum(int(inside[n].sum()) for n in task.trainable)
    assert reply.tensors["values"].numel() < sum(t.numel() for t in old.values())


@pytest.mark.parametrize("mode", ["structural", "paper"])
def test_same_rng_same_reply_and_nobody_writes_into_packet_or_memory(mode: str) -> None:
    task = make_task("cnn")
    client = make_client(task, 2, 0.5)
    _, memory = train(task, client, mode=mode)
    packet = Packet("train", task.init_params())
    before, kept = {n: t.clone() for n, t in packet.tensors.items()}, {n: t.clone() for n, t in memory.items()}
    one, first = train(task, client, packet, memory, mode=mode)
    two, second = train(task, client, decode(encode(packet)), memory, mode=mode)
    assert same(one, two)
    assert all(torch.equal(first[n], second[n]) for n in first)
    half = half_of(mode=mode)
    half.evaluate(task, client, packet, memory)
    half.evaluate(task, client, half.local(packet, one), memory)
    assert all(torch.equal(before[n], packet.tensors[n]) for n in before)
    assert all(torch.equal(kept[n], memory[n]) for n in kept)
    assert same(one, decode(encode(one)))


def test_evaluation_points() -> None:
    """local: the client's own weights; personal: new weights, own gate, one mask in budget; global: no gate."""
    task = make_task()
    client, half = make_client(task, 1, 0.6), half_of()
    server, state = server_of(task, [client])
    packet = replace(server.broadcast(state, client.device), kind="evaluate")
    reply, memory = train(task, client, epochs=8)
    untrained = half.evaluate(task, client, packet, {})
    assert set(untrained) == {"personal", "global"}
    assert untrained["global"] == task.score(packet.tensors, client.held_out)
    assert untrained["personal"].n == len(client.held_out)
    local = half.evaluate(task, client, half.local(packet, reply), memory)
    assert set(local) == {"personal"}
    assert local["personal"].loss < untrained["personal"].loss
    alone = server.reduce(task, state, [Reply(client.device, reply)])
    assert half.evaluate(task, client, Packet("evaluate", alone.params), memory)["personal"] == local["personal"]


def test_inference_by_batch_and_by_sample() -> None:
    """Batches of nine (a third of the examples) and of one are what one passes by hand; a client's mask is neither."""
    task = make_task()
    client = make_client(task, 1, 0.6)
    _, memory = train(task, client)
    packet = Packet("evaluate", task.init_params())
    found = {}
    for inference in ("client", "batch", "sample"):
        half = half_of(inference=inference, batch_size=9)
        found[inference] = half.evaluate(task, client, packet, memory)["personal"].loss
    half = half_of()
    scene = half._scene(task, client, packet, memory)
    choice, gate = half._choice(scene), {n[5:]: t for n, t in memory.items() if n.startswith("gate/")}
    for inference, size in (("batch", 9), ("sample", 1)):
        losses = []
        for x, y in zip(client.test.x.split(size), client.test.y.split(size), strict=True):
            work = scene.gated.cut.working(task, packet.tensors, train=False)
            kept, gates = choice.evaluated(gate, x)
            work.use(kept)
            with torch.no_grad():
                losses.append(float(task.criterion(work.forward(gates, x), y)))
        assert found[inference] == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert len(set(found.values())) == 3


# --- modes -----------------------------------------------------------------------------------------------------------


def test_the_paper_counts_the_model_alone_and_gives_dropped_blocks_a_gradient() -> None:
    task = make_task("cnn")
    gated = gated_of(task, mode="paper")
    reply, memory = train(task, make_client(task, 1, 0.4), mode="paper")
    assert gated.flat
    assert reply.scalars["density_true"] - gated.gate_size / gated.dense <= 0.4
    _, kept_only = train(task, make_client(task, 1, 0.4), mode="paper", straight_through="kept")
    used = memory["mask/used"] == 0  # blocks that no batch kept
    assert used.any()
    start = gated.gate.init_params()
    names = [n for n in start if n.startswith("importance") and n.endswith("post_norm.bias")]
    decay = {"weight_decay": 0.0}
    _, full = train(task, make_client(task, 1, 0.4), mode="paper", epochs=1, **decay)
    _, kept_only = train(task, make_client(task, 1, 0.4), mode="paper", straight_through="kept", **decay)
    never = (full["mask/used"] == 0) & (kept_only["mask/used"] == 0)
    assert never.any()
    for n in names:
        assert (full[f"gate/{n}"][never] != start[n][never]).any()
        assert torch.equal(kept_only[f"gate/{n}"][never], start[n][never])


def test_official_sends_everything_keeps_momentum_and_breaks_small_budgets_as_published() -> None:
    task = make_task("cnn")
    client = make_client(task, 1, 0.3)
    gated = gated_of(task, mode="official", branches="auto")
    reply, memory = train(task, client, mode="official", blocks_per_layer=5)
    assert unpack_bits(reply.tensors["touched"], gated_of(task, mode="official", blocks_per_layer=5).cut.parts).all()
    assert sum(n.startswith("velocity/") for n in memory) == len(task.trainable)
    assert sum(n.startswith("gate_velocity/") for n in memory) == len(gated.gate.trainable)
    again, _ = train(task, client, memory=memory, mode="official", blocks_per_layer=5)
    fresh = {n: t for n, t in memory.items() if "velocity" not in n}
    other, _ = train(task, client, memory=fresh, mode="official", blocks_per_layer=5)
    assert not same(again, other)
    tight, _ = train(task, make_client(task, 1, 0.1), mode="official", blocks_per_layer=5)
    gate = gated_of(task, mode="official", blocks_per_layer=5).gate_size / gated.dense
    assert tight.scalars["density_true"] - gate == pytest.approx(0.2, abs=0.01)


# --- scopes and downloads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scope"), [("cnn", "round"), ("cnn", "client"), ("resnet18", "round"), ("tokens", "client")]
)
def test_all_downloads_give_the_same_bits(scope: str, name: str) -> None:
    """With one mask a round what a client is not sent it does not use: state, gates and scores are the same."""
    if name == "tokens":
        task = make_tokens_task()
    else:
        task = make_task(name, (1, 8, 8), 0.1 if name == "resnet18" else 0.5)
    pool = {"gate_pool": 0} if name == "tokens" else {}
    clients = [make_client(task, i, d) for i, d in enumerate((0.5, 0.6, 0.9))]
    found = {}
    for download in ("all", "changed", "kept"):
        options = {"mask_scope": scope, "download": download, "settle": 2, **pool}
        server, state, memories, replies = play(task, clients, 4, lambda r: {0, 1 + r % 2}, **options)
        scores = []
        for client in clients:
            packet = replace(decode(encode(server.broadcast(state, client.device))), kind="evaluate")
            scores.append(half_of(**options).evaluate(task, client, packet, memories[client.id])["personal"])
        gates = {(i, n): t for i, m in memories.items() for n, t in m.items() if not n.startswith("theta/")}
        found[download] = state.params, gates, scores, replies
    for download in ("changed", "kept"):
        for n, t in found["all"][0].items():
            assert torch.equal(t, found[download][0][n]), (download, n)
        assert found["all"][1].keys() == found[download][1].keys()
        assert all(torch.equal(t, found[download][1][k]) for k, t in found["all"][1].items())
        assert found["all"][2] == found[download][2]


def test_sparse_downloads_are_smaller_and_bounded_by_the_budget() -> None:
    task = make_task("mlp", (1, 8, 8), 16)
    clients = [make_client(task, i, 0.3) for i in range(3)]
    dense = Packet("train", task.init_params()).nbytes
    for download in ("kept", "changed"):
        server, state, _, replies = play(task, clients, 3, mask_scope="round", download=download)
        down = server.broadcast(state, clients[0].device).nbytes
        assert max(r.nbytes for r in replies) <= 0.32 * dense
        assert down <= (0.32 if download == "kept" else 0.95) * dense
        assert state.trained.float().mean() < 1


def test_one_mask_a_round_and_one_a_client() -> None:
    task = make_task("cnn")
    clients = [make_client(task, i, 0.6) for i in range(2)]
    for scope, settled in (("round", None), ("client", 2)):
        masks = []
        for rounds in range(1, 7):
            _, _, memories, _replies = play(task, clients, rounds, mask_scope=scope, settle=2, gate_lr=2.0)
            masks.append(memories[0]["mask/next"])
            assert set(memories[0]["mask/used"].tolist()) <= {0.0, 1.0}
        changes = [not torch.equal(a, b) for a, b in itertools.pairwise(masks)]
        if settled is None:
            assert any(changes[1:])
        else:
            assert not any(changes[settled - 1 :])


def test_a_client_that_was_away_catches_up() -> None:
    """download = "changed": whatever a client missed, what it then holds is the server's model."""
    task = make_task("cnn")
    clients = [make_client(task, i, 0.5) for i in range(4)]
    cohorts = [{0, 1}, {1, 2}, {3}, {0, 3}, {0, 1, 2, 3}]
    server, state, memories, _ = play(task, clients, 5, cohorts.__getitem__, download="changed")
    for client in clients:
        packet = decode(encode(server.broadcast(state, client.device)))
        scene = half_of(download="changed")._scene(task, client, packet, memories[client.id])
        own = scene.whole()
        assert all(torch.equal(own[n], t) for n, t in state.params.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_lr": -1.0}, "gate_lr must be at least 0, got -1.0"),
        ({"branches": "three"}, "unknown branches 'three'"),
        ({"max_block_frac": 1.5}, r"max_block_frac must be in \(0, 1\], got 1.5"),
        ({"blocks_per_layer": 0}, "blocks_per_layer must be above 0, got 0"),
        ({"mode": "papers"}, "unknown mode 'papers'; did you mean 'paper'"),
        ({"mode": "official", "blocks_per_layer": 1}, "masks every block"),
        ({"mode": "official", "mask_scope": "round"}, 'mode = "official" has mask_scope = "batch" only'),
        ({"relu_logits": True}, "relu_logits is the official code's"),
        ({"straight_through": "full"}, 'straight_through = "full" needs mode = "paper"'),
        ({"download": "kept"}, 'download = "kept" needs mask_scope "round" or "client"'),
        ({"download": "kept", "mask_scope": "round", "mode": "paper"}, 'download = "kept" needs mode = "structural"'),
        ({"inference": "batch", "mask_scope": "round"}, "inference = 'batch' needs mask_scope = \"batch\""),
        ({"mode": "paper", "blocks_per_layer": 1}, 'mode = "paper" with blocks_per_layer = 1 keeps every block'),
        ({"mode": "official", "solver": "greedy_value"}, "leave out solver = 'greedy_value'"),
        ({"share_pre_norm": True, "branches": "shared"}, 'share_pre_norm needs branches = "separate"'),
        ({"open_gate": True, "mask_scope": "round", "download": "kept"}, "open_gate keeps every block"),
        ({"gate_lr": float("inf")}, "gate_lr must be at least 0, got inf"),
        ({"score": "random_batch", "mask_scope": "client"}, 'score = "random_batch" needs mask_scope = "batch"'),
        ({"gate_input": "client", "inference": "sample"}, "inference = 'sample' needs gate_input = \"batch\""),
        ({"class_gates": True, "mode": "paper"}, "class_gates needs mode = \"structural\", got mode = 'paper'"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        half_of(**options)


def test_what_cannot_work_is_refused_before_round_one() -> None:
    task = make_task("logistic")
    with pytest.raises(UserError, match="pFedGate cannot cut"):
        PFedGate().init(task, [Device(0)])
    small = make_task("mlp", (3, 32, 32), 0.1)
    with pytest.raises(UserError, match=r"the gate has \d+ parameters, more than the model \(\d+\); it has one output"):
        PFedGate(client_config={"mode": "official"}).init(make_task("cnn1d", (6, 125), 0.05), [Device(0)])
    PFedGate(client_config={"gate_pool": 2}).init(small, [Device(0)])
    memory = Device(4, Budget(memory=10**6))
    for options in ({}, {"mask_scope": "round"}):
        with pytest.raises(UserError, match="client 4 has a memory budget"):
            PFedGate(client_config=options).init(make_task("cnn"), [memory])
    with pytest.raises(UserError, match="client 4 has a memory budget: with mask_scope = 'batch'"):  # and far too small
        PFedGate().init(make_task("cnn"), [Device(4, Budget(memory=10))])
    with pytest.raises(UserError, match="client 5 has a budget for its upload"):
        PFedGate().init(make_task("cnn"), [Device(5, Budget(bytes_up=10))])
    with pytest.raises(UserError, match='client 4 has a memory budget, which needs mode = "structural"'):
        PFedGate(client_config={"mode": "paper"}).init(make_task("cnn"), [memory])
    with pytest.raises(UserError, match="schedule = 'linear' needs budgets of density"):
        PFedGate(schedule="linear").init(make_task("cnn"), [Device(0)])
    with pytest.raises(UserError, match="cost = 'multiply_adds' needs devices with a budget of it"):
        PFedGate(client_config={"cost": "multiply_adds"}).init(make_task("cnn"), [Device(0)])
    with pytest.raises(UserError, match="schedule = 'linear' needs mask_scope"):
        PFedGate(schedule="linear", client_config={"mask_scope": "round"})
    with pytest.raises(UserError, match="unknown schedule 'cubik'; did you mean 'cubic'"):
        PFedGate(schedule="cubik")
    with pytest.raises(UserError, match="schedule_from and schedule_until must be shares"):
        PFedGate(schedule_from=0.5, schedule_until=0.5)


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_what_breaks_budgets_in_every_round_is_refused_unless_it_is_recorded(mode: str) -> None:
    task, device = make_task("cnn"), Device(2, Budget(0.2))
    server = PFedGate(client_config={"mode": mode})
    server.init(task, [device])
    with pytest.raises(
        UserError, match=f"client 2: mode = '{mode}' needs density .* above its budget 0.2; set budget.on"
    ):
        server.foresee(task, [device], Plan())
    server.foresee(task, [device], Plan(on_over_budget="record"))
    work = Device(1, Budget(forward_macs=1e6))
    with pytest.raises(UserError, match="client 1 has a budget of multiply-adds, but mode"):
        server.foresee(task, [work], Plan())
    opened = PFedGate(client_config={"open_gate": True})
    opened.init(task, [device])
    with pytest.raises(UserError, match="open_gate keeps every block, and client 2 has budget 0.2"):
        opened.foresee(task, [device], Plan())
    whole = PFedGate(client_config={"open_gate": True, "mode": mode})
    whole.init(task, [Device(2, Budget(1.0))])
    whole.foresee(task, [Device(2, Budget(1.0))], Plan())  # all of the model is no more than all of it


def test_notes_name_a_heavy_gate_and_budgets_without_a_choice() -> None:
    """With the official chunks a budget of 0.3 keeps one and the same mask; with channel groups it does not."""
    task, devices = make_task("leafcnn1", (1, 28, 28), 1.0), [Device(0, Budget(0.3))]
    official = PFedGate(client_config={"mode": "official"})
    official.init(task, devices)
    (note,) = official.notes(task, devices)
    # a tenth of what competes in linear layers is the spare budget, and all chunks but those of fc1.weight fit
    cut = official.gated.cut
    free = [t for t in cut.tensors if t.name.startswith(("fc1", "output"))]
    spare = round((0.3 - 0.2) * sum(sum(t.sizes[1:]) for t in free))
    left = spare - sum(sum(t.sizes[1:]) for t in free if t.name != "fc1.weight")
    assert note == (
        "a budget (0.3 of density) leaves no choice: random importances all keep the same blocks; the smallest dropped"
        f" one takes 419428 parameters; blocks of at most {left} would do: set method.blocks_per_layer"
    )
    finer = PFedGate(client_config={"mode": "official", "blocks_per_layer": 2_097_152 // left + 1})
    finer.init(task, devices)
    assert not any("no choice" in note for note in finer.notes(task, devices))
    coarse = PFedGate(client_config={"gate_pool": 7, "blocks_per_layer": 2, "max_block_frac": 1.0})
    coarse.init(task, devices)
    (note,) = coarse.notes(task, devices)
    cut, half = coarse.gated.cut, coarse._half
    kept = half.choice(coarse.gated, devices[0], 0.3).first()
    left = int(0.3 * coarse.gated.dense) - coarse.gated.gate_size - cut.spent(kept)
    more = [cut.spent(kept | (np.arange(cut.blocks) == i)) - cut.spent(kept) for i in np.flatnonzero(~kept)]
    assert f"the smallest dropped one takes {min(more)} parameters; blocks of at most {left} would do: set" in note
    server = PFedGate(client_config={"gate_pool": 7})
    server.init(task, devices)
    assert server.notes(task, devices) == ()
    heavy = PFedGate(client_config={})
    heavy.init(make_task("mlp", (64,)), [Device(0)])
    (note,) = heavy.notes(make_task("mlp", (64,)), [Device(0)])
    assert "% of the model's parameters; to make it smaller, set fewer blocks (method.blocks_per_layer, " in note
    assert note.endswith('method.max_block_frac) or method.branches = "shared"')  # flat inputs are not pooled


@pytest.mark.parametrize(
    ("s", "blocks", "remedy"),
    [(0.1, 5, "a budget above 0.1"), (0.1, 10, "a budget above 0.1"), (0.15, 5, "method.blocks_per_layer above 6")],
)
def test_the_official_budget_may_have_nothing_to_spare(s: float, blocks: int, remedy: str) -> None:
    task, devices = make_task("leafcnn1", (1, 28, 28), 1.0), [Device(0, Budget(s))]
    server = PFedGate(client_config={"mode": "official", "blocks_per_layer": blocks})
    server.init(task, devices)
    (note,) = server.notes(task, devices)
    assert note.endswith(f"of it nothing is left above the share {s:g} that is always kept: set {remedy}")


def test_ways_to_a_smaller_gate_are_those_that_there_are() -> None:
    server = PFedGate(client_config={"mode": "official", "blocks_per_layer": 64})
    with pytest.raises(UserError, match=r"more than the model .*: set fewer blocks \(method.blocks_per_layer\)$"):
        server.init(make_task("mlp", (64,), 0.25), [Device(0)])
    server = PFedGate(client_config={"mode": "paper", "blocks_per_layer": 64})
    with pytest.raises(UserError, match='blocks_per_layer\\), method.gate_pool or method.branches = "shared"$'):
        server.init(make_task("lenet", (3, 32, 32), 0.25), [Device(0)])


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "power"), [("linear", 1), ("cubic", 3)])
def test_the_budget_falls_along_its_schedule(schedule: str, power: int) -> None:
    task = make_task("cnn")
    client = make_client(task, 0, 0.4)
    server = PFedGate(client_config=OPTIONS, schedule=schedule, schedule_from=0.2, schedule_until=0.6)
    state = server.scheduled(task, server.init(task, [client.device]), 10)
    said = []
    for _ in range(10):
        packet = server.broadcast(state, client.device)
        said.append(packet.scalars.get("density", 0.4))
        reply, _ = train(task, client, packet)
        assert reply.scalars["density_true"] <= said[-1] + (said[-1] == 1) * 10
        state = server.reduce(task, state, [Reply(client.device, reply)])
    want = [0.4 + 0.6 * min(1, max(0, 1 - (r / 10 - 0.2) / 0.4)) ** power for r in range(10)]
    assert said == pytest.approx(want)


def test_the_plateau_schedule_waits_for_validation() -> None:
    task = make_task("mlp")
    client = make_client(task, 0, 0.6)
    server = PFedGate(client_config={**OPTIONS, "lr": 1e-9, "gate_lr": 1e-9}, schedule="plateau", patience=2)
    state = server.scheduled(task, server.init(task, [client.device]), 10)
    densities = []
    for _ in range(18):
        packet = server.broadcast(state, client.device)
        densities.append(packet.scalars.get("density", 0.6))
        reply, _ = half_of(lr=1e-9, gate_lr=1e-9).train(task, client, packet, {}, torch_rng(0))
        assert reply.scalars["validation_seen"] == len(client.validation)
        state = server.reduce(task, state, [Reply(client.device, reply)])
    assert densities[0] == 1
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == pytest.approx(0.6)
    alone = replace(client, validation=Split(client.train.x[:0], client.train.y[:0]))
    blind = server.scheduled(task, server.init(task, [client.device]), 10)
    reply, _ = half_of().train(task, alone, server.broadcast(blind, client.device), {}, torch_rng(0))
    blind = server.reduce(task, blind, [Reply(client.device, reply)])
    with pytest.raises(UserError, match='schedule = "plateau" needs validation data; no client of 2 rounds had any'):
        server.reduce(task, blind, [Reply(client.device, reply)])
    assert server.reduce(task, state, [Reply(client.device, reply)]).above == state.above  # a cohort without any


@pytest.mark.parametrize("schedule", ["linear", "plateau"])
def test_a_whole_run_with_a_schedule(schedule: str, tmp_path: Path) -> None:
    changes = ["rounds=4", "budget.tiers=[0.5]", f"method.schedule={schedule}", "method.patience=1"]
    changes += ["method.schedule_until=0.5", "partition.clients=3"]
    with pytest.raises(
        UserError, match=f"schedule = '{schedule}' starts above, and client 0 has budget 0.5; set budget"
    ):
        run(from_dict({}, changes), out=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    done = run(from_dict({}, [*changes, "budget.on_over_budget=record"]), out=tmp_path / "run")
    densities = [max(r["density_true"] for r in done.clients if r["round"] == n) for n in range(1, 5)]
    assert densities[0] > 0.9
    assert schedule == "plateau" or (densities == sorted(densities, reverse=True) and densities[-1] <= 0.5)


@pytest.mark.parametrize("scope", ["batch", "round"])
def test_a_client_that_sits_out_is_scored_with_the_new_model_and_its_own_gate(scope: str, tmp_path: Path) -> None:
    changes = ["rounds=3", "fraction=0.5", "partition.clients=8", "budget.tiers=[0.5]", "method.gate_lr=1"]
    experiment = from_dict({}, [*changes, f"method.mask_scope={scope}", "evaluate.every=1"])
    done, federation = run(experiment, out=tmp_path / "run"), federation_of(experiment)
    server = PFedGate(client_config=dict(experiment.hyper))
    server.init(federation.task, [c.device for c in federation.clients])
    rows = {r["client"]: r for r in done.clients if r["round"] == 3}
    idle = [c for c in federation.clients if rows[c.id]["loss"] is None]
    assert any(done.memories.get(c.id) for c in idle)  # they have gates of their own
    for client in federation.clients:
        packet = server.broadcast(done.state, client.device)
        own = done.memories.get(client.id, {})
        score = PFedGateClient(**experiment.hyper).evaluate(federation.task, client, packet, own)["personal"]
        assert rows[client.id]["personal"] == score.correct / score.n


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["structural", "paper"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "vgg11", "resnet18"])
def test_with_open_gates_it_is_fedavg_bit_by_bit(name: str, mode: str) -> None:
    task = make_task(name, (3, 32, 32), 0.05) if name in ("vgg11", "resnet18") else make_task(name)
    clients = [make_client(task, i, n=17 + i) for i in range(3)]
    open_gate = {**OPTIONS, "open_gate": True, "mode": mode}
    halves = {"fedavg": FedAvgClient(**SGD), "pfedgate": PFedGateClient(**open_gate)}
    servers = {"fedavg": FedAvg(client_config=SGD), "pfedgate": PFedGate(client_config=open_gate)}
    after = {}
    for method, half in halves.items():
        state = servers[method].init(task, [c.device for c in clients])
        for server_round in range(2):
            replies = []
            for client in clients:
                packet = servers[method].broadcast(state, client.device)
                reply, memory = half.train(task, client, packet, {}, torch_rng(server_round, client.id))
                assert memory == {}
                replies.append(Reply(client.device, reply))
            state = servers[method].reduce(task, state, replies)
        after[method] = state.params
        scores = half.evaluate(task, clients[0], Packet("evaluate", state.params), {})
        assert scores["personal"] == scores["global"]
    assert list(after["fedavg"]) == list(after["pfedgate"])
    for name_, value in after["fedavg"].items():
        assert torch.equal(value, after["pfedgate"][name_]), name_


@pytest.mark.parametrize("mode", ["structural", "paper"])
def test_the_server_averages_only_what_was_sent(mode: str) -> None:
    """An entry that some clients trained becomes the mean of theirs; an entry that nobody trained stays."""
    task = make_task()
    clients = [make_client(task, i, d) for i, d in enumerate((0.7, 0.7))]
    options = {"mode": mode, "score": "random_client"}
    server, state = server_of(task, clients, **options)
    half, cut, old = half_of(**options), server.gated.cut, state.params
    replies, own, inside = [], [], []
    for client in clients:
        packet = server.broadcast(state, client.device)
        reply, memory = train(task, client, packet, **options)
        replies.append(Reply(client.device, reply))
        own.append(half._scene(task, client, half.local(packet, reply), memory).whole())
        marks = {n: torch.zeros_like(t, dtype=torch.bool) for n, t in old.items()}
        for region in cut.regions(unpack_bits(reply.tensors["touched"], cut.parts)):
            region.put_(marks[region.name], torch.ones_like(region.take(marks[region.name])))
        inside.append(marks)
    new = server.reduce(task, state, iter(replies)).params
    cases = set()
    for n in task.trainable:
        for both in ((True, True), (True, False), (False, True), (False, False)):
            here = (inside[0][n] == both[0]) & (inside[1][n] == both[1])
            senders = [o for o, sent in zip(own, both, strict=True) if sent]
            cases |= {both} if here.any() else set()
            if not senders:
                assert torch.equal(new[n][here], old[n][here])
                continue
            mean = WeightedMean()
            for o in senders:
                mean.add({n: o[n]}, 27)
            torch.testing.assert_close(new[n][here], mean.result({n: old[n]})[n][here])
    assert len(cases) >= 3


def test_misfit_replies_are_named() -> None:
    task = make_task("cnn")
    client = make_client(task, 0, 0.6)
    server, state = server_of(task, [client], mask_scope="round", download="kept")
    reply, _ = train(task, client, server.broadcast(state, client.device), mask_scope="round", download="kept")
    assert server.complaint(task, state, Reply(Device(0), reply)) == ""
    for change, words in (
        ({"values": reply.tensors["values"][:-1]}, "does not fit its bitmap"),
        ({"touched": reply.tensors["touched"][:-1]}, "bits has"),
        ({"next": torch.zeros(1, dtype=torch.uint8)}, "bits has"),
        ({"values": reply.tensors["values"].double()}, "not torch.float32"),
    ):
        assert words in server.complaint(
            task, state, Reply(Device(0), replace(reply, tensors={**reply.tensors, **change}))
        )
    short = {k: v for k, v in reply.tensors.items() if k != "next"}
    assert "'next'" in server.complaint(task, state, Reply(Device(0), replace(reply, tensors=short)))
    assert server.complaint(task, state, Reply(Device(0), replace(reply, kind="train"))).startswith("a reply 'train'")


# --- novel clients and diagnostics -----------------------------------------------------------------------------------


def test_a_novel_client_trains_its_gate_alone() -> None:
    task = make_task()
    clients = [make_client(task, i, 0.6) for i in range(3)]
    server, state, _, _ = play(task, clients, 3, epochs=3)
    novel, half = make_client(task, 9, 0.6, n=80), half_of()
    packet = replace(server.broadcast(state, novel.device), kind="onboard")
    before = {n: t.clone() for n, t in packet.tensors.items()}
    scores = half.onboard(task, novel, packet, {}, torch_rng(0), (0, 1, 10))
    assert list(scores) == [0, 1, 10]
    assert scores[0] == half.evaluate(task, novel, packet, {})["personal"]
    assert scores[10].loss < scores[0].loss
    assert all(torch.equal(before[n], packet.tensors[n]) for n in before)
    again = half.onboard(task, novel, packet, {}, torch_rng(0), (0, 1, 10))
    assert again == scores


@pytest.mark.parametrize("download", ["all", "kept"])
def test_a_novel_client_with_one_mask_chooses_by_its_trained_gate(download: str) -> None:
    """But where it was sent one kept set it has no other to choose."""
    task, options = make_task("cnn"), {"mask_scope": "round", "download": download, "gate_lr": 2.0}
    server, state, _, _ = play(task, [make_client(task, i, 0.5) for i in range(3)], 2, **options)
    novel, half, used = make_client(task, 9, 0.5, n=40), half_of(**options), []

    class Spy(PFedGateClient):
        def _client_wide(self, scene):  # type: ignore[no-untyped-def]
            kept, gates = super()._client_wide(scene)
            used.append(kept)
            return kept, gates

    packet = replace(server.broadcast(state, novel.device), kind="onboard")
    scores = Spy(**asdict(half)).onboard(task, novel, packet, {}, torch_rng(0), (0, 10))
    assert scores[0] != scores[10]
    first = half.choice(server.gated, novel.device, 0.5).first()
    assert np.array_equal(used[0], first)
    assert np.array_equal(used[1], first) == (download == "kept")


def test_memory_counts_the_gates_activations_and_the_packet() -> None:
    task = make_task("cnn")
    base, clients = {"mask_scope": "round", "gate_pool": 0}, [make_client(task, 0, 0.6)]
    whole, _ = train(task, clients[0], **base)
    server, state = server_of(task, clients, **base, download="kept")
    kept, _ = train(task, clients[0], server.broadcast(state, clients[0].device), **base, download="kept")
    gated = gated_of(task, gate_pool=0)
    part = round(kept.scalars["density_true"] * gated.dense) - gated.gate_size
    model = gated.cut.spent(gated.cut.everything)
    assert whole.scalars["memory"] - kept.scalars["memory"] == 4 * (model - part)
    assert gated.gate_activations == 2 * (64 + gated.cut.blocks)
    dense = int(whole.scalars["memory"])
    for memory in (dense // 2, 2 * dense // 3):
        client = replace(clients[0], device=Device(0, Budget(memory=memory)))
        server, state = server_of(task, [client], **base, download="kept")
        reply, _ = train(task, client, server.broadcast(state, client.device), **base, download="kept")
        assert reply.scalars["memory"] <= memory


@pytest.mark.parametrize(
    ("name", "shape", "classes", "gate", "masks", "densities"),
    [
        ("leafcnn1", (1, 28, 28), 62, 31_488, (16, 1), (0.4342, 0.2456)),
        ("lenet", (3, 32, 32), 10, 153_762, (16, 1), (0.4318, 0.2425)),
        ("leafcnn3", (3, 32, 32), 100, 123_012, (16, 1), (0.4355, 0.2474)),
    ],
)
def test_the_masks_of_mode_official_are_the_published_ones(
    name: str,
    shape: tuple[int, ...],
    classes: int,
    gate: int,
    masks: tuple[int, int],
    densities: tuple[float, float],
) -> None:
    """Specification, sections 2.4 and 3.6, through the method; budgets 0.5 and 0.3."""
    task = Task(build_model(name, shape, classes), shape, classes, seed=7)
    for s, number, density in zip((0.5, 0.3), masks, densities, strict=True):
        server, device = PFedGate(client_config={"mode": "official"}), Device(0, Budget(s))
        server.init(task, [device])
        gated, choice = server.gated, server._half.choice(server.gated, device, s)
        rng = np.random.default_rng(0)
        kept = {choice.kept(rng.random(gated.cut.blocks)).tobytes() for _ in range(500)}
        assert gated.gate_size == gate
        assert len(kept) == number
        assert {round(gated.cut.spent(np.frombuffer(k, bool)) / gated.dense, 4) for k in kept} == {density}


def test_in_mode_official_what_no_client_has_used_counts_as_never_trained() -> None:
    """Its momentum moves, and its clients send, every block."""
    task = make_task("cnn")
    clients = [make_client(task, i, 0.3) for i in range(2)]
    options = {"mode": "official", "blocks_per_layer": 3, "momentum": 0.9}
    server, state, memories, _ = play(task, clients, 1, **options)
    assert state.trained.all()
    last = [memories[i]["mask/used"].numpy() > 0 for i in range(2)]
    found = server.diagnose(task, state, clients, memories)["never_trained"]
    assert found == 1 - np.any(last, axis=0).mean() > 0
    for i in range(2):  # a block that was used once stays known
        memories[i]["mask/ever"] = pack_bits(np.ones(server.gated.cut.blocks, bool))
        packet = server.broadcast(state, clients[i].device)
        _, memories[i] = train(task, clients[i], packet, memories[i], **options)
    assert server.diagnose(task, state, clients, memories)["never_trained"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "official", "blocks_per_layer": 10, "gate_start": 0.55},
        {"inference": "batch"},
        {"inference": "batch", "batch_size": 30},
        {"inference": "batch", "batch_size": 300, "epochs": 3},
        {"inference": "sample", "mode": "paper"},
    ],
)
def test_agreement_with_masks_by_batch_and_by_sample(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by hand: each training mask of the last round with each evaluation mask, of 256 examples at most, 32 by
    sample."""
    seen: dict[int, list[Bools]] = {0: [], 1: []}
    batch = Choice.batch

    def spied(choice: Choice, *args: object) -> tuple[Bools, Tensor, Tensor | None]:
        found = batch(choice, *args)  # type: ignore[arg-type]
        seen[choice.client].append(found[0])
        return found

    monkeypatch.setattr(Choice, "batch", spied)
    task, half = make_task("cnn"), half_of(**options)
    clients = [make_client(task, i, 0.5, n=n) for i, n in enumerate((27, 310))]
    server, state, memories, _ = play(task, clients, 2, **options)
    free, agreements, varied = ~server.gated.cut.forced, [], False
    size, most = (1, 32) if half.inference == "sample" else (half.batch_size, 256)
    for client in clients:
        gate = {n.removeprefix("gate/"): t for n, t in memories[client.id].items() if n.startswith("gate/")}
        choice, evaluated, start = half.choice(server.gated, client.device, 0.5), [], 0
        while start < len(client.train) and (start == 0 or start + size <= most):
            evaluated.append(choice.evaluated(gate, client.train.x[start : start + size])[0])
            start += size
        last = seen[client.id][len(seen[client.id]) // 2 :]
        agreements.append(np.mean([(a == b)[free] for a in last for b in evaluated]))
        varied |= len({e.tobytes() for e in evaluated}) > 1
    assert varied == (half.batch_size < 300)
    found = server.diagnose(task, state, clients, memories)
    assert found["agreement"] == pytest.approx(np.mean(agreements))
    assert 0 < found["agreement"] < 1 and found["inference"] == half.inference_mode != "client"
    wide = [half.deployed(task, c, server.broadcast(state, c.device), memories[c.id])[0][free] for c in clients]
    assert found["distinct"] == len({w.tobytes() for w in wide})  # of the masks that these clients would deploy


def test_agreement_with_one_mask_is_how_often_training_agrees_with_it() -> None:
    task, options = make_task("cnn"), {"gate_lr": 20.0, "score_noise": 0.1}
    clients = [make_client(task, i, 0.5) for i in range(3)]
    server, state, memories, _ = play(task, clients, 2, **options)
    half, free, expected = half_of(**options), ~server.gated.cut.forced, []
    for client in clients:
        kept, _ = half.deployed(task, client, server.broadcast(state, client.device), memories[client.id])
        used = memories[client.id]["mask/used"].double().numpy()
        expected.append(np.where(kept, used, 1 - used)[free].mean())
    assert server.diagnose(task, state, clients, memories)["agreement"] == sum(expected) / 3 < 1


def test_diagnostics_of_many_clients_look_at_some_and_compare_them_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("cnn")
    clients = [make_client(task, i, 0.5) for i in range(5)]
    server, state, memories, _ = play(task, clients, 1, mask_scope="round", score="random_client")
    whole = server.diagnose(task, state, clients, memories)
    assert whole["of_clients"] == 5
    monkeypatch.setattr("strategies.pfedgate._PAIRED", 2)
    assert server.diagnose(task, state, clients, memories) == pytest.approx(whole)
    monkeypatch.setattr("strategies.pfedgate._LOOKED_AT", 3)
    some = server.diagnose(task, state, clients, memories)
    assert some["of_clients"] == 3 and some == server.diagnose(task, state, clients, memories)


def test_diagnostics_count_masks_overlap_and_what_was_never_trained() -> None:
    task = make_task("cnn")
    clients = [make_client(task, i, 0.5) for i in range(4)]
    server, state, memories, replies = play(task, clients, 2, mask_scope="round", score="random_client")
    found = server.diagnose(task, state, clients, memories)
    free = ~server.gated.cut.forced
    masks = [unpack_bits(memories[i]["mask/next"], server.gated.cut.blocks)[free] for i in range(4)]
    pairs = [(i, j) for i in range(4) for j in range(i)]
    overlap = np.mean([(masks[i] & masks[j]).sum() / (masks[i] | masks[j]).sum() for i, j in pairs])
    assert found["distinct"] == len({m.tobytes() for m in masks}) > 1
    assert found["mean_overlap"] == pytest.approx(overlap)
    touched = [unpack_bits(r.tensors["touched"], server.gated.cut.parts) for r in replies]
    assert found["never_trained"] == pytest.approx(1 - np.any(touched, axis=0)[: server.gated.cut.blocks].mean())
    assert found["inference"] == "client"
    assert found["agreement"] == 1.0  # random importances that stay: the mask of training is the mask of deployment
    fresh = server.diagnose(task, state, clients, {i: {} for i in range(4)})
    assert fresh == {}
    assert pack_bits(masks[0]).dtype == torch.uint8


@pytest.mark.parametrize("options", [{"download": "changed"}, {"download": "kept", "mask_scope": "round"}])
def test_swapping_masks_starts_from_what_each_client_deploys(options: dict[str, str], tmp_path: Path) -> None:
    """Whatever is downloaded, and for clients that have not trained as well."""
    small = ["rounds=1", "fraction=0.5", "partition.clients=4", "budget.tiers=[0.5]", "engine.workers=1"]
    changes = [*small, *(f"method.{key}={value}" for key, value in options.items())]
    experiment = load_experiment(swap.HERE / "digits_pfedgate.toml", changes)
    done = run(experiment, out=tmp_path / "run")
    gains = swap.Swapper(experiment, done).gains()
    assert np.mean(gains["own"]) == pytest.approx(done.summary["accuracy"]["personal"]["mean"])
    assert set(gains) == {"own", *swap.SWAPS}


# --- gates of classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["batch", "client"])
def test_gates_of_classes_learn_and_drop_none(scope: str) -> None:
    task = make_task("cnn")
    clients = [make_client(task, i, 0.5) for i in range(3)]
    server, state, memories, replies = play(task, clients, 3, class_gates=True, mask_scope=scope, download="changed")
    cut = server.gated.cut
    plain = gated_of(task).cut
    assert cut.blocks == plain.blocks + task.classes and cut.spent(cut.everything) == plain.spent(plain.everything)
    assert cut.forced[plain.blocks :].all() and not cut.forced[: plain.blocks].all()
    half = half_of(class_gates=True, mask_scope=scope, download="changed")
    gates = []
    for client in clients:
        packet = server.broadcast(state, client.device)
        kept, values = half.deployed(task, client, packet, memories[client.id])
        assert kept[plain.blocks :].all()
        gates.append(values[plain.blocks :])
        assert half.evaluate(task, client, packet, memories[client.id])["personal"].n == len(client.held_out)
    assert not torch.equal(gates[0], gates[1]) and len(set(gates[0].tolist())) == task.classes
    assert all(r.scalars["density_true"] <= 0.5 for r in replies)


def test_logits_that_cannot_be_scaled_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4), torch.nn.LogSoftmax(1))
    task = Task(model, (6,), 4, seed=0)
    PFedGate().init(task, [Device(0)])
    with pytest.raises(UserError, match="class_gates = true needs logits that are each made of one unit"):
        PFedGate(client_config={"class_gates": True}).init(task, [Device(0)])


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_momentum_that_waits_counts_once_the_part_in_use_changes() -> None:
    task, client = make_task("cnn"), make_client(make_task("cnn"), 0, 0.5)
    for scope, score in (("batch", "random_batch"), ("round", "random_client")):
        said = [train(task, client, mask_scope=scope, score=score, momentum=m)[0].scalars for m in (0.0, 0.9)]
        gated = gated_of(task)
        in_use = 4 * (said[0]["density_true"] * gated.dense)  # of the momentum of what is in use, gate included
        waits = 4 * gated.dense if scope == "batch" else 0
        assert said[1]["memory"] - said[0]["memory"] == pytest.approx(in_use + waits, rel=0.2 if waits else 0.01)


def test_only_a_budget_that_is_too_small_asks_for_smaller_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def counted(task: Task, layout: Layout) -> Gated:
        tried.append(layout.blocks_per_layer)
        return gated_model(task, layout)

    monkeypatch.setattr(gated_module, "gated_model", counted)
    with pytest.raises(UserError, match="client 1 has a budget for its upload"):
        PFedGate(client_config=OPTIONS).init(make_task("cnn"), [Device(1, Budget(density=0.5, bytes_up=10**6))])
    assert tried == [6]
    with pytest.raises(UserError, match="is below the smallest possible model"):
        PFedGate(client_config=OPTIONS).init(make_task("cnn"), [Device(1, Budget(density=0.001))])
    assert len(tried) > 5
