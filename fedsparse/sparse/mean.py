"""Means over clients: what they have in common, and the weighted ones, in float64 and in the order of the values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsparse.sparse.codec import unpack
from fedsparse.sparse.cut import Bools, Cut
from fedsparse.sparse.masks import Mask


class Mean(ABC):
    """Of tensors that all clients hold."""

    @abstractmethod
    def add(self, values: Mapping[str, Tensor], n: float) -> None:
        """Count ``values`` with weight ``n``; keeps no view of them."""

    @abstractmethod
    def result(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means, in the types of ``like``; its own tensors (as copies) where nothing was added."""


class PartMean(ABC):
    """Of a model's parts, each over the clients that hold it."""

    @abstractmethod
    def add(self, values: Tensor, touched: Bools, n: float) -> None:
        """Count a packed update (see :mod:`fedsparse.sparse.codec`) with weight ``n``; keeps no view of it."""

    @abstractmethod
    def result(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means, in the types and the order of ``like``."""


class CoordinateMean(ABC):
    """Of single coordinates, each over the clients whose mask holds it."""

    @abstractmethod
    def add(self, values: Mapping[str, Tensor], mask: Mask, n: float) -> None:
        """Count compact ``values``, name -> (kept,), with weight ``n``; keeps no view of them."""

    @abstractmethod
    def result(self, name: str) -> tuple[Tensor, Tensor]:
        """The ascending positions that anybody holds, (n,) int32, and their means, (n,) float32."""


class WeightedMean(Mean):
    """sum n * theta / sum n. Bits depend on the order of ``add`` alone (McMahan et al. 2017, Algorithm 1)."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, values: Mapping[str, Tensor], n: float) -> None:
        self._weight += n
        for name, value in values.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(value.shape, dtype=torch.float64)
            self._sums[name].add_(value.double(), alpha=n)

    def result(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: (self._sums[name] / self._weight).to(old.dtype) if name in self._sums else old.clone()
            for name, old in like.items()
        }


class MaskedMean(PartMean):
    """The weighted mean per part over those who sent it; a part that nobody sent keeps its old bits.

    pFedGate, arXiv 2305.02776, App. A: theta_l + sum p_i delta_{i,l} / sum p_i over the senders of block l, here on
    values. When all send everything the bits are those of :class:`WeightedMean`.
    """

    def __init__(self, cut: Cut, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._cut = cut
        self._shapes = shapes
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0
        self._parts = np.zeros(cut.parts)  # the weight of each part's senders

    def add(self, values: Tensor, touched: Bools, n: float) -> None:
        self._weight += n
        self._parts[touched] += n
        for region, value in unpack(values, self._cut, touched, self._shapes):
            if region.name not in self._sums:
                self._sums[region.name] = torch.zeros(self._shapes[region.name], dtype=torch.float64)
            total = self._sums[region.name]
            region.put_(total, region.take(total).add_(value.double(), alpha=n))

    def result(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        complete = bool((self._parts == self._weight).all())
        weights = {} if complete else self._cut.spread(self._parts, self._shapes)
        return {name: self._mean(name, old, weights.get(name)) for name, old in like.items()}

    def _mean(self, name: str, old: Tensor, weight: Tensor | None) -> Tensor:
        if name not in self._sums:
            return old.clone()
        if weight is None:
            return (self._sums[name] / self._weight).to(old.dtype)
        return torch.where(weight > 0, (self._sums[name] / weight.clamp_min(1e-300)).to(old.dtype), old)


class HolderMean(CoordinateMean):
    """The weighted mean of each coordinate over those whose mask holds it: sum n * theta / sum n over the holders.

    FedDST, arXiv 2112.09824, Algorithm 1. When all hold the same the bits are those of :class:`WeightedMean`.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        self._weights = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}

    def add(self, values: Mapping[str, Tensor], mask: Mask, n: float) -> None:
        for name, total in self._sums.items():
            at = mask[name].long()
            total[at] = total[at].add_(values[name].double(), alpha=n)
            self._weights[name][at] += n

    def result(self, name: str) -> tuple[Tensor, Tensor]:
        at = torch.nonzero(self._weights[name]).view(-1)
        return at.int(), (self._sums[name][at] / self._weights[name][at]).float()
