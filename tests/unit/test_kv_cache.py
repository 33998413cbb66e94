"""KV caches on the executor: whose they are, how much they may take, what is never read, when memory comes back."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastsplit
from fastsplit import gpu_side
from fastsplit.errors import LimitError, RemoteOpError
from fastsplit.models import PRESETS, open_model
from fastsplit.split.contract import MAX_LANES
from fastsplit.split.plan import STEP_LISTS
from fastsplit.wire.call import Client

torch = pytest.importorskip("torch")

from fastsplit.executor.kv_cache import KVCache, KVCaches  # noqa: E402
from fastsplit.executor.service import Executor  # noqa: E402
from fastsplit.tee.remote import RemoteModel  # noqa: E402
from fastsplit.tee.runner import Runner  # noqa: E402

CONFIG = PRESETS["tiny"]
HEADS, HEAD_DIM, LAYERS = CONFIG.num_key_value_heads, CONFIG.head_dim, CONFIG.num_hidden_layers
POSITION = 4 * HEADS * HEAD_DIM
"""Bytes of one sequence's keys at one position of one layer."""
LEAST = 64
"""Positions that a layer gets at least."""


class _DirtyWork:
    """The CPU's work, whose memory comes full of NaN: what is read without having been written shows."""

    def __init__(self) -> None:
        self.left: int | None = None
        """How often there is memory before the device has none; None: always."""

    def take(self, tensor: Any) -> Any:
        return tensor

    def run(self, compute: Callable[[], object]) -> None:
        compute()

    def empty(self, shape: Any, dtype: Any) -> Any:
        if self.left is not None:
            if not self.left:
                raise MemoryError("no memory on the device")
            self.left -= 1
        return torch.full(tuple(shape), torch.nan, dtype=dtype)


WORK: Any = _DirtyWork()


def make_caches(max_caches: int = 4, max_positions: int = 10**6) -> KVCaches:
    """`max_positions`: of one layer's keys or values, in all."""
    return KVCaches(CONFIG, torch.float32, max_caches, max_positions * POSITION)


def open_one(caches: KVCaches, client: Client, batch: int = 1, capacity: int = 0) -> KVCache:
    return caches.find(client, caches.open(client, batch, capacity, torch.float32))


def rows(count: int, batch: int = 1, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, HEADS, HEAD_DIM, generator=generator)


def as_kept(given: Any) -> Any:
    return given.transpose(1, 2).flatten(0, 1)


def kept_keys(cache: KVCache, layer: int) -> Any:
    """What was stored of a layer's keys: as much of them as is said to be there."""
    return cache.keys(layer)[:, : cache.keys_filled[layer]]


def kept_values(cache: KVCache, layer: int) -> Any:
    return cache.values(layer)[:, : cache.values_filled[layer]]


def held(cache: KVCache) -> int:
    """Bytes that a session's tensors really take."""
    return sum(held.nbytes for held in (*cache._keys, *cache._values) if held is not None)


# ---- opening and closing ---------------------------------------------------------------------------------------------


def test_open_takes_no_memory_until_something_is_stored() -> None:
    caches, client = make_caches(), Client()
    cache = open_one(caches, client, batch=3, capacity=2**31)
    assert (caches.nbytes, cache.nbytes, len(caches)) == (0, 0, 1)
    assert (cache.batch, cache.link_dtype, cache.closed) == (3, torch.float32, False)


def test_capacity_is_room_from_the_first_row_on_and_no_room_is_made_twice() -> None:
    caches = make_caches()
    cache = open_one(caches, Client(), batch=2, capacity=100)
    cache.store_keys(WORK, 0, 0, rows(1, 2))
    assert caches.nbytes == cache.nbytes == held(cache) == 2 * 100 * POSITION
    cache.store_keys(WORK, 0, 1, rows(99, 2))
    assert caches.nbytes == held(cache) == 2 * 100 * POSITION
    cache.store_values(WORK, 1, 0, rows(1, 2))
    assert caches.nbytes == held(cache) == 2 * 2 * 100 * POSITION


