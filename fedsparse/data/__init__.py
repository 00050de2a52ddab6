"""Data sets and how they are divided over clients."""

from __future__ import annotations

from fedsparse.data.datasets import dataset_names, load_dataset
from fedsparse.data.formats import Dataset
from fedsparse.data.partition import ClientData, FederatedData, PartitionConfig, federate

__all__ = [
    "ClientData",
    "Dataset",
    "FederatedData",
    "PartitionConfig",
    "dataset_names",
    "federate",
    "load_dataset",
]
