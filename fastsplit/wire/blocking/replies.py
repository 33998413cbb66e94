"""What a blocking server sends to one client: replies, errors, and what goes before or between them.

While another thread reads ahead, a third one sends the rest of a reply that the kernel did not take at once, so that
the connection's own thread goes on to compute. Frames still leave one after another.

Rules. A frame is made and sent under `lock`, in one go: frames stay whole, and in the order in which the session has
made them. Probes are answered between frames, by the thread that has sent the last one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import Any

from ...errors import DeadlineError, FastsplitError, PeerLostError
from ...printable import get_logger
from ...system.threads import Workers
from ...tensors import Outgoing
from ..call import Call
from ..events import Probe, RingOffered
from ..fastpath import add_fast_path
from ..frames import MAX_RETURNS
from ..service import Refusal, ServiceCore
from .flush import ask_for_returns, flush, flush_in, send_returns
from .readahead import ReadAhead

__all__ = ["Replies"]

_logger = get_logger("fastsplit.server")

_MAX_PROBES = 16  # without an answer, since a reply is being sent; then a connection reads no further
_LINGER_S = 1.0  # how long an aborted peer's bytes are read and dropped, so that it can read why


class Replies:
    """Sends to one client. A thread that is at work in it holds `lock`."""

    def __init__(self, core: ServiceCore, ahead: ReadAhead) -> None:
        self._core = core
        self._connection = core.connection
        self._ahead = ahead
        self._options = core.service.options
        self.lock: threading.Lock = self._connection.sending
        self._sender: Workers | None = None
        self._probes: deque[Probe] = deque()

    # ---- answers ----

    def reply(self, call: Call, out: Outgoing, time_ns: int, deadline: float) -> None:
        """Sends a reply, or why its attributes cannot travel. Raises PeerLostError."""
        arena = self._connection.arena
        handed_over = False
        self.lock.acquire()
        try:
            self._connection.transport.wake_early()
            if arena is not None and (arena.has_pending or len(arena.returns) > MAX_RETURNS):
                self._send_control_frames(deadline)
            try:
                head = self._core.reply(call, out, time_ns)
            except BaseException as error:  # noqa: BLE001 (invalid reply attributes, for example)
                failure = error
            else:
                handed_over = self._send_behind([head, *out.buffers], len(head) + out.nbytes)
                return
        finally:
            if not handed_over:
                self._release()
        self.error(call._request_id, self._core.failure(call._served, call.op, failure))
        del failure  # it keeps this frame, and with it the tensors

    def send_rest(self) -> None:
        """Sends what the socket did not take of a reply on the fast path, which holds `lock`: this releases it. Raises
        PeerLostError."""
        try:
            self._connection.outbox.put_rest(self._connection.fast_path.take_rest(None))
            self._send_left()
        finally:
            self._release()

    def error(self, request_id: int, refusal: Refusal) -> None:
        """Answers a request with an ERROR. Raises PeerLostError."""
        self.lock.acquire()
        try:
            frame = self._core.error(request_id, refusal)
            self._send([frame], len(frame))
        finally:
            self._release()

    # ---- the rest of what a client gets ----

    def hello(self, deadline: float) -> None:
        """Sends the handshake. Raises DeadlineError, PeerLostError."""
        self._connection.transport.send_all([self._core.session.hello()], deadline)

    def add_fast_path(self) -> None:
        """The handshake has come to its end, or the connection goes on through a ring."""
        core = self._core
        if core.service.options.workers == 0:
            add_fast_path(self._connection, core.arrays, core.stats(), handlers=core.service.handlers)

    def attach_ring(self, event: RingOffered) -> None:
        is_idle = not self._core.pending and self._ahead.running is None
        with self.lock:
            self._core.attach_ring(event, time.monotonic() + self._options.handshake_timeout_s, is_idle=is_idle)
        self.add_fast_path()

    def send_returns(self) -> None:
        with self.lock:
            send_returns(self._connection.outbox)

    def ask_for_returns(self) -> None:
        """This side's memory is full: asks the client for returns, now and then."""
        with self.lock:
            ask_for_returns(self._connection.outbox)

    def send_waiting(self) -> None:
        """Sends what else would wait for the next reply: segments that are gone, returns."""
        with self.lock:
            self._send_control_frames(time.monotonic() + self._options.send_timeout_s)

    def answer_probe(self, probe: Probe) -> None:
        self._probes.append(probe)
        self._answer_probes(wait=len(self._probes) >= _MAX_PROBES)

    def refuse(self, reason: FastsplitError) -> None:
        """Tells a client that was not admitted why, and closes at once, since others wait to be accepted."""
        with contextlib.suppress(PeerLostError):
            self._connection.transport.send([self._core.session.abort(reason)])
        self._connection.transport.shutdown()
        self._connection.close()

    def goodbye(self) -> None:
        """Tells the client that nothing more comes."""
        with self.lock:
            self._connection.transport.send([self._core.session.goodbye()])

    def abort(self, reason: FastsplitError) -> None:
        """Tells the client what it did wrong, or what this side has run out of, and gives it time to read that."""
        deadline = time.monotonic() + _LINGER_S
        if not self.lock.acquire(timeout=_LINGER_S):  # a reply is stuck: the end must say enough
            return
        try:
            with contextlib.suppress(FastsplitError):
                self._connection.transport.send_all([self._core.session.abort(reason)], deadline)
        finally:
            self.lock.release()
        self._connection.transport.linger(deadline)

    def start_sender(self) -> None:
        """Starts the thread that sends rests of replies, unless there is one. Raises ResourceError."""
        if self._sender is None:
            self._sender = Workers(1, f"fastsplit-send {self._core.service.uri}")

    def close(self) -> None:
        """Closes the connection, when nothing is being sent."""
        if self._sender is not None:
            self._sender.shutdown()
        with self.lock:  # a worker may be in a system call on the descriptor
            self._connection.close()

    def leave(self) -> None:
        """For a forked child: see system/forked.py. The connection has left."""
        self.lock = self._connection.sending

    # ---- sending; the caller holds `lock` ----

    def _send_control_frames(self, deadline: float) -> None:
        """Sends what must go before the next frame."""
        outbox = self._connection.outbox
        outbox.put_control_frames()
        if not outbox.flush():
            self._send_left()

    def _send_behind(self, buffers: list[Any], nbytes: int) -> bool:
        """As `_send`; but while another thread reads, a third one sends what the kernel does not take at once, and then
        releases `lock`: frames stay whole, and at most one waits. Returns whether it was handed over."""
        outbox = self._connection.outbox
        if outbox.send(buffers, nbytes) is None:
            return False
        if self._ahead.reader is None or self._sender is None:
            self._send_left()
            return False

        held = [buffers]

        def sent(failure: FastsplitError | None) -> None:
            if failure is not None:
                if isinstance(failure, DeadlineError):
                    failure = self._late()
                _logger.debug("%s: a reply could not be sent: %s", self._core.service.uri, str(failure))
                self._connection.transport.shutdown()
            self._release()
            held.clear()  # not before: the tensors may die here, and a finalizer may call

        if not flush_in(self._sender, outbox, time.monotonic() + self._options.send_timeout_s, sent):
            self._send_left()  # the connection has ended
            return False
        return True

    def _release(self) -> None:
        self.lock.release()
        if self._probes:
            self._answer_probes()

    def _answer_probes(self, wait: bool = False) -> None:
        """Answers probes, or leaves them to the thread that sends at this moment. `wait`: until that one is done. The
        caller does not hold `lock`."""
        while self._probes and self.lock.acquire(blocking=wait):
            try:
                frame = self._connection.probe_answer(self._probes.popleft())
                self._send(frame, sum(map(len, frame)))
            except IndexError:
                return  # another thread has answered it
            except FastsplitError as error:  # perhaps in the middle of the answer: nothing can follow it
                _logger.debug("%s: a probe was not answered: %s", self._core.service.uri, str(error))
                self._connection.transport.shutdown()
                return
            finally:
                self.lock.release()

    def _send(self, buffers: list[Any], nbytes: int) -> None:
        """Sends a frame."""
        if self._connection.outbox.send(buffers, nbytes) is not None:
            self._send_left()

    def _send_left(self) -> None:
        try:
            flush(self._connection.outbox, time.monotonic() + self._options.send_timeout_s)
        except DeadlineError:
            raise self._late() from None

    def _late(self) -> PeerLostError:
        return PeerLostError(f"the client did not take its reply within {self._options.send_timeout_s} s")
