"""The client's core, driven by a session in memory: each event, each ending, what is counted. No socket, no thread."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastsplit.errors import (
    ArenaFull,
    CancelledError,
    ClosedError,
    DeadlineError,
    FastsplitError,
    LimitError,
    PeerLostError,
    RemoteOpError,
    RemoteProtocolError,
    ResourceError,
    SettingError,
    TensorError,
)
from fastsplit.schema.coding import CASTS, CODECS
from fastsplit.schema.header import wanted_reply
from fastsplit.schema.limits import Limits
from fastsplit.tensors import collect, parse_expect
from fastsplit.tensors.pool import Pool
from fastsplit.wire.client import UNSET, ClientCore, ClientFront, probe_sizes
from fastsplit.wire.events import Attached, Event, Failed, Goodbye, Probe, Reply, Request, ReturnsWanted
from fastsplit.wire.options import AioClientOptions, ClientOptions
from fastsplit.wire.result import Result
from fastsplit.wire.session import Session
from fastsplit.wire.transport.meter import LinkEstimate

X = np.arange(6, dtype=np.float32)


class Coder:
    """What was agreed on: bfloat16 and zlib."""

    def __init__(self) -> None:
        self.checked: list[tuple[int, Any]] = []

    def check(self, cast: int, codec: Any) -> None:
        self.checked.append((cast, codec))
        if cast == CASTS["float16"]:
            raise SettingError("wire_dtype: 'float16', which the peer does not know")


class Meter:
    def __init__(self) -> None:
        self.answers: list[tuple[int, float]] = []

    def on_answer(self, number: int, bytes_per_s: float) -> bool:
        self.answers.append((number, bytes_per_s))
        return number == 1


class Connection:
    """What the core uses of one, without a transport."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.coder, self.meter = Coder(), Meter()
        self.arena: Any = None
        self.can_code = True
        self.lent_nbytes = 0
        self.is_near = True
        self.estimate = LinkEstimate(0.001)
        self.shm_reason = "off"
        self.filled = 0
        self._probes = 0

    def probe(self, nbytes: int) -> tuple[int, list[Any]]:
        self._probes += 1
        return self._probes, [bytearray(nbytes)]

    def fill(self, stats: Any) -> None:
        self.filled += 1


class Call:
    """A call in flight, as a front has it."""

    def __init__(self, op: str, sent_ns: int) -> None:
        self.op, self._sent_ns = op, sent_ns


class Front:
    """Notes what the core asks for."""

    def __init__(self) -> None:
        self.settled: list[tuple[Call, Result | None, FastsplitError | None]] = []
        self.ends: list[tuple[FastsplitError, bool]] = []
        self.returns = 0
        self.interrupts = 0

    def settle(self, call: Call, result: Result | None, error: FastsplitError | None) -> None:
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        self.settled.append((call, result, error))

    def failed(self, error: FastsplitError, *, tell: bool) -> None:
        self.ends.append((error, tell))

    def send_returns(self) -> None:
        self.returns += 1


def _feed(session: Session, *frames: Any) -> list[Event]:
    events: list[Event] = []
    for data in frames:
        left = bytes(data)
        while left and not (events and isinstance(events[-1], Failed)):  # then the stream is dead
            target = session.receive_buffers()[0]
            part, left = left[: len(target)], left[len(target) :]
            target[: len(part)] = part
            events += session.received(len(part))
    return events


