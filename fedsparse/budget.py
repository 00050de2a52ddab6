"""Budgets: which device may spend what, whether a round kept to it, and the narrow dense model of equal cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsparse.errors import UserError, unknown

if TYPE_CHECKING:  # the configuration is read before torch is imported
    from torch import nn

    from fedsparse.task import Budget

ON_OVER_BUDGET = ("stop", "record")
EQUALS = ("parameters", "multiply_adds")
_TOLERANCE = 1e-9  # of densities, which are quotients of counts
_WIDTH_STEPS = 8192  # widths are searched on this grid: exact floats, finer than half a channel of 2048


@dataclass(frozen=True)
class BudgetConfig:
    """tiers: true densities in (0, 1]; the device with id i gets ``tiers[i % len(tiers)]``; empty = unlimited.

    on_over_budget: "stop" the run, or "record" the violation and go on.
    """

    tiers: tuple[float, ...] = ()
    on_over_budget: str = "stop"

    def __post_init__(self) -> None:
        tiers: object = self.tiers  # from a file it may be anything
        if not isinstance(tiers, list | tuple):
            raise UserError(f"budget.tiers must be a list of densities in (0, 1], got {tiers!r}")
        object.__setattr__(self, "tiers", tuple(tiers))
        for tier in tiers:
            if isinstance(tier, bool) or not isinstance(tier, int | float) or not 0 < tier <= 1:
                raise UserError(f"budget.tiers must be densities in (0, 1], got {tier!r}")
        if self.on_over_budget not in ON_OVER_BUDGET:
            raise unknown("budget.on_over_budget", str(self.on_over_budget), ON_OVER_BUDGET)


def assign(config: BudgetConfig, ids: Iterable[int]) -> dict[int, Budget]:
    """The budget of each device id, in the order of ``ids``."""
    from fedsparse.task import Budget

    tiers = config.tiers or (None,)
    return {i: Budget(density=tiers[i % len(tiers)]) for i in ids}


@dataclass(frozen=True)
class Violation:
    """A device spent more than it may. what: the budget's field."""

    what: str
    value: float
    limit: float

    def __str__(self) -> str:
        return f"{self.what} {self.value:.6g} is above the budget {self.limit:.6g}"


def check(
    budget: Budget,
    *,
    density_true: float | None = None,
    bytes_up: float | None = None,
    bytes_down: float | None = None,
) -> list[Violation]:
    """What of a round broke the budget. None = not known, not checked; NaN breaks any limit."""
    spent = (
        ("density", density_true, budget.density, _TOLERANCE),
        ("bytes_up", bytes_up, budget.bytes_up, 0.0),
        ("bytes_down", bytes_down, budget.bytes_down, 0.0),
    )
    return [
        Violation(what, value, limit)
        for what, value, limit, tolerance in spent
        if value is not None and limit is not None and not value <= limit + tolerance
    ]


def narrow_width(
    build: Callable[[float], nn.Module],
    input_shape: Sequence[int],
    *,
    tokens: bool = False,
    equal: str,
    target: float,
) -> tuple[float, float]:
    """The widest dense model that costs at most ``target`` times the one of width 1: (width, share reached).

    build: width in (0, 1] -> model (called on the meta device, so no values are made); equal: "parameters" (trainable
    scalars) or "multiply_adds" (of one forward pass); target: in (0, 1]. Widths are multiples of 1/8192; cost must not
    fall with width. Raises UserError with the smallest possible share if even the narrowest model costs more.
    """
    if equal not in EQUALS:
        raise unknown("narrow", equal, EQUALS)
    if not 0 < target <= 1:
        raise UserError(f"narrow_to must be in (0, 1], got {target}")

    def cost(step: int) -> float:
        return _dense_cost(build, step / _WIDTH_STEPS, input_shape, tokens, equal)

    full, smallest = cost(_WIDTH_STEPS), cost(1)
    limit = target * full * (1 + _TOLERANCE)
    if smallest > limit:
        raise UserError(
            f"no narrow model has {target:.4g} of the {equal.replace('_', '-')}: "
            f"the smallest possible share is {smallest / full:.4g}"
        )
    low, high = 1, _WIDTH_STEPS + 1  # cost(low) fits; cost(high) does not, or is out of range
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low / _WIDTH_STEPS, cost(low) / full


def _dense_cost(
    build: Callable[[float], nn.Module], width: float, input_shape: Sequence[int], tokens: bool, equal: str
) -> float:
    """Trainable scalars or forward multiply-adds of the model of that width."""
    import torch

    from fedsparse import cost

    with torch.device("meta"):
        model = build(width)
    if equal == "parameters":
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    return cost.forward_macs(cost.trace(model, input_shape, tokens=tokens))
