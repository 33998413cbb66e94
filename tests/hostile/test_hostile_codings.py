"""Peers that lie about coded tensors, flags and probes. Each is told how; nobody else notices."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from aio_front import Front
from raw_peer import CANCEL, ERROR, FLOAT32, HELLO, PROBE, REPLY, REQUEST, RawPeer, connected, frame, hello, serving

import fastsplit
from fastsplit.errors import DeadlineError, RemoteProtocolError
from fastsplit.schema.dtypes import BY_NAME
from fastsplit.schema.limits import Limits

pytestmark = pytest.mark.matrix(one_in=3)

Serve = Callable[..., fastsplit.Server]
Connect = Callable[..., Any]
TCP = "tcp://127.0.0.1:0"
CODINGS, PROBES = 2, 4
ALL = CODINGS | PROBES | 256 | 512 | 65536
BF16, ZLIB = 0x10, 0x01
LIMITS = Limits(max_message_nbytes=2**20)


@pytest.fixture(params=["blocking", "overlap", "aio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """`connect(uri, ...)` of each front, and with `overlap`."""
    front = Front("aio" if request.param == "aio" else "blocking")
    own = {"overlap": True} if request.param == "overlap" else {}
    yield lambda uri, **options: front.connect(uri, **own, **options)
    front.close()


def _dtype_code(name: str) -> int:
    return BY_NAME[name].code


def _coded(
    kind: int, payload: bytes, coding: int = ZLIB, *, dtype: str = "float32", count: int = 1000, **changes: Any
) -> bytes:
    """A frame with one coded tensor."""
    nbytes = changes.pop("nbytes", len(payload))
    place = (coding << 32 | changes.pop("segment", 0), changes.pop("offset", 0), nbytes)
    tensors = [(_dtype_code(dtype), (count,))]
    return frame(kind, 1, "echo" if kind == REQUEST else "", tensors, payload=payload, placements=place, **changes)


ZEROS = zlib.compress(bytes(4000))
LIES: dict[str, tuple[dict[str, Any], str]] = {
    "a codec that was not agreed on": ({"coding": 2}, "tensor 0 codec: 2, expected one that was agreed on"),
    "an unknown codec": ({"coding": 9}, "tensor 0 codec: 9"),
    "an unknown cast": ({"coding": 0x30}, "tensor 0 codec: 48"),
    "padding": ({"coding": 0x101}, "tensor 0 codec: 257"),
    "a cast of float64": ({"coding": BF16, "dtype": "float64", "payload": bytes(4000)}, "a cast of float32 alone"),
    "a cast and compression of int32": ({"coding": BF16 | ZLIB, "dtype": "int32"}, "a cast of float32 alone"),
    "a cast of too few bytes": ({"coding": BF16, "payload": bytes(1998)}, "tensor 0 nbytes: 1998, expected 2000"),
    "a cast of all bytes": ({"coding": BF16, "payload": bytes(4000)}, "tensor 0 nbytes: 4000, expected 2000"),
    "a cast of nothing": ({"coding": BF16, "payload": b"", "count": 0}, "tensor 0 nbytes: 0"),
    "as many bytes as uncompressed": ({"payload": bytes(4000)}, "tensor 0 nbytes: 4000, expected 1 to 3999"),
    "no bytes": ({"payload": b""}, "tensor 0 nbytes: 0, expected 1 to 3999"),
    "as many bytes as after the cast": (
        {"coding": BF16 | ZLIB, "payload": bytes(2000)},
        "tensor 0 nbytes: 2000, expected 1 to 1999",
    ),
    "an offset": ({"offset": 8}, "tensor 0 offset: 8, expected 0"),
    "more bytes than come": ({"nbytes": 3000, "payload": ZEROS}, "header, payload_nbytes"),
    "in shared memory": ({"segment": 1}, "tensor 0 segment: 1, expected 0"),
    "no zlib": ({"payload": b"hello world"}, "compressed tensor, zlib"),
    "one byte less": ({"payload": zlib.compress(bytes(3999))}, "compressed tensor, zlib"),
    "one byte more": ({"payload": zlib.compress(bytes(4001))}, "compressed tensor, zlib"),
    "something behind it": ({"payload": ZEROS + b"x"}, "compressed tensor, zlib"),
    "cut off": ({"payload": ZEROS[:-5]}, "compressed tensor, zlib"),
    "a bomb": ({"payload": zlib.compress(bytes(2**22))[:3999]}, "compressed tensor, zlib"),
    "uncast inside": ({"coding": BF16 | ZLIB}, "compressed tensor, zlib"),
    "over the cap": ({"count": 2**18 + 1}, "at most 1048576 bytes"),
}


@pytest.fixture
def server(serve: Serve) -> fastsplit.Server:
    return serve(TCP, {"echo": lambda call: call.tensors}, arrays="numpy", limits=LIMITS)


def _greeted(peer: RawPeer, capabilities: int = ALL, limits: Limits | None = None) -> None:
    peer.send(hello(limits, capabilities=capabilities))
    peer.expect(HELLO)


def _still_serves(server: fastsplit.Server) -> None:
    with fastsplit.connect(server.uri, arrays="numpy") as channel:
        assert np.array_equal(channel.call("echo", np.ones(2))[0], np.ones(2))


@pytest.mark.parametrize("lie", LIES)
def test_a_client_that_lies_about_a_coded_tensor(server: fastsplit.Server, lie: str) -> None:
    changes, wanted = LIES[lie]
    with connected(server.uri) as peer:
        _greeted(peer)
        peer.send(_coded(REQUEST, **{"payload": ZEROS, **changes}))
        assert wanted in peer.expect_abort()
    _still_serves(server)


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_about_a_coded_tensor(lie: str) -> None:
    changes, wanted = LIES[lie]
    aborts: list[str] = []

    def script(peer: RawPeer) -> None:
        _greeted(peer, ALL & ~PROBES)
        assert peer.receive() is not None
        peer.send(_coded(REPLY, **{"payload": ZEROS, **changes}))
        aborts.append(peer.expect_abort())

    with serving(TCP, script) as uri, fastsplit.connect(uri, arrays="numpy", limits=LIMITS) as channel:
        with pytest.raises(RemoteProtocolError) as caught:
            channel.call("x")
        assert wanted in str(caught.value)
        assert channel.closed
    assert wanted in aborts[0]


def test_many_tensors_are_not_more_than_one(server: fastsplit.Server) -> None:
    """What they unpack to together is capped, not only each."""
    part = zlib.compress(bytes(2**19))
    for count, is_right in ((2, True), (3, False)):
        places = [value for index in range(count) for value in (ZLIB << 32, index * len(part), len(part))]
        request = frame(REQUEST, 1, "echo", [(FLOAT32, (2**17,))] * count, payload=part * count, placements=places)
        with connected(server.uri) as peer:
            _greeted(peer)
            peer.send(request)
            if is_right:
                assert len(peer.expect(REPLY).payload) == 2**20
            else:
                assert "bytes of all tensors: 1572864, expected at most 1048576" in peer.expect_abort()


def test_nothing_is_unpacked_that_a_call_does_not_expect() -> None:
    def script(peer: RawPeer) -> None:
        _greeted(peer, ALL & ~PROBES)
        peer.receive()
        peer.send(_coded(REPLY, ZEROS))
        peer.expect_abort()

    with serving(TCP, script) as uri, fastsplit.connect(uri, arrays="numpy") as channel:
        with pytest.raises(RemoteProtocolError, match="a reply's tensor 0"):
            channel.call("x", expect=[("float32", (10,))])
        assert channel.stats.codecs == {}


@pytest.mark.parametrize("capabilities", [0, 256 | 65536, PROBES])
def test_codings_and_flags_without_the_capability(server: fastsplit.Server, capabilities: int) -> None:
    for request, wanted in (
        (_coded(REQUEST, ZEROS), "tensor 0 (segment, codec, offset, nbytes): (0, 1, 0, "),
        (frame(REQUEST, 1, "echo", flags=1), "flags"),
    ):
        with connected(server.uri) as peer:
            _greeted(peer, capabilities)
            peer.send(request)
            assert wanted in peer.expect_abort()


@pytest.mark.parametrize(("kind", "flags"), [(REQUEST, 0x100), (REQUEST, 0x8001), (CANCEL, 1), (PROBE, 0x10)])
def test_flags_that_there_are_not(server: fastsplit.Server, kind: int, flags: int) -> None:
    with connected(server.uri) as peer:
        _greeted(peer)
        peer.send(frame(kind, 1, flags=flags))
        assert f"flags: {flags:#06x}" in peer.expect_abort()


@pytest.mark.parametrize("flags", [0x0F, 0x07, 0x90, 0xE0, 0x20, 0xF0, 0xFF])
def test_wishes_that_nobody_knows_are_no_error(server: fastsplit.Server, flags: int) -> None:
    with connected(server.uri) as peer:
        _greeted(peer)
        ones = np.ones(1000, np.float32).tobytes()
        peer.send(frame(REQUEST, 1, "echo", [(FLOAT32, (1000,))], payload=ones, flags=flags))
        assert peer.expect(REPLY).payload == ones


# ---- probes ----------------------------------------------------------------------------------------------------------


def _probe(number: int = 1, answer: Any = 0, wanted: Any = 0, bytes_per_s: Any = 0.0, **more: Any) -> bytes:
    attrs = {"answer": answer, "wanted": wanted, "bytes_per_s": bytes_per_s}
    return frame(PROBE, number, attrs={name: value for name, value in attrs.items() if value is not None}, **more)


def _filled(dtype: str, nbytes: int, **more: Any) -> bytes:
    code = _dtype_code(dtype)
    itemsize = np.dtype(dtype).itemsize
    return _probe(tensors=[(code, (nbytes // itemsize,))], payload=bytes(nbytes), **more)


PROBE_LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "an answer": (lambda: _probe(answer=1), "PROBE, answer: 1, expected 0"),
    "an answer that is none": (lambda: _probe(answer=2), "PROBE, answer: 2"),
    "no answer": (lambda: _probe(answer=None), "PROBE, answer: None"),
    "NaN": (lambda: _probe(bytes_per_s=float("nan")), "PROBE, bytes_per_s: nan"),
    "inf": (lambda: _probe(bytes_per_s=float("inf")), "PROBE, bytes_per_s: inf"),
    "negative": (lambda: _probe(bytes_per_s=-1.0), "PROBE, bytes_per_s: -1.0"),
    "an int": (lambda: _probe(bytes_per_s=1), "PROBE, bytes_per_s: 1, expected float"),
    "wants less than nothing": (lambda: _probe(wanted=-1), "PROBE, wanted: -1"),
    "wants too much": (lambda: _probe(wanted=2**22 + 1), "PROBE, wanted: 4194305, expected 0 to 4194304"),
    "wants very much": (lambda: _probe(wanted=2**63 - 1), "PROBE, wanted: "),
    "wants a text": (lambda: _probe(wanted="much"), "PROBE, wanted: 'much'"),
    "padding of another dtype": (lambda: _filled("float32", 64), "a PROBE frame with"),
    "two fillers": (
        lambda: _probe(tensors=[(_dtype_code("uint8"), (4,))] * 2, payload=bytes(8)),
        "a PROBE frame with",
    ),
    "compressed padding": (
        lambda: _probe(tensors=[(_dtype_code("uint8"), (4000,))], payload=ZEROS, placements=(1 << 32, 0, len(ZEROS))),
        "a PROBE frame with a placement",
    ),
    "padding in a segment": (
        lambda: _probe(tensors=[(_dtype_code("uint8"), (40,))], placements=(1, 0, 40)),
        "a PROBE frame with a placement",
    ),
    "returns": (lambda: _probe(returns=(1, 0)), "returns: expected none"),
}


@pytest.mark.parametrize("lie", PROBE_LIES)
def test_a_client_that_lies_in_a_probe(server: fastsplit.Server, lie: str) -> None:
    make, wanted = PROBE_LIES[lie]
    with connected(server.uri) as peer:
        _greeted(peer)
        peer.send(make())
        assert wanted in peer.expect_abort()
    _still_serves(server)


def test_too_much_filler(serve: Serve) -> None:
    with connected(serve(TCP, {}).uri) as peer:
        _greeted(peer)
        peer.send(_filled("uint8", 2**22))
        peer.expect(PROBE)
        head = _probe(tensors=[(_dtype_code("uint8"), (2**22 + 1,))], payload_nbytes=2**22 + 1)
        peer.send(head)
        assert "a PROBE frame with" in peer.expect_abort()


def test_probes_where_they_are_errors(server: fastsplit.Server, serve: Serve, unix_uri: str) -> None:
    with connected(server.uri) as peer:
        peer.send(_probe())
        assert "a PROBE frame in state 'handshake'" in peer.expect_abort()
    with connected(server.uri) as peer:
        _greeted(peer, CODINGS)
        peer.send(_probe())
        assert "a PROBE frame, expected none" in peer.expect_abort()
    with connected(serve(unix_uri, {}).uri) as peer:
        peer.greet_shm(is_client=True, ring=False)
        peer.send(_probe())
        assert "a PROBE frame, expected none" in peer.expect_abort()


def test_good_probes(server: fastsplit.Server) -> None:
    with connected(server.uri) as peer:
        _greeted(peer, limits=Limits(max_message_nbytes=5000))
        for number, nbytes in ((2**64 - 1, 0), (0, 5000), (7, 1), (7, 0)):
            peer.send(_filled("uint8", nbytes, number=number, wanted=nbytes) if nbytes else _probe(number))
            came = peer.expect(PROBE)
            assert (came.request_id, len(came.payload), came.message.attrs["answer"]) == (number, nbytes, 1)
        peer.send(_probe(wanted=5001))  # more than it takes itself
        assert "expected 0 to 5000" in peer.expect_abort()


def _answering(peer: RawPeer, change: Callable[[int, dict[str, Any]], list[bytes]], probes: int = 3) -> None:
    """Answers a channel's probes as `change` says."""
    for _ in range(probes):
        came = peer.receive()
        if came is None:
            return
        wanted = came.message.attrs["wanted"]
        tensors = [(_dtype_code("uint8"), (wanted,))] if wanted else []
        peer.send(*change(came.request_id, {"tensors": tensors, "payload": bytes(wanted)}))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"answer": 0}, "PROBE, answer: 0, expected 1"),
        ({"answer": 1, "bytes_per_s": float("nan")}, "bytes_per_s: nan"),
        ({"answer": 1, "bytes_per_s": -0.5}, "bytes_per_s: -0.5"),
        ({"answer": 1, "wanted": 1}, "wanted: 1, expected 0 to 0"),
    ],
)
def test_a_server_that_lies_in_the_handshakes_probe(change: dict[str, Any], wanted: str, connect: Connect) -> None:
    def script(peer: RawPeer) -> None:
        _greeted(peer)
        _answering(peer, lambda number, padding: [_probe(number, **change)], 1)
        assert wanted in peer.expect_abort()

    with serving(TCP, script) as uri, pytest.raises(RemoteProtocolError) as caught:
        connect(uri)
    assert wanted in str(caught.value)


