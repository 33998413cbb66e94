"""Both sides of a mixed load in shared memory, where every byte is verified: for test_shm_soak.py and test_kill.py.

As a process: `soak.py server URI numpy|torch SPIN_US` or `soak.py client URI numpy|torch SPIN_US`. It prints READY, and
goes on until its standard input ends.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import queue
import random
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastsplit
from fastsplit.schema.dtypes import BY_NAME

MAX_NBYTES = 4 * 1024**2
HELD_NBYTES = 8 * 1024**2
"""What a thread holds of results at most."""
DTYPES = ("uint8", "int16", "float16", "bfloat16", "float32", "int64", "float64", "complex128", "bool", "float8_e5m2")
PATTERN = np.random.default_rng(1).integers(0, 256, 9 * 1024**2, np.uint8)
"""What tensors are filled with, from an offset on that both sides know."""


def fill(tensor: Any, offset: int) -> None:
    flat = memory_of(tensor)
    flat[:] = PATTERN[offset : offset + flat.size]


def holds(tensor: Any, offset: int) -> bool:
    """Whether every byte of a tensor is as it was filled."""
    flat = memory_of(tensor)
    return bool((flat == PATTERN[offset : offset + flat.size]).all())


def memory_of(tensor: Any) -> np.ndarray[Any, Any]:
    """A contiguous tensor's bytes, numpy's or torch's."""
    if isinstance(tensor, np.ndarray):
        return tensor.reshape(-1).view(np.uint8)
    import torch

    memory: np.ndarray[Any, Any] = tensor.reshape(-1).view(torch.uint8).numpy()
    return memory


def resident_nbytes() -> int:
    """Memory of this process, its own and shared, but for files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


class Handlers:
    def __init__(self) -> None:
        self._kept: deque[tuple[Any, int]] = deque()
        self._lock = threading.Lock()
        self._random = random.Random(1)

    def echo(self, call: fastsplit.Call) -> Any:
        """Back by reference, whole."""
        self._check(call)
        return call.tensors

    def part(self, call: fastsplit.Call) -> Any:
        """Back by reference, but for the first and the last quarter."""
        self._check(call)
        (tensor,) = call.tensors
        flat = tensor.reshape(-1)
        return flat[len(flat) // 4 : len(flat) - len(flat) // 4]

    def copy(self, call: fastsplit.Call) -> Any:
        """Out of memory that is not shared."""
        self._check(call)
        return [np.array(memory_of(tensor)) for tensor in call.tensors]

    def make(self, call: fastsplit.Call) -> Any:
        """In memory of the server's."""
        made = call.empty(call.attrs["count"], call.attrs["dtype"])
        fill(made, call.attrs["offset"])
        return made

    def keep(self, call: fastsplit.Call) -> None:
        """Held for a random time, and looked at again then."""
        self._check(call)
        with self._lock:
            self._kept.extend((tensor, call.attrs["offset"]) for tensor in call.tensors)
            while len(self._kept) > 16 or (self._kept and self._random.random() < 0.5):
                tensor, offset = self._kept.popleft()
                assert holds(tensor, offset), "a tensor changed while it was kept"

    @staticmethod
    def wait(call: fastsplit.Call) -> None:
        """Answers late, or never."""
        time.sleep(call.attrs["seconds"])

    def settle(self, call: fastsplit.Call) -> None:
        """Drops all, and says what is in use."""
        with self._lock:
            self._kept.clear()
        gc.collect()
        arena = call._served.core.connection.arena
        assert arena is not None
        in_use, segments = arena.in_use_nbytes, arena.nbytes
        arena.trim(0.0)
        call.reply_attrs = {"in_use": in_use, "segments": segments, "resident": resident_nbytes()}

    @staticmethod
    def _check(call: fastsplit.Call) -> None:
        for tensor in call.tensors:
            assert holds(tensor, call.attrs["offset"]), "a tensor changed on its way"

    def table(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("echo", "part", "copy", "make", "keep", "wait", "settle")}


