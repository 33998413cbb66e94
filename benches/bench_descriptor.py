"""What it costs to say what a message holds: encode + decode of the metadata of two float32 tensors.

Four ways over the same content: fastsplit's codec (templates patched, heads recognised), the same on shapes it sees for
the first time, FlatBuffers as its tutorial writes it (Builder, generated accessors, nothing validated), and msgpack
(nothing validated either). Each one's result is checked once before it is timed.

    python -m pytest benches/bench_descriptor.py
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flatbuffers
import msgpack
import pytest

from benches.environment import OUTPUT, describe, save
from fastsplit.schema import message_generated as gen
from fastsplit.schema.decoder import Decoder
from fastsplit.schema.descriptor import Attrs
from fastsplit.schema.dtypes import BY_CODE
from fastsplit.schema.encoder import Encoder
from fastsplit.schema.limits import Limits

OP = "linear"
FLOAT32 = 12
TENSORS = [(FLOAT32, (1024, 2048)), (FLOAT32, (2048,))]
ATTRS: dict[str, Attrs] = {"no attrs": {}, "3 attrs": {"layer": 3, "by": 2.5, "which": "qkv"}}
Content = tuple[str, list[tuple[int, tuple[int, ...]]], Attrs]

_HEADER_NBYTES = 40  # what a channel leaves free in front


_results: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="module", autouse=True)
def _saved(pytestconfig: pytest.Config) -> Iterator[None]:
    """Writes what was measured."""
    yield
    if _results:
        command = ["python", "-m", "pytest", "benches/bench_descriptor.py"]
        output = pytestconfig.getoption("--output", None) or OUTPUT / "descriptor.json"
        print(save({"environment": describe(command), "unit": "us", "systems": _results}, output))


@pytest.mark.parametrize("attrs", ATTRS.values(), ids=ATTRS)
def test_fastsplit(benchmark: Any, attrs: Attrs) -> None:
    encoder, decoder = Encoder(Limits(), _HEADER_NBYTES), Decoder(Limits())

    def run() -> Any:
        frame, varying_nbytes = encoder.encode(OP, TENSORS, attrs)
        # A receiver has the metadata inside its staging buffer: cutting it out is part of the cost.
        return decoder.decode(bytes(memoryview(frame)[_HEADER_NBYTES:]), varying_nbytes)

    _check(run())
    _compare(benchmark, attrs, run)


@pytest.mark.parametrize("attrs", ATTRS.values(), ids=ATTRS)
def test_fastsplit_new_shape(benchmark: Any, attrs: Attrs) -> None:
    encoder, decoder = Encoder(Limits(), _HEADER_NBYTES), Decoder(Limits())
    rows = itertools.count(1)

    def run() -> Any:
        tensors = [(FLOAT32, (next(rows), 2048)), (FLOAT32, (2048,))]
        frame, varying_nbytes = encoder.encode(OP, tensors, attrs)
        return decoder.decode(bytes(memoryview(frame)[_HEADER_NBYTES:]), varying_nbytes)

    assert [desc.shape for desc in run().tensors] == [(1, 2048), (2048,)]
    _compare(benchmark, attrs, run)


@pytest.mark.parametrize("attrs", ATTRS.values(), ids=ATTRS)
def test_flatbuffers_builder(benchmark: Any, attrs: Attrs) -> None:
    def run() -> Content:
        return _read_with_accessors(_write_with_builder(attrs))

    assert run() == (OP, TENSORS, attrs)
    # Any FlatBuffers reader reads what our codec writes: the same accessors find the same content in it.
    frame, _ = Encoder(Limits(), _HEADER_NBYTES).encode(OP, TENSORS, attrs)
    assert _read_with_accessors(bytes(frame[_HEADER_NBYTES:])) == (OP, TENSORS, attrs)
    _compare(benchmark, attrs, run)


@pytest.mark.parametrize("attrs", ATTRS.values(), ids=ATTRS)
def test_msgpack(benchmark: Any, attrs: Attrs) -> None:
    def run() -> Content:
        packed = msgpack.packb({"op": OP, "tensors": TENSORS, "attrs": attrs})
        message = msgpack.unpackb(packed)
        return message["op"], [(code, tuple(shape)) for code, shape in message["tensors"]], message["attrs"]

    assert run() == (OP, TENSORS, attrs)
    _compare(benchmark, attrs, run)


def _compare(benchmark: Any, attrs: Attrs, run: Callable[[], Any]) -> None:
    benchmark.group = "encode + decode, " + next(name for name, value in ATTRS.items() if value is attrs)
    benchmark(run)
    if benchmark.stats is not None:  # None where it runs as a test only
        stats = benchmark.stats.stats
        _results[benchmark.name] = {
            "median": stats.median * 1e6,
            "min": stats.min * 1e6,
            "iqr": stats.iqr * 1e6,
            "rounds": stats.rounds,
        }


def _check(message: Any) -> None:
    assert message.op == OP
    assert [(desc.dtype.code, desc.shape) for desc in message.tensors] == TENSORS
    assert message.payload_nbytes == sum(math.prod(shape) * BY_CODE[code].itemsize for code, shape in TENSORS)


# ---- FlatBuffers as its tutorial writes it ---------------------------------------------------------------------------


def _write_with_builder(attrs: Attrs) -> bytes:
    builder = flatbuffers.Builder(512)
    op = builder.CreateString(OP)
    tensors = []
    for code, shape in TENSORS:
        gen.TensorStartShapeVector(builder, len(shape))
        for dim in reversed(shape):
            builder.PrependUint64(dim)
        dims = builder.EndVector()
        gen.TensorStart(builder)
        gen.TensorAddDtype(builder, code)
        gen.TensorAddShape(builder, dims)
        tensors.append(gen.TensorEnd(builder))
    gen.MessageStartTensorsVector(builder, len(tensors))
    for tensor in reversed(tensors):
        builder.PrependUOffsetTRelative(tensor)
    tensors_vector = builder.EndVector()
    gen.MessageStartPlacementsVector(builder, len(TENSORS))
    ends = list(itertools.accumulate(math.prod(shape) * BY_CODE[code].itemsize for code, shape in TENSORS))
    for start, end in reversed(list(zip([0, *ends], ends))):
        gen.CreatePlacement(builder, 0, 0, start, end - start)
    placements = builder.EndVector()
    attrs_vector, ints, floats = _write_attrs(builder, attrs) if attrs else (None, None, None)
    gen.MessageStart(builder)
    gen.MessageAddOp(builder, op)
    gen.MessageAddTensors(builder, tensors_vector)
    gen.MessageAddPlacements(builder, placements)
    if attrs:
        gen.MessageAddAttrs(builder, attrs_vector)
        gen.MessageAddInts(builder, ints)
        gen.MessageAddFloats(builder, floats)
    builder.Finish(gen.MessageEnd(builder), file_identifier=b"FSM1")
    return bytes(builder.Output())


def _write_attrs(builder: Any, attrs: Attrs) -> tuple[int, int, int]:
    tables = []
    numbers: dict[type, list[Any]] = {int: [], float: []}
    for name, value in attrs.items():
        name_offset = builder.CreateString(name)
        text = builder.CreateString(value) if isinstance(value, str) else None
        gen.AttrStart(builder)
        gen.AttrAddName(builder, name_offset)
        if text is not None:
            gen.AttrAddType(builder, gen.AttrType.String)
            gen.AttrAddText(builder, text)
        else:
            gen.AttrAddType(builder, gen.AttrType.Int if isinstance(value, int) else gen.AttrType.Float)
            gen.AttrAddIndex(builder, len(numbers[type(value)]))
            numbers[type(value)].append(value)
        tables.append(gen.AttrEnd(builder))
    gen.MessageStartAttrsVector(builder, len(tables))
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    vector = builder.EndVector()
    gen.MessageStartIntsVector(builder, len(numbers[int]))
    for value in reversed(numbers[int]):
        builder.PrependInt64(value)
    ints = builder.EndVector()
    gen.MessageStartFloatsVector(builder, len(numbers[float]))
    for value in reversed(numbers[float]):
        builder.PrependFloat64(value)
    return vector, ints, builder.EndVector()


def _read_with_accessors(metadata: bytes) -> Content:
    message = gen.Message.GetRootAs(metadata)
    tensors = []
    for index in range(message.TensorsLength()):
        tensor = message.Tensors(index)
        tensors.append((tensor.Dtype(), tuple(tensor.Shape(axis) for axis in range(tensor.ShapeLength()))))
    attrs: dict[str, Any] = {}
    for index in range(message.AttrsLength()):
        attr = message.Attrs(index)
        kind = attr.Type()
        if kind == gen.AttrType.Int:
            value: Any = message.Ints(attr.Index())
        elif kind == gen.AttrType.Float:
            value = message.Floats(attr.Index())
        else:
            value = attr.Text().decode()
        attrs[attr.Name().decode()] = value
    for index in range(message.PlacementsLength()):
        placement = message.Placements(index)
        assert placement.Nbytes() == math.prod(tensors[index][1]) * BY_CODE[tensors[index][0]].itemsize
    return message.Op().decode(), tensors, attrs
