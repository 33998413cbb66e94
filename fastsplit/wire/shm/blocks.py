"""Blocks: how one side's segments are divided, handed out and freed.

Rules. Sizes are rounded up so that few distinct ones exist: to 64 bytes below 4 KiB, else to one of eight steps to each
power of two (at most an eighth is unused). A freed block waits in a bin for the next request of its size, and is not
merged with its neighbours; bins are emptied, and neighbours merged, only when nothing else is left or segments are to
be released. Not thread-safe: the arena's lock covers it. All of it is arithmetic on offsets; the memory is not touched.

What holds a block. On this side, leases (one for each tensor made of it, `leases` made and `dead`); on the peer's,
loans (one for each time that it was sent, `lent` and `returned`). Each of the four counters is written by one thread at
a time, so none of them needs a lock: `leases` and `returned` by the reader, `lent` by the sender, `dead` under the
arena's lock. A block is free when both pairs are equal.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right, insort

from .segment import Segment

__all__ = ["Block", "Blocks", "block_nbytes"]

_SMALL_NBYTES = 4096
_ALIGNMENT = 64


class Block:
    """A piece of a segment of ours. `offset`, `nbytes`: in that segment."""

    __slots__ = ("dead", "in_use", "leases", "lent", "nbytes", "offset", "returned", "segment")

    def __init__(self, segment: OwnSegment, offset: int, nbytes: int) -> None:
        self.segment = segment  # deleted once the connection has ended
        self.offset = offset
        self.nbytes = nbytes
        self.in_use = False
        self.leases = self.dead = self.lent = self.returned = 0

    @property
    def is_free(self) -> bool:
        # The loans first: a loan's return comes after the lease that it became, and `dead` stands still meanwhile.
        return self.lent == self.returned and self.leases == self.dead


class OwnSegment(Segment):
    """A segment of ours, with its blocks by offset and its free extents. Everything is free at first."""

    __slots__ = ("announced", "blocks", "ends", "extents", "fd", "name", "starts", "used_at")

    blocks: dict[int, Block]
    starts: list[int]  # offsets of the blocks, in order
    extents: dict[int, int]  # start -> end of what is in no block
    ends: dict[int, int]  # the same from the other end
    fd: int | None  # to send with the announcement
    name: str
    announced: bool
    used_at: float  # time.monotonic() when last a block of it was handed out

    def __del__(self) -> None:
        fd = getattr(self, "fd", None)
        if fd is not None:  # it was never announced, and the arena was not closed
            with contextlib.suppress(OSError):
                os.close(fd)
        super().__del__()


def block_nbytes(nbytes: int) -> int:
    """The size of the block that `nbytes` bytes get."""
    if nbytes <= _SMALL_NBYTES:
        return max(-(-nbytes // _ALIGNMENT), 1) * _ALIGNMENT
    step = 1 << (nbytes.bit_length() - 4)
    return -(-nbytes // step) * step


class Blocks:
    """All segments of one side of one connection."""

    def __init__(self) -> None:
        self.segments: list[OwnSegment] = []
        self._bins: dict[int, list[Block]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segment in self.segments)

    def add(self, segment: OwnSegment) -> None:
        segment.blocks, segment.starts = {}, []
        segment.extents, segment.ends = {0: segment.nbytes}, {segment.nbytes: 0}
        self.segments.append(segment)

    def take(self, size: int) -> Block | None:
        """A block of `size` bytes (a result of `block_nbytes`); None if there is no room."""
        waiting = self._bins.get(size)
        if waiting:
            return waiting.pop()
        block = self._carve(size)
        if block is None and self._empty_bins():
            block = self._carve(size)
        return block

    def free(self, block: Block) -> None:
        self._bins.setdefault(block.nbytes, []).append(block)

    def find(self, segment: OwnSegment, offset: int) -> Block | None:
        """The block that holds a segment's byte `offset`."""
        index = bisect_right(segment.starts, offset) - 1
        if index < 0:
            return None
        block = segment.blocks[segment.starts[index]]
        return block if offset < block.offset + block.nbytes else None

    def remove_unused(self, before: float) -> list[OwnSegment]:
        """Removes the segments that hold no block and have not been used since `before` (time.monotonic() seconds)."""
        self._empty_bins()
        unused = [segment for segment in self.segments if not segment.blocks and segment.used_at < before]
        self.segments = [segment for segment in self.segments if segment not in unused]
        return unused

    @property
    def in_use_nbytes(self) -> int:
        """Bytes of blocks that are held."""
        return sum(block.nbytes for segment in self.segments for block in segment.blocks.values() if block.in_use)

    def _carve(self, size: int) -> Block | None:
        """A block of the first `size` bytes of the smallest extent that is large enough."""
        best: tuple[int, OwnSegment, int] | None = None
        for segment in self.segments:
            for start, end in segment.extents.items():
                if end - start >= size and (best is None or end - start < best[0]):
                    best = (end - start, segment, start)
        if best is None:
            return None
        _, segment, start = best
        end = segment.extents.pop(start)
        del segment.ends[end]
        if start + size < end:
            segment.extents[start + size] = end
            segment.ends[end] = start + size
        block = segment.blocks[start] = Block(segment, start, size)
        insort(segment.starts, start)
        return block

    def _empty_bins(self) -> bool:
        """Turns all blocks in bins into extents, and merges these with their neighbours. False if there were none."""
        bins, self._bins = self._bins, {}
        waited = False
        for waiting in bins.values():
            for block in waiting:
                waited = True
                segment, start, end = block.segment, block.offset, block.offset + block.nbytes
                del segment.blocks[start]
                del segment.starts[bisect_right(segment.starts, start) - 1]
                if start in segment.ends:
                    before = segment.ends.pop(start)
                    del segment.extents[before]
                    start = before
                if end in segment.extents:
                    after = segment.extents.pop(end)
                    del segment.ends[after]
                    end = after
                segment.extents[start] = end
                segment.ends[end] = start
        return waited
