"""The table of rules: every kind of frame in every state, from either side, against docs/protocol.md."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from raw_peer import ABORT, FLOAT32, GOODBYE, frame, hello
from session_ends import CLIENT, SERVER, UINT8, Memory, feed, feed_slots

from fastsplit.schema.decoder import Decoder
from fastsplit.schema.descriptor import Message
from fastsplit.schema.header import Kind
from fastsplit.schema.limits import Limits
from fastsplit.tensors.pool import Pool
from fastsplit.wire.rules import PROBES, RULES, SHARES, Sender, State, Tensors, call_kind, check
from fastsplit.wire.session import Session

DOC = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text()
SIDES = {CLIENT: "client", SERVER: "server"}
ATTRS: dict[int, dict[str, Any]] = {
    Kind.SEGMENT: {"id": 2, "nbytes": 64, "name": ""},
    Kind.ATTACHED: {"text": ""},
    Kind.RETIRE: {"id": 2},
    Kind.RETURN: {"wanted": 0},
}


def _rows(head: str) -> list[list[str]]:
    """The cells of the table whose head begins with this."""
    (table,) = re.findall(rf"^\| {re.escape(head)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", DOC, re.MULTILINE)
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]


def _documented() -> dict[tuple[int, State, bool], bool]:
    """Whether a frame of a kind may come in a state, for a receiver that is the client or the server."""
    found = {}
    for names, *cells in _rows("received"):
        if names == "end of stream":
            continue
        handshake, by_client, by_server, ended = (cell != "error" for cell in cells)
        for name, is_client in product(names.split(", "), (CLIENT, SERVER)):
            opened = by_client if is_client else by_server
            for state, legal in zip(State, (handshake, opened, ended), strict=True):
                found[Kind[name], state, is_client] = legal
    return found


LEGAL = _documented()
CASES = list(product(Kind, State, (CLIENT, SERVER)))


def _session(state: State, is_client: bool, agreed: int) -> Session:
    """A session in a state, with one open request if it is a client. `agreed`: SHARES, PROBES or 0."""
    session = Session(
        is_client=is_client,
        allocate=Pool().allocate,
        capabilities=agreed,
        on_hello=lambda attrs, limits: Memory() if agreed == SHARES else None,
    )
    if state is not State.HANDSHAKE:
        feed(session, hello(capabilities=agreed))
        if is_client:
            session.request("f", (), {}, 0)
    if state is State.ENDED:
        feed(session, frame(GOODBYE))
    assert session.state is state
    return session


def _frame(kind: Kind, is_client: bool, *tensors: tuple[int, tuple[int, ...]]) -> bytes:
    """A frame that says what it must, as a receiver that is the client, or the server, gets it."""
    if kind == Kind.HELLO:
        return hello()
    attrs = ATTRS.get(kind, {})
    if kind == Kind.PROBE:
        attrs = {"answer": int(is_client), "wanted": 0, "bytes_per_s": 0.0}
    sizes = {UINT8: 1, FLOAT32: 4}
    payload = b"".join(bytes(sizes[code] * shape[0]) for code, shape in tensors)
    return frame(kind, 1, "", tensors, attrs, payload)


def test_the_documented_table_is_whole() -> None:
    assert LEGAL.keys() == set(CASES) and RULES.keys() == set(Kind)


@pytest.mark.parametrize(
    ("kind", "state", "is_client"),
    CASES,
    ids=[f"{kind.name}, {state.value}, received by the {SIDES[is_client]}" for kind, state, is_client in CASES],
)
def test_every_kind_in_every_state_from_either_side(kind: Kind, state: State, is_client: bool) -> None:
    """Through a stream and a ring, whatever was agreed on."""
    documented = LEGAL[kind, state, is_client]
    for agreed, way in product((0, SHARES, PROBES), (feed, feed_slots)):
        session = _session(state, is_client, agreed)
        events = way(session, _frame(kind, is_client))
        errors = [event[1] for event in events if event[0] == "failed"]
        if kind == ABORT:
            assert documented and errors == ["the peer ended the connection: no reason given"] and session.aborted
        elif documented and not RULES[kind].needs & ~agreed:
            assert errors == []
        else:
            assert len(errors) == 1 and kind.name in errors[0]
            assert session.state is State.ENDED


@pytest.mark.parametrize(
    ("tensors", "accepted_by"),
    [
        ([(UINT8, (3,))], {Tensors.ANY, Tensors.PADDING}),
        ([(FLOAT32, (3,))], {Tensors.ANY}),
        ([(UINT8, (3,)), (UINT8, (1,))], {Tensors.ANY}),
    ],
    ids=["uint8", "float32", "two"],
)
@pytest.mark.parametrize("is_client", [CLIENT, SERVER], ids=["client", "server"])
@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.HELLO, Kind.ABORT)])
def test_tensors_of_every_kind(kind: Kind, is_client: bool, tensors: Any, accepted_by: set[Tensors]) -> None:
    if not LEGAL[kind, State.OPEN, is_client]:
        return
    rule = RULES[kind]
    session = _session(State.OPEN, is_client, rule.needs)
    events = feed(session, _frame(kind, is_client, *tensors))
    errors = [event[1] for event in events if event[0] == "failed"]
    assert (errors == []) == (rule.tensors in accepted_by)
    assert all(error.startswith(f"a {kind.name} frame with ") for error in errors)


def test_senders_and_tensors_are_the_documented_ones() -> None:
    for number, name, sender, tensors, _ in _rows("kind"):
        rule = RULES[int(number)]
        # An ERROR from a client fails as an answer, which has the better text; what an ABORT announces is never read.
        assert rule.sender.value == sender or (name == "ERROR" and rule.answers and rule.sender is Sender.BOTH)
        assert rule.tensors.value == tensors or (name == "ABORT" and rule.tensors is Tensors.UNREAD)
    needs = {Kind(kind).name: rule.needs for kind, rule in RULES.items() if rule.needs}
    assert needs == dict.fromkeys(("SEGMENT", "ATTACHED", "RETIRE", "RETURN"), SHARES) | {"PROBE": PROBES}


@pytest.mark.parametrize("is_client", [CLIENT, SERVER], ids=["client", "server"])
@pytest.mark.parametrize("state", State)
def test_the_short_way_takes_what_the_table_allows(state: State, is_client: bool) -> None:
    """A session checks no frame of `call_kind`: its rule must leave nothing to check."""
    kind = call_kind(state, is_client=is_client)
    assert kind == (0 if state is not State.OPEN else Kind.REPLY if is_client else Kind.REQUEST)
    assert _session(state, is_client, 0)._call_kind == kind
    if kind:
        for tensors in ((), ((FLOAT32, (3,)), (UINT8, (1,)))):
            data = _frame(Kind(kind), is_client, *tensors)
            metadata_nbytes = len(data) - 40 - sum(12 if code == FLOAT32 else 1 for code, _ in tensors)
            message: Message = Decoder(Limits()).decode(data[40 : 40 + metadata_nbytes], 0)
            assert check(kind, state, message, is_client=is_client, agreed=0) is RULES[kind]
