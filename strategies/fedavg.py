"""FedAvg: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks", arXiv 1602.05629, Algorithm 1.

Uploads are values, averaged with the numbers of training examples as weights over those who took part. Batch norm's
running statistics are part of the model and are averaged with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsparse.strategy import AveragingStrategy


@dataclass
class FedAvg(AveragingStrategy):
    """The weighted mean of whole models."""

    client: ClassVar[str] = "fedavg"
