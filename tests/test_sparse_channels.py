"""The structural cut: compact layers against the masked dense model, the codec and the means against loops."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedsparse.cost import kept_count, trace
from fedsparse.errors import UserError
from fedsparse.models import build_model
from fedsparse.seeding import numpy_rng, torch_rng
from fedsparse.sgd import step_
from fedsparse.sparse.blocks import ChannelPlan, channel_plan
from fedsparse.sparse.channels import gated_forward, select
from fedsparse.sparse.choose import choose_blocks
from fedsparse.sparse.codec import pack, pack_bits, tile_count, tiles, unpack, unpack_bits
from fedsparse.sparse.compact import CompactModel
from fedsparse.sparse.mean import MaskedMean, WeightedMean
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


def make_batch(name: str, n: int = 6) -> tuple[Tensor, Tensor]:
    shape, classes = CASES[name]
    rng = torch_rng("batch", name)
    return torch.randn(n, *shape, generator=rng), torch.randint(classes, (n,), generator=rng)


def masks(plan: ChannelPlan) -> list[np.ndarray]:
    rng = numpy_rng("masks")
    return [plan.forced.copy(), np.ones(plan.blocks, bool)] + [
        plan.forced | (rng.random(plan.blocks) < 0.5) for _ in range(4)
    ]


def unit_gates(plan: ChannelPlan, kept: np.ndarray, gates: Tensor) -> dict[str, Tensor]:
    """Per hidden layer one factor a unit, 0 where dropped: the oracle's way, unit by unit."""
    out = {}
    for layer in plan.hidden:
        factors = []
        for g in range(layer.groups):
            block = layer.first_block + g
            factor = gates[block] if kept[block] else torch.zeros(())
            factors += [factor] * (layer.bounds[g + 1] - layer.bounds[g])
        out[layer.norm or layer.name] = torch.stack(factors)
    return out


def masked_dense(
    task: Task, plan: ChannelPlan, params: dict[str, Tensor], kept: np.ndarray, gates: Tensor, x: Tensor
) -> Tensor:
    """The dense model in which dropped units put out 0 and kept ones are scaled, by hooks."""
    factors = unit_gates(plan, kept, gates)
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


def test_the_plan_of_leafcnn1() -> None:
    """d, nominal and smallest sizes by hand; the 2048 rows of 1025 scalars need 19 groups to be at most 5 % of d."""
    plan = channel_plan(build_model("leafcnn1", (1, 28, 28), 62))
    assert plan.total == 2_278_334
    assert [layer.groups for layer in plan.hidden] == [5, 5, 19]
    assert plan.hidden[0].bounds == (0, 6, 13, 19, 26, 32)
    assert plan.nominal.max() <= 0.05 * plan.total
    assert plan.nominal[0] == 6 * 26
    assert plan.nominal[5] == 13 * (32 * 25 + 1)
    assert plan.nominal.sum() + 62 * 2049 == plan.total
    assert plan.smallest == 6 * 26 + 13 * (6 * 25 + 1) + 108 * (13 * 16 + 1) + 62 * 109


@pytest.mark.parametrize("name", CASES)
def test_effective_size_counts_distinct_scalars(name: str) -> None:
    """Against counting entries of dense masks, and against the cost model."""
    task = make_task(name)
    plan = channel_plan(task.model, max_block_frac=1.0)
    for kept in masks(plan):
        marked = {n: torch.zeros(s, dtype=torch.bool) for n, s in task.shapes.items() if n in task.trainable}
        for region in select(plan, kept).regions:
            if region.name in marked:
                region.put_(marked[region.name], torch.ones(region.shape(task.shapes[region.name]), dtype=torch.bool))
        assert plan.effective(kept) == sum(int(m.sum()) for m in marked.values())
        assert plan.effective(kept) == kept_count(trace(task.model, task.input_shape), plan.cut(kept))
    assert plan.effective(np.ones(plan.blocks, bool)) == plan.total


@pytest.mark.parametrize("name", CASES)
def test_compact_equals_masked_dense(name: str) -> None:
    """Outputs, statistics, gradients of weights and gates, and the weights after one SGD step."""
    task = make_task(name)
    plan = channel_plan(task.model, blocks_per_layer=3, max_block_frac=1.0)
    x, y = make_batch(name)
    task.model.train(True)
    for i, kept in enumerate(masks(plan)):
        gates = torch.rand(plan.blocks, generator=torch_rng("gates", i)).requires_grad_()
        dense = task.init_params()
        leaves = [dense[n].requires_grad_() for n in task.trainable]
        logits = masked_dense(task, plan, dense, kept, gates, x)
        want = torch.autograd.grad(functional.cross_entropy(logits, y), [*leaves, gates], materialize_grads=True)

        model = CompactModel(task.init_params(), plan, task.trainable)
        selection = model.use(kept)
        with task.bound(model.tensors) as network:
            got_logits = gated_forward(network, plan, selection, gates, x)
        got = torch.autograd.grad(functional.cross_entropy(got_logits, y), [*model.leaves, gates])
        torch.testing.assert_close(got_logits, logits)
        parts = {r.name: r for r in selection.regions}
        for n, full, compact in zip(task.trainable, want, got, strict=False):
            torch.testing.assert_close(compact, parts[n].take(full))
            rest = full.clone()
            parts[n].put_(rest, torch.zeros_like(compact))
            assert not rest.count_nonzero()  # the dense model has no gradient outside the kept part
        torch.testing.assert_close(got[-1], want[-1])

        with torch.no_grad():
            step_(model.leaves, got[:-1], model.velocity, lr=0.3, momentum=0.9)
            step_(leaves, want[:-1], [], lr=0.3, momentum=0.9)
        model.flush()
        for n in task.trainable:
            torch.testing.assert_close(model.params[n], dense[n].detach())


