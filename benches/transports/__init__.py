"""Transports: a message there and one of the same size back, and many one way; by fastsplit and what one uses instead.

    fastsplit_calls.py   fastsplit's own: one call at a time, many in flight, asyncio
    memory.py            a copy within one process: the floor of whoever moves bytes at all
    raw_socket.py        sendall and recv_into and nothing else: the floor of sockets
    iceoryx.py           iceoryx2, which copies nothing
    shared_block.py      multiprocessing.shared_memory, and a Pipe (or a bare flag) that says when
    pipes.py             multiprocessing.Pipe with the bytes in it
    torch_tensors.py     torch.multiprocessing: tensors in shared memory, through a Pipe or a Queue
    zmq_sockets.py       pyzmq, as the original system used it and tuned
    grpc_calls.py        gRPC: a call for each message, and one stream for all
    arrow_flight.py      Arrow Flight
    gloo.py              torch.distributed
    pair.py              both ends of one of them
    peer.py              the process with the other end

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
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["LINKS", "TRANSPORTS", "Bytes", "Client", "Peer", "Run", "Transport", "bytes_of", "load", "poll_of"]

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
        """Answers `run.count` times. If `run.mark`, adds one to each byte of the message before it answers."""
        raise NotImplementedError

    def take(self, run: Run) -> None:
        """Receives `run.count` messages, and tells the client when it has all."""
        raise NotImplementedError

    def close(self) -> None:
        """Leaves nothing behind."""


class Client:
    """The asking end."""

    modes: tuple[str, ...] = ("spinning", "sleeping")
    has_one_way: bool = True
    is_latency: bool = True
    """Whether what a round trip took is how long it was under way; else what it added to others."""
    checks_itself: bool = False
    """Whether `push` looks at what came, since no peer has it."""
    sizes_nbytes: tuple[int, ...] = ()
    """What it can send; empty for anything."""
    most_nbytes: int = 1 << 40
    note: str = ""
    """What else there is to say of how it works here."""

    how: str = "best"
    """"best", "common" (as it is commonly written), or "floor"."""
    copies: str
    """Copies of a round trip's message on its way there, not the kernel's; if other, of one from ordinary memory."""
    writable: str
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


@dataclass(frozen=True)
class Transport:
    """One way to move messages over one kind of link; `prefix`: what its two classes' names begin with."""

    link: str
    label: str
    module: str
    prefix: str

    @property
    def name(self) -> str:
        return f"{self.link}: {self.label}"


def _transports() -> dict[str, Transport]:
    found = [
        Transport("shm", "fastsplit", "fastsplit_calls", "Torch"),
        Transport("shm", "fastsplit, numpy", "fastsplit_calls", "Numpy"),
        Transport("shm", "fastsplit, new tensors", "fastsplit_calls", "NewTensors"),
        Transport("shm", "fastsplit, pipelined", "fastsplit_calls", "Pipelined"),
        Transport("shm", "fastsplit, asyncio", "fastsplit_calls", "Asyncio"),
        Transport("shm", "iceoryx2", "iceoryx", "Bare"),
        Transport("shm", "iceoryx2, torch tensors", "iceoryx", "Torch"),
        Transport("shm", "shared_memory + flag", "shared_block", "Flag"),
        Transport("shm", "shared_memory + Pipe", "shared_block", "Pipe"),
        Transport("shm", "shared_memory + Pipe, copies", "shared_block", "CopyPipe"),
        Transport("shm", "torch Pipe, file_system", "torch_tensors", "FileSystem"),
        Transport("shm", "torch Pipe, file_descriptor", "torch_tensors", "FileDescriptor"),
        Transport("shm", "torch Queue", "torch_tensors", "Queue"),
        Transport("shm", "memcpy", "memory", "Memory"),
    ]
    for link in ("unix", "tcp"):
        found += [
            Transport(link, "fastsplit", "fastsplit_calls", "Torch"),
            Transport(link, "fastsplit, numpy", "fastsplit_calls", "Numpy"),
            Transport(link, "fastsplit, pipelined", "fastsplit_calls", "Pipelined"),
            Transport(link, "fastsplit, asyncio", "fastsplit_calls", "Asyncio"),
            Transport(link, "zmq, tuned", "zmq_sockets", "Tuned"),
            Transport(link, "zmq, as the original", "zmq_sockets", "Original"),
            Transport(link, "gRPC, one stream", "grpc_calls", "Stream"),
            Transport(link, "gRPC, unary protobuf", "grpc_calls", "Unary"),
            Transport(link, "Arrow Flight", "arrow_flight", "Flight"),
        ]
        if link == "unix":
            found.append(Transport(link, "multiprocessing Pipe", "pipes", "Pipe"))
            found.append(Transport(link, "raw socket, 2 MiB buffer", "raw_socket", "LargeBuffer"))
        else:
            found.append(Transport(link, "torch gloo", "gloo", "Gloo"))
        found.append(Transport(link, "raw socket", "raw_socket", "Raw"))
    return {transport.name: transport for transport in found}


TRANSPORTS = _transports()
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


def bytes_of(array: Any) -> Bytes:
    """The memory of a torch tensor or a numpy array."""
    if not isinstance(array, np.ndarray):
        array = array.numpy()
    flat: Bytes = array.reshape(-1).view(np.uint8)
    return flat
