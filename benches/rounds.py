"""Interleaved rounds and their medians.

Rules. Everything is measured once in each round, in changing order, so that drift favours none of it. A measurement is
a dict of numbers by name, `_s` seconds, `_bytes` and `bytes_` bytes; it may hold another such dict. The median of whole
numbers is one of them, the lower of the two in the middle.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["Columns", "Measurement", "interleaved", "median", "progress", "table"]

_T = TypeVar("_T")
Measurement = dict[str, Any]
Columns = Sequence[tuple[str, int, Callable[[Measurement], str]]]
"""Of a table: title, width, and the text of a row's cell."""


def interleaved(groups: Sequence[Sequence[_T]], rounds: int, what: str) -> Iterator[_T]:
    """Each of `groups` in each round, and in it each one once: those that are compared take turns at being first."""
    for number in range(rounds):
        progress(f"{what}: round {number + 1} of {rounds}")
        for group in groups:
            turn = number % len(group) if group else 0
            yield from group[turn:]
            yield from group[:turn]


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def median(rounds: Sequence[Measurement]) -> Measurement:
    """The median of each number, whether every truth was one; of anything else (plan, reasons) the last."""
    found: Measurement = {}
    for key, value in rounds[-1].items():
        values = [measured[key] for measured in rounds if measured.get(key) is not None]
        if isinstance(value, bool):
            found[key] = all(values)
        elif isinstance(value, int):
            found[key] = statistics.median_low(values)
        elif isinstance(value, float):
            found[key] = statistics.median(values)
        elif isinstance(value, dict):
            found[key] = median(values)
        else:
            found[key] = value
    return found


def table(title: str, columns: Columns, rows: Mapping[str, Measurement], notes: Mapping[str, Sequence[str]]) -> str:
    """One line for each of `rows`, and below it what `notes` has under its name. A missing figure is a dash."""
    widest = max(map(len, (title, *rows))) + 2
    lines = [f"{title:<{widest}}" + "".join(f"{name:>{width}}" for name, width, _ in columns)]
    for row, measured in rows.items():
        cells = []
        for _, width, text_of in columns:
            try:
                text = text_of(measured)
            except (KeyError, TypeError):  # HF has no communication; without HF there are no ratios
                text = "-"
            cells.append(f"{text:>{width}}")
        lines.append(f"{row:<{widest}}" + "".join(cells))
        lines += [f"    {line}" for line in notes.get(row, ())]
    return "\n".join(lines)
