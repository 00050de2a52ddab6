"""The local engine: stock Flower apps, one digest for any number of workers, errors, and no leftovers."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.nn import functional

from experiments import faults
from fedsparse.client import FederatedClient, Memory, Metrics, client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.engine.shared import Arena, Buffer, chunks, lay, pick
from fedsparse.errors import ClientError, UserError
from fedsparse.lent import LentRecords
from fedsparse.method import build, load_method
from fedsparse.packet import Packet, decode, encode, same
from fedsparse.runner import digest
from fedsparse.strategy import Plan
from fedsparse.task import Client, Split, Task
from tests.helpers import small_clients, small_task

# --- a stock Flower app, as in Flower's quick start ------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


stock_app = ClientApp()


@stock_app.train()
def train(msg: Message, context: Context) -> Message:
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    data = small_clients(4)[context.node_config["partition-id"]].train
    optimizer = torch.optim.SGD(model.parameters(), lr=msg.content["config"]["lr"])
    for _ in range(2):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(data.x), data.y)
        loss.backward()
        optimizer.step()
    calls = context.state["calls"]["n"] if "calls" in context.state else 0
    context.state["calls"] = ConfigRecord({"n": calls + 1})
    metrics = MetricRecord({"train_loss": loss.item(), "calls": calls + 1, "num-examples": len(data)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=msg)


@stock_app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    data = small_clients(4)[context.node_config["partition-id"]].test
    with torch.no_grad():
        loss = functional.cross_entropy(model(data.x), data.y).item()
    return Message(RecordDict({"metrics": MetricRecord({"eval_loss": loss, "num-examples": len(data)})}), reply_to=msg)


def run_stock_app(workers: int) -> tuple[dict[str, torch.Tensor], list[float], float]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        initial = Net().state_dict()
    with LocalGrid(stock_app, 4, workers=workers) as grid:
        result = FedAvg(min_available_nodes=4).start(
            grid, ArrayRecord(initial), num_rounds=3, train_config=ConfigRecord({"lr": 0.1})
        )
    losses = [result.evaluate_metrics_clientapp[r]["eval_loss"] for r in (1, 2, 3)]
    return result.arrays.to_torch_state_dict(), losses, result.train_metrics_clientapp[3]["calls"]


def by_hand() -> dict[str, torch.Tensor]:
    """The same three rounds in a plain loop."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = Net().state_dict()
    for _ in range(3):
        models, sizes = [], []
        for client in small_clients(4):
            model = Net()
            model.load_state_dict(weights)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                functional.cross_entropy(model(client.train.x), client.train.y).backward()
                optimizer.step()
            models.append(model.state_dict())
            sizes.append(len(client.train))
        weights = {
            k: torch.stack([m[k] * n for m, n in zip(models, sizes, strict=True)]).sum(0) / sum(sizes) for k in weights
        }
    return weights


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stock_flower_app_runs_unchanged(workers: int) -> None:
    weights, losses, calls = run_stock_app(workers)
    assert calls == 3  # Flower's context.state lives from round to round
    assert losses[2] < losses[0]
    for name, expected in by_hand().items():
        torch.testing.assert_close(weights[name], expected)


def test_push_and_pull_give_the_same_replies() -> None:
    with LocalGrid(stock_app, 3) as grid:
        records = RecordDict({"arrays": ArrayRecord(Net().state_dict())})
        ids = list(grid.push_messages(Message(records, n, "evaluate") for n in grid.get_node_ids()))
        replies = list(grid.pull_messages(ids))
    assert [r.metadata.src_node_id for r in replies] == [1, 2, 3]
    assert all(r.has_content() for r in replies)


# --- our methods on it ----------------------------------------------------------------------------------------------


def final_digest(method: str, workers: int, fraction: float = 0.6) -> str:
    clients, task = small_clients(7), small_task()
    strategy = build(load_method(method), {"batch_size": 8})
    app = client_app(task, clients.__getitem__)
    with LocalGrid(app, len(clients), workers=workers, own_replies=False) as grid:
        plan = Plan(seed=3, fraction=fraction)
        strategy.start(grid, num_rounds=3, task=task, devices=[c.device for c in clients], plan=plan)
        memories = {i: dict(decode(s).tensors) for i, s in grid.states().items() if len(s)}
    return digest(strategy.state, memories)


