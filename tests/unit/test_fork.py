"""os.fork: what the parent made says so in the child, at once, and the parent notices nothing of the child."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from anywhere import Anywhere, traces_instructions

import fastsplit
from fastsplit.wire.shm import ring
from fastsplit.wire.shm.slots import Slots

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

HANDLERS = {
    "echo": lambda call: call.tensors,
    "slow": lambda call: time.sleep(0.2) or call.tensors,
}


def in_child(work: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """What `work` returns in a forked child: data, or an error's type and text."""
    source, target = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer: Any
            try:
                answer = work()
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(target, json.dumps(answer, default=repr).encode())
        finally:
            os._exit(0)
    os.close(target)
    data = b""
    deadline = time.monotonic() + timeout_s
    os.set_blocking(source, False)
    while time.monotonic() < deadline:
        try:
            part = os.read(source, 65536)
        except BlockingIOError:
            time.sleep(0.005)
            continue
        if not part:
            break
        data += part
    else:
        os.kill(pid, signal.SIGABRT)  # with a traceback of each thread
    os.close(source)
    status = os.waitpid(pid, 0)[1]
    assert data, f"the child hangs, or ended with status {status}"
    return json.loads(data)


def is_told(answer: Any) -> bool:
    """Whether the child was told where the object was made, and what to do."""
    text = (
        rf"ClosedError: .*made in process {os.getpid()}, of which this one, .*, is a fork: connect or serve anew here"
    )
    return re.fullmatch(text, answer) is not None


@pytest.fixture(params=("shm", "unix", "tcp4", "shm-named", "shm-socket"))
def link(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(uri: str) -> Iterator[fastsplit.Server]:
    with fastsplit.Server(uri, HANDLERS, arrays="numpy") as server:
        yield server


@pytest.fixture
def channel(server: fastsplit.Server, link: str) -> Iterator[fastsplit.Channel]:
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10, overlap=link == "tcp4") as channel:
        channel.call("echo", np.ones(1000))
        yield channel


def _works(channel: fastsplit.Channel) -> bool:
    x = np.arange(1000)
    return bool(np.array_equal(channel.call("echo", x)[0], x) and not channel.closed)


USES: dict[str, Callable[[fastsplit.Channel], Any]] = {
    "call": lambda channel: channel.call("echo", np.ones(3)),
    "submit": lambda channel: channel.submit("echo", np.ones(3)),
    "empty": lambda channel: channel.empty(3),
    "measure": lambda channel: channel.measure(1000) and None,
}


def test_every_use_in_a_child_is_told(channel: fastsplit.Channel) -> None:
    started = time.monotonic()
    answers = in_child(lambda: {name: _error(lambda use=use: use(channel)) for name, use in USES.items()})
    assert time.monotonic() - started < 5
    if channel.shm or not channel._session.capabilities & 4:
        del answers["measure"]  # nothing is measured there
    assert all(map(is_told, answers.values())), answers
    assert _works(channel)


def _error(work: Callable[[], Any]) -> str:
    try:
        work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_future_in_flight(channel: fastsplit.Channel) -> None:
    called: list[Any] = []
    future = channel.submit("slow", np.arange(5))
    future.add_done_callback(called.append)
    answers = in_child(lambda: [_error(future.result), future.done(), future.cancel(), len(called)])
    assert is_told(answers[0]) and answers[1:] == [True, False, 0]
    assert future.result()[0].sum() == 10
    assert len(called) == 1


def test_closing_in_a_child_is_not_noticed(channel: fastsplit.Channel, server: fastsplit.Server) -> None:
    assert in_child(lambda: [channel.close(), channel.closed]) == [None, True]
    assert in_child(lambda: [server.close(), server.connections]) == [None, 0]
    assert in_child(lambda: contextlib.ExitStack().enter_context(channel) and None) is None
    assert _works(channel)
    assert server.connections == 1
    with fastsplit.connect(server.uri, arrays="numpy") as another:
        assert _works(another)


def test_a_child_can_make_its_own(channel: fastsplit.Channel, server: fastsplit.Server) -> None:
    def work() -> Any:
        with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as another:
            return another.call("echo", np.arange(5))[0].tolist()

    assert in_child(work) == [0, 1, 2, 3, 4]
    assert _works(channel)


