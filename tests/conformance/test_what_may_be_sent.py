"""What may be sent, and what may not: the same on every link, by both fronts, as a request and as a reply, with a cast.

What is refused costs only its call. Nothing of it travels: a mask would be lost, and what lies behind a storage that is
too small is other memory of the sender.
"""

from __future__ import annotations

import array
import collections
import enum
import math
import numbers
import types
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
from aio_front import Front
from raw_peer import GOODBYE, REPLY, REQUEST, RawPeer, frame, serving

import fastsplit
from fastsplit import TensorError
from fastsplit.errors import ArenaFull
from fastsplit.wire import connection

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.masked import masked_tensor
    from torch.testing._internal.two_tensor import TwoTensor

N = 100_000  # float32, so that a cast would be made


class _Quantity(np.ndarray):
    """An array with a unit: it says all that numpy's protocols ask for, and the unit is not part of that."""


class _Tagged(torch.Tensor):
    """A plain subclass, as far as torch can see."""


class _Float(np.float64):
    pass


class _Interface:
    """No subclass of anything, but with numpy's array interface."""

    def __init__(self, array: np.ndarray, **more: Any) -> None:
        self._array = array
        self.__array_interface__ = {**array.__array_interface__, **more}


class _Broken:
    @property
    def __array_interface__(self) -> Any:
        raise RuntimeError("closed")


