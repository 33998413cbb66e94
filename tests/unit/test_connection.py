"""Both ends of a connection and their shared memory: who waits for room, who gives back, and who sees what."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHM_PREFIX
from raw_peer import SEGMENT, connected, frame, hello
from until import until

import fastsplit
from fastsplit.errors import ArenaFull, ClosedError, DeadlineError, RemoteOpError, RemoteProtocolError
from fastsplit.wire.blocking import served
from fastsplit.wire.shm import negotiation as sharing
from fastsplit.wire.shm.arena import Arena
from fastsplit.wire.shm.ring import RING_NBYTES, Ring
from fastsplit.wire.shm.segment import Memfd, Named
from fastsplit.wire.transport.stream import Stream

Serve = Callable[..., fastsplit.Server]
Connect = Callable[..., fastsplit.Channel]
MIB = 1024**2
SMALL = fastsplit.Limits(max_shared_nbytes=2 * MIB)


class Handlers:
    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.ran: list[Any] = []

    def table(self) -> dict[str, Any]:
        return {
            "echo": lambda call: call.tensors,
            "fresh": self.fresh,
            "keep": lambda call: self.kept.extend(call.tensors),
            "drop": lambda call: self.kept.clear(),
            "note": lambda call: self.ran.append(call.attrs["n"]),
        }

    def fresh(self, call: fastsplit.Call) -> Any:
        self.ran.append("begins")
        out = call.empty(call.attrs["nbytes"], "uint8")
        out[:] = 7
        self.ran.append("ends")
        return out


@pytest.fixture
def handlers() -> Iterator[Handlers]:
    handlers = Handlers()
    yield handlers
    handlers.kept.clear()


@pytest.fixture(params=["ring", "socket"])
def control(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How control goes where memory is shared."""
    if request.param == "socket":
        monkeypatch.setattr(sharing, "semaphores", lambda: "")
    return str(request.param)


def _arena(end: Any) -> Arena:
    arena = (end._connection if isinstance(end, fastsplit.Channel) else end.connection).arena
    assert isinstance(arena, Arena)
    return arena


def _serving(server: fastsplit.Server) -> Any:
    (client,) = server._service.clients
    return client


def _inodes(arena: Arena) -> set[str]:
    """The segments that an arena has mapped."""
    addresses = arena._map[0]
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        if any(start <= address < end for address in addresses):
            found.add(line.split()[4])
    return found


# ---- memory of one connection is not another's -----------------------------------------------------------------------


def test_two_connections_never_see_each_others_memory(
    unix_uri: str, serve: Serve, connect: Connect, handlers: Handlers
) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy")
    first, second = connect(server.uri, arrays="numpy"), connect(server.uri, arrays="numpy")
    x = first.empty(1000, "uint8")
    x[:] = 5
    (y,) = second.call("echo", x)  # not in its own memory: copied
    assert second.stats.bytes_copied == 1000 and y.ctypes.data != x.ctypes.data
    y[:] = 6
    assert (x == 5).all()
    (z,) = first.call("echo", x)
    assert first.stats.bytes_copied == 0 and z.ctypes.data == x.ctypes.data
    for channel in (first, second):
        channel.call("fresh", nbytes=100)
    arenas = {"first": _arena(first), "second": _arena(second)}
    for client in server._service.clients:
        ours = {name for name, arena in arenas.items() if _inodes(arena) & _inodes(_arena(client))}
        assert len(ours) == 1
        arenas[f"server of {ours.pop()}"] = _arena(client)
    inodes = {name: _inodes(arena) for name, arena in arenas.items()}
    assert inodes["first"] == inodes["server of first"] and inodes["second"] == inodes["server of second"]
    assert not inodes["first"] & inodes["second"] and len(inodes["first"]) == len(inodes["second"]) == 2


def test_a_handlers_memory_of_one_connection_is_copied_for_another(
    unix_uri: str, serve: Serve, connect: Connect
) -> None:
    made: list[Any] = []

    def once(call: fastsplit.Call) -> Any:
        if not made:
            made.append(call.empty(100, "uint8"))
            made[0][:] = 9
        return made[0]

    server = serve(unix_uri, {"once": once}, arrays="numpy")
    first, second = connect(server.uri, arrays="numpy"), connect(server.uri, arrays="numpy")
    (x,), (y,) = first.call("once"), second.call("once")
    assert server.stats.bytes_copied == 100
    x[:] = 1
    assert (made[0] == 1).all() and (y == 9).all()
    made.clear()


