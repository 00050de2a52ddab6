"""The structural cut: compact layers against the masked dense model, the codec and the means against loops."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import OrderedDict

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
from fedsparse.models import build_model
from fedsparse.seeding import numpy_rng, torch_rng
from fedsparse.sparse import blocks as blocks_module
from fedsparse.sparse.blocks import GroupCut, structural_cut
from fedsparse.sparse.channels import group_runs
from fedsparse.sparse.choose import choose_blocks
from fedsparse.sparse.codec import pack, pack_bits, unpack, unpack_bits
from fedsparse.sparse.cut import COSTS, Region
from fedsparse.sparse.knapsack import solve
from fedsparse.sparse.mean import MaskedMean, WeightedMean
from fedsparse.steps import step_
from fedsparse.task import Task

CASES = {
    "cnn": ((1, 8, 8), 3),
    "vgg": ((2, 8, 8), 3),
    "series": ((3, 12), 2),
    "mlp": ((6,), 4),
}


def make_model(name: str) -> nn.Module:
    if name == "cnn":
        layers = [
            ("conv1", nn.Conv2d(1, 6, 3)), ("relu1", nn.ReLU()), ("pool1", nn.MaxPool2d(2)),
            ("conv2", nn.Conv2d(6, 7, 2)), ("relu2", nn.ReLU()), ("flatten", nn.Flatten()),
            ("fc1", nn.Linear(28, 5)), ("relu3", nn.ReLU()), ("output", nn.Linear(5, 3)),
        ]  # fmt: skip
    elif name == "vgg":
        layers = [
            ("bn0", nn.BatchNorm2d(2)),
            ("conv1", nn.Conv2d(2, 5, 3, padding=1, bias=False)), ("bn1", nn.BatchNorm2d(5)),
            ("relu1", nn.ReLU()), ("pool1", nn.MaxPool2d(2)), ("conv2", nn.Conv2d(5, 4, 3)), ("bn2", nn.BatchNorm2d(4)),
            ("relu2", nn.ReLU()), ("flatten", nn.Flatten()), ("output", nn.Linear(16, 3)),
        ]  # fmt: skip
    elif name == "series":
        layers = [
            ("conv1", nn.Conv1d(3, 6, 5, padding=2)), ("relu1", nn.ReLU()), ("pool1", nn.MaxPool1d(4)),
            ("flatten", nn.Flatten()), ("fc1", nn.Linear(18, 8)), ("relu2", nn.ReLU()), ("output", nn.Linear(8, 2)),
        ]  # fmt: skip
    else:
        layers = [
            ("flatten", nn.Flatten()),
            ("fc1", nn.Linear(6, 9)),
            ("relu1", nn.ReLU()),
            ("output", nn.Linear(9, 4)),
        ]
    return nn.Sequential(OrderedDict(layers))


def make_task(name: str) -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = make_model(name)
        for key, buffer in model.named_buffers():
            if buffer.ndim:
                buffer.copy_(torch.rand(buffer.shape) + (0.5 if "var" in key else 0))
    return Task(model, *CASES[name], seed=0)


def make_cut(task: Task, blocks_per_layer: int = 3, max_block_frac: float = 1.0) -> GroupCut:
    return structural_cut(
        task.model, task.input_shape, blocks_per_layer=blocks_per_layer, max_block_frac=max_block_frac
    )


def make_batch(name: str, n: int = 6) -> tuple[Tensor, Tensor]:
    shape, classes = CASES[name]
    rng = torch_rng("batch", name)
    return torch.randn(n, *shape, generator=rng), torch.randint(classes, (n,), generator=rng)


def masks(cut: GroupCut) -> list[np.ndarray]:
    rng = numpy_rng("masks")
    return [cut.forced.copy(), np.ones(cut.blocks, bool)] + [
        cut.forced | (rng.random(cut.blocks) < 0.5) for _ in range(4)
    ]


def regions_of(cut: GroupCut, kept: np.ndarray) -> dict[str, Region]:
    """By tensor, the part of a single kept set."""
    regions = cut.regions(cut.touched(kept))
    assert len({region.name for region in regions}) == len(regions)
    return {region.name: region for region in regions}


def unit_gates(cut: GroupCut, kept: np.ndarray, gates: Tensor) -> dict[str, Tensor]:
    """By layer whose outputs are scaled, one factor a unit, 0 where dropped: the oracle's way, unit by unit."""
    out = {}
    for gated in cut.outputs:
        space = cut.spaces[gated.axis.space]
        factors = []
        for g in range(space.groups):
            block = space.first_block + g
            factor = gates[block] if kept[block] else torch.zeros(())
            factors += [factor] * (space.bounds[g + 1] - space.bounds[g])
        out[gated.name] = torch.stack(factors)
    return out


