"""Tables of one run or of several: one row a method and budget tier, as text or CSV.

Bytes, training multiply-adds and seconds are means per client and round. What a run does not know is "-", or empty in
CSV.
"""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsparse.errors import UserError
from fedsparse.report.units import count, seconds, share, size

Row = dict[str, Any]
WIDTH = 100  # columns of a terminal


@dataclass(frozen=True)
class RunRecord:
    """What a finished run left in its folder: ``summary.json`` and ``config.toml``."""

    folder: Path
    summary: Mapping[str, Any]
    config: Mapping[str, Any]


def read_run(folder: Path) -> RunRecord:
    """The results of a run folder. Raises UserError for a folder that is absent, holds no run or is unfinished."""
    if not folder.is_dir():
        raise UserError(f"no run folder {str(folder)!r}")
    if not (folder / "config.toml").is_file():
        raise UserError(f"{str(folder)!r} is no run folder: it has no config.toml")
    if not (folder / "summary.json").is_file():
        raise UserError(f"the run in {str(folder)!r} is unfinished: it has no summary.json")
    try:
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the run in {str(folder)!r} cannot be read: {error}") from error
    if not isinstance(summary, dict) or not {"method", "tiers", "accuracy", "failures"} <= summary.keys():
        raise UserError(f"the run in {str(folder)!r} has a summary.json that is none of ours")
    return RunRecord(folder, summary, config)


def tier_rows(summary: Mapping[str, Any], run: str = "", label: str = "") -> list[Row]:
    """One row a budget tier, with full precision, and one for all clients where there are several tiers."""
    facts = {key: summary.get(key) for key in ("dataset", "model", "seed", "rounds")}
    head = {"run": run, "label": label or summary["method"], "method": summary["method"], **facts}
    tiers = [{**head, "budget_density": tier["density_budget"], **_figures(tier)} for tier in summary["tiers"]]
    if len(tiers) < 2:
        return tiers
    whole = {**head, "budget_density": "all", **_figures(summary)}
    whole["seconds_train_per_client_round"] = _mean(summary["tiers"], "seconds", "train_per_client_round")
    return [*tiers, whole]


def compare_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """The rows of several runs; where a method occurs twice its label is the run folder."""
    times = Counter(run.summary["method"] for run in runs)
    rows = []
    for run in runs:
        method = run.summary["method"]
        label = method if times[method] == 1 else str(run.folder)
        rows += tier_rows(run.summary, run=str(run.folder), label=label)
    return rows


def differences(runs: Sequence[RunRecord]) -> str:
    """One line that warns of runs which are not comparable; "" if data set, seed, partition and rounds agree."""
    found = []
    for key in ("dataset", "seed", "rounds", "partition"):
        values = [run.config.get(key, run.summary.get(key)) for run in runs]
        if any(value != values[0] for value in values):
            found.append(f"{key} ({', '.join(_distinct(values))})" if key != "partition" else key)
    return f"the runs differ in {'; '.join(found)}: their figures do not compare" if found else ""


def text_table(rows: Sequence[Row], width: int = WIDTH) -> str:
    """The rows as text, at most ``width`` columns wide; of a long label the end is kept."""
    figures = [[show(row) for _, show in _COLUMNS] for row in rows]
    cells = list(zip(*(header for header, _ in _COLUMNS), strict=True)) + figures
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first = min(max([len("method"), *(len(row["label"]) for row in rows)]), width - sum(widths) - 2 * len(widths))
    labels = ["", "method", *(_cut(row["label"], first) for row in rows)]
    lines = [
        "  ".join([label.ljust(first), *(cell.rjust(w) for cell, w in zip(line, widths, strict=True))])
        for label, line in zip(labels, cells, strict=True)
    ]
    body = []
    for i, line in enumerate(lines[2:]):
        if i and rows[i]["run"] != rows[i - 1]["run"]:
            body.append("")
        body.append(line)
    return "\n".join([*lines[:2], "-" * len(lines[0]), *body, "", _CAPTION])


