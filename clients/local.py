"""Local training's client half: goes on training the client's own model, which never leaves it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedsparse.client import Memory, Metrics, SgdClient, training_facts
from fedsparse.packet import Packet
from fedsparse.task import Client, Score, Task


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

    def onboard(
        self,
        task: Task,
        client: Client,
        packet: Packet,
        memory: Memory,
        rng: torch.Generator,
        epochs: tuple[int, ...],
    ) -> dict[int, Score]:
        """Training from the common initial model for so many epochs, each time with the same shuffle."""
        scores, start = {}, task.init_params()
        for e in epochs:
            shuffle = torch.Generator().set_state(rng.get_state())
            params = replace(self, epochs=e).fit(task, client, start, shuffle).params if e else start
            scores[e] = task.score(params, client.held_out)
        return scores
