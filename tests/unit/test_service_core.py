"""ServiceCore and Service: what a server decides and counts, without sockets, threads or clocks.

Two real sessions talk in memory; what a core has its front do is only noted.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastsplit.errors import (
    ArenaFull,
    CancelledError,
    ConnectError,
    DeadlineError,
    LimitError,
    PeerLostError,
    RemoteProtocolError,
    ResourceError,
    SettingError,
    TensorError,
)
from fastsplit.schema.coding import CASTS, CODECS
from fastsplit.schema.dtypes import BY_NAME
from fastsplit.schema.header import reply_flags
from fastsplit.schema.limits import Limits
from fastsplit.tensors import Outgoing, collect
from fastsplit.wire.call import Call
from fastsplit.wire.events import Error, Event, Failed, Goodbye, Probe, Reply, Request, ReturnsWanted, RingOffered
from fastsplit.wire.options import ServerOptions
from fastsplit.wire.service import CLOSING, Refusal, Service, ServiceCore, tensors_nbytes
from fastsplit.wire.session import Session

FLOAT32 = BY_NAME["float32"].code
URI = "unix:///somewhere"


class _Transport:
    def peer_name(self) -> str:
        return "a peer"


class _Arena:
    """Notes what is lent."""

    def __init__(self) -> None:
        self.lent: list[Sequence[int]] = []

    def lend(self, placements: Sequence[int]) -> None:
        self.lent.append(placements)


class _Connection:
    """What a core needs of a connection, in memory."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.transport = _Transport()
        self.arena: _Arena | None = None
        self.meter: Any = None
        self.coder = SimpleNamespace(accepted=frozenset[int]())
        self.lent_nbytes = 0
        self.prepared: list[tuple[str, float | None, int, Any]] = []
        self.left: str | None = None
        self.rings: list[float] = []
        self.ring_error: Exception | None = None

    def prepare(self, op: str, tensors: Any, deadline: float | None, cast: int, codec: Any) -> Outgoing:
        self.prepared.append((op, deadline, cast, codec))
        assert self.session.peer_limits is not None
        return collect(tensors, self.session.peer_limits)

    def fill(self, stats: Any) -> None:
        stats.bytes_shared = self.lent_nbytes

    def attach_ring(self, event: RingOffered, deadline: float) -> None:
        self.rings.append(deadline)
        if self.ring_error is not None:
            raise self.ring_error

    def leave(self, why: str) -> None:
        self.left = why


class _Front:
    """Notes what a core has it do; says what a Call asks."""

    def __init__(self, core: ServiceCore) -> None:
        self.core = core
        self.has_gone = False
        self.did: list[Any] = []

    def memory_deadline(self, deadline: float | None) -> float:
        return self.core.reply_deadline(deadline)

    def is_cancelled(self, request_id: int) -> bool:
        return request_id in self.core.cancelled

    def has_left(self) -> bool:
        return self.has_gone

    def attach_ring(self, event: RingOffered) -> None:
        self.did.append(event)

    def send_returns(self) -> None:
        self.did.append("returns")

    def answer_probe(self, probe: Probe) -> None:
        self.did.append(probe)


