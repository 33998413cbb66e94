"""The pool: aligned, writable, reused, and a block's loan lasts until its last view dies."""

from __future__ import annotations

import _thread
import gc
import os
import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from fastsplit.tensors import pool as module
from fastsplit.tensors.pool import ALIGNMENT, Pool, Tenant

LARGE = 1024 * 1024


@pytest.mark.parametrize(
    "nbytes", [0, 1, 63, 64, 65, 128, 129, 256, 257, 512, 513, 4096, 65535, 65536, 65537, LARGE, 5 * LARGE + 1]
)
def test_what_is_handed_out(nbytes: int) -> None:
    pool = Pool()
    for memory in [pool.allocate(nbytes) for _ in range(3)]:
        assert memory.dtype == np.uint8 and memory.shape == (nbytes,)
        assert memory.ctypes.data % ALIGNMENT == 0
        assert memory.flags.writeable and memory.flags.c_contiguous
        memory[:] = 1


def test_no_two_loans_overlap() -> None:
    pool = Pool()
    sizes = random.Random(1)
    held = [pool.allocate(sizes.choice((1, 60, 64, 100, 300, 512, 1000, 70_000))) for _ in range(400)]
    for number, memory in enumerate(held):
        memory[:] = number % 251
    assert all((memory == number % 251).all() for number, memory in enumerate(held))


def test_blocks_are_reused() -> None:
    pool = Pool()
    memory = pool.allocate(LARGE)
    address = memory.ctypes.data
    assert pool.idle_nbytes == 0
    del memory
    assert pool.idle_nbytes == LARGE
    again = pool.allocate(LARGE - 100)  # the same size class
    assert again.ctypes.data == address and pool.idle_nbytes == 0


def _numpy_view(memory):
    return memory[5:].reshape(-1, 1)[::2]


def _torch_view(memory):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(memory).view(torch.float32)[3:].reshape(-1, 1)


def _memoryview(memory):
    return memoryview(memory)[10:]


def _torch_to_numpy(memory):
    return _torch_view(memory).numpy()


@pytest.mark.parametrize("view", [_numpy_view, _torch_view, _memoryview, _torch_to_numpy])
def test_a_loan_lasts_until_the_last_view_dies(view) -> None:
    pool = Pool()
    memory = pool.allocate(LARGE)
    address = memory.ctypes.data
    kept = view(memory)
    del memory
    gc.collect()
    assert pool.idle_nbytes == 0
    assert pool.allocate(LARGE).ctypes.data != address
    del kept
    gc.collect()
    assert pool.idle_nbytes == 2 * LARGE


def test_small_memory_is_freed_with_its_last_cell() -> None:
    pool = Pool()
    cell = pool.allocate(10)
    slab = cell.base
    while slab.base is not None:
        slab = slab.base
    assert slab.nbytes <= 4096 + ALIGNMENT


def test_idle_memory_is_bounded() -> None:
    pool = Pool(max_idle_nbytes=3 * LARGE)
    held = [pool.allocate(LARGE) for _ in range(10)]
    held.clear()
    assert pool.idle_nbytes == 3 * LARGE
    pool.trim(LARGE)
    assert pool.idle_nbytes == LARGE
    pool.trim()
    assert pool.idle_nbytes == 0


def test_trim_takes_the_least_recently_used_class_first() -> None:
    pool = Pool()
    for size in (LARGE, 2 * LARGE, 4 * LARGE, LARGE):  # the last one makes the first class the newest
        pool.allocate(size)
    pool.trim(5 * LARGE)
    assert pool.idle_nbytes == 5 * LARGE
    pool.trim(2 * LARGE)
    assert pool.idle_nbytes == LARGE


def test_size_classes_waste_little_and_are_few() -> None:
    pool = Pool()
    for nbytes in range(65536, 8 * LARGE, 99_991):
        pool.allocate(nbytes)
        assert nbytes <= max(pool._idle) and len(pool._idle) <= 4 * 8
        pool.trim()
    for nbytes in (65536, 65537, 100_000, LARGE + 1, 3 * LARGE + 7):
        pool.allocate(nbytes)
        assert nbytes <= pool.idle_nbytes <= nbytes * 1.26
        pool.trim()


def test_claimed_memory_is_not_touched() -> None:
    """A length that a peer only claims costs address space, not memory."""

    def resident_nbytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    pool = Pool()
    before = resident_nbytes()
    memory = pool.allocate(8 * 1024**3)
    assert resident_nbytes() - before < 64 * LARGE
    memory[-1] = 1
    del memory
    assert pool.idle_nbytes == 0  # more than is kept


def test_no_memory_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        Pool().allocate(2**62)


