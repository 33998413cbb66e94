"""FlatBuffers with the tensors inside, in a schema of

    table Tensor { dtype: string; shape: [ulong]; data: [ubyte]; }
    table Message { op: string; layer: long; scale: double; tensors: [Tensor]; }
    root_type Message;

written and read by the calls that generated code makes. What arrives is one bytearray; the data is read where it lies
there, as `DataAsNumpy()` gives it, and is writable since the bytearray is. The Builder takes `bytes` alone, and copies
them; Output() copies once more. It has no verifier in Python: offsets are followed wherever they lead, though Python
lets them lead nowhere outside of the buffer.
"""

from __future__ import annotations

from typing import Any

import flatbuffers
from flatbuffers import number_types
from flatbuffers.table import Table

from .arrays import array_of, dtype_name, flat_bytes, tensor_over
from .serializer import Message, Serializer

__all__ = ["SizedVectors", "Vectors"]

_ALIGNMENT = 64
_HEAD_NBYTES = 1024  # room for everything but the payload


class Vectors(Serializer):
    """The Builder begins small and doubles when it is full: each time, all that it holds is copied."""

    how = "common"
    copies_encode = 6
    copies_decode = 0
    safe = "partly: no verifier in Python; offsets are followed, but never out of the buffer"
    note = "tobytes; into the Builder by way of a bytearray; its doublings, which move two to one times as much; Output"

    def encode(self, message: Message) -> list[Any]:
        builder = flatbuffers.Builder(1024)
        data = [builder.CreateByteVector(array_of(tensor).tobytes()) for tensor in message.tensors]
        _finish(builder, message, data)
        return [builder.Output()]

    def decode(self, received: bytearray) -> Message:
        table = Table(received, number_types.UOffsetTFlags.py_type(_uint32(received, 0)))
        tensors = []
        at = _field(table, 3)
        for index in range(table.VectorLen(at)):
            tensor = Table(received, table.Indirect(table.Vector(at) + 4 * index))
            dtype = tensor.String(tensor.Pos + _field(tensor, 0)).decode()
            shape = tensor.GetVectorAsNumpy(number_types.Uint64Flags, _field(tensor, 1)).tolist()
            data = tensor.GetVectorAsNumpy(number_types.Uint8Flags, _field(tensor, 2))
            tensors.append(tensor_over(data, dtype, shape))
        return Message(
            table.String(table.Pos + _field(table, 0)).decode(),
            table.Get(number_types.Int64Flags, table.Pos + _field(table, 1)),
            table.Get(number_types.Float64Flags, table.Pos + _field(table, 2)),
            tensors,
        )


class SizedVectors(Vectors):
    """Room for all from the start, and the payload put into the Builder's memory as CreateByteVector does, but without
    the `bytes` in between. What is sent is the Builder's memory. It zeroes that memory first."""

    how = "best"
    copies_encode = 1
    note = "the Builder's memory is zeroed first"

    def encode(self, message: Message) -> list[Any]:
        nbytes = sum(tensor.nbytes + _ALIGNMENT for tensor in message.tensors)
        builder = flatbuffers.Builder(nbytes + _HEAD_NBYTES)
        data = []
        for tensor in message.tensors:
            builder.StartVector(1, tensor.nbytes, _ALIGNMENT)
            builder.head = builder.head - tensor.nbytes
            memoryview(builder.Bytes)[builder.head : builder.head + tensor.nbytes] = flat_bytes(tensor)
            data.append(builder.EndVector())
        _finish(builder, message, data)
        return [memoryview(builder.Bytes)[builder.Head() :]]


def _finish(builder: Any, message: Message, data: list[int]) -> None:
    """Everything but the payload."""
    tables = []
    for tensor, vector in zip(message.tensors, data):
        dtype = builder.CreateString(dtype_name(tensor))
        builder.StartVector(8, tensor.dim(), 8)
        for dim in reversed(tensor.shape):
            builder.PrependUint64(dim)
        shape = builder.EndVector()
        builder.StartObject(3)
        builder.PrependUOffsetTRelativeSlot(0, dtype, 0)
        builder.PrependUOffsetTRelativeSlot(1, shape, 0)
        builder.PrependUOffsetTRelativeSlot(2, vector, 0)
        tables.append(builder.EndObject())
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    tensors = builder.EndVector()
    op = builder.CreateString(message.op)
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(0, op, 0)
    builder.PrependInt64Slot(1, message.layer, 0)
    builder.PrependFloat64Slot(2, message.scale, 0.0)
    builder.PrependUOffsetTRelativeSlot(3, tensors, 0)
    builder.Finish(builder.EndObject())


def _uint32(buffer: Any, at: int) -> int:
    return int(flatbuffers.encode.Get(flatbuffers.packer.uoffset, buffer, at))


def _field(table: Any, number: int) -> int:
    """A field's place in its table. Raises ValueError where it is not there."""
    at = int(table.Offset(4 + 2 * number))
    if not at:
        raise ValueError(f"field {number} is missing")
    return at
