"""The client half of masks that never change: local training of the kept weights alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsparse.client import Memory
from fedsparse.globalmask import MaskedClient
from fedsparse.packet import Packet
from fedsparse.task import Client, Task


@dataclass(frozen=True)
class FixedMaskClient(MaskedClient):
    """Memory: the mask and its version."""

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        return self.train_kept(task, client, packet, memory, rng)