# ---- counts and hooks ------------------------------------------------------------------------------------------------


def test_a_servers_stats_are_those_of_all_connections(
    unix_uri: str, serve: Serve, connect: Connect, handlers: Handlers
) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy")
    assert server.stats.as_dict() == dict.fromkeys(server.stats.as_dict(), 0)
    shared, plain = connect(server.uri, arrays="numpy"), connect(f"{server.uri}?shm=off", arrays="numpy")
    shared.call("echo", np.zeros(100, np.uint8))
    shared.call("fresh", nbytes=50)
    plain.call("echo", np.zeros((10, 20), np.uint8))
    stats = server.stats
    assert (stats.calls, stats.bytes_copied, stats.bytes_shared) == (3, 0, 100 + 100 + 50)
    assert shared.stats.bytes_shared == 250 and shared.stats.bytes_copied == 100 and plain.stats.bytes_shared == 0
    assert stats.bytes_received > 200 < stats.bytes_sent
    before = stats.as_dict()
    for channel in (shared, plain):
        channel.close()
    until(lambda: server.connections == 0)
    after = server.stats.as_dict()  # what has ended still counts
    assert [after[name] for name in ("calls", "bytes_copied", "bytes_shared")] == [3, 0, 250]
    assert all(after[name] >= before[name] for name in before)
    connect(server.uri, arrays="numpy").call("echo", np.zeros(1))
    assert server.stats.calls == 4


def test_hooks_on_both_ends(unix_uri: str, connect: Connect, handlers: Handlers) -> None:
    calls: dict[str, list[tuple[str, int, int]]] = {"server": [], "client": []}

    def hook(who: str) -> Callable[[int, int], Callable[[], None]]:
        def mapped(address: int, nbytes: int) -> Callable[[], None]:
            calls[who].append(("map", address, nbytes))
            return lambda: calls[who].append(("unmap", address, nbytes))

        return mapped

    with fastsplit.Server(unix_uri, handlers.table(), arrays="numpy", on_segment=hook("server")) as server:
        channel = connect(server.uri, arrays="numpy", on_segment=hook("client"))
        assert calls == {"server": [], "client": []}  # the ring is none of theirs
        x = channel.empty(100, "uint8")
        assert calls["client"] == [("map", x.ctypes.data, MIB)]
        (y,) = channel.call("echo", x)
        assert [call[0] for call in calls["server"]] == ["map"]
        (z,) = channel.call("fresh", nbytes=3 * MIB)
        assert [call[2] for call in calls["client"]] == [MIB, 3 * MIB] == [call[2] for call in calls["server"]]
        channel.close()
        until(lambda: server.connections == 0)
        gc.collect()
        assert sorted(call[2] for call in calls["server"] if call[0] == "unmap") == [MIB, 3 * MIB]
        assert not [call for call in calls["client"] if call[0] == "unmap"]  # x, y and z lie there
        del x, y
        gc.collect()
        assert [call[2] for call in calls["client"] if call[0] == "unmap"] == [MIB]
        assert (z == 7).all()
        del z
        gc.collect()
        assert [call[2] for call in calls["client"] if call[0] == "unmap"] == [MIB, 3 * MIB]


# ---- trimming --------------------------------------------------------------------------------------------------------


def test_trim(unix_uri: str, control: str, serve: Serve, connect: Connect, handlers: Handlers) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy")
    channel = connect(server.uri, arrays="numpy")
    x = channel.empty(8 * MIB, "uint8")
    channel.call("echo", x)
    assert channel.trim() == 0  # x is held
    del x
    channel.call("note", n=1)  # brings what the server had of it
    assert channel.trim() == 8 * MIB and channel.trim() == 0
    serving = _arena(_serving(server))
    assert len(serving._peers) == 1  # it has not heard of it yet
    channel.call("note", n=2)
    assert serving._peers == {}
    (y,) = channel.call("echo", np.ones(10))  # and it begins anew
    assert y.sum() == 10 and list(serving._peers) == [3]
    assert connect(f"{server.uri}?shm=off").trim() == 0