def masked_dense(
    task: Task, cut: GroupCut, params: dict[str, Tensor], kept: np.ndarray, gates: Tensor, x: Tensor
) -> Tensor:
    """The dense model in which dropped units put out 0 and kept ones are scaled, by hooks."""
    factors = unit_gates(cut, kept, gates)
    hooks = []
    for name, factor in factors.items():

        def scale(module: nn.Module, inputs: object, output: Tensor, factor: Tensor = factor) -> Tensor:
            return output * factor.view(-1, *[1] * (output.ndim - 2))

        hooks.append(task.model.get_submodule(name).register_forward_hook(scale))
    try:
        return functional_call(task.model, params, (x,))
    finally:
        for hook in hooks:
            hook.remove()


def test_the_cut_of_leafcnn1() -> None:
    """d, nominal and smallest sizes by hand; the 2048 rows of 1025 scalars need 19 groups to be at most 5 % of d.

    Groups of the convolutions are multiples of eight channels.
    """
    cut = structural_cut(build_model("leafcnn1", (1, 28, 28), 62), (1, 28, 28))
    total, nominal = cut.spent(cut.everything), cut.weights("parameters")
    assert total == 2_278_334
    assert [space.groups for space in cut.spaces] == [4, 5, 19]
    assert cut.spaces[0].bounds == (0, 8, 16, 24, 32)
    assert cut.spaces[1].bounds == (0, 16, 24, 40, 48, 64)
    assert cut.names[:5] == ("conv1.0", "conv1.1", "conv1.2", "conv1.3", "conv2.0")
    assert nominal.max() <= 0.05 * total
    assert nominal[0] == 8 * 26
    assert nominal[4] == 16 * (32 * 25 + 1)
    assert nominal.sum() + 62 * 2049 == total
    assert cut.spent(cut.forced) == 8 * 26 + 16 * (8 * 25 + 1) + 108 * (16 * 16 + 1) + 62 * 109
    assert cut.weights("multiply_adds")[4] == 16 * 32 * 25 * 64  # 8 x 8 positions
    assert cut.spent(cut.forced, "bytes") == 4 * cut.spent(cut.forced) + -(-cut.parts // 8)


@pytest.mark.parametrize("name", CASES)
def test_kept_sets_of_one_price_class_cost_the_same(name: str) -> None:
    cut = make_cut(make_task(name), blocks_per_layer=5)
    rng = numpy_rng("classes", name)
    found: dict[bytes, set[tuple[object, ...]]] = {}
    for _ in range(300):
        kept = cut.forced | (rng.random(cut.blocks) < 0.5)
        costs = (*(cut.spent(kept, cost) for cost in COSTS), *cut.densities(kept).items())
        found.setdefault(cut.price_class(kept), set()).add(costs)
    assert len(found) < 300
    assert all(len(costs) == 1 for costs in found.values())


@pytest.mark.parametrize("name", CASES)
def test_costs_count_what_the_kept_set_uses(name: str) -> None:
    """Against counting entries of dense masks, against the cost model, and against the packed update."""
    task = make_task(name)
    cut, layers = make_cut(task, blocks_per_layer=5), trace(task.model, task.input_shape)
    for kept in masks(cut):
        marked = {n: torch.zeros(s, dtype=torch.bool) for n, s in task.shapes.items()}
        for region in cut.regions(cut.touched(kept)):
            region.put_(marked[region.name], torch.ones(region.shape(task.shapes[region.name]), dtype=torch.bool))
        assert cut.spent(kept) == sum(int(marked[n].sum()) for n in task.trainable)
        assert cut.spent(kept) == kept_count(layers, cut.densities(kept))
        assert cut.spent(kept, "multiply_adds") == pytest.approx(forward_macs(layers, cut.densities(kept)), rel=1e-12)
        values = pack(task.init_params(), cut, cut.touched(kept))
        assert cut.spent(kept, "bytes") == 4 * len(values) + len(pack_bits(cut.touched(kept)))
    everything = cut.everything
    assert cut.spent(everything) == sum(p.numel() for p in task.model.parameters())
    assert cut.spent(everything, "multiply_adds") == forward_macs(layers)
    with pytest.raises(UserError, match="seconds"):
        cut.spent(everything, "seconds")
    with pytest.raises(UserError, match="seconds"):
        cut.weights("seconds")


@pytest.mark.parametrize("name", CASES)
def test_what_a_block_adds_is_the_difference_that_it_makes(name: str) -> None:
    cut = make_cut(make_task(name), blocks_per_layer=5)
    for kept, cost in itertools.product(masks(cut), COSTS):
        added = cut.added(kept, cost)
        for block in np.flatnonzero(~kept):
            more = kept.copy()
            more[block] = True
            assert added[block] == cut.spent(more, cost) - cut.spent(kept, cost)


@settings(max_examples=100)
@given(st.data(), st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 3))
def test_stretches_against_entry_by_entry(data: st.DataObject, sizes: list[int], repeats: int, span: int) -> None:
    kept = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    runs = group_runs(kept, [0, *itertools.accumulate(sizes)], repeats, span)
    one = [keep for keep, size in zip(kept, sizes, strict=True) for _ in range(size * span)]
    want = [i for i, keep in enumerate(one * repeats) if keep]
    if runs is None:
        assert all(kept)
        return
    assert [i for first, end in runs.spans for i in range(first, end)] == want
    assert runs.length == len(want)
    assert [want[start] for start in runs.starts] == [first for first, _ in runs.spans]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs.spans))  # adjacent ones are one


