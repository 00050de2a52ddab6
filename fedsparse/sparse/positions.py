"""The wire form of positions: ceil(log2 n) bits each, or a bitmap of n bits, whichever is smaller; lossless."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsparse.errors import UserError

_PIECE = 1 << 12  # bytes of a bitmap, or indices, that are unpacked at once; a multiple of 8


def packed_bytes(size: int, kept: int) -> int:
    """Bytes of ``kept`` packed positions in [0, size). Both sides know these two, so the form needs no word."""
    return min(_index_bytes(size, kept), -(-size // 8))


def pack_positions(kept: Tensor, size: int) -> Tensor:
    """(kept,) ascending positions in [0, size) -> (packed_bytes,) uint8, the highest bit first."""
    positions = kept.numpy()
    packed = np.empty(packed_bytes(size, len(positions)), np.uint8)
    write = _write_bitmap if _as_bitmap(size, len(positions)) else _write_indices
    write(positions, packed, size)
    return torch.from_numpy(packed)


def unpack_positions(packed: Tensor, size: int, kept: int) -> Tensor:
    """The (kept,) int32 ascending positions that ``pack_positions`` packed.

    Raises UserError if they are not ``kept`` ascending positions in [0, size) without repeats.
    """
    wanted = packed_bytes(size, kept)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (wanted,):
        raise UserError(f"{kept} packed positions have {wanted} bytes, got {tuple(packed.shape)} {packed.dtype}")
    found = np.empty(kept, np.int32)
    fits = _read_bitmap(packed.numpy(), found) if _as_bitmap(size, kept) else _read_indices(packed.numpy(), found, size)
    if not fits or (kept and int(found[-1]) >= size) or bool((found[1:] <= found[:-1]).any()):
        raise UserError(f"packed positions are not {kept} ascending ones in [0, {size}) without repeats")
    return torch.from_numpy(found)


def _write_bitmap(positions: NDArray[np.int32], out: NDArray[np.uint8], size: int) -> None:
    """In pieces: a bit takes a byte before it is packed."""
    for start in range(0, len(out), _PIECE):
        first, marks = 8 * start, np.zeros(min(8 * _PIECE, size - 8 * start), bool)
        lo = np.searchsorted(positions, np.int32(first))  # of another type all positions would be converted
        hi = np.searchsorted(positions, np.int32(first + len(marks) - 1), side="right")
        marks[positions[lo:hi] - first] = True
        out[start : start + _PIECE] = np.packbits(marks)


def _write_indices(positions: NDArray[np.int32], out: NDArray[np.uint8], size: int) -> None:
    """In pieces, for the same reason."""
    bits = _bits(size)
    for start in range(0, len(positions), _PIECE):
        part = positions[start : start + _PIECE].astype(">i4")
        ones = np.unpackbits(part.view(np.uint8).reshape(-1, 4), axis=1)[:, 32 - bits :]
        packed = np.packbits(ones)
        at = start * bits // 8  # a piece is whole bytes
        out[at : at + len(packed)] = packed


def _read_bitmap(packed: NDArray[np.uint8], out: NDArray[np.int32]) -> bool:
    """Write the marked positions to ``out``; False if there are more or fewer. In pieces: a bit would take a byte."""
    done = 0
    for start in range(0, len(packed), _PIECE):
        at = np.flatnonzero(np.unpackbits(packed[start : start + _PIECE]))
        if done + len(at) > len(out):
            return False
        out[done : done + len(at)] = at + 8 * start
        done += len(at)
    return done == len(out)


def _read_indices(packed: NDArray[np.uint8], out: NDArray[np.int32], size: int) -> bool:
    """Write the positions to ``out``; False if one is no int32. In pieces, for the same reason."""
    bits = _bits(size)
    for start in range(0, len(out), _PIECE):
        n = min(_PIECE, len(out) - start)
        ones = np.zeros((n, 32), np.uint8)
        part = packed[start * bits // 8 :]  # a piece is whole bytes
        ones[:, 32 - bits :] = np.unpackbits(part[: -(-n * bits // 8)], count=n * bits).reshape(n, bits)
        out[start : start + n] = np.packbits(ones, axis=1).view(">i4").ravel()
    return True


def _bits(size: int) -> int:
    """Bits of one position."""
    return max(0, size - 1).bit_length()


def _index_bytes(size: int, kept: int) -> int:
    return -(-kept * _bits(size) // 8)


def _as_bitmap(size: int, kept: int) -> bool:
    return -(-size // 8) < _index_bytes(size, kept)
