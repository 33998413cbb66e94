"""`memory://NAME`: connections within one process, without sockets. A scheme of the tests' own.

It shows what a scheme takes: a Transport, an Address, and a line in the registry (see `test_memory_transport.py`). Each
end has an eventfd, which is readable while there is something to read, so that poll and event loops can wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult

from fastsplit.errors import ConnectError, DeadlineError, ListenError, PeerLostError
from fastsplit.wire.transport.base import Sink, Transport, remaining_s
from fastsplit.wire.transport.scheme import SHM_AUTO, Address, shm_query
from fastsplit.wire.transport.spin import Spin

__all__ = ["LISTENERS", "MemoryAddress", "MemoryTransport"]


class _Bell:
    """An eventfd that is readable while it is rung."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self, rings: bool) -> None:
        if self.fd != -1:
            with contextlib.suppress(BlockingIOError):  # it did not ring
                os.eventfd_write(self.fd, 1) if rings else os.eventfd_read(self.fd)

    def wait(self, timeout_s: float | None) -> bool:
        if self.fd == -1:
            raise PeerLostError("the connection is lost: this end is closed")
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd != -1:
            os.close(fd)


class MemoryTransport(Transport):
    """One end. What is sent is in the peer's `inbox` at once, however much it is."""

    bytes_sent = bytes_received = 0
    ended = False  # nothing more comes in

    def __init__(self, lock: threading.RLock) -> None:
        self.spin, self.lock, self.bell = Spin(0.0), lock, _Bell()
        self.peer, self.inbox = self, bytearray()

    def send(self, buffers: Sequence[Any], nbytes: int = -1) -> Sequence[Any]:
        with self.lock:
            if self.peer.ended or self.peer.bell.fd == -1 or self.bell.fd == -1:
                raise PeerLostError("the connection is lost: the other end is closed")
            for buffer in buffers:
                self.peer.inbox += memoryview(buffer).cast("B")
                self.bytes_sent += memoryview(buffer).nbytes
            self.peer.bell.set(True)
        return ()

    def wait(self, deadline: float | None, *, reading: bool) -> tuple[bool, bool]:
        if remaining_s(deadline) == 0.0:
            raise DeadlineError("the peer took too long to read")
        return reading and self.has_bytes(), True

    def receive(
        self, sink: Sink, deadline: float | None, *, blocking: bool = True, events: list[Any] | None = None
    ) -> list[Any] | None:
        if sink.unfinished or sink.arrived:
            return sink.received(sink.arrived, events)
        if not self.bell.wait(remaining_s(deadline) if blocking else 0.0):
            raise DeadlineError("nothing came from the peer")
        with self.lock:
            buffers = sink.receive_buffers()
            arrived = min(len(self.inbox), sum(map(len, buffers)))
            for buffer in buffers:
                part = self.inbox[: len(buffer)]
                buffer[: len(part)] = part
                del self.inbox[: len(part)]
            self.bell.set(bool(self.inbox) or self.ended)
        self.bytes_received += arrived
        return sink.received(arrived, events) if arrived else None

    def has_bytes(self) -> bool:
        return bool(self.inbox) or self.ended

    def fileno(self) -> int:
        return self.bell.fd

    def drain(self) -> bool:
        with self.lock:
            drained, self.inbox = self.inbox, bytearray()
            self.bell.set(self.ended)
            return bool(drained) or not self.ended

    def peer_name(self) -> str:
        return "this process"

    def peer_left(self) -> bool:
        return self.ended or self.bell.fd == -1

    def shutdown_writing(self) -> None:
        self.peer.shutdown_reading()

    def shutdown_reading(self) -> None:
        with self.lock:
            self.ended = True
            self.bell.set(True)

    def close(self) -> None:
        with self.lock:
            self.peer.shutdown_reading()
            self.bell.close()


class _Listener:
    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: deque[MemoryTransport] = deque()
        self.bell = _Bell()

    def fileno(self) -> int:
        return self.bell.fd

    def close(self) -> None:
        LISTENERS.pop(self.name, None)
        self.bell.close()
        while self.waiting:
            self.waiting.popleft().close()


LISTENERS: dict[str, _Listener] = {}


@dataclass(frozen=True)
class MemoryAddress(Address):
    name: str
    shm: str = SHM_AUTO

    is_local = True

    def __str__(self) -> str:
        return f"memory://{self.name}{shm_query(self.shm)}"

    @classmethod
    def parse(cls, uri: str, parts: SplitResult, shm: str) -> MemoryAddress:
        return cls(parts.netloc, shm)

    def connect(self, timeout_s: float) -> MemoryTransport:
        listener = LISTENERS.get(self.name)
        if listener is None:
            raise ConnectError(f"{self}: cannot connect: no listener")
        lock = threading.RLock()
        near, far = MemoryTransport(lock), MemoryTransport(lock)
        near.peer, far.peer = far, near
        listener.waiting.append(far)
        listener.bell.set(True)
        return near

    def listen(self, backlog: int = 128, *, insecure: bool = False) -> tuple[_Listener, MemoryAddress]:
        if self.name in LISTENERS:
            raise ListenError(errno.EADDRINUSE, f"{self}: cannot listen: {os.strerror(errno.EADDRINUSE)}")
        listener = LISTENERS[self.name] = _Listener(self.name)
        return listener, self

    def accept(self, listener: _Listener) -> MemoryTransport:
        listener.bell.set(False)
        if not listener.waiting:
            raise BlockingIOError
        end = listener.waiting.popleft()
        listener.bell.set(bool(listener.waiting))
        return end

    def transport(self, end: MemoryTransport) -> MemoryTransport:
        return end