@pytest.mark.parametrize("name", CASES)
def test_a_block_owns_rows_biases_and_norm_terms(name: str) -> None:
    """Its nominal size, from the slices of the layer and of the norm that follows."""
    task = make_task(name)
    cut = make_cut(task)
    modules = dict(task.model.named_modules())
    for space in cut.spaces:
        owned = [modules[n] for n in (space.name, space.name.replace("conv", "bn")) if n in modules]
        for g, (a, b) in enumerate(itertools.pairwise(space.bounds)):
            parameters = [p[a:b] for m in dict.fromkeys(owned) for p in m.parameters()]
            buffers = [t[a:b] for m in dict.fromkeys(owned) for t in m.buffers() if t.ndim]
            block = space.first_block + g
            assert cut.weights("parameters")[block] == sum(p.numel() for p in parameters)
            assert cut.weights("bytes")[block] == 4 * sum(p.numel() for p in (*parameters, *buffers))


@pytest.mark.parametrize("name", CASES)
def test_compact_equals_masked_dense(name: str) -> None:
    """Outputs, statistics, gradients of weights and gates, and the weights after one SGD step."""
    check_against_masked_dense(name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [0, 10**9], ids=["outputs", "weights"])
def test_gates_on_outputs_and_on_weights_give_the_same(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "_BATCH", batch)
    cut = make_cut(make_task(name))
    norms = {gated.name for gated in cut.outputs if "bn" in gated.name}
    assert set(cut.folded) == ({gated.name for gated in cut.outputs} if batch else norms)
    check_against_masked_dense(name)


