"""The shared memory of one connection: our segments, the peer's, and what is held of them.

How ownership moves. Each side cuts blocks out of segments of its own. A tensor that lies in any segment of the
connection is sent as (segment, offset): a loan, if the block is ours. The receiver gets a view that holds a lease; the
death of its last view (numpy or torch) puts (segment, offset) on the list of returns, which go out with the next frame.
The owner uses a block again when its own views are dead and every loan of it was returned. A side may send the other's
memory back while it holds a lease on it; its return can only follow, and by then the owner has a lease of its own.

Rules. What the peer says is checked against our own tables: a place must lie in a segment that is mapped; a place in
our own memory must be one that we have lent, and so must a return. No destructor waits for a lock: leases die into
deques, which later calls empty. A full arena waits for returns until a deadline, then raises ArenaFull. Leases outlive
the connection: their memory stays mapped and valid.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import ArenaFull, ReentrantCallError, RemoteProtocolError, ResourceError
from ...schema.descriptor import TensorDesc
from ...schema.limits import Limits
from ...system.forked import renew
from ...system.shortage import shortage
from ...tensors.pool import Lease, Memory
from .. import backend
from .blocks import Block, Blocks, OwnSegment, block_nbytes
from .segment import Hook, Memfd, Named, Segment

__all__ = ["IDLE_S", "Arena"]

IDLE_S = 30.0
"""How long a segment must have been unused before it is released to the system."""

_FIRST_SEGMENT_NBYTES = 1024**2
_MAX_STEP_NBYTES = 256 * 1024**2  # segments double the arena, up to this at a time
_GRAIN_NBYTES = 64 * 1024
_MAX_DEAD = 64  # leases that may wait for an allocation before the reader sorts them out
_TRIM_EVERY_S = 10.0
_UINT8 = np.dtype(np.uint8)
_ENDED = "no shared memory: the connection has ended"


class Arena:
    """Shared memory of one connection.

    Every thread may call `allocate`, `trim` and `place`. The other methods under "out" are the sender's, those under
    "in" the reader's. `factory`: makes and opens segments. `on_memory_pressure(deadline)`: called when memory is short;
    it does something that may bring returns in, and comes back after some milliseconds at most. `hook`: see
    segment.Hook.
    """

    def __init__(
        self,
        *,
        is_client: bool,
        factory: Memfd | Named,
        take_descriptor: Callable[[], int | None],
        on_memory_pressure: Callable[[float | None], None],
        limits: Limits,
        peer_limits: Limits,
        hook: Hook | None = None,
    ) -> None:
        self.factory = factory
        self._take_descriptor = take_descriptor
        self._on_memory_pressure = on_memory_pressure
        self._hook = hook
        self._limits = limits
        self._max_nbytes = peer_limits.max_shared_nbytes
        self._max_segments = peer_limits.max_segments
        self._next_id = 1 if is_client else 2  # the client's are odd, the server's even
        self._lock = threading.RLock()  # guards `_blocks`, and changes of `_own` and `_retired`
        self._blocks = Blocks()
        self._own: dict[int, OwnSegment] = {}
        self._peers: dict[int, Segment] = {}
        self._map: tuple[list[int], list[Segment]] = ([], [])  # all segments by address; replaced, never changed
        self.dead: deque[Block] = deque()
        """Blocks of ours, once for each lease that died."""
        self.idle: deque[Block] = deque()
        """Blocks of ours that a fast path found to be free (../fastpath.py)."""
        self.returns: deque[tuple[int, int]] = deque()
        """(segment, offset) of leases on the peer's memory that died, to be sent."""
        self.has_pending = False
        """Whether there are segments to announce or to retire before the next frame."""
        self._unannounced: list[OwnSegment] = []
        self._retired: list[OwnSegment] = []
        self._trimmed_at = time.monotonic()
        self._lease: Any = backend.lease or Lease.of
        self.closed = False
        self.shared_nbytes = 0
        """Tensor bytes that came in by reference."""

    # ---- ours: blocks ----

    def allocate(self, nbytes: int, deadline: float | None = None) -> Memory:
        """`nbytes` of writable memory aligned to 64 bytes, content undefined, the caller's until its last view dies.

        Waits for returns until `deadline` (time.monotonic() seconds; None: for ever) if there is no room. Raises
        ArenaFull.
        """
        size = block_nbytes(nbytes)
        lease = self._take(size, nbytes)
        while lease is None:
            refusal = self._grow(size)
            # Free memory may lie in segments that are too small: `trim` makes room for a larger one.
            if refusal is not None and not self.trim(0.0):
                why, may_wait = refusal
                if not may_wait or (deadline is not None and time.monotonic() >= deadline):
                    raise ArenaFull(why, may_wait=may_wait)
                self._on_memory_pressure(deadline)
            lease = self._take(size, nbytes)
        memory: Memory = np.ndarray(nbytes, _UINT8, lease)
        return memory

    def _take(self, size: int, nbytes: int) -> Any:
        """A lease on a block, a buffer of `nbytes`; None if there is no room."""
        lease: Any = None
        now = time.monotonic()
        self._check_reentrant()
        with self._lock:
            if self.closed:
                return None
            self._sort_out()
            block = self._blocks.take(size)
            if block is not None:
                block.in_use = True
                block.leases += 1
                segment = block.segment
                segment.used_at = now
                lease = self._lease(segment, block.offset, nbytes, block, self.dead)
        if now - self._trimmed_at > _TRIM_EVERY_S:
            self.trim()
        return lease

    def _grow(self, size: int) -> tuple[str, bool] | None:
        """Makes another segment. If it cannot: why, and whether waiting may help, since something may be returned. Both
        are found under one lock: a moment later all of it may have been returned, and be taken again."""
        with self._lock:
            if self.closed:
                return _ENDED, False
            total = self._blocks.nbytes
            room = self._max_nbytes - total
            if size > room or len(self._blocks.segments) >= self._max_segments:
                why = (
                    f"{size} bytes of shared memory: {total} bytes in {len(self._blocks.segments)} segments, of which "
                    f"{self._blocks.in_use_nbytes} bytes are in use, expected at most {self._max_nbytes} bytes in "
                    f"{self._max_segments} segments, which the peer accepts"
                )
                return why, total > 0 and size <= self._max_nbytes
            wanted = max(size, _FIRST_SEGMENT_NBYTES if not total else min(total, _MAX_STEP_NBYTES))
            nbytes = max(min(-(-wanted // _GRAIN_NBYTES) * _GRAIN_NBYTES, room), size)
            try:
                memory, fd, name = self.factory.create(nbytes)
            except ArenaFull as full:
                return str(full), full.may_wait and total > 0
            try:
                segment = OwnSegment(self._next_id, memory, self._hook)
            except BaseException:  # the hook failed
                if fd is not None:
                    os.close(fd)
                raise
            segment.fd, segment.name, segment.announced, segment.used_at = fd, name, False, time.monotonic()
            self._next_id += 2
            self._blocks.add(segment)
            self._own[segment.id] = segment
            self._unannounced.append(segment)
            self.has_pending = True
            self._remap()
        return None

    def sort_out(self) -> None:
        """Frees the blocks whose leases have died, unless another thread is at work here: it does so as well."""
        if self._lock.acquire(blocking=False):
            try:
                self._sort_out()
            finally:
                self._lock.release()

    def _sort_out(self) -> None:
        """Frees the blocks whose leases have died. The caller holds the lock."""
        dead = self.dead
        while dead and not self.closed:
            block = dead.popleft()
            block.dead += 1
            self._free_if_unused(block)
        while self.idle and not self.closed:
            self._free_if_unused(self.idle.popleft())

    def _free_if_unused(self, block: Block) -> None:
        if block.in_use and block.is_free:
            block.in_use = False
            self._blocks.free(block)

    def trim(self, idle_s: float = IDLE_S) -> int:
        """Releases the segments that have been unused for `idle_s` seconds. Returns their bytes.

        A RETIRE frame goes before the next frame, and the peer unmaps them too.
        """
        now = self._trimmed_at = time.monotonic()
        self._check_reentrant()
        with self._lock:
            self._sort_out()
            unused = self._blocks.remove_unused(now - idle_s)
            for segment in unused:
                del self._own[segment.id]
                if segment.announced:
                    self._retired.append(segment)
                else:
                    self._unannounced.remove(segment)
                    _close(segment)
            self.has_pending = bool(self._unannounced or self._retired)
            self._remap()
        return sum(segment.nbytes for segment in unused)

    @property
    def nbytes(self) -> int:
        """Bytes of our segments."""
        with self._lock:
            return self._blocks.nbytes

    @property
    def in_use_nbytes(self) -> int:
        """Bytes of our blocks that are held, here or by the peer."""
        with self._lock:
            self._sort_out()
            return self._blocks.in_use_nbytes

    # ---- out: places, loans, returns ----

    def place(self, address: int, nbytes: int) -> tuple[int, int] | None:
        """(segment, offset) of memory that lies in a segment of this connection; None for other memory.

        The caller keeps the tensor alive until `lend` was called for it.
        """
        addresses, segments = self._map
        index = bisect_right(addresses, address) - 1
        if index < 0:
            return None
        segment = segments[index]
        offset = address - segment.address
        if offset + nbytes > segment.nbytes:
            return None
        return segment.id, offset

    def lend(self, placements: Sequence[int], count: int = 1) -> None:
        """Counts loans that are about to be sent: `placements`, flat as in a Message. `count` -1: they were not."""
        own = self._own
        for at in range(0, len(placements), 3):
            segment = own.get(placements[at])
            if segment is not None:
                offset = placements[at + 1]
                block = segment.blocks.get(offset)
                if block is None:
                    with self._lock:
                        block = self._blocks.find(segment, offset)
                    assert block is not None
                block.lent += count

    def take_pending(self) -> tuple[list[OwnSegment], list[OwnSegment]] | None:
        """The segments to announce, and those to retire, before the next frame; None if there are neither."""
        if not self._unannounced and not self._retired:
            return None
        with self._lock:
            pending = (self._unannounced, self._retired)
            self._unannounced, self._retired = [], []
            for segment in pending[0]:
                segment.announced = True  # now: another thread may want to trim it
            self.has_pending = False
        return pending

    def take_returns(self, at_most: int) -> list[int]:
        """Segment and offset, flat, of leases on the peer's memory that died; `at_most` of them."""
        returns = self.returns
        taken: list[int] = []
        while returns and at_most:
            taken += returns.popleft()
            at_most -= 1
        return taken

    def requeue_returns(self, taken: Sequence[int]) -> None:
        """Puts back returns that were not sent."""
        self.returns.extendleft(reversed(list(zip(taken[::2], taken[1::2]))))

    # ---- in: only the reader calls these ----

    def attach(self, segment_id: int, nbytes: int, name: str) -> None:
        """Maps a segment that the peer announced. Raises RemoteProtocolError, ResourceError for a shortage here."""
        fd = self._take_descriptor() if not name else None
        try:
            self._check_new(segment_id, nbytes)
        except RemoteProtocolError:
            if fd is not None:
                os.close(fd)
            raise
        try:
            memory = self.factory.attach(fd, name, nbytes)
        except OSError as error:
            short = shortage(error)
            if short is None:  # sealed against writing, for example
                raise RemoteProtocolError(
                    f"segment, descriptor: {error.strerror}, expected {nbytes} bytes that can be mapped"
                ) from None
            raise ResourceError(f"a segment of {nbytes} bytes of the peer's cannot be mapped: {short}") from None
        with self._lock:
            self._peers[segment_id] = Segment(segment_id, memory, self._hook)
            self._remap()

    def _check_new(self, segment_id: int, nbytes: int) -> None:
        if segment_id % 2 == self._next_id % 2 or not 0 < segment_id < 2**32 or segment_id in self._peers:
            raise RemoteProtocolError(f"segment, id: {segment_id}, expected a new one of the peer's")
        if len(self._peers) >= self._limits.max_segments:
            raise RemoteProtocolError(f"segment: {len(self._peers) + 1} of them, expected {self._limits.max_segments}")
        total = nbytes + sum(segment.nbytes for segment in self._peers.values())
        if not 0 < nbytes <= total <= self._limits.max_shared_nbytes:
            raise RemoteProtocolError(
                f"segment, nbytes: {nbytes}, {total} with the others, expected at most {self._limits.max_shared_nbytes}"
            )

    def retire(self, segment_id: int) -> None:
        """Forgets a segment that the peer no longer uses. Views of it stay valid."""
        with self._lock:
            if self._peers.pop(segment_id, None) is None:
                raise RemoteProtocolError(f"segment, id: {segment_id}, expected one of the peer's that is mapped")
            self._remap()

    def resolve(self, segment_id: int, offset: int, desc: TensorDesc) -> Any:
        """A lease on what the peer sent by reference, an array of the description's shape and buffer dtype.

        Raises RemoteProtocolError for a place that the peer may not name.
        """
        dtype, shape, nbytes = desc
        if offset % dtype.itemsize:
            raise RemoteProtocolError(
                f"placement, offset: {offset}, expected a multiple of the item size {dtype.itemsize}"
            )
        segment = self._peers.get(segment_id)
        if segment is not None:
            if offset + nbytes > segment.nbytes:
                raise RemoteProtocolError(
                    f"placement: {nbytes} bytes at {offset} of segment {segment_id}, expected them within its "
                    f"{segment.nbytes} bytes"
                )
            lease = self._lease(segment, offset, nbytes, (segment_id, offset), self.returns)
            self.shared_nbytes += nbytes
            return np.ndarray(shape, dtype.buffer_dtype, lease)
        block = self._lent_block(segment_id, offset, "placement")
        if offset + nbytes > block.offset + block.nbytes:
            raise RemoteProtocolError(
                f"placement: {nbytes} bytes at {offset} of segment {segment_id}, expected them within one loan"
            )
        if len(self.dead) > _MAX_DEAD:
            self.sort_out()
        lease = self._lease(block.segment, offset, nbytes, block, self.dead)
        block.leases += 1
        self.shared_nbytes += nbytes
        return np.ndarray(shape, dtype.buffer_dtype, lease)

    def returned(self, returns: Sequence[int]) -> None:
        """Counts loans that the peer returned: segment and offset, flat. Raises RemoteProtocolError for one that was
        not lent."""
        for at in range(0, len(returns), 2):
            block = self._lent_block(returns[at], returns[at + 1], "returns")
            block.returned += 1
            if block.is_free:
                with self._lock:
                    self._free_if_unused(block)

    def _lent_block(self, segment_id: int, offset: int, field: str) -> Block:
        segment = self._own.get(segment_id)
        block = None
        if segment is not None:
            block = segment.blocks.get(offset)
            if block is None:
                with self._lock:
                    block = self._blocks.find(segment, offset)
        if block is None or block.lent <= block.returned:
            raise RemoteProtocolError(
                f"{field}: offset {offset} of segment {segment_id}, expected a place that was lent"
            )
        return block

    # ---- the end ----

    def close(self) -> None:
        """The connection has ended: drops the segments, which live on as long as views of them do."""
        self.closed = True
        reentrant = self._lock._is_owned()  # type: ignore[attr-defined]  # then another method goes on with its blocks
        with self._lock:
            for segment in self._own.values():
                _close(segment)
                if reentrant:
                    continue  # the collector will find them
                for block in segment.blocks.values():
                    del block.segment  # breaks a circle: segments without leases are unmapped now
                segment.blocks = {}
            self._blocks = Blocks()
            self._own = {}
            self._peers = {}
            self._unannounced, self._retired = [], []
            self._remap()
        self.factory.close()

    def _check_reentrant(self) -> None:
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise ReentrantCallError(
                "shared memory was asked for by a finalizer or a signal's handler, in the middle of another request of "
                "this thread"
            )

    def leave(self) -> None:
        """For a forked child: forgets the segments, which are the parent's. The child's views of them stay mapped."""
        renew(self._lock)
        self.closed = True
        for segment in self._own.values():
            _close(segment)
        for segment in self._retired:
            _close(segment)
        self._blocks = Blocks()
        self._own, self._peers, self._map = {}, {}, ([], [])
        self._unannounced, self._retired = [], []
        self.factory.leave()

    def _remap(self) -> None:
        segments: list[Segment] = sorted([*self._own.values(), *self._peers.values()], key=lambda each: each.address)
        self._map = ([segment.address for segment in segments], segments)


def _close(segment: OwnSegment) -> None:
    """Closes the descriptor of a segment that was not announced."""
    if segment.fd is not None:
        fd, segment.fd = segment.fd, None
        with contextlib.suppress(OSError):
            os.close(fd)
