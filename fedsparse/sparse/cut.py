"""Cut: how the tensors of a model fall into gated blocks, what a kept set of blocks costs, what of it crosses the wire.

There are two kinds: groups of channels, computed as smaller dense layers (:mod:`fedsparse.sparse.blocks`), and chunks
of flattened tensors, which pFedGate's paper and its official code use (:mod:`fedsparse.sparse.flat`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from fedsparse.task import Task

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
COSTS = ("parameters", "multiply_adds", "bytes")  # of a kept set: trainable scalars; per example; of its values


class Region(Protocol):
    """A part of one tensor of the model."""

    @property
    def name(self) -> str:
        """The tensor's."""

    def take(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """The part: in ``out`` where that is given, else a copy, or the tensor itself where the part is all of it."""

    def put_(self, tensor: Tensor, part: Tensor) -> None:
        """Write the part back in place."""

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The part's shape, given that of the tensor."""


class Cut(ABC):
    """A model's blocks. A *kept set* is a (blocks,) bool array that holds all ``forced`` blocks.

    blocks: L. parts: how many parts of the model an upload may hold one by one (bits of its bitmap). forced: (L,) the
    blocks that are always kept.
    """

    blocks: int
    parts: int
    forced: Bools

    @abstractmethod
    def weights(self, cost: str) -> Ints:
        """(L,) what each block costs by itself, with all of its inputs."""

    @abstractmethod
    def spent(self, kept: Bools, cost: str = "parameters") -> int:
        """What a kept set really costs, parts outside all blocks included."""

    def price_class(self, kept: Bools) -> bytes:
        """Kept sets of the same class cost the same, and have the same :meth:`densities`."""
        return kept.tobytes()

    @abstractmethod
    def added(self, kept: Bools, cost: str = "parameters") -> Floats:
        """(L,) by how much each block that is not kept would make a kept set cost more; whole numbers."""

    @abstractmethod
    def densities(self, kept: Bools) -> Mapping[str, tuple[float, float]]:
        """The kept set as ``fedsparse.cost`` takes it: layer -> (density of its weight, density of its outputs)."""

    @abstractmethod
    def touched(self, kept: Bools) -> Bools:
        """(parts,) what a batch with this kept set trains."""

    @abstractmethod
    def blocks_of(self, touched: Bools) -> Bools:
        """(L,) the blocks of which any part is touched; the inverse of ``touched`` for a single kept set."""

    @abstractmethod
    def regions(self, touched: Bools) -> Sequence[Region]:
        """Where the touched parts lie, in the order in which their values are sent."""

    @abstractmethod
    def spread(self, weights: Floats, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """(parts,) -> by tensor, the value of each entry's part, in a shape that broadcasts.

        Tensors that belong to no part (they are always sent) are left out.
        """

    @abstractmethod
    def working(self, task: Task, params: Mapping[str, Tensor], *, train: bool = True) -> Working:
        """The model at work. With ``train`` it owns a copy of ``params``; else it only reads them."""

    @abstractmethod
    def working_kept(self, task: Task, values: Tensor, kept: Bools) -> Working:
        """The model of which only the values of one kept set are there, as they were sent; it can use no other.

        Raises UserError if the values do not fit.
        """

    @property
    def everything(self) -> Bools:
        """The kept set of all blocks."""
        return np.ones(self.blocks, bool)


class Working(ABC):
    """A model of which each batch uses a part. Weights that no batch uses keep their bits.

    params: all tensors (those of the kept set where no others are there); written by ``flush``. touched: (parts,) what
    any batch has trained. leaves: the trainable tensors of the part in use.
    """

    params: dict[str, Tensor]
    touched: Bools
    leaves: list[Tensor]

    @abstractmethod
    def use(self, kept: Bools) -> None:
        """Make the kept set the part in use. Costs nothing while it stays the same."""

    @abstractmethod
    def forward(self, gates: Tensor, x: Tensor) -> Tensor:
        """Logits (n, classes) of the part in use, in the mode (training or not) of the task's model.

        gates: (L,), one factor a block. With all blocks kept and gates of 1 the bits are those of the plain model.
        """

    @abstractmethod
    def step(self, grads: tuple[Tensor, ...], *, lr: float, momentum: float, weight_decay: float, clip: float) -> None:
        """One SGD step of the leaves in place; momentum and weight decay move no weight outside the part in use."""

    @abstractmethod
    def flush(self) -> None:
        """Write what was trained back into ``params``."""

    @abstractmethod
    def values(self) -> Tensor:
        """The touched values in one flat float32 tensor, in the order of ``Cut.regions``."""
