"""The protocol's state machine: bytes in, events out. No I/O, no threads, no clocks but for counting its own time.

    client                                   server
      HELLO  ------------------------------->          both state version, capabilities and limits
             <-------------------------------  HELLO
      REQUEST id, op, attrs, tensors ------->          any number in flight
      CANCEL id ---------------------------->          optional; the request is still answered
             <-----------------  REPLY id, tensors     or ERROR id; in any order, exactly one for each request
      SEGMENT, RETIRE, RETURN <------------->          where both sides share memory: see arena.py
      PROBE <------------------------------->          asked and answered: how good the link is, see estimate.py
      GOODBYE ------------------------------>          or from the server; then the stream ends
      ABORT  <------------------------------>          the other side broke the protocol, and how; then the stream ends

How bytes come in. The owner asks `receive_buffers()` where the next bytes belong, reads into them, and tells
`received(n)`. A frame's head is read into a small staging buffer; as soon as its metadata is complete and valid, memory
for its tensors is allocated and the rest is read straight into it. What of a payload came in the same read as its head
(at most STAGING_NBYTES) is copied over and counted in `staged_nbytes`: that is what one read for a small message costs.

A tensor that is coded (schema/coding.py) is read into memory of its own, and decoded into its final one when the frame
is complete; from then on nobody can tell it from another.

Tensors in shared memory have no bytes in the stream: the arena (`shared`) says where they are, and takes note of what
the peer says about its own. Through a ring frames come slot by slot (`received_slot`), never with a payload.

Interrupts. In the main thread a signal's handler may raise in the middle of anything (Ctrl-C). What `received` is given
is noted in one step, and so is what became of it: an interrupted call is made again, with the same events, and goes on
where it was. That is impossible only while a frame takes effect (`in_doubt`: some microseconds). CPython runs handlers
where a function begins, after a call and at a jump backwards. So an assignment to several names is one step, and so is
`(x,) = map(f, (y,))`, which calls f while it is unpacked.

Rules. Events come in the order of the bytes, however these were cut up. A Failed event is the last one: the stream is
dead; `abort` makes the frame that tells the peer. A message that there is no memory for is read and dropped, and handed
out with a `refusal` in the place of its tensors; the connection lives on. Errors of our own (LimitError, SettingError)
are raised before anything changes. Nothing is allocated before the header, the metadata and the session's state were
checked against each other. Incoming state belongs to whoever reads, outgoing state to whoever sends; all they share are
the tables of open requests, whose operations are atomic, and that the session is open.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from enum import Enum
from time import perf_counter_ns
from typing import Any, NamedTuple, Protocol

from ..errors import (
    ArenaFull,
    ConnectError,
    FastsplitError,
    LimitError,
    LocalProtocolError,
    PeerLostError,
    RemoteProtocolError,
    ResourceError,
    fresh,
)
from ..schema.decoder import Decoder
from ..schema.descriptor import Attrs, AttrValue, Message, TensorDesc
from ..schema.dtypes import BY_CODE, BY_NAME
from ..schema.encoder import Encoder
from ..schema.header import HEADER_NBYTES, REPLY_FLAGS, VERSION, Header, Kind, pack_header, parse_header
from ..schema.limits import MAX_DIMS, Limits
from ..tensors import Desc

__all__ = [
    "CODES",
    "MAX_PADDING_NBYTES",
    "MAX_RETURNS",
    "PROBES",
    "SHARES",
    "STAGING_NBYTES",
    "TYPES",
    "Attached",
    "Cancel",
    "Error",
    "Event",
    "Expected",
    "Failed",
    "Goodbye",
    "Hello",
    "Probe",
    "Reply",
    "Request",
    "ReturnsWanted",
    "RingOffered",
    "Session",
]

STAGING_NBYTES = 4096
SHARES, CODES, PROBES, TYPES = 1, 2, 4, 8
"""Capabilities, bits of what a side can do beyond the base protocol: shared memory, coded tensors (and flags that say
how a reply is wanted), measuring the link, attributes that are bools or lists of floats or of bools. A bit counts when
both sides set it."""
MAX_PADDING_NBYTES = 4 * 1024**2
"""Of a PROBE: bytes that say nothing, and are not kept."""

# plain ints: looking up and comparing an enum's members costs more than the rest of a check
_HELLO, _REQUEST, _REPLY, _ERROR, _CANCEL, _GOODBYE, _ABORT, _SEGMENT, _ATTACHED, _RETIRE, _RETURN, _PROBE = map(
    int, Kind
)
_SCRATCH_NBYTES = 1024**2
_MAX_TEXT_NBYTES = 3500  # of an ERROR or ABORT: with the rest of the frame it fits the smallest metadata cap
_SOFTWARE = "fastsplit"
_BROKEN, _SHORTAGE, _REFUSED = "broken", "shortage", "refused"
"""Codes of an ABORT. A receiver that does not know one takes it for `broken`."""
MAX_RETURNS = 32
"""Returns that ride on another frame; if more are waiting, they get one of their own."""
_MAX_RETURNS_ALONE = 48  # in a frame of their own: it fits a ring's slot, so that it is sent whole or not at all

Expected = Sequence[Desc] | None


class Request(NamedTuple):
    """A request came in. `buffers` hold the tensors' bytes, one each, and belong to the receiver."""

    request_id: int
    message: Message
    buffers: list[Any]
    time_ns: int
    flags: int
    """How the reply is wanted: frame.wanted_reply."""
    refusal: ResourceError | None = None
    """There is no memory for its tensors: there are no buffers, and this is what to answer."""


