"""Where the microseconds of a 64-byte round trip in shared memory go: bench_shm.py profile.

How it is measured. A server and a channel in this very process make some calls, so that all tables, templates and
blocks are as in the middle of a connection; then both sides are left alone, and each step is run by itself in a tight
loop, with what a real call gave it: best of the rounds, since nothing but a disturbance makes a step slower. Beside
them stands a whole round trip between two processes. A step's row says how often it happens in a round trip, on both
sides together; both are never at work at the same moment, so the steps add up. Rows that are indented are part of the
row above, and are not added.

What is left of the round trip is what only happens between two processes or between the steps: cache lines that come
from the other core, a spinning loop that looks at the semaphore a little late, caches that a tight loop finds warm,
and the few lines between the steps.
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fastsplit
from benches.rounds import progress
from benches.transports.pair import open_pairs
from fastsplit.schema.decoder import Decoder
from fastsplit.schema.header import HEADER_NBYTES, pack_header, parse_header
from fastsplit.schema.limits import Limits
from fastsplit.tensors import parse_arrays, share
from fastsplit.wire.blocking.future import Future
from fastsplit.wire.call import Call
from fastsplit.wire.result import Result
from fastsplit.wire.shm.ring import RING_NBYTES, SLOT_NBYTES, SLOTS, Ring
from fastsplit.wire.transport.stream import Stream

__all__ = ["measure", "table"]

_OURS = "shm: fastsplit"
_REPEATS = 4000  # of a step, in each round
_BATCH = SLOTS // 2  # frames that go into the ring before they are taken out again
_LENT = 10**9  # loans that are made up, so that one can come back over and over


@dataclass
class Step:
    """`times`: in one round trip, both sides together. `part`: of the step before it that is not a part."""

    what: str
    ns: float
    times: float
    part: bool = False

    @property
    def total_ns(self) -> float:
        return self.ns * self.times


def measure(rounds: int, cpu: int | None) -> dict[str, Any]:
    """`cpu`: where the other process of the whole round trip runs."""
    progress("a whole round trip")
    round_trip_us = _round_trip_us(rounds, cpu)
    progress("its steps")
    with ExitStack() as stack:
        steps = _Connected(stack, rounds).steps()
    sum_us = sum(step.total_ns for step in steps if not step.part) * 1e-3
    return {
        "steps": [{**asdict(step), "total_ns": step.total_ns} for step in steps],
        "sum_us": sum_us,
        "round_trip_us": round_trip_us,
        "rest_us": round_trip_us - sum_us,
    }


def table(profile: dict[str, Any]) -> str:
    lines = [f"{'step':<58}{'ns':>8}{'times':>8}{'us':>8}"]
    for step in profile["steps"]:
        name = ("    of which " if step["part"] else "") + step["what"]
        total = f"({step['total_ns'] * 1e-3:.2f})" if step["part"] else f"{step['total_ns'] * 1e-3:.2f}"
        lines.append(f"{name:<58}{step['ns']:>8.0f}{step['times']:>8g}{total:>8}")
    for what, key in (("all steps", "sum_us"), ("the rest", "rest_us"), ("a round trip, spinning", "round_trip_us")):
        lines.append(f"{what:<74}{profile[key]:>8.2f}")
    return "\n".join(lines)


def _round_trip_us(rounds: int, cpu: int | None) -> float:
    with ExitStack() as stack:
        pairs, left_out = open_pairs(stack, [_OURS], cpu, 0)
        if _OURS not in pairs:
            raise SystemExit(left_out[_OURS])
        pair = pairs[_OURS]
        pair.prepare(64)
        pair.run(64, "spinning", 2000)
        figures = [pair.run(64, "spinning", 2000).wall_s / 2000 * 1e6 for _ in range(rounds)]
        pair.release(64)
    return statistics.median(figures)


class _Connected:
    """Both ends of a connection in the middle of its life, and what they say to each other."""

    def __init__(self, stack: ExitStack, rounds: int) -> None:
        self._rounds = rounds
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastsplit-bench-"))
        seen: list[Any] = []

        def echo(call: fastsplit.Call) -> Any:
            seen[:] = [call._served]
            return call.tensors

        uri = f"unix://{directory}/profile.sock"
        self.server = stack.enter_context(fastsplit.Server(uri, {"echo": echo}, arrays="torch", spin_us=0))
        self.channel = stack.enter_context(fastsplit.connect(uri, arrays="torch", spin_us=0))
        if not self.channel.shm:
            raise SystemExit(f"no shared memory: {self.channel.shm_reason}")
        self.tensor = self.channel.empty((16,), "float32")
        self.frames: dict[str, bytes] = {}
        for _ in range(100):
            self.channel.call("echo", self.tensor)
        self.near, self.far = self.channel._connection, seen[0].connection
        self.served = seen[0]
        with ExitStack() as recording:
            for name, end in (("request", self.near), ("reply", self.far)):
                recording.callback(setattr, end.transport, "send", end.transport.send)
                end.transport.send = self._recorder(name, end.transport.send)  # type: ignore[method-assign]
            self.channel.call("echo", self.tensor)

    def _recorder(self, name: str, send: Callable[..., Any]) -> Callable[..., Any]:
        def record(buffers: Sequence[Any], nbytes: int = -1) -> Any:
            self.frames[name] = bytes(buffers[0])
            return send(buffers, nbytes)

        return record

    def steps(self) -> list[Step]:
        return [
            *self._sending(),
            *self._ring(),
            *self._receiving(),
            *self._objects(),
        ]

    def _best_ns(self, run: Callable[[], object], *, batch: int = 1) -> float:
        """Of one of the `batch` that each run does."""
        best_ns = float("inf")
        for _ in range(self._rounds + 1):
            started_ns = time.perf_counter_ns()
            for _ in range(_REPEATS // batch):
                run()
            best_ns = min(best_ns, (time.perf_counter_ns() - started_ns) / (_REPEATS // batch * batch))
        return best_ns - _EMPTY_NS / batch

    # ---- out ----

    def _sending(self) -> list[Step]:
        arena, session = self.near.arena, self.near.session
        assert arena is not None
        tensor = self.tensor
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        shared = share([tensor], arena, None)
        descs, placements = shared.descs, shared.placements
        encoder = session.encoder
        frame = bytearray(self.frames["request"])

        def request() -> None:
            request_id, _ = session.request("echo", descs, {}, 0, 10**9, None, placements)
            del session.requests[request_id]

        return [
            Step("where the tensor is: share", self._best_ns(lambda: share([tensor], arena, None)), 2),
            Step("Tensor.data_ptr", self._best_ns(tensor.data_ptr), 2, part=True),
            Step("Arena.place", self._best_ns(lambda: arena.place(address, nbytes)), 2, part=True),
            Step("the frame: Session.request, .reply", self._best_ns(request), 2),
            Step("Encoder.encode", self._best_ns(lambda: encoder.encode("echo", descs, {}, placements)), 2, part=True),
            Step("pack_header", self._best_ns(lambda: pack_header(frame, 2, 7, 40, 0, 10**9)), 2, part=True),
            Step("the loan: Arena.lend", self._best_ns(lambda: arena.lend(placements)), 2),
        ]

    # ---- across ----

    def _ring(self) -> list[Step]:
        """A ring of its own, with one thread at both ends of it."""
        memory = mmap.mmap(-1, RING_NBYTES)
        Ring.format(memory)
        socks = socket.socketpair()
        near = Ring(Stream(socks[0]), memory, is_client=True)
        far = Ring(Stream(socks[1]), memory, is_client=False)
        frame = bytearray(self.frames["request"])
        session: Any = _NoSession()
        send_ns = receive_ns = float("inf")
        for _ in range((self._rounds + 1) * _REPEATS // _BATCH):
            started_ns = time.perf_counter_ns()
            for _ in range(_BATCH):
                near.send((frame,), len(frame))
            sent_ns = time.perf_counter_ns()
            for _ in range(_BATCH):
                far.receive(session, None)
            received_ns = time.perf_counter_ns()
            send_ns = min(send_ns, (sent_ns - started_ns) / _BATCH)
            receive_ns = min(receive_ns, (received_ns - sent_ns) / _BATCH)
        post_ns, take_ns = self._semaphores_ns()
        size = len(frame)

        def slot_in() -> None:
            memory[8192 : 8192 + size] = frame

        steps = [
            Step("into the ring: Ring.send", send_ns, 2),
            Step("the slot's bytes", self._best_ns(slot_in), 2, part=True),
            Step("a semaphore's post", post_ns, 2, part=True),
            Step("out of the ring: Ring.receive", receive_ns, 2),
            Step("a semaphore's take", take_ns, 2, part=True),
            Step("the slot's bytes", self._best_ns(lambda: memory[8192 : 8192 + SLOT_NBYTES]), 2, part=True),
        ]
        near.close()
        far.close()
        return steps

    def _semaphores_ns(self) -> tuple[float, float]:
        library = ctypes.PyDLL(None)
        semaphore = ctypes.byref(ctypes.c_int())
        library.pthread_spin_init(semaphore, 1)
        post, take = library.pthread_spin_unlock, library.pthread_spin_trylock
        post_ns = take_ns = float("inf")
        for _ in range(self._rounds * 10):
            started_ns = time.perf_counter_ns()
            for _ in range(1000):
                post(semaphore)
            posted_ns = time.perf_counter_ns()
            for _ in range(1000):
                take(semaphore)
            post_ns = min(post_ns, (posted_ns - started_ns) / 1000)
            take_ns = min(take_ns, (time.perf_counter_ns() - posted_ns) / 1000)
        return post_ns - _EMPTY_NS, take_ns - _EMPTY_NS

    # ---- in ----

    def _receiving(self) -> list[Step]:
        request, reply = (self.frames[name].ljust(SLOT_NBYTES, b"\0") for name in ("request", "reply"))
        near, far = self.near, self.far
        assert near.arena is not None and far.arena is not None
        self._make_up_loans(far.session, near.session)
        reply_id = parse_header(reply, 0, Limits())[1]
        waiting, near_session, far_session = near.session.requests, near.session, far.session

        def take_reply() -> None:
            waiting[reply_id] = None
            near_session.received_slot(reply)

        request_ns = self._best_ns(lambda: far_session.received_slot(request))
        far.arena.take_returns(_LENT)  # of leases that were never lent
        reply_ns = self._best_ns(take_reply)
        limits, header = Limits(), parse_header(request, 0, Limits())
        metadata = request[HEADER_NBYTES : HEADER_NBYTES + header[2]]
        decoder = Decoder(limits)
        (desc,) = decoder.decode(metadata, header[3]).tensors
        segment, offset, _ = share([self.tensor], near.arena, None).placements
        resolve_ns = self._best_ns(lambda: far.arena.resolve(segment, offset, desc))
        lease = far.arena.resolve(segment, offset, desc)
        far.arena.take_returns(_LENT)
        view = parse_arrays("torch").view
        return [
            Step("the frame: Session.received_slot, a request", request_ns, 1),
            Step("the frame: Session.received_slot, a reply", reply_ns, 1),
            Step("parse_header", self._best_ns(lambda: parse_header(request, 0, limits)), 2, part=True),
            Step("Decoder.decode", self._best_ns(lambda: decoder.decode(metadata, header[3])), 2, part=True),
            Step("Arena.resolve: a lease, and its death", resolve_ns, 2, part=True),
            Step("the tensor, and its death", self._best_ns(lambda: view(lease, desc)), 2),
            Step("torch.from_numpy", self._best_ns(lambda: torch.from_numpy(lease)), 2, part=True),
        ]

    def _make_up_loans(self, *sessions: Any) -> None:
        """The recorded frames name loans and returns; each of them shall hold as often as it is read."""
        for end in (self.near, self.far):
            assert end.arena is not None
            for segment in end.arena._own.values():
                for block in segment.blocks.values():
                    block.lent += _LENT

    # ---- what a call is made of beside that ----

    def _objects(self) -> list[Step]:
        channel: Any = self.channel
        tensor = self.tensor
        lock = threading.Lock()

        def hold() -> None:
            with lock:
                pass

        def result() -> None:
            made = Result((tensor,))
            made.attrs = {}
            made.remote_s = 0.0
            made.wait_s = 0.0

        return [
            Step("Future", self._best_ns(lambda: Future(channel, 1, "echo", 1.0, 1.0, 1)), 1),
            Step("Result", self._best_ns(result), 1),
            Step("Call", self._best_ns(lambda: Call(self.served, 1, "echo", (tensor,), {}, None)), 1),
            # Three in a call, two in waiting, two in what came; two for a handler; and a look at it by either spinner.
            # Those in received_slot are in its rows.
            Step("perf_counter_ns", self._best_ns(time.perf_counter_ns), 11),
            Step("monotonic", self._best_ns(time.monotonic), 3),
            Step("a lock: sending on either side, reading, leaving, settling", self._best_ns(hold), 5),
        ]


class _NoSession:
    """What a ring gives its slots to here: the session has rows of its own."""

    slot: bytes | None = None

    def received_slot(self, slot: bytes, events: list[Any] | None = None) -> list[Any]:
        self.slot = None
        return []


def _empty_ns() -> float:
    """What the loop costs that calls a step, and the call of a lambda."""
    best_ns = float("inf")
    for _ in range(20):
        started_ns = time.perf_counter_ns()
        for _ in range(_REPEATS):
            pass
        best_ns = min(best_ns, (time.perf_counter_ns() - started_ns) / _REPEATS)
    return best_ns


_EMPTY_NS = _empty_ns()
