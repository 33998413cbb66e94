"""torch.save into a BytesIO, torch.load(weights_only=True) out of one. torch has nothing that copies less into memory:
mmap=True takes files alone. What arrives is one `bytes`: a BytesIO over a bytearray would copy it.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from .serializer import Message, Serializer

__all__ = ["TorchSave"]


class TorchSave(Serializer):
    how = "common"
    copies_encode = 1
    copies_decode = 1
    safe = "partly: a restricted unpickler (weights_only), which torch before 2.6 could be led around"

    def encode(self, message: Message) -> list[Any]:
        file = io.BytesIO()
        torch.save(message._asdict() | {"tensors": list(message.tensors)}, file)
        return [file.getbuffer()]

    def receive(self, wire: list[Any]) -> bytes:
        return b"".join(wire)

    def decode(self, received: bytes) -> Message:
        return Message(**torch.load(io.BytesIO(received), weights_only=True))
