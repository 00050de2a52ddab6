"""Networks of a user's: ``pkg.module:callable`` or ``file.py:callable``, built and checked."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedsparse.errors import UserError, named, one_line, shown, unknown
from fedsparse.plugin import own_classes, split, user_module
from fedsparse.threads import one_thread

_DEFAULTS = {"width": 1.0, "norm": "batch", "vocabulary": 0}  # what a callable need not know of
_NEEDED_BY = {
    "width": "a width other than 1 and narrow need",
    "norm": 'norm = "group" needs',
    "vocabulary": "data of tokens need",
}
_EXAMPLES = 2  # in the check: with one, a network that loses the batch may pass


def is_own(name: str) -> bool:
    """Whether this names a user's network, not a built-in one."""
    return any(mark in name for mark in ":/.")


def build_own(spec: str, input_shape: tuple[int, ...], classes: int, options: Mapping[str, Any]) -> nn.Module:
    """The network that the callable gives for ``input_shape`` and ``classes``, which it is called with by name.

    options: width, norm and vocabulary, given where the callable has a parameter of that name; other values than
    their defaults are refused where it has not. A file's callable may be left out if the file holds one nn.Module.
    Raises UserError for a callable that is not there, fails, or gives what cannot be trained on such data.
    """
    build = _callable(spec)
    signature = _signature(spec, build)
    given = {"input_shape": input_shape, "classes": classes, **_known(spec, signature, options)}
    with one_thread():
        model = _called(spec, build, signature, given)
        complaint = _complaint(model, input_shape, classes, tokens=options["vocabulary"] > 0)
    if complaint:
        raise UserError(f"model {spec!r}: {complaint}")
    return model


def _callable(spec: str) -> Callable[..., Any]:
    path, name = split(spec)
    # what the file draws or seeds when it is loaded, once a process, must not reach the values that a build draws
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        module = user_module(path, "model")
    if not name:
        return _only_class(spec, path, module)
    if name not in vars(module):
        raise unknown(f"function or class in model {path!r}:", name, _offered(module))
    found = vars(module)[name]
    if not callable(found) or isinstance(found, nn.Module):
        raise UserError(f"model {spec!r}: {name} is of type {type(found).__name__}, it must be a function or a class")
    return found  # type: ignore[no-any-return]


def _only_class(spec: str, path: str, module: ModuleType) -> type[nn.Module]:
    classes = own_classes(module, nn.Module)
    if len(classes) != 1:
        raise UserError(
            f"model {spec!r} must hold one nn.Module class, it holds {sorted(classes) or 'none'};"
            f" name a class or a function with {path}:NAME"
        )
    return next(iter(classes.values()))  # type: ignore[no-any-return]


def _offered(module: ModuleType) -> list[str]:
    """The functions and classes that the module itself defines."""
    own = {n: v for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    return [n for n, v in own.items() if inspect.isfunction(v) or inspect.isclass(v)]


def _known(spec: str, signature: inspect.Signature, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the callable knows: those asked for, and those that it has no default of its own for.

    Raises UserError for one that it ought to know.
    """
    parameters = signature.parameters
    given = {}
    for name, value in options.items():
        own = parameters[name].default if name in parameters else None
        asked = value != _DEFAULTS[name]
        if asked and name not in parameters:
            raise UserError(f"model {spec!r} takes no {name!r}, which {_NEEDED_BY[name]}")
        if asked and name == "width" and own not in (inspect.Parameter.empty, 1):
            raise UserError(f"model {spec!r}: width is a factor here, 1 = as designed; its own has the default {own!r}")
        if asked or own is inspect.Parameter.empty:
            given[name] = value
    return given


def _signature(spec: str, build: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(build)
    except ValueError as error:  # of some callables in C
        raise UserError(f"model {spec!r}: {error}") from error


def _called(spec: str, build: Callable[..., Any], signature: inspect.Signature, given: Mapping[str, Any]) -> nn.Module:
    arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
    try:
        signature.bind(**given)
    except TypeError as error:
        raise UserError(f"model {spec!r} cannot be called with {arguments}: {error}") from error
    try:
        model = build(**given)
    except Exception as error:
        raise UserError(f"model {spec!r} failed with {arguments}: {one_line(named(error))}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model {spec!r} must give a torch.nn.Module, it gave a {type(model).__name__}")
    return model


def _complaint(model: nn.Module, input_shape: tuple[int, ...], classes: int, *, tokens: bool) -> str:
    """Why the model cannot be trained on such data; "" if it can. The model itself is not run."""
    parameters = dict(model.named_parameters())
    if not parameters:
        return "it has no parameters"
    for name, p in parameters.items():
        if is_lazy(p):
            return f"{name} has no size before it runs; run the network once before you return it"
        if p.dtype != torch.float32:
            return f"{name} is {p.dtype}, parameters must be torch.float32"
    if any(p.is_meta for p in parameters.values()):  # narrow asks for sizes alone
        return ""
    try:
        tried = copy.deepcopy(model)
    except Exception as error:
        return f"it cannot be copied: {one_line(named(error))}"
    x = torch.zeros((_EXAMPLES, *input_shape), dtype=torch.int64 if tokens else torch.float32)
    with torch.random.fork_rng(devices=[]):
        return _output_complaint(tried, x, (_EXAMPLES, classes)) or _gradient_complaint(tried, x)


def _output_complaint(model: nn.Module, x: Tensor, wanted: tuple[int, ...]) -> str:
    """What is wrong with the answer to a batch."""
    given = tuple(x.shape)
    try:
        with torch.no_grad():
            logits = model.eval()(x)
    except Exception as error:
        return f"it does not run on inputs of shape {given}: {one_line(named(error))}"
    if not isinstance(logits, Tensor):
        return f"it gives a {type(logits).__name__}, it must give logits of shape (n, classes)"
    shape = tuple(logits.shape)
    return "" if shape == wanted else f"it maps inputs of shape {given} to {shape}, they must become logits {wanted}"


def _gradient_complaint(model: nn.Module, x: Tensor) -> str:
    """Which parameters a batch in training does not use: they would have no gradient."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        logits = model.train()(x)
        grads = torch.autograd.grad(logits.sum(), list(trained.values()), allow_unused=True) if trained else ()
    except Exception as error:
        return f"it does not train on inputs of shape {tuple(x.shape)}: {one_line(named(error))}"
    unused = [name for name, grad in zip(trained, grads, strict=True) if grad is None]
    return f"its output does not depend on the parameters {shown(unused)}" if unused else ""
