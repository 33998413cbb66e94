"""The fast path (native/fastpath.c): which calls it makes, that these equal Python's, and what it leaves to Python.

Most tests make the same calls twice, over a connection with its fast path and over one without. A test of what may
happen at one moment between two of its steps has code run at that moment: a finalizer that the collector runs, or a
part of the connection that is replaced.
"""

from __future__ import annotations

import collections
import concurrent.futures as cf
import contextlib
import gc
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from raw_peer import (
    ABORT,
    CANCEL,
    ERROR,
    FLOAT32,
    GOODBYE,
    HEADER,
    HELLO,
    REPLY,
    REQUEST,
    RawPeer,
    connected,
    frame,
    hello,
    memfd,
    serving,
)
from until import until

import fastsplit
from fastsplit.errors import ClosedError, DeadlineError, PeerLostError, ReentrantCallError
from fastsplit.schema.coding import cast_bit
from fastsplit.wire.blocking import channel as blocking_channel
from fastsplit.wire.blocking import replies
from fastsplit.wire.rules import CODES
from fastsplit.wire.session import STAGING_NBYTES
from fastsplit.wire.transport import meter

pytestmark = pytest.mark.skipif(not fastsplit.native, reason="the compiled core is not in use here")

Serve = Callable[..., fastsplit.Server]
Connect = Callable[..., fastsplit.Channel]
Pair = tuple[fastsplit.Channel, fastsplit.Channel]
NBYTES = 65536

through_a_ring = pytest.mark.parametrize("socket_uri", ["shm"], indirect=True)
through_a_socket = pytest.mark.parametrize("socket_uri", ["unix", "tcp4"], indirect=True)


class Watched:
    """A fast path, and what came of each call of it."""

    def __init__(self, path: Any) -> None:
        self._path = path
        self.came: collections.Counter[str] = collections.Counter()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._path, name)
        if name not in ("call", "submit", "wait", "receive", "reply"):
            return method

        def run(*args: Any) -> Any:
            outcome = method(*args)
            done = args[1]._done if name == "wait" else outcome not in (None, False)
            kind = (
                "future" if name == "call" and isinstance(outcome, fastsplit.Future) else "fast" if done else "python"
            )
            self.came[f"{name}: {kind}"] += 1
            return outcome

        return run


def _watched(channel: fastsplit.Channel) -> Watched:
    channel._connection.fast_path = Watched(channel._connection.fast_path)
    return channel._connection.fast_path


def _served(server: fastsplit.Server) -> Any:
    """The server's side of its only connection."""
    (served,) = server._service.clients
    return served


def _echo(call: fastsplit.Call) -> Any:
    call.reply_attrs.update(call.attrs)
    return call.tensors


@pytest.fixture(params=[pytest.param(link, marks=pytest.mark.matrix) for link in ("unix", "tcp4", "shm")])
def socket_uri(request: pytest.FixtureRequest, unix_uri: str) -> str:
    """The links of the other tests' fixture that have a fast path."""
    return {"unix": unix_uri + "?shm=off", "tcp4": "tcp://127.0.0.1:0", "shm": unix_uri}[request.param]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """The handler "gate" waits for it."""
    gate = threading.Event()
    gate.set()
    yield gate
    gate.set()


@pytest.fixture
def server(socket_uri: str, serve: Serve, gate: threading.Event) -> fastsplit.Server:
    def wait(call: fastsplit.Call) -> Any:
        assert gate.wait(20)
        return call.tensors

    handlers = {"echo": _echo, "gate": wait, "big": lambda call: np.ones(NBYTES), "fail": lambda call: 1 / 0}
    return serve(socket_uri, handlers, arrays="numpy")


@pytest.fixture
def channel(server: fastsplit.Server, connect: Connect) -> fastsplit.Channel:
    return _warm(connect(server.uri, arrays="numpy", call_timeout_s=10))


def _warm(channel: fastsplit.Channel) -> fastsplit.Channel:
    """Has both ends know the shapes of a call with a tensor of four floats."""
    x = channel.empty(4)
    for op in ("echo", "gate") * 3:
        channel.call(op, x)
    return channel


@pytest.fixture
def pair(serve: Serve, connect: Connect, socket_uri: str, without_fast_path: Callable[[], None]) -> Callable[..., Pair]:
    """`pair(handlers, arrays)`: two channels, of which the second has no fast path at either end."""

    def make(handlers: dict[str, Any], arrays: str = "numpy") -> Pair:
        server = serve(socket_uri, handlers, arrays=arrays)
        first = connect(server.uri, arrays=arrays, call_timeout_s=10)
        without_fast_path()
        return first, connect(server.uri, arrays=arrays, call_timeout_s=10)

    return make


def _shown(tensor: Any) -> Any:
    if isinstance(tensor, np.ndarray):
        return tensor.dtype, tensor.shape, tensor.tobytes(), tensor.flags.writeable
    shape = tensor.shape
    return tensor.dtype, shape, bytes(tensor.reshape(-1).view(_torch().uint8).tolist()), tensor.requires_grad


def _torch() -> Any:
    return pytest.importorskip("torch")


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        result = work()
    except Exception as error:
        return type(error), str(error)
    return list(map(_shown, result)), repr(result.attrs)


def _error(work: Callable[[], Any]) -> BaseException | None:
    try:
        work()
    except Exception as error:
        return error
    return None


def _check_equal(pair: Pair, work: Callable[[fastsplit.Channel], Any]) -> None:
    """The same outcomes, the first time and as soon as all is known."""
    outcomes = [[_outcome(lambda channel=channel: work(channel)) for _ in range(4)] for channel in pair]  # type: ignore[misc]
    assert outcomes[0] == outcomes[1]


# ---- which calls -----------------------------------------------------------------------------------------------------


def test_plain_calls_take_the_fast_path(server: fastsplit.Server, channel: fastsplit.Channel) -> None:
    path, x = _watched(channel), channel.empty(4)
    served = _served(server)
    served.connection.fast_path = there = Watched(served.connection.fast_path)
    for _ in range(10):
        assert channel.call("echo", x)[0].shape == (4,)
        assert channel.call("echo", x, timeout_s=5, expect=[("float32", (4,))])[0].shape == (4,)
        channel.submit("echo", np.ones(4, np.float32)).result()
    assert path.came["call: fast"] >= 15  # the watcher may read at the moment of one
    assert path.came["submit: fast"] >= 8
    assert there.came["reply: fast"] >= 29  # the first one's thread may have had the fast path before


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_unix_socket_of_which_one_side_shares_no_memory(
    unix_uri: str, serve: Serve, connect: Connect, side: str
) -> None:
    server = serve(unix_uri + ("?shm=off" if side == "server" else ""), {"echo": _echo}, arrays="numpy")
    channel = connect(unix_uri + ("?shm=off" if side == "client" else ""), arrays="numpy")
    for _ in range(5):
        channel.call("echo", np.ones(4))
    ends = channel._connection, _served(server).connection
    assert not channel.shm
    assert all(end.fast_path.sent_nbytes for end in ends)


