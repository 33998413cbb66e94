"""Does the relay of link.py keep to what it states? Nothing that was measured through it counts unless it does.

    python -m benches.bench_link                    about 2 minutes
    python -m benches.bench_link --only 1g 100m
    python -m benches.bench_link --namespaces       as root: beside a limit of the kernel's own

Raw sockets, the other end a process of its own, through each link of LINKS, through a relay without limit or delay, and
with no relay at all ("direct").

Throughput: a second of the stated rate or more, there, back, and both at a time; counted where it arrives, from the
first bytes to the last. Stated: the rate, 5 % less or more. Where there is no rate it says how
fast a program can be before it is the relay that is measured.

Round trips: 64 bytes there and back. Stated: the round trip and twice the time that 64 bytes take at that rate, 0.5 ms
less or more. It includes what two processes need to wake each other, which "direct" shows.

1 MiB: the time from before it is sent until its last byte has come, one way. Stated: delay + nbytes / rate, 5 % of the
latter and 0.5 ms less or more.

Systems take turns in every round, in changing order, and the result is the median of the rounds. "relay CPU" is what
the relay took of one core during "both". The exit code is 1 if anything was missed.

Namespaces. Two network namespaces with a pair of virtual devices between them, each limited by the kernel's token
bucket: the same throughput, of the bytes in the connection, beside what is left of the rate when headers are paid for.
Needs root, `ip` and `tc`, and says what was missing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import os
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from benches.environment import add_output, describe, keep_whole, save
from benches.link import LINKS, LinkKind, relay_arguments
from benches.processes import OthersCpu, process
from benches.rounds import interleaved, progress

__all__ = ["HOSTS", "in_namespace", "main", "namespaces"]

DIRECT = LinkKind("direct", 0, 0)
UNLIMITED = LinkKind("unlimited", 0, 0)
LINK_S = 1.0
UNLIMITED_NBYTES = 2 * 1024**3  # what counts as a second of no limit
ROUND_TRIP_NBYTES = 64
ROUND_TRIPS_S, MOST_ROUND_TRIPS, FEWEST_ROUND_TRIPS = 0.5, 1000, 50
MESSAGE_NBYTES = 1024**2
MESSAGES = 5  # in each round
RATE_TOLERANCE = 0.05
DELAY_TOLERANCE_S = 0.5e-3

_BLOCK_NBYTES = 1024**2
_JOB = struct.Struct("<QQ")  # which, and how many bytes
_TAKE, _SEND, _BOTH, _ECHO, _SEND_STAMPED = range(5)
_ARRIVAL = struct.Struct("<ddd")
_STAMP = struct.Struct("<d")
_CONNECT_S = 10.0


# ---- both ends -------------------------------------------------------------------------------------------------------


@dataclass
class Arrival:
    """When bytes came, by the clock that all processes of a machine share."""

    bytes_per_s: float
    """From the first bytes, which are not counted, to the last."""
    first_at: float
    last_at: float


def _send(sock: socket.socket, nbytes: int) -> None:
    block = memoryview(bytes(min(nbytes, _BLOCK_NBYTES)))
    while nbytes:
        sock.sendall(block[:nbytes])
        nbytes -= min(nbytes, len(block))


def _receive(sock: socket.socket, nbytes: int) -> Arrival:
    block = memoryview(bytearray(min(nbytes, _BLOCK_NBYTES)))
    left, first_at = nbytes, None
    while left:
        received = sock.recv_into(block[: min(left, len(block))])
        if not received:
            raise ConnectionError(f"the stream ended {left} bytes early, of {nbytes}")
        left -= received
        if first_at is None:
            first_at, counted = time.monotonic(), nbytes - received
    last_at = time.monotonic()
    assert first_at is not None
    return Arrival(counted / max(last_at - first_at, 1e-9), first_at, last_at)


def _receive_exactly(sock: socket.socket, nbytes: int) -> bytes:
    received = sock.recv(nbytes, socket.MSG_WAITALL)
    if len(received) < nbytes:
        raise ConnectionError(f"{len(received)} bytes, expected {nbytes}")
    return received


class _Sending(threading.Thread):
    """Sends bytes meanwhile."""

    def __init__(self, sock: socket.socket, nbytes: int) -> None:
        super().__init__(daemon=True)
        self._sock, self._nbytes = sock, nbytes

    def run(self) -> None:
        with contextlib.suppress(OSError):  # the end that receives says it
            _send(self._sock, self._nbytes)

    def __enter__(self) -> _Sending:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join()


# ---- the other end ---------------------------------------------------------------------------------------------------


def _serve_peer(host: str, namespace: str | None) -> None:
    with in_namespace(namespace):
        listener = socket.create_server((host, 0))
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    print(f"READY {host} {listener.getsockname()[1]}", flush=True)
    sys.stdin.read()


def _accept(listener: socket.socket) -> None:
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_serve_one, args=(sock,), daemon=True).start()


def _serve_one(sock: socket.socket) -> None:
    with sock, contextlib.suppress(ConnectionError):
        while True:
            job, nbytes = _JOB.unpack(_receive_exactly(sock, _JOB.size))
            if job == _ECHO:
                sock.sendall(_receive_exactly(sock, nbytes))
            elif job == _SEND:
                _send(sock, nbytes)
            elif job == _SEND_STAMPED:
                sock.sendall(_STAMP.pack(time.monotonic()) + bytes(nbytes - _STAMP.size))
            else:
                with _Sending(sock, nbytes) if job == _BOTH else contextlib.nullcontext():
                    arrival = _receive(sock, nbytes)
                sock.sendall(_ARRIVAL.pack(arrival.bytes_per_s, arrival.first_at, arrival.last_at))


# ---- one link --------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What was measured through one link, by round."""

    link: str
    rate_bit_per_s: float
    round_trip_s: float
    there_bit_per_s: list[float] = field(default_factory=list)
    back_bit_per_s: list[float] = field(default_factory=list)
    both_there_bit_per_s: list[float] = field(default_factory=list)
    both_back_bit_per_s: list[float] = field(default_factory=list)
    relay_cpu_cores: list[float] = field(default_factory=list)
    round_trip_median_s: list[float] = field(default_factory=list)
    round_trip_p99_s: list[float] = field(default_factory=list)
    message_there_s: list[float] = field(default_factory=list)
    message_back_s: list[float] = field(default_factory=list)
    relay_goes_first: bool | None = None
    """Whether it may run before other programs: None if it has nothing to be late for."""

    def median(self, what: str) -> float:
        rounds: list[float] = getattr(self, what)
        return statistics.median(rounds)