@pytest.mark.parametrize("capacity", [0, 1, LEAST, LEAST + 1])
def test_the_least_room_there_is(capacity: int) -> None:
    cache = open_one(make_caches(), Client(), capacity=capacity)
    cache.store_keys(WORK, 0, 0, rows(1))
    assert cache.nbytes == max(capacity, LEAST) * POSITION


def test_closing_gives_all_memory_back_and_the_number_is_gone() -> None:
    caches, client = make_caches(), Client()
    numbers = [caches.open(client, 1, 0, torch.float32) for _ in range(3)]
    for number in numbers:
        cache = caches.find(client, number)
        for layer in range(LAYERS):
            cache.store_keys(WORK, layer, 0, rows(3))
            cache.store_values(WORK, layer, 0, rows(3))
    each = 2 * LAYERS * LEAST * POSITION
    assert caches.nbytes == 3 * each
    caches.close(client, numbers[1])
    assert (caches.nbytes, len(caches)) == (2 * each, 2)
    with pytest.raises(ValueError, match=f"session: {numbers[1]}, which is not open on this connection"):
        caches.find(client, numbers[1])
    with pytest.raises(ValueError, match="which is not open"):
        caches.close(client, numbers[1])
    caches.close(client, numbers[0])
    caches.close(client, numbers[2])
    assert (caches.nbytes, len(caches)) == (0, 0)


def test_a_number_is_never_given_twice_not_even_to_another_client() -> None:
    caches, clients = make_caches(), [Client(), Client()]
    seen = []
    for count in range(20):
        client = clients[count % 2]
        seen.append(caches.open(client, 1, 0, torch.float32))
        caches.close(client, seen[-1])
    assert len(set(seen)) == 20


@pytest.mark.parametrize("number", [0, -1, 10**18, None, "1", 1.0, b"1", [1], True])
def test_what_is_no_number_of_a_session(number: Any) -> None:
    caches, client = make_caches(), Client()
    caches.open(client, 1, 0, torch.float32)
    with pytest.raises(ValueError, match=r"session: .*, which is not open on this connection"):
        caches.find(client, number)


def test_one_client_does_not_reach_anothers_session() -> None:
    caches, owner, other = make_caches(), Client(), Client()
    number = caches.open(owner, 1, 0, torch.float32)
    own = caches.open(other, 1, 0, torch.float32)
    for stranger in (other, Client()):
        with pytest.raises(ValueError, match="which is not open on this connection"):
            caches.find(stranger, number)
        with pytest.raises(ValueError, match="which is not open on this connection"):
            caches.close(stranger, number)
    other._end()
    assert caches.find(owner, number) is not None
    with pytest.raises(ValueError, match="which is not open"):
        caches.find(owner, own)


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_sessions_are_limited_for_each_client_alone() -> None:
    caches, client = make_caches(max_caches=2), Client()
    numbers = [caches.open(client, 1, 0, torch.float32) for _ in range(2)]
    with pytest.raises(LimitError, match=r"^2 sessions open, expected at most 2 a client$"):
        caches.open(client, 1, 0, torch.float32)
    caches.open(Client(), 1, 0, torch.float32)
    caches.close(client, numbers[0])
    caches.open(client, 1, 0, torch.float32)
    assert len(caches) == 3


