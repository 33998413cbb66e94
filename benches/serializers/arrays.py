"""torch tensors to memory and back, by the quickest way there is, the same for all contestants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["array_of", "copied_tensor", "dtype_name", "flat_bytes", "offset_in", "tensor_of", "tensor_over"]

_NAMES = {getattr(torch, name): name for name in ("float32", "bfloat16", "float16", "int64", "int32", "uint8")}
_NUMPY = {name: np.dtype("int16" if name == "bfloat16" else name) for name in _NAMES.values()}


def dtype_name(tensor: torch.Tensor) -> str:
    return _NAMES[tensor.dtype]


def array_of(tensor: torch.Tensor) -> Any:
    """The tensor's own memory as an array; bfloat16 as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def flat_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's own memory, flat."""
    return memoryview(array_of(tensor)).cast("B")


def tensor_of(array: Any, dtype: str) -> torch.Tensor:
    """A tensor over the memory of an array that `array_of` would have given."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def tensor_over(buffer: Any, dtype: str, shape: Sequence[int], offset: int = 0, nbytes: int | None = None) -> Any:
    """A tensor over part of a writable buffer, without a copy. Raises ValueError or TypeError where it does not fit.

    `nbytes`: what was said to be there, None for all from `offset` on.
    """
    wanted = _NUMPY[dtype]
    if nbytes is None:
        nbytes = len(buffer) - offset
    # numpy itself takes an offset that lies before the buffer.
    if offset < 0 or any(dim < 0 for dim in shape) or math.prod(shape) * wanted.itemsize != nbytes:
        raise ValueError(f"{nbytes} bytes at {offset} for {dtype}{list(shape)}")
    return tensor_of(np.ndarray(shape, wanted, buffer, offset), dtype)


def copied_tensor(data: bytes, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of bytes that must not be written to: one copy."""
    return tensor_of(np.frombuffer(data, _NUMPY[dtype]).reshape(shape).copy(), dtype)


def offset_in(part: Any, whole: Any) -> int:
    """Where `part`, a view that a library gave as read-only, lies in the writable buffer that it was given.

    Raises ValueError where it lies elsewhere, as what was compressed does.
    """
    inner, outer = np.frombuffer(part, np.uint8), np.frombuffer(whole, np.uint8)
    offset = int(inner.ctypes.data - outer.ctypes.data)
    if not 0 <= offset <= outer.size - inner.size:
        raise ValueError(f"{inner.size} bytes outside of the {outer.size} that arrived")
    return offset