def novel_line(summary: Mapping[str, Any]) -> str:
    """What came of the novel clients, in one line; "" where there are none."""
    novel = summary.get("novel")
    if not novel:
        return ""
    epochs, means = novel["accuracy"].keys(), (share(figures["mean"]) for figures in novel["accuracy"].values())
    return (
        f"{novel['clients']} novel clients after {', '.join(epochs)} epochs: {', '.join(means)};"
        f" participants {share(novel['participants'])}, gap {share(novel['gap'])}"
    )


def csv_table(rows: Sequence[Row]) -> str:
    """The rows as CSV, with full precision; unknown = empty, no budget = "none"."""
    out = io.StringIO()
    names = [name for name in (rows[0] if rows else {}) if name != "label"]
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows([{**row, "budget_density": budget_text(row)} for row in rows])
    return out.getvalue()


_CAPTION = "bytes, training multiply-adds (MACs) and time: per client and round; true density: the highest\n"

_COLUMNS: tuple[tuple[tuple[str, str], Callable[[Row], str]], ...] = (
    (("", "budget"), lambda row: budget_text(row)),
    (("", "clients"), lambda row: count(row["clients"])),
    (("personal", "accuracy"), lambda row: share(row["personal"])),
    (("bottom", "10 %"), lambda row: share(row["personal_bottom_decile"])),
    (("true", "density"), lambda row: share(row["density_true_max"])),
    (("bytes", "up"), lambda row: size(row["bytes_up_per_client_round"])),
    (("bytes", "down"), lambda row: size(row["bytes_down_per_client_round"])),
    (("train", "MACs"), lambda row: count(row["multiply_adds_train_per_client_round"])),
    (("sample", "MACs"), lambda row: count(row["multiply_adds_inference_per_sample"])),
    (("train", "time"), lambda row: seconds(row["seconds_train_per_client_round"])),
)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def _figures(tier: Mapping[str, Any]) -> Row:
    """The figures of a tier or of a whole summary, which have the same names."""
    return {
        "clients": tier.get("clients"),
        "local": _at(tier, "accuracy", "local", "mean"),
        "personal": _at(tier, "accuracy", "personal", "mean"),
        "personal_bottom_decile": _at(tier, "accuracy", "personal", "bottom_decile"),
        "global": _at(tier, "accuracy", "global", "mean"),
        "density_true_mean": _at(tier, "density", "true_mean"),
        "density_true_max": _at(tier, "density", "true_max"),
        "bytes_up_per_client_round": _at(tier, "bytes", "up_per_client_round"),
        "bytes_down_per_client_round": _at(tier, "bytes", "down_per_client_round"),
        "multiply_adds_train_per_client_round": _half(_at(tier, "flops", "train_per_client_round")),
        "multiply_adds_max_per_client_round": _half(_at(tier, "flops", "max_per_client_round")),
        "multiply_adds_inference_per_sample": _half(_at(tier, "flops", "inference_per_sample")),
        "memory_peak_model_bytes": _at(tier, "memory", "peak_model_bytes"),
        "seconds_train_per_client_round": _at(tier, "seconds", "train_per_client_round"),
    }


def _at(tree: Any, *path: str) -> Any:
    """The value at a path of keys; None where a key is absent or its table is null."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _half(flops: float | None) -> float | None:
    return None if flops is None else flops / 2  # one multiply-add = 2 flops


def _mean(tiers: Sequence[Mapping[str, Any]], *path: str) -> float | None:
    """The mean over clients of a figure of the tiers; None if one tier lacks it."""
    values = [_at(tier, *path) for tier in tiers]
    clients = [tier["clients"] for tier in tiers]
    if None in values or not sum(clients):
        return None
    return float(sum(value * n for value, n in zip(values, clients, strict=True)) / sum(clients))


def budget_text(row: Row) -> str:
    """The budget of a row: its tier, "all" or "none"."""
    value = row["budget_density"]
    return "none" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _distinct(values: Sequence[Any]) -> list[str]:
    return [str(value) for i, value in enumerate(values) if value not in values[:i]]
