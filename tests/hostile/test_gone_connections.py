"""What a connection held is gone when it ends: at once, without the cyclic collector, whoever keeps an error of it.

Memory is counted as blocks that a pool of the test's own has handed out, and that did not come back; connections as
objects that are still there. The collector is off, so that a reference in a circle is a failure here.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from aio_front import Front
from raw_peer import CANCEL, FLOAT32, REPLY, REQUEST, RawPeer, connected, frame, hello, serving

import fastsplit
from fastsplit.errors import FastsplitError
from fastsplit.tensors import pool as memory
from fastsplit.tensors.pool import MAX_LEFT_NBYTES, Pool
from fastsplit.wire.aio import channel as aio_channel
from fastsplit.wire.aio import requests
from fastsplit.wire.aio import served as aio_served
from fastsplit.wire.aio.calls import Calls
from fastsplit.wire.blocking import channel, readahead, replies, served
from fastsplit.wire.blocking.reader import Reader
from fastsplit.wire.blocking.sender import Sender
from fastsplit.wire.client import ClientCore
from fastsplit.wire.connection import Connection
from fastsplit.wire.service import ServiceCore

pytestmark = pytest.mark.matrix(one_in=3)

MIB = 1024**2
CODES, ZLIB, ZLIB_CODING = 2, 65536, 1
Held = Callable[[], int]


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def pool() -> Pool:
    return Pool(max_idle_nbytes=0)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    """Bytes of all blocks that are somewhere."""
    blocks: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
    map_block = memory._map

    def spy(size: int) -> mmap.mmap:
        block = map_block(size)
        blocks.add(block)
        return block

    monkeypatch.setattr(memory, "_map", spy)
    return lambda: sum(map(len, list(blocks)))


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Names of what is still there of connections: of both fronts, of both sides."""
    made: list[weakref.ref[Any]] = []
    clients = (channel.Channel, aio_channel.Channel, Reader, Sender, Calls, ClientCore)
    servers = (ServiceCore, served.ServedClient, readahead.ReadAhead, replies.Replies)
    aio_servers = (aio_served.ServedClient, requests.Requests)
    for kind in (Connection, *servers, *aio_servers, *clients):

        def spy(self: Any, *args: Any, init: Any = kind.__init__, **options: Any) -> None:
            made.append(weakref.ref(self))
            init(self, *args, **options)

        monkeypatch.setattr(kind, "__init__", spy)
    return lambda: [type(it).__name__ for it in (reference() for reference in made) if it is not None]


def _until(there: Callable[[], Any], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.002)