def test_bytes_are_limited_over_all_clients_and_a_refused_growth_leaves_everything_as_it_was() -> None:
    caches = make_caches(max_positions=3 * LEAST)
    first, second = (open_one(caches, Client()) for _ in range(2))
    keys = rows(LEAST)
    first.store_keys(WORK, 0, 0, keys)
    second.store_keys(WORK, 0, 0, rows(5, seed=1))
    before = caches.nbytes
    text = f"^KV caches of {4 * LEAST * POSITION} bytes in all, expected at most {3 * LEAST * POSITION}$"
    with pytest.raises(LimitError, match=text):  # both the old and the new memory are there while it moves
        first.store_keys(WORK, 0, LEAST, rows(1, seed=2))
    assert caches.nbytes == before == held(first) + held(second)
    assert first.keys_filled[0] == LEAST
    assert torch.equal(kept_keys(first, 0), as_kept(keys))
    first.store_keys(WORK, 0, 3, rows(1, seed=3))  # what needs no memory goes on
    first.store_values(WORK, 0, 0, rows(1, seed=3))  # and what fits
    with pytest.raises(LimitError):
        second.store_values(WORK, 0, 0, rows(1))
    first.close()
    second.store_values(WORK, 0, 0, rows(1))
    assert caches.nbytes == held(second) == 2 * LEAST * POSITION


def test_memory_that_the_device_refuses_is_not_counted() -> None:
    caches, work = make_caches(), _DirtyWork()
    cache = open_one(caches, Client())
    cache.store_keys(work, 0, 0, rows(LEAST))
    work.left = 0
    for attempt in (
        lambda: cache.store_keys(work, 0, LEAST, rows(1)),
        lambda: cache.store_values(work, 0, 0, rows(1)),
    ):
        with pytest.raises(MemoryError):
            attempt()
        assert caches.nbytes == cache.nbytes == held(cache) == LEAST * POSITION
        assert not cache.closed
    work.left = None
    cache.store_keys(work, 0, LEAST, rows(1))
    assert caches.nbytes == held(cache)


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_reorder_that_runs_out_of_memory_closes_the_session_and_gives_everything_back(left: int) -> None:
    """Neither the old order nor the new one is whole: nobody goes on with half of each."""
    caches, client, work = make_caches(), Client(), _DirtyWork()
    other = open_one(caches, client)
    other.store_keys(work, 0, 0, rows(1))
    number = caches.open(client, 2, 0, torch.float32)
    cache = caches.find(client, number)
    for layer in range(LAYERS):
        cache.store_keys(work, layer, 0, rows(5, 2))
        cache.store_values(work, layer, 0, rows(5, 2))
    cache.lane(0).rows = 5
    work.left = left
    with pytest.raises(MemoryError):
        cache.reorder(work, torch.tensor([1, 0, 0]))
    work.left = None
    assert (cache.closed, cache.nbytes, held(cache), cache.lanes) == (True, 0, 0, {})
    assert caches.nbytes == held(other) == LEAST * POSITION
    assert cache.keys_filled == cache.values_filled == LAYERS * [0]
    for read in (cache.keys, cache.values):
        with pytest.raises(ValueError, match="holds nothing yet"):
            read(0)
    caches.close(client, number)
    assert (len(caches), caches.nbytes) == (1, LEAST * POSITION)


@pytest.mark.parametrize(
    ("filled", "room"),
    [
        pytest.param(1, 5, id="the first layer does not fit"),
        pytest.param(2, 9, id="the second layer does not fit"),
        pytest.param(2, 11, id="the last layer does not fit, if nothing is given back before"),
    ],
)
def test_a_refused_reorder_leaves_the_session_as_it_was(filled: int, room: int) -> None:
    caches = make_caches(max_positions=room * LEAST)
    cache = open_one(caches, Client(), batch=2)
    stored = [rows(5, 2, seed=layer) for layer in range(filled)]
    for layer, keys in enumerate(stored):
        cache.store_keys(WORK, layer, 0, keys)
    before = caches.nbytes
    with pytest.raises(LimitError, match="KV caches of"):
        cache.reorder(WORK, torch.tensor([1, 0, 1, 0]))
    assert caches.nbytes == before == held(cache)
    assert (cache.batch, cache.closed) == (2, False)
    for layer, keys in enumerate(stored):
        assert torch.equal(kept_keys(cache, layer), as_kept(keys))
        cache.store_keys(WORK, layer, 5, rows(1, 2))


