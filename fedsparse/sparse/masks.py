"""Element masks as positions, and tensors that hold the kept weights only.

A mask names weights: name -> (kept,) int32, the ascending flat positions of the kept weights; a tensor that is not
named is whole. *Compact* parameters hold, under a masked name, the (kept,) values in that order: what is not kept is
not stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsparse.errors import UserError

Mask = Mapping[str, Tensor]


def check_mask(mask: Mask, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError for a name that is unknown, and for positions that do not ascend, repeat or lie outside."""
    for name, kept in mask.items():
        if name not in shapes:
            raise UserError(f"the mask names {name!r}, which the model does not have")
        size = int(np.prod(shapes[name]))
        if kept.dtype != torch.int32 or kept.ndim != 1:
            raise UserError(f"mask {name!r} must be a flat int32 tensor, got {kept.dtype} of shape {tuple(kept.shape)}")
        inside = not len(kept) or (int(kept[0]) >= 0 and int(kept[-1]) < size)
        if not (inside and bool((kept[1:] > kept[:-1]).all())):
            raise UserError(f"the positions of mask {name!r} must ascend without repeats in [0, {size})")


def compact(params: Mapping[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """The kept values of masked tensors, (kept,), and the others as they are (not copied)."""
    return {name: t.reshape(-1)[mask[name].long()] if name in mask else t for name, t in params.items()}


def whole(params: Mapping[str, Tensor], mask: Mask, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of compact parameters in their shapes, zero where nothing is kept; the others as they are."""
    return {name: spread(t, mask[name], shapes[name]) if name in mask else t for name, t in params.items()}


def spread(values: Tensor, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The (kept,) values at their positions in a tensor of zeros; gradients flow to the values."""
    return values.new_zeros(int(np.prod(shape))).index_put((kept.long(),), values).view(shape)


def carry(values: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Values (weights, momentum) moved from the positions ``old`` to ``new``: zero where a position is new."""
    out = values.new_zeros(len(new))
    if len(old) and len(new):
        at = torch.searchsorted(old, new).clamp_(max=len(old) - 1)  # (new,)
        same = old[at] == new
        out[same] = values[at[same]]
    return out
