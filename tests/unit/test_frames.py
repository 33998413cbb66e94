"""The outgoing side of a session: its bytes are what the incoming side reads; caps, returns, and what was not sent."""

from __future__ import annotations

from typing import Any

import pytest
from raw_peer import (
    FLOAT32,
    REQUEST,
    frame,
    hello,
)
from session_ends import CLIENT, SERVER, UINT8, feed, make, sharing

from fastsplit.errors import LimitError, LocalProtocolError, SettingError
from fastsplit.schema.limits import Limits
from fastsplit.tensors.pool import Pool
from fastsplit.wire.frames import MAX_RETURNS
from fastsplit.wire.session import Session

REQUEST_1 = frame(REQUEST, 1, "add", [(FLOAT32, (2,)), (FLOAT32, ())], {"by": 2}, bytes(range(12)), time_ns=5)
EVENT_1 = ("request", 1, "add", [(FLOAT32, (2,)), (FLOAT32, ())], {"by": 2}, [bytes(range(8)), bytes(range(8, 12))], 5)


def both() -> tuple[Session, Session]:
    client, server = (Session(is_client=is_client, allocate=Pool().allocate) for is_client in (True, False))
    assert feed(server, bytes(client.hello())) == feed(client, bytes(server.hello())) == [("hello", Limits())]
    return client, server


def test_a_conversation() -> None:
    client, server = both()
    first, head = client.request("add", [(FLOAT32, (2,)), (FLOAT32, ())], {"by": 2}, 12, 5)
    assert bytes(head) + bytes(range(12)) == REQUEST_1
    assert feed(server, bytes(head) + bytes(range(12))) == [EVENT_1]
    second, head = client.request("f", (), {}, 0)
    assert (first, second, client.inflight) == (1, 2, 2)
    assert feed(server, bytes(head)) == [("request", 2, "f", [], {}, [], 0)]
    assert feed(server, bytes(client.cancel(1))) == [("cancel", 1)]
    reply = bytes(server.reply(2, [(UINT8, (2,))], 2, 7, {"n": 1})) + b"ok"
    assert feed(client, reply) == [("reply", 2, "", [(UINT8, (2,))], {"n": 1}, [b"ok"], 7)]
    assert feed(client, bytes(server.error(1, "cancelled", "t"))) == [("error", 1, "cancelled", "t")]
    assert client.inflight == 0
    assert feed(server, bytes(client.goodbye())) == [("goodbye",)]
    with pytest.raises(LocalProtocolError, match="'f': a request before the handshake or after the end"):
        client.request("f", (), {}, 0)
    assert feed(client, bytes(server.abort("r"))) == [("failed", "the peer ended the connection: r", False)]


def test_replies_still_count_after_our_goodbye() -> None:
    client, server = both()
    client.request("f", (), {}, 0)
    client.goodbye()
    assert feed(client, bytes(server.reply(1, (), 0, 0))) == [("reply", 1, "", [], {}, [], 0)]


def test_a_request_before_the_handshake() -> None:
    with pytest.raises(LocalProtocolError, match="before the handshake"):
        make(CLIENT, greeted=False).request("f", (), {}, 0)


def test_caps_of_the_peer_are_honoured_before_anything_changes() -> None:
    client = make(CLIENT, greeted=False)
    feed(client, hello(Limits(max_tensors=2, max_dims=2, max_attrs=16, max_inflight=1, max_message_nbytes=100)))
    for tensors, attrs, text in [
        ([(UINT8, (1,))] * 3, {}, "'f', tensors: 3, the peer accepts at most 2"),
        ([(UINT8, (1, 1, 1))], {}, "'f', tensor 0 dimensions: 3, the peer accepts at most 2"),
        ([(FLOAT32, (26,))], {}, "'f', tensor 0 shape: [26], 104 bytes, the peer accepts at most 100 bytes"),
        ([], {str(n): n for n in range(17)}, "'f', attrs: 17, the peer accepts at most 16"),
        ([], {"b": bytes(70_000)}, "'f', attribute 'b': 70001 bytes, the peer accepts at most 65536 bytes"),
    ]:
        with pytest.raises(LimitError) as caught:
            client.request("f", tensors, attrs, 0)
        assert str(caught.value) == text
        assert client.inflight == 0
    client.request("f", [(FLOAT32, (25,))], {}, 100)
    with pytest.raises(LimitError, match="'f': 1 requests in flight, the peer accepts 1"):
        client.request("f", (), {}, 0)


