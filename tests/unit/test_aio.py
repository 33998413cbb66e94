"""The asyncio front: many calls in flight, what is given up, what is waited for, and that the loop is never blocked.

Each test runs in a loop of its own. What is the same as with the blocking front is tested by the conformance suite.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from raw_peer import ABORT, CANCEL, ERROR, REPLY, REQUEST, RawPeer, connected, frame, serving

import fastsplit
from fastsplit import (
    ClosedError,
    ConnectError,
    DeadlineError,
    PeerLostError,
    RemoteOpError,
    SettingError,
    aio,
)
from fastsplit.errors import ArenaFull
from fastsplit.schema.limits import Limits

MIB = 1024**2
X = np.arange(1000, dtype=np.float32)


def run(main: Coroutine[Any, Any, None], timeout_s: float = 20.0) -> None:
    asyncio.run(asyncio.wait_for(main, timeout_s))


async def until(condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def connect(uri: str, **options: Any) -> aio.Channel:
    return aio.connect(uri, **{"arrays": "numpy", "call_timeout_s": 20, **options})


def serve(uri: str, handlers: dict[str, Any], **options: Any) -> aio.Server:
    return aio.serve(uri, handlers, **{"arrays": "numpy", **options})


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def nothing_is_held(channels: list[aio.Channel], server: aio.Server) -> None:
    """Everything in flight is answered, and all memory was given back, on both sides."""
    await until(lambda: not server.inflight and not any(channel.inflight for channel in channels))
    if not channels[0].shm:
        return
    arenas = [channel._connection.arena for channel in channels]
    arenas += [client.connection.arena for client in server._service.clients]
    for _ in range(3):  # what goes back rides on these, there, and back
        await asyncio.gather(*(channel.call("nothing") for channel in channels for _ in range(2)))
    for channel in channels:
        channel._pump.send_returns()
    for client in server._service.clients:
        client.pump.send_returns()
    await until(lambda: not any(arena.in_use_nbytes for arena in arenas if arena is not None))


class Gate:
    """A coroutine handler that waits until it is let go; counts who came, who was cancelled, and how many at once."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.came = self.cancelled = self.inside = self.most = 0
        self.order: list[int] = []

    async def __call__(self, call: aio.Call) -> Any:
        self.came += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.order.append(call.attrs.get("n", -1))
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.inside -= 1
        return call.tensors


HANDLERS: dict[str, Any] = {"echo": lambda call: call.tensors, "nothing": lambda call: None}


# ---- many calls in flight --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", [1, 50])
def test_a_thousand_calls_in_flight(socket_uri: str, connections: int) -> None:
    async def main() -> None:
        gate = Gate()
        async with serve(socket_uri, {"gate": gate, **HANDLERS}) as server:
            channels = await asyncio.gather(*(connect(server.uri) for _ in range(connections)))
            calls = [
                asyncio.ensure_future(channels[n % connections].call("gate", X[: n % 100 + 1] + n)) for n in range(1000)
            ]
            await until(lambda: gate.came == 1000)
            assert gate.most == server.inflight == sum(channel.inflight for channel in channels) == 1000
            gate.open.set()
            for n, result in enumerate(await asyncio.gather(*calls)):
                assert np.array_equal(result[0], X[: n % 100 + 1] + n)
            del result, calls
            await nothing_is_held(channels, server)
            assert server.stats.calls >= 1000 and threading.active_count() <= 2
            for channel in channels:
                await channel.close()

    run(main())


@pytest.mark.parametrize("connections", [1, 50])
def test_half_of_a_thousand_calls_are_cancelled(socket_uri: str, connections: int) -> None:
    async def main() -> None:
        gate = Gate()
        async with serve(socket_uri, {"gate": gate, **HANDLERS}) as server:
            channels = await asyncio.gather(*(connect(server.uri) for _ in range(connections)))
            await asyncio.gather(*(channel.call("echo", X) for channel in channels))
            before, tasks = descriptors(), len(asyncio.all_tasks())
            calls = [asyncio.ensure_future(channels[n % connections].call("gate", X + n)) for n in range(1000)]
            await until(lambda: gate.came == 1000)
            for call in calls[::2]:
                call.cancel()
            await until(lambda: gate.cancelled == 500)
            gate.open.set()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(type(result) is asyncio.CancelledError for result in results[::2])
            assert all((result[0] == X + n).all() for n, result in enumerate(results) if n % 2)
            del results, calls, call
            await nothing_is_held(channels, server)
            if not channels[0].shm:  # else segments may have come
                assert descriptors() == before
            assert len(asyncio.all_tasks()) == tasks
            for channel in channels:
                await channel.close()

    run(main())


