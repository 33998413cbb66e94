"""pyzmq: as the original system sent tensors, and the same tuned (rivals/messages.py).

    Original   msgpack of everything, `tobytes()` out and `frombuffer().copy()` in; one way by PUSH and PULL
    Tuned      multipart messages, frames sent out of the tensor's own memory and used where they arrive (`copy=False`;
               small frames pyzmq copies all the same, which is quicker), and over ipc a send buffer of 2 MiB

Round trips by REQ and REP. One way by PUSH and PULL with up to 16 messages waiting at either end; the peer says over
the other pair that it has all. Only sleeping: zmq's own threads move the bytes and wake the callers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zmq

from benches.rivals.messages import MESSAGES

from . import Bytes, KeepingClient, Peer, Run, bytes_of

__all__ = ["OriginalClient", "OriginalPeer", "TunedClient", "TunedPeer"]

_HEAD = {"op": "echo", "attrs": {}}
_WAITING = 16  # messages
_SNDBUF_NBYTES = 2 * 1024**2  # as fastsplit's; tcp sizes its own


class _Sockets:
    """The two sockets of an end, and its way to write messages."""

    way: str

    def _open(self, asking: int, moving: int, ipc: bool) -> None:
        self._context = zmq.Context()
        self._asking: Any = self._context.socket(asking)
        self._moving: Any = self._context.socket(moving)
        for sock in (self._asking, self._moving):
            sock.setsockopt(zmq.LINGER, 0)
            sock.setsockopt(zmq.SNDHWM, _WAITING)
            sock.setsockopt(zmq.RCVHWM, _WAITING)
            if ipc and self.way == "tuned":
                sock.setsockopt(zmq.SNDBUF, _SNDBUF_NBYTES)
        self._way = MESSAGES[self.way]()


class _ZmqPeer(_Sockets, Peer):
    def __init__(self, directory: Path, link: str) -> None:
        self._open(zmq.REP, zmq.PULL, link == "unix")
        addresses = []
        for sock, name in ((self._asking, "asking"), (self._moving, "moving")):
            sock.bind(f"ipc://{directory}/{name}.sock" if link == "unix" else "tcp://127.0.0.1:*")
            addresses.append(sock.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode())
        self.address = json.dumps(addresses)

    def serve(self, run: Run) -> None:
        messages, sock = self._way, self._asking
        for _ in range(run.count):
            head, tensors = messages.decode(sock.recv_multipart(0, messages.zmq_copies))
            if run.mark:
                bytes_of(tensors[0])[:] += 1
            sock.send_multipart(messages.encode(head, tensors), copy=messages.zmq_copies)

    def take(self, run: Run) -> None:
        messages, sock = self._way, self._moving
        for _ in range(run.count):
            _, (self.last,) = messages.decode(sock.recv_multipart(0, messages.zmq_copies))
            self.taken += 1
        self._asking.recv()
        self._asking.send(b"!")

    def close(self) -> None:
        self._context.destroy()


class _ZmqClient(_Sockets, KeepingClient):
    modes = ("sleeping",)

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._open(zmq.REQ, zmq.PUSH, "ipc://" in address)
        for sock, endpoint in zip((self._asking, self._moving), json.loads(address)):
            sock.connect(endpoint)

    def trip(self, run: Run) -> Callable[[], object]:
        messages, sock, tensor = self._way, self._asking, torch.from_numpy(self._messages[run.nbytes])

        def once() -> None:
            sock.send_multipart(messages.encode(_HEAD, [tensor]), copy=messages.zmq_copies)
            _, (self._reply,) = messages.decode(sock.recv_multipart(0, messages.zmq_copies))

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        bytes_of(self._messages[run.nbytes])[:] = message
        self.trip(run)()
        return bytes_of(self._reply).copy()

    def push(self, run: Run, message: Bytes) -> None:
        messages, sock, tensor = self._way, self._moving, torch.from_numpy(message.view("float32"))
        for _ in range(run.count):
            sock.send_multipart(messages.encode(_HEAD, [tensor]), copy=messages.zmq_copies)
        self._asking.send(b"?")
        self._asking.recv()

    def close(self) -> None:
        super().close()
        with contextlib.suppress(zmq.ZMQError):
            self._context.destroy()


class OriginalPeer(_ZmqPeer):
    way = "original"


class OriginalClient(_ZmqClient):
    way = "original"
    how = "common"
    copies = "7: tobytes, two of packb, zmq's two, unpackb's, copy"
    safe = "partly: no limit on the size"


class TunedPeer(_ZmqPeer):
    way = "tuned"


class TunedClient(_ZmqClient):
    way = "tuned"
    copies = "0"
    safe = "partly: no limit on the size"
