"""Checkpoints and resuming: the same digest and history whatever interrupts a run, and what is damaged is noticed."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from experiments import personal
from fedsparse.checkpoint import packed, unpacked
from fedsparse.errors import UserError
from fedsparse.experiment import Experiment, from_dict
from fedsparse.final import FINAL
from fedsparse.method import method_names
from fedsparse.runner import Run, resume, run

BASE = ["dataset=digits", "partition.max_clients=4", "rounds=4", "fraction=0.75", "engine.checkpoint_every=1"]
CHANGING = ["method.delta_r=1", "method.r_stop=3"]
SETTINGS: dict[str, list[str]] = {
    "pfedgate": ["method.download=changed", "budget.tiers=[1, 0.5]"],
    "fedtiny": [
        "method.density=0",
        "method.nested=true",
        "method.delta_r=1",
        "method.r_stop=3",
        "budget.tiers=[0.6, 0.3]",
    ],
    "feddst": CHANGING,
    "prunefl": [*CHANGING, "method.initial_steps=20", "method.initial_every=5"],
    "snip": ["partition.holdout=3"],
}


class InterruptedRunError(Exception):
    """What interrupts a run in these tests."""


def experiment(method: str, *more: str) -> Experiment:
    sparse = [] if method in ("pfedgate",) else ["method.batch_size=16"]
    return from_dict({}, [f"method={method}", *BASE, *sparse, *SETTINGS.get(method, []), *more])


def stop_after(reports: int) -> Callable[[dict[str, Any]], None]:
    """Raises once so many reports have come: the last one has no checkpoint yet."""
    seen: list[int] = []

    def on_round(_: dict[str, Any]) -> None:
        seen.append(1)
        if len(seen) == reports:
            raise InterruptedRunError

    return on_round


def interrupted(method: str, folder: Path, reports: int, *more: str) -> None:
    with pytest.raises(InterruptedRunError):
        run(experiment(method, *more), out=folder, on_round=stop_after(reports))


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


def same_run(a: Run, b: Run) -> None:
    assert a.summary["digest"] == b.summary["digest"]
    assert without_times(a.rounds) == without_times(b.rounds)
    assert without_times(a.clients) == without_times(b.clients)
    for key in ("accuracy", "bytes", "flops", "density", "masks", "failures", "rounds"):
        assert a.summary[key] == b.summary[key], key
    tables = [without_times(pq.read_table(r.directory / "clients.parquet").to_pylist()) for r in (a, b)]
    assert tables[0] == tables[1]
    finals = [load_file(r.directory / FINAL) for r in (a, b)]
    assert finals[0].keys() == finals[1].keys()
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


@pytest.mark.parametrize("method", method_names())
def test_every_method_goes_on_to_the_same_digest(method: str, tmp_path: Path) -> None:
    whole = run(experiment(method), out=tmp_path / "whole")
    interrupted(method, tmp_path / "cut", len(whole.rounds) - 1)
    same_run(whole, resume(tmp_path / "cut", workers=2))
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize("reports", [2, 3])
def test_it_goes_on_within_the_preparation(reports: int, tmp_path: Path) -> None:
    more = ("method.pool=3", "model=resnet18", "width=0.05")
    whole = run(experiment("fedtiny", *more), out=tmp_path / "whole")
    assert [line["stage"] for line in whole.rounds[:3]] == ["calibrate", "probe", "train"]
    interrupted("fedtiny", tmp_path / "cut", reports, *more)
    same_run(whole, resume(tmp_path / "cut"))


def test_it_goes_on_again_and_again_with_little_memory(tmp_path: Path) -> None:
    whole = run(experiment("pfedgate", "rounds=6"), out=tmp_path / "whole")
    interrupted("pfedgate", tmp_path / "cut", 2, "rounds=6", "engine.memory_mb=1")
    for _ in range(3):
        with pytest.raises(InterruptedRunError):
            resume(tmp_path / "cut", on_round=stop_after(2))
    same_run(whole, resume(tmp_path / "cut"))


def test_other_versions_than_a_run_was_begun_with_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted("fedavg", tmp_path / "cut", 2)
    config = tmp_path / "cut" / "config.toml"
    text = config.read_text()
    config.write_text(text.replace(f'torch = "{torch.__version__}"', 'torch = "1.0"') + 'MKL_CBWR = "COMPATIBLE"\n')
    with pytest.raises(InterruptedRunError):
        resume(tmp_path / "cut", on_round=stop_after(1))
    said = f"begun with MKL_CBWR COMPATIBLE, now not set; torch 1.0, now {torch.__version__}: its digest may be another"
    assert said in caplog.text
    caplog.clear()
    config.write_text(text)
    resume(tmp_path / "cut")
    assert "begun with" not in caplog.text


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_minus_nine(workers: int, tmp_path: Path) -> None:
    """The driver dies in the middle of a round, and of writing: nothing is left to clean up, no worker lives on."""
    whole = run(experiment("pfedgate", "rounds=12"), out=tmp_path / "whole")
    folder = tmp_path / "cut"
    code = (
        "import sys; from fedsparse.experiment import load_experiment; from fedsparse.runner import run\n"
        f"made = load_experiment({str(whole.directory / 'config.toml')!r}, ['engine.workers={workers}'])\n"
        f"run(made, out={str(folder)!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 60
    while child.poll() is None and not (folder / "checkpoint" / "000003").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert child.poll() is None, "it ended before it could be killed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    same_run(whole, resume(folder, workers=workers))
    for _ in range(100):
        if not alive(child.pid):
            break
        os.sched_yield()
    assert not alive(child.pid)


def alive(session: int) -> bool:
    """Whether any process of the session lives."""
    out = subprocess.run(["ps", "-o", "stat=", "-s", str(session)], capture_output=True, text=True, check=False).stdout
    return any(line.strip() and not line.startswith("Z") for line in out.splitlines())


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def of_last(folder: Path, name: str) -> Path:
    return max((folder / "checkpoint").iterdir()) / name


def newest_memory(folder: Path) -> Path:
    return max((folder / "clients").glob("*/*"), key=lambda p: int(p.name.split(".")[1]))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "state": (lambda f: flip(of_last(f, "state.safetensors")), "state.safetensors is damaged"),
    "no state": (lambda f: of_last(f, "state.safetensors").unlink(), "state.safetensors cannot be read"),
    "manifest": (lambda f: flip(of_last(f, "manifest.json")), "manifest.json is damaged"),
    "empty": (lambda f: of_last(f, "manifest.json").write_text(""), "manifest.json is damaged"),
    "memory": (lambda f: flip(newest_memory(f)), "is damaged"),
    "no memory": (lambda f: newest_memory(f).unlink(), "cannot be read"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(experiment("pfedgate", "fraction=1"), out=tmp_path / "whole")
    interrupted("pfedgate", tmp_path / "cut", 4, "fraction=1")
    damage, reason = DAMAGE[what]
    damage(tmp_path / "cut")
    with caplog.at_level(logging.WARNING, logger="fedsparse"):
        same_run(whole, resume(tmp_path / "cut"))
    assert "checkpoint 000003 is not usable: " in caplog.text and reason in caplog.text


def test_nothing_whole_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    interrupted("fedavg", folder, 4)
    for path in (folder / "checkpoint").iterdir():
        flip(path / "manifest.json")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="has no checkpoint to go on from; start the run anew"):
        resume(folder)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_shortened_history_falls_back_to_what_it_covers(tmp_path: Path) -> None:
    whole = run(experiment("fedavg"), out=tmp_path / "whole")
    interrupted("fedavg", tmp_path / "cut", 4)
    path = tmp_path / "cut" / "rounds.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    same_run(whole, resume(tmp_path / "cut"))


def test_two_checkpoints_are_kept_and_no_other_memories(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    interrupted("pfedgate", folder, 4)
    assert sorted(p.name for p in (folder / "checkpoint").iterdir()) == ["000002", "000003"]
    named = set()
    for path in (folder / "checkpoint").iterdir():
        named |= {m[1] for m in json.loads(json.loads((path / "manifest.json").read_text())["content"])["memories"]}
    assert {str(p.relative_to(folder / "clients")) for p in (folder / "clients").glob("*/*")} == named


def test_what_is_no_interrupted_run_is_refused(tmp_path: Path) -> None:
    done = run(experiment("fedavg", "rounds=1"), out=tmp_path / "done")
    with pytest.raises(UserError, match="is complete"):
        resume(done.directory)
    with pytest.raises(UserError, match="is no run folder"):
        resume(tmp_path)
    interrupted("fedavg", tmp_path / "never", 2, "engine.checkpoint_every=0")
    assert not (tmp_path / "never" / "checkpoint").exists()
    with pytest.raises(UserError, match="has no checkpoint to go on from"):
        resume(tmp_path / "never")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_disk_stops_with_a_clear_line_and_loses_nothing(tmp_path: Path) -> None:
    whole = run(experiment("pfedgate", "rounds=8"), out=tmp_path / "whole")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", small], check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here, although we are root (a container?)")
    try:
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            run(experiment("pfedgate", "rounds=8"), out=small / "run")
        assert not (small / "run" / "summary.json").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        same_run(whole, resume(small / "run"))
    finally:
        subprocess.run(["umount", small], check=True)


# --- states as trees -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    at: torch.Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    by_id: dict[int, torch.Tensor]
    parts: tuple[Inner, ...]
    number: float
    nothing: None = None


def test_states_come_back_as_they_were() -> None:
    inner = Inner(torch.arange(3), ("a", "b"))
    value = Outer(inner, {5: torch.ones(2), -1: torch.tensor(True)}, (inner, inner), 0.1)
    tree, tensors = packed(value)
    back = unpacked(json.loads(json.dumps(tree)), tensors)
    assert isinstance(back, Outer) and isinstance(back.parts[1], Inner)
    assert list(back.by_id) == [5, -1] and torch.equal(back.by_id[5], torch.ones(2))
    assert back.number == 0.1 and back.inner.names == ("a", "b") and back.nothing is None


def test_what_a_checkpoint_cannot_keep_is_named() -> None:
    with pytest.raises(UserError, match=r"a checkpoint cannot keep state\.by_id\[3\], a set"):
        packed(Outer(Inner(torch.ones(1), ()), {3: {1}}, (), 1.0))  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"needs the dataclass os:system, which this version does not have"):
        unpacked({"class": "os:system", "fields": {}}, {})


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("pfedgate", ("partition.novel=0.25", "evaluate.every=2")),
        ("pfedgate", ("method.schedule=plateau", "method.patience=1", "budget.on_over_budget=record")),
        ("fedavg", ("evaluate.every=3", "evaluate.fraction=0.5", "engine.memory_mb=1")),
    ],
    ids=["novel clients", "plateau", "few evaluations"],
)
def test_what_else_a_run_has_is_the_same_too(method: str, more: tuple[str, ...], tmp_path: Path) -> None:
    plain = [s for s in SETTINGS.get(method, []) if "plateau" not in str(more) or "download" not in s]
    made = from_dict({}, [f"method={method}", *BASE, "rounds=6", *plain, *more])
    whole = run(made, out=tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        run(made, out=tmp_path / "cut", on_round=stop_after(4))
    again = resume(tmp_path / "cut")
    same_run(whole, again)
    assert again.summary["novel"] == whole.summary["novel"]


def in_a_child(work: Callable[[], object]) -> int:
    """Do it in a forked process, which starts at once; its exit code, 1 for an exception."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_at(what: str, at: int, made: Experiment, folder: Path) -> None:
    """A run whose process ends at the so-manieth call of that function of ``os``."""
    plain, seen = getattr(os, what), list[int]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == at:
            os._exit(9)
        return plain(*args, **kwargs)

    setattr(os, what, counted)
    run(made, out=folder)


