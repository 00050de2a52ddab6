"""Networks under an element mask: training, scoring and probing on compact parameters, whatever the representation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight

from fedsparse.errors import UserError
from fedsparse.sparse.masks import Mask, spread
from fedsparse.task import Score, Split, Task, score

Network = Callable[[Tensor], Tensor]
Found = dict[str, tuple[Tensor, Tensor]]


@contextmanager
def network(task: Task, params: Mapping[str, Tensor], mask: Mask) -> Iterator[Network]:
    """The task's model as a function from inputs to logits that reads ``params`` (compact under ``mask``) at each call.

    Its mode is that of ``task.model``; in training mode running statistics among ``params`` are updated in place.
    """
    if not mask:
        with task.bound(params) as model:
            yield model
        return
    dense = {name: t for name, t in params.items() if name not in mask}

    def forward(x: Tensor) -> Tensor:
        weights = {name: spread(params[name], kept, task.shapes[name]) for name, kept in mask.items()}
        with task.bound({**dense, **weights}) as model:
            out: Tensor = model(x)
            return out

    yield forward


def score_masked(task: Task, params: Mapping[str, Tensor], mask: Mask, data: Split) -> Score:
    """Accuracy and loss of compact ``params`` on ``data``, as :meth:`Task.score`."""
    task.model.eval()
    with network(task, params, mask) as predict:
        return score(predict, data)


def top_gradients(
    task: Task, params: Mapping[str, Tensor], mask: Mask, batch: Split, counts: Mapping[str, int]
) -> Found:
    """The ``counts[name]`` largest gradients, by magnitude, of weights that the mask leaves out.

    Of the loss on ``batch``, in training mode, on copies of the running statistics. Returns name -> (positions,
    values): (a,) int32 ascending flat positions and (a,) signed float32 gradients; of equals the lowest position.
    (FedTiny, arXiv 2212.01977: what a device uploads in an adjustment round.)
    """
    own = {name: t.detach().clone() if name in task.buffers else t.detach() for name, t in params.items()}
    top = {name: _Top(mask[name], a) for name, a in counts.items()}
    task.model.train(True)
    with network(task, own, mask) as model, _probes(task, top):
        with torch.enable_grad():
            # a leaf that needs a gradient makes every later output need one, without any weight gradient
            loss = task.criterion(model(batch.x.clone().requires_grad_()), batch.y)
        loss.backward()
    return {name: found.result() for name, found in top.items()}


_CHUNK = 1 << 17  # gradients looked at together


class _Top:
    """The ``a`` largest of the values that are shown piece by piece, kept positions left out."""

    def __init__(self, kept: Tensor, a: int) -> None:
        self.kept = kept
        self.a = a
        self.at = torch.empty(0, dtype=torch.int64)
        self.values = torch.empty(0)

    def show(self, start: int, values: Tensor) -> None:
        """Gradients of the flat positions from ``start`` on, in ascending order."""
        lo, hi = torch.searchsorted(self.kept, torch.tensor([start, start + len(values)], dtype=torch.int32)).tolist()
        size = values.abs()
        size[self.kept[lo:hi].long() - start] = -1.0  # never chosen before a pruned one
        all_sizes = torch.cat([self.values.abs(), size])
        best = torch.argsort(all_sizes, descending=True, stable=True)[: self.a]  # equals: lowest position first
        best = best[all_sizes[best] >= 0].sort().values
        self.values = torch.cat([self.values, values])[best]
        self.at = torch.cat([self.at, torch.arange(start, start + len(values))])[best]

    def result(self) -> tuple[Tensor, Tensor]:
        return self.at.int(), self.values


@contextmanager
def _probes(task: Task, top: Mapping[str, _Top]) -> Iterator[None]:
    """Show each probed layer's weight gradient, some outputs at a time, to its collector as the backward pass comes by."""
    handles = []
    for name, found in top.items():
        layer = task.model.get_submodule(name.rpartition(".")[0])
        handles.append(layer.register_forward_hook(_Probe(found)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Probe:
    """Forward hook of a convolution or linear layer: its input and output gradient give the weight gradient."""

    def __init__(self, found: _Top) -> None:
        self.found = found

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        output.register_hook(lambda dy: self._search(layer, x, dy))  # type: ignore[no-untyped-call]

    def _search(self, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        row = weight[0].numel()
        step = max(1, _CHUNK // row)
        for start in range(0, len(weight), step):
            part = dy[:, start : start + step]
            self.found.show(start * row, _weight_gradient(layer, x, part).reshape(-1))


def _weight_gradient(layer: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of the weights that make the outputs ``dy``: (outputs, *row)."""
    if isinstance(layer, nn.Linear):
        return dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1:
        shape = (dy.shape[1], *layer.weight.shape[1:])
        grad = conv1d_weight if isinstance(layer, nn.Conv1d) else conv2d_weight
        out: Tensor = grad(x, shape, dy, layer.stride, layer.padding, layer.dilation)
        return out
    raise UserError(f"gradients of pruned weights of a {type(layer).__name__} cannot be searched")
