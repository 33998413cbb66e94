"""Either side is killed at random moments under load: the other notices at once, goes on, and nothing is left behind.

`FASTSPLIT_KILLS=100` kills each side so often, and prints how soon that was noticed with `-s`.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from amount import times
from soak import PATTERN, Handlers, Worker, soak_process

import fastsplit
from fastsplit.errors import ClosedError, FastsplitError, PeerLostError

KILLS = int(os.environ.get("FASTSPLIT_KILLS", "0")) or times(10, 2)
NOTICED_S = 0.1
WORST_S = 1.0
"""Where other programs want the cores too; the median must be within NOTICED_S."""
NAMES = f"/dev/shm/fastsplit-kill-{os.getpid()}"
IDLE_CPU_S = 0.005


class Waiter:
    """A thread that does something until an error ends it, and knows when that was."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.error: BaseException | None = None
        self.ended = 0.0
        self._work = work
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
        self.ended = time.monotonic()


def _report(what: str, times_s: list[float]) -> None:
    times_s.sort()
    median_s, worst_s = times_s[len(times_s) // 2], times_s[-1]
    print(f"\n{what}: {len(times_s)} noticed, median {median_s * 1e3:.1f} ms, worst {worst_s * 1e3:.1f} ms")
    assert median_s < NOTICED_S
    assert worst_s < WORST_S


def _connections(uri: str) -> Iterator[tuple[str, float]]:
    """URIs and spinning times of several kinds of clients: memfd and ring, asleep and spinning; names."""
    yield uri, 0.0
    yield uri, 1e6
    yield f"{uri}?shm={NAMES}", 0.0


@pytest.mark.timeout(900)
@pytest.mark.matrix
@pytest.mark.parametrize("doing", ["waiting", "busy"])
def test_a_server_is_killed(unix_uri: str, doing: str) -> None:
    """Threads that wait for an answer, asleep or spinning, and such as call without end."""
    chance = random.Random(KILLS)
    times_s: list[float] = []
    for _ in range(max(KILLS // 2, 1)):
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(soak_process("server", unix_uri))
            waiters = []
            for seed, (uri, spin_us) in enumerate(_connections(unix_uri)):
                channel = stack.enter_context(fastsplit.connect(uri, arrays="numpy", spin_us=spin_us))
                assert channel.shm
                if doing == "waiting":
                    works = [lambda channel=channel: channel.call("wait", seconds=60)] * 2
                else:
                    works = [Worker(channel, "numpy", seed, _Dropped()).run] * 2
                waiters += [Waiter(work) for work in works]
            time.sleep(0.02 + chance.random() * 0.1)
            assert all(waiter.thread.is_alive() for waiter in waiters), [waiter.error for waiter in waiters]
            killed = time.monotonic()
            server.kill()
            for waiter in waiters:
                waiter.thread.join(10)
                assert isinstance(waiter.error, (PeerLostError, ClosedError)), waiter.error
                times_s.append(waiter.ended - killed)
    _report(f"server killed, clients {doing}", times_s)
    _nothing_is_left(unix_uri)


class _Dropped:
    """Where a Worker puts what another thread shall drop: nowhere."""

    def put(self, _: Any) -> None:
        pass


@pytest.mark.timeout(900)
@pytest.mark.matrix
@pytest.mark.parametrize("spin_us", [0.0, 1e6], ids=["asleep", "spinning"])
def test_a_client_is_killed(unix_uri: str, spin_us: float) -> None:
    """The server ends that connection at once, and goes on serving the others with right answers."""
    chance = random.Random(KILLS)
    times_s: list[float] = []
    with fastsplit.Server(unix_uri, Handlers().table(), arrays="numpy", spin_us=spin_us) as server:
        with fastsplit.connect(unix_uri, arrays="numpy") as bystander:
            stop = threading.Event()

            def go_on() -> None:
                worker = Worker(bystander, "numpy", 1, _Dropped())
                while not stop.is_set():
                    worker.run(10)

            other = Waiter(go_on)
            try:
                for _ in range(max(KILLS // 2, 1)):
                    uri = chance.choice([unix_uri, f"{unix_uri}?shm={NAMES}"])
                    with soak_process("client", uri, "numpy", spin_us) as client:
                        time.sleep(chance.random() * 0.1)
                        assert server.connections == 2
                        killed = time.monotonic()
                        client.kill()
                        while server.connections > 1:
                            assert time.monotonic() < killed + 10
                            time.sleep(0.0005)
                        times_s.append(time.monotonic() - killed)
            finally:
                stop.set()
                other.thread.join(10)
            assert other.error is None
            assert not bystander.closed
    _report(f"client killed, server {'spinning' if spin_us else 'asleep'}", times_s)
    _nothing_is_left(unix_uri)


def _nothing_is_left(unix_uri: str) -> None:
    """Names that a killed process had not told the other of are removed by the next who use the prefix."""
    for name in _names():  # younger ones may be about to be locked
        with contextlib.suppress(FileNotFoundError):
            os.utime(f"/dev/shm/{name}", (time.time() - 1.1,) * 2)
    with fastsplit.Server(unix_uri, {}), fastsplit.connect(f"{unix_uri}?shm={NAMES}") as channel:
        assert "segments named" in channel.shm_reason
    assert _names() == []


def _names() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if NAMES.rpartition("/")[2] in name]


def _cpu_s(pid: int | None = None) -> float:
    if pid is None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime
    # nanoseconds on a processor, of each thread: /proc/PID/stat counts whole ticks only
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) * 1e-9


def test_an_idle_connection_uses_no_processor(socket_dir: Path) -> None:
    """After it was busy: neither side looks for anything while nothing is asked, however long it spins."""
    with contextlib.ExitStack() as stack:
        servers, channels = {}, []
        for spin_us in (0.0, 50.0, 1000.0):
            uri = f"unix://{socket_dir}/{spin_us}"
            servers[spin_us] = stack.enter_context(soak_process("server", uri, "numpy", spin_us))
            channels.append(stack.enter_context(fastsplit.connect(uri, arrays="numpy", spin_us=spin_us)))
            assert channels[-1].shm
            for _ in range(500):
                channels[-1].call("copy", np.frombuffer(PATTERN[:1000], np.uint8), offset=0)
        time.sleep(0.1)
        before_s = {None: _cpu_s(), **{spin_us: _cpu_s(server.pid) for spin_us, server in servers.items()}}
        time.sleep(2)
        used_s = {None: _cpu_s(), **{spin_us: _cpu_s(server.pid) for spin_us, server in servers.items()}}
        for channel in channels:
            assert channel.call("wait", seconds=0) == ()
    for which, after_s in used_s.items():
        assert after_s - before_s[which] < IDLE_CPU_S, "the clients" if which is None else f"server, spin_us={which}"


def test_a_channel_that_waits_uses_no_processor(unix_uri: str) -> None:
    """Asleep in a call, and not looking whether the peer is there."""
    with soak_process("server", unix_uri, "numpy", 0.0), fastsplit.connect(unix_uri, spin_us=50) as channel:
        for _ in range(500):
            channel.call("wait", seconds=0)
        before_s = _cpu_s()
        channel.call("wait", seconds=2)
        assert _cpu_s() - before_s < IDLE_CPU_S


def test_the_kill_tests_can_fail(unix_uri: str) -> None:
    """The load verifies what it gets."""
    handlers = Handlers().table()
    handlers["echo"] = lambda call: [np.zeros_like(tensor) for tensor in call.tensors]
    with fastsplit.Server(unix_uri, handlers, arrays="numpy"), fastsplit.connect(unix_uri, arrays="numpy") as channel:
        with pytest.raises(AssertionError, match="echo"):
            Worker(channel, "numpy", 1, _Dropped()).run(1000)
    with fastsplit.Server(unix_uri, handlers, arrays="numpy"), fastsplit.connect(unix_uri, arrays="numpy") as channel:
        made = channel.empty(100, "uint8")
        made[:] = 0
        with pytest.raises(FastsplitError, match="a tensor changed on its way"):
            channel.call("keep", made, offset=0)
