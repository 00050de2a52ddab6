"""An experiment becomes a run: its first state, the server's own work and the costliest client in its summary."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import ArrayRecord

import fedsparse
from fedsparse.client import client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import UserError
from fedsparse.experiment import from_dict
from fedsparse.method import build, load_method
from fedsparse.runner import digest
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
