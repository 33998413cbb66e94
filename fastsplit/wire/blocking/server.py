"""The blocking server: it accepts clients; each has a thread of its own, which runs handlers (served.py).

Rules. One client's failure touches no other. The accept thread never waits for a client. `close` lets handlers answer,
and then ends their connections.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Mapping
from typing import Unpack

from ...errors import ClosedError, ResourceError
from ...system.forked import renew
from ...system.shortage import start, why
from ...system.stops import Stops
from ...system.threads import Workers
from ..call import Call, Client, Handler
from ..compression import Coder
from ..listener import PAUSE_S
from ..options import BlockingServerKeywords, BlockingServerOptions, documented, parse_timeout
from ..server import BaseServer
from ..transport.spin import cores
from .served import ServedClient

__all__ = ["Call", "Client", "Handler", "Server"]

_LOOK_S = 0.5  # how often the main thread wakes, to run the handler of a signal that another thread received


@documented(BlockingServerOptions)
class Server(BaseServer):
    """Serves `handlers` (op name -> function of a `Call`) on `uri`.

    A handler returns a tensor, a sequence of tensors, or None. Use `serve_forever`, or `start` and `close`, or `with`.
    """

    def __init__(self, uri: str, handlers: Mapping[str, Handler], **options: Unpack[BlockingServerKeywords]) -> None:
        parsed = BlockingServerOptions.of(options)
        super().__init__(uri, handlers, parsed)
        # While the pool's threads work, a reader that spins would only take the interpreter from them.
        self._spin_us = 0.0 if parsed.workers else parsed.spin_us
        # As soon as clients are as many as cores, a core that spins for one of them is taken from another.
        self._max_spinning = max(cores(), 2) - 1
        self._wake: tuple[int, int] | None = None
        self._accepting: threading.Thread | None = None
        self._closed = threading.Event()

    @property
    def started(self) -> bool:
        """Whether `start` was called."""
        return self._accepting is not None

    def start(self) -> Server:
        """Listens, and accepts clients in the background from now on. Returns the server. Raises what `bind` does."""
        with self._lock:
            if self.started and not self._service.closing:
                raise ClosedError("the server was started already")
            self.bind()
            try:
                self._listener.hold_descriptor()
                Coder.capabilities()  # looks for codecs now: when a client comes there may be no descriptor left
                self._wake = _pipe()
                thread = threading.Thread(target=self._accept, name=f"fastsplit-accept {self.uri}", daemon=True)
                if self._service.options.workers:
                    self._workers = Workers(self._service.options.workers, "fastsplit-worker")
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
                if self._listener.is_bound:  # else it may be started again
                    self.close()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stops listening, lets running handlers answer for at most `timeout_s` seconds, and ends all connections.

        Idempotent. A handler that takes longer goes on in its thread, but its answer has nowhere to go.
        """
        timeout_s = parse_timeout("timeout_s", timeout_s)
        with self._lock:
            first = not self._service.closing
            self._service.closing = True
        if not first:  # in another thread, as a rule
            self._closed.wait(timeout_s)
            return
        if not self._listener.is_bound:
            self._closed.set()
            return
        if self._accepting is not None and self._wake is not None:
            os.write(self._wake[1], b"x")
            self._accepting.join()
        self._close_wake()
        self._listener.close()
        deadline = time.monotonic() + timeout_s
        clients: list[ServedClient] = list(self._service.clients)
        for client in clients:
            client.connection.transport.shutdown_reading()
        others = [client for client in clients if client.thread is not threading.current_thread()]
        for client in others:  # a handler that closes its server gets to answer first
            client.thread.join(max(deadline - time.monotonic(), 0.0))
        for client in others:
            if client.thread.is_alive():
                client.connection.transport.shutdown()
                client.thread.join(0.1)
        if self._workers is not None:
            self._workers.shutdown(wait=False)
        self._closed.set()

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py."""
        renew(self._closed)
        super().leave(why)
        self._closed.set()
        self._close_wake()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Server on {self.uri}, {self.connections} connections>"

    def _close_wake(self) -> None:
        wake, self._wake = self._wake, None
        for end in wake or ():
            os.close(end)

    def _accept(self) -> None:
        assert self._wake is not None
        wake = self._wake[0]
        poll = select.poll()
        poll.register(self._listener.fileno(), select.POLLIN)
        poll.register(wake, select.POLLIN)
        while not self._service.closing:
            ready = {fd for fd, _ in poll.poll()}
            if wake in ready:
                return
            self._accept_one()

    def _accept_one(self) -> None:
        """Accepts one client, or refuses it. Not in the loop, whose locals would hold it until the next one comes."""
        try:
            came = self._listener.accept()
        except OSError as error:  # out of descriptors, a stranger: neither is a reason to stop serving
            self._service.log_not_accepted(why(error))
            time.sleep(PAUSE_S)
            return
        if came is None:
            return
        end, shortage = came
        client = ServedClient(self, end)
        with self._lock:
            refusal = self._service.admit(client, shortage)
        if refusal is None:
            try:
                start(client.thread)
                return
            except ResourceError as error:
                self._service.log_not_accepted(str(error))
                self._forget(client)
                refusal = ResourceError(f"the server has {error}")
        client.refuse(refusal)
        self._listener.restore()


def _pipe() -> tuple[int, int]:
    try:
        return os.pipe()
    except OSError as error:
        raise ResourceError(f"a pipe: {why(error)}") from None
