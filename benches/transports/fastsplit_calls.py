"""fastsplit's own: calls of a handler that returns what it got, or one way of a handler that returns nothing.

    Torch, Numpy   `Channel.call`, one at a time; the tensor of a round trip is made by `channel.empty` before
    Pipelined      `Channel.submit`, up to 16 requests in flight (fewer large ones: 256 MiB in all), over sockets with
                   `overlap=True`. A round trip is then what a call adds, not how long it takes
    PythonCore     as Torch and Numpy, without the compiled core at either end
    NewTensors     as Torch, but each call makes a tensor to send, and the handler another to answer with
    Asyncio        `fastsplit.aio` on both ends: round trips one at a time, one way as many at a time as Pipelined

With shared memory ("shm", over unix://) and without (`?shm=off`, and tcp); a client that got the other one ends the
measurement. Spinning is fastsplit's default on two cores, 50 us at most; sleeping is `spin_us=0` on both ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastsplit
from fastsplit.wire import backend
from fastsplit.wire.shm import ring, slots

from . import Bytes, Client, Peer, Run, bytes_of

SPIN_US = {"spinning": 50.0, "sleeping": 0.0}
_IN_FLIGHT = 16
_IN_FLIGHT_NBYTES = 256 * 1024**2


def mark(call: fastsplit.Call) -> tuple[Any, ...]:
    """A handler that adds one to each byte."""
    for tensor in call.tensors:
        bytes_of(tensor)[:] += 1
    return call.tensors


def _in_flight(nbytes: int) -> int:
    return min(max(_IN_FLIGHT_NBYTES // nbytes, 2), _IN_FLIGHT)


class TorchPeer(Peer):
    arrays = "torch"
    modes: tuple[str, ...] = ("spinning", "sleeping")

    def __init__(self, directory: Path, link: str) -> None:
        self._handlers = {"echo": self._echo, "mark": mark, "take": self._take}
        uris = {
            mode: "tcp://127.0.0.1:0" if link == "tcp" else f"unix://{directory}/{mode}.sock" for mode in self.modes
        }
        query = "?shm=off" if link == "unix" else ""
        self.address = json.dumps([link == "shm", {mode: uri + query for mode, uri in self._listen(uris, query)}])

    def _listen(self, uris: dict[str, str], query: str) -> list[tuple[str, str]]:
        self._servers = {
            mode: fastsplit.Server(uri + query, self._handlers, arrays=self.arrays, spin_us=SPIN_US[mode]).start()
            for mode, uri in uris.items()
        }
        return [(mode, server.uri.partition("?")[0]) for mode, server in self._servers.items()]

    def _echo(self, call: fastsplit.Call) -> Any:
        return call.tensors

    def _take(self, call: fastsplit.Call) -> None:
        self.taken += 1
        (self.last,) = call.tensors

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


class TorchClient(Client):
    arrays = "torch"
    overlap = False
    copies = "0; 1 from ordinary memory into shared"
    safe = "partly: what is said of tensors is checked, but the peer may change them while they are read"

    def __init__(self, address: str) -> None:
        self._shm, uris = json.loads(address)
        self._messages: dict[tuple[str, int], Any] = {}
        self._channels = {
            mode: fastsplit.connect(
                uri, arrays=self.arrays, spin_us=SPIN_US[mode], overlap=self.overlap and not self._shm
            )
            for mode, uri in uris.items()
        }
        for channel in self._channels.values():
            if channel.shm is not self._shm:
                self.close()
                raise ConnectionError(f"shm is {channel.shm}: {channel.shm_reason}")
        if not self._shm:
            self.copies, self.safe = "0", "yes"

    def prepare(self, nbytes: int) -> str:
        for mode, channel in self._channels.items():
            message = self._messages[mode, nbytes] = channel.empty((nbytes // 4,), "float32")
            bytes_of(message)[:] = 0
        return ""

    def _of(self, run: Run) -> tuple[fastsplit.Channel, Any]:
        mode = "spinning" if run.spinning else "sleeping"
        return self._channels[mode], self._messages[mode, run.nbytes]

    def trip(self, run: Run) -> Callable[[], object]:
        channel, message = self._of(run)
        call = channel.call

        def once() -> None:
            (_reply,) = call("echo", message)

        return once

    def marked(self, run: Run, message: Bytes) -> Bytes:
        channel, tensor = self._of(run)
        bytes_of(tensor)[:] = message
        shared_nbytes = channel.stats.bytes_shared
        (reply,) = channel.call("mark", tensor)
        by_reference = channel.stats.bytes_shared > shared_nbytes
        if by_reference is not self._shm:
            raise ConnectionError(f"the tensor {'crossed' if by_reference else 'did not cross'} by reference")
        return bytes_of(reply).copy()

    def push(self, run: Run, message: Bytes) -> None:
        channel, _ = self._of(run)
        tensor = _as_message(message, self.arrays)
        for _ in range(run.count):
            channel.call("take", tensor)

    def release(self, nbytes: int) -> None:
        for mode in self._channels:
            del self._messages[mode, nbytes]

    def close(self) -> None:
        self._messages.clear()
        for channel in self._channels.values():
            channel.close()


def _as_message(message: Bytes, arrays: str) -> Any:
    """float32 over the same memory, which stays the caller's."""
    array = message.view(np.float32)
    if arrays == "numpy":
        return array
    import torch

    return torch.from_numpy(array)


class NumpyPeer(TorchPeer):
    arrays = "numpy"


class NumpyClient(TorchClient):
    arrays = "numpy"


@contextlib.contextmanager
def _python_core() -> Iterator[None]:
    """Connections that are made meanwhile have nothing compiled."""
    before = backend._native, backend.lease, ring.Slots
    backend._native, backend.lease, ring.Slots = None, None, slots.Slots
    try:
        yield
    finally:
        backend._native, backend.lease, ring.Slots = before


