"""The graph-aware cut: networks with branches, recurrence and shared channels against the dense model with masks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedsparse.cost import forward_macs, kept_count, trace
from fedsparse.errors import UserError
from fedsparse.models import build_model, model_names
from fedsparse.models.charlstm import CharLSTM
from fedsparse.models.layers import Recipe
from fedsparse.seeding import numpy_rng, torch_rng
from fedsparse.sparse.blocks import GroupCut, structural_cut
from fedsparse.sparse.choose import choose_blocks
from fedsparse.sparse.codec import pack, pack_bits
from fedsparse.sparse.cut import COSTS, Region
from fedsparse.sparse.mean import MaskedMean
from fedsparse.task import Task

CLASSES = 4


class Net(nn.Module):
    """Layers by name and a function of them and the input."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def mobile() -> nn.Module:
    """A depth-wise convolution between two others; flattened by a view."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.relu(m.bn2(m.depth(m.relu(m.bn1(m.stem(x))))))
        return m.output(m.pool(m.relu(m.bn3(m.conv(h)))).view(x.size(0), -1))

    return Net(
        run,
        stem=nn.Conv2d(3, 6, 3), bn1=nn.BatchNorm2d(6), relu=nn.ReLU(inplace=True), depth=nn.Conv2d(6, 6, 3, groups=6),
        bn2=nn.BatchNorm2d(6), conv=nn.Conv2d(6, 5, 1, bias=False), bn3=nn.BatchNorm2d(5), pool=nn.AdaptiveAvgPool2d(2),
        output=nn.Linear(20, CLASSES),
    )  # fmt: skip


def residual() -> nn.Module:
    """Norms before the activations, sums before norms, a convolution that is read by a norm and by the sum."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.conv2(functional.relu(m.gn1(m.conv1(functional.relu(m.gn0(x))))))
        x = torch.tanh(m.bn(x)) * 0.5
        return m.output(functional.max_pool2d(x, 2).flatten(1))

    return Net(
        run, stem=nn.Conv2d(3, 8, 3), gn0=nn.GroupNorm(4, 8), conv1=nn.Conv2d(8, 6, 3, padding=1),
        gn1=nn.GroupNorm(3, 6), conv2=nn.Conv2d(6, 8, 3, padding=1), bn=nn.BatchNorm2d(8),
        output=nn.Linear(8 * 3 * 3, CLASSES),
    )  # fmt: skip


def gru() -> nn.Module:
    """A GRU's last state and its outputs, and a layer of tanh units behind it."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        out, last = m.gru(m.embedding(x))
        states, _ = m.rnn(out)
        return m.output(m.fc(states[:, -1, :]) + last[-1])

    return Net(
        run, embedding=nn.Embedding(9, 5), gru=nn.GRU(5, 7, 2, batch_first=True), rnn=nn.RNN(7, 4, batch_first=True),
        fc=nn.Linear(4, 7), output=nn.Linear(7, CLASSES),
    )  # fmt: skip


def text() -> nn.Module:
    """Convolution over time, and one layer on all embedded tokens at once."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.embedding(x)
        y = functional.relu(m.conv(x.transpose(1, 2))).mean(2)
        return m.output(y) + m.fc2(m.drop(m.fc1(torch.flatten(x, 1)).relu()))

    return Net(
        run, embedding=nn.Embedding(9, 5), conv=nn.Conv1d(5, 6, 3), fc1=nn.Linear(35, 8), drop=nn.Dropout(0.0),
        output=nn.Linear(6, CLASSES), fc2=nn.Linear(8, CLASSES),
    )  # fmt: skip


def charlstm() -> nn.Module:
    return CharLSTM(Recipe((7,), CLASSES, vocabulary=9), embedding=6, hidden=10, layers=2)


class Encoder(nn.Module):
    """Torch's transformer encoder on embedded tokens."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 4, 10, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.embedding = nn.Embedding(9, 12)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.encoder(self.embedding(x)).mean(1))


def attention() -> nn.Module:
    """Self-attention without layer norms around it, and a layer on its outputs."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.embedding(x)
        x = x + m.attention(x, x, x, need_weights=False)[0]
        return m.output(functional.gelu(m.fc(x))[:, 0])

    return Net(
        run, embedding=nn.Embedding(9, 6), attention=nn.MultiheadAttention(6, 3, bias=False, batch_first=True),
        fc=nn.Linear(6, 7), output=nn.Linear(7, CLASSES),
    )  # fmt: skip


