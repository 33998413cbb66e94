"""The one place that knows both torch and numpy: arrays in and out of wire memory.

Where memory is shared, a tensor that lies in it goes by reference; what does not is copied once, straight into it.

Rules. torch is optional and imported only when it is there and somebody asked for torch tensors (or uses them already).
What may go out is decided here alone, by its exact type and before a byte of it is read (`_gate`, `_check_torch`,
`_check_numpy`): a mask or a unit beside the values would be lost without a word, and what lies beyond a storage that
was freed or resized is other memory of this process. Going out, nothing is copied unless the wire cannot take it as it
lies: not row-major contiguous, not little-endian, or on another device. Such copies are counted by whoever asked.
Coming in, a tensor is a view of the memory it was received into: writable, aligned to 64 bytes, valid until its last
view dies.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import ArenaFull, SettingError, TensorError, shown
from ..schema.coding import CASTS, FLOAT32
from ..schema.descriptor import TensorDesc
from ..schema.dtypes import BY_CODE, DType, dtype_of_numpy, lookup
from ..schema.limits import ARRAYS, Limits, over
from .pool import Lease, Slab, pool

__all__ = [
    "Arrays",
    "Desc",
    "Outgoing",
    "SharedMemory",
    "collect",
    "collect_cast",
    "dtype_of",
    "nbytes_of",
    "parse_arrays",
    "parse_expect",
    "parse_shape",
    "share",
    "widen",
]


Desc = tuple[int, tuple[int, ...]]
"""A tensor's dtype code and shape."""


class Arrays:
    """How one kind of array ("torch" or "numpy") is made of received memory."""

    def __init__(self, kind: str, view: Callable[[Any, TensorDesc], Any]) -> None:
        self.kind = kind
        self.view = view
        """`view(memory, desc)`: a tensor over `memory`, flat uint8 of exactly `desc.nbytes` bytes, or a Lease of the
        description's shape and dtype. Copies nothing."""

    def empty(self, shape: int | Sequence[int], dtype: Any, allocate: Callable[[int], Any]) -> Any:
        """A tensor of undefined content in memory that `allocate(nbytes)` gives, flat uint8.

        `dtype`: a name, or a torch or numpy dtype. Raises TensorError for another, for a shape that no array can have,
        and what `allocate` raises.
        """
        row, dims = dtype_of(dtype), parse_shape(shape)
        ARRAYS.check_dims("tensor", len(dims), _no_array)
        ARRAYS.check_shape("tensor", dims, row.itemsize, _no_array)
        desc = TensorDesc.of(row, dims)
        return self.view(allocate(desc.nbytes), desc)


def _no_array(field: str, came: str, accepted: str) -> TensorError:
    return TensorError(f"{field}: {came}, expected {accepted}")