LEFT: dict[str, Callable[[fastsplit.Channel], Any]] = {
    "a new shape": lambda channel: channel.call("echo", channel.empty((2, 3, 5))),
    "a list": lambda channel: channel.call("echo", a=[1, 2]),
    "an attribute of numpy's": lambda channel: channel.call("echo", a=np.int32(1)),
    "no bytes": lambda channel: channel.call("echo", np.ones(0)),
    "not row-major": lambda channel: channel.call("echo", np.ones((3, 2)).T),
    "a large copy": lambda channel: channel.call("echo", np.ones(40000)),
    "no time": lambda channel: channel.submit("echo", timeout_s=0),
    "a codec": lambda channel: channel.call("echo", np.ones(4, np.float32), codec="off"),
    "a numpy scalar": lambda channel: channel.call("echo", np.float32(1)),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_to_python(channel: fastsplit.Channel, what: str) -> None:
    for _ in range(0 if what == "a new shape" else 2):
        LEFT[what](channel)
    path = _watched(channel)
    assert LEFT[what](channel) is not None
    assert [way for way in path.came if not way.startswith("wait")] in (["call: python"], ["submit: python"], [])


def test_a_call_while_another_thread_sends_or_reads(channel: fastsplit.Channel, gate: threading.Event) -> None:
    path, x = _watched(channel), channel.empty(4)
    sending = channel._connection.sending
    with sending, pytest.raises(DeadlineError, match=r"not sent within 0.02 s, since other calls were"):
        channel.call("echo", x, timeout_s=0.02)
    assert path.came == {"call: python": 1}
    gate.clear()
    with cf.ThreadPoolExecutor(1) as pool:
        other = pool.submit(channel.call, "gate", x)
        until(lambda: path.op == "gate")
        with pytest.raises(DeadlineError):
            channel.call("echo", x, timeout_s=0.02)
        gate.set()
        other.result()
    assert path.came["call: python"] == 2


# ---- the same as Python ----------------------------------------------------------------------------------------------

INTS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
DTYPES = ["bool", *INTS, "float16", "float32", "float64"]
KINDS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda x: x,
    "0-d": lambda x: x[3],
    "one of size 1": lambda x: x[3:4].reshape((1,) * 5),
    "a part": lambda x: x[2:5],
    "steps": lambda x: x[::2],
    "transposed": lambda x: x[:6].reshape(2, 3).T,
    "empty": lambda x: x[:0],
    "33 dimensions": lambda x: x[:1].reshape((1,) * 33),
}


def _counts(channel: fastsplit.Channel, *, staged: bool = True) -> tuple[int, ...]:
    """`staged`: of large tensors the fast path stages more."""
    stats = channel.stats
    crossed = (stats.bytes_sent, stats.bytes_received) if channel._connection.arena is None else ()  # else bells
    return stats.calls, stats.bytes_shared, stats.bytes_copied, stats.bytes_staged if staged else 0, *crossed


@pytest.mark.parametrize("arrays", ["numpy", "torch"])
def test_tensors(pair: Callable[..., Pair], arrays: str) -> None:
    channels = pair({"echo": _echo}, arrays)
    names = [*DTYPES, "bfloat16", "float8_e4m3fn", "float8_e5m2"] if arrays == "torch" else DTYPES
    for name in names:
        own = np.arange(8).astype(name) if arrays == "numpy" else _torch().arange(8).to(getattr(_torch(), name))
        shared = {channel: channel.empty(8, name) for channel in channels}
        for tensor in shared.values():
            tensor[...] = own
        for part in KINDS.values():
            _check_equal(channels, lambda channel: channel.call("echo", part(own)))  # noqa: B023
            _check_equal(channels, lambda channel: channel.call("echo", part(shared[channel]), n=1))  # noqa: B023
            _check_equal(channels, lambda channel: channel.submit("echo", *[part(shared[channel])] * 2).result())  # noqa: B023
    assert _counts(channels[0]) == _counts(channels[1])


def _odd_tensors() -> Iterator[Any]:
    read_only = np.arange(4.0)
    read_only.flags.writeable = False
    moved = np.arange(100.0)
    tail = moved[50:]
    moved.resize(3, refcheck=False)
    yield from (read_only, tail, np.arange(4.0)[::-1], np.arange(4, dtype=">i4"), np.array([None]), np.array(["a"]))
    yield from (np.zeros(2, [("a", "i4")]), np.ma.array([1, 2], mask=[0, 1]), np.zeros(2, "g"))
    yield from (np.zeros(2, np.complex64), np.frombuffer(bytearray(33), "u1")[1:].view("f8"), np.float32(3), 3, None)
    yield from ([1.0], np.zeros(3, np.dtype("u2", metadata={"x": 1})), np.broadcast_to(np.float32(1), (4,)))


def _odd_torch_tensors() -> Iterator[Any]:
    torch = _torch()
    freed, cut = torch.ones(5), torch.ones(5)
    freed.untyped_storage().resize_(0)
    cut.untyped_storage().resize_(8)
    yield from (
        torch.ones(3, requires_grad=True),
        torch.nn.Parameter(torch.ones(3)),
        freed,
        cut,
        torch.ones(1).expand(5),
    )
    yield from (torch._neg_view(torch.arange(4.0)), torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).conj().imag)
    yield from (torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch._efficientzerotensor(3))
    yield from (torch.ones(3).to(torch.float8_e4m3fnuz), torch.from_numpy(np.arange(5.0)), torch.zeros((1,) * 40))


@pytest.mark.parametrize("tensors", [_odd_tensors, _odd_torch_tensors])
def test_odd_tensors(pair: Callable[..., Pair], tensors: Callable[[], Iterator[Any]]) -> None:
    channels = pair({"echo": _echo}, "torch" if tensors is _odd_torch_tensors else "numpy")
    for tensor in tensors():
        _check_equal(channels, lambda channel: channel.call("echo", tensor))  # noqa: B023
        _check_equal(channels, lambda channel: channel.submit("echo", tensor, tensor).result())  # noqa: B023


class _Text(str):
    __slots__ = ()


ATTRS: list[dict[Any, Any]] = [
    {},
    {"a": 2**63 - 1, "b": -(2**63), "c": True, "d": 1.5, "e": "x", "f": b"y"},
    *(
        {"a": value}
        for value in (2**63, -0.0, float("nan"), "\ud800", _Text("s"), bytearray(b"b"), [1], [1, 2.5], None)
    ),
    *({"a": value} for value in (np.int32(3), np.float32(2), np.bool_(1), "x" * 2000, "y\0z", (1, 2), {})),
    *({name: 1} for name in ("", "\ud800", _Text("k"), 3)),
    {f"a{i}": i for i in range(65)},
]


def test_attributes(pair: Callable[..., Pair]) -> None:
    channels = pair({"echo": _echo})
    for attrs in ATTRS:
        _check_equal(channels, lambda channel: channel.call("echo", attrs=attrs))  # noqa: B023
        _check_equal(channels, lambda channel: channel.submit("echo", attrs=attrs).result())  # noqa: B023


_Two = collections.namedtuple("_Two", "a b")  # noqa: PYI024
RESULTS: dict[str, Callable[[fastsplit.Call], Any]] = {
    "none": lambda call: None,
    "list": lambda call: [*call.tensors, np.ones(3)],
    "namedtuple": lambda call: _Two(*call.tensors, np.ones(3)),
    "generator": lambda call: (tensor for tensor in call.tensors),
    "scalar": lambda call: np.float32(2),
    "a list of lists": lambda call: [[np.ones(1)]],
    "one that is none": lambda call: [np.ones(1), None],
    "64": lambda call: [np.ones(2)] * 64,
    "65": lambda call: [np.ones(2)] * 65,
    "read-only": lambda call: np.broadcast_to(np.float32(1), (4,)),
    "raises": lambda call: 1 / 0,
    "exits": lambda call: sys.exit(3),
    "attrs": lambda call: call.reply_attrs.update(a=[1, 2], b=1.5, c=True, d=b"x"),
    "wrong attrs": lambda call: call.reply_attrs.update(a={}),
    "an OrderedDict": lambda call: setattr(call, "reply_attrs", collections.OrderedDict(a=1)),
    "no attrs": lambda call: delattr(call, "reply_attrs"),
    "no tensors": lambda call: delattr(call, "tensors"),
}


def test_results(pair: Callable[..., Pair]) -> None:
    channels = pair(RESULTS)
    shared = {channel: channel.empty(4) for channel in channels}
    for tensor in shared.values():
        tensor[...] = 1
    for what in RESULTS:
        _check_equal(channels, lambda channel: channel.call(what, shared[channel]))  # noqa: B023


EXPECT = [3, "ab", [3], [("nope", (4,))], [("float32",)], [("float32", (-1,))], [("float32", [4])]]


def test_arguments(pair: Callable[..., Pair]) -> None:
    channels = pair({"echo": _echo})
    x = np.ones(4, np.float32)
    for op in (_Text("echo"), "", "\ud800", 3, None, b"echo", "unknown"):
        _check_equal(channels, lambda channel: channel.call(op, x))  # noqa: B023
    for timeout_s in (-1, float("nan"), 1e9, 1e300, 2**70, "a", np.float32(3)):
        _check_equal(channels, lambda channel: channel.call("echo", x, timeout_s=timeout_s))  # noqa: B023
    for expect in EXPECT:
        _check_equal(channels, lambda channel: channel.call("echo", x, expect=expect))  # noqa: B023


