"""The one place that knows both torch and numpy: arrays in and out of wire memory.

Rules. torch is optional and imported only when it is there and somebody asked for torch tensors (or uses them already).
Going out, nothing is copied unless the wire cannot take it as it lies: not row-major contiguous, not little-endian, or
on another device. Such copies are counted by whoever asked. Coming in, a tensor is a view of the memory it was received
into: writable, aligned to 64 bytes, valid until its last view dies.
"""

from __future__ import annotations

import importlib.util
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .errors import TensorError
from .memory import Pool
from .schema.descriptor import TensorDesc
from .schema.dtypes import BY_CODE, DType, dtype_of_numpy, lookup

__all__ = ["Arrays", "Desc", "arrays", "collect", "dtype_of"]


Desc = tuple[int, tuple[int, ...]]
"""A tensor's dtype code and shape."""


class Arrays:
    """How one kind of array ("torch" or "numpy") is made of received memory."""

    def __init__(self, kind: str, view: Callable[[Any, TensorDesc], Any]) -> None:
        self.kind = kind
        self.view = view
        """`view(memory, desc)`: a tensor over `memory`, flat uint8 of exactly `desc.nbytes` bytes. Copies nothing."""

    def empty(self, shape: int | Sequence[int], dtype: Any, pool: Pool) -> Any:
        """A tensor of undefined content in aligned memory of `pool`. `dtype`: a name, or a torch or numpy dtype."""
        try:
            dims = [operator.index(dim) for dim in ((shape,) if isinstance(shape, int) else shape)]
        except TypeError:
            raise TensorError(f"shape {shape!r}, expected ints") from None
        desc = TensorDesc.of(dtype_of(dtype), dims)
        if any(dim < 0 for dim in desc.shape):
            raise TensorError(f"shape {list(desc.shape)}, expected dimensions of 0 or more")
        return self.view(pool.allocate(desc.nbytes), desc)


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
        return Arrays(kind, _make_torch_view())
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


def collect(tensors: Iterable[Any]) -> tuple[list[Desc], list[Any], int, int]:
    """What is needed to send torch tensors, numpy arrays, or anything with numpy's array interface.

    Returns their descriptions, the buffers of those that are not empty (C-contiguous, the tensors' own memory but for
    what was copied), their bytes, and how many of those had to be copied. Raises TensorError if one has no description
    (an object array, a sparse or meta tensor, a list, ...).
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
    return descs, buffers, nbytes, copied_nbytes


# ---- numpy -----------------------------------------------------------------------------------------------------------


def _numpy_view(memory: Any, desc: TensorDesc) -> Any:
    return np.ndarray(desc.shape, desc.dtype.numpy, memory)


def _outgoing_numpy(value: Any) -> tuple[Desc, Any, bool]:
    if not isinstance(value, np.ndarray):
        if not isinstance(value, np.generic) and not hasattr(value, "__array_interface__"):
            raise TensorError(f"a tensor of type {type(value).__name__}, expected a torch tensor or a numpy array")
        value = np.asarray(value)
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


def _make_torch_view() -> Callable[[Any, TensorDesc], Any]:
    import torch

    dtypes = {code: getattr(torch, row.name, None) for code, row in BY_CODE.items()}

    def view(memory: Any, desc: TensorDesc) -> Any:
        # from_numpy over ndarray(): 0.9 us; torch.frombuffer().view(): 1.8 us.
        code = desc.dtype.code
        if code not in foreign:
            return torch.from_numpy(np.ndarray(desc.shape, desc.dtype.numpy, memory))
        dtype = dtypes[code]
        if dtype is None:
            raise TensorError(f"dtype {desc.dtype.name}, which torch {torch.__version__} does not have")
        stand_in = _SIGNED[desc.dtype.itemsize]
        return torch.from_numpy(np.ndarray(desc.shape, stand_in, memory)).view(dtype)

    foreign = {code for code, row in BY_CODE.items() if row.numpy.metadata is not None or dtypes[code] is None}
    return view


def _outgoing_torch(torch: Any, tensor: Any) -> tuple[Desc, Any, bool]:
    code = _codes.get(tensor.dtype)
    if code is None:
        code = _codes[tensor.dtype] = dtype_of(tensor.dtype).code
    if BY_CODE[code].numpy.metadata is None:
        try:
            if tensor.is_contiguous():
                return (code, tensor.shape), tensor.numpy(), False
        except (RuntimeError, TypeError):  # it requires grad, is conjugated or negated, sparse, or on a device
            pass
    desc = (code, tuple(tensor.shape))
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise TensorError(f"a {tensor.layout} tensor on {tensor.device}, expected a strided one with data")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    copied = plain.data_ptr() != tensor.data_ptr() or tensor.device.type != "cpu"
    return desc, plain.reshape(-1).view(torch.uint8).numpy(), copied
