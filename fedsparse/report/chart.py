"""Accuracy against rounds as an SVG, drawn by hand: a chart needs no library and no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedsparse.report.units import share

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT = 720, 300  # of the whole, in the chart's own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 84, 12, 40  # margins; the lines' names stand in the right one
_LINES = ("personal", "local", "global")  # in the order of their names' precedence
_NAME_GAP = 15  # between the names of two lines
_LEAST_STEP = 0.02  # of the accuracy axis, so that noise does not look like a rise


def accuracy_chart(rounds: Sequence[Mapping[str, Any]]) -> str:
    """The accuracies of the evaluated rounds as lines; "" where nothing was evaluated."""
    lines = {name: points for name in _LINES if (points := _points(rounds, name))}
    if not lines:
        return ""
    values = [y for points in lines.values() for _, y in points]
    across = ticks(0, max(points[-1][0] for points in lines.values()), most=8, least=1)
    up = ticks(min(values), max(values), most=5, least=_LEAST_STEP)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (_WIDTH - _LEFT - _RIGHT) * (x - across[0]) / (across[-1] - across[0]),
            _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (y - up[0]) / (up[-1] - up[0]),
        )

    places = {name: [place(*point) for point in points] for name, points in lines.items()}
    names = spread({name: found[-1][1] for name, found in places.items()})
    parts = [
        *(_y_tick(y, *place(across[0], y)) for y in up),
        *(_x_tick(x, *place(x, up[0])) for x in across),
        f'<text class="axis" x="{_LEFT}" y="{_HEIGHT - 4}">round</text>',
        *(_line(name, places[name], lines[name], names[name]) for name in reversed(lines)),
    ]
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Mean accuracy by round">'
    return "\n".join([head, *parts, "</svg>"])


def _points(rounds: Sequence[Mapping[str, Any]], name: str) -> Points:
    evaluated = [(r["round"], r["accuracy"][name]) for r in rounds if r["accuracy"]]
    return [(x, y) for x, y in evaluated if y is not None]


def ticks(low: float, high: float, *, most: int, least: float) -> list[float]:
    """About ``most`` round numbers, at least two and ``least`` apart, from ``low`` or below to ``high`` or above."""
    rough = max((high - low) / most, least)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 9) for i in range(first, max(last, first + 1) + 1)]


def spread(heights: Mapping[str, float]) -> dict[str, float]:
    """The heights, moved down where two names would overlap."""
    placed: dict[str, float] = {}
    last = -math.inf
    for name in sorted(heights, key=lambda name: heights[name]):
        placed[name] = last = max(heights[name], last + _NAME_GAP)
    return placed


def _y_tick(value: float, x: float, y: float) -> str:
    line = f'<line class="grid" x1="{x:.1f}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="axis" x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'


def _x_tick(value: float, x: float, y: float) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{value:.10g}</text>'


def _line(name: str, places: Points, points: Points, at: float) -> str:
    """A line with a dot at its end, its name at the height ``at``, and what a pointer shows."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    x, y = places[-1]
    title = f"{name}: {share(points[-1][1])} in round {points[-1][0]}"
    return (
        f'<g class="{name}"><title>{escape(title)}</title><polyline points="{path}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/><text x="{x + 9:.1f}" y="{at + 4:.1f}">{name}</text></g>'
    )
