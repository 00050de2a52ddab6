"""A cut model with its gate: what pFedGate's two halves derive, each for itself, from the task and the options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsparse.cost import Layer, forward_macs, memory_bytes, nominal_density, trace, train_flops
from fedsparse.errors import UserError
from fedsparse.models.gate import Gate, GateOptions
from fedsparse.seeding import torch_rng
from fedsparse.sparse.blocks import BLOCKS_PER_LAYER, MAX_BLOCK_FRAC, structural_cut
from fedsparse.sparse.choose import choose_blocks
from fedsparse.sparse.cut import COSTS, Bools, Cut, Ints
from fedsparse.sparse.flat import FlatCut, flat_cut
from fedsparse.sparse.knapsack import official_choice, official_rooms
from fedsparse.task import Device, Split, Task

MODES = ("structural", "paper", "official")
LEAST = 0.1  # the paper's s_min: the share of each tensor that a flat cut always keeps
GATE_SHARE = 0.1  # of the model: a heavier gate is worth a note
_LARGEST = ("density_true", "density_nominal", "memory", "forward_macs_max")  # reported as the maximum over batches
_GATE_BATCH = 512  # examples a pass when a client's mask is computed; fixed, since it may change bits
_RECEIVED = 1  # copies of a kept set beside the one in training: the received packet
_KNOWN_COSTS = 10_000  # entries
_PACKET = 2048  # bytes of an update beside its values and its bitmap: headers, names and scalars
_MOST_GROUPS = 64  # a layer, when groups are made smaller to meet a small budget


@dataclass(frozen=True)
class Layout:
    """What shapes the cut and the gate. Both halves and all clients of a run share it.

    mode: one of MODES. blocks_per_layer: groups of a space, or chunks of a tensor. max_block_frac: largest share of the
    model in one group (structural). least: share of each tensor in the first chunk (paper). keep_uncuttable: keep what
    cannot be cut whole, instead of refusing it (structural). class_gates: scale each class by a gate (structural).
    """

    mode: str = "structural"
    blocks_per_layer: int = BLOCKS_PER_LAYER
    max_block_frac: float = MAX_BLOCK_FRAC
    least: float = LEAST
    keep_uncuttable: bool = False
    class_gates: bool = False
    gate: GateOptions = field(default_factory=GateOptions)


@dataclass(frozen=True, eq=False)
class Gated:
    """A cut model and its gate's template (whose parameters are the common initial ones).

    gate_size: trainable scalars of the gate; gate_macs: its multiply-adds per example. dense: trainable scalars of
    the dense model, to which densities are related. layers: the model's, as the cost model sees them.
    """

    layout: Layout
    cut: Cut
    gate: Task
    gate_size: int
    gate_macs: int
    dense: int
    layers: tuple[Layer, ...]

    @property
    def flat(self) -> bool:
        """Whether blocks are chunks of tensors, which dense kernels compute in full."""
        return isinstance(self.cut, FlatCut)

    @property
    def counted_gate(self) -> int:
        """The gate's scalars as far as a density budget counts them: the paper's and the official budget do not."""
        return 0 if self.flat else self.gate_size

    @cached_property
    def gate_activations(self) -> int:
        """Scalars that the gate holds for one example in training."""
        gate = self.gate.model
        assert isinstance(gate, Gate)
        return gate.activations

    @cached_property
    def known_costs(self) -> dict[tuple[int, int, bool, int | None, bytes], dict[str, float]]:
        """What :class:`Account` has worked out, of all clients and rounds of this process."""
        return {}

    @cached_property
    def buffers(self) -> int:
        """Scalars of the model that are not trained (statistics of norms)."""
        return sum(layer.buffers for layer in self.layers)

    @cached_property
    def smallest(self) -> dict[str, int]:
        """What the forced blocks alone cost."""
        return {cost: self.cut.spent(self.cut.forced, cost) for cost in COSTS}

    def limits(self, device: Device, batch_size: int, copies: int, density: float | None = None) -> dict[str, int]:
        """What a kept set may spend on a device, by cost; nothing for a device without a budget.

        density: stands in for the budget's, while a schedule is on. batch_size, copies (tensors of optimiser state a
        weight): for a memory budget, which is met for activations as large as the dense model's. Raises UserError,
        naming the client, for a budget below the smallest possible model.
        """
        budget, found = device.budget, dict[str, int]()
        share = budget.density if density is None else density
        if share is not None:
            found["parameters"] = math.floor(share * self.dense) - self.counted_gate
            self._check(device, "parameters", found, share, self.smallest["parameters"] / self.dense)
        if budget.memory is not None:
            fixed = memory_bytes(self.layers, batch_size).activations + 4 * batch_size * self.gate_activations
            fixed += 4 * (2 + copies) * self.gate_size + 8 * self.buffers
            each = 4 * (_RECEIVED + 2 + copies)  # bytes of a kept scalar: as received, weight, gradient, momentum
            scalars = (budget.memory - fixed) // each
            found["parameters"] = min(scalars, found.get("parameters", scalars))
            least = fixed + each * self.smallest["parameters"]
            self._check(device, "parameters", found, budget.memory, least)
        if budget.forward_macs is not None:
            found["multiply_adds"] = math.floor(budget.forward_macs) - self.gate_macs
            self._check(device, "multiply_adds", found, budget.forward_macs, self.smallest["multiply_adds"])
        if budget.bytes_up is not None:
            found["bytes"] = budget.bytes_up - _PACKET
            self._check(device, "bytes", found, budget.bytes_up, self.smallest["bytes"] + _PACKET)
        return found

    def _check(self, device: Device, cost: str, found: Mapping[str, int], budget: float, least: float) -> None:
        if found[cost] >= self.smallest[cost]:
            return
        extra = {"parameters": self.counted_gate / self.dense if budget <= 1 else 0, "multiply_adds": self.gate_macs}
        least += extra.get(cost, 0)
        shown = f"{math.ceil(1e4 * least) / 1e4:g}" if budget <= 1 else f"{math.ceil(least)}"
        what = "the first chunk of each tensor" if self.flat else "group 0 of each layer, the classifier and the gate"
        why = f"is below the smallest possible model {shown} ({what})"
        raise TooSmallError(f"client {device.id}: budget {budget:g} {why}", least / budget)

    def choose(
        self, importance: NDArray[np.float64], limits: Mapping[str, int], cost: str, solver: str, density: float | None
    ) -> Bools:
        """The kept set, (L,) bool, for importances (L,) G.

        cost: what the knapsack counts ("auto": what the budget limits). density: the official code's s, None = 1.
        """
        if self.layout.mode == "official":
            return self._official(importance, 1.0 if density is None else density)
        if not limits:
            return self.cut.everything
        return choose_blocks(self.cut, importance, limits, knapsack_cost(cost, limits), solver)

    def _official(self, importance: NDArray[np.float64], s: float) -> Bools:
        return official_choice(importance, *self._official_terms(s))

    def official_rooms(self, s: float) -> tuple[tuple[Ints, int], ...]:
        """See :func:`fedsparse.sparse.knapsack.official_rooms`, for the official code's s."""
        return official_rooms(*self._official_terms(s))

    def _official_terms(self, s: float) -> tuple[Ints, Bools, Bools, float, float]:
        """Sizes, linear, candidates, sparsity and floor of the official choice."""
        cut = self.cut
        assert isinstance(cut, FlatCut)
        return cut.weights("parameters"), cut.linear, ~cut.forced, s, official_floor(self.layout, s)

    def mean_example(self, data: Split) -> Tensor:
        """(1, ...): the mean of a client's inputs, as the gate reads them."""
        gate = self.gate.model
        assert isinstance(gate, Gate)
        return gate.read(data.x.to(self.gate.device)).mean(0, keepdim=True)

    def client_gates(self, gate: Mapping[str, Tensor], data: Split, *, per_client: bool) -> tuple[Tensor, Tensor]:
        """(M float32, G float64), (L,) each, on the gate's device: the gate in evaluation mode, averaged over examples.

        per_client: the gate of the one mean example instead (the paper's ablation "client-wise").
        """
        scale = torch.zeros(self.cut.blocks, dtype=torch.float64, device=self.gate.device)
        importance = torch.zeros_like(scale)
        chunks = (self.mean_example(data),) if per_client else torch.split(data.x, _GATE_BATCH)
        n = sum(len(x) for x in chunks)
        with torch.no_grad(), self.gate.bound(self.gate.placed(gate)) as network:
            network.eval()
            for x in chunks:
                m, g = network(x.to(self.gate.device))
                scale.add_(m.double(), alpha=len(x) / n)
                importance.add_(g.double(), alpha=len(x) / n)
        return scale.float(), importance


