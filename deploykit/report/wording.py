"""How the report writes numbers; a number that was not measured is a dash."""

from __future__ import annotations

from collections.abc import Sequence

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"  # a number and its unit stay on one line


def percent(value: float | None, digits: int = 2) -> str:
    """Write a share: ``97.31%``."""
    return DASH if value is None else f"{100 * value:.{digits}f}%"


def points(value: float | None, digits: int = 2) -> str:
    """Write a difference of accuracies in percentage points: ``+0.40``."""
    if value is None:
        return DASH
    text = f"{100 * value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", MINUS)


def milliseconds(value: float | None) -> str:
    """Write a time with three digits that count: ``0.152 ms``."""
    return DASH if value is None else f"{_three_digits(value)}{SPACE}ms"


def short_milliseconds(value: float | None) -> str:
    """Write a time as `milliseconds` does, where a column already says the unit: ``0.152``."""
    return DASH if value is None else _three_digits(value)


def times(value: float | None) -> str:
    """Write a ratio: 1.87 and the sign of multiplication."""
    return DASH if value is None else f"{value:.2f}\N{MULTIPLICATION SIGN}"


def times_interval(interval: Sequence[float] | None) -> str:
    """Write the interval of a ratio: ``1.82 to 1.90``."""
    return DASH if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def points_interval(interval: Sequence[float] | None) -> str:
    """Write the interval of a difference: ``+0.30 to +1.10``."""
    return DASH if interval is None else f"{points(interval[0])} to {points(interval[1])}"


def size(value: float | None) -> str:
    """Write bytes in decimal units: ``276 kB``."""
    return DASH if value is None else _scaled(value, ("B", "kB", "MB", "GB"))


def count(value: float | None) -> str:
    """Write a large count: ``41.2 M``."""
    return DASH if value is None else _scaled(value, ("", "k", "M", "G"))


def seconds(value: float | None) -> str:
    """Write a duration: ``3 min 20 s``."""
    if value is None:
        return DASH
    if value < 60:
        return f"{_three_digits(value)}{SPACE}s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60}{SPACE}min {whole % 60}{SPACE}s"
    return f"{whole // 3600}{SPACE}h {whole % 3600 // 60}{SPACE}min"


def _scaled(value: float, units: Sequence[str]) -> str:
    unit = 0
    while value >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    number = f"{value:.0f}" if unit == 0 else _three_digits(value)
    return f"{number}{SPACE}{units[unit]}".strip()


def _three_digits(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{digits}f}"
