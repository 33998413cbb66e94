"""The protocol's state machine: bytes in, events out. No I/O, no threads, no clocks but for counting its own time.

    client                                   server
      HELLO  ------------------------------->          both state version, capabilities and limits
             <-------------------------------  HELLO
      REQUEST id, op, attrs, tensors ------->          any number in flight
      CANCEL id ---------------------------->          optional; the request is still answered
             <-----------------  REPLY id, tensors     or ERROR id; in any order, exactly one for each request
      GOODBYE ------------------------------>          or from the server; then the stream ends
      ABORT  <------------------------------>          the other side broke the protocol, and how; then the stream ends

How bytes come in. The owner asks `receive_buffers()` where the next bytes belong, reads into them, and tells
`received(n)`. A frame's head is read into a small staging buffer; as soon as its metadata is complete and valid, memory
for its tensors is allocated and the rest is read straight into it. What of a payload came in the same read as its head
(at most STAGING_NBYTES) is copied over and counted in `staged_nbytes`: that is what one read for a small message costs.

Rules. Events come in the order of the bytes, however these were cut up. A Failed event is the last one: the stream is
dead; `abort` makes the frame that tells the peer. Errors of our own (LimitError, LocalProtocolError) are raised before
anything changes. Nothing is allocated before the
header, the metadata and the session's state were checked against each other. Incoming state belongs to whoever reads,
outgoing state to whoever sends; all they share are the tables of open requests, whose operations are atomic, and that
the session is open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from enum import Enum
from time import perf_counter_ns
from typing import Any, NamedTuple

from ..errors import LimitError, LocalProtocolError, PeerLostError, RemoteProtocolError
from ..schema.descriptor import Attrs, Decoder, Encoder, Message, TensorDesc
from ..schema.dtypes import BY_CODE
from ..schema.limits import Limits
from ..tensors import Desc
from .frame import HEADER_NBYTES, VERSION, Header, Kind, pack_header, parse_header

__all__ = [
    "CAPABILITIES",
    "STAGING_NBYTES",
    "Cancel",
    "Error",
    "Event",
    "Expected",
    "Failed",
    "Goodbye",
    "Hello",
    "Reply",
    "Request",
    "Session",
]

STAGING_NBYTES = 4096
CAPABILITIES = 0
"""Bits of what this side can do beyond the base protocol. A bit counts when both sides set it. None is assigned yet."""

# plain ints: looking up and comparing an enum's members costs more than the rest of a check
_HELLO, _REQUEST, _REPLY, _ERROR, _CANCEL, _ABORT = (
    int(kind) for kind in (Kind.HELLO, Kind.REQUEST, Kind.REPLY, Kind.ERROR, Kind.CANCEL, Kind.ABORT)
)
_SCRATCH_NBYTES = 1024**2
_MAX_TEXT_NBYTES = 3500  # of an ERROR or ABORT: with the rest of the frame it fits the smallest metadata cap
_SOFTWARE = "fastsplit"

Expected = Sequence[Desc] | None


class Request(NamedTuple):
    """A request came in. `buffers` hold the tensors' bytes, one each, and belong to the receiver."""

    request_id: int
    message: Message
    buffers: list[Any]
    time_ns: int


class Reply(NamedTuple):
    """The reply to one of our requests."""

    request_id: int
    message: Message
    buffers: list[Any]
    time_ns: int


class Error(NamedTuple):
    """The peer could not or would not do what one of our requests asked for."""

    request_id: int
    code: str
    text: str


class Cancel(NamedTuple):
    """The peer no longer wants the answer to a request (it gets one all the same)."""

    request_id: int


class Hello(NamedTuple):
    """The handshake is complete."""

    limits: Limits
    capabilities: int


class Goodbye(NamedTuple):
    """The peer will say nothing more."""


class Failed(NamedTuple):
    """The stream is dead: the peer broke the protocol (`tell`: it does not know yet), or says that we did."""

    error: RemoteProtocolError
    tell: bool


Event = Request | Reply | Error | Cancel | Hello | Goodbye | Failed


class _State(Enum):
    HANDSHAKE = "handshake"
    OPEN = "open"
    ENDED = "ended"


class _Incoming:
    """A frame whose payload is still arriving."""

    __slots__ = ("buffers", "header", "message", "targets")

    def __init__(self, header: Header, message: Message, buffers: list[Any], targets: list[memoryview]) -> None:
        self.header = header
        self.message = message
        self.buffers = buffers
        self.targets = targets  # what is still to be filled, in order


