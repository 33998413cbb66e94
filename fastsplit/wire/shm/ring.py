"""The control path in shared memory: frames in a ring each way, a bell, and a socket to sleep on.

How it works. A frame begins at the start of a slot and takes as many as it needs (slots.py, which is also where slots
are written, found and read).

How a side sleeps. It polls for a while, then sets its `asleep` byte, looks once more, and sleeps in a read of the
socket. The other side posts, then looks at that byte; if it is set, it clears it and rings the bell: a byte through the
socket. A side that cannot be sure of the order of these steps (an honest peer holds the fence for an instant) rings
without looking, or sleeps for a millisecond only. A socket wakes as fast as sem_clockwait would (docs/notes.md); and
the peer's end is an event, the end of the stream, so that an idle connection costs hardly any CPU and a killed peer is
noticed at once.

Interrupts (session.py). What a read takes, a semaphore and then a slot, is noted in the same step: a read that a
signal's handler ends is made again.

Rules. One thread reads at a time, one writes.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import time
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any

from ...errors import DeadlineError, PeerLostError, RemoteProtocolError
from .. import backend
from ..transport.base import Sink, lost
from ..transport.stream import SEND_FLAGS, Stream
from . import slots as reference
from .beside import Beside
from .segment import make_private
from .slots import ASLEEP, AWAKE, EAGER, RING_NBYTES, SLOT_NBYTES, format_ring, is_ring

__all__ = ["RING_NBYTES", "Ring"]

Slots = backend.compiled(reference.Slots)

_EARLY_US = 40.0
_WAKE = b"w"
_LOOK_EVERY_US = 10_000.0  # while it polls for long, a side looks this often whether the peer is still there
_TICK_S = 0.05
_NAP_S = 0.001


class Ring(Beside):
    """A ring each way beside a socket.

    `memory`: RING_NBYTES of shared memory that the client made, and on which it called `format`.
    """

    def __init__(self, link: Stream, memory: mmap.mmap, *, is_client: bool) -> None:
        """Raises RemoteProtocolError if the memory was not formatted as a ring of this version."""
        wrong = is_ring(memory)
        if wrong is not None:
            raise RemoteProtocolError(f"ring: {wrong}")
        super().__init__(link)
        self._memory: mmap.mmap | None = memory
        self.slots = Slots(memory, is_client=is_client)
        self._send_bell = functools.partial(link.send_now, _WAKE, SEND_FLAGS)

    format = staticmethod(format_ring)

    @property
    def bytes_sent(self) -> int:
        """Bytes through the socket."""
        return super().bytes_sent + self.slots.rung

    @property
    def bytes_received(self) -> int:
        """Bytes through the socket."""
        return super().bytes_received + self.slots.heard

    # ---- out ----

    def send(self, buffers: Sequence[Any], nbytes: int = -1) -> Sequence[Any]:
        """Writes what there is room for, and returns what is left of the one buffer. Raises PeerLostError."""
        (frame,) = buffers
        slots = self.slots
        if len(frame) > SLOT_NBYTES:
            return self._send_long(buffers)
        if not slots.write(frame):
            return buffers
        if slots.must_wake():
            self._ring_bell()
        return ()

    def _send_long(self, buffers: Sequence[Any]) -> Sequence[Any]:
        (frame,) = buffers
        left = memoryview(frame)
        while left and self.slots.write(left[:SLOT_NBYTES]):
            left = left[SLOT_NBYTES:]
        if self.slots.must_wake():
            self._ring_bell()
        if not left:
            return ()
        return [left] if len(left) < len(frame) else buffers

    def send_with_descriptor_now(self, frame: Any, fd: int) -> tuple[bool, Sequence[Any]]:
        """Sends the descriptor through the socket, then the frame; nothing if one of them has no room.

        Raises PeerLostError, ResourceError.
        """
        has_space = self.slots.has_space()
        self.needs_retry = has_space and not self.send_descriptor_now(fd)  # the socket is full
        if not has_space or self.needs_retry:
            return False, [frame]
        return True, self.send([frame])

    def wait(self, deadline: float | None, *, reading: bool) -> tuple[bool, bool]:
        """Waits until there is (something to read, room to write). Raises DeadlineError, PeerLostError."""
        while True:
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineError("the peer took too long to read")
            readable = reading and self.slots.readable()
            writable = self.slots.has_space()
            if readable or writable:
                return readable, writable
            if reading:
                soon = time.monotonic() + _TICK_S
                if not self._sleep(soon if deadline is None else min(soon, deadline), for_space=True):
                    return True, False  # the stream has ended: the next read says so
            else:
                # Another thread may be asleep on the socket, and would take our wake-up for its own.
                if self.link.peer_left():
                    raise PeerLostError("the peer closed the connection")
                time.sleep(0.001)

    # ---- in ----

    def receive(
        self, sink: Sink, deadline: float | None, *, blocking: bool = True, events: list[Any] | None = None
    ) -> list[Any] | None:
        """Reads one slot and gives it to the sink. Returns the sink's events; None at the end of the stream.

        Raises DeadlineError, PeerLostError.
        """
        slots = self.slots
        if sink.slot is None:  # else an earlier read was interrupted
            if not slots.readable() and not self._await_slot(deadline, blocking):
                return None
            slots.take(sink)
        if slots.give_back():
            with contextlib.suppress(PeerLostError):  # what it wrote before it left still counts
                if slots.must_wake():
                    self._ring_bell()
            slots.gave_back()
        slot = sink.slot
        assert slot is not None
        return sink.received_slot(slot, events)

    def has_bytes(self) -> bool:
        """Whether there is a slot to read."""
        return self.slots.readable()

    # ---- sleeping ----

    def prepare_to_sleep(self, *, for_items: bool, for_space: bool) -> float | None:
        """Sets this side's `asleep` byte, then looks once more. Returns how many seconds it may sleep."""
        slots = self.slots
        ordered = slots.set_asleep(ASLEEP)
        has_space = for_space and slots.has_space()
        if (for_items and slots.readable()) or (has_space and not self.needs_retry):
            slots.set_asleep(AWAKE)
            return 0.0
        return None if ordered and not has_space else _NAP_S

    def awake(self) -> None:
        self.slots.set_asleep(AWAKE)

    # ---- the end ----

    def close(self) -> None:
        """Closes the socket, and lets the ring's memory go."""
        super().close()
        self._let_go()

    def leave(self) -> None:
        """The ring becomes a private copy: the child's thread may be about to take a semaphore that is the parent's."""
        super().leave()
        if self._memory is not None:
            make_private(self._memory)
        self.slots.leave()
        self._let_go()

    def _let_go(self) -> None:
        self.slots.close()
        self._memory = None

    # ---- waiting ----

    def _await_slot(self, deadline: float | None, blocking: bool) -> bool:
        """Waits for a slot to read: polls, then sleeps. False at the end of the stream."""
        slots = self.slots
        if not blocking:
            with contextlib.suppress(PeerLostError):  # what was written before the end still counts
                if self.link.drain():  # wake-ups; frames are in the ring
                    raise DeadlineError("nothing to read")
            return slots.readable()
        if self.spin.spin_us and self._spin():
            return True
        while True:
            if not self._sleep(deadline):
                return slots.readable()  # what was written before the end still counts
            if slots.readable() or (self.spin.spin_us and self._poll(_EARLY_US)):
                return True
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineError("nothing came from the peer")

    def _spin(self) -> bool:
        if not self.spin.begin():
            return False
        if self._poll(self.spin.spin_us):
            self.spin.hit()
            return True
        self.spin.miss()
        return False

    def _poll(self, poll_us: float) -> bool:
        if poll_us <= _LOOK_EVERY_US:
            return self.slots.poll(poll_us)
        end_ns = perf_counter_ns() + int(poll_us * 1e3)
        while (left_us := (end_ns - perf_counter_ns()) * 1e-3) > 0:
            if self.slots.poll(min(left_us, _LOOK_EVERY_US)):
                return True
            if self.link.peer_left():
                return False
        return False

    def _sleep(self, deadline: float | None, *, for_space: bool = False) -> bool:
        """Sleeps until the peer has done something, or the deadline. False at the end of the stream."""
        slots = self.slots
        try:
            if not slots.set_asleep(EAGER if self.spin.spin_us else ASLEEP):
                soon = time.monotonic() + _NAP_S
                deadline = soon if deadline is None else min(soon, deadline)
            if slots.readable() or (for_space and slots.has_space()):
                return True
            try:
                return self.link.receive_bell(self._bell, deadline)
            except DeadlineError:
                return True
        finally:
            # Of a ring that was let go: no error in the place of what is raised here.
            with contextlib.suppress(PeerLostError):
                slots.set_asleep(AWAKE)

    def wake_early(self) -> None:
        """Wakes an eager sleeper: the wake-up then takes place while this side makes its frame (docs/notes.md)."""
        with contextlib.suppress(PeerLostError):  # the send itself will say so
            if self.slots.peer_asleep() == EAGER:
                self._ring_bell()

    def _ring_bell(self) -> None:
        """Wakes the peer, which sleeps. Raises PeerLostError."""
        try:
            self.link.bytes_sent += self.slots.wake(self._send_bell)
        except BlockingIOError:
            pass  # it has many bells to read yet
        except OSError as error:
            raise lost(error) from None
