"""Casts of float32 to 16 bits, for links: into memory from which it is sent, and back where it was received.

Rules. bfloat16 rounds to nearest even, as torch does. No cast makes a finite number infinite: a tensor that float16
cannot hold is cast to bfloat16 (except the last one in 256 of float32's own largest numbers). A cast reads a tensor as
it lies, so that one that is not contiguous is copied and cast in one pass.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from ..schema.coding import CASTS, FLOAT32
from ..schema.limits import ARRAYS, Limits
from .arrays import Desc
from .checks import ADMITTED, admit, by_torch, check_copy, check_numpy, check_torch, numpy_row, torch_code, torch_codes
from .outgoing import outgoing_numpy, outgoing_torch

__all__ = ["Cast", "collect_cast", "widen"]


_CAST_CHUNK = 32768
"""Elements of a chunk: few enough that torch does not start its threads, one set for each thread that reads, and that a
chunk's bytes stay in the cache from one step to the next."""
_BFLOAT16, _FLOAT16 = CASTS["bfloat16"], CASTS["float16"]
_MAX_FINITE = 0x7BFF  # the bits of float16's largest number


class Cast(NamedTuple):
    """The tensors of a message after their casts. `buffers` has one for each tensor, also for an empty one."""

    descs: list[Desc]
    buffers: list[Any]
    casts: list[int]
    """For each tensor its number in coding.CASTS, 0 for none."""
    copied_nbytes: int
    cast_s: float
    too_large: int
    """Tensors that float16 was asked for, and that hold what only bfloat16 can."""


def collect_cast(
    tensors: Iterable[Any],
    cast: int,
    allocate: Callable[[int], Any],
    min_nbytes: int = 0,
    limits: Limits = ARRAYS,
) -> Cast:
    """As `collect`, with float32 tensors of `min_nbytes` bytes or more cast into memory from `allocate(nbytes)`.

    `cast`: a number of coding.CASTS, 0 for none. With float16, a tensor that holds an infinity, a NaN, or a number that
    would become an infinity is cast to bfloat16.
    """
    found = Cast([], [], [], 0, 0.0, 0)
    copied_nbytes = too_large = nbytes = 0
    cast_s = 0.0
    for value in tensors:
        if type(value) not in ADMITTED:
            value = admit(value)
        is_torch = type(value) is not np.ndarray
        if is_torch:
            code = torch_codes.get(value.dtype) or torch_code(value)
            check_torch(value)
        else:
            code = numpy_row(value).code
            check_numpy(value)
        size = value.nbytes
        if not cast or size < min_nbytes or code != FLOAT32:
            outgoing = outgoing_torch if is_torch else outgoing_numpy
            desc, array, copied = outgoing(value, allocate, limits, nbytes, len(found.descs))
            copied_nbytes += size if copied else 0
            found.casts.append(0)
        else:
            started_s = perf_counter()
            desc = (FLOAT32, tuple(value.shape))
            check_copy(len(found.descs), desc, nbytes + size, limits)
            array = allocate(2 * math.prod(desc[1]))
            narrow = _narrow_torch if is_torch else _narrow_numpy
            used = cast
            narrow(value, cast, array)
            if cast == _FLOAT16 and array.nbytes and not _is_finite(array):
                too_large += 1
                used = _BFLOAT16
                narrow(value, used, array)
            found.casts.append(used if array.nbytes else 0)
            cast_s += perf_counter() - started_s
        nbytes += size
        found.descs.append(desc)
        found.buffers.append(array)
    return found._replace(copied_nbytes=copied_nbytes, cast_s=cast_s, too_large=too_large)


def widen(half: Any, cast: int, memory: Any) -> None:
    """Fills `memory` with the float32 numbers that `half` holds in 16 bits each. Both are flat uint8."""
    bits, out = half.view(np.uint16), memory.view(np.float32)
    torch = sys.modules.get("torch")
    if torch is None:
        if cast == _FLOAT16:
            out[...] = bits.view(np.float16)
        else:
            np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32)
        return
    # 12 GB/s of float32; numpy's float16 takes four times as long
    source = torch.from_numpy(bits.view(np.int16)).view(torch.float16 if cast == _FLOAT16 else torch.bfloat16)
    target = torch.from_numpy(out)
    for at in range(0, len(bits), _CAST_CHUNK):
        target[at : at + _CAST_CHUNK].copy_(source[at : at + _CAST_CHUNK])


def _narrow_torch(tensor: Any, cast: int, memory: Any) -> None:
    torch = sys.modules["torch"]
    dtype = torch.float16 if cast == _FLOAT16 else torch.bfloat16
    target = torch.from_numpy(memory.view(np.int16)).view(dtype).view(tensor.shape)
    by_torch(lambda: target.copy_(tensor.detach()))


def _narrow_numpy(array: np.ndarray[Any, Any], cast: int, memory: Any) -> None:
    if cast == _FLOAT16:
        with np.errstate(over="ignore"):
            np.copyto(memory.view(np.float16).reshape(array.shape), array, casting="same_kind")
        return
    out = memory.view(np.uint16)
    flat = array.reshape(-1)  # a copy where it is not contiguous
    for at in range(0, len(flat), _CAST_CHUNK):
        part = np.ascontiguousarray(flat[at : at + _CAST_CHUNK], np.float32).view(np.uint32)
        rounded = part >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += part
        rounded >>= 16
        is_nan = np.isnan(part.view(np.float32))
        if is_nan.any():  # rounding could make one an infinity
            rounded[is_nan] = part[is_nan] >> 16 | 0x40
        out[at : at + _CAST_CHUNK] = rounded


def _is_finite(halves: Any) -> bool:
    """Whether all numbers of a float16 buffer are finite: two passes over its bits, as fast as one over its source."""
    return bool(halves.view(np.int16).max() <= _MAX_FINITE and halves.view(np.uint16).max() <= _MAX_FINITE | 0x8000)
