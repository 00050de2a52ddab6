"""An experiment -> an engine -> a run directory. All that the command line does goes through ``run``."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsparse.budget import Dense, assign, narrow_width
from fedsparse.client import client_app
from fedsparse.cost import forward_macs, memory_bytes, trace, train_flops
from fedsparse.data import FederatedData, federate, load_dataset
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import ClientError, UserError, unknown
from fedsparse.experiment import Experiment, toml_text
from fedsparse.method import Method, build, hyper_parameters, load_method
from fedsparse.models import build_model
from fedsparse.packet import Packet, decode
from fedsparse.report.page import page
from fedsparse.report.summary import Facts, summarise
from fedsparse.seeding import seed_of
from fedsparse.sgd import optimizer_copies
from fedsparse.sparse.representation import crossovers, prepare, why_dense
from fedsparse.strategy import FederatedStrategy, Plan, State
from fedsparse.task import Client, Score, Split, Task

OnRound = Callable[[dict[str, Any]], None]
_BITS = ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")  # environment that changes the bits of a result
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EIO)
_PACKAGES = ("fedsparse", "torch", "numpy", "numba", "flwr")
_BIG = 2**31 - 1  # a whole number that takes as many bytes as any count of examples
_FACTS = ("weight", "samples", "local.n", "local.correct")  # what every reply carries, in whole numbers ...
_TIMES = ("loss", "train_seconds", "local.loss", "local_seconds")  # ... and in others
_log = logging.getLogger("fedsparse")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, ``summary.json``, the lines of ``rounds.jsonl``, the rows of ``clients.parquet``,
    the server's final state and each client's memory."""

    directory: Path
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    clients: list[dict[str, Any]]
    state: State
    memories: dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class Federation:
    """What an experiment trains: the task, the clients with their data and budgets, what was noted on the way, the
    server's own examples, and the ids of the clients that take no part in training."""

    task: Task
    clients: tuple[Client, ...]
    model: str
    notes: tuple[str, ...]
    server: Split | None = None
    novel: tuple[int, ...] = ()

    @property
    def participants(self) -> tuple[Client, ...]:
        """The clients that take part in training."""
        novel = set(self.novel)
        return tuple(client for client in self.clients if client.id not in novel)


def run(experiment: Experiment, *, out: Path | str | None = None, on_round: OnRound | None = None) -> Run:
    """Run an experiment and write its run directory (``out``, or a new one under ``runs/``).

    on_round: called after each round with its line of ``rounds.jsonl``. Raises UserError (one line) for whatever the
    user can mend; a run that fails or is interrupted leaves no ``summary.json``.
    """
    start = time.perf_counter()
    method = load_method(experiment.method, experiment.client)
    strategy = build(method, experiment.hyper)
    hyper = strategy.client_config
    federation = federation_of(experiment, masked_batch=_batch(hyper) if strategy.masked else 0, config=hyper)
    devices = [client.device for client in federation.clients]
    strategy.server_data = federation.server
    strategy.server_source = "public" if experiment.partition.public else "holdout"
    task, rounds, plan = federation.task, experiment.rounds, _plan(experiment, federation.novel)
    state = strategy.first_state(task, devices, plan, rounds)  # refuses what cannot be met before anything is written
    federation = _noted(federation, strategy.notes(task, devices))
    directory = _new_directory(experiment, method.name, out)
    record = _Recorder(directory, federation, on_round)
    with _errors_to(directory):
        config = _config(experiment, method, federation)
        _write(directory / "config.toml", config)
        app = client_app(task, federation.clients.__getitem__)
        with LocalGrid(app, len(devices), workers=experiment.engine.workers, own_replies=False) as grid:
            strategy.start(grid, num_rounds=rounds, task=task, devices=devices, plan=plan, state=state, on_round=record)
            novel = strategy.onboard(grid) if federation.novel else None
            memories = {i: dict(decode(state).tensors) for i, state in sorted(grid.states().items()) if len(state)}
        wall = time.perf_counter() - start
        if novel and novel.errors:
            _write(directory / "client_error.txt", novel.errors[0].trace)
        _save_tensors(directory / "final.safetensors", strategy.state, memories)
        _save_rows(directory / "clients.parquet", record.rows)
        facts = _facts(experiment, method.name, federation, strategy, len(record.rounds), memories, wall)
        masks = strategy.diagnose(task, strategy.state, federation.participants, memories)
        summary = summarise(facts, record.rounds, record.rows, novel, masks)
        _write(directory / "report.html", page(summary, record.rounds, config, str(directory)))
        _write(directory / "summary.json", json.dumps(summary, indent=1) + "\n")  # last: it marks the run as complete
    return Run(directory, summary, record.rounds, record.rows, strategy.state, memories)


