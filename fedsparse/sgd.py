"""The one local training loop: batches, clipping and SGD, as functions over named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsparse.errors import UserError
from fedsparse.masked import SquaredGradients, network
from fedsparse.sparse.masks import Mask
from fedsparse.steps import adam_, clip_, pull_, step_
from fedsparse.task import Params, Split, Task

OPTIMIZERS = ("sgd", "adam")


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
    order: Iterable[Tensor] | None = None,
    moments: list[Tensor] | None = None,
    done: int = 0,
    squares: SquaredGradients | None = None,
) -> Fit:
    """Train a copy of ``params`` (parameters and buffers) on ``data`` with SGD, or with Adam.

    clip: largest global L2 norm of the gradient, 0 = none. proximal: FedProx's mu, which adds
    mu * (theta - theta_received) to the gradient (Li et al. 2020, eq. 2). mask: ``params`` are compact under it, and so
    are gradients, momentum and the result: what is not kept is neither stored nor touched.
    optimizer: one of :data:`OPTIMIZERS`. The arithmetic is that of ``torch.optim``, bit for bit.
    For a training in parts: order: the batches of this part, index tensors as of :func:`batches`; moments: the
    optimiser's state, empty at first, for each tensor in ``task.trainable`` (twice for Adam), written in place, on the
    task's device; done:
    steps of the parts before. squares: sees all gradients, before clipping. Raises UserError when the loss is not
    finite.
    """
    own = {name: t.detach().clone().to(task.device) for name, t in params.items()}  # packets are shared: train in none
    data = data.to(task.device)
    leaves = [own[name].requires_grad_() for name in task.trainable]
    anchor = [params[name].to(task.device) for name in task.trainable] if proximal else []
    state = [] if moments is None else moments
    order = batches(len(data), batch_size, epochs, rng) if order is None else order
    steps = samples = 0
    total = 0.0
    task.model.train(True)
    with network(task, own, mask or {}, squares.shows if squares else None) as model:
        for batch in order:
            loss = task.criterion(model(data.x[batch]), data.y[batch])
            grads = torch.autograd.grad(loss, leaves)
            with torch.no_grad():
                if squares:
                    squares.count(dict(zip(task.trainable, grads, strict=True)))
                clip_(grads, clip)
                pull_(grads, leaves, anchor, proximal)
                if optimizer == "adam":
                    adam_(leaves, grads, state, done + steps + 1, lr=lr, weight_decay=weight_decay)
                else:
                    step_(leaves, grads, state, lr=lr, momentum=momentum, weight_decay=weight_decay)
            total += finite(loss.item(), done + steps)
            steps, samples = steps + 1, samples + len(batch)
    return Fit({name: t.detach().cpu() for name, t in own.items()}, steps, samples, total / max(1, steps))


def finite(loss: float, step: int) -> float:
    """The loss, or a UserError that names the step when it is NaN or infinite."""
    if not math.isfinite(loss):
        raise UserError(f"the training loss is {loss} at step {step + 1}; lower the learning rate or set clip")
    return loss


def optimizer_copies(config: Mapping[str, object]) -> int:
    """Tensors of optimiser state a weight, from a client half's hyper-parameters."""
    return 2 if config.get("optimizer") == "adam" else int(bool(config.get("momentum")))
