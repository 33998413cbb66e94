"""Calls on an event loop that wait for their turn: until the server takes one more request, and until few enough bytes
wait to be sent.

Rules. Turns come in order. A call whose turn has come holds a place until it goes on: `reserved`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from ..client import ClientCore
from .pump import Pump
from .waiting import within

__all__ = ["Turns"]


class Turns:
    """The calls that wait, in order. `max_queued_nbytes`: see aio.Channel."""

    def __init__(self, core: ClientCore, pump: Pump, max_queued_nbytes: int) -> None:
        self.waiting: deque[tuple[int, asyncio.Future[bool]]] = deque()
        """Their bytes, and what they wait for."""
        self.reserved = self.reserved_nbytes = 0
        self._core = core
        self._pump = pump
        self._max_queued_nbytes = max_queued_nbytes

    def has_room(self, nbytes: int) -> bool:
        """Whether a call that has `nbytes` to send may go on now, if none waits before it."""
        core = self._core
        queued_nbytes = self._pump.outbox.queued_nbytes + self.reserved_nbytes
        return core.session.inflight + self.reserved < core.max_inflight and (
            not queued_nbytes or queued_nbytes + nbytes <= self._max_queued_nbytes
        )

    async def wait(self, nbytes: int, deadline: float | None, *, first: bool = False) -> bool:
        """Waits for the turn of a call that has `nbytes` to send. False if the deadline passed first, or after the end.

        `first`: it had its turn already.
        """
        future: asyncio.Future[bool] = self._pump.loop.create_future()
        entry = (nbytes, future)
        if first:
            self.waiting.appendleft(entry)
            self.let_in()
        else:
            self.waiting.append(entry)
        try:
            return await within(future, deadline)
        finally:
            if future.done() and not future.cancelled() and future.result():
                self.reserved -= 1
                self.reserved_nbytes -= nbytes
            else:
                with contextlib.suppress(ValueError):
                    self.waiting.remove(entry)

    def let_in(self) -> None:
        """Gives their turn to the calls that there is room for, in order."""
        while self.waiting:
            nbytes, future = self.waiting[0]
            if not future.done():
                if not self.has_room(nbytes):
                    return
                self.reserved += 1
                self.reserved_nbytes += nbytes
                future.set_result(True)
            self.waiting.popleft()

    def end(self) -> None:
        """The connection has ended: all go on, and fail."""
        waiting, self.waiting = self.waiting, deque()
        for _, future in waiting:
            if not future.done():
                future.set_result(False)
