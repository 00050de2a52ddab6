"""pFedGate's gate: a small network that maps a batch to one weight M and one importance G a block.

Source: Chen et al. 2023, arXiv 2305.02776, section 5.2.1 and Fig. 2; switchable norm: Luo et al. 2018, arXiv
1806.10779; official code yxdyc/pFedGate at b8cfa15. Per branch: switchable norm, flatten, Linear(d_X, L), batch norm
over the L features, sigmoid, mean over the batch (of sigmoids, not the sigmoid of a mean).
Differs from the official code: the default has two full branches, as the paper says; inputs that are no image have a
norm over features and batch; the input may be pooled; a batch of one example uses the running statistics; text is read
as each example's shares of tokens, which a linear layer turns into a mean embedding of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsparse.errors import UserError, unknown

BRANCHES = ("separate", "shared")
PRE_NORMS = ("switch", "none")
POST_NORMS = ("batch", "layer", "none")
BOUNDS = ("sigmoid", "none")
_EPS = 1e-5
_MIDDLE = 0.5  # of a sigmoid
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
        parts = 3 if spatial else 2
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mean_weight = nn.Parameter(torch.ones(parts))
        self.var_weight = nn.Parameter(torch.ones(parts))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.zeros(channels))

    def forward(self, x: Tensor, moments: Tensor) -> Tensor:
        """(n, C, ...) or (n, F) -> the same shape. moments: ``input_moments(x)``, which branches share."""
        moments = self._with_running(moments)
        mixtures = torch.stack([self.mean_weight, self.var_weight]).softmax(1)  # (2, parts)
        mean, var = torch.bmm(mixtures.unsqueeze(1), moments.flatten(2)).view(2, *x.shape[:2]).unbind()
        scale = self.weight * (var + _EPS).rsqrt()
        shift = torch.addcmul(self.bias, mean, scale, value=-1)
        shape = (*x.shape[:2], *[1] * (x.ndim - 2))
        return torch.addcmul(shift.view(shape), x, scale.view(shape))

    def _with_running(self, moments: Tensor) -> Tensor:
        """Training moves the running statistics; evaluation uses them for the batch's part, the last one."""
        with torch.no_grad():
            if self.training:
                self.running_mean.lerp_(moments[0, -1, 0], 1 - _KEEP)
                self.running_var.lerp_(moments[1, -1, 0], 1 - _KEEP)
                return moments
            moments = moments.clone()  # another branch may have other running statistics
            moments[0, -1], moments[1, -1] = self.running_mean, self.running_var
            return moments


def input_moments(x: Tensor) -> Tensor:
    """(2, parts, n, C) or (2, parts, n, F): means and variances of an input by part; no gradients.

    Images and series (n, C, ...): instance, layer, batch. Flat inputs (n, F): layer, batch.
    """
    with torch.no_grad():
        return _spatial_moments(x.flatten(2)) if x.ndim > 2 else _flat_moments(x)


def _spatial_moments(x: Tensor) -> Tensor:
    """Instance, layer and batch moments of (n, C, S)."""
    var, mean = torch.var_mean(x, 2, correction=min(1, x.shape[2] - 1))  # (n, C)
    instance = torch.stack([mean, var + mean**2])  # (2, n, C) first and second moments
    layer, batch = instance.mean(2, keepdim=True), instance.mean(1, keepdim=True)
    moments = torch.stack([instance, layer.expand_as(instance), batch.expand_as(instance)], 1)
    moments[1] -= moments[0] ** 2
    moments[1].clamp_(min=0)  # rounding can take it below
    moments[1, 0] = var
    return moments


def _flat_moments(x: Tensor) -> Tensor:
    """Layer and batch moments of (n, F)."""
    var_ln, mean_ln = torch.var_mean(x, 1, keepdim=True, correction=min(1, x.shape[1] - 1))  # (n, 1)
    var_bn, mean_bn = torch.var_mean(x, 0, correction=min(1, len(x) - 1))  # (F,)
    parts = [part.expand_as(x) for part in (mean_ln, mean_bn, var_ln, var_bn)]
    return torch.stack(parts).view(2, 2, *x.shape)


def token_shares(x: Tensor, vocabulary: int) -> Tensor:
    """(n, T) int64 tokens -> (n, V) float32: the share of each token in the example; they sum to 1.

    The mean of the one-hot tokens, without the (n, T, V) of them.
    """
    one = torch.ones(1, device=x.device)
    return one.new_zeros(len(x), vocabulary).scatter_add_(1, x, one.expand(x.shape)) / x.shape[1]


