"""pFedGate's gate: a small network that maps a batch to one weight M and one importance G a block.

Source: Chen et al. 2023, arXiv 2305.02776, section 5.2.1 and Fig. 2; switchable norm: Luo et al. 2018, arXiv
1806.10779; official code yxdyc/pFedGate at b8cfa15. Per branch: switchable norm, flatten, Linear(d_X, L), batch norm
over the L features, sigmoid, mean over the batch (of sigmoids, not the sigmoid of a mean).
Differs from the official code: the default has two full branches, as the paper says; inputs that are no image have a
norm over features and batch; the input may be pooled; a batch of one example uses the running statistics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsparse.errors import unknown

BRANCHES = ("separate", "shared")
_EPS = 1e-5
_KEEP = 0.9  # of the running statistics at each training batch; they start at 0, as in the official code


class SwitchNorm(nn.Module):
    """Switchable norm: learned mixtures of instance, layer and batch statistics.

    For (n, C, ...) inputs: 2C + 6 parameters, 2C buffers. For flat (n, F) inputs there is no instance part: 2F + 4.
    Variances are unbiased within an example, as in the official code.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, spatial: bool) -> None:
        super().__init__()
        self.spatial = spatial
        parts = 3 if spatial else 2
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mean_weight = nn.Parameter(torch.ones(parts))
        self.var_weight = nn.Parameter(torch.ones(parts))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(n, C, ...) or (n, F) -> the same shape."""
        means, variances = self._moments(x.flatten(2)) if self.spatial else self._flat_moments(x)
        a, b = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        mean = _mix(a, means, x.shape[:2])  # (n, C) or (n, F)
        var = _mix(b, variances, x.shape[:2])
        scale = self.weight * (var + _EPS).rsqrt()
        shape = (*x.shape[:2], *[1] * (x.ndim - 2))
        return x * scale.view(shape) + (self.bias - mean * scale).view(shape)

    def _moments(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Instance, layer and batch moments of (n, C, S)."""
        mean_in = x.mean(2)  # (n, C)
        var_in = x.var(2, correction=min(1, x.shape[2] - 1))
        square = var_in + mean_in**2
        mean_ln = mean_in.mean(1, keepdim=True)  # (n, 1)
        var_ln = square.mean(1, keepdim=True) - mean_ln**2
        mean_bn, var_bn = self._batch(mean_in.mean(0), square.mean(0) - mean_in.mean(0) ** 2)
        return [mean_in, mean_ln, mean_bn], [var_in, var_ln, var_bn]

    def _flat_moments(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Layer and batch moments of (n, F)."""
        mean_ln = x.mean(1, keepdim=True)  # (n, 1)
        var_ln = x.var(1, keepdim=True, correction=min(1, x.shape[1] - 1))
        mean_bn, var_bn = self._batch(x.mean(0), x.var(0, correction=min(1, len(x) - 1)))
        return [mean_ln, mean_bn], [var_ln, var_bn]

    def _batch(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's statistics in training, which also move the running ones; the running ones otherwise."""
        if not self.training:
            return self.running_mean, self.running_var
        with torch.no_grad():
            self.running_mean.mul_(_KEEP).add_(mean, alpha=1 - _KEEP)
            self.running_var.mul_(_KEEP).add_(var, alpha=1 - _KEEP)
        return mean, var


def _mix(weights: Tensor, parts: list[Tensor], shape: torch.Size) -> Tensor:
    """The weighted sum of parts that broadcast to ``shape``: one operation, so one step backwards."""
    total: Tensor = torch.tensordot(weights, torch.stack([part.expand(shape) for part in parts]), 1)
    return total


def _pool2d(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return functional.adaptive_avg_pool2d(x, (size[0], size[1]))


class Branch(nn.Module):
    """Input -> one value in (0, 1) a block. ``generator``: draws the linear layer, uniform in +-1/sqrt(d_X)."""

    def __init__(self, input_shape: tuple[int, ...], blocks: int, generator: torch.Generator) -> None:
        super().__init__()
        features = math.prod(input_shape)
        bound = 1 / math.sqrt(features)
        self.norm = SwitchNorm(input_shape[0], spatial=len(input_shape) > 1)
        self.weight = nn.Parameter(torch.empty(blocks, features).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(blocks).uniform_(-bound, bound, generator=generator))
        self.post_norm = nn.BatchNorm1d(blocks, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(n, *input_shape) -> (L,): the mean over the batch of each example's sigmoids."""
        logits = functional.linear(self.norm(x).flatten(1), self.weight, self.bias)  # (n, L)
        return torch.sigmoid(self.post_norm(logits)).mean(0)


class Gate(nn.Module):
    """Maps a batch (n, *input_shape) to (M, G), both (L,) in (0, 1).

    branches: "separate" = M and G from a branch each; "shared" = the same vector for both. pool: images and series
    are averaged to that many positions a side before all else, 0 = not; the gate shrinks with them. Raises UserError
    for an unknown ``branches``.
    """

    def __init__(
        self, input_shape: tuple[int, ...], blocks: int, branches: str, pool: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        if branches not in BRANCHES:
            raise unknown("gate branches", branches, BRANCHES)
        self.pool = pool if pool and len(input_shape) in (2, 3) else 0
        self.input_shape = (input_shape[0], *(min(self.pool or s, s) for s in input_shape[1:]))
        self.scale = Branch(self.input_shape, blocks, generator)
        self.importance = self.scale if branches == "shared" else Branch(self.input_shape, blocks, generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.pool:
            size = self.input_shape[1:]
            x = functional.adaptive_avg_pool1d(x, size[0]) if len(size) == 1 else _pool2d(x, size)
        scale = self.scale(x)
        return scale, scale if self.importance is self.scale else self.importance(x)

    @property
    def macs(self) -> int:
        """Multiply-adds of one example: those of the linear layers."""
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, Branch))

    @property
    def size(self) -> int:
        """Trainable scalars."""
        return sum(p.numel() for p in self.parameters())
