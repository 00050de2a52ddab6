"""fedsparse: federated learning in which every client trains a sparse model that fits its own budget.

    import fedsparse
    run = fedsparse.run(fedsparse.Experiment(dataset="digits", method="pfedgate"))
    print(run.summary["accuracy"]["personal"]["mean"])

Names are loaded when they are used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsparse.errors import ClientError, UserError
    from fedsparse.experiment import Experiment, load_experiment
    from fedsparse.runner import Run, resume, run

_HOMES = {
    "ClientError": "fedsparse.errors",
    "Experiment": "fedsparse.experiment",
    "Run": "fedsparse.runner",
    "UserError": "fedsparse.errors",
    "load_experiment": "fedsparse.experiment",
    "resume": "fedsparse.runner",
    "run": "fedsparse.runner",
}

__all__ = ["ClientError", "Experiment", "Run", "UserError", "load_experiment", "resume", "run"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedsparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
