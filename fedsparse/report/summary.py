"""``summary.json``: the figures of a run, over all clients and tier by tier.

A figure is the mean of the last five evaluated rounds, never the best on test data. What is not known is null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedsparse.rows import POINTS, Onboarding
from fedsparse.seeding import numpy_rng
from fedsparse.task import Score

Row = Mapping[str, Any]
MASKS = ("distinct", "mean_overlap", "never_trained", "agreement")
_ELSEWHERE = ("wall", "dense_bytes", "dense_flops", "server_flops", "dense_memory")  # facts with another name below
_GAP = 1  # epochs of onboarding after which novel clients are set against participants
_LAST = 5  # evaluated rounds that a figure averages
_DRAWS = 2000  # simulated federations behind the noise figure
_DRAWN = 1 << 20  # clients of them at a time


@dataclass(frozen=True)
class Facts:
    """What a summary says that does not come from the rows."""

    method: str
    dataset: str
    model: str
    engine: str
    seed: int
    split: str
    rounds: int
    clients: int
    wall: float
    digest: str
    budget_of: str
    dense_bytes: int
    dense_flops: float
    server_flops: float
    dense_memory: int
    notes: tuple[str, ...]


def summarise(
    facts: Facts,
    rounds: Sequence[Row],
    rows: Sequence[Row],
    novel: Onboarding | None = None,
    masks: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``summary.json`` (the stable names of the documentation, and ``tiers``).

    Totals include the exchanges before round 1 and the server's own flops; figures per client and round do not. novel:
    what came of the novel clients, None where there are none. masks: what the method says of its masks.
    """
    named = {name: value for name, value in asdict(facts).items() if name not in _ELSEWHERE}
    named["rounds"] = sum(1 for r in rounds if r["round"])  # without the preparation
    before = [r for r in rounds if not r["round"]]
    tiers = sorted({row["tier"] for row in rows}, key=lambda t: math.inf if t is None else t, reverse=True)
    whole = _figures(rows)
    seconds = {key: sum(r["seconds"][key] for r in rounds) for key in ("train", "encode", "reduce", "evaluate", "idle")}
    after = novel or Onboarding({}, 0, 0, 0.0)
    seconds["evaluate"] += after.seconds
    return {
        **named,
        "accuracy": whole["accuracy"],
        "density": whole["density"],
        "bytes": {
            **whole["bytes"],
            "up_total": sum(r["bytes"]["up"] for r in rounds),
            "down_total": sum(r["bytes"]["down"] for r in rounds),
            "evaluation_total": sum(r["bytes"]["evaluation"] for r in rounds) + after.bytes,
            "preparation_total": sum(r["bytes"]["up"] + r["bytes"]["down"] for r in before),
            "dense_per_client_round": facts.dense_bytes,
            "upload_share": _share(whole["bytes"]["up_per_client_round"], facts.dense_bytes),
        },
        "flops": {
            **whole["flops"],
            "dense_train_per_client_round": facts.dense_flops,
            "server": facts.server_flops,
            "total": facts.server_flops + sum(r["flops"] for r in rounds),
            "preparation_total": facts.server_flops + sum(r["flops"] for r in before),
        },
        "memory": {**whole["memory"], "dense_peak_model_bytes": facts.dense_memory},
        "seconds": {"wall": facts.wall, **seconds, "simulated": None},
        "failures": {
            "clients": sum(r["failures"] for r in rounds) + len(after.errors),
            "dropped": None,
            "over_budget": sum(row["over_budget"] for row in rows),
        },
        "masks": {**dict.fromkeys(MASKS), **(masks or {})},
        "novel": _novel(novel, whole["accuracy"]["personal"]["mean"]) if novel else None,
        "tiers": [{"density_budget": tier, **_figures([row for row in rows if row["tier"] == tier])} for tier in tiers],
    }


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    trained = [row for row in rows if row["bytes_up"] is not None and row["round"]]  # round 0 prepares
    macs = _mean(row["forward_macs"] for row in trained)
    return {
        "clients": len({row["client"] for row in rows}),
        "accuracy": {point: accuracy(rows, point) for point in POINTS},
        "density": {
            "nominal": _mean(row["density_nominal"] for row in trained),
            "true_mean": _mean(row["density_true"] for row in trained),
            "true_max": _most(trained, "density_true"),
            "preparation_max": _most([row for row in rows if not row["round"]], "density_true"),
        },
        "bytes": {
            "up_per_client_round": _mean(row["bytes_up"] for row in trained),
            "down_per_client_round": _mean(row["bytes_down"] for row in trained),
        },
        "flops": {
            "train_per_client_round": _mean(row["flops"] for row in trained),
            "max_per_client_round": _most(trained, "flops"),
            "max_preparation": _most_before(rows),
            "inference_per_sample": None if macs is None else 2 * macs,
        },
        "memory": {"peak_model_bytes": _most(rows, "memory")},
        "seconds": {"train_per_client_round": _mean(row["seconds"] for row in trained)},
    }


