"""The structural cut: contiguous groups of channels or hidden units, one gated block each.

Source: pFedGate (arXiv 2305.02776) leaves the cut open; flat chunks of a tensor cannot be skipped by a kernel, whole
channel groups can. A block owns its rows of a layer's weight, their biases and the entries of the norm that follows.
The columns that a dropped group would feed are dead, so the *effective* size of a model is a sum of products of
neighbours; the *nominal* size of a block counts its whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedsparse.errors import UserError

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
BLOCKS_PER_LAYER = 5  # the paper's split factor B
MAX_BLOCK_FRAC = 0.05  # of the model; larger blocks leave the knapsack no choice
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Channel by channel, and 0 stays 0: what a dropped channel would have fed forward is nothing.
_CHANNELWISE = (
    nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.Identity, nn.Flatten,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
_WORKS = "a chain of Conv, BatchNorm, ReLU, pooling, Flatten and Linear layers such as mlp, cnn, lenet or vgg11"


@dataclass(frozen=True)
class CutLayer:
    """A layer whose outputs fall into groups.

    weight: name of the tensor (units, inputs * span, *kernel). vectors: names of the tensors with one entry a unit:
    bias, affine terms and statistics of the norm that follows; the first ``affine`` of them are trainable.
    bounds, in_bounds: first unit of each group, then the number of units; of the outputs and of the inputs.
    span: columns that one input unit owns (after a flatten, its height x width). kernel: scalars per row and column.
    first_block: index of group 0 among the plan's blocks; -1 for the classifier, which keeps all rows, ungated.
    """

    name: str
    norm: str
    weight: str
    vectors: tuple[str, ...]
    affine: int
    bounds: tuple[int, ...]
    in_bounds: tuple[int, ...]
    span: int
    kernel: int
    first_block: int

    @property
    def units(self) -> int:
        return self.bounds[-1]

    @property
    def inputs(self) -> int:
        return self.in_bounds[-1]

    @property
    def groups(self) -> int:
        return len(self.bounds) - 1

    @property
    def row(self) -> int:
        """Trainable scalars of one unit with all its inputs."""
        return self.inputs * self.span * self.kernel + self.affine

    @cached_property
    def group_sizes(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.bounds))

    def count(self, units: int, inputs: int) -> int:
        """Trainable scalars of ``units`` kept outputs fed by ``inputs`` kept input units."""
        return units * (inputs * self.span * self.kernel + self.affine)


@dataclass(frozen=True)
class ChannelPlan:
    """How a chain model is cut. ``layers``: in forward order, the classifier last. ``uncut``: tensors of no layer.

    ``uncut_count``: trainable scalars among the uncut. Blocks are numbered layer by layer, group by group.
    A kept set is a (blocks,) bool array; group 0 of each layer must be in it.
    """

    layers: tuple[CutLayer, ...]
    uncut: tuple[str, ...]
    uncut_count: int

    @cached_property
    def blocks(self) -> int:
        """L, the number of gated blocks."""
        return sum(layer.groups for layer in self.hidden)

    @property
    def hidden(self) -> tuple[CutLayer, ...]:
        """The layers that are cut along their outputs: all but the classifier."""
        return self.layers[:-1]

    @cached_property
    def total(self) -> int:
        """d, the trainable scalars of the dense model."""
        return self.uncut_count + sum(layer.units * layer.row for layer in self.layers)

    @cached_property
    def nominal(self) -> Ints:
        """(L,) trainable scalars of each block: whole rows, biases and norm terms."""
        return np.array([n * layer.row for layer in self.hidden for n in layer.group_sizes], np.int64)

    @cached_property
    def forced(self) -> Bools:
        """(L,) the blocks that are always kept: group 0 of each layer."""
        mask = np.zeros(self.blocks, bool)
        mask[[layer.first_block for layer in self.hidden]] = True
        return mask

    @cached_property
    def nominal_forced(self) -> int:
        """Trainable scalars outside the choice: forced blocks, the classifier, all that is uncut."""
        head = self.layers[-1]
        return int(self.nominal[self.forced].sum()) + head.units * head.row + self.uncut_count

    @cached_property
    def smallest(self) -> int:
        """Effective size of the smallest possible model."""
        return self.effective(self.forced)

    def groups_kept(self, kept: Bools) -> tuple[Bools, ...]:
        """Per layer of ``layers``, which of its groups are kept."""
        hidden = tuple(kept[layer.first_block : layer.first_block + layer.groups] for layer in self.hidden)
        return (*hidden, np.ones(1, bool))

    def units_kept(self, kept: Bools) -> list[int]:
        """Per layer of ``layers``, how many units are kept."""
        groups = self.groups_kept(kept)
        return [int(np.dot(g, layer.group_sizes)) for g, layer in zip(groups, self.layers, strict=True)]

    def effective(self, kept: Bools) -> int:
        """Distinct trainable scalars that the kept set uses: kept outputs x kept inputs x kernel, plus vectors."""
        units = self.units_kept(kept)
        inputs = [self.layers[0].inputs, *units[:-1]]
        return self.uncut_count + sum(la.count(u, i) for la, u, i in zip(self.layers, units, inputs, strict=True))

    def cut(self, kept: Bools) -> Mapping[str, tuple[float, float]]:
        """The kept set as ``fedsparse.cost`` takes it: layer -> (density of its weight, density of its outputs)."""
        cut, before = {}, 1.0
        for layer, units in zip(self.layers, self.units_kept(kept), strict=True):
            share = units / layer.units
            cut[layer.name] = (share * before, share)
            if layer.norm:
                cut[layer.norm] = (share, share)
            before = share
        return cut


def channel_plan(
    model: nn.Module, *, blocks_per_layer: int = BLOCKS_PER_LAYER, max_block_frac: float = MAX_BLOCK_FRAC
) -> ChannelPlan:
    """Cut the outputs of every hidden layer of a chain model into groups of near-equal size.

    A layer gets ``blocks_per_layer`` groups, or as many as it takes until no group's whole rows exceed
    ``max_block_frac`` of the model's trainable scalars, at most one group a unit. Group g of B covers the units from
    round(g * O / B). Raises UserError, naming the layer, for a model that is no such chain or has no hidden layer.
    """
    if blocks_per_layer < 1 or not 0 < max_block_frac <= 1:
        raise UserError(
            "blocks_per_layer must be at least 1 and max_block_frac in (0, 1], "
            f"got {blocks_per_layer} and {max_block_frac}"
        )
    chain, uncut = _walk(model)
    if len(chain) < 2:
        raise _cannot("a model without a hidden layer")
    limit = max_block_frac * sum(p.numel() for p in model.parameters())
    modules = _children(model)
    layers: list[CutLayer] = []
    block = 0
    in_bounds: tuple[int, ...] = (0, _weight_shape(modules[chain[0][0]])[1])
    for name, norm in chain[:-1]:
        layer = _layer(name, norm, modules, in_bounds)
        groups = _group_count(layer.units, layer.row, blocks_per_layer, limit)
        layers.append(replace(layer, bounds=_bounds(layer.units, groups), first_block=block))
        block, in_bounds = block + groups, layers[-1].bounds
    layers.append(_layer(*chain[-1], modules, in_bounds))
    names = tuple(n for m in uncut for n, _ in _tensors(m, modules[m]))
    return ChannelPlan(tuple(layers), names, sum(p.numel() for m in uncut for p in modules[m].parameters()))


def _children(model: nn.Module) -> dict[str, nn.Module]:
    """The children in forward order, also those that stand in the chain twice."""
    return {name: module for name, module in model._modules.items() if module is not None}


def _walk(model: nn.Module) -> tuple[list[tuple[str, str]], list[str]]:
    """The (layer, its norm or "") pairs of a chain in forward order, and the norms that belong to no layer."""
    if not isinstance(model, nn.Sequential):
        raise _cannot(f"a {type(model).__name__}")
    chain: list[tuple[str, str]] = []
    uncut: list[str] = []
    previous = ""
    for name, module in _children(model).items():
        if isinstance(module, _WEIGHTED):
            _check_weighted(name, module)
            chain.append((name, ""))
        elif isinstance(module, _NORMS) and not chain:
            uncut.append(name)
        elif isinstance(module, _NORMS) and previous == chain[-1][0]:
            chain[-1] = (previous, name)
        elif not isinstance(module, _CHANNELWISE):
            raise _cannot(f"layer {name!r} ({type(module).__name__})")
        previous = name
    if chain and chain[-1][1]:
        raise _cannot(f"layer {chain[-1][1]!r}, a norm after the classifier")
    return chain, uncut


def _cannot(what: str) -> UserError:
    return UserError(f"pFedGate cannot cut {what}; it works for {_WORKS}")


def _check_weighted(name: str, module: nn.Module) -> None:
    if getattr(module, "groups", 1) != 1:
        raise _cannot(f"layer {name!r}, a grouped convolution")


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.weight.shape)  # type: ignore[arg-type]


def _layer(name: str, norm: str, modules: Mapping[str, nn.Module], in_bounds: tuple[int, ...]) -> CutLayer:
    """The layer, not yet cut: one group of all its units."""
    shape = _weight_shape(modules[name])
    span, rest = divmod(shape[1], in_bounds[-1])
    if rest or span < 1:
        raise _cannot(f"layer {name!r}, with {shape[1]} inputs from {in_bounds[-1]} channels")
    tensors = [t for t in _tensors(name, modules[name]) if not t[0].endswith(".weight")]
    tensors += _tensors(norm, modules[norm]) if norm else []
    trainable = [n for n, is_parameter in tensors if is_parameter]
    buffers = [n for n, is_parameter in tensors if not is_parameter]
    return CutLayer(
        name=name,
        norm=norm,
        weight=f"{name}.weight",
        vectors=(*trainable, *buffers),
        affine=len(trainable),
        bounds=(0, shape[0]),
        in_bounds=in_bounds,
        span=span,
        kernel=int(np.prod(shape[2:], dtype=np.int64)),
        first_block=-1,
    )


def _tensors(name: str, module: nn.Module) -> list[tuple[str, bool]]:
    """(full name, whether it is trained) of a leaf module's tensors; batch counters are not among them."""
    named = [(f"{name}.{key}", True) for key, _ in module.named_parameters()]
    return named + [(f"{name}.{key}", False) for key, t in module.named_buffers() if t.ndim]


def _group_count(units: int, row: int, least: int, limit: float) -> int:
    """The smallest number of groups, at least ``least``, of which none exceeds ``limit`` scalars."""
    for groups in range(min(least, units), units):
        if max(b - a for a, b in pairwise(_bounds(units, groups))) * row <= limit:
            return groups
    return units


def _bounds(units: int, groups: int) -> tuple[int, ...]:
    return tuple(round(g * units / groups) for g in range(groups + 1))
