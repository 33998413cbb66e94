"""How often a test repeats what it does: as often as it says with `--exhaustive`, else a part of that.

Rule. A test that asks here is marked `matrix`, so that `make exhaustive` runs it.
"""

from __future__ import annotations

__all__ = ["times"]

exhaustive = False
"""Set by conftest.py, before the tests are imported."""


def times(count: int, one_in: int = 4) -> int:
    """`count` repetitions, or one in `one_in`."""
    return count if exhaustive else max(count // one_in, 1)