class Pair:
    """A client's session and a server's core, with their handshake done. `now` is the clock."""

    def __init__(self, handlers: dict[str, Callable[[Any], Any]] | None = None, **options: Any) -> None:
        self.now = 1000.0
        options = {"arrays": "numpy", **options}
        self.service = Service(handlers or {}, ServerOptions.of(options), now=lambda: self.now)
        self.service.uri = URI
        self.client = Session(is_client=True, allocate=_allocate)
        self.server = Session(is_client=False, allocate=_allocate, limits=self.service.options.limits)
        self.connection = _Connection(self.server)
        self.core = ServiceCore(self.service, self.connection)  # type: ignore[arg-type]
        self.front = _Front(self.core)
        give(self.server, self.client.hello())
        give(self.client, self.server.hello())

    def request(self, op: str, *arrays: Any, **attrs: Any) -> Request:
        """A request of the client's, as it comes in."""
        out = collect(arrays, Limits())
        _, head = self.client.request(op, out.descs, attrs, out.nbytes)
        (event,) = give(self.server, b"".join([head, *map(bytes, out.buffers)]))
        assert isinstance(event, Request)
        return event

    def begin(self, request: Request, deadline: float | None = None) -> Call:
        call = self.core.begin(self.front, request, deadline)
        assert isinstance(call, Call), call
        return call

    def answer(self, head: bytearray, out: Outgoing | None = None) -> Event:
        """What the client sees of an answer."""
        (event,) = give(self.client, b"".join([head, *map(bytes, out.buffers if out is not None else ())]))
        return event

    def serve(self, request: Request, deadline: float | None = None) -> Event:
        """All that a front does for a request, but for waiting."""
        core, request_id = self.core, request.request_id
        call = core.begin(self.front, request, deadline)
        out = None
        if isinstance(call, Call):
            try:
                out = core.prepare(call, self.service.handlers[call.op](call), core.reply_deadline(deadline))
                head = core.reply(call, out, 7)
            except Exception as error:
                head, out = core.error(request_id, core.failure(self.front, call.op, error)), None
        else:
            head = core.error(request_id, call)
        core.done(request_id)
        return self.answer(head, out)


def give(session: Session, data: bytes | bytearray) -> list[Event]:
    """Gives bytes to a session; what they completed."""
    events: list[Event] = []
    left = memoryview(bytes(data))
    while left:
        buffer = session.receive_buffers()[0]
        part = min(len(buffer), len(left))
        buffer[:part] = left[:part]
        events += session.received(part)
        left = left[part:]
    return [event for event in events if type(event).__name__ != "Hello"]


def _allocate(nbytes: int) -> Any:
    return np.empty(nbytes, np.uint8)


def _of(request_id: int, op: str = "f", refusal: ResourceError | None = None) -> Request:
    """A request as a session makes them."""
    pair = Pair()
    made = pair.request(op)
    return made._replace(request_id=request_id, refusal=refusal)


# ---- admission -------------------------------------------------------------------------------------------------------


def test_admission() -> None:
    core = Pair(limits=Limits(max_inflight=2)).core
    core.admit(1, "one")
    core.admit(5, "five")
    assert core.pending == {1: "one", 5: "five"} and core.inflight == 2
    with pytest.raises(RemoteProtocolError, match=r"^header, request_id: 5, which is in flight already$"):
        core.admit(5)
    with pytest.raises(RemoteProtocolError, match=r"^3 requests in flight, expected at most 2$"):
        core.admit(6)
    core.done(1)
    core.admit(6)
    assert core.pending == {5: "five", 6: None} and core.inflight == 2


def test_a_request_whose_answer_is_being_sent_does_not_count() -> None:
    """The client may have read it already, and may send the next one; but not one of the same number."""
    pair = Pair({"f": lambda call: None}, limits=Limits(max_inflight=1))
    request = pair.request("f")
    pair.core.admit(request.request_id)
    call = pair.begin(request)
    pair.core.reply(call, pair.core.prepare(call, None, 0.0), 0)
    assert pair.core.inflight == 0
    pair.core.admit(77)
    with pytest.raises(RemoteProtocolError, match="1, which is in flight already"):
        pair.core.admit(1)
    with pytest.raises(RemoteProtocolError, match="2 requests in flight, expected at most 1"):
        pair.core.admit(78)
    pair.core.done(1)
    assert pair.core.inflight == 1 and not pair.core.answered
    pair.core.error(77, CLOSING)
    assert pair.core.inflight == 0 and pair.core.answered == {77}


def test_an_answer_to_what_was_never_admitted_counts_nothing() -> None:
    """Of a front that runs requests one after another."""
    pair = Pair({"f": lambda call: None})
    pair.serve(pair.request("f"))
    pair.serve(pair.request("g"))
    assert not pair.core.pending and not pair.core.answered and pair.core.inflight == 0


