"""One connection on an event loop: what comes in is handed out, what goes out waits in a queue. No thread, no waiting.

How it works. The loop watches the socket. Readable: a bounded number of reads, so that others get their turn.
A frame is sent at once if none is before it; what the kernel or the ring does not take stays in the queue, in order,
until there is room, and reading goes on meanwhile. Frames that are queued within one turn of the loop leave together.

Beside a ring the socket carries the bell: before the loop may sleep, this side says that it is asleep and looks once
more (docs/protocol.md, "The ring"), and whoever rings makes the socket readable. Room in the ring is waited for alike.

Rules. Everything here runs in the loop's thread, and nothing blocks it. A frame of which a byte was sent is sent to its
end, or the connection ends; one of which none was sent can be retracted. The owner is told of each event in the order
of the bytes, and once, as the last thing, that the connection has failed; it then closes or aborts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from ...errors import ArenaFull, ClosedError, DeadlineError, FastsplitError, PeerLostError, RemoteProtocolError, fresh
from ...tensors import Outgoing
from ..connection import Connection
from ..events import Event, Failed
from ..frames import MAX_RETURNS
from ..shm.blocks import OwnSegment
from ..transport.base import Transport

__all__ = ["AT_ONCE", "Frame", "Owner", "Pump", "settle_left", "within"]

AT_ONCE = 0.0
"""A deadline that has passed: what cannot be done without waiting fails."""

_MAX_READS = 64  # in one turn: slots of a ring, or reads of a socket
_MAX_NBYTES = 4 * 1024**2  # in one turn, each way, about: a millisecond's worth
_MAX_BATCHED = 48  # buffers of several frames in one system call
_BATCH_NBYTES = 1024**2
_NAP_S = 0.001
_ASK_EVERY_S = 0.02  # how often a side that is short of memory asks for returns
_LOOK_EVERY_S = 0.01  # how often it looks whether its own tensors have died, of which nobody tells it


class Owner(Protocol):
    """Whose connection it is: a Channel, or a server's side of one."""

    def handle(self, event: Event) -> None:
        """Something came in."""

    def failed(self, error: FastsplitError, *, tell: bool) -> None:
        """The connection cannot go on. `tell`: it is the peer's fault, and it does not know yet."""

    def progressed(self) -> None:
        """Something may have been read or sent: whoever waits for room may look again."""


class _Nobody:
    """The owner of a pump that is closed."""

    def handle(self, event: Event) -> None: ...
    def failed(self, error: FastsplitError, *, tell: bool) -> None: ...
    def progressed(self) -> None: ...


_NOBODY = _Nobody()


class Frame:
    """A frame that waits to be sent, with its tensors."""

    __slots__ = ("buffers", "nbytes", "out", "returns", "segment", "started")

    def __init__(self, buffers: Sequence[Any], out: Outgoing | None, returns: Sequence[int]) -> None:
        self.buffers = buffers
        self.nbytes = (
            sum(memoryview(buffer).nbytes for buffer in buffers) if out is None else len(buffers[0]) + out.nbytes
        )
        self.out = out  # what it holds must live until it is sent
        self.returns = returns
        self.segment: OwnSegment | None = None  # its descriptor goes along
        self.started = False

    def drop(self) -> None:
        """It is sent, or never will be: lets the tensors go, whoever keeps the frame."""
        self.buffers, self.out = (), None


async def within(future: asyncio.Future[bool], deadline: float | None) -> bool:
    """Waits for a future of the caller's own, which it gives True. False when the deadline passed first."""
    timer = None
    if deadline is not None:
        delay_s = max(deadline - time.monotonic(), 0.0)
        timer = future.get_loop().call_later(delay_s, _settle, future, False)
    try:
        return await future
    finally:
        if timer is not None:
            timer.cancel()


def settle_left(future: asyncio.Future[Any], error: BaseException | None = None) -> None:
    """For a forked child: whoever waits goes on, if the loop ever runs there."""
    if not future.done():
        with contextlib.suppress(RuntimeError):  # the loop is closed
            if error is None:
                future.set_result(False)
            else:
                future.set_exception(error)
                future.exception()  # asyncio need not report that nobody asked for it


