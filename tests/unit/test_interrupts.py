"""Ctrl-C, and whatever else a signal's handler raises: the call that waits ends; only an interrupted send ends more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from anywhere import Anywhere, traces_instructions

import fastsplit
from fastsplit.errors import ClosedError, DeadlineError
from fastsplit.wire.shm import ring, slots


class Gate:
    """A handler that waits until it is let through, or its caller gives up."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.gave_up = threading.Event()

    def __call__(self, call: fastsplit.Call) -> Any:
        deadline = time.monotonic() + 20
        while not self.opened.wait(0.005):
            assert time.monotonic() < deadline
            if call.cancelled:
                self.gave_up.set()
                return None
        return call.tensors


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def server(socket_uri: str, gate: Gate) -> Iterator[fastsplit.Server]:
    handlers = {"echo": lambda call: call.tensors, "gate": gate}
    with fastsplit.Server(socket_uri, handlers, arrays="numpy", workers=2) as server:
        yield server
        gate.opened.set()


@contextlib.contextmanager
def interrupted_after(delay_s: float) -> Iterator[None]:
    """Whatever the main thread does then is interrupted."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_an_interrupted_send_ends_the_connection(unix_uri: str, gate: Gate) -> None:
    """Half a frame is out. (In shared memory a frame is a slot, and never waits.)"""
    with fastsplit.Server(unix_uri, {"gate": gate, "echo": lambda call: call.tensors}, arrays="numpy") as server:
        with fastsplit.connect(server.uri + "?shm=off", arrays="numpy", call_timeout_s=20) as channel:
            first = channel.submit("gate")  # the server reads no further
            with interrupted_after(0.2), pytest.raises(KeyboardInterrupt):
                channel.submit("echo", np.zeros(2**28, np.uint8))
            assert channel.closed
            with pytest.raises(ClosedError, match="a send was interrupted"):
                first.result()
        gate.opened.set()


@pytest.mark.parametrize("overlap", [False, True])
def test_an_interrupted_call_is_cancelled_and_the_channel_lives_on(
    server: fastsplit.Server, gate: Gate, overlap: bool
) -> None:
    with fastsplit.connect(server.uri, arrays="numpy", overlap=overlap, call_timeout_s=20) as channel:
        x = np.arange(5)
        with interrupted_after(0.1), pytest.raises(KeyboardInterrupt):
            channel.call("gate", x)
        assert not channel.closed
        (y,) = channel.call("echo", x, timeout_s=5)
        assert np.array_equal(x, y)
        assert gate.gave_up.wait(5), "the server was told"


def test_an_interrupted_wait_for_a_future_may_be_made_again(server: fastsplit.Server, gate: Gate) -> None:
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=20) as channel:
        future = channel.submit("gate", np.arange(5))
        with interrupted_after(0.1), pytest.raises(KeyboardInterrupt):
            future.result()
        gate.opened.set()
        assert future.result(5)[0].sum() == 10


def test_other_threads_go_on(server: fastsplit.Server, gate: Gate) -> None:
    """The interrupted one may be the one that reads for all."""
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=20) as channel:
        results: list[Any] = []
        future = channel.submit("gate", np.arange(5))

        def wait() -> None:
            time.sleep(0.1)  # the main thread reads by then
            results.append(future.result(10))

        waiting = threading.Thread(target=wait)
        waiting.start()
        with interrupted_after(0.3), pytest.raises(KeyboardInterrupt):
            channel.call("gate", np.arange(5))
        gate.opened.set()
        waiting.join(10)
        assert results and results[0][0].sum() == 10


def test_a_cancelled_task_of_an_interrupted_loop(server: fastsplit.Server, gate: Gate) -> None:
    """asyncio makes a cancellation of Ctrl-C: the call is cancelled, and the channel may be used for the rest."""

    async def main() -> Any:
        async with fastsplit.aio.connect(server.uri, arrays="numpy") as channel:
            timer.start()
            try:
                await channel.call("gate", np.arange(5))
            except asyncio.CancelledError:
                asyncio.current_task().uncancel()  # type: ignore[union-attr]
                return await channel.call("echo", np.arange(5))

    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert asyncio.run(main())[0].sum() == 10
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert gate.gave_up.wait(5)


# ---- anywhere --------------------------------------------------------------------------------------------------------


def _interrupt() -> None:
    raise KeyboardInterrupt


SENDS = {"send_request", "send_behind", "_send_rest", "send_control_frames"}
TAKES_EFFECT = {"received", "received_slot", "_read_staged", "_read_frame", "_complete", "take"}


@pytest.mark.parametrize(
    "link", ["shm", "shm python", "unix", "unix python", "tcp python", "overlap", "shm watched", "unix watched"]
)
@traces_instructions
def test_interrupted_wherever_a_call_may_be(
    unix_uri: str,
    link: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    without_fast_path: Callable[[], None],
) -> None:
    """Nothing hangs, nothing is lost, and the connection ends only where a frame was sent or was taking effect.

    "watched": the channel's own thread, which the first interrupted call brings, stays, and may read the reply first.
    """
    if "python" in link:
        without_fast_path()
        monkeypatch.setattr(ring, "Slots", slots.Slots)
    uri = {"shm": unix_uri, "unix": unix_uri + "?shm=off"}.get(link.split(maxsplit=1)[0], "tcp://127.0.0.1:0")
    watched = link == "overlap" or "watched" in link
    options: dict[str, Any] = {"arrays": "numpy", "call_timeout_s": 3, "spin_us": 0, "overlap": link == "overlap"}
    step = 1 if request.config.getoption("--exhaustive") else 5
    x = np.arange(1000)
    ended: list[list[str]] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(fastsplit.Server(uri, {"echo": lambda call: call.tensors}, arrays="numpy"))

        def connect() -> fastsplit.Channel:
            channel = stack.enter_context(fastsplit.connect(server.uri, **options))
            channel.call("echo", x)
            if not watched:
                monkeypatch.setattr(channel._reader, "start_watcher", lambda: None)
            return channel

        channel = connect()
        interrupts = 0
        for n in range(0, 150 if watched else 10_000, step):
            try:
                with Anywhere(n, _interrupt) as interrupt:
                    channel.call("echo", x)
                if not watched:
                    break
            except KeyboardInterrupt:
                interrupts += 1
            except ClosedError as error:
                pytest.fail(f"{interrupt.where}: {error}")
            for _ in range(2):
                try:
                    (y,) = channel.call("echo", x)
                    assert np.array_equal(x, y)
                except ClosedError:
                    ended.append(interrupt.where)
                    channel = connect()
                except DeadlineError as error:
                    pytest.fail(f"{interrupt.where}, {interrupt.lines}: {error}")
            assert channel._session.inflight == 0 and not channel._core.calls, (interrupt.where, interrupt.lines)
    assert interrupts * step > (0 if channel._connection.fast_path is not None else 20 if watched else 50)
    for where in ended:
        assert SENDS & set(where) or TAKES_EFFECT & set(where), where
    assert len(ended) < interrupts / 3


@pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning"
)  # a channel that was never returned is closed by the collector
@pytest.mark.parametrize("overlap", [False, True])
@traces_instructions
def test_interrupted_wherever_a_connection_begins_or_ends(unix_uri: str, overlap: bool) -> None:
    """Nothing is left of one that nobody got; and one that is closed again is closed, with all that was in flight."""
    with fastsplit.Server(unix_uri, {"slow": lambda call: time.sleep(0.01)}, arrays="numpy") as server:
        for n in range(0, 10_000, 3):
            channel = future = None
            try:
                with Anywhere(n, _interrupt) as interrupt:
                    channel = fastsplit.connect(server.uri + "?shm=off", arrays="numpy", overlap=overlap)
                    future = channel.submit("slow")
                    channel.close()
            except KeyboardInterrupt:
                if channel is not None:
                    channel.close()
            assert future is None or future.done(), interrupt.where
            if not interrupt.where:
                break
        assert n > 50


def test_an_interrupted_announcement_closes_its_descriptor_once(unix_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a second one would close what has got its number meanwhile."""
    close, ours = os.close, threading.get_ident()
    closed: list[int] = []

    def close_and_interrupt(fd: int) -> None:
        close(fd)
        if threading.get_ident() == ours:
            closed.append(fd)
            if len(closed) == 1:
                raise KeyboardInterrupt

    with fastsplit.Server(unix_uri, {"echo": lambda call: call.tensors}, arrays="numpy") as server:
        with fastsplit.connect(server.uri, arrays="numpy") as channel:
            monkeypatch.setattr(os, "close", close_and_interrupt)
            with pytest.raises(KeyboardInterrupt):
                channel.call("echo", np.zeros(1000))
            taken = os.open(os.devnull, os.O_RDONLY)
            channel.close()
            os.fstat(taken)
            close(taken)
