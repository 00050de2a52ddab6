"""FedAvg-FT: FedAvg, after which each client fine-tunes a copy of the global model on its own data.

The copy is scored and thrown away, so the server's half is FedAvg's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsparse.strategy import AveragingStrategy


@dataclass
class FedAvgFT(AveragingStrategy):
    """The weighted mean of whole models; personal models are fine-tuned copies."""

    client: ClassVar[str] = "fedavg_ft"
