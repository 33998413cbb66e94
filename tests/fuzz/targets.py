"""What is fuzzed: the compiled core beside the Python code, which is the reference.

    Decode   a message's bytes, for a table of heads that Python has validated
    Server   slots of requests, for a fast path that receives and replies
    Client   slots of replies, for a fast path that calls, or submits and waits
    SocketServer, SocketClient   the same with bytes through a socket
    Control  steps at a ring, with any values in the words that both sides write
    Encode   messages to send, for a table of templates

Rules. Where the compiled code takes an input, it gives what the reference gives; where it leaves one to Python, nothing
has happened, and Python goes on as if it had never looked. Two ends in equal states see that: one with a fast path, and
one without anything compiled, which gets each slot as bytes. What is compared: what came out, and the arenas' counts;
through a socket, what the session keeps of a frame that is not whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import socket
import struct
import time
from collections import deque
from functools import partial
from threading import Lock, RLock
from types import SimpleNamespace
from typing import Any

import numpy as np
from raw_peer import CANCEL, ERROR, GOODBYE, PROBE, REPLY, REQUEST, RETIRE, RETURN, SEGMENT, frame

from fastsplit.errors import FastsplitError
from fastsplit.schema import decoder, encoder
from fastsplit.schema.header import HEADER_NBYTES
from fastsplit.schema.limits import Limits
from fastsplit.tensors import collect, parse_arrays, share
from fastsplit.tensors.pool import pool
from fastsplit.wire import backend
from fastsplit.wire.blocking.future import Future
from fastsplit.wire.call import Call
from fastsplit.wire.compression import Coder
from fastsplit.wire.events import Failed, Reply, Request
from fastsplit.wire.fastpath import add_fast_path
from fastsplit.wire.result import Result
from fastsplit.wire.rules import CODES, SHARES, TYPES, State, call_kind
from fastsplit.wire.session import Session
from fastsplit.wire.shm.arena import Arena
from fastsplit.wire.shm.ring import RING_NBYTES, Ring
from fastsplit.wire.shm.segment import Memfd, Segment
from fastsplit.wire.shm.slots import SLOT_NBYTES, Slots
from fastsplit.wire.stats import Stats
from fastsplit.wire.transport.stream import Stream

__all__ = ["TARGETS", "Found"]

LIMITS = Limits(max_metadata_nbytes=8192)
NUMPY, TORCH = parse_arrays("numpy"), parse_arrays("auto")  # the second is numpy again where torch is not installed
SIZES, LENT = (64, 256, 1024, 4096, 128), (2, 1, 0, 40, 1)  # of each block of ours: bytes, loans that an input finds
PEERS_NBYTES, REQUEST_ID = 8192, 7
_HANGS_S = 5.0  # a step takes microseconds; without a bell a fast path sleeps for longer than this


class Found(AssertionError):
    """The compiled code did something else than the reference."""


def same(compiled: Any, reference: Any) -> None:
    if compiled != reference:
        raise Found(f"compiled: {compiled}\nreference: {reference}")


# ---- one side of a connection ----------------------------------------------------------------------------------------


def _memory(nbytes: int) -> Any:
    memory, fd, _ = Memfd().create(nbytes)
    os.close(fd)
    return memory


class End:
    """One side after the handshake, without threads. Its peer: the socket's other end, and Slots of Python's."""

    slot = given = b""
    path: Any = None
    LIMITS = LIMITS

    def __init__(self, *, is_client: bool, compiled: bool) -> None:
        self.is_client, self.compiled = is_client, compiled
        self.arrays = TORCH if is_client and backend.knows_torch() else NUMPY
        self.ours, self.theirs = (1, 2) if is_client else (2, 1)
        self.sock, sock = socket.socketpair()
        self.sock.setblocking(False)
        self.coder = Coder(pool)
        self.open(sock)
        self.held: deque[Any] = deque(maxlen=4)
        self.settle()

    def open(self, sock: socket.socket) -> None:
        is_client = self.is_client
        self.memory = _memory(RING_NBYTES)
        Ring.format(self.memory)
        self.peer = Slots(self.memory, is_client=not is_client)
        self.ring = Ring(Stream(sock, passes_descriptors=True), self.memory, is_client=is_client)
        nothing: Any = {"take_descriptor": lambda: None, "on_memory_pressure": lambda deadline: None}
        self.arena = Arena(is_client=is_client, factory=Memfd(), limits=LIMITS, peer_limits=LIMITS, **nothing)
        self.greet(SHARES | TYPES, lambda *_: self.arena)
        self.segment = Segment(self.theirs, _memory(PEERS_NBYTES), None)
        self.segment.memory[:] = bytes(number % 251 for number in range(PEERS_NBYTES))
        self.mine = [self.arena.allocate(nbytes) for nbytes in SIZES]
        for number, block in enumerate(self.mine):
            block[:] = number
        self.places = [self.arena.place(block.ctypes.data, 1) for block in self.mine]
        del block, self.mine[3:]  # these are the peer's alone
        for segment in self.arena.take_pending()[0]:  # type: ignore[index]
            os.close(segment.fd)  # type: ignore[arg-type]
            segment.fd = None

    def greet(self, capabilities: int, on_hello: Any, **more: Any) -> None:
        make: Any = partial(Session, limits=self.LIMITS, capabilities=capabilities, on_hello=on_hello, **more)
        self.session = make(is_client=self.is_client, allocate=lambda nbytes: np.zeros(nbytes, np.uint8))
        hello = bytes(make(is_client=not self.is_client, allocate=None).hello())
        self.session.receive_buffers()[0][: len(hello)] = hello
        self.session.received(len(hello))
        if not self.compiled:
            self.session.decoder.compiled = self.session.encoder.compiled = None

    @property
    def transport(self) -> Any:
        return self.ring

    def fast_path(self, **more: Any) -> Any:
        link: Any = SimpleNamespace(arena=self.arena, transport=self.transport, session=self.session, inside=set())
        link.sending, link.outbox, link.coder = Lock(), SimpleNamespace(frames=deque()), self.coder
        link.can_code = bool(self.coder.accepted)
        add_fast_path(link, self.arrays, Stats(), handlers={"f": None, "": None}, **more)
        self.path = link.fast_path
        return self.path

    def give(self, data: bytes) -> None:
        """The peer writes. The end without a fast path gets a slot as bytes."""
        self.given = data[:SLOT_NBYTES].ljust(SLOT_NBYTES, b"\0")
        if self.path is not None:
            self.peer.write(self.given)

    @property
    def is_there(self) -> bool:
        """Whether what was given can still be read."""
        return bool(self.ring.has_bytes())

    def settle(self, *, keep_part: bool = False) -> None:
        """The state that an input finds: open, with the peer's segment, and with loans of our blocks. `keep_part`: and
        with the first slots of a longer frame, if these came."""
        session, arena = self.session, self.arena
        session.state, session.may_request, session.aborted, session.in_doubt = State.OPEN, True, False, False
        session._call_kind = call_kind(State.OPEN, is_client=self.is_client)
        session.slot, session._part = None, session._part if keep_part else None
        session.requests.clear()
        if self.theirs not in arena._peers:
            arena._peers[self.theirs] = self.segment
            arena._remap()
        arena.sort_out()
        for place, nbytes, lent in zip(self.places, SIZES, LENT):
            block = arena._own[self.ours].blocks.get(place[1])  # type: ignore[index]
            if block is None or not block.in_use:
                memory = arena.allocate(nbytes)
                block = arena._own[self.ours].blocks[arena.place(memory.ctypes.data, 1)[1]]  # type: ignore[index]
            while block.lent - block.returned < lent:
                arena.lend((self.ours, block.offset, nbytes))

    def state(self) -> Any:
        arena = self.arena
        arena.sort_out()
        blocks = [
            (block.offset, block.nbytes, block.in_use, block.leases - block.dead, block.lent, block.returned)
            for segment in arena._own.values()
            for block in segment.blocks.values()
        ]
        return blocks, list(arena.returns), list(arena._peers), self.session.state, list(self.session.requests)

    def take_in(self) -> Any:
        """The event of what was given, by Python's path."""
        if self.path is not None:
            events = self.ring.receive(self.session, None, blocking=False)
        else:
            events = self.session.received_slot(self.given)
        return events[0] if events else None

    def reply(self, tensors: Any, request_id: int = REQUEST_ID) -> bytes:
        """A reply's frame by Python's path."""
        out = share(tensors, self.arena, 0.0, LIMITS)
        head = self.session.reply(request_id, out.descs, out.nbytes, 5, {"n": 1}, out.placements)
        self.arena.lend(out.placements)
        return bytes(head)

    def sent(self) -> bytes:
        """The frame that this end wrote."""
        if not self.peer.readable():
            raise Found("nothing was written")
        self.peer.take(self)  # type: ignore[arg-type]
        if self.peer.give_back():
            self.peer.gave_back()
        return self.slot[: HEADER_NBYTES + int.from_bytes(self.slot[16:20], "little")]

    def place(self, address: int, nbytes: int) -> Any:
        """Where a tensor lies."""
        place = self.arena.place(address, nbytes)
        if place is None:
            raise Found(f"{nbytes} bytes at {address:#x}, which no segment has")
        return place

    def seen(self, event: Any) -> Any:
        """What came, as it can be compared: tensors by their places and bytes."""
        if isinstance(event, Failed):
            return type(event.error), str(event.error), event.tell
        if not isinstance(event, (Call, Result, Request, Reply)):
            return event
        tensors = []
        for tensor in self.tensors_of(event):
            address, nbytes = tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.data_ptr(), tensor.nbytes
            place = self.place(address, nbytes) if nbytes else None
            tensors.append((tensor.dtype, tuple(tensor.shape), place, ctypes.string_at(address, nbytes)))
        attrs = repr(event.attrs if isinstance(event, (Call, Result)) else event.message.attrs)
        if isinstance(event, Call):
            return tensors, attrs, event.op, event._request_id, event._deadline is None
        if isinstance(event, Request):
            return tensors, attrs, event.message.op, event.request_id, not event.time_ns
        return tensors, attrs, REQUEST_ID if isinstance(event, Result) else event.request_id

    def tensors_of(self, event: Any) -> Any:
        if isinstance(event, (Request, Reply)):
            return tuple(map(self.arrays.view, event.buffers, event.message.tensors))
        return event.tensors if isinstance(event, Call) else event

    def close(self) -> None:
        self.held.clear()
        self.session.close()
        self.arena.close()
        self.ring.close()
        self.sock.close()


