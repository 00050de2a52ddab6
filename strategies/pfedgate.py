"""pFedGate: gated, personal, block-sparse models under a budget for each client.

Source: Chen, Yao, Gao, Ding, Li, "Efficient Personalized Federated Learning via Sparse Model-Adaptation", ICML 2023,
arXiv 2305.02776, Algorithm 1 and App. A. The client half does most of it.
Differs from the official code (yxdyc/pFedGate, b8cfa15): the mean of each block is over those who sent it (as the
paper says), over this round's clients, of values; a block here is what lies between a group of outputs and a group of
inputs, so that dead columns are not averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedsparse.errors import UserError
from fedsparse.models.gated import Gated, gated_model
from fedsparse.packet import Packet
from fedsparse.sparse.codec import tile_count, unpack, unpack_bits
from fedsparse.sparse.mean import MaskedMean
from fedsparse.strategy import FederatedStrategy, Reply, State
from fedsparse.task import Device, Task

_SHARED = ("blocks_per_layer", "max_block_frac", "branches", "gate_pool")  # the client's options that shape the cut


@dataclass
class PFedGate(FederatedStrategy):
    """Sends the whole model; averages block by block. Gates never leave their clients."""

    client: ClassVar[str] = "pfedgate"

    def init(self, task: Task, devices: Sequence[Device]) -> State:
        gated = self._gated(task)
        if not self.client_config.get("open_gate"):
            for device in devices:
                gated.limit(device)
        return State(task.init_params())

    def broadcast(self, state: State, device: Device) -> Packet:
        return Packet("train", state.params)

    def complaint(self, task: Task, state: State, reply: Packet) -> str:
        values, touched = (reply.tensors.get(name) for name in ("values", "touched"))
        if reply.kind != "update" or len(reply.tensors) != 2 or values is None or touched is None:
            return (
                f"a reply {reply.kind!r} of {sorted(reply.tensors)}, where 'update' of ['touched', 'values'] is wanted"
            )
        plan = self._gated(task).plan
        try:
            for _ in unpack(values, plan, unpack_bits(touched, tile_count(plan)), task.shapes):
                break
        except UserError as error:
            return str(error)
        return "" if values.dtype == torch.float32 else f"tensor 'values' is {values.dtype}, not torch.float32"

    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        plan = self._gated(task).plan
        mean = MaskedMean(plan, task.shapes)
        for reply in replies:
            tensors = reply.packet.tensors
            mean.add(tensors["values"], unpack_bits(tensors["touched"], tile_count(plan)), reply.weight)
        return replace(state, params=mean.result(state.params))

    def _gated(self, task: Task) -> Gated:
        return gated_model(task, **{k: v for k, v in self.client_config.items() if k in _SHARED})