def test_a_reorder_needs_both_orders_at_once_and_no_more() -> None:
    caches = make_caches(max_positions=12 * LEAST)
    cache = open_one(caches, Client(), batch=2)
    stored = [rows(5, 2, seed=layer) for layer in range(2)]
    for layer, keys in enumerate(stored):
        cache.store_keys(WORK, layer, 0, keys)
    indices = [1, 0, 1, 0]
    cache.reorder(WORK, torch.tensor(indices))
    assert caches.nbytes == cache.nbytes == held(cache) == 8 * LEAST * POSITION
    for layer, keys in enumerate(stored):
        assert torch.equal(kept_keys(cache, layer), as_kept(keys[indices]))


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_growing_keeps_what_was_in_it() -> None:
    caches = make_caches()
    cache = open_one(caches, Client(), batch=2)
    whole = rows(700, 2)
    start = 0
    for count in (1, 1, 62, 1, 100, 35, 500):
        part = whole[:, start : start + count]
        cache.store_keys(WORK, 1, start, part)
        cache.store_values(WORK, 1, start, -part)
        start += count
        assert torch.equal(kept_keys(cache, 1), as_kept(whole[:, :start]))
        assert torch.equal(kept_values(cache, 1), -as_kept(whole[:, :start]))
        assert caches.nbytes == cache.nbytes == held(cache)


def test_storing_again_from_an_earlier_position_forgets_what_was_behind() -> None:
    cache = open_one(make_caches(), Client())
    old, new = rows(30), rows(4, seed=1)
    cache.store_keys(WORK, 0, 0, old)
    cache.store_keys(WORK, 0, 10, new)
    assert torch.equal(kept_keys(cache, 0), as_kept(torch.cat([old[:, :10], new], dim=1)))


def test_a_gap_is_refused_in_every_layer_by_its_own_count() -> None:
    cache = open_one(make_caches(), Client())
    cache.store_keys(WORK, 0, 0, rows(7))
    for store, layer, start, have in (
        (cache.store_keys, 0, 8, 7),
        (cache.store_keys, 1, 7, 0),
        (cache.store_values, 0, 7, 0),
        (cache.store_values, 0, 2**31 - 1, 0),
        (cache.store_keys, 0, -1, 7),
    ):
        text = f"^start: {start}, expected 0 to the {have} positions that layer {layer} has$"
        with pytest.raises(ValueError, match=text):
            store(WORK, layer, start, rows(1))
    assert cache.keys_filled == [7] + [0] * (LAYERS - 1)


def test_memory_that_was_never_written_is_never_read() -> None:
    cache = open_one(make_caches(), Client(), batch=2, capacity=200)
    for read in (cache.keys, cache.values):
        with pytest.raises(ValueError, match=r"^layer: 0, of which the session holds nothing yet$"):
            read(0)
    cache.store_keys(WORK, 0, 0, rows(20, 2))
    with pytest.raises(ValueError, match="holds nothing yet"):
        cache.values(0)
    with pytest.raises(ValueError, match="holds nothing yet"):
        cache.keys(1)
    cache.store_values(WORK, 0, 0, rows(3, 2))
    assert (cache.keys_filled[0], cache.values_filled[0]) == (20, 3)
    assert cache.keys(0).shape == cache.values(0).shape == (2 * HEADS, 200, HEAD_DIM), "all that there is room for"
    cache.truncate(10)
    cache.store_keys(WORK, 0, 10, rows(195, 2))  # it moves
    assert (cache.keys_filled[0], cache.keys(0).shape[1]) == (205, 400)
    cache.reorder(WORK, torch.tensor([1, 1, 0]))
    cache.truncate(100)
    assert (cache.keys_filled[0], cache.values_filled[0]) == (100, 3)
    for kept in (kept_keys(cache, 0), kept_values(cache, 0)):
        assert bool(kept.isfinite().all())
    assert kept_keys(cache, 0).shape == (3 * HEADS, 100, HEAD_DIM)
    assert cache.keys(0).shape == (3 * HEADS, 400, HEAD_DIM)