def test_our_replies_may_also_be_owned() -> None:
    clients, task = small_clients(3), small_task()
    digests = set()
    for own in (True, False):
        strategy = build(load_method("fedavg"), {})
        with LocalGrid(client_app(task, clients.__getitem__), 3, workers=2, own_replies=own) as grid:
            strategy.start(grid, num_rounds=2, task=task)
        digests.add(digest(strategy.state, {}))
    assert len(digests) == 1


def test_partial_participation_is_the_same_for_any_number_of_workers() -> None:
    assert final_digest("fedavg", 1) == final_digest("fedavg", 2) == final_digest("fedavg", 5)


class Failing(FederatedClient):
    """Raises, or answers NaN, for client 2 in round 2."""

    how: str = "raise"

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        turn = int(memory["turn"]) + 1 if memory else 1
        tensors = dict(packet.tensors)
        if client.id == 2 and turn == 2:
            if HOW == "raise":
                raise RuntimeError("out of luck")
            if HOW == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if HOW == "weight":
                return Packet("update", tensors, {"weight": 0}), memory
            tensors = {k: v * float("nan") for k, v in tensors.items()}
        return Packet("update", tensors, {"weight": 1}), {"turn": torch.tensor(turn)}

    def evaluate(self, task: Task, client: Client, packet: Packet, memory: Memory) -> Metrics:
        return {"personal": task.score(packet.tensors, client.held_out)}


HOW = "raise"


def run_failing(how: str, workers: int, **plan: object) -> list[dict[str, object]]:
    global HOW
    HOW = how
    clients, task = small_clients(4), small_task()
    strategy = build(load_method("fedavg", f"{__name__}:Failing"), {})
    with LocalGrid(client_app(task, clients.__getitem__), 4, workers=workers, own_replies=False) as grid:
        return list(strategy.rounds(grid, 3, task=task, plan=Plan(**plan)))  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("how", "what"), [("raise", "RuntimeError: out of luck"), ("nan", "is not finite"), ("weight", "'weight'")]
)
def test_a_failing_client_stops_the_run_and_is_named(how: str, what: str, workers: int) -> None:
    with pytest.raises(ClientError, match=rf"client 2, round 2, stage train: .*{what}") as caught:
        run_failing(how, workers)
    if how == "raise":
        assert "out of luck" in caught.value.trace
        assert "Traceback" in caught.value.trace


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_a_failing_client_may_be_skipped_and_is_counted(how: str) -> None:
    reports = run_failing(how, 2, on_client_error="skip")
    assert [r["failures"] for r in reports] == [0, 1, 1 if how == "raise" else 0]
    assert [r["clients"] for r in reports] == [4, 3, 3 if how == "raise" else 4]


def test_too_few_answers_stop_the_run() -> None:
    with pytest.raises(ClientError, match="round 2: 3 of 4 clients answered, at least 4 must"):
        run_failing("raise", 1, on_client_error="skip", min_replies=4)


def test_a_dead_worker_stops_the_run() -> None:
    with pytest.raises(ClientError, match="worker process .* died"):
        run_failing("die", 2)