# ---- why a request does not run --------------------------------------------------------------------------------------


def test_refusals() -> None:
    pair = Pair({"b": len, "a": len})
    core, front = pair.core, pair.front
    assert core.begin(front, _of(1, "x"), None) == ("unknown-op", "no such operation here; there are: a, b")
    full = ArenaFull("no memory for a tensor: none left")
    refused = core.begin(front, _of(1, "a", full), None)
    assert refused == ("failed", "ArenaFull: no memory for a tensor: none left")
    pair.now = 1000.0
    late = Refusal("deadline", "its deadline passed before it ran")
    assert core.begin(front, _of(1, "a"), 1000.0) == core.begin(front, _of(1, "a"), 999.0) == late
    assert isinstance(core.begin(front, _of(1, "a"), 1000.1), Call)
    core.cancelled.add(1)
    assert core.begin(front, _of(1, "a"), None) == ("cancelled", "cancelled before it ran")
    assert not core.cancelled and isinstance(core.begin(front, _of(1, "a"), None), Call)
    assert Pair().core.begin(front, _of(1), None) == ("unknown-op", "no such operation here; there are: none")


def test_which_reason_comes_first() -> None:
    pair = Pair()
    request = _of(1, "x", ArenaFull("full"))
    pair.core.cancelled.add(1)
    codes = [pair.core.begin(pair.front, request, 0.0), pair.core.begin(pair.front, request, 0.0)]
    codes += [pair.core.begin(pair.front, request, None)]
    assert [code for code, _ in codes] == ["cancelled", "deadline", "failed"]  # type: ignore[misc]


def test_a_tensor_that_the_arrays_cannot_be(caplog: pytest.LogCaptureFixture) -> None:
    def view(buffer: Any, desc: Any) -> Any:
        raise TensorError("no such dtype")

    pair = Pair({"f": len})
    pair.core._view = view
    assert pair.core.begin(pair.front, pair.request("f", np.ones(3)), None) == ("failed", "TensorError: no such dtype")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"{URI}: the handler of 'f' failed for a peer: TensorError: no such dtype"


# ---- calls -----------------------------------------------------------------------------------------------------------


def test_what_a_call_has() -> None:
    pair = Pair({"f": len})
    x = np.arange(5, dtype=np.float32)
    request = pair.request("f", x, x[:2], n=3)
    call = pair.begin(request, pair.now + 5)
    assert (call.op, call.attrs, call.reply_attrs) == ("f", {"n": 3}, {})
    assert [tensor.tolist() for tensor in call.tensors] == [x.tolist(), [0, 1]]
    assert call.client is pair.core.client
    assert request.buffers == []  # the call alone has them
    assert tensors_nbytes(request) == 28
    assert not pair.begin(pair.request("f")).attrs


def test_handlers_that_come_later_are_found() -> None:
    pair = Pair()
    assert isinstance(pair.serve(pair.request("f")), Error)
    pair.service.handlers["f"] = lambda call: None
    assert isinstance(pair.serve(pair.request("f")), Reply)


def test_whether_a_call_is_cancelled() -> None:
    pair = Pair({"f": len})
    request = pair.request("f")
    pair.core.admit(request.request_id)
    call = pair.begin(request)
    assert not call.cancelled
    assert pair.core.cancel(request.request_id) and call.cancelled
    pair.core.cancelled.clear()
    pair.front.has_gone = True
    assert call.cancelled
    pair.front.has_gone = False
    pair.core.end(None)
    assert call.cancelled
    assert pair.begin(pair.request("f"), 1e9).remaining_s is not None
    assert pair.begin(pair.request("f")).remaining_s is None


