"""torch.multiprocessing: a tensor in shared memory, sent as a handle, and sent back.

    FileSystem       through a Pipe; the handle is a name in /dev/shm, which each end opens once
    FileDescriptor   through a Pipe; torch's default: a descriptor, fetched for each message from a sender's thread
    Queue            as commonly written: `put` of an ordinary tensor, `get`, and a descriptor for a handle

The Pipes at their best: the tensor is in shared memory already (`share_memory_`), and both ends keep one of each
message's tensors alive, so that torch finds its mapping again. One way the sender copies each message into one of two
shared tensors, and waits for the receiver's word before it uses it again. A Queue copies each ordinary tensor into new
shared memory in its thread; `maxsize` is 2, since each message that waits is a file. It is handed over as a child of
`spawn` gets it, by pickle, with descriptors from multiprocessing's resource sharer.
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
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from benches import transports

from . import Bytes, KeepingClient, Peer, Run, bytes_of, waiting

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


class _TorchPeer(transports.PipePeer):
    strategy: str

    def __init__(self, directory: Path, link: str) -> None:
        super().__init__(directory, link)
        self._kept: list[Any] = []
        self._nbytes = 0

    def prepare(self, run: Run) -> None:
        _use(self.strategy)
        super().prepare(run)
        if self._nbytes != run.nbytes:
            self._kept, self._nbytes = [], run.nbytes

    def serve(self, run: Run) -> None:
        pipe, kept = self._pipe, self._kept
        receive = waiting(pipe.recv, pipe, run.spinning)
        for _ in range(run.count):
            tensor = receive()
            if run.mark:
                bytes_of(tensor)[:] += 1
            pipe.send(tensor)
            kept[:] = [tensor]

    def take(self, run: Run) -> None:
        pipe = self._pipe
        receive = waiting(pipe.recv, pipe, run.spinning)
        kept: list[Any] = [None] * _SHARED
        self._kept = kept
        for number in range(run.count):
            self.last = kept[number % _SHARED] = receive()
            self.taken += 1
            pipe.send_bytes(b"!")

    def close(self) -> None:
        self._kept = []
        super().close()


class _TorchClient(KeepingClient):
    strategy: str
    copies = "0; 1 from ordinary memory into shared"
    safe = "no: pickle runs what it is told"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._pipe: Any = connect_pipe(address, "AF_UNIX")

    def prepare(self, nbytes: int) -> str:
        _use(self.strategy)
        shared = self._messages[nbytes] = [torch.zeros(nbytes // 4).share_memory_() for _ in range(_SHARED)]
        for tensor in shared:
            bytes_of(tensor)[:] = 0
        return ""

    def trip(self, run: Run) -> Callable[[], object]:
        _use(self.strategy)
        pipe, message = self._pipe, self._messages[run.nbytes][0]
        send, receive = pipe.send, waiting(pipe.recv, pipe, run.spinning)

        def once() -> None:
            send(message)
            self._reply = receive()

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        bytes_of(self._messages[run.nbytes][0])[:] = message
        self.trip(run)()
        return bytes_of(self._reply).copy()

    def push(self, run: Run, message: Bytes) -> None:
        _use(self.strategy)
        pipe, shared, source = self._pipe, self._messages[run.nbytes], torch.from_numpy(message.view("float32"))
        wait = waiting(pipe.recv_bytes, pipe, run.spinning)
        for number in range(run.count):
            if number >= _SHARED:
                wait()
            tensor = shared[number % _SHARED]
            tensor.copy_(source)
            pipe.send(tensor)
        for _ in range(min(run.count, _SHARED)):
            wait()

    def close(self) -> None:
        super().close()
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


class QueueClient(KeepingClient):
    modes = ("sleeping",)
    how = "common"
    copies = "1 there, into new shared memory, 0 back"
    safe = "no: pickle runs what it is told"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        _use("file_descriptor")
        self._asked, self._answered = pickle.loads(base64.b64decode(address))

    def trip(self, run: Run) -> Callable[[], object]:
        _use("file_descriptor")
        put, get, from_numpy, array = self._asked.put, self._answered.get, torch.from_numpy, self._messages[run.nbytes]

        def once() -> None:
            put(from_numpy(array))  # the same one would be in shared memory the second time
            self._reply = get()

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        bytes_of(self._messages[run.nbytes])[:] = message
        self.trip(run)()
        return bytes_of(self._reply).copy()

    def push(self, run: Run, message: Bytes) -> None:
        _use("file_descriptor")
        put, array, from_numpy = self._asked.put, message.view("float32"), torch.from_numpy
        for _ in range(run.count):
            put(from_numpy(array))
        if self._answered.get() is not True:
            raise ConnectionError("the receiver did not say that it has everything")

    def close(self) -> None:
        super().close()
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
