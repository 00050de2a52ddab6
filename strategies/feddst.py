"""FedDST: clients readjust the mask while they train; the server averages by coordinate and prunes back.

Source: Bibikar, Vikalo, Wang, Chen, "Federated Dynamic Sparse Training: Computing Less, Communicating Less, Yet
Learning Better", AAAI 2022, arXiv 2112.09824, Algorithm 1; the official code (bibikar/feddst, 1e2dca7).
Differs from that code: the share that changes is alpha / 2 * (1 + cos), as in the paper (the code multiplies by alpha
twice); clients are drawn without replacement and weigh by their examples (the code by batches); layer densities are
those of RigL and add up exactly; readjustments come in rounds delta_r, 2 delta_r, ...
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedsparse.changing import ChangingMask, ChangingState
from fedsparse.errors import UserError, unknown
from fedsparse.globalmask import (
    SharedMask,
    first_mask,
    kept_counts,
    masked_form,
    masked_packet,
    own_mask,
    own_mask_complaint,
    prunable,
)
from fedsparse.packet import Packet
from fedsparse.regrow import check_searchable, counts_row
from fedsparse.sparse.masks import carry, compact
from fedsparse.sparse.pruning import exchange_count, exchange_share, largest
from fedsparse.strategy import Reply, State, misfit
from fedsparse.task import Device, Task

INITIALS = ("magnitude", "random")


@dataclass(frozen=True, kw_only=True)
class FedDSTState(ChangingState):
    """grow: (layers,) int32, the weights that each client exchanges in the next round."""

    grow: Tensor


@dataclass
class FedDST(ChangingMask):
    """One global sparse model of constant layer densities whose mask the clients propose.

    initial: the first mask, "magnitude" (of the initial weights) or "random". alpha: share of a layer's kept weights
    that each client exchanges at first, in (0, 1]. delta_r: 0 = a thirtieth of all rounds, at most 15; r_stop: 0 = half
    of all rounds.
    """

    client: ClassVar[str] = "feddst"
    interval: ClassVar[int] = 15
    parts: ClassVar[int] = 2
    initial: str = "magnitude"
    alpha: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial not in INITIALS:
            raise unknown("initial", self.initial, INITIALS)
        if not 0 < self.alpha <= 1:
            raise UserError(f"alpha must be in (0, 1], got {self.alpha}")
        if self.rule.robust and self.changes:
            raise UserError(
                f"aggregation = {self.aggregation!r} protects nothing while clients change the mask: a weight that one"
                " client alone grows is what it says; set clip_updates instead, or r_stop = 1 (the mask stays)"
            )

    def beside(self) -> str:
        return "masks of their own" if self.changes else ""

    def begin(self, task: Task, devices: Sequence[Device]) -> State:
        params = task.init_params()
        counts = kept_counts(task, self.density, self.density_kind, self.layer_densities)
        shared = SharedMask.first(first_mask(task, params, counts, self.initial), task, devices, self.client_config)
        none = counts_row({}, prunable(task).weights)
        return FedDSTState(compact(params, shared.mask), shared=shared, grow=none)

    def scheduled(self, task: Task, state: State, rounds: int) -> State:
        new = super().scheduled(task, state, rounds)
        assert isinstance(new, FedDSTState)
        if self.turns(new):
            check_searchable(task, new.shared.mask)
        return self._announced(task, new)

    def broadcast(self, state: State, device: Device) -> Packet:
        assert isinstance(state, FedDSTState)
        grow = {"grow": state.grow} if bool(state.grow.any()) else {}
        return masked_packet("train", state.params, state.shared, device, **grow)

    def complaint(self, task: Task, state: State, reply: Reply) -> str:
        assert isinstance(state, FedDSTState)
        if not bool(state.grow.any()):
            return misfit(reply.packet, "update", state.common)
        counts = {name: len(kept) for name, kept in state.shared.mask.items()}
        return own_mask_complaint(task, reply.packet, "update", masked_form(task, state.common, counts))

    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        assert isinstance(state, FedDSTState)
        new = self._merged(task, state, replies) if bool(state.grow.any()) else self.averaged(task, state, replies)
        return self._announced(task, new)

    def _merged(self, task: Task, state: FedDSTState, replies: Iterable[Reply]) -> FedDSTState:
        """Each coordinate's mean over the clients that hold it; of each layer the largest stay, as many as before."""
        old, sizes = state.shared.mask, prunable(task).sizes
        mean, holders, seen = self.rule.whole(), self.rule.holders({name: sizes[name] for name in old}), []
        for reply in replies:
            own, tensors = own_mask(task, reply.packet), reply.packet.tensors
            sent = {n: carry(t, old[n], own[n]) if n in old else t for n, t in state.common.items()}
            values = self.rule.clipped({name: tensors[name] for name in sent}, sent)
            mean.add({name: t for name, t in values.items() if name not in old}, reply.weight)
            holders.add(values, own, reply.weight)
            seen.append(reply.device.id)
        params, mask = mean.result(state.params), dict(old)
        for name, kept in old.items():
            at, means = holders.result(name)
            if seen:
                best = largest(means, len(kept)).long()
                params[name], mask[name] = means[best], at[best]
        shared = state.shared.held_by(seen).changed_to(mask, task)
        done = state.adjustments + 1
        return replace(state, params=params, shared=shared, round=state.round + 1, adjustments=done)

    def _announced(self, task: Task, state: FedDSTState) -> FedDSTState:
        """The state with the numbers of weights that the clients exchange in the next round."""
        turn, model, counts = state.round + 1, prunable(task), {}
        if self.adjusts(state, turn):
            share = exchange_share(self.alpha, turn, state.r_stop)
            kept = {name: len(at) for name, at in state.shared.mask.items()}
            counts = {name: exchange_count(share, n, model.sizes[name]) for name, n in kept.items()}
        return replace(state, grow=counts_row(counts, model.weights))