def test_an_idle_server_gives_memory_back(
    unix_uri: str, control: str, serve: Serve, connect: Connect, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "IDLE_S", 0.1)
    monkeypatch.setattr(Arena.trim, "__defaults__", (0.05,))
    server = serve(unix_uri, handlers.table(), arrays="numpy")
    channel = connect(server.uri, arrays="numpy", call_timeout_s=10)
    (x,) = channel.call("fresh", nbytes=5 * MIB)
    serving = _arena(_serving(server))
    time.sleep(0.3)
    assert serving.nbytes == 5 * MIB  # held by the client
    del x
    channel.call("note", n=1)
    until(lambda: serving.nbytes == 0)
    assert len(_arena(channel)._peers) == 1  # its retirement is on the way
    channel.call("note", n=2)
    assert _arena(channel)._peers == {}
    (y,) = channel.call("fresh", nbytes=100)
    assert (y == 7).all()


# ---- no room ---------------------------------------------------------------------------------------------------------


def test_a_handler_waits_for_what_the_client_still_holds(
    unix_uri: str, control: str, serve: Serve, connect: Connect, handlers: Handlers
) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy")
    channel = connect(server.uri, arrays="numpy", limits=SMALL, call_timeout_s=20)
    held = [channel.call("fresh", nbytes=MIB)[0] for _ in range(2)]
    handlers.ran.clear()
    future = channel.submit("fresh", nbytes=MIB)
    with pytest.raises(DeadlineError):
        future.result(timeout=0.2)
    assert handlers.ran == ["begins"] and not future.done()
    address = held[0].ctypes.data
    del held[0]
    (x,) = future.result(timeout=10)
    assert x.ctypes.data == address and (x == 7).all() and (held[0] == 7).all()
    assert handlers.ran == ["begins", "ends"] and _arena(_serving(server)).nbytes == 2 * MIB


def test_requests_that_come_in_while_a_handler_waits_are_served_afterwards_in_order(
    unix_uri: str, control: str, serve: Serve, connect: Connect, handlers: Handlers
) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy")
    channel = connect(server.uri, arrays="numpy", limits=SMALL, call_timeout_s=20)
    held = [channel.call("fresh", nbytes=MIB)[0] for _ in range(2)]
    handlers.ran.clear()
    waits = channel.submit("fresh", nbytes=MIB)
    until(lambda: handlers.ran == ["begins"])
    notes = [channel.submit("note", n=n) for n in range(100)]
    cancelled = channel.submit("note", n="never")
    until(lambda: len(_serving(server)._ahead.waiting) == 101)
    cancelled.cancel()
    until(lambda: len(_serving(server).core.cancelled) == 1)
    notes.append(channel.submit("note", n=100))
    assert handlers.ran == ["begins"]
    held.clear()
    assert [note.result(10) for note in notes] == [()] * 101 and waits.done()
    assert handlers.ran == ["begins", "ends", *range(101)]
    assert channel.call("echo") == ()


def test_a_handler_that_waits_in_vain_fails_alone(
    unix_uri: str, control: str, serve: Serve, connect: Connect, handlers: Handlers
) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy", send_timeout_s=0.3)
    channel = connect(server.uri, arrays="numpy", limits=SMALL, call_timeout_s=None)
    held = [channel.call("fresh", nbytes=MIB)[0] for _ in range(2)]
    with pytest.raises(
        RemoteOpError, match=f"fresh: ArenaFull: {MIB} bytes of shared memory: {2 * MIB} bytes in 2 segm"
    ):
        channel.call("fresh", nbytes=MIB)
    with pytest.raises(RemoteOpError, match=f"fresh: ArenaFull: {3 * MIB} bytes of shared memory"):
        channel.call("fresh", nbytes=3 * MIB)
    assert channel.call("echo") == ()
    held.clear()
    assert (channel.call("fresh", nbytes=MIB)[0] == 7).all()


