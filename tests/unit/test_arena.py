"""Ownership: two arenas back to back, without sockets. Who holds what, when it is free again, and who may name it."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastsplit.errors import ArenaFull, RemoteProtocolError, ResourceError
from fastsplit.schema.descriptor import TensorDesc
from fastsplit.schema.dtypes import BY_NAME
from fastsplit.schema.limits import Limits
from fastsplit.wire.shm import arena as module
from fastsplit.wire.shm.arena import Arena
from fastsplit.wire.shm.segment import Memfd, why_no_memfd

pytestmark = pytest.mark.skipif(why_no_memfd() is not None, reason=str(why_no_memfd()))
torch = pytest.importorskip("torch")

KIB, MIB = 1024, 1024**2
ENDED = "no shared memory: the connection has ended"


def _desc(nbytes: int, dtype: str = "uint8") -> TensorDesc:
    return TensorDesc.of(BY_NAME[dtype], (nbytes // BY_NAME[dtype].itemsize,))


def _never(deadline: float | None) -> None:
    pytest.fail("nothing should have waited")


class End:
    """An arena, and what a session does for it: announcements, placements and returns go to `peer` at once."""

    peer: End

    def __init__(
        self,
        is_client: bool,
        limits: Limits | None = None,
        peer_limits: Limits | None = None,
        on_memory_pressure: Callable[[float | None], None] = _never,
        hook: Any = None,
    ) -> None:
        self.descriptors: deque[int] = deque()
        self.arena = Arena(
            is_client=is_client,
            factory=Memfd(),
            take_descriptor=lambda: self.descriptors.popleft() if self.descriptors else None,
            on_memory_pressure=on_memory_pressure,
            limits=limits or Limits(),
            peer_limits=peer_limits or Limits(),
            hook=hook,
        )

    def send(self, *values: Any) -> list[Any]:
        """Sends views of what lies in a segment; what the peer then has. Returns ride along."""
        return self.send_places([self.place(value) for value in values])

    def place(self, value: Any) -> tuple[int, int, int]:
        array = np.asarray(value)
        place = self.arena.place(array.__array_interface__["data"][0], array.nbytes)
        assert place is not None
        return (*place, array.nbytes)

    def send_places(self, places: list[tuple[int, int, int]]) -> list[Any]:
        self.send_news()
        self.arena.lend([number for place in places for number in place])
        self.give_back()
        return [self.peer.arena.resolve(*place[:2], _desc(place[2])) for place in places]

    def send_news(self) -> None:
        news = self.arena.take_pending()
        if news is not None:
            for segment in news[0]:
                assert segment.fd is not None
                self.peer.descriptors.append(segment.fd)
                segment.fd, segment.announced = None, True
                self.peer.arena.attach(segment.id, segment.nbytes, segment.name)
            for segment in news[1]:
                self.peer.arena.retire(segment.id)

    def give_back(self) -> None:
        self.peer.arena.returned(self.arena.take_returns(1000))


def pair(**options: Any) -> tuple[End, End]:
    client, server = End(True, **options), End(False)
    client.peer, server.peer = server, client
    return client, server


def close(*ends: End) -> None:
    for end in ends:
        end.arena.close()
        while end.descriptors:
            os.close(end.descriptors.popleft())


def _in_use(*ends: End) -> list[int]:
    return [end.arena.in_use_nbytes for end in ends]


def _address(value: Any) -> int:
    return int(np.asarray(value).__array_interface__["data"][0])


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_what_is_allocated_is_aligned_writable_and_reused() -> None:
    (end, other) = pair()
    for nbytes in (0, 1, 63, 64, 65, 4096, 5000, 100_000, 3 * MIB):
        lease = end.arena.allocate(nbytes)
        assert lease.shape == (nbytes,) and lease.dtype == np.uint8 and _address(lease) % 64 == 0
        lease[:] = 5
        address = _address(lease)
        del lease
        assert _in_use(end) == [0]
        assert _address(end.arena.allocate(nbytes)) == address
    close(end, other)


def test_an_arena_grows_by_doubling() -> None:
    end, other = pair()
    assert end.arena.nbytes == 0  # nothing until it is needed
    held = [end.arena.allocate(1)]
    assert end.arena.nbytes == MIB
    held.append(end.arena.allocate(MIB))
    assert end.arena.nbytes == 2 * MIB
    held.append(end.arena.allocate(MIB))
    assert end.arena.nbytes == 4 * MIB
    held.append(end.arena.allocate(10 * MIB))
    assert end.arena.nbytes == 14 * MIB
    assert [segment.id for segment in end.arena._blocks.segments] == [1, 3, 5, 7]
    other.arena.allocate(1)
    assert [segment.id for segment in other.arena._blocks.segments] == [2]
    close(end, other)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "slice of a slice": lambda lease: lease[10:500][5:20],
    "ndarray": lambda lease: np.ndarray((4, 4), np.float32, lease),
    "view of an ndarray": lambda lease: np.ndarray((4, 4), np.float32, lease)[1:, 2:],
    "asarray": lambda lease: np.asarray(lease).view(np.int16).reshape(-1, 2).T,
    "frombuffer": lambda lease: np.frombuffer(lease, np.int32),
    "memoryview": lambda lease: memoryview(lease)[5:9],
    "memoryview of a memoryview": lambda lease: memoryview(memoryview(lease).cast("B")[5:9]).toreadonly(),
    "broadcast": lambda lease: np.broadcast_to(lease, (3, len(lease))),
    "torch": lambda lease: torch.from_numpy(np.ndarray((4, 4), np.float32, lease)),
    "view of a torch view": lambda lease: (
        torch.from_numpy(np.ndarray((4, 4), np.float32, lease)).view(torch.bfloat16).t()[1:]
    ),
    "numpy of torch": lambda lease: torch.from_numpy(np.ndarray((4, 4), np.float32, lease)).numpy()[2],
    "torch's frombuffer": lambda lease: torch.frombuffer(lease, dtype=torch.float32),
    "detached parameter": lambda lease: torch.nn.Parameter(
        torch.from_numpy(np.ndarray((4, 4), np.float32, lease))
    ).detach(),
}


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS)
def test_any_view_keeps_the_block(make: Callable[[Any], Any]) -> None:
    for received in (False, True):
        client, server = pair()
        lease = client.arena.allocate(1000)
        if received:
            (lease,) = client.send(lease)
        view = make(lease)
        del lease
        gc.collect()
        server.give_back()
        assert _in_use(client) == [1024]
        del view
        gc.collect()
        server.give_back()
        assert _in_use(client) == [0]
        close(client, server)


@pytest.mark.parametrize(
    "make",
    [lambda lease: lease.copy(), lambda lease: lease + 1, lambda lease: lease.astype("f4"), lambda lease: lease[3]],
    ids=["copy", "sum", "cast", "element"],
)
def test_what_was_computed_holds_nothing(make: Callable[[Any], Any]) -> None:
    client, server = pair()
    lease = client.arena.allocate(1000)
    lease[:] = 1
    computed = make(lease)
    del lease
    assert _in_use(client) == [0]
    assert np.asarray(computed).size in (1, 1000)
    close(client, server)


# ---- ownership -------------------------------------------------------------------------------------------------------


def test_lend_and_return() -> None:
    client, server = pair()
    x = client.arena.allocate(100)
    x[:] = 7
    (y,) = client.send(x)
    assert y.shape == (100,) and (y == 7).all()
    y[0] = 9
    assert x[0] == 9  # the same bytes
    del x
    assert _in_use(client, server) == [128, 0]
    del y
    assert len(server.arena.returns) == 1 and _in_use(client) == [128]  # it has not said so yet
    server.give_back()
    assert _in_use(client) == [0] and len(server.arena.returns) == 0
    close(client, server)


def test_a_peers_block_sent_back_and_forth() -> None:
    client, server = pair()
    x = client.arena.allocate(100)
    address = _address(x)
    for _ in range(5):
        (y,) = client.send(x)
        del x
        (x,) = server.send(y)
        del y
        assert _address(x) == address and _in_use(client) == [128]
    del x
    server.give_back()
    client.give_back()
    assert _in_use(client, server) == [0, 0]
    assert len(client.arena.returns) == len(server.arena.returns) == 0
    close(client, server)


def test_the_owner_has_its_own_lease_before_the_return_comes() -> None:
    """The server sends a block back and drops it: its return rides on a later frame, or on the very same one."""
    client, server = pair()
    x = client.arena.allocate(100)
    x[:] = 3
    (y,) = client.send(x)
    del x
    place = server.place(y)
    del y
    z = client.arena.resolve(*place[:2], _desc(100))  # as in the frame that takes the return along: first the placement
    server.give_back()
    assert _in_use(client) == [128] and (z == 3).all()
    del z
    assert _in_use(client) == [0]
    close(client, server)


def test_slices_and_the_insides_of_a_block() -> None:
    client, server = pair()
    x = client.arena.allocate(1000)
    x[:] = np.arange(1000) % 251
    views = client.send(x[:10], x[100:200], x[999:], x)
    assert [view.tolist() for view in views[:3]] == [
        list(range(10)),
        [n % 251 for n in range(100, 200)],
        [999 % 251],
    ]
    del x
    for count in (3, 2, 1):
        del views[0]
        server.give_back()
        assert len(views) == count and _in_use(client) == [1024]
    (back,) = server.send(views[0][500:600])
    views.clear()
    server.give_back()
    assert _in_use(client) == [1024] and back[0] == 500 % 251
    del back
    assert _in_use(client) == [0]
    close(client, server)


def test_a_block_that_is_lent_many_times() -> None:
    client, server = pair()
    x = client.arena.allocate(64)
    views = client.send(x, x, x) + client.send(x)
    assert len({_address(view) for view in views}) == 1
    (block,) = client.arena._blocks.segments[0].blocks.values()
    assert (block.lent, block.returned, block.leases, block.dead) == (4, 0, 1, 0)
    del x
    while views:
        assert _in_use(client) == [64]
        views.pop()
        server.give_back()
    assert _in_use(client) == [0] and (block.lent, block.returned, block.dead) == (4, 4, 1)
    close(client, server)


def test_a_loan_that_was_not_sent_after_all_is_taken_back() -> None:
    client, server = pair()
    x = client.arena.allocate(64)
    client.send_news()
    place = client.place(x)
    client.arena.lend(place)
    client.arena.lend(place, -1)
    del x
    assert _in_use(client) == [0]
    with pytest.raises(RemoteProtocolError, match="expected a place that was lent"):
        client.arena.returned(place[:2])
    close(client, server)


def test_returns_that_could_not_be_sent_stay_in_order() -> None:
    client, server = pair()
    views = client.send(*[client.arena.allocate(64) for _ in range(5)])
    offsets = [server.place(view)[1] for view in views]
    while views:
        del views[0]
    taken = server.arena.take_returns(3)
    assert taken == [1, offsets[0], 1, offsets[1], 1, offsets[2]] and len(server.arena.returns) == 2
    server.arena.requeue_returns(taken)
    assert server.arena.take_returns(100) == [number for offset in offsets for number in (1, offset)]
    close(client, server)


def test_counts_of_what_came_by_reference() -> None:
    client, server = pair()
    x = client.arena.allocate(100)
    (y,) = client.send(x)
    server.send(y[:30])
    assert (server.arena.shared_nbytes, client.arena.shared_nbytes) == (100, 30)
    del x, y
    close(client, server)


def test_place() -> None:
    client, server = pair()
    assert client.arena.place(_address(np.zeros(8)), 64) is None
    x = client.arena.allocate(1000)
    (segment,) = client.arena._blocks.segments
    assert client.arena.place(_address(x), 1000) == (1, 0)
    assert client.arena.place(_address(x) + 10, 5) == (1, 10)
    assert client.arena.place(segment.address + MIB - 1, 1) == (1, MIB - 1)
    assert client.arena.place(segment.address + MIB - 1, 2) is None
    assert client.arena.place(segment.address + MIB, 1) is None
    assert client.arena.place(segment.address - 1, 1) is None
    (y,) = client.send(x)
    assert server.arena.place(_address(y), 1000) == (1, 0)
    del x, y
    close(client, server)


# ---- a full arena ----------------------------------------------------------------------------------------------------

SMALL = Limits(max_shared_nbytes=2 * MIB, max_segments=2)


def test_full_at_once_where_nobody_holds_anything() -> None:
    client, server = pair(peer_limits=SMALL)
    client.arena.allocate(64)  # what there is, and nobody uses, goes first
    with pytest.raises(ArenaFull) as caught:
        client.arena.allocate(3 * MIB)
    assert str(caught.value) == (
        f"{3 * MIB} bytes of shared memory: 0 bytes in 0 segments, of which 0 bytes are in use, expected at most "
        f"{2 * MIB} bytes in 2 segments, which the peer accepts"
    )
    close(client, server)


def test_full_at_the_deadline() -> None:
    waits: list[float | None] = []

    def on_memory_pressure(deadline: float | None) -> None:
        waits.append(deadline)
        time.sleep(0.01)

    client, server = pair(peer_limits=SMALL, on_memory_pressure=on_memory_pressure)
    held = [client.arena.allocate(MIB), client.arena.allocate(MIB)]
    started = time.monotonic()
    with pytest.raises(ArenaFull, match=f"{2 * MIB} bytes in 2 segments, of which {2 * MIB} bytes are in use"):
        client.arena.allocate(64, started + 0.05)
    assert 0.05 <= time.monotonic() - started < 1 and waits and set(waits) == {started + 0.05}
    with pytest.raises(ArenaFull):
        client.arena.allocate(64, started)  # a deadline that is over: no wait at all
    held.pop()
    assert client.arena.allocate(64).nbytes == 64
    close(client, server)


def test_returns_relieve_a_full_arena() -> None:
    views: list[Any] = []

    def on_memory_pressure(deadline: float | None) -> None:
        views.pop()
        server.give_back()

    client, server = pair(peer_limits=SMALL, on_memory_pressure=on_memory_pressure)
    views += client.send(client.arena.allocate(MIB))
    views += client.send(client.arena.allocate(MIB))
    assert _in_use(client) == [2 * MIB]
    x = client.arena.allocate(MIB)  # without a deadline: it waits as long as it takes
    assert len(views) == 1 and _in_use(client) == [2 * MIB]
    del x
    views.clear()
    close(client, server)


def test_several_threads_wait_for_the_same_room() -> None:
    client, server = pair(peer_limits=SMALL, on_memory_pressure=lambda deadline: time.sleep(0.001))
    counts: list[int] = []

    def work() -> None:
        for turn in range(50):
            lease = client.arena.allocate(MIB, time.monotonic() + 20)
            lease[:100] = turn
            assert (lease[:100] == turn).all()
            del lease  # who holds some and waits for more waits for itself
        counts.append(50)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    sys.setswitchinterval(interval)
    assert counts == [50] * 5 and client.arena.nbytes <= 2 * MIB and _in_use(client) == [0]
    close(client, server)


def test_what_comes_back_at_the_last_moment_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in use any more, and nothing was to be trimmed either: another thread was quicker each time."""
    client, server = pair(peer_limits=SMALL, on_memory_pressure=lambda deadline: None)
    held = [client.arena.allocate(MIB), client.arena.allocate(MIB)]

    def trim(idle_s: float) -> int:
        held.clear()
        return 0

    monkeypatch.setattr(client.arena, "trim", trim)
    assert client.arena.allocate(MIB, time.monotonic() + 5).nbytes == MIB
    close(client, server)


