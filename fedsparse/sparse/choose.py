"""Which blocks a batch may use: pFedGate's knapsack (arXiv 2305.02776, eq. 6), then a fill by real costs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from fedsparse.sparse.cut import Bools, Cut, Floats
from fedsparse.sparse.knapsack import solve


def choose_blocks(
    cut: Cut, importance: Floats, limits: Mapping[str, int], cost: str = "parameters", solver: str = "exact"
) -> Bools:
    """The kept set, (L,) bool, that spends at most ``limits[c]`` of every cost c in ``limits``.

    importance: (L,) G. cost: what the knapsack counts; ``limits`` must have it. Forced blocks are in. The knapsack
    counts blocks with all of their inputs; since a dropped neighbour's columns are dead, room is left, which goes to
    the most important blocks that still fit. Of what breaks another limit the least important goes first (of equals the
    highest index). Raises ValueError when the forced blocks alone exceed a limit.
    """
    if cost not in limits:
        raise ValueError(f"the knapsack counts {cost}, of which there is no limit, only of {list(limits)}")
    for name, limit in limits.items():
        if limit < _least(cut, name):
            raise ValueError(f"limit {limit} of {name} is below the smallest possible model")
    if all(_most(cut, name) <= limit for name, limit in limits.items()):
        return cut.everything
    kept = cut.forced.copy()
    free = np.flatnonzero(~kept)
    sizes = cut.weights(cost)[free]
    outside = _most(cut, cost) - int(sizes.sum())  # forced blocks and what belongs to no block
    kept[free[solve(importance[free], sizes, limits[cost] - outside, solver)]] = True
    _drop_(cut, kept, importance, limits)
    _fill_(cut, kept, importance, limits)
    return kept


def _fits(cut: Cut, kept: Bools, limits: Mapping[str, int]) -> bool:
    return all(cut.spent(kept, cost) <= limit for cost, limit in limits.items())


def _drop_(cut: Cut, kept: Bools, importance: Floats, limits: Mapping[str, int]) -> None:
    """Take blocks out until all limits hold."""
    if _fits(cut, kept, limits):
        return
    chosen = np.flatnonzero(kept & ~cut.forced)[::-1]
    for block in chosen[np.argsort(importance[chosen], kind="stable")]:
        kept[block] = False
        if _fits(cut, kept, limits):
            return


def _fill_(cut: Cut, kept: Bools, importance: Floats, limits: Mapping[str, int]) -> None:
    """Put blocks in by importance, ties by index, while all limits hold.

    Adding a block makes no other one cheaper, so a block that did not fit never will: one pass is enough.
    """
    waiting = np.flatnonzero(~kept)
    waiting = waiting[np.argsort(-importance[waiting], kind="stable")]
    while True:
        for cost, limit in limits.items():
            waiting = waiting[cut.added(kept, cost)[waiting] <= limit - cut.spent(kept, cost)]
        if not len(waiting):
            return
        kept[waiting[0]] = True
        waiting = waiting[1:]


@lru_cache(maxsize=64)
def _least(cut: Cut, cost: str) -> int:
    return cut.spent(cut.forced, cost)


@lru_cache(maxsize=64)
def _most(cut: Cut, cost: str) -> int:
    return cut.spent(cut.everything, cost)
