"""multiprocessing.Pipe with the bytes in it.

At its best: `send_bytes` of the message's own memory, for `send` would pickle it, and `recv_bytes` with the size that
is expected, over whose bytes an array is made: an array for each message, read-only as bytes are. `recv_bytes_into` an
array that is writable is the same with one more copy: it reads into bytes first, too. A small message goes out behind
its length in one write, a large one in two, and comes in by two reads or more. The send buffer is 2 MiB.

A Pipe's ends are Connections over a socket pair; those here are over a connected unix socket, which is the same thing.
Spinning: a poll that does not wait, before a message is read (`Connection.poll` makes a selector each time). One way:
the receiver says one byte when it has everything.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Client as connect_pipe
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

from . import Bytes, Client, Peer, Run, poll_of

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


class PipePeer(Peer):
    def __init__(self, directory: Path, link: str) -> None:
        self.address = str(directory / "pipe.sock")
        self._listener = Listener(self.address, "AF_UNIX")
        self._connected: Connection | None = None

    @property
    def _pipe(self) -> Any:
        return self._connected

    def prepare(self, run: Run) -> None:
        if self._connected is None:
            self._connected = _with_buffer(self._listener.accept())

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

    def close(self) -> None:
        self._listener.close()
        if self._connected is not None:
            self._connected.close()


class PipeClient(Client):
    copies = "1, of what is read"
    writable = "no: it is bytes"
    safe = "partly: nothing says what comes"

    def __init__(self, address: str) -> None:
        self._pipe: Any = _with_buffer(connect_pipe(address, "AF_UNIX"))
        self._messages: dict[int, Bytes] = {}
        self._reply: Any = None

    def prepare(self, nbytes: int) -> str:
        self._messages[nbytes] = np.ones(nbytes, np.uint8)
        return ""

    def trip(self, run: Run) -> Callable[[], object]:
        send_bytes, receive, message = self._pipe.send_bytes, _receiver(self._pipe, run), self._messages[run.nbytes]

        def once() -> None:
            send_bytes(message)
            self._reply = receive()

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        self._messages[run.nbytes][:] = message
        self.trip(run)()
        reply: Bytes = self._reply.copy()
        return reply

    def push(self, run: Run, message: Bytes) -> None:
        send_bytes = self._pipe.send_bytes
        for _ in range(run.count):
            send_bytes(message)
        if self._pipe.recv_bytes() != b"!":
            raise ConnectionError("the receiver left before it had everything")

    def release(self, nbytes: int) -> None:
        self._reply = None
        del self._messages[nbytes]

    def close(self) -> None:
        self._reply = None
        self._messages.clear()
        self._pipe.close()
