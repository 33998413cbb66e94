"""What callers give: the options of channels and servers, and the checks of each.

Rules. Each check takes the argument's name, so that its error names the argument, what came and what was expected.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from ..errors import SettingError, shown

__all__ = ["MAX_TIMEOUT_S", "parse_count", "parse_flag", "parse_memory", "parse_timeout"]

MAX_TIMEOUT_S = 1e6
"""Eleven days; beyond, poll's milliseconds and the header's nanoseconds would run out."""


def parse_timeout(name: str, seconds: Any) -> float:
    """Seconds that a caller gives as the argument `name`. Raises SettingError."""
    is_number = isinstance(seconds, numbers.Real)
    if is_number and 0 <= seconds <= MAX_TIMEOUT_S:  # NaN is not, either
        return float(seconds)
    raise SettingError(f"{name}: {shown(seconds)}, expected 0 to {MAX_TIMEOUT_S:g} seconds, as a number")


def parse_count(name: str, count: Any, least: int, most: int | None = None) -> int:
    """A whole number that a caller gives as the argument `name`. Raises SettingError."""
    is_number = isinstance(count, numbers.Integral)
    if is_number and least <= count and (most is None or count <= most):
        return int(count)
    expected = f"{least} or more" if most is None else f"{least} to {most}"
    raise SettingError(f"{name}: {shown(count)}, expected {expected}, as an int")


def parse_flag(name: str, value: Any) -> bool:
    """The bool given as the argument `name`. Raises SettingError for anything else: the string "no" would be true."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise SettingError(f"{name}: {shown(value)}, expected True or False")


def parse_memory(pool: Any, on_segment: Any) -> tuple[Any, Any]:
    """The arguments `pool` and `on_segment`. Raises SettingError."""
    if not callable(getattr(pool, "allocate", None)):
        raise SettingError(f"pool: {shown(pool)}, expected a fastsplit.memory.Pool")
    if on_segment is not None and not callable(on_segment):
        raise SettingError(f"on_segment: {shown(on_segment)}, expected None or a function of an address and a size")
    return pool, on_segment
