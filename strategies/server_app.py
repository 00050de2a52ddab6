"""The server of ``flwr run``: an experiment over Flower's grid, written as a run folder like any other."""

from __future__ import annotations

import logging
import shlex
from functools import partial
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsparse.engine.flower import FlowerGrid
from fedsparse.experiment import load_experiment
from fedsparse.runner import run

_ENGINE = ("engine.kind=flower", "engine.workers=1", "engine.address=", "engine.checkpoint_every=0")
_log = logging.getLogger("flwr")  # whose lines `flwr run --stream` shows

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names."""
    _show_notes()
    config = context.run_config
    experiment = load_experiment(str(config["experiment"]), [*shlex.split(str(config["set"])), *_ENGINE])
    for note in experiment.notes:
        _log.info("note: %s", note)
    on_flower = partial(FlowerGrid, grid, wait=float(config["wait"]))
    done = run(experiment, out=str(config["out"]) or None, on_round=_show, on_flower=on_flower)
    _log.info("digest %s, run folder: %s", done.summary["digest"], done.directory)


def _show(report: dict[str, Any]) -> None:
    accuracy = (report["accuracy"] or {}).get("personal")
    scored = "" if accuracy is None else f", personal accuracy {accuracy:.4f}"
    _log.info("round %d of %d, %s%s", report["round"], report["rounds"], report["stage"], scored)


def _show_notes() -> None:
    """The library's own lines go where Flower's go."""
    ours = logging.getLogger("fedsparse")
    ours.handlers, ours.propagate = _log.handlers, False
    ours.setLevel(logging.INFO)
