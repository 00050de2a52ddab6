"""SNIP at the server: the weights that matter most to the loss on the server's own examples, before round 1.

Source: Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019,
arXiv 1810.02340, eqs. (4) to (6); code: namhoonlee/snip-public, b00bef0.
Differs from it: the score is of all examples that the server has, not of one batch of training data, which no server
has; first convolution and classifier stay dense; every layer keeps a weight at least, where global ranking would empty
it; the initial weights are those of every other method. Several steps (``steps`` above 1) are not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedsparse.errors import UserError
from fedsparse.fixedmask import RankedMask
from fedsparse.saliency import snip_scores
from fedsparse.sparse.masks import Mask
from fedsparse.task import Params, Task


@dataclass
class Snip(RankedMask):
    """The mask of the largest abs(w * dL/dw) on ``server_data``; in the paper over all layers and in one step."""

    def find_mask(self, task: Task, params: Params) -> Mask:
        if self.server_data is None:
            raise UserError("snip needs examples that the server keeps; set partition.holdout or partition.public")
        return super().find_mask(task, params)

    @property
    def scored_examples(self) -> int:
        return len(self.server_data) if self.server_data else 0

    def scores(self, task: Task, params: Params, kept: Mask) -> Mapping[str, Tensor]:
        assert self.server_data is not None
        return snip_scores(task, params, self.server_data, kept)
