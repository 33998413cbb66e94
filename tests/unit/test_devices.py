"""Devices: CUDA's whole path on a driver that does everything as late, or as soon, as events allow; and the CPU."""

from __future__ import annotations

import _thread
import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from lazy_driver import STREAMS, LazyDriver, poison_

from fastsplit.errors import ModelError
from fastsplit.executor import cuda as cuda_module
from fastsplit.executor import device as device_module
from fastsplit.executor.cuda import Cuda, TorchDriver
from fastsplit.executor.device import Cpu, open_device
from fastsplit.executor.service import Executor
from fastsplit.models import open_model
from fastsplit.split.blocks import Block, block_attrs, packed_elements, row_blocks
from fastsplit.split.contract import CONTRACT
from fastsplit.split.plan import STEP_LISTS
from fastsplit.wire.call import Client

MODEL = open_model("random:tiny")
CONFIG = MODEL.config
HEADS, KV_HEADS, HEAD_DIM = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
HIDDEN, INTER = CONFIG.hidden_size, CONFIG.intermediate_size
SCHEDULES = [eager for count in range(4) for eager in combinations(STREAMS, count)]


def call(client: Client, tensors: Sequence[torch.Tensor] = (), **attrs: Any) -> Any:
    """A request as a handler sees it; the reply's memory is poison until it is written."""

    def empty(shape: Sequence[int], dtype: str) -> torch.Tensor:
        return poison_(torch.empty(tuple(shape), dtype=getattr(torch, dtype)))

    return SimpleNamespace(tensors=tuple(tensors), attrs=attrs, reply_attrs={}, empty=empty, client=client)


class Step(NamedTuple):
    """A request. `order`: what happens with it on streams that do everything at once; DMA is "in" and "out".

    `scores`: how many elements of the last result mean something, where that is packed scores.
    """

    op: str
    tensors: list[torch.Tensor]
    attrs: dict[str, Any]
    order: list[str]
    scores: int = 0


