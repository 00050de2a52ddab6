"""The 0-1 knapsack that picks blocks by importance (pFedGate, arXiv 2305.02776, eq. 6): exact, greedy, and official.

Block sizes repeat, so within a size only the number of blocks taken matters: the best ones by value. The exact search
starts from the relaxed solution (blocks by value per size until one does not fit) and combines changes of these
numbers, first small ones in the sizes where they cost the relaxed value least (the core of Pisinger's algorithms, Oper.
Res. 45, 1997). Combinations that are dominated, or whose relaxed bound is too low, are dropped; the windows grow until
the bound shows that nothing outside them can pay. Where values are nearly equal, as in an untrained gate, that bound is
weak: then the number of blocks gets a price (a Lagrange multiplier), or the sets of fewer and those of more blocks are
searched one after the other. Where there are few solutions all of them are compared, which is faster still.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedsparse.errors import unknown

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SOLVERS = ("exact", "greedy_value", "greedy_ratio")
_FEW = 4096  # solutions; so many are compared in less time than a search takes to set up
_SAME = 1e-13  # of the largest value: sums of the same values in another order differ by less
_REACH, _SIZES, _WIDTH = 8, 16, 128  # the first window: change of a count, sizes, combinations kept
_GROW = 8  # times as large is the next one
_ROUNDS = 2  # of windows before the sets of fewer and those of more blocks are searched apart
_PRICES = 16  # steps towards the best price; any price gives a valid bound
_NEAR = 2e-3  # of what is open: no need to come nearer to the least bound


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
    for members, capacity in official_rooms(sizes, linear, candidates, sparsity, floor):
        order = members[np.argsort(-score[members], kind="stable")]
        kept |= _in_turn(order, sizes, capacity)
    return kept


def official_rooms(
    sizes: Ints, linear: Bools, candidates: Bools, sparsity: float, floor: float
) -> tuple[tuple[Ints, int], ...]:
    """The two budgets of :func:`official_choice`: the blocks that compete and the size that may be kept of them."""
    groups = (np.flatnonzero(candidates & group) for group in (linear, ~linear))
    return tuple((members, round(float(sizes[members].sum()) * (sparsity - floor))) for members in groups)


def knapsack(values: Sequence[float] | Floats, sizes: Sequence[int] | Ints, capacity: int) -> Bools:
    """The set of blocks of greatest total value whose total size is at most ``capacity``; (L,) bool.

    values: (L,) finite; blocks of negative value are never taken. sizes: (L,) integers, at least 0. Equal values in
    a size go to the lower block index; the answer is the same on every call. A negative capacity takes nothing.
    Takes milliseconds for thousands of blocks of tens of sizes; the worst case is exponential.
    Raises ValueError for values that are not finite, negative sizes or unequal lengths.
    """
    value, size = np.asarray(values, np.float64), np.asarray(sizes, np.int64)
    _check(value, size)
    taken: Bools = (value >= 0) & (size <= capacity)
    if int(size[taken].sum()) <= max(0, capacity):
        return taken
    rivals = np.flatnonzero(taken & (size > 0))
    rivals = rivals[np.lexsort((-value[rivals], size[rivals]))]
    items = _Items(value[rivals], size[rivals])
    taken[rivals] = items.best(_solve(items, capacity))
    return taken


def _check(value: Floats, size: Ints) -> None:
    if value.shape != size.shape or value.ndim != 1:
        raise ValueError(f"knapsack: {value.shape} values and {size.shape} sizes")
    if not np.isfinite(value).all():
        block = int(np.flatnonzero(~np.isfinite(value))[0])
        raise ValueError(f"knapsack: the value of block {block} is {value[block]}")
    if (size < 0).any():
        raise ValueError(f"knapsack: a block has size {int(size.min())}")


@dataclass(frozen=True)
class _Items:
    """The blocks that compete, by size, and in a size the best first. A solution is a count for each size."""

    values: Floats
    sizes: Ints

    @cached_property
    def starts(self) -> Ints:
        """(sizes + 1,) where each size begins, and the end."""
        return np.flatnonzero(np.concatenate([[True], self.sizes[1:] != self.sizes[:-1], [True]]))

    @cached_property
    def same(self) -> float:
        """Values that differ by no more count as equal."""
        return _SAME * float(self.values.max())

    def best(self, counts: Ints) -> Bools:
        """The blocks of a solution."""
        lengths = np.diff(self.starts)
        return np.arange(len(self.sizes)) - np.repeat(self.starts[:-1], lengths) < np.repeat(counts, lengths)

    def gain(self, counts: Ints, base: Ints) -> float:
        """By how much one solution is worth more than another, summed over what differs."""
        ours, theirs = self.best(counts), self.best(base)
        return float(self.values[ours & ~theirs].sum() - self.values[theirs & ~ours].sum())


@dataclass(frozen=True)
class _Relaxed:
    """Blocks by (value - price) per size, until one does not fit or is not worth its price: the critical one.

    limit: with a price above 0 the most blocks that a set may have, with one below 0 the least. gap: by how much such a
    set can be worth more than this one. counts: (sizes,) and blocks: their sum. critical: its place. rate: its value
    less the price, by size. slack: capacity left. bound: the worth of this set plus the gap; slope: of it in the price.
    """

    price: float
    limit: int
    counts: Ints
    blocks: int
    critical: int
    rate: float
    slack: int
    gap: float
    bound: float
    slope: float


def _relax(items: _Items, capacity: int, limit: int, price: float) -> _Relaxed:
    ratio = (items.values - price) / items.sizes
    order = np.argsort(-ratio, kind="stable")
    total = np.cumsum(items.sizes[order])
    fit, pay = (int(n) for n in (np.searchsorted(total, capacity, "right"), np.searchsorted(-ratio[order], 0, "right")))
    blocks = min(fit, pay)
    critical, slack = int(order[blocks]), capacity - (int(total[blocks - 1]) if blocks else 0)
    rate = max(0.0, float(ratio[critical]))
    inside = np.zeros(len(order), bool)
    inside[order[:blocks]] = True
    gap = rate * slack + price * (limit - blocks)
    return _Relaxed(
        price,
        limit,
        np.add.reduceat(inside, items.starts[:-1], dtype=np.int64),
        blocks,
        critical,
        rate,
        slack,
        gap,
        bound=float(items.values[inside].sum()) + gap,
        slope=limit - blocks - (slack / int(items.sizes[critical]) if rate else 0.0),
    )


def _cheapest(items: _Items, capacity: int, limit: int, low: float, high: float, near: float) -> _Relaxed:
    """The least bound over prices, up to ``near``: it is convex and piecewise linear, so where the end slopes meet."""
    left, right = _relax(items, capacity, limit, low), _relax(items, capacity, limit, high)
    if left.slope >= 0 or right.slope <= 0:
        return left if left.slope >= 0 else right
    for _ in range(_PRICES):
        step = (left.bound - right.bound + right.slope * (right.price - left.price)) / (right.slope - left.slope)
        middle = _relax(items, capacity, limit, left.price + step)
        least = left.bound + left.slope * step
        left, right = (middle, right) if middle.slope < 0 else (left, middle)
        if middle.bound - least < near:
            break
    return left if left.bound < right.bound + near else right  # the left one has enough blocks


def _compare(items: _Items, capacity: int) -> Ints:
    """(sizes,) the same as :func:`_solve`, by comparing all solutions; of equal ones the first in lexical order."""
    totals, rooms = np.zeros(1), np.full(1, capacity)
    for start, end in itertools.pairwise(items.starts.tolist()):
        gains = np.concatenate([[0.0], np.cumsum(items.values[start:end])])
        totals = np.add.outer(totals, gains).ravel()
        rooms = np.subtract.outer(rooms, np.arange(end - start + 1) * items.sizes[start]).ravel()
    best = int(np.argmax(np.where(rooms >= 0, totals, -1.0)))
    return np.array(np.unravel_index(best, np.diff(items.starts) + 1))


def _solve(items: _Items, capacity: int) -> Ints:
    """(sizes,) how many blocks of each size an optimal set has."""
    if math.prod((np.diff(items.starts) + 1).tolist()) <= _FEW:
        return _compare(items, capacity)
    top = float(items.values.max())
    most = int(np.searchsorted(np.cumsum(items.sizes), capacity, side="right"))  # no set has more blocks
    root = _relax(items, capacity, most, 0.0)
    counts, done = _search(items, root, root.counts, range(_ROUNDS))
    if done:
        return counts
    near = _NEAR * (root.gap - items.gain(counts, root.counts))
    if root.slope < 0:
        priced = _cheapest(items, capacity, most, 0.0, top, near)
        return _search(items, priced, counts, itertools.count())[0]
    fewer = _cheapest(items, capacity, root.blocks, 0.0, top, near)
    counts, _ = _search(items, fewer, counts, itertools.count())
    more = _cheapest(items, capacity, root.blocks + 1, -8 * top, 0.0, near)
    return _search(items, more, counts, itertools.count())[0]


def _search(items: _Items, relaxed: _Relaxed, counts: Ints, rounds: Iterable[int]) -> tuple[Ints, bool]:
    """The best of the solution ``counts`` and of the sets that ``relaxed`` bounds; whether all of these were judged."""
    floor = items.gain(counts, relaxed.counts)
    if floor < 0:
        counts, floor = relaxed.counts, 0.0
    last = _critical_group(items, relaxed)
    for i in rounds:
        if relaxed.gap <= floor + items.same:
            return counts, True
        groups, all_open = _groups(items, relaxed, relaxed.gap - floor, reach=_REACH * _GROW**i, most=_SIZES * 3**i)
        found = _combine(groups, last, relaxed, floor, items.same, width=_WIDTH * _GROW**i)
        if found.changes:
            counts, floor = relaxed.counts.copy(), found.gain
            for size, change in found.changes.items():
                counts[size] += change
        if all_open and found.all_tried:
            return counts, True
    return counts, False


@dataclass(frozen=True)
class _Group:
    """Blocks of one size that may change sides. index: of the size. values: the best first; ``held`` of them are in."""

    index: int
    size: int
    values: Floats
    held: int

    @cached_property
    def changes(self) -> Ints:
        """By how many blocks the solution may differ."""
        return np.arange(-self.held, len(self.values) - self.held + 1)

    @cached_property
    def gains(self) -> Floats:
        """Of each change."""
        total = np.concatenate([[0.0], np.cumsum(self.values)])
        gains: Floats = total - total[self.held]
        return gains

    def filling(self, room: Ints) -> Ints:
        """The largest change that fits into a room, which may be negative; below ``-held`` if none does."""
        change: Ints = np.minimum(room // self.size, len(self.values) - self.held)
        return change


def _critical_group(items: _Items, relaxed: _Relaxed) -> _Group:
    """All blocks of the critical one's size: whatever else changes, as many as fit are in."""
    c = int(np.searchsorted(items.starts, relaxed.critical, side="right")) - 1
    values = items.values[items.starts[c] : items.starts[c + 1]]
    return _Group(c, int(items.sizes[relaxed.critical]), values, int(relaxed.counts[c]))


