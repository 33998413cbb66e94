"""Sending: a request's frame whole or its rest, what goes before it, and probes.

A thread that finds the socket full reads, so that two sides that both send large messages never wait for each other.
With `overlap` a thread of the channel's own sends what the kernel does not take at once.

Rules. The caller holds `connection.sending` (it takes the lock and releases it: calls.py), unless a method says
otherwise. A deadline that passes before the first byte of a request costs only that call; one that passes later, and
any other error, ends the connection, as does a signal's handler that raises while a frame is sent.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from threading import get_ident
from typing import Any

from ...errors import ClosedError, DeadlineError, FastsplitError
from ...system.threads import Workers
from ...tensors import Outgoing
from ..outbox import Frame
from .flush import flush_in, wait_for_room
from .future import Future
from .reader import RELIEF_S, Reader

__all__ = ["Sender"]

_LAST_WORDS_S = 0.5  # how long a failed sender waits for another thread to read why


class Sender:
    """The sending side of a channel."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._core = reader.core
        self._connection = reader.connection
        self.workers: Workers | None = None
        """With `overlap`: the thread that sends."""

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py. The thread is the parent's."""
        self.workers = None

    # ---- requests ----

    def send_request(self, future: Future, out: Outgoing, head: bytearray, deadline: float | None) -> None:
        """Sends a request, reading meanwhile if there is no room for it."""
        outbox = self._connection.outbox
        frame: Frame | None = None
        try:
            future._begun = True
            if out.placements and outbox.arena is not None:
                outbox.arena.lend(out.placements)
            frame = outbox.send([head, *out.buffers], len(head) + out.nbytes, out)
            if frame is not None:
                while not outbox.idle:
                    self._send_rest(deadline)
        except BaseException as error:
            self._failed(error, future, frame)
            raise

    def send_rest(self, future: Future) -> None:
        """Sends what the socket did not take of a request on the fast path, which holds `connection.sending`: this
        releases it."""
        reader, connection = self._reader, self._connection
        sending = connection.sending
        ident, left = get_ident(), b""
        try:
            (left,) = map(connection.fast_path.take_rest, (None,))
            reader.inside.add(ident)
            connection.outbox.put_rest(left)
            while not connection.outbox.idle:
                self._send_rest(future._deadline)
        except BaseException as error:
            self._failed(error, future, None)
            raise
        finally:
            try:
                if left and connection.left is None:  # else a handler has forked, and this lock is the child's own
                    reader.release(sending)
            finally:
                reader.inside.discard(ident)
                if reader.callbacks:
                    reader.call_back()

    def _failed(self, error: BaseException, future: Future, frame: Frame | None) -> None:
        """A request was not sent. `frame`: what waits of it. Raises what that means for the call, if not the error."""
        if isinstance(error, DeadlineError):
            late = f"{future.op}: not sent within {future._timeout_s} s"
            if frame is not None and self._connection.outbox.discard(frame, future._id):
                self._reader.discard(future._id)
                raise DeadlineError(late) from None
            raise self._reader.end(DeadlineError(f"{late}; the connection is closed")) from None
        if isinstance(error, FastsplitError):
            # The peer may have said why it left: its last words are still to be read.
            self._read_last_words(future)
            raise self._reader.end(error) from None
        self._reader.end(ClosedError("the connection was closed: a send was interrupted"))

    def send_behind(
        self, workers: Workers, future: Future, out: Outgoing, head: bytearray, deadline: float | None
    ) -> bool:
        """Sends a request; what the kernel does not take at once `workers` sends, and then releases the lock: frames
        stay whole, and at most one waits. Returns whether it was handed over."""
        reader, outbox = self._reader, self._connection.outbox
        sending = self._connection.sending
        try:
            future._begun = True
            frame = outbox.send([head, *out.buffers], len(head) + out.nbytes, out)
        except FastsplitError as error:
            self._read_last_words(future)
            raise reader.end(error) from None
        except BaseException:
            reader.end(ClosedError("the connection was closed: a send was interrupted"))
            raise
        if frame is None:
            return False

        held = [out]

        def sent(failure: FastsplitError | None) -> None:
            try:
                if isinstance(failure, DeadlineError):
                    late = f"{future.op}: not sent within {future._timeout_s} s"
                    if outbox.discard(frame, future._id):
                        reader.discard(future._id)
                        reader.settle(future, None, DeadlineError(late))
                    else:
                        reader.end(DeadlineError(f"{late}; the connection is closed"))
                elif failure is not None:
                    self._read_last_words(future)
                    reader.end(failure)
            finally:
                reader.release(sending)
                held.clear()  # not before: the tensors may die here, and a finalizer may call
            watcher = reader.watcher
            if watcher is None:  # the channel has ended
                reader.call_back()
            elif reader.callbacks:  # not here: a callback may call, and wait for what this thread is to send
                watcher.step_aside()

        if not flush_in(workers, outbox, deadline, sent):  # closed at this moment
            raise reader.end(ClosedError("the channel was closed"))
        return True

    # ---- control frames ----

    def send_control_frames(
        self, op: str, timeout_s: float | None, deadline: float | None, probe: Sequence[Any] = ()
    ) -> None:
        """Sends what must go before the next request: a probe, or all that the outbox knows of."""
        outbox, end = self._connection.outbox, self._reader.end
        try:
            if probe:
                outbox.put(probe, sum(map(len, probe)))
            else:
                outbox.put_control_frames()
            outbox.flush()
            while not outbox.idle:
                self._send_rest(deadline)
        except DeadlineError:
            late = f"{op}: what goes before it was not sent within {timeout_s} s; the connection is closed"
            raise end(DeadlineError(late)) from None
        except FastsplitError as error:
            raise end(error) from None
        except BaseException:
            end(ClosedError("the connection was closed: a send was interrupted"))
            raise

    def _send_rest(self, deadline: float | None) -> None:
        """Waits until there is room for what waits to be sent, reads meanwhile, and sends some of it."""
        reader, outbox = self._reader, self._connection.outbox
        writable = False
        try:
            reading = reader.take_reading()
            soon = None if reading else time.monotonic() + RELIEF_S
            try:
                until = deadline if soon is None or (deadline is not None and deadline < soon) else soon
                readable, writable = wait_for_room(outbox, until, reading=reading)
            except DeadlineError:
                if soon is None or (deadline is not None and time.monotonic() >= deadline):
                    raise
                return
            if readable:
                with contextlib.suppress(DeadlineError):  # nothing to read after all
                    reader.read_once(deadline, blocking=False)
                self._core.raise_error()
        finally:
            reader.leave_reading()
        if writable:
            outbox.flush()

    def _read_last_words(self, future: Future) -> None:
        """Reads what is there already, or lets the thread that reads do so. What ends the connection is kept."""
        reader = self._reader
        end = time.monotonic() + _LAST_WORDS_S
        with contextlib.suppress(DeadlineError):
            try:
                if reader.take_reading(future, end):
                    while self._core.error is None and time.monotonic() < end:
                        reader.read_once(None, blocking=False)
            finally:
                reader.leave_reading()

    # ---- probes ----

    def probe(self, nbytes: int, timeout_s: float, deadline: float) -> None:
        """Sends a probe with bytes each way, and waits for its answer. Takes the lock itself.

        Raises DeadlineError, and what ends the connection.
        """
        reader, core = self._reader, self._core
        ident = reader.check_entry("measure")
        held = False
        sending = self._connection.sending  # a forked child has another one
        try:
            reader.inside.add(ident)
            (held,) = map(sending.acquire, (True,), (max(deadline - time.monotonic(), 0.0),))
            if not held:
                raise DeadlineError("the link was not measured: others were sending")
            core.raise_error()  # in the handshake: why the server left
            number, frame = core.probe(nbytes)
            self.send_control_frames("a probe", timeout_s, deadline, frame)
        finally:
            try:
                if held:
                    sending.release()
            finally:
                reader.inside.discard(ident)
        try:
            while number in core.probes:
                if not reader.read_a_while(deadline):
                    time.sleep(0.0002)  # another thread reads
                core.raise_error()
                if time.monotonic() >= deadline:
                    raise DeadlineError("the link was not measured: no answer")
        finally:
            core.probes.discard(number)
