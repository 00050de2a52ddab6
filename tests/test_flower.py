"""Flower's own runtime: real runs in its simulation and on SuperNodes end with the digest of the local engine."""

from __future__ import annotations

import io
import json
import logging
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk  # `flwr build`, without its file
from flwr.clientapp import ClientApp

from experiments.flower_runtime import Runtime, begin, go_on, main
from fedsparse.engine import flower
from fedsparse.engine.flower import FlowerGrid, node_app
from fedsparse.engine.local import LocalGrid
from fedsparse.engine.store import MemoryStore, memory_bytes
from fedsparse.errors import ClientError, UserError
from fedsparse.experiment import from_dict, load_experiment
from fedsparse.packet import Packet, decode, encode, same
from fedsparse.runner import Run, app_of, resume, run
from fedsparse.sources import must_agree
from strategies.server_app import server_app
from tests.test_resume import InterruptedRunError

PROJECT = Path(__file__).parents[1]
PACKAGES = ("fedsparse", "strategies", "clients")
CLIENTS = 3
METHODS = ("fedavg", "pfedgate", "fedtiny")
SETTINGS = ["dataset=digits", f"partition.clients={CLIENTS}", "rounds=2", "evaluate.every=2", "sparse=dense"]


def settings(method: str) -> list[str]:
    more = ["method.density=0.3"] if method == "fedtiny" else []
    return [*SETTINGS, f"method={method}", *more]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The local engine's run of a method."""
    known: dict[str, Run] = {}

    def get(method: str) -> Run:
        if method not in known:
            known[method] = run(from_dict({}, settings(method)), out=tmp_path_factory.mktemp("local") / method)
        return known[method]

    return get


def content(folder: Path) -> bytes:
    """The final model and all memories, bit for bit."""
    return (folder / "final.safetensors").read_bytes()


# --- the real runtime ------------------------------------------------------------------------------------------------


def descendants(folder: Path) -> list[int]:
    """Processes that have the runtime's Flower folder in their environment."""
    mark, found = f"FLWR_HOME={folder}/home".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            environment, state = (place / "environ").read_bytes(), (place / "stat").read_text().rsplit(") ", 1)[1][0]
        except OSError:
            continue
        if mark in environment.split(b"\0") and state != "Z":
            found.append(int(place.name))
    return found


@pytest.fixture(scope="module")
def simulation() -> Iterator[Runtime]:
    with Runtime() as runtime:
        yield runtime
        assert descendants(runtime.folder)
    assert not descendants(runtime.folder) and not runtime.folder.exists()


@pytest.mark.parametrize("method", ["fedavg", "fedtiny"])
def test_a_simulation_has_the_digest_of_the_local_engine(
    method: str, simulation: Runtime, local: Callable[[str], Run], tmp_path: Path
) -> None:
    experiment = str(local(method).directory / "config.toml")
    status, details = simulation.run(
        {"experiment": experiment, "set": "name=other", "out": str(tmp_path / "run")}, CLIENTS
    )
    assert status == "finished:completed", details
    assert content(tmp_path / "run") == content(local(method).directory)
    assert 'kind = "flower"' in (tmp_path / "run" / "config.toml").read_text()


def test_a_simulation_that_was_killed_goes_on_to_it(local: Callable[[str], Run], tmp_path: Path) -> None:
    """SIGKILL to the server, to all clients and to what ran them, after a checkpoint; also the local engine goes on."""
    out, copy = tmp_path / "run", tmp_path / "copy"
    experiment = load_experiment(local("pfedgate").directory / "config.toml", ["engine.checkpoint_every=1"])
    begin("simulation", experiment, out, kill_after=1)
    shutil.copytree(out, copy)
    assert content(resume(copy, engine="local").directory) == content(local("pfedgate").directory)
    go_on("simulation", out)
    assert content(out) == content(local("pfedgate").directory)
    assert not (out / "checkpoint").exists()


