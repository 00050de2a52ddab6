"""Networks under an element mask: training, scoring and probing on compact parameters, whatever the representation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from fedsparse.errors import UserError
from fedsparse.sparse import SEARCH_PIECE
from fedsparse.sparse.masks import Mask, spread
from fedsparse.sparse.representation import executor_for
from fedsparse.task import Score, Split, Task, score

if TYPE_CHECKING:
    from fedsparse.sparse.executor import Executor

Network = Callable[[Tensor], Tensor]
Found = dict[str, tuple[Tensor, Tensor]]
Show = Callable[[int, Tensor], None]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_FORMS = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}  # by dimensions


@contextmanager
def network(
    task: Task, params: Mapping[str, Tensor], mask: Mask, shows: Mapping[str, Show] | None = None
) -> Iterator[Network]:
    """The task's model as a function from inputs to logits that reads ``params`` (compact under ``mask``) at each call.

    ``params`` and inputs are on the task's device, masks anywhere. Its mode is that of ``task.model``; in training mode
    running statistics among ``params`` are updated in place.
    shows: by weight, what gets its dense gradient in every backward pass, piece by piece: the first flat position, and
    the gradients of the positions from there on, whether they are kept or not.
    """
    if not mask and not shows:
        with task.bound(params) as model:
            yield model
        return
    executor = _executor(task, params, mask) if mask else None
    if executor is not None:
        layers = {name.rpartition(".")[0]: show for name, show in shows.items()} if shows else None
        yield lambda x: executor.logits(params, x, train=task.model.training, shows=layers)
        return
    dense = {name: t for name, t in params.items() if name not in mask}
    mask = task.placed(mask)

    def forward(x: Tensor) -> Tensor:
        weights = {name: spread(params[name], kept, task.shapes[name]) for name, kept in mask.items()}
        for name, show in (shows or {}).items():
            weights[name] = _shown(weights.get(name, params[name]), show)
        with task.bound({**dense, **weights}) as model:
            out: Tensor = model(x)
            return out

    yield forward


def _shown(weight: Tensor, show: Show) -> Tensor:
    """The same weight, whose gradient is shown when it is known."""
    seen = weight.view_as(weight)
    seen.register_hook(lambda grad: show(0, grad.reshape(-1)))  # type: ignore[no-untyped-call]
    return seen


class SquaredGradients:
    """The mean over batches of squared gradients: of every weight in ``sizes``, kept or not, and of all others in sum.

    Holds one float32 a weight; a dense gradient is seen piece by piece where the sparse kernels compute it.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sums = {name: torch.zeros(size) for name, size in sizes.items()}
        self._rest = 0.0
        self._batches = 0

    @property
    def shows(self) -> dict[str, Show]:
        """What :func:`network` shows the gradients to."""
        return {name: partial(self._add, name) for name in self._sums}

    def _add(self, name: str, start: int, grads: Tensor) -> None:
        self._sums[name][start : start + len(grads)] += grads.detach().cpu().square()

    def count(self, grads: Mapping[str, Tensor]) -> None:
        """A batch is done. grads: of all trainable tensors; those of weights in ``sizes`` have been shown."""
        self._batches += 1
        self._rest += sum(float(g.detach().double().square().sum()) for n, g in grads.items() if n not in self._sums)

    def means(self) -> tuple[dict[str, Tensor], float]:
        """Weight name -> (size,) float32, and the sum over all other trainable scalars."""
        n = max(1, self._batches)
        return {name: total / n for name, total in self._sums.items()}, self._rest / n


def _executor(task: Task, params: Mapping[str, Tensor], mask: Mask) -> Executor | None:
    """None: masked dense, as on a GPU, where dense products win at every density that matters."""
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in params.values()):
        return None
    return executor_for(task.model, task.input_shape, mask, task.crossover)


def score_masked(task: Task, params: Mapping[str, Tensor], mask: Mask, data: Split) -> Score:
    """Accuracy and loss of compact ``params`` on ``data``, as :meth:`Task.score`."""
    task.model.eval()
    with network(task, task.placed(params), mask) as predict:
        return score(predict, data, task.device)


def top_gradients(
    task: Task,
    params: Mapping[str, Tensor],
    mask: Mask,
    batch: Split,
    counts: Mapping[str, int],
    passed: Mask | None = None,
) -> Found:
    """The ``counts[name]`` largest gradients, by magnitude, of weights that the mask leaves out.

    Of the loss on ``batch``, in training mode, on copies of the running statistics. passed: larger masks of some
    weights, whose positions are passed over too. Returns name -> (positions, values): (a,) int32 ascending flat
    positions and (a,) signed float32 gradients; of equals the lowest position.
    (FedTiny, arXiv 2212.01977: what a device uploads in an adjustment round.)
    """
    own = {name: t.clone() if name in task.buffers else t.detach() for name, t in task.placed(params).items()}
    batch = batch.to(task.device)
    over = {**mask, **(passed or {})}
    top = {name: _Top(over[name], a) for name, a in counts.items()}
    task.model.train(True)
    executor = _executor(task, own, mask)
    if executor is not None:
        shows = {name.rpartition(".")[0]: found.show for name, found in top.items()}
        executor.search(own, batch.x, lambda logits: _loss_gradient(task, logits, batch.y), shows)
    else:
        with network(task, own, mask) as model, _probes(task, top) as first, torch.enable_grad():
            loss = task.criterion(model(batch.x), batch.y)
            if first:
                torch.autograd.grad(loss, first, allow_unused=True)
    for name, found in top.items():
        if not len(found.at) and found.a:
            raise UserError(f"gradients of pruned weights of {name!r} cannot be searched: the layer is not called")
    return {name: found.result() for name, found in top.items()}


