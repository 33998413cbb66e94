"""The watcher: a channel's own thread, which reads while requests are in flight and no caller reads.

A caller that waits for a reply reads for all (reader.py): no hand-over between threads, the shortest round trip.
Futures without a waiting caller need this thread. It is started by the first `submit`, or by the first call that is
cancelled while its answer is still to come; it ends when nothing was in flight for a second. A program that makes only
calls that return has no such thread.

Handing over. While it waits for bytes the watcher is not the reader: it only polls (`Reader.watching`). A caller that
wants to read becomes the reader and writes to the watcher's eventfd. The watcher then naps for _NAP_S, during which it
need not be woken, and naps again while a caller reads or the oldest request in flight is younger than _NAP_S: a program
that alternates submit and result pays for one look in that time, not for a hand-over per call. In a longer sleep the
watcher is `asleep`, and a thread that leaves requests in flight without a reader wakes it.

With `overlap` the watcher stays the reader while it polls: callers wait for it, so that bytes are read while they
compute.

Deadlines. The watcher ends futures whose deadline passes while no caller waits for them.

Rules. `Reader.watching`, `polling` and `Reader.watcher` change under the channel's lock. The socket is not closed
while `polling`. No sleep is longer than _IDLE_S, which bounds the cost of a wake-up that an interrupt prevents. While
it waits, the thread keeps its channel alive only if one of the channel's futures is in flight.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import select
import sys
import threading
import weakref
from threading import get_ident
from time import monotonic, perf_counter_ns
from typing import TYPE_CHECKING

from ...errors import ClosedError, DeadlineError, ResourceError
from ...system.forked import renew
from ...system.shortage import start, why

if TYPE_CHECKING:
    from .reader import Reader

__all__ = ["Watcher"]

_NAP_S = 0.002
_LONG_NAP_S = 0.05  # while a caller reads
_IDLE_S = 1.0  # without a request in flight, after which the thread ends
_MAX_POLL_S = 1.0
_ONE = (1).to_bytes(8, sys.byteorder)


class _Bell:
    """An eventfd that wakes the watcher, in a file object that owns it. Raises ResourceError."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may ring in the middle of it
        try:  # in one step, so that an interrupt leaves no descriptor without an owner
            (self._file,) = map(io.FileIO, map(os.eventfd, (0,), (os.EFD_NONBLOCK | os.EFD_CLOEXEC,)), ("r+",))
        except OSError as error:
            raise ResourceError(f"a thread that reads: {why(error)}") from None
        self.fd = self._file.fileno()

    def ring(self) -> None:
        with self._lock:
            if not self._file.closed:
                self._file.write(_ONE)

    def heard(self) -> None:
        with self._lock:
            if not self._file.closed:
                self._file.read(len(_ONE))

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def leave(self) -> None:
        """For a forked child: see system/forked.py."""
        renew(self._lock)
        self.close()