class _Recorder:
    """Takes the report of each round: a line of ``rounds.jsonl``, rows for ``clients.parquet``, the user's callback."""

    def __init__(self, directory: Path, federation: Federation, on_round: OnRound | None) -> None:
        self.rounds: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self._directory = directory
        self._path = directory / "rounds.jsonl"
        self._federation = federation
        self._on_round = on_round

    def __call__(self, report: dict[str, Any]) -> None:
        self.rows.extend(_plain_row(row, self._federation) for row in report.pop("rows"))
        self.rounds.append(report)
        for text in report.pop("traces"):
            _write(self._directory / "client_error.txt", text)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")
        if self._on_round:
            self._on_round(report)


# --- what is trained -------------------------------------------------------------------------------------------------


def federation_of(
    experiment: Experiment, *, masked_batch: int = 0, config: Mapping[str, Any] | None = None
) -> Federation:
    """Load and partition the data, build the model (initial parameters fixed by the seed), assign the budgets.

    masked_batch: the largest batch of clients that train under an element mask, 0 = none do. Then the representation of
    each layer is chosen here, once for the run. config: the client half's hyper-parameters, on which memory depends.
    """
    data = federate(load_dataset(experiment.dataset), experiment.partition, experiment.seed)
    model_name = experiment.model or data.default_model
    if experiment.device == "cuda":
        raise UserError('device \'cuda\' is not supported yet; use "cpu" or "auto" (which is the cpu, for now)')
    task, notes = _task(experiment, data, model_name)
    if masked_batch or experiment.sparse != "auto":
        notes = (*notes, *_choose_representation(experiment, task, masked_batch))
    devices = assign(experiment.budget, range(len(data.clients)), lambda: _dense(task, config or {}))
    clients = tuple(
        Client(devices[i], c.train, c.validation, c.test, experiment.evaluate.split) for i, c in enumerate(data.clients)
    )
    if experiment.budget.tiers and experiment.budget.of != "parameters":
        notes = (*notes, f"budgets are shares of the dense model's {experiment.budget.of.replace('_', '-')}")
    if any(device.budget.seconds for device in devices.values()):
        notes = (*notes, "budgets of seconds bind nothing yet: there is no simulated clock")
    return Federation(task, clients, model_name, (*data.notes, *notes), data.server, data.novel)


def _noted(federation: Federation, notes: Sequence[str]) -> Federation:
    """The federation with a method's notes, which are logged at once: the run may be long."""
    for note in notes:
        _log.info("%s", note)
    return replace(federation, notes=(*federation.notes, *notes))


def _dense(task: Task, config: Mapping[str, Any]) -> Dense:
    """What the dense reference model costs. An upload is FedAvg's reply, with the numbers that every reply carries."""
    layers = trace(task.reference, task.input_shape, tokens=task.tokens)
    facts = {**dict.fromkeys(_FACTS, _BIG), **dict.fromkeys(_TIMES, 0.0)}
    memory = memory_bytes(layers, _batch(config), optimizer_copies=optimizer_copies(config)).total
    return Dense(forward_macs(layers), Packet("update", _floats(task.reference), facts).nbytes, memory)


