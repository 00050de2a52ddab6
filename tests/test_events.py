"""The log of a run: what is in it, that it outlives kills and full disks, and that each warning is said once."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clients.fedavg import FedAvgClient
from fedsparse.errors import ClientError, UserError
from fedsparse.events import EVENTS, Events, leave, read_events
from fedsparse.experiment import Experiment, from_dict
from fedsparse.report import progress
from fedsparse.runner import resume, run

BASE = ["dataset=digits", "method=fedavg", "partition.max_clients=4", "rounds=3", "engine.checkpoint_every=2"]
LOGGER = logging.getLogger("fedsparse")


def experiment(*more: str) -> Experiment:
    return from_dict({}, [*BASE, *more])


def names(folder: Path) -> list[str]:
    return [event["event"] for event in read_events(folder / EVENTS)]


def of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / EVENTS) if event["event"] == name]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Events]:
    with Events() as events:
        events.open(path, time.perf_counter())
        yield events


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_tells_what_happens_in_order(tmp_path: Path) -> None:
    done = run(experiment(), out=tmp_path / "run")
    assert names(tmp_path / "run") == ["run_started", "round", "round", "checkpoint", "round", "run_finished"]
    events = read_events(tmp_path / "run" / EVENTS)
    times = [event["seconds"] for event in events]
    assert times == sorted(times) and times[0] >= 0 and times[-1] >= done.summary["seconds"]["wall"] - 0.01
    assert abs(datetime.fromisoformat(events[-1]["utc"]).timestamp() - time.time()) < 60
    for event, line in zip(of(tmp_path / "run", "round"), done.rounds, strict=True):
        assert event["bytes"] == sum(line["bytes"].values())
        assert (event["round"], event["loss"]) == (line["round"], line["loss"])
        assert event["accuracy"] == line["accuracy"]["personal"]
    assert events[-1]["digest"] == done.summary["digest"]


def test_a_round_has_one_short_line_whatever_the_number_of_clients(tmp_path: Path) -> None:
    sizes = []
    for clients in (2, 40):
        folder = tmp_path / str(clients)
        run(experiment(f"partition.max_clients={clients}", "rounds=1"), out=folder)
        sizes.append(len((folder / EVENTS).read_bytes().splitlines()))
        assert max(map(len, (folder / EVENTS).read_bytes().splitlines())) < 400
    assert sizes[0] == sizes[1]


def test_an_interrupted_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    whole = run(experiment(), out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(experiment(), out=tmp_path / "cut", on_round=_interrupt_after(3))
    before = (tmp_path / "cut" / EVENTS).read_bytes()
    with (tmp_path / "cut" / EVENTS).open("ab") as file:
        file.write(b'{"seconds": 9.1, "utc": "2')  # as a crash in the middle of a line would leave it
    assert names(tmp_path / "cut")[-1] == "run_interrupted"
    again = resume(tmp_path / "cut")
    assert again.summary["digest"] == whole.summary["digest"]
    assert (tmp_path / "cut" / EVENTS).read_bytes().startswith(before)  # nothing is cut back to the checkpoint
    assert names(tmp_path / "cut")[-3:] == ["run_resumed", "round", "run_finished"]
    assert of(tmp_path / "cut", "run_resumed")[0]["round"] == 2


def test_a_checkpoint_that_is_not_usable_is_an_event(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(experiment("engine.checkpoint_every=1"), out=tmp_path / "cut", on_round=_interrupt_after(3))
    (tmp_path / "cut" / "checkpoint" / "000002" / "manifest.json").write_text("")
    resume(tmp_path / "cut")
    (warning,) = of(tmp_path / "cut", "warning")
    assert warning["text"] == "checkpoint 000002 is not usable: manifest.json is damaged"
    assert warning["logger"] == "fedsparse"


def _interrupt_after(reports: int) -> Callable[[dict[str, Any]], None]:
    def on_round(report: dict[str, Any]) -> None:
        if report["round"] == reports:
            raise KeyboardInterrupt

    return on_round


class Raising(FedAvgClient):
    """Client 2 raises in round 2, or warns, as all do."""

    def train(self, task: Any, client: Any, packet: Any, memory: Any, rng: Any) -> Any:
        if HOW == "raise" and client.id in (1, 2):
            raise RuntimeError("out\nof luck")
        if HOW == "die" and client.id == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if HOW == "warn":
            LOGGER.warning("client %d has only %d examples", client.id, len(client.train))
            warnings.warn(f"client {client.id} is slow: {0.5 * client.id} s", RuntimeWarning, stacklevel=1)
        return super().train(task, client, packet, memory, rng)


HOW = ""


@pytest.fixture
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.HOW", request.param)


@pytest.mark.parametrize("how", ["raise"], indirect=True)
@pytest.mark.usefixtures("how")
def test_clients_that_fail_are_events(tmp_path: Path) -> None:
    made = experiment(f"client={__name__}:Raising", "rounds=1")
    with pytest.raises(ClientError):
        run(made, out=tmp_path / "stop")
    assert names(tmp_path / "stop") == ["run_started", "run_failed"]
    why = "client 1, round 1, stage train: RuntimeError: out of luck"
    assert of(tmp_path / "stop", "run_failed")[0]["error"] == why
    run(made.with_overrides(["engine.on_client_error=skip"]), out=tmp_path / "skip")
    failed = of(tmp_path / "skip", "client_error")
    assert [event["error"].split(",")[0] for event in failed] == ["client 1", "client 2"]
    assert of(tmp_path / "skip", "round")[0]["failures"] == 2


@pytest.mark.parametrize("how", ["die"], indirect=True)
@pytest.mark.usefixtures("how")
def test_a_lost_worker_is_an_event(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="died"):
        run(experiment(f"client={__name__}:Raising", "engine.workers=2"), out=tmp_path / "run")
    (lost,) = of(tmp_path / "run", "worker_lost")
    assert lost["exit_code"] == -signal.SIGKILL and lost["workers"] == 2
    assert names(tmp_path / "run")[-1] == "run_failed"


def test_clients_over_their_budgets_are_an_event(tmp_path: Path) -> None:
    run(
        experiment("budget.tiers=[0.5]", "budget.on_over_budget=record", "rounds=1"),
        out=tmp_path / "run",
    )
    (over,) = of(tmp_path / "run", "over_budget")
    assert (over["round"], over["clients"], over["first"]) == (1, 4, [0, 1, 2, 3])


# --- warnings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["warn"], indirect=True)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("how")
def test_a_warning_of_every_client_is_said_once_and_counted(
    workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = experiment(f"client={__name__}:Raising", f"engine.workers={workers}")
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        run(made, out=tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([text for text in said if text.startswith("client") and text.endswith("examples")]) == 1
    slow = [str(w.message) for w in shown] + [text for text in said if text.startswith("RuntimeWarning")]
    assert len(slow) == 1 and "is slow" in slow[0]
    assert len([text for text in said if text.startswith("11 more like this: ")]) == 2
    assert {event["logger"]: event["count"] for event in of(tmp_path / "run", "warnings")} == {
        "fedsparse": 12,  # 4 clients, 3 rounds
        "py.warnings": 12,
    }
    assert {event["logger"] for event in of(tmp_path / "run", "warning")} == {"fedsparse", "py.warnings"}
    assert names(tmp_path / "run").count("warning") == 2


def test_warnings_of_other_kinds_are_not_merged_and_notes_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedsparse")
    with opened(tmp_path / EVENTS):
        for text in ("a 1", "b 1", "a 2", "a 3.5e-3"):
            LOGGER.warning(text)
            LOGGER.info("note %s", text)
    said = [record.getMessage() for record in caplog.records if not record.getMessage().startswith("note")]
    assert said == ["a 1", "b 1", "2 more like this: a 1"]
    assert sum(record.getMessage().startswith("note") for record in caplog.records) == 4


def test_filters_of_the_user_hold(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        with opened(tmp_path / EVENTS):
            with pytest.raises(UserWarning, match="no"):
                warnings.warn("no", UserWarning, stacklevel=1)
            warnings.warn("never mind", RuntimeWarning, stacklevel=1)
    assert names(tmp_path) == []


def test_afterwards_all_is_as_it_was(tmp_path: Path) -> None:
    before = warnings.showwarning, list(warnings.filters), list(LOGGER.filters), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(ZeroDivisionError, match="by zero"), opened(tmp_path / EVENTS) as events:
        events(f"something{1 / 0}")
    after = warnings.showwarning, list(warnings.filters), list(LOGGER.filters), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert before == after
    assert read_events(tmp_path / EVENTS)[-1]["error"] == "ZeroDivisionError: division by zero"


def test_very_many_kinds_of_warnings_take_bounded_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path / EVENTS):
        for i in range(2000):
            LOGGER.warning("%s of client", "x" * i)
    assert len(caplog.records) == 1000 + 2  # the first of all others, and their number
    assert caplog.records[-1].getMessage() == "999 more like this: warnings of other kinds"
    assert (tmp_path / EVENTS).stat().st_size < 1000 * 700


def test_a_worker_that_warns_without_end_neither_blocks_nor_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path / EVENTS):
        child = os.fork()
        if not child:
            for i in range(5_000):
                LOGGER.warning("example %d of %s", i, "\x01" * 1000)
            leave()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert read_events(tmp_path / EVENTS)[-1]["count"] == 5_000
    assert len(caplog.records) == 2


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_file_that_is_full_has_whole_lines_alone(tmp_path: Path) -> None:
    """A limit on the size of files: the write that crosses it is cut short, as by a full disk."""
    path, soft = tmp_path / EVENTS, resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(path) as events:
        events("first")
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, soft[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                events("second")
            events_after = path.read_bytes()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        events("third")
    assert events_after.endswith(b"\n")
    assert [event["event"] for event in read_events(path)] == ["first", "third"]


def test_a_damaged_line_is_named_and_a_torn_last_one_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / EVENTS
    path.write_text('{"event": "a"}\n{"event": ')
    assert read_events(path) == [{"event": "a"}]
    for bad in ("nonsense", "[1]", '{"seconds": 1}'):
        path.write_text(f'{{"event": "a"}}\n{bad}\n{{"event": "b"}}\n')
        with pytest.raises(UserError, match="line 2, is no event"):
            read_events(path)
    path.write_text("")
    assert read_events(path) == []


def test_long_texts_are_cut(tmp_path: Path) -> None:
    with pytest.raises(UserError), opened(tmp_path / EVENTS):
        raise UserError("word\n" * 10_000)
    (line,) = (tmp_path / EVENTS).read_text().splitlines()
    assert len(line) < 2200 and json.loads(line)["error"].endswith("...")


# --- the terminal ----------------------------------------------------------------------------------------------------


def test_the_bar_is_one_line_of_eighty_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    bar = progress._new_bar(2000)
    bar.stop()
    text = f"accuracy 0.912  sent {'1.23 MB':>7}  {'1:02:05':>8} left"
    bar.update(bar.task_ids[0], completed=1999, text=text)
    console = Console(width=80, force_terminal=False, color_system=None)
    lines = ["".join(s.text for s in line).rstrip() for line in console.render_lines(bar.get_renderable())]
    assert len(lines) == 1 and lines[0].endswith("1:02:05 left")