class Measured:
    """A link, a connection through it, and its figures."""

    def __init__(self, kind: LinkKind, sock: socket.socket, relay_pid: int | None) -> None:
        self.figures = Figures(kind.name, kind.rate_bit_per_s, kind.round_trip_s)
        if relay_pid is not None and (kind.rate_bit_per_s or kind.round_trip_s):
            self.figures.relay_goes_first = os.sched_getscheduler(relay_pid) == os.SCHED_RR
        self._sock, self._relay_pid = sock, relay_pid
        self._nbytes = int(kind.rate_bit_per_s / 8 * LINK_S) or UNLIMITED_NBYTES
        few = int(ROUND_TRIPS_S / kind.round_trip_s) if kind.round_trip_s else MOST_ROUND_TRIPS
        self._round_trips = min(max(few, FEWEST_ROUND_TRIPS), MOST_ROUND_TRIPS)

    def run_throughput(self) -> None:
        figures = self.figures
        self._sock.sendall(_JOB.pack(_TAKE, self._nbytes))
        _send(self._sock, self._nbytes)
        figures.there_bit_per_s.append(self._peer_arrival().bytes_per_s * 8)
        self._sock.sendall(_JOB.pack(_SEND, self._nbytes))
        figures.back_bit_per_s.append(_receive(self._sock, self._nbytes).bytes_per_s * 8)
        cpu_s, began_at = self._relay_cpu_s(), time.monotonic()
        self._sock.sendall(_JOB.pack(_BOTH, self._nbytes))
        with _Sending(self._sock, self._nbytes):
            arrival = _receive(self._sock, self._nbytes)
        figures.both_back_bit_per_s.append(arrival.bytes_per_s * 8)
        figures.both_there_bit_per_s.append(self._peer_arrival().bytes_per_s * 8)
        figures.relay_cpu_cores.append((self._relay_cpu_s() - cpu_s) / (time.monotonic() - began_at))

    def run_round_trips(self) -> None:
        message = _JOB.pack(_ECHO, ROUND_TRIP_NBYTES - _JOB.size) + bytes(ROUND_TRIP_NBYTES - _JOB.size)
        taken_s = []
        for _ in range(self._round_trips):
            began_at = time.monotonic()
            self._sock.sendall(message)
            _receive_exactly(self._sock, ROUND_TRIP_NBYTES - _JOB.size)
            taken_s.append(time.monotonic() - began_at)
        self.figures.round_trip_median_s.append(statistics.median(taken_s))
        self.figures.round_trip_p99_s.append(sorted(taken_s)[int(len(taken_s) * 0.99)])

    def run_messages(self) -> None:
        there_s, back_s = [], []
        for _ in range(MESSAGES):
            message = _JOB.pack(_TAKE, MESSAGE_NBYTES - _JOB.size) + bytes(MESSAGE_NBYTES - _JOB.size)
            began_at = time.monotonic()
            self._sock.sendall(message)
            there_s.append(self._peer_arrival().last_at - began_at)
            self._sock.sendall(_JOB.pack(_SEND_STAMPED, MESSAGE_NBYTES))
            (began_at,) = _STAMP.unpack(_receive_exactly(self._sock, _STAMP.size))
            back_s.append(_receive(self._sock, MESSAGE_NBYTES - _STAMP.size).last_at - began_at)
        self.figures.message_there_s.append(statistics.median(there_s))
        self.figures.message_back_s.append(statistics.median(back_s))

    def _peer_arrival(self) -> Arrival:
        return Arrival(*_ARRIVAL.unpack(_receive_exactly(self._sock, _ARRIVAL.size)))

    def _relay_cpu_s(self) -> float:
        return 0.0 if self._relay_pid is None else time.clock_gettime(_cpu_clock(self._relay_pid))


