"""multiprocessing.Pipe with the bytes in it.

At its best: `send_bytes` of the message's own memory, for `send` would pickle it, and `recv_bytes` with the size that
is expected, over whose bytes an array is made, read-only as bytes are; `recv_bytes_into` copies once more. The send
buffer is 2 MiB. Spinning: a poll that does not wait. One way: the receiver says one byte when it has everything.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Client as connect_pipe
from typing import Any

import numpy as np

from benches import transports

from . import Bytes, KeepingClient, Run, bytes_of, poll_of

__all__ = ["PipeClient", "PipePeer"]

_SNDBUF_NBYTES = 2 * 1024**2  # as fastsplit's


def _with_buffer(pipe: Any) -> Any:
    with socket.socket(fileno=os.dup(pipe.fileno())) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SNDBUF_NBYTES)
    return pipe


def _receiver(pipe: Any, run: Run) -> Callable[[], Bytes]:
    """What receives a message as an array each time it is called."""
    recv_bytes, frombuffer, nbytes = pipe.recv_bytes, np.frombuffer, run.nbytes
    ready = poll_of(pipe)

    def receive() -> Bytes:
        if run.spinning:
            while not ready(0):
                pass
        array = frombuffer(recv_bytes(nbytes), np.uint8)  # OSError if more would come
        if array.nbytes != nbytes:
            raise ConnectionError(f"{array.nbytes} bytes came, expected {nbytes}")
        return array

    return receive


class PipePeer(transports.PipePeer):
    def prepare(self, run: Run) -> None:
        if self._pipe is None:
            super().prepare(run)
            _with_buffer(self._pipe)

    def serve(self, run: Run) -> None:
        send_bytes, receive = self._pipe.send_bytes, _receiver(self._pipe, run)
        for _ in range(run.count):
            array = receive()
            if run.mark:
                array = array + np.uint8(1)
            send_bytes(array)

    def take(self, run: Run) -> None:
        receive = _receiver(self._pipe, run)
        for _ in range(run.count):
            self.last = receive()
            self.taken += 1
        self._pipe.send_bytes(b"!")


class PipeClient(KeepingClient):
    copies = "1, of what is read"
    writable = "no: it is bytes"
    safe = "partly: nothing says what comes"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._pipe: Any = _with_buffer(connect_pipe(address, "AF_UNIX"))

    def trip(self, run: Run) -> Callable[[], object]:
        send_bytes, receive, message = (
            self._pipe.send_bytes,
            _receiver(self._pipe, run),
            bytes_of(self._messages[run.nbytes]),
        )

        def once() -> None:
            send_bytes(message)
            self._reply = receive()

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        bytes_of(self._messages[run.nbytes])[:] = message
        self.trip(run)()
        reply: Bytes = self._reply.copy()
        return reply

    def push(self, run: Run, message: Bytes) -> None:
        send_bytes = self._pipe.send_bytes
        for _ in range(run.count):
            send_bytes(message)
        if self._pipe.recv_bytes() != b"!":
            raise ConnectionError("the receiver left before it had everything")

    def close(self) -> None:
        super().close()
        self._pipe.close()
