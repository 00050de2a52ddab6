"""A fixed mask: FedAvg on one sparse model whose mask is drawn before round 1 and never changes.

The control for every method that searches for a mask: does the search beat these layer densities and this criterion?
Densities ER and ERK: Evci et al. 2020 (RigL, arXiv 1911.11134); magnitude at initialisation as in Frankle et al. 2021
(arXiv 2009.08576). Differs from masked dense training, which is common elsewhere: pruned weights are neither stored,
nor sent, nor updated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedsparse.errors import unknown
from fedsparse.globalmask import SharedMask, check_densities, kept_counts, masked_packet
from fedsparse.packet import Packet
from fedsparse.seeding import torch_rng
from fedsparse.sparse.masks import compact
from fedsparse.sparse.mean import WeightedMean
from fedsparse.sparse.pruning import at_random, largest
from fedsparse.strategy import FederatedStrategy, Reply, State, misfit
from fedsparse.task import Device, Params, Task

CRITERIA = ("random", "magnitude")


@dataclass(frozen=True, kw_only=True)
class FixedMaskState(State):
    """``params`` are compact under ``shared.mask``."""

    shared: SharedMask

    def tensors(self) -> dict[str, Tensor]:
        return {**self.params, **self.shared.tensors()}


@dataclass
class FixedMask(FederatedStrategy):
    """The weighted mean of compact models.

    density: of every client's model, in (0, 1]; density_kind: "nominal" (of the weights that may be pruned) or "true"
    (of all trainable scalars). layer_densities: "uniform", "er" or "erk". criterion: "random", or "magnitude" of the
    initial weights within each layer.
    """

    client: ClassVar[str] = "fixed_mask"
    masked: ClassVar[bool] = True
    density: float = 0.1
    density_kind: str = "nominal"
    layer_densities: str = "erk"
    criterion: str = "random"

    def __post_init__(self) -> None:
        check_densities(self.density, self.density_kind, self.layer_densities)
        if self.criterion not in CRITERIA:
            raise unknown("criterion", self.criterion, CRITERIA)

    def init(self, task: Task, devices: Sequence[Device]) -> State:
        params = task.init_params()
        shared = SharedMask.first(self._mask(task, params), task, devices)
        return FixedMaskState(compact(params, shared.mask), shared=shared)

    def broadcast(self, state: State, device: Device) -> Packet:
        assert isinstance(state, FixedMaskState)
        return masked_packet("train", state.params, state.shared, device)

    def complaint(self, task: Task, state: State, reply: Packet) -> str:
        return misfit(reply, "update", state.params)

    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        assert isinstance(state, FixedMaskState)
        mean, seen = WeightedMean(), []
        for reply in replies:
            mean.add(reply.packet.tensors, reply.weight)
            seen.append(reply.device.id)
        return replace(state, params=mean.result(state.params), shared=state.shared.held_by(seen))

    def _mask(self, task: Task, params: Params) -> dict[str, Tensor]:
        counts = kept_counts(task, self.density, self.density_kind, self.layer_densities)
        if self.criterion == "magnitude":
            return {name: largest(params[name], k) for name, k in counts.items()}
        rng = torch_rng(task.seed, "mask")
        return {name: at_random(params[name].numel(), k, rng) for name, k in counts.items()}
