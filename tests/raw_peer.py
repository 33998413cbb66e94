"""A peer made of a plain socket, for tests of what a real server or channel does with one that misbehaves.

Frames are packed here from the byte table in docs/protocol.md, not by fastsplit.schema.header, so that the two check
each other; and so is the ring, not by fastsplit.wire.shm.ring.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from fastsplit.schema.decoder import Decoder
from fastsplit.schema.descriptor import Message
from fastsplit.schema.encoder import Encoder
from fastsplit.schema.limits import Limits
from fastsplit.wire.shm.semaphores import semaphores
from fastsplit.wire.transport.address import UnixAddress, parse_address

HELLO, REQUEST, REPLY, ERROR, CANCEL, GOODBYE, ABORT, SEGMENT, ATTACHED, RETIRE, RETURN, PROBE = range(1, 13)
HEADER = struct.Struct("<4sBBHQIIQQ")
FLOAT32 = 12
WIDE = Limits(max_tensors=10_000, max_dims=1000, max_attrs=10_000, max_metadata_nbytes=2**24, max_message_nbytes=2**50)


class Frame(NamedTuple):
    kind: int
    request_id: int
    message: Message
    payload: bytes
    time_ns: int


def frame(
    kind: int,
    /,
    request_id: int = 0,
    op: str = "",
    tensors: Sequence[tuple[int, tuple[int, ...]]] = (),
    attrs: Mapping[str, Any] | None = None,
    payload: bytes = b"",
    placements: Sequence[int] = (),
    returns: Sequence[int] = (),
    typed: bool = False,
    **header: Any,
) -> bytes:
    """One frame. `header`: fields that shall lie (magic, version, flags, metadata_nbytes, payload_nbytes, ...).

    `placements`: segment, offset and nbytes of each tensor. `returns`: segment and offset of each. `typed`: with
    attributes of all types.
    """
    metadata, varying_nbytes = Encoder(WIDE, typed=typed).encode(op, tensors, attrs or {}, placements, returns)
    return raw_frame(kind, request_id, bytes(metadata), payload, **{"varying_nbytes": varying_nbytes, **header})


def raw_frame(kind: int, /, request_id: int = 0, metadata: bytes = b"", payload: bytes = b"", **header: Any) -> bytes:
    fields = {
        "magic": b"FSPL",
        "version": 1,
        "kind": kind,
        "flags": 0,
        "request_id": request_id,
        "metadata_nbytes": len(metadata),
        "varying_nbytes": 0,
        "payload_nbytes": len(payload),
        "time_ns": 0,
    }
    assert header.keys() <= fields.keys()
    return HEADER.pack(*{**fields, **header}.values()) + metadata + payload


def hello(limits: Limits | None = None, *, typed: bool = False, **changes: Any) -> bytes:
    attrs = {"software": "test", "version": 1, "capabilities": 0, **asdict(limits or Limits()), **changes}
    attrs = {name: value for name, value in attrs.items() if value is not None}
    return frame(HELLO, op="hello", attrs=attrs, typed=typed)


def shm_hello(ring: bool = True, **changes: Any) -> bytes:
    """A HELLO that offers shared memory: memfd segments, if `changes` do not say otherwise."""
    offer = {"shm": "memfd", "shm_prefix": "", "shm_note": "", "shm_token": "0" * 16}
    return hello(**{"capabilities": 1, **offer, "semaphores": semaphores() if ring else "", **changes})


def segment(segment_id: int, nbytes: int, name: str = "") -> bytes:
    """The announcement of a segment."""
    return frame(SEGMENT, attrs={"id": segment_id, "nbytes": nbytes, "name": name})


@contextlib.contextmanager
def memfd(nbytes: int, *, seals: int = fcntl.F_SEAL_SHRINK, reserved: bool = True) -> Iterator[int]:
    """The descriptor of anonymous memory."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        if reserved and nbytes:
            os.posix_fallocate(fd, 0, nbytes)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


