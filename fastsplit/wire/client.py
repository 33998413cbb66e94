"""The client: what both fronts keep of a connection and of its calls.

`ClientCore` encodes requests, acts on the events of the session, and ends all calls when the connection ends. A front
(`blocking/`, `aio/`) moves the bytes and waits: it gives the core every event, and the core tells it what follows
through the few methods of `Front`. `ClientFront` holds the properties that both kinds of Channel have.

Rules. The core does no I/O, has no thread and no lock, and keeps no reference to its front. The front sees to it that
one thread at a time encodes (it holds `connection.sending`), one handles events, and one ends the connection. An event
may be handled again when handling it was interrupted. The first error that ends the connection stays; each call gets a
copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic, perf_counter_ns
from typing import Any, Protocol

from ..errors import ClosedError, FastsplitError, PeerLostError, ResourceError, TensorError, fresh
from ..printable import get_logger
from ..schema.coding import CAST_NAMES, CODEC_NAMES
from ..schema.header import reply_flags
from ..tensors import Desc, Outgoing
from .compression import Codec, parse_cast, parse_codec
from .connection import Connection
from .events import Attached, Error, Event, Failed, Goodbye, Hello, Probe, Reply, ReturnsWanted
from .options import ClientOptions, parse_timeout
from .result import Result, remote_error, why_closed
from .rules import PROBES
from .session import Session
from .stats import Stats
from .transport.meter import LinkEstimate

__all__ = ["UNSET", "Asked", "ClientCore", "ClientFront", "Front", "InFlight", "probe_sizes"]

_logger = get_logger("fastsplit.channel")

UNSET: Any = object()
"""The value of a call's `wire_dtype` or `codec` that was not given: the channel's holds."""

Asked = tuple[str, tuple[Any, ...], float | None, float | None, Any, Any, Any, Mapping[str, Any]]
"""A call's arguments, as a front hands them on: op, tensors, timeout_s, deadline, expect, wire_dtype, codec, attrs."""


class InFlight(Protocol):
    """What the core reads of a call in flight, which is an object of the front's."""

    op: str
    _sent_ns: int


class Front(Protocol):
    """What the core asks of the side that waits, in `ClientCore.handle`."""

    def settle(self, call: Any, result: Result | None, error: FastsplitError | None) -> None:
        """Gives a call in flight its outcome, unless it has one."""

    def failed(self, error: FastsplitError, *, tell: bool) -> None:
        """The connection cannot go on. `tell`: the peer does not know yet, and is to be told why."""

    def send_returns(self) -> None:
        """The server is short of shared memory: sends what goes back to it, if that is possible at once."""


def probe_sizes(nbytes: int) -> tuple[int, ...]:
    """The probes of one measurement, bytes each way. The answer to the last one says how fast the server received the
    one before."""
    return 0, nbytes, 0


