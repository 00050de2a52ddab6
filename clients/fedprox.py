"""FedProx's client half (Li et al. 2020, arXiv 1812.06127, eq. 2).

It minimises the loss plus (mu / 2) * ||theta - theta_received||^2. With mu = 0 it is FedAvg's, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsparse.client import Memory, Metrics, SgdClient, check_not_negative, update
from fedsparse.packet import Packet
from fedsparse.task import Client, Task


@dataclass(frozen=True)
class FedProxClient(SgdClient):
    """Trains the received model, pulled towards it with strength ``mu``."""

    mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(mu=self.mu)

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        return update(client, self.fit(task, client, packet.tensors, rng, proximal=self.mu)), memory

    def evaluate(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Metrics:
        score = task.score(packet.tensors, client.held_out)
        return {"personal": score, "global": score}
