"""Models on another device than main memory: the results of the CPU, and on a GPU the same bits at every run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fedsparse.devices import CPU, compute_device
from fedsparse.errors import UserError
from fedsparse.runner import digest
from fedsparse.task import Task
from tests.apart import APART, apart
from tests.helpers import norm_task
from tests.test_contract import METHODS, run_method

VARIANTS: list[tuple[str, dict[str, Any], float | None]] = [
    *((name, {}, None) for name in METHODS),
    *((name, {"momentum": 0.9}, None) for name in METHODS),
    ("fedavg", {"optimizer": "adam", "clip": 1.0}, None),
    ("fedavg_ft", {"ft_epochs": 2}, None),
    ("fedtiny", {"averaging": "cumulative", "delta_r": 1, "r_stop": 2, "density": 0.3}, None),
    ("fedtiny", {"gradients_at": "global", "delta_r": 1, "r_stop": 2, "density": 0.3, "pretrain": "holdout"}, None),
    ("fedtiny", {"nested": True, "delta_r": 1, "r_stop": 2, "density": 0}, 0.6),
    ("prunefl", {"variant": "top", "initial": "magnitude", "delta_r": 1, "r_stop": 2}, None),
    ("prunefl", {"delta_r": 1, "r_stop": 2}, None),
    ("feddst", {"delta_r": 1, "r_stop": 2, "alpha": 0.3}, None),
    ("fixed_mask", {"local_norms": True, "ft_epochs": 1}, None),
    ("pfedgate", {"momentum": 0.9}, 0.5),
    ("pfedgate", {"mask_scope": "round", "download": "kept"}, 0.5),
    ("pfedgate", {"mask_scope": "client", "download": "changed", "settle": 1, "score_smoothing": 0.5}, 0.5),
    ("pfedgate", {"mode": "paper", "momentum": 0.9, "inference": "sample"}, 0.5),
    ("pfedgate", {"mode": "official", "momentum": 0.9, "relu_logits": True}, 0.5),
    ("pfedgate", {"gate_input": "client", "branches": "shared", "gate_pool": 4}, 0.5),
    ("pfedgate", {"class_gates": True, "inference": "batch"}, 0.5),
    ("pfedgate", {"score": "random_batch"}, 0.5),
    ("pfedgate", {"open_gate": True}, None),
]


def label(variant: tuple[str, dict[str, Any], float | None]) -> str:
    name, hyper, budget = variant
    return " ".join([name, *(f"{k}={v}" for k, v in hyper.items()), *([f"budget={budget}"] if budget else [])])


def dense_task(device: torch.device) -> Task:
    """All layers masked dense, as on a GPU."""
    task = norm_task()
    task.crossover = dict.fromkeys(("conv1", "fc1", "output"), 0.0)
    task.device = device
    return task


def end_of(name: str, device: torch.device, budget: float | None, **hyper: Any) -> str:
    strategy, memories, _ = run_method(name, dense_task(device), rounds=3, budget=budget, **hyper)
    return digest(strategy.state, memories)


@contextmanager
def deterministic() -> Iterator[torch.device]:
    yield compute_device("cuda")
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_nothing_mixes_tensors_of_two_devices_and_the_bits_are_those_of_the_cpu(
    variant: tuple[str, dict[str, Any], float | None],
) -> None:
    name, hyper, budget = variant
    with apart():
        there = end_of(name, APART, budget, **hyper)
    assert there == end_of(name, CPU, budget, **hyper)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_a_gpu_repeats_every_method_bit_for_bit(variant: tuple[str, dict[str, Any], float | None]) -> None:
    name, hyper, budget = variant
    with deterministic() as device:
        assert end_of(name, device, budget, **hyper) == end_of(name, device, budget, **hyper)


def test_the_device_apart_notices_what_a_gpu_would() -> None:
    with apart():
        far, near = torch.ones(3).to(APART), torch.ones(3)
        assert far.device == torch.zeros(3, device=APART).device == APART
        for mixed in (lambda: far + near, lambda: torch.nn.functional.linear(far, near), lambda: near[far.long()]):
            with pytest.raises(RuntimeError, match="device"):
                mixed()
        with pytest.raises(RuntimeError, match="numpy"):
            far.numpy()
        assert far.cpu().device == CPU and torch.equal(far.cpu(), near)
        assert torch.equal(far[torch.tensor([0])].cpu(), near[:1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_auto_is_the_cpu() -> None:
    assert compute_device("auto") == compute_device("cpu") == CPU
    with pytest.raises(UserError, match="needs a GPU"):
        compute_device("cuda")
