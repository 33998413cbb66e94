"""Submitted requests run without a waiting caller: the channel's own reader, turns at the peer's limit, futures as the
standard library's."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from aio_front import Front
from anywhere import Anywhere, traces_instructions
from raw_peer import RawPeer, serving

import fastsplit
from fastsplit.errors import (
    CancelledError,
    ClosedError,
    DeadlineError,
    PeerLostError,
    RemoteOpError,
    ResourceError,
)
from fastsplit.wire.blocking import future as future_module
from fastsplit.wire.blocking import watcher
from fastsplit.wire.blocking.served import ServedClient

Future = fastsplit.Future
Serve = Callable[..., fastsplit.Server]
Connect = Callable[..., fastsplit.Channel]


def _until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def _watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastsplit-watch ")]


class Gate:
    """A handler that waits until it is let through."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.ran: list[Any] = []

    def __call__(self, call: fastsplit.Call) -> Any:
        assert self.opened.wait(20)
        self.ran.append(call.attrs.get("n"))
        return call.tensors


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def _handlers(gate: Gate | None = None) -> dict[str, Any]:
    def fail(call: fastsplit.Call) -> Any:
        raise KeyError("x")

    handlers: dict[str, Any] = {"echo": lambda call: call.tensors, "fail": fail}
    return handlers if gate is None else handlers | {"gate": gate}


@pytest.fixture(params=[False, True], ids=["", "overlap"])
def channel(socket_uri: str, serve: Serve, connect: Connect, gate: Gate, request: pytest.FixtureRequest) -> Any:
    caps = fastsplit.Limits(max_inflight=50)
    server = serve(socket_uri, _handlers(gate), arrays="numpy", limits=caps)
    yield connect(server.uri, arrays="numpy", overlap=request.param, call_timeout_s=20)
    gate.opened.set()


# ---- the reader ------------------------------------------------------------------------------------------------------


def test_many_submits_that_nobody_waits_for(channel: fastsplit.Channel) -> None:
    """More than the peer takes at once: each waits for its turn."""
    came: list[fastsplit.Future] = []
    for n in range(1000):
        channel.submit("echo", np.full(3, n)).add_done_callback(came.append)
    _until(lambda: len(came) == 1000)
    assert [int(future.result()[0][0]) for future in came] == list(range(1000))


def test_polling(channel: fastsplit.Channel, gate: Gate) -> None:
    future = channel.submit("gate")
    assert not future.done() and future.running()
    gate.opened.set()
    _until(future.done)
    assert future.result(0) == () and not future.running()


def test_a_callback_that_submits_again(channel: fastsplit.Channel) -> None:
    left, ended = [1000], threading.Event()

    def again(future: fastsplit.Future) -> None:
        assert future.result() == ()
        left[0] -= 1
        if not left[0]:
            ended.set()
        else:
            channel.submit("echo").add_done_callback(again)

    channel.submit("echo").add_done_callback(again)
    assert ended.wait(20)


def test_a_callback_that_waits_for_another_call(channel: fastsplit.Channel) -> None:
    """It runs in the channel's own thread, which reads for it then."""
    results: list[Any] = []

    def then(future: fastsplit.Future) -> None:
        results.append(channel.call("echo", np.arange(3))[0].sum())
        results.append(channel.submit("echo", np.arange(4)).result()[0].sum())

    channel.submit("echo").add_done_callback(then)
    _until(lambda: len(results) == 2)
    assert results == [3, 6]


def test_callers_and_callbacks_at_once(channel: fastsplit.Channel) -> None:
    came: list[fastsplit.Future] = []
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for n in range(100):
                channel.submit("echo", np.full(2, n)).add_done_callback(came.append)
                assert channel.call("echo", np.full(2, number))[0][0] == number
                assert channel.submit("echo", np.full(2, -n)).result(10)[0][0] == -n
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    _until(lambda: len(came) == 400)


def test_calls_alone_start_no_thread(socket_uri: str, serve: Serve, connect: Connect) -> None:
    channel = connect(serve(socket_uri, _handlers(), arrays="numpy").uri, arrays="numpy")
    for _ in range(100):
        channel.call("echo", np.arange(5))
        with pytest.raises(RemoteOpError):
            channel.call("fail")
    assert not _watchers()
    channel.submit("echo").result()
    assert len(_watchers()) == 1


