"""Runs of an experiment file whose figures are kept in ``experiments/results/``: what is there is not run again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from personal import HERE, command, one_run, write

from fedsparse.errors import UserError
from fedsparse.experiment import load_experiment
from fedsparse.report.summary import accuracy
from fedsparse.rows import POINTS

Entry = dict[str, Any]


def load(kept: str) -> list[Entry]:
    """The entries of ``results/KEPT.json``, [] if there is no such file."""
    path = HERE / "results" / f"{kept}.json"
    return json.loads(path.read_text()) if path.exists() else []


def once(kept: str, name: str, key: str, seed: int, settings: Sequence[str], extra: Sequence[str]) -> None:
    """Run the file ``name`` with ``settings``, ``extra`` ones and the seed, unless its command and hyper-parameters
    have an entry; the file of entries is written after the run."""
    settings = [*settings, *extra, f"seed={seed}"]
    line, hyper = command(name, settings), dict(load_experiment(HERE / f"{name}.toml", settings).hyper)
    if any(e["command"] == line and e["hyper"] == hyper for e in load(kept)):
        print(f"{line}: done before", flush=True)
        return
    made = {"key": key, "seed": seed, "extra": list(extra), "command": line, "hyper": hyper, **entry(name, settings)}
    write(kept, [*(e for e in load(kept) if e["command"] != line), made])
    scores = made["accuracy"]["personal"]
    print(f"{line}: {scores['weighted']:.4f} ({made['seconds']['wall']:.0f} s)", flush=True)


def entry(name: str, settings: Sequence[str]) -> Entry:
    """One run: its digest, its figures over clients at the three points, costs, and how they went over the rounds."""
    summary, rows = one_run(name, settings)
    return {
        "digest": summary["digest"],
        "rounds": summary["rounds"],
        "clients": summary["clients"],
        "notes": summary["notes"],
        "accuracy": summary["accuracy"],
        "density": summary["density"]["true_mean"],
        "density_max": summary["density"]["true_max"],
        "nominal": summary["density"]["nominal"],
        "up": summary["bytes"]["up_per_client_round"],
        "down": summary["bytes"]["down_per_client_round"],
        "bytes": summary["bytes"],
        "macs": summary["flops"]["inference_per_sample"] / 2,
        "train_flops": summary["flops"]["train_per_client_round"],
        "flops": summary["flops"],
        "peak_model_bytes": summary["memory"]["peak_model_bytes"],
        "seconds": summary["seconds"],
        "masks": summary["masks"],
        "novel": summary.get("novel"),
        "by_round": by_round(rows),
    }


def by_round(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The weighted accuracy of each evaluated round at the three points."""
    evaluated = sorted({row["round"] for row in rows if row["personal"] is not None})
    groups = {i: [row for row in rows if row["round"] == i] for i in evaluated}
    return [{"round": i, **{p: accuracy(group, p)["weighted"] for p in POINTS}} for i, group in groups.items()]


def rows(found: list[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    """The rows of a table: a name, and its runs, one a seed."""
    names = list(dict.fromkeys(_name(e) for e in found))
    for name in names:
        yield name, sorted((e for e in found if _name(e) == name), key=lambda e: e["seed"])


def command_line(parser: argparse.ArgumentParser, work: Mapping[str, Callable[[argparse.Namespace], None]]) -> None:
    """Do what the first argument names; an error that the user can mend is one line."""
    parser.add_argument("what", choices=tuple(work))
    args = parser.parse_args()
    try:
        work[args.what](args)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def _name(entry: Entry) -> str:
    """The key and what was set besides; not on which device it was computed."""
    return " ".join([entry["key"], *(setting for setting in entry["extra"] if not setting.startswith("device="))])