def test_the_gates_of_convolutions_act_on_their_weights_where_these_are_few() -> None:
    """LeafCNN1: 25 and 800 weights a channel for 576 and 64 positions; 1,024 for the one output of a hidden unit."""
    cut = structural_cut(build_model("leafcnn1", (1, 28, 28), 62), (1, 28, 28))
    assert set(cut.folded) == {t.layer for t in cut.tensors if t.name.endswith("weight") and len(t.shape) == 4}


def check_against_masked_dense(name: str) -> None:
    task = make_task(name)
    cut = make_cut(task)
    x, y = make_batch(name)
    task.model.train(True)
    for i, kept in enumerate(masks(cut)):
        gates = torch.rand(cut.blocks, generator=torch_rng("gates", i)).requires_grad_()
        dense = task.init_params()
        leaves = [dense[n].requires_grad_() for n in task.trainable]
        logits = masked_dense(task, cut, dense, kept, gates, x)
        want = torch.autograd.grad(functional.cross_entropy(logits, y), [*leaves, gates], materialize_grads=True)

        model = cut.working(task, task.init_params())
        model.use(kept)
        got_logits = model.forward(gates, x)
        got = torch.autograd.grad(functional.cross_entropy(got_logits, y), [*model.leaves, gates])
        torch.testing.assert_close(got_logits, logits)
        parts = regions_of(cut, kept)
        for n, full, compact in zip(task.trainable, want, got, strict=False):
            torch.testing.assert_close(compact, parts[n].take(full))
            rest = full.clone()
            parts[n].put_(rest, torch.zeros_like(compact))
            assert not rest.count_nonzero()  # the dense model has no gradient outside the kept part
        torch.testing.assert_close(got[-1], want[-1])

        model.step(got[:-1], lr=0.3, momentum=0.9, weight_decay=0.0, clip=0.0)
        with torch.no_grad():
            step_(leaves, want[:-1], [], lr=0.3, momentum=0.9)
        model.flush()
        for n in task.trainable:
            torch.testing.assert_close(model.params[n], dense[n].detach())


def test_the_gate_gradient_is_the_product_of_weights_and_their_gradient() -> None:
    """dL/dm_l = <theta_l, dL/dtheta'_l> with theta' = m * theta (spec of the method, test 6)."""
    task = make_task("cnn")
    cut = make_cut(task)
    x, y = make_batch("cnn")
    gates = torch.full((cut.blocks,), 0.7, requires_grad=True)
    params = task.init_params()
    model = cut.working(task, params)
    model.use(cut.everything)
    (got,) = torch.autograd.grad(functional.cross_entropy(model.forward(gates, x), y), [gates])
    hidden = [("conv1", 0), ("conv2", 1), ("fc1", 2)]
    names = [f"{layer}.{key}" for layer, _ in hidden for key in ("weight", "bias")]
    leaves = {n: (t * 0.7 if n in names else t).requires_grad_() for n, t in params.items()}
    loss = functional.cross_entropy(functional_call(task.model, leaves, (x,)), y)
    by_name = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for layer, i in hidden:
        space = cut.spaces[i]
        for g, (a, b) in enumerate(itertools.pairwise(space.bounds)):
            owned = [f"{layer}.weight", f"{layer}.bias"]
            want = sum((params[n][a:b] * by_name[n][a:b]).sum() for n in owned)
            torch.testing.assert_close(got[space.first_block + g], want)


@pytest.mark.parametrize("name", CASES)
def test_all_kept_and_gates_of_one_have_the_bits_of_the_plain_model(name: str) -> None:
    task = make_task(name)
    cut = make_cut(task, blocks_per_layer=5, max_block_frac=0.05)
    x, y = make_batch(name)
    model = cut.working(task, task.init_params())
    model.use(cut.everything)
    where = {t.data_ptr() for t in model.params.values()}
    assert all(leaf.data_ptr() in where for leaf in model.leaves)  # nothing is copied
    plain = task.init_params()
    leaves = [plain[n].requires_grad_() for n in task.trainable]
    task.model.train(True)
    want = torch.autograd.grad(task.loss(plain, x, y, train=True), leaves)
    loss = task.criterion(model.forward(torch.ones(cut.blocks), x), y)
    for a, b in zip(torch.autograd.grad(loss, model.leaves), want, strict=True):
        assert torch.equal(a, b)
    for n in task.buffers:
        assert torch.equal(model.params[n], plain[n])


