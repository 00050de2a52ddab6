"""Parts of one global sparse model for smaller budgets: of each layer the largest weights that it keeps ("nested").

An extension of FedTiny, not in its paper. A device trains the part of its level; the server averages each weight over
those that hold it, and the running statistics of batch norms over the devices of one level alone (the statistics of one
width are wrong for another: HeteroFL, Diao et al., ICLR 2021, arXiv 2010.01264).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedsparse.aggregation import Aggregation
from fedsparse.globalmask import MaskedState, SharedMask, prunable, unfolded, without_full
from fedsparse.models.norms import statistic_names
from fedsparse.packet import Packet
from fedsparse.regrow import counts_row, named_counts
from fedsparse.sparse.masks import Mask
from fedsparse.sparse.mean import CoordinateMean
from fedsparse.sparse.positions import unpack_positions
from fedsparse.sparse.pruning import Counts, largest, layer_counts, weight_budget
from fedsparse.strategy import Reply
from fedsparse.task import Device, Params, Task

_PASSED = "passed/"  # before the names of packed positions that a device does not search
_COUNTS = "passed"  # how many there are of each weight


@dataclass(frozen=True)
class Level:
    """A part of the global model.

    density: its budget, true. params: compact under shared.mask, with statistics of its own. asked: tensors that go
    along in the next round, see :func:`asked_of`.
    """

    density: float
    params: Params
    shared: SharedMask
    asked: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def common(self) -> Params:
        """Those of the parameters that clients send."""
        return {name: t for name, t in self.params.items() if name not in self.shared.local}


Levels = tuple[Level, ...]


def first_levels(task: Task, devices: Sequence[Device], kept: int, config: Mapping[str, Any]) -> Levels:
    """A level, still empty, for each density budget below the density of a model with so many ``kept`` weights of those
    that may be pruned; the largest first. Devices without such a budget hold the whole model.

    Raises UserError for a budget below what the layers that stay dense need.
    """
    model = prunable(task)
    density = (model.dense + kept) / model.total
    budgets = {d.budget.density for d in devices if d.budget.density is not None}
    below = sorted((b for b in budgets if b < density), reverse=True)
    for budget in below:
        weight_budget(budget, model.sizes, kind="true", dense=model.dense, total=model.total)
    return tuple(Level(b, {}, SharedMask.first({}, task, devices, config)) for b in below)


def level_of(levels: Levels, device: Device) -> Level | None:
    """The level of a device; None: the global model."""
    return next((level for level in levels if level.density == device.budget.density), None)


def chosen(task: Task, params: Mapping[str, Tensor], mask: Mask, levels: Levels) -> Levels:
    """The levels with masks chosen anew from the global model: of each layer its largest weights, in one proportion.

    A level keeps its statistics; one that was empty takes those of the model. A mask that stays the same keeps its
    version.
    """
    values, kept = unfolded(task, params, mask)
    new = []
    for level in levels:
        counts = _counts(task, {name: len(at) for name, at in kept.items()}, level.density)
        best = {name: kept[name][largest(values[name], k).long()] for name, k in counts.items()}
        best = without_full(best, task)
        shared = level.shared if _same(level.shared.mask, best) else level.shared.changed_to(best, task)
        new.append(replace(level, params=level.params or dict(params), shared=shared))
    return refreshed(task, params, mask, tuple(new))


def _same(mask: Mask, best: Mask) -> bool:
    return mask.keys() == best.keys() and all(torch.equal(mask[name], at) for name, at in best.items())


def _counts(task: Task, kept: Mapping[str, int], density: float) -> Counts:
    """Kept weights of each layer in a part of that true density of a model that keeps ``kept``."""
    model = prunable(task)
    budget = weight_budget(density, model.sizes, kind="true", dense=model.dense, total=model.total)
    return layer_counts({name: (k,) for name, k in kept.items()}, "uniform", min(budget, sum(kept.values())))


def refreshed(task: Task, params: Mapping[str, Tensor], mask: Mask, levels: Levels) -> Levels:
    """The levels with the values of the global model, all but the statistics, under the masks that they have."""
    values, kept = unfolded(task, params, mask)
    own = set(itertools.chain(*statistic_names(task)))
    new = []
    for level in levels:
        part = {name: values[name][at] for name, at in _places(kept, level.shared.mask).items()}
        fresh = {name: level.params[name] if name in own else part.get(name, t) for name, t in params.items()}
        new.append(replace(level, params=fresh))
    return tuple(new)


def _places(kept: Mask, mask: Mask) -> dict[str, Tensor]:
    """Where the weights of a part stand among the ``kept`` ones of the model, (n,) int64, without full layers."""
    return {name: torch.searchsorted(kept[name], at) for name, at in mask.items()}


# --- averaging -------------------------------------------------------------------------------------------------------


def averaged_parts(
    rule: Aggregation,
    task: Task,
    state: MaskedState,
    levels: Levels,
    replies: Iterable[Reply],
    see: Callable[[Reply], None],
) -> tuple[Params, SharedMask, Levels]:
    """The global model, who holds its mask, and the levels, after a round; ``see`` gets each reply too.

    A weight is the mean, or what ``rule`` has in its place, over those that hold it and keeps its bits where nobody
    does; statistics are over the devices of a level; all else is over all.
    """
    own = [name for name in itertools.chain(*statistic_names(task)) if name not in state.shared.local]
    values, kept = unfolded(task, state.params, state.shared.mask)
    everything = {name: torch.arange(len(at)) for name, at in kept.items()}
    holders = rule.holders({name: len(at) for name, at in kept.items()})
    keys = (None, *(level.density for level in levels))
    common, statistics = rule.whole(), {key: rule.whole() for key in keys}
    seen: dict[float | None, list[int]] = {key: [] for key in keys}
    for reply in replies:
        level = level_of(levels, reply.device)
        before = (level or state).common
        sent = rule.clipped({name: reply.packet.tensors[name] for name in before}, before)
        places = everything if level is None else {**everything, **_places(kept, level.shared.mask)}
        holders.add({name: sent[name].reshape(-1) for name in places}, places, reply.weight)
        common.add({n: sent[n] for n in state.common if n not in places and n not in own}, reply.weight)
        key = level.density if level else None
        statistics[key].add({n: sent[n] for n in own}, reply.weight)
        seen[key].append(reply.device.id)
        see(reply)
    params = {**common.result(state.params), **_merged(state.params, values, holders)}
    params |= statistics[None].result({n: state.params[n] for n in own})
    shared = state.shared.held_by(seen[None])
    new = tuple(
        replace(
            level,
            params={**level.params, **statistics[level.density].result({n: level.params[n] for n in own})},
            shared=level.shared.held_by(seen[level.density]),
        )
        for level in levels
    )
    return params, shared, refreshed(task, params, shared.mask, new)


def _merged(params: Mapping[str, Tensor], values: Params, holders: CoordinateMean) -> Params:
    """The kept weights, in the shapes that they have in ``params``, with the means of those that anybody holds."""
    new = {}
    for name, old in values.items():
        at, mean = holders.result(name)
        new[name] = old.index_put((at.long(),), mean).view(params[name].shape)
    return new


# --- gradients of pruned weights -------------------------------------------------------------------------------------


def asked_of(task: Task, level: Level, grow: Tensor, shared: SharedMask) -> Level:
    """The level that is asked for ``grow`` gradients of weights that neither it nor the whole model keeps.

    The positions of the whole model in these layers go along: a device of the level does not know them.
    """
    counts = named_counts(grow, prunable(task).weights)
    if not counts:
        return replace(level, asked={})
    rows = counts_row({name: len(shared.mask[name]) for name in counts}, prunable(task).weights)
    return replace(level, asked={"grow": grow, _COUNTS: rows, **{_PASSED + n: shared.packed_of(n) for n in counts}})


def passed_mask(task: Task, packet: Packet) -> dict[str, Tensor]:
    """The same in a packet, unpacked: name -> (n,) int32 positions; {} where there is none."""
    if _COUNTS not in packet.tensors:
        return {}
    model = prunable(task)
    rows = zip(model.sizes.items(), packet.tensors[_COUNTS].tolist(), strict=True)
    return {name: unpack_positions(packet.tensors[_PASSED + name], size, k) for (name, size), k in rows if k}


def level_tensors(levels: Levels) -> dict[str, Tensor]:
    """What the levels are made of, under names of their own."""
    out: dict[str, Tensor] = {}
    for i, level in enumerate(levels):
        out |= {f"level{i}/{name}": t for name, t in {**level.params, **level.shared.tensors()}.items()}
    return out
