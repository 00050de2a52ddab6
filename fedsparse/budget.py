"""Budgets: which device may spend what, whether a round kept to it, and the narrow dense model of equal cost."""

from __future__ import annotations

import csv
import io
import math
import tomllib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsparse.errors import UserError, unknown

if TYPE_CHECKING:  # the configuration is read before torch is imported
    from torch import nn

    from fedsparse.task import Budget, Device

ON_OVER_BUDGET = ("stop", "record")
OF = ("parameters", "multiply_adds", "bytes", "memory")  # density; forward, per sample; of an upload; of training
EQUALS = ("parameters", "multiply_adds")
_TOLERANCE = 1e-9
_WIDTH_STEPS = 8192  # widths are searched on this grid: exact floats, finer than half a channel of 2048


@dataclass(frozen=True)
class BudgetConfig:
    """tiers: shares in (0, 1] of what the dense model costs; the device with id i gets ``tiers[i % len(tiers)]``;
    empty = unlimited.

    of: what the tiers are shares of, see :data:`OF`. table: a .csv or .toml file with budgets of single clients, which
    replace their tier's (:func:`read_table`); "" = none. on_over_budget: "stop" the run, or "record" the violation and
    go on.
    """

    tiers: tuple[float, ...] = ()
    of: str = "parameters"
    table: str = ""
    on_over_budget: str = "stop"

    def __post_init__(self) -> None:
        tiers: object = self.tiers  # from a file it may be anything
        if not isinstance(tiers, list | tuple):
            raise UserError(f"budget.tiers must be a list of densities in (0, 1], got {tiers!r}")
        object.__setattr__(self, "tiers", tuple(tiers))
        for tier in tiers:
            if isinstance(tier, bool) or not isinstance(tier, int | float) or not 0 < tier <= 1:
                raise UserError(f"budget.tiers must be densities in (0, 1], got {tier!r}")
        if self.of not in OF:
            raise unknown("budget.of", str(self.of), OF)
        if self.on_over_budget not in ON_OVER_BUDGET:
            raise unknown("budget.on_over_budget", str(self.on_over_budget), ON_OVER_BUDGET)
        if self.table and Path(self.table).suffix not in (".csv", ".toml"):
            raise UserError(f"budget.table must be a .csv or a .toml file, got {self.table!r}")


@dataclass(frozen=True)
class Dense:
    """What the dense model costs: forward multiply-adds per sample, bytes of an upload, peak memory of training."""

    forward_macs: float
    bytes_up: int
    memory: int


def assign(config: BudgetConfig, ids: Iterable[int], dense: Callable[[], Dense] | None = None) -> dict[int, Device]:
    """Each device with the budget of its tier, or with its own one from the table; in the order of ``ids``.

    dense: gives what the tiers are shares of; called only if that is something else than parameters.
    Raises UserError for a table that cannot be read or does not fit.
    """
    from fedsparse.task import Device

    ids = list(ids)
    own = read_table(config.table, set(ids)) if config.table else {}
    tiers = config.tiers or (None,)
    whole = dense() if dense and config.tiers and config.of != "parameters" else None
    budgets = {tier: _tier_budget(config.of, tier, whole) for tier in tiers}
    return {
        i: Device(i, own[i]) if i in own else Device(i, budgets[tier], tier=tier)
        for i, tier in ((i, tiers[i % len(tiers)]) for i in ids)
    }


def _tier_budget(of: str, tier: float | None, dense: Dense | None) -> Budget:
    """The budget of one tier, in the unit of the budget's field."""
    from fedsparse.task import Budget

    if tier is None or of == "parameters":
        return Budget(density=tier)
    if dense is None:
        raise ValueError(f"what the dense model costs is needed for tiers of {of}")
    if of == "multiply_adds":
        return Budget(forward_macs=tier * dense.forward_macs)
    return Budget(bytes_up=int(tier * dense.bytes_up)) if of == "bytes" else Budget(memory=int(tier * dense.memory))


# --- a table of devices ----------------------------------------------------------------------------------------------


def read_table(path: str, ids: Collection[int]) -> dict[int, Budget]:
    """The budgets in a file: a CSV with a header and a row a client, or a TOML file with a table ``[[device]]`` each.

    ``client`` is the client's id, the other columns or keys are fields of ``Budget``; what is empty or absent is
    unlimited. Raises UserError, with the place in the file, for ids that are not in ``ids`` or come twice, unknown
    names, and values that are not allowed.
    """
    budgets: dict[int, Budget] = {}
    for where, values in _rows_of(Path(path)):
        try:
            client, budget = _device_of(values)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if client not in ids:
            raise UserError(f"{where}: there is no client {client} among the {len(ids)} of this federation")
        if client in budgets:
            raise UserError(f"{where}: client {client} comes twice")
        budgets[client] = budget
    return budgets


def _rows_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Where each row stands, and its values."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return _toml_rows(path, text) if path.suffix == ".toml" else _csv_rows(path, text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"budget.table {str(path)!r} cannot be read: {reason}") from error


