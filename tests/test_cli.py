"""The command line: what it prints, how fast it starts, and one line and an exit code for every error of a user."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsparse.cli import main
from fedsparse.experiment import Experiment, load_experiment
from fedsparse.report import tables, units
from fedsparse.report.progress import LiveProgress

START = [sys.executable, "-c", "from fedsparse.cli import main; main()"]
HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # jobs in the background do not
HEEDING = [*START[:-1], f"{HEED}; {START[-1]}"]
QUICK = ["--method", "fedavg", "--rounds", "2", "--set", "partition.clients=4"]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Calls the command line in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedsparse", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            main()
        return (caught.value.code, *capsys.readouterr())  # type: ignore[return-value]

    return call


def _assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


# --- what it does ------------------------------------------------------------------------------------------------


def test_help_imports_neither_torch_nor_flower() -> None:
    code = (
        "import sys, fedsparse.cli; print(*[m for m in ('torch', 'flwr', 'numpy', 'rich.console') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
    done = subprocess.run([*START, "--help"], capture_output=True, text=True, check=True)
    assert "compare" in done.stdout


def test_run_prints_the_tiers_and_compare_puts_runs_side_by_side(cli: Cli) -> None:
    code, out, err = cli("run", *QUICK, "--out", "a")
    assert (code, "round 2/2" in err, "run folder: a" in out) == (0, True, True)
    assert cli("run", *QUICK, "--out", "b", "--quiet", "--seed", "1") == (0, "", "")
    code, out, err = cli("compare", "a", "b")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[3:6] if line] == ["a", "b"]
    assert max(map(len, out.splitlines())) <= 100
    assert err == "warning: the runs differ in seed (0, 1): their figures do not compare\n"
    assert cli("compare", "a", "--csv", "table.csv") == (0, "", "")
    row = next(csv.DictReader(io.StringIO(Path("table.csv").read_text())))
    summary = json.loads(Path("a/summary.json").read_text())
    assert float(row["personal"]) == summary["accuracy"]["personal"]["mean"]
    assert (row["method"], row["clients"], row["budget_density"]) == ("fedavg", "4", "none")


def test_json_prints_the_summary_alone_and_config_toml_repeats_the_run(cli: Cli) -> None:
    code, out, err = cli("run", *QUICK, "--out", "a", "--json", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(Path("a/summary.json").read_text())
    _, again, _ = cli("run", "a/config.toml", "--out", "b", "--json", "--quiet")
    assert json.loads(again)["digest"] == json.loads(out)["digest"]


def test_run_folders_do_not_collide_without_out(cli: Cli) -> None:
    for _ in range(2):
        assert cli("run", *QUICK, "--quiet")[0] == 0
    assert len(list(Path("runs").iterdir())) == 2


def test_a_note_says_which_hyper_parameters_were_left_out(cli: Cli) -> None:
    Path("x.toml").write_text('rounds = 1\n[partition]\nclients = 3\n[method]\nname = "fedprox"\nmu = 0.1\n')
    _, _, err = cli("run", "x.toml", "--method", "fedavg")
    assert "note: fedavg has no mu: left out of what was set for fedprox" in err


@pytest.mark.parametrize(
    ("kind", "name"),
    [("methods", "fedavg"), ("models", "mlp"), ("datasets", "digits"), ("experiments", "digits_pfedgate")],
)
def test_list_names_what_is_there(kind: str, name: str, cli: Cli) -> None:
    code, out, _ = cli("list", kind)
    assert code == 0
    assert name in out.splitlines()


def test_help_and_version(cli: Cli) -> None:
    assert cli("--version") == (0, "fedsparse 0.1.0\n", "")
    code, out, _ = cli()
    assert (code, "Usage: fedsparse" in out) == (0, True)


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--set", "rouns=3"], ["'rouns'", "did you mean 'rounds'"]),
        (["--set", "method.lrr=3"], ["'lrr'", "did you mean 'lr'"]),
        (["--method", "fedvag"], ["method 'fedvag'", "did you mean 'fedavg'"]),
        (["--method", "nowhere/mine.py"], ["'nowhere/mine.py'", "does not exist"]),
        (["--method", "no_such_module:Mine"], ["'no_such_module'"]),
        (["--model", "resnet"], ["model 'resnet'", "did you mean 'resnet18'"]),
        (["--model", "nowhere/net.py:build"], ["model file 'nowhere/net.py'", "does not exist"]),
        (["--dataset", "digit"], ["'digit'", "did you mean 'digits'"]),
        (["--dataset", "nowhere.npz"], ["nowhere.npz"]),
        (["nowhere.toml"], ["experiment file 'nowhere.toml'"]),
        (["--set", "budget.tiers=[0]"], ["budget.tiers", "(0, 1]", "got 0"]),
        (["--set", "budget.tiers=[1.5]"], ["budget.tiers", "(0, 1]", "got 1.5"]),
        (["--set", "partition.clients=5000"], ["5000", "1797"]),
        (["--rounds", "0"], ["rounds", "got 0"]),
        (["--rounds", "many"], ["--rounds", "'many'"]),
        (["--colour"], ["--colour"]),
        (["--method", "pfedgate", "--set", "budget.tiers=[0.0001]"], ["budget", "0.0001"]),
        (["--set", "budget.table=nowhere.csv"], ["budget.table 'nowhere.csv'", "No such file"]),
        (["--set", "partition.novel=0.5", "--set", "partition.clients=1"], ["partition.novel", "0.5", "one client"]),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing_behind(args: list[str], words: list[str], cli: Cli) -> None:
    method = [] if "--method" in args else ["--method", "fedavg"]
    _assert_one_line(cli("run", *args, *method, "--out", "out"), *words)
    assert not Path("out").exists()


def test_a_dense_method_over_its_budget_is_stopped(cli: Cli) -> None:
    _, out, err = cli("run", *QUICK, "--set", "budget.tiers=[0.5]", "--out", "a", "--quiet")
    _assert_one_line((2, out, err), "budget 0.5")
    _assert_one_line(cli("compare", "a"), "'a'", "unfinished")


def test_an_output_folder_that_exists_is_left_alone(cli: Cli) -> None:
    Path("a").mkdir()
    _assert_one_line(cli("run", *QUICK, "--out", "a"), "'a'", "exists")
    assert not list(Path("a").iterdir())


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_named(place: str, cli: Cli) -> None:
    Path("file").touch()
    _assert_one_line(cli("run", *QUICK, "--out", place), f"'{place}'")


def test_debug_adds_the_traceback(cli: Cli) -> None:
    code, _, err = cli("run", "--set", "rounds=0", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.endswith("error: rounds must be at least 1, got 0\n")


@pytest.mark.parametrize("kind", ["absent", "empty", "unfinished", "broken"])
def test_compare_refuses_what_is_no_finished_run(kind: str, cli: Cli) -> None:
    folder = Path("a")
    if kind != "absent":
        folder.mkdir()
    if kind in ("unfinished", "broken"):
        (folder / "config.toml").touch()
    if kind == "broken":
        (folder / "summary.json").write_text("{")
    message = {"absent": "no run folder", "empty": "is no run folder", "broken": "cannot be read"}
    _assert_one_line(cli("compare", "a"), "'a'", message.get(kind, "unfinished"))


def test_compare_names_a_file_that_it_cannot_write_and_list_a_kind_that_it_has_not(cli: Cli) -> None:
    cli("run", *QUICK, "--out", "a", "--quiet")
    _assert_one_line(cli("compare", "a", "--csv", "no/where.csv"), "'no/where.csv'")
    _assert_one_line(cli("list", "method"), "did you mean 'methods'")


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_with_one_line_and_no_result(workers: int, tmp_path: Path) -> None:
    args = ["run", *QUICK, "--rounds", "100000", "--workers", str(workers), "--quiet", "--out", "a"]
    running = subprocess.Popen(
        [*HEEDING, *args], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "a" / "rounds.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to every process of the command
        _, err = running.communicate(timeout=20)
    finally:
        running.kill()
    assert (running.returncode, err) == (130, "error: interrupted\n")
    assert not (tmp_path / "a" / "summary.json").exists()


# --- tables ------------------------------------------------------------------------------------------------------


def _summary(**changes: Any) -> dict[str, Any]:
    tier = {
        "density_budget": 0.5,
        "clients": 1,
        "accuracy": {"personal": {"mean": 0.5, "bottom_decile": 0.25}, "global": None},
    }
    return {"method": "m", "tiers": [tier, {**tier, "density_budget": None, "clients": 3}], "clients": 4, **changes}


def test_what_a_run_does_not_know_is_a_dash_in_text_and_empty_in_csv() -> None:
    rows = tables.tier_rows(_summary())
    lines = tables.text_table(rows).splitlines()
    assert lines[3].split() == ["m", "0.5", "1", "0.500", "0.250", "-", "-", "-", "-", "-", "-"]
    assert [line.split()[1] for line in lines[3:6]] == ["0.5", "none", "all"]
    read = list(csv.DictReader(io.StringIO(tables.csv_table(rows))))
    assert (read[0]["personal"], read[0]["global"], read[1]["budget_density"]) == ("0.5", "", "none")


def test_the_row_of_all_clients_weighs_the_tiers_time_by_clients() -> None:
    tiers = [
        {**t, "seconds": {"train_per_client_round": s}} for t, s in zip(_summary()["tiers"], (1.0, 5.0), strict=True)
    ]
    assert tables.tier_rows(_summary(tiers=tiers))[-1]["seconds_train_per_client_round"] == (1 * 1.0 + 3 * 5.0) / 4


def test_multiply_adds_are_half_the_flops() -> None:
    tier = {**_summary()["tiers"][0], "flops": {"train_per_client_round": 10.0, "inference_per_sample": 4.0}}
    (row,) = tables.tier_rows(_summary(tiers=[tier]))
    assert row["multiply_adds_train_per_client_round"] == 5.0
    assert row["multiply_adds_inference_per_sample"] == 2.0


def test_a_long_label_keeps_the_table_within_its_width() -> None:
    text = tables.text_table(tables.tier_rows(_summary(method="mylab/" + "x" * 200 + "/mine.py")))
    assert max(map(len, text.splitlines())) <= tables.WIDTH
    assert "/mine.py" in text


def test_no_rows_are_a_header() -> None:
    assert "budget" in tables.text_table([])
    assert tables.csv_table([]) == "\n"


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        ({"dataset": "mnist"}, "dataset (digits, mnist)"),
        ({"rounds": 3}, "rounds (2, 3)"),
        ({"partition": {"alpha": 1.0}}, "partition"),
        ({"name": "other"}, ""),
    ],
)
def test_runs_that_do_not_compare_are_pointed_out(config: dict[str, Any], warning: str) -> None:
    base = {"dataset": "digits", "rounds": 2, "seed": 0, "partition": {"alpha": 0.5}}
    runs = [tables.RunRecord(Path(), _summary(), base), tables.RunRecord(Path(), _summary(), {**base, **config})]
    assert warning in tables.differences(runs)
    assert bool(warning) == bool(tables.differences(runs))


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (units.share, None, "-"),
        (units.share, 0.12345, "0.123"),
        (units.count, 0, "0"),
        (units.count, 999, "999"),
        (units.count, 999.6, "1.00k"),
        (units.count, 12345, "12.3k"),
        (units.count, 3e20, "300000P"),
        (units.size, 950, "950 B"),
        (units.size, 1_234_567, "1.23 MB"),
        (units.size, 99_960, "100 kB"),
        (units.seconds, 0, "0 s"),
        (units.seconds, 0.0123, "12.3 ms"),
        (units.seconds, 1.25, "1.25 s"),
        (units.seconds, 185, "3:05"),
        (units.seconds, 3725, "1:02:05"),
        (units.seconds, None, "-"),
    ],
)
def test_numbers_are_shown_with_units(show: Callable[[float | None], str], value: float | None, text: str) -> None:
    assert show(value) == text


def test_progress_writes_few_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LiveProgress()
    for done in range(1, 101):
        accuracy = {"personal": done / 100} if done % 50 == 0 else None
        progress({"round": done, "rounds": 100, "bytes": {"up": 1000, "down": 500}, "accuracy": accuracy})
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("round  10/100  accuracy     -  sent 15.0 kB")
    assert lines[-1].startswith("round 100/100  accuracy 1.000  sent  150 kB")
    assert len({len(line) for line in lines}) == 1


def test_progress_is_one_bar_on_a_terminal(tmp_path: Path) -> None:
    leader, follower = os.openpty()
    command = [*START, "run", *QUICK, "--rounds", "3", "--out", "a"]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=follower)
    os.close(follower)
    written = b""
    while chunk := _read(leader):
        written += chunk
    assert running.wait(timeout=20) == 0
    assert b"round 2/3  accuracy" not in written, "a plain line beside the bar"
    assert b"3/3" in written
    os.close(leader)


def _read(terminal: int) -> bytes:
    """What came next; nothing when the other side has closed, which Linux reports as an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