def test_the_last_segment_is_as_large_as_the_limit_leaves() -> None:
    client, server = pair(peer_limits=Limits(max_shared_nbytes=MIB + 100 * KIB))
    held = [client.arena.allocate(MIB), client.arena.allocate(64)]
    assert client.arena.nbytes == MIB + 100 * KIB
    held.append(client.arena.allocate(90 * KIB))
    del held
    close(client, server)


def test_what_the_system_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = pair()
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ArenaFull, match=f"no shared memory for a segment of {MIB} bytes: No space left on device"):
        client.arena.allocate(64)
    monkeypatch.undo()
    assert client.arena.allocate(64).nbytes == 64
    close(client, server)


# ---- trimming --------------------------------------------------------------------------------------------------------


def test_trim_gives_back_what_is_unused_on_both_sides() -> None:
    client, server = pair()
    x = client.arena.allocate(64)
    (y,) = client.send(x)
    big = client.arena.allocate(8 * MIB)
    assert client.arena.trim(0.0) == 0  # all of it is held
    del x, y
    server.give_back()
    assert client.arena.trim() == 0  # used just now
    gone = weakref.ref(server.arena._peers[1])
    assert client.arena.trim(0.0) == MIB and client.arena.has_pending
    client.send_news()  # announces the second, retires the first
    assert gone() is None and set(server.arena._peers) == {3} and not client.arena.has_pending
    del big
    assert client.arena.trim(0.0) == 8 * MIB and client.arena.nbytes == 0
    client.send_news()
    assert server.arena._peers == {}
    (z,) = client.send(client.arena.allocate(64))  # and it begins anew
    assert server.place(z) == (5, 0, 64)
    del z
    close(client, server)


