"""Transports: a message there and one of the same size back, and many one way; by fastsplit and what one uses instead.

A module has the two ends of each of its contestants; pair.py joins them, peer.py is the process with the other end.

Rules. Each runs at its best, or as it is commonly written where that is something else, and its module says which and
how. Round trips: the message lies where the transport likes it best, in shared memory if it has any, and the answer is
of the same size; memory is made and mapped before the clock runs, and nobody looks at the bytes. One way: every message
comes out of ordinary memory, the same for all transports, so that who shares memory copies into it, and has arrived
when the other end has it as an array or a tensor; the clock stops when the sender knows that all have.

"spinning" is a loop that asks again and again, "sleeping" waits in the kernel; who has only one of the two is measured
in that one. The other end serves when it is told to, and sleeps otherwise, so that nobody spins beside another's
measurement.

That the bytes are really there is seen outside of the timed part. Round trip: the client sends a message of its own
making, the peer adds one to each byte of what it received, and exactly that must come back. One way: the peer counts
the messages and says the checksum of the last.
"""

from __future__ import annotations

import importlib
import itertools
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "LINKS",
    "TRANSPORTS",
    "Bytes",
    "Client",
    "Peer",
    "Run",
    "Transport",
    "bytes_of",
    "load",
    "poll_of",
    "waiting",
]

LINKS = ("shm", "unix", "tcp")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Run:
    """What both ends do next: `count` messages of `nbytes`, there and back or `one_way`; with `mark` the bytes are
    looked at, and a round trip is a single one."""

    nbytes: int
    count: int
    spinning: bool
    one_way: bool = False
    mark: bool = False
    place: str = ""
    """What the client's `prepare` said."""


class Peer:
    """The other end. Made in a process of its own; `directory` is its own, too."""

    address: str
    """What the client needs to find it."""
    taken: int = 0
    """How many messages of a one-way run have come; set to 0 before each run."""
    last: Any = None
    """The last of them, an array or a tensor, until the next run."""

    def __init__(self, directory: Path, link: str) -> None:
        raise NotImplementedError

    def prepare(self, run: Run) -> None:
        """What the run needs that takes time. The client is there already."""

    def serve(self, run: Run) -> None:
        """Answers `run.count` times. If `run.mark`, adds one to each byte of the message before it answers.

        Nothing to do where servers answer on threads of their own, as in `take`; idle they sleep."""

    def take(self, run: Run) -> None:
        """Receives `run.count` messages, and tells the client when it has all."""

    def close(self) -> None:
        """Leaves nothing behind."""


class PipePeer(Peer):
    """With an end of a multiprocessing Pipe: a Connection over a connected unix socket, as a Pipe's are over a pair."""

    def __init__(self, directory: Path, link: str) -> None:
        self.address = str(directory / "pipe.sock")
        self._listener = Listener(self.address, "AF_UNIX")
        self._pipe: Any = None

    def prepare(self, run: Run) -> None:
        if self._pipe is None:
            self._pipe = self._listener.accept()

    def close(self) -> None:
        self._listener.close()
        if self._pipe is not None:
            self._pipe.close()


class Client:
    """The asking end."""

    modes: tuple[str, ...] = ("spinning", "sleeping")
    has_one_way: bool = True
    is_latency: bool = True
    """Whether what a round trip took is how long it was under way; else what it added to others."""
    checks_itself: bool = False
    """Whether `push` looks at what came, since no peer has it."""
    most_nbytes: int = 1 << 40
    how: str = "best"
    """"best", "common" (as it is commonly written), or "floor"."""
    copies: str
    """Copies of a round trip's message on its way there, not the kernel's; if other, of one from ordinary memory."""
    writable: str = "yes"
    """Whether who receives may write into what it got, without a copy: "yes" or why not."""
    safe: str
    """Whether a hostile peer can do no more than send wrong numbers. "yes": all that it says is checked, also against
    limits; "partly": none of its code runs and nothing is overwritten, but for what stands behind it; "no": why."""

    def __init__(self, address: str) -> None:
        raise NotImplementedError

    def prepare(self, nbytes: int) -> str:
        """Makes a message of `nbytes`, and what it takes to send it; returns what the peer must know of it."""
        return ""

    def trip(self, run: Run) -> Callable[[], object]:
        """What makes one round trip each time it is called, up to `run.count` times."""
        raise NotImplementedError

    def trips(self, run: Run) -> list[float]:
        """`run.count` round trips; what each of them took, in ns."""
        trip, clock = self.trip(run), time.perf_counter_ns
        times_ns = [clock()]
        for _ in range(run.count):
            trip()
            times_ns.append(clock())
        return [after - before for before, after in itertools.pairwise(times_ns)]

    def marked(self, run: Run, message: Bytes) -> Bytes:
        """One round trip of `message` to a peer that marks; returns a copy of what came back."""
        raise NotImplementedError

    def push(self, run: Run, message: Bytes) -> None:
        """Sends `message` `run.count` times, and returns when the peer has said that it has all."""
        raise NotImplementedError

    def release(self, nbytes: int) -> None:
        """Gives back what `prepare` made."""

    def close(self) -> None:
        """Leaves nothing behind. The peer has ended by now, perhaps by being killed."""


