"""Methods whose mask is found before round 1 and never changes: what their server halves share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsparse.client import check_positive
from fedsparse.cost import train_flops
from fedsparse.globalmask import (
    GlobalMaskStrategy,
    MaskedState,
    SharedMask,
    averaged,
    check_densities,
    masked_packet,
    prunable,
    ranked_groups,
)
from fedsparse.packet import Packet
from fedsparse.sparse.masks import Mask, compact
from fedsparse.sparse.pruning import RANKINGS, prune_in_steps
from fedsparse.strategy import Reply, State, misfit
from fedsparse.task import Device, Params, Task


@dataclass
class FixedMaskStrategy(GlobalMaskStrategy):
    """Abstract: the server finds a mask for the initial parameters; then the weighted mean of compact models."""

    client: ClassVar[str] = "fixed_mask"

    @abstractmethod
    def find_mask(self, task: Task, params: Params) -> Mask:
        """The positions that are kept of each weight that may be pruned. Raises UserError where that cannot be."""

    def begin(self, task: Task, devices: Sequence[Device]) -> State:
        params = task.init_params()
        shared = SharedMask.first(self.find_mask(task, params), task, devices, self.client_config)
        return MaskedState(compact(params, shared.mask), shared=shared)

    def broadcast(self, state: State, device: Device) -> Packet:
        assert isinstance(state, MaskedState)
        return masked_packet("train", state.params, state.shared, device)

    def complaint(self, task: Task, state: State, reply: Reply) -> str:
        assert isinstance(state, MaskedState)
        return misfit(reply.packet, "update", state.common)

    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        assert isinstance(state, MaskedState)
        return averaged(self.rule, task, state, replies)


@dataclass
class RankedMask(FixedMaskStrategy):
    """Abstract: the mask of the largest scores, found in steps.

    layer_densities: "global" (all layers are ranked together), or "uniform", "er" or "erk": ranked within each layer.
    steps: in which pruning is done, the density falling exponentially; scores are taken anew, without what is pruned,
    at each.
    """

    layer_densities: str = "global"
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_densities(self.density, self.density_kind, self.layer_densities, RANKINGS)
        check_positive(steps=self.steps)

    @abstractmethod
    def scores(self, task: Task, params: Params, kept: Mask) -> Mapping[str, Tensor]:
        """Of the kept weights of whole ``params``: name -> (kept,), larger = kept longer."""

    @property
    @abstractmethod
    def scored_examples(self) -> int:
        """Examples of which ``scores`` makes a forward and a backward pass."""

    def find_mask(self, task: Task, params: Params) -> Mask:
        groups = ranked_groups(task, self.density, self.density_kind, self.layer_densities)
        return prune_in_steps(lambda kept: self.scores(task, params, kept), prunable(task).sizes, groups, self.steps)

    def server_flops(self, task: Task, state: State) -> float:
        """At each step a training pass of the dense model over the scored examples; 0 where all weights are kept."""
        assert isinstance(state, MaskedState)
        return train_flops(prunable(task).layers, self.steps * self.scored_examples) if state.shared.mask else 0.0