def knapsack_cost(cost: str, limits: Mapping[str, int]) -> str:
    """The cost that the knapsack counts: the one that was asked for, or the first that is limited."""
    if cost == "auto":
        return next(iter(limits))
    if cost not in limits:
        raise UserError(
            f"cost = {cost!r} needs a budget of {cost} (budget.of or budget.table), there is {list(limits)}"
        )
    return cost


def official_floor(layout: Layout, s: float) -> float:
    """s_min of the official code: min(max(1 / B, 0.1), s)."""
    return min(max(1 / layout.blocks_per_layer, LEAST), s)


@lru_cache(maxsize=16)
def gated_model(task: Task, layout: Layout) -> Gated:
    """The cut and the gate of a task's model; the same on every client and on the server.

    Raises UserError for a model that cannot be cut.
    """
    cut: Cut
    if layout.mode == "structural":
        cut = structural_cut(
            task.model,
            task.input_shape,
            tokens=task.tokens,
            blocks_per_layer=layout.blocks_per_layer,
            max_block_frac=layout.max_block_frac,
            keep_uncuttable=layout.keep_uncuttable,
            class_gates=layout.class_gates,
        )
    else:
        cut = flat_cut(
            task.model,
            task.input_shape,
            tokens=task.tokens,
            rule=layout.mode,
            blocks_per_tensor=layout.blocks_per_layer,
            least=layout.least,
        )
    options = replace(layout.gate, vocabulary=task.vocabulary)
    gate = Gate(task.input_shape, cut.blocks, torch_rng(task.seed, "gate"), options)
    template = Task(gate, task.input_shape, cut.blocks, task.seed, device=task.device)
    dense = sum(p.numel() for p in task.reference.parameters())
    layers = trace(task.model, task.input_shape, tokens=task.tokens)
    return Gated(layout, cut, template, gate.size, gate.macs, dense, layers)