def _cpu_clock(pid: int) -> int:
    """The clock of another process's CPU time (clock_getcpuclockid)."""
    return (~pid << 3) | 2


def _connect(host: str, port: int) -> socket.socket:
    sock = socket.create_connection((host, port), _CONNECT_S)
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _measure_links(kinds: list[LinkKind], rounds: int) -> tuple[list[Figures], float | None]:
    with ExitStack() as stack:
        peer = stack.enter_context(process("benches.bench_link", "--peer", "127.0.0.1"))
        _, port = peer.ready.split()
        pids, links = [os.getpid(), peer.pid], []
        for kind in kinds:
            relay_pid, link_port = None, port
            if kind is not DIRECT:
                arguments = relay_arguments(f"tcp://127.0.0.1:{port}", kind.rate_bit_per_s, kind.delay_s)
                relay = stack.enter_context(process("benches.link", *arguments))
                relay_pid, link_port = relay.pid, relay.ready.rpartition(":")[2]
                pids.append(relay.pid)
            links.append(Measured(kind, stack.enter_context(_connect("127.0.0.1", int(link_port))), relay_pid))
        for link in links:  # their windows are open then
            link.run_messages()
            link.figures.message_there_s.clear()
            link.figures.message_back_s.clear()
        others = OthersCpu(*pids)
        for link in interleaved([links], rounds, "links"):
            link.run_throughput()
            link.run_round_trips()
            link.run_messages()
        return [link.figures for link in links], others.seconds()


# ---- what was stated -------------------------------------------------------------------------------------------------


@dataclass
class Check:
    link: str
    what: str
    measured: float
    stated: float
    tolerance: float
    """In the same unit."""

    @property
    def reached(self) -> bool:
        return abs(self.measured - self.stated) <= self.tolerance

    def __str__(self) -> str:
        scale, unit = (1e-6, "Mbit/s") if "bit_per_s" in self.what else (1e3, "ms")
        figures = (
            f"{self.measured * scale:.4g} {unit}, stated {self.stated * scale:.4g} +- {self.tolerance * scale:.3g}"
        )
        return f"{self.link}, {self.what}: {figures}"


def _checks(figures: list[Figures]) -> list[Check]:
    checks = []
    for one in figures:
        if one.link == DIRECT.name:
            continue
        rate = one.rate_bit_per_s
        if rate:
            for what in ("there", "back", "both_there", "both_back"):
                what += "_bit_per_s"
                checks.append(Check(one.link, what, one.median(what), rate, RATE_TOLERANCE * rate))
        trip_s = one.round_trip_s + (2 * ROUND_TRIP_NBYTES * 8 / rate if rate else 0.0)
        what = "round_trip_median_s"
        checks.append(Check(one.link, what, one.median(what), trip_s, DELAY_TOLERANCE_S))
        if rate:
            alone_s = MESSAGE_NBYTES * 8 / rate
            for what in ("message_there_s", "message_back_s"):
                stated_s, tolerance_s = one.round_trip_s / 2 + alone_s, DELAY_TOLERANCE_S + RATE_TOLERANCE * alone_s
                checks.append(Check(one.link, what, one.median(what), stated_s, tolerance_s))
    return checks


