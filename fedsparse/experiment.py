"""Experiment: everything that fixes a run, checked; read from TOML and written back to it.

A file has flat keys and the tables ``[partition] [budget] [method] [engine] [evaluate]``. ``[method]`` holds ``name``
and hyper-parameters; ``[method.fedavg]`` holds values for fedavg alone, used when that method is chosen, so that one
file serves all methods.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from fedsparse.budget import BudgetConfig
from fedsparse.data import PartitionConfig
from fedsparse.devices import DEVICES
from fedsparse.errors import UserError, unknown
from fedsparse.method import hyper_parameters, load_method, method_names
from fedsparse.sparse import CHOICES

Scalar = bool | int | float | str
Tree = dict[str, Any]  # what a TOML file holds

_HOME = Path(__file__).resolve().parent
_TABLES = ("partition", "budget", "method", "engine", "evaluate", "crossover")
_FREE = ("method", "crossover")  # tables without a dataclass of their own
_RECORD = "resolved"  # the table that a run folder's config.toml adds: facts about that run, not settings
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class EngineConfig:
    """Where the clients run.

    kind: "local", "ray", or "flower" for Flower's own runtime, which has its own settings. workers: processes, or Ray
    actors. on_client_error: "stop", or "skip" down to
    ``min_replies`` a round. checkpoint_every: rounds between checkpoints, 0 = none. memory_mb: 10^6 bytes of client
    memories in RAM, the others are on disk; 0 = all in RAM. Of "ray": address of a cluster, "" = a Ray of our own;
    cpus_per_worker and gpus_per_worker: what an actor takes.
    """

    kind: str = "local"
    workers: int = 1
    on_client_error: str = "stop"
    min_replies: int = 1
    checkpoint_every: int = 10
    memory_mb: int = 0
    address: str = ""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        _check_choice("engine.kind", self.kind, ("local", "ray", "flower"))
        _check_least("engine.workers", self.workers, 1)
        _check_choice("engine.on_client_error", self.on_client_error, ("stop", "skip"))
        _check_least("engine.min_replies", self.min_replies, 1)
        _check_least("engine.checkpoint_every", self.checkpoint_every, 0)
        _check_least("engine.memory_mb", self.memory_mb, 0)
        _check_least("engine.cpus_per_worker", self.cpus_per_worker, 0)
        _check_least("engine.gpus_per_worker", self.gpus_per_worker, 0)
        if self.kind != "ray" and self.address:
            raise UserError(f'engine.address is {self.address!r}, which needs engine.kind = "ray"')


@dataclass(frozen=True)
class EvaluateConfig:
    """When and where to evaluate. every: rounds; fraction: of the clients, in (0, 1]; split: "test" or "validation"."""

    every: int = 1
    fraction: float = 1.0
    split: str = "test"

    def __post_init__(self) -> None:
        _check_least("evaluate.every", self.every, 1)
        _check_share("evaluate.fraction", self.fraction)
        _check_choice("evaluate.split", self.split, ("test", "validation"))


@dataclass(frozen=True)
class Experiment:
    """A run, fully described. Raises UserError for a value that is not allowed.

    dataset: a name of ``fedsparse list datasets`` or a path. model: a name of ``fedsparse list models``,
    ``pkg.module:callable`` or a file; "" = the data set's default. width: factor on channels and features, above 0.
    norm: "batch" or "group". narrow: "" or the dense control, a model narrowed to ``narrow_to`` (0, 1] of the
    "parameters" or the "multiply_adds" ("" = as it is). rounds: communication rounds. fraction: of clients in a round,
    (0, 1]. device: where models are trained and scored, "cpu", "cuda" (a GPU, through PyTorch's CUDA) or "auto" (a GPU
    where there is one). name: of the run folder.
    sparse: how layers under an element mask are computed: "dense", "sparse", or "auto" for what is faster at their
    density; crossover: for "auto", by layer the density from which on dense is faster ({} = measured, once a machine).
    client: a client half to put under the method's server half. method: a name, ``pkg.module:Class`` or a file;
    hyper: its hyper-parameters, flat scalars. notes: what was left out while reading; not part of the experiment.
    """

    dataset: str = "digits"
    model: str = ""
    width: float = 1.0
    norm: str = "batch"
    narrow: str = ""
    narrow_to: float = 1.0
    rounds: int = 20
    fraction: float = 1.0
    seed: int = 0
    device: str = "cpu"
    sparse: str = "auto"
    name: str = ""
    client: str = ""
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    method: str = "pfedgate"
    hyper: Mapping[str, Scalar] = field(default_factory=dict)
    crossover: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for key, hint in _flat_hints().items():
            object.__setattr__(self, key, _coerce(key, getattr(self, key), hint))
        _check_least("rounds", self.rounds, 1)
        _check_least("seed", self.seed, 0)
        _check_share("fraction", self.fraction)
        _check_share("narrow_to", self.narrow_to)
        _check_choice("norm", self.norm, ("batch", "group"))
        _check_choice("narrow", self.narrow, ("", "parameters", "multiply_adds"))
        _check_choice("device", self.device, DEVICES)
        _check_choice("sparse", self.sparse, CHOICES)
        crossover = {name: _coerce(f"crossover.{name}", value, float) for name, value in self.crossover.items()}
        object.__setattr__(self, "crossover", crossover)
        for name, value in crossover.items():
            _check_least(f"crossover.{name}", value, 0)
        if not 0 < self.width <= 64:
            raise UserError(f"width must be in (0, 64], got {self.width}")
        for key in ("dataset", "method"):
            if not getattr(self, key):
                raise UserError(f"{key} must not be empty")
        if "/" in self.name or "\\" in self.name or self.name in (".", ".."):
            raise UserError(f"name must be the name of a folder, not a path, got {self.name!r}")

    def to_dict(self) -> Tree:
        """Every value, as a TOML file would hold it: flat keys first, then the tables."""
        flat = {key: getattr(self, key) for key in _flat_hints()}
        tables = {key: _plain(getattr(self, key)) for key in _TABLES if key not in _FREE}
        free = {"method": {"name": self.method, **self.hyper}, "crossover": dict(self.crossover)}
        return {**flat, **free, **tables}

    def to_toml(self) -> str:
        """The experiment as a TOML file that ``load_experiment`` reads back to the same experiment."""
        return toml_text(self.to_dict())

    def with_overrides(self, overrides: Sequence[str]) -> Experiment:
        """The experiment with settings like ``["rounds=3", "method.lr=0.1", "budget.tiers=[1, 0.5]"]`` changed.

        Values are read as TOML, anything else as text. ``method=fedavg`` changes the method and keeps the
        hyper-parameters that both methods have; the notes name the others.
        """
        return from_dict(self.to_dict(), overrides)


def load_experiment(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in a TOML file: the path given, or a name of ``experiment_names``. ``overrides`` win.

    Raises UserError for a file that is absent, no TOML, or holds a key or value that is not allowed.
    """
    path = _find(str(path_or_name))
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"experiment file {str(path)!r} cannot be read: {error}") from error
    return from_dict(data, overrides)