def test_two_errors_at_a_time(pair: Callable[..., Pair]) -> None:
    """Which of them is raised does not depend on the fast path."""
    _check_equal(pair({"echo": _echo}), lambda channel: channel.call("echo", 3, expect=3))


@pytest.mark.parametrize("expect", [[], [("float32", (5,))], [("float64", (4,))], [("float32", (4,))] * 2])
@pytest.mark.parametrize("wait", [False, True])
def test_replies_that_were_not_expected(pair: Callable[..., Pair], expect: Any, wait: bool) -> None:
    def ask(channel: fastsplit.Channel) -> Any:
        x = np.ones(4, np.float32)
        return channel.submit("echo", x, expect=expect).result() if wait else channel.call("echo", x, expect=expect)

    channels = pair({"echo": _echo})
    for channel in channels:
        for _ in range(3):
            channel.call("echo", np.ones(4, np.float32))
    _check_equal(channels, ask)
    assert all(channel.closed for channel in channels)


# ---- the end of a wait -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spin_us", [0, 50, 20000])
def test_a_deadline(channel: fastsplit.Channel, gate: threading.Event, spin_us: int) -> None:
    x = channel.empty(4)
    channel.spin_us = spin_us
    gate.clear()
    for timeout_s in (1e-9, 1e-4, 0.03):
        with pytest.raises(DeadlineError):
            channel.call("gate", x, timeout_s=timeout_s)
        future = channel.submit("gate", x)
        with pytest.raises(DeadlineError, match="no reply"):
            future.result(timeout_s)
        assert future.cancel()
    gate.set()
    assert channel.call("echo", x)[0].shape == (4,)
    until(lambda: not channel.inflight)


def test_ctrl_c_while_the_fast_path_waits(channel: fastsplit.Channel, gate: threading.Event, sigint: None) -> None:
    """The call is cancelled; the channel lives on."""
    x, path, main = channel.empty(4), channel._connection.fast_path, threading.get_ident()

    def interrupt() -> None:
        until(lambda: path.op or channel._reader.reading == main)
        signal.pthread_kill(main, signal.SIGINT)

    for work in (lambda: channel.call("gate", x), lambda: channel.submit("gate", x).result()):
        gate.clear()
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            work()
        thread.join()
        assert path.op is None
        assert not channel.closed
        gate.set()
        assert channel.call("echo", x)[0].shape == (4,)
        until(lambda: not channel._core.calls)


