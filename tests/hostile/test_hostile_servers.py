"""Servers that lie, against a real channel. The GPU side is the adversary: each lie is an error and costs no memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from raw_peer import ABORT, ERROR, FLOAT32, HELLO, REPLY, REQUEST, RawPeer, frame, hello, serving

import fastsplit
from fastsplit.errors import ClosedError, PeerLostError, RemoteOpError, RemoteProtocolError
from fastsplit.tensors.pool import Pool

pytestmark = pytest.mark.matrix(one_in=3)

UINT8 = 2


class ForbiddenPool(Pool):
    def allocate(self, nbytes: int) -> Any:
        pytest.fail(f"{nbytes} bytes were allocated for a frame that lies")


def _answering(make: Callable[[int], bytes], aborts: list[str]) -> Callable[[RawPeer], None]:
    """Answers the first request with bytes made from its id, and takes note of what the client says to it."""

    def script(peer: RawPeer) -> None:
        peer.greet()
        request = peer.receive()
        assert request is not None and request.kind == REQUEST
        peer.send(make(request.request_id))
        aborts.append(peer.expect_abort())

    return script


LIES: dict[str, tuple[Callable[[int], bytes], str]] = {
    "magic": (lambda n: frame(REPLY, n, magic=b"EVIL"), "header, magic: b'EVIL', expected b'FSPL'"),
    "version": (lambda n: frame(REPLY, n, version=2), "header, version: 2, expected 1"),
    "flags": (lambda n: frame(REPLY, n, flags=4), "header, flags: 0x0004, expected 0"),
    "metadata too large": (
        lambda n: frame(REPLY, n, metadata_nbytes=10**6),
        "header, metadata_nbytes: 1000000, expected at most 65536",
    ),
    "payload too large": (
        lambda n: frame(REPLY, n, payload_nbytes=2**40),
        "header, payload_nbytes: 1099511627776, expected at most 4294967296",
    ),
    "payload and tensors": (
        lambda n: frame(REPLY, n, "", [(FLOAT32, (5,))], {}, b"", payload_nbytes=2**32),
        "header, payload_nbytes: 4294967296, expected 20, the sum of its tensors",
    ),
    "an unknown request": (
        lambda n: frame(REPLY, n + 1),
        "header, request_id: 2 in REPLY, expected one that has no answer yet",
    ),
    "an error for an unknown request": (
        lambda n: frame(ERROR, 0),
        "header, request_id: 0 in ERROR, expected one that has no answer yet",
    ),
    "another shape than was asked for": (
        lambda n: frame(REPLY, n, "", [(FLOAT32, (2**29,))], {}, b"", payload_nbytes=2**31),
        "a reply's tensor 0: float32[536870912], expected float32[3]",
    ),
    "another dtype": (
        lambda n: frame(REPLY, n, "", [(UINT8, (3,))], {}, b"123"),
        "a reply's tensor 0: uint8[3], expected float32[3]",
    ),
    "too few tensors": (lambda n: frame(REPLY, n), "a reply of 0 tensors, expected 1"),
    "too many tensors": (
        lambda n: frame(REPLY, n, "", [(UINT8, (1,))] * 65, {}, bytes(65)),
        "metadata, tensors: 65, expected at most 64",
    ),
    "a request": (lambda n: frame(REQUEST, n), "a REQUEST frame from the server"),
    "a second hello": (lambda n: hello(), "a HELLO frame in state 'open'"),
    "garbage": (lambda n: b"\r\n500 error in the proxy, sorry" * 2, "header, magic: b'\\r\\n50', expected b'FSPL'"),
}


@pytest.mark.parametrize(("make", "text"), LIES.values(), ids=LIES)
def test_replies_that_lie(socket_uri: str, make: Callable[[int], bytes], text: str) -> None:
    aborts: list[str] = []
    with serving(socket_uri, _answering(make, aborts)) as uri:
        with fastsplit.connect(uri, arrays="numpy", pool=ForbiddenPool()) as channel:
            with pytest.raises(RemoteProtocolError) as caught:
                channel.call("f", expect=[("float32", (3,))], timeout_s=10)
            assert str(caught.value).startswith(text)
            assert channel.closed
            with pytest.raises(ClosedError):
                channel.call("f")
    assert aborts == [str(caught.value)]  # the server was told the same


@pytest.mark.parametrize("together", [True, False])
def test_a_second_reply(socket_uri: str, together: bool) -> None:
    """The first one is an answer, whether or not the second came along with it."""
    aborts: list[str] = []

    def script(peer: RawPeer) -> None:
        peer.greet()
        assert peer.receive() is not None
        reply = frame(REPLY, 1, "", [(UINT8, (1,))], {}, b"x")
        peer.send(reply * 2 if together else reply)
        if not together:
            assert peer.receive() is not None
            peer.send(reply)
        aborts.append(peer.expect_abort())

    with serving(socket_uri, script) as uri, fastsplit.connect(uri, arrays="numpy") as channel:
        assert channel.call("f")[0].tobytes() == b"x"
        with pytest.raises((RemoteProtocolError, ClosedError), match="header, request_id: 1 in REPLY"):
            channel.call("f", timeout_s=10)
    assert aborts == ["header, request_id: 1 in REPLY, expected one that has no answer yet"]


def test_every_call_in_flight_gets_the_error(socket_uri: str) -> None:
    aborts: list[str] = []

    def script(peer: RawPeer) -> None:
        peer.greet()
        for _ in range(3):
            assert peer.receive() is not None
        peer.send(frame(REPLY, 2) + frame(REPLY, 77))
        aborts.append(peer.expect_abort())

    with serving(socket_uri, script) as uri, fastsplit.connect(uri) as channel:
        futures = [channel.submit("f") for _ in range(3)]
        assert futures[1].result(10) == ()
        for future in (futures[0], futures[2]):
            with pytest.raises(RemoteProtocolError, match="request_id: 77 in REPLY"):
                future.result(10)


@pytest.mark.parametrize("size", [0, 1000, 30_000_000])
def test_the_servers_reason_reaches_the_caller_however_its_send_went(socket_uri: str, size: int) -> None:
    """The server is gone before the request is sent whole: that fails, and yet the error is what the server said."""

    def script(peer: RawPeer) -> None:
        peer.greet()
        peer.sock.recv(10)
        peer.send(frame(ABORT, attrs={"text": "I do not like you"}))

    with serving(socket_uri, script) as uri, fastsplit.connect(uri, arrays="numpy") as channel:
        with pytest.raises(RemoteProtocolError, match="the peer ended the connection: I do not like you"):
            channel.call("f", np.zeros(size, np.uint8), timeout_s=10)


def test_the_servers_reason_reaches_a_sender_while_another_thread_reads(socket_uri: str) -> None:
    for _ in range(10):

        def script(peer: RawPeer) -> None:
            peer.greet()
            assert peer.receive() is not None
            peer.sock.recv(100_000)
            peer.send(frame(ABORT, attrs={"text": "I do not like you"}))

        with serving(socket_uri, script) as uri, fastsplit.connect(uri, arrays="numpy") as channel:
            waiting = channel.submit("first")
            reader = threading.Thread(target=waiting.exception, args=(10,))
            reader.start()
            try:
                with pytest.raises(RemoteProtocolError, match="the peer ended the connection: I do not like you"):
                    channel.call("f", np.zeros(30_000_000, np.uint8), timeout_s=10)
            finally:
                reader.join()
            assert isinstance(waiting.exception(), RemoteProtocolError)
        if uri.startswith("unix"):
            os.unlink(uri.removeprefix("unix://").partition("?")[0])


def test_a_server_that_stays_silent_after_our_abort(socket_uri: str) -> None:
    done = threading.Event()

    def script(peer: RawPeer) -> None:
        peer.greet()
        assert peer.receive() is not None
        peer.send(b"z" * 40)
        done.wait(10)

    with serving(socket_uri, script) as uri, fastsplit.connect(uri) as channel:
        started = time.monotonic()
        with pytest.raises(RemoteProtocolError, match="magic"):
            channel.call("f", timeout_s=10)
        assert time.monotonic() - started < 2
        done.set()


def test_the_servers_word_about_its_time_is_bounded_by_ours(socket_uri: str) -> None:
    def script(peer: RawPeer) -> None:
        peer.greet()
        assert peer.receive() is not None
        peer.send(frame(REPLY, 1, time_ns=2**64 - 1))
        peer.receive()

    with serving(socket_uri, script) as uri, fastsplit.connect(uri) as channel:
        result = channel.call("f")
        assert 0 <= result.remote_s <= channel.stats.remote_s <= 5


def test_errors_of_any_code_and_text(socket_uri: str) -> None:
    def script(peer: RawPeer) -> None:
        peer.greet()
        for n, attrs in enumerate([{}, {"code": 5, "text": b"x"}, {"code": "new", "text": "t", "more": [1]}], 1):
            assert peer.receive() is not None
            peer.send(frame(ERROR, n, attrs=attrs))
        peer.receive()

    with serving(socket_uri, script) as uri, fastsplit.connect(uri) as channel:
        for text in ("f: no reason given", "f: b'x'", "f: t"):
            with pytest.raises(RemoteOpError) as caught:
                channel.call("f", timeout_s=10)
            assert str(caught.value) == text


@pytest.mark.parametrize("cut", [1, 40, 41, 100])
def test_killed_mid_frame(socket_uri: str, cut: int) -> None:
    def script(peer: RawPeer) -> None:
        peer.greet()
        assert peer.receive() is not None
        peer.send(frame(REPLY, 1, "", [(UINT8, (1000,))], {}, bytes(1000))[:cut])

    with serving(socket_uri, script) as uri, fastsplit.connect(uri) as channel:
        with pytest.raises(PeerLostError, match="the peer's stream ended"):
            channel.call("f", timeout_s=10)


def test_a_server_whose_caps_leave_no_room(socket_uri: str) -> None:
    """Caps so low that not even an ABORT would fit are no handshake."""
    aborts: list[str] = []

    def script(peer: RawPeer) -> None:
        peer.send(hello(max_metadata_nbytes=1))
        assert (came := peer.receive()) is not None and came.kind == HELLO
        aborts.append(peer.expect_abort())

    with serving(socket_uri, script) as uri:
        with pytest.raises(RemoteProtocolError, match="hello, max_metadata_nbytes: 1, expected an int from 4096"):
            fastsplit.connect(uri)
    assert len(aborts) == 1
