"""The state machine, without I/O: one table of bytes <-> events.

Each row is driven through the reader whole, byte by byte, cut in arbitrary places, and with bytes after it. A row says
which side reads, what state it is in first (a list of earlier frames and requests), the bytes, and the events.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import pytest
from raw_peer import (
    ABORT,
    ATTACHED,
    CANCEL,
    ERROR,
    FLOAT32,
    GOODBYE,
    HELLO,
    REPLY,
    REQUEST,
    RETIRE,
    RETURN,
    SEGMENT,
    frame,
    hello,
    raw_frame,
)
from session_ends import CLIENT, LIMITS, SERVER, UINT8, feed, feed_slots, feeds, make, plain, sharing

from fastsplit.errors import PeerLostError, SettingError
from fastsplit.schema.decoder import Decoder
from fastsplit.schema.header import Kind
from fastsplit.schema.limits import Limits
from fastsplit.tensors.pool import Pool
from fastsplit.wire.rules import TYPES
from fastsplit.wire.session import STAGING_NBYTES, Session

BIG = bytes(range(256)) * 100


class Row(NamedTuple):
    name: str
    is_client: bool
    data: bytes
    events: list[Any]
    requests: int = 0
    greeted: bool = True


REQUEST_1 = frame(REQUEST, 1, "add", [(FLOAT32, (2,)), (FLOAT32, ())], {"by": 2}, bytes(range(12)), time_ns=5)
EVENT_1 = ("request", 1, "add", [(FLOAT32, (2,)), (FLOAT32, ())], {"by": 2}, [bytes(range(8)), bytes(range(8, 12))], 5)

TABLE = [
    Row("handshake, server", SERVER, hello(), [("hello", Limits())], greeted=False),
    Row("handshake, client", CLIENT, hello(LIMITS), [("hello", LIMITS)], greeted=False),
    Row("handshake and request at once", SERVER, hello() + REQUEST_1, [("hello", Limits()), EVENT_1], greeted=False),
    Row("request", SERVER, REQUEST_1, [EVENT_1]),
    Row("the same again, from the cache", SERVER, REQUEST_1 * 3, [EVENT_1] * 3),
    Row("request without anything", SERVER, frame(REQUEST, 2**64 - 1), [("request", 2**64 - 1, "", [], {}, [], 0)]),
    Row(
        "empty tensors among others",
        SERVER,
        frame(REQUEST, 1, "f", [(UINT8, (0,)), (UINT8, (3,)), (UINT8, (2, 0))], {}, b"abc"),
        [("request", 1, "f", [(UINT8, (0,)), (UINT8, (3,)), (UINT8, (2, 0))], {}, [b"", b"abc", b""], 0)],
    ),
    Row(
        "a payload larger than the staging buffer",
        SERVER,
        frame(REQUEST, 1, "f", [(UINT8, (100, 256)), (UINT8, (1,))], {}, BIG + b"z") + REQUEST_1,
        [("request", 1, "f", [(UINT8, (100, 256)), (UINT8, (1,))], {}, [BIG, b"z"], 0), EVENT_1],
    ),
    Row(
        "a head larger than the staging buffer",
        SERVER,
        frame(REQUEST, 1, "f", [(UINT8, (5,))], {"b": BIG}, b"12345") + REQUEST_1,
        [("request", 1, "f", [(UINT8, (5,))], {"b": BIG}, [b"12345"], 0), EVENT_1],
    ),
    Row("cancel", SERVER, REQUEST_1 + frame(CANCEL, 1), [EVENT_1, ("cancel", 1)]),
    Row("goodbye", SERVER, frame(GOODBYE), [("goodbye",)]),
    Row("reply", CLIENT, frame(REPLY, 1, "", [(UINT8, (2,))], {}, b"ok", time_ns=9),
        [("reply", 1, "", [(UINT8, (2,))], {}, [b"ok"], 9)], requests=1),
    Row("replies in another order, one an error", CLIENT,
        frame(REPLY, 3) + frame(ERROR, 1, attrs={"code": "failed", "text": "why"}) + frame(REPLY, 2),
        [("reply", 3, "", [], {}, [], 0), ("error", 1, "failed", "why"), ("reply", 2, "", [], {}, [], 0)], requests=3),
    Row("an error without its texts", CLIENT, frame(ERROR, 1), [("error", 1, "failed", "no reason given")], requests=1),
    Row("abort", CLIENT, frame(ABORT, attrs={"text": "bad"}),
        [("failed", "the peer ended the connection: bad", False)], requests=1),
    Row("abort in the handshake", CLIENT, frame(ABORT), greeted=False,
        events=[("failed", "the peer ended the connection: no reason given", False)]),
    Row("a reply, then abort: the reply counts", CLIENT, frame(REPLY, 1) + frame(ABORT, attrs={"text": "bad"}),
        [("reply", 1, "", [], {}, [], 0), ("failed", "the peer ended the connection: bad", False)], requests=1),
    Row("a request, then rubbish: the request counts", SERVER, REQUEST_1 + b"x" * 40,
        [EVENT_1, ("failed", "header, magic: b'xxxx', expected b'FSPL'; the peer does not speak fastsplit", True)]),
    Row("request before hello", SERVER, REQUEST_1, greeted=False,
        events=[("failed", "a REQUEST frame in state 'handshake'", True)]),
    Row("goodbye before hello", SERVER, frame(GOODBYE), greeted=False,
        events=[("failed", "a GOODBYE frame in state 'handshake'", True)]),
    Row("hello twice", SERVER, hello(), [("failed", "a HELLO frame in state 'open'", True)]),
    Row("anything after goodbye", SERVER, frame(GOODBYE) + REQUEST_1,
        [("goodbye",), ("failed", "a REQUEST frame in state 'ended'", True)]),
    Row("a request from the server", CLIENT, REQUEST_1, [("failed", "a REQUEST frame from the server", True)]),
    Row("a cancel from the server", CLIENT, frame(CANCEL, 1), [("failed", "a CANCEL frame from the server", True)]),
    Row("a reply from the client", SERVER, frame(REPLY, 1), [("failed", "a REPLY frame from the client", True)]),
    Row("an error from the client", SERVER, frame(ERROR, 1),
        [("failed", "header, request_id: 1 in ERROR, expected one that has no answer yet", True)]),
    Row("a reply to nothing", CLIENT, frame(REPLY, 9),
        [("failed", "header, request_id: 9 in REPLY, expected one that has no answer yet", True)], requests=3),
    Row("a second reply", CLIENT, frame(REPLY, 1) * 2,
        [("reply", 1, "", [], {}, [], 0),
         ("failed", "header, request_id: 1 in REPLY, expected one that has no answer yet", True)], requests=1),
    Row("payload_nbytes larger than the tensors", SERVER,
        frame(REQUEST, 1, "f", [(FLOAT32, (2,))], {}, b"", payload_nbytes=9),
        [("failed", "header, payload_nbytes: 9, expected 8, the sum of its tensors", True)]),
    Row("payload_nbytes smaller than the tensors", SERVER,
        frame(REQUEST, 1, "f", [(FLOAT32, (2,))], {}, b"", payload_nbytes=7),
        [("failed", "header, payload_nbytes: 7, expected 8, the sum of its tensors", True)]),
    Row("tensors in a cancel", SERVER, frame(CANCEL, 1, "", [(UINT8, (1,))], {}, b"1"),
        [("failed", "a CANCEL frame with 1 tensors, expected none", True)]),
    Row("too many tensors", SERVER, frame(REQUEST, 1, "f", [(UINT8, (1,))] * 5, {}, b"12345"),
        [("failed", "metadata, tensors: 5, expected at most 4", True)]),
    Row("metadata that is none", SERVER, raw_frame(REQUEST, 1, b"12345678"),
        [("failed", "metadata, file identifier: b'5678', expected b'FSM1'", True)]),
    Row("no metadata", SERVER, raw_frame(REQUEST, 1),
        [("failed", "metadata, file identifier: b'', expected b'FSM1'", True)]),
    Row("hello without a cap", SERVER, hello(max_dims=None), greeted=False,
        events=[("failed", "hello, max_dims: None, expected an int from 1 to 9223372036854775807", True)]),
    Row("hello with a cap too low for a handshake", SERVER, hello(max_attrs=3), greeted=False,
        events=[("failed", "hello, max_attrs: 3, expected an int from 16 to 9223372036854775807", True)]),
    Row("hello without capabilities", SERVER, hello(capabilities="all"), greeted=False,
        events=[("failed", "hello, capabilities: 'all', expected an int", True)]),
]  # fmt: skip

rows = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


@rows
def test_whole(row: Row) -> None:
    assert feed(make(row.is_client, requests=row.requests, greeted=row.greeted), row.data) == row.events


@rows
def test_byte_by_byte(row: Row) -> None:
    session = make(row.is_client, requests=row.requests, greeted=row.greeted)
    assert feed(session, row.data, lambda: 1) == row.events


@rows
def test_cut_anywhere(row: Row) -> None:
    for seed in range(20):
        sizes = random.Random(seed)
        session = make(row.is_client, requests=row.requests, greeted=row.greeted)
        assert feed(session, row.data, lambda: sizes.choice((1, 3, 39, 40, 41, 200, 5000))) == row.events  # noqa: B023


@pytest.mark.parametrize(
    "row", [row for row in TABLE if row.events[-1][0] not in ("failed", "goodbye")], ids=lambda row: row.name
)
def test_with_trailing_bytes(row: Row) -> None:
    """What follows a frame changes nothing about it, and is not lost."""
    rest = frame(ABORT, attrs={"text": "trailing"})
    failed = ("failed", "the peer ended the connection: trailing", False)
    session = make(row.is_client, requests=row.requests, greeted=row.greeted)
    assert feed(session, row.data + rest) == [*row.events, failed]
    for cut in range(1, min(len(rest), 60)):
        session = make(row.is_client, requests=row.requests, greeted=row.greeted)
        assert feed(session, row.data + rest[:cut]) == row.events
        assert feed(session, rest[cut:]) == [failed]


def test_abandoned_requests_are_read_and_dropped() -> None:
    allocated: list[int] = []

    def allocate(nbytes: int) -> Any:
        allocated.append(nbytes)
        return np.empty(nbytes, np.uint8)

    for sizes in (2**30, 100):
        client = make(CLIENT, requests=3, allocate=allocate)
        assert client.mark_cancelled(1) and client.mark_cancelled(2) and not client.mark_cancelled(9)
        data = frame(REPLY, 1, "", [(UINT8, (3_000_000,))], {}, bytes(3_000_000)) if sizes > 100 else b""
        data += frame(REPLY, 2, "", [(UINT8, (3,))], {}, b"123") + frame(REPLY, 3, "", [(UINT8, (1,))], {}, b"x")
        events = feed(client, data, lambda: sizes)  # noqa: B023
        assert events[-1] == ("reply", 3, "", [(UINT8, (1,))], {}, [b"x"], 0)
        assert all(event[5] == [] for event in events[:-1])
        assert not client.mark_cancelled(2) and not client.mark_cancelled(3)
    assert allocated == [1, 1]


def test_what_a_reply_must_hold_is_checked_before_memory_is_allocated() -> None:
    for tensors, text in [
        ([(UINT8, (2,))], "a reply of 1 tensors, expected 2"),
        ([(UINT8, (2,)), (UINT8, (4,))], "a reply's tensor 1: uint8[4], expected float32[1]"),
        ([(UINT8, (1, 2)), (FLOAT32, (1,))], "a reply's tensor 0: uint8[1, 2], expected uint8[2]"),
    ]:
        client = make(CLIENT, allocate=_never)
        client.request("f", (), {}, 0, 0, [(UINT8, (2,)), (FLOAT32, (1,))])
        nbytes = sum(np.prod(shape) * (1 if code == UINT8 else 4) for code, shape in tensors)
        data = frame(REPLY, 1, "", tensors, {}, bytes(int(nbytes)))
        assert feed(client, data) == [("failed", text, True)]


def _never(nbytes: int) -> Any:
    pytest.fail(f"{nbytes} bytes were allocated")


def test_nothing_is_allocated_for_a_frame_that_is_refused() -> None:
    for row in TABLE:
        if [event[0] for event in row.events] == ["failed"]:
            session = make(row.is_client, requests=row.requests, greeted=row.greeted, allocate=_never)
            assert feed(session, row.data) == row.events


def test_staging() -> None:
    """Bytes that came with their frame's head are copied over, at most the staging buffer's; all others are not."""
    server = make(SERVER)
    small = frame(REQUEST, 1, "f", [(UINT8, (1000,))], {}, bytes(1000))
    feed(server, small)
    assert server.staged_nbytes == 1000
    feed(server, frame(REQUEST, 1, "f", [(UINT8, (100_000,))], {}, bytes(100_000)))
    assert 1000 < server.staged_nbytes < 1000 + STAGING_NBYTES
    for _ in range(2):  # a head that does not fit takes none of its payload along, and leaves nothing larger behind
        before = server.staged_nbytes
        feed(server, frame(REQUEST, 1, "f", [(UINT8, (100_000,))], {"b": bytes(20_000)}, bytes(100_000)))
        assert server.staged_nbytes == before
        assert sum(map(len, server.receive_buffers())) == STAGING_NBYTES


def test_where_the_stream_ended() -> None:
    request = frame(REQUEST, 1, "f", [(UINT8, (100,))], {}, bytes(100))
    for cut, text in [
        (0, "the peer closed the connection"),
        (17, "the peer's stream ended after 17 bytes of a frame's head"),
        (len(request) - 30, "the peer's stream ended 30 bytes before the end of a payload of 100 bytes"),
    ]:
        session = make(SERVER)
        assert feed(session, request[:cut]) == []
        assert session.at_frame_boundary == (cut == 0)
        error = session.end_of_stream()
        assert type(error) is PeerLostError and str(error) == text


def test_capabilities_count_when_both_have_them() -> None:
    session = Session(is_client=True, allocate=Pool().allocate, capabilities=0b110)
    feed(session, hello(capabilities=0b011))
    assert session.capabilities == 0b010


TYPED_ATTRS = {"yes": True, "no": np.bool_(False), "f": [0.5, 1], "b": [True], "n": 3}


@pytest.mark.parametrize(("own", "peers"), [(TYPES, TYPES), (TYPES, 0), (0, TYPES), (TYPES | 1, 1 | 2 | 4)])
def test_types_of_attributes_by_what_both_sides_know(own: int, peers: int) -> None:
    """An older peer gets, and sends, what it did: bools as ints; and lists of floats stay at home."""
    client = Session(is_client=True, allocate=Pool().allocate, capabilities=own)
    server = Session(is_client=False, allocate=Pool().allocate, capabilities=peers)
    hellos = [bytes(session.hello()) for session in (client, server)]
    for sent in hellos:  # an older peer can read it
        assert Decoder(Limits()).decode(sent[40:], 0).attrs["capabilities"] in (own, peers)
    feed(server, hellos[0])
    feed(client, hellos[1])
    if own & peers & TYPES:
        came = {"yes": True, "no": False, "f": [0.5, 1.0], "b": [True], "n": 3}
        sent = [client.request("f", (), TYPED_ATTRS, 0)[1], server.reply(1, (), 0, 1, TYPED_ATTRS)]
    else:
        came = {"yes": 1, "no": 0, "b": [1], "n": 3}
        for send in (lambda attrs: client.request("f", (), attrs, 0), lambda attrs: server.reply(1, (), 0, 1, attrs)):
            with pytest.raises(
                SettingError, match=r"attribute 'f': \[0.5, 1\], .* a version that knows no lists of floats"
            ):
                send(TYPED_ATTRS)
        known = {name: value for name, value in TYPED_ATTRS.items() if name != "f"}
        sent = [client.request("f", (), known, 0)[1], server.reply(1, (), 0, 1, known)]
        assert bytes(sent[0])[40:] == frame(REQUEST, 1, "f", (), came)[40:]
    assert [repr(event[4]) for event in feed(server, bytes(sent[0]))] == [repr(came)]
    assert [repr(event[4]) for event in feed(client, bytes(sent[1]))] == [repr(came)]


@pytest.mark.parametrize(("value", "kind"), [(True, 7), ([0.5], 8), ([False], 9)])
def test_types_of_attributes_that_were_not_agreed_on(value: Any, kind: int) -> None:
    text = f"metadata, attr 'v' type: {kind}, expected 1 to 6"
    request = frame(REQUEST, 1, "f", attrs={"v": value}, typed=True)
    assert feed(make(SERVER), request) == [("failed", text, True)]
    in_hello = hello(typed=True, v=value)
    for session in (make(SERVER, greeted=False), Session(is_client=False, allocate=_never, capabilities=TYPES)):
        assert feed(session, in_hello) == [("failed", text, True)]


def test_a_bool_is_no_int_of_the_protocols() -> None:
    for kind, name in ((SEGMENT, "id"), (RETIRE, "id"), (RETURN, "wanted")):
        session, _ = sharing(CLIENT, capabilities=1 | TYPES)
        attrs = {"id": 2, "nbytes": 64, "name": "", "wanted": 0, name: True}
        text = f"{Kind(kind).name}, {name}: True, expected int"
        assert feed(session, frame(kind, attrs=attrs, typed=True)) == [("failed", text, True)]


def test_all_kinds_are_in_the_table() -> None:
    kinds = {data[5] for row in TABLE for data in [row.data] if data[:4] == b"FSPL"}
    assert kinds == {HELLO, REQUEST, REPLY, ERROR, CANCEL, GOODBYE, ABORT}


# ---- shared memory ---------------------------------------------------------------------------------------------------


PAIR = [(FLOAT32, (2,)), (UINT8, (3,))]
BY_REFERENCE = frame(REQUEST, 5, "f", PAIR, {"n": 1}, placements=(2, 16, 8, 2, 100, 3), returns=(1, 64, 1, 128))


def test_tensors_by_reference() -> None:
    for way in feeds(BY_REFERENCE):
        session, memory = sharing(SERVER)
        expected = ("request", 5, "f", PAIR, {"n": 1}, [bytes(range(16, 24)), bytes((100, 101, 102))], 0)
        assert way(session) == [expected]
        assert memory.calls == [("resolve", 2, 16, 8), ("resolve", 2, 100, 3), ("returned", 1, 64, 1, 128)]


def test_a_reply_by_reference() -> None:
    data = frame(REPLY, 1, "", PAIR, {}, placements=(2, 16, 8, 1, 100, 3), returns=(1, 64), time_ns=7)
    for way in feeds(data):
        session, memory = sharing(CLIENT, requests=1)
        assert way(session) == [("reply", 1, "", PAIR, {}, [bytes(range(16, 24)), bytes((100, 101, 102))], 7)]
        assert memory.calls == [("resolve", 2, 16, 8), ("resolve", 1, 100, 3), ("returned", 1, 64)]
        assert session.inflight == 0


def test_some_by_reference_and_some_in_the_payload() -> None:
    tensors = [(UINT8, (5,)), (UINT8, (2,)), (UINT8, (4000,)), (UINT8, (1,))]
    data = frame(
        REQUEST, 1, "f", tensors, {}, b"12345" + bytes(4000), placements=(0, 0, 5, 2, 9, 2, 0, 5, 4000, 1, 7, 1)
    )
    for sizes in (lambda: 2**30, lambda: 1, lambda: 300):
        session, memory = sharing(SERVER)
        assert feed(session, data, sizes) == [
            ("request", 1, "f", tensors, {}, [b"12345", bytes((9, 10)), bytes(4000), bytes((7,))], 0)
        ]
        assert memory.calls == [("resolve", 2, 9, 2), ("resolve", 1, 7, 1)]
    session, memory = sharing(SERVER)
    assert feed_slots(session, data)[0] == ("failed", "header, payload_nbytes: 4005 in a ring, expected 0", True)


def test_empty_tensors_lie_nowhere() -> None:
    for way in feeds(frame(REQUEST, 1, "f", [(UINT8, (0,)), (UINT8, (2,))], {}, placements=(0, 0, 0, 2, 4, 2))):
        session, memory = sharing(SERVER)
        assert way(session) == [("request", 1, "f", [(UINT8, (0,)), (UINT8, (2,))], {}, [b"", bytes((4, 5))], 0)]
        assert memory.calls == [("resolve", 2, 4, 2)]


NOTES: list[tuple[str, bool, bytes, list[Any], list[tuple[Any, ...]]]] = [
    # name, whether a client reads it, the frame, its events, the calls
    ("a segment, by the server", CLIENT, frame(SEGMENT, attrs={"id": 2, "nbytes": 64, "name": "n"}), [],
     [("attach", 2, 64, "n")]),
    ("a segment, by the client", SERVER, frame(SEGMENT, attrs={"id": 1, "nbytes": 64, "name": ""}), [],
     [("attach", 1, 64, "")]),
    ("a ring", SERVER, frame(SEGMENT, attrs={"id": 0, "nbytes": 64, "name": "n"}), [("ring", 64, "n")], []),
    ("number 0 from the server is no ring", CLIENT, frame(SEGMENT, attrs={"id": 0, "nbytes": 64, "name": ""}), [],
     [("attach", 0, 64, "")]),
    ("attached", CLIENT, frame(ATTACHED, attrs={"text": ""}), [("attached", "")], []),
    ("not attached", CLIENT, frame(ATTACHED, attrs={"text": "why"}), [("attached", "why")], []),
    ("attached, by the client", SERVER, frame(ATTACHED, attrs={"text": ""}),
     [("failed", "a ATTACHED frame from the client", True)], []),
    ("retire", CLIENT, frame(RETIRE, attrs={"id": 2}), [], [("retire", 2)]),
    ("retire, by the client", SERVER, frame(RETIRE, attrs={"id": 1}), [], [("retire", 1)]),
    ("returns alone", SERVER, frame(RETURN, attrs={"wanted": 0}, returns=(1, 64)), [], [("returned", 1, 64)]),
    ("returns are wanted", CLIENT, frame(RETURN, attrs={"wanted": 1}), [("returns wanted",)], []),
    ("both", SERVER, frame(RETURN, attrs={"wanted": 1}, returns=(1, 64)), [("returns wanted",)],
     [("returned", 1, 64)]),
    ("returns on a goodbye", SERVER, frame(GOODBYE, returns=(1, 64)), [("goodbye",)], [("returned", 1, 64)]),
    ("returns on a cancel", SERVER, frame(CANCEL, 3, returns=(1, 64)), [("cancel", 3)], [("returned", 1, 64)]),
    ("returns on an error", CLIENT, frame(ERROR, 1, returns=(2, 64)),
     [("error", 1, "failed", "no reason given")], [("returned", 2, 64)]),
    ("a segment without a number", CLIENT, frame(SEGMENT, attrs={"nbytes": 64, "name": ""}),
     [("failed", "SEGMENT, id: None, expected int", True)], []),
    ("a segment without a size", CLIENT, frame(SEGMENT, attrs={"id": 2, "nbytes": "64", "name": ""}),
     [("failed", "SEGMENT, nbytes: '64', expected int", True)], []),
    ("a segment without a name", CLIENT, frame(SEGMENT, attrs={"id": 2, "nbytes": 64}),
     [("failed", "SEGMENT, name: None, expected str", True)], []),
    ("attached without a text", CLIENT, frame(ATTACHED), [("failed", "ATTACHED, text: None, expected str", True)], []),
    ("retire of no number", CLIENT, frame(RETIRE, attrs={"id": 2.0}),
     [("failed", "RETIRE, id: 2.0, expected int", True)], []),
    ("a return that says nothing", CLIENT, frame(RETURN), [("failed", "RETURN, wanted: None, expected int", True)], []),
    ("a segment with a tensor", CLIENT, frame(SEGMENT, attrs={"id": 2}, tensors=[(UINT8, (0,))]),
     [("failed", "a SEGMENT frame with 1 tensors, expected none", True)], []),
    ("a retirement with a tensor by reference", CLIENT,
     frame(RETIRE, attrs={"id": 2}, tensors=[(UINT8, (1,))], placements=(2, 0, 1)),
     [("failed", "a RETIRE frame with 1 tensors, expected none", True)], []),
    ("a place that there is none", SERVER, frame(REQUEST, 1, "f", [(UINT8, (1,))], placements=(9, 0, 1)),
     [("failed", "placement: nowhere", True)], []),
]  # fmt: skip
notes = pytest.mark.parametrize(
    ("is_client", "data", "events", "calls"), [row[1:] for row in NOTES], ids=[row[0] for row in NOTES]
)


@notes
def test_what_the_peer_says_of_shared_memory(
    is_client: bool, data: bytes, events: list[Any], calls: list[tuple[Any, ...]]
) -> None:
    for way in feeds(data):
        session, memory = sharing(is_client, requests=1 if is_client else 0)
        assert way(session) == events
        assert memory.calls == calls


@pytest.mark.parametrize("kind", [SEGMENT, ATTACHED, RETIRE, RETURN])
@pytest.mark.parametrize("is_client", [CLIENT, SERVER])
def test_shared_memory_in_every_other_state(kind: int, is_client: bool) -> None:
    names = {SEGMENT: "SEGMENT", ATTACHED: "ATTACHED", RETIRE: "RETIRE", RETURN: "RETURN"}
    attrs = {"id": 2, "nbytes": 64, "name": "", "text": "", "wanted": 0}
    data = frame(kind, attrs=attrs)
    for way in feeds(data):
        failed = ("failed", f"a {names[kind]} frame in state 'handshake'", True)
        assert way(make(is_client, greeted=False)) == [failed]
        none = ("failed", f"a {names[kind]} frame, expected none: no shared memory was agreed on", True)
        assert way(make(is_client)) == [none]
        session, memory = sharing(is_client)
        feed(session, frame(GOODBYE))
        assert way(session) == [("failed", f"a {names[kind]} frame in state 'ended'", True)] and not memory.calls


def test_by_reference_where_no_memory_is_shared() -> None:
    for way in feeds(frame(REQUEST, 1, "f", [(UINT8, (1,))], placements=(1, 0, 1))):
        assert way(make(SERVER)) == [
            ("failed", "placement: in shared memory, expected in the payload: none was agreed on", True)
        ]
    for way in feeds(frame(REPLY, 1, "", [(UINT8, (1,))], placements=(1, 0, 1))):
        assert way(make(CLIENT, requests=1)) == [
            ("failed", "placement: in shared memory, expected in the payload: none was agreed on", True)
        ]
    for data in (frame(REQUEST, 1, "f", returns=(1, 0)), frame(GOODBYE, returns=(1, 0))):
        for way in feeds(data):
            assert way(make(SERVER)) == [
                ("failed", "returns: expected none, since no shared memory was agreed on", True)
            ]


def test_a_reply_to_nothing_through_a_ring() -> None:
    session, memory = sharing(CLIENT, requests=1)
    data = frame(REPLY, 9, "", [(UINT8, (1,))], placements=(2, 0, 1))
    text = "header, request_id: 9 in REPLY, expected one that has no answer yet"
    assert feed_slots(session, data) == [("failed", text, True)] and not memory.calls
    session, memory = sharing(CLIENT, requests=1)
    assert feed_slots(session, frame(REPLY, 1)) == [("reply", 1, "", [], {}, [], 0)]
    assert feed_slots(session, frame(REPLY, 1))[0][1].startswith("header, request_id: 1 in REPLY")
    session, _ = sharing(SERVER)
    assert feed_slots(session, frame(REPLY, 1)) == [("failed", "a REPLY frame from the client", True)]
    session, _ = sharing(CLIENT)
    assert feed_slots(session, frame(REQUEST, 1)) == [("failed", "a REQUEST frame from the server", True)]


def test_what_is_expected_of_a_reply_by_reference() -> None:
    for way in feeds(frame(REPLY, 1, "", [(UINT8, (2,))], placements=(2, 0, 2))):
        session, memory = sharing(CLIENT)
        session.request("f", (), {}, 0, 0, [(UINT8, (3,))])
        assert way(session) == [("failed", "a reply's tensor 0: uint8[2], expected uint8[3]", True)]
        assert memory.calls == []  # refused before any of it was looked at


def test_what_nobody_waits_for_goes_back() -> None:
    """It is resolved, so that its lease dies, and with that returns."""
    for way in feeds(frame(REPLY, 1, "", [(UINT8, (2,))], placements=(2, 0, 2), returns=(1, 64))):
        session, memory = sharing(CLIENT, requests=1)
        assert session.mark_cancelled(1)
        assert len(way(session)) == 1 and session.inflight == 0
        assert memory.calls == [("resolve", 2, 0, 2), ("returned", 1, 64)]
        assert not session.mark_cancelled(1)


# ---- slots -----------------------------------------------------------------------------------------------------------


def test_a_frame_in_many_slots() -> None:
    session, _ = sharing(SERVER)
    data = frame(REQUEST, 1, "f", [], {"b": BIG})
    events = ("request", 1, "f", [], {"b": BIG}, [], 0)
    for _ in range(2):
        for at in range(0, len(data) - 1024, 1024):
            assert session.received_slot(data[at : at + 1024]) == []
            assert not session.at_frame_boundary
        last = data[len(data) // 1024 * 1024 :]
        assert [plain(event) for event in session.received_slot(last.ljust(1024, b"\0"))] == [events]
        assert session.at_frame_boundary


def test_a_stream_that_ends_between_slots() -> None:
    session, _ = sharing(SERVER)
    session.received_slot(frame(REQUEST, 1, "f", [], {"b": BIG})[:1024])
    assert str(session.end_of_stream()) == "the peer's stream ended after 1024 bytes of a frame's head"


@pytest.mark.parametrize(
    ("slot", "text"),
    [
        (b"x" * 1024, "header, magic: b'xxxx', expected b'FSPL'; the peer does not speak fastsplit"),
        (bytes(1024), r"header, magic: b'\x00\x00\x00\x00', expected b'FSPL'; the peer does not speak fastsplit"),
        (raw_frame(REQUEST, 1, b"12345678").ljust(1024), "metadata, file identifier: b'5678', expected b'FSM1'"),
        (
            raw_frame(REQUEST, 1, metadata_nbytes=2**32 - 1).ljust(1024),
            "header, metadata_nbytes: 4294967295, expected at most 65536",
        ),
    ],
)
def test_slots_that_hold_no_frame(slot: bytes, text: str) -> None:
    session, _ = sharing(SERVER)
    assert [plain(event) for event in session.received_slot(slot)] == [("failed", text, True)]