def test_a_server_that_never_answers_the_handshakes_probe(connect: Connect) -> None:
    def script(peer: RawPeer) -> None:
        _greeted(peer)
        while peer.receive() is not None:
            pass

    with serving(TCP, script) as uri:
        start = time.monotonic()
        with pytest.raises(DeadlineError, match=r"no handshake within 0\.3 s"):
            connect(uri, timeout_s=0.3)
        assert time.monotonic() - start < 3


def test_answers_that_nobody_asked_for_say_nothing(connect: Connect) -> None:
    def change(number: int, padding: dict[str, Any]) -> list[bytes]:
        strange = _probe(number + 100, 1, bytes_per_s=1.0)
        return [strange, _probe(number, 1, bytes_per_s=5e6, **padding), _probe(number, 1, bytes_per_s=1.0), strange]

    def script(peer: RawPeer) -> None:
        _greeted(peer)
        _answering(peer, change)
        assert peer.expect(REQUEST).request_id == 1
        peer.send(*[_probe(9, 1)] * 1000, frame(REPLY, 1))
        peer.receive()

    with serving(TCP, script) as uri, connect(uri) as channel:
        assert channel.link.send_bytes_per_s == 5e6
        assert channel.call("x") == ()


def test_a_measurement_without_an_answer(connect: Connect) -> None:
    def script(peer: RawPeer) -> None:
        _greeted(peer)
        _answering(peer, lambda number, padding: [_probe(number, 1, **padding)])
        peer.expect(PROBE)
        peer.expect(REQUEST)
        peer.send(frame(REPLY, 1))
        peer.receive()

    with serving(TCP, script) as uri, connect(uri) as channel:
        with pytest.raises(DeadlineError, match="the link was not measured"):
            channel.measure(timeout_s=0.2)
        assert channel.call("x") == ()  # the connection is as it was
        channel.close()
        with pytest.raises(fastsplit.errors.ClosedError):
            channel.measure()


