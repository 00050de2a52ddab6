"""FedAvg-FT's client half: trains as FedAvg's; the personal model is a copy of the global one, fine-tuned.

``ft_epochs`` epochs on the client's training data with learning rate ``ft_lr`` (0 = ``lr``), in training mode, so
batch norm's running statistics adapt too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedsparse.client import Memory, Metrics, SgdClient, check_not_negative, check_positive, update
from fedsparse.packet import Packet
from fedsparse.task import Client, Score, Task


@dataclass(frozen=True)
class FedAvgFTClient(SgdClient):
    """FedAvg's training; fine-tuning before evaluation."""

    ft_epochs: int = 1
    ft_lr: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(ft_epochs=self.ft_epochs)
        check_not_negative(ft_lr=self.ft_lr)

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        return update(client, self.fit(task, client, packet.tensors, rng)), memory

    def local(self, packet: Packet, reply: Packet) -> Packet:
        return replace(reply, kind="local")  # before aggregation the trained model stands as it is

    def evaluate(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Metrics:
        if packet.kind == "local":
            return {"personal": task.score(packet.tensors, client.held_out)}
        return {
            "personal": self._tuned(task, client, packet, self.ft_epochs),
            "global": task.score(packet.tensors, client.held_out),
        }

    def onboard(
        self,
        task: Task,
        client: Client,
        packet: Packet,
        memory: Memory,
        rng: torch.Generator,
        epochs: tuple[int, ...],
    ) -> dict[int, Score]:
        """Fine-tuning as before evaluation, with its shuffle, for so many epochs."""
        return {e: self._tuned(task, client, packet, e) for e in epochs}

    def _tuned(self, task: Task, client: Client, packet: Packet, epochs: int) -> Score:
        """The score of the received model after ``epochs`` epochs on the client's training data."""
        return task.score(self.tuned(task, client, packet.tensors, epochs, self.ft_lr), client.held_out)
