"""Protocol Buffers with a bytes field for each tensor, by the C implementation that the package brings (upb):

    message Tensor { string dtype = 1; repeated uint64 shape = 2; bytes data = 3; }
    message Message { string op = 1; int64 layer = 2; double scale = 3; repeated Tensor tensors = 4; }

The classes are made at run time, as protoc's output would make them. Copies: tobytes, into the message, into a buffer,
into `bytes`; parsing copies a field out of what arrived, reading it makes `bytes` of it, and those must not be written
to. Out of band `data` stays empty, and each tensor's own memory goes beside the message.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from .arrays import array_of, copied_tensor, dtype_name, tensor_over
from .serializer import Message, OutOfBandBytes, OutOfBandSerializer, Serializer

__all__ = ["BytesField", "OutOfBand"]

_Field = descriptor_pb2.FieldDescriptorProto


def _message_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="benches/tensor.proto", package="benches", syntax="proto3")
    for name, fields in {
        "Tensor": [("dtype", _Field.TYPE_STRING), ("shape", _Field.TYPE_UINT64), ("data", _Field.TYPE_BYTES)],
        "Message": [
            ("op", _Field.TYPE_STRING),
            ("layer", _Field.TYPE_INT64),
            ("scale", _Field.TYPE_DOUBLE),
            ("tensors", _Field.TYPE_MESSAGE),
        ],
    }.items():
        described = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields, 1):
            repeated = field in ("shape", "tensors")
            label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            added = described.field.add(name=field, number=number, type=kind, label=label)
            if kind == _Field.TYPE_MESSAGE:
                added.type_name = ".benches.Tensor"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("benches.Message"))


class BytesField(Serializer):
    copies_encode = 4
    copies_decode = 3
    safe = "yes: lengths, depth and types are checked by the parser, the shape by numpy"
    note = "2 GiB at most"

    def __init__(self) -> None:
        self._class = _message_class()

    def encode(self, message: Message) -> list[Any]:
        made = self._class(op=message.op, layer=message.layer, scale=message.scale)
        for tensor in message.tensors:
            made.tensors.add(dtype=dtype_name(tensor), shape=tensor.shape, data=array_of(tensor).tobytes())
        return [made.SerializeToString()]

    def decode(self, received: bytearray) -> Message:
        parsed = self._class.FromString(received)
        tensors = [copied_tensor(tensor.data, tensor.dtype, list(tensor.shape)) for tensor in parsed.tensors]
        return Message(parsed.op, parsed.layer, parsed.scale, tensors)


class OutOfBand(OutOfBandSerializer):
    safe = "yes: lengths, depth and types are checked by the parser, the shape by this code"

    def __init__(self) -> None:
        self._class = _message_class()

    def encode(self, message: Message) -> list[Any]:
        made = self._class(op=message.op, layer=message.layer, scale=message.scale)
        for tensor in message.tensors:
            made.tensors.add(dtype=dtype_name(tensor), shape=tensor.shape)
        return [made.SerializeToString(), *map(array_of, message.tensors)]

    def decode(self, received: OutOfBandBytes) -> Message:
        head, buffers = received
        parsed = self._class.FromString(head)
        if len(parsed.tensors) != len(buffers):
            raise ValueError(f"{len(buffers)} buffers, expected {len(parsed.tensors)}")
        tensors = [tensor_over(buffer, said.dtype, list(said.shape)) for said, buffer in zip(parsed.tensors, buffers)]
        return Message(parsed.op, parsed.layer, parsed.scale, tensors)
