"""The server: accepts connections, runs handlers, answers.

Each connection has a thread of its own that reads a request, runs its handler and answers, in order: the fewest
hand-overs, so the shortest round trip. Where tensors travel and a client has several requests in flight, that thread
only computes for as long as that goes on: another one reads ahead, and a third one sends what the kernel does not take
at once; still in order. With `workers`, handlers run in a pool instead: then requests of one connection
overlap, replies come in the order in which they are done, and a CANCEL can still find its request waiting.

While a handler runs on the connection's own thread, that thread reads when the handler asks whether it is cancelled or
waits for memory. Requests that arrive then are queued, and the end of the reading (`_reader_end`) takes effect when the
handler returns, as if another thread had read.

Rules. One client's failure touches nobody else. A handler's exception is an answer (ERROR), never the end of a
connection. Every request is answered exactly once. A peer that breaks the protocol is told how (ABORT), and its
connection ends.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from threading import get_ident
from time import perf_counter_ns
from typing import Any

from ... import tensors
from ...errors import (
    ClosedError,
    DeadlineError,
    FastsplitError,
    PeerLostError,
    RemoteProtocolError,
    ResourceError,
    fresh,
)
from ...printable import get_logger
from ...schema.limits import Limits, parse_limits
from ...system.forked import renew, watch
from ...system.shortage import start, why
from ...system.stops import Stops
from ...system.threads import Workers, only_one
from ...tensors import Arrays
from ...tensors.pool import Pool, pool
from ..call import (
    Call,
    Client,
    Handler,
    describe,
    log_failure,
    parse_handlers,
    tensors_nbytes,
    too_many,
    wanted_coding,
)
from ..compression import THRESHOLD_NBYTES, Coder, parse_codec
from ..connection import Connection, greeting
from ..events import Cancel, Event, Failed, Goodbye, Probe, Request, ReturnsWanted, RingOffered
from ..frames import MAX_RETURNS
from ..options import _parse_hook, _parse_pool, parse_count, parse_flag, parse_timeout
from ..shm.arena import IDLE_S
from ..shm.segment import Hook
from ..stats import Stats
from ..transport.address import Reserve, parse_address
from ..transport.scheme import End
from ..transport.spin import choose_spin_us, cores
from .flush import ask_for_returns, flush, flush_in, send_returns

__all__ = ["Call", "Client", "Handler", "Server"]

_logger = get_logger("fastsplit.server")

_MAX_AHEAD_NBYTES = 256 * 1024**2  # tensors of requests that were read ahead; a single one may have more
_MAX_QUICK = 16  # requests in a row that found nothing to do, after which a connection reads for itself again
_MAX_LOOKS = 16  # reads of what is there already, for a handler that asks whether it is cancelled
_MAX_PROBES = 16  # without an answer, since a reply is being sent; then a connection reads no further
_LOOK_S = 0.5  # how often the main thread wakes, to run the handler of a signal that another thread received
_RELIEF_S = 0.005  # how long it reads before it looks again
_LINGER_S = 1.0  # how long an aborted peer's bytes are read and dropped, so that it can read why


class Server:
    """Serves `handlers` (op name -> function of a `Call`) on `uri`.

    A handler returns a tensor, a sequence of tensors, or None. Use `serve_forever`, or `start` and `close`, or `with`.
    `workers`: 0 runs each connection's requests one after another on its own thread; N runs them all in N threads.
    `limits`: what is accepted from a client. `max_connections`: clients at a time; more are told so, and refused.
    `handshake_timeout_s`, `send_timeout_s`: how long a client may take for its handshake, and to take a reply.
    `spin_us`: how long a connection's thread spins for the next request before it sleeps (FASTSPLIT_SPIN_US, or 50);
    never with workers, nor while there are as many clients as cores. `codec`: of replies, where the client does not
    say. `arrays`, `pool`, `on_segment`, `codec_threshold_nbytes`: as for a Channel.
    `insecure`: may listen where others than this host's users reach it. Whoever does can call, and read along.
    """

    def __init__(
        self,
        uri: str,
        handlers: Mapping[str, Handler],
        *,
        arrays: str | Arrays = "auto",
        workers: int = 0,
        limits: Limits | None = None,
        max_connections: int = 128,
        handshake_timeout_s: float = 10.0,
        send_timeout_s: float = 600.0,
        spin_us: float | None = None,
        pool: Pool = pool,
        on_segment: Hook | None = None,
        codec: str = "auto",
        codec_threshold_nbytes: int = THRESHOLD_NBYTES,
        insecure: bool = False,
    ) -> None:
        self.handlers = parse_handlers(handlers, coroutines=False)
        self.limits = parse_limits(limits)
        self.max_connections = parse_count("max_connections", max_connections, 0)
        self.handshake_timeout_s = parse_timeout("handshake_timeout_s", handshake_timeout_s)
        self.send_timeout_s = parse_timeout("send_timeout_s", send_timeout_s)
        self._address = parse_address(uri)
        self._uri = uri
        self._insecure = parse_flag("insecure", insecure)
        self._arrays = tensors.parse_arrays(arrays)
        self._pool, self._on_segment = _parse_pool("pool", pool), _parse_hook("on_segment", on_segment)
        self._workers = parse_count("workers", workers, 0)
        self._codec = parse_codec(codec)
        self._codec_threshold_nbytes = parse_count("codec_threshold_nbytes", codec_threshold_nbytes, 1)
        self._past = Stats()  # of connections that have ended
        # While the pool's threads work, a reader that spins would only take the interpreter from them.
        self._spin_us = 0.0 if workers else choose_spin_us(spin_us)
        # As soon as clients are as many as cores, a core that spins for one of them is taken from another.
        self._most_spinning = max(cores(), 2) - 1
        self._pool_of_workers: Workers | None = None
        self._listener: Any = None
        self._wake: tuple[int, int] | None = None
        self._reserve: Reserve | None = None
        self._accepting: threading.Thread | None = None
        self._connections: set[_Connection] = set()
        self._lock = threading.RLock()  # a signal may call `close` from inside any other method
        self._closing = threading.Event()
        self._closed = threading.Event()
        self._left: str | None = None  # in a forked child: why it cannot be used

    @property
    def uri(self) -> str:
        """Where the server listens; once started, with the real port."""
        return self._uri

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    @property
    def stats(self) -> Stats:
        """Counts of all connections since the server was made: a snapshot. `calls` are replies, `remote_s` is 0."""
        with self._lock:
            total = Stats().add(self._past)
            for connection in self._connections:
                total.add(connection.stats())
        return total

    @property
    def started(self) -> bool:
        """Whether `start` was called."""
        return self._accepting is not None

    def bind(self) -> Server:
        """Takes the address, so that it is known to be free; clients queue until `start`. Returns the server.

        Raises ListenError if the address is in use, AddressError if it must not be listened on, ClosedError after
        `close` and in a forked child, ResourceError without a descriptor.
        """
        with self._lock:
            if self._closing.is_set():
                raise ClosedError(self._left or "the server was closed")
            if self._listener is None:
                listener, address = self._address.listen(insecure=self._insecure)
                self._listener, self._address, self._uri = listener, address, str(address)
                watch(self)
        return self

    def start(self) -> Server:
        """Listens, and accepts clients in the background from now on. Returns the server. Raises what `bind` does."""
        with self._lock:
            if self.started and not self._closing.is_set():
                raise ClosedError("the server was started already")
            self.bind()
            try:
                self._reserve = Reserve()
                Coder.capabilities()  # looks for codecs now: when a client comes there may be no descriptor left
                self._wake = _pipe()
                thread = threading.Thread(target=self._accept, name=f"fastsplit-accept {self._uri}", daemon=True)
                if self._workers:
                    self._pool_of_workers = Workers(self._workers, "fastsplit-worker")
                start(thread)
            except ResourceError:
                self.close()
                raise
            self._accepting = thread
        return self

    def serve_forever(self) -> None:
        """Serves until `close` is called from another thread or, in the main thread, Ctrl-C or SIGTERM closes the
        server. Returns when it is closed.

        Signal handlers that the program has set are left alone. Raises what `start` does; any other exception in this
        thread closes the server first.
        """
        with Stops() as stops:
            try:
                if not self.started or self._left is not None:
                    with self._lock:  # `close` waits until it has started
                        self.bind()  # may wait for name resolution
                        with stops.held():
                            self.start()
                while not self._closed.wait(_LOOK_S if stops.in_main_thread else None):
                    pass
            except KeyboardInterrupt:
                if not stops.in_main_thread:
                    raise
            finally:
                stops.restore()  # a second signal ends the program at once
                if self._listener is not None:  # else it may be started again
                    self.close()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stops listening, lets running handlers answer for at most `timeout_s` seconds, and ends all connections.

        Idempotent. A handler that takes longer goes on in its thread, but its answer has nowhere to go.
        """
        timeout_s = parse_timeout("timeout_s", timeout_s)
        with self._lock:
            first = not self._closing.is_set()
            self._closing.set()
        if not first:  # in another thread, as a rule
            self._closed.wait(timeout_s)
            return
        if self._listener is None:
            self._closed.set()
            return
        if self._accepting is not None and self._wake is not None:
            os.write(self._wake[1], b"x")
            self._accepting.join()
        wake, self._wake = self._wake, None
        for end in wake or ():
            os.close(end)
        if self._reserve is not None:
            self._reserve.close()
        self._listener.close()
        self._address.unlink()
        deadline = time.monotonic() + timeout_s
        connections = list(self._connections)
        for connection in connections:
            connection.wire.transport.shutdown_reading()
        others = [connection for connection in connections if connection.thread is not threading.current_thread()]
        for connection in others:  # a handler that closes its server gets to answer first
            connection.thread.join(max(deadline - time.monotonic(), 0.0))
        for connection in others:
            if connection.thread.is_alive():
                connection.wire.transport.shutdown()
                connection.thread.join(0.1)
        if self._pool_of_workers is not None:
            self._pool_of_workers.shutdown(wait=False)
        self._closed.set()

    def leave(self, why: str) -> None:
        """For a forked child: see forked.py."""
        renew(self._lock, self._closing, self._closed)
        self._left = why
        self._closing.set()
        self._closed.set()
        if self._listener is not None:
            self._listener.close()
        if self._reserve is not None:
            self._reserve.close()
        for end in self._wake or ():
            os.close(end)
        self._wake = None
        for connection in self._connections:
            connection.leave(why)
        self._connections = set()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Server on {self._uri}, {self.connections} connections>"

    def _accept(self) -> None:
        assert self._listener is not None and self._wake is not None
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake[0], select.POLLIN)
        while not self._closing.is_set():
            ready = {fd for fd, _ in poll.poll()}
            if self._wake[0] in ready:
                return
            self._take_in(self._listener)

    def _take_in(self, listener: Any) -> None:
        """Accepts one client, or refuses it. Not in the loop, whose locals would hold it until the next one comes."""
        assert self._reserve is not None
        try:
            end, refusal = self._reserve.accept(listener, self._address)
        except BlockingIOError:  # gone again
            return
        except OSError as error:
            # Out of descriptors, a stranger: neither is a reason to stop serving.
            _logger.warning("%s: a connection was not accepted: %s", self._uri, why(error))
            time.sleep(0.01)
            return
        connection = _Connection(self, end)
        if refusal is not None:
            _logger.warning("%s: a connection was not accepted: %s", self._uri, refusal)
            connection.refuse(refusal)
            self._reserve.restore()
            return
        with self._lock:
            full = len(self._connections) >= self.max_connections
            if not full:
                self._connections.add(connection)
        if full:
            connection.refuse(too_many(self.max_connections))
            return
        try:
            start(connection.thread)
        except ResourceError as error:
            _logger.warning("%s: a connection was not accepted: %s", self._uri, str(error))
            self._forget(connection)
            connection.refuse(ResourceError(f"the server has {error}"))

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            if connection in self._connections:
                self._connections.discard(connection)
                self._past.add(connection.stats())


