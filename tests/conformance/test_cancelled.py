"""A handler that polls `call.cancelled` sees its client's CANCEL; other frames that are read meanwhile are kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from aio_front import Front
from raw_peer import CANCEL, ERROR, GOODBYE, REPLY, REQUEST, RawPeer, connected, frame

import fastsplit
from fastsplit.errors import CancelledError
from fastsplit.wire.blocking import readahead

Serve = Callable[..., fastsplit.Server]

UINT8 = 2


class Poll:
    """A handler that asks again and again, until it is cancelled or let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.let_go = threading.Event()
        self.left = threading.Event()
        self.saw: list[bool] = []

    def __call__(self, call: fastsplit.Call) -> Any:
        self.entered.set()
        deadline = time.monotonic() + 10
        while not call.cancelled and not self.let_go.is_set():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        self.saw.append(call.cancelled)
        self.left.set()
        return call.tensors


@pytest.fixture
def poll() -> Iterator[Poll]:
    poll = Poll()
    yield poll
    poll.let_go.set()


def _handlers(poll: Poll) -> dict[str, Any]:
    return {"poll": poll, "echo": lambda call: call.tensors}


def _served(server: fastsplit.Server) -> Any:
    (client,) = server._service.clients
    return client


@pytest.mark.parametrize(
    ("name", "workers"), [("blocking", 0), ("blocking", 2), ("aio", 2)], ids=["thread", "workers", "aio workers"]
)
def test_a_cancel_is_seen(uri: str, name: str, workers: int, poll: Poll) -> None:
    """Over every link; requests that come in the meantime are answered, the cancelled one once."""
    front = Front(name)
    try:
        with front.Server(uri, _handlers(poll), workers=workers, arrays="numpy") as server:
            with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
                future = channel.submit("poll", np.arange(5))
                assert poll.entered.wait(5)
                others = [channel.submit("echo", np.full(1000, n)) for n in range(3)]
                future.cancel()
                for n, other in enumerate(others):
                    assert (other.result(10)[0] == n).all()
                assert poll.left.wait(5)
                assert poll.saw == [True]
                with pytest.raises(CancelledError):
                    future.result()
                assert channel.call("echo", np.ones(1))[0][0] == 1
                assert channel._session.inflight == 0  # and an answer too many had ended the connection
    finally:
        front.close()


def test_asking_reads_nothing_that_is_not_there(uri: str, serve: Serve, poll: Poll) -> None:
    server = serve(uri, _handlers(poll), arrays="numpy")
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
        future = channel.submit("poll", np.arange(5))
        assert poll.entered.wait(5)
        time.sleep(0.01)
        poll.let_go.set()
        assert future.result()[0].tolist() == [0, 1, 2, 3, 4]
    assert poll.saw == [False]


def test_a_request_that_waits_can_be_cancelled_too(socket_uri: str, serve: Serve, poll: Poll) -> None:
    server = serve(socket_uri, _handlers(poll))
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(frame(REQUEST, 1, "poll"))
        assert poll.entered.wait(5)
        peer.send(frame(REQUEST, 2, "echo"))
        time.sleep(0.02)
        peer.send(frame(CANCEL, 2))
        time.sleep(0.02)
        peer.send(frame(CANCEL, 1))
        first, second = peer.expect(REPLY), peer.expect(ERROR)
        assert (first.request_id, second.request_id) == (1, 2)
        assert second.message.attrs["text"] == "cancelled before it ran"
        assert not _served(server).core.cancelled


def _poll_a_while(call: fastsplit.Call) -> None:
    for _ in range(100):
        assert not call.cancelled
        time.sleep(0.0002)


def _send_many(peer: RawPeer, count: int, nbytes: int) -> None:
    tensor = [(UINT8, (nbytes,))]
    parts = [frame(REQUEST, n, "echo", tensor, payload=bytes(nbytes)) for n in range(2, 2 + count)]
    peer.send(*parts, frame(CANCEL, 1))
    for n in range(1, 2 + count):
        assert peer.expect(REPLY).request_id == n


@pytest.mark.parametrize("cap", ["requests", "bytes"])
def test_what_waits_is_bounded(socket_uri: str, serve: Serve, monkeypatch: pytest.MonkeyPatch, cap: str) -> None:
    """Then a CANCEL behind it is not seen, and all is answered in order."""
    waited: list[int] = []

    def handle(call: fastsplit.Call) -> None:
        started.wait(5)
        _poll_a_while(call)
        waited.append(len(_served(server)._ahead.waiting))

    started = threading.Event()
    limits = fastsplit.Limits(max_inflight=3) if cap == "requests" else fastsplit.Limits()
    if cap == "bytes":
        monkeypatch.setattr(readahead, "_MAX_AHEAD_NBYTES", 125_000)
    server = serve(socket_uri, {"poll": handle, "echo": lambda call: call.tensors}, limits=limits, arrays="numpy")
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(frame(REQUEST, 1, "poll"))
        time.sleep(0.02)
        threading.Timer(0.02, started.set).start()
        _send_many(peer, 8, 50_000)  # so large that one read brings at most two
    assert waited == [3]


def test_a_large_request_that_came_in_part_goes_on(socket_uri: str, serve: Serve, poll: Poll) -> None:
    server = serve(socket_uri, _handlers(poll), arrays="numpy")
    x = np.arange(2_000_000)
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10, overlap=True) as channel:
        first = channel.submit("poll")
        assert poll.entered.wait(5)
        futures = [channel.submit("echo", x + n) for n in range(3)]
        time.sleep(0.01)
        poll.let_go.set()
        assert first.result() == ()
        assert all((future.result()[0] == x + n).all() for n, future in enumerate(futures))
        if not channel.shm:
            assert _served(server)._ahead.nbytes == 0


@pytest.mark.parametrize("how", ["garbage", "goodbye", "abort"])
def test_the_end_that_comes_meanwhile(socket_uri: str, serve: Serve, poll: Poll, how: str) -> None:
    """The handler sees it, its request is answered where the client listens, and the connection ends as it should."""
    server = serve(socket_uri, _handlers(poll))
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(frame(REQUEST, 1, "poll"))
        assert poll.entered.wait(5)
        peer.send({"garbage": b"x" * 64, "goodbye": frame(GOODBYE), "abort": frame(7, attrs={"text": "no"})}[how])
        assert peer.expect(REPLY).request_id == 1
        if how == "garbage":
            assert "magic" in peer.expect_abort()
        else:
            assert peer.receive() is None  # though the client's own direction is open
    assert poll.saw == [True]


def test_a_server_that_closes_lets_the_handler_answer(socket_uri: str, serve: Serve, poll: Poll) -> None:
    server = serve(socket_uri, _handlers(poll))
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(frame(REQUEST, 1, "poll"))
        assert poll.entered.wait(5)
        closing = threading.Thread(target=server.close)
        closing.start()
        time.sleep(0.05)
        poll.let_go.set()
        assert peer.expect(REPLY).request_id == 1
        closing.join()
    assert poll.saw == [False]
