"""The requests of one client that wait for the thread that runs them, and the thread that reads ahead.

Requests wait here if they come in while a handler runs: that handler's own thread has read them (it asked whether its
call is cancelled, or waited for memory), or the reader's thread has. There is a reader only while tensors travel and
requests come faster than they are answered. Only the connection's own thread computes: a second one would bring a
second pool of OpenMP's threads.

Rules. `idle` guards everything here, and the core's table of requests; without a reader there is one thread, which does
not need it. How reading has ended (`end`) takes effect when the requests that were read before it are answered, as if
the connection's own thread had read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from threading import get_ident

from ...errors import FastsplitError, ResourceError, fresh
from ...printable import get_logger
from ...system.shortage import start
from ..events import Request
from ..service import ServiceCore, tensors_nbytes

__all__ = ["ReadAhead"]

_logger = get_logger("fastsplit.server")

_MAX_AHEAD_NBYTES = 256 * 1024**2  # tensors of requests that were read ahead; a single one may have more
_MAX_QUICK = 16  # requests in a row that found nothing to do, after which a connection reads for itself again


class ReadAhead:
    """What waits for one connection's thread, in order."""

    def __init__(self, core: ServiceCore) -> None:
        self._core = core
        self._max_requests = core.service.options.limits.max_inflight
        self.idle = threading.Condition()
        self.waiting: deque[Request] = deque()
        self.nbytes = 0
        """Of `waiting`: bytes of this process's memory, about."""
        self.running: int | None = None
        """The request that runs on the connection's thread."""
        self.reader: threading.Thread | None = None
        """The thread that reads, while there is one."""
        self.end: BaseException | bool = True
        """The result of reading while a handler ran: True (read on), False (the client is done), or the error."""
        self._is_idle = False

    @property
    def is_off(self) -> bool:
        """Whether the connection's own thread reads: no other one does, and the reading has not ended."""
        return self.reader is None and self.end is True

    @property
    def can_read(self) -> bool:
        """Whether the connection's thread may read while it runs a handler: there must be room for requests that
        wait."""
        return self.is_off and len(self.waiting) < self._max_requests and self.nbytes < _MAX_AHEAD_NBYTES

    def has(self, request_id: int) -> bool:
        """Whether a request waits here, or runs. The caller holds `idle`."""
        return request_id == self.running or any(request.request_id == request_id for request in self.waiting)

    def put_off(self, request: Request) -> None:
        """Queues a request until the one that runs is answered. The caller holds `idle`, or there is no reader."""
        self.waiting.append(request)
        self.nbytes += self._held_nbytes(request)

    def take(self) -> Request:
        """The next request, which runs now. There must be one."""
        with self.idle:
            request = self.waiting.popleft()
            self.running = request.request_id
            self.nbytes -= self._held_nbytes(request)
            self.idle.notify_all()
        return request

    def start(self, read: Callable[[int], tuple[bool, int]]) -> None:
        """Has another thread read from now on.

        `read(quick)` reads once and gives requests to `queue`. It returns whether the client goes on, and how many
        requests in a row found the connection's thread with nothing to do; `quick` is how many before.
        """
        self.end = True
        name = f"fastsplit-read {self._core.service.uri}"
        self.reader = threading.Thread(target=self._read_on, args=(read,), name=name, daemon=True)
        try:
            start(self.reader)
        except ResourceError as error:  # the connection's thread reads when it has computed
            _logger.debug("%s: nothing is read ahead: %s", self._core.service.uri, str(error))
            self.reader = None
        self._core.connection.coder.overlaps = self.reader is not None

    def wait(self) -> bool:
        """Waits for a request that was read ahead. False when the client is done; raises what ended the reading."""
        with self.idle:
            self._is_idle = True
            self.idle.wait_for(lambda: self.waiting or self.reader is None)
            self._is_idle = False
            if self.waiting:
                return True
            end, self.end = self.end, True
        if not isinstance(end, BaseException):
            return end
        try:
            raise end
        finally:
            del end

    def close(self) -> None:
        """The connection has ended: drops what waits, and waits for the reader to see it."""
        with self.idle:
            self.waiting.clear()
            self._core.pending.clear()
            self.idle.notify_all()  # the reader may wait for room
            reader = self.reader
        if reader is not None:
            reader.join()
        self.waiting.clear()  # of what the reader still had
        self.end = True  # perhaps an error, which has no reader any more

    # ---- the reader's thread ----

    def _read_on(self, read: Callable[[int], tuple[bool, int]]) -> None:
        """Reads until the client leaves, or has had nothing more than one request in flight for long."""
        quick = 0
        end: BaseException | bool = True
        self._core.connection.serves_in(get_ident())
        try:
            while end is True and quick < _MAX_QUICK:
                end, quick = read(quick)
        except FastsplitError as error:
            end = fresh(error)
        except BaseException as error:  # noqa: BLE001 (the connection's thread says what became of it)
            end = error
        self._core.connection.serves_no_longer_in(get_ident())
        with self.idle:
            self.end = end
            self.reader = None
            self._core.connection.coder.overlaps = False
            self.idle.notify_all()
        del end  # an error keeps this frame, and with it the tensors

    def queue(self, request: Request) -> bool:
        """Queues a request, as soon as there is room. Returns whether the connection's thread had nothing to do."""
        nbytes, limit = self._held_nbytes(request), self._max_requests
        with self.idle:
            while self.waiting and (self.nbytes + nbytes > _MAX_AHEAD_NBYTES or len(self.waiting) >= limit):
                if self._core.ended or self._core.service.closing:
                    break
                self.idle.wait(1.0)
            was_idle = self._is_idle and not self.waiting
            self.put_off(request)
            self.idle.notify_all()
        return was_idle

    def _held_nbytes(self, request: Request) -> int:
        """Bytes of this process's memory that a waiting request takes; shared memory counts as the client's."""
        return tensors_nbytes(request) if self._core.connection.arena is None else request.message.payload_nbytes
