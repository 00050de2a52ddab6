"""An experiment -> an engine -> a run directory. All that the command line does goes through ``run``."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedsparse.budget import Dense, assign, narrow_width
from fedsparse.checkpoint import CLIENTS, Checkpoint, Checkpoints, packed, unpacked
from fedsparse.client import client_app
from fedsparse.cost import forward_macs, memory_bytes, trace, train_flops
from fedsparse.data import FederatedData, federate, load_dataset
from fedsparse.devices import compute_device
from fedsparse.engine.flower import FlowerGrid
from fedsparse.engine.grid import OwnGrid
from fedsparse.engine.local import LocalGrid
from fedsparse.engine.store import MemoryStore, sync
from fedsparse.errors import ClientError, UserError, unknown
from fedsparse.events import EVENTS, Events
from fedsparse.experiment import Experiment, from_dict, load_experiment, toml_text
from fedsparse.final import FINAL, FinalMemories, Memories, save_final
from fedsparse.method import Method, build, hyper_parameters, load_method
from fedsparse.models import build_model
from fedsparse.packet import Packet
from fedsparse.report.page import page
from fedsparse.report.summary import Facts, summarise
from fedsparse.rows import Onboarding
from fedsparse.seeding import seed_of
from fedsparse.sgd import optimizer_copies
from fedsparse.sources import BITS
from fedsparse.sparse.representation import crossovers, prepare, why_dense
from fedsparse.strategy import FederatedStrategy, Plan, State
from fedsparse.task import Client, Score, Split, Task

OnRound = Callable[[dict[str, Any]], None]
OnFlower = Callable[[str, int, MemoryStore, int], FlowerGrid]  # config.toml, clients, store, bytes a memory -> the grid
_ROWS = "clients.jsonl"  # the clients' rows while the run goes on; then they are ``clients.parquet``
_HISTORY = ("rounds.jsonl", _ROWS)
_LOCK = ".lock"  # who writes into a run folder holds it
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_ERRORS = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EIO)
_PACKAGES = ("fedsparse", "torch", "numpy", "numba", "flwr")
_MEMORY_BYTES, _MEMORY_MODELS = 64 << 20, 16  # a memory from elsewhere: so many bytes and dense models at most
_BIG = 2**31 - 1  # a whole number that takes as many bytes as any count of examples
_FACTS = ("weight", "samples", "local.n", "local.correct")  # what every reply carries, in whole numbers ...
_TIMES = ("loss", "train_seconds", "local.loss", "local_seconds")  # ... and in others
_log = logging.getLogger("fedsparse")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, ``summary.json``, the lines of ``rounds.jsonl``, the rows of ``clients.parquet``,
    the server's final state and each client's memory (with ``engine.memory_mb`` it is read from the folder)."""

    directory: Path
    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    clients: list[dict[str, Any]]
    state: State
    memories: Mapping[int, dict[str, Tensor]]


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


def run(
    experiment: Experiment,
    *,
    out: Path | str | None = None,
    on_round: OnRound | None = None,
    on_flower: OnFlower | None = None,
) -> Run:
    """Run an experiment and write its run directory (``out``, or a new one under ``runs/``).

    on_round: called after each round with its line of ``rounds.jsonl``. on_flower: makes the grid of a run in Flower's
    own runtime (``engine.kind = "flower"``). Raises UserError (one line) for whatever the user can mend; a run that
    fails or is interrupted leaves no ``summary.json``.
    """
    start = time.perf_counter()
    _check_engine(experiment, on_flower)
    job = _job(experiment)
    directory = _new_directory(experiment, job.method.name, out)
    with _errors_to(directory):
        _write(directory / "config.toml", _config(experiment, job.method, job.federation))
    with _alone(directory), Events() as events:
        return _carried_out(job, directory, on_round, start, None, events, on_flower)


def _check_engine(experiment: Experiment, on_flower: OnFlower | None) -> None:
    if experiment.engine.kind == "flower" and on_flower is None:
        raise UserError("engine 'flower' is what `flwr run` uses; choose another here, such as --engine local")