class SocketEnd(End):
    """One that has a socket and no shared memory. Codings were agreed on."""

    LIMITS = Limits(max_metadata_nbytes=8192, max_message_nbytes=2**20)
    failed = False

    def open(self, sock: socket.socket) -> None:
        self.stream, self.arena = Stream(sock), None  # type: ignore[assignment]
        capabilities = CODES | TYPES | Coder.capabilities()
        self.greet(capabilities, lambda *_: self.coder.agree(capabilities), codings=self.coder)
        self.session.enlarge_staging(68 * 1024)  # as the fast path does, so that both ends count the same
        self.mine = [np.full(nbytes, number, np.uint8) for number, nbytes in enumerate(SIZES)]

    @property
    def transport(self) -> Any:
        return self.stream

    def settle(self, *, keep_part: bool = False) -> None:
        """Open, with nothing left to read. `keep_part`: but what came of a longer frame, if all before was right."""
        session = self.session
        with contextlib.suppress(BlockingIOError):
            while True:
                self.stream._sock.recv(65536, socket.MSG_DONTWAIT)
        if self.failed or not keep_part:
            session.close()
            session.payload_left = 0
        self.failed = session.aborted = session.in_doubt = session.unfinished = False
        session.state, session.may_request, session.arrived = State.OPEN, True, 0
        session._call_kind = call_kind(State.OPEN, is_client=self.is_client)
        session.requests.clear()
        session.unwanted.clear()

    def state(self) -> Any:
        session, path = self.session, self.path
        staged_nbytes = session.staged_nbytes + (0 if path is None else path.staged_nbytes)
        part = bytes(session._staging[session._at : session._filled])
        return part, session.payload_left, staged_nbytes, session.state, list(session.requests)

    def give(self, data: bytes) -> None:
        self.sock.send(data)

    @property
    def is_there(self) -> bool:
        return bool(self.session.arrived or self.session.unfinished or self.stream.has_bytes())

    def take_in(self) -> Any:
        events: list[Any] = []
        while self.is_there and not self.failed:
            self.stream.receive(self.session, None, blocking=False, events=events)
            self.failed = bool(events) and isinstance(events[-1], Failed)
        return events[0] if len(events) == 1 else events or None

    def reply(self, tensors: Any, request_id: int = REQUEST_ID) -> bytes:
        out = collect(tensors, self.LIMITS)
        head = self.session.reply(request_id, out.descs, out.nbytes, 5, {"n": 1}, ())
        return bytes(head) + b"".join(map(bytes, out.buffers))

    def sent(self) -> bytes:
        try:
            return self.sock.recv(65536)
        except BlockingIOError:
            raise Found("nothing was written") from None

    def place(self, address: int, nbytes: int) -> Any:
        return None

    def seen(self, event: Any) -> Any:
        return list(map(self.seen, event)) if isinstance(event, list) else super().seen(event)

    def close(self) -> None:
        self.held.clear()
        self.session.close()
        self.stream.close()
        self.sock.close()


