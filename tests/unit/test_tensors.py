"""Arrays in and out of wire memory. Zero copy is a tested property: what is sent is the tensor's own memory."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsplit.errors import TensorError
from fastsplit.schema.descriptor import TensorDesc
from fastsplit.schema.dtypes import BY_CODE, BY_NAME
from fastsplit.tensors import Arrays, collect, collect_cast, dtype_of, parse_arrays, share
from fastsplit.tensors.pool import Pool

torch = pytest.importorskip("torch")

every_dtype = pytest.mark.parametrize("row", BY_CODE.values(), ids=lambda row: row.name)


def _address(tensor: Any) -> int:
    return int(tensor.data_ptr() if isinstance(tensor, torch.Tensor) else tensor.ctypes.data)


def _sent(tensor: Any) -> tuple[Any, bytes, int, bool]:
    """One tensor's description, wire bytes, copied bytes, and whether the bytes are its own memory."""
    (desc,), buffers, nbytes, copied_nbytes = collect([tensor])[:4]
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
    view = parse_arrays(kind).view
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
        descs, buffers, nbytes, copied_nbytes = collect([tensor, tensor])[:4]
        assert descs == [(row.code, shape)] * 2 and (buffers, nbytes, copied_nbytes) == ([], 0, 0)
        came = parse_arrays(kind).view(Pool().allocate(0), TensorDesc.of(row, shape))
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
    "matrix": (lambda: np.arange(6).reshape(2, 3).view(np.matrix), False),
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


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=3),
    st.integers(0, 9),
    st.integers(0, 60),
    st.sampled_from([torch.float32, torch.bfloat16, torch.complex64]),
)
@settings(max_examples=300, deadline=None)
def test_no_element_outside_of_the_storage_is_sent(dims: Any, offset: int, kept: int, dtype: Any) -> None:
    """All shapes, strides and offsets: refused exactly if an element lies outside, by each way of sending."""
    shape, strides = [dim for dim, _ in dims], [stride for _, stride in dims]
    whole = torch.arange(80).to(dtype)
    tensor = whole.as_strided(shape, strides, offset)
    elements = {
        offset + sum(index * stride for index, stride in zip(place, strides, strict=True))
        for place in itertools.product(*map(range, shape))
    }
    whole.untyped_storage().resize_(kept * whole.itemsize)
    for send in (
        lambda: collect([tensor]),
        lambda: share([tensor], Memory(), 5.0),
        lambda: collect_cast([tensor], 1, Pool().allocate),
    ):
        if elements and max(elements) >= kept:
            with pytest.raises(TensorError, match=r"a tensor of shape .* whose storage has .* bytes, expected"):
                send()
        else:
            assert send().descs == [(dtype_of(dtype).code, tuple(shape))]