def test_the_gate_gradient_is_the_product_of_weights_and_their_gradient() -> None:
    """dL/dm_l = <theta_l, dL/dtheta'_l> with theta' = m * theta (spec of the method, test 6)."""
    task = make_task("cnn")
    plan = channel_plan(task.model, blocks_per_layer=3, max_block_frac=1.0)
    x, y = make_batch("cnn")
    kept, gates = np.ones(plan.blocks, bool), torch.full((plan.blocks,), 0.7, requires_grad=True)
    params = task.init_params()
    selection = select(plan, kept)
    with task.bound(params) as network:
        loss = functional.cross_entropy(gated_forward(network, plan, selection, gates, x), y)
    (got,) = torch.autograd.grad(loss, [gates])
    scaled = {n: t.clone() for n, t in params.items()}
    for layer in plan.hidden:
        for n in (layer.weight, *layer.vectors):
            scaled[n] = scaled[n] * 0.7
    leaves = {n: t.requires_grad_() for n, t in scaled.items()}
    grads = torch.autograd.grad(
        functional.cross_entropy(functional_call(task.model, leaves, (x,)), y), list(leaves.values())
    )
    by_name = dict(zip(leaves, grads, strict=True))
    for layer in plan.hidden:
        for g, (a, b) in enumerate(itertools.pairwise(layer.bounds)):
            want = sum((params[n][a:b] * by_name[n][a:b]).sum() for n in (layer.weight, *layer.vectors))
            torch.testing.assert_close(got[layer.first_block + g], want)


@pytest.mark.parametrize("name", CASES)
def test_all_kept_and_gates_of_one_have_the_bits_of_the_plain_model(name: str) -> None:
    task = make_task(name)
    plan = channel_plan(task.model)
    x, y = make_batch(name)
    model = CompactModel(task.init_params(), plan, task.trainable)
    selection = model.use(np.ones(plan.blocks, bool))
    assert all(model.tensors[n].data_ptr() == model.params[n].data_ptr() for n in model.params)  # nothing is copied
    plain = task.init_params()
    leaves = [plain[n].requires_grad_() for n in task.trainable]
    want = torch.autograd.grad(task.loss(plain, x, y, train=True), leaves)
    with task.bound(model.tensors) as network:
        loss = task.criterion(gated_forward(network, plan, selection, torch.ones(plan.blocks), x), y)
    for a, b in zip(torch.autograd.grad(loss, model.leaves), want, strict=True):
        assert torch.equal(a, b)
    for n in task.buffers:
        assert torch.equal(model.params[n], plain[n])


@pytest.mark.parametrize("name", CASES)
def test_lazy_sgd_is_masked_sgd_over_changing_masks(name: str) -> None:
    """Momentum, decay and weights move only in the parts in use; against whole tensors with boolean masks."""
    task = make_task(name)
    plan = channel_plan(task.model, blocks_per_layer=3, max_block_frac=1.0)
    model = CompactModel(task.init_params(), plan, task.trainable)
    want, momentum = task.init_params(), {n: torch.zeros(task.shapes[n]) for n in task.trainable}
    for i, kept in enumerate([*masks(plan), masks(plan)[-1]]):
        selection = model.use(kept)
        rng = torch_rng("grads", i)
        full = {n: torch.randn(task.shapes[n], generator=rng) for n in task.trainable}
        parts = {r.name: r for r in selection.regions}
        grads = [parts[n].take(full[n]).clone() for n in task.trainable]
        with torch.no_grad():
            step_(model.leaves, grads, model.velocity, lr=0.1, momentum=0.9, weight_decay=0.01)
        for n in task.trainable:
            on = torch.zeros(task.shapes[n], dtype=torch.bool)
            parts[n].put_(on, torch.ones(parts[n].shape(task.shapes[n]), dtype=torch.bool))
            momentum[n] = torch.where(on, 0.9 * momentum[n] + full[n] + 0.01 * want[n], momentum[n])
            want[n] = torch.where(on, want[n] - 0.1 * momentum[n], want[n])
    model.flush()
    for n in task.trainable:
        torch.testing.assert_close(model.params[n], want[n])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.floats(0, 1), st.integers(0, 1000))
