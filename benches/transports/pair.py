"""A transport's two ends, and the benchmark's side of the conversation with the peer's process."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benches.processes import Process
from benches.rounds import progress

from . import TRANSPORTS, Bytes, Client, Run, load

__all__ = ["ANSWER_S", "Figures", "Pair", "answering", "open_pairs", "raw_bytes_per_s"]

ANSWER_S = 60.0
"""How long a pair may take to start, or for what it is asked to do."""

_NEEDS_DEV_SHM = ("shared_block", "torch_tensors", "iceoryx")
_OF_A_MESSAGE = 4  # how many times its size one of them has there at most
_MARGIN_NBYTES = 64 * 1024**2


@dataclass(frozen=True)
class Figures:
    """What a run took. `trips_ns`: each round trip."""

    wall_s: float
    client_cpu_s: float
    peer_cpu_s: float
    trips_ns: list[float]


class Pair:
    """A transport's two ends: the client here, the peer in a process of its own."""

    client: Client

    def __init__(self, name: str, cpu: int | None) -> None:
        self.name = name
        self._places: dict[int, str] = {}
        load(name, "Client")  # raises before a process is started
        options = [] if cpu is None else ["--cpu", str(cpu)]
        self._process = Process("benches.transports.peer", name, *options, wait=False)

    @property
    def pid(self) -> int:
        """The peer's."""
        return self._process.pid

    def connect(self) -> None:
        self._process.wait_ready()
        self.client = load(self.name, "Client")(json.loads(self._process.ready))

    def close(self) -> None:
        self._process.close()
        if hasattr(self, "client"):
            self.client.close()

    def kill(self) -> None:
        """Ends the peer at once, so that who waits for it hears of it, and nothing of it runs beside others."""
        self._process.kill()

    def takes(self, nbytes: int, mode: str, one_way: bool = False) -> bool:
        """Whether it has that. One way it is measured in its first mode alone."""
        client = self.client
        if nbytes > client.most_nbytes:
            return False
        return client.has_one_way and mode == client.modes[0] if one_way else mode in client.modes

    def prepare(self, nbytes: int) -> None:
        self._places[nbytes] = self.client.prepare(nbytes)

    def release(self, nbytes: int) -> None:
        self._places.pop(nbytes)
        self.client.release(nbytes)

    def run(self, nbytes: int, mode: str, count: int) -> Figures:
        """`count` round trips."""
        with self._serving(self._run(nbytes, mode, count)) as served:
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            trips_ns = self.client.trips(self._run(nbytes, mode, count))
            wall_s = time.perf_counter() - wall_s
            cpu_s = time.process_time() - cpu_s
        return Figures(wall_s, cpu_s, served["cpu_s"], trips_ns)

    def push(self, message: Bytes, mode: str, count: int, *, mark: bool = False) -> Figures:
        """`message` one way, `count` times. Ends the benchmark if another number of messages came, or, with `mark`,
        if the last one is not what was sent."""
        run = self._run(message.nbytes, mode, count, one_way=True, mark=mark)
        with self._serving(run) as served:
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            self.client.push(run, message)
            wall_s = time.perf_counter() - wall_s
            cpu_s = time.process_time() - cpu_s
        if served["taken"] != count:
            raise SystemExit(f"{self.name}, one way: {served['taken']} messages came, expected {count}")
        if mark and not self.client.checks_itself and served["crc32"] != zlib.crc32(message):
            raise SystemExit(f"{self.name}, {message.nbytes} bytes one way: what came is not what was sent")
        return Figures(wall_s, cpu_s, served["cpu_s"], [])

    def check(self, nbytes: int, mode: str) -> None:
        """Sends bytes, and ends the benchmark if others come back than those, each with one added by the peer."""
        message = np.frombuffer(np.random.default_rng(nbytes).bytes(nbytes), np.uint8)
        run = self._run(nbytes, mode, 1, mark=True)
        with self._serving(run):
            reply = self.client.marked(run, message)
        if not np.array_equal(reply, message + np.uint8(1)):
            raise SystemExit(f"{self.name}, {nbytes} bytes, {mode}: the reply is not what it should be")

    def _run(self, nbytes: int, mode: str, count: int, *, one_way: bool = False, mark: bool = False) -> Run:
        return Run(nbytes, count, mode == "spinning", one_way, mark, self._places[nbytes])

    @contextmanager
    def _serving(self, run: Run) -> Iterator[dict[str, float]]:
        """The peer at work; what it says at the end is there at the end."""
        self._process.write_line(json.dumps(asdict(run)))
        self._expect("go")
        served: dict[str, float] = {}
        yield served
        self._process.write_line("end")
        served.update(json.loads(self._expect()))

    def _expect(self, word: str = "") -> str:
        line = self._process.read_line().strip()
        if not line or (word and line != word):
            raise RuntimeError(f"{self.name}: the peer wrote {line!r}")
        return line


