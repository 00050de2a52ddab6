"""pFedGate: the gate against its formulas, the budget in every batch, and the reduction to FedAvg bit by bit."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.fedavg import FedAvgClient
from clients.pfedgate import PFedGateClient, _own
from fedsparse.errors import UserError
from fedsparse.models import build_model
from fedsparse.models import gated as gated_module
from fedsparse.models.gate import Gate, SwitchNorm, input_moments
from fedsparse.models.gated import gated_model
from fedsparse.packet import Packet, decode, encode, same
from fedsparse.seeding import torch_rng
from fedsparse.sparse.codec import tile_count, tiles_by_layer, unpack_bits
from fedsparse.strategy import Reply, State
from fedsparse.task import Budget, Client, Device, Split, Task
from strategies.fedavg import FedAvg
from strategies.pfedgate import PFedGate

SGD = {"lr": 0.1, "batch_size": 8, "momentum": 0.9, "weight_decay": 0.01, "clip": 1.0}
OPTIONS = {**SGD, "blocks_per_layer": 6, "gate_pool": 4}


@lru_cache(maxsize=16)
def make_task(name: str = "mlp", shape: tuple[int, ...] = (1, 8, 8), width: float = 0.5) -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Task(build_model(name, shape, 4, width=width), shape, 4, seed=7)


def make_client(task: Task, number: int = 0, density: float | None = None, n: int = 27) -> Client:
    rng = torch_rng("data", number)
    y = torch.randint(4, (n,), generator=rng)
    x = torch.randn(n, *task.input_shape, generator=rng) + y.view(-1, *[1] * len(task.input_shape))
    data = Split(x, y)
    return Client(Device(number, Budget(density=density)), data, data, data)


def train(
    task: Task, client: Client, packet: Packet | None = None, memory: dict[str, Tensor] | None = None, **options: object
) -> tuple[Packet, dict[str, Tensor]]:
    half = PFedGateClient(**{**OPTIONS, **options})
    packet = packet or Packet("train", task.init_params())
    return half.train(task, client, packet, memory or {}, torch_rng("train", client.id))


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "blocks", "branches", "size"),
    [
        ((1, 28, 28), 40, "shared", 31_488),  # LeafCNN1, spec of the method
        ((3, 32, 32), 50, "shared", 153_762),
        ((1, 28, 28), 40, "separate", 2 * 31_488),
        ((13,), 5, "shared", 13 * 5 + 5 + 10 + 2 * 13 + 4),
    ],
)
def test_the_size_of_a_gate(shape: tuple[int, ...], blocks: int, branches: str, size: int) -> None:
    gate = Gate(shape, blocks, branches, 0, torch_rng(0))
    assert gate.size == size == sum(p.numel() for p in gate.parameters())
    assert gate.macs == math.prod(shape) * blocks * (2 if branches == "separate" else 1)


def test_pooling_shrinks_the_gate_and_bad_branches_are_named() -> None:
    gate = Gate((1, 28, 28), 40, "shared", 7, torch_rng(0))
    assert gate.size == 49 * 40 + 40 + 80 + 8
    assert gate(torch.randn(4, 1, 28, 28, generator=torch_rng(1)))[0].shape == (40,)
    assert Gate((6, 125), 3, "shared", 25, torch_rng(0))(torch.ones(2, 6, 125))[1].shape == (3,)
    with pytest.raises(UserError, match="'share'; did you mean 'shared'"):
        Gate((1, 28, 28), 40, "share", 0, torch_rng(0))


def test_switch_norm_against_loops_over_examples_and_channels() -> None:
    norm, x = SwitchNorm(3, spatial=True), torch.randn(5, 3, 4, 2, generator=torch_rng("x"))
    with torch.no_grad():
        for i, p in enumerate(norm.parameters()):
            p.copy_(torch.rand(p.shape, generator=torch_rng("p", i)) + 0.5)
    a, b = norm.mean_weight.softmax(0), norm.var_weight.softmax(0)
    mean = torch.stack([torch.stack([x[n, c].mean() for c in range(3)]) for n in range(5)])
    var = torch.stack([torch.stack([x[n, c].flatten().var() for c in range(3)]) for n in range(5)])  # unbiased
    square = var + mean**2
    want = torch.empty_like(x)
    for n in range(5):
        for c in range(3):
            layer = mean[n].mean()
            batch = mean[:, c].mean()
            mu = a[0] * mean[n, c] + a[1] * layer + a[2] * batch
            v = b[0] * var[n, c] + b[1] * (square[n].mean() - layer**2) + b[2] * (square[:, c].mean() - batch**2)
            want[n, c] = norm.weight[c] * (x[n, c] - mu) / torch.sqrt(v + 1e-5) + norm.bias[c]
    torch.testing.assert_close(norm(x, input_moments(x)), want)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean.mean(0))  # started at 0
    torch.testing.assert_close(norm.running_var, 0.1 * (square.mean(0) - mean.mean(0) ** 2))


def test_an_untrained_gate_is_near_one_half_and_the_same_for_all() -> None:
    task = make_task()
    x = torch.randn(64, 1, 8, 8, generator=torch_rng("x"))
    first = gated_model(task)
    gated_module.gated_model.cache_clear()
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.gate.init_params().values(), gated_model(task).gate.init_params().values(), strict=True)
    )
    for values in first.gate.model.train()(x):
        assert values.shape == (first.plan.blocks,)
        assert ((values > 0.45) & (values < 0.55)).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (6, 20), (13,), (1,)])
def test_a_single_example_has_finite_gates(shape: tuple[int, ...]) -> None:
    task = make_task("mlp", shape)
    reply, memory = train(task, make_client(task, n=1))
    assert torch.isfinite(reply.tensors["values"]).all()
    assert all(torch.isfinite(t).all() for t in memory.values())


# --- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@settings(max_examples=12, deadline=None)
@given(density=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_true_density_is_within_the_budget_in_every_batch(name: str, density: float, seed: int) -> None:
    """Counted here from the masks that the batches really used, gate and forced blocks included."""
    task = make_task(name)
    gated = gated_model(task, blocks_per_layer=6, gate_pool=4)
    client = make_client(task, seed, density, n=20)
    smallest = gated.density(gated.plan.smallest)
    if density < smallest:
        with pytest.raises(UserError, match=f"client {seed}: budget .* is below the smallest possible model"):
            train(task, client)
        return
    reply, memory = train(task, client)
    gate_size = sum(memory[n].numel() for n in gated.gate.trainable)
    assert gate_size == gated.gate_size
    assert smallest <= reply.scalars["density_true"] <= density
    assert smallest - 1e-12 <= reply.scalars["density_mean"] <= reply.scalars["density_true"] + 1e-12
    forward = reply.scalars["forward_macs"]
    assert 0 < forward <= sum(layer.macs for layer in gated.layers) + gated.gate_macs
    if density > smallest + 0.3:  # the budget is used, up to one block
        assert reply.scalars["density_true"] > density - 0.15


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


def test_without_a_budget_every_block_is_kept() -> None:
    task = make_task()
    reply, _ = train(task, make_client(task))
    gated = gated_model(task, blocks_per_layer=6, gate_pool=4)
    assert unpack_bits(reply.tensors["touched"], tile_count(gated.plan)).all()
    assert reply.scalars["density_true"] == gated.density(gated.plan.total) > 1


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_untouched_weights_keep_their_bits_and_touched_ones_move(name: str) -> None:
    task, old = make_task(name), make_task(name).init_params()
    reply, memory = train(task, make_client(task, 1, 0.5))
    plan = gated_model(task, blocks_per_layer=6, gate_pool=4).plan
    touched = unpack_bits(reply.tensors["touched"], tile_count(plan))
    assert not touched.all()
    assert reply.tensors["values"].numel() < sum(t.numel() for t in old.values())
    half = PFedGateClient(**OPTIONS)
    merged = half.local(Packet("train", old), reply)
    own = _own(task, half._gated(task), merged)
    units = [g.any(1) for g in (m for _, m in tiles_by_layer(plan, touched))]
    for layer, on in zip(plan.layers, units, strict=True):
        rows = torch.from_numpy(np.repeat(on, layer.group_sizes))
        for n in (layer.weight, *layer.vectors):
            assert torch.equal(own[n][~rows], old[n][~rows])
            moved = (own[n][rows] != old[n][rows]).float().mean() if rows.any() else 1
            assert moved > 0.05
    assert {m.split(".")[0] for m in memory} == {"scale", "importance"}


def test_the_gate_learns_and_is_remembered() -> None:
    task = make_task()
    start = gated_model(task, blocks_per_layer=6, gate_pool=4).gate.init_params()
    client = make_client(task, 1, 0.6)
    reply, memory = train(task, client)
    assert list(memory) == list(start)
    for name in (
        "importance.post_norm.weight",
        "importance.post_norm.bias",
        "scale.post_norm.bias",
        "scale.norm.weight",
    ):
        assert not torch.equal(memory[name], start[name]), name
    _, later = train(task, client, memory=memory)
    assert not torch.equal(later["scale.post_norm.bias"], memory["scale.post_norm.bias"])
    _, frozen = train(task, client, gate_lr=0.0)
    assert torch.equal(frozen["scale.weight"], start["scale.weight"])
    losses = []
    packet, memory = Packet("train", task.init_params()), {}
    for _ in range(6):
        reply, memory = train(task, client, packet, memory, epochs=3)
        packet = Packet(
            "train",
            PFedGate(client_config=OPTIONS).reduce(task, State(packet.tensors), [Reply(client.device, reply)]).params,
        )
        losses.append(reply.scalars["loss"])
    assert losses[-1] < 0.7 * losses[0]


def test_same_rng_same_reply_and_nobody_writes_into_packet_or_memory() -> None:
    task = make_task("cnn")
    client = make_client(task, 2, 0.5)
    _, memory = train(task, client)
    packet = Packet("train", task.init_params())
    before, kept = {n: t.clone() for n, t in packet.tensors.items()}, {n: t.clone() for n, t in memory.items()}
    one, first = train(task, client, packet, memory)
    two, second = train(task, client, decode(encode(packet)), memory)
    assert same(one, two)
    assert all(torch.equal(first[n], second[n]) for n in first)
    half = PFedGateClient(**OPTIONS)
    half.evaluate(task, client, packet, memory)
    half.evaluate(task, client, half.local(packet, one), memory)
    assert all(torch.equal(before[n], packet.tensors[n]) for n in before)
    assert all(torch.equal(kept[n], memory[n]) for n in kept)
    assert same(one, decode(encode(one)))


def test_evaluation_points() -> None:
    """local: the client's own weights; personal: new weights, own gate, one mask in budget; global: no gate."""
    task = make_task()
    client, half = make_client(task, 1, 0.6), PFedGateClient(**OPTIONS)
    packet = Packet("evaluate", task.init_params())
    reply, memory = train(task, client, epochs=8)
    untrained = half.evaluate(task, client, packet, {})
    assert set(untrained) == {"personal", "global"}
    assert untrained["global"] == task.score(packet.tensors, client.held_out)
    assert untrained["personal"].n == len(client.held_out)
    local = half.evaluate(task, client, half.local(packet, reply), memory)
    assert set(local) == {"personal"}
    assert local["personal"].loss < untrained["personal"].loss
    alone = PFedGate(client_config=OPTIONS).reduce(task, State(packet.tensors), [Reply(client.device, reply)])
    assert half.evaluate(task, client, Packet("evaluate", alone.params), memory)["personal"] == local["personal"]


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "vgg11"])
def test_with_open_gates_it_is_fedavg_bit_by_bit(name: str) -> None:
    task = make_task(name, (3, 32, 32), 0.05) if name == "vgg11" else make_task(name)
    clients = [make_client(task, i, n=17 + i) for i in range(3)]
    halves = {"fedavg": FedAvgClient(**SGD), "pfedgate": PFedGateClient(**OPTIONS, open_gate=True)}
    servers = {"fedavg": FedAvg(client_config=SGD), "pfedgate": PFedGate(client_config={**OPTIONS, "open_gate": True})}
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