def parse_shape(shape: Any) -> tuple[int, ...]:
    """A shape given as an int (of numpy's, too) or a sequence of ints. Raises TensorError."""
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
    """A call's `expect`: what its reply must hold. Raises SettingError."""
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
    """The arrays that callers and handlers get: "torch", "numpy", or "auto" (torch where it is installed).

    Raises SettingError for another kind, MissingExtraError if torch is asked for and not installed.
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
        return Arrays(kind, _torch_view())
    raise SettingError(f"arrays {shown(kind)}, expected 'auto', 'torch' or 'numpy'")


def dtype_of(dtype: Any) -> DType:
    """The table row of a dtype given as a name, a torch dtype, a numpy dtype or scalar type. Raises TensorError."""
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


class Outgoing(NamedTuple):
    """The tensors of one message, ready to be sent. They must not change, nor die, until that is done.

    Through a stream go `buffers`, those of the tensors that are not empty: C-contiguous, their own memory but for what
    was copied. By reference go `placements`: segment, offset and nbytes of each tensor, flat.
    """

    descs: list[Desc]
    buffers: Sequence[Any] = ()
    nbytes: int = 0
    """Of the buffers."""
    copied_nbytes: int = 0
    placements: Sequence[int] = ()
    shared_nbytes: int = 0
    kept: Any = None


def nbytes_of(tensor: Any) -> int:
    """Bytes of a tensor that is about to be sent. Raises TensorError if it cannot be."""
    if type(tensor) not in _ADMITTED:
        tensor = _gate(tensor)
    try:
        nbytes: int = tensor.nbytes
    except RuntimeError:  # torch's, of a sparse tensor: what follows says so
        nbytes = _locate_torch(tensor)[2]
    return nbytes


def collect(tensors: Iterable[Any], limits: Limits = ARRAYS) -> Outgoing:
    """What is needed to send torch tensors, numpy arrays, or anything with numpy's array interface, through a stream.

    `limits`: the peer's. Raises TensorError if one cannot be sent (an object array, a masked one, a sparse tensor, a
    list, ...), LimitError before a copy is made that the peer would not take, ArenaFull if there is no memory for it.
    """
    descs: list[Desc] = []
    buffers: list[Any] = []
    nbytes = copied_nbytes = 0
    for value in tensors:
        if type(value) not in _ADMITTED:
            value = _gate(value)
        outgoing = _outgoing_numpy if type(value) is np.ndarray else _outgoing_torch
        desc, array, copied = outgoing(value, pool.allocate, limits, nbytes, len(descs))
        descs.append(desc)
        size = array.nbytes
        if size:
            buffers.append(array)
            nbytes += size
            if copied:
                copied_nbytes += size
    return Outgoing(descs, buffers, nbytes, copied_nbytes)


# ---- casts of float32 on the wire ------------------------------------------------------------------------------------

_CAST_CHUNK = 32768
"""Elements: up to here torch does not wake its threads, of which each thread that reads would get its own. A chunk's
bytes stay in the cache between one step and the next."""
_BFLOAT16, _FLOAT16 = CASTS["bfloat16"], CASTS["float16"]
_MAX_FINITE = 0x7BFF  # float16's largest number, as an int


class Cast(NamedTuple):
    """Tensors of a message, and how each of them goes: `buffers` has one for each, also for those without bytes."""

    descs: list[Desc]
    buffers: list[Any]
    casts: list[int]
    """coding.CASTS, 0: as it is."""
    copied_nbytes: int
    cast_s: float
    too_large: int
    """How many were to be float16, and hold what only bfloat16 can."""


def collect_cast(
    tensors: Iterable[Any],
    cast: int,
    allocate: Callable[[int], Any],
    min_nbytes: int = 0,
    limits: Limits = ARRAYS,
) -> Cast:
    """As `collect`, but float32 tensors of `min_nbytes` or more are cast into memory that `allocate(nbytes)` gives.

    What is not contiguous is cast as it lies, in the same pass. bfloat16 rounds to nearest even, as torch does. With
    float16 a tensor that holds an infinity, a NaN, or a number that would become an infinity is cast to bfloat16
    instead: no cast makes a finite number infinite (but for the last one in 256 of float32's own largest).
    """
    found = Cast([], [], [], 0, 0.0, 0)
    copied_nbytes = too_large = nbytes = 0
    cast_s = 0.0
    for value in tensors:
        if type(value) not in _ADMITTED:
            value = _gate(value)
        is_torch = type(value) is not np.ndarray
        if is_torch:
            code = _codes.get(value.dtype) or _code_torch(value)
            _check_torch(value)
        else:
            code = _row_numpy(value).code
            _check_numpy(value)
        size = value.nbytes
        if not cast or size < min_nbytes or code != FLOAT32:
            outgoing = _outgoing_torch if is_torch else _outgoing_numpy
            desc, array, copied = outgoing(value, allocate, limits, nbytes, len(found.descs))
            copied_nbytes += size if copied else 0
            found.casts.append(0)
        else:
            started_s = perf_counter()
            desc = (FLOAT32, tuple(value.shape))
            _check_copy(len(found.descs), desc, nbytes + size, limits)
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
    """Fills `memory` with the float32 numbers that `half` holds in 16 bits each. Both flat uint8."""
    bits, out = half.view(np.uint16), memory.view(np.float32)
    torch = sys.modules.get("torch")
    if torch is None:
        if cast == _FLOAT16:
            out[...] = bits.view(np.float16)
        else:
            np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32)
        return
    # 12 GB/s of what comes out, numpy's float16 has 3
    source = torch.from_numpy(bits.view(np.int16)).view(torch.float16 if cast == _FLOAT16 else torch.bfloat16)
    target = torch.from_numpy(out)
    for at in range(0, len(bits), _CAST_CHUNK):
        target[at : at + _CAST_CHUNK].copy_(source[at : at + _CAST_CHUNK])


def _narrow_torch(tensor: Any, cast: int, memory: Any) -> None:
    torch = sys.modules["torch"]
    dtype = torch.float16 if cast == _FLOAT16 else torch.bfloat16
    target = torch.from_numpy(memory.view(np.int16)).view(dtype).view(tensor.shape)
    _by_torch(lambda: target.copy_(tensor.detach()))


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
    """Whether all float16 numbers are: two passes over the bits, which is what one over the source would take."""
    return bool(halves.view(np.int16).max() <= _MAX_FINITE and halves.view(np.uint16).max() <= _MAX_FINITE | 0x8000)


class SharedMemory(Protocol):
    """What `share` needs of an arena."""

    def place(self, address: int, nbytes: int) -> tuple[int, int] | None: ...
    def allocate(self, nbytes: int, deadline: float | None = None) -> Any: ...


def share(tensors: Iterable[Any], memory: SharedMemory, deadline: float | None, limits: Limits = ARRAYS) -> Outgoing:
    """Where tensors lie in shared memory; those that do not are copied into it, once.

    Takes and raises what `collect` does; ArenaFull if there is no room until `deadline`.
    """
    descs: list[Desc] = []
    placements: list[int] = []
    kept: list[Any] = []
    nbytes = copied_nbytes = 0
    for value in tensors:
        if type(value) not in _ADMITTED:
            value = _gate(value)
        is_torch = type(value) is not np.ndarray
        if is_torch:
            desc, address, size = _locate_torch(value)
        else:  # `value` must live until it is copied, and may be made just here
            value, desc, address, size = _locate_numpy(value)
        place = memory.place(address, size) if address else None
        if place is not None:  # what lies there cannot be resized
            kept.append(value)
        else:
            if not is_torch:
                if value.base is not None:
                    _check_numpy(value, address)
            elif not address or not _fits(value, size):
                _check_torch(value)
            if size:
                if nbytes + size > limits.max_message_nbytes or len(desc[1]) > limits.max_dims:
                    _check_copy(len(descs), desc, nbytes + size, limits)
                copy = memory.allocate(size, deadline)
                copy_address = _address(copy)
                kept.append(copy)
                if address and (not is_torch or value.is_cpu):
                    # Not by torch, which would wake its threads for it: they go on to spin, on the peer's cores too.
                    ctypes.memmove(copy_address, address, size)
                elif is_torch:
                    _copy_torch(value, desc, copy)
                else:
                    _copy_numpy(value, copy)
                copied_nbytes += size
                place = memory.place(copy_address, size)
                if place is None:  # the connection ended at this moment
                    raise ArenaFull("no shared memory: the connection has ended")
        descs.append(desc)
        placements += place or (0, 0)
        placements.append(size)
        nbytes += size
    return tuple.__new__(Outgoing, (descs, (), 0, copied_nbytes, placements, nbytes, kept))  # 0.1 us less


# ---- what may be sent ------------------------------------------------------------------------------------------------

_ADMITTED: set[type] = {np.ndarray}
"""Types that pass the gate as they are: numpy's, and torch's as soon as a tensor of it came by."""
_PLAIN_ARRAYS = (np.matrix, np.memmap, Lease)
"""Subclasses that mean no more than their values."""


def _gate(value: Any) -> Any:
    """A torch tensor, or an exact numpy array of anything else. Raises TensorError for what may not be sent.

    A subclass may mean more than its values: a mask, units, field names, another tensor beside it. So it is refused
    unless it is known to be plain, whatever other protocols it has.
    """
    kind = type(value)
    torch = sys.modules.get("torch")
    tensor_type = getattr(torch, "Tensor", None)  # None while another thread imports torch
    if tensor_type is not None and isinstance(value, tensor_type):
        plain = (tensor_type, torch.nn.Parameter)  # type: ignore[union-attr]
        if kind not in plain:
            raise _refusal(kind, "torch.Tensor or torch.nn.Parameter: a subclass may mean more than its values")
        _ADMITTED.update(plain)
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


def _check_copy(index: int, desc: Desc, nbytes: int, limits: Limits) -> None:
    """Raises LimitError for a tensor that the peer would not take, before it is copied. `nbytes`: of the message up to
    its end."""
    limits.check_dims(f"tensor {index}", len(desc[1]), over)
    limits.check_nbytes(nbytes, over)


# ---- numpy -----------------------------------------------------------------------------------------------------------


def _numpy_view(memory: Any, desc: TensorDesc) -> Any:
    # over a lease too: a lease itself stays with us
    return np.ndarray(desc.shape, desc.dtype.numpy, memory)


def _row_numpy(value: np.ndarray[Any, Any]) -> DType:
    dtype = value.dtype
    return dtype_of_numpy(dtype if dtype.isnative else dtype.newbyteorder("="))


def _buffered(value: np.ndarray[Any, Any], row: DType) -> np.ndarray[Any, Any]:
    """The same bytes in a dtype that has a buffer: ml_dtypes' have none."""
    return value if row.numpy is row.buffer_dtype or not value.dtype.isnative else value.view(row.buffer_dtype)


def _locate_numpy(value: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], Desc, int, int]:
    """An array that has a buffer, its description, its address (0 if it cannot go as it lies), its bytes."""
    row = _row_numpy(value)
    value = _buffered(value, row)
    desc = (row.code, value.shape)
    size = value.nbytes
    flags = value.flags
    if not size or not flags.c_contiguous or not flags.aligned or not value.dtype.isnative:
        return value, desc, 0, size
    address = _address(value)
    return value, desc, address if address % row.itemsize == 0 else 0, size


