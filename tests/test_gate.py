"""pFedGate's gate and its options: sizes, and values and gradients against plain loops."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedsparse.errors import UserError
from fedsparse.models.gate import (
    BOUNDS,
    POST_NORMS,
    PRE_NORMS,
    Branch,
    Gate,
    GateOptions,
    SwitchNorm,
    input_moments,
    token_shares,
)
from fedsparse.seeding import torch_rng

SHARED, OFFICIAL_TWO = GateOptions(branches="shared"), GateOptions(share_pre_norm=True)
SHAPES = [(1, 4, 4), (3, 4, 2), (6, 5), (7,), (1,)]


def make_gate(shape: tuple[int, ...], blocks: int = 5, **options: object) -> Gate:
    """With random parameters and running statistics, so that no term vanishes."""
    gate = Gate(shape, blocks, torch_rng("gate"), GateOptions(**options))  # type: ignore[arg-type]
    with torch.no_grad():
        for i, t in enumerate([*gate.parameters(), *gate.buffers()]):
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=torch_rng("t", i)) + 0.5)
        for branch in (gate.scale, gate.importance):
            branch.weight.copy_(torch.randn(branch.weight.shape, generator=torch_rng("w", branch is gate.scale)))
    return gate


def make_input(shape: tuple[int, ...], n: int = 6) -> Tensor:
    return 2 * torch.randn(n, *shape, generator=torch_rng("x", *shape)) + 1


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "blocks", "options", "size"),
    [
        ((1, 28, 28), 40, SHARED, 31_488),  # LeafCNN1; these are measured on the official code
        ((1, 28, 28), 40, OFFICIAL_TWO, 62_968),
        ((3, 32, 32), 50, SHARED, 153_762),  # LeNet
        ((3, 32, 32), 50, OFFICIAL_TWO, 307_512),
        ((3, 32, 32), 40, SHARED, 123_012),  # LeafCNN3
        ((3, 32, 32), 40, OFFICIAL_TWO, 246_012),
        ((1, 28, 28), 40, GateOptions(), 2 * 31_488),
        ((1, 28, 28), 40, replace(SHARED, pre_norm="none"), 31_488 - 8),
        ((1, 28, 28), 40, replace(SHARED, post_norm="none"), 31_488 - 80),
        ((1, 28, 28), 40, replace(SHARED, post_norm="layer", bound="none"), 31_488),
        ((1, 28, 28), 40, replace(SHARED, pool=7), 49 * 40 + 40 + 80 + 8),
        ((13,), 5, replace(SHARED, pool=7), 13 * 5 + 5 + 10 + 2 * 13 + 4),
        ((80,), 5, replace(SHARED, vocabulary=90), 90 * 5 + 5 + 10 + 2 * 90 + 4),
    ],
)
def test_the_size_of_a_gate(shape: tuple[int, ...], blocks: int, options: GateOptions, size: int) -> None:
    gate = Gate(shape, blocks, torch_rng(0), options)
    assert gate.size == size == sum(p.numel() for p in gate.parameters())
    features = options.vocabulary or (49 if gate.pool else math.prod(shape))
    assert gate.macs == features * blocks * (1 if options.branches == "shared" else 2)


@pytest.mark.parametrize(
    ("options", "branches", "norms"), [(SHARED, 1, 1), (OFFICIAL_TWO, 2, 1), (GateOptions(), 2, 2)]
)
def test_the_buffers_of_a_gate(options: GateOptions, branches: int, norms: int) -> None:
    gate = Gate((3, 8, 8), 50, torch_rng(0), options)
    assert sum(b.numel() for b in gate.buffers()) == branches * (2 * 50 + 1) + norms * 2 * 3


def test_names_do_not_depend_on_more_than_they_must() -> None:
    layers = {"norm.weight", "norm.bias", "norm.mean_weight", "norm.var_weight", "weight", "bias"}
    layers |= {"post_norm.weight", "post_norm.bias"}
    scale, importance = ({f"{b}.{name}" for name in layers} for b in ("scale", "importance"))
    for options, want in [
        (GateOptions(), scale | importance),
        (SHARED, scale),
        (OFFICIAL_TWO, scale | {name for name in importance if ".norm." not in name}),
        (GateOptions(post_norm="layer", bound="none"), scale | importance),
    ]:
        assert {name for name, _ in Gate((3, 8, 8), 5, torch_rng(0), options).named_parameters()} == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": "share"}, "gate branches 'share'; did you mean 'shared'"),
        ({"pre_norm": "batch"}, "unknown gate pre-norm 'batch'"),
        ({"post_norm": "batchnorm"}, "gate post-norm 'batchnorm'; did you mean 'batch'"),
        ({"bound": "sigmoyd"}, "gate bound 'sigmoyd'; did you mean 'sigmoid'"),
    ],
)
def test_words_that_are_not_known_are_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GateOptions(**options)  # type: ignore[arg-type]


# --- values ----------------------------------------------------------------------------------------------------------


def moments_of(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of a list of scalars; 0 for a single one."""
    mean = sum(values) / len(values)  # type: ignore[arg-type]
    return mean, sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)  # type: ignore[return-value]


