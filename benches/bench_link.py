"""Does the relay of link.py keep to what it states? Figures that were measured through it count only if it does.

    python -m benches.bench_link                    about 2 minutes
    python -m benches.bench_link --only 1g 100m

Raw sockets, the other end a process of its own, through each link of LINKS, through a relay without limit or delay, and
with no relay at all ("direct").

Throughput: a second of the stated rate, there, back, and both at a time; counted where it arrives, from the first bytes
to the last. Stated: the rate, 5 % less or more. Without a rate it says how fast a program can be before the relay is
what is measured. Round trips: 64 bytes there and back. Stated: the round trip and twice the time of 64 bytes at that
rate, 0.5 ms less or more; it includes the time that two processes need to wake each other, which "direct" shows.

Links take turns in every round, in changing order; a figure is the median of the rounds. "relay CPU" is what the relay
took of one core during "both". The exit code is 1 if a stated figure was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from benches.environment import add_output, describe, keep_whole, save
from benches.link import LINKS, LinkKind, relay_arguments
from benches.processes import OthersCpu, process
from benches.rounds import Columns, interleaved, table

__all__ = ["main"]

DIRECT = LinkKind("direct", 0, 0)
KINDS = {kind.name: kind for kind in (DIRECT, LinkKind("unlimited", 0, 0), *LINKS.values()) if kind.name != "loopback"}
LINK_S = 1.0
UNLIMITED_NBYTES = 2 * 1024**3  # what counts as a second of no limit
ROUND_TRIP_NBYTES = 64
ROUND_TRIPS_S, MOST_ROUND_TRIPS, FEWEST_ROUND_TRIPS = 0.5, 1000, 50
RATE_TOLERANCE, DELAY_TOLERANCE_S = 0.05, 0.5e-3
_RATES = ("there_bit_per_s", "back_bit_per_s", "both_there_bit_per_s", "both_back_bit_per_s")

_BLOCK_NBYTES = 1024**2
_JOB = struct.Struct("<QQ")  # which, and how many bytes
_TAKE, _SEND, _BOTH, _ECHO = range(4)
_RATE = struct.Struct("<d")  # bytes a second from the first bytes, which are not counted, to the last


# ---- both ends -------------------------------------------------------------------------------------------------------


def _send(sock: socket.socket, nbytes: int) -> None:
    block = memoryview(bytes(min(nbytes, _BLOCK_NBYTES)))
    with contextlib.suppress(OSError):  # the end that receives says it
        while nbytes:
            sock.sendall(block[:nbytes])
            nbytes -= min(nbytes, len(block))


def _receive(sock: socket.socket, nbytes: int) -> float:
    """The `_RATE`."""
    block = memoryview(bytearray(min(nbytes, _BLOCK_NBYTES)))
    left, first_at, counted = nbytes, 0.0, 0
    while left:
        received = sock.recv_into(block[: min(left, len(block))])
        if not received:
            raise ConnectionError(f"the stream ended {left} bytes early, of {nbytes}")
        left -= received
        if not first_at:
            first_at, counted = time.monotonic(), nbytes - received
    return counted / max(time.monotonic() - first_at, 1e-9)


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    received = sock.recv(nbytes, socket.MSG_WAITALL)
    if len(received) < nbytes:
        raise ConnectionError(f"{len(received)} bytes, expected {nbytes}")
    return received


@contextlib.contextmanager
def _sending(sock: socket.socket, nbytes: int) -> Iterator[None]:
    """Sends bytes meanwhile."""
    thread = threading.Thread(target=_send, args=(sock, nbytes), daemon=True)
    thread.start()
    yield
    thread.join()


def _serve_peer() -> None:
    """The other end, until stdin ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    print(f"READY {listener.getsockname()[1]}", flush=True)
    sys.stdin.read()


def _accept(listener: socket.socket) -> None:
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_serve_one, args=(sock,), daemon=True).start()