@pytest.mark.parametrize("kept", ["the tensor", "nothing"])
def test_a_calls_tensors_are_released_before_the_reply_is_made(kept: str) -> None:
    pair = Pair({"f": len})
    call = pair.begin(pair.request("f", np.ones(3, np.float32)))
    out = pair.core.prepare(call, call.tensors if kept == "the tensor" else None, 0.0)
    assert call.tensors == () and len(out.descs) == (kept == "the tensor")


@pytest.mark.parametrize(
    ("result", "count"),
    [(None, 0), ((), 0), ([], 0), (np.ones(2), 1), ((np.ones(2), np.ones(2)), 2), ([np.ones(2)], 1)],
)
def test_results(result: Any, count: int) -> None:
    pair = Pair({"f": lambda call: result})
    event = pair.serve(pair.request("f"))
    assert isinstance(event, Reply) and len(event.buffers) == count and event.time_ns == 7


@pytest.mark.parametrize(
    ("cast", "codec", "accepts", "expected"),
    [
        (None, None, (), (0, "own")),
        (CASTS["bfloat16"], None, ("bfloat16",), (CASTS["bfloat16"], "own")),
        (CASTS["bfloat16"], None, ("float16",), (0, "own")),
        (None, CODECS["zlib"], ("zlib",), (0, CODECS["zlib"])),
        (None, CODECS["zlib"], ("lz4",), (0, "own")),
        (None, 0, (), (0, 0)),
        (CASTS["float16"], CODECS["lz4"], ("float16", "lz4"), (CASTS["float16"], CODECS["lz4"])),
    ],
)
def test_which_coding_a_reply_gets(cast: Any, codec: Any, accepts: tuple[str, ...], expected: tuple[int, Any]) -> None:
    """The one that the request asks for, if this side has it; else the server's own."""
    pair = Pair({"f": len}, codec="zlib")
    codings = {CASTS[name] << 4 if name in CASTS else CODECS[name] for name in accepts}
    pair.connection.coder.accepted = frozenset(codings)
    request = pair.request("f")._replace(flags=reply_flags(cast or 0, codec))
    call = pair.begin(request)
    pair.core.prepare(call, None, 5.0)
    own = pair.service.options.codec
    assert pair.connection.prepared == [("f", 5.0, expected[0], own if expected[1] == "own" else expected[1])]


def test_reply_deadlines() -> None:
    core = Pair(send_timeout_s=30).core
    assert core.reply_deadline(None) == 1030 and core.reply_deadline(5.0) == 5.0


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_accounting() -> None:
    pair = Pair({"f": lambda call: np.arange(10, dtype=np.float32)[::2], "bad": lambda call: "text"})
    arena = pair.connection.arena = _Arena()
    for count in (1, 2):
        request = pair.request("f")
        call = pair.begin(request)
        out = pair.core.prepare(call, pair.service.handlers["f"](call), 0.0)
        out = out._replace(placements=[7 * count, 0, 20], shared_nbytes=20)
        pair.server.reply = lambda *args: bytearray()  # type: ignore[method-assign]  # it has no segment 7
        pair.core.reply(call, out, 0)
        del pair.server.reply  # type: ignore[method-assign]
        assert arena.lent[-1] is out.placements and pair.connection.lent_nbytes == 20 * count
        stats = pair.core.stats()
        assert (stats.calls, stats.bytes_copied, stats.bytes_shared) == (count, 20 * count, 20 * count)
    assert isinstance(pair.serve(pair.request("bad")), Error)
    assert isinstance(pair.serve(pair.request("none")), Error)
    assert pair.core.stats().calls == 2  # replies alone


