"""FedDST's client half: training under the mask; in a readjustment round it prunes and regrows on the way.

Source: Bibikar, Vikalo, Wang, Chen, "Federated Dynamic Sparse Training: Computing Less, Communicating Less, Yet
Learning Better", AAAI 2022, arXiv 2112.09824, Algorithm 1; the official code (bibikar/feddst, 1e2dca7).
Differs from that code: the mask changes after ``adjust_at`` of the local steps, so that new weights are trained before
they are sent (with the code's defaults it changes after the last epoch); the gradient is that of one full batch, not of
the last, partial one, and is never held dense; what is pruned cannot come back at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsparse.client import Memory
from fedsparse.errors import UserError
from fedsparse.globalmask import MaskedClient, Received, prunable, receive, with_mask
from fedsparse.packet import Packet
from fedsparse.regrow import exchanged, named_counts, search
from fedsparse.sgd import Fit, batches
from fedsparse.sparse.masks import Mask, carry
from fedsparse.sparse.pruning import Counts
from fedsparse.task import Client, Task

_EPS = 1e-9  # rounding must not add a step


@dataclass(frozen=True)
class FedDSTClient(MaskedClient):
    """Memory: the server's mask and its version; the client's own mask lives for a round.

    adjust_at: share of the local steps after which the mask changes, in (0, 1]; 1 = after the last one.
    """

    adjust_at: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.adjust_at <= 1:
            raise UserError(f"adjust_at must be in (0, 1], got {self.adjust_at}")

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        if "grow" not in packet.tensors:
            return self.train_kept(task, client, packet, memory, rng)
        got = receive(task, packet, memory)
        counts = named_counts(packet.tensors["grow"], prunable(task).weights)
        return self._readjust(task, client, got, counts, rng)

    def _readjust(
        self, task: Task, client: Client, got: Received, counts: Counts, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        """Train, exchange the smallest kept weights for the pruned ones of largest gradient, train on."""
        order = list(batches(len(client.train), self.batch_size, self.epochs, rng))
        before = max(1, math.ceil(self.adjust_at * len(order) - _EPS))
        moments: list[Tensor] = []
        first = self.fit(task, client, got.params, rng, mask=got.mask, order=order[:before], moments=moments)
        seen = search(task, first.params, got.mask, counts, client.train, self.batch_size, rng)
        params, mask = exchanged(first.params, got.mask, seen.found, counts)
        carried = _carried(task, moments, got.mask, mask)
        last = self.fit(task, client, params, rng, mask=mask, order=order[before:], moments=carried, done=first.steps)
        held = sum(t.nbytes for pair in seen.found.values() for t in pair)
        facts = self.facts(task, client, _joined(first, last), mask, flops=seen.flops, decision=seen.piece + held)
        return self.update(task, with_mask(task, last.params, mask), facts, got.memory)


def _carried(task: Task, moments: list[Tensor], old: Mask, new: Mask) -> list[Tensor]:
    """The optimiser's state at the positions of the new mask, 0 where they are new."""
    names = task.trainable * (len(moments) // max(1, len(task.trainable)))
    return [carry(m, old[n], new[n]) if n in old else m for n, m in zip(names, moments, strict=True)]


def _joined(first: Fit, last: Fit) -> Fit:
    steps = first.steps + last.steps
    loss = (first.loss * first.steps + last.loss * last.steps) / max(1, steps)
    return Fit(last.params, steps, first.samples + last.samples, loss)
