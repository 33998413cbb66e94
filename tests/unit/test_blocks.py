"""Cutting segments up: sizes, first come, merging, and that nothing is ever handed out twice."""

from __future__ import annotations

import math
import mmap
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsplit.wire.shm.blocks import Block, Blocks, OwnSegment, block_nbytes

KIB = 1024


def _segment(segment_id: int, nbytes: int, used_at: float = 0.0) -> OwnSegment:
    segment = OwnSegment(segment_id, mmap.mmap(-1, nbytes), None)
    segment.fd, segment.name, segment.announced, segment.used_at = None, "", False, used_at
    return segment


def _blocks(*sizes: int) -> Blocks:
    blocks = Blocks()
    for index, nbytes in enumerate(sizes):
        blocks.add(_segment(index + 1, nbytes))
    return blocks


def _take(blocks: Blocks, size: int) -> Block:
    block = blocks.take(size)
    assert block is not None
    block.in_use = True
    return block


def _free(blocks: Blocks, block: Block) -> None:
    block.in_use = False
    blocks.free(block)


@pytest.mark.parametrize(
    ("nbytes", "size"),
    [
        (0, 64),
        (1, 64),
        (64, 64),
        (65, 128),
        (4032, 4032),
        (4095, 4096),
        (4096, 4096),
        (4097, 4608),
        (4608, 4608),
        (4609, 5120),
        (8191, 8192),
        (8193, 9216),
        (983_040, 983_040),
        (983_041, 1_048_576),
        (2**20, 2**20),
        (2**20 + 1, 2**20 + 2**17),
        (2**40 + 1, 2**40 + 2**37),
    ],
)
def test_sizes(nbytes: int, size: int) -> None:
    assert block_nbytes(nbytes) == size


@given(st.integers(0, 2**45))
def test_sizes_are_few_aligned_and_waste_little(nbytes: int) -> None:
    size = block_nbytes(nbytes)
    assert size >= nbytes and size % 64 == 0 and block_nbytes(size) == size
    assert size - max(nbytes, 1) < max(64, nbytes / 8 + 1)
    if nbytes > 4096:
        assert size % (1 << (math.frexp(size - 1)[1] - 4)) == 0  # one of eight steps to its power of two


def test_blocks_are_cut_from_the_front_and_found_again() -> None:
    blocks = _blocks(64 * KIB)
    (segment,) = blocks.segments
    first, second = _take(blocks, 128), _take(blocks, 64)
    assert [(block.offset, block.nbytes) for block in (first, second)] == [(0, 128), (128, 64)]
    assert [blocks.find(segment, at) for at in (0, 1, 127, 128, 191)] == [first, first, first, second, second]
    assert blocks.find(segment, 192) is None
    assert (blocks.nbytes, blocks.in_use_nbytes) == (64 * KIB, 192)


def test_a_freed_block_is_the_next_one_of_its_size() -> None:
    blocks = _blocks(64 * KIB)
    first, _ = _take(blocks, 128), _take(blocks, 128)
    _free(blocks, first)
    assert _take(blocks, 64) is not first
    assert _take(blocks, 128) is first


def test_neighbours_are_merged_when_nothing_else_is_left() -> None:
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (1, 3, 2, 0)):
        blocks = _blocks(4096)
        (segment,) = blocks.segments
        quarters = [_take(blocks, 1024) for _ in range(4)]
        assert segment.extents == {} and blocks.take(64) is None
        for index in order:
            _free(blocks, quarters[index])
        assert segment.extents == {}  # they wait, unmerged
        whole = _take(blocks, 4096)
        assert (whole.offset, whole.nbytes, segment.starts) == (0, 4096, [0])


def test_the_smallest_extent_that_is_large_enough_is_cut() -> None:
    blocks = _blocks(8192, 1024, 4096)
    assert _take(blocks, 1024).segment.id == 2
    assert _take(blocks, 1024).segment.id == 3
    assert _take(blocks, 4096).segment.id == 1
    assert blocks.take(8192) is None


def test_unused_segments_are_taken_out() -> None:
    blocks = Blocks()
    old, busy, young = _segment(1, 4096, 10.0), _segment(2, 4096, 10.0), _segment(3, 4096, 20.0)
    for segment in (busy, old, young):
        blocks.add(segment)
    held = _take(blocks, 64)
    assert held.segment is busy
    assert blocks.remove_unused(10.0) == []  # used then, not before
    assert blocks.remove_unused(15.0) == [old] and blocks.segments == [busy, young]
    _free(blocks, held)
    assert blocks.remove_unused(30.0) == [busy, young] and blocks.nbytes == 0
    assert blocks.take(64) is None  # also not from a bin


_SIZES = st.sampled_from([64, 64, 128, 192, 1024, 4096, 4608, 8192, 65536])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([4096, 8192, 65536]), min_size=1, max_size=3),
    st.lists(st.one_of(_SIZES, st.integers(-30, -1)), max_size=80),
)
def test_nothing_overlaps_and_everything_comes_back(segments: list[int], steps: list[int]) -> None:
    """A positive step takes that many bytes, a negative one frees one of the blocks that are held."""
    blocks = _blocks(*segments)
    held: list[Block] = []
    for step in steps:
        if step > 0:
            block = blocks.take(step)
            if block is None:
                continue
            assert block.nbytes == step and block.offset >= 0 and block.offset % 64 == 0
            assert block.offset + step <= block.segment.nbytes
            for other in held:
                assert (
                    other.segment is not block.segment
                    or other.offset + other.nbytes <= block.offset
                    or block.offset + block.nbytes <= other.offset
                )
            block.in_use = True
            held.append(block)
        elif held:
            _free(blocks, held.pop(step % len(held)))
        assert blocks.in_use_nbytes == sum(block.nbytes for block in held)
        for block in held:
            assert blocks.find(block.segment, block.offset) is block
            assert blocks.find(block.segment, block.offset + block.nbytes - 1) is block
        for segment in blocks.segments:  # blocks and extents together are the segment
            extents = sum(end - start for start, end in segment.extents.items())
            assert extents + sum(block.nbytes for block in segment.blocks.values()) == segment.nbytes
            assert segment.starts == sorted(segment.blocks)
            assert segment.ends == {end: start for start, end in segment.extents.items()}
    for block in held:
        _free(blocks, block)
    blocks.take(2**30)  # too large: every bin was emptied to look
    for segment in blocks.segments:
        assert segment.extents == {0: segment.nbytes} and segment.blocks == {} and segment.starts == []


def test_a_segment_that_was_never_announced_closes_its_descriptor() -> None:
    segment = _segment(1, 4096)
    segment.fd = os.memfd_create("fastsplit-test")
    fd = segment.fd
    os.fstat(fd)
    del segment
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
