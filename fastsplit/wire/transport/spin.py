"""Spinning: how long a reader polls for the next message before it sleeps, and when that pays.

A link whose peer is slower than the spin stops spinning, and tries again now and then (`Spin`).
"""

from __future__ import annotations

import numbers
import os
from typing import Any

from ...errors import SettingError, shown

__all__ = ["Spin", "choose_spin_us", "cores", "spin_us_beside"]

_SPIN_US = 50.0
_MAX_MISSES = 4  # after this many waits in a row that outlasted their spin, a link stops spinning ...
_RETRY_AFTER = 32  # ... except in one wait of this many: the peer may have become quick


def cores() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_spin_us(spin_us: Any) -> float:
    """Microseconds that a reader spins before it sleeps: as given, else FASTSPLIT_SPIN_US, else 50, or 0 on one core.

    Raises SettingError for anything but a number from 0 to 1e6.
    """
    if spin_us is None:
        text = os.environ.get("FASTSPLIT_SPIN_US")
        if text is None:
            return _SPIN_US if cores() > 1 else 0.0
        try:
            spin_us = float(text)
        except ValueError:
            raise SettingError(f"FASTSPLIT_SPIN_US: {text!r}, expected a number of microseconds") from None
    is_number = isinstance(spin_us, numbers.Real)
    if not is_number or not 0 <= spin_us <= 1e6:
        raise SettingError(f"spin_us: {shown(spin_us)}, expected 0 to 1e6")
    return float(spin_us)


def spin_us_beside(threads: int) -> float | None:
    """Spin time when the peer computes on `threads` of this machine's cores: 0 if it uses them all, else None (keep the
    default). FASTSPLIT_SPIN_US wins.

    A spinning reader takes a core from OpenMP's threads, which spin for it, too: tokens take a tenth longer
    (docs/notes.md).
    """
    return 0.0 if "FASTSPLIT_SPIN_US" not in os.environ and threads >= cores() else None


class Spin:
    """Whether to spin before sleeping: not while the peer is slower than the spin. `spin_us` may be set at any time."""

    __slots__ = ("_misses", "_skipped", "spin_us")

    def __init__(self, spin_us: float) -> None:
        self.spin_us = spin_us
        self._misses = self._skipped = 0

    def begin(self) -> bool:
        """Whether to spin now. Afterwards call `hit` (something came in time) or `miss`."""
        if self._misses >= _MAX_MISSES:
            self._skipped += 1
            if self._skipped < _RETRY_AFTER:
                return False
            self._skipped = 0
        return True

    def hit(self) -> None:
        self._misses = 0

    def miss(self) -> None:
        self._misses += 1