def test_trim_before_a_segment_was_announced() -> None:
    """no_leaks sees its descriptor."""
    client, server = pair()
    client.arena.allocate(64)
    assert client.arena.trim(0.0) == MIB and client.arena.take_pending() is None and not client.arena.has_pending
    close(client, server)


def test_a_receivers_view_outlives_the_segment() -> None:
    client, server = pair()
    x = client.arena.allocate(64)
    x[:] = 5
    (y,) = client.send(x)
    del x
    server.arena.retire(1)  # an owner would not, while we hold it: a peer that does harms nobody but itself
    assert (y == 5).all() and server.arena.place(_address(y), 64) is None
    close(client, server)


def test_an_allocation_now_and_then_trims(monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = pair()
    client.arena.allocate(8 * MIB)
    x = client.arena.allocate(64)
    monkeypatch.setattr(module, "_TRIM_EVERY_S", -1.0)
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now + 31.0)
    y = client.arena.allocate(64)
    assert client.arena.nbytes == 8 * MIB  # x holds it
    del x, y
    close(client, server)


# ---- the end ---------------------------------------------------------------------------------------------------------


def _mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        if start <= address < end:
            return "memfd:fastsplit" in line
    return False


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_what_is_held_lives_on_after_the_end(kind: str) -> None:
    client, server = pair()
    x, other = client.arena.allocate(1000), client.arena.allocate(8 * MIB)
    (y,) = client.send(x)
    segment = weakref.ref(client.arena._blocks.segments[0])
    addresses = [_address(value) for value in (x, y, other)]
    if kind == "torch":
        x, y = torch.from_numpy(np.ndarray(250, np.float32, x)), torch.from_numpy(np.ndarray(250, np.float32, y))
    x[:] = 3
    del other
    close(client, server)
    gc.collect()
    assert [_mapped(address) for address in addresses] == [True, True, False]
    y[1] = 4
    assert x[0] == 3 and x[1] == 4
    view = y[1:]
    del x, y
    gc.collect()
    assert segment() is None and view[0] == 4
    assert [_mapped(address) for address in addresses[:2]] == [False, True]
    del view
    gc.collect()
    assert not _mapped(addresses[1])