def test_the_thread_ends_when_idle(
    socket_uri: str, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "_IDLE_S", 0.02)
    channel = connect(serve(socket_uri, _handlers(), arrays="numpy").uri, arrays="numpy")
    for _ in range(3):
        channel.submit("echo").result()
        assert _watchers()
        _until(lambda: not _watchers())
        assert channel.call("echo") == ()
        assert not _watchers()
        came: list[Any] = []
        for _ in range(20):  # while it comes and goes
            channel.submit("echo").add_done_callback(came.append)
            time.sleep(0.001 * len(came))
        _until(lambda: len(came) == 20)  # noqa: B023


def test_the_answer_of_a_call_that_was_given_up_is_read(
    socket_uri: str, serve: Serve, connect: Connect, gate: Gate
) -> None:
    """Else it would fill the socket or the ring, and the server would wait for room."""
    channel = connect(serve(socket_uri, _handlers(gate), arrays="numpy").uri, arrays="numpy")
    with pytest.raises(DeadlineError):
        channel.call("gate", np.zeros(2**22, np.uint8), timeout_s=0.05)
    gate.opened.set()
    _until(lambda: not channel._session.inflight)


def test_a_deadline_that_nobody_waits_for(channel: fastsplit.Channel, gate: Gate) -> None:
    ended: list[tuple[str, type]] = []

    def then(name: str) -> Callable[[fastsplit.Future], None]:
        return lambda future: ended.append((name, type(future.exception())))

    channel.submit("gate", timeout_s=None).add_done_callback(then("longer"))
    channel.submit("echo", timeout_s=0.15).add_done_callback(then("second"))
    channel.submit("echo", timeout_s=0.05).add_done_callback(then("first"))
    _until(lambda: len(ended) == 2)
    assert ended == [("first", DeadlineError), ("second", DeadlineError)]
    gate.opened.set()
    _until(lambda: len(ended) == 3)
    assert ended[2] == ("longer", type(None))


def test_the_peer_s_end_is_noticed(unix_uri: str, connect: Connect) -> None:
    leaves = threading.Event()

    def script(peer: RawPeer) -> None:
        peer.greet()
        assert peer.receive() is not None
        assert leaves.wait(10)

    with serving(unix_uri, script) as uri:
        channel = connect(uri + "?shm=off", arrays="numpy")
        errors: list[Any] = []
        channel.submit("echo").add_done_callback(lambda future: errors.append(future.exception()))
        leaves.set()
        _until(lambda: errors)
    assert isinstance(errors[0], PeerLostError) and channel.closed


def test_a_nap_only_follows_a_hand_over(
    socket_uri: str, serve: Serve, connect: Connect, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "_NAP_S", 30.0)
    monkeypatch.setattr(watcher, "_LONG_NAP_S", 30.0)
    monkeypatch.setattr(watcher, "_IDLE_S", 30.0)
    channel = connect(serve(socket_uri, _handlers(gate), arrays="numpy").uri, arrays="numpy")
    for _ in range(20):
        _until(channel.submit("echo").done)
        _until(lambda: channel._reader.watcher is not None and channel._reader.watcher.asleep)
        channel.call("echo")  # it takes nothing over: nothing was in flight
    slow = channel.submit("gate")
    _until(lambda: channel._reader.watching)
    with pytest.raises(DeadlineError):
        slow.result(0.02)  # a hand-over
    gate.opened.set()
    with pytest.raises(AssertionError):
        _until(slow.done, 0.1)
    assert slow.result(10) == ()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_thread_ends_the_connection(channel: fastsplit.Channel, gate: Gate) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    channel._reader.read_once = fail  # type: ignore[method-assign]
    errors: list[Any] = []
    channel.submit("gate").add_done_callback(lambda future: errors.append(future.exception()))
    _until(lambda: errors)
    assert isinstance(errors[0], ClosedError) and "ZeroDivisionError" in str(errors[0]) and channel.closed


def test_a_large_reply_is_handed_over(channel: fastsplit.Channel) -> None:
    """Between reading two parts of it, too."""
    x = np.arange(2**22)
    for _ in range(5):
        unwaited = channel.submit("echo", x)
        time.sleep(0.001)
        assert channel.call("echo", np.arange(3))[0].sum() == 3
        _until(unwaited.done)
        assert np.array_equal(unwaited.result()[0], x)


