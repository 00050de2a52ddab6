"""The wire form of positions: ceil(log2 n) bits each, or a bitmap of n bits, whichever is smaller; lossless."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsparse.errors import UserError


def packed_bytes(size: int, kept: int) -> int:
    """Bytes of ``kept`` packed positions in [0, size). Both sides know these two, so the form needs no word."""
    return min(_index_bytes(size, kept), -(-size // 8))


def pack_positions(kept: Tensor, size: int) -> Tensor:
    """(kept,) ascending positions in [0, size) -> (packed_bytes,) uint8, the highest bit first."""
    positions = kept.numpy().astype(np.int64)
    if _as_bitmap(size, len(positions)):
        marks = np.zeros(size, bool)
        marks[positions] = True
        return torch.from_numpy(np.packbits(marks))
    shifts = np.arange(_bits(size) - 1, -1, -1)
    bits = (positions[:, None] >> shifts) & 1  # (kept, bits)
    return torch.from_numpy(np.packbits(bits.astype(bool)))


def unpack_positions(packed: Tensor, size: int, kept: int) -> Tensor:
    """The (kept,) int32 ascending positions that ``pack_positions`` packed.

    Raises UserError if they are not ``kept`` ascending positions in [0, size) without repeats.
    """
    wanted = packed_bytes(size, kept)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (wanted,):
        raise UserError(f"{kept} packed positions have {wanted} bytes, got {tuple(packed.shape)} {packed.dtype}")
    if _as_bitmap(size, kept):
        found = np.flatnonzero(np.unpackbits(packed.numpy(), count=size))
    else:
        bits = _bits(size)
        ones = np.unpackbits(packed.numpy(), count=kept * bits).reshape(kept, bits)
        found = ones.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
    if len(found) != kept or (kept and int(found[-1]) >= size) or bool((np.diff(found) <= 0).any()):
        raise UserError(f"packed positions are not {kept} ascending ones in [0, {size}) without repeats")
    return torch.from_numpy(found.astype(np.int32))


def _bits(size: int) -> int:
    """Bits of one position."""
    return max(0, size - 1).bit_length()


def _index_bytes(size: int, kept: int) -> int:
    return -(-kept * _bits(size) // 8)


def _as_bitmap(size: int, kept: int) -> bool:
    return -(-size // 8) < _index_bytes(size, kept)
