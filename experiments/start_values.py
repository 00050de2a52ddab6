"""Is it where weights are kept, or what they start from? A fixed mask at random positions, drawn several times.

    python experiments/tiny.py tune --densities 0.01 --only erk --rates 0.1 \
        --set method=experiments/start_values.py method.values=largest method.draw=1

Magnitude at initialisation keeps random positions too, since initial weights are independent: it differs from a random
mask in the values alone, which are the largest and nearly of one size. And every mask is one draw of many: draws tell
what chance does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedsparse.errors import unknown
from fedsparse.fixedmask import FixedMaskStrategy
from fedsparse.globalmask import MaskedState, check_densities, kept_counts
from fedsparse.seeding import torch_rng
from fedsparse.sparse.masks import Mask
from fedsparse.sparse.pruning import at_random
from fedsparse.strategy import State
from fedsparse.task import Device, Params, Task

VALUES = ("kept", "largest")


@dataclass
class StartValues(FixedMaskStrategy):
    """A random mask at given layer densities.

    layer_densities: "uniform", "er" or "erk". draw: which mask of many, by the seed. values: "kept", those of the
    initial model at its positions; "largest", -b or b by their sign, b the layer's largest initial weight.
    """

    client: ClassVar[str] = "fixed_mask"
    layer_densities: str = "erk"
    values: str = "kept"
    draw: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_densities(self.density, self.density_kind, self.layer_densities)
        if self.values not in VALUES:
            raise unknown("values", self.values, VALUES)

    def find_mask(self, task: Task, params: Params) -> Mask:
        counts = kept_counts(task, self.density, self.density_kind, self.layer_densities)
        rng = torch_rng(task.seed, "start_values", self.draw)
        return {name: at_random(params[name].numel(), k, rng) for name, k in counts.items()}

    def begin(self, task: Task, devices: Sequence[Device]) -> State:
        state = super().begin(task, devices)
        assert isinstance(state, MaskedState)
        if self.values == "kept":
            return state
        dense, params = task.init_params(), dict(state.params)
        for name in state.shared.mask:
            params[name] = dense[name].abs().max() * params[name].sign()
        return replace(state, params=params)