def test_a_client_that_leaves_while_a_handler_waits_for_it(
    unix_uri: str, control: str, serve: Serve, handlers: Handlers
) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy")
    with fastsplit.connect(server.uri, arrays="numpy", limits=SMALL) as channel:
        held = [channel.call("fresh", nbytes=MIB)[0] for _ in range(2)]
        handlers.ran.clear()
        channel.submit("fresh", nbytes=MIB)
        until(lambda: handlers.ran == ["begins"])
    until(lambda: server.connections == 0)
    assert handlers.ran == ["begins"] and all((x == 7).all() for x in held)


def test_workers_wait_for_room_too(unix_uri: str, control: str, serve: Serve, connect: Connect) -> None:
    """Here another thread reads, and takes the returns in."""
    handlers = Handlers()
    server = serve(unix_uri, handlers.table(), arrays="numpy", workers=3)
    channel = connect(server.uri, arrays="numpy", limits=SMALL, call_timeout_s=20)
    futures = [channel.submit("fresh", nbytes=MIB) for _ in range(20)]
    while futures:
        done = [future for future in futures if future.done()]
        if not done:
            with contextlib.suppress(DeadlineError):
                futures[0].result(0.01)  # others may be done first
            continue
        assert (done[0].result()[0] == 7).all()
        futures.remove(done[0])
        del done  # all that held it
    assert handlers.ran.count("ends") == 20


def test_a_client_waits_for_what_the_server_still_holds(
    unix_uri: str, control: str, serve: Serve, connect: Connect, handlers: Handlers
) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy", limits=SMALL)
    channel = connect(server.uri, arrays="numpy", call_timeout_s=20)
    for _ in range(2):
        channel.call("keep", channel.empty(MIB, "uint8"))
    started = time.monotonic()
    with pytest.raises(ArenaFull, match=f"{MIB} bytes of shared memory: {2 * MIB} bytes in 2 segments"):
        channel.empty(MIB, "uint8", timeout_s=0.1)
    with pytest.raises(ArenaFull):
        channel.call("echo", np.zeros(MIB, np.uint8), timeout_s=0.1)  # it would have to be copied
    assert 0.2 <= time.monotonic() - started < 3
    assert channel.call("echo", np.zeros(0)) and channel.stats.calls == 3  # the connection lives
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(channel.empty(MIB, "uint8", timeout_s=10)))
    waiting.start()
    time.sleep(0.05)
    assert not got
    channel.call("drop")
    waiting.join(10)
    assert len(got) == 1 and got[0].nbytes == MIB


def test_a_client_asks_an_idle_server_for_its_returns(
    unix_uri: str, control: str, serve: Serve, connect: Connect, handlers: Handlers
) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy", limits=SMALL)
    channel = connect(server.uri, arrays="numpy", call_timeout_s=20)
    for _ in range(10):  # the server's returns would go out with its next reply, which never comes by itself
        x = channel.empty(2 * MIB, "uint8")
        channel.call("keep", x)
        del x
        handlers.kept.clear()
        channel.empty(2 * MIB, "uint8", timeout_s=5)
    assert _arena(channel).nbytes == 2 * MIB


def test_many_returns_at_once(unix_uri: str, control: str, serve: Serve, connect: Connect, handlers: Handlers) -> None:
    """More than fit on one frame, and more than fit into a ring."""
    server = serve(unix_uri, handlers.table(), arrays="numpy")
    channel = connect(server.uri, arrays="numpy", call_timeout_s=20)
    held = []
    for _ in range(100):
        held += channel.call("echo", *[channel.empty(10) for _ in range(50)])
        held += [channel.call("fresh", nbytes=10)[0] for _ in range(2)]
    serving = _arena(_serving(server))
    assert _arena(channel).in_use_nbytes >= 5000 * 64 and serving.in_use_nbytes == 200 * 64
    held.clear()
    channel.call("note", n=1)
    assert _arena(channel).in_use_nbytes == 0
    channel.call("note", n=2)
    assert serving.in_use_nbytes == 0 and len(_arena(channel).returns) == len(serving.returns) == 0


