"""Devices: CUDA's whole path on a driver that does everything as late, or as soon, as events allow; and the CPU."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lazy_driver import STREAMS, LazyDriver, poison_

from fastsplit import devices
from fastsplit.devices import Cpu, Cuda, TorchDriver, open_device
from fastsplit.errors import ModelError
from fastsplit.executor import Executor
from fastsplit.models import open_model
from fastsplit.ops import row_blocks

MODEL = open_model("random:tiny")
SCHEDULES = [eager for count in range(4) for eager in combinations(STREAMS, count)]


def call(tensors: Sequence[torch.Tensor] = (), **attrs: Any) -> Any:
    """A request as a handler sees it; the reply's memory is poison until it is written."""

    def empty(shape: Sequence[int], dtype: str) -> torch.Tensor:
        return poison_(torch.empty(tuple(shape), dtype=getattr(torch, dtype)))

    return SimpleNamespace(tensors=tuple(tensors), attrs=attrs, reply_attrs={}, empty=empty)


def requests(dtype: str) -> dict[str, tuple[str, Any, list[str]]]:
    """Each operation: its name, its request, and what DMA it takes."""
    kind = getattr(torch, dtype)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(kind)

    blocks = row_blocks(5, 7, 2)
    probabilities = [random(4, block.rows, block.columns) for block in blocks]
    names = ["q", "k", "v"]
    return {
        "norms": ("norms", call(), ["out"]),
        "embedding": ("embedding", call([torch.tensor([3, 0, 255])]), ["in", "out"]),
        "linear": ("linear", call([random(5, 64)], layer=1, names=names), ["in", "out", "out", "out"]),
        "scores": ("scores", call([random(5, 4, 16), random(7, 2, 16)], block_rows=2), ["in", "in"] + 3 * ["out"]),
        "values": ("values", call([*probabilities, random(7, 2, 16)]), ["in"] + 3 * ["in", "out"]),
        "lm_head": ("lm_head", call([random(2, 64)]), ["in", "out"]),
    }


def run(executor: Executor, op: str, request: Any) -> list[torch.Tensor]:
    results = executor.handlers[op](request)
    return [results] if isinstance(results, torch.Tensor) else results


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def cpu(request: pytest.FixtureRequest) -> Executor:
    return Executor(MODEL, dtype=request.param)


@pytest.mark.parametrize("eager", SCHEDULES, ids=lambda eager: "+".join(eager) or "lazy")
def test_every_operation_gives_what_the_cpu_gives_with_one_dma_a_tensor(cpu: Executor, eager: tuple[str, ...]) -> None:
    driver = LazyDriver(eager)
    executor = Executor(MODEL, device=Cuda(driver), dtype=cpu.dtype)
    for op, request, transfers in requests(cpu.dtype).values():
        driver.copies.clear()
        synchronized = driver.synchronized
        results = run(executor, op, request)
        for result, expected in zip(results, run(cpu, op, request), strict=True):
            assert not expected.isnan().any()
            assert torch.equal(result, expected), op
        assert driver.idle, op
        assert [direction for direction, _ in driver.copies] == transfers, op
        assert driver.synchronized - synchronized == 1, f"{op}: nobody waits in between"
        sizes = {direction: sum(n for way, n in driver.copies if way == direction) for direction in ("in", "out")}
        assert sizes == {"in": sum(t.nbytes for t in request.tensors), "out": sum(t.nbytes for t in results)}


def test_transfers_overlap_with_computing(cpu: Executor) -> None:
    """With nothing to wait for but what is needed, each result leaves, and each input comes, while another computes."""
    driver = LazyDriver(STREAMS)
    executor = Executor(MODEL, device=Cuda(driver), dtype=cpu.dtype)
    expected = {
        "linear": ["in"] + 3 * ["compute", "out"],
        "scores": ["in", "in"] + 3 * ["compute", "out"],
        "values": ["in"] + 3 * ["in", "compute", "out"],
    }
    for op, order in expected.items():
        driver.log.clear()
        run(executor, *requests(cpu.dtype)[op][:2])
        assert driver.log == order


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
    monkeypatch.setattr(devices, "_cuda", fake)

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


def test_the_cpu_reads_and_writes_where_tensors_lie(cpu: Executor) -> None:
    device = Cpu()
    assert device.on_segment is None
    assert device.summary is None
    assert cpu.on_segment is None
    x, result = torch.ones(3), torch.empty(3)
    with device.work() as work:
        assert work.take(x) is x
        work.give(result, lambda out: out.fill_(float(out.data_ptr() == result.data_ptr())))
    assert result.tolist() == [1, 1, 1]


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
    monkeypatch.setattr(devices, "TorchDriver", lambda device: LazyDriver())
    assert isinstance(open_device("auto"), Cuda)
    with pytest.raises(ModelError, match="has 2 CUDA devices"):
        open_device("cuda:2")


# ---- trust -----------------------------------------------------------------------------------------------------------


class _Meanwhile(Cpu):
    """A device that starts working just when the caller changes what it sent."""

    def __init__(self, change: Any) -> None:
        self._change = change

    def work(self) -> Any:
        self._change()
        return super().work()


def test_ids_are_what_was_checked_even_if_the_caller_changes_them() -> None:
    ids = torch.tensor([1, 2])
    executor = Executor(MODEL, device=_Meanwhile(lambda: ids.fill_(2**40)))
    (rows,) = run(executor, "embedding", call([ids]))
    assert torch.equal(rows, MODEL.load("model.embed_tokens.weight")[1:3])
