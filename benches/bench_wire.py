"""What the wire core costs beside a raw socket: one-way throughput, and round trips of tiny calls.

One way: `Channel.submit` with requests in flight, against `sendall` here and `recv_into` there, the receiver
filling one buffer over and over (fastsplit hands every message out as a tensor of its own). On unix sockets the raw
loop runs twice: with the kernel's default send buffer, as such a loop is commonly written, and with fastsplit's. Both
ends count bytes, and a wrong count ends the benchmark.

A message of fastsplit's is a call with a reply of its own; "16 x 64 KiB" sends sixteen tensors in each, for those who
have many small ones.

Round trips: a call that echoes a tensor of 64 bytes (numpy and torch arrays), and a call with no tensor, against 64
bytes echoed by a raw socket. Fastsplit's readers spin for 50 us before they sleep; "sleeping" is without that, as the
raw socket does it.

Both ends are processes of their own: first each on a core of its own, then wherever the scheduler puts them. Systems
take turns in every round, in changing order, and the result is the median of the rounds.

    python -m benches.bench_wire [--rounds 7] [--scale 1.0]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fastsplit
from benches.environment import describe, save
from benches.placement import on_cpu, separate_cpus
from benches.processes import process
from benches.rounds import interleaved
from benches.wire_peer import RAW_COUNT, RAW_ECHO, RAW_HEADER, RAW_TAKE, receive_exactly

LINKS = ("unix", "tcp")
SIZES = {"64 KiB": 64 * 1024, "8 MiB": 8 * 1024**2, "128 MiB": 128 * 1024**2}
BUNDLE = "16 x 64 KiB"
BUNDLE_TENSORS = 16
SPIN_US = {"numpy": 50, "torch": 50, "numpy, sleeping": 0, "torch, sleeping": 0}
ONE_WAY_NBYTES = 512 * 1024**2  # for each size, system and round
WINDOW = 32  # requests in flight
ROUND_TRIPS = 2000  # for each system and round
ECHO_NBYTES = 64


@dataclass
class Series:
    """One thing that is measured, by one system, over one link, in one placement."""

    placement: str
    what: str
    link: str
    system: str
    unit: str
    run: Callable[[], float]
    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


# ---- the other end -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _peer(system: str, cpu: int | None, sndbuf_nbytes: int = 0, spin_us: int = 0) -> Iterator[dict[str, str]]:
    """The URIs of a running peer."""
    options = ["--sndbuf-nbytes", str(sndbuf_nbytes)]
    if cpu is not None:
        options += ["--cpu", str(cpu)]
    environment = {"FASTSPLIT_SPIN_US": str(spin_us)}
    with process("benches.wire_peer", system, *options, environment=environment) as peer:
        yield json.loads(peer.ready)


def _connect_raw(uri: str, sndbuf_nbytes: int) -> socket.socket:
    scheme, _, place = uri.partition("://")
    if scheme == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(place)
        if sndbuf_nbytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf_nbytes)
        return sock
    host, _, port = place.rpartition(":")
    sock = socket.create_connection((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


# ---- one way ---------------------------------------------------------------------------------------------------------


def _raw_one_way(stack: ExitStack, uri: str, nbytes: int, count: int, sndbuf_nbytes: int) -> Callable[[], float]:
    sock = stack.enter_context(_connect_raw(uri, sndbuf_nbytes))
    message = np.random.default_rng(0).bytes(nbytes)
    answer = bytearray(RAW_COUNT.size)
    sock.sendall(RAW_HEADER.pack(RAW_TAKE, nbytes, count))

    def run() -> float:
        started_s = time.perf_counter()
        for _ in range(count):
            sock.sendall(message)
        receive_exactly(sock, memoryview(answer))
        elapsed_s = time.perf_counter() - started_s
        _check_count(RAW_COUNT.unpack(answer)[0], nbytes * count)
        return nbytes * count / elapsed_s / 1e9

    return run


def _fastsplit_one_way(channel: fastsplit.Channel, nbytes: int, count: int, tensors: int = 1) -> Callable[[], float]:
    """`count` messages of `nbytes`, each of as many tensors."""
    data = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    message = np.split(data, tensors)

    def run() -> float:
        sent_before = channel.stats.bytes_sent
        started_s = time.perf_counter()
        futures: list[fastsplit.Future] = []
        for index in range(count):
            futures.append(channel.submit("take", *message))
            if index >= WINDOW:
                futures[index - WINDOW].result()
        for future in futures[-WINDOW:]:
            future.result()
        elapsed_s = time.perf_counter() - started_s
        _check_count(channel.call("taken").attrs["nbytes"], nbytes * count)
        assert channel.stats.bytes_sent - sent_before > nbytes * count
        return nbytes * count / elapsed_s / 1e9

    return run


def _check_count(came_nbytes: int, expected_nbytes: int) -> None:
    if came_nbytes != expected_nbytes:
        raise SystemExit(f"the receiver has {came_nbytes} bytes, expected {expected_nbytes}")


# ---- round trips -----------------------------------------------------------------------------------------------------


def _raw_echo(stack: ExitStack, uri: str, count: int) -> Callable[[], float]:
    sock = stack.enter_context(_connect_raw(uri, 0))
    sock.sendall(RAW_HEADER.pack(RAW_ECHO, ECHO_NBYTES, 0))
    message, reply = os.urandom(ECHO_NBYTES), bytearray(ECHO_NBYTES)

    def run() -> float:
        reply[:] = bytes(ECHO_NBYTES)
        started_s = time.perf_counter()
        for _ in range(count):
            sock.sendall(message)
            if sock.recv_into(reply) != ECHO_NBYTES:
                raise SystemExit("a short read in the raw echo")
        elapsed_s = time.perf_counter() - started_s
        assert reply == message
        return elapsed_s / count * 1e6

    return run


def _fastsplit_echo(channel: fastsplit.Channel, count: int, arrays: str) -> Callable[[], float]:
    message: Any = np.random.default_rng(0).random(ECHO_NBYTES // 4, np.float32)
    if arrays == "torch":
        import torch

        message = torch.from_numpy(message)

    def run() -> float:
        started_s = time.perf_counter()
        for _ in range(count):
            (reply,) = channel.call("echo", message)
        elapsed_s = time.perf_counter() - started_s
        assert type(reply) is type(message) and bool((reply == message).all())
        return elapsed_s / count * 1e6

    return run


def _fastsplit_nothing(channel: fastsplit.Channel, count: int) -> Callable[[], float]:
    def run() -> float:
        started_s = time.perf_counter()
        for _ in range(count):
            channel.call("nothing")
        return (time.perf_counter() - started_s) / count * 1e6

    return run


# ---- all of it -------------------------------------------------------------------------------------------------------


def _measure(placement: str, cpus: tuple[int | None, int | None], args: argparse.Namespace) -> list[Series]:
    with on_cpu(cpus[0]), ExitStack() as stack:
        kinds = [kind for kind in SPIN_US if args.torch or "torch" not in kind]
        uris = {
            kind: stack.enter_context(_peer(kind.partition(",")[0], cpus[1], spin_us=SPIN_US[kind])) for kind in kinds
        }
        sndbuf_nbytes = _sndbuf_nbytes(uris["numpy"]["unix"])
        uris["raw"] = stack.enter_context(_peer("raw", cpus[1]))
        uris["raw, same buffer"] = stack.enter_context(_peer("raw", cpus[1], sndbuf_nbytes))
        series = []
        for link in LINKS:
            channels = {
                kind: stack.enter_context(
                    fastsplit.connect(uris[kind][link], arrays=kind.partition(",")[0], spin_us=SPIN_US[kind])
                )
                for kind in kinds
            }
            for name, nbytes in SIZES.items():
                count = max(int(ONE_WAY_NBYTES * args.scale) // nbytes, 2)
                # tcp sizes its own buffers, for fastsplit as for anybody
                raws = {"raw": 0, "raw, same buffer": sndbuf_nbytes} if link == "unix" else {"raw": 0}
                runs = {
                    system: _raw_one_way(stack, uris[system][link], nbytes, count, sndbuf)
                    for system, sndbuf in raws.items()
                }
                runs["fastsplit"] = _fastsplit_one_way(channels["numpy"], nbytes, count)
                series += [Series(placement, name, link, system, "GB/s", run) for system, run in runs.items()]
            small = SIZES["64 KiB"]
            count = max(int(ONE_WAY_NBYTES * args.scale) // (BUNDLE_TENSORS * small), 2)
            runs = {
                "raw": _raw_one_way(stack, uris["raw"][link], small, count * BUNDLE_TENSORS, 0),
                "fastsplit": _fastsplit_one_way(channels["numpy"], BUNDLE_TENSORS * small, count, BUNDLE_TENSORS),
            }
            series += [Series(placement, BUNDLE, link, system, "GB/s", run) for system, run in runs.items()]
            count = max(int(ROUND_TRIPS * args.scale), 10)
            runs = {"raw": _raw_echo(stack, uris["raw"][link], count)}
            for kind, channel in channels.items():
                runs[f"fastsplit, {kind}"] = _fastsplit_echo(channel, count, kind.partition(",")[0])
            runs["fastsplit, no tensor"] = _fastsplit_nothing(channels["numpy"], count)
            series += [Series(placement, "64 B echo", link, system, "us", run) for system, run in runs.items()]
        _run_rounds(series, args.rounds)
    return series


def _sndbuf_nbytes(uri: str) -> int:
    """The SO_SNDBUF to ask for in order to get what fastsplit's own sockets have."""
    with fastsplit.connect(uri) as channel:
        granted_nbytes = channel._connection.link._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return granted_nbytes // 2  # the kernel doubles what it is asked for


