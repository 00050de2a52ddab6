"""``final.safetensors``: the server's final state and every client's memory, written and read client by client."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
    """The clients' memories in a ``final.safetensors``, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file: Any = safe_open(path, framework="pt")  # stays open: to open it is to read the names of all clients
        self._names: dict[int, list[str]] = {}
        for key in self._file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
            owner, _, rest = key.partition("/")
            client, _, name = rest.partition("/")
            if owner == "client":
                self._names.setdefault(int(client), []).append(name)

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

    head: dict[str, Any] = {}
    end = 0
    for name, tensor in parts():
        if tensor.dtype not in _NAMES:
            raise UserError(f"{name!r} is {tensor.dtype}, which {FINAL} cannot hold")
        head[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in parts():
            file.write(tensor.detach().cpu().contiguous().numpy().tobytes())
    sync(part)
    part.replace(path)
