"""The one place that knows both torch and numpy: arrays in and out of wire memory.

Where memory is shared, a tensor that lies in it goes by reference; what does not is copied once, straight into it.

Rules. torch is optional and imported only when it is there and somebody asked for torch tensors (or uses them already).
Going out, nothing is copied unless the wire cannot take it as it lies: not row-major contiguous, not little-endian, or
on another device. Such copies are counted by whoever asked. Coming in, a tensor is a view of the memory it was received
into: writable, aligned to 64 bytes, valid until its last view dies.
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

from .errors import ArenaFull, TensorError
from .memory import Lease
from .schema.coding import CASTS, FLOAT32
from .schema.descriptor import TensorDesc
from .schema.dtypes import BY_CODE, DType, dtype_of_numpy, lookup

__all__ = [
    "Arrays",
    "Desc",
    "Outgoing",
    "SharedMemory",
    "arrays",
    "collect",
    "collect_cast",
    "dtype_of",
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

        `dtype`: a name, or a torch or numpy dtype. Raises TensorError for another, and what `allocate` raises.
        """
        try:
            dims = [operator.index(dim) for dim in ((shape,) if isinstance(shape, int) else shape)]
        except TypeError:
            raise TensorError(f"shape {shape!r}, expected ints") from None
        desc = TensorDesc.of(dtype_of(dtype), dims)
        if any(dim < 0 for dim in desc.shape):
            raise TensorError(f"shape {list(desc.shape)}, expected dimensions of 0 or more")
        return self.view(allocate(desc.nbytes), desc)


def arrays(kind: str | Arrays = "auto") -> Arrays:
    """The arrays that callers and handlers get: "torch", "numpy", or "auto" (torch where it is installed).

    Raises ValueError for another kind, ModuleNotFoundError if torch is asked for and not installed.
    """
    if isinstance(kind, Arrays):
        return kind
    if kind == "auto":
        kind = "torch" if "torch" in sys.modules or importlib.util.find_spec("torch") is not None else "numpy"
    if kind == "numpy":
        return Arrays(kind, _numpy_view)
    if kind == "torch":
        return Arrays(kind, _torch_view())
    raise ValueError(f"arrays {kind!r}, expected 'auto', 'torch' or 'numpy'")


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
        return dtype_of_numpy(np.dtype(dtype))
    except TypeError:
        raise TensorError(f"dtype {dtype!r}, expected a name, a torch dtype or a numpy dtype") from None


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


def collect(tensors: Iterable[Any]) -> Outgoing:
    """What is needed to send torch tensors, numpy arrays, or anything with numpy's array interface, through a stream.

    Raises TensorError if one has no description (an object array, a sparse or meta tensor, a list, ...).
    """
    descs: list[Desc] = []
    buffers: list[Any] = []
    nbytes = copied_nbytes = 0
    torch = sys.modules.get("torch")
    for value in tensors:
        if torch is not None and isinstance(value, torch.Tensor):
            desc, array, copied = _outgoing_torch(torch, value)
        else:
            desc, array, copied = _outgoing_numpy(value)
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


def collect_cast(tensors: Iterable[Any], cast: int, allocate: Callable[[int], Any], least_nbytes: int = 0) -> Cast:
    """As `collect`, but float32 tensors of `least_nbytes` or more are cast into memory that `allocate(nbytes)` gives.

    What is not contiguous is cast as it lies, in the same pass. bfloat16 rounds to nearest even, as torch does. With
    float16 a tensor that holds an infinity, a NaN, or a number that would become an infinity is cast to bfloat16
    instead: no cast makes a finite number infinite (but for the last one in 256 of float32's own largest).
    Raises TensorError.
    """
    found = Cast([], [], [], 0, 0.0, 0)
    copied_nbytes = too_large = 0
    cast_s = 0.0
    torch = sys.modules.get("torch")
    for value in tensors:
        is_torch = torch is not None and isinstance(value, torch.Tensor)
        if not is_torch:
            value = _as_numpy(value)
        if not cast or value.nbytes < least_nbytes or not _is_float32(value):
            desc, array, copied = _outgoing_torch(torch, value) if is_torch else _outgoing_numpy(value)
            copied_nbytes += array.nbytes if copied else 0
            found.casts.append(0)
        else:
            started_s = perf_counter()
            if is_torch:
                _check_torch(torch, value)
            desc = (FLOAT32, tuple(value.shape))
            array = allocate(2 * math.prod(desc[1]))
            narrow = functools.partial(_narrow_torch, torch) if is_torch else _narrow_numpy
            used = cast
            narrow(value, cast, array)
            if cast == _FLOAT16 and array.nbytes and not _is_finite(array):
                too_large += 1
                used = _BFLOAT16
                narrow(value, used, array)
            found.casts.append(used if array.nbytes else 0)
            cast_s += perf_counter() - started_s
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


def _narrow_torch(torch: Any, tensor: Any, cast: int, memory: Any) -> None:
    dtype = torch.float16 if cast == _FLOAT16 else torch.bfloat16
    target = torch.from_numpy(memory.view(np.int16)).view(dtype).view(tensor.shape)
    target.copy_(tensor.detach())


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


