"""Which weights are kept: layer densities, criteria, pruning in steps, FedTiny's noisy candidates, prune and regrow.

Sources: ER and ERK densities: Mocanu et al. 2018 (arXiv 1707.04780) and Evci et al. 2020 (RigL, arXiv 1911.11134);
saliency: SNIP (Lee et al., ICLR 2019, arXiv 1810.02340); synaptic flow and the schedule of its steps: SynFlow (Tanaka
et al., NeurIPS 2020, arXiv 2006.05467); candidates, schedule and regrowth: FedTiny (Huang et al., ICDCS 2023, arXiv
2212.01977) and its first author's code (Little0o0/FedML, branch fedlottery, 4d03aff), without the latter's errors. Of
equal magnitudes the lowest position wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsparse.errors import UserError, unknown
from fedsparse.sparse.masks import Mask, carry, spread

Shapes = Mapping[str, tuple[int, ...]]
Counts = dict[str, int]
Groups = Mapping[tuple[str, ...], int]  # layers that are ranked together -> weights that they keep together

LAYER_DENSITIES = ("uniform", "er", "erk")
RANKINGS = ("global", *LAYER_DENSITIES)  # over all layers together, or within each at its own density
DENSITY_KINDS = ("nominal", "true")
GRANULARITIES = ("block", "layer", "entire")
ORDERS = ("backward", "forward")
_NOISE = {"uniform": 0.5, "er": 1.0, "erk": 1.0}  # half width of the factor's range, by family
_TOLERANCE = 0.02  # of the density, in the rejection rule
_DRAWS, _BLOCK = 200_000, 1_000  # candidate vectors drawn before giving up; together
_EPS = 1e-9


# --- how many weights a layer keeps ----------------------------------------------------------------------------------


def weight_budget(density: float, sizes: Mapping[str, int], *, kind: str, dense: int, total: int) -> int:
    """How many maskable weights a model of that density keeps.

    density: in (0, 1]. sizes: weights of each maskable layer. kind: "nominal" (kept / maskable) or "true" (all kept
    trainable scalars / ``total`` of the dense model, of which ``dense`` are never pruned). Each layer keeps a weight at
    least. Raises UserError with the smallest possible density where that is not possible.
    """
    if kind not in DENSITY_KINDS:
        raise unknown("density_kind", kind, DENSITY_KINDS)
    if not 0 < density <= 1:
        raise UserError(f"density must be in (0, 1], got {density}")
    maskable = sum(sizes.values())
    fixed, base = (0, maskable) if kind == "nominal" else (dense, total)
    budget = min(maskable, math.floor(density * base + 1e-6) - fixed)
    if budget < len(sizes):
        smallest = math.ceil(1e6 * (fixed + len(sizes)) / base) / 1e6  # rounded up: a density that works
        parts = "one weight a layer" if kind == "nominal" else f"{dense} scalars that stay dense, one weight a layer"
        raise UserError(f"{kind} density {density:g} is below the smallest possible one, {smallest:g} ({parts})")
    return budget


def layer_counts(shapes: Shapes, family: str, budget: int) -> Counts:
    """How ``budget`` kept weights are shared out among layers of those weight shapes (outputs, inputs, *kernel).

    family: "uniform" (one density), "er" (density in proportion to (in + out) / (in * out)) or "erk" (to the sum over
    the product of all sides). A layer keeps at least one weight and at most all; what full layers cannot take goes to
    the others. The counts add up to ``budget`` exactly: the largest remainders are rounded up.
    """
    if family not in LAYER_DENSITIES:
        raise unknown("layer_densities", family, LAYER_DENSITIES)
    sizes = np.array([math.prod(s) for s in shapes.values()])
    if not len(sizes) <= budget <= sizes.sum():
        raise UserError(f"{budget} kept weights cannot be shared out among layers of {sizes.tolist()} weights")
    share = np.array([_share(s, family) for s in shapes.values()]) * sizes
    exact = _fill(share, sizes, budget)  # (layers,)
    counts = np.floor(exact + _EPS).astype(np.int64)
    room = np.argsort(-(exact - counts) + 2 * (counts >= sizes), kind="stable")
    counts[room[: budget - counts.sum()]] += 1
    return dict(zip(shapes, counts.tolist(), strict=True))


def _share(shape: tuple[int, ...], family: str) -> float:
    """A layer's density up to a common factor."""
    if family == "uniform":
        return 1.0
    sides = shape[:2] if family == "er" else shape
    return sum(sides) / math.prod(sides)


