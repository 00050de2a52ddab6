"""One global mask that changes while training: the schedule, and what the server halves of such methods share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from fedsparse.errors import UserError
from fedsparse.globalmask import GlobalMaskStrategy, MaskedState, averaged, check_densities
from fedsparse.strategy import Reply, State
from fedsparse.task import Device, Task

_log = logging.getLogger("fedsparse")


@dataclass(frozen=True, kw_only=True)
class ChangingState(MaskedState):
    """round: rounds done; adjustments: changes of the mask so far; delta_r, r_stop: the schedule in rounds, 0 = no
    changes."""

    round: int = 0
    adjustments: int = 0
    delta_r: int = 0
    r_stop: int = 0


S = TypeVar("S", bound=ChangingState)


@dataclass
class ChangingMask(GlobalMaskStrategy):
    """Abstract: one global sparse model whose mask changes at the end of rounds ``delta_r``, 2 ``delta_r``, ...

    layer_densities: "uniform", "er" or "erk". delta_r: rounds between changes, 0 = a thirtieth of all rounds, at most
    ``interval``. r_stop: the round before which they end, 0 = all rounds over ``parts``; 1 = the mask never changes.
    """

    interval: ClassVar[int] = 0  # the paper's; 0 = none
    parts: ClassVar[int] = 1
    layer_densities: str = "erk"
    delta_r: int = 0
    r_stop: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_densities(self.density, self.density_kind, self.layer_densities)
        if min(self.delta_r, self.r_stop) < 0:
            raise UserError(f"delta_r and r_stop must be at least 0, got {self.delta_r} and {self.r_stop}")

    def scheduled(self, task: Task, state: State, rounds: int) -> State:
        assert isinstance(state, ChangingState)
        delta, stop = self.schedule(rounds)
        return replace(state, delta_r=delta, r_stop=stop)

    def schedule(self, rounds: int) -> tuple[int, int]:
        """Rounds between changes, and the round before which they end. Raises UserError where they do not fit."""
        delta = self.delta_r or max(1, round(rounds / 30))
        if self.interval and not self.delta_r:
            delta = min(delta, self.interval)
        stop = self.r_stop or max(1, round(rounds / self.parts))
        if stop > rounds:
            raise UserError(f"r_stop is {stop}, beyond the {rounds} rounds")
        if 1 < stop <= delta:
            raise UserError(f"delta_r is {delta} and r_stop {stop}: the mask would never change")
        if stop == 1 and not self.r_stop:
            _log.info("the mask never changes in %d rounds unless r_stop is set: by default it is 1 for so few", rounds)
        return delta, stop

    def turns(self, state: ChangingState) -> int:
        """How often the mask changes in all."""
        return sum(self.adjusts(state, turn) for turn in range(1, state.r_stop))

    def adjusts(self, state: ChangingState, turn: int) -> bool:
        """Whether the mask changes at the end of round ``turn``."""
        return bool(state.delta_r) and turn % state.delta_r == 0 and 0 < turn < state.r_stop

    @property
    def changes(self) -> bool:
        """Whether the mask may change at all."""
        return self.r_stop != 1

    def averaged(self, task: Task, state: S, replies: Iterable[Reply], see: Callable[[Reply], None] | None = None) -> S:
        """The state after a round of FedAvg on the kept weights; ``see`` gets each reply too."""
        return replace(averaged(self.rule, task, state, replies, see), round=state.round + 1)


def roomiest(cohort: Sequence[Device]) -> Device:
    """The device of largest density budget; of equals that of lowest id."""
    return max(cohort, key=lambda d: (1.0 if d.budget.density is None else d.budget.density, -d.id))
