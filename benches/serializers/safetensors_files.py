"""safetensors: a JSON header, then the tensors. Op and attributes fit its header as text (`__metadata__`).

`safetensors.torch.load` does not give the metadata: with the library alone, only tensors arrive. Whoever reads and
writes the header with `json`, as the format's description invites one to, has the metadata, too, and copies nothing.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import safetensors.torch

from .arrays import array_of, dtype_name, tensor_over
from .serializer import Message, OutOfBandBytes, OutOfBandSerializer, Serializer

__all__ = ["Library", "OutOfBand"]

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}
_NAMES = {code: name for name, code in _CODES.items()}


class Library(Serializer):
    """What arrives is one `bytes`, the only thing that `load` takes; it copies each tensor into a bytearray. `save`
    makes bytes of what it has put together."""

    how = "common"
    copies_encode = 2
    copies_decode = 1
    safe = "yes: the header's length, offsets and overlaps are checked"
    general = False

    def encode(self, message: Message) -> list[Any]:
        metadata = {"op": message.op, "layer": str(message.layer), "scale": repr(message.scale)}
        tensors = {str(index): tensor for index, tensor in enumerate(message.tensors)}
        return [safetensors.torch.save(tensors, metadata)]

    def receive(self, wire: list[Any]) -> bytes:
        return b"".join(wire)

    def decode(self, received: bytes) -> Message:
        tensors = safetensors.torch.load(received)
        return Message("", 0, 0.0, [tensors[str(index)] for index in range(len(tensors))])


class OutOfBand(OutOfBandSerializer):
    """The header, then each tensor's own memory; it arrives in a buffer of its own, as the header says its size."""

    safe = "yes: names, dtypes, shapes and offsets are checked by this code"

    def encode(self, message: Message) -> list[Any]:
        metadata = {"op": message.op, "layer": str(message.layer), "scale": repr(message.scale)}
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for index, tensor in enumerate(message.tensors):
            start, end = end, end + tensor.nbytes
            header[str(index)] = {
                "dtype": _CODES[dtype_name(tensor)],
                "shape": tuple(tensor.shape),
                "data_offsets": (start, end),
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return [struct.pack("<Q", len(text)) + text, *map(array_of, message.tensors)]

    def decode(self, received: OutOfBandBytes) -> Message:
        head, buffers = received
        (header_nbytes,) = struct.unpack_from("<Q", head)
        if header_nbytes != len(head) - 8:
            raise ValueError(f"a header of {header_nbytes} bytes, expected {len(head) - 8}")
        header = json.loads(head[8:])
        metadata = header.pop("__metadata__")
        if not isinstance(metadata["op"], str):
            raise ValueError(f"op {metadata['op']!r}, expected text")
        if len(header) != len(buffers):
            raise ValueError(f"{len(buffers)} buffers, expected {len(header)}")
        tensors = []
        expected = 0
        for index, buffer in enumerate(buffers):
            said = header[str(index)]
            start, end = said["data_offsets"]
            if start != expected or end - start != len(buffer):
                raise ValueError(f"offsets {start} to {end}, expected {len(buffer)} bytes from {expected} on")
            expected = end
            tensors.append(tensor_over(buffer, _NAMES[said["dtype"]], said["shape"]))
        return Message(metadata["op"], int(metadata["layer"]), float(metadata["scale"]), tensors)
