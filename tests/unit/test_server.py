"""The server: many clients that do not touch each other, handlers that fail, and every way to end."""

from __future__ import annotations

import errno
import logging
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aio_front import Front
from raw_peer import ABORT, CANCEL, ERROR, GOODBYE, REPLY, REQUEST, connected, frame, hello

import fastsplit
from fastsplit.errors import (
    AddressError,
    ClosedError,
    ConnectError,
    DeadlineError,
    PeerLostError,
    RemoteOpError,
    SettingError,
)
from fastsplit.wire.call import Client
from fastsplit.wire.transport import spin

Serve = Callable[..., fastsplit.Server]
Connect = Callable[..., fastsplit.Channel]


def _echo(call: fastsplit.Call) -> Any:
    return call.tensors


def _until(condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- handlers --------------------------------------------------------------------------------------------------------


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def _raise(error: BaseException) -> Callable[[fastsplit.Call], Any]:
    def handler(call: fastsplit.Call) -> Any:
        raise error

    return handler


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("handler", "text"),
    [
        (_raise(ValueError("bad value")), "ValueError: bad value"),
        (_raise(KeyError("k")), "KeyError: 'k'"),
        (_raise(SystemExit(3)), "SystemExit: 3"),
        (_raise(KeyboardInterrupt()), "KeyboardInterrupt: "),
        (_raise(_Unprintable()), "_Unprintable"),
        (_raise(OSError(errno.ENOENT, "gone", "/\udc80")), "FileNotFoundError: .* gone: '/.+'"),
        (_raise(RuntimeError("\udc80 lone")), r"RuntimeError: \? lone"),
        (_raise(RuntimeError("x" * 100_000)), "RuntimeError: x{3000}"),
        (_raise(fastsplit.PeerLostError("of another connection")), "PeerLostError: of another connection"),
        (lambda call: [1, 2], "TensorError: a tensor of type int, expected a torch tensor or a numpy array"),
        (lambda call: "text", "TensorError: a tensor of type str"),
        (lambda call: np.array(["text"]), "TensorError: numpy dtype"),
        (lambda call: call.reply_attrs.update(a=None), "SettingError: attribute 'a': None, expected an int"),
        (lambda call: call.reply_attrs.update({5: 1}), "SettingError: '': an attribute named 5, expected a string"),
    ],
)
def test_a_handlers_failure_is_an_answer(unix_uri: str, front: Front, workers: int, handler: Any, text: str) -> None:
    with front.Server(unix_uri, {"f": handler, "echo": _echo}, workers=workers, arrays="numpy") as server:
        with front.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
            for _ in range(2):
                with pytest.raises(RemoteOpError, match=f"^f: {text}"):
                    channel.call("f")
            assert channel.call("echo", np.ones(3))[0].sum() == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_unknown_op(unix_uri: str, front: Front, workers: int) -> None:
    with front.Server(unix_uri, {"echo": _echo, "f": _echo}, workers=workers) as server:
        with front.connect(server.uri) as channel:
            with pytest.raises(RemoteOpError, match=r"x: no such operation here; there are: echo, f$"):
                channel.call("x")


def test_what_a_handler_sees(unix_uri: str, serve: Serve, connect: Connect) -> None:
    seen: list[Any] = []

    def look(call: fastsplit.Call) -> None:
        seen.append((call.op, call.tensors, call.attrs, call.remaining_s, call.cancelled))
        call.attrs["more"] = 1  # its own
        call.tensors[0][:] = 5  # writable
        call.reply_attrs["said"] = "yes"

    server = serve(unix_uri, {"look": look}, arrays="numpy")
    channel = connect(server.uri)
    for _ in range(2):
        result = channel.call("look", np.zeros(3, np.int8), n=1, s="t", timeout_s=7)
        assert result == () and result.attrs == {"said": "yes"}
    for op, tensors, attrs, remaining_s, cancelled in seen:
        assert (op, attrs, cancelled) == ("look", {"n": 1, "s": "t", "more": 1}, False)
        assert type(tensors) is tuple and tensors[0].tolist() == [5, 5, 5]
        assert 5 < remaining_s <= 7
    channel.call_timeout_s = None
    channel.call("look", np.zeros(3))
    assert seen[-1][3] is None


