"""Whether MSG_ZEROCOPY pays for a large tensor: the same bytes sent with and without it, by raw sockets.

    python -m benches.bench_zerocopy
    python -m benches.bench_zerocopy --namespaces     as root: also between two network namespaces

How it is measured. 8 MiB messages out of one buffer, as a tensor is, to a process that only reads. With MSG_ZEROCOPY a
message is over when the kernel has said on the socket's error queue that it needs the memory no more, as a caller who
may change the tensor afterwards has to wait for; eight messages may be on their way. Rounds are interleaved. CPU: of
the sending thread, the time in system calls included. copied: how many of the completions say that the kernel copied
all the same, which it does wherever the receiver is on this machine: over loopback, and between namespaces (the
sender's pages must not be changed under a local receiver).

What it says. On one machine it can only lose: the copy is made anyway, and pinning pages and completions come on top. A
network card that gathers is needed to gain; this has not been measured with one. So fastsplit does not use it.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from .bench_link import HOSTS, in_namespace, namespaces
from .environment import add_output, describe, save
from .rounds import interleaved

_SO_ZEROCOPY, _MSG_ZEROCOPY = 60, 0x4000000
_CODE_COPIED = 1  # SO_EE_CODE_ZEROCOPY_COPIED
_ERROR = struct.Struct("=IBBBBII")  # struct sock_extended_err: errno, origin, type, code, pad, info, data
_MESSAGE_NBYTES = 8 * 1024**2
_MESSAGES = 64
_IN_FLIGHT = 8

_RECEIVER = """
import socket, sys
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
block = bytearray(1 << 20)
total = int(sys.argv[3])
while True:
    left = total
    while left:
        got = sock.recv_into(block, min(left, len(block)))
        if not got:
            sys.exit()
        left -= got
    sock.sendall(b"x")
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.bench_zerocopy", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--namespaces", action="store_true", help="also between two network namespaces; needs root")
    add_output(parser, "zerocopy.json")
    args = parser.parse_args(argv)
    results = []
    with _loopback() as sock:
        results.append({"path": "loopback", **_measure(sock, args.rounds)})
    if args.namespaces:
        with _between_namespaces() as sock:
            results.append({"path": "veth", **_measure(sock, args.rounds)})
    print(f"{'path':<10}{'':>10}{'GB/s':>8}{'CPU ms/GB':>11}{'completions':>13}{'copied':>8}")
    for result in results:
        for way in ("plain", "zerocopy"):
            row = result[way]
            print(
                f"{result['path']:<10}{way:>10}{row['bytes_per_s'] / 1e9:8.2f}{row['cpu_s_per_gb'] * 1e3:11.1f}"
                f"{row['completions']:13}{row['copied']:8}"
            )
    environment = describe(["python", "-m", "benches.bench_zerocopy", *(sys.argv[1:] if argv is None else argv)])
    print(save({"environment": environment, "results": results}, args.output))
    return 0


def _measure(sock: socket.socket, rounds: int) -> dict[str, Any]:
    sock.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
    data = memoryview(np.random.default_rng(1).bytes(_MESSAGE_NBYTES))
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "zerocopy": []}
    ways = {"plain": lambda: _send(sock, data, 0), "zerocopy": lambda: _send(sock, data, _MSG_ZEROCOPY)}
    for send in ways.values():
        send()  # warm
    for way in interleaved([list(ways)], rounds, "zerocopy"):
        found[way].append(ways[way]())
    return {
        way: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for way, rows in found.items()
    }


def _send(sock: socket.socket, data: memoryview, flags: int) -> dict[str, Any]:
    """All messages, until the receiver has them, and the kernel gave all memory back."""
    sent_calls = completed = copied = 0
    started_s, cpu_s = time.perf_counter(), time.thread_time()
    for _ in range(_MESSAGES):
        left = data
        while left:
            left = left[sock.send(left, flags) :]
            sent_calls += 1
            while flags and sent_calls - completed > _IN_FLIGHT:
                count, was_copied = _completions(sock)
                completed, copied = completed + count, copied + (count if was_copied else 0)
    while sock.recv(1) != b"x":
        pass
    while flags and completed < sent_calls:
        count, was_copied = _completions(sock)
        completed, copied = completed + count, copied + (count if was_copied else 0)
    elapsed_s, cpu_s = time.perf_counter() - started_s, time.thread_time() - cpu_s
    nbytes = len(data) * _MESSAGES
    return {
        "bytes_per_s": nbytes / elapsed_s,
        "cpu_s_per_gb": cpu_s / nbytes * 1e9,
        "completions": completed,
        "copied": copied,
    }


def _completions(sock: socket.socket) -> tuple[int, bool]:
    """How many sends the kernel is done with since it last said so, and whether it copied them after all."""
    try:
        _, ancillary, _, _ = sock.recvmsg(0, 128, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
    except BlockingIOError:
        time.sleep(0)
        return 0, False
    for _, _, payload in ancillary:
        _, _, _, code, _, first, last = _ERROR.unpack_from(payload)
        return last - first + 1, code == _CODE_COPIED
    return 0, False


@contextlib.contextmanager
def _loopback() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener, _receiving(listener, "127.0.0.1", []) as sock:
        yield sock


@contextlib.contextmanager
def _between_namespaces() -> Iterator[socket.socket]:
    with contextlib.ExitStack() as stack:
        here, there = stack.enter_context(namespaces(None))
        stack.enter_context(in_namespace(here))
        listener = stack.enter_context(socket.create_server((HOSTS[0], 0)))
        yield stack.enter_context(_receiving(listener, HOSTS[0], ["ip", "netns", "exec", there]))


@contextlib.contextmanager
def _receiving(listener: socket.socket, host: str, prefix: list[str]) -> Iterator[socket.socket]:
    total = str(_MESSAGE_NBYTES * _MESSAGES)
    command = [*prefix, sys.executable, "-c", _RECEIVER, host, str(listener.getsockname()[1]), total]
    receiver = subprocess.Popen(command)
    try:
        sock, _ = listener.accept()
        with sock:
            yield sock
    finally:
        receiver.wait(10)


if __name__ == "__main__":
    sys.exit(main())