def test_the_end_of_the_parents_connection_is_seen_at_once(
    channel: fastsplit.Channel, server: fastsplit.Server
) -> None:
    """A child that lives on holds no descriptor of it."""
    source, target = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(target)
        os.read(source, 1)
        os._exit(0)
    try:
        channel.close()
        deadline = time.monotonic() + 5
        while server.connections:
            assert time.monotonic() < deadline, "the server does not see the end"
            time.sleep(0.005)
    finally:
        os.close(source)
        os.close(target)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("link", ["shm", "shm-named"])
def test_leases_and_memory_of_the_arena(channel: fastsplit.Channel) -> None:
    """What a child drops is given back by nobody, and what it keeps stays readable."""
    x = channel.empty(1000)
    x[:] = 2
    (y,) = channel.call("echo", x)
    in_use = channel._connection.arena.in_use_nbytes  # type: ignore[union-attr]

    def work() -> Any:
        nonlocal x, y
        total = float(x.sum() + y.sum())
        del x, y
        return [total, _error(lambda: channel.empty(5)), channel.trim()]

    total, error, trimmed = in_child(work)
    assert total == 4000 and is_told(error) and trimmed == 0
    assert channel._connection.arena.in_use_nbytes == in_use  # type: ignore[union-attr]
    assert channel.call("echo", x)[0].sum() == 2000


def test_while_other_threads_call(uri: str) -> None:
    """Locks may be held by threads that do not exist in the child."""
    with fastsplit.Server(uri, HANDLERS, arrays="numpy") as server:
        with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
            stop = threading.Event()
            failures: list[BaseException] = []

            def work() -> None:
                try:
                    while not stop.is_set():
                        assert _works(channel)
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            try:
                for _ in range(4):
                    answers = in_child(lambda: [_error(lambda: channel.call("echo")), channel.close(), server.close()])
                    assert is_told(answers[0])
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            assert not failures


def test_a_server_in_a_child(uri: str) -> None:
    with fastsplit.Server(uri, HANDLERS, arrays="numpy", workers=2) as server:
        answers = in_child(
            lambda: [_error(use) for use in (server.start, server.bind, server.serve_forever, server.__enter__)]
        )
        assert all(map(is_told, answers)), answers
        with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
            assert _works(channel)


def test_a_server_that_was_not_bound_is_the_childs_own(unix_uri: str) -> None:
    server = fastsplit.Server(unix_uri, HANDLERS, arrays="numpy")

    def work() -> Any:
        with server, fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel:
            return _works(channel)

    assert in_child(work) is True


def test_a_handler_that_forks(unix_uri: str) -> None:
    """As one that uses multiprocessing: the child comes out of the handler, and says nothing to the client."""

    def fork(call: fastsplit.Call) -> Any:
        return np.array(in_child(lambda: _error(lambda: call.empty(3))).startswith("ClosedError"))[None]

    def fork_and_return(call: fastsplit.Call) -> Any:
        pid = os.fork()
        if pid == 0:
            threading.Timer(0.2, os._exit, (0,)).start()
            return np.zeros(1)
        os.waitpid(pid, 0)
        return np.ones(1)

    handlers = {"fork": fork, "return": fork_and_return}
    with fastsplit.Server(unix_uri, handlers, arrays="numpy") as server:
        for query in ("", "?shm=off"):
            with fastsplit.connect(server.uri + query, arrays="numpy", call_timeout_s=10) as channel:
                assert channel.call("fork")[0][0]
                assert channel.call("return")[0][0] == 1
                assert channel.call("return")[0][0] == 1


@pytest.mark.parametrize("link", ["shm", "unix"])
@traces_instructions
def test_a_fork_in_the_middle_of_a_call(channel: fastsplit.Channel) -> None:
    """As in a signal's handler. The child's call goes on to its end, with locks that its thread may hold."""
    x = np.arange(1000)
    children: list[int] = []
    for n in range(0, 1000, 23):
        pid = os.getpid()
        error = ""
        try:
            with Anywhere(n, lambda: children.append(os.fork())) as place:
                (y,) = channel.call("echo", x)
            assert (y == x).all()
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        if os.getpid() != pid:
            text = f"made in process {pid}"
            os._exit(0 if not error or (error.startswith("ClosedError: ") and text in error) else 1)
        assert not error
        if not place.where:
            break
        assert os.waitpid(children.pop(), 0)[1] == 0, place.where
    assert n > (20 if channel._connection.fast_path is not None else 60)