def _is_float32(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return bool(value.dtype.newbyteorder("=") == np.float32)
    return str(value.dtype) == "torch.float32"


def _is_finite(halves: Any) -> bool:
    """Whether all float16 numbers are: two passes over the bits, which is what one over the source would take."""
    return bool(halves.view(np.int16).max() <= _MAX_FINITE and halves.view(np.uint16).max() <= _MAX_FINITE | 0x8000)


class SharedMemory(Protocol):
    """What `share` needs of an arena."""

    def place(self, address: int, nbytes: int) -> tuple[int, int] | None: ...
    def allocate(self, nbytes: int, deadline: float | None = None) -> Any: ...


def share(tensors: Iterable[Any], memory: SharedMemory, deadline: float | None) -> Outgoing:
    """Where tensors lie in shared memory; those that do not are copied into it, once.

    Takes what `collect` takes. Raises TensorError, and ArenaFull if there is no room until `deadline`.
    """
    descs: list[Desc] = []
    placements: list[int] = []
    kept: list[Any] = []
    nbytes = copied_nbytes = 0
    torch = sys.modules.get("torch")
    for value in tensors:
        is_torch = torch is not None and isinstance(value, torch.Tensor)
        if not is_torch:
            value = _as_numpy(value)  # which must live until it is copied, and may be made just here
        desc, address, size = _locate_torch(value) if is_torch else _locate_numpy(value)
        place = memory.place(address, size) if address else None
        if place is None and size:
            if is_torch:  # what has no address may have no data at all
                _check_torch(torch, value)
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
        elif place is not None:
            kept.append(value)
        descs.append(desc)
        placements += place or (0, 0)
        placements.append(size)
        nbytes += size
    return tuple.__new__(Outgoing, (descs, (), 0, copied_nbytes, placements, nbytes, kept))  # 0.1 us less


# ---- numpy -----------------------------------------------------------------------------------------------------------


def _numpy_view(memory: Any, desc: TensorDesc) -> Any:
    # over a lease too: a lease itself stays with us
    return np.ndarray(desc.shape, desc.dtype.numpy, memory)


def _as_numpy(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, np.generic) and not hasattr(value, "__array_interface__"):
        raise TensorError(f"a tensor of type {type(value).__name__}, expected a torch tensor or a numpy array")
    return np.asarray(value)


def _locate_numpy(value: np.ndarray[Any, Any]) -> tuple[Desc, int, int]:
    """An array's description, its address (0 if it cannot go as it lies), its bytes."""
    dtype = value.dtype
    desc = (dtype_of_numpy(dtype if dtype.isnative else dtype.newbyteorder("=")).code, value.shape)
    size = value.nbytes
    flags = value.flags
    if not size or not flags.c_contiguous or not flags.aligned or not dtype.isnative:
        return desc, 0, size
    address = _address(value)
    return desc, address if address % dtype.itemsize == 0 else 0, size


def _address(array: np.ndarray[Any, Any]) -> int:
    """The address of an array that is not empty."""
    try:
        # 0.2 us; `__array_interface__` takes 0.9. Read-only arrays and ml_dtypes' types have only that.
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        address: int = array.__array_interface__["data"][0]
        return address


def _copy_numpy(value: np.ndarray[Any, Any], memory: Any) -> None:
    np.ndarray(value.shape, value.dtype.newbyteorder("="), memory)[...] = value


def _outgoing_numpy(value: Any) -> tuple[Desc, Any, bool]:
    value = _as_numpy(value)
    copied = not value.flags.c_contiguous or not value.dtype.isnative
    if copied:  # not by ascontiguousarray: that makes a scalar one-dimensional
        value = np.array(value, dtype=value.dtype.newbyteorder("="), order="C", copy=True)
    desc = (dtype_of_numpy(value.dtype).code, value.shape)
    if value.dtype.kind not in "biufc":  # ml_dtypes' types have no buffer protocol
        value = value.reshape(-1).view(np.uint8)
    return desc, value, copied


# ---- torch -----------------------------------------------------------------------------------------------------------

_codes: dict[Any, int] = {}  # torch dtype -> code
_SIGNED = {1: "int8", 2: "int16"}  # what numpy and torch both have, for the dtypes that numpy does not


@functools.cache
def _torch_view() -> Callable[[Any, TensorDesc], Any]:
    import torch

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

    foreign = {code for code, row in BY_CODE.items() if row.numpy.metadata is not None or dtypes[code] is None}
    return view


def _code_torch(tensor: Any) -> int:
    code = _codes.get(tensor.dtype)
    if code is None:
        code = _codes[tensor.dtype] = dtype_of(tensor.dtype).code
    return code


def _locate_torch(tensor: Any) -> tuple[Desc, int, int]:
    """A tensor's description, its address (0 if it cannot go as it lies), its bytes."""
    code = _codes.get(tensor.dtype) or _code_torch(tensor)
    desc = (code, tensor.shape)
    try:
        size: int = tensor.nbytes
        # A device's addresses are never those of our memory. Conjugation and negation may be flags on the same bytes.
        if tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj():
            address: int = tensor.data_ptr()
            return desc, 0 if address & 15 and address % tensor.itemsize else address, size
    except RuntimeError:  # sparse, or without data
        size = tensor.numel() * tensor.itemsize
    return desc, 0, size


def _check_torch(torch: Any, tensor: Any) -> None:
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise TensorError(f"a {tensor.layout} tensor on {tensor.device}, expected a strided one with data")


def _copy_torch(tensor: Any, desc: Desc, memory: Any) -> None:
    _torch_view()(memory, TensorDesc.of(BY_CODE[desc[0]], desc[1])).copy_(tensor.detach())


def _outgoing_torch(torch: Any, tensor: Any) -> tuple[Desc, Any, bool]:
    code = _code_torch(tensor)
    if BY_CODE[code].numpy.metadata is None:
        try:
            if tensor.is_contiguous():
                return (code, tensor.shape), tensor.numpy(), False
        except (RuntimeError, TypeError):  # it requires grad, is conjugated or negated, sparse, or on a device
            pass
    desc = (code, tuple(tensor.shape))
    _check_torch(torch, tensor)
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    copied = plain.data_ptr() != tensor.data_ptr() or tensor.device.type != "cpu"
    return desc, plain.reshape(-1).view(torch.uint8).numpy(), copied
