"""One connection on an event loop: what comes in is handed out, what is to be sent leaves the outbox. It never waits.

How it works. The loop watches the socket. Readable: a bounded number of reads, so that other connections get their
turn. A frame is sent at once if none is before it; what the transport does not take stays in the outbox until there is
room, and reading goes on meanwhile. Frames that a socket is given within one turn of the loop leave together.

A transport of whole frames (a ring) uses its socket as a bell: before the loop may sleep, this side says that it is
asleep and looks once more (docs/protocol.md, "The ring"); the peer's byte then makes the socket readable. Room in the
ring is waited for in the same way.

Rules. Everything here runs in the loop's thread, and nothing blocks it. The owner gets each event in the order of the
bytes, and once, as the last thing, that the connection has failed; it then closes or aborts.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ...errors import ClosedError, DeadlineError, FastsplitError, PeerLostError, RemoteProtocolError, fresh
from ...tensors import Outgoing
from ..connection import Connection
from ..events import Event, Failed
from ..outbox import Frame
from .waiting import MemoryWaiters, settle_left

__all__ = ["AT_ONCE", "Owner", "Pump"]

AT_ONCE = 0.0
"""A deadline that has passed: what cannot be done without waiting fails."""

_MAX_READS = 64  # in one turn: slots of a ring, or reads of a socket
_MAX_NBYTES = 4 * 1024**2  # read in one turn, about: a millisecond's worth
_NAP_S = 0.001


class Owner(Protocol):
    """What a connection belongs to: a Channel, or a server's side of one."""

    def handle(self, event: Event) -> None:
        """Something came in."""

    def failed(self, error: FastsplitError, *, tell: bool) -> None:
        """The connection cannot go on. `tell`: it is the peer's fault, and it does not know yet."""

    def progressed(self) -> None:
        """Something may have been read or sent: there may be room for what waits for it."""


class _NoOwner:
    """The owner of a pump that has ended."""

    def handle(self, event: Event) -> None: ...
    def failed(self, error: FastsplitError, *, tell: bool) -> None: ...
    def progressed(self) -> None: ...


_NO_OWNER = _NoOwner()


