"""load_method: a name, ``module:Class`` or a file -> the two halves of a method. Built-in methods are discovered."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fedsparse.client import FederatedClient
from fedsparse.errors import UserError, unknown
from fedsparse.plugin import own_classes, split, user_module
from fedsparse.strategy import FederatedStrategy

_GIVEN = (
    "client_spec",
    "client_config",
    "server_data",
    "server_source",
)  # fields of a strategy that are no hyper-parameters
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_APPS = ("server_app", "client_app")  # files for `flwr run`, not methods


@dataclass(frozen=True)
class Method:
    """A method: its name and its two classes."""

    name: str
    strategy: type[FederatedStrategy]
    client: type[FederatedClient]
    client_spec: str


def method_names() -> tuple[str, ...]:
    """The built-in methods: every file in ``strategies/``."""
    package = _builtin("strategies")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in _APPS))


def load_method(spec: str, client: str = "") -> Method:
    """The method of that name, ``pkg.module:Class`` or ``file.py[:Class]``; ``client``: another client half for it."""
    strategy = _load(spec, FederatedStrategy, "strategies", "method")
    client_spec = client or getattr(strategy, "client", "")
    if not client_spec:
        raise UserError(f'method {spec!r}: {strategy.__name__} names no client half; set client = "module:Class"')
    name = spec if spec in method_names() else strategy.__name__.lower()
    return Method(name, strategy, load_client(client_spec), client_spec)


@lru_cache(maxsize=64)
def load_client(spec: str) -> type[FederatedClient]:
    """The client half of that name, ``pkg.module:Class`` or ``file.py[:Class]``."""
    loaded: type[FederatedClient] = _load(spec, FederatedClient, "clients", "client")
    return loaded


def hyper_parameters(method: Method) -> dict[str, Any]:
    """All hyper-parameters of both halves with their defaults, by name."""
    return {**_defaults(method.client), **_defaults(method.strategy)}


def build(method: Method, hyper: Mapping[str, Any]) -> FederatedStrategy:
    """The strategy with ``hyper`` given to the halves that know it. Raises UserError for bad names and values."""
    known = hyper_parameters(method)
    for name, value in hyper.items():
        if name not in known:
            raise unknown(f"hyper-parameter of {method.name}", name, known)
        _check_kind(method.name, name, value, known[name])
    server = {k: _like(v, known[k]) for k, v in hyper.items() if k in _defaults(method.strategy)}
    local = {k: _like(v, known[k]) for k, v in hyper.items() if k in _defaults(method.client)}
    try:
        half = method.client(**local)
        return method.strategy(**server, client_spec=method.client_spec, client_config=dataclasses.asdict(half))
    except ValueError as error:
        raise UserError(f"method {method.name}: {error}") from error


def _like(value: Any, default: Any) -> Any:
    if isinstance(default, str) and isinstance(value, bool):
        return str(value).lower()  # density_kind = true, which TOML does not read as a word
    return float(value) if isinstance(default, float) and isinstance(value, int) else value


def _check_kind(method: str, name: str, value: Any, default: Any) -> None:
    if isinstance(value, bool):
        fits = isinstance(default, bool | str)
    else:
        fits = isinstance(value, (int, float) if isinstance(default, float) else type(default))
    if not fits:
        raise UserError(f"{method}.{name} must be {_KINDS[type(default)]}, got {value!r}")


def _defaults(cls: type[Any]) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    return {f.name: f.default for f in fields if f.name not in _GIVEN}


def _load(spec: str, base: type[Any], folder: str, kind: str) -> Any:
    path, name = split(spec)
    found = own_classes(_module(path, folder, kind), base)
    if name and name not in found:
        raise unknown(f"{base.__name__} in {path}", name, found)
    if not name and len(found) != 1:
        raise UserError(
            f"{kind} {spec!r} must hold one {base.__name__}, it holds {sorted(found) or 'none'};"
            f" name one with {spec}:Class"
        )
    cls = found[name or next(iter(found))]
    for field in dataclasses.fields(cls):
        if callable(getattr(base, field.name, None)):
            raise UserError(
                f"{kind} {spec!r}: the hyper-parameter {field.name!r} would hide the method of that name of"
                f" {base.__name__}; give it another name"
            )
    return cls


def _module(path: str, folder: str, kind: str) -> ModuleType:
    if "." not in path and "/" not in path:
        package = _builtin(folder)
        names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in _APPS]
        if path not in names:
            raise unknown(kind, path, names)
        path = f"{folder}.{path}"
    elif path.split(".")[0] == folder:
        _builtin(folder)
    return user_module(path, kind)


@lru_cache(maxsize=4)
def _builtin(folder: str) -> ModuleType:
    """The package ``strategies`` or ``clients`` that came with fedsparse: the names are generic, so check the place."""
    package = importlib.import_module(folder)
    home = Path(__file__).resolve().parents[1]
    places = [Path(p).resolve().parent for p in package.__path__]
    if home not in places:
        raise UserError(
            f"another package named {folder!r} ({places[0]}) hides the one that came with fedsparse ({home})"
        )
    return package