def twice() -> nn.Module:
    """A layer that is used twice."""
    return Net(
        lambda m, x: m.output(functional.relu(m.fc(functional.relu(m.fc(functional.relu(m.first(x))))))),
        first=nn.Linear(3, 7), fc=nn.Linear(7, 7), output=nn.Linear(7, CLASSES),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "resnet": (lambda: build_model("resnet18", (3, 8, 8), CLASSES, width=0.125), (3, 8, 8), 0),
    "resnet-group": (lambda: build_model("resnet18", (3, 8, 8), CLASSES, width=0.125, norm="group"), (3, 8, 8), 0),
    "mobile": (mobile, (3, 9, 9), 0),
    "residual": (residual, (3, 8, 8), 0),
    "charlstm": (charlstm, (7,), 9),
    "gru": (gru, (7,), 9),
    "text": (text, (7,), 9),
    "twice": (twice, (3,), 0),
    "encoder": (lambda: Encoder(norm_first=False), (7,), 9),
    "encoder-first": (lambda: Encoder(norm_first=True), (7,), 9),
    "attention": (attention, (7,), 9),
}
CLASSES_TOO = "+classes"  # after the names of cases whose classes are scaled
CASES |= {name + CLASSES_TOO: CASES[name] for name in ("resnet", "mobile", "gru", "text", "encoder")}
KEPT = ("encoder", "encoder-first", "attention", "encoder+classes")  # their streams stay whole
SMALL = [name for name in CASES if not name.startswith("resnet")]


def make_task(name: str) -> Task:
    build, shape, vocabulary = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build()
        for key, tensor in model.state_dict().items():
            if tensor.ndim == 1:  # norms and biases that differ from unit to unit
                tensor.copy_(torch.rand(tensor.shape) + (0.5 if "var" in key or "weight" in key else -0.3))
    return Task(model, shape, CLASSES, seed=0, vocabulary=vocabulary)


def doubled(task: Task) -> Task:
    """In float64, where sums in another order differ by nothing that matters."""
    model = copy.deepcopy(task.model).double()
    return Task(model, task.input_shape, task.classes, task.seed, vocabulary=task.vocabulary)


def make_cut(task: Task, *, keep: bool = False, classes: bool = False, blocks_per_layer: int = 3) -> GroupCut:
    return structural_cut(
        task.model,
        task.input_shape,
        tokens=task.tokens,
        blocks_per_layer=blocks_per_layer,
        max_block_frac=1.0,
        keep_uncuttable=keep,
        class_gates=classes,
    )


TASKS = {name: make_task(name) for name in CASES}
DOUBLE = {name: doubled(task) for name, task in TASKS.items()}
CUTS = {name: make_cut(task, keep=name in KEPT, classes=name.endswith(CLASSES_TOO)) for name, task in TASKS.items()}


def make_batch(name: str, n: int = 6, *, double: bool = False) -> tuple[Tensor, Tensor]:
    task, rng = TASKS[name], torch_rng("batch", name)
    if task.tokens:
        x = torch.randint(task.vocabulary, (n, *task.input_shape), generator=rng)
    else:
        x = torch.randn(n, *task.input_shape, generator=rng)
        x = x.double() if double else x
    return x, torch.randint(CLASSES, (n,), generator=rng)


def make_kept(cut: GroupCut, seed: int) -> np.ndarray:
    """Seed 0: the forced blocks; 1: all; else about half."""
    rng = numpy_rng("kept", seed)
    return cut.forced | (rng.random(cut.blocks) < {0: 0.0, 1: 1.1}.get(seed, 0.5))


def regions_of(cut: GroupCut, kept: np.ndarray) -> dict[str, Region]:
    return {region.name: region for region in cut.regions(cut.touched(kept))}


def scaled_in(cut: GroupCut) -> set[str]:
    """The names of layers and weights that gates scale."""
    return {gated.name for gated in (*cut.outputs, *cut.weights_gated, *cut.attentions)}