def _settle(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)


class Pump:
    """Moves the frames of one connection. `send_timeout_s`: how long the peer may take to read one; None for ever."""

    def __init__(self, connection: Connection, owner: Owner, *, send_timeout_s: float | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.connection = connection
        self.queued_nbytes = 0
        """Bytes of frames that wait to be sent."""
        self.ended = False
        """Whether nothing is sent or handed out any more."""
        self.closed: asyncio.Future[bool] = self.loop.create_future()
        """Done when the descriptors are closed."""
        self._owner = owner
        self._send_timeout_s = send_timeout_s
        self._thread_id = threading.get_ident()
        self._fd = -1
        self._queue: deque[Frame] = deque()
        self._corked = False  # a frame was sent in this turn of the loop: others wait for its end, and go together
        self._in_turn = False
        self._paused = False
        self._stream_ended = False  # of the socket beside a ring
        self._lost: FastsplitError | None = None  # why nothing can be sent
        self._watches_reading = self._watches_writing = False
        self._turning: asyncio.Handle | None = None
        self._uncorking: asyncio.Handle | None = None
        self._stalling: asyncio.Handle | None = None
        self._lingering: asyncio.Handle | None = None
        self._head_since = 0.0
        self._short: deque[asyncio.Future[bool]] = deque()  # who waits for memory, in order
        self._looking: asyncio.Handle | None = None
        self._asked_at = 0.0

    def start(self) -> None:
        """Begins to read. Once, before anything else."""
        self._fd = self.connection.transport.fileno()
        self._watch_reading(True)

    @property
    def in_loop(self) -> bool:
        """Whether the caller runs in the loop's thread, and so must not wait."""
        return threading.get_ident() == self._thread_id

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._queue

    # ---- out ----

    def send(self, head: bytearray, out: Outgoing | None = None) -> Frame:
        """Queues the frame that the session made last, and sends what can be sent. Never raises."""
        return self._queue_frame(Frame([head] if out is None else [head, *out.buffers], out, self._returns()))

    def send_filled(self, buffers: Sequence[Any]) -> None:
        """The same for a frame in several pieces that is no request and no answer."""
        self._queue_frame(Frame(buffers, None, self._returns()))

    def _returns(self) -> Sequence[int]:
        return self.connection.session.returns

    def _queue_frame(self, frame: Frame) -> Frame:
        if self.ended:
            return frame
        if not self._queue:
            self._head_since = time.monotonic()
        self._queue.append(frame)
        self.queued_nbytes += frame.nbytes
        if not self._corked:
            self._flush()
            if not self.connection.transport.whole_frames:
                self._corked = True
                self._uncorking = self.loop.call_soon(self._uncork)
        return frame

    def discard(self, frame: Frame, request_id: int) -> bool:
        """Takes a request back of which no byte was sent, and forgets it. False if it is too late for that."""
        if frame.started or self.ended:
            return False
        self._queue.remove(frame)
        self.queued_nbytes -= frame.nbytes
        session = self.connection.session
        session.returns = list(frame.returns)  # of this frame, not of the last one
        session.discard(request_id)
        if self.connection.arena is not None and frame.out is not None:
            self.connection.arena.lend(frame.out.placements, -1)
        return True

    def queue_control_frames(self) -> None:
        """Queues what must go before the next frame: segments, and returns that are too many to ride on it."""
        arena, session = self.connection.arena, self.connection.session
        if arena is None or (not arena.has_pending and len(arena.returns) <= MAX_RETURNS):
            return
        pending = arena.take_pending()
        if pending is not None:
            for segment in pending[1]:  # first, since what is new may only fit the peer's cap without them
                self.send(session.retire(segment.id))
            for segment in pending[0]:
                frame = Frame([session.segment(segment.id, segment.nbytes, segment.name)], None, self._returns())
                frame.segment = segment if segment.fd is not None else None
                self._queue_frame(frame)
        while (head := session.return_frame()) is not None:
            self.send(head)

    def send_returns(self) -> None:
        """Sends all returns: the peer is short of memory."""
        while not self.ended and (frame := self.connection.session.return_frame(0)) is not None:
            self.send(frame)

    def _uncork(self) -> None:
        self._corked = False
        if self._queue:
            self._flush()
            self._progressed()

    def _flush(self) -> None:
        """Sends what can be sent now, and sees to it that the rest follows."""
        if self._lost is not None or self.ended:
            return
        try:
            if self.connection.transport.whole_frames:
                self._flush_ring(self.connection.transport)
            else:
                self._flush_socket()
        except FastsplitError as error:
            # The peer may have said why it left: its last words are still to be read, but not in the middle of a turn.
            self._lost = fresh(error)
            self._watch_writing(False)
            self.loop.call_soon(self._read_last_words)
        if self._queue and self._stalling is None and self._send_timeout_s is not None:
            self._stalling = self.loop.call_later(self._send_timeout_s, self._look_for_progress)

    def _flush_socket(self) -> None:
        link, queue = self.connection.transport, self._queue
        most = link.bytes_sent + _MAX_NBYTES
        while queue and link.bytes_sent < most:
            batch: list[Any] = []
            nbytes = 0
            for frame in queue:
                if batch and (frame.segment is not None or len(batch) >= _MAX_BATCHED or nbytes >= _BATCH_NBYTES):
                    break
                batch += frame.buffers
                nbytes += frame.nbytes
                if frame.segment is not None:
                    break
            segment = queue[0].segment
            left: Sequence[Any]
            if segment is not None and segment.fd is not None:
                sent, left = link.send_with_descriptor_now(batch[0], segment.fd)
                if sent:
                    self._sent_descriptor(queue[0])
            else:
                left = link.send(batch, nbytes)
            whole = len(batch) - len(left)  # buffers that are sent to their end
            while queue and len(queue[0].buffers) <= whole:
                whole -= len(queue[0].buffers)
                self._sent()
            if left:
                self._sent_part(left[: len(queue[0].buffers) - whole])
                break
        self._watch_writing(bool(queue))

    def _flush_ring(self, link: Transport) -> None:
        queue = self._queue
        while queue:
            frame = queue[0]
            if frame.segment is not None and frame.segment.fd is not None:
                sent, left = link.send_with_descriptor_now(frame.buffers[0], frame.segment.fd)
                if not sent:
                    break
                self._sent_descriptor(frame)
            else:
                left = link.send(frame.buffers)
            if left:
                self._sent_part(left)
                break
            self._sent()
        if queue and not self._in_turn:
            self._rest(link)

    def _sent(self) -> None:
        frame = self._queue.popleft()
        frame.started = True
        frame.drop()
        self.queued_nbytes -= frame.nbytes
        self._head_since = time.monotonic()

    def _sent_part(self, left: Sequence[Any]) -> None:
        """Takes note of what is left of the first frame."""
        frame = self._queue[0]
        nbytes = sum(memoryview(buffer).nbytes for buffer in left)
        if nbytes < frame.nbytes:
            frame.started = True
            self.queued_nbytes -= frame.nbytes - nbytes
            frame.buffers, frame.nbytes = left, nbytes

    @staticmethod
    def _sent_descriptor(frame: Frame) -> None:
        segment = frame.segment
        assert segment is not None and segment.fd is not None
        fd, segment.fd, frame.segment = segment.fd, None, None
        os.close(fd)

    def _look_for_progress(self) -> None:
        self._stalling = None
        if self._queue and self._send_timeout_s is not None:
            left_s = self._head_since + self._send_timeout_s - time.monotonic()
            if left_s <= 0:
                late = PeerLostError(f"the client did not take its reply within {self._send_timeout_s} s")
                self._owner.failed(late, tell=False)
            else:
                self._stalling = self.loop.call_later(left_s, self._look_for_progress)

    # ---- in ----

    def pause(self, paused: bool) -> None:
        """Stops reading, or goes on. Of a socket nothing is seen meanwhile, unless there is something to send."""
        if paused == self._paused or self.ended:
            return
        self._paused = paused
        if not self.connection.transport.whole_frames:
            self._watch_reading(not paused)
        elif not paused and not self._in_turn:
            self._turn_soon()

    def use_ring(self) -> None:
        """The connection goes on through its ring, which may hold something already."""
        self._turn_soon()

    def _on_readable(self) -> None:
        link = self.connection.transport
        if self.ended:
            self._drop()
            return
        if link.whole_frames:
            try:
                self._stream_ended = not link.drain()
            except FastsplitError as error:
                self._owner.failed(error, tell=isinstance(error, RemoteProtocolError))
                return
            if self._stream_ended:
                self._watch_reading(False)
        self._turn()

    def _on_writable(self) -> None:
        self._flush()
        self._progressed()

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
            self._do_turn()
        except FastsplitError as error:  # the bell could not be rung
            self._fail(error)
        except BaseException:
            self._fail(ClosedError("the connection was closed: a read was interrupted"))
            raise
        finally:
            self._in_turn = False

    def _do_turn(self) -> None:
        self.connection.transport.awake()
        more = self._read_some()
        if self._queue:
            self._flush()
        if self._short:
            self._wake_short()
        self._progressed()
        link = self.connection.transport  # a ring, perhaps, by now
        if link.whole_frames and not self.ended and self._turning is None:
            if more:
                self._turn_soon()
            else:
                self._rest(link)

    def _read_some(self) -> bool:
        """Reads what is there and hands it out. True if there may be more."""
        session = self.connection.session
        most = self.connection.transport.bytes_received + _MAX_NBYTES
        for _ in range(_MAX_READS):
            link = self.connection.transport
            if link.whole_frames and (self._paused or not link.has_bytes()):
                if self._stream_ended:
                    self._owner.failed(session.end_of_stream(), tell=False)
                return False
            if self._paused or link.bytes_received >= most:  # a socket's readability will be reported again
                return False
            try:
                events = link.receive(session, None, blocking=False)
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

    def _rest(self, link: Transport) -> None:
        """The loop may sleep now, if there is nothing to do in the ring."""
        sleep_s = link.prepare_to_sleep(for_items=not self._paused, for_space=bool(self._queue))
        if sleep_s is not None:
            self._turn_soon(sleep_s)

    def _read_last_words(self) -> None:
        assert self._lost is not None
        if self.ended:
            return
        link = self.connection.transport
        self._paused = False
        if link.whole_frames:
            with contextlib.suppress(FastsplitError):
                self._stream_ended = not link.drain()
        self._read_some()
        if not self.ended:
            self._owner.failed(self._lost, tell=False)

    def _progressed(self) -> None:
        if not self.ended:
            self._owner.progressed()

    # ---- memory ----

    async def memory(self, full: ArenaFull, deadline: float | None, *, again: bool) -> bool:
        """Waits for a sign that there may be room in our shared memory now, in the order of those who ask.

        `full`: what the arena said. `again`: there was a sign, but no room. False if the deadline has passed, or if
        there is nothing to wait for.
        """
        arena = self.connection.arena
        if arena is None or arena.closed or self.ended or not full.may_wait:
            return False
        future: asyncio.Future[bool] = self.loop.create_future()
        if again:
            self._short.appendleft(future)
        else:
            self._short.append(future)
        if self._looking is None:
            self._look()
        try:
            return await within(future, deadline)
        finally:
            with contextlib.suppress(ValueError):
                self._short.remove(future)

    def found_memory(self) -> None:
        """Who waited has found room: there may be some for the next one."""
        if self._short:
            self._wake_short()

    def ask_for_returns(self) -> None:
        """Our memory is full: asks the peer for returns, now and then."""
        now = time.monotonic()
        if now - self._asked_at > _ASK_EVERY_S and not self.ended:
            self._asked_at = now
            self.send(self.connection.session.want_returns())

    def on_memory_pressure(self, _: float | None) -> None:
        """Called by an arena that is full, in a thread that may wait."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            if time.monotonic() - self._asked_at > _ASK_EVERY_S:
                self.loop.call_soon_threadsafe(self.ask_for_returns)
        time.sleep(0.001)

    def _look(self) -> None:
        self._looking = None
        if self._short:
            self.ask_for_returns()
            self._looking = self.loop.call_later(_LOOK_EVERY_S, self._look_again)

    def _look_again(self) -> None:
        self._wake_short()
        self._look()

    def _wake_short(self) -> None:
        while self._short:
            future = self._short.popleft()
            if not future.done():
                future.set_result(True)
                return

    # ---- the end ----

    def _fail(self, error: FastsplitError) -> None:
        if not self.ended:
            self._owner.failed(error, tell=isinstance(error, RemoteProtocolError))

    def goodbye(self) -> None:
        """Says that this side will say nothing more, unless a frame is half sent. Close next."""
        self._say(self.connection.session.goodbye())

    def abort(self, reason: FastsplitError | str, linger_s: float) -> None:
        """Tells the peer how it broke the protocol, or what is short here; drops what it still says, and closes.

        It is not told if a frame is half sent. All that after this call, for `linger_s` seconds at most: so that the
        peer can read why.
        """
        if self.ended:
            return
        told = self._say(self.connection.session.abort(reason))
        self._stop()
        if not told or self._stream_ended:
            self.close()
            return
        self.connection.transport.shutdown_writing()
        self._watch_reading(True)
        self._lingering = self.loop.call_later(linger_s, self.close)

    def _say(self, frame: bytearray) -> bool:
        if self.ended or self._lost is not None or (self._queue and self._queue[0].started):
            return False
        with contextlib.suppress(FastsplitError):
            return not self.connection.transport.send([frame])
        return False

    def _drop(self) -> None:
        try:
            going_on = self.connection.transport.drain()
        except FastsplitError:
            going_on = False
        if not going_on:
            self.close()

    def close(self) -> None:
        """Ends the connection at once. Idempotent."""
        if self.closed.done():
            return
        self._stop()
        self._watch_reading(False)
        if self._lingering is not None:
            self._lingering.cancel()
        self.connection.transport.shutdown()
        self.connection.close()
        self._owner = _NOBODY  # a circle
        self.closed.set_result(True)

    def leave(self, why: str) -> None:
        """For a forked child: see forked.py. The loop is told nothing: its selector is the parent's, too."""
        self.ended = True
        self._watches_reading = self._watches_writing = False
        self._queue.clear()
        self.connection.leave(why)
        settle_left(self.closed)
        for future in self._short:
            settle_left(future)

    def _stop(self) -> None:
        """Nothing is sent or handed out from now on."""
        self.ended = True
        self._watch_writing(False)
        for handle in (self._turning, self._uncorking, self._stalling, self._looking):
            if handle is not None:
                handle.cancel()
        self._turning = self._uncorking = self._stalling = self._looking = None
        for frame in self._queue:
            frame.drop()
        self._queue.clear()
        self.queued_nbytes = 0
        self.connection.session.close()  # it may be a while until the descriptor is closed
        for future in list(self._short):
            _settle(future, False)

    def _watch_reading(self, wanted: bool) -> None:
        if wanted != self._watches_reading:
            self._watches_reading = wanted
            if wanted:
                self.loop.add_reader(self._fd, self._on_readable)
            elif not self.loop.is_closed():
                self.loop.remove_reader(self._fd)

    def _watch_writing(self, wanted: bool) -> None:
        if wanted != self._watches_writing:
            self._watches_writing = wanted
            if wanted:
                self.loop.add_writer(self._fd, self._on_writable)
            elif not self.loop.is_closed():
                self.loop.remove_writer(self._fd)