def _compressed(nbytes: int) -> bytes:
    """A request with `nbytes` of float32 zeros and noise, by zlib."""
    packed = zlib.compress(np.random.default_rng(1).integers(0, 4, nbytes, np.uint8).tobytes(), 1)
    placements = (ZLIB_CODING << 32, 0, len(packed))
    return frame(REQUEST, 1, "keep", [(FLOAT32, (nbytes // 4,))], {}, packed, placements)


def _handlers() -> dict[str, Any]:
    gate = threading.Event()

    def wait(call: Any) -> None:
        gate.wait(20)

    return {"echo": lambda call: call.tensors, "wait": wait, "open": lambda call: gate.set()}


# ---- servers ---------------------------------------------------------------------------------------------------------


def _plain(nbytes: int) -> bytes:
    return frame(REQUEST, 1, "echo", [(FLOAT32, (nbytes // 4,))], {}, bytes(nbytes))


@pytest.mark.parametrize("make", [_plain, _compressed])
def test_a_half_received_request_is_gone_with_its_client(
    socket_uri: str, front: Front, pool: Pool, held: Held, alive: Callable[[], list[str]], make: Any
) -> None:
    if "shm" not in socket_uri and socket_uri.startswith("unix"):
        socket_uri += "?shm=off"
    data = make(8 * MIB)
    with front.Server(socket_uri, _handlers(), pool=pool) as served:
        for _ in range(5):
            with connected(served.uri) as peer:
                peer.send(hello(capabilities=CODES | ZLIB))
                assert peer.receive() is not None
                peer.send(data[: len(data) * 3 // 4])
                _until(held)
            _until(lambda: not served.connections and not held())
        _until(lambda: not alive())


@pytest.mark.parametrize("workers", [0, 1])
def test_requests_that_wait_are_gone_with_their_client(
    unix_uri: str, front: Front, pool: Pool, held: Held, alive: Callable[[], list[str]], workers: int
) -> None:
    """Those that were read ahead, and those that wait for a worker; the handler that runs keeps what it has."""
    gate = threading.Event()
    running = threading.Event()

    def wait(call: Any) -> None:
        running.set()
        gate.wait(20)

    with front.Server(f"{unix_uri}?shm=off", {"wait": wait}, pool=pool, workers=workers) as served:
        with connected(served.uri) as peer:
            peer.greet()
            request = [
                frame(REQUEST, number, "wait", [(FLOAT32, (MIB // 4,))], {}, bytes(MIB)) for number in range(1, 7)
            ]
            peer.send(request[0])
            assert running.wait(5)
            if front.name == "blocking" or workers:  # else the handler blocks the only thread there is
                peer.sock.settimeout(0.3)
                with contextlib.suppress(TimeoutError):
                    peer.send(*request[1:])
                _until(lambda: held() >= (5 if workers else 1) * MIB)
        if workers:
            _until(lambda: not served.connections and held() <= MIB)  # while the handler is still at work
        gate.set()
        _until(lambda: not served.connections and not held())
        _until(lambda: not alive())


@pytest.mark.parametrize("workers", [0, 1])
def test_replies_that_were_not_read_are_gone_with_their_client(
    unix_uri: str, front: Front, pool: Pool, held: Held, alive: Callable[[], list[str]], workers: int
) -> None:
    """One is half sent, others wait: in a queue, or behind it."""
    with front.Server(f"{unix_uri}?shm=off", _handlers(), pool=pool, workers=workers) as served:
        with connected(served.uri) as peer:
            peer.greet()
            peer.sock.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                for number in range(1, 9):
                    peer.send(frame(REQUEST, number, "echo", [(FLOAT32, (MIB,))], {}, bytes(4 * MIB)))
            _until(held)
        _until(lambda: not served.connections and not held())
        _until(lambda: not alive())


def test_what_was_refused_and_what_failed_is_gone(
    socket_uri: str, front: Front, pool: Pool, held: Held, alive: Callable[[], list[str]]
) -> None:
    """Over a limit, of a broken frame, of an unknown operation, past its deadline, and a handler's error."""

    def fail(call: Any) -> None:
        kept = call.tensors  # noqa: F841 (the error's frames hold it)
        raise ValueError("no")

    limits = fastsplit.Limits(max_message_nbytes=4 * MIB)
    if socket_uri.startswith("unix"):
        socket_uri = f"{socket_uri.partition('?')[0]}?shm=off"
    with front.Server(socket_uri, {"fail": fail}, pool=pool, limits=limits) as served:
        with connected(served.uri) as peer:
            peer.greet()
            for op in ("fail", "other"):
                peer.send(frame(REQUEST, 1, op, [(FLOAT32, (MIB // 4,))], {}, bytes(MIB)))
                assert peer.receive() is not None
            _until(lambda: not held())
            peer.send(frame(REQUEST, 2, "fail", [(FLOAT32, (MIB // 4,))], {}, bytes(MIB))[: -MIB // 2])
            _until(held)
        with connected(served.uri) as peer:
            peer.greet()
            peer.send(frame(REQUEST, 1, "fail", [(FLOAT32, (2 * MIB,))], {}, bytes(8 * MIB)))
            peer.expect_abort()
        _until(lambda: not served.connections and not held())
        _until(lambda: not alive())


# ---- channels --------------------------------------------------------------------------------------------------------


def _plain_reply(request_id: int, nbytes: int) -> bytes:
    return frame(REPLY, request_id, "", [(FLOAT32, (nbytes // 4,))], {}, bytes(nbytes))


def _corrupt_reply(request_id: int, nbytes: int) -> bytes:
    packed = bytearray(zlib.compress(np.random.default_rng(1).integers(0, 4, nbytes, np.uint8).tobytes(), 1))
    packed[len(packed) // 2] ^= 255
    placements = (ZLIB_CODING << 32, 0, len(packed))
    return frame(REPLY, request_id, "", [(FLOAT32, (nbytes // 4,))], {}, bytes(packed), placements)


@pytest.mark.parametrize(("reply", "share"), [(_plain_reply, 0.7), (_corrupt_reply, 0.7), (_corrupt_reply, 1.0)])
def test_a_half_received_reply_is_gone_with_the_connection(
    unix_uri: str, front: Front, pool: Pool, held: Held, alive: Callable[[], list[str]], reply: Any, share: float
) -> None:
    """Although the caller keeps the channel, its error, and the error's frames."""

    def script(peer: RawPeer) -> None:
        peer.send(hello(capabilities=CODES | ZLIB))
        peer.receive()
        came = peer.receive()
        assert came is not None
        data = reply(came.request_id, 8 * MIB)
        peer.send(data[: int(len(data) * share)])
        _until(lambda: share == 1.0 or held())

    with serving(f"{unix_uri}", script) as uri:
        opened = front.connect(f"{uri}?shm=off", pool=pool, arrays="numpy")
        caught: list[BaseException] = []
        try:
            opened.call("get")
        except FastsplitError as error:
            caught.append(error)
        assert caught
        _until(lambda: not held())
        opened.close()
        caught.clear()
        del opened
    _until(lambda: not alive())


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_channel_that_nobody_closed_is_gone_with_its_last_reference(
    unix_uri: str, pool: Pool, held: Held, alive: Callable[[], list[str]]
) -> None:
    """With a reply that is half received, after a call that did not wait for it."""

    def script(peer: RawPeer) -> None:
        peer.greet()
        peer.receive()
        peer.send(_plain_reply(1, 8 * MIB)[: 6 * MIB])
        came = peer.receive()
        assert came is not None and came.kind == CANCEL
        assert peer.receive() is None

    with serving(unix_uri, script) as uri:
        opened = fastsplit.connect(f"{uri}?shm=off", pool=pool)
        with contextlib.suppress(FastsplitError):
            opened.call("get", timeout_s=0.2)
        assert held()
        del opened
        _until(lambda: not held() and not alive())  # the thread that reads its answer may be at work


def test_coroutines_end_with_their_client(
    unix_uri: str, pool: Pool, held: Held, alive: Callable[[], list[str]]
) -> None:
    async def wait(call: Any) -> None:
        await asyncio.sleep(20)

    front = Front("aio")
    with front.Server(f"{unix_uri}?shm=off", {"wait": wait}, pool=pool) as served:
        with connected(served.uri) as peer:
            peer.greet()
            for number in (1, 2, 3):
                peer.send(frame(REQUEST, number, "wait", [(FLOAT32, (MIB // 4,))], {}, bytes(MIB)))
            _until(lambda: held() == 3 * MIB)
        _until(lambda: not served.connections and not held())
        _until(lambda: not alive())
    front.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_future_whose_connection_ended_holds_nothing(
    unix_uri: str, pool: Pool, held: Held, alive: Callable[[], list[str]], overlap: bool
) -> None:
    """Not the request's tensors, of which half were sent; nor do the channel and the future hold the frames of whoever
    asked for the result."""

    class Local:
        pass

    def script(peer: RawPeer) -> None:
        peer.greet()
        peer._exactly(MIB)

    seen: list[weakref.ref[Local]] = []

    def ask(future: Any) -> None:
        local = Local()
        seen.append(weakref.ref(local))
        future.result()

    with serving(unix_uri, script) as uri:
        opened = fastsplit.connect(f"{uri}?shm=off", pool=pool, overlap=overlap)
        tensors = [pool.allocate(64 * MIB)]
        futures = []
        with contextlib.suppress(FastsplitError):
            futures.append(opened.submit("put", tensors.pop()))
            ask(futures[0])
        _until(lambda: not held())
        assert not [reference for reference in seen if reference() is not None]
        opened.close()
        futures.clear()
        del opened
    _until(lambda: not alive())


def test_many_calls_leave_nothing(
    socket_uri: str, front: Front, pool: Pool, held: Held, alive: Callable[[], list[str]]
) -> None:
    """Honest ones: after the last one has closed nothing is held, by neither side."""
    with front.Server(socket_uri, _handlers(), pool=pool) as served:
        for _ in range(3):
            with front.connect(served.uri, pool=pool, arrays="numpy") as opened:
                for _ in range(3):
                    opened.call("echo", np.zeros(MIB, np.float32))
            del opened
            _until(lambda: not served.connections and not held())
        _until(lambda: not alive())


# ---- what the pool keeps ---------------------------------------------------------------------------------------------


def test_what_stays_idle_of_a_connection_that_is_gone(
    unix_uri: str, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of what is kept for one that lives (here of 64 MiB), also of what its handler still had."""
    monkeypatch.setattr(memory, "MAX_LEFT_NBYTES", 16 * MIB)
    pool = Pool(max_idle_nbytes=64 * MIB)
    kept: list[Any] = []
    handlers = {"keep": lambda call: kept.append(call.tensors), "echo": lambda call: call.tensors}
    with front.Server(f"{unix_uri}?shm=off", handlers, pool=pool) as served:
        with front.connect(served.uri) as other:
            with front.connect(served.uri) as opened:
                for _ in range(3):
                    opened.call("echo", np.zeros(8 * MIB, np.uint8))
                for _ in range(6):
                    opened.call("keep", np.zeros(8 * MIB, np.uint8))
                kept.pop()
                kept.pop()
                kept.pop()
                _until(lambda: pool.idle_nbytes >= 24 * MIB)  # the connection lives
            _until(lambda: served.connections == 1 and pool.idle_nbytes <= 16 * MIB)
            kept.clear()
            assert pool.idle_nbytes == 16 * MIB
            other.call("echo", np.zeros(8 * MIB, np.uint8))
    assert MAX_LEFT_NBYTES == 256 * MIB