def resume(
    directory: Path | str,
    *,
    engine: str = "",
    workers: int = 0,
    on_round: OnRound | None = None,
    on_flower: OnFlower | None = None,
) -> Run:
    """Go on with a run that was interrupted, from its newest checkpoint that is whole, to the same digest.

    engine, workers: other than the run had; "", 0 = the same. on_round, on_flower: as for :func:`run`. Raises UserError
    for a folder that holds no unfinished run.
    """
    start, directory = time.perf_counter(), Path(directory)
    if not (directory / "config.toml").is_file():
        raise UserError(f"{str(directory)!r} is no run folder: it has no config.toml")
    if (directory / "summary.json").exists():
        _tidy(directory)
        raise UserError(f"the run in {str(directory)!r} is complete")
    overrides = [f"engine.workers={workers}"] if workers else []
    if engine:
        overrides += [f"engine.kind={engine}", *(["engine.address="] if engine != "ray" else [])]
    experiment = load_experiment(directory / "config.toml", overrides)
    _check_engine(experiment, on_flower)
    job = _job(experiment)
    with _alone(directory), Events() as events:
        _warn_of_changes(directory / "config.toml", job.federation.task.device)
        with _errors_to(directory):
            found = Checkpoints(directory, _HISTORY).newest()
        return _carried_out(job, directory, on_round, start, found, events, on_flower)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Nobody else writes into the run folder meanwhile. The lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # another system
        yield
        return
    path = directory / _LOCK
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is at work on the run in {str(directory)!r}") from error
        yield
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Job:
    """What a run needs: the experiment, its two halves, who takes part, the state before round 1."""

    experiment: Experiment
    method: Method
    strategy: FederatedStrategy
    federation: Federation
    plan: Plan
    state: State


def _job(experiment: Experiment) -> _Job:
    """Refuses what cannot be met, before anything is written."""
    method, strategy, federation = _built(experiment)
    devices, plan = [client.device for client in federation.clients], _plan(experiment, federation.novel)
    strategy.server_data = federation.server
    strategy.server_source = "public" if experiment.partition.public else "holdout"
    state = strategy.first_state(federation.task, devices, plan, experiment.rounds)
    federation = _noted(federation, strategy.notes(federation.task, devices))
    return _Job(experiment, method, strategy, federation, plan, state)


def _built(experiment: Experiment) -> tuple[Method, FederatedStrategy, Federation]:
    """The method, and what it trains: the same in every process that runs the experiment."""
    method = load_method(experiment.method, experiment.client)
    strategy = build(method, experiment.hyper)
    hyper = strategy.client_config
    return (
        method,
        strategy,
        federation_of(experiment, masked_batch=_batch(hyper) if strategy.masked else 0, config=hyper),
    )


def _carried_out(
    job: _Job,
    directory: Path,
    on_round: OnRound | None,
    start: float,
    found: Checkpoint | None,
    events: Events,
    on_flower: OnFlower | None = None,
) -> Run:
    """The rounds that are left, and all files of a finished run. start: when this began, for the wall clock."""
    experiment, strategy, federation = job.experiment, job.strategy, job.federation
    task, engine = federation.task, experiment.engine
    checkpoints = Checkpoints(directory, _HISTORY)
    start -= found.wall if found else 0.0
    with _errors_to(directory), MemoryStore(directory / CLIENTS, engine.memory_mb * 10**6) as store:
        events.open(directory / EVENTS, start)
        record = _Recorder(directory, federation, on_round, events)
        state = job.state
        if found:
            state = unpacked(*found.state)
            checkpoints.take_up(found)
            store.restore(found.memories)
            record.read()
            events("run_resumed", round=found.done, rounds=experiment.rounds, checkpoint=found.reports)
        else:
            if engine.checkpoint_every:
                unpacked(*packed(state))  # a state that cannot be kept is refused before the first round
            events("run_started", method=job.method.name, rounds=experiment.rounds, clients=len(federation.clients))

        with _grid(job, directory, store, on_flower) as grid:

            def after(report: dict[str, Any]) -> None:
                record(report)
                if engine.checkpoint_every and report["round"] % engine.checkpoint_every == 0:
                    grid.gather()
                    wall, reports = time.perf_counter() - start, len(record.rounds)
                    checkpoints.write(strategy.state, store, reports=reports, done=report["round"], wall=wall)
                    events("checkpoint", round=report["round"], checkpoint=reports)

            devices = [client.device for client in federation.clients]
            strategy.start(
                grid,
                num_rounds=experiment.rounds,
                task=task,
                devices=devices,
                plan=job.plan,
                state=state,
                done=found.done if found else 0,
                on_round=after,
            )
            novel = strategy.onboard(grid) if federation.novel else None
            grid.gather()
        done = _finished(job, directory, record, store, novel, start)
        events.finished(digest=done.summary["digest"])
        return done


