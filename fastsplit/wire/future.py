"""What a call gives: a Result now, or a Future of one, or an error. The channel sets the outcome and does all waiting.

A Future is a concurrent.futures.Future, so that `concurrent.futures.wait`, `as_completed` and `asyncio.wrap_future`
take it. These use private attributes of the base class: a lock (`_condition`), the state, and a list of waiters. A
future creates them (`_Waiters`) when one is first read, since creating them takes a microsecond.

Rules. A future's outcome is set once, under the channel's lock. A result's tensors are the caller's own.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..errors import CancelledError, DeadlineError, FastsplitError, RemoteOpError, fresh
from ..printable import get_logger
from ..system.forked import renew
from ..system.threads import call_safely
from ..tensors import Arrays
from .events import Error, Reply
from .options import parse_timeout

if TYPE_CHECKING:
    from .blocking.channel import Channel

__all__ = ["CallTimeout", "Future", "Result", "remote_error", "warn_of_discarded", "why_closed"]

_logger = get_logger("fastsplit.channel")


class Result(tuple):  # type: ignore[type-arg]
    """The tensors of a reply: a tuple, with what else the reply said.

    The tensors are writable and the caller's own. `attrs`: the reply's attributes. `remote_s`: seconds in the handler,
    as the server says, but never more than this side waited. `wait_s`: seconds from the end of encoding the request to
    the reply.
    """

    attrs: dict[str, Any]
    remote_s: float
    wait_s: float

    @classmethod
    def of(cls, event: Reply, arrays: Arrays, waited_ns: int) -> Result:
        """What a reply gives. Raises TensorError for a tensor that arrays of this kind cannot be, ResourceError if
        there was no memory for it."""
        if event.refusal is not None:
            raise fresh(event.refusal)
        result = cls(map(arrays.view, event.buffers, event.message.tensors))
        result.attrs = event.message.attrs
        # The peer's word: it cannot have worked longer than we have waited.
        result.remote_s = min(event.time_ns, waited_ns) * 1e-9
        result.wait_s = waited_ns * 1e-9
        return result


def remote_error(op: str, event: Error) -> FastsplitError:
    """What an ERROR frame means for the call that it answers."""
    if event.code == "deadline":
        return DeadlineError(f"{op}: {event.text}")
    if event.code == "cancelled":
        return CancelledError(f"{op}: {event.text}")
    return RemoteOpError(op, event.text)


class CallTimeout:
    """What both kinds of channel say of how long a call may take."""

    _call_timeout_s: float | None

    @property
    def call_timeout_s(self) -> float | None:
        """Seconds for each call that says nothing else, None for no deadline. May be set at any time."""
        return self._call_timeout_s

    @call_timeout_s.setter
    def call_timeout_s(self, seconds: float | None) -> None:
        self._call_timeout_s = None if seconds is None else parse_timeout("call_timeout_s", seconds)

    def _deadline(self, timeout_s: float | None) -> tuple[float | None, float | None]:
        """Seconds that a call may take, and when they are over."""
        if timeout_s is None:
            timeout_s = self._call_timeout_s
        else:
            timeout_s = parse_timeout("timeout_s", timeout_s)
        return timeout_s, None if timeout_s is None else monotonic() + timeout_s


def why_closed(error: FastsplitError | None) -> str:
    """Why calls are refused. `error`: what has ended the connection, None if it is about to be closed."""
    return "the channel is being closed" if error is None else f"the channel is closed: {error}"


def warn_of_discarded(uri: str, ops: Iterable[str]) -> None:
    """Logs which calls were in flight when their channel was closed."""
    counts = Counter(ops)
    if counts:
        named = ", ".join(f"{count} of {op!r}" for op, count in counts.most_common())
        _logger.warning("%s: closed with calls in flight, whose results are lost: %s", uri, named)


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
        "_channel",
        "_deadline",
        "_done",
        "_error",
        "_id",
        "_outcome",
        "_sent_ns",
        "_timeout_s",
        "_waited_for",
        "op",
    )

    def __init__(
        self, channel: Channel, request_id: int, op: str, deadline: float | None, timeout_s: float | None, sent_ns: int
    ) -> None:
        self.op = op
        self._channel = channel
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
            self._channel._wait_for(self, timeout)
        if self._error is not None:
            try:
                raise fresh(self._error)  # else the future keeps the frames of those who asked, and their tensors
            finally:
                del self
        assert self._outcome is not None
        return self._outcome

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits like `result`, and returns the call's error, None if it has none. Raises CancelledError if the call was
        cancelled."""
        if not self._done:
            self._channel._wait_for(self, timeout)
        if self.cancelled():
            assert self._error is not None
            raise fresh(self._error)
        return self._error

    def cancel(self) -> bool:
        """Gives the call up: False if its reply was in already. The server is told; a handler at work may go on."""
        return self._channel._give_up(self, CancelledError(f"{self.op}: cancelled")) or self.cancelled()

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Calls `callback(future)` when the call is done: at once if it is, otherwise in the thread that has read the
        reply, when that is neither reading nor sending: it may call and submit.

        That thread is one that waits for a reply, or the channel's own, which reads nothing until the callback returns.
        What the callback raises is logged.
        """
        with self._channel._lock:
            if not self._done:
                self._callbacks = [*(self._callbacks or ()), callback]
                return
        call_safely(f"a callback of {self!r}", callback, self)

    def _late(self) -> DeadlineError:
        return DeadlineError(f"{self.op}: no reply within its deadline of {self._timeout_s} s")

    def _leave(self) -> None:
        """For a forked child: see forked.py. Its outcome is set."""
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