def _groups(items: _Items, relaxed: _Relaxed, gap: float, reach: int, most: int) -> tuple[list[_Group], bool]:
    """The sizes, but the critical one, of which a change loses less than ``gap`` of the bound, the largest first.

    reach: the most by which a count may differ. most: how many sizes, those of the least loss. Second: whether
    neither left anything out.
    """
    loss = np.append(np.abs(items.values - relaxed.price - relaxed.rate * items.sizes), np.inf)  # if a block changes
    starts, ends = items.starts[:-1], items.starts[1:]
    at = starts + relaxed.counts
    least = np.minimum(np.where(at < ends, loss[at], np.inf), np.where(at > starts, loss[at - 1], np.inf))
    least[(starts <= relaxed.critical) & (relaxed.critical < ends)] = np.inf
    near = np.flatnonzero(least < gap)
    groups, complete = [], len(near) <= most
    for c in np.sort(near[np.argsort(least[near], kind="stable")[:most]])[::-1].tolist():
        first, place, end = int(starts[c]), int(at[c]), int(ends[c])
        more = int(np.searchsorted(np.cumsum(loss[place : min(end, place + reach + 1)]), gap))
        less = int(np.searchsorted(np.cumsum(loss[max(first, place - reach - 1) : place][::-1]), gap))
        complete = complete and max(more, less) <= reach
        more, less = min(more, reach), min(less, reach)
        groups.append(_Group(c, int(items.sizes[first]), items.values[place - less : place + more], less))
    return groups, complete