def test_a_child_takes_nothing_out_of_the_ring(unix_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread may have been about to: a signal's handler may fork while a call spins for its reply. (Not in compiled
    code, which handlers do not interrupt.)"""
    monkeypatch.setattr(ring, "Slots", Slots)
    with fastsplit.Server(unix_uri, HANDLERS, arrays="numpy") as server:
        with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=5) as channel:
            channel.call("echo")
            monkeypatch.setattr(channel._reader, "start_watcher", lambda: None)  # nobody reads
            link: Any = channel._connection.transport
            take, items = link.slots._trywait, link.slots._items_in[link.slots._in_slot]
            future = channel.submit("echo", np.arange(5))
            time.sleep(0.1)  # the reply is there
            assert in_child(lambda: take(items[0])) == 0  # out of its own copy
            assert future.result()[0].sum() == 10


@pytest.mark.parametrize("slots", ["compiled", "python"])
def test_a_handler_that_ends_its_child_in_the_middle_of_a_call(
    unix_uri: str, monkeypatch: pytest.MonkeyPatch, slots: str
) -> None:
    """What it raises comes out of the call, and nothing of a connection that is not the child's."""
    if slots == "python":
        monkeypatch.setattr(ring, "Slots", Slots)
    children = []

    def fork(*_: Any) -> None:
        children.append(os.fork())
        if not children[0]:
            raise SystemExit(7)

    with fastsplit.Server(unix_uri, HANDLERS, arrays="numpy") as server:
        with fastsplit.connect(server.uri, arrays="numpy", spin_us=0) as channel:
            before = signal.signal(signal.SIGALRM, fork)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            code = 1
            try:
                channel.call("slow", timeout_s=5)
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                if children and not children[0]:
                    os._exit(code)
                signal.signal(signal.SIGALRM, before)
            assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 7


def test_measuring_in_a_child(channel: fastsplit.Channel) -> None:
    """Also where there is nothing to measure."""
    assert is_told(in_child(lambda: _error(channel.measure)).replace("the channel is closed: ", ""))


def test_a_grandchild(channel: fastsplit.Channel) -> None:
    def work() -> Any:
        return in_child(lambda: _error(lambda: channel.call("echo")))

    assert is_told(in_child(work))
    assert _works(channel)


def test_aio(uri: str) -> None:
    """The loop's selector is shared with the parent: nothing may be taken out of it."""

    async def main() -> None:
        async with (
            fastsplit.aio.serve(uri, HANDLERS, arrays="numpy") as server,
            fastsplit.aio.connect(server.uri, arrays="numpy", call_timeout_s=10) as channel,
        ):
            x = np.arange(5)
            await channel.call("echo", x)
            in_flight = asyncio.ensure_future(channel.call("echo", x))
            await asyncio.sleep(0)
            uses = {
                "call": lambda: asyncio.run(channel.call("echo", x)),
                "empty": lambda: channel.empty(3),
                "server": lambda: asyncio.run(server.start()),
                "serve": lambda: asyncio.run(server.serve_forever()),
            }

            def work() -> Any:
                asyncio._set_running_loop(None)
                answers = [_error(use) for use in uses.values()]
                asyncio.run(channel.close())
                asyncio.run(server.close())
                return [*answers, channel.closed, server.connections]

            *answers, closed, connections = in_child(work)
            assert all("made in process" in answer and "ClosedError" in answer for answer in answers), answers
            assert closed and connections == 0
            assert (await in_flight)[0].sum() == 10
            assert (await channel.call("echo", x))[0].sum() == 10
            async with fastsplit.aio.connect(server.uri, arrays="numpy") as another:
                assert (await another.call("echo", x))[0].sum() == 10

    asyncio.run(main())


def test_calls_in_flight_end_in_a_child_that_runs_the_loop(unix_uri: str) -> None:
    async def main() -> None:
        async with fastsplit.aio.connect(unix_uri, arrays="numpy", call_timeout_s=10) as channel:
            in_flight = asyncio.ensure_future(channel.call("slow", np.arange(5)))
            await asyncio.sleep(0.05)
            source, target = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    await in_flight
                except BaseException as error:
                    os.write(target, type(error).__name__.encode())
                os._exit(0)
            os.waitpid(pid, 0)
            assert os.read(source, 100) == b"ClosedError"
            os.close(source)
            os.close(target)
            assert (await in_flight)[0].sum() == 10

    with fastsplit.Server(unix_uri, HANDLERS, arrays="numpy"):
        asyncio.run(main())