def _check_numpy(array: np.ndarray[Any, Any], address: int = 0) -> None:
    """Raises TensorError if an array no longer lies in what it is a view of, as far as can be known: before it is read.

    numpy lets an array be resized, and a buffer (a bytearray, a mapped file) be closed, under a view of it. `address`:
    of the array, if it is contiguous and that is known.
    """
    base: Any = array.base
    if base is None or not array.size:
        return
    if type(base) is np.ndarray:
        if type(base.base) is Slab:
            return
        if base.base is None and array.flags.c_contiguous:
            address, start = address or _address(array), _address(base)  # the usual view, 0.7 us; others take more
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
"""Bases that keep their memory as it is, as ctypes' arrays do (those of received tensors, above all)."""


def _check_base(array: np.ndarray[Any, Any], base: Any, low: int, high: int) -> None:
    """The same for memory that is not numpy's own."""
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
    """Where an array's bytes begin and end."""
    if array.flags.c_contiguous:
        address = _address(array)
        return address, address + array.nbytes
    low = high = array.__array_interface__["data"][0]
    for dim, stride in zip(array.shape, array.strides):
        if stride < 0:
            low += (dim - 1) * stride
        else:
            high += (dim - 1) * stride
    return low, high + array.itemsize


def _address(array: np.ndarray[Any, Any]) -> int:
    """The address of an array that has a buffer."""
    try:
        # 0.2 us; `__array_interface__` takes 0.9. Read-only arrays have only that.
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        address: int = array.__array_interface__["data"][0]
        return address


