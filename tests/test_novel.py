"""Novel clients: who they are, that they leave no trace in training, and what each method's half does with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fedsparse
from fedsparse.client import ONBOARD_EPOCHS, Memory, RunWords, SgdClient, client_app, update
from fedsparse.data import PartitionConfig, federate
from fedsparse.data.formats import Dataset, make_dataset
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import ClientError, UserError
from fedsparse.experiment import from_dict
from fedsparse.method import build, load_method, method_names
from fedsparse.packet import Packet, decode
from fedsparse.report.summary import Facts, summarise
from fedsparse.report.tables import novel_line
from fedsparse.rows import Onboarding
from fedsparse.runner import digest
from fedsparse.seeding import torch_rng
from fedsparse.sgd import sgd
from fedsparse.strategy import FederatedStrategy, Plan
from fedsparse.task import Client, Score, Split, Task
from tests.helpers import norm_task, small_clients, small_split, small_task

NOVEL = (1, 4)
METHODS = method_names()


@dataclass(frozen=True)
class Done:
    """A run over five clients, two of them novel, and what came of these."""

    strategy: FederatedStrategy
    reports: list[dict[str, Any]]
    memories: dict[int, Mapping[str, Tensor]]
    before: str
    onboarding: Onboarding

    @property
    def digest(self) -> str:
        return digest(self.strategy.state, self.memories)


def run_novel(
    method: str, task: Task, clients: tuple[Client, ...], *, workers: int = 1, own: bool = False, **plan: Any
) -> Done:
    strategy = build(load_method(method), {"batch_size": 8})
    strategy.server_data = small_split(12, "server")  # for the methods that need some
    with LocalGrid(client_app(task, clients.__getitem__), len(clients), workers=workers, own_replies=own) as grid:
        devices = [c.device for c in clients]
        plan = {"seed": 7, "novel": NOVEL, "on_over_budget": "record", **plan}
        reports = list(strategy.rounds(grid, 2, task=task, devices=devices, plan=Plan(**plan)))
        before = digest(strategy.state, memories_of(grid))
        onboarding = strategy.onboard(grid)
        return Done(strategy, reports, memories_of(grid), before, onboarding)


def memories_of(grid: LocalGrid) -> dict[int, Mapping[str, Tensor]]:
    return {i: dict(decode(s).tensors) for i, s in grid.states().items() if len(s)}


def poisoned(client: Client) -> Client:
    """The same client with training data that spoil any model."""
    return replace(client, train=Split(client.train.x * float("nan"), client.train.y))


# --- who they are ----------------------------------------------------------------------------------------------------


def dataset(rows: int = 400) -> Dataset:
    rng = np.random.default_rng(0)
    return make_dataset("noise", rng.normal(size=(rows, 3)).astype(np.float32), rng.integers(0, 2, rows))


@settings(max_examples=25)
@given(st.integers(2, 12), st.floats(0.001, 0.999), st.integers(0, 50))
def test_a_share_of_the_clients_is_drawn_by_seed(clients: int, share: float, seed: int) -> None:
    config = PartitionConfig(scheme="iid", clients=clients, novel=share)
    novel = federate(dataset(), config, seed).novel
    assert len(novel) == min(max(1, round(share * clients)), clients - 1)
    assert list(novel) == sorted(set(novel)) and set(novel) < set(range(clients))
    assert federate(dataset(), config, seed).novel == novel


def test_another_seed_draws_others_and_the_default_draws_none() -> None:
    config = PartitionConfig(scheme="iid", clients=10, novel=0.3)
    assert len({federate(dataset(), config, seed).novel for seed in range(8)}) > 4
    assert federate(dataset(), PartitionConfig(scheme="iid", clients=10), 0).novel == ()


def test_their_data_do_not_scale_those_of_the_others() -> None:
    config = PartitionConfig(scheme="iid", clients=4, novel=0.25)
    first = federate(dataset(), config, 0)
    (novel,) = first.novel
    odd = dataset()
    plain = federate(replace_inputs(odd, odd.x), PartitionConfig(scheme="iid", clients=4), 0)
    rows = {tuple(row) for row in rows_of(odd, plain, novel)}
    x = np.where(np.array([[tuple(row) in rows] for row in odd.x]), odd.x * 100, odd.x)
    second = federate(replace_inputs(odd, x), config, 0)
    for i in range(4):
        same = torch.equal(first.clients[i].train.x, second.clients[i].train.x)
        assert same == (i != novel)


def replace_inputs(data: Dataset, x: np.ndarray[Any, Any]) -> Dataset:
    return make_dataset("noise", x.astype(np.float32), data.y)


def rows_of(data: Dataset, scaled: Any, client: int) -> np.ndarray[Any, Any]:
    """The raw training rows of one client: the scaling is the same for every row and keeps the order of values."""
    found = scaled.clients[client].train.x[:, 0].numpy()
    everything = np.sort(
        np.concatenate([p.x[:, 0].numpy() for c in scaled.clients for p in (c.train, c.validation, c.test)])
    )
    ranks = np.searchsorted(everything, found)
    order = np.argsort(data.x[:, 0])
    return data.x[order[ranks]]


@pytest.mark.parametrize("share", [1, 1.0, -0.1, float("nan")])
def test_a_share_outside_its_range(share: float) -> None:
    with pytest.raises(UserError, match=r"partition.novel must be in \[0, 1\), got "):
        PartitionConfig(novel=share)


def test_a_single_client_cannot_be_novel() -> None:
    with pytest.raises(UserError, match="partition.novel is 0.5, but there is only one client"):
        federate(dataset(), PartitionConfig(scheme="iid", clients=1, novel=0.5), 0)


@pytest.mark.parametrize(
    ("novel", "message"), [((1, 9), r"novel clients \[9\] are not on"), ((0, 1, 2), "all 3 clients are novel")]
)
def test_a_plan_of_novel_clients_that_cannot_be(novel: tuple[int, ...], message: str) -> None:
    clients, task = small_clients(3), small_task()
    strategy = build(load_method("fedavg"), {})
    with LocalGrid(client_app(task, clients.__getitem__), 3) as grid, pytest.raises(UserError, match=message):
        strategy.start(grid, num_rounds=1, task=task, plan=Plan(novel=novel))


# --- no trace in training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_they_take_no_part_and_leave_nothing_behind(method: str) -> None:
    clients = small_clients(5, 0.7)
    done = run_novel(method, norm_task(), clients, fraction=0.7)
    asked = {row["client"] for report in done.reports for row in report["rows"]}
    assert asked <= {0, 2, 3} and len(asked) == 3  # evaluation asks all participants
    assert done.before == done.digest  # onboarding changes neither the state nor a memory
    assert not done.memories.keys() & set(NOVEL)
    assert list(done.onboarding.scores) == list(NOVEL)
    for i, scores in done.onboarding.scores.items():
        assert tuple(scores) == ONBOARD_EPOCHS
        assert all(score.n == len(clients[i].test) for score in scores.values())


@pytest.mark.parametrize("method", METHODS)
def test_their_data_do_not_matter_before_the_end(method: str) -> None:
    clients = small_clients(5, 0.7)
    spoiled = tuple(poisoned(c) if c.id in NOVEL else c for c in clients)
    plain = run_novel(method, small_task(), clients)
    assert run_novel(method, small_task(), spoiled, on_client_error="skip").before == plain.before


@pytest.mark.parametrize("method", METHODS)
def test_the_same_scores_with_any_workers_and_whatever_is_encoded(method: str) -> None:
    found = [
        run_novel(method, small_task(), small_clients(5, 0.7), workers=workers, own=own)
        for workers, own in ((1, False), (3, False), (2, True))
    ]
    assert found[0].onboarding.scores == found[1].onboarding.scores == found[2].onboarding.scores
    assert found[0].onboarding.bytes == found[1].onboarding.bytes == found[2].onboarding.bytes
    assert len({done.digest for done in found}) == 1


def test_the_bytes_are_those_of_the_messages() -> None:
    done = run_novel("fedavg", small_task(), small_clients(5))
    words = RunWords("fedavg", done.strategy.client_config, 7, 2).dump()
    down = Packet("onboard", done.strategy.state.params).bytes_with(words)
    up = 0
    for scores in done.onboarding.scores.values():
        numbers: dict[str, float] = {}
        for e, s in scores.items():
            numbers |= {f"{e}.n": s.n, f"{e}.correct": s.correct, f"{e}.loss": s.loss}
        up += Packet("scores", scalars=numbers).nbytes
    assert done.onboarding.bytes == 2 * down + up


# --- what each half does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedavg", "fedprox"])
def test_without_personal_models_the_global_one_is_scored_whatever_the_epochs(method: str) -> None:
    task, clients = norm_task(), small_clients(5)
    done = run_novel(method, task, clients)
    for i in NOVEL:
        expected = task.score(done.strategy.state.params, clients[i].test)
        assert done.onboarding.scores[i] == dict.fromkeys(ONBOARD_EPOCHS, expected)


@pytest.mark.parametrize("hyper", [{}, {"momentum": 0.9}, {"optimizer": "adam", "ft_lr": 0.01}], ids=str)
def test_fine_tuning_is_that_before_evaluation(hyper: dict[str, Any]) -> None:
    task, client = norm_task(), small_clients(5)[4]
    half = load_method("fedavg_ft").client(batch_size=8, **hyper)
    packet = Packet("onboard", {k: v + 0.01 for k, v in task.init_params().items()})
    found = half.onboard(task, client, packet, {}, torch_rng("any"), (0, 1, 3))
    assert found[0] == task.score(packet.tensors, client.test)
    for epochs in (1, 3):
        tuned = replace(half, ft_epochs=epochs).evaluate(task, client, replace(packet, kind="evaluate"), {})
        assert found[epochs] == tuned["personal"] != found[0]


def test_local_models_train_from_the_start_for_each_number_of_epochs() -> None:
    task, client = norm_task(), small_clients(5)[4]
    half = load_method("local").client(batch_size=8, momentum=0.9)
    rng = torch_rng("local")
    found = half.onboard(task, client, Packet("onboard"), {}, rng, (0, 1, 5))
    assert found[0] == task.score(task.init_params(), client.test)
    for epochs in (1, 5):
        how = {"lr": half.lr, "epochs": epochs, "batch_size": 8, "momentum": 0.9}
        fit = sgd(task, task.init_params(), client.train, rng=torch_rng("local"), **how)
        assert found[epochs] == task.score(fit.params, client.test)


HOW = "raise"


@dataclass(frozen=True)
class Odd(SgdClient):
    """Fails, for client 4, in onboarding."""

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        return update(client, self.fit(task, client, packet.tensors, rng)), memory

    def evaluate(self, task: Task, client: Client, packet: Packet, memory: Memory) -> dict[str, Score]:
        assert packet.kind == "evaluate" and not memory
        return {"personal": task.score(packet.tensors, client.held_out)}

    def onboard(
        self,
        task: Task,
        client: Client,
        packet: Packet,
        memory: Memory,
        rng: torch.Generator,
        epochs: tuple[int, ...],
    ) -> dict[int, Score]:
        scores = super().onboard(task, client, packet, memory, rng, epochs)
        if client.id != 4:
            return scores
        if HOW == "raise":
            raise RuntimeError("out of luck")
        if HOW == "write":
            next(iter(packet.tensors.values())).add_(0)
        if HOW == "nan":
            return {e: Score(s.n, s.correct, float("nan")) for e, s in scores.items()}
        return {0: scores[0]} if HOW == "few" else scores


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "client 4, round 1, stage onboard: RuntimeError: out of luck"),
        ("few", r"client 4, .*onboard must return a Score for each of \(0, 1, 5, 10\) epochs"),
        ("nan", "client 4, .*'0.loss' is not finite"),
        ("write", "client 4, .*wrote into a tensor of the packet 'onboard'"),
    ],
)
def test_one_that_fails_stops_the_run_or_is_counted(how: str, message: str) -> None:
    global HOW
    HOW = how
    clients, task = small_clients(5), small_task()
    for skip in (False, True):
        strategy = build(load_method("fedavg", f"{__name__}:Odd"), {})
        with LocalGrid(client_app(task, clients.__getitem__), 5, own_replies=False) as grid:
            plan = Plan(novel=NOVEL, on_client_error="skip" if skip else "stop")
            strategy.start(grid, num_rounds=1, task=task, plan=plan)
            if not skip:
                with pytest.raises(ClientError, match=message):
                    strategy.onboard(grid)
                continue
            onboarding = strategy.onboard(grid)
        assert (list(onboarding.scores), onboarding.clients, len(onboarding.errors)) == ([1], 2, 1)


class Forgetful(LocalGrid):
    """Loses the last reply."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        replies = list(super().send_and_receive(messages))
        return replies[:-1] if len(replies) == len(NOVEL) else replies