def test_tensors_that_a_handler_keeps_stay_its_own(unix_uri: str, serve: Serve, connect: Connect) -> None:
    kept: list[Any] = []
    server = serve(unix_uri, {"keep": lambda call: kept.append(call.tensors[0])}, arrays="numpy")
    channel = connect(server.uri)
    for size in (10, 100_000):
        for value in range(5):
            channel.call("keep", np.full(size, value))
    assert [int(x[0]) for x in kept] == [0, 1, 2, 3, 4] * 2 and all((x == x[0]).all() for x in kept)


# ---- order, deadlines, cancellation ----------------------------------------------------------------------------------


def test_without_workers_requests_run_in_order(unix_uri: str, serve: Serve, connect: Connect) -> None:
    ran: list[int] = []
    server = serve(unix_uri, {"f": lambda call: ran.append(call.attrs["n"])})
    channel = connect(server.uri)
    futures = [channel.submit("f", n=n) for n in range(100)]
    futures[-1].result(10)
    assert ran == list(range(100)) and all(future.done() for future in futures)


def test_workers_overlap_and_answer_out_of_order(unix_uri: str, serve: Serve, connect: Connect) -> None:
    gate = threading.Event()
    server = serve(unix_uri, {"slow": lambda call: gate.wait(10) and None, "echo": _echo}, workers=2)
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(frame(REQUEST, 5, "slow"), frame(REQUEST, 6, "echo"))
        answer = peer.receive()
        assert answer is not None and (answer.kind, answer.request_id) == (REPLY, 6)
        gate.set()
        answer = peer.receive()
        assert answer is not None and (answer.kind, answer.request_id) == (REPLY, 5)


def test_a_request_whose_deadline_passed_while_it_waited_is_not_run(unix_uri: str, serve: Serve) -> None:
    ran: list[str] = []
    gate = threading.Event()
    server = serve(
        unix_uri, {"slow": lambda call: gate.wait(10) and None, "f": lambda call: ran.append("f")}, workers=1
    )
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(frame(REQUEST, 1, "slow"), frame(REQUEST, 2, "f", time_ns=1_000_000))
        time.sleep(0.05)
        gate.set()
        answers = {answer.request_id: answer for answer in (peer.receive(), peer.receive()) if answer}
        assert answers[2].kind == ERROR
        assert answers[2].message.attrs == {"code": "deadline", "text": "its deadline passed before it ran"}
    assert not ran


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cancel_that_comes_in_time(unix_uri: str, serve: Serve, workers: int) -> None:
    ran: list[str] = []
    server = serve(unix_uri, {"f": lambda call: ran.append("f")}, workers=workers)
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(frame(REQUEST, 1, "f") + frame(CANCEL, 1) + frame(CANCEL, 99) + frame(REQUEST, 2, "f"))
        answers = {answer.request_id: answer for answer in (peer.receive(), peer.receive()) if answer}
        assert answers[1].kind == ERROR and answers[1].message.attrs["code"] == "cancelled"
        assert answers[2].kind == REPLY and ran == ["f"]
        peer.send(frame(CANCEL, 3))
        peer.send(frame(REQUEST, 3, "f"))  # an id that was cancelled before it existed is not
        answer = peer.receive()
        assert answer is not None and answer.kind == REPLY


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["deadline", "close", "killed"])
def test_a_handler_can_see_that_nobody_waits(socket_uri: str, serve: Serve, workers: int, how: str) -> None:
    seen = threading.Event()
    entered = threading.Event()

    def wait(call: fastsplit.Call) -> None:
        entered.set()
        _until(lambda: call.cancelled, 10)
        seen.set()

    server = serve(socket_uri, {"wait": wait}, workers=workers)
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(frame(REQUEST, 1, "wait", time_ns=50_000_000 if how == "deadline" else 0))
        assert entered.wait(5)
        if how == "close":
            peer.send(frame(GOODBYE))
            peer.close_writing()
        elif how == "killed":
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            peer.sock.close()
        assert seen.wait(5)


