"""The other end of bench_wire.py: a process that serves one system over one unix and one tcp socket.

    python -m benches.wire_peer raw|numpy|torch [--cpu N] [--sndbuf-nbytes N]

"raw" is the floor: sockets and nothing else. "numpy" and "torch" are a fastsplit server with arrays of that kind.
Prints `READY {"unix": URI, "tcp": URI}` when both listen, and ends when its stdin does.

A raw connection begins with RAW_HEADER: which of the two jobs, and for the first how much will come.
    0  take `count` messages of `nbytes` each, then say how many bytes that were (8 bytes)
    1  send every `nbytes` back
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
import tempfile
import threading
from pathlib import Path

import fastsplit
from fastsplit.wire.call import Handler

__all__ = ["RAW_COUNT", "RAW_ECHO", "RAW_HEADER", "RAW_TAKE", "main", "receive_exactly"]

RAW_HEADER = struct.Struct("<QQQ")  # job, nbytes, count
RAW_COUNT = struct.Struct("<Q")
RAW_TAKE, RAW_ECHO = 0, 1


def receive_exactly(sock: socket.socket, buffer: memoryview) -> int:
    """Fills the buffer; returns how many bytes came, fewer only at the end of the stream."""
    filled = 0
    while filled < len(buffer):
        received = sock.recv_into(buffer[filled:])
        if not received:
            break
        filled += received
    return filled


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.wire_peer", description=__doc__.partition("\n")[0])
    parser.add_argument("system", choices=("raw", "numpy", "torch"))
    parser.add_argument("--cpu", type=int, help="the only CPU to run on")
    parser.add_argument(
        "--sndbuf-nbytes", type=int, default=0, help="SO_SNDBUF of raw unix sockets; 0: the kernel's own"
    )
    args = parser.parse_args(argv)
    if args.cpu is not None:
        os.sched_setaffinity(0, {args.cpu})  # before any thread starts: they inherit it
    with tempfile.TemporaryDirectory(prefix="fastsplit-bench-") as directory:
        path = Path(directory, "peer.sock")
        if args.system == "raw":
            uris = _serve_raw(path, args.sndbuf_nbytes)
        else:
            servers = [
                fastsplit.Server(uri, _Handlers().by_op(), arrays=args.system).start()
                for uri in (f"unix://{path}?shm=off", "tcp://127.0.0.1:0")
            ]
            uris = {server.uri.partition(":")[0]: server.uri for server in servers}
        print("READY", json.dumps(uris), flush=True)
        sys.stdin.read()
    return 0


# ---- fastsplit -------------------------------------------------------------------------------------------------------


class _Handlers:
    """One for each server. It has one client at a time, so that a plain count is enough."""

    def __init__(self) -> None:
        self._taken_nbytes = 0

    def by_op(self) -> dict[str, Handler]:
        return {
            "take": self._take,
            "taken": self._taken,
            "echo": lambda call: call.tensors,
            "nothing": lambda call: None,
        }

    def _take(self, call: fastsplit.Call) -> None:
        self._taken_nbytes += sum(tensor.nbytes for tensor in call.tensors)

    def _taken(self, call: fastsplit.Call) -> None:
        """Says how many bytes were taken since it was asked last."""
        call.reply_attrs["nbytes"] = self._taken_nbytes
        self._taken_nbytes = 0


# ---- raw sockets -----------------------------------------------------------------------------------------------------


def _serve_raw(path: Path, sndbuf_nbytes: int) -> dict[str, str]:
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(path))
    unix.listen()
    tcp = socket.create_server(("127.0.0.1", 0))
    for listener in (unix, tcp):
        threading.Thread(target=_accept, args=(listener, sndbuf_nbytes), daemon=True).start()
    return {"unix": f"unix://{path}", "tcp": f"tcp://127.0.0.1:{tcp.getsockname()[1]}"}


def _accept(listener: socket.socket, sndbuf_nbytes: int) -> None:
    while True:
        sock, _ = listener.accept()
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        elif sndbuf_nbytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf_nbytes)
        threading.Thread(target=_work, args=(sock,), daemon=True).start()


def _work(sock: socket.socket) -> None:
    with sock:
        header = bytearray(RAW_HEADER.size)
        if receive_exactly(sock, memoryview(header)) != len(header):
            return
        job, nbytes, count = RAW_HEADER.unpack(header)
        buffer = memoryview(bytearray(nbytes))  # one for all messages: its pages are there after the first
        if job == RAW_ECHO:
            while sock.recv_into(buffer) == nbytes:
                sock.sendall(buffer)
            return
        while True:
            taken_nbytes = sum(receive_exactly(sock, buffer) for _ in range(count))
            if not taken_nbytes:
                return
            sock.sendall(RAW_COUNT.pack(taken_nbytes))


if __name__ == "__main__":
    sys.exit(main())
