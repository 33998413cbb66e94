"""The calls of a channel on an event loop: encoded in turn, handed to the pump, settled by what comes in.

A call that finds as many requests in flight as the server takes, or too many bytes before it in the queue, waits for
its turn (turns.py); its tensors are described, and copied if they must be, when that comes. Then it waits for its
reply. Waiting for either counts into its deadline.

Rules. A cancelled call, or one whose deadline passes, costs no other call anything: either no byte of it was sent, and
it is discarded; or it goes on to be sent, a CANCEL follows, and its answer is dropped when it comes. Any other error in
sending or reading ends the connection, and every call in flight gets it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import Any

from ...errors import ArenaFull, ClosedError, DeadlineError, FastsplitError, fresh
from ...tensors import Desc, Outgoing, nbytes_of, parse_expect
from ..client import Asked, ClientCore, probe_sizes
from ..compression import Codec
from ..connection import Connection
from ..events import Event
from ..outbox import Frame
from ..result import Result
from .pump import AT_ONCE, Pump
from .turns import Turns
from .waiting import settle_left, within

__all__ = ["Calls"]

_LINGER_S = 0.5  # how long an aborted peer's bytes are read and dropped, so that it can read why


class _Call:
    """A request in flight, and the future of its reply."""

    __slots__ = ("_sent_ns", "decoded_ns", "frame", "future", "op", "request_id", "timeout_s", "timer")

    def __init__(self, op: str, request_id: int, timeout_s: float | None, future: asyncio.Future[Result]) -> None:
        self.op = op
        self.request_id = request_id
        self.timeout_s = timeout_s
        self.future = future
        self.frame: Frame | None = None
        self.timer: asyncio.Handle | None = None
        self._sent_ns = self.decoded_ns = 0


class Calls:
    """The core's front, and the owner of the pump. `open` brings the connection."""

    pump: Pump
    turns: Turns

    def __init__(self, core: ClientCore) -> None:
        self.core = core
        self._steps: deque[asyncio.Future[bool]] = deque()  # of those that wait for the handshake or a probe

    def open(self, connection: Connection, max_queued_nbytes: int) -> Pump:
        """The connection is made, and is read from now on; the handshake comes next."""
        pump = self.pump = Pump(connection, self)
        self.turns = Turns(self.core, pump, max_queued_nbytes)
        self.core.open(connection)
        return pump

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py."""
        core = self.core
        if core.error is None:
            core.error = ClosedError(why)
        core.closed = core.refusing = True
        self.pump.leave(why)
        for call in core.calls.values():
            settle_left(call.future, fresh(core.error))
        core.calls.clear()
        for future in (*(future for _, future in self.turns.waiting), *self._steps):
            settle_left(future)

    # ---- calls ----

    async def run(self, asked: Asked) -> Result:
        """Makes a call and waits for its result."""
        call = await self._start(asked)
        try:
            return await call.future
        except BaseException:
            self._cancel(call)
            raise
        finally:
            if call.timer is not None:
                call.timer.cancel()
            del call  # else an error keeps this frame, and with it the future, which keeps the error: and tensors

    async def _start(self, asked: Asked) -> _Call:
        started_ns = perf_counter_ns()
        op, tensors, timeout_s, deadline, expect, wire_dtype, codec, attrs = asked
        core = self.core
        core.check_open()
        cast, number = core.coding(wire_dtype, codec)
        expected = parse_expect(expect)
        sizes = [nbytes_of(tensor) for tensor in tensors]
        nbytes = 0 if core.has_shm else sum(sizes)
        turns = self.turns
        waited_ns = 0
        try:
            if turns.waiting or not turns.has_room(nbytes):
                waited_ns -= perf_counter_ns()
                await self._turn(asked, nbytes)
                waited_ns += perf_counter_ns()
            again = False
            while True:
                try:
                    out = core.connection.prepare(op, tensors, AT_ONCE, cast, number)
                    break
                except ArenaFull as full:
                    core.check_open()
                    turns.let_in()  # while this one waits, others may have what they need
                    waited_ns -= perf_counter_ns()
                    if not await self.pump.memory.wait(full, deadline, again=again):
                        core.check_open()
                        raise
                    again = True
                    if turns.waiting or not turns.has_room(nbytes):
                        await self._turn(asked, nbytes, first=True)
                    waited_ns += perf_counter_ns()
            if again:
                self.pump.memory.wake()
            return self._request(op, out, timeout_s, deadline, expected, cast, number, attrs, started_ns + waited_ns)
        except BaseException:
            turns.let_in()
            raise

    async def _turn(self, asked: Asked, nbytes: int, *, first: bool = False) -> None:
        op, _, timeout_s, deadline, *_ = asked
        in_time = await self.turns.wait(nbytes, deadline, first=first)
        self.core.check_open()
        if not in_time:
            raise DeadlineError(f"{op}: not sent within {timeout_s} s, since other calls were")

    def _request(
        self,
        op: str,
        out: Outgoing,
        timeout_s: float | None,
        deadline: float | None,
        expected: list[Desc] | None,
        cast: int,
        codec: Codec,
        attrs: Mapping[str, Any],
        started_ns: int,
    ) -> _Call:
        core, pump, connection = self.core, self.pump, self.core.connection
        pump.queue_control_frames()
        if connection.is_probe_due and pump.outbox.idle:
            pump.send_filled(connection.probe(0)[1])
        left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        request_id, head, sent_ns = core.encode(op, out, attrs, left_s, expected, cast, codec, started_ns)
        call = core.calls[request_id] = _Call(op, request_id, timeout_s, pump.loop.create_future())
        call._sent_ns, call.decoded_ns = sent_ns, core.session.decode_ns
        if left_s is not None:
            call.timer = pump.loop.call_later(left_s, self._expire, call)
        if connection.arena is not None:
            connection.arena.lend(out.placements)
        call.frame = pump.send(head, out)
        return call

    def _expire(self, call: _Call) -> None:
        unsent = self._cancel(call)
        if not call.future.done():
            what = "not sent within" if unsent else "no reply within its deadline of"
            call.future.set_exception(DeadlineError(f"{call.op}: {what} {call.timeout_s} s"))

    def _cancel(self, call: _Call) -> bool:
        """Ends a call without its reply. Returns whether no byte of it was sent."""
        core, pump = self.core, self.pump
        if core.calls.pop(call.request_id, None) is None or call.frame is None:
            return False
        unsent = pump.outbox.discard(call.frame, call.request_id)
        if not unsent and core.session.mark_cancelled(call.request_id) and not pump.loop.is_closed():
            pump.send(core.session.cancel(call.request_id))
        self.turns.let_in()
        return unsent

    # ---- for the core and the pump: see client.Front and pump.Owner ----

    def handle(self, event: Event) -> None:
        """Acts on what came in."""
        self.core.handle(event, self)

    def settle(self, call: _Call, result: Result | None, error: FastsplitError | None) -> None:
        """Gives a call its outcome, unless it has one."""
        if call.future.done():
            return
        if error is not None:
            call.future.set_exception(error)
        elif result is not None:
            core = self.core
            decoded_ns = core.session.decode_ns - call.decoded_ns
            core.stats.wait_s += max(perf_counter_ns() - call._sent_ns - decoded_ns, 0) * 1e-9
            call.future.set_result(result)

    def send_returns(self) -> None:
        """The server is short of shared memory."""
        self.pump.send_returns()

    def progressed(self) -> None:
        """Something may have been read or sent: those that wait look again."""
        if self._steps:
            self._step()
        if self.turns.waiting:
            self.turns.let_in()

    def failed(self, error: FastsplitError, *, tell: bool) -> None:
        """Ends the connection. `tell`: the peer is told why first."""
        if tell:
            self.pump.abort(error, _LINGER_S)
        self.end(error, at_once=not tell)

    def on_memory_pressure(self, deadline: float | None) -> None:
        """Called by the arena when our own memory is full."""
        self.pump.memory.on_memory_pressure(deadline)

    # ---- the handshake, probes, and the end ----

    async def until(self, condition: Callable[[], bool], deadline: float, late: str) -> None:
        """Waits until events have made the condition true. Raises DeadlineError, and what ended the connection."""
        while not condition():
            future: asyncio.Future[bool] = self.pump.loop.create_future()
            self._steps.append(future)
            if not await within(future, deadline):
                raise DeadlineError(late)
            self.core.raise_error()

    def _step(self) -> None:
        steps, self._steps = self._steps, deque()
        for future in steps:
            if not future.done():
                future.set_result(True)

    async def measure(self, nbytes: int, deadline: float) -> None:
        """Probes the link, `nbytes` each way. Raises DeadlineError, and what ended the connection."""
        core = self.core
        for size in probe_sizes(nbytes):
            number, buffers = core.probe(size)
            try:
                self.pump.send_filled(buffers)
                await self.until(
                    lambda number=number: number not in core.probes,  # type: ignore[misc]
                    deadline,
                    "the link was not measured: no answer",
                )
            finally:
                core.probes.discard(number)

    def end(self, error: FastsplitError, *, at_once: bool = True) -> None:
        """Ends the connection, and every call with it; the first error stays. `at_once`: nothing is to be said to the
        peer any more."""
        self.core.fail(error, self.settle)
        if at_once:
            self.pump.close()
        self.turns.end()
        self._step()
