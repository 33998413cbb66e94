"""Echoes: a message there and one of the same size back, by fastsplit and by everything that one would use instead.

    fastsplit_calls.py   fastsplit's own: Channel.call, in shared memory and through the socket
    iceoryx.py           iceoryx2's request-response, which copies nothing
    shared_block.py      multiprocessing.shared_memory, and a Pipe (or a bare flag) that says when
    torch_pipe.py        torch.multiprocessing: tensors in shared memory, sent through a Pipe
    zmq_messages.py      pyzmq, as the original system used it and tuned
    unix_socket.py       64 bytes through a socket and nothing else: the floor of those that sleep
    pair.py              both ends of one of them
    peer.py              the process with the answering end

Rules. Each runs at its best, and its module says what that is: memory is made and mapped before, what can be sent by
reference is, and nobody looks at the bytes while the clock runs. "spinning" is a loop that asks again and again,
"sleeping" waits in the kernel; who has only one of the two is measured in that one. The answering end serves when it
is told to, and sleeps otherwise, so that nobody spins beside another's measurement.

That the bytes are really there is seen outside of the timed part: the client sends a message of its own making, the
peer adds one to each byte of what it received, and exactly that must come back.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ECHOES", "Bytes", "Client", "Peer", "Run", "bytes_of", "load"]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Run:
    """What both ends do next: `count` round trips of `nbytes`, or with `mark` one whose bytes are looked at."""

    nbytes: int
    count: int
    spinning: bool
    mark: bool = False
    place: str = ""
    """What the client's `prepare` said."""


class Peer:
    """The answering end. Made in a process of its own; `directory` is its own, too."""

    address: str
    """What the client needs to find it."""

    def __init__(self, directory: Path) -> None:
        raise NotImplementedError

    def prepare(self, run: Run) -> None:
        """What `serve` needs that takes time. The client is there already."""

    def serve(self, run: Run) -> None:
        """Answers `run.count` times. If `run.mark`, adds one to each byte of the message before it answers."""
        raise NotImplementedError

    def close(self) -> None:
        """Leaves nothing behind."""


class Client:
    """The asking end."""

    modes: tuple[str, ...] = ("spinning", "sleeping")
    sizes_nbytes: tuple[int, ...] = ()
    """What it can send; empty for anything."""
    note: str = ""
    """What else there is to say of how it works here."""

    def __init__(self, address: str) -> None:
        raise NotImplementedError

    def prepare(self, nbytes: int) -> str:
        """Makes a message of `nbytes`, and what it takes to send it; returns what the peer must know of it."""
        raise NotImplementedError

    def trips(self, run: Run) -> None:
        """`run.count` round trips: what is timed."""
        raise NotImplementedError

    def marked(self, run: Run, message: Bytes) -> Bytes:
        """One round trip of `message` to a peer that marks; returns a copy of what came back."""
        raise NotImplementedError

    def release(self, nbytes: int) -> None:
        """Gives back what `prepare` made."""

    def close(self) -> None:
        """Leaves nothing behind. The peer has ended by now, perhaps by being killed."""


ECHOES = {
    "fastsplit shm, torch": ("fastsplit_calls", "ShmTorch"),
    "fastsplit shm, numpy": ("fastsplit_calls", "ShmNumpy"),
    "fastsplit unix, torch": ("fastsplit_calls", "UnixTorch"),
    "fastsplit unix, numpy": ("fastsplit_calls", "UnixNumpy"),
    "iceoryx2": ("iceoryx", "Bare"),
    "iceoryx2, torch tensors": ("iceoryx", "Torch"),
    "shared_memory + flag": ("shared_block", "Flag"),
    "shared_memory + Pipe": ("shared_block", "Pipe"),
    "shared_memory + Pipe, copies": ("shared_block", "CopyPipe"),
    "torch Pipe, file_system": ("torch_pipe", "FileSystem"),
    "torch Pipe, file_descriptor": ("torch_pipe", "FileDescriptor"),
    "zmq tuned": ("zmq_messages", "TunedEcho"),
    "zmq original": ("zmq_messages", "OriginalEcho"),
    "unix socket": ("unix_socket", "UnixSocket"),
}
"""Name -> module, and what its two classes' names begin with."""


def load(name: str, end: str) -> Any:
    """The class of one end, "Peer" or "Client". Raises ImportError where what it needs is not installed."""
    module, prefix = ECHOES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), prefix + end)


def bytes_of(array: Any) -> Bytes:
    """The memory of a torch tensor or a numpy array."""
    if not isinstance(array, np.ndarray):
        array = array.numpy()
    flat: Bytes = array.reshape(-1).view(np.uint8)
    return flat
