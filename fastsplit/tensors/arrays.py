"""Arrays of torch and numpy: how they are described, and how received memory becomes one.

Rules. torch is optional: it is imported when torch tensors are asked for, or found when it is imported already. A
received tensor is a view of the memory that it was received into: writable, aligned to 64 bytes, valid until its last
view dies; making it copies nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import SettingError, TensorError, shown
from ..schema.descriptor import CACHED_SHAPES, TensorDesc, keep
from ..schema.dtypes import BY_CODE, DType, dtype_of_numpy, lookup
from ..schema.limits import ARRAYS

__all__ = [
    "NUMPYS_OWN",
    "Arrays",
    "Desc",
    "dtype_of",
    "parse_arrays",
    "parse_expect",
    "parse_shape",
    "torch_view",
]


Desc = tuple[int, tuple[int, ...]]
"""A tensor's dtype code and its shape in elements."""


class Arrays:
    """One kind of array, "torch" or "numpy": makes tensors over memory."""

    def __init__(self, kind: str, view: Callable[[Any, TensorDesc], Any]) -> None:
        self.kind = kind
        self.view = view
        """`view(memory, desc)`: a tensor over `memory`, a buffer of exactly `desc.nbytes` bytes. Copies nothing; the
        tensor keeps the memory alive."""

    def empty(self, shape: int | Sequence[int], dtype: Any, allocate: Callable[[int], Any]) -> Any:
        """A tensor of undefined content in memory from `allocate(nbytes)`, which returns flat uint8.

        `dtype`: a name, or a torch or numpy dtype. `shape`: elements. Raises TensorError for an unknown dtype and for a
        shape that no array can have, and what `allocate` raises.
        """
        desc = _desc(shape, dtype)
        return self.view(allocate(desc.nbytes), desc)


def _desc(shape: Any, dtype: Any) -> TensorDesc:
    """The description of a new tensor. Raises TensorError."""
    # 2 and 2.0 are the same key, so that only ints may look
    known = type(shape) is int or (isinstance(shape, tuple) and all(type(dim) is int for dim in shape))
    key = (shape, dtype)
    if known:
        try:
            return _descs[key]
        except KeyError:
            pass
        except TypeError:  # a dtype that cannot be
            known = False
    row, dims = dtype_of(dtype), parse_shape(shape)
    ARRAYS.check_dims("tensor", len(dims), _no_array)
    ARRAYS.check_shape("tensor", dims, row.itemsize, _no_array)
    desc = TensorDesc.of(row, dims)
    if known:
        keep(_descs, key, desc, CACHED_SHAPES)
    return desc


_descs: dict[tuple[Any, Any], TensorDesc] = {}
"""Descriptions of new tensors, by what was asked for."""


def _no_array(field: str, came: str, accepted: str) -> TensorError:
    return TensorError(f"{field}: {came}, expected {accepted}")


def parse_shape(shape: Any) -> tuple[int, ...]:
    """A shape given as an int (also one of numpy's) or as a sequence of ints. Raises TensorError."""
    try:
        try:
            dims: tuple[int, ...] = (operator.index(shape),)
        except TypeError:
            dims = tuple(map(operator.index, shape))
    except TypeError:
        raise TensorError(f"shape {shown(shape)}, expected ints") from None
    if dims and min(dims) < 0:
        raise TensorError(f"shape {shown(list(dims))}, expected dimensions of 0 or more")
    return dims


def parse_expect(expect: Any) -> list[Desc] | None:
    """The argument `expect` of a call: what its reply must hold, None if anything may come. Raises SettingError."""
    if expect is None:
        return None
    found: list[Desc] = []
    try:
        for dtype, shape in expect:
            found.append((dtype_of(dtype).code, parse_shape(shape)))
    except TensorError as error:
        raise SettingError(f"expect, tensor {len(found)}: {error}") from None
    except (TypeError, ValueError):
        raise SettingError(f"expect: {shown(expect)}, expected (dtype, shape) of each tensor of the reply") from None
    return found


def parse_arrays(kind: str | Arrays = "auto") -> Arrays:
    """The argument `arrays`: what callers and handlers get, "torch", "numpy", or "auto" (torch where it is installed).

    Raises SettingError for another kind, MissingExtraError if torch is asked for and is not installed.
    """
    if isinstance(kind, Arrays):
        return kind
    if not isinstance(kind, str):
        raise SettingError(f"arrays {shown(kind)}, expected 'auto', 'torch' or 'numpy'")
    if kind == "auto":
        kind = "torch" if "torch" in sys.modules or importlib.util.find_spec("torch") is not None else "numpy"
    if kind == "numpy":
        return Arrays(kind, _numpy_view)
    if kind == "torch":
        return Arrays(kind, torch_view())
    raise SettingError(f"arrays {shown(kind)}, expected 'auto', 'torch' or 'numpy'")


def dtype_of(dtype: Any) -> DType:
    """The row of the dtype table for a name, a torch dtype, a numpy dtype or a scalar type. Raises TensorError."""
    if isinstance(dtype, str):
        return lookup(dtype)
    if isinstance(dtype, DType):
        return dtype
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return lookup(str(dtype).removeprefix("torch."))
    try:
        if dtype is None:
            raise TypeError  # numpy's default would be float64
        numpy_dtype = np.dtype(dtype)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise TensorError(f"dtype {shown(dtype)}, expected a name, a torch dtype or a numpy dtype") from None
    return dtype_of_numpy(numpy_dtype)


NUMPYS_OWN = frozenset(code for code, row in BY_CODE.items() if row.numpy is row.buffer_dtype)
"""Codes of the dtypes that numpy has itself."""
_SIGNED = {1: "int8", 2: "int16"}  # what numpy and torch both have, for the dtypes that numpy does not


def _numpy_view(memory: Any, desc: TensorDesc) -> Any:
    # over a lease too: the lease itself never reaches a user
    return np.ndarray(desc.shape, desc.dtype.numpy, memory)


@functools.cache
def torch_view() -> Callable[[Any, TensorDesc], Any]:
    """`Arrays.view` for torch tensors. Raises MissingExtraError without torch."""
    from ..extras import torch

    dtypes = {code: getattr(torch, row.name, None) for code, row in BY_CODE.items()}

    def view(memory: Any, desc: TensorDesc) -> Any:
        # from_numpy over ndarray(): 0.9 us; torch.frombuffer().view() takes 1.8
        code = desc.dtype.code
        if code not in foreign:
            return torch.from_numpy(np.ndarray(desc.shape, desc.dtype.numpy, memory))
        dtype = dtypes[code]
        if dtype is None:
            raise TensorError(f"dtype {desc.dtype.name}, which torch {torch.__version__} does not have")
        stand_in = _SIGNED[desc.dtype.itemsize]
        return torch.from_numpy(np.ndarray(desc.shape, stand_in, memory)).view(dtype)

    foreign = {code for code in BY_CODE if code not in NUMPYS_OWN or dtypes[code] is None}
    return view
