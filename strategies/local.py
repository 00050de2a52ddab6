"""Local: no federation. Each client trains its own model from the common initial one; nothing is sent but a call.

The lower bound of every personalised method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedsparse.packet import Packet
from fedsparse.strategy import FederatedStrategy, Reply, State, misfit
from fedsparse.task import Device, Task


@dataclass
class Local(FederatedStrategy):
    """Calls on the clients to train; there is no global model."""

    client: ClassVar[str] = "local"

    def init(self, task: Task, devices: Sequence[Device]) -> State:
        return State({})

    def broadcast(self, state: State, device: Device) -> Packet:
        return Packet("train")

    def complaint(self, task: Task, state: State, reply: Reply) -> str:
        return misfit(reply.packet, "trained", {})

    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        for _ in replies:
            pass
        return state
