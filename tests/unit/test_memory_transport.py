"""A scheme of the tests' own: all that the wire asks of a transport stands in wire/transport/base.py and scheme.py."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from aio_front import Front
from conftest import SHM_PREFIX
from memory_transport import LISTENERS, MemoryAddress, MemoryTransport

import fastsplit
from fastsplit.errors import AddressError, ConnectError, DeadlineError, ListenError, PeerLostError, RemoteOpError
from fastsplit.wire.transport.address import SCHEMES, parse_address
from fastsplit.wire.transport.base import Transport

URI = "memory://x"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setitem(SCHEMES, "memory", MemoryAddress)
        yield
    assert "memory" not in SCHEMES and not LISTENERS


def _fail(call: fastsplit.Call) -> None:
    raise ValueError("as asked")


HANDLERS: dict[str, Callable[..., Any]] = {
    "echo": lambda call: call.tensors,
    "fail": _fail,
    "sleep": lambda call: time.sleep(call.attrs["seconds"]),
}


def _sockets() -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:
            continue
    return found


def test_it_is_one_line_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(parse_address(URI)) == URI
    with pytest.raises(AddressError, match="scheme 'ipc', expected unix, tcp, vsock or memory"):
        parse_address("ipc://x")
    with monkeypatch.context() as patch:
        patch.delitem(SCHEMES, "memory")
        with pytest.raises(AddressError, match="scheme 'memory', expected unix, tcp or vsock"):
            parse_address(URI)


@pytest.mark.parametrize("nbytes", [0, 1, 64, 5000, 3_000_000])
def test_calls_without_a_socket(nbytes: int) -> None:
    before = _sockets()
    with fastsplit.Server(URI, HANDLERS, arrays="numpy"), fastsplit.connect(URI, arrays="numpy") as channel:
        x = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
        for _ in range(3):
            (y,) = channel.call("echo", x)
            assert (y == x).all()
        assert _sockets() == before
        assert isinstance(channel._connection.transport, MemoryTransport)
        assert channel.near and channel.link == (None, None, None)
        assert channel.shm_reason == "off: over memory it must be asked for, with ?shm=/dev/shm/NAME"
        assert channel.stats.bytes_sent > 3 * nbytes < channel.stats.bytes_received


def test_calls_of_both_fronts(front: Front) -> None:
    with front.Server(URI, HANDLERS, arrays="numpy") as server:
        assert server.uri == URI
        with front.connect(URI, arrays="numpy") as channel:
            for nbytes in (0, 64, 5000, 3_000_000):
                x = np.full(nbytes, 7, np.uint8)
                assert (channel.call("echo", x)[0] == x).all()
            with pytest.raises(RemoteOpError, match="as asked"):
                channel.call("fail")
            with pytest.raises(DeadlineError):
                channel.call("sleep", seconds=0.1, timeout_s=0.01)
            assert channel.call("echo") == (), "the connection goes on"


@pytest.mark.parametrize("server_front", ["blocking", "aio"])
def test_many_in_flight(server_front: str) -> None:
    front = Front(server_front)
    try:
        with front.Server(URI, HANDLERS, arrays="numpy", workers=4) as server:
            assert server.uri == URI

            async def calls() -> list[Any]:
                async with fastsplit.aio.connect(URI, arrays="numpy") as channel:
                    return await asyncio.gather(
                        *(channel.call("echo", np.full(1000 * n, n, np.uint8)) for n in range(50))
                    )

            for n, (y,) in enumerate(asyncio.run(calls())):
                assert y.shape == (1000 * n,) and (y == n).all()
            with fastsplit.connect(URI, arrays="numpy") as channel:
                futures = [channel.submit("echo", np.full(1000 * n, n, np.uint8)) for n in range(50)]
                for n, future in enumerate(futures):
                    (y,) = future.result()
                    assert y.shape == (1000 * n,) and (y == n).all()
    finally:
        front.close()


def test_named_segments_beside_a_transport_that_carries_no_ring() -> None:
    query = f"?shm={SHM_PREFIX}"
    with fastsplit.Server(URI, HANDLERS, arrays="numpy"), fastsplit.connect(URI + query, arrays="numpy") as channel:
        assert channel.shm and "control over the socket" in channel.shm_reason
        x = channel.empty(100_000, "uint8")
        x[:] = 3
        (y,) = channel.call("echo", x)
        assert (y == 3).all() and y.ctypes.data == x.ctypes.data
        assert not channel._connection.transport.whole_frames
        del x, y


def test_no_listener_and_one_too_many() -> None:
    with pytest.raises(ConnectError, match="memory://x: cannot connect: no listener"):
        fastsplit.connect(URI)
    with (
        fastsplit.Server(URI, HANDLERS),
        pytest.raises(ListenError, match="memory://x: cannot listen: Address already"),
    ):
        fastsplit.Server(URI, HANDLERS).start()


def test_a_server_that_is_full_says_so() -> None:
    with fastsplit.Server(URI, HANDLERS, max_connections=1), fastsplit.connect(URI) as channel:
        with pytest.raises(ConnectError, match="the server refused the connection"):
            fastsplit.connect(URI)
        assert channel.call("echo") == ()


def test_the_servers_end_is_the_callers_lost_peer(front: Front) -> None:
    running = threading.Event()

    def wait(call: fastsplit.Call) -> None:
        running.set()
        time.sleep(0.5)

    server = front.Server(URI, {"wait": wait, **HANDLERS}, workers=1)
    with server, front.connect(URI) as channel:
        errors: list[BaseException] = []

        def call() -> None:
            try:
                channel.call("wait")
            except fastsplit.FastsplitError as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        assert running.wait(10)
        server.close(0.01)
        thread.join(10)
        assert [type(error) for error in errors] == [PeerLostError]
        with pytest.raises(fastsplit.FastsplitError):
            channel.call("echo")


def test_the_clients_end_is_seen_by_the_server(front: Front) -> None:
    with front.Server(URI, HANDLERS) as server:
        channel = front.connect(URI)
        with channel:
            channel.call("echo")
            assert server.connections == 1
        deadline = time.monotonic() + 10
        while server.connections:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_a_transport_that_passes_no_descriptors_says_so() -> None:
    near = MemoryTransport(threading.RLock())
    assert near.take_descriptor() is None and not near.passes_descriptors
    with pytest.raises(NotImplementedError, match="MemoryTransport passes no descriptors"):
        near.send_with_descriptor(b"x", 0, None)
    near.close()


def test_the_interface_is_no_wider_than_it_says() -> None:
    """What a new transport has to bring: the rest has defaults."""
    assert Transport.__abstractmethods__ == {
        *("bytes_sent", "send", "wait"),
        *("bytes_received", "receive", "has_bytes"),
        *("fileno", "drain", "peer_name", "peer_left"),
        *("shutdown_writing", "shutdown_reading", "close"),
    }
