"""Is it where weights are kept, or what they start from? A fixed mask whose kept weights start from other values.

    fedsparse run experiments/cifar10_fedtiny.toml --set method=experiments/start_values.py \
        --set method.density=0.01 --set method.criterion=magnitude --set method.values=redrawn --set method.lr=0.1

Magnitude at initialisation keeps random positions, since initial weights are independent: it differs from a random mask
in the values alone, which are the largest and nearly of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedsparse.errors import unknown
from fedsparse.globalmask import MaskedState
from fedsparse.seeding import torch_rng
from fedsparse.strategy import State
from fedsparse.task import Device, Task
from strategies.fixed_mask import FixedMask

VALUES = ("kept", "redrawn", "shrunk", "largest")


@dataclass
class StartValues(FixedMask):
    """A fixed mask. values: "kept", those of the dense model; "redrawn", uniform in (-b, b), b the layer's largest
    initial weight; "shrunk", divided by the square root of three, which gives the largest weights the mean square of
    all; "largest", -b or b by the sign."""

    client: ClassVar[str] = "fixed_mask"
    values: str = "redrawn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values not in VALUES:
            raise unknown("values", self.values, VALUES)

    def begin(self, task: Task, devices: Sequence[Device]) -> State:
        state = super().begin(task, devices)
        assert isinstance(state, MaskedState)
        dense, rng = task.init_params(), torch_rng(task.seed, "start_values")
        params = dict(state.params)
        for name in state.shared.mask:
            start, bound = params[name], float(dense[name].abs().max())
            if self.values == "redrawn":
                params[name] = bound * (2 * torch.rand(start.shape, generator=rng) - 1)
            elif self.values == "shrunk":
                params[name] = start / 3**0.5
            elif self.values == "largest":
                params[name] = bound * start.sign()
        return replace(state, params=params)