@pytest.mark.parametrize(
    ("attrs", "kind"), [({"a": None}, SettingError), ({5: 1}, SettingError), ({"a": "x" * 100_000}, LimitError)]
)
def test_a_reply_that_cannot_travel_changes_nothing(attrs: Any, kind: type[Exception]) -> None:
    pair = Pair({"f": lambda call: call.reply_attrs.update(attrs)})
    pair.connection.arena = _Arena()
    request = pair.request("f")
    pair.core.admit(request.request_id)
    call = pair.begin(request)
    out = pair.core.prepare(call, pair.service.handlers["f"](call), 0.0)
    with pytest.raises(kind):
        pair.core.reply(call, out, 0)
    assert not pair.connection.arena.lent and pair.core.stats().calls == 0 and pair.core.inflight == 1
    event = pair.answer(pair.core.error(request.request_id, pair.core.failure(pair.front, "f", kind("no"))))
    assert event == Error(request.request_id, "failed", f"{kind.__name__}: no")


# ---- failures --------------------------------------------------------------------------------------------------------


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "level", "has_trace"),
    [
        (ValueError("bad"), logging.ERROR, True),
        (SystemExit(3), logging.ERROR, True),
        (_Unprintable(), logging.ERROR, True),
        (SettingError("layer: 99"), logging.WARNING, False),
        (ArenaFull("full"), logging.WARNING, False),
        (PeerLostError("of another connection"), logging.WARNING, False),
        (CancelledError("cancelled"), logging.DEBUG, False),
        (KeyboardInterrupt(), logging.DEBUG, True),
    ],
)
def test_a_failure_is_logged_and_answered(
    caplog: pytest.LogCaptureFixture, error: BaseException, level: int, has_trace: bool
) -> None:
    caplog.set_level(logging.DEBUG, "fastsplit.server")
    pair = Pair()
    text = type(error).__name__ if isinstance(error, _Unprintable) else f"{type(error).__name__}: {error}"
    assert pair.core.failure(pair.front, "f", error) == Refusal("failed", text)
    (record,) = caplog.records
    assert record.levelno == level and bool(record.exc_text) == has_trace
    assert record.getMessage() == f"{URI}: the handler of 'f' failed for a peer: {text}"


@pytest.mark.parametrize("how", ["it has left", "its connection has ended", "the handler's own cancellation"])
def test_a_failure_that_only_says_that_the_caller_is_gone(caplog: pytest.LogCaptureFixture, how: str) -> None:
    caplog.set_level(logging.DEBUG, "fastsplit.server")
    pair = Pair()
    pair.front.has_gone = how == "it has left"
    pair.core.ended = how == "its connection has ended"
    error = PeerLostError("the caller") if "own" not in how else ValueError("as asyncio's")
    pair.core.failure(pair.front, "f", error, is_cancelled="own" in how)
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


