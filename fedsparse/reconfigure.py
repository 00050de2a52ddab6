"""PruneFL's shared parts: squared gradients in a reply and their mean, a reconfiguration, and the initial pruning.

Source: Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", IEEE TNNLS 2022, arXiv
1909.12326; the official code (jiangyuang/PruneFL, d3f38c4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, islice, repeat

import torch
from torch import Tensor

from fedsparse import cost
from fedsparse.aggregation import Aggregation
from fedsparse.errors import UserError, shown
from fedsparse.globalmask import folded, prunable, unfolded
from fedsparse.masked import SquaredGradients, score_masked
from fedsparse.packet import Packet, Scalar
from fedsparse.replies import LARGEST_NUMBER, form, is_number
from fedsparse.sgd import Fit, batches
from fedsparse.sparse import SEARCH_PIECE
from fedsparse.sparse.importance import largest_of_all, most_per_time, most_squared, untouchable
from fedsparse.sparse.masks import Mask, carry
from fedsparse.task import Params, Split, Task

_SQUARE, _REST = "square/", "square_rest"  # before a weight's name; the scalar of all that is never pruned

# --- the decision ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What a reconfiguration goes by.

    times: name -> time that one weight costs; fixed: time of a round without these weights, in the same unit;
    budget: kept weights at most; per_layer: keep each layer's number instead of choosing the size.
    """

    times: Mapping[str, float]
    fixed: float
    budget: int
    per_layer: bool = False

    def changed(
        self, task: Task, params: Params, mask: Mask, squares: Mapping[str, Tensor], rest: float, share: float
    ) -> tuple[Params, dict[str, Tensor]]:
        """Compact parameters and mask with the weights that matter most, new ones at 0.

        squares: name -> (size,) mean squared gradients; rest: the sum of those of all that is never pruned. share: of
        each layer's kept weights, the smallest ones, that may go.
        """
        values, kept = unfolded(task, params, mask)
        stay = untouchable(values, kept, share)
        if self.per_layer:
            new = most_squared(stay, squares, {name: len(at) for name, at in kept.items()})
        else:
            new = most_per_time(stay, squares, self.times, fixed=self.fixed, rest=rest, budget=self.budget)
        return folded(task, params, {n: carry(values[n], kept[n], new[n]) for n in new}, new)

    def cut(self, task: Task, params: Params, mask: Mask) -> tuple[Params, dict[str, Tensor]]:
        """The same within the budget: over all layers together the weights of largest magnitude."""
        values, kept = unfolded(task, params, mask)
        new = largest_of_all(values, kept, self.budget)
        return folded(task, params, {n: carry(values[n], kept[n], new[n]) for n in new}, new)

    @staticmethod
    def read(task: Task, packet: Packet) -> Rule:
        """The rule that chooses the size, from a packet."""
        times = dict(zip(prunable(task).sizes, packet.tensors["times"].tolist(), strict=True))
        return Rule(times, float(packet.scalars["fixed"]), int(packet.scalars["budget"]))


# --- squared gradients on the wire -----------------------------------------------------------------------------------


def square_tensors(squares: SquaredGradients) -> tuple[dict[str, Tensor], dict[str, Scalar]]:
    """The tensors and scalars of a reply that carry them: one dense float32 tensor a weight that may be pruned."""
    means, rest = squares.means()
    return {_SQUARE + name: t for name, t in means.items()}, {_REST: rest}


