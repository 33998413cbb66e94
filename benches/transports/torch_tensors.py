"""torch.multiprocessing: a tensor in shared memory, sent as a handle, and sent back.

    FileSystem       through a Pipe; the handle is a name in /dev/shm, which each end opens once
    FileDescriptor   through a Pipe; torch's default: a descriptor, fetched for each message from a sender's thread
    Queue            as commonly written: `put` of an ordinary tensor, `get`, and a descriptor for a handle

The Pipes at their best: the tensor is in shared memory already (`share_memory_`), both ends keep one of each message's
tensors alive so that torch finds its mapping again instead of making a new one, and what carries the handle is a Pipe.
One way the sender copies each message into one of two shared tensors, and waits until the receiver has said that it has
the tensor before it uses it again. Spinning: a poll that does not wait, before the Pipe is read.

A `torch.multiprocessing.Queue` is the same Pipe behind two locks, a semaphore that counts, and a thread that pickles
and feeds it. Each message is an ordinary tensor of its own, over the memory it comes out of, which the thread copies
into new shared memory: a new file, its pages and its mapping for each message are the cost of writing it so. What is
answered is what came, in shared memory already. `maxsize` is 2, since each message that waits is a file.

Only a parent hands a Queue to its child. Here it is handed over as a child of `spawn` gets it, by pickle: locks and
semaphore by their names, the ends of its Pipe as descriptors; only that these come from multiprocessing's resource
sharer, as for any two processes with the same authkey, and not at the start. The Queues are the same from then on.
"""

from __future__ import annotations

import base64
import contextlib
import multiprocessing
import multiprocessing.context
import pickle
from collections.abc import Callable
from multiprocessing import resource_sharer
from multiprocessing.connection import Client as connect_pipe
from multiprocessing.connection import Connection, Listener
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from . import Bytes, Client, Peer, Run, bytes_of, poll_of

__all__ = [
    "FileDescriptorClient",
    "FileDescriptorPeer",
    "FileSystemClient",
    "FileSystemPeer",
    "QueueClient",
    "QueuePeer",
]

_AUTHKEY = b"fastsplit-bench"  # descriptors are fetched by who has the same; children of one parent do
_SHARED = 2  # tensors one way
_MAXSIZE = 2


def _use(strategy: str) -> None:
    """For all tensors of this process that are sent from now on; so before each run, since the client does both."""
    multiprocessing.current_process().authkey = _AUTHKEY
    torch.multiprocessing.set_sharing_strategy(strategy)


def _stop_sharing() -> None:
    """Ends the thread that descriptors are fetched from; the next tensor that is sent would start it again."""
    multiprocessing.current_process().authkey = _AUTHKEY
    resource_sharer.stop()


class _TorchPeer(Peer):
    strategy: str

    def __init__(self, directory: Path, link: str) -> None:
        self.address = str(directory / "pipe.sock")
        self._listener = Listener(self.address, "AF_UNIX")
        self._connected: Connection | None = None
        self._kept: list[Any] = []
        self._nbytes = 0

    @property
    def _pipe(self) -> Any:
        return self._connected

    def prepare(self, run: Run) -> None:
        _use(self.strategy)
        if self._connected is None:
            self._connected = self._listener.accept()
        if self._nbytes != run.nbytes:
            self._kept, self._nbytes = [], run.nbytes

    def serve(self, run: Run) -> None:
        pipe = self._pipe
        poll, kept = poll_of(pipe), self._kept
        for _ in range(run.count):
            if run.spinning:
                while not poll(0):
                    pass
            tensor = pipe.recv()
            if run.mark:
                bytes_of(tensor)[:] += 1
            pipe.send(tensor)
            kept[:] = [tensor]

    def take(self, run: Run) -> None:
        pipe = self._pipe
        poll = poll_of(pipe)
        kept: list[Any] = [None] * _SHARED
        self._kept = kept
        for number in range(run.count):
            if run.spinning:
                while not poll(0):
                    pass
            self.last = kept[number % _SHARED] = pipe.recv()
            self.taken += 1
            pipe.send_bytes(b"!")

    def close(self) -> None:
        self._kept = []
        self._listener.close()
        if self._connected is not None:
            self._connected.close()


