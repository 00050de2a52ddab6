"""How a pFedGate client picks blocks: from the gate's output to a kept set and one factor a block.

Source: Chen, Yao, Gao, Ding, Li, "Efficient Personalized Federated Learning via Sparse Model-Adaptation", ICML 2023,
arXiv 2305.02776, sections 5.2.2-5.2.3 and App. A; official code yxdyc/pFedGate at b8cfa15.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsparse.client import Memory, SgdClient, check_not_negative, check_positive
from fedsparse.errors import UserError, unknown
from fedsparse.models.gate import BOUNDS, BRANCHES, POST_NORMS, PRE_NORMS, GateOptions
from fedsparse.models.gated import LEAST, MODES, Gated, Layout, official_floor
from fedsparse.packet import Packet
from fedsparse.seeding import torch_rng
from fedsparse.sparse.blocks import BLOCKS_PER_LAYER, MAX_BLOCK_FRAC
from fedsparse.sparse.cut import COSTS, Bools
from fedsparse.sparse.knapsack import SOLVERS
from fedsparse.task import Client, Device, Params, Split, Task

SCORES = ("learned", "random_client", "random_batch")
STRAIGHT_THROUGH = ("auto", "kept", "full")
MASK_SCOPES = ("batch", "round", "client")
DOWNLOADS = ("all", "changed", "kept")
INFERENCES = ("auto", "client", "batch", "sample")
_CHOICES = {
    "mode": MODES,
    "branches": ("auto", *BRANCHES),
    "gate_pre_norm": PRE_NORMS,
    "gate_post_norm": POST_NORMS,
    "gate_bound": BOUNDS,
    "gate_input": ("batch", "client"),
    "uncut": ("refuse", "keep"),
    "cost": ("auto", *COSTS),
    "solver": SOLVERS,
    "straight_through": STRAIGHT_THROUGH,
    "mask_scope": MASK_SCOPES,
    "download": DOWNLOADS,
    "inference": INFERENCES,
    "score": SCORES,
}
_TIED = 0.5  # the importance of every block before a gate is trained


@dataclass(frozen=True)
class Choice:
    """One client's rule for a round.

    limits: see ``Gated.limits``. density: of the budget, None = none. score: where importances come from; the random
    ones are controls. smoothing: of importances over batches, 0 = each batch alone. noise: standard deviation of what
    is added to importances in training. straight_through: whether dropped blocks get a gradient ("full", paper) or not
    ("kept"). fixed: the kept set of the whole round, None = one a batch. open: every block at gate value 1.
    """

    gated: Gated
    client: int
    limits: Mapping[str, int]
    density: float | None
    cost: str
    solver: str
    score: str
    smoothing: float
    noise: float
    straight_through: str
    fixed: Bools | None = None
    open: bool = False

    def batch(
        self, gate: Params, x: Tensor, rng: torch.Generator, scores: Tensor | None
    ) -> tuple[Bools, Tensor, Tensor | None]:
        """The kept set, the gate values and the smoothed importances of a training batch, all (L,).

        The values carry the gate's gradient. x: what the gate sees, (n, *input_shape). scores: the smoothed importances
        so far, None before the first batch.
        """
        cut = self.gated.cut
        if self.open:
            return cut.everything, torch.ones(cut.blocks, device=x.device), None
        with self.gated.gate.bound(gate) as network:
            if network.training != (len(x) > 1):  # setting it costs a walk over all modules
                network.train(len(x) > 1)
            scale, importance = network(x)
        fresh = importance.detach().double().cpu()
        scores = fresh if scores is None else self.smoothing * scores + (1 - self.smoothing) * fresh
        kept = self.fixed
        if kept is None:
            kept = self.kept(self._scores(scores, rng))
        return kept, self._values(kept, scale, importance), scores

    def kept(self, importance: NDArray[np.float64]) -> Bools:
        """The kept set for importances (L,)."""
        return self.gated.choose(importance, self.limits, self.cost, self.solver, self.density)

    def client_wide(
        self, gate: Mapping[str, Tensor], data: Split, scores: Tensor | None, *, per_client: bool
    ) -> tuple[Bools, Tensor]:
        """One kept set and one vector of gate values for a client, from its training data; no gradients.

        scores: the smoothed importances of its last training, which then say what is kept; None = the gate does, in
        evaluation mode.
        """
        scale, importance = self.gated.client_gates(gate, data, per_client=per_client)
        kept = self.fixed
        if kept is None:
            kept = self.kept(self._fixed_scores((importance if scores is None else scores).cpu().numpy()))
        return kept, self.shut(kept, scale)

    def first(self) -> Bools:
        """The kept set before the client has trained its gate, known to the server too: of tied importances."""
        return self.kept(self._fixed_scores(np.full(self.gated.cut.blocks, _TIED)))

    def evaluated(self, gate: Mapping[str, Tensor], x: Tensor) -> tuple[Bools, Tensor]:
        """The kept set and the gate values of a batch in evaluation mode, both (L,)."""
        with torch.no_grad(), self.gated.gate.bound(gate) as network:
            network.eval()
            scale, importance = network(x)
        kept = self.kept(self._fixed_scores(importance.double().cpu().numpy()))
        return kept, self.shut(kept, scale)

    def shut(self, kept: Bools, scale: Tensor) -> Tensor:
        """The gate values with those of dropped blocks at 0."""
        return scale * torch.from_numpy(kept).to(scale.device)

    def _values(self, kept: Bools, scale: Tensor, importance: Tensor) -> Tensor:
        """M' = M * (I - sg(G) + G), App. A; 0 in value where dropped."""
        held = torch.from_numpy(kept).to(scale.device)
        if self.score != "learned" or (self.gated.layout.mode == "official" and self.density in (None, 1.0)):
            return scale * held
        if self.gated.layout.mode == "official":
            importance = importance.clamp(min=official_floor(self.gated.layout, self.density or 1.0))
        through = importance - importance.detach()
        return scale * (held + through if self.straight_through == "full" else held * (1 + through))

    def _scores(self, importance: Tensor, rng: torch.Generator) -> NDArray[np.float64]:
        """What training chooses by."""
        if self.score == "random_batch":
            return torch.rand(self.gated.cut.blocks, generator=rng, dtype=torch.float64).numpy()
        scores = self._fixed_scores(importance.numpy())
        if self.noise:
            noise = torch.randn(self.gated.cut.blocks, generator=rng, dtype=torch.float64)
            scores = scores + self.noise * noise.numpy()
        return scores

    def _fixed_scores(self, importance: NDArray[np.float64]) -> NDArray[np.float64]:
        """Importances outside training: those of the gate, or the client's own random ones."""
        if self.score == "learned":
            return importance
        rng = torch_rng(self.gated.gate.seed, self.client, self.score)
        return torch.rand(self.gated.cut.blocks, generator=rng, dtype=torch.float64).numpy()


