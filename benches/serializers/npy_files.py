"""numpy's .npy format, one after the other where there are several tensors. It holds arrays, no op, no attributes, and
no bfloat16: whoever receives int16 here takes it for bfloat16's bits.

np.save writes an array into the BytesIO by way of `bytes` (two copies; what its growth moves is not counted). np.load
reads pieces of 256 KiB and copies them into the array (two). Whoever writes the header alone by numpy's own function,
and the array's memory after it, copies nothing.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy

from .arrays import array_of, tensor_of
from .serializer import Message, OutOfBandBytes, OutOfBandSerializer, Serializer

__all__ = ["NumpySave", "OutOfBand"]


def _tensor(array: Any) -> torch.Tensor:
    return tensor_of(array, "bfloat16" if array.dtype == np.int16 else str(array.dtype))


class NumpySave(Serializer):
    """What arrives is one `bytes`: a BytesIO over a bytearray would copy it."""

    how = "common"
    copies_encode = 2
    copies_decode = 2
    safe = "partly: no pickles (allow_pickle=False), but any shape that is claimed is allocated"
    general = False

    def encode(self, message: Message) -> list[Any]:
        file = io.BytesIO()
        for tensor in message.tensors:
            np.save(file, array_of(tensor), allow_pickle=False)
        return [file.getvalue()]

    def receive(self, wire: list[Any]) -> bytes:
        return b"".join(wire)

    def decode(self, received: bytes) -> Message:
        file = io.BytesIO(received)
        tensors = []
        while file.tell() < len(received):
            tensors.append(_tensor(np.load(file, allow_pickle=False)))
        return Message("", 0, 0.0, tensors)


class OutOfBand(OutOfBandSerializer):
    """All headers, then each tensor's own memory; it arrives in a buffer of its own."""

    safe = "yes: headers are literals of limited length, arrays no larger than what arrived"
    general = False

    def encode(self, message: Message) -> list[Any]:
        headers = io.BytesIO()
        arrays = list(map(array_of, message.tensors))
        for array in arrays:
            npy.write_array_header_1_0(headers, npy.header_data_from_array_1_0(array))
        return [headers.getvalue(), *arrays]

    def decode(self, received: OutOfBandBytes) -> Message:
        headers = io.BytesIO(received[0])
        tensors = []
        for buffer in received[1]:
            if npy.read_magic(headers) != (1, 0):
                raise ValueError("expected version 1.0")
            shape, fortran_order, dtype = npy.read_array_header_1_0(headers)
            if fortran_order or dtype.hasobject or any(dim < 0 for dim in shape):
                raise ValueError(f"expected plain rows, not {dtype}{shape}, fortran_order={fortran_order}")
            tensors.append(_tensor(buffer.view(dtype).reshape(shape)))
        if headers.read(1):
            raise ValueError(f"more headers than buffers, which are {len(received[1])}")
        return Message("", 0, 0.0, tensors)
