"""What all networks share: the description to build from, width scaling, normalisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

NORMS = ("batch", "group")


@dataclass(frozen=True)
class Recipe:
    """What a network is built for.

    input_shape: of one example, without the batch; classes: number of logits; width: factor on all hidden
    channels and features; norm: "batch" or "group"; vocabulary: number of tokens, 0 = numeric input.
    """

    input_shape: tuple[int, ...]
    classes: int
    width: float = 1.0
    norm: str = "batch"
    vocabulary: int = 0

    def scaled(self, units: int) -> int:
        """``units`` hidden channels or features under the width factor, at least one."""
        return max(1, round(self.width * units))

    def norm2d(self, channels: int) -> nn.Module:
        """Batch norm, or group norm with the groups of :func:`group_count`."""
        if self.norm == "group":
            return nn.GroupNorm(group_count(channels), channels)
        return nn.BatchNorm2d(channels)


def group_count(channels: int) -> int:
    """Groups for group norm: the largest divisor of ``channels`` that is at most 32 and leaves 4 channels a group.

    32 groups are the default of Wu and He (2018, arXiv 1803.08494). An odd number of channels may give one group.
    """
    limit = min(32, max(1, channels // 4))
    return next(groups for groups in range(limit, 0, -1) if channels % groups == 0)