@dataclass(frozen=True)
class GatedClient(SgdClient):
    """Abstract: the options of a client half for pFedGate's server, checked, and what follows from them.

    mode: "structural", "paper" or "official"; ``docs/methods/pfedgate.md`` says what each is.
    gate_lr, gate_clip: learning rate and gradient clip of the gate; momentum and weight decay are shared.
    branches: "separate" (auto) or "shared" (auto in mode official); share_pre_norm: separate branches share their first
    norm. gate_pool: pool the gate's input to that many positions a side, 0 = not. gate_pre_norm, gate_post_norm,
    gate_bound: the gate's layers. gate_start: about what M is before the gate is trained, in (0, 1). gate_input:
    "batch", or "client" for the mean of all local inputs.
    blocks_per_layer, max_block_frac, least, uncut: the cut. class_gates: scale each class by a gate of its own, which
    drops none (mode structural; flat cuts weigh chunks of the classifier anyway). cost: what the knapsack counts,
    "auto" = what the budget limits. solver: of the knapsack. straight_through: "full" (auto in mode paper) or "kept".
    mask_scope: a kept set for each "batch", each "round" (chosen at the end of the client's last one) or each "client"
    (fixed after ``settle`` of its rounds). download: all of the model, what "changed" since the client's copy, or what
    the client has "kept". inference: one mask a "client" (auto), a "batch" (auto in mode official, if gate_input is
    "batch") or a "sample".
    score: "learned" importances, or random ones as a control; score_smoothing: how much of a block's importance comes
    from the batches before, in [0, 1); score_noise: standard deviation of what is added to it in training.
    relu_logits: the official code's ReLU on the logits. open_gate: keep every block at gate value 1, no gate: FedAvg.
    """

    clip: float = 10.0
    mode: str = "structural"
    gate_lr: float = 0.1
    gate_clip: float = 10.0
    branches: str = "auto"
    share_pre_norm: bool = False
    gate_pool: int = 0
    gate_pre_norm: str = "switch"
    gate_post_norm: str = "batch"
    gate_bound: str = "sigmoid"
    gate_start: float = 0.5
    gate_input: str = "batch"
    blocks_per_layer: int = BLOCKS_PER_LAYER
    max_block_frac: float = MAX_BLOCK_FRAC
    least: float = LEAST
    uncut: str = "refuse"
    class_gates: bool = False
    cost: str = "auto"
    solver: str = "exact"
    straight_through: str = "auto"
    mask_scope: str = "batch"
    settle: int = 5
    download: str = "all"
    inference: str = "auto"
    score: str = "learned"
    score_smoothing: float = 0.0
    score_noise: float = 0.0
    relu_logits: bool = False
    open_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer != "sgd":
            raise UserError(f"pfedgate trains with optimizer 'sgd' only, got {self.optimizer!r}")
        check_not_negative(gate_lr=self.gate_lr, gate_clip=self.gate_clip, gate_pool=self.gate_pool)
        check_not_negative(score_noise=self.score_noise)
        if not 0 <= self.score_smoothing < 1:
            raise UserError(f"score_smoothing must be in [0, 1), got {self.score_smoothing}")
        check_positive(blocks_per_layer=self.blocks_per_layer, max_block_frac=self.max_block_frac, settle=self.settle)
        for name in ("max_block_frac", "least"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        self._check_together()

    def _check_together(self) -> None:
        """Refuse options that do not fit together, with the reason."""
        official, fixed = self.mode == "official", self.mask_scope != "batch"
        if official and self.blocks_per_layer == 1:
            raise UserError('mode = "official" with blocks_per_layer = 1 masks every block; use at least 2')
        if self.mode == "paper" and self.blocks_per_layer == 1:
            raise UserError('mode = "paper" with blocks_per_layer = 1 keeps every block; use at least 2')
        if official and self.solver != "exact":
            raise UserError(f'mode = "official" has a choice of its own; leave out solver = {self.solver!r}')
        if self.share_pre_norm and self.layout.gate.branches == "shared":
            raise UserError('share_pre_norm needs branches = "separate"')
        if self.open_gate and self.download == "kept":
            raise UserError('open_gate keeps every block; download = "kept" needs a gate')
        if self.class_gates and self.mode != "structural":
            raise UserError(f'class_gates needs mode = "structural", got mode = {self.mode!r}')
        if self.relu_logits and not official:
            raise UserError('relu_logits is the official code\'s; it needs mode = "official"')
        if official and fixed:
            raise UserError(f'mode = "official" has mask_scope = "batch" only, got {self.mask_scope!r}')
        if self.straight_through == "full" and self.mode != "paper":
            raise UserError('straight_through = "full" needs mode = "paper": elsewhere dropped blocks are not computed')
        if self.download == "kept" and self.mode != "structural":
            raise UserError(f'download = "kept" needs mode = "structural", got mode = {self.mode!r}')
        if self.download == "kept" and not fixed:
            raise UserError(
                'download = "kept" needs mask_scope "round" or "client": with one mask a batch the server cannot know'
                " which blocks the client will use"
            )
        if self.gate_input == "client" and self.inference in ("batch", "sample"):
            raise UserError(
                f'inference = {self.inference!r} needs gate_input = "batch": with "client" the gate sees the mean of'
                " the local inputs alone"
            )
        if fixed and self.inference in ("batch", "sample"):
            raise UserError(f'inference = {self.inference!r} needs mask_scope = "batch", got {self.mask_scope!r}')
        if fixed and self.score == "random_batch":
            raise UserError(f'score = "random_batch" needs mask_scope = "batch", got {self.mask_scope!r}')

    @property
    def layout(self) -> Layout:
        """What shapes the cut and the gate."""
        branches = ("shared" if self.mode == "official" else "separate") if self.branches == "auto" else self.branches
        gate = GateOptions(
            branches=branches,
            share_pre_norm=self.share_pre_norm,
            pool=self.gate_pool,
            pre_norm=self.gate_pre_norm,
            post_norm=self.gate_post_norm,
            bound=self.gate_bound,
            start=self.gate_start,
        )
        keep = self.uncut == "keep"
        return Layout(self.mode, self.blocks_per_layer, self.max_block_frac, self.least, keep, self.class_gates, gate)

    @property
    def inference_mode(self) -> str:
        """How clients are evaluated: "client", "batch" or "sample"."""
        if self.inference != "auto":
            return self.inference
        return "batch" if self.mode == "official" and self.gate_input == "batch" else "client"

    @property
    def copies(self) -> int:
        return int(self.momentum > 0)

    def choice(self, gated: Gated, device: Device, density: float | None) -> Choice:
        """The rule by which a device picks blocks, as long as no kept set is fixed. density: of its budget."""
        limits: dict[str, int] = {}
        if not self.open_gate and self.mode != "official":  # the official budget is what its own choice makes of s
            limits = gated.limits(device, self.batch_size, self.copies, density)
        through = ("full" if self.mode == "paper" else "kept") if self.straight_through == "auto" else ""
        return Choice(
            gated,
            device.id,
            limits,
            density,
            self.cost,
            self.solver,
            self.score,
            self.score_smoothing,
            self.score_noise,
            through or self.straight_through,
            open=self.open_gate,
        )

    @abstractmethod
    def deployed(self, task: Task, client: Client, packet: Packet, memory: Memory) -> tuple[Bools, Tensor]:
        """The kept set and the gate values with which the client would deploy a model now, both (L,)."""

    @abstractmethod
    def evaluation_masks(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Bools:
        """(n, L): the kept sets that inference by batch or by sample finds on the client's training data, in order.

        Only the first few hundred examples are looked at, or one batch where ``batch_size`` is larger.
        """
