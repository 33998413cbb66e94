"""Private memory for tensors that arrive or are about to be sent: aligned, writable, reused.

Why. The kernel zeroes every fresh page and takes a fault for it. So large blocks are kept and handed out again, which
saves more than half of a large transfer.

How long. A block that was idle for 15 s is released to the system within 5 s. A thread does that: the program may call
nothing of this package for hours, and a plain client has no other thread. It starts with the first idle block and ends
with the last. It is a bare `_thread`, so that an exit does not wait for it. A forked child has no such thread; it drops
the idle blocks, and starts its own with the next one. When a connection ends, at most MAX_LEFT_NBYTES stay idle; its
blocks that come back later are kept only within that.

Rules. Memory from `allocate` belongs to the caller until the last view of it (numpy or torch) dies; then the block
comes back by itself. No block is handed out twice. Memory is not touched before its bytes arrive, so that a length that
a peer claims costs address space alone. Everything is thread-safe without locks: list and dict operations are atomic,
and a block can come back from any thread at any moment (`__del__`). So is the start of the thread: a pool has one
token, `_unwatched`, which the thread takes when it begins and puts back before it looks for the last time.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import mmap
import os
import time
import weakref
from collections import deque
from typing import Any

import numpy as np

from ..errors import ArenaFull
from ..system.shortage import why

__all__ = ["ALIGNMENT", "MAX_LEFT_NBYTES", "Lease", "Memory", "Pool", "Slab", "Tenant", "pool"]

ALIGNMENT = 64
"""Bytes: a cache line, and the width of the widest vector units."""

_CELLS_NBYTES = 4096
_MAX_CELL_NBYTES = 512
"""Up to here a tensor is a cell of a 4 KiB slab, which lives as long as any of its cells: half the time of an aligned
allocation, and a small tensor that is kept keeps at most a page."""
_SMALL_NBYTES = 64 * 1024  # below this malloc reuses memory well, and a pooled block would waste a page or more
_HUGE_PAGE_NBYTES = 2 * 1024**2
_IDLE_S = 15.0  # how long an idle block is kept
_LOOK_EVERY_S = 5.0

MAX_LEFT_NBYTES = 256 * 1024**2
"""The most idle bytes that are kept when a connection has ended."""


Memory = np.ndarray[Any, np.dtype[np.uint8]]
"""A flat array, writable, aligned to 64 bytes."""


class Lease(np.ndarray):
    """The right to use a part of shared memory. Views of it (numpy or torch) keep it alive.

    At its death `token` is appended to `home`, a deque of the arena's (wire/shm/arena.py); `segment` is the memory that
    must stay mapped. It is an ndarray, the cheapest object that has a buffer and `__del__` and that torch takes
    directly. As a subclass: numpy does not look for an owner behind an array of another class, so views keep the lease.
    """

    __slots__ = ("home", "segment", "token")

    home: deque[Any]
    token: Any
    segment: Any

    @classmethod
    def of(cls, segment: Any, offset: int, nbytes: int, token: Any, home: deque[Any]) -> Lease:
        """A lease on `nbytes` bytes of a segment, flat uint8, which is in force."""
        lease = cls(nbytes, np.uint8, segment.memory, offset)
        lease.token, lease.segment, lease.home = token, segment, home
        return lease

    def __del__(self) -> None:
        try:  # noqa: SIM105 (contextlib.suppress costs more than the rest)
            self.home.append(self.token)
        except AttributeError:
            pass  # numpy's copy of a lease, which has no token


class _Holder(ctypes.Array):  # type: ignore[type-arg]
    """The use of one block. numpy and torch views keep it alive; its death returns the block to the pool.

    A ctypes array, the one object of the standard library that has the buffer protocol and `__del__`, and that every
    memoryview of it refers to (a memoryview does not keep the memoryview that it was made from).
    """

    _type_ = ctypes.c_ubyte
    _length_ = 0
    pool: Pool
    block: mmap.mmap
    tenant: Tenant | None = None

    def __del__(self) -> None:
        self.pool._release(self.block, self.tenant)


class Tenant:
    """One connection's use of a pool."""

    __slots__ = ("_allocate", "_trim", "ended")

    def __init__(self, pool: Pool) -> None:
        self._allocate = pool.allocate
        self._trim = pool.trim
        self.ended = False

    def allocate(self, nbytes: int) -> Memory:
        """As Pool.allocate."""
        memory = self._allocate(nbytes)
        if nbytes < _SMALL_NBYTES:
            return memory
        holder: Any = memory.base
        if isinstance(holder, _Holder):
            holder.tenant = self
        return memory

    def close(self) -> None:
        """The connection has ended: at most MAX_LEFT_NBYTES stay idle, and its later blocks do not exceed them."""
        self.ended = True
        self._trim(MAX_LEFT_NBYTES)


