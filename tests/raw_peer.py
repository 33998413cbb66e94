"""A peer made of a plain socket, for tests of what a real server or channel does with one that misbehaves.

Frames are packed here from the byte table in docs/protocol.md, not by fastsplit.wire.frame, so that the two check each
other.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from fastsplit.schema.descriptor import Decoder, Encoder, Message
from fastsplit.schema.limits import Limits
from fastsplit.wire.address import UnixAddress, parse_address

HELLO, REQUEST, REPLY, ERROR, CANCEL, GOODBYE, ABORT = range(1, 8)
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
    **header: Any,
) -> bytes:
    """One frame. `header`: fields that shall lie (magic, version, flags, metadata_nbytes, payload_nbytes, ...)."""
    metadata, varying_nbytes = Encoder(WIDE).encode(op, tensors, attrs or {})
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


def hello(limits: Limits | None = None, **changes: Any) -> bytes:
    attrs = {"software": "test", "version": 1, "capabilities": 0, **asdict(limits or Limits()), **changes}
    return frame(HELLO, op="hello", attrs={name: value for name, value in attrs.items() if value is not None})


class RawPeer:
    """One end of a connection, read and written frame by frame."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(10)
        self._decoder = Decoder(WIDE)

    def send(self, *parts: bytes) -> None:
        self.sock.sendall(b"".join(parts))

    def receive(self) -> Frame | None:
        """The next frame, None at the end of the stream."""
        head = self._exactly(HEADER.size)
        if head is None:
            return None
        magic, version, kind, flags, request_id, metadata_nbytes, varying_nbytes, payload_nbytes, time_ns = (
            HEADER.unpack(head)
        )
        assert (magic, version, flags) == (b"FSPL", 1, 0)
        metadata = self._exactly(metadata_nbytes)
        payload = self._exactly(payload_nbytes)
        assert metadata is not None and payload is not None
        return Frame(kind, request_id, self._decoder.decode(metadata, varying_nbytes), payload, time_ns)

    def greet(self, limits: Limits | None = None) -> None:
        self.send(hello(limits))
        came = self.receive()
        assert came is not None and came.kind == HELLO

    def expect_abort(self) -> str:
        """The peer's reason; after it, its stream ends. What it said before is skipped."""
        came = self.receive()
        while came is not None and came.kind in (HELLO, REQUEST):
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
                part = self.sock.recv(min(nbytes - len(out), 2**20))
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
    with sock:
        yield RawPeer(sock)


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
            with sock:
                try:
                    script(RawPeer(sock))
                except BaseException as error:
                    failures.append(error)

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
