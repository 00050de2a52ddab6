"""SSFL: the clients score the common initial weights on their own data, once; the server keeps the best of the mean.

Source: Ohib, Thapaliya, Dziugaite, Liu, Calhoun, Plis, "SSFL: Discovering Sparse Unified Subnetworks at Initialization
for Efficient Federated Learning", TMLR, arXiv 2405.09037; code: riohib/SSFL, 83fc11d. One exchange before round 1, the
stage "score"; then FedAvg on the mask.
Differs from that code: the mean is weighted by the clients' training examples (the code's is plain, although its
FedAvg is weighted); with ``fraction`` below 1 only the cohort of round 0 sends scores (the code asks all clients); the
number of kept weights is met exactly whatever the ties; first convolution and classifier stay dense; every layer keeps
a weight at least. The paper's densities are 0.3 to 0.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedsparse.globalmask import (
    GlobalMaskStrategy,
    MaskedState,
    SharedMask,
    averaged,
    check_densities,
    masked_packet,
    prunable,
    ranked_groups,
)
from fedsparse.packet import Packet
from fedsparse.saliency import score_bytes
from fedsparse.sparse.masks import compact
from fedsparse.sparse.pruning import RANKINGS, prune_in_steps
from fedsparse.strategy import Reply, State, form, misfit
from fedsparse.task import Device, Task


@dataclass(frozen=True, kw_only=True)
class SsflState(MaskedState):
    """how: the density and its kind."""

    how: tuple[float, str]


@dataclass
class Ssfl(GlobalMaskStrategy):
    """The mask of the largest mean of the clients' scores; then the weighted mean of compact models.

    layer_densities: "global" (all layers are ranked together, as in the paper), or "uniform", "er" or "erk": ranked
    within each layer.
    """

    client: ClassVar[str] = "ssfl"
    preparation: ClassVar[tuple[str, ...]] = ("score",)
    layer_densities: str = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_densities(self.density, self.density_kind, self.layer_densities, RANKINGS)

    def beside(self) -> str:
        return "scores of all weights"

    def begin(self, task: Task, devices: Sequence[Device]) -> State:
        groups = ranked_groups(task, self.density, self.density_kind, self.layer_densities)
        stage = "train" if sum(groups.values()) == sum(prunable(task).sizes.values()) else "score"
        how = self.density, self.density_kind
        return SsflState(
            task.init_params(), stage, how=how, shared=SharedMask.first({}, task, devices, self.client_config)
        )

    def dense_before(self, cohort: Sequence[Device]) -> Sequence[Device]:
        return cohort if self.density < 1 else ()

    def dense_buffers(self, task: Task) -> tuple[int, int]:
        return 0, score_bytes(prunable(task).sizes)

    def broadcast(self, state: State, device: Device) -> Packet:
        assert isinstance(state, MaskedState)
        return masked_packet(state.stage, state.params, state.shared, device)

    def complaint(self, task: Task, state: State, reply: Reply) -> str:
        assert isinstance(state, MaskedState)
        if state.stage == "train":
            return misfit(reply.packet, "update", state.common)
        bad = misfit(reply.packet, "scores", {name: form(size) for name, size in prunable(task).sizes.items()})
        negative = [name for name, t in reply.packet.tensors.items() if not bad and bool((t < 0).any())]
        return f"the scores of {negative[0]!r} must be at least 0" if negative else bad

    def reduce(self, task: Task, state: State, replies: Iterable[Reply]) -> State:
        assert isinstance(state, SsflState)
        if state.stage == "train":
            return averaged(self.rule, task, state, replies)
        mean, names = self.rule.whole(), []
        for reply in replies:
            mean.add(reply.packet.tensors, reply.weight)
            names = list(reply.packet.tensors)
        if not names:  # all have failed: the round says why
            return state
        scores = mean.result({name: torch.empty(0) for name in names})
        groups = ranked_groups(task, *state.how, self.layer_densities)
        mask = prune_in_steps(lambda _: scores, prunable(task).sizes, groups, 1)
        shared = state.shared.changed_to(mask, task)
        return replace(state, stage="train", params=compact(state.params, shared.mask), shared=shared)
