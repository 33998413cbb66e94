"""The client on an event loop: many calls in flight, none of which has a thread, and none of which blocks the loop.

A channel is made of the core (client.py), which has no I/O; the calls (calls.py), which wait in turn and for their
replies; and the pump (pump.py), which moves the bytes.

Rules. Everything but connecting runs in the loop's thread. Arguments, results and errors are those of the blocking
Channel: what both have is explained there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Unpack

from ...errors import ArenaFull, ClosedError, DeadlineError, PeerLostError
from ...schema.attrs import call_attrs
from ...system.forked import watch
from ...system.threads import Workers
from ...tensors import Arrays
from ..client import UNSET, ClientCore, ClientFront
from ..connection import Connection
from ..options import AioClientKeywords, AioClientOptions, documented, parse_count, parse_timeout
from ..result import Result, warn_of_discarded
from ..rules import MAX_PADDING_NBYTES
from ..stats import Stats
from ..transport.address import parse_address
from ..transport.meter import HANDSHAKE_PADDING_NBYTES, LinkEstimate
from ..transport.scheme import Address, End
from .calls import Calls
from .pump import AT_ONCE, Pump

__all__ = ["Channel", "allocate", "connect"]


@documented(AioClientOptions)
class Channel(ClientFront):
    """A connection to a server, on an event loop. `fastsplit.aio.connect` is this class.

    To be opened by `await connect(uri)` or `async with connect(uri) as channel`, and closed by `await channel.close()`.
    As fastsplit.Channel, except that it has no threads: there is no `overlap`, since bytes travel whenever the loop
    runs, and no `spin_us`, since a loop that spun would hold up all its other tasks. Connecting takes a thread for that
    moment, since names are resolved by the system.

    Opening raises AddressError, ConnectError if no server listens there, DeadlineError if there is no handshake in
    time, and RemoteProtocolError if what listens there is no fastsplit.
    """

    _NAME = "aio.Channel"

    def __init__(self, uri: str, **options: Unpack[AioClientKeywords]) -> None:
        chosen = self._options = AioClientOptions.of(options)
        core = ClientCore(uri, chosen)
        super().__init__(core)
        self._address = parse_address(uri)
        self._calls = Calls(core)
        self._opened = False
        self._counted_ns = 0  # of the session's decoding, in the statistics

    # ---- opening and closing ----

    def __await__(self) -> Generator[Any, None, Channel]:
        return self._open().__await__()

    async def __aenter__(self) -> Channel:
        return self if self._opened else await self._open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _open(self) -> Channel:
        if self._opened:
            raise ClosedError("a channel is opened once")
        self._opened = True
        chosen, calls = self._options, self._calls
        deadline = time.monotonic() + chosen.timeout_s
        end = await _connect(self._address, chosen.timeout_s)
        connection = Connection(
            end,
            self._address,
            chosen,
            is_client=True,
            spin_us=0.0,
            on_memory_pressure=calls.on_memory_pressure,
        )
        pump = calls.open(connection, chosen.max_queued_nbytes)
        watch(calls)
        try:
            await self._shake_hands(deadline)
        except DeadlineError:
            calls.end(ClosedError("the handshake failed"))
            raise DeadlineError(f"{self.uri}: connected, but no handshake within {chosen.timeout_s} s") from None
        except BaseException:
            calls.end(ClosedError("the handshake failed"), at_once=not pump.ended)
            await asyncio.shield(pump.closed)  # the server is reading what it did wrong
            raise
        return self

    async def _shake_hands(self, deadline: float) -> None:
        core, calls, pump = self._core, self._calls, self._calls.pump
        pump.start()
        pump.send(core.session.hello())
        await calls.until(lambda: core.has_hello, deadline, "no handshake")
        if not pump.outbox.idle:  # what follows must not overtake the HELLO
            raise PeerLostError(f"{self.uri}: the server did not read the handshake")
        core.on_attached = core.connection.offer_ring(AT_ONCE)  # some hundred bytes: there is room for them
        if core.on_attached is not None:
            await calls.until(lambda: core.on_attached is None, deadline, "no handshake")
            pump.use_ring()
        core.check_coding()
        if core.measures:
            await calls.measure(HANDSHAKE_PADDING_NBYTES, deadline)

    async def close(self, drain_s: float = 0.0) -> None:
        """Ends the connection: the server is told, and calls in flight fail with ClosedError. Idempotent.

        `drain_s`: seconds to wait for the replies of calls in flight; meanwhile new calls are refused. Calls still in
        flight after that are discarded; a warning gives their number for each operation.
        """
        drain_s = parse_timeout("drain_s", drain_s)
        core = self._core
        if not core.is_open:
            if not self._opened:
                self._opened = True
                core.error = ClosedError("the channel was closed")
            return
        pump = self._calls.pump
        if not core.closed:
            core.refusing = True
            futures = [call.future for call in core.calls.values()]
            if drain_s and futures:
                await asyncio.wait(futures, timeout=drain_s)
        if not core.closed:
            discarded = [call.op for call in core.calls.values()]
            pump.goodbye()
            self._calls.end(ClosedError("the channel was closed"))
            warn_of_discarded(self.uri, discarded)
        await asyncio.shield(pump.closed)  # after an abort, not at once

    # ---- what is known ----

    @property
    def _pump(self) -> Pump:
        if not self._core.is_open:
            self._core.check_open()
        return self._calls.pump

    @property
    def max_queued_nbytes(self) -> int:
        """Bytes that may wait for the server to read them, before calls wait."""
        return self._options.max_queued_nbytes

    @property
    def stats(self) -> Stats:
        """As fastsplit.Channel.stats, except that `wait_s` adds up all calls, those in flight together included."""
        core = self._core
        if core.is_open:
            decode_ns = core.session.decode_ns
            core.stats.serialization_s += (decode_ns - self._counted_ns) * 1e-9
            self._counted_ns = decode_ns
        return super().stats

    async def measure(self, nbytes: int = 1024**2, timeout_s: float = 10.0) -> LinkEstimate:
        """As fastsplit.Channel.measure: measures the link now, `nbytes` each way, and returns what `link` says then."""
        nbytes = parse_count("nbytes", nbytes, 0, MAX_PADDING_NBYTES)
        deadline = time.monotonic() + parse_timeout("timeout_s", timeout_s)
        self._core.check_connected()
        if self._core.measures:
            await self._calls.measure(nbytes, deadline)
        return self.link

    # ---- memory ----

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32") -> Any:
        """A tensor of undefined content, in the memory that this link sends from fastest; the caller's own.

        As fastsplit.Channel.empty, but it never waits: see `allocate`. Raises TensorError for another dtype and for a
        shape that no array can have, ArenaFull if there is no room now.
        """
        return self._core.arrays.empty(shape, dtype, lambda nbytes: self._connection.allocate(nbytes, AT_ONCE))

    async def allocate(
        self, shape: int | Sequence[int], dtype: Any = "float32", *, timeout_s: float | None = None
    ) -> Any:
        """As `empty`, but waits for room, for `timeout_s` seconds, the channel's `call_timeout_s` if None."""
        deadline = self._deadline(timeout_s)[1]
        return await allocate(self._pump, self._core.arrays, shape, dtype, deadline)

    # ---- calls ----

    async def call(
        self,
        op: str,
        /,
        *tensors: Any,
        timeout_s: float | None = None,
        expect: Sequence[tuple[Any, Sequence[int]]] | None = None,
        wire_dtype: str | None = UNSET,
        codec: str = UNSET,
        attrs: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> Result:
        """Runs `op` on the server and returns the tensors of its reply: writable, the caller's own.

        Arguments and errors are those of fastsplit.Channel.call. Any number of calls may be in flight: those that are
        more than the server takes wait for their turn. The tensors must not change until the call returns. If it ends
        while its request is half sent (cancelled, or at its deadline), they are still read until all of it is sent.
        """
        named = keywords if attrs is None else call_attrs(attrs, keywords)
        asked = (op, tensors, *self._deadline(timeout_s), expect, wire_dtype, codec, named)
        return await self._calls.run(asked)

    def submit(
        self,
        op: str,
        /,
        *tensors: Any,
        timeout_s: float | None = None,
        expect: Sequence[tuple[Any, Sequence[int]]] | None = None,
        wire_dtype: str | None = UNSET,
        codec: str = UNSET,
        attrs: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> asyncio.Task[Result]:
        """Begins a call, and returns its task at once: an asyncio.Future of the Result, to be awaited now or later.

        Requests are sent in the order of `submit`, when the loop next runs. The channel keeps the task alive while it
        waits. Cancelling the task cancels the call. The tensors must not change until the task is done.

        To be called in the loop's thread. Raises ClosedError, and SettingError for a timeout or attributes that cannot
        be; everything else that `call` raises the task raises.
        """
        loop = asyncio.get_running_loop()
        self._core.check_open()
        named = keywords if attrs is None else call_attrs(attrs, keywords)
        asked = (op, tensors, *self._deadline(timeout_s), expect, wire_dtype, codec, named)
        return loop.create_task(self._calls.run(asked), name=f"fastsplit {op}")


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
        elif end is not None:  # the task was cancelled
            end.close()

    workers = Workers(1, "fastsplit-connect")
    workers.submit(connect)
    workers.shutdown(wait=False)
    return await connected


connect = Channel
"""Connects to a server: `await connect(uri, ...)`, or `async with connect(uri, ...) as channel`; see Channel."""
