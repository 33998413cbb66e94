"""What every transport has in common."""

from __future__ import annotations

import time

__all__ = ["remaining_s"]


def remaining_s(deadline: float | None) -> float | None:
    """Seconds until a deadline, at least 0; None for none."""
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)
