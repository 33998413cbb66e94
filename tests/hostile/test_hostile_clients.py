"""Clients that lie, against a real server: each gets one clear error, and the server goes on serving everybody else."""

from __future__ import annotations

import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from raw_peer import ABORT, CANCEL, ERROR, FLOAT32, GOODBYE, REPLY, REQUEST, connected, frame, hello, raw_frame

import fastsplit
from fastsplit.tensors.pool import Pool

pytestmark = pytest.mark.matrix(one_in=3)

UINT8 = 2
CAPS = fastsplit.Limits(max_metadata_nbytes=8192, max_message_nbytes=10**6, max_tensors=4, max_dims=4, max_attrs=16)


class CountingPool(Pool):
    """Knows how much was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated_nbytes = 0

    def allocate(self, nbytes: int) -> Any:
        self.allocated_nbytes += nbytes
        return super().allocate(nbytes)


@pytest.fixture
def pool() -> CountingPool:
    return CountingPool()


@pytest.fixture
def server(socket_uri: str, pool: CountingPool) -> Iterator[fastsplit.Server]:
    handlers = {"sum": lambda call: np.array(sum(float(x.sum()) for x in call.tensors))}
    with fastsplit.Server(socket_uri, handlers, arrays="numpy", limits=CAPS, pool=pool) as server:
        yield server


@pytest.fixture(autouse=True)
def bystander(server: fastsplit.Server) -> Iterator[None]:
    """Somebody who was connected before, and somebody who comes after, are both served."""
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=5) as before:
        yield
        assert before.call("sum", np.ones(5))[0] == 5
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=5) as after:
        assert after.call("sum", np.ones(7))[0] == 7


def _patched(data: bytes, old: int, new: int) -> bytes:
    """A message with one number of 64 bits replaced wherever it stands."""
    assert struct.pack("<Q", old) in data
    return data.replace(struct.pack("<Q", old), struct.pack("<Q", new))


HEADER_LIES = {
    "magic": ({"magic": b"FSPX"}, "header, magic: b'FSPX', expected b'FSPL'; the peer does not speak fastsplit"),
    "version": ({"version": 9}, "header, version: 9, expected 1"),
    "kind": ({"kind": 77}, "header, kind: 77, expected 1 to 12"),
    "flags": ({"flags": 1}, "header, flags: 0x0001, expected 0: none was negotiated"),
    "varying": ({"varying_nbytes": 9000}, "header, varying_nbytes: 9000, expected at most "),
    "metadata": ({"metadata_nbytes": 8193}, "header, metadata_nbytes: 8193, expected at most 8192"),
    "payload": ({"payload_nbytes": 10**6 + 1}, "header, payload_nbytes: 1000001, expected at most 1000000"),
    "payload, huge": ({"payload_nbytes": 2**64 - 1}, "header, payload_nbytes: 18446744073709551615, expected at most"),
    "payload and tensors": ({"payload_nbytes": 400}, "header, payload_nbytes: 400, expected 8, the sum of its tensors"),
}


@pytest.mark.parametrize(("lie", "text"), HEADER_LIES.values(), ids=HEADER_LIES)
@pytest.mark.parametrize("when", ["first", "later"])
def test_headers_that_lie(
    server: fastsplit.Server, pool: CountingPool, when: str, lie: dict[str, Any], text: str
) -> None:
    good = {"op": "sum", "tensors": [(FLOAT32, (2,))], "payload": bytes(8)}
    with connected(server.uri) as peer:
        if when == "later":
            peer.greet()
            peer.send(frame(REQUEST, 1, **good))
            answer = peer.receive()
            assert answer is not None and answer.kind == REPLY
        before = pool.allocated_nbytes
        data = frame(REQUEST, 2, **{**good, **lie})
        peer.send(data if when == "later" else hello() + data)
        assert peer.expect_abort().startswith(text)
        assert pool.allocated_nbytes == before


REQUESTS = {
    "too many tensors": (
        frame(REQUEST, 1, "sum", [(UINT8, (1,))] * 5, {}, bytes(5)),
        "metadata, tensors: 5, expected at most 4",
    ),
    "too many dimensions": (
        frame(REQUEST, 1, "sum", [(UINT8, (1,) * 5)], {}, bytes(1)),
        "metadata, tensor 0 dimensions: 5, expected at most 4",
    ),
    "too many attributes": (
        frame(REQUEST, 1, "sum", [], {f"a{n}": n for n in range(17)}),
        "metadata, attrs: 17, expected at most 16",
    ),
    "one tensor too large": (
        frame(REQUEST, 1, "sum", [(UINT8, (10**6 + 1,))], {}, b"", payload_nbytes=10**6),
        "metadata, tensor 0 shape: [1000001], 1000001 bytes, expected at most 1000000 bytes",
    ),
    "all together too large": (
        frame(REQUEST, 1, "sum", [(UINT8, (600_000,))] * 2, {}, b"", payload_nbytes=10**6),
        "metadata, bytes of all tensors: 1200000, expected at most 1000000",
    ),
    "dimensions that overflow": (
        _patched(frame(REQUEST, 1, "sum", [(UINT8, (4321, 4))], {}, b"", payload_nbytes=16), 4321, 2**62 + 4),
        "metadata, tensor 0 shape: [4611686018427387908, 4], 18446744073709551632 bytes, expected at most 1000000",
    ),
    "a huge dimension of an empty tensor": (
        _patched(frame(REQUEST, 1, "sum", [(UINT8, (0, 4321))]), 4321, 2**63),
        "metadata, tensor 0 shape: [0, 9223372036854775808]",
    ),
    "a placement smaller than the tensor": (
        _patched(frame(REQUEST, 1, "sum", [(FLOAT32, (4321,))], {}, b"", payload_nbytes=16), 4321 * 4, 16),
        "metadata, tensor 0 (segment, codec, offset, nbytes): (0, 0, 0, 16), expected (0, 0, 0, 17284)",
    ),
    "no metadata": (raw_frame(REQUEST, 1), "metadata, file identifier: b'', expected b'FSM1'"),
    "metadata of zeros": (raw_frame(REQUEST, 1, bytes(64)), "metadata, file identifier: b'\\x00\\x00\\x00\\x00'"),
    "a root outside": (
        raw_frame(REQUEST, 1, b"\xf0\xff\xff\xffFSM1" + bytes(40)),
        "metadata, Message: 4 bytes at 4294967280, expected a place within 48 bytes",
    ),
    "a root at itself": (raw_frame(REQUEST, 1, bytes(4) + b"FSM1" + bytes(40)), "metadata, Message: "),
    "a reply": (frame(REPLY, 1), "a REPLY frame from the client"),
    "an error": (frame(ERROR, 1), "header, request_id: 1 in ERROR, expected one that has no answer yet"),
    "a second hello": (hello(), "a HELLO frame in state 'open'"),
    "a cancel with tensors": (
        frame(CANCEL, 1, "", [(UINT8, (3,))], {}, b"123"),
        "a CANCEL frame with 1 tensors, expected none",
    ),
}


@pytest.mark.parametrize(("data", "text"), REQUESTS.values(), ids=REQUESTS)
def test_frames_that_lie(server: fastsplit.Server, pool: CountingPool, data: bytes, text: str) -> None:
    with connected(server.uri) as peer:
        peer.greet()
        before = pool.allocated_nbytes
        peer.send(data)
        assert peer.expect_abort().startswith(text)
        assert pool.allocated_nbytes == before


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, 1, "header, payload_nbytes: 9, expected 0, the sum of its tensors"),
        (4, 1, "metadata, tensor 0 (segment, codec, offset, nbytes): (0, 1, 0, 9), expected (0, 0, 0, 9)"),
        (8, 1, "metadata, tensor 0 (segment, codec, offset, nbytes): (0, 0, 1, 9), expected (0, 0, 0, 9)"),
    ],
)
def test_placements_that_lie(server: fastsplit.Server, at: int, value: int, text: str) -> None:
    data = bytearray(frame(REQUEST, 1, "sum", [(UINT8, (9,))], {}, bytes(9)))
    data[-9 - 24 + at] = value
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(bytes(data))
        assert peer.expect_abort() == text


def test_unknown_dtype(server: fastsplit.Server) -> None:
    known = frame(REQUEST, 1, "sum", [(UINT8, (1,))], {}, b"1")
    other = frame(REQUEST, 1, "sum", [(3, (1,))], {}, b"1")
    (at,) = [n for n, (a, b) in enumerate(zip(known, other, strict=True)) if a != b]
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(known[:at] + b"\x7b" + known[at + 1 :])
        assert peer.expect_abort() == "metadata, tensor 0 dtype: 123, expected a code from 1 to 17"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_tensors": None}, "hello, max_tensors: None, expected an int from 1 to 9223372036854775807"),
        ({"max_attrs": -5}, "hello, max_attrs: -5, expected an int from 16 to 9223372036854775807"),
        ({"max_metadata_nbytes": "x"}, "hello, max_metadata_nbytes: 'x', expected an int from 4096 to 4294967295"),
        ({"capabilities": None}, "hello, capabilities: None, expected an int"),
    ],
)
def test_handshakes_that_lie(server: fastsplit.Server, changes: dict[str, Any], text: str) -> None:
    with connected(server.uri) as peer:
        peer.send(hello(**changes))
        assert peer.expect_abort() == text


GARBAGE = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: x\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(60),
    "zeros": bytes(200),
    "noise": np.random.default_rng(5).integers(0, 256, 500, np.uint8).tobytes(),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_garbage(server: fastsplit.Server, data: bytes) -> None:
    with connected(server.uri) as peer:
        peer.send(data)
        text = peer.expect_abort()
        assert text == f"header, magic: {data[:4]!r}, expected b'FSPL'; the peer does not speak fastsplit"


REQUEST_OF_1000 = frame(REQUEST, 1, "sum", [(UINT8, (1000,))], {}, bytes(1000))


@pytest.mark.parametrize("cut", [1, 39, 40, 41, 90, len(REQUEST_OF_1000) - 1000, len(REQUEST_OF_1000) - 1])
@pytest.mark.parametrize("reset", [False, True])
def test_killed_mid_frame(server: fastsplit.Server, cut: int, reset: bool) -> None:
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(REQUEST_OF_1000, REQUEST_OF_1000[:cut])
        answer = peer.receive()  # the whole one is answered
        assert answer is not None and answer.kind == REPLY
        if reset:
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    deadline = time.monotonic() + 5
    while server.connections > 1:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_slow_dribble_is_served_like_any_other(server: fastsplit.Server) -> None:
    with connected(server.uri) as peer:
        for byte in hello() + frame(REQUEST, 1, "sum", [(UINT8, (20,))], {}, b"\1" * 20):
            peer.send(bytes([byte]))
            time.sleep(0.0002)
        assert peer.receive() is not None
        answer = peer.receive()
        assert answer is not None and answer.kind == REPLY and struct.unpack("<d", answer.payload) == (20.0,)


def test_the_reason_is_readable_although_the_peer_still_sends(server: fastsplit.Server) -> None:
    """The server reads on for a moment: closing at once would reset the connection, and lose its last frame."""
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(frame(REQUEST, 1, "sum", version=3) + bytes(2_000_000))
        assert peer.expect_abort() == "header, version: 3, expected 1"


def test_an_abort_is_not_waited_for_ever(server: fastsplit.Server) -> None:
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(b"x" * 40)  # and then stays, silently
        deadline = time.monotonic() + 5
        while server.connections > 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("together", [True, False])
def test_goodbye_ends_the_connection(server: fastsplit.Server, together: bool) -> None:
    with connected(server.uri) as peer:
        if together:  # in one read with the handshake
            peer.send(hello() + frame(GOODBYE))
            assert peer.receive() is not None
        else:
            peer.greet()
            peer.send(frame(GOODBYE))
        assert peer.receive() is None


def test_an_abort_ends_the_connection_quietly(server: fastsplit.Server) -> None:
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(frame(ABORT, attrs={"text": "no"}))
        assert peer.receive() is None


def test_many_hostile_clients_at_once(server: fastsplit.Server) -> None:
    texts: list[str] = []

    def work() -> None:
        for data, _ in REQUESTS.values():
            with connected(server.uri) as peer:
                peer.greet()
                peer.send(data)
                texts.append(peer.expect_abort())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(texts) == 4 * len(REQUESTS)


@pytest.mark.matrix(one_in=3, each=False)
def test_distinct_shapes_do_not_fill_the_memory(server: fastsplit.Server) -> None:
    """Each request has another head, so that every one is a candidate for the cache."""
    with connected(server.uri) as peer:
        peer.greet()
        data = frame(REQUEST, 1, "absent", [], {"mark": [2**55], "ints": list(range(10**6, 10**6 + 900))})
        tracemalloc.start()
        try:
            for n in range(700):
                peer.send(_patched(data, 2**55, n))
                assert peer.receive() is not None
            assert tracemalloc.get_traced_memory()[0] < 40 * 1024**2
        finally:
            tracemalloc.stop()
