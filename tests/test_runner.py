"""An experiment becomes a run: its first state, the server's own work and the costliest client in its summary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord
from torch.utils.flop_counter import FlopCounterMode

import fedsparse
from fedsparse.client import client_app
from fedsparse.cost import forward_macs, trace, train_flops
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import UserError
from fedsparse.experiment import from_dict, load_experiment
from fedsparse.globalmask import prunable
from fedsparse.method import build, load_method, method_names
from fedsparse.report.tables import tier_rows
from fedsparse.runner import digest, federation_of
from fedsparse.seeding import torch_rng
from fedsparse.sgd import batches
from fedsparse.strategy import Plan
from tests.helpers import norm_task, small_clients, small_split

COUNTING = """
from dataclasses import dataclass
from pathlib import Path
from fedsparse.strategy import AveragingStrategy

CALLS = Path(__file__).with_name("calls")

@dataclass
class Counting(AveragingStrategy):
    client = "fedavg"

    def init(self, task, devices):
        self.called("init")
        return super().init(task, devices)

    def foresee(self, task, devices, plan):
        self.called("foresee")

    def scheduled(self, task, state, rounds):
        self.called("scheduled")
        return state

    def called(self, name):
        with CALLS.open("a") as file:
            file.write(name + " ")
"""


def test_a_run_makes_its_first_state_once(tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text(COUNTING)
    settings = {"rounds": 2, "partition": {"clients": 3}, "method": str(tmp_path / "counting.py")}
    fedsparse.run(from_dict(settings), out=tmp_path / "run")
    assert (tmp_path / "calls").read_text() == "init foresee scheduled "


@pytest.mark.parametrize(("name", "hyper"), [("fedavg", {}), ("pfedgate", {}), ("fedtiny", {"pretrain": "holdout"})])
def test_a_state_that_is_handed_in_gives_the_same_bits(name: str, hyper: dict[str, str]) -> None:
    task, clients, plan = norm_task(), small_clients(3, 0.5 if name == "pfedgate" else None), Plan(evaluate_every=0)
    devices, digests = [c.device for c in clients], []
    for handed in (False, True):
        strategy = build(load_method(name), hyper)
        strategy.server_data = small_split(12, "server")
        state = strategy.first_state(task, devices, plan, 4) if handed else None
        with LocalGrid(client_app(task, clients.__getitem__), 3) as grid:
            strategy.start(grid, num_rounds=4, task=task, devices=devices, plan=plan, state=state)
        digests.append(digest(strategy.state, {}))
    assert digests[0] == digests[1]


def test_two_beginnings_are_refused() -> None:
    task, clients = norm_task(), small_clients(2)
    strategy = build(load_method("fedavg"), {})
    state = strategy.first_state(task, [c.device for c in clients], Plan(), 1)
    arrays = ArrayRecord([next(iter(task.init_params().values())).numpy()])
    both = pytest.raises(UserError, match="start takes initial_arrays or a state, not both")
    with LocalGrid(client_app(task, clients.__getitem__), 2) as grid, both:
        strategy.start(grid, arrays, num_rounds=1, task=task, state=state)


def test_a_model_with_frozen_parameters_is_refused() -> None:
    task, devices = norm_task(), [c.device for c in small_clients(2)]
    next(task.model.parameters()).requires_grad_(False)
    for method in ("fedavg", "pfedgate", "local"):
        with pytest.raises(UserError, match=r"frozen parameters are not supported, the model has 1 .*weight"):
            build(load_method(method), {}).first_state(task, devices, Plan(), 1)


# --- the server's own flops ------------------------------------------------------------------------------------------


def counted(name: str, **hyper: float | str) -> tuple[float, float]:
    """Flops by the method and by PyTorch's counter, of ``init`` with 17 examples at the server."""
    task, strategy = norm_task(), build(load_method(name), hyper)
    strategy.server_data = small_split(17, "server")
    prunable(task)  # it traces the model by running it once, which is no work of the method
    with FlopCounterMode(display=False) as counter:
        state = strategy.first_state(task, [client.device for client in small_clients(2)], Plan(), 9)
    return strategy.server_flops(task, state), counter.get_total_flops()


@pytest.mark.parametrize(("batch", "seen"), [(8, 48), (5, 51), (32, 51)])  # a single last example trains nothing
def test_pre_training_costs_what_the_flop_counter_sees(batch: int, seen: int) -> None:
    task = norm_task()
    said, measured = counted("fedtiny", pretrain="holdout", pretrain_epochs=3, batch_size=batch)
    assert said == measured == train_flops(trace(task.model, task.input_shape), seen)
    assert counted("fedtiny", batch_size=batch) == (0.0, 0)


@pytest.mark.parametrize(
    ("name", "hyper", "passes"),
    [
        ("snip", {}, 17),
        ("snip", {"steps": 4}, 68),
        ("synflow", {}, 100),
        ("synflow", {"steps": 3}, 3),
        ("snip", {"density": 1.0}, 0),
        ("synflow", {"density": 1.0}, 0),
    ],
)
def test_scoring_costs_a_pass_an_example_and_step(name: str, hyper: dict[str, float], passes: int) -> None:
    task = norm_task()
    said, measured = counted(name, **hyper)
    assert said == train_flops(trace(task.model, task.input_shape), passes)
    # PyTorch sees no weight gradient of the layers that stay dense, and no input gradient of the first that is pruned
    layers = {layer.name: layer.macs for layer in trace(task.model, task.input_shape)}
    assert measured == 2 * passes * (layers["conv1"] + 2 * layers["fc1"] + 2 * layers["output"])


