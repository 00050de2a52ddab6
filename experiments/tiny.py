"""The tables of methods with one global mask in RESULTS.md: CIFAR-10, ResNet18 at a quarter of its width, ten clients.

    python experiments/tiny.py tune                                   # learning rates, on validation data
    python experiments/tiny.py final --densities 0.01 --only fedtiny snip --seeds 0 1 2
    python experiments/tiny.py table                                  # Markdown of what `final` wrote
    python experiments/tiny.py costs --densities 0.01                 # of one client at full width, in three rounds

Runs that ``experiments/results/tiny_final.json`` has already are skipped. ``dense`` is FedAvg on the whole model,
``narrow_parameters`` and ``narrow_multiply_adds`` FedAvg on narrow ones of as many parameters or multiply-adds as the
run ``erk`` of the same density and seed was measured to use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

from kept import Entry, command_line, load, once, rows
from personal import command, one_run, print_row, spread, write

import fedsparse
from fedsparse.errors import UserError, unknown

NAME, FINAL, TUNE, COSTS = "cifar10_fedtiny", "tiny_final", "tiny_tune", "tiny_costs"
DENSITIES = (0.01, 0.05, 0.1)
METHODS: dict[str, tuple[str, ...]] = {
    "erk": ("method=fixed_mask",),
    "uniform": ("method=fixed_mask", "method.layer_densities=uniform", "method.criterion=magnitude"),
    "snip": ("method=snip",),
    "synflow": ("method=synflow",),
    "ssfl": ("method=ssfl",),
    "prunefl": ("method=prunefl",),
    "prunefl_top": ("method=prunefl", "method.variant=top", "method.initial=magnitude"),
    "feddst": ("method=feddst",),
    "fedtiny": ("method=fedtiny",),
    "fedtiny_erk": ("method=fedtiny", "method.layer_densities=erk"),
    "fedtiny_erk_fixed": ("method=fedtiny", "method.layer_densities=erk", "method.progressive=false"),
    "fedtiny_vanilla": ("method=fedtiny", "method.selection=vanilla"),
    "fedtiny_fixed": ("method=fedtiny", "method.progressive=false"),
    "fedtiny_vanilla_fixed": ("method=fedtiny", "method.selection=vanilla", "method.progressive=false"),
}
NARROW = ("narrow_parameters", "narrow_multiply_adds")
DENSE_LR = 0.1
RATES = (0.02, 0.05, 0.1)
FULL = ("width=1", "rounds=3", "partition.max_clients=1", "evaluate.every=3")
CHANGING = ("method.delta_r=1", "method.r_stop=3")
SHORT = ("rounds=30", "evaluate.every=3", "evaluate.split=validation")


def settings_of(method: str, density: float, seed: int) -> list[str]:
    """The settings of a run; those of a narrow control need the run ``erk`` of the same density and seed."""
    if method == "dense":
        return ["method=fedavg", f"method.lr={DENSE_LR:g}"]
    if method in NARROW:
        equal = method.removeprefix("narrow_")
        narrow_to = f"narrow_to={share_of(equal, density, seed)}"
        return ["method=fedavg", f"narrow={equal}", narrow_to, f"method.lr={DENSE_LR:g}"]
    if method not in METHODS:
        raise unknown("method", method, ("dense", *NARROW, *METHODS))
    pool = [f"method.pool={max(2, round(0.1 / density))}"] if method.startswith("fedtiny") else []
    return [*METHODS[method], f"method.density={density:g}", *pool]


def share_of(equal: str, density: float, seed: int) -> float:
    """The share of the dense model's "parameters" or "multiply_adds" that the run ``erk`` uses."""
    found = load(FINAL)
    erk = [e for e in found if e["key"] == key_of("erk", density) and e["seed"] == seed]
    dense = [e for e in found if e["key"] == "dense"]  # of any seed: the same model
    if not erk or not dense:
        raise UserError(f"run dense and erk at {density:g} with seed {seed} first: the control has the share they give")
    return float(round(erk[0]["density"] if equal == "parameters" else erk[0]["macs"] / dense[0]["macs"], 4))


def key_of(method: str, density: float) -> str:
    return method if method == "dense" else f"{method} {density:g}"


def tune(methods: Iterable[str], densities: Iterable[float], rates: Sequence[float], extra: Sequence[str]) -> None:
    """Global accuracy on validation data after half of the rounds, for each rate; nothing sees test data."""
    found: list[dict[str, Any]] = load(TUNE)
    for density in densities:
        for method in methods:
            for lr in rates:
                settings = [*settings_of(method, density, 0), *SHORT, f"method.lr={lr:g}", *extra]
                line = command(NAME, settings)
                if line not in {t["command"] for t in found}:
                    trial = {"key": key_of(method, density), "lr": lr, "command": line, "accuracy": trial_of(settings)}
                    found.append(trial)
                    print(json.dumps(trial), flush=True)
                    write(TUNE, found)


def trial_of(settings: Sequence[str]) -> float:
    try:
        return deployed_accuracy(one_run(NAME, settings)[0])
    except fedsparse.ClientError as error:
        if "not finite" not in str(error) and "training loss is" not in str(error):
            raise
        return 0.0  # a rate so large that the loss is not finite