def _fill(share: NDArray[np.float64], sizes: NDArray[np.int64], budget: int) -> NDArray[np.float64]:
    """clip(f * share, 1, sizes) for the factor f at which it adds up to ``budget``: by bisection, to the last bit."""
    low, high = 0.0, float((sizes / share).max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if np.clip(middle * share, 1, sizes).sum() > budget else (middle, high)
    return np.clip(low * share, 1, sizes)


# --- which ones ------------------------------------------------------------------------------------------------------


def largest(values: Tensor, k: int) -> Tensor:
    """The flat positions of the ``k`` entries of largest magnitude: (k,) int32, ascending; ties: lowest position."""
    size = values.detach().abs().reshape(-1)
    if k >= len(size):
        return torch.arange(len(size), dtype=torch.int32)
    if k <= 0:
        return torch.empty(0, dtype=torch.int32)
    limit = size.kthvalue(len(size) - k + 1).values
    kept = size > limit
    kept[torch.nonzero(size == limit).view(-1)[: k - int(kept.sum())]] = True
    return torch.nonzero(kept).view(-1).int()


def at_random(size: int, k: int, rng: torch.Generator) -> Tensor:
    """``k`` of ``size`` positions, each set as likely: (k,) int32, ascending."""
    return torch.randperm(size, generator=rng)[:k].sort().values.int()


def largest_together(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """The ``k`` scores of largest magnitude of all layers together: name -> (kept,) int32 flat positions, ascending.

    The largest score of each layer is among them, so that no layer is emptied; ties: first layer, lowest position.
    Raises UserError for a ``k`` below the number of layers.
    """
    if k < len(scores):
        raise UserError(f"{k} kept weights leave nothing in some of {len(scores)} layers")
    flat = torch.cat([s.detach().abs().reshape(-1) for s in scores.values()])  # (weights of all layers,)
    bounds = np.cumsum([0, *(s.numel() for s in scores.values())]).tolist()
    for start, score in zip(bounds, scores.values(), strict=False):
        flat[start + int(largest(score, 1))] = math.inf
    kept = largest(flat, k)
    cuts = torch.searchsorted(kept, torch.tensor(bounds, dtype=torch.int32)).tolist()
    parts = zip(scores, bounds, cuts, cuts[1:], strict=False)
    return {name: kept[a:b] - start for name, start, a, b in parts}


# --- masks before training -------------------------------------------------------------------------------------------


def saliency(weights: Tensor, gradients: Tensor) -> Tensor:
    """abs(w * dL/dw), elementwise: the change of the loss with a mask variable of w at 1 (SNIP, eqs. 4 and 5).

    Without SNIP's division by the sum, which changes no rank.
    """
    return (weights * gradients).abs()


def synaptic_flow(
    output: Callable[[Mapping[str, Tensor]], Tensor], params: Mapping[str, Tensor], kept: Mask
) -> dict[str, Tensor]:
    """w * dR/dw of the kept weights, name -> (kept,) float64, at least 0 (SynFlow, Algorithm 1).

    R is the sum of ``output``: the network's for an input of ones, from the float64 tensors that it is given. They are
    the magnitudes of ``params``, 0 where a weight of a layer in ``kept`` is not kept. Biases and running means are 0:
    with them the scores of a layer would not add up to R (the paper's conservation).
    """
    own = {name: _magnitudes(name, t) for name, t in params.items()}
    for name, at in kept.items():
        own[name] = spread(own[name].reshape(-1)[at.long()], at, tuple(params[name].shape)).requires_grad_()
    weights = [own[name] for name in kept]
    with torch.enable_grad():
        grads = torch.autograd.grad(output(own).sum(), weights, materialize_grads=True)
    flows = zip(kept.items(), weights, grads, strict=True)
    return {name: (w.detach() * g).reshape(-1)[at.long()] for (name, at), w, g in flows}


def _magnitudes(name: str, tensor: Tensor) -> Tensor:
    """abs(t) in float64, zeros for a bias or a running mean; what is not a float as it is."""
    if not tensor.is_floating_point():
        return tensor
    short = name.rpartition(".")[2]
    size = tensor.detach().double().abs()
    return torch.zeros_like(size) if "bias" in short or short == "running_mean" else size


def prune_in_steps(
    score: Callable[[Mask], Mapping[str, Tensor]], sizes: Mapping[str, int], groups: Groups, steps: int
) -> dict[str, Tensor]:
    """The mask that keeps what ``groups`` ask for: name -> (kept,) int32 positions of every layer in ``sizes``.

    After step i of n a group keeps size * density ** (i / n) weights (SynFlow, Algorithm 1): those of largest
    score among those still kept (:func:`largest_together`). score: the mask so far -> (kept,) scores of each layer.
    Raises UserError where scores are not finite, or all 0.
    """
    kept = {name: torch.arange(size, dtype=torch.int32) for name, size in sizes.items()}
    if sum(groups.values()) == sum(sizes.values()):
        return kept
    for step in range(1, steps + 1):
        scores = score(kept)
        check_scores(scores)
        for names, final in groups.items():
            size = sum(sizes[name] for name in names)
            count = round(size * (final / size) ** (step / steps))
            chosen = largest_together({name: scores[name] for name in names}, count)
            kept |= {name: kept[name][at.long()] for name, at in chosen.items()}
    return kept


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raise UserError for scores by which nothing can be ranked: not finite, or all 0."""
    for name, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise UserError(f"the scores of {name!r} are not finite (NaN or infinite)")
    if not any(bool(values.any()) for values in scores.values()):
        raise UserError("the scores of all weights are 0: nothing to rank them by")


# --- FedTiny's candidates --------------------------------------------------------------------------------------------


def coarse_pool(
    counts: Mapping[str, int],
    sizes: Mapping[str, int],
    family: str,
    pool: int,
    rng: np.random.Generator,
    *,
    target: float,
    dense: int = 0,
    hard: bool = False,
) -> NDArray[np.int64]:
    """Kept weights of each layer in each candidate, (pool, layers): ``counts`` times noise, redrawn until it fits.

    The noise factor of a layer is 1 + U(-0.5, 0.5) for the family "uniform", 1 + U(-1, 1) for "er" and "erk". A
    candidate fits if its density differs by less than 2 % from that of ``target`` kept weights and ``dense`` unpruned
    scalars; with ``hard`` it must not exceed it either. Raises UserError if that does not happen.
    """
    if pool < 1:
        raise UserError(f"pool must be at least 1, got {pool}")
    base, most = np.array(list(counts.values())), np.array([sizes[name] for name in counts])
    if (base == most).all():
        return np.tile(base, (pool, 1))
    slack = _TOLERANCE * (target + dense)
    found: list[NDArray[np.int64]] = []
    for _ in range(_DRAWS // _BLOCK):
        factor = 1 + rng.uniform(-_NOISE[family], _NOISE[family], (_BLOCK, len(base)))
        drawn = np.clip(np.floor(base * factor), 1, most).astype(np.int64)  # (draws, layers)
        off = drawn.sum(1) - target
        found.extend(drawn[(np.abs(off) < slack) & ((off <= 0) | (not hard))])
        if len(found) >= pool:
            return np.stack(found[:pool])
    raise UserError(
        f"no {pool} candidates within 2 % of {target:.0f} kept weights in {_DRAWS} draws; lower pool (1 = no noise)"
    )


# --- FedTiny's progressive pruning -----------------------------------------------------------------------------------


def layer_groups(names: Sequence[str], granularity: str, order: str) -> list[tuple[str, ...]]:
    """The groups of weights that change together, in the order of their turns.

    names: weights from input to output. granularity: "block" (children of the model, as ResNet's stages; where none has
    two weights, two consecutive ones), "layer" (each alone) or "entire" (all). order: "backward" = from the output.
    """
    if granularity not in GRANULARITIES:
        raise unknown("granularity", granularity, GRANULARITIES)
    if order not in ORDERS:
        raise unknown("order", order, ORDERS)
    groups: list[tuple[str, ...]] = [(name,) for name in names]
    if granularity == "entire":
        groups = [tuple(names)] if names else []
    elif granularity == "block":
        groups = _blocks(names)
    return groups[::-1] if order == "backward" else groups


def _blocks(names: Sequence[str]) -> list[tuple[str, ...]]:
    children: dict[str, list[str]] = {}
    for name in names:
        children.setdefault(name.split(".")[0], []).append(name)
    if len(children) == len(names):  # a chain
        return [tuple(names[i : i + 2]) for i in range(0, len(names), 2)]
    return [tuple(group) for group in children.values()]


def exchange_share(alpha: float, turn: int, stop: int) -> float:
    """The share of a layer's kept weights that change in round ``turn``: alpha / 2 * (1 + cos(pi * turn / stop))."""
    return alpha / 2 * (1 + math.cos(math.pi * turn / stop))


def exchange_count(share: float, kept: int, size: int) -> int:
    """How many weights of a layer change: rounded up, one at least stays, and no more than are pruned."""
    return max(0, min(math.ceil(share * kept - _EPS), kept - 1, size - kept))


def prune_and_grow(
    values: Tensor, kept: Tensor, positions: Tensor, gradients: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Exchange ``count`` kept weights for pruned ones, fewer if fewer gradients are not 0; as many are kept as before.

    values: (kept,) weights at the ascending positions ``kept``; positions, gradients: (n,) of pruned weights,
    ascending. Weights of smallest magnitude go, those of largest gradient come, at value 0. Returns the new values and
    positions.
    """
    count = min(count, int(torch.count_nonzero(gradients)))
    stay = kept[largest(values, len(kept) - count).long()]
    grown = positions[largest(gradients, count).long()]
    new = torch.cat([stay, grown]).sort().values
    assert bool((new[1:] > new[:-1]).all()), "a grown weight was kept already"
    return carry(values, kept, new), new
