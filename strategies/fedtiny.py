"""FedTiny: one extremely sparse model, found by the devices together.

Source: Huang, Zhang, Sun, Fang, Yuan, Wu, "Distributed Pruning Towards Tiny Neural Networks in Federated Learning",
ICDCS 2023, arXiv 2212.01977; its first author's code (Little0o0/FedML, branch fedlottery, 4d03aff).
Coarse pruning gives candidates; "adaptive batch-norm selection" picks one in two exchanges before round 1, the stages
"calibrate" and "probe"; then FedAvg on it, with "progressive pruning" of a group of layers every few rounds.
Differs from that code: server data come from the training set; statistics are really averaged over the devices;
groups take turns by the number of changes so far; the schedule advances with the rounds; as many weights grow as are
pruned; gradients are averaged with the devices' shares of the data; first convolution and classifier stay dense.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsparse.candidates import VARIANCES, Candidates, StatisticsMean, candidate_counts, lowest_loss, union_mask
from fedsparse.changing import ChangingMask, ChangingState
from fedsparse.client import check_not_negative, check_positive
from fedsparse.cost import train_flops
from fedsparse.errors import UserError, shown, unknown
from fedsparse.globalmask import PART, SharedMask, masked_packet, prunable
from fedsparse.models.norms import read_statistics, with_statistics
from fedsparse.nested import Levels, asked_of, averaged_parts, chosen, first_levels, level_of, level_tensors
from fedsparse.packet import Packet
from fedsparse.regrow import (
    GradientMean,
    check_searchable,
    counts_row,
    exchanged,
    gradient_complaint,
    gradient_form,
    named_counts,
)
from fedsparse.replies import is_count
from fedsparse.seeding import sample_cohort, torch_rng
from fedsparse.sgd import batches, sgd
from fedsparse.sparse.masks import Mask, compact
from fedsparse.sparse.pruning import (
    GRANULARITIES,
    ORDERS,
    Counts,
    exchange_count,
    exchange_share,
    layer_groups,
)
from fedsparse.strategy import Plan, Reply, State, form, misfit
from fedsparse.task import Device, Params, Task
from fedsparse.threads import one_thread

SELECTIONS = ("adaptive", "vanilla")
SOURCES = {  # of the server's examples, and what each needs
    "none": "",
    "holdout": "examples that the server keeps; set partition.holdout without partition.public",
    "public": "another data set at the server; set partition.public",
}
_SGD = (
    "lr",
    "batch_size",
    "momentum",
    "weight_decay",
    "clip",
    "optimizer",
)  # of the client half, for the server's own training
_log = logging.getLogger("fedsparse")


@dataclass(frozen=True, kw_only=True)
class FedTinyState(ChangingState):
    """During the selection the shared mask is the union of all candidates.

    counts: (C, layers) int32, the candidates; statistics: (C, 2, channels) float32, empty before they are known;
    informed: (devices,) bool, who holds the candidates. grow: (layers,) int32, the gradients asked for in the next
    round. levels: the parts of the model for smaller budgets, filled once it is selected; nest_every: rounds between
    new choices of them.
    """

    counts: Tensor
    statistics: Tensor
    informed: Tensor
    grow: Tensor
    levels: Levels = ()
    nest_every: int = 1

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **level_tensors(self.levels)}


@dataclass
class FedTiny(ChangingMask):
    """One global sparse model: candidates, their selection, FedAvg with progressive pruning.

    density, density_kind, layer_densities: as for a fixed mask. pool: candidates; 1 = the layer densities as they are,
    without noise and selection. selection: "adaptive" (statistics first) or "vanilla" (with those of the server).
    variance: of the statistics, "mean" or "total" (:class:`StatisticsMean`). pretrain: "none", or "holdout" or
    "public" (on ``server_data`` of that source, for ``pretrain_epochs``). progressive: change the mask while training;
    granularity and order: which layers together and in turn; alpha: share that changes at first, in (0, 1]; delta_r,
    r_stop: 0 = a thirtieth and a third of all rounds. nested: a device of a smaller density budget trains a part of the
    model, density 0 is the largest budget, and the parts are chosen anew every ``nest_every`` rounds (0 = a thirtieth
    of all) and with every change of the mask; an extension.
    """

    client: ClassVar[str] = "fedtiny"
    preparation: ClassVar[tuple[str, ...]] = ("calibrate", "probe")
    parts: ClassVar[int] = 3
    layer_densities: str = "uniform"
    pool: int = 10
    selection: str = "adaptive"
    variance: str = "mean"
    pretrain: str = "none"
    pretrain_epochs: int = 3
    progressive: bool = True
    granularity: str = "block"
    order: str = "backward"
    alpha: float = 0.3
    nested: bool = False
    nest_every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(pool=self.pool, pretrain_epochs=self.pretrain_epochs)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if not 0 < self.alpha <= 1:
            raise UserError(f"alpha must be in (0, 1], got {self.alpha}")
        check_not_negative(nest_every=self.nest_every)
        if self.nest_every and not self.nested:
            raise UserError(f"nest_every is {self.nest_every}, which means something with nested = true alone")

    def beside(self) -> str:
        found = {
            "statistics and losses of candidates": self.pool > 1,
            "the largest gradients of pruned weights": self.progressive and self.changes,
            "parts of the model, by their budgets,": self.nested,
        }
        return next((what for what, sent in found.items() if sent), "")

    def notes(self, task: Task, devices: Sequence[Device]) -> tuple[str, ...]:
        """What a robust aggregation does not reach."""
        chosen = [what for what, sent in (("candidates", self.pool > 1), ("new weights", self.progressive)) if sent]
        if not (self.rule.robust and chosen):
            return ()
        return (f"aggregation = {self.aggregation!r} is of weights; {' and '.join(chosen)} go by means of all clients",)

    # --- before round 1 ----------------------------------------------------------------------------------------------

    def within(self, budgets: Sequence[float]) -> float:
        return max(budgets) if self.nested else super().within(budgets)

    def begin(self, task: Task, devices: Sequence[Device]) -> State:
        params = self._pretrained(task)
        counts = candidate_counts(task, self.density, self.density_kind, self.layer_densities, self.pool)
        shared = SharedMask.first(union_mask(task, params, counts), task, devices, self.client_config)
        state = FedTinyState(
            params=compact(params, shared.mask),
            shared=shared,
            counts=torch.from_numpy(counts).int(),
            statistics=torch.empty(0),
            informed=torch.zeros(len(shared.held), dtype=torch.bool),
            grow=torch.zeros(len(prunable(task).weights), dtype=torch.int32),
        )
        if self.nested:
            state = replace(state, levels=first_levels(task, devices, int(counts.sum(1).max()), self.client_config))
        if len(counts) == 1:
            return state
        norms = read_statistics(task, params).numel() > 0
        return replace(state, stage="calibrate" if norms and self.selection == "adaptive" else "probe")

    def invited(self, state: State, cohort: Sequence[Device]) -> Sequence[Device]:
        """Candidates are selected by devices that hold the whole model."""
        assert isinstance(state, FedTinyState)
        return cohort if state.stage == "train" else [d for d in cohort if level_of(state.levels, d) is None]

    def foresee(self, task: Task, devices: Sequence[Device], plan: Plan) -> None:
        """Parts need budgets, and somebody who trains the whole model and, with candidates, selects it."""
        super().foresee(task, devices, plan)
        if not self.nested:
            return
        budgets = {d.id: d.budget.density for d in devices}
        known = [b for b in budgets.values() if b is not None]
        if not known:
            raise UserError("nested = true needs density budgets: set budget.tiers, shares of the parameters")
        density = self.density or self.within(known)
        kind = self.density_kind if self.density else "true"
        counts = candidate_counts(task, density, kind, self.layer_densities, self.pool)
        parts = first_levels(task, devices, int(counts.sum(1).max()), self.client_config)
        training = sorted(budgets.keys() - set(plan.novel))
        whole = {d.id for d in devices if level_of(parts, d) is None}
        if not whole.intersection(training):
            largest = max(budgets[i] or 1.0 for i in training)
            raise UserError(
                f"nested: no client that trains may hold the whole model of {kind} density {density:g}, their largest"
                f" budget is {largest:g}; lower density"
            )
        if len(counts) > 1 and not whole.intersection(sample_cohort(training, plan.fraction, plan.seed, 0)):
            raise UserError(
                "nested: none of the clients that would select a candidate may hold the whole model; raise fraction or"
                " set pool = 1"
            )

    def scheduled(self, task: Task, state: State, rounds: int) -> State:
        assert isinstance(state, FedTinyState)
        delta, stop = self.schedule(rounds) if self.progressive else (0, 0)
        if state.stage == "probe" and self.selection == "adaptive":
            _log.info("the model has no batch norm: candidates are selected by their loss alone")
        nest = self.nest_every or max(1, round(rounds / 30))
        ready = replace(state, delta_r=delta, r_stop=stop, nest_every=nest)
        check_searchable(task, self._searched(task, ready))
        return self._announced(task, self._chosen(task, ready) if state.stage == "train" else ready)

    def _searched(self, task: Task, state: FedTinyState) -> list[str]:
        """The weights of which gradients will be searched, whichever candidate is selected."""
        sizes, found = prunable(task).sizes, set[str]()
        for counts in state.counts.tolist():
            pruned = [name for (name, size), k in zip(sizes.items(), counts, strict=True) if k < size]
            for group in layer_groups(pruned, self.granularity, self.order)[: self.turns(state)]:
                found.update(group)
        return sorted(found)

    def _pretrained(self, task: Task) -> Params:
        """The dense model that the server starts from (phase 0)."""
        params = task.init_params()
        if self.pretrain == "none":
            return params
        if self.server_data is None or self.server_source != self.pretrain:
            raise UserError(f'pretrain = "{self.pretrain}" needs {SOURCES[self.pretrain]}')
        with one_thread():
            return sgd(task, params, self.server_data, rng=torch_rng(task.seed, "pretrain"), **self._training).params

    def server_flops(self, task: Task, state: State) -> float:
        """Of the batches of the dense model's pre-training."""
        if self.pretrain == "none" or self.server_data is None:
            return 0.0
        size, epochs = self._training["batch_size"], self._training["epochs"]
        seen = batches(len(self.server_data), size, epochs, torch_rng(task.seed, "pretrain"))
        return train_flops(prunable(task).layers, sum(map(len, seen)))

    @property
    def _training(self) -> dict[str, Any]:
        """How the server trains: as the clients do, for epochs of its own."""
        given = {key: self.client_config[key] for key in _SGD if key in self.client_config}
        return {"lr": 0.05, "batch_size": 32, **given, "epochs": self.pretrain_epochs}

    # --- each exchange -----------------------------------------------------------------------------------------------

    def broadcast(self, state: State, device: Device) -> Packet:
        assert isinstance(state, FedTinyState)
        if state.stage == "train":
            level = level_of(state.levels, device)
            grow = {"grow": state.grow} if bool(state.grow.any()) else {}
            return self._model(state, device, level.asked if level else grow)
        extra = {"statistics": state.statistics} if state.statistics.numel() else {}
        if state.informed[device.id]:
            return Packet(state.stage, extra)
        return masked_packet(state.stage, state.params, state.shared, device, counts=state.counts, **extra)

    def deployed(self, state: State, device: Device) -> Packet:
        assert isinstance(state, FedTinyState)
        return self._model(state, device, {})

    def _model(self, state: FedTinyState, device: Device, asked: Mapping[str, Tensor]) -> Packet:
        """The model, or the part of it that fits the device, and what is asked of it."""
        held = level_of(state.levels, device) or state
        packet = masked_packet("train", held.params, held.shared, device, **asked)
        return replace(packet, scalars={**packet.scalars, PART: 1}) if state.levels else packet

    def complaint(self, task: Task, state: State, reply: Reply) -> str:
        assert isinstance(state, FedTinyState)
        if state.stage == "train":
            sizes, counts = prunable(task).sizes, self._asked(task, state, reply.device)
            common = (level_of(state.levels, reply.device) or state).common
            bad = misfit(reply.packet, "update", {**common, **gradient_form(counts, sizes)})
            return bad or gradient_complaint(reply.packet, counts, sizes, state.shared.mask)
        n = reply.packet.scalars.get("development")
        if not is_count(n, 1):
            return f"the reply's scalar 'development' must be a number of examples above 0, got {shown(n)}"
        c = len(state.counts)
        if state.stage == "probe":
            bad = misfit(reply.packet, "losses", {"losses": form(c), "correct": form(c, dtype=torch.int32)})
            return bad or _complaint_of_losses(reply.packet, n)
        shape = read_statistics(task, state.params).shape
        if not misfit(reply.packet, "statistics", {"statistics": form(0, *shape)}):
            return ""
        bad = misfit(reply.packet, "statistics", {"statistics": form(c, *shape)})
        negative = not bad and bool((reply.packet.tensors["statistics"][:, 1] < 0).any())
        return "a variance among the statistics is below 0" if negative else bad

    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        assert isinstance(state, FedTinyState)
        if state.stage == "calibrate":
            return self._calibrated(state, replies)
        if state.stage == "probe":
            return self._announced(task, self._probed(task, state, replies))
        return self._announced(task, self._trained(task, state, replies))

    def _calibrated(self, state: FedTinyState, replies: Iterable[Reply]) -> FedTinyState:
        """Exchange 1: each candidate's statistics, averaged over the devices."""
        mean, informed, seen = StatisticsMean(self.variance), state.informed.clone(), False
        for reply in replies:
            informed[reply.device.id] = seen = True
            if len(given := reply.packet.tensors["statistics"]):
                mean.add(given, int(reply.packet.scalars["development"]))
        if not seen:  # all have failed: the round says why
            return state
        if (statistics := mean.result()) is None:
            raise UserError(
                "no client's development set has min_development examples; raise development, or lower min_development"
                " (2 or more)"
            )
        return replace(state, stage="probe", statistics=statistics, informed=informed)

    def _probed(self, task: Task, state: FedTinyState, replies: Iterable[Reply]) -> FedTinyState:
        """Exchange 2: the candidate of lowest loss becomes the model."""
        losses, examples = [], []
        for reply in replies:
            losses.append(reply.packet.tensors["losses"].clone())
            examples.append(int(reply.packet.scalars["development"]))
        if not losses:
            return state
        best = lowest_loss(losses, examples)
        params, mask = Candidates(dict(state.params), state.shared.mask, state.counts).model(task, best)
        if state.statistics.numel():
            params = with_statistics(task, params, state.statistics[best])
        _log.info("candidate %d of %d is selected", best, len(state.counts))
        selected = replace(
            state,
            stage="train",
            params=params,
            shared=state.shared.changed_to(mask, task),
            counts=state.counts[best : best + 1],
            statistics=torch.empty(0),
            informed=torch.zeros_like(state.informed),
        )
        return self._chosen(task, selected)

    def _trained(self, task: Task, state: FedTinyState, replies: Iterable[Reply]) -> FedTinyState:
        """A round of FedAvg, and in an adjustment round the exchange of weights."""
        counts = named_counts(state.grow, prunable(task).weights)
        gradients = GradientMean(counts, prunable(task).sizes)

        def see(reply: Reply) -> None:
            gradients.add(reply.packet, self._asked(task, state, reply.device), reply.weight)

        new = self._averaged(task, state, replies, see)
        if counts:
            params, mask = exchanged(new.params, new.shared.mask, gradients.result(), counts)
            new = replace(new, params=params, shared=new.shared.changed_to(mask, task))
        if counts or new.round % new.nest_every == 0:
            new = self._chosen(task, new)
        return replace(new, adjustments=state.adjustments + self.adjusts(state, new.round))

    def _averaged(
        self, task: Task, state: FedTinyState, replies: Iterable[Reply], see: Callable[[Reply], None]
    ) -> FedTinyState:
        if not state.levels:
            return self.averaged(task, state, replies, see)
        params, shared, levels = averaged_parts(self.rule, task, state, state.levels, replies, see)
        return replace(state, params=params, shared=shared, levels=levels, round=state.round + 1)

    def _chosen(self, task: Task, state: FedTinyState) -> FedTinyState:
        """The state with its levels chosen anew from the model."""
        return replace(state, levels=chosen(task, state.params, state.shared.mask, state.levels))

    # --- the schedule ------------------------------------------------------------------------------------------------

    def _announced(self, task: Task, state: FedTinyState) -> FedTinyState:
        """The state with the gradients that the next round asks for: those of the group whose turn it is."""
        turn, mask, model = state.round + 1, state.shared.mask, prunable(task)
        groups = layer_groups(list(mask), self.granularity, self.order)
        if state.stage != "train" or not groups or not self.adjusts(state, turn):
            levels = tuple(replace(level, asked={}) for level in state.levels)
            return replace(state, grow=counts_row({}, model.weights), levels=levels)
        share = exchange_share(self.alpha, turn, state.r_stop)
        group = groups[state.adjustments % len(groups)]

        def row(part: Mask) -> Tensor:
            """A part may exchange by its own size; no more than the model has pruned."""
            sizes = {name: model.sizes[name] - len(mask[name]) + len(part[name]) for name in group}
            return counts_row({n: exchange_count(share, len(part[n]), sizes[n]) for n in group}, model.weights)

        levels = tuple(asked_of(task, level, row(level.shared.mask), state.shared) for level in state.levels)
        return replace(state, grow=row(mask), levels=levels)

    def _asked(self, task: Task, state: FedTinyState, device: Device) -> Counts:
        """How many gradients of each weight this round asks a device for."""
        level = level_of(state.levels, device)
        row = level.asked.get("grow", state.grow[:0]) if level else state.grow
        return named_counts(row, prunable(task).weights) if len(row) else {}


def _complaint_of_losses(reply: Packet, n: int) -> str:
    """What is wrong with the losses and right answers, of the right form, on ``n`` examples, or ""."""
    correct = reply.tensors["correct"]
    if bool(((correct < 0) | (correct > n)).any()):
        return f"the right answers of {n} examples must be from 0 to {n}"
    return ""


_CHOICES = {
    "selection": SELECTIONS,
    "variance": VARIANCES,
    "pretrain": SOURCES,
    "granularity": GRANULARITIES,
    "order": ORDERS,
}