def test_a_deployment_with_tls_has_it_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The whole of ``make deployment-demo``, and what its exit code says."""
    changes = [word for setting in settings("pfedgate") for word in ("--set", setting)]
    out = tmp_path / "run"
    assert main(["deployment", "digits_pfedgate", *changes, "--out", str(out), "--compare"]) == 0
    said = capfd.readouterr().out
    assert f"deployment with {CLIENTS} SuperNodes" in said and "the local engine's is the same" in said
    assert {path.name for path in out.iterdir()} >= {"summary.json", "rounds.jsonl", "clients.parquet", "report.html"}


def test_a_client_of_other_code_is_refused(tmp_path: Path) -> None:
    """Ray finds what lies where the SuperLink was started before the app's own files."""
    for package in PACKAGES:
        shutil.copytree(PROJECT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "clients" / "fedavg.py").open("a") as file:
        file.write("# changed\n")
    with Runtime(place=tmp_path) as runtime:
        status, details = runtime.run({"set": " ".join(settings("fedavg")), "out": str(tmp_path / "run")}, CLIENTS)
    assert status == "finished:failed"
    assert "cannot take part: it differs from the server in source code" in details and "\n" not in details
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Flower's own, of the library that reads .gitignore
def test_the_app_holds_all_code() -> None:
    """What ``flwr run`` sends leaves files out by rules of its own; the digest of the sources needs all."""
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(PROJECT))) as app:
        sent = {name: app.read(name) for name in app.namelist() if name.endswith(".py")}
        assert "experiments/digits_pfedgate.toml" in app.namelist()
    here = {path for package in PACKAGES for path in (PROJECT / package).rglob("*.py")}
    assert sent == {path.relative_to(PROJECT).as_posix(): path.read_bytes() for path in here}


# --- the same grid and app over a grid in this process ---------------------------------------------------------------


