"""Waiting in a test for what another thread does."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["until"]


def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Returns as soon as `condition()` is true; fails the test if that takes longer than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
