"""The 0-1 knapsack that picks blocks by importance (pFedGate, arXiv 2305.02776, eq. 6): exact, greedy, and official.

Block sizes repeat, so within a size only the number of blocks taken matters: the best ones by value. Size classes
are combined as lists of (size, value) from which dominated pairs, and pairs whose relaxed bound cannot reach a
greedy solution, are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsparse.errors import unknown

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SOLVERS = ("exact", "greedy_value", "greedy_ratio")
_SLACK = 1e-12  # relative; sums of the same values in another order differ by less


def solve(values: Sequence[float] | Floats, sizes: Sequence[int] | Ints, capacity: int, solver: str = "exact") -> Bools:
    """The set of blocks that one of SOLVERS finds; (L,) bool. Arguments, ties and errors as :func:`knapsack`.

    "greedy_value": the best first; "greedy_ratio": the best by value per size. Both skip a block that does not fit and
    go on.
    """
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    if solver == "exact":
        return knapsack(values, sizes, capacity)
    value, size = np.asarray(values, np.float64), np.asarray(sizes, np.int64)
    _check(value, size)
    with np.errstate(divide="ignore", invalid="ignore"):
        rank = value if solver == "greedy_value" else np.where(size > 0, value / size, np.inf)
    order = np.argsort(-rank, kind="stable")
    return _in_turn(order[value[order] >= 0], size, capacity)


def _in_turn(order: Ints, size: Ints, capacity: int) -> Bools:
    """Take blocks in this order, skipping what does not fit."""
    taken, left = np.zeros(len(size), bool), capacity
    for block, s in zip(order.tolist(), size[order].tolist(), strict=True):
        if s <= left:
            taken[block] = True
            left -= s
    return taken


def official_choice(
    importance: Floats, sizes: Ints, linear: Bools, candidates: Bools, sparsity: float, floor: float
) -> Bools:
    """What the released code keeps (yxdyc/pFedGate at b8cfa15): (L,) bool; all of it for a sparsity of 1.

    importance: (L,) G, clipped from below at ``floor`` (its s_min) and rounded to tenths. Blocks that are no
    ``candidates`` are kept beside the budget. Those of linear layers and the others have a budget each, round(their
    size x (sparsity - floor)), which is filled by importance. Ties go to the lower index (there: to NumPy's sort).
    """
    if sparsity == 1:
        return np.ones(len(sizes), bool)
    score = np.round(10 * np.maximum(importance, floor)).astype(np.int64)
    kept = ~candidates
    for group in (linear, ~linear):
        members = np.flatnonzero(candidates & group)
        capacity = round(float(sizes[members].sum()) * (sparsity - floor))
        order = members[np.argsort(-score[members], kind="stable")]
        kept |= _in_turn(order, sizes, capacity)
    return kept


def no_choice(sizes: Sequence[int] | Ints, capacity: int) -> int | None:
    """None where a budget leaves a real choice; else the largest size of blocks that would.

    There is none where more than half of what is free, by size, lies in blocks of which not even one fits: then the
    budget decides what is kept, not the importances (so do the official cut's chunks of the largest layers at 0.3).
    sizes: (L,) of the free blocks. capacity: what is left for them.
    """
    size = np.asarray(sizes, np.int64)
    total = int(size.sum())
    if total <= capacity or 2 * int(size[size <= capacity].sum()) >= total:
        return None
    return max(1, capacity)


def knapsack(values: Sequence[float] | Floats, sizes: Sequence[int] | Ints, capacity: int) -> Bools:
    """The set of blocks of greatest total value whose total size is at most ``capacity``; (L,) bool.

    values: (L,) finite; blocks of negative value are never taken. sizes: (L,) integers, at least 0. Equal values in
    a size class go to the lower block index; the answer is the same on every call. A negative capacity takes nothing.
    Raises ValueError for values that are not finite, negative sizes or unequal lengths.
    """
    value, size = np.asarray(values, np.float64), np.asarray(sizes, np.int64)
    _check(value, size)
    taken: Bools = (value >= 0) & (size <= capacity)
    if int(size[taken].sum()) <= max(0, capacity):
        return taken
    candidates = np.flatnonzero(taken & (size > 0))
    taken &= size == 0
    candidates = candidates[np.argsort(-value[candidates], kind="stable")]  # the best first
    classes = [candidates[size[candidates] == s] for s in np.unique(size[candidates])[::-1]]
    for members, count in zip(classes, _counts(classes, value, size, capacity), strict=True):
        taken[members[:count]] = True
    return taken


@dataclass(frozen=True)
class _Bound:
    """The best value that fits into a capacity if blocks could be split: concave, piecewise linear."""

    sizes: Floats
    values: Floats

    def __call__(self, capacity: Ints) -> Floats:
        return np.interp(capacity, self.sizes, self.values)


def _check(value: Floats, size: Ints) -> None:
    if value.shape != size.shape or value.ndim != 1:
        raise ValueError(f"knapsack: {value.shape} values and {size.shape} sizes")
    if not np.isfinite(value).all():
        block = int(np.flatnonzero(~np.isfinite(value))[0])
        raise ValueError(f"knapsack: the value of block {block} is {value[block]}")
    if (size < 0).any():
        raise ValueError(f"knapsack: a block has size {int(size.min())}")


def _counts(classes: list[Ints], value: Floats, size: Ints, capacity: int) -> list[int]:
    """How many blocks of each class an optimal set holds."""
    floor = _greedy(np.concatenate(classes), value, size, capacity)
    floor -= _SLACK * (1 + floor)
    total, worth = np.zeros(1, np.int64), np.zeros(1)  # the undominated sets so far: their sizes, ascending, and values
    history: list[tuple[Ints, Ints]] = []
    for i, members in enumerate(classes):
        bound = _bound(classes[i + 1 :], value, size)
        prefix = np.concatenate([[0.0], np.cumsum(value[members])])
        sizes = total[:, None] + np.arange(len(prefix)) * size[members[0]]  # (sets, count)
        values = worth[:, None] + prefix
        alive = np.flatnonzero((sizes <= capacity) & (values + bound(capacity - sizes) >= floor))
        alive = alive[_undominated(sizes.ravel()[alive], values.ravel()[alive])]
        total, worth = sizes.ravel()[alive], values.ravel()[alive]
        history.append((alive // len(prefix), alive % len(prefix)))
    return _trace(history)


def _undominated(sizes: Ints, values: Floats) -> Ints:
    """Positions of the pairs that no pair of at most their size reaches in value, by size ascending."""
    order = np.lexsort((-values, sizes))
    ranked = values[order]
    keep = np.ones(len(order), bool)
    keep[1:] = ranked[1:] > np.maximum.accumulate(ranked)[:-1]
    return order[keep]


def _trace(history: list[tuple[Ints, Ints]]) -> list[int]:
    """The counts that led to the last, most valuable pair."""
    at, counts = -1, []
    for parent, count in reversed(history):
        counts.append(int(count[at]))
        at = int(parent[at])
    return counts[::-1]


def _by_ratio(members: Ints, value: Floats, size: Ints) -> Ints:
    return members[np.argsort(-value[members] / size[members], kind="stable")]


def _greedy(members: Ints, value: Floats, size: Ints, capacity: int) -> float:
    """The value of the set that takes blocks by value per size and skips those that do not fit."""
    left, worth = capacity, 0.0
    order = _by_ratio(members, value, size)
    for v, s in zip(value[order].tolist(), size[order].tolist(), strict=True):
        if s <= left:
            left -= s
            worth += v
    return worth


def _bound(classes: list[Ints], value: Floats, size: Ints) -> _Bound:
    members = _by_ratio(np.concatenate(classes), value, size) if classes else np.empty(0, np.int64)
    zero = np.zeros(1)
    return _Bound(np.concatenate([zero, np.cumsum(size[members])]), np.concatenate([zero, np.cumsum(value[members])]))
