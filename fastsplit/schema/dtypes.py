"""THE dtype table: wire code, name, numpy dtype, item size.

Rules: a name here is torch's name of the dtype, so that `getattr(torch, name)` is the torch column (tensors.py does
that; this module does not know torch). numpy has no bfloat16 and no float8: such tensors are unsigned integers of the
same width there, and the dtype's metadata carries the name, so that a received array can be sent on unchanged. Arrays
of the ml_dtypes package are recognised by their dtype's name.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import TensorError

__all__ = ["BY_CODE", "BY_NAME", "DType", "dtype_of_numpy", "lookup"]

_NAME_KEY = "fastsplit.dtype"


class DType(NamedTuple):
    """One row of the table. `numpy` is what a numpy receiver gets."""

    code: int
    name: str
    numpy: np.dtype
    itemsize: int


def _row(code: int, name: str, stand_in: str | None = None) -> DType:
    if stand_in is None:
        numpy_dtype = np.dtype(name)
    else:
        numpy_dtype = np.dtype(stand_in, metadata={_NAME_KEY: name})
    return DType(code, name, numpy_dtype, numpy_dtype.itemsize)


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


def lookup(name: str) -> DType:
    """The row of a dtype's name, such as "bfloat16". Raises TensorError if there is none."""
    try:
        return BY_NAME[name]
    except KeyError:
        raise TensorError(f"dtype {name!r}, expected one of {', '.join(BY_NAME)}") from None


def dtype_of_numpy(dtype: np.dtype) -> DType:
    """The row for an array's dtype. Raises TensorError for one that has no wire code (object, strings, dates, ...)."""
    if dtype.metadata is not None and _NAME_KEY in dtype.metadata:
        return lookup(dtype.metadata[_NAME_KEY])
    row = _BY_NUMPY.get(dtype)
    if row is None and dtype.isnative:
        row = BY_NAME.get(dtype.name)  # ml_dtypes
    if row is None:
        raise TensorError(f"numpy dtype {dtype!r}, expected one of {', '.join(BY_NAME)}")
    return row