class Watcher:
    """Made by the reader, under the channel's lock; `start` starts its thread. `keeps`: stays the reader (`overlap`).

    Raises ResourceError without a descriptor.
    """

    def __init__(self, reader: Reader, *, keeps: bool) -> None:
        self.stirred = True
        """Whether there was a request since the watcher last rested."""
        self._stepped_aside = False  # whether a caller took the reading since then
        self._napped = False
        self.asleep = False
        """Whether it must be woken to look for something to do."""
        self.polling = False
        """Whether it may be in a system call on the socket."""
        self.runs = False
        """Whether the thread has begun."""
        bell = self._bell = _Bell()
        self._reader = weakref.ref(reader, lambda _: bell.ring())
        self._lock = reader.lock
        self._keeps = keeps
        self._due = math.inf  # no future's deadline passes before
        self._longest_s = _MAX_POLL_S
        self._rung = select.poll()
        self._rung.register(bell.fd, select.POLLIN)
        self._readable = select.poll()
        self._readable.register(bell.fd, select.POLLIN)
        self._readable.register(reader.connection.transport.fileno(), select.POLLIN)
        self.thread = threading.Thread(target=self._run, name=f"fastsplit-watch {reader.core.uri}", daemon=True)

    def start(self) -> None:
        """Starts the thread. Raises ResourceError."""
        start(self.thread)

    @property
    def alive(self) -> bool:
        """Whether the thread runs. It does not if its start was interrupted."""
        return self.thread.is_alive()

    # ---- called by other threads ----

    def attend(self, deadline: float | None = None) -> None:
        """There are requests in flight, one of which has this deadline, and the caller does not wait for them."""
        self.stirred = True
        if self.asleep:
            self._wake()
        if deadline is not None and deadline < self._due:
            with self._lock:
                self._due = min(deadline, self._due)
            self._wake()

    def step_aside(self) -> None:
        """A caller reads now."""
        self._stepped_aside = True
        self._wake()

    def _wake(self) -> None:
        self.asleep = False
        self._bell.ring()

    def close(self, timeout_s: float) -> None:
        """The channel has ended: waits at most `timeout_s` seconds for the thread, which may be in a callback."""
        self._wake()
        if self.alive:
            self.thread.join(timeout_s)
        else:
            self._bell.close()

    def leave(self) -> None:
        """For a forked child: see system/forked.py. The thread is the parent's."""
        self.polling = False
        self._bell.leave()

    # ---- the thread ----

    def _run(self) -> None:
        self.runs = True
        failure: BaseException | None = None
        try:
            while self._go_on():
                pass
        except BaseException as error:
            failure = error
            raise
        finally:
            self._bell.close()
            reader = self._reader()
            if reader is not None:
                with self._lock:
                    self.polling = False
                    if reader.watcher is self:
                        reader.watcher = None
                if failure is not None:  # a bug: without this thread these futures would stay pending
                    reader.end(ClosedError(f"the channel's thread failed: {failure!r}"))
                    del failure
                reader.leave_reading()
                reader.inside.discard(get_ident())
                if reader.core.closed:
                    reader.close_when_unused()
                reader.call_back()

    def _go_on(self) -> bool:
        """Does what there is to do, then waits for more. False if the thread is to end."""
        reader = self._reader()
        if reader is None or reader.core.closed or reader.watcher is not self:  # replaced, its start was interrupted
            return False
        if monotonic() >= self._due:
            self._end_late_futures(reader)
        idle = False
        if self._leaves_it(reader):
            poll, timeout_s = self._rung, _NAP_S
        elif self._reads(reader):
            if not self.polling:
                return True
            poll, timeout_s = self._readable, min(self._longest_s, max(self._due - monotonic(), 0.0))
        else:
            reader.call_back()  # what is left to this thread: see Reader.call_back
            poll = self._rung
            timeout_s, idle = self._rest(reader)
        if not reader.core.calls:
            reader = None  # nothing in flight needs it: do not keep it alive
        ready = poll.poll(math.ceil(timeout_s * 1e3))
        self.asleep = False
        if any(fd == self._bell.fd for fd, _ in ready):
            self._bell.heard()
        reader = self._reader()
        if reader is None:
            return False
        if self.polling:
            self._end_watching(reader)
        return not (idle and not ready and self._retires(reader))

    def _end_late_futures(self, reader: Reader) -> None:
        now = monotonic()
        with self._lock:
            # a list first: requests are added without the lock
            futures = list(reader.core.calls.values())
            deadlines = [math.inf if future._deadline is None else future._deadline for future in futures]
            self._due = min((deadline for deadline in deadlines if deadline > now), default=math.inf)
        for future, deadline in zip(futures, deadlines):
            if deadline <= now:
                reader.cancel(future, future._late())

    def _leaves_it(self, reader: Reader) -> bool:
        """After a nap: whether all requests in flight are so recent that a caller may be about to wait for them."""
        napped, self._napped = self._napped, False
        try:
            oldest = next(iter(reader.core.calls.values()), None) if napped else None
        except RuntimeError:  # one was added at this moment
            return False
        self._napped = oldest is not None and perf_counter_ns() - oldest._sent_ns < _NAP_S * 1e9
        return self._napped

    def _reads(self, reader: Reader) -> bool:
        """Reads what is there, and begins to watch for more. False if no reply is expected, or a caller reads or wants
        to."""
        if not (self._keeps or reader.expects):
            return False
        ident = get_ident()
        try:
            reader.inside.add(ident)
            if reader.reading != ident and not reader.take_reading():
                return False
            if self._read_what_is_there(reader):
                self._begin_to_watch(reader)
        finally:
            if not self.polling:
                reader.leave_reading()
            if reader.reading != ident:
                reader.inside.discard(ident)
        if self.polling:
            return True
        reader.call_back()
        return self._keeps or not reader.followers

    def _read_what_is_there(self, reader: Reader) -> bool:
        """Returns whether to wait for more: no caller wants to read, and nothing else is to be done."""
        decoded_ns = reader.session.decode_ns
        with contextlib.suppress(DeadlineError):  # nothing more is there
            while True:
                reader.read_once(None, blocking=False)
                if not self._may_go_on(reader):
                    break
        if not reader.followers:  # else the waiting callers count it
            reader.core.stats.serialization_s += (reader.session.decode_ns - decoded_ns) * 1e-9
        return self._may_go_on(reader) and (self._keeps or reader.expects)

    def _may_go_on(self, reader: Reader) -> bool:
        if reader.callbacks or reader.core.closed or (reader.followers and not self._keeps):
            return False
        return monotonic() < self._due

    def _begin_to_watch(self, reader: Reader) -> None:
        """Begins to poll, unless there is something to read or a caller wants to read."""
        link = reader.connection.transport
        soon_s = link.prepare_to_sleep(for_items=True, for_space=False)
        with self._lock:
            if soon_s == 0.0 or not self._may_go_on(reader):
                link.awake()
                return
            self._longest_s = _MAX_POLL_S if soon_s is None else soon_s
            self.polling = True
            if not self._keeps:
                reader.watching = True
                reader.reading = 0

    def _end_watching(self, reader: Reader) -> None:
        with self._lock:
            self.polling = False
            if (reader.watching or self._keeps) and reader.watcher is self:  # else a caller has taken the reading
                reader.watching = False
                reader.connection.transport.awake()

    def _rest(self, reader: Reader) -> tuple[float, bool]:
        """How many seconds to sleep, and whether the thread has nothing to do."""
        self._napped = self._stepped_aside or (self.stirred and bool(reader.reading or reader.followers))
        self.stirred = self._stepped_aside = False
        if self._napped:
            return _NAP_S, False
        self.asleep = True
        works = self._keeps or reader.expects
        callers_read = reader.reading or reader.followers
        if works and not callers_read:  # a request made before `asleep` was set did not ring
            return 0.0, False
        return (_LONG_NAP_S if works else _IDLE_S), not works

    def _retires(self, reader: Reader) -> bool:
        """Detaches from the reader, unless there is work. A request made at this moment either finds no watcher and
        starts one, or is found here. Returns whether the thread is to end."""
        with self._lock:
            reader.watcher = None
            works = self.stirred or reader.expects
            if works:
                reader.watcher = self
        return not works
