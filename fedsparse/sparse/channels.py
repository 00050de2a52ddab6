"""Parts of tensors by whole channels or hidden units: where they lie, how they are taken and put back.

The outputs of a kept group are scaled by its gate, or its rows and biases where these are fewer, which is the same
(pFedGate, arXiv 2305.02776, eq. 6, with the gates of a block tied), so no mask-sized tensor exists. Dropped rows and
columns are in no kernel, no gradient and no optimiser step: an untouched weight keeps its bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from fedsparse.sparse.cut import Bools

Params = dict[str, Tensor]
_ALL = ((0, 0, -1),)  # the one stretch of a dimension that is not cut


@dataclass(frozen=True)
class Runs:
    """Entries along a dimension, as stretches: (first, end) of each in the whole, and where each begins in the part.

    Groups are contiguous, so there are few; block by block a part is copied at the speed of memory, which indexing by
    entry, along columns above all, is far from.
    """

    spans: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    length: int

    @property
    def pairs(self) -> Iterator[tuple[int, int, int]]:
        """(first in the whole, first in the part, length) of each."""
        for (first, end), start in zip(self.spans, self.starts, strict=True):
            yield first, start, end - first


def group_runs(kept: Sequence[bool], bounds: Sequence[int], repeats: int, span: int) -> Runs | None:
    """The stretches of the entries of kept groups of units; None when all of them are.

    bounds: (groups + 1,) first unit of each group, and the end. repeats, span: see
    :class:`fedsparse.sparse.spaces.Axis`.
    """
    if all(kept):
        return None
    units = bounds[-1]
    places = [(first, end) for keep, first, end in zip(kept, bounds[:-1], bounds[1:], strict=True) if keep]
    spans: list[tuple[int, int]] = []
    for start in range(0, repeats * units, units):
        for first, end in places:
            if spans and spans[-1][1] == span * (start + first):
                spans[-1] = (spans[-1][0], span * (start + end))
            else:
                spans.append((span * (start + first), span * (start + end)))
    ends = tuple(accumulate(end - first for first, end in spans))
    return Runs(tuple(spans), (0, *ends[:-1]) if ends else (), ends[-1] if ends else 0)


@dataclass(frozen=True, eq=False)
class ChannelRegion:
    """Part of a tensor along its first two dimensions; None = all entries of one."""

    name: str
    rows: Runs | None
    cols: Runs | None

    @property
    def whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.rows is None and self.cols is None

    def take(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """The part: in ``out``, else as a copy, or the tensor itself where the region is all of it."""
        if self.whole:
            return tensor if out is None else out.copy_(tensor)
        part = tensor.new_empty(self.shape(tensor.shape)) if out is None else out
        for inside, outside in self._pieces(part, tensor):
            inside[...] = outside
        return part

    def put_(self, tensor: Tensor, part: Tensor) -> None:
        """Write the part back in place."""
        if self.whole:
            if part.data_ptr() != tensor.data_ptr():
                tensor.copy_(part)
            return
        for inside, outside in self._pieces(part, tensor):
            outside[...] = inside

    def _pieces(self, part: Tensor, whole: Tensor) -> Iterator[tuple[Any, Any]]:
        """The contiguous blocks of the part, each with its place in the whole.

        In main memory as NumPy views, which are made and copied in half the time of PyTorch's.
        """
        inside, outside = _view(part), _view(whole)
        for a, b, n in _ALL if self.rows is None else self.rows.pairs:
            for c, d, m in _ALL if self.cols is None else self.cols.pairs:
                yield inside[_cut(b, n, d, m)], outside[_cut(a, n, c, m)]

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The part's shape, given that of the tensor."""
        shape = list(whole)
        for dim, runs in enumerate((self.rows, self.cols)):
            if runs is not None:
                shape[dim] = runs.length
        return tuple(shape)


def _view(tensor: Tensor) -> Any:
    plain = tensor.detach()
    return plain.numpy() if plain.device.type == "cpu" else plain


def _cut(row: int, rows: int, col: int, cols: int) -> tuple[slice, ...]:
    """The index of a block: so many rows and columns from there on, -1 = all of them."""
    first = slice(None) if rows < 0 else slice(row, row + rows)
    return (first,) if cols < 0 else (first, slice(col, col + cols))


@dataclass(frozen=True, eq=False)
class Selection:
    """A kept set of blocks as indices, one region a tensor. ``gate_index``: the block of each entry that is scaled.

    ``gate_sizes``: how many of them belong to each of the cut's scaled axes.
    """

    kept: Bools
    regions: tuple[ChannelRegion, ...]
    gate_index: Tensor
    gate_sizes: tuple[int, ...]


def gather(params: Mapping[str, Tensor], regions: Iterable[ChannelRegion]) -> Params:
    """The compact tensors, in the order of ``params``. Tensors that are kept whole are the same objects, not copies."""
    compact = {name: t.detach() for name, t in params.items()}
    for region in regions:
        if region.name in compact:
            compact[region.name] = region.take(compact[region.name])
    return compact


def scatter_(params: Mapping[str, Tensor], regions: Iterable[ChannelRegion], compact: Mapping[str, Tensor]) -> None:
    """Write compact tensors back into ``params`` in place; all else keeps its bits."""
    for region in regions:
        if region.name in compact:
            region.put_(params[region.name], compact[region.name].detach())