def _floats(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the shapes of a model's parameters and buffers, for counting bytes."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: torch.empty(t.shape) for name, t in named if t.is_floating_point()}


def _choose_representation(experiment: Experiment, task: Task, batch: int) -> tuple[str, ...]:
    """Fix from which density on each layer is computed masked dense; a note where all of the model is."""
    reason = why_dense(task.model, task.input_shape)
    if reason:
        if experiment.sparse == "sparse":
            raise UserError(f'sparse = "sparse" is not possible for this model: {reason}; use "auto" or "dense"')
        return () if experiment.sparse == "dense" else (f"all layers are computed masked dense: {reason}",)
    if batch:
        chosen = prepare(task.model, task.input_shape, experiment.sparse, batch, experiment.crossover)
    else:  # the driver does not know whether there will be masks: what was asked for holds all the same
        chosen = crossovers(task.model, task.input_shape, experiment.sparse, batch)
    for name in experiment.crossover:
        if name not in chosen:
            raise unknown("layer in [crossover]", name, chosen)
    task.crossover = chosen
    return ()


def _batch(config: Mapping[str, Any]) -> int:
    return int(config.get("batch_size", 32))


def _task(experiment: Experiment, data: FederatedData, name: str) -> tuple[Task, tuple[str, ...]]:
    def make(width: float) -> nn.Module:
        return build_model(
            name, data.input_shape, data.classes, width=width, norm=experiment.norm, vocabulary=data.vocabulary
        )

    width = experiment.width
    notes: tuple[str, ...] = ()
    with torch.device("meta"):
        reference = make(width)
    if experiment.narrow:
        factor, share = narrow_width(
            lambda w: make(w * experiment.width),
            data.input_shape,
            tokens=data.vocabulary > 0,
            equal=experiment.narrow,
            target=experiment.narrow_to,
        )
        width *= factor
        notes = (
            f"narrowed to width {width:.4g}: {share:.4g} of the dense model's {experiment.narrow.replace('_', '-')}",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(experiment.seed, "model"))  # torch's own initialisers know no other generator
        model = make(width)
    return Task(model, data.input_shape, data.classes, experiment.seed, data.vocabulary, reference), notes


def _plan(experiment: Experiment, novel: tuple[int, ...]) -> Plan:
    return Plan(
        seed=experiment.seed,
        fraction=experiment.fraction,
        evaluate_every=experiment.evaluate.every,
        evaluate_fraction=experiment.evaluate.fraction,
        on_client_error=experiment.engine.on_client_error,
        min_replies=experiment.engine.min_replies,
        on_over_budget=experiment.budget.on_over_budget,
        novel=novel,
    )


def digest(state: State, memories: Mapping[int, Mapping[str, Tensor]]) -> str:
    """A SHA-256 of the final parameters and all client memories, bit for bit."""
    sha = hashlib.sha256()
    for owner, tensors in (("state", state.tensors()), *((str(i), memories[i]) for i in sorted(memories))):
        for name in sorted(tensors):
            t = tensors[name].contiguous().cpu()
            sha.update(f"{owner}/{name} {t.dtype} {tuple(t.shape)}\n".encode())
            sha.update(t.view(torch.uint8).numpy().data if t.numel() and t.dim() else t.numpy().tobytes())
    return sha.hexdigest()


# --- the run directory -----------------------------------------------------------------------------------------------


def _new_directory(experiment: Experiment, method: str, out: Path | str | None) -> Path:
    if out is None:
        out = _free(Path("runs"), experiment.name or f"{Path(experiment.dataset).stem}_{method}_seed{experiment.seed}")
    directory = Path(out)
    try:
        directory.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"output folder {str(directory)!r} exists; name another with --out or remove it") from error
    except OSError as error:
        raise UserError(f"output folder {str(directory)!r} cannot be made: {error.strerror}") from error
    return directory


def _free(parent: Path, name: str) -> Path:
    """``parent/name``, or with the first free number behind it."""
    path, number = parent / name, 2
    while path.exists():
        path, number = parent / f"{name}-{number}", number + 1
    return path


