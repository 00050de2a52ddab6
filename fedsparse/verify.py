"""The same experiment on several engines: do they end with the same bits?"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedsparse.errors import UserError, unknown
from fedsparse.experiment import Experiment, load_experiment
from fedsparse.runner import OnRound, run

ENGINES = ("local", "ray")


def engines_of(text: str) -> tuple[tuple[str, int], ...]:
    """``"local:1,ray:2"`` -> (("local", 1), ("ray", 2)). Raises UserError for an unknown engine or a bad number."""
    found = []
    for part in text.split(","):
        kind, _, number = part.strip().partition(":")
        if kind not in ENGINES:
            raise unknown("engine", kind, ENGINES)
        if not re.fullmatch(r"[1-9][0-9]*", number or "1"):
            raise UserError(f"an engine is kind:workers, such as local:4; got {part.strip()!r}")
        found.append((kind, int(number or 1)))
    return tuple(found)


def verify(
    experiment: Experiment,
    engines: Sequence[tuple[str, int]],
    *,
    out: Path | None = None,
    on_round: Callable[[str], OnRound | None] | None = None,
) -> Iterator[tuple[str, str]]:
    """Run on one engine after the other; yields its name and the digest. ``out``: of the run folders; None = they go.

    What the first run has measured (the representation of a layer) is kept for the others.
    """
    with tempfile.TemporaryDirectory(prefix="fedsparse-") as temporary:
        folder, address = out or Path(temporary), experiment.engine.address
        for number, (kind, workers) in enumerate(engines):
            name = f"{kind}:{workers}"
            chosen = [f"engine.kind={kind}", f"engine.workers={workers}"]
            chosen.append(f"engine.address={address if kind == 'ray' else ''}")
            place = folder / f"{number}-{kind}-{workers}"
            done = run(experiment.with_overrides(chosen), out=place, on_round=on_round(name) if on_round else None)
            if not number:
                experiment = load_experiment(place / "config.toml")
            yield name, done.summary["digest"]