@pytest.mark.parametrize("name", CASES)
def test_lazy_sgd_is_masked_sgd_over_changing_masks(name: str) -> None:
    """Momentum, decay and weights move only in the parts in use; against whole tensors with boolean masks."""
    task = make_task(name)
    cut = make_cut(task)
    model = cut.working(task, task.init_params())
    want, momentum = task.init_params(), {n: torch.zeros(task.shapes[n]) for n in task.trainable}
    for i, kept in enumerate([*masks(cut), masks(cut)[-1]]):
        model.use(kept)
        rng = torch_rng("grads", i)
        full = {n: torch.randn(task.shapes[n], generator=rng) for n in task.trainable}
        parts = regions_of(cut, kept)
        grads = tuple(parts[n].take(full[n]).clone() for n in task.trainable)
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        model.step(grads, lr=0.1, momentum=0.9, weight_decay=0.01, clip=norm / 2)
        for n in task.trainable:
            on = torch.zeros(task.shapes[n], dtype=torch.bool)
            parts[n].put_(on, torch.ones(parts[n].shape(task.shapes[n]), dtype=torch.bool))
            momentum[n] = torch.where(on, 0.9 * momentum[n] + full[n] / 2 + 0.01 * want[n], momentum[n])
            want[n] = torch.where(on, want[n] - 0.1 * momentum[n], want[n])
    model.flush()
    for n in task.trainable:
        torch.testing.assert_close(model.params[n], want[n])


@pytest.mark.parametrize("name", CASES)
def test_weights_that_no_batch_used_keep_their_bits(name: str) -> None:
    """After a round over two kept sets (spec of the method, test 4); ``touched`` is their union."""
    task = make_task(name)
    cut = make_cut(task)
    start = task.init_params()
    model = cut.working(task, start)
    task.model.train(True)
    used = {n: torch.zeros(s, dtype=torch.bool) for n, s in task.shapes.items()}
    for kept in (masks(cut)[2], masks(cut)[3], masks(cut)[2]):
        model.use(kept)
        for n, region in regions_of(cut, kept).items():
            region.put_(used[n], torch.ones(region.shape(task.shapes[n]), dtype=torch.bool))
        loss = task.criterion(model.forward(torch.ones(cut.blocks), make_batch(name)[0]), make_batch(name)[1])
        grads = torch.autograd.grad(loss, model.leaves)
        model.step(grads, lr=0.5, momentum=0.9, weight_decay=0.1, clip=0.0)
    values = model.values()
    moved = 0
    for n in task.shapes:
        assert torch.equal(model.params[n][~used[n]], start[n][~used[n]])
        moved += int((model.params[n] != start[n]).sum())
    assert moved > 0.9 * len(values)
    assert len(values) == sum(int(u.sum()) for u in used.values())
    assert np.array_equal(model.touched, cut.touched(masks(cut)[2]) | cut.touched(masks(cut)[3]))
    assert np.array_equal(cut.blocks_of(model.touched), masks(cut)[2] | masks(cut)[3])


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_one_kept_set_trains_as_the_whole_one(name: str) -> None:
    """Bit by bit, from the packed values alone; and it can use no other set."""
    task = make_task(name)
    cut = make_cut(task)
    kept, other = masks(cut)[2], cut.everything
    start, gates = task.init_params(), torch.rand(cut.blocks, generator=torch_rng("gates"))
    sent = pack(start, cut, cut.touched(kept))
    before = sent.clone()
    whole, own = cut.working(task, start), cut.working_kept(task, sent, kept)
    assert sum(t.numel() for t in own.params.values()) == len(sent)
    x, y = make_batch(name)
    task.model.train(True)
    for model in (whole, own):
        model.use(kept)
        for _ in range(2):
            grads = torch.autograd.grad(task.criterion(model.forward(gates, x), y), model.leaves)
            model.step(grads, lr=0.1, momentum=0.9, weight_decay=0.01, clip=1.0)
        model.flush()
    assert torch.equal(own.values(), whole.values())
    assert torch.equal(torch.cat([t.flatten() for t in gathered(own.params, cut, kept)]), own.values())
    assert not torch.equal(own.values(), before)
    assert torch.equal(sent, before)  # packets are not written to
    assert np.array_equal(own.touched, cut.touched(kept))
    with pytest.raises(ValueError, match="one kept set"):
        own.use(other)
    with pytest.raises(UserError, match="does not fit"):
        cut.working_kept(task, sent[:-1], kept)


