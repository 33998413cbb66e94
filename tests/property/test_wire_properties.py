"""Properties of the wire: round trips however the stream is cut, and nothing but our own errors for any bytes at all.

The examples are few, since each property is also driven by tables in tests/unit; what is found here belongs there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from amount import times
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_peer import hello

from fastsplit.errors import LimitError, RemoteProtocolError
from fastsplit.schema.dtypes import BY_CODE
from fastsplit.schema.header import HEADER_NBYTES, Kind, pack_header, parse_header
from fastsplit.schema.limits import Limits
from fastsplit.wire.backend import Decoder, Encoder
from fastsplit.wire.events import Failed, Reply, Request
from fastsplit.wire.rules import TYPES
from fastsplit.wire.session import Session

pytestmark = pytest.mark.matrix

LIMITS = Limits(max_message_nbytes=2**16, max_tensors=8, max_dims=5, max_attrs=16, max_metadata_nbytes=8192)
modest = settings(max_examples=times(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensors = st.lists(st.tuples(st.sampled_from(sorted(BY_CODE)), shapes), max_size=5)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
int64s = st.integers(-(2**63), 2**63 - 1)
values = st.one_of(
    int64s,
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.binary(max_size=20),
    st.lists(int64s, max_size=5),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=5), max_size=4),
    st.booleans(),
    st.lists(st.booleans(), max_size=5),
    st.lists(st.floats(allow_nan=False), max_size=5),
)
attributes = st.dictionaries(names, values, max_size=5)
ops = st.text(st.characters(codec="utf-8"), max_size=20)


class Bounded:
    """Memory for tensors, never more than the caps allow."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __call__(self, nbytes: int) -> Any:
        self.nbytes += nbytes
        assert nbytes <= LIMITS.max_message_nbytes
        return np.zeros(nbytes, np.uint8)


def _session(*, is_client: bool, allocate: Bounded | None = None) -> Session:
    return Session(is_client=is_client, allocate=allocate or Bounded(), limits=LIMITS, capabilities=TYPES)


def _decoder(limits: Limits = LIMITS) -> Decoder:
    decoder = Decoder(limits)
    decoder.typed = True
    return decoder


def _pair() -> tuple[Session, Session]:
    client, server = (_session(is_client=is_client) for is_client in (True, False))
    _feed(server, bytes(client.hello()))
    _feed(client, bytes(server.hello()))
    return client, server


def _feed(session: Session, data: bytes, cuts: list[int] | None = None) -> list[Any]:
    """Everything up to the stream's end or its failure; `cuts`: how many bytes come at once, over and over."""
    events: list[Any] = []
    at = turn = 0
    while at < len(data):
        target = session.receive_buffers()[0]
        size = cuts[turn % len(cuts)] if cuts else len(data)
        turn += 1
        part = data[at : at + min(len(target), size)]
        target[: len(part)] = part
        at += len(part)
        events += session.received(len(part))
        if events and isinstance(events[-1], Failed):
            assert type(events[-1].error) is RemoteProtocolError
            break
    return events


def _nbytes(descs: list[tuple[int, tuple[int, ...]]]) -> int:
    return sum(math.prod(shape) * BY_CODE[code].itemsize for code, shape in descs)


@modest
@given(
    st.lists(st.tuples(ops, tensors, attributes), min_size=1, max_size=4), st.lists(st.integers(1, 5000), min_size=1)
)
def test_requests_and_replies_survive_any_chunking(messages: list[Any], cuts: list[int]) -> None:
    client, server = _pair()
    stream, expected = b"", []
    for op, descs, attrs in messages:
        payload = np.random.default_rng(1).bytes(_nbytes(descs))
        request_id, head = client.request(op, descs, attrs, len(payload))
        stream += bytes(head) + payload
        expected.append((request_id, op, descs, repr(attrs), payload))  # True is no 1, and -0.0 no 0.0
    requests = _feed(server, stream, cuts)
    assert [_plain(event) for event in requests] == expected
    back = b""
    for event, (_, _, descs, _, payload) in zip(requests[::-1], expected[::-1], strict=True):
        back += bytes(server.reply(event.request_id, descs, len(payload), 1, event.message.attrs)) + payload
    assert [_plain(event) for event in _feed(client, back, cuts)] == [(n, "", *rest) for n, _, *rest in expected[::-1]]
    assert client.inflight == 0


def _plain(event: Request | Reply) -> tuple[Any, ...]:
    descs = [(desc.dtype.code, desc.shape) for desc in event.message.tensors]
    payload = b"".join(bytes(buffer) for buffer in event.buffers)
    return event.request_id, event.message.op, descs, repr(event.message.attrs), payload


@modest
@given(st.lists(st.tuples(ops, tensors, attributes), min_size=1, max_size=6))
def test_caches_never_change_what_a_message_means(messages: list[Any]) -> None:
    encoder, decoder = Encoder(LIMITS, typed=True), _decoder()
    for op, descs, attrs in messages * 2:
        data, hint = encoder.encode(op, descs, attrs)
        fresh, fresh_hint = Encoder(LIMITS, typed=True).encode(op, descs, attrs)
        assert (data, hint) == (fresh, fresh_hint)
        message = decoder.decode(bytes(data), hint)
        assert message == _decoder().decode(bytes(data), 0)
        assert (message.op, repr(message.attrs), message.payload_nbytes) == (op, repr(attrs), _nbytes(descs))