class TooSmallError(UserError):
    """A budget below the smallest possible model, which takes ``times`` the budget."""

    def __init__(self, message: str, times: float) -> None:
        super().__init__(message)
        self.times = times


def fitted(task: Task, layout: Layout, fits: Callable[[Gated], None]) -> Layout:
    """The layout with groups small enough for every budget: ``fits`` raises TooSmallError where one is not met.

    Smaller groups make the forced ones smaller, and the gate larger; if no number of groups helps the error that names
    the smallest model is raised.
    """
    errors: list[TooSmallError] = []
    for groups in (layout.blocks_per_layer, *_more_groups(layout.blocks_per_layer)):
        finer = replace(layout, blocks_per_layer=groups)
        try:
            fits(gated_model(task, finer))
            return finer
        except TooSmallError as error:
            if layout.mode != "structural":
                raise
            errors.append(error)
        except UserError:  # such as a gate larger than the model
            if not errors:
                raise
    raise min(errors, key=lambda error: error.times)


def _more_groups(start: int) -> Sequence[int]:
    found = [start]
    while found[-1] < _MOST_GROUPS:
        found.append(min(_MOST_GROUPS, math.ceil(found[-1] * 1.25)))
    return found[1:]


@dataclass
class Account:
    """What a client's batches cost and lost in a round.

    batch_size: the largest batch, for the memory. copies: tensors of optimiser state a weight. gate: whether it is
    used. held: scalars of the model that the client holds beside the part in use; None = the kept set once more.
    waiting: further ones that it holds as soon as the part in use changes.
    """

    gated: Gated
    batch_size: int
    copies: int
    gate: bool
    held: int | None
    waiting: int = 0
    steps: int = 0
    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    used: NDArray[np.float64] = field(init=False)
    _seen: set[bytes] = field(default_factory=set)  # kept sets

    def __post_init__(self) -> None:
        self.used = np.zeros(self.gated.cut.blocks)

    def add(self, kept: Bools, n: int, loss: float) -> None:
        """Count a batch of ``n`` examples that used the kept set, (L,) bool."""
        costs = self._costs(kept)
        self._seen.add(kept.tobytes())
        self.used += kept
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
            "memory": self.largest["memory"] + 4 * self.waiting * (len(self._seen) > 1),
        }

    def _costs(self, kept: Bools) -> dict[str, float]:
        """Of one kept set, worked out once for all of its class: that takes as long as a small layer."""
        known = self.gated.known_costs
        key = (self.batch_size, self.copies, self.gate, self.held, self.gated.cut.price_class(kept))
        if key not in known:
            if len(known) >= _KNOWN_COSTS:
                known.clear()
            known[key] = self._fresh_costs(kept)
        return known[key]

    def _fresh_costs(self, kept: Bools) -> dict[str, float]:
        """Densities, flops and multiply-adds per example, memory in bytes."""
        gated, size = self.gated, self.gated.gate_size if self.gate else 0
        gate_macs = gated.gate_macs if self.gate else 0
        shares = gated.cut.densities(kept)
        cut = None if gated.flat else shares  # dense kernels compute a flat cut in full
        memory = memory_bytes(
            gated.layers,
            self.batch_size,
            cut,
            optimizer_copies=self.copies,
            gate=size,
            decision=4 * (gated.cut.spent(kept) if self.held is None else self.held),
            structured=True,
        )
        activations = 4 * self.batch_size * gated.gate_activations if self.gate else 0
        macs = forward_macs(gated.layers, cut) + gate_macs
        return {
            "density_true": (gated.cut.spent(kept) + size) / gated.dense,
            "density_nominal": nominal_density(gated.layers, shares) or 1.0,
            "flops": train_flops(gated.layers, 1, cut) + 3 * 2 * gate_macs,  # the gate's norm needs input gradients
            "macs": macs,
            "forward_macs_max": macs,
            "memory": memory.total + activations,
        }
