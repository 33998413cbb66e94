"""The control path in shared memory: frames in a ring each way, a bell, and a socket to sleep on.

How it works. Each direction has SLOTS slots of SLOT_NBYTES bytes. A frame begins at the start of a slot and takes as
many as it needs. Each slot has a binary semaphore, `items`: the writer copies a part in and posts it; the reader takes
it, and may then read the slot. Each half of the slots has another one, `space`: the reader posts it when it has read
that half, and the writer may then fill the half again. These semaphores are all that a side knows of the other's
progress: there is no shared counter whose order against the slots would have to be argued.

How a side sleeps. It spins on `items` for a while, then sets its `asleep` byte, looks once more, and sleeps in a read
of the socket. The other side posts, then looks at that byte; if it is set, it clears it and rings the bell: a byte
through the socket. "Set, then look" against "post, then look" needs a full fence between the two steps on each side. On
x86 any locked instruction is one. Elsewhere a side takes and posts one shared semaphore in between (`fence`): one of
the two comes first, and the other then sees what was written before it. A side that cannot get it (an honest peer holds
it for an instant) rings without looking, or sleeps for a millisecond only. A socket wakes as fast as sem_clockwait
would (docs/notes.md); and the peer's end is an event, the end of the stream, so that an idle connection costs hardly
any CPU and a killed peer is noticed at once.

Interrupts (session.py). What a read takes, a semaphore and then a slot, is noted in the same step: a read that a
signal's handler ends is made again.

Rules. The slot is copied out before anything of it is looked at. Whatever a hostile peer writes into the ring, this
side's memory stays its own: wrong semaphores make it read bytes that are not a frame, which the session refuses. One
thread reads at a time, one writes.
"""

from __future__ import annotations

import contextlib
import mmap
import platform
import struct
import time
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any

from ...errors import DeadlineError, PeerLostError, RemoteProtocolError
from ..transport.base import Sink, lost
from ..transport.stream import SEND_FLAGS, Stream
from . import semaphores
from .beside import Beside
from .segment import make_private

__all__ = ["RING_NBYTES", "SLOTS", "SLOT_NBYTES", "Ring"]

SLOTS = 64
SLOT_NBYTES = 1024
_HALF = SLOTS // 2
_MAGIC = b"FSPLRING"
_HEADER = struct.Struct("<8sIII")  # magic, version, slots, bytes of a slot
_VERSION = 1
_ASLEEP_AT = (64, 128)  # client's, server's
_FENCE_AT = 192
_SPACE_AT = (256, 384)  # two for each direction: the client's, the server's
_ITEMS_AT = (4096, 8192)  # SLOTS for each direction
_SLOTS_AT = 12288
RING_NBYTES = _SLOTS_AT + 2 * SLOTS * SLOT_NBYTES
_ASLEEP, _EAGER = 1, 2  # values of an `asleep` byte; an eager sleeper spins a little when it is woken early
_EARLY_US = 40.0
_WAKE = b"w"
_UNRUNG = 3
_LOOK_EVERY_NS = 10_000_000  # while it spins for long, a side looks this often whether the peer is still there
_TICK_S = 0.05
_MAX_TRIES = 1000  # to get the fence, which the other side holds for an instant
_NAP_S = 0.001
_STRONGLY_ORDERED = platform.machine() in ("x86_64", "AMD64", "i686", "i386")