def factors(cut: GroupCut, kept: np.ndarray, gates: Tensor) -> dict[str, Tensor]:
    """By tensor that blocks own, what multiplies each entry, entry by entry: 0 where dropped, else its gate.

    Layers in front of a norm are masked, not scaled: the norm that follows them is. Of attention the value rows are
    scaled, which are the last third.
    """
    scaled = scaled_in(cut)
    attentions = {gated.name for gated in cut.attentions}
    out = {}
    for tensor in cut.tensors:
        if tensor.owning is None or not tensor.trainable:
            continue
        assert tensor.owner is not None
        axis, space = tensor.owning, cut.spaces[tensor.owning.space]
        row = []
        for entry in range(tensor.shape[tensor.owner]):
            unit = entry // axis.span % space.units
            group = max(g for g in range(space.groups) if space.bounds[g] <= unit)
            block = space.first_block + group
            gated = tensor.layer in scaled or tensor.name in scaled
            if tensor.layer in attentions:
                gated = entry >= 2 * tensor.shape[0] // 3
            row.append((gates[block] if gated else torch.ones((), dtype=gates.dtype)) * float(kept[block]))
        shape = [1] * len(tensor.shape)
        shape[tensor.owner] = -1
        out[tensor.name] = torch.stack(row).view(shape)
    return out


def masked_dense(
    task: Task, cut: GroupCut, params: dict[str, Tensor], kept: np.ndarray, gates: Tensor, x: Tensor
) -> Tensor:
    """The whole model with theta' = factor * theta."""
    by_name = factors(cut, kept, gates)
    return functional_call(task.model, {n: t * by_name[n] if n in by_name else t for n, t in params.items()}, (x,))


def check_against_masked_dense(name: str, kept: np.ndarray, *, train: bool) -> None:
    """Outputs, statistics, gradients of weights and gates, and the weights after two SGD steps with momentum."""
    task, cut = DOUBLE[name], CUTS[name]
    task.model.train(train)
    x, y = make_batch(name, double=True)
    gates = (torch.rand(cut.blocks, generator=torch_rng("gates")).double() + 0.2).requires_grad_()
    dense = task.init_params()
    velocity = {n: torch.zeros_like(dense[n]) for n in task.trainable}
    leaves = {n: dense[n].requires_grad_() for n in task.trainable}
    model = cut.working(task, task.init_params())
    model.use(kept)
    parts = regions_of(cut, kept)
    close = {"rtol": 1e-7, "atol": 1e-10}
    for _ in range(2):
        logits, got_logits = masked_dense(task, cut, dense, kept, gates, x), model.forward(gates, x)
        want = torch.autograd.grad(
            functional.cross_entropy(logits, y), [*leaves.values(), gates], materialize_grads=True
        )
        got = torch.autograd.grad(
            functional.cross_entropy(got_logits, y), [*model.leaves, gates], materialize_grads=True
        )
        torch.testing.assert_close(got_logits, logits, **close)
        for n, full, compact in zip(task.trainable, want, got, strict=False):
            torch.testing.assert_close(compact, parts[n].take(full), **close)
            rest = full.clone()
            parts[n].put_(rest, torch.zeros_like(compact))
            assert not rest.count_nonzero()  # the dense model has no gradient outside the kept part
        torch.testing.assert_close(got[-1], want[-1], **close)
        model.step(got[:-1], lr=0.05, momentum=0.9, weight_decay=0.0, clip=0.0)
        with torch.no_grad():
            for (n, leaf), grad in zip(leaves.items(), want, strict=False):
                velocity[n] = 0.9 * velocity[n] + grad
                leaf -= 0.05 * velocity[n]
    model.flush()
    for n in task.trainable:
        torch.testing.assert_close(model.params[n], dense[n].detach(), **close)
    for n in task.buffers:
        torch.testing.assert_close(parts[n].take(model.params[n]), parts[n].take(dense[n]), **close)


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CASES)
def test_compact_equals_masked_dense(name: str, seed: int, train: bool) -> None:
    check_against_masked_dense(name, make_kept(CUTS[name], seed), train=train)


@settings(max_examples=60)
@given(st.sampled_from(SMALL), st.data())
def test_compact_equals_masked_dense_for_any_kept_set(name: str, data: st.DataObject) -> None:
    cut = CUTS[name]
    bits = data.draw(st.lists(st.booleans(), min_size=cut.blocks, max_size=cut.blocks))
    check_against_masked_dense(name, cut.forced | np.array(bits), train=True)


