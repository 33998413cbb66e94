"""A CUDA device: transfers beside computing, ordered by events.

An input is one asynchronous copy by DMA out of its memory. A result, or the part of it that was computed at a time, is
one copy into its memory. Both run on streams beside the compute stream, so that the transfer of one tensor overlaps
with the computing of another. Segments of shared memory are page-locked: the DMA engines read and write them in place.

Order. All work of one key (a KV cache, a client) is on the same three streams. Streams run side by side; only events
make one wait for another. The compute stream waits for the event of an input's copy, the outward stream for the event
of a result's computing. Before a work ends, it waits for an event behind everything that it started: the caller reads
the reply then. Until that event the work keeps all its tensors alive, on either side, also after an exception. So
memory that is still read or written is never handed out again.

Rules. Every call of the CUDA driver goes through a `Driver`. Where the driver refuses to page-lock a segment, transfers
to and from it go through the driver's own staging memory: slower, logged once with the reason, and counted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from ..extras import torch
from ..printable import get_logger

if TYPE_CHECKING:
    from .device import Work

__all__ = ["Cuda", "Driver", "TorchDriver", "Transfers"]

_logger = get_logger("fastsplit.devices")

_cuda: Any = torch.cuda  # parts of it have no types
_PORTABLE = 1
"""cudaHostRegisterPortable: memory is page-locked for every context, for copies from any thread and device."""


class Driver(Protocol):
    """The operations of the CUDA driver that `Cuda` uses. Streams and events are its own objects, opaque elsewhere."""

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
        """What is put on the stream from now on runs after the event."""

    def synchronize(self, event: Any) -> None:
        """Returns when the event has happened."""

    def register(self, address: int, nbytes: int) -> str | None:
        """Page-locks host memory. Returns None, or the reason of a refusal."""

    def unregister(self, address: int) -> str | None: ...


@dataclass
class Transfers:
    """Bytes that a CUDA device moved and segments that it page-locked, since it was opened."""

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
"""Sets of three streams. The kernels of one forward pass fill a device: more sets than a few add nothing."""


class Cuda:
    """A CUDA device. The weights were loaded on the first of its sets of streams. Thread-safe."""

    asynchronous = True

    def __init__(self, driver: Driver) -> None:
        self.transfers = Transfers()
        self._counting = threading.Lock()
        self._driver = driver
        self._sets = [_Streams(driver.compute_stream(), driver.new_stream(), driver.new_stream())]
        self._keys: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self._keys_seen = 0
        self._segments: dict[int, int] = {}
        """The page-locked segments: first address -> the address behind the last byte."""

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
            # Called from destructors, in any thread, also at the interpreter's end: must not raise. No transfer is
            # under way, since each keeps its tensor alive, and the tensor keeps the segment.
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
            # list(): another thread may map or unmap a segment meanwhile
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
        """All tensors that streams may still read or write. `Tensor.record_stream` would not keep the host's tensors,
        and the work waits for all of it in any case."""

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        device, driver, streams = self._device, self._driver, self._streams
        # Memory of the inward stream: memory of another could still be read there by its last owner.
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
        # Used on the computing stream alone, and handed out again in the order of that stream: no reference is kept.
        return self._driver.empty(shape, dtype, self._streams.computing)

    def finish(self) -> None:
        """Waits until the device has done everything that was started here."""
        driver, streams = self._driver, self._streams
        # The outward stream has waited for all results. After an error there may be inputs that no result needed; the
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
        with _cuda.stream(stream):  # torch hands memory out again on the stream that it was allocated on
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
        # The runtime keeps a refusal as this thread's last error, and torch's next kernel would raise it as its own.
        # torch does not bind the function that clears it, but clears it whenever it raises.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, dtype=torch.float32, device=self.device)
        return f"{_cuda.cudart().cudaGetErrorString(error)} (cudaError {code})"
