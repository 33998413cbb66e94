"""Who reads: a caller that waits, for itself and for all others; or the watcher, while no caller does.

How waiting works. A hand-over between threads costs more than a round trip, so a caller that waits for a reply reads
the socket; other callers sleep until their reply is in or the reader leaves and one of them takes over. While requests
are in flight and no caller reads, a thread of the channel does (watcher.py).

Callbacks run in a thread that has just read or sent, when it has stopped doing so: a callback may do all that other
code may, calls included. One thread runs one callback at a time. A finalizer, which the collector may run anywhere, and
a signal's handler may find their thread in the middle of a call; then a call of theirs is a ReentrantCallError, at
once.

Rules. A thread is among `inside` while it reads or sends. It leaves the reading in a `finally`, which each method
repeats: an interrupt could skip the call of a shared helper. An interrupted read is made again, with
the same events; only one that was interrupted while a frame took effect ends the connection (session.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from threading import get_ident
from time import monotonic, perf_counter_ns

from ...errors import (
    ClosedError,
    DeadlineError,
    FastsplitError,
    ReentrantCallError,
    RemoteProtocolError,
    ResourceError,
)
from ...printable import get_logger
from ...system.threads import call_safely
from ..connection import greeting
from ..transport.base import remaining_s
from .flush import ask_for_returns, send_returns, send_small
from .future import Future
from .state import State
from .turns import Turn
from .watcher import Watcher

__all__ = ["RELIEF_S", "Reader"]

_logger = get_logger("fastsplit.channel")

RELIEF_S = 0.005  # after which a thread that found another one reading looks again whether it must read itself
_LOOK_EVERY_S = 1.0  # how often a follower looks whether there is a reader: an interrupted one may leave silently
_TELL_S = 0.05  # how long a thread that has just sent a frame may take to release the lock, before an ABORT is left out
_LINGER_S = 0.5  # how long an aborted peer's bytes are read and dropped, so that it can read why


class Reader(State):
    """The reading side of a channel, and its front for the core."""

    # ---- calls ----

    def check_entry(self, op: str) -> int:
        """This thread's number, which is put among `inside` while it reads or sends.

        Raises ReentrantCallError where it is there already.
        """
        ident = get_ident()
        if ident in self.inside or ident in greeting:
            raise ReentrantCallError(
                f"{op}: this thread is in the middle of a call on this channel, or serves its requests, and would wait "
                "for itself; a finalizer or a signal's handler notes what is to be done, for later"
            )
        return ident

    def wait_for(self, future: Future, timeout: float | None) -> None:
        """Waits until a future is done. Raises DeadlineError after `timeout` seconds; a call whose own deadline passes
        is cancelled."""
        ident = self.check_entry(future.op)
        started_ns = perf_counter_ns()
        decoded_ns = self.session.decode_ns
        deadline = future._deadline
        limit = None if timeout is None else monotonic() + timeout
        own = limit is None or (deadline is not None and deadline <= limit)
        until = deadline if own else limit
        try:
            if self.connection.fast_path is not None and not future._done:
                self.connection.fast_path.wait(self, future, None if until is None else max(until - monotonic(), 0.0))
            self.wait_until_done(future, until, ident)
        except DeadlineError:
            if not own:
                raise DeadlineError(f"{future.op}: no reply within {timeout} s") from None
            self.cancel(future, future._late())
        finally:
            decoded_ns = self.session.decode_ns - decoded_ns
            waited_ns = perf_counter_ns() - started_ns - decoded_ns
            stats = self.core.stats
            stats.wait_s += waited_ns * 1e-9
            stats.serialization_s += decoded_ns * 1e-9
            if self.watcher is not None or self.events or self.callbacks:
                self.leave_to_watcher()

    def wait_until_done(self, waiter: Future | Turn, until: float | None, ident: int) -> None:
        """Reads, or waits for the thread that does. Raises DeadlineError at `until`."""
        while not waiter._done:
            try:
                self.inside.add(ident)
                if self.take_reading(waiter, until):
                    self.read_once(until)
                    while not self.callbacks and not waiter._done:
                        _check_clock(until)  # a peer may dribble for ever
                        self.read_once(until)
            finally:
                left = self.reading == ident
                if left:
                    self.reading = 0
                self.inside.discard(ident)
                if left:
                    self._left_reading()
            if self.callbacks:
                self.call_back()
                if not waiter._done:
                    _check_clock(until)

    def cancel(self, future: Future, error: FastsplitError) -> bool:
        """Ends a call without its reply. False if it is done already."""
        with self.lock:
            if future._done:
                return False
            self.core.calls.pop(future._id, None)
            self.settle(future, None, error)
        if self.session.mark_cancelled(future._id):
            # Best effort: the server may save some work; an answer that comes all the same is dropped.
            try:
                outbox = self.connection.outbox
                self.send_if_free(lambda: send_small(outbox, self.session.cancel(future._id)))
            except FastsplitError as lost:
                self.end(lost)
            self.attend()  # for the answer
        self.call_back()
        return True

    # ---- reading ----

    def take_reading(self, waiter: Future | Turn | None = None, until: float | None = None) -> bool:
        """Makes this thread the reader. With a waiter: waits for that, and returns False when the waiter is done first.

        Without one, returns False at once if another thread reads. Raises DeadlineError at `until`. The caller leaves
        reading in a `finally`, even if this was interrupted.
        """
        with self.lock:
            while self.reading:
                if waiter is None or waiter._done:
                    return False
                self.followers += 1
                try:
                    left_s = remaining_s(until)
                    self.changed.wait(_LOOK_EVERY_S if left_s is None else min(left_s, _LOOK_EVERY_S))
                    if self.reading and not waiter._done:
                        _check_clock(until)
                except BaseException:
                    if not self.lock._is_owned():  # type: ignore[attr-defined]  # interrupted as it let go of the lock
                        self.lock.acquire()
                    raise
                finally:
                    self.followers -= 1
            if waiter is not None and waiter._done:
                return False
            self.reading = get_ident()
            if self.watching:
                self.watching = False
                self.connection.transport.awake()
                assert self.watcher is not None
                self.watcher.step_aside()
            return True

    def leave_reading(self) -> None:
        """Ends this thread's reading, if it reads."""
        if self.reading == get_ident():
            self.reading = 0
            self._left_reading()

    def _left_reading(self) -> None:
        with self.lock:
            if self.followers:
                self.changed.notify_all()
        if self.core.closed:
            self.close_when_unused()

    def read_a_while(self, deadline: float) -> bool:
        """Reads once, and waits for that until the deadline. False if another thread reads."""
        ident = self.check_entry("waiting")
        reads = False
        try:
            self.inside.add(ident)
            reads = self.take_reading()
            if reads:
                with contextlib.suppress(DeadlineError):
                    self.read_once(deadline)
        finally:
            left = self.reading == ident
            if left:
                self.reading = 0
            self.inside.discard(ident)
            if left:
                self._left_reading()
        self.call_back()
        if self.watcher is not None:
            self.leave_to_watcher()
        return reads

    def read_once(self, deadline: float | None, *, blocking: bool = True) -> None:
        """Reads once and hands out what that completed. Only the reader calls it.

        Raises DeadlineError; anything else that goes wrong ends the connection, and with it every future.
        """
        session, events = self.session, self.events
        try:
            # what an interrupted read left comes first
            if (
                not events
                and self.connection.transport.receive(session, deadline, blocking=blocking, events=events) is None
            ):
                self.end(session.end_of_stream())
                return
            while events:
                self.core.handle(events[0], self)
                del events[0]
            if self.turns:
                self.turns.let_in()
        except DeadlineError:
            raise
        except RemoteProtocolError as error:  # the transport's, of which the session does not know
            self.failed(error, tell=True)
        except BaseException as error:
            if isinstance(error, FastsplitError) and not isinstance(error, ReentrantCallError):
                self.end(error)
                return
            # a signal's handler raised it
            if session.in_doubt:
                self.end(ClosedError("the connection was closed: a read was interrupted"))
            raise

    def left_fast_path(self, future: Future | None) -> None:
        """This thread left the fast path, and no longer reads. `future`: of its call, if that goes on."""
        self._left_reading()
        if self.turns:
            self.turns.let_in()
        if future is not None and self.core.closed:  # the thread that ended the connection has not seen it
            self.settle(future, None, self.fail(ClosedError("the channel was closed")))
            self.core.calls.pop(future._id, None)
        self.call_back()
        if self.watcher is not None or self.events:
            self.leave_to_watcher()

    # ---- for the core: see client.Front ----

    def failed(self, error: FastsplitError, *, tell: bool) -> None:
        """Ends the connection. `tell`: the peer broke the protocol, or something is short here; the peer is told,
        unless a frame is half sent."""
        if tell:
            held = False
            sending = self.connection.sending
            try:
                try:
                    (held,) = map(sending.acquire, (True,), (_TELL_S,))
                    if held:
                        with contextlib.suppress(FastsplitError):
                            self.connection.transport.send([self.session.abort(error)])
                finally:
                    self.fail(error)  # after the ABORT: a caller that gets the error may close the channel
            finally:
                if held:
                    self.release(sending)
            if held:
                self.connection.transport.linger(time.monotonic() + _LINGER_S)
        self.end(error)

    def send_returns(self) -> None:
        """The server is short of memory. A thread that sends at this moment takes returns along anyway."""
        self.send_if_free(partial(send_returns, self.connection.outbox))

    # ---- small frames ----

    def send_if_free(self, send: Callable[[], object]) -> None:
        """Calls `send` unless another thread sends at this moment, or the connection has ended."""
        held = False
        sending = self.connection.sending
        ident = get_ident()
        was_inside = ident in self.inside
        try:
            self.inside.add(ident)
            (held,) = map(sending.acquire, (False,))
            if held and not self.core.closed:
                send()
        finally:
            try:
                if held:
                    self.release(sending)
            finally:
                if not was_inside:
                    self.inside.discard(ident)

    def on_memory_pressure(self, deadline: float | None) -> None:
        """Our own memory is full: asks the server for returns, and reads for a moment unless another thread reads."""
        self.send_if_free(partial(ask_for_returns, self.connection.outbox))
        soon = time.monotonic() + RELIEF_S
        if not self.read_a_while(soon if deadline is None else min(soon, deadline)):
            time.sleep(0.001)
        self.core.raise_error()

    # ---- the watcher ----

    @property
    def expects(self) -> bool:
        """Whether a reply is expected, or an interrupted reader has left events or callbacks."""
        return bool(self.session.inflight or self.events or self.callbacks)

    def start_watcher(self, *, keeps: bool = False) -> None:
        """Starts the watcher, unless there is one or the channel has ended. Raises ResourceError."""
        with self.lock:
            if self.core.closed or (self.watcher is not None and self.watcher.alive):
                return
            if self.watcher is not None:  # interrupted before it ran
                self.watcher.close(0.0)
            watcher = self.watcher = Watcher(self, keeps=keeps)
            try:
                watcher.start()
            except ResourceError:
                watcher.close(0.0)
                self.watcher = None
                raise

    def attend(self, deadline: float | None = None) -> None:
        """Requests are in flight that the calling thread does not wait for; one has this deadline."""
        watcher = self.watcher
        if watcher is None:  # it has ended at this moment, or what is in flight is a cancelled call
            try:
                self.start_watcher()
            except ResourceError as error:
                _logger.warning("%s: no thread reads until a caller waits: %s", self.core.uri, str(error))
            watcher = self.watcher
        if watcher is not None:
            watcher.attend(deadline)

    def leave_to_watcher(self) -> None:
        """Called by a thread that has read, or waited for the reader: the watcher takes over if no caller does."""
        if self.expects and not self.reading and not self.followers:
            self.attend()

    # ---- callbacks ----

    def call_back(self) -> None:
        """Runs the callbacks of futures that are done. In the middle of something else of this thread it does nothing:
        they run at the end of that. Within a callback it leaves them to the watcher."""
        ident = get_ident()
        if ident in self.inside:
            return
        if ident in self.calling_back:
            while self._tell_next():
                pass
            if self.callbacks and self.watcher is not None:
                self.watcher.attend()
            return
        try:
            self.calling_back.add(ident)
            while self.callbacks:
                if self._tell_next():
                    continue
                with contextlib.suppress(IndexError):  # another thread took the last one
                    callback, future = self.callbacks.popleft()
                    call_safely(f"a callback of {future!r}", callback, future)
        finally:
            self.calling_back.discard(ident)

    def _tell_next(self) -> bool:
        """Notifies the concurrent.futures waiters of a future, if they are next. If interrupted it is called again: the
        entry is removed when all are notified."""
        with contextlib.suppress(IndexError, ValueError):  # another thread took it
            tell, future = first = self.callbacks[0]
            if tell is not Future._tell_waiters:
                return False
            call_safely(f"the end of {future!r}", tell, future)
            self.callbacks.remove(first)
            return True
        return bool(self.callbacks)


def _check_clock(until: float | None) -> None:
    if until is not None and time.monotonic() >= until:
        raise DeadlineError("no reply")
