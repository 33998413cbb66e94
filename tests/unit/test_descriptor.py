"""Metadata: what is encoded decodes, for us and any FlatBuffers reader; a cached decode means what a full one does."""

from __future__ import annotations

import gc
import itertools
import math
import random
import struct
import tracemalloc
from numbers import Integral
from typing import Any

import amount
import flatbuffers
import numpy as np
import pytest

from fastsplit.errors import LimitError, RemoteProtocolError, SettingError
from fastsplit.schema import decoder as decoding
from fastsplit.schema import descriptor
from fastsplit.schema import message_generated as gen
from fastsplit.schema.descriptor import Message
from fastsplit.schema.dtypes import BY_CODE
from fastsplit.schema.limits import Limits
from fastsplit.wire import backend
from fastsplit.wire.backend import Decoder, Encoder

LIMITS = Limits()
FLOAT32, UINT8, BFLOAT16 = 12, 2, 11

MESSAGES: list[tuple[str, list[tuple[int, tuple[int, ...]]], dict[str, Any]]] = [
    ("", [], {}),
    ("op", [], {}),
    ("matmul", [(FLOAT32, (3, 4)), (FLOAT32, (4, 5))], {}),
    ("every dtype", [(code, (code,)) for code in BY_CODE], {}),
    ("shapes", [(UINT8, ()), (UINT8, (0,)), (UINT8, (0, 2**20)), (UINT8, (1, 2, 3, 4, 5, 6, 7, 8))], {}),
    ("ints", [], {"a": 1, "b": -(2**63), "c": 2**63 - 1}),
    ("floats", [], {"x": 0.5, "inf": math.inf, "tiny": 5e-324, "zero": -0.0}),
    ("both", [(BFLOAT16, (2,))], {"x": 0.5, "n": 3, "y": -1.5, "m": 4}),
    ("texts", [(UINT8, (3,))], {"s": "Ünïcode \0 🙂", "e": "", "b": b"\x00\xff", "eb": b""}),
    ("lists", [], {"ints": [1, -(2**63), 2**63 - 1], "names": ["a", "", "ß"], "none": []}),
    (
        "all",
        [(FLOAT32, (2, 2)), (UINT8, (5,))],
        {"i": 1, "s": "t", "f": 2.0, "l": [1, 2], "n": ["x"], "b": b"y", "j": 2},
    ),
    ("bools", [], {"yes": True, "n": 1, "no": False, "m": 0}),
    (
        "typed lists",
        [(UINT8, (3,))],
        {"f": [0.5, -0.0, math.inf, 5e-324], "b": [True, False], "i": [1, 0], "one": [1.0]},
    ),
    ("all types", [(UINT8, (3,))], {"t": True, "x": 0.5, "l": [0.5], "b": [False], "n": 7, "f": False, "s": "t"}),
]
each = pytest.mark.parametrize(("op", "tensors", "attrs"), MESSAGES, ids=[row[0] or "nothing" for row in MESSAGES])


SAMPLED = pytest.param("python", marks=pytest.mark.matrix(one_in=3, each=False))
"""It is what the compiled tables leave to Python, too."""