RAISING = """
from dataclasses import dataclass
from fedsparse.client import SgdClient, update

@dataclass(frozen=True)
class Raising(SgdClient):
    def train(self, task, client, packet, memory, rng):
        if client.id == 1:
            raise RuntimeError("out of luck")
        return update(client, self.fit(task, client, packet.tensors, rng)), memory

    def evaluate(self, task, client, packet, memory):
        return {"personal": task.score(packet.tensors, client.held_out)}
"""


def test_a_client_that_raises_is_named_and_its_traceback_kept(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "raising.py").write_text(RAISING)
    mine = [*QUICK, "--client", "raising.py:Raising", "--quiet"]
    result = cli("run", *mine, "--out", "stopped")
    _assert_one_line(result, "client 1, round 1, stage train: RuntimeError: out of luck")
    assert "raise RuntimeError" in (tmp_path / "stopped" / "client_error.txt").read_text()
    _assert_one_line(cli("compare", "stopped"), "unfinished")
    code, out, err = cli("run", *mine, "--out", "skipped", "--set", "engine.on_client_error=skip")
    assert (code, out) == (0, "")
    assert err.startswith("warning: 2 failures of clients were skipped, the first: client 1, round 1")
    assert "raise RuntimeError" in (tmp_path / "skipped" / "client_error.txt").read_text()


