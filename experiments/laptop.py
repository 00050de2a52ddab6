"""The table of the laptop protocol in RESULTS.md: CIFAR-10, LeNet, 100 clients with Dirichlet labels, each split 6:2:2.

    python experiments/laptop.py tune  --only fedavg_ft local      # a few trials on validation data
    python experiments/laptop.py final --only fedavg_ft pfedgate_0.3 --seeds 0 1 2
    python experiments/laptop.py table                             # Markdown of what `final` wrote

A run is named by a key: NAME of RUNS, METHOD_EQUAL_SHARE for a narrow dense control (``local_parameters_0.3``), and
METHOD_EQUAL_of_NAME for one at the share that NAME was measured to use (``local_multiply_adds_of_pfedgate_0.3``).
``--set`` adds settings to all runs (``--set fraction=1.0``: all clients in each round). Runs that
``experiments/results/laptop_final.json`` has already are skipped. FedAvg's row is FedAvg-FT's global model.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kept import Entry, command_line, load, once, rows
from personal import HERE, command, one_run, print_row, spread, write

import fedsparse
from fedsparse.errors import UserError, unknown
from fedsparse.rows import POINTS

NAME = "cifar10_laptop"
FINAL = "laptop_final"
TUNE = HERE / "results" / "laptop_tune.json"
SHARES = (0.5, 0.3)
# The flags of the released code's scripts and the paper's rates for CIFAR-10 at s = 0.5 and 0.3 (Table 5).
OFFICIAL = (
    "method=pfedgate",
    "method.mode=official",
    "method.momentum=0.9",
    "method.weight_decay=5e-4",
    "method.relu_logits=true",
    "method.gate_pool=0",
    "method.gate_start=0.5",
    "method.lr=0.03",
    "method.gate_lr=1.5",
)
SLOW = ("method.momentum=0", "method.gate_lr=0.1")
RUNS: dict[str, tuple[str, ...]] = {
    "fedavg_ft": ("method=fedavg_ft",),
    "local": ("method=local",),
    **{f"pfedgate_{s:g}": ("method=pfedgate", f"budget.tiers=[{s:g}]") for s in (1.0, *SHARES)},
    "pfedgate_client_0.3": ("method=pfedgate", "budget.tiers=[0.3]", "method.mask_scope=client"),
    **{f"official_{s:g}": (*OFFICIAL, f"budget.tiers=[{s:g}]") for s in SHARES},
}
# plain SGD, as the other methods, with the rates of its trials: gates that hardly move
RUNS["pfedgate_slow_gates_0.3"] = (*RUNS["pfedgate_0.3"], *SLOW, "method.lr=0.1")
RUNS["pfedgate_client_slow_gates_0.3"] = (*RUNS["pfedgate_client_0.3"], *SLOW, "method.lr=0.2")
NOVEL = ("partition.novel=0.2",)
RUNS |= {f"novel_{name}": (*RUNS[name], *NOVEL) for name in ("fedavg_ft", "local", "pfedgate_0.5", "pfedgate_0.3")}
CONTROL = re.compile(r"(fedavg_ft|local)_(parameters|multiply_adds)_(?:of_(.+)|([0-9.]+))")

# Tuning: the settings of the short runs on validation data, and what is tried in them. ft_lr 0 is lr itself.
FEW = ("rounds=15", "evaluate.every=15", "fraction=0.1", "evaluate.fraction=0.3")
OFTEN = ("partition.max_clients=20", "fraction=0.5", "rounds=24", "evaluate.every=24")  # twelve rounds a client
PLAIN = {"momentum": 0}
HALF = {**PLAIN, "gate_start": 0.5}
ONE_MASK = {**PLAIN, "mask_scope": "client", "lr": 0.2}
SCALED = {"class_gates": "true"}
STEEP = {"momentum": 0.9, "lr": 0.03, "gate_lr": 1.5}  # the paper's rates, its code's momentum
AS_LONG = ("partition.max_clients=6", "fraction=1.0", "rounds=20", "evaluate.every=20")  # the epochs of a whole run
TRIALS: dict[str, tuple[tuple[tuple[str, ...], tuple[dict[str, float | str], ...]], ...]] = {
    "fedavg_ft": (
        (
            FEW,
            (
                *({"lr": lr, "ft_lr": 0.0} for lr in (0.05, 0.1, 0.2, 0.4)),
                *({"lr": 0.1, "ft_lr": ft_lr} for ft_lr in (0.03, 0.01)),
            ),
        ),
        (
            OFTEN,
            (
                *({"lr": lr, "ft_lr": 0.03} for lr in (0.1, 0.2)),
                *({"momentum": 0.9, "lr": 0.03, "ft_lr": ft_lr} for ft_lr in (0.01, 0.003)),
                {"momentum": 0.9, "lr": 0.01, "ft_lr": 0.003},
            ),
        ),
    ),
    "local": (
        (
            AS_LONG,
            (*({"lr": lr} for lr in (0.02, 0.05, 0.1)), *({"momentum": 0.9, "lr": lr} for lr in (0.005, 0.01, 0.03))),
        ),
    ),
    "pfedgate_0.5": (
        (
            FEW,
            (
                *({**HALF, "lr": lr, "gate_lr": gate_lr} for lr in (0.2, 0.4) for gate_lr in (0.1, 1.0)),
                {**HALF, "lr": 0.8, "gate_lr": 0.1},
                *({**PLAIN, "lr": lr, "gate_lr": 0.1} for lr in (0.1, 0.2)),
                {**HALF, "mask_scope": "client", "lr": 0.8, "gate_lr": 0.1},
                {**ONE_MASK, "gate_lr": 0.1},
            ),
        ),
    ),
    "pfedgate_0.3": (
        (
            OFTEN,
            (
                *({**ONE_MASK, "gate_lr": gate_lr} for gate_lr in (0.1, 1, 10)),
                *({**ONE_MASK, "gate_lr": gate_lr, **SCALED} for gate_lr in (0.1, 1, 3, 10)),
                {**STEEP, "gate_start": 0.5},
                {**STEEP, "gate_start": 0.5, **SCALED},
                {**STEEP, "gate_start": 0.5, **SCALED, "mask_scope": "client"},
                *({**STEEP, **SCALED, "mask_scope": "client", "gate_lr": gate_lr} for gate_lr in (0.1, 1.5)),
                {**STEEP, "mask_scope": "client"},
                {**STEEP, **SCALED},
                *({**STEEP, **SCALED, "mask_scope": "client", "gate_lr": gate_lr} for gate_lr in (0.5, 5)),
                *({**STEEP, **SCALED, "mask_scope": "client", "lr": lr} for lr in (0.01, 0.06)),
                *({**STEEP, "mask_scope": "client", "gate_lr": gate_lr} for gate_lr in (5, 15, 50)),
                {**STEEP, **SCALED, "mask_scope": "client", "gate_lr": 15},
                *({**STEEP, "gate_lr": gate_lr} for gate_lr in (5, 15, 50, 150)),
                *({**STEEP, "gate_lr": 15, "lr": lr} for lr in (0.015, 0.06)),
            ),
        ),
    ),
}


# --- tuning ----------------------------------------------------------------------------------------------------------


def tune(names: Iterable[str], extra: Sequence[str]) -> None:
    """Accuracy on validation data for each trial that the file does not have yet; nothing sees test data."""
    found: list[dict[str, Any]] = json.loads(TUNE.read_text()) if TUNE.exists() else []
    for name in names:
        if name not in TRIALS:
            raise unknown("run to tune", name, tuple(TRIALS))
        for short, trial in ((short, trial) for short, trials in TRIALS[name] for trial in trials):
            chosen = [f"method.{key}={value}" for key, value in trial.items()]
            settings = [*RUNS[name], "evaluate.split=validation", *short, *chosen, *extra]
            if command(NAME, settings) in {t["command"] for t in found}:
                continue
            found.append({"key": name, "command": command(NAME, settings), **trial_of(settings)})
            print(json.dumps(found[-1]), flush=True)
            write(TUNE.stem, found)


def trial_of(settings: Sequence[str]) -> dict[str, Any]:
    """Mean accuracy at each point and the seconds; zeros for a rate so large that the loss is not finite."""
    start = time.perf_counter()
    try:
        scores = one_run(NAME, settings)[0]["accuracy"]
    except fedsparse.ClientError as error:
        if "training loss is" not in str(error) and "not finite" not in str(error):
            raise
        scores = {point: {"mean": 0.0} for point in POINTS}
    means = {point: scores[point]["mean"] for point in POINTS}
    return {**means, "seconds": round(time.perf_counter() - start, 1)}


# --- the runs of the table -------------------------------------------------------------------------------------------


def final(keys: Iterable[str], seeds: Iterable[int], extra: Sequence[str]) -> None:
    """Run what is not in the file yet; it is written after each run."""
    for seed in seeds:
        for key in keys:
            once(FINAL, NAME, key, seed, settings_of(key, seed, load(FINAL), extra), extra)


def settings_of(key: str, seed: int, found: list[dict[str, Any]], extra: Sequence[str]) -> list[str]:
    """The settings behind a key; a control of a run's measured share needs that run, of the same seed, in ``found``."""
    if key in RUNS:
        return list(RUNS[key])
    control = CONTROL.fullmatch(key)
    if not control:
        raise unknown("run", key, (*RUNS, "METHOD_EQUAL_SHARE", "METHOD_EQUAL_of_NAME"))
    method, equal, of, share = control.groups()
    return [f"method={method}", f"narrow={equal}", f"narrow_to={share or measured(of, equal, seed, found, extra)}"]