def gathered(params: dict[str, Tensor], cut: GroupCut, kept: np.ndarray) -> list[Tensor]:
    """Compact tensors in the order in which they are sent."""
    return [params[region.name] for region in cut.regions(cut.touched(kept))]


def test_a_model_that_only_reads_shares_the_tensors() -> None:
    task = make_task("vgg")
    cut = make_cut(task)
    params = task.init_params()
    before = {n: t.clone() for n, t in params.items()}
    model = cut.working(task, params, train=False)
    task.model.eval()
    assert all(model.params[n].data_ptr() == params[n].data_ptr() for n in params)
    model.use(cut.everything)
    with torch.no_grad():
        got = model.forward(torch.ones(cut.blocks), make_batch("vgg")[0])
    with task.bound(params) as network:
        assert torch.equal(got, network(make_batch("vgg")[0]))
    model.use(cut.forced)
    model.flush()
    assert model.leaves == []
    assert not model.touched.any()
    assert all(torch.equal(params[n], before[n]) for n in params)


def test_the_network_is_as_before_after_a_call_and_after_a_failed_one() -> None:
    task = make_task("vgg")
    cut = make_cut(task)
    model = cut.working(task, task.init_params())
    model.use(cut.forced)
    own = dict(task.model.named_parameters())
    for x in (make_batch("vgg")[0], torch.zeros(2, 7)):
        with contextlib.suppress(RuntimeError, ValueError):
            model.forward(torch.ones(cut.blocks), x)
        assert all(not module._forward_hooks for module in task.model.modules())
        assert all(p is own[n] for n, p in task.model.named_parameters())


@settings(max_examples=40)
@given(st.sampled_from(sorted(CASES)), st.floats(0, 1), st.integers(0, 1000), st.sampled_from(COSTS))
def test_chosen_blocks_fit_and_leave_no_room(name: str, share: float, seed: int, cost: str) -> None:
    cut = make_cut(make_task(name), blocks_per_layer=5)
    low, high = cut.spent(cut.forced, cost), cut.spent(cut.everything, cost)
    limit = round(low + share * (high - low))
    importance = numpy_rng("importance", seed).random(cut.blocks)
    kept = choose_blocks(cut, importance, {cost: limit}, cost)
    assert kept[cut.forced].all()
    assert cut.spent(kept, cost) <= limit
    for block in np.flatnonzero(~kept):
        more = kept.copy()
        more[block] = True
        assert cut.spent(more, cost) > limit
    with pytest.raises(ValueError, match="smallest"):
        choose_blocks(cut, importance, {cost: low - 1}, cost)


@settings(max_examples=40)
@given(st.sampled_from(sorted(CASES)), st.tuples(*[st.floats(0, 1)] * 3), st.integers(0, 1000), st.sampled_from(COSTS))
def test_all_limits_hold_together(name: str, shares: tuple[float, ...], seed: int, cost: str) -> None:
    """And no block that was left out fits under all of them; against steps one by one, without short cuts."""
    cut = make_cut(make_task(name))
    limits = {}
    for c, share in zip(COSTS, shares, strict=True):
        low, high = cut.spent(cut.forced, c), cut.spent(cut.everything, c)
        limits[c] = round(low + share * (high - low))
    importance = numpy_rng("importance", seed).random(cut.blocks).round(1)  # with ties
    kept = choose_blocks(cut, importance, limits, cost)
    assert np.array_equal(kept, slow_choice(cut, importance, limits, cost))
    assert all(cut.spent(kept, c) <= limit for c, limit in limits.items())
    for block in np.flatnonzero(~kept):
        more = kept.copy()
        more[block] = True
        assert any(cut.spent(more, c) > limit for c, limit in limits.items())


