"""Methods whose mask is found before round 1 and never changes: what they share, on the server and on the clients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedsparse.client import Memory, Metrics, SgdClient, training_facts
from fedsparse.globalmask import SharedMask, masked_costs, masked_packet, receive
from fedsparse.masked import score_masked
from fedsparse.packet import Packet
from fedsparse.sparse.masks import Mask, compact
from fedsparse.sparse.mean import WeightedMean
from fedsparse.strategy import FederatedStrategy, Reply, State, misfit
from fedsparse.task import Client, Device, Params, Task

# --- the server's half -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FixedMaskState(State):
    """``params`` are compact under ``shared.mask``."""

    shared: SharedMask

    def tensors(self) -> dict[str, Tensor]:
        return {**self.params, **self.shared.tensors()}


def averaged(state: FixedMaskState, replies: Iterable[Reply]) -> FixedMaskState:
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
        return FixedMaskState(compact(params, shared.mask), shared=shared)

    def broadcast(self, state: State, device: Device) -> Packet:
        assert isinstance(state, FixedMaskState)
        return masked_packet("train", state.params, state.shared, device)

    def complaint(self, task: Task, state: State, reply: Packet) -> str:
        return misfit(reply, "update", state.params)

    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        assert isinstance(state, FixedMaskState)
        return averaged(state, replies)


# --- the client's half -----------------------------------------------------------------------------------------------


def train_masked(
    half: SgdClient, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
) -> tuple[Packet, Memory]:
    """Local training of the kept weights alone, and the reply of compact values."""
    got = receive(task, packet, memory)
    fit = half.fit(task, client, got.params, rng, mask=got.mask)
    costs = masked_costs(task, got.mask, samples=fit.samples, batch=half.batch_size, copies=half.copies)
    return Packet("update", fit.params, {**training_facts(client, fit), **costs}), got.memory


def evaluate_masked(task: Task, client: Client, packet: Packet, memory: Memory) -> Metrics:
    """The scores of the one global model."""
    got = receive(task, packet, memory)
    score = score_masked(task, got.params, got.mask, client.held_out)
    return {"personal": score, "global": score}
