"""A model of which each batch trains a part: lazy SGD on compact tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsparse.sparse.blocks import Bools, ChannelPlan
from fedsparse.sparse.channels import Params, Selection, gather, scatter_, select
from fedsparse.sparse.codec import tile_count, tiles


class CompactModel:
    """Owns a copy of a model's tensors and the compact tensors of the blocks in use.

    ``leaves`` are the compact trainable tensors (in the order of ``trainable``) and ``velocity`` their momentum
    buffers, for an optimiser that updates both in place; ``tensors`` are all compact tensors, leaves and buffers, to
    be bound to the network. ``touched``: (tiles,) what any batch has used. Weights that no batch uses keep their bits.
    """

    def __init__(self, params: Mapping[str, Tensor], plan: ChannelPlan, trainable: Sequence[str]) -> None:
        self.params = {name: t.detach().clone() for name, t in params.items()}
        self.plan = plan
        self.trainable = tuple(trainable)
        self.touched = np.zeros(tile_count(plan), bool)
        self.selection: Selection | None = None
        self.tensors: Params = {}
        self.leaves: list[Tensor] = []
        self.velocity: list[Tensor] = []
        self._momentum: Params = {}  # of all trainable tensors, whole; made when the kept set first changes

    def use(self, kept: Bools) -> Selection:
        """Make the kept set, (L,) bool, the part in use. Costs nothing while it stays the same."""
        if self.selection is not None and np.array_equal(kept, self.selection.kept):
            return self.selection
        self.flush()
        self.selection = select(self.plan, kept)
        self.tensors = gather(self.params, self.selection)
        self.leaves = [self.tensors[name].requires_grad_() for name in self.trainable]
        self.velocity = list(gather(self._momentum, self.selection).values())
        self.touched |= tiles(self.plan, kept)
        return self.selection

    def flush(self) -> None:
        """Write what was trained back into ``params``, and the momentum into its buffer."""
        if self.selection is None:
            return
        scatter_(self.params, self.selection, self.tensors)
        if self.velocity:
            self._momentum = self._momentum or {name: torch.zeros_like(self.params[name]) for name in self.trainable}
            scatter_(self._momentum, self.selection, dict(zip(self.trainable, self.velocity, strict=True)))
