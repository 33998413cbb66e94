"""Which frame is legal when, and what it does: RULES, one row for each kind.

A row says in which states a frame may come, which side may send it, which tensors it may have, which capability it
needs, whether it answers a request, and the function that handles it. `check` applies a row to a frame;
`wire/session.py` calls it for each frame except those of `call_kind`, which a row makes legal without a further check.
docs/protocol.md has the same table, and a test compares the two.

Rules. A frame is checked before memory is allocated for its tensors, and handled when its payload is complete. An error
names the kind, and what was expected. What a frame says (its attributes) is checked by the function that handles it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConnectError, PeerLostError, RemoteProtocolError, ResourceError
from ..schema.descriptor import Message
from ..schema.dtypes import BY_NAME
from ..schema.header import Header, Kind
from .events import Attached, Cancel, Error, Event, Goodbye, Probe, Reply, Request, ReturnsWanted, RingOffered

if TYPE_CHECKING:
    from .session import Session

__all__ = [
    "BROKEN",
    "CODES",
    "MAX_PADDING_NBYTES",
    "PROBES",
    "REFUSED",
    "RULES",
    "SHARES",
    "SHORTAGE",
    "TYPES",
    "Rule",
    "Sender",
    "State",
    "Tensors",
    "agreed_on",
    "call_kind",
    "check",
]

SHARES, CODES, PROBES, TYPES = 1, 2, 4, 8
"""Capabilities, bits of what a side can do beyond the base protocol: shared memory, coded tensors (and flags that say
how a reply is wanted), measuring the link, attributes that are bools or lists of floats or of bools. A bit counts when
both sides set it."""
MAX_PADDING_NBYTES = 4 * 1024**2
"""Of a PROBE: bytes of padding, which are read and dropped."""
BROKEN, SHORTAGE, REFUSED = "broken", "shortage", "refused"
"""Codes of an ABORT. A receiver takes any other for `broken`."""


class State(Enum):
    """Of what comes in on a connection."""

    HANDSHAKE = "handshake"
    OPEN = "open"
    ENDED = "ended"


class Sender(Enum):
    """The sides that may send a frame."""

    CLIENT = "client"
    SERVER = "server"
    BOTH = "both"


class Tensors(Enum):
    """The tensors that a frame may have."""

    NONE = "none"
    ANY = "any"
    PADDING = "at most one"
    """Of uint8, in the payload; it is read and dropped."""
    UNREAD = "unread"
    """The stream ends with the frame's head, whatever it announces."""


class Rule(NamedTuple):
    """When a frame of one kind is legal, and what it does."""

    states: frozenset[State]
    sender: Sender
    tensors: Tensors
    handle: Callable[[Session, Header, Message, list[Any], ResourceError | None], Event | None]
    """`handle(session, header, message, buffers, refusal)`: the event, None for none. Raises RemoteProtocolError."""
    needs: int = 0
    """The capability without which there is no such frame, 0 for none."""
    answers: bool = False
    """Whether its `request_id` must be that of a request without an answer."""


def agreed_on(session: Session) -> int:
    """The capabilities that count for `needs`. Shared memory counts once there is an arena."""
    return session.capabilities & ~SHARES | (0 if session.shared is None else SHARES)


def call_kind(state: State, *, is_client: bool) -> int:
    """The kind of frame that brings a call's tensors to this side in this state, 0 for none."""
    theirs = Sender.SERVER if is_client else Sender.CLIENT
    for kind, rule in RULES.items():
        if rule.tensors is Tensors.ANY and rule.sender is theirs and state in rule.states and not rule.needs:
            return kind
    return 0


def check(kind: int, state: State, message: Message, *, is_client: bool, agreed: int) -> Rule:
    """The rule of a frame that may come now. Raises RemoteProtocolError if it may not.

    `is_client`: whether this side, the receiver, is the client. `agreed`: see `agreed_on`.
    """
    rule = RULES[kind]
    if state not in rule.states:
        raise RemoteProtocolError(f"a {Kind(kind).name} frame in state {state.value!r}")
    if rule.needs & ~agreed:
        why = "no shared memory was agreed on" if rule.needs == SHARES else "it was not agreed on"
        raise RemoteProtocolError(f"a {Kind(kind).name} frame, expected none: {why}")
    if rule.sender is (Sender.CLIENT if is_client else Sender.SERVER):
        raise RemoteProtocolError(f"a {Kind(kind).name} frame from the {'server' if is_client else 'client'}")
    if rule.tensors is Tensors.NONE and message.tensors:
        raise RemoteProtocolError(f"a {Kind(kind).name} frame with {len(message.tensors)} tensors, expected none")
    if rule.tensors is Tensors.PADDING:
        _check_padding(message)
    return rule


def _check_padding(message: Message) -> None:
    tensors = message.tensors
    if len(tensors) > 1 or (tensors and (tensors[0].dtype.code != _UINT8 or tensors[0].nbytes > MAX_PADDING_NBYTES)):
        what = ", ".join(map(str, tensors))
        raise RemoteProtocolError(
            f"a PROBE frame with {what:.200}, expected at most {MAX_PADDING_NBYTES} bytes of uint8"
        )
    if message.placements:
        raise RemoteProtocolError("a PROBE frame with a placement, expected its bytes in the payload as they are")


# ---- what a frame does -----------------------------------------------------------------------------------------------

_UINT8 = BY_NAME["uint8"].code
_Refusal = ResourceError | None


def _on_hello(session: Session, header: Header, message: Message, *_: Any) -> Event:
    return session.open(message)


