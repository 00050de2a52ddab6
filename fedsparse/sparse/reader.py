"""What has been read of a model's graph so far: spaces of units, and tensors that follow them.

A layer that computes (convolution, linear, embedding, recurrent) writes a new space of units; norms, activations, pools
and flattening hand a space on; an addition makes one space of two. What is dropped from a space is nothing downstream,
so only operations that keep channels apart and 0 at 0 may read it. Spaces that must stay whole are *pinned*, or *only
scaled*: the classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from fedsparse.errors import UserError
from fedsparse.sparse.spaces import Axis, Counter, CutTensor, Found, Gated

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)
_NOWHERE = -1  # a space that is never pinned: what reaches it is always named


@dataclass(frozen=True)
class Act:
    """A tensor whose dimension ``dim`` follows a space, as an axis; ``shape``: for a batch of one."""

    space: int
    dim: int
    shape: tuple[int, ...]
    repeats: int = 1
    span: int = 1

    @property
    def axis(self) -> Axis:
        return Axis(self.space, self.repeats, self.span)

    @property
    def trailing(self) -> int:
        """Dimensions after ``dim``."""
        return len(self.shape) - 1 - self.dim

    def like(self, other: Act) -> bool:
        """Whether each entry of one meets the same unit of the other."""
        return (self.dim, self.shape, self.repeats, self.span) == (other.dim, other.shape, other.repeats, other.span)


# What a node makes: a tensor that follows a space, several values, or (None) something whole.
Value = Act | None | tuple["Value", ...]


class UncutError(Exception):
    """A node cannot be cut; the reason, if there is more to say than its name."""


@dataclass
class _Space:
    name: str
    units: int
    parent: int
    multiple: int = 1
    pinned: bool = False
    scaled: bool = False


@dataclass
class _Layer:
    """A module with parameters as it has been used so far. out: the space that it writes or hands on."""

    source: Act | None
    out: int
    tensors: list[CutTensor]


@dataclass
class Reader:
    """shapes: by node, of what it makes of one example. values: by node that has been read."""

    model: nn.Module
    shapes: dict[fx.Node, Any]
    values: dict[fx.Node, Value] = field(default_factory=dict)
    layers: dict[str, _Layer] = field(default_factory=dict)
    counters: list[Counter] = field(default_factory=list)
    weights_gated: list[Gated] = field(default_factory=list)
    attentions: list[Gated] = field(default_factory=list)
    unit_macs: list[tuple[int, int]] = field(default_factory=list)
    _outputs: dict[str, Gated] = field(default_factory=dict)
    _spaces: list[_Space] = field(default_factory=list)
    _culprits: list[tuple[str, list[int]]] = field(default_factory=list)

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.model.get_submodule(str(node.target))

    # --- spaces

    def new(self, name: str, units: int) -> int:
        """A space that the layer ``name`` writes."""
        self._spaces.append(_Space(name, units, len(self._spaces)))
        return len(self._spaces) - 1

    def _root(self, space: int) -> int:
        while self._spaces[space].parent != space:
            space = self._spaces[space].parent
        return space

    def unite(self, a: int, b: int) -> None:
        """Make one space of two."""
        first, second = sorted((self._root(a), self._root(b)))
        if first != second:
            one, other = self._spaces[first], self._spaces[second]
            other.parent = first
            one.multiple = math.lcm(one.multiple, other.multiple)
            one.pinned |= other.pinned
            one.scaled |= other.scaled

    def pin(self, space: int) -> None:
        """Keep a space whole."""
        self._spaces[self._root(space)].pinned = True

    def only_scale(self, space: int) -> None:
        """Keep all units of a space, each with a gate."""
        self._spaces[self._root(space)].scaled = True

    def bind(self, space: int, multiple: int) -> None:
        """Let all bounds of a space be multiples."""
        root = self._spaces[self._root(space)]
        root.multiple = math.lcm(root.multiple, multiple)

    def blame(self, what: str, spaces: Iterable[int], *, always: bool = False) -> None:
        """Note what cannot be cut and the spaces that must stay whole for it; ``always``: even if there is none."""
        self._culprits.append((what, [*spaces, *([_NOWHERE] if always else [])]))

    # --- layers

    def again(self, name: str, source: Act | None) -> int | None:
        """The space that a layer writes if it has been used before; both uses read the same space then."""
        if name not in self.layers:
            return None
        layer = self.layers[name]
        before = layer.source
        if before is not None and source is not None and before.axis == replace(source.axis, space=before.space):
            self.unite(before.space, source.space)
        elif before is not None or source is not None:
            raise UncutError("used more than once, with different inputs")
        return layer.out

    def record(self, name: str, source: Act | None, out: int, tensors: list[CutTensor]) -> None:
        """Note a use of a layer; multiply-adds of several uses add up."""
        if name in self.layers:
            old = self.layers[name].tensors
            tensors = [replace(t, uses=t.uses + o.uses) for t, o in zip(tensors, old, strict=True)]
        self.layers[name] = _Layer(source, out, tensors)

    def gate(self, node: fx.Node, name: str, act: Act) -> None:
        """Scale a module's outputs, unless nothing but norms reads them, which are scaled instead."""
        users = [self.module(user) if user.op == "call_module" else None for user in node.users]
        if not users or not all(isinstance(user, NORMS) for user in users):
            self.scale(name, act)

    def scale(self, name: str, act: Act) -> None:
        """Scale a module's outputs."""
        gated = Gated(name, act.axis, act.trailing)
        if self._outputs.setdefault(name, gated).trailing != act.trailing:
            raise UncutError("used more than once, on tensors with other axes")

    # --- the result

    def result(self, *, keep: bool) -> Found:
        """keep: pin what cannot be cut, else raise UserError for it."""
        for what, spaces in self._culprits:
            if not keep and any(s == _NOWHERE or not self._spaces[self._root(s)].pinned for s in spaces):
                raise cannot_cut(f'{what}; method.uncut = "keep" keeps it whole, and what it reads')
        for space in {space for _, reached in self._culprits for space in reached} - {_NOWHERE}:
            self.pin(space)
        free = [i for i, space in enumerate(self._spaces) if space.parent == i and not space.pinned]
        if all(self._spaces[i].scaled for i in free):
            raise cannot_cut("this model: nothing is left" if self._culprits else "a model without a hidden layer")
        number = {i: free.index(self._root(i)) for i in range(len(self._spaces)) if self._root(i) in free}
        return Found(
            tuple((s.name, s.units, s.multiple, s.scaled) for s in map(self._spaces.__getitem__, free)),
            tuple(_numbered(t, number) for t in self._all_tensors()),
            _numbered_gates(self._outputs.values(), number),
            _numbered_gates(self.weights_gated, number),
            _numbered_gates(self.attentions, number),
            tuple(replace(c, space=number[c.space]) for c in self.counters if c.space in number),
            tuple((number[space], macs) for space, macs in self.unit_macs if space in number),
        )

    def _all_tensors(self) -> Iterator[CutTensor]:
        """Those of layers that were read, in that order, then the others."""
        seen: set[str] = set()
        for layer in self.layers.values():
            seen.update(t.name for t in layer.tensors)
            yield from layer.tensors
        yield from (t for t in tensors_of("", self.model, recurse=True) if t.name not in seen)


