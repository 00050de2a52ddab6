"""Packet: the only thing that crosses the wire, and its encoding as a Flower ``RecordDict``.

On the wire a packet is three records: one ArrayRecord with one flat float32 Array (a legal .npy of constant header
length, so that any Flower code can read it), one ConfigRecord (kind, layout, words, and every tensor that is not
float32, as raw bytes: indices and bitmaps), one MetricRecord (numbers). One flat buffer is 6 times cheaper to encode
than one Array a tensor, and decodes without a copy.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsparse.errors import UserError, shown

if TYPE_CHECKING:
    from flwr.app import RecordDict

Scalar = int | float | str
Shapes = tuple[tuple[str, str, tuple[int, ...]], ...]

HEADER = 128  # bytes of the .npy header
_FLOAT = "float32"
_DTYPES = {
    name: getattr(torch, name) for name in ("uint8", "int8", "int16", "int32", "int64", "bool", "float64", "float16")
}
_KNOWN = frozenset(_DTYPES.values())
_STYPE, _RESERVED = "numpy.ndarray", "__metadata__"
_LAYOUT, _CACHED = 1 << 17, 1 << 14  # characters of a layout: at most, and at most to be remembered
_TENSORS, _DIMENSIONS, _ELEMENTS = 1 << 12, 16, 1 << 48
_KIND, _NAME, _SCALARS, _BITS = 64, 256, 1 << 10, 63  # characters; entries; bits of a whole number in Flower's messages
_RECORDS = ("arrays", "config", "metrics")
_HASH, _CHUNK = 64, 5 * 1024 * 1024  # Flower: characters of an object id; bytes of an array chunk

with warnings.catch_warnings():  # torch says once per process that bytes are read-only; packets are, by contract
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(4), dtype=torch.float32)


@dataclass(frozen=True)
class Packet:
    """A message of a method, in either direction. Nobody writes into its tensors.

    kind: what the receiver is to do ("train", "evaluate", ...) or what a reply is ("update", ...).
    tensors: by name; float32 ones travel in the flat buffer, all others as bytes. scalars: numbers and words.
    """

    kind: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded payload: all objects that Flower sends for it, without the message's metadata."""
        return self.bytes_with("")

    def bytes_with(self, run: str) -> int:
        """The same when ``run`` rides along."""
        raw = [(name, t) for name, t in self.tensors.items() if t.dtype != torch.float32]
        words = {f"t.{name}": t.nbytes for name, t in raw}
        words |= {f"s.{name}": len(v.encode()) for name, v in self.scalars.items() if isinstance(v, str)}
        fixed = _fixed_bytes(self.kind, run, shapes_of(self.tensors))
        config = fixed[1] + sum(_field(_key(name) + _field(_field(size))) for name, size in words.items())
        return (
            fixed[0] + _object("ConfigRecord", 0, config) + _object("MetricRecord", 0, _items(_numbers(self.scalars)))
        )