def test_replies_come_in_any_order(socket_uri: str) -> None:
    async def later(call: aio.Call) -> None:
        await asyncio.sleep(call.attrs["s"])

    async def main() -> None:
        async with serve(socket_uri, {"later": later}) as server, connect(server.uri) as channel:
            done: list[float] = []

            async def one(seconds: float) -> None:
                await channel.call("later", s=seconds)
                done.append(seconds)

            await asyncio.gather(*(one(seconds) for seconds in (0.2, 0.0, 0.1)))
            assert done == [0.0, 0.1, 0.2]

    run(main())


@pytest.mark.parametrize("workers", [0, 3])
def test_plain_functions(socket_uri: str, workers: int) -> None:
    threads = set()

    def slow(call: fastsplit.Call) -> Any:
        threads.add(threading.get_ident())
        time.sleep(0.01)
        out = call.empty(10, "int32")
        out[...] = call.attrs["n"]
        return out

    async def main() -> None:
        async with serve(socket_uri, {"slow": slow}, workers=workers) as server, connect(server.uri) as channel:
            results = await asyncio.gather(*(channel.call("slow", n=n) for n in range(20)))
            assert [int(result[0][9]) for result in results] == list(range(20))
            with pytest.raises(RemoteOpError, match="no such operation here; there are: slow"):
                await channel.call("fast")
            with pytest.raises(RemoteOpError, match="KeyError: 'n'"):
                await channel.call("slow")

    run(main())
    assert len(threads) == max(workers, 1) and (threading.get_ident() in threads) == (not workers)


# ---- submit ----------------------------------------------------------------------------------------------------------


