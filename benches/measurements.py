"""What was measured, as benchmarks keep and show it: medians of rounds, tables of them, files that are never half.

Rules. A measurement is a dict of numbers by name, `_s` seconds, `_bytes` and `bytes_` bytes; what stands under a name
may be such a dict itself. The median of whole numbers is one of them, the lower of the two in the middle.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Columns", "Measurement", "median", "table", "write_whole"]

Measurement = dict[str, Any]

Columns = Sequence[tuple[str, int, Callable[[Measurement], str]]]
"""Of a table: title, width, and what stands in a row's cell."""


def median(rounds: Sequence[Measurement]) -> Measurement:
    """The median of each number, whether every truth was one; of what is neither (plan, lanes' reasons) the last."""
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
    """One line for each of `rows`, and below it what `notes` has under its name. What a row lacks is a dash."""
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


def write_whole(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON beside `path` and puts it there: whoever ends us meanwhile leaves the file that was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