def encode(packet: Packet, *, run: str = "") -> RecordDict:
    """The packet as Flower records. run: words about the run that ride along (hyper-parameters, seed, round)."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    shapes = shapes_of(packet.tensors)
    floats = [packet.tensors[name].detach().reshape(-1) for name, dtype, _ in shapes if dtype == _FLOAT]
    count = sum(len(t) for t in floats)
    arrays = ArrayRecord({"flat": Array(dtype=_FLOAT, shape=(count,), stype=_STYPE, data=b"")})
    arrays["flat"].data = b"".join([_npy_header(count), *(t.contiguous().cpu().numpy().data for t in floats)])
    return RecordDict(
        {
            "arrays": arrays,
            "config": ConfigRecord(_config(packet, shapes, run)),
            "metrics": MetricRecord(_numbers(packet.scalars)),  # type: ignore[arg-type]
        }
    )


def decode(records: RecordDict, *, alone: bool = False) -> Packet:
    """The packet that ``encode`` wrote; its float32 tensors are views of the payload, which must not be written to.

    alone: the records hold nothing else. Raises UserError for records that are no packet, whose sizes do not fit their
    layout, or that have a :func:`flaw`. Nothing is unpickled, and of what a layout announces nothing is allocated.
    """
    lent = getattr(records, "packet", None)
    if isinstance(lent, Packet):
        return lent
    try:
        config: Mapping[str, Any] = records["config"]
        array: Any = records["arrays"]["flat"]
        data = memoryview(array.data).cast("B")
        metrics: Mapping[str, Any] = records["metrics"]
        kind, layout = config["kind"], config["layout"]
        if not isinstance(kind, str) or not isinstance(layout, str):
            raise TypeError("its kind and its layout must be words")
        if bad := _flaw_of_name(kind, _KIND):
            raise ValueError(bad)
        form = array.dtype, tuple(array.shape), array.stype
        shapes = _parse(layout) if len(layout) <= _CACHED else _read_layout(layout)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"not a fedsparse packet: {shown(error)} (records: {shown(sorted(records))})") from error
    count = sum(_count(shape) for _, dtype, shape in shapes if dtype == _FLOAT)
    fits = len(data) == HEADER + 4 * count and bytes(data[:HEADER]) == _npy_header(count)
    if not fits or form != (_FLOAT, (count,), _STYPE):
        raise UserError(f"packet {kind!r}: {len(data)} bytes of floats do not fit its layout of {count} values")
    raw = {n: _raw(kind, n, config.get(f"t.{n}"), _DTYPES[d], s) for n, d, s in shapes if d != _FLOAT}
    words = {k[2:]: v for k, v in config.items() if k.startswith("s.")}
    if twice := words.keys() & metrics.keys():
        raise UserError(f"packet {kind!r}: scalar {shown(min(twice))} is there twice")
    packet = Packet(kind, take_floats(data[HEADER:], shapes, raw), {**words, **metrics})
    if bad := flaw(packet) or (_more(records, packet) if alone else ""):
        raise UserError(f"packet {kind!r}: {bad}")
    return packet


def flaw(packet: Packet) -> str:
    """What of a packet could not be sent, or "": its kind and names, the types of its tensors and scalars."""
    if bad := _flaw_of_name(packet.kind, _KIND):
        return bad
    if len(packet.tensors) > _TENSORS or len(packet.scalars) > _SCALARS:
        return f"it has {len(packet.tensors)} tensors and {len(packet.scalars)} scalars, too many"
    for name, tensor in packet.tensors.items():
        if bad := _flaw_of_name(name, _NAME):
            return bad
        bad = "has a name that safetensors files keep for themselves" if name == _RESERVED else _flaw_of_tensor(tensor)
        if bad:
            return f"tensor {shown(name)} {bad}"
    for name, value in packet.scalars.items():
        if bad := _flaw_of_name(name, _NAME):
            return bad
        if bad := _flaw_of_scalar(value):
            return f"scalar {shown(name)} {bad}"
    return ""


def _flaw_of_name(name: object, most: int) -> str:
    good = isinstance(name, str) and len(name) <= most and _is_text(name)
    return "" if good else f"the name {shown(name)} is no text of at most {most} characters"


def _flaw_of_tensor(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return "is no tensor"
    if tensor.dtype != torch.float32 and tensor.dtype not in _KNOWN:
        return f"has dtype {str(tensor.dtype)[6:]}; a packet carries {_FLOAT}, {', '.join(_DTYPES)}"
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"is {tensor.layout} on {tensor.device}; a packet carries dense tensors in main memory"
    return ""


def _flaw_of_scalar(value: object) -> str:
    if isinstance(value, str):
        return "" if _is_text(value) else "is no text"
    if isinstance(value, int):
        return "" if -(1 << _BITS) <= value < 1 << _BITS else f"is {shown(value)}, at most 64 fit"
    return "" if isinstance(value, float) else f"is a {type(value).__name__}; a packet carries numbers and words"


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8, which halves of surrogate pairs cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _more(records: RecordDict, packet: Packet) -> str:
    """What the records hold beside the packet, or ""."""
    if other := set(records) - set(_RECORDS):
        return f"record {shown(min(other))} is not wanted"
    arrays: Mapping[str, Any] = records["arrays"]
    if len(arrays) > 1:
        return f"it has {len(arrays)} arrays, one is wanted"
    known = {"kind", "layout", "run", *(f"t.{n}" for n, t in packet.tensors.items() if t.dtype != torch.float32)}
    known |= {f"s.{name}" for name, value in packet.scalars.items() if isinstance(value, str)}
    words: Mapping[str, Any] = records["config"]
    if odd := words.keys() - known or {k for k in ("run",) if not isinstance(words.get(k, ""), str)}:
        return f"entry {shown(min(odd))} is not wanted"
    return ""


def run_words(records: RecordDict) -> str:
    """The ``run`` text that rode along with a packet."""
    if hasattr(records, "run_words"):
        return str(records.run_words)
    config: Mapping[str, Any] = records["config"]
    return str(config.get("run", ""))


def wire_bytes(records: RecordDict) -> int:
    """Bytes of any RecordDict of Flower as sent: the sum over its objects, without the message's metadata."""
    lent = getattr(records, "packet", None)
    if isinstance(lent, Packet):
        return lent.bytes_with(run_words(records))
    arrays: Any = records.get("arrays", ())
    if set(records) != {"arrays", "config", "metrics"} or list(arrays) != ["flat"]:
        return _deflated_bytes(records)
    config: Any = records["config"]
    metrics: Any = records["metrics"]
    return _tree_bytes(len(arrays["flat"].data), arrays["flat"].shape[0], config, metrics)