def test_threads() -> None:
    """Loans end in other threads than they began in, all at once; none is ever handed out twice."""
    pool = Pool(max_idle_nbytes=8 * LARGE)
    failures = []

    def work(seed: int) -> None:
        sizes = random.Random(seed)
        held = []
        for step in range(400):
            memory = pool.allocate(sizes.choice((40, 500, 66_000, 131_072, 200_000)))
            memory[:8] = mark = (seed * 37 + step) % 256
            held.append((memory, mark))
            if len(held) > 8:
                memory, mark = held.pop(sizes.randrange(len(held)))
                if not (memory[:8] == mark).all():
                    failures.append((seed, step))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert pool.idle_nbytes <= 8 * LARGE


# ---- what stays idle -------------------------------------------------------------------------------------------------


@pytest.fixture
def watchers(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Idle blocks age a hundred times as fast. Gives the pools' threads that are at work."""
    running: list[object] = []
    start = _thread.start_new_thread

    def run(watch: Callable[..., None], *args: object) -> None:
        watch(*args)
        running.pop()

    def spy(watch: Callable[..., None], args: tuple[object, ...]) -> int:
        running.append(watch)
        return start(run, (watch, *args))

    monkeypatch.setattr(module, "_IDLE_S", 0.15)
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(_thread, "start_new_thread", spy)
    return running


def _until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not there():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)


def test_idle_memory_goes_back_without_a_call() -> None:
    assert module._IDLE_S + module._LOOK_EVERY_S <= 30  # seconds


def test_the_thread_that_gives_back_ends_with_the_last_block(watchers: list[object]) -> None:
    pool = Pool()
    for _ in range(3):  # it starts again
        pool.allocate(LARGE)
        pool.allocate(2 * LARGE)
        assert pool.idle_nbytes == 3 * LARGE and len(watchers) == 1
        _until(lambda: pool.idle_nbytes == 0 and not watchers)


def test_what_is_in_use_stays_fast(watchers: list[object]) -> None:
    """The block that is used again and again is the same one all the time; only the other goes."""
    pool = Pool()
    held = [pool.allocate(LARGE), pool.allocate(LARGE)]
    held.pop()
    address = held.pop().ctypes.data
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        assert pool.allocate(LARGE).ctypes.data == address
        time.sleep(0.01)
    assert pool.idle_nbytes == LARGE


def test_a_pool_that_is_gone_ends_its_thread(watchers: list[object]) -> None:
    Pool().allocate(LARGE)
    assert watchers
    gc.collect()
    _until(lambda: not watchers)


def test_without_a_thread_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    pool = Pool()
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", fail)
        pool.allocate(LARGE)
        assert pool.idle_nbytes == 0
    pool.allocate(LARGE)
    assert pool.idle_nbytes == LARGE  # the next one is kept again


def test_a_block_that_comes_back_as_the_thread_ends_is_watched() -> None:
    """At the very moment between its last look and its end."""
    pool = Pool()
    pool._unwatched.pop()  # as if a thread were there
    pool.allocate(LARGE)
    assert pool._look()  # there is something: it stays

    class Late(list):  # type: ignore[type-arg]
        def append(self, token: object) -> None:
            pool._unwatched = [token]
            pool._idle[LARGE] = [(time.monotonic(), module._map(LARGE))]  # by another thread, which found no token

    pool.trim()
    pool._unwatched = Late()
    assert pool._look() and not pool._unwatched


def test_a_forked_child_starts_afresh(watchers: list[object]) -> None:
    pool = Pool()
    held = pool.allocate(2 * LARGE)
    pool.allocate(LARGE)
    pid = os.fork()
    if pid == 0:
        try:
            kept = pool.idle_nbytes
            del held  # the child's copy of what the parent holds
            back = pool.idle_nbytes
            time.sleep(0.4)
            os._exit(0 if (kept, back, pool.idle_nbytes) == (0, 2 * LARGE, 0) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    held[:] = 1  # still the parent's
    _until(lambda: pool.idle_nbytes == 0)


def test_a_tenant_that_has_left_keeps_little(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.MAX_LEFT_NBYTES == 256 * LARGE
    monkeypatch.setattr(module, "MAX_LEFT_NBYTES", 4 * LARGE)
    pool = Pool()
    gone, other = Tenant(pool), Tenant(pool)
    held = [gone.allocate(LARGE) for _ in range(8)]
    other_held = [other.allocate(LARGE) for _ in range(8)]
    del held[:6]
    assert pool.idle_nbytes == 6 * LARGE
    gone.close()
    assert pool.idle_nbytes == 4 * LARGE
    held.clear()
    assert pool.idle_nbytes == 4 * LARGE
    other_held.clear()
    assert pool.idle_nbytes == 12 * LARGE