class Pool:
    """Blocks of memory by size class. `max_idle_nbytes` bounds the blocks kept for reuse, not those handed out."""

    def __init__(self, max_idle_nbytes: int = 1024**3) -> None:
        self.max_idle_nbytes = max_idle_nbytes
        # Blocks and when each came back, oldest first; the least recently used class first.
        self._idle: dict[int, list[tuple[float, mmap.mmap]]] = {}
        self._holder_types: dict[int, type[_Holder]] = {}
        self._cells: dict[int, list[Memory]] = {size: [] for size in (64, 128, 256, 512)}
        self._unwatched = [True]  # empty while a thread looks after idle blocks
        _pools.add(self)

    @property
    def idle_nbytes(self) -> int:
        """Bytes of the blocks that are kept for reuse."""
        return sum(size * len(blocks) for size, blocks in list(self._idle.items()))

    def allocate(self, nbytes: int) -> Memory:
        """A flat uint8 array of `nbytes` bytes: writable, aligned to 64 bytes, content undefined.

        The memory is the caller's until the last view of the array dies. Raises ArenaFull if the system has none.
        """
        if nbytes <= _MAX_CELL_NBYTES:
            size = 64 if nbytes <= 64 else 128 if nbytes <= 128 else 256 if nbytes <= 256 else 512
            cells = self._cells[size]
            while True:
                try:
                    return cells.pop()[:nbytes]
                except IndexError:
                    slab = _aligned(_CELLS_NBYTES)
                    cells.extend([slab[at : at + size] for at in range(0, _CELLS_NBYTES, size)])
        if nbytes < _SMALL_NBYTES:
            return _aligned(nbytes)
        size = _size_class(nbytes)
        try:
            block = self._idle[size].pop()[1]
        except (KeyError, IndexError):
            try:
                block = _map(size)
            except ArenaFull:
                if not self._idle:
                    raise
                self.trim()  # idle blocks of other sizes may hold the memory that is missing
                block = _map(size)
        holder_type = self._holder_types.get(size)
        if holder_type is None:
            holder_type = type("_Holder", (_Holder,), {"_length_": size, "pool": self})
            self._holder_types[size] = holder_type
        holder = holder_type.from_buffer(block)
        holder.block = block
        memory: Memory = np.frombuffer(holder, np.uint8, nbytes)  # type: ignore[call-overload]
        return memory

    def trim(self, max_idle_nbytes: int = 0) -> None:
        """Releases idle blocks to the system until at most `max_idle_nbytes` are left, least recently used first."""
        for size in list(self._idle):
            while self.idle_nbytes > max_idle_nbytes:
                try:
                    self._idle[size].pop()
                except (KeyError, IndexError):
                    break
            if not self._idle.get(size):
                self._idle.pop(size, None)

    def _release(self, block: mmap.mmap, tenant: Tenant | None) -> None:
        size = len(block)
        if tenant is not None and tenant.ended and self.idle_nbytes + size > MAX_LEFT_NBYTES:
            return
        # Out and in again, so that the class is now the most recently used. Two threads here at the same moment may
        # lose each other's list: then its blocks go back to the system, and no block is handed out twice.
        blocks = self._idle.pop(size, None) or []
        blocks.append((time.monotonic(), block))
        self._idle[size] = blocks
        if self.idle_nbytes > self.max_idle_nbytes:
            self.trim(self.max_idle_nbytes)
        if self._unwatched and self._idle:
            self._watch()

    # ---- idle blocks ----

    def _watch(self) -> None:
        """Starts the thread for idle blocks, unless it runs. If no thread can start, no block is kept."""
        if self._take_watch():
            try:
                _thread.start_new_thread(_watch, (weakref.ref(self),))
            except RuntimeError:  # none left, or the interpreter ends
                self._unwatched.append(True)
                self.trim()

    def _take_watch(self) -> bool:
        try:
            return self._unwatched.pop()
        except IndexError:
            return False

    def _look(self) -> bool:
        """Drops old idle blocks. Whether to look again; if not, the next idle block starts a thread."""
        self._drop_unused(time.monotonic() - _IDLE_S)
        if self.idle_nbytes:
            return True
        self._unwatched.append(True)
        # A block may have come back a moment ago, and found the token taken.
        return self.idle_nbytes > 0 and self._take_watch()

    def _drop_unused(self, before: float) -> None:
        """Releases blocks that have been idle since `before` (time.monotonic() seconds)."""
        for size, blocks in list(self._idle.items()):
            with contextlib.suppress(IndexError):  # another thread took the last one
                while blocks[0][0] < before:
                    found = blocks.pop(0)
                    if found[0] >= before:  # another thread took the oldest one
                        blocks.append(found)
            if not self._idle.get(size):
                self._idle.pop(size, None)

    def _after_fork(self) -> None:
        self._idle.clear()
        self._unwatched[:] = [True]


def _watch(reference: weakref.ref[Pool]) -> None:
    while True:
        time.sleep(_LOOK_EVERY_S)
        pool = reference()
        if pool is None or not pool._look():
            return
        del pool


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool._after_fork()


os.register_at_fork(after_in_child=_after_fork)


class Slab(np.ndarray):
    """Memory of this module's own, which is never resized: views of it need no check (checks.py)."""

    __slots__ = ()


def _aligned(nbytes: int) -> Memory:
    raw = Slab(nbytes + ALIGNMENT, np.uint8)  # not empty().view(), whose views would refer to the owner behind it
    return np.ndarray(nbytes, np.uint8, raw, -raw.ctypes.data % ALIGNMENT)


def _size_class(nbytes: int) -> int:
    """The size of a block: one of four steps for each power of two. At most a quarter is unused, and sizes are few."""
    step = max(1 << (nbytes.bit_length() - 3), mmap.PAGESIZE)
    return -(-nbytes // step) * step


def _map(size: int) -> mmap.mmap:
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ArenaFull(f"no memory for a tensor of {size} bytes: {why(error)}") from None
    except OverflowError as error:
        raise ArenaFull(f"no memory for a tensor of {size} bytes: {error}") from None
    if size >= _HUGE_PAGE_NBYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages uses smaller ones
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


pool = Pool()
"""The process's pool, the default of all connections."""
