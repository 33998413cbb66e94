"""The fast path (native/fastpath.c): which calls it makes, that these equal Python's, and what it leaves to Python.

Most tests make the same calls twice, over a connection with its fast path and over one without. A test of what may
happen at one moment between two of its steps has code run at that moment: a finalizer that the collector runs, or a
part of the connection that is replaced.
"""

from __future__ import annotations

import collections
import concurrent.futures as cf
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from raw_peer import ABORT, ERROR, FLOAT32, REPLY, REQUEST, RawPeer, connected, frame, memfd, serving
from until import until

import fastsplit
from fastsplit.errors import ClosedError, DeadlineError, PeerLostError
from fastsplit.wire.blocking import replies

pytestmark = pytest.mark.skipif(not fastsplit.native, reason="the compiled core is not in use here")

Serve = Callable[..., fastsplit.Server]
Connect = Callable[..., fastsplit.Channel]
Pair = tuple[fastsplit.Channel, fastsplit.Channel]
NBYTES = 65536


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


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """The handler "gate" waits for it."""
    gate = threading.Event()
    gate.set()
    yield gate
    gate.set()


@pytest.fixture
def server(unix_uri: str, serve: Serve, gate: threading.Event) -> fastsplit.Server:
    def wait(call: fastsplit.Call) -> Any:
        assert gate.wait(20)
        return call.tensors

    handlers = {"echo": _echo, "gate": wait, "big": lambda call: np.ones(NBYTES), "fail": lambda call: 1 / 0}
    return serve(unix_uri, handlers, arrays="numpy")


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
def no_server_fast_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on connections of servers get no fast path."""
    return lambda: monkeypatch.setattr(replies, "add_fast_path", lambda *_, **__: None)


@pytest.fixture
def pair(serve: Serve, connect: Connect, unix_uri: str, no_server_fast_path: Callable[[], None]) -> Callable[..., Pair]:
    """`pair(handlers, arrays)`: two channels, of which the second has no fast path at either end."""

    def make(handlers: dict[str, Any], arrays: str = "numpy") -> Pair:
        server = serve(unix_uri, handlers, arrays=arrays)
        first = connect(server.uri, arrays=arrays, call_timeout_s=10)
        no_server_fast_path()
        second = connect(server.uri, arrays=arrays, call_timeout_s=10)
        second._connection.fast_path = None
        return first, second

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
    assert path.came["call: fast"] == 20
    assert path.came["submit: fast"] == 10
    assert there.came["reply: fast"] >= 29  # the first one's thread may have had the fast path before


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
    counts = [(stats.calls, stats.bytes_shared, stats.bytes_copied) for stats in (each.stats for each in channels)]
    assert counts[0] == counts[1]


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


@pytest.mark.parametrize("spin_us", [0, 50])
def test_a_peer_that_dies_while_the_fast_path_sleeps(unix_uri: str, connect: Connect, spin_us: int) -> None:
    go_on = threading.Event()

    def script(peer: RawPeer) -> None:
        peer.greet_shm(is_client=False)
        for _ in range(3):
            peer.send(frame(REPLY, request_id=peer.expect(REQUEST).request_id))
        peer.expect(REQUEST)
        assert go_on.wait(10)

    with serving(unix_uri, script) as uri, cf.ThreadPoolExecutor(1) as pool:
        channel = connect(uri, arrays="numpy", spin_us=spin_us)
        for _ in range(3):
            channel.call("op")
        call = pool.submit(channel.call, "op")
        until(lambda: channel._connection.fast_path.op == "op")
        go_on.set()
        assert isinstance(call.exception(5), PeerLostError)
        channel.close()


# ---- memory ----------------------------------------------------------------------------------------------------------


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


def _error_of(future: fastsplit.Future) -> BaseException | None:
    try:
        future.result()
    except Exception as error:
        return error
    return None


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
        error = _error_of(future)
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


def test_a_cancelled_call_ends_the_fast_path_only_for_itself(unix_uri: str, serve: Serve, connect: Connect) -> None:
    looks = threading.Event()

    def look(call: fastsplit.Call) -> Any:
        looks.set()
        until(lambda: call.cancelled)
        return call.tensors

    server = serve(unix_uri, {"look": look, "echo": _echo}, arrays="numpy")
    channel = connect(server.uri, arrays="numpy", call_timeout_s=10)
    x = channel.empty(4)
    served = _served(server)
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
    unix_uri: str, serve: Serve, no_server_fast_path: Callable[[], None], request_: dict[str, Any]
) -> None:
    server = serve(unix_uri, {"echo": _echo}, arrays="numpy")
    with_it = _answer(server.uri, request_)
    no_server_fast_path()
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


def test_stats_that_somebody_holds_go_on_growing(channel: fastsplit.Channel) -> None:
    """As the report does: it reads them before and after each call."""
    stats, x = channel.stats, channel.empty(4)
    for work in (lambda: channel.call("gate", x), lambda: channel.submit("gate", x).result()):
        calls, wait_s, remote_s, serialization_s = stats.calls, stats.wait_s, stats.remote_s, stats.serialization_s
        result = work()
        assert stats.calls == calls + 1 and stats.serialization_s > serialization_s
        assert stats.wait_s > wait_s and stats.remote_s - remote_s == pytest.approx(result.remote_s)
