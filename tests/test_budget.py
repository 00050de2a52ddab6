"""Budget tiers, the checker and the narrow dense models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsparse import cost
from fedsparse.budget import BudgetConfig, assign, check, narrow_width
from fedsparse.errors import UserError
from fedsparse.models import build_model
from fedsparse.task import Budget


def test_tiers_go_round_by_id() -> None:
    budgets = assign(BudgetConfig(tiers=(1.0, 0.5, 0.25)), [7, 0, 1, 2, 3])
    assert {i: b.density for i, b in budgets.items()} == {7: 0.5, 0: 1.0, 1: 0.5, 2: 0.25, 3: 1.0}
    assert list(budgets) == [7, 0, 1, 2, 3]


def test_no_tiers_are_no_limit() -> None:
    assert assign(BudgetConfig(), [3]) == {3: Budget()}
    assert assign(BudgetConfig(tiers=(0.5,)), []) == {}


def test_a_list_becomes_a_tuple() -> None:
    config = BudgetConfig(tiers=[1, 0.5])  # type: ignore[arg-type]
    assert config == BudgetConfig(tiers=(1, 0.5))
    assert hash(config) == hash(BudgetConfig(tiers=(1, 0.5)))


@pytest.mark.parametrize("tier", [0, 0.0, -0.5, 1.1, float("nan"), "half", True, None])
def test_tiers_outside_the_range(tier: object) -> None:
    with pytest.raises(UserError, match=r"^budget.tiers must be densities in \(0, 1\], got ") as caught:
        BudgetConfig(tiers=(1.0, tier))  # type: ignore[arg-type]
    assert str(caught.value).endswith(repr(tier))


@pytest.mark.parametrize("tiers", [0.5, "0.5", None])
def test_tiers_that_are_no_list(tiers: object) -> None:
    with pytest.raises(UserError, match="must be a list"):
        BudgetConfig(tiers=tiers)  # type: ignore[arg-type]


def test_what_to_do_over_budget() -> None:
    with pytest.raises(UserError, match=r"unknown budget.on_over_budget 'records'; did you mean 'record'"):
        BudgetConfig(on_over_budget="records")


def test_a_round_within_its_budget() -> None:
    budget = Budget(density=0.25, bytes_up=100, bytes_down=200)
    assert check(budget, density_true=0.25 + 1e-10, bytes_up=100, bytes_down=200) == []
    assert check(Budget(), density_true=9.0, bytes_up=10**9, bytes_down=10**9) == []
    assert check(budget, density_true=None, bytes_up=None, bytes_down=None) == []


def test_a_round_over_its_budget() -> None:
    budget = Budget(density=0.25, bytes_up=100, bytes_down=200)
    violations = check(budget, density_true=0.25 + 1e-8, bytes_up=101, bytes_down=201)
    assert [(v.what, v.value, v.limit) for v in violations] == [
        ("density", 0.25 + 1e-8, 0.25),
        ("bytes_up", 101, 100),
        ("bytes_down", 201, 200),
    ]
    assert str(violations[1]) == "bytes_up 101 is above the budget 100"
    assert [v.what for v in check(budget, density_true=float("nan"))] == ["density"]


def leaf(width: float) -> nn.Module:
    return build_model("leafcnn1", (1, 28, 28), 10, width=width)


def mlp(width: float) -> nn.Module:
    return build_model("mlp", (20,), 5, width=width)


def dense_cost(model: nn.Module, equal: str, shape: tuple[int, ...]) -> float:
    layers = cost.trace(model, shape)
    return cost.trainable_count(layers) if equal == "parameters" else cost.forward_macs(layers)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.02, 1), st.sampled_from(["parameters", "multiply_adds"]))
def test_the_widest_mlp_that_fits(target: float, equal: str) -> None:
    width, share = narrow_width(mlp, (20,), equal=equal, target=target)
    full = dense_cost(mlp(1.0), equal, (20,))
    hidden = round(128 * width)
    assert dense_cost(mlp(hidden / 128), equal, (20,)) <= target * full * (1 + 1e-9)
    assert hidden == 128 or dense_cost(mlp((hidden + 1) / 128), equal, (20,)) > target * full
    assert share == dense_cost(mlp(width), equal, (20,)) / full <= target * (1 + 1e-9)


@pytest.mark.parametrize("equal", ["parameters", "multiply_adds"])
def test_a_narrow_cnn(equal: str) -> None:
    width, share = narrow_width(leaf, (1, 28, 28), equal=equal, target=0.25)
    full = dense_cost(leaf(1.0), equal, (1, 28, 28))
    assert share == dense_cost(leaf(width), equal, (1, 28, 28)) / full
    assert 0.2 < share <= 0.25 < dense_cost(leaf(width + 1 / 8192), equal, (1, 28, 28)) / full


def test_the_full_model_fits_itself() -> None:
    assert narrow_width(mlp, (20,), equal="parameters", target=1.0) == (1.0, 1.0)


def test_building_narrow_models_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    narrow_width(leaf, (1, 28, 28), equal="multiply_adds", target=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_of_tokens() -> None:
    def build(width: float) -> nn.Module:
        return build_model("charlstm", (4,), 9, width=width, vocabulary=9)

    _, share = narrow_width(build, (4,), tokens=True, equal="multiply_adds", target=0.5)
    assert 0.45 < share <= 0.5


def test_no_model_is_narrow_enough() -> None:
    with pytest.raises(
        UserError, match=r"no narrow model has 0\.001 of the parameters: the smallest possible share is 0\.0"
    ) as e:
        narrow_width(mlp, (20,), equal="parameters", target=0.001)
    smallest = dense_cost(mlp(1 / 8192), "parameters", (20,)) / dense_cost(mlp(1.0), "parameters", (20,))
    assert f"{smallest:.4g}" in str(e.value)
    with pytest.raises(UserError, match=r"the smallest possible share is 1$"):  # width changes nothing here
        narrow_width(lambda w: build_model("logistic", (20,), 5, width=w), (20,), equal="parameters", target=0.5)


def test_bad_narrow_arguments() -> None:
    with pytest.raises(UserError, match="unknown narrow 'parameter'; did you mean 'parameters'"):
        narrow_width(mlp, (20,), equal="parameter", target=0.5)
    with pytest.raises(UserError, match=r"narrow_to must be in \(0, 1\], got 0"):
        narrow_width(mlp, (20,), equal="parameters", target=0)


def test_the_configuration_needs_no_torch() -> None:
    code = "import sys, fedsparse.budget as b; b.BudgetConfig((0.5,)); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
