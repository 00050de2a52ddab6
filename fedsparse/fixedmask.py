"""Methods whose mask is found before round 1 and never changes: what their server halves share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedsparse.globalmask import MaskedState, SharedMask, masked_packet
from fedsparse.packet import Packet
from fedsparse.sparse.masks import Mask, compact
from fedsparse.sparse.mean import WeightedMean
from fedsparse.strategy import FederatedStrategy, Reply, State, misfit
from fedsparse.task import Device, Params, Task


def averaged(state: MaskedState, replies: Iterable[Reply]) -> MaskedState:
    """The weighted mean of compact models; who has sent one holds the mask."""
    mean, seen = WeightedMean(), []
    for reply in replies:
        mean.add(reply.packet.tensors, reply.weight)
        seen.append(reply.device.id)
    return replace(state, params=mean.result(state.params), shared=state.shared.held_by(seen))


@dataclass
class FixedMaskStrategy(FederatedStrategy):
    """Abstract: the server finds a mask for the initial parameters; then the weighted mean of compact models.

    density: of every client's model, in (0, 1]; density_kind: "nominal" (of the weights that may be pruned) or "true"
    (of all trainable scalars).
    """

    client: ClassVar[str] = "fixed_mask"
    masked: ClassVar[bool] = True
    density: float = 0.1
    density_kind: str = "nominal"

    @abstractmethod
    def find_mask(self, task: Task, params: Params) -> Mask:
        """The positions that are kept of each weight that may be pruned. Raises UserError where that cannot be."""

    def init(self, task: Task, devices: Sequence[Device]) -> State:
        params = task.init_params()
        shared = SharedMask.first(self.find_mask(task, params), task, devices)
        return MaskedState(compact(params, shared.mask), shared=shared)

    def broadcast(self, state: State, device: Device) -> Packet:
        assert isinstance(state, MaskedState)
        return masked_packet("train", state.params, state.shared, device)

    def complaint(self, task: Task, state: State, reply: Packet) -> str:
        return misfit(reply, "update", state.params)

    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        assert isinstance(state, MaskedState)
        return averaged(state, replies)
