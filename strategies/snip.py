"""SNIP at the server: the weights that matter most to the loss on the server's own examples, before round 1.

Source: Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019,
arXiv 1810.02340, eqs. (4) to (6); code: namhoonlee/snip-public, b00bef0.
Differs from it: the score is of all examples that the server keeps, not of one batch of training data, which no server
has; first convolution and classifier stay dense; every layer keeps a weight at least, where global ranking would empty
it; the initial weights are those of every other method. Several steps (``steps`` above 1) are not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsparse.client import check_positive
from fedsparse.errors import UserError
from fedsparse.fixedmask import FixedMaskStrategy
from fedsparse.globalmask import check_densities, prunable, ranked_groups
from fedsparse.saliency import snip_scores
from fedsparse.sparse.masks import Mask
from fedsparse.sparse.pruning import RANKINGS, prune_in_steps
from fedsparse.task import Params, Task


@dataclass
class Snip(FixedMaskStrategy):
    """The mask of the largest abs(w * dL/dw) on ``server_data``.

    layer_densities: "global" (all layers are ranked together, as in the paper), or "uniform", "er" or "erk": ranked
    within each layer. steps: in which pruning is done; scores are taken anew, without what is pruned, at each.
    """

    layer_densities: str = "global"
    steps: int = 1

    def __post_init__(self) -> None:
        check_densities(self.density, self.density_kind, self.layer_densities, RANKINGS)
        check_positive(steps=self.steps)

    def find_mask(self, task: Task, params: Params) -> Mask:
        groups = ranked_groups(task, self.density, self.density_kind, self.layer_densities)
        data = self.server_data
        if data is None:
            raise UserError("snip needs examples that the server keeps; set partition.holdout")
        return prune_in_steps(
            lambda kept: snip_scores(task, params, data, kept), prunable(task).sizes, groups, self.steps
        )