def slow_switch_norm(norm: SwitchNorm, x: Tensor, *, train: bool) -> Tensor:
    """The formulas of the official code, scalar by scalar; flat inputs have no instance part."""
    a, b = norm.mean_weight.softmax(0), norm.var_weight.softmax(0)
    n, channels = x.shape[:2]
    each = [[moments_of(list(x[i, c].flatten())) for c in range(channels)] for i in range(n)]
    want = torch.empty_like(x)
    for i, c in itertools.product(range(n), range(channels)):
        mean, var = each[i][c]
        if x.ndim > 2:
            across, along = each[i], [each[j][c] for j in range(n)]
            layer = sum(m for m, _ in across) / channels
            batch = sum(m for m, _ in along) / n
            v_layer = sum(v + m**2 for m, v in across) / channels - layer**2
            v_batch = sum(v + m**2 for m, v in along) / n - batch**2
        else:
            layer, v_layer = moments_of(list(x[i]))
            batch, v_batch = moments_of(list(x[:, c]))
        if not train:
            batch, v_batch = norm.running_mean[c], norm.running_var[c]
        means, variances = [layer, batch], [v_layer, v_batch]
        if x.ndim > 2:
            means, variances = [mean, *means], [var, *variances]
        mu = sum(w * m for w, m in zip(a, means, strict=True))
        v = sum(w * m for w, m in zip(b, variances, strict=True))
        want[i, c] = norm.weight[c] * (x[i, c] - mu) / torch.sqrt(v + 1e-5) + norm.bias[c]
    return want


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_switch_norm_against_loops(shape: tuple[int, ...], train: bool) -> None:
    norm, x = make_gate(shape).scale.norm, make_input(shape)
    assert norm is not None
    want = slow_switch_norm(norm, x, train=train)
    torch.testing.assert_close(norm.train(train)(x, input_moments(x)), want)


@pytest.mark.parametrize("shape", SHAPES)
def test_running_statistics_start_at_0_and_keep_nine_tenths(shape: tuple[int, ...]) -> None:
    norm, x = SwitchNorm(shape[0], spatial=len(shape) > 1), make_input(shape)
    means, variances = input_moments(x)[:, -1, 0]  # of the batch
    norm(x, input_moments(x))
    torch.testing.assert_close(norm.running_mean, 0.1 * means)
    torch.testing.assert_close(norm.running_var, 0.1 * variances)
    norm(x, input_moments(x))
    torch.testing.assert_close(norm.running_mean, 0.19 * means)
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm.eval()(x, input_moments(x))
    assert torch.equal(norm.running_mean, before[0]) and torch.equal(norm.running_var, before[1])


def test_an_input_far_from_0_has_its_variances() -> None:
    """Second moments less squared means would be far off, and below 0 for some."""
    x = 1000 + torch.randn(4, 2, 5, 5, generator=torch_rng("x"))
    torch.testing.assert_close(input_moments(x)[1, 0], x.flatten(2).var(2))
    constant = torch.full((16, 3, 5, 5), 1.0) * (1000 + torch.arange(16).view(-1, 1, 1, 1) / 7)
    assert (input_moments(constant)[1] >= 0).all()
    assert torch.isfinite(make_gate((3, 5, 5)).train()(constant)[0]).all()


def slow_branch(branch: Branch, x: Tensor, options: GateOptions, *, train: bool) -> Tensor:
    normed = x if branch.norm is None else slow_switch_norm(branch.norm, x, train=train)
    logits = torch.stack([branch.weight @ row.flatten() + branch.bias for row in normed])  # (n, L)
    post = branch.post_norm
    if options.post_norm == "layer":
        mean, var = logits.mean(1, keepdim=True), logits.var(1, keepdim=True, correction=0)
    elif options.post_norm == "batch" and train:
        mean, var = logits.mean(0), logits.var(0, correction=0)
    elif options.post_norm == "batch":
        mean, var = post.running_mean, post.running_var  # type: ignore[assignment]
    if options.post_norm != "none":
        logits = (logits - mean) / torch.sqrt(var + 1e-5) * post.weight + post.bias  # type: ignore[operator]
    values = [1 / (1 + torch.exp(-row)) if options.bound == "sigmoid" else row for row in logits]
    return sum(values) / len(values)  # type: ignore[return-value]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 2), (7,)])
