"""The dtype table: the protocol's code, name, numpy dtype, item size.

Rules. A name is torch's name of the dtype, so that `getattr(torch, name)` is the torch column (tensors/arrays.py adds
it; this module does not import torch). numpy has no bfloat16 and no float8. Where the ml_dtypes package is installed,
its dtypes stand for them; their arrays have no buffer of their own, and are read through a view as `buffer_dtype`.
Without ml_dtypes such tensors are unsigned integers of the same width, whose dtype has the name in its metadata: a
received array can be sent on unchanged, and operations of numpy may drop the metadata.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import numpy as np

from ..errors import TensorError

__all__ = ["BY_CODE", "BY_NAME", "DType", "dtype_of_numpy", "lookup"]

_NAME_KEY = "fastsplit.dtype"


class DType(NamedTuple):
    """One row of the table. `numpy`: the dtype of a received numpy array. `buffer_dtype`: numpy's own dtype of the same
    width, the same object as `numpy` where numpy has the dtype itself."""

    code: int
    name: str
    numpy: np.dtype
    itemsize: int
    buffer_dtype: np.dtype


def _ml_dtypes() -> ModuleType | None:
    try:
        return importlib.import_module("ml_dtypes")  # 3 ms
    except ImportError:
        return None


_FOREIGN = _ml_dtypes()


def _row(code: int, name: str, stand_in: str | None = None) -> DType:
    buffer_dtype = numpy_dtype = np.dtype(stand_in or name)
    if stand_in is not None:
        foreign = getattr(_FOREIGN, name, None)
        numpy_dtype = np.dtype(stand_in, metadata={_NAME_KEY: name}) if foreign is None else np.dtype(foreign)
    return DType(code, name, numpy_dtype, numpy_dtype.itemsize, buffer_dtype)


BY_CODE: dict[int, DType] = {
    row.code: row
    for row in (
        _row(1, "bool"),
        _row(2, "uint8"),
        _row(3, "int8"),
        _row(4, "uint16"),
        _row(5, "int16"),
        _row(6, "uint32"),
        _row(7, "int32"),
        _row(8, "uint64"),
        _row(9, "int64"),
        _row(10, "float16"),
        _row(11, "bfloat16", "uint16"),
        _row(12, "float32"),
        _row(13, "float64"),
        _row(14, "float8_e4m3fn", "uint8"),
        _row(15, "float8_e5m2", "uint8"),
        _row(16, "complex64"),
        _row(17, "complex128"),
    )
}
BY_NAME: dict[str, DType] = {row.name: row for row in BY_CODE.values()}

_BY_NUMPY: dict[np.dtype, DType] = {row.numpy: row for row in BY_CODE.values() if row.numpy.metadata is None}
_NAMES = ", ".join(BY_NAME)


def lookup(name: str) -> DType:
    """The row of a dtype's name, such as "bfloat16". Raises TensorError if there is none."""
    try:
        return BY_NAME[name]
    except KeyError:
        raise TensorError(f"dtype {name!r}, expected one of {_NAMES}") from None


def dtype_of_numpy(dtype: np.dtype) -> DType:
    """The row of a numpy dtype. Raises TensorError for one without a code (object, strings, dates, ...)."""
    if dtype.metadata is not None and _NAME_KEY in dtype.metadata:
        return lookup(dtype.metadata[_NAME_KEY])
    row = _BY_NUMPY.get(dtype)
    if row is None and dtype.isnative:
        row = BY_NAME.get(dtype.name)  # ml_dtypes, imported after this module
    if row is None:
        order = "" if dtype.isnative else ", in this machine's byte order"
        raise TensorError(f"numpy dtype {dtype!r}, expected one of {_NAMES}{order}")
    return row