def _csv_rows(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
    names = [name.strip() for name in reader.fieldnames or ()]
    if "client" not in names or len(set(names)) < len(names):
        raise UserError(f"budget.table {str(path)!r} must begin with a header of different names, one of them 'client'")
    rows = []
    for row in reader:
        where, cells = f"budget.table {str(path)!r}, line {reader.line_num}", list(row.values())
        if None in row or None in cells:
            raise UserError(f"{where}: the header has {len(names)} columns, this row has not")
        rows.append((where, {name: cell.strip() for name, cell in zip(names, cells, strict=True) if cell.strip()}))
    return rows


def _toml_rows(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    tree = tomllib.loads(text)
    rows = tree.get("device", [])
    if tree.keys() - {"device"} or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"budget.table {str(path)!r} must hold tables [[device]] and nothing else")
    return [(f"budget.table {str(path)!r}, [[device]] {i}", row) for i, row in enumerate(rows, 1)]


def _device_of(values: dict[str, Any]) -> tuple[int, Budget]:
    """A client's id and budget from the words or numbers of its row."""
    from fedsparse.task import Budget

    kinds: dict[str, type] = {"client": int}
    kinds |= {f.name: int if "int" in str(f.type) else float for f in fields(Budget)}
    for name in values:
        if name not in kinds:
            raise unknown("column", name, kinds)
    numbers = {name: _number(name, value, kinds[name]) for name, value in values.items()}
    if "client" not in numbers:
        raise UserError("'client' is missing")
    return int(numbers.pop("client")), Budget(**numbers)  # type: ignore[arg-type]


def _number(name: str, value: Any, kind: type) -> float:
    """A number, or a word that is one; whole where ``kind`` is int. 1e6 and 64.0 are whole."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise UserError(f"{name} must be a {'whole ' if kind is int else ''}number, got {value!r}")
    return int(number) if kind is int else number


# --- the checker -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Violation:
    """A device spent more than it may. what: the budget's field."""

    what: str
    value: float
    limit: float

    def __str__(self) -> str:
        return f"{self.what} {self.value:.6g} is above the budget {self.limit:.6g}"


def check(
    budget: Budget,
    *,
    density_true: float | None = None,
    forward_macs: float | None = None,
    train_flops: float | None = None,
    memory: float | None = None,
    bytes_up: float | None = None,
    bytes_down: float | None = None,
) -> list[Violation]:
    """What of a round broke the budget. None = not known, not checked; NaN breaks any limit.

    Densities, multiply-adds and flops are products of quotients of counts: a billionth above the limit is rounding.
    """
    spent = (
        ("density", density_true, budget.density, _TOLERANCE),
        ("forward_macs", forward_macs, budget.forward_macs, _TOLERANCE),
        ("train_flops", train_flops, budget.train_flops, _TOLERANCE),
        ("memory", memory, budget.memory, 0.0),
        ("bytes_up", bytes_up, budget.bytes_up, 0.0),
        ("bytes_down", bytes_down, budget.bytes_down, 0.0),
    )
    return [
        Violation(what, value, limit)
        for what, value, limit, tolerance in spent
        if value is not None and limit is not None and not value <= limit + tolerance * max(1.0, limit)
    ]


def exceeded(client: int, server_round: int, found: Violation) -> UserError:
    """What stops a run whose violations are not only recorded."""
    return UserError(
        f"client {client}, round {server_round}: {found.what} {found.value:g} exceeds its budget {found.limit:g}"
        ' (budget.on_over_budget = "record" counts it instead)'
    )


def narrow_width(
    build: Callable[[float], nn.Module],
    input_shape: Sequence[int],
    *,
    tokens: bool = False,
    equal: str,
    target: float,
) -> tuple[float, float]:
    """The widest dense model that costs at most ``target`` times the one of width 1: (width, share reached).

    build: width in (0, 1] -> model (called on the meta device, so no values are made); equal: "parameters" (trainable
    scalars) or "multiply_adds" (of one forward pass); target: in (0, 1]. Widths are multiples of 1/8192; cost must not
    fall with width. Raises UserError with the smallest possible share if even the narrowest model costs more.
    """
    if equal not in EQUALS:
        raise unknown("narrow", equal, EQUALS)
    if not 0 < target <= 1:
        raise UserError(f"narrow_to must be in (0, 1], got {target}")

    def cost(step: int) -> float:
        return _dense_cost(build, step / _WIDTH_STEPS, input_shape, tokens, equal)

    full, smallest = cost(_WIDTH_STEPS), cost(1)
    limit = target * full * (1 + _TOLERANCE)
    if smallest > limit:
        raise UserError(
            f"no narrow model has {target:.4g} of the {equal.replace('_', '-')}: "
            f"the smallest possible share is {smallest / full:.4g}"
        )
    low, high = 1, _WIDTH_STEPS + 1  # cost(low) fits; cost(high) does not, or is out of range
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low / _WIDTH_STEPS, cost(low) / full


def _dense_cost(
    build: Callable[[float], nn.Module], width: float, input_shape: Sequence[int], tokens: bool, equal: str
) -> float:
    """Trainable scalars or forward multiply-adds of the model of that width."""
    import torch

    from fedsparse import cost

    with torch.device("meta"):
        model = build(width)
    if equal == "parameters":
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    return cost.forward_macs(cost.trace(model, input_shape, tokens=tokens))
