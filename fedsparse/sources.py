"""What must be the same where server and clients are different processes: the source code, and what changes bits."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

BITS = ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")  # environment that changes the bits of a result
_PACKAGES = ("fedsparse", "strategies", "clients")


@lru_cache(maxsize=1)
def source_digest() -> str:
    """A SHA-256 of all Python files of the three packages, wherever they are installed."""
    home, sha = Path(__file__).resolve().parents[1], hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((home / package).rglob("*.py")):
            sha.update(f"{path.relative_to(home).as_posix()}\n".encode())
            sha.update(path.read_bytes())
    return sha.hexdigest()


def must_agree() -> dict[str, str]:
    """What a client must have in common with its server, of this process, by name."""
    return {"source code": source_digest(), **{name: os.environ.get(name, "") for name in BITS}}


def same_bits() -> dict[str, str]:
    """The same and more: without these an engine's workers would compute other bits than the driver."""
    return {
        **must_agree(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
    }
