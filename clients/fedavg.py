"""FedAvg's client half: local SGD from the received model (McMahan et al. 2017, arXiv 1602.05629, ClientUpdate)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsparse.client import Memory, Metrics, SgdClient, update
from fedsparse.packet import Packet
from fedsparse.task import Client, Task


@dataclass(frozen=True)
class FedAvgClient(SgdClient):
    """Trains the received model and sends it back whole."""

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        return update(client, self.fit(task, client, packet.tensors, rng)), memory

    def evaluate(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Metrics:
        score = task.score(packet.tensors, client.held_out)
        return {"personal": score, "global": score}