@pytest.mark.parametrize(("pre", "post", "bound"), list(itertools.product(PRE_NORMS, POST_NORMS, BOUNDS)))
def test_the_gate_against_loops(shape: tuple[int, ...], pre: str, post: str, bound: str, train: bool) -> None:
    x = make_input(shape)
    for kind in ({"branches": "shared"}, {"share_pre_norm": True}, {}):
        options = GateOptions(pre_norm=pre, post_norm=post, bound=bound, **kind)  # type: ignore[arg-type]
        gate = make_gate(shape, pre_norm=pre, post_norm=post, bound=bound, **kind).train(train)
        want = [slow_branch(branch, x, options, train=train) for branch in (gate.scale, gate.importance)]
        for got, value in zip(gate(x), want, strict=True):
            assert got.shape == (5,)
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
        assert torch.equal(want[0], want[1]) == ("branches" in kind)


def test_the_mean_is_of_sigmoids() -> None:
    gate = make_gate((2,), blocks=1, pre_norm="none", post_norm="none", branches="shared")
    with torch.no_grad():
        gate.scale.weight.copy_(torch.tensor([[1.0, 0.0]]))
        gate.scale.bias.zero_()
    m, _ = gate(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    assert m.item() == pytest.approx((torch.sigmoid(torch.tensor(4.0)).item() + 0.5) / 2)
    assert abs(m.item() - torch.sigmoid(torch.tensor(2.0)).item()) > 0.1


@pytest.mark.parametrize("post", POST_NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_evaluation_an_example_is_judged_by_itself(shape: tuple[int, ...], post: str) -> None:
    gate, x = make_gate(shape, post_norm=post), make_input(shape)
    with torch.no_grad():
        together = torch.stack(gate.eval()(x))
        alone = torch.stack([torch.stack(gate(x[i : i + 1])) for i in range(len(x))])
        torch.testing.assert_close(together, alone.mean(0), rtol=1e-4, atol=1e-5)
        assert torch.isfinite(alone).all()
        in_training = torch.stack(gate.train()(x))
    assert not torch.allclose(in_training, together, atol=1e-3)  # a batch has its own statistics then


def test_an_untrained_gate_is_near_one_half() -> None:
    for options in (GateOptions(), SHARED, OFFICIAL_TWO):
        gate = Gate((1, 28, 28), 40, torch_rng(0), options)
        for values in gate(torch.randn(64, 1, 28, 28, generator=torch_rng("x"))):
            assert values.shape == (40,)
            assert ((values > 0.45) & (values < 0.55)).all()


@pytest.mark.parametrize("post", ["batch", "layer", "none"])
def test_gates_start_where_they_are_told_to(post: str) -> None:
    x = torch.randn(64, 1, 28, 28, generator=torch_rng("x"))
    scale, importance = Gate((1, 28, 28), 40, torch_rng(0), GateOptions(start=0.9, post_norm=post))(x)
    assert ((scale > 0.8) & (scale < 0.95)).all()
    assert ((importance > 0.4) & (importance < 0.6)).all()  # the order of blocks is the business of the other branch
    middle = Gate((1, 28, 28), 40, torch_rng(0), GateOptions(post_norm=post))(x)
    assert torch.equal(importance, middle[1])
    shared = Gate((1, 28, 28), 40, torch_rng(0), GateOptions("shared", start=0.9, post_norm=post))(x)
    assert torch.equal(shared[0], scale)
    assert torch.equal(shared[0], shared[1])


def test_a_start_must_be_inside_the_range_of_a_sigmoid() -> None:
    for start in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"gate_start must be in \(0, 1\)"):
            GateOptions(start=start)
    with pytest.raises(UserError, match='gate_start needs gate_bound = "sigmoid"'):
        GateOptions(start=0.9, bound="none")


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "pool"), [((2, 6, 4), 2), ((2, 7), 3), ((2, 3, 3), 8), ((5,), 2)])
def test_pooling_averages_before_all_else(shape: tuple[int, ...], pool: int) -> None:
    pooled, x = make_gate(shape, pool=pool).eval(), make_input(shape)
    read = pooled.read(x)
    assert read.shape[1:] == pooled.input_shape == (shape[0], *(min(pool, s) for s in shape[1:]))
    if shape == (2, 6, 4):
        want = x.view(-1, 2, 2, 3, 2, 2).mean((3, 5))
        torch.testing.assert_close(read, want)
    plain = make_gate(pooled.input_shape).eval()
    plain.load_state_dict(pooled.state_dict())
    for a, b in zip(pooled(x), plain(read), strict=True):
        torch.testing.assert_close(a, b)


