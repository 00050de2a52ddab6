"""The running statistics of a model's batch norms as one tensor, and how they are averaged over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedsparse.task import Params, Task

_NORM = nn.modules.batchnorm._BatchNorm


def _norms(task: Task) -> list[tuple[str, nn.modules.batchnorm._BatchNorm]]:
    """The norms that keep running statistics, in the model's order."""
    found = ((name, m) for name, m in task.model.named_modules() if isinstance(m, _NORM))
    return [(name, m) for name, m in found if m.running_mean is not None]


def statistic_names(task: Task) -> tuple[list[str], list[str]]:
    """The names of the running means and of the running variances; empty for a model without batch norm."""
    names = [name for name, _ in _norms(task)]
    return [f"{name}.running_mean" for name in names], [f"{name}.running_var" for name in names]


def read_statistics(task: Task, params: Mapping[str, Tensor]) -> Tensor:
    """(2, channels): the running means and variances of all batch norms among ``params``, a copy."""
    rows = [torch.cat([params[name] for name in names] or [torch.empty(0)]) for names in statistic_names(task)]
    return torch.stack(rows)


def with_statistics(task: Task, params: Mapping[str, Tensor], statistics: Tensor) -> Params:
    """``params`` with the (2, channels) ``statistics`` of ``read_statistics`` in them (as views)."""
    out = dict(params)
    for names, row in zip(statistic_names(task), statistics, strict=True):
        parts = torch.split(row, [params[name].numel() for name in names])
        out |= dict(zip(names, parts, strict=True))
    return out


@contextmanager
def norm_momentum(task: Task) -> Iterator[Callable[[float], None]]:
    """A function that sets the momentum of all batch norms (a new batch's share); the block's end undoes it."""
    norms = [m for _, m in _norms(task)]
    own = [m.momentum for m in norms]

    def put(value: float) -> None:
        for norm in norms:
            norm.momentum = value

    try:
        yield put
    finally:
        for norm, momentum in zip(norms, own, strict=True):
            norm.momentum = momentum