@contextmanager
def _errors_to(directory: Path) -> Iterator[None]:
    """A failing client's own traceback goes to ``client_error.txt``; a disk that fails is one clear line."""
    try:
        yield
    except ClientError as error:
        if error.trace:
            _write(directory / "client_error.txt", error.trace)
        raise
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(f"run folder {str(directory)!r} cannot be written: {error.strerror or error}") from error


def _write(path: Path, text: str) -> None:
    """Write a whole file or nothing: to a temporary name, flushed to disk, then renamed."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _config(experiment: Experiment, method: Method, federation: Federation) -> str:
    """The experiment with every default filled in, and what it was run with."""
    hyper = {**hyper_parameters(method), **experiment.hyper}
    crossover = federation.task.crossover if experiment.sparse == "auto" else {}
    resolved = replace(experiment, model=federation.model, crossover=crossover).to_dict()
    resolved["method"] = {"name": experiment.method, experiment.method: hyper}  # under its name: of no other method
    facts = {
        "clients": len(federation.clients),
        "notes": list(federation.notes),
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "commit": _commit(),
        **{name: version(name) for name in _PACKAGES if name != "numba" or find_spec(name)},
        **{name: os.environ[name] for name in _BITS if name in os.environ},
    }
    return toml_text(resolved) + "\n" + toml_text({"resolved": facts})


def _commit() -> str:
    """The git commit of the source, "" outside a checkout."""
    with suppress(OSError, subprocess.SubprocessError):
        home = Path(__file__).resolve().parents[1]
        if (home / ".git").exists():
            done = subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=home, capture_output=True, text=True, timeout=5, check=False
            )
            return done.stdout.strip()
    return ""


def _plain_row(row: Mapping[str, Any], federation: Federation) -> dict[str, Any]:
    """A row of ``clients.parquet``: scores become accuracies, beside the number of examples they stand on."""
    client = federation.clients[row["client"]]
    plain = {k: v for k, v in row.items() if not k.startswith("_")}
    names = {"local", "personal", "global"} | {name for name, value in row.items() if isinstance(value, Score)}
    for name in sorted(names):
        score: Score | None = row[name]
        known = score is not None and score.n > 0
        plain[name] = score.correct / score.n if score is not None and known else None
        plain[f"{name}_loss"] = score.loss if score is not None and known else None
    return plain | {"n_train": len(client.train), "n_test": len(client.held_out)}


def _save_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = path.with_name(path.name + ".part")
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), part)
    part.replace(path)


def _save_tensors(path: Path, state: State, memories: Mapping[int, Mapping[str, Tensor]]) -> None:
    from safetensors.torch import save_file

    named = {f"state/{name}": t for name, t in state.tensors().items()}
    named |= {f"client/{i}/{name}": t for i, memory in memories.items() for name, t in memory.items()}
    part = path.with_name(path.name + ".part")
    save_file({name: t.contiguous().clone() for name, t in named.items()}, part)
    part.replace(path)


def _facts(
    experiment: Experiment,
    method: str,
    federation: Federation,
    strategy: FederatedStrategy,
    rounds: int,
    memories: Mapping[int, Mapping[str, Tensor]],
    wall: float,
) -> Facts:
    """What the summary says that is in no row."""
    task, clients, config = federation.task, federation.participants, strategy.client_config
    samples = sum(len(c.train) for c in clients) / len(clients) * int(config.get("epochs", 1))
    return Facts(
        method=method,
        dataset=experiment.dataset,
        model=federation.model,
        engine=experiment.engine.kind,
        seed=experiment.seed,
        split=experiment.evaluate.split,
        rounds=rounds,
        clients=len(clients),
        wall=wall,
        digest=digest(strategy.state, memories),
        budget_of=experiment.budget.of,
        dense_bytes=Packet("train", _floats(task.reference)).nbytes,
        dense_flops=train_flops(trace(task.reference, task.input_shape, tokens=task.tokens), round(samples)),
        server_flops=strategy.server_flops(task, strategy.state),
        dense_memory=_dense(task, config).memory,
        notes=federation.notes,
    )
