"""The structural cut: contiguous groups of channels or hidden units, one gated block each.

Source: pFedGate (arXiv 2305.02776) leaves the cut open; flat chunks of a tensor cannot be skipped by a kernel, whole
channel groups can. Tensors whose channels belong together (a layer, its norm, all layers of a residual stream) share a
*space* of units in one grouping; a block is one group of one space. A block owns its rows of the weights that write the
space (columns of an embedding), their biases and the entries of the norms. The columns that a dropped group would feed
are dead, so what a kept set *really* costs is a sum of products of kept units; by itself, with all of its inputs, a
block costs its *nominal* size. :mod:`fedsparse.sparse.graph` finds the spaces of a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedsparse.cost import trace
from fedsparse.errors import UserError, unknown
from fedsparse.sparse.channels import ChannelRegion, Runs, Selection, group_runs
from fedsparse.sparse.compact import CompactModel, kept_values
from fedsparse.sparse.cut import COSTS, Bools, Cut, Floats, Ints
from fedsparse.sparse.graph import find_spaces
from fedsparse.sparse.spaces import WHOLE, Axis, Counter, CutTensor, Gated

if TYPE_CHECKING:
    from fedsparse.task import Task

BLOCKS_PER_LAYER = 5  # the paper's split factor B
MAX_BLOCK_FRAC = 0.05  # of the model; larger blocks leave the knapsack no choice
ALIGN = 8  # channels: floats in a vector register
_BATCH = 32  # examples; where a unit has fewer weights than outputs in a batch, those are scaled in their stead


@dataclass(frozen=True)
class Space:
    """Units that fall into groups. bounds: first unit of each group, then the number of units.

    first_block: index of group 0 among the cut's blocks. name: the layer that writes it first. scaled: no group is ever
    dropped.
    """

    name: str
    bounds: tuple[int, ...]
    first_block: int
    scaled: bool = False

    @property
    def units(self) -> int:
        return self.bounds[-1]

    @property
    def groups(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def sizes(self) -> Ints:
        """(groups,) units of each group."""
        return np.diff(self.bounds).astype(np.int64)

    @property
    def members(self) -> slice:
        """Its blocks."""
        return slice(self.first_block, self.first_block + self.groups)


@dataclass(frozen=True, eq=False)
class GroupCut(Cut):
    """A model cut by groups of units. tensors: all floating ones, layers in forward order.

    outputs: the modules whose outputs are scaled by gates; weights_gated: the weights that are scaled themselves, since
    they feed saturating functions. attentions: modules whose heads are scaled. counters: what the modules have to be
    told of the kept set. unit_macs: (space, multiply-adds per example of each unit) beside those of weights;
    other_macs: those of what is not cut.
    The parts of an upload are the blocks, for tensors cut along one dimension, then for each pair of spaces between
    which there are weights its tiles, (groups of the rows, groups of the columns): a batch touches those whose both
    sides are kept, which over several batches make no rectangle.
    """

    spaces: tuple[Space, ...]
    tensors: tuple[CutTensor, ...]
    outputs: tuple[Gated, ...]
    weights_gated: tuple[Gated, ...]
    attentions: tuple[Gated, ...]
    counters: tuple[Counter, ...]
    unit_macs: tuple[tuple[int, int], ...]
    other_macs: int

    # --- blocks and parts

    @cached_property
    def blocks(self) -> int:  # type: ignore[override]
        return sum(space.groups for space in self.spaces)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """(L,) of each block: the layer that writes its space first, and the group's number."""
        return tuple(f"{space.name}.{g}" for space in self.spaces for g in range(space.groups))

    @cached_property
    def forced(self) -> Bools:  # type: ignore[override]
        mask = np.zeros(self.blocks, bool)
        for space in self.spaces:
            mask[space.members if space.scaled else space.first_block] = True
        return mask

    @cached_property
    def tiles(self) -> dict[tuple[int, int], slice]:
        """By pair of spaces, where its tiles lie among the parts."""
        pairs = dict.fromkeys(t.spaces for t in self.tensors if WHOLE not in t.spaces)
        places, start = {}, self.blocks
        for a, b in pairs:
            end = start + self.spaces[a].groups * self.spaces[b].groups
            places[a, b] = slice(start, end)
            start = end
        return places

    @cached_property
    def parts(self) -> int:  # type: ignore[override]
        return max([self.blocks, *(int(place.stop) for place in self.tiles.values())])

    def touched(self, kept: Bools) -> Bools:
        groups = [kept[space.members] for space in self.spaces]
        return np.concatenate([kept, *(np.outer(groups[a], groups[b]).ravel() for a, b in self.tiles)])

    def blocks_of(self, touched: Bools) -> Bools:
        return touched[: self.blocks].copy()

    # --- costs

    @cached_property
    def _members(self) -> Floats:
        """(L + 1, spaces + 1): units that a block adds to a space; the last of each stands for what is not cut."""
        out = np.zeros((self.blocks + 1, len(self.spaces) + 1))
        for i, space in enumerate(self.spaces):
            out[space.members, i] = space.sizes
        out[-1, -1] = 1
        return out

    @cached_property
    def _tables(self) -> dict[str, Floats]:
        """By cost, (L + 1, L + 1): entry a, b is what two kept blocks cost together. Integers, exact in float64."""
        return {cost: self._members @ self._products(cost) @ self._members.T for cost in COSTS}

    @cached_property
    def _both_ways(self) -> dict[str, tuple[Floats, Floats]]:
        """By cost, (L + 1, L + 1) what two kept blocks cost together in either order, and (L + 1,) each with itself."""
        return {cost: (table + table.T, np.diagonal(table).copy()) for cost, table in self._tables.items()}

    def _products(self, cost: str) -> Floats:
        """(spaces + 1, spaces + 1): what a pair of kept units costs."""
        out = np.zeros((len(self.spaces) + 1, len(self.spaces) + 1))
        for tensor in self.tensors:
            units = [1 if space == WHOLE else self.spaces[space].units for space in tensor.spaces]
            out[tensor.spaces] += self._price(tensor, cost) * tensor.numel // (units[0] * units[1])
        if cost == "multiply_adds":
            out[-1, -1] += self.other_macs
            for space, macs in self.unit_macs:
                out[space, -1] += macs
        elif cost == "bytes":
            out[-1, -1] += -(-self.parts // 8)
        return out

    def _price(self, tensor: CutTensor, cost: str) -> int:
        """Of one scalar."""
        return {"parameters": int(tensor.trainable), "multiply_adds": tensor.uses, "bytes": 4}[cost]

    def weights(self, cost: str) -> Ints:
        _check_cost(cost)
        return self._weights[cost]

    @cached_property
    def _weights(self) -> dict[str, Ints]:
        found = {cost: self._own_weights(cost) for cost in COSTS}
        for weights in found.values():
            weights.setflags(write=False)
        return found

    def _own_weights(self, cost: str) -> Ints:
        row = np.zeros(len(self.spaces), np.int64)  # of one unit
        for tensor in self.tensors:
            if tensor.owning is not None:
                space = tensor.owning.space
                row[space] += self._price(tensor, cost) * tensor.numel // self.spaces[space].units
        for i, macs in self.unit_macs if cost == "multiply_adds" else ():
            row[i] += macs
        return np.concatenate([row[i] * space.sizes for i, space in enumerate(self.spaces)])

    def spent(self, kept: Bools, cost: str = "parameters") -> int:
        _check_cost(cost)
        chosen = self._chosen(kept)
        return int(chosen @ self._tables[cost] @ chosen)

    def added(self, kept: Bools, cost: str = "parameters") -> Floats:
        _check_cost(cost)
        table, own = self._both_ways[cost]
        more: Floats = (table @ self._chosen(kept) + own)[:-1]
        return more

    def _chosen(self, kept: Bools) -> Floats:
        """(L + 1,) 1 for what a kept set uses: its blocks, and what is not cut."""
        chosen = np.ones(self.blocks + 1)
        chosen[:-1] = kept
        return chosen

    def units_kept(self, kept: Bools) -> Ints:
        """(spaces,) how many units of each are kept."""
        return np.array([int(kept[space.members] @ space.sizes) for space in self.spaces], np.int64)

    def price_class(self, kept: Bools) -> bytes:
        """What there is of each space decides: which units these are costs nothing."""
        return self.units_kept(kept).tobytes()

    def densities(self, kept: Bools) -> Mapping[str, tuple[float, float]]:
        shares = [int(n) / space.units for n, space in zip(self.units_kept(kept), self.spaces, strict=True)]
        shares.append(1.0)  # of what is not cut
        weights: dict[str, tuple[float, int]] = {}  # by layer: kept and all scalars of its weights
        outputs: dict[str, float] = {}
        for tensor in self.tensors:
            if not tensor.cut:
                continue
            a, b = tensor.spaces
            kept_before, all_before = weights.get(tensor.layer, (0.0, 0))
            if tensor.name.rpartition(".")[2].startswith("weight"):
                kept_before += tensor.numel * shares[a] * shares[b]
                all_before += tensor.numel
            weights[tensor.layer] = (kept_before, all_before)
            outputs[tensor.layer] = 1.0 if tensor.owning is None else shares[tensor.owning.space]
        return {name: (round(k) / n if n else outputs[name], outputs[name]) for name, (k, n) in weights.items()}

    # --- where the parts lie

    def regions(self, touched: Bools) -> Sequence[ChannelRegion]:
        """The touched parts of all tensors, what is never cut first. Rows with the same touched columns are one."""
        out = [ChannelRegion(t.name, None, None) for t in self.tensors if not t.cut]
        for tensor in self.tensors:
            if tensor.cut:
                out += self._regions(tensor, touched)
        return out

    def _regions(self, tensor: CutTensor, touched: Bools) -> list[ChannelRegion]:
        marks = self._marks(tensor, touched)
        if marks.ndim == 1:
            return [self._region(tensor, marks, marks)] if marks.any() else []
        patterns = sorted({row.tobytes(): row for row in marks[marks.any(1)]}.items())
        return [self._region(tensor, (marks == pattern).all(1), pattern) for _, pattern in patterns]

    def _marks(self, tensor: CutTensor, by_part: np.ndarray) -> np.ndarray:
        """A tensor's share of a (parts,) array: (groups,) if it is cut along one dimension, else (groups, groups)."""
        a, b = tensor.spaces
        if WHOLE in (a, b):
            return by_part[self.spaces[max(a, b)].members]
        return by_part[self.tiles[a, b]].reshape(self.spaces[a].groups, self.spaces[b].groups)

    def _region(self, tensor: CutTensor, rows: Bools, cols: Bools) -> ChannelRegion:
        """The part between groups of rows and groups of columns."""
        index = [
            None if axis is None else self._runs(axis, marks)
            for axis, marks in zip(tensor.axes, (rows, cols), strict=True)
        ]
        return ChannelRegion(tensor.name, index[0], index[1])

    def spread(self, weights: Floats, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        out = {}
        for tensor in self.tensors:
            if tensor.cut:
                marks = self._marks(tensor, weights)
                for dim, axis in enumerate(tensor.axes):
                    if axis is not None:
                        marks = self._spread(marks, axis, dim if marks.ndim == 2 else 0)
                lengths = [-1 if axis is None else tensor.shape[dim] for dim, axis in enumerate(tensor.axes)]
                lengths = [1 if n == -1 else n for n in lengths[: len(tensor.shape)]]
                out[tensor.name] = torch.from_numpy(marks).reshape(*lengths, *[1] * (len(tensor.shape) - 2))
        return out

    def _spread(self, marks: np.ndarray, axis: Axis, dim: int) -> np.ndarray:
        """Along one dimension, from groups to entries."""
        by_unit = np.repeat(np.moveaxis(marks, dim, -1), self.spaces[axis.space].sizes, axis=-1)
        return np.ascontiguousarray(np.moveaxis(axis.along(by_unit), -1, dim))

    # --- at work

    @cached_property
    def scaled_axes(self) -> tuple[Axis, ...]:
        """The distinct axes along which gates act."""
        return tuple(dict.fromkeys(gated.axis for gated in (*self.outputs, *self.weights_gated, *self.attentions)))

    @cached_property
    def recurrent(self) -> tuple[str, ...]:
        """The modules whose weights are scaled since they feed saturating functions."""
        return tuple(dict.fromkeys(gated.name.rpartition(".")[0] for gated in self.weights_gated))

    @cached_property
    def folded(self) -> dict[str, tuple[Gated, ...]]:
        """By module of ``outputs``, its rows and biases: scaling them gives the same outputs.

        Only where that is less work: in norms, and where a unit has fewer weights than outputs in a batch.
        """
        own: dict[str, list[CutTensor]] = {gated.name: [] for gated in self.outputs}
        for tensor in self.tensors:
            if tensor.trainable and tensor.owner == 0 and tensor.layer in own:
                own[tensor.layer].append(tensor)
        found = {}
        for name, tensors in own.items():
            work = sum(t.numel // t.shape[0] for t in tensors)
            if tensors and work <= max(2, _BATCH * max(t.uses for t in tensors)):
                axes = ((t, t.axes[0]) for t in tensors)
                found[name] = tuple(Gated(t.name, axis, len(t.shape) - 1) for t, axis in axes if axis is not None)
        return found

    @cached_property
    def _entries(self) -> tuple[Ints, Ints]:
        """The block of each entry of all ``scaled_axes``, one axis after the other, and (axes + 1,) where each begins.

        What is kept of the entries is in the same order.
        """
        blocks = np.arange(self.blocks)
        entries = [
            axis.along(np.repeat(blocks[self.spaces[axis.space].members], self.spaces[axis.space].sizes))
            for axis in self.scaled_axes
        ]
        return np.concatenate(entries), np.cumsum([0, *(len(e) for e in entries)])

    @cached_property
    def _axes(self) -> tuple[Axis, ...]:
        """The distinct axes of all tensors."""
        return tuple(dict.fromkeys(axis for t in self.tensors for axis in t.axes if axis is not None))

    def _runs(self, axis: Axis, groups: Bools) -> Runs | None:
        """The entries of an axis that belong to marked groups of its space; None: all of them."""
        return group_runs(groups.tolist(), self.spaces[axis.space].bounds, axis.repeats, axis.span)

    def select(self, kept: Bools) -> Selection:
        """The indices of a kept set."""
        index: dict[Axis | None, Runs | None] = {
            axis: self._runs(axis, kept[self.spaces[axis.space].members]) for axis in self._axes
        }
        index[None] = None
        regions = tuple(ChannelRegion(t.name, index[t.axes[0]], index[t.axes[1]]) for t in self.tensors)
        blocks, begins = self._entries
        marks = kept[blocks]
        sizes = np.add.reduceat(marks, begins[:-1], dtype=np.int64)
        return Selection(kept.copy(), regions, torch.from_numpy(blocks[marks]), tuple(sizes.tolist()))

    def counts(self, kept: Bools) -> list[tuple[str, str, int]]:
        """(module, attribute, value) of what the modules have to be told of a kept set."""
        units = self.units_kept(kept)
        return [(c.module, c.attribute, int(units[c.space]) * c.times // c.per) for c in self.counters]

    def working(self, task: Task, params: Mapping[str, Tensor], *, train: bool = True) -> CompactModel:
        return CompactModel(self, task, params, train=train)

    def working_kept(self, task: Task, values: Tensor, kept: Bools) -> CompactModel:
        return kept_values(self, task, values, kept)


def structural_cut(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    tokens: bool = False,
    blocks_per_layer: int = BLOCKS_PER_LAYER,
    max_block_frac: float = MAX_BLOCK_FRAC,
    keep_uncuttable: bool = False,
    class_gates: bool = False,
) -> GroupCut:
    """Cut the spaces of a model into groups of near-equal size.

    A space gets ``blocks_per_layer`` groups, or as many as it takes until no block's nominal size exceeds
    ``max_block_frac`` of the model's trainable scalars; groups of a convolution are multiples of ALIGN channels where
    that leaves four of them and ``blocks_per_layer`` is at most ALIGN. input_shape: of one example, of int64 if
    ``tokens``. keep_uncuttable: keep whole, without a gate, what cannot be cut. class_gates: each class, which is never
    dropped, has a gate too. Raises UserError, naming the layer, for what cannot be cut otherwise, for a model of which
    nothing is left to cut, and for logits that cannot be scaled.
    """
    if blocks_per_layer < 1 or not 0 < max_block_frac <= 1:
        raise UserError(
            "blocks_per_layer must be at least 1 and max_block_frac in (0, 1], "
            f"got {blocks_per_layer} and {max_block_frac}"
        )
    found = find_spaces(model, tuple(input_shape), tokens=tokens, keep=keep_uncuttable, class_gates=class_gates)
    limit = max_block_frac * sum(t.numel for t in found.tensors if t.trainable)
    spaces: list[Space] = []
    block = 0
    for i, (name, units, multiple, scaled) in enumerate(found.spaces):
        if scaled:
            bounds = tuple(range(0, units + 1, multiple))
        else:
            multiple = _aligned(model.get_submodule(name), units, multiple, blocks_per_layer)
            bounds = _group_bounds(units, found.row(i), multiple, blocks_per_layer, limit)
        spaces.append(Space(name, bounds, block, scaled))
        block += spaces[-1].groups
    macs = sum(layer.macs for layer in trace(model, input_shape, tokens=tokens))
    macs -= sum(t.uses * t.numel for t in found.tensors)
    macs -= sum(per_unit * spaces[i].units for i, per_unit in found.unit_macs)
    return GroupCut(
        tuple(spaces),
        found.tensors,
        found.outputs,
        found.weights_gated,
        found.attentions,
        found.counters,
        found.unit_macs,
        macs,
    )


def _aligned(module: nn.Module, units: int, multiple: int, blocks_per_layer: int) -> int:
    """Of what all bounds of a space are multiples: of ``ALIGN`` channels for convolutions, if that leaves four groups.

    Dense kernels compute eight floats at a time; a convolution between odd numbers of channels takes longer than one
    between the next multiples of eight. Not where finer groups are asked for.
    """
    together = math.lcm(multiple, ALIGN)
    aligned = isinstance(module, nn.Conv1d | nn.Conv2d) and units % together == 0 and units // together >= 4
    return together if aligned and blocks_per_layer <= ALIGN else multiple


def _group_bounds(units: int, row: int, multiple: int, blocks_per_layer: int, limit: float) -> tuple[int, ...]:
    """Bounds of near-equal groups: ``blocks_per_layer`` of them, or as many as it takes until none exceeds ``limit``.

    row: what one unit costs. multiple: of which all bounds are multiples. Group g of B covers the units from
    round(g * units / B); at most one group for each ``multiple`` units.
    """
    steps = units // multiple
    for groups in range(min(blocks_per_layer, steps), steps):
        bounds = _bounds(steps, groups)
        if max(b - a for a, b in pairwise(bounds)) * multiple * row <= limit:
            break
    else:
        bounds = _bounds(steps, steps)
    return tuple(multiple * b for b in bounds)


def _bounds(units: int, groups: int) -> tuple[int, ...]:
    return tuple(round(g * units / groups) for g in range(groups + 1))


def _check_cost(cost: str) -> None:
    if cost not in COSTS:
        raise unknown("cost", cost, COSTS)
