"""Shared memory where it is hardest: short of room, in several threads, interrupted, closed, forked, collected."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from soak import Handlers

import fastsplit
from fastsplit.errors import ArenaFull, ClosedError, FastsplitError, RemoteOpError

MIB = 1024**2
HANDLERS: dict[str, Callable[[fastsplit.Call], Any]] = {
    "echo": lambda call: call.tensors,
    "sum": lambda call: np.array(sum(float(x.sum()) for x in call.tensors)),
    "make": lambda call: call.empty(call.attrs["nbytes"], "uint8"),
    **{name: handler for name, handler in Handlers().table().items() if name in ("wait", "settle")},
}


@pytest.fixture
def limits() -> fastsplit.Limits:
    return fastsplit.Limits()


@pytest.fixture
def server(unix_uri: str, limits: fastsplit.Limits) -> Iterator[fastsplit.Server]:
    with fastsplit.Server(unix_uri, HANDLERS, arrays="numpy", limits=limits) as server:
        yield server


def _in_use(channel: fastsplit.Channel) -> tuple[int, int]:
    """Bytes that are held of the client's and the server's memory, once all returns are made."""
    gc.collect()
    channel.call("settle")
    said = channel.call("settle").attrs["in_use"]
    arena = channel._connection.arena
    assert arena is not None
    return arena.in_use_nbytes, said


def _together(*works: Callable[[], Any]) -> None:
    failures: list[BaseException] = []

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


# ---- room ------------------------------------------------------------------------------------------------------------


def test_many_new_segments_at_once(server: fastsplit.Server) -> None:
    """Their descriptors wait in the socket, while the server is asleep and while it works."""
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
        for busy in (False, True):
            tensors = [channel.empty(MIB * 2**n, "uint8") for n in range(1, 7 - busy)]
            for n, tensor in enumerate(tensors):
                tensor[:] = n
            waiting = channel.submit("wait", seconds=0.2) if busy else None
            time.sleep(0.05)
            back = channel.call("echo", *tensors)
            assert [int(x[0]) for x in back] == [int(x[-1]) for x in back] == list(range(len(tensors)))
            if waiting is not None:
                waiting.result()
            del tensors, tensor, back
            channel.call("sum")
            channel.trim()


@pytest.mark.parametrize("limits", [fastsplit.Limits(max_shared_nbytes=8 * MIB, max_segments=4)])
def test_unused_segments_of_another_size_make_room(server: fastsplit.Server) -> None:
    """The old ones are given up before the new ones are announced: never more than the server accepts."""
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=5) as channel:
        for size in (3, 6, 2, 7, 1, 8, 3):
            x = channel.empty(size * MIB, "uint8")
            x[:] = size
            assert channel.call("sum", x)[0] == size * size * MIB
            del x
            channel.call("sum")
        with pytest.raises(ArenaFull, match=f"{9 * MIB} bytes of shared memory: 0 bytes in 0 segments"):
            channel.empty(9 * MIB, "uint8")
        assert channel.call("sum", np.ones(3))[0] == 3


@pytest.mark.parametrize("limits", [fastsplit.Limits(max_shared_nbytes=2 * MIB)])
def test_both_sides_are_full_at_once(server: fastsplit.Server) -> None:
    """Each waits for its deadline and no longer; and both go on when there is room again."""
    own = fastsplit.Limits(max_shared_nbytes=2 * MIB)
    with fastsplit.connect(server.uri, arrays="numpy", limits=own, call_timeout_s=5) as channel:
        mine = channel.empty(2 * MIB, "uint8")
        (theirs,) = channel.call("make", nbytes=2 * MIB)
        started = time.monotonic()

        def full_here() -> None:
            with pytest.raises(ArenaFull):
                channel.empty(MIB, "uint8", timeout_s=0.5)

        def full_there() -> None:
            with pytest.raises((RemoteOpError, fastsplit.DeadlineError)):
                channel.call("make", nbytes=MIB, timeout_s=0.5)

        _together(full_here, full_there, full_here, full_there)
        assert 0.4 < time.monotonic() - started < 3

        def drop() -> None:
            nonlocal mine, theirs
            time.sleep(0.1)
            del mine, theirs

        def room_here() -> None:
            channel.empty(MIB, "uint8", timeout_s=5)

        def room_there() -> None:
            assert channel.call("make", nbytes=MIB, timeout_s=5)[0].nbytes == MIB

        started = time.monotonic()
        _together(drop, room_here, room_there)
        assert time.monotonic() - started < 2
        assert _in_use(channel) == (0, 0)


def test_a_ring_that_is_full_both_ways(server: fastsplit.Server) -> None:
    """Frames of several slots, from several threads, while answers of several slots come."""
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=20) as channel:

        def flood() -> None:
            futures = [channel.submit("absent", text="x" * 5000) for _ in range(200)]
            for future in futures:
                with pytest.raises(RemoteOpError, match="no such operation"):
                    future.result()

        def small() -> None:
            for n in range(200):
                assert channel.call("sum", np.full(3, n))[0] == 3 * n

        _together(flood, small, flood, small)
        assert _in_use(channel) == (0, 0)


class Caller(threading.Thread):
    """Calls until an error ends it."""

    def __init__(self, channel: fastsplit.Channel, seed: int) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self._channel = channel
        self._random = random.Random(seed)

    def run(self) -> None:
        chance = self._random
        try:
            while True:
                size = int(4 * MIB ** chance.random())
                x = self._channel.empty(size, "uint8") if chance.random() < 0.5 else np.empty(size, np.uint8)
                self._channel.call(chance.choice(["echo", "sum"]), x)
        except BaseException as error:
            self.error = error


# ---- the end, at awkward moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["client", "server"])
def test_closing_while_others_call(unix_uri: str, who: str) -> None:
    """They get an error of ours, whatever they were at: allocating, copying, announcing, waiting."""
    for nth in range(20):
        server = fastsplit.Server(unix_uri, HANDLERS, arrays="numpy").start()
        channel = fastsplit.connect(unix_uri, arrays="numpy", call_timeout_s=10)
        waiters = [Caller(channel, seed) for seed in range(3)]
        for waiter in waiters:
            waiter.start()
        time.sleep(0.005 + 0.002 * nth)
        (channel if who == "client" else server).close()
        for waiter in waiters:
            waiter.join(10)
            assert not waiter.is_alive()
            assert isinstance(waiter.error, FastsplitError), waiter.error
        channel.close()
        server.close()


@pytest.mark.parametrize("limits", [fastsplit.Limits(max_shared_nbytes=MIB)])
def test_closing_while_others_wait_for_memory(server: fastsplit.Server) -> None:
    channel = fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=20)
    held = channel.empty(MIB, "uint8")

    def wait() -> None:
        with pytest.raises((ArenaFull, ClosedError)):
            channel.empty(MIB, "uint8")

    def call() -> None:
        with pytest.raises(ClosedError):
            channel.call("sum", np.ones(100_000))

    def close() -> None:
        time.sleep(0.1)
        channel.close()

    started = time.monotonic()
    _together(wait, wait, call, close)
    assert time.monotonic() - started < 2
    held[:] = 3  # it is ours, whatever became of the connection
    assert held.sum(dtype=np.int64) == 3 * MIB


def test_interrupted_anywhere(server: fastsplit.Server) -> None:
    """As by Ctrl-C: the channel goes on or is closed, and neither hangs nor lets anybody else wait."""
    chance = random.Random(1)
    interrupts = 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    channel = fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=5)
    channel.call("sum", np.ones(5))
    try:
        for _ in range(300):
            late = threading.Timer(chance.random() * 1e-3, os.kill, (os.getpid(), signal.SIGUSR1))
            try:
                late.start()
                while True:
                    x = channel.empty(1000, "float32")
                    x[:] = 1
                    assert channel.call("sum", x, np.ones(10))[0] == 1010
            except KeyboardInterrupt:
                interrupts += 1
            except ClosedError as error:
                pytest.fail(f"closed before it was interrupted: {error}")
            late.join()
            try:
                assert channel.call("sum", np.ones(5))[0] == 5
            except ClosedError:
                channel.close()
                channel = fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=5)
                # With a segment: an interrupt while one is made may cost a descriptor, which Python cannot rule out.
                channel.call("sum", np.ones(5))
        assert interrupts == 300
    finally:
        signal.signal(signal.SIGUSR1, before)
        channel.close()


def test_results_that_die_inside_a_collection(server: fastsplit.Server) -> None:
    """The collector runs at any allocation, inside any lock of ours, and in any thread."""
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
        threshold = gc.get_threshold()
        gc.set_threshold(3, 2, 2)
        try:

            def work() -> None:
                for n in range(150):
                    results = list(channel.call("echo", np.full(1000, n), channel.empty(n + 1)))
                    results.append(results)  # only the collector can see that this is dead
                    assert (results[0] == n).all()

            _together(work, work, work)
        finally:
            gc.set_threshold(*threshold)
        assert _in_use(channel) == (0, 0)


@pytest.mark.parametrize("named", [False, True], ids=["memfd", "named"])
def test_a_channel_that_is_never_closed(unix_uri: str, named: bool) -> None:
    """It is collected with all that it had: its descriptors (conftest.py looks), and the server notices."""
    uri = f"{unix_uri}?shm=/dev/shm/fastsplit-lost-{os.getpid()}" if named else unix_uri
    with fastsplit.Server(uri, HANDLERS, arrays="numpy") as server, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        channel = fastsplit.connect(uri, arrays="numpy")
        (y,) = channel.call("echo", np.arange(10))
        x = channel.empty(100)  # in a segment that is there
        del channel
        deadline = time.monotonic() + 5
        while server.connections:
            gc.collect()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    x[:] = 1
    assert y.sum() == 45


def test_a_forked_child_does_no_harm(server: fastsplit.Server) -> None:
    """What it drops is the parent's: it says nothing, and its end is nobody's end."""
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
        x = channel.empty(1000, "float32")
        x[:] = 2
        (y,) = channel.call("echo", x)
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                del x
                y[:] = 3  # the same memory, as for any process that shares it
                del y
                gc.collect()
                code = 0
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert (x == 3).all()
        assert channel.call("sum", x)[0] == 3000
        del x, y
        assert _in_use(channel) == (0, 0)


def test_results_that_outlive_the_interpreter(unix_uri: str) -> None:
    """Nothing is printed when tensors, channels and servers die in the order in which modules do."""
    code = f"""
import numpy as np, fastsplit, gc
server = fastsplit.Server({unix_uri!r}, {{"echo": lambda call: call.tensors}}).start()
channel = fastsplit.connect({unix_uri!r})
kept = [channel.call("echo", np.ones(1000)), channel.empty(5)]
kept.append(kept)
class Late:
    def __del__(self, kept=kept): kept.clear()
late = Late()
gc.disable()
print(channel.shm)
channel.close()
server.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_callbacks_may_drop_and_submit(server: fastsplit.Server) -> None:
    """A callback runs in the thread that reads: it may send, but not wait."""
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
        second: list[fastsplit.Future] = []
        future = channel.submit("echo", np.ones(1000))
        future.add_done_callback(lambda done: second.append(channel.submit("echo", done.result()[0])))
        future.result()
        assert second[0].result()[0].sum() == 1000
        del future
        second.clear()
        assert _in_use(channel) == (0, 0)
