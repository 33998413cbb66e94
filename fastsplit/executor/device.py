"""The executor's device: inputs where computing can read them, results where the caller can.

    CPU     an input is used where it lies; a result is computed straight into the reply's memory
    CUDA    an input is one asynchronous copy out of its memory, a result one into its memory (cuda.py)

Rules. Nothing else is copied. A tensor that `take` gave is read inside of the `compute` functions of `give` and `run`
alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from ..errors import ModelError
from ..extras import torch
from ..split.kv_cache import HostMemory, Memory
from .cuda import Cuda, TorchDriver

if TYPE_CHECKING:
    from ..wire.shm.segment import Hook

__all__ = ["Cpu", "Device", "Work", "open_device"]


class Work(Memory, Protocol):
    """One call's work on a device. `empty` and `run` are those of `Memory`: memory is the device's, and what `run`
    computes is in order with what `give` computes."""

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The host's tensor, where `compute` functions can read it. Taken when it is needed, it travels while what was
        given before is computed."""

    def give(self, result: torch.Tensor, compute: Callable[[torch.Tensor], object]) -> torch.Tensor:
        """Runs `compute(out)`, which fills `out`; its content is in `result`, contiguous memory of the host, when the
        work ends. Returns `out`, which later `compute` functions can read, those of later works too: on the CPU it is
        `result` itself."""


class Device(Protocol):
    """Where weights are and products are computed. Thread-safe."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def asynchronous(self) -> bool:
        """Whether the host's cores are free while it computes."""

    @property
    def on_segment(self) -> Hook | None:
        """The hook for segments of shared memory; None if the device needs none."""

    @property
    def summary(self) -> str | None:
        """One line about what was moved so far; None if nothing is."""

    def work(self, key: object = None) -> AbstractContextManager[Work]:
        """One call's work: when the context ends, all results are in their memory and no input is read any more.

        `key`: works of one key are in order with each other, and independent of those of another key.
        """


def open_device(name: str) -> Device:
    """The device of that name: "auto", "cpu" or "cuda:N". Raises ModelError if it is not there."""
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


class Cpu:
    """The host itself."""

    torch_device = torch.device("cpu")
    asynchronous = False
    on_segment: Hook | None = None
    summary: str | None = None

    def work(self, key: object = None) -> AbstractContextManager[Work]:
        return contextlib.nullcontext(_CPU_WORK)


class _CpuWork(HostMemory):
    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def give(self, result: torch.Tensor, compute: Callable[[torch.Tensor], object]) -> torch.Tensor:
        compute(result)
        return result


_CPU_WORK = _CpuWork()
