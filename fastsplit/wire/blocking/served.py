"""One client of the blocking server: the thread that reads its requests, runs their handlers and answers, in order.

One thread for all of that: the fewest hand-overs, so the shortest round trip. Where tensors travel over a socket and a
client has several requests in flight, this thread only computes for as long as that goes on (readahead.py, replies.py).
With `workers`, a pool's threads run handlers: requests of one connection overlap then, replies come in the order in
which they are done, and a CANCEL can still find its request waiting.

While a handler runs on the connection's own thread, that thread reads when the handler asks whether it is cancelled or
waits for memory. Requests that arrive then wait.

Rules. No client waits for another one. A request's memory is released with its answer, and the rest when the connection
ends: no local variable of the thread's loop, which may wait for long, holds a request or an event.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from threading import get_ident
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from ...errors import DeadlineError, FastsplitError, PeerLostError, RemoteProtocolError, ResourceError, fresh
from ...printable import get_logger
from ...system.forked import renew
from ...system.threads import only_one
from ..call import Call
from ..connection import greeting
from ..events import Cancel, Event, Request
from ..service import CLOSING, Refusal, ServiceCore
from ..session import STAGING_NBYTES
from ..shm.arena import IDLE_S
from ..transport.scheme import End
from .readahead import ReadAhead
from .replies import Replies

if TYPE_CHECKING:
    from .server import Server

__all__ = ["ServedClient"]

_logger = get_logger("fastsplit.server")

_MAX_LOOKS = 16  # reads of what is there already, for a handler that asks whether it is cancelled
_READ_S = 0.005  # how long a thread that waits for memory reads before it looks again


class ServedClient:
    """One client: its thread, its session, its requests."""

    def __init__(self, server: Server, end: End) -> None:
        service = server._service
        self.connection = service.make_connection(end, server._listener.address, self._on_memory_pressure)
        self.core = ServiceCore(service, self.connection)
        self.session = self.connection.session
        self.thread = threading.Thread(target=self._serve, name=f"fastsplit-serve {service.uri}", daemon=True)
        self._server = server
        self._service = service
        self._handlers = service.handlers
        self._workers = server._workers
        self._ahead = ReadAhead(self.core)
        self._replies = Replies(self.core, self._ahead)
        self._in_handler = False  # whether a handler runs on this thread, which may read for it

    def refuse(self, reason: FastsplitError) -> None:
        """Says why, and closes. For a client whose thread was never started."""
        del self.thread  # which holds this client until it has run
        self._replies.refuse(reason)

    @property
    def inflight(self) -> int:
        """Requests that have come in and have no answer yet."""
        return self.core.inflight + len(self._ahead.waiting) + (self._ahead.running is not None)

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py. The connection of a handler that forked has ended, too."""
        renew(self._ahead.idle)
        self.core.leave(why)
        self._replies.leave()

    # ---- for a Call ----

    def memory_deadline(self, deadline: float | None) -> float:
        return self.core.reply_deadline(deadline)

    def is_cancelled(self, request_id: int) -> bool:
        cancelled = self.core.cancelled
        if self._in_handler and request_id not in cancelled and get_ident() == self.thread.ident:
            self._look()
        return request_id in cancelled

    def has_left(self) -> bool:
        if self._service.closing:  # this side ended the reading
            return False
        return self._ahead.end is not True or self.connection.transport.peer_left()

    # ---- the connection's thread ----

    def _serve(self) -> None:
        error: FastsplitError | None = None
        ahead = self._ahead
        try:
            going_on = self._greet()
            while going_on:
                self._run_waiting()
                if self.connection.fast_path is not None and ahead.is_off:
                    self._serve_fast(self.connection.fast_path)
                    if ahead.waiting:
                        continue
                going_on = self._read_or_trim() if ahead.is_off else ahead.wait()
            self._drain()
        except (RemoteProtocolError, ResourceError) as broken:
            error = fresh(broken)
            self.core.ended = True
            self._replies.abort(error)
        except FastsplitError as lost:
            error = fresh(lost)
        except Exception:
            _logger.exception("%s: a bug in the server ended a connection", self._service.uri)
        finally:
            self.core.end(error)
            self.connection.transport.shutdown()
            ahead.close()
            self._replies.close()
            self.core.client._end()
            self._server._forget(self)

    def _serve_fast(self, fast_path: Any) -> None:
        """Serves requests for as long as the fast path takes them, and nothing else has to be done."""
        core, ahead, service, clients = self.core, self._ahead, self._service, 0
        fast_path.link.arm(time.monotonic() + IDLE_S)
        while ahead.reader is None and ahead.end is True and not (ahead.waiting or core.cancelled or service.closing):
            if clients != len(service.clients):
                clients = len(service.clients)
                self._choose_spin()
            call = fast_path.receive(self)
            if call is None:
                return
            ahead.running = call._request_id
            self._answer(call, call._deadline)
            self._ran(call._request_id)
            del call

    def _greet(self) -> bool:
        deadline = time.monotonic() + self._service.options.handshake_timeout_s
        self.connection.serves_in(*only_one(self._workers))
        greeting.add(get_ident())
        try:
            self._replies.hello(deadline)
            while self.session.peer_limits is None:
                if not self._read(self._dispatch, deadline):
                    return False
                if time.monotonic() >= deadline:  # it may dribble
                    raise DeadlineError("no handshake")
        except DeadlineError:
            raise self.core.no_handshake() from None
        finally:
            greeting.discard(get_ident())
        self._replies.add_fast_path()
        return True

    def _drain(self) -> None:
        """Where the server closes: waits for the pool to answer what is left, then says goodbye."""
        if self.core.ended:
            return
        if self._workers is not None:
            with self._ahead.idle:
                self._ahead.idle.wait_for(lambda: not self.core.pending, timeout=self._service.options.send_timeout_s)
        self._replies.goodbye()

    # ---- reading ----

    def _read_or_trim(self) -> bool:
        """Reads; but if nothing comes for long, releases unused memory first, and only then sleeps for good."""
        arena = self.connection.arena
        if arena is not None:
            try:
                return self._read(self._dispatch, time.monotonic() + IDLE_S)
            except DeadlineError:
                if arena.trim():
                    self._replies.send_waiting()
        elif self._workers is None:
            return self._read_in_order()
        return self._read(self._dispatch)

    def _read_in_order(self) -> bool:
        """Reads once. Requests wait until they run, so that a CANCEL finds them: one read may bring many. False when
        the client is done."""
        events, ahead = self._receive(None), self._ahead
        for event in events or ():
            if not isinstance(event, Request):
                for _ in range(
                    len(ahead.waiting) if ahead.is_off else 0
                ):  # of this read; one may have another thread read
                    self._run_next()
                if not self._handle(event):
                    return False
            elif ahead.is_off:
                ahead.put_off(event)
            else:  # older than what the other thread has read
                self._dispatch(event)
        return events is not None

    def _read(self, take: Callable[[Request], object], deadline: float | None = None, *, blocking: bool = True) -> bool:
        """Reads once, gives requests to `take`, and handles all other events. False when the client is done."""
        events = self._receive(deadline, blocking=blocking)
        if events is None:
            return False
        for event in events:
            if isinstance(event, Request):
                take(event)
            elif not self._handle(event):
                return False
        return True

    def _read_ahead(self, quick: int) -> tuple[bool, int]:
        """Reads once, in the reader's thread: see ReadAhead.start."""
        events = self._receive(None)
        going_on = events is not None
        for event in events or ():
            if isinstance(event, Request):
                quick = quick + 1 if self._ahead.queue(event) else 0
            elif not self._handle(event):
                going_on = False
        return going_on, quick

    def _receive(self, deadline: float | None, *, blocking: bool = True) -> list[Event] | None:
        """Reads once. None at the end of the stream."""
        service, transport = self._service, self.connection.transport
        self._choose_spin()
        # What is in a ring already can be read for as long as the client goes on writing.
        events = transport.receive(self.session, deadline, blocking=blocking) if not service.closing else None
        if events is None:
            self.core.end_stream()
            return None
        if len(events) > 1:  # a cancellation that came with its request is in time
            self.core.cancelled.update(event.request_id for event in events if isinstance(event, Cancel))
        return events

    def _choose_spin(self) -> None:
        spins = len(self._service.clients) <= self._server._max_spinning and self._ahead.reader is None
        self.connection.transport.spin.spin_us = self._server._spin_us if spins else 0.0

    def _handle(self, event: Event) -> bool:
        """Acts on anything but a request. False when the client is done."""
        if isinstance(event, Cancel):
            with self._ahead.idle:
                self.core.cancel(event.request_id, is_here=self._ahead.has(event.request_id))
            return True
        return self.core.take(event, self._replies)

    # ---- reading while a handler runs ----

    def _on_memory_pressure(self, deadline: float | None) -> None:
        """This side's memory is full: asks the client for returns, and reads for a moment if this is the thread that
        reads."""
        self._replies.ask_for_returns()
        if get_ident() != self.thread.ident:
            time.sleep(0.001)
            return
        ahead = self._ahead
        if ahead.can_read:
            soon = time.monotonic() + _READ_S
            self._read_in_handler(soon if deadline is None else min(soon, deadline))
        elif ahead.end is True:
            time.sleep(0.001)
        if isinstance(ahead.end, FastsplitError):
            raise fresh(ahead.end)
        if ahead.end is not True:
            raise PeerLostError("the client left while a handler waited for memory")

    def _look(self) -> None:
        """Reads what has arrived, without blocking."""
        if self._service.closing or self._replies.lock.locked():  # a finalizer may ask in the middle of a send
            return
        for _ in range(_MAX_LOOKS):
            if not (self._ahead.can_read and self.connection.transport.has_bytes()):
                return
            self._read_in_handler(None, blocking=False)
            if self.connection.meter is not None:
                self.connection.meter.payload_waits()

    def _read_in_handler(self, deadline: float | None, *, blocking: bool = True) -> None:
        """Reads once while a handler runs on this thread. Needs `can_read`; sets `end` when the client is done."""
        in_handler, self._in_handler = self._in_handler, False  # a finalizer may ask in the middle of it
        try:
            if not self._read(self._ahead.put_off, deadline, blocking=blocking):
                self._ahead.end = False
        except DeadlineError:
            pass  # nothing came
        except FastsplitError as error:
            self._ahead.end = fresh(error)
        finally:
            self._in_handler = in_handler

    # ---- requests ----

    def _run_waiting(self) -> None:
        """Runs the requests that wait."""
        while self._ahead.waiting:
            self._run_next()

    def _run_next(self) -> None:
        """Runs a request that waits. Not in a loop, whose locals would hold it meanwhile."""
        request = self._ahead.take()
        if not self.core.ended:  # else nothing awaits its answer
            self._dispatch(request)

    def _dispatch(self, request: Request) -> None:
        deadline = time.monotonic() + request.time_ns * 1e-9 if request.time_ns else None
        if self._workers is not None:
            self._submit(request, deadline)
            return
        ahead = self._ahead
        ahead.running = request.request_id
        connection = self.connection
        many = ahead.nbytes > STAGING_NBYTES  # came with one read, which may have emptied the socket
        if ahead.is_off and connection.arena is None and (many or connection.transport.has_bytes()):
            self._start_reader()
        self._run(request, deadline)
        self._ran(request.request_id)

    def _ran(self, request_id: int) -> None:
        """A request that ran on this thread is answered."""
        ahead = self._ahead
        ahead.running = None
        if ahead.reader is not None or self.core.cancelled:
            with ahead.idle:
                self.core.cancelled.discard(request_id)

    def _start_reader(self) -> None:
        try:
            self._replies.start_sender()
        except ResourceError as error:
            _logger.debug("%s: nothing is read ahead: %s", self._service.uri, str(error))
            return
        self._ahead.start(self._read_ahead)

    def _run(self, request: Request, deadline: float | None) -> None:
        core, request_id = self.core, request.request_id
        call = core.begin(self, request, deadline)
        if isinstance(call, Refusal):
            self._replies.error(request_id, call)
        else:
            self._answer(call, deadline)

    def _answer(self, call: Call, deadline: float | None) -> None:
        core, request_id, fast_path = self.core, call._request_id, self.connection.fast_path
        try:
            handler = self._handlers[call.op]
            started_ns = perf_counter_ns()
            self._in_handler = self._ahead.running == request_id  # else a worker's thread runs it
            try:
                result = handler(call)
            finally:
                self._in_handler = False
            time_ns = perf_counter_ns() - started_ns
            sent = fast_path is not None and self._ahead.reader is None and fast_path.reply(call, result, time_ns)
            if not sent:
                until = core.reply_deadline(None) if deadline is None else deadline
                out = core.prepare(call, result, until)
        except BaseException as error:  # noqa: BLE001 (sys.exit() in a handler must not end the server's threads either)
            self._replies.error(request_id, core.failure(self, call.op, error))
            return
        if not sent:
            self._replies.reply(call, out, time_ns, until)
        elif fast_path.rest is not None:
            self._replies.send_rest()

    # ---- workers ----

    def _submit(self, request: Request, deadline: float | None) -> None:
        request_id = request.request_id
        with self._ahead.idle:
            self.core.admit(request_id, request)  # kept there, so that it is gone when the connection is
        assert self._workers is not None
        if not self._workers.submit(functools.partial(self._run_pending, request_id, deadline)):
            self._done(request_id)
            self._replies.error(request_id, CLOSING)

    def _run_pending(self, request_id: int, deadline: float | None) -> None:
        request = self.core.pending.get(request_id)
        if request is None:  # the connection has ended, or it was answered
            return
        try:
            if not self.core.ended:
                self._run(request, deadline)
        except FastsplitError as error:
            if not self.core.ended:
                _logger.warning("%s: a reply could not be sent: %s", self._service.uri, str(error))
            self.connection.transport.shutdown()
        finally:
            self._done(request_id)

    def _done(self, request_id: int) -> None:
        with self._ahead.idle:
            self.core.done(request_id)
            self._ahead.idle.notify_all()
