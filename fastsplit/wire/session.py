"""The protocol's state machine: bytes in, events out. No I/O, no threads, no clocks except for counting its own time.

    client                                   server
      HELLO  ------------------------------->          both state version, capabilities and limits
             <-------------------------------  HELLO
      REQUEST id, op, attrs, tensors ------->          any number in flight
      CANCEL id ---------------------------->          optional; the request is still answered
             <-----------------  REPLY id, tensors     or ERROR id; in any order, exactly one for each request
      SEGMENT, RETIRE, RETURN <------------->          where both sides share memory: see shm/arena.py
      PROBE <------------------------------->          asked and answered: measures the link, see transport/meter.py
      GOODBYE ------------------------------>          or from the server; then the stream ends
      ABORT  <------------------------------>          the sender cannot go on, and why; then the stream ends

RULES in rules.py says which frame is legal when, from which side, with which tensors, and what it does; `_check_answer`
here says which request a reply may answer. This module is the incoming side, from bytes to frames: `_admit` applies the
rules, `_complete` handles a frame. The outgoing side is frames.py, the events are events.py, and memory for tensors is
found by incoming.py.

How bytes come in. The owner asks `receive_buffers()` where the next bytes belong, reads into them, and calls
`received(n)`. A frame's head is read into a small staging buffer; as soon as its metadata is complete and valid, memory
for its tensors is allocated and the rest is read straight into it. The part of a payload that came in the same read as
its head (at most STAGING_NBYTES, or what `enlarge_staging` says) is copied and counted in `staged_nbytes`: the price of
one read for a small message.
Through a ring frames come slot by slot (`received_slot`), never with a payload: their tensors are in shared memory.

Interrupts. In the main thread a signal's handler may raise at any moment (Ctrl-C). `received` notes what came in, and
what became of it, in one step each. An interrupted call is made again, with the same events, and continues where it
was. That is impossible only while a frame takes effect (`in_doubt`: some microseconds). CPython runs handlers where a
function begins, after a call and at a jump backwards. So an assignment to several names is one step, and so is
`(x,) = map(f, (y,))`, which calls f while it is unpacked.

Rules. Events come in the order of the bytes, however these were cut up. A Failed event is the last one: the stream is
dead; `abort` makes the frame that tells the peer. A message that there is no memory for is read and dropped, and its
event has a `refusal` in the place of tensors; the connection lives on. Nothing is allocated before the header, the
metadata and the session's state were checked against each other. Incoming state belongs to the thread that reads,
outgoing state to the one that sends; they share the tables of open requests, whose operations are atomic, and
`may_request`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from time import perf_counter_ns
from typing import Any

from ..errors import ArenaFull, FastsplitError, PeerLostError, RemoteProtocolError, ResourceError, fresh
from ..schema.descriptor import AttrValue, Message, TensorDesc
from ..schema.dtypes import BY_CODE
from ..schema.header import HEADER_NBYTES, REPLY_FLAGS, Header, Kind, parse_header
from ..schema.limits import Limits
from ..tensors import Desc
from .backend import Decoder, Encoder
from .events import Event, Failed, Hello, Reply, Request
from .frames import NO_REQUEST, Frames
from .incoming import Codings, IncomingTensors, Payload, Shared, inline_targets
from .rules import CODES, PROBES, RULES, TYPES, State, Tensors, agreed_on, call_kind, check

__all__ = ["STAGING_NBYTES", "Session"]

STAGING_NBYTES = 4096

_REPLY = int(Kind.REPLY)  # an int: comparing with an enum's member costs more than the rest of a check
_new = tuple.__new__  # a NamedTuple without its own constructor: 0.1 us less


class Session(Frames):
    """One end of one connection. `allocate(nbytes)`: writable memory for one tensor, a flat uint8 array.

    `codings`: what is accepted once the peer's HELLO is in (`on_hello` sets it). `offer`: attributes for the HELLO.
    `on_hello(attrs, peer_limits)` is called with those of the peer's HELLO before any later frame is looked at; it
    returns the arena, None where no memory is shared.
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
        super().__init__(limits=limits or Limits(), capabilities=capabilities, offer=offer or {})
        self.is_client = is_client
        self.state = State.HANDSHAKE
        """Of what comes in."""
        self.aborted = False
        """Whether the peer has sent an ABORT."""
        self.staged_nbytes = 0
        self.decode_ns = 0
        self.payload_left = 0
        """Bytes that are still to come of the frame that is being read."""
        self.arrived = 0
        """Bytes that were read, and that `received` was not called with yet."""
        self.unfinished = False
        """Whether `received` was interrupted, and is to be called again with what `arrived`."""
        self.slot: bytes | None = None
        """A ring's slot that was taken out of it, and that `received_slot` was not called with yet."""
        self.in_doubt = False
        """Whether a frame has only half taken effect."""
        self._call_kind = 0  # the kind that is legal here without a further check (rules.py), 0 for none
        self._codings = codings
        self._known_flags = 0
        self._on_hello = on_hello
        self.decoder = Decoder(self.limits)
        self._tensors = IncomingTensors(allocate, codings)
        self._take, self._allocate = self._tensors.take, allocate
        self._part: bytes | None = None  # of a frame that takes several slots
        self._part_nbytes = 0
        self._stagings = _stagings(STAGING_NBYTES)
        self._staging = self._stagings[0]
        self._filled = 0
        self._at = 0  # up to where the staging buffer has been read
        self._payload: Payload | None = None

    # ---- bytes ----

    def receive_buffers(self) -> list[memoryview]:
        """The memory that the next bytes belong in, in order; never empty. Valid until the next call of `received`."""
        if self._payload is not None:
            return self._payload.remaining()
        return [self._staging[self._filled :]]

    def enlarge_staging(self, nbytes: int) -> memoryview:
        """Enlarges the staging buffers to `nbytes` bytes. Returns the one that bytes are read into while no part of a
        frame waits."""
        self._stagings = _stagings(nbytes)
        self._move_staged(self._at, self._stagings[0])
        return self._staging

    def received(self, nbytes: int, events: list[Event] | None = None) -> list[Event]:
        """Takes `nbytes` bytes that were read into `receive_buffers()`.

        Returns `events`, a new list by default, with the events of the frames that are complete now at its end. After a
        Failed event nothing more may be read.
        """
        started_ns = perf_counter_ns()
        events = [] if events is None else events
        try:
            payload = self._payload
            if payload is None:
                self._filled, self.arrived, self.unfinished = self._filled + nbytes, 0, True
                self._read_staged(events)
            else:
                index, at = payload.after(nbytes)
                left = self.payload_left - nbytes
                payload.index, payload.at, self.payload_left, self.arrived, self.unfinished = index, at, left, 0, True
                if payload.is_whole:
                    buffers, refusal = self._tensors.decoded(payload.message, payload.buffers, payload.refusal)
                    self._payload, self.in_doubt = None, True
                    self._complete(payload.header, payload.message, buffers, refusal, events)
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
        """Takes a whole frame of a ring."""
        message = self.decoder.decode(metadata, header[3])
        self.in_doubt, self.slot, self._part = True, None, None
        if header[0] == self._call_kind and not message.payload_nbytes:
            # What `_admit` and `_complete` do, in one piece: 1 to 3 us less a round trip.
            request_id = header[1]
            if not self.is_client:
                events.append(_new(Request, (request_id, message, self._take(message), header[5], header[6], None)))
                self.in_doubt = False
                return
            expected = self.requests.pop(request_id, NO_REQUEST)
            if expected is not None:
                if expected is NO_REQUEST:
                    self._check_answer(header, message)
                _check_expected(expected, message.tensors)
            if self.unwanted:
                self.unwanted.discard(request_id)
            events.append(_new(Reply, (request_id, message, self._take(message), header[5], None)))
            self.in_doubt = False
            return
        self._admit(header, message)
        self._complete(header, message, [], None, events)  # of all other kinds, none has tensors that are wanted
        self.in_doubt = False

    def _read_staged(self, events: list[Event]) -> None:
        """Takes whole frames out of the staging buffer, and moves the rest to its start."""
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
            message = self.decoder.decode(metadata, header[3])
            at += head_nbytes
            wanted = self._admit(header, message)
            payload_nbytes = header[4]
            if not payload_nbytes <= filled - at:
                self.in_doubt = bool(message.placements)  # else it can be done again: nothing has happened yet
                payload = self._tensors.open_payload(header, message, wanted)
                self.staged_nbytes += payload.fill(staging[at:filled])
                left = payload_nbytes - (filled - at)
                self._payload, self.payload_left, self._at, self.in_doubt = payload, left, filled, False
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
                buffers = self._tensors.make_room(message)
                for target in inline_targets(message, buffers):
                    target[:] = staging[at : at + len(target)]
                    at += len(target)
                self.staged_nbytes += payload_nbytes
                buffers, refusal = self._tensors.decoded(message, buffers)
            else:
                self._tensors.drop(message)
                at += payload_nbytes
            self._complete(header, message, buffers, refusal, events)
            self._at, self.in_doubt = at, False
        if at == filled:
            self._staging, self._filled, self._at = self._stagings[0], 0, 0
        elif at:
            self._move_staged(at, self._stagings[staging is self._stagings[0]])

    def _move_staged(self, at: int, staging: memoryview) -> None:
        """Continues in another staging buffer, which begins with the unread rest of this one."""
        rest = self._filled - at
        staging[:rest] = self._staging[at : self._filled]
        self._staging, self._filled, self._at = staging, rest, 0

    # ---- frames ----

    def _admit(self, header: Header, message: Message) -> bool:
        """Applies the rules to a frame. Returns whether its tensors are wanted. Raises RemoteProtocolError."""
        kind = header[0]
        if header[4] != message.payload_nbytes:
            raise RemoteProtocolError(
                f"header, payload_nbytes: {header[4]}, expected {message.payload_nbytes}, the sum of its tensors"
            )
        if kind == self._call_kind:
            rule = RULES[kind]
        else:
            rule = check(kind, self.state, message, is_client=self.is_client, agreed=agreed_on(self))
            if rule.tensors is Tensors.UNREAD:
                rule.handle(self, header, message, [], None)
        if rule.answers:
            return self._check_answer(header, message)
        return rule.tensors is Tensors.ANY

    def _check_answer(self, header: Header, message: Message) -> bool:
        """Checks an answer against its request. Returns whether it is wanted. Raises RemoteProtocolError."""
        kind, request_id = header[0], header[1]
        if request_id not in self.requests:
            raise RemoteProtocolError(
                f"header, request_id: {request_id} in {Kind(kind).name}, expected one that has no answer yet"
            )
        expected = self.requests[request_id]
        if expected is not None and kind == _REPLY:
            _check_expected(expected, message.tensors)
        return request_id not in self.unwanted

    def _complete(
        self,
        header: Header,
        message: Message,
        buffers: list[Any],
        refusal: ResourceError | None,
        events: list[Event],
    ) -> None:
        """Handles a frame that is complete."""
        if message.returns:
            self._tensors.take_returns(message)
        event = RULES[header[0]].handle(self, header, message, buffers, refusal)
        if event is not None:
            events.append(event)

    def open(self, message: Message) -> Hello:
        """Takes the peer's HELLO: from here on the session is open. Raises RemoteProtocolError."""
        values: dict[str, Any] = {field.name: message.attrs.get(field.name) for field in fields(Limits)}
        capabilities = message.attrs.get("capabilities")
        if not isinstance(capabilities, int):
            raise RemoteProtocolError(f"hello, capabilities: {capabilities!r}, expected an int")
        try:
            self.peer_limits = Limits(**values)
        except ValueError as error:
            raise RemoteProtocolError(f"hello, {error}") from None
        self.capabilities &= capabilities
        self.decoder.typed = bool(self.capabilities & TYPES)
        self.encoder = Encoder(self.peer_limits, HEADER_NBYTES, typed=self.decoder.typed)
        self.state, self._call_kind = State.OPEN, call_kind(State.OPEN, is_client=self.is_client)
        self.may_request = True
        if self._on_hello is not None:
            self.shared = self._tensors.shared = self._on_hello(message.attrs, self.peer_limits)
            if self.shared is not None:
                self.capabilities &= ~(PROBES | CODES)
        if self.capabilities & CODES and self._codings is not None:
            self.decoder.codings = self._codings.accepted
            self._known_flags = REPLY_FLAGS
        return Hello(self.peer_limits, self.capabilities)

    # ---- the end ----

    def end(self) -> None:
        """Nothing more may come in."""
        self.state, self._call_kind = State.ENDED, 0

    def _fail(self, error: FastsplitError | MemoryError, events: list[Event]) -> None:
        self.end()
        self.may_request = False
        error = fresh(error) if isinstance(error, FastsplitError) else ArenaFull(f"no memory to read a frame: {error}")
        events.append(Failed(error, tell=not self.aborted))

    def end_of_stream(self) -> PeerLostError:
        """The peer's stream has ended: the error that this means for what is in flight."""
        self.end()
        self.may_request = False
        if self._payload is not None:
            missing = sum(map(len, self._payload.remaining()))
            return PeerLostError(
                f"the peer's stream ended {missing} bytes before the end of a payload of "
                f"{self._payload.header[4]} bytes"
            )
        if self._filled or self._part:
            came = self._filled or len(self._part or ())
            return PeerLostError(f"the peer's stream ended after {came} bytes of a frame's head")
        return PeerLostError("the peer closed the connection")

    @property
    def at_frame_boundary(self) -> bool:
        """Whether every byte that came in belongs to a whole frame."""
        return self._payload is None and not self._filled and self._part is None

    def close(self) -> None:
        """The connection has ended: drops the frame that is half received, and its memory.

        No other thread may be reading. Idempotent.
        """
        payload, self._payload = self._payload, None
        if payload is not None:
            payload.drop()
        self._tensors.close()
        self._part = None
        self._staging, self._filled, self._at = self._stagings[0], 0, 0


def _stagings(nbytes: int) -> tuple[memoryview, memoryview]:
    return memoryview(bytearray(nbytes)), memoryview(bytearray(nbytes))


def _check_expected(expected: Sequence[Desc], tensors: Sequence[TensorDesc]) -> None:
    if len(tensors) != len(expected):
        raise RemoteProtocolError(f"a reply of {len(tensors)} tensors, expected {len(expected)}")
    for index, (desc, (code, shape)) in enumerate(zip(tensors, expected)):
        if desc.dtype.code != code or desc.shape != shape:
            wanted = TensorDesc.of(BY_CODE[code], shape)
            raise RemoteProtocolError(f"a reply's tensor {index}: {desc}, expected {wanted}")
