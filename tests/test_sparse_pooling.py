"""Max-pools of our own against PyTorch's: the same values and gradients, exactly, whatever stands around them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fedsparse.seeding import torch_rng
from fedsparse.sparse import pooling
from fedsparse.sparse.pooling import quick_pools

VALUES = torch.tensor([-1.0, -0.5, 0.0, 0.0, 0.5, 0.5, 2.0, math.inf, -math.inf, math.nan])
Seen = list[tuple[Tensor, Tensor]]


def images(*shape: int, values: int = len(VALUES)) -> Tensor:
    """Of few values, so that most windows have ties."""
    return VALUES[torch.randint(values, shape, generator=torch_rng("images", *shape))]


def both(model: nn.Module, x: Tensor) -> Seen:
    """Outputs and input gradients, PyTorch's and ours."""
    seen = []
    for ours in (False, True):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with quick_pools(model if ours else nn.Identity()):
            out = model(leaf)
        weights = torch.randn(out.shape, dtype=out.dtype, generator=torch_rng("weights"))
        seen.append((out.detach(), torch.autograd.grad(out, leaf, weights)[0]))
    return seen


def assert_same(seen: Seen) -> None:
    for theirs, ours in zip(*seen, strict=True):
        assert torch.equal(theirs.nan_to_num(7e7), ours.nan_to_num(7e7))
        assert theirs.stride() == ours.stride()


def is_ours(out: Tensor) -> bool:
    return "Halve" in type(out.grad_fn).__name__


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.booleans())
def test_values_and_gradients_are_those_of_pytorch(n: int, channels: int, height: int, width: int, relu: bool) -> None:
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)) if relu else nn.MaxPool2d(2)
    x = images(n, channels, height, width)
    assert_same(both(model, x))
    with quick_pools(model):
        assert is_ours(model(x.requires_grad_()))


def test_large_images_too() -> None:
    for height, width in ((64, 64), (7, 130), (33, 18)):
        assert_same(both(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), images(2, 3, height, width, values=8)))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3),
        nn.MaxPool2d(2, 1),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d((2, 1)),
        nn.AvgPool2d(2),
    ],
    ids=str,
)
def test_other_pools_are_left_to_pytorch(pool: nn.Module) -> None:
    x = images(2, 3, 9, 9, values=8)
    for model in (pool, nn.Sequential(nn.ReLU(), pool)):
        assert_same(both(model, x))
        with quick_pools(model):
            assert not is_ours(model(x.clone().requires_grad_()))


@pytest.mark.parametrize(
    "x",
    [
        images(2, 3, 8, 8, values=8).double(),
        images(2, 3, 8, 8, values=8).contiguous(memory_format=torch.channels_last),
        images(3, 8, 8, values=8),
    ],
    ids=["double", "channels-last", "one image"],
)
def test_other_inputs_are_left_to_pytorch(x: Tensor) -> None:
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    assert_same(both(model, x))
    with quick_pools(model):
        assert not is_ours(model(x.clone(memory_format=torch.preserve_format).requires_grad_()))


def test_indices_that_are_asked_for_come() -> None:
    model = nn.MaxPool2d(2, return_indices=True)
    with quick_pools(model):
        out, places = model(images(1, 1, 4, 4, values=8))
    assert out.shape == places.shape


class Apart(nn.Module):
    """Uses pieces of its chain one by one, as some networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        active = self.features[:2](x)
        for layer in self.features[2:]:
            x = layer(active) if isinstance(layer, nn.MaxPool2d) else layer(x)
        return x.flatten(1).sum(1) + active.flatten(1).sum(1)


class Shared(nn.Module):
    """One ReLU and one pool for several places."""

    def __init__(self) -> None:
        super().__init__()
        relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.chain = nn.Sequential(nn.Conv2d(3, 4, 3), relu, self.pool, nn.Conv2d(4, 4, 3), relu, relu, self.pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) + functional.adaptive_avg_pool2d(self.pool(x), 1)[:, :1]


@pytest.mark.parametrize("network", [Apart, Shared])
def test_a_network_that_uses_its_layers_in_other_ways_computes_the_same(network: type[nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert_same(both(network(), images(2, 3, 14, 14, values=7)))


def test_hooks_see_what_they_see_in_pytorch() -> None:
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    seen: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _, inputs, out: seen.append(out)) for layer in model]
    assert_same(both(model, images(2, 3, 8, 8, values=8)))
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    for handle in handles:
        handle.remove()


def test_the_model_is_as_before_afterwards() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    with pytest.raises(RuntimeError), quick_pools(model):
        model(torch.zeros(1))
    assert not any("forward" in vars(module) for module in model.modules())
    vars(model[2])["forward"] = own = lambda x: x
    with quick_pools(model), quick_pools(model):
        assert model(torch.ones(1, 3, 6, 6)).shape == (1, 4, 4, 4)
    assert vars(model[2])["forward"] is own


def test_an_image_that_is_too_small_is_refused_as_in_pytorch() -> None:
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    with quick_pools(model):
        assert model(torch.ones(0, 3, 6, 6)).shape == (0, 3, 3, 3)
        with pytest.raises(RuntimeError, match="too small"):
            model(torch.ones(1, 3, 6, 1))


class Beside(nn.Module):
    """The ReLU works in place, and what it worked on is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        return functional.interpolate(self.chain(y), scale_factor=2.0) + y


def test_a_relu_in_place_stays_in_place() -> None:
    assert_same(both(Beside(), images(2, 3, 8, 8, values=8)))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_too(context: type[torch.no_grad]) -> None:
    model, x = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), images(2, 3, 8, 8, values=8)
    with context():
        want = model(x)
        with quick_pools(model):
            assert torch.equal(model(x), want)


def test_without_numba_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "no_numba", lambda: "numba is not installed")
    model, x = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), images(2, 3, 8, 8, values=8).requires_grad_()
    pooling.prepare_pools(model)
    with quick_pools(model):
        assert not is_ours(model(x))


def test_a_gradient_in_another_layout_arrives() -> None:
    x = images(2, 3, 8, 8, values=8).requires_grad_()
    grad = torch.randn(2, 3, 4, 4, generator=torch_rng("grad"))
    want = torch.autograd.grad(functional.max_pool2d(x, 2), x, grad)[0]
    model = nn.MaxPool2d(2)
    with quick_pools(model):
        out = model(x)
    got = torch.autograd.grad(out, x, grad.contiguous(memory_format=torch.channels_last))[0]
    assert torch.equal(got, want)
