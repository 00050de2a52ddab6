"""The client half of a fixed mask: local SGD on the kept weights alone; momentum and decay touch no others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsparse.client import Memory, Metrics, SgdClient
from fedsparse.fixedmask import evaluate_masked, train_masked
from fedsparse.packet import Packet
from fedsparse.task import Client, Task


@dataclass(frozen=True)
class FixedMaskClient(SgdClient):
    """Memory: the mask and its version."""

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        return train_masked(self, task, client, packet, memory, rng)

    def evaluate(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Metrics:
        return evaluate_masked(task, client, packet, memory)
