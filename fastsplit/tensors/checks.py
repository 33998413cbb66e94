"""What may be sent: the gate for types, and checks that a tensor's memory is still there.

Rules. This module alone decides what goes out, by the exact type and before a byte is read. A subclass is refused
unless it is known to be plain: a mask or a unit beside the values would be lost without a word. A view is refused if
the memory behind it was freed, resized or closed: the bytes there may be other memory of this process.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import TensorError
from ..schema.dtypes import DType, dtype_of_numpy
from ..schema.limits import Limits, over
from .arrays import Desc, dtype_of
from .pool import Lease, Slab

__all__ = [
    "ADMITTED",
    "address_of",
    "admit",
    "buffered",
    "by_torch",
    "check_copy",
    "check_numpy",
    "check_torch",
    "fits_storage",
    "numpy_row",
    "torch_code",
    "torch_codes",
]


ADMITTED: set[type] = {np.ndarray}
"""Types that need no `admit`: numpy's array, and torch's tensor types once `admit` has seen one."""
_PLAIN_ARRAYS = (np.matrix, np.memmap, Lease)
"""Subclasses that have no meaning beyond their values."""


def admit(value: Any) -> Any:
    """The gate: a torch tensor unchanged, anything else as an exact numpy array. Raises TensorError for the rest.

    A subclass may have a mask, units, field names, or another tensor beside its values. It is refused unless it is
    known to be plain, even if it has other protocols that would give its values.
    """
    kind = type(value)
    torch = sys.modules.get("torch")
    tensor_type = getattr(torch, "Tensor", None)  # None while another thread imports torch
    if tensor_type is not None and isinstance(value, tensor_type):
        plain = (tensor_type, torch.nn.Parameter)  # type: ignore[union-attr]
        if kind not in plain:
            raise _refusal(kind, "torch.Tensor or torch.nn.Parameter: a subclass may mean more than its values")
        ADMITTED.update(plain)
        return value
    if isinstance(value, np.ndarray):
        if kind is not np.ndarray and kind not in _PLAIN_ARRAYS:
            raise _refusal(kind, "numpy's ndarray, matrix or memmap: a subclass may mean more than its values")
        return np.asarray(value)
    if isinstance(value, np.generic):
        if kind is not value.dtype.type:
            raise _refusal(kind, "a scalar type of numpy's own: a subclass may mean more than its values")
        return np.asarray(value)
    try:
        interface = getattr(value, "__array_interface__", None)
        if isinstance(interface, dict) and interface.get("mask") is None:
            return np.asarray(value)
    except Exception as error:
        raise _refusal(kind, f"an array interface that works: {type(error).__name__}: {error}") from error
    if isinstance(interface, dict):
        raise _refusal(kind, "an array interface without a mask")
    raise _refusal(kind, "a torch tensor or a numpy array")


def _refusal(kind: type, expected: str) -> TensorError:
    return TensorError(f"a tensor of type {kind.__name__}, expected {expected}")


def check_copy(index: int, desc: Desc, nbytes: int, limits: Limits) -> None:
    """Checks a tensor against the peer's limits before it is copied. `nbytes`: of the message up to the tensor's end.

    Raises LimitError.
    """
    limits.check_dims(f"tensor {index}", len(desc[1]), over)
    limits.check_nbytes(nbytes, over)


# ---- numpy -----------------------------------------------------------------------------------------------------------


def numpy_row(value: np.ndarray[Any, Any]) -> DType:
    """The dtype table's row for an array of either byte order. Raises TensorError."""
    dtype = value.dtype
    return dtype_of_numpy(dtype if dtype.isnative else dtype.newbyteorder("="))


def buffered(value: np.ndarray[Any, Any], row: DType) -> np.ndarray[Any, Any]:
    """The same bytes in a dtype whose arrays have a buffer: those of ml_dtypes have none."""
    return value if row.numpy is row.buffer_dtype or not value.dtype.isnative else value.view(row.buffer_dtype)


def check_numpy(array: np.ndarray[Any, Any], address: int = 0) -> None:
    """Checks, before an array is read, that it still lies in the memory that it is a view of, as far as that is known.

    numpy lets an array be resized, and a buffer (a bytearray, a mapped file) be closed, under a view of it. `address`:
    of a contiguous array, 0 if it is not known. Raises TensorError.
    """
    base: Any = array.base
    if base is None or not array.size:
        return
    if type(base) is np.ndarray:
        if type(base.base) is Slab:
            return
        if base.base is None and array.flags.c_contiguous:
            address, start = (
                address or address_of(array),
                address_of(base),
            )  # the usual view, 0.7 us; the others take more
            if start <= address and address + array.nbytes <= start + base.nbytes:
                return
    owner = None
    while base is not None:
        kind = type(base)
        if kind is np.ndarray or isinstance(base, np.ndarray):
            owner = base
        elif kind in _HOLDERS or isinstance(base, ctypes.Array):
            break
        elif kind.__module__.partition(".")[0] != "numpy":  # as_strided puts an object of its own in between
            _check_base(array, base, *_bounds(array))
            break
        base = getattr(base, "base", None)
    if owner is not None:
        low, high = (address, address + array.nbytes) if address else _bounds(array)
        start, end = _bounds(owner)
        if low < start or high > end:
            raise _outside(array, end - start)


