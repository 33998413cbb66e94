"""multiprocessing.shared_memory: one block that both ends have mapped, and a word between them that says when.

    Flag       a counter for each end, in the block itself: the least that two spinning Python processes can do.
               No description, one tensor, no lifetimes, and a core's order of stores for granted (as x86 has it)
    Pipe       the tensor lies in the block and stays there; a few bytes go through a Pipe (`send_bytes`)
    CopyPipe   as people write it: the tensor is copied into the block, name, shape and dtype are pickled through
               the Pipe, and the receiver copies it out; the same on the way back

One way, Flag and Pipe have a ring of slots in the block, 8 down to 2 large ones: the sender copies a message into the
next while the receiver has an array over another. Flag's counter frees a slot, by Pipe half of the ring at once.
Blocks are made, mapped and touched once, before the clock runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Client as connect_pipe
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np

from benches import transports

from . import Bytes, Client, Run, waiting

__all__ = ["CopyPipeClient", "CopyPipePeer", "FlagClient", "FlagPeer", "PipeClient", "PipePeer"]

_FLAGS_NBYTES = 128  # two counters, a cache line each, then the tensor, or the slots
_ASKED, _ANSWERED = 0, 64
_WORD = bytes(16)
_SLOTS = 8
_SLOTS_NBYTES = 16 * 1024**2


def _slots(nbytes: int) -> int:
    return min(max(_SLOTS_NBYTES // nbytes, 2), _SLOTS)


def _attach(name: str) -> SharedMemory:
    block = SharedMemory(name)
    # Who attaches is made to own it, too, and would complain of a leak when the owner has removed it.
    with contextlib.suppress(KeyError, AttributeError):
        resource_tracker.unregister(block._name, "shared_memory")  # type: ignore[attr-defined]
    return block


def _payload(block: SharedMemory, nbytes: int, slot: int = 0) -> Bytes:
    return np.frombuffer(block.buf, np.uint8, nbytes, _FLAGS_NBYTES + slot * nbytes)


class _BlockPeer(transports.PipePeer):
    def __init__(self, directory: Path, link: str) -> None:
        super().__init__(directory, link)
        self._blocks: dict[str, SharedMemory] = {}

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        if run.place not in self._blocks:
            self._release()
            self._blocks[run.place] = _attach(run.place)

    def _release(self) -> None:
        self.last = None
        for block in self._blocks.values():
            block.close()
        self._blocks.clear()

    def close(self) -> None:
        self._release()
        super().close()


class _BlockClient(Client):
    copies = "0; 1 from ordinary memory into shared"
    safe = "no: nothing is checked, and the peer may write while it is read"
    has_slots = True

    def __init__(self, address: str) -> None:
        self._pipe: Any = connect_pipe(address, "AF_UNIX")
        self._blocks: dict[int, SharedMemory] = {}

    def prepare(self, nbytes: int) -> str:
        places = _slots(nbytes) if self.has_slots else 1
        block = self._blocks[nbytes] = SharedMemory(create=True, size=_FLAGS_NBYTES + places * nbytes)
        for slot in range(places):
            _payload(block, nbytes, slot)[:] = 0
        return block.name

    def marked(self, run: Run, message: Bytes) -> Bytes:
        _payload(self._blocks[run.nbytes], run.nbytes)[:] = message
        self.trip(run)()
        return _payload(self._blocks[run.nbytes], run.nbytes).copy()

    def _ring(self, nbytes: int) -> list[Bytes]:
        return [_payload(self._blocks[nbytes], nbytes, slot) for slot in range(_slots(nbytes))]

    def release(self, nbytes: int) -> None:
        block = self._blocks.pop(nbytes)
        block.close()
        block.unlink()

    def close(self) -> None:
        for nbytes in list(self._blocks):
            self.release(nbytes)
        self._pipe.close()


class FlagPeer(_BlockPeer):
    def _counters(self, run: Run) -> Any:
        words: Any = self._blocks[run.place].buf
        words[_ASKED] = words[_ANSWERED] = 0
        self._pipe.send_bytes(_WORD)  # they are where the client expects them
        return words

    def serve(self, run: Run) -> None:
        words = self._counters(run)
        for number in range(1, run.count + 1):
            number &= 0xFF
            while words[_ASKED] != number:
                pass
            if run.mark:
                _payload(self._blocks[run.place], run.nbytes)[:] += 1
            words[_ANSWERED] = number

    def take(self, run: Run) -> None:
        block, nbytes, slots = self._blocks[run.place], run.nbytes, _slots(run.nbytes)
        words = self._counters(run)
        for number in range(run.count):
            while words[_ASKED] == number & 0xFF:  # at most `slots` ahead
                pass
            self.last = _payload(block, nbytes, number % slots)
            self.taken += 1
            words[_ANSWERED] = (number + 1) & 0xFF


class FlagClient(_BlockClient):
    modes = ("spinning",)

    def trip(self, run: Run) -> Callable[[], object]:
        words: Any = self._blocks[run.nbytes].buf
        number = 0
        self._pipe.recv_bytes()

        def once() -> None:
            nonlocal number
            number = (number + 1) & 0xFF
            words[_ASKED] = number
            while words[_ANSWERED] != number:
                pass

        return once

    def push(self, run: Run, message: Bytes) -> None:
        words: Any = self._blocks[run.nbytes].buf
        ring, copyto = self._ring(run.nbytes), np.copyto
        slots = len(ring)
        self._pipe.recv_bytes()
        for number in range(run.count):
            while (number - words[_ANSWERED]) & 0xFF == slots:
                pass
            copyto(ring[number % slots], message)
            words[_ASKED] = (number + 1) & 0xFF
        while words[_ANSWERED] != run.count & 0xFF:
            pass


class PipePeer(_BlockPeer):
    def serve(self, run: Run) -> None:
        pipe = self._pipe
        receive = waiting(pipe.recv_bytes, pipe, run.spinning)
        for _ in range(run.count):
            receive()
            if run.mark:
                _payload(self._blocks[run.place], run.nbytes)[:] += 1
            pipe.send_bytes(_WORD)

    def take(self, run: Run) -> None:
        pipe, block, nbytes, slots = self._pipe, self._blocks[run.place], run.nbytes, _slots(run.nbytes)
        receive, half = waiting(pipe.recv_bytes, pipe, run.spinning), slots // 2
        for number in range(run.count):
            receive()
            self.last = _payload(block, nbytes, number % slots)
            self.taken += 1
            if self.taken % half == 0 or self.taken == run.count:
                pipe.send_bytes(_WORD)


class PipeClient(_BlockClient):
    def trip(self, run: Run) -> Callable[[], object]:
        send_bytes, receive = self._pipe.send_bytes, waiting(self._pipe.recv_bytes, self._pipe, run.spinning)

        def once() -> None:
            send_bytes(_WORD)
            receive()

        return once

    def push(self, run: Run, message: Bytes) -> None:
        send_bytes, receive = self._pipe.send_bytes, waiting(self._pipe.recv_bytes, self._pipe, run.spinning)
        ring, copyto = self._ring(run.nbytes), np.copyto
        slots, half = len(ring), len(ring) // 2
        awaited = -(-run.count // half)
        for number in range(run.count):
            if number >= slots and number % half == 0:
                receive()
                awaited -= 1
            copyto(ring[number % slots], message)
            send_bytes(_WORD)
        for _ in range(awaited):
            receive()


class CopyPipePeer(_BlockPeer):
    def serve(self, run: Run) -> None:
        pipe, blocks = self._pipe, self._blocks
        receive = waiting(pipe.recv, pipe, run.spinning)
        for _ in range(run.count):
            name, shape, dtype = receive()
            shared = np.ndarray(shape, dtype, blocks[name].buf, _FLAGS_NBYTES)
            array = shared.copy()
            if run.mark:
                array.view(np.uint8)[:] += 1
            np.copyto(shared, array)
            pipe.send((name, array.shape, array.dtype.str))

    def take(self, run: Run) -> None:
        pipe, blocks = self._pipe, self._blocks
        receive = waiting(pipe.recv, pipe, run.spinning)
        for _ in range(run.count):
            name, shape, dtype = receive()
            self.last = np.ndarray(shape, dtype, blocks[name].buf, _FLAGS_NBYTES).copy()
            self.taken += 1
            pipe.send(True)


class CopyPipeClient(_BlockClient):
    how = "common"
    copies = "2, into the block and out of it"
    safe = "no: pickle runs what it is told"
    has_slots = False

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._messages: dict[int, Any] = {}
        self._reply: Any = None

    def prepare(self, nbytes: int) -> str:
        self._messages[nbytes] = np.zeros(nbytes // 4, np.float32)
        self._messages[nbytes][:] = 1.0
        return super().prepare(nbytes)

    def trip(self, run: Run) -> Callable[[], object]:
        pipe, array, block = self._pipe, self._messages[run.nbytes], self._blocks[run.nbytes]
        receive = waiting(pipe.recv, pipe, run.spinning)

        def once() -> None:
            shared = np.ndarray(array.shape, array.dtype, block.buf, _FLAGS_NBYTES)
            np.copyto(shared, array)
            pipe.send((block.name, array.shape, array.dtype.str))
            _, shape, dtype = receive()
            self._reply = np.ndarray(shape, dtype, block.buf, _FLAGS_NBYTES).copy()

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        self._messages[run.nbytes].view(np.uint8)[:] = message
        self.trip(run)()
        reply: Bytes = self._reply.view(np.uint8)
        return reply

    def push(self, run: Run, message: Bytes) -> None:
        pipe, array, block = self._pipe, message.view(np.float32), self._blocks[run.nbytes]
        receive = waiting(pipe.recv, pipe, run.spinning)
        for _ in range(run.count):
            shared = np.ndarray(array.shape, array.dtype, block.buf, _FLAGS_NBYTES)
            np.copyto(shared, array)
            pipe.send((block.name, array.shape, array.dtype.str))
            receive()

    def release(self, nbytes: int) -> None:
        self._reply = None
        del self._messages[nbytes]
        super().release(nbytes)
