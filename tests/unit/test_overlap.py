"""Channel(overlap=True), and the server's reading ahead: order, bounds, ends."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from raw_peer import CANCEL, ERROR, GOODBYE, PROBE, REPLY, REQUEST, RawPeer, connected, frame, hello, serving
from until import until

import fastsplit
from fastsplit.errors import CancelledError, ClosedError, DeadlineError, PeerLostError
from fastsplit.schema.dtypes import BY_NAME
from fastsplit.schema.limits import Limits
from fastsplit.wire.blocking import readahead

Serve = Callable[..., fastsplit.Server]
Connect = Callable[..., fastsplit.Channel]
TCP = "tcp://127.0.0.1:0"
UINT8 = BY_NAME["uint8"].code
LARGE = np.zeros(2**26, np.uint8)


class Gate:
    """Handlers that say what ran in which order, and wait when they are told to."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.running = self.most = 0
        self.open = threading.Event()
        self.open.set()
        self.cancelled: list[bool] = []

    def step(self, call: Any) -> Any:
        self.running += 1
        self.most = max(self.most, self.running)
        self.ran.append(call.attrs.get("n", -1))
        self.open.wait(10)
        self.running -= 1
        return call.tensors

    def until_cancelled(self, call: Any) -> None:
        self.ran.append(-2)
        deadline = time.monotonic() + 5
        while not call.cancelled and time.monotonic() < deadline:
            time.sleep(0.002)
        self.cancelled.append(call.cancelled)

    def table(self) -> dict[str, Any]:
        return {"step": self.step, "until": self.until_cancelled, "large": lambda call: LARGE[: call.attrs["n"]]}


@pytest.fixture
def gate() -> Gate:
    return Gate()


def _step(number: int, nbytes: int = 0, op: str = "step") -> bytes:
    tensors = [(UINT8, (nbytes,))] if nbytes else []
    return frame(REQUEST, number, op, tensors, {"n": number}, bytes(nbytes))


def _served(server: fastsplit.Server) -> Any:
    (client,) = server._service.clients
    return client


def _silent(peer: RawPeer, closes: threading.Event) -> None:
    """A server that reads no more after the handshake."""
    peer.send(hello())
    peer.receive()
    closes.wait(20)


# ---- the channel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_many_in_flight_are_in_order(serve: Serve, connect: Connect, gate: Gate, overlap: bool) -> None:
    server = serve(TCP, gate.table(), arrays="numpy")
    channel = connect(server.uri, arrays="numpy", overlap=overlap)
    done: list[int] = []
    futures = []
    for n in range(60):
        x = np.full(200_000 if n % 3 else 10, n, np.uint8)
        future = channel.submit("step", x, n=n)
        future.add_done_callback(lambda future, n=n: done.append(n))
        futures.append((future, x))
    for future, x in reversed(futures):
        assert np.array_equal(future.result()[0], x)
    assert gate.ran == done == list(range(60))
    assert gate.most == 1
    assert channel.stats.calls == server.stats.calls == 60


def test_nobody_need_wait_for_a_result_to_come(serve: Serve, connect: Connect, gate: Gate) -> None:
    channel = connect(serve(TCP, gate.table(), arrays="numpy").uri, arrays="numpy", overlap=True)
    future = channel.submit("step", np.ones(2**20, np.uint8))
    until(future.done)
    assert future.result()[0].all()


def test_where_memory_is_shared_there_are_no_threads(unix_uri: str, serve: Serve, connect: Connect, gate: Gate) -> None:
    channel = connect(serve(unix_uri, gate.table(), arrays="numpy").uri, arrays="numpy", overlap=True)
    assert channel.shm
    assert channel._reader.watcher is channel._sender.workers is None
    channel.call("step", np.ones(3))


def test_a_send_that_is_stuck(connect: Connect) -> None:
    closes = threading.Event()
    with serving(TCP, lambda peer: _silent(peer, closes)) as uri:
        channel = connect(uri, overlap=True)
        started = time.monotonic()
        first = channel.submit("x", LARGE)
        assert time.monotonic() - started < 1.0  # before its bytes are out
        with pytest.raises(DeadlineError, match="since other calls were"):
            channel.submit("y", timeout_s=0.1)
        with pytest.raises(DeadlineError):
            first.result(0.1)
        assert first.cancel()
        assert first.cancelled()
        second_threads = [threading.Thread(target=channel.close) for _ in range(4)]
        for thread in second_threads:
            thread.start()
        for thread in second_threads:
            thread.join(5)
            assert not thread.is_alive()
        with pytest.raises(CancelledError):
            first.result()
        with pytest.raises(ClosedError):
            channel.submit("z")
        closes.set()