@pytest.fixture(autouse=True, params=["compiled", SAMPLED] if backend.native else ["python"])
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled tables, and without."""
    if request.param == "python":
        monkeypatch.setattr(backend, "_native", None)
    elif not backend.native:
        pytest.skip("the compiled core is not in use here")
    return str(request.param)


def encode(op: str, tensors: Any = (), attrs: Any = None, *, typed: bool = True) -> tuple[bytes, int]:
    out, varying_nbytes = Encoder(LIMITS, typed=typed).encode(op, tensors, attrs or {})
    return bytes(out), varying_nbytes


def typed_decoder() -> Decoder:
    decoder = Decoder(LIMITS)
    decoder.typed = True
    return decoder


def check(message: Message, op: str, tensors: Any, attrs: Any) -> None:
    assert message.op == op
    assert [(desc.dtype.code, desc.shape) for desc in message.tensors] == list(tensors)
    assert message.attrs == attrs
    assert list(message.attrs) == list(attrs)
    assert repr(message.attrs) == repr(attrs)  # True is no 1, and -0.0 no 0.0
    sizes = [math.prod(shape) * BY_CODE[code].itemsize for code, shape in tensors]
    assert [desc.nbytes for desc in message.tensors] == sizes and message.payload_nbytes == sum(sizes)


# ---- both ways -------------------------------------------------------------------------------------------------------


@each
def test_round_trip(op: str, tensors: Any, attrs: Any) -> None:
    encoder, decoder = Encoder(LIMITS, typed=True), typed_decoder()
    for _ in range(3):  # built and decoded in full, then from the caches
        out, varying_nbytes = encoder.encode(op, tensors, attrs)
        check(decoder.decode(bytes(out), varying_nbytes), op, tensors, attrs)


@each
def test_hints_only_cost_time(op: str, tensors: Any, attrs: Any) -> None:
    data, varying_nbytes = encode(op, tensors, attrs)
    decoder = typed_decoder()
    hints = [*range(min(len(data), 300) + 1), len(data), varying_nbytes]
    for hint in hints + random.Random(1).sample(hints, len(hints)):
        check(decoder.decode(data, hint), op, tensors, attrs)


def test_numbers_are_patched_into_the_template() -> None:
    encoder, decoder = Encoder(LIMITS, typed=True), typed_decoder()
    for n in (0, 1, -1, 2**62, -(2**63)):
        attrs = {"n": n, "b": n > 0, "x": n / 3, "s": "same", "l": [7], "fl": [0.1], "m": n // 2, "y": -n * 1.5}
        out, varying_nbytes = encoder.encode("f", [(FLOAT32, (2,))], attrs)
        check(decoder.decode(bytes(out), varying_nbytes), "f", [(FLOAT32, (2,))], attrs)
    assert len(encoder._templates) == len(decoder._known) == 1


def test_headroom_is_zero_and_in_front() -> None:
    plain, varying_nbytes = encode("f", [(FLOAT32, (2,))], {"n": 1})
    out, varying_with_headroom = Encoder(LIMITS, 40).encode("f", [(FLOAT32, (2,))], {"n": 1})
    assert out == bytes(40) + plain and varying_with_headroom == varying_nbytes


def test_what_is_decoded_belongs_to_the_receiver() -> None:
    encoder, decoder = Encoder(LIMITS, typed=True), typed_decoder()
    lists = {"l": [1, 2], "s": ["a"], "f": [0.5], "b": [True]}
    for attrs in (lists, {**lists, "n": 5}):
        for _ in range(3):
            out, hint = encoder.encode("f", [], attrs)
            message = decoder.decode(bytes(out), hint)
            assert message.attrs == attrs
            message.attrs["l"].append(9)
            message.attrs["f"].append(9.0)
            message.attrs["b"].append(False)
            message.attrs["s"].clear()
            message.attrs["more"] = 1


def test_numpy_scalars_are_numbers() -> None:
    data, hint = encode(
        "f", [], {"a": np.int16(-3), "b": np.bool_(True), "c": np.float32(0.5), "d": np.uint64(2**63 - 1)}
    )
    assert repr(typed_decoder().decode(data, hint).attrs) == repr({"a": -3, "b": True, "c": 0.5, "d": 2**63 - 1})


EQUAL_BY_VALUE: list[Any] = [
    1, 1.0, True, 0, 0.0, -0.0, False, [1, 0], [1.0, 0.0], [1.0, -0.0], [True, False], [0], [False], [0.0], "1", b"1",
]  # fmt: skip


def test_values_that_are_equal_have_templates_of_their_own() -> None:
    """True == 1 == 1.0 and -0.0 == 0.0, also as keys of a dict: each arrives as what it is, whatever went before it."""
    encoder, decoder = Encoder(LIMITS, typed=True), typed_decoder()
    for value in EQUAL_BY_VALUE * 2 + EQUAL_BY_VALUE[::-1]:
        out, hint = encoder.encode("f", [], {"v": value})
        assert repr(decoder.decode(bytes(out), hint).attrs["v"]) == repr(value)
    assert len(encoder._templates) == len(EQUAL_BY_VALUE) - 4  # numbers by themselves are not part of a shape


@pytest.mark.parametrize(
    "value", [True, False, np.bool_(True), [True, False], [True, 2], [np.bool_(False), 3]], ids=repr
)
def test_bools_to_an_older_peer_are_the_bytes_of_ints(value: Any) -> None:
    same = [int(item) for item in value] if isinstance(value, list) else int(value)
    assert encode("f", [], {"v": value}, typed=False) == encode("f", [], {"v": same}, typed=False)
    data, hint = encode("f", [], {"v": value}, typed=False)
    for decoder in (Decoder(LIMITS), typed_decoder()):
        assert repr(decoder.decode(data, hint).attrs["v"]) == repr(same)


@each
def test_both_kinds_of_peers_get_the_same_bytes_of_the_same_types(op: str, tensors: Any, attrs: Any) -> None:
    if not any(isinstance(value, bool) or (isinstance(value, list) and value and type(value[0]) in (bool, float))
               for value in attrs.values()):  # fmt: skip
        assert encode(op, tensors, attrs, typed=False) == encode(op, tensors, attrs, typed=True)


FLOATS_ARE_NEW = ", expected .* the peer is of a version that knows no lists of floats"
MIXED = r", expected .* \(of ints and floats if the ints are floats exactly\)"


class Name(str):
    """A name that is equal to none but itself."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@pytest.mark.parametrize(
    ("attrs", "text"),
    [
        ({"a": 2**63}, "attribute 'a': 9223372036854775808, expected an int of 64 bits"),
        ({"a": np.uint64(2**63)}, "attribute 'a': np.uint64.9223372036854775808., expected an int of 64 bits"),
        ({"a": [2**63]}, "attribute 'a': .9223372036854775808,., expected ints of 64 bits"),
        ({"a": None}, "attribute 'a': None, expected an int, float, str, bytes, or a list"),
        ({"a": [1, "x"]}, r"attribute 'a': \[1, 'x'\], expected"),
        ({"a": [1.5]}, r"attribute 'a': \[1.5\]" + FLOATS_ARE_NEW),
        ({"a": (1, np.float32(0.5))}, "attribute 'a': .*" + FLOATS_ARE_NEW),
        ({"a": [True, 0.5]}, r"attribute 'a': \[True, 0.5\]" + FLOATS_ARE_NEW),
        ({"a": {}}, r"attribute 'a': \{\}, expected"),
        ({"a": "\udc80"}, r"attribute 'a': '\\udc80', expected valid Unicode"),
        ({"a": ["b", "\udc80"]}, r"attribute 'a': '\\udc80', expected valid Unicode"),
        ({"\udc80": 1}, r"'f': an attribute named '\\udc80', expected valid Unicode"),
        ({"": 1}, "'f': an attribute named '', expected a string that is not empty"),
        ({5: 1}, "'f': an attribute named 5, expected a string"),
        ({Name("a"): 1, Name("a"): 2}, "'f': two attributes named 'a', expected each once"),
    ],
)
def test_attributes_that_cannot_travel(attrs: Any, text: str) -> None:
    _check_refused(Encoder(LIMITS), attrs, text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ", expected an int, bool, float, str, bytes, or a list of ints, of bools, of floats or of strings"),
        ([True, 1], MIXED),
        ([True, 0.5], MIXED),
        ([0.5, "a"], MIXED),
        ([0.5, None], MIXED),
        ([0.5, 2**53 + 1], MIXED),
        ([10**400, 0.5], MIXED),
        ([[0.5]], MIXED),
        ([2**63], ", expected ints of 64 bits"),
        (np.ones(3), ", expected no tensor"),
        ([np.ones(())], ", expected no tensor"),
    ],
    ids=repr,
)
def test_typed_attributes_that_cannot_travel(value: Any, text: str) -> None:
    _check_refused(Encoder(LIMITS, typed=True), {"a": value}, f"^attribute 'a': .*{text}")


def test_lists_of_ints_and_floats_are_floats_where_nothing_is_lost() -> None:
    for value in ([1, 0.5], [0.5, 2**53], (np.int8(-1), np.float16(0.5)), [2**62, 0.0], [1.0, math.inf]):
        data, hint = encode("f", [], {"a": value})
        assert repr(typed_decoder().decode(data, hint).attrs["a"]) == repr([float(item) for item in value])


def _check_refused(encoder: Encoder, attrs: Any, text: str) -> None:
    for _ in range(2):
        with pytest.raises(SettingError, match=text):
            encoder.encode("f", [], attrs)
    encoder.encode("f", [], {"a": 1})


def test_caps_out() -> None:
    encoder = Encoder(Limits(max_metadata_nbytes=4096, max_tensors=2, max_dims=3, max_attrs=16, max_message_nbytes=99))
    for op, tensors, attrs, text in [
        ("f", [(UINT8, (1,))] * 3, {}, "'f', tensors: 3, the peer accepts at most 2"),
        ("f", [(UINT8, (1,) * 4)], {}, "'f', tensor 0 dimensions: 4, the peer accepts at most 3"),
        ("f", [], {str(n): 1 for n in range(17)}, "'f', attrs: 17, the peer accepts at most 16"),
        ("f", [(UINT8, (50,)), (UINT8, (50,))], {}, "'f', bytes of all tensors: 100, the peer accepts at most 99"),
        ("o" * 5000, [], {}, "bytes, the peer accepts at most 4096"),
        ("f", [], {"a": "x" * 5000}, "'f', attribute 'a': 5001 bytes, the peer accepts at most 4096"),
        ("f", [], {"a": [7] * 600}, "'f', attribute 'a': 4801 bytes, the peer accepts at most 4096"),
        ("f", [], {"n" * 5000: 1}, "'f', attribute 'n{199}...: 5000 bytes, the peer accepts at most 4096"),
        ("f", [], {"a": "x" * 3000, "b": "x" * 3000}, "'f', texts and lists: 6003 bytes, the peer accepts"),
    ]:
        with pytest.raises(LimitError, match=text):
            encoder.encode(op, tensors, attrs)


