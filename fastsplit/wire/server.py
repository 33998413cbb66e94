"""What both servers are: a listener, a service, and what a program may read of them.

Rules. `_lock` covers the set of clients, and what begins and ends the server; a signal may call `close` from inside any
other method, so that it is reentrant.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Self

from ..errors import ClosedError
from ..schema.limits import Limits
from ..system.forked import renew, watch
from ..system.threads import Workers
from .call import Call
from .listener import Listener
from .options import ServerOptions
from .service import Service
from .stats import Stats

__all__ = ["BaseServer"]


class BaseServer:
    """The base of both servers."""

    def __init__(
        self,
        uri: str,
        handlers: Mapping[str, Any],
        options: ServerOptions,
        *,
        coroutines: bool = False,
        call_type: type[Call] = Call,
    ) -> None:
        self._service = Service(handlers, options, coroutines=coroutines, call_type=call_type)
        self._listener = Listener(uri, insecure=options.insecure)
        self._service.uri = uri
        self._lock = threading.RLock()
        self._workers: Workers | None = None
        self._left: str | None = None  # in a forked child: why it cannot be used

    @property
    def uri(self) -> str:
        """Where the server listens; once started, with the real port."""
        return self._listener.uri

    @property
    def handlers(self) -> dict[str, Any]:
        """The handlers, by op. What is added here is served from then on."""
        return self._service.handlers

    @property
    def limits(self) -> Limits:
        """Caps on what is accepted from a client."""
        return self._service.options.limits

    @property
    def max_connections(self) -> int:
        """Clients at a time."""
        return self._service.options.max_connections

    @property
    def handshake_timeout_s(self) -> float:
        """Seconds that a client may take for its handshake."""
        return self._service.options.handshake_timeout_s

    @property
    def send_timeout_s(self) -> float:
        """Seconds that a client may take to read a reply."""
        return self._service.options.send_timeout_s

    @property
    def connections(self) -> int:
        """Number of clients that are connected."""
        return len(self._service.clients)

    @property
    def inflight(self) -> int:
        """Number of requests that have come in and have no answer yet, of all connections."""
        return sum(client.inflight for client in list(self._service.clients))

    @property
    def stats(self) -> Stats:
        """Counts of all connections since the server was made: a snapshot. `calls` are replies, `remote_s` is 0."""
        with self._lock:
            return self._service.stats()

    def bind(self) -> Self:
        """Takes the address, so that it is known to be free; clients queue until `start`. Returns the server.

        Raises ListenError if the address is in use, AddressError if it must not be listened on, ClosedError after
        `close` and in a forked child, ResourceError without a descriptor.
        """
        with self._lock:
            if self._service.closing:
                raise ClosedError(self._left or "the server was closed")
            if not self._listener.is_bound:
                self._listener.bind()
                self._service.uri = self._listener.uri
                watch(self)
        return self

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py."""
        renew(self._lock)
        self._left = why
        self._service.closing = True
        self._listener.leave()
        for client in self._service.clients:
            client.leave(why)
        self._service.clients = set()

    def _forget(self, client: Any) -> bool:
        """A client's connection has ended. False if that is known already."""
        with self._lock:
            return self._service.forget(client)
