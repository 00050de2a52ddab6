"""Which layers are computed over kept weights only, and which as masked dense ones: by density, from measured times.

A *crossover* is the density of a layer from which on the dense computation is the faster one. It depends on the layer's
shape and on the machine, so it is measured once per machine, kept in a file, and written into each run's
``config.toml``: the choice changes the last bits of results, so that every worker and every repetition must share it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from fedsparse.sparse.masks import Mask
from fedsparse.sparse.program import Op, Program, UnsupportedError, Value, read_program
from fedsparse.threads import one_thread

if TYPE_CHECKING:
    from fedsparse.sparse.executor import Executor

DEFAULT_CROSSOVER = 0.2
"""Of a layer that was not measured: between those of linear layers (0.1) and of 3x3 convolutions (0.4)."""

ALWAYS, NEVER = 2.0, 0.0  # crossovers above every density and below
_FORMAT = 2  # of the file, and of what is measured: raise it when kernels change
_WORK = 5e8  # multiply-adds of a dense layer that is timed
_LOW, _HIGH = 0.02, 0.2  # densities that are timed

Crossover = Mapping[str, float]
_log = logging.getLogger("fedsparse")
_programs: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Program | str]] = WeakKeyDictionary()


def program_of(model: nn.Module, input_shape: tuple[int, ...]) -> Program:
    """The model's program, read once. Raises UnsupportedError with the reason why it has none here."""
    if reason := no_numba():
        raise UnsupportedError(reason)
    known = _programs.setdefault(model, {})
    if input_shape not in known:
        try:
            known[input_shape] = read_program(model, input_shape)
        except UnsupportedError as error:
            known[input_shape] = str(error)  # not the error itself, whose traceback would keep everything alive
    found = known[input_shape]
    if isinstance(found, str):
        raise UnsupportedError(found)
    return found


@lru_cache(maxsize=1)
def no_numba() -> str:
    """Why numba cannot be used, or ""."""
    try:
        import_module("numba")
    except ModuleNotFoundError as error:
        return "numba is not installed" if error.name == "numba" else f"numba cannot be imported ({error})"
    except ImportError as error:
        return f"numba cannot be imported ({(str(error).splitlines() or ['no reason given'])[0]})"
    return ""


def why_dense(model: nn.Module, input_shape: tuple[int, ...]) -> str:
    """Why a model can only be computed masked dense, or ""."""
    try:
        program_of(model, input_shape)
    except UnsupportedError as error:
        return str(error)
    return ""


def executor_for(model: nn.Module, input_shape: tuple[int, ...], mask: Mask, crossover: Crossover) -> Executor | None:
    """An executor for the model under a mask, or None where masked dense computation is the choice for all of it.

    crossover: by the path of a layer; :data:`DEFAULT_CROSSOVER` for those not named.
    """
    if why_dense(model, input_shape):
        return None
    program = program_of(model, input_shape)
    densities = _densities(program, mask)
    if any(name.removesuffix(".weight") not in densities for name in mask):
        return None  # a bias or a norm is masked
    dense = frozenset(n for n, density in densities.items() if density >= crossover.get(n, DEFAULT_CROSSOVER))
    if all(name in dense for name in densities if f"{name}.weight" in mask):
        return None
    from fedsparse.sparse.executor import Executor

    return Executor(program, mask, dense)


def _densities(program: Program, mask: Mask) -> dict[str, float]:
    """Kept share of each layer's weights."""
    layers = [op for op in program.ops if op.kind == "conv"]
    return {op.name: _kept(mask, op.name, _weights(program, op)) for op in layers}


def _kept(mask: Mask, name: str, weights: int) -> float:
    kept = mask.get(f"{name}.weight")
    return 1.0 if kept is None else len(kept) / weights


def _weights(program: Program, op: Op) -> int:
    return math.prod(program.shape(op))


# ------------------------------------------------------------------------------------------------- measuring


def prepare(
    model: nn.Module, input_shape: tuple[int, ...], choice: str, batch: int, given: Crossover | None = None
) -> dict[str, float]:
    """What a driver does once, before it starts workers: compile or load the kernels, and find the crossovers.

    choice and batch: as for :func:`crossovers`. given: crossovers that are known, for "auto". Says so where it takes
    more than two seconds. Raises UnsupportedError for a model without a sparse form.
    """
    program = program_of(model, input_shape)
    if choice == "dense":
        return crossovers(model, input_shape, choice, batch)
    with one_thread():
        with _saying("compiling the sparse kernels, once per machine (about 20 seconds)"):
            _warm_up(program, input_shape)
        with _saying("measuring from which density on dense layers are faster, once per machine and model"):
            return crossovers(model, input_shape, choice, batch, given=given)


