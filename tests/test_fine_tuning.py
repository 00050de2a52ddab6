"""Fine-tuning of a global sparse model before evaluation ("+FT"), for every method that has one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedsparse.errors import UserError
from fedsparse.globalmask import masked_packet
from fedsparse.masked import score_masked
from fedsparse.method import build, hyper_parameters, load_method
from fedsparse.runner import digest
from fedsparse.seeding import torch_rng
from fedsparse.task import Device
from tests.helpers import norm_task, small_clients
from tests.test_contract import METHODS, TASKS, halves, run_method

MASKED = [name for name in METHODS if load_method(name).strategy.masked]
FT = {"ft_epochs": 2, "ft_lr": 0.02}
POINTS = ("local", "personal", "global")


def scores(reports: list[dict[str, list[dict[str, object]]]], point: str) -> list[object]:
    return [row[point] for report in reports for row in report["rows"]]


@pytest.mark.parametrize("name", MASKED)
def test_it_changes_the_personal_scores_alone(name: str) -> None:
    plain, memories, before = run_method(name, norm_task(), density=0.5)
    tuned, same, after = run_method(name, norm_task(), density=0.5, **FT)
    assert digest(plain.state, memories) == digest(tuned.state, same)
    assert scores(before, "local") == scores(after, "local")
    assert scores(before, "global") == scores(after, "global")
    assert scores(before, "personal") != scores(after, "personal")


@pytest.mark.parametrize("task", TASKS)
def test_at_density_one_it_is_fedavg_ft(task: str) -> None:
    dense, _, first = run_method("fedavg_ft", TASKS[task](), **FT)
    sparse, _, second = run_method("fixed_mask", TASKS[task](), density=1.0, **FT)
    assert digest(dense.state, {}) == digest(sparse.state, {})
    assert all(scores(first, point) == scores(second, point) for point in POINTS)


def test_training_stays_under_the_mask_and_repeats() -> None:
    """Against local training under the mask from the state; a novel client does the same for each number of epochs."""
    task, client = norm_task(), small_clients(1)[0]
    strategy, half = halves("fixed_mask", density=0.3, **FT)
    state = strategy.init(task, [Device(0)])
    packet = masked_packet("evaluate", state.params, state.shared, Device(0))
    found = half.onboard(task, client, replace(packet, kind="onboard"), {}, torch_rng("any"), (0, 1, 2))
    for epochs, score in found.items():
        params = state.params
        if epochs:
            how = replace(half, epochs=epochs, lr=0.02)
            rng = torch_rng(task.seed, client.id, "finetune")
            params = how.fit(task, client, params, rng, mask=state.shared.mask).params
        assert score == score_masked(task, params, state.shared.mask, client.held_out)
    assert half.evaluate(task, client, packet, {})["personal"] == found[2]
    assert found[2] != found[0]


def test_the_options_are_known_and_checked() -> None:
    for name in MASKED:
        assert {"ft_epochs": 0, "ft_lr": 0.0}.items() <= hyper_parameters(load_method(name)).items()
        with pytest.raises(UserError, match=f"method {name}: ft_epochs must be at least 0, got -1"):
            build(load_method(name), {"ft_epochs": -1})
