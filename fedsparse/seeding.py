"""Randomness as a path: (seed, round, client, purpose) names a generator; no stream is shared.

The order of clients and the number of workers then cannot matter. The global generators are touched only within
:func:`torch_seeded`, for what knows no other, such as dropout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*path: int | str) -> int:
    """A 63-bit seed for a path of integers and words, the same in every process and on every machine.

    Integers and words never collide: ``seed_of(1) != seed_of("1")``.
    """
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_rng(*path: int | str) -> np.random.Generator:
    """A fresh NumPy generator for the path."""
    return np.random.default_rng(seed_of(*path))


def torch_rng(*path: int | str) -> torch.Generator:
    """A fresh CPU torch generator for the path."""
    return torch.Generator().manual_seed(seed_of(*path))


@contextmanager
def torch_seeded(*path: int | str) -> Iterator[None]:
    """torch's global CPU generator as that of the path, for the length of the block; then as it was.

    That of a GPU in use is seeded too, and left so.
    """
    seed = seed_of(*path)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace for each unused GPU kind
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        yield


def sample_cohort(ids: Sequence[int], fraction: float, seed: int, server_round: int) -> list[int]:
    """The sorted ids of the clients that take part in a round: ``max(1, round(fraction * n))`` without replacement."""
    count = max(1, round(fraction * len(ids)))
    if count >= len(ids):
        return sorted(ids)
    chosen = numpy_rng(seed, server_round, "cohort").choice(np.array(sorted(ids)), size=count, replace=False)
    return sorted(int(i) for i in chosen)
