"""Write numbers for people; a missing number is a dash."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

MISSING = "-"
"""Text for a value that is missing or not finite."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def is_number(value: Any) -> TypeGuard[float]:
    """Tell whether a value of a record is a finite number."""
    is_kind = isinstance(value, int | float) and not isinstance(value, bool)
    return is_kind and abs(value) <= sys.float_info.max


def number(value: Any, digits: int, *, width: int = 0) -> str:
    """Write a number with fixed digits and thousands separators, right-aligned in ``width``."""
    return f"{f'{value:,.{digits}f}' if is_number(value) else MISSING:>{width}}"


def integer(value: Any) -> str:
    """Write a whole number with thousands separators."""
    return number(value, 0)


def tokens_per_s(value: Any) -> str:
    """Write a speed, with one decimal below 10."""
    return number(value, 1 if is_number(value) and abs(value) < 10 else 0)


def bytes_text(value: Any) -> str:
    """Write bytes with three digits in a suitable unit: ``0 B``, ``12.3 MiB``."""
    if not is_number(value):
        return MISSING
    scaled, unit = scale_bytes(value)
    amount = value / scaled
    digits = 0 if unit == "B" else (2 if amount < 10 else 1 if amount < 100 else 0)
    return f"{amount:,.{digits}f} {unit}"


def scale_bytes(largest: float) -> tuple[int, str]:
    """Choose the unit for values up to ``largest``; return its bytes and its name."""
    exponent = 0
    while largest >= 1024 ** (exponent + 1) and exponent < len(_UNITS) - 1:
        exponent += 1
    return 1024**exponent, _UNITS[exponent]


def duration(seconds: Any) -> str:
    """Write a time span: ``48.2 s``, ``12 min 5 s``, ``3 h 20 min``."""
    if not is_number(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def count(value: int, noun: str, plural: str = "s") -> str:
    """Write a count with its noun: ``1 round``, ``12 rounds``."""
    return f"{value:,} {noun}{'' if value == 1 else plural}"
