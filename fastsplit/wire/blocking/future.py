"""A call in flight: a Future, whose outcome the channel's reader sets and waits for.

A Future is a concurrent.futures.Future, so that `concurrent.futures.wait`, `as_completed` and `asyncio.wrap_future`
take it. These use private attributes of the base class: a lock (`_condition`), the state, and a list of waiters. A
future creates them (`_Waiters`) when one is first read, since creating them takes a microsecond.

Rules. A future's outcome is set once, under the channel's lock.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import CancelledError, DeadlineError, fresh
from ...printable import get_logger
from ...system.forked import renew
from ...system.threads import call_safely
from ..result import Result

if TYPE_CHECKING:
    from .reader import Reader

__all__ = ["Future"]

_logger = get_logger("fastsplit.channel")


_PENDING, _CANCELLED, _FINISHED = "PENDING", "CANCELLED_AND_NOTIFIED", "FINISHED"  # concurrent.futures' states
_LOCK_S = 1.0  # the standard library's functions hold a future's lock for microseconds, unless Ctrl-C ends them there
_creating = threading.RLock()
os.register_at_fork(after_in_child=lambda: renew(_creating))


class _Waiters:
    """The concurrent.futures waiters of a future. While `lock` is held, `settled` does not change."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.settled = False
        self.waiting: list[Any] = []
        self.untold: list[Any] = []
        """Of these, the ones not yet notified that it is settled."""


class Future(concurrent.futures.Future[Result]):
    """A call in flight: a concurrent.futures.Future, made by `Channel.submit`. Thread-safe."""

    __slots__ = (
        "_begun",
        "_callbacks",
        "_deadline",
        "_done",
        "_error",
        "_id",
        "_outcome",
        "_reader",
        "_sent_ns",
        "_timeout_s",
        "_waited_for",
        "op",
    )

    def __init__(
        self, reader: Reader, request_id: int, op: str, deadline: float | None, timeout_s: float | None, sent_ns: int
    ) -> None:
        self.op = op
        self._reader = reader
        self._id = request_id
        self._deadline = deadline
        self._timeout_s = timeout_s
        self._sent_ns = sent_ns
        self._begun = False  # whether a byte of the request may have been sent
        self._done = False
        self._outcome: Result | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Any], object]] | None = None
        self._waited_for: _Waiters | None = None

    def __repr__(self) -> str:
        state = "pending" if not self._done else "failed" if self._error is not None else "done"
        return f"<Future of {self.op!r}, {state}>"

    def done(self) -> bool:
        """Whether the reply (or an error) is in. Replies are read even if no caller waits for them."""
        return self._done

    def running(self) -> bool:
        """Whether the call is in flight."""
        return not self._done

    def cancelled(self) -> bool:
        """Whether `cancel` came before the reply."""
        return isinstance(self._error, CancelledError)

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the reply's tensors, `timeout` seconds at most. Returns the same object each time.

        Raises DeadlineError when `timeout` passes (the call goes on) or the call's own deadline does (it is cancelled),
        and what `Channel.call` raises.
        """
        if not self._done:
            self._reader.wait_for(self, timeout)
        if self._error is not None:
            try:
                raise fresh(self._error)  # else the future keeps the callers' frames, and their tensors
            finally:
                del self
        assert self._outcome is not None
        return self._outcome

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits like `result`, and returns the call's error, None if it has none. Raises CancelledError if the call was
        cancelled."""
        if not self._done:
            self._reader.wait_for(self, timeout)
        if self.cancelled():
            assert self._error is not None
            raise fresh(self._error)
        return self._error

    def cancel(self) -> bool:
        """Cancels the call: False if its reply was in already. The server is told; a handler at work may go on."""
        return self._reader.cancel(self, CancelledError(f"{self.op}: cancelled")) or self.cancelled()

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Calls `callback(future)` when the call is done: at once if it is, otherwise in the thread that has read the
        reply, when that is neither reading nor sending: it may call and submit.

        That thread is one that waits for a reply, or the channel's own, which reads nothing until the callback returns.
        What the callback raises is logged.
        """
        with self._reader.lock:
            if not self._done:
                self._callbacks = [*(self._callbacks or ()), callback]
                return
        call_safely(f"a callback of {self!r}", callback, self)

    def _late(self) -> DeadlineError:
        return DeadlineError(f"{self.op}: no reply within its deadline of {self._timeout_s} s")

    def _leave(self) -> None:
        """For a forked child: see system/forked.py. Its outcome is set."""
        waiters = self._waited_for
        if waiters is not None:
            renew(waiters.lock)
            waiters.settled = True

    # ---- for concurrent.futures ----

    def set_running_or_notify_cancel(self) -> bool:
        raise concurrent.futures.InvalidStateError("the channel sets a call's state")

    def set_result(self, result: Any) -> None:
        raise concurrent.futures.InvalidStateError("the channel sets a call's outcome")

    def set_exception(self, exception: BaseException | None) -> None:
        raise concurrent.futures.InvalidStateError("the channel sets a call's outcome")

    def _waiters_of(self) -> _Waiters:
        with _creating:
            if self._waited_for is None:
                waiters = _Waiters()
                with waiters.lock:  # so that `_tell_waiters` comes after this or has nothing to do
                    self._waited_for = waiters
                    waiters.settled = self._done
            return self._waited_for

    def _tell_waiters(self) -> None:
        """Notifies the concurrent.futures waiters of the outcome. Runs as a callback does."""
        waiters = self._waiters_of()
        held = False
        try:
            (held,) = map(waiters.lock.acquire, (True,), (_LOCK_S,))
            if not held:
                _logger.warning("%r: its waiters are not notified: an interrupted wait has left its lock taken", self)
                return
            if not waiters.settled:
                waiters.untold = list(waiters.waiting)
                waiters.settled = True
            while waiters.untold:
                waiter = waiters.untold[0]
                if self.cancelled():
                    waiter.add_cancelled(self)
                elif self._error is not None:
                    waiter.add_exception(self)
                else:
                    waiter.add_result(self)
                del waiters.untold[:1]  # last: if interrupted, it is notified again
        finally:
            if held:
                waiters.lock.release()

    if not TYPE_CHECKING:  # type checkers see the base class's attributes

        @property
        def _condition(self):
            return self._waiters_of().lock

        @property
        def _waiters(self):
            return self._waiters_of().waiting

        @property
        def _state(self):
            done = self._done if self._waited_for is None else self._waited_for.settled
            return _PENDING if not done else _CANCELLED if self.cancelled() else _FINISHED
