"""Local training's client half: goes on training the client's own model, which never leaves it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsparse.client import Memory, Metrics, SgdClient, training_facts
from fedsparse.packet import Packet
from fedsparse.task import Client, Task


@dataclass(frozen=True)
class LocalClient(SgdClient):
    """Memory: the client's model; before its first round that is the common initial one."""

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        fit = self.fit(task, client, memory or task.init_params(), rng)
        return Packet("trained", scalars=training_facts(client, fit)), fit.params

    def evaluate(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Metrics:
        return {"personal": task.score(memory or task.init_params(), client.held_out)}