class KeepingClient(Client):
    """With one message of each size, float32 in ordinary memory that was written to, and the last reply."""

    def __init__(self, address: str) -> None:
        self._messages: dict[int, Any] = {}
        self._reply: Any = None

    def prepare(self, nbytes: int) -> str:
        self._messages[nbytes] = np.ones(nbytes // 4, np.float32)
        return ""

    def release(self, nbytes: int) -> None:
        self._reply = None
        del self._messages[nbytes]

    def close(self) -> None:
        self._reply = None
        self._messages.clear()


@dataclass(frozen=True)
class Transport:
    """One way to move messages over one kind of link; `prefix`: what its two classes' names begin with."""

    link: str
    label: str
    module: str
    prefix: str


_CONTESTANTS = (
    ("shm unix tcp", "fastsplit", "fastsplit_calls", "Torch"),
    ("shm unix tcp", "fastsplit, numpy", "fastsplit_calls", "Numpy"),
    ("shm unix tcp", "fastsplit, Python core", "fastsplit_calls", "PythonCore"),
    ("shm unix tcp", "fastsplit, numpy, Python core", "fastsplit_calls", "NumpyPythonCore"),
    ("shm", "fastsplit, new tensors", "fastsplit_calls", "NewTensors"),
    ("shm unix tcp", "fastsplit, pipelined", "fastsplit_calls", "Pipelined"),
    ("shm unix tcp", "fastsplit, asyncio", "fastsplit_calls", "Asyncio"),
    ("shm", "iceoryx2", "iceoryx", "Bare"),
    ("shm", "iceoryx2, torch tensors", "iceoryx", "Torch"),
    ("shm", "shared_memory + flag", "shared_block", "Flag"),
    ("shm", "shared_memory + Pipe", "shared_block", "Pipe"),
    ("shm", "shared_memory + Pipe, copies", "shared_block", "CopyPipe"),
    ("shm", "torch Pipe, file_system", "torch_tensors", "FileSystem"),
    ("shm", "torch Pipe, file_descriptor", "torch_tensors", "FileDescriptor"),
    ("shm", "torch Queue", "torch_tensors", "Queue"),
    ("shm", "memcpy", "memory", "Memory"),
    ("unix tcp", "zmq, tuned", "zmq_sockets", "Tuned"),
    ("unix tcp", "zmq, as the original", "zmq_sockets", "Original"),
    ("unix tcp", "gRPC, one stream", "grpc_calls", "Stream"),
    ("unix tcp", "gRPC, unary protobuf", "grpc_calls", "Unary"),
    ("unix tcp", "Arrow Flight", "arrow_flight", "Flight"),
    ("unix", "multiprocessing Pipe", "pipes", "Pipe"),
    ("unix", "raw socket, 2 MiB buffer", "raw_socket", "LargeBuffer"),
    ("tcp", "torch gloo", "gloo", "Gloo"),
    ("unix tcp", "raw socket", "raw_socket", "Raw"),
)
TRANSPORTS = {
    f"{link}: {label}": Transport(link, label, module, prefix)
    for link in LINKS
    for links, label, module, prefix in _CONTESTANTS
    if link in links.split()
}
"""By name, "LINK: LABEL"."""


def load(name: str, end: str) -> Any:
    """The class of one end, "Peer" or "Client". Raises ImportError where what it needs is not installed."""
    transport = TRANSPORTS[name]
    return getattr(importlib.import_module(f"{__name__}.{transport.module}"), transport.prefix + end)


def poll_of(end: Any) -> Callable[[int], Any]:
    """The poll of a socket or a Connection, without the selector that `Connection.poll` makes each time."""
    poll = select.poll()
    poll.register(end.fileno(), select.POLLIN)
    return poll.poll


def waiting(receive: Callable[[], Any], end: Any, spinning: bool) -> Callable[[], Any]:
    """`receive`, behind a poll that does not wait if it is to spin."""
    if not spinning:
        return receive
    poll = poll_of(end)

    def spin() -> Any:
        while not poll(0):
            pass
        return receive()

    return spin


def bytes_of(array: Any) -> Bytes:
    """The memory of a torch tensor or a numpy array."""
    if not isinstance(array, np.ndarray):
        array = array.numpy()
    flat: Bytes = array.reshape(-1).view(np.uint8)
    return flat
