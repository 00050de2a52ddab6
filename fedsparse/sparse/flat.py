"""The flat cut: every trainable tensor, flattened row-major, in consecutive chunks, each of them one gated block.

Source: pFedGate (Chen et al., ICML 2023, arXiv 2305.02776), section 5.2.2, and its official code (yxdyc/pFedGate at
b8cfa15). It needs nothing of a model but the names of its parameters, so it cuts any. But chunks end inside of filters
and rows, so that kernels cannot skip what is dropped: weights are multiplied by their gates and computed dense. It
saves bytes, not time.
Differs from the official code: one node of autograd's graph a tensor, not one a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsparse.cost import shares_of, trace, weight_keys
from fedsparse.errors import UserError, unknown
from fedsparse.sparse.codec import pack
from fedsparse.sparse.cut import COSTS, Bools, Cut, Floats, Ints, Working
from fedsparse.steps import clip_, step_

if TYPE_CHECKING:
    from fedsparse.task import Task

RULES = ("paper", "official")
_BYTES = 4  # of a float32
_EPS = 1e-9  # shares like 0.29 are a little too small as floats


@dataclass(frozen=True)
class Chunked:
    """A trainable tensor with its chunks. sizes: elements of each; first_block: number of the first one's block."""

    name: str
    sizes: tuple[int, ...]
    first_block: int

    @property
    def blocks(self) -> slice:
        return slice(self.first_block, self.first_block + len(self.sizes))

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """The first element of each chunk, then the number of elements."""
        return (0, *accumulate(self.sizes))

    @cached_property
    def runs(self) -> tuple[tuple[slice, slice, int], ...]:
        """Consecutive chunks of one size: their numbers, their elements, the size. There are at most three."""
        found, chunk, start = [], 0, 0
        for size, same in groupby(self.sizes):
            count = len(list(same))
            found.append((slice(chunk, chunk + count), slice(start, start + count * size), size))
            chunk, start = chunk + count, start + count * size
        return tuple(found)

    def spans(self, marks: Bools) -> list[tuple[int, int]]:
        """(first element, end) of each stretch of adjacent marked chunks."""
        edges = np.flatnonzero(np.diff(marks, prepend=False, append=False)).tolist()
        return [(self.bounds[a], self.bounds[b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True)
class FlatRegion:
    """The elements [start, end) of a flattened tensor; all of it where ``end`` is 0."""

    name: str
    start: int = 0
    end: int = 0

    def take(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """The part: in ``out``, else a view where the tensor is contiguous; the tensor where the part is all of it."""
        part = tensor.reshape(-1)[self.start : self.end] if self.end else tensor
        return part if out is None else out.copy_(part)

    def put_(self, tensor: Tensor, part: Tensor) -> None:
        """Write the part back in place."""
        if not self.end:
            if tensor.data_ptr() != part.data_ptr():
                tensor.copy_(part)
            return
        flat = tensor.reshape(-1)  # a copy where the tensor is not contiguous
        own = flat[self.start : self.end]
        if own.data_ptr() != part.data_ptr():
            own.copy_(part)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The part's shape, given that of the tensor."""
        return (self.end - self.start,) if self.end else tuple(whole)


@dataclass(frozen=True, eq=False)
class FlatCut(Cut):
    """A part is a block. Made by :func:`flat_cut`.

    tensors: in the model's order. linear: (L,) the blocks of tensors that an ``nn.Linear`` holds. macs: (L,)
    multiply-adds per example of each block. other_macs: those of no block. buffers: names of the float buffers, which
    are always there and always sent; buffer_count: their scalars. layers: by layer of the cost model, the tensors that
    are its weights, as indices.
    """

    blocks: int
    parts: int
    forced: Bools
    tensors: tuple[Chunked, ...]
    linear: Bools
    macs: Ints
    other_macs: int
    buffers: tuple[str, ...]
    buffer_count: int
    layers: Mapping[str, tuple[int, ...]]

    @cached_property
    def sizes(self) -> Ints:
        """(L,) elements of each block."""
        return np.array([size for tensor in self.tensors for size in tensor.sizes], np.int64)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """(L,) the official code's names: ``parameter.sub0`` and so on."""
        return tuple(f"{tensor.name}.sub{j}" for tensor in self.tensors for j in range(len(tensor.sizes)))

    def weights(self, cost: str) -> Ints:
        if cost not in COSTS:
            raise unknown("cost", cost, COSTS)
        if cost == "multiply_adds":
            return self.macs
        return self.sizes * (_BYTES if cost == "bytes" else 1)

    def spent(self, kept: Bools, cost: str = "parameters") -> int:
        blocks = int(self.weights(cost)[kept].sum())
        if cost == "multiply_adds":
            return blocks + self.other_macs
        return blocks + (_BYTES * self.buffer_count + math.ceil(self.blocks / 8) if cost == "bytes" else 0)

    def added(self, kept: Bools, cost: str = "parameters") -> Floats:
        return self.weights(cost).astype(np.float64)

    def densities(self, kept: Bools) -> Mapping[str, tuple[float, float]]:
        """Outputs are never smaller: dropped biases and norm terms do not show here, but in :meth:`spent`."""
        sizes = [sum(tensor.sizes) for tensor in self.tensors]
        left = [int(self.sizes[tensor.blocks][kept[tensor.blocks]].sum()) for tensor in self.tensors]
        return {
            name: (sum(left[i] for i in mine) / sum(sizes[i] for i in mine), 1.0) for name, mine in self.layers.items()
        }

    def touched(self, kept: Bools) -> Bools:
        return kept.copy()

    def blocks_of(self, touched: Bools) -> Bools:
        return touched.copy()

    def regions(self, touched: Bools) -> Sequence[FlatRegion]:
        """Adjacent chunks of a tensor form one region; the buffers come last."""
        regions = []
        for tensor in self.tensors:
            marks = touched[tensor.blocks]
            spans = [(0, 0)] if marks.all() else tensor.spans(marks)
            regions += [FlatRegion(tensor.name, start, end) for start, end in spans]
        return [*regions, *map(FlatRegion, self.buffers)]

    def spread(self, weights: Floats, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        out = {}
        for tensor in self.tensors:
            mine = weights[tensor.blocks]
            if (mine == mine[0]).all():
                out[tensor.name] = torch.full((), float(mine[0]), dtype=torch.float64)
            else:
                out[tensor.name] = torch.from_numpy(np.repeat(mine, tensor.sizes)).view(shapes[tensor.name])
        return out

    def working(self, task: Task, params: Mapping[str, Tensor], *, train: bool = True) -> FlatModel:
        return FlatModel(self, task, params, train=train)

    def working_kept(self, task: Task, values: Tensor, kept: Bools) -> FlatModel:
        """Refused: a dense layer needs its whole weights."""
        raise UserError('download = "kept" needs mode = "structural"')


# ------------------------------------------------------------------------------------------------------- the cut


def flat_cut(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    tokens: bool = False,
    rule: str = "paper",
    blocks_per_tensor: int = 5,
    least: float = 0.1,
) -> FlatCut:
    """Cut every trainable tensor of a model, each once if it is tied.

    rule "paper": the first chunk holds the share ``least`` of a tensor's elements, rounded down, but one at least; the
    rest falls evenly into blocks_per_tensor - 1 chunks, of which the last may be smaller. "official": as
    :func:`official_sizes`. The first chunk of each tensor is forced, except in the official cut with
    blocks_per_tensor = 1, where none is. input_shape, tokens: one example, for the multiply-adds.
    Raises UserError for options that are not allowed, a model without trainable tensors, an input that does not fit.
    """
    _check(rule, blocks_per_tensor, least)
    found = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    if not found:
        raise UserError("a model without trainable parameters cannot be cut")
    tensors: list[Chunked] = []
    block = 0
    for name, p in found.items():
        n = p.numel()
        sizes = official_sizes(n, blocks_per_tensor) if rule == "official" else paper_sizes(n, blocks_per_tensor, least)
        tensors.append(Chunked(name, sizes, block))
        block += len(sizes)
    forced = np.zeros(block, bool)
    if blocks_per_tensor > 1:
        forced[[tensor.first_block for tensor in tensors]] = True
    linear = [isinstance(model.get_submodule(t.name.rpartition(".")[0]), nn.Linear) for t in tensors]
    macs, other, layers = _costs(model, input_shape, tokens, tensors)
    floats = {name: b.numel() for name, b in model.named_buffers() if b.is_floating_point()}
    return FlatCut(
        blocks=block,
        parts=block,
        forced=forced,
        tensors=tuple(tensors),
        linear=np.repeat(linear, [len(t.sizes) for t in tensors]),
        macs=macs,
        other_macs=other,
        buffers=tuple(floats),
        buffer_count=sum(floats.values()),
        layers=layers,
    )


def _check(rule: str, blocks_per_tensor: int, least: float) -> None:
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    smallest = 2 if rule == "paper" else 1
    if blocks_per_tensor < smallest:
        raise UserError(f"blocks_per_tensor must be at least {smallest} with rule {rule!r}, got {blocks_per_tensor}")
    if not 0 < least <= 1:
        raise UserError(f"least must be in (0, 1], got {least}")


def paper_sizes(n: int, blocks: int, least: float) -> tuple[int, ...]:
    """Chunks of ``n`` elements: floor(n * least), then ``blocks`` - 1 of near-equal size, fewer of a small tensor."""
    first = min(n, max(1, math.floor(n * least + _EPS)))
    return (first, *_even(n - first, blocks - 1))


def official_sizes(n: int, blocks: int) -> tuple[int, ...]:
    """Chunks of ``n`` elements of size ceil(n / k), the last smaller; k = ``blocks``, or n if that is less."""
    return _even(n, blocks)


def _even(n: int, blocks: int) -> tuple[int, ...]:
    if n == 0:
        return ()
    size = math.ceil(n / min(n, blocks))
    count = math.ceil(n / size)
    return (size,) * (count - 1) + (n - (count - 1) * size,)


def _costs(
    model: nn.Module, input_shape: Sequence[int], tokens: bool, tensors: Sequence[Chunked]
) -> tuple[Ints, int, dict[str, tuple[int, ...]]]:
    """(L,) multiply-adds of each block, those of none, and the weights of each layer.

    A layer's multiply-adds are shared out over the elements of its weights; a tied weight has those of all its layers.
    """
    named = dict(model.named_parameters())
    number = {id(named[tensor.name]): i for i, tensor in enumerate(tensors)}
    macs = np.zeros(sum(len(tensor.sizes) for tensor in tensors), np.int64)
    other, layers = 0, {}
    for layer in trace(model, input_shape, tokens=tokens):
        module = model.get_submodule(layer.name)
        weights = [getattr(module, key) for key in weight_keys(module)]
        mine = [number[id(w)] for w in weights if id(w) in number]
        frozen = sum(w.numel() for w in weights if id(w) not in number)
        if not mine:
            other += layer.macs
            continue
        layers[layer.name] = tuple(mine)
        shares = shares_of(layer.macs, [*(size for i in mine for size in tensors[i].sizes), frozen])
        macs[np.concatenate([np.arange(macs.size)[tensors[i].blocks] for i in mine])] += np.array(shares[:-1])
        other += shares[-1]
    return macs, other, layers


# ----------------------------------------------------------------------------------------------------- the model


class FlatModel(Working):
    """A model whose weights are multiplied by their blocks' gates.

    The gates of dropped blocks must be 0; they may carry a gradient (the paper's full straight-through). ``use`` says
    which blocks a step may move.

    lazy: momentum and weight decay move kept elements only; else, as in the official code, all of them, so that all is
    touched. velocity: the momentum of each leaf, empty before the first step; may be set, and is then updated in place.
    With ``train`` the model owns a copy of ``params``; else it reads them, ``leaves`` is empty, and it is for
    evaluation mode only (batch norm would write its statistics).
    """

    def __init__(
        self, cut: FlatCut, task: Task, params: Mapping[str, Tensor], *, train: bool = True, lazy: bool = True
    ) -> None:
        self.params = {name: _copy(t) if train else t.detach() for name, t in task.placed(params).items()}
        self.touched = np.zeros(cut.parts, bool)
        self.lazy = lazy
        self.velocity: list[Tensor] = []
        self._cut = cut
        self._task = task
        self._weights = [self.params[tensor.name].detach().requires_grad_(train) for tensor in cut.tensors]
        self.leaves = self._weights if train else []
        self._kept: Bools | None = None
        self._pieces: list[_Pieces] = []

    def use(self, kept: Bools) -> None:
        if self._kept is not None and np.array_equal(kept, self._kept):
            return
        self._kept = kept.copy()
        self._pieces = [_Pieces(tensor, kept[tensor.blocks]) for tensor in self._cut.tensors]

    def forward(self, gates: Tensor, x: Tensor) -> Tensor:
        tensors = self._cut.tensors
        own = torch.split(gates.to(x.device), [len(tensor.sizes) for tensor in tensors])
        gated = {t.name: _Gated.apply(w, g, t) for t, w, g in zip(tensors, self._weights, own, strict=True)}  # type: ignore[no-untyped-call]
        with self._task.bound({**self.params, **gated}) as network:
            logits: Tensor = network(x)
        return logits

    @torch.no_grad()
    def step(self, grads: tuple[Tensor, ...], *, lr: float, momentum: float, weight_decay: float, clip: float) -> None:
        assert self._kept is not None, "step before use"
        clip_(grads, clip)
        if momentum and not self.velocity:  # x + -0.0 has the bits of x, also where x is -0.0
            self.velocity = [torch.full_like(leaf, -0.0) for leaf in self.leaves]
        own = [self._parts(tensors) for tensors in (self.leaves, grads, self.velocity if momentum else ())]
        if own[0]:
            step_(*own, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.touched |= self._kept if self.lazy else True

    def _parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of what a step may move."""
        if not self.lazy or not tensors:
            return list(tensors)
        return [part for own, tensor in zip(self._pieces, tensors, strict=True) for part in own.of(tensor.contiguous())]

    def flush(self) -> None:
        """Nothing to do: the leaves share their memory with ``params``."""

    def values(self) -> Tensor:
        return pack(self.params, self._cut, self.touched).cpu()


def _copy(tensor: Tensor) -> Tensor:
    """A copy in row-major order, which chunks follow."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


class _Pieces:
    """How a tensor splits into stretches of kept chunks and gaps."""

    def __init__(self, tensor: Chunked, kept: Bools) -> None:
        self.whole = bool(kept.all())
        self.first = 0 if kept[0] else 1  # the first stretch that is kept
        edges = np.flatnonzero(np.diff(kept)) + 1
        ends = [tensor.bounds[i] for i in (0, *edges.tolist(), len(kept))]
        self.lengths = np.diff(ends).tolist()

    def of(self, tensor: Tensor) -> Sequence[Tensor]:
        """Views of the kept stretches; the tensor itself if all is kept."""
        return (tensor,) if self.whole else torch.split(tensor.view(-1), self.lengths)[self.first :: 2]


class _Gated(torch.autograd.Function):
    """weight * mask, where the mask repeats each chunk's gate over the chunk; no tensor of the mask's size exists."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gates: Tensor, tensor: Chunked) -> Tensor:
        ctx.save_for_backward(weight, gates)
        ctx.tensor = tensor
        return _scaled(weight, gates, tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, gates = ctx.saved_tensors
        need_weight, need_gates, _ = ctx.needs_input_grad
        d_weight = _scaled(grad, gates, ctx.tensor) if need_weight else None
        d_gates = _sums(grad, weight, ctx.tensor) if need_gates else None
        return d_weight, d_gates, None


def _scaled(values: Tensor, gates: Tensor, tensor: Chunked) -> Tensor:
    """Each chunk of ``values`` times its gate, (chunks,)."""
    out = values.new_empty(values.shape)
    flat, result = values.reshape(-1), out.view(-1)
    for chunks, elements, size in tensor.runs:
        torch.mul(flat[elements].view(-1, size), gates[chunks].view(-1, 1), out=result[elements].view(-1, size))
    return out


def _sums(a: Tensor, b: Tensor, tensor: Chunked) -> Tensor:
    """(chunks,) the inner product of ``a`` and ``b`` over each chunk: the gates' gradient."""
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    parts = [(flat_a[e].view(-1, size) * flat_b[e].view(-1, size)).sum(1) for _, e, size in tensor.runs]
    return torch.cat(parts)
