"""The ring: two ends over one socket pair and one piece of memory, mapped twice as two processes would have it."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from raw_peer import HELLO, REQUEST, frame, hello
from until import until

from fastsplit.errors import DeadlineError, FastsplitError, PeerLostError, RemoteProtocolError
from fastsplit.wire import backend
from fastsplit.wire.events import Failed
from fastsplit.wire.session import Session
from fastsplit.wire.shm import ring
from fastsplit.wire.shm import semaphores as locks
from fastsplit.wire.shm import slots as reference
from fastsplit.wire.shm.ring import RING_NBYTES, Ring
from fastsplit.wire.shm.segment import Memfd, why_no_memfd
from fastsplit.wire.shm.semaphores import semaphores
from fastsplit.wire.shm.slots import ASLEEP, AWAKE, EAGER, SLOT_NBYTES, SLOTS
from fastsplit.wire.transport.stream import SEND_FLAGS, Stream

_WHY_NOT = why_no_memfd() or (None if semaphores() else "no semaphores that are known")
pytestmark = pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))


class Sink:
    """A session that gives out what it gets."""

    slot: bytes | None = None

    @staticmethod
    def received_slot(slot: bytes, events: list[Any] | None = None) -> list[Any]:
        Sink.slot = None
        return [slot]


class Pair(NamedTuple):
    client: Ring
    server: Ring


CORES = ["python", "weak", "compiled", "compiled client", "compiled server"]


@pytest.fixture(params=CORES)
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which ends have the compiled core. "python": neither, with the fence of x86; "weak": neither, with that of other
    processors."""
    use(request.param, monkeypatch)
    return str(request.param)


