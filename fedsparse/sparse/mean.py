"""Means over clients, in float64 and in the order in which the values come."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsparse.sparse.blocks import Bools, ChannelPlan
from fedsparse.sparse.codec import tile_count, tiles_by_layer, unpack


class WeightedMean:
    """sum n * theta / sum n. Bits depend on the order of ``add`` alone (McMahan et al. 2017, Algorithm 1)."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, values: Mapping[str, Tensor], n: float) -> None:
        """Count ``values`` with weight ``n``; keeps no view of them."""
        self._weight += n
        for name, value in values.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(value.shape, dtype=torch.float64)
            self._sums[name].add_(value.double(), alpha=n)

    def result(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means, in the types of ``like``; its own tensors (as copies) where nothing was added."""
        return {
            name: (self._sums[name] / self._weight).to(old.dtype) if name in self._sums else old.clone()
            for name, old in like.items()
        }


class MaskedMean:
    """The weighted mean per tile over those who sent it; a tile that nobody sent keeps its old bits.

    pFedGate, arXiv 2305.02776, App. A: theta_l + sum p_i delta_{i,l} / sum p_i over the senders of block l, here on
    values. When all send everything the bits are those of :class:`WeightedMean`.
    """

    def __init__(self, plan: ChannelPlan, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._plan = plan
        self._shapes = shapes
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0
        self._tiles = np.zeros(tile_count(plan))

    def add(self, values: Tensor, touched: Bools, n: float) -> None:
        """Count a packed update (see :mod:`fedsparse.sparse.codec`) with weight ``n``; keeps no view of it."""
        self._weight += n
        self._tiles[touched] += n
        for region, value in unpack(values, self._plan, touched, self._shapes):
            if region.name not in self._sums:
                self._sums[region.name] = torch.zeros(self._shapes[region.name], dtype=torch.float64)
            total = self._sums[region.name]
            region.put_(total, region.take(total).add_(value.double(), alpha=n))

    def result(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means, in the types and the order of ``like``."""
        weights = self._weights()
        return {name: self._mean(name, old, weights.get(name)) for name, old in like.items()}

    def _weights(self) -> dict[str, Tensor]:
        """For tensors that not all sent whole: the weight of each entry's senders, in a shape that broadcasts."""
        out: dict[str, Tensor] = {}
        for layer, sent in tiles_by_layer(self._plan, self._tiles):
            if (sent == self._weight).all():
                continue
            rows = torch.from_numpy(np.repeat(sent, layer.group_sizes, axis=0))
            cols = torch.from_numpy(np.diff(layer.in_bounds) * layer.span)
            ones = [1] * (len(self._shapes[layer.weight]) - 2)
            out[layer.weight] = rows.repeat_interleave(cols, dim=1).view(*self._shapes[layer.weight][:2], *ones)
            out |= dict.fromkeys(layer.vectors, rows[:, 0])
        return out

    def _mean(self, name: str, old: Tensor, weight: Tensor | None) -> Tensor:
        if name not in self._sums:
            return old.clone()
        if weight is None:
            return (self._sums[name] / self._weight).to(old.dtype)
        return torch.where(weight > 0, (self._sums[name] / weight.clamp_min(1e-300)).to(old.dtype), old)
