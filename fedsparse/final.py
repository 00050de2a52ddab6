"""``final.safetensors``: the server's final state and every client's memory, written and read client by client."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsparse.engine.store import MemoryStore, sync
from fedsparse.errors import UserError
from fedsparse.packet import decode

FINAL = "final.safetensors"
_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


class Memories(Mapping[int, dict[str, Tensor]]):
    """The clients' memories in a store as tensors; of those that have one."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def __getitem__(self, client: int) -> dict[str, Tensor]:
        return dict(decode(self._store[client]).tensors)

    def __iter__(self) -> Iterator[int]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)


class FinalMemories(Mapping[int, dict[str, Tensor]]):
    """The clients' memories in a ``final.safetensors``, each read when it is asked for.

    The file is opened when the first one is, and stays open: to open it is to read the names of all clients' tensors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _file(self) -> Any:
        from safetensors import safe_open

        return safe_open(self._path, framework="pt")

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for key in self._file.keys():  # noqa: SIM118 - a method of the file's own
            owner, _, rest = key.partition("/")
            client, _, name = rest.partition("/")
            if owner == "client":
                found.setdefault(int(client), []).append(name)
        return found

    def __getitem__(self, client: int) -> dict[str, Tensor]:
        return {name: self._file.get_tensor(f"client/{client}/{name}") for name in self._names[client]}

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def save_final(path: Path, state: Mapping[str, Tensor], memories: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Write the file whole or not at all, holding one memory at a time: the library's writer wants all in RAM.

    It is on disk afterwards. Raises UserError for a tensor of a type that the format here does not have.
    """

    def parts() -> Iterator[tuple[str, Tensor]]:
        yield from ((f"state/{name}", t) for name, t in state.items())
        for client in memories:
            yield from ((f"client/{client}/{name}", t) for name, t in memories[client].items())

    head, end = bytearray(b"{"), 0  # as text from the start: the words of many clients' tensors take ten times as much
    for name, tensor in parts():
        if tensor.dtype not in _NAMES:
            raise UserError(f"{name!r} is {tensor.dtype}, which {FINAL} cannot hold")
        said = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        head += (b", " if len(head) > 1 else b"") + f"{json.dumps(name)}: {json.dumps(said)}".encode()
        end += tensor.nbytes
    head += b"}"
    text = bytes(head) + b" " * (-len(head) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in parts():
            file.write(tensor.detach().cpu().contiguous().numpy().tobytes())
    sync(part)
    part.replace(path)