def _loss_gradient(task: Task, logits: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        (grad,) = torch.autograd.grad(task.criterion(leaf, y), leaf)
    return grad


class _Top:
    """The ``a`` largest of the values that are shown piece by piece, kept positions left out."""

    def __init__(self, kept: Tensor, a: int) -> None:
        self.kept = kept
        self.a = a
        self.at = torch.empty(0, dtype=torch.int64)
        self.values = torch.empty(0)

    def show(self, start: int, values: Tensor) -> None:
        """Gradients of the flat positions from ``start`` on, in ascending order."""
        values = values.detach().cpu()
        if not bool(torch.isfinite(values).all()):
            raise UserError("gradients of pruned weights are not finite; lower the learning rate or set clip")
        lo, hi = torch.searchsorted(self.kept, torch.tensor([start, start + len(values)], dtype=torch.int32)).tolist()
        size = values.abs()
        size[self.kept[lo:hi].long() - start] = -1.0  # below every pruned one
        floor = float(self.values.abs().min()) if 0 < len(self.values) == self.a else -0.5
        new = (size > floor).nonzero().flatten()  # of equals the earlier position stays
        at, found = torch.cat([self.at, new + start]), torch.cat([self.values, values[new]])
        best = torch.argsort(found.abs(), descending=True, stable=True)[: self.a].sort().values
        self.at, self.values = at[best], found[best]

    def result(self) -> tuple[Tensor, Tensor]:
        return self.at.int(), self.values


@contextmanager
def _probes(task: Task, top: Mapping[str, _Top]) -> Iterator[list[Tensor]]:
    """Show each probed layer's weight gradient, some outputs at a time, as the backward pass comes by.

    Yields a list that fills, in the forward pass, with the outputs that the backward pass has to reach.
    """
    handles = []
    first: list[Tensor] = []
    for name, found in top.items():
        layer = task.model.get_submodule(name.rpartition(".")[0])
        handles.append(layer.register_forward_hook(_Probe(name, found, first)))
    try:
        yield first
    finally:
        for handle in handles:
            handle.remove()


class _Probe:
    """Forward hook of a convolution or linear layer: its input and output gradient give the weight gradient.

    first: outputs that no other probed layer's output leads to. They are where gradients begin, so that every later
    output needs one, without any weight gradient and whatever the model's input is, token indices too.
    """

    def __init__(self, name: str, found: _Top, first: list[Tensor]) -> None:
        self.name = name
        self.found = found
        self.first = first
        self.called = False

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        check_form(layer)
        if self.called:
            raise UserError(f"gradients of pruned weights of {self.name!r} cannot be searched: it is used twice")
        self.called = True
        x = inputs[0].detach()
        if not output.requires_grad:
            self.first.append(output.detach().requires_grad_())
            output = self.first[-1].clone()  # a leaf may not be written to, as by nn.ReLU(inplace=True)
        output.register_hook(lambda dy: self._search(layer, x, dy))  # type: ignore[no-untyped-call]
        return output

    def _search(self, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        row = weight[0].numel()
        step = max(1, SEARCH_PIECE // row)
        if isinstance(layer, nn.Linear):  # positions of a sequence are examples
            x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            for start in range(0, len(weight), step):
                self.found.show(start * row, (dy[:, start : start + step].t() @ x).reshape(-1))
            return
        assert isinstance(layer, Convolution)
        x, padding = _padded(layer, x)
        for part in _pieces(len(weight), layer.groups, step):
            self.found.show(part.start * row, _convolution_gradient(layer, x, dy, part, padding).reshape(-1))


def check_form(layer: nn.Module) -> None:
    """Raise UserError for a layer whose weight gradient does not follow from its input and its output's gradient."""
    if type(layer).forward not in _FORMS:
        what = f"a {type(layer).__name__}, which computes in its own way"
        raise UserError(f"gradients of pruned weights of {what}, cannot be searched")


def _padded(layer: Convolution, x: Tensor) -> tuple[Tensor, Sequence[int]]:
    """The input as a convolution padded with zeros sees it, and that padding."""
    if not isinstance(layer.padding, str) and layer.padding_mode == "zeros":
        return x, layer.padding
    sides: list[int] = []  # from the last dimension to the first, before and after
    for i in reversed(range(len(layer.kernel_size))):
        if isinstance(layer.padding, str):
            both = layer.dilation[i] * (layer.kernel_size[i] - 1) if layer.padding == "same" else 0
            sides += [both // 2, both - both // 2]
        else:
            sides += [layer.padding[i]] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return nn.functional.pad(x, sides, mode), [0] * len(layer.kernel_size)


def _pieces(outputs: int, groups: int, step: int) -> Iterator[slice]:
    """The outputs in pieces of at most ``step``, each of some whole groups or within one."""
    per = outputs // groups
    whole = step // per * per
    for first in range(0, outputs, whole or per):
        last = min(outputs, first + (whole or per))
        for start in range(first, last, step):
            yield slice(start, min(last, start + step))


def _convolution_gradient(layer: Convolution, x: Tensor, dy: Tensor, part: slice, padding: Sequence[int]) -> Tensor:
    """The gradient of the weights that make some outputs, a piece of :func:`_pieces`: (outputs, *row)."""
    per, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    groups = slice(part.start // per, -(-part.stop // per))
    x, dy = x[:, groups.start * inputs : groups.stop * inputs], dy[:, part]
    shape = (dy.shape[1], *layer.weight.shape[1:])
    grad: Callable[..., Tensor] = _GRADIENTS[len(layer.kernel_size)]
    return grad(x, shape, dy, layer.stride, padding, layer.dilation, groups.stop - groups.start)