def test_truncate_forgets_keeps_the_memory_and_never_makes_longer() -> None:
    caches = make_caches()
    cache = open_one(caches, Client())
    keys = rows(30)
    cache.store_keys(WORK, 0, 0, keys)
    cache.store_values(WORK, 0, 0, keys[:, :20])
    nbytes = caches.nbytes
    for length, kept in ((10**6, (30, 20)), (25, (25, 20)), (8, (8, 8)), (9, (8, 8)), (0, (0, 0))):
        cache.truncate(length)
        assert (cache.keys_filled[0], cache.values_filled[0]) == kept
        assert torch.equal(kept_keys(cache, 0), as_kept(keys[:, : kept[0]]))
    assert caches.nbytes == nbytes == held(cache)
    with pytest.raises(ValueError, match="start: 1, expected 0 to the 0"):
        cache.store_keys(WORK, 0, 1, rows(1))


@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 1, 0], [1], [2, 2], [0, 0, 1, 1, 2, 2, 0], [1] * 9], ids=str)
def test_reorder_repeats_selects_and_counts_what_it_takes(indices: list[int]) -> None:
    caches = make_caches()
    cache = open_one(caches, Client(), batch=3)
    keys, values = rows(70, 3), rows(66, 3, seed=1)
    cache.store_keys(WORK, 1, 0, keys)
    cache.store_values(WORK, 1, 0, values)
    cache.reorder(WORK, torch.tensor(indices))
    assert cache.batch == len(indices)
    assert torch.equal(kept_keys(cache, 1), as_kept(keys[indices]))
    assert torch.equal(kept_values(cache, 1), as_kept(values[indices]))
    assert cache.nbytes == caches.nbytes == held(cache) == len(indices) * (70 + 66) * POSITION
    cache.store_keys(WORK, 1, 70, rows(1, len(indices)))
    cache.store_keys(WORK, 0, 0, rows(1, len(indices)))
    assert caches.nbytes == held(cache)


def test_truncate_and_reorder_forget_what_was_on_its_way() -> None:
    cache = open_one(make_caches(), Client(), batch=2)
    for forget in (lambda: cache.truncate(0), lambda: cache.reorder(WORK, torch.tensor([1])), cache.close):
        cache.lane(3).rows = 5
        forget()
        assert cache.lane(3).rows == 0


def test_lanes_are_few_and_each_is_one() -> None:
    cache = open_one(make_caches(), Client())
    assert cache.lane(0) is cache.lane(0) is not cache.lane(MAX_LANES - 1)
    for number in (-1, MAX_LANES, 10**9, None, "0", 1.0):
        with pytest.raises(ValueError, match=f"^lane: {number!r}, expected an int from 0 to {MAX_LANES - 1}$"):
            cache.lane(number)
    assert len(cache.lanes) == 2


# ---- connections that end --------------------------------------------------------------------------------------------


def test_a_clients_end_takes_its_sessions_and_nobody_elses() -> None:
    caches, leaving, staying = make_caches(), Client(), Client()
    for client in (leaving, leaving, staying):
        open_one(caches, client).store_keys(WORK, 0, 0, rows(1))
    leaving._end()
    assert (len(caches), caches.nbytes) == (1, LEAST * POSITION)
    number = caches.open(leaving, 1, 0, torch.float32)  # a handler was still at work for it
    assert len(caches) == 1
    with pytest.raises(ValueError, match="which is not open"):
        caches.find(leaving, number)


def test_what_is_at_work_as_its_client_leaves_ends_without_holding_memory() -> None:
    caches, client = make_caches(), Client()
    cache = open_one(caches, client, batch=2)
    cache.store_keys(WORK, 0, 0, rows(LEAST, 2))
    view = cache.keys(0)
    with cache.lock:  # as a handler has it
        client._end()  # must not wait for it
        assert (caches.nbytes, cache.nbytes, cache.closed) == (0, 0, True)
        assert bool(view.isfinite().all())
        cache.store_keys(WORK, 1, 0, rows(200, 2))
        with pytest.raises(ValueError, match=r"^session: it was closed meanwhile$"):
            cache.reorder(WORK, torch.tensor([0]))
    assert (caches.nbytes, len(caches)) == (0, 0)


