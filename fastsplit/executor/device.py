"""What the executor needs of a device: inputs where computing can read them, results where the caller can.

    CPU     an input is used where it lies, a result is computed straight into the reply's memory
    CUDA    an input is one asynchronous DMA out of its memory, a result (or the part that was computed at a time) one
            into its memory, on streams beside the compute stream: the transfer of one overlaps with the computing of
            another. Independent callers have streams of their own, so that a small kernel of one runs beside those of
            another. Segments of shared memory are page-locked: the DMA engines read and write them where they lie.

How CUDA orders it. All work of one key (a session, a client) is on the same three streams. Streams run side by side;
only events make one wait for another. The compute stream waits for the event of an input's copy, the outward stream
for the event of a result's computing, and the handler, before it returns, for an event behind everything that it
started: the caller reads the reply then. Until that event all tensors of the call are kept alive, on either side,
whatever else happens to them (an exception included), so nothing that is still read or written is ever handed out
again.

Rules. Nothing else is copied. What reads a tensor that `take` gave runs inside of `give`'s `compute`. All calls of the
driver's go through a `Driver`. Where the driver refuses to page-lock a segment, transfers to and from it go through
the driver's own staging memory: slower, said once with the reason, and counted.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from .. import tensors
from ..errors import ModelError
from ..extras import torch
from ..printable import get_logger
from ..tensors.pool import pool
from ..wire.shm.segment import Hook

__all__ = ["Cpu", "Cuda", "Device", "Driver", "TorchDriver", "Transfers", "Work", "open_device"]

_logger = get_logger("fastsplit.devices")

_cuda: Any = torch.cuda  # parts of it have no types
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every context, whichever thread or device copies


class Work(Protocol):
    """One call's work on a device."""

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, of the host, where `compute` functions can read it. May be asked for one by one as it is needed:
        what was given already is computed meanwhile."""

    def give(self, result: torch.Tensor, compute: Callable[[torch.Tensor], object]) -> torch.Tensor:
        """Runs `compute(out)`, which fills `out`; that ends up in `result`, contiguous memory of the host, before the
        work is over. Returns `out`, where later `compute` functions can read it, those of other works too: on the CPU
        it is `result` itself."""

    def run(self, compute: Callable[[], object]) -> None:
        """Runs `compute()`, whose results stay where the device's are. In order with what `give` runs."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of undefined content for `compute` functions to write to, for as long as it is kept."""


class Device(Protocol):
    """Where weights are and products are computed. Thread-safe."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def asynchronous(self) -> bool:
        """Whether the host's cores are free while it computes."""

    @property
    def on_segment(self) -> Hook | None:
        """What must be told of shared memory, if anything."""

    @property
    def summary(self) -> str | None:
        """What moved so far, in a line, if anything did."""

    def work(self, key: object = None) -> AbstractContextManager[Work]:
        """One call's work: when the context ends, all results are in their memory and no input is read any more.

        `key`: what works belong to that are in order with each other; those of another one are independent of them.
        """


def open_device(name: str) -> Device:
    """The device that "auto", "cpu" or "cuda:N" names. Raises ModelError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r}, expected auto, cpu or cuda:N")
    if device.type == "cpu":
        return Cpu()
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise ModelError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return Cuda(TorchDriver(torch.device("cuda", index)))


_ARRAYS = tensors.parse_arrays("torch")
_SMALL_NBYTES = 2**18
"""Below, the C library's own memory is faster; above, fresh pages cost more than what is computed into them."""


# ---- CPU -------------------------------------------------------------------------------------------------------------


class Cpu:
    """The host itself."""

    torch_device = torch.device("cpu")
    asynchronous = False
    on_segment: Hook | None = None
    summary: str | None = None

    def work(self, key: object = None) -> AbstractContextManager[Work]:
        return contextlib.nullcontext(_CPU_WORK)


class _CpuWork:
    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def give(self, result: torch.Tensor, compute: Callable[[torch.Tensor], object]) -> torch.Tensor:
        compute(result)
        return result

    def run(self, compute: Callable[[], object]) -> None:
        compute()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if math.prod(shape) * dtype.itemsize < _SMALL_NBYTES:
            return torch.empty(tuple(shape), dtype=dtype, device=Cpu.torch_device)
        tensor: torch.Tensor = _ARRAYS.empty(shape, dtype, pool.allocate)
        return tensor


