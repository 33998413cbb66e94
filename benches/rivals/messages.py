"""Tensors in zmq messages, two ways.

    Original    one frame: msgpack of {op, attrs, tensors: [{data, shape, dtype}, ...]}, data being `array.tobytes()`;
                arrives through `np.frombuffer(data).copy()`, since what msgpack gives is read-only
    Tuned       a frame of msgpack for what is said about the tensors, then one frame a tensor, which zmq sends out of
                the tensor's own memory and which the receiver uses where zmq put it (`copy=False`)

Rules. `copied_nbytes` counts the copies that this code asks for: `tobytes`, `copy`, `contiguous`; not those inside of
the libraries (for Original two of packb, one of unpackb, one of zmq each way). zmq gives the memory of received frames
to Python as writable, so Tuned needs no copy on receipt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import torch
import zmq

__all__ = ["MESSAGES", "Messages", "Original", "Tuned"]

Head = dict[str, Any]
"""What a message says beside its tensors: op and attributes, or what the reply reports."""


class Messages:
    """One way to send tensors. `copied_nbytes`: bytes copied since it was made."""

    zmq_copies: bool
    """Whether zmq copies between its own frames and Python's memory."""

    def __init__(self) -> None:
        self.copied_nbytes = 0

    def encode(self, head: Head, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The frames to send."""
        raise NotImplementedError

    def decode(self, frames: list[Any]) -> tuple[Head, list[torch.Tensor]]:
        """What came, as writable tensors."""
        raise NotImplementedError


class Original(Messages):
    """msgpack of everything, a copy at each step."""

    zmq_copies = True

    def encode(self, head: Head, tensors: Sequence[torch.Tensor]) -> list[Any]:
        packed = []
        for tensor in tensors:
            data = _numpy_of(tensor).tobytes()
            self.copied_nbytes += len(data)
            packed.append({"data": data, "shape": list(tensor.shape), "dtype": _dtype_name(tensor)})
        return [msgpack.packb({**head, "tensors": packed}, use_bin_type=True)]

    def decode(self, frames: list[Any]) -> tuple[Head, list[torch.Tensor]]:
        head = msgpack.unpackb(frames[0], raw=False)
        tensors = []
        for packed in head.pop("tensors"):
            array = np.frombuffer(packed["data"], _numpy_dtype(packed["dtype"])).reshape(packed["shape"]).copy()
            self.copied_nbytes += array.nbytes
            tensors.append(_tensor_of(array, packed["dtype"]))
        return head, tensors


class Tuned(Messages):
    """Multipart: payload frames are the tensors' own memory."""

    zmq_copies = False

    def encode(self, head: Head, tensors: Sequence[torch.Tensor]) -> list[Any]:
        frames = []
        for tensor in tensors:
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
                self.copied_nbytes += tensor.nbytes
            frames.append(_numpy_of(tensor))
        described = [(_dtype_name(tensor), list(tensor.shape)) for tensor in tensors]
        return [msgpack.packb({**head, "tensors": described}, use_bin_type=True), *frames]

    def decode(self, frames: list[zmq.Frame]) -> tuple[Head, list[torch.Tensor]]:
        head = msgpack.unpackb(frames[0].buffer, raw=False)
        tensors = []
        for (dtype, shape), frame in zip(head.pop("tensors"), frames[1:]):
            array = np.frombuffer(frame.buffer, _numpy_dtype(dtype)).reshape(shape)
            if not array.flags.writeable:  # not with the pyzmq of today; another backend may
                array = array.copy()
                self.copied_nbytes += array.nbytes
            tensors.append(_tensor_of(array, dtype))
        return head, tensors


MESSAGES: dict[str, type[Messages]] = {"original": Original, "tuned": Tuned}


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _numpy_dtype(name: str) -> Any:
    return np.dtype("int16" if name == "bfloat16" else name)  # numpy has no bfloat16: its bits travel as int16


def _numpy_of(tensor: torch.Tensor) -> Any:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _tensor_of(array: Any, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