def test_one_that_never_answers_is_a_failure() -> None:
    clients, task = small_clients(5), small_task()
    strategy = build(load_method("fedavg"), {})
    with Forgetful(client_app(task, clients.__getitem__), 5) as grid:
        strategy.start(grid, num_rounds=1, task=task, plan=Plan(novel=NOVEL))
        with pytest.raises(ClientError, match="client 4, stage onboard: no reply came"):
            strategy.onboard(grid)


# --- in a run folder -------------------------------------------------------------------------------------------------


def settings_of(**changes: Any) -> dict[str, Any]:
    return {"rounds": 2, "partition": {"clients": 5, "novel": 0.4}, "method": {"name": "fedavg_ft"}, **changes}


def test_the_summary_by_hand(tmp_path: Path) -> None:
    run = fedsparse.run(from_dict(settings_of()), out=tmp_path / "a")
    novel = run.summary["novel"]
    assert (run.summary["clients"], novel["clients"], len(novel["scores"])) == (3, 2, 2)
    assert {row["client"] for row in run.clients}.isdisjoint(s["client"] for s in novel["scores"])
    assert novel["accuracy"].keys() == {"0", "1", "5", "10"}
    n = np.array([s["n"] for s in novel["scores"]])
    for epochs, figures in novel["accuracy"].items():
        values = np.array([s[epochs] for s in novel["scores"]])
        assert figures["mean"] == pytest.approx(values.mean())
        assert figures["weighted"] == pytest.approx((values * n).sum() / n.sum())
    assert novel["participants"] == run.summary["accuracy"]["personal"]["mean"]
    assert novel["gap"] == pytest.approx(novel["participants"] - novel["accuracy"]["1"]["mean"])
    rounds = [r["bytes"]["evaluation"] for r in run.rounds]
    assert run.summary["bytes"]["evaluation_total"] == sum(rounds) + novel["bytes"] > sum(rounds)
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["novel"] == novel
    again = fedsparse.run(fedsparse.load_experiment(tmp_path / "a" / "config.toml"), out=tmp_path / "b")
    assert again.summary["novel"] == novel and again.summary["digest"] == run.summary["digest"]


