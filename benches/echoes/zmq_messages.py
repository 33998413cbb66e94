"""pyzmq over ipc, REQ and REP: as the original system sent tensors, and the same tuned (rivals/messages.py).

Original: msgpack of everything, `tobytes()` out and `frombuffer().copy()` in. Tuned: multipart messages, frames sent
out of the tensor's own memory and used where they arrive (`copy=False`; small frames pyzmq copies all the same, which
is quicker). Only sleeping: zmq's own threads move the bytes and wake the callers, and a caller that asks again and
again would take their core.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import zmq

from benches.rivals.messages import MESSAGES

from . import Bytes, Client, Peer, Run, bytes_of

__all__ = ["OriginalEchoClient", "OriginalEchoPeer", "TunedEchoClient", "TunedEchoPeer"]

_HEAD = {"op": "echo", "attrs": {}}


class _ZmqPeer(Peer):
    way: str

    def __init__(self, directory: Path) -> None:
        self.address = f"ipc://{directory}/zmq.sock"
        self._context = zmq.Context()
        self._socket: Any = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self.address)
        self._messages = MESSAGES[self.way]()

    def serve(self, run: Run) -> None:
        messages, socket = self._messages, self._socket
        for _ in range(run.count):
            head, tensors = messages.decode(socket.recv_multipart(0, messages.zmq_copies))
            if run.mark:
                bytes_of(tensors[0])[:] += 1
            socket.send_multipart(messages.encode(head, tensors), copy=messages.zmq_copies)

    def close(self) -> None:
        self._context.destroy()


class _ZmqClient(Client):
    modes = ("sleeping",)
    way: str

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket: Any = self._context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._messages = MESSAGES[self.way]()
        self._tensors: dict[int, torch.Tensor] = {}
        self._reply: Any = None

    def prepare(self, nbytes: int) -> str:
        self._tensors[nbytes] = torch.zeros(nbytes // 4)
        bytes_of(self._tensors[nbytes])[:] = 0
        return ""

    def trips(self, run: Run) -> None:
        messages, socket, tensor = self._messages, self._socket, self._tensors[run.nbytes]
        for _ in range(run.count):
            socket.send_multipart(messages.encode(_HEAD, [tensor]), copy=messages.zmq_copies)
            _, (self._reply,) = messages.decode(socket.recv_multipart(0, messages.zmq_copies))

    def marked(self, run: Run, message: Bytes) -> Bytes:
        bytes_of(self._tensors[run.nbytes])[:] = message
        self.trips(run)
        return bytes_of(self._reply).copy()

    def release(self, nbytes: int) -> None:
        self._reply = None
        del self._tensors[nbytes]

    def close(self) -> None:
        self._reply = None
        with contextlib.suppress(zmq.ZMQError):
            self._context.destroy()


class OriginalEchoPeer(_ZmqPeer):
    way = "original"


class OriginalEchoClient(_ZmqClient):
    way = "original"


class TunedEchoPeer(_ZmqPeer):
    way = "tuned"


class TunedEchoClient(_ZmqClient):
    way = "tuned"