class Reply(NamedTuple):
    """The reply to one of our requests."""

    request_id: int
    message: Message
    buffers: list[Any]
    time_ns: int
    refusal: ResourceError | None = None
    """There is no memory for its tensors: there are no buffers, and the call fails with this."""


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


class RingOffered(NamedTuple):
    """Server: the client has made a ring; `attached` is the answer."""

    nbytes: int
    name: str


class Attached(NamedTuple):
    """Client: the server's answer to the ring, an empty text if it has mapped it."""

    text: str


class Probe(NamedTuple):
    """The peer measures the link, or answers that we do. `wanted`: bytes of padding that the answer is to bring.
    `bytes_per_s`: how fast the peer receives what we send; `rtt_s`: the shortest round trip that it has seen; 0 if it
    does not know."""

    number: int
    is_answer: bool
    wanted: int
    bytes_per_s: float
    rtt_s: float


class ReturnsWanted(NamedTuple):
    """The peer is short of memory: it wants its returns now."""


class Goodbye(NamedTuple):
    """The peer will say nothing more."""


class Failed(NamedTuple):
    """The stream is dead: the peer broke the protocol, or we have run out of something (`tell`: it does not know yet);
    or the peer says so of us, or of itself."""

    error: FastsplitError
    tell: bool


Event = Request | Reply | Error | Cancel | Hello | RingOffered | Attached | ReturnsWanted | Probe | Goodbye | Failed


class Shared(Protocol):
    """What a session needs of an arena."""

    returns: deque[tuple[int, int]]

    def take_returns(self, at_most: int) -> list[int]: ...
    def requeue_returns(self, taken: Sequence[int]) -> None: ...
    def attach(self, segment_id: int, nbytes: int, name: str) -> None: ...
    def retire(self, segment_id: int) -> None: ...
    def resolve(self, segment_id: int, offset: int, desc: TensorDesc) -> Any: ...
    def returned(self, returns: Sequence[int]) -> None: ...


class Codings(Protocol):
    """What a session needs to know of codings."""

    accepted: frozenset[int]

    def decode(self, coding: int, data: Any, desc: TensorDesc) -> Any:
        """The memory of a tensor whose coded bytes are in `data`. Raises RemoteProtocolError."""


class _State(Enum):
    HANDSHAKE = "handshake"
    OPEN = "open"
    ENDED = "ended"


_OPEN = _State.OPEN
_SEGMENT_BITS = 2**32 - 1
_UINT8 = BY_NAME["uint8"].code
_NO_REQUEST: Any = object()
_new = tuple.__new__  # a NamedTuple without its own constructor: 0.1 us less


class _Incoming:
    """A frame whose payload is still arriving."""

    __slots__ = ("at", "buffers", "header", "index", "message", "refusal", "targets")

    def __init__(
        self,
        header: Header,
        message: Message,
        buffers: list[Any],
        targets: list[memoryview],
        refusal: ResourceError | None = None,
    ) -> None:
        self.header = header
        self.message = message
        self.buffers = buffers
        self.refusal = refusal
        self.targets = targets  # what is to be filled, in order
        self.index = self.at = 0  # the first target that is not full, and how many of its bytes are

    @property
    def is_whole(self) -> bool:
        return self.index == len(self.targets)

    def remaining(self) -> list[memoryview]:
        """What is still to be filled, in order."""
        targets = self.targets[self.index :]
        if self.at:
            targets[0] = targets[0][self.at :]
        return targets

    def after(self, nbytes: int) -> tuple[int, int]:
        """`index` and `at` when that many more bytes are in."""
        index, at, targets = self.index, self.at + nbytes, self.targets
        while index < len(targets) and at >= len(targets[index]):
            at -= len(targets[index])
            index += 1
        return index, at


