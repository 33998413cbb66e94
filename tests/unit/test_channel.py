"""The client: waiting, deadlines, cancellation, threads that share one channel, and how each of them ends."""

from __future__ import annotations

import concurrent.futures as cf
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aio_front import Front
from raw_peer import ERROR, REPLY, REQUEST, RawPeer, frame, hello, serving

import fastsplit
from fastsplit.errors import (
    CancelledError,
    ClosedError,
    ConnectError,
    DeadlineError,
    LimitError,
    PeerLostError,
    RemoteOpError,
    RemoteProtocolError,
    SettingError,
    TensorError,
)
from fastsplit.tensors.pool import Pool
from fastsplit.wire.shm.ring import Ring
from fastsplit.wire.transport import spin

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024


class Gate:
    """A handler that waits until it is let through."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self, call: fastsplit.Call) -> Any:
        self.entered.release()
        assert self.opened.wait(20)
        return call.tensors


def _echo(call: fastsplit.Call) -> Any:
    call.reply_attrs.update(call.attrs)
    return call.tensors


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def server(socket_uri: str, gate: Gate) -> Iterator[fastsplit.Server]:
    with fastsplit.Server(socket_uri, {"echo": _echo, "gate": gate}, arrays="numpy", workers=4) as server:
        yield server
        gate.opened.set()


@pytest.fixture
def channel(server: fastsplit.Server) -> Iterator[fastsplit.Channel]:
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=20) as channel:
        yield channel


@pytest.fixture
def either(server: fastsplit.Server, front: Front) -> Iterator[Any]:
    """A channel of either front."""
    with front.connect(server.uri, arrays="numpy", call_timeout_s=20) as channel:
        yield channel


def _socket(channel: fastsplit.Channel) -> socket.socket:
    link = channel._connection.transport
    sock: socket.socket = (link.link if isinstance(link, Ring) else link)._sock
    return sock


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _in_threads(count: int, work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


# ---- futures ---------------------------------------------------------------------------------------------------------


def test_a_future(channel: fastsplit.Channel, gate: Gate) -> None:
    future = channel.submit("gate", np.arange(3))
    assert not future.done() and not future.cancelled() and repr(future) == "<Future of 'gate', pending>"
    with pytest.raises(DeadlineError, match=r"gate: no reply within 0\.05 s"):
        future.result(timeout=0.05)
    assert not future.done()  # the wait ended, the call goes on
    gate.opened.set()
    result = future.result(timeout=10)
    assert future.done() and future.result() is result and future.exception() is None
    assert repr(future) == "<Future of 'gate', done>" and not future.cancel()


def test_polling_a_future(channel: fastsplit.Channel, gate: Gate) -> None:
    future = channel.submit("gate")
    with pytest.raises(DeadlineError):
        future.result(timeout=0)
    gate.opened.set()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert future.result(timeout=0) == ()
            return
        except DeadlineError:
            time.sleep(0.01)
    pytest.fail("a reply that was there was never seen")


def test_replies_in_another_order(either: Any, gate: Gate) -> None:
    slow = either.submit("gate", np.array([1]))
    (fast,) = either.call("echo", np.array([2]))
    assert fast[0] == 2 and not slow.done()
    gate.opened.set()
    assert slow.result(10)[0][0] == 1


def test_callbacks(channel: fastsplit.Channel, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []
    future = channel.submit("gate")
    future.add_done_callback(seen.append)
    future.add_done_callback(lambda future: 1 / 0)
    future.add_done_callback(lambda future: seen.append(future.done()))
    gate.opened.set()
    future.result(10)
    _until(lambda: len(seen) == 2)  # they run in the thread that has read the reply
    assert seen == [future, True]
    assert "a callback of <Future of 'gate', done> failed" in caplog.text
    future.add_done_callback(seen.append)  # done already: at once
    assert seen == [future, True, future]


def test_callbacks_come_once_whoever_ends_the_call(channel: fastsplit.Channel) -> None:
    for _ in range(100):
        seen: list[Any] = []
        future = channel.submit("echo")
        future.add_done_callback(seen.append)
        _in_threads(2, lambda number: future.cancel() if number else cf.wait([future]))  # noqa: B023
        assert seen == [future] and future.done()


# ---- deadlines and cancellation --------------------------------------------------------------------------------------


def test_a_deadline_costs_its_call_alone(either: Any, gate: Gate) -> None:
    other = either.submit("gate")
    with pytest.raises(DeadlineError, match=r"gate: no reply within its deadline of 0\.1 s"):
        either.call("gate", np.zeros(MIB), timeout_s=0.1)
    gate.opened.set()
    assert other.result(10) == ()
    for size in (0, 10, MIB):  # the late reply, 8 MiB of it, is read and dropped
        assert either.call("echo", np.ones(size))[0].sum() == size


def test_a_calls_deadline_holds_when_another_thread_reads(channel: fastsplit.Channel, gate: Gate) -> None:
    late: list[float] = []

    def work(number: int) -> None:
        started = time.monotonic()
        with pytest.raises(DeadlineError):
            channel.call("gate", timeout_s=0.3 + 0.1 * number)
        late.append(time.monotonic() - started - (0.3 + 0.1 * number))

    _in_threads(3, work)
    assert max(late) < 0.25
    gate.opened.set()


def test_deadline_of_zero_and_none(either: Any, gate: Gate) -> None:
    with pytest.raises(DeadlineError):
        either.call("gate", timeout_s=0)
    either.call_timeout_s = None
    threading.Timer(0.1, gate.opened.set).start()
    assert either.call("gate") == ()
    time.sleep(0.05)


def test_cancel(channel: fastsplit.Channel, server: fastsplit.Server, gate: Gate) -> None:
    running = [channel.submit("gate") for _ in range(4)]  # as many as there are workers
    for _ in range(4):
        assert gate.entered.acquire(timeout=10)
    waiting = channel.submit("gate")
    assert waiting.cancel() and waiting.cancelled() and waiting.cancel()
    with pytest.raises(CancelledError, match="gate: cancelled"):
        waiting.result()
    assert channel.submit("echo", np.zeros(1)).cancel()
    (client,) = server._service.clients
    deadline = time.monotonic() + 10
    while len(client.core.cancelled) < 2:  # the server has read both
        assert time.monotonic() < deadline
        time.sleep(0.005)
    gate.opened.set()
    assert [future.result(10) for future in running] == [()] * 4
    assert channel.call("echo") == ()
    assert not gate.entered.acquire(timeout=0.1)  # the cancelled one was never run


def test_a_cancelled_wait_ends_in_another_thread(channel: fastsplit.Channel, gate: Gate) -> None:
    first, second = channel.submit("gate"), channel.submit("gate")
    caught: list[BaseException] = []

    def wait_for(future: fastsplit.Future) -> None:
        with pytest.raises(CancelledError) as raised:
            future.exception(20)
        caught.append(raised.value)

    threads = [threading.Thread(target=wait_for, args=(future,)) for future in (first, second)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)  # one of them reads, the other sleeps
    second.cancel()
    first.cancel()
    gate.opened.set()  # the reader sees it with the next thing that comes
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert [type(error) for error in caught] == [CancelledError] * 2


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_threads_share_a_channel(channel: fastsplit.Channel) -> None:
    def work(number: int) -> None:
        sizes = np.random.default_rng(number)
        for step in range(60):
            x = np.full(int(sizes.choice([0, 1, 100, 5_000, 100_000])), number * 1000 + step)
            if step % 3:
                (y,) = channel.call("echo", x, step=step)
            else:
                futures = [channel.submit("echo", x + n, step=step) for n in range(3)]
                y = futures[1].result()[0] - 1
                assert [future.result().attrs["step"] for future in futures] == [step] * 3
            assert (y == x).all() and y.shape == x.shape

    _in_threads(6, work)
    assert channel.stats.calls == 6 * (40 + 20 * 3)


def test_full_sockets_both_ways(either: Any) -> None:
    """Large requests and large replies, pipelined: each side is full in both directions, and nobody waits for ever."""
    x = np.arange(4 * MIB, dtype=np.uint8)
    futures = [either.submit("echo", x) for _ in range(12)]
    for future in futures:
        assert np.array_equal(future.result(20)[0], x)


def test_full_sockets_both_ways_from_many_threads(channel: fastsplit.Channel) -> None:
    x = np.arange(3 * MIB, dtype=np.uint8)

    def work(number: int) -> None:
        futures = [channel.submit("echo", x, n=number) for _ in range(4)]
        for future in futures:
            result = future.result(20)
            assert result.attrs["n"] == number and np.array_equal(result[0], x)

    _in_threads(4, work)


def test_full_sockets_both_ways_in_order(socket_uri: str) -> None:
    """The same against a server that reads nothing while it answers."""
    with fastsplit.Server(socket_uri, {"echo": _echo}, arrays="numpy") as server:
        with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=20) as channel:
            x = np.arange(4 * MIB, dtype=np.uint8)
            futures = [channel.submit("echo", x) for _ in range(8)]
            futures += [channel.submit("echo", x[:n]) for n in range(500)]
            assert all(np.array_equal(f.result(20)[0], x[: f.result()[0].size]) for f in futures)


def test_submit_alone_makes_no_progress_but_loses_nothing(channel: fastsplit.Channel) -> None:
    futures = [channel.submit("echo", np.full(1000, n)) for n in range(300)]
    channel.call("echo")
    time.sleep(0.2)
    assert [int(future.result(10)[0][0]) for future in futures] == list(range(300))


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_caps_of_the_server(socket_uri: str) -> None:
    caps = fastsplit.Limits(
        max_metadata_nbytes=4096, max_message_nbytes=1000, max_tensors=2, max_dims=2, max_attrs=16, max_inflight=3
    )
    gate = Gate()
    with fastsplit.Server(socket_uri, {"echo": _echo, "gate": gate}, limits=caps, workers=1) as server:
        with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
            for tensors, attrs, text in [
                ([np.zeros(1)] * 3, {}, "'echo', tensors: 3, the peer accepts at most 2"),
                ([np.zeros((1, 1, 1))], {}, "'echo', tensor 0 dimensions: 3, the peer accepts at most 2"),
                ([np.zeros(126)], {}, "'echo', .*1008.*, the peer accepts at most 1000"),
                ([], {f"a{n}": n for n in range(17)}, "'echo', attrs: 17, the peer accepts at most 16"),
                ([], {"text": "x" * 5000}, "bytes, the peer accepts at most 4096"),
            ]:
                with pytest.raises(LimitError, match=text):
                    channel.call("echo", *tensors, **attrs)
            futures = [channel.submit("gate") for _ in range(3)]
            with pytest.raises(
                DeadlineError, match=r"gate: not sent within 0\.1 s: the peer takes 3 requests at a time"
            ):
                channel.submit("gate", timeout_s=0.1)
            gate.opened.set()
            assert [future.result(10) for future in futures] == [()] * 3
            assert channel.call("echo", np.zeros(125))[0].size == 125  # after all that, the connection lives


def test_caps_of_the_client(socket_uri: str, front: Front) -> None:
    """The server may not send more than the client accepts: then the call fails, with the number and the cap."""
    caps = fastsplit.Limits(max_message_nbytes=1000, max_tensors=2, max_dims=2)
    handlers = {
        "many": lambda call: [np.zeros(1)] * 3,
        "deep": lambda call: np.zeros((1, 1, 1)),
        "large": lambda call: np.zeros(126),
        "fits": lambda call: np.zeros(125),
    }
    with fastsplit.Server(socket_uri, handlers) as server, front.connect(server.uri, limits=caps) as channel:
        for op, text in [
            ("many", "LimitError: tensors: 3, the peer accepts at most 2"),
            ("deep", "LimitError: .*tensor 0 dimensions: 3, the peer accepts at most 2"),
            ("large", "LimitError: .*1008.*, the peer accepts at most 1000"),
        ]:
            with pytest.raises(RemoteOpError, match=text):
                channel.call(op)
        assert channel.call("fits")[0].shape == (125,)


@pytest.mark.parametrize("attrs", [{"a": None}, {"a": 2**63}, {"a": "\udc80"}, {"": 1}])
def test_what_cannot_travel_costs_only_its_call(either: Any, attrs: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        either.call("echo", **attrs)
    with pytest.raises(TensorError):
        either.call("echo", [1, 2])
    assert either.call("echo") == () and either.stats.calls == 1


# ---- what a reply must hold ------------------------------------------------------------------------------------------


def test_expect(either: Any) -> None:
    x = np.ones((2, 3), np.float32)
    assert either.call("echo", x, expect=[("float32", (2, 3))])[0].shape == (2, 3)
    with pytest.raises(RemoteProtocolError, match=r"a reply's tensor 0: float32\[2, 3\], expected float32\[3, 2\]"):
        either.call("echo", x, expect=[(np.float32, (3, 2))])
    with pytest.raises(ClosedError, match="the channel is closed: a reply's tensor 0"):
        either.call("echo")


def test_a_call_that_the_server_ends(socket_uri: str, front: Front) -> None:
    def script(peer: RawPeer) -> None:
        peer.greet()
        for code in ("cancelled", "deadline", "failed"):
            request = peer.expect(REQUEST)
            peer.send(frame(ERROR, request.request_id, attrs={"code": code, "text": f"it is {code}"}))
        peer.receive()

    with serving(socket_uri, script) as uri, front.connect(uri, call_timeout_s=10) as channel:
        for error, text in ((CancelledError, "cancelled"), (DeadlineError, "deadline"), (RemoteOpError, "failed")):
            with pytest.raises(error, match=f"^f: it is {text}$"):
                channel.call("f")


# ---- spinning --------------------------------------------------------------------------------------------------------


def test_how_long_a_caller_spins_is_as_given_and_may_change(
    server: fastsplit.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spin, "cores", lambda: 2)
    monkeypatch.setenv("FASTSPLIT_SPIN_US", "20")
    with fastsplit.connect(server.uri, arrays="numpy") as channel:
        assert channel.spin_us == 20.0
    monkeypatch.delenv("FASTSPLIT_SPIN_US")
    with fastsplit.connect(server.uri, arrays="numpy") as channel:
        assert channel.spin_us == 50.0
    with fastsplit.connect(server.uri, arrays="numpy", spin_us=7) as channel:
        for spin_us in (7, 0, 12.5, 1e6, 0.0, 3000):
            channel.spin_us = spin_us
            assert channel.spin_us == spin_us
            assert type(channel.spin_us) is float
            assert channel._connection.transport.spin.spin_us == spin_us, "it is what readers look at"
            (y,) = channel.call("echo", np.arange(3), timeout_s=5)
            assert y.tolist() == [0, 1, 2]


@pytest.mark.parametrize("spin_us", [-1, -0.001, float("nan"), float("inf"), 1_000_001])
def test_a_spin_that_is_none_is_refused_and_the_old_one_stays(server: fastsplit.Server, spin_us: float) -> None:
    with fastsplit.connect(server.uri, arrays="numpy", spin_us=7) as channel:
        with pytest.raises(SettingError, match=r"^spin_us: .*, expected 0 to 1e6$"):
            channel.spin_us = spin_us
        assert channel.spin_us == 7.0
        assert channel.call("echo") == ()
    with pytest.raises(SettingError, match=r"^spin_us: .*, expected 0 to 1e6$"):
        fastsplit.connect(server.uri, arrays="numpy", spin_us=spin_us)


def test_spinning_ends_for_callers_that_wait_already(channel: fastsplit.Channel, gate: Gate) -> None:
    """Set in the middle of a call, by another thread, it costs nothing but the spin."""
    channel.spin_us = 1e6
    future = channel.submit("gate", np.arange(3))
    gate.entered.acquire()
    thread = threading.Thread(target=lambda: setattr(channel, "spin_us", 0))
    thread.start()
    gate.opened.set()
    (y,) = future.result()
    thread.join()
    assert (y.tolist(), channel.spin_us) == ([0, 1, 2], 0.0)


def test_how_long_to_spin_can_be_asked_and_said_when_it_is_over(server: fastsplit.Server) -> None:
    with fastsplit.connect(server.uri, arrays="numpy", spin_us=7) as channel:
        pass
    assert channel.spin_us == 7.0
    channel.spin_us = 0.0
    with pytest.raises(ClosedError):
        channel.call("echo")


# ---- the ends --------------------------------------------------------------------------------------------------------


def test_close(channel: fastsplit.Channel, server: fastsplit.Server, gate: Gate) -> None:
    future = channel.submit("gate")
    assert server.connections == 1 and not channel.closed
    channel.close()
    channel.close()
    assert channel.closed and repr(channel) == f"<Channel to {server.uri}, closed>"
    with pytest.raises(ClosedError, match="the channel was closed"):
        future.result()
    with pytest.raises(ClosedError, match="the channel is closed: the channel was closed"):
        channel.call("echo")
    gate.opened.set()
    deadline = time.monotonic() + 5
    while server.connections and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.connections == 0


def test_close_while_others_wait_send_and_read(server: fastsplit.Server, gate: Gate) -> None:
    """Whatever they do at that moment, they get ClosedError, nothing else, and at once."""
    for turn in range(15):
        channel = fastsplit.connect(server.uri, arrays="numpy")
        outcomes: list[type] = []
        started = threading.Barrier(5)

        def work(number: int) -> None:
            started.wait()  # noqa: B023
            try:
                while True:
                    channel.call("echo", np.zeros(1 + number * 40_000))  # noqa: B023
            except BaseException as error:
                outcomes.append(type(error))  # noqa: B023

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        started.wait()
        time.sleep(0.003 * turn)
        channel.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert outcomes == [ClosedError] * 4


def test_the_descriptor_is_closed_when_its_last_user_leaves(server: fastsplit.Server, gate: Gate) -> None:
    channel = fastsplit.connect(server.uri, arrays="numpy")
    future = channel.submit("gate")
    reader = threading.Thread(target=future.exception)
    reader.start()
    time.sleep(0.05)
    channel.close()
    reader.join(5)
    assert _socket(channel).fileno() == -1
    gate.opened.set()


def test_peer_killed_while_a_call_waits(unix_uri: str, front: Front) -> None:
    program = (
        "import fastsplit, sys, time\n"
        "server = fastsplit.Server(sys.argv[1], {'hang': lambda call: time.sleep(60)}, arrays='numpy').start()\n"
        "print('READY', flush=True)\n"
        "server.serve_forever()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, unix_uri], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"READY\n"
        with front.connect(unix_uri, arrays="numpy") as channel:
            futures = [channel.submit("hang") for _ in range(2)]
            killed = threading.Timer(0.1, os.kill, (process.pid, signal.SIGKILL))
            killed.start()
            started = time.monotonic()
            for future in futures:
                with pytest.raises(PeerLostError):
                    future.result(timeout=20)
            assert time.monotonic() - started < 5  # noticed, not timed out
            killed.join()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_peer_gone_in_the_middle_of_a_reply(socket_uri: str, front: Front) -> None:
    def script(peer: RawPeer) -> None:
        peer.greet()
        request = peer.receive()
        assert request is not None and request.kind == REQUEST
        peer.send(frame(REPLY, request.request_id, "", [(12, (1000,))], {}, bytes(100), payload_nbytes=4000))

    with serving(socket_uri, script) as uri, front.connect(uri) as channel:
        with pytest.raises(PeerLostError, match="ended 3900 bytes before the end of a payload of 4000 bytes"):
            channel.call("f")


def test_a_send_that_gets_stuck_ends_the_connection(socket_uri: str) -> None:
    done = threading.Event()

    def script(peer: RawPeer) -> None:
        peer.greet()
        done.wait(20)  # reads nothing

    with serving(socket_uri, script) as uri:
        with fastsplit.connect(uri, arrays="numpy") as channel:
            waiting = channel.submit("small")
            with pytest.raises(DeadlineError, match=r"large: not sent within 0\.2 s; the connection is closed"):
                channel.call("large", np.zeros(20 * MIB, np.uint8), timeout_s=0.2)
            assert isinstance(waiting.exception(1), DeadlineError)
            with pytest.raises(ClosedError):
                channel.call("small")
            done.set()


def test_close_while_a_send_is_stuck(socket_uri: str) -> None:
    done = threading.Event()

    def script(peer: RawPeer) -> None:
        peer.greet()
        done.wait(20)

    with serving(socket_uri, script) as uri:
        channel = fastsplit.connect(uri, arrays="numpy")
        caught: list[BaseException] = []

        def work() -> None:
            try:
                channel.call("large", np.zeros(20 * MIB, np.uint8))
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.1)
        started = time.monotonic()
        channel.close()
        thread.join(5)
        assert time.monotonic() - started < 2 and [type(error) for error in caught] == [ClosedError]
        done.set()


def test_a_reply_that_dribbles_does_not_outlast_its_deadline(socket_uri: str, front: Front) -> None:
    stop = threading.Event()

    def script(peer: RawPeer) -> None:
        peer.greet()
        request = peer.receive()
        assert request is not None
        head = frame(REPLY, request.request_id, "", [(2, (2**30,))], {}, b"", payload_nbytes=2**30)
        try:
            peer.send(head)
            while not stop.is_set():
                peer.send(bytes(100))  # always something to read
        except OSError:
            pass

    with serving(socket_uri, script) as uri, front.connect(uri) as channel:
        started = time.monotonic()
        with pytest.raises(DeadlineError):
            channel.call("f", timeout_s=0.3)
        assert time.monotonic() - started < 2
        stop.set()


# ---- connecting ------------------------------------------------------------------------------------------------------


def test_nobody_listens(socket_uri: str, front: Front) -> None:
    uri = socket_uri.replace(":0", ":1")
    with pytest.raises(
        ConnectError, match=f"{re.escape(uri)}: cannot connect: (Connection refused|No such file or directory)"
    ):
        front.connect(uri)


def test_a_silent_server(socket_uri: str, front: Front) -> None:
    done = threading.Event()
    with serving(socket_uri, lambda peer: done.wait(20)) as uri:
        with pytest.raises(DeadlineError, match=r"connected, but no handshake within 0\.2 s"):
            front.connect(uri, timeout_s=0.2)
        done.set()


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (b"", PeerLostError, "the peer closed the connection"),
        (
            b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
            RemoteProtocolError,
            "magic: b'HTTP', expected b'FSPL'",
        ),
        (hello()[:50], PeerLostError, "the peer's stream ended after 50 bytes of a frame's head"),
        (frame(1, op="hello", version=2), RemoteProtocolError, "header, version: 2, expected 1"),
        (frame(7, attrs={"text": "go away"}), RemoteProtocolError, "the peer ended the connection: go away"),
    ],
    ids=["nothing", "another protocol", "half a handshake", "another version", "a refusal"],
)
def test_a_handshake_that_fails(
    socket_uri: str, answer: bytes, error: type[Exception], text: str, front: Front
) -> None:
    def script(peer: RawPeer) -> None:
        peer.receive()  # unread bytes would reset the connection
        peer.send(answer)

    with serving(socket_uri, script) as uri, pytest.raises(error, match=text):
        front.connect(uri)


def test_a_refusal_is_heard_although_it_came_with_a_reset(socket_uri: str) -> None:
    """Refused before our own handshake was read: sending that may fail already, and the reason is still to be had."""
    for _ in range(20):
        with serving(socket_uri, lambda peer: peer.send(frame(7, attrs={"text": "full"}))) as uri:
            with pytest.raises(RemoteProtocolError, match="the peer ended the connection: full"):
                fastsplit.connect(uri)
        if uri.startswith("unix"):
            os.unlink(uri.removeprefix("unix://").partition("?")[0])


def test_it_is_the_peer_that_must_keep_connections_apart(server: fastsplit.Server, front: Front) -> None:
    """Each channel has ids, caches and statistics of its own."""
    with front.connect(server.uri) as first, front.connect(server.uri, arrays="numpy") as second:
        first.call("echo", np.zeros(5), n=1)
        assert second.call("echo", np.zeros(5), n=2).attrs == {"n": 2}
        assert (first.stats.calls, second.stats.calls) == (1, 1)
        assert first.stats is first.stats and first.stats is not second.stats


def test_memory_comes_from_the_channels_pool(server: fastsplit.Server, front: Front) -> None:
    pool = Pool()
    with front.connect(server.uri, arrays="numpy", pool=pool) as channel:
        (y,) = channel.call("echo", np.zeros(MIB, np.uint8))
        assert pool.idle_nbytes == 0
        address = y.ctypes.data
        del y
        assert pool.idle_nbytes == (0 if channel.shm else MIB)
        if channel.shm:
            channel.call("echo")  # brings what the server had of it
        x = channel.empty(MIB, "uint8")  # the same again, wherever it comes from
        assert x.ctypes.data == address and pool.idle_nbytes == 0


def test_sockets_are_not_inherited(channel: fastsplit.Channel) -> None:
    assert not _socket(channel).get_inheritable()


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), -1, 1e7])
def test_timeouts_that_are_none(server: fastsplit.Server, timeout_s: float, front: Front) -> None:
    with front.connect(server.uri, arrays="numpy") as channel:
        with pytest.raises(fastsplit.SettingError, match=r"timeout_s: .*, expected 0 to 1e\+06"):
            channel.call("echo", timeout_s=timeout_s)
        assert channel.call("echo", timeout_s=1e6) == ()
    for name in ("timeout_s", "call_timeout_s"):
        with pytest.raises(fastsplit.SettingError, match=f"{name}: "):
            front.connect(server.uri, **{name: timeout_s})  # type: ignore[arg-type]


def test_calls_that_are_none(server: fastsplit.Server, front: Front) -> None:
    with front.connect(server.uri, arrays="numpy") as channel:
        with pytest.raises(fastsplit.SettingError, match="op: 3, expected a string"):
            channel.call(3)  # type: ignore[arg-type]
        with pytest.raises(fastsplit.TensorError, match=r"shape \(1\.5,\), expected ints"):
            channel.empty((1.5,))  # type: ignore[arg-type]
        assert channel.call("echo") == ()


def test_a_deadline_before_the_first_byte_costs_only_its_call(
    server: fastsplit.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object, **__: object) -> None:
        raise DeadlineError("late")

    with fastsplit.connect(server.uri, arrays="numpy") as channel:
        channel.call("echo", np.zeros(3))  # a segment is announced with the first
        channel._connection.fast_path = None
        with monkeypatch.context() as patch:
            patch.setattr(
                channel._connection.transport, "send", lambda buffers, nbytes=-1: buffers
            )  # the socket is full
            patch.setattr(channel._connection.transport, "wait", late)
            with pytest.raises(DeadlineError, match=r"echo: not sent within 0\.1 s$"):
                channel.call("echo", np.zeros(3), timeout_s=0.1)
        assert channel._session.inflight == 0
        assert len(channel.call("echo", np.zeros(3))) == 1
        if channel.shm:
            channel.call("echo")  # brings what the server had of it
            arena = channel._connection.arena
            assert arena is not None and arena.in_use_nbytes == 0  # the loan was taken back


def test_a_call_does_not_wait_for_ever_behind_anothers_send(server: fastsplit.Server) -> None:
    with fastsplit.connect(server.uri, arrays="numpy") as channel:
        with (
            channel._connection.sending,
            pytest.raises(DeadlineError, match=r"echo: not sent within 0\.05 s, since other calls were"),
        ):
            channel.call("echo", timeout_s=0.05)
        assert channel.call("echo") == ()


def test_a_call_that_waits_twice_has_one_deadline(server: fastsplit.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """For memory first, then behind another call."""
    with fastsplit.connect(server.uri, arrays="numpy") as channel:
        prepare = channel._connection.prepare
        monkeypatch.setattr(channel._connection, "prepare", lambda *args: time.sleep(0.3) or prepare(*args))
        started_s = time.monotonic()
        with channel._connection.sending, pytest.raises(DeadlineError, match=r"not sent within 0\.4 s"):
            channel.call("echo", timeout_s=0.4)
        assert time.monotonic() - started_s < 0.65
