"""The Ray engine with real Ray: the same digest as the local one, whatever dies."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from fedsparse.client import client_app
from fedsparse.engine.grid import OwnGrid
from fedsparse.engine.local import LocalGrid
from fedsparse.engine.ray import RayGrid, _Hand, _is_near, _parts
from fedsparse.engine.store import MemoryStore
from fedsparse.errors import ClientError, UserError
from fedsparse.experiment import from_dict
from fedsparse.packet import Packet, decode, encode
from fedsparse.runner import app_of, digest, federation_of
from fedsparse.strategy import Plan
from fedsparse.verify import engines_of, verify
from tests.helpers import norm_task, small_clients
from tests.test_contract import METHODS, halves
from tests.test_own_models import NET, SHORT

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own


@pytest.fixture(scope="module", autouse=True)
def _running() -> Iterator[None]:
    # "local": else it joins whatever Ray runs on this machine, such as that of the tests beside it
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


CLIENTS = 6
NEAR = sys.platform == "linux"  # where workers on this machine answer in memory that is mapped


def app(clients: int = CLIENTS) -> ClientApp:
    made = small_clients(clients)
    return client_app(norm_task(), made.__getitem__)


def end_of(name: str, grid: OwnGrid, rounds: int = 3, **hyper: Any) -> str:
    strategy, _ = halves(name, **{"batch_size": 8, **hyper})
    devices = [c.device for c in small_clients(CLIENTS)]
    list(strategy.rounds(grid, rounds, task=norm_task(), devices=devices, plan=Plan(seed=7, fraction=0.8)))
    return digest(strategy.state, {i: dict(decode(s).tensors) for i, s in grid.states().items() if len(s)})


@pytest.fixture(scope="module")
def local() -> Callable[[str], str]:
    known: dict[str, str] = {}

    def get(name: str) -> str:
        if name not in known:
            known[name] = end_of(name, LocalGrid(app(), CLIENTS, own_replies=False))
        return known[name]

    return get


@pytest.fixture(scope="module")
def shared() -> Iterator[RayGrid]:
    """One grid for all methods: workers take seconds to start."""
    with RayGrid(app, CLIENTS, workers=2, own_replies=False) as grid:
        yield grid


@pytest.mark.parametrize("name", METHODS)
def test_the_digest_is_that_of_the_local_engine(name: str, shared: RayGrid, local: Callable[[str], str]) -> None:
    shared._states = MemoryStore()
    assert end_of(name, shared) == local(name)


def test_another_number_of_workers_another_order_and_little_memory(local: Callable[[str], str]) -> None:
    sizes = {0: 1.0, 5: 9.0, 3: 4.0}
    with (
        MemoryStore(None, 1) as store,
        RayGrid(app, CLIENTS, workers=3, own_replies=False, store=store, sizes=sizes) as grid,
    ):
        assert end_of("pfedgate", grid) == local("pfedgate")


def test_workers_on_other_machines_answer_through_the_object_store(
    monkeypatch: pytest.MonkeyPatch, local: Callable[[str], str]
) -> None:
    seen: list[bool] = []

    def elsewhere(path: str, token: bytes) -> bool:
        seen.append(_is_near(path, token))
        return False

    monkeypatch.setattr("fedsparse.engine.ray._is_near", elsewhere)
    with RayGrid(app, CLIENTS, workers=2, own_replies=False) as grid:
        assert end_of("pfedgate", grid) == local("pfedgate")
        assert not any(hand.slots for hand in grid._hands)
    assert set(seen) == {NEAR}  # a second worker may come when all is done


def echo() -> ClientApp:
    """Answers with what it got, and its number."""
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        x = decode(message.content).tensors["x"]
        return Message(encode(Packet("r", {"x": x, "n": torch.full((500 + number,), number)})), reply_to=message)

    return made


def test_exchanges_that_are_left_in_the_middle() -> None:
    """Workers keep downloads between lists and memory between exchanges: all answers are the right ones."""
    with RayGrid(echo, 12, workers=2, own_replies=False) as grid:
        for turn in range(8):
            packets = [encode(Packet("train", {"x": torch.full((999,), turn + k / 2)})) for k in range(2)]
            sent = [grid.create_message(packets[i % 2], "train", i + 1, "0") for i in range(12)]
            replies = enumerate(grid.send_and_receive(sent))
            for i, reply in itertools.islice(replies, 12 if turn in (3, 7) else 1 + turn):
                got = decode(reply.content).tensors
                assert (got["x"] == turn + i % 2 / 2).all() and len(got["n"]) == 500 + i
                assert (got["n"] == i).all()
            assert all(len(hand.slots) <= 6 for hand in grid._hands)  # as many lists as an exchange has in all


def test_a_list_gets_the_slot_that_fits() -> None:
    """Slots keep their size: small lists must not take large ones, nor let all of them grow."""
    hand = _Hand(None, None, near=True)
    assert [hand.slot(1).number for _ in range(3)] == [0, 1, 2]  # type: ignore[union-attr]
    for slot, held in zip(hand.slots, (100, 1000, 10), strict=True):
        slot.held = held
    hand.forget()
    assert [hand.slot(size).held for size in (50, 5, 5000)] == [100, 10, 1000]  # type: ignore[union-attr]
    assert _Hand(None, None).slot(1) is None


def test_paths_that_are_no_memory_of_a_worker(tmp_path: Path) -> None:
    """Such as those of another machine's worker may be here."""
    (tmp_path / "file").write_bytes(b"0123456789abcdef")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for path in ("", "/proc/0/fd/0", str(tmp_path / "link")):
        assert not _is_near(path, b"0123456789abcdef")


