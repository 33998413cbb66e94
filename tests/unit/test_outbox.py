"""The outbox: order, parts, batches, descriptors, what is discarded, and exactly which calls a transport gets."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_peer import hello

from fastsplit.errors import DeadlineError, PeerLostError
from fastsplit.schema.decoder import Decoder
from fastsplit.schema.header import HEADER_NBYTES, Kind, parse_header
from fastsplit.schema.limits import Limits
from fastsplit.system.threads import Workers
from fastsplit.tensors import Outgoing
from fastsplit.tensors.pool import Pool
from fastsplit.wire import outbox as outbox_module
from fastsplit.wire.blocking import flush as blocking
from fastsplit.wire.frames import MAX_RETURNS
from fastsplit.wire.outbox import Frame, Outbox
from fastsplit.wire.session import Session
from fastsplit.wire.transport.stream import Stream

MIB = 1024**2
ALL = 2**62


class Transport:
    """Takes as many bytes of each call as `room` says, then `then`, everything by default; notes each call.

    `whole_frames`: takes a call's only buffer whole, or nothing of it where `room` says 0, as a ring does.
    """

    passes_descriptors = True

    @property
    def needs_retry(self) -> bool:
        return self.whole_frames and not self.descriptor_room

    def __init__(self, room: Sequence[int] = (), *, then: int = ALL, whole_frames: bool = False) -> None:
        self.then = then
        self.whole_frames = whole_frames
        self.room = deque(room)
        self.taken = bytearray()
        self.calls: list[tuple[Any, ...]] = []
        self.descriptors: list[int] = []  # where in the stream each was sent
        self.descriptor_room = True
        self.bytes_sent = 0
        self.lost = self.shut = False

    def _take(self, buffers: Sequence[Any]) -> Sequence[Any]:
        if self.lost:
            raise PeerLostError("lost")
        data = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
        room = self.room.popleft() if self.room else self.then
        if self.whole_frames:
            assert len(buffers) == 1
            room = len(data) if room else 0
        self.taken += data[:room]
        self.bytes_sent += min(room, len(data))
        left: list[Any] = []
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            if room < len(view):
                left.append(view[room:])
            room = max(room - len(view), 0)
        return left

    def send(self, buffers: Sequence[Any], nbytes: int = -1) -> Sequence[Any]:
        assert nbytes == sum(memoryview(buffer).nbytes for buffer in buffers)
        self.calls.append(("send", len(buffers)))
        return self._take(buffers)

    def send_with_descriptor_now(self, frame: Any, fd: int) -> tuple[bool, Sequence[Any]]:
        os.fstat(fd)
        self.calls.append(("descriptor",))
        if not self.descriptor_room:
            return False, [frame]
        at = len(self.taken)
        left = self._take([frame])
        if self.whole_frames or len(self.taken) > at:
            self.descriptors.append(at)
            return True, left
        return False, [frame]

    def wait(self, deadline: float | None, *, reading: bool) -> tuple[bool, bool]:
        self.calls.append(("wait",))
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlineError("late")
        return False, True

    def shutdown(self) -> None:
        self.shut = True


class Segment:
    """Of an arena."""

    def __init__(self, number: int, fd: int | None = None) -> None:
        self.id, self.nbytes, self.name, self.fd = number, 4096, "" if fd is not None else "name", fd


class Arena:
    """What an outbox and a session need of one."""

    def __init__(self) -> None:
        self.returns: deque[tuple[int, int]] = deque()
        self.new: list[Segment] = []
        self.old: list[Segment] = []
        self.lent: list[tuple[tuple[int, ...], int]] = []

    @property
    def has_pending(self) -> bool:
        return bool(self.new or self.old)

    def take_pending(self) -> tuple[list[Segment], list[Segment]] | None:
        pending, self.new, self.old = (self.new, self.old), [], []
        return pending if any(pending) else None

    def take_returns(self, at_most: int) -> list[int]:
        return [number for _ in range(min(at_most, len(self.returns))) for number in self.returns.popleft()]

    def requeue_returns(self, taken: Sequence[int]) -> None:
        self.returns.extendleft(reversed(list(zip(taken[::2], taken[1::2], strict=True))))

    def lend(self, placements: Sequence[int], count: int = 1) -> None:
        self.lent.append((tuple(placements), count))


def make(transport: Any, arena: Arena | None = None) -> Outbox:
    """An outbox of a client whose handshake is done."""
    session = Session(is_client=True, allocate=Pool().allocate, on_hello=lambda attrs, limits: arena)  # type: ignore[arg-type,return-value]
    buffers, data = session.receive_buffers(), hello()
    buffers[0][: len(data)] = data
    session.received(len(data))
    outbox = Outbox(session, transport)
    outbox.arena = arena  # type: ignore[assignment]
    return outbox


class Came(NamedTuple):
    kind: Kind
    request_id: int
    attrs: dict[str, Any]
    payload: bytes
    returns: tuple[int, ...]


def parse(data: bytes) -> list[Came]:
    """Whole frames, and nothing else."""
    frames: list[Came] = []
    decoder = Decoder(Limits())
    at = 0
    while at < len(data):
        header = parse_header(data, at, Limits(), 0)
        metadata_end = at + HEADER_NBYTES + header[2]
        message = decoder.decode(data[at + HEADER_NBYTES : metadata_end], header[3])
        at = metadata_end + header[4]
        assert len(data) >= at
        payload = data[metadata_end:at]
        frames.append(Came(Kind(header[0]), header[1], dict(message.attrs), payload, tuple(message.returns)))
    return frames


class Sent(NamedTuple):
    request_id: int
    buffers: list[Any]
    nbytes: int
    out: Outgoing

    @property
    def data(self) -> bytes:
        return b"".join(memoryview(buffer).cast("B") for buffer in self.buffers)


def request(outbox: Outbox, *sizes: int, placements: Sequence[int] = ()) -> Sent:
    """The next request, with uint8 tensors of these sizes."""
    tensors = [np.full(size, outbox.session.next_id % 251, np.uint8) for size in sizes]
    out = Outgoing([(2, (size,)) for size in sizes], [each for each in tensors if each.size], sum(sizes))
    out = out._replace(placements=placements)
    number, head = outbox.session.request("f", out.descs if not placements else (), {}, out.nbytes)
    return Sent(number, [head, *out.buffers], len(head) + out.nbytes, out)


def put(outbox: Outbox, *sizes: int, placements: Sequence[int] = ()) -> Frame:
    sent = request(outbox, *sizes, placements=placements)
    return outbox.put(sent.buffers, sent.nbytes, sent.out)


def ids(transport: Transport) -> list[int]:
    return [came.request_id for came in parse(bytes(transport.taken))]


def drain(outbox: Outbox, at_most: int = 100_000) -> int:
    """Flushes until nothing waits. How often."""
    for count in range(at_most):
        if outbox.flush():
            return count + 1
    raise AssertionError("frames still wait")


# ---- straight out ----------------------------------------------------------------------------------------------------


def test_what_the_transport_takes_whole_is_never_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = Transport()
    outbox = make(transport)
    monkeypatch.setattr(outbox_module, "Frame", None)
    for n in range(3):
        sent = request(outbox, 10, 20)
        assert outbox.send(sent.buffers, sent.nbytes, sent.out) is None
        assert transport.calls == [("send", 3)] * (n + 1)
        assert outbox.idle and outbox.first is None and outbox.queued_nbytes == 0
    assert ids(transport) == [1, 2, 3]


@pytest.mark.parametrize("first", [0, 1, 50])
def test_a_rest_waits(first: int) -> None:
    transport = Transport([first, 7, 0, 5])
    outbox = make(transport)
    sent = request(outbox, 100)
    frame = outbox.send(sent.buffers, sent.nbytes, sent.out)
    assert frame is not None and frame is outbox.first and not outbox.idle
    assert frame.started == bool(first) and outbox.queued_nbytes == frame.nbytes == sent.nbytes - first
    for taken in (first + 7, first + 7, first + 12):
        assert not outbox.flush()
        assert frame.started and outbox.queued_nbytes == sent.nbytes - taken
    assert outbox.flush() and outbox.idle and outbox.queued_nbytes == 0
    assert frame.buffers == () and frame.out is None  # the tensors are released
    assert bytes(transport.taken) == sent.data
    assert len(transport.calls) == 5
    assert outbox.flush() and len(transport.calls) == 5


def test_nothing_overtakes_a_rest() -> None:
    transport = Transport([10, 0])
    outbox = make(transport)
    first, second = request(outbox, 100), request(outbox, 5)
    assert outbox.send(first.buffers, first.nbytes) is not None
    assert outbox.send(second.buffers, second.nbytes) is not None
    third = request(outbox, 6)
    assert outbox.send(third.buffers, third.nbytes) is None  # took the others along
    assert outbox.idle and bytes(transport.taken) == first.data + second.data + third.data


def test_an_error_of_the_transport_is_the_callers() -> None:
    transport = Transport()
    outbox = make(transport)
    put(outbox, 10)
    transport.lost = True
    with pytest.raises(PeerLostError):
        outbox.flush()
    assert not outbox.idle
    with pytest.raises(PeerLostError):
        make(transport).send([b"x"], 1)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_small_frames_leave_together() -> None:
    transport = Transport()
    outbox = make(transport)
    for _ in range(100):
        put(outbox)
    assert not transport.calls
    assert outbox.flush()
    assert transport.calls == [("send", 48), ("send", 48), ("send", 4)]
    assert ids(transport) == list(range(1, 101))


def test_a_batch_ends_behind_a_megabyte() -> None:
    transport = Transport()
    outbox = make(transport)
    for _ in range(4):
        put(outbox, MIB - 1000)
    outbox.flush()
    assert transport.calls == [("send", 4), ("send", 4)]


def test_a_flush_ends_behind_four_megabytes() -> None:
    transport = Transport()
    outbox = make(transport)
    for _ in range(6):
        put(outbox, 2 * MIB)
    assert not outbox.flush()
    assert transport.calls == [("send", 2)] * 2 and outbox.queued_nbytes < 8 * MIB + 4096
    assert not outbox.flush() and outbox.flush()
    assert transport.calls == [("send", 2)] * 6 and ids(transport) == [1, 2, 3, 4, 5, 6]


def test_a_batch_of_which_a_part_is_taken() -> None:
    heads = 3 * len(request(make(Transport()), 10).buffers[0])
    transport = Transport([heads + 30 + 5, 0])
    outbox = make(transport)
    frames = [put(outbox, 10) for _ in range(6)]
    assert not outbox.flush()
    assert [frame.started for frame in frames] == [True, True, True, True, False, False]
    assert [bool(frame.buffers) for frame in frames] == [False, False, False, True, True, True]
    assert outbox.first is frames[3] and outbox.queued_nbytes == sum(frame.nbytes for frame in frames[3:])
    assert not outbox.flush() and outbox.flush()
    assert ids(transport) == [1, 2, 3, 4, 5, 6]
    assert transport.calls == [("send", 12), ("send", 6), ("send", 6)]


def test_frames_of_a_ring_go_one_by_one() -> None:
    transport = Transport([1, 1, 0, 1, 0], whole_frames=True)
    outbox = make(transport)
    for _ in range(5):
        put(outbox)
    assert not outbox.flush() and not outbox.needs_retry
    assert transport.calls == [("send", 1)] * 3
    assert not outbox.flush() and outbox.flush()
    assert transport.calls == [("send", 1)] * 7 and ids(transport) == [1, 2, 3, 4, 5]


# ---- discarding ------------------------------------------------------------------------------------------------------


def test_a_request_of_which_no_byte_was_sent_is_discarded() -> None:
    arena = Arena()
    arena.returns.extend((9, n) for n in range(3))
    transport = Transport([0, 0], whole_frames=True)
    outbox = make(transport, arena)
    first = put(outbox, placements=(1, 64, 10))
    arena.returns.extend((9, n) for n in range(3, 5))
    second, third = put(outbox, placements=(1, 128, 10)), put(outbox)
    assert not arena.returns and outbox.session.inflight == 3
    assert not outbox.flush()
    assert outbox.discard(second, 2) and arena.lent == [((1, 128, 10), -1)]
    assert list(arena.returns) == [(9, 3), (9, 4)]
    assert outbox.discard(first, 1) and list(arena.returns) == [(9, n) for n in range(5)]
    assert list(outbox.session.requests) == [3] and outbox.queued_nbytes == third.nbytes
    assert not outbox.discard(first, 1)  # once
    assert not outbox.flush() and outbox.flush()
    assert ids(transport) == [3] and not outbox.discard(third, 3)


def test_a_request_of_which_a_byte_was_sent_is_sent() -> None:
    transport = Transport([1, 0])
    outbox = make(transport)
    sent = request(outbox, 10)
    frame = outbox.send(sent.buffers, sent.nbytes, sent.out)
    assert frame is not None and not outbox.discard(frame, 1)
    assert outbox.session.inflight == 1
    outbox.flush()
    assert outbox.flush() and bytes(transport.taken) == sent.data


def test_a_straight_request_is_discarded_too() -> None:
    transport = Transport([0])
    outbox = make(transport, Arena())
    sent = request(outbox, placements=(1, 0, 10))
    frame = outbox.send(sent.buffers, sent.nbytes, sent.out)
    assert frame is not None and outbox.discard(frame, 1)
    assert outbox.idle and outbox.queued_nbytes == 0 and outbox.session.inflight == 0
    assert outbox.arena.lent == [((1, 0, 10), -1)]  # type: ignore[union-attr]


def test_after_the_end_nothing_is_queued() -> None:
    transport = Transport([5])
    outbox = make(transport)
    frames = [put(outbox, 10), put(outbox, 10)]
    outbox.flush()
    outbox.close()
    outbox.close()
    frames.append(put(outbox, 10))
    assert outbox.idle and outbox.queued_nbytes == 0
    assert all(frame.out is None and not frame.buffers for frame in frames)
    assert not any(outbox.discard(frame, n + 1) for n, frame in enumerate(frames))
    assert outbox.flush() and len(transport.calls) == 1
    transport.room.append(5)
    assert outbox.send([b"too late"], 8) is not None and outbox.idle and outbox.queued_nbytes == 0


# ---- control frames --------------------------------------------------------------------------------------------------


def a_descriptor() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def test_nothing_goes_before_a_frame_without_need() -> None:
    arena = Arena()
    outbox = make(Transport(), arena)
    arena.returns.extend((9, n) for n in range(MAX_RETURNS))  # these ride along
    assert not outbox.put_control_frames() and outbox.idle
    put(outbox)
    assert not arena.returns
    assert not make(Transport()).put_control_frames()  # without an arena


def test_control_frames_are_in_order() -> None:
    arena, transport = Arena(), Transport()
    outbox = make(transport, arena)
    arena.new, arena.old = [Segment(3), Segment(5)], [Segment(1)]
    arena.returns.extend((9, n) for n in range(MAX_RETURNS + 200))
    assert outbox.put_control_frames() and not arena.has_pending
    assert len(arena.returns) <= MAX_RETURNS
    put(outbox)
    outbox.flush()
    came = parse(bytes(transport.taken))
    kinds = [each.kind for each in came]
    assert kinds[:3] == [Kind.RETIRE, Kind.SEGMENT, Kind.SEGMENT] and kinds[-1] == Kind.REQUEST
    assert set(kinds[3:-1]) <= {Kind.RETURN} and [each.attrs["id"] for each in came[:3]] == [1, 3, 5]
    offsets = [offset for each in came for offset in each.returns[1::2]]
    assert offsets == list(range(MAX_RETURNS + 200)) and not arena.returns
    assert len(transport.calls) == 1


@pytest.mark.parametrize("whole_frames", [False, True])
def test_a_descriptor_goes_with_its_frame(whole_frames: bool) -> None:
    arena, transport = Arena(), Transport(whole_frames=whole_frames)
    outbox = make(transport, arena)
    put(outbox)
    put(outbox)
    segments = arena.new = [Segment(3, a_descriptor()), Segment(5), Segment(7, a_descriptor())]
    numbers = [segment.fd for segment in segments if segment.fd is not None]
    outbox.put_control_frames()
    put(outbox)
    put(outbox)
    assert outbox.flush()
    one, two = ("send", 1), ("descriptor",)
    ring = [one, one, two, one, two, one, one]
    assert transport.calls == (ring if whole_frames else [("send", 2), two, ("send", 1), two, ("send", 2)])
    came = parse(bytes(transport.taken))
    assert [each.kind for each in came] == [Kind.REQUEST] * 2 + [Kind.SEGMENT] * 3 + [Kind.REQUEST] * 2
    assert [parse(bytes(transport.taken[at:]))[0].attrs["id"] for at in transport.descriptors] == [3, 7]
    assert all(segment.fd is None for segment in segments)
    for number in numbers:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


def test_a_descriptor_for_which_there_is_no_room() -> None:
    for whole_frames in (False, True):
        arena, transport = Arena(), Transport(whole_frames=whole_frames)
        outbox = make(transport, arena)
        arena.new = [segment] = [Segment(3, a_descriptor())]
        outbox.put_control_frames()
        put(outbox)
        transport.descriptor_room = False
        for _ in range(2):
            assert not outbox.flush()
            assert outbox.needs_retry == whole_frames  # a socket's loop is told when there is room
            assert segment.fd is not None and not transport.taken
        transport.descriptor_room = True
        assert outbox.flush() and not outbox.needs_retry and segment.fd is None
        assert transport.descriptors == [0]


def test_a_descriptor_is_sent_once_with_a_frame_in_parts() -> None:
    arena, transport = Arena(), Transport([0, 3, 4, 0])
    outbox = make(transport, arena)
    arena.new = [segment] = [Segment(3, a_descriptor())]
    outbox.put_control_frames()
    assert not outbox.flush() and segment.fd is not None
    assert not outbox.flush() and segment.fd is None
    drain(outbox)
    assert transport.descriptors == [0] and transport.calls.count(("descriptor",)) == 2
    assert [each.kind for each in parse(bytes(transport.taken))] == [Kind.SEGMENT]


def test_a_descriptor_that_was_closed_meanwhile_is_not_sent() -> None:
    """By an arena that has ended: its frame still leaves, and nothing else that has got the number."""
    arena, transport = Arena(), Transport()
    outbox = make(transport, arena)
    arena.new = [segment] = [Segment(3, a_descriptor())]
    outbox.put_control_frames()
    assert segment.fd is not None
    os.close(segment.fd)
    segment.fd = None
    assert outbox.flush() and transport.calls == [("send", 1)]


# ---- returns, and other small frames ---------------------------------------------------------------------------------


def test_all_returns_are_queued() -> None:
    arena, transport = Arena(), Transport([20])
    outbox = make(transport, arena)
    arena.returns.extend((9, n) for n in range(200))
    outbox.put_returns()
    assert not arena.returns and not transport.calls
    drain(outbox)
    came = parse(bytes(transport.taken))
    assert {each.kind for each in came} == {Kind.RETURN} and {each.attrs["wanted"] for each in came} == {0}
    assert [offset for each in came for offset in each.returns[1::2]] == list(range(200))


@pytest.mark.parametrize("room", [0, 1, 2])
def test_returns_for_which_there_is_no_room_wait_in_order(room: int) -> None:
    arena, transport = Arena(), Transport([1] * room + [0], whole_frames=True)
    outbox = make(transport, arena)
    arena.returns.extend((9, n) for n in range(200))
    outbox.send_returns()
    assert outbox.idle and len(transport.calls) == room + 1
    sent = [offset for each in parse(bytes(transport.taken)) for offset in each.returns[1::2]]
    assert sent + [offset for _, offset in arena.returns] == list(range(200)) and arena.returns
    outbox.send_returns()
    sent = [offset for each in parse(bytes(transport.taken)) for offset in each.returns[1::2]]
    assert sent == list(range(200)) and not arena.returns


def test_a_small_frame_is_sent_whole_or_not_at_all() -> None:
    arena, transport = Arena(), Transport([0])
    outbox = make(transport, arena)
    arena.returns.append((9, 1))
    assert not outbox.send_small(outbox.session.cancel(1)) and list(arena.returns) == [(9, 1)]
    assert outbox.idle and not transport.taken
    assert outbox.send_small(outbox.session.cancel(2)) and not arena.returns
    assert ids(transport) == [2] and len(transport.calls) == 2


def test_of_a_small_frame_a_socket_may_take_a_part() -> None:
    arena, transport = Arena(), Transport([3])
    outbox = make(transport, arena)
    assert outbox.send_small(outbox.session.cancel(1)) and not outbox.idle
    arena.returns.append((9, 1))
    assert not outbox.send_small(outbox.session.cancel(2))  # behind a rest it is not sent, and makes no call
    assert list(arena.returns) == [(9, 1)] and len(transport.calls) == 1
    assert outbox.flush() and ids(transport) == [1]


def test_the_last_frame() -> None:
    transport = Transport([5])
    outbox = make(transport)
    frame = put(outbox, 10)
    assert outbox.send_last(b"five!") and not frame.started  # what waits is overtaken
    transport.room.append(3)
    outbox.flush()
    assert not outbox.send_last(b"the end") and len(transport.calls) == 2  # in the middle of a frame nothing is said
    for room, lost in ((0, False), (2, False), (9, True)):
        transport = Transport([room])
        transport.lost = lost
        assert not make(transport).send_last(b"the end")


def test_the_peer_is_asked_now_and_then() -> None:
    outbox = make(Transport(), Arena())
    asked = [now for now in range(100, 200) if outbox.ask(now / 128) is not None]  # in steps of 7.8 ms
    assert asked == list(range(100, 200, 3))
    assert not outbox.may_ask(asked[-1] / 128) and outbox.may_ask(asked[-1] / 128 + 0.1)


# ---- any order, any parts --------------------------------------------------------------------------------------------


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.lists(st.integers(0, 40), max_size=3)),
        st.tuples(st.just("send"), st.lists(st.integers(0, 40), max_size=3)),
        st.tuples(st.just("flush"), st.just([])),
        st.tuples(st.just("discard"), st.lists(st.integers(0, 10**6), min_size=1, max_size=1)),
        st.tuples(st.just("segments"), st.lists(st.booleans(), max_size=2)),
        st.tuples(st.just("returns"), st.lists(st.integers(0, 60), max_size=1)),
        st.tuples(st.just("small"), st.just([])),
    ),
    max_size=40,
)
ROOM = st.lists(st.one_of(st.just(0), st.integers(0, 100), st.just(ALL)), max_size=60)


@given(steps=STEPS, room=ROOM, byte_by_byte=st.booleans(), whole_frames=st.booleans())
@settings(max_examples=300, deadline=None)
def test_whatever_is_put_leaves_whole_and_in_order(
    steps: list[tuple[str, list[int]]], room: list[int], byte_by_byte: bool, whole_frames: bool
) -> None:
    arena = Arena()
    transport = Transport([] if byte_by_byte else room, then=1 if byte_by_byte else ALL, whole_frames=whole_frames)
    outbox = make(transport, arena)
    expected: list[tuple[str, Any]] = []  # what is to come out; of returns, their offsets
    waiting: dict[int, Frame] = {}
    next_return, next_segment, announced = 0, 3, 0

    def note_small(sent: bool, number: int) -> None:
        if sent:
            expected.append(("cancel", number))

    for step, numbers in steps:
        if step in ("put", "send"):
            sent = request(outbox, *([] if whole_frames else numbers))
            expected.append(("request", sent.request_id))
            if step == "put":
                waiting[sent.request_id] = outbox.put(sent.buffers, sent.nbytes, sent.out)
            else:
                frame = outbox.send(sent.buffers, sent.nbytes, sent.out)
                if frame is not None:
                    waiting[sent.request_id] = frame
        elif step == "flush":
            outbox.flush()
        elif step == "discard" and waiting:
            number = list(waiting)[numbers[0] % len(waiting)]
            frame = waiting[number]
            started = frame.started
            if outbox.discard(frame, number):
                assert not started
                expected.remove(("request", number))
                del waiting[number]
            else:
                assert started
        elif step == "segments":
            for has_descriptor in numbers:
                fd = os.open(os.devnull, os.O_RDONLY) if has_descriptor else None
                arena.new.append(Segment(next_segment, fd))
                expected.append(("segment", next_segment))
                announced += has_descriptor
                next_segment += 2
            outbox.put_control_frames()
        elif step == "returns":
            for _ in range(sum(numbers)):
                arena.returns.append((9, next_return))
                next_return += 1
            outbox.put_control_frames()
        elif step == "small":
            note_small(outbox.send_small(outbox.session.cancel(7)), 7)
        unsent = sum(memoryview(buffer).nbytes for frame in outbox.frames for buffer in frame.buffers)
        assert outbox.queued_nbytes == unsent
    drain(outbox)
    outbox.put_returns()
    drain(outbox)
    assert outbox.idle and outbox.queued_nbytes == 0
    came = parse(bytes(transport.taken))
    names = {Kind.REQUEST: "request", Kind.CANCEL: "cancel", Kind.SEGMENT: "segment"}
    got = [
        (names[each.kind], each.attrs["id"] if each.kind == Kind.SEGMENT else each.request_id)
        for each in came
        if each.kind != Kind.RETURN
    ]
    assert got == expected
    assert sorted(offset for each in came for offset in each.returns[1::2]) == list(range(next_return))
    assert len(transport.descriptors) == announced
    assert set(outbox.session.requests) == {number for name, number in expected if name == "request"}


# ---- a blocking end --------------------------------------------------------------------------------------------------


def test_a_blocking_end_waits_for_room() -> None:
    transport = Transport([10, 0, 20])
    outbox = make(transport)
    sent = request(outbox, 100)
    assert outbox.send(sent.buffers, sent.nbytes) is not None
    blocking.flush(outbox, None)
    assert transport.calls == [("send", 2), ("wait",), ("send", 2), ("wait",), ("send", 2), ("wait",), ("send", 2)]
    assert outbox.idle and bytes(transport.taken) == sent.data
    blocking.flush(outbox, None)
    assert len(transport.calls) == 7


def test_a_sender_sends_the_rest_and_says_what_became_of_it() -> None:
    workers = Workers(1, "sender")
    told: list[Any] = []
    done = threading.Event()

    def note(failure: Any) -> None:
        told.append(failure)
        done.set()

    for lost in (False, True):
        done.clear()
        transport = Transport([10, 5])
        outbox = make(transport)
        sent = request(outbox, 100)
        assert outbox.send(sent.buffers, sent.nbytes) is not None
        transport.lost = lost
        assert blocking.flush_in(workers, outbox, None, note) and done.wait(5)
        assert outbox.idle != lost
    assert told[0] is None and isinstance(told[1], PeerLostError) and told[1].__traceback__ is None
    workers.shutdown()
    assert not blocking.flush_in(workers, outbox, None, note) and len(told) == 2


def test_the_rest_of_a_small_frame_follows_at_once_or_the_connection_ends() -> None:
    transport = Transport([3])
    outbox = make(transport)
    assert blocking.send_small(outbox, outbox.session.cancel(1)) and outbox.idle and ids(transport) == [1]
    transport = Transport([3], then=0)
    outbox = make(transport)
    started = time.monotonic()
    with pytest.raises(PeerLostError, match="the peer took only a part of a frame"):
        blocking.send_small(outbox, outbox.session.cancel(1))
    assert transport.shut and 0.005 <= time.monotonic() - started < 1
    transport = Transport([0])
    outbox = make(transport, Arena())
    assert not blocking.send_small(outbox, outbox.session.cancel(1)) and transport.calls == [("send", 1)]


def test_a_ring_beside_a_full_socket_is_tried_again_in_a_moment() -> None:
    transport = Transport(whole_frames=True)
    outbox = make(transport)
    outbox.needs_retry = True
    started = time.monotonic()
    assert blocking.wait_for_room(outbox, None, reading=False) == (False, True)
    assert time.monotonic() - started >= 0.001


# ---- a socket --------------------------------------------------------------------------------------------------------


def test_through_a_small_socket_all_of_it_arrives() -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    stream = Stream(ours)
    outbox = make(stream)
    came = bytearray()

    def read() -> None:
        while part := theirs.recv(10_007):
            came.extend(part)

    thread = threading.Thread(target=read)
    expected = bytearray()
    rng = np.random.default_rng(5)
    try:
        for n in range(60):
            sent = request(outbox, *map(int, rng.integers(0, 20_000, rng.integers(0, 5))))
            expected += sent.data
            if n % 2:
                outbox.put(sent.buffers, sent.nbytes, sent.out)
            else:
                outbox.send(sent.buffers, sent.nbytes, sent.out)
        assert outbox.queued_nbytes == len(expected) - stream.bytes_sent > 0
        thread.start()
        blocking.flush(outbox, time.monotonic() + 20)
    finally:
        stream.shutdown()
        thread.join()
        stream.close()
        theirs.close()
    assert came == expected and stream.bytes_sent == len(expected)


def test_more_buffers_than_one_call_takes() -> None:
    ours, theirs = socket.socketpair()
    stream = Stream(ours)
    outbox = make(stream)
    buffers = [bytes([n]) * 3 for n in range(150)]
    with theirs:
        assert outbox.send(buffers, 450) is not None
        blocking.flush(outbox, time.monotonic() + 5)
        assert theirs.recv(1000) == b"".join(buffers)
    stream.close()