@contextmanager
def _saying(text: str) -> Iterator[None]:
    """Log a line if what follows takes long. The timer's thread is gone afterwards: workers may be forked."""
    timer = threading.Timer(2.0, _log.warning, (text,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _warm_up(program: Program, input_shape: tuple[int, ...]) -> None:
    """One pass of the program in each representation at almost no density: compiles whatever a run may need, the
    search of gradients too."""
    from fedsparse.sparse.executor import Executor

    params: dict[str, torch.Tensor] = {}
    mask = {}
    for value in program.values:
        if value.norm is not None:
            parts = ("weight", "bias", "running_mean", "running_var")
            params |= {f"{value.norm.name}.{part}": torch.ones(value.channels) for part in parts}
    for op in program.ops:
        if op.kind == "conv":
            mask[f"{op.name}.weight"] = torch.zeros(1, dtype=torch.int32)
            params[f"{op.name}.weight"] = torch.ones(1)
            params[f"{op.name}.bias"] = torch.zeros(program.values[op.target].channels)
    last = next(op.name for op in reversed(program.ops) if op.kind == "conv")
    x = torch.zeros(2, *input_shape)
    for dense in ((), [name.removesuffix(".weight") for name in mask]):
        Executor(program, mask, frozenset(dense)).search(params, x, torch.ones_like, {last: lambda *_: None})


def crossovers(
    model: nn.Module,
    input_shape: tuple[int, ...],
    choice: str,
    batch: int,
    cache: Path | None = None,
    given: Crossover | None = None,
) -> dict[str, float]:
    """The crossover of each layer for "auto" (measured, or read from the cache), "dense" or "sparse".

    batch: examples of a training step. cache: a folder; None = that of :func:`cache_folder`. given: what "auto" need
    not measure. Raises UnsupportedError.
    """
    program = program_of(model, input_shape)
    layers = [op for op in program.ops if op.kind == "conv"]
    if choice != "auto":
        return {op.name: ALWAYS if choice == "sparse" else NEVER for op in layers}
    folder = cache or cache_folder()
    known = _read(folder)
    new: dict[str, float] = {}
    given = given or {}
    for op in layers:
        if op.name in given:
            continue
        key = _key(program, op, batch)
        if key not in known and key not in new:
            new[key] = _measure(program, op, batch)
    if new:
        _write(folder, {**known, **new})
    known |= new
    return {op.name: given[op.name] if op.name in given else known[_key(program, op, batch)] for op in layers}


def cache_folder() -> Path:
    """``FEDSPARSE_CACHE``, else ``fedsparse`` in the user's cache folder."""
    given = os.environ.get("FEDSPARSE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "fedsparse"


def _key(program: Program, op: Op, batch: int) -> str:
    source, target = program.values[op.sources[0]], program.values[op.target]
    shape = (source.channels, source.height, source.width, target.channels)
    first = "first" if op.sources[0] == 0 else ""
    return " ".join(map(str, (*shape, *op.kernel, *op.stride, *op.padding, *op.dilation, batch, first))).strip()


def _measure(program: Program, op: Op, batch: int) -> float:
    """Where the line through the times at two densities meets the dense time."""
    macs = _weights(program, op) * program.values[op.target].height * program.values[op.target].width
    n = max(1, min(batch, int(_WORK / macs)))
    dense = _seconds(program, op, n, _HIGH, dense=True)
    low, high = (_seconds(program, op, n, density, dense=False) for density in (_LOW, _HIGH))
    slope = (high - low) / (_HIGH - _LOW)
    if slope <= 0:
        return ALWAYS if high < dense else NEVER
    return round(min(max(_LOW + (dense - low) / slope, NEVER), ALWAYS), 3)


def _seconds(program: Program, op: Op, n: int, density: float, *, dense: bool) -> float:
    """Best of five forward and backward passes of one layer, which reads a value that needs a gradient too."""
    from fedsparse.sparse.executor import Executor, Run

    source, target = (program.values[v] for v in (op.sources[0], op.target))
    first = op.sources[0] == 0
    plain, out = (Value(v.channels, v.height, v.width) for v in (source, target))
    layer = Op(
        "conv", (0 if first else 1,), 1 if first else 2, "layer", False, op.kernel, op.stride, op.padding, op.dilation
    )
    rest = () if first else (Op("add", (0, 0), 1),)
    values, uses = ((plain, out), (1, 0)) if first else ((plain, plain, out), (2, 1, 0))
    alone = Program((plain.channels, plain.height, plain.width), values, (*rest, layer), layer.target, uses)
    rng = np.random.default_rng(0)
    weights = _weights(program, op)
    kept = np.sort(rng.choice(weights, max(1, int(density * weights)), replace=False)).astype(np.int32)
    mask = {"layer.weight": torch.from_numpy(kept)}
    params = {"layer.weight": torch.from_numpy(rng.standard_normal(len(kept), np.float32))}
    executor = Executor(alone, mask, frozenset(["layer"] if dense else []))
    x = torch.from_numpy(rng.standard_normal((n, plain.channels, plain.height, plain.width), np.float32))
    grad = rng.standard_normal((out.channels, n, out.height, out.width), np.float32)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        run = Run(executor, params, x, train=True)
        run.advance()
        run.back_from(grad)
        times.append(time.perf_counter() - start)
    return min(times[1:])


# ------------------------------------------------------------------------------------------------- the file


@lru_cache(maxsize=1)
def _machine() -> str:
    """What the times depend on."""
    from importlib.metadata import version

    parts = (_FORMAT, cpu_name(), torch.backends.cpu.get_cpu_capability(), version("torch"), version("numba"))
    return " | ".join(map(str, parts))


def cpu_name() -> str:
    """The processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _file(folder: Path) -> Path:
    return folder / "crossover.json"


def _read(folder: Path) -> dict[str, float]:
    """What is known of this machine; nothing where the file is absent or damaged."""
    try:
        data = json.loads(_file(folder).read_text(encoding="utf-8"))
        return {str(k): float(v) for k, v in data.get(_machine(), {}).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(folder: Path, known: Mapping[str, float]) -> None:
    """Keep what was measured; a folder that cannot be written is no error, it is then measured again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            data = json.loads(_file(folder).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            data = {}
        part = folder / f"crossover.{os.getpid()}.part"
        part.write_text(json.dumps({**data, _machine(): dict(known)}, indent=1), encoding="utf-8")
        part.replace(_file(folder))
    except (OSError, TypeError):
        pass
