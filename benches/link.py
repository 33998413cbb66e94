"""A link to measure on: a relay with a rate and a delay, in front of anything that listens on tcp.

    python -m benches.link --connect tcp://127.0.0.1:7000 [--rate-mbit 1000] [--delay-ms 2.5] [--listen URI]

It prints `READY tcp://127.0.0.1:PORT`, the address to connect to instead, and ends when its stdin does. In Python
`relay` and `through` start it as a process; LINKS has the links by name. fastsplit must be told `?shm=off`.

The model. A link has a rate in each direction, which all its connections share, and a delay each way, half a round
trip. Bytes leave in order at that rate, and each arrives the delay later. What cannot leave yet waits in a queue of
2 ms of the rate; when it is full the relay stops reading. No headers are counted, nothing is lost, and connecting is
not delayed. The end of a stream arrives as the bytes do, each way on its own; a reset, at once.

Rules. When a byte leaves and arrives is computed, never slept: being late now delays nothing that comes later. Bytes
are handed on at most every 0.25 ms, and the last ones of a message exactly in time. The waiting is done in the kernel.
Where the CPUs are all busy the relay is late, unless it may run before others (SCHED_RR): root may.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benches.processes import process
from fastsplit.errors import ConnectError, DeadlineError
from fastsplit.wire.transport.address import TcpAddress, parse_address

__all__ = ["LINKS", "LinkKind", "main", "relay", "relay_arguments", "through"]


@dataclass(frozen=True)
class LinkKind:
    """A link by name. The rate is that of each direction, 0 without a limit."""

    name: str
    rate_bit_per_s: float
    round_trip_s: float

    @property
    def delay_s(self) -> float:
        """One way."""
        return self.round_trip_s / 2

    @property
    def text(self) -> str:
        if not self.rate_bit_per_s and not self.round_trip_s:
            return "no relay: this machine's loopback"
        return f"{self.rate_bit_per_s / 1e6:g} Mbit/s each way, {self.round_trip_s * 1e3:g} ms round trip"


LINKS = {
    kind.name: kind
    for kind in (
        LinkKind("loopback", 0, 0),
        LinkKind("10g", 10e9, 0.2e-3),
        LinkKind("1g", 1e9, 5e-3),
        LinkKind("100m", 100e6, 20e-3),
    )
}

_QUEUE_S = 2e-3
_SHARE_S = 0.5e-3  # the most one connection takes of the queue at a time, when others want it too
_TICK_S = 0.25e-3
_PACKET_NBYTES = 1500  # at low rates a share is this many bytes, and the queue two shares
_UNLIMITED_HELD_NBYTES = 64 * 1024**2  # on the way at most, when there is a delay but no rate
_UNDELAYED_HELD_NBYTES = 1024**2
_SMALLEST_BUFFER_NBYTES, _LARGEST_BUFFER_NBYTES = 64 * 1024, 1024**2
_CONNECT_S = 10.0
_PR_SET_TIMERSLACK = 29


# ---- the link --------------------------------------------------------------------------------------------------------


class _Wire:
    """One direction: when what is sent now leaves."""

    def __init__(self, rate_bit_per_s: float, delay_s: float) -> None:
        self.bytes_per_s = rate_bit_per_s / 8
        self.delay_s = delay_s
        self._free_at = 0.0
        packet_s = _PACKET_NBYTES / self.bytes_per_s if self.bytes_per_s else 0.0
        self._share_s = max(_SHARE_S, packet_s)
        self._queue_s = max(_QUEUE_S, 2 * packet_s)

    @property
    def held_nbytes(self) -> int:
        """What one connection can have on the way and in the queue."""
        if not self.bytes_per_s:
            return _UNLIMITED_HELD_NBYTES if self.delay_s else _UNDELAYED_HELD_NBYTES
        return max(int((self.delay_s + self._queue_s + self._share_s) * self.bytes_per_s), _SMALLEST_BUFFER_NBYTES)

    @property
    def room_at(self) -> float:
        """When the queue has room for a share: on a tick, when it is woken anyway."""
        if not self.bytes_per_s:
            return 0.0
        return math.ceil((self._free_at - self._queue_s + self._share_s) / _TICK_S) * _TICK_S

    @property
    def share_nbytes(self) -> int:
        return int(self._share_s * self.bytes_per_s) if self.bytes_per_s else sys.maxsize

    def book(self, nbytes: int, now: float) -> tuple[float, float]:
        """From when to when these bytes leave."""
        start = max(now, self._free_at)
        end = start + (nbytes / self.bytes_per_s if self.bytes_per_s else 0.0)
        self._free_at = end
        return start, end


@dataclass
class _Train:
    """Bytes that leave one after the other without a gap."""

    start: float
    end: float
    nbytes: int
    arrived_nbytes: int = 0


class _Connection:
    """Two sockets, closed when both directions are done with them."""

    def __init__(self, near: socket.socket, far: socket.socket, pumps: tuple[_Pump, _Pump]) -> None:
        self.near, self.far = near, far
        self._pumps = pumps
        self.is_reset = False
        self._lock = threading.Lock()
        self._directions = 2

    def reset(self) -> None:
        self.is_reset = True
        for sock in (self.near, self.far):
            with contextlib.suppress(OSError):
                _close_by_reset(sock)
        for pump in self._pumps:
            pump.wake()

    def release(self) -> None:
        with self._lock:
            self._directions -= 1
            if self._directions:
                return
        self.near.close()
        self.far.close()


class _Flow:
    """One direction of one connection: a ring of bytes, and the trains that say when they arrive."""

    def __init__(self, connection: _Connection, source: socket.socket, sink: socket.socket, wire: _Wire) -> None:
        self.connection, self.source, self.sink = connection, source, sink
        self.is_done = False
        self.is_blocked = False  # the sink takes nothing now
        self._wire = wire
        self._ring = memoryview(bytearray(wire.held_nbytes))
        self._head = self._held = 0
        self._arrived = 0  # of those held
        self._trains: deque[_Train] = deque()
        self._ends_at: float | None = None  # when the end of the stream arrives, once it was read

    def reads_at(self) -> float:
        """When it has a use for more bytes."""
        return math.inf if self._ends_at is not None or self._held == len(self._ring) else self._wire.room_at

    def take(self) -> None:
        now = time.monotonic()
        if self.reads_at() > now:  # another connection was faster
            return
        tail = (self._head + self._held) % len(self._ring)
        room = min(len(self._ring) - max(self._held, tail), self._wire.share_nbytes)
        try:
            nbytes = self.source.recv_into(self._ring[tail : tail + room])
        except BlockingIOError:
            return
        start, end = self._wire.book(nbytes, now)
        if not nbytes:
            self._ends_at = end + self._wire.delay_s
            return
        self._held += nbytes
        if self._trains and self._trains[-1].end == start:
            self._trains[-1].end = end
            self._trains[-1].nbytes += nbytes
        else:
            self._trains.append(_Train(start, end, nbytes))

    def deliver(self) -> None:
        """Hands on what has arrived by now."""
        now = time.monotonic()
        self._arrive(now - self._wire.delay_s)
        while self._arrived and not self.is_blocked:
            nbytes = min(self._arrived, len(self._ring) - self._head)
            try:
                sent = self.sink.send(self._ring[self._head : self._head + nbytes])
            except BlockingIOError:
                sent = 0
            self.is_blocked = sent < nbytes
            self._arrived -= sent
            self._held -= sent
            # from the start again when empty: these pages are in the cache
            self._head = (self._head + sent) % len(self._ring) if self._held else 0
        if self._ends_at is not None and not self._held and now >= self._ends_at:
            self.sink.shutdown(socket.SHUT_WR)
            self.is_done = True

    def _arrive(self, left_by: float) -> None:
        while self._trains:
            train = self._trains[0]
            if left_by < train.end:
                if left_by > train.start:
                    nbytes = min(int((left_by - train.start) * self._wire.bytes_per_s), train.nbytes)
                    self._arrived += max(nbytes - train.arrived_nbytes, 0)
                    train.arrived_nbytes = max(nbytes, train.arrived_nbytes)
                return
            self._arrived += train.nbytes - train.arrived_nbytes
            self._trains.popleft()

    def arrives_at(self, now: float) -> float:
        """When there is something to deliver next. Ticks are the same ones for all: one waking serves them all."""
        if self.is_blocked:
            return math.inf
        if not self._trains:
            return math.inf if self._ends_at is None else self._ends_at
        train = self._trains[0]
        begun_at = max(now, train.start + self._wire.delay_s)
        return min(train.end + self._wire.delay_s, (begun_at // _TICK_S + 1) * _TICK_S)


# ---- moving bytes ----------------------------------------------------------------------------------------------------


class _Pump:
    """A thread that moves the bytes of all flows of one direction. One for both would not do for 10 Gbit/s."""

    def __init__(self) -> None:
        self._flows: deque[_Flow] = deque()
        self._incoming: deque[_Flow] = deque()
        self._woken, self._waker = socket.socketpair()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, flow: _Flow) -> None:
        self._incoming.append(flow)
        self.wake()

    def wake(self) -> None:
        self._waker.send(b"\0")

    def _run(self) -> None:
        while True:
            reading, writing, wait_s = self._interests()
            readable, writable, _ = select.select(reading, writing, [], wait_s)
            if self._woken in readable:
                self._woken.recv(4096)
                while self._incoming:
                    self._flows.append(self._incoming.popleft())
            for flow in list(self._flows):
                if flow.sink in writable:
                    flow.is_blocked = False
                self._move(flow, flow.source in readable)
            self._flows.rotate(-1)  # so that all come first by turns where the queue has room

    def _interests(self) -> tuple[list[socket.socket], list[socket.socket], float | None]:
        now = time.monotonic()
        reading, writing, wake_at = [self._woken], [], math.inf
        for flow in self._flows:
            reads_at = flow.reads_at()
            if reads_at <= now:
                reading.append(flow.source)
            else:
                wake_at = min(wake_at, reads_at)
            wake_at = min(wake_at, flow.arrives_at(now))
            if flow.is_blocked:
                writing.append(flow.sink)
        return reading, writing, None if wake_at == math.inf else max(wake_at - time.monotonic(), 0.0)

    def _move(self, flow: _Flow, is_readable: bool) -> None:
        if not flow.connection.is_reset:
            try:
                if is_readable:
                    flow.take()
                flow.deliver()
            except OSError:  # one end is gone: the other learns it as it would without us
                flow.connection.reset()
        if flow.is_done or flow.connection.is_reset:
            self._flows.remove(flow)
            flow.connection.release()


def _close_by_reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _wake_on_time() -> None:
    """The kernel may wake a sleeper 50 us late to save power. Not us, nor the threads that we start."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: then it is late
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def _go_first() -> None:
    """Before other programs, as hardware does not wait for a CPU. The threads that we start do too."""
    with contextlib.suppress(OSError, AttributeError):  # we may not: root may
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def _tune(sock: socket.socket, rate_bit_per_s: float) -> None:
    """The kernel's own buffers grow to megabytes, seconds of a slow link: these hold about as much as the queue."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if rate_bit_per_s:
        nbytes = min(max(int(rate_bit_per_s / 8 * _QUEUE_S), _SMALLEST_BUFFER_NBYTES), _LARGEST_BUFFER_NBYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, nbytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)


def _serve(listener: socket.socket, target: TcpAddress, rate_bit_per_s: float, delay_s: float) -> None:
    """Accepts connections until stdin ends."""
    wires = _Wire(rate_bit_per_s, delay_s), _Wire(rate_bit_per_s, delay_s)
    pumps = _Pump(), _Pump()
    stdin = sys.stdin.fileno()
    while True:
        readable, _, _ = select.select([listener, stdin], [], [])
        if stdin in readable and not os.read(stdin, 4096):
            return
        if listener not in readable:
            continue
        near, _ = listener.accept()
        try:
            far = target.connect(_CONNECT_S)
        except (ConnectError, DeadlineError) as error:
            print(f"{error}", file=sys.stderr, flush=True)
            _close_by_reset(near)
            near.close()
            continue
        for sock in (near, far):
            _tune(sock, rate_bit_per_s)
            sock.setblocking(False)
        connection = _Connection(near, far, pumps)
        pumps[0].add(_Flow(connection, near, far, wires[0]))
        pumps[1].add(_Flow(connection, far, near, wires[1]))


# ---- for other benchmarks --------------------------------------------------------------------------------------------


@contextmanager
def relay(connect_uri: str, rate_bit_per_s: float = 0.0, delay_s: float = 0.0) -> Iterator[str]:
    """A relay in front of `connect_uri`, as a process of its own: the URI to connect to. The delay is one way."""
    with process("benches.link", *relay_arguments(connect_uri, rate_bit_per_s, delay_s)) as running:
        yield running.ready


def relay_arguments(connect_uri: str, rate_bit_per_s: float, delay_s: float) -> list[str]:
    """The command line of such a relay, for those who start it themselves."""
    rate, delay = f"{rate_bit_per_s / 1e6:.9g}", f"{delay_s * 1e3:.9g}"
    return ["--connect", connect_uri, "--rate-mbit", rate, "--delay-ms", delay]


@contextmanager
def through(kind: LinkKind, connect_uri: str) -> Iterator[str]:
    """As `relay`, of a link by name; the loopback link is none at all."""
    if not kind.rate_bit_per_s and not kind.round_trip_s:
        yield connect_uri
        return
    with relay(connect_uri, kind.rate_bit_per_s, kind.delay_s) as uri:
        yield uri


# ---- the command -----------------------------------------------------------------------------------------------------


def _tcp_address(uri: str) -> TcpAddress:
    address = parse_address(uri)
    if not isinstance(address, TcpAddress):
        raise argparse.ArgumentTypeError(f"{uri}: expected tcp://host:port")
    return address


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.link", description=__doc__.partition("\n")[0])
    parser.add_argument("--connect", type=_tcp_address, required=True, metavar="URI", help="where connections go to")
    parser.add_argument("--listen", type=_tcp_address, default="tcp://127.0.0.1:0", metavar="URI")
    parser.add_argument("--rate-mbit", type=float, default=0.0, help="Mbit/s of each direction; 0: no limit")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way: half of a round trip")
    args = parser.parse_args(argv)
    if not (0 <= args.rate_mbit < math.inf and 0 <= args.delay_ms < math.inf):
        parser.error("--rate-mbit and --delay-ms must be 0 or more")
    listener, address = args.listen.listen()
    assert isinstance(address, TcpAddress)
    _wake_on_time()
    if args.rate_mbit or args.delay_ms:
        _go_first()
    with listener:
        _tune(listener, args.rate_mbit * 1e6)  # before a connection comes: its window is agreed on as it begins
        print("READY", TcpAddress(address.host, address.port, args.connect.shm), flush=True)
        _serve(listener, args.connect, args.rate_mbit * 1e6, args.delay_ms / 1e3)
    return 0


if __name__ == "__main__":
    sys.exit(main())
