"""Cap'n Proto by pycapnp; the schema is tensor.capnp beside this module. A tensor's data ends at 2^29 bytes.

A reader's views are read-only, even over memory that is not; where they lie in the bytearray that arrived is known, so
that nothing has to be copied. The limit on what may be read is set to the message's own size: its default of 64 MiB is
less than some messages have, and no limit would let a few bytes be read a million times.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import capnp

from .arrays import array_of, copied_tensor, dtype_name, flat_bytes, offset_in, tensor_over
from .serializer import Message, Serializer

__all__ = ["Assigned", "InPlace"]

_SCHEMA = capnp.load(str(Path(__file__).with_name("tensor.capnp")))
_FIRST_WORDS = 64  # a segment for all but the data of tensors; each of those gets one of its own
_SPARE_WORDS = 4096  # what is read more than once, as descriptions may be


class Assigned(Serializer):
    """As commonly written: tobytes (one), assigned (two), to_bytes, which puts segments together (three) and makes
    `bytes` of that (four). A field is read as `bytes` (one), which must not be written to (two). What arrives is one
    bytearray."""

    how = "common"
    copies_encode = 4
    copies_decode = 2
    safe = "yes: every pointer is checked, and how much is read in all"

    def encode(self, message: Message) -> list[Any]:
        made = _SCHEMA.Message.new_message()
        tensors = _said(message, made)
        for target, tensor in zip(tensors, message.tensors):
            target.data = array_of(tensor).tobytes()
        return [made.to_bytes()]

    def decode(self, received: bytearray) -> Message:
        with _SCHEMA.Message.from_bytes(received, _limit_words(received)) as read:
            tensors = [copied_tensor(one.data, one.dtype, list(one.shape)) for one in read.tensors]
            return Message(read.op, read.layer, read.scale, tensors)


class InPlace(Assigned):
    """The message is built in bytearrays of ours, data is copied into them once, and they are sent as they are, behind
    the table that says how long they are. What arrives is one bytearray; tensors lie in it."""

    how = "best"
    copies_encode = 1
    copies_decode = 0
    note = "the message's memory is zeroed first"

    def encode(self, message: Message) -> list[Any]:
        segments: list[bytearray] = []

        def allocate(least_words: int, _used_words: int = 0) -> bytearray:
            segments.append(bytearray(8 * least_words))
            return segments[-1]

        empty = _SCHEMA.Message.new_message(num_first_segment_words=_FIRST_WORDS, allocate_seg_callable=allocate)
        tensors = _said(message, empty)
        for target, tensor in zip(tensors, message.tensors):
            target.data = flat_bytes(tensor)
        words = [len(segment) // 8 for segment in segments]
        table = struct.pack(f"<{1 + len(words)}I", len(words) - 1, *words)
        return [table + bytes(-len(table) % 8), *segments]

    def decode(self, received: bytearray) -> Message:
        with _SCHEMA.Message.from_bytes(received, _limit_words(received)) as read:
            tensors = []
            for one in read.tensors:
                data = one.get_data_as_view("data")
                at = offset_in(data, received)
                tensors.append(tensor_over(received, one.dtype, list(one.shape), at, data.nbytes))
            return Message(read.op, read.layer, read.scale, tensors)


def _said(message: Message, made: Any) -> Any:
    """Writes all but the data. Returns the tensors that it is to be written to."""
    made.op = message.op
    made.layer = message.layer
    made.scale = message.scale
    tensors = made.init("tensors", len(message.tensors))
    for target, tensor in zip(tensors, message.tensors):
        target.dtype = dtype_name(tensor)
        target.shape = list(tensor.shape)
    return tensors


def _limit_words(received: bytearray) -> int:
    return len(received) // 8 + _SPARE_WORDS