def test_nothing_can_be_had_after_the_end() -> None:
    client, server = pair()
    x = client.arena.allocate(64)
    close(client, server)
    with pytest.raises(ArenaFull, match=ENDED):
        client.arena.allocate(64)
    assert client.arena.place(_address(x), 64) is None and client.arena.trim(0.0) == 0
    assert client.arena.nbytes == client.arena.in_use_nbytes == 0
    close(client, server)  # idempotent


def test_a_hook_that_fails_leaves_nothing() -> None:
    """no_leaks sees the descriptor."""

    def hook(address: int, nbytes: int) -> None:
        raise RuntimeError("cannot register")

    client, server = pair(hook=hook)
    with pytest.raises(RuntimeError, match="cannot register"):
        client.arena.allocate(64)
    assert client.arena.nbytes == 0 and client.arena.take_pending() is None
    close(client, server)


def test_hooks() -> None:
    calls: list[tuple[str, int, int]] = []

    def hook(address: int, nbytes: int) -> Callable[[], None]:
        calls.append(("map", address, nbytes))
        return lambda: calls.append(("unmap", address, nbytes))

    client, server = pair(hook=hook)
    x = client.arena.allocate(64)
    (y,) = server.send(server.arena.allocate(64))
    own, peers = _address(x), _address(y)
    assert calls == [("map", own, MIB), ("map", peers, MIB)]
    close(client, server)
    del x
    gc.collect()
    assert calls[2:] == [("unmap", own, MIB)]
    del y
    gc.collect()
    assert calls[3:] == [("unmap", peers, MIB)]


