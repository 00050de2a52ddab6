"""SynFlow at the server: the weights that carry most of the flow from input to output, found without any data.

Source: Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic
flow", NeurIPS 2020, arXiv 2006.05467, Algorithm 1; code: ganguli-lab/Synaptic-Flow, 378fcee.
Differs from that code: double precision (the product over many layers leaves float32); biases and running means are 0
in the flow, so that it is conserved (the code takes their magnitudes, and starts them at 0); the number of kept weights
is met exactly whatever the ties; first convolution and classifier stay dense; every layer keeps a weight at least.
FedTiny's code runs 5 linear steps within each layer under this name; that is not SynFlow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedsparse.fixedmask import RankedMask
from fedsparse.saliency import flow_scores
from fedsparse.sparse.masks import Mask
from fedsparse.task import Params, Task


@dataclass
class SynFlow(RankedMask):
    """The mask of the largest synaptic flow; in the paper over all layers together and in 100 steps."""

    steps: int = 100

    @property
    def scored_examples(self) -> int:
        return 1  # the input of ones; in double precision, which flops do not show

    def scores(self, task: Task, params: Params, kept: Mask) -> Mapping[str, Tensor]:
        return flow_scores(task, params, kept)