def test_a_measurement_that_is_stuck_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe of which only a part was sent cannot be followed by anything."""

    def script(peer: RawPeer) -> None:
        _greeted(peer)
        _answering(peer, lambda number, padding: [_probe(number, 1, **padding)])
        _answering(peer, lambda number, padding: [_probe(number, 1, **padding)], 1)
        with contextlib.suppress(AssertionError):
            while peer.receive() is not None:
                pass

    with serving(TCP, script) as uri, fastsplit.connect(uri) as channel:
        send = channel._connection.transport.send

        def send_a_part(buffers: Any, nbytes: int = -1) -> Any:
            return [memoryview(buffers[-1])[send([buffers[0][:10]]) or 10 :]] if len(buffers) > 1 else send(buffers)

        monkeypatch.setattr(channel._connection.transport, "send", send_a_part)
        monkeypatch.setattr(
            channel._sender, "_send_rest", lambda deadline: (_ for _ in ()).throw(DeadlineError("late"))
        )
        with pytest.raises(DeadlineError, match="a probe: what goes before it was not sent within 2 s"):
            channel.measure(1000, timeout_s=2)
        assert channel.closed


def test_a_flood_of_probes_while_a_reply_is_stuck(serve: Serve) -> None:
    """What is not answered is bounded, and everything is in the end."""
    server = serve(TCP, {"large": lambda call: np.zeros(2**23, np.uint8)}, arrays="numpy")
    with connected(server.uri) as peer:
        _greeted(peer)
        probes = b"".join(_probe(number) for number in range(2000))
        peer.send(frame(REQUEST, 1, "large") + frame(REQUEST, 2, "large") + probes)
        (client,) = server._service.clients
        for _ in range(20):
            time.sleep(0.01)
            assert len(client._replies._probes) <= 16
        kinds = {REPLY: [], PROBE: []}  # type: ignore[var-annotated]
        for _ in range(2002):
            came = peer.receive()
            assert came is not None
            kinds[came.kind].append(came.request_id)
        assert (kinds[REPLY], sorted(kinds[PROBE])) == ([1, 2], list(range(2000)))


def test_probes_behind_an_error_are_answered(serve: Serve) -> None:
    server = serve(TCP, {}, workers=2)
    with connected(server.uri) as peer:
        _greeted(peer)
        for number in range(200):
            peer.send(frame(REQUEST, number, "none") + _probe(number))
        frames = [peer.receive() for _ in range(400)]
        came = sorted((came.kind, came.request_id) for came in frames if came is not None)
        assert came == [(ERROR, number) for number in range(200)] + [(PROBE, number) for number in range(200)]
