"""SynFlow at the server: the weights that carry most of the flow from input to output, found without any data.

Source: Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic
flow", NeurIPS 2020, arXiv 2006.05467, Algorithm 1; code: ganguli-lab/Synaptic-Flow, 378fcee.
Differs from that code: double precision (the product over many layers leaves float32); biases and running means are 0
in the flow, so that it is conserved (the code takes their magnitudes, and starts them at 0); the number of kept weights
is met exactly whatever the ties; first convolution and classifier stay dense; every layer keeps a weight at least.
FedTiny's code runs 5 linear steps within each layer under this name; that is not SynFlow.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsparse.client import check_positive
from fedsparse.fixedmask import FixedMaskStrategy
from fedsparse.globalmask import check_densities, prunable, ranked_groups
from fedsparse.saliency import flow_scores
from fedsparse.sparse.masks import Mask
from fedsparse.sparse.pruning import RANKINGS, prune_in_steps
from fedsparse.task import Params, Task


@dataclass
class SynFlow(FixedMaskStrategy):
    """The mask of the largest synaptic flow.

    layer_densities: "global" (all layers are ranked together, as in the paper), or "uniform", "er" or "erk": ranked
    within each layer. steps: in which pruning is done; the density falls exponentially.
    """

    layer_densities: str = "global"
    steps: int = 100

    def __post_init__(self) -> None:
        check_densities(self.density, self.density_kind, self.layer_densities, RANKINGS)
        check_positive(steps=self.steps)

    def find_mask(self, task: Task, params: Params) -> Mask:
        groups = ranked_groups(task, self.density, self.density_kind, self.layer_densities)
        return prune_in_steps(lambda kept: flow_scores(task, params, kept), prunable(task).sizes, groups, self.steps)
