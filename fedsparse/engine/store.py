"""Client memories: a bounded part in RAM, the rest on disk as immutable safetensors files, one a client and version.

A version's file is written once, under a name of its own, and never changed: ``ID // 1000/ID.VERSION.safetensors``. A
checkpoint is therefore a list of names. Versions count the changes of all memories of a run.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedsparse.errors import UserError
from fedsparse.packet import Packet, decode, encode

_FORMAT, _HEAD = "fedsparse client memory 1", "fedsparse"
_CLIENTS_A_FOLDER = 1000
_BYTES = "base64"  # the name of what stands for bytes in the words of a stock record
_OURS = re.compile(r"\d+\.\d+\.safetensors(\.part)?")


@dataclass(frozen=True)
class Kept:
    """Where a memory's version lies: its file, relative to the store's folder, its bytes, and their CRC-32."""

    file: str
    size: int
    crc: int


class MemoryStore(Mapping[int, RecordDict]):
    """Client id -> the records that a client keeps (Flower's state), in ascending order of the ids.

    folder: of the files; None = a temporary one that goes with the store. limit: bytes in RAM; 0 = unlimited, and files
    are written for checkpoints alone. Records are never changed in place, by nobody.
    """

    def __init__(self, folder: Path | None = None, limit: int = 0) -> None:
        if limit < 0:
            raise UserError(f"the memory limit must be at least 0 bytes, got {limit}")
        self._temporary = folder is None
        self._folder = folder
        self._limit = limit
        self._here: OrderedDict[int, RecordDict] = OrderedDict()  # least recently used first
        self._sizes: dict[int, int] = {}  # of those in RAM
        self._bytes = 0
        self._version = 0
        self._versions: dict[int, int] = {}
        self._files: dict[int, Kept] = {}  # of the current versions that are on disk
        self._unsynced: set[str] = set()

    # --- reading and writing -----------------------------------------------------------------------------------------

    def __getitem__(self, client: int) -> RecordDict:
        """The client's records; from its file if they are not in RAM. Raises UserError for a damaged file."""
        if client in self._here:
            self._here.move_to_end(client)
            return self._here[client]
        kept = self._files[client]  # of none there is no file, and no folder to make
        records = read_memory(self.folder, kept)
        self._hold(client, records)
        return records

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._versions))

    def __len__(self) -> int:
        return len(self._versions)

    def __contains__(self, client: object) -> bool:
        return client in self._versions

    def put(self, client: int, records: RecordDict) -> None:
        """A new version of a client's records. Raises OSError if others had to go to a disk that is full."""
        self._version += 1
        self._versions[client] = self._version
        old = self._files.pop(client, None)
        if old and old.file in self._unsynced:  # written since the last flush: no checkpoint names it
            self._unsynced.discard(old.file)
            (self.folder / old.file).unlink(missing_ok=True)
        self._hold(client, records)

    def _hold(self, client: int, records: RecordDict) -> None:
        size = _size(records)
        self._bytes += size - self._sizes.get(client, 0)
        self._here[client], self._sizes[client] = records, size
        self._here.move_to_end(client)
        while self._limit and self._bytes > self._limit and len(self._here) > 1:
            oldest = next(iter(self._here))
            self._write(oldest)
            del self._here[oldest]
            self._bytes -= self._sizes.pop(oldest)

    # --- files -------------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Of the files; made when it is first needed."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fedsparse-"))
        return self._folder

    def _write(self, client: int) -> None:
        if client in self._files:
            return
        name = f"{client // _CLIENTS_A_FOLDER}/{client}.{self._versions[client]}.safetensors"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = memory_bytes(self._here[client])
        part = path.with_name(path.name + ".part")
        part.write_bytes(data)
        part.replace(path)
        self._files[client] = Kept(name, len(data), zlib.crc32(data))
        self._unsynced.add(name)

    def flush(self) -> dict[int, Kept]:
        """Every client's current version as a file that survives a crash: what a checkpoint names."""
        for client in self:
            self._write(client)
        folders = {self.folder / name for name in self._unsynced}
        for path in folders:
            sync(path)
        for folder in {path.parent for path in folders} | ({self.folder, self.folder.parent} if folders else set()):
            sync(folder)
        self._unsynced.clear()
        return {client: self._files[client] for client in self}

    def forget(self, kept: Iterable[str]) -> None:
        """Delete all files but those named and those of current versions."""
        names = {*kept, *(entry.file for entry in self._files.values())}
        for path in self._there():
            if str(path.relative_to(self.folder)) not in names:
                path.unlink(missing_ok=True)

    def _there(self) -> list[Path]:
        """The files in the folder, if that exists."""
        found = [] if self._folder is None else self._folder.glob("*/*")
        return [path for path in found if _OURS.fullmatch(path.name)]

    def restore(self, files: Mapping[int, Kept]) -> None:
        """The versions of a checkpoint, whatever the folder holds beside them; nothing is read yet."""
        self._here.clear()
        self._sizes.clear()
        self._bytes = 0
        self._files = dict(files)
        self._versions = {client: _version_of(entry.file) for client, entry in files.items()}
        there = (_version_of(path.name) for path in self._there())
        self._version = max((*self._versions.values(), *there), default=0)  # no name is given twice

    def close(self) -> None:
        """Delete a temporary folder."""
        if self._temporary and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _version_of(file: str) -> int:
    return int(file.rsplit("/", 1)[-1].split(".")[1])