def _pool2d(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return functional.adaptive_avg_pool2d(x, (size[0], size[1]))


@dataclass(frozen=True)
class GateOptions:
    """What a gate is made of. Raises UserError for a word that is not known.

    branches: "separate" = M and G from a branch each; "shared" = the same vector for both. share_pre_norm: separate
    branches share the first norm, and start as copies of one another (the official code's ``seperate_trans = 1``).
    pool: images and series are averaged to that many positions a side before all else, 0 = not; the gate shrinks with
    them. pre_norm, post_norm, bound: the layers before and after the linear one and what ends it (the paper's Table 2).
    start: about what M is at first, in (0, 1); the paper's gates start at 0.5, which halves every layer's outputs.
    vocabulary: number of tokens, 0 for numeric input.
    """

    branches: str = "separate"
    share_pre_norm: bool = False
    pool: int = 0
    pre_norm: str = "switch"
    post_norm: str = "batch"
    bound: str = "sigmoid"
    start: float = _MIDDLE
    vocabulary: int = 0

    def __post_init__(self) -> None:
        allowed = {"branches": BRANCHES, "pre_norm": PRE_NORMS, "post_norm": POST_NORMS, "bound": BOUNDS}
        for name, words in allowed.items():
            if getattr(self, name) not in words:
                raise unknown(f"gate {name.replace('_', '-')}", getattr(self, name), words)
        if not 0 < self.start < 1:
            raise UserError(f"gate_start must be in (0, 1), got {self.start}")
        if self.start != _MIDDLE and self.bound != "sigmoid":
            raise UserError(f'gate_start needs gate_bound = "sigmoid", got {self.bound!r}')


class Branch(nn.Module):
    """Input -> one value a block, in (0, 1) if it is bounded.

    ``generator``: draws the linear layer, uniform in +-1/sqrt(d_X). ``norm``: the first norm, None = without.
    """

    def __init__(
        self, features: int, blocks: int, generator: torch.Generator, options: GateOptions, norm: SwitchNorm | None
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(features)
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(blocks, features).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(blocks).uniform_(-bound, bound, generator=generator))
        self.post_norm = _post_norm(options.post_norm, blocks)
        self.bounded = options.bound == "sigmoid"

    def shift_(self, by: float) -> None:
        """Add to all logits."""
        last: Tensor = getattr(self.post_norm, "bias", self.bias)
        with torch.no_grad():
            last.add_(by)

    def forward(self, x: Tensor) -> Tensor:
        """Normed inputs (n, *input_shape) -> (L,): the mean over the batch of each example's values."""
        logits = self.post_norm(functional.linear(x.flatten(1), self.weight, self.bias))  # (n, L)
        return (torch.sigmoid(logits) if self.bounded else logits).mean(0)


def _post_norm(kind: str, blocks: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm1d(blocks, eps=_EPS)
    return nn.LayerNorm(blocks, eps=_EPS) if kind == "layer" else nn.Identity()


def _apply(norm: SwitchNorm | None, x: Tensor, moments: Tensor | None) -> Tensor:
    return x if norm is None or moments is None else norm(x, moments)


class Gate(nn.Module):
    """Maps a batch (n, *input_shape) to (M, G), both (L,)."""

    def __init__(
        self, input_shape: tuple[int, ...], blocks: int, generator: torch.Generator, options: GateOptions
    ) -> None:
        super().__init__()
        shape = (options.vocabulary,) if options.vocabulary else input_shape
        self.vocabulary = options.vocabulary
        self.pool = options.pool if options.pool and len(shape) in (2, 3) else 0
        self.input_shape = (shape[0], *(min(self.pool or s, s) for s in shape[1:]))
        self.normed = options.pre_norm == "switch"
        self.scale = self._branch(blocks, generator, options, self._norm())
        self.importance = self.scale
        if options.branches == "separate":
            norm = self.scale.norm if options.share_pre_norm else self._norm()
            self.importance = self._branch(blocks, generator, options, norm)
            if options.share_pre_norm:
                self.importance.load_state_dict(self.scale.state_dict())
        self.scale.shift_(math.log(options.start / (1 - options.start)))

    def _norm(self) -> SwitchNorm | None:
        return SwitchNorm(self.input_shape[0], spatial=len(self.input_shape) > 1) if self.normed else None

    def _branch(self, blocks: int, generator: torch.Generator, options: GateOptions, norm: SwitchNorm | None) -> Branch:
        return Branch(math.prod(self.input_shape), blocks, generator, options, norm)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.read(x)
        moments = input_moments(x) if self.normed else None
        normed = _apply(self.scale.norm, x, moments)
        scale = self.scale(normed)
        if self.importance is self.scale:
            return scale, scale
        if self.importance.norm is not self.scale.norm:
            normed = _apply(self.importance.norm, x, moments)
        return scale, self.importance(normed)

    def read(self, x: Tensor) -> Tensor:
        """Numbers of the gate's shape: shares of tokens, or the pooled input. What has been read stays as it is."""
        if self.vocabulary and not x.is_floating_point():
            return token_shares(x, self.vocabulary)
        if self.pool:
            size = self.input_shape[1:]
            return functional.adaptive_avg_pool1d(x, size[0]) if len(size) == 1 else _pool2d(x, size)
        return x

    @property
    def macs(self) -> int:
        """Multiply-adds of one example: those of the linear layers."""
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, Branch))

    @property
    def activations(self) -> int:
        """Scalars that training holds for one example: normed inputs and logits of each branch."""
        branches = [m for m in self.modules() if isinstance(m, Branch)]
        return sum((m.norm is not None) * m.weight.shape[1] + m.weight.shape[0] for m in branches)

    @property
    def size(self) -> int:
        """Trainable scalars."""
        return sum(p.numel() for p in self.parameters())
