"""Experiment files: what is read, what is refused, what is written back; the house's own files."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsparse.budget import BudgetConfig
from fedsparse.data import PartitionConfig
from fedsparse.errors import UserError
from fedsparse.experiment import (
    EngineConfig,
    EvaluateConfig,
    Experiment,
    experiment_names,
    from_dict,
    load_experiment,
    toml_text,
)

ROOT = Path(__file__).resolve().parents[1]
FULL = Experiment(
    dataset="mnist",
    model="mylab/net.py:build",
    width=0.5,
    norm="group",
    narrow="parameters",
    narrow_to=0.25,
    rounds=7,
    fraction=0.1,
    seed=3,
    device="auto",
    name="my run",
    client="mylab/client.py:Mine",
    partition=PartitionConfig(scheme="dirichlet", clients=5, alpha=0.3, holdout=2, public="a b.npz", novel=0.2),
    budget=BudgetConfig(tiers=(1.0, 0.5), of="bytes", table="my devices.csv", on_over_budget="record"),
    engine=EngineConfig(workers=2, on_client_error="skip", min_replies=3),
    evaluate=EvaluateConfig(every=2, fraction=0.5, split="validation"),
    method="fedprox",
    hyper={"lr": 0.1, "epochs": 2, "flag": True, "mode": 'a "b"\n'},
)

_keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
_trees = st.recursive(_scalars | st.lists(_scalars, max_size=3), lambda t: st.dictionaries(_keys, t, max_size=4))


@given(st.dictionaries(_keys, _trees, max_size=5))
def test_toml_reads_back_what_was_written(tree: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text(tree)) == tree


def test_toml_leaves_none_out_and_knows_numpy_numbers() -> None:
    assert tomllib.loads(toml_text({"a": None, "b": np.float64(0.5), "c": {"d": None}})) == {"b": 0.5, "c": {}}
    with pytest.raises(UserError, match="TOML cannot hold"):
        toml_text({"a": object()})


@pytest.mark.parametrize("experiment", [Experiment(), FULL])
def test_a_written_experiment_loads_as_the_same(experiment: Experiment, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(experiment.to_toml() + '\n[resolved]\ntorch = "2.13.0"\n')
    assert load_experiment(file) == experiment
    assert from_dict(experiment.to_dict()) == experiment


def test_overrides_win_and_are_read_as_toml() -> None:
    changed = Experiment(hyper={"lr": 0.5}).with_overrides(
        ["rounds=3", "width=1", "dataset=wisdm", "name=7", "budget.tiers=[1, 0.5]", "method.lr=0.1", "rounds = 4"]
    )
    assert (changed.rounds, changed.dataset, changed.name) == (4, "wisdm", "7")
    assert (changed.width, type(changed.width)) == (1.0, float)
    assert changed.budget.tiers == (1.0, 0.5)
    assert changed.hyper == {"lr": 0.1}
    assert FULL.with_overrides([]) == FULL
    assert FULL.with_overrides(["seed=4"]) == replace(FULL, seed=4)


def test_a_table_of_the_chosen_method_wins_over_the_shared_values() -> None:
    data = {
        "method": {"name": "fedavg", "lr": 0.5, "epochs": 2, "fedprox": {"lr": 0.2, "mu": 0.1}, "local": {"lr": 9.0}}
    }
    assert from_dict(data).hyper == {"lr": 0.5, "epochs": 2}
    prox = from_dict(data, ["method=fedprox", "method.mu=0.3"])
    assert (prox.method, prox.hyper, prox.notes) == ("fedprox", {"lr": 0.2, "epochs": 2, "mu": 0.3}, ())


def test_changing_the_method_keeps_what_both_have_and_names_the_rest() -> None:
    data = {"method": {"name": "fedprox", "lr": 0.5, "mu": 0.1}}
    changed = from_dict(data, ["method.name=fedavg"])
    assert (changed.method, changed.hyper) == ("fedavg", {"lr": 0.5})
    assert changed.notes == ("fedavg has no mu: left out of what was set for fedprox",)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rouns=3", "unknown key 'rouns'; did you mean 'rounds'"),
        ("partition.alhpa=1", r"unknown key in \[partition\] 'alhpa'; did you mean 'alpha'"),
        ("engine.workers=0", "engine.workers must be at least 1, got 0"),
        ("engine.kind=spark", "unknown engine.kind 'spark'"),
        ("engine.address=auto", "engine.address is 'auto', which needs engine.kind = \"ray\""),
        ("engine=2", r"engine must be a table \[engine\], got 2"),
        ("rounds=0", "rounds must be at least 1, got 0"),
        ("rounds=2.5", "rounds must be a whole number, got 2.5"),
        ("rounds=true", "rounds must be a whole number, got True"),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("fraction=0", r"fraction must be in \(0, 1\], got 0"),
        ("fraction=nan", r"fraction must be in \(0, 1\], got nan"),
        ("narrow_to=1.5", r"narrow_to must be in \(0, 1\], got 1.5"),
        ("width=inf", r"width must be in \(0, 64\], got inf"),
        ("width=wide", "width must be a number, got 'wide'"),
        ("narrow=macs", "unknown narrow 'macs'"),
        ("norm=layer", "unknown norm 'layer'"),
        ("device=tpu", "unknown device 'tpu'"),
        ("evaluate.split=train", "unknown evaluate.split 'train'"),
        ("budget.tiers=0.5", "budget.tiers must be a list"),
        ("budget.tiers=[0.5, 0]", r"in \(0, 1\], got 0"),
        ("budget.tiers=[1.5]", r"in \(0, 1\], got 1.5"),
        ("budget.of=macs", "unknown budget.of 'macs'"),
        ("budget.table=devices.json", "budget.table must be a .csv or a .toml file, got 'devices.json'"),
        ("budget.table=3", "budget.table must be text, got 3"),
        ("partition.novel=1", r"partition.novel must be in \[0, 1\), got 1"),
        ("partition.novel=some", "partition.novel must be a number, got 'some'"),
        ("name=a/b", "name must be the name of a folder"),
        ("dataset=", "dataset must not be empty"),
        ("method.lr=[1]", "method.lr must be a number, text, true or false"),
        ("method.fedvag.lr=1", "unknown method 'fedvag'; did you mean 'fedavg'"),
        ("rounds", "a setting is key=value"),
        ("=3", "a setting is key=value"),
        ("method..lr=3", "a setting is key=value"),
    ],
)
def test_what_is_not_allowed_is_named(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Experiment().with_overrides([setting])
    assert "\n" not in str(caught.value)


def test_python_is_checked_like_a_file() -> None:
    with pytest.raises(UserError, match="rounds must be a whole number, got '3'"):
        Experiment(rounds="3")  # type: ignore[arg-type]
    assert isinstance(Experiment(width=1).width, float)


def test_a_value_cannot_smuggle_in_a_second_key() -> None:
    assert Experiment().with_overrides(["name=1\nrounds=9"]).rounds == Experiment().rounds


def test_files_are_found_by_path_and_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = load_experiment("digits_pfedgate")
    assert load_experiment("experiments/digits_pfedgate.toml") == by_name == load_experiment("digits_pfedgate.toml")
    (tmp_path / "digits_pfedgate.toml").write_text("rounds = 2\n")
    assert load_experiment("digits_pfedgate.toml").rounds == 2
    assert "digits_pfedgate" in experiment_names()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.toml", None, "unknown experiment file .*known: .*digits_pfedgate"),
        ("x.toml", b"rounds = = 2", "cannot be read: .*line 1"),
        ("x.toml", b"\xff\xfe", "cannot be read"),
        (".", None, "is a folder"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, text: bytes | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=message):
        load_experiment(tmp_path / name)


def test_every_experiment_that_comes_along_can_be_loaded() -> None:
    for name in experiment_names():
        load_experiment(name)


def test_the_readme_names_every_key_with_its_default() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for key, value in Experiment().to_dict().items():
        for name in [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]:
            assert f"`{name}`" in text, f"README.md does not explain {name}"


def test_constraints_name_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    names = {text.split(">")[0].split("[")[0] for text in wanted}
    assert names <= pinned
