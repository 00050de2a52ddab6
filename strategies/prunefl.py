"""PruneFL: one sparse model that is reconfigured from dense squared gradients, by what each weight brings for its time.

Source: Jiang, Wang, Valls, Ko, Lee, Leung, Tassiulas, "Model Pruning Enables Efficient Federated Learning on Edge
Devices", IEEE TNNLS 2022, arXiv 1909.12326; the official code (jiangyuang/PruneFL, d3f38c4).
One client prunes the dense model before round 1; then FedAvg, and every so many rounds all clients send the squared
gradients of all weights, kept or not, and the server keeps the set of most squared gradient for its time.
Differs from that code: ``density`` bounds the initial pruning too; times come from the cost model unless they are
given; the convolution that reads the input and the classifier stay dense, as for all methods here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedsparse.changing import ChangingMask, ChangingState, roomiest
from fedsparse.client import check_positive
from fedsparse.errors import UserError, unknown
from fedsparse.globalmask import (
    SharedMask,
    first_mask,
    kept_counts,
    masked_form,
    masked_packet,
    most_weights,
    own_mask,
    own_mask_complaint,
    prunable,
)
from fedsparse.packet import Packet
from fedsparse.reconfigure import Rule, SquareMean, square_bytes, square_complaint, square_form
from fedsparse.sgd import optimizer_copies
from fedsparse.sparse.importance import prunable_share
from fedsparse.sparse.masks import compact
from fedsparse.strategy import Reply, State, misfit
from fedsparse.task import Device, Task

VARIANTS = ("adaptive", "top")
INITIALS = ("client", "magnitude", "random")


@dataclass(frozen=True, kw_only=True)
class PruneFLState(ChangingState):
    """times: (layers,) float64, of one weight of each layer; all weights together take 1. budget: kept weights at
    most."""

    times: torch.Tensor
    budget: int


@dataclass
class PruneFL(ChangingMask):
    """One global sparse model, reconfigured every ``delta_r`` rounds (0 = a thirtieth of all, at most 50).

    density: the largest one; with "top" that of the model, unless the initial pruning ends below it. variant:
    "adaptive", the paper's: the size too is chosen, by squared gradient per time; "top", as later papers have it: every
    weight takes the same time and each layer keeps its number, those of largest squared gradient come. initial:
    "client" (the paper's initial pruning, which trains the *dense* model at the client of largest budget), "magnitude"
    (of the initial weights), "random".
    max_dec: share of a layer's kept weights, the smallest, that may go, in [0, 1), halved every ``half_life`` rounds.
    fixed_time: of a round without prunable weights, over that of all of them. transmission: share of sending in the
    latter. layer_times: "" = by multiply-adds and transmission; else a number for each prunable layer, from input to
    output, separated by commas: the measured time of one weight.
    """

    client: ClassVar[str] = "prunefl"
    preparation: ClassVar[tuple[str, ...]] = ("prune",)
    interval: ClassVar[int] = 50
    variant: str = "adaptive"
    initial: str = "client"
    max_dec: float = 0.3
    half_life: float = 10_000.0
    fixed_time: float = 0.7
    transmission: float = 0.44
    layer_times: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (("variant", self.variant, VARIANTS), ("initial", self.initial, INITIALS)):
            if value not in known:
                raise unknown(name, value, known)
        check_positive(half_life=self.half_life, fixed_time=self.fixed_time)
        if not 0 <= self.max_dec < 1:
            raise UserError(f"max_dec must be in [0, 1), got {self.max_dec}")
        if not 0 <= self.transmission <= 1:
            raise UserError(f"transmission must be in [0, 1], got {self.transmission}")
        _numbers(self.layer_times)

    def beside(self) -> str:
        if self.initial == "client":
            return "a model that one of them has pruned"
        return "squared gradients" if self.changes else ""

    # --- before round 1 ----------------------------------------------------------------------------------------------

    def begin(self, task: Task, devices: Sequence[Device]) -> State:
        params, mask = task.init_params(), {}
        if self.initial != "client":
            counts = kept_counts(task, self.density, self.density_kind, self.layer_densities)
            mask = first_mask(task, params, counts, self.initial)
        shared = SharedMask.first(mask, task, devices, self.client_config)
        return PruneFLState(
            compact(params, shared.mask),
            stage="prune" if self.initial == "client" else "train",
            shared=shared,
            times=self._times(task),
            budget=most_weights(task, self.density, self.density_kind),
        )

    def dense_before(self, cohort: Sequence[Device]) -> Sequence[Device]:
        return [roomiest(cohort)] if self.initial == "client" else ()

    def dense_buffers(self, task: Task) -> tuple[int, int]:
        return optimizer_copies(self.client_config), square_bytes(task)

    def invited(self, state: State, cohort: Sequence[Device]) -> Sequence[Device]:
        return self.dense_before(cohort) if state.stage == "prune" else cohort

    def notes(self, task: Task, devices: Sequence[Device]) -> tuple[str, ...]:
        return (
            ('initial = "client": one client trains the dense model before round 1',)
            if self.initial == "client"
            else ()
        )

    def _times(self, task: Task) -> torch.Tensor:
        """(layers,) float64: the time of one weight of each layer; all weights together take 1."""
        layers = list(prunable(task).weights.values())
        sizes = torch.tensor([layer.weights for layer in layers], dtype=torch.float64)
        if self.layer_times:
            given = torch.tensor(_numbers(self.layer_times), dtype=torch.float64)
            if len(given) != len(sizes):
                raise UserError(f"layer_times has {len(given)} numbers, the model {len(sizes)} layers that are pruned")
        elif self.variant == "top":
            given = torch.ones_like(sizes)
        else:
            macs = torch.tensor([layer.macs for layer in layers], dtype=torch.float64)
            given = (1 - self.transmission) * macs / macs.sum() / sizes + self.transmission / sizes.sum()
        return given / (given * sizes).sum()

    def _rule(self, task: Task, state: PruneFLState) -> Rule:
        times = dict(zip(prunable(task).sizes, state.times.tolist(), strict=True))
        return Rule(times, self.fixed_time, state.budget, per_layer=self.variant == "top")

    # --- each exchange -----------------------------------------------------------------------------------------------

    def broadcast(self, state: State, device: Device) -> Packet:
        assert isinstance(state, PruneFLState)
        if state.stage == "prune":
            packet = masked_packet("prune", state.params, state.shared, device, times=state.times)
            more = {"fixed": self.fixed_time, "budget": state.budget, "share": self.max_dec}
            return replace(packet, scalars={**packet.scalars, **more})
        packet = masked_packet("train", state.params, state.shared, device)
        if not self.adjusts(state, state.round + 1):
            return packet
        return replace(packet, scalars={**packet.scalars, "squares": 1})

    def complaint(self, task: Task, state: State, reply: Reply) -> str:
        assert isinstance(state, PruneFLState)
        sizes = prunable(task).sizes
        if state.stage == "prune":
            counts = {n: t.numel() for n in sizes if (t := reply.packet.tensors.get(n)) is not None and t.ndim == 1}
            if wrong := [name for name, k in counts.items() if not 0 < k < sizes[name]]:  # before a form of these sizes
                return f"tensor {wrong[0]!r} has {counts[wrong[0]]} kept weights of {sizes[wrong[0]]}"
            kept = sum(counts.get(name, size) for name, size in sizes.items())
            bad = own_mask_complaint(task, reply.packet, "pruned", masked_form(task, state.params, counts))
            return bad or (f"it keeps {kept} weights, {state.budget} are allowed" if kept > state.budget else "")
        if not self.adjusts(state, state.round + 1):
            return misfit(reply.packet, "update", state.common)
        bad = misfit(reply.packet, "update", {**state.common, **square_form(sizes)})
        return bad or square_complaint(reply.packet, sizes)

    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        assert isinstance(state, PruneFLState)
        if state.stage == "prune":
            return self._pruned(task, state, replies)
        if not self.adjusts(state, state.round + 1):
            return self.averaged(task, state, replies)
        mean = SquareMean(prunable(task).sizes, self.rule)
        new = self.averaged(task, state, replies, lambda reply: mean.add(reply.packet, reply.weight))
        if (found := mean.result()) is None:
            return new
        share = prunable_share(self.max_dec, self.half_life, new.round)
        params, mask = self._rule(task, new).changed(task, dict(new.params), new.shared.mask, *found, share)
        shared = new.shared.changed_to(mask, task)
        return replace(new, params=params, shared=shared, adjustments=new.adjustments + 1)

    def _pruned(self, task: Task, state: PruneFLState, replies: Iterable[Reply]) -> State:
        """The model that the first client has pruned."""
        for reply in replies:
            mask = own_mask(task, reply.packet)
            params = {name: reply.packet.tensors[name].clone() for name in state.params}
            return replace(state, stage="train", params=params, shared=state.shared.changed_to(mask, task))
        return state


def _numbers(text: str) -> list[float]:
    """The times in ``layer_times``. Raises UserError for what is no number above 0."""
    try:
        found = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [0.0]
    if not all(0 < value < float("inf") for value in found):
        raise UserError(f"layer_times must be numbers above 0 separated by commas, got {text!r}")
    return found