def _table(figures: list[Figures]) -> str:
    heads: tuple[str, ...] = (
        "link",
        "stated",
        "there",
        "back",
        "both there",
        "both back",
        "relay CPU",
        "stated",
        "64 B trip",
        "p99",
    )
    heads = (*heads, "stated", "1 MiB there", "back")
    lines = [
        f"{'':<11}{'Mbit/s':>10}{'':>48}{'cores':>10}{'ms':>10}{'':>20}{'ms':>10}",
        f"{heads[0]:<11}" + "".join(f"{head:>{12 if 'MiB' in head or 'both' in head else 10}}" for head in heads[1:]),
    ]
    for one in figures:
        rates = [one.median(f"{what}_bit_per_s") / 1e6 for what in ("there", "back", "both_there", "both_back")]
        rate = one.rate_bit_per_s
        message_s = one.round_trip_s / 2 + MESSAGE_NBYTES * 8 / rate if rate else None
        lines.append(
            f"{one.link:<11}{f'{rate / 1e6:.0f}' if rate else '-':>10}"
            f"{rates[0]:>10.1f}{rates[1]:>10.1f}{rates[2]:>12.1f}{rates[3]:>12.1f}"
            f"{'-' if one.link == DIRECT.name else format(one.median('relay_cpu_cores'), '.2f'):>10}"
            f"{one.round_trip_s * 1e3:>10.3f}{one.median('round_trip_median_s') * 1e3:>10.3f}"
            f"{one.median('round_trip_p99_s') * 1e3:>10.3f}"
            f"{'-' if message_s is None else format(message_s * 1e3, '.2f'):>10}"
            f"{one.median('message_there_s') * 1e3:>12.2f}{one.median('message_back_s') * 1e3:>10.2f}"
        )
    return "\n".join(lines)


# ---- beside the kernel's own limit -----------------------------------------------------------------------------------


KERNEL_RATES = {"1g": 1e9, "100m": 100e6}
_GOODPUT = (1500 - 52) / (1500 + 14)  # of a frame: less the headers of IP and tcp with timestamps, and of Ethernet
_CLONE_NEWNET = 0x40000000
HOSTS = "10.77.0.1", "10.77.0.2"


@contextmanager
def in_namespace(name: str | None) -> Iterator[None]:
    """What this thread opens meanwhile belongs to that network namespace, and stays there."""
    if name is None:
        yield
        return
    with open("/proc/thread-self/ns/net") as ours, open(f"/run/netns/{name}") as theirs:
        _enter(theirs.fileno())
        try:
            yield
        finally:
            _enter(ours.fileno())


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns: " + os.strerror(ctypes.get_errno()))


