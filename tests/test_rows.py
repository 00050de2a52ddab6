"""Rows: what a reply says, what the dense model stands in for, and what of it breaks a budget."""

from __future__ import annotations

from typing import Any

import pytest

from fedsparse import cost
from fedsparse.packet import Packet
from fedsparse.rows import DenseCosts, fill_row, mean_accuracy, new_row, totals, violations
from fedsparse.task import Budget, Device, Score, Task
from tests.helpers import SHAPE, norm_task, small_task


def row_of(said: dict[str, Any], budget: Budget | None = None, task: Task | None = None) -> dict[str, Any]:
    device = Device(3, budget or Budget())
    row = new_row(2, "train", device, 500)
    dense = DenseCosts.of(task or small_task(), {"batch_size": 8, "momentum": 0.9})
    fill_row(row, Packet("update", scalars={"weight": 4, **said}), 1000, dense)
    row["broken"] = [v.what for v in violations(device, row)]
    return row


def test_what_a_reply_leaves_out_is_the_dense_models() -> None:
    task = norm_task()
    layers = cost.trace(task.model, SHAPE)
    row = row_of({"samples": 10}, task=task)
    assert (row["density_true"], row["density_nominal"]) == (1.0, 1.0)
    assert row["flops"] == pytest.approx(cost.train_flops(layers, 10))
    assert row["forward_macs"] == row["forward_macs_max"] == cost.forward_macs(layers)
    assert row["memory"] == cost.memory_bytes(layers, 8, optimizer_copies=1).total
    assert (row["round"], row["client"], row["bytes_up"], row["bytes_down"], row["n_train"]) == (2, 3, 1000, 500, 4)


def test_a_narrow_model_has_its_share_of_the_reference() -> None:
    wide, narrow = norm_task(), small_task()
    task = Task(narrow.model, SHAPE, 4, 0, reference=wide.model)
    share = cost.trainable_count(cost.trace(narrow.model, SHAPE)) / cost.trainable_count(cost.trace(wide.model, SHAPE))
    row = row_of({}, task=task)
    assert (row["density_true"], row["density_nominal"]) == (share, None)


@pytest.mark.parametrize(
    ("said", "budget", "broken"),
    [
        ({"forward_macs": 90.0}, Budget(forward_macs=90), []),
        ({"forward_macs": 90.0, "forward_macs_max": 110.0}, Budget(forward_macs=100), ["forward_macs"]),
        ({"forward_macs": 110.0, "forward_macs_max": 90.0}, Budget(forward_macs=100), []),
        ({"forward_macs": 110.0}, Budget(forward_macs=100), ["forward_macs"]),
        ({"memory": 101}, Budget(memory=100), ["memory"]),
        ({"memory": 100}, Budget(memory=100), []),
        ({}, Budget(memory=100), ["memory"]),  # the dense model's
        ({"flops": 7.0}, Budget(train_flops=6), ["train_flops"]),
        (
            {"density_true": 0.5},
            Budget(density=0.4, bytes_up=999, bytes_down=499),
            ["density", "bytes_up", "bytes_down"],
        ),
        ({"density_true": 0.5}, Budget(density=0.5, bytes_up=1000, bytes_down=500, seconds=1e-9), []),
    ],
)
def test_what_breaks_a_budget(said: dict[str, Any], budget: Budget, broken: list[str]) -> None:
    assert row_of(said, budget)["broken"] == broken


def test_a_devices_tier_is_its_density_unless_it_has_another() -> None:
    assert new_row(1, "train", Device(0, Budget(density=0.5)), 0)["tier"] == 0.5
    assert new_row(1, "train", Device(0, Budget(memory=9), tier=0.25), 0)["tier"] == 0.25
    assert new_row(1, "train", Device(0, Budget(memory=9)), 0)["tier"] is None


def test_mean_accuracies_and_totals_by_hand() -> None:
    rows: list[dict[str, Any]] = [
        {"personal": Score(4, 1, 0.0), "global": Score(4, 1, 0.0), "local": None, "failed": False},
        {"personal": Score(8, 6, 0.0), "global": Score(8, 6, 0.0), "local": None, "failed": False},
        {"personal": None, "global": None, "local": None, "failed": True},
    ]
    assert mean_accuracy(rows, "personal") == (1 / 4 + 6 / 8) / 2
    assert mean_accuracy(rows, "global") == 7 / 12  # one model on the pooled data
    assert mean_accuracy(rows, "local") is None
    for i, row in enumerate(rows):
        row |= {"bytes_up": 10 + i, "bytes_down": 100 + i, "flops": 1.0 + i, "loss": None if i else 0.5}
    assert totals(rows) == {"bytes": {"up": 21, "down": 303}, "flops": 3.0, "loss": 0.5, "clients": 2}
    assert totals([])["loss"] is None
