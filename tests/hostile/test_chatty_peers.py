"""Peers that keep talking: each deadline holds against what they say, as it does against silence."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest
from raw_peer import HELLO, PROBE, REQUEST, RETURN, RawPeer, connected, frame, hello, serving, shm_hello

import fastsplit
from fastsplit.errors import DeadlineError, FastsplitError

pytestmark = pytest.mark.matrix(one_in=3)

TCP = "tcp://127.0.0.1:0"
LARGE = np.zeros(2**26, np.uint8)


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took < seconds, f"it took {took:.1f} s"


def _talk(peer: RawPeer, *parts: bytes) -> None:
    """Says the same until the client leaves."""
    end = time.monotonic() + 10
    with contextlib.suppress(OSError):
        while time.monotonic() < end:
            peer.send(*parts)
            time.sleep(0.0005)


def _returns_instead_of_attached(peer: RawPeer) -> None:
    peer.send(shm_hello())
    peer.receive()
    _talk(peer, frame(RETURN, attrs={"wanted": 0}))


def test_a_handshake(unix_uri: str) -> None:
    with serving(unix_uri, _returns_instead_of_attached) as uri, _within(3):
        with pytest.raises(DeadlineError, match=r"no handshake within 0\.3 s"):
            fastsplit.connect(uri, timeout_s=0.3)


PROBE_ANSWER = frame(PROBE, 9, attrs={"answer": 1, "wanted": 0, "bytes_per_s": 0.0})


def _answers_probes_and_reads_nothing(peer: RawPeer) -> None:
    peer.send(hello(capabilities=4))
    peer.receive()
    for _ in range(3):
        request = peer.receive()
        assert request is not None and request.kind == PROBE
        padding = request.message.attrs["wanted"]
        tensors = [(2, (padding,))] if padding else []
        attrs = {"answer": 1, "wanted": 0, "bytes_per_s": 0.0}
        peer.send(frame(PROBE, request.request_id, "", tensors, attrs, bytes(padding)))
    _talk(peer, PROBE_ANSWER)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_is_not_read(overlap: bool) -> None:
    with serving(TCP, _answers_probes_and_reads_nothing) as uri:
        with fastsplit.connect(uri, overlap=overlap, arrays="numpy") as channel, _within(4):
            with pytest.raises(FastsplitError, match=r"(within|deadline of) 0\.3 s"):
                channel.call("f", LARGE, timeout_s=0.3)


def _reads_a_little_at_a_time(peer: RawPeer) -> None:
    peer.send(hello())
    peer.receive()
    end = time.monotonic() + 10
    with contextlib.suppress(OSError):
        while time.monotonic() < end and peer.sock.recv(4096):
            time.sleep(0.001)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_is_read_byte_by_byte(overlap: bool) -> None:
    with serving(TCP, _reads_a_little_at_a_time) as uri:
        with fastsplit.connect(uri, overlap=overlap, arrays="numpy") as channel, _within(4):
            with pytest.raises(FastsplitError, match=r"(within|deadline of) 0\.3 s"):
                channel.call("f", LARGE, timeout_s=0.3)


def test_a_reply_that_does_not_come() -> None:
    with serving(TCP, _answers_probes_and_reads_nothing) as uri:
        with fastsplit.connect(uri, arrays="numpy") as channel:
            with _within(3), pytest.raises(DeadlineError, match=r"f: no reply within its deadline of 0\.3 s"):
                channel.call("f", timeout_s=0.3)
            with _within(3), pytest.raises(DeadlineError, match="not measured"):
                channel.measure(1000, timeout_s=0.3)


def _talks_and_gives_nothing_back(peer: RawPeer) -> None:
    peer.send(shm_hello(ring=False, max_shared_nbytes=2**20))
    peer.receive()
    _talk(peer, frame(RETURN, attrs={"wanted": 0}))


def test_memory_that_is_not_given_back(unix_uri: str) -> None:
    with serving(unix_uri, _talks_and_gives_nothing_back) as uri:
        with fastsplit.connect(uri, arrays="numpy") as channel:
            held = channel.empty(900_000, "uint8")
            with _within(3), pytest.raises(fastsplit.FastsplitError):
                channel.empty(900_000, "uint8", timeout_s=0.3)
            del held


# ---- clients ---------------------------------------------------------------------------------------------------------


def test_a_hello_that_dribbles() -> None:
    with fastsplit.Server(TCP, {}, handshake_timeout_s=0.3) as server:
        with connected(server.uri) as peer, _within(3):
            greeting = hello(note="x" * 2000)
            with contextlib.suppress(OSError):
                for at in range(0, len(greeting), 10):
                    peer.sock.sendall(greeting[at : at + 10])
                    time.sleep(0.05)
                    if not server.connections and at > 100:
                        break
        assert server.connections == 0


def test_a_reply_that_is_read_byte_by_byte() -> None:
    handlers = {"large": lambda call: LARGE}
    with fastsplit.Server(TCP, handlers, arrays="numpy", send_timeout_s=0.3) as server:
        with connected(server.uri) as peer:
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.send(hello())
            answer = peer.receive()
            assert answer is not None and answer.kind == HELLO
            peer.send(frame(REQUEST, 1, "large"))
            with _within(4):
                end = time.monotonic() + 10
                with contextlib.suppress(OSError):
                    while server.connections and time.monotonic() < end and peer.sock.recv(2048):
                        time.sleep(0.001)
            assert server.connections == 0