WIDEST = Limits(
    max_metadata_nbytes=2**24, max_message_nbytes=2**63 - 1, max_tensors=1000, max_dims=1000, max_attrs=1000
)
caps = st.builds(
    Limits,
    max_metadata_nbytes=st.integers(4096, 5000),
    max_message_nbytes=st.one_of(st.integers(1, 200), st.integers(1, 2**63 - 1)),
    max_tensors=st.integers(1, 6),
    max_dims=st.one_of(st.integers(1, 5), st.integers(1, 100)),
    max_attrs=st.integers(16, 18),
)
wide_dims = st.one_of(st.integers(0, 5), st.sampled_from([0, 0, 2**20, 2**31, 2**40, 2**62, 2**63 - 1]))
wide_shapes = st.one_of(st.lists(wide_dims, max_size=6), st.integers(0, 70).map(lambda n: [1] * n)).map(tuple)
wide_tensors = st.lists(st.tuples(st.sampled_from(sorted(BY_CODE)), wide_shapes), max_size=7)
wide_attributes = st.one_of(
    attributes,
    st.integers(15, 19).map(lambda n: {f"a{index}": index for index in range(n)}),
    st.integers(3900, 5000).map(lambda n: {"text": "x" * n}),
    st.integers(480, 620).map(lambda n: {"ints": [7] * n}),
    st.integers(480, 620).map(lambda n: {"floats": [0.5] * n}),
    st.integers(3900, 5000).map(lambda n: {"bools": [True] * n}),
)


@settings(modest, max_examples=times(600))
@given(caps, st.one_of(ops, st.integers(3900, 5000).map(lambda n: "o" * n)), wide_tensors, wide_attributes)
def test_what_a_sender_lets_pass_a_receiver_accepts(limits: Limits, op: str, descs: Any, attrs: Any) -> None:
    """And what a receiver would refuse a sender refuses, with a LimitError."""
    try:
        data, varying_nbytes = Encoder(WIDEST, HEADER_NBYTES, typed=True).encode(op, descs, attrs)
    except LimitError:
        return  # more than any array can be
    pack_header(data, Kind.REQUEST, 1, varying_nbytes, _nbytes(descs), 0, 0)
    try:
        header = parse_header(data, 0, limits)
        message = _decoder(limits).decode(bytes(data[HEADER_NBYTES:]), header[3])
    except RemoteProtocolError:
        message = None
    if message is None:
        with pytest.raises(LimitError):
            Encoder(limits, typed=True).encode(op, descs, attrs)
        return
    assert (
        Encoder(limits, HEADER_NBYTES, typed=True).encode(op, descs, attrs)[0][HEADER_NBYTES:] == data[HEADER_NBYTES:]
    )
    for desc in message.tensors:  # and numpy can hold it
        np.lib.stride_tricks.as_strided(np.zeros((), desc.dtype.buffer_dtype), desc.shape, (0,) * len(desc.shape))


@modest
@given(st.booleans(), st.booleans(), st.binary(max_size=300), st.lists(st.integers(1, 200), min_size=1))
def test_arbitrary_bytes(is_client: bool, greeted: bool, data: bytes, cuts: list[int]) -> None:
    allocate = Bounded()
    session = _session(is_client=is_client, allocate=allocate)
    if greeted:
        _feed(session, hello(capabilities=TYPES))
    for prefix in (b"", b"FSPL\x01\x02\x00\x00"):
        if any(isinstance(event, Failed) for event in _feed(session, prefix + data, cuts)):
            break
    assert allocate.nbytes <= LIMITS.max_message_nbytes


@modest
@given(st.binary(max_size=400), st.integers(0, 400))
def test_arbitrary_metadata(data: bytes, hint: int) -> None:
    for metadata in (data, data[:4] + b"FSM1" + data[4:], b"\x10\0\0\0FSM1\x0c\0\x10\0\0\0\x04\0\x08\0\x0c\0" + data):
        try:
            message = _decoder().decode(metadata, hint)
        except RemoteProtocolError:
            continue
        assert message.payload_nbytes <= LIMITS.max_message_nbytes


mutations = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.floats(0, 1), st.integers(0, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 40)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.integers(0, 255)),
        st.tuples(st.just("word"), st.floats(0, 1), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**16, 40, 8])),
    ),
    min_size=1,
    max_size=4,
)


@settings(modest, max_examples=times(400))
@given(ops, tensors, attributes, mutations, st.lists(st.integers(1, 500), min_size=1))
def test_valid_frames_with_damage(op: str, descs: Any, attrs: Any, damage: list[Any], cuts: list[int]) -> None:
    """Either it still means something, within the caps, or it is a RemoteProtocolError; never anything else."""
    client, _ = _pair()
    allocate = Bounded()
    server = _session(is_client=False, allocate=allocate)
    _feed(server, hello(capabilities=TYPES))
    payload = bytes(_nbytes(descs))
    frame = bytes(client.request(op, descs, attrs, len(payload))[1]) + payload
    data = bytearray(frame)
    for kind, where, value in damage:
        at = int(where * (len(data) - 1))
        if kind == "set":
            data[at] = value
        elif kind == "cut":
            del data[at : at + value]
        elif kind == "insert":
            data.insert(at, value)
        else:
            data[at : at + 4] = value.to_bytes(4, "little")
        if len(data) < 50:
            break
    _feed(server, frame)  # its head is known now, so that damage to the numbers goes the cached way
    allocate.nbytes = 0
    events = _feed(server, bytes(data), cuts)
    frames = sum(isinstance(event, Request) for event in events) + 1
    assert allocate.nbytes <= frames * LIMITS.max_message_nbytes
