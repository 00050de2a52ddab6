"""pFedGate's client half: a private gate picks, for every batch, blocks of the model that fit the client's budget.

Source: Chen, Yao, Gao, Ding, Li, "Efficient Personalized Federated Learning via Sparse Model-Adaptation", ICML 2023,
arXiv 2305.02776, Algorithm 1 and App. A; official code yxdyc/pFedGate at b8cfa15.
Differs from the official code: blocks are whole channel groups, computed as smaller dense layers; the knapsack is exact
and global, and what dead columns free is filled up, so that the true density (forced blocks and gate included) is at
most the budget in every batch; the optimiser is lazy (an unused weight keeps its bits) and its momentum starts anew
each round; only what was trained is sent; no ReLU on the logits. Dropped blocks get no straight-through gradient: with
whole channels and ReLU the paper's would be zero as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsparse.client import Memory, Metrics, SgdClient, check_not_negative, check_positive
from fedsparse.errors import UserError, unknown
from fedsparse.models.gate import BRANCHES
from fedsparse.models.gated import Account, Gated, gated_model
from fedsparse.packet import Packet
from fedsparse.sgd import batches, clip_, finite, step_
from fedsparse.sparse.blocks import BLOCKS_PER_LAYER, MAX_BLOCK_FRAC, Bools
from fedsparse.sparse.channels import gated_forward, gather, select
from fedsparse.sparse.choose import choose_blocks
from fedsparse.sparse.codec import pack, pack_bits, tile_count, unpack, unpack_bits
from fedsparse.sparse.compact import CompactModel
from fedsparse.task import Client, Params, Score, Task, score


@dataclass(frozen=True)
class PFedGateClient(SgdClient):
    """Memory: the gate's parameters and running statistics; before the first round those common to all clients.

    gate_lr, gate_clip: learning rate and gradient clip of the gate; momentum and weight decay are shared. branches:
    "separate" or "shared". gate_pool: pool the gate's input to that many positions a side, 0 = not. blocks_per_layer,
    max_block_frac: the cut. open_gate: keep every block at gate value 1, no gate: the method is then FedAvg.
    """

    clip: float = 10.0
    gate_lr: float = 0.1
    gate_clip: float = 10.0
    branches: str = "separate"
    gate_pool: int = 0
    blocks_per_layer: int = BLOCKS_PER_LAYER
    max_block_frac: float = MAX_BLOCK_FRAC
    open_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer != "sgd":
            raise UserError(f"pfedgate trains with optimizer 'sgd' only, got {self.optimizer!r}")
        check_not_negative(gate_lr=self.gate_lr, gate_clip=self.gate_clip, gate_pool=self.gate_pool)
        check_positive(blocks_per_layer=self.blocks_per_layer, max_block_frac=self.max_block_frac)
        if self.max_block_frac > 1:
            raise UserError(f"max_block_frac must be in (0, 1], got {self.max_block_frac}")
        if self.branches not in BRANCHES:
            raise unknown("gate branches", self.branches, BRANCHES)

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        gated = self._gated(task)
        gate = {name: t.clone() for name, t in (memory or gated.gate.init_params()).items()}
        model = CompactModel(packet.tensors, gated.plan, task.trainable)
        account = Account(gated, self.batch_size, momentum=self.momentum > 0, gate=not self.open_gate)
        leaves = [] if self.open_gate else [gate[name].requires_grad_() for name in gated.gate.trainable]
        limit = gated.plan.total if self.open_gate else gated.limit(client.device)
        velocity: list[Tensor] = []
        task.model.train(True)
        for batch in batches(len(client.train), self.batch_size, self.epochs, rng):
            x, y = client.train.x[batch], client.train.y[batch]
            kept, gates = self._gates(gated, gate, x, limit)
            selection = model.use(kept)
            with task.bound(model.tensors) as network:
                loss = task.criterion(gated_forward(network, gated.plan, selection, gates, x), y)
            grads = torch.autograd.grad(loss, [*model.leaves, *leaves])
            ours, gates_own = grads[: len(model.leaves)], grads[len(model.leaves) :]
            with torch.no_grad():
                self._step(model.leaves, ours, model.velocity, self.lr, self.clip)
                self._step(leaves, gates_own, velocity, self.gate_lr, self.gate_clip)
            account.add(kept, len(batch), finite(loss.item(), account.steps))
        model.flush()
        tensors = {"values": pack(model.params, gated.plan, model.touched), "touched": pack_bits(model.touched)}
        reply = Packet("update", tensors, {"weight": len(client.train), **account.facts()})
        return reply, memory if self.open_gate else {name: t.detach() for name, t in gate.items()}

    def evaluate(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Metrics:
        gated = self._gated(task)
        if "values" in packet.tensors:  # the client's own model, before aggregation
            return {"personal": self._personal(task, gated, client, _own(task, gated, packet), memory)}
        return {
            "personal": self._personal(task, gated, client, packet.tensors, memory),
            "global": task.score(packet.tensors, client.held_out),
        }

    def local(self, packet: Packet, reply: Packet) -> Packet:
        return Packet("evaluate", {**packet.tensors, **reply.tensors})

    def _gated(self, task: Task) -> Gated:
        return gated_model(task, self.blocks_per_layer, self.max_block_frac, self.branches, self.gate_pool)

    def _gates(self, gated: Gated, gate: Params, x: Tensor, limit: int) -> tuple[Bools, Tensor]:
        """The batch's kept set and gate values, both (L,)."""
        if self.open_gate:
            return np.ones(gated.plan.blocks, bool), torch.ones(gated.plan.blocks)
        with gated.gate.bound(gate) as network:
            network.train(len(x) > 1)
            scale, importance = network(x)
        kept = choose_blocks(gated.plan, importance.detach().double().numpy(), limit)
        return kept, scale * (1 - importance.detach() + importance)  # straight-through: M * (I - sg(G) + G), App. A

    def _step(
        self, leaves: list[Tensor], grads: tuple[Tensor, ...], velocity: list[Tensor], lr: float, clip: float
    ) -> None:
        if leaves:
            clip_(grads, clip)
            step_(leaves, grads, velocity, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def _personal(
        self, task: Task, gated: Gated, client: Client, params: Mapping[str, Tensor], memory: Memory
    ) -> Score:
        """The deployed model's score: one mask and one gate vector a client, from its training data."""
        if self.open_gate:
            return task.score(params, client.held_out)
        scale, importance = gated.client_gates(memory or gated.gate.init_params(), client.train)
        selection = select(gated.plan, choose_blocks(gated.plan, importance.numpy(), gated.limit(client.device)))
        task.model.eval()
        with task.bound(gather(params, selection)) as network:
            return score(lambda x: gated_forward(network, gated.plan, selection, scale, x), client.held_out)


def _own(task: Task, gated: Gated, packet: Packet) -> Params:
    """The received model with the client's update put in."""
    params = {name: packet.tensors[name].clone() for name in task.shapes}
    touched = unpack_bits(packet.tensors["touched"], tile_count(gated.plan))
    for region, value in unpack(packet.tensors["values"], gated.plan, touched, task.shapes):
        region.put_(params[region.name], value)
    return params
