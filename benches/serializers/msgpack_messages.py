"""msgpack: as the system that fastsplit replaces has it, and with the tensors beside it.

Copies of the first. tobytes (one), into the packer's buffer (two), out of that as `bytes` (three; what the buffer's
growth moves is not counted). Unpacking makes `bytes` of a tensor (one), which must not be written to (two).
"""

from __future__ import annotations

from typing import Any

import msgpack

from benches.rivals import messages

from .arrays import array_of, dtype_name, tensor_over
from .serializer import Message, OutOfBandBytes, OutOfBandSerializer, Serializer

__all__ = ["Original", "OutOfBand"]


class Original(Serializer):
    """`Original` of benches/rivals/messages.py, as it is there. What arrives is one bytearray."""

    how = "common"
    copies_encode = 3
    copies_decode = 2
    safe = "partly: what msgpack and numpy check themselves; fields of any type, nested lists that claim more than came"

    def __init__(self) -> None:
        self._messages = messages.Original()

    def encode(self, message: Message) -> list[Any]:
        head = {"op": message.op, "attrs": {"layer": message.layer, "scale": message.scale}}
        return self._messages.encode(head, message.tensors)

    def decode(self, received: bytearray) -> Message:
        head, tensors = self._messages.decode([received])
        return Message(head["op"], head["attrs"]["layer"], head["attrs"]["scale"], tensors)


class OutOfBand(OutOfBandSerializer):
    """What is said in msgpack, then each tensor's own memory; it arrives in a buffer of its own."""

    safe = "partly: lengths and shapes are checked, but fields of any type, nested lists that claim more than came"

    def encode(self, message: Message) -> list[Any]:
        tensors = [(dtype_name(tensor), list(tensor.shape)) for tensor in message.tensors]
        attrs = {"layer": message.layer, "scale": message.scale}
        head = msgpack.packb({"op": message.op, "attrs": attrs, "tensors": tensors})
        return [head, *map(array_of, message.tensors)]

    def decode(self, received: OutOfBandBytes) -> Message:
        head, buffers = received
        said = msgpack.unpackb(head)
        described = said["tensors"]
        if len(described) != len(buffers):
            raise ValueError(f"{len(buffers)} buffers, expected {len(described)}")
        tensors = [tensor_over(buffer, dtype, shape) for (dtype, shape), buffer in zip(described, buffers)]
        return Message(said["op"], said["attrs"]["layer"], said["attrs"]["scale"], tensors)
