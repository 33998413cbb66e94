"""The fixed header: what it packs, and one error for each way to be wrong."""

from __future__ import annotations

import re
import struct
from typing import Any

import pytest
from raw_peer import HEADER

from fastsplit.errors import RemoteProtocolError
from fastsplit.schema.header import HEADER_NBYTES, Kind, pack_header, parse_header
from fastsplit.schema.limits import Limits

LIMITS = Limits(max_metadata_nbytes=5000, max_message_nbytes=1_000_000)


def _header(**changes: Any) -> bytes:
    fields = {
        "magic": b"FSPL",
        "version": 1,
        "kind": 2,
        "flags": 0,
        "request_id": 7,
        "metadata_nbytes": 120,
        "varying_nbytes": 24,
        "payload_nbytes": 4096,
        "time_ns": 99,
    }
    return HEADER.pack(*{**fields, **changes}.values())


def test_pack_writes_the_byte_table() -> None:
    out = bytearray(HEADER_NBYTES + 120)
    pack_header(out, Kind.REQUEST, 7, 24, 4096, 99)
    assert HEADER_NBYTES == HEADER.size == 40
    assert out[:HEADER_NBYTES] == _header()
    assert out[HEADER_NBYTES:] == bytes(120)


def test_parse_reads_it_at_any_place() -> None:
    assert parse_header(b"xyz" + _header(), 3, LIMITS) == (Kind.REQUEST, 7, 120, 24, 4096, 99, 0)


def test_limits_are_inclusive() -> None:
    most = _header(metadata_nbytes=5000, varying_nbytes=5000, payload_nbytes=1_000_000, request_id=2**64 - 1)
    assert parse_header(most, 0, LIMITS)[1:5] == (2**64 - 1, 5000, 5000, 1_000_000)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"magic": b"HTTP"}, "header, magic: b'HTTP', expected b'FSPL'; the peer does not speak fastsplit"),
        ({"version": 2}, "header, version: 2, expected 1"),
        ({"version": 0}, "header, version: 0, expected 1"),
        ({"kind": 0}, "header, kind: 0, expected 1 to 12"),
        ({"kind": 13}, "header, kind: 13, expected 1 to 12"),
        ({"flags": 0x8001}, "header, flags: 0x8001, expected 0: none was negotiated"),
        ({"varying_nbytes": 121}, "header, varying_nbytes: 121, expected at most 120"),
        ({"metadata_nbytes": 5001}, "header, metadata_nbytes: 5001, expected at most 5000"),
        ({"metadata_nbytes": 2**32 - 1}, "header, metadata_nbytes: 4294967295, expected at most 5000"),
        ({"payload_nbytes": 1_000_001}, "header, payload_nbytes: 1000001, expected at most 1000000"),
        ({"payload_nbytes": 2**64 - 1}, "header, payload_nbytes: 18446744073709551615, expected at most 1000000"),
    ],
    ids=lambda value: next(iter(value.items()), None).__repr__() if isinstance(value, dict) else "",
)
def test_each_field_has_its_error(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=f"^{re.escape(text)}$"):
        parse_header(_header(**changes), 0, LIMITS)


def test_flags_are_a_requests_own() -> None:
    out = bytearray(HEADER_NBYTES)
    pack_header(out, Kind.REQUEST, 7, 0, 0, 0, 0x12)
    assert parse_header(out, 0, LIMITS, 0xFF)[6] == 0x12
    with pytest.raises(RemoteProtocolError, match="flags: 0x0012"):
        parse_header(out, 0, LIMITS, 0x0F)
    pack_header(out, Kind.REPLY, 7, 0, 0, 0, 0x12)
    with pytest.raises(RemoteProtocolError, match="flags: 0x0012"):
        parse_header(out, 0, LIMITS, 0xFF)


def test_every_kind_is_accepted() -> None:
    for kind in Kind:
        assert parse_header(_header(kind=kind), 0, LIMITS)[0] == kind


@pytest.mark.parametrize("at", [-1, 1, 2**62])
def test_a_header_that_is_not_all_there(at: int) -> None:
    with pytest.raises((struct.error, OverflowError)):
        parse_header(_header(), at, LIMITS)


@pytest.mark.parametrize("numbers", [(300, 1, 0, 0), (1, -1, 0, 0), (1, 2**64, 0, 0), (1, 1, 2**32, 0), (1, 1, 0, 1.5)])
def test_numbers_that_a_header_cannot_hold(numbers: tuple[Any, ...]) -> None:
    with pytest.raises(struct.error):
        pack_header(bytearray(HEADER_NBYTES), *numbers)
    with pytest.raises(struct.error):
        pack_header(bytearray(HEADER_NBYTES - 1), 1, 1, 0, 0)