def experiment_names() -> tuple[str, ...]:
    """The experiments that come with the package, by file name without ``.toml``."""
    return tuple(sorted({path.stem for folder in _folders() for path in folder.glob("*.toml")}))


def from_dict(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """The experiment that a TOML file's content describes. ``overrides``: see ``Experiment.with_overrides``."""
    data, changes = _method_table(data), {"method": {}, **_override_tree(overrides)}
    method, hyper, notes = _choose_method(data.pop("method"), changes.pop("method"))
    merged = _merge(data, changes)
    hints = _flat_hints()
    for key in merged:
        if key not in hints and key not in (*_TABLES, _RECORD):
            raise unknown("key", key, (*hints, *_TABLES))
    flat = {key: merged[key] for key in hints if key in merged}
    tables = {key: _table(key, merged[key]) for key in _TABLES if key in merged}
    return Experiment(**flat, **tables, method=method, hyper=hyper, notes=notes)


def toml_text(data: Mapping[str, Any]) -> str:
    """TOML of a tree of scalars, lists and tables. None is left out, since TOML has no null."""
    return "\n".join(_lines(data, ())).strip() + "\n"


# --- the method and its hyper-parameters --------------------------------------------------------------------------


def _method_table(data: Mapping[str, Any]) -> Tree:
    """The tree with ``method`` as a table (``method = "fedavg"`` is short for its name)."""
    given = data.get("method", {})
    return {**data, "method": {"name": given} if isinstance(given, str) else _expect_table("method", given)}


def _choose_method(table: Tree, changes: Tree) -> tuple[str, dict[str, Scalar], tuple[str, ...]]:
    """The method's name, its hyper-parameters and what was left out, from a file's table and what overrides it."""
    default = _coerce("method.name", table.get("name", "pfedgate"), str)
    name = _coerce("method.name", changes.get("name", default), str)
    shared = _scalars(table)
    notes: tuple[str, ...] = ()
    if name != default and shared:
        shared, notes = _in_common(shared, default, name)
    special = _merge(_special(table), _special(changes))
    return name, {**shared, **_scalars(special.get(name, {})), **_scalars(changes)}, notes


def _scalars(table: Mapping[str, Any]) -> dict[str, Scalar]:
    """The hyper-parameters themselves: no name, no tables of other methods."""
    flat = {key: value for key, value in table.items() if key != "name" and not isinstance(value, Mapping)}
    for key, value in flat.items():
        if not isinstance(value, bool | int | float | str):
            raise UserError(f"method.{key} must be a number, text, true or false, got {value!r}")
    return flat


def _special(table: Mapping[str, Any]) -> Tree:
    """The tables ``[method.NAME]``. A name that is neither built in nor a module or file is refused."""
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    for key in tables:
        if not any(mark in key for mark in ":/.") and key not in method_names():
            raise unknown("method", key, method_names())
    return tables


def _in_common(shared: dict[str, Scalar], old: str, new: str) -> tuple[dict[str, Scalar], tuple[str, ...]]:
    known = hyper_parameters(load_method(new))
    left_out = [key for key in shared if key not in known]
    note = f"{new} has no {', '.join(left_out)}: left out of what was set for {old}"
    return {key: value for key, value in shared.items() if key in known}, (note,) if left_out else ()


# --- reading -----------------------------------------------------------------------------------------------------


def _folders() -> list[Path]:
    return [folder for folder in (_HOME.parent / "experiments", _HOME / "_experiments") if folder.is_dir()]


def _find(value: str) -> Path:
    """The path given, else that name beside the package, else the packaged copy."""
    path = Path(value)
    if path.is_file():
        return path
    if path.parent in (Path(), Path("experiments")):
        for folder in _folders():
            found = folder / f"{path.name.removesuffix('.toml')}.toml"
            if found.is_file():
                return found
    if path.is_dir():
        raise UserError(f"experiment file {value!r} is a folder")
    raise unknown("experiment file", value, experiment_names())


def _override_tree(overrides: Sequence[str]) -> Tree:
    tree: Tree = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = [part.strip() for part in key.split(".", 1 if key.strip().startswith("crossover.") else -1)]
        if not equals or not all(parts):
            raise UserError(f"a setting is key=value, such as rounds=3 or method.lr=0.1; got {text!r}")
        parts = ["method", "name"] if parts == ["method"] else parts
        branch: Tree = {parts[-1]: _value(parts, value.strip())}
        for part in reversed(parts[:-1]):
            branch = {part: branch}
        tree = _merge(tree, branch)
    return tree


def _value(parts: list[str], text: str) -> Any:
    """A value as TOML reads it; text as it stands where that is no TOML or where the key wants text."""
    wants_text = parts == ["method", "name"] or (len(parts) == 1 and _flat_hints().get(parts[0]) is str)
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = tree["value"]
    return text if len(tree) > 1 or (wants_text and not isinstance(value, str)) else value


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Both trees; where both have a value ``over`` wins, where both have a table the tables are merged."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _flat_hints() -> dict[str, Any]:
    """The flat keys of a file with their types."""
    own = (*_TABLES, "hyper", "notes")
    return {key: hint for key, hint in get_type_hints(Experiment).items() if key not in own}


def _table(name: str, values: Any) -> Any:
    """The configuration dataclass of one table; the free table of crossovers as it is."""
    if name == "crossover":
        return _expect_table(name, values)
    config = get_type_hints(Experiment)[name]
    hints = get_type_hints(config)
    known = [f.name for f in dataclasses.fields(config)]
    given = {}
    for key, value in _expect_table(name, values).items():
        if key not in known:
            raise unknown(f"key in [{name}]", key, known)
        given[key] = _coerce(f"{name}.{key}", value, hints[key])
    return config(**given)


def _expect_table(name: str, value: Any) -> Tree:
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must be a table [{name}], got {value!r}")
    return dict(value)


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """``value`` as the field wants it: int, float, str, bool or a tuple of one of them."""
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{key} must be a list, such as [1, 0.5], got {value!r}")
        return tuple(_coerce(key, item, get_args(hint)[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{key} must be {_KINDS[hint]}, got {value!r}")
    return value


# --- checking ----------------------------------------------------------------------------------------------------


def _check_least(key: str, value: float, least: int) -> None:
    if not value >= least:  # a NaN is refused
        raise UserError(f"{key} must be at least {least}, got {value}")


def _check_share(key: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{key} must be in (0, 1], got {value}")


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise unknown(key, value, [name or '""' for name in allowed])


# --- writing -----------------------------------------------------------------------------------------------------


def _plain(config: Any) -> Tree:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(config).items()}


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    present = {key: value for key, value in table.items() if value is not None}
    values = {key: value for key, value in present.items() if not isinstance(value, Mapping)}
    if path and (values or not present):
        yield f"\n[{'.'.join(map(_key, path))}]"
    yield from (f"{_key(key)} = {_literal(value)}" for key, value in values.items())
    for key, value in present.items():
        if isinstance(value, Mapping):
            yield from _lines(value, (*path, key))


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "a").replace("-", "a").isalnum()
    return key if bare else _literal(key)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):  # NumPy's own numbers too, whose repr is no TOML
        return repr(float(value) if isinstance(value, float) else int(value))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    raise UserError(f"TOML cannot hold {value!r} of type {type(value).__name__}")