def test_cancel_reaches_a_running_handler(unix_uri: str, serve: Serve, connect: Connect) -> None:
    seen = threading.Event()
    entered = threading.Event()

    def wait(call: fastsplit.Call) -> None:
        entered.set()
        _until(lambda: call.cancelled, 10)
        seen.set()

    server = serve(unix_uri, {"wait": wait, "echo": _echo}, workers=2)
    channel = connect(server.uri)
    future = channel.submit("wait")
    assert entered.wait(5)
    future.cancel()
    assert seen.wait(5)
    assert channel.call("echo") == ()


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ((1, 2, 3), "3 requests in flight, expected at most 2"),
        ((7, 7), "header, request_id: 7, which is in flight already"),
    ],
)
def test_requests_that_a_client_must_not_send(
    unix_uri: str, front: Front, numbers: tuple[int, ...], reason: str
) -> None:
    gate = threading.Event()
    handlers = {"slow": lambda call: gate.wait(10) and None}
    with front.Server(unix_uri, handlers, workers=1, limits=fastsplit.Limits(max_inflight=2)) as server:
        with connected(server.uri) as peer:
            peer.greet()
            peer.send(*(frame(REQUEST, n, "slow") for n in numbers))
            assert peer.expect_abort() == reason
            gate.set()


# ---- clients that do not touch each other ----------------------------------------------------------------------------


def test_one_clients_failure_touches_nobody_else(socket_uri: str, serve: Serve, connect: Connect) -> None:
    server = serve(socket_uri, {"echo": _echo}, arrays="numpy")
    stop = threading.Event()
    failures: list[BaseException] = []
    counts = [0, 0]

    def work(number: int) -> None:
        try:
            with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
                while not stop.is_set():
                    x = np.full(20_000, counts[number])
                    assert (channel.call("echo", x)[0] == x).all()
                    counts[number] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    big = frame(REQUEST, 1, "echo", [(2, (10**6,))], {}, b"", payload_nbytes=10**6)
    for data in [
        b"x" * 100,
        hello()[:30],
        hello() + big + bytes(1000),
        hello() + b"y" * 40,
        frame(GOODBYE),
        hello() * 2,
    ]:
        with connected(server.uri) as peer:
            peer.send(data)
            time.sleep(0.02)
    before = list(counts)
    _until(lambda: all(now > then for now, then in zip(counts, before, strict=True)))
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not failures
    _until(lambda: server.connections == 0)


def test_a_client_that_reads_nothing_is_given_up(socket_uri: str, serve: Serve, connect: Connect) -> None:
    server = serve(socket_uri, {"big": lambda call: np.zeros(50_000_000, np.uint8)}, send_timeout_s=0.2)
    with connected(server.uri) as peer:
        peer.greet()
        peer.send(frame(REQUEST, 1, "big"))
        _until(lambda: server.connections == 1)
        _until(lambda: server.connections == 0)


def test_a_silent_client_is_told_and_dropped(socket_uri: str, front: Front) -> None:
    with front.Server(socket_uri, {}, handshake_timeout_s=0.1) as server:
        with connected(server.uri) as peer:
            assert peer.expect_abort() == "no handshake within 0.1 s"
        _until(lambda: server.connections == 0)


def test_a_dribbling_handshake_is_dropped(socket_uri: str, serve: Serve) -> None:
    server = serve(socket_uri, {}, handshake_timeout_s=0.2)
    with connected(server.uri) as peer:
        started = time.monotonic()
        try:
            for byte in hello() * 10:
                peer.send(bytes([byte]))
                time.sleep(0.02)
        except OSError:  # it is closed
            pass
        assert time.monotonic() - started < 3
    _until(lambda: server.connections == 0)


def test_an_idle_client_may_stay(socket_uri: str, serve: Serve, connect: Connect) -> None:
    server = serve(socket_uri, {"echo": _echo}, handshake_timeout_s=0.1, send_timeout_s=0.1)
    channel = connect(server.uri)
    time.sleep(0.3)
    assert channel.call("echo") == ()


def test_too_many_connections(socket_uri: str, front: Front) -> None:
    with front.Server(socket_uri, {"echo": _echo}, max_connections=2) as server:
        with front.connect(server.uri) as first, front.connect(server.uri) as second:
            for _ in range(5):
                with pytest.raises(
                    ConnectError, match=r"server refused .*: 2 connections already, the server accepts no more$"
                ):
                    front.connect(server.uri)
            assert first.call("echo") == second.call("echo") == ()
            first.close()
            _until(lambda: server.connections == 1)
            with front.connect(server.uri) as third:
                assert third.call("echo") == ()