# ---- frames ----------------------------------------------------------------------------------------------------------

F32, U8, BF16, COMPLEX = 12, 2, 11, 16
# op, tensors, attributes, where each tensor lies (segment: 1 the sender's, 2 the receiver's; offset), returns
MESSAGES: list[tuple[str, list[tuple[int, tuple[int, ...]]], dict[str, Any], list[tuple[int, int]], list[int]]] = [
    ("f", [], {}, [], []),
    ("", [], {"n": 3}, [], []),
    ("f", [(F32, (4,))], {}, [(1, 64)], []),
    ("", [(F32, (4,))], {"n": 1}, [(2, 64)], [2, 0]),
    ("f", [(F32, (2, 3)), (U8, (64,))], {"n": -1, "x": 0.5, "on": True, "s": "abc", "m": 5}, [(1, 0), (2, 0)], [2, 64]),
    ("", [(U8, (64,)), (U8, (256,))], {"x": math.nan}, [(1, 0), (1, 64)], [2, 1344, 2, 64]),
    ("f", [(U8, (100,)), (U8, (100,))], {"off": False}, [(2, 64), (2, 64)], [2, 64, 2, 64]),
    ("g", [(BF16, (8,)), (COMPLEX, (2,))], {"l": [1, 2], "t": ["a"], "b": b"c"}, [(1, 128), (1, 8)], []),
    ("", [(BF16, (8, 1, 1, 1, 2))], {"l": [0.5], "bools": [True]}, [(2, 1344)], [2, 0]),
    ("f", [(F32, (0, 4)), (U8, ())], {}, [(0, 0), (1, 5)], []),
    ("f", [(U8, (PEERS_NBYTES,))], {"k": 2**62}, [(1, 0)], [2, 0, 2, 0, 2, 1344]),
    ("", [(U8, (PEERS_NBYTES,)), (U8, (1,))], {}, [(1, 0), (1, 8191)], [2, 0, 2, 0]),
    ("", [(F32, (2, 2))], {}, [(1, 64)], []),
    ("f", [], {"a": 1, "b": 2.0, "c": True}, [], [2, 1344] * 33),
    ("f", [(U8, (3,))], {}, [], []),
    ("f", [], {"s": "long" * 300}, [], []),
    ("f", [(U8, (8,))], {}, [(2, 320)], []),
    ("", [], {"free": 1}, [], [2, 5440]),
]