def test_tokens_are_read_as_shares() -> None:
    x = torch.tensor([[0, 3, 3, 1], [2, 2, 2, 2], [4, 0, 4, 0]])
    want = torch.zeros(3, 6)
    for i, row in enumerate(x.tolist()):
        for token in row:
            want[i, token] += 0.25
    torch.testing.assert_close(token_shares(x, 6), want)
    torch.testing.assert_close(token_shares(x, 6), functional.one_hot(x, 6).float().mean(1))
    gate, numbers = make_gate((4,), vocabulary=6).eval(), make_gate((6,)).eval()
    numbers.load_state_dict(gate.state_dict())
    for got, same in zip(gate(x), numbers(want), strict=True):
        torch.testing.assert_close(got, same)
    for got, same in zip(gate(gate.read(x)), gate(x), strict=True):  # what has been read is left alone
        assert torch.equal(got, same)
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_shares(x, 4)


def test_the_order_of_tokens_does_not_matter_and_their_number_neither() -> None:
    gate = make_gate((4,), vocabulary=6, post_norm="none").eval()
    x = torch.tensor([[0, 3, 3, 1]])
    for other in (x.flip(1), x.repeat(1, 3)):
        for a, b in zip(gate(x), gate(other), strict=True):
            torch.testing.assert_close(a, b)


# --- start and gradients ---------------------------------------------------------------------------------------------


def test_initial_values_come_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = (Gate((3, 8, 8), 9, torch_rng(5), GateOptions()).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = Gate((3, 8, 8), 9, torch_rng(6), GateOptions()).state_dict()
    assert not torch.equal(first["scale.weight"], other["scale.weight"])
    bound = 1 / math.sqrt(3 * 8 * 8)
    for name in ("scale.weight", "scale.bias", "importance.weight"):
        assert 0.8 * bound < first[name].abs().max() <= bound
    assert first["scale.weight"].std() == pytest.approx(bound / math.sqrt(3), rel=0.1)  # uniform


def test_the_official_second_branch_starts_as_a_copy() -> None:
    x = make_input((3, 4, 4))
    m, g = Gate((3, 4, 4), 9, torch_rng(0), OFFICIAL_TWO)(x)
    assert torch.equal(m, g)
    m, g = Gate((3, 4, 4), 9, torch_rng(0), GateOptions())(x)
    assert not torch.equal(m, g)


@pytest.mark.parametrize("kind", [{}, {"share_pre_norm": True}, {"branches": "shared"}])
@pytest.mark.parametrize("post", POST_NORMS)
def test_gradients_reach_what_a_value_depends_on(kind: dict[str, object], post: str) -> None:
    x = make_input((3, 4, 4))
    for which, own in enumerate(("scale", "importance")):
        gate = make_gate((3, 4, 4), post_norm=post, **kind).train()
        weights = torch.rand(5, generator=torch_rng("weights"))
        (gate(x)[which] * weights).sum().backward()
        shared = {"branches": ("scale", "importance"), "share_pre_norm": ("scale.norm",)}
        owners = (own, *itertools.chain(*(shared[key] for key in kind)))
        for name, p in gate.named_parameters():
            if not name.startswith(owners):
                assert p.grad is None, name
            elif name.endswith((".bias", "_weight")) and post == "batch" and not name.endswith("post_norm.bias"):
                assert p.grad is not None and torch.isfinite(p.grad).all(), name  # may cancel: the norm takes means out
            else:
                assert p.grad is not None and p.grad.abs().max() > 1e-7, name
    assert x.grad is None


@pytest.mark.parametrize("post", POST_NORMS)
def test_gradients_against_finite_differences(post: str) -> None:
    gate = make_gate((2, 3, 3), blocks=3, post_norm=post, share_pre_norm=True).double().train()
    x = make_input((2, 3, 3)).double()
    names = [name for name, _ in gate.named_parameters()]

    def values(*params: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(gate, dict(zip(names, params, strict=True)), (x,))

    assert torch.autograd.gradcheck(values, [p.detach().requires_grad_() for p in gate.parameters()])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_single_example_can_train_in_evaluation_mode(shape: tuple[int, ...]) -> None:
    gate = make_gate(shape).eval()
    before = {name: b.clone() for name, b in gate.named_buffers()}
    m, g = gate(make_input(shape, n=1))
    (m.sum() + (g * torch.arange(5)).sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in gate.parameters())
    assert all(torch.equal(b, before[name]) for name, b in gate.named_buffers())