def sync(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _size(records: RecordDict) -> int:
    """Bytes of the arrays and of the words that are bytes: all that is large."""
    total = 0
    for record in records.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
        else:
            total += sum(len(v) if isinstance(v, bytes) else 64 for v in dict(record).values())
    return total


# --- a file ----------------------------------------------------------------------------------------------------------


def memory_bytes(records: RecordDict) -> bytes:
    """The content of a safetensors file: the tensors of a memory, or the arrays and words of a stock client's state."""
    from safetensors.numpy import save

    packet = _packet_of(records)
    if packet is not None:
        head: dict[str, Any] = {"format": _FORMAT, "kind": packet.kind, "order": list(packet.tensors)}
        arrays = {name: t.detach().contiguous().numpy() for name, t in packet.tensors.items()}
    else:
        head = {"format": _FORMAT, "records": [_words(name, record) for name, record in records.items()]}
        lists = [(n, record) for n, record in enumerate(records.values()) if isinstance(record, ArrayRecord)]
        named = ((f"{n}/{k}", array) for n, record in lists for k, array in enumerate(record.values()))
        arrays = {name: np.frombuffer(array.data, np.uint8) for name, array in named}
    return save(arrays, {_HEAD: json.dumps(head)})  # one entry: the library writes several in any order


def _words(name: str, record: Any) -> tuple[str, str, Any]:
    """All of a stock record but the data of arrays."""
    if isinstance(record, ArrayRecord):
        return name, "array", [(key, a.dtype, list(a.shape), a.stype) for key, a in record.items()]
    kind = "config" if isinstance(record, ConfigRecord) else "metric"
    return name, kind, {key: _plain(value) for key, value in dict(record).items()}


def _packet_of(records: RecordDict) -> Packet | None:
    """The packet of tensors alone that the records are, if they are one."""
    try:
        packet = decode(records)
    except UserError:
        return None
    plain = set(records) == {"arrays", "config", "metrics"} and not packet.scalars
    return packet if plain and "run" not in dict(records["config"]) else None


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        return base64.b64decode(value[_BYTES])
    return [_unplain(v) for v in value] if isinstance(value, list) else value


def check_file(folder: Path, kept: Kept) -> bytes:
    """The bytes of a memory's file. Raises UserError for one that is missing, of another length or damaged."""
    path = folder / kept.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"client memory {str(path)!r} cannot be read: {error.strerror or error}") from error
    if len(data) != kept.size or zlib.crc32(data) != kept.crc:
        raise UserError(f"client memory {str(path)!r} is damaged: {len(data)} bytes, {kept.size} were written")
    return data


def read_memory(folder: Path, kept: Kept) -> RecordDict:
    """The records in a file; refuses the same as :func:`check_file`."""
    return memory_records(check_file(folder, kept))


def memory_records(data: bytes) -> RecordDict:
    """The records that :func:`memory_bytes` wrote."""
    from safetensors.numpy import load

    words = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    head, parts = json.loads(words[_HEAD]), load(data)
    if "kind" in head:
        tensors = {name: torch.from_numpy(np.require(parts[name], requirements="W")) for name in head["order"]}
        return encode(Packet(head["kind"], tensors))
    out = RecordDict()
    for n, (name, kind, content) in enumerate(head["records"]):
        if kind == "array":
            out[name] = ArrayRecord()
            for k, (key, dtype, shape, stype) in enumerate(content):
                raw = parts[f"{n}/{k}"].tobytes()
                out[name][key] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=raw)  # type: ignore[assignment]
        else:
            values = {key: _unplain(value) for key, value in content.items()}
            out[name] = ConfigRecord(values) if kind == "config" else MetricRecord(values)
    return out