@pytest.mark.parametrize("name", sorted(set(method_names()) - {"snip", "synflow"}))
def test_no_other_server_computes_before_round_one(name: str) -> None:
    said, measured = counted(name)
    task = norm_task()
    traces = 3 * 2 * forward_macs(trace(task.model, task.input_shape))  # pfedgate's own
    assert said == 0 and measured <= (traces if name == "pfedgate" else 0)


def test_the_servers_flops_are_in_the_totals(tmp_path: Path) -> None:
    settings = {"rounds": 2, "partition": {"clients": 3, "holdout": 2}, "method": {"name": "fedtiny", "pool": 2}}
    experiments = [from_dict(settings, [f"method.pretrain={how}"]) for how in ("none", "holdout")]
    runs = (fedsparse.run(experiment, out=tmp_path / str(i)) for i, experiment in enumerate(experiments))
    plain, trained = (run.summary["flops"] for run in runs)
    task = federation_of(experiments[0]).task
    assert plain["server"] == 0
    assert trained["server"] == train_flops(trace(task.model, task.input_shape), 3 * 10 * 2)  # epochs, classes, each
    for name in ("total", "preparation_total"):
        assert trained[name] - plain[name] == pytest.approx(trained["server"], rel=1e-9)
    assert trained["train_per_client_round"] == plain["train_per_client_round"]


# --- the costliest client --------------------------------------------------------------------------------------------


def test_the_largest_round_is_that_of_the_client_with_the_most_examples(tmp_path: Path) -> None:
    settings = {"rounds": 2, "partition": {"clients": 5}, "method": {"name": "fedavg", "epochs": 2}}
    experiment = from_dict(settings, ["budget.tiers=[1, 0.5]", 'budget.on_over_budget="record"'])
    run, data = fedsparse.run(experiment, out=tmp_path / "run"), federation_of(experiment)
    layers = trace(data.task.model, data.task.input_shape)
    spent = [train_flops(layers, sum(map(len, batches(len(c.train), 32, 2, torch_rng(0))))) for c in data.clients]
    assert run.summary["flops"]["max_per_client_round"] == max(spent)
    by_tier = [tier["flops"]["max_per_client_round"] for tier in run.summary["tiers"]]
    assert by_tier == [max(spent[::2]), max(spent[1::2])]  # of the tiers 1 and 0.5
    assert run.summary["flops"]["max_preparation"] is None
    assert [tier["flops"]["max_preparation"] for tier in run.summary["tiers"]] == [None, None]
    rows = tier_rows(run.summary)
    assert [2 * row["multiply_adds_max_per_client_round"] for row in rows] == [*by_tier, max(spent)]


def test_an_adjusting_round_and_both_exchanges_of_the_selection_count(tmp_path: Path) -> None:
    hyper = {"name": "fedtiny", "density": 0.2, "pool": 3, "passes": 2, "delta_r": 2, "r_stop": 4}
    few = {"clients": 20, "max_clients": 3}
    settings = {"rounds": 4, "model": "resnet18", "width": 1 / 16, "sparse": "dense", "partition": few, "method": hyper}
    run = fedsparse.run(from_dict(settings), out=tmp_path / "run")
    rounds = {turn: [row["flops"] for row in run.clients if row["round"] == turn] for turn in range(5)}
    assert run.summary["flops"]["max_per_client_round"] == max(rounds[2]) > max(rounds[1]) == max(rounds[3])
    before = [row for row in run.clients if not row["round"]]
    assert {row["stage"] for row in before} == {"calibrate", "probe"} and len(before) == 6
    both = [sum(row["flops"] for row in before if row["client"] == i) for i in range(3)]
    assert run.summary["flops"]["max_preparation"] == max(both) > max(rounds[0])


# --- another data set at the server ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "passes"),
    [({"name": "fedtiny", "pool": 1, "pretrain": "public", "pretrain_epochs": 2}, 2), ({"name": "snip"}, 1)],
)
def test_the_server_learns_from_a_public_data_set(method: dict[str, float | str], passes: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "public.npz", x=rng.random((40, 1, 8, 8)).astype(np.float32), y=np.arange(40) % 10)
    settings = {"rounds": 1, "partition": {"clients": 3, "public": str(tmp_path / "public.npz")}, "method": method}
    run = fedsparse.run(from_dict(settings), out=tmp_path / "run")
    task = federation_of(from_dict(settings)).task
    assert run.summary["flops"]["server"] == train_flops(trace(task.model, task.input_shape), 40 * passes)
    again = fedsparse.run(load_experiment(tmp_path / "run" / "config.toml"), out=tmp_path / "again")
    assert again.summary["digest"] == run.summary["digest"]
    few = fedsparse.run(from_dict(settings, ["partition.holdout=2"]), out=tmp_path / "few")
    assert few.summary["flops"]["server"] == run.summary["flops"]["server"] / 2
    assert [c["n_train"] for c in few.clients] == [c["n_train"] for c in run.clients]
    assert few.summary["digest"] != run.summary["digest"]


def test_a_public_data_set_is_no_hold_out(tmp_path: Path) -> None:
    settings = {"partition": {"holdout": 2}, "method": {"name": "fedtiny", "pretrain": "public"}}
    with pytest.raises(UserError, match='pretrain = "public" needs another data set .*; set partition.public'):
        fedsparse.run(from_dict(settings), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
