"""The server on an event loop: one thread for all clients; handlers that wait do not keep others waiting.

Rules. As in blocking/server.py: one client's failure touches no other, and `close` lets handlers answer. Handlers in
workers excepted, everything runs in the loop's thread, and nothing blocks it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any, Unpack

from ...errors import ClosedError
from ...system.shortage import why
from ...system.stops import LoopStops
from ...system.threads import Workers
from ..compression import Coder
from ..listener import PAUSE_S
from ..options import AioServerKeywords, AioServerOptions, documented, parse_timeout
from ..server import BaseServer
from .requests import Call
from .served import LINGER_S, ServedClient
from .waiting import settle_left

__all__ = ["Call", "Handler", "Server", "serve"]

_MAX_ACCEPTED = 64  # in one turn of the loop
_UNWIND_S = 1.0  # how long cancelled tasks may take to clean up, where the server closes

Handler = Callable[[Call], Any] | Callable[[Call], Awaitable[Any]]


@documented(AioServerOptions)
class Server(BaseServer):
    """Serves `handlers` (op name -> function or coroutine function of a `Call`) on `uri`. It is `fastsplit.aio.serve`.

    To be started by `await serve(...)` or `async with serve(...) as server`; then `await server.serve_forever()`, if
    there is nothing else to do, and `await server.close()`.
    """

    def __init__(self, uri: str, handlers: Mapping[str, Handler], **options: Unpack[AioServerKeywords]) -> None:
        self._options = AioServerOptions.of(options)
        super().__init__(uri, handlers, self._options, coroutines=True, call_type=Call)
        self._ending: set[asyncio.Future[bool]] = set()  # of connections that are read out before they are closed
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Handle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed: asyncio.Future[bool] | None = None

    def __await__(self) -> Generator[Any, None, Server]:
        return self.start().__await__()

    async def __aenter__(self) -> Server:
        return self if self.started and self._left is None else await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<aio.Server on {self.uri}, {self.connections} connections>"

    @property
    def max_queued_nbytes(self) -> int:
        """Bytes of replies, and of requests for plain handlers, that may wait before a client is read no further."""
        return self._options.max_queued_nbytes

    @property
    def started(self) -> bool:
        """Whether it was started."""
        return self._loop is not None

    async def start(self) -> Server:
        """Listens, and accepts clients from now on. Returns the server.

        Raises ListenError if the address is in use, AddressError if it must not be listened on, ClosedError after
        `close`, ResourceError without a descriptor or a thread.
        """
        if self.started or self._service.closing:
            state = "closed" if self._service.closing else "started already"
            raise ClosedError(self._left or f"the server was {state}")
        loop = asyncio.get_running_loop()
        workers = None
        try:
            self._listener.hold_descriptor()
            Coder.capabilities()  # looks for codecs now: when a client comes there may be no descriptor left
            if self._options.workers:
                workers = Workers(self._options.workers, "fastsplit-worker")
            self.bind()
        except BaseException:
            self._listener.release_descriptor()
            if workers is not None:
                workers.shutdown(wait=False)
            raise
        self._workers = workers
        self._loop, self._closed = loop, loop.create_future()
        loop.add_reader(self._listener.fileno(), self._accept)
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
        first = not self._service.closing
        self._service.closing = True
        if self._loop is None or self._closed is None:
            self._listener.close()
            return
        if not first:
            await asyncio.shield(self._closed)
            return
        try:
            if self._accepting is not None:
                self._accepting.cancel()
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            deadline = time.monotonic() + timeout_s
            clients: list[ServedClient] = list(self._service.clients)
            for client in clients:
                client.stop_reading()
            for client in clients:
                await client.drained(deadline)
        finally:
            for client in list(self._service.clients):
                client.finish()
            if self._workers is not None:
                self._workers.shutdown(wait=False)
            try:
                tasks = self._tasks - {asyncio.current_task()}  # a handler that closes its server answers no more
                if tasks:
                    await asyncio.wait(tasks, timeout=_UNWIND_S)
                if self._ending:
                    await asyncio.wait(self._ending, timeout=LINGER_S)
            finally:
                if not self._closed.done():
                    self._closed.set_result(True)

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py. The loop's selector is the parent's, too, and stays as it is."""
        super().leave(why)
        if self._closed is not None:
            settle_left(self._closed)

    def _accept(self) -> None:
        """Accepts the clients that wait, or refuses them."""
        assert self._loop is not None
        self._accepting = None
        for _ in range(_MAX_ACCEPTED):
            try:
                came = self._listener.accept()
            except OSError as error:  # out of descriptors, a stranger: neither is a reason to stop serving
                self._service.log_not_accepted(why(error))
                self._loop.remove_reader(self._listener.fileno())
                self._accepting = self._loop.call_later(PAUSE_S, self._accept_again)
                return
            if came is None:
                return
            end, shortage = came
            client = ServedClient(self, end)
            with self._lock:
                refusal = self._service.admit(client, shortage)
            if refusal is None:
                client.start()
            else:
                client.refuse(refusal)
                self._listener.restore()

    def _accept_again(self) -> None:
        assert self._loop is not None
        self._loop.add_reader(self._listener.fileno(), self._accept)
        self._accept()

    def _forget(self, client: ServedClient) -> bool:
        if not super()._forget(client):
            return False
        closed = client.pump.closed
        if not closed.done():
            self._ending.add(closed)
            closed.add_done_callback(self._ending.discard)
        return True


serve = Server
"""Serves: `await serve(uri, handlers, ...)`, or `async with serve(uri, handlers, ...) as server`; see Server."""