# ---- other writers and readers ---------------------------------------------------------------------------------------


@each
def test_any_flatbuffers_reader_can_read_it(op: str, tensors: Any, attrs: Any) -> None:
    data, _ = encode(op, tensors, attrs)
    assert gen.Message.MessageBufferHasIdentifier(data, 0)
    message = gen.Message.GetRootAs(data)
    assert (message.Op() or b"").decode() == op
    offset = 0
    assert message.TensorsLength() == message.PlacementsLength() == len(tensors)
    for index, (code, shape) in enumerate(tensors):
        tensor, placement = message.Tensors(index), message.Placements(index)
        assert tensor.Dtype() == code and tuple(tensor.Shape(i) for i in range(tensor.ShapeLength())) == shape
        nbytes = math.prod(shape) * BY_CODE[code].itemsize
        assert (placement.Segment(), placement.Codec(), placement.Offset(), placement.Nbytes()) == (
            0,
            0,
            offset,
            nbytes,
        )
        offset += nbytes
    assert message.AttrsLength() == len(attrs)
    for index, (name, value) in enumerate(attrs.items()):
        attr = message.Attrs(index)
        came: Any = {
            gen.AttrType.Int: lambda attr: message.Ints(attr.Index()),
            gen.AttrType.Float: lambda attr: message.Floats(attr.Index()),
            gen.AttrType.String: lambda attr: attr.Text().decode(),
            gen.AttrType.Bytes: lambda attr: bytes(attr.Data(i) for i in range(attr.DataLength())),
            gen.AttrType.Ints: lambda attr: [attr.IntList(i) for i in range(attr.IntListLength())],
            gen.AttrType.Strings: lambda attr: [attr.TextList(i).decode() for i in range(attr.TextListLength())],
            gen.AttrType.Bool: lambda attr: bool(message.Ints(attr.Index())),
            gen.AttrType.Floats: lambda attr: [attr.FloatList(i) for i in range(attr.FloatListLength())],
            gen.AttrType.Bools: lambda attr: [bool(attr.Data(i)) for i in range(attr.DataLength())],
        }[attr.Type()](attr)
        assert (attr.Name().decode(), repr(came)) == (name, repr(value))


def build(order: tuple[str, ...], *, ints: Any = (5, -6), floats: Any = (0.25,), shared: bool = False) -> bytes:
    """A message by a plain Builder, its parts written in any order: op "f", uint8[3] and float32[2], a, b, x and s."""
    builder = flatbuffers.Builder(0)
    made: dict[str, int] = {}

    def string(text: str) -> int:
        return builder.CreateSharedString(text) if shared else builder.CreateString(text)

    def vector(start: Any, items: Any, prepend: Any) -> int:
        start(builder, len(items))
        for item in reversed(items):
            prepend(item)
        return builder.EndVector()

    def tensor(code: int, dim: int) -> int:
        shape = vector(gen.TensorStartShapeVector, [dim], builder.PrependUint64)
        gen.TensorStart(builder)
        gen.TensorAddShape(builder, shape)
        gen.TensorAddDtype(builder, code)
        return gen.TensorEnd(builder)

    def attr(name: str, kind: int, index: int = 0, text: str | None = None) -> int:
        name_at = string(name)
        text_at = string(text) if text is not None else 0
        gen.AttrStart(builder)
        if text is not None:
            gen.AttrAddText(builder, text_at)
        gen.AttrAddIndex(builder, index)
        gen.AttrAddType(builder, kind)
        gen.AttrAddName(builder, name_at)
        return gen.AttrEnd(builder)

    for part in order:
        if part == "op":
            made[part] = string("f")
        elif part == "tensors":
            tables = [tensor(UINT8, 3), tensor(FLOAT32, 2)]
            made[part] = vector(gen.MessageStartTensorsVector, tables, builder.PrependUOffsetTRelative)
        elif part == "attrs":
            kinds = gen.AttrType
            tables = [attr("a", kinds.Int, 0), attr("x", kinds.Float, 0), attr("s", kinds.String, text="f")]
            tables.append(attr("b", kinds.Int, 1))
            made[part] = vector(gen.MessageStartAttrsVector, tables, builder.PrependUOffsetTRelative)
        elif part == "ints":
            made[part] = vector(gen.MessageStartIntsVector, ints, builder.PrependInt64)
        elif part == "floats":
            made[part] = vector(gen.MessageStartFloatsVector, floats, builder.PrependFloat64)
        else:
            gen.MessageStartPlacementsVector(builder, 2)
            gen.CreatePlacement(builder, 0, 0, 3, 8)
            gen.CreatePlacement(builder, 0, 0, 0, 3)
            made[part] = builder.EndVector()
    gen.MessageStart(builder)
    for part in order[::-1]:
        getattr(gen, f"MessageAdd{part.title()}")(builder, made[part])
    builder.Finish(gen.MessageEnd(builder), file_identifier=b"FSM1")
    return bytes(builder.Output())


PARTS = ("op", "tensors", "attrs", "ints", "floats", "placements")


def test_other_writers_orders_decode_whatever_they_hint() -> None:
    tensors = [(UINT8, (3,)), (FLOAT32, (2,))]
    orders = [PARTS, PARTS[::-1], *random.Random(1).sample(list(itertools.permutations(PARTS)), 50)]
    for order, shared in itertools.product(orders, (False, True)):
        decoder = Decoder(LIMITS)
        for numbers in [((5, -6), (0.25,)), ((7, 8), (-0.5,)), ((5, -6), (0.25,))]:
            data = build(order, ints=numbers[0], floats=numbers[1], shared=shared)
            attrs = {"a": numbers[0][0], "x": numbers[1][0], "s": "f", "b": numbers[0][1]}
            for hint in (0, 24, 48, 80, 88, 96, len(data) - 1):
                check(decoder.decode(data, hint), "f", tensors, attrs)


# ---- hostile ---------------------------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_cached_decode_is_full_decode_under_mutation() -> None:
    """Change any byte of a message whose head is known: the cached way and a fresh decoder must agree."""
    changes = (1, 0xFF)
    for op, tensors, attrs in MESSAGES:
        data, hint = encode(op, tensors, attrs)
        for at in range(len(data)):
            for change in changes if amount.exhaustive else changes[at % 2 :][:1]:
                mutated = bytearray(data)
                mutated[at] ^= change
                warm = typed_decoder()
                warm.decode(data, hint)
                outcomes = []
                for decoder in (warm, typed_decoder()):
                    try:
                        outcomes.append(repr(decoder.decode(bytes(mutated), hint)))
                    except RemoteProtocolError as error:
                        outcomes.append(str(error))
                assert outcomes[0] == outcomes[1], (op, at, change)