def test_a_client_that_leaves_while_its_memory_is_being_made() -> None:
    caches, client = make_caches(), Client()
    cache = open_one(caches, client)

    class Work(_DirtyWork):
        def empty(self, shape: Any, dtype: Any) -> Any:
            client._end()
            return super().empty(shape, dtype)

    cache.store_keys(Work(), 0, 0, rows(3))
    assert (caches.nbytes, cache.nbytes, len(caches)) == (0, 0, 0)


def test_many_threads_open_fill_and_close_and_nothing_is_left() -> None:
    caches = make_caches(max_caches=3, max_positions=40 * LEAST)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(20):
                client = Client()
                for _ in range(3):
                    cache = open_one(caches, client, batch=1 + seed % 3)
                    try:
                        with cache.lock:
                            cache.store_keys(WORK, 0, 0, rows(30 + 5 * turn, cache.batch))
                            cache.reorder(WORK, torch.tensor([0]))
                    except LimitError:
                        pass
                client._end()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (caches.nbytes, len(caches)) == (0, 0)


# ---- over a connection -----------------------------------------------------------------------------------------------


@pytest.fixture
def executor() -> Executor:
    return Executor(open_model("random:tiny"), max_sessions=3, max_cache_nbytes=1000 * POSITION)


@pytest.fixture
def server(executor: Executor, unix_uri: str) -> Iterator[fastsplit.Server]:
    with fastsplit.Server(unix_uri, executor.handlers, arrays="torch") as server:
        yield server


def opened(channel: fastsplit.Channel, batch: int = 1, capacity: int = 0) -> int:
    return int(channel.call("open", batch=batch, capacity=capacity, dtype="float32").attrs["session"])


def at(cache: int, start: int = 0) -> dict[str, int]:
    return {"session": cache, "lane": 0, "layer": 0, "start": start}


def fill(channel: fastsplit.Channel, cache: int, count: int) -> None:
    """One layer's keys and values."""
    x = torch.ones(1, count, CONFIG.hidden_size)
    (qk,) = channel.call("run", x, **at(cache), steps="qkv store_v")
    channel.call("run", qk[:, :, -HEADS:].contiguous(), **at(cache), steps="store_k")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


@pytest.mark.parametrize(
    "leave",
    [fastsplit.Channel.close, lambda channel: channel._connection.transport.shutdown()],
    ids=["closed", "lost"],
)
def test_sessions_go_with_their_connection(
    executor: Executor, server: fastsplit.Server, leave: Callable[[fastsplit.Channel], None]
) -> None:
    with fastsplit.connect(server.uri, arrays="torch") as staying:
        kept = opened(staying)
        fill(staying, kept, 3)
        with fastsplit.connect(server.uri, arrays="torch") as channel:
            for _ in range(3):
                fill(channel, opened(channel), 9)
            assert (len(executor.sessions), executor.sessions.nbytes) == (4, 8 * LEAST * POSITION)
            leave(channel)
            wait_for(lambda: (len(executor.sessions), executor.sessions.nbytes) == (1, 2 * LEAST * POSITION))
        staying.call("truncate", session=kept, length=1)
    wait_for(lambda: executor.sessions.nbytes == len(executor.sessions) == 0)


def test_the_peer_is_told_which_limit_and_goes_on(executor: Executor, server: fastsplit.Server) -> None:
    with (
        fastsplit.connect(server.uri, arrays="torch") as channel,
        fastsplit.connect(server.uri, arrays="torch") as other,
    ):
        first, *_ = [opened(channel) for _ in range(3)]
        with pytest.raises(RemoteOpError, match="LimitError: 3 sessions open, expected at most 3 a client"):
            opened(channel)
        fill(other, opened(other), 400)  # values, and keys
        nbytes = executor.sessions.nbytes
        with pytest.raises(RemoteOpError, match=r"LimitError: KV caches of \d+ bytes in all, expected at most \d+"):
            fill(channel, first, 201)
        assert executor.sessions.nbytes == nbytes
        fill(channel, first, 90)
        channel.call("close", session=first)
        assert executor.sessions.nbytes == nbytes
        opened(channel)