def _serve_one(sock: socket.socket) -> None:
    with sock, contextlib.suppress(ConnectionError):
        while True:
            job, nbytes = _JOB.unpack(_exactly(sock, _JOB.size))
            if job == _ECHO:
                sock.sendall(_exactly(sock, nbytes))
            elif job == _SEND:
                _send(sock, nbytes)
            else:
                with _sending(sock, nbytes) if job == _BOTH else contextlib.nullcontext():
                    rate = _receive(sock, nbytes)
                sock.sendall(_RATE.pack(rate))


# ---- one link --------------------------------------------------------------------------------------------------------


class Measured:
    """A link, a connection through it, and its figures by round."""

    def __init__(self, kind: LinkKind, sock: socket.socket, relay_pid: int | None) -> None:
        self.kind = kind
        self.figures: dict[str, list[float]] = {}
        self._sock, self._relay_pid = sock, relay_pid
        self._nbytes = int(kind.rate_bit_per_s / 8 * LINK_S) or UNLIMITED_NBYTES
        few = int(ROUND_TRIPS_S / kind.round_trip_s) if kind.round_trip_s else MOST_ROUND_TRIPS
        self._round_trips = min(max(few, FEWEST_ROUND_TRIPS), MOST_ROUND_TRIPS)

    def medians(self) -> dict[str, Any]:
        about = {"link": self.kind.name, "rate_bit_per_s": self.kind.rate_bit_per_s}
        about["round_trip_s"] = self.kind.round_trip_s
        return about | {name: statistics.median(rounds) for name, rounds in self.figures.items()}

    def _add(self, **figures: float) -> None:
        for name, figure in figures.items():
            self.figures.setdefault(name, []).append(figure)

    def warm_up(self) -> None:
        self._sock.sendall(_JOB.pack(_TAKE, _BLOCK_NBYTES))
        _send(self._sock, _BLOCK_NBYTES)
        self._peer_rate()

    def run(self) -> None:
        self._run_throughput()
        self._run_round_trips()

    def _run_throughput(self) -> None:
        self._sock.sendall(_JOB.pack(_TAKE, self._nbytes))
        _send(self._sock, self._nbytes)
        self._add(there_bit_per_s=self._peer_rate() * 8)
        self._sock.sendall(_JOB.pack(_SEND, self._nbytes))
        self._add(back_bit_per_s=_receive(self._sock, self._nbytes) * 8)
        cpu_s, began_at = self._relay_cpu_s(), time.monotonic()
        self._sock.sendall(_JOB.pack(_BOTH, self._nbytes))
        with _sending(self._sock, self._nbytes):
            back = _receive(self._sock, self._nbytes)
        self._add(both_back_bit_per_s=back * 8, both_there_bit_per_s=self._peer_rate() * 8)
        self._add(relay_cpu_cores=(self._relay_cpu_s() - cpu_s) / (time.monotonic() - began_at))

    def _run_round_trips(self) -> None:
        nbytes = ROUND_TRIP_NBYTES - _JOB.size
        taken_s = []
        for _ in range(self._round_trips):
            began_at = time.monotonic()
            self._sock.sendall(_JOB.pack(_ECHO, nbytes) + bytes(nbytes))
            _exactly(self._sock, nbytes)
            taken_s.append(time.monotonic() - began_at)
        p99_s = sorted(taken_s)[int(len(taken_s) * 0.99)]
        self._add(round_trip_median_s=statistics.median(taken_s), round_trip_p99_s=p99_s)

    def _peer_rate(self) -> float:
        (rate,) = _RATE.unpack(_exactly(self._sock, _RATE.size))
        return float(rate)

    def _relay_cpu_s(self) -> float:
        """By the clock of another process's CPU time (clock_getcpuclockid)."""
        return 0.0 if self._relay_pid is None else time.clock_gettime((~self._relay_pid << 3) | 2)


