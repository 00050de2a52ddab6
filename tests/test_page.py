"""``report.html``: well-formed, alone, escaped, and its figures are the summary's."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedsparse
from fedsparse.experiment import from_dict
from fedsparse.report.chart import accuracy_chart, spread, ticks
from fedsparse.report.page import page
from fedsparse.report.units import count, share, size

_VOID = {"meta", "line", "circle", "polyline"}
EVIL = "<script>alert('x')</script>&\""


class Reader(HTMLParser):
    """Checks that every tag is closed in turn; collects tags with attributes, table rows and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fedsparse.Run:
    settings = {
        "rounds": 3,
        "partition": {"clients": 6, "novel": 0.3},
        "budget": {"tiers": [1, 0.5], "of": "bytes", "on_over_budget": "record"},
        "method": {"name": "fedavg_ft"},
    }
    return fedsparse.run(from_dict(settings), out=tmp_path_factory.mktemp("page") / "run")


def test_the_tables_hold_the_figures_of_the_summary(run: fedsparse.Run) -> None:
    read = Reader((run.directory / "report.html").read_text()).rows
    rows, novel = ({row[0]: row[1:] for row in read if len(row) == n} for n in (12, 3))
    for tier in run.summary["tiers"]:
        accuracy, flops = tier["accuracy"], tier["flops"]
        assert rows[f"{tier['density_budget']:.4g}"] == [
            count(tier["clients"]),
            share(accuracy["personal"]["mean"]),
            share(accuracy["personal"]["bottom_decile"]),
            share(accuracy["local"]["mean"]),
            share(accuracy["global"]["mean"]),
            share(tier["density"]["true_max"]),
            size(tier["bytes"]["up_per_client_round"]),
            size(tier["bytes"]["down_per_client_round"]),
            count(flops["train_per_client_round"] / 2),
            count(flops["inference_per_sample"] / 2),
            size(tier["memory"]["peak_model_bytes"]),
        ]
    assert rows["all"][1] == share(run.summary["accuracy"]["personal"]["mean"])
    for epochs, figures in run.summary["novel"]["accuracy"].items():
        assert novel[epochs] == [share(figures["mean"]), share(figures["weighted"])]


def test_the_head_and_the_costs_beside_the_dense_model(run: fedsparse.Run) -> None:
    s = run.summary
    text = Reader((run.directory / "report.html").read_text()).text
    for part in ("fedavg_ft on digits", "model mlp", f"{s['clients']} clients", "3 rounds", "seed 0", "multiply-adds"):
        assert part in text
    assert f"{s['bytes']['up_per_client_round'] / s['bytes']['dense_per_client_round']:.2f} × dense" in text
    assert "a share of the dense model's bytes" in text
    assert share(s["novel"]["gap"]) in text
    for note in s["notes"]:
        assert note in text
    assert (run.directory / "config.toml").read_text() in text
    assert f"fedsparse run {run.directory}/config.toml" in text


def test_the_page_stands_alone(run: fedsparse.Run) -> None:
    text = (run.directory / "report.html").read_text()
    reader = Reader(text)
    assert text.startswith("<!doctype html>")
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in reader.tags}
    assert not {"src", "href", "onload", "style"} & {name for _, attrs in reader.tags for name in attrs}
    assert "url(" not in text and "http" not in text and "@import" not in text


def test_the_lines_go_through_the_accuracies(run: fedsparse.Run) -> None:
    reader = Reader((run.directory / "report.html").read_text())
    lines = {g["class"]: line["points"] or "" for g, line in zip(reader.all("g"), reader.all("polyline"), strict=True)}
    assert lines.keys() == {"personal", "local", "global"}
    found = {name: [float(p.split(",")[1]) for p in points.split()] for name, points in lines.items()}
    given = {name: [r["accuracy"][name] for r in run.rounds] for name in lines}
    ys = [(y, a) for name in lines for y, a in zip(found[name], given[name], strict=True)]
    (y0, a0), (y1, a1) = min(ys, key=lambda pair: pair[1]), max(ys, key=lambda pair: pair[1])
    for y, a in ys:  # one scale for all, upwards
        assert y == pytest.approx(y0 + (y1 - y0) * (a - a0) / (a1 - a0), abs=0.2)
    assert y1 < y0


def test_whatever_comes_from_outside_is_escaped(run: fedsparse.Run) -> None:
    summary = json.loads(json.dumps(run.summary))
    for key in ("method", "dataset", "model", "split", "budget_of"):
        summary[key] = EVIL
    summary["notes"] = [EVIL]
    summary["masks"] = {"distinct": 3, EVIL: EVIL}
    summary["novel"]["errors"] = [EVIL]
    text = page(summary, run.rounds, EVIL, EVIL)
    assert "script" not in {tag for tag, _ in Reader(text).tags}
    assert EVIL not in text and Reader(text).text.count(EVIL) >= 8


def test_masks_are_shown_where_something_is_known(run: fedsparse.Run) -> None:
    assert "Masks" not in (run.directory / "report.html").read_text()
    masks = {**run.summary["masks"], "distinct": 12, "mean_overlap": 0.6125, "of_layers": "a, b"}
    rows = Reader(page({**run.summary, "masks": masks}, run.rounds, "", "x")).rows
    assert [row for row in rows if len(row) == 2][1:] == [
        ["distinct masks", "12"],
        ["mean overlap of two clients' masks", "0.613"],
        ["of layers", "a, b"],
    ]


def test_a_run_of_which_little_is_known(run: fedsparse.Run) -> None:
    unknown = json.loads(json.dumps(run.summary), parse_float=lambda _: None)
    text = page({**unknown, "seconds": {"wall": None}, "novel": None}, [{"round": 1, "accuracy": None}], "", "x")
    reader = Reader(text)
    assert not reader.all("svg")
    assert "-" in reader.rows[1]


# --- the chart -------------------------------------------------------------------------------------------------------


def line_of(name: str, *values: float | None) -> list[dict[str, Any]]:
    empty = dict.fromkeys(("personal", "local", "global"))
    return [{"round": i, "accuracy": {**empty, name: v}} for i, v in enumerate(values, 1)]


def test_a_single_round_is_a_dot_and_what_is_absent_has_no_line() -> None:
    reader = Reader(accuracy_chart(line_of("personal", 0.5)))
    assert [g["class"] for g in reader.all("g")] == ["personal"]
    assert len((reader.all("polyline")[0]["points"] or "").split()) == len(reader.all("circle")) == 1
    assert accuracy_chart(line_of("local", None)) == accuracy_chart([]) == ""


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 10))
def test_ticks_are_few_even_and_hold_the_values(a: float, b: float, most: int) -> None:
    low, high = sorted((a, b))
    found = ticks(low, high, most=most, least=0.02)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    assert 2 <= len(found) <= most + 2
    steps = {round(y - x, 6) for x, y in pairwise(found)}
    assert len(steps) == 1
    assert steps.pop() >= 0.02


@pytest.mark.parametrize(("rounds", "expected"), [(1, [0, 1]), (3, [0, 1, 2, 3]), (20, [0, 5, 10, 15, 20])])
def test_ticks_of_rounds_are_whole(rounds: int, expected: list[int]) -> None:
    assert ticks(0, rounds, most=8, least=1) == expected


def test_names_do_not_overlap() -> None:
    assert spread({"a": 50.0, "b": 52.0, "c": 10.0}) == {"c": 10.0, "a": 50.0, "b": 65.0}
