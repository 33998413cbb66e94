"""Arrays in and out of wire memory. Zero copy is a tested property: what is sent is the tensor's own memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastsplit.errors import TensorError
from fastsplit.memory import Pool
from fastsplit.schema.descriptor import TensorDesc
from fastsplit.schema.dtypes import BY_CODE, BY_NAME
from fastsplit.tensors import Arrays, arrays, collect, dtype_of

torch = pytest.importorskip("torch")

every_dtype = pytest.mark.parametrize("row", BY_CODE.values(), ids=lambda row: row.name)


def _address(tensor: Any) -> int:
    return int(tensor.data_ptr() if isinstance(tensor, torch.Tensor) else tensor.ctypes.data)


def _sent(tensor: Any) -> tuple[Any, bytes, int, bool]:
    """One tensor's description, wire bytes, copied bytes, and whether the bytes are its own memory."""
    (desc,), buffers, nbytes, copied_nbytes = collect([tensor])
    data = b"".join(memoryview(buffer).cast("B") for buffer in buffers)
    assert len(data) == nbytes
    own = copied_nbytes == 0 if isinstance(tensor, np.generic) else _address(np.asarray(buffers[0])) == _address(tensor)
    return desc, data, copied_nbytes, own


def _bits(shape: tuple[int, ...], row: Any) -> np.ndarray:
    """Random bits of a dtype's width; every value a bool may have."""
    nbytes = int(np.prod(shape)) * row.itemsize
    raw = np.random.default_rng(7).integers(0, 2 if row.name == "bool" else 256, nbytes, np.uint8)
    return raw.view(row.numpy).reshape(shape)


def _of_torch(array: np.ndarray, row: Any) -> Any:
    if not array.size:
        return torch.empty(array.shape, dtype=getattr(torch, row.name))
    flat = torch.from_numpy(array.reshape(-1).view(np.uint8).copy())
    return flat.view(getattr(torch, row.name)).reshape(array.shape)


SHAPES = [(), (1,), (5,), (3, 4), (2, 3, 4), (1, 7, 1)]


@every_dtype
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_contiguous_tensors_travel_as_they_lie(row: Any, kind: str) -> None:
    view = arrays(kind).view
    for shape in SHAPES:
        array = _bits(shape, row)
        tensor = _of_torch(array, row) if kind == "torch" else array
        desc, data, copied_nbytes, own = _sent(tensor)
        assert desc == (row.code, shape)
        assert data == array.tobytes() and copied_nbytes == 0 and own
        memory = Pool().allocate(len(data))
        memory[:] = np.frombuffer(data, np.uint8)
        came = view(memory, TensorDesc.of(row, shape))
        assert type(came) is type(tensor) and tuple(came.shape) == shape and came.dtype == tensor.dtype
        assert _address(came) == memory.ctypes.data  # a view, not a copy
        assert _sent(came) == (desc, data, 0, True)  # and it can be sent on as it is


@every_dtype
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_empty_tensors(row: Any, kind: str) -> None:
    for shape in [(0,), (0, 5), (4, 0, 2)]:
        array = _bits(shape, row)
        tensor = _of_torch(array, row) if kind == "torch" else array
        descs, buffers, nbytes, copied_nbytes = collect([tensor, tensor])
        assert descs == [(row.code, shape)] * 2 and (buffers, nbytes, copied_nbytes) == ([], 0, 0)
        came = arrays(kind).view(Pool().allocate(0), TensorDesc.of(row, shape))
        assert tuple(came.shape) == shape and came.dtype == tensor.dtype


LAYOUTS = {
    "strided": lambda x: x[:, ::2],
    "offset columns": lambda x: x[:, 1:],
    "transposed": lambda x: x.T,
    "one column": lambda x: x[:, 3],
}


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_what_is_not_contiguous_is_copied_once(row: Any, layout: Any, kind: str) -> None:
    array = _bits((6, 8), row)
    whole = _of_torch(array, row) if kind == "torch" else array
    tensor = layout(whole)
    expected = np.ascontiguousarray(layout(array.view(f"V{row.itemsize}")))
    desc, data, copied_nbytes, own = _sent(tensor)
    assert desc == (row.code, tuple(tensor.shape))
    assert data == expected.tobytes() and copied_nbytes == len(data) and not own


NUMPY_LAYOUTS = {
    "fortran": (lambda: np.asfortranarray(np.arange(12.0).reshape(3, 4)), True),
    "reversed": (lambda: np.arange(12.0)[::-1], True),
    "broadcast": (lambda: np.broadcast_to(np.arange(4.0), (3, 4)), True),
    "broadcast scalar": (lambda: np.broadcast_to(2.0, (5,)), True),
    "big-endian": (lambda: np.arange(12, dtype=">f8").reshape(3, 4), True),
    "big-endian and strided": (lambda: np.arange(12, dtype=">i4")[::3], True),
    "row slice": (lambda: np.arange(12.0).reshape(3, 4)[1:], False),
    "fortran with one row": (lambda: np.asfortranarray(np.arange(4.0).reshape(1, 4)), False),
    "read-only": (lambda: np.frombuffer(bytes(range(16)), np.int32), False),
    "scalar": (lambda: np.float32(3), False),
    "subclass": (lambda: np.arange(6).view(np.recarray), False),
}