@pytest.mark.parametrize("name", CASES)
def test_the_gate_gradient_is_the_product_of_weights_and_their_gradient(name: str) -> None:
    """dL/dm_l = <theta_l, dL/dtheta'_l> over what the gate scales, with theta' = m * theta (spec, test 6)."""
    task, cut = DOUBLE[name], CUTS[name]
    task.model.train(True)
    x, y = make_batch(name, double=True)
    kept, params = make_kept(cut, 5), task.init_params()
    gates = (torch.rand(cut.blocks, generator=torch_rng("gates")).double() + 0.2).requires_grad_()
    model = cut.working(task, params)
    model.use(kept)
    (got,) = torch.autograd.grad(functional.cross_entropy(model.forward(gates, x), y), [gates])
    by_name = factors(cut, kept, gates.detach())
    theta = {n: (t * by_name[n] if n in by_name else t).requires_grad_(n in task.trainable) for n, t in params.items()}
    loss = functional.cross_entropy(functional_call(task.model, theta, (x,)), y)
    grads = dict(zip(task.trainable, torch.autograd.grad(loss, [theta[n] for n in task.trainable]), strict=True))
    scaled = scaled_in(cut)
    only_values = [(gated.name, TASKS[name].shapes[f"{gated.name}.in_proj_weight"][0]) for gated in cut.attentions]
    for block in range(cut.blocks):
        one = torch.zeros(cut.blocks, dtype=torch.float64)
        one[block] = 1
        mine = factors(cut, kept, one)
        for layer, rows in only_values:
            for n in (n for n in mine if n.startswith(f"{layer}.in_proj")):
                mine[n][: 2 * rows // 3] = 0
        own = [t.name for t in cut.tensors if t.name in mine and (t.layer in scaled or t.name in scaled)]
        want = sum((params[n] * grads[n] * mine[n]).sum() for n in own)
        torch.testing.assert_close(got[block], torch.as_tensor(want), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_all_kept_and_gates_of_one_have_the_bits_of_the_plain_model(name: str) -> None:
    task, cut = TASKS[name], CUTS[name]
    x, y = make_batch(name)
    model, plain = cut.working(task, task.init_params()), task.init_params()
    leaves = [plain[n].requires_grad_() for n in task.trainable]
    task.model.train(True)
    want = torch.autograd.grad(task.loss(plain, x, y, train=True), leaves)
    model.use(cut.everything)
    loss = task.criterion(model.forward(torch.ones(cut.blocks), x), y)
    for a, b in zip(torch.autograd.grad(loss, model.leaves), want, strict=True):
        assert torch.equal(a, b)
    for n in task.buffers:
        assert torch.equal(model.params[n], plain[n])


@pytest.mark.parametrize("name", CASES)
def test_a_round_moves_what_was_used_and_its_update_is_what_moved(name: str) -> None:
    """Weights that no batch used keep their bits; the upload put into the old model is the new model (spec, 4)."""
    task, cut = TASKS[name], CUTS[name]
    task.model.train(True)
    start = task.init_params()
    model, used = cut.working(task, start), {n: torch.zeros(s, dtype=torch.bool) for n, s in task.shapes.items()}
    x, y = make_batch(name)
    for seed in (2, 3, 2):
        kept = make_kept(cut, seed)
        model.use(kept)
        for n, region in regions_of(cut, kept).items():
            region.put_(used[n], torch.ones(region.shape(task.shapes[n]), dtype=torch.bool))
        grads = torch.autograd.grad(task.criterion(model.forward(torch.ones(cut.blocks), x), y), model.leaves)
        model.step(grads, lr=0.05, momentum=0.9, weight_decay=0.1, clip=0.0)
    values = model.values()
    assert len(values) == sum(int(u.sum()) for u in used.values())
    mean = MaskedMean(cut, task.shapes)
    mean.add(values, model.touched, 3.0)
    got = mean.result(start)
    for n in task.shapes:
        assert torch.equal(model.params[n][~used[n]], start[n][~used[n]])
        torch.testing.assert_close(got[n], model.params[n])
        assert torch.equal(got[n][~used[n]], start[n][~used[n]])
    assert np.array_equal(cut.blocks_of(model.touched), make_kept(cut, 2) | make_kept(cut, 3))


@pytest.mark.parametrize("name", CASES)
def test_masked_mean_against_a_loop_over_entries(name: str) -> None:
    task, cut = TASKS[name], CUTS[name]
    old, mean = task.init_params(), MaskedMean(cut, task.shapes)
    top = {n: torch.zeros(s, dtype=torch.float64) for n, s in task.shapes.items()}
    bottom = {n: torch.zeros(s, dtype=torch.float64) for n, s in task.shapes.items()}
    for i in range(3):
        rng, touched = torch_rng("client", i), cut.touched(make_kept(cut, 2 * i)) | cut.touched(make_kept(cut, i + 7))
        values = {n: torch.randn(s, generator=rng) for n, s in task.shapes.items()}
        mean.add(pack(values, cut, touched), touched, 10.0 + i)
        marks = {n: torch.zeros(s) for n, s in task.shapes.items()}
        for kept in (make_kept(cut, 2 * i), make_kept(cut, i + 7)):
            for n, region in regions_of(cut, kept).items():
                region.put_(marks[n], torch.ones(region.shape(task.shapes[n])))
        for n in values:
            top[n] += (10.0 + i) * values[n].double() * marks[n]
            bottom[n] += (10.0 + i) * marks[n]
    for n, got in mean.result(old).items():
        want = torch.where(bottom[n] > 0, top[n] / bottom[n].clamp_min(1), old[n].double())
        torch.testing.assert_close(got, want.float())
        assert torch.equal(got[bottom[n] == 0], old[n][bottom[n] == 0])


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_one_kept_set_trains_as_the_whole_one(name: str) -> None:
    task, cut = TASKS[name], CUTS[name]
    kept, gates = make_kept(cut, 2), torch.rand(cut.blocks, generator=torch_rng("gates")) + 0.2
    start = task.init_params()
    sent = pack(start, cut, cut.touched(kept))
    whole, own = cut.working(task, start), cut.working_kept(task, sent, kept)
    x, y = make_batch(name)
    task.model.train(True)
    for model in (whole, own):
        model.use(kept)
        for _ in range(2):
            grads = torch.autograd.grad(task.criterion(model.forward(gates, x), y), model.leaves)
            model.step(grads, lr=0.05, momentum=0.9, weight_decay=0.01, clip=1.0)
    assert torch.equal(own.values(), whole.values())
    assert torch.equal(sent, pack(start, cut, cut.touched(kept)))


@pytest.mark.parametrize("name", CASES)
def test_costs_count_what_the_kept_set_uses(name: str) -> None:
    """Against the gathered tensors and against the cost model."""
    task, cut = TASKS[name], CUTS[name]
    layers = trace(task.model, task.input_shape, tokens=task.tokens)
    model = cut.working(task, task.init_params())
    for seed in range(5):
        kept = make_kept(cut, seed)
        model.use(kept)
        densities = cut.densities(kept)
        assert cut.spent(kept) == sum(leaf.numel() for leaf in model.leaves) == kept_count(layers, densities)
        assert cut.spent(kept, "multiply_adds") == pytest.approx(forward_macs(layers, densities), rel=1e-12)
        values = pack(task.init_params(), cut, cut.touched(kept))
        assert cut.spent(kept, "bytes") == 4 * len(values) + len(pack_bits(cut.touched(kept)))
    assert cut.spent(cut.everything, "multiply_adds") == forward_macs(layers)


@pytest.mark.parametrize("name", SMALL)
def test_a_block_costs_what_goes_with_it_when_all_others_are_there(name: str) -> None:
    """Its nominal size is what it owns: with all kept, dropping it also frees the columns that it feeds."""
    cut = CUTS[name]
    for cost in COSTS:
        rest = cut.spent(cut.everything, cost) - int(cut.weights(cost).sum())
        assert 0 <= rest < cut.spent(cut.everything, cost)
        for block in range(cut.blocks):
            less = cut.everything
            less[block] = False
            owned = factors(cut, less, torch.ones(cut.blocks))
            dropped = sum(int((f.expand(TASKS[name].shapes[n]) == 0).sum()) for n, f in owned.items())
            if cost == "parameters":
                assert cut.weights(cost)[block] == dropped
            assert cut.spent(cut.everything, cost) - cut.spent(less, cost) >= cut.weights(cost)[block]


@settings(max_examples=40)
@given(st.sampled_from(sorted(CASES)), st.floats(0, 1), st.integers(0, 1000), st.sampled_from(COSTS))
def test_every_choice_holds_its_limit(name: str, share: float, seed: int, cost: str) -> None:
    cut = CUTS[name]
    low, high = cut.spent(cut.forced, cost), cut.spent(cut.everything, cost)
    limit = round(low + share * (high - low))
    kept = choose_blocks(cut, numpy_rng("importance", seed).random(cut.blocks), {cost: limit}, cost)
    assert kept[cut.forced].all()
    assert cut.spent(kept, cost) <= limit


def test_the_spaces_of_resnet18() -> None:
    """One residual stream a stage, its shortcut in it, and the hidden channels of each block apart."""
    cut = structural_cut(build_model("resnet18", (3, 32, 32), 10), (3, 32, 32))
    assert [(space.name, space.units) for space in cut.spaces] == [
        ("conv1", 64), ("layer1.0.conv1", 64), ("layer1.1.conv1", 64),
        ("layer2.0.conv1", 128), ("layer2.0.conv2", 128), ("layer2.1.conv1", 128),
        ("layer3.0.conv1", 256), ("layer3.0.conv2", 256), ("layer3.1.conv1", 256),
        ("layer4.0.conv1", 512), ("layer4.0.conv2", 512), ("layer4.1.conv1", 512),
    ]  # fmt: skip
    assert cut.spent(cut.everything) == 11_173_962
    assert cut.spent(cut.everything, "multiply_adds") == 555_422_720
    owners = {t.name: cut.spaces[t.owning.space].name for t in cut.tensors if t.owning is not None}
    stage = ("0.conv2.weight", "0.bn2.weight", "0.shortcut.conv.weight", "0.shortcut.bn.bias", "1.conv2.weight")
    assert {owners[f"layer2.{key}"] for key in stage} == {"layer2.0.conv2"}
    assert {owners[key] for key in ("bn1.running_mean", "layer1.0.conv2.weight", "layer1.1.bn2.weight")} == {"conv1"}
    assert {g.name for g in cut.outputs} == {t.layer for t in cut.tensors if ".bn" in t.name or t.name[:3] == "bn1"}


def test_group_norms_keep_whole_groups() -> None:
    cut = structural_cut(
        build_model("resnet18", (3, 8, 8), CLASSES, norm="group"), (3, 8, 8), blocks_per_layer=5, max_block_frac=1.0
    )
    assert cut.spaces[0].bounds == (0, 16, 24, 40, 48, 64)  # 16 norm groups of 4 channels; multiples of 8
    assert ("bn1", "num_groups", 4) in cut.counts(cut.forced)
    narrow = CUTS["resnet-group"]  # 8 channels in 2 norm groups, too few for multiples of 8
    assert narrow.spaces[0].bounds == (0, 4, 8)


@pytest.mark.parametrize("name", model_names())
def test_every_model_of_the_registry_is_cut(name: str) -> None:
    tokens = name == "charlstm"
    shape = (20,) if tokens else (3, 32) if name == "cnn1d" else (3, 32, 32)
    model = build_model(name, shape, 10, width=0.25, vocabulary=30 if tokens else 0)
    if name == "logistic":
        with pytest.raises(UserError, match="without a hidden layer"):
            structural_cut(model, shape)
        return
    cut = structural_cut(model, shape, tokens=tokens)
    layers = trace(model, shape, tokens=tokens)
    assert cut.spent(cut.everything) == kept_count(layers)
    assert cut.spent(cut.everything, "multiply_adds") == forward_macs(layers)
    assert {t.layer for t in cut.tensors if t.owning is None} <= {"output"}
    scaled = structural_cut(model, shape, tokens=tokens, class_gates=True)
    assert [s.units for s in scaled.spaces if s.scaled] == [10] and scaled.blocks == cut.blocks + 10
    assert scaled.spent(scaled.forced) == cut.spent(cut.forced)
    for space in cut.spaces:
        sizes = [b - a for a, b in itertools.pairwise(space.bounds)]
        assert max(sizes) - min(sizes) <= (8 if all(size % 8 == 0 for size in sizes) else 1)


def refused(**layers: nn.Module) -> nn.Module:
    """fc1, then the layer in question, then the classifier."""
    return nn.Sequential(nn.Linear(4, 4), *layers.values(), nn.Linear(4, CLASSES))


def net(run: Callable[[nn.Module, Tensor], Tensor], a: nn.Module, features: int) -> Callable[[], nn.Module]:
    """Builds layer ``a`` and the classifier ``b``."""
    return lambda: Net(run, a=a, b=nn.Linear(features, CLASSES))


def concatenated(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(torch.cat([m.a(x), m.a(-x)], 1))


UNCUT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "layer norm": (lambda: refused(norm=nn.LayerNorm(4)), (4,), r"layer '1' \(LayerNorm\)"),
    "sigmoid": (lambda: refused(act=nn.Sigmoid()), (4,), r"layer '1' \(Sigmoid\)"),
    "softplus": (net(lambda m, x: m.b(functional.softplus(m.a(x))), nn.Linear(4, 5), 5), (4,), "operation 'softplus'"),
    "grouped": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(12, 4)),
        (4, 3),
        r"layer '1' \(Conv1d\), a grouped convolution",
    ),
    "bidirectional": (
        net(lambda m, x: m.b(m.a(x)[0][:, -1]), nn.LSTM(4, 3, bidirectional=True, batch_first=True), 6),
        (5, 4),
        r"layer 'a' \(LSTM\), bidirectional",
    ),
    "own start": (
        net(lambda m, x: m.b(m.a(x, x[:, 0].unsqueeze(0))[0][:, -1]), nn.GRU(4, 4, batch_first=True), 4),
        (5, 4),
        r"layer 'a' \(GRU\), with more than one input",
    ),
    "constant": (net(lambda m, x: m.b(m.a(x) + 1), nn.Linear(4, 5), 5), (4,), "operation 'add'"),
    "concatenation": (net(concatenated, nn.Linear(4, 3), 6), (4,), "operation 'cat'"),
    "fixed size": (net(lambda m, x: m.b(m.a(x).view(-1, 20)), nn.Conv1d(4, 5, 1), 20), (4, 4), "operation 'view'"),
    "max norm": (net(lambda m, x: m.b(m.a(x).flatten(1)), nn.Embedding(9, 3, max_norm=1.0), 9), (3,), "max_norm"),
    "attention": (
        net(lambda m, x: m.b(m.a(x, x, x)[0][:, 0]), nn.MultiheadAttention(4, 2, batch_first=True), 4),
        (3, 4),
        r"layer 'a' \(MultiheadAttention\)",
    ),
    "own parameter": (net(lambda m, x: m.b(m.a(x) * m.a.bias), nn.Linear(4, 5), 5), (4,), "operation 'mul'"),
    "quotient": (net(lambda m, x: m.b(m.a(x) / m.a(-x)), nn.Linear(4, 5), 5), (4,), "operation 'truediv'"),
    "inverse": (net(lambda m, x: m.b(2 / m.a(x)), nn.Linear(4, 5), 5), (4,), "operation 'truediv'"),
    "pool of channels": (
        net(lambda m, x: m.b(functional.avg_pool2d(m.a(x), 2).flatten(1)), nn.Conv1d(4, 6, 1), 6),
        (4, 4),
        "operation 'avg_pool2d'",
    ),
    "all channels": (net(lambda m, x: m.b(m.a(x).mean(1)), nn.Conv1d(4, 5, 1), 3), (4, 3), "operation 'mean'"),
}


