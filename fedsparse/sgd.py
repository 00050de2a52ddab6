"""The one local training loop: batches, clipping and SGD, as functions over named tensors.

The ``torch._foreach`` functions are those that ``torch.optim`` itself uses: the same arithmetic, fewer calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsparse.errors import UserError
from fedsparse.masked import network
from fedsparse.sparse.masks import Mask
from fedsparse.task import Params, Split, Task

Tensors = list[Tensor] | tuple[Tensor, ...]
OPTIMIZERS = ("sgd", "adam")
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # Adam's usual constants (Kingma and Ba 2015, arXiv 1412.6980)


@dataclass(frozen=True)
class Fit:
    """What local training gave: the new parameters and buffers, steps, samples seen, mean loss over the steps."""

    params: Params
    steps: int
    samples: int
    loss: float


def batches(n: int, batch_size: int, epochs: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Index tensors of shuffled batches, epoch after epoch; the last, smaller batch is kept.

    A batch of a single example is left out (unless it is all there is): batch statistics need two.
    """
    for _ in range(epochs):
        order = torch.randperm(n, generator=rng)  # (n,)
        for chunk in torch.split(order, batch_size):
            if len(chunk) > 1 or n == 1 or batch_size == 1:
                yield chunk


def sgd(
    task: Task,
    params: Mapping[str, Tensor],
    data: Split,
    *,
    lr: float,
    epochs: int,
    batch_size: int,
    rng: torch.Generator,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip: float = 0.0,
    proximal: float = 0.0,
    mask: Mask | None = None,
    optimizer: str = "sgd",
) -> Fit:
    """Train a copy of ``params`` (parameters and buffers) on ``data`` with SGD, or with Adam.

    clip: largest global L2 norm of the gradient, 0 = none. proximal: FedProx's mu, which adds
    mu * (theta - theta_received) to the gradient (Li et al. 2020, eq. 2). mask: ``params`` are compact under it, and so
    are gradients, momentum and the result: what is not kept is neither stored nor touched.
    optimizer: one of :data:`OPTIMIZERS`. The arithmetic is that of ``torch.optim``, bit for bit. Raises UserError when
    the loss is not finite.
    """
    own = {name: t.detach().clone() for name, t in params.items()}  # packets are shared: never train in them
    leaves = [own[name].requires_grad_() for name in task.trainable]
    anchor = [params[name] for name in task.trainable] if proximal else []
    state: list[Tensor] = []
    steps = samples = 0
    total = 0.0
    task.model.train(True)
    with network(task, own, mask or {}) as model:
        for batch in batches(len(data), batch_size, epochs, rng):
            loss = task.criterion(model(data.x[batch]), data.y[batch])
            grads = torch.autograd.grad(loss, leaves)
            with torch.no_grad():
                clip_(grads, clip)
                pull_(grads, leaves, anchor, proximal)
                if optimizer == "adam":
                    adam_(leaves, grads, state, steps + 1, lr=lr, weight_decay=weight_decay)
                else:
                    step_(leaves, grads, state, lr=lr, momentum=momentum, weight_decay=weight_decay)
            total += finite(loss.item(), steps)
            steps, samples = steps + 1, samples + len(batch)
    return Fit({name: t.detach() for name, t in own.items()}, steps, samples, total / max(1, steps))


def finite(loss: float, step: int) -> float:
    """The loss, or a UserError that names the step when it is NaN or infinite."""
    if not math.isfinite(loss):
        raise UserError(f"the training loss is {loss} at step {step + 1}; lower the learning rate or set clip")
    return loss


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


def optimizer_copies(config: Mapping[str, object]) -> int:
    """Tensors of optimiser state a weight, from a client half's hyper-parameters."""
    return 2 if config.get("optimizer") == "adam" else int(bool(config.get("momentum")))