@dataclass(frozen=True)
class _Found:
    """The best combination: its gain and the change of each size (none of them: nothing was above the floor)."""

    gain: float
    changes: dict[int, int]
    all_tried: bool


def _combine(groups: list[_Group], last: _Group, relaxed: _Relaxed, floor: float, same: float, width: int) -> _Found:
    """The best combination of changes whose gain is above ``floor``; at most ``width`` are kept at a time."""
    sizes, gains, blocks = np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64)
    bounds = _bounds([*groups, last], relaxed)
    steps: list[tuple[_Group, Ints, Ints]] = []
    best, all_tried = None, True
    while True:
        filling = last.filling(relaxed.slack - sizes)
        full = np.where(filling >= -last.held, gains + last.gains[np.maximum(filling + last.held, 0)], -np.inf)
        i = int(np.argmax(full))
        if full[i] > floor:
            floor, best = float(full[i]), (len(steps), i, int(filling[i]))
        if len(steps) == len(groups):
            break
        group = groups[len(steps)]
        sizes = np.add.outer(sizes, group.changes * group.size).ravel()
        gains = np.add.outer(gains, group.gains).ravel()
        blocks = np.add.outer(blocks, group.changes).ravel()
        hope = gains - relaxed.price * blocks + next(bounds)(relaxed.slack - sizes)
        alive = np.flatnonzero(hope > floor + same)
        alive = alive[_undominated(sizes[alive], gains[alive], blocks[alive])]
        if len(alive) > width:
            alive, all_tried = alive[np.argsort(-hope[alive], kind="stable")[:width]], False
        if not len(alive):
            break
        sizes, gains, blocks = sizes[alive], gains[alive], blocks[alive]
        steps.append((group, alive // len(group.changes), group.changes[alive % len(group.changes)]))
    return _Found(floor, _trace(steps, last, best), all_tried)


@dataclass(frozen=True)
class _Bound:
    """The most that the rest can gain in a room if blocks could be split: concave, piecewise linear."""

    sizes: Floats
    gains: Floats

    def __call__(self, room: Ints) -> Floats:
        gain: Floats = np.interp(room, self.sizes, self.gains, left=-np.inf)
        return gain


def _bounds(groups: list[_Group], relaxed: _Relaxed) -> Iterator[_Bound]:
    """For each group the bound of all groups after it, the price and its limit taken into account."""
    number = [len(g.values) for g in groups]
    worth = np.concatenate([g.values for g in groups]) - relaxed.price
    sizes, places = np.repeat([g.size for g in groups], number), np.repeat(np.arange(len(groups)), number)
    order = np.argsort(-worth / sizes, kind="stable")
    order = order[worth[order] > 0]
    out_size = sum(g.size * g.held for g in groups)  # from a solution without what could leave it
    out_worth = sum(float((g.values[: g.held] - relaxed.price).sum()) for g in groups)
    out_worth -= relaxed.price * (relaxed.limit - relaxed.blocks)
    for i, group in enumerate(groups):
        out_size -= group.size * group.held
        out_worth -= float((group.values[: group.held] - relaxed.price).sum())
        rest = order[places[order] > i]
        grown = (np.concatenate([[0.0], np.cumsum(a[rest])]) for a in (sizes, worth))
        yield _Bound(next(grown) - out_size, next(grown) - out_worth)


def _undominated(sizes: Ints, gains: Floats, blocks: Ints) -> Ints:
    """Positions of the combinations that gain more than all of at most their size, by size ascending.

    Of equal ones that with most blocks stays, so that two searches bounded on either side of a number of blocks cannot
    each drop a solution for the other's sake.
    """
    order = np.lexsort((-blocks, -gains, sizes))
    ranked = gains[order]
    keep = np.ones(len(order), bool)
    keep[1:] = ranked[1:] > np.maximum.accumulate(ranked)[:-1]
    return order[keep]


def _trace(steps: list[tuple[_Group, Ints, Ints]], last: _Group, best: tuple[int, int, int] | None) -> dict[int, int]:
    """The change of each size that led to a combination: after how many steps, which, and the change of the last."""
    if best is None:
        return {}
    depth, i, filling = best
    changes = {last.index: filling}
    for group, parents, change in reversed(steps[:depth]):
        changes[group.index] = int(change[i])
        i = int(parents[i])
    return changes