def test_texts_of_errors_always_fit_and_always_encode() -> None:
    client, server = make(CLIENT, requests=1), make(SERVER, greeted=False)
    feed(server, hello(Limits(max_metadata_nbytes=4096)))
    head = bytes(server.error(1, "failed", "\udc80" + "\U0001f600" * 10_000))
    assert len(head) <= 40 + 4096
    (event,) = feed(client, head)
    assert event[:3] == ("error", 1, "failed") and event[3].startswith("?\U0001f600") and len(event[3]) > 800


# ---- returns ---------------------------------------------------------------------------------------------------------


def _read(data: bytes | None) -> Any:
    """What a session with shared memory takes from a frame of ours: its returns."""
    assert data is not None
    session, memory = sharing(SERVER)
    feed(session, bytes(data))
    return [call[1:] for call in memory.calls if call[0] == "returned"]


def test_returns_ride_along_with_whatever_goes_out() -> None:
    for make_frame in (
        lambda session: session.request("f", (), {}, 0)[1],
        lambda session: session.cancel(1),
        lambda session: session.segment(1, 64, ""),
        lambda session: session.retire(1),
        lambda session: session.want_returns(),
        lambda session: session.goodbye(),
    ):
        session, memory = sharing(CLIENT)
        assert _read(make_frame(session)) == []
        session, memory = sharing(CLIENT)
        memory.returns.extend([(2, 0), (2, 64)])
        assert _read(make_frame(session)) == [(2, 0, 2, 64)]
        assert not memory.returns and session.returns == [2, 0, 2, 64]


def test_so_many_returns_ride_on_a_frame() -> None:
    session, memory = sharing(CLIENT)
    places = [(2, 64 * number) for number in range(MAX_RETURNS + 3)]
    memory.returns.extend(places)
    data = session.request("f", (), {}, 0)[1]
    assert _read(data) == [tuple(number for place in places[:MAX_RETURNS] for number in place)]
    assert list(memory.returns) == places[MAX_RETURNS:]
    assert session.return_frame() is None  # the rest rides on the next
    assert _read(session.return_frame(0)) == [tuple(number for place in places[MAX_RETURNS:] for number in place)]
    assert session.return_frame(0) is None


def test_too_many_returns_get_frames_of_their_own() -> None:
    """Each fits a ring's slot, so that it is sent whole or not at all."""
    session, memory = sharing(CLIENT)
    memory.returns.extend((2**32 - 2, 2**64 - 64) for _ in range(100))
    sizes = []
    while (data := session.return_frame()) is not None:
        assert len(data) <= 1024
        sizes.append(len(_read(data)[0]) // 2)
    assert sum(sizes) + len(memory.returns) == 100 and len(memory.returns) <= MAX_RETURNS
    assert make(CLIENT).return_frame() is None and make(CLIENT).return_frame(0) is None


def test_returns_of_a_frame_that_was_not_sent_are_still_to_be_made() -> None:
    session, memory = sharing(CLIENT)
    memory.returns.extend([(2, 0), (2, 64)])
    request_id, _ = session.request("f", (), {}, 0)
    memory.returns.append((2, 128))  # meanwhile
    session.discard(request_id)
    assert list(memory.returns) == [(2, 0), (2, 64), (2, 128)] and session.inflight == 0 and session.returns == []
    session.discard_last()
    assert list(memory.returns) == [(2, 0), (2, 64), (2, 128)]
    session.request("f", (), {}, 0)
    session.discard_last()
    session.discard_last()  # only once
    assert list(memory.returns) == [(2, 0), (2, 64), (2, 128)]


def test_a_frame_that_fits_only_without_returns_goes_without() -> None:
    session, memory = sharing(CLIENT)
    room = 65536 - 40 - 8 * 12
    memory.returns.extend((2, 64 * number) for number in range(MAX_RETURNS))
    data = session.request("f", (), {"b": bytes(room)}, 0)[1]
    assert _read(data) == [] and len(memory.returns) == MAX_RETURNS
    for attrs, error in (({"b": bytes(70_000)}, LimitError), ({"a": None}, SettingError)):
        with pytest.raises(error):
            session.request("f", (), attrs, 0)
        assert len(memory.returns) == MAX_RETURNS and memory.returns[0] == (2, 0)


def test_the_offer_is_in_the_hello() -> None:
    session = Session(is_client=True, allocate=Pool().allocate, capabilities=1, offer={"shm": "memfd", "other": 5})
    seen: list[Any] = []

    def agree(attrs: dict[str, Any], limits: Limits) -> None:
        seen.append(({name: attrs[name] for name in ("shm", "other", "capabilities")}, limits))

    server = Session(is_client=False, allocate=Pool().allocate, on_hello=agree)
    assert feed(server, bytes(session.hello())) == [("hello", Limits())]
    assert seen == [({"shm": "memfd", "other": 5, "capabilities": 1}, Limits())] and server.shared is None
