"""Calls within calls: in callbacks they go through; where a thread would wait for itself they fail at once."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from anywhere import Anywhere, traces_instructions
from until import until

import fastsplit
from fastsplit.errors import ReentrantCallError

HANDLERS = {
    "slow": lambda call: time.sleep(0.05),
    "one": lambda call: np.ones(1),
    "echo": lambda call: call.tensors,
}


@pytest.fixture(params=[0, 1], ids=["no workers", "a worker"])
def server(socket_uri: str, request: pytest.FixtureRequest) -> Iterator[fastsplit.Server]:
    with fastsplit.Server(socket_uri, HANDLERS, arrays="numpy", workers=request.param) as server:
        yield server


@pytest.fixture
def channel(server: fastsplit.Server) -> Iterator[fastsplit.Channel]:
    overlap = server.uri.startswith("tcp")
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10, overlap=overlap) as channel:
        yield channel


# ---- callbacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["call", "submit and wait", "empty", "measure", "trim"])
def test_a_callback_may_do_anything(channel: fastsplit.Channel, what: str) -> None:
    do: dict[str, Callable[[], Any]] = {
        "call": lambda: list(channel.call("one")[0]),
        "submit and wait": lambda: list(channel.submit("one").result()[0]),
        "empty": lambda: channel.empty(3).shape,
        "measure": lambda: type(channel.measure(1000)).__name__,
        "trim": lambda: type(channel.trim()).__name__,
    }
    expected = {"call": [1], "submit and wait": [1], "empty": (3,), "measure": "LinkEstimate", "trim": "int"}
    said: list[Any] = []
    threads: list[int] = []

    def then(future: fastsplit.Future) -> None:
        said.append(do[what]())
        threads.append(threading.get_ident())

    started = time.monotonic()
    future = channel.submit("slow")
    future.add_done_callback(then)
    future.result()
    until(lambda: said)
    assert said == [expected[what]]
    assert time.monotonic() - started < 5
    assert channel.call("one")[0] == 1


def test_a_callback_of_a_failed_call_may_call(channel: fastsplit.Channel) -> None:
    said: list[Any] = []
    future = channel.submit("unknown")
    future.add_done_callback(lambda _: said.append(channel.call("one")[0].tolist()))
    assert isinstance(future.exception(), fastsplit.RemoteOpError)
    until(lambda: said)
    assert said == [[1.0]]


def test_a_callback_of_a_cancelled_call_may_call(channel: fastsplit.Channel) -> None:
    said: list[Any] = []
    future = channel.submit("slow")
    future.add_done_callback(lambda _: said.append(channel.call("one")[0].tolist()))
    assert future.cancel()
    until(lambda: said)
    assert said == [[1.0]]


def test_callbacks_that_run_when_a_channel_closes(channel: fastsplit.Channel) -> None:
    said: list[Any] = []

    def then(future: fastsplit.Future) -> None:
        try:
            channel.call("one")
        except fastsplit.ClosedError as error:
            said.append(error)

    future = channel.submit("slow")
    future.add_done_callback(then)
    channel.close()
    until(lambda: said)


def test_a_callback_that_calls_does_not_hold_up_others(channel: fastsplit.Channel) -> None:
    """While a callback waits in one thread, others call."""
    entered, go_on = threading.Event(), threading.Event()

    def then(_: fastsplit.Future) -> None:
        entered.set()
        assert go_on.wait(10)

    future = channel.submit("slow")
    future.add_done_callback(then)
    thread = threading.Thread(target=future.result)
    thread.start()
    assert entered.wait(5)
    assert channel.call("one", timeout_s=5)[0] == 1
    go_on.set()
    thread.join(5)
    assert not thread.is_alive()


def test_callbacks_run_in_order_and_once(channel: fastsplit.Channel) -> None:
    done: list[int] = []

    def then(n: int) -> Callable[[fastsplit.Future], None]:
        def callback(_: fastsplit.Future) -> None:
            channel.call("one")
            done.append(n)

        return callback

    futures = [channel.submit("one") for _ in range(30)]
    for n, future in enumerate(futures):
        future.add_done_callback(then(n))
    for future in futures:
        future.result()
    until(lambda: len(done) == 30)
    assert sorted(done) == list(range(30))


@pytest.mark.parametrize("error", [KeyError, SystemExit, GeneratorExit, fastsplit.CancelledError])
def test_what_a_callback_raises_is_logged(
    channel: fastsplit.Channel, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def then(_: fastsplit.Future) -> None:
        raise error("x")

    future = channel.submit("one")
    future.add_done_callback(then)
    assert future.result()[0] == 1
    until(lambda: error.__name__ in caplog.text)
    assert channel.call("one")[0] == 1
    caplog.clear()  # the record keeps the future


# ---- finalizers and signals ------------------------------------------------------------------------------------------


class Handle:
    """Something remote that says so when it goes away; only the collector ends it."""

    def __init__(self, channel: fastsplit.Channel, said: list[str]) -> None:
        self.channel, self.said, self.me = channel, said, self

    def __del__(self) -> None:
        for what in ("call", "empty"):
            started = time.monotonic()
            try:
                if what == "call":
                    self.channel.call("one")
                else:
                    self.channel.empty(1000)
                self.said.append("ok")
            except ReentrantCallError:
                self.said.append("refused")
            if time.monotonic() - started > 2:
                self.said.append("late")


def test_a_finalizer_in_the_middle_of_a_call(channel: fastsplit.Channel) -> None:
    """The collector runs it anywhere: in this thread, and in the server's, which is in this process."""
    said: list[str] = []
    threshold = gc.get_threshold()
    gc.set_threshold(20, 2, 2)
    try:
        for n in range(150):
            Handle(channel, said)
            (y,) = channel.call("echo", np.full(100, n), values=[n] * 3, text=str(n))
            assert (y == n).all()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert "refused" in said and set(said) <= {"ok", "refused"}


