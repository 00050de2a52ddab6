"""Code of a user's: ``pkg.module:name`` or ``file.py:name``, found in every process by the same words."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fedsparse.errors import UserError


def split(spec: str) -> tuple[str, str]:
    """``path:name`` -> (path, name); the name is "" where there is none."""
    path, _, name = spec.rpartition(":") if ":" in spec else (spec, "", "")
    return path, name


def user_module(path: str, kind: str) -> ModuleType:
    """The module ``pkg.module``, or the file, both from where this process is. kind: what errors call it.

    Raises UserError for what does not exist or cannot be loaded.
    """
    if path.endswith(".py") or "/" in path:
        return _file_module(Path(path), kind)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and not f"{path}.".startswith(f"{error.name}."):  # it is there, and imports what is not
            raise UserError(f"{kind} {path!r} cannot be loaded: {error}") from error
        beside = Path(*path.split(".")).with_suffix(".py")  # the console script does not look in the current folder
        if beside.is_file():
            return _file_module(beside, kind)
        raise UserError(f"{kind} {path!r}: no such module ({error})") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{kind} {path!r} cannot be loaded: {type(error).__name__}: {error}") from error


def own_classes(module: ModuleType, base: type[Any]) -> dict[str, Any]:
    """The classes under ``base`` that the module itself defines and that are not abstract, by name."""
    return {n: c for n, c in vars(module).items() if _is_final(c, base) and c.__module__ == module.__name__}


def _is_final(cls: Any, base: type[Any]) -> bool:
    return inspect.isclass(cls) and issubclass(cls, base) and cls is not base and not inspect.isabstract(cls)


def _file_module(path: Path, kind: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{kind} file {str(path)!r} does not exist")
    name = "fedsparse_user_" + hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{kind} file {str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{kind} file {str(path)!r} cannot be loaded: {type(error).__name__}: {error}") from error
    return module