class _Connection:
    """One client: its thread, its session, its requests."""

    def __init__(self, server: Server, end: End) -> None:
        self.server = server
        self.wire = Connection(
            end,
            server._address,
            is_client=False,
            limits=server.limits,
            spin_us=0.0,
            pool=server._pool,
            on_memory_pressure=self._on_memory_pressure,
            hook=server._on_segment,
            codec_threshold_nbytes=server._codec_threshold_nbytes,
        )
        self.session = self.wire.session
        self.thread = threading.Thread(target=self._serve, name=f"fastsplit-serve {server.uri}", daemon=True)
        self.client = Client()
        self.cancelled: set[int] = set()
        self.ended = False
        self._sending = self.wire.sending
        self._stats = Stats()
        self._waiting: deque[Request] = deque()  # came in while a handler ran on this thread, or were read ahead
        self._in_handler = False  # whether a handler runs on this thread, which may read for it
        self._running: int | None = None  # the request that runs on this thread: a reader may be told to cancel it
        self._reader: threading.Thread | None = None  # reads ahead, while there is one; set under `_idle`
        self._reader_end: BaseException | bool = True  # why it ended: a reason to end the connection, or to read on
        self._ahead_nbytes = 0
        self._is_idle = False
        self._sender: Workers | None = None
        self._probes: deque[Probe] = deque()
        self._idle = threading.Condition()  # guards `_pending`, and what is read ahead
        # Requests that have no answer yet, where a pool runs them; here, so that they are gone when the connection is.
        self._pending: dict[int, Request] = {}
        self._answered: set[int] = set()  # of these: the client no longer counts them when it has read the answer

    def refuse(self, reason: FastsplitError | str) -> None:
        """Says why, and closes. For a connection whose thread was never started."""
        del self.thread  # which holds this connection until it has run
        with contextlib.suppress(PeerLostError):
            self.wire.transport.send([self.session.abort(reason)])
        self.wire.transport.shutdown()
        self.wire.close()  # at once, since others wait to be accepted

    # ---- for a Call ----

    @property
    def arrays(self) -> Arrays:
        return self.server._arrays

    def reply_deadline(self, deadline: float | None) -> float:
        return time.monotonic() + self.server.send_timeout_s if deadline is None else deadline

    def is_cancelled(self, request_id: int) -> bool:
        if self._in_handler and request_id not in self.cancelled and get_ident() == self.thread.ident:
            self._look()
        return request_id in self.cancelled

    def has_left(self) -> bool:
        if self.server._closing.is_set():  # this side ended the reading
            return False
        return self._reader_end is not True or self.wire.transport.peer_left()

    def stats(self) -> Stats:
        """What was counted so far."""
        self.wire.fill(self._stats)
        return self._stats

    def leave(self, why: str) -> None:
        """For a forked child: see forked.py. One that a handler forked is in a connection that has ended."""
        renew(self._idle)
        self.ended = True
        self.client.leave()
        self.wire.leave(why)
        self._sending = self.wire.sending

    # ---- the connection's thread ----

    def _serve(self) -> None:
        error: FastsplitError | None = None
        try:
            going_on = self._greet()
            while going_on:
                while self._waiting:
                    self._dispatch_next()
                reads_itself = self._reader is None and self._reader_end is True  # else a reader has something to say
                going_on = self._read_or_trim() if reads_itself else self._await_reader()
            self._drain()
        except (RemoteProtocolError, ResourceError) as broken:
            error = fresh(broken)
            self._abort(error)
        except FastsplitError as lost:
            error = fresh(lost)
        except Exception:
            _logger.exception("%s: a bug in the server ended a connection", self.server.uri)
        finally:
            self.ended = True
            if error is not None and not self.server._closing.is_set():
                # Who leaves before the handshake only wanted to see whether anybody is here. The error's text, not the
                # error: whoever keeps the record would keep its frames, and the shared memory that lies in them.
                greeted = self.session.peer_limits is not None or isinstance(
                    error, (RemoteProtocolError, ResourceError)
                )
                level = logging.WARNING if greeted else logging.DEBUG
                _logger.log(level, "%s: a connection ended: %s", self.server.uri, str(error))
            self.wire.transport.shutdown()
            with self._idle:
                self._waiting.clear()
                self._pending.clear()
                self._idle.notify_all()  # the reader may wait for room
                reader = self._reader
            if reader is not None:
                reader.join()
            self._waiting.clear()  # of what the reader still had
            self._reader_end = True  # perhaps an error, which nobody asked for
            if self._sender is not None:
                self._sender.shutdown()
            with self._sending:  # a worker may be in a system call on the descriptor
                self.wire.close()
            self.client._end()
            self.server._forget(self)

    def _greet(self) -> bool:
        timeout_s = self.server.handshake_timeout_s
        deadline = time.monotonic() + timeout_s
        self.wire.serves_in(*only_one(self.server._pool_of_workers))
        greeting.add(get_ident())
        try:
            self.wire.transport.send_all([self.session.hello()], deadline)
            while self.session.peer_limits is None:
                if not self._read(self._dispatch, deadline):
                    return False
                if time.monotonic() >= deadline:  # it may dribble
                    raise DeadlineError("no handshake")
        except DeadlineError:
            raise RemoteProtocolError(f"no handshake within {timeout_s} s") from None
        finally:
            greeting.discard(get_ident())
        return True

    def _read_or_trim(self) -> bool:
        """Reads; but if nothing comes for long, gives unused memory back first, and only then sleeps for good."""
        arena = self.wire.arena
        if arena is not None:
            try:
                return self._read(self._dispatch, time.monotonic() + IDLE_S)
            except DeadlineError:
                if arena.trim():
                    with self._sending:
                        self._send_control_frames(time.monotonic() + self.server.send_timeout_s)
        return self._read(self._dispatch)

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

    def _receive(self, deadline: float | None, *, blocking: bool = True) -> list[Event] | None:
        """Reads once. None at the end of the stream."""
        session, link, server = self.session, self.wire.transport, self.server
        spins = len(server._connections) <= server._most_spinning and self._reader is None
        link.spin.spin_us = server._spin_us if spins else 0.0
        # What is in a ring already can be read for as long as the client goes on writing.
        events = link.receive(session, deadline, blocking=blocking) if not server._closing.is_set() else None
        if events is None:
            if not session.at_frame_boundary:
                raise session.end_of_stream()
            session.end_of_stream()
            self.ended = not server._closing.is_set()  # else it is we who ended the reading
            return None
        if len(events) > 1:  # a cancellation that came with its request is in time
            self.cancelled.update(event.request_id for event in events if isinstance(event, Cancel))
        return events

    def _handle(self, event: Event) -> bool:
        """Acts on anything but a request. False when the client is done."""
        if isinstance(event, Cancel):
            self._cancel(event.request_id)
        elif isinstance(event, RingOffered):
            with self._sending:
                try:
                    self.wire.attach_ring(event, time.monotonic() + self.server.handshake_timeout_s)
                except DeadlineError:
                    raise PeerLostError("the client did not read the handshake") from None
        elif isinstance(event, ReturnsWanted):
            with self._sending:
                send_returns(self.wire.outbox)
        elif isinstance(event, Probe):
            if self.wire.meter is not None:
                self.wire.meter.on_probe(event.bytes_per_s, event.rtt_s)
            self._probes.append(event)
            self._answer_probes(wait=len(self._probes) >= _MAX_PROBES)
        elif isinstance(event, Goodbye):
            self.ended = True
            return False
        elif isinstance(event, Failed):
            if event.tell:
                raise fresh(event.error)
            raise PeerLostError(str(event.error))
        return True

    def _on_memory_pressure(self, deadline: float | None) -> None:
        """Our memory is full: asks the client for returns, and reads for a moment if this is the thread that reads."""
        with self._sending:
            ask_for_returns(self.wire.outbox)
        if get_ident() != self.thread.ident:
            time.sleep(0.001)
            return
        if self._can_read:
            soon = time.monotonic() + _RELIEF_S
            self._read_in_handler(soon if deadline is None else min(soon, deadline))
        elif self._reader_end is True:
            time.sleep(0.001)
        if isinstance(self._reader_end, FastsplitError):
            raise fresh(self._reader_end)
        if self._reader_end is not True:
            raise PeerLostError("the client left while a handler waited for memory")

    @property
    def _can_read(self) -> bool:
        """Whether this thread may read while it runs a handler: no other thread reads, the reading has not ended, and
        there is room for requests that wait."""
        return (
            self._reader is None
            and self._reader_end is True
            and len(self._waiting) < self.server.limits.max_inflight
            and self._ahead_nbytes < _MAX_AHEAD_NBYTES
        )

    def _look(self) -> None:
        """Reads what has arrived, without blocking."""
        if self.server._closing.is_set() or self._sending.locked():  # a finalizer may ask in the middle of a send
            return
        for _ in range(_MAX_LOOKS):
            if not (self._can_read and self.wire.transport.has_bytes()):
                return
            self._read_in_handler(None, blocking=False)
            if self.wire.meter is not None:
                self.wire.meter.payload_waits()

    def _read_in_handler(self, deadline: float | None, *, blocking: bool = True) -> None:
        """Reads once while a handler runs on this thread. Needs `_can_read`; sets `_reader_end` at the end."""
        in_handler, self._in_handler = self._in_handler, False  # a finalizer may ask in the middle of it
        try:
            if not self._read(self._put_off, deadline, blocking=blocking):
                self._reader_end = False
        except DeadlineError:
            pass  # nothing came
        except FastsplitError as error:
            self._reader_end = fresh(error)
        finally:
            self._in_handler = in_handler

    def _put_off(self, request: Request) -> None:
        """Queues a request until the one that runs on this thread is answered. The caller holds `_idle`, or there is no
        reader."""
        self._waiting.append(request)
        self._ahead_nbytes += self._held_nbytes(request)

    def _held_nbytes(self, request: Request) -> int:
        """Bytes of this process's memory that a waiting request takes; shared memory counts as the client's."""
        return tensors_nbytes(request) if self.wire.arena is None else request.message.payload_nbytes

    def _dispatch(self, request: Request) -> None:
        deadline = time.monotonic() + request.time_ns * 1e-9 if request.time_ns else None
        workers = self.server._pool_of_workers
        if workers is None:
            self._running = request.request_id
            reads_itself = self._reader is None and self._reader_end is True
            if reads_itself and self.wire.arena is None and self.wire.transport.has_bytes():
                self._read_ahead()
            self._run(request, deadline)
            self._running = None
            if self._reader is not None or self.cancelled:
                with self._idle:
                    self.cancelled.discard(request.request_id)
            return
        with self._idle:
            if request.request_id in self._pending:
                raise RemoteProtocolError(f"header, request_id: {request.request_id}, which is in flight already")
            inflight = len(self._pending) - len(self._answered)
            if inflight >= self.server.limits.max_inflight:
                raise RemoteProtocolError(
                    f"{inflight + 1} requests in flight, expected at most {self.server.limits.max_inflight}"
                )
            self._pending[request.request_id] = request
        if not workers.submit(functools.partial(self._run_pending, request.request_id, deadline)):
            self._done(request.request_id)
            self._answer_error(request.request_id, "failed", "the server is closing")

    # ---- reading ahead ----

    def _dispatch_next(self) -> None:
        """Runs a request that was read ahead. Not in the connection's loop, whose locals would hold it meanwhile."""
        request = self._next_waiting()
        if not self.ended:  # else nobody waits for it
            self._dispatch(request)

    def _next_waiting(self) -> Request:
        with self._idle:
            request = self._waiting.popleft()
            self._running = request.request_id
            self._ahead_nbytes -= self._held_nbytes(request)
            self._idle.notify_all()
        return request

    def _read_ahead(self) -> None:
        """Has another thread read from now on. The connection's own goes on to compute: a second one that does would
        bring a second set of OpenMP's threads."""
        self._reader_end = True
        self._reader = threading.Thread(target=self._read_on, name=f"fastsplit-read {self.server.uri}", daemon=True)
        try:
            if self._sender is None:
                self._sender = Workers(1, f"fastsplit-send {self.server.uri}")
            start(self._reader)
        except ResourceError as error:  # it reads when it has computed
            _logger.debug("%s: nothing is read ahead: %s", self.server.uri, str(error))
            self._reader = None
        self.wire.coder.overlaps = self._reader is not None

    def _read_on(self) -> None:
        """The reader's thread: until the client leaves, or has had nothing more than one request in flight for long."""
        quick = 0
        end: BaseException | bool = True
        self.wire.serves_in(get_ident())
        try:
            while end is True and quick < _MAX_QUICK:
                end, quick = self._read_more(quick)
        except FastsplitError as error:
            end = fresh(error)
        except BaseException as error:  # noqa: BLE001 (it is the connection's thread that says what became of it)
            end = error
        with self._idle:
            self._reader_end = end
            self._reader = None
            self.wire.coder.overlaps = False
            self._idle.notify_all()
        del end  # an error keeps this frame, and with it the tensors

    def _read_more(self, quick: int) -> tuple[bool, int]:
        """Reads once. Whether the client goes on, and how many requests in a row found nothing to do."""
        events = self._receive(None)
        going_on = events is not None
        for event in events or ():
            if isinstance(event, Request):
                quick = quick + 1 if self._queue(event) else 0
            elif not self._handle(event):
                going_on = False
        return going_on, quick

    def _queue(self, request: Request) -> bool:
        """Gives a request to the connection's thread. Returns whether that had nothing else to do."""
        limit = self.server.limits.max_inflight
        nbytes = self._held_nbytes(request)
        with self._idle:
            while self._waiting and (self._ahead_nbytes + nbytes > _MAX_AHEAD_NBYTES or len(self._waiting) >= limit):
                if self.ended or self.server._closing.is_set():
                    break
                self._idle.wait(1.0)
            was_idle = self._is_idle and not self._waiting
            self._put_off(request)
            self._idle.notify_all()
        return was_idle

    def _await_reader(self) -> bool:
        """Waits for a request that was read ahead. False when the client is done."""
        with self._idle:
            self._is_idle = True
            self._idle.wait_for(lambda: self._waiting or self._reader is None)
            self._is_idle = False
            if self._waiting:
                return True
            end, self._reader_end = self._reader_end, True
        if not isinstance(end, BaseException):
            return end
        try:
            raise end
        finally:
            del end

    def _cancel(self, request_id: int) -> None:
        with self._idle:
            if (
                request_id in self._pending
                or request_id == self._running
                or any(request.request_id == request_id for request in self._waiting)
            ):
                self.cancelled.add(request_id)
            else:
                self.cancelled.discard(request_id)

    def _drain(self) -> None:
        """Where the server closes: waits for the pool to answer what is left, then says goodbye."""
        if self.ended:
            return
        if self.server._pool_of_workers is not None:
            with self._idle:
                self._idle.wait_for(lambda: not self._pending, timeout=self.server.send_timeout_s)
        with self._sending:
            self.wire.transport.send([self.session.goodbye()])

    def _abort(self, reason: FastsplitError) -> None:
        self.ended = True
        deadline = time.monotonic() + _LINGER_S
        if not self._sending.acquire(timeout=_LINGER_S):  # a reply is stuck: the end must say enough
            return
        try:
            with contextlib.suppress(FastsplitError):
                self.wire.transport.send_all([self.session.abort(reason)], deadline)
        finally:
            self._sending.release()
        self.wire.transport.linger(deadline)

    # ---- requests ----

    def _run_pending(self, request_id: int, deadline: float | None) -> None:
        request = self._pending.get(request_id)
        if request is None:  # the connection has ended, or it was answered
            return
        try:
            if not self.ended:
                self._run(request, deadline)
        except FastsplitError as error:
            if not self.ended:
                _logger.warning("%s: a reply could not be sent: %s", self.server.uri, str(error))
            self.wire.transport.shutdown()
        finally:
            self._done(request_id)

    def _done(self, request_id: int) -> None:
        with self._idle:
            self._pending.pop(request_id, None)
            self._answered.discard(request_id)
            self.cancelled.discard(request_id)
            self._idle.notify_all()

    def _run(self, request: Request, deadline: float | None) -> None:
        request_id, message = request.request_id, request.message
        if request_id in self.cancelled:
            self.cancelled.discard(request_id)
            self._answer_error(request_id, "cancelled", "cancelled before it ran")
            return
        if deadline is not None and time.monotonic() >= deadline:
            self._answer_error(request_id, "deadline", "its deadline passed before it ran")
            return
        if request.refusal is not None:
            self._answer_error(request_id, "failed", describe(request.refusal))
            return
        handler = self.server.handlers.get(message.op)
        if handler is None:
            known = ", ".join(sorted(self.server.handlers)) or "none"
            self._answer_error(request_id, "unknown-op", f"no such operation here; there are: {known}")
            return
        try:
            call = Call(
                self,
                request_id,
                message.op,
                tuple(map(self.server._arrays.view, request.buffers, message.tensors)),
                message.attrs or {},
                deadline,
            )
            request.buffers.clear()
            started_ns = perf_counter_ns()
            self._in_handler = self._running == request_id  # else a worker's thread runs it
            try:
                result = handler(call)
            finally:
                self._in_handler = False
            time_ns = perf_counter_ns() - started_ns
            call.tensors = ()  # what of them is not in the result dies now, and goes back with this very reply
            if not isinstance(result, (tuple, list)):
                result = () if result is None else (result,)
            if deadline is None:
                deadline = time.monotonic() + self.server.send_timeout_s
            out = self.wire.prepare(
                message.op, result, deadline, *wanted_coding(self.wire.coder, request.flags, self.server._codec)
            )
        except BaseException as error:  # noqa: BLE001 (sys.exit() in a handler must not end the server's threads either)
            self._answer_failure(request_id, message.op, error)
            return
        arena = self.wire.arena
        handed_over = False
        self._sending.acquire()
        try:
            self.wire.transport.wake_early()
            if arena is not None and (arena.has_pending or len(arena.returns) > MAX_RETURNS):
                self._send_control_frames(deadline)
            try:
                head = self.session.reply(request_id, out.descs, out.nbytes, time_ns, call.reply_attrs, out.placements)
            except BaseException as error:  # noqa: BLE001 (attributes of the handler's that are no such thing, for example)
                failure = error
            else:
                if arena is not None:
                    arena.lend(out.placements)
                stats = self._stats
                stats.calls += 1
                stats.bytes_copied += out.copied_nbytes
                self.wire.lent_nbytes += out.shared_nbytes
                if self._pending:
                    self._answers(request_id)
                handed_over = self._send_behind([head, *out.buffers], len(head) + out.nbytes)
                return
        finally:
            if not handed_over:
                self._release_sending()
        self._answer_failure(request_id, message.op, failure)
        del failure  # it keeps this frame, and with it the tensors

    def _answers(self, request_id: int) -> None:
        """The answer is about to be sent."""
        if request_id in self._pending:
            self._answered.add(request_id)

    def _answer_failure(self, request_id: int, op: str, error: BaseException) -> None:
        log_failure(self, self.server.uri, op, error)
        self._answer_error(request_id, "failed", describe(error))

    def _answer_error(self, request_id: int, code: str, text: str) -> None:
        self._sending.acquire()
        try:
            frame = self.session.error(request_id, code, text)
            self._answers(request_id)
            self._send([frame], len(frame))
        finally:
            self._release_sending()

    def _send_control_frames(self, deadline: float) -> None:
        """Sends what must go before the next frame. The caller holds `_sending`."""
        outbox = self.wire.outbox
        outbox.put_control_frames()
        if not outbox.flush():
            self._send_left()

    def _send_behind(self, buffers: list[Any], nbytes: int) -> bool:
        """As `_send`; but while another thread reads, a third one sends what the kernel does not take at once, and then
        releases `_sending`: frames stay whole, and at most one waits. Returns whether it was handed over."""
        if self._reader is None or self._sender is None:
            self._send(buffers, nbytes)
            return False
        outbox = self.wire.outbox
        if outbox.send(buffers, nbytes) is None:
            return False

        def sent(failure: FastsplitError | None) -> None:
            if failure is not None:
                if isinstance(failure, DeadlineError):
                    failure = self._late()
                _logger.debug("%s: a reply could not be sent: %s", self.server.uri, str(failure))
                self.wire.transport.shutdown()
            self._release_sending()

        if not flush_in(self._sender, outbox, time.monotonic() + self.server.send_timeout_s, sent):
            self._send_left()  # the connection has ended
            return False
        return True

    def _release_sending(self) -> None:
        self._sending.release()
        if self._probes:
            self._answer_probes()

    def _answer_probes(self, wait: bool = False) -> None:
        """Answers what was asked, or leaves it to whoever sends at this moment. `wait`: until that one is done."""
        while self._probes and self._sending.acquire(blocking=wait):
            try:
                frame = self.wire.probe_answer(self._probes.popleft())
                self._send(frame, sum(map(len, frame)))
            except IndexError:
                return  # another thread has answered it
            except FastsplitError as error:  # perhaps in the middle of the answer: nothing can follow it
                _logger.debug("%s: a probe was not answered: %s", self.server.uri, str(error))
                self.wire.transport.shutdown()
                return
            finally:
                self._sending.release()

    def _send(self, buffers: list[Any], nbytes: int) -> None:
        """Sends a frame. The caller holds `_sending`."""
        if self.wire.outbox.send(buffers, nbytes) is not None:
            self._send_left()

    def _send_left(self) -> None:
        try:
            flush(self.wire.outbox, time.monotonic() + self.server.send_timeout_s)
        except DeadlineError:
            raise self._late() from None

    def _late(self) -> PeerLostError:
        return PeerLostError(f"the client did not take its reply within {self.server.send_timeout_s} s")


def _pipe() -> tuple[int, int]:
    try:
        return os.pipe()
    except OSError as error:
        raise ResourceError(f"a pipe: {why(error)}") from None
