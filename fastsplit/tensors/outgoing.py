"""Tensors of a message that is about to be sent: their bytes for a stream, or their places in shared memory.

Rules. What may be sent is decided in checks.py, before a byte is read. Through a stream a tensor goes from its own
memory; it is copied only if it is not row-major contiguous, not little-endian, or on another device. Where memory is
shared, a tensor that lies in it goes by reference; any other is copied into it once. Copies are counted.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import ArenaFull
from ..schema.descriptor import TensorDesc
from ..schema.dtypes import BY_CODE
from ..schema.limits import ARRAYS, Limits
from .arrays import NUMPYS_OWN, Desc, torch_view
from .checks import (
    ADMITTED,
    address_of,
    admit,
    buffered,
    by_torch,
    check_copy,
    check_numpy,
    check_torch,
    fits_storage,
    numpy_row,
    torch_code,
    torch_codes,
)
from .pool import pool

__all__ = [
    "Outgoing",
    "SharedMemory",
    "check_memory",
    "collect",
    "copy_in",
    "nbytes_of",
    "outgoing_numpy",
    "outgoing_torch",
    "share",
]


class Outgoing(NamedTuple):
    """The tensors of one message, ready to be sent. They must live, and not change, until they are sent.

    Through a stream go `buffers`, one for each tensor that is not empty: C-contiguous, the tensor's own memory unless
    it was copied. By reference go `placements`: segment, offset and nbytes of each tensor, flat.
    """

    descs: list[Desc]
    buffers: Sequence[Any] = ()
    nbytes: int = 0
    """Of the buffers."""
    copied_nbytes: int = 0
    placements: Sequence[int] = ()
    shared_nbytes: int = 0
    """Of the tensors that go by reference."""
    kept: Any = None
    """Keeps alive what the placements name."""


def nbytes_of(tensor: Any) -> int:
    """The bytes of a tensor that is about to be sent. Raises TensorError if it cannot be sent."""
    if type(tensor) not in ADMITTED:
        tensor = admit(tensor)
    try:
        nbytes: int = tensor.nbytes
    except RuntimeError:  # torch's, of a sparse tensor: the next line raises TensorError
        nbytes = _locate_torch(tensor)[2]
    return nbytes


def collect(tensors: Iterable[Any], limits: Limits = ARRAYS) -> Outgoing:
    """Prepares torch tensors, numpy arrays, and objects with numpy's array interface for a stream.

    `limits`: the peer's. Raises TensorError for what cannot be sent (an object array, a masked one, a sparse tensor, a
    list, ...), LimitError before a copy that the peer would not take, ArenaFull if there is no memory for a copy.
    """
    descs: list[Desc] = []
    buffers: list[Any] = []
    nbytes = copied_nbytes = 0
    for value in tensors:
        if type(value) not in ADMITTED:
            value = admit(value)
        outgoing = outgoing_numpy if type(value) is np.ndarray else outgoing_torch
        desc, array, copied = outgoing(value, pool.allocate, limits, nbytes, len(descs))
        descs.append(desc)
        size = array.nbytes
        if size:
            buffers.append(array)
            nbytes += size
            if copied:
                copied_nbytes += size
    return Outgoing(descs, buffers, nbytes, copied_nbytes)


class SharedMemory(Protocol):
    """What `share` needs of an arena."""

    def place(self, address: int, nbytes: int) -> tuple[int, int] | None: ...
    def allocate(self, nbytes: int, deadline: float | None = None) -> Any: ...


def share(tensors: Iterable[Any], memory: SharedMemory, deadline: float | None, limits: Limits = ARRAYS) -> Outgoing:
    """Prepares tensors for shared memory: finds the places of those that lie in it, and copies the others into it.

    Takes and raises what `collect` does; ArenaFull if there is no room until `deadline` (time.monotonic() seconds).
    """
    descs: list[Desc] = []
    placements: list[int] = []
    kept: list[Any] = []
    nbytes = copied_nbytes = 0
    for value in tensors:
        if type(value) not in ADMITTED:
            value = admit(value)
        is_torch = type(value) is not np.ndarray
        if is_torch:
            desc, address, size = _locate_torch(value)
        else:  # `value` may be made just here, and must live until it is copied
            value, desc, address, size = _locate_numpy(value)
        place = memory.place(address, size) if address else None
        if place is not None:  # memory of the arena cannot be resized: no check
            kept.append(value)
        else:
            check_memory(value, address, size)
            if size:
                if nbytes + size > limits.max_message_nbytes or len(desc[1]) > limits.max_dims:
                    check_copy(len(descs), desc, nbytes + size, limits)
                copy = memory.allocate(size, deadline)
                copy_address = address_of(copy)
                kept.append(copy)
                if address and (not is_torch or value.is_cpu):
                    # Not by torch: its threads would spin afterwards, on the peer's cores too.
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
    return tuple.__new__(
        Outgoing, (descs, (), 0, copied_nbytes, placements, nbytes, kept)
    )  # without the NamedTuple's own constructor: 0.1 us less


def check_memory(value: Any, address: int, nbytes: int) -> None:
    """Raises TensorError if the bytes of an array or tensor may not be read. `address`: 0 if it must be copied."""
    if type(value) is np.ndarray:
        if value.base is not None:
            check_numpy(value, address)
    elif not address or not fits_storage(value, nbytes):
        check_torch(value)


def copy_in(memory: SharedMemory, value: Any, address: int, nbytes: int) -> Any:
    """A copy in shared memory, flat, of an array or tensor that is row-major and at `address`. None if there is no room
    now. Raises TensorError if it may not be read."""
    check_memory(value, address, nbytes)
    try:
        copy = memory.allocate(nbytes, 0.0)
    except ArenaFull:
        return None
    ctypes.memmove(address_of(copy), address, nbytes)
    return copy


# ---- numpy -----------------------------------------------------------------------------------------------------------


def _locate_numpy(value: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], Desc, int, int]:
    """The array as one that has a buffer, its description, its address (0 if it must be copied), its bytes."""
    row = numpy_row(value)
    value = buffered(value, row)
    desc = (row.code, value.shape)
    size = value.nbytes
    flags = value.flags
    if not size or not flags.c_contiguous or not flags.aligned or not value.dtype.isnative:
        return value, desc, 0, size
    address = address_of(value)
    return value, desc, address if address % row.itemsize == 0 else 0, size


def _copy_numpy(value: np.ndarray[Any, Any], memory: Any) -> None:
    np.ndarray(value.shape, value.dtype.newbyteorder("="), memory)[...] = value


def outgoing_numpy(
    value: np.ndarray[Any, Any], allocate: Callable[[int], Any], limits: Limits, before_nbytes: int, index: int
) -> tuple[Desc, Any, bool]:
    """The description of an array, an array whose buffer can be sent, and whether that is a copy.

    `before_nbytes`, `index`: of the message, before this tensor. Raises TensorError, LimitError, ArenaFull.
    """
    row = numpy_row(value)
    value = buffered(value, row)
    desc = (row.code, value.shape)
    if value.base is not None:
        check_numpy(value)
    if value.flags.c_contiguous and value.dtype.isnative:
        return desc, value, False
    check_copy(index, desc, before_nbytes + value.nbytes, limits)
    memory = allocate(value.nbytes)
    _copy_numpy(value, memory)
    return desc, memory, True


# ---- torch -----------------------------------------------------------------------------------------------------------


def _locate_torch(tensor: Any) -> tuple[Desc, int, int]:
    """A tensor's description, its address (0 if it must be copied), its bytes. Raises TensorError."""
    code = torch_codes.get(tensor.dtype) or torch_code(tensor)
    try:
        desc = (code, tensor.shape)
        size: int = tensor.nbytes
        # Conjugation and negation may be flags on the same bytes. (Addresses of a device are never in our memory.)
        if tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj():
            address: int = tensor.data_ptr()
            return desc, 0 if address & 15 and address % tensor.itemsize else address, size
    except RuntimeError:  # it has no shape, or no data
        check_torch(tensor)
        desc = (code, tensor.shape)
        size = tensor.numel() * tensor.itemsize
    return desc, 0, size


