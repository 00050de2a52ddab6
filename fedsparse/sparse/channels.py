"""Compact computation: the kept rows and columns of a cut model gathered into smaller dense layers, and back.

The outputs of a kept group are scaled by its gate, which equals scaling its rows and biases (pFedGate, arXiv
2305.02776, eq. 6, with the gates of a block tied), so no mask-sized tensor exists. Dropped rows and columns are in no
kernel, no gradient and no optimiser step: an untouched weight keeps its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedsparse.sparse.blocks import Bools, ChannelPlan, CutLayer

Params = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Region:
    """Part of a tensor: index tensors along its first two dimensions; None = all of them."""

    name: str
    rows: Tensor | None
    cols: Tensor | None

    def take(self, tensor: Tensor) -> Tensor:
        """The part, as a copy; the tensor itself where the region is all of it."""
        if self.rows is not None:
            tensor = tensor.index_select(0, self.rows)
        return tensor if self.cols is None else tensor.index_select(1, self.cols)

    def put_(self, tensor: Tensor, part: Tensor) -> None:
        """Write the part back in place."""
        if self.rows is None and self.cols is None:
            if part.data_ptr() != tensor.data_ptr():
                tensor.copy_(part)
        elif self.cols is None or self.rows is None:
            dim, index = (0, self.rows) if self.cols is None else (1, self.cols)
            tensor.index_copy_(dim, index, part)  # type: ignore[arg-type]
        else:
            rows = tensor.index_select(0, self.rows)
            tensor.index_copy_(0, self.rows, rows.index_copy_(1, self.cols, part))

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The part's shape, given that of the tensor."""
        rows = whole[0] if self.rows is None else len(self.rows)
        if len(whole) == 1:
            return (rows,)
        return (rows, whole[1] if self.cols is None else len(self.cols), *whole[2:])


@dataclass(frozen=True, eq=False)
class Selection:
    """A kept set of blocks as indices. ``gate_index``: (kept hidden units,) the block of each, layer after layer.

    ``gate_sizes``: how many of them belong to each hidden layer.
    """

    kept: Bools
    regions: tuple[Region, ...]
    gate_index: Tensor
    gate_sizes: tuple[int, ...]


def select(plan: ChannelPlan, kept: Bools) -> Selection:
    """The indices of a kept set, (L,) bool."""
    groups = plan.groups_kept(kept)
    before = np.ones(1, bool)
    regions = [Region(name, None, None) for name in plan.uncut]
    blocks: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for layer, mine in zip(plan.layers, groups, strict=True):
        regions += layer_regions(layer, mine, before)
        before = mine
        if layer.first_block >= 0:
            members = layer.first_block + np.flatnonzero(mine)
            blocks.append(np.repeat(members, np.array(layer.group_sizes)[mine]))
    index = torch.from_numpy(np.concatenate(blocks))
    return Selection(kept.copy(), tuple(regions), index, tuple(len(b) for b in blocks))


def layer_regions(layer: CutLayer, groups: Bools, inputs: Bools) -> Iterator[Region]:
    """The weight's and the vectors' part for some output groups and some groups of inputs."""
    rows = units_of(groups, layer.group_sizes)
    cols = units_of(inputs, np.diff(layer.in_bounds) * layer.span)
    yield Region(layer.weight, rows, cols)
    for name in layer.vectors:
        yield Region(name, rows, None)


def units_of(groups: Bools, sizes: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor | None:
    """The indices of the groups' members; None when all groups are in."""
    return None if groups.all() else torch.from_numpy(np.flatnonzero(np.repeat(groups, sizes)))


def gather(params: Mapping[str, Tensor], selection: Selection) -> Params:
    """The compact tensors, in the order of ``params``. Tensors that are kept whole are the same objects, not copies."""
    compact = {name: t.detach() for name, t in params.items()}
    for region in selection.regions:
        if region.name in compact:
            compact[region.name] = region.take(compact[region.name])
    return compact


def scatter_(params: Mapping[str, Tensor], selection: Selection, compact: Mapping[str, Tensor]) -> None:
    """Write compact tensors back into ``params`` in place; all else keeps its bits."""
    for region in selection.regions:
        if region.name in compact:
            region.put_(params[region.name], compact[region.name].detach())


def gated_forward(model: nn.Module, plan: ChannelPlan, selection: Selection, gates: Tensor, x: Tensor) -> Tensor:
    """Logits of the chain whose compact tensors are bound to ``model``: x (n, ...) -> (n, classes).

    gates: (L,) one scalar a block; those of kept blocks multiply their group's outputs, after the norm that follows
    the layer and before the activation. With all blocks kept and gates of 1 the bits are those of the plain model.
    """
    parts = torch.split(gates.index_select(0, selection.gate_index), list(selection.gate_sizes))
    scale = {layer.norm or layer.name: part for layer, part in zip(plan.hidden, parts, strict=True)}
    for name, module in model._modules.items():
        x = module(x)  # type: ignore[misc]
        if name in scale:
            x = x * scale[name].view(-1, *[1] * (x.ndim - 2))
    return x
