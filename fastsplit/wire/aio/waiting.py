"""Waiting on an event loop: futures with a deadline, and the tasks that wait for room in shared memory.

Rules. All runs in the loop's thread, except `MemoryWaiters.on_memory_pressure`. Tasks get room in the order in which
they asked for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ...errors import ArenaFull
from ..connection import Connection

__all__ = ["MemoryWaiters", "settle", "settle_left", "within"]

_LOOK_EVERY_S = 0.01  # how often to look whether tensors of this side have died, of which no event tells


async def within(future: asyncio.Future[bool], deadline: float | None) -> bool:
    """Waits for a future that other code gives True. False after the deadline."""
    timer = None
    if deadline is not None:
        delay_s = max(deadline - time.monotonic(), 0.0)
        timer = future.get_loop().call_later(delay_s, settle, future, False)
    try:
        return await future
    finally:
        if timer is not None:
            timer.cancel()


def settle(future: asyncio.Future[bool], value: bool) -> None:
    """Sets the result of a future that has none."""
    if not future.done():
        future.set_result(value)


def settle_left(future: asyncio.Future[Any], error: BaseException | None = None) -> None:
    """For a forked child: tasks that wait for the future go on, if the loop ever runs there."""
    if not future.done():
        with contextlib.suppress(RuntimeError):  # the loop is closed
            if error is None:
                future.set_result(False)
            else:
                future.set_exception(error)
                future.exception()  # asyncio need not report that it was never retrieved


class MemoryWaiters:
    """The tasks that wait for room in one connection's shared memory. `send(head)`: sends a frame without tensors."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connection: Connection, send: Callable[[bytearray], object]
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._send: Callable[[bytearray], object] | None = send  # None once the connection has ended
        self._waiters: deque[asyncio.Future[bool]] = deque()
        self._timer: asyncio.Handle | None = None

    async def wait(self, full: ArenaFull, deadline: float | None, *, again: bool) -> bool:
        """Waits for a sign that there may be room now. False if the deadline has passed, or if there is nothing to wait
        for.

        `full`: what the arena raised. `again`: there was a sign, but no room; this task is the first in order then.
        """
        arena = self._connection.arena
        if arena is None or arena.closed or self._send is None or not full.may_wait:
            return False
        future: asyncio.Future[bool] = self._loop.create_future()
        if again:
            self._waiters.appendleft(future)
        else:
            self._waiters.append(future)
        if self._timer is None:
            self._look()
        try:
            return await within(future, deadline)
        finally:
            with contextlib.suppress(ValueError):
                self._waiters.remove(future)

    def wake(self) -> None:
        """There may be room: the first task looks. Also called when a task that waited has found room, for the next."""
        while self._waiters:
            future = self._waiters.popleft()
            if not future.done():
                future.set_result(True)
                return

    def on_memory_pressure(self, _: float | None) -> None:
        """For an arena that is full, in a thread that may wait."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            if self._connection.outbox.may_ask(time.monotonic()):
                self._loop.call_soon_threadsafe(self._ask_for_returns)
        time.sleep(0.001)

    def close(self) -> None:
        """The connection has ended: no task waits any more."""
        self._send = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for future in list(self._waiters):
            settle(future, False)

    def leave(self) -> None:
        """For a forked child: see system/forked.py."""
        self._send = None
        for future in self._waiters:
            settle_left(future)

    def _ask_for_returns(self) -> None:
        if self._send is not None:
            head = self._connection.outbox.ask(time.monotonic())
            if head is not None:
                self._send(head)

    def _look(self) -> None:
        self._timer = None
        if self._waiters:
            self._ask_for_returns()
            self._timer = self._loop.call_later(_LOOK_EVERY_S, self._look_again)

    def _look_again(self) -> None:
        self.wake()
        self._look()