class PythonCorePeer(TorchPeer):
    def __init__(self, directory: Path, link: str) -> None:
        _python_core().__enter__()  # for good: this process serves no others
        super().__init__(directory, link)


class PythonCoreClient(TorchClient):
    def __init__(self, address: str) -> None:
        with _python_core():
            super().__init__(address)


class NumpyPythonCorePeer(PythonCorePeer):
    arrays = "numpy"


class NumpyPythonCoreClient(PythonCoreClient):
    arrays = "numpy"


class NewTensorsPeer(TorchPeer):
    """Its echo answers with a tensor of its own making; as an answer it would be written to, which no echo does."""

    def _echo(self, call: fastsplit.Call) -> Any:
        return call.empty(call.tensors[0].shape, "float32")


class NewTensorsClient(TorchClient):
    has_one_way = False  # there a message comes out of ordinary memory, as Torch has it

    def trip(self, run: Run) -> Callable[[], object]:
        channel, _ = self._of(run)
        call, empty, shape = channel.call, channel.empty, (run.nbytes // 4,)

        def once() -> None:
            (_reply,) = call("echo", empty(shape, "float32"))

        return once


class PipelinedPeer(TorchPeer):
    modes = ("spinning",)


class PipelinedClient(TorchClient):
    modes = ("spinning",)
    is_latency = False
    overlap = True

    def trips(self, run: Run) -> list[float]:
        """Of each as many as are in flight at once their mean: replies come in bursts."""
        channel, message = self._of(run)
        submit, clock, window = channel.submit, time.perf_counter_ns, _in_flight(run.nbytes)
        waiting: deque[fastsplit.Future] = deque()
        done, times = [0], [clock()]
        for number in range(run.count):
            if len(waiting) == window:
                (_reply,) = waiting.popleft().result()
                if number % window == 0:
                    done.append(number)
                    times.append(clock())
            waiting.append(submit("echo", message))
        for future in waiting:
            (_reply,) = future.result()
        done.append(run.count)
        times.append(clock())
        steps = zip(itertools.pairwise(done), itertools.pairwise(times))
        return [(after - before) / (last - first) for (first, last), (before, after) in steps]

    def push(self, run: Run, message: Bytes) -> None:
        channel, _ = self._of(run)
        tensor, window = _as_message(message, self.arrays), _in_flight(run.nbytes)
        waiting: deque[fastsplit.Future] = deque()
        for _ in range(run.count):
            if len(waiting) == window:
                waiting.popleft().result()
            waiting.append(channel.submit("take", tensor))
        for future in waiting:
            future.result()


class AsyncioPeer(TorchPeer):
    """A loop in a thread of its own; handlers are plain functions, which run on it."""

    modes = ("sleeping",)

    def _listen(self, uris: dict[str, str], query: str) -> list[tuple[str, str]]:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._aio = {
            mode: fastsplit.aio.serve(uri + query, self._handlers, arrays=self.arrays) for mode, uri in uris.items()
        }
        return [(mode, self._do(server.__aenter__()).uri.partition("?")[0]) for mode, server in self._aio.items()]

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def close(self) -> None:
        for server in self._aio.values():
            self._do(server.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class AsyncioClient(Client):
    modes = ("sleeping",)
    copies = "0; 1 from ordinary memory into shared"
    safe = "partly: what is said of tensors is checked, but the peer may change them while they are read"

    def __init__(self, address: str) -> None:
        self._shm, uris = json.loads(address)
        self._loop = asyncio.new_event_loop()
        connecting = fastsplit.aio.connect(uris["sleeping"], arrays="torch")
        self._channel = self._do(connecting.__aenter__())
        self._messages: dict[int, Any] = {}
        if self._channel.shm is not self._shm:
            self.close()
            raise ConnectionError(f"shm is {self._channel.shm}: {self._channel.shm_reason}")
        if not self._shm:
            self.copies, self.safe = "0", "yes"

    def _do(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(coroutine)

    def prepare(self, nbytes: int) -> str:
        async def make() -> Any:
            return self._channel.empty((nbytes // 4,), "float32")

        self._messages[nbytes] = self._do(make())
        bytes_of(self._messages[nbytes])[:] = 0
        return ""

    def trips(self, run: Run) -> list[float]:
        async def all_of_them() -> list[float]:
            call, message, clock = self._channel.call, self._messages[run.nbytes], time.perf_counter_ns
            times_ns = [clock()]
            for _ in range(run.count):
                (_reply,) = await call("echo", message)
                times_ns.append(clock())
            return [after - before for before, after in itertools.pairwise(times_ns)]

        trips_ns: list[float] = self._do(all_of_them())
        return trips_ns

    def marked(self, run: Run, message: Bytes) -> Bytes:
        tensor = self._messages[run.nbytes]
        bytes_of(tensor)[:] = message
        (reply,) = self._do(self._channel.call("mark", tensor))
        return bytes_of(reply).copy()

    def push(self, run: Run, message: Bytes) -> None:
        tensor = _as_message(message, "torch")
        numbers = iter(range(run.count))  # taken from by all of them

        async def one_after_the_other() -> None:
            for _ in numbers:
                await self._channel.call("take", tensor)

        async def all_of_them() -> None:
            await asyncio.gather(*(one_after_the_other() for _ in range(_in_flight(run.nbytes))))

        self._do(all_of_them())

    def release(self, nbytes: int) -> None:
        del self._messages[nbytes]

    def close(self) -> None:
        self._messages.clear()
        self._do(self._channel.__aexit__(None, None, None))
        self._loop.close()