def test_a_record_keeps_no_frames(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair({"f": lambda call: 1 / 0})
    event = pair.serve(pair.request("f"))
    assert event == Error(1, "failed", "ZeroDivisionError: division by zero")
    (record,) = caplog.records
    assert record.exc_info is None and "ZeroDivisionError" in (record.exc_text or "")


# ---- cancelling ------------------------------------------------------------------------------------------------------


def test_cancelling() -> None:
    core = Pair().core
    assert not core.cancel(1) and not core.cancelled  # not there yet
    core.admit(1)
    assert core.cancel(1) and core.cancelled == {1}
    core.done(1)
    assert not core.cancelled and not core.cancel(1)  # too late
    assert core.cancel(2, is_here=True) and core.cancelled == {2}  # one that a front has elsewhere
    assert not core.cancel(2) and not core.cancelled  # and has no longer


def test_a_cancelled_request_gets_one_answer() -> None:
    pair = Pair({"f": lambda call: None})
    before, running = pair.request("f"), pair.request("f")
    for request in (before, running):
        pair.core.admit(request.request_id)
    call = pair.begin(running)
    for request in (before, running):
        assert pair.core.cancel(request.request_id)
    assert pair.serve(before) == Error(before.request_id, "cancelled", "cancelled before it ran")
    out = pair.core.prepare(call, None, 0.0)
    assert isinstance(pair.answer(pair.core.reply(call, out, 0), out), Reply)  # it runs to its end
    pair.core.done(running.request_id)
    assert not pair.core.cancelled and not pair.core.pending and not pair.client.inflight


# ---- other events ----------------------------------------------------------------------------------------------------


def test_events_that_concern_no_request() -> None:
    pair = Pair()
    pair.connection.meter = SimpleNamespace(on_probe=lambda *seen: pair.front.did.append(seen))
    probe, ring = Probe(3, False, 10, 1e6, 0.01), RingOffered(100, "name")
    for event in (probe, ReturnsWanted(), ring):
        assert pair.core.take(event, pair.front)
    assert pair.front.did == [(1e6, 0.01), probe, "returns", ring]
    assert not pair.core.ended
    assert not pair.core.take(Goodbye(), pair.front) and pair.core.ended


def test_a_probe_where_nothing_is_measured_is_not_answered() -> None:
    pair = Pair()
    assert pair.core.take(Probe(3, False, 10, 1e6, 0.01), pair.front) and not pair.front.did


def test_a_stream_that_failed() -> None:
    pair = Pair()
    broken = RemoteProtocolError("header, magic: wrong")
    with pytest.raises(RemoteProtocolError, match="magic") as told:
        pair.core.take(Failed(broken, tell=True), pair.front)
    assert told.value is not broken  # its own, with its own traceback
    with pytest.raises(PeerLostError, match=r"^the peer ended the connection: why$"):
        pair.core.take(Failed(RemoteProtocolError("the peer ended the connection: why"), tell=False), pair.front)


def test_a_ring() -> None:
    pair = Pair()
    ring = RingOffered(100, "name")
    pair.core.attach_ring(ring, 5.0, is_idle=True)
    assert pair.connection.rings == [5.0]
    with pytest.raises(RemoteProtocolError, match=r"^SEGMENT, id: 0, expected before any request$"):
        pair.core.attach_ring(ring, 5.0, is_idle=False)
    assert pair.connection.rings == [5.0]
    pair.connection.ring_error = DeadlineError("late")
    with pytest.raises(PeerLostError, match=r"^the client did not read the handshake$"):
        pair.core.attach_ring(ring, 5.0, is_idle=True)


# ---- endings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "is_greeted", "closing", "level"),
    [
        (None, True, False, None),
        (RemoteProtocolError("wrong"), True, False, logging.WARNING),
        (PeerLostError("gone"), True, False, logging.WARNING),
        (ResourceError("short"), False, False, logging.WARNING),
        (RemoteProtocolError("wrong"), False, False, logging.WARNING),
        (PeerLostError("gone"), False, False, logging.DEBUG),
        (PeerLostError("gone"), True, True, None),
        (RemoteProtocolError("wrong"), True, True, None),
    ],
)
def test_an_end_is_logged(
    caplog: pytest.LogCaptureFixture, error: Any, is_greeted: bool, closing: bool, level: int | None
) -> None:
    caplog.set_level(logging.DEBUG, "fastsplit.server")
    pair = Pair()
    if not is_greeted:
        pair.server.peer_limits = None
    pair.service.closing = closing
    pair.core.end(error)
    assert pair.core.ended
    assert [record.levelno for record in caplog.records] == ([] if level is None else [level])
    for record in caplog.records:
        assert record.getMessage() == f"{URI}: a connection ended: {error}"


def test_what_ended_a_connection() -> None:
    core = Pair().core
    wrong, gone = RemoteProtocolError("wrong"), PeerLostError("gone")
    assert core.ended_by(wrong, tell=True) is wrong
    assert core.ended_by(gone, tell=False) is core.ended_by(wrong, tell=False) is None  # it has left
    core.admit(1)
    assert core.ended_by(gone, tell=False) is gone  # with a request in flight
    lost = core.ended_by(wrong, tell=False)
    assert type(lost) is PeerLostError and str(lost) == "wrong"  # its own word
    core.done(1)
    core.session.aborted = True
    assert core.ended_by(gone, tell=False) is gone  # it has said that this side is wrong
    core.session.aborted = False
    give(core.session, b"FSPL")
    assert core.ended_by(gone, tell=False) is gone  # in the middle of a frame


