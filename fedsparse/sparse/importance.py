"""PruneFL's decision: which weights a model keeps, by squared gradients for the time that each weight costs.

Source: Jiang, Wang, Valls, Ko, Lee, Leung, Tassiulas, "Model Pruning Enables Efficient Federated Learning on Edge
Devices", IEEE TNNLS 2022, arXiv 1909.12326. Keeping a set S of weights lowers the loss in a round by about the sum of
their squared gradients and takes c + sum t_j; the best set maximises the quotient of the two. Sorted by g^2 / t, it is
a prefix. All sums are in float64; of equals the earlier layer and the lowest position come first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsparse.sparse.masks import Mask
from fedsparse.sparse.pruning import largest


def prunable_share(most: float, half_life: float, turn: int) -> float:
    """The share of each layer's kept weights, those of smallest magnitude, that may go: most * 0.5 ** (turn / life)."""
    return most * math.pow(0.5, turn / half_life)


def untouchable(values: Mapping[str, Tensor], kept: Mask, share: float) -> dict[str, Tensor]:
    """The positions that stay whatever their gradients: all but ``floor(share * n)`` of a layer's n kept weights.

    values: name -> (n,) weights at the ascending positions ``kept``. share: in [0, 1); a layer keeps one at least.
    """
    stay = {name: largest(v, len(v) - math.floor(share * len(v))) for name, v in values.items()}
    return {name: kept[name][at.long()] for name, at in stay.items()}


def most_per_time(
    stay: Mask,
    squares: Mapping[str, Tensor],
    times: Mapping[str, float],
    *,
    fixed: float,
    rest: float,
    budget: int,
) -> dict[str, Tensor]:
    """The positions in ``stay`` and those others that make (rest + sum g^2) / (fixed + sum t) largest.

    squares: name -> (size,) mean squared gradients, at least 0. times: of one weight of each layer, above 0. fixed: the
    time of a round without these weights, above 0; rest: squared gradients of what is never pruned. budget: so many
    positions at most, unless ``stay`` has more. Returns name -> ascending int32 positions.
    """
    if not stay:
        return {}
    gains = {name: squares[name].numpy().astype(np.float64) for name in stay}
    kept = {name: at.numpy() for name, at in stay.items()}
    numerator = rest + sum(float(gains[name][at].sum()) for name, at in kept.items())
    denominator = fixed + sum(times[name] * len(at) for name, at in kept.items())
    free = {name: np.setdiff1d(np.arange(len(gains[name])), at, assume_unique=True) for name, at in kept.items()}
    gain = np.concatenate([gains[name][at] for name, at in free.items()])
    time = np.concatenate([np.full(len(at), times[name]) for name, at in free.items()])
    order = np.argsort(-gain / time, kind="stable")
    room = max(0, budget - sum(map(len, kept.values())))
    count = min(room, _prefix(gain[order], time[order], numerator, denominator))
    layer = np.repeat(np.arange(len(free)), [len(at) for at in free.values()])[order[:count]]
    where = np.concatenate(list(free.values()))[order[:count]]
    added = {name: where[layer == i] for i, name in enumerate(free)}
    return {name: _ascending(kept[name], added[name]) for name in stay}


def _prefix(
    gain: np.ndarray[tuple[int], np.dtype[np.float64]],
    time: np.ndarray[tuple[int], np.dtype[np.float64]],
    numerator: float,
    denominator: float,
) -> int:
    """How many, in falling order of gain / time, each raise the quotient of the sums before it."""
    above = numerator + np.cumsum(gain) - gain
    below = denominator + np.cumsum(time) - time
    raises = gain * below > above * time
    return len(raises) if bool(raises.all()) else int(np.argmin(raises))


def most_squared(stay: Mask, squares: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The positions in ``stay`` and, up to ``counts[name]`` in each layer, the others of largest squared gradient."""
    out = {}
    for name, at in stay.items():
        gain = squares[name].clone()
        gain[at.long()] = -1.0  # below every other
        best = torch.argsort(gain, descending=True, stable=True)[: counts[name] - len(at)]
        out[name] = _ascending(at.numpy(), best.numpy())
    return out


def largest_of_all(values: Mapping[str, Tensor], kept: Mask, budget: int) -> dict[str, Tensor]:
    """The ``budget`` positions of largest magnitude over all layers together, one of each layer at least.

    values: name -> (n,) weights at the ascending positions ``kept``. Everything, where that is no more than ``budget``,
    which must be at least the number of layers.
    """
    if sum(map(len, kept.values())) <= budget:
        return dict(kept)
    first = {name: largest(v, 1) for name, v in values.items()}
    size = torch.cat([v.abs().index_fill(0, first[name].long(), math.inf) for name, v in values.items()])
    parts = torch.zeros(len(size), dtype=torch.bool).index_fill(0, largest(size, budget).long(), value=True)
    chosen = torch.split(parts, [len(v) for v in values.values()])
    return {name: kept[name][part] for name, part in zip(values, chosen, strict=True)}


def _ascending(a: np.ndarray[tuple[int], np.dtype[np.int32]], b: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
    return torch.from_numpy(np.sort(np.concatenate([a, b])).astype(np.int32))