# --- what dies -------------------------------------------------------------------------------------------------------


def dying(folder: Path, times: int) -> ClientApp:
    """The app, in a worker process that exits at client 3's call, so many times in all."""
    plain, wrapped = app(), ClientApp()

    def answer(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 3:
            for k in range(times):
                try:
                    (folder / str(k)).touch(exist_ok=False)
                except FileExistsError:
                    continue
                os._exit(1)
        return plain(message, context)

    wrapped.train()(answer)
    wrapped.evaluate()(answer)
    return wrapped


def test_a_worker_that_dies_is_replaced(tmp_path: Path, local: Callable[[str], str]) -> None:
    """Twice, at the same client."""
    with RayGrid(partial(dying, tmp_path, 2), CLIENTS, workers=2, own_replies=False) as grid:
        assert end_of("pfedgate", grid) == local("pfedgate")
        assert grid.lost == len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(
    not NEAR,
    reason="memory of workers is mapped on Linux alone: elsewhere the object store keeps the answers of the dead",
)
def test_a_worker_that_dies_before_its_answers_are_read(
    monkeypatch: pytest.MonkeyPatch, local: Callable[[str], str]
) -> None:
    """Its memory goes with it."""
    plain, killed = ray.get, list[int]()

    def get(ref: Any, **kwargs: Any) -> Any:
        found = plain(ref, **kwargs)
        if isinstance(found, tuple) and isinstance(found[0], float) and not killed:  # the first answers
            killed.append(int(found[2][0].split("/")[2]))
            os.kill(killed[0], signal.SIGKILL)
            while Path(f"/proc/{killed[0]}/fd").exists() and list(Path(f"/proc/{killed[0]}/fd").iterdir()):
                time.sleep(0.01)
        return found

    with RayGrid(app, CLIENTS, workers=1, own_replies=False) as grid:
        monkeypatch.setattr(ray, "get", get)
        assert end_of("pfedgate", grid) == local("pfedgate")
        assert grid.lost == len(killed) == 1


def test_a_client_that_kills_every_worker_is_named(tmp_path: Path) -> None:
    said = r"3 Ray workers died while they ran clients \[3\]; out of memory\?"
    with (
        RayGrid(partial(dying, tmp_path, 99), CLIENTS, workers=2, own_replies=False) as grid,
        pytest.raises(ClientError, match=said),
    ):
        end_of("fedavg", grid)


# --- other apps, and what is refused ---------------------------------------------------------------------------------


def stock() -> ClientApp:
    """Of plain Flower: it counts its calls in its state, and writes into what it got."""
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        had = context.state["n"]["x"].numpy() if "n" in context.state else np.zeros(3)  # type: ignore[call-overload,index,union-attr]
        context.state["n"] = ArrayRecord({"x": Array(had + 1)})
        if context.node_id == 9:
            raise ValueError("not today")
        return Message(RecordDict({"n": context.state["n"]}), reply_to=message)

    return made


def test_stock_apps_run_on_it_and_errors_are_replies() -> None:
    with RayGrid(stock, 12, workers=2) as grid:
        for turn in (1, 2):
            sent = [grid.create_message(RecordDict(), "train", i + 1, "1") for i in range(12)]
            replies = list(grid.send_and_receive(sent))
            assert [r.metadata.src_node_id for r in replies] == list(range(1, 13))
            assert replies[8].has_error() and "ValueError: not today" in (replies[8].error.reason or "")
            right = [r for r in replies if not r.has_error()]
            assert all((r.content["n"]["x"].numpy() == turn).all() for r in right)  # type: ignore[call-overload,index,union-attr]


@given(st.lists(st.integers(1, 50), max_size=60), st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_lists_hold_every_client_once_in_order_and_about_their_share(sizes: list[int], shares: list[int]) -> None:
    parts = _parts(list(enumerate(sizes)), sizes, shares)
    assert [job for part in parts for job in part] == list(enumerate(sizes))
    assert all(parts) and len(parts) <= len(shares)
    for count in range(1, len(parts) + 1):  # the ends lie where they should, to within a client
        end = sum(size for part in parts[:count] for _, size in part)
        assert any(abs(end - sum(sizes) * sum(shares[:k]) / sum(shares)) <= max(sizes) for k in range(len(shares) + 1))


def broken() -> ClientApp:
    raise FileNotFoundError("no data here")


def test_an_app_that_cannot_be_made_is_one_line() -> None:
    with RayGrid(broken, 2, workers=1) as grid, pytest.raises(UserError, match="no data here"):
        list(grid.send_and_receive([grid.create_message(RecordDict(), "train", 1, "1")]))


def _torn() -> None:
    raise LookupError("torn")


class Torn:
    """What no worker can unpickle."""

    def __call__(self) -> ClientApp:
        return app()

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _torn, ()


def test_workers_that_cannot_be_made_stop_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsparse.engine.ray._TRIES", 0)
    with (
        RayGrid(Torn(), 2, workers=1) as grid,
        pytest.raises(UserError, match=r"while they start: .*Error: .*torn"),
    ):
        list(grid.send_and_receive([grid.create_message(RecordDict(), "train", 1, "1")]))


def test_workers_of_other_code_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsparse.sources.source_digest", lambda: "another")
    with (
        RayGrid(app, 2, workers=1) as grid,
        pytest.raises(UserError, match="have other source code than"),
    ):
        list(grid.send_and_receive([grid.create_message(RecordDict(), "train", 1, "1")]))


def test_a_worker_that_fits_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsparse.engine.ray._START_SECONDS", 2.0)
    with (
        RayGrid(app, 2, workers=1, cpus=64) as grid,
        pytest.raises(UserError, match="each takes 64 CPUs and 0 GPUs, the cluster has 4 and 0"),
    ):
        list(grid.send_and_receive([grid.create_message(RecordDict(), "train", 1, "1")]))


# --- as a run --------------------------------------------------------------------------------------------------------


def test_a_run_and_verify_on_ray(tmp_path: Path) -> None:
    made = from_dict({}, ["dataset=digits", "partition.clients=3", "rounds=2", "method=fedtiny", "method.density=0.3"])
    assert len({digest for _, digest in verify(made, engines_of("local:1,ray:2"), out=tmp_path)}) == 1
    config = (tmp_path / "1-ray-2" / "config.toml").read_text()
    assert 'kind = "ray"' in config
    clients = federation_of(made).clients
    message = Message(encode(Packet("query")), 2, "query", group_id="0")
    asked = app_of(config)(message, Context(1, 2, {"partition-id": 1, "num-partitions": 3}, RecordDict(), {}))
    assert len(clients) == 3 and decode(asked.content).scalars["id"] == 1


def test_a_model_of_ones_own_is_loaded_by_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same words, relative to where the driver is."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    made = from_dict({}, ["model=net.py:Net", *SHORT, "method=pfedgate"])
    assert len({digest for _, digest in verify(made, engines_of("local:1,ray:2"))}) == 1


def test_other_deaths(monkeypatch: pytest.MonkeyPatch, local: Callable[[str], str]) -> None:
    """As Ray's memory monitor kills, which a test cannot provoke: three answers are errors of such classes."""
    plain, left = ray.get, ["OutOfMemoryError", "WorkerCrashedError", "LocalRayletDiedError"]
    answers: list[int] = []

    def get(ref: Any, **kwargs: Any) -> Any:
        found = plain(ref, **kwargs)
        if isinstance(found, tuple) and isinstance(found[0], float):  # seconds, answers, and where they lie
            answers.append(1)
            if len(answers) % 2 and left:  # the same list comes through at its second try
                raise getattr(ray.exceptions, left.pop())("killed")
        return found

    with RayGrid(app, CLIENTS, workers=1, own_replies=False) as grid:
        monkeypatch.setattr(ray, "get", get)
        assert end_of("fedavg", grid) == local("fedavg")
        assert grid.lost == 3
