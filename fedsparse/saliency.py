"""Scores of a task's weights before training: SNIP's from data, SynFlow's without.

Both are taken in evaluation mode: batch norm uses its running statistics and keeps them, dropout is off, and a score
depends on how the examples are cut into batches by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedsparse.errors import UserError
from fedsparse.models.norms import NORMS
from fedsparse.sparse.masks import Mask, spread
from fedsparse.sparse.pruning import saliency, synaptic_flow
from fedsparse.task import Split, Task
from fedsparse.threads import one_thread

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def snip_scores(
    task: Task, params: Mapping[str, Tensor], data: Split, kept: Mask, *, batch: int = 128
) -> dict[str, Tensor]:
    """abs(w * dL/dw) of the kept weights, name -> (kept,) float32; L: the mean loss over ``data``.

    params: whole. kept: every layer to be scored; its other weights count as 0. batch: examples a pass. Raises
    UserError without examples.
    """
    if not len(data):
        raise UserError("there are no examples to score weights with")
    params = task.placed(params)
    weights = {name: _masked(params[name], at).requires_grad_() for name, at in task.placed(kept).items()}
    sums = [torch.zeros_like(w, dtype=torch.float64) for w in weights.values()]
    task.model.eval()
    with one_thread(), task.bound({**params, **weights}) as model, torch.enable_grad():
        for i in range(0, len(data), batch):
            x, y = (t[i : i + batch].to(task.device) for t in (data.x, data.y))
            grads = torch.autograd.grad(task.criterion(model(x), y), list(weights.values()), materialize_grads=True)
            for total, grad in zip(sums, grads, strict=True):
                total.add_(grad.double(), alpha=len(y))
    found = zip(weights.items(), sums, strict=True)
    scores = {name: saliency(w.detach(), (total / len(data)).float()).cpu() for (name, w), total in found}
    return {name: s.reshape(-1)[kept[name].long()] for name, s in scores.items()}


def score_bytes(sizes: Mapping[str, int]) -> int:
    """Bytes that :func:`snip_scores` of so many weights holds beside the model: sums of gradients in float64."""
    return 8 * sum(sizes.values())


def flow_scores(task: Task, params: Mapping[str, Tensor], kept: Mask) -> dict[str, Tensor]:
    """The synaptic flow through the kept weights, name -> (kept,) float64; see ``pruning.synaptic_flow``.

    Norms that take their statistics from the input (group and layer norm) are passed by: they would undo the flow.
    Raises UserError for a task of tokens, which have no input of ones.
    """
    if task.tokens:
        raise UserError("SynFlow needs numeric inputs, this task's are tokens")
    ones = torch.ones(1, *task.input_shape, dtype=torch.float64, device=task.device)

    def output(own: Mapping[str, Tensor]) -> Tensor:
        with task.bound(own) as model:
            out: Tensor = model(ones)
            return out

    task.model.eval()
    with one_thread(), _passed_by(task.model):
        flows = synaptic_flow(output, task.placed(params), task.placed(kept))
    return {name: flow.cpu() for name, flow in flows.items()}


def _masked(weight: Tensor, at: Tensor) -> Tensor:
    return spread(weight.detach().reshape(-1)[at.long()], at, tuple(weight.shape))


@contextmanager
def _passed_by(model: nn.Module) -> Iterator[None]:
    """Within the block, norms without running statistics give their input back."""
    norms = [m for m in model.modules() if isinstance(m, NORMS) and not _keeps_statistics(m)]
    hooks = [m.register_forward_hook(lambda _, inputs, output: inputs[0]) for m in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _keeps_statistics(norm: nn.Module) -> bool:
    return isinstance(norm, _BATCH_NORM) and norm.running_var is not None
