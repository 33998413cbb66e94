"""What the threads of a blocking channel share: who reads, the outcomes of calls, and the end of the connection.

Rules. `lock` guards `reading`, `followers`, `watching`, `watcher`, the turns and the futures' outcomes. The connection
is closed when it has ended and no thread can be in a system call on it: each thread that has read or sent looks whether
it is the last one. Each lock is taken, and noted as taken, in one step: `(held,) = map(acquire, ...)`; it is released
first thing in a `finally`.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from ...errors import ClosedError, FastsplitError, PeerLostError
from ...system.forked import renew
from ..client import ClientCore
from ..connection import Connection
from ..events import Event
from ..result import Result
from .future import Future
from .turns import Turns

if TYPE_CHECKING:
    from .watcher import Watcher

__all__ = ["State"]

_END_S = 0.5  # how long a reader that has read the session's end may take to end the connection


class State:
    """Made before the connection, which `open` brings."""

    def __init__(self, core: ClientCore) -> None:
        self.core = core
        self.lock = threading.RLock()  # a finalizer in the middle of it may need it again
        self.changed = threading.Condition(self.lock)
        self.reading = 0
        """The thread that reads, 0 if none does."""
        self.followers = 0
        """Threads that wait for the one that reads."""
        self.watcher: Watcher | None = None
        self.watching = False
        """Whether the watcher waits for bytes, and leaves the reading to any caller."""
        self.turns = Turns(core, self.lock, self.changed)
        self.events: list[Event] = []
        """Events that came in and were not handled yet."""
        self.callbacks: deque[tuple[Callable[[Future], object], Future]] = deque()
        """Callbacks of futures that are done."""
        self.calling_back: set[int] = set()
        """Threads that run callbacks."""

    def open(self, connection: Connection) -> None:
        """The connection is made; the handshake comes next."""
        self.connection = connection
        self.session = connection.session
        self.inside = connection.inside
        self.core.open(connection)

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py."""
        core = self.core
        renew(self.lock, self.changed)
        self.connection.leave(why)
        self.calling_back.clear()
        for _, future in self.callbacks:
            future._leave()
        self.callbacks.clear()
        self.reading = 0
        if self.watcher is not None:
            self.watcher.leave()
        self.watcher = None
        self.watching = False
        core.closed = core.refusing = True
        if core.error is None:
            core.error = ClosedError(why)
        for future in core.calls.values():
            if not future._done:
                future._error, future._done, future._callbacks = core.error, True, None
            future._leave()
        core.calls.clear()

    # ---- outcomes ----

    def settle(self, future: Future, result: Result | None, error: BaseException | None) -> None:
        """Gives a future its outcome, unless it has one: it may have been cancelled at this moment."""
        with self.lock:
            if not future._done:
                future._outcome, future._error = result, error
                if future._callbacks is None:
                    future._done = True  # first: a thread that adds waiters looks in the other order
                    if future._waited_for is not None:
                        self.callbacks.appendleft((Future._tell_waiters, future))
                else:
                    self._queue_callbacks(future)
                if self.followers:
                    self.changed.notify_all()

    def _queue_callbacks(self, future: Future) -> None:
        """A future that has callbacks is done. Between `_done = True` and the call that queues them nothing is called,
        so that no interrupt comes between the two."""
        assert future._callbacks is not None
        steps: list[Callable[[Any], object]] = [self.callbacks.extend, self.callbacks.appendleft]
        entries = zip(future._callbacks, itertools.repeat(future)), (Future._tell_waiters, future)
        queue = map(operator.call, steps, entries)
        future._done = True
        future._callbacks = None
        if future._waited_for is None:
            del steps[1]
        deque(queue, 0)  # waiters first: a callback may block

    def discard(self, request_id: int) -> None:
        """Forgets a request of which no byte was sent."""
        self.core.discard(request_id)
        if self.turns:
            self.turns.let_in()

    # ---- the end ----

    def fail(self, error: FastsplitError) -> FastsplitError:
        """Every call gets the error, and new ones are refused; the first error stays. Returns that, to be raised."""
        with self.lock:
            error = self.core.fail(error, self.settle)
            if self.turns:
                self.turns.let_in()
        return error

    def wait_for_end(self) -> FastsplitError:
        """The session has ended, and the thread that reads is about to end the connection: waits for that. Returns the
        error that did so, to be raised. The caller does not hold `connection.sending`: the reader may need it."""
        until = monotonic() + _END_S
        while not self.core.closed and monotonic() < until:
            sleep(0.001)
        return self.end(PeerLostError("the peer closed the connection"))

    def end(self, error: FastsplitError) -> FastsplitError:
        """Ends the connection. Returns the error that did so first, to be raised."""
        error = self.fail(error)
        self.connection.transport.shutdown()
        self.close_when_unused()
        return error

    def release(self, sending: threading.Lock) -> None:
        """Releases the lock of the sending side, which the caller holds."""
        sending.release()
        if self.core.closed:
            self.close_when_unused()

    def close_when_unused(self) -> None:
        """Closes the descriptor once no thread can be in a system call on it (its number may be given to another file).

        A thread that sends or reads calls this again when it is done.
        """
        sending = self.connection.sending
        while True:
            held = False
            try:
                (held,) = map(sending.acquire, (False,))
                with self.lock:
                    if held and not self.is_in_use:
                        self.connection.close()
                        return
            finally:
                if held:
                    sending.release()
            if not held or self.is_in_use:
                return
            # A reader that left just now came here too, and found `sending` taken by us: look again for both.

    @property
    def is_in_use(self) -> bool:
        """Whether a thread may be in a system call that reads."""
        return bool(self.reading) or (self.watcher is not None and self.watcher.polling)