def _copy_torch(tensor: Any, desc: Desc, memory: Any) -> None:
    target = torch_view()(memory, TensorDesc.of(BY_CODE[desc[0]], desc[1]))
    by_torch(lambda: target.copy_(tensor.detach()))


def _bytes_of(tensor: Any) -> Any:
    # not by reshape: a tensor of one element is contiguous with any stride
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(sys.modules["torch"].uint8).numpy()


def outgoing_torch(
    tensor: Any, allocate: Callable[[int], Any], limits: Limits, before_nbytes: int, index: int
) -> tuple[Desc, Any, bool]:
    """As `outgoing_numpy`, for a torch tensor."""
    code = torch_codes.get(tensor.dtype) or torch_code(tensor)
    if code in NUMPYS_OWN:
        try:
            if tensor.is_contiguous() and tensor.data_ptr() and fits_storage(tensor, tensor.nbytes):
                return (code, tensor.shape), tensor.numpy(), False
        except (RuntimeError, TypeError, ValueError, AssertionError):
            pass  # it requires grad, is conjugated or negated, is on a device, or cannot be sent: checked next
    desc, address, size = _locate_torch(tensor)
    check_torch(tensor)
    if address and tensor.is_cpu:
        return desc, by_torch(lambda: _bytes_of(tensor)), False
    check_copy(index, desc, before_nbytes + size, limits)
    memory = allocate(size)
    _copy_torch(tensor, desc, memory)
    return desc, memory, True