def _novel(novel: Onboarding, participants: float | None) -> dict[str, Any]:
    """Accuracy of the novel clients by epochs of onboarding, over clients and client by client.

    gap: how far, after one epoch, they are behind the participants.
    """
    epochs = sorted({e for scores in novel.scores.values() for e in scores})
    found = {e: [scores[e] for scores in novel.scores.values() if scores[e].n] for e in epochs}
    figures = {
        str(e): {
            "mean": _mean(s.correct / s.n for s in found[e]),
            "weighted": sum(s.correct for s in found[e]) / sum(s.n for s in found[e]) if found[e] else None,
        }
        for e in epochs
    }
    after = figures.get(str(_GAP), {}).get("mean")
    return {
        "clients": novel.clients,
        "participants": participants,
        "accuracy": figures,
        "gap": None if after is None or participants is None else participants - after,
        "bytes": novel.bytes,
        "errors": [str(error) for error in novel.errors[:5]],
        "scores": [
            {"client": i, "n": max(s.n for s in scores.values()), **_shares(scores)}
            for i, scores in novel.scores.items()
        ],
    }


def _shares(scores: Mapping[int, Score]) -> dict[str, float | None]:
    return {str(e): s.correct / s.n if s.n else None for e, s in scores.items()}


def accuracy(rows: Sequence[Row], point: str) -> dict[str, float | None]:
    """Figures over clients: mean, weighted (by test examples), bottom_decile (mean of the ceil(K/10) lowest), p10
    (the sorted value at floor(K/10)), bottom_decile_noise (what test-set noise alone would give, see below)."""
    evaluated = [row for row in rows if row[point] is not None and row["n_test"] > 0]
    last = set(sorted({row["round"] for row in evaluated})[-_LAST:])
    by_client: dict[int, list[float]] = {}
    tests: dict[int, int] = {}
    for row in evaluated:
        if row["round"] in last:
            by_client.setdefault(row["client"], []).append(row[point])
            tests[row["client"]] = row["n_test"]
    if not by_client:
        return dict.fromkeys(("mean", "weighted", "bottom_decile", "p10", "bottom_decile_noise"))
    values = np.array([np.mean(by_client[i]) for i in sorted(by_client)])  # (clients,)
    n = np.array([tests[i] for i in sorted(by_client)])
    ordered = np.sort(values)
    pooled = float((values * n).sum() / n.sum())
    return {
        "mean": pooled if point == "global" else float(values.mean()),  # one model: on the pooled test data
        "weighted": pooled,
        "bottom_decile": float(_lowest(ordered).mean()),
        "p10": float(ordered[len(ordered) // 10]),
        "bottom_decile_noise": noise_bottom_decile(pooled, n),
    }


def noise_bottom_decile(probability: float, tests: np.ndarray[Any, Any]) -> float:
    """The expected bottom decile of clients that all are right with ``probability``: binomial in their test sizes."""
    rng, p = numpy_rng("noise"), min(1.0, max(0.0, probability))
    at_once = max(1, min(_DRAWS, _DRAWN // len(tests)))
    total, left = 0.0, _DRAWS
    while left:
        right = rng.binomial(tests, p, size=(min(at_once, left), len(tests)))
        left -= len(right)
        total += len(right) * float(_lowest(np.sort(right / tests, axis=1)).mean())
    return total / _DRAWS


def _lowest(ordered: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The ceil(K/10) lowest along the last axis, which is sorted."""
    return ordered[..., : -(-ordered.shape[-1] // 10)]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _share(part: float | None, whole: float) -> float | None:
    return None if part is None else part / max(1, whole)


def _most(rows: Sequence[Row], name: str) -> float | None:
    return _best(max, (row[name] for row in rows))


def _most_before(rows: Sequence[Row]) -> float | None:
    """The most flops that a client spends on all exchanges before round 1 together; None where there are none."""
    spent: dict[int, float] = {}
    for row in rows:
        if not row["round"] and row["flops"] is not None:
            spent[row["client"]] = spent.get(row["client"], 0.0) + row["flops"]
    return max(spent.values(), default=None)


def _best(choose: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return choose(known) if known else None