def _on_request(session: Session, header: Header, message: Message, buffers: list[Any], refusal: _Refusal) -> Event:
    return Request(header[1], message, buffers, header[5], header[6], refusal)


def _on_reply(session: Session, header: Header, message: Message, buffers: list[Any], refusal: _Refusal) -> Event:
    session.forget(header[1])
    return Reply(header[1], message, buffers, header[5], refusal)


def _on_error(session: Session, header: Header, message: Message, *_: Any) -> Event:
    session.forget(header[1])
    attrs = message.attrs
    return Error(header[1], str(attrs.get("code", "failed")), str(attrs.get("text", "no reason given")))


def _on_cancel(session: Session, header: Header, message: Message, *_: Any) -> Event:
    return Cancel(header[1])


def _on_goodbye(session: Session, header: Header, message: Message, *_: Any) -> Event:
    session.end()
    return Goodbye()


def _on_abort(session: Session, header: Header, message: Message, *_: Any) -> Event:
    session.aborted = True
    text, code = message.attrs.get("text", "no reason given"), message.attrs.get("code")
    if code == REFUSED and session.is_client and session.state is State.HANDSHAKE:
        raise ConnectError(f"the server refused the connection: {text}")
    text = f"the peer ended the connection: {text}"
    raise PeerLostError(text) if code == SHORTAGE else RemoteProtocolError(text)


def _on_segment(session: Session, header: Header, message: Message, *_: Any) -> Event | None:
    segment_id = _attr(Kind.SEGMENT, message, "id", int)
    nbytes, name = _attr(Kind.SEGMENT, message, "nbytes", int), _attr(Kind.SEGMENT, message, "name", str)
    if not segment_id and not session.is_client:
        return RingOffered(nbytes, name)
    assert session.shared is not None  # the rule needs SHARES
    session.shared.attach(segment_id, nbytes, name)
    return None


def _on_attached(session: Session, header: Header, message: Message, *_: Any) -> Event:
    return Attached(_attr(Kind.ATTACHED, message, "text", str))


def _on_retire(session: Session, header: Header, message: Message, *_: Any) -> None:
    assert session.shared is not None  # the rule needs SHARES
    session.shared.retire(_attr(Kind.RETIRE, message, "id", int))


def _on_return(session: Session, header: Header, message: Message, *_: Any) -> Event | None:
    return ReturnsWanted() if _attr(Kind.RETURN, message, "wanted", int) else None


def _on_probe(session: Session, header: Header, message: Message, *_: Any) -> Event:
    answer, wanted = _attr(Kind.PROBE, message, "answer", int), _attr(Kind.PROBE, message, "wanted", int)
    bytes_per_s = _attr(Kind.PROBE, message, "bytes_per_s", float)
    if answer != session.is_client:
        raise RemoteProtocolError(f"PROBE, answer: {answer}, expected {int(session.is_client)} from this side")
    most = MAX_PADDING_NBYTES if session.peer_limits is None else session.peer_limits.max_message_nbytes
    most = 0 if answer else min(most, MAX_PADDING_NBYTES)
    if not 0 <= wanted <= most:
        raise RemoteProtocolError(f"PROBE, wanted: {wanted}, expected 0 to {most}")
    if not 0 <= bytes_per_s < math.inf:
        raise RemoteProtocolError(f"PROBE, bytes_per_s: {bytes_per_s}, expected a finite number of 0 or more")
    return Probe(header[1], bool(answer), wanted, bytes_per_s, header[5] * 1e-9)


def _attr(kind: Kind, message: Message, name: str, wanted: type[Any]) -> Any:
    value = message.attrs.get(name)
    if type(value) is not wanted:  # a bool is no int here
        raise RemoteProtocolError(f"{kind.name}, {name}: {value!r}, expected {wanted.__name__}")
    return value


# ---- the table -------------------------------------------------------------------------------------------------------

_HANDSHAKE, _OPEN, _ALWAYS = frozenset({State.HANDSHAKE}), frozenset({State.OPEN}), frozenset(State)

RULES: dict[int, Rule] = {
    Kind.HELLO: Rule(_HANDSHAKE, Sender.BOTH, Tensors.NONE, _on_hello),
    Kind.REQUEST: Rule(_OPEN, Sender.CLIENT, Tensors.ANY, _on_request),
    Kind.REPLY: Rule(_OPEN, Sender.SERVER, Tensors.ANY, _on_reply, answers=True),
    # A server has no open requests, so a client's ERROR never has a valid id.
    Kind.ERROR: Rule(_OPEN, Sender.BOTH, Tensors.NONE, _on_error, answers=True),
    Kind.CANCEL: Rule(_OPEN, Sender.CLIENT, Tensors.NONE, _on_cancel),
    Kind.GOODBYE: Rule(_OPEN, Sender.BOTH, Tensors.NONE, _on_goodbye),
    Kind.ABORT: Rule(_ALWAYS, Sender.BOTH, Tensors.UNREAD, _on_abort),
    Kind.SEGMENT: Rule(_OPEN, Sender.BOTH, Tensors.NONE, _on_segment, needs=SHARES),
    Kind.ATTACHED: Rule(_OPEN, Sender.SERVER, Tensors.NONE, _on_attached, needs=SHARES),
    Kind.RETIRE: Rule(_OPEN, Sender.BOTH, Tensors.NONE, _on_retire, needs=SHARES),
    Kind.RETURN: Rule(_OPEN, Sender.BOTH, Tensors.NONE, _on_return, needs=SHARES),
    Kind.PROBE: Rule(_OPEN, Sender.BOTH, Tensors.PADDING, _on_probe, needs=PROBES),
}
