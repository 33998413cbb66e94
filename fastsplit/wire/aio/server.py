"""The server on an event loop: one thread for all clients; handlers that wait do not keep others waiting.

A handler that is a coroutine function runs as a task for each request: any number at a time, and replies go out in the
order in which they are done. A plain function runs on the loop, one after another of each connection, and nothing else
happens meanwhile; or, with `workers`, in a pool of threads.

Rules. As in server.py: one client's failure touches nobody else, a handler's exception is an answer, every request is
answered exactly once, and a peer that breaks the protocol is told how. A CANCEL cancels the task of its request, and
the end of a connection all of its tasks. Reading goes on while handlers are at work, so that both are seen; it stops
while a client does not read its replies, or has sent more than the plain handlers can keep up with.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from time import perf_counter_ns
from typing import Any

from ... import tensors
from ...errors import (
    ArenaFull,
    ClosedError,
    DeadlineError,
    FastsplitError,
    PeerLostError,
    RemoteProtocolError,
    ResourceError,
    TensorError,
)
from ...printable import get_logger
from ...schema.limits import Limits, parse_limits
from ...system.forked import renew, watch
from ...system.shortage import why
from ...system.stops import LoopStops
from ...system.threads import Workers, is_interrupt, only_one
from ...tensors import Arrays, Outgoing
from ...tensors.pool import Pool, pool
from ..call import Call as BlockingCall
from ..call import (
    Client,
    describe,
    is_coroutine,
    log_failure,
    parse_handlers,
    tensors_nbytes,
    too_many,
    wanted_coding,
)
from ..compression import THRESHOLD_NBYTES, Coder, parse_codec
from ..connection import Connection
from ..options import MAX_QUEUED_NBYTES, _parse_hook, _parse_pool, parse_count, parse_flag, parse_timeout
from ..session import Cancel, Event, Goodbye, Probe, Request, ReturnsWanted, RingOffered
from ..shm.arena import IDLE_S
from ..shm.segment import Hook
from ..stats import Stats
from ..transport.address import Reserve, UnixAddress, listen_socket, parse_address, remove_socket_file
from .channel import allocate
from .pump import AT_ONCE, Pump, settle_left, within

__all__ = ["Call", "Handler", "Server", "serve"]

_logger = get_logger("fastsplit.server")

_LINGER_S = 1.0  # how long an aborted peer's bytes are read and dropped, so that it can read why
_MAX_ACCEPTED = 64  # in one turn of the loop
_ACCEPT_AGAIN_S = 0.01  # after an error, such as no descriptor left
_MAX_WORK_NS = 1_000_000  # of plain handlers, before others get their turn
_UNWIND_S = 1.0  # how long cancelled tasks may take to clean up, where the server closes


class Call(BlockingCall):
    """One request, as its handler sees it: as in fastsplit.Call, and `allocate`."""

    __slots__ = ("_flags",)

    _connection: Any
    _flags: int

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32") -> Any:
        """A tensor of undefined content in the memory that replies are sent from fastest, for the handler to return.

        Where memory is shared it lies there. On the loop it never waits: ArenaFull if there is no room now. In a worker
        it waits for room as long as the caller does for its reply.
        """
        connection = self._connection
        deadline = AT_ONCE if connection.pump.in_loop else connection.reply_deadline(self._deadline)
        return connection.arrays.empty(shape, dtype, lambda nbytes: connection.wire.allocate(nbytes, deadline))

    async def allocate(self, shape: int | Sequence[int], dtype: Any = "float32") -> Any:
        """As `empty`, for coroutines: waits for room as long as the caller does for its reply. Raises ArenaFull."""
        connection = self._connection
        deadline = connection.reply_deadline(self._deadline)
        return await allocate(connection.pump, connection.arrays, shape, dtype, deadline)


Handler = Callable[[Call], Any] | Callable[[Call], Awaitable[Any]]


class Server:
    """Serves `handlers` (op name -> function or coroutine function of a `Call`) on `uri`. It is `fastsplit.aio.serve`.

    To be started by `await serve(...)` or `async with serve(...) as server`; then `await server.serve_forever()`, if
    there is nothing else to do, and `await server.close()`. Options: as for fastsplit.Server. `workers`: 0 runs plain
    functions on the loop, N in N threads. `max_queued_nbytes`: how many bytes of replies may wait for a client to read
    them, and of requests for plain handlers, before nothing more is read from it.
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
        max_queued_nbytes: int = MAX_QUEUED_NBYTES,
        pool: Pool = pool,
        on_segment: Hook | None = None,
        insecure: bool = False,
        codec: str = "auto",
        codec_threshold_nbytes: int = THRESHOLD_NBYTES,
    ) -> None:
        self.handlers = parse_handlers(handlers, coroutines=True)
        self.limits = parse_limits(limits)
        self.max_connections = parse_count("max_connections", max_connections, 0)
        self.handshake_timeout_s = parse_timeout("handshake_timeout_s", handshake_timeout_s)
        self.send_timeout_s = parse_timeout("send_timeout_s", send_timeout_s)
        self.max_queued_nbytes = parse_count("max_queued_nbytes", max_queued_nbytes, 1)
        self._address = parse_address(uri)
        self._uri = uri
        self._arrays = tensors.parse_arrays(arrays)
        self._pool, self._on_segment = _parse_pool("pool", pool), _parse_hook("on_segment", on_segment)
        self._workers = parse_count("workers", workers, 0)
        self._insecure = parse_flag("insecure", insecure)
        self._codec = parse_codec(codec)
        self._codec_threshold_nbytes = parse_count("codec_threshold_nbytes", codec_threshold_nbytes, 1)
        self._past = Stats()  # of connections that have ended
        self._pool_of_workers: Workers | None = None
        self._listener: socket.socket | None = None
        self._inode = 0
        self._reserve: Reserve | None = None
        self._connections: set[_Connection] = set()
        self._ending: set[asyncio.Future[bool]] = set()  # of connections that are read out before they are closed
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Handle | None = None
        self._closing = threading.Event()  # handlers in threads look at it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed: asyncio.Future[bool] | None = None
        self._left: str | None = None  # in a forked child: why it cannot be used

    def __await__(self) -> Generator[Any, None, Server]:
        return self.start().__await__()

    async def __aenter__(self) -> Server:
        return self if self.started and self._left is None else await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<aio.Server on {self._uri}, {self.connections} connections>"

    @property
    def uri(self) -> str:
        """Where the server listens; once started, with the real port."""
        return self._uri

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    @property
    def inflight(self) -> int:
        """How many requests have no answer yet, of all connections."""
        return sum(connection.inflight for connection in self._connections)

    @property
    def stats(self) -> Stats:
        """Counts of all connections since the server was made: a snapshot. `calls` are replies, `remote_s` is 0."""
        total = Stats().add(self._past)
        for connection in list(self._connections):
            total.add(connection.stats())
        return total

    @property
    def started(self) -> bool:
        """Whether it was started."""
        return self._loop is not None

    async def start(self) -> Server:
        """Listens, and accepts clients from now on. Returns the server.

        Raises ListenError if the address is in use, AddressError if it must not be listened on, ClosedError after
        `close`, ResourceError without a descriptor or a thread.
        """
        if self.started or self._closing.is_set():
            state = "closed" if self._closing.is_set() else "started already"
            raise ClosedError(self._left or f"the server was {state}")
        loop = asyncio.get_running_loop()
        reserve = Reserve()
        workers = None
        try:
            Coder.capabilities()  # looks for codecs now: when a client comes there may be no descriptor left
            if self._workers:
                workers = Workers(self._workers, "fastsplit-worker")
            listener, address = listen_socket(self._address, insecure=self._insecure)
        except BaseException:
            reserve.close()
            if workers is not None:
                workers.shutdown(wait=False)
            raise
        self._pool_of_workers = workers
        self._reserve = reserve
        listener.setblocking(False)
        self._loop, self._closed = loop, loop.create_future()
        self._listener, self._address, self._uri = listener, address, str(address)
        if isinstance(address, UnixAddress):
            self._inode = os.stat(address.path).st_ino
        loop.add_reader(listener.fileno(), self._accept)
        watch(self)
        return self

    async def serve_forever(self) -> None:
        """Serves until `close` is called, the awaiting task is cancelled or, on the main thread's loop, Ctrl-C or
        SIGTERM comes; the last three close the server. Returns when it is closed.

        Signal handlers that the program has set are left alone. Raises what `start` does.
        """
        with LoopStops(asyncio.get_running_loop()) as stops:
            try:
                if not self.started or self._left is not None:
                    await self.start()
                assert self._closed is not None
                await asyncio.wait((self._closed, stops.stopped), return_when=asyncio.FIRST_COMPLETED)
            finally:
                stops.restore()  # a second signal ends the program at once
                if self.started:  # else it may be started again
                    await self.close()

    async def close(self, timeout_s: float = 5.0) -> None:
        """Stops listening, lets running handlers answer for at most `timeout_s` seconds, and ends all connections.

        Idempotent. Then tasks that are left are cancelled. A plain handler that takes longer goes on in its thread, but
        its answer has nowhere to go.
        """
        timeout_s = parse_timeout("timeout_s", timeout_s)
        first = not self._closing.is_set()
        self._closing.set()
        if self._loop is None or self._closed is None:
            return
        if not first:
            await asyncio.shield(self._closed)
            return
        try:
            self._stop_accepting()
            deadline = time.monotonic() + timeout_s
            connections = list(self._connections)
            for connection in connections:
                connection.stop_reading()
            for connection in connections:
                await connection.drained(deadline)
        finally:
            for connection in list(self._connections):
                connection.finish()
            if self._pool_of_workers is not None:
                self._pool_of_workers.shutdown(wait=False)
            try:
                tasks = self._tasks - {asyncio.current_task()}  # a handler that closes its server answers no more
                if tasks:
                    await asyncio.wait(tasks, timeout=_UNWIND_S)
                if self._ending:
                    await asyncio.wait(self._ending, timeout=_LINGER_S)
            finally:
                if not self._closed.done():
                    self._closed.set_result(True)

    def leave(self, why: str) -> None:
        """For a forked child: see forked.py. The loop's selector is the parent's, too, and stays as it is."""
        renew(self._closing)
        self._left = why
        self._closing.set()
        if self._listener is not None:
            self._listener.close()
        if self._reserve is not None:
            self._reserve.close()
        if self._closed is not None:
            settle_left(self._closed)
        for connection in self._connections:
            connection.leave(why)
        self._connections = set()

    def _stop_accepting(self) -> None:
        assert self._loop is not None and self._listener is not None
        if self._accepting is not None:
            self._accepting.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        if self._reserve is not None:
            self._reserve.close()
        if isinstance(self._address, UnixAddress):
            remove_socket_file(self._address.path, self._inode)

    def _accept(self) -> None:
        assert self._loop is not None and self._listener is not None and self._reserve is not None
        self._accepting = None
        for _ in range(_MAX_ACCEPTED):
            try:
                sock, refusal = self._reserve.accept(self._listener, self._address)
            except BlockingIOError:
                return
            except OSError as error:
                # Out of descriptors, a stranger: neither is a reason to stop serving.
                _logger.warning("%s: a connection was not accepted: %s", self._uri, why(error))
                self._loop.remove_reader(self._listener.fileno())
                self._accepting = self._loop.call_later(_ACCEPT_AGAIN_S, self._accept_again)
                return
            connection = _Connection(self, sock)
            if refusal is not None:
                _logger.warning("%s: a connection was not accepted: %s", self._uri, refusal)
                connection.refuse(refusal)
                self._reserve.restore()
                continue
            if len(self._connections) >= self.max_connections:
                connection.refuse(too_many(self.max_connections))
                continue
            self._connections.add(connection)
            connection.start()

    def _accept_again(self) -> None:
        assert self._loop is not None and self._listener is not None
        self._loop.add_reader(self._listener.fileno(), self._accept)
        self._accept()

    def _forget(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._past.add(connection.stats())
            if not connection.pump.closed.done():
                self._ending.add(connection.pump.closed)
                connection.pump.closed.add_done_callback(self._ending.discard)


class _Connection:
    """One client: its requests, and the tasks that answer them."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self.wire = Connection(
            sock,
            server._address,
            is_client=False,
            limits=server.limits,
            spin_us=0.0,
            pool=server._pool,
            on_memory_pressure=self._on_memory_pressure,
            hook=server._on_segment,
            codec_threshold_nbytes=server._codec_threshold_nbytes,
        )
        self.pump = Pump(self.wire, self, send_timeout_s=server.send_timeout_s)
        self.session = self.wire.session
        self.client = Client()
        self.cancelled: set[int] = set()
        self.ended = False
        self._stats = Stats()
        self._pending: dict[int, asyncio.Task[None] | None] = {}  # requests that have no answer yet
        self._queued: dict[int, Request] = {}  # those for workers; here, so that they are gone when the connection is
        self._waiting: deque[tuple[Request, float | None]] = deque()  # those for plain handlers on the loop
        self._waiting_nbytes = 0
        self._stopped = False
        self._working: asyncio.Handle | None = None
        self._draining: asyncio.Future[bool] | None = None
        self._timer: asyncio.Handle | None = None  # for the handshake, then for looking after unused memory
        self._calls_before = 0  # when the timer looked last

    def _on_memory_pressure(self, deadline: float | None) -> None:
        self.pump.on_memory_pressure(deadline)

    def start(self) -> None:
        self._timer = self.pump.loop.call_later(self.server.handshake_timeout_s, self._look_for_handshake)
        self.wire.serves_in(*only_one(self.server._pool_of_workers))
        self.pump.start()
        self.pump.send(self.session.hello())

    def refuse(self, reason: FastsplitError | str) -> None:
        """Says why, and closes at once, since others wait to be accepted. Instead of `start`."""
        self.pump.start()
        self.pump.send(self.session.abort(reason))
        self.pump.close()

    def stats(self) -> Stats:
        """What was counted so far."""
        self.wire.fill(self._stats)
        return self._stats

    @property
    def inflight(self) -> int:
        return len(self._pending)

    def leave(self, why: str) -> None:
        """For a forked child: see forked.py."""
        self.ended = True
        self.client.leave()
        self.pump.leave(why)

    # ---- for a Call ----

    @property
    def arrays(self) -> Arrays:
        return self.server._arrays

    def reply_deadline(self, deadline: float | None) -> float:
        return time.monotonic() + self.server.send_timeout_s if deadline is None else deadline

    def is_cancelled(self, request_id: int) -> bool:
        return request_id in self.cancelled

    def has_left(self) -> bool:
        return not self.server._closing.is_set() and self.wire.transport.peer_left()

    # ---- for the pump ----

    def handle(self, event: Event) -> None:
        if isinstance(event, Request):
            self._dispatch(event)
        elif isinstance(event, Cancel):
            self._cancel(event.request_id)
        elif isinstance(event, RingOffered):
            self._attach_ring(event)
        elif isinstance(event, ReturnsWanted):
            self.pump.send_returns()
        elif isinstance(event, Probe):
            if self.wire.meter is not None:
                self.wire.meter.on_probe(event.bytes_per_s, event.rtt_s)
                self.pump.send_filled(self.wire.probe_answer(event))
        elif isinstance(event, Goodbye):
            self._end(None)

    def failed(self, error: FastsplitError, *, tell: bool) -> None:
        if isinstance(error, RemoteProtocolError) and not tell:
            error = PeerLostError(str(error))
        if tell:
            self.pump.abort(error, _LINGER_S)
        left = isinstance(error, PeerLostError) and self.session.at_frame_boundary and not self.inflight
        left = left and not self.session.aborted
        self._end(None if left else error)

    def progressed(self) -> None:
        if self._waiting and self._working is None:
            self._work()
        self._regulate()

    def _regulate(self) -> None:
        """Reads on, or not; and says whether all is done."""
        limit = self.server.max_queued_nbytes
        if not self.ended:
            self.pump.pause(self._stopped or self.pump.queued_nbytes > limit or self._waiting_nbytes > limit)
        if self._draining is not None and not self._draining.done() and self._is_drained:
            self._draining.set_result(True)

    @property
    def _is_drained(self) -> bool:
        return self.ended or (not self._pending and self.pump.idle)

    def _attach_ring(self, event: RingOffered) -> None:
        if not self.pump.idle or self._pending:
            raise RemoteProtocolError("SEGMENT, id: 0, expected before any request")
        try:
            self.wire.attach_ring(event, AT_ONCE)  # its answer has some hundred bytes: there is room for them
        except DeadlineError:
            raise PeerLostError("the client did not read the handshake") from None
        self.pump.use_ring()

    # ---- looking after it ----

    def _look_for_handshake(self) -> None:
        if self.session.peer_limits is None:
            self.failed(RemoteProtocolError(f"no handshake within {self.server.handshake_timeout_s} s"), tell=True)
            return
        self._timer = self.pump.loop.call_later(IDLE_S, self._look_for_idle_memory)

    def _look_for_idle_memory(self) -> None:
        """Gives memory back that nobody has used for long, if nothing was called meanwhile."""
        arena = self.wire.arena
        if arena is None:
            self._timer = None
            return
        before, self._calls_before = self._calls_before, self._stats.calls
        if before == self._calls_before and arena.trim():
            self.pump.queue_control_frames()
        self._timer = self.pump.loop.call_later(IDLE_S, self._look_for_idle_memory)

    def stop_reading(self) -> None:
        """The server closes: what came in by now is the last."""
        self._stopped = True
        self._regulate()

    async def drained(self, deadline: float) -> None:
        """Waits until everything is answered, and the answers are sent; not beyond the deadline."""
        current = asyncio.current_task()
        if current is not None and current in self._pending.values():
            return  # a handler that closes its server
        self._draining = self.pump.loop.create_future()
        self._regulate()
        await within(self._draining, deadline)

    def finish(self) -> None:
        """Says goodbye, and closes."""
        if not self.ended:
            self.pump.goodbye()
            self._end(None)

    def _end(self, error: FastsplitError | None) -> None:
        if self.ended:
            return
        self.ended = True
        if error is not None and not self.server._closing.is_set():
            # Who leaves before the handshake only wanted to see whether anybody is here.
            greeted = self.session.peer_limits is not None or isinstance(error, (RemoteProtocolError, ResourceError))
            level = logging.WARNING if greeted else logging.DEBUG
            _logger.log(level, "%s: a connection ended: %s", self.server.uri, str(error))
        if not self.pump.ended:
            self.pump.close()
        for handle in (self._timer, self._working):
            if handle is not None:
                handle.cancel()
        self._waiting.clear()
        self._queued.clear()
        self._waiting_nbytes = 0
        tasks = [task for task in self._pending.values() if task is not None]
        self._pending.clear()
        for task in tasks:
            task.cancel()
        self.server._forget(self)
        self.client._end()
        self._regulate()

    # ---- requests ----

    def _dispatch(self, request: Request) -> None:
        request_id, server = request.request_id, self.server
        if request_id in self._pending:
            raise RemoteProtocolError(f"header, request_id: {request_id}, which is in flight already")
        if len(self._pending) >= server.limits.max_inflight:
            raise RemoteProtocolError(
                f"{len(self._pending) + 1} requests in flight, expected at most {server.limits.max_inflight}"
            )
        deadline = time.monotonic() + request.time_ns * 1e-9 if request.time_ns else None
        self._pending[request_id] = None
        handler = server.handlers.get(request.message.op)
        if handler is not None and is_coroutine(handler):
            call = self._begin(request, deadline)
            if call is not None:
                self._adopt(call, self._run(call, handler))
        elif handler is not None and server._pool_of_workers is not None:
            self._queued[request_id] = request
            if not server._pool_of_workers.submit(
                functools.partial(self._run_in_thread, request_id, deadline, handler)
            ):
                self._queued.pop(request_id, None)
                self._refuse(request_id, "failed", "the server is closing")
        else:
            self._waiting.append((request, deadline))
            self._waiting_nbytes += tensors_nbytes(request)

    def _begin(self, request: Request, deadline: float | None) -> Call | None:
        """The call of a request that is to run now. None if it is not, and was answered."""
        request_id = request.request_id
        refusal = self._why_not(request, deadline)
        if refusal is not None:
            self._refuse(request_id, *refusal)
            return None
        try:
            return self._make_call(request, deadline)
        except TensorError as error:
            self._refuse(request_id, "failed", describe(error))
            return None

    def _why_not(self, request: Request, deadline: float | None) -> tuple[str, str] | None:
        op = request.message.op
        if request.request_id in self.cancelled:
            return "cancelled", "cancelled before it ran"
        if deadline is not None and time.monotonic() >= deadline:
            return "deadline", "its deadline passed before it ran"
        if request.refusal is not None:
            return "failed", describe(request.refusal)
        if op not in self.server.handlers:
            known = ", ".join(sorted(self.server.handlers)) or "none"
            return "unknown-op", f"no such operation here; there are: {known}"
        return None

    def _make_call(self, request: Request, deadline: float | None) -> Call:
        message = request.message
        views = tuple(map(self.arrays.view, request.buffers, message.tensors))
        request.buffers.clear()
        call = Call(self, request.request_id, message.op, views, message.attrs or {}, deadline)
        call._flags = request.flags
        return call

    def _cancel(self, request_id: int) -> None:
        if request_id in self._pending:
            self.cancelled.add(request_id)
            task = self._pending[request_id]
            if task is not None:
                task.cancel()

    # ---- coroutines ----

    async def _run(self, call: Call, handler: Callable[[Call], Any]) -> None:
        try:
            started_ns = perf_counter_ns()
            result = await handler(call)
            time_ns = perf_counter_ns() - started_ns
            call.tensors = ()  # what of them is not in the result dies now, and goes back with this very reply
            out = await self._prepare(call, _sequence(result))
        except asyncio.CancelledError:
            raise  # `_unwound` knows whose it is
        except GeneratorExit as error:
            if not self.pump.loop.is_running():  # not the handler's: the task is thrown away
                raise
            self._fail(call, error)
        except BaseException as error:
            self._fail(call, error)
            if is_interrupt(error):
                raise
        else:
            self._reply(call, out, time_ns)

    def _unwound(self, request_id: int, task: asyncio.Task[None]) -> None:
        self.server._tasks.discard(task)
        if not task.cancelled():
            if task.exception() is not None:
                _logger.error("%s: a bug in the server", self.server.uri, exc_info=task.exception())
        elif not self.ended and request_id in self.cancelled:
            self._refuse(request_id, "cancelled", "cancelled")
        elif not self.ended:
            try:
                task.result()
            except asyncio.CancelledError as error:  # the handler's own
                self._refuse(request_id, "failed", describe(error))

    async def _prepare(self, call: Call, result: Sequence[Any]) -> Outgoing:
        """What is needed to send a reply; waits for memory."""
        deadline = self.reply_deadline(call._deadline)
        coding = self._coding(call._flags)
        again = False
        while True:
            try:
                out = self.wire.prepare(call.op, result, AT_ONCE, *coding)
            except ArenaFull as full:
                if not await self.pump.memory(full, deadline, again=again):
                    raise
                again = True
            else:
                if again:
                    self.pump.found_memory()
                return out

    # ---- plain functions ----

    def _work(self) -> None:
        """Runs plain handlers on the loop, for a moment."""
        self._working = None
        end_ns = perf_counter_ns() + _MAX_WORK_NS
        while self._waiting:
            request, deadline = self._waiting.popleft()
            self._waiting_nbytes -= tensors_nbytes(request)
            self._run_here(request, deadline)
            del request
            if self._waiting and perf_counter_ns() > end_ns:
                self._working = self.pump.loop.call_soon(self._work_on)
                return

    def _work_on(self) -> None:
        self._work()
        self._regulate()

    def _run_here(self, request: Request, deadline: float | None) -> None:
        call = self._begin(request, deadline)
        if call is None:
            return
        try:
            started_ns = perf_counter_ns()
            result = self.server.handlers[call.op](call)
            if inspect.isawaitable(result):  # of a function that only returns one
                self._adopt(call, self._run(call, lambda _: result))
                return
            time_ns = perf_counter_ns() - started_ns
            call.tensors = ()
            result = _sequence(result)
            try:
                out = self.wire.prepare(call.op, result, AT_ONCE, *self._coding(call._flags))
            except ArenaFull:
                self._adopt(call, self._reply_later(call, result, time_ns))
                return
        except BaseException as error:
            self._fail(call, error)
            if is_interrupt(error):
                raise
            return
        self._reply(call, out, time_ns)

    async def _reply_later(self, call: Call, result: Sequence[Any], time_ns: int) -> None:
        try:
            out = await self._prepare(call, result)
        except Exception as error:  # noqa: BLE001 (of what the handler returned)
            self._fail(call, error)
            return
        self._reply(call, out, time_ns)

    # ---- workers ----

    def _run_in_thread(self, request_id: int, deadline: float | None, handler: Callable[[Call], Any]) -> None:
        """All that a worker does for a request: the handler, and what its reply has to copy."""
        request = self._queued.pop(request_id, None)
        if request is not None and not self.ended:
            answer = self._answer_in_thread(request, deadline, handler)
            del request
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.pump.loop.call_soon_threadsafe(answer)

    def _answer_in_thread(
        self, request: Request, deadline: float | None, handler: Callable[[Call], Any]
    ) -> Callable[[], None]:
        """What the loop is to do about it."""
        refusal = self._why_not(request, deadline)
        if refusal is not None:
            return functools.partial(self._refuse, request.request_id, *refusal)
        try:
            call = self._make_call(request, deadline)
            started_ns = perf_counter_ns()
            result = handler(call)
            time_ns = perf_counter_ns() - started_ns
            if inspect.isawaitable(result):
                return functools.partial(self._adopt, call, self._run(call, lambda _: result))
            call.tensors = ()
            until = self.reply_deadline(deadline)
            out = self.wire.prepare(call.op, _sequence(result), until, *self._coding(call._flags))
        except BaseException as error:  # noqa: BLE001 (sys.exit() in a handler must not end the server's threads either)
            text = self._describe(request.message.op, error)
            return functools.partial(self._refuse, request.request_id, "failed", text)
        return functools.partial(self._reply, call, out, time_ns)

    # ---- answers ----

    def _adopt(self, call: Call, answering: Coroutine[Any, Any, None]) -> None:
        """Has a task answer a call."""
        request_id = call._request_id
        if request_id not in self._pending:  # the connection has ended
            answering.close()
            return
        task = self._pending[request_id] = self.pump.loop.create_task(answering)
        self.server._tasks.add(task)
        task.add_done_callback(functools.partial(self._unwound, request_id))
        if request_id in self.cancelled:
            task.cancel()

    def _reply(self, call: Call, out: Outgoing, time_ns: int) -> None:
        request_id = call._request_id
        if self.ended or request_id not in self._pending:
            return
        self.pump.queue_control_frames()
        try:
            head = self.session.reply(request_id, out.descs, out.nbytes, time_ns, call.reply_attrs, out.placements)
        except BaseException as error:  # noqa: BLE001 (attributes of the handler's that are no such thing, for example)
            self._fail(call, error)
            return
        if self.wire.arena is not None:
            self.wire.arena.lend(out.placements)
        self._stats.calls += 1
        self._stats.bytes_copied += out.copied_nbytes
        self.wire.lent_nbytes += out.shared_nbytes
        self._answer(request_id, head, out)

    def _fail(self, call: Call, error: BaseException) -> None:
        self._refuse(call._request_id, "failed", self._describe(call.op, error))

    def _describe(self, op: str, error: BaseException) -> str:
        log_failure(self, self.server.uri, op, error, is_cancelled=isinstance(error, asyncio.CancelledError))
        return describe(error)

    def _refuse(self, request_id: int, code: str, text: str) -> None:
        if not self.ended and request_id in self._pending:
            self._answer(request_id, self.session.error(request_id, code, text))

    def _answer(self, request_id: int, head: bytearray, out: Outgoing | None = None) -> None:
        del self._pending[request_id]
        self.cancelled.discard(request_id)
        self.pump.send(head, out)
        self._regulate()

    def _coding(self, flags: int) -> tuple[int, int | None]:
        return wanted_coding(self.wire.coder, flags, self.server._codec)


def _sequence(result: Any) -> Sequence[Any]:
    if isinstance(result, (tuple, list)):
        return result
    return () if result is None else (result,)


serve = Server
"""Serves: `await serve(uri, handlers, ...)`, or `async with serve(uri, handlers, ...) as server`; see Server."""