def test_same_head_with_another_tail() -> None:
    data, hint = encode("f", [(UINT8, (3,))], {"n": 1, "x": 2.0})
    decoder = Decoder(LIMITS)
    decoder.decode(data, hint)
    for tail in (data[-hint:-8], bytes(hint), data[-hint:][::-1], b""):
        with pytest.raises(RemoteProtocolError):
            decoder.decode(data[:-hint] + tail, len(tail))
    check(decoder.decode(data, hint), "f", [(UINT8, (3,))], {"n": 1, "x": 2.0})


def test_texts_in_the_varying_tail_are_never_cached() -> None:
    """An attribute's text may point into the numbers: then the same head with other numbers is another text."""
    data, hint = encode("f", [], {"n": struct.unpack("<q", b"\x03\0\0\0abc\0")[0], "s": "xyz"})
    at = data.index(b"\x03\0\0\0xyz\0")
    ints_at = len(data) - 8
    (slot,) = [p for p in range(0, at, 4) if p + struct.unpack_from("<I", data, p)[0] == at]
    aliased = bytearray(data)
    struct.pack_into("<I", aliased, slot, ints_at - slot)
    decoder = Decoder(LIMITS)
    assert decoder.decode(bytes(aliased), hint).attrs["s"] == "abc"
    aliased[-4:] = b"def\0"
    assert decoder.decode(bytes(aliased), hint).attrs["s"] == "def"
    assert not decoder._known


def test_dimensions_and_lists_of_ints_are_no_part_of_a_structure() -> None:
    """One build and one full decode serve all messages that differ in nothing else; what is said is what a fresh pair
    says."""
    encoder, decoder = Encoder(LIMITS, typed=True), typed_decoder()
    full_decodes = 0

    class Counting(decoding._MessageReader):
        def read(self) -> Message:
            nonlocal full_decodes
            full_decodes += 1
            return super().read()

    rng = random.Random(3)
    for n in range(60):
        tensors = [(FLOAT32, (n, rng.randrange(9))), (FLOAT32, ()), (1, (rng.randrange(5),) * 3)]
        attrs = {"l": [rng.randrange(-(2**63), 2**63) for _ in range(3)], "s": "same", "n": n, "none": []}
        placements = sum(((1, 64 * n, 1) for _ in tensors), ()) if n % 2 else ()
        placements = [
            part if index % 3 != 2 else math.prod(tensors[index // 3][1]) * BY_CODE[tensors[index // 3][0]].itemsize
            for index, part in enumerate(placements)
        ]
        out, hint = encoder.encode("f", tensors, attrs, placements)
        assert (out, hint) == Encoder(LIMITS, typed=True).encode("f", tensors, attrs, placements)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "_MessageReader", Counting)
            message = decoder.decode(bytes(out), hint)
        assert [(desc.dtype.code, desc.shape) for desc in message.tensors] == tensors and message.attrs == attrs
        assert message == typed_decoder().decode(bytes(out), hint)
        message.attrs["l"].clear()
    assert full_decodes == 1 and len(encoder._structures) == len(decoder._structures) == 1
    assert len(encoder._templates) == len(decoder._known) == 1  # a list that changes is not kept


def test_messages_that_differ_in_how_many_returns_they_bring() -> None:
    """Their heads are the same bytes. Each of them is known from its first message on."""
    encoder, decoder = Encoder(LIMITS), Decoder(LIMITS)
    for times in range(3):
        for count in (1, 2, 0, 5):
            returns = [1, 64] * count
            out, hint = encoder.encode("", [(FLOAT32, (4,))], {}, (1, 0, 16), returns)
            with pytest.MonkeyPatch.context() as patch:
                if times:
                    patch.setattr(decoding, "_MessageReader", None)
                assert decoder.decode(bytes(out), hint).returns == tuple(returns)


def test_dimensions_over_a_limit_are_refused_as_those_of_a_first_message() -> None:
    small = Limits(max_message_nbytes=1000)
    encoder, decoder, generous = Encoder(small), Decoder(small), Encoder(LIMITS)
    for tensors in ([(FLOAT32, (5,)), (FLOAT32, (2, 2))], [(FLOAT32, (6,)), (FLOAT32, (3, 2))]):
        decoder.decode(bytes(encoder.encode("f", tensors, {})[0]), 24 * 2)
    for tensors in (
        [(FLOAT32, (5,)), (FLOAT32, (2**20, 0))],
        [(FLOAT32, (200,)), (FLOAT32, (50, 2))],
        [(FLOAT32, (5,)), (FLOAT32, (2**30, 2**29))],
    ):
        metadata = bytes(Encoder(Limits(max_message_nbytes=2**62 - 1, max_dims=64)).encode("f", tensors, {})[0])
        for refuse in (
            lambda fresh, tensors=tensors: (Encoder(small) if fresh else encoder).encode("f", tensors, {}),
            lambda fresh, metadata=metadata: (Decoder(small) if fresh else decoder).decode(metadata, 24 * 2),
        ):
            errors = []
            for fresh in (False, True):
                with pytest.raises((LimitError, RemoteProtocolError)) as caught:
                    refuse(fresh)
                errors.append(str(caught.value))
            assert errors[0] == errors[1]
    out, hint = generous.encode("f", [(FLOAT32, (7,)), (FLOAT32, (1, 2))], {})
    assert decoder.decode(bytes(out), hint).tensors[0].shape == (7,)
    encoder.encode("g", [], {"l": [1]})
    with pytest.raises(SettingError, match=r"attribute 'l': .*ints of 64 bits"):
        encoder.encode("g", [], {"l": [2**63]})


def test_dimensions_that_are_something_else_as_well() -> None:
    """A text may point at a shape: then the same structure with other dimensions is another text."""
    data, hint = encode("f", [(FLOAT32, (ord("a") + 256 * ord("b"), 3))], {"s": "xyz"})
    shape_at = data.index(struct.pack("<IQQ", 2, ord("a") + 256 * ord("b"), 3))
    text_at = data.index(b"\x03\0\0\0xyz\0")
    (slot,) = [p for p in range(0, text_at, 4) if p + struct.unpack_from("<I", data, p)[0] == text_at]
    aliased = bytearray(data)
    if shape_at < slot:
        pytest.skip("offsets point forwards")
    struct.pack_into("<I", aliased, slot, shape_at - slot)
    decoder = typed_decoder()
    for text in ("ab", "cd"):
        struct.pack_into("<2s", aliased, shape_at + 4, text.encode())
        struct.pack_into("<Q", aliased, len(aliased) - 8, (ord(text[0]) + 256 * ord(text[1])) * 3 * 4)
        assert decoder.decode(bytes(aliased), hint).attrs["s"] == text
    assert not decoder._structures


def test_caches_are_bounded() -> None:
    encoder, decoder = Encoder(LIMITS), Decoder(LIMITS)
    for n in range(descriptor.CACHED_SHAPES + 50):
        out, hint = encoder.encode(f"op {n}", [], {"n": n})
        decoder.decode(bytes(out), hint)
    assert len(encoder._templates) == len(decoder._known) == descriptor.CACHED_SHAPES
    out, hint = encoder.encode("large", [], {"b": bytes(descriptor.MAX_CACHED_NBYTES)})
    decoder.decode(bytes(out), hint)
    assert all(known.message.op != "large" for known in decoder._known.values())
    assert all(key[0] != "large" for key in encoder._templates)


def test_parts_that_share_their_bytes_cannot_multiply() -> None:
    """A list of 12000 names that are all the same 15 KB text is 180 MB to whoever believes it."""
    builder = flatbuffers.Builder(0)
    text = builder.CreateString("x" * 15_000)
    name = builder.CreateString("n")
    gen.AttrStartTextListVector(builder, 12_000)
    for _ in range(12_000):
        builder.PrependUOffsetTRelative(text)
    texts = builder.EndVector()
    gen.AttrStart(builder)
    gen.AttrAddName(builder, name)
    gen.AttrAddType(builder, gen.AttrType.Strings)
    gen.AttrAddTextList(builder, texts)
    attr = gen.AttrEnd(builder)
    gen.MessageStartAttrsVector(builder, 1)
    builder.PrependUOffsetTRelative(attr)
    attrs = builder.EndVector()
    gen.MessageStart(builder)
    gen.MessageAddAttrs(builder, attrs)
    builder.Finish(gen.MessageEnd(builder), file_identifier=b"FSM1")
    data = bytes(builder.Output())
    assert len(data) < LIMITS.max_metadata_nbytes
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="metadata, overlaps: parts that share their bytes too often"):
            Decoder(LIMITS).decode(data, 0)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    finally:
        tracemalloc.stop()