def frames(kind: int) -> list[bytes]:
    out, ids = [], (0, 1, 2) if kind == REQUEST else (0, 2, 1)
    for number, (op, descs, attrs, placed, returned) in enumerate(MESSAGES):
        sizes = [decoder.TensorDesc.of(decoder.BY_CODE[code], shape).nbytes for code, shape in descs]
        placements = [each for (segment, at), nbytes in zip(placed, sizes) for each in (ids[segment], at, nbytes)]
        returns = [each if index % 2 else ids[each] for index, each in enumerate(returned)]
        time_ns = 10**9 * (number % 3)
        out.append(frame(kind, REQUEST_ID, op, descs, attrs, b"", placements, returns, typed=True, time_ns=time_ns))
    out += [frame(RETURN, attrs={"wanted": wanted}, returns=(2, 0, 1, 0)) for wanted in (0, 1)]
    out += [frame(RETIRE, attrs={"id": number}) for number in (1, 2)]
    out += [frame(other, REQUEST_ID, attrs={"code": "failed", "text": "x"}) for other in (CANCEL, GOODBYE, ERROR)]
    return out + [frame(other, attrs={"id": 3, "nbytes": 64, "name": "", "answer": 0}) for other in (SEGMENT, PROBE)]


def socket_frames(kind: int) -> list[bytes]:
    """Frames with payloads; some of them coded, and some behind one another. What travels by reference is among them,
    and wrong here."""
    out = []
    for number, (op, descs, attrs, _, _) in enumerate(MESSAGES):
        nbytes = sum(decoder.TensorDesc.of(decoder.BY_CODE[code], shape).nbytes for code, shape in descs)
        payload, flags = bytes(at % 251 for at in range(nbytes)), number % 3 * 17 * (kind == REQUEST)
        out.append(frame(kind, REQUEST_ID, op, descs, attrs, payload, typed=True, flags=flags, time_ns=number % 3))
    for coding in (0x10, 0x20, 0x01):
        placements = [coding << 32, 0, 8]
        out.append(frame(kind, REQUEST_ID, "f", [(F32, (4,))], payload=bytes(8), placements=placements, typed=True))
    return [*out, out[2] + out[3], out[2][:-3], out[0] * 3, out[2] + out[4][:50], *frames(kind)]