def put_floats(packet: Packet, buffer: memoryview) -> None:
    """Write all float32 tensors of the packet, one after the other, into a buffer of 4 bytes a value."""
    floats = [t.detach().reshape(-1) for t in packet.tensors.values() if t.dtype == torch.float32]
    if len(buffer):  # tensors may be empty
        torch.cat(floats, out=torch.frombuffer(buffer, dtype=torch.float32))


def take_floats(buffer: memoryview, shapes: Shapes, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that ``put_floats`` wrote, as views of the buffer, and the ``others``, in the order of ``shapes``."""
    flat = torch.frombuffer(buffer, dtype=torch.float32) if len(buffer) else torch.empty(0)
    tensors, start = {}, 0
    for name, dtype, shape in shapes:
        if dtype == _FLOAT:
            count = _count(shape)
            tensors[name] = flat[start : start + count].view(shape)
            start += count
        else:
            tensors[name] = others[name]
    return tensors


def same(a: Packet, b: Packet) -> bool:
    """Whether two packets are equal, bit for bit."""
    return (
        a.kind == b.kind
        and dict(a.scalars) == dict(b.scalars)
        and list(a.tensors) == list(b.tensors)
        and all(
            x.dtype == y.dtype and torch.equal(x, y)
            for x, y in zip(a.tensors.values(), b.tensors.values(), strict=True)
        )
    )


# --- the flat buffer ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _npy_header(count: int) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count},), }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(HEADER - 11).encode() + b"\n"


def _raw(kind: str, name: str, data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = _count(shape)
    if not isinstance(data, bytes) or len(data) != count * dtype.itemsize:
        raise UserError(
            f"packet {kind!r}: tensor {shown(name)} has not the {count} values of {dtype} that its layout names"
        )
    # torch takes any other byte for true here and for a count there
    if dtype == torch.bool and count and int(torch.frombuffer(data, dtype=torch.uint8).max()) > 1:
        raise UserError(f"packet {kind!r}: tensor {shown(name)} has bytes that are neither true nor false")
    return (torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)).view(shape)


# --- the layout --------------------------------------------------------------------------------------------------


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    return tuple((name, str(t.dtype)[6:], tuple(t.shape)) for name, t in tensors.items())


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


@lru_cache(maxsize=1024)
def _layout(shapes: Shapes) -> str:
    for name, dtype, _ in shapes:
        if name == _RESERVED:
            raise UserError(f"tensor {name!r} has a name that safetensors files keep for themselves")
        if dtype != _FLOAT and dtype not in _DTYPES:
            raise UserError(f"tensor {name!r} has dtype {dtype}; a packet carries {_FLOAT}, {', '.join(_DTYPES)}")
    text = json.dumps(shapes, separators=(",", ":"))
    if len(text) > _LAYOUT or len(shapes) > _TENSORS:
        raise UserError(f"a packet carries {_TENSORS} tensors and a layout of {_LAYOUT} characters, not {len(shapes)}")
    return text


def _read_layout(layout: str) -> Shapes:
    """The layout in a text from outside. Raises ValueError for anything but distinct names with types and shapes."""
    if len(layout) > _LAYOUT:
        raise ValueError(f"a layout of {len(layout)} characters, at most {_LAYOUT}")
    try:
        entries = json.loads(layout)
    except RecursionError as error:
        raise ValueError("a layout of too many brackets") from error
    if not isinstance(entries, list) or len(entries) > _TENSORS:
        raise ValueError(f"a layout that is no list of at most {_TENSORS} tensors")
    shapes = tuple(_read_entry(entry) for entry in entries)
    if len({name for name, _, _ in shapes}) != len(shapes):
        raise ValueError("a layout with one name twice")
    return shapes


_parse = lru_cache(maxsize=64)(_read_layout)  # few and short: they come from outside


def _read_entry(entry: Any) -> tuple[str, str, tuple[int, ...]]:
    if not isinstance(entry, list) or len(entry) != 3:
        raise ValueError(f"a layout with {shown(entry)} for a tensor")
    name, dtype, shape = entry
    if not isinstance(dtype, str) or (dtype != _FLOAT and dtype not in _DTYPES):
        raise ValueError(f"a layout with dtype {shown(dtype)}")
    if not isinstance(name, str) or not isinstance(shape, list) or len(shape) > _DIMENSIONS:
        raise ValueError(f"a layout with {shown(entry)} for a tensor")
    if any(type(size) is not int or not 0 <= size <= _ELEMENTS for size in shape):
        raise ValueError(f"a layout with shape {shown(shape)}")
    if math.prod(max(size, 1) for size in shape) > _ELEMENTS:
        raise ValueError(f"a layout with shape {shown(shape)}")
    return name, dtype, tuple(shape)


def _config(packet: Packet, shapes: Shapes, run: str) -> dict[str, Any]:
    config: dict[str, Any] = {"kind": packet.kind, "layout": _layout(shapes)}
    if run:
        config["run"] = run
    for name, dtype, _ in shapes:
        if dtype != _FLOAT:
            config[f"t.{name}"] = packet.tensors[name].detach().contiguous().cpu().numpy().tobytes()
    for name, value in packet.scalars.items():
        if isinstance(value, str):
            config[f"s.{name}"] = value
    return config


def _numbers(scalars: Mapping[str, Scalar]) -> dict[str, int | float]:
    return {name: int(v) if isinstance(v, bool) else v for name, v in scalars.items() if not isinstance(v, str)}


# --- the size on the wire ----------------------------------------------------------------------------------------
# Flower sends each record, array and chunk as an object: "<type> <child ids> <length>\0<body>".


def _tree_bytes(size: int, count: int, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> int:
    """Of a packet's records: an array of ``count`` floats in ``size`` bytes, the words and the numbers."""
    words = _object("ConfigRecord", 0, _items(config)) + _object("MetricRecord", 0, _items(metrics))
    return _array_bytes(size, count) + words


@lru_cache(maxsize=256)
def _fixed_bytes(kind: str, run: str, shapes: Shapes) -> tuple[int, int]:
    """Bytes of the arrays' objects, and of the items that every packet's words have."""
    count = sum(_count(shape) for _, dtype, shape in shapes if dtype == _FLOAT)
    words = {"kind": kind, "layout": _layout(shapes)} | ({"run": run} if run else {})
    return _array_bytes(HEADER + 4 * count, count), _items(words)


@lru_cache(maxsize=256)
def _array_bytes(size: int, count: int) -> int:
    chunks = -(-size // _CHUNK)
    body = {"dtype": _FLOAT, "shape": [count], "stype": _STYPE, "arraychunk_ids": list(range(chunks))}
    return (
        _object("RecordDict", 3, _refs("arrays", "config", "metrics"))
        + _object("ArrayRecord", 1, _refs("flat"))
        + _object("Array", chunks, len(json.dumps(body)))
        + sum(_object("ArrayChunk", 0, min(_CHUNK, size - i * _CHUNK)) for i in range(chunks))
    )


def _refs(*names: str) -> int:
    return len(json.dumps(dict.fromkeys(names, "0" * _HASH)))


def _object(kind: str, children: int, body: int) -> int:
    return len(kind) + max(0, children * (_HASH + 1) - 1) + len(str(body)) + 3 + body


def _items(values: Mapping[str, Any]) -> int:
    """Bytes of a protobuf message of (key, value) items."""
    total = 0
    for key, value in values.items():
        total += _field(_key(key) + _field(_value(value)))
    return total


def _key(key: str) -> int:
    """Protobuf leaves an empty key out."""
    return _field(len(key.encode())) if key else 0


def _value(value: Any) -> int:
    if isinstance(value, bool):
        return 2
    if isinstance(value, float):
        return 9
    if isinstance(value, int):
        return 1 + _varint(value << 1 if value >= 0 else (-value << 1) - 1)
    if isinstance(value, str | bytes):
        return _field(len(value.encode() if isinstance(value, str) else value))
    raise UserError(f"a packet carries numbers, words and bytes, not {type(value).__name__}")


def _field(length: int) -> int:
    return 1 + _varint(length) + length


def _varint(value: int) -> int:
    return max(1, (value.bit_length() + 6) // 7)


def _deflated_bytes(records: RecordDict) -> int:
    """The same for records that are no packet (a stock Flower app's), by really building every object."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return sum(len(obj.deflate()) for obj in get_all_nested_objects(records).values())