def test_a_session_of_another_connection_is_out_of_reach_for_every_operation(server: fastsplit.Server) -> None:
    with (
        fastsplit.connect(server.uri, arrays="torch") as owner,
        fastsplit.connect(server.uri, arrays="torch") as thief,
    ):
        number = opened(owner)
        fill(owner, number, 5)
        opened(thief)
        x = torch.ones(1, 1, CONFIG.hidden_size)
        for op, tensors, attrs in (
            ("truncate", (), {"session": number, "length": 0}),
            ("reorder", (torch.tensor([0]),), {"session": number}),
            ("close", (), {"session": number}),
            *(("run", (x,), {**at(number, 5), "steps": steps}) for steps in STEP_LISTS),
        ):
            with pytest.raises(RemoteOpError, match=f"session: {number}, which is not open on this connection"):
                thief.call(op, *tensors, **attrs)
        owner.call("truncate", session=number, length=5)


def test_a_session_that_was_closed_as_a_handler_came_to_it_is_refused(executor: Executor) -> None:
    """Its connection ended, or a reorder found no memory: nothing is put into it any more."""
    client = Client()
    number = executor.sessions.open(client, 1, 0, torch.float32)
    executor.sessions.find(client, number).close()
    for steps in STEP_LISTS:
        attrs = {**at(number), "steps": steps}
        request: Any = SimpleNamespace(tensors=(torch.tensor([[1]]),), attrs=attrs, reply_attrs={}, client=client)
        with pytest.raises(ValueError, match=r"^session: it was closed meanwhile$"):
            executor.handlers["run"](request)
    assert executor.sessions.nbytes == 0
    executor.sessions.close(client, number)
    assert len(executor.sessions) == 0


