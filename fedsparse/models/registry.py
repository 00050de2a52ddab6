"""Names of the networks, what inputs each takes, and the one function that builds them and those of users."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fedsparse.errors import UserError, unknown
from fedsparse.models import chains
from fedsparse.models.charlstm import charlstm
from fedsparse.models.layers import NORMS, Recipe
from fedsparse.models.own import build_own, is_own
from fedsparse.models.resnet import resnet18

_FORMS = {"image": "images (channels, height, width)", "series": "series (channels, steps)", "tokens": "tokens (steps)"}
_AXES = {"image": 3, "series": 2, "tokens": 1}


@dataclass(frozen=True)
class _Entry:
    """build: from a recipe; form: "any", "image", "series" or "tokens"; smallest: least height, width or steps."""

    build: Callable[[Recipe], nn.Module]
    form: str = "any"
    smallest: int = 1


_MODELS = {
    "logistic": _Entry(chains.logistic),
    "mlp": _Entry(chains.mlp),
    "leafcnn1": _Entry(chains.leafcnn1, "image", 16),
    "lenet": _Entry(chains.lenet, "image", 16),
    "leafcnn3": _Entry(chains.leafcnn3, "image", 16),
    "cnn": _Entry(chains.cnn, "image", 4),
    "cnn1d": _Entry(chains.cnn1d, "series", 16),
    "charlstm": _Entry(charlstm, "tokens"),
    "resnet18": _Entry(resnet18, "image"),
    "vgg11": _Entry(chains.vgg11, "image", 32),
}


def model_names() -> tuple[str, ...]:
    """The names that :func:`build_model` knows."""
    return tuple(_MODELS)


def build_model(
    name: str,
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: float = 1.0,
    norm: str = "batch",
    vocabulary: int = 0,
) -> nn.Module:
    """A new network that maps (n, *input_shape) to logits (n, classes).

    name: of ``model_names``, or a callable of a user's, ``pkg.module:callable``, ``file.py:callable`` or ``file.py``
    (:func:`fedsparse.models.own.build_own`). Its initial values come from torch's global generator: fork and seed it
    around the call. width: factor on all hidden channels and features, above 0; norm: "batch" or "group", for the
    networks that have norms; vocabulary: number of tokens, 0 for numeric input. Raises UserError where name and input
    do not fit.
    """
    own = is_own(name)
    if not own and name not in _MODELS:
        raise unknown("model", name, _MODELS)
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if not (width > 0 and math.isfinite(width)):
        raise UserError(f"width must be above 0, got {width}")
    if classes < 1:
        raise UserError(f"classes must be at least 1, got {classes}")
    shape = tuple(input_shape)
    if own:
        return build_own(name, shape, classes, {"width": width, "norm": norm, "vocabulary": vocabulary})
    entry = _MODELS[name]
    _check_kind(name, entry, vocabulary)
    _check_shape(name, entry, shape)
    return entry.build(Recipe(shape, classes, width, norm, vocabulary))


def _check_kind(name: str, entry: _Entry, vocabulary: int) -> None:
    """Numbers for numeric networks, tokens for the others."""
    wants_tokens = entry.form == "tokens"
    if wants_tokens == (vocabulary > 0):
        return
    fitting = ", ".join(n for n, e in _MODELS.items() if (e.form == "tokens") != wants_tokens)
    if wants_tokens:
        raise UserError(f"model {name} needs tokens, but the data are numbers (models for numbers: {fitting})")
    raise UserError(f"model {name} needs numbers, but the data are tokens (models for tokens: {fitting})")


def _check_shape(name: str, entry: _Entry, shape: tuple[int, ...]) -> None:
    """The right number of axes, none of them empty, and large enough for the pools."""
    if not shape or min(shape) < 1:
        raise UserError(f"model {name} needs inputs with at least one element, got shape {shape}")
    if entry.form == "any":
        return
    if len(shape) != _AXES[entry.form]:
        raise UserError(f"model {name} needs {_FORMS[entry.form]}, got inputs of shape {shape}")
    size = shape[1:] or shape
    if min(size) < entry.smallest:
        least = "x".join(str(entry.smallest) for _ in size)
        raise UserError(f"model {name} needs inputs of at least {least}, got {'x'.join(map(str, size))}")