class ClientCore:
    """A client's side of one connection."""

    connection: Connection
    session: Session
    """Both from `open` on."""

    def __init__(self, uri: str, options: ClientOptions) -> None:
        self.uri = uri
        self.options = options
        self.arrays = options.arrays
        self.cast: int = options.wire_dtype
        self.codec: Codec = options.codec
        self.flags = 0
        """Of a request that is coded as the channel says."""
        self.stats = Stats()
        self.calls: dict[int, Any] = {}
        """Calls in flight that have no outcome, by request id."""
        self.probes: set[int] = set()
        """Probes that have no answer and that the front waits for."""
        self.is_open = False
        """Whether there is a connection, which may have ended."""
        self.max_inflight = 0
        """Requests that the peer takes at a time."""
        self.has_hello = False
        self.on_attached: Callable[[str], None] | None = None
        """What to call with the server's answer to the ring; None if there is no ring or the answer is in."""
        self.error: FastsplitError | None = ClosedError("not open yet: await it, or use it in `async with`")
        self.closed = True
        """Whether the connection has ended, or was not opened."""
        self.refusing = True
        """Whether new calls are refused: closed, or about to be."""

    def open(self, connection: Connection) -> None:
        """The connection is made; the handshake comes next."""
        self.is_open = True
        self.connection = connection
        self.session = connection.session
        self.error = None
        self.closed = self.refusing = False

    # ---- requests ----

    @property
    def has_shm(self) -> bool:
        return self.connection.arena is not None

    @property
    def measures(self) -> bool:
        """Whether probes were agreed on."""
        return bool(self.session.capabilities & PROBES)

    def check_open(self) -> None:
        """Raises ClosedError if new calls are refused."""
        if self.refusing:
            raise ClosedError(why_closed(self.error))

    def check_connected(self) -> None:
        """Raises ClosedError if the connection has ended."""
        if self.closed:
            raise ClosedError(why_closed(self.error))

    def coding(self, wire_dtype: Any, codec: Any) -> tuple[int, Codec]:
        """The cast and the codec of a request, for its arguments; UNSET stands for the channel's.

        Raises SettingError for one that is unknown or was not agreed on, MissingExtraError.
        """
        if wire_dtype is UNSET and codec is UNSET:
            return self.cast, self.codec
        cast = self.cast if wire_dtype is UNSET else parse_cast(wire_dtype)
        number = self.codec if codec is UNSET else parse_codec(codec)
        if not self.has_shm:
            self.connection.coder.check(cast, number)
        return cast, number

    def check_coding(self) -> None:
        """After the handshake: raises SettingError if what the options ask for was not agreed on."""
        if not self.has_shm:
            self.connection.coder.check(self.cast, self.codec)
        self.code(self.cast, self.codec)

    def code(self, cast: int, codec: Codec) -> None:
        """Sets the channel's cast and codec, which are known to be possible."""
        self.cast, self.codec, self.flags = cast, codec, self._flags(cast, codec)

    def _flags(self, cast: int, codec: Codec) -> int:
        return reply_flags(cast, codec) if self.connection.can_code else 0

    def encode(
        self,
        op: str,
        out: Outgoing,
        attrs: Mapping[str, Any],
        left_s: float | None,
        expected: list[Desc] | None,
        cast: int,
        codec: Codec,
        started_ns: int,
    ) -> tuple[int, bytearray, int]:
        """A request's id, its frame's head, and when it was encoded; counts it.

        `left_s`: seconds to its deadline, None without one. `started_ns`: when its encoding began. The front sends it
        next, or discards it. Raises what Session.request does.
        """
        connection, stats = self.connection, self.stats
        time_ns = 0 if left_s is None else max(int(left_s * 1e9), 1)  # 0 says that there is no deadline
        flags = self._flags(cast, codec)
        request_id, head = self.session.request(
            op, out.descs, attrs, out.nbytes, time_ns, expected, out.placements, flags
        )
        encoded_ns = perf_counter_ns()
        stats.calls += 1
        stats.bytes_copied += out.copied_nbytes
        stats.serialization_s += (encoded_ns - started_ns) * 1e-9
        connection.lent_nbytes += out.shared_nbytes
        return request_id, head, encoded_ns

    def discard(self, request_id: int) -> None:
        """Forgets a request of which no byte was sent: the stream is as it was."""
        self.calls.pop(request_id, None)
        self.session.discard(request_id)

    def probe(self, nbytes: int) -> tuple[int, list[Any]]:
        """A probe's number and its frame, with bytes each way; `probes` holds the number until the answer is in."""
        number, frame = self.connection.probe(nbytes)
        self.probes.add(number)
        return number, frame

    # ---- what comes in ----

    def handle(self, event: Event, front: Front) -> None:
        """Acts on an event. Interrupted, it is called with the same event again."""
        if isinstance(event, Reply):
            request_id = event.request_id
            call = self.calls.get(request_id)
            if call is None:  # cancelled
                return
            started_ns = perf_counter_ns()
            try:
                result = Result.of(event, self.arrays, started_ns - call._sent_ns)
            except (ResourceError, TensorError) as error:
                front.settle(call, None, fresh(error))
            else:
                self.stats.remote_s += result.remote_s
                self.session.decode_ns += perf_counter_ns() - started_ns
                front.settle(call, result, None)
            self.calls.pop(request_id, None)
        else:
            self._handle_other(event, front)  # not here: a small method is entered sooner

    def _handle_other(self, event: Event, front: Front) -> None:
        if isinstance(event, Error):
            call = self.calls.get(event.request_id)
            if call is not None:
                front.settle(call, None, remote_error(call.op, event))
                self.calls.pop(event.request_id, None)
        elif isinstance(event, Hello):
            self.max_inflight = event.limits.max_inflight
            self.has_hello = True
        elif isinstance(event, Attached):
            if self.on_attached is not None:
                self.on_attached(event.text)
                self.on_attached = None
        elif isinstance(event, ReturnsWanted):
            front.send_returns()
        elif isinstance(event, Probe):
            meter = self.connection.meter
            if meter is not None and not meter.on_answer(event.number, event.bytes_per_s):
                _logger.debug("%s: an answer to probe %d, which was not asked for", self.uri, event.number)
            self.probes.discard(event.number)
        elif isinstance(event, Goodbye):
            front.failed(PeerLostError("the server closed the connection"), tell=False)
        elif isinstance(event, Failed):
            front.failed(event.error, tell=event.tell)

    def fail(self, error: FastsplitError, settle: Callable[[Any, None, FastsplitError], None]) -> FastsplitError:
        """Ends all calls in flight, and refuses new ones. `settle`: see Front. Returns the error that ended the
        connection first, to be raised."""
        if self.error is None:
            self.error = fresh(error)
        self.closed = self.refusing = True
        self.on_attached = None
        for call in list(self.calls.values()):
            settle(call, None, fresh(self.error))
        self.calls.clear()  # last: an interrupted `fail` is repeated
        return fresh(self.error)

    def raise_error(self) -> None:
        """Raises what has ended the connection, if anything has."""
        if self.error is not None:
            raise fresh(self.error)