def test_no_thread_left(unix_uri: str, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(unix_uri, {"echo": _echo})
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(PeerLostError, match=r"the server has no thread left: .*RLIMIT_NPROC is"):
        fastsplit.connect(server.uri)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert connect(server.uri).call("echo") == ()
    assert server.connections == 1


def test_many_clients(socket_uri: str, serve: Serve) -> None:
    server = serve(socket_uri, {"echo": _echo}, arrays="numpy")
    channels = [fastsplit.connect(server.uri, arrays="numpy") for _ in range(40)]
    futures = [channel.submit("echo", np.full(1000, n)) for n, channel in enumerate(channels)]
    assert [int(future.result(10)[0][0]) for future in futures] == list(range(40))
    assert server.connections == 40
    for channel in channels:
        channel.close()
    _until(lambda: server.connections == 0)


# ---- what belongs to a connection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_all_calls_of_a_connection_have_one_client_and_no_others(
    socket_uri: str, serve: Serve, connect: Connect, workers: int
) -> None:
    seen: list[Client] = []
    server = serve(socket_uri, {"look": lambda call: seen.append(call.client)}, workers=workers)
    first, second = connect(server.uri), connect(server.uri)
    for channel in (first, second, first, second):
        channel.call("look")
    assert seen[0] is seen[2]
    assert seen[1] is seen[3]
    assert seen[0] is not seen[1]
    assert len({*seen}) == 2
    assert not any(client.ended for client in seen)
    first.close()
    _until(lambda: seen[0].ended)
    assert not seen[1].ended


def test_what_shall_run_at_a_connections_end_runs_once_and_in_order(
    socket_uri: str, serve: Serve, connect: Connect
) -> None:
    seen: list[Any] = []
    clients: list[Any] = []

    def keep(call: fastsplit.Call) -> None:
        clients.append(call.client)
        for name in call.attrs["names"]:
            call.client.on_end(lambda name=name: seen.append((name, call.client.ended)))

    server = serve(socket_uri, {"keep": keep})
    one, other = connect(server.uri), connect(server.uri)
    one.call("keep", names=["a", "b"])
    other.call("keep", names=["x"])
    one.call("keep", names=["c"])
    assert seen == []
    one.close()
    _until(lambda: len(seen) == 3)
    assert seen == [("a", True), ("b", True), ("c", True)]
    clients[0].on_end(lambda: seen.append("late"))
    assert seen[3:] == ["late"], "at once, by whoever asks"
    clients[0]._end()
    assert len(seen) == 4
    server.close()
    assert seen[4:] == [("x", True)]


@pytest.mark.parametrize("how", ["goodbye", "killed", "garbage", "the server closes"])
def test_however_a_connection_ends_its_client_does(unix_uri: str, serve: Serve, how: str) -> None:
    ended = threading.Event()
    server = serve(unix_uri, {"keep": lambda call: call.client.on_end(ended.set)})
    with connected(unix_uri) as peer:
        peer.greet()
        peer.send(frame(REQUEST, 1, "keep"))
        peer.expect(REPLY)
        assert not ended.is_set()
        if how == "garbage":
            peer.send(b"x" * 64)
        elif how == "goodbye":
            peer.send(frame(GOODBYE))
        elif how == "the server closes":
            server.close()
        if how != "killed":
            assert ended.wait(5)
    assert ended.wait(5)