class Pair:
    """A core and its server's session. Tensors go there, frames come back."""

    def __init__(
        self, options: dict[str, Any] | None = None, limits: Limits | None = None, allocate: Any = None
    ) -> None:
        self.server = Session(is_client=False, allocate=Pool().allocate, limits=limits, capabilities=2)
        client = Session(is_client=True, allocate=allocate or Pool().allocate, capabilities=2)
        self.core = ClientCore("unix:///there", ClientOptions.of({"arrays": "numpy", **(options or {})}))
        self.connection = Connection(client)
        self.front = Front()
        self.core.open(self.connection)  # type: ignore[arg-type]
        _feed(self.server, client.hello())
        self.server._known_flags = 0xFF  # as where codings were agreed on
        self.come(self.server.hello())

    def come(self, *frames: Any) -> None:
        """What the server sends is read and handled."""
        for event in _feed(self.core.session, *frames):
            self.core.handle(event, self.front)

    def ask(self, op: str = "f", *tensors: Any, **options: Any) -> tuple[Call, Request]:
        """Encodes a request, and has it read."""
        cast, codec = self.core.coding(options.get("wire_dtype", UNSET), options.get("codec", UNSET))
        out = collect(tensors, self.server.limits)
        expected = parse_expect(options.get("expect"))
        attrs, left_s = options.get("attrs", {}), options.get("left_s")
        request_id, head, sent_ns = self.core.encode(op, out, attrs, left_s, expected, cast, codec, 0)
        call = self.core.calls[request_id] = Call(op, sent_ns)
        (event,) = _feed(self.server, head, *out.buffers)
        assert isinstance(event, Request) and event.request_id == request_id
        return call, event

    def reply(self, request: Request, *tensors: Any, time_ns: int = 0, **attrs: Any) -> list[Any]:
        out = collect(tensors, Limits())
        return [self.server.reply(request.request_id, out.descs, out.nbytes, time_ns, attrs), *out.buffers]


@pytest.fixture
def pair() -> Pair:
    return Pair()


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_nothing_can_be_called_before_it_is_open() -> None:
    core = ClientCore("unix:///there", ClientOptions.of({}))
    assert core.closed and core.refusing and not core.is_open
    for check in (core.check_open, core.check_connected):
        with pytest.raises(ClosedError, match="the channel is closed: not open yet"):
            check()


def test_the_servers_hello_opens_it() -> None:
    pair = Pair(limits=Limits(max_inflight=2))
    core = pair.core
    assert core.has_hello and core.max_inflight == 2 and not core.closed and core.error is None
    core.check_open()
    core.check_connected()
    assert not core.measures  # without the capability


def test_the_answer_to_the_ring_is_taken_once(pair: Pair) -> None:
    texts: list[str] = []
    pair.core.handle(Attached("unasked"), pair.front)
    pair.core.on_attached = texts.append
    for text in ("no room", "again"):
        pair.core.handle(Attached(text), pair.front)
        assert pair.core.on_attached is None
    assert texts == ["no room"]


# ---- requests --------------------------------------------------------------------------------------------------------


def test_a_request_is_encoded_and_counted(pair: Pair) -> None:
    _, request = pair.ask("scale", X, X[::2], attrs={"by": 2}, left_s=0.5)
    assert (request.message.op, dict(request.message.attrs), request.time_ns) == ("scale", {"by": 2}, 500_000_000)
    assert [bytes(buffer) for buffer in request.buffers] == [X.tobytes(), X[::2].tobytes()]
    stats = pair.core.stats
    assert (stats.calls, stats.bytes_copied, stats.bytes_shared) == (1, 12, 0) and stats.serialization_s > 0
    assert pair.core.session.inflight == len(pair.core.calls) == 1


@pytest.mark.parametrize(("left_s", "time_ns"), [(None, 0), (2, 2 * 10**9), (1e-9, 1), (0.0, 1), (-3.0, 1)])
def test_a_request_says_how_much_time_is_left(pair: Pair, left_s: float | None, time_ns: int) -> None:
    """None of it is not the same as no deadline."""
    assert pair.ask(left_s=left_s)[1].time_ns == time_ns


def test_what_goes_by_reference_is_counted(pair: Pair) -> None:
    out = SimpleNamespace(descs=(), nbytes=0, placements=(), copied_nbytes=0, shared_nbytes=70)
    pair.core.encode("f", out, {}, None, None, 0, 0, 0)  # type: ignore[arg-type]
    assert pair.connection.lent_nbytes == 70