class ClientFront:
    """The properties of a Channel of either kind."""

    _NAME = "Channel"
    _core: ClientCore

    def __init__(self, core: ClientCore) -> None:
        self._core = core
        self.uri = core.uri
        self._call_timeout_s = core.options.call_timeout_s

    def __repr__(self) -> str:
        return f"<{self._NAME} to {self.uri}, {'closed' if self.closed else 'open'}>"

    @property
    def _connected(self) -> ClientCore:
        """The core, which has a connection. Raises ClosedError before there is one."""
        if not self._core.is_open:
            self._core.check_open()
        return self._core

    @property
    def _connection(self) -> Connection:
        return self._connected.connection

    @property
    def _session(self) -> Session:
        return self._connection.session

    @property
    def closed(self) -> bool:
        """Whether the connection has ended, on either side, as far as this side has noticed."""
        return self._core.closed

    @property
    def stats(self) -> Stats:
        """Counts and times since the connection was made. The same object each time; its numbers go on growing."""
        core = self._core
        if core.is_open:
            core.connection.fill(core.stats)
        return core.stats

    @property
    def inflight(self) -> int:
        """Requests that have no answer yet, cancelled ones included."""
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
        """The type that float32 tensors travel as, None for float32. May be set at any time; a call may have its own.
        Setting raises SettingError for one that is unknown or that the server does not know."""
        return CAST_NAMES.get(self._core.cast)

    @wire_dtype.setter
    def wire_dtype(self, wire_dtype: str | None) -> None:
        self._core.code(*self._connected.coding(wire_dtype, UNSET))

    @property
    def codec(self) -> str:
        """How tensors are compressed: "auto", "off" or a name. May be set at any time; a call may have its own. Setting
        raises SettingError for one that is unknown or that the server does not know, MissingExtraError."""
        codec = self._core.codec
        return "auto" if codec is None else CODEC_NAMES.get(codec, "off")

    @codec.setter
    def codec(self, codec: str) -> None:
        self._core.code(*self._connected.coding(UNSET, codec))

    @property
    def link(self) -> LinkEstimate:
        """What is known of the link: measured when the connection was made, and as calls go on. All None where memory
        is shared, and on unix sockets."""
        return self._connection.estimate

    @property
    def near(self) -> bool:
        """Whether the peer is on this host, as far as can be said: on a unix socket, or on a loopback address unless no
        round trip took less than 2 ms, as through a relay."""
        return self._connection.is_near

    @property
    def call_timeout_s(self) -> float | None:
        """Seconds for each call that has no `timeout_s` of its own, None for no deadline. May be set at any time."""
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

    def trim(self) -> int:
        """Gives shared memory that is not in use back to the system. Returns its bytes.

        What has not been used for half a minute goes back without this, as calls go on.
        """
        arena = self._connection.arena
        return 0 if arena is None else arena.trim(0.0)