def test_chosen_blocks_fit_and_leave_no_room(name: str, share: float, seed: int) -> None:
    plan = channel_plan(make_task(name).model, max_block_frac=1.0)
    limit = round(plan.smallest + share * (plan.total - plan.smallest))
    importance = numpy_rng("importance", seed).random(plan.blocks)
    kept = choose_blocks(plan, importance, limit)
    assert kept[plan.forced].all()
    assert plan.effective(kept) <= limit
    for block in np.flatnonzero(~kept):
        more = kept.copy()
        more[block] = True
        assert plan.effective(more) > limit
    with pytest.raises(ValueError, match="smallest"):
        choose_blocks(plan, importance, plan.smallest - 1)


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
    plan = channel_plan(task.model, blocks_per_layer=3, max_block_frac=1.0)
    params = task.init_params()
    for some in ([], *[[m] for m in masks(plan)], masks(plan)[2:]):
        touched, marks = np.zeros(tile_count(plan), bool), {n: torch.zeros(s) for n, s in task.shapes.items()}
        for n in plan.uncut:
            marks[n] += 1
        for kept in some:
            touched |= tiles(plan, kept)
            for region in select(plan, kept).regions:
                region.put_(marks[region.name], torch.ones(region.shape(task.shapes[region.name])))
        values = pack(params, plan, touched)
        assert len(values) == sum(int(m.sum()) for m in marks.values())
        back = {n: torch.zeros(s) for n, s in task.shapes.items()}
        for region, value in unpack(values, plan, touched, task.shapes):
            region.put_(back[region.name], value)
        for n in params:
            assert torch.equal(back[n], params[n] * marks[n])
        with pytest.raises(UserError, match="does not fit"):
            list(unpack(torch.zeros(len(values) + 1), plan, touched, task.shapes))


@pytest.mark.parametrize("name", CASES)
def test_masked_mean_against_a_loop_over_entries(name: str) -> None:
    task = make_task(name)
    plan = channel_plan(task.model, blocks_per_layer=3, max_block_frac=1.0)
    old, mean = task.init_params(), MaskedMean(plan, task.shapes)
    top = {n: torch.zeros(s, dtype=torch.float64) for n, s in task.shapes.items()}
    bottom = {n: torch.zeros(s, dtype=torch.float64) for n, s in task.shapes.items()}
    for i, kept in enumerate([masks(plan)[0], *masks(plan)[2:4]]):
        rng = torch_rng("client", i)
        values = {n: torch.randn(s, generator=rng) for n, s in task.shapes.items()}
        touched, n_train = tiles(plan, kept), 10.0 + i
        mean.add(pack(values, plan, touched), touched, n_train)
        marks = {n: torch.zeros(s) for n, s in task.shapes.items()}
        for region in select(plan, kept).regions:
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
    plan = channel_plan(task.model)
    everything = np.ones(tile_count(plan), bool)
    masked, weighted = MaskedMean(plan, task.shapes), WeightedMean()
    for i, n_train in enumerate([7, 13, 5]):
        rng = torch_rng("whole", i)
        values = {n: torch.randn(s, generator=rng) for n, s in task.shapes.items()}
        masked.add(pack(values, plan, everything), everything, n_train)
        weighted.add(values, n_train)
    old = task.init_params()
    got, want = masked.result(old), weighted.result(old)
    assert list(got) == list(want)
    assert all(torch.equal(got[n], want[n]) for n in want)
    nobody = MaskedMean(plan, task.shapes).result(old)
    assert all(torch.equal(nobody[n], old[n]) for n in old)


def chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "Linear; it works for a chain"),
        (chain(output=nn.Linear(4, 2)), "without a hidden layer"),
        (chain(conv1=nn.Conv2d(4, 4, 1, groups=2), output=nn.Linear(4, 2)), "'conv1', a grouped"),
        (chain(fc1=nn.Linear(4, 4), norm1=nn.LayerNorm(4), output=nn.Linear(4, 2)), "'norm1'"),
        (chain(fc1=nn.Linear(4, 4), relu=nn.ReLU(), bn=nn.BatchNorm1d(4), output=nn.Linear(4, 2)), "'bn'"),
        (chain(fc1=nn.Linear(4, 4), output=nn.Linear(4, 2), bn=nn.BatchNorm1d(2)), "after the classifier"),
        (chain(fc1=nn.Linear(4, 4), output=nn.Linear(6, 2)), "6 inputs from 4"),
    ],
)
def test_a_model_that_cannot_be_cut_is_named(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        channel_plan(model)


def test_a_layer_of_one_unit_has_one_forced_block() -> None:
    plan = channel_plan(chain(fc1=nn.Linear(3, 1), relu=nn.ReLU(), output=nn.Linear(1, 2)))
    assert plan.blocks == 1
    assert plan.smallest == plan.total == 4 + 4
    with pytest.raises(UserError, match="got 0 and"):
        channel_plan(nn.Sequential(), blocks_per_layer=0)
