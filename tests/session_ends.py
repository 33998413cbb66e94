"""Sessions in a state, and the ways to feed them: without sockets."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from raw_peer import (
    hello,
)

from fastsplit.errors import RemoteProtocolError
from fastsplit.schema.descriptor import TensorDesc
from fastsplit.schema.limits import Limits
from fastsplit.tensors.pool import Pool
from fastsplit.wire.events import (
    Attached,
    Cancel,
    Error,
    Event,
    Failed,
    Goodbye,
    Hello,
    Probe,
    Reply,
    Request,
    ReturnsWanted,
    RingOffered,
)
from fastsplit.wire.session import Session

UINT8 = 2
SERVER, CLIENT = False, True
LIMITS = Limits(max_message_nbytes=2**22, max_tensors=4, max_dims=3)


def make(
    is_client: bool, *, requests: int = 0, greeted: bool = True, allocate: Callable[[int], Any] | None = None
) -> Session:
    session = Session(is_client=is_client, allocate=allocate or Pool().allocate, limits=LIMITS)
    if greeted:
        assert feed(session, hello()) == [("hello", Limits())]
    for _ in range(requests):
        session.request("f", (), {}, 0)
    return session


def plain(event: Event) -> Any:
    """An event as values that can be compared: buffers become bytes, errors their text."""
    if isinstance(event, (Request, Reply)):
        kind = "request" if isinstance(event, Request) else "reply"
        buffers = [bytes(buffer) for buffer in event.buffers]
        shapes = [(desc.dtype.code, desc.shape) for desc in event.message.tensors]
        return kind, event.request_id, event.message.op, shapes, dict(event.message.attrs), buffers, event.time_ns
    if isinstance(event, Error):
        return "error", event.request_id, event.code, event.text
    if isinstance(event, Cancel):
        return "cancel", event.request_id
    if isinstance(event, Hello):
        return "hello", event.limits
    if isinstance(event, Goodbye):
        return ("goodbye",)
    if isinstance(event, RingOffered):
        return "ring", event.nbytes, event.name
    if isinstance(event, Attached):
        return "attached", event.text
    if isinstance(event, ReturnsWanted):
        return ("returns wanted",)
    if isinstance(event, Probe):
        return ("probe", event.number)
    assert isinstance(event, Failed) and type(event.error) is RemoteProtocolError
    return "failed", str(event.error), event.tell


def feed(session: Session, data: bytes, sizes: Callable[[], int] = lambda: 2**30) -> list[Any]:
    """Reads as a link would, `sizes()` bytes at most each time, and stops where the stream is dead."""
    events: list[Any] = []
    at = 0
    while at < len(data):
        target = session.receive_buffers()[0]
        part = data[at : at + min(len(target), sizes())]
        target[: len(part)] = part
        at += len(part)
        events += map(plain, session.received(len(part)))
        if events and events[-1][0] == "failed":
            break
    return events


class Memory:
    """What a session needs of an arena: one segment, number 2 or 1, whose bytes count up, and notes of all calls."""

    def __init__(self) -> None:
        self.returns: deque[tuple[int, int]] = deque()
        self.calls: list[tuple[Any, ...]] = []
        self.bytes = np.arange(4096).astype(np.uint8)

    def take_returns(self, at_most: int) -> list[int]:
        return [number for _ in range(min(at_most, len(self.returns))) for number in self.returns.popleft()]

    def requeue_returns(self, taken: Sequence[int]) -> None:
        self.returns.extendleft(reversed(list(zip(taken[::2], taken[1::2], strict=True))))

    def attach(self, segment_id: int, nbytes: int, name: str) -> None:
        self.calls.append(("attach", segment_id, nbytes, name))

    def retire(self, segment_id: int) -> None:
        self.calls.append(("retire", segment_id))

    def resolve(self, segment_id: int, offset: int, desc: TensorDesc) -> Any:
        if segment_id > 2:
            raise RemoteProtocolError("placement: nowhere")
        self.calls.append(("resolve", segment_id, offset, desc.nbytes))
        return self.bytes[offset : offset + desc.nbytes]

    def returned(self, returns: Sequence[int]) -> None:
        self.calls.append(("returned", *returns))


def sharing(is_client: bool, *, requests: int = 0, capabilities: int = 0) -> tuple[Session, Memory]:
    """An open session with shared memory."""
    memory = Memory()
    greeted: list[Any] = []

    def agree(attrs: dict[str, Any], limits: Limits) -> Memory:
        greeted.append((attrs["shm"], limits))
        return memory

    session = Session(
        is_client=is_client, allocate=Pool().allocate, limits=LIMITS, on_hello=agree, capabilities=capabilities
    )
    assert feed(session, hello(shm="tape", capabilities=capabilities)) == [("hello", Limits())] and greeted == [
        ("tape", Limits())
    ]
    for _ in range(requests):
        session.request("f", (), {}, 0)
    return session, memory


def feed_slots(session: Session, data: bytes, slot_nbytes: int = 1024) -> list[Any]:
    """One frame, slot by slot, the last one filled up with what was there before."""
    events: list[Any] = []
    for at in range(0, len(data), slot_nbytes):
        slot = data[at : at + slot_nbytes]
        events += map(plain, session.received_slot(slot + b"\xff" * (slot_nbytes - len(slot))))
    return events


def feeds(data: bytes) -> list[Callable[[Session], list[Any]]]:
    """The ways that a frame can come in."""
    return [
        lambda session: feed(session, data),
        lambda session: feed(session, data, lambda: 1),
        lambda session: feed_slots(session, data),
        lambda session: feed_slots(session, data, 64),
    ]
