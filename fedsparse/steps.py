"""In-place steps over lists of tensors: clipping, SGD, Adam, the proximal pull.

The ``torch._foreach`` functions are those that ``torch.optim`` itself uses: the same arithmetic, fewer calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # Adam's usual constants (Kingma and Ba 2015, arXiv 1412.6980)


def clip_(grads: Tensors, limit: float) -> None:
    """Scale ``grads`` in place so that their joint L2 norm is at most ``limit`` (0 = leave them)."""
    if limit:
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
        if not norm <= limit:
            torch._foreach_mul_(grads, limit / (norm + 1e-6))


def pull_(grads: Tensors, leaves: Tensors, anchor: Tensors, mu: float) -> None:
    """Add the proximal term's gradient ``mu * (leaf - anchor)`` in place; nothing when ``mu`` is 0."""
    if mu:
        for grad, leaf, start in zip(grads, leaves, anchor, strict=True):
            grad.add_(leaf - start, alpha=mu)


def step_(
    leaves: Tensors,
    grads: Tensors,
    velocity: list[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> None:
    """One SGD step in place, the arithmetic of ``torch.optim.SGD``. ``velocity``: empty, or one buffer a leaf."""
    if weight_decay:
        torch._foreach_add_(grads, leaves, alpha=weight_decay)
    if momentum:
        if velocity:
            torch._foreach_mul_(velocity, momentum)
            torch._foreach_add_(velocity, grads)
        else:
            velocity.extend(g.clone() for g in grads)
        grads = velocity
    torch._foreach_add_(leaves, grads, alpha=-lr)


def adam_(
    leaves: Tensors, grads: Tensors, moments: list[Tensor], step: int, *, lr: float, weight_decay: float = 0.0
) -> None:
    """One Adam step in place, the arithmetic of ``torch.optim.Adam``. ``moments``: empty, or two buffers a leaf, the
    first moments before the second; step: from 1."""
    if weight_decay:
        torch._foreach_add_(grads, leaves, alpha=weight_decay)
    if not moments:
        moments.extend(torch.zeros_like(leaf) for _ in range(2) for leaf in leaves)
    first, second = moments[: len(leaves)], moments[len(leaves) :]
    torch._foreach_lerp_(first, grads, 1 - _BETA1)
    torch._foreach_mul_(second, _BETA2)
    torch._foreach_addcmul_(second, grads, grads, 1 - _BETA2)
    root = torch._foreach_sqrt(second)
    torch._foreach_div_(root, (1 - _BETA2**step) ** 0.5)
    torch._foreach_add_(root, _EPS)
    torch._foreach_addcdiv_(leaves, first, root, -lr / (1 - _BETA1**step))
