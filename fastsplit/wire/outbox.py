"""The outbox of one connection: frames that wait to be sent, in order. It has no thread, no lock, and never waits.

A blocking end sends a frame straight out (`send`): the transport takes it whole, as a rule, and nothing is queued. What
the transport leaves over waits here until `flush`. An event loop puts frames in (`put`) and flushes when it likes:
small frames then leave together in one system call. Control frames go before the frame that is made next
(`put_control_frames`): segments of shared memory that are new or retired, and returns that are too many to ride along.

Rules. Frames leave in the order in which they were put. A frame of which a byte was sent is sent to its end, or the
connection ends; a frame of which no byte was sent may be discarded, and its returns and loans are then as before. A
segment's descriptor is sent with the segment's own frame, so few descriptors are under way at a time. The methods
belong to the sending side of a connection: one thread calls them at a time, the one that holds `Connection.sending` or
the event loop's. After an exception from `send` or `flush` the stream is in doubt, and the connection must end.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..errors import FastsplitError
from ..tensors import Outgoing
from .frames import MAX_RETURNS
from .session import Session
from .shm.arena import Arena
from .shm.blocks import OwnSegment
from .transport.base import Transport

__all__ = ["Frame", "Outbox"]

_MAX_FLUSH_NBYTES = 4 * 1024**2  # of one `flush`, approximately a millisecond, so that other connections get their turn
_MAX_BATCHED = 48  # buffers of several frames in one system call
_BATCH_NBYTES = 1024**2
_ASK_EVERY_S = 0.02  # how often a side that is short of memory asks for returns


class Frame:
    """A frame that waits to be sent. `out`: its tensors, which must live until then. `returns`: those in its head."""

    __slots__ = ("buffers", "nbytes", "out", "returns", "segment", "started")

    def __init__(self, buffers: Sequence[Any], nbytes: int, out: Outgoing | None, returns: list[int]) -> None:
        self.buffers = buffers  # what is left of it
        self.nbytes = nbytes
        self.out = out
        self.returns = returns
        self.segment: OwnSegment | None = None  # whose descriptor goes along
        self.started = False  # whether a byte of it was sent

    def drop(self) -> None:
        """The frame is sent, or never will be: releases the tensors, even if a caller keeps the frame."""
        self.buffers, self.out, self.segment = (), None, None


class Outbox:
    """What waits to be sent on one connection. `transport` and `arena` are set as the handshake goes on."""

    def __init__(self, session: Session, transport: Transport) -> None:
        self.session = session
        self.transport = transport
        self.arena: Arena | None = None
        self.queued_nbytes = 0
        """Bytes of all frames that wait."""
        self.needs_retry = False
        """Whether the last `flush` could not pass a descriptor beside a ring. No event tells of room for one: flush
        again soon."""
        self.frames: deque[Frame] = deque()
        """Those that wait."""
        self._closed = False
        self._asked_at = 0.0

    @property
    def idle(self) -> bool:
        """Whether no frame waits."""
        return not self.frames

    @property
    def first(self) -> Frame | None:
        """The frame that is sent next, or the rest of it."""
        return self.frames[0] if self.frames else None

    # ---- frames ----

    def send(self, buffers: Sequence[Any], nbytes: int, out: Outgoing | None = None) -> Frame | None:
        """Sends the frame that the session made last straight out. None if the transport took all of it, else the
        frame, which waits: `flush`.

        `nbytes`: of all buffers. `out`: the tensors in it. Raises PeerLostError.
        """
        if self.frames:  # a rest: the order stays
            frame = self.put(buffers, nbytes, out)
            self.flush()
            return frame if frame.buffers else None
        left = self.transport.send(buffers, nbytes)
        if not left:
            return None
        return self._put_rest(buffers, left, nbytes, out)

    def put(self, buffers: Sequence[Any], nbytes: int, out: Outgoing | None = None) -> Frame:
        """Queues the frame that the session made last. `nbytes` and `out` as for `send`."""
        frame = Frame(buffers, nbytes, out, self.session.returns)
        if self._closed:
            frame.drop()
        else:
            self.frames.append(frame)
            self.queued_nbytes += nbytes
        return frame

    def put_rest(self, left: bytes) -> None:
        """Queues what the transport did not take of a frame of which a part was sent."""
        self.put((left,), len(left)).started = True

    def discard(self, frame: Frame, request_id: int) -> bool:
        """Removes a request of which no byte was sent, and has the session forget it. False if it is too late."""
        if frame.started or not frame.buffers:
            return False
        self.frames.remove(frame)
        self.queued_nbytes -= frame.nbytes
        self.session.returns = frame.returns  # of this frame, not of the last one
        self.session.discard(request_id)
        if self.arena is not None and frame.out is not None:
            self.arena.lend(frame.out.placements, -1)
        frame.drop()
        return True

    def flush(self) -> bool:
        """Sends what the transport takes now, about 4 MiB at most. True if no frame waits any more.

        Raises PeerLostError, ResourceError (a descriptor cannot be sent).
        """
        frames, transport = self.frames, self.transport
        self.needs_retry = False
        end = transport.bytes_sent + _MAX_FLUSH_NBYTES
        while frames and transport.bytes_sent < end:
            segment = frames[0].segment
            if segment is not None and segment.fd is not None:
                if not self._send_segment(frames[0], segment, segment.fd):
                    break
            elif not self._send_batch():
                break
        return not frames

    def close(self) -> None:
        """Drops all frames: nothing is sent any more. Idempotent."""
        self._closed = True
        for frame in self.frames:
            frame.drop()
        self.frames.clear()
        self.queued_nbytes = 0

    # ---- small frames without tensors ----

    def put_control_frames(self) -> bool:
        """Queues the frames that must go before the next one. False if there are none.

        If it is interrupted the connection must end: the arena has handed the segments over.
        """
        arena, session = self.arena, self.session
        if arena is None or (not arena.has_pending and len(arena.returns) <= MAX_RETURNS):
            return False
        announced, retired = arena.take_pending() or ((), ())
        for segment in retired:  # first: the peer's cap may have room for the new ones only without these
            self._put_head(session.retire(segment.id))
        for segment in announced:
            frame = self._put_head(session.segment(segment.id, segment.nbytes, segment.name))
            frame.segment = None if segment.fd is None else segment
        while (head := session.return_frame()) is not None:
            self._put_head(head)
        return True

    def put_returns(self) -> None:
        """Queues all returns in frames of their own: the peer is short of memory."""
        while (head := self.session.return_frame(0)) is not None:
            self._put_head(head)

    def send_returns(self) -> None:
        """Sends all returns as `send_small` does, as far as there is room for them now: the peer asks again."""
        while (head := self.session.return_frame(0)) is not None:
            if not self.send_small(head):
                return

    def send_small(self, head: bytearray) -> bool:
        """Sends the frame that the session made last, if there is room for it now. False if it was discarded.

        A ring takes it whole or not at all. A socket may take a part: then the rest waits (`idle` is False), and the
        caller flushes it soon. Raises PeerLostError.
        """
        left: Sequence[Any] = [head] if self.frames else self.transport.send([head], len(head))
        if left and len(left[0]) == len(head):
            self.session.discard_last()
            return False
        if left:
            self._put_rest([head], left, len(head), None)
        return True

    def send_last(self, head: bytearray) -> bool:
        """Sends a frame after which nothing follows, before all that waits. False if it could not be sent whole, or if
        another one is half sent."""
        if self.frames and self.frames[0].started:
            return False
        with contextlib.suppress(FastsplitError):
            return not self.transport.send([head], len(head))
        return False

    def may_ask(self, now: float) -> bool:
        """Whether it is time to ask the peer for returns (again). `now`: time.monotonic()."""
        return now - self._asked_at > _ASK_EVERY_S

    def ask(self, now: float) -> bytearray | None:
        """The frame that asks the peer for its returns, to be sent now; None if the last one has just been sent."""
        if not self.may_ask(now):
            return None
        self._asked_at = now
        return self.session.want_returns()

    # ---- inside ----

    def _put_head(self, head: bytearray) -> Frame:
        return self.put([head], len(head))

    def _put_rest(self, buffers: Sequence[Any], left: Sequence[Any], nbytes: int, out: Outgoing | None) -> Frame:
        frame = self.put(buffers, nbytes, out)
        if not self._closed:
            self._note_part(left)
        return frame

    def _send_segment(self, frame: Frame, segment: OwnSegment, fd: int) -> bool:
        """Sends the first frame with its descriptor. False if the transport takes no more."""
        sent, left = self.transport.send_with_descriptor_now(frame.buffers[0], fd)
        if not sent:
            self.needs_retry = self.transport.needs_retry
            return False
        segment.fd = frame.segment = None  # first: interrupted, no other code may close it again
        os.close(fd)
        if left:
            self._note_part(left)
        else:
            self._note_whole()
        return not left

    def _send_batch(self) -> bool:
        """Sends the first frames in one call. False if the transport takes no more."""
        batch, nbytes = self._next_batch()
        left = self.transport.send(batch, nbytes)
        if not left:
            count = len(batch)
            while count:
                count -= len(self.frames[0].buffers)
                self._note_whole()
            return True
        whole = len(batch) - len(left)  # buffers that were sent to their end
        while len(self.frames[0].buffers) <= whole:
            whole -= len(self.frames[0].buffers)
            self._note_whole()
        self._note_part(left[: len(self.frames[0].buffers) - whole])
        return False

    def _next_batch(self) -> tuple[Sequence[Any], int]:
        """The buffers of the frames that leave together, and their bytes."""
        frames = self.frames
        if len(frames) == 1 or self.transport.whole_frames:
            return frames[0].buffers, frames[0].nbytes
        batch: list[Any] = []
        nbytes = 0
        for frame in frames:
            if batch and (frame.segment is not None or len(batch) >= _MAX_BATCHED or nbytes >= _BATCH_NBYTES):
                break
            batch += frame.buffers
            nbytes += frame.nbytes
        return batch, nbytes

    def _note_whole(self) -> None:
        """The first frame was sent to its end."""
        frame = self.frames.popleft()
        self.queued_nbytes -= frame.nbytes
        frame.started = True
        frame.drop()

    def _note_part(self, left: Sequence[Any]) -> None:
        """`left` is what is left of the first frame."""
        frame = self.frames[0]
        nbytes = sum(memoryview(buffer).nbytes for buffer in left)
        if nbytes < frame.nbytes:
            self.queued_nbytes -= frame.nbytes - nbytes
            frame.started, frame.buffers, frame.nbytes = True, left, nbytes