def _run_rounds(series: list[Series], rounds: int) -> None:
    groups: dict[tuple[str, str], list[Series]] = {}
    for one in series:
        groups.setdefault((one.link, one.what), []).append(one)
    for one in series:
        one.run()  # pages, caches, templates
    for one in interleaved(list(groups.values()), rounds, series[0].placement):
        one.rounds.append(one.run())


# ---- results ---------------------------------------------------------------------------------------------------------


def _table(series: list[Series]) -> str:
    columns = [*SIZES, BUNDLE, "64 B echo"]
    lines = []
    for placement in dict.fromkeys(one.placement for one in series):
        lines += ["", placement, f"  {'':<28}" + "".join(f"{what:>18}" for what in columns)]
        for link in LINKS:
            rows = [one for one in series if (one.placement, one.link) == (placement, link)]
            raw = {one.what: one for one in rows if one.system == "raw"}
            for system in dict.fromkeys(one.system for one in rows):
                cells = {one.what: _cell(one, raw[one.what]) for one in rows if one.system == system}
                lines.append(f"  {link + ' ' + system:<28}" + "".join(f"{cells.get(what, ''):>18}" for what in columns))
    return "\n".join([*lines, "", "One way in GB/s, round trips in us; in parentheses: times the raw socket's figure."])