class _TorchClient(Client):
    strategy: str
    copies = "0; 1 from ordinary memory into shared"
    writable = "yes"
    safe = "no: pickle runs what it is told"

    def __init__(self, address: str) -> None:
        self._pipe: Any = connect_pipe(address, "AF_UNIX")
        self._messages: dict[int, list[torch.Tensor]] = {}
        self._reply: Any = None

    def prepare(self, nbytes: int) -> str:
        _use(self.strategy)
        shared = self._messages[nbytes] = [torch.zeros(nbytes // 4).share_memory_() for _ in range(_SHARED)]
        for tensor in shared:
            bytes_of(tensor)[:] = 0
        return ""

    def trip(self, run: Run) -> Callable[[], object]:
        _use(self.strategy)
        pipe, message = self._pipe, self._messages[run.nbytes][0]
        poll, send, recv = poll_of(pipe), pipe.send, pipe.recv

        def once() -> None:
            send(message)
            if run.spinning:
                while not poll(0):
                    pass
            self._reply = recv()

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        bytes_of(self._messages[run.nbytes][0])[:] = message
        self.trip(run)()
        return bytes_of(self._reply).copy()

    def push(self, run: Run, message: Bytes) -> None:
        _use(self.strategy)
        pipe, shared, source = self._pipe, self._messages[run.nbytes], torch.from_numpy(message.view("float32"))
        poll = poll_of(pipe)

        def wait() -> None:
            if run.spinning:
                while not poll(0):
                    pass
            pipe.recv_bytes()

        for number in range(run.count):
            if number >= _SHARED:
                wait()
            tensor = shared[number % _SHARED]
            tensor.copy_(source)
            pipe.send(tensor)
        for _ in range(min(run.count, _SHARED)):
            wait()

    def release(self, nbytes: int) -> None:
        self._reply = None
        del self._messages[nbytes]

    def close(self) -> None:
        self._reply = None
        self._messages.clear()
        self._pipe.close()
        _stop_sharing()


class FileSystemPeer(_TorchPeer):
    strategy = "file_system"


class FileSystemClient(_TorchClient):
    strategy = "file_system"


class FileDescriptorPeer(_TorchPeer):
    strategy = "file_descriptor"


class FileDescriptorClient(_TorchClient):
    strategy = "file_descriptor"


class _Handed:
    """In the place of a child that is being spawned, to which alone a Queue lets itself be pickled."""

    DupFd = staticmethod(resource_sharer.DupFd)

    def duplicate_for_child(self, fd: int) -> int:
        return fd


class QueuePeer(Peer):
    def __init__(self, directory: Path, link: str) -> None:
        _use("file_descriptor")
        context = torch.multiprocessing.get_context("spawn")
        self._asked, self._answered = context.Queue(_MAXSIZE), context.Queue(_MAXSIZE)
        set_popen: Any = multiprocessing.context.set_spawning_popen
        set_popen(_Handed())
        try:
            self.address = base64.b64encode(ForkingPickler.dumps((self._asked, self._answered))).decode()
        finally:
            set_popen(None)

    def serve(self, run: Run) -> None:
        get, put = self._asked.get, self._answered.put
        for _ in range(run.count):
            tensor = get()
            if run.mark:
                bytes_of(tensor)[:] += 1
            put(tensor)

    def take(self, run: Run) -> None:
        get = self._asked.get
        for _ in range(run.count):
            self.last = get()
            self.taken += 1
        self._answered.put(True)

    def close(self) -> None:
        for queue in (self._asked, self._answered):
            _close(queue)


class QueueClient(Client):
    modes = ("sleeping",)
    how = "common"
    copies = "1 there, into new shared memory, 0 back"
    writable = "yes"
    safe = "no: pickle runs what it is told"

    def __init__(self, address: str) -> None:
        _use("file_descriptor")
        self._asked, self._answered = pickle.loads(base64.b64decode(address))
        self._messages: dict[int, Bytes] = {}
        self._reply: Any = None

    def prepare(self, nbytes: int) -> str:
        message = torch.zeros(nbytes // 4)
        bytes_of(message)[:] = 0
        self._messages[nbytes] = bytes_of(message)
        return ""

    def trip(self, run: Run) -> Callable[[], object]:
        _use("file_descriptor")
        put, get, message, from_numpy = (
            self._asked.put,
            self._answered.get,
            self._messages[run.nbytes],
            torch.from_numpy,
        )
        array = message.view("float32")

        def once() -> None:
            put(from_numpy(array))  # the same one would be in shared memory the second time
            self._reply = get()

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        self._messages[run.nbytes][:] = message
        self.trip(run)()
        return bytes_of(self._reply).copy()

    def push(self, run: Run, message: Bytes) -> None:
        _use("file_descriptor")
        put, array, from_numpy = self._asked.put, message.view("float32"), torch.from_numpy
        for _ in range(run.count):
            put(from_numpy(array))
        if self._answered.get() is not True:
            raise ConnectionError("the receiver did not say that it has everything")

    def release(self, nbytes: int) -> None:
        self._reply = None
        del self._messages[nbytes]

    def close(self) -> None:
        self._reply = None
        self._messages.clear()
        for queue in (self._asked, self._answered):
            _close(queue)
        _stop_sharing()


def _close(queue: Any) -> None:
    """Both ends of its Pipe, and its thread."""
    queue._reader.close()  # so that a thread that feeds nobody ends
    queue.close()
    queue.join_thread()
    with contextlib.suppress(OSError):
        queue._writer.close()