def test_workers_end_with_the_grid() -> None:
    clients, task = small_clients(4), small_task()
    grid = LocalGrid(client_app(task, clients.__getitem__), 4, workers=3)
    assert grid._pool is not None
    pids = [p.pid for p in grid._pool._processes]
    grid.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_end_when_the_driver_is_killed(tmp_path: Path) -> None:
    marker = tmp_path / "pids"
    child = os.fork()
    if child == 0:  # the driver
        clients, task = small_clients(4), small_task()
        grid = LocalGrid(client_app(task, clients.__getitem__), 4, workers=3)
        assert grid._pool is not None
        marker.write_text(" ".join(str(p.pid) for p in grid._pool._processes))
        time.sleep(60)
        os._exit(0)
    while not (marker.exists() and marker.read_text()):
        time.sleep(0.02)
    pids = marker.read_text().split()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 10
    while any(alive(int(pid)) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(int(pid)) for pid in pids)


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended but has not been waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("where", ["before", "after_in_parent", "after_in_child"])
def test_ctrl_c_amid_the_start_of_workers_stops_the_driver_without_a_word(
    where: str, threads: bool, tmp_path: Path
) -> None:
    """Python drops an exception that a hook of a fork raises, so a driver would go on without its workers."""

    def press() -> None:
        with suppress(FileExistsError):  # once
            (tmp_path / "pressed").touch(exist_ok=False)
            os.killpg(0, signal.SIGINT)
            time.sleep(0.02)

    def interrupted() -> None:
        os.register_at_fork(**{where: press})
        if threads:  # the signal may come to any of them, but the exception to the main one
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        LocalGrid(ClientApp(), 4, workers=2)
        time.sleep(60)

    done = faults.attempt(interrupted, tmp_path / "log", limit=30)
    assert (done.code, done.said, done.orphans) == (faults.CTRL_C, "", [])


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
def test_ctrl_c_does_what_it_did_once_workers_are_there(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with LocalGrid(ClientApp(), 4, workers=2):
            assert signal.getsignal(signal.SIGINT) is handler
            assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_grid_needs_clients_and_workers() -> None:
    with pytest.raises(UserError, match="0 and 1"):
        LocalGrid(stock_app, 0)
    with LocalGrid(stock_app, 2) as grid, pytest.raises(UserError, match="no client 8"):
        list(grid.send_and_receive([Message(RecordDict(), 9, "train")]))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exchange_that_was_left_cannot_be_gone_on_with(workers: int) -> None:
    with LocalGrid(stock_app, 4, workers=workers, own_replies=False) as grid:
        first, second = (
            iter(grid.send_and_receive([grid.create_message(RecordDict(), "train", i + 1, "0") for i in range(4)]))
            for _ in range(2)
        )
        next(first), next(second)
        with pytest.raises(UserError, match="another exchange has begun"):
            next(first)
        assert len(list(second)) == 3


def test_records_survive_shared_memory() -> None:
    arena = Arena()
    packet = Packet("update", {"a": torch.randn(5, 3), "i": torch.arange(4)}, {"weight": 2, "s": "x"})
    for records in (
        encode(packet, run="r"),
        RecordDict({"m": ArrayRecord([np.arange(9.0)]), "c": ConfigRecord({"k": 1})}),
    ):
        for copy in (True, False):
            assert pick(lay(records, arena), arena, copy=copy) == records
    big = torch.randn(400_000)  # makes the arena grow while views of it live
    first = pick(lay(encode(packet), arena), arena, copy=False)
    pick(lay(encode(Packet("x", {"a": big})), arena), arena, copy=False)
    assert first == encode(packet)


@pytest.mark.parametrize("copy", [True, False])
def test_packets_of_all_types_survive_shared_memory(copy: bool) -> None:
    """Also where the receiver may not write, and after the sender wrote there again."""
    types = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float64, torch.float16)
    tensors = {str(dtype)[6:]: (torch.arange(6).view(2, 3) % 2).to(dtype) for dtype in types}
    tensors |= {"turned": torch.arange(6).view(2, 3).T, "none": torch.zeros(0, 4, dtype=torch.bool), "f": torch.ones(3)}
    packet = Packet("update", tensors, {"weight": 2})
    arena, buffer = Arena(), Buffer()
    mapped = pick(lay(LentRecords(packet, "r"), arena), arena, copy=copy)
    layout = lay(LentRecords(packet, "r"), buffer)
    received = pick(layout, Buffer(memoryview(bytes(buffer.data))), copy=copy)  # read-only bytes
    assert same(decode(mapped), packet) and same(decode(received), packet)
    arena.reset()
    lay(LentRecords(Packet("x", {"b": torch.ones(1000, dtype=torch.int64)})), arena)
    assert torch.equal(decode(mapped).tensors["turned"], tensors["turned"])


def test_splits_have_a_length() -> None:
    assert len(Split(torch.zeros(3, 2), torch.zeros(3))) == 3


