"""The wire form of a sparse update: a bitmap of a model's parts, and the values of the marked ones in one buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from fedsparse.errors import UserError
from fedsparse.sparse.cut import Bools, Cut, Region


def pack_bits(mask: Bools) -> Tensor:
    """(n,) bool -> (ceil(n / 8),) uint8, the first entry in the highest bit."""
    return torch.from_numpy(np.packbits(mask))


def unpack_bits(bitmap: Tensor, n: int) -> Bools:
    """The (n,) bool mask of a bitmap. Raises UserError if its length does not fit or it marks more than n."""
    if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != (-(-n // 8),):
        raise UserError(f"a bitmap of {n} bits has {-(-n // 8)} bytes, got {tuple(bitmap.shape)} {bitmap.dtype}")
    if n % 8 and int(bitmap[-1]) & ((1 << (8 - n % 8)) - 1):
        raise UserError(f"a bitmap of {n} bits marks one beyond them")
    return np.unpackbits(bitmap.numpy(), count=n).view(bool)


def pack(params: Mapping[str, Tensor], cut: Cut, touched: Bools) -> Tensor:
    """The touched values in one flat float32 tensor; ``touched``: (parts,)."""
    regions = cut.regions(touched)
    if not regions:
        return torch.empty(0)
    shapes = [region.shape(params[region.name].shape) for region in regions]
    kind = reduce(torch.promote_types, (params[region.name].dtype for region in regions))
    device = params[regions[0].name].device
    values = torch.empty(sum(map(math.prod, shapes)), dtype=kind, device=device)
    for region, part in zip(regions, _parts(values, shapes), strict=True):
        region.take(params[region.name], part)
    return values


def unpack(
    values: Tensor, cut: Cut, touched: Bools, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[Region, Tensor]]:
    """The regions of a flat buffer with views of their values; ``shapes``: of the whole tensors.

    Raises UserError if the length does not fit.
    """
    regions = cut.regions(touched)
    parts = [region.shape(shapes[region.name]) for region in regions]
    length = sum(map(math.prod, parts))
    if values.ndim != 1 or len(values) != length:
        raise UserError(f"an update of {tuple(values.shape)} values does not fit its bitmap, which marks {length}")
    yield from zip(regions, _parts(values, parts), strict=True)


def _parts(values: Tensor, shapes: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """Views of these shapes, one behind the other."""
    start = 0
    for shape in shapes:
        end = start + math.prod(shape)
        yield values[start:end].view(shape)
        start = end
