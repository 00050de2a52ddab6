"""FedTiny's candidates: one nested model on the wire, every candidate from it on the device, means of their statistics.

All candidates rank the same weights by magnitude, so in each layer a smaller one is part of a larger one. Their union
and the number of weights that each keeps of each layer are therefore all of them, without loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsparse import cost
from fedsparse.client import Memory
from fedsparse.errors import UserError
from fedsparse.globalmask import kept_counts, prunable, recall, receive, strongest
from fedsparse.packet import Packet, Scalar
from fedsparse.seeding import numpy_rng
from fedsparse.sparse.masks import Mask
from fedsparse.sparse.pruning import coarse_pool, largest
from fedsparse.task import Params, Task

_UNION = "union/"  # before the names of the union's tensors, in a client's memory
_COUNTS = "counts"
VARIANCES = ("mean", "total")


@dataclass(frozen=True)
class Candidates:
    """The union of all candidates, compact under ``mask``. counts: (C, layers) int32, the kept weights of each."""

    params: Params
    mask: Mask
    counts: Tensor

    def model(self, task: Task, c: int) -> tuple[Params, Mask]:
        """The compact parameters and the mask of one candidate."""
        kept = dict(zip(prunable(task).weights, self.counts[c].tolist(), strict=True))
        return strongest(task, self.params, self.mask, kept)

    def models(self, task: Task) -> Iterator[tuple[Params, Mask]]:
        """All of them, in order."""
        return (self.model(task, c) for c in range(len(self.counts)))

    def memory(self) -> Memory:
        """What a client keeps of them until the next exchange, beside the mask."""
        return {_COUNTS: self.counts, **{_UNION + name: t for name, t in self.params.items()}}


def candidate_counts(task: Task, density: float, kind: str, family: str, pool: int) -> NDArray[np.int64]:
    """Kept weights of each layer in each of ``pool`` candidates, (C, layers): drawn by the task's seed.

    With ``pool`` 1, or where every weight is kept, there is one candidate, without noise. A "true" density is a budget,
    which no candidate exceeds. Raises UserError for what :func:`fedsparse.globalmask.kept_counts` refuses.
    """
    counts, model = kept_counts(task, density, kind, family), prunable(task)
    if pool == 1 or counts == model.sizes:
        return np.array([list(counts.values())], dtype=np.int64)
    hard = kind == "true"
    dense, total = (model.dense, model.total) if hard else (0, sum(model.sizes.values()))
    rng = numpy_rng(task.seed, "pool")
    target = density * total - dense
    return coarse_pool(counts, model.sizes, family, pool, rng, target=target, dense=dense, hard=hard)


def union_mask(task: Task, params: Mapping[str, Tensor], counts: NDArray[np.int64]) -> dict[str, Tensor]:
    """The union of candidates that keep ``counts``, (C, layers), of the largest weights of whole ``params``."""
    return {name: largest(params[name], int(k)) for name, k in zip(prunable(task).weights, counts.max(0), strict=True)}


def receive_candidates(task: Task, packet: Packet, memory: Memory) -> tuple[Candidates, Memory]:
    """The candidates in a packet, or those that the client holds since the exchange before; and its new memory."""
    if _COUNTS in packet.tensors:
        got = receive(task, packet, memory)
        candidates = Candidates(got.params, got.mask, packet.tensors[_COUNTS])
        return candidates, {**got.memory, **candidates.memory()}
    if _COUNTS not in memory:
        raise UserError("the packet builds on candidates that this client does not hold")
    params = {name: memory[_UNION + name] for name in task.shapes}
    return Candidates(params, recall(memory), memory[_COUNTS]), memory


def selection_costs(task: Task, candidates: Candidates, *, examples: int, batch: int, held: int) -> dict[str, Scalar]:
    """The scalars of a reply that forward passes of every candidate on ``examples`` cost; the densest counts.

    held: bytes that the client holds beside the candidate at work. Memory counts, of the activations, the input and the
    output of the widest layer.
    """
    model = prunable(task)
    cuts = [model.cut(mask) for _, mask in candidates.models(task)]
    macs = [cost.forward_macs(model.layers, cut) for cut in cuts]
    densest = max(cuts, key=lambda cut: cost.kept_count(model.layers, cut))
    nominal = cost.nominal_density(model.layers, densest)
    widest = max(layer.activations for layer in model.layers)
    return {
        "samples": examples * len(cuts),
        "density_true": cost.kept_count(model.layers, densest) / model.total,
        **({} if nominal is None else {"density_nominal": nominal}),
        "flops": 2.0 * examples * sum(macs),
        "forward_macs": max(macs),
        "memory": held + cost.model_bytes(model.layers, densest) + 2 * cost.BYTES * batch * widest,
    }


class StatisticsMean:
    """The mean of clients' norm statistics, (C, 2, channels), in float64: sum n * s / sum n.

    variance: "mean": of the variances; "total": the variance of all examples together, which the clients' different
    means belong to: sum n * (var + (mean - global mean) ** 2) / sum n.
    """

    def __init__(self, variance: str) -> None:
        self._total = variance == "total"
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, statistics: Tensor, n: float) -> None:
        """Count a client of ``n`` examples; keeps no view of its tensor."""
        values = statistics.double()
        if self._total:
            values = torch.stack([values[:, 0], values[:, 1] + values[:, 0].square()], dim=1)
        self._weight += n
        self._sum = n * values if self._sum is None else self._sum.add_(values, alpha=n)

    def result(self) -> Tensor | None:
        """(C, 2, channels) float32, or None if nobody was counted."""
        if self._sum is None:
            return None
        mean = self._sum / self._weight
        if self._total:
            variance = (mean[:, 1] - mean[:, 0].square()).clamp_min(0)
            mean = torch.stack([mean[:, 0], variance], dim=1)
        return mean.float()


def lowest_loss(losses: Sequence[Tensor], examples: Sequence[int]) -> int:
    """The candidate of lowest mean loss over all development sets; ties: the first.

    losses: of each client, (C,) summed over its ``examples``.
    """
    total = torch.stack([row.double() for row in losses]).sum(0) / sum(examples)  # (C,)
    return int(np.argmin(total.numpy()))