def _copy_numpy(value: np.ndarray[Any, Any], memory: Any) -> None:
    np.ndarray(value.shape, value.dtype.newbyteorder("="), memory)[...] = value


def _outgoing_numpy(
    value: np.ndarray[Any, Any], allocate: Callable[[int], Any], limits: Limits, before_nbytes: int, index: int
) -> tuple[Desc, Any, bool]:
    row = _row_numpy(value)
    value = _buffered(value, row)
    desc = (row.code, value.shape)
    if value.base is not None:
        _check_numpy(value)
    if value.flags.c_contiguous and value.dtype.isnative:
        return desc, value, False
    _check_copy(index, desc, before_nbytes + value.nbytes, limits)
    memory = allocate(value.nbytes)
    _copy_numpy(value, memory)
    return desc, memory, True


# ---- torch -----------------------------------------------------------------------------------------------------------

_codes: dict[Any, int] = {}  # torch dtype -> code
_NUMPYS_OWN = frozenset(code for code, row in BY_CODE.items() if row.numpy is row.buffer_dtype)
_SIGNED = {1: "int8", 2: "int16"}  # what numpy and torch both have, for the dtypes that numpy does not


@functools.cache
def _torch_view() -> Callable[[Any, TensorDesc], Any]:
    from ..extras import torch

    dtypes = {code: getattr(torch, row.name, None) for code, row in BY_CODE.items()}

    def view(memory: Any, desc: TensorDesc) -> Any:
        # from_numpy over ndarray(): 0.9 us; torch.frombuffer().view(): 1.8 us.
        code = desc.dtype.code
        if code not in foreign:
            if type(memory) is Lease:
                return torch.from_numpy(memory)
            return torch.from_numpy(np.ndarray(desc.shape, desc.dtype.numpy, memory))
        dtype = dtypes[code]
        if dtype is None:
            raise TensorError(f"dtype {desc.dtype.name}, which torch {torch.__version__} does not have")
        stand_in = _SIGNED[desc.dtype.itemsize]
        return torch.from_numpy(np.ndarray(desc.shape, stand_in, memory)).view(dtype)

    foreign = {code for code in BY_CODE if code not in _NUMPYS_OWN or dtypes[code] is None}
    return view