@pytest.mark.parametrize("wire_dtype", [UNSET, None, "bfloat16"])
@pytest.mark.parametrize("codec", [UNSET, "auto", "off", "zlib"])
@pytest.mark.parametrize("options", [{}, {"wire_dtype": "bfloat16", "codec": "zlib"}, {"codec": "off"}], ids=str)
def test_a_request_says_how_its_reply_is_wanted(wire_dtype: Any, codec: Any, options: dict[str, Any]) -> None:
    pair = Pair(options)
    request = pair.ask(wire_dtype=wire_dtype, codec=codec)[1]
    cast_name = options.get("wire_dtype") if wire_dtype is UNSET else wire_dtype
    codec_name = options.get("codec", "auto") if codec is UNSET else codec
    cast = CASTS.get(cast_name, 0)
    number = None if codec_name == "auto" else CODECS.get(codec_name, 0)
    assert wanted_reply(request.flags) == (cast, number)
    own = wire_dtype is not UNSET or codec is not UNSET
    assert pair.connection.coder.checked == ([(cast, number)] if own else [])
    pair.connection.can_code = False
    assert pair.ask(wire_dtype=wire_dtype, codec=codec)[1].flags == 0


def test_a_coding_that_was_not_agreed_on_is_refused_unless_memory_is_shared(pair: Pair) -> None:
    with pytest.raises(SettingError, match="float16"):
        pair.core.coding("float16", UNSET)
    with pytest.raises(SettingError, match="codec: 'gzip'"):
        pair.core.coding(UNSET, "gzip")
    pair.core.cast = CASTS["float16"]
    with pytest.raises(SettingError, match="float16"):
        pair.core.check_coding()
    pair.connection.arena = object()
    pair.core.check_coding()
    assert pair.core.has_shm and pair.core.coding("float16", UNSET) == (CASTS["float16"], None)


def test_the_servers_limit_holds() -> None:
    pair = Pair(limits=Limits(max_inflight=2))
    first = pair.ask()[1]
    pair.ask()
    assert pair.core.session.inflight == pair.core.max_inflight == 2
    with pytest.raises(LimitError, match="'f': 2 requests in flight, the peer accepts 2"):
        pair.ask()
    assert pair.core.stats.calls == 2
    pair.come(*pair.reply(first))
    pair.ask()


def test_what_cannot_be_encoded_leaves_nothing(pair: Pair) -> None:
    for op, attrs in ((3, {}), ("f", {"x": None})):
        with pytest.raises(SettingError):
            pair.core.encode(op, collect((), Limits()), attrs, None, None, 0, 0, 0)  # type: ignore[arg-type]
    assert pair.core.stats.calls == pair.core.session.inflight == 0


def test_a_request_that_is_discarded_was_never_there(pair: Pair) -> None:
    request_id, _, sent_ns = pair.core.encode("f", collect((), Limits()), {}, None, None, 0, 0, 0)
    pair.core.calls[request_id] = Call("f", sent_ns)
    pair.core.discard(request_id)
    pair.core.discard(request_id)
    assert not pair.core.calls and pair.core.session.inflight == 0
    call, request = pair.ask()
    pair.come(*pair.reply(request))
    assert [settled[0] for settled in pair.front.settled] == [call]


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_a_reply_is_the_result_of_its_call(pair: Pair) -> None:
    first, second = pair.ask("a", X), pair.ask("b")
    pair.come(*pair.reply(second[1], X * 2, time_ns=10, n=1), *pair.reply(first[1]))
    (call, result, error), (other, empty, _) = pair.front.settled
    assert (call, other) == (second[0], first[0]) and error is None and empty == ()
    assert result is not None and np.array_equal(result[0], X * 2) and result.attrs == {"n": 1}
    assert result[0].flags.writeable and result.wait_s > 0 and result.remote_s == 10e-9
    assert not pair.core.calls and pair.core.session.inflight == 0
    assert pair.core.stats.remote_s == 10e-9