def test_without_a_thread_nothing_is_sent(
    socket_uri: str, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = connect(serve(socket_uri, _handlers(), arrays="numpy").uri, arrays="numpy")

    def fail(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(ResourceError, match="no thread left"):
            channel.submit("echo")
        assert channel.call("echo", np.arange(3))[0].sum() == 3

    def no_eventfd(*_: Any) -> int:
        raise OSError(24, os.strerror(24))

    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd", no_eventfd)
        with pytest.raises(ResourceError, match=r"a thread that reads: .*RLIMIT_NOFILE"):
            channel.submit("echo")
    assert channel.stats.calls == 1
    assert channel.submit("echo", np.arange(3)).result(10)[0].sum() == 3


@pytest.mark.parametrize("ends", ["fail", "end"])
def test_a_connection_that_ends_while_a_request_is_made(channel: fastsplit.Channel, ends: str) -> None:
    """Whoever ends it does not see this request among those in flight; and what is sent may seem to be taken."""
    request = channel._session.request

    def ending(*args: Any) -> Any:
        error = PeerLostError("gone")
        thread = threading.Thread(target=lambda: getattr(channel._reader, ends)(error))
        thread.start()
        thread.join()
        return request(*args)

    channel._connection.fast_path = None  # there all of it is one step
    channel.submit("echo").result()
    channel._session.request = ending  # type: ignore[method-assign]
    try:
        future = channel.submit("echo")
    except PeerLostError:
        return
    assert future.done() and isinstance(future.exception(), PeerLostError)


def test_with_overlap_the_thread_that_sends_runs_no_callback(unix_uri: str, serve: Serve, connect: Connect) -> None:
    """A callback may call, and wait for what that very thread is to send."""
    server = serve(unix_uri, _handlers(), arrays="numpy")
    channel = connect(server.uri + "?shm=off", arrays="numpy", overlap=True, call_timeout_s=20)
    assert channel._sender.workers is not None
    ran_in: list[threading.Thread] = []
    submitted = threading.Event()
    release = channel._reader.release

    def find_one(sending: Any) -> None:
        release(sending)
        if threading.current_thread() in channel._sender.workers.threads:  # type: ignore[union-attr]
            assert submitted.wait(20)  # `future` has its value
            channel._reader.callbacks.append((lambda _: ran_in.append(threading.current_thread()), future))

    channel._reader.release = find_one  # type: ignore[method-assign]
    future = channel.submit("echo", np.zeros(2**24, np.uint8))
    submitted.set()
    _until(lambda: ran_in)
    assert ran_in[0] not in channel._sender.workers.threads


def test_a_deadline_passes_while_bytes_keep_coming(
    channel: fastsplit.Channel, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer may send for as long as it likes."""
    end = time.monotonic() + 3

    def read(deadline: float | None, *, blocking: bool = True, read: Any = channel._reader.read_once) -> None:
        if blocking or time.monotonic() > end:
            read(deadline, blocking=blocking)
        time.sleep(0.001)  # it has read something

    channel._reader.read_once = read  # type: ignore[method-assign]
    started = time.monotonic()
    future = channel.submit("gate", timeout_s=0.05)
    _until(future.done)
    assert time.monotonic() - started < 2
    assert isinstance(future.exception(), DeadlineError)


def test_who_gives_up_waiting_for_a_turn_leaves_the_reading(
    socket_uri: str, serve: Serve, connect: Connect, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "_LONG_NAP_S", 30.0)
    server = serve(socket_uri, _handlers(gate), arrays="numpy", limits=fastsplit.Limits(max_inflight=1))
    channel = connect(server.uri, arrays="numpy", call_timeout_s=20)
    future = channel.submit("gate")
    with pytest.raises(DeadlineError):
        channel.call("echo", timeout_s=0.05)
    channel._reader.read_a_while(time.monotonic() + 0.05)
    started = time.monotonic()
    gate.opened.set()
    _until(future.done)
    assert time.monotonic() - started < 5


def test_a_thread_whose_start_was_interrupted_reads_nothing(
    socket_uri: str, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may run all the same, later."""
    channel = connect(serve(socket_uri, _handlers(), arrays="numpy").uri, arrays="numpy")

    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            channel.submit("echo")
    first = channel._reader.watcher
    assert first is not None and not first.alive
    future = channel.submit("echo")
    assert channel._reader.watcher is not first
    first._run()
    assert future.result(10) == () and channel._reader.watcher is not None


def test_a_fork_while_others_hold_the_locks(channel: fastsplit.Channel, gate: Gate) -> None:
    """A thread that rings the watcher's bell, and two that wait for futures."""
    future = channel.submit("gate")
    assert channel._reader.watcher is not None
    held, over = threading.Barrier(4), threading.Event()

    def hold(lock: Any) -> None:
        with lock:
            held.wait(20)
            over.wait(20)

    locks = (channel._reader.watcher._bell._lock, future._condition, future_module._creating)
    threads = [threading.Thread(target=hold, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    held.wait(20)
    pid = os.fork()
    if not pid:
        signal.alarm(5)
        os._exit(0 if cf.wait([future], 2).done and isinstance(future.exception(), ClosedError) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    over.set()
    for thread in threads:
        thread.join(20)


# ---- turns -----------------------------------------------------------------------------------------------------------


def test_turns_come_in_order(socket_uri: str, serve: Serve, connect: Connect, gate: Gate) -> None:
    server = serve(socket_uri, _handlers(gate), arrays="numpy", limits=fastsplit.Limits(max_inflight=1))
    channel = connect(server.uri, arrays="numpy", call_timeout_s=20)
    first = channel.submit("gate", n=0)
    results: list[Any] = []
    threads = []
    for n in range(1, 8):
        work = channel.submit if n % 2 else channel.call
        thread = threading.Thread(target=lambda work=work, n=n: results.append(work("gate", n=n)))
        thread.start()
        threads.append(thread)
        _until(lambda n=n: len(channel._reader.turns) == n)  # type: ignore[misc]
    with pytest.raises(DeadlineError, match=r"echo: not sent within 0\.05 s: the peer takes 1 requests"):
        channel.call("echo", timeout_s=0.05)
    assert channel.stats.calls == 1
    gate.opened.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert first.result(10) == () and len(results) == 7
    _until(lambda: gate.ran == list(range(8)))
    assert not channel._reader.turns


def test_many_threads_wait_for_their_turns(socket_uri: str, serve: Serve, connect: Connect) -> None:
    """Where one makes room for the next, which may be reading at this moment."""
    server = serve(socket_uri, _handlers(), arrays="numpy", limits=fastsplit.Limits(max_inflight=2))
    channel = connect(server.uri, arrays="numpy", call_timeout_s=20)
    results: list[int] = []

    def work(number: int) -> None:
        for n in range(20):
            use = channel.call if n % 2 else channel.submit
            use("echo", np.full(1, n))
            results.append(n)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(results) == 120
    _until(lambda: not channel._session.inflight)


@pytest.mark.parametrize("end", ["close", "lost"])
def test_who_waits_for_a_turn_hears_of_the_end(socket_uri: str, serve: Serve, gate: Gate, end: str) -> None:
    server = serve(socket_uri, _handlers(gate), arrays="numpy", limits=fastsplit.Limits(max_inflight=1))
    with fastsplit.connect(server.uri, arrays="numpy", call_timeout_s=20) as channel:
        first = channel.submit("gate")
        errors: list[BaseException] = []

        def work() -> None:
            with pytest.raises((ClosedError, PeerLostError)) as raised:
                channel.submit("echo")
            errors.append(raised.value)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        _until(lambda: len(channel._reader.turns) == 3)
        if end == "close":
            channel.close()
        else:
            (client,) = server._service.clients
            client.connection.transport.shutdown()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert len(errors) == 3 and first.exception(5) is not None
        gate.opened.set()


def test_decoding_is_not_waiting_for_a_turn(socket_uri: str, serve: Serve, connect: Connect, gate: Gate) -> None:
    server = serve(socket_uri, _handlers(gate), arrays="numpy", limits=fastsplit.Limits(max_inflight=1))
    channel = connect(server.uri, arrays="numpy", call_timeout_s=20)
    receive = channel._connection.transport.receive

    def slow(session: Any, *args: Any, **kwargs: Any) -> Any:
        events = receive(session, *args, **kwargs)
        time.sleep(0.05)
        session.decode_ns += 50_000_000
        return events

    channel.submit("gate")
    channel._connection.transport.receive = slow  # type: ignore[method-assign]
    threading.Timer(0.05, gate.opened.set).start()
    started = time.monotonic()
    future = channel.submit("echo")
    passed_s = time.monotonic() - started
    assert channel.stats.serialization_s >= 0.05 and 0 < channel.stats.wait_s <= passed_s - 0.04
    future.result()


def test_what_an_interrupted_reader_leaves_is_handled(channel: fastsplit.Channel) -> None:
    """A reply that was read, whose future nobody waits for."""
    channel.submit("echo").result()
    handle, left = channel._core.handle, [3]

    def interrupted(event: Any, front: Any) -> None:
        if threading.current_thread() is threading.main_thread() and left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        handle(event, front)

    channel._core.handle = interrupted  # type: ignore[method-assign]
    futures = [channel.submit("echo") for _ in range(3)]
    for future in futures:
        with contextlib.suppress(KeyboardInterrupt):
            future.result()
    for future in futures:
        _until(future.done)


@traces_instructions
@pytest.mark.parametrize("calls_back", [False, True], ids=["", "callback"])
def test_who_waits_is_told_wherever_another_is_interrupted(
    socket_uri: str, serve: Serve, connect: Connect, calls_back: bool
) -> None:
    channel = connect(serve(socket_uri, _handlers(), arrays="numpy").uri, arrays="numpy")
    channel.submit("echo").result()
    place, n = None, 0
    while place is None or place.where:
        future = Future(channel._reader, 0, "echo", None, None, 0)
        came: list[Any] = []
        if calls_back:
            future.add_done_callback(came.append)
        done: list[Any] = []
        waiting = threading.Thread(target=lambda future=future, done=done: done.append(cf.wait([future], 20).done))
        waiting.start()
        _until(lambda future=future: future._waiters)  # type: ignore[misc]
        with contextlib.suppress(KeyboardInterrupt), Anywhere(n, _interrupt) as place:
            with channel._reader.lock:
                channel._reader.settle(future, None, ClosedError("over"))
        if not future.done():  # interrupted before: as if it had not been called
            with channel._reader.lock:
                channel._reader.settle(future, None, ClosedError("over"))
        channel._reader.call_back()
        waiting.join(10)
        assert not waiting.is_alive() and done == [{future}] and came == [future] * calls_back
        n += 1
    assert n > 2


@traces_instructions
def test_closing_lets_go_of_what_it_holds_wherever_it_is_interrupted(
    socket_uri: str, serve: Serve, connect: Connect
) -> None:
    server = serve(socket_uri, _handlers(), arrays="numpy")
    place, n = None, 0
    while place is None or place.where:
        channel = connect(server.uri, arrays="numpy")
        with contextlib.suppress(KeyboardInterrupt), Anywhere(n, _interrupt) as place:
            channel.close()
        channel.close()
        assert not channel._connection.sending.locked() and channel._connection.transport.fileno() == -1, place.where
        n += 1


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_server_takes_the_next_request_while_it_sends_an_answer(
    socket_uri: str, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a client at its limit, which has read the answer."""
    done = ServedClient._done

    def later(client: ServedClient, request_id: int) -> None:
        time.sleep(0.01)
        done(client, request_id)

    monkeypatch.setattr(ServedClient, "_done", later)
    server = serve(socket_uri, _handlers(), arrays="numpy", workers=2, limits=fastsplit.Limits(max_inflight=1))
    channel = connect(server.uri, arrays="numpy", call_timeout_s=20)
    for n in range(5):
        assert channel.call("echo", np.full(1, n))[0][0] == n
        with pytest.raises(RemoteOpError):
            channel.call("fail")


# ---- the standard library's tools ------------------------------------------------------------------------------------


def test_wait_for_futures_of_two_channels(socket_uri: str, serve: Serve, connect: Connect, gate: Gate) -> None:
    server = serve(socket_uri, _handlers(gate), arrays="numpy")
    channels = [connect(server.uri, arrays="numpy", overlap=overlap) for overlap in (False, True)]
    futures = [channels[n % 2].submit("echo", np.arange(n)) for n in range(100)]
    done, not_done = cf.wait(futures, timeout=20)
    assert done == set(futures) and not not_done
    assert cf.wait(futures).done == done  # at once
    slow = channels[0].submit("gate")
    done, not_done = cf.wait([slow, *futures], timeout=0.02)
    assert not_done == {slow}
    assert cf.wait([slow, channels[1].submit("echo")], return_when=cf.FIRST_COMPLETED, timeout=20).not_done == {slow}
    failing = channels[1].submit("fail")
    assert failing in cf.wait([slow, failing], return_when=cf.FIRST_EXCEPTION, timeout=20).done
    cancelled = channels[1].submit("gate")
    assert cancelled.cancel() and cancelled in cf.wait([cancelled], timeout=20).done
    with pytest.raises(CancelledError) as raised:
        cancelled.exception()
    assert isinstance(raised.value, cf.CancelledError)
    gate.opened.set()
    assert slow in cf.wait([slow], timeout=20).done


def test_as_completed(channel: fastsplit.Channel, gate: Gate) -> None:
    with cf.ThreadPoolExecutor(1) as executor:
        futures = [channel.submit("echo", np.full(1, n)) for n in range(30)]
        others: list[Any] = [executor.submit(lambda n=n: (np.full(1, n),)) for n in range(30, 40)]
        seen = sorted(int(future.result()[0][0]) for future in cf.as_completed([*futures, *others], timeout=20))
    assert seen == list(range(40))
    with pytest.raises(TimeoutError):
        list(cf.as_completed([channel.submit("gate")], timeout=0.02))


def test_asyncio_wraps_them(channel: fastsplit.Channel, gate: Gate) -> None:
    async def main() -> None:
        sent = [channel.submit("echo", np.full(1, n)) for n in range(30)]
        results = await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, sent)), 20)
        assert [int(result[0][0]) for result in results] == list(range(30))
        with pytest.raises(RemoteOpError):
            await asyncio.wrap_future(channel.submit("fail"))
        slow = channel.submit("gate")
        task = asyncio.wrap_future(slow)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not slow.cancelled():
            await asyncio.sleep(0.001)

    asyncio.run(main())


def test_many_threads_wait_for_the_same_futures(channel: fastsplit.Channel) -> None:
    """Each future's lock is its own, and is taken in the order of the futures: no two threads wait for each other."""
    for _ in range(10):
        futures = [channel.submit("echo", np.arange(n)) for n in range(20)]
        done: list[int] = []
        threads = [
            threading.Thread(target=lambda n=n: done.append(len(cf.wait(futures[n : n + 12], 20).not_done)))  # noqa: B023
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert done == [0] * 8


def test_a_lock_that_an_interrupted_wait_has_left_taken(
    channel: fastsplit.Channel, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The channel's thread goes on without that future's waiters."""
    monkeypatch.setattr(future_module, "_LOCK_S", 0.05)
    future = channel.submit("gate")
    future._condition.acquire()
    came: list[Any] = []
    future.add_done_callback(came.append)
    gate.opened.set()
    _until(lambda: came)
    assert "its waiters are not notified" in caplog.text
    _until(channel.submit("echo").done)


def test_the_outcome_is_the_channel_s(channel: fastsplit.Channel) -> None:
    future = channel.submit("echo")
    for attempt in (
        lambda: future.set_result(None),
        lambda: future.set_exception(KeyError()),
        future.set_running_or_notify_cancel,
    ):
        with pytest.raises(cf.InvalidStateError):
            attempt()
    assert future.result() == () and isinstance(future, cf.Future)


def _in_a_callback_of_a_caller(channel: fastsplit.Channel, work: Callable[[], object]) -> threading.Thread:
    """A thread that is not the channel's, in a callback that calls `work`."""
    begun = threading.Event()

    def then(_: fastsplit.Future) -> None:
        if threading.current_thread() is thread:  # not if the channel's own was faster
            begun.set()
            work()

    def call() -> None:
        while not begun.is_set():
            future = channel.submit("echo")
            future.add_done_callback(then)
            future.cancel()

    thread = threading.Thread(target=call)
    thread.start()
    assert begun.wait(20)
    return thread


def test_a_caller_in_a_callback_holds_up_nobody(socket_uri: str, serve: Serve, connect: Connect, gate: Gate) -> None:
    """It reads for all; callbacks and waiters of what it reads do not wait for the end of its own."""
    server = serve(socket_uri, _handlers(gate), arrays="numpy", workers=4)
    for overlap in (False, True):
        gate.opened.clear()
        channel = connect(server.uri, arrays="numpy", overlap=overlap, call_timeout_s=20)
        thread = _in_a_callback_of_a_caller(channel, lambda channel=channel: channel.call("gate"))  # type: ignore[misc]
        came = threading.Event()
        channel.submit("echo").add_done_callback(lambda _, came=came: came.set())  # type: ignore[misc]
        assert came.wait(5)
        assert not cf.wait([channel.submit("echo") for _ in range(5)], 5).not_done
        gate.opened.set()
        thread.join(20)
        assert not thread.is_alive()


def test_a_callback_of_the_channel_s_thread_holds_up_no_waiter(
    socket_uri: str, serve: Serve, connect: Connect, gate: Gate
) -> None:
    handlers = {**_handlers(gate), "later": lambda _: time.sleep(0.2)}  # else the callback might run here
    server = serve(socket_uri, handlers, arrays="numpy", workers=4)
    channel = connect(server.uri, arrays="numpy", call_timeout_s=20)
    began = threading.Event()
    channel.submit("later").add_done_callback(lambda _: (began.set(), channel.call("gate")))
    assert began.wait(5)
    assert not cf.wait([channel.submit("echo") for _ in range(5)], 5).not_done


def test_a_callback_that_waits_for_its_own_future(channel: fastsplit.Channel, gate: Gate) -> None:
    future = channel.submit("gate")
    waiting = threading.Thread(target=lambda: cf.wait([future], 20))
    waiting.start()
    _until(lambda: future._waiters)
    seen: list[Any] = []
    future.add_done_callback(lambda future: seen.append(cf.wait([future], 5).done))
    gate.opened.set()
    _until(lambda: seen)
    assert seen == [{future}]
    waiting.join(20)


# ---- closing ---------------------------------------------------------------------------------------------------------


def test_close_says_what_it_discards(channel: fastsplit.Channel, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    futures = [channel.submit(op) for op in ("gate", "echo", "gate")]
    channel.close()
    assert [type(future.exception()) for future in futures] == [ClosedError] * 3
    assert "closed with calls in flight, whose results are lost: 2 of 'gate', 1 of 'echo'" in caplog.text
    caplog.clear()
    channel.close()
    assert not caplog.text


def test_close_drains(channel: fastsplit.Channel, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    futures = [channel.submit("gate", n=n) for n in range(20)]
    refused: list[Any] = []

    def then(future: fastsplit.Future) -> None:
        with pytest.raises(ClosedError, match="the channel is being closed"):
            channel.call("echo")
        refused.append(future)

    futures[0].add_done_callback(then)
    threading.Thread(target=lambda: (_until(lambda: channel._core.refusing), gate.opened.set())).start()
    channel.close(drain_s=20)
    assert [future.exception() for future in futures] == [None] * 20 and refused == futures[:1]
    assert gate.ran == list(range(20)) and "closed with calls in flight" not in caplog.text
    with pytest.raises(ClosedError, match="the channel is closed: the channel was closed"):
        channel.call("echo")


def test_close_drains_no_longer_than_it_is_told(
    channel: fastsplit.Channel, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    fast = channel.submit("echo")
    fast.result(10)
    future = channel.submit("gate")
    started = time.monotonic()
    channel.close(drain_s=0.1)
    assert 0.1 <= time.monotonic() - started < 5
    assert isinstance(future.exception(), ClosedError) and fast.exception() is None
    assert "whose results are lost: 1 of 'gate'" in caplog.text


def test_both_fronts_drain(unix_uri: str, front: Front, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    with fastsplit.Server(unix_uri, _handlers(gate), arrays="numpy", workers=2) as server:
        for drain_s in (0.0, 20.0):
            caplog.clear()
            gate.opened.clear()
            channel = front.connect(server.uri, arrays="numpy")
            results: list[Any] = []

            def work(channel: Any = channel, results: list[Any] = results) -> None:
                try:
                    results.append(channel.call("gate", np.arange(3)))
                except ClosedError as error:
                    results.append(error)

            threads = [threading.Thread(target=work) for _ in range(2)]
            for thread in threads:
                thread.start()
            _until(lambda channel=channel: channel.stats.calls == 2)  # type: ignore[misc]
            threading.Timer(0.05, gate.opened.set).start()
            channel.close(drain_s) if drain_s else channel.close()
            for thread in threads:
                thread.join(10)
            assert [type(result) is ClosedError for result in results] == [not drain_s] * 2
            assert ("whose results are lost: 2 of 'gate'" in caplog.text) is not drain_s
            with contextlib.suppress(ClosedError):
                channel.close()