def test_a_call_that_fails_leaves_nothing_in_its_lane(executor: Executor) -> None:
    """What a lane has is not counted as a cache is: nobody may leave it behind. Other lanes go on."""

    def request(lane: int, *tensors: Any, **attrs: Any) -> Any:
        attrs = {**at(number), "lane": lane, **attrs}
        return SimpleNamespace(
            tensors=tensors,
            attrs=attrs,
            reply_attrs={},
            client=client,
            empty=lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype)),
        )

    client = Client()
    number = executor.sessions.open(client, 1, 0, torch.float32)
    cache = executor.sessions.find(client, number)
    ids, tables = torch.tensor([[1, 2]]), [torch.ones(1, 2, HEAD_DIM // 2) for _ in range(2)]
    first = "embed tables norm qkv store_v rope store_k scores"
    for lane in (0, 1):
        executor.handlers["run"](request(lane, ids, *tables, blocks=[0, 2, 0, 2], steps=first))
    with pytest.raises(ValueError, match="of the residual stream in this lane"):
        executor.handlers["run"](request(0, torch.ones(1, 1, CONFIG.intermediate_size), steps="down add norm lm_head"))
    lane, other = cache.lane(0), cache.lane(1)
    assert (lane.x, lane.cos, lane.sin, lane.blocks, lane.rows) == (None, None, None, None, 0)
    assert other.x is not None
    assert (other.x.shape[1], other.rows) == (2, 2)
    assert cache.keys_filled[0] == cache.values_filled[0] == 2


def test_values_that_were_never_stored_are_no_part_of_attention(server: fastsplit.Server) -> None:
    """Keys may be ahead of values: how far each is filled is asked, though there is memory for more."""
    with fastsplit.connect(server.uri, arrays="torch") as channel:
        number = opened(channel, capacity=50)
        fill(channel, number, 5)
        keys, queries = torch.ones(1, 3, HEADS, HEAD_DIM), torch.ones(1, 1, CONFIG.num_attention_heads, HEAD_DIM)
        attrs = at(number, 5)
        (packed,) = channel.call("run", queries, keys, **attrs, first=0, last=8, steps="store_k scores")
        with pytest.raises(RemoteOpError, match="layer: 5 values there, expected 8"):
            channel.call("run", packed, **attrs, steps="values o")


def test_values_that_were_never_stored_are_no_part_of_any_block(server: fastsplit.Server) -> None:
    """The last block is not always the one with the most columns."""
    with fastsplit.connect(server.uri, arrays="torch") as channel:
        number = opened(channel, capacity=50)
        fill(channel, number, 5)
        heads = CONFIG.num_attention_heads
        keys, queries = torch.ones(1, 3, HEADS, HEAD_DIM), torch.ones(1, 2, heads, HEAD_DIM)
        attrs = at(number, 5)
        blocks = [0, 1, 0, 8, 1, 1, 0, 2]
        (packed,) = channel.call("run", queries, keys, **attrs, blocks=blocks, steps="store_k scores")
        with pytest.raises(RemoteOpError, match="layer: 5 values there, expected 8"):
            channel.call("run", packed, **attrs, steps="values o")


def test_the_scripts_flags_are_the_limits(socket_dir: Path) -> None:
    uri = f"unix://{socket_dir}/s"
    flags = ["--model", "random:tiny", "--listen", uri, "--max-sessions", "2", "--max-cache-mib", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "fastsplit.gpu_side", "--device", "cpu", *flags],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(fastsplit.__file__).parent.parent,
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline().startswith("READY")
            with fastsplit.connect(uri, arrays="torch") as channel:
                small, large = opened(channel), opened(channel, capacity=2**20 // POSITION + 1)
                with pytest.raises(RemoteOpError, match="expected at most 2 a client"):
                    opened(channel)
                with pytest.raises(RemoteOpError, match="expected at most 1048576"):
                    fill(channel, large, 1)
                fill(channel, small, 1)
        finally:
            process.terminate()
        assert process.wait(20) == 0


def test_the_flags_defaults_and_what_they_refuse(capfd: pytest.CaptureFixture[str]) -> None:
    args = gpu_side._parser().parse_args(["--model", "random:tiny"])
    assert (args.max_sessions, args.max_cache_mib) == (64, 8192)
    for flag in ("--max-sessions", "--max-cache-mib"):
        for value in ("0", "-1", "x", "1.5"):
            with pytest.raises(SystemExit) as error:
                gpu_side._parser().parse_args(["--model", "random:tiny", flag, value])
            assert error.value.code == 2
            assert f"argument {flag}" in capfd.readouterr().err


# ---- keys and values in the TEE --------------------------------------------------------------------------------------


def test_a_refused_reorder_leaves_a_cache_in_the_tee_as_it_was(executor: Executor, unix_uri: str) -> None:
    ids, nbytes = torch.arange(60).view(2, 30), 2 * LAYERS * 2 * LEAST * POSITION
    with (
        fastsplit.Server(unix_uri, executor.handlers, arrays="torch") as server,
        fastsplit.connect(server.uri, arrays="torch") as channel,
        torch.inference_mode(),
    ):
        model = RemoteModel.fetch(channel, None)
        runner = Runner(model, channel, "tee-attention", max_cache_nbytes=2 * nbytes)
        with runner.new_cache(2) as cache, runner.new_cache(2) as other:
            for each in (cache, other):
                runner.forward(ids[:, :20], each)
            expected = runner.forward(ids[:, 20:], other)
            other.close()
            with pytest.raises(LimitError, match=f"expected at most {2 * nbytes}"):
                cache.reorder(torch.zeros(3, dtype=torch.int64))
            assert (cache.batch, cache.length) == (2, 20)
            assert torch.equal(runner.forward(ids[:, 20:], cache), expected)
            cache.reorder(torch.tensor([1]))
            assert runner.forward(ids[:1, :1], cache).shape[0] == 1