def test_ctrl_c_when_the_fast_path_is_left(channel: fastsplit.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that was to go on as a future is cancelled: nothing else has that."""
    x, reader = channel.empty(4), channel._reader
    channel.submit("fail", x).exception()  # from here on there is a thread that reads

    def interrupted(future: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(reader, "left_fast_path", interrupted)
        with pytest.raises(KeyboardInterrupt):
            channel.call("fail", x)
    left = list(channel._core.calls.values())
    assert channel.call("echo", x)[0].shape == (4,)
    assert not left


@pytest.mark.parametrize("drain_s", [0, 10])
def test_close_while_the_fast_path_waits(
    channel: fastsplit.Channel, gate: threading.Event, drain_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    x, path = channel.empty(4), channel._connection.fast_path
    gate.clear()
    with cf.ThreadPoolExecutor(2) as pool, caplog.at_level(logging.WARNING, "fastsplit"):
        call = pool.submit(channel.call, "gate", x)
        until(lambda: path.op == "gate")
        close = pool.submit(channel.close, drain_s)
        until(lambda: channel._core.refusing)
        with pytest.raises(ClosedError):
            channel.call("echo", x)
        if drain_s:
            gate.set()
            assert call.result()[0].shape == (4,)
        else:
            assert isinstance(call.exception(5), ClosedError)
        close.result(5)
    assert ("1 of 'gate'" in caplog.text) == (not drain_s)


def test_a_fork_while_another_thread_waits_in_the_fast_path(channel: fastsplit.Channel, gate: threading.Event) -> None:
    x, path = channel.empty(4), channel._connection.fast_path
    gate.clear()
    with cf.ThreadPoolExecutor(1) as pool:
        call = pool.submit(channel.call, "gate", x)
        until(lambda: path.op == "gate")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(10)
                for work in (channel.call, channel.submit):
                    with pytest.raises(ClosedError):
                        work("echo", x)
                channel.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        gate.set()
        assert call.result(5)[0].shape == (4,)


def _greet(peer: RawPeer, uri: str, *, is_client: bool) -> None:
    """The handshake of the link that a URI names."""
    if "shm=off" in uri or uri.startswith("tcp"):
        peer.greet()
    else:
        peer.greet_shm(is_client=is_client)


@pytest.mark.parametrize("spin_us", [0, 50])
@pytest.mark.parametrize("reset", [False, True])
def test_a_peer_that_dies_while_the_fast_path_waits(
    socket_uri: str, connect: Connect, spin_us: int, reset: bool
) -> None:
    go_on = threading.Event()

    def script(peer: RawPeer) -> None:
        _greet(peer, socket_uri, is_client=False)
        for _ in range(3):
            peer.send(frame(REPLY, request_id=peer.expect(REQUEST).request_id))
        peer.expect(REQUEST)
        assert go_on.wait(10)
        go_on.clear()
        if reset:
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    said = []
    with serving(socket_uri, script, clients=2) as uri, cf.ThreadPoolExecutor(1) as pool:
        for is_fast in (True, False):
            channel = connect(uri, arrays="numpy", spin_us=spin_us)
            path = channel._connection.fast_path
            if not is_fast:
                channel._connection.fast_path = None
            for _ in range(3):
                channel.call("op")
            call = pool.submit(channel.call, "op")
            until(lambda: path.op == "op" if is_fast else channel._reader.reading)  # noqa: B023
            go_on.set()
            error = call.exception(5)
            assert isinstance(error, PeerLostError)
            said.append(str(error))
            assert isinstance(_error(lambda: channel.call("op")), ClosedError)  # noqa: B023
            channel.close()
    assert said[0] == said[1]


# ---- memory ----------------------------------------------------------------------------------------------------------


@through_a_ring
def test_more_returns_and_dead_leases_than_fit(server: fastsplit.Server, channel: fastsplit.Channel) -> None:
    for count in (40, 150):
        shared = [channel.empty(16, "int32") for _ in range(count)]
        for i, x in enumerate(shared):
            x[...] = i
        own = [channel.call("echo", x) for x in shared]
        others = [channel.call("echo", np.full(3, i)) for i in range(count)]
        assert all((a[0] == i).all() and (b[0] == i).all() for i, (a, b) in enumerate(zip(own, others)))
        del shared, x, own, others
    for _ in range(4):
        channel.call("echo")
    arenas = channel._connection.arena, _served(server).connection.arena
    assert [arena.in_use_nbytes for arena in arenas if arena is not None] == [0, 0]
    assert channel.trim()
    assert channel.call("echo", np.ones(3))[0].sum() == 3


@through_a_ring
def test_segments_that_come_while_the_fast_path_sleeps(channel: fastsplit.Channel) -> None:
    """Their descriptors come along with the bell."""
    channel.spin_us = 0
    big = [channel.call("big")[0] for _ in range(20)]
    assert all((x == 1).all() for x in big)


def test_results_outlive_their_channel(channel: fastsplit.Channel) -> None:
    shared = channel.empty(4)
    shared[...] = 5
    kept = [shared, *(channel.call("echo", x)[0] for x in (shared, np.full(3, 7)) for _ in range(3))]
    del shared
    channel.close()
    assert [x.flat[0] for x in kept] == [5, 5, 5, 5, 7, 7, 7]
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()


def test_a_list_that_loses_its_tensors(unix_uri: str, serve: Serve, connect: Connect) -> None:
    """A handler's list may change while its tensors are looked at: each is kept until it is sent."""
    results: list[list[Any]] = []

    def handler(call: fastsplit.Call) -> Any:
        results.append([np.full(1000, 7.0), np.full(1000, 7.0)])
        return results[-1]

    server = serve(unix_uri, {"op": handler}, arrays="numpy")
    channel = connect(server.uri, arrays="numpy", call_timeout_s=10)
    for _ in range(3):
        assert len(channel.call("op")) == 2
    arena = _served(server).connection.arena
    allocate = arena.allocate

    def lose(nbytes: int, deadline: float | None = None) -> Any:
        results[-1][0] = np.zeros(1000)  # in the place of the one that this memory is for
        return allocate(nbytes, deadline)

    arena.allocate = lose
    assert [set(tensor) for tensor in channel.call("op")] == [{7.0}, {7.0}]


# ---- threads and finalizers ------------------------------------------------------------------------------------------


def test_a_future_that_is_done_before_the_fast_path_waits(channel: fastsplit.Channel) -> None:
    """Another thread has read its reply since this one found that it must wait."""
    path, x = channel._connection.fast_path, channel.empty(4)

    class Late(Watched):
        def wait(self, reader: Any, future: fastsplit.Future, timeout_s: float | None) -> None:
            until(lambda: future.done() and not reader.reading and not reader.watching)
            path.wait(reader, future, timeout_s)

    channel._connection.fast_path = Late(path)
    started = time.monotonic()
    channel.submit("echo", x, timeout_s=2).result()
    assert time.monotonic() - started < 1


def test_a_follower_that_comes_as_the_fast_path_is_left(channel: fastsplit.Channel, gate: threading.Event) -> None:
    """A thread that has just seen another one read is told when that leaves: it does not wait in vain for a second."""
    x, reader = channel.empty(4), channel._reader
    gate.clear()
    thread = threading.Thread(target=channel.call, args=("gate", x))
    thread.start()
    until(lambda: reader.reading and channel._connection.fast_path.op)

    class Waiter:
        looked = False

        @property
        def _done(self) -> bool:  # `take_reading` asks after it has found a reader, and before it waits
            if not self.looked:
                self.looked = True
                gate.set()
                thread.join(0.2)  # it leaves here, unless it waits for the lock, which this thread has
            return False

    started = time.monotonic()
    try:
        assert reader.take_reading(Waiter(), started + 10)  # type: ignore[arg-type]
        assert time.monotonic() - started < 0.7
    finally:
        reader.leave_reading()
        thread.join()


class Lock:
    """The channel's lock. Something happens before it is taken for the first time: where its arguments are packed, the
    collector may run finalizers, and with them other threads."""

    def __init__(self, lock: Any, first: Callable[[], object]) -> None:
        self._lock, self._first = lock, [first]

    def acquire(self, *args: Any) -> bool:
        while self._first:
            self._first.pop()()
        return bool(self._lock.acquire(*args))

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


def test_another_thread_begins_to_read_first(channel: fastsplit.Channel, gate: threading.Event) -> None:
    """There is one reader at a time."""
    x, reader = channel.empty(4), channel._reader
    gate.clear()
    calls: list[cf.Future[Any]] = []
    with cf.ThreadPoolExecutor(1) as pool:

        def read() -> None:
            calls.append(pool.submit(channel.call, "gate", x, timeout_s=1))
            until(lambda: reader.reading)

        reader.lock = Lock(reader.lock, read)  # type: ignore[assignment]
        with pytest.raises(DeadlineError):
            channel.call("echo", x, timeout_s=0.05)
        still = reader.reading
        gate.set()
        assert calls[0].exception() is None
    assert still


def test_another_thread_begins_to_send_first(channel: fastsplit.Channel) -> None:
    """No frame goes between the parts of another one."""
    x, reader, sending = channel.empty(4), channel._reader, channel._connection.sending
    reader.lock = Lock(reader.lock, sending.acquire)  # type: ignore[assignment]
    sent = channel._session.next_id
    try:
        with pytest.raises(DeadlineError, match="not sent within"):
            channel.call("echo", x, timeout_s=0.02)
        assert channel._session.next_id == sent
    finally:
        sending.release()


@pytest.mark.parametrize("what", ["cancel", "callback", "call", "wait"])
def test_finalizers_while_a_future_is_waited_for(channel: fastsplit.Channel, what: str) -> None:
    """Wherever the collector runs them, a cancelled future is cancelled, each callback is called, and no waiter waits
    for ever."""
    said: list[Any] = []

    class Finalized:
        def __init__(self, future: fastsplit.Future) -> None:
            self.itself, self.future = self, future

        def __del__(self) -> None:
            ran.append(True)
            try:
                if what == "cancel":
                    said.append(self.future.cancel())
                elif what == "callback":
                    self.future.add_done_callback(said.append)
                elif what == "call":
                    said.append(channel.call("echo", x))
                else:
                    asked.set()
                    until(lambda: self.future._waited_for is not None or self.future._done)
            except Exception as error:
                said.append(error)

    def wait(future: fastsplit.Future) -> None:
        assert asked.wait(10)
        said.append(cf.wait([future], 1).done == {future})

    x, threshold, ran = channel.empty(4), gc.get_threshold(), list[bool]()
    channel.call_timeout_s = 2
    for i in range(30):
        ran.clear()
        said.clear()
        gc.collect()
        gc.disable()
        asked = threading.Event()
        future = channel.submit("echo", x)
        waiter = threading.Thread(target=wait, args=(future,))
        if what == "wait":
            waiter.start()
        Finalized(future)
        gc.set_threshold(gc.get_count()[0] + i % 3, 1000, 1000)
        gc.enable()
        started = time.monotonic()
        error = _error(future.result)
        gc.set_threshold(*threshold)
        took_s = time.monotonic() - started
        until(lambda: gc.collect() >= 0 and ran)  # which does nothing while another thread collects
        if what == "wait":
            waiter.join()
        else:
            until(lambda: said, 1)
        assert took_s < 1
        assert error is None or (said == [True] and isinstance(error, fastsplit.CancelledError))
        if what in ("cancel", "wait"):
            assert said[0] == (future.cancelled() or what == "wait")
        elif what == "call":
            assert isinstance(said[0], fastsplit.ReentrantCallError | fastsplit.Result)
    assert channel.call("echo", x)[0].shape == (4,)


def test_a_fast_path_of_nothing() -> None:
    from fastsplit._native import FastPath

    for keywords in ({}, {"slots": None}):
        with pytest.raises(TypeError, match="FastPath: expected"):
            FastPath(**keywords)


# ---- a server and its clients ----------------------------------------------------------------------------------------


def test_a_cancelled_call_ends_the_fast_path_only_for_itself(socket_uri: str, serve: Serve, connect: Connect) -> None:
    looks = threading.Event()

    def look(call: fastsplit.Call) -> Any:
        looks.set()
        until(lambda: call.cancelled)
        return call.tensors

    server = serve(socket_uri, {"look": look, "echo": _echo}, arrays="numpy")
    channel = connect(server.uri, arrays="numpy", call_timeout_s=10)
    x = channel.empty(4)
    channel.call("echo", x)
    served = _served(server)
    until(lambda: served.connection.fast_path is not None)  # the call may have come with the handshake
    served.connection.fast_path = path = Watched(served.connection.fast_path)
    for _ in range(4):
        looks.clear()
        future = channel.submit("look", x)
        assert looks.wait(5)
        assert future.cancel()
        until(lambda: not channel.inflight)
    for _ in range(5):
        channel.call("echo", x)
    assert not served.core.cancelled
    before = path.came["receive: fast"]
    for _ in range(5):
        channel.call("echo", x)
    assert path.came["receive: fast"] >= before + 4


def _answer(uri: str, hostile: dict[str, Any]) -> Any:
    """What a server says to this request, after four plain ones: kind, request, its tensors' places or its text."""
    with connected(uri) as peer:
        peer.greet_shm(is_client=True)
        with memfd(NBYTES) as fd:
            peer.announce(1, NBYTES, fd)
        plain = {"op": "echo", "tensors": [(FLOAT32, (2,))], "placements": [1, 0, 8]}
        for number, request in enumerate([plain] * 4 + [plain | hostile], 1):
            peer.send(frame(REQUEST, **({"request_id": number} | request)))
            came = peer.receive()
            while came is not None and came.kind not in (REPLY, ERROR, ABORT):
                came = peer.receive()
            assert came is not None
    return came.kind, came.request_id, came.message.placements, came.message.attrs.get("text")


PLACES = ((1, NBYTES - 8), (1, NBYTES - 4), (1, 2), (1, 2**64 - 8), (1, 2**63), (3, 0), (2, 0), (2**32 + 1, 0))
HOSTILE: list[dict[str, Any]] = [
    *({"placements": [*place, 8]} for place in PLACES),
    *({"returns": list(place)} for place in PLACES),
    *({"request_id": number} for number in (0, 2**63, 2**64 - 1)),
    *({name: 8} for name in ("flags", "payload_nbytes", "varying_nbytes")),
    {"time_ns": 2**64 - 1},
    {"placements": [1, 0, 2**64 - 1]},
]


@pytest.mark.parametrize("request_", HOSTILE, ids=str)
def test_hostile_requests(
    unix_uri: str, serve: Serve, without_fast_path: Callable[[], None], request_: dict[str, Any]
) -> None:
    server = serve(unix_uri, {"echo": _echo}, arrays="numpy")
    with_it = _answer(server.uri, request_)
    without_fast_path()
    assert with_it == _answer(server.uri, request_)


HOSTILE_REPLIES: list[dict[str, Any]] = [
    *({"request_id": number} for number in (99, 2**63)),
    *({"placements": [*place, 8]} for place in ((2, NBYTES), (1, 0), (1, 64), (3, 0))),
    *({"returns": returns} for returns in ([1, 0, 1, 0], [1, 64], [2, 0])),
    {"returns": [1, 0], "placements": [1, 0, 8]},
    {"tensors": [(FLOAT32, (2, 1))]},
    {"time_ns": 2**64 - 1},
]


@pytest.mark.parametrize("reply", HOSTILE_REPLIES, ids=str)
def test_hostile_replies(unix_uri: str, reply: dict[str, Any]) -> None:
    """The fifth reply to a tensor of the client's own is not as it should be."""

    def script(peer: RawPeer) -> None:
        peer.greet_shm(is_client=False)
        with memfd(NBYTES) as fd:
            peer.announce(2, NBYTES, fd)
        for number in range(5):
            came = peer.expect(REQUEST)
            plain = {"request_id": came.request_id, "tensors": [(FLOAT32, (2,))], "placements": [2, 0, 8]}
            peer.send(
                frame(REPLY, **{**plain, "returns": came.message.placements[:2], **(reply if number == 4 else {})})
            )
        peer.receive()

    outcomes = []
    for is_fast in (True, False):
        with serving(f"{unix_uri}{is_fast}", script) as uri:
            with fastsplit.connect(uri, arrays="numpy", call_timeout_s=0.5) as channel:
                x = channel.empty(2)
                if not is_fast:
                    channel._connection.fast_path = None
                for _ in range(4):
                    assert _outcome(lambda: channel.call("op", x, expect=[("float32", (2,))]))[1] == "{}"  # noqa: B023
                outcomes.append(_outcome(lambda: channel.call("op", x, expect=[("float32", (2,))])))  # noqa: B023
    assert outcomes[0] == outcomes[1]


# ---- through a socket ------------------------------------------------------------------------------------------------

LARGE = 30_000  # bytes of one message's tensors, which the fast path sends itself
_MIN_BUFFER = 4096  # less than a message: the kernel takes a part of one


def _socket(connection: Any) -> socket.socket:
    found = connection.transport._sock
    assert isinstance(found, socket.socket)
    return found


def _narrow(connection: Any) -> None:
    _socket(connection).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MIN_BUFFER)