# ---- hostile peers ---------------------------------------------------------------------------------------------------


def _announce(end: End, segment_id: int, nbytes: int, real: int | None = None) -> None:
    memory, fd, _ = Memfd().create(real or nbytes)
    del memory
    end.descriptors.append(fd)
    end.arena.attach(segment_id, nbytes, "")


@pytest.mark.parametrize(
    ("segment_id", "nbytes", "text"),
    [
        (0, MIB, "segment, id: 0, expected a new one of the peer's"),
        (1, MIB, "segment, id: 1, expected a new one of the peer's"),  # ours to give
        (-2, MIB, "segment, id: -2, expected a new one of the peer's"),
        (2, MIB, "segment, id: 2, expected a new one of the peer's"),  # there already
        (2**32, MIB, f"segment, id: {2**32}, expected a new one of the peer's"),
        (4, 0, f"segment, nbytes: 0, {MIB} with the others, expected at most {4 * MIB}"),
        (4, -1, f"segment, nbytes: -1, {MIB - 1} with the others, expected at most {4 * MIB}"),
        (4, 3 * MIB + 1, f"segment, nbytes: {3 * MIB + 1}, {4 * MIB + 1} with the others, expected at most {4 * MIB}"),
        (4, 2**62, f"segment, nbytes: {2**62}, {2**62 + MIB} with the others, expected at most {4 * MIB}"),
    ],
)
def test_announcements_that_are_refused(segment_id: int, nbytes: int, text: str) -> None:
    client, server = pair(limits=Limits(max_shared_nbytes=4 * MIB, max_segments=3))
    _announce(client, 2, MIB)
    with pytest.raises(RemoteProtocolError) as caught:
        _announce(client, segment_id, nbytes, MIB)
    assert str(caught.value) == text and not client.descriptors  # closed, or no_leaks says so
    _announce(client, 4, 3 * MIB)  # inclusive
    close(client, server)


