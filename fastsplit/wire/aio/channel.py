"""The client on an event loop: many calls in flight, none of which has a thread, and none of which blocks the loop.

How waiting works. A call that finds as many requests in flight as the server takes, or too many bytes before it in the
queue, waits for its turn, in order; its tensors are described, and copied if they must be, when that comes. Then it
waits for its reply. Waiting for either counts into its deadline.

Rules. A call that is given up (its task is cancelled, or its deadline passes) costs nobody else anything: not a byte of
it was sent, and it is forgotten; or it goes on to be sent, a CANCEL follows, and its answer is dropped when it comes.
Whatever else goes wrong in sending or reading ends the connection, and every call in flight gets the error.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from time import perf_counter_ns
from typing import Any

from ... import tensors
from ...errors import (
    ArenaFull,
    ClosedError,
    DeadlineError,
    FastsplitError,
    PeerLostError,
    ResourceError,
    TensorError,
    fresh,
)
from ...schema.attrs import call_attrs
from ...schema.coding import CAST_NAMES, CODEC_NAMES
from ...schema.header import reply_flags
from ...schema.limits import Limits, parse_limits
from ...system.forked import watch
from ...system.threads import Workers
from ...tensors import Arrays, Outgoing, nbytes_of, parse_expect
from ...tensors.pool import Pool, pool
from ..compression import THRESHOLD_NBYTES, parse_cast, parse_codec
from ..connection import Connection
from ..events import Attached, Error, Event, Goodbye, Hello, Probe, Reply, ReturnsWanted
from ..future import CallTimeout, Result, remote_error, warn_of_discarded, why_closed
from ..options import _parse_hook, _parse_pool, parse_count, parse_timeout
from ..outbox import Frame
from ..rules import PROBES
from ..shm.segment import Hook
from ..stats import Stats
from ..transport.address import parse_address
from ..transport.meter import HANDSHAKE_PADDING_NBYTES, LinkEstimate
from ..transport.scheme import Address, End
from .pump import AT_ONCE, Pump
from .waiting import settle_left, within

__all__ = ["MAX_QUEUED_NBYTES", "Channel", "connect"]

MAX_QUEUED_NBYTES = 64 * 1024**2
_LINGER_S = 0.5  # how long an aborted peer's bytes are read and dropped, so that it can read why
_UNSET: Any = object()


class _Call:
    """A request in flight, and who waits for its reply."""

    __slots__ = ("decoded_ns", "frame", "future", "op", "request_id", "sent_ns", "timeout_s", "timer")

    def __init__(self, op: str, request_id: int, timeout_s: float | None, future: asyncio.Future[Result]) -> None:
        self.op = op
        self.request_id = request_id
        self.timeout_s = timeout_s
        self.future = future
        self.frame: Frame | None = None
        self.timer: asyncio.Handle | None = None
        self.sent_ns = self.decoded_ns = 0


class Channel(CallTimeout):
    """A connection to a server, on an event loop. `fastsplit.aio.connect` is this class.

    To be opened by `await connect(uri)` or `async with connect(uri) as channel`, and closed by `await channel.close()`.
    Options: as for fastsplit.Channel, but for those about threads. `max_queued_nbytes`: how many bytes may wait for the
    server to read them; calls wait before they add to more. One request may have more than that by itself.
    Connecting takes a thread for that moment, since names are resolved by the system; nothing else does.

    Opening raises AddressError, ConnectError if nobody listens there, DeadlineError if there is no handshake in time,
    and RemoteProtocolError if what listens there is no fastsplit.
    """

    def __init__(
        self,
        uri: str,
        *,
        arrays: str | Arrays = "auto",
        timeout_s: float = 10.0,
        call_timeout_s: float | None = 300.0,
        limits: Limits | None = None,
        pool: Pool = pool,
        on_segment: Hook | None = None,
        max_queued_nbytes: int = MAX_QUEUED_NBYTES,
        wire_dtype: str | None = None,
        codec: str = "auto",
        codec_threshold_nbytes: int = THRESHOLD_NBYTES,
    ) -> None:
        timeout_s = parse_timeout("timeout_s", timeout_s)
        self.uri = uri
        self.call_timeout_s = call_timeout_s
        self.max_queued_nbytes = parse_count("max_queued_nbytes", max_queued_nbytes, 1)
        self._arrays = tensors.parse_arrays(arrays)
        self._cast, self._codec = parse_cast(wire_dtype), parse_codec(codec)
        self._address = parse_address(uri)
        self._timeout_s = timeout_s
        self._limits = parse_limits(limits)
        self._pool, self._on_segment = _parse_pool("pool", pool), _parse_hook("on_segment", on_segment)
        self._codec_threshold_nbytes = parse_count("codec_threshold_nbytes", codec_threshold_nbytes, 1)
        self._stats = Stats()
        self._encode_ns = 0  # and what is made of replies
        self._calls: dict[int, _Call] = {}
        self._waiting: deque[tuple[int, asyncio.Future[bool]]] = deque()  # calls that wait for their turn; their bytes
        self._reserved = self._reserved_nbytes = 0  # calls whose turn it is, and that have not taken it yet
        self._error: FastsplitError | None = ClosedError("not open yet: await it, or use it in `async with`")
        self._opened = False
        self._refusing = False  # about to be closed
        self._steps: deque[asyncio.Future[bool]] = deque()  # of the handshake
        self._answered: Any = None
        self._probes: dict[int, asyncio.Future[bool]] = {}
        self._pump: Pump
        self._connection: Connection

    # ---- opening and closing ----

    def __await__(self) -> Generator[Any, None, Channel]:
        return self._open().__await__()

    async def __aenter__(self) -> Channel:
        return self if self._opened else await self._open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __getattr__(self, name: str) -> Any:
        """Attributes that exist only once the channel is open."""
        if name in ("_connection", "_pump", "_session"):
            raise ClosedError(why_closed(self._error))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<aio.Channel to {self.uri}, {'closed' if self.closed else 'open'}>"

    async def _open(self) -> Channel:
        if self._opened:
            raise ClosedError("a channel is opened once")
        self._opened = True
        deadline = time.monotonic() + self._timeout_s
        end = await _connect(self._address, self._timeout_s)
        connection = self._connection = Connection(
            end,
            self._address,
            is_client=True,
            limits=self._limits,
            spin_us=0.0,
            pool=self._pool,
            on_memory_pressure=self._on_memory_pressure,
            hook=self._on_segment,
            codec_threshold_nbytes=self._codec_threshold_nbytes,
        )
        pump = self._pump = Pump(connection, self)
        watch(self)
        self._session = connection.session
        self._error = None
        try:
            pump.start()
            pump.send(self._session.hello())
            await self._step(deadline)
            if not pump.outbox.idle:  # what follows must not overtake the HELLO
                raise PeerLostError(f"{self.uri}: the server did not read the handshake")
            self._answered = connection.offer_ring(AT_ONCE)  # some hundred bytes: there is room for them
            if self._answered is not None:
                await self._step(deadline)
            if not self.shm:
                connection.coder.check(self._cast, self._codec)
            if self._session.capabilities & PROBES:
                await self._measure(HANDSHAKE_PADDING_NBYTES, deadline)
        except DeadlineError:
            self._end(ClosedError("the handshake failed"))
            raise DeadlineError(f"{self.uri}: connected, but no handshake within {self._timeout_s} s") from None
        except BaseException:
            self._end(ClosedError("the handshake failed"), at_once=not pump.ended)
            await asyncio.shield(pump.closed)  # the server is reading what it did wrong
            raise
        return self

    def _on_memory_pressure(self, deadline: float | None) -> None:
        self._pump.memory.on_memory_pressure(deadline)

    async def _step(self, deadline: float) -> None:
        """Waits for the next event of the handshake."""
        future: asyncio.Future[bool] = self._pump.loop.create_future()
        self._steps.append(future)
        if not await within(future, deadline):
            raise DeadlineError("no handshake")
        if self._error is not None:
            raise fresh(self._error)

    def _stepped(self) -> None:
        while self._steps:
            future = self._steps.popleft()
            if not future.done():
                future.set_result(True)

    async def close(self, drain_s: float = 0.0) -> None:
        """Ends the connection: the server is told, and calls in flight fail with ClosedError. Idempotent.

        `drain_s`: seconds to wait for the replies of calls in flight; meanwhile new calls are refused. Calls still in
        flight after that are discarded; a warning gives their number for each operation.
        """
        drain_s = parse_timeout("drain_s", drain_s)
        if not self._opened:
            self._opened = True
            self._error = ClosedError("the channel was closed")
            return
        if "_pump" not in self.__dict__:  # it could not be opened
            return
        if self._error is None:
            self._refusing = True
            futures = [call.future for call in self._calls.values()]
            if drain_s and futures:
                await asyncio.wait(futures, timeout=drain_s)
        if self._error is None:
            discarded = [call.op for call in self._calls.values()]
            self._pump.goodbye()
            self._end(ClosedError("the channel was closed"))
            warn_of_discarded(self.uri, discarded)
        await asyncio.shield(self._pump.closed)  # after an abort, not at once

    def leave(self, why: str) -> None:
        """For a forked child: see forked.py."""
        if self._error is None:
            self._error = ClosedError(why)
        self._pump.leave(why)
        for call in self._calls.values():
            settle_left(call.future, fresh(self._error))
        self._calls.clear()
        for future in (*(future for _, future in self._waiting), *self._steps, *self._probes.values()):
            settle_left(future)

    # ---- what is known ----

    @property
    def closed(self) -> bool:
        """Whether the connection has ended, on either side, as far as this side has noticed."""
        return self._error is not None

    @property
    def stats(self) -> Stats:
        """Counts and times since the connection was made. The same object each time; its numbers go on growing.

        `wait_s` adds up all calls; of those that are in flight together, too.
        """
        if "_connection" in self.__dict__:
            self._connection.fill(self._stats)
            self._stats.serialization_s = (self._encode_ns + self._session.decode_ns) * 1e-9
        return self._stats

    @property
    def inflight(self) -> int:
        """Requests that have no answer yet; those that were given up, too."""
        return self._session.inflight

    @property
    def shm(self) -> bool:
        """Whether tensors cross in shared memory on this connection."""
        return self._connection.arena is not None

    @property
    def shm_reason(self) -> str:
        """Which shared memory is used, or why none is; for people to read."""
        return self._connection.shm_reason

    @property
    def wire_dtype(self) -> str | None:
        """What float32 tensors travel as, None for what they are; a call may say otherwise."""
        return CAST_NAMES.get(self._cast)

    @property
    def codec(self) -> str:
        """How tensors are compressed: "auto", "off" or a name; a call may say otherwise."""
        return "auto" if self._codec is None else CODEC_NAMES.get(self._codec, "off")

    @property
    def link(self) -> LinkEstimate:
        """What is known of the link's speed. Nothing where memory is shared, and on unix sockets."""
        return self._connection.estimate

    # ---- memory ----

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32") -> Any:
        """A tensor of undefined content, in the memory that this link sends from fastest; the caller's own.

        As fastsplit.Channel.empty, but it never waits: see `allocate`. Raises TensorError for another dtype and for a
        shape that no array can have, ArenaFull if there is no room now.
        """
        return self._arrays.empty(shape, dtype, lambda nbytes: self._connection.allocate(nbytes, AT_ONCE))

    async def allocate(
        self, shape: int | Sequence[int], dtype: Any = "float32", *, timeout_s: float | None = None
    ) -> Any:
        """As `empty`, but waits for room, for `timeout_s` seconds, the channel's `call_timeout_s` if None."""
        deadline = self._deadline(timeout_s)[1]
        return await allocate(self._pump, self._arrays, shape, dtype, deadline)

    def trim(self) -> int:
        """Gives shared memory that is not in use back to the system. Returns its bytes."""
        arena = self._connection.arena
        return 0 if arena is None else arena.trim(0.0)

    # ---- calls ----

    async def call(
        self,
        op: str,
        /,
        *tensors: Any,
        timeout_s: float | None = None,
        expect: Sequence[tuple[Any, Sequence[int]]] | None = None,
        wire_dtype: str | None = _UNSET,
        codec: str = _UNSET,
        attrs: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> Result:
        """Runs `op` on the server and returns the tensors of its reply: writable, the caller's own.

        Arguments and errors are those of fastsplit.Channel.call. Any number of calls may be in flight: those that are
        more than the server takes wait for their turn. The tensors must not change until the call returns; and if its
        task is cancelled, or its deadline passes, those of a request that is half sent are read until all of it is.
        """
        named = keywords if attrs is None else call_attrs(attrs, keywords)
        call = await self._start(op, tensors, timeout_s, expect, wire_dtype, codec, named)
        try:
            return await call.future
        except BaseException:
            self._give_up(call)
            raise
        finally:
            if call.timer is not None:
                call.timer.cancel()
            del call  # else an error keeps this frame, and with it the future, which keeps the error: and tensors

    async def _start(
        self,
        op: str,
        tensors: tuple[Any, ...],
        timeout_s: float | None,
        expect: Sequence[tuple[Any, Sequence[int]]] | None,
        wire_dtype: str | None,
        codec: str,
        attrs: dict[str, Any],
    ) -> _Call:
        started_ns = perf_counter_ns()
        self._check_open()
        timeout_s, deadline = self._deadline(timeout_s)
        cast, number = self._coding(wire_dtype, codec)
        expected = parse_expect(expect)
        sizes = [nbytes_of(tensor) for tensor in tensors]
        nbytes = 0 if self.shm else sum(sizes)
        waited_ns = 0
        try:
            if self._waiting or not self._has_room(nbytes):
                waited_ns -= perf_counter_ns()
                await self._turn(op, nbytes, timeout_s, deadline)
                waited_ns += perf_counter_ns()
            again = False
            while True:
                try:
                    out = self._connection.prepare(op, tensors, AT_ONCE, cast, number)
                    break
                except ArenaFull as full:
                    self._check_open()
                    self._let_in()  # while this one waits, others may have what they need
                    waited_ns -= perf_counter_ns()
                    if not await self._pump.memory.wait(full, deadline, again=again):
                        self._check_open()
                        raise
                    again = True
                    if self._waiting or not self._has_room(nbytes):
                        await self._turn(op, nbytes, timeout_s, deadline, first=True)
                    waited_ns += perf_counter_ns()
            if again:
                self._pump.memory.wake()
            return self._request(op, out, timeout_s, deadline, expected, cast, number, attrs, started_ns + waited_ns)
        except BaseException:
            self._let_in()
            raise

    def _request(
        self,
        op: str,
        out: Outgoing,
        timeout_s: float | None,
        deadline: float | None,
        expected: Any,
        cast: int,
        codec: int | None,
        attrs: dict[str, Any],
        started_ns: int,
    ) -> _Call:
        pump, connection, session = self._pump, self._connection, self._session
        pump.queue_control_frames()
        if connection.is_probe_due and pump.outbox.idle:
            pump.send_filled(connection.probe(0)[1])
        time_ns = 0 if deadline is None else max(int((deadline - time.monotonic()) * 1e9), 1)
        flags = reply_flags(cast, codec) if connection.can_code else 0
        request_id, head = session.request(op, out.descs, attrs, out.nbytes, time_ns, expected, out.placements, flags)
        call = _Call(op, request_id, timeout_s, pump.loop.create_future())
        self._calls[request_id] = call
        if deadline is not None:
            call.timer = pump.loop.call_later(max(deadline - time.monotonic(), 0.0), self._expire, call)
        stats = self._stats
        stats.calls += 1
        stats.bytes_copied += out.copied_nbytes
        connection.lent_nbytes += out.shared_nbytes
        call.decoded_ns = session.decode_ns
        call.sent_ns = perf_counter_ns()
        self._encode_ns += call.sent_ns - started_ns
        if connection.arena is not None:
            connection.arena.lend(out.placements)
        call.frame = pump.send(head, out)
        return call

    def _check_open(self) -> None:
        if self._error is not None or self._refusing:
            raise ClosedError(why_closed(self._error))

    def _coding(self, wire_dtype: Any, codec: Any) -> tuple[int, int | None]:
        cast = self._cast if wire_dtype is _UNSET else parse_cast(wire_dtype)
        number = self._codec if codec is _UNSET else parse_codec(codec)
        if not self.shm:
            self._connection.coder.check(cast, number)
        return cast, number

    # ---- turns ----

    def _has_room(self, nbytes: int) -> bool:
        limits = self._session.peer_limits
        queued_nbytes = self._pump.outbox.queued_nbytes + self._reserved_nbytes
        return (
            limits is not None
            and self._session.inflight + self._reserved < limits.max_inflight
            and (not queued_nbytes or queued_nbytes + nbytes <= self.max_queued_nbytes)
        )

    async def _turn(
        self, op: str, nbytes: int, timeout_s: float | None, deadline: float | None, *, first: bool = False
    ) -> None:
        """Waits for the turn of a call that has `nbytes` to send. `first`: it had its turn already."""
        future: asyncio.Future[bool] = self._pump.loop.create_future()
        entry = (nbytes, future)
        if first:
            self._waiting.appendleft(entry)
        else:
            self._waiting.append(entry)
        if first:
            self._let_in()
        try:
            in_time = await within(future, deadline)
        finally:
            if future.done() and not future.cancelled() and future.result():
                self._reserved -= 1
                self._reserved_nbytes -= nbytes
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(entry)
        self._check_open()
        if not in_time:
            raise DeadlineError(f"{op}: not sent within {timeout_s} s, since other calls were")

    def _let_in(self) -> None:
        """Gives their turn to the calls that there is room for, in order."""
        while self._waiting:
            nbytes, future = self._waiting[0]
            if not future.done():
                if not self._has_room(nbytes):
                    return
                self._reserved += 1
                self._reserved_nbytes += nbytes
                future.set_result(True)
            self._waiting.popleft()

    # ---- giving up ----

    def _expire(self, call: _Call) -> None:
        unsent = self._give_up(call)
        if not call.future.done():
            what = "not sent within" if unsent else "no reply within its deadline of"
            call.future.set_exception(DeadlineError(f"{call.op}: {what} {call.timeout_s} s"))

    def _give_up(self, call: _Call) -> bool:
        """Nobody waits for a call any more. Returns whether not a byte of it was sent."""
        if self._calls.pop(call.request_id, None) is None or call.frame is None:
            return False
        pump, session = self._pump, self._session
        unsent = pump.outbox.discard(call.frame, call.request_id)
        if not unsent and session.mark_cancelled(call.request_id) and not pump.loop.is_closed():
            pump.send(session.cancel(call.request_id))
        self._let_in()
        return unsent

    # ---- what comes in ----

    def handle(self, event: Event) -> None:
        """For the pump."""
        if isinstance(event, Reply):
            self._take_reply(event)
        elif isinstance(event, Error):
            call = self._calls.pop(event.request_id, None)
            if call is not None and not call.future.done():
                call.future.set_exception(remote_error(call.op, event))
        elif isinstance(event, Hello):
            self._stepped()
        elif isinstance(event, Attached):
            answered, self._answered = self._answered, None
            if answered is not None:
                answered(event.text)
                if not event.text:
                    self._pump.use_ring()
                self._stepped()
        elif isinstance(event, ReturnsWanted):
            self._pump.send_returns()
        elif isinstance(event, Probe):
            meter = self._connection.meter
            if meter is not None:
                meter.on_answer(event.number, event.bytes_per_s)
            waiter = self._probes.pop(event.number, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(True)
        elif isinstance(event, Goodbye):
            self._end(PeerLostError("the server closed the connection"))

    def _take_reply(self, event: Reply) -> None:
        call = self._calls.pop(event.request_id, None)
        if call is None or call.future.done():
            return
        started_ns = perf_counter_ns()
        decoded_ns = self._session.decode_ns - call.decoded_ns
        try:
            result = Result.of(event, self._arrays, max(started_ns - call.sent_ns - decoded_ns, 0))
        except (ResourceError, TensorError) as error:
            call.future.set_exception(fresh(error))
            return
        stats = self._stats
        stats.remote_s += result.remote_s
        stats.wait_s += result.wait_s
        self._encode_ns += perf_counter_ns() - started_ns
        call.future.set_result(result)

    def progressed(self) -> None:
        """For the pump."""
        if self._waiting:
            self._let_in()

    async def _measure(self, nbytes: int, deadline: float) -> None:
        for size in (0, nbytes, 0):  # the last answer says how fast the second one's bytes came in there
            number, buffers = self._connection.probe(size)
            future = self._probes[number] = self._pump.loop.create_future()
            self._pump.send_filled(buffers)
            if not await within(future, deadline):
                raise DeadlineError("the link was not measured: no answer")
            if self._error is not None:
                raise fresh(self._error)

    # ---- ending ----

    def failed(self, error: FastsplitError, *, tell: bool) -> None:
        """For the pump."""
        if tell:
            self._pump.abort(error, _LINGER_S)
        self._end(error, at_once=not tell)

    def _end(self, error: FastsplitError, *, at_once: bool = True) -> None:
        """Nothing can be called any more, and every call gets the error; the first error stays."""
        if self._error is None:
            self._error = fresh(error)
        self._answered = None
        if at_once:
            self._pump.close()
        calls = list(self._calls.values())
        self._calls.clear()
        for call in calls:
            if not call.future.done():
                call.future.set_exception(fresh(self._error))
        waiting, self._waiting = self._waiting, deque()
        for _, future in waiting:
            if not future.done():
                future.set_result(False)
        self._stepped()
        for waiter in self._probes.values():
            if not waiter.done():
                waiter.set_result(True)


async def allocate(pump: Pump, arrays: Arrays, shape: Any, dtype: Any, deadline: float | None) -> Any:
    """A tensor in the memory that a connection sends from fastest, as soon as there is room. Raises ArenaFull."""
    again = False
    while True:
        try:
            tensor = arrays.empty(shape, dtype, lambda nbytes: pump.connection.allocate(nbytes, AT_ONCE))
        except ArenaFull as full:
            if not await pump.memory.wait(full, deadline, again=again):
                raise
            again = True
        else:
            if again:
                pump.memory.wake()
            return tensor


async def _connect(address: Address, timeout_s: float) -> End:
    """A connected end, by a thread of its own. Raises what `Address.connect` does."""
    loop = asyncio.get_running_loop()
    connected: asyncio.Future[End] = loop.create_future()

    def connect() -> None:
        try:
            end = address.connect(timeout_s)
        except BaseException as error:  # noqa: BLE001 (it is the task's)
            tell(None, error)
        else:
            if not tell(end, None):
                end.close()

    def tell(end: End | None, error: BaseException | None) -> bool:
        try:
            loop.call_soon_threadsafe(settle, end, error)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def settle(end: End | None, error: BaseException | None) -> None:
        if error is not None and not connected.done():
            connected.set_exception(error)
        elif end is not None and not connected.done():
            connected.set_result(end)
        elif end is not None:  # nobody waits any more
            end.close()

    workers = Workers(1, "fastsplit-connect")
    workers.submit(connect)
    workers.shutdown(wait=False)
    return await connected


connect = Channel
"""Connects to a server: `await connect(uri, ...)`, or `async with connect(uri, ...) as channel`; see Channel."""