def test_a_server_has_not_worked_longer_than_was_waited(pair: Pair) -> None:
    pair.come(*pair.reply(pair.ask()[1], time_ns=2**62))
    result = pair.front.settled[0][1]
    assert result is not None and result.remote_s == result.wait_s == pair.core.stats.remote_s < 60


def test_making_results_is_decoding(pair: Pair) -> None:
    before_ns = pair.core.session.decode_ns
    view = pair.core.arrays.view
    slow = SimpleNamespace(view=lambda *args: [sum(range(200_000)), view(*args)][1])
    pair.core.arrays = slow  # type: ignore[assignment]
    pair.come(*pair.reply(pair.ask()[1], X))
    assert pair.core.session.decode_ns - before_ns > 500_000


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        ("failed", RemoteOpError, "f: it did not"),
        ("unknown-op", RemoteOpError, "f: it did not"),
        ("deadline", DeadlineError, "^f: it did not$"),
        ("cancelled", CancelledError, "^f: it did not$"),
    ],
)
def test_an_error_is_the_calls(pair: Pair, code: str, error: type[Exception], text: str) -> None:
    call, request = pair.ask()
    pair.come(pair.server.error(request.request_id, code, "it did not"))
    ((settled, result, came),) = pair.front.settled
    assert settled is call and result is None and type(came) is error
    with pytest.raises(error, match=text):
        raise came  # type: ignore[misc]
    assert not pair.core.calls and not pair.front.ends


def test_answers_of_cancelled_calls_are_dropped(pair: Pair) -> None:
    _, first = pair.ask()
    _, second = pair.ask()
    for request in (first, second):
        pair.core.calls.pop(request.request_id)
        assert pair.core.session.mark_cancelled(request.request_id)
    pair.come(*pair.reply(first, X), pair.server.error(second.request_id, "cancelled", "x"))
    assert not pair.front.settled and pair.core.session.inflight == 0 and pair.core.stats.remote_s == 0


def test_a_reply_that_there_is_no_memory_for_costs_its_call() -> None:
    def full(nbytes: int) -> Any:
        raise ArenaFull("no room")

    pair = Pair(allocate=full)
    pair.come(*pair.reply(pair.ask()[1], X))
    assert isinstance(pair.front.settled[0][2], ResourceError)
    pair.come(*pair.reply(pair.ask()[1]))
    assert pair.front.settled[1][1] == () and not pair.front.ends and not pair.core.calls


def test_a_reply_that_no_array_can_be_costs_its_call(pair: Pair) -> None:
    def view(*_: Any) -> Any:
        raise TensorError("a dtype that numpy has not")

    pair.core.arrays = SimpleNamespace(view=view)  # type: ignore[assignment]
    pair.come(*pair.reply(pair.ask()[1], X))
    assert isinstance(pair.front.settled[0][2], TensorError) and not pair.core.calls and not pair.front.ends


@pytest.mark.parametrize("answer", ["reply", "error"])
def test_an_event_that_was_interrupted_is_handled_again(pair: Pair, answer: str) -> None:
    call, request = pair.ask()
    frames = pair.reply(request, X) if answer == "reply" else [pair.server.error(request.request_id, "failed", "no")]
    (event,) = _feed(pair.core.session, *frames)
    pair.front.interrupts = 2
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pair.core.handle(event, pair.front)
        assert pair.core.calls
    for _ in range(2):  # and once more, when all is done
        pair.core.handle(event, pair.front)
    assert [settled[0] for settled in pair.front.settled] == [call] and not pair.core.calls


def test_a_reply_that_is_not_as_expected_ends_the_connection(pair: Pair) -> None:
    expect = [("float32", (6,))]
    pair.come(*pair.reply(pair.ask(expect=expect)[1], X))
    assert pair.front.settled[0][2] is None
    pair.come(*pair.reply(pair.ask(expect=expect)[1], X[:5]))
    ((error, tell),) = pair.front.ends
    assert isinstance(error, RemoteProtocolError) and tell and "a reply's tensor 0" in str(error)