class _Watch:
    """What a loop watches a descriptor for. A function is called when there is something, None: it is not watched."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self._loop = loop
        self._fd = fd
        self.reads = self.writes = False

    def reading(self, call: Callable[[], None] | None) -> None:
        if (call is not None) != self.reads:
            self.reads = call is not None
            if call is not None:
                self._loop.add_reader(self._fd, call)
            elif not self._loop.is_closed():
                self._loop.remove_reader(self._fd)

    def writing(self, call: Callable[[], None] | None) -> None:
        if (call is not None) != self.writes:
            self.writes = call is not None
            if call is not None:
                self._loop.add_writer(self._fd, call)
            elif not self._loop.is_closed():
                self._loop.remove_writer(self._fd)


class Pump:
    """Moves the frames of one connection. `send_timeout_s`: how long the peer may take to read one; None for ever.

    `outbox`: what waits to be sent. `memory`: the tasks that wait for shared memory.
    """

    def __init__(self, connection: Connection, owner: Owner, *, send_timeout_s: float | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.connection = connection
        self.outbox = connection.outbox
        self.memory = MemoryWaiters(self.loop, connection, self.send)
        self.ended = False
        """Whether nothing is sent or handed out any more."""
        self.closed: asyncio.Future[bool] = self.loop.create_future()
        """Done when the descriptors are closed."""
        self._owner = owner
        self._send_timeout_s = send_timeout_s
        self._thread_id = threading.get_ident()
        self._watch = _Watch(self.loop, -1)
        self._corked = False  # a frame was sent in this turn of the loop: others wait for its end, and go together
        self._in_turn = False
        self._paused = False
        self._stream_ended = False  # of the socket that is a bell
        self._lost: FastsplitError | None = None  # why nothing can be sent
        self._turning: asyncio.Handle | None = None
        self._uncorking: asyncio.Handle | None = None
        self._stalling: asyncio.Handle | None = None
        self._lingering: asyncio.Handle | None = None
        self._head: Frame | None = None  # the first frame that waits, and since when it is the first
        self._head_since = 0.0

    def start(self) -> None:
        """Begins to read. Once, before anything else."""
        self._watch = _Watch(self.loop, self.connection.transport.fileno())
        self._watch.reading(self._on_readable)

    @property
    def in_loop(self) -> bool:
        """Whether the caller runs in the loop's thread, and so must not wait."""
        return threading.get_ident() == self._thread_id

    # ---- out ----

    def send(self, head: bytearray, out: Outgoing | None = None) -> Frame:
        """Queues the frame that the session made last, and sends what can be sent. Never raises."""
        if out is None:
            frame = self.outbox.put([head], len(head))
        else:
            frame = self.outbox.put([head, *out.buffers], len(head) + out.nbytes, out)
        self._send_or_cork()
        return frame

    def send_filled(self, buffers: Sequence[Any]) -> None:
        """The same for a frame with padding."""
        self.outbox.put(buffers, sum(map(len, buffers)))
        self._send_or_cork()

    def queue_control_frames(self) -> None:
        """Queues what must go before the next frame: segments, and returns that are too many to ride on it."""
        if self.outbox.put_control_frames():
            self._send_or_cork()

    def send_returns(self) -> None:
        """Sends all returns: the peer is short of memory."""
        self.outbox.put_returns()
        self._send_or_cork()

    def _send_or_cork(self) -> None:
        if not self._corked and not self.ended:
            self._flush()
            if not self.connection.transport.whole_frames:
                self._corked = True
                self._uncorking = self.loop.call_soon(self._send_more)

    def _send_more(self) -> None:
        """Called at the end of a turn of the loop in which something was sent, and when there is room to write."""
        self._corked = False
        if self._watch.writes or not self.outbox.idle:  # a discarded frame leaves nothing to send, and a watch to end
            self._flush()
            self._owner.progressed()

    def _flush(self) -> None:
        """Sends what can be sent now, and sees to it that the rest follows."""
        if self._lost is not None or self.ended:
            return
        outbox, transport = self.outbox, self.connection.transport
        try:
            outbox.flush()
            if not transport.whole_frames:
                if self._watch.writes or not outbox.idle:
                    self._watch.writing(None if outbox.idle else self._send_more)
            elif outbox.needs_retry:
                self._turn_soon(_NAP_S)
            elif not outbox.idle and not self._in_turn:
                self._rest()
        except FastsplitError as error:
            # The peer may have said why it left: its last words are still to be read, but not in the middle of a turn.
            self._lost = fresh(error)
            self._watch.writing(None)
            self.loop.call_soon(self._read_last_words)
        if self._send_timeout_s is not None and not outbox.idle:
            self._note_head()
            if self._stalling is None:
                self._stalling = self.loop.call_later(self._send_timeout_s, self._look_for_progress)

    def _note_head(self) -> None:
        head = self.outbox.first
        if head is not self._head:
            self._head, self._head_since = head, time.monotonic()

    def _look_for_progress(self) -> None:
        self._stalling = None
        if not self.outbox.idle and self._send_timeout_s is not None:
            self._note_head()
            left_s = self._head_since + self._send_timeout_s - time.monotonic()
            if left_s <= 0:
                late = PeerLostError(f"the client did not take its reply within {self._send_timeout_s} s")
                self._owner.failed(late, tell=False)
            else:
                self._stalling = self.loop.call_later(left_s, self._look_for_progress)

    # ---- in ----

    def pause(self, paused: bool) -> None:
        """Pauses reading, or resumes it. A paused socket is watched only while there is something to send."""
        if paused == self._paused or self.ended:
            return
        self._paused = paused
        if not self.connection.transport.whole_frames:
            self._watch.reading(None if paused else self._on_readable)
        elif not paused and not self._in_turn:
            self._turn_soon()

    def use_ring(self) -> None:
        """The connection goes on through its ring, which may hold something already."""
        self._turn_soon()

    def _on_readable(self) -> None:
        transport = self.connection.transport
        if self.ended or transport.whole_frames:
            going_on = False
            try:
                going_on = transport.drain()
            except FastsplitError as error:
                if not self.ended:
                    self._owner.failed(error, tell=isinstance(error, RemoteProtocolError))
                    return
            if self.ended:
                if not going_on:
                    self.close()
                return
            if not going_on:
                self._stream_ended = True
                self._watch.reading(None)
        self._turn()

    def _turn_soon(self, delay_s: float = 0.0) -> None:
        if self._turning is not None:
            if delay_s:
                return
            self._turning.cancel()
        self._turning = self.loop.call_later(delay_s, self._turn) if delay_s else self.loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Reads and sends what there is, and sees to it that the loop comes back when there is more of either."""
        if self._turning is not None:
            self._turning.cancel()
            self._turning = None
        if self.ended:
            return
        self._in_turn = True
        try:
            self.connection.transport.awake()
            more = self._read_some()
            if not self.outbox.idle:
                self._flush()
            self.memory.wake()
            self._owner.progressed()
            if self._turning is None:
                self._rest(more)
        except FastsplitError as error:  # the bell could not be rung
            self._owner.failed(error, tell=isinstance(error, RemoteProtocolError))
        except BaseException:
            self._owner.failed(ClosedError("the connection was closed: a read was interrupted"), tell=False)
            raise
        finally:
            self._in_turn = False

    def _read_some(self) -> bool:
        """Reads what is there and hands it out. True if there may be more."""
        session = self.connection.session
        end = self.connection.transport.bytes_received + _MAX_NBYTES
        for _ in range(_MAX_READS):
            transport = self.connection.transport  # a ring, perhaps, by now
            if transport.whole_frames and (self._paused or not transport.has_bytes()):
                if self._stream_ended:
                    self._owner.failed(session.end_of_stream(), tell=False)
                return False
            if self._paused or transport.bytes_received >= end:  # a socket's readability will be reported again
                return False
            try:
                events = transport.receive(session, None, blocking=False)
            except DeadlineError:
                return False
            except FastsplitError as error:
                self._owner.failed(error, tell=isinstance(error, RemoteProtocolError))
                return False
            if events is None:
                self._owner.failed(session.end_of_stream(), tell=False)
                return False
            for event in events:
                if isinstance(event, Failed):
                    self._owner.failed(event.error, tell=event.tell)
                else:
                    self._owner.handle(event)
                if self.ended:
                    return False
        return True

    def _rest(self, more: bool = False) -> None:
        """The loop may sleep now, if there is nothing to do in the ring. `more`: there is."""
        transport = self.connection.transport
        if self.ended or not transport.whole_frames:
            return
        sleep_s: float | None = 0.0
        if not more:
            sleep_s = transport.prepare_to_sleep(for_items=not self._paused, for_space=not self.outbox.idle)
        if sleep_s is not None:
            self._turn_soon(sleep_s)

    def _read_last_words(self) -> None:
        assert self._lost is not None
        if self.ended:
            return
        transport = self.connection.transport
        self._paused = False
        if transport.whole_frames:
            with contextlib.suppress(FastsplitError):
                self._stream_ended = not transport.drain()
        self._read_some()
        self._owner.failed(self._lost, tell=False)

    # ---- the end ----

    def goodbye(self) -> None:
        """Sends the frame that is the last of this side, unless another one is half sent. Close next."""
        if not self.ended and self._lost is None:
            self.outbox.send_last(self.connection.session.goodbye())

    def abort(self, reason: FastsplitError | str, linger_s: float) -> None:
        """Sends why the connection ends (what the peer did wrong, or what is short here), unless a frame is half sent.

        Then, after this call, bytes of the peer's are dropped until it closes, for `linger_s` seconds at most, so that
        it can read why.
        """
        if self.ended:
            return
        sent = self._lost is None and self.outbox.send_last(self.connection.session.abort(reason))
        self._stop()
        if not sent or self._stream_ended:
            self.close()
            return
        self.connection.transport.shutdown_writing()
        self._watch.reading(self._on_readable)
        self._lingering = self.loop.call_later(linger_s, self.close)

    def close(self) -> None:
        """Ends the connection at once. Idempotent."""
        if self.closed.done():
            return
        self._stop()
        self._watch.reading(None)
        if self._lingering is not None:
            self._lingering.cancel()
        self.connection.transport.shutdown()
        self.connection.close()
        self.closed.set_result(True)

    def leave(self, why: str) -> None:
        """For a forked child: see system/forked.py. The loop is told nothing: its selector is the parent's, too."""
        self.ended = True
        self._watch = _Watch(self.loop, -1)
        self.connection.leave(why)
        settle_left(self.closed)
        self.memory.leave()

    def _stop(self) -> None:
        """Nothing is sent or handed out from now on."""
        self.ended = True
        self._owner = _NO_OWNER  # breaks the circle of owner and pump
        self._watch.writing(None)
        for handle in (self._turning, self._uncorking, self._stalling):
            if handle is not None:
                handle.cancel()
        self._turning = self._uncorking = self._stalling = None
        self.outbox.close()
        self.connection.session.close()  # it may be a while until the descriptor is closed
        self.memory.close()
