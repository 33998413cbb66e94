"""fastsplit's own: `Channel.call` with a handler that returns what it got, the tensor made by `channel.empty` before.

Over unix://, with shared memory ("shm": the tensor goes and comes by reference) and without ("unix": through the
socket). A client that asked for one and got the other is no measurement, and ends it. Spinning is what fastsplit does
where there are two cores: for 50 us at most, then both ends sleep; sleeping is `spin_us=0` on both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fastsplit

from . import Bytes, Client, Peer, Run, bytes_of

__all__ = [
    "ShmNumpyClient",
    "ShmNumpyPeer",
    "ShmTorchClient",
    "ShmTorchPeer",
    "UnixNumpyClient",
    "UnixNumpyPeer",
    "UnixTorchClient",
    "UnixTorchPeer",
    "mark",
    "query",
]

SPIN_US = {"spinning": 50.0, "sleeping": 0.0}


def query(shm: bool) -> str:
    """What stands behind a unix URI to have shared memory, or not."""
    return "" if shm else "?shm=off"


def mark(call: fastsplit.Call) -> tuple[Any, ...]:
    """A handler that adds one to each byte."""
    for tensor in call.tensors:
        bytes_of(tensor)[:] += 1
    return call.tensors


class _CallPeer(Peer):
    """Its servers answer on threads of their own, all the time; idle they sleep."""

    shm: bool
    arrays: str

    def __init__(self, directory: Path) -> None:
        handlers = {"echo": lambda call: call.tensors, "mark": mark, "take": lambda call: None}
        self._servers = {
            mode: fastsplit.Server(
                f"unix://{directory}/{mode}.sock{query(self.shm)}", handlers, arrays=self.arrays, spin_us=spin_us
            ).start()
            for mode, spin_us in SPIN_US.items()
        }
        self.address = json.dumps({mode: f"unix://{directory}/{mode}.sock" for mode in self._servers})

    def serve(self, run: Run) -> None:
        pass

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


class _CallClient(Client):
    shm: bool
    arrays: str

    def __init__(self, address: str) -> None:
        self._channels = {
            mode: fastsplit.connect(uri + query(self.shm), arrays=self.arrays, spin_us=SPIN_US[mode])
            for mode, uri in json.loads(address).items()
        }
        self._messages: dict[tuple[str, int], Any] = {}
        for channel in self._channels.values():
            if channel.shm is not self.shm:
                self.close()
                raise ConnectionError(f"shm is {channel.shm}: {channel.shm_reason}")

        self.note = f"shared memory: {channel.shm_reason}"

    def channel(self, mode: str) -> fastsplit.Channel:
        return self._channels[mode]

    def prepare(self, nbytes: int) -> str:
        for mode, channel in self._channels.items():
            self._messages[mode, nbytes] = channel.empty((nbytes // 4,), "float32")
            bytes_of(self._messages[mode, nbytes])[:] = 0
        return ""

    def trips(self, run: Run) -> None:
        mode = "spinning" if run.spinning else "sleeping"
        call, message = self._channels[mode].call, self._messages[mode, run.nbytes]
        for _ in range(run.count):
            (_reply,) = call("echo", message)

    def marked(self, run: Run, message: Bytes) -> Bytes:
        mode = "spinning" if run.spinning else "sleeping"
        tensor = self._messages[mode, run.nbytes]
        bytes_of(tensor)[:] = message
        stats = self._channels[mode].stats
        shared_nbytes = stats.bytes_shared
        (reply,) = self._channels[mode].call("mark", tensor)
        by_reference = self._channels[mode].stats.bytes_shared > shared_nbytes
        if by_reference is not self.shm:
            raise ConnectionError(f"the tensor {'crossed' if by_reference else 'did not cross'} by reference")
        return bytes_of(reply).copy()

    def release(self, nbytes: int) -> None:
        for mode in self._channels:
            del self._messages[mode, nbytes]

    def close(self) -> None:
        self._messages.clear()
        for channel in self._channels.values():
            channel.close()


class ShmTorchPeer(_CallPeer):
    shm, arrays = True, "torch"


class ShmTorchClient(_CallClient):
    shm, arrays = True, "torch"


class ShmNumpyPeer(_CallPeer):
    shm, arrays = True, "numpy"


class ShmNumpyClient(_CallClient):
    shm, arrays = True, "numpy"


class UnixTorchPeer(_CallPeer):
    shm, arrays = False, "torch"


class UnixTorchClient(_CallClient):
    shm, arrays = False, "torch"


class UnixNumpyPeer(_CallPeer):
    shm, arrays = False, "numpy"


class UnixNumpyClient(_CallClient):
    shm, arrays = False, "numpy"