class Watched(LocalGrid):
    """Notes the bytes of memory in each exchange."""

    def __init__(self, app: ClientApp, partitions: int) -> None:
        super().__init__(app, partitions)
        self.exchanges: list[list[int]] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        packets = [decode(reply.content) for reply in replies]
        if sizes := [packet.tensors["bytes"].nbytes for packet in packets if packet.kind == "memory"]:
            self.exchanges.append(sizes)
        return replies


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("window", [100, 30_000, 1 << 20])
def test_memories_come_in_bounded_pieces(
    method: str, window: int, local: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = 5_000
    monkeypatch.setattr(flower, "_PIECE", piece)
    monkeypatch.setattr(flower, "_WINDOW", window)
    grid = Watched(node_app(app_of), CLIENTS)
    made = from_dict({}, [*settings(method), "engine.kind=flower"])
    done = run(made, out=tmp_path / "run", on_flower=partial(FlowerGrid, grid))
    assert content(done.directory) == content(local(method).directory)
    assert done.summary["digest"] == local(method).summary["digest"]
    assert done.summary["bytes"] == local(method).summary["bytes"]  # the greeting is no part of a method's packets
    assert max(max(sizes) for sizes in grid.exchanges) <= piece
    assert max(sum(sizes) for sizes in grid.exchanges) <= max(window, piece)
    if method == "pfedgate":
        assert len(grid.exchanges) >= 3


def other(change: Callable[[Packet], Packet]) -> ClientApp:
    """An app whose answers with a memory are changed."""
    plain, wrapped = node_app(app_of), ClientApp()
    wrapped.train()(plain)
    wrapped.evaluate()(plain)

    @wrapped.query()
    def query(message: Message, context: Context) -> Message:
        packet = decode(plain(message, context).content)
        return Message(encode(change(packet) if packet.kind == "memory" else packet), reply_to=message)

    return wrapped


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: replace(p, tensors={"bytes": p.tensors["bytes"] // 2}), "client 0 sent a memory that cannot be rea"),
        (lambda p: replace(p, tensors={"bytes": p.tensors["bytes"][1:]}), "client 0 sent 13691 bytes of its memory of"),
        (lambda p: replace(p, tensors={}), "client 0 sent 0 bytes of its memory of 13692, from 0 on"),
        (lambda p: replace(p, scalars={"size": -1}), "client 0: its memory has -1 bytes, where 0 to"),
        (lambda p: replace(p, scalars={"size": 1 << 40}), "client 0: its memory has 1099511627776 bytes, where 0 to"),
        (lambda p: replace(p, scalars={"size": "all"}), "client 0: its memory has 'all' bytes, where 0 to"),
        (lambda p: Packet("error", scalars={"message": "no"}), "client 0, memory: no"),
    ],
)
def test_a_memory_that_does_not_come_as_it_was_asked_for(
    change: Callable[[Packet], Packet], said: str, tmp_path: Path
) -> None:
    made = from_dict({}, [*settings("pfedgate"), "engine.kind=flower", "rounds=1"])
    with pytest.raises(ClientError, match=said):
        run(made, out=tmp_path / "run", on_flower=partial(FlowerGrid, LocalGrid(other(change), CLIENTS)))
    assert not (tmp_path / "run" / "summary.json").exists()


# --- checkpoints ----------------------------------------------------------------------------------------------------


def checkpointed(method: str, kind: str, *more: str) -> list[str]:
    return [*settings(method), "rounds=3", "engine.checkpoint_every=1", f"engine.kind={kind}", *more]


def cut(folder: Path, settings: list[str], grid: LocalGrid | None) -> None:
    """A run that is interrupted in round 3; on Flower's nodes if there is a grid of them."""

    def on_round(report: dict[str, Any]) -> None:
        if report["round"] == 3:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        run(from_dict({}, settings), out=folder, on_round=on_round, on_flower=grid and partial(FlowerGrid, grid))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_whatever_engine_began_it(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On new nodes, on nodes with later memories, and on the local engine: a run folder is like any other's."""
    monkeypatch.setattr(flower, "_WINDOW", 30_000)  # bytes: a memory or two of pFedGate
    whole = run(from_dict({}, checkpointed(method, "local")), out=tmp_path / "whole")
    nodes = LocalGrid(node_app(app_of), CLIENTS)
    cut(tmp_path / "flower", checkpointed(method, "flower"), nodes)
    cut(tmp_path / "local", checkpointed(method, "local"), None)
    for name in ("new", "old", "here"):
        shutil.copytree(tmp_path / "flower", tmp_path / name)
    new, old = (partial(FlowerGrid, grid) for grid in (LocalGrid(node_app(app_of), CLIENTS), nodes))
    for done in (
        resume(tmp_path / "new", on_flower=new),
        resume(tmp_path / "old", on_flower=old),
        resume(tmp_path / "here", engine="local", workers=2),
        resume(tmp_path / "local", engine="flower", on_flower=new),
    ):
        assert done.summary["digest"] == whole.summary["digest"]
        assert done.summary["bytes"] == whole.summary["bytes"]
        assert content(done.directory) == content(whole.directory)
    with pytest.raises(UserError, match="engine 'flower' is what `flwr run` uses; .*--engine local"):
        resume(tmp_path / "flower")


def test_only_memories_that_training_may_have_changed_are_fetched(tmp_path: Path) -> None:
    """One of three clients trains in a round; all are evaluated."""
    grid = Watched(node_app(app_of), CLIENTS)
    made = from_dict({}, checkpointed("pfedgate", "flower", "rounds=4", "fraction=0.3", "evaluate.every=1"))
    run(made, out=tmp_path / "run", on_flower=partial(FlowerGrid, grid))
    assert [len(sizes) for sizes in grid.exchanges] == [1] * 4


def hello() -> Packet:
    return Packet("hello", scalars={"config": from_dict({}, SETTINGS).to_toml(), "same": json.dumps(must_agree())})


def restored(context: Context, data: bytes) -> Packet:
    """A node's answer to a memory."""
    packet = Packet("restore", {"bytes": torch.tensor(list(data), dtype=torch.uint8)})
    return decode(node_app(app_of)(Message(encode(packet), 1, "query"), context).content)


GATE = Packet("memory", {"gate": torch.arange(3.0), "steps": torch.tensor([4])})
CODE = ConfigRecord({"code": pickle.dumps(print)})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cannot be read"),
        (pickle.dumps(GATE), "cannot be read"),
        (memory_bytes(encode(GATE))[:-1], "SafetensorError"),
        (memory_bytes(encode(replace(GATE, scalars={"more": 1}))), "it holds more than tensors"),
        (memory_bytes(encode(GATE, run="[]")), "it holds more than tensors"),
        (
            memory_bytes(RecordDict({**encode(GATE), "fedsparse.experiment": CODE})),
            "'fedsparse.experiment' is not want",
        ),
        (memory_bytes(RecordDict({"arrays": ArrayRecord([]), "config": CODE})), "not a fedsparse packet"),
    ],
)
def test_a_node_takes_nothing_but_tensors_for_its_memory(data: bytes, said: str) -> None:
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    assert "was never greeted" in str(restored(context, memory_bytes(encode(GATE))).scalars["message"])
    assert decode(node_app(app_of)(Message(encode(hello()), 1, "query"), context).content).kind == "hello"
    greeted = dict(context.state)
    assert restored(context, memory_bytes(encode(GATE))).kind == "restore"
    assert same(decode(RecordDict({name: context.state[name] for name in context.state if name not in greeted})), GATE)
    held = dict(context.state)
    answer = restored(context, data)
    assert answer.kind == "error" and said in str(answer.scalars["message"])
    assert dict(context.state) == held
    decode(node_app(app_of)(Message(encode(hello()), 1, "query"), context).content)
    assert dict(context.state) == greeted  # a run that begins knows of none


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The ServerApp over nodes in this process, with a run config."""
    for name in ("handlers", "propagate", "level"):  # it sends the library's lines to Flower's log
        monkeypatch.setattr(logging.getLogger("fedsparse"), name, getattr(logging.getLogger("fedsparse"), name))

    def serve(**words: str) -> None:
        config = {"experiment": "", "set": "", "out": "", "resume": "", "wait": 0, **words}
        server_app(LocalGrid(node_app(app_of), CLIENTS), Context(1, 0, {}, RecordDict(), config))

    return serve


def test_the_run_config_names_the_folder_alone(
    served: Callable[..., None], local: Callable[[str], Run], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    cut(folder, checkpointed("pfedgate", "local", "engine.workers=2"), None)
    for name in ("experiment", "set", "out"):
        with pytest.raises(UserError, match=f"resume=.* goes on with a run as it was begun: leave {name}='x' out"):
            served(resume=str(folder), **{name: "x"})
    with pytest.raises(UserError, match="is no run folder: it has no config.toml"):
        served(resume=str(tmp_path / "none"))
    served(resume=str(folder))
    assert json.loads((folder / "summary.json").read_text())["engine"] == "flower"
    with pytest.raises(UserError, match="is complete"):
        served(resume=str(folder))
    served(experiment=str(local("pfedgate").directory / "config.toml"), set="name=other", out=str(tmp_path / "other"))
    assert content(tmp_path / "other") == content(local("pfedgate").directory)
    shutil.copytree(local("pfedgate").directory, tmp_path / "early")
    (tmp_path / "early" / "summary.json").unlink()
    with pytest.raises(UserError, match="has no checkpoint to go on from; start the run anew"):
        served(resume=str(tmp_path / "early"))


# --- who takes part --------------------------------------------------------------------------------------------------


def met(grid: LocalGrid, clients: int = CLIENTS, wait: float = 0.0) -> FlowerGrid:
    return FlowerGrid(grid, from_dict({}, SETTINGS).to_toml(), clients, MemoryStore(), 1 << 20, wait=wait)


def test_more_nodes_than_clients_stay_idle_and_fewer_are_refused() -> None:
    assert met(LocalGrid(node_app(app_of), CLIENTS + 2)).partitions == {0: 1, 1: 2, 2: 3}
    with pytest.raises(UserError, match="2 of 3 clients are there after 0 s, client 2 is not: .*num-supernodes=3"):
        met(LocalGrid(node_app(app_of), 2))


def test_another_environment_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalGrid(node_app(app_of), CLIENTS, workers=2) as grid:  # forked before the variable is set
        monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
        with pytest.raises(ClientError, match=r"client 0 cannot .* in MKL_CBWR \('' here, 'COMPATIBLE' there\)"):
            met(grid)


def of_partitions(ids: list[int | None]) -> ClientApp:
    """An app whose nodes say that they are these partitions."""
    plain, wrapped = node_app(app_of), ClientApp()

    @wrapped.query()
    def query(message: Message, context: Context) -> Message:
        found = ids[context.node_id - 1]
        context.node_config = {} if found is None else {"partition-id": found}
        return plain(message, context)

    return wrapped


def test_node_ids_say_nothing_and_partition_ids_must_be_there_once() -> None:
    assert met(LocalGrid(of_partitions([2, 0, 1]), CLIENTS)).partitions == {0: 2, 1: 3, 2: 1}
    with pytest.raises(UserError, match="two nodes say that they are client 1"):
        met(LocalGrid(of_partitions([0, 1, 1]), CLIENTS))
    with pytest.raises(ClientError, match="node 2 cannot take part: a SuperNode needs --node-config"):
        met(LocalGrid(of_partitions([0, None, 1]), CLIENTS))
    with pytest.raises(ClientError, match="node 2: its partition-id is -3, a number from 0 is wanted"):
        met(LocalGrid(of_partitions([0, -3, 1]), CLIENTS))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_node_that_was_never_greeted_does_nothing(kind: str) -> None:
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    packet = decode(node_app(app_of)(Message(encode(Packet("train")), 1, kind), context).content)
    assert packet.kind == "error" and "was never greeted" in str(packet.scalars["message"])


def test_our_own_command_refuses_the_engine(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="engine 'flower' is what `flwr run` uses"):
        run(from_dict({}, [*SETTINGS, "engine.kind=flower"]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulation", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give an experiment, or --resume"),
        (["digits_pfedgate", "--resume", "x"], "give an experiment, or --resume"),
        (["--resume", "x", "--compare"], "leave all other options out"),
        (["--resume", "x"], "'x' is no run folder"),
        (["digits_pfedgate", "--out", ".", "--kill-after", "1"], "exists; name another"),
    ],
)
def test_what_cannot_be_meant_is_exit_code_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulation", *words]) == 2
    assert said in capsys.readouterr().err