TALKING = """
from dataclasses import dataclass
from fedsparse.strategy import AveragingStrategy

@dataclass
class Talking(AveragingStrategy):
    client = "fedavg"

    def notes(self, task, devices):
        return (f"{len(devices)} devices, <b>all</b> of them",)

    def diagnose(self, task, state, clients, memories):
        return {"distinct": len(clients), "memories": len(memories), "classes": state.params["output.bias"].numel()}
"""


def test_what_a_method_says_before_and_after_a_run(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "talking.py").write_text(TALKING)
    mine = ["--rounds", "1", "--set", "partition.clients=5", "--set", "partition.novel=0.4"]
    code, out, err = cli("run", "--method", "talking.py:Talking", *mine, "--out", "a")
    note = "5 devices, <b>all</b> of them"
    assert code == 0
    assert err.index(f"note: {note}") < err.index("round 1/1")  # before the training
    assert f"note: {note}" in out and "2 novel clients after 0, 1, 5, 10 epochs: " in out
    assert note in tomllib.loads(Path("a/config.toml").read_text())["resolved"]["notes"]
    summary = json.loads(Path("a/summary.json").read_text())
    assert note in summary["notes"]
    unknown = dict.fromkeys(("mean_overlap", "never_trained", "agreement"))
    assert summary["masks"] == {"distinct": 3, **unknown, "memories": 0, "classes": 10}  # of those that took part
    page = Path("a/report.html").read_text()
    assert "&lt;b&gt;all&lt;/b&gt;" in page and "distinct masks" in page
    assert cli("run", "--method", "talking.py:Talking", *mine, "--out", "b", "--quiet") == (0, "", "")


