"""What a handler sees of a request: the Call, and the Client that makes it; and the check of handlers.

The same for both servers.

Rules. A Call belongs to its handler for as long as that runs. A Client lives as long as its connection; a
handler that stores it keeps it longer.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import SettingError, shown
from ..system.forked import renew
from ..system.threads import call_safely
from .transport.base import remaining_s

if TYPE_CHECKING:
    from .service import ServiceCore

__all__ = ["Call", "Client", "Handler", "Served", "describe", "is_coroutine", "parse_handlers"]


class Served(Protocol):
    """What a Call asks the front about its client."""

    @property
    def core(self) -> ServiceCore: ...

    def memory_deadline(self, deadline: float | None) -> float:
        """Until when this thread may wait for memory for a reply that the client awaits until `deadline`."""

    def is_cancelled(self, request_id: int) -> bool:
        """Whether the client has cancelled this request. Reads what has arrived first, if no other thread reads."""

    def has_left(self) -> bool:
        """Whether the client has left, or can get no more answers. Takes a system call."""


class Call:
    """One request, as its handler sees it.

    `op`: the operation's name. `tensors`: torch tensors or numpy arrays, writable, the handler's own for as long as it
    keeps them. `attrs`: the request's attributes, the handler's own. `reply_attrs`: attributes for the reply,
    of the types that Channel.call takes.
    """

    __slots__ = ("_deadline", "_flags", "_request_id", "_served", "attrs", "op", "reply_attrs", "tensors")

    def __init__(
        self,
        served: Served,
        request_id: int,
        op: str,
        tensors: tuple[Any, ...],
        attrs: dict[str, Any],
        deadline: float | None,
        flags: int = 0,
    ) -> None:
        self.op = op
        self.tensors = tensors
        self.attrs = attrs
        self.reply_attrs: dict[str, Any] = {}
        self._served = served
        self._request_id = request_id
        self._deadline = deadline
        self._flags = flags

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32") -> Any:
        """A tensor of undefined content in the memory that replies are sent from fastest, for the handler to return.

        Where memory is shared it lies there. Waits for room as long as the caller does for its reply; in the thread of
        an event loop it never waits. Raises TensorError for a dtype or a shape that no tensor has, ArenaFull.
        """
        served = self._served
        deadline, connection = served.memory_deadline(self._deadline), served.core.connection
        return served.core.arrays.empty(shape, dtype, lambda nbytes: connection.allocate(nbytes, deadline))

    @property
    def client(self) -> Client:
        """The caller: the same object for all calls of one connection."""
        return self._served.core.client

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the caller stops waiting, at least 0; None if it has no deadline."""
        return remaining_s(self._deadline)

    @property
    def cancelled(self) -> bool:
        """Whether the caller has cancelled the call, its deadline has passed, or its connection has ended.

        A long handler may ask now and then, in its own thread: it takes some microseconds.

        If no other thread reads, this reads what the client has sent; requests among it are queued. (Nothing more is
        read once `max_inflight` of them are queued, or 256 MiB of their tensors.) A plain function on the loop of
        fastsplit.aio sees only the deadline and the connection's end: no CANCEL is read before it returns.
        """
        served = self._served
        return (
            served.is_cancelled(self._request_id) or self.remaining_s == 0.0 or served.core.ended or served.has_left()
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
        """For a forked child: see system/forked.py. The parent's connection goes on, so that no callback runs here."""
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


def describe(error: BaseException) -> str:
    """A handler's error, as the text of the answer to its caller."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001 (its own __str__ fails)
        return type(error).__name__