@pytest.mark.parametrize(("n", "count"), [(0, 4), (1, 4), (10, 8), (100, 8), (7, 3)])
def test_chunks_are_even_and_in_order(n: int, count: int) -> None:
    parts = chunks(list(range(n)), count)
    assert [i for part in parts for i in part] == list(range(n))
    sizes = [len(part) for part in parts]
    assert len(parts) <= count
    assert sizes == sorted(sizes, reverse=True)
    assert not sizes or sizes[0] - sizes[-1] <= 1


# --- what a fresh pair of eyes found --------------------------------------------------------------------------------

big_app = ClientApp()


@big_app.train()
def big(msg: Message, context: Context) -> Message:
    seen = msg.content["config"].setdefault("seen", 0)
    msg.content["config"]["seen"] = seen + 1
    if "calls" not in context.state:
        context.state["calls"] = ConfigRecord({"n": 0})
    context.state["calls"]["n"] += 1  # in place, as stock apps may
    reply = ConfigRecord({"raw": b"x" * 400_000, "calls": context.state["calls"]["n"], "seen": seen})
    return Message(RecordDict({"c": reply}), reply_to=msg)


@pytest.mark.parametrize("workers", [1, 2])
def test_large_words_both_ways_states_in_place_and_own_downloads(workers: int) -> None:
    with LocalGrid(big_app, 16, workers=workers) as grid:
        for turn in (1, 2, 3):
            content = RecordDict({"config": ConfigRecord({"raw": b"y" * 400_000})})
            replies = list(grid.send_and_receive([Message(content, n, "train") for n in grid.get_node_ids()]))
            assert [r.content["c"]["calls"] for r in replies] == [turn] * 16
            assert [r.content["c"]["seen"] for r in replies] == [0] * 16


def test_an_exchange_that_nobody_reads_to_its_end_leaves_nothing_behind() -> None:
    clients, task = small_clients(16), small_task()
    with LocalGrid(client_app(task, clients.__getitem__), 16, workers=2, own_replies=False) as grid:
        strategy = build(load_method("fedavg"), {})
        next(strategy.rounds(grid, 1, task=task))
        messages = list(strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid))
        whole = [decode(r.content).tensors["fc1.bias"].clone() for r in grid.send_and_receive(messages)]
        for reply in grid.send_and_receive(messages):  # stops after the first
            assert reply.has_content()
            break
        again = [decode(r.content).tensors["fc1.bias"].clone() for r in grid.send_and_receive(messages)]
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


class Writing(Failing):
    """Writes into the packet that all clients share."""

    def train(
        self, task: Task, client: Client, packet: Packet, memory: Memory, rng: torch.Generator
    ) -> tuple[Packet, Memory]:
        packet.tensors["output.bias"].add_(1)
        return Packet("update", packet.tensors, {"weight": 1}), memory


@pytest.mark.parametrize("workers", [1, 2])
def test_writing_into_a_packet_is_refused(workers: int) -> None:
    clients, task = small_clients(2), small_task()
    strategy = build(load_method("fedavg", f"{__name__}:Writing"), {})
    with (
        LocalGrid(client_app(task, clients.__getitem__), 2, workers=workers, own_replies=False) as grid,
        pytest.raises(ClientError, match="client 0, round 1.*wrote into a tensor of the packet 'train'"),
    ):
        strategy.start(grid, num_rounds=1, task=task)


def test_skipped_failures_are_named_in_the_report() -> None:
    report = run_failing("raise", 1, on_client_error="skip")[1]
    assert report["errors"] == ["client 2, round 2, stage train: RuntimeError: out of luck"]
    assert "Traceback" in report["traces"][0]


class Forgetful(LocalGrid):
    """Loses the last reply."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        return list(super().send_and_receive(messages))[:-1]


def test_a_reply_that_never_comes_is_a_failure() -> None:
    clients, task = small_clients(3), small_task()
    with Forgetful(client_app(task, clients.__getitem__), 3) as grid:
        with pytest.raises(ClientError, match="client 2, round 1, stage train: no reply came"):
            build(load_method("fedavg"), {}).start(grid, num_rounds=1, task=task)
        skipping = build(load_method("fedavg"), {}).rounds(grid, 1, task=task, plan=Plan(on_client_error="skip"))
        assert next(skipping)["failures"] == 2  # one of training, one of the evaluation
