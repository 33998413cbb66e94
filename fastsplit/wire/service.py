"""What a server decides and counts, for its clients and their requests. No thread, no lock, no clock of its own.

`Service` is what the clients of a server have in common; a `ServiceCore` belongs to one client. The fronts (blocking,
aio) wait, and run handlers: they read events, ask the core about each, and send the frames that it makes.

    a request has come in        admit       it is in flight from now on; or the client breaks the protocol
    it is to run                 begin       its Call, or the Refusal that answers it
    its handler has returned     prepare     the result's tensors, ready to be sent
    its reply is sent            reply       the frame's head; what the statistics count
    or it has failed             failure     the log, and the Refusal that answers it
                                 error       the frame of a Refusal
    the answer is sent           done
    any other event              take, cancel
    the connection has ended     end         the log

Rules. Every request is answered exactly once. A handler's exception is an answer (ERROR), never the end of a
connection. A peer that breaks the protocol gets an ABORT that says how, and its connection ends. An exception of a
handler is logged: a FastsplitError, which says what is wrong with a request, in one line (WARNING), so that no client
can fill a log; any other with its traceback (ERROR).

Two steps may wait, until the deadline that the front gives: `prepare` for room in shared memory, and `attach_ring` for
the client to read the answer. Calls of one core must not overlap where they change the same thing: a front whose
handlers run in several threads holds a lock of its own for the table (`admit`, `cancel`, `done`), and one for what is
sent (`reply`, `error`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from ..errors import (
    CancelledError,
    ConnectError,
    DeadlineError,
    FastsplitError,
    PeerLostError,
    RemoteProtocolError,
    ResourceError,
    fresh,
)
from ..printable import get_logger
from ..schema.header import wanted_reply
from ..system.threads import is_interrupt
from ..tensors import Outgoing
from .call import Call, Client, Served, describe, parse_handlers
from .connection import Connection
from .events import Event, Failed, Goodbye, Probe, Request, ReturnsWanted, RingOffered
from .options import ServerOptions
from .stats import Stats
from .transport.address import Address
from .transport.scheme import End

__all__ = ["CLOSING", "Front", "Refusal", "Service", "ServiceCore", "tensors_nbytes"]

_logger = get_logger("fastsplit.server")


class Refusal(NamedTuple):
    """What an ERROR frame says: `code` is failed, unknown-op, deadline or cancelled."""

    code: str
    text: str


CLOSING = Refusal("failed", "the server is closing")


class Front(Protocol):
    """What a front does about an event that concerns no request."""

    def attach_ring(self, event: RingOffered) -> None:
        """Maps the client's ring and answers; see `ServiceCore.attach_ring`."""

    def send_returns(self) -> None:
        """Sends all returns that wait: the client is short of memory."""

    def answer_probe(self, probe: Probe) -> None:
        """Sends the answer to a probe, soon."""


