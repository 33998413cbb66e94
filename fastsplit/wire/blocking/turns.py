"""Requests that wait until the peer takes one more, in order.

A request that waits for its turn reads, as a call that waits for its reply does. A thread that has read, or has
discarded a request, lets in as many as there is room for.

Rules. The queue and the turns change under the channel's lock.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import Any

from ..client import ClientCore

__all__ = ["Turn", "Turns"]


class Turn:
    """A request that waits until the peer takes one more. Waited for like a Future."""

    __slots__ = ("_done",)

    def __init__(self) -> None:
        self._done = False


class Turns(deque[Turn]):
    """The turns that are waited for, the oldest first. `lock` is that of the condition `changed`."""

    def __init__(self, core: ClientCore, lock: Any, changed: threading.Condition) -> None:
        super().__init__()
        self._core = core
        self._lock = lock
        self._changed = changed

    def let_in(self) -> None:
        """Gives their turn to as many requests as the peer takes, in order; after the end to all, which then fail."""
        core = self._core
        with self._lock:
            count = len(self) if core.closed else max(core.max_inflight - core.session.inflight, 0)
            for turn in itertools.islice(self, count):
                turn._done = True
            self._changed.notify_all()
