"""How tensors follow spaces of units: channels or hidden units that several tensors share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

WHOLE = -1  # stands for no space


@dataclass(frozen=True)
class Axis:
    """How a dimension follows a space: ``repeats`` copies of all units one after the other, ``span`` entries a unit.

    repeats: stacked gates of a recurrent layer. span: after a flatten, the height x width of a channel.
    """

    space: int
    repeats: int = 1
    span: int = 1

    def along(self, per_unit: np.ndarray) -> np.ndarray:
        """(..., units) -> (..., entries of the dimension)."""
        spread = np.repeat(per_unit, self.span, axis=-1)
        return np.tile(spread, (1,) * (spread.ndim - 1) + (self.repeats,))


@dataclass(frozen=True)
class CutTensor:
    """A tensor of the model. axes: of its first two dimensions; None = not cut along it.

    owner: the dimension along which blocks own it; None: it belongs to none. trainable: a parameter, not a statistic.
    uses: multiply-adds per scalar and example.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis | None, Axis | None] = (None, None)
    owner: int | None = None
    trainable: bool = True
    uses: int = 0

    @property
    def layer(self) -> str:
        return self.name.rpartition(".")[0]

    @cached_property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def cut(self) -> bool:
        return self.axes != (None, None)

    @property
    def spaces(self) -> tuple[int, int]:
        """Of its first two dimensions; -1 = none."""
        first, second = (WHOLE if axis is None else axis.space for axis in self.axes)
        return first, second

    @property
    def owning(self) -> Axis | None:
        """The axis along which blocks own it."""
        return None if self.owner is None else self.axes[self.owner]


@dataclass(frozen=True)
class Gated:
    """Where a gate acts: on the outputs of a module, or on a weight, along an axis with ``trailing`` ones after it."""

    name: str
    axis: Axis
    trailing: int


@dataclass(frozen=True)
class Counter:
    """An attribute of a module that counts what is kept: units of a space x ``times`` / ``per``."""

    module: str
    attribute: str
    space: int
    times: int = 1
    per: int = 1


@dataclass(frozen=True)
class Found:
    """What a model consists of; see :class:`fedsparse.sparse.blocks.GroupCut`.

    spaces: (first layer that writes it, units, of which all bounds must be multiples, whether it is only scaled).
    """

    spaces: tuple[tuple[str, int, int, bool], ...]
    tensors: tuple[CutTensor, ...]
    outputs: tuple[Gated, ...]
    weights_gated: tuple[Gated, ...]
    attentions: tuple[Gated, ...]
    counters: tuple[Counter, ...]
    unit_macs: tuple[tuple[int, int], ...]

    def row(self, space: int) -> int:
        """Trainable scalars of one unit of a space, with all of its inputs."""
        owned = [t for t in self.tensors if t.trainable and t.owning is not None and t.owning.space == space]
        return sum(t.numel for t in owned) // self.spaces[space][1]