def _code_torch(tensor: Any) -> int:
    code = _codes.get(tensor.dtype)
    if code is None:
        code = _codes[tensor.dtype] = dtype_of(tensor.dtype).code
    return code


def _locate_torch(tensor: Any) -> tuple[Desc, int, int]:
    """A tensor's description, its address (0 if it cannot go as it lies), its bytes. Raises TensorError."""
    code = _codes.get(tensor.dtype) or _code_torch(tensor)
    try:
        desc = (code, tensor.shape)
        size: int = tensor.nbytes
        # A device's addresses are never those of our memory. Conjugation and negation may be flags on the same bytes.
        if tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj():
            address: int = tensor.data_ptr()
            return desc, 0 if address & 15 and address % tensor.itemsize else address, size
    except RuntimeError:  # without a shape, or without data
        _check_torch(tensor)
        desc = (code, tensor.shape)
        size = tensor.numel() * tensor.itemsize
    return desc, 0, size


def _fits(tensor: Any, nbytes: int) -> bool:
    """Whether the storage of a contiguous tensor has as many bytes. 0.2 us."""
    fits: bool = tensor.storage_offset() * tensor.itemsize + nbytes <= tensor.untyped_storage().nbytes()
    return fits


def _check_torch(tensor: Any) -> None:
    """Raises TensorError unless every element of a tensor lies in its storage, and can be read: before one is.

    A storage may be freed or resized under its tensors, as FSDP does.
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


def _by_torch(work: Callable[[], Any]) -> Any:
    """Does what torch does to a tensor that was checked. Raises TensorError if torch refuses it all the same."""
    try:
        return work()
    except Exception as error:
        raise TensorError(f"a tensor that torch does not copy: {type(error).__name__}: {error}") from error


def _copy_torch(tensor: Any, desc: Desc, memory: Any) -> None:
    target = _torch_view()(memory, TensorDesc.of(BY_CODE[desc[0]], desc[1]))
    _by_torch(lambda: target.copy_(tensor.detach()))


def _bytes_of(tensor: Any) -> Any:
    # not by reshape: one element may have any stride, and is contiguous all the same
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(sys.modules["torch"].uint8).numpy()


def _outgoing_torch(
    tensor: Any, allocate: Callable[[int], Any], limits: Limits, before_nbytes: int, index: int
) -> tuple[Desc, Any, bool]:
    code = _codes.get(tensor.dtype) or _code_torch(tensor)
    if code in _NUMPYS_OWN:
        try:
            if tensor.is_contiguous() and tensor.data_ptr() and _fits(tensor, tensor.nbytes):
                return (code, tensor.shape), tensor.numpy(), False
        except (RuntimeError, TypeError, ValueError, AssertionError):
            pass  # it requires grad, is conjugated or negated, or on a device; or cannot be sent: what follows says why
    desc, address, size = _locate_torch(tensor)
    _check_torch(tensor)
    if address and tensor.is_cpu:
        return desc, _by_torch(lambda: _bytes_of(tensor)), False
    _check_copy(index, desc, before_nbytes + size, limits)
    memory = allocate(size)
    _copy_torch(tensor, desc, memory)
    return desc, memory, True