class Frames:
    """A target whose inputs are a frame, and a byte that says what else is to happen."""

    numbers = (0, 63, 65, 320, 1344, 5440, 5568, REQUEST_ID, *SIZES, PEERS_NBYTES - 4, PEERS_NBYTES)

    def __init__(self, kind: int) -> None:
        self.seeds = [each + bytes([what]) for each in frames(kind) for what in (0, 0xB7, 0x1A)]


class Decode(Frames):
    def __init__(self) -> None:
        super().__init__(REQUEST)
        self.decoder, self.reference, self.full = backend.Decoder(LIMITS), *(decoder.Decoder(LIMITS) for _ in range(2))
        self.decoder.typed = self.reference.typed = self.full.typed = True
        self.compiled: Any = self.decoder.compiled
        self.turn = -len(self.seeds)

    def run(self, data: bytes) -> None:
        message = metadata, varying_nbytes = data[HEADER_NBYTES:-1], int.from_bytes(data[20:24], "little")
        self.turn += 1
        found = self.compiled.decode(*message)
        if found is not None:
            same(self._exactly(found), self._exactly(self.reference.decode(metadata, varying_nbytes)))
        if found is not None and not self.turn % 8:
            self.full.forget()
            same(self._exactly(found), self._exactly(self.full.decode(metadata, varying_nbytes)))
        if found is None and (self.turn < 0 or not self.turn % 32):  # what is valid is known from then on
            with contextlib.suppress(FastsplitError):
                self.decoder.decode(metadata, varying_nbytes)

    @staticmethod
    def _exactly(message: Any) -> Any:
        """A message, of which a nan equals itself, and 1 is neither 1.0 nor True."""
        return type(message), message[:2], repr(message[2]), message[3:]

    def close(self) -> None:
        pass


class _FastPaths(Frames):
    """Two ends, the first with a fast path. The last byte: 2 keep the tensors, 32 go on with a longer frame."""

    End: type[End] = End

    def __init__(self, kind: int, **more: Any) -> None:
        super().__init__(kind)
        self.ends = [self.End(is_client=kind == REPLY, compiled=compiled) for compiled in (True, False)]
        self.path = self.ends[0].fast_path(**more)

    def run(self, data: bytes) -> None:
        frame, what = data[:-1] or b"\0", data[-1]
        first, second = self.ends
        for end in self.ends:
            end.give(frame)
        found = self.ask(what)
        if found is None and not first.is_there:
            raise Found("the frame is gone")
        came = [first.take_in() if found is None else found, second.take_in()]
        del found
        same(*(end.seen(event) for end, event in zip(self.ends, came)))
        self.answer(came, what)
        for end in self.ends:
            event = came.pop(0)
            end.held.append(event if what & 2 else None)
        del event
        same(first.state(), second.state())
        for end in self.ends:
            end.settle(keep_part=bool(what & 32))

    def ask(self, what: int) -> Any:
        raise NotImplementedError

    def answer(self, came: list[Any], what: int) -> None:
        pass

    def close(self) -> None:
        for end in self.ends:
            end.close()


class Server(_FastPaths):
    """The last byte: 1 reply, 4 and 8 what that holds."""

    def __init__(self) -> None:
        super().__init__(REQUEST)

    def ask(self, what: int) -> Any:
        return self.path.receive(None)

    def answer(self, came: list[Any], what: int) -> None:
        if what & 1 and isinstance(came[1], Request):
            same(*(self._reply(end, event, what >> 2 & 3) for end, event in zip(self.ends, came)))

    def _reply(self, end: End, event: Any, what: int) -> bytes:
        result = end.tensors_of(event) if what == 3 else ((), (end.mine[0],), (np.arange(12, dtype=np.int16),))[what]
        if isinstance(event, Request):
            event.buffers.clear()
            return end.reply(result, event.request_id)
        event.reply_attrs = {"n": 1}
        return end.sent() if self.path.reply(event, result, 5) else end.reply(result, event._request_id)