class Late:
    """A raw server that answers a few requests at once, and reads no further before it may. It returns the tensors."""

    def __init__(self, at_once: int = 4) -> None:
        self.at_once, self.goes_on, self.leaves = at_once, threading.Event(), False
        self.came: list[bytes] = []

    def script(self, peer: RawPeer) -> None:
        peer.greet()
        for number in range(1000):
            if number == self.at_once:
                assert self.goes_on.wait(20)
                if self.leaves:
                    return
            try:
                came = peer.receive()
            except AssertionError:  # the client has ended in the middle of a frame
                return
            if came is None or came.kind == GOODBYE:
                return
            if came.kind == REQUEST:
                self.came.append(came.payload)
                descs = [(desc.dtype.code, desc.shape) for desc in came.message.tensors]
                with contextlib.suppress(OSError):
                    peer.send(frame(REPLY, came.request_id, tensors=descs, payload=came.payload))


def _large(number: int) -> Any:
    return np.full(LARGE, number, np.uint8)


@contextlib.contextmanager
def _late(uri: str, *, is_fast: bool = True) -> Iterator[tuple[Late, fastsplit.Channel]]:
    late = Late()
    with serving(uri, late.script) as uri:
        try:
            with fastsplit.connect(uri, arrays="numpy", call_timeout_s=10, spin_us=0) as channel:
                if not is_fast:
                    channel._connection.fast_path = None
                for number in range(4):
                    channel.call("op", _large(number))
                _narrow(channel._connection)
                yield late, channel
                late.goes_on.set()
        finally:
            late.goes_on.set()


@through_a_socket
@pytest.mark.parametrize("is_fast", [True, False])
def test_a_request_of_which_the_kernel_takes_a_part(socket_uri: str, is_fast: bool) -> None:
    """Python sends the rest. Every byte arrives, once and in order, and all of them count."""
    with _late(socket_uri, is_fast=is_fast) as (late, channel), cf.ThreadPoolExecutor(1) as pool:
        connection, path = channel._connection, _watched(channel) if is_fast else None
        sending = pool.submit(lambda: [channel.submit("op", _large(number)) for number in range(4, 24)])
        until(connection.sending.locked)
        late.goes_on.set()
        results = [future.result()[0] for future in sending.result()]
        assert all((result == number).all() for number, result in enumerate(results, 4))
        assert late.came == [bytes(_large(number)) for number in range(24)]
        sent = channel.stats.bytes_sent
        if path is not None:
            assert path.came["submit: fast"] > 0
            assert connection.transport.bytes_sent > 70_000  # more than the handshake's
        assert channel.stats.calls == 24
        assert 24 * LARGE < sent < 24 * (LARGE + 500) + 70_000
        assert channel.call("op", _large(24))[0][0] == 24
        assert not connection.sending.locked() and not connection.inside and not connection.outbox.frames


def _until_half_sent(channel: fastsplit.Channel) -> None:
    connection = channel._connection
    until(lambda: connection.sending.locked() and connection.outbox.frames)


def _half_sent_call(
    uri: str, work: str, timeout_s: float, *, is_fast: bool, meanwhile: Callable[[Late, Any], object]
) -> Any:
    """The error of a call of which the kernel took a part, while that happened."""
    with _late(f"{uri}{is_fast}?shm=off", is_fast=is_fast) as (late, channel):

        def act() -> None:
            _until_half_sent(channel)
            meanwhile(late, channel)

        thread = threading.Thread(target=act)
        thread.start()
        try:
            outcome: Any = getattr(channel, work)("op", _large(9), timeout_s=timeout_s)
            if work == "submit":
                outcome = outcome.result()
        except BaseException as error:
            outcome = type(error), str(error)
        thread.join()
        connection = channel._connection
        assert not connection.sending.locked()
        assert not connection.inside and not channel._reader.reading
        assert not channel._core.calls or not channel.closed
        if not isinstance(outcome, tuple) or type(outcome) is fastsplit.Result:
            return [bytes(tensor) for tensor in outcome]
        return outcome, channel.closed, connection.transport.fileno()


@pytest.mark.parametrize("work", ["call", "submit"])
@pytest.mark.parametrize("what", ["read", "deadline", "interrupt", "close", "leave"])
def test_a_call_of_which_the_kernel_takes_a_part(unix_uri: str, sigint: None, what: str, work: str) -> None:
    """And what happens in the middle of it: the peer reads, the deadline passes, Ctrl-C, another thread closes, the
    peer leaves."""
    main = threading.get_ident()

    def meanwhile(late: Late, channel: fastsplit.Channel) -> None:
        if what == "interrupt":
            time.sleep(0.02)  # so that it waits in a system call: one that is about to begin would not be interrupted
            signal.pthread_kill(main, signal.SIGINT)
        elif what == "close":
            channel.close()
        elif what != "deadline":
            late.leaves = what == "leave"
            late.goes_on.set()

    timeout_s = 0.05 if what == "deadline" else 5
    outcomes = [
        _half_sent_call(unix_uri, work, timeout_s, is_fast=is_fast, meanwhile=meanwhile) for is_fast in (True, False)
    ]
    assert outcomes[0] == outcomes[1]
    if what == "read":
        assert outcomes[0] == [bytes(_large(9))]
    else:
        assert outcomes[0][1:] == (True, -1)