class Worker:
    """One thread's calls. Results are held for a random time, as they are or as a view of a view, and verified again
    when they are dropped, some of them in another thread."""

    def __init__(self, channel: fastsplit.Channel, kind: str, seed: int, dropped: queue.SimpleQueue[Any]) -> None:
        self._channel = channel
        self._kind = kind
        self._random = random.Random(seed)
        self._dropped = dropped
        self._held: list[tuple[Any, int]] = []
        self._held_nbytes = 0
        self.calls = 0

    def run(self, calls: int | None = None) -> None:
        """So many calls, or calls until one fails."""
        try:
            for _ in itertools.count() if calls is None else range(calls):
                self._call()
        finally:
            while self._held:
                self._drop()

    def _call(self) -> None:
        chance = self._random
        dtype = chance.choice(DTYPES)
        itemsize = BY_NAME[dtype].itemsize
        count = max(int(MAX_NBYTES ** chance.random()) // itemsize, 1)
        offset = chance.randrange(1024**2)
        op = chance.choice(("echo", "echo", "part", "copy", "make", "keep"))
        if op == "make":
            (result,) = self._channel.call(op, count=count, dtype=dtype, offset=offset)
            assert result.dtype == self._channel.empty(0, dtype).dtype
        else:
            if self._held and chance.random() < 0.2:  # what came goes again: it is the server's, or ours
                tensor, offset = chance.choice(self._held)
                count, itemsize = len(tensor), tensor.itemsize
            else:
                tensor = self._tensor(count, dtype, offset)
            results = self._channel.call(op, tensor, offset=offset)
            assert len(results) == (op != "keep")
            if op == "keep":
                results = (tensor,)  # which the server holds, too
            (result,) = results
            if op == "part":
                assert len(result) == count - 2 * (count // 4)
                offset += count // 4 * itemsize
        self.calls += 1
        assert holds(result, offset), op
        self._hold(result, offset, itemsize if op != "copy" else 1)
        while self._held_nbytes > HELD_NBYTES or (self._held and chance.random() < 0.4):
            self._drop()

    def _tensor(self, count: int, dtype: str, offset: int) -> Any:
        tensor = self._channel.empty(count, dtype)
        if self._random.random() < 0.25:  # in memory that is not shared
            tensor = tensor.copy() if self._kind == "numpy" else tensor.clone()
        fill(tensor, offset)
        return tensor

    def _hold(self, result: Any, offset: int, itemsize: int) -> None:
        flat = result.reshape(-1)
        if self._random.random() < 0.3:  # a view of a view, and nothing else
            start = len(flat) // 3
            flat, offset = flat[start:][: len(flat) // 2], offset + start * itemsize
        self._held.append((flat, offset))
        self._held_nbytes += memory_of(flat).nbytes

    def _drop(self) -> None:
        tensor, offset = self._held.pop(self._random.randrange(len(self._held)))
        self._held_nbytes -= memory_of(tensor).nbytes
        assert holds(tensor, offset), "a result changed while it was held"
        if self._random.random() < 0.3:
            self._dropped.put(tensor)


@contextlib.contextmanager
def soak_process(side: str, uri: str, arrays: str = "numpy", spin_us: float = 50.0) -> Iterator[subprocess.Popen[str]]:
    """One side in a process of its own, which the caller may kill."""
    command = [sys.executable, __file__, side, uri, arrays, str(spin_us)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == "READY\n"
            yield process
            process.stdin.close()
            assert process.wait(10) in (0, -9)
        finally:
            process.kill()


def main() -> None:
    side, uri, arrays, spin_us = sys.argv[1:]
    if side == "server":
        with fastsplit.Server(uri, Handlers().table(), arrays=arrays, spin_us=float(spin_us)):
            print("READY", flush=True)
            sys.stdin.read()
        return
    channel = fastsplit.connect(uri, arrays=arrays, spin_us=float(spin_us))
    dropped: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for seed in range(2):
        threading.Thread(target=Worker(channel, arrays, seed, dropped).run, daemon=True).start()
    print("READY", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
