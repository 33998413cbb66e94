"""What a session reports: one tuple for each thing that came in.

Rules. An event is a plain NamedTuple, made by `wire/session.py` and `wire/rules.py`. `buffers` hold the bytes of a
message's tensors, one buffer for each tensor, and belong to the receiver of the event: memory of its own, or leases on
shared memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import FastsplitError, ResourceError
from ..schema.descriptor import Message
from ..schema.limits import Limits

__all__ = [
    "Attached",
    "Cancel",
    "Error",
    "Event",
    "Failed",
    "Goodbye",
    "Hello",
    "Probe",
    "Reply",
    "Request",
    "ReturnsWanted",
    "RingOffered",
]


class Request(NamedTuple):
    """Server: a request came in."""

    request_id: int
    message: Message
    buffers: list[Any]
    time_ns: int
    """Time left to the caller's deadline, 0 for none."""
    flags: int
    """How the reply is wanted: schema.header.wanted_reply."""
    refusal: ResourceError | None = None
    """Set if there is no memory for its tensors: then there are no buffers, and this is the answer."""


class Reply(NamedTuple):
    """Client: the reply to a request."""

    request_id: int
    message: Message
    buffers: list[Any]
    time_ns: int
    """Time that the handler took."""
    refusal: ResourceError | None = None
    """Set if there is no memory for its tensors: then there are no buffers, and the call fails with this."""


class Error(NamedTuple):
    """Client: a request failed on the server. `code`: failed, unknown-op, deadline or cancelled."""

    request_id: int
    code: str
    text: str


class Cancel(NamedTuple):
    """Server: the client drops the answer to a request, which is sent all the same."""

    request_id: int


class Hello(NamedTuple):
    """The handshake is complete. `capabilities`: those of both sides."""

    limits: Limits
    capabilities: int


class RingOffered(NamedTuple):
    """Server: the client has made a ring. The answer is an ATTACHED frame."""

    nbytes: int
    name: str


class Attached(NamedTuple):
    """Client: the server's answer to the ring. `text`: why it could not be mapped, empty if it was."""

    text: str


class Probe(NamedTuple):
    """The client measures the link, or the server answers that it does.

    `wanted`: bytes of padding that the answer is to bring. `bytes_per_s`: how fast the peer receives from this side,
    `rtt_s`: the shortest round trip that the peer has seen; 0 for either if it is not known.
    """

    number: int
    is_answer: bool
    wanted: int
    bytes_per_s: float
    rtt_s: float


class ReturnsWanted(NamedTuple):
    """The peer is short of memory, and asks for its returns now."""


class Goodbye(NamedTuple):
    """The peer sends nothing more."""


class Failed(NamedTuple):
    """The stream is dead, and this is its last event. `tell`: whether the peer is to be told with an ABORT."""

    error: FastsplitError
    tell: bool


Event = Request | Reply | Error | Cancel | Hello | RingOffered | Attached | ReturnsWanted | Probe | Goodbye | Failed
