"""Numbers with units for people: four characters of number, the unit, "-" for what is not known."""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T", "P")


def share(value: float | None) -> str:
    """An accuracy or density with three decimals: 0.912."""
    return "-" if value is None else f"{value:.3f}"


def count(value: float | None) -> str:
    """A count: 950, 12.3k, 1.23M."""
    return "-" if value is None else "".join(_scaled(value))


def size(value: float | None) -> str:
    """Bytes in powers of 1,000: 950 B, 12.3 kB."""
    if value is None:
        return "-"
    number, prefix = _scaled(value)
    return f"{number} {prefix}B"


def seconds(value: float | None) -> str:
    """A duration: 0.35 ms, 12.3 ms, 1.25 s, 75 s, 3:05:00 above an hour, 4:05 above two minutes."""
    if value is None:
        return "-"
    if 0 < value < 1:
        return f"{_three(1000 * value)} ms"
    if value < 120:
        return f"{_three(value) if value else 0} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _scaled(value: float) -> tuple[str, str]:
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return (f"{value:.0f}" if power == 0 and value == int(value) else _three(value)), _PREFIXES[power]


def _three(value: float) -> str:
    """Three significant digits, no exponent."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