class RawRing:
    """The ring, read and written slot by slot. All of its memory is open to whoever tests with it."""

    SLOTS, SLOT_NBYTES, SLOTS_AT, NBYTES = 64, 1024, 12288, 12288 + 2 * 64 * 1024
    HEADER = struct.pack("<8sIII", b"FSPLRING", 1, SLOTS, SLOT_NBYTES)
    ASLEEP_AT, SPACE_AT, ITEMS_AT, STRIDE = (64, 128), (256, 384), (4096, 8192), 64  # the client's, the server's
    FENCE_AT = 192

    def __init__(self, memory: mmap.mmap, sock: socket.socket, *, is_client: bool) -> None:
        self.memory = memory
        self._sock = sock
        self.out, self.into = (0, 1) if is_client else (1, 0)  # directions
        self._out_slot = self._in_slot = 0
        self._libc = ctypes.PyDLL(None)
        if is_client:
            memory[: len(self.HEADER)] = self.HEADER
            for lock in [self.item(way, slot) for way in (0, 1) for slot in range(self.SLOTS)] + self.spaces():
                self._libc.pthread_spin_init(lock, 1)
                assert self._libc.pthread_spin_trylock(lock) == 0
            self._libc.pthread_spin_init(self._lock(self.FENCE_AT), 1)

    def _lock(self, at: int) -> Any:
        return ctypes.byref(ctypes.c_int.from_buffer(self.memory, at))

    def item(self, way: int, slot: int) -> Any:
        return self._lock(self.ITEMS_AT[way] + self.STRIDE * slot)

    def spaces(self) -> list[Any]:
        return [self._lock(at + self.STRIDE * half) for at in self.SPACE_AT for half in (0, 1)]

    def post(self, lock: Any) -> None:
        self._libc.pthread_spin_unlock(lock)

    def slot_at(self, way: int, slot: int) -> int:
        return self.SLOTS_AT + (way * self.SLOTS + slot) * self.SLOT_NBYTES

    def put(self, part: bytes, *, ring_bell: bool = True) -> None:
        """Fills the next slot, whether or not there is room."""
        at = self.slot_at(self.out, self._out_slot)
        self.memory[at : at + len(part)] = part
        self.post(self.item(self.out, self._out_slot))
        self._out_slot = (self._out_slot + 1) % self.SLOTS
        if ring_bell:
            self.ring_bell()

    def send(self, data: bytes) -> None:
        for at in range(0, len(data), self.SLOT_NBYTES):
            self.put(data[at : at + self.SLOT_NBYTES])

    def ring_bell(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.send(b"w", socket.MSG_NOSIGNAL)

    def take(self, timeout_s: float = 10.0) -> bytes | None:
        """The next slot, None at the end of the stream."""
        deadline = time.monotonic() + timeout_s
        ended = False
        while self._libc.pthread_spin_trylock(self.item(self.into, self._in_slot)) != 0:
            if ended:
                return None
            assert time.monotonic() < deadline, "nothing came through the ring"
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                ended = not self._sock.recv(4096)
            time.sleep(0.0005)
        at = self.slot_at(self.into, self._in_slot)
        slot = self.memory[at : at + self.SLOT_NBYTES]
        self._in_slot = (self._in_slot + 1) % self.SLOTS
        if self._in_slot % (self.SLOTS // 2) == 0:
            self.post(self.spaces()[2 * self.into + (self._in_slot == 0)])
            self.ring_bell()
        return slot

    def receive(self) -> bytes | None:
        """The next frame."""
        data = self.take()
        if data is None:
            return None
        nbytes = HEADER.size + HEADER.unpack_from(data)[5]
        while len(data) < nbytes:
            more = self.take()
            assert more is not None, "the stream ended inside a frame"
            data += more
        return data[:nbytes]


class RawPeer:
    """One end of a connection, read and written frame by frame: through the ring, once there is one."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(10)
        self.fds: list[int] = []
        """Descriptors that came."""
        self.ring: RawRing | None = None
        self._decoder = Decoder(WIDE)

    def send(self, *parts: bytes) -> None:
        if self.ring is not None:
            self.ring.send(b"".join(parts))
        else:
            self.sock.sendall(b"".join(parts))

    def send_fds(self, data: bytes, *fds: int) -> None:
        """Sends descriptors with the first byte of `data`, through the socket."""
        assert self.sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]) == len(data)

    def announce(self, segment_id: int, nbytes: int, fd: int, name: str = "") -> None:
        """Sends a descriptor, and the announcement of its segment."""
        if self.ring is None:
            self.send_fds(segment(segment_id, nbytes, name), fd)
        else:
            self.send_fds(b"d", fd)
            self.send(segment(segment_id, nbytes, name))

    def receive(self) -> Frame | None:
        """The next frame, None at the end of the stream."""
        if self.ring is not None:
            whole = self.ring.receive()
            head, metadata = (whole[: HEADER.size], whole[HEADER.size :]) if whole else (None, None)
        else:
            head = self._exactly(HEADER.size)
            metadata = None
        if head is None:
            return None
        magic, version, kind, flags, request_id, metadata_nbytes, varying_nbytes, payload_nbytes, time_ns = (
            HEADER.unpack(head)
        )
        assert (magic, version, flags) == (b"FSPL", 1, 0)
        if metadata is None:
            metadata = self._exactly(metadata_nbytes)
        payload = self._exactly(payload_nbytes)
        assert metadata is not None and payload is not None
        return Frame(kind, request_id, self._decoder.decode(metadata, varying_nbytes), payload, time_ns)

    def expect(self, kind: int) -> Frame:
        """The next frame of this kind; announcements and returns before it are skipped."""
        came = self.receive()
        while came is not None and came.kind != kind and came.kind in (SEGMENT, RETIRE, RETURN):
            came = self.receive()
        assert came is not None and came.kind == kind, came
        return came

    def greet(self, limits: Limits | None = None) -> None:
        self.send(hello(limits))
        came = self.receive()
        assert came is not None and came.kind == HELLO

    def greet_shm(self, *, is_client: bool, ring: bool = True) -> None:
        """The handshake, with shared memory, and with a ring if wanted."""
        self.send(shm_hello(ring))
        self.expect(HELLO)
        if not ring:
            return
        if is_client:
            with memfd(RawRing.NBYTES) as fd:
                made = RawRing(mmap.mmap(fd, RawRing.NBYTES), self.sock, is_client=True)
                self.announce(0, RawRing.NBYTES, fd)
            assert self.expect(ATTACHED).message.attrs["text"] == ""
        else:
            offered = self.receive()
            assert offered is not None and offered.kind == SEGMENT and offered.message.attrs["id"] == 0
            made = RawRing(mmap.mmap(self.fds[0], RawRing.NBYTES), self.sock, is_client=False)
            self.send(frame(ATTACHED, attrs={"text": ""}))
        self.sock.setblocking(False)
        self.ring = made

    def close(self) -> None:
        self.sock.close()
        while self.fds:
            os.close(self.fds.pop())

    def expect_abort(self) -> str:
        """The peer's reason; after it, its stream ends. What it said before is skipped."""
        came = self.receive()
        while came is not None and came.kind in (HELLO, REQUEST, SEGMENT, RETURN, REPLY, PROBE):
            came = self.receive()
        assert came is not None and came.kind == ABORT, came
        self.close_writing()
        assert self.receive() is None
        return str(came.message.attrs["text"])

    def close_writing(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def _exactly(self, nbytes: int) -> bytes | None:
        out = bytearray()
        while len(out) < nbytes:
            with contextlib.suppress(ConnectionResetError):
                part, ancillary, _, _ = self.sock.recvmsg(min(nbytes - len(out), 2**20), socket.CMSG_SPACE(16))
                for _, _, data in ancillary:
                    self.fds += array.array("i", data)
                out += part
                if part:
                    continue
            if not out:
                return None
            raise AssertionError(f"the stream ended after {len(out)} of {nbytes} bytes")
        return bytes(out)


@contextlib.contextmanager
def connected(uri: str) -> Iterator[RawPeer]:
    """A raw client of a server."""
    address = parse_address(uri)
    if isinstance(address, UnixAddress):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(address.path)
    else:
        sock = socket.create_connection((address.host, address.port))
    peer = RawPeer(sock)
    try:
        yield peer
    finally:
        peer.close()


@contextlib.contextmanager
def serving(uri: str, script: Callable[[RawPeer], None], clients: int = 1) -> Iterator[str]:
    """A raw server that runs `script` for each of its clients; what the script raises fails the test."""
    address = parse_address(uri)
    if isinstance(address, UnixAddress):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(address.path)
    else:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((address.host, address.port))
        uri = f"tcp://{address.host}:{listener.getsockname()[1]}"
    listener.listen()
    failures: list[BaseException] = []

    def run() -> None:
        for _ in range(clients):
            sock, _ = listener.accept()
            peer = RawPeer(sock)
            try:
                script(peer)
            except BaseException as error:
                failures.append(error)
            finally:
                peer.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield uri
    finally:
        thread.join(20)
        listener.close()
    assert not thread.is_alive()
    if failures:
        raise failures[0]
