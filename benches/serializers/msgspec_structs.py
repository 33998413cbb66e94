"""msgspec's MessagePack with Structs: types are checked as they are decoded.

A field of type `memoryview` is decoded without a copy, and is writable where what arrived is. MessagePack aligns
nothing, so "in place" puts padding before each tensor: as many bytes as bring it to a multiple of 64 in the message.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from .arrays import array_of, copied_tensor, dtype_name, flat_bytes, tensor_over
from .serializer import Message, OutOfBandBytes, OutOfBandSerializer, Serializer

__all__ = ["InPlace", "OutOfBand", "Structs"]

_ALIGNMENT = 64
_Shape = tuple[Annotated[int, msgspec.Meta(ge=0)], ...]  # numpy would take -1 for what is left


class _Tensor(msgspec.Struct):
    dtype: str
    shape: _Shape
    data: bytes


class _Whole(msgspec.Struct):
    op: str
    layer: int
    scale: float
    tensors: list[_Tensor]


class _Head(msgspec.Struct):
    op: str
    layer: int
    scale: float
    tensors: list[tuple[str, _Shape]]


def _head_of(message: Message) -> _Head:
    described = [(dtype_name(tensor), tuple(tensor.shape)) for tensor in message.tensors]
    return _Head(message.op, message.layer, message.scale, described)


class Structs(Serializer):
    """tobytes (one) and into the message (two); out of it as `bytes` (one), which must not be written to (two)."""

    how = "common"
    copies_encode = 2
    copies_decode = 2
    safe = "yes: lengths and types are checked, the shape by numpy"

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(_Whole)

    def encode(self, message: Message) -> list[Any]:
        tensors = [
            _Tensor(dtype_name(tensor), tuple(tensor.shape), array_of(tensor).tobytes()) for tensor in message.tensors
        ]
        return [self._encoder.encode(_Whole(message.op, message.layer, message.scale, tensors))]

    def decode(self, received: bytearray) -> Message:
        whole = self._decoder.decode(received)
        tensors = [copied_tensor(tensor.data, tensor.dtype, tensor.shape) for tensor in whole.tensors]
        return Message(whole.op, whole.layer, whole.scale, tensors)


class InPlace(Serializer):
    """[head, [padding, data, padding, data, ...]]; tensors are views of the one bytearray that arrives."""

    copies_encode = 1
    copies_decode = 0
    safe = "yes: lengths and types are checked, the shape by this code"

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(tuple[_Head, list[memoryview]])

    def encode(self, message: Message) -> list[Any]:
        head = self._encoder.encode(_head_of(message))
        at = len(head) + 1 + (1 if 2 * len(message.tensors) < 16 else 3 if 2 * len(message.tensors) < 65536 else 5)
        parts: list[Any] = []
        for tensor in message.tensors:
            data = flat_bytes(tensor)
            at += 2 + (2 if data.nbytes < 256 else 3 if data.nbytes < 65536 else 5)  # what stands before both
            padding = -at % _ALIGNMENT
            parts += (bytes(padding), data)
            at += padding + data.nbytes
        return [self._encoder.encode((msgspec.Raw(head), parts))]

    def decode(self, received: bytearray) -> Message:
        head, parts = self._decoder.decode(received)
        if len(parts) != 2 * len(head.tensors):
            raise ValueError(f"{len(parts)} parts, expected {2 * len(head.tensors)}")
        tensors = [tensor_over(data, dtype, shape) for (dtype, shape), data in zip(head.tensors, parts[1::2])]
        return Message(head.op, head.layer, head.scale, tensors)


class OutOfBand(OutOfBandSerializer):
    """The head alone is MessagePack; each tensor's own memory follows it and arrives in a buffer of its own."""

    safe = "yes: lengths and types are checked, the shape by this code"

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(_Head)

    def encode(self, message: Message) -> list[Any]:
        return [self._encoder.encode(_head_of(message)), *map(array_of, message.tensors)]

    def decode(self, received: OutOfBandBytes) -> Message:
        head = self._decoder.decode(received[0])
        buffers = received[1]
        if len(head.tensors) != len(buffers):
            raise ValueError(f"{len(buffers)} buffers, expected {len(head.tensors)}")
        tensors = [tensor_over(buffer, dtype, shape) for (dtype, shape), buffer in zip(head.tensors, buffers)]
        return Message(head.op, head.layer, head.scale, tensors)