@pytest.mark.parametrize("name", UNCUT)
def test_what_cannot_be_cut_is_named(name: str) -> None:
    build, shape, message = UNCUT[name]
    with pytest.raises(UserError, match=f"pFedGate cannot cut.*{message}.*uncut = .keep."):
        structural_cut(build(), shape, tokens=name == "max norm")


@pytest.mark.parametrize("name", UNCUT)
def test_or_it_is_kept_whole(name: str) -> None:
    """With a layer behind it that is cut; compact equals masked dense."""
    build, shape, _ = UNCUT[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(build(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    tokens = name == "max norm"
    task = Task(model, shape, CLASSES, 0, vocabulary=9 if tokens else 0)
    cut = make_cut(task, keep=True)
    assert "1" in [space.name for space in cut.spaces]
    kept = make_kept(cut, 3)
    gates = torch.rand(cut.blocks, generator=torch_rng("gates"))
    x = torch.ones(3, *shape, dtype=torch.int64) if tokens else torch.randn(3, *shape, generator=torch_rng("x"))
    params = task.init_params()
    work = cut.working(task, params)
    work.use(kept)
    torch.testing.assert_close(work.forward(gates, x), masked_dense(task, cut, params, kept, gates, x))
    assert cut.spent(cut.everything) == sum(p.numel() for p in model.parameters())
    assert cut.spent(cut.everything, "multiply_adds") == forward_macs(trace(model, shape, tokens=tokens))


def test_a_transformer_is_cut_by_heads_and_hidden_units() -> None:
    """Its stream stays whole, for the layer norms: that is named, unless the stream is the network's input anyway."""
    model = Encoder(norm_first=False)
    with pytest.raises(UserError, match=r"layer 'encoder.layers.0.norm1' \(LayerNorm\); method.uncut"):
        structural_cut(model, (7,), tokens=True)
    cut = structural_cut(nn.Sequential(model.encoder, nn.Linear(12, CLASSES)), (7, 12))
    assert [(space.name, space.units) for space in cut.spaces] == [
        ("0.layers.0.self_attn", 4), ("0.layers.0.linear1", 10),
        ("0.layers.1.self_attn", 4), ("0.layers.1.linear1", 10),
    ]  # fmt: skip
    head, per_head = cut.weights("parameters")[0], 3 * 3 * 12 + 3 * 3
    assert head == cut.spaces[0].bounds[1] * per_head
    assert cut.weights("multiply_adds")[0] == cut.spaces[0].bounds[1] * (7 * 3 * 3 * 12 + 2 * 7 * 7 * 3)
    other = nn.TransformerEncoderLayer(12, 4, 10, batch_first=True, activation=torch.sigmoid)
    with pytest.raises(UserError, match=r"layer '0' \(TransformerEncoderLayer\), with its activation"):
        structural_cut(nn.Sequential(other, nn.Linear(12, 4)), (7, 12))
    last = nn.TransformerEncoderLayer(12, 4, 10)
    with pytest.raises(UserError, match=r"layer '0.self_attn' \(MultiheadAttention\)"):
        structural_cut(nn.Sequential(last, nn.Linear(12, 4)), (7, 12))


def test_models_that_cannot_be_read() -> None:
    tied = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    tied.b.weight = tied.a.weight
    with pytest.raises(UserError, match="share a parameter"):
        structural_cut(tied, (4,))
    branching = Net(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Linear(4, 4))
    with pytest.raises(UserError, match="Net: it cannot be traced"):
        structural_cut(branching, (4,))
    with pytest.raises(UserError, match="does not run on inputs of shape"):
        structural_cut(build_model("mlp", (4,), 3), (5,))
    only = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 2))
    with pytest.raises(UserError, match="nothing is left"):
        structural_cut(only, (4,), keep_uncuttable=True)


def test_the_network_is_as_before_after_a_call() -> None:
    """Modules have their sizes and their own weights again, also after a failed call; the model can be copied."""
    for name in ("charlstm", "mobile", "residual"):
        task, cut = TASKS[name], CUTS[name]
        sizes = {n: {k: v for k, v in vars(m).items() if isinstance(v, int)} for n, m in task.model.named_modules()}
        task.model.train(True)
        model = cut.working(task, task.init_params())
        model.use(cut.forced)
        for x in (make_batch(name)[0], torch.zeros(2, 1, 1, 1, 1)):
            try:
                model.forward(torch.ones(cut.blocks, requires_grad=True), x)
            except (RuntimeError, ValueError):
                assert x.ndim == 5
            for n, m in task.model.named_modules():
                assert {k: v for k, v in vars(m).items() if isinstance(v, int)} == sizes[n]
                assert not m._forward_hooks
                if isinstance(m, nn.RNNBase):  # which would hold on to the compact weights
                    assert {id(w) for w in m._flat_weights} == {id(w) for w in m.parameters()}
            copy.deepcopy(task.model)
            with torch.no_grad():
                want = task.model(make_batch(name)[0])
                assert torch.equal(want, functional_call(task.model, task.init_params(), (make_batch(name)[0],)))


def test_tracing_leaves_the_modes_and_statistics_alone() -> None:
    model = mobile()
    model.train(True)
    model.bn1.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    structural_cut(model, (3, 9, 9))
    assert model.training and not model.bn1.training and model.bn2.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
