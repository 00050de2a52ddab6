"""Seeded faults against real runs: each ends with the right digest, or stops with one clear line and goes on to it.

``experiments/faults.py`` plays as many schedules as one likes; here are some, and that it notices what it looks for.
"""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from experiments import faults
from fedsparse.errors import UserError
from fedsparse.runner import Run, run

METHODS = ("fedavg", "pfedgate")
SEEDS = (0, 1, 2, 4, 5, 6, 7, 9, 15, 26)  # each kind but delays, at least once


@pytest.fixture(scope="module")
def playing(tmp_path_factory: pytest.TempPathFactory) -> faults.Faults:
    return faults.Faults(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda s: str(faults.schedule(s, METHODS).kind).replace(" ", "-") + f"-{s}")
def test_a_fault_costs_no_more_than_a_resume(seed: int, playing: faults.Faults) -> None:
    plan = faults.schedule(seed, METHODS)
    if plan.how == "small disk" and not faults.can_mount():
        pytest.skip("only root may mount a small disk, and not in every container")
    outcome = playing.play(plan)
    assert not outcome.complaints
    assert outcome.right


def test_the_schedules_have_every_fault_and_setting() -> None:
    plans = [faults.schedule(seed) for seed in range(400)]
    assert {(p.kind, p.how) for p in plans} == {(kind, how) for kind, hows in faults.KINDS.items() for how in hows}
    assert {p.method for p in plans} == set(faults.METHODS)
    assert {p.workers for p in plans} == {1, 2}
    assert faults.schedule(17) == faults.schedule(17)


# --- what it looks for it finds --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = faults.schedule(3, ["fedavg"])
    return run(plan.experiment, out=tmp_path_factory.mktemp("done") / "run")


def test_a_process_that_is_left_is_found_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "orphans", partial(faults.orphans, patience=0.2))

    def leaves_one() -> None:
        if not os.fork():
            time.sleep(600)
            os._exit(0)

    found = faults.attempt(leaves_one, tmp_path / "log")
    assert found.code == 0 and len(found.orphans) == 1
    assert faults.orphans(os.getsid(0)) != []
    deadline = time.monotonic() + 10
    while any(pid == found.orphans[0] for pid, _ in faults._processes()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    assert faults.attempt(lambda: time.sleep(600), tmp_path / "log", limit=0.3).code is None


def test_how_a_process_ended_is_told(tmp_path: Path) -> None:
    def fails() -> None:
        raise UserError("one line")

    def breaks() -> None:
        raise KeyError("no line")

    assert faults.attempt(fails, tmp_path / "a").code == faults.STOPPED
    assert (tmp_path / "a").read_text() == "error: one line\n"
    broken = faults.attempt(breaks, tmp_path / "b")
    assert broken.code == faults.BROKEN and "Traceback" in broken.said
    assert faults.attempt(lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path / "c").code == faults.DEAD


@pytest.mark.parametrize("name", ["final.safetensors", "clients.parquet", "rounds.jsonl", "report.html"])
def test_a_summary_without_the_rest_is_found(name: str, done: Run) -> None:
    digest, path = done.summary["digest"], done.directory / name
    assert faults.damage(done.directory, digest) == []
    whole = path.read_bytes()
    for cut in (whole[: len(whole) // 2], whole[:-1] if name != "rounds.jsonl" else b""):
        path.write_bytes(cut)
        assert faults.damage(done.directory, digest)
    path.write_bytes(whole)
    assert faults.damage(done.directory, "another")


def test_a_checkpoint_that_is_not_whole_is_found(tmp_path: Path) -> None:
    plan = faults.schedule(3, ["fedavg"])

    def stop(report: dict[str, object]) -> None:
        if report["round"] == plan.rounds:
            raise InterruptedError(4, "stop")

    with pytest.raises(InterruptedError):
        run(plan.experiment, out=tmp_path / "run", on_round=stop)
    assert faults.damage(tmp_path / "run", "") == []
    newest = max((tmp_path / "run" / "checkpoint").iterdir())
    (newest / "state.safetensors").unlink()
    (found,) = faults.damage(tmp_path / "run", "")
    assert found.startswith(f"checkpoint {newest.name}: state.safetensors cannot be read")


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (faults.STOPPED, "error: a\n", ""),
        (faults.STOPPED, "error: a\nerror: b\n", "not one clear line"),
        (faults.STOPPED, "Traceback\nerror: a\n", "not one clear line"),
        (faults.BROKEN, "KeyError: 'a'", "exit code 3"),
        (faults.DEAD, "", "exit code -9"),
        (None, "", "it hung"),
        (0, "", "it ended without a summary"),
    ],
)
def test_an_attempt_is_judged(code: int | None, said: str, wrong: str, tmp_path: Path) -> None:
    outcome = faults.Outcome(faults.schedule(2))
    faults.judge(outcome, faults.Attempt(code, said, 1.0), tmp_path, "", noticed=False)
    assert [c[: len(wrong)] for c in outcome.complaints] == ([wrong] if wrong else [])
    assert not outcome.right


def test_a_fault_that_nobody_notices_is_found(done: Run) -> None:
    plan = faults.schedule(4)
    assert plan.kind == "truncate" and not plan.skip
    outcome = faults.Outcome(plan)
    faults.judge(outcome, faults.Attempt(0, "", 1.0), done.directory, done.summary["digest"], noticed=True)
    assert outcome.complaints == ["nobody noticed"]


def test_the_table_counts(done: Run) -> None:
    outcomes = [faults.Outcome(faults.schedule(seed), struck=seed > 3, right=True) for seed in range(16)]
    lines = faults.table(outcomes).splitlines()
    assert len(lines) == 2 + len(faults.KINDS)
    assert lines[-1].split() == ["all", "16", "12", "0", "0", "0", "0", "16", "0"]