def _quietly(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def _fake(shape: tuple[int, ...]) -> Any:
    with FakeTensorMode():
        return torch.ones(shape)


def _resized(tensor: Any, nbytes: int, view: Callable[[Any], Any] = lambda x: x) -> Any:
    tensor = view(tensor)
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def _after(array: Any, view: Callable[[Any], Any], spoil: Callable[[Any], Any]) -> Any:
    part = view(array)
    spoil(array)
    return part


REFUSED: dict[str, Callable[[], Any]] = {
    # what the values mean would be lost
    "numpy.ma": lambda: np.ma.masked_less(np.arange(N, dtype=np.float32), 5),
    "numpy.ma without a mask": lambda: np.ma.array(np.ones(3)),
    "numpy.ma, empty": lambda: np.ma.array(np.ones(0)),
    "numpy.ma.masked": lambda: np.ma.masked,
    "recarray": lambda: np.ones(3).view(np.recarray),
    "subclass of ndarray": lambda: np.ones(N, np.float32).view(_Quantity),
    "subclass of ndarray, empty": lambda: np.ones((0, 3)).view(_Quantity),
    "subclass of a scalar": lambda: _Float(3.0),
    "masked interface": lambda: _Interface(np.ones(3), mask=np.ones(3, bool)),
    "interface that fails": _Broken,
    "masked tensor": lambda: _quietly(lambda: masked_tensor(torch.ones(N), torch.arange(N) > 5)),
    "subclass of Tensor": lambda: torch.ones(N).as_subclass(_Tagged),
    "subclass of Tensor, empty": lambda: torch.ones(0).as_subclass(_Tagged),
    "wrapper": lambda: TwoTensor(torch.ones(N), torch.zeros(N)),
    "parameter of a wrapper": lambda: torch.nn.Parameter(TwoTensor(torch.ones(3), torch.zeros(3))),
    # not the values themselves
    "nested": lambda: _quietly(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "nested, jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "parameter of a nested one": lambda: _quietly(
        lambda: torch.nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    ),
    "lazy parameter": lambda: torch.nn.LazyLinear(3).weight,
    "lazy buffer": torch.nn.parameter.UninitializedBuffer,
    "fake": lambda: _fake((N,)),
    "fake, empty": lambda: _fake((0,)),
    "meta": lambda: torch.ones(N, device="meta"),
    "meta, empty": lambda: torch.ones(0, 3, device="meta"),
    "sparse": lambda: torch.eye(300).to_sparse(),
    "sparse, empty": lambda: torch.zeros(0, 3).to_sparse(),
    "csr": lambda: _quietly(lambda: torch.eye(300).to_sparse_csr()),
    "csc": lambda: _quietly(lambda: torch.eye(300).to_sparse_csc()),
    "bsr": lambda: _quietly(lambda: torch.eye(300).to_sparse_bsr((2, 2))),
    "mkldnn": lambda: torch.ones(300, 300).to_mkldnn(),
    "quantized": lambda: _quietly(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
    "functional": lambda: torch._to_functional_tensor(torch.ones(N)),
    "functional, empty": lambda: torch._to_functional_tensor(torch.ones(0)),
    "no values": lambda: torch._efficientzerotensor((3,)),
    # memory that is no longer there
    "storage freed": lambda: _resized(torch.zeros(N), 0),
    "storage shrunk by an element": lambda: _resized(torch.zeros(N), 4 * N - 4),
    "storage below an offset": lambda: _resized(torch.zeros(N), 4 * N - 4, lambda x: x[N - 2 :]),
    "strided": lambda: _resized(torch.zeros(N), 2 * N, lambda x: x[::2]),
    "transposed": lambda: _resized(torch.zeros(300, 300), 4 * 300 * 299, torch.t),
    "expanded, freed": lambda: _resized(torch.zeros(1), 0, lambda x: x.expand(5)),
    "bfloat16": lambda: _resized(torch.zeros(N, dtype=torch.bfloat16), 2 * N - 2),
    "bfloat16, strided": lambda: _resized(torch.zeros(N, dtype=torch.bfloat16), 2 * N - 4, lambda x: x[::2]),
    "conjugate": lambda: _resized(torch.zeros(10, dtype=torch.complex64), 72, torch.conj),
    "negative": lambda: _resized(torch.zeros(10, dtype=torch.complex64).conj(), 72, lambda x: x.imag),
    "parameter, freed": lambda: _resized(torch.nn.Parameter(torch.zeros(N)), 0),
    "leaf": lambda: _resized(torch.zeros(N, requires_grad=True), 0),
    "array resized": lambda: _after(np.zeros(N, np.float32), lambda x: x[5:], lambda x: x.resize((2,), refcheck=False)),
    "array resized, strided": lambda: _after(
        np.zeros(N, np.float32), lambda x: x[::-2], lambda x: x.resize((2,), refcheck=False)
    ),
    "beyond an array": lambda: np.lib.stride_tricks.as_strided(np.zeros(5), (N,)),
    "before an array": lambda: np.lib.stride_tricks.as_strided(np.zeros(5), (5,), (-8,)),
    "buffer emptied": lambda: _after(bytearray(800), lambda x: np.ndarray(100, np.float64, x), lambda x: x.clear()),
}


def _mapped() -> Any:
    import mmap

    memory = mmap.mmap(-1, 4096)
    array = np.ndarray(1024, np.float32, memory)
    memory.close()
    return array


REFUSED["map closed"] = _mapped

_VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)

PLAIN: dict[str, tuple[Callable[[], Any], np.ndarray]] = {
    "matrix": (lambda: _quietly(lambda: np.matrix(_VALUES)), _VALUES),
    "large matrix": (lambda: np.ones((2, N), np.float32).view(np.matrix), np.ones((2, N), np.float32)),
    "matrix, transposed": (lambda: np.ones((2, N), np.float32).view(np.matrix).T, np.ones((N, 2), np.float32)),
    "parameter": (lambda: torch.nn.Parameter(torch.from_numpy(_VALUES)), _VALUES),
    "large parameter": (lambda: torch.nn.Parameter(torch.ones(N)), np.ones(N, np.float32)),
    "buffer": (lambda: torch.nn.Buffer(torch.from_numpy(_VALUES)), _VALUES),
    "empty tensor": (lambda: torch.ones(3, 0), np.ones((3, 0), np.float32)),
    "empty tensor, freed": (lambda: _resized(torch.ones(5), 0, lambda x: x[:0]), np.ones(0, np.float32)),
    "expanded": (lambda: torch.ones(1).expand(N), np.ones(N, np.float32)),
    "part of a larger storage": (lambda: torch.from_numpy(_VALUES)[1:], _VALUES[1:]),
    "scalar": (lambda: np.float32(3), np.array(3, np.float32)),
    "interface": (lambda: _Interface(_VALUES), _VALUES),
    "windows": (
        lambda: np.lib.stride_tricks.sliding_window_view(_VALUES, (2, 2)),
        np.lib.stride_tricks.sliding_window_view(_VALUES, (2, 2)).copy(),
    ),
    "reversed": (lambda: _VALUES[::-1, ::-1], _VALUES[::-1, ::-1].copy()),
    "over bytes": (lambda: np.frombuffer(_VALUES.tobytes(), np.float32), _VALUES.reshape(-1)),
    "of a tensor": (lambda: torch.from_numpy(_VALUES).clone().numpy(), _VALUES),
}


def _make(call: fastsplit.Call) -> Any:
    what = call.attrs["what"]
    return REFUSED[what]() if what in REFUSED else PLAIN[what][0]()


HANDLERS = {"echo": lambda call: list(call.tensors), "make": _make}


@pytest.fixture
def channels(uri: str, front: Front) -> Iterator[list[Any]]:
    """The link as it is, with a cast of float32, and with compression."""
    with front.Server(uri, HANDLERS) as server:
        plain = front.connect(server.uri)
        with plain, front.connect(server.uri, wire_dtype="bfloat16") as cast:
            with front.connect(server.uri, codec="zlib", codec_threshold_nbytes=1) as coded:
                yield [plain, cast, coded]


def test_what_is_refused(channels: list[Any]) -> None:
    for name, make in REFUSED.items():
        for channel in channels:
            value = make()
            with pytest.raises(TensorError) as caught:
                channel.call("echo", value, timeout_s=10)
            assert ", expected " in str(caught.value), name
            with pytest.raises(fastsplit.RemoteOpError, match=r"^make: TensorError: .*, expected "):
                channel.call("make", what=name, timeout_s=10)
    for channel in channels:
        assert channel.stats.bytes_copied == channel.stats.bytes_shared == 0
        assert float(channel.call("echo", torch.ones(1))[0]) == 1


def test_what_is_plain(channels: list[Any]) -> None:
    for name, (make, values) in PLAIN.items():
        for channel in channels:
            (there_and_back,) = channel.call("echo", make(), timeout_s=10)
            (back,) = channel.call("make", what=name, timeout_s=10)
            for came in (there_and_back, back):
                assert came.dtype == torch.float32 and np.array_equal(np.asarray(came), values), name


def test_memmaps(channels: list[Any], tmp_path: Any) -> None:
    for size in (1, 5, N):
        array = np.memmap(tmp_path / "array", np.float32, "w+", shape=(size, 2))
        array[:] = 2
        for channel in channels:
            for part in (array, array[:0], array[:, 0], array.T):
                (came,) = channel.call("echo", part, timeout_s=10)
                assert tuple(came.shape) == part.shape and bool((came == 2).all())
        del part
        array._mmap.close()  # under the array
        with pytest.raises(TensorError, match="outside of the memory that it is a view of"):
            channels[0].call("echo", array)


def test_within_a_transform_of_torch(channels: list[Any]) -> None:
    for channel in channels:

        def send(x: Any) -> Any:
            with pytest.raises(TensorError, match="without data of its own"):
                channel.call("echo", x)  # noqa: B023
            return x.sum()

        torch.vmap(send)(torch.ones(2, 3))
        torch.vmap(send)(torch.ones(2, 0))
        torch.func.grad(send)(torch.ones(3))
    with FakeTensorMode(), pytest.raises(TensorError):
        channels[0].call("echo", torch.ones(3))


# ---- limits ----------------------------------------------------------------------------------------------------------

TOO_MUCH: dict[str, Callable[[], Any]] = {
    "empty, with large dimensions": lambda: torch.ones(2, 1, 1, 1).expand(2, 8, 16384, 16384)[:0],
    "empty array, with large dimensions": lambda: np.empty((2**40, 0)),
    "more dimensions": lambda: torch.ones((1,) * 9),
    "more than arrays have": lambda: torch.ones((1,) * 70),
    "more bytes": lambda: torch.zeros(1).expand(2**40),
    "more bytes of numpy's": lambda: np.broadcast_to(np.float32(1), 2**40),
    "more bytes, bfloat16": lambda: torch.zeros(1, dtype=torch.bfloat16).expand(2**20, 2**20),
}


def test_more_than_the_peer_accepts(uri: str, front: Front) -> None:
    handlers = {**HANDLERS, "make": lambda call: TOO_MUCH[call.attrs["what"]]()}
    with front.Server(uri, handlers) as server:
        plain = front.connect(server.uri)
        with plain, front.connect(server.uri, wire_dtype="float16") as cast:
            for name, make in TOO_MUCH.items():
                for channel in (plain, cast):
                    with pytest.raises(fastsplit.LimitError, match=r"^'echo', .*, the peer accepts at most "):
                        channel.call("echo", make(), timeout_s=10)
                    with pytest.raises(fastsplit.RemoteOpError, match=r"LimitError: .*, the peer accepts at most "):
                        channel.call("make", what=name, timeout_s=10)
            assert [len(channel.call("echo", torch.ones(2))[0]) for channel in (plain, cast)] == [2, 2]


def test_dimensions_beyond_what_arrays_have(uri: str, front: Front) -> None:
    limits = fastsplit.Limits(max_dims=1000)
    with front.Server(uri, HANDLERS, limits=limits) as server, front.connect(server.uri, limits=limits) as channel:
        with pytest.raises(fastsplit.LimitError, match=r"tensor.* dimensions: 70, the peer accepts at most (64|32)$"):
            channel.call("echo", torch.ones((1,) * 70))
        assert channel.call("echo", torch.ones((1,) * 32))[0].dim() == 32


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (2**62, "float32"),
        (2**63, "uint8"),
        (2**100, "uint8"),
        ((2**40, 2**40), "uint8"),
        ((0, 2**62), "float32"),
        (np.int64(2**62), "float32"),
        ((1,) * 70, "float32"),
        (-1, "float32"),
        ((2, -1), "float32"),
        (2.0, "float32"),
        ("12", "float32"),
        (None, "float32"),
        ([1, None], "float32"),
        (np.ones(2), "float32"),
        (2, "f4"),
        (2, None),
        (2, 5),
        (2, np.dtype(">f4")),
        (2, np.longdouble),
        (2, "longdouble"),
        (2, {"names": 3}),
        (2, torch.qint8),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_empty_of_what_there_is_not(socket_uri: str, kind: str, front: Front, shape: Any, dtype: Any) -> None:
    handlers = {"make": lambda call: call.empty(shape, dtype)}
    with front.Server(socket_uri, handlers, arrays=kind) as server, front.connect(server.uri, arrays=kind) as channel:
        with pytest.raises(TensorError, match=", expected "):
            channel.empty(shape, dtype)
        with pytest.raises(fastsplit.RemoteOpError, match=r"TensorError: .*, expected "):
            channel.call("make")


def test_empty_without_memory(socket_uri: str, front: Front) -> None:
    """Arena or pool, numpy or torch: no room is ArenaFull, which is a MemoryError."""
    handlers = {"make": lambda call: call.empty(2**60, "uint8")}
    with front.Server(socket_uri, handlers) as server, front.connect(server.uri) as channel:
        for nbytes in (2**60, 2**63 - 1):
            with pytest.raises(ArenaFull):
                channel.empty(nbytes, "uint8")
        with pytest.raises(fastsplit.RemoteOpError, match="ArenaFull: "):
            channel.call("make")


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_shapes_of_numpys(socket_uri: str, kind: str, front: Front) -> None:
    shapes = {
        5: (5,),
        np.int64(5): (5,),
        np.prod((2, 3)): (6,),
        np.uint8(7): (7,),
        (np.int64(2), 3): (2, 3),
        torch.Size([2, 3]): (2, 3),
        (): (),
    }
    with front.Server(socket_uri, HANDLERS, arrays=kind) as server, front.connect(server.uri, arrays=kind) as channel:
        for shape, dims in [
            *shapes.items(),
            (np.array([2, 3]), (2, 3)),
            (torch.tensor(4), (4,)),
            (range(3), (0, 1, 2)),
        ]:
            assert tuple(channel.empty(shape).shape) == dims
        x = channel.empty((2, 3))
        assert len(channel.call("echo", x, expect=[(np.float32, (np.int64(2), np.int32(3)))])) == 1
        assert len(channel.call("echo", channel.empty(5), expect=[("float32", np.int64(5))])) == 1


# ---- attributes and arguments ----------------------------------------------------------------------------------------


def _reflect(call: fastsplit.Call) -> None:
    call.reply_attrs.update(call.attrs)


def _wrong(call: fastsplit.Call) -> None:
    call.reply_attrs[WRONG_NAMES[call.attrs["name"]] if "name" in call.attrs else "v"] = (
        WRONG_ATTRS[call.attrs["index"]][0] if "index" in call.attrs else 1
    )


def _raises(*_: object) -> Any:
    raise RuntimeError("no value")


class _Colour(enum.IntEnum):
    RED = 3


class _Unit(str, enum.Enum):  # noqa: UP042 (whose str() is another text)
    METRE = "m"


class _Counts(NamedTuple):
    first: int
    second: int


class _Sly(int):
    """Its own methods are not asked."""

    __int__ = __index__ = __bool__ = _raises


class _SlyFloat(float):
    __float__ = _raises


class _SlyText(str):
    __str__ = __len__ = encode = _raises


class _SlyBytes(bytes):
    __bytes__ = __len__ = _raises


class _SlyList(list):  # type: ignore[type-arg]
    __iter__ = _raises


class _Index:
    __index__ = __float__ = __int__ = _raises


class _NoInt(_Index):
    """What claims to be a number is asked for its value."""


class _NoFloat(_Index):
    pass


numbers.Integral.register(_NoInt)
numbers.Real.register(_NoFloat)


class _NoClass:
    __class__ = property(_raises)  # type: ignore[assignment]


class _NoRepr:
    __repr__ = _raises


class _NoMapping(collections.UserDict):  # type: ignore[type-arg]
    __iter__ = keys = _raises


class _Name(str):
    """A name that is equal to none but itself."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _released() -> memoryview:
    view = memoryview(b"ab")
    view.release()
    return view


def _recursive() -> list[Any]:
    items: list[Any] = [1]
    items.append(items)
    return items


SENT_ATTRS: dict[str, tuple[Any, Any]] = {
    "bool": (True, True),
    "numpy's bool": (np.bool_(False), False),
    "any": ((np.arange(3) > 1).any(), True),
    "int": (np.int64(-3), -3),
    "uint": (np.uint64(2**63 - 1), 2**63 - 1),
    "enum": (_Colour.RED, 3),
    "sly int": (_Sly(7), 7),
    "float": (np.float32(0.5), 0.5),
    "half": (np.float16(0.25), 0.25),
    "longdouble": (np.longdouble(2.5), 2.5),
    "fraction": (Fraction(1, 4), 0.25),
    "huge": (1.7e308, 1.7e308),
    "inf": (-math.inf, -math.inf),
    "nan": (math.nan, math.nan),
    "zero": (-0.0, -0.0),
    "sly float": (_SlyFloat(0.5), 0.5),
    "str": (np.str_("a"), "a"),
    "str enum": (_Unit.METRE, "m"),
    "sly str": (_SlyText("text"), "text"),
    "bytes": (np.bytes_(b"a"), b"a"),
    "sly bytes": (_SlyBytes(b"ab"), b"ab"),
    "bytearray": (bytearray(b"ab"), b"ab"),
    "memoryview": (memoryview(b"abcd")[::2], b"ac"),
    "list": (list(np.arange(3)), [0, 1, 2]),
    "sly list": ([_Sly(1), _Colour.RED], [1, 3]),
    "bools": ([True, np.bool_(False)], [True, False]),
    "floats": ((0.5, -0.0, math.inf, np.float32(0.25)), [0.5, -0.0, math.inf, 0.25]),
    "ints and floats": ([1, 0.5, 2**60, np.int8(-1)], [1.0, 0.5, 2.0**60, -1.0]),
    "strs": (list(np.array(["a", "b"])), ["a", "b"]),
    "no strs": ([], []),
    "nothing": ((), []),
    "size": (torch.Size([2, 3]), [2, 3]),
    "counts": (_Counts(1, 2), [1, 2]),
}
IS_READ, IS_KNOWN, IS_UNICODE = "a value that can be read: ", "an int, bool, float, str, bytes", "valid Unicode"
IS_64, IS_NO_TENSOR = "(an int|ints) of 64 bits", "no tensor: those are a call's positional arguments"
WRONG_ATTRS: list[tuple[Any, str]] = [
    (None, IS_KNOWN),
    (1j, IS_KNOWN),
    (Ellipsis, IS_KNOWN),
    (int, IS_KNOWN),
    (2**63, IS_64),
    (_Sly(2**63), IS_64),
    (-(10**5000), IS_64),
    (np.uint64(2**63), IS_64),
    ([2**63], IS_64),
    ([10**5000], IS_64),
    ([1, "a"], IS_KNOWN),
    ([True, 1], IS_KNOWN),
    ([True, 0.5], IS_KNOWN),
    ([0.5, "a"], IS_KNOWN),
    ([0.5, 2**53 + 1], IS_KNOWN + r".* \(of ints and floats if the ints are floats exactly\)"),
    ([0.5, 10**400], IS_KNOWN + r".* \(of ints and floats if the ints are floats exactly\)"),
    ([None], IS_KNOWN),
    ([b"a"], IS_KNOWN),
    ([[1]], IS_KNOWN),
    (_recursive(), IS_KNOWN),
    ({"a": 1}, IS_KNOWN),
    ({1, 2}, IS_KNOWN),
    (frozenset("ab"), IS_KNOWN),
    (iter([1]), IS_KNOWN),
    (range(3), IS_KNOWN),
    (array.array("d", [0.5]), IS_KNOWN),
    (Decimal("0.5"), IS_KNOWN),
    (Fraction(10**400), IS_KNOWN),
    (np.timedelta64(3, "s"), IS_KNOWN),
    (np.datetime64("2026-01-01"), IS_KNOWN),
    (np.longdouble("1e4000"), IS_KNOWN),
    (np.complex64(1), IS_KNOWN),
    (object(), IS_KNOWN),
    (_Index(), IS_KNOWN),
    (_NoRepr(), IS_KNOWN),
    (np.arange(3), IS_NO_TENSOR),
    (np.array(3), IS_NO_TENSOR),
    (np.ma.masked, IS_NO_TENSOR),
    (torch.tensor(3), IS_NO_TENSOR),
    (torch.ones(2, requires_grad=True), IS_NO_TENSOR),
    ([torch.tensor(0.5), 1], IS_NO_TENSOR),
    ("\udc80", IS_UNICODE),
    (_SlyText("\udc80"), IS_UNICODE),
    (["a", "\udc80"], IS_UNICODE),
    (_released(), IS_READ + "ValueError"),
    (_NoInt(), IS_READ + "RuntimeError"),
    (_NoFloat(), IS_READ + "RuntimeError"),
    ([_NoFloat()], IS_READ + "RuntimeError"),
    (_SlyList([1]), IS_READ + "RuntimeError"),
    (_NoClass(), IS_READ + "RuntimeError"),
]
WRONG_NAMES: list[Any] = ["", "\udc80", 5, None, b"a", ("a",), 0.5]
TOO_LONG: list[Any] = ["x" * 70_000, bytes(70_000), bytearray(70_000), [7] * 10_000, [0.5] * 10_000, [True] * 70_000]
TOO_LONG += [["x"] * 15_000, ["x" * 70_000]]


def test_attributes_of_numpys(socket_uri: str, front: Front) -> None:
    """And of Python's: each arrives as what is documented, there and back."""
    expected = {name: value for name, (_, value) in SENT_ATTRS.items()}
    with front.Server(socket_uri, {"reflect": _reflect}) as server, front.connect(server.uri) as channel:
        for _ in range(2):  # the second one goes the cached way
            attrs = channel.call("reflect", attrs={name: value for name, (value, _) in SENT_ATTRS.items()}).attrs
            assert repr(attrs) == repr(expected)


def test_attributes_that_cannot_travel(socket_uri: str, front: Front) -> None:
    """It is the caller's error, or the handler's, and names the attribute; nothing is sent, and the channel lives."""
    with front.Server(socket_uri, {"reflect": _reflect, "wrong": _wrong}) as server:
        with front.connect(server.uri) as channel:
            for index, (value, expected) in enumerate(WRONG_ATTRS):
                with pytest.raises(fastsplit.SettingError, match=f"^attribute 'v': .*, expected {expected}"):
                    channel.call("reflect", v=value)
                with pytest.raises(
                    fastsplit.RemoteOpError, match=f"^wrong: SettingError: attribute 'v': .*, expected {expected}"
                ):
                    channel.call("wrong", index=index)
            for index, name in enumerate(WRONG_NAMES):
                refusal = "an attribute named .*, expected (a string that is not empty|valid Unicode)"
                with pytest.raises(fastsplit.SettingError, match=f"^'reflect': {refusal}"):
                    channel.call("reflect", attrs={name: 1})
                with pytest.raises(fastsplit.RemoteOpError, match=f"^wrong: SettingError: '': {refusal}"):
                    channel.call("wrong", name=index)
            with pytest.raises(fastsplit.SettingError, match="two attributes named 'a', expected each once"):
                channel.call("reflect", attrs={_Name("a"): 1, _Name("a"): 2})
            assert channel.call("reflect", v=1).attrs == {"v": 1}
            assert channel.stats.calls == len(WRONG_ATTRS) + len(WRONG_NAMES) + 1


def test_attributes_that_are_too_long(socket_uri: str, front: Front) -> None:
    def lengthy(call: fastsplit.Call) -> None:
        call.reply_attrs["v"] = TOO_LONG[call.attrs["index"]]

    with front.Server(socket_uri, {"reflect": _reflect, "lengthy": lengthy}) as server:
        with front.connect(server.uri) as channel:
            for index, value in enumerate(TOO_LONG):
                text = r"attribute 'v': \d+ bytes, the peer accepts at most 65536 bytes"
                with pytest.raises(fastsplit.LimitError, match=f"^'reflect', {text}"):
                    channel.call("reflect", v=value)
                with pytest.raises(fastsplit.RemoteOpError, match=f"^lengthy: LimitError: {text}"):
                    channel.call("lengthy", index=index)
            with pytest.raises(fastsplit.LimitError, match=r"^'reflect', attribute 'n{199}...: 70000 bytes"):
                channel.call("reflect", attrs={"n" * 70_000: 1})
            assert channel.call("reflect", v=1).attrs == {"v": 1}
            assert channel.stats.calls == len(TOO_LONG) + 1


def test_attributes_for_a_peer_of_an_older_version(
    socket_uri: str, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bools arrive as ints, as they did; lists of floats are refused, which they were."""
    monkeypatch.setattr(connection, "TYPES", 0)
    handlers = {"reflect": _reflect, "floats": lambda call: call.reply_attrs.update(v=[0.5])}
    with front.Server(socket_uri, handlers) as server, front.connect(server.uri) as channel:
        sent = {"a": True, "b": np.bool_(False), "c": [True, False], "d": [True, 2], "e": 0.5, "f": [], "g": 1}
        came = {"a": 1, "b": 0, "c": [1, 0], "d": [1, 2], "e": 0.5, "f": [], "g": 1}
        assert repr(channel.call("reflect", **sent).attrs) == repr(came)
        refusal = r"attribute 'v': .*, expected .* the peer is of a version that knows no lists of floats"
        for value in ([0.5], [1, 0.5], [True, 0.5], (np.float32(1),)):
            with pytest.raises(fastsplit.SettingError, match=f"^{refusal}"):
                channel.call("reflect", v=value)
        with pytest.raises(fastsplit.RemoteOpError, match=f"^floats: SettingError: {refusal}"):
            channel.call("floats")
        assert channel.call("reflect", v=1).attrs == {"v": 1}


def test_bools_to_a_server_of_an_older_version(unix_uri: str, front: Front) -> None:
    """One that says what it did, and whose reader knows no more."""
    came: list[Any] = []

    def script(peer: RawPeer) -> None:
        peer.greet()
        request = peer.expect(REQUEST)
        came.append(request.message.attrs)
        peer.send(frame(REPLY, request.request_id, attrs={"n": 1}))
        peer.expect(GOODBYE)

    with serving(unix_uri, script) as uri, front.connect(uri) as channel:
        assert repr(channel.call("f", yes=True, bools=[False]).attrs) == repr({"n": 1})
    assert repr(came) == repr([{"yes": 1, "bools": [0]}])


ARGUMENTS = ("timeout_s", "expect", "wire_dtype", "codec", "attrs", "op", "self", "tensors", "keywords")


def test_attributes_as_a_mapping(socket_uri: str, front: Front) -> None:
    """They may have the names of the call's own arguments, and come before what is given as keywords."""
    with front.Server(socket_uri, {"reflect": _reflect}) as server, front.connect(server.uri) as channel:
        for send in (channel.call, lambda op, **options: channel.submit(op, **options).result(10)):
            attrs = {name: number for number, name in enumerate(ARGUMENTS)}
            assert list(send("reflect", attrs=attrs, timeout_s=10, by=0.5).attrs.items()) == [
                *attrs.items(),
                ("by", 0.5),
            ]
            assert attrs == {name: number for number, name in enumerate(ARGUMENTS)}
            for mapping in ({}, {"a": True}, types.MappingProxyType({"a": 1}), collections.UserDict(a=[0.5])):
                assert send("reflect", attrs=mapping).attrs == mapping
            assert send("reflect", attrs=None, a=1).attrs == {"a": 1}


@pytest.mark.parametrize(
    ("attrs", "expected"),
    [
        (3, "attrs: 3, expected a dict or another mapping of names to values"),
        (0, "attrs: 0, expected a dict or another mapping of names to values"),
        ("ab", "attrs: 'ab', expected a dict or another mapping of names to values"),
        ([("a", 1)], r"attrs: \[\('a', 1\)\], expected a dict or another mapping of names to values"),
        (_NoMapping(a=1), "attrs: .*, expected a dict or another mapping of names to values: RuntimeError"),
        ({"by": 1}, "attribute 'by': in attrs and as a keyword, expected once"),
        ({5: 1}, "'reflect': an attribute named 5, expected a string"),
    ],
    ids=str,
)
def test_attributes_that_are_no_mapping(socket_uri: str, front: Front, attrs: Any, expected: str) -> None:
    with front.Server(socket_uri, {"reflect": _reflect}) as server, front.connect(server.uri) as channel:
        for send in (channel.call, lambda op, **options: channel.submit(op, **options).result(10)):
            with pytest.raises(fastsplit.SettingError, match=f"^{expected}"):
                send("reflect", attrs=attrs, by=2)
        assert channel.call("reflect", v=1).attrs == {"v": 1} and channel.stats.calls == 1


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("timeout_s", "5", "timeout_s: '5', expected 0 to 1e+06 seconds, as a number"),
        ("timeout_s", [5], "timeout_s: [5], expected 0 to 1e+06 seconds, as a number"),
        ("timeout_s", -1, "timeout_s: -1, expected 0 to 1e+06 seconds, as a number"),
        ("timeout_s", float("nan"), "timeout_s: nan, expected 0 to 1e+06 seconds, as a number"),
        ("expect", 3, "expect: 3, expected (dtype, shape) of each tensor of the reply"),
        ("expect", "ab", "expect: 'ab', expected (dtype, shape) of each tensor of the reply"),
        ("expect", [3], "expect: [3], expected (dtype, shape) of each tensor of the reply"),
        ("expect", [("float32", "ab")], "expect, tensor 0: shape 'ab', expected ints"),
        ("expect", [("float32", (2,)), ("float32", (-2,))], "expect, tensor 1: shape [-2], expected dimensions of 0"),
        ("expect", [("floaty", (2,))], "expect, tensor 0: dtype 'floaty', expected one of bool, uint8"),
        ("codec", 3, "codec: 3, expected 'auto', 'off', 'zlib'"),
        ("codec", ["zlib"], "codec: ['zlib'], expected 'auto', 'off', 'zlib'"),
        ("codec", None, "codec: None, expected 'auto', 'off', 'zlib'"),
        ("wire_dtype", ["bfloat16"], "wire_dtype: ['bfloat16'], expected None, 'bfloat16' or 'float16'"),
        ("wire_dtype", "float32", "wire_dtype: 'float32', expected None, 'bfloat16' or 'float16'"),
    ],
    ids=str,
)
def test_arguments_of_a_call(socket_uri: str, front: Front, name: str, value: Any, expected: str) -> None:
    """An attribute of such a name is not one, unless it is in `attrs`: it says so, and what is expected."""
    with front.Server(socket_uri, {"reflect": _reflect}) as server, front.connect(server.uri) as channel:
        with pytest.raises(fastsplit.SettingError) as caught:
            channel.call("reflect", **{name: value})
        assert str(caught.value).startswith(expected)
        if not isinstance(value, (list, type(None))) or value == ["zlib"]:
            assert repr(channel.call("reflect", attrs={name: value}).attrs) == repr({name: value})
        assert channel.call("reflect", v=1).attrs == {"v": 1}