def test_the_server_averages_only_what_was_sent() -> None:
    """Rows that one client alone trained become its rows; rows that nobody trained stay."""
    task = make_task()
    old, clients = task.init_params(), [make_client(task, i, d) for i, d in enumerate((0.5, 0.9))]
    replies = [Reply(c.device, train(task, c)[0]) for c in clients]
    new = PFedGate(client_config=OPTIONS).reduce(task, State(old), iter(replies)).params
    half = PFedGateClient(**OPTIONS)
    gated = half._gated(task)
    own = [_own(task, gated, half.local(Packet("train", old), r.packet)) for r in replies]
    marks = [unpack_bits(r.packet.tensors["touched"], tile_count(gated.plan)) for r in replies]
    fc1 = gated.plan.layers[0]
    sent = [np.repeat(next(tiles_by_layer(gated.plan, m))[1][:, 0], fc1.group_sizes) for m in marks]
    assert (sent[0] & sent[1]).any()
    assert (sent[0] ^ sent[1]).any()
    for row in range(fc1.units):
        both = [o["fc1.weight"][row] for o, s in zip(own, sent, strict=True) if s[row]]
        want = torch.stack(both).double().mean(0).float() if both else old["fc1.weight"][row]
        torch.testing.assert_close(new["fc1.weight"][row], want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_lr": -1.0}, "gate_lr must be at least 0, got -1.0"),
        ({"branches": "three"}, "unknown gate branches 'three'"),
        ({"max_block_frac": 1.5}, r"max_block_frac must be in \(0, 1\], got 1.5"),
        ({"blocks_per_layer": 0}, "blocks_per_layer must be above 0, got 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PFedGateClient(**options)


def test_a_model_that_cannot_be_cut_is_refused_before_round_one() -> None:
    task = make_task("resnet18", (3, 32, 32), 0.05)
    with pytest.raises(UserError, match=r"cannot cut layer 'layer1' .* such as mlp"):
        PFedGate().init(task, [Device(0)])


@pytest.mark.parametrize("density", [0.3, 0.6])
def test_what_a_batch_computes_with_is_counted_and_fits(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the tensors that each batch's network really holds, beside the gate; not from what is reported."""
    import clients.pfedgate as half

    task, sizes, forward = make_task("cnn"), [], half.gated_forward

    def counting(network, *rest):  # type: ignore[no-untyped-def]
        sizes.append(
            sum(p.numel() for module in network.modules() for p in module._parameters.values() if p is not None)
        )
        return forward(network, *rest)

    monkeypatch.setattr(half, "gated_forward", counting)
    reply, memory = train(task, make_client(task, 3, density, n=40))
    gated = gated_model(task, blocks_per_layer=6, gate_pool=4)
    gate = sum(memory[name].numel() for name in gated.gate.trainable)
    dense = sum(p.numel() for p in task.model.parameters())
    assert len(sizes) > 1
    assert max(sizes) + gate <= density * dense
    assert reply.scalars["density_true"] == pytest.approx((max(sizes) + gate) / dense)
