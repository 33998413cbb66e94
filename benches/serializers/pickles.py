"""pickle, which runs whatever code the sender names: for peers that trust each other with everything.

numpy arrays of protocol 4 are `tobytes` (one) and written into the pickle (two); loading makes `bytes` of that (one),
whose memory the array takes over as it is. torch tensors go through torch.save's older format into a BytesIO, and that
into the pickle. With protocol 5 the buffers of arrays can stay outside, which copies nothing at all.
"""

from __future__ import annotations

import pickle
from typing import Any

from .arrays import array_of, dtype_name, tensor_of
from .serializer import Message, OutOfBandBytes, OutOfBandSerializer, Serializer

__all__ = ["OutOfBand", "Protocol4", "TorchTensors"]

_UNSAFE = "no: runs what code the sender names"


def _content(message: Message) -> dict[str, Any]:
    arrays = [(dtype_name(tensor), array_of(tensor)) for tensor in message.tensors]
    return {"op": message.op, "layer": message.layer, "scale": message.scale, "tensors": arrays}


def _message(content: dict[str, Any]) -> Message:
    tensors = [tensor_of(array, dtype) for dtype, array in content["tensors"]]
    return Message(content["op"], content["layer"], content["scale"], tensors)


class Protocol4(Serializer):
    """What arrives is one bytearray."""

    how = "common"
    copies_encode = 2
    copies_decode = 1
    safe = _UNSAFE

    def encode(self, message: Message) -> list[Any]:
        return [pickle.dumps(_content(message), protocol=4)]

    def decode(self, received: bytearray) -> Message:
        return _message(pickle.loads(received))


class TorchTensors(Serializer):
    """What arrives is one bytearray."""

    how = "common"
    copies_encode = 2
    copies_decode = 2
    safe = _UNSAFE

    def encode(self, message: Message) -> list[Any]:
        content = {"op": message.op, "layer": message.layer, "scale": message.scale, "tensors": list(message.tensors)}
        return [pickle.dumps(content, protocol=5)]

    def decode(self, received: bytearray) -> Message:
        return Message(**pickle.loads(received))


class OutOfBand(OutOfBandSerializer):
    """The pickle, then each array's own memory; it arrives in a buffer of its own, and the array is made over it."""

    safe = _UNSAFE

    def encode(self, message: Message) -> list[Any]:
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(_content(message), protocol=5, buffer_callback=buffers.append)
        return [head, *[buffer.raw() for buffer in buffers]]

    def decode(self, received: OutOfBandBytes) -> Message:
        return _message(pickle.loads(received[0], buffers=received[1]))
