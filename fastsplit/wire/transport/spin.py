"""Spinning: looking for what is to come again and again before sleeping, for as long as that pays."""

from __future__ import annotations

import numbers
import os
from typing import Any

from ...errors import SettingError, shown

__all__ = ["Spin", "choose_spin_us", "cores", "spin_us_beside"]

_SPIN_US = 50.0
_MAX_MISSES = 4  # waits in a row that outlasted their spin, after which a link spins no more ...
_RETRY_AFTER = 32  # ... but for one wait in so many, to see whether the peer has become quick


def cores() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_spin_us(spin_us: Any) -> float:
    """Microseconds that a reader spins before it sleeps: as given, else FASTSPLIT_SPIN_US, else 50, 0 on one core.

    Raises SettingError for what is not a number from 0 to 1e6.
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
    """How long to spin for messages beside somebody who computes with so many threads on the same cores: 0 if these are
    all there are, None for as long as ever. FASTSPLIT_SPIN_US wins.

    Who spins takes a core from OpenMP's threads, which spin for it, too. SmolLM2 in fp32, both sides on two cores, plan
    folded, a token: 67 ms, with 50 us 75 ms.
    """
    return 0.0 if "FASTSPLIT_SPIN_US" not in os.environ and threads >= cores() else None


class Spin:
    """Whether it pays to spin before sleeping: not while the peer is slower than that."""

    __slots__ = ("_misses", "_skipped", "spin_us")

    def __init__(self, spin_us: float) -> None:
        self.spin_us = spin_us
        self._misses = self._skipped = 0

    def begin(self) -> bool:
        """Whether to spin now. Afterwards say `hit` or `miss`."""
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
