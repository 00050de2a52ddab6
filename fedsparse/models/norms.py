"""The running statistics of a model's batch norms as one tensor, and their plain mean over batches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsparse.errors import UserError
from fedsparse.task import Params, Task

_NORM = nn.modules.batchnorm._BatchNorm
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # of any kind


def norm_names(task: Task) -> tuple[str, ...]:
    """The names of all parameters and buffers of norm layers, of whatever kind, in the model's order."""
    layers = {name for name, m in task.model.named_modules() if isinstance(m, NORMS)}
    return tuple(name for name in task.shapes if name.rpartition(".")[0] in layers)


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
    return torch.stack(rows).cpu()


def with_statistics(task: Task, params: Mapping[str, Tensor], statistics: Tensor) -> Params:
    """``params`` with the (2, channels) ``statistics`` of ``read_statistics`` in them (as views)."""
    out = dict(params)
    for names, row in zip(statistic_names(task), statistics, strict=True):
        parts = torch.split(row, [params[name].numel() for name in names])
        out |= dict(zip(names, parts, strict=True))
    return out


class BatchStatistics:
    """The plain mean of batches' statistics, from running ones that are updated in place.

    A running statistic that was 0 is momentum times the batch's afterwards: no norm needs another momentum for it.
    """

    def __init__(self, task: Task, params: Mapping[str, Tensor]) -> None:
        self._task = task
        self._params = params
        self._momentum = torch.cat([torch.full((m.num_features,), _momentum(m)) for _, m in _norms(task)])
        self._sum = torch.zeros(2, len(self._momentum), dtype=torch.float64)
        self._batches = 0

    def before(self) -> None:
        """Set the running statistics to 0, in place."""
        for name in itertools.chain(*statistic_names(self._task)):
            self._params[name].zero_()

    def after(self) -> None:
        """Count the batch that has gone through the model since."""
        self._sum += read_statistics(self._task, self._params).double() / self._momentum
        self._batches += 1

    def result(self) -> Tensor:
        """(2, channels) float32: the means."""
        return (self._sum / self._batches).float()


def _momentum(norm: nn.modules.batchnorm._BatchNorm) -> float:
    if not norm.momentum:
        raise UserError("batch norms without momentum keep no statistics that candidates could be judged by")
    return float(norm.momentum)
