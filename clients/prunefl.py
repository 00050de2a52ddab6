"""PruneFL's client half: training under the mask, squared gradients of all weights, the initial pruning at one client.

Source: Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", IEEE TNNLS 2022, arXiv
1909.12326; the official code (jiangyuang/PruneFL, d3f38c4).
Differs from that code: gradients are squared batch by batch and averaged over the batches of the reconfiguration round
alone (the code squares their sum over a round, in every round); a step of the initial pruning takes one batch of all
of the client's data (there: ten batches of 200 examples); pruned weights are neither stored nor updated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from fedsparse.client import Memory, check_not_negative, check_positive, training_facts
from fedsparse.globalmask import MaskedClient, masked_costs, prunable, receive, with_mask
from fedsparse.masked import SquaredGradients
from fedsparse.packet import Packet
from fedsparse.reconfigure import (
    Initial,
    Rule,
    initial_pruning,
    square_bytes,
    square_flops,
    square_tensors,
)
from fedsparse.task import Client, Task


@dataclass(frozen=True)
class PruneFLClient(MaskedClient):
    """Memory: the mask and its version.

    The initial pruning takes ``initial_steps`` batches at most, with a reconfiguration every ``initial_every``; it
    begins at an accuracy of ``above_chance`` times guessing and ends after ``patience`` changes of the size in a row of
    at most the share ``tolerance``.
    """

    initial_steps: int = 1000
    initial_every: int = 50
    above_chance: float = 1.5
    tolerance: float = 0.1
    patience: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(initial_steps=self.initial_steps, initial_every=self.initial_every, patience=self.patience)
        check_not_negative(above_chance=self.above_chance, tolerance=self.tolerance)

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        if packet.kind == "prune":
            return self._prune(task, client, packet, rng), {}
        if not packet.scalars.get("squares"):
            return self.train_kept(task, client, packet, memory, rng)
        got = receive(task, packet, memory)
        squares = SquaredGradients(prunable(task).sizes)
        fit = self.fit(task, client, got.params, rng, mask=got.mask, squares=squares)
        tensors, scalars = square_tensors(squares)
        flops = square_flops(task, got.mask, fit.samples)
        facts = self.facts(task, client, fit, got.mask, flops=flops, decision=square_bytes(task))
        return self.update(task, fit.params, {**facts, **scalars}, got.memory, **tensors)

    def _prune(self, task: Task, client: Client, packet: Packet, rng: torch.Generator) -> Packet:
        """The initial pruning: from the dense model to a sparse one of this client's choice."""
        how = Initial(self.initial_steps, self.initial_every, self.above_chance, self.tolerance, self.patience)
        got = receive(task, packet, {})
        share = float(packet.scalars["share"])
        train = partial(self.fit, task, client, rng=rng)
        done = initial_pruning(
            task, got.params, client.train, Rule.read(task, packet), how, share, self.batch_size, rng, train
        )
        dense = masked_costs(
            task, {}, samples=0, batch=self.batch_size, copies=self.copies, decision=square_bytes(task)
        )
        macs = {"flops": done.flops, "forward_macs": done.macs, "forward_macs_max": dense["forward_macs"]}
        tensors = with_mask(task, done.params, done.mask)
        return Packet("pruned", tensors, {**training_facts(client, done.fit), **dense, **macs})
