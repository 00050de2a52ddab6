"""``report.html``: one run as a page that stands alone: no network, no scripts, and nothing in it is not escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fedsparse.report.chart import accuracy_chart
from fedsparse.report.tables import Row, budget_text, tier_rows
from fedsparse.report.units import count, seconds, share, size

_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("clients", lambda row: count(row["clients"])),
    ("personal accuracy", lambda row: share(row["personal"])),
    ("bottom 10 %", lambda row: share(row["personal_bottom_decile"])),
    ("local", lambda row: share(row["local"])),
    ("global", lambda row: share(row["global"])),
    ("true density", lambda row: share(row["density_true_max"])),
    ("bytes up", lambda row: size(row["bytes_up_per_client_round"])),
    ("bytes down", lambda row: size(row["bytes_down_per_client_round"])),
    ("training multiply-adds", lambda row: count(row["multiply_adds_train_per_client_round"])),
    ("multiply-adds a sample", lambda row: count(row["multiply_adds_inference_per_sample"])),
    ("peak memory", lambda row: size(row["memory_peak_model_bytes"])),
)
_MASK_NAMES = {
    "distinct": "distinct masks",
    "mean_overlap": "mean overlap of two clients' masks",
    "never_trained": "share of blocks that nobody trained",
    "agreement": "agreement of training and evaluation masks",
}


def page(summary: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], config: str, folder: str) -> str:
    """A run's page, of ``summary.json``, the lines of ``rounds.jsonl``, the text of ``config.toml`` and the folder."""
    title = f"{summary['method']} on {summary['dataset']}"
    facts = (
        f"model {summary['model']} · {summary['clients']} clients · {summary['rounds']} rounds · "
        f"seed {summary['seed']} · {seconds(summary['seconds']['wall'])} · scored on {summary['split']} data"
    )
    sections = (
        ("Accuracy against rounds", accuracy_chart(rounds)),
        (f"By budget, a share of the dense model's {summary['budget_of'].replace('_', '-')}", _tiers(summary)),
        ("Novel clients", _novel(summary["novel"])),
        ("Masks", _masks(summary["masks"])),
        ("Notes", _items(summary["notes"])),
        ("How to repeat it", _repeat(config, folder)),
    )
    body = "\n".join(f"<section>\n<h2>{escape(head)}</h2>\n{text}\n</section>" for head, text in sections if text)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="facts">{escape(facts)}</p>\n{_headline(summary)}\n{body}\n</main>\n</body>\n</html>\n'
    )


def _headline(summary: Mapping[str, Any]) -> str:
    """The four figures to look at first, those of cost beside the dense model's."""
    rows = (
        ("personal accuracy", share(summary["accuracy"]["personal"]["mean"]), "mean over clients"),
        ("upload", *_beside(summary["bytes"], "up_per_client_round", "dense_per_client_round", size)),
        (
            "training multiply-adds",
            *_beside(summary["flops"], "train_per_client_round", "dense_train_per_client_round", _macs),
        ),
        ("peak memory", *_beside(summary["memory"], "peak_model_bytes", "dense_peak_model_bytes", size)),
    )
    tiles = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(below)}</dd></div>"
        for name, value, below in rows
    )
    return f"<dl>{''.join(tiles)}</dl>"


def _macs(flops: float | None) -> str:
    return count(None if flops is None else flops / 2)


def _beside(table: Mapping[str, Any], name: str, dense: str, show: Callable[[float | None], str]) -> tuple[str, str]:
    """A cost, and its share of the dense model's."""
    value, whole = table[name], table[dense]
    return show(value), "-" if value is None or not whole else f"{value / whole:.2f} × dense"


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the row."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _tiers(summary: Mapping[str, Any]) -> str:
    rows = ([budget_text(row), *(show(row) for _, show in _COLUMNS)] for row in tier_rows(summary))
    note = "Bytes and training multiply-adds: per client and round. Density and memory: the highest."
    return _table(["budget", *(head for head, _ in _COLUMNS)], rows) + f'\n<p class="facts">{note}</p>'


def _novel(novel: Mapping[str, Any] | None) -> str:
    """Accuracy of the novel clients by epochs of onboarding."""
    if not novel:
        return ""
    rows = [(e, share(f["mean"]), share(f["weighted"])) for e, f in novel["accuracy"].items()]
    text = (
        f"{novel['clients']} clients took no part in training; then each had the final state and so many epochs alone. "
        f"Participants: {share(novel['participants'])}; gap after one epoch: {share(novel['gap'])}."
    )
    head = ("epochs alone", "mean accuracy", "weighted by examples")
    return f"<p>{escape(text)}</p>\n{_table(head, rows)}\n{_items(novel['errors'])}"


def _masks(masks: Mapping[str, Any]) -> str:
    """What is known of the masks; nothing where nothing is."""
    rows = [(_MASK_NAMES.get(k, k.replace("_", " ")), _any(v)) for k, v in masks.items() if v is not None]
    return _table(("figure", "value"), rows) if rows else ""


def _any(value: Any) -> str:
    return share(value) if isinstance(value, float) else str(value)


def _items(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _repeat(config: str, folder: str) -> str:
    command = f"fedsparse run {folder}/config.toml"
    return (
        f"<pre>{escape(command)}</pre>\n<details><summary>config.toml</summary>\n<pre>{escape(config)}</pre></details>"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --rule: #d9dee3; --paper: #fff; --panel: #f5f7f9;
  --personal: #1f6feb; --local: #c2570c; --global: #2b8a5a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --rule: #343b44; --paper: #14171b;
  --panel: #1d2228; --personal: #6ea8fe; --local: #f0924c; --global: #5cc48d; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 17px; margin: 36px 0 10px; }
.facts { color: var(--soft); margin: 6px 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin: 20px 0 0; }
dl div { background: var(--panel); border-radius: 8px; padding: 12px 16px; }
dt, dd { margin: 0; } dt, dd + dd { color: var(--soft); font-size: 13px; }
dt + dd { font-size: 24px; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 12px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; white-space: normal; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; } tbody th { font-weight: 600; }
pre { background: var(--panel); border-radius: 8px; padding: 12px 16px; overflow-x: auto; font-size: 13px; }
svg { width: 100%; max-width: 860px; height: auto; font-size: 12px; }
.grid { stroke: var(--rule); } .axis { fill: var(--soft); }
polyline { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
circle, g text { fill: currentColor; }
.personal { color: var(--personal); } .local { color: var(--local); } .global { color: var(--global); }
"""
