"""docs/protocol.md says what the code does: its tables, and its example byte for byte."""

from __future__ import annotations

import re
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_peer import ABORT, GOODBYE, RawPeer, hello, serving
from raw_peer import frame as frame_of

import fastsplit
from fastsplit.schema import header as frame
from fastsplit.schema import message_generated as gen
from fastsplit.schema.coding import CASTS, CODECS, cast_bit, codec_bit
from fastsplit.schema.dtypes import BY_CODE
from fastsplit.schema.encoder import Encoder
from fastsplit.schema.limits import Limits
from fastsplit.wire import rules, service
from fastsplit.wire.aio import requests
from fastsplit.wire.session import Session
from fastsplit.wire.shm import slots
from fastsplit.wire.shm.negotiation import Offer
from fastsplit.wire.shm.semaphores import STRIDE

DOC = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text()


def _table(first_column: str) -> list[list[str]]:
    """The rows of the table whose head begins with this name."""
    (table,) = re.findall(rf"^\| {re.escape(first_column)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", DOC, re.MULTILINE)
    return [[cell.strip().strip("`") for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]


def _example(name: str) -> bytes:
    """The bytes of an example; each line's offset is checked too."""
    (block,) = re.findall(rf"^```hex {name}\n(.*?)^```", DOC, re.MULTILINE | re.DOTALL)
    data = b""
    for line in block.splitlines():
        offset, digits = re.fullmatch(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)  .*", line).groups()
        assert int(offset, 16) == len(data), line
        data += bytes.fromhex(digits)
    return data


def test_header_table() -> None:
    types = {"bytes": "4s", "uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q"}
    layout, at = "<", 0
    for offset, size, kind, *_ in _table("offset"):
        assert int(offset) == at and struct.calcsize("<" + types[kind]) == int(size)
        layout += types[kind]
        at += int(size)
    assert layout == frame._HEADER.format and at == frame.HEADER_NBYTES
    fields = [row[3] for row in _table("offset")]
    out = bytearray(at + 9)
    frame.pack_header(out, 5, 6, 7, 8, 10)
    assert dict(zip(fields, struct.unpack_from(layout, out), strict=True)) == {
        "magic": b"FSPL",
        "version": 1,
        "kind": 5,
        "flags": 0,
        "request_id": 6,
        "metadata_nbytes": 9,
        "varying_nbytes": 7,
        "payload_nbytes": 8,
        "time_ns": 10,
    }


def test_kinds() -> None:
    kinds = [(int(row[0]), row[1]) for row in _table("kind")]
    assert kinds == [(kind.value, kind.name) for kind in frame.Kind]


def test_dtypes() -> None:
    rows = _table("code | dtype")
    assert [(int(code), name, int(size)) for code, name, size in rows] == [
        (row.code, row.name, row.itemsize) for row in BY_CODE.values()
    ]


def test_attribute_types() -> None:
    """Each row says the field that holds the value, in a message with one attribute of that type."""
    values: dict[str, Any] = {
        "Int": 3, "Float": 0.5, "String": "text", "Bytes": b"data", "Ints": [3], "Strings": ["text"],
        "Bool": True, "Floats": [0.5], "Bools": [True],
    }  # fmt: skip
    rows = _table("type | name")
    assert {name: int(number) for number, name, _ in rows} == {
        name: number for name, number in vars(gen.AttrType).items() if not name.startswith("_") and number
    }
    for number, name, value in rows:
        out, _ = Encoder(Limits(), typed=True).encode("", [], {"v": values[name]})
        message = gen.Message.GetRootAs(out)
        attr = message.Attrs(0)
        has = {
            "ints": message.IntsLength(), "floats": message.FloatsLength(), "text": len(attr.Text() or b""),
            "data": attr.DataLength(), "int_list": attr.IntListLength(), "text_list": attr.TextListLength(),
            "float_list": attr.FloatListLength(),
        }  # fmt: skip
        assert attr.Type() == int(number)
        assert {field for field, count in has.items() if count} == set(re.findall(r"\w+", value)) & has.keys()


def test_limits() -> None:
    rows = {name: (int(least), int(default)) for name, least, default in _table("cap")}
    assert {name: default for name, (_, default) in rows.items()} == asdict(Limits())
    for name, (least, _) in rows.items():
        assert getattr(Limits(**{name: least}), name) == least
        with pytest.raises(ValueError, match=f"{name}: {least - 1}, expected an int from {least}"):
            Limits(**{name: least - 1})


def test_codings() -> None:
    assert {name: int(number) for number, name, _ in _table("number | cast")} == CASTS
    assert {name: int(number) for number, name, _ in _table("number | codec")} == CODECS
    bits = {name: int(bit) for name, bit, _ in _table("capability | bit")}
    assert bits == {
        "shared memory": rules.SHARES,
        "codings": rules.CODES,
        "probes": rules.PROBES,
        "attribute types": rules.TYPES,
        **{name: cast_bit(number) for name, number in CASTS.items()},
        **{name: codec_bit(number) for name, number in CODECS.items()},
    }
    assert f"of {rules.MAX_PADDING_NBYTES} bytes at most" in DOC.replace("\n", " ")


def test_handshake_attributes() -> None:
    came: list[Any] = []

    class Recorder(Session):
        def open(self, message: Any) -> Any:
            came.append(message)
            return super().open(message)

    reader = Recorder(is_client=False, allocate=bytearray)
    offered = Offer(("memfd",), "", "", "glibc-64", "0" * 16)
    data = Session(is_client=True, allocate=bytearray, offer=offered.attrs()).hello()
    reader.receive_buffers()[0][: len(data)] = data
    reader.received(len(data))
    rows = {name: {"String": str, "Int": int}[kind] for name, kind, _ in _table("attribute")}
    assert {name: type(value) for name, value in came[0].attrs.items()} == rows
    assert came[0].op == "hello"


def test_ring_table() -> None:
    places = {int(at): size for at, size, _ in _table("at")}
    spaces, items, first = slots._SPACE_AT, slots._ITEMS_AT, slots._SLOTS_AT
    nbytes = slots.SLOTS * slots.SLOT_NBYTES
    assert list(places) == [0, *slots._ASLEEP_AT, slots._FENCE_AT, *spaces, *items, first, first + nbytes]
    assert places[0] == str(slots._HEADER.size)
    assert {places[at] for at in spaces} == {f"2 x {STRIDE}"}
    assert {places[at] for at in items} == {f"{slots.SLOTS} x {STRIDE}"}
    assert {places[at] for at in (first, first + nbytes)} == {f"{slots.SLOTS} x {slots.SLOT_NBYTES}"}
    assert first + 2 * nbytes == slots.RING_NBYTES and f"{slots.RING_NBYTES} bytes" in DOC.replace("\n", " ")


def test_error_codes_are_the_ones_in_the_source() -> None:
    sources = "".join(Path(module.__file__).read_text() for module in (service, requests))
    used = set(re.findall(r'Refusal\("([a-z-]+)"', sources))
    assert {row[0] for row in _table("code | meaning")} == used


def test_example_request_and_reply(unix_uri: str) -> None:
    """What a channel really sends, and that it understands the answer."""
    seen: list[bytes] = []

    def script(peer: RawPeer) -> None:
        came = peer.receive()
        assert came is not None
        peer.send(hello())
        data = b""
        while len(data) < len(_example("REQUEST")):
            data += peer.sock.recv(10_000)
        seen.append(data)
        peer.send(_example("REPLY"))
        came = peer.receive()
        assert came is not None and came.kind == GOODBYE

    with serving(unix_uri, script) as uri, fastsplit.connect(uri, arrays="numpy") as channel:
        x = np.array([[1, 2], [3, 4]], np.float32)
        (y,) = channel.call("scale", x, by=2.0, timeout_s=5)
        assert y.tolist() == [[2, 4], [6, 8]] and y.dtype == np.float32
    assert seen == [_example("REQUEST")]


def test_example_reply_is_what_a_server_sends() -> None:
    server = Session(is_client=False, allocate=bytearray)
    greeting = hello()
    server.receive_buffers()[0][: len(greeting)] = greeting
    server.received(len(greeting))
    reply = bytes(server.reply(1, [(12, (2, 2))], 16, 1000)) + struct.pack("<4f", 2, 4, 6, 8)
    assert reply == _example("REPLY")


def test_codes_of_an_abort() -> None:
    rows = {code: error for code, _, error in _table("abort | meaning")}
    assert rows.keys() == {rules.BROKEN, rules.SHORTAGE, rules.REFUSED}
    for code, name in rows.items():
        client = Session(is_client=True, allocate=bytearray)
        data = frame_of(ABORT, op="", attrs={"code": code, "text": "why"})
        client.receive_buffers()[0][: len(data)] = data
        (failed,) = client.received(len(data))
        assert type(failed.error).__name__ == name
        assert "why" in str(failed.error)