_CPU_WORK = _CpuWork()


# ---- CUDA ------------------------------------------------------------------------------------------------------------


class Driver(Protocol):
    """What is asked of the CUDA driver. Streams and events are its own objects, opaque to everybody else."""

    device: torch.device

    def compute_stream(self) -> Any:
        """The stream that the weights were loaded on."""

    def new_stream(self) -> Any: ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype, stream: Any) -> torch.Tensor:
        """Device memory whose first use is on `stream`. It may have been freed while other streams still used it."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Starts one copy between host and device, both contiguous and of one dtype. Keeps neither alive."""

    def launch(self, compute: Callable[[torch.Tensor], object], out: torch.Tensor, stream: Any) -> None:
        """Runs `compute(out)` with its kernels on `stream`. Keeps nothing alive."""

    def run(self, compute: Callable[[], object], stream: Any) -> None:
        """Runs `compute()` with its kernels on `stream`. Keeps nothing alive."""

    def record(self, stream: Any) -> Any:
        """An event behind everything that is on the stream now."""

    def wait(self, stream: Any, event: Any) -> None:
        """What comes on the stream from now on runs after the event."""

    def synchronize(self, event: Any) -> None:
        """Returns when the event has happened."""

    def register(self, address: int, nbytes: int) -> str | None:
        """Page-locks memory of the host. Returns why not, if it could not."""

    def unregister(self, address: int) -> str | None: ...


@dataclass
class Transfers:
    """What a CUDA device moved and page-locked, for as long as it lives."""

    page_locked_nbytes: int = 0
    """Bytes by DMA out of or into registered segments."""
    pageable_nbytes: int = 0
    """Bytes through the driver's staging memory: token ids, all that came through a socket, segments that the driver
    refused."""
    segments_registered: int = 0
    segments_refused: int = 0


class _Streams(NamedTuple):
    computing: Any
    inward: Any
    outward: Any


_MAX_STREAMS = 4
"""Sets of three. Kernels of a forward pass fill a device; more sets than a few only share it out more finely."""


class Cuda:
    """A CUDA device. The weights were loaded on the first of its sets of streams."""

    asynchronous = True

    def __init__(self, driver: Driver) -> None:
        self.transfers = Transfers()
        self._counting = threading.Lock()
        self._driver = driver
        self._sets = [_Streams(driver.compute_stream(), driver.new_stream(), driver.new_stream())]
        self._keys: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self._keys_seen = 0
        self._segments: dict[int, int] = {}  # address -> its end, of those that are page-locked

    @property
    def torch_device(self) -> torch.device:
        return self._driver.device

    @property
    def summary(self) -> str | None:
        transfers = self.transfers
        return (
            f"{self.torch_device}: {transfers.page_locked_nbytes} bytes by DMA, {transfers.pageable_nbytes} bytes "
            f"pageable; {transfers.segments_registered} segments of shared memory page-locked, "
            f"{transfers.segments_refused} refused"
        )

    def on_segment(self, address: int, nbytes: int) -> Callable[[], None] | None:
        """A `Hook` for segments of shared memory: page-locks the segment until it is unmapped."""
        reason = self._driver.register(address, nbytes)
        with self._counting:
            self.transfers.segments_registered += reason is None
            self.transfers.segments_refused += reason is not None
            first = self.transfers.segments_refused == 1
        if reason is not None:
            if first:
                _logger.warning(
                    "%s: a segment of %d bytes could not be page-locked, so transfers to and from it are slower: %s",
                    self.torch_device,
                    nbytes,
                    reason,
                )
            return None
        self._segments[address] = address + nbytes

        def unmapping() -> None:
            # Called from destructors too, in any thread, at the interpreter's end too: must not raise. No transfer is
            # under way, since each keeps its tensor alive, and that the segment.
            try:
                self._segments.pop(address, None)
                reason = self._driver.unregister(address)
                if reason is not None:
                    _logger.warning("%s: a segment could not be unlocked: %s", self.torch_device, reason)
            except Exception:
                _logger.exception("a segment could not be unlocked")

        return unmapping

    @contextlib.contextmanager
    def work(self, key: object = None) -> Iterator[Work]:
        work = _CudaWork(self, self._sets[0] if key is None else self._streams_of(key))
        try:
            yield work
        finally:
            work.finish()

    def _streams_of(self, key: object) -> _Streams:
        with self._counting:
            index = self._keys.get(key)
            if index is None:
                index = self._keys[key] = self._keys_seen % _MAX_STREAMS
                self._keys_seen += 1
            if index == len(self._sets):
                driver = self._driver
                streams = _Streams(driver.new_stream(), driver.new_stream(), driver.new_stream())
                driver.wait(streams.computing, driver.record(self._sets[0].computing))  # the weights
                self._sets.append(streams)
            return self._sets[index]

    def _count(self, host: torch.Tensor) -> None:
        address = host.data_ptr()
        with self._counting:
            # list(): another thread may map or unmap a segment just now
            if any(start <= address < end for start, end in list(self._segments.items())):
                self.transfers.page_locked_nbytes += host.nbytes
            else:
                self.transfers.pageable_nbytes += host.nbytes