class Client(_FastPaths):
    """The last byte: 1 submit and wait, 4 another request is in flight, 8 and 16 what is expected."""

    def __init__(self) -> None:
        super().__init__(REPLY, future_type=Future)
        core = SimpleNamespace(refusing=False, closed=False, max_inflight=8, calls={}, flags=0)
        self.reader: Any = SimpleNamespace(
            core=core, lock=RLock(), reading=0, followers=0, watcher=None, watching=False
        )
        self.reader.turns, self.reader.events, self.reader.callbacks = [], [], []
        self.reader.left_fast_path = lambda future: None

    def ask(self, what: int) -> Any:
        first, reader, calls = self.ends[0], self.reader, self.reader.core.calls
        expected = [(F32, (4,))] if what & 24 == 24 else None
        for end in self.ends:
            end.session.next_id = REQUEST_ID
            if what & 4:
                end.session.requests[3] = None
        asked = (reader, "op", (), {"n": 1}, 5.0, expected)
        found = self.path.submit(*asked) if what & 1 else self.path.call(*asked)
        heads = [end.session.request(*asked[1:4], 0, 5 * 10**9, expected)[1] for end in self.ends[found is not None :]]
        if found is None:
            first.transport.send([heads[0]])
        same(first.sent(), heads[-1])
        if what & 1 and found is not None:
            self.path.wait(reader, found, 5.0)
            found = found._outcome if found._done else found
        same((reader.reading, len(calls)), (0, found is not None and type(found) is not Result))
        calls.clear()
        return found if type(found) is Result else None


class _Socket(_FastPaths):
    End = SocketEnd

    def __init__(self) -> None:
        super().__init__()  # type: ignore[call-arg]
        kind = REPLY if self.ends[0].is_client else REQUEST
        self.seeds = [each + bytes([what]) for each in socket_frames(kind) for what in (0, 0xB7, 0x1A)]
        self.ends[0].stream.arm(time.monotonic())  # it waits for the rest of a payload: no longer than this


class SocketServer(_Socket, Server):
    pass


class SocketClient(_Socket, Client):
    pass


# ---- the ring's own words --------------------------------------------------------------------------------------------


