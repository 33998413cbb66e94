"""What a handler sees of a request: the Call, and the Client that makes it; the check of handlers, and the log of their
failures. The same for both servers.

Rules. A Call belongs to its handler for as long as that runs; a Client lives as long as its connection, and longer if
somebody keeps it. An exception of a handler is logged: a FastsplitError, which says what is wrong with a request, in
one line (WARNING), so that no client can fill a log; any other with its traceback (ERROR).
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ..errors import CancelledError, ConnectError, FastsplitError, PeerLostError, SettingError, shown
from ..printable import get_logger
from ..schema.header import wanted_reply
from ..system.forked import renew
from ..system.threads import call_safely, is_interrupt
from ..tensors import Arrays
from .compression import Coder
from .connection import Connection
from .events import Request
from .transport.base import remaining_s

__all__ = [
    "Call",
    "Caller",
    "Client",
    "Handler",
    "describe",
    "is_coroutine",
    "log_failure",
    "parse_handlers",
    "tensors_nbytes",
    "too_many",
    "wanted_coding",
]

_logger = get_logger("fastsplit.server")


class Caller(Protocol):
    """What a Call needs to know of its connection."""

    wire: Connection
    client: Client
    ended: bool
    """Whether nobody waits for answers any more."""

    @property
    def arrays(self) -> Arrays: ...

    def reply_deadline(self, deadline: float | None) -> float:
        """Until when a reply is worth waiting for, where the client waits until `deadline`."""

    def is_cancelled(self, request_id: int) -> bool:
        """Whether the client has given this request up. Reads what has arrived first, if no other thread reads."""

    def has_left(self) -> bool:
        """Whether the client has left, or can get no more answers. Takes a system call."""


class Call:
    """One request, as its handler sees it.

    `op`: the operation's name. `tensors`: torch tensors or numpy arrays, writable, the handler's own for as long as it
    keeps them. `attrs`: the request's attributes, the handler's own. `reply_attrs`: attributes for the reply,
    of the types that Channel.call takes.
    """

    __slots__ = ("_connection", "_deadline", "_request_id", "attrs", "op", "reply_attrs", "tensors")

    def __init__(
        self,
        connection: Caller,
        request_id: int,
        op: str,
        tensors: tuple[Any, ...],
        attrs: dict[str, Any],
        deadline: float | None,
    ) -> None:
        self.op = op
        self.tensors = tensors
        self.attrs = attrs
        self.reply_attrs: dict[str, Any] = {}
        self._connection = connection
        self._request_id = request_id
        self._deadline = deadline

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32") -> Any:
        """A tensor of undefined content in the memory that replies are sent from fastest, for the handler to return.

        Where memory is shared it lies there. Waits for room as long as the caller does for its reply. Raises
        TensorError for a dtype or a shape that no tensor has, ArenaFull.
        """
        connection = self._connection
        deadline = connection.reply_deadline(self._deadline)
        return connection.arrays.empty(shape, dtype, lambda nbytes: connection.wire.allocate(nbytes, deadline))

    @property
    def client(self) -> Client:
        """Who calls: the same object for all calls of one connection."""
        return self._connection.client

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the caller gives up, at least 0; None if it never does."""
        return remaining_s(self._deadline)

    @property
    def cancelled(self) -> bool:
        """Whether the caller has given up, its deadline has passed, or its connection has ended. A long handler may ask
        now and then, in its own thread: it takes some microseconds.

        If no other thread reads, this reads what the client has sent; requests among it are queued. (Nothing more is
        read once `max_inflight` of them are queued, or 256 MiB of their tensors.) A plain function on the loop of
        fastsplit.aio sees only the deadline and the connection's end: no CANCEL is read before it returns.
        """
        connection = self._connection
        return (
            connection.is_cancelled(self._request_id)
            or self.remaining_s == 0.0
            or connection.ended
            or connection.has_left()
        )


