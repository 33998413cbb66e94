"""What is said about tensors: the types that metadata is made of, and how it lies in a frame.

Why templates. Building a FlatBuffers message field by field in Python costs tens of microseconds, and nearly all
messages of a connection have one of a few shapes. So an Encoder (encoder.py) builds each *shape* (op, tensor dtypes and
dims, attribute names and texts) once with the generated code, keeps the bytes, and per message only patches the
numbers. A Decoder (decoder.py) does the same in reverse: what stands before the numbers is looked up as one byte string
that was fully validated when it came first; only the numbers are read anew. Measured on a two-tensor message (benches/
bench_descriptor.py): encode + decode take 1 us, 2.8 us with three attributes; Builder + accessors 72 and 138 us.

Rules. Nothing but these three modules and attrs.py touches the generated code. All here is immutable.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .dtypes import DType

__all__ = [
    "CACHED_SHAPES",
    "FILE_IDENTIFIER",
    "MAX_CACHED_NBYTES",
    "PLACEMENT_NBYTES",
    "RETURN_NBYTES",
    "AttrValue",
    "Attrs",
    "Message",
    "Tail",
    "TensorDesc",
    "inline_placements",
]

AttrValue = int | bool | float | str | bytes | Sequence[int] | Sequence[bool] | Sequence[float] | Sequence[str]
Attrs = Mapping[str, AttrValue]

FILE_IDENTIFIER = b"FSM1"
CACHED_SHAPES = 512  # per connection and direction; a few hundred bytes each, as a rule
MAX_CACHED_NBYTES = 8 * 1024  # of metadata: larger ones are rare, and a hostile peer could make us keep many
PLACEMENT_NBYTES = 24
RETURN_NBYTES = 16


class TensorDesc(NamedTuple):
    """What one tensor is: dtype, shape in elements, bytes in row-major order. Immutable."""

    dtype: DType
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, dtype: DType, shape: Sequence[int]) -> TensorDesc:
        """The description of a tensor of ours: `shape` is taken as it is."""
        return cls(dtype, tuple(shape), math.prod(shape) * dtype.itemsize)

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"


class Message(NamedTuple):
    """The metadata of one frame, decoded. `attrs` is the receiver's own, but for an empty one, which may be shared.

    `placements`: segment (with its coding, see coding.py, in the upper half), offset and nbytes of each tensor, flat;
    empty if all of them are in the frame's own payload as they are in memory, one after the other. `returns`: segment
    and offset of each loan that the peer gives back, flat.
    """

    op: str
    tensors: tuple[TensorDesc, ...]
    attrs: dict[str, Any]
    payload_nbytes: int
    placements: tuple[int, ...] = ()
    returns: tuple[int, ...] = ()


def inline_placements(sizes: Sequence[int]) -> tuple[int, ...]:
    """Placements of tensors of these bytes in a frame's own payload, one after the other: (0, offset, nbytes), flat."""
    flat: list[int] = []
    offset = 0
    for nbytes in sizes:
        flat += (0, offset, nbytes)
        offset += nbytes
    return tuple(flat)


class Tail:
    """Where the numbers lie when ints, floats, placements and returns are the last four vectors, in this order.

    Each vector is a uint32 length right before 8-aligned elements, so between two of them stand 8 bytes: four of
    padding and the length. Read as one uint64 that is `length << 32`. A placement is three uint64 (its codec is the
    upper half of the first), a return two.
    """

    def __init__(self, ints: int, floats: int, placements: int, returns: int) -> None:
        layout = "<"
        index = 0
        self.gaps: list[tuple[int, int]] = []
        """(index among the unpacked numbers, value) of each length between two vectors."""
        spans: list[slice] = []
        starts: list[int] = []  # bytes from the start of the tail
        for count, words, kind in ((ints, 1, "q"), (floats, 1, "d"), (placements, 3, "Q"), (returns, 2, "Q")):
            if count and index:
                self.gaps.append((index, count << 32))
                layout += "Q"
                index += 1
            starts.append(8 * index)
            spans.append(slice(index, index + words * count))
            layout += f"{words * count}{kind}"
            index += words * count
        self.ints, self.floats, self.placements, self.returns = spans
        """Where each vector's numbers are among the unpacked ones."""
        self.nbytes = 8 * index
        self.numbers: struct.Struct | None = struct.Struct(layout) if index else None
        self.ints_back, self.floats_back, self.placements_back, self.returns_back = (
            self.nbytes - start for start in starts
        )
        """Bytes from the start of each vector's elements to the end of the buffer."""