class Control:
    """Steps of 8 bytes: what, where, a value. Errors are fastsplit's own, and nothing waits for long."""

    numbers = (0, 1, 2, 255)
    _STEP = struct.Struct("<BxHi")

    def __init__(self) -> None:
        self.frames = frames(REQUEST)
        steps = [self._STEP.pack(what, where, value) for what in range(14) for where in (0, 15) for value in (0, 1, -1)]
        self.seeds = [b"".join(steps[at : at + 12]) + b"\0" for at in range(0, len(steps), 4)]
        self.seeds += [b"".join(self._STEP.pack(what, 2, 1) for what in (3, 4, 6)) * 8 + b"\0"]
        self.turn, self.null = 0, os.open(os.devnull, os.O_RDONLY)
        self.descriptors = self._descriptors()
        self._renew()

    def _renew(self) -> None:
        self.end = End(is_client=False, compiled=True)
        self.path = self.end.fast_path()
        self.end.ring.link.arm(time.monotonic() + 0.001)  # after an old bell it sleeps again: no longer than this
        for result in ([], [self.end.mine[0]]):
            self.end.reply(result)

    def run(self, data: bytes) -> None:
        self.turn += 1
        if not self.turn % 100:  # the two sides no longer mean the same slots
            self._end()
            self._renew()
        started = time.monotonic()
        for step in self._STEP.iter_unpack(data[: min(len(data) // 8, 32) * 8]):
            with contextlib.suppress(FastsplitError):
                self._step(*step)
            self._read_what_was_sent()
        self.end.settle()
        if time.monotonic() - started > _HANGS_S:
            raise Found(f"it took {time.monotonic() - started} s")

    def _step(self, what: int, where: int, value: int) -> None:
        end, slots, ring, what = self.end, self.end.ring.slots, self.end.ring, what % 14
        next_slot = 64 * ((end.peer._out_slot + where // 2 % 4) % 64)
        at = (where % 3072 * 4, (64, 128, 192, 256, 320, 384, 448)[where % 7], (4096, 8192)[where % 2] + next_slot)
        if what < 3:  # any word; the words of sleeping, fence and space; a semaphore of the next slots
            end.memory[at[what] : at[what] + 4] = struct.pack("<i", value)
        elif what == 3:
            end.peer.write(self.frames[where % len(self.frames)][:SLOT_NBYTES])
        elif what < 6:
            self._ring_bell(brings=where % 16 == 15)
            ring.spin.spin_us = where % 3 * 5.0
            call = self.path.receive(None)
            if call is not None:
                end.seen(call)
                call.reply_attrs = {"n": 1}
                self.path.reply(call, (call.tensors, None, end.mine[0])[value % 3], 1)
        elif what < 8:
            self._ring_bell(brings=where % 16 == 15)
            if ring.receive(end.session, None, blocking=False):
                end.settle()
        elif what == 8:
            ring.send([end.reply([])])
        elif what == 9:
            slots.poll(where % 50)
            slots.has_space()
        elif what == 10:
            slots.set_asleep(value & 255)
            slots.peer_asleep()
            slots.must_wake()
        elif what == 11:
            if slots.give_back():
                slots.gave_back()
        elif what == 12:
            ring.prepare_to_sleep(for_items=bool(where & 1), for_space=bool(where & 2))
            ring.awake()
            ring.wake_early()
        elif slots.readable():
            slots.take(end)

    def _ring_bell(self, *, brings: bool) -> None:
        with contextlib.suppress(BlockingIOError):
            socket.send_fds(self.end.sock, [b"w"], [self.null] if brings else [])

    def _read_what_was_sent(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.end.sock.recv(4096)
        if self.end.peer.readable():
            self.end.sent()

    def _end(self) -> None:
        self.end.close()
        same(self._descriptors(), self.descriptors)

    @staticmethod
    def _descriptors() -> int:
        """How many descriptors are open of what is brought along."""
        found = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
        return sum(os.path.lexists(each) and os.readlink(each) == "/dev/null" for each in found)

    def close(self) -> None:
        self._end()
        os.close(self.null)


# ---- out -------------------------------------------------------------------------------------------------------------


class Encode:
    """Messages that the bytes choose, field by field."""

    numbers = (2**63 - 1,)
    _VALUES = (True, False, "", "text", "Ünïcode", b"", b"x\0", [1, 2], [0.5], [True], ["a"], 2**63, None, np.int64(3))

    def __init__(self) -> None:
        self.pair = [each.Encoder(LIMITS, HEADER_NBYTES, typed=True) for each in (backend, encoder)]
        self.seeds = [bytes((7 * number * at + number) % 256 for at in range(16 + 8 * number)) for number in range(24)]

    def run(self, data: bytes) -> None:
        at = -1

        def byte(below: int) -> int:
            nonlocal at
            at += 1
            return data[at % len(data)] % below

        def word() -> int:
            nonlocal at
            at += 8
            return int.from_bytes(data[at - 8 : at], "little")

        def value() -> Any:
            kind = byte(12)
            if kind < 5:
                return word() - 2**63 if kind < 3 else struct.unpack("<d", word().to_bytes(8, "little"))[0]
            return self._VALUES[byte(20) % len(self._VALUES)]

        op: Any = ("", "f", "op", "Ünï", 7)[byte(4) + (byte(16) == 0)]
        tensors = [
            (byte(17) + 1, tuple(byte(4) if byte(8) else word() for _ in range(byte(4)))) for _ in range(byte(4))
        ]
        attrs = {f"{'nxyz'[byte(4)]}{byte(2)}": value() for _ in range(byte(5))}
        placements = [word() for _ in range(3 * len(tensors))] if byte(2) else ()
        returns = [word() >> byte(33) for _ in range(2 * byte(3))]
        same(*(self._encode(each, op, tensors, attrs, placements, returns) for each in self.pair))

    @staticmethod
    def _encode(each: Any, *message: Any) -> Any:
        try:
            return each.encode(*message)
        except FastsplitError as error:
            return type(error), str(error)

    def close(self) -> None:
        pass


_ALL = (Decode, Server, Client, SocketServer, SocketClient, Control, Encode)
TARGETS: dict[str, Any] = {each.__name__.lower(): each for each in _ALL}
