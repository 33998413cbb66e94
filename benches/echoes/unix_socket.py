"""64 bytes through a unix socket and back, with nothing around them: what a wake-up costs in Python.

Sleeping: blocking `sendall` and `recv_into`, one buffer for all messages. Spinning: a poll that does not wait,
then the same (a non-blocking recv, which raises as long as there is nothing, was no faster). Only 64 bytes: larger
messages need a loop around `recv_into`, and bench_wire.py has those.
"""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

import numpy as np

from . import Bytes, Client, Peer, Run

__all__ = ["UnixSocketClient", "UnixSocketPeer"]

_NBYTES = 64


class UnixSocketPeer(Peer):
    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "echo.sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen(1)
        self._sock: socket.socket | None = None

    def prepare(self, run: Run) -> None:
        if self._sock is None:
            self._sock, _ = self._listener.accept()

    def serve(self, run: Run) -> None:
        sock, message = self._sock, bytearray(_NBYTES)
        assert sock is not None
        poll = _poll(sock)
        for _ in range(run.count):
            if run.spinning:
                while not poll(0):
                    pass
            if sock.recv_into(message) != _NBYTES:
                raise ConnectionError("a short read in the echo")
            if run.mark:
                np.frombuffer(message, np.uint8)[:] += 1
            sock.sendall(message)

    def close(self) -> None:
        self._listener.close()
        if self._sock is not None:
            self._sock.close()


class UnixSocketClient(Client):
    sizes_nbytes = (_NBYTES,)

    def __init__(self, address: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(address)
        self._message = os.urandom(_NBYTES)
        self._reply = bytearray(_NBYTES)

    def prepare(self, nbytes: int) -> str:
        return ""

    def trips(self, run: Run) -> None:
        sock, message, reply = self._sock, self._message, self._reply
        poll = _poll(sock)
        for _ in range(run.count):
            sock.sendall(message)
            if run.spinning:
                while not poll(0):
                    pass
            if sock.recv_into(reply) != _NBYTES:
                raise ConnectionError("a short read in the echo")

    def marked(self, run: Run, message: Bytes) -> Bytes:
        self._message = message.tobytes()
        self.trips(run)
        return np.frombuffer(bytes(self._reply), np.uint8)

    def close(self) -> None:
        self._sock.close()


def _poll(sock: socket.socket):  # type: ignore[no-untyped-def]
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return poll.poll