def deployed_accuracy(found: Entry) -> float:
    """On all test examples: of the one model, or of the clients' own where there is no such."""
    scores = found["accuracy"]
    return float(scores["personal"]["weighted"] if scores["global"]["mean"] is None else scores["global"]["mean"])


def final(methods: Iterable[str], densities: Iterable[float], seeds: Iterable[int], extra: Sequence[str]) -> None:
    """Run what is not in the file yet; it is written after each run."""
    for seed in seeds:
        for density in densities:
            for method in methods:
                once(FINAL, NAME, key_of(method, density), seed, settings_of(method, density, seed), extra)


def table() -> None:
    """Markdown: mean and standard deviation over seeds; costs are those of the first seed, selection included."""
    heads = ("method and nominal density", "seeds", "accuracy", "true density", "up kB", "down kB", "MB in all")
    print_row([*heads, "largest round GFLOP", "preparation GFLOP", "TFLOP in all", "memory MB", "minutes"])
    print_row(["---"] * 12)
    found = load(FINAL)
    for name, entries in rows(found):
        first = entries[0]
        total = sum(first["bytes"][key] for key in ("up_total", "down_total"))
        scores = spread([{"deployed": deployed_accuracy(e)} for e in entries], "deployed")
        print_row(
            [
                name,
                str(len(entries)),
                scores,
                f"{first['density']:.4f}",
                f"{first['up'] / 1e3:.1f}",
                f"{first['down'] / 1e3:.1f}",
                f"{total / 1e6:.1f}",
                f"{first['flops']['max_per_client_round'] / 1e9:.0f}",
                f"{(first['flops']['max_preparation'] or 0) / 1e9:.0f}",
                f"{first['flops']['total'] / 1e12:.2f}",
                f"{first['peak_model_bytes'] / 1e6:.1f}",
                f"{first['seconds']['wall'] / 60:.0f}",
            ]
        )
    print()
    for e in found:
        print(f"    {e['command']}")


# --- costs at full width ---------------------------------------------------------------------------------------------


def costs(methods: Iterable[str], densities: Iterable[float], extra: Sequence[str]) -> None:
    """What a round costs one client: three rounds of the first client alone. Where the mask changes it does so after
    the first and the second. Runs that ``experiments/results/tiny_costs.json`` has already are skipped.

    ``prunefl`` trains the dense model first, for up to 1,000 steps. Raises UserError for the narrow controls, whose
    width comes from runs at another one.
    """
    print_row(["method and nominal density", "true density", "up kB", "down kB", "GFLOP an example", "memory MB"])
    print_row(["---"] * 6)
    for density, method in dict.fromkeys((0 if m == "dense" else d, m) for d in densities for m in methods):
        if method in NARROW:
            raise UserError(f"costs are of {', '.join(('dense', *METHODS))}; got {method}")
        settings = [*settings_of(method, density, 0), *FULL, *(CHANGING if changes(method) else ()), *extra]
        line, found = command(NAME, settings), load(COSTS)
        if line not in {c["command"] for c in found}:
            found.append({"key": key_of(method, density), "command": line, **costs_of(settings)})
            write(COSTS, found)
        print_costs(next(c for c in found if c["command"] == line))
    print()
    for c in load(COSTS):
        print(f"    {c['command']}")


def changes(method: str) -> bool:
    """Whether the mask of a method of METHODS changes while it trains."""
    return method.startswith(("prunefl", "feddst", "fedtiny")) and not method.endswith("_fixed")


def costs_of(settings: Sequence[str]) -> dict[str, Any]:
    """Least and largest of the training rounds; memory is the largest of all rounds, preparation too.

    The first download of a mask has it beside the values.
    """
    summary, clients = one_run(NAME, settings)
    rounds = [row for row in clients if row["round"] and row["bytes_up"] is not None]
    known = {
        "up": [row["bytes_up"] for row in rounds],
        "down": [row["bytes_down"] for row in rounds],
        "flops": [row["flops"] / row["n_train"] for row in rounds],
    }
    ends = {name: [min(values), max(values)] for name, values in known.items()}
    memory = summary["memory"]["peak_model_bytes"]
    return {**ends, "memory": memory, "density": summary["density"]["true_mean"], "seconds": summary["seconds"]["wall"]}


def print_costs(found: dict[str, Any]) -> None:
    ends = {
        name: [f"{value / unit:.{digits}f}" for value in found[name]]
        for name, unit, digits in (("up", 1e3, 0), ("down", 1e3, 0), ("flops", 1e9, 3))
    }
    spans = [a if a == b else f"{a} to {b}" for a, b in ends.values()]
    print_row([found["key"], f"{found['density']:.4f}", *spans, f"{found['memory'] / 1e6:.0f}"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=["dense", *METHODS, *NARROW], help="methods")
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES), help="nominal")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates, for tune")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="for final")
    parser.add_argument("--set", nargs="+", default=[], help="settings for all of the runs, key=value")
    command_line(
        parser,
        {
            "tune": lambda args: tune(args.only, args.densities, args.rates, args.set),
            "final": lambda args: final(args.only, args.densities, args.seeds, args.set),
            "table": lambda _: table(),
            "costs": lambda args: costs(args.only, args.densities, args.set),
        },
    )


if __name__ == "__main__":
    main()
