"""Memory that forked processes share, and RecordDicts laid out in it.

An Arena is an anonymous file mapped by every process that inherited it, or that opens it by its path. Array data lie
in the arena; what travels through a pipe is only where. Everything else of a record (words, numbers) travels as it is.
"""

from __future__ import annotations

import errno
import itertools
import math
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsparse.lent import LentRecords
from fedsparse.packet import Packet, encode, put_floats, run_words, shapes_of, take_floats

_ALIGN = 64  # bytes: a cache line, and the alignment of torch's own tensors
_GROW = 1 << 20
_NAME = "fedsparse"

Layout = list[tuple[str, str, Any]]  # ("packet", run words, packet) or (record's name, its kind, its content) each


class Space(Protocol):
    """Where array data lie."""

    def place(self, size: int) -> tuple[int, memoryview]:
        """Take ``size`` bytes, aligned: where they are, and the writable bytes."""

    def view(self, start: int, size: int) -> memoryview:
        """Bytes that were placed there."""


class Buffer:
    """Bytes of this process, or received from another, to be read where they are."""

    def __init__(self, data: memoryview | None = None) -> None:
        self._data = memoryview(bytearray()) if data is None else data
        self._end = 0

    def place(self, size: int) -> tuple[int, memoryview]:
        start = self._end
        self._end = start + -(-size // _ALIGN) * _ALIGN
        if self._end > len(self._data):
            larger = bytearray(max(self._end, 2 * len(self._data)))
            larger[:start] = self._data[:start]
            self._data = memoryview(larger)
        return start, self.view(start, size)

    def view(self, start: int, size: int) -> memoryview:
        return self._data[start : start + size]

    @property
    def data(self) -> memoryview:
        """All that was placed."""
        return self._data[: self._end]

    def reset(self) -> None:
        """What was placed may be overwritten. The memory stays: new one costs as much as what is written to it."""
        self._end = 0


class Arena:
    """Shared memory that grows at its end. One process writes (``place``), the others read (``view``)."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create(_NAME)
        else:
            with tempfile.TemporaryFile() as file:
                self._fd = os.dup(file.fileno())
        self._map: mmap.mmap | None = None
        self._old: list[mmap.mmap] = []  # still in use by views; freed when those are
        self._end = 0

    def reset(self) -> None:
        """Start again at the beginning: what was taken before may be overwritten."""
        self._end = 0
        self._old.clear()

    @property
    def used(self) -> int:
        """Bytes taken since the last reset."""
        return self._end

    def place(self, size: int) -> tuple[int, memoryview]:
        """Take ``size`` bytes, aligned: where they are, and the writable bytes."""
        start = self._end
        self._end = start + -(-size // _ALIGN) * _ALIGN
        length = os.fstat(self._fd).st_size
        if self._end > length:
            os.ftruncate(self._fd, max(self._end, 2 * length, _GROW))
        return start, self.view(start, size)

    def view(self, start: int, size: int) -> memoryview:
        """Bytes that the writer placed there."""
        if self._map is None or start + size > len(self._map):
            if self._map is not None:
                self._old.append(self._map)
            self._map = mmap.mmap(self._fd, os.fstat(self._fd).st_size) if os.fstat(self._fd).st_size else None
        if self._map is None:
            return memoryview(bytearray(size))
        return memoryview(self._map)[start : start + size]

    @property
    def path(self) -> str:
        """The file's name for other processes of this user on this machine, while this process lives (Linux)."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Give the file back; maps go when nobody views them."""
        os.close(self._fd)


def attached(path: str) -> memoryview:
    """All of an arena's bytes, by its :attr:`Arena.path`. Raises FileNotFoundError where there is no such arena, among
    others because its process has ended, and other kinds of OSError if it cannot be mapped."""
    link = Path(path)
    if not str(link.readlink()).startswith(f"/memfd:{_NAME}"):  # another machine's path may name anything here
        raise FileNotFoundError(errno.ENOENT, "no shared memory", path)
    with link.open("r+b") as file:
        if not os.fstat(file.fileno()).st_size:
            raise FileNotFoundError(errno.ENOENT, "no shared memory", path)
        return memoryview(mmap.mmap(file.fileno(), 0))


def lay(records: RecordDict, arena: Space) -> Layout:
    """Records as a plain list, with their floats in the arena."""
    packet = getattr(records, "packet", None)
    if isinstance(packet, Packet):
        return [("packet", run_words(records), _lay_packet(packet, arena))]
    return [(name, *_lay_record(record, arena)) for name, record in records.items()]


def _lay_packet(packet: Packet, arena: Space) -> tuple[Any, ...]:
    shapes = shapes_of(packet.tensors)
    start, view = arena.place(sum(t.nbytes for t in packet.tensors.values() if t.dtype == torch.float32))
    put_floats(packet, view)
    others = {name: _put_raw(t, arena) for name, t in packet.tensors.items() if t.dtype != torch.float32}
    return packet.kind, shapes, start, len(view), others, dict(packet.scalars)


def _put_raw(tensor: Tensor, arena: Space) -> int:
    """Where the tensor's bytes are."""
    start, view = arena.place(tensor.nbytes)
    if tensor.numel():
        view[:] = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
    return start


def _raw(arena: Space, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor again, in memory of its own: indices and bitmaps are small, and likely to be kept."""
    if not (size := math.prod(shape) * dtype.itemsize):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(arena.view(start, size), dtype=dtype).view(shape).clone()


def _lay_record(record: Any, arena: Space) -> tuple[str, Any]:
    if isinstance(record, ArrayRecord):
        return "array", [(key, a.dtype, a.shape, a.stype, _put(a, arena)) for key, a in record.items()]
    return ("config" if isinstance(record, ConfigRecord) else "metric"), dict(record)


def _put(array: Array, arena: Space) -> tuple[int, int]:
    start, view = arena.place(len(array.data))
    view[:] = array.data
    return start, len(view)


def pick(layout: Layout, arena: Space, *, copy: bool) -> RecordDict:
    """The records again; with ``copy`` their data are ``bytes`` of their own, else views of the arena."""
    if layout and layout[0][0] == "packet":
        _, words, (kind, shapes, start, size, others, scalars) = layout[0]
        tensors = {n: _raw(arena, others[n], getattr(torch, dtype), shape) for n, dtype, shape in shapes if n in others}
        packet = Packet(kind, take_floats(arena.view(start, size), shapes, tensors), scalars)
        return encode(packet, run=words) if copy else LentRecords(packet, words)
    return RecordDict({name: _record(kind, value, arena, copy) for name, kind, value in layout})


def _record(kind: str, value: Any, arena: Space, copy: bool) -> ArrayRecord | ConfigRecord | MetricRecord:
    if kind == "config":
        return ConfigRecord(value)
    if kind == "metric":
        return MetricRecord(value)
    record = ArrayRecord()
    for key, dtype, shape, stype, (start, size) in value:
        view = arena.view(start, size)
        record[key] = Array(dtype=dtype, shape=shape, stype=stype, data=b"")
        record[key].data = bytes(view) if copy else view  # type: ignore[assignment]
    return record


def copied(records: RecordDict) -> RecordDict:
    """Records of their own whose array data are ``bytes``: safe to keep and to change."""
    out = RecordDict()
    for name, record in records.items():
        if not isinstance(record, ArrayRecord):
            out[name] = type(record)(dict(record))  # type: ignore[arg-type]
            continue
        fresh = ArrayRecord()
        for key, a in record.items():
            fresh[key] = Array(dtype=a.dtype, shape=a.shape, stype=a.stype, data=bytes(a.data))
        out[name] = fresh
    return out


def chunks(items: list[Any], count: int) -> list[list[Any]]:
    """``items`` in order, in at most ``count`` runs whose lengths differ by one at most, the longer ones first."""
    count = max(1, min(count, len(items)))
    short, longer = divmod(len(items), count)
    bounds = [i * short + min(i, longer) for i in range(count + 1)]
    return [items[a:b] for a, b in itertools.pairwise(bounds) if b > a]