def steps(dtype: str, session: int) -> Iterator[Step]:
    """Every operation, one after another in one session: what one of them stores is what a later one reads."""
    kind = getattr(torch, dtype)
    done = 0

    def random(*shape: int, kind: torch.dtype = kind) -> torch.Tensor:
        nonlocal done
        done += 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(done)).to(kind)

    def at(layer: int, start: int = 0, lane: int = 0) -> dict[str, Any]:
        return {"session": session, "lane": lane, "layer": layer, "start": start}

    def packed(blocks: list[Block]) -> torch.Tensor:
        return random(packed_elements(2, HEADS, blocks))

    def scores(blocks: list[Block]) -> int:
        return 2 * HEADS * sum(block.rows * block.columns for block in blocks)

    def give(count: int) -> list[str]:
        return count * ["compute", "out"]

    ids, one_id = torch.tensor([[3, 0, 255, 7, 7], [1, 2, 3, 4, 5]]), torch.tensor([[9], [250]])
    blocks, one = row_blocks(5, 5, 2), [Block(0, 1, 0, 5)]
    next_one = [Block(0, 1, 0, 6)]
    keep = torch.tensor([4, 1])
    scales, one_scale = random(2, 5, kind=torch.float32), random(2, 1, kind=torch.float32)
    qk, q, k, v = HEADS + KV_HEADS, HEADS, KV_HEADS, KV_HEADS

    def run(steps: str, tensors: list[torch.Tensor], where: dict[str, Any], order: list[str], blocks: Any = ()) -> Step:
        attrs = {**where, "steps": steps, **(block_attrs(blocks) if blocks else {})}
        return Step("run", tensors, attrs, order, scores(blocks) if blocks else 0)

    yield run("embed", [ids], at(0), ["in", *give(1)])
    for each in ("q", "k", "v", "gate", "up", "lm_head"):
        yield run(each, [random(2, 5, HIDDEN)], at(1), ["in", *give(1)])
    yield run("qkv", [random(2, 5, HIDDEN)], at(1), ["in", *give(2)])
    yield run("gate_up", [random(2, 5, HIDDEN)], at(1), ["in", *give(1)])
    yield run("o", [random(2, 5, HEADS * HEAD_DIM)], at(1), ["in", *give(1)])
    yield run("down", [random(2, 1, INTER)], at(1), ["in", *give(1)])
    # per-op and batched, of layer 1
    tensors = [random(2, 5, q, HEAD_DIM), random(2, 5, k, HEAD_DIM)]
    yield run("store_k scores", tensors, at(1), ["in", "compute", "in", *give(1)], blocks)
    tensors = [packed(blocks), random(2, 5, v, HEAD_DIM)]
    yield run("store_v values", tensors, at(1), ["in", "compute", "in", *give(1)])
    yield run("store_k", [random(2, 5, k, HEAD_DIM)], at(1), ["in", "compute"])
    yield run("store_v", [random(2, 5, v, HEAD_DIM)], at(1), ["in", "compute"])
    # fused: q and k there and back, v stays; then the next token
    yield run("qkv store_v", [random(2, 5, HIDDEN)], at(0), ["in", *give(1), "compute", "compute"])
    yield run("store_k scores", [random(2, 5, qk, HEAD_DIM)], at(0), ["in", "compute", *give(1)], blocks)
    yield run("values o", [packed(blocks)], at(0), ["in", "compute", *give(1)])
    yield run("qkv store_v", [random(2, 1, HIDDEN)], at(0, 5), ["in", *give(1), "compute", "compute"])
    yield run("store_k scores", [random(2, 1, qk, HEAD_DIM)], at(0, 5), ["in", "compute", *give(1)], next_one)
    yield run("values o", [packed(next_one)], at(0, 5), ["in", "compute", *give(1)])
    yield Step("truncate", [], {"session": session, "length": 0}, [])
    # folded, the last layer with one row of each sequence
    attended = ["compute", "compute", "out", "compute", "compute", "out"]
    stored = ["compute", *give(1), "compute", "compute"]
    yield run("embed norm qkv store_v", [ids], at(0), ["in", *give(1), *stored])
    tensors = [random(2, 5, qk, HEAD_DIM), scales]
    yield run("store_k scale_v scores", tensors, at(0), ["in", "compute", "in", "compute", *give(1)], blocks)
    yield run("values o add norm gate_up", [packed(blocks)], at(0), ["in", *attended])
    yield run("down add norm qkv store_v", [random(2, 5, INTER)], at(0), ["in", *give(1), *stored])
    tensors = [random(2, 1, q, HEAD_DIM), random(2, 5, k, HEAD_DIM), scales, keep]
    order = ["in", "compute", "in", "compute", "in", "compute", "in", *give(1)]
    yield run("store_k scale_v select scores", tensors, at(1), order, one)
    yield run("values o add norm gate_up", [packed(one)], at(1), ["in", *attended])
    yield run("down add norm lm_head", [random(2, 1, INTER)], at(1), ["in", *give(1), "compute", *give(1)])
    yield run("embed norm qkv store_v", [ids], at(0), ["in", *give(1), *stored])
    yield run("store_k scale_v", [random(2, 5, k, HEAD_DIM), scales], at(0), ["in", "compute", "in", "compute"])
    # minimal, the same; then the next token
    tables = [random(1, 5, HEAD_DIM // 2, kind=torch.float32) for _ in range(2)]
    first = "embed tables norm qkv store_v rope store_k"
    following = "down add norm qkv store_v rope store_k"
    gate_up = "scale_kv values o add norm gate_up"
    projected = 5 * ["compute"]  # the norm, the product, v's storing, the rotation, k's storing
    scaled = ["in", "compute", "compute"]
    order = ["in", *give(1), "in", "in", *projected, *give(1)]
    selecting = [*projected, "in", "compute", "compute", *give(1)]
    yield run(f"{first} scores", [ids, *tables], at(0, lane=1), order, blocks)
    yield run(gate_up, [packed(blocks), scales], at(0, lane=1), [*scaled, "in", *attended])
    tensors = [random(2, 5, INTER), keep]
    yield run(f"{following} select scores", tensors, at(0, lane=1), ["in", *give(1), *selecting], one)
    yield run(gate_up, [packed(one), scales], at(1, lane=1), [*scaled, "in", *attended])
    yield run("down add norm lm_head", [random(2, 1, INTER)], at(1, lane=1), ["in", *give(1), "compute", *give(1)])
    yield run(first, [ids, *tables], at(0, lane=1), ["in", *give(1), "in", "in", *projected])
    yield run("scale_kv", [scales], at(0, lane=1), scaled)
    tensors = [ids, *tables, keep]
    yield run(f"{first} select scores", tensors, at(0, lane=1), ["in", *give(1), "in", "in", *selecting], one)
    yield run(gate_up, [packed(one), scales], at(0, lane=1), [*scaled, "in", *attended])
    tables = [random(1, 1, HEAD_DIM // 2, kind=torch.float32) for _ in range(2)]
    yield run(f"{first} scores", [one_id, *tables], at(0, 5, lane=1), order, next_one)
    yield run(gate_up, [packed(next_one), one_scale], at(0, 5, lane=1), [*scaled, "in", *attended])
    yield run(following, [random(2, 1, INTER)], at(0, lane=1), ["in", *give(1), *projected])
    tables = [random(2, 1, HEAD_DIM // 2, kind=torch.float32) for _ in range(2)]
    yield run(f"{first} scores", [one_id, *tables], at(0, lane=1), order, [Block(0, 1, 0, 1)])
    order = ["in", *give(1), *projected, *give(1)]
    yield run(f"{following} scores", [random(2, 1, INTER)], at(0, lane=1), order, [Block(0, 1, 0, 1)])
    # attention in the TEE
    reply = ["compute", *give(2)]
    yield run("embed norm qkv", [ids], at(0), ["in", *give(1), *reply])
    yield run("o add norm gate_up", [random(2, 5, q * HEAD_DIM)], at(0), ["in", *give(1), "compute", *give(1)])
    yield run("down add norm qkv", [random(2, 5, INTER)], at(0), ["in", *give(1), *reply])
    tensors = [random(2, 1, q * HEAD_DIM), keep]
    order = ["in", "compute", "in", *give(1), "compute", *give(1)]
    yield run("select o add norm gate_up", tensors, at(1), order)
    yield run("down add norm lm_head", [random(2, 1, INTER)], at(1), ["in", *give(1), "compute", *give(1)])
    yield run("residual norm qkv", [random(2, 5, HIDDEN)], at(0), ["in", "compute", *reply])
    # a new order, one more sequence; and a cache that has to grow
    yield run("qkv store_v", [random(2, 5, HIDDEN)], at(0), ["in", *give(1), "compute", "compute"])
    yield run("store_k", [random(2, 5, k, HEAD_DIM)], at(0), ["in", "compute"])
    moved = 4 * ["compute"]  # keys and values of two layers
    yield Step("reorder", [torch.tensor([1, 0, 1])], {"session": session}, ["in", *moved])
    yield Step("reorder", [torch.tensor([2, 0])], {"session": session}, ["in", *moved])
    more = row_blocks(70, 75, 70)
    yield run("qkv store_v", [random(2, 70, HIDDEN)], at(0, 5), ["in", *give(1), "compute", "compute", "compute"])
    order = ["in", "compute", "compute", *give(1)]
    yield run("store_k scores", [random(2, 70, qk, HEAD_DIM)], at(0, 5), order, more)
    yield run("values o", [packed(more)], at(0, 5), ["in", "compute", *give(1)])
    yield Step("close", [], {"session": session}, [])


def test_every_list_of_steps_is_among_the_steps_here() -> None:
    assert {step.attrs.get("steps") for step in steps("float32", 1)} - {None} == set(STEP_LISTS)


def run(executor: Executor, client: Client, step: Step) -> list[torch.Tensor]:
    results = executor.handlers[step.op](call(client, step.tensors, **step.attrs))
    results = [] if results is None else [results] if isinstance(results, torch.Tensor) else list(results)
    return [*results[:-1], results[-1][: step.scores]] if step.scores else results


def opened(executor: Executor, client: Client, dtype: str) -> int:
    request = call(client, batch=2, capacity=1, dtype=dtype)
    executor.handlers["open"](request)
    number: int = request.reply_attrs["session"]
    return number


class Reference(NamedTuple):
    """What the CPU makes of the steps, in an executor's dtype and a session's."""

    dtype: str
    wire: str
    steps: list[Step]
    results: list[list[torch.Tensor]]


@pytest.fixture(
    scope="module", params=[("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")], ids="-".join
)
def reference(request: pytest.FixtureRequest) -> Reference:
    dtype, wire = request.param
    executor, client = Executor(MODEL, dtype=dtype), Client()
    number = opened(executor, client, wire)
    asked = list(steps(wire, number))
    results = [run(executor, client, step) for step in asked]
    assert not any(result.isnan().any() for each in results for result in each)
    assert (executor.sessions.nbytes, len(executor.sessions)) == (0, 0)
    return Reference(dtype, wire, asked, results)


@pytest.mark.parametrize("eager", SCHEDULES, ids=lambda eager: "+".join(eager) or "lazy")
def test_every_operation_gives_what_the_cpu_gives_with_one_dma_a_tensor(
    reference: Reference, eager: tuple[str, ...]
) -> None:
    """Keys and values stay on the device between one call and the next; poison never shows up."""
    driver = LazyDriver(eager)
    executor, client = Executor(MODEL, device=Cuda(driver), dtype=reference.dtype), Client()
    assert opened(executor, client, reference.wire) == 1
    assert driver.copies == []
    for step, expected in zip(reference.steps, reference.results):
        driver.copies.clear()
        synchronized = driver.synchronized
        results = run(executor, client, step)
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted), step.op
        assert driver.idle, step.op
        transfers = [what for what in step.order if what != "compute"]
        assert [direction for direction, _ in driver.copies] == transfers, step.op
        waits = 0 if step.op in ("truncate", "close") else 1
        assert driver.synchronized - synchronized == waits, f"{step.op}: nobody waits in between"
        received = sum(nbytes for way, nbytes in driver.copies if way == "in")
        assert received == sum(tensor.nbytes for tensor in step.tensors)


@pytest.mark.parametrize("name", ["tee_weights", "describe"])
def test_what_is_the_tees_own_takes_no_dma(name: str) -> None:
    driver = LazyDriver()
    executor = Executor(MODEL, device=Cuda(driver))
    executor.handlers[name](call(Client()))
    assert (driver.copies, driver.log) == ([], [])


def test_transfers_overlap_with_computing(reference: Reference) -> None:
    """With nothing to wait for but what is needed, each result leaves, and each input comes, while another computes."""
    driver = LazyDriver(STREAMS)
    executor, client = Executor(MODEL, device=Cuda(driver), dtype=reference.dtype), Client()
    opened(executor, client, reference.wire)
    for step in reference.steps:
        driver.log.clear()
        run(executor, client, step)
        if reference.dtype == reference.wire == "float32":
            assert driver.log == step.order, step.op
        else:  # with casts between, of rotary tables at least
            transfers = [what for what in driver.log if what != "compute"]
            assert transfers == [what for what in step.order if what != "compute"], step.op


@pytest.mark.parametrize(("dtype", "wire"), [("float32", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("device", [Cpu(), Cuda(LazyDriver(STREAMS))], ids=["cpu", "cuda"])
def test_what_is_behind_the_scores_is_nothing_of_ours(device: Any, dtype: str, wire: str) -> None:
    """Memory comes undefined, maybe with another client's data in it: all of a reply is written before it is sent."""
    executor, client = Executor(MODEL, device=device, dtype=dtype), Client()
    number = opened(executor, client, wire)
    seen = 0
    for step in steps(wire, number):
        results = executor.handlers[step.op](call(client, step.tensors, **step.attrs))
        results = [] if results is None else [results] if isinstance(results, torch.Tensor) else results
        assert not any(result.isnan().any() for result in results), step.op
        if step.scores:
            behind = results[-1][step.scores :]
            assert not behind.any(), step.op
            seen += len(behind)
    assert seen


# ---- a work ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", SCHEDULES, ids=lambda eager: "+".join(eager) or "lazy")
def test_what_a_work_gives_can_be_read_by_later_ones(eager: tuple[str, ...]) -> None:
    """Within the work, and in another: a residual stream is kept on the device, and leaves once for the caller."""
    driver = LazyDriver(eager)
    device = Cuda(driver)
    first, second, third = (torch.empty(3) for _ in range(3))
    with device.work() as work:
        x = work.take(torch.arange(3.0))
        kept = work.give(first, lambda out: torch.add(x, 1, out=out))
        assert kept is not first
        work.give(second, lambda out: torch.mul(kept, 2, out=out))
    with device.work() as work:
        work.give(third, lambda out: torch.mul(kept, 3, out=out))
    assert [tensor.tolist() for tensor in (first, second, third)] == [[1, 2, 3], [2, 4, 6], [3, 6, 9]]
    assert driver.copies == [("in", 12), ("out", 12), ("out", 12), ("out", 12)]


@pytest.mark.parametrize("eager", SCHEDULES, ids=lambda eager: "+".join(eager) or "lazy")
def test_scratch_memory_is_written_and_read_in_the_order_of_computing(eager: tuple[str, ...]) -> None:
    """Nobody keeps it but what computes with it, and memory of one work stays what it is in the next."""
    driver = LazyDriver(eager)
    device = Cuda(driver)
    result = torch.empty(3)
    with device.work() as work:
        x = work.take(torch.arange(3.0))
        cache = work.empty((3,), torch.float32)
        scratch = work.empty((3,), torch.float32)
        work.run(lambda: torch.add(x, 1, out=scratch))
        work.run(lambda: cache.copy_(scratch))
        work.run(scratch.zero_)
    with device.work() as work:
        work.run(lambda: cache.mul_(10))
        work.give(result, lambda out: out.copy_(cache))
    assert result.tolist() == [10, 20, 30]
    assert driver.log.count("compute") == 5


@pytest.mark.parametrize("eager", SCHEDULES, ids=lambda eager: "+".join(eager) or "lazy")
def test_what_is_independent_has_streams_of_its_own(eager: tuple[str, ...]) -> None:
    """Of one key on the same ones, in order; of another beside them, but behind the weights' loading."""
    driver = LazyDriver(eager)
    device = Cuda(driver)
    keys = [Client() for _ in range(6)]
    weights = driver.empty((3,), torch.float32, driver.compute_stream())
    driver.run(lambda: weights.fill_(2), driver.compute_stream())
    results = [torch.empty(3) for _ in keys]
    with contextlib.ExitStack() as stack:
        works = [stack.enter_context(device.work(key)) for key in keys]
        for index in reversed(range(len(keys))):  # the last one is started first
            work = works[index]
            x = work.take(torch.full((3,), float(index)))
            work.give(results[index], lambda out, x=x: torch.mul(x, weights, out=out))
        assert len(driver.streams) == 4 * 3
    assert [result.tolist() for result in results] == [[2.0 * index] * 3 for index in range(len(keys))]
    with device.work(keys[2]) as work:
        work.run(lambda: None)
    assert len(driver.streams) == 4 * 3
    assert driver.idle


def test_one_callers_work_is_over_though_anothers_is_not() -> None:
    driver = LazyDriver()
    device = Cuda(driver)
    first, second = Client(), Client()
    for key in (first, second):  # new streams wait for what was loaded
        with device.work(key):
            pass
    done: list[str] = []
    with device.work(first) as slow:
        slow.run(lambda: done.append("slow"))
        with device.work(second) as quick:
            quick.run(lambda: done.append("quick"))
        assert done == ["quick"]
    assert done == ["quick", "slow"]


def test_what_runs_waits_for_inputs_and_is_over_with_the_work() -> None:
    driver = LazyDriver()
    device = Cuda(driver)
    seen: list[float] = []
    with device.work() as work:
        x = work.take(torch.ones(1))
        work.run(lambda: seen.append(float(x[0])))
        assert seen == []
    assert seen == [1.0]
    assert driver.log == ["in", "compute"]
    assert driver.idle


def test_the_lazy_driver_poisons_memory_that_is_used_out_of_order() -> None:
    """Scratch memory belongs to the computing stream: whoever writes to it elsewhere finds out."""
    driver = LazyDriver(["inward"])
    device = Cuda(driver)
    result = torch.empty(2)
    with device.work() as work:
        scratch = work.empty((2,), torch.float32)
        driver.copy(scratch, torch.ones(2), driver.streams[STREAMS.index("inward")])
        work.give(result, lambda out: out.copy_(scratch))
    assert bool(result.isnan().all())


def test_whatever_streams_use_is_kept_until_they_are_done() -> None:
    driver = LazyDriver()
    device = Cuda(driver)
    results = []
    with device.work() as work:
        host, reply = torch.ones(3), torch.empty(3)
        taken = work.take(host)
        work.give(reply, lambda out: torch.mul(results[0](), 2, out=out))
        results += [weakref.ref(taken), weakref.ref(host), weakref.ref(reply)]
        values = reply.numpy()  # its memory, not the tensor
        del taken, host, reply
        gc.collect()
        assert not driver.idle
        assert all(result() is not None for result in results)
    assert values.tolist() == [2, 2, 2]
    assert [result() for result in results] == [None, None, None]


def test_after_an_error_nothing_is_under_way_any_more() -> None:
    driver = LazyDriver()
    device = Cuda(driver)

    def fail() -> None:
        with device.work() as work:
            work.take(torch.ones(3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert driver.log == ["in"]
    assert driver.idle


# ---- page-locking ----------------------------------------------------------------------------------------------------


def test_segments_are_page_locked_while_they_are_mapped(caplog: pytest.LogCaptureFixture) -> None:
    driver = LazyDriver()
    device = Cuda(driver)
    segment = torch.zeros(64)
    inside, outside = segment[8:16], torch.zeros(8)
    unmapping = device.on_segment(segment.data_ptr(), segment.nbytes)
    assert unmapping is not None
    assert driver.registered == {segment.data_ptr(): 256}
    with device.work() as work:
        x = work.take(inside)
        work.give(outside, lambda out: out.copy_(x))
    assert (device.transfers.page_locked_nbytes, device.transfers.pageable_nbytes) == (32, 32)
    unmapping()
    assert driver.registered == {}
    with device.work() as work:
        work.take(inside)
    assert (device.transfers.page_locked_nbytes, device.transfers.pageable_nbytes) == (32, 64)
    assert (device.transfers.segments_registered, device.transfers.segments_refused) == (1, 0)
    assert device.summary == (
        "cpu: 32 bytes by DMA, 64 bytes pageable; 1 segments of shared memory page-locked, 0 refused"
    )
    assert caplog.records == []


def test_a_refusal_is_said_once_counted_and_not_the_end(caplog: pytest.LogCaptureFixture) -> None:
    driver = LazyDriver()
    device = Cuda(driver)
    driver.refusal = "out of memory (cudaError 2)"
    segment, result = torch.arange(4.0), torch.empty(4)
    for _ in range(3):
        assert device.on_segment(segment.data_ptr(), segment.nbytes) is None
    with device.work() as work:
        x = work.take(segment)
        work.give(result, lambda out: out.copy_(x))
    assert torch.equal(result, segment)
    assert (device.transfers.segments_refused, device.transfers.pageable_nbytes) == (3, 32)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "cpu: a segment of 16 bytes could not be page-locked, so transfers to and from it are slower: "
        "out of memory (cudaError 2)"
    )


def test_unmapping_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    driver = LazyDriver()
    device = Cuda(driver)
    first, second = device.on_segment(4096, 4096), device.on_segment(8192, 4096)
    assert first is not None
    assert second is not None
    driver.refusal = "not registered"
    first()
    driver.refusal = None
    driver.registered.clear()  # the driver itself fails
    second()
    assert ["not registered" in record.getMessage() for record in caplog.records] == [True, False]


class _Cudart:
    """What torch binds of the runtime, with a code to answer."""

    def __init__(self) -> None:
        self.code = 0
        self.calls: list[tuple[Any, ...]] = []

    def cudaHostRegister(self, *args: int) -> int:
        self.calls.append(args)
        return self.code

    def cudaHostUnregister(self, *args: int) -> int:
        self.calls.append(args)
        return self.code

    def cudaGetErrorString(self, code: int) -> str:
        return {712: "part or all of the requested memory range is already mapped"}[code]


def test_the_real_driver_gives_reasons_and_clears_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart, cleared = _Cudart(), []
    fake = SimpleNamespace(cudart=lambda: cudart, device=lambda device: pytest.MonkeyPatch.context())
    monkeypatch.setattr(cuda_module, "_cuda", fake)

    def ones(*args: Any, **kwargs: Any) -> None:
        cleared.append(kwargs["device"])
        raise RuntimeError("CUDA error: part or all of the requested memory range is already mapped")

    driver = TorchDriver(torch.device("cuda", 1))
    assert driver.register(4096, 8192) is None
    assert driver.unregister(4096) is None
    assert cudart.calls == [(4096, 8192, 1), (4096,)]
    cudart.code = 712
    monkeypatch.setattr(torch, "ones", ones)
    reason = "part or all of the requested memory range is already mapped (cudaError 712)"
    assert driver.register(4096, 8192) == reason
    assert driver.unregister(4096) == reason
    assert cleared == 2 * [torch.device("cuda", 1)]


# ---- the CPU, and choosing -------------------------------------------------------------------------------------------


def test_the_cpu_reads_and_writes_where_tensors_lie() -> None:
    device = Cpu()
    assert device.on_segment is None
    assert device.summary is None
    assert not device.asynchronous
    assert Executor(MODEL).on_segment is None
    x, result = torch.ones(3), torch.empty(3)
    ran: list[int] = []
    with device.work() as work:
        assert work.take(x) is x
        out = work.give(result, lambda out: out.fill_(float(out.data_ptr() == result.data_ptr())))
        assert out is result
        work.run(lambda: ran.append(1))
        assert ran == [1]
    assert result.tolist() == [1, 1, 1]


@pytest.mark.parametrize("shape", [(), (3,), (0, 5), (300, 400)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_of_the_cpus(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Large or small, from one place or another: it is the caller's, writable and contiguous."""
    with Cpu().work() as work:
        tensors = [work.empty(shape, dtype) for _ in range(3)]
    for number, tensor in enumerate(tensors):
        assert (tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()) == (dtype, shape, True)
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_an_executor_says_how_many_of_the_machines_cores_it_computes_with(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """None of them where there is a device of its own."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for device, expected in ((Cpu(), threads), (Cuda(LazyDriver()), 0)):
        request = call(Client())
        Executor(MODEL, device=device).handlers["describe"](request)
        assert type(request.reply_attrs["threads"]) is int
        assert request.reply_attrs["threads"] == expected
        assert set(request.reply_attrs) == {"config", "contract", "dtype", "name", "threads"}
        assert request.reply_attrs["contract"] == CONTRACT


def test_an_executor_loads_in_a_thread_that_ends() -> None:
    """OpenMP keeps workers for every thread that ever computed, and they would be more than there are cores."""
    seen: set[threading.Thread] = set()

    def progress(items: Any, total: int) -> Any:
        for item in items:
            seen.add(threading.current_thread())
            yield item

    Executor(MODEL, progress=progress)
    (loading,) = seen
    assert loading is not threading.current_thread()
    assert not loading.is_alive()


@pytest.mark.usefixtures("sigint")
def test_an_interrupt_does_not_wait_for_the_weights() -> None:
    """They may take minutes: whoever is stopped by a signal meanwhile ends soon."""
    loaded, go = threading.Event(), threading.Event()

    def progress(items: Any, total: int) -> Any:
        for index, item in enumerate(items):
            if index == 2:
                _thread.interrupt_main()
                go.wait(0.5)
            yield item
        loaded.set()

    try:
        with pytest.raises(KeyboardInterrupt):
            Executor(MODEL, progress=progress)
        assert not loaded.is_set()
    finally:
        go.set()


def test_what_goes_wrong_as_weights_are_loaded_is_raised_to_whoever_asked() -> None:
    threads = set(threading.enumerate())

    def fail(items: Any, total: int) -> Any:
        raise ModelError("model.norm.weight: not there")

    with pytest.raises(ModelError, match=r"^model\.norm\.weight: not there$"):
        Executor(MODEL, progress=fail)
    assert set(threading.enumerate()) == threads


def test_an_executor_passes_its_devices_hook_on() -> None:
    device = Cuda(LazyDriver())
    assert Executor(MODEL, device=device).on_segment == device.on_segment


@pytest.mark.parametrize(
    ("name", "text"),
    [("tpu", "device 'tpu'"), ("meta", "device 'meta', expected auto, cpu or cuda:N"), ("cuda:99", "this machine has")],
)
def test_a_device_that_is_not_there(name: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        open_device(name)


def test_auto_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_device("auto").torch_device == open_device("cpu").torch_device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(device_module, "TorchDriver", lambda device: LazyDriver())
    assert isinstance(open_device("auto"), Cuda)
    with pytest.raises(ModelError, match="has 2 CUDA devices"):
        open_device("cuda:2")


# ---- trust -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [text for text in STEP_LISTS if text.startswith("embed")])
def test_ids_are_what_was_checked_even_if_the_caller_changes_them(steps: str) -> None:
    ids = torch.tensor([[1, 2]])
    executor, client = Executor(MODEL), Client()
    request = call(client, batch=1, capacity=1, dtype="float32")
    executor.handlers["open"](request)

    class Late(Cpu):
        """Looks them up when they are changed already."""

        def work(self, key: object = None) -> Any:
            work = super().work().__enter__()
            change = SimpleNamespace(**{name: getattr(work, name) for name in ("take", "give", "run", "empty")})

            def give(result: torch.Tensor, compute: Any) -> torch.Tensor:
                ids.fill_(2**40)
                return work.give(result, compute)

            change.give = give
            return contextlib.nullcontext(change)

    executor.device = Late()
    at = {"session": request.reply_attrs["session"], "lane": 0, "layer": 0, "start": 0, "steps": steps}
    tensors = [ids]
    if "tables" in steps:
        tensors += [torch.ones(1, 2, HEAD_DIM // 2) for _ in range(2)]
    if "select" in steps:
        tensors.append(torch.tensor([0]))
    blocks = [0, 1, 0, 2] if "select" in steps else [0, 2, 0, 2]
    rows = executor.handlers["run"](call(client, tensors, **at, **({"blocks": blocks} if "scores" in steps else {})))[0]
    assert int(ids.min()) == 2**40
    assert torch.equal(rows[0], MODEL.load("model.embed_tokens.weight")[1:3])


@pytest.mark.parametrize("op", ["reorder", *(text for text in STEP_LISTS if "select" in text)])
def test_indices_are_what_was_checked_even_if_the_caller_changes_them(op: str) -> None:
    """What is looked up by an index out of range is memory of ours."""
    indices = torch.tensor([1])
    executor, client = Executor(MODEL), Client()
    request = call(client, batch=1, capacity=1, dtype="float32")
    executor.handlers["open"](request)
    at = {"session": request.reply_attrs["session"], "lane": 0, "layer": 0, "start": 0}
    taken: list[torch.Tensor] = []

    class Late(Cpu):
        def work(self, key: object = None) -> Any:
            work = super().work().__enter__()

            def take(tensor: torch.Tensor) -> torch.Tensor:
                if tensor.dtype == torch.int64 and tensor.shape == (1,):
                    taken.append(tensor)
                    indices.fill_(2**40)
                return work.take(tensor)

            return contextlib.nullcontext(SimpleNamespace(take=take, give=work.give, run=work.run, empty=work.empty))

    executor.device = Late()
    ids = torch.tensor([[1, 2]])
    tables = [torch.ones(1, 2, HEAD_DIM // 2) for _ in range(2)]
    if op == "reorder":
        indices.zero_()
        executor.handlers[op](call(client, [indices], session=at["session"]))
    else:
        first = "embed tables norm qkv store_v rope store_k"
        if not op.startswith("embed"):
            executor.handlers["run"](call(client, [ids, *tables], **at, steps=first))
        taken.clear()
        tensors = {
            f"{first} select scores": [ids, *tables],
            "store_k scale_v select scores": [
                torch.ones(1, 1, HEADS, HEAD_DIM),
                torch.ones(1, 2, KV_HEADS, HEAD_DIM),
                torch.ones(1, 2),
            ],
            "down add norm qkv store_v rope store_k select scores": [torch.ones(1, 2, INTER)],
            "select o add norm gate_up": [torch.ones(1, 1, HEADS * HEAD_DIM)],
        }[op]
        executor.handlers["run"](call(client, [*tensors, indices], **at, first=0, last=2, steps=op))
    assert int(indices) == 2**40
    assert all(int(tensor.max()) < 2**40 for tensor in taken)