@pytest.mark.parametrize("op", [3, None, b"op", ["op"], "\udc80"], ids=repr)
def test_ops_that_are_none(socket_uri: str, front: Front, op: Any) -> None:
    with front.Server(socket_uri, {"reflect": _reflect}) as server, front.connect(server.uri) as channel:
        with pytest.raises(fastsplit.SettingError, match=r"expected (a string|valid Unicode)"):
            channel.call(op)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout_s": "5"},
        {"timeout_s": None},
        {"call_timeout_s": "5"},
        {"codec": 3},
        {"wire_dtype": 3},
        {"codec_threshold_nbytes": "5"},
        {"codec_threshold_nbytes": 1.5},
        {"limits": 3},
    ],
    ids=str,
)
def test_arguments_of_a_connection(unix_uri: str, front: Front, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(fastsplit.SettingError, match=f"^{name}: .*, expected "):
        front.connect(unix_uri, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"workers": "2"},
        {"workers": -1},
        {"max_connections": None},
        {"handshake_timeout_s": "5"},
        {"send_timeout_s": float("nan")},
        {"limits": {"max_dims": 3}},
        {"codec": 3},
    ],
    ids=str,
)
def test_arguments_of_a_server(unix_uri: str, front: Front, options: dict[str, Any]) -> None:
    """At once, not in a thread when the first client comes."""
    (name,) = options
    with pytest.raises(fastsplit.SettingError, match=f"^{name}: .*, expected "):
        front.Server(unix_uri, {}, **options)


@pytest.mark.parametrize("uri", [None, 3, b"unix:///run/demo.sock"])
def test_addresses_that_are_no_text(front: Front, uri: Any) -> None:
    with pytest.raises(fastsplit.AddressError, match="expected a string"):
        front.connect(uri)
    with pytest.raises(fastsplit.AddressError, match="expected a string"):
        front.Server(uri, {})