def test_an_answer_that_was_not_asked_for_ends_the_connection(pair: Pair) -> None:
    request = pair.ask()[1]
    pair.come(*pair.reply(request), *pair.reply(request))
    ((error, tell),) = pair.front.ends
    assert isinstance(error, RemoteProtocolError) and tell and "expected one that has no answer yet" in str(error)
    assert len(pair.front.settled) == 1


# ---- memory and probes -----------------------------------------------------------------------------------------------


def test_returns_are_sent_when_the_server_wants_them(pair: Pair) -> None:
    pair.core.handle(ReturnsWanted(), pair.front)
    assert pair.front.returns == 1


def test_a_probe_waits_for_its_answer(pair: Pair) -> None:
    assert probe_sizes(100) == (0, 100, 0)
    assert pair.core.probe(10) == (1, [bytearray(10)]) and pair.core.probe(0)[0] == 2
    pair.core.handle(Probe(1, True, 0, 5e6, 0.0), pair.front)
    assert pair.core.probes == {2} and pair.connection.meter.answers == [(1, 5e6)]
    pair.core.handle(Probe(7, True, 0, 1.0, 0.0), pair.front)  # not asked for: it changes nothing
    assert pair.core.probes == {2} and not pair.front.ends
    pair.connection.meter = None  # type: ignore[assignment]  # memory is shared by now
    pair.core.handle(Probe(2, True, 0, 1.0, 0.0), pair.front)
    assert not pair.core.probes