def measured(key: str, equal: str, seed: int, found: list[dict[str, Any]], extra: Sequence[str]) -> float:
    """The share of the dense model that run ``key`` was measured to use, in "parameters" or "multiply_adds"."""
    of = [e for e in found if e["key"] == key and e["seed"] == seed and e["extra"] == list(extra)]
    dense = [e for e in found if e["key"] == "fedavg_ft"]  # of any seed: the same model
    if not of or (equal == "multiply_adds" and not dense):
        raise UserError(f"run {key} with seed {seed} and fedavg_ft first: the control has the share that they give")
    return float(round(of[0]["density"] if equal == "parameters" else of[0]["macs"] / dense[0]["macs"], 4))


# --- the table -------------------------------------------------------------------------------------------------------


def table() -> None:
    """Markdown: mean and standard deviation over seeds; costs are those of the first seed."""
    heads = ("method", "seeds", "point", "weighted mean", "bottom decile", "p10", "noise alone", "true density")
    print_row([*heads, "up kB", "down kB", "M multiply-adds", "minutes"])
    print_row(["---"] * 12)
    found = load(FINAL)
    for name, point, entries in lines(found):
        first, cells = entries[0], [e["accuracy"][point] for e in entries]
        scores = [spread(cells, figure) for figure in ("weighted", "bottom_decile", "p10")]
        noise = f"{sum(c['bottom_decile_noise'] for c in cells) / len(cells):.3f}"
        costs = [f"{first['up'] / 1e3:.1f}", f"{first['down'] / 1e3:.1f}", f"{first['macs'] / 1e6:.2f}"]
        density, minutes = f"{first['density']:.3f}", f"{first['seconds']['wall'] / 60:.0f}"
        print_row([name, str(len(entries)), point, *scores, noise, density, *costs, minutes])
    print()
    for e in found:
        print(f"    {e['command']}")


def lines(found: list[Entry]) -> Iterator[tuple[str, str, list[Entry]]]:
    """What makes a row: its name, the point of evaluation, and the runs, one a seed."""
    for name, entries in rows(found):
        for point in POINTS:
            if entries[0]["accuracy"][point]["weighted"] is not None:
                yield name, point, entries


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=["fedavg_ft", "local"], help="keys of runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="for final")
    parser.add_argument("--set", nargs="+", default=[], help="settings for all of the runs, key=value")
    command_line(
        parser,
        {
            "tune": lambda args: tune(args.only, args.set),
            "final": lambda args: final(args.only, args.seeds, args.set),
            "table": lambda _: table(),
        },
    )


if __name__ == "__main__":
    main()