def test_many_segments_at_once(unix_uri: str, control: str, serve: Serve, connect: Connect, handlers: Handlers) -> None:
    """More descriptors than a side takes ahead of their announcements."""
    server = serve(unix_uri, handlers.table(), arrays="numpy")
    channel = connect(server.uri, arrays="numpy", call_timeout_s=20)
    tensors = [channel.empty(MIB // 2 * 2 ** max(n - 1, 0) + n, "uint8") for n in range(6)]
    tensors += [channel.empty(100 * MIB + n, "uint8") for n in range(1)]
    for n, tensor in enumerate(tensors):
        tensor[-1] = n
    segments = len(_arena(channel)._blocks.segments)
    assert segments > 4
    result = channel.call("echo", *tensors)
    assert [int(tensor[-1]) for tensor in result] == list(range(7)) and channel.stats.bytes_copied == 0
    assert len(_arena(_serving(server))._peers) == segments


# ---- a ring that cannot be had ---------------------------------------------------------------------------------------


def test_a_ring_that_the_client_cannot_make(
    unix_uri: str, serve: Serve, connect: Connect, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy")
    create = Memfd.create

    def fail(self: Memfd, nbytes: int) -> Any:
        if nbytes == RING_NBYTES:
            raise ArenaFull("none left")
        return create(self, nbytes)

    monkeypatch.setattr(Memfd, "create", fail)
    channel = connect(server.uri, arrays="numpy")
    assert channel.shm and channel.shm_reason == "memfd segments, control over the socket: none left"
    assert type(channel._connection.transport) is Stream
    assert channel.call("echo", np.ones(5))[0].sum() == 5 and channel.stats.bytes_shared == 80


def test_a_ring_that_the_server_cannot_map(
    unix_uri: str, serve: Serve, connect: Connect, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy")
    attach = Memfd.attach

    def fail(self: Memfd, fd: int | None, name: str, nbytes: int) -> mmap.mmap:
        if nbytes == RING_NBYTES:
            assert fd is not None
            os.close(fd)
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return attach(self, fd, name, nbytes)

    monkeypatch.setattr(Memfd, "attach", fail)
    channel = connect(server.uri, arrays="numpy")
    reason = "memfd segments, control over the socket: the server cannot map the ring: Cannot allocate memory"
    assert channel.shm and channel.shm_reason == reason == _serving(server).connection.shm_reason
    assert type(channel._connection.transport) is type(_serving(server).connection.transport) is Stream
    assert channel.call("echo", np.ones(5))[0].sum() == 5 and channel.stats.bytes_shared == 80


def test_a_segment_that_cannot_be_made_costs_only_its_call(
    unix_uri: str, serve: Serve, connect: Connect, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy")
    channel = connect(server.uri, arrays="numpy")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(ArenaFull, match=f"no shared memory for a segment of {MIB} bytes: No space left"):
            channel.call("echo", np.ones(5))
        with pytest.raises(RemoteOpError, match="fresh: ArenaFull: no shared memory for a segment"):
            channel.call("fresh", nbytes=5)
    assert channel.call("echo", np.ones(5))[0].sum() == 5 and (channel.call("fresh", nbytes=5)[0] == 7).all()


@pytest.mark.parametrize(
    ("offer", "text"),
    [
        ({}, "a SEGMENT frame, expected none: no shared memory was agreed on"),
        ({"shm": "memfd", "semaphores": "abacus"}, "SEGMENT, id: 0, expected no ring, or no other one"),
    ],
)
def test_a_ring_that_was_not_agreed_on(unix_uri: str, serve: Serve, offer: dict[str, Any], text: str) -> None:
    server = serve(unix_uri, {})
    with connected(server.uri) as peer:
        peer.send(hello(capabilities=1, **offer), frame(SEGMENT, attrs={"id": 0, "nbytes": RING_NBYTES, "name": ""}))
        assert peer.expect_abort() == text


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_what_a_caller_holds_outlives_the_connection(
    unix_uri: str, control: str, connect: Connect, handlers: Handlers
) -> None:
    with fastsplit.Server(unix_uri, handlers.table(), arrays="numpy") as server:
        channel = connect(server.uri, arrays="numpy")
        x = channel.empty(1000, "uint8")
        x[:] = 3
        channel.call("keep", x)
        (y,) = channel.call("fresh", nbytes=1000)
        channel.close()
        z = channel.empty(10)  # memory, if not the same
        z[:] = 1
        with pytest.raises(ClosedError, match="the channel is closed: the channel was closed"):
            channel.call("echo", x)
        until(lambda: server.connections == 0)
    assert (x == 3).all() and (y == 7).all() and (handlers.kept[0] == 3).all()
    x[0] = 4
    assert handlers.kept[0][0] == 4  # still the same bytes on both sides, which nobody else gets
    y[:] = 1


def test_names_are_gone_as_soon_as_both_have_them(serve: Serve, connect: Connect, handlers: Handlers) -> None:
    def names() -> list[str]:
        return [name for name in os.listdir("/dev/shm") if name.startswith(SHM_PREFIX.rpartition("/")[2])]

    server = serve("tcp://127.0.0.1:0", handlers.table(), arrays="numpy")
    channel = connect(f"{server.uri}?shm={SHM_PREFIX}", arrays="numpy")
    assert names() == [] and isinstance(channel._connection.transport, Ring)
    x = channel.empty(10)
    assert len(names()) == 1  # made, and not announced
    channel.call("echo", x)
    channel.call("fresh", nbytes=10)
    assert names() == []
    channel.empty(8 * MIB)
    assert len(names()) == 1
    channel.close()
    assert names() == []


def test_only_who_asked_for_a_prefix_sweeps_it(
    serve: Serve, connect: Connect, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[bool] = []
    monkeypatch.setattr(Named, "sweep", lambda named: swept.append(True))
    server = serve("tcp://127.0.0.1:0", handlers.table(), arrays="numpy")
    connect(f"{server.uri}?shm={SHM_PREFIX}", arrays="numpy").call("echo")
    assert swept == [True]  # the client, and not the server on its word


def test_calls_that_fail_before_they_are_sent_hold_nothing(
    unix_uri: str, control: str, serve: Serve, connect: Connect, handlers: Handlers
) -> None:
    server = serve(unix_uri, handlers.table(), arrays="numpy", limits=fastsplit.Limits(max_tensors=2))
    channel = connect(server.uri, arrays="numpy")
    for _ in range(3):
        with pytest.raises(fastsplit.LimitError):
            channel.call("echo", np.ones(5), channel.empty(7), np.ones(5))
        with pytest.raises(fastsplit.SettingError):
            channel.call("echo", np.ones(5), a=None)
        with pytest.raises(fastsplit.TensorError):
            channel.call("echo", np.ones(5), "text")
        with pytest.raises(RemoteOpError):
            channel.call("absent", np.ones(5))
    channel.call("note", n=1)
    assert _arena(channel).in_use_nbytes == 0 and _arena(_serving(server)).in_use_nbytes == 0


def test_replies_that_cannot_be_sent_hold_nothing(unix_uri: str, control: str, serve: Serve, connect: Connect) -> None:
    def too_many(call: fastsplit.Call) -> Any:
        return [call.empty(10) for _ in range(3)]

    server = serve(unix_uri, {"many": too_many, "echo": lambda call: call.tensors}, arrays="numpy")
    channel = connect(server.uri, arrays="numpy", limits=fastsplit.Limits(max_tensors=2))
    for _ in range(3):
        with pytest.raises(RemoteOpError, match="LimitError: tensors: 3, the peer accepts at most 2"):
            channel.call("many")
    channel.call("echo")
    assert _arena(_serving(server)).in_use_nbytes == 0


def test_late_answers_go_back(unix_uri: str, control: str, serve: Serve, connect: Connect) -> None:
    gate = threading.Event()

    def slow(call: fastsplit.Call) -> Any:
        gate.wait(10)
        return call.empty(1000)

    server = serve(unix_uri, {"slow": slow, "echo": lambda call: call.tensors}, arrays="numpy")
    channel = connect(server.uri, arrays="numpy")
    with pytest.raises(DeadlineError):
        channel.call("slow", channel.empty(10), timeout_s=0.05)
    gate.set()
    channel.call("echo")
    channel.call("echo")
    assert _arena(channel).in_use_nbytes == 0 and _arena(_serving(server)).in_use_nbytes == 0


def test_a_bad_ring_is_the_clients_fault(unix_uri: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(unix_uri, {})
    monkeypatch.setattr(Ring, "format", staticmethod(lambda memory: None))
    with pytest.raises(RemoteProtocolError, match=r"the peer ended the connection: ring: .*, expected"):
        fastsplit.connect(server.uri)
