"""A CUDA driver without a device, for tests: everything that is started happens as late as order allows.

What is put on a stream is queued. A stream runs only where somebody waits for an event of it, or at once as far as it
can if it is `eager`; so a wait that was forgotten shows: whoever should have waited finds poison (NaN, or an index out
of range), since a copy or a computation has not happened yet. Memory that was handed out is poisoned once more on the
stream that it was handed out for, as if something that was started before still wrote to it. What must be kept alive
by the caller is looked at when a copy or a computation happens, not when it is queued.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["STREAMS", "LazyDriver", "poison_"]

STREAMS = ("computing", "inward", "outward")


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**31))


@dataclass
class _Event:
    stream: _Stream
    happened: bool = False


@dataclass
class _Stream:
    name: str
    eager: bool
    queue: deque[_Event | Callable[[], None]] = field(default_factory=deque)
    """An event of this stream happens, one of another is waited for."""

    def run(self, until: _Event | None) -> None:
        """Until the event has happened, waiting for other streams; without, as far as it goes without waiting."""
        while self.queue and not (until is not None and until.happened):
            head = self.queue[0]
            if isinstance(head, _Event) and head.stream is not self and not head.happened:
                if until is None:
                    return
                head.stream.run(head)
            self.queue.popleft()
            if not isinstance(head, _Event):
                head()
            elif head.stream is self:
                head.happened = True


class LazyDriver:
    """Streams in the order of `STREAMS`, three at a time. `log`: what happened, in order; `copies`: (direction, bytes)
    of those started.

    `refusal`: why memory cannot be page-locked, or unlocked.
    """

    def __init__(self, eager: Sequence[str] = ()) -> None:
        self.device = torch.device("cpu")
        self._eager = eager
        self.streams = [_Stream(name, name in eager) for name in STREAMS]
        self.log: list[str] = []
        self.copies: list[tuple[str, int]] = []
        self.synchronized = 0
        self.registered: dict[int, int] = {}
        self.refusal: str | None = None
        self._streams_given = 1

    @property
    def idle(self) -> bool:
        return not any(stream.queue for stream in self.streams)

    def compute_stream(self) -> Any:
        return self.streams[0]

    def new_stream(self) -> Any:
        self._streams_given += 1
        if self._streams_given > len(self.streams):  # of the second set, and those after it
            name = STREAMS[(self._streams_given - 1) % len(STREAMS)]
            self.streams.append(_Stream(name, name in self._eager))
        return self.streams[self._streams_given - 1]

    def empty(self, shape: Sequence[int], dtype: torch.dtype, stream: _Stream) -> torch.Tensor:
        tensor = poison_(torch.empty(tuple(shape), dtype=dtype))
        tensor.on_device = True  # type: ignore[attr-defined]
        found = weakref.ref(tensor)

        def write_late() -> None:
            alive = found()
            if alive is not None:
                poison_(alive)

        self._queue(stream, write_late)
        return tensor

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: _Stream) -> None:
        inward = hasattr(target, "on_device")
        assert inward != hasattr(source, "on_device"), "one end is the host's"
        assert target.is_contiguous()
        assert source.is_contiguous()
        assert (target.dtype, target.shape) == (source.dtype, source.shape)
        self.copies.append(("in" if inward else "out", source.nbytes))
        ends = weakref.ref(target), weakref.ref(source)

        def copy() -> None:
            target, source = (end() for end in ends)
            assert target is not None, "a copy's target was let go before it happened"
            assert source is not None, "a copy's source was let go before it happened"
            target.copy_(source)
            self.log.append("in" if inward else "out")

        self._queue(stream, copy)

    def launch(self, compute: Callable[[torch.Tensor], object], out: torch.Tensor, stream: _Stream) -> None:
        found = weakref.ref(out)

        def run() -> None:
            alive = found()
            assert alive is not None, "what was computed was let go before it happened"
            compute(alive)
            self.log.append("compute")

        self._queue(stream, run)

    def run(self, compute: Callable[[], object], stream: _Stream) -> None:
        def run() -> None:
            compute()
            self.log.append("compute")

        self._queue(stream, run)

    def record(self, stream: _Stream) -> _Event:
        event = _Event(stream)
        self._queue(stream, event)
        return event

    def wait(self, stream: _Stream, event: _Event) -> None:
        self._queue(stream, event)

    def synchronize(self, event: _Event) -> None:
        self.synchronized += 1
        event.stream.run(event)

    def register(self, address: int, nbytes: int) -> str | None:
        if self.refusal is None:
            self.registered[address] = nbytes
        return self.refusal

    def unregister(self, address: int) -> str | None:
        if self.refusal is None:
            del self.registered[address]
        return self.refusal

    def _queue(self, stream: _Stream, what: _Event | Callable[[], None]) -> None:
        stream.queue.append(what)
        for each in self.streams:  # what one stream did may be what another waits for
            if each.eager:
                each.run(None)
