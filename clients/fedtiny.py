"""FedTiny's client half: statistics and losses of candidates, training under the mask, top gradients of pruned weights.

Source: Huang, Zhang, Sun, Fang, Yuan, Wu, "Distributed Pruning Towards Tiny Neural Networks in Federated Learning",
ICDCS 2023, arXiv 2212.01977; its first author's code (Little0o0/FedML, branch fedlottery, 4d03aff).
Differs from that code: the dense gradient of a layer is never held; it is taken on one batch of full size, not on the
last, partial one; no augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsparse.candidates import Candidates, receive_candidates, selection_costs
from fedsparse.client import Memory, check_positive
from fedsparse.errors import UserError, unknown
from fedsparse.globalmask import MaskedClient, Received, prunable, receive
from fedsparse.masked import network, score_masked
from fedsparse.models.norms import BatchStatistics, read_statistics, with_statistics
from fedsparse.nested import passed_mask
from fedsparse.packet import Packet, Scalar
from fedsparse.regrow import gradient_tensors, named_counts, search
from fedsparse.seeding import torch_rng
from fedsparse.sgd import batches
from fedsparse.sparse.masks import Mask
from fedsparse.task import Client, Params, Split, Task

AVERAGES = ("moving", "cumulative")
PLACES = ("local", "global")


@dataclass(frozen=True)
class FedTinyClient(MaskedClient):
    """Memory: the mask and its version; between the two exchanges of the selection also the candidates.

    development: share of the training examples on which candidates are judged. min_development: examples below which a
    client gives no statistics. passes: over these examples for the statistics. averaging: "moving" (the norms'
    momentum: few batches leave much of the old statistics) or "cumulative" (the mean over the batches, nothing old).
    gradients_at: "local" (after the local training) or "global" (the received model).
    """

    development: float = 0.1
    min_development: int = 2
    passes: int = 10
    averaging: str = "moving"
    gradients_at: str = "local"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(passes=self.passes)
        if not 0 < self.development <= 1:
            raise UserError(f"development must be in (0, 1], got {self.development}")
        if self.min_development < 2:
            raise UserError(f"min_development must be at least 2 (batch statistics), got {self.min_development}")
        for what, value, known in (
            ("averaging", self.averaging, AVERAGES),
            ("gradients_at", self.gradients_at, PLACES),
        ):
            if value not in known:
                raise unknown(what, value, known)

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        if packet.kind == "calibrate":
            return self._calibrate(task, client, *receive_candidates(task, packet, memory))
        if packet.kind == "probe":
            return self._probe(task, client, packet, *receive_candidates(task, packet, memory)), {}
        got = receive(task, packet, memory)
        fit = self.fit(task, client, got.params, rng, mask=got.mask)
        found, flops, buffers = self._search(task, client, packet, got, fit.params, rng)
        facts = self.facts(task, client, fit, got.mask, flops=flops, decision=buffers)
        return self.update(task, fit.params, facts, got.memory, **found)

    def _calibrate(self, task: Task, client: Client, given: Candidates, memory: Memory) -> tuple[Packet, Memory]:
        """Exchange 1: each candidate's norm statistics on the development set, (C, 2, channels); a small one: none."""
        data = self._development(task, client)
        models = given.models(task) if len(data) >= self.min_development else ()
        rows = [self._statistics(task, client, data, *model) for model in models]
        none = torch.empty(0, *read_statistics(task, given.params).shape)
        found = torch.stack(rows) if rows else none
        examples = len(data) * self.passes if rows else 0
        facts = self._selection_facts(task, client, data, given, memory, examples)
        return Packet("statistics", {"statistics": found}, facts), memory

    def _probe(self, task: Task, client: Client, packet: Packet, given: Candidates, memory: Memory) -> Packet:
        """Exchange 2: each candidate's summed loss and right answers on the development set, (C,) each."""
        data = self._development(task, client)
        statistics = packet.tensors.get("statistics")  # (C, 2, channels)
        scores = []
        for c, (params, mask) in enumerate(given.models(task)):
            fresh = params if statistics is None else with_statistics(task, params, statistics[c])
            scores.append(score_masked(task, fresh, mask, data))
        tensors = {
            "losses": torch.tensor([s.loss * s.n for s in scores]),
            "correct": torch.tensor([s.correct for s in scores], dtype=torch.int32),
        }
        return Packet("losses", tensors, self._selection_facts(task, client, data, given, memory, len(data)))

    def _selection_facts(
        self, task: Task, client: Client, data: Split, given: Candidates, memory: Memory, examples: int
    ) -> dict[str, Scalar]:
        """The scalars of a reply in the selection; ``examples``: those that each candidate has worked on."""
        held = sum(t.nbytes for t in memory.values())
        costs = selection_costs(task, given, examples=examples, batch=self.batch_size, held=held)
        return {"weight": len(client.train), "development": len(data), **costs}

    def _development(self, task: Task, client: Client) -> Split:
        """The client's development set, the same in both exchanges; it stays part of the training set."""
        n = len(client.train)
        if not n:
            raise UserError("the development set is empty: the client has no training examples")
        chosen = torch.randperm(n, generator=torch_rng(task.seed, client.id, "development"))
        chosen = chosen[: max(1, round(self.development * n))]
        return Split(client.train.x[chosen], client.train.y[chosen])

    def _statistics(self, task: Task, client: Client, data: Split, params: Params, mask: Mask) -> Tensor:
        """(2, channels) running means and variances after passes in training mode; the same batches for all."""
        own = {name: t.clone() if name in task.buffers else t for name, t in task.placed(params).items()}
        data = data.to(task.device)
        rng = torch_rng(task.seed, client.id, "calibrate")
        task.model.train(True)
        mean = BatchStatistics(task, own) if self.averaging == "cumulative" else None
        with torch.no_grad(), network(task, own, mask) as model:
            for batch in batches(len(data), self.batch_size, self.passes, rng):
                if mean:
                    mean.before()
                model(data.x[batch])
                if mean:
                    mean.after()
        return mean.result() if mean else read_statistics(task, own)

    def _search(
        self, task: Task, client: Client, packet: Packet, got: Received, trained: Params, rng: torch.Generator
    ) -> tuple[dict[str, Tensor], float, int]:
        """In an adjustment round the top gradients of pruned weights on one batch; flops and bytes of the search."""
        if "grow" not in packet.tensors:
            return {}, 0.0, 0
        model = prunable(task)
        counts = named_counts(packet.tensors["grow"], model.weights)
        params = trained if self.gradients_at == "local" else got.params
        passed = passed_mask(task, packet)
        done = search(task, params, got.mask, counts, client.train, self.batch_size, rng, passed)
        tensors = gradient_tensors(done.found, model.sizes)
        held = sum(t.nbytes for t in (*tensors.values(), *passed.values()))
        return tensors, done.flops, done.piece + held