def _measure_links(kinds: list[LinkKind], rounds: int) -> tuple[list[dict[str, Any]], float | None]:
    with ExitStack() as stack:
        peer = stack.enter_context(process("benches.bench_link", "--peer"))
        pids, links = [os.getpid(), peer.pid], []
        for kind in kinds:
            relay_pid, port = None, peer.ready
            if kind is not DIRECT:
                arguments = relay_arguments(f"tcp://127.0.0.1:{port}", kind.rate_bit_per_s, kind.delay_s)
                relay = stack.enter_context(process("benches.link", *arguments))
                relay_pid, port = relay.pid, relay.ready.rpartition(":")[2]
                pids.append(relay.pid)
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", int(port))))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            links.append(Measured(kind, sock, relay_pid))
        for link in links:  # their windows are open then
            link.warm_up()
        others = OthersCpu(*pids)
        for link in interleaved([links], rounds, "links"):
            link.run()
        return [link.medians() for link in links], others.seconds()


# ---- what was stated -------------------------------------------------------------------------------------------------


def _check(link: str, what: str, measured: float, stated: float, tolerance: float) -> dict[str, Any]:
    check = {"link": link, "what": what, "measured": measured, "stated": stated, "tolerance": tolerance}
    return {**check, "reached": abs(measured - stated) <= tolerance}


def _checks(links: list[dict[str, Any]]) -> list[dict[str, Any]]:
    checks = []
    for one in (link for link in links if link["link"] != DIRECT.name):
        name, rate, trip_s = one["link"], one["rate_bit_per_s"], one["round_trip_s"]
        sent_s = 2 * ROUND_TRIP_NBYTES * 8 / rate if rate else 0.0
        what = "round_trip_median_s"
        checks.append(_check(name, what, one[what], trip_s + sent_s, DELAY_TOLERANCE_S))
        checks += [_check(name, what, one[what], rate, RATE_TOLERANCE * rate) for what in _RATES if rate]
    return checks


_COLUMNS: Columns = (
    ("Mbit/s", 9, lambda m: f"{m['rate_bit_per_s'] / 1e6:.0f}"),
    *((what.removesuffix("_bit_per_s"), 12, lambda m, what=what: f"{m[what] / 1e6:.1f}") for what in _RATES),
    ("relay CPU", 11, lambda m: f"{m['relay_cpu_cores']:.2f}"),
    ("trip, ms", 10, lambda m: f"{m['round_trip_s'] * 1e3:.3f}"),
    ("64 B", 9, lambda m: f"{m['round_trip_median_s'] * 1e3:.3f}"),
    ("p99", 9, lambda m: f"{m['round_trip_p99_s'] * 1e3:.3f}"),
)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benches.bench_link", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="LINK", help=", ".join(KINDS))
    parser.add_argument("--peer", action="store_true", help="be the other end, until stdin ends")
    add_output(parser, "link.json")
    args = parser.parse_args(argv)
    keep_whole(parser, args, ("only",), [args.output])
    if args.peer:
        _serve_peer()
        return 0
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    environment = describe(["python", "-m", "benches.bench_link", *argv])
    links, others_cpu_s = _measure_links([KINDS[name] for name in args.only], args.rounds)
    print(table("link", _COLUMNS, {link["link"]: link for link in links}, {}))
    checks = _checks(links)
    missed = [check for check in checks if not check["reached"]]
    print(f"{len(checks) - len(missed)} of {len(checks)} figures are as stated.", *missed, sep="\nNOT reached: ")
    print(f"Other programs used {others_cpu_s} s of CPU meanwhile.")
    parameters = {"rounds": args.rounds, "link_s": LINK_S, "unlimited_nbytes": UNLIMITED_NBYTES}
    result = {"environment": environment, "parameters": parameters, "others_cpu_s": others_cpu_s}
    print(save({**result, "links": links, "checks": checks}, args.output))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