def cannot_cut(what: str) -> UserError:
    return UserError(f'pFedGate cannot cut {what}; method.mode = "paper" does not cut layers')


def acts_in(value: Value) -> list[Act]:
    """All tensors of a value that follow a space."""
    if isinstance(value, tuple):
        return [act for part in value for act in acts_in(part)]
    return [] if value is None else [value]


def tensors_of(name: str, module: nn.Module, *, recurse: bool = False) -> list[CutTensor]:
    """A module's floating tensors, parameters first, not yet cut."""
    prefix = f"{name}." if name else ""
    named: list[tuple[str, Tensor, bool]] = [(key, t, True) for key, t in module.named_parameters(recurse=recurse)]
    named += [(key, t, False) for key, t in module.named_buffers(recurse=recurse) if t.is_floating_point()]
    return [CutTensor(f"{prefix}{key}", tuple(t.shape), trainable=trainable) for key, t, trainable in named]


def _numbered(tensor: CutTensor, number: dict[int, int]) -> CutTensor:
    """With the final numbers of its spaces; those that are kept whole are none."""
    axes = [None if axis is None or axis.space not in number else _renumber(axis, number) for axis in tensor.axes]
    owner = tensor.owner if tensor.owner is not None and axes[tensor.owner] is not None else None
    return replace(tensor, axes=(axes[0], axes[1]), owner=owner)


def _renumber(axis: Axis, number: dict[int, int]) -> Axis:
    return replace(axis, space=number[axis.space])


def _numbered_gates(gates: Iterable[Gated], number: dict[int, int]) -> tuple[Gated, ...]:
    return tuple(replace(g, axis=_renumber(g.axis, number)) for g in gates if g.axis.space in number)