def test_without_novel_clients_there_is_nothing_to_say(tmp_path: Path) -> None:
    run = fedsparse.run(from_dict(settings_of(partition={"clients": 3}, rounds=1)), out=tmp_path / "a")
    assert run.summary["novel"] is None
    assert novel_line(run.summary) == ""
    assert "Novel clients" not in (tmp_path / "a" / "report.html").read_text()


def test_one_line_says_it_all(tmp_path: Path) -> None:
    run = fedsparse.run(from_dict(settings_of(rounds=1)), out=tmp_path / "a")
    novel = run.summary["novel"]
    line = novel_line(run.summary)
    assert line.startswith("2 novel clients after 0, 1, 5, 10 epochs: ") and len(line) <= 100
    for value in (*(f["mean"] for f in novel["accuracy"].values()), novel["participants"], novel["gap"]):
        assert f"{value:.3f}" in line


def test_figures_where_all_have_failed() -> None:
    facts = Facts(**dict.fromkeys((f.name for f in fields(Facts)), 0))  # type: ignore[arg-type]
    summary = summarise(facts, [], [], Onboarding({}, 2, 0, 0.0, (ClientError("client 1: no"),)))
    assert summary["novel"] == {
        "clients": 2,
        "participants": None,
        "accuracy": {},
        "gap": None,
        "bytes": 0,
        "errors": ["client 1: no"],
        "scores": [],
    }
    assert summary["failures"]["clients"] == 1