def _patched(tensors: Any, old: bytes, new: bytes) -> bytes:
    data, _ = encode("f", tensors)
    assert data.count(old) == 1
    return data.replace(old, new)


U64 = struct.Struct("<Q")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "metadata, file identifier: b'', expected b'FSM1'"),
        (b"\xff\xff\xff\xffFSM1", "metadata, Message: 4 bytes at 4294967295, expected a place within 8 bytes"),
        (_patched([(FLOAT32, (0x1234,))], U64.pack(0x1234), U64.pack(2**63)),
         r"metadata, tensor 0 shape: \[9223372036854775808\], 36893488147419103232 bytes, expected at most 4294967296"),
        (_patched([(UINT8, (0, 0x1234))], U64.pack(0x1234), U64.pack(2**40)),
         r"metadata, tensor 0 shape: \[0, 1099511627776\], 1099511627776 bytes, expected at most 4294967296 bytes"),
        (_patched([(FLOAT32, (0x1234,))], U64.pack(0x1234 * 4), U64.pack(8)),
         r"metadata, tensor 0 \(segment, codec, offset, nbytes\): \(0, 0, 0, 8\), expected \(0, 0, 0, 18640\)"),
    ],
)  # fmt: skip
def test_each_lie_has_its_error(data: bytes, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        Decoder(LIMITS).decode(data, 0)


def _refusals(data: bytes, hint: int, decoders: list[Decoder]) -> set[str]:
    refusals = set()
    for decoder in decoders:
        with pytest.raises(RemoteProtocolError) as caught:
            decoder.decode(data, hint)
        refusals.add(str(caught.value))
    return refusals


@pytest.mark.parametrize("number", [2, -1, 256, 2**32, -(2**63)])
def test_a_bool_is_0_or_1(number: int) -> None:
    """Read in full, and from the cache, which has seen this very shape before."""
    data, hint = encode("f", [], {"n": 5, "yes": True, "x": 0.5})
    warm = typed_decoder()
    assert warm.decode(data, hint).attrs["yes"] is True
    lie = data[:-24] + struct.pack("<q", number) + data[-16:]
    assert _refusals(lie, hint, [warm, typed_decoder()]) == {f"metadata, attr 'yes': {number}, expected 0 or 1, a bool"}
    assert warm.decode(data[:-24] + bytes(8) + data[-16:], hint).attrs == {"n": 5, "yes": False, "x": 0.5}


def test_a_list_of_bools_is_of_0_and_1() -> None:
    data, hint = encode("f", [], {"v": [True, False, True]})
    assert data.count(b"\x01\0\x01") == 1
    for byte in (2, 255):
        lie = data.replace(b"\x01\0\x01", bytes((1, byte, 1)))
        assert _refusals(lie, hint, [typed_decoder()]) == {f"metadata, attr 'v': {byte}, expected 0 or 1, a bool"}


@pytest.mark.parametrize("value", [True, [0.5], [True]], ids=repr)
def test_types_that_were_not_agreed_on(value: Any) -> None:
    data, hint = encode("f", [], {"v": value})
    assert _refusals(data, hint, [Decoder(LIMITS)] * 2) < {
        f"metadata, attr 'v' type: {n}, expected 1 to 6" for n in (7, 8, 9)
    }


def test_types_that_there_are_not() -> None:
    for value, own in ((True, 7), ([0.5], 8), ([True], 9)):
        data, hint = encode("f", [], {"v": value})
        for kind in (0, 10, 255):
            errors = set()
            for at in (at for at in range(len(data)) if data[at] == own):
                try:
                    typed_decoder().decode(data[:at] + bytes([kind]) + data[at + 1 :], hint)
                except RemoteProtocolError as error:
                    errors.add(str(error))
            assert f"metadata, attr 'v' type: {kind}, expected 1 to 9" in errors


@pytest.mark.parametrize("count", [1000, 2**29 + 1, 2**32 - 1])
def test_a_list_of_floats_lies_within_the_buffer(count: int) -> None:
    data, hint = encode("f", [], {"v": [1.5, 2.5]})
    at = data.index(struct.pack("<Idd", 2, 1.5, 2.5))
    for shorter in (0, 1):
        short = data[:at] + struct.pack("<I", shorter) + data[at + 4 :]
        assert typed_decoder().decode(short, hint).attrs == {"v": [1.5][:shorter]}
    lie = data[:at] + struct.pack("<I", count) + data[at + 4 :]
    assert _refusals(lie, hint, [typed_decoder()]) == {
        f"metadata, attr 'v': {count} elements at {at + 4}, expected no more than fit {len(data)} bytes"
    }


def test_lists_of_floats_that_share_their_bytes_cannot_multiply() -> None:
    """60 attributes that are all the same 30 KB of numbers."""
    builder = flatbuffers.Builder(0)
    gen.AttrStartFloatListVector(builder, 3_750)
    for _ in range(3_750):
        builder.PrependFloat64(0.5)
    numbers = builder.EndVector()
    tables = []
    for index in range(60):
        name = builder.CreateString(f"n{index}")
        gen.AttrStart(builder)
        gen.AttrAddName(builder, name)
        gen.AttrAddType(builder, gen.AttrType.Floats)
        gen.AttrAddFloatList(builder, numbers)
        tables.append(gen.AttrEnd(builder))
    gen.MessageStartAttrsVector(builder, len(tables))
    for table in tables:
        builder.PrependUOffsetTRelative(table)
    attrs = builder.EndVector()
    gen.MessageStart(builder)
    gen.MessageAddAttrs(builder, attrs)
    builder.Finish(gen.MessageEnd(builder), file_identifier=b"FSM1")
    assert _refusals(bytes(builder.Output()), 0, [typed_decoder()]) == {
        "metadata, overlaps: parts that share their bytes too often, expected 4 times on average"
    }


def test_unknown_dtype() -> None:
    data, hint = encode("f", [(17, (1,))])
    for code, expected in ((0, "0"), (18, "18"), (255, "255")):
        mutants = [data[:at] + bytes([code]) + data[at + 1 :] for at in range(len(data)) if data[at] == 17]
        errors = []
        for mutant in mutants:
            try:
                Decoder(LIMITS).decode(mutant, hint)
            except RemoteProtocolError as error:
                errors.append(str(error))
        assert f"metadata, tensor 0 dtype: {expected}, expected a code from 1 to 17" in errors


# ---- places and returns ----------------------------------------------------------------------------------------------

TWO = [(FLOAT32, (2, 3)), (UINT8, (5,))]
PLACES = (3, 64, 24, 2**32 - 1, 2**63, 5)
SHARED: list[tuple[list[tuple[int, tuple[int, ...]]], dict[str, Any], tuple[int, ...], tuple[int, ...], int]] = [
    # tensors, attributes, placements, returns, bytes in the payload
    (TWO, {}, PLACES, (), 0),
    (TWO, {"n": 1, "x": 0.5, "s": "t"}, PLACES, (1, 2**64 - 1), 0),
    (TWO, {"x": 0.5}, (0, 0, 24, 3, 7, 5), (1, 0, 2, 64), 24),  # one here, one there
    (TWO, {}, (3, 7, 24, 0, 0, 5), (), 5),
    (TWO, {"n": 1}, (), (1, 0, 1, 0, 1, 0), 29),  # none there
    ([], {}, (), (5, 6), 0),
    ([], {"n": 1}, (), (5, 6, 7, 8), 0),
    ([(UINT8, (0,)), (UINT8, (2,))], {}, (0, 0, 0, 1, 2, 2), (), 0),
    ([(BFLOAT16, (4,))] * 5, {}, tuple(n for at in range(5) for n in (2, 64 * at, 8)), (4, 1) * 32, 0),
]
shared = pytest.mark.parametrize(("tensors", "attrs", "placements", "returns", "payload"), SHARED)


@shared
def test_places_and_returns_round_trip(tensors: Any, attrs: Any, placements: Any, returns: Any, payload: int) -> None:
    """In full, from the caches, and by a full decode of the same bytes: all three mean the same."""
    encoder, decoder = Encoder(LIMITS), Decoder(LIMITS)
    for _ in range(3):
        out, hint = encoder.encode("f", tensors, attrs, placements, returns)
        for reader, varying in ((decoder, hint), (Decoder(LIMITS), hint), (Decoder(LIMITS), 0)):
            message = reader.decode(bytes(out), varying)
            assert (message.placements, message.returns, message.payload_nbytes) == (placements, returns, payload)
            assert message.attrs == attrs
            assert [(desc.dtype.code, desc.shape) for desc in message.tensors] == tensors
    assert len(encoder._templates) == len(decoder._known) == 1


@shared
def test_returns_are_last_and_the_hint_covers_all_that_varies(
    tensors: Any, attrs: Any, placements: Any, returns: Any, payload: int
) -> None:
    out, hint = Encoder(LIMITS).encode("f", tensors, attrs, placements, returns)
    words = struct.unpack(f"<{len(returns)}Q", out[len(out) - 8 * len(returns) :]) if returns else ()
    assert words == returns
    counts = [sum(type(v) is int for v in attrs.values()), sum(type(v) is float for v in attrs.values())]
    sizes = [8 * counts[0], 8 * counts[1], 24 * len(tensors), 8 * len(returns)]
    assert hint == sum(sizes) + 8 * (sum(1 for size in sizes if size) - 1)


def test_one_shape_serves_every_place() -> None:
    encoder, decoder = Encoder(LIMITS), Decoder(LIMITS)
    rng = random.Random(5)
    for _ in range(50):
        placements = (rng.randrange(2**32), rng.randrange(2**64), 24, rng.randrange(1, 2**32), rng.randrange(2**64), 5)
        if not placements[0]:
            continue
        returns = tuple(rng.randrange(1, 2**32) if n % 2 == 0 else rng.randrange(2**64) for n in range(6))
        out, hint = encoder.encode("f", TWO, {}, placements, returns)
        message = decoder.decode(bytes(out), hint)
        assert (message.placements, message.returns) == (placements, returns)
        out, hint = encoder.encode("f", TWO, {}, (), returns)  # and none of them is left behind in the template
        assert decoder.decode(bytes(out), hint).placements == ()
    assert len(encoder._templates) == len(decoder._known) == 1


PLACE_AT, RETURN_AT = -(2 * 24 + 8 + 2 * 16), -(2 * 16)  # from the end of a message with two of each


@pytest.mark.parametrize(
    ("at", "layout", "value", "text"),
    [
        (PLACE_AT + 4, "<B", 1, "tensor 0 (segment, codec, offset, nbytes): (3, 1, 64, 24), expected (3, 0, 64, 24)"),
        (PLACE_AT + 5, "<B", 1, "tensor 0 (segment, codec, offset, nbytes): (3, 256, 64, 24), expected (3, 0, 64, 24)"),
        (PLACE_AT + 7, "<B", 128, "tensor 0 (segment, codec, offset, nbytes): (3, 2147483648, 64, 24), expected"),
        (PLACE_AT + 16, "<Q", 23, "tensor 0 (segment, codec, offset, nbytes): (3, 0, 64, 23), expected (3, 0, 64, 24)"),
        (PLACE_AT + 16, "<Q", 0, "tensor 0 (segment, codec, offset, nbytes): (3, 0, 64, 0), expected (3, 0, 64, 24)"),
        (PLACE_AT + 24 + 16, "<Q", 2**64 - 1, f"tensor 1 (segment, codec, offset, nbytes): (9, 0, 0, {2**64 - 1})"),
        (PLACE_AT, "<I", 0, "tensor 0 (segment, codec, offset, nbytes): (0, 0, 64, 24), expected (0, 0, 0, 24)"),
        (PLACE_AT + 24, "<I", 0, None),  # the second one in the payload: at 0, since the first is not
        (RETURN_AT, "<I", 0, "returns, segment: 0, expected a segment's number and zero padding"),
        (RETURN_AT + 16, "<I", 0, "returns, segment: 0, expected a segment's number and zero padding"),
        (RETURN_AT + 4, "<I", 1, f"returns, segment: {2**32 + 1}, expected a segment's number and zero padding"),
        (RETURN_AT + 8, "<Q", 2**64 - 1, None),  # whether there is such a place is for the arena to know
        (RETURN_AT - 4, "<I", 3, "returns"),  # their count
        (RETURN_AT - 4, "<I", 2**31, "returns"),
        (PLACE_AT - 4, "<I", 3, "placements"),
        (PLACE_AT - 4, "<I", 1, "placements: 1, expected 2, one for each tensor"),
        (PLACE_AT - 4, "<I", 0, "placements: 0, expected 2, one for each tensor"),
    ],
)
def test_every_number_is_checked_anew(at: int, layout: str, value: int, text: str | None) -> None:
    """In full and from the cache alike, which has seen this very shape before."""
    out, hint = Encoder(LIMITS).encode("f", TWO, {"n": 4}, (3, 64, 24, 9, 0, 5), (1, 2, 3, 4))
    decoder = Decoder(LIMITS)
    decoder.decode(bytes(out), hint)
    struct.pack_into(layout, out, len(out) + at, value)
    errors = set()
    for reader, varying in ((decoder, hint), (Decoder(LIMITS), hint), (Decoder(LIMITS), 0)):
        if text is None:
            reader.decode(bytes(out), varying)
            continue
        with pytest.raises(RemoteProtocolError) as caught:
            reader.decode(bytes(out), varying)
        assert f"metadata, {text}" in str(caught.value)
        errors.add(str(caught.value))
    assert len(errors) <= 1


def test_padding_between_the_vectors_is_not_believed_from_the_cache() -> None:
    """Bytes that say nothing may be anything, but a cached shape has them as they were: both read the same message."""
    out, hint = Encoder(LIMITS).encode("f", TWO, {"n": 4}, (3, 64, 24, 9, 0, 5), (1, 2, 3, 4))
    decoder = Decoder(LIMITS)
    message = decoder.decode(bytes(out), hint)
    for at in (RETURN_AT - 8, PLACE_AT - 8):
        changed = bytearray(out)
        changed[len(out) + at] = 1
        assert decoder.decode(bytes(changed), hint) == message == Decoder(LIMITS).decode(bytes(changed), 0)


def test_any_byte_of_places_and_returns_reads_the_same_with_and_without_the_cache() -> None:
    out, hint = Encoder(LIMITS).encode("f", TWO, {"n": 4, "x": 1.5}, (3, 64, 24, 9, 0, 5), (1, 2, 3, 4))
    decoder = Decoder(LIMITS)
    decoder.decode(bytes(out), hint)

    def read(reader: Decoder, data: bytes, varying: int) -> Any:
        try:
            return repr(reader.decode(data, varying))  # NaN is not even equal to itself
        except RemoteProtocolError as error:
            return error.args

    refused = 0
    for at in range(len(out) - hint - 8, len(out)):
        for value in (0, 1, 0x7F, 0x80, 0xFF):
            changed = bytearray(out)
            changed[at] = value
            outcome = read(decoder, bytes(changed), hint)
            assert outcome == read(Decoder(LIMITS), bytes(changed), 0), (at, value)
            refused += isinstance(outcome, tuple)
    assert refused > 100


def test_fewer_or_more_places_than_tensors() -> None:
    """By a writer of its own, since ours cannot."""
    for count in (0, 1, 3):
        builder = flatbuffers.Builder(256)
        gen.MessageStartPlacementsVector(builder, count)
        for _ in range(count):
            gen.CreatePlacement(builder, 3, 0, 0, 1)
        placements = builder.EndVector()
        tables = []
        for _ in range(2):
            gen.TensorStart(builder)
            gen.TensorAddDtype(builder, UINT8)
            tables.append(gen.TensorEnd(builder))
        gen.MessageStartTensorsVector(builder, 2)
        for table in tables:
            builder.PrependUOffsetTRelative(table)
        tensors = builder.EndVector()
        gen.MessageStart(builder)
        gen.MessageAddTensors(builder, tensors)
        gen.MessageAddPlacements(builder, placements)
        builder.Finish(gen.MessageEnd(builder), file_identifier=b"FSM1")
        with pytest.raises(RemoteProtocolError, match=f"placements: {count}, expected 2, one for each tensor"):
            Decoder(LIMITS).decode(bytes(builder.Output()), 0)


def test_returns_count_against_the_metadata_cap() -> None:
    encoder = Encoder(Limits(max_metadata_nbytes=4096))
    encoder.encode("f", [], {}, (), (1, 0) * 200)
    with pytest.raises(LimitError, match=r"'f', metadata: .* bytes, the peer accepts at most 4096"):
        encoder.encode("f", [], {}, (), (1, 0) * 300)


# ---- the compiled tables ---------------------------------------------------------------------------------------------


@pytest.fixture
def tables(core: str) -> tuple[Any, Any]:
    """An encoder's and a decoder's."""
    if core == "python":
        pytest.skip("there are none")
    return Encoder(LIMITS, typed=True).compiled, Decoder(LIMITS).compiled


@pytest.mark.parametrize("core", ["compiled"], indirect=True)
@each
def test_what_came_before_is_found_there(op: str, tensors: Any, attrs: Any) -> None:
    """All but lists to be sent, whose values are looked at in Python."""
    encoder, decoder = Encoder(LIMITS, typed=True), typed_decoder()
    out, hint = encoder.encode(op, tensors, attrs)
    assert encoder.compiled is not None and decoder.compiled is not None
    found = encoder.compiled.encode(op, tensors, attrs, (), ())
    assert found == (None if any(isinstance(value, list) for value in attrs.values()) else (out, hint))
    message = decoder.decode(bytes(out), hint)
    again = decoder.compiled.decode(bytes(out), hint)
    assert again == message and type(again) is Message and repr(again) == repr(message)


@pytest.mark.parametrize("core", ["compiled"], indirect=True)
def test_what_the_tables_leave_to_python(tables: tuple[Any, Any]) -> None:
    templates, heads = tables
    templates.add("f", [(FLOAT32, (2,))], {"n": 1}, 0, bytes(100), 40)
    assert len(templates) == 1 and templates.encode("f", [(FLOAT32, (2,))], {"n": 2}, (), ()) is not None
    for op, descs, attrs, placements, returns in (
        ("g", [(FLOAT32, (2,))], {"n": 1}, (), ()),
        ("f", [(FLOAT32, (3,))], {"n": 1}, (), ()),
        ("f", [(FLOAT32, (2, 1))], {"n": 1}, (), ()),
        ("f", [(FLOAT32, [2])], {"n": 1}, (), ()),
        ("f", [(FLOAT32,)], {"n": 1}, (), ()),
        ("f", [], {"n": 1}, (), ()),
        ("f", [(FLOAT32, (2,))], {"m": 1}, (), ()),
        ("f", [(FLOAT32, (2,))], {"n": True}, (), ()),
        ("f", [(FLOAT32, (2,))], {"n": 1.0}, (), ()),
        ("f", [(FLOAT32, (2,))], {"n": 2**63}, (), ()),
        ("f", [(FLOAT32, (2,))], {"n": np.int64(1)}, (), ()),
        ("f", [(FLOAT32, (2,))], {"n": 1, "m": 1}, (), ()),
        ("f", [(FLOAT32, (2,))], {}, (), ()),
        ("f", [(FLOAT32, (2,))], {"n": 1}, (1, 2), ()),
        ("f", [(FLOAT32, (2,))], {"n": 1}, (1, 2, -3), ()),
        ("f", [(FLOAT32, (2,))], {"n": 1}, (), (1, 2)),
        ("f", [(FLOAT32, (2**70,))], {"n": 1}, (), ()),
        ("f", [(FLOAT32, (2,))], {"n": 1}, None, ()),
        ("f", [(FLOAT32, (2,))], {"n": 1}, (), iter(())),
        ("f", iter([(FLOAT32, (2,))]), {"n": 1}, (), ()),
        (7, [(FLOAT32, (2,))], {"n": 1}, (), ()),
        ("f", 7, {"n": 1}, (), ()),
        ("f", [(FLOAT32, (2,))], {f"n{index}": 1 for index in range(100)}, (), ()),
    ):
        assert templates.encode(op, descs, attrs, placements, returns) is None
    for metadata, varying_nbytes in ((b"", 0), (b"x", 1), (b"x", -1), (b"x" * 100, 8), (b"x", 2**62)):
        assert heads.decode(metadata, varying_nbytes) is None


@pytest.mark.parametrize("core", ["compiled"], indirect=True)
def test_what_the_tables_refuse_to_keep(tables: tuple[Any, Any]) -> None:
    templates, heads = tables
    for varying_nbytes in (0, 8, 48, 2**62, -8):
        templates.add("f", [(FLOAT32, (2,))], {"n": 1}, 0, bytes(100), varying_nbytes)
    templates.add("f", [(FLOAT32, (2,))], {"n": 1}, 0, bytes(16), 40)
    assert len(templates) == 0
    message = Message("f", (), {}, 0)
    right = [b"head", message, None, 4, (("n", 1, 3, None),), ((0, 1),), 1, 4, 0]
    heads.add(*right)
    for index, wrong in (
        (3, -1),
        (3, 2**61),
        (4, (("n", 1, 4, None),)),
        (4, (("n", 4, 0, None),)),
        (4, (("n", 1, -1, None),)),
        (5, ((4, 1),)),
        (6, 5),
        (6, -1),
        (7, 5),
        (8, 1),
        (8, -1),
        (8, 2**62),
        (2, b"short"),
        (1, Message("f", ((8, (2,), -1),), {}, 0)),
        (1, Message("f", (7,), {}, 0)),
        (4, (7,)),
        (5, (7,)),
    ):
        with pytest.raises(ValueError, match="numbers that do not exist"):
            heads.add(*right[:index], wrong, *right[index + 1 :])
    for index, wrong in ((0, "head"), (1, ("f", (), {}, 0, (), ())), (4, [("n", 1, 3, None)]), (5, ((0,),))):
        with pytest.raises((TypeError, OverflowError)):
            heads.add(*right[:index], wrong, *right[index + 1 :])
    assert len(heads) == 1


@pytest.mark.parametrize("core", ["compiled"], indirect=True)
def test_the_oldest_is_forgotten(tables: tuple[Any, Any]) -> None:
    templates, heads = tables
    for index in range(2 * descriptor.CACHED_SHAPES):
        templates.add(f"op {index}", [], {}, 0, bytes(64), 0)
        heads.add(b"%d" % index, Message(f"op {index}", (), {}, 0), None, 0, (), (), 0, 0, 0)
        assert len(templates) == len(heads) == min(index + 1, descriptor.CACHED_SHAPES)
        assert templates.encode("op 0", [], {}, (), ()) == (
            (bytes(64), 0) if index < descriptor.CACHED_SHAPES else None
        )
    assert heads.decode(b"1023", 0).op == "op 1023" and heads.decode(b"0", 0) is None


def test_attributes_that_change_while_a_message_is_built() -> None:
    """What goes out is of one moment, and so is what is remembered of it."""

    class Changes:
        def __int__(self) -> int:
            attrs["status"] = "busy"
            return 7

    Integral.register(Changes)
    encoder, decoder = Encoder(LIMITS, typed=True), typed_decoder()
    attrs: dict[str, Any] = {"status": "ok", "n": Changes()}
    for text in ("ok", "busy"):
        out, hint = encoder.encode("f", [], attrs)
        assert decoder.decode(bytes(out), hint).attrs == {"status": text, "n": 7}
        out, hint = encoder.encode("f", [], {"status": text, "n": 7})
        assert decoder.decode(bytes(out), hint).attrs == {"status": text, "n": 7}


@pytest.mark.parametrize("core", ["compiled"], indirect=True)
def test_heads_without_a_type_of_messages() -> None:
    kind: Any = type(Decoder(LIMITS).compiled)
    with pytest.raises(TypeError, match="not initialized"):
        kind.__new__(kind).add(b"head", None, None, 0, (), (), 0, 0, 0)
    with pytest.raises(TypeError):
        kind(int)


@pytest.mark.parametrize("core", ["compiled"], indirect=True)
def test_a_collection_in_the_middle_of_a_message(tables: tuple[Any, Any]) -> None:
    """A finalizer finds the table busy: nothing that is in use goes away."""
    _, heads = tables
    heads.add(b"head", Message("f", (), {}, 0), None, 1, (("n", 1, 0, None),), (), 1, 1, 0)

    class Clears:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            heads.clear()

    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for number in range(300):
            Clears()
            message = heads.decode(b"head" + struct.pack("<q", number), 8)
            if message is None:  # cleared in between
                heads.add(b"head", Message("f", (), {}, 0), None, 1, (("n", 1, 0, None),), (), 1, 1, 0)
            else:
                assert message.attrs == {"n": number}
    finally:
        gc.set_threshold(*before)
