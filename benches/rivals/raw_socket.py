"""The floor: how fast one process sends bytes to another, with sendall and recv_into and nothing else.

Rules. One way: the receiver says once, at the end, that it has everything, and the clock stops there. Short reads are
counted, not ignored. Both ends go round the same buffers, so no memory is made while the clock runs; by default they
are too many for a cache, as tensors are, and on huge pages where the kernel has them, as fastsplit's are.
"""

from __future__ import annotations

import mmap
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter_ns
from typing import Any

__all__ = ["FEW_MESSAGES", "one_way_bytes_per_s"]

_MESSAGE_NBYTES = 8 * 1024**2
_BUFFERS = 16
_COUNTS = (32, 256)  # messages before the clock runs, and while it does
FEW_MESSAGES: dict[str, Any] = {"counts": (8, 48)}
"""Of `one_way_bytes_per_s`: a quick look, to a tenth or two."""

# Run by a bare interpreter: it starts at once, and has no threads that could be in the way.
_RECEIVER = """
import mmap, socket, sys
kind, address, nbytes, buffers, *counts = sys.argv[1:]
if kind == "unix":
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address)
else:
    sock = socket.create_connection(("127.0.0.1", int(address)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
buffers = [memoryview(mmap.mmap(-1, int(nbytes), anonymous)) for _ in range(int(buffers))]
for buffer in buffers:
    buffer.obj.madvise(mmap.MADV_HUGEPAGE)
for count in counts:
    for number in range(int(count)):
        buffer = buffers[number % len(buffers)]
        filled = 0
        while filled < len(buffer):
            received = sock.recv_into(buffer[filled:])
            if not received:
                sys.exit("the sender left")
            filled += received
    sock.sendall(b"!")
"""


def _buffer(nbytes: int) -> memoryview:
    buffer = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    buffer.write(bytes(nbytes))  # a page that nobody wrote is the kernel's one page of zeros, which stays in the cache
    return memoryview(buffer)


def one_way_bytes_per_s(
    kind: str,
    *,
    message_nbytes: int = _MESSAGE_NBYTES,
    buffers: int = _BUFFERS,
    counts: tuple[int, int] = _COUNTS,
) -> float:
    """The rate over a "unix" or "tcp" (loopback) socket to another process, each end with `buffers` in turn."""
    with tempfile.TemporaryDirectory(prefix="fastsplit-bench-") as directory:
        if kind == "unix":
            address = str(Path(directory) / "raw.sock")
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(address)
            listener.listen(1)
        else:
            listener = socket.create_server(("127.0.0.1", 0))
            address = str(listener.getsockname()[1])
        arguments = [kind, address, str(message_nbytes), str(buffers), *map(str, counts)]
        with listener, subprocess.Popen([sys.executable, "-c", _RECEIVER, *arguments]):
            listener.settimeout(30)
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(None)
                if kind == "tcp":
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                messages = [_buffer(message_nbytes) for _ in range(buffers)]
                elapsed_ns = 0
                for count in counts:
                    started_ns = perf_counter_ns()
                    for number in range(count):
                        sock.sendall(messages[number % buffers])
                    if not sock.recv(1):
                        raise ConnectionError("the receiver left before it had everything")
                    elapsed_ns = perf_counter_ns() - started_ns
    return counts[-1] * message_nbytes / (elapsed_ns * 1e-9)