@pytest.mark.parametrize("closing", [False, True])
def test_the_end_of_the_stream(closing: bool) -> None:
    pair = Pair()
    pair.service.closing = closing
    pair.core.end_stream()
    assert pair.core.ended is not closing  # a server that closes has stopped reading: answers still go out
    cut = Pair()
    give(cut.server, b"FSPL")
    with pytest.raises(PeerLostError, match="the peer's stream ended"):
        cut.core.end_stream()


def test_a_handshake_that_does_not_come() -> None:
    error = Pair(handshake_timeout_s=0.5).core.no_handshake()
    assert type(error) is RemoteProtocolError and str(error) == "no handshake within 0.5 s"


def test_a_forked_child() -> None:
    pair = Pair()
    ended: list[int] = []
    pair.core.client.on_end(lambda: ended.append(1))
    pair.core.leave("made elsewhere")
    assert pair.core.ended and pair.core.client.ended and pair.connection.left == "made elsewhere" and not ended


# ---- the service -----------------------------------------------------------------------------------------------------


class _Client:
    def __init__(self, pair: Pair) -> None:
        self.core = ServiceCore(pair.service, pair.connection)  # type: ignore[arg-type]


def test_clients_are_admitted_and_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair({"f": lambda call: None}, max_connections=2)
    service, clients = pair.service, [_Client(pair) for _ in "abc"]
    assert service.admit(clients[0]) is service.admit(clients[1]) is None
    full = service.admit(clients[2])
    assert type(full) is ConnectError and str(full) == "2 connections already, the server accepts no more"
    assert service.clients == {*clients[:2]} and not caplog.records
    clients[0].core._stats.calls, clients[1].core._stats.calls = 3, 4
    assert service.stats().calls == 7
    assert service.forget(clients[0]) and not service.forget(clients[0]) and not service.forget(clients[2])
    assert service.stats().calls == 7 and service.clients == {clients[1]}
    assert service.admit(clients[2]) is None


def test_a_client_that_took_the_last_descriptor(caplog: pytest.LogCaptureFixture) -> None:
    service = Pair(max_connections=0).service
    shortage = ResourceError("the server accepts no more connections: no descriptor")
    assert service.admit(object(), shortage) is shortage and not service.clients
    (record,) = caplog.records
    assert record.getMessage() == f"{URI}: a connection was not accepted: {shortage}"
    assert record.levelno == logging.WARNING


# ---- all together ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_request_has_one_answer(seed: int) -> None:
    """Requests, cancellations and answers in any order; the client's session would refuse a second answer."""
    rng = random.Random(seed)
    pair = Pair(
        {"echo": lambda call: call.tensors, "fail": lambda call: 1 / 0, "text": lambda call: "text"},
        limits=Limits(max_inflight=5),
    )
    waiting: list[Request] = []
    answers = 0
    for _ in range(300):
        what = rng.random()
        if what < 0.5 and len(waiting) < 5:
            request = pair.request(rng.choice(["echo", "fail", "text", "none"]), np.ones(3, np.float32))
            pair.core.admit(request.request_id)
            waiting.append(request)
        elif what < 0.7:
            pair.core.cancel(rng.choice(waiting).request_id if waiting and what < 0.65 else rng.randrange(1000))
        elif waiting:
            request = waiting.pop(rng.randrange(len(waiting)))
            deadline = None if rng.random() < 0.8 else pair.now - 1
            assert pair.serve(request, deadline)[0] == request.request_id  # type: ignore[index]
            answers += 1
        assert set(pair.core.pending) == {request.request_id for request in waiting}
        assert pair.core.inflight == pair.client.inflight == len(waiting)
        assert pair.core.cancelled <= set(pair.core.pending)
    assert answers > 50
