"""Budget tiers, the checker and the narrow dense models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fedsparse
from fedsparse import cost
from fedsparse.budget import BudgetConfig, Dense, assign, check, narrow_width, read_table
from fedsparse.errors import UserError
from fedsparse.experiment import from_dict
from fedsparse.models import build_model
from fedsparse.packet import Packet
from fedsparse.runner import federation_of
from fedsparse.task import Budget, Device

DENSE = Dense(forward_macs=1000.0, bytes_up=777, memory=999)
TABLE = """client, density, memory, bytes_up
3, 0.5, 1e6,
0, , , 2048
"""


def test_tiers_go_round_by_id() -> None:
    devices = assign(BudgetConfig(tiers=(1.0, 0.5, 0.25)), [7, 0, 1, 2, 3])
    assert {i: d.budget.density for i, d in devices.items()} == {7: 0.5, 0: 1.0, 1: 0.5, 2: 0.25, 3: 1.0}
    assert list(devices) == [d.id for d in devices.values()] == [7, 0, 1, 2, 3]
    assert all(d.tier == d.budget.density for d in devices.values())


def test_no_tiers_are_no_limit() -> None:
    assert assign(BudgetConfig(), [3]) == {3: Device(3)}
    assert assign(BudgetConfig(of="memory"), iter([3])) == {3: Device(3)}
    assert assign(BudgetConfig(tiers=(0.5,)), []) == {}


@pytest.mark.parametrize(
    ("of", "budgets"),
    [
        ("parameters", [Budget(density=1.0), Budget(density=0.3)]),
        ("multiply_adds", [Budget(forward_macs=1000.0), Budget(forward_macs=300.0)]),
        ("bytes", [Budget(bytes_up=777), Budget(bytes_up=233)]),  # whole bytes, rounded down
        ("memory", [Budget(memory=999), Budget(memory=299)]),
    ],
)
def test_tiers_are_shares_of_what_is_asked_for(of: str, budgets: list[Budget]) -> None:
    asked = []
    devices = assign(BudgetConfig(tiers=(1.0, 0.3), of=of), range(3), lambda: asked.append(1) or DENSE)
    assert [d.budget for d in devices.values()] == [budgets[0], budgets[1], budgets[0]]
    assert [d.tier for d in devices.values()] == [1.0, 0.3, 1.0]
    assert len(asked) == (of != "parameters")  # the dense model is costed only where that is needed


def test_tiers_of_the_dense_reference_model() -> None:
    settings = {"dataset": "digits", "partition": {"clients": 2}, "narrow": "parameters", "narrow_to": 0.5}
    hyper = {"batch_size": 7, "momentum": 0.9}
    shares = {}
    for of in ("multiply_adds", "bytes", "memory"):
        experiment = from_dict({**settings, "budget": {"tiers": [1, 0.5], "of": of}})
        federation = federation_of(experiment, config=hyper)
        shares[of] = [client.device.budget for client in federation.clients]
        assert f"budgets are shares of the dense model's {of.replace('_', '-')}" in federation.notes
    layers = cost.trace(build_model("mlp", (1, 8, 8), 10), (1, 8, 8))
    memory = cost.memory_bytes(layers, 7, optimizer_copies=1).total
    floats = {k: torch.empty(p.shape) for k, p in build_model("mlp", (1, 8, 8), 10).named_parameters()}
    assert shares["multiply_adds"][1] == Budget(forward_macs=cost.forward_macs(layers) / 2)
    assert shares["memory"] == [Budget(memory=memory), Budget(memory=memory // 2)]
    assert 0 < shares["bytes"][0].bytes_up - Packet("update", floats).nbytes < 300  # the reply's numbers


@pytest.mark.parametrize("of", ["parameters", "multiply_adds", "bytes", "memory"])
def test_a_dense_method_fits_a_tier_of_one_and_no_smaller_one(of: str, tmp_path: Path) -> None:
    settings = {"rounds": 2, "partition": {"clients": 4}, "method": {"name": "fedavg", "momentum": 0.9}}
    budget = {"tiers": [1, 0.99], "of": of, "on_over_budget": "record"}
    run = fedsparse.run(from_dict({**settings, "budget": budget}), out=tmp_path / "run")
    assert {row["client"]: row["over_budget"] for row in run.clients} == {0: 0, 1: 1, 2: 0, 3: 1}
    assert [tier["density_budget"] for tier in run.summary["tiers"]] == [1, 0.99]
    assert run.summary["budget_of"] == of
    limit = {"parameters": "density", "multiply_adds": "forward_macs", "bytes": "bytes_up", "memory": "memory"}[of]
    with pytest.raises(UserError, match=f"client 1, round 1: {limit} .* exceeds its budget"):
        fedsparse.run(from_dict({**settings, "budget": {**budget, "on_over_budget": "stop"}}), out=tmp_path / "stop")


# --- a table of devices ----------------------------------------------------------------------------------------------


def test_a_csv_gives_single_clients_their_budgets(tmp_path: Path) -> None:
    (tmp_path / "devices.csv").write_text("\ufeff" + TABLE, encoding="utf-8")
    config = BudgetConfig(tiers=(1.0, 0.25), table=str(tmp_path / "devices.csv"))
    devices = assign(config, range(4))
    assert devices[0] == Device(0, Budget(bytes_up=2048))
    assert devices[3] == Device(3, Budget(density=0.5, memory=10**6))
    assert (devices[0].tier, devices[3].tier) == (None, 0.5)
    assert [devices[i].budget for i in (1, 2)] == [Budget(density=0.25), Budget(density=1.0)]


def test_toml_and_csv_tables_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TABLE)
    (tmp_path / "a.toml").write_text(
        "[[device]]\nclient = 3\ndensity = 0.5\nmemory = 1e6\n[[device]]\nclient = 0\nbytes_up = 2048\n"
    )
    first, second = (read_table(str(tmp_path / name), range(4)) for name in ("a.csv", "a.toml"))
    assert first == second == {3: Budget(density=0.5, memory=10**6), 0: Budget(bytes_up=2048)}
    assert type(first[3].memory) is type(second[3].memory) is int


@settings(max_examples=30)
@given(st.dictionaries(st.integers(0, 9), st.sampled_from(["", "0.25", "1"]), max_size=5))
def test_whatever_is_in_a_table_is_assigned(rows: dict[int, str]) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "t.csv"
        file.write_text("client,density\n" + "".join(f"{i},{d}\n" for i, d in rows.items()))
        devices = assign(BudgetConfig(tiers=(0.5,), table=str(file)), range(10))
    for i, device in devices.items():
        expected = (float(rows[i]) if rows[i] else None) if i in rows else 0.5
        assert device.budget == Budget(density=expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client,densty\n1,0.5\n", "line 2: unknown column 'densty'; did you mean 'density'"),
        ("client,density\n9,0.5\n", "line 2: there is no client 9 among the 4 of this federation"),
        ("client,density\n-1,0.5\n", "line 2: there is no client -1"),
        ("client,density\n1,0.5\n\n1,0.25\n", "line 4: client 1 comes twice"),
        ("client,density\n1,1.5\n", r"line 2: budget.density must be in \(0, 1\], got 1.5"),
        ("client,density\n1,half\n", "line 2: density must be a number, got 'half'"),
        ("client,density\n1,nan\n", "line 2: density must be a number, got 'nan'"),
        ("client,memory\n1,2.5\n", "line 2: memory must be a whole number, got '2.5'"),
        ("client,memory\n1,0\n", "line 2: budget.memory must be above 0, got 0"),
        ("client,density\n,0.5\n", "line 2: 'client' is missing"),
        ("client,density\n1\n", "line 2: the header has 2 columns, this row has not"),
        ("client,density\n1,0.5,7\n", "line 2: the header has 2 columns, this row has not"),
        ("density\n0.5\n", "must begin with a header of different names, one of them 'client'"),
        ("client,density,density\n1,0.5,1\n", "must begin with a header of different names"),
        ("", "must begin with a header"),
    ],
)
def test_a_csv_that_does_not_fit(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_table(str(tmp_path / "t.csv"), range(4))
    assert "budget.table" in str(caught.value) and "t.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[device]]\nclient = true\n", r"\[\[device\]\] 1: client must be a whole number, got True"),
        ("[[device]]\nclient = 0\n[[device]]\ndensity = 1\n", r"\[\[device\]\] 2: 'client' is missing"),
        ("[[client]]\nclient = 0\n", r"must hold tables \[\[device\]\] and nothing else"),
        ("[device]\nclient = 0\n", r"must hold tables \[\[device\]\]"),
        ("[[device]\n", "cannot be read"),
    ],
)
def test_a_toml_table_that_does_not_fit(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_table(str(tmp_path / "t.toml"), range(4))


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"budget.table '.*none.csv' cannot be read: No such file"):
        read_table(str(tmp_path / "none.csv"), range(4))
    (tmp_path / "t.csv").write_bytes(b"client\n\xff\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_table(str(tmp_path / "t.csv"), range(4))
    with pytest.raises(UserError, match=r"budget.table must be a .csv or a .toml file, got 'devices.json'"):
        BudgetConfig(table="devices.json")


def test_seconds_bind_nothing_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("client,seconds\n1,2.5\n")
    settings = {"partition": {"clients": 2}, "budget": {"table": str(tmp_path / "t.csv")}}
    federation = federation_of(from_dict(settings))
    assert federation.clients[1].device.budget == Budget(seconds=2.5)
    assert federation.notes[-1].startswith("budgets of seconds bind nothing yet")


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


def test_what_the_tiers_are_shares_of() -> None:
    with pytest.raises(UserError, match=r"unknown budget.of 'macs' \(known: bytes, memory, multiply_adds, parameters"):
        BudgetConfig(of="macs")


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
    other = Budget(forward_macs=1e9, train_flops=1e12, memory=64)
    assert check(other, forward_macs=1e9 * (1 + 1e-10), train_flops=1e12 * (1 + 1e-10), memory=64) == []
    over = check(other, forward_macs=1e9 * (1 + 1e-8), train_flops=1e12 * (1 + 1e-8), memory=65, density_true=2.0)
    assert [v.what for v in over] == ["forward_macs", "train_flops", "memory"]
    assert [v.what for v in check(budget, density_true=float("nan"))] == ["density"]


def leaf(width: float) -> nn.Module:
    return build_model("leafcnn1", (1, 28, 28), 10, width=width)


def mlp(width: float) -> nn.Module:
    return build_model("mlp", (20,), 5, width=width)


def dense_cost(model: nn.Module, equal: str, shape: tuple[int, ...]) -> float:
    layers = cost.trace(model, shape)
    return cost.trainable_count(layers) if equal == "parameters" else cost.forward_macs(layers)


@settings(max_examples=25)
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