@pytest.mark.parametrize("work", ["call", "submit"])
@pytest.mark.parametrize("of", ["this thread", "another thread"])
def test_code_that_runs_when_a_part_is_sent(unix_uri: str, work: str, of: str) -> None:
    """A finalizer or a signal's handler that calls before Python sends the rest gets an error: its own thread holds
    what it would wait for. Another thread waits, and leaves the rest alone."""
    said: list[Any] = []
    with _late(f"{unix_uri}?shm=off") as (late, channel), cf.ThreadPoolExecutor(1) as pool:
        take_rest = channel._connection.fast_path.take_rest

        def ask() -> BaseException | None:
            return _error(lambda: getattr(channel, work)("op", timeout_s=0.1))

        class Path(Watched):
            def take_rest(self, nothing: None) -> Any:
                said.append(ask() if of == "this thread" else pool.submit(ask).result())
                late.goes_on.set()
                return take_rest(nothing)

        channel._connection.fast_path = Path(channel._connection.fast_path)
        outcome = getattr(channel, work)("op", _large(5), timeout_s=5)
        assert bytes((outcome if work == "call" else outcome.result())[0]) == bytes(_large(5))
        assert not channel._connection.inside
    assert [type(error) for error in said] == [ReentrantCallError if of == "this thread" else DeadlineError]


