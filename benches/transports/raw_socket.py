"""A socket with nothing around it: what a wake-up and the kernel's two copies cost in Python.

Blocking `sendall` and a loop of `recv_into` around one buffer for all messages; no header. Spinning: a poll that does
not wait before the first read. One way: the receiver says one byte when it has everything. "Raw" has the kernel's own
buffers, and TCP_NODELAY on tcp; "LargeBuffer" has SO_SNDBUF of 2 MiB on unix sockets, as fastsplit.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import Bytes, Client, Peer, Run, poll_of

__all__ = ["LargeBufferClient", "LargeBufferPeer", "RawClient", "RawPeer"]

_SNDBUF_NBYTES = 2 * 1024**2


def _fill(sock: socket.socket, buffer: memoryview) -> None:
    filled = 0
    while filled < len(buffer):
        received = sock.recv_into(buffer[filled:])
        if not received:
            raise ConnectionError(f"the stream ends after {filled} of {len(buffer)} bytes")
        filled += received


def _set_up(sock: socket.socket, sndbuf_nbytes: int) -> socket.socket:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    elif sndbuf_nbytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf_nbytes)
    return sock


class RawPeer(Peer):
    sndbuf_nbytes = 0

    def __init__(self, directory: Path, link: str) -> None:
        if link == "unix":
            self._listener = socket.socket(socket.AF_UNIX)
            self.address = str(directory / "raw.sock")
            self._listener.bind(self.address)
            self._listener.listen(1)
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.address = str(self._listener.getsockname()[1])
        self._sock: socket.socket | None = None
        self._buffer = np.zeros(0, np.uint8)

    def prepare(self, run: Run) -> None:
        if self._sock is None:
            self._sock = _set_up(self._listener.accept()[0], self.sndbuf_nbytes)
        if len(self._buffer) != run.nbytes:
            self._buffer = np.ones(run.nbytes, np.uint8)

    def serve(self, run: Run) -> None:
        sock, buffer = self._sock, memoryview(self._buffer)
        assert sock is not None
        poll = poll_of(sock)
        for _ in range(run.count):
            if run.spinning:
                while not poll(0):
                    pass
            _fill(sock, buffer)
            if run.mark:
                self._buffer += np.uint8(1)
            sock.sendall(buffer)

    def take(self, run: Run) -> None:
        sock, buffer = self._sock, memoryview(self._buffer)
        assert sock is not None
        for _ in range(run.count):
            _fill(sock, buffer)
            self.taken += 1
        self.last = self._buffer
        sock.sendall(b"!")

    def close(self) -> None:
        self._listener.close()
        if self._sock is not None:
            self._sock.close()


class RawClient(Client):
    modes = ("spinning", "sleeping")
    how = "floor"
    copies = "0"
    safe = "partly: nothing says what comes"
    sndbuf_nbytes = 0

    def __init__(self, address: str) -> None:
        if address.isdigit():
            self._sock = socket.create_connection(("127.0.0.1", int(address)))
        else:
            self._sock = socket.socket(socket.AF_UNIX)
            self._sock.connect(address)
        _set_up(self._sock, self.sndbuf_nbytes)
        self._message = self._reply = np.zeros(0, np.uint8)

    def prepare(self, nbytes: int) -> str:
        self._message, self._reply = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
        return ""

    def trip(self, run: Run) -> Callable[[], object]:
        sock, message, reply = self._sock, memoryview(self._message), memoryview(self._reply)
        poll = poll_of(sock)

        def once() -> None:
            sock.sendall(message)
            if run.spinning:
                while not poll(0):
                    pass
            _fill(sock, reply)

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        self._message[:] = message
        self.trip(run)()
        return self._reply.copy()

    def push(self, run: Run, message: Bytes) -> None:
        sock, view = self._sock, memoryview(message)
        for _ in range(run.count):
            sock.sendall(view)
        if sock.recv(1) != b"!":
            raise ConnectionError("the receiver left before it had everything")

    def release(self, nbytes: int) -> None:
        self._message = self._reply = np.zeros(0, np.uint8)

    def close(self) -> None:
        self._sock.close()


class LargeBufferPeer(RawPeer):
    sndbuf_nbytes = _SNDBUF_NBYTES


class LargeBufferClient(RawClient):
    sndbuf_nbytes = _SNDBUF_NBYTES
