"""The types that a frame's metadata is made of, and how its numbers lie in the buffer.

Why templates. Building a FlatBuffers message field by field takes Python tens of microseconds, and nearly all messages
of a connection have one of a few shapes. An Encoder (encoder.py) builds each *shape* (op, tensor dtypes and dims,
attribute names and texts) once with the generated code, keeps the bytes, and patches the numbers of each message. A
Decoder (decoder.py) does the reverse: it looks up the bytes before the numbers, which were validated in full when they
first came, and reads the numbers anew. Encoding and decoding together take 1 to 3 us in place of 70 to 140.

Rules. The generated code is used by these three modules and attrs.py alone. All values here are immutable.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from .dtypes import DType

__all__ = [
    "CACHED_SHAPES",
    "CACHED_STRUCTURES",
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
    "keep",
]

AttrValue = int | bool | float | str | bytes | Sequence[int] | Sequence[bool] | Sequence[float] | Sequence[str]
Attrs = Mapping[str, AttrValue]

FILE_IDENTIFIER = b"FSM1"
CACHED_SHAPES = 512  # per connection and direction; usually a few hundred bytes each
CACHED_STRUCTURES = 64  # kinds of messages, whatever their tensors' dimensions
MAX_CACHED_NBYTES = 8 * 1024  # of metadata: larger ones are rare, and a hostile peer could fill the cache with them
PLACEMENT_NBYTES = 24
RETURN_NBYTES = 16


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def keep(table: dict[_Key, _Value], key: _Key, value: _Value, most: int) -> None:
    """Adds to a table of at most `most` entries; the oldest goes first."""
    if len(table) >= most and key not in table:
        del table[next(iter(table))]
    table[key] = value


class TensorDesc(NamedTuple):
    """One tensor: dtype, shape in elements, and bytes in row-major order."""

    dtype: DType
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, dtype: DType, shape: Sequence[int]) -> TensorDesc:
        """The description of a tensor of ours, whose shape needs no check."""
        return cls(dtype, tuple(shape), math.prod(shape) * dtype.itemsize)

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"


class Message(NamedTuple):
    """The metadata of one frame, decoded. `attrs` belongs to the receiver, unless it is empty: then it may be shared.

    `placements`: segment (with its coding, see coding.py, in the upper half), offset and nbytes of each tensor, flat;
    empty if all tensors are in the frame's own payload, uncoded, one after the other. `returns`: segment and offset of
    each lease that ended, flat.
    """

    op: str
    tensors: tuple[TensorDesc, ...]
    attrs: dict[str, Any]
    payload_nbytes: int
    placements: tuple[int, ...] = ()
    returns: tuple[int, ...] = ()


def inline_placements(sizes: Sequence[int]) -> tuple[int, ...]:
    """Placements of tensors that lie in a frame's own payload, one after the other: (0, offset, nbytes), flat."""
    flat: list[int] = []
    offset = 0
    for nbytes in sizes:
        flat += (0, offset, nbytes)
        offset += nbytes
    return tuple(flat)


class Tail:
    """Where the numbers lie if ints, floats, placements and returns are the last four vectors, in this order.

    Each vector is a uint32 length right before 8-aligned elements, so that 8 bytes stand between two of them: four of
    padding and the length, `length << 32` as one uint64. A placement is three uint64 (its codec is in the upper half of
    the first), a return is two.
    """

    def __init__(self, ints: int, floats: int, placements: int, returns: int) -> None:
        layout = "<"
        index = 0
        self.gaps: list[tuple[int, int]] = []
        """For each length between two vectors: its index among the unpacked numbers, its value."""
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
        """Each vector's numbers among the unpacked ones."""
        self.nbytes = 8 * index
        self.numbers: struct.Struct | None = struct.Struct(layout) if index else None
        self.ints_back, self.floats_back, self.placements_back, self.returns_back = (
            self.nbytes - start for start in starts
        )
        """Bytes from the start of each vector's elements to the end of the buffer."""