class Session:
    """One end of one connection. `allocate(nbytes)` gives writable memory for one tensor, as a flat uint8 array.

    `codings`: what is accepted once the peer's HELLO is in (`on_hello` sets it). `offer`: attributes for the HELLO.
    `on_hello(attrs, peer_limits)` is called with the peer's before anything else that it sent is looked at; it gives
    the arena, None where no memory is shared.
    """

    def __init__(
        self,
        *,
        is_client: bool,
        allocate: Callable[[int], Any],
        limits: Limits | None = None,
        capabilities: int = 0,
        codings: Codings | None = None,
        offer: Mapping[str, AttrValue] | None = None,
        on_hello: Callable[[dict[str, Any], Limits], Shared | None] | None = None,
    ) -> None:
        self.is_client = is_client
        self.limits = limits or Limits()
        self.peer_limits: Limits | None = None
        self.capabilities = capabilities
        self.staged_nbytes = 0
        self.decode_ns = 0
        self.shared: Shared | None = None
        self.returns: list[int] = []
        """What went back with the last frame."""
        self.payload_left = 0
        """Bytes that are still to come of the frame that is being read."""
        self.arrived = 0
        """Bytes that were read, and of which `received` has not taken note."""
        self.unfinished = False
        """Whether `received` was interrupted, and is to be called again with what `arrived`."""
        self.slot: bytes | None = None
        """A ring's slot that was taken out of it, and of which `received_slot` has not taken note."""
        self.in_doubt = False
        """Whether a frame has only half taken effect."""
        self._codings = codings
        self._known_flags = 0
        self._offer = dict(offer or {})
        self._share = on_hello
        self._part: bytes | None = None  # of a frame that takes several slots
        self._part_nbytes = 0
        self._allocate = allocate
        self._state = _State.HANDSHAKE  # of what comes in
        self.aborted = False
        """Whether the peer has sent an ABORT."""
        self._may_request = False
        self._decoder = Decoder(self.limits)
        self._encoder = Encoder(Limits(), HEADER_NBYTES)
        self.requests: dict[int, Expected] = {}
        """Client: those without an answer, and what the answer must look like."""
        self._unwanted: set[int] = set()  # client: those of them that nobody waits for any more
        self.next_id = 1
        """Client: of the next request."""
        self._stagings = tuple(memoryview(bytearray(STAGING_NBYTES)) for _ in range(2))
        self._staging = self._stagings[0]
        self._filled = 0
        self._at = 0  # up to where the staging buffer has been read
        self._incoming: _Incoming | None = None
        self._scratch: memoryview | None = None

    # ---- out: each of these returns the bytes of a frame's head; tensors' bytes follow it on the wire ----

    def hello(self) -> bytearray:
        """The handshake: the first frame of either side."""
        attrs: dict[str, Any] = {"software": _SOFTWARE, "version": VERSION, "capabilities": self.capabilities}
        attrs |= asdict(self.limits) | {"max_dims": min(self.limits.max_dims, MAX_DIMS)} | self._offer
        return self._frame(Kind.HELLO, 0, "hello", (), attrs)

    @property
    def inflight(self) -> int:
        """Client: requests that have no answer yet."""
        return len(self.requests)

    def request(
        self,
        op: str,
        tensors: Sequence[Desc],
        attrs: Attrs,
        nbytes: int,
        time_ns: int = 0,
        expect: Expected = None,
        placements: Sequence[int] = (),
        flags: int = 0,
    ) -> tuple[int, bytearray]:
        """A request's id and head. `expect`: what its reply must hold, checked before memory is allocated for it.
        `flags`: frame.reply_flags, 0 where codings were not agreed on.

        `nbytes`: of the payload that follows. `placements`: see Encoder.encode.

        Raises LimitError over a cap of the peer's, SettingError for an op or an attribute that cannot travel,
        LocalProtocolError if the session is not open.
        """
        if not self._may_request or self.peer_limits is None:
            raise LocalProtocolError(f"{op!r}: a request before the handshake or after the end")
        if len(self.requests) >= self.peer_limits.max_inflight:
            raise LimitError(
                f"{op!r}: {len(self.requests)} requests in flight, the peer accepts {self.peer_limits.max_inflight}"
            )
        request_id = self.next_id
        frame = self._frame(_REQUEST, request_id, op, tensors, attrs, nbytes, time_ns, placements, flags=flags)
        self.next_id = request_id + 1
        self.requests[request_id] = expect
        return request_id, frame

    def mark_cancelled(self, request_id: int) -> bool:
        """Nobody waits for a request's answer any more: it will be read and dropped. False if it was answered."""
        self._unwanted.add(request_id)  # first: the reader may be taking the answer in at this moment
        if request_id in self.requests:
            return True
        self._unwanted.discard(request_id)
        return False

    def discard(self, request_id: int) -> None:
        """Forgets the last request, if there is one of that id: no byte of it was sent."""
        if self.requests.pop(request_id, _NO_REQUEST) is not _NO_REQUEST:
            self._unwanted.discard(request_id)
            self.discard_last()

    def cancel(self, request_id: int) -> bytearray:
        """Tells the server that nobody waits for an answer."""
        return self._frame(Kind.CANCEL, request_id, "", (), {})

    def reply(
        self,
        request_id: int,
        tensors: Sequence[Desc],
        nbytes: int,
        time_ns: int,
        attrs: Attrs | None = None,
        placements: Sequence[int] = (),
    ) -> bytearray:
        """A reply's head. Raises LimitError over a cap of the peer's, SettingError for an attribute."""
        return self._frame(_REPLY, request_id, "", tensors, attrs or {}, nbytes, time_ns, placements)

    def error(self, request_id: int, code: str, text: str) -> bytearray:
        """An answer that says why there is no reply. `code`: failed, unknown-op, deadline or cancelled."""
        return self._frame(Kind.ERROR, request_id, "", (), {"code": code, "text": _sendable(text)})

    def segment(self, segment_id: int, nbytes: int, name: str) -> bytearray:
        """Announces a segment of ours; id 0 is the ring."""
        return self._frame(_SEGMENT, 0, "", (), {"id": segment_id, "nbytes": nbytes, "name": name})

    def attached(self, text: str) -> bytearray:
        """Server: the answer to the ring. `text`: why it could not be mapped, empty if it was."""
        return self._frame(_ATTACHED, 0, "", (), {"text": _sendable(text)})

    def retire(self, segment_id: int) -> bytearray:
        """A segment of ours that is used no more."""
        return self._frame(_RETIRE, 0, "", (), {"id": segment_id})

    def return_frame(self, max_waiting: int = MAX_RETURNS) -> bytearray | None:
        """Returns in a frame of their own, None if no more than `max_waiting` are left to ride on another one."""
        shared = self.shared
        if shared is None or len(shared.returns) <= max_waiting:
            return None
        return self._frame(_RETURN, 0, "", (), {"wanted": 0}, max_returns=_MAX_RETURNS_ALONE)

    def want_returns(self) -> bytearray:
        """Asks the peer for its returns."""
        return self._frame(_RETURN, 0, "", (), {"wanted": 1})

    def probe(self, number: int, padding_nbytes: int, wanted: int, bytes_per_s: float, rtt_s: float) -> bytearray:
        """Client: asks the server to answer at once, with `wanted` bytes of padding. `padding_nbytes` follow here."""
        return self._probe(number, 0, padding_nbytes, wanted, bytes_per_s, int(rtt_s * 1e9))

    def probe_answer(self, number: int, padding_nbytes: int, bytes_per_s: float) -> bytearray:
        """Server: the answer to a probe."""
        return self._probe(number, 1, padding_nbytes, 0, bytes_per_s, 0)

    def _probe(self, number: int, answer: int, nbytes: int, wanted: int, bytes_per_s: float, rtt_ns: int) -> bytearray:
        attrs = {"answer": answer, "wanted": wanted, "bytes_per_s": bytes_per_s}
        return self._frame(_PROBE, number, "", [(_UINT8, (nbytes,))] if nbytes else (), attrs, nbytes, rtt_ns)

    def goodbye(self) -> bytearray:
        """This side will say nothing more."""
        self._may_request = False
        return self._frame(Kind.GOODBYE, 0, "", (), {})

    def abort(self, error: FastsplitError | str) -> bytearray:
        """The peer broke the protocol, and how; or what this side has run out of; or, as the first frame, why a server
        refuses a client (ConnectError)."""
        self._may_request = False
        code = _BROKEN
        if isinstance(error, ResourceError):
            code = _SHORTAGE
        elif isinstance(error, ConnectError):
            code = _REFUSED
        return self._frame(Kind.ABORT, 0, "", (), {"text": _sendable(str(error)), "code": code})

    def _frame(
        self,
        kind: int,
        request_id: int,
        op: str,
        tensors: Sequence[Desc],
        attrs: Attrs,
        nbytes: int = 0,
        time_ns: int = 0,
        placements: Sequence[int] = (),
        max_returns: int = MAX_RETURNS,
        flags: int = 0,
    ) -> bytearray:
        shared = self.shared
        if shared is None or not shared.returns:
            if self.returns:
                self.returns = []
            frame, varying_nbytes = self._encoder.encode(op, tensors, attrs, placements)
        else:
            returns = self.returns = shared.take_returns(max_returns)
            try:
                frame, varying_nbytes = self._encoder.encode(op, tensors, attrs, placements, returns)
            except LimitError:  # perhaps it fits without them
                self.discard_last()
                frame, varying_nbytes = self._encoder.encode(op, tensors, attrs, placements)
            except BaseException:
                self.discard_last()
                raise
        pack_header(frame, kind, request_id, varying_nbytes, nbytes, time_ns, flags)
        return frame

    def discard_last(self) -> None:
        """The last frame was not sent: its returns are still to be made."""
        if self.shared is not None and self.returns:
            self.shared.requeue_returns(self.returns)
        self.returns = []

    # ---- in ----

    def receive_buffers(self) -> list[memoryview]:
        """Where the next bytes belong, in order; never empty. Valid until the next call of `received`."""
        if self._incoming is not None:
            return self._incoming.remaining()
        return [self._staging[self._filled :]]

    def received(self, nbytes: int, events: list[Event] | None = None) -> list[Event]:
        """Takes note of bytes that were read into `receive_buffers()`. Returns `events`, a new list by default, with
        what they completed at its end.

        After a Failed event nothing more may be read.
        """
        started_ns = perf_counter_ns()
        events = [] if events is None else events
        try:
            incoming = self._incoming
            if incoming is None:
                self._filled, self.arrived, self.unfinished = self._filled + nbytes, 0, True
                self._read_staged(events)
            else:
                index, at = incoming.after(nbytes)
                left = self.payload_left - nbytes
                incoming.index, incoming.at, self.payload_left, self.arrived, self.unfinished = index, at, left, 0, True
                if incoming.is_whole:
                    buffers, refusal = self._decoded(incoming.message, incoming.buffers, incoming.refusal)
                    self._incoming, self.in_doubt = None, True
                    self._append(events, self._complete(incoming.header, incoming.message, buffers, refusal))
                    self.in_doubt = False
            self.unfinished = False
        except (FastsplitError, MemoryError) as error:
            self._fail(error, events)
        finally:
            self.decode_ns += perf_counter_ns() - started_ns
        return events

    def received_slot(self, slot: bytes, events: list[Event] | None = None) -> list[Event]:
        """Takes one slot of a ring: the start of a frame, or the next part of one that is longer than a slot.

        Returns what `received` does.
        """
        started_ns = perf_counter_ns()
        events = [] if events is None else events
        try:
            part = self._part
            if part is None:
                header = parse_header(slot, 0, self.limits, self._known_flags)
                if header[4]:
                    raise RemoteProtocolError(f"header, payload_nbytes: {header[4]} in a ring, expected 0")
                frame_nbytes = HEADER_NBYTES + header[2]
                if frame_nbytes <= len(slot):
                    self._read_frame(header, slot[HEADER_NBYTES:frame_nbytes], events)
                else:
                    self._part, self._part_nbytes, self.slot = slot, frame_nbytes, None
            else:
                part += slot
                if len(part) < self._part_nbytes:
                    self._part, self.slot = part, None
                else:
                    header = parse_header(part, 0, self.limits, self._known_flags)
                    self._read_frame(header, part[HEADER_NBYTES : self._part_nbytes], events)
        except (FastsplitError, MemoryError) as error:
            self._fail(error, events)
        finally:
            self.decode_ns += perf_counter_ns() - started_ns
        return events

    def _read_frame(self, header: Header, metadata: bytes, events: list[Event]) -> None:
        message = self._decoder.decode(metadata, header[3])
        self.in_doubt, self.slot, self._part = True, None, None
        if header[0] == _REPLY and self.is_client and self._state is _OPEN and not message.payload_nbytes:
            # What `_admit`, `_make_room` and `_complete` do, in one piece: 1 to 3 us less a round trip.
            request_id = header[1]
            expected = self.requests.pop(request_id, _NO_REQUEST)
            if expected is not None:
                if expected is _NO_REQUEST:
                    self._check_answer(header, message)
                _check_expected(expected, message.tensors)
            if self._unwanted:
                self._unwanted.discard(request_id)
            events.append(_new(Reply, (request_id, message, self._take_references(message), header[5], None)))
            self.in_doubt = False
            return
        if header[0] == _REQUEST and not self.is_client and self._state is _OPEN and not message.payload_nbytes:
            buffers = self._take_references(message)
            events.append(_new(Request, (header[1], message, buffers, header[5], header[6], None)))
            self.in_doubt = False
            return
        self._admit(header, message)
        buffers = self._make_room(message) if message.tensors else []
        self._append(events, self._complete(header, message, buffers))
        self.in_doubt = False

    @staticmethod
    def _append(events: list[Event], event: Event | None) -> None:
        if event is not None:
            events.append(event)

    def _fail(self, error: FastsplitError | MemoryError, events: list[Event]) -> None:
        self._state = _State.ENDED
        self._may_request = False
        error = fresh(error) if isinstance(error, FastsplitError) else ArenaFull(f"no memory to read a frame: {error}")
        events.append(Failed(error, tell=not self.aborted))

    def close(self) -> None:
        """The connection has ended: forgets the frame that is half received, and its memory.

        Nobody may be reading. Idempotent.
        """
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            # In place: the frames of an error that a read raised hold these very lists.
            incoming.targets.clear()
            incoming.buffers.clear()
            incoming.index = incoming.at = 0
        self._part = self._scratch = None
        self._staging, self._filled, self._at = self._stagings[0], 0, 0

    def end_of_stream(self) -> PeerLostError:
        """The error that the end of the peer's stream means for what is in flight."""
        self._state = _State.ENDED
        self._may_request = False
        if self._incoming is not None:
            missing = sum(map(len, self._incoming.remaining()))
            return PeerLostError(
                f"the peer's stream ended {missing} bytes before the end of a payload of "
                f"{self._incoming.header[4]} bytes"
            )
        if self._filled or self._part:
            came = self._filled or len(self._part or ())
            return PeerLostError(f"the peer's stream ended after {came} bytes of a frame's head")
        return PeerLostError("the peer closed the connection")

    @property
    def at_frame_boundary(self) -> bool:
        """Whether every byte that came in belongs to a whole frame."""
        return self._incoming is None and not self._filled and self._part is None

    def _read_staged(self, events: list[Event]) -> None:
        """Takes whole frames out of the staging buffer, and leaves the rest at its start."""
        at = self._at
        filled = self._filled
        staging = self._staging
        while filled - at >= HEADER_NBYTES:
            header = parse_header(staging, at, self.limits, self._known_flags)
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
                self.in_doubt = bool(message.placements)  # else it can be done again: nothing has happened yet
                incoming = self._open_payload(header, message, wanted)
                self._take_staged(incoming, staging[at:filled])
                left = payload_nbytes - (filled - at)
                self._incoming, self.payload_left, self._at, self.in_doubt = incoming, left, filled, False
                at = filled
                break
            self.in_doubt = True
            buffers = []
            refusal = None
            if wanted and not message.placements:
                for desc in message.tensors:
                    buffer = self._allocate(desc.nbytes)
                    if desc.nbytes:
                        memoryview(buffer)[:] = staging[at : at + desc.nbytes]
                        at += desc.nbytes
                    buffers.append(buffer)
                self.staged_nbytes += payload_nbytes
            elif wanted:
                buffers = self._make_room(message)
                for target in _inline(message, buffers):
                    target[:] = staging[at : at + len(target)]
                    at += len(target)
                self.staged_nbytes += payload_nbytes
                buffers, refusal = self._decoded(message, buffers)
            else:
                self._drop_references(message)
                at += payload_nbytes
            self._append(events, self._complete(header, message, buffers, refusal))
            self._at, self.in_doubt = at, False
        if at == filled:
            self._staging, self._filled, self._at = self._stagings[0], 0, 0
        elif at:
            self._move_staged(at, self._stagings[staging is self._stagings[0]])

    def _move_staged(self, at: int, staging: memoryview) -> None:
        """Goes on in another staging buffer, whose start the rest of this one becomes."""
        rest = self._filled - at
        staging[:rest] = self._staging[at : self._filled]
        self._staging, self._filled, self._at = staging, rest, 0

    def _take_staged(self, incoming: _Incoming, staged: memoryview) -> None:
        """Copies what of a payload was read with its head, which is less than all of it."""
        taken = 0
        for target in incoming.targets:
            part = min(len(target), len(staged) - taken)
            target[:part] = staged[taken : taken + part]
            taken += part
        incoming.index, incoming.at = incoming.after(taken)
        self.staged_nbytes += taken

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
            self.aborted = True
            text, code = message.attrs.get("text", "no reason given"), message.attrs.get("code")
            if code == _REFUSED and self.is_client and self._state is _State.HANDSHAKE:
                raise ConnectError(f"the server refused the connection: {text}")
            text = f"the peer ended the connection: {text}"
            raise PeerLostError(text) if code == _SHORTAGE else RemoteProtocolError(text)
        if (self._state is _State.HANDSHAKE) != (kind == _HELLO) or self._state is _State.ENDED:
            raise RemoteProtocolError(f"a {Kind(kind).name} frame in state {self._state.value!r}")
        if kind in (_REPLY, _REQUEST) or (kind == _CANCEL and self.is_client):
            raise RemoteProtocolError(f"a {Kind(kind).name} frame from the {'server' if self.is_client else 'client'}")
        if kind == _PROBE and self.capabilities & PROBES:
            _check_padding(message)
            return False  # what it brings is read and dropped
        if message.tensors:
            raise RemoteProtocolError(f"a {Kind(kind).name} frame with {len(message.tensors)} tensors, expected none")
        if kind == _ERROR:
            self._check_answer(header, message)
        return True

    def _open_payload(self, header: Header, message: Message, wanted: bool) -> _Incoming:
        """Finds a place for a payload that is still to come."""
        refusal = None
        if wanted:
            try:
                buffers = self._make_room(message)
            except MemoryError as error:
                refusal = _no_memory(error)
            else:
                return _Incoming(header, message, buffers, _inline(message, buffers))
        self._drop_references(message)
        return _Incoming(header, message, [], self._scratch_targets(header[4]), refusal)

    def _take_references(self, message: Message) -> list[Any]:
        """Leases on all tensors of a message without a payload, and its returns taken note of."""
        shared, placements = self.shared, message.placements
        buffers: list[Any] = []
        if shared is not None and placements:
            at = 0
            for desc in message.tensors:
                segment = placements[at]
                buffers.append(
                    shared.resolve(segment, placements[at + 1], desc) if segment else self._allocate(desc.nbytes)
                )
                at += 3
        elif message.tensors:
            buffers = self._make_room(message)
        if message.returns:
            self._take_returns(message)
        return buffers

    def _take_returns(self, message: Message) -> None:
        if self.shared is None:
            raise RemoteProtocolError("returns: expected none, since no shared memory was agreed on")
        self.shared.returned(message.returns)

    def _make_room(self, message: Message) -> list[Any]:
        """Memory for each tensor: fresh for those in the payload, leases on what is in shared memory.

        Raises MemoryError, and then there was no lease.
        """
        placements = message.placements
        if not placements:
            return [self._allocate(desc.nbytes) for desc in message.tensors]
        # As many bytes as are in the payload: fewer than the tensor's, if it is coded.
        buffers = [
            None if placements[at] & _SEGMENT_BITS else self._allocate(placements[at + 2])
            for at in range(0, len(placements), 3)
        ]
        for index, lease in self._leases(message):
            buffers[index] = lease
        return buffers

    def _leases(self, message: Message) -> Iterator[tuple[int, Any]]:
        """The tensors of a message that are in shared memory: index, and a lease."""
        placements = message.placements
        for index, desc in enumerate(message.tensors):
            segment = placements[3 * index]
            if segment & _SEGMENT_BITS:
                if self.shared is None:
                    raise RemoteProtocolError(
                        "placement: in shared memory, expected in the payload: none was agreed on"
                    )
                yield index, self.shared.resolve(segment, placements[3 * index + 1], desc)

    def _decoded(
        self, message: Message, buffers: list[Any], refusal: ResourceError | None = None
    ) -> tuple[list[Any], ResourceError | None]:
        """The tensors themselves, also of those that came coded; none, and why, where there is no memory for them."""
        if not buffers or not message.placements:
            return buffers, refusal
        try:
            return self._decode(message, buffers), refusal
        except MemoryError as error:
            return [], _no_memory(error)

    def _decode(self, message: Message, buffers: list[Any]) -> list[Any]:
        codings = self._codings
        decoded = buffers.copy()
        for index, segment in enumerate(message.placements[::3]):
            if segment > _SEGMENT_BITS:
                assert codings is not None  # else the decoder had let no coding pass
                decoded[index] = codings.decode(segment >> 32, buffers[index], message.tensors[index])
        return decoded

    def _drop_references(self, message: Message) -> None:
        """Takes and drops what nobody waits for, so that it goes back."""
        if message.placements:
            for _ in self._leases(message):
                pass

    def _check_answer(self, header: Header, message: Message) -> bool:
        kind, request_id = header[0], header[1]
        if request_id not in self.requests:
            raise RemoteProtocolError(
                f"header, request_id: {request_id} in {Kind(kind).name}, expected one that has no answer yet"
            )
        expected = self.requests[request_id]
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

    def _complete(
        self, header: Header, message: Message, buffers: list[Any], refusal: ResourceError | None = None
    ) -> Event | None:
        kind, request_id = header[0], header[1]
        if message.returns:
            self._take_returns(message)
        if kind == _REQUEST:
            return Request(request_id, message, buffers, header[5], header[6], refusal)
        if kind == _REPLY or kind == _ERROR:  # noqa: SIM109 (faster so)
            self.requests.pop(request_id, None)
            self._unwanted.discard(request_id)
            if kind == _REPLY:
                return Reply(request_id, message, buffers, header[5], refusal)
            attrs = message.attrs
            return Error(request_id, str(attrs.get("code", "failed")), str(attrs.get("text", "no reason given")))
        if kind == _CANCEL:
            return Cancel(request_id)
        if kind == _HELLO:
            return self._on_hello(message)
        if kind == _PROBE:
            return self._probe_of(request_id, message, header[5])
        if kind >= _SEGMENT:
            return self._take_note(kind, message)
        self._state = _State.ENDED
        return Goodbye()

    def _take_note(self, kind: int, message: Message) -> Event | None:
        """What the peer says about shared memory."""
        shared = self.shared
        if shared is None:
            raise RemoteProtocolError(f"a {Kind(kind).name} frame, expected none: no shared memory was agreed on")
        if kind == _RETURN:
            return ReturnsWanted() if _attr(kind, message, "wanted", int) else None
        if kind == _ATTACHED and self.is_client:
            return Attached(_attr(kind, message, "text", str))
        if kind == _RETIRE:
            shared.retire(_attr(kind, message, "id", int))
            return None
        if kind == _SEGMENT:
            segment_id = _attr(kind, message, "id", int)
            nbytes, name = _attr(kind, message, "nbytes", int), _attr(kind, message, "name", str)
            if segment_id or self.is_client:
                shared.attach(segment_id, nbytes, name)
                return None
            return RingOffered(nbytes, name)
        raise RemoteProtocolError(f"a {Kind(kind).name} frame from the client")

    def _probe_of(self, number: int, message: Message, rtt_ns: int) -> Probe:
        if not self.capabilities & PROBES:
            raise RemoteProtocolError("a PROBE frame, expected none: it was not agreed on")
        answer, wanted = _attr(_PROBE, message, "answer", int), _attr(_PROBE, message, "wanted", int)
        bytes_per_s = _attr(_PROBE, message, "bytes_per_s", float)
        if answer != self.is_client:
            raise RemoteProtocolError(f"PROBE, answer: {answer}, expected {int(self.is_client)} from this side")
        most = MAX_PADDING_NBYTES if self.peer_limits is None else self.peer_limits.max_message_nbytes
        most = 0 if answer else min(most, MAX_PADDING_NBYTES)
        if not 0 <= wanted <= most:
            raise RemoteProtocolError(f"PROBE, wanted: {wanted}, expected 0 to {most}")
        if not 0 <= bytes_per_s < math.inf:
            raise RemoteProtocolError(f"PROBE, bytes_per_s: {bytes_per_s}, expected a finite number of 0 or more")
        return Probe(number, bool(answer), wanted, bytes_per_s, rtt_ns * 1e-9)

    def _on_hello(self, message: Message) -> Hello:
        values: dict[str, Any] = {field.name: message.attrs.get(field.name) for field in fields(Limits)}
        capabilities = message.attrs.get("capabilities")
        if not isinstance(capabilities, int):
            raise RemoteProtocolError(f"hello, capabilities: {capabilities!r}, expected an int")
        try:
            self.peer_limits = Limits(**values)
        except ValueError as error:
            raise RemoteProtocolError(f"hello, {error}") from None
        self.capabilities &= capabilities
        self._decoder.typed = bool(self.capabilities & TYPES)
        self._encoder = Encoder(self.peer_limits, HEADER_NBYTES, typed=self._decoder.typed)
        self._state = _State.OPEN
        self._may_request = True
        if self._share is not None:
            self.shared = self._share(message.attrs, self.peer_limits)
            if self.shared is not None:
                self.capabilities &= ~(PROBES | CODES)
        if self.capabilities & CODES and self._codings is not None:
            self._decoder.codings = self._codings.accepted
            self._known_flags = REPLY_FLAGS
        return Hello(self.peer_limits, self.capabilities)


