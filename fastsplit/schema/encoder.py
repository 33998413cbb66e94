"""Writes metadata: FlatBuffers by template and patch (descriptor.py says why).

Rules. What goes out keeps to the peer's limits. Errors are ours, and are raised before anything is sent.
"""

from __future__ import annotations

import math
import numbers
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import flatbuffers

from ..errors import LimitError, LocalProtocolError
from . import message_generated as gen
from .descriptor import CACHED_SHAPES, FILE_IDENTIFIER, MAX_CACHED_NBYTES, Attrs, Tail, inline_placements
from .dtypes import BY_CODE
from .limits import Limits

__all__ = ["Encoder"]

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


class _Template(NamedTuple):
    metadata: bytes
    varying_nbytes: int  # bytes at the end that hold ints, floats, placements and returns
    numbers: struct.Struct | None  # these with what stands between them; None if there are none
    at: int
    is_final: bool  # whether there is nothing to patch where all tensors are inline
    inline: tuple[int, ...]
    gaps: tuple[tuple[int, ...], ...]  # the length words before floats, placements and returns; () for none


class Encoder:
    """Writes metadata. One for each connection and direction; not thread-safe (the sender's lock covers it).

    `headroom` zero bytes are left at the front of each result, for the frame header.
    """

    def __init__(self, limits: Limits, headroom: int = 0) -> None:
        self.limits = limits
        self._headroom = headroom
        self._templates: dict[tuple[Any, ...], _Template] = {}

    def encode(
        self,
        op: str,
        tensors: Sequence[tuple[int, tuple[int, ...]]],
        attrs: Attrs,
        placements: Sequence[int] = (),
        returns: Sequence[int] = (),
    ) -> tuple[bytearray, int]:
        """The metadata of one message, and how many bytes at its end vary between messages of this shape.

        `tensors` are (dtype code, shape) pairs, valid ones: they come from arrays that exist. `placements`: segment
        (its coding in the upper half), offset and nbytes of each, flat; empty if all are in the frame's payload as they
        are in memory. `returns`: segment and offset, flat.
        Raises LimitError over the peer's caps, LocalProtocolError for an attribute that cannot travel.
        """
        key: tuple[Any, ...]
        ints: Sequence[int]
        floats: Sequence[float]
        if attrs:
            signature, ints, floats = _split_attrs(attrs)
            key = (op, tuple(tensors), len(returns), tuple(attrs), signature)
        else:
            ints = floats = ()
            key = (op, tuple(tensors), len(returns))
        template = self._templates.get(key)
        if template is None:
            try:
                template = self._build(op, tensors, attrs, ints, floats, len(returns) // 2)
            except UnicodeEncodeError as error:
                raise LocalProtocolError(f"{op!r}: the text {error.object!r}, which is not valid Unicode") from None
            if len(template.metadata) <= MAX_CACHED_NBYTES:
                if len(self._templates) >= CACHED_SHAPES:
                    del self._templates[next(iter(self._templates))]
                self._templates[key] = template
        out = bytearray(template.metadata)
        if template.numbers is not None and (placements or not template.is_final):
            before_floats, before_placements, before_returns = template.gaps
            try:
                template.numbers.pack_into(
                    out,
                    template.at,
                    *ints,
                    *before_floats,
                    *floats,
                    *before_placements,
                    *(placements or template.inline),
                    *before_returns,
                    *returns,
                )
            except struct.error:
                raise _int_error(attrs) from None
        return out, template.varying_nbytes

    def _build(
        self,
        op: str,
        tensors: Sequence[tuple[int, tuple[int, ...]]],
        attrs: Attrs,
        ints: Sequence[int],
        floats: Sequence[float],
        returns: int,
    ) -> _Template:
        self._check(op, tensors, attrs)
        builder = flatbuffers.Builder(512)
        inline = inline_placements([math.prod(shape) * BY_CODE[code].itemsize for code, shape in tensors])
        # A Builder writes from the end backwards: what is created first lies last.
        returns_vector = _build_returns(builder, returns)
        placements = _build_placements(builder, inline)
        floats_vector = _build_vector(builder, gen.MessageStartFloatsVector, builder.PrependFloat64, floats)
        ints_vector = _build_vector(builder, gen.MessageStartIntsVector, builder.PrependInt64, [0 for _ in ints])
        tensor_tables = [_build_tensor(builder, code, shape) for code, shape in tensors]
        attr_tables = _build_attrs(builder, attrs)
        tensors_vector = _build_vector(
            builder, gen.MessageStartTensorsVector, builder.PrependUOffsetTRelative, tensor_tables
        )
        attrs_vector = _build_vector(builder, gen.MessageStartAttrsVector, builder.PrependUOffsetTRelative, attr_tables)
        op_string = builder.CreateString(op) if op else None
        gen.MessageStart(builder)
        for add, offset in (
            (gen.MessageAddOp, op_string),
            (gen.MessageAddTensors, tensors_vector),
            (gen.MessageAddAttrs, attrs_vector),
            (gen.MessageAddInts, ints_vector),
            (gen.MessageAddFloats, floats_vector),
            (gen.MessageAddPlacements, placements),
            (gen.MessageAddReturns, returns_vector),
        ):
            if offset is not None:
                add(builder, offset)
        builder.Finish(gen.MessageEnd(builder), file_identifier=FILE_IDENTIFIER)
        body = bytes(builder.Output())
        if len(body) > self.limits.max_metadata_nbytes:
            raise LimitError(
                f"metadata of {op!r}: {len(body)} bytes, the peer accepts {self.limits.max_metadata_nbytes}"
            )
        tail = Tail(len(ints), len(floats), len(tensors), returns)
        metadata = bytes(self._headroom) + body
        gaps = tuple(
            (count << 32,) if count and before else ()
            for count, before in (
                (len(floats), len(ints)),
                (len(tensors), len(ints) + len(floats)),
                (returns, len(ints) + len(floats) + len(tensors)),
            )
        )
        is_final = not (ints or floats or returns)
        return _Template(metadata, tail.nbytes, tail.numbers, len(metadata) - tail.nbytes, is_final, inline, gaps)

    def _check(self, op: str, tensors: Sequence[tuple[int, tuple[int, ...]]], attrs: Attrs) -> None:
        limits = self.limits
        if not isinstance(op, str):
            raise LocalProtocolError(f"op: {op!r}, expected a string")
        if "" in attrs:
            raise LocalProtocolError(f"{op!r}: an attribute without a name")
        if len(tensors) > limits.max_tensors:
            raise LimitError(f"{op!r}: {len(tensors)} tensors, the peer accepts {limits.max_tensors} in one message")
        if len(attrs) > limits.max_attrs:
            raise LimitError(f"{op!r}: {len(attrs)} attributes, the peer accepts {limits.max_attrs} in one message")
        nbytes = 0
        for index, (code, shape) in enumerate(tensors):
            if len(shape) > limits.max_dims:
                raise LimitError(f"{op!r} tensor {index}: {len(shape)} dimensions, the peer accepts {limits.max_dims}")
            nbytes += math.prod(shape) * BY_CODE[code].itemsize
        if nbytes > limits.max_message_nbytes:
            raise LimitError(
                f"{op!r}: {nbytes} bytes of tensors, the peer accepts {limits.max_message_nbytes} in one message"
            )


def _split_attrs(attrs: Attrs) -> tuple[tuple[Any, ...], list[int], list[float]]:
    """What of the attributes belongs to the message's shape, and the numbers that do not."""
    signature: list[Any] = []
    ints: list[int] = []
    floats: list[float] = []
    for name, value in attrs.items():
        kind = type(value)
        if kind is int:
            ints.append(value)  # type: ignore[arg-type]
            signature.append(int)
        elif kind is float:
            floats.append(value)  # type: ignore[arg-type]
            signature.append(float)
        elif kind is str or kind is bytes:
            signature.append(value)
        elif isinstance(value, numbers.Integral):  # bool and numpy's integers
            ints.append(int(value))
            signature.append(int)
        elif isinstance(value, numbers.Real):
            floats.append(float(value))
            signature.append(float)
        elif isinstance(value, (bytearray, memoryview)):
            signature.append(bytes(value))
        elif isinstance(value, (list, tuple)) and (
            all(type(item) is int for item in value) or all(type(item) is str for item in value)
        ):
            signature.append(tuple(value))
        else:
            raise LocalProtocolError(
                f"attribute {name!r}: {value!r}, expected an int, float, str, bytes, or a list of ints or of strings"
            )
    return tuple(signature), ints, floats


def _int_error(attrs: Attrs) -> LocalProtocolError:
    for name, value in attrs.items():
        if isinstance(value, int) and not _INT64_MIN <= value <= _INT64_MAX:
            return LocalProtocolError(f"attribute {name!r}: {value}, expected an int of 64 bits")
    return LocalProtocolError("an attribute's number does not fit its field")


def _build_vector(builder: Any, start: Any, prepend: Any, values: Sequence[Any]) -> int | None:
    if not values:
        return None
    start(builder, len(values))
    for value in reversed(values):
        prepend(value)
    return int(builder.EndVector())


def _build_placements(builder: Any, flat: Sequence[int]) -> int | None:
    if not flat:
        return None
    gen.MessageStartPlacementsVector(builder, len(flat) // 3)
    for at in range(len(flat) - 3, -1, -3):
        gen.CreatePlacement(builder, flat[at], 0, flat[at + 1], flat[at + 2])
    return int(builder.EndVector())


def _build_returns(builder: Any, count: int) -> int | None:
    if not count:
        return None
    gen.MessageStartReturnsVector(builder, count)
    for _ in range(count):
        gen.CreateReturn(builder, 0, 0)
    return int(builder.EndVector())


def _build_tensor(builder: Any, code: int, shape: tuple[int, ...]) -> int:
    dims = _build_vector(builder, gen.TensorStartShapeVector, builder.PrependUint64, shape)
    gen.TensorStart(builder)
    gen.TensorAddDtype(builder, code)
    if dims is not None:
        gen.TensorAddShape(builder, dims)
    return int(gen.TensorEnd(builder))


def _build_attrs(builder: Any, attrs: Attrs) -> list[int]:
    tables = []
    ints = floats = 0
    signature, _, _ = _split_attrs(attrs)
    for name, value in zip(attrs, signature):
        name_offset = builder.CreateString(name)
        index, add, offset = 0, None, None
        if value is int:
            kind, index, ints = gen.AttrType.Int, ints, ints + 1
        elif value is float:
            kind, index, floats = gen.AttrType.Float, floats, floats + 1
        elif isinstance(value, str):
            kind, add, offset = gen.AttrType.String, gen.AttrAddText, builder.CreateString(value)
        elif isinstance(value, bytes):
            kind, add, offset = gen.AttrType.Bytes, gen.AttrAddData, builder.CreateByteVector(value)
        elif value and isinstance(value[0], str):
            kind, add = gen.AttrType.Strings, gen.AttrAddTextList
            texts = [builder.CreateString(text) for text in value]
            offset = _build_vector(builder, gen.AttrStartTextListVector, builder.PrependUOffsetTRelative, texts)
        else:
            kind, add = gen.AttrType.Ints, gen.AttrAddIntList
            try:
                offset = _build_vector(builder, gen.AttrStartIntListVector, builder.PrependInt64, value)
            except (TypeError, struct.error):
                raise LocalProtocolError(f"attribute {name!r}: {value!r}, expected ints of 64 bits") from None
        gen.AttrStart(builder)
        gen.AttrAddName(builder, name_offset)
        gen.AttrAddType(builder, kind)
        gen.AttrAddIndex(builder, index)
        if add is not None and offset is not None:
            add(builder, offset)
        tables.append(int(gen.AttrEnd(builder)))
    return tables