@pytest.mark.parametrize("what", ["replace", "rename", "fsync", "unlink"])
def test_death_between_any_two_writes_loses_nothing(what: str, tmp_path: Path) -> None:
    """The process ends at the k-th rename, flush or deletion; whatever checkpoint there is leads to the same end."""
    made = experiment("pfedgate", "engine.memory_mb=1")
    whole = run(made, out=tmp_path / "whole")
    deaths = 0
    for at in (2, 7, 13, 26):
        folder = tmp_path / f"{what}{at}"
        code = in_a_child(partial(dying_at, what, at, made, folder))
        assert code in (0, 9)
        deaths += code == 9
        if (folder / "summary.json").exists():
            assert json.loads((folder / "summary.json").read_text())["digest"] == whole.summary["digest"]
        elif list((folder / "checkpoint").glob("[0-9]*")):
            same_run(whole, resume(folder))
        else:  # it died before the first one was there
            with pytest.raises(UserError, match="no checkpoint to go on from|is no run folder"):
                resume(folder)
    assert deaths


def test_a_run_at_work_is_left_alone(tmp_path: Path) -> None:
    refused: list[int] = []

    def another() -> None:
        with pytest.raises(UserError, match="another process is at work on the run"):
            resume(tmp_path / "run")

    done = run(
        experiment("fedavg", "rounds=2"), out=tmp_path / "run", on_round=lambda _: refused.append(in_a_child(another))
    )
    assert refused == [0, 0]
    assert not (done.directory / ".lock").exists()


