"""multiprocessing.shared_memory: one block that both ends have mapped, and a word between them that says when.

    Flag       a counter for each end, in the block itself: the least that two spinning Python processes can do.
               No description, one tensor, no lifetimes, and a core's order of stores for granted (as x86 has it)
    Pipe       the tensor lies in the block already, and stays there; what is sent is a few bytes through a
               multiprocessing Pipe: `send_bytes`, for `send` would pickle
    CopyPipe   as people write it: the tensor is copied into the block, name, shape and dtype are pickled through
               the Pipe, and who receives copies it out, so that the block is free again; the same on the way back

At their best: blocks are made, mapped and touched once, before the clock runs, never for each message. A Pipe's ends
are Connections over a socket pair; those here are over a connected unix socket, which is the same thing.
Spinning, where there is a Pipe: a poll that does not wait (`Connection.poll` makes a selector each time).
"""

from __future__ import annotations

import contextlib
import select
from multiprocessing import resource_tracker
from multiprocessing.connection import Client as connect_pipe
from multiprocessing.connection import Connection, Listener
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from . import Bytes, Client, Peer, Run

__all__ = ["CopyPipeClient", "CopyPipePeer", "FlagClient", "FlagPeer", "PipeClient", "PipePeer"]

_FLAGS_NBYTES = 128  # two counters, a cache line each, then the tensor
_ASKED, _ANSWERED = 0, 64
_WORD = bytes(16)


def _attach(name: str) -> SharedMemory:
    block = SharedMemory(name)
    # Who attaches is made to own it, too, and would complain of a leak when the owner has removed it.
    with contextlib.suppress(KeyError, AttributeError):
        resource_tracker.unregister(block._name, "shared_memory")  # type: ignore[attr-defined]
    return block


def _payload(block: SharedMemory, nbytes: int) -> Bytes:
    return np.frombuffer(block.buf, np.uint8, nbytes, _FLAGS_NBYTES)


def _poll(pipe: Any) -> Any:
    poll = select.poll()
    poll.register(pipe.fileno(), select.POLLIN)
    return poll.poll


class _BlockPeer(Peer):
    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "pipe.sock")
        self._listener = Listener(self.address, "AF_UNIX")
        self._pipe: Connection | None = None
        self._blocks: dict[str, SharedMemory] = {}

    def prepare(self, run: Run) -> None:
        if self._pipe is None:
            self._pipe = self._listener.accept()
        if run.place not in self._blocks:
            self._release()
            self._blocks[run.place] = _attach(run.place)

    def _release(self) -> None:
        for block in self._blocks.values():
            block.close()
        self._blocks.clear()

    def close(self) -> None:
        self._release()
        self._listener.close()
        if self._pipe is not None:
            self._pipe.close()


class _BlockClient(Client):
    def __init__(self, address: str) -> None:
        self._pipe: Any = connect_pipe(address, "AF_UNIX")
        self._blocks: dict[int, SharedMemory] = {}

    def prepare(self, nbytes: int) -> str:
        block = self._blocks[nbytes] = SharedMemory(create=True, size=_FLAGS_NBYTES + nbytes)
        _payload(block, nbytes)[:] = 0
        return block.name

    def marked(self, run: Run, message: Bytes) -> Bytes:
        _payload(self._blocks[run.nbytes], run.nbytes)[:] = message
        self.trips(run)
        return _payload(self._blocks[run.nbytes], run.nbytes).copy()

    def release(self, nbytes: int) -> None:
        block = self._blocks.pop(nbytes)
        block.close()
        block.unlink()

    def close(self) -> None:
        for nbytes in list(self._blocks):
            self.release(nbytes)
        self._pipe.close()


class FlagPeer(_BlockPeer):
    def serve(self, run: Run) -> None:
        block = self._blocks[run.place]
        words = block.buf
        words[_ASKED] = words[_ANSWERED] = 0
        assert self._pipe is not None
        self._pipe.send_bytes(_WORD)  # the counters are where the client expects them
        for number in range(1, run.count + 1):
            number &= 0xFF
            while words[_ASKED] != number:
                pass
            if run.mark:
                _payload(block, run.nbytes)[:] += 1
            words[_ANSWERED] = number


class FlagClient(_BlockClient):
    modes = ("spinning",)

    def trips(self, run: Run) -> None:
        words = self._blocks[run.nbytes].buf
        self._pipe.recv_bytes()
        for number in range(1, run.count + 1):
            number &= 0xFF
            words[_ASKED] = number
            while words[_ANSWERED] != number:
                pass


class PipePeer(_BlockPeer):
    def serve(self, run: Run) -> None:
        pipe = self._pipe
        assert pipe is not None
        poll = _poll(pipe)
        for _ in range(run.count):
            if run.spinning:
                while not poll(0):
                    pass
            pipe.recv_bytes()
            if run.mark:
                _payload(self._blocks[run.place], run.nbytes)[:] += 1
            pipe.send_bytes(_WORD)


class PipeClient(_BlockClient):
    def trips(self, run: Run) -> None:
        pipe = self._pipe
        poll = _poll(pipe)
        for _ in range(run.count):
            pipe.send_bytes(_WORD)
            if run.spinning:
                while not poll(0):
                    pass
            pipe.recv_bytes()


class CopyPipePeer(_BlockPeer):
    def serve(self, run: Run) -> None:
        pipe, blocks = self._pipe, self._blocks
        assert pipe is not None
        poll = _poll(pipe)
        for _ in range(run.count):
            if run.spinning:
                while not poll(0):
                    pass
            name, shape, dtype = pipe.recv()
            shared = np.ndarray(shape, dtype, blocks[name].buf, _FLAGS_NBYTES)
            array = shared.copy()
            if run.mark:
                array.view(np.uint8)[:] += 1
            np.copyto(shared, array)
            pipe.send((name, array.shape, array.dtype.str))


class CopyPipeClient(_BlockClient):
    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._messages: dict[int, Any] = {}
        self._reply: Any = None

    def prepare(self, nbytes: int) -> str:
        self._messages[nbytes] = np.zeros(nbytes // 4, np.float32)
        self._messages[nbytes][:] = 1.0
        return super().prepare(nbytes)

    def trips(self, run: Run) -> None:
        pipe, array, block = self._pipe, self._messages[run.nbytes], self._blocks[run.nbytes]
        poll = _poll(pipe)
        for _ in range(run.count):
            shared = np.ndarray(array.shape, array.dtype, block.buf, _FLAGS_NBYTES)
            np.copyto(shared, array)
            pipe.send((block.name, array.shape, array.dtype.str))
            if run.spinning:
                while not poll(0):
                    pass
            _, shape, dtype = pipe.recv()
            self._reply = np.ndarray(shape, dtype, block.buf, _FLAGS_NBYTES).copy()

    def marked(self, run: Run, message: Bytes) -> Bytes:
        self._messages[run.nbytes].view(np.uint8)[:] = message
        self.trips(run)
        reply: Bytes = self._reply.view(np.uint8)
        return reply

    def release(self, nbytes: int) -> None:
        self._reply = None
        del self._messages[nbytes]
        super().release(nbytes)