def square_form(sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors of the names, shapes and types that they have in a reply."""
    return {_SQUARE + name: form(size) for name, size in sizes.items()}


def square_complaint(reply: Packet, sizes: Mapping[str, int]) -> str:
    """What is wrong with those in a reply of the right form, or ""."""
    rest = reply.scalars.get(_REST)
    if not is_number(rest, 0, LARGEST_NUMBER):
        return f"the reply's scalar {_REST!r} must be a number of at least 0, got {shown(rest)}"
    wrong = (name for name in sizes if bool((reply.tensors[_SQUARE + name] < 0).any()))
    return next((f"squared gradients of {name!r}: one is below 0" for name in wrong), "")


class SquareMean:
    """sum n * g^2 / sum n over the replies, in float64 and in the order in which they come; or as ``rule`` has it."""

    def __init__(self, sizes: Mapping[str, int], rule: Aggregation) -> None:
        self._form = square_form(sizes)
        self._rule = rule
        self._mean = rule.whole()
        self._rest: list[float] = []
        self._weights: list[float] = []

    def add(self, reply: Packet, n: float) -> None:
        """Count a reply with weight ``n``; keeps no view of it."""
        self._mean.add({name: reply.tensors[name] for name in self._form}, n)
        self._rest.append(float(reply.scalars[_REST]))
        self._weights.append(n)

    def result(self) -> tuple[dict[str, Tensor], float] | None:
        """Name -> (size,) means, and that of the rest; None if nobody was counted."""
        if not self._weights:
            return None
        means = self._mean.result(self._form)
        rest = self._rule.number(self._rest, self._weights)
        return {name.removeprefix(_SQUARE): t for name, t in means.items()}, rest


def square_flops(task: Task, mask: Mask, samples: int) -> float:
    """Flops of dense weight gradients where the kept ones are computed anyway: together (F_d + 2 F_s) n."""
    model = prunable(task)
    names = [layer.name for layer in model.weights.values()]
    return cost.search_flops(model.layers, samples, names, model.cut(mask), "paper")


def square_bytes(task: Task) -> int:
    """Bytes that a client holds for them: a float32 for every weight, and the piece of a gradient it looks at."""
    sizes = prunable(task).sizes.values()
    return cost.BYTES * (sum(sizes) + min(SEARCH_PIECE, max(sizes, default=0)))


# --- before round 1 --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Initial:
    """How the initial pruning goes: ``iterations`` steps at most, a reconfiguration every ``every`` steps.

    It begins when the accuracy on the training data is at least ``above_chance`` times that of guessing, and ends
    within the budget after ``patience`` changes of the size, one after the other, of at most ``tolerance``.
    """

    iterations: int
    every: int
    above_chance: float
    tolerance: float
    patience: int


@dataclass(frozen=True)
class Pruned:
    """What came of it. flops: of all of it; macs: forward, per sample, on average; fit: its steps, samples and loss."""

    params: Params
    mask: dict[str, Tensor]
    fit: Fit
    flops: float
    macs: float


Train = Callable[..., Fit]


def initial_pruning(
    task: Task,
    params: Params,
    data: Split,
    rule: Rule,
    how: Initial,
    share: float,
    batch_size: int,
    rng: torch.Generator,
    train: Train,
) -> Pruned:
    """Train the dense model ``params`` on ``data`` and prune it on the way (section IV of the paper).

    share: as in :meth:`Rule.changed`. train: ``(params, order=, mask=, squares=)`` to a Fit. What is still above the
    rule's budget at the end is cut by magnitude.
    """
    if not len(data):
        raise UserError("the client has no training examples for the initial pruning")
    mask: dict[str, Tensor] = {}
    model = prunable(task)
    layers = model.layers
    endless = chain.from_iterable(batches(len(data), batch_size, 1, rng) for _ in repeat(None))
    flops = macs = losses = 0.0
    steps = samples = calm = 0
    begun = False
    while steps < how.iterations and calm < how.patience:
        squares = SquaredGradients(model.sizes)
        part = list(islice(endless, min(how.every, how.iterations - steps)))
        fit = train(params, order=part, mask=mask, squares=squares)
        params, steps, samples = fit.params, steps + fit.steps, samples + fit.samples
        losses += fit.loss * fit.steps
        flops += cost.train_flops(layers, fit.samples, model.cut(mask)) + square_flops(task, mask, fit.samples)
        macs += fit.samples * cost.forward_macs(layers, model.cut(mask))
        if not begun:
            flops += 2 * len(data) * cost.forward_macs(layers, model.cut(mask))
            begun = score_masked(task, params, mask, data).correct >= how.above_chance * len(data) / task.classes
        if begun:
            before = _size(task, mask)
            params, mask = rule.changed(task, params, mask, *squares.means(), share)
            after = _size(task, mask)
            small = abs(after / max(1, before) - 1) <= how.tolerance and after <= rule.budget
            calm = calm + 1 if small else 0
    params, mask = rule.cut(task, params, mask)
    return Pruned(params, mask, Fit(params, steps, samples, losses / max(1, steps)), flops, macs / max(1, samples))


def _size(task: Task, mask: Mask) -> int:
    """Kept weights of those that may be pruned."""
    return sum(len(mask[name]) if name in mask else size for name, size in prunable(task).sizes.items())