def _no_memory(error: MemoryError) -> ResourceError:
    """Why a message is refused that there is no memory for."""
    return fresh(error) if isinstance(error, ArenaFull) else ArenaFull(f"no memory for a tensor: {error}")


def _sendable(text: str) -> str:
    """A text of ours that always encodes and always fits: not Unicode or too long, it loses what must go."""
    return text.encode(errors="replace")[:_MAX_TEXT_NBYTES].decode(errors="ignore")


def _attr(kind: int, message: Message, name: str, wanted: type[Any]) -> Any:
    value = message.attrs.get(name)
    if type(value) is not wanted:  # a bool is no int here
        raise RemoteProtocolError(f"{Kind(kind).name}, {name}: {value!r}, expected {wanted.__name__}")
    return value


def _check_padding(message: Message) -> None:
    tensors = message.tensors
    if len(tensors) > 1 or (tensors and (tensors[0].dtype.code != _UINT8 or tensors[0].nbytes > MAX_PADDING_NBYTES)):
        what = ", ".join(map(str, tensors))
        raise RemoteProtocolError(
            f"a PROBE frame with {what:.200}, expected at most {MAX_PADDING_NBYTES} bytes of uint8"
        )
    if message.placements:
        raise RemoteProtocolError("a PROBE frame with a placement, expected its bytes in the payload as they are")


def _inline(message: Message, buffers: Sequence[Any]) -> list[memoryview]:
    """The buffers that bytes of the payload belong in, in order; those with none are left out."""
    placements = message.placements
    return [
        memoryview(buffer)
        for index, buffer in enumerate(buffers)
        if not (placements and placements[3 * index] & _SEGMENT_BITS) and len(buffer)
    ]


def _check_expected(expected: Sequence[Desc], tensors: Sequence[TensorDesc]) -> None:
    if len(tensors) != len(expected):
        raise RemoteProtocolError(f"a reply of {len(tensors)} tensors, expected {len(expected)}")
    for index, (desc, (code, shape)) in enumerate(zip(tensors, expected)):
        if desc.dtype.code != code or desc.shape != shape:
            wanted = TensorDesc.of(BY_CODE[code], shape)
            raise RemoteProtocolError(f"a reply's tensor {index}: {desc}, expected {wanted}")
