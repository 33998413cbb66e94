"""What every contestant is and says of itself."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

__all__ = ["Message", "OutOfBandBytes", "OutOfBandSerializer", "Serializer", "joined", "wire_nbytes"]

OutOfBandBytes = tuple[bytes, list[Any]]
"""What has arrived of a message whose tensors stand by themselves: what is said, and a writable buffer for each."""


class Message(NamedTuple):
    """A request as the split of a model makes them."""

    op: str
    layer: int
    scale: float
    tensors: Sequence[torch.Tensor]


class Serializer(abc.ABC):
    """One way. An object may keep what a connection would keep: a codec, a buffer of its own."""

    how: ClassVar[str] = "best"
    """"best", or "common": as it is commonly written."""
    copies_encode: ClassVar[int]
    copies_decode: ClassVar[int]
    """How often all bytes of all tensors are copied, by our code and inside of the library."""
    safe: ClassVar[str]
    """Whether bytes from whomever may be decoded: "yes", "partly" or "no" as __init__.py defines them, and why."""
    general: ClassVar[bool] = True
    """Whether op and attributes travel, too; else tensors alone."""
    note: ClassVar[str] = ""
    """What else a reader of the figures should know."""

    @abc.abstractmethod
    def encode(self, message: Message) -> list[Any]:
        """Buffers for `socket.sendmsg`, in order."""

    def receive(self, wire: list[Any]) -> Any:
        """What `decode` takes: the same bytes where a receiver has read them to, never memory of the sender's. If not
        said otherwise, one bytearray."""
        return joined(wire)

    @abc.abstractmethod
    def decode(self, received: Any) -> Message:
        """The message, its tensors writable. What is not `general` leaves op and attributes empty."""


class OutOfBandSerializer(Serializer):
    """What is said, then each tensor's own memory, which arrives in a buffer of its own."""

    copies_encode = 0
    copies_decode = 0

    def receive(self, wire: list[Any]) -> OutOfBandBytes:
        """The first buffer of a message as bytes, the others each in memory of its own."""
        return bytes(wire[0]), [np.frombuffer(buffer, np.uint8).copy() for buffer in wire[1:]]


def joined(wire: list[Any]) -> bytearray:
    """A message of one piece, as read into one buffer."""
    received = bytearray()
    for buffer in wire:
        received += memoryview(buffer).cast("B")
    return received


def wire_nbytes(wire: list[Any]) -> int:
    return sum(memoryview(buffer).nbytes for buffer in wire)