def use(core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if core == "weak":
        monkeypatch.setattr(reference, "_STRONGLY_ORDERED", False)
    elif core != "python" and not backend.native:
        pytest.skip("the compiled core is not in use here")

    def make(memory: Any, *, is_client: bool) -> Any:
        compiled = core in ("compiled", "compiled client" if is_client else "compiled server")
        return (backend.compiled(reference.Slots) if compiled else reference.Slots)(memory, is_client=is_client)

    monkeypatch.setattr(ring, "Slots", make)


@contextlib.contextmanager
def paired(spin_us: float = 0.0) -> Iterator[Pair]:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    memory, fd, _ = Memfd().create(RING_NBYTES)
    Ring.format(memory)
    other = Memfd().attach(fd, "", RING_NBYTES)
    client = Ring(Stream(first, spin_us, passes_descriptors=True), memory, is_client=True)
    server = Ring(Stream(second, spin_us, passes_descriptors=True), other, is_client=False)
    del memory, other
    try:
        yield Pair(client, server)
    finally:
        for end in (client, server):
            end.shutdown()
            end.close()


@pytest.fixture
def pair(core: str) -> Iterator[Pair]:
    with paired() as pair:
        yield pair


def receive(end: Ring, timeout_s: float = 10.0, *, blocking: bool = True) -> bytes | None:
    slots = end.receive(Sink, time.monotonic() + timeout_s, blocking=blocking)  # type: ignore[arg-type]
    if slots is None:
        return None
    (slot,) = slots
    assert isinstance(slot, bytes) and len(slot) == SLOT_NBYTES  # a copy, which nobody can change
    return slot


def _sleeps(end: Ring) -> bool:
    """One of the two ends sleeps at a time."""
    assert end._memory is not None
    return any(end._memory[at] for at in reference._ASLEEP_AT)


@contextlib.contextmanager
def _thread(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Runs `work` beside the block; its result, or what it raised, is in the list afterwards."""
    out: list[Any] = []

    def guarded() -> None:
        try:
            out.append(work())
        except BaseException as error:
            out.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield out
    finally:
        thread.join(30)
        assert not thread.is_alive()


# ---- frames ----------------------------------------------------------------------------------------------------------


def test_frames_of_one_slot_both_ways(pair: Pair) -> None:
    for sender, receiver in (pair, pair[::-1]):
        for size in (1, 40, SLOT_NBYTES - 1, SLOT_NBYTES):
            data = os.urandom(size)
            assert sender.send([data], size) == ()
            slot = receive(receiver)
            assert slot is not None and slot[:size] == data


def test_longer_frames_begin_a_slot_and_fill_as_many_as_they_need(pair: Pair) -> None:
    for sender, receiver in (pair, pair[::-1]):
        for size in (SLOT_NBYTES + 1, 2 * SLOT_NBYTES, 5 * SLOT_NBYTES + 7, SLOTS // 2 * SLOT_NBYTES):
            data = bytearray(os.urandom(size))
            assert sender.send([data]) == () == sender.send([b"next"])
            count = -(-size // SLOT_NBYTES)
            came = b"".join(receive(receiver) or b"" for _ in range(count))
            assert came[:size] == data
            assert (receive(receiver) or b"")[:4] == b"next"


def test_the_ring_goes_round(pair: Pair) -> None:
    rng = random.Random(1)
    for turn in range(20):
        sizes = [rng.choice((1, 100, 1024, 1025, 3000)) for _ in range(rng.randrange(1, 15))]
        for index, size in enumerate(sizes):
            assert pair.client.send([bytes([turn, index]) * (size // 2 + 1)]) == ()
        for index, size in enumerate(sizes):
            nbytes = (size // 2 + 1) * 2
            came = b"".join(receive(pair.server) or b"" for _ in range(-(-nbytes // SLOT_NBYTES)))
            assert came[:nbytes] == bytes([turn, index]) * (size // 2 + 1)


def test_a_full_ring_takes_nothing_until_half_of_it_was_read(pair: Pair) -> None:
    for number in range(SLOTS):
        assert pair.client.send([bytes([number])]) == ()
    more = [b"more"]
    assert pair.client.send(more) is more
    started = time.monotonic()
    for reading in (False, True):
        with pytest.raises(DeadlineError, match="the peer took too long to read"):
            pair.client.wait(time.monotonic() + 0.02, reading=reading)
    assert time.monotonic() - started < 1
    for number in range(SLOTS // 2):
        assert pair.client.send(more) is more
        assert (receive(pair.server) or b"")[0] == number
    assert pair.client.wait(time.monotonic() + 1, reading=False) == (False, True)
    for number in range(SLOTS // 2):
        assert pair.client.send([bytes([number])]) == ()
    assert pair.client.send(more) is more
    for number in [*range(SLOTS // 2, SLOTS), *range(SLOTS // 2)]:
        assert (receive(pair.server) or b"")[0] == number


def test_a_frame_larger_than_the_ring(pair: Pair) -> None:
    data = os.urandom(3 * SLOTS * SLOT_NBYTES + 5)
    left = pair.client.send([data])
    assert [len(part) for part in left] == [len(data) - SLOTS * SLOT_NBYTES]
    with _thread(lambda: pair.client.send_all(left, time.monotonic() + 10)) as out:
        came = b"".join(receive(pair.server) or b"" for _ in range(3 * SLOTS + 1))
    assert out == [None] and came[: len(data)] == data


def test_who_waits_for_room_sees_what_comes_in(pair: Pair) -> None:
    while not pair.client.send([b"x"]):
        pass
    pair.server.send([b"reply"])
    assert pair.client.wait(time.monotonic() + 5, reading=True) == (True, False)
    assert (receive(pair.client) or b"")[:5] == b"reply"
    with _thread(lambda: pair.client.wait(time.monotonic() + 10, reading=True)) as out:
        until(lambda: _sleeps(pair.client))
        for _ in range(SLOTS // 2):
            receive(pair.server)
    assert out == [(False, True)]


def test_slots_are_copied_before_they_are_looked_at(pair: Pair) -> None:
    pair.client.send([b"first"])
    slot = receive(pair.server)
    for _ in range(SLOTS - 1):  # all the way round, over the same slot
        pair.client.send([b"other"])
        receive(pair.server)
    pair.client.send([b"other"])
    assert slot is not None and slot[:5] == b"first"


# ---- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spin_us", [0.0, 200.0])
def test_a_sleeper_is_woken(core: str, spin_us: float) -> None:
    with paired(spin_us) as pair:
        for sender, receiver in (pair, pair[::-1]):
            for _ in range(20):
                with _thread(lambda: receive(receiver, 20)) as out:  # noqa: B023
                    until(lambda: _sleeps(receiver))  # noqa: B023
                    before = sender.bytes_sent
                    sender.send([b"wake up"])
                    assert sender.bytes_sent == before + 1
                assert out[0][:7] == b"wake up" and not _sleeps(receiver)


def test_a_sleeper_that_spins_is_woken_early_and_goes_back_to_sleep_if_nothing_comes(core: str) -> None:
    with paired(200.0) as pair:
        with _thread(lambda: receive(pair.server, 20)) as out:
            for round_trip in range(1, 4):
                until(lambda: _sleeps(pair.server))
                pair.client.wake_early()
                assert pair.client.bytes_sent == round_trip
                until(lambda: pair.server.bytes_received == round_trip)  # noqa: B023
            until(lambda: _sleeps(pair.server))
            pair.client.send([b"at last"])
        assert out[0][:7] == b"at last"


def test_a_sleeper_that_never_spins_is_not_woken_early(core: str) -> None:
    with paired(0.0) as pair:
        with _thread(lambda: receive(pair.server, 20)):
            until(lambda: _sleeps(pair.server))
            pair.client.wake_early()
            assert pair.client.bytes_sent == 0 and _sleeps(pair.server)
            pair.client.send([b"x"])
        pair.client.close()
        pair.client.wake_early()  # too late, and harmless


def test_nobody_is_woken_who_does_not_sleep(pair: Pair) -> None:
    for _ in range(10):
        pair.client.send([b"x"])
        receive(pair.server)
    assert (pair.client.bytes_sent, pair.server.bytes_sent) == (0, 0)


def test_deadlines(pair: Pair) -> None:
    for timeout_s in (0.0, 0.05):
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="nothing came from the peer"):
            receive(pair.server, timeout_s)
        assert timeout_s <= time.monotonic() - started < timeout_s + 1
    with pytest.raises(DeadlineError, match="nothing to read"):
        receive(pair.server, blocking=False)
    pair.client.send([b"late"])
    assert (receive(pair.server, blocking=False) or b"")[:4] == b"late"  # nothing was lost


def test_no_wake_up_is_lost(core: str) -> None:
    """20,000 times there and back between two that sleep at once: one lost wake-up, and both sleep for good."""
    rounds = 20_000

    with paired(0.0) as pair:

        def echo() -> int:
            for number in range(rounds):
                slot = receive(pair.server, 20)
                assert slot is not None and slot[:4] == number.to_bytes(4, "little")
                pair.server.send([slot[:4]])
            return rounds

        with _thread(echo) as out:
            for number in range(rounds):
                data = number.to_bytes(4, "little")
                pair.client.send([data])
                slot = receive(pair.client, 20)
                assert slot is not None and slot[:4] == data
    assert out == [rounds]


def test_a_stream_of_frames_from_another_thread(core: str) -> None:
    """The writer runs into the full ring, the reader into the empty one, again and again."""
    with paired(0.0) as pair:
        sizes = [random.Random(2).choice((1, 1000, 1025, 5000)) for _ in range(3000)]

        def write() -> None:
            for number, size in enumerate(sizes):
                pair.client.send_all([number.to_bytes(2, "little") * (size // 2 + 1)], time.monotonic() + 20)

        with _thread(write) as out:
            for number, size in enumerate(sizes):
                data = number.to_bytes(2, "little") * (size // 2 + 1)
                came = b"".join(receive(pair.server, 20) or b"" for _ in range(-(-len(data) // SLOT_NBYTES)))
                assert came[: len(data)] == data
        assert out == [None]


# ---- the ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocking", [True, False])
def test_what_was_written_before_the_end_still_counts(pair: Pair, blocking: bool) -> None:
    for number in range(3):
        pair.client.send([bytes([number])])
    pair.client.shutdown()
    pair.client.close()
    for number in range(3):
        assert (receive(pair.server, blocking=blocking) or b"")[0] == number
    assert receive(pair.server, blocking=blocking) is None
    assert receive(pair.server, blocking=blocking) is None


@pytest.mark.parametrize("who", ["own", "peer"])
def test_an_end_wakes_a_sleeper(pair: Pair, who: str) -> None:
    with _thread(lambda: receive(pair.server, 20)) as out:
        until(lambda: _sleeps(pair.server))
        started = time.monotonic()
        (pair.server if who == "own" else pair.client).shutdown()
    assert out == [None] and time.monotonic() - started < 1


def test_a_writer_that_waits_for_room_hears_that_the_peer_left(pair: Pair) -> None:
    while not pair.client.send([b"x"]):
        pass
    with _thread(lambda: pair.client.wait(time.monotonic() + 20, reading=False)) as out:
        pair.server.shutdown()
        pair.server.close()
    assert isinstance(out[0], PeerLostError)
    assert pair.client.peer_left()


def test_after_close_everything_is_a_lost_connection(pair: Pair) -> None:
    pair.client.close()
    pair.client.close()
    with pytest.raises(PeerLostError, match="the connection is closed"):
        pair.client.send([b"x"])
    with pytest.raises(PeerLostError, match="the connection is closed"):
        pair.client.send([bytes(5000)])
    with pytest.raises(PeerLostError):
        receive(pair.client)
    with pytest.raises(PeerLostError):
        pair.client.wait(time.monotonic() + 1, reading=True)
    assert pair.client.peer_left()


def test_close_lets_the_memory_go() -> None:
    """no_leaks sees the memory's descriptor, where the mapping keeps one; so does the kernel's list."""
    memory, fd, _ = Memfd().create(RING_NBYTES)
    inode = os.fstat(fd).st_ino
    os.close(fd)
    Ring.format(memory)
    first, second = socket.socketpair()
    end = Ring(Stream(first), memory, is_client=True)
    del memory
    end.close()
    second.close()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert not any(f" {inode} " in line for line in maps)


# ---- beside the ring -------------------------------------------------------------------------------------------------


def test_descriptors_go_through_the_socket(pair: Pair) -> None:
    assert pair.server.take_descriptor() is None
    for _ in range(3):
        reading, writing = os.pipe()
        assert pair.client.send_with_descriptor_now(b"announced", writing) == (True, ())
        os.close(writing)
        fd = pair.server.take_descriptor()
        assert fd is not None and not os.get_inheritable(fd)
        os.write(fd, b"through")
        os.close(fd)
        assert os.read(reading, 10) == b"through"
        os.close(reading)
    assert pair.server.take_descriptor() is None


def test_a_full_ring_tells_of_room_and_a_full_socket_does_not(pair: Pair) -> None:
    client, _ = pair
    for _ in range(SLOTS):
        client.send([bytearray(b"frame")])
    assert client.send_with_descriptor_now(b"announced", 0) == (False, [b"announced"])
    assert not client.needs_retry


def test_a_descriptor_goes_with_its_frame_or_not_at_all(pair: Pair) -> None:
    """A full socket makes no descriptor readable: there is room in the ring, and still this side may sleep a little."""
    client, server = pair
    frame = bytearray(b"announced")
    with contextlib.suppress(BlockingIOError):
        while True:
            client.link.send_now(b"w" * 4096, SEND_FLAGS)
    assert client.send_with_descriptor_now(frame, 0) == (False, [frame])
    assert not server.has_bytes()
    assert client.prepare_to_sleep(for_items=True, for_space=True) == ring._NAP_S
    client.awake()
    while select.select([server.fileno()], [], [], 0)[0]:
        server.drain()
    assert client.send_with_descriptor_now(frame, 0) == (True, ())
    assert client.prepare_to_sleep(for_items=True, for_space=True) == 0.0
    slot, fd = receive(server), server.take_descriptor()
    assert slot is not None and slot[: len(frame)] == frame and fd is not None
    os.close(fd)
    while not client.send([bytes(SLOT_NBYTES)]):
        pass
    assert client.send_with_descriptor_now(frame, 0) == (False, [frame])  # no room in the ring
    assert server.take_descriptor() is None


def test_a_descriptor_that_woke_a_sleeper_is_kept(pair: Pair) -> None:
    with _thread(lambda: receive(pair.server, 20)) as out:
        until(lambda: _sleeps(pair.server))
        assert pair.client.send_with_descriptor_now(b"announced", 0) == (True, ())
    assert out[0][:9] == b"announced"
    fd = pair.server.take_descriptor()
    assert fd is not None
    os.close(fd)


# ---- what a peer may have made of it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 7, 8, 12, 16])
def test_a_header_of_something_else(at: int) -> None:
    memory, fd, _ = Memfd().create(RING_NBYTES)
    os.close(fd)
    Ring.format(memory)
    memory[at] ^= 1
    first, second = socket.socketpair()
    link = Stream(first)
    with pytest.raises(
        RemoteProtocolError, match=rf"ring: {RING_NBYTES} bytes, header .*, expected {RING_NBYTES} bytes"
    ):
        Ring(link, memory, is_client=False)
    link.close()
    second.close()


def test_memory_of_another_size() -> None:
    memory, fd, _ = Memfd().create(RING_NBYTES + 4096)
    os.close(fd)
    Ring.format(memory)
    first, second = socket.socketpair()
    link = Stream(first)
    with pytest.raises(RemoteProtocolError, match=f"ring: {RING_NBYTES + 4096} bytes"):
        Ring(link, memory, is_client=False)
    link.close()
    second.close()


@pytest.mark.parametrize("seed", range(5))
def test_memory_that_is_scribbled_over_gives_frames_that_are_refused(core: str, seed: int) -> None:
    """Nothing but the end of this connection comes of it: no hang, no crash, no frame that nobody sent."""
    rng = np.random.default_rng(seed)
    with paired() as pair:
        session = Session(is_client=False, allocate=lambda nbytes: np.empty(nbytes, np.uint8))
        pair.client.send([hello()])
        events = pair.server.receive(session, time.monotonic() + 5)
        assert events is not None and len(events) == 1
        assert pair.client._memory is not None
        pair.client._memory[64:] = rng.integers(0, 256, RING_NBYTES - 64, np.uint8).tobytes()
        for _ in range(40):
            try:
                events = pair.server.receive(session, time.monotonic() + 0.001)
            except DeadlineError:
                continue
            assert events is not None
            if events:
                assert len(events) == 1 and isinstance(events[0], Failed)
                break
        with contextlib.suppress(FastsplitError):
            for _ in range(200):
                pair.server.send([frame(REQUEST, 1)])


def test_a_frame_through_a_ring_has_no_payload(pair: Pair) -> None:
    session = Session(is_client=False, allocate=lambda nbytes: np.empty(nbytes, np.uint8))
    pair.client.send([hello()])
    pair.server.receive(session, time.monotonic() + 5)
    pair.client.send([frame(REQUEST, 1, "f", [(2, (3,))], {}, b"abc")])
    events = pair.server.receive(session, time.monotonic() + 5)
    assert events is not None and isinstance(events[0], Failed)
    assert str(events[0].error) == "header, payload_nbytes: 3 in a ring, expected 0"
    assert HELLO == 1


# ---- which semaphores ------------------------------------------------------------------------------------------------


def test_semaphores(monkeypatch: pytest.MonkeyPatch) -> None:
    known = semaphores()
    assert known.split("-")[0] in ("glibc", "musl") and known.split("-")[-1] in ("32", "64")
    monkeypatch.setattr(locks.os, "confstr", lambda name: "glibc 2.20")
    assert semaphores() == ""  # too old
    monkeypatch.setattr(locks.os, "confstr", lambda name: None)
    assert semaphores() == ""  # no glibc, and no musl either
    monkeypatch.undo()
    monkeypatch.setattr(locks, "_loaded", None)
    assert semaphores() == ""


# ---- slots -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def both(core: str) -> Iterator[tuple[Any, Any]]:
    """The slots of a client and of a server."""
    memory, fd, _ = Memfd().create(RING_NBYTES)
    os.close(fd)
    Ring.format(memory)
    ends = ring.Slots(memory, is_client=True), ring.Slots(memory, is_client=False)
    yield ends
    for end in ends:
        end.close()


def test_a_slot_that_is_taken_is_noted_and_the_next_one_follows(both: tuple[Any, Any]) -> None:
    client, server = both
    assert not server.readable() and not server.poll(0) and not server.poll(10)
    assert client.write(b"a") and client.write(b"b" * SLOT_NBYTES)
    for first in (b"a", b"b"):
        assert server.readable() and server.poll(1e12)
        server.take(Sink)
        assert Sink.slot is not None and (Sink.slot[:1], len(Sink.slot)) == (first, SLOT_NBYTES)
    assert not server.readable()
    Sink.slot = None


def test_a_half_is_given_back_once(both: tuple[Any, Any]) -> None:
    client, server = both
    for _ in range(SLOTS):
        assert client.has_space() and client.write(b"x")
    assert not client.has_space() and not client.write(b"x")
    given = []
    for number in range(SLOTS):
        assert server.readable()
        server.take(Sink)
        if server.give_back():
            assert server.give_back()  # until the peer was told
            server.gave_back()
            given.append(number)
            assert client.has_space()
    assert not server.give_back() and given == [SLOTS // 2 - 1, SLOTS - 1]
    Sink.slot = None


def test_who_sleeps_is_seen_by_the_other(both: tuple[Any, Any]) -> None:
    for one, other in (both, both[::-1]):
        assert (other.peer_asleep(), other.must_wake()) == (AWAKE, False)
        for value in (ASLEEP, EAGER):
            assert one.set_asleep(value)
            assert (other.peer_asleep(), other.must_wake()) == (value, True)
        assert other.wake(lambda: 7) == 7
        assert (other.peer_asleep(), other.must_wake()) == (AWAKE, False)


def test_a_ring_that_is_gone(both: tuple[Any, Any]) -> None:
    for end in both:
        end.close()
        end.close()
        for act, *arguments in (
            (end.has_space,),
            (end.write, b"x"),
            (end.readable,),
            (end.poll, 10),
            (end.set_asleep, 1),
            (end.peer_asleep,),
            (end.must_wake,),
            (end.wake, int),
        ):
            with pytest.raises(PeerLostError, match=r"^the connection is closed$"):
                act(*arguments)
        assert not end.give_back() and not end.poll(0)


def test_what_slots_refuse(both: tuple[Any, Any]) -> None:
    client, server = both
    with pytest.raises(ValueError, match="part: 1025 bytes, expected at most 1024"):
        client.write(bytes(SLOT_NBYTES + 1))
    with pytest.raises(ValueError, match="there is no slot to read"):
        server.take(Sink)
    for value in (-1, 256):
        with pytest.raises(ValueError):  # noqa: PT011 (each core's own words)
            client.set_asleep(value)
    assert client.write(b"x") and server.readable() and server.poll(-1)


@pytest.mark.parametrize("core", ["compiled"], indirect=True)
def test_what_the_compiled_slots_refuse(both: tuple[Any, Any]) -> None:
    client, server = both
    with pytest.raises(ValueError, match=f"memory: 64 bytes, expected {RING_NBYTES}"):
        backend.compiled(reference.Slots)(bytearray(64), is_client=True)  # type: ignore[arg-type]
    for wrong in (b"", None):
        with pytest.raises((TypeError, BufferError, ValueError)):
            backend.compiled(reference.Slots)(wrong, is_client=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="twice"):
        client.__init__(bytearray(RING_NBYTES), is_client=True)
    with pytest.raises(TypeError):
        client.write("text")
    assert client.write(b"x") and server.readable()
    with pytest.raises(AttributeError):
        server.take(object())  # it has no place to note it
    server.take(Sink)  # and nothing was lost
    assert Sink.slot is not None and Sink.slot[:1] == b"x"
    Sink.slot = None


@pytest.mark.parametrize("core", ["compiled"], indirect=True)
def test_closed_while_another_thread_polls(core: str) -> None:
    """The memory is let go when the poll ends."""
    memory, fd, _ = Memfd().create(RING_NBYTES)
    os.close(fd)
    Ring.format(memory)
    end = ring.Slots(memory, is_client=True)

    def poll() -> None:
        with pytest.raises(PeerLostError, match=r"^the connection is closed$"):
            end.poll(200_000.0)

    with _thread(poll):
        time.sleep(0.05)
        end.close()
        with pytest.raises(BufferError):
            memory.close()
    memory.close()