def _command(*words: str) -> None:
    """Raises OSError with what it said if it failed."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")


@contextmanager
def namespaces(rate_bit_per_s: float | None) -> Iterator[tuple[str, str]]:
    """Two of them, joined by devices that are limited to that rate, if any. Their names, which nobody else can have."""
    names = f"fastsplit-bench-{os.getpid()}-a", f"fastsplit-bench-{os.getpid()}-b"
    devices = "link-a", "link-b"
    with ExitStack() as stack:
        for name in names:
            _command("ip", "netns", "add", name)
            stack.callback(_command, "ip", "netns", "delete", name)
        first, second = ("type", "veth", "peer", "name", devices[1], "netns", names[1]), names[0]
        _command("ip", "-n", second, "link", "add", devices[0], *first)
        for name, device, host in zip(names, devices, HOSTS):
            _command("ip", "-n", name, "address", "add", f"{host}/24", "dev", device)
            _command("ip", "-n", name, "link", "set", device, "up")
            if rate_bit_per_s is None:
                continue
            limit = ("rate", f"{rate_bit_per_s:.0f}bit", "burst", "128kb", "latency", "20ms")
            _command("tc", "-n", name, "qdisc", "add", "dev", device, "root", "tbf", *limit)
        yield names


def _why_no_delay() -> str | None:
    """Whether the kernel could delay too (netem). It is tried on a namespace's own loopback."""
    name = f"fastsplit-bench-{os.getpid()}-d"
    try:
        _command("ip", "netns", "add", name)
        try:
            _command("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "2ms")
        finally:
            _command("ip", "netns", "delete", name)
    except OSError as error:
        return str(error)
    return None


def _measure_kernel(rounds: int) -> dict[str, Any]:
    """By link: the figures through the kernel's limit. Or why there are none."""
    if os.geteuid():
        return {"skipped": "network namespaces need root"}
    result: dict[str, Any] = {"goodput": _GOODPUT, "netem": _why_no_delay() or "there is one", "links": []}
    for link, rate in KERNEL_RATES.items():
        progress(f"namespaces: {link}")
        try:
            with ExitStack() as stack:
                here, there = stack.enter_context(namespaces(rate))
                arguments = ("--peer", HOSTS[1], "--namespace", there)
                peer = stack.enter_context(process("benches.bench_link", *arguments))
                host, port = peer.ready.split()
                with in_namespace(here):
                    sock = stack.enter_context(_connect(host, int(port)))
                measured = Measured(LinkKind(link, rate, 0), sock, None)
                for _ in range(rounds):
                    measured.run_throughput()
                    measured.run_round_trips()
        except (OSError, RuntimeError) as error:
            return {"skipped": str(error)}
        result["links"].append(asdict(measured.figures))
    return result


def _kernel_table(kernel: dict[str, Any], figures: list[Figures]) -> str:
    if "skipped" in kernel:
        return f"namespaces: skipped: {kernel['skipped']}"
    ours = {one.link: one for one in figures}
    lines = [f"{'Mbit/s':<24}{'there':>10}{'back':>10}{'both there':>12}{'both back':>12}{'of the rate':>13}"]
    for one in itertools.starmap(Figures, (link.values() for link in kernel["links"])):
        lines.append(_kernel_row(f"{one.link}, kernel", one))
        if one.link in ours:
            lines.append(_kernel_row(f"{one.link}, relay", ours[one.link]))
    lines.append(f"The kernel's limit counts headers: {kernel['goodput']:.4f} of the rate is left for the connection.")
    lines.append(f"No delay there: netem: {kernel['netem']}")
    return "\n".join(lines)


def _kernel_row(name: str, one: Figures) -> str:
    rates = [one.median(f"{what}_bit_per_s") for what in ("there", "back", "both_there", "both_back")]
    cells = "".join(f"{rate / 1e6:>{width}.1f}" for rate, width in zip(rates, (10, 10, 12, 12)))
    return f"{name:<24}{cells}{min(rates) / one.rate_bit_per_s:>13.4f}"


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    kinds = {kind.name: kind for kind in (DIRECT, UNLIMITED, *(kind for kind in LINKS.values() if kind.rate_bit_per_s))}
    parser = argparse.ArgumentParser(prog="python -m benches.bench_link", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=kinds, default=list(kinds), metavar="LINK", help=", ".join(kinds))
    parser.add_argument("--namespaces", action="store_true", help="also beside the kernel's own limit; needs root")
    add_output(parser, "link.json", parts=True)
    parser.add_argument("--peer", metavar="HOST", help="be the other end, until stdin ends")
    parser.add_argument("--namespace", metavar="NAME", help="with --peer: the network namespace to listen in")
    args = parser.parse_args(argv)
    keep_whole(parser, args, ("only",), [args.output])
    if args.peer:
        _serve_peer(args.peer, args.namespace)
        return 0
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    result: dict[str, Any] = {"environment": describe(["python", "-m", "benches.bench_link", *argv])}
    figures, result["others_cpu_s"] = _measure_links([kinds[name] for name in args.only], args.rounds)
    result["links"] = [asdict(one) for one in figures]
    print(_table(figures))
    checks = _checks(figures)
    result["checks"] = [{**asdict(check), "reached": check.reached} for check in checks]
    missed = [check for check in checks if not check.reached]
    print(f"{len(checks) - len(missed)} of {len(checks)} figures are as stated.", *missed, sep="\nNOT reached: ")
    if any(one.relay_goes_first is False for one in figures):
        print("The relay may not run before other programs (SCHED_RR): where the CPUs are all busy it is late.")
    if result["others_cpu_s"] is not None:
        print(f"Other programs used {result['others_cpu_s']:.1f} s of CPU meanwhile.")
    if args.namespaces:
        result["kernel"] = _measure_kernel(args.rounds)
        print(_kernel_table(result["kernel"], figures))
    result["environment"]["load_average_after"] = os.getloadavg()
    result["parameters"] = {"rounds": args.rounds, "link_s": LINK_S, "unlimited_nbytes": UNLIMITED_NBYTES}
    print(save(result, args.output))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
