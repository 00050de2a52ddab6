"""How the models that clients send become the next one: mean, median or trimmed mean, of clipped updates, with noise.

Sources: coordinate-wise median and trimmed mean, Yin et al., ICML 2018, arXiv 1803.01498; clipping and noise, McMahan
et al., ICLR 2018, arXiv 1710.06963. Here a coordinate's median is over the clients that hold it, and a trimmed mean
drops at least the share ``trim`` at either end: of three or more clients one or more. docs/privacy.md derives the
noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsparse.errors import UserError, unknown
from fedsparse.seeding import torch_rng
from fedsparse.sparse.codec import pack, unpack
from fedsparse.sparse.cut import Bools, Cut, Region
from fedsparse.sparse.masks import Mask
from fedsparse.sparse.mean import CoordinateMean, HolderMean, MaskedMean, Mean, PartMean, WeightedMean

KINDS = ("mean", "median", "trimmed_mean")
_COLUMNS = 1 << 16  # coordinates that are sorted at once
Drop = Callable[[int], int]  # of so many values, how many go at either end


@dataclass(frozen=True)
class Aggregation:
    """kind: "mean" (weighted by examples), "median" or "trimmed_mean" (both unweighted). trim: share that a trimmed
    mean drops at either end, in (0, 0.5). clip: largest L2 norm of a client's update, 0 = any. noise: standard
    deviation of the Gaussian noise on the sum of updates, over ``clip``; above 0 all clients weigh the same.
    """

    kind: str = "mean"
    trim: float = 0.1
    clip: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("aggregation", self.kind, KINDS)
        if not 0 < self.trim < 0.5:
            raise UserError(f"trim must be above 0 and below 0.5, got {self.trim}")
        for name, value in (("clip_updates", self.clip), ("noise_multiplier", self.noise)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name} must be at least 0, got {value}")
        if self.noise and not self.clip:
            raise UserError(f"noise_multiplier = {self.noise:g} needs clip_updates above 0: noise is a multiple of it")
        if self.noise and self.kind != "mean":
            raise UserError(
                f'noise_multiplier needs aggregation = "mean", got {self.kind!r}: one client may move a median by any'
                " amount"
            )

    @property
    def robust(self) -> bool:
        """Whether values far from the others count no more than others."""
        return self.kind != "mean"

    def dropped(self, n: int) -> int:
        """Of ``n`` values of a coordinate, how many are left out at either end; one or two remain at least."""
        most = max(0, (n - 1) // 2)
        return most if self.kind == "median" else min(most, math.ceil(self.trim * n - 1e-9))

    # --- accumulators ------------------------------------------------------------------------------------------------

    def whole(self) -> Mean:
        """Over clients that all hold the same tensors."""
        return TrimmedMean(self.dropped) if self.robust else WeightedMean()

    def parts(self, cut: Cut, old: Mapping[str, Tensor]) -> PartMean:
        """Over clients that hold parts of the model ``old``."""
        shapes = {name: tuple(t.shape) for name, t in old.items()}
        if self.robust:
            return TrimmedPartMean(cut, shapes, self.dropped)
        return FixedMean(cut, old) if self.noise else MaskedMean(cut, shapes)

    def holders(self, sizes: Mapping[str, int]) -> CoordinateMean:
        """Over clients whose element masks differ."""
        return TrimmedHolderMean(sizes, self.dropped) if self.robust else HolderMean(sizes)

    def number(self, values: Sequence[float], weights: Sequence[float]) -> float:
        """The aggregate of one number from each client."""
        if self.robust:
            return float(trimmed(torch.tensor(values, dtype=torch.float64).view(-1, 1), self.dropped))
        return sum(w * v for v, w in zip(values, weights, strict=True)) / sum(weights)

    # --- one client's share ------------------------------------------------------------------------------------------

    def weight(self, n: float) -> float:
        """The weight of a client of ``n`` examples."""
        return 1.0 if self.noise else n

    def clipped(self, values: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``values`` moved towards what the client was ``sent`` until their distance, over all of them, is at most
        ``clip``; the same objects where it is already."""
        if not self.clip:
            return values
        updates = {name: t.double() - sent[name].double() for name, t in values.items()}
        norm = math.sqrt(sum(float(u.square().sum()) for u in updates.values()))
        if norm <= self.clip:
            return values
        return {name: sent[name].double() + u * (self.clip / norm) for name, u in updates.items()}

    def clipped_parts(self, values: Tensor, cut: Cut, touched: Bools, sent: Mapping[str, Tensor]) -> Tensor:
        """The same for a packed update of the touched parts of the model that was ``sent``."""
        if not self.clip:
            return values
        return self.clipped({"": values}, {"": pack(sent, cut, touched)})[""]

    # --- noise -------------------------------------------------------------------------------------------------------

    def noised(
        self, params: Mapping[str, Tensor], names: Collection[str], clients: int, *path: int | str
    ) -> dict[str, Tensor]:
        """The plain mean of ``clients`` clipped updates with noise on every coordinate of the tensors ``names``, drawn
        by (*path, "dp"). Its standard deviation is noise * clip / clients."""
        if not (self.noise and clients):
            return dict(params)
        rng, scale = torch_rng(*path, "dp"), self.noise * self.clip / clients
        return {n: _noisy(t, scale, rng) if n in names else t for n, t in params.items()}


