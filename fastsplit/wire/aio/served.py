"""One client of the asyncio server: from its handshake to its end.

Rules. Reading goes on while handlers are at work, so that a CANCEL and the client's end are seen; it stops while the
client does not read its replies, or has sent more than the plain handlers can keep up with. The connection's end is
known once, from the pump, from the client or from the server, and everything follows from `_end`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ...errors import FastsplitError
from ...system.threads import only_one
from ..events import Cancel, Event, Probe, Request, RingOffered
from ..service import ServiceCore
from ..shm.arena import IDLE_S
from ..transport.scheme import End
from .pump import AT_ONCE, Pump
from .requests import Requests
from .waiting import within

if TYPE_CHECKING:
    from .server import Server

__all__ = ["LINGER_S", "ServedClient"]

LINGER_S = 1.0
"""How long an aborted peer's bytes are read and dropped, so that it can read why."""


class ServedClient:
    """One client: its connection, and its requests."""

    def __init__(self, server: Server, end: End) -> None:
        service, options = server._service, server._options
        self.connection = service.make_connection(end, server._listener.address, self._on_memory_pressure)
        self.core = ServiceCore(service, self.connection)
        self.pump = Pump(self.connection, self, send_timeout_s=options.send_timeout_s)
        self._server = server
        self._options = options
        self._requests = Requests(self.core, self.pump, server._workers, server._tasks, self._regulate)
        self._stopped = self._has_ended = False
        self._draining: asyncio.Future[bool] | None = None
        self._timer: asyncio.Handle | None = None  # for the handshake, then for looking after unused memory
        self._calls_before = 0  # when the timer looked last

    def _on_memory_pressure(self, deadline: float | None) -> None:
        self.pump.memory.on_memory_pressure(deadline)

    def start(self) -> None:
        """Begins with the handshake."""
        self._timer = self.pump.loop.call_later(self._options.handshake_timeout_s, self._look_for_handshake)
        self.connection.serves_in(*only_one(self._server._workers))
        self.pump.start()
        self.pump.send(self.core.session.hello())

    def refuse(self, reason: FastsplitError) -> None:
        """Says why, and closes at once, since others wait to be accepted. Instead of `start`."""
        self.pump.start()
        self.pump.send(self.core.session.abort(reason))
        self.pump.close()
        self._requests.end()

    @property
    def inflight(self) -> int:
        """Requests that have come in and have no answer yet."""
        return self.core.inflight

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py."""
        self.core.leave(why)
        self.pump.leave(why)

    # ---- for the pump ----

    def handle(self, event: Event) -> None:
        if isinstance(event, Request):
            self._requests.dispatch(event)
        elif isinstance(event, Cancel):
            self._requests.cancel(event.request_id)
        elif not self.core.take(event, self):
            self._end(None)

    def failed(self, error: FastsplitError, *, tell: bool) -> None:
        if tell:
            self.pump.abort(error, LINGER_S)
        self._end(self.core.ended_by(error, tell=tell))

    def progressed(self) -> None:
        self._requests.work()
        self._regulate()

    # ---- for the core ----

    def attach_ring(self, event: RingOffered) -> None:
        is_idle = self.pump.outbox.idle and not self.core.pending
        self.core.attach_ring(event, AT_ONCE, is_idle=is_idle)  # the answer has some hundred bytes: there is room
        self.pump.use_ring()

    def send_returns(self) -> None:
        self.pump.send_returns()

    def answer_probe(self, probe: Probe) -> None:
        self.pump.send_filled(self.connection.probe_answer(probe))

    # ---- looking after it ----

    def _regulate(self) -> None:
        """Reads on, or not; and says whether all is done."""
        limit = self._options.max_queued_nbytes
        if not self.core.ended:
            self.pump.pause(
                self._stopped or self.pump.outbox.queued_nbytes > limit or self._requests.waiting_nbytes > limit
            )
        if self._draining is not None and not self._draining.done() and self._is_drained:
            self._draining.set_result(True)

    @property
    def _is_drained(self) -> bool:
        return self.core.ended or (not self.core.pending and self.pump.outbox.idle)

    def _look_for_handshake(self) -> None:
        if self.core.session.peer_limits is None:
            self.failed(self.core.no_handshake(), tell=True)
            return
        self._timer = self.pump.loop.call_later(IDLE_S, self._look_for_idle_memory)

    def _look_for_idle_memory(self) -> None:
        """Releases memory that was not used for long, if nothing was called meanwhile."""
        arena = self.connection.arena
        if arena is None:
            self._timer = None
            return
        before, self._calls_before = self._calls_before, self.core.stats().calls
        if before == self._calls_before and arena.trim():
            self.pump.queue_control_frames()
        self._timer = self.pump.loop.call_later(IDLE_S, self._look_for_idle_memory)

    # ---- the end ----

    def stop_reading(self) -> None:
        """The server closes: what came in by now is the last."""
        self._stopped = True
        self._regulate()

    async def drained(self, deadline: float) -> None:
        """Waits until everything is answered, and the answers are sent; not beyond the deadline."""
        if self._requests.has_task:
            return  # a handler that closes its server
        self._draining = self.pump.loop.create_future()
        self._regulate()
        await within(self._draining, deadline)

    def finish(self) -> None:
        """Says goodbye, and closes."""
        if not self.core.ended:
            self.pump.goodbye()
            self._end(None)

    def _end(self, error: FastsplitError | None) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        self.core.end(error)
        if not self.pump.ended:
            self.pump.close()
        if self._timer is not None:
            self._timer.cancel()
        self._requests.end()
        self._server._forget(self)
        self.core.client._end()
        self._regulate()
