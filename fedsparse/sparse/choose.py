"""Which blocks a batch may use: pFedGate's knapsack (arXiv 2305.02776, eq. 6), then a fill by effective size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsparse.sparse.blocks import Bools, ChannelPlan
from fedsparse.sparse.knapsack import knapsack


def choose_blocks(plan: ChannelPlan, importance: NDArray[np.float64], limit: int) -> Bools:
    """The kept set, (L,) bool, whose effective size is at most ``limit`` trainable scalars (the gate not among them).

    importance: (L,) G. Forced blocks are in. The knapsack counts whole rows; since a dropped neighbour's columns are
    dead, room is left, which goes to the most important blocks that still fit. Raises ValueError when ``limit`` is
    below ``plan.smallest``.
    """
    if limit < plan.smallest:
        raise ValueError(f"limit {limit} is below the smallest possible model, {plan.smallest}")
    if limit >= plan.total:
        return np.ones(plan.blocks, bool)
    kept = plan.forced.copy()
    free = np.flatnonzero(~kept)
    kept[free[knapsack(importance[free], plan.nominal[free], limit - plan.nominal_forced)]] = True
    return _fill(plan, kept, importance, limit)


def _fill(plan: ChannelPlan, kept: Bools, importance: NDArray[np.float64], limit: int) -> Bools:
    """Add blocks by importance, ties by index, while the effective size fits.

    Adding a block makes every other one larger, so a block that did not fit never will: one pass is enough.
    """
    layers, units, left = plan.layers, plan.units_kept(kept), limit - plan.effective(kept)
    places = [(i, n) for i, layer in enumerate(plan.hidden) for n in layer.group_sizes]
    dropped = np.flatnonzero(~kept)
    for block in dropped[np.argsort(-importance[dropped], kind="stable")].tolist():
        i, n = places[block]
        inputs = units[i - 1] if i else layers[0].inputs
        after = layers[i + 1]
        cost = layers[i].count(n, inputs) + units[i + 1] * n * after.span * after.kernel
        if cost <= left:
            kept[block] = True
            left -= cost
            units[i] += n
    return kept