def _cell(one: Series, raw: Series) -> str:
    figure = f"{one.median:.2f} {one.unit}" if one.unit == "GB/s" else f"{one.median:.1f} {one.unit}"
    return figure if one is raw else f"{figure} ({one.median / raw.median:.2f})"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benches.bench_wire", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="how much of the work to do in each round")
    parser.add_argument("--output", type=Path, help="where the JSON goes, if not into benches/results/")
    args = parser.parse_args(argv)
    args.torch = fastsplit.tensors.arrays().kind == "torch"
    result: dict[str, Any] = {"environment": describe(["python", "-m", "benches.bench_wire", *argv])}
    cpus = separate_cpus()
    series = []
    if cpus is not None:
        series += _measure(f"client on CPU {cpus[0]}, server on CPU {cpus[1]}", cpus, args)
    series += _measure("not pinned", (None, None), args)
    print(_table(series))
    result["environment"]["load_average_after"] = os.getloadavg()
    result["parameters"] = {"rounds": args.rounds, "scale": args.scale, "window": WINDOW}
    raw = {(one.placement, one.link, one.what): one.median for one in series if one.system == "raw"}
    result["series"] = [
        {
            "placement": one.placement,
            "what": one.what,
            "link": one.link,
            "system": one.system,
            "unit": one.unit,
            "median": one.median,
            "times_raw": one.median / raw[one.placement, one.link, one.what],
            "rounds": one.rounds,
        }
        for one in series
    ]
    print(save("wire", result, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