class Service:
    """What a server's clients have in common: handlers, options, counts. `clients`: those that were admitted.

    `call_type`: what handlers get. `now`: the clock that deadlines are compared with.
    """

    def __init__(
        self,
        handlers: Mapping[str, Any],
        options: ServerOptions,
        *,
        coroutines: bool = False,
        call_type: type[Call] = Call,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.handlers: dict[str, Any] = parse_handlers(handlers, coroutines=coroutines)
        self.options = options
        self.uri = ""
        """Where the server listens, for the log."""
        self.closing = False
        """Whether the server closes: what ends now is not logged."""
        self.clients: set[Any] = set()
        self.call_type = call_type
        self.now = now
        self._past = Stats()  # of connections that have ended

    def make_connection(
        self, end: End, address: Address, on_memory_pressure: Callable[[float | None], None]
    ) -> Connection:
        """The server's end of an accepted connection, with the server's options. Raises ResourceError."""
        return Connection(
            end, address, self.options, is_client=False, spin_us=0.0, on_memory_pressure=on_memory_pressure
        )

    def admit(self, client: Any, shortage: ResourceError | None = None) -> FastsplitError | None:
        """Adds a client to `clients`; or returns why it must be refused. `shortage`: what the server has run out of."""
        if shortage is not None:
            self.log_not_accepted(str(shortage))
            return shortage
        limit = self.options.max_connections
        if len(self.clients) >= limit:
            return ConnectError(f"{limit} connections already, the server accepts no more")
        self.clients.add(client)
        return None

    def forget(self, client: Any) -> bool:
        """A client's connection has ended: its counts become part of the totals. False if that was done already."""
        if client not in self.clients:
            return False
        self.clients.discard(client)
        self._past.add(client.core.stats())
        return True

    def log_not_accepted(self, reason: str) -> None:
        """Logs why a connection failed before the server could decide about it."""
        _logger.warning("%s: a connection was not accepted: %s", self.uri, reason)

    def stats(self) -> Stats:
        """The totals of all connections, ended ones included."""
        total = Stats().add(self._past)
        for client in list(self.clients):
            total.add(client.core.stats())
        return total

    def unknown_op(self) -> Refusal:
        """The answer to an op without a handler."""
        known = ", ".join(sorted(self.handlers)) or "none"
        return Refusal("unknown-op", f"no such operation here; there are: {known}")


class ServiceCore:
    """What a server decides and counts for one client."""

    def __init__(self, service: Service, connection: Connection) -> None:
        self.service = service
        self.connection = connection
        self.session = connection.session
        self.client = Client()
        self.arrays = service.options.arrays
        self.ended = False
        """Whether the client gets no more answers."""
        self.cancelled: set[int] = set()
        """Requests that the client has cancelled, and that have no answer yet."""
        self.pending: dict[int, Any] = {}
        """Requests that were admitted and whose answers are not sent; what a front keeps of each."""
        self.answered: set[int] = set()
        """Pending requests whose answer is being sent. They no longer count as in flight: it may have been read."""
        self._stats = Stats()
        self._handlers = service.handlers
        self._call_type = service.call_type
        self._view = service.options.arrays.view
        self._codec = service.options.codec
        self._now = service.now

    @property
    def inflight(self) -> int:
        """Admitted requests that have no answer yet."""
        return len(self.pending) - len(self.answered)

    def stats(self) -> Stats:
        """Counts of this connection so far."""
        self.connection.fill(self._stats)
        return self._stats

    def reply_deadline(self, deadline: float | None) -> float:
        """Until when to try to send a reply that the client awaits until `deadline`."""
        return self._now() + self.service.options.send_timeout_s if deadline is None else deadline

    # ---- requests ----

    def admit(self, request_id: int, kept: Any = None) -> None:
        """Counts a request as in flight. `kept`: what stands in `pending`. Raises RemoteProtocolError."""
        if request_id in self.pending:
            raise RemoteProtocolError(f"header, request_id: {request_id}, which is in flight already")
        inflight, limit = self.inflight, self.service.options.limits.max_inflight
        if inflight >= limit:
            raise RemoteProtocolError(f"{inflight + 1} requests in flight, expected at most {limit}")
        self.pending[request_id] = kept

    def cancel(self, request_id: int, *, is_here: bool = False) -> bool:
        """Notes a CANCEL. `is_here`: the request waits or runs without being in `pending`. False if the request is not
        here; a later request with this id is not affected."""
        if is_here or request_id in self.pending:
            self.cancelled.add(request_id)
            return True
        self.cancelled.discard(request_id)
        return False

    def done(self, request_id: int) -> None:
        """The answer to a request is sent, or never will be."""
        self.pending.pop(request_id, None)
        self.answered.discard(request_id)
        self.cancelled.discard(request_id)

    def begin(self, served: Served, request: Request, deadline: float | None) -> Call | Refusal:
        """The call of a request that is to run now, or why it does not run. Takes the request's buffers."""
        request_id, message = request.request_id, request.message
        op = message.op
        if request_id in self.cancelled:
            self.cancelled.discard(request_id)
            return Refusal("cancelled", "cancelled before it ran")
        if deadline is not None and self._now() >= deadline:
            return Refusal("deadline", "its deadline passed before it ran")
        if request.refusal is not None:
            return Refusal("failed", describe(request.refusal))
        if op not in self._handlers:
            return self.service.unknown_op()
        buffers = request.buffers
        try:
            tensors = tuple(map(self._view, buffers, message.tensors))
        except Exception as error:  # noqa: BLE001 (of a dtype that these arrays do not have, for example)
            return self.failure(served, op, error)
        call = self._call_type(served, request_id, op, tensors, message.attrs or {}, deadline, request.flags)
        buffers.clear()
        return call

    def prepare(self, call: Call, result: Any, deadline: float) -> Outgoing:
        """What is needed to send a handler's result: a tensor, a list or tuple of tensors, or None.

        The call's own tensors are released: those that are not in the result are returned with this very reply. Raises
        TensorError, LimitError, ArenaFull at the deadline.
        """
        call.tensors = ()
        if not isinstance(result, (tuple, list)):
            result = () if result is None else (result,)
        connection, flags = self.connection, call._flags
        if not flags:
            return connection.prepare(call.op, result, deadline, 0, self._codec)
        cast, codec = wanted_reply(flags)
        accepted = connection.coder.accepted
        if cast and cast << 4 not in accepted:
            cast = 0  # a number that this version does not know; what is not cast is right, too
        if codec is None or (codec and codec not in accepted):
            codec = self._codec
        return connection.prepare(call.op, result, deadline, cast, codec)

    def reply(self, call: Call, out: Outgoing, time_ns: int) -> bytearray:
        """A reply's head, which is sent next, with the buffers of `out`. Lends its tensors, and counts it.

        `time_ns`: of the handler. Raises LimitError and SettingError for attributes that cannot travel; then nothing
        has changed.
        """
        request_id, connection = call._request_id, self.connection
        head = self.session.reply(request_id, out.descs, out.nbytes, time_ns, call.reply_attrs, out.placements)
        if connection.arena is not None:
            connection.arena.lend(out.placements)
        stats = self._stats
        stats.calls += 1
        stats.bytes_copied += out.copied_nbytes
        connection.lent_nbytes += out.shared_nbytes
        if request_id in self.pending:
            self.answered.add(request_id)
        return head

    def error(self, request_id: int, refusal: Refusal) -> bytearray:
        """The frame of a refusal, which is sent next."""
        frame = self.session.error(request_id, *refusal)
        if request_id in self.pending:
            self.answered.add(request_id)
        return frame

    def failure(self, served: Served, op: str, error: BaseException, *, is_cancelled: bool = False) -> Refusal:
        """Logs by the module's rules that a handler has failed. Returns the answer.

        The level is DEBUG if the caller has left or cancelled the call, or the program ends. `is_cancelled`: the error
        is asyncio's CancelledError.
        """
        level, trace = logging.ERROR, error if not isinstance(error, FastsplitError) else None
        if is_cancelled or is_interrupt(error) or isinstance(error, CancelledError):
            level = logging.DEBUG
        elif isinstance(error, FastsplitError):
            is_about_the_caller = isinstance(error, PeerLostError) and (self.ended or served.has_left())
            level = logging.DEBUG if is_about_the_caller else logging.WARNING
        text = describe(error)
        if _logger.isEnabledFor(level):
            uri, peer = self.service.uri, self.connection.transport.peer_name()
            _logger.log(level, "%s: the handler of %r failed for %s: %s", uri, op, peer, text, exc_info=trace)
        return Refusal("failed", text)

    # ---- other events ----

    def take(self, event: Event, front: Front) -> bool:
        """Acts on an event that concerns no request. False if it is the client's last.

        Raises what ended the connection: RemoteProtocolError or ResourceError if the client does not know of it,
        PeerLostError if it does.
        """
        if isinstance(event, ReturnsWanted):
            front.send_returns()
        elif isinstance(event, Probe):
            meter = self.connection.meter
            if meter is not None:
                meter.on_probe(event.bytes_per_s, event.rtt_s)
                front.answer_probe(event)
        elif isinstance(event, RingOffered):
            front.attach_ring(event)
        elif isinstance(event, Goodbye):
            self.ended = True
            return False
        elif isinstance(event, Failed):
            raise fresh(event.error) if event.tell else PeerLostError(str(event.error))
        return True

    def attach_ring(self, event: RingOffered, deadline: float, *, is_idle: bool) -> None:
        """Has the connection go on through the client's ring. `is_idle`: no request is in flight, and nothing waits to
        be sent. Raises RemoteProtocolError, PeerLostError."""
        if not is_idle:
            raise RemoteProtocolError("SEGMENT, id: 0, expected before any request")
        try:
            self.connection.attach_ring(event, deadline)
        except DeadlineError:
            raise PeerLostError("the client did not read the handshake") from None

    # ---- the end ----

    def no_handshake(self) -> RemoteProtocolError:
        """Why a client that sends no HELLO is refused."""
        return RemoteProtocolError(f"no handshake within {self.service.options.handshake_timeout_s} s")

    def ended_by(self, error: FastsplitError, *, tell: bool) -> FastsplitError | None:
        """What ended the connection, for `end`: None if the client has only left, between frames and with every request
        answered. `tell`: whether the client gets an ABORT for the error; else the client has sent one, or is lost."""
        if isinstance(error, RemoteProtocolError) and not tell:
            error = PeerLostError(str(error))
        has_left = isinstance(error, PeerLostError) and self.session.at_frame_boundary and not self.session.aborted
        return None if has_left and not self.inflight else error

    def end_stream(self) -> None:
        """The client has closed its stream, or this server has stopped reading it.

        Raises PeerLostError in the middle of a frame.
        """
        if not self.session.at_frame_boundary:
            raise self.session.end_of_stream()  # not by a local variable: frame and error would be a cycle
        self.session.end_of_stream()
        self.ended = not self.service.closing

    def end(self, error: FastsplitError | None) -> None:
        """The connection has ended. `error`: why, None if one side said goodbye; it is logged unless the server closes.

        The level is WARNING, and DEBUG for a client that left before the handshake: it only looked whether the server
        is there.
        """
        self.ended = True
        if error is None or self.service.closing:
            return
        is_known = self.session.peer_limits is not None or isinstance(error, (RemoteProtocolError, ResourceError))
        # The error's text, not the error: a record that is kept would keep its frames, and the shared memory in them.
        _logger.log(
            logging.WARNING if is_known else logging.DEBUG,
            "%s: a connection ended: %s",
            self.service.uri,
            str(error),
        )

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py."""
        self.ended = True
        self.client.leave()
        self.connection.leave(why)


def tensors_nbytes(request: Request) -> int:
    """Bytes of a request's tensors, wherever they are."""
    return sum(desc.nbytes for desc in request.message.tensors)
