"""Max-pools of 2 x 2 in one pass with the ReLU before them, for models that compute with parts of their layers.

A convolution that is cheap is kept almost whole, and its pool, for which PyTorch takes several times as long on a CPU,
would cost more than all that the part saves. Values and gradients have PyTorch's bits, but for the sign of a zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedsparse.sparse.representation import no_numba


def prepare_pools(model: nn.Module) -> None:
    """What a driver does once, before it starts workers: compile or load the kernels, if the model has such pools."""
    if any(map(_halves, model.modules())) and not no_numba():
        from fedsparse.sparse import kernels

        image, half = np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 1, 1, 1), np.float32)
        kernels.halve(image, True, half, np.zeros(half.shape, np.int32))
        kernels.halve_backward(half[0, 0], np.zeros((1, 1), np.int32), image.reshape(1, 4))


@contextmanager
def quick_pools(model: nn.Module) -> Iterator[None]:
    """The model whose max-pools of 2 x 2 are computed here, for the length of the block."""
    own = {module: forward for module in model.modules() if (forward := _own_forward(module))}
    if own and no_numba():
        own = {}
    for module, forward in own.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module in own:
            del vars(module)["forward"]


def _own_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What takes the place of a module's ``forward``, if something does."""
    if _halves(module):
        return partial(_pooled, module)
    if type(module) is nn.Sequential and "forward" not in vars(module):
        layers = list(module)
        joined = [i for i, pair in enumerate(pairwise(layers)) if _joins(*pair)]
        return partial(_in_turn, module, frozenset(joined)) if joined else None
    return None


def _halves(module: nn.Module) -> bool:
    """Whether it is the usual max-pool: 2 x 2, side by side."""
    if type(module) is not nn.MaxPool2d or module.return_indices or module.ceil_mode or "forward" in vars(module):
        return False
    return all(value in (2, (2, 2)) for value in (module.kernel_size, module.stride)) and (
        module.padding in (0, (0, 0)) and module.dilation in (1, (1, 1))
    )


def _joins(first: nn.Module, second: nn.Module) -> bool:
    """Whether the second can compute the first with itself: a pool a ReLU, where nobody looks at what is between."""
    relu = type(first) is nn.ReLU and not first.inplace and "forward" not in vars(first)
    return relu and _halves(second) and _silent(first) and _silent(second)


def _in_turn(chain: nn.Sequential, joined: frozenset[int], x: Tensor) -> Tensor:
    """The chain's outputs. joined: the ReLUs that the pools behind them compute."""
    for i, layer in enumerate(chain):
        if i - 1 in joined:
            x = _pooled(layer, x, relu=True)
        elif i not in joined:
            x = layer(x)
    return x


def _silent(module: nn.Module) -> bool:
    """Whether nobody wants to see what goes in and out."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(module, kind) for kind in kinds)


def _pooled(pool: nn.Module, x: Tensor, *, relu: bool = False) -> Tensor:
    """``pool(x)`` or ``pool(relu(x))``: here where that is quicker, which in channels-last it is not."""
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
    if plain and x.ndim == 4 and x.is_contiguous() and x.numel() and min(x.shape[2:]) >= 2:
        return _Halve.apply(x, relu)  # type: ignore[no-any-return, no-untyped-call]
    return type(pool).forward(pool, torch.relu(x) if relu else x)  # type: ignore[no-any-return]


class _Halve(torch.autograd.Function):
    """``max_pool2d(x, 2)``, or of ``relu(x)``. Keeps 4 bytes a window for the gradient, a quarter of the input's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, relu: bool) -> Tensor:
        from fedsparse.sparse import kernels

        n, channels, height, width = ctx.shape = x.shape
        out = x.new_empty(n, channels, height // 2, width // 2)
        places = torch.empty(out.shape, dtype=torch.int32)
        kernels.halve(x.detach().numpy(), relu, out.numpy(), places.numpy())
        ctx.save_for_backward(places)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        from fedsparse.sparse import kernels

        (places,), (n, channels, height, width) = ctx.saved_tensors, ctx.shape
        out = grads[0].new_empty(n * channels, height * width)
        flat = (len(out), -1)
        kernels.halve_backward(grads[0].contiguous().view(flat).numpy(), places.view(flat).numpy(), out.numpy())
        return out.view(ctx.shape), None
