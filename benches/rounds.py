"""Interleaved rounds: everything is measured once in each, in changing order, so that what drifts favours nobody."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

__all__ = ["interleaved", "progress"]

_T = TypeVar("_T")


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
