"""The dtype table: the schema's codes, numpy's types, torch's names."""

from __future__ import annotations

import numpy as np
import pytest

from fastsplit.errors import TensorError
from fastsplit.schema import message_generated as gen
from fastsplit.schema.dtypes import BY_CODE, BY_NAME, dtype_of_numpy, lookup


def test_codes_are_the_schemas() -> None:
    codes = {name.lower(): code for name, code in vars(gen.DType).items() if name[0].isupper() and code}
    assert {row.name.replace("_", ""): row.code for row in BY_CODE.values()} == codes
    assert list(BY_NAME) == [row.name for row in BY_CODE.values()]


@pytest.mark.parametrize("row", BY_CODE.values(), ids=lambda row: row.name)
def test_row(row) -> None:
    torch = pytest.importorskip("torch")
    assert row.itemsize == row.numpy.itemsize == getattr(torch, row.name).itemsize
    assert lookup(row.name) is row
    assert dtype_of_numpy(row.numpy) is row  # also where numpy only has a stand-in


def test_a_dtype_has_a_buffer_of_its_width() -> None:
    for row in BY_CODE.values():
        memory = memoryview(np.zeros(3, row.buffer_dtype))
        assert memory.itemsize == row.itemsize
        assert (row.numpy is row.buffer_dtype) == (row.name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"))


def test_ml_dtypes_stand_for_what_numpy_does_not_have() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        assert lookup(name).numpy == getattr(ml_dtypes, name)
        assert dtype_of_numpy(np.dtype(getattr(ml_dtypes, name))) is lookup(name)
        tagged = np.dtype(lookup(name).buffer_dtype, metadata={"fastsplit.dtype": name})  # as without ml_dtypes
        assert dtype_of_numpy(tagged) is lookup(name)
    with pytest.raises(TensorError, match="expected one of bool"):
        dtype_of_numpy(np.dtype(ml_dtypes.float8_e4m3))


def test_stand_ins_are_told_from_what_they_stand_for() -> None:
    assert dtype_of_numpy(np.dtype("uint16")).name == "uint16"
    assert dtype_of_numpy(lookup("bfloat16").numpy).name == "bfloat16"
    assert dtype_of_numpy(np.empty(3, lookup("float8_e5m2").numpy)[::2].dtype).name == "float8_e5m2"


def test_aliases() -> None:
    for name in ("longlong", "ulonglong", "intp", "intc", "single", "double", "?"):
        row = dtype_of_numpy(np.dtype(name))
        assert (row.numpy.kind, row.itemsize) == (np.dtype(name).kind, np.dtype(name).itemsize)


def test_foreign_dtypes_of_the_same_name() -> None:
    class Like:  # what the ml_dtypes package's types look like from here: strangers with a name that we know
        metadata, isnative = None, True

        def __init__(self, name: str) -> None:
            self.name = name

    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        assert dtype_of_numpy(Like(name)).name == name
    with pytest.raises(TensorError, match="expected one of bool"):
        dtype_of_numpy(Like("float8_e3m4"))


@pytest.mark.parametrize("dtype", ["object", "U3", "S3", "datetime64[s]", "longdouble", ">f4", "f4,i4", "V8"])
def test_what_has_no_code(dtype: str) -> None:
    with pytest.raises(TensorError, match=r"numpy dtype dtype\(.*\), expected one of bool, uint8"):
        dtype_of_numpy(np.dtype(dtype))


def test_unknown_name() -> None:
    with pytest.raises(TensorError, match="dtype 'float31', expected one of bool, uint8, int8"):
        lookup("float31")