class Client:
    """One connection, as a handler sees it: something to keep state by. Hashable, thread-safe."""

    __slots__ = ("__weakref__", "_callbacks", "_ended", "_lock")

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], object]] = []
        self._ended = False
        self._lock = threading.RLock()  # a finalizer may need it in the middle of it

    @property
    def ended(self) -> bool:
        """Whether the connection has ended; a handler may still be at work for it."""
        return self._ended

    def on_end(self, callback: Callable[[], object]) -> None:
        """Runs `callback` when the connection has ended, at once if it has already. It must not block."""
        with self._lock:
            if not self._ended:
                self._callbacks.append(callback)
                return
        callback()

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            call_safely("what was to run at a connection's end", callback)

    def leave(self) -> None:
        """For a forked child, where the connection's end is nobody's business."""
        renew(self._lock)
        self._ended = True
        self._callbacks = []


Handler = Callable[[Call], Any]


def parse_handlers(handlers: Any, *, coroutines: bool) -> dict[str, Any]:
    """The argument `handlers`, checked: op names and functions. `coroutines`: whether they may be coroutine functions.

    Raises SettingError.
    """
    if not isinstance(handlers, Mapping):
        raise SettingError(f"handlers: {shown(handlers)}, expected a mapping of op names to functions of a Call")
    for op, handler in handlers.items():
        if not isinstance(op, str) or not op:
            raise SettingError(f"handlers: an op named {shown(op)}, expected a string that is not empty")
        if not callable(handler):
            raise SettingError(f"handlers, {op!r}: {shown(handler)}, expected a function of a Call")
        if _is(inspect.isasyncgenfunction, handler):
            raise SettingError(f"handlers, {op!r}: an async generator function, expected one that returns its result")
        if not coroutines and is_coroutine(handler):
            raise SettingError(
                f"handlers, {op!r}: a coroutine function, expected a plain one; fastsplit.aio.serve takes both"
            )
    return dict(handlers)


def is_coroutine(handler: Any) -> bool:
    """Whether a handler is a coroutine function, or something that is called like one."""
    return _is(inspect.iscoroutinefunction, handler)


def _is(kind: Callable[[Any], bool], handler: Any) -> bool:
    while isinstance(handler, functools.partial):
        handler = handler.func
    return kind(handler) or kind(type(handler).__call__)


def log_failure(connection: Caller, uri: str, op: str, error: BaseException, *, is_cancelled: bool = False) -> None:
    """Logs that a handler has failed, by the module's rules.

    At level DEBUG if the caller has left or cancelled, or the program ends. `is_cancelled`: the error is asyncio's
    CancelledError.
    """
    level, trace = logging.ERROR, error if not isinstance(error, FastsplitError) else None
    if is_cancelled or is_interrupt(error) or isinstance(error, CancelledError):
        level = logging.DEBUG
    elif isinstance(error, FastsplitError):
        is_about_the_caller = isinstance(error, PeerLostError) and (connection.ended or connection.has_left())
        level = logging.DEBUG if is_about_the_caller else logging.WARNING
    if _logger.isEnabledFor(level):
        peer, text = connection.wire.transport.peer_name(), "%s: the handler of %r failed for %s: %s"
        _logger.log(level, text, uri, op, peer, describe(error), exc_info=trace)


def too_many(max_connections: int) -> ConnectError:
    """Why a server refuses a client."""
    return ConnectError(f"{max_connections} connections already, the server accepts no more")


def wanted_coding(coder: Coder, flags: int, own_codec: int | None) -> tuple[int, int | None]:
    """The cast and the codec of a reply: as the request's flags want it, else the server's own codec."""
    cast, codec = wanted_reply(flags)
    if cast and cast << 4 not in coder.accepted:
        cast = 0  # a number that this version does not know; what is not cast is right, too
    if codec and codec not in coder.accepted:
        codec = None
    return cast, own_codec if codec is None else codec


def tensors_nbytes(request: Request) -> int:
    """Bytes of a request's tensors, wherever they are."""
    return sum(desc.nbytes for desc in request.message.tensors)


def describe(error: BaseException) -> str:
    """A handler's error, as its caller is told."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001 (its own __str__ fails)
        return type(error).__name__
