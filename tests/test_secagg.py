"""Secure aggregation with Flower's protocol: means that the server learns, uploads that it does not, and refusals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key

from fedsparse.client import client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import ClientError, UserError
from fedsparse.method import method_names
from fedsparse.packet import Packet
from fedsparse.secagg import SecureGrid, _addable, secure_app, why_not_secure
from fedsparse.strategy import Plan
from fedsparse.task import Client
from tests.helpers import small_clients, small_split, small_task
from tests.test_contract import halves

SHARED: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavg_ft": {},
    "fedprox": {"mu": 0.1},
    "fixed_mask": {"density": 0.3},
    "snip": {"density": 0.3},
    "synflow": {"density": 0.3},
    "fedtiny": {"density": 0.3, "pool": 1, "progressive": False},
    "feddst": {"density": 0.3, "r_stop": 1},
    "prunefl": {"density": 0.3, "initial": "magnitude", "r_stop": 1},
}


class Wire(LocalGrid):
    """A grid that keeps what it carries."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.carried: list[Message] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.carried += replies
        return replies


def secure_run(
    name: str, clients: tuple[Client, ...], *, workers: int = 1, plan: Plan | None = None, **options: Any
) -> tuple[Any, list[dict[str, Any]], list[Message]]:
    task = small_task()
    strategy: Any = halves(name, batch_size=8, **SHARED.get(name, {}))[0]
    with Wire(secure_app(task, clients.__getitem__), len(clients), workers=workers) as grid:
        secure = SecureGrid(grid, strategy, **{"max_weight": 40, **options})
        devices = [c.device for c in clients]
        reports = list(strategy.rounds(secure, 2, task=task, devices=devices, plan=plan or Plan(seed=7)))
        return strategy, reports, grid.carried


def plain_run(name: str, clients: tuple[Client, ...], plan: Plan | None = None) -> tuple[Any, list[dict[str, Any]]]:
    task = small_task()
    strategy: Any = halves(name, batch_size=8, **SHARED.get(name, {}))[0]
    with LocalGrid(client_app(task, clients.__getitem__), len(clients), own_replies=False) as grid:
        devices = [c.device for c in clients]
        return strategy, list(strategy.rounds(grid, 2, task=task, devices=devices, plan=plan or Plan(seed=7)))


@pytest.mark.parametrize("name", SHARED)
def test_the_mean_is_the_plain_one_but_for_rounding(name: str) -> None:
    clients = small_clients(4)
    secure, reports, _ = secure_run(name, clients)
    plain, wanted = plain_run(name, clients)
    for key, t in plain.state.params.items():
        torch.testing.assert_close(secure.state.params[key], t, rtol=0, atol=1e-3)
    for ours, theirs in zip(reports, wanted, strict=True):
        assert ours["failures"] == 0
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
        assert ours["accuracy"]["personal"] == pytest.approx(theirs["accuracy"]["personal"], abs=0.1)
        assert ours["accuracy"]["local"] == pytest.approx(theirs["accuracy"]["local"], abs=0.1)


def test_rounding_is_as_coarse_as_stated() -> None:
    """A step is 2 * clipping_range / 2^22 of a value times weight / max_weight."""
    clients = small_clients(4)
    task, strategy = small_task(), halves("fedavg", batch_size=8)[0]
    with LocalGrid(secure_app(task, clients.__getitem__), 4) as grid:
        secure = SecureGrid(grid, strategy, max_weight=40)
        next(strategy.rounds(secure, 1, task=task, devices=[c.device for c in clients]))
    plain: Any = halves("fedavg", batch_size=8)[0]
    with LocalGrid(client_app(task, clients.__getitem__), 4, own_replies=False) as grid:
        next(plain.rounds(grid, 1, task=task, devices=[c.device for c in clients]))
    step = 16 / 2**22 * len(clients) / (sum(len(c.train) for c in clients) / 40)
    worst = max(float((strategy.state.params[n] - t).abs().max()) for n, t in plain.state.params.items())
    assert 0 < worst <= 1.5 * step


def test_workers_are_processes_too() -> None:
    clients = small_clients(4)
    secure, _, _ = secure_run("fedavg", clients, workers=2)
    plain, _ = plain_run("fedavg", clients)
    for key, t in plain.state.params.items():
        torch.testing.assert_close(secure.state.params[key], t, rtol=0, atol=1e-3)


