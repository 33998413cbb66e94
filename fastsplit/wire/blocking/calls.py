"""The calls of a blocking channel: sent at once if the peer takes one more, else in turn.

Rules. A request that is interrupted before its first byte may have been sent is discarded. `connection.sending` is
taken, and noted as taken, in one step, and released first thing in a `finally`. A deadline holds for the whole call:
for memory, for the turn, for other calls' sends, and for the reply.
"""

from __future__ import annotations

import contextlib
from time import monotonic, perf_counter_ns

from ...errors import ArenaFull, ClosedError, DeadlineError, LocalProtocolError
from ...tensors import parse_expect
from ..client import UNSET, Asked
from ..frames import MAX_RETURNS
from ..result import why_closed
from .future import Future
from .reader import Reader
from .sender import Sender
from .turns import Turn

__all__ = ["Calls"]

_LOOK_FOR_TURN_S = 0.02  # how often a request that waits for its turn looks whether another thread has made room


class Calls:
    """Makes a Future of a call's arguments, and sends the request."""

    def __init__(self, reader: Reader, sender: Sender) -> None:
        self._reader = reader
        self._sender = sender
        self._core = reader.core
        self._connection = reader.connection
        self._session = reader.session
        self._turns = reader.turns

    def start(self, asked: Asked, turn: Turn | None = None) -> Future | None:
        """Sends a request. None, and nothing has happened, if it has to wait for its turn."""
        started_ns = perf_counter_ns()
        op, tensors, timeout_s, deadline, expect, wire_dtype, codec, attrs = asked
        core, connection, reader = self._core, self._connection, self._reader
        pending = self._session.requests
        core.check_open()  # before the lock, which this very thread may hold: a handler calls in the middle of `close`
        if (self._turns and turn is None) or len(pending) >= core.max_inflight:
            return None
        if wire_dtype is UNSET and codec is UNSET:
            cast, number = core.cast, core.codec  # as `coding` does, without its call
        else:
            cast, number = core.coding(wire_dtype, codec)
        expected = parse_expect(expect)
        try:
            out = connection.prepare(op, tensors, deadline, cast, number)
        except ArenaFull:
            if core.closed:
                raise ClosedError(why_closed(core.error)) from None
            raise
        ident = reader.check_entry(op)
        future: Future | None = None
        held = handed_over = False
        next_id = 0  # of this request, as soon as there may be one
        sending = connection.sending  # a forked child has another one
        try:
            reader.inside.add(ident)
            (held,) = map(sending.acquire, (False,))
            if not held:
                (held,) = map(sending.acquire, (True,), (-1 if deadline is None else max(deadline - monotonic(), 0.0),))
            if not held:
                raise DeadlineError(f"{op}: not sent within {timeout_s} s, since other calls were")
            if core.refusing:
                core.check_open()
            if len(pending) >= core.max_inflight:  # another thread was faster
                return None
            connection.transport.wake_early()  # after the copies, which may take longer than the server spins
            arena = connection.arena
            if arena is not None and (arena.has_pending or len(arena.returns) > MAX_RETURNS):
                self._sender.send_control_frames(op, timeout_s, deadline)
            if connection.is_probe_due:
                self._sender.send_control_frames(op, timeout_s, deadline, connection.probe(0)[1])
            left_s = timeout_s if turn is None or deadline is None else deadline - monotonic()
            next_id = self._session.next_id
            request_id, head, encoded_ns = core.encode(op, out, attrs, left_s, expected, cast, number, started_ns)
            future = Future(reader, request_id, op, deadline, timeout_s, encoded_ns)
            core.calls[request_id] = future
            workers = self._sender.workers
            if workers is not None:
                handed_over = self._sender.send_behind(workers, future, out, head, deadline)
            else:
                self._sender.send_request(future, out, head, deadline)
            core.stats.wait_s += (perf_counter_ns() - encoded_ns) * 1e-9
        except BaseException as error:
            if next_id and (future is None or not future._begun):
                reader.discard(next_id)
            if not isinstance(error, LocalProtocolError) or self._session.may_request:
                raise
            # else the thread that reads has just read the connection's end
        finally:
            try:
                if held and not handed_over:
                    sending.release()
            finally:
                reader.inside.discard(ident)
            if core.closed:
                if future is not None:  # the thread that ended the connection may not have seen it
                    reader.settle(future, None, reader.fail(ClosedError("the channel was closed")))
                    core.calls.pop(next_id, None)
                reader.close_when_unused()
            if reader.callbacks:
                reader.call_back()
        if future is None:
            raise reader.wait_for_end()
        return future

    def start_in_turn(self, asked: Asked) -> Future:
        """Sends a request when it is its turn. Raises DeadlineError if that does not come in time."""
        reader, turns = self._reader, self._turns
        turn = Turn()
        future: Future | None = None
        try:
            with reader.lock:
                turns.append(turn)
            while future is None:
                turns.let_in()
                self._wait_for_turn(turn, asked)
                turn._done = False
                future = self.start(asked, turn)
        finally:
            with reader.lock, contextlib.suppress(ValueError):
                turns.remove(turn)
            turns.let_in()
            if reader.watcher is not None or reader.events or reader.callbacks:
                reader.leave_to_watcher()
        return future

    def _wait_for_turn(self, turn: Turn, asked: Asked) -> None:
        op, _, timeout_s, deadline, *_ = asked
        ident = self._reader.check_entry(op)
        started_ns = perf_counter_ns()
        decoded_ns = self._session.decode_ns
        try:
            while True:
                soon = monotonic() + _LOOK_FOR_TURN_S
                try:
                    self._reader.wait_until_done(turn, soon if deadline is None else min(soon, deadline), ident)
                    return
                except DeadlineError:
                    if deadline is not None and monotonic() >= deadline:
                        raise DeadlineError(
                            f"{op}: not sent within {timeout_s} s: the peer takes {self._core.max_inflight} requests "
                            "at a time, and that many were in flight"
                        ) from None
        finally:
            decoded_ns = self._session.decode_ns - decoded_ns
            waited_ns = perf_counter_ns() - started_ns - decoded_ns
            self._core.stats.wait_s += waited_ns * 1e-9
            self._core.stats.serialization_s += decoded_ns * 1e-9
