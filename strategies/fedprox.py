"""FedProx: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127, Algorithm 2.

The server averages as FedAvg does (weights: numbers of training examples; the paper samples devices by their share
and averages plainly instead).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsparse.strategy import AveragingStrategy


@dataclass
class FedProx(AveragingStrategy):
    """The weighted mean of whole models, each held near the received one while it trained."""

    client: ClassVar[str] = "fedprox"