class Ring(Beside):
    """A ring each way beside a socket.

    `memory`: RING_NBYTES of shared memory that the client made, and on which it called `format`.
    """

    def __init__(self, link: Stream, memory: mmap.mmap, *, is_client: bool) -> None:
        """Raises RemoteProtocolError if the memory was not formatted as a ring of this version."""
        header = _HEADER.unpack_from(memory[: _HEADER.size])
        if len(memory) != RING_NBYTES or header != (_MAGIC, _VERSION, SLOTS, SLOT_NBYTES):
            raise RemoteProtocolError(
                f"ring: {len(memory)} bytes, header {header}, expected {RING_NBYTES} bytes and "
                f"{(_MAGIC, _VERSION, SLOTS, SLOT_NBYTES)}"
            )
        super().__init__(link)
        locks = semaphores.load()
        self._memory: Any = memory  # _GONE once it is closed
        self._post, self._trywait = locks.post, locks.trywait
        mine, theirs = (0, 1) if is_client else (1, 0)
        self._items_out: list[Any] = semaphores.at(memory, _ITEMS_AT[mine], SLOTS)
        # each four times: `0 in map(trywait, four)` tries up to four times, and is one step with what follows it
        self._items_in: list[Any] = [(item,) * 4 for item in semaphores.at(memory, _ITEMS_AT[theirs], SLOTS)]
        self._space_out: list[Any] = semaphores.at(memory, _SPACE_AT[mine], 2)
        self._space_in: list[Any] = semaphores.at(memory, _SPACE_AT[theirs], 2)
        self._fence: Any = semaphores.at(memory, _FENCE_AT, 1)[0]
        self._barrier = locks.barrier
        self._strongly_ordered = _STRONGLY_ORDERED
        self._asleep_at, self._peer_asleep_at = _ASLEEP_AT if is_client else _ASLEEP_AT[::-1]
        first, second = _SLOTS_AT, _SLOTS_AT + SLOTS * SLOT_NBYTES
        self._out_at, self._in_at = (first, second) if is_client else (second, first)
        self._out_slot = self._in_slot = 0
        self._owed = 0  # the half (1 or 2) that was read and is to be given to the peer, _UNRUNG if it was; 0 for none
        self._credit = SLOTS  # slots that may be written
        self._taken = 0  # slots that may be read, and have not been

    @staticmethod
    def format(memory: mmap.mmap) -> None:
        """Makes fresh shared memory a ring."""
        locks = semaphores.load()
        memory[: _HEADER.size] = _HEADER.pack(_MAGIC, _VERSION, SLOTS, SLOT_NBYTES)
        for at, count in ((_ITEMS_AT[0], SLOTS), (_ITEMS_AT[1], SLOTS), (_SPACE_AT[0], 2), (_SPACE_AT[1], 2)):
            for semaphore in semaphores.at(memory, at, count):
                locks.format(semaphore)
        locks.init(semaphores.at(memory, _FENCE_AT, 1)[0], 1)

    # ---- out ----

    def send(self, buffers: Sequence[Any], nbytes: int = -1) -> Sequence[Any]:
        """Writes what there is room for, and returns what is left of the one buffer. Raises PeerLostError."""
        (frame,) = buffers
        size = len(frame)
        if size > SLOT_NBYTES or not self._credit:
            return self._send_long(buffers)
        at = self._out_at + self._out_slot * SLOT_NBYTES
        self._memory[at : at + size] = frame
        self._post(self._items_out[self._out_slot])
        self._out_slot = (self._out_slot + 1) % SLOTS
        self._credit -= 1
        if self._strongly_ordered:  # `_wake_peer`, without its two calls
            self._trywait(self._barrier)
            if not self._memory[self._peer_asleep_at]:
                return ()
        self._wake_peer()
        return ()

    def _send_long(self, buffers: Sequence[Any]) -> Sequence[Any]:
        (frame,) = buffers
        left = memoryview(frame)
        while left:
            if not self._credit and not self._find_space():
                break
            part = left[:SLOT_NBYTES]
            at = self._out_at + self._out_slot * SLOT_NBYTES
            self._memory[at : at + len(part)] = bytes(part)
            self._post(self._items_out[self._out_slot])
            self._out_slot = (self._out_slot + 1) % SLOTS
            self._credit -= 1
            left = left[SLOT_NBYTES:]
        self._wake_peer()
        if not left:
            return ()
        return [left] if len(left) < len(frame) else buffers

    def send_with_descriptor_now(self, frame: Any, fd: int) -> tuple[bool, Sequence[Any]]:
        """Sends the descriptor through the socket, then the frame; nothing if one of them has no room.

        Raises PeerLostError, ResourceError.
        """
        has_space = self._credit > 0 or self._find_space()
        self.needs_retry = has_space and not self.send_descriptor_now(fd)  # the socket is full
        if not has_space or self.needs_retry:
            return False, [frame]
        return True, self.send([frame])

    def wait(self, deadline: float | None, *, reading: bool) -> tuple[bool, bool]:
        """Waits until there is (something to read, room to write). Raises DeadlineError, PeerLostError."""
        while True:
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineError("the peer took too long to read")
            readable = reading and self._readable()
            writable = self._credit > 0 or self._find_space()
            if readable or writable:
                return readable, writable
            if reading:
                soon = time.monotonic() + _TICK_S
                if not self._sleep(soon if deadline is None else min(soon, deadline), for_space=True):
                    return True, False  # the stream has ended: the next read says so
            else:
                # Another thread may be asleep on the socket, and would take our wake-up for its own.
                if self._link.peer_left():
                    raise PeerLostError("the peer closed the connection")
                time.sleep(0.001)

    # ---- in ----

    def receive(
        self, sink: Sink, deadline: float | None, *, blocking: bool = True, events: list[Any] | None = None
    ) -> list[Any] | None:
        """Reads one slot and gives it to the sink. Returns the sink's events; None at the end of the stream.

        Raises DeadlineError, PeerLostError.
        """
        slot = sink.slot
        if slot is None:  # else an earlier read was interrupted
            if not self._readable() and not self._await_item(deadline, blocking):
                return None
            at = self._in_at + self._in_slot * SLOT_NBYTES
            following = (self._in_slot + 1) % SLOTS
            slot = self._memory[at : at + SLOT_NBYTES]
            owed = 0 if following % _HALF else following // _HALF or 2  # the half that ends here
            sink.slot, self._taken, self._in_slot, self._owed = slot, 0, following, owed
        if self._owed:
            if self._owed != _UNRUNG:
                (_,) = map(self._post, (self._space_in[self._owed - 1],))
                self._owed = _UNRUNG
            with contextlib.suppress(PeerLostError):  # what it wrote before it left still counts
                self._wake_peer()
            self._owed = 0
        return sink.received_slot(slot, events)

    def has_bytes(self) -> bool:
        """Whether there is a slot to read."""
        return self._readable()

    # ---- sleeping ----

    def prepare_to_sleep(self, *, for_items: bool, for_space: bool) -> float | None:
        """Sets this side's `asleep` byte, then looks once more. Returns how many seconds it may sleep."""
        self._memory[self._asleep_at] = _ASLEEP
        ordered = self._pass_fence()
        has_space = for_space and (self._credit > 0 or self._find_space())
        if (for_items and self._readable()) or (has_space and not self.needs_retry):
            self._memory[self._asleep_at] = 0
            return 0.0
        return None if ordered and not has_space else _NAP_S

    def awake(self) -> None:
        self._memory[self._asleep_at] = 0

    # ---- the end ----

    def close(self) -> None:
        """Closes the socket, and lets the ring's memory go."""
        super().close()
        self._let_go()

    def leave(self) -> None:
        """The ring becomes a private copy: the child's thread may be about to take a semaphore that is the parent's."""
        super().leave()
        if self._memory is not _GONE:
            make_private(self._memory)
        self._let_go()

    def _let_go(self) -> None:
        self._credit = self._taken = 0  # a call that comes too late then asks `_trywait`
        self._post = self._trywait = _closed  # type: ignore[assignment]
        self._memory = _GONE
        self._items_out = self._space_out = self._space_in = [None] * SLOTS
        self._items_in = [(None,)] * SLOTS
        self._fence = None

    # ---- waiting ----

    def _readable(self) -> bool:
        if self._taken:
            return True
        if 0 in map(self._trywait, self._items_in[self._in_slot][:1]):
            self._taken = 1
            return True
        return False

    def _find_space(self) -> bool:
        if self._trywait(self._space_out[self._out_slot // _HALF]) != 0:
            return False
        self._credit += _HALF
        return True

    def _await_item(self, deadline: float | None, blocking: bool) -> bool:
        """Waits for a slot to read: spins, then sleeps. False at the end of the stream."""
        if not blocking:
            with contextlib.suppress(PeerLostError):  # what was written before the end still counts
                if self._link.drain():  # wake-ups; frames are in the ring
                    raise DeadlineError("nothing to read")
            return self._readable()
        if self.spin.spin_us and self._spin_for_item():
            return True
        while True:
            if not self._sleep(deadline):
                return self._readable()  # what was written before the end still counts
            if self._readable() or (self.spin.spin_us and self._spin_for(_EARLY_US)):
                return True
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineError("nothing came from the peer")

    def _spin_for_item(self) -> bool:
        if not self.spin.begin():
            return False
        if self._spin_for(self.spin.spin_us):
            self.spin.hit()
            return True
        self.spin.miss()
        return False

    def _spin_for(self, spin_us: float) -> bool:
        trywait, items = self._trywait, self._items_in[self._in_slot]
        now_ns = perf_counter_ns()
        end_ns = now_ns + int(spin_us * 1e3)
        look_ns = now_ns + _LOOK_EVERY_NS
        while now_ns < end_ns:
            if 0 in map(trywait, items):
                self._taken = 1
                return True
            now_ns = perf_counter_ns()
            if now_ns > look_ns:
                if self._link.peer_left():
                    break
                look_ns = now_ns + _LOOK_EVERY_NS
        return False

    def _sleep(self, deadline: float | None, *, for_space: bool = False) -> bool:
        """Sleeps until the peer has done something, or the deadline. False at the end of the stream."""
        memory, at = self._memory, self._asleep_at
        memory[at] = _EAGER if self.spin.spin_us else _ASLEEP
        if not self._pass_fence():
            soon = time.monotonic() + _NAP_S
            deadline = soon if deadline is None else min(soon, deadline)
        try:
            if self._readable() or (for_space and self._find_space()):
                return True
            try:
                return self._link.receive_bell(self._bell, deadline)
            except DeadlineError:
                return True
        finally:
            memory[at] = 0

    def wake_early(self) -> None:
        """Wakes an eager sleeper: the wake-up then takes place while this side makes its frame (docs/notes.md)."""
        memory = self._memory
        if memory is not _GONE and memory[self._peer_asleep_at] == _EAGER:
            with contextlib.suppress(PeerLostError):  # the send itself will say so
                self._ring_bell()

    def _wake_peer(self) -> None:
        if not self._pass_fence() or self._memory[self._peer_asleep_at]:
            self._ring_bell()

    def _ring_bell(self) -> None:
        """Clears the peer's `asleep` byte and wakes it, in one step: a sleeper whose byte is clear sleeps on."""
        send, memory, at = self._link.send_now, self._memory, self._peer_asleep_at
        try:
            memory[at] = 0
            self._link.bytes_sent += send(_WAKE, SEND_FLAGS)
        except BlockingIOError:
            pass  # it has many bells to read yet
        except OSError as error:
            raise lost(error) from None

    def _pass_fence(self) -> bool:
        """Orders what this side wrote before what it reads next. False if it could not get the fence."""
        if self._strongly_ordered:
            self._trywait(self._barrier)
            return True
        for _ in range(_MAX_TRIES):
            if self._trywait(self._fence) == 0:
                self._post(self._fence)
                return True
        return False


class _Gone:
    """A closed ring's memory: a call that comes too late fails."""

    def __getitem__(self, _: Any) -> int:
        raise PeerLostError("the connection is closed")

    def __setitem__(self, _: Any, __: int) -> None:
        raise PeerLostError("the connection is closed")


_GONE = _Gone()


def _closed(_: Any) -> int:
    raise PeerLostError("the connection is closed")
