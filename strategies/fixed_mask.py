"""A fixed mask: FedAvg on one sparse model whose mask is drawn before round 1 and never changes.

The control for every method that searches for a mask: does the search beat these layer densities and this criterion?
Densities ER and ERK: Evci et al. 2020 (RigL, arXiv 1911.11134); magnitude at initialisation as in Frankle et al. 2021
(arXiv 2009.08576). Differs from masked dense training, which is common elsewhere: pruned weights are neither stored,
nor sent, nor updated.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsparse.errors import unknown
from fedsparse.fixedmask import FixedMaskStrategy
from fedsparse.globalmask import check_densities, first_mask, kept_counts
from fedsparse.sparse.masks import Mask
from fedsparse.task import Params, Task

CRITERIA = ("random", "magnitude")


@dataclass
class FixedMask(FixedMaskStrategy):
    """The mask of a criterion at given layer densities.

    layer_densities: "uniform", "er" or "erk". criterion: "random", or "magnitude" of the initial weights within each
    layer.
    """

    layer_densities: str = "erk"
    criterion: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_densities(self.density, self.density_kind, self.layer_densities)
        if self.criterion not in CRITERIA:
            raise unknown("criterion", self.criterion, CRITERIA)

    def find_mask(self, task: Task, params: Params) -> Mask:
        counts = kept_counts(task, self.density, self.density_kind, self.layer_densities)
        return first_mask(task, params, counts, self.criterion)