def test_of_equals_the_highest_index_goes_first() -> None:
    """The knapsack takes all, bytes allow all but one block."""
    cut = make_cut(make_task("mlp"))
    limits = {"parameters": 10**6, "bytes": cut.spent(cut.everything, "bytes") - 1}
    assert choose_blocks(cut, np.ones(cut.blocks), limits).tolist() == [True, True, False]


def slow_choice(cut: GroupCut, importance: np.ndarray, limits: dict[str, int], cost: str) -> np.ndarray:
    def fits(kept: np.ndarray) -> bool:
        return all(cut.spent(kept, c) <= limit for c, limit in limits.items())

    kept, free = cut.forced.copy(), [int(b) for b in np.flatnonzero(~cut.forced)]
    if fits(cut.everything):
        return cut.everything
    sizes = cut.weights(cost)
    capacity = limits[cost] - cut.spent(cut.everything, cost) + int(sizes[free].sum())
    kept[free] = solve(importance[free], sizes[free], capacity, "exact")
    while not fits(kept):
        chosen = [b for b in free if kept[b]]
        kept[min(chosen, key=lambda b: (importance[b], -b))] = False
    for block in sorted(free, key=lambda b: (-importance[b], b)):
        if not kept[block]:
            kept[block] = True
            kept[block] = fits(kept)
    return kept


def test_the_knapsack_needs_a_limit_of_its_cost() -> None:
    cut = make_cut(make_task("mlp"))
    with pytest.raises(ValueError, match="counts bytes"):
        choose_blocks(cut, np.ones(cut.blocks), {"parameters": 10**6}, "bytes")
    assert choose_blocks(cut, np.ones(cut.blocks), {"parameters": 10**6}).all()