def test_a_submitted_call_is_a_task(socket_uri: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serve(socket_uri, {"gate": gate, **HANDLERS}) as server, connect(server.uri) as channel:
            tasks = [channel.submit("gate", X + n, n=n) for n in range(20)]
            assert all(isinstance(task, asyncio.Task) and not task.done() for task in tasks)
            assert channel.inflight == 0  # they begin when the loop next runs
            seen: list[Any] = []
            tasks[0].add_done_callback(seen.append)
            await until(lambda: gate.came == 20)
            assert gate.order == list(range(20)) and channel.inflight == 20
            assert (await channel.submit("echo", X))[0][3] == 3
            gate.open.set()
            for n, (y,) in enumerate(await asyncio.gather(*tasks)):
                assert (y == X + n).all()
            assert seen == tasks[:1]

    run(main())


def test_cancelling_a_submitted_call_cancels_it(socket_uri: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serve(socket_uri, {"gate": gate, **HANDLERS}) as server, connect(server.uri) as channel:
            first, second, unsent = (channel.submit("gate", X) for _ in range(3))
            unsent.cancel()  # before it has begun
            await until(lambda: gate.came == 2)
            first.cancel()
            await until(lambda: gate.cancelled == 1)
            gate.open.set()
            assert (await second)[0][3] == 3
            for task in (first, unsent):
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert gate.came == 2
            del second, task
            await nothing_is_held([channel], server)

    run(main())


def test_a_submitted_call_that_nobody_keeps_goes_on(unix_uri: str) -> None:
    """The loop keeps tasks by weak references only: the channel keeps those that wait."""

    async def main() -> None:
        gate = Gate()
        limits = Limits(max_inflight=2)
        async with serve(unix_uri, {"gate": gate}, limits=limits) as server, connect(server.uri) as channel:
            done: list[Any] = []
            for _ in range(5):
                channel.submit("gate").add_done_callback(done.append)
            await until(lambda: gate.came == 2)
            gc.collect()
            gate.open.set()
            await until(lambda: len(done) == 5)
            assert [task.result() for task in done] == [()] * 5

    run(main())


def test_what_submit_refuses_at_once(unix_uri: str) -> None:
    async def main() -> None:
        async with serve(unix_uri, HANDLERS) as server:
            channel = await connect(server.uri)
            for wrong in ({"timeout_s": -1}, {"attrs": {"x": 1}, "x": 2}):
                with pytest.raises(SettingError):
                    channel.submit("nothing", **wrong)
            late = channel.submit("nothing", timeout_s=0)
            with pytest.raises(DeadlineError):
                await late
            with pytest.raises(RuntimeError, match="no running event loop"):
                await asyncio.to_thread(channel.submit, "nothing")
            await channel.close()
            with pytest.raises(ClosedError, match="the channel is closed: the channel was closed"):
                channel.submit("nothing")

    run(main())


def test_the_link_is_measured_while_calls_are_in_flight(serve: Any) -> None:
    blocking = serve("tcp://127.0.0.1:0", {"echo": lambda call: call.tensors}, arrays="numpy")

    async def main() -> None:
        async with connect(blocking.uri) as channel:
            calls = [channel.submit("echo", X + n) for n in range(50)]
            found = await channel.measure(100_000)
            assert found == channel.link and found.rtt_s is not None and found.rtt_s > 0
            assert type(channel.near) is bool
            for n, (y,) in enumerate(await asyncio.gather(*calls)):
                assert (y == X + n).all()

    run(main())


# ---- giving up -------------------------------------------------------------------------------------------------------


def test_a_deadline_costs_only_its_call(socket_uri: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serve(socket_uri, {"gate": gate, **HANDLERS}) as server, connect(server.uri) as channel:
            with pytest.raises(DeadlineError, match=r"^gate: no reply within its deadline of 0\.05 s$"):
                await channel.call("gate", X, timeout_s=0.05)
            await until(lambda: gate.cancelled == 1)  # a CANCEL came
            assert (await channel.call("echo", X))[0][7] == 7
            await until(lambda: not server.inflight and not channel.inflight)

    run(main())


def test_a_cancelled_request_gets_one_answer(unix_uri: str) -> None:
    """Cancelled before it began, while it runs, and by a handler that answers all the same."""
    gate = None

    async def stubborn(call: aio.Call) -> Any:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            return np.float32(7)

    async def main() -> None:
        nonlocal gate
        gate = Gate()
        async with serve(f"{unix_uri}?shm=off", {"gate": gate, "stubborn": stubborn}) as server:

            def client() -> None:
                with connected(server.uri) as peer:
                    peer.greet()
                    peer.send(frame(REQUEST, 1, "gate"), frame(CANCEL, 1))
                    assert peer.expect(ERROR).message.attrs["code"] == "cancelled"
                    peer.send(frame(REQUEST, 2, "stubborn"))
                    time.sleep(0.05)
                    peer.send(frame(CANCEL, 2))
                    assert peer.expect(REPLY).request_id == 2
                    peer.send(frame(CANCEL, 2), frame(CANCEL, 77))  # too late, and never there: nothing comes
                    peer.send(frame(REQUEST, 3, "nope"))
                    assert peer.expect(ERROR).request_id == 3

            await asyncio.to_thread(client)
            assert gate.came == 0 and not server.inflight

    run(main())


def test_what_was_not_sent_is_retracted_and_what_is_half_sent_is_sent(unix_uri: str) -> None:
    """The server reads nothing at first; then it finds whole frames only: two requests, and one CANCEL."""
    go = threading.Event()
    seen: list[tuple[int, int]] = []

    def script(peer: RawPeer) -> None:
        peer.greet()
        go.wait(10)
        while (came := peer.receive()) is not None and came.message.op != "end":
            seen.append((came.kind, came.request_id))
            if came.kind == REQUEST:
                peer.send(frame(REPLY, came.request_id))
        assert came is not None
        peer.send(frame(REPLY, came.request_id))

    async def main() -> None:
        with serving(f"{unix_uri}?shm=off", script) as uri:
            async with connect(uri) as channel:
                x = np.zeros(16 * MIB, np.uint8)
                calls = [asyncio.ensure_future(channel.call("take", x, timeout_s=30)) for _ in range(3)]
                calls.append(asyncio.ensure_future(channel.call("take", x[:10], timeout_s=0.05)))
                await asyncio.sleep(0.02)
                assert channel.inflight == 4 and channel._pump.outbox.queued_nbytes > 32 * MIB
                calls[0].cancel()  # half sent
                calls[2].cancel()  # waits in the queue
                with pytest.raises(DeadlineError, match=r"^take: not sent within 0\.05 s$"):
                    await calls[3]
                assert channel.inflight == 2 and channel._pump.outbox.queued_nbytes < 32 * MIB
                go.set()
                assert await calls[1] == ()
                await channel.call("end")
                assert seen == [(REQUEST, 1), (REQUEST, 2), (CANCEL, 1)]
                assert channel.inflight == 0

    run(main())


def test_cancelling_a_call_that_waits_for_its_turn(socket_uri: str) -> None:
    async def main() -> None:
        gate = Gate()
        limits = Limits(max_inflight=1)
        async with serve(socket_uri, {"gate": gate}, limits=limits) as server, connect(server.uri) as channel:
            calls = [asyncio.ensure_future(channel.call("gate", X, n=n)) for n in range(5)]
            late = asyncio.ensure_future(channel.call("gate", timeout_s=0.05))
            await until(lambda: gate.came == 1)
            with pytest.raises(DeadlineError, match=r"^gate: not sent within 0\.05 s, since other calls were$"):
                await late
            calls[1].cancel()
            calls[4].cancel()
            gate.open.set()
            await asyncio.wait(calls)
            assert gate.order == [0, 2, 3] and not channel._calls.turns.waiting and not channel._calls.turns.reserved

    run(main())


def test_a_woken_call_that_is_cancelled_lets_the_next_one_in(unix_uri: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serve(unix_uri, {"gate": gate}, limits=Limits(max_inflight=1)) as server:
            async with connect(server.uri) as channel:
                calls = [asyncio.ensure_future(channel.call("gate", n=n)) for n in range(3)]
                await until(lambda: gate.came == 1)
                gate.open.set()
                calls[0].add_done_callback(lambda _: calls[1].cancel())  # at the very moment at which its turn has come
                await asyncio.wait(calls)
                assert calls[1].cancelled() and calls[2].result() == () and not channel._calls.turns.reserved

    run(main())


# ---- back-pressure ---------------------------------------------------------------------------------------------------


def test_more_requests_than_the_server_takes_wait_in_order(socket_uri: str) -> None:
    async def main() -> None:
        gate = Gate()
        gate.open.set()
        limits = Limits(max_inflight=4)
        async with serve(socket_uri, {"gate": gate}, limits=limits) as server, connect(server.uri) as channel:
            done: list[int] = []

            async def one(n: int) -> None:
                await channel.call("gate", X, n=n)
                done.append(n)

            await asyncio.gather(*(one(n) for n in range(100)))
            assert gate.most <= 4 and gate.order == list(range(100)) and sorted(done) == list(range(100))

    run(main())


def test_a_discarded_frame_leaves_nothing_to_watch(unix_uri: str) -> None:
    """A socket that is watched for room, while nothing is to be sent, would wake the loop without end."""
    go, sent = threading.Event(), []

    def script(peer: RawPeer) -> None:
        peer.greet()
        go.wait(10)
        for _ in range(sent[0]):
            peer.send(frame(REPLY, peer.expect(REQUEST).request_id))

    async def main() -> None:
        with serving(f"{unix_uri}?shm=off", script) as uri:
            async with connect(uri) as channel:
                calls = []
                while channel._pump.outbox.idle:
                    calls.append(asyncio.ensure_future(channel.call("take", np.zeros(8192, np.uint8))))
                    for _ in range(3):
                        await asyncio.sleep(0)
                assert not channel._pump.outbox.first.started  # type: ignore[union-attr]
                calls.pop().cancel()
                await until(lambda: channel._pump.outbox.idle)
                sent.append(len(calls))
                go.set()
                await asyncio.gather(*calls)
                assert not channel._pump._watch.writes

    run(main())


def test_bytes_that_wait_to_be_sent_are_bounded(unix_uri: str) -> None:
    go = threading.Event()

    def script(peer: RawPeer) -> None:
        peer.greet()
        go.wait(10)
        for _ in range(21):
            peer.send(frame(REPLY, peer.expect(REQUEST).request_id))

    async def main() -> None:
        with serving(f"{unix_uri}?shm=off", script) as uri:
            async with connect(uri, max_queued_nbytes=3 * MIB) as channel:
                assert channel.max_queued_nbytes == 3 * MIB
                most = 0

                async def watch() -> None:
                    nonlocal most
                    while True:
                        most = max(most, channel._pump.outbox.queued_nbytes)
                        await asyncio.sleep(0)

                watcher = asyncio.ensure_future(watch())
                calls = [asyncio.ensure_future(channel.call("take", np.zeros(MIB, np.uint8))) for _ in range(20)]
                await asyncio.sleep(0.1)
                assert channel.stats.calls < 15  # what is in the kernel, and three that wait
                go.set()
                await asyncio.gather(*calls)
                watcher.cancel()
                assert MIB < most <= 3 * MIB and channel._pump.outbox.queued_nbytes == 0
                await channel.call("take", np.zeros(16 * MIB, np.uint8))  # more than that by itself goes alone

    run(main())


def test_a_client_that_does_not_read_its_replies_is_not_read(unix_uri: str) -> None:
    made = 0

    def make(call: fastsplit.Call) -> Any:
        nonlocal made
        made += 1
        return np.zeros(MIB, np.uint8)

    async def main() -> None:
        async with serve(f"{unix_uri}?shm=off", {"make": make}, max_queued_nbytes=2 * MIB) as server:
            go = threading.Event()

            def client() -> None:
                with connected(server.uri) as peer:
                    peer.greet()
                    for first in range(0, 40, 10):
                        peer.send(*(frame(REQUEST, 1 + first + n, "make") for n in range(10)))
                        time.sleep(0.05)
                    go.wait(10)
                    assert [peer.expect(REPLY).request_id for _ in range(40)] == list(range(1, 41))

            work = asyncio.ensure_future(asyncio.to_thread(client))
            await asyncio.sleep(0.4)
            assert made < 40
            go.set()
            await work
            assert made == 40

    run(main())


def test_memory_that_is_full_is_waited_for(unix_uri: str) -> None:
    async def main() -> None:
        limits = Limits(max_shared_nbytes=MIB)
        async with serve(unix_uri, HANDLERS, limits=limits) as server, connect(server.uri, limits=limits) as channel:
            x = np.arange(400_000, dtype=np.uint8)
            results = await asyncio.gather(*(_sum(channel, x) for _ in range(30)))
            assert set(results) == {int(x.sum())}
            held = [await channel.allocate(400_000, "uint8") for _ in range(2)]  # the last returns come with a bell
            with pytest.raises(ArenaFull):
                channel.empty(400_000, "uint8")
            with pytest.raises(ArenaFull):
                await channel.allocate(400_000, "uint8", timeout_s=0.05)
            with pytest.raises(ArenaFull):
                await channel.call("echo", x, timeout_s=0.05)
            with pytest.raises(ArenaFull):  # never: at once
                await channel.call("echo", np.zeros(2 * MIB, np.uint8))
            waiting = [asyncio.ensure_future(channel.allocate(400_000, "uint8")) for _ in range(2)]
            waiting.append(asyncio.ensure_future(_sum(channel, x)))
            await asyncio.sleep(0.02)
            assert not any(one.done() for one in waiting)
            assert (await channel.call("echo", held[0]))[0].nbytes == 400_000  # what needs no memory goes past them
            held.clear()
            await asyncio.wait(waiting[:2])
            del waiting[:2]
            assert await waiting[0] == int(x.sum())

    async def _sum(channel: aio.Channel, x: Any) -> int:
        (y,) = await channel.call("echo", x)
        return int(y.sum())

    run(main())


def test_a_reply_waits_for_memory(unix_uri: str) -> None:
    """The client holds the server's memory for a while; coroutines, plain functions, and workers wait for it."""

    async def fresh(call: aio.Call) -> Any:
        return await call.allocate(400_000, "uint8")

    def plain(call: fastsplit.Call) -> Any:
        return np.zeros(400_000, np.uint8)

    def worker(call: fastsplit.Call) -> Any:
        return call.empty(400_000, "uint8")

    async def main() -> None:
        for op, workers in (("fresh", 0), ("plain", 0), ("worker", 1)):
            limits = Limits(max_shared_nbytes=MIB)
            handlers = {"fresh": fresh, "plain": plain, "worker": worker, "nothing": lambda call: None}
            async with serve(unix_uri, handlers, workers=workers) as server:
                async with connect(server.uri, limits=limits) as channel:
                    held = [(await channel.call(op))[0] for _ in range(2)]
                    waiting = asyncio.ensure_future(channel.call(op))
                    await asyncio.sleep(0.02)
                    assert not waiting.done()
                    held.clear()
                    assert (await waiting)[0].nbytes == 400_000

    run(main())


# ---- the loop is never blocked ---------------------------------------------------------------------------------------


def test_the_loop_ticks_while_a_peer_reads_slowly(unix_uri: str) -> None:
    def script(peer: RawPeer) -> None:
        peer.greet()
        left = 64 * MIB
        while left > 0:
            left -= len(peer.sock.recv(2 * MIB))
            time.sleep(0.005)
        peer.sock.settimeout(0.3)
        try:
            while peer.sock.recv(MIB):
                pass
        except TimeoutError:
            peer.send(frame(REPLY, 1))

    async def main() -> None:
        with serving(f"{unix_uri}?shm=off", script) as uri:
            async with connect(uri) as channel:
                ticks = 0

                async def tick() -> None:
                    nonlocal ticks
                    while True:
                        await asyncio.sleep(0.001)
                        ticks += 1

                ticking = asyncio.ensure_future(tick())
                call = asyncio.ensure_future(channel.call("take", np.zeros(64 * MIB, np.uint8)))
                while not call.done():
                    before = channel._pump.outbox.queued_nbytes
                    await asyncio.sleep(0.01)
                    assert not before or ticks
                assert await call == ()
                ticking.cancel()
                assert ticks > 50  # of some hundred milliseconds

    run(main())


def test_the_loop_ticks_while_a_peer_is_told_what_it_did_wrong(socket_uri: str) -> None:
    async def main() -> None:
        async with serve(socket_uri, HANDLERS) as server, connect(server.uri) as channel:

            def client() -> str:
                with connected(server.uri) as peer:
                    peer.greet()
                    peer.send(b"x" * 100)
                    came = peer.expect(ABORT)
                    time.sleep(0.3)  # it does not leave
                    return str(came.message.attrs["text"])

            work = asyncio.ensure_future(asyncio.to_thread(client))
            calls = 0
            while not work.done():
                await channel.call("echo", X)
                calls += 1
            assert "magic" in await work
            assert calls > 50
            assert server.connections == 1

    run(main())


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_a_server_that_dies_with_calls_in_flight(socket_uri: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serve(socket_uri, {"gate": gate}) as server, connect(server.uri) as channel:
            calls = [asyncio.ensure_future(channel.call("gate", X)) for _ in range(50)]
            await until(lambda: gate.came == 50)
            (client,) = server._service.clients
            client.pump.close()  # as if its process had ended
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(result) for result in results} == {PeerLostError}
            assert len({id(result) for result in results}) == 50  # each its own, with its own traceback
            assert channel.closed
            with pytest.raises(ClosedError, match="the channel is closed: the peer closed the connection"):
                await channel.call("gate")
            client._end(None)
            await until(lambda: gate.cancelled == 50)

    run(main())


def test_a_client_that_dies_takes_its_tasks_along(socket_uri: str) -> None:
    async def main() -> None:
        gate = Gate()
        ended: list[int] = []

        async def noted(call: aio.Call) -> Any:
            call.client.on_end(lambda: ended.append(1))
            return await gate(call)

        async with serve(socket_uri, {"gate": noted}) as server:
            channel = await connect(server.uri)
            other = await connect(server.uri)
            calls = [asyncio.ensure_future(channel.call("gate", X)) for _ in range(50)]
            alive = asyncio.ensure_future(other.call("gate"))
            await until(lambda: gate.came == 51)
            channel._pump.close()
            await until(lambda: gate.cancelled == 50 and len(ended) == 50 and server.connections == 1)
            gate.open.set()
            assert await alive == ()
            await channel.close()
            channel._calls.end(ClosedError("the channel was closed"))
            assert {type(e) for e in await asyncio.gather(*calls, return_exceptions=True)} == {ClosedError}
            await other.close()

    run(main())


def test_closing_a_channel_with_calls_in_flight(socket_uri: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with serve(socket_uri, {"gate": gate}, limits=Limits(max_inflight=10)) as server:
            channel = await connect(server.uri)
            calls = [asyncio.ensure_future(channel.call("gate", X)) for _ in range(30)]
            await until(lambda: gate.came == 10)
            await channel.close()
            await channel.close()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(result) for result in results} == {ClosedError}
            await until(lambda: gate.cancelled == 10 and not server.connections)
            with pytest.raises(ClosedError, match="the channel is closed: the channel was closed"):
                await channel.call("gate")

    run(main())


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_a_server_lets_handlers_answer(socket_uri: str, workers: int) -> None:
    entered = threading.Event()

    async def task(call: aio.Call) -> Any:
        await asyncio.sleep(0.05)
        return call.tensors

    def plain(call: fastsplit.Call) -> Any:
        entered.set()
        time.sleep(0.05)
        return call.tensors

    async def main() -> None:
        server = await serve(socket_uri, {"task": task, "plain": plain}, workers=workers)
        async with connect(server.uri) as channel:
            calls = [asyncio.ensure_future(channel.call(op, X)) for op in ("task", "plain") * 2]
            await until(lambda: server.inflight or entered.is_set())
            await asyncio.sleep(0.01)
            await server.close()
            assert [len(result) for result in await asyncio.gather(*calls)] == [1] * 4
            await until(lambda: channel.closed)
        with pytest.raises(ConnectError):
            await connect(server.uri)
        with pytest.raises(ClosedError):
            await server.start()

    run(main())


def test_closing_a_server_cancels_what_takes_too_long(unix_uri: str) -> None:
    async def main() -> None:
        gate = Gate()
        server = await serve(unix_uri, {"gate": gate})
        async with connect(server.uri) as channel:
            call = asyncio.ensure_future(channel.call("gate"))
            await until(lambda: gate.came)
            await asyncio.gather(server.close(0.05), server.close())
            assert gate.cancelled == 1
            with pytest.raises(PeerLostError):
                await call

    run(main())


def test_an_address_is_taken_before_clients_are_served(unix_uri: str) -> None:
    """Clients that come meanwhile are served then."""

    async def main() -> None:
        server = serve(unix_uri, HANDLERS)
        assert server.bind() is server.bind() is server and not server.started
        opening = asyncio.ensure_future(asyncio.to_thread(lambda: fastsplit.connect(unix_uri).close()))
        async with server:
            await opening
        never = serve(unix_uri, HANDLERS).bind()
        await never.close()
        assert not os.path.exists(unix_uri.removeprefix("unix://"))
        with pytest.raises(ClosedError, match="the server was closed"):
            never.bind()

    run(main())


def test_serve_forever(unix_uri: str) -> None:
    async def main() -> None:
        server = serve(unix_uri, HANDLERS)
        forever = asyncio.ensure_future(server.serve_forever())
        await until(lambda: server.started)
        async with connect(server.uri) as channel:
            await channel.call("nothing")
        forever.cancel()
        with pytest.raises(asyncio.CancelledError):
            await forever
        assert not os.path.exists(unix_uri.removeprefix("unix://"))
        async with serve(unix_uri, HANDLERS) as server:
            forever = asyncio.ensure_future(server.serve_forever())
            await asyncio.sleep(0)
            await server.close()
            await forever

    run(main())


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_opening(unix_uri: str) -> None:
    async def main() -> None:
        async with serve(unix_uri, HANDLERS) as server:
            channel = connect(server.uri)
            for use in (lambda: channel.empty(3), lambda: channel.shm, lambda: channel.submit("nothing")):
                with pytest.raises(ClosedError, match="not open yet"):
                    use()
            for wait in (lambda: channel.call("nothing"), lambda: channel.allocate(3), channel.measure):
                with pytest.raises(ClosedError, match="not open yet"):
                    await wait()
            assert "closed" in repr(channel)
            async with channel:
                await channel.call("nothing")
                assert "open" in repr(channel) and channel.shm and "ring" in channel.shm_reason
            with pytest.raises(ClosedError):
                await channel
            async with await connect(server.uri) as channel:
                await channel.call("nothing")
            await connect(server.uri).close()

    run(main())


def test_cancelling_an_opening(unix_uri: str) -> None:
    async def main() -> None:
        done = threading.Event()
        with serving(f"{unix_uri}?shm=off", lambda peer: done.wait(5) and None) as uri:
            opening = asyncio.ensure_future(_open(connect(uri)))
            await asyncio.sleep(0.05)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            done.set()

    async def _open(channel: aio.Channel) -> None:
        await channel

    run(main())


@pytest.mark.parametrize(
    "spelling",
    [
        "aio = fastsplit.aio",
        "from fastsplit import aio",
        "import fastsplit.aio; aio = fastsplit.aio",
        "from fastsplit.aio import connect; aio = fastsplit.aio; assert connect is aio.connect",
    ],
)
def test_aio_is_imported_when_it_is_first_asked_for(spelling: str) -> None:
    code = (
        f"import sys, fastsplit; before = 'asyncio' in sys.modules; {spelling}; "
        "print(before, aio.__name__, sys.modules['fastsplit.aio'] is fastsplit.aio is aio, 'asyncio' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "fastsplit.aio", "True", "True"], done.stderr


# ---- with the blocking front -----------------------------------------------------------------------------------------


def test_a_blocking_channel_and_an_aio_server(socket_uri: str) -> None:
    async def double(call: aio.Call) -> Any:
        await asyncio.sleep(0)
        return call.tensors[0] * 2

    async def main() -> None:
        async with serve(socket_uri, {"double": double}) as server:

            def client() -> None:
                with fastsplit.connect(server.uri, arrays="numpy") as channel:
                    futures = [channel.submit("double", X + n) for n in range(200)]
                    for n, future in enumerate(futures):
                        assert (future.result(10)[0] == (X + n) * 2).all()
                    assert (channel.call("double", np.zeros(5 * MIB, np.uint8))[0] == 0).all()

            await asyncio.gather(*(asyncio.to_thread(client) for _ in range(2)))
            await until(lambda: not server.connections)
            assert server.stats.calls == 402

    run(main())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_aio_channel_and_a_blocking_server(socket_uri: str, serve: Any, workers: int) -> None:
    blocking = serve(socket_uri, {"double": lambda call: call.tensors[0] * 2}, arrays="numpy", workers=workers)

    async def main() -> None:
        async with connect(blocking.uri) as channel:
            results = await asyncio.gather(*(channel.call("double", X + n) for n in range(500)))
            assert all((result[0] == (X + n) * 2).all() for n, result in enumerate(results))
            del results
            assert ((await channel.call("double", np.ones(5 * MIB, np.uint8)))[0] == 2).all()

    run(main())


def test_codings_go_through(serve: Any) -> None:
    blocking = serve("tcp://127.0.0.1:0", {"echo": lambda call: call.tensors}, arrays="numpy")

    async def main() -> None:
        async with aio.serve("tcp://127.0.0.1:0", HANDLERS, arrays="numpy") as server:
            for uri in (server.uri, blocking.uri):
                async with connect(uri, codec="off") as channel:
                    x = np.linspace(0, 1, 100_000, dtype=np.float32)
                    (y,) = await channel.call("echo", x, wire_dtype="bfloat16")
                    assert y.dtype == np.float32 and not (y == x).all() and np.allclose(x, y, atol=0.01)
                    assert channel.stats.bytes_received < 2 * x.nbytes
                    assert (await channel.call("echo", x))[0].tolist() == x.tolist()

    run(main())
