"""The tables of personal accuracy in RESULTS.md: local, FedAvg, FedAvg-FT, pFedGate and the narrow dense controls.

    python experiments/personal.py tune  wisdm [mnist femnist]   # 8 log-uniform trials a method, validation data
    python experiments/personal.py final wisdm [mnist femnist]   # with the rates in the file; --seeds 0 1 2
    python experiments/personal.py table wisdm [mnist femnist]   # Markdown of what `final` wrote

Each run is the ``fedsparse run`` command that the table names. Results are kept in ``experiments/results/``; a run that
was interrupted lies in ``runs/unfinished/`` and goes on from its newest checkpoint when the script is called again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fedsparse
from fedsparse.experiment import load_experiment
from fedsparse.report.summary import accuracy
from fedsparse.runner import resume, run
from fedsparse.seeding import numpy_rng

HERE = Path(__file__).parent
UNFINISHED = HERE.parent / "runs" / "unfinished"
SEEDS = (0, 1, 2)
METHODS = ("local", "fedavg", "fedavg_ft", "pfedgate")
RATES = "# the best of the trials on validation data, written by `experiments/personal.py tune`"
SECOND = {"pfedgate": ("gate_lr",), "fedavg_ft": ("ft_lr",)}  # drawn together with lr
TRIALS = 8
LOW = {"lr": 0.01, "gate_lr": 0.02, "ft_lr": 0.001}
HIGH = {"lr": 2.0, "gate_lr": 2.0, "ft_lr": 0.5}
CONTROLS = (
    ("fedavg_ft", "parameters"),
    ("fedavg_ft", "multiply_adds"),
    ("local", "parameters"),
    ("local", "multiply_adds"),
)


def one_run(name: str, settings: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the file ``name`` once: the summary and the rows of the clients. What was interrupted goes on."""
    experiment = load_experiment(HERE / f"{name}.toml", settings)
    folder = UNFINISHED / hashlib.sha256(repr(experiment).encode()).hexdigest()[:16]
    try:
        if any(folder.glob("checkpoint/*")) and not (folder / "summary.json").exists():
            done = resume(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            done = run(experiment, out=folder)
    except fedsparse.ClientError:  # it would come again
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return done.summary, done.clients


def command(name: str, settings: Sequence[str]) -> str:
    return " ".join(["fedsparse run", f"experiments/{name}.toml", *(f"--set {s}" for s in settings)])


# --- tuning ----------------------------------------------------------------------------------------------------------


def trials(method: str, number: int) -> Iterator[dict[str, float]]:
    """Log-uniform draws, the same for every data set."""
    rng = numpy_rng("tune", method)
    names = ["lr", *SECOND.get(method, ())]
    for _ in range(number):
        yield {n: round(float(np.exp(rng.uniform(np.log(LOW[n]), np.log(HIGH[n])))), 4) for n in names}


def tune(dataset: str, methods: Sequence[str], number: int) -> None:
    """Mean personal accuracy on validation data for each trial; nothing sees test data."""
    kept = HERE / "results" / f"{dataset}_tune.json"
    found: dict[str, list[dict[str, float]]] = json.loads(kept.read_text()) if kept.exists() else {}
    for method in methods:
        found[method] = []
        for trial in trials(method, number):
            settings = [f"method={method}", "evaluate.split=validation", *(f"method.{k}={v}" for k, v in trial.items())]
            start = time.perf_counter()
            try:
                value = one_run(f"{dataset}_personal", settings)[0]["accuracy"]["personal"]["mean"]
            except fedsparse.ClientError as error:
                if "training loss is" not in str(error) and "not finite" not in str(error):
                    raise
                print(f"  {error}")  # a rate so large that the loss is not finite
                value = 0.0
            found[method].append({**trial, "accuracy": value})
            print(f"{dataset} {method} {trial} {value:.4f} ({time.perf_counter() - start:.0f} s)", flush=True)
        best = max(found[method], key=lambda t: t["accuracy"])
        print(f"{dataset} {method} best: {best}", flush=True)
        write(f"{dataset}_tune", found)
    set_rates(dataset, {method: max(found[method], key=lambda t: t["accuracy"]) for method in found})


def set_rates(dataset: str, best: dict[str, dict[str, float]]) -> None:
    """Write the best trials at the end of the experiment's file."""
    path = HERE / f"{dataset}_personal.toml"
    text = path.read_text().split(RATES)[0].rstrip() + f"\n\n{RATES}\n"
    for method, trial in best.items():
        text += f"\n[method.{method}]\n" + "".join(f"{k} = {v}\n" for k, v in trial.items() if k != "accuracy")
    path.write_text(text)


# --- the runs of a table ---------------------------------------------------------------------------------------------


def final(dataset: str, seeds: Sequence[int], methods: Sequence[str] = METHODS) -> None:
    """The runs of a data set's table, seed by seed; those of other seeds and methods that the file has stay in it.

    The narrow dense controls need a dense run and pFedGate's: they follow where all of ``METHODS`` run.
    """
    kept = HERE / "results" / f"{dataset}_final.json"
    found: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    found = [e for e in found if e["seed"] not in seeds or e["method"] not in methods]
    for seed in seeds:
        shares: dict[float, dict[str, float]] = {}
        dense: dict[str, float] = {}
        for method in methods:
            found.append(entry(dataset, method, seed, [f"method={method}", f"seed={seed}"]))
            if method == "local":
                dense = found[-1]["all"]
            if method == "pfedgate":
                shares = {t["tier"]: t for t in found[-1]["tiers"] if t["tier"] != 1.0}
            write(f"{dataset}_final", found)
        for method, equal in CONTROLS if set(methods) == set(METHODS) else ():
            for tier, cost in shares.items():
                share = round(cost["density"] if equal == "parameters" else cost["macs"] / dense["macs"], 4)
                settings = [f"method={method}", f"seed={seed}", f"narrow={equal}", f"narrow_to={share}"]
                found.append(control(dataset, method, seed, settings, control=equal, of_tier=tier))
                write(f"{dataset}_final", found)


def control(dataset: str, method: str, seed: int, settings: list[str], **extra: Any) -> dict[str, Any]:
    """A narrow control; where the wide model's rate is too large for it, with half of it, as the command then says."""
    try:
        return entry(dataset, method, seed, settings, **extra)
    except fedsparse.ClientError as error:
        if "training loss is" not in str(error) and "not finite" not in str(error):
            raise
        lr = float(load_experiment(HERE / f"{dataset}_personal.toml", settings).hyper["lr"]) / 2
        print(f"  {error}; again with lr {lr:g}")
        return entry(dataset, method, seed, [*settings, f"method.lr={lr:g}"], **extra)


def entry(dataset: str, method: str, seed: int, settings: Sequence[str], **extra: Any) -> dict[str, Any]:
    start = time.perf_counter()
    summary, rows = one_run(f"{dataset}_personal", settings)
    groups = {t["density_budget"]: [r for r in rows if r["tier"] == t["density_budget"]] for t in summary["tiers"]}
    whole = figures(summary, rows)
    print(
        f"{dataset} {seed} {' '.join(settings)}: {whole['mean']:.4f} ({time.perf_counter() - start:.0f} s)", flush=True
    )
    return {
        "method": method,
        "seed": seed,
        "command": command(f"{dataset}_personal", settings),
        "digest": summary["digest"],
        **extra,
        "rounds": summary["rounds"],
        "clients": summary["clients"],
        "all": whole,
        "tiers": [
            {"tier": tier, **figures(cost, groups[tier])} for tier, cost in zip(groups, summary["tiers"], strict=True)
        ],
    }


def figures(cost: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    scores = accuracy(rows, "personal")
    return {
        "mean": scores["mean"],
        "bottom_decile": scores["bottom_decile"],
        "noise": scores["bottom_decile_noise"],
        "local": accuracy(rows, "local")["mean"],
        "global": accuracy(rows, "global")["weighted"],
        "density": cost["density"]["true_mean"],
        "density_max": cost["density"]["true_max"],
        "up": cost["bytes"]["up_per_client_round"],
        "down": cost["bytes"]["down_per_client_round"],
        "macs": cost["flops"]["inference_per_sample"] / 2,
    }


# --- the table -------------------------------------------------------------------------------------------------------


def table(dataset: str) -> None:
    """Markdown: mean and standard deviation over seeds; costs are those of seed 0."""
    found = json.loads((HERE / "results" / f"{dataset}_final.json").read_text())
    heads = ("method", "clients of tier", "personal accuracy", "bottom decile", "noise alone", "true density")
    print_row([*heads, "up kB", "down kB", "k multiply-adds"])
    print_row(["---"] * 9)
    for name, tier, entries in lines(found):
        cells = [e["all"] if tier is None else next(t for t in e["tiers"] if t["tier"] == tier) for e in entries]
        first, noise = cells[0], np.mean([c["noise"] for c in cells])
        scores = [spread(cells, "mean"), spread(cells, "bottom_decile"), f"{noise:.3f}", f"{first['density']:.3f}"]
        costs = [f"{first[key] / 1e3:.1f}" for key in ("up", "down", "macs")]
        print_row([name, "all" if tier is None else f"{tier:g}", *scores, *costs])
    print()
    for e in found:
        if e["seed"] == found[0]["seed"]:
            print(f"    {e['command']}")


def print_row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |")


def lines(found: list[dict[str, Any]]) -> Iterator[tuple[str, float | None, list[dict[str, Any]]]]:
    plain = [e for e in found if "control" not in e]
    tiers = [t["tier"] for t in plain[0]["tiers"]]
    for tier in (None, *tiers):
        for method in METHODS:
            entries = [e for e in plain if e["method"] == method]
            if entries:
                yield method, tier, entries
        for method, equal in CONTROLS:
            entries = [e for e in found if e.get("control") == equal and e["method"] == method and e["of_tier"] == tier]
            if entries:
                yield f"{method}, narrow, equal {equal.replace('_', '-')}", tier, entries


def spread(cells: list[dict[str, Any]], name: str) -> str:
    values = [c[name] for c in cells]
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def write(name: str, content: Any) -> None:
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("tune", "final", "table"))
    parser.add_argument("datasets", nargs="+")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="which methods; the rates and runs of others are kept"
    )
    parser.add_argument("--trials", type=int, default=TRIALS, help="for tune: the first so many of the draws")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="for final")
    args = parser.parse_args()
    for dataset in args.datasets:
        if args.what == "tune":
            tune(dataset, args.methods.split(","), args.trials)
        elif args.what == "final":
            final(dataset, args.seeds, args.methods.split(","))
        else:
            table(dataset)


if __name__ == "__main__":
    main()
