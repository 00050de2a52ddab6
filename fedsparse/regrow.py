"""The largest gradients of pruned weights: their form in a reply, its check, their mean, and the exchange of weights.

Source: FedTiny (Huang et al., ICDCS 2023, arXiv 2212.01977), progressive pruning. The mean is over the clients of the
round with their weights; what a client did not send counts as 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsparse import cost
from fedsparse.errors import UserError
from fedsparse.globalmask import prunable
from fedsparse.masked import Found, check_form, top_gradients
from fedsparse.packet import Packet
from fedsparse.replies import form
from fedsparse.sparse import SEARCH_PIECE
from fedsparse.sparse.masks import Mask
from fedsparse.sparse.positions import pack_positions, packed_bytes, unpack_positions
from fedsparse.sparse.pruning import Counts, prune_and_grow
from fedsparse.task import Params, Split, Task

_TOP, _AT = "top/", "at/"  # before a weight's name: values and packed positions


@dataclass(frozen=True)
class Search:
    """The largest gradients of pruned weights of a batch, and what looking for them cost: flops, and bytes of the
    piece of a dense gradient that is looked at."""

    found: Found
    flops: float
    piece: int


def search(
    task: Task,
    params: Mapping[str, Tensor],
    mask: Mask,
    counts: Mapping[str, int],
    data: Split,
    batch_size: int,
    rng: torch.Generator,
    passed: Mask | None = None,
) -> Search:
    """The ``counts`` largest gradients of pruned weights on one batch, drawn from ``data`` by ``rng``.

    passed: positions that are passed over too, see :func:`top_gradients`.
    """
    chosen = torch.randperm(len(data), generator=rng)[:batch_size]
    found = top_gradients(task, params, mask, Split(data.x[chosen], data.y[chosen]), counts, passed)
    model = prunable(task)
    names = [model.weights[name].name for name in counts]
    flops = cost.search_flops(model.layers, len(chosen), names, model.cut(mask))
    return Search(found, flops, max(cost.BYTES * min(SEARCH_PIECE, model.sizes[name]) for name in counts))


def check_searchable(task: Task, names: Iterable[str]) -> None:
    """Raise UserError, before any client works, for a weight whose layer is not called just once, or computes in a way
    of its own: its dense gradient cannot be looked at piece by piece. (A model that calls others in training than in
    evaluation is refused when it is searched.)"""
    weights = prunable(task).weights
    for name in names:
        check_form(task.model.get_submodule(weights[name].name))
        if (calls := weights[name].calls) != 1:
            why = "is used more than once" if calls else "is not called"
            raise UserError(f"gradients of pruned weights of {name!r} cannot be searched: the layer {why}")


def gradient_tensors(found: Mapping[str, tuple[Tensor, Tensor]], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors of a reply that carry name -> ((a,) int32 ascending positions, (a,) float32 gradients)."""
    out: dict[str, Tensor] = {}
    for name, (positions, values) in found.items():
        out |= {_TOP + name: values, _AT + name: pack_positions(positions, sizes[name])}
    return out


def gradient_form(counts: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors of the names, shapes and types that ``counts`` gradients of each weight have in a reply."""
    out: dict[str, Tensor] = {}
    for name, a in counts.items():
        out |= {_TOP + name: form(a), _AT + name: form(packed_bytes(sizes[name], a), dtype=torch.uint8)}
    return out


def gradient_complaint(reply: Packet, counts: Mapping[str, int], sizes: Mapping[str, int], mask: Mask) -> str:
    """What is wrong with the positions in a reply of the right form, or "": repeats, outside, or kept weights."""
    for name, a in counts.items():
        try:
            positions = unpack_positions(reply.tensors[_AT + name], sizes[name], a)
        except UserError as error:
            return f"gradients of {name!r}: {error}"
        if _overlap(positions, mask[name]):
            return f"gradients of {name!r}: a position is that of a kept weight"
    return ""


def _overlap(positions: Tensor, kept: Tensor) -> bool:
    """Whether two ascending int32 tensors have a position in common; in less memory than ``torch.isin`` takes."""
    if not len(kept):
        return False
    at = torch.searchsorted(kept, positions, out_int32=True).clamp_(max=len(kept) - 1)
    return bool((kept[at] == positions).any())


class GradientMean:
    """sum n * g / sum n over the replies, in float64 and in the order in which they come."""

    def __init__(self, names: Iterable[str], sizes: Mapping[str, int]) -> None:
        self._sizes = {name: sizes[name] for name in names}
        self._sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in self._sizes.items()}
        self._weight = 0.0

    def add(self, reply: Packet, counts: Mapping[str, int], n: float) -> None:
        """Count a reply that has ``counts`` gradients of each weight, with weight ``n``; keeps no view of it."""
        self._weight += n
        for name, a in counts.items():
            at = unpack_positions(reply.tensors[_AT + name], self._sizes[name], a).long()
            self._sums[name][at] += n * reply.tensors[_TOP + name].double()

    def result(self) -> Found:
        """Name -> (n,) int32 ascending positions and (n,) float64 mean gradients that are not 0."""
        at = {name: torch.nonzero(total).view(-1) for name, total in self._sums.items()}
        return {name: (at[name].int(), total[at[name]] / self._weight) for name, total in self._sums.items()}


def exchanged(
    params: Mapping[str, Tensor], mask: Mask, found: Found, counts: Mapping[str, int]
) -> tuple[Params, dict[str, Tensor]]:
    """Compact parameters and mask after up to ``counts`` weights of each layer have changed places, new ones at 0.

    found: name -> ((n,) ascending positions, (n,) gradients) of pruned weights.
    """
    new_params, new_mask = dict(params), dict(mask)
    for name, a in counts.items():
        new_params[name], new_mask[name] = prune_and_grow(params[name], mask[name], *found[name], a)
    return new_params, new_mask


def named_counts(row: Tensor, names: Mapping[str, object]) -> Counts:
    """Weight name -> count from a (layers,) tensor, without zeros."""
    return {name: k for name, k in zip(names, row.tolist(), strict=True) if k}


def counts_row(counts: Mapping[str, int], names: Mapping[str, object]) -> Tensor:
    """(layers,) int32: the counts in the order of ``names``, 0 where there is none."""
    return torch.from_numpy(np.array([counts.get(name, 0) for name in names], dtype=np.int32))
