"""Checkpoints: what a run needs to go on, written whole or not at all, checked by checksums, the last two kept.

``checkpoint/000040/`` has ``state.safetensors`` and ``manifest.json``: the round, how much of the history belongs to
it, and the file of each client's memory (:mod:`fedsparse.engine.store`). Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedsparse.engine.store import Kept, MemoryStore, check_file, sync
from fedsparse.errors import UserError

FORMAT = 1
CLIENTS = "clients"  # the folder of the memories, in that of the run
_KEPT = 2
_STATE, _MANIFEST = "state.safetensors", "manifest.json"
_PLAIN = (bool, int, float, str, type(None))
_log = logging.getLogger("fedsparse")


class NewerFormatError(UserError):
    """A checkpoint that another version has written."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after some reports. state: packed tensors and their tree, for :func:`unpacked`; done: training rounds.

    history: file name -> (bytes, SHA-256) of the part of a growing file that belongs to it. memories: by client.
    wall: seconds that the run has taken.
    """

    reports: int
    done: int
    wall: float
    history: Mapping[str, tuple[int, str]]
    memories: Mapping[int, Kept]
    state: tuple[Any, Mapping[str, Tensor]]


# --- a state as a tree and tensors -----------------------------------------------------------------------------------


def packed(value: Any, name: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """A value as a JSON tree and the tensors that it names: dataclasses, mappings, tuples, lists, plain values.

    Raises UserError, with the place, for anything else.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(value, name, tensors), tensors


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in _PLAIN:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if bad := [f.name for f in dataclasses.fields(value) if not f.init]:
            raise UserError(f"a checkpoint cannot keep {name}.{bad[0]}: it is no argument of {type(value).__name__}")
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"class": kind, "fields": {k: _pack(v, f"{name}.{k}", tensors) for k, v in fields.items()}}
    if isinstance(value, Mapping):
        if bad := [key for key in value if type(key) not in _PLAIN]:
            raise UserError(f"a checkpoint cannot keep the key {bad[0]!r} of {name}: keys are numbers or words")
        return {"map": [[key, _pack(v, f"{name}[{key!r}]", tensors)] for key, v in value.items()]}
    if type(value) in (tuple, list):
        parts = [_pack(v, f"{name}[{i}]", tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    raise UserError(
        f"a checkpoint cannot keep {name}, a {type(value).__name__}: a state has dataclasses, mappings, tuples, lists,"
        " tensors, numbers and words"
    )


def unpacked(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value of :func:`packed`. Its dataclasses must be those of modules that are loaded already."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = [(k, v) for k, v in tree.items() if k != "fields"]
    if kind == "tensor":
        return tensors[content]
    if kind == "map":
        return {key: unpacked(v, tensors) for key, v in content}
    if kind in ("tuple", "list"):
        parts = [unpacked(v, tensors) for v in content]
        return tuple(parts) if kind == "tuple" else parts
    module, _, name = content.partition(":")
    cls: Any = sys.modules.get(module)
    for part in name.split("."):
        cls = getattr(cls, part, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UserError(f"the checkpoint needs the dataclass {content}, which this version does not have")
    return cls(**{k: unpacked(v, tensors) for k, v in tree["fields"].items()})


# --- the folder ------------------------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of a run folder. history: names of the files in it that grow with the run."""

    def __init__(self, folder: Path, history: tuple[str, ...]) -> None:
        self._run = folder
        self._folder = folder / "checkpoint"
        self._history = history
        self._parts = {name: _Prefix(folder / name) for name in history}

    def write(self, state: Any, store: MemoryStore, *, reports: int, done: int, wall: float) -> None:
        """A new checkpoint; then all but the last two go, and the client memories that neither of them names."""
        from safetensors.torch import save

        tree, tensors = packed(state)
        data = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
        content = {
            "format": FORMAT,
            "reports": reports,
            "done": done,
            "wall": wall,
            "state": tree,
            "state_sha256": hashlib.sha256(data).hexdigest(),
            "history": {name: self._parts[name].grown() for name in self._history},
            "memories": [[i, k.file, k.size, k.crc] for i, k in store.flush().items()],
        }
        part = self._folder / f".{reports:06d}.part"
        for left in self._folder.glob(".*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        (part / _STATE).write_bytes(data)
        (part / _MANIFEST).write_text(_sealed(content), encoding="utf-8")
        for path in (part / _STATE, part / _MANIFEST, part):
            sync(path)
        final = self._folder / f"{reports:06d}"
        if final.exists():  # of a run that was resumed from before it
            self._remove(final)
        part.rename(final)
        sync(self._folder)
        sync(self._run)
        self._forget(store)

    def _forget(self, store: MemoryStore) -> None:
        names = self.names()
        for name in names[:-_KEPT]:
            self._remove(self._folder / name)
        kept: set[str] = set()
        for name in names[-_KEPT:]:
            try:
                kept |= {entry[1] for entry in _opened(self._folder / name / _MANIFEST)["memories"]}
            except UserError:  # damaged: nothing can go on from it
                continue
        store.forget(kept)

    def _remove(self, folder: Path) -> None:
        """Under another name first: what is left of it if the process is killed does not look complete."""
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)

    def names(self) -> list[str]:
        """Of all that are complete, the oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(path.name for path in self._folder.iterdir() if re.fullmatch(r"\d{6,}", path.name))

    def newest(self) -> Checkpoint:
        """The newest one that is whole; a warning for each that is not. Nothing is changed yet, see :meth:`take_up`.

        Raises UserError if there is none, or one of a newer format.
        """
        for name in reversed(self.names()):
            try:
                found = self.read(name)
            except NewerFormatError:
                raise
            except UserError as error:
                _log.warning("checkpoint %s is not usable: %s", name, error)
                continue
            return found
        raise UserError(f"{str(self._run)!r} has no checkpoint to go on from; start the run anew")

    def take_up(self, found: Checkpoint) -> None:
        """Go on from it: what is newer goes, and the history is cut back."""
        for later in (name for name in self.names() if name > f"{found.reports:06d}"):
            self._remove(self._folder / later)
        for file, (size, _) in found.history.items():
            if size or (self._run / file).exists():
                os.truncate(self._run / file, size)
            self._parts[file] = _Prefix(self._run / file)

    def read(self, name: str) -> Checkpoint:
        """One of them. Raises UserError for one that is damaged, NewerFormatError for one of another version."""
        folder = self._folder / name
        content = _opened(folder / _MANIFEST)
        if content["format"] != FORMAT:
            raise NewerFormatError(
                f"checkpoint {folder.name} has format {content['format']}, this version reads {FORMAT}: use the version"
                " that wrote it"
            )
        data = _bytes(folder / _STATE)
        if hashlib.sha256(data).hexdigest() != content["state_sha256"]:
            raise UserError(f"{_STATE} is damaged")
        for name, (size, sha) in content["history"].items():
            start = _bytes(self._run / name)[:size]
            if len(start) < size or hashlib.sha256(start).hexdigest() != sha:
                raise UserError(f"{name} is shorter than it was, or damaged")
        memories = {i: Kept(file, size, crc) for i, file, size, crc in content["memories"]}
        for kept in memories.values():
            check_file(self._run / CLIENTS, kept)
        return Checkpoint(
            content["reports"],
            content["done"],
            content["wall"],
            {name: (size, sha) for name, (size, sha) in content["history"].items()},
            memories,
            (content["state"], _tensors(data)),
        )

    def remove(self) -> None:
        """Of a run that is complete."""
        shutil.rmtree(self._folder, ignore_errors=True)


class _Prefix:
    """The bytes and the SHA-256 of a file that only grows; each byte is read once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sha = hashlib.sha256()
        self._size = 0

    def grown(self) -> tuple[int, str]:
        """Both, now; what has been written is on disk afterwards."""
        if self._path.exists():
            sync(self._path)
            with self._path.open("rb") as file:
                file.seek(self._size)
                while block := file.read(1 << 20):
                    self._sha.update(block)
                    self._size += len(block)
        return self._size, self._sha.hexdigest()


def _sealed(content: Mapping[str, Any]) -> str:
    text = json.dumps(content)
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text})


def _opened(path: Path) -> dict[str, Any]:
    """The content of a manifest. Raises UserError if it is not what was written."""
    try:
        sealed = json.loads(_bytes(path))
        text = sealed["content"]
        if hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:
            raise ValueError
        content: dict[str, Any] = json.loads(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path.name} is damaged") from error
    return content


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror or error}") from error


def _tensors(data: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    return dict(load(data))