def test_a_signals_handler_in_the_middle_of_a_call(server: fastsplit.Server) -> None:
    """What it raises is the outer call's end: it is cancelled, and the channel lives on."""
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
        before = signal.signal(signal.SIGUSR1, lambda *_: channel.call("one"))
        timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
        try:
            timer.start()
            with pytest.raises(ReentrantCallError, match=r"^one: this thread is in the middle of a call"):
                channel.call("slow")
        finally:
            timer.join()
            signal.signal(signal.SIGUSR1, before)
        assert channel.call("one")[0] == 1


def test_a_handler_that_calls_its_own_caller(socket_uri: str) -> None:
    """With one thread for its requests the server would wait for itself."""
    channels: list[fastsplit.Channel] = []
    handlers = {"back": lambda call: channels[0].call("one"), "one": lambda call: np.ones(1)}
    for workers in (0, 1):
        with fastsplit.Server(socket_uri, handlers, arrays="numpy", workers=workers) as server:
            with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
                channels[:] = [channel]
                with pytest.raises(fastsplit.RemoteOpError, match="ReentrantCallError: one"):
                    channel.call("back")
    with fastsplit.Server(socket_uri, handlers, arrays="numpy", workers=2) as server:
        with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
            channels[:] = [channel]
            assert channel.call("back")[0] == 1


def _call_for_ever(channel: fastsplit.Channel) -> None:
    while True:
        channel.call("slow")


def test_a_finalizer_may_cancel_and_close(server: fastsplit.Server) -> None:
    """Both only say something, and wait for nothing."""
    channel = fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10)
    future = channel.submit("slow")

    def handler(*_: object) -> None:
        future.cancel()
        channel.close()

    before = signal.signal(signal.SIGUSR1, handler)
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        started = time.monotonic()
        with pytest.raises(fastsplit.ClosedError):
            _call_for_ever(channel)
        assert time.monotonic() - started < 2
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert future.cancelled()


@pytest.mark.parametrize("what", ["call", "close"])
@pytest.mark.parametrize("options", [{}, {"wire_dtype": "bfloat16"}, {"codec": "zlib", "codec_threshold_nbytes": 1}])
@traces_instructions
def test_wherever_a_call_may_be(unix_uri: str, what: str, options: dict[str, Any]) -> None:
    """Nothing waits for a lock of its own thread; what fails says so in an error of ours."""
    x = np.arange(20_000, dtype=np.float32) % 100
    wrong: list[Any] = []

    def work(server: fastsplit.Server, query: str) -> None:
        n = 0
        with contextlib.ExitStack() as stack:
            while True:
                channel = stack.enter_context(
                    fastsplit.connect(server.uri + query, arrays="numpy", call_timeout_s=3, spin_us=0, **options)
                )
                channel.call("echo", x)

                def act(channel: fastsplit.Channel = channel) -> None:
                    try:
                        channel.close() if what == "close" else channel.call("echo", x)
                    except ReentrantCallError:
                        pass
                    except BaseException as error:
                        wrong.append(error)

                while not channel.closed:
                    try:
                        with Anywhere(n, act) as place:
                            (y,) = channel.call("echo", x)
                        assert (y == x).all()
                    except fastsplit.ClosedError:
                        assert what == "close"
                    except BaseException as error:
                        wrong.append((place.where, error))
                    if not place.where:
                        return
                    n += 5

    with fastsplit.Server(unix_uri, HANDLERS, arrays="numpy") as server:
        for query in ("?shm=off",) if options else ("", "?shm=off"):
            thread = threading.Thread(target=work, args=(server, query), daemon=True)
            thread.start()
            thread.join(30)
            assert not thread.is_alive()
    assert not wrong
