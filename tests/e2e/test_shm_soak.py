"""Shared memory under a long mixed load: every byte is verified, all memory comes back, and the processes do not grow.

`FASTSPLIT_SOAK_CALLS=100000` makes it long, and prints its figures with `-s`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import threading
import time
from typing import Any

import numpy as np
import pytest
from amount import times
from soak import MAX_NBYTES, PATTERN, Worker, resident_nbytes, soak_process

import fastsplit

CALLS = int(os.environ.get("FASTSPLIT_SOAK_CALLS", "0")) or times(3000)
KINDS = ("numpy", "numpy", "torch")
"""Of the channels, each with THREADS threads."""
THREADS = 2
MIB = 1024**2


def _run(workers: list[Worker], dropped: queue.SimpleQueue[Any], calls: int) -> None:
    failures: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            worker.run(calls // len(workers))
        except BaseException as error:
            failures.append(error)

    def drop() -> None:
        while dropped.get() is not None:
            pass

    dropper = threading.Thread(target=drop)
    dropper.start()
    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dropped.put(None)
    dropper.join()
    if failures:
        raise failures[0]


def _settle(channels: list[fastsplit.Channel]) -> tuple[int, int]:
    """Resident bytes of the server and of this process, once nothing is in use and all segments were given up."""
    gc.collect()
    said: dict[str, Any] = {}
    for channel in channels:
        channel.call("settle")
        said = channel.call("settle").attrs
        assert said["in_use"] == 0, "the server's memory has all come back"
        arena = channel._connection.arena
        assert arena is not None
        assert arena.in_use_nbytes == 0, "and the client's"
        channel.trim()
        channel.call("settle")  # tells the server
    for channel in channels:  # the first one's segments are gone only now
        said = channel.call("settle").attrs
    return said["resident"], resident_nbytes()


@pytest.mark.timeout(1800)
@pytest.mark.matrix
@pytest.mark.parametrize("server_kind", ["numpy", "torch"])
def test_soak(unix_uri: str, server_kind: str) -> None:
    calls = CALLS // 2  # of each kind of server
    with soak_process("server", unix_uri, server_kind), contextlib.ExitStack() as stack:
        channels = [stack.enter_context(fastsplit.connect(unix_uri, arrays=kind, call_timeout_s=60)) for kind in KINDS]
        assert all(channel.shm for channel in channels)
        dropped: queue.SimpleQueue[Any] = queue.SimpleQueue()
        workers = [
            Worker(channel, kind, seed, dropped)
            for seed, (channel, kind) in enumerate(zip(channels * THREADS, KINDS * THREADS))
        ]
        started = time.monotonic()
        _run(workers, dropped, calls // 2)
        half = _settle(channels)
        _run(workers, dropped, calls // 2)
        end = _settle(channels)
        took_s = time.monotonic() - started
        done = sum(worker.calls for worker in workers)
        shared_nbytes = sum(channel.stats.bytes_shared for channel in channels)
        names = [f"{name} {a / MIB:.0f} -> {b / MIB:.0f} MiB" for name, a, b in zip(("server", "client"), half, end)]
        print(f"\n{done} calls in {took_s:.1f} s, {shared_nbytes / MIB:.0f} MiB shared; resident: {', '.join(names)}")
        assert done >= calls - 2 * len(workers)
        assert shared_nbytes > calls * 1000
        for before, after in zip(half, end):
            assert after < before * 1.1 + 24 * MIB
    assert PATTERN.nbytes >= MAX_NBYTES + MIB
    np.testing.assert_array_equal(PATTERN[:8], np.random.default_rng(1).integers(0, 256, 8, np.uint8))