def test_no_upload_crosses_the_wire() -> None:
    """What the server gets of a client is uniform over 2^32; the floats of its packet are not there."""
    clients = small_clients(4)
    _, _, carried = secure_run("fedavg", clients)
    size = sum(t.numel() for t in small_task().init_params().values())
    masked = []
    for reply in (m for m in carried if m.metadata.message_type == MessageType.TRAIN):
        assert sum(len(a.data) for record in reply.content.array_records.values() for a in record.values()) == 0
        stage = reply.content.config_records[RECORD_KEY_CONFIGS]
        if Key.MASKED_PARAMETERS in stage:
            masked.append(bytes_to_ndarray(stage[Key.MASKED_PARAMETERS][1]).astype(np.float64))
    assert len(masked) == 8
    for vector in masked:
        assert len(vector) == size
        share = np.histogram(vector, bins=16, range=(0, 2**32))[0] / size
        assert np.abs(share - 1 / 16).max() < 5 * np.sqrt(1 / 16 / size)
    assert np.abs(np.corrcoef(np.array(masked)) - np.eye(8)).max() < 6 / np.sqrt(size)


def broken(clients: tuple[Client, ...], which: int) -> tuple[Client, ...]:
    bad = small_split(4, "bad")
    bad.x.fill_(float("nan"))
    return tuple(Client(c.device, bad if c.device.id == which else c.train, c.validation, c.test) for c in clients)


def test_a_lost_client_is_named_and_may_be_left_out() -> None:
    clients = broken(small_clients(5), 2)
    with pytest.raises(ClientError, match="client 2, round 1, stage train: .*the training loss is nan"):
        secure_run("fedavg", clients)
    skip = Plan(seed=7, on_client_error="skip", evaluate_every=0)
    secure, reports, _ = secure_run("fedavg", clients, plan=skip)
    plain, _ = plain_run("fedavg", clients, plan=skip)
    assert [r["failures"] for r in reports] == [1, 1]
    for key, t in plain.state.params.items():
        torch.testing.assert_close(secure.state.params[key], t, rtol=0, atol=1e-3)


def test_too_few_clients_end_the_run() -> None:
    with pytest.raises(ClientError, match="round 1: secure aggregation came to no end"):
        secure_run("fedavg", small_clients(1))
    with pytest.raises(ClientError, match="came to no end: .*training loss is nan"):
        secure_run("fedavg", broken(small_clients(2), 0), plan=Plan(on_client_error="skip"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_weight": 12}, "the weight 16 is no whole number from 1 to max_weight = 12"),
        ({"clipping_range": 0.01}, "a value of .* is beyond clipping_range = 0.01"),
    ],
)
def test_what_would_overflow_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ClientError, match=message):
        secure_run("fedavg", small_clients(3), **options)


def test_methods_whose_support_is_private_are_refused() -> None:
    for name in method_names():
        strategy, _ = halves(name, **SHARED.get(name, {}))
        assert bool(why_not_secure(strategy)) == (name in ("pfedgate", "local", "ssfl"))
    task, clients = small_task(), small_clients(3)
    with LocalGrid(secure_app(task, clients.__getitem__), 3) as grid:
        with pytest.raises(
            UserError, match="no secure aggregation for pfedgate: the blocks that a client sends are its"
        ):
            SecureGrid(grid, halves("pfedgate")[0])
        for name, hyper, why in (
            ("feddst", {}, "clients send masks of their own too"),
            ("fedtiny", {}, "statistics and losses of candidates too"),
            ("fedtiny", {"pool": 1}, "the largest gradients of pruned weights too"),
            ("local", {}, "its clients send no model"),
            ("fedavg", {"aggregation": "median"}, "can neither clip it nor take a median"),
            ("fedavg", {"clip_updates": 1.0}, "can neither clip it nor take a median"),
        ):
            with pytest.raises(UserError, match=f"no secure aggregation for {name}: .*{why}"):
                SecureGrid(grid, halves(name, **hyper)[0])
    with (
        LocalGrid(secure_app(task, clients.__getitem__), 3, own_replies=False) as grid,
        pytest.raises(UserError, match="SecureGrid needs a grid whose replies are its own"),
    ):
        SecureGrid(grid, halves("fedavg")[0])


def test_a_client_does_not_send_index_sets() -> None:
    packet = Packet("update", {"values": torch.ones(3), "touched": torch.ones(1, dtype=torch.uint8)}, {"weight": 3})
    with pytest.raises(UserError, match="the reply holds 'touched': an index set would tell"):
        _addable(packet, 8.0, 10.0)
