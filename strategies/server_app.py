"""The server of ``flwr run``: an experiment over Flower's grid, written as a run folder like any other."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from functools import partial
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsparse.engine.flower import FlowerGrid
from fedsparse.errors import UserError
from fedsparse.experiment import load_experiment
from fedsparse.runner import OnFlower, Run, resume, run

_DEFAULT = "digits_pfedgate"
_ENGINE = ("engine.kind=flower", "engine.workers=1", "engine.address=")
_log = logging.getLogger("flwr")  # whose lines `flwr run --stream` shows

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names, or go on with the run in a folder."""
    _show_notes()
    config = context.run_config
    words = {name: str(config[name]) for name in ("experiment", "set", "out", "resume")}
    done = _run(words, partial(FlowerGrid, grid, wait=float(config["wait"])))
    _log.info("digest %s, run folder: %s", done.summary["digest"], done.directory)


def _run(words: Mapping[str, str], on_flower: OnFlower) -> Run:
    """What the words of the run config ask for."""
    if folder := words["resume"]:
        for name in ("experiment", "set", "out"):
            if words[name]:
                raise UserError(
                    f"resume={folder!r} goes on with a run as it was begun: leave {name}={words[name]!r} out"
                )
        return resume(folder, engine="flower", on_round=_show, on_flower=on_flower)
    experiment = load_experiment(words["experiment"] or _DEFAULT, [*shlex.split(words["set"]), *_ENGINE])
    for note in experiment.notes:
        _log.info("note: %s", note)
    return run(experiment, out=words["out"] or None, on_round=_show, on_flower=on_flower)


def _show(report: dict[str, Any]) -> None:
    accuracy = (report["accuracy"] or {}).get("personal")
    scored = "" if accuracy is None else f", personal accuracy {accuracy:.4f}"
    _log.info("round %d of %d, %s%s", report["round"], report["rounds"], report["stage"], scored)


def _show_notes() -> None:
    """The library's own lines go where Flower's go."""
    ours = logging.getLogger("fedsparse")
    ours.handlers, ours.propagate = _log.handlers, False
    ours.setLevel(logging.INFO)
