"""The slots of a ring in shared memory: how the parts of frames are written, found, and read. It never waits for long.

How it works. Each direction has SLOTS slots of SLOT_NBYTES bytes. Each slot has a binary semaphore, `items`: the writer
copies a part in and posts it; the reader takes it, and may then read the slot. Each half of the slots has another one,
`space`: the reader posts it when it has read that half, and the writer may then fill the half again. These semaphores
are all that a side knows of the other's progress: there is no shared counter whose order against the slots would have
to be argued.

Each side has an `asleep` byte, which the other looks at after each post. "Set, then look" against "post, then look"
needs a full fence between the two steps on each side. On x86 any locked instruction is one. Elsewhere a side takes and
posts one shared semaphore in between (`fence`): one of the two comes first, and the other then sees what was written
before it.

Two implementations. `Slots` here is the reference; native/slots.c does the same in C, and lets the interpreter's lock
go while it polls (wire/backend.py). The two work with each other through the same memory.

Rules. A slot is copied out before anything of it is looked at. Whatever a hostile peer writes into the memory, this
side's own stays its own: wrong semaphores make it read bytes that are not a frame. One thread reads at a time, one
writes. `take` notes what it took in the same step (session.py, interrupts).
"""

from __future__ import annotations

import mmap
import platform
import struct
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, NoReturn

from ...errors import PeerLostError
from ..transport.base import Sink
from . import semaphores

__all__ = ["ASLEEP", "AWAKE", "EAGER", "RING_NBYTES", "SLOTS", "SLOT_NBYTES", "Slots", "format_ring", "is_ring"]

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
AWAKE, ASLEEP, EAGER = 0, 1, 2
"""Values of an `asleep` byte; an eager sleeper spins a little when it is woken early."""
_UNRUNG = 3
_MAX_TRIES = 1000  # to get the fence, which the other side holds for an instant
_STRONGLY_ORDERED = platform.machine() in ("x86_64", "AMD64", "i686", "i386")


def format_ring(memory: mmap.mmap) -> None:
    """Makes fresh shared memory of RING_NBYTES a ring."""
    locks = semaphores.load()
    memory[: _HEADER.size] = _HEADER.pack(_MAGIC, _VERSION, SLOTS, SLOT_NBYTES)
    for at, count in ((_ITEMS_AT[0], SLOTS), (_ITEMS_AT[1], SLOTS), (_SPACE_AT[0], 2), (_SPACE_AT[1], 2)):
        for semaphore in semaphores.at(memory, at, count):
            locks.format(semaphore)
    locks.init(semaphores.at(memory, _FENCE_AT, 1)[0], 1)


def is_ring(memory: mmap.mmap) -> str | None:
    """None if the memory was formatted as a ring of this version, else what it is, and what was expected."""
    header = _HEADER.unpack_from(memory[: _HEADER.size])
    expected = (_MAGIC, _VERSION, SLOTS, SLOT_NBYTES)
    if len(memory) == RING_NBYTES and header == expected:
        return None
    return f"{len(memory)} bytes, header {header}, expected {RING_NBYTES} bytes and {expected}"