class Session:
    """One end of one connection. `allocate(nbytes)` gives writable memory for one tensor, as a flat uint8 array."""

    def __init__(
        self, *, is_client: bool, allocate: Callable[[int], Any], limits: Limits | None = None, capabilities: int = 0
    ) -> None:
        self.is_client = is_client
        self.limits = limits or Limits()
        self.peer_limits: Limits | None = None
        self.capabilities = capabilities
        self.staged_nbytes = 0
        self.decode_ns = 0
        self._allocate = allocate
        self._state = _State.HANDSHAKE  # of what comes in
        self._aborted = False  # by the peer
        self._may_request = False
        self._decoder = Decoder(self.limits)
        self._encoder = Encoder(Limits(), HEADER_NBYTES)
        self._open: dict[int, Expected] = {}  # client: requests without an answer, and what the answer must look like
        self._unwanted: set[int] = set()  # client: those of them that nobody waits for any more
        self._next_id = 1
        self._staging = self._small_staging = memoryview(bytearray(STAGING_NBYTES))
        self._filled = 0
        self._incoming: _Incoming | None = None
        self._scratch: memoryview | None = None

    # ---- out: each of these returns the bytes of a frame's head; tensors' bytes follow it on the wire ----

    def hello(self) -> bytearray:
        """The handshake: the first frame of either side."""
        attrs = {"software": _SOFTWARE, "version": VERSION, "capabilities": self.capabilities, **asdict(self.limits)}
        return self._frame(Kind.HELLO, 0, "hello", (), attrs)

    @property
    def inflight(self) -> int:
        """Client: requests that have no answer yet."""
        return len(self._open)

    def request(
        self, op: str, tensors: Sequence[Desc], attrs: Attrs, nbytes: int, time_ns: int = 0, expect: Expected = None
    ) -> tuple[int, bytearray]:
        """A request's id and head. `expect`: what its reply must hold, checked before memory is allocated for it.

        Raises LimitError over a cap of the peer's, LocalProtocolError if the session is not open or an attribute is
        not valid.
        """
        if not self._may_request or self.peer_limits is None:
            raise LocalProtocolError(f"{op!r}: a request before the handshake or after the end")
        if len(self._open) >= self.peer_limits.max_inflight:
            raise LimitError(
                f"{op!r}: {len(self._open)} requests in flight, the peer accepts {self.peer_limits.max_inflight}"
            )
        request_id = self._next_id
        frame = self._frame(_REQUEST, request_id, op, tensors, attrs, nbytes, time_ns)
        self._next_id = request_id + 1
        self._open[request_id] = expect
        return request_id, frame

    def abandon(self, request_id: int) -> bool:
        """Nobody waits for a request's answer any more: it will be read and dropped. False if it was answered."""
        self._unwanted.add(request_id)  # first: the reader may be taking the answer in at this moment
        if request_id in self._open:
            return True
        self._unwanted.discard(request_id)
        return False

    def retract(self, request_id: int) -> None:
        """Forgets a request of which no byte was sent."""
        self._open.pop(request_id, None)

    def cancel(self, request_id: int) -> bytearray:
        """Tells the server that nobody waits for an answer."""
        return self._frame(Kind.CANCEL, request_id, "", (), {})

    def reply(
        self, request_id: int, tensors: Sequence[Desc], nbytes: int, time_ns: int, attrs: Attrs | None = None
    ) -> bytearray:
        """A reply's head. Raises LimitError over a cap of the peer's."""
        return self._frame(_REPLY, request_id, "", tensors, attrs or {}, nbytes, time_ns)

    def error(self, request_id: int, code: str, text: str) -> bytearray:
        """An answer that says why there is no reply. `code`: failed, unknown-op, deadline or cancelled."""
        return self._frame(Kind.ERROR, request_id, "", (), {"code": code, "text": _sendable(text)})

    def goodbye(self) -> bytearray:
        """This side will say nothing more."""
        self._may_request = False
        return self._frame(Kind.GOODBYE, 0, "", (), {})

    def abort(self, reason: str) -> bytearray:
        """The peer broke the protocol, and how."""
        self._may_request = False
        return self._frame(Kind.ABORT, 0, "", (), {"text": _sendable(reason)})

    def _frame(
        self,
        kind: int,
        request_id: int,
        op: str,
        tensors: Sequence[Desc],
        attrs: Attrs,
        nbytes: int = 0,
        time_ns: int = 0,
    ) -> bytearray:
        frame, varying_nbytes = self._encoder.encode(op, tensors, attrs)
        pack_header(frame, kind, request_id, varying_nbytes, nbytes, time_ns)
        return frame

    # ---- in ----

    def receive_buffers(self) -> list[memoryview]:
        """Where the next bytes belong, in order; never empty. Valid until the next call of `received`."""
        if self._incoming is not None:
            return self._incoming.targets
        return [self._staging[self._filled :]]

    def received(self, nbytes: int) -> list[Event]:
        """Takes note of bytes that were read into `receive_buffers()`, and returns what they completed.

        After a Failed event nothing more may be read.
        """
        started_ns = perf_counter_ns()
        events: list[Event] = []
        try:
            incoming = self._incoming
            if incoming is None:
                self._filled += nbytes
                self._read_staged(events)
            else:
                self._advance(incoming, nbytes)
                if not incoming.targets:
                    self._incoming = None
                    events.append(self._complete(incoming.header, incoming.message, incoming.buffers))
        except RemoteProtocolError as error:
            self._state = _State.ENDED
            self._may_request = False
            events.append(Failed(error, tell=not self._aborted))
        finally:
            self.decode_ns += perf_counter_ns() - started_ns
        return events

    def end_of_stream(self) -> PeerLostError:
        """The error that the end of the peer's stream means for what is in flight."""
        self._state = _State.ENDED
        self._may_request = False
        if self._incoming is not None:
            missing = sum(len(target) for target in self._incoming.targets)
            return PeerLostError(
                f"the peer's stream ended {missing} bytes before the end of a payload of "
                f"{self._incoming.header[4]} bytes"
            )
        if self._filled:
            return PeerLostError(f"the peer's stream ended after {self._filled} bytes of a frame's head")
        return PeerLostError("the peer closed the connection")

    @property
    def at_frame_boundary(self) -> bool:
        """Whether every byte that came in belongs to a whole frame."""
        return self._incoming is None and not self._filled

    def _read_staged(self, events: list[Event]) -> None:
        """Takes whole frames out of the staging buffer, and leaves the rest at its start."""
        at = 0
        filled = self._filled
        staging = self._staging
        while filled - at >= HEADER_NBYTES:
            header = parse_header(staging, at, self.limits)
            head_nbytes = HEADER_NBYTES + header[2]
            if filled - at < head_nbytes:
                if head_nbytes > len(staging):  # bounded by max_metadata_nbytes; no more, so that no payload gets in
                    self._move_staged(at, memoryview(bytearray(head_nbytes)))
                    return
                break
            metadata = bytes(staging[at + HEADER_NBYTES : at + head_nbytes])
            message = self._decoder.decode(metadata, header[3])
            at += head_nbytes
            wanted = self._admit(header, message)
            payload_nbytes = header[4]
            if not payload_nbytes <= filled - at:
                incoming = self._incoming = self._open_payload(header, message, wanted)
                at += self._take_staged(incoming, at)
                break
            buffers = []
            if wanted:
                for desc in message.tensors:
                    buffer = self._allocate(desc.nbytes)
                    if desc.nbytes:
                        memoryview(buffer)[:] = staging[at : at + desc.nbytes]
                        at += desc.nbytes
                    buffers.append(buffer)
                self.staged_nbytes += payload_nbytes
            else:
                at += payload_nbytes
            events.append(self._complete(header, message, buffers))
        if at == filled:
            self._filled = 0
            self._staging = self._small_staging
        elif at:
            self._move_staged(at, staging)

    def _move_staged(self, at: int, staging: memoryview) -> None:
        rest = self._filled - at
        if rest and (at or staging is not self._staging):
            staging[:rest] = bytes(self._staging[at : self._filled])
        self._staging = staging
        self._filled = rest

    def _take_staged(self, incoming: _Incoming, at: int) -> int:
        taken = 0
        while incoming.targets and at + taken < self._filled:
            target = incoming.targets[0]
            part = min(len(target), self._filled - at - taken)
            target[:part] = self._staging[at + taken : at + taken + part]
            taken += part
            self._advance(incoming, part)
        self.staged_nbytes += taken
        return taken

    @staticmethod
    def _advance(incoming: _Incoming, nbytes: int) -> None:
        targets = incoming.targets
        while targets and nbytes >= len(targets[0]):
            nbytes -= len(targets.pop(0))
        if nbytes:
            targets[0] = targets[0][nbytes:]

    def _admit(self, header: Header, message: Message) -> bool:
        """Checks a frame against the session's state. Returns whether anybody wants its payload."""
        kind = header[0]
        if header[4] != message.payload_nbytes:
            raise RemoteProtocolError(
                f"header, payload_nbytes: {header[4]}, expected {message.payload_nbytes}, the sum of its tensors"
            )
        if self._state is _State.OPEN:
            if kind == _REPLY and self.is_client:
                return self._check_answer(header, message)
            if kind == _REQUEST and not self.is_client:
                return True
        if kind == _ABORT:
            self._aborted = True
            raise RemoteProtocolError(f"the peer ended the connection: {message.attrs.get('text', 'no reason given')}")
        if (self._state is _State.HANDSHAKE) != (kind == _HELLO) or self._state is _State.ENDED:
            raise RemoteProtocolError(f"a {Kind(kind).name} frame in state {self._state.value!r}")
        if kind in (_REPLY, _REQUEST) or (kind == _CANCEL and self.is_client):
            raise RemoteProtocolError(f"a {Kind(kind).name} frame from the {'server' if self.is_client else 'client'}")
        if message.tensors:
            raise RemoteProtocolError(f"a {Kind(kind).name} frame with {len(message.tensors)} tensors, expected none")
        if kind == _ERROR:
            self._check_answer(header, message)
        return True

    def _open_payload(self, header: Header, message: Message, wanted: bool) -> _Incoming:
        """Finds a place for a payload that is still to come."""
        if not wanted:
            return _Incoming(header, message, [], self._scratch_targets(header[4]))
        buffers = [self._allocate(desc.nbytes) for desc in message.tensors]
        return _Incoming(header, message, buffers, [memoryview(buffer) for buffer in buffers if len(buffer)])

    def _check_answer(self, header: Header, message: Message) -> bool:
        kind, request_id = header[0], header[1]
        if request_id not in self._open:
            raise RemoteProtocolError(
                f"header, request_id: {request_id} in {Kind(kind).name}, expected one that has no answer yet"
            )
        expected = self._open[request_id]
        if expected is not None and kind == _REPLY:
            _check_expected(expected, message.tensors)
        return request_id not in self._unwanted

    def _scratch_targets(self, nbytes: int) -> list[memoryview]:
        """Places to read bytes into that nobody wants: the same megabyte over and over."""
        if not nbytes:
            return []
        if self._scratch is None:
            self._scratch = memoryview(bytearray(_SCRATCH_NBYTES))
        whole, rest = divmod(nbytes, _SCRATCH_NBYTES)
        return [self._scratch] * whole + ([self._scratch[:rest]] if rest else [])

    def _complete(self, header: Header, message: Message, buffers: list[Any]) -> Event:
        kind, request_id = header[0], header[1]
        if kind == _REQUEST:
            return Request(request_id, message, buffers, header[5])
        if kind == _REPLY or kind == _ERROR:  # noqa: SIM109 (faster so)
            self._open.pop(request_id, None)
            self._unwanted.discard(request_id)
            if kind == _REPLY:
                return Reply(request_id, message, buffers, header[5])
            attrs = message.attrs
            return Error(request_id, str(attrs.get("code", "failed")), str(attrs.get("text", "no reason given")))
        if kind == _CANCEL:
            return Cancel(request_id)
        if kind == _HELLO:
            return self._greeted(message)
        self._state = _State.ENDED
        return Goodbye()

    def _greeted(self, message: Message) -> Hello:
        values: dict[str, Any] = {field.name: message.attrs.get(field.name) for field in fields(Limits)}
        capabilities = message.attrs.get("capabilities")
        if not isinstance(capabilities, int):
            raise RemoteProtocolError(f"hello, capabilities: {capabilities!r}, expected an int")
        try:
            self.peer_limits = Limits(**values)
        except ValueError as error:
            raise RemoteProtocolError(f"hello, {error}") from None
        self.capabilities &= capabilities
        self._encoder = Encoder(self.peer_limits, HEADER_NBYTES)
        self._state = _State.OPEN
        self._may_request = True
        return Hello(self.peer_limits, self.capabilities)


def _sendable(text: str) -> str:
    """A text of ours that always encodes and always fits: not Unicode or too long, it loses what must go."""
    return text.encode(errors="replace")[:_MAX_TEXT_NBYTES].decode(errors="ignore")


def _check_expected(expected: Sequence[Desc], tensors: Sequence[TensorDesc]) -> None:
    if len(tensors) != len(expected):
        raise RemoteProtocolError(f"a reply of {len(tensors)} tensors, expected {len(expected)}")
    for index, (desc, (code, shape)) in enumerate(zip(tensors, expected)):
        if desc.dtype.code != code or desc.shape != shape:
            wanted = TensorDesc.of(BY_CODE[code], shape)
            raise RemoteProtocolError(f"a reply's tensor {index}: {desc}, expected {wanted}")