def test_a_handler_that_calls_while_a_cancel_is_sent(
    channel: fastsplit.Channel, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets an error: its own thread holds what it would wait for."""
    x, transport = channel.empty(4), channel._connection.transport
    gate.clear()
    future, send, said = channel.submit("gate", x), transport.send, []

    def interrupted(*args: Any) -> Any:
        if len(said) < 1:
            said.append(None)
            said.append(_error(lambda: channel.call("echo", x, timeout_s=0.1)))
        return send(*args)

    monkeypatch.setattr(transport, "send", interrupted)
    assert future.cancel()
    gate.set()
    assert [type(error) for error in said[1:]] == [ReentrantCallError]
    assert channel.call("echo", x)[0].shape == (4,)


def _request(op: str, request_id: int, payload: bytes = b"", **more: Any) -> bytes:
    tensors = [(FLOAT32, (len(payload) // 4,))] if payload else []
    return frame(REQUEST, request_id, op, tensors, payload=payload, **more)


@pytest.fixture
def large_server(socket_uri: str, serve: Serve) -> fastsplit.Server:
    handlers = {"large": lambda call: _large(call.attrs["n"]), "echo": _echo}
    return serve(socket_uri, handlers, arrays="numpy", send_timeout_s=0.3)


def _ask_for_large(peer: RawPeer, number: int, count: int = 1) -> None:
    peer.send(*(_request("large", n, attrs={"n": n}) for n in range(number, number + count)))


def _narrowed(server: fastsplit.Server, peer: RawPeer) -> Any:
    """The server's side of a connection that knows its large replies, and of which the kernel takes little at once."""
    peer.greet()
    for number in range(1, 5):
        _ask_for_large(peer, number)
        assert peer.expect(REPLY).payload == bytes(_large(number))
    connection = _served(server).connection
    _narrow(connection)
    return connection


@through_a_socket
@pytest.mark.parametrize("is_fast", [True, False])
def test_a_reply_of_which_the_kernel_takes_a_part(
    large_server: fastsplit.Server, without_fast_path: Callable[[], None], is_fast: bool
) -> None:
    """Python sends the rest. Every byte arrives, once and in order."""
    if not is_fast:
        without_fast_path()
    with connected(large_server.uri) as peer:
        connection = _narrowed(large_server, peer)
        path = connection.fast_path = Watched(connection.fast_path) if is_fast else None
        for number in (5, 105):
            _ask_for_large(peer, number, 100)
            until(connection.sending.locked)
            for each in range(number, number + 100):
                came = peer.expect(REPLY)
                assert (came.request_id, came.payload) == (each, bytes(_large(each)))
        if path is not None:
            assert path.came["reply: fast"]
        until(lambda: not connection.sending.locked())
        assert large_server.stats.calls == 204
        assert 204 * LARGE < large_server.stats.bytes_sent < 204 * (LARGE + 500) + 70_000


@through_a_socket
@pytest.mark.parametrize("leaves", [False, True])
def test_a_client_that_does_not_take_its_reply(
    large_server: fastsplit.Server,
    without_fast_path: Callable[[], None],
    leaves: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The server sends for so long, and no longer: the same as without the fast path."""
    said = []
    for is_fast in (True, False):
        if not is_fast:
            without_fast_path()
        caplog.clear()
        with connected(large_server.uri) as peer, caplog.at_level(logging.DEBUG, "fastsplit"):
            connection = _narrowed(large_server, peer)
            if "unix" in large_server.uri:  # one at a time: then there is no other thread
                _ask_for_large(peer, 5)
            else:
                _ask_for_large(peer, 5, 300)
            until(lambda: connection.sending.locked() and connection.outbox.frames)  # noqa: B023
            if leaves:
                peer.close()
            until(lambda: not large_server._service.clients)
        said.append(
            [record.message.partition(": ")[2] for record in caplog.records if record.name == "fastsplit.server"]
        )
        assert connection.transport.fileno() == -1
    if "unix" in large_server.uri:
        assert said[0] == said[1]
    assert any("did not take its reply" in text for text in said[0]) or leaves


@through_a_socket
@pytest.mark.parametrize("is_fast", [True, False])
def test_a_server_that_closes_in_the_middle_of_a_reply(
    large_server: fastsplit.Server, without_fast_path: Callable[[], None], is_fast: bool
) -> None:
    """It sends the rest first, and answers what it has read."""
    if not is_fast:
        without_fast_path()
    with connected(large_server.uri) as peer, cf.ThreadPoolExecutor(1) as pool:
        connection = _narrowed(large_server, peer)
        _ask_for_large(peer, 5, 100)
        until(lambda: connection.sending.locked() and connection.outbox.frames)
        until(lambda: not _waiting(_served(large_server)))  # all requests are read
        closing = pool.submit(large_server.close)
        until(lambda: large_server._service.closing)
        came = [peer.receive()]
        while came[-1] is not None and came[-1].kind == REPLY:
            came.append(peer.receive())
        closing.result(5)
    *answers, last = came
    assert len(answers) == 100 and (last is None or last.kind == GOODBYE)  # None: there was no room for it
    for number, each in enumerate(answers, 5):
        assert each is not None and (each.request_id, each.payload) == (number, bytes(_large(number)))


@through_a_socket
def test_frames_in_pieces_and_several_at_once(server: fastsplit.Server) -> None:
    """Requests that come byte by byte, in two parts, two and a half at once, and longer than the staging memory."""
    number = 0
    with connected(server.uri) as peer:
        peer.greet()

        def make(nbytes: int) -> bytes:
            nonlocal number
            number += 1
            return _request("echo", number, bytes([number % 251]) * nbytes)

        def expect(first: int, *sizes: int) -> None:
            for at, nbytes in enumerate(sizes, first):
                came = peer.expect(REPLY)
                assert (came.request_id, came.payload) == (at, bytes([at % 251]) * nbytes)

        for nbytes in (16, 2048, 5000) * 3:
            peer.send(make(nbytes))
            expect(number, nbytes)
        for nbytes in (16, 5000):
            whole = make(nbytes)
            for cut in (1, HEADER.size, len(whole) - nbytes, len(whole) - nbytes + 4, len(whole) - 1):
                peer.send(whole[:cut])
                until(lambda: not _waiting(_served(server)))
                peer.send(whole[cut:])
                expect(number, nbytes)
                whole = make(nbytes)
            for at in range(len(whole)):
                peer.send(whole[at : at + 1])
            expect(number, nbytes)
        for sizes in ((16, 16), (16, 2048, 5000), (5000, 16), (16,) * 60, (2048,) * 3):
            first = number + 1
            peer.send(b"".join(map(make, sizes)))
            expect(first, *sizes)
        first, both = number + 1, make(16) + make(2048)
        peer.send(both[:-1000])
        expect(first, 16)
        peer.send(both[-1000:])
        expect(first + 1, 2048)


def _waiting(served: Any) -> bool:
    """Whether bytes wait to be read."""
    return bool(served.connection.transport._waiting_nbytes())


@through_a_socket
def test_replies_in_pieces_and_several_at_once(socket_uri: str, connect: Connect) -> None:
    sizes = (16, 2048, STAGING_NBYTES, 5000, 30_000)
    pieces = threading.Event()

    def script(peer: RawPeer) -> None:
        peer.greet()
        held = b""
        while (came := peer.receive()) is not None and came.kind != GOODBYE:
            descs = [(desc.dtype.code, desc.shape) for desc in came.message.tensors]
            reply = frame(REPLY, came.request_id, tensors=descs, payload=came.payload)
            if came.message.op == "hold":
                held += reply
                continue
            out, held = held + reply, b""
            step = 700 if pieces.is_set() else len(out)
            for at in range(0, len(out), step):
                peer.send(out[at : at + step])
                time.sleep(0.0002 if step == 700 else 0)  # so that it is read piece by piece

    with serving(socket_uri, script) as uri, fastsplit.connect(uri, arrays="numpy", call_timeout_s=10) as channel:
        path = _watched(channel)
        for in_pieces in (False, True, False):
            (pieces.set if in_pieces else pieces.clear)()
            for number, nbytes in enumerate(sizes * 3):
                x = np.full(nbytes, number, np.uint8)
                assert bytes(channel.call("op", x)[0]) == bytes(x)
                assert bytes(channel.submit("op", x).result()[0]) == bytes(x)
        for nbytes in sizes:
            tensors = [np.full(nbytes, number, np.uint8) for number in range(4)]
            futures = [channel.submit("hold", x) for x in tensors[:3]]
            assert bytes(channel.call("op", tensors[3])[0]) == bytes(tensors[3])
            assert [bytes(future.result()[0]) for future in futures] == list(map(bytes, tensors[:3]))
        assert path.came["call: fast"] and path.came["call: future"] and path.came["submit: fast"]


@through_a_socket
def test_the_thread_that_reads_ahead_comes_and_goes(server: fastsplit.Server, channel: fastsplit.Channel) -> None:
    """While it is there the fast path does not read; it comes back afterwards."""
    served, x = _served(server), channel.empty(4)
    served.connection.fast_path = path = Watched(served.connection.fast_path)
    ahead = served._ahead
    for _ in range(3):
        futures = []
        for number in range(20_000):
            x[...] = number
            futures.append(channel.submit("echo", x, n=number))
            if ahead.reader is not None:
                break
        assert ahead.reader is not None
        for number, future in enumerate(futures):
            assert future.result().attrs == {"n": number} and future.result()[0][0] == number
        until(lambda: channel.call("echo", x) is not None and ahead.reader is None)  # it ends when it is of no use
        path.came.clear()
        for number in range(40):
            assert channel.call("echo", x, n=number).attrs == {"n": number}
        assert path.came["receive: fast"] > 30


def test_threads_that_submit_and_call(channel: fastsplit.Channel) -> None:
    """Every reply goes to its own request."""
    stop = time.monotonic() + 0.4

    def work(thread: int) -> int:
        count = 0
        while time.monotonic() < stop:
            xs = [np.full(4, 1000 * thread + count + i, np.float32) for i in range(5)]
            futures = [channel.submit("echo", x, n=i) for i, x in enumerate(xs)]
            assert (channel.call("echo", xs[0], n=thread)[0] == xs[0]).all()
            for i, future in enumerate(futures):
                assert future.result().attrs == {"n": i} and (future.result()[0] == xs[i]).all()
            count += 6
        return count

    before = channel.stats.calls
    with cf.ThreadPoolExecutor(4) as pool:
        total = sum(pool.map(work, range(4)))
    assert channel.stats.calls == before + total
    assert not channel._core.calls and not channel.inflight


CODINGS: list[dict[str, Any]] = [{}, {"wire_dtype": "float16"}, {"codec": "off"}, {"wire_dtype": "bfloat16"}]


def test_codings_of_the_channel_and_of_a_call(
    serve: Serve, connect: Connect, socket_uri: str, without_fast_path: Callable[[], None]
) -> None:
    """What is small is not coded, what is large is; the reply is asked for as it would be by Python's path."""
    flags = []

    def handler(call: fastsplit.Call) -> Any:
        flags.append(call._flags)
        return call.tensors

    server = serve(socket_uri, {"op": handler}, arrays="numpy")
    small, large = np.linspace(0, 1, 8, dtype=np.float32), np.linspace(0, 1, 40_000, dtype=np.float32)
    outcomes = []
    for is_fast in (True, False):
        if not is_fast:
            without_fast_path()
        for coding in CODINGS:
            channel = connect(server.uri, arrays="numpy", call_timeout_s=10, **coding)
            flags.clear()
            said: list[Any] = []
            for more in (None, *CODINGS):
                if more is not None:
                    for name, value in more.items():
                        setattr(channel, name, value)
                for _ in range(3):
                    for own in ({}, {"wire_dtype": None}, {"wire_dtype": "float16"}):
                        said += [bytes(channel.call("op", x, **own)[0]) for x in (small, large)]
                        said.append(bytes(channel.submit("op", small, **own).result()[0]))
            counted = {name: (coded.tensors, coded.wire_nbytes) for name, coded in channel.stats.codecs.items()}
            outcomes.append((said, list(flags), counted, _counts(channel, staged=False)))
    assert outcomes[: len(CODINGS)] == outcomes[len(CODINGS) :]


def test_a_small_threshold_of_codecs(socket_uri: str, serve: Serve, connect: Connect) -> None:
    """What would be compressed is left to Python."""
    pytest.importorskip("zstandard")
    server = serve(socket_uri, {"echo": _echo}, arrays="numpy", codec_threshold_nbytes=100)
    channel = connect(server.uri, arrays="numpy", call_timeout_s=10, codec="zstd", codec_threshold_nbytes=100)
    path = _watched(channel)
    for _ in range(4):
        assert (channel.call("echo", np.zeros(200))[0] == 0).all()
        assert (channel.call("echo", np.zeros(4))[0] == 0).all()
    if channel.shm:
        return
    assert path.came["call: python"] + path.came["call: future"] >= 4
    assert path.came["call: fast"] >= 2
    assert channel.stats.codecs["zstd"].tensors == 8


@pytest.mark.parametrize("socket_uri", ["tcp4"], indirect=True)
def test_probes_that_fall_due(
    server: fastsplit.Server, channel: fastsplit.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Now and then Python sends a request, and with it a probe if one is due."""
    monkeypatch.setattr(meter, "_PROBE_EVERY_S", 0.0)
    monkeypatch.setattr(meter, "_PROBE_EVERY_NBYTES", 2**20)
    x, path = np.ones(7000, np.float32), _watched(channel)
    for _ in range(4):
        channel.call("echo", x)
    link = channel._connection.meter
    assert link is not None
    number = link._number
    for _ in range(200):  # 11 MiB, both ways
        channel.call("echo", x)
    assert path.came["call: fast"] + path.came["call: future"] > 150
    until(lambda: not link._asked)
    assert number + 4 <= link._number <= number + 12


@pytest.mark.parametrize("at", ["client", "server"])
def test_one_end_without_the_compiled_core(
    socket_uri: str, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    nothing = lambda *_, **__: None  # noqa: E731
    monkeypatch.setattr(*((blocking_channel if at == "client" else replies), "add_fast_path", nothing))
    server = serve(socket_uri, {"echo": _echo, "fail": lambda call: 1 / 0}, arrays="numpy")
    channel = connect(server.uri, arrays="numpy", call_timeout_s=10)
    ends = channel._connection, _served(server).connection
    assert [end.fast_path is None for end in ends] == [at == "client", at == "server"]
    for number in range(20):
        x = np.full(number % 3 + 1, number)
        assert (channel.call("echo", x, n=number)[0] == number).all()
        futures = [channel.submit("echo", x, n=n) for n in range(5)]
        assert [future.result().attrs["n"] for future in futures] == [0, 1, 2, 3, 4]
        with pytest.raises(fastsplit.RemoteOpError):
            channel.call("fail", x)


def test_ctrl_c_while_the_fast_path_spins(channel: fastsplit.Channel, gate: threading.Event, sigint: None) -> None:
    """It does not go to sleep with it."""
    x, path, main = channel.empty(4), channel._connection.fast_path, threading.get_ident()

    def interrupt() -> None:
        until(lambda: path.op)
        signal.pthread_kill(main, signal.SIGINT)
        gone.wait(3)
        gate.set()

    for _ in range(3):
        gone = threading.Event()
        channel.spin_us = 0
        for _ in range(3):
            channel.call("gate", x)
        channel.spin_us = 10_000
        gate.clear()
        thread = threading.Thread(target=interrupt)
        thread.start()
        started = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                channel.call("gate", x)
        finally:
            took_s = time.monotonic() - started
            gone.set()
            thread.join()
        assert took_s < 2


def test_a_deadline_of_an_hour(channel: fastsplit.Channel, gate: threading.Event) -> None:
    """The socket's own timeout ends no call."""
    x = channel.empty(4)
    channel.spin_us = 0
    _link(channel).arm(time.monotonic() + 0.02)
    gate.clear()
    threading.Timer(0.1, gate.set).start()
    assert channel.call("gate", x, timeout_s=3600)[0].shape == (4,)
    gate.clear()
    threading.Timer(0.1, gate.set).start()
    assert channel.call("gate", x, timeout_s=1e6)[0].shape == (4,)


def _link(channel: fastsplit.Channel) -> Any:
    """The socket's transport."""
    transport: Any = channel._connection.transport
    return getattr(transport, "link", transport)


# ---- hostile peers of a socket


def _answer_through_a_socket(uri: str, hostile: bytes, *, codes: bool) -> Any:
    with connected(uri) as peer:
        peer.send(hello(capabilities=CODES | cast_bit(1) if codes else 0))
        assert peer.receive().kind == HELLO  # type: ignore[union-attr]
        came = None
        for number in range(1, 5):
            peer.send(_request("echo", number, b"12345678"))
            came = peer.receive()
            assert came is not None and came.kind == REPLY
        peer.send(hostile)
        peer.close_writing()
        came = peer.receive()
        if came is None:
            return None
        return came.kind, came.request_id, came.message.placements, came.message.attrs.get("text"), came.payload


HOSTILE_FRAMES: dict[str, bytes] = {
    "payload_nbytes, less": _request("echo", 5, b"12345678", payload_nbytes=7),
    "payload_nbytes, more": _request("echo", 5, b"12345678", payload_nbytes=9),
    "payload_nbytes, none": _request("echo", 5, b"12345678", payload_nbytes=0),
    "payload_nbytes, far more": _request("echo", 5, b"12345678", payload_nbytes=2**63),
    "metadata_nbytes": _request("echo", 5, b"12345678", metadata_nbytes=2**31),
    "varying_nbytes": _request("echo", 5, b"12345678", varying_nbytes=8),
    "flags": _request("echo", 5, b"12345678", flags=8),
    "flags of a reply": _request("echo", 5, b"12345678", flags=1),
    "all flags": _request("echo", 5, b"12345678", flags=2**16 - 1),
    "an id that is gone": _request("echo", 4, b"12345678"),
    "no id": _request("echo", 0, b"12345678"),
    "the largest id": _request("echo", 2**64 - 1, b"12345678"),
    "no time": _request("echo", 5, b"12345678", time_ns=2**64 - 1),
    "in shared memory": _request("echo", 5, b"12345678", placements=[1, 0, 8]),
    "in shared memory, without a payload": frame(REQUEST, 5, "echo", [(FLOAT32, (2,))], placements=[1, 0, 8]),
    "returns": _request("echo", 5, b"12345678", returns=[1, 0]),
    "coded": _request("echo", 5, b"12345678", placements=[0x10 << 32, 0, 8]),
    "coded, half": frame(REQUEST, 5, "echo", [(FLOAT32, (2,))], payload=b"1234", placements=[0x10 << 32, 0, 4]),
    "coded, unknown": _request("echo", 5, b"12345678", placements=[0xFF << 32, 0, 8]),
    "magic": b"X" + _request("echo", 5, b"12345678")[1:],
    "version": _request("echo", 5, b"12345678", version=2),
    "a reply": frame(REPLY, 4, tensors=[(FLOAT32, (2,))], payload=b"12345678"),
    "a half": _request("echo", 5, b"12345678")[:-1],
    "a header alone": _request("echo", 5, b"12345678")[: HEADER.size],
    "two": _request("echo", 5, b"12345678") + _request("echo", 6, b"12345678", flags=8),
    "cancelled": _request("echo", 5, b"12345678") + frame(CANCEL, 5),
}


@through_a_socket
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("what", HOSTILE_FRAMES)
def test_hostile_requests_through_a_socket(
    server: fastsplit.Server, without_fast_path: Callable[[], None], what: str, codes: bool
) -> None:
    with_it = _answer_through_a_socket(server.uri, HOSTILE_FRAMES[what], codes=codes)
    without_fast_path()
    assert with_it == _answer_through_a_socket(server.uri, HOSTILE_FRAMES[what], codes=codes)


HOSTILE_REPLY_FRAMES: list[dict[str, Any]] = [
    *({"payload_nbytes": nbytes} for nbytes in (0, 7, 9, 2**62)),
    *({"request_id": number} for number in (99, 2**63)),
    *({"flags": flags} for flags in (1, 8, 2**15)),
    {"placements": [1, 0, 8]},
    {"placements": [0x10 << 32, 0, 8]},
    {"placements": [1, 0, 8], "payload": b""},
    {"returns": [1, 0]},
    {"tensors": [(FLOAT32, (2, 1))]},
    {"tensors": [(FLOAT32, (1,))]},
    {"tensors": [(FLOAT32, (2,))] * 2, "payload": b"1" * 16},
    {"time_ns": 2**64 - 1},
    {"kind": REQUEST},
    {"kind": ERROR},
    {"varying_nbytes": 2**31},
    {"metadata_nbytes": 2**31},
]


@through_a_socket
@pytest.mark.parametrize("reply", HOSTILE_REPLY_FRAMES, ids=str)
def test_hostile_replies_through_a_socket(socket_uri: str, reply: dict[str, Any]) -> None:
    """The fifth reply is not as it should be."""

    def script(peer: RawPeer) -> None:
        peer.greet()
        for number in range(5):
            came = peer.expect(REQUEST)
            plain = {"request_id": came.request_id, "tensors": [(FLOAT32, (2,))], "payload": b"12345678"}
            changed = {"kind": REPLY, **plain, **(reply if number == 4 else {})}
            peer.send(frame(changed.pop("kind"), **changed))
        with contextlib.suppress(AssertionError):
            peer.receive()

    outcomes = []
    with serving(socket_uri, script, clients=2) as uri:
        for is_fast in (True, False):
            with fastsplit.connect(uri, arrays="numpy", call_timeout_s=0.3) as channel:
                x = channel.empty(2)
                if not is_fast:
                    channel._connection.fast_path = None
                for _ in range(4):
                    assert _outcome(lambda: channel.call("op", x, expect=[("float32", (2,))]))[1] == "{}"  # noqa: B023
                outcomes.append((_outcome(lambda: channel.call("op", x, expect=[("float32", (2,))])), channel.closed))  # noqa: B023
    assert outcomes[0] == outcomes[1]


# ---- counts ----------------------------------------------------------------------------------------------------------


def test_stats_that_somebody_holds_go_on_growing(channel: fastsplit.Channel, gate: threading.Event) -> None:
    """As the report does: it reads them before and after each call."""
    stats, x = channel.stats, channel.empty(4)
    for work in (lambda: channel.call("gate", x), lambda: channel.submit("gate", x).result()):
        calls, wait_s, remote_s, serialization_s = stats.calls, stats.wait_s, stats.remote_s, stats.serialization_s
        gate.clear()
        threading.Timer(0.01, gate.set).start()
        result = work()
        assert stats.calls == calls + 1 and stats.serialization_s > serialization_s
        assert stats.wait_s > wait_s and stats.remote_s - remote_s == pytest.approx(result.remote_s)