def test_a_callback_that_fails_is_logged_and_the_others_run(
    unix_uri: str, serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()

    def keep(call: fastsplit.Call) -> None:
        call.client.on_end(lambda: 1 / 0)
        call.client.on_end(ended.set)

    server = serve(unix_uri, {"keep": keep})
    channel = connect(unix_uri)
    channel.call("keep")
    channel.close()
    assert ended.wait(5)
    (record,) = (record for record in caplog.records if record.exc_text)
    assert record.getMessage() == "what was to run at a connection's end failed"
    assert record.exc_text is not None
    assert record.exc_text.endswith("ZeroDivisionError: division by zero")
    assert record.exc_info is None  # whoever keeps the record keeps no frames
    _until(lambda: server.connections == 0)
    assert connect(unix_uri).call("keep") == ()


def test_a_callback_that_comes_too_late_raises_to_whoever_asks() -> None:
    client = Client()
    client._end()
    assert client.ended
    with pytest.raises(ZeroDivisionError):
        client.on_end(lambda: 1 / 0)


def test_a_handler_at_work_sees_that_its_client_has_ended(unix_uri: str, serve: Serve, connect: Connect) -> None:
    """What it keeps for it then is dropped at once."""
    started, ended, dropped = threading.Event(), threading.Event(), threading.Event()

    def work(call: fastsplit.Call) -> None:
        started.set()
        _until(lambda: call.client.ended)
        ended.set()
        call.client.on_end(dropped.set)

    serve(unix_uri, {"work": work}, workers=1)
    channel = connect(unix_uri)
    future = channel.submit("work")
    assert started.wait(5)
    channel.close()
    with pytest.raises(fastsplit.FastsplitError):
        future.result()
    assert ended.wait(5)
    assert dropped.wait(5)


def test_many_threads_may_ask_while_the_connection_ends() -> None:
    for _ in range(50):
        client = Client()
        counts = [0] * 4
        barrier = threading.Barrier(5)

        def ask(index: int, barrier: threading.Barrier = barrier, counts: list[int] = counts) -> None:
            def count() -> None:
                counts[index] += 1

            barrier.wait()
            for _ in range(20):
                client.on_end(count)  # noqa: B023

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        barrier.wait()
        client._end()
        for thread in threads:
            thread.join()
        assert counts == [20] * 4, "each once"


# ---- spinning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "env", "expected"),
    [
        ({}, None, 50.0),
        ({}, "20", 20.0),
        ({"spin_us": 7}, "20", 7.0),
        ({"spin_us": 0.0}, None, 0.0),
        ({"spin_us": 7, "workers": 1}, None, 0.0),
    ],
    ids=["default", "environment", "given", "not at all", "with workers"],
)
def test_how_long_a_connection_spins(
    socket_uri: str,
    serve: Serve,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    env: str | None,
    expected: float,
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(spin, "cores", lambda: 2)
    monkeypatch.delenv("FASTSPLIT_SPIN_US", raising=False)
    if env is not None:
        monkeypatch.setenv("FASTSPLIT_SPIN_US", env)
    server = serve(
        socket_uri, {"look": lambda call: seen.append(call._served.core.connection.transport.spin.spin_us)}, **options
    )
    connect(server.uri).call("look")
    assert seen == [expected]


@pytest.mark.parametrize("spin_us", [-1, float("nan"), 2e6])
def test_a_spin_that_is_none_is_refused(unix_uri: str, spin_us: float) -> None:
    with pytest.raises(SettingError, match=r"^spin_us: .*, expected 0 to 1e6$"):
        fastsplit.Server(unix_uri, {}, spin_us=spin_us)


# ---- listening and closing -------------------------------------------------------------------------------------------


def test_unix_socket_file(unix_uri: str, front: Front) -> None:
    path = Path(unix_uri.removeprefix("unix://"))
    with front.Server(unix_uri, {}) as server:
        assert server.uri == unix_uri and stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(OSError, match="cannot listen: Address already in use"), front.Server(unix_uri, {}):
            pass
    assert not path.exists()


def test_a_stale_socket_file_does_not_matter(unix_uri: str, connect: Connect) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(unix_uri.removeprefix("unix://"))
    stale.close()
    with fastsplit.Server(unix_uri, {"echo": _echo}) as server:
        assert connect(server.uri).call("echo") == ()


@pytest.mark.parametrize("uri", ["tcp://0.0.0.0:0", "tcp://[::]:0", "vsock://3:9"])
def test_a_listener_off_loopback_is_refused(front: Front, uri: str) -> None:
    with pytest.raises(AddressError, match="refused to listen: links are not authenticated"):
        front.Server(uri, {}).__enter__()


def test_an_address_is_taken_before_clients_are_served(unix_uri: str) -> None:
    """Clients that come meanwhile are served then."""
    server = fastsplit.Server(unix_uri, {"echo": _echo})
    assert server.bind() is server.bind() is server and not server.started
    opening = threading.Thread(target=lambda: fastsplit.connect(unix_uri).close())
    opening.start()
    with server:
        opening.join(10)
        assert not opening.is_alive()
    never = fastsplit.Server(unix_uri, {}).bind()
    never.close()
    assert not os.path.exists(unix_uri.removeprefix("unix://"))
    with pytest.raises(ClosedError, match="the server was closed"):
        never.bind()


def test_what_a_server_shows(front: Front, unix_uri: str) -> None:
    gate, entered = threading.Event(), threading.Event()

    def wait(call: fastsplit.Call) -> None:
        entered.set()
        gate.wait(10)

    options = {"max_connections": 7, "handshake_timeout_s": 3, "send_timeout_s": 4.5, "workers": 1}
    limits = fastsplit.Limits(max_inflight=9)
    with front.Server(unix_uri, {"wait": wait}, limits=limits, **options) as server:
        shown = (server.max_connections, server.handshake_timeout_s, server.send_timeout_s, server.limits)
        assert shown == (7, 3.0, 4.5, limits) and list(server.handlers) == ["wait"] and server.started
        with front.connect(server.uri) as channel:
            future = channel.submit("wait")
            assert entered.wait(5) and server.inflight == server.connections == 1
            gate.set()
            assert future.result(5) == ()
            _until(lambda: not server.inflight)
            assert server.stats.calls == 1


def test_life_of_a_server(unix_uri: str) -> None:
    server = fastsplit.Server(unix_uri, {})
    assert repr(server) == f"<Server on {unix_uri}, 0 connections>"
    assert server.start() is server
    with pytest.raises(ClosedError, match="the server was started already"):
        server.start()
    server.close()
    server.close()
    with pytest.raises(ClosedError, match="the server was closed"):
        server.start()
    never = fastsplit.Server(unix_uri, {})
    never.close()
    with pytest.raises(ClosedError, match="the server was closed"):
        never.serve_forever()


def test_serve_forever_ends_with_close(unix_uri: str) -> None:
    """Also with one that comes while it is still starting."""
    for _ in range(30):
        server = fastsplit.Server(unix_uri, {})
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        while not os.path.exists(unix_uri.removeprefix("unix://")):
            pass
        server.close()
        thread.join(5)
        assert not thread.is_alive()
        assert not os.path.exists(unix_uri.removeprefix("unix://"))


@pytest.mark.parametrize("workers", [0, 3])
def test_close_lets_running_handlers_answer(socket_uri: str, connect: Connect, workers: int) -> None:
    entered = threading.Semaphore(0)

    def slow(call: fastsplit.Call) -> Any:
        entered.release()
        time.sleep(0.2)
        return () if call.cancelled else np.arange(1_000_000)

    server = fastsplit.Server(socket_uri, {"slow": slow}, workers=workers).start()
    channels = [connect(server.uri, call_timeout_s=10) for _ in range(2)]
    futures = [channel.submit("slow") for channel in channels]
    for _ in futures:
        assert entered.acquire(timeout=5)
    results: list[Any] = []
    readers = [threading.Thread(target=lambda f=f: results.append(f.result(10))) for f in futures]
    for reader in readers:
        reader.start()
    server.close()
    for reader in readers:
        reader.join(10)
    assert [len(result[0]) for result in results] == [1_000_000] * 2
    for channel in channels:
        with pytest.raises((PeerLostError, ClosedError)):
            channel.call("slow")


def test_close_does_not_wait_for_ever(unix_uri: str, connect: Connect) -> None:
    gate = threading.Event()
    server = fastsplit.Server(unix_uri, {"hang": lambda call: gate.wait(20) and None}, workers=1).start()
    future = connect(server.uri).submit("hang")
    time.sleep(0.05)
    started = time.monotonic()
    server.close(timeout_s=0.2)
    assert time.monotonic() - started < 1
    with pytest.raises(PeerLostError):
        future.result(5)
    gate.set()


def test_close_with_idle_clients_is_quick(socket_uri: str, connect: Connect) -> None:
    server = fastsplit.Server(socket_uri, {"echo": _echo}).start()
    channels = [connect(server.uri) for _ in range(5)]
    channels[0].call("echo")
    started = time.monotonic()
    server.close()
    assert time.monotonic() - started < 0.5
    for channel in channels:
        with pytest.raises((PeerLostError, ClosedError)):
            channel.call("echo")


def test_close_while_clients_call(socket_uri: str) -> None:
    """Each call either has its answer or says that the peer left; nobody hangs."""
    for _ in range(5):
        server = fastsplit.Server(socket_uri, {"echo": _echo}, arrays="numpy").start()
        outcomes: list[type] = []

        def work(uri: str = server.uri, outcomes: list[type] = outcomes) -> None:
            try:
                with fastsplit.connect(uri, arrays="numpy", call_timeout_s=10) as channel:
                    while True:
                        x = np.arange(50_000)
                        assert np.array_equal(channel.call("echo", x)[0], x)
            except BaseException as error:
                outcomes.append(type(error))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        _until(lambda: server.connections == 3)  # noqa: B023
        time.sleep(0.02)
        server.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert outcomes == [PeerLostError] * 3


def test_a_handler_may_close_its_server(unix_uri: str, connect: Connect) -> None:
    server = fastsplit.Server(unix_uri, {})
    server.handlers["stop"] = lambda call: server.close()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _until(lambda: server.started and os.path.exists(unix_uri.removeprefix("unix://")))
    channel = connect(server.uri)
    assert channel.call("stop", timeout_s=5) == ()
    thread.join(5)
    assert not thread.is_alive()


def test_closing_from_two_threads(unix_uri: str, connect: Connect) -> None:
    """Both return when the server is closed, not before."""
    server = fastsplit.Server(unix_uri, {"slow": lambda call: time.sleep(0.2)}).start()
    future = connect(server.uri).submit("slow")
    time.sleep(0.05)
    ended: list[bool] = []
    threads = [
        threading.Thread(target=lambda: (server.close(), ended.append(server.connections == 0))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert future.result(5) == ()
    for thread in threads:
        thread.join(5)
    assert ended == [True, True]


def test_what_ended_a_connection_is_logged(unix_uri: str, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(unix_uri, {})
    with caplog.at_level(logging.WARNING, "fastsplit.server"):
        with connected(server.uri) as peer:
            peer.greet()
            peer.send(b"x" * 40)
            peer.expect_abort()
        with connected(server.uri) as peer:
            peer.greet()
            peer.send(frame(ABORT, attrs={"text": "you are wrong"}))
            assert peer.receive() is None  # an ABORT is not answered with another
        _until(lambda: server.connections == 0)
    text = caplog.text
    assert "a connection ended: header, magic: b'xxxx'" in text
    assert "a connection ended: the peer ended the connection: you are wrong" in text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastsplit.server"):
        with fastsplit.connect(server.uri):
            pass
        _until(lambda: server.connections == 0)
    assert not caplog.records  # a clean close is no news


def test_accepting_goes_on_when_descriptors_run_out(unix_uri: str, serve: Serve, connect: Connect) -> None:
    server = serve(unix_uri, {"echo": _echo})
    channel = connect(server.uri)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = socket.socket(socket.AF_UNIX)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
        waiting.connect(unix_uri.removeprefix("unix://"))
        time.sleep(0.1)
        assert channel.call("echo") == ()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        waiting.close()
    assert connect(server.uri).call("echo") == ()


def test_deadline_error_from_the_server_is_one_here(unix_uri: str, serve: Serve, connect: Connect) -> None:
    """With one worker busy, a queued call's deadline passes on both sides; either's error may come first."""
    gate = threading.Event()
    server = serve(unix_uri, {"slow": lambda call: gate.wait(10) and None, "echo": _echo}, workers=1)
    channel = connect(server.uri)
    slow = channel.submit("slow")
    late = channel.submit("echo", timeout_s=0.05)
    (client,) = server._service.clients
    _until(lambda: len(client.core.pending) == 2)  # the server counts from a request's arrival
    time.sleep(0.1)
    gate.set()
    assert slow.result(5) == ()
    assert isinstance(late.exception(5), DeadlineError)


def test_python_threads_are_daemons(unix_uri: str, serve: Serve, connect: Connect) -> None:
    """A program that forgets to close its server can still end."""
    serve(unix_uri, {})
    connect(unix_uri)
    names = [thread for thread in threading.enumerate() if thread.name.startswith("fastsplit")]
    assert len(names) == 2 and all(thread.daemon for thread in names)