@contextmanager
def answering(pair: Pair, within_s: float = ANSWER_S) -> Iterator[None]:
    """TimeoutError if what is inside takes longer. Where a library waits outside of Python, the end of its peer is what
    wakes it. Only in the main thread, which receives signals."""

    def too_late(*_: object) -> None:
        raise TimeoutError(f"no answer within {within_s:g} s")

    began_s = time.monotonic()
    before = signal.signal(signal.SIGALRM, too_late)
    before_s, _ = signal.setitimer(signal.ITIMER_REAL, within_s)  # a test may have set the timer before
    killer = threading.Timer(within_s + 1, pair.kill)
    killer.daemon = True
    killer.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if before_s:
            signal.setitimer(signal.ITIMER_REAL, max(before_s - (time.monotonic() - began_s), 1e-3))
        killer.cancel()


def open_pairs(
    stack: ExitStack, names: list[str], cpu: int | None, most_nbytes: int, within_s: float = ANSWER_S
) -> tuple[dict[str, Pair], dict[str, str]]:
    """The pairs, each with its peer on `cpu`, and why others are not there. `most_nbytes`: what will be sent. A pair
    that takes longer than `within_s` to start is killed and left out."""
    starting, left_out = {}, {}
    needed_nbytes = 0
    room_nbytes = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    for name in names:
        if TRANSPORTS[name].module in _NEEDS_DEV_SHM:
            needed_nbytes += _OF_A_MESSAGE * most_nbytes
            if room_nbytes < needed_nbytes + _MARGIN_NBYTES:
                left_out[name] = f"{room_nbytes} bytes free in /dev/shm, expected {needed_nbytes + _MARGIN_NBYTES}"
                continue
        try:
            starting[name] = Pair(name, cpu)
        except ImportError as error:
            left_out[name] = str(error)
            continue
        stack.callback(starting[name].close)
    pairs = {}
    for name, pair in starting.items():
        try:
            with answering(pair, within_s):
                pair.connect()
        except Exception as error:  # noqa: BLE001 - zmq, gRPC, Arrow: each has errors of its own
            left_out[name] = str(error)
            pair.kill()
        else:
            pairs[name] = pair
    for name, reason in left_out.items():
        progress(f"left out: {name}: {reason}")
    return pairs, left_out


_RAW = {"unix": "unix: raw socket, 2 MiB buffer", "tcp": "tcp: raw socket"}


def raw_bytes_per_s(link: str, *, quick: bool = False) -> float:
    """The floor: the rate of a bare sendall / recv_into loop over "unix" or "tcp", the better of messages beyond a
    cache (128 MiB) and of those that may be in one (8 MiB). `quick`: the latter alone, to a tenth or two."""
    rates = []
    with ExitStack() as stack:
        pairs, left_out = open_pairs(stack, [_RAW[link]], None, 0)
        if left_out:
            raise RuntimeError(f"{link}: {left_out}")
        (pair,) = pairs.values()
        for nbytes, count in ((8 * 1024**2, 32),) if quick else ((8 * 1024**2, 256), (128 * 1024**2, 16)):
            pair.prepare(nbytes)
            message = np.ones(nbytes, np.uint8)
            pair.push(message, "sleeping", count // 8)
            rates.append(nbytes * count / pair.push(message, "sleeping", count).wall_s)
    return max(rates)