# ---- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "error", "told"),
    [
        (Goodbye(), PeerLostError("the server closed the connection"), False),
        (Failed(RemoteProtocolError("bad"), True), RemoteProtocolError("bad"), True),
        (Failed(PeerLostError("it left"), False), PeerLostError("it left"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_the_connection(pair: Pair, event: Event, error: FastsplitError, told: bool) -> None:
    pair.core.handle(event, pair.front)
    ((came, tell),) = pair.front.ends
    assert (type(came), str(came), tell) == (type(error), str(error), told)


def test_a_servers_last_frames(pair: Pair) -> None:
    request = pair.ask()[1]
    pair.come(*pair.reply(request), pair.server.goodbye())
    assert len(pair.front.settled) == 1 and str(pair.front.ends[0][0]) == "the server closed the connection"


def test_every_call_in_flight_gets_the_first_error(pair: Pair) -> None:
    core = pair.core
    core.on_attached = lambda _: None
    calls = [pair.ask()[0] for _ in range(3)]
    first = core.fail(PeerLostError("gone"), pair.front.settle)
    second = core.fail(ClosedError("closed"), pair.front.settle)
    assert (str(first), type(second), str(second)) == ("gone", PeerLostError, "gone")
    assert [settled[0] for settled in pair.front.settled] == calls
    errors = [settled[2] for settled in pair.front.settled]
    assert len({id(error) for error in (*errors, first, second, core.error)}) == 6, "each has its own traceback"
    assert {str(error) for error in errors} == {"gone"}
    assert core.closed and core.refusing and not core.calls and core.on_attached is None
    for check in (core.check_open, core.check_connected):
        with pytest.raises(ClosedError, match=r"^the channel is closed: gone$"):
            check()
    with pytest.raises(PeerLostError, match=r"^gone$"):
        core.raise_error()


def test_an_end_that_was_interrupted_goes_on(pair: Pair) -> None:
    calls = [pair.ask()[0] for _ in range(2)]
    pair.front.interrupts = 1
    with pytest.raises(KeyboardInterrupt):
        pair.core.fail(PeerLostError("gone"), pair.front.settle)
    assert pair.core.closed and len(pair.core.calls) == 2
    pair.core.fail(ClosedError("closed"), pair.front.settle)
    assert [(call, str(error)) for call, _, error in pair.front.settled] == [(call, "gone") for call in calls]


def test_a_channel_that_is_being_closed_refuses_calls(pair: Pair) -> None:
    pair.core.refusing = True
    with pytest.raises(ClosedError, match=r"^the channel is being closed$"):
        pair.core.check_open()
    pair.core.check_connected()


def test_the_core_keeps_no_front(pair: Pair) -> None:
    request = pair.ask()[1]
    pair.come(*pair.reply(request))
    pair.core.fail(ClosedError("over"), pair.front.settle)
    gone = weakref.ref(pair.front)
    gc.disable()
    try:
        del pair.front
        assert gone() is None
    finally:
        gc.enable()


# ---- what both fronts show -------------------------------------------------------------------------------------------


def test_what_is_known_of_a_channel() -> None:
    pair = Pair({"wire_dtype": "bfloat16", "codec": "zlib", "call_timeout_s": 7})
    channel = ClientFront(pair.core)
    assert (channel.uri, channel.wire_dtype, channel.codec, channel.call_timeout_s) == (
        "unix:///there",
        "bfloat16",
        "zlib",
        7.0,
    )
    assert repr(channel) == "<Channel to unix:///there, open>" and not channel.closed
    assert (channel.shm, channel.shm_reason, channel.near, channel.link) == (False, "off", True, LinkEstimate(0.001))
    assert channel.inflight == 0 and channel.trim() == 0
    pair.ask()
    assert channel.inflight == 1 and channel.stats.calls == 1 and channel.stats is pair.core.stats
    assert pair.connection.filled == 2
    pair.connection.arena = SimpleNamespace(trim=lambda idle_s: 5 if idle_s == 0.0 else 0)
    assert channel.shm and channel.trim() == 5
    pair.core.fail(ClosedError("over"), pair.front.settle)
    assert channel.closed and repr(channel) == "<Channel to unix:///there, closed>"


def test_settings_change_and_are_checked(pair: Pair) -> None:
    channel = ClientFront(pair.core)
    assert (channel.wire_dtype, channel.codec) == (None, "auto")
    channel.wire_dtype, channel.codec, channel.call_timeout_s = "bfloat16", "off", None
    assert (channel.wire_dtype, channel.codec, channel.call_timeout_s) == ("bfloat16", "off", None)
    for name, value in (("wire_dtype", "float16"), ("wire_dtype", 3), ("codec", "gzip"), ("call_timeout_s", -1)):
        with pytest.raises(SettingError, match=f"^{name}: "):
            setattr(channel, name, value)
    assert (channel.wire_dtype, channel.codec, channel.call_timeout_s) == ("bfloat16", "off", None)


def test_before_it_is_open_a_channel_says_so() -> None:
    channel = ClientFront(ClientCore("unix:///there", AioClientOptions.of({})))
    uses: list[Callable[[], Any]] = [
        lambda: channel.shm,
        lambda: channel.shm_reason,
        lambda: channel.link,
        lambda: channel.near,
        lambda: channel.inflight,
        channel.trim,
        lambda: setattr(channel, "codec", "off"),
        lambda: setattr(channel, "wire_dtype", None),
    ]
    for use in uses:
        with pytest.raises(ClosedError, match="not open yet"):
            use()
    assert channel.closed and channel.stats.calls == 0 and channel.codec == "auto"


def test_a_deadline_is_the_calls_or_the_channels() -> None:
    channel = ClientFront(ClientCore("unix:///there", ClientOptions.of({"call_timeout_s": None})))
    assert channel._deadline(None) == (None, None)
    timeout_s, deadline = channel._deadline(2)
    assert timeout_s == 2.0 and deadline is not None
    channel.call_timeout_s = 3
    assert channel._deadline(None)[0] == 3.0
    with pytest.raises(SettingError, match=r"^timeout_s: 'x', expected"):
        channel._deadline("x")  # type: ignore[arg-type]


def test_a_reply_is_an_event_of_the_session(pair: Pair) -> None:
    """What these tests give the core is what a session makes."""
    (event,) = _feed(pair.core.session, *pair.reply(pair.ask()[1]))
    assert isinstance(event, Reply)