@pytest.mark.parametrize(("make", "copied"), NUMPY_LAYOUTS.values(), ids=NUMPY_LAYOUTS)
def test_numpy_layouts(make: Any, copied: bool) -> None:
    array = make()
    desc, data, copied_nbytes, _ = _sent(array)
    native = np.asarray(array).astype(array.dtype.newbyteorder("="))
    assert desc == (BY_NAME[native.dtype.name].code, array.shape)
    assert data == native.tobytes(order="C") and copied_nbytes == (len(data) if copied else 0)


TORCH_LAYOUTS = {
    "expanded": (lambda: torch.arange(4.0).expand(3, 4), True),
    "channels last": (lambda: torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last), True),
    "conjugate": (lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(), True),
    "negative": (lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag, True),
    "real part": (lambda: torch.tensor([1 + 2j, 3 - 4j]).real, True),
    "requires grad": (lambda: torch.arange(6.0).requires_grad_(), False),
    "parameter": (lambda: torch.nn.Parameter(torch.arange(6.0)), False),
    "in a graph": (lambda: torch.arange(6.0).requires_grad_() * 2, False),
    "one of size one": (lambda: torch.arange(12.0).reshape(3, 4)[:1].T.T, False),
    "requires grad and bfloat16": (lambda: torch.ones(3, dtype=torch.bfloat16).requires_grad_(), False),
}


@pytest.mark.parametrize(("make", "copied"), TORCH_LAYOUTS.values(), ids=TORCH_LAYOUTS)
def test_torch_layouts(make: Any, copied: bool) -> None:
    tensor = make()
    desc, data, copied_nbytes, own = _sent(tensor)
    plain = tensor.detach().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    assert desc == (BY_NAME[str(tensor.dtype)[6:]].code, tuple(tensor.shape))
    assert data == bytes(plain.reshape(-1).view(torch.uint8).tolist())
    assert copied_nbytes == (len(data) if copied else 0) and own != copied


def test_several_tensors_are_counted_together() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    descs, buffers, nbytes, copied_nbytes = collect([x, x.T, torch.zeros(0), torch.ones(3), x[:, :2]])
    assert [shape for _, shape in descs] == [(3, 4), (4, 3), (0,), (3,), (3, 2)]
    assert (len(buffers), nbytes, copied_nbytes) == (4, 48 + 48 + 12 + 24, 48 + 24)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1.0, 2.0], "a tensor of type list, expected a torch tensor or a numpy array"),
        (3.0, "a tensor of type float"),
        (None, "a tensor of type NoneType"),
        ("text", "a tensor of type str"),
        (np.array([None]), "numpy dtype dtype.'O'., expected one of bool"),
        (np.array(["a"]), "numpy dtype"),
        (np.zeros(2, "datetime64[s]"), "numpy dtype"),
        (torch.zeros(2, 2).to_sparse(), "a torch.sparse_coo tensor on cpu, expected a strided one with data"),
        (torch.zeros(2, device="meta"), "a torch.strided tensor on meta, expected a strided one with data"),
        (torch.zeros(2, dtype=torch.float8_e4m3fnuz), "dtype 'float8_e4m3fnuz', expected one of bool"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_description(value: Any, text: str) -> None:
    with pytest.raises(TensorError, match=text):
        collect([value])


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_empty(kind: str) -> None:
    made = arrays(kind)
    for shape, dtype in [
        ((2, 3), "float32"),
        (5, "int8"),
        ((), np.float64),
        ([4], torch.bfloat16),
        ((0, 2), np.dtype("u2")),
    ]:
        tensor = made.empty(shape, dtype, Pool())
        assert tuple(tensor.shape) == tuple((shape,) if isinstance(shape, int) else shape)
        assert collect([tensor])[0][0][0] == dtype_of(dtype).code
        assert _address(tensor) % 64 == 0 or not np.prod(shape)
        tensor[...] = 1
    with pytest.raises(TensorError, match=r"shape \[2, -1\], expected dimensions of 0 or more"):
        made.empty((2, -1), "float32", Pool())
    with pytest.raises(TensorError, match="dtype 'floaty', expected one of"):
        made.empty(2, "floaty", Pool())


def test_dtype_of() -> None:
    for dtype in ("bfloat16", torch.bfloat16, BY_NAME["bfloat16"], BY_NAME["bfloat16"].numpy):
        assert dtype_of(dtype) is BY_NAME["bfloat16"]
    for dtype in ("float32", torch.float32, np.float32, np.dtype("f4")):
        assert dtype_of(dtype) is BY_NAME["float32"]
    with pytest.raises(TensorError, match="expected a name, a torch dtype or a numpy dtype"):
        dtype_of(object())


def test_kinds() -> None:
    assert arrays("auto").kind == "torch"
    made = arrays("numpy")
    assert arrays(made) is made and isinstance(made, Arrays)
    with pytest.raises(ValueError, match="arrays 'jax', expected 'auto', 'torch' or 'numpy'"):
        arrays("jax")