def test_states_that_would_not_come_back_are_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "from dataclasses import dataclass, field\n"
        "from fedsparse.strategy import AveragingStrategy, State\n"
        "@dataclass(frozen=True)\n"
        "class OddState(State):\n"
        "    seen: int = field(default=0, init=False)\n"
        "@dataclass\n"
        "class Odd(AveragingStrategy):\n"
        "    client = 'fedavg'\n"
        "    def init(self, task, devices):\n"
        "        return OddState(task.init_params())\n"
    )
    made = from_dict({}, [f"method={tmp_path / 'odd.py'}", *BASE])
    with pytest.raises(UserError, match=r"a checkpoint cannot keep state\.seen: it is no argument of OddState"):
        run(made, out=tmp_path / "run")
    assert run(made.with_overrides(["engine.checkpoint_every=0"]), out=tmp_path / "other").summary["digest"]


def test_the_scripts_of_tables_go_on_with_what_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(personal, "UNFINISHED", tmp_path)
    name, settings = "digits_pfedgate", ["rounds=3", "partition.max_clients=2", "engine.checkpoint_every=1"]
    whole = personal.one_run(name, settings)[0]["digest"]
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(personal, "run", lambda made, out: run(made, out=out, on_round=stop_after(3)))
    with pytest.raises(InterruptedRunError):
        personal.one_run(name, settings)
    monkeypatch.setattr(personal, "run", None)  # what is left is resumed
    assert personal.one_run(name, settings)[0]["digest"] == whole
    assert not list(tmp_path.iterdir())