def test_a_refused_tensor_is_left_as_it_was() -> None:
    """FSDP frees a storage and takes it again: nothing of ours may make it one that cannot be resized."""
    tensor = torch.ones(5)
    tensor.untyped_storage().resize_(0)
    for send in (collect, lambda tensors: share(tensors, Memory(), 5.0)):
        with pytest.raises(TensorError):
            send([tensor])
    tensor.untyped_storage().resize_(20)
    tensor.fill_(2)
    assert _sent(tensor)[1] == np.full(5, 2, np.float32).tobytes()


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_what_arrives_cannot_be_resized(kind: str) -> None:
    """So what lies in shared memory needs no look at its storage."""
    for tensor in (
        parse_arrays(kind).empty(5, "bfloat16", Pool().allocate),
        Memory().of(kind, BY_NAME["float32"], (5,)),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            tensor.untyped_storage().resize_(0) if kind == "torch" else tensor.resize((2,), refcheck=False)


def test_ml_dtypes_arrays() -> None:
    """What numpy does to received bfloat16 is bfloat16, or another dtype that says so."""
    pytest.importorskip("ml_dtypes")
    array = parse_arrays("numpy").empty((2, 3), "bfloat16", Pool().allocate)
    array[:] = 1.5
    bits = np.full((2, 3), 0x3FC0, np.uint16)
    for same in (np.concatenate([array, array])[:2], np.stack([array])[0], np.where(array > 0, array, array), +array):
        assert _sent(same)[:2] == ((BY_NAME["bfloat16"].code, (2, 3)), bits.tobytes())
    assert _sent(array.T)[:2] == ((BY_NAME["bfloat16"].code, (3, 2)), bits.tobytes())
    assert _sent(array[0, 0])[:2] == ((BY_NAME["bfloat16"].code, ()), bits[:1, :1].tobytes())
    assert _sent(array + np.uint16(1))[:2] == ((BY_NAME["float32"].code, (2, 3)), np.float32(2.5).tobytes() * 6)


def test_several_tensors_are_counted_together() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    descs, buffers, nbytes, copied_nbytes = collect([x, x.T, torch.zeros(0), torch.ones(3), x[:, :2]])[:4]
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
    made = parse_arrays(kind)
    for shape, dtype in [
        ((2, 3), "float32"),
        (5, "int8"),
        ((), np.float64),
        ([4], torch.bfloat16),
        ((0, 2), np.dtype("u2")),
    ]:
        tensor = made.empty(shape, dtype, Pool().allocate)
        assert tuple(tensor.shape) == tuple((shape,) if isinstance(shape, int) else shape)
        assert collect([tensor]).descs[0][0] == dtype_of(dtype).code
        assert _address(tensor) % 64 == 0 or not np.prod(shape)
        tensor[...] = 1
    with pytest.raises(TensorError, match=r"shape \[2, -1\], expected dimensions of 0 or more"):
        made.empty((2, -1), "float32", Pool().allocate)
    with pytest.raises(TensorError, match="dtype 'floaty', expected one of"):
        made.empty(2, "floaty", Pool().allocate)


def test_dtype_of() -> None:
    for dtype in ("bfloat16", torch.bfloat16, BY_NAME["bfloat16"], BY_NAME["bfloat16"].numpy):
        assert dtype_of(dtype) is BY_NAME["bfloat16"]
    for dtype in ("float32", torch.float32, np.float32, np.dtype("f4")):
        assert dtype_of(dtype) is BY_NAME["float32"]
    with pytest.raises(TensorError, match="expected a name, a torch dtype or a numpy dtype"):
        dtype_of(object())


def test_kinds() -> None:
    assert parse_arrays("auto").kind == "torch"
    made = parse_arrays("numpy")
    assert parse_arrays(made) is made and isinstance(made, Arrays)
    with pytest.raises(ValueError, match="arrays 'jax', expected 'auto', 'torch' or 'numpy'"):
        parse_arrays("jax")


# ---- shared memory ---------------------------------------------------------------------------------------------------


class Memory:
    """A piece of memory that is shared, as number 7, and hands itself out from the front."""

    def __init__(self) -> None:
        self.bytes = Pool().allocate(64 * 1024)
        self.bytes[:] = 0xEE
        self.used = 0

    def place(self, address: int, nbytes: int) -> tuple[int, int] | None:
        offset = address - self.bytes.ctypes.data
        return (7, offset) if offset >= 0 and offset + nbytes <= len(self.bytes) else None

    def allocate(self, nbytes: int, deadline: float | None = None) -> Any:
        assert deadline == 5.0
        garbage = [np.full((), 0x77, dtype) for dtype in ("u1", "u2", "u4", "u8", "c16") for _ in range(20)]
        assert garbage  # whatever was freed too early is overwritten now
        memory = self.bytes[self.used : self.used + nbytes]
        self.used += -(-nbytes // 64) * 64
        return memory

    def of(self, kind: str, row: Any, shape: tuple[int, ...]) -> Any:
        """A tensor that lies in it, with random bits."""
        desc = TensorDesc.of(row, shape)
        memory = self.allocate(desc.nbytes, 5.0)
        memory[:] = _bits(shape, row).reshape(-1).view(np.uint8)
        return parse_arrays(kind).view(memory, desc)


def _shared(memory: Memory, tensor: Any) -> tuple[Any, bytes, int, int]:
    """One tensor's description, the bytes that the peer will see, how many were copied, and their offset."""
    descs, buffers, nbytes, copied_nbytes, placements, shared_nbytes, kept = share([tensor], memory, 5.0)
    assert (tuple(buffers), nbytes, len(descs)) == ((), 0, 1)
    segment, offset, size = placements
    assert size == shared_nbytes and segment == (7 if size else 0)
    assert len(kept) == (1 if size else 0)
    return descs[0], bytes(memory.bytes[offset : offset + size]), copied_nbytes, offset


@every_dtype
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_what_lies_in_shared_memory_goes_by_reference(row: Any, kind: str) -> None:
    for shape in SHAPES:
        memory = Memory()
        memory.allocate(100, 5.0)
        tensor = memory.of(kind, row, shape)
        used = memory.used
        desc, data, copied_nbytes, offset = _shared(memory, tensor)
        assert desc == (row.code, shape) and data == _bits(shape, row).tobytes()
        assert (copied_nbytes, offset, memory.used) == (0, 128, used)  # nothing copied, nothing taken
        assert _address(tensor) == memory.bytes.ctypes.data + offset


@every_dtype
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_parts_of_it_too(row: Any, kind: str) -> None:
    memory = Memory()
    tensor = memory.of(kind, row, (6, 8))
    rows = tensor[2:5]
    desc, data, copied_nbytes, offset = _shared(memory, rows)
    assert desc == (row.code, (3, 8)) and data == _bits((6, 8), row)[2:5].tobytes()
    assert (copied_nbytes, offset) == (0, 16 * row.itemsize)


@every_dtype
@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_not_contiguous_there_is_copied_once(row: Any, kind: str, layout: Any) -> None:
    memory = Memory()
    tensor = layout(memory.of(kind, row, (6, 8)))
    used = memory.used
    expected = np.ascontiguousarray(layout(_bits((6, 8), row).view(f"V{row.itemsize}"))).tobytes()
    desc, data, copied_nbytes, offset = _shared(memory, tensor)
    assert desc == (row.code, tuple(tensor.shape))
    assert data == expected and copied_nbytes == len(data) and offset == used


@every_dtype
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_what_lies_elsewhere_is_copied_once(row: Any, kind: str) -> None:
    for shape in SHAPES:
        memory = Memory()
        array = _bits(shape, row)
        tensor = _of_torch(array, row) if kind == "torch" else array
        desc, data, copied_nbytes, offset = _shared(memory, tensor)
        assert desc == (row.code, shape) and data == array.tobytes()
        assert (copied_nbytes, offset) == (len(data), 0)


@every_dtype
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_empty_tensors_lie_nowhere(row: Any, kind: str) -> None:
    memory = Memory()
    for shape in [(0,), (0, 5), (4, 0, 2)]:
        array = _bits(shape, row)
        for tensor in (_of_torch(array, row) if kind == "torch" else array, memory.of(kind, row, shape)):
            descs, _, _, copied_nbytes, placements, shared_nbytes, _ = share([tensor], memory, 5.0)
            assert descs == [(row.code, shape)] and (copied_nbytes, shared_nbytes) == (0, 0)
            assert (placements[0], placements[2]) == (0, 0) or placements[0] == 7
    assert memory.used == 0


@pytest.mark.parametrize("make", [row[0] for row in NUMPY_LAYOUTS.values()], ids=NUMPY_LAYOUTS)
def test_numpy_layouts_are_copied_right(make: Any) -> None:
    array = make()
    native = np.asarray(array).astype(array.dtype.newbyteorder("="))
    desc, data, copied_nbytes, _ = _shared(Memory(), array)
    assert desc == (BY_NAME[native.dtype.name].code, array.shape)
    assert data == native.tobytes(order="C") and copied_nbytes == len(data)


@pytest.mark.parametrize("make", [row[0] for row in TORCH_LAYOUTS.values()], ids=TORCH_LAYOUTS)
def test_torch_layouts_are_copied_right(make: Any) -> None:
    tensor = make()
    plain = tensor.detach().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    desc, data, copied_nbytes, _ = _shared(Memory(), tensor)
    assert desc == (BY_NAME[str(tensor.dtype)[6:]].code, tuple(tensor.shape))
    assert data == bytes(plain.reshape(-1).view(torch.uint8).tolist()) and copied_nbytes == len(data)


@pytest.mark.parametrize(
    ("spoil", "by_reference"),
    [
        (lambda x: x.conj(), False),
        (lambda x: x.conj().imag, False),
        (lambda x: x._neg_view(), False),
        (lambda x: x.conj().conj(), True),
        (lambda x: x.real, False),
        (lambda x: x.view(torch.float32), True),
        (lambda x: x.requires_grad_(), True),
        (torch.nn.Parameter, True),
        (lambda x: x.t(), False),
        (lambda x: x[:1], True),
        (lambda x: x[0, 1], True),
        (lambda x: x.expand(2, 3, 4), False),
        (lambda x: x.view(torch.float32).view(torch.bfloat16), True),
    ],
)
def test_torch_tensors_in_shared_memory_that_mean_something_else(spoil: Any, by_reference: bool) -> None:
    memory = Memory()
    tensor = spoil(memory.of("torch", BY_NAME["complex64"], (3, 4)))
    plain = tensor.detach().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    desc, data, copied_nbytes, offset = _shared(memory, tensor)
    assert desc == (BY_NAME[str(tensor.dtype)[6:]].code, tuple(tensor.shape))
    assert data == bytes(plain.reshape(-1).view(torch.uint8).tolist())
    assert copied_nbytes == (0 if by_reference else len(data)) and (offset < 128) == by_reference


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_place_that_is_not_aligned_to_the_item_is_copied(kind: str) -> None:
    memory = Memory()
    memory.used = 128
    if kind == "numpy":
        tensor = np.ndarray(3, np.float64, memory.bytes, 4)
    else:
        tensor = torch.frombuffer(memory.bytes, dtype=torch.float64, count=3, offset=4)
    tensor[:] = 2.0
    _, data, copied_nbytes, offset = _shared(memory, tensor)
    assert data == np.full(3, 2.0).tobytes() and (copied_nbytes, offset) == (24, 128)


def test_read_only_arrays_go_by_reference_too() -> None:
    memory = Memory()
    array = memory.of("numpy", BY_NAME["int32"], (5,))
    array.flags.writeable = False
    _, data, copied_nbytes, offset = _shared(memory, array)
    assert (data, copied_nbytes, offset) == (array.tobytes(), 0, 0)


def test_numpy_scalars_are_alive_while_they_are_copied() -> None:
    for value in (np.float64(1.5), np.complex128(1 + 2j), np.int16(-3), np.uint8(200)):
        desc, data, copied_nbytes, _ = _shared(Memory(), value)
        assert desc == (BY_NAME[value.dtype.name].code, ()) and data == value.tobytes()
        assert copied_nbytes == value.nbytes


def test_a_view_that_only_begins_or_ends_in_shared_memory_is_copied() -> None:
    raw = Pool().allocate(4096)
    raw[:] = np.arange(4096).astype(np.uint8)
    memory = Memory()
    memory.bytes = raw[1024:2048]
    for cut in (slice(1000, 1100), slice(2000, 2049), slice(0, 4096)):
        outside = Memory()
        outside.place = lambda address, nbytes: (  # type: ignore[method-assign]
            Memory.place(outside, address, nbytes)  # noqa: B023
            if memory.place(address, nbytes) is None
            else pytest.fail("it is not all there")
        )
        _, data, copied_nbytes, _ = _shared(outside, raw[cut])
        assert data == raw[cut].tobytes() and copied_nbytes == len(data)


def test_several_tensors_are_shared_together() -> None:
    memory = Memory()
    x = memory.of("numpy", BY_NAME["float32"], (3, 4))
    out = share([x, x.T, torch.zeros(0), np.ones(3), x[1:]], memory, 5.0)
    assert [shape for _, shape in out.descs] == [(3, 4), (4, 3), (0,), (3,), (2, 4)]
    assert list(out.placements) == [7, 0, 48, 7, 64, 48, 0, 0, 0, 7, 128, 24, 7, 16, 32]
    assert (out.shared_nbytes, out.copied_nbytes) == (48 + 48 + 24 + 32, 48 + 24)


@pytest.mark.parametrize(
    ("stand_in", "name"),
    [("int16", "bfloat16"), ("float16", "bfloat16"), ("bool", "float8_e5m2"), ("u1", "float8_e5m2")],
)
def test_a_dtype_that_stands_for_another(stand_in: str, name: str) -> None:
    memory = Memory()
    plain = memory.of("numpy", BY_NAME[np.dtype(stand_in).name], (3, 4))
    named = plain.view(np.dtype(stand_in, metadata={"fastsplit.dtype": name}))
    desc, data, copied_nbytes, _ = _shared(memory, named)
    assert desc == (BY_NAME[name].code, (3, 4)) and data == plain.tobytes() and copied_nbytes == 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_mode_of_torch_that_comes_in_between(fails: bool) -> None:
    """It changes the tensor, or refuses a question: what goes out is of one moment, or an error of ours."""
    memory = Memory()
    tensor = memory.of("torch", BY_NAME["float32"], (1, 1, 1, 1, 1, 6, 7))

    class Mode(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.__name__ == "is_neg":
                if fails:
                    raise RuntimeError("not asked")
                with torch._C.DisableTorchFunction():
                    tensor.squeeze_()
            return func(*args, **(kwargs or {}))

    with Mode():
        out = share([tensor], memory, 5.0)
    assert out.descs[0][1] in ((1, 1, 1, 1, 1, 6, 7), (6, 7)) and out.shared_nbytes == 4 * 6 * 7


@pytest.mark.parametrize(
    "value",
    [
        [1.0],
        None,
        np.array([None]),
        np.zeros(2, "datetime64[s]"),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(2, dtype=torch.float8_e4m3fnuz),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_description_cannot_be_shared(value: Any) -> None:
    memory = Memory()
    with pytest.raises(TensorError) as caught:
        share([value], memory, 5.0)
    with pytest.raises(TensorError) as expected:
        collect([value])
    assert str(caught.value) == str(expected.value) and memory.used == 0


def test_descriptions_of_new_tensors_are_kept_by_exact_ints() -> None:
    """A number that is equal to an int is as wrong the second time as the first."""
    numpy_arrays = parse_arrays("numpy")
    for _ in range(2):
        assert numpy_arrays.empty((2, 3), "float32", _memory).shape == (2, 3)
        assert numpy_arrays.empty(True, "uint8", _memory).shape == (1,)
        for shape in ((2.0, 3), 2.0, (2, "3")):
            with pytest.raises(TensorError, match="expected ints"):
                numpy_arrays.empty(shape, "float32", _memory)  # type: ignore[arg-type]
        with pytest.raises(TensorError, match="dtype"):
            numpy_arrays.empty((2, 3), [], _memory)


def _memory(nbytes: int) -> Any:
    return np.empty(nbytes, np.uint8)