def _grid(job: _Job, directory: Path, store: MemoryStore, on_flower: OnFlower | None) -> OwnGrid | FlowerGrid:
    """The engine, ready to run."""
    engine, clients = job.experiment.engine, job.federation.clients
    if on_flower:
        most = _MEMORY_BYTES + _MEMORY_MODELS * sum(t.nbytes for t in job.federation.task.init_params().values())
        return on_flower((directory / "config.toml").read_text(encoding="utf-8"), len(clients), store, most)
    if engine.kind == "local":
        app = client_app(job.federation.task, clients.__getitem__)
        return LocalGrid(app, len(clients), workers=engine.workers, own_replies=False, store=store)
    from fedsparse.engine.ray import RayGrid

    return RayGrid(
        partial(app_of, (directory / "config.toml").read_text(encoding="utf-8")),
        len(clients),
        workers=engine.workers,
        own_replies=False,
        store=store,
        address=engine.address,
        cpus=engine.cpus_per_worker,
        gpus=engine.gpus_per_worker,
        sizes={client.id: float(len(client.train)) for client in clients},
    )


def app_of(config: str) -> ClientApp:
    """The clients of a resolved experiment, in another process: everything is loaded there."""
    _, _, federation = _built(from_dict(tomllib.loads(config)))
    return client_app(federation.task, federation.clients.__getitem__)


def _finished(
    job: _Job, directory: Path, record: _Recorder, store: MemoryStore, novel: Onboarding | None, start: float
) -> Run:
    """The files of a finished run, ``summary.json`` last; what only a resumed run needs goes."""
    task, strategy = job.federation.task, job.strategy
    if novel and novel.errors:
        _write(directory / "client_error.txt", novel.errors[0].trace)
    save_final(directory / FINAL, strategy.state.tensors(), Memories(store))
    bounded = job.experiment.engine.memory_mb > 0
    memories: Mapping[int, dict[str, Tensor]] = Memories(store) if bounded else dict(Memories(store))
    _save_rows(directory / "clients.parquet", record.rows)
    wall = time.perf_counter() - start
    facts = _facts(job.experiment, job.method.name, job.federation, strategy, len(record.rounds), memories, wall)
    masks = strategy.diagnose(task, strategy.state, job.federation.participants, memories)
    summary = summarise(facts, record.rounds, record.rows, novel, masks)
    config = (directory / "config.toml").read_text(encoding="utf-8")
    _write(directory / "report.html", page(summary, record.rounds, config, str(directory)))
    _write(directory / "summary.json", json.dumps(summary, indent=1) + "\n")  # last: it marks the run as complete
    _tidy(directory)
    left = FinalMemories(directory / FINAL) if bounded else memories
    return Run(directory, summary, record.rounds, record.rows, strategy.state, left)


def _tidy(directory: Path) -> None:
    """Without what a complete run needs no more."""
    for name in ("checkpoint", CLIENTS):
        shutil.rmtree(directory / name, ignore_errors=True)
    (directory / _ROWS).unlink(missing_ok=True)