def test_a_failure_in_onboarding_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(
        RAISING.replace("client.id == 1", "False").replace(
            "    def train", "    def onboard(self, *_):\n        raise RuntimeError('alone')\n\n    def train"
        )
    )
    mine = ["--client", "alone.py:Raising", "--quiet", "--set", "partition.novel=0.25", "--seed", "1"]
    _assert_one_line(cli("run", *QUICK, *mine, "--out", "a"), "stage onboard: RuntimeError: alone")
    assert "RuntimeError: alone" in (tmp_path / "a" / "client_error.txt").read_text()
    code, out, err = cli("run", *QUICK, *mine, "--out", "b", "--set", "engine.on_client_error=skip")
    assert (code, out) == (0, "")
    assert err.startswith("warning: 1 failures of clients were skipped, the first: client ") and "alone" in err
    assert "RuntimeError: alone" in (tmp_path / "b" / "client_error.txt").read_text()


def test_an_interrupted_run_is_resumed(cli: Cli, tmp_path: Path) -> None:
    """As a user does it: Ctrl-C, the line that tells how to go on, and the same digest in the end."""
    settings = ["--set", "rounds=40", "--set", "partition.clients=3", "--set", "engine.checkpoint_every=1"]
    command = [*HEEDING, "run", "--method", "fedavg", *settings, "--out", str(tmp_path / "cut")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while child.poll() is None and not (tmp_path / "cut" / "checkpoint" / "000002").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    said = child.communicate()[1]
    assert child.returncode == 130 and "goes on from the last checkpoint" in said
    assert cli("run", "--method", "fedavg", *settings, "--out", str(tmp_path / "whole"), "--quiet")[0] == 0
    _assert_one_line(cli("resume", str(tmp_path / "cut"), "--engine", "spark"), "engine.kind", "'spark'", "local, ray")
    code, out, _ = cli("resume", str(tmp_path / "cut"), "--engine", "local", "--json")
    assert code == 0
    assert json.loads(out)["digest"] == json.loads((tmp_path / "whole" / "summary.json").read_text())["digest"]
    code, _, err = cli("resume", str(tmp_path / "cut"))
    assert code == 2 and "is complete" in err


def test_verify_compares_engines(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["--set", "rounds=2", "--set", "partition.clients=4"]
    code, out, _ = cli("verify", "digits_pfedgate", *short, "--engines", "local:1,local:2")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines[:2]] == ["local:1", "local:2"] and lines[0][1] == lines[1][1]
    assert out.endswith("the same on 2 engines\n")
    monkeypatch.setattr("fedsparse.verify.run", lambda e, **_: _Fake(e))
    monkeypatch.setattr("fedsparse.verify.load_experiment", lambda _: load_experiment("digits_pfedgate"))
    assert cli("verify", "digits_pfedgate", "--engines", "local:1,local:2")[0] == 1
    _assert_one_line(cli("verify", "digits_pfedgate", "--engines", "spark:2"), "unknown engine 'spark'")
    _assert_one_line(cli("verify", "digits_pfedgate", "--engines", "local:x"), "kind:workers", "'local:x'")


class _Fake:
    """A run whose digest depends on the engine, which no real one does."""

    def __init__(self, experiment: Experiment) -> None:
        self.summary = {"digest": f"{experiment.engine.workers}"}