def test_a_deadline_in_the_middle_of_a_frame_ends_the_connection(connect: Connect) -> None:
    closes = threading.Event()
    with serving(TCP, lambda peer: _silent(peer, closes)) as uri:
        channel = connect(uri, overlap=True)
        future = channel.submit("x", LARGE, timeout_s=0.2)
        with pytest.raises(DeadlineError):
            future.result()
        until(lambda: channel.closed)
        closes.set()


def test_a_deadline_before_the_first_byte_leaves_it_as_it_was(
    serve: Serve, connect: Connect, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(deadline: float, *, reading: bool) -> Any:
        time.sleep(0.1)
        raise DeadlineError("the peer took too long to read")

    channel = connect(serve(TCP, gate.table(), arrays="numpy").uri, arrays="numpy", overlap=True)
    with monkeypatch.context() as patch:
        patch.setattr(channel._connection.transport, "send", lambda buffers, nbytes=-1: buffers)
        patch.setattr(channel._connection.transport, "wait", late)
        future = channel.submit("step", timeout_s=0.05)
        assert isinstance(future.exception(), DeadlineError)
        until(lambda: not channel._connection.sending.locked())
    assert not channel.closed
    assert channel._session.inflight == 0
    assert channel.call("step") == ()


@pytest.mark.parametrize("at", ["while it is sent to", "in a reply", "at once"])
def test_a_server_that_dies(at: str) -> None:
    def script(peer: RawPeer) -> None:
        peer.send(hello())
        peer.receive()
        if at == "in a reply":
            peer.receive()
            peer.send(frame(REPLY, 1, tensors=[(UINT8, (2**20,))], payload=bytes(2**20))[: 2**19])
        elif at == "while it is sent to":
            peer.sock.recv(100_000)

    with serving(TCP, script) as uri, fastsplit.connect(uri, overlap=True) as channel:
        futures = []
        with contextlib.suppress(PeerLostError, ClosedError):  # as soon as it is noticed
            for _ in range(3):
                futures.append(channel.submit("x", LARGE if at == "while it is sent to" else np.ones(3)))  # noqa: PERF401
        for future in futures:
            assert isinstance(future.exception(timeout=5), PeerLostError)
        until(lambda: channel.closed)


def test_closing_in_a_callback(serve: Serve, gate: Gate) -> None:
    server = serve(TCP, gate.table(), arrays="numpy")
    channel = fastsplit.connect(server.uri, arrays="numpy", overlap=True)
    closed = threading.Event()
    channel.submit("step").add_done_callback(lambda future: (channel.close(), closed.set()))
    assert closed.wait(5)
    assert channel.closed
    channel.close()


def test_closing_in_a_callback_of_the_thread_that_sends() -> None:
    release, closed = threading.Event(), threading.Event()
    with serving(TCP, lambda peer: _silent(peer, release)) as uri:
        channel = fastsplit.connect(uri, overlap=True)
        future = channel.submit("x", LARGE, timeout_s=0.2)
        future.add_done_callback(lambda future: (channel.close(), closed.set()))
        assert closed.wait(5)
        channel.close()
        release.set()


def test_a_finalizer_of_what_the_sending_thread_has_sent_may_call() -> None:
    """The last reference to a tensor may be the channel's: it ends when the thread that sends holds no lock."""
    found: list[str] = []
    freed = threading.Event()
    with fastsplit.Server(TCP, {"take": lambda call: None, "free": lambda call: None}, arrays="numpy") as server:
        with fastsplit.connect(server.uri, arrays="numpy", overlap=True, call_timeout_s=5) as channel:

            def free() -> None:
                found.append(threading.current_thread().name)
                channel.submit("free").result()
                freed.set()

            tensor = np.zeros(2**26, np.uint8)
            weakref.finalize(tensor, lambda: threading.Thread(target=free).start())
            weakref.finalize(tensor, lambda: found.append(f"{channel._connection.sending.locked()}"))
            future = channel.submit("take", tensor)
            del tensor
            assert future.result() == () and freed.wait(5)
            assert found[0] == "False"


@pytest.mark.parametrize("overlap", [False, True])
def test_closing_with_calls_in_flight(serve: Serve, connect: Connect, gate: Gate, overlap: bool) -> None:
    gate.open.clear()
    channel = connect(serve(TCP, gate.table(), arrays="numpy").uri, arrays="numpy", overlap=overlap)
    futures = [channel.submit("step", np.ones(100_000, np.uint8), n=n) for n in range(10)]
    channel.close()
    assert all(isinstance(future.exception(1), ClosedError) for future in futures)
    gate.open.set()


# ---- the server reads ahead ------------------------------------------------------------------------------------------


def test_reading_ahead_is_bounded_by_requests(serve: Serve, gate: Gate) -> None:
    server = serve(TCP, gate.table(), arrays="numpy", limits=Limits(max_inflight=4))
    gate.open.clear()
    with connected(server.uri) as peer:
        peer.greet()
        sender = threading.Thread(target=lambda: peer.send(*[_step(n, 20_000) for n in range(100)]))
        sender.start()
        ahead = _served(server)._ahead
        until(lambda: len(ahead.waiting) == 4)
        time.sleep(0.05)
        assert len(ahead.waiting) <= 4
        gate.open.set()
        assert [peer.expect(REPLY).request_id for _ in range(100)] == list(range(100))
        sender.join()
        assert gate.ran == list(range(100))
        assert gate.most == 1
        assert ahead.nbytes == 0


def test_requests_around_another_frame_run_in_order(serve: Serve, gate: Gate) -> None:
    """Of those that came in one read, one has another thread read on; the next one is older than what that brings."""
    server = serve(TCP, gate.table(), arrays="numpy")
    gate.open.clear()
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(_step(1, 5000), frame(CANCEL, 99), _step(2), _step(3, 200_000))
        until(lambda: gate.ran and _served(server)._ahead.has(3))
        gate.open.set()
        assert [peer.expect(REPLY).request_id for _ in range(3)] == [1, 2, 3]
        assert gate.ran == [1, 2, 3]


def _one_at_a_time(peer: RawPeer) -> bool:
    for n in range(20):
        peer.send(_step(n))
        assert peer.expect(REPLY).request_id == n
    return True


def test_reading_ahead_is_bounded_by_bytes(serve: Serve, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "_MAX_AHEAD_NBYTES", 2**20)
    server = serve(TCP, gate.table(), arrays="numpy")
    with connected(server.uri) as peer:
        peer.greet()
        for _ in range(3):  # with a reader each time, which must count from the start
            gate.open.clear()
            sender = threading.Thread(target=lambda: [peer.send(_step(n, 400_000)) for n in range(12)])
            sender.start()
            time.sleep(0.05)
            assert _served(server)._ahead.nbytes <= 2**20
            gate.open.set()
            assert [peer.expect(REPLY).request_id for n in range(12)] == list(range(12))
            sender.join()
            until(lambda: _one_at_a_time(peer) and _served(server)._ahead.reader is None)  # it reads for itself again
            assert _served(server)._ahead.nbytes == 0


def test_a_cancel_finds_what_is_queued_and_what_runs(serve: Serve, gate: Gate) -> None:
    server = serve(TCP, gate.table(), arrays="numpy")
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(_step(1, op="until"), *[_step(n, 5000) for n in (2, 3)])
        until(lambda: gate.ran and len(_served(server)._ahead.waiting) == 2)
        peer.send(frame(CANCEL, 3), frame(CANCEL, 99), frame(CANCEL, 1))
        assert peer.expect(REPLY).request_id == 1
        assert gate.cancelled == [True]
        assert peer.expect(REPLY).request_id == 2
        came = peer.expect(ERROR)
        assert (came.request_id, came.message.attrs["code"]) == (3, "cancelled")
        peer.send(_step(3), _step(1), _step(99))  # the same numbers again
        assert [peer.expect(REPLY).request_id for _ in range(3)] == [3, 1, 99]
        assert not _served(server).core.cancelled


@pytest.mark.parametrize(
    "last", [frame(GOODBYE), b"", frame(GOODBYE)[:20], b"nonsense" * 10], ids=["goodbye", "end", "cut", "nonsense"]
)
def test_a_client_that_leaves_with_requests_queued(serve: Serve, gate: Gate, last: bytes) -> None:
    server = serve(TCP, gate.table(), arrays="numpy")
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(_step(1, op="until"), *[_step(n, 5000) for n in range(2, 6)])
        until(lambda: len(_served(server)._ahead.waiting) == 4)
        peer.send(last)
        if not last.startswith(b"nonsense"):
            peer.close()
    until(lambda: server.connections == 0, 15)
    if last in (b"", frame(GOODBYE)):
        assert gate.ran in ([-2], [-2, 2])  # a handler may see that it is gone before the thread that reads does
        assert gate.cancelled == [True]


def test_a_server_that_closes_answers_what_runs(serve: Serve, gate: Gate) -> None:
    server = serve(TCP, gate.table(), arrays="numpy")
    gate.open.clear()
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(*[_step(n, 5000) for n in range(5)])
        until(lambda: gate.ran and len(_served(server)._ahead.waiting) == 4)
        closer = threading.Thread(target=server.close)
        closer.start()
        time.sleep(0.05)
        gate.open.set()
        closer.join(10)
        came = [peer.receive() for _ in range(6)]
        assert [frame.request_id for frame in came[:5] if frame] == list(range(5))
        assert came[5] is not None
        assert came[5].kind == GOODBYE
        assert peer.receive() is None


def test_probes_are_answered_while_a_handler_runs(serve: Serve, gate: Gate) -> None:
    server = serve(TCP, gate.table(), arrays="numpy")
    gate.open.clear()
    with connected(server.uri) as peer:
        peer.send(hello(capabilities=4))
        peer.receive()
        peer.send(*[_step(n, 5000) for n in range(3)])
        until(lambda: len(_served(server)._ahead.waiting) == 2)
        for n in range(5):
            peer.send(frame(PROBE, n, attrs={"answer": 0, "wanted": n * 1000, "bytes_per_s": 0.0}))
            came = peer.expect(PROBE)
            assert (came.request_id, len(came.payload)) == (n, n * 1000)
        gate.open.set()
        assert [peer.expect(REPLY).request_id for _ in range(3)] == [0, 1, 2]


def test_large_replies_to_a_slow_reader(serve: Serve, gate: Gate) -> None:
    server = serve(TCP, gate.table(), arrays="numpy")
    with connected(server.uri) as peer:
        peer.greet()
        for n in range(1, 9):
            peer.send(frame(REQUEST, n, "large", attrs={"n": 2**22}))
        for n in range(1, 9):
            time.sleep(0.01)
            came = peer.expect(REPLY)
            assert (came.request_id, len(came.payload)) == (n, 2**22)


def test_a_client_that_dies_while_a_reply_is_sent_behind(serve: Serve, gate: Gate) -> None:
    server = serve(TCP, gate.table(), arrays="numpy")
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(*[frame(REQUEST, n, "large", [(UINT8, (4000,))], {"n": 2**25}, bytes(4000)) for n in range(4)])
        until(lambda: _served(server)._ahead.reader is not None)
        time.sleep(0.05)
    until(lambda: server.connections == 0)


def test_without_a_thread_to_read_ahead_it_reads_later(
    serve: Serve, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(TCP, gate.table(), arrays="numpy")
    with connected(server.uri) as peer:
        peer.greet()
        start = threading.Thread.start

        def no_reader(thread: threading.Thread) -> None:
            if thread.name.startswith("fastsplit-read"):
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", no_reader)
        peer.send(*[_step(n, 5000) for n in range(5)])
        assert [peer.expect(REPLY).request_id for _ in range(5)] == list(range(5))
        assert _served(server)._ahead.reader is None


def test_what_a_reader_found_wrong_while_a_handler_ran_is_told(serve: Serve, gate: Gate) -> None:
    server = serve(TCP, gate.table(), arrays="numpy")
    with connected(server.uri) as peer:
        peer.greet()
        gate.open.clear()
        peer.send(_step(1), _step(2, 5000))
        until(lambda: _served(server)._ahead.reader is not None)
        peer.send(b"nonsense" * 10)
        until(lambda: _served(server)._ahead.reader is None)
        gate.open.set()
        assert "magic" in peer.expect_abort()