class _CudaWork:
    def __init__(self, device: Cuda, streams: _Streams) -> None:
        self._device = device
        self._driver = device._driver
        self._streams = streams
        self._in_use: list[torch.Tensor] = []
        """All that streams may still read or write. Instead of `Tensor.record_stream`, since the handler waits for all
        of it anyway, and since that would not keep the host's tensors."""

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        device, driver, streams = self._device, self._driver, self._streams
        # Of the inward stream: memory of another could still be read there by what it was freed under.
        copy = driver.empty(tensor.shape, tensor.dtype, streams.inward)
        self._in_use += (tensor, copy)
        driver.copy(copy, tensor, streams.inward)
        driver.wait(streams.computing, driver.record(streams.inward))
        device._count(tensor)
        return copy

    def give(self, result: torch.Tensor, compute: Callable[[torch.Tensor], object]) -> torch.Tensor:
        device, driver, streams = self._device, self._driver, self._streams
        out = driver.empty(result.shape, result.dtype, streams.computing)
        self._in_use += (result, out)
        driver.launch(compute, out, streams.computing)
        driver.wait(streams.outward, driver.record(streams.computing))
        driver.copy(result, out, streams.outward)
        device._count(result)
        return out

    def run(self, compute: Callable[[], object]) -> None:
        self._driver.run(compute, self._streams.computing)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        # Used on the computing stream alone, in whose order it is handed out again: nobody has to keep it.
        return self._driver.empty(shape, dtype, self._streams.computing)

    def finish(self) -> None:
        """Waits until the device has done everything that was started here."""
        driver, streams = self._driver, self._streams
        # The outward stream has waited for all results. After an error there may be inputs that none needed; the
        # computing stream waits for every one.
        driver.wait(streams.outward, driver.record(streams.computing))
        driver.synchronize(driver.record(streams.outward))
        self._in_use.clear()


class TorchDriver:
    """The real driver, through torch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def compute_stream(self) -> Any:
        return _cuda.default_stream(self.device)

    def new_stream(self) -> Any:
        return _cuda.Stream(self.device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, stream: Any) -> torch.Tensor:
        with _cuda.stream(stream):  # torch hands out memory again on the stream on which it was allocated
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        with _cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def launch(self, compute: Callable[[torch.Tensor], object], out: torch.Tensor, stream: Any) -> None:
        with _cuda.stream(stream):
            compute(out)

    def run(self, compute: Callable[[], object], stream: Any) -> None:
        with _cuda.stream(stream):
            compute()

    def record(self, stream: Any) -> Any:
        return stream.record_event()

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def synchronize(self, event: Any) -> None:
        event.synchronize()

    def register(self, address: int, nbytes: int) -> str | None:
        with _cuda.device(self.device):
            return self._reason(_cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))

    def unregister(self, address: int) -> str | None:
        with _cuda.device(self.device):
            return self._reason(_cuda.cudart().cudaHostUnregister(address))

    def _reason(self, error: Any) -> str | None:
        """None for success."""
        code = int(error)
        if code == 0:
            return None
        # The runtime keeps a refusal as this thread's last error, and torch's next kernel would raise it as its own;
        # torch does not bind the function that clears it, but clears it whenever it raises.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, dtype=torch.float32, device=self.device)
        return f"{_cuda.cudart().cudaGetErrorString(error)} (cudaError {code})"
