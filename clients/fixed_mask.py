"""The client half of a fixed mask: local SGD on the kept weights alone; momentum and decay touch no others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsparse.client import Memory, Metrics, SgdClient, training_facts
from fedsparse.globalmask import masked_costs, receive
from fedsparse.masked import score_masked
from fedsparse.packet import Packet
from fedsparse.task import Client, Task


@dataclass(frozen=True)
class FixedMaskClient(SgdClient):
    """Memory: the mask and its version."""

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        got = receive(task, packet, memory)
        fit = self.fit(task, client, got.params, rng, mask=got.mask)
        costs = masked_costs(task, got.mask, samples=fit.samples, batch=self.batch_size, copies=self.copies)
        return Packet("update", fit.params, {**training_facts(client, fit), **costs}), got.memory

    def evaluate(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Metrics:
        got = receive(task, packet, memory)
        score = score_masked(task, got.params, got.mask, client.held_out)
        return {"personal": score, "global": score}