class Slots:
    """Both directions of a ring, as one side sees them. `memory`: RING_NBYTES of shared memory, formatted.

    After `close` every method raises PeerLostError.
    """

    rung = heard = 0
    """Bytes that a fast path sent to the peer's bell, and read of this side's (../fastpath.py)."""

    def __init__(self, memory: mmap.mmap, *, is_client: bool) -> None:
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
        self._asleep_at, self._peer_asleep_at = _ASLEEP_AT if is_client else _ASLEEP_AT[::-1]
        first, second = _SLOTS_AT, _SLOTS_AT + SLOTS * SLOT_NBYTES
        self._out_at, self._in_at = (first, second) if is_client else (second, first)
        self._out_slot = self._in_slot = 0
        self._owed = 0  # the half (1 or 2) that was read and is to be given to the peer, _UNRUNG if it was; 0 for none
        self._credit = SLOTS  # slots that may be written
        self._taken = False  # whether the next slot may be read

    # ---- out ----

    def has_space(self) -> bool:
        """Whether a slot may be written."""
        if self._credit:
            return True
        if self._trywait(self._space_out[self._out_slot // _HALF]) != 0:
            return False
        self._credit += _HALF
        return True

    def write(self, part: Any) -> bool:
        """Copies at most SLOT_NBYTES bytes into the next slot, and posts it. False if there is no room.

        Then `must_wake` says whether the peer sleeps. Raises ValueError for a larger part.
        """
        if len(part) > SLOT_NBYTES:
            raise ValueError(f"part: {len(part)} bytes, expected at most {SLOT_NBYTES}")
        if not self._credit and not self.has_space():
            return False
        at = self._out_at + self._out_slot * SLOT_NBYTES
        self._memory[at : at + len(part)] = part
        self._post(self._items_out[self._out_slot])
        self._out_slot = (self._out_slot + 1) % SLOTS
        self._credit -= 1
        return True

    # ---- in ----

    def readable(self) -> bool:
        """Whether there is a slot to read."""
        if self._taken:
            return True
        if 0 in map(self._trywait, self._items_in[self._in_slot][:1]):
            self._taken = True
            return True
        return False

    def poll(self, poll_us: float) -> bool:
        """Looks for a slot to read, for `poll_us` microseconds at most. Whether there is one."""
        if self._taken:
            return True
        trywait, items = self._trywait, self._items_in[self._in_slot]
        now_ns = perf_counter_ns()
        end_ns = now_ns + int(poll_us * 1e3)
        while now_ns < end_ns:
            if 0 in map(trywait, items):
                self._taken = True
                return True
            now_ns = perf_counter_ns()
        return False

    def take(self, sink: Sink) -> None:
        """Copies the slot that is `readable` to `sink.slot`, and goes on to the next. Raises ValueError if none is."""
        if not self._taken:
            raise ValueError("there is no slot to read")
        at = self._in_at + self._in_slot * SLOT_NBYTES
        following = (self._in_slot + 1) % SLOTS
        slot = self._memory[at : at + SLOT_NBYTES]
        owed = 0 if following % _HALF else following // _HALF or 2  # the half that ends here
        sink.slot, self._taken, self._in_slot, self._owed = slot, False, following, owed

    def give_back(self) -> bool:
        """Gives the peer the half that was read to its end. Whether there is one: then the peer may wait for it, and
        `gave_back` follows once it is awake."""
        if not self._owed:
            return False
        if self._owed != _UNRUNG:
            (_,) = map(self._post, (self._space_in[self._owed - 1],))
            self._owed = _UNRUNG
        return True

    def gave_back(self) -> None:
        """The peer was told."""
        self._owed = 0

    # ---- sleeping ----

    def set_asleep(self, value: int) -> bool:
        """Sets this side's `asleep` byte: AWAKE, ASLEEP or EAGER. Whether what is read next is newer than that."""
        self._memory[self._asleep_at] = value
        return self._pass_fence()

    def peer_asleep(self) -> int:
        """The peer's `asleep` byte."""
        value: int = self._memory[self._peer_asleep_at]
        return value

    def must_wake(self) -> bool:
        """After something was posted: whether the peer sleeps, or may do so."""
        return not self._pass_fence() or self._memory[self._peer_asleep_at] != AWAKE

    def wake(self, ring_bell: Callable[[], int]) -> int:
        """Clears the peer's `asleep` byte and calls `ring_bell`, in one step: a sleeper whose byte is clear sleeps on.
        Returns what that returns."""
        self._memory[self._peer_asleep_at] = AWAKE
        return ring_bell()

    def _pass_fence(self) -> bool:
        """Orders what this side wrote before what it reads next. False if it could not get the fence."""
        if _STRONGLY_ORDERED:
            self._trywait(self._barrier)
            return True
        for _ in range(_MAX_TRIES):
            if self._trywait(self._fence) == 0:
                self._post(self._fence)
                return True
        return False

    # ---- the end ----

    def close(self) -> None:
        """Lets the memory go. Idempotent."""
        self._credit, self._taken, self._owed = 0, False, 0  # a call that comes too late then asks `_trywait`
        self._post = self._trywait = _closed  # type: ignore[assignment]
        self._memory = _GONE
        self._items_out = self._space_out = self._space_in = [None] * SLOTS
        self._items_in = [(None,)] * SLOTS
        self._fence = None

    def leave(self) -> None:
        """`close` in a forked child, where no other thread is at work."""
        self.close()


class _Gone:
    """A closed ring's memory: a call that comes too late fails."""

    def __getitem__(self, _: Any) -> int:
        _closed()

    def __setitem__(self, _: Any, __: int) -> None:
        _closed()


_GONE = _Gone()


def _closed(_: Any = None) -> NoReturn:
    raise PeerLostError("the connection is closed")
