"""The wire form of a sparse update: a bitmap, and the values of what it marks in one flat buffer.

The unit is a *tile*: the weights of a layer between one group of its outputs and one group of its inputs. A batch
touches the tiles whose both sides are kept; over batches with different masks the touched tiles are no rectangle, and
whole rows would carry columns that no batch has trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fedsparse.errors import UserError
from fedsparse.sparse.blocks import Bools, ChannelPlan, CutLayer
from fedsparse.sparse.channels import Region, layer_regions, units_of


def pack_bits(mask: Bools) -> Tensor:
    """(n,) bool -> (ceil(n / 8),) uint8, the first entry in the highest bit."""
    return torch.from_numpy(np.packbits(mask))


def unpack_bits(bitmap: Tensor, n: int) -> Bools:
    """The (n,) bool mask of a bitmap. Raises UserError if its length does not fit."""
    if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != (-(-n // 8),):
        raise UserError(f"a bitmap of {n} bits has {-(-n // 8)} bytes, got {tuple(bitmap.shape)} {bitmap.dtype}")
    return np.unpackbits(bitmap.numpy(), count=n).astype(bool)


def tile_shapes(plan: ChannelPlan) -> list[tuple[int, int]]:
    """Per layer, groups of outputs and groups of inputs."""
    return [(layer.groups, len(layer.in_bounds) - 1) for layer in plan.layers]


def tile_count(plan: ChannelPlan) -> int:
    """Bits of the bitmap."""
    return sum(outs * ins for outs, ins in tile_shapes(plan))


def tiles(plan: ChannelPlan, kept: Bools) -> Bools:
    """The tiles that a kept set of blocks touches: (tiles,) bool, layer by layer, row-major."""
    groups = plan.groups_kept(kept)
    return np.concatenate(
        [np.outer(mine, before).ravel() for mine, before in zip(groups, (np.ones(1, bool), *groups[:-1]), strict=True)]
    )


def tiles_by_layer(plan: ChannelPlan, values: np.ndarray) -> Iterator[tuple[CutLayer, np.ndarray]]:
    """Each layer with its part of a (tiles,) array as (groups of outputs, groups of inputs)."""
    start = 0
    for layer, (outs, ins) in zip(plan.layers, tile_shapes(plan), strict=True):
        yield layer, values[start : start + outs * ins].reshape(outs, ins)
        start += outs * ins


def touched_regions(plan: ChannelPlan, touched: Bools) -> list[Region]:
    """The touched parts of all tensors. Rows with the same touched columns form one region.

    Vectors follow column group 0, which is kept whenever the row is.
    """
    regions = [Region(name, None, None) for name in plan.uncut]
    for layer, marks in tiles_by_layer(plan, touched):
        patterns = np.unique(marks[marks.any(1)], axis=0)
        regions += [next(layer_regions(layer, (marks == pattern).all(1), pattern)) for pattern in patterns]
        rows = units_of(marks[:, 0], layer.group_sizes)
        regions += [Region(name, rows, None) for name in layer.vectors]
    return regions


def pack(params: Mapping[str, Tensor], plan: ChannelPlan, touched: Bools) -> Tensor:
    """The touched values in one flat float32 tensor."""
    parts = [region.take(params[region.name]).reshape(-1) for region in touched_regions(plan, touched)]
    return torch.cat(parts)


def unpack(
    values: Tensor, plan: ChannelPlan, touched: Bools, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[Region, Tensor]]:
    """The regions of a flat buffer with views of their values. Raises UserError if the length does not fit."""
    regions = touched_regions(plan, touched)
    parts = [region.shape(shapes[region.name]) for region in regions]
    ends = list(accumulate(int(np.prod(shape)) for shape in parts))
    if values.ndim != 1 or len(values) != ends[-1]:
        raise UserError(f"an update of {tuple(values.shape)} values does not fit its bitmap, which marks {ends[-1]}")
    for region, shape, start, end in zip(regions, parts, [0, *ends[:-1]], ends, strict=True):
        yield region, values[start:end].view(shape)