_HOLDERS = frozenset((memoryview, bytes))
"""Bases whose memory cannot be resized; so are ctypes' arrays, which received tensors lie in."""


def _check_base(array: np.ndarray[Any, Any], base: Any, low: int, high: int) -> None:
    """As `check_numpy`, for memory that is not numpy's own: `base`, whose array lies from `low` to `high`."""
    try:
        start, end = _bounds(np.frombuffer(base, np.uint8))
    except (TypeError, BufferError):
        return  # it does not say where it is
    except ValueError:  # closed
        start = end = 0
    if low < start or high > end:
        raise _outside(array, end - start)


def _outside(array: np.ndarray[Any, Any], nbytes: int) -> TensorError:
    return TensorError(
        f"an array of shape {list(array.shape)} outside of the memory that it is a view of, expected inside: that "
        f"memory has {nbytes} bytes, and was resized or closed"
    )


def _bounds(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """The addresses at which an array's bytes begin and end."""
    if array.flags.c_contiguous:
        address = address_of(array)
        return address, address + array.nbytes
    low = high = array.__array_interface__["data"][0]
    for dim, stride in zip(array.shape, array.strides):
        if stride < 0:
            low += (dim - 1) * stride
        else:
            high += (dim - 1) * stride
    return low, high + array.itemsize


def address_of(array: np.ndarray[Any, Any]) -> int:
    """The address of an array that has a buffer."""
    try:
        # 0.2 us; `__array_interface__` takes 0.9. Read-only arrays have only that.
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        address: int = array.__array_interface__["data"][0]
        return address


# ---- torch -----------------------------------------------------------------------------------------------------------


torch_codes: dict[Any, int] = {}
"""Codes of torch's dtypes, as far as `torch_code` was asked for them."""


def torch_code(tensor: Any) -> int:
    """The code of a tensor's dtype. Raises TensorError for a dtype that cannot be sent."""
    code = torch_codes.get(tensor.dtype)
    if code is None:
        code = torch_codes[tensor.dtype] = dtype_of(tensor.dtype).code
    return code


def fits_storage(tensor: Any, nbytes: int) -> bool:
    """Whether the storage of a contiguous tensor holds its `nbytes` bytes."""
    fits: bool = tensor.storage_offset() * tensor.itemsize + nbytes <= tensor.untyped_storage().nbytes()
    return fits


def check_torch(tensor: Any) -> None:
    """Checks, before an element is read, that all of a tensor's elements lie in its storage and can be read.

    A storage may be freed or resized under its tensors, as FSDP does. Raises TensorError.
    """
    torch = sys.modules["torch"]
    is_nested = tensor.is_nested
    if is_nested or tensor.layout is not torch.strided or tensor.device.type == "meta":
        what = f"{'nested ' if is_nested else ''}{tensor.layout} tensor on {tensor.device}"
        raise TensorError(f"a {what}, expected a strided one with data")
    try:
        storage_nbytes = tensor.untyped_storage().nbytes()
    except RuntimeError:
        if tensor.device.type not in ("cpu", "cuda"):
            return  # a device without storages: torch copies what is there
        raise _no_data(tensor) from None
    needed = 0
    if tensor.numel():
        last = sum((dim - 1) * stride for dim, stride in zip(tensor.shape, tensor.stride()))
        needed = (tensor.storage_offset() + last + 1) * tensor.itemsize
    if needed > storage_nbytes:
        raise TensorError(
            f"a tensor of shape {list(tensor.shape)} whose storage has {storage_nbytes} bytes, expected {needed} or "
            "more: it was freed or resized"
        )
    if torch._is_functional_tensor(tensor) or tensor._is_zerotensor():
        raise _no_data(tensor)
    if needed and tensor.is_cpu and not tensor.data_ptr():
        raise _no_data(tensor)


def _no_data(tensor: Any) -> TensorError:
    return TensorError(
        f"a tensor of shape {list(tensor.shape)} without data of its own, as within a transform of torch's (vmap, "
        "grad, functionalize), expected one with data"
    )


def by_torch(work: Callable[[], Any]) -> Any:
    """The result of `work`, an operation of torch on a checked tensor. Raises TensorError if torch refuses it."""
    try:
        return work()
    except Exception as error:
        raise TensorError(f"a tensor that torch does not copy: {type(error).__name__}: {error}") from error