@given(st.lists(st.booleans(), max_size=40))
def test_bitmap_against_a_loop(bits: list[bool]) -> None:
    packed = pack_bits(np.array(bits, bool))
    want = [0] * -(-len(bits) // 8)
    for i, bit in enumerate(bits):
        want[i // 8] |= bit << (7 - i % 8)
    assert packed.tolist() == want
    assert packed.dtype == torch.uint8
    assert unpack_bits(packed, len(bits)).tolist() == bits
    with pytest.raises(UserError, match="bytes"):
        unpack_bits(packed, len(bits) + 8)


@pytest.mark.parametrize("name", CASES)
def test_packed_values_are_those_of_the_touched_entries(name: str) -> None:
    """One mask: the compact tensors. Several: the union of their entries, each once, and back into place."""
    task = make_task(name)
    cut = make_cut(task)
    params = task.init_params()
    for some in ([], *[[m] for m in masks(cut)], masks(cut)[2:]):
        touched, marks = np.zeros(cut.parts, bool), {n: torch.zeros(s) for n, s in task.shapes.items()}
        for n in (t.name for t in cut.tensors if not t.cut):
            marks[n] += 1
        for kept in some:
            touched |= cut.touched(kept)
            for region in cut.regions(cut.touched(kept)):
                region.put_(marks[region.name], torch.ones(region.shape(task.shapes[region.name])))
        values = pack(params, cut, touched)
        assert len(values) == sum(int(m.sum()) for m in marks.values())
        back = {n: torch.zeros(s) for n, s in task.shapes.items()}
        for region, value in unpack(values, cut, touched, task.shapes):
            region.put_(back[region.name], value)
        for n in params:
            assert torch.equal(back[n], params[n] * marks[n])
        with pytest.raises(UserError, match="does not fit"):
            list(unpack(torch.zeros(len(values) + 1), cut, touched, task.shapes))


@pytest.mark.parametrize("name", CASES)
def test_masked_mean_against_a_loop_over_entries(name: str) -> None:
    task = make_task(name)
    cut = make_cut(task)
    old, mean = task.init_params(), MaskedMean(cut, task.shapes)
    top = {n: torch.zeros(s, dtype=torch.float64) for n, s in task.shapes.items()}
    bottom = {n: torch.zeros(s, dtype=torch.float64) for n, s in task.shapes.items()}
    for i, kept in enumerate([masks(cut)[0], *masks(cut)[2:4]]):
        rng = torch_rng("client", i)
        values = {n: torch.randn(s, generator=rng) for n, s in task.shapes.items()}
        touched, n_train = cut.touched(kept), 10.0 + i
        mean.add(pack(values, cut, touched), touched, n_train)
        marks = {n: torch.zeros(s) for n, s in task.shapes.items()}
        for region in cut.regions(cut.touched(kept)):
            region.put_(marks[region.name], torch.ones(region.shape(task.shapes[region.name])))
        for n in values:
            top[n] += n_train * values[n].double() * marks[n]
            bottom[n] += n_train * marks[n]
    for n, got in mean.result(old).items():
        want = torch.where(bottom[n] > 0, top[n] / bottom[n].clamp_min(1), old[n].double())
        torch.testing.assert_close(got, want.float())
        assert torch.equal(got[bottom[n] == 0], old[n][bottom[n] == 0])


def test_masked_mean_of_whole_models_has_the_bits_of_the_weighted_mean() -> None:
    task = make_task("vgg")
    cut = make_cut(task)
    everything = np.ones(cut.parts, bool)
    masked, weighted = MaskedMean(cut, task.shapes), WeightedMean()
    for i, n_train in enumerate([7, 13, 5]):
        rng = torch_rng("whole", i)
        values = {n: torch.randn(s, generator=rng) for n, s in task.shapes.items()}
        masked.add(pack(values, cut, everything), everything, n_train)
        weighted.add(values, n_train)
    old = task.init_params()
    got, want = masked.result(old), weighted.result(old)
    assert list(got) == list(want)
    assert all(torch.equal(got[n], want[n]) for n in want)
    nobody = MaskedMean(cut, task.shapes).result(old)
    assert all(torch.equal(nobody[n], old[n]) for n in old)


def chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (chain(output=nn.Linear(4, 2)), "a model without a hidden layer"),
        (chain(conv1=nn.Conv2d(4, 4, 1, groups=2), output=nn.Linear(4, 2)), r"'conv1' \(Conv2d\), a grouped"),
        (
            chain(fc1=nn.Linear(4, 4), norm1=nn.LayerNorm(4), output=nn.Linear(4, 2)),
            r"'norm1' \(LayerNorm\); method.uncut",
        ),
        (chain(fc1=nn.Linear(4, 4), act=nn.Sigmoid(), output=nn.Linear(4, 2)), r"'act' \(Sigmoid\); method.uncut"),
        (chain(fc1=nn.Linear(4, 4), output=nn.Linear(6, 2)), "does not run"),
    ],
)
def test_a_model_that_cannot_be_cut_is_named(model: nn.Module, message: str) -> None:
    shape = (4, 4, 4) if "conv1" in dict(model.named_children()) else (4,)
    with pytest.raises(UserError, match=message):
        structural_cut(model, shape)


def test_a_layer_of_one_unit_has_one_forced_block() -> None:
    cut = structural_cut(chain(fc1=nn.Linear(3, 1), relu=nn.ReLU(), output=nn.Linear(1, 2)), (3,))
    assert cut.blocks == 1
    assert cut.spent(cut.forced) == cut.spent(cut.everything) == 4 + 4
    with pytest.raises(UserError, match="got 0 and"):
        structural_cut(nn.Sequential(), (3,), blocks_per_layer=0)
