"""SSFL's client half: scores of the initial weights on the client's own data, then training under the mask.

Source: Ohib et al., TMLR, arXiv 2405.09037; code: riohib/SSFL, 83fc11d. Differs from that code: scores are taken in
evaluation mode (the code's are in training mode, so that batch norm's statistics are those of one batch of 16); over
several batches they are those of the mean gradient (the code averages magnitudes batch by batch).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsparse.client import Memory, check_not_negative
from fedsparse.globalmask import MaskedClient, masked_costs, prunable
from fedsparse.packet import Packet
from fedsparse.saliency import score_bytes, snip_scores
from fedsparse.task import Client, Split, Task


@dataclass(frozen=True)
class SsflClient(MaskedClient):
    """Memory: the mask and its version.

    score_batches: of training examples, drawn without replacement, on which weights are scored; 0 = all examples.
    """

    score_batches: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(score_batches=self.score_batches)

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        if packet.kind == "score":
            return self._score(task, client, packet, rng), {}
        return self.train_kept(task, client, packet, memory, rng)

    def _score(self, task: Task, client: Client, packet: Packet, rng: torch.Generator) -> Packet:
        """The dense scores of all weights that may be pruned, and what they cost: the dense model, no optimiser."""
        data, sizes = self._examples(client.train, rng), prunable(task).sizes
        params = {name: packet.tensors[name] for name in task.shapes}
        every = {name: torch.arange(size, dtype=torch.int32) for name, size in sizes.items()}
        scores = snip_scores(task, params, data, every, batch=self.batch_size)
        sums = score_bytes(sizes)
        costs = masked_costs(task, {}, samples=len(data), batch=self.batch_size, copies=0, decision=sums)
        return Packet("scores", scores, {"weight": len(client.train), "samples": len(data), **costs})

    def _examples(self, data: Split, rng: torch.Generator) -> Split:
        count = self.score_batches * self.batch_size
        if not 0 < count < len(data):
            return data
        chosen = torch.randperm(len(data), generator=rng)[:count].sort().values
        return Split(data.x[chosen], data.y[chosen])
