"""A chain model with its gate: what pFedGate's two halves derive, each for itself, from the task and the options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from fedsparse.cost import Layer, forward_macs, memory_bytes, nominal_density, trace, train_flops
from fedsparse.errors import UserError
from fedsparse.models.gate import Gate
from fedsparse.seeding import torch_rng
from fedsparse.sparse.blocks import BLOCKS_PER_LAYER, MAX_BLOCK_FRAC, Bools, ChannelPlan, channel_plan
from fedsparse.task import Device, Split, Task

_LARGEST = ("density_true", "density_nominal", "memory")  # reported as the maximum over batches
_GATE_BATCH = 512  # examples a pass when a client's mask is computed; fixed, since it may change bits


@dataclass(frozen=True, eq=False)
class Gated:
    """A cut model and its gate's template (whose parameters are the common initial ones).

    gate_size: trainable scalars of the gate; gate_macs: its multiply-adds per example. dense: trainable scalars of
    the dense model, to which densities are related. layers: the model's, as the cost model sees them.
    """

    plan: ChannelPlan
    gate: Task
    gate_size: int
    gate_macs: int
    dense: int
    layers: tuple[Layer, ...]

    def density(self, scalars: int) -> float:
        """True density of ``scalars`` kept ones: the gate counts."""
        return (scalars + self.gate_size) / self.dense

    def limit(self, device: Device) -> int:
        """Trainable scalars that a device may use beside its gate; all of them without a budget.

        Raises UserError, naming the client, for a budget below the smallest possible model.
        """
        budget = device.budget.density
        if budget is None:
            return self.plan.total
        limit = math.floor(budget * self.dense) - self.gate_size
        if limit < self.plan.smallest:
            smallest = math.ceil(1e4 * self.density(self.plan.smallest)) / 1e4  # rounded up: a budget that works
            raise UserError(
                f"client {device.id}: budget {budget:g} is below the smallest possible model {smallest:g} "
                "(group 0 of each layer, the classifier and the gate)"
            )
        return limit

    def client_gates(self, gate: Mapping[str, Tensor], data: Split) -> tuple[Tensor, Tensor]:
        """(M float32, G float64), (L,) each: the gate in evaluation mode, averaged over the examples of ``data``."""
        scale = torch.zeros(self.plan.blocks, dtype=torch.float64)
        importance = torch.zeros_like(scale)
        with torch.no_grad(), self.gate.bound(gate) as network:
            network.eval()
            for x in torch.split(data.x, _GATE_BATCH):
                m, g = network(x)
                scale.add_(m.double(), alpha=len(x) / len(data))
                importance.add_(g.double(), alpha=len(x) / len(data))
        return scale.float(), importance


@lru_cache(maxsize=8)
def gated_model(
    task: Task,
    blocks_per_layer: int = BLOCKS_PER_LAYER,
    max_block_frac: float = MAX_BLOCK_FRAC,
    branches: str = "separate",
    gate_pool: int = 0,
) -> Gated:
    """The cut and the gate of a task's model; the same on every client and on the server.

    Raises UserError for a model that cannot be cut or takes tokens.
    """
    plan = channel_plan(task.model, blocks_per_layer=blocks_per_layer, max_block_frac=max_block_frac)
    gate = Gate(task.input_shape, plan.blocks, branches, gate_pool, torch_rng(task.seed, "gate"))
    template = Task(gate, task.input_shape, plan.blocks, task.seed)
    dense = sum(p.numel() for p in task.reference.parameters())
    return Gated(plan, template, gate.size, gate.macs, dense, trace(task.model, task.input_shape))


@dataclass
class Account:
    """What a client's batches cost and lost in a round; each kept set is costed once.

    batch_size: the largest batch, for the memory. momentum: whether there is a buffer for it. gate: whether it is used.
    """

    gated: Gated
    batch_size: int
    momentum: bool
    gate: bool
    steps: int = 0
    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    _known: dict[bytes, dict[str, float]] = field(default_factory=dict)

    def add(self, kept: Bools, n: int, loss: float) -> None:
        """Count a batch of ``n`` examples that used the kept set, (L,) bool."""
        key = kept.tobytes()
        if key not in self._known:
            self._known[key] = self._costs(kept)
        costs = self._known[key]
        self.steps, self.samples = self.steps + 1, self.samples + n
        terms = {"loss": loss, "density": costs["density_true"], "flops": n * costs["flops"], "macs": n * costs["macs"]}
        self.sums = {name: self.sums.get(name, 0.0) + term for name, term in terms.items()}
        self.largest = {name: max(self.largest.get(name, 0.0), costs[name]) for name in _LARGEST}

    def facts(self) -> dict[str, float]:
        """The scalars of a reply; ``density_mean`` is the mean of the true density over the batches."""
        if not self.steps:
            return {"samples": 0, "flops": 0.0}
        return {
            "samples": self.samples,
            "loss": self.sums["loss"] / self.steps,
            "flops": self.sums["flops"],
            "forward_macs": self.sums["macs"] / self.samples,
            "density_mean": self.sums["density"] / self.steps,
            **self.largest,
        }

    def _costs(self, kept: Bools) -> dict[str, float]:
        """Of one kept set: densities, flops and multiply-adds per example, memory in bytes."""
        gated, plan = self.gated, self.gated.plan
        cut = plan.cut(kept)
        size, macs = (gated.gate_size, gated.gate_macs) if self.gate else (0, 0)
        memory = memory_bytes(
            gated.layers,
            self.batch_size,
            cut,
            optimizer_copies=int(self.momentum),
            gate=size,
            decision=0 if kept.all() else 4 * plan.total,  # the whole model, from which the next batch takes its blocks
            structured=True,
        )
        return {
            "density_true": (plan.effective(kept) + size) / gated.dense,
            "density_nominal": nominal_density(gated.layers, cut) or 1.0,
            "flops": train_flops(gated.layers, 1, cut) + 3 * 2 * macs,  # the gate's norm needs input gradients
            "macs": forward_macs(gated.layers, cut) + macs,
            "memory": memory.total,
        }