def test_too_many_segments() -> None:
    client, server = pair(limits=Limits(max_segments=2))
    _announce(client, 2, MIB)
    _announce(client, 6, MIB)  # any number that is new
    with pytest.raises(RemoteProtocolError, match="segment: 3 of them, expected 2"):
        _announce(client, 4, MIB)
    client.arena.retire(2)
    _announce(client, 2, MIB)
    close(client, server)


def test_a_segment_that_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = pair()
    monkeypatch.setattr(Memfd, "attach", lambda *_: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")))
    with pytest.raises(
        ResourceError, match=f"a segment of {MIB} bytes of the peer's cannot be mapped: Cannot allocate"
    ):
        client.arena.attach(2, MIB, "")
    close(client, server)


@pytest.mark.parametrize("segment_id", [0, 1, 4, -2, 2**40])
def test_retirements_that_are_refused(segment_id: int) -> None:
    client, server = pair()
    _announce(client, 2, MIB)
    client.arena.allocate(64)
    with pytest.raises(RemoteProtocolError) as caught:
        client.arena.retire(segment_id)
    assert str(caught.value) == f"segment, id: {segment_id}, expected one of the peer's that is mapped"
    close(client, server)


@pytest.mark.parametrize(
    ("place", "dtype", "text"),
    [
        (
            (2, 0, MIB + 1),
            "uint8",
            f"placement: {MIB + 1} bytes at 0 of segment 2, expected them within its {MIB} bytes",
        ),
        ((2, MIB, 1), "uint8", f"placement: 1 bytes at {MIB} of segment 2, expected them within its {MIB} bytes"),
        ((2, 2**64 - 8, 8), "uint8", f"placement: 8 bytes at {2**64 - 8} of segment 2, expected them within its"),
        ((2, 4, 8), "int64", "placement, offset: 4, expected a multiple of the item size 8"),
        ((4, 0, 8), "uint8", "placement: offset 0 of segment 4, expected a place that was lent"),
        ((1, 64, 8), "uint8", "placement: offset 64 of segment 1, expected a place that was lent"),  # ours, not lent
        ((1, 4096, 8), "uint8", "placement: offset 4096 of segment 1, expected a place that was lent"),  # in no block
        ((1, 2**63, 8), "uint8", f"placement: offset {2**63} of segment 1, expected a place that was lent"),
        ((3, 0, 8), "uint8", "placement: offset 0 of segment 3, expected a place that was lent"),
        ((1, 0, 65), "uint8", "placement: 65 bytes at 0 of segment 1, expected them within one loan"),
        ((1, 32, 64), "uint8", "placement: 64 bytes at 32 of segment 1, expected them within one loan"),
    ],
)
def test_places_that_a_peer_may_not_name(place: tuple[int, int, int], dtype: str, text: str) -> None:
    client, server = pair()
    _announce(client, 2, MIB)
    lent, kept = client.arena.allocate(64), client.arena.allocate(64)
    assert [client.place(value)[1] for value in (lent, kept)] == [0, 64]
    views = client.send(lent)
    with pytest.raises(RemoteProtocolError) as caught:
        client.arena.resolve(*place[:2], _desc(place[2], dtype))
    assert str(caught.value).startswith(text)
    assert (
        len(client.arena.resolve(1, 0, _desc(64))) == 64
        and len(client.arena.resolve(2, MIB - 8, _desc(8, "int64"))) == 1
    )
    assert _in_use(client) == [128]
    del views, lent, kept
    close(client, server)


@pytest.mark.parametrize("place", [(1, 64), (1, 4096), (1, 2**64 - 1), (2, 0), (3, 0), (2**32 - 1, 0)])
def test_returns_that_a_peer_may_not_make(place: tuple[int, int]) -> None:
    client, server = pair()
    _announce(client, 2, MIB)
    lent, kept = client.arena.allocate(64), client.arena.allocate(64)
    views = client.send(lent)
    with pytest.raises(RemoteProtocolError) as caught:
        client.arena.returned(place)
    assert str(caught.value) == f"returns: offset {place[1]} of segment {place[0]}, expected a place that was lent"
    assert _in_use(client) == [128]
    del views, lent, kept
    close(client, server)


def test_a_return_made_twice() -> None:
    client, server = pair()
    x = client.arena.allocate(64)
    views = client.send(x, x)
    client.arena.returned([1, 0, 1, 0])
    with pytest.raises(RemoteProtocolError, match="returns: offset 0 of segment 1, expected a place that was lent"):
        client.arena.returned([1, 0])
    x[0] = 1
    assert _in_use(client) == [64]  # the owner's own view still holds it
    del views, x
    close(client, server)


def test_a_place_after_its_return() -> None:
    client, server = pair()
    views = client.send(client.arena.allocate(64))
    views.clear()
    server.give_back()
    with pytest.raises(RemoteProtocolError, match="expected a place that was lent"):
        client.arena.resolve(1, 0, _desc(64))
    close(client, server)


# ---- anything in any order -------------------------------------------------------------------------------------------


class Ownership(RuleBasedStateMachine):
    """Two ends that allocate, send parts of what they hold, and drop it, in any order. Each value knows what it holds;
    nobody ever sees a byte that nobody who holds it wrote."""

    def __init__(self) -> None:
        super().__init__()
        limits = Limits(max_shared_nbytes=2 * MIB)
        self.ends = [End(True, limits, limits), End(False, limits, limits)]
        self.ends[0].peer, self.ends[1].peer = self.ends[1], self.ends[0]
        self.held: list[tuple[int, Any, int]] = []  # whose, the array, what it is filled with
        self.counter = 0

    @rule(whose=st.integers(0, 1), nbytes=st.sampled_from([1, 64, 100, 5000, 70_000, 400_000]))
    def allocate(self, whose: int, nbytes: int) -> None:
        try:
            lease = self.ends[whose].arena.allocate(nbytes, 0.0)
        except ArenaFull:
            return
        self.counter = self.counter % 250 + 1
        lease[:] = self.counter
        self.held.append((whose, lease, self.counter))

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 99), part=st.integers(0, 3))
    def send(self, index: int, part: int) -> None:
        whose, array, value = self.held[index % len(self.held)]
        step = len(array) // 4
        view = array[part * step : (part + 1) * step] if part and step else array
        (lease,) = self.ends[whose].send(view)
        self.held.append((1 - whose, lease, value))

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 99))
    def drop(self, index: int) -> None:
        del self.held[index % len(self.held)]

    @rule(whose=st.integers(0, 1))
    def give_back(self, whose: int) -> None:
        self.ends[whose].send_news()
        self.ends[whose].give_back()

    @rule(whose=st.integers(0, 1))
    def trim(self, whose: int) -> None:
        self.ends[whose].arena.trim(0.0)
        self.ends[whose].send_news()

    @invariant()
    def what_is_held_is_as_it_was_written(self) -> None:
        for _, array, value in self.held:
            assert array[0] == array[-1] == value

    def teardown(self) -> None:
        self.held.clear()
        for end in self.ends:
            end.send_news()
            end.give_back()
        try:
            assert [end.arena.in_use_nbytes for end in self.ends] == [0, 0]
            assert [len(end.arena.returns) for end in self.ends] == [0, 0]
            for end in self.ends:
                end.arena.trim(0.0)
                assert end.arena.nbytes == 0
        finally:
            close(*self.ends)


Ownership.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestOwnership = Ownership.TestCase
