"""torch.multiprocessing: a tensor in shared memory, sent through a Pipe as a handle, and sent back.

    FileSystem       the handle is a name in /dev/shm, which each end opens once
    FileDescriptor   torch's default: a descriptor, fetched for each message from a thread of the sender's

At its best: the tensor is in shared memory already (`share_memory_`), both ends keep one of each message's tensors
alive so that torch finds its mapping again instead of making a new one, and what carries the handle is a Pipe:
a `torch.multiprocessing.Queue` is the same Pipe behind a lock and a thread that feeds it. Spinning: a poll that does
not wait, before the Pipe is read.
"""

from __future__ import annotations

import multiprocessing
import select
from multiprocessing.connection import Client as connect_pipe
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from . import Bytes, Client, Peer, Run, bytes_of

__all__ = ["FileDescriptorClient", "FileDescriptorPeer", "FileSystemClient", "FileSystemPeer"]

_AUTHKEY = b"fastsplit-bench"  # descriptors are fetched by who has the same; children of one parent do


def _use(strategy: str) -> None:
    """For all tensors of this process that are sent from now on; so before each run, since the client does both."""
    multiprocessing.current_process().authkey = _AUTHKEY
    torch.multiprocessing.set_sharing_strategy(strategy)


class _TorchPeer(Peer):
    strategy: str

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "pipe.sock")
        self._listener = Listener(self.address, "AF_UNIX")
        self._pipe: Connection | None = None
        self._kept: Any = None

    def prepare(self, run: Run) -> None:
        _use(self.strategy)
        if self._pipe is None:
            self._pipe = self._listener.accept()

    def serve(self, run: Run) -> None:
        pipe, kept = self._pipe, self._kept
        assert pipe is not None
        poll = _poll(pipe)
        for _ in range(run.count):
            if run.spinning:
                while not poll(0):
                    pass
            tensor = pipe.recv()
            if run.mark:
                bytes_of(tensor)[:] += 1
            pipe.send(tensor)
            kept = tensor
        self._kept = kept

    def close(self) -> None:
        self._kept = None
        self._listener.close()
        if self._pipe is not None:
            self._pipe.close()


class _TorchClient(Client):
    strategy: str

    def __init__(self, address: str) -> None:
        self._pipe: Any = connect_pipe(address, "AF_UNIX")
        self._messages: dict[int, torch.Tensor] = {}
        self._reply: Any = None

    def prepare(self, nbytes: int) -> str:
        _use(self.strategy)
        self._messages[nbytes] = torch.zeros(nbytes // 4).share_memory_()
        bytes_of(self._messages[nbytes])[:] = 0
        return ""

    def trips(self, run: Run) -> None:
        _use(self.strategy)
        pipe, message = self._pipe, self._messages[run.nbytes]
        poll = _poll(pipe)
        for _ in range(run.count):
            pipe.send(message)
            if run.spinning:
                while not poll(0):
                    pass
            self._reply = pipe.recv()

    def marked(self, run: Run, message: Bytes) -> Bytes:
        bytes_of(self._messages[run.nbytes])[:] = message
        self.trips(run)
        return bytes_of(self._reply).copy()

    def release(self, nbytes: int) -> None:
        self._reply = None
        del self._messages[nbytes]

    def close(self) -> None:
        self._reply = None
        self._messages.clear()
        self._pipe.close()


def _poll(pipe: Any) -> Any:
    poll = select.poll()
    poll.register(pipe.fileno(), select.POLLIN)
    return poll.poll


class FileSystemPeer(_TorchPeer):
    strategy = "file_system"


class FileSystemClient(_TorchClient):
    strategy = "file_system"


class FileDescriptorPeer(_TorchPeer):
    strategy = "file_descriptor"


class FileDescriptorClient(_TorchClient):
    strategy = "file_descriptor"