def _noisy(tensor: Tensor, scale: float, rng: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
    return noise.mul_(scale).add_(tensor.double()).to(tensor.dtype)


# --- sorted values ---------------------------------------------------------------------------------------------------


def trimmed(values: Tensor, drop: Drop) -> Tensor:
    """(n,) float64: the mean of each column's values without the ``drop(k)`` smallest and largest of its k.

    values: (clients, n), NaN where a client does not hold the coordinate; where nobody does the result is NaN.
    """
    table = torch.tensor([drop(k) for k in range(len(values) + 1)])
    rank = torch.arange(len(values)).view(-1, 1)
    columns = []
    for part in torch.split(values, _COLUMNS, 1):
        held = (~part.isnan()).sum(0)
        low, high = table[held], held - table[held]
        ordered = part.double().sort(0).values  # NaN come last
        inside = (rank >= low) & (rank < high)
        columns.append(torch.where(inside, ordered, 0.0).sum(0) / (high - low))
    return torch.cat(columns) if columns else torch.empty(0, dtype=torch.float64)


class TrimmedMean(Mean):
    """The trimmed mean of each coordinate, unweighted. Keeps a copy of every reply until ``result``."""

    def __init__(self, drop: Drop) -> None:
        self._drop = drop
        self._replies: list[dict[str, Tensor]] = []

    def add(self, values: Mapping[str, Tensor], n: float) -> None:
        self._replies.append({name: t.clone() for name, t in values.items()})

    def result(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._mean(name, old) for name, old in like.items()}

    def _mean(self, name: str, old: Tensor) -> Tensor:
        sent = [reply[name] for reply in self._replies if name in reply]
        if not sent:
            return old.clone()
        mean = trimmed(torch.stack([t.reshape(-1) for t in sent]), self._drop)
        return mean.view(sent[0].shape).to(old.dtype)


class TrimmedPartMean(PartMean):
    """The trimmed mean of each coordinate over those who sent its part, unweighted; a part that nobody sent keeps its
    old bits. Keeps a copy of every reply until ``result``."""

    def __init__(self, cut: Cut, shapes: Mapping[str, tuple[int, ...]], drop: Drop) -> None:
        self._cut = cut
        self._shapes = shapes
        self._drop = drop
        self._replies: list[dict[str, list[tuple[Region, Tensor]]]] = []

    def add(self, values: Tensor, touched: Bools, n: float) -> None:
        pieces: dict[str, list[tuple[Region, Tensor]]] = {}
        for region, value in unpack(values.clone(), self._cut, touched, self._shapes):
            pieces.setdefault(region.name, []).append((region, value))
        self._replies.append(pieces)

    def result(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._mean(name, old) for name, old in like.items()}

    def _mean(self, name: str, old: Tensor) -> Tensor:
        sent = [reply[name] for reply in self._replies if name in reply]
        if not sent:
            return old.clone()
        mean = trimmed(torch.stack([_spread(pieces, old) for pieces in sent]), self._drop).view(old.shape)
        return torch.where(mean.isnan(), old, mean.to(old.dtype))


def _spread(pieces: Iterable[tuple[Region, Tensor]], like: Tensor) -> Tensor:
    """Flat, with NaN between the pieces."""
    out = torch.full(like.shape, math.nan, dtype=torch.float64)
    for region, value in pieces:
        region.put_(out, value.double())
    return out.view(-1)


class TrimmedHolderMean(CoordinateMean):
    """The trimmed mean of each coordinate over those whose mask holds it, unweighted. Keeps a copy of every reply."""

    def __init__(self, sizes: Mapping[str, int], drop: Drop) -> None:
        self._sizes = dict(sizes)
        self._drop = drop
        self._replies: list[dict[str, tuple[Tensor, Tensor]]] = []

    def add(self, values: Mapping[str, Tensor], mask: Mask, n: float) -> None:
        self._replies.append({name: (mask[name].long(), values[name].clone()) for name in self._sizes})

    def result(self, name: str) -> tuple[Tensor, Tensor]:
        if not self._replies:
            return torch.empty(0, dtype=torch.int32), torch.empty(0)
        stack = torch.full((len(self._replies), self._sizes[name]), math.nan, dtype=torch.float64)
        for row, reply in zip(stack, self._replies, strict=True):
            at, values = reply[name]
            row[at] = values.double()
        held = torch.nonzero(~stack.isnan().all(0)).view(-1)
        return held.int(), trimmed(stack[:, held], self._drop).float()


class FixedMean(PartMean):
    """old + sum of updates / number of clients, whoever sent a part: a client that did not counts with an update of 0.

    One client moves it by no more than its update over the number of clients, whatever the others send, which the mean
    over a part's senders does not promise. Unweighted.
    """

    def __init__(self, cut: Cut, old: Mapping[str, Tensor]) -> None:
        self._cut = cut
        self._old = old
        self._shapes = {name: tuple(t.shape) for name, t in old.items()}
        self._sums = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in old.items()}
        self._clients = 0

    def add(self, values: Tensor, touched: Bools, n: float) -> None:
        self._clients += 1
        for region, value in unpack(values, self._cut, touched, self._shapes):
            total, old = self._sums[region.name], self._old[region.name]
            region.put_(total, region.take(total) + (value.double() - region.take(old).double()))

    def result(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        n = max(1, self._clients)
        return {name: (old.double() + self._sums[name] / n).to(old.dtype) for name, old in like.items()}