class _Recorder:
    """Takes the report of each round: a line of ``rounds.jsonl``, the clients' rows, events, the user's callback."""

    def __init__(self, directory: Path, federation: Federation, on_round: OnRound | None, events: Events) -> None:
        self.rounds: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self._directory = directory
        self._federation = federation
        self._on_round = on_round
        self._events = events

    def read(self) -> None:
        """Take up what the files have, of a run that goes on."""
        self.rounds, self.rows = (_lines(self._directory / name) for name in _HISTORY)

    def __call__(self, report: dict[str, Any]) -> None:
        rows = [_plain_row(row, self._federation) for row in report.pop("rows")]
        self.rows.extend(rows)
        self.rounds.append(report)
        for text in report.pop("traces"):
            _write(self._directory / "client_error.txt", text)
        for name, lines in zip(_HISTORY, ([report], rows), strict=True):
            with (self._directory / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        self._events.round(report, rows)
        if self._on_round:
            self._on_round(report)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


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
    on_gpu = task.device.type != "cpu"
    reason = "a GPU does so faster" if on_gpu else why_dense(task.model, task.input_shape)
    if reason:
        if experiment.sparse == "sparse":
            raise UserError(f'sparse = "sparse" is not possible for this model: {reason}; use "auto" or "dense"')
        return () if experiment.sparse == "dense" else (f"all layers are computed masked dense: {reason}",)
    if batch:
        chosen = prepare(task.model, task.input_shape, experiment.sparse, batch, experiment.crossover)
    else:  # the driver does not know whether there will be masks: what was asked for holds all the same
        chosen = crossovers(task.model, task.input_shape, experiment.sparse, batch, given=experiment.crossover)
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
    reference = None
    if experiment.narrow:
        with torch.device("meta"):
            reference = make(width)
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
    device = _device(experiment)
    task = Task(
        model, data.input_shape, data.classes, experiment.seed, data.vocabulary, reference=reference, device=device
    )
    return task, notes


def _device(experiment: Experiment) -> torch.device:
    """Where the run computes. Raises UserError for an engine whose workers cannot reach it."""
    device, engine = compute_device(experiment.device), experiment.engine
    if device.type == "cuda" and engine.kind == "local" and engine.workers > 1:
        raise UserError("engine.workers > 1 of the local engine cannot share a GPU; use workers = 1, or engine 'ray'")
    if device.type == "cuda" and engine.kind == "ray" and not engine.gpus_per_worker:
        raise UserError("a Ray worker sees no GPU with engine.gpus_per_worker = 0; set a share above 0, or device cpu")
    return device


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
    one_by_one = ((str(i), memories[i]) for i in sorted(memories))
    for owner, tensors in chain((("state", state.tensors()),), one_by_one):
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
    except KeyboardInterrupt:
        if any((directory / "checkpoint").glob("[0-9]*")):
            _log.info("fedsparse resume %s goes on from the last checkpoint", directory)
        raise
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
    sync(path.parent)


def _config(experiment: Experiment, method: Method, federation: Federation) -> str:
    """The experiment with every default filled in, and what it was run with."""
    hyper = {**hyper_parameters(method), **experiment.hyper}
    crossover = federation.task.crossover if experiment.sparse == "auto" else {}
    device = federation.task.device
    resolved = replace(experiment, model=federation.model, crossover=crossover, device=device.type).to_dict()
    resolved["method"] = {"name": experiment.method, experiment.method: hyper}  # under its name: of no other method
    facts = {"clients": len(federation.clients), "notes": list(federation.notes), **_computed_with(device)}
    return toml_text(resolved) + "\n" + toml_text({"resolved": facts})


def _computed_with(device: torch.device) -> dict[str, str]:
    """What the bits of a result depend on beside the experiment."""
    return {
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "commit": _commit(),
        **{name: version(name) for name in _PACKAGES if name != "numba" or find_spec(name)},
        **{name: os.environ[name] for name in BITS if name in os.environ},
    }


def _warn_of_changes(config: Path, device: torch.device) -> None:
    """Say what a run that is resumed was begun with and is not there any more."""
    before = tomllib.loads(config.read_text(encoding="utf-8")).get("resolved", {})
    now = _computed_with(device)
    kinds = sorted({*now, *BITS, "gpu"} - {"python"})
    changed = [(name, before.get(name, ""), now.get(name, "")) for name in kinds]
    found = [f"{name} {old or 'not set'}, now {new or 'not set'}" for name, old, new in changed if old != new]
    if found:
        _log.warning("this run was begun with %s: its digest may be another one for that", "; ".join(found))


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
    sync(part)
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
