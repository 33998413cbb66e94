"""The requests of one client of the asyncio server: how each is run, and what becomes of it.

A coroutine function runs as a task for each request; any number at a time, and replies go out in the order in which
they are done. A plain function runs on the loop, one after another, and for a millisecond in one turn of it; or, with
`workers`, in a pool of threads, and the loop then sends what a thread has prepared.

Rules. Everything but a handler in a worker runs in the loop's thread. A CANCEL cancels the task of its request, and the
end of the connection all of its tasks. A request is answered while it stands in the core's table, and so once,
whatever a task, a thread or a handler does.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from time import perf_counter_ns
from typing import Any

from ...errors import ArenaFull
from ...printable import get_logger
from ...system.threads import Workers, is_interrupt
from ...tensors import Outgoing
from ..call import Call as BlockingCall
from ..call import describe, is_coroutine
from ..events import Request
from ..service import CLOSING, Refusal, ServiceCore, tensors_nbytes
from .channel import allocate
from .pump import AT_ONCE, Pump

__all__ = ["Call", "Requests"]

_logger = get_logger("fastsplit.server")

_MAX_WORK_NS = 1_000_000  # of plain handlers, before others get their turn


class Call(BlockingCall):
    """One request, as its handler sees it: as in fastsplit.Call, and `allocate`."""

    __slots__ = ()

    _served: Requests

    async def allocate(self, shape: int | Sequence[int], dtype: Any = "float32") -> Any:
        """As `empty`, for coroutines: waits for room as long as the caller does for its reply. Raises ArenaFull."""
        core = self._served.core
        return await allocate(self._served.pump, core.arrays, shape, dtype, core.reply_deadline(self._deadline))


class Requests:
    """The requests of one client that have no answer yet. `pending` of the core has the task of each, if there is one.

    `tasks`: those of the whole server. `on_answer` is called when one was answered.
    """

    def __init__(
        self,
        core: ServiceCore,
        pump: Pump,
        workers: Workers | None,
        tasks: set[asyncio.Task[None]],
        on_answer: Callable[[], None],
    ) -> None:
        self.core = core
        self.pump = pump
        self._handlers = core.service.handlers
        self._workers = workers
        self._tasks = tasks
        self._on_answer = on_answer
        self.waiting_nbytes = 0
        """Bytes of the tensors of requests that wait for plain handlers on the loop."""
        self._waiting: deque[tuple[Request, float | None]] = deque()  # those requests
        self._queued: dict[int, Request] = {}  # those for workers; here, so that they are gone when the connection is
        self._working: asyncio.Handle | None = None

    @property
    def has_task(self) -> bool:
        """Whether the current task answers one of these requests: a handler that closes its server, for example."""
        current = asyncio.current_task()
        return current is not None and current in self.core.pending.values()

    # ---- for a Call ----

    def memory_deadline(self, deadline: float | None) -> float:
        return AT_ONCE if self.pump.in_loop else self.core.reply_deadline(deadline)

    def is_cancelled(self, request_id: int) -> bool:
        return request_id in self.core.cancelled

    def has_left(self) -> bool:
        return not self.core.service.closing and self.core.connection.transport.peer_left()

    # ---- what comes in ----

    def dispatch(self, request: Request) -> None:
        """Runs a request, or queues it. Raises RemoteProtocolError."""
        request_id = request.request_id
        self.core.admit(request_id)
        deadline = time.monotonic() + request.time_ns * 1e-9 if request.time_ns else None
        handler = self._handlers.get(request.message.op)
        if handler is not None and is_coroutine(handler):
            call = self._begin(request, deadline)
            if call is not None:
                self._adopt(call, self._run(call, handler))
        elif handler is not None and self._workers is not None:
            self._queued[request_id] = request
            if not self._workers.submit(functools.partial(self._run_in_thread, request_id, deadline)):
                self._queued.pop(request_id, None)
                self._refuse(request_id, CLOSING)
        else:
            self._waiting.append((request, deadline))
            self.waiting_nbytes += tensors_nbytes(request)

    def cancel(self, request_id: int) -> None:
        """The client has cancelled a request: cancels its task."""
        if self.core.cancel(request_id):
            task = self.core.pending[request_id]
            if task is not None:
                task.cancel()

    def work(self) -> None:
        """Runs plain handlers on the loop, for a moment, unless that goes on already."""
        if not self._waiting or self._working is not None:
            return
        end_ns = perf_counter_ns() + _MAX_WORK_NS
        while self._waiting:
            request, deadline = self._waiting.popleft()
            self.waiting_nbytes -= tensors_nbytes(request)
            self._run_here(request, deadline)
            del request
            if self._waiting and perf_counter_ns() > end_ns:
                self._working = self.pump.loop.call_soon(self._work_on)
                return

    def end(self) -> None:
        """The connection has ended: drops what waits, and cancels all tasks."""
        if self._working is not None:
            self._working.cancel()
        self._waiting.clear()
        self._queued.clear()
        self.waiting_nbytes = 0
        tasks = [task for task in self.core.pending.values() if task is not None]
        self.core.pending.clear()
        for task in tasks:
            task.cancel()
        self._on_answer = _nothing  # a circle

    def _work_on(self) -> None:
        self._working = None
        self.work()
        self._on_answer()

    def _begin(self, request: Request, deadline: float | None) -> Call | None:
        """The call of a request that is to run now. None if it is not, and was answered."""
        call: Any = self.core.begin(self, request, deadline)
        if isinstance(call, Refusal):
            self._refuse(request.request_id, call)
            return None
        return call  # type: ignore[no-any-return]

    # ---- coroutines ----

    async def _run(self, call: Call, handler: Callable[[Call], Any]) -> None:
        try:
            started_ns = perf_counter_ns()
            result = await handler(call)
            time_ns = perf_counter_ns() - started_ns
            out = await self._prepare(call, result)
        except asyncio.CancelledError:
            raise  # `_unwound` knows whose it is
        except GeneratorExit as error:
            if not self.pump.loop.is_running():  # not the handler's: the task is thrown away
                raise
            self._fail(call, error)
        except BaseException as error:
            self._fail(call, error)
            if is_interrupt(error):
                raise
        else:
            self._reply(call, out, time_ns)

    def _adopt(self, call: Call, answering: Coroutine[Any, Any, None]) -> None:
        """Has a task answer a call."""
        request_id, pending = call._request_id, self.core.pending
        if request_id not in pending:  # the connection has ended
            answering.close()
            return
        task = pending[request_id] = self.pump.loop.create_task(answering)
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._unwound, request_id))
        if request_id in self.core.cancelled:
            task.cancel()

    def _unwound(self, request_id: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        core = self.core
        if not task.cancelled():
            if task.exception() is not None:
                _logger.error("%s: a bug in the server", core.service.uri, exc_info=task.exception())
        elif not core.ended and request_id in core.cancelled:
            self._refuse(request_id, Refusal("cancelled", "cancelled"))
        elif not core.ended:
            try:
                task.result()
            except asyncio.CancelledError as error:  # the handler's own
                self._refuse(request_id, Refusal("failed", describe(error)))

    async def _prepare(self, call: Call, result: Any) -> Outgoing:
        """What is needed to send a reply; waits for memory."""
        deadline = self.core.reply_deadline(call._deadline)
        again = False
        while True:
            try:
                out = self.core.prepare(call, result, AT_ONCE)
            except ArenaFull as full:
                if not await self.pump.memory.wait(full, deadline, again=again):
                    raise
                again = True
            else:
                if again:
                    self.pump.memory.wake()
                return out

    # ---- plain functions ----

    def _run_here(self, request: Request, deadline: float | None) -> None:
        call = self._begin(request, deadline)
        if call is None:
            return
        try:
            started_ns = perf_counter_ns()
            result = self._handlers[call.op](call)
            if inspect.isawaitable(result):  # of a function that only returns one
                self._adopt(call, self._run(call, lambda _: result))
                return
            time_ns = perf_counter_ns() - started_ns
            try:
                out = self.core.prepare(call, result, AT_ONCE)
            except ArenaFull:
                self._adopt(call, self._reply_later(call, result, time_ns))
                return
        except BaseException as error:
            self._fail(call, error)
            if is_interrupt(error):
                raise
            return
        self._reply(call, out, time_ns)

    async def _reply_later(self, call: Call, result: Any, time_ns: int) -> None:
        try:
            out = await self._prepare(call, result)
        except Exception as error:  # noqa: BLE001 (of what the handler returned)
            self._fail(call, error)
            return
        self._reply(call, out, time_ns)

    # ---- workers ----

    def _run_in_thread(self, request_id: int, deadline: float | None) -> None:
        """All that a worker does for a request: the handler, and what its reply has to copy."""
        request = self._queued.pop(request_id, None)
        if request is not None and not self.core.ended:
            answer = self._answer_in_thread(request, deadline)
            del request
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.pump.loop.call_soon_threadsafe(answer)

    def _answer_in_thread(self, request: Request, deadline: float | None) -> Callable[[], None]:
        """What the loop is to do about it."""
        core, request_id = self.core, request.request_id
        call: Any = core.begin(self, request, deadline)
        if isinstance(call, Refusal):
            return functools.partial(self._refuse, request_id, call)
        try:
            started_ns = perf_counter_ns()
            result = self._handlers[call.op](call)
            time_ns = perf_counter_ns() - started_ns
            if inspect.isawaitable(result):
                return functools.partial(self._adopt, call, self._run(call, lambda _: result))
            out = core.prepare(call, result, core.reply_deadline(deadline))
        except BaseException as error:  # noqa: BLE001 (sys.exit() in a handler must not end the server's threads either)
            return functools.partial(self._refuse, request_id, self._failure(call, error))
        return functools.partial(self._reply, call, out, time_ns)

    # ---- answers ----

    def _reply(self, call: Call, out: Outgoing, time_ns: int) -> None:
        request_id = call._request_id
        if self.core.ended or request_id not in self.core.pending:
            return
        self.pump.queue_control_frames()
        try:
            head = self.core.reply(call, out, time_ns)
        except BaseException as error:  # noqa: BLE001 (invalid reply attributes, for example)
            self._fail(call, error)
            return
        self._answer(request_id, head, out)

    def _fail(self, call: Call, error: BaseException) -> None:
        self._refuse(call._request_id, self._failure(call, error))

    def _failure(self, call: Call, error: BaseException) -> Refusal:
        is_cancelled = isinstance(error, asyncio.CancelledError)
        return self.core.failure(self, call.op, error, is_cancelled=is_cancelled)

    def _refuse(self, request_id: int, refusal: Refusal) -> None:
        if not self.core.ended and request_id in self.core.pending:
            self._answer(request_id, self.core.error(request_id, refusal))

    def _answer(self, request_id: int, head: bytearray, out: Outgoing | None = None) -> None:
        self.core.done(request_id)  # the pump has it from now on
        self.pump.send(head, out)
        self._on_answer()


def _nothing() -> None: ...
