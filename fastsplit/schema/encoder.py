"""Writes metadata: FlatBuffers by template and patch (descriptor.py says why).

Rules. What goes out keeps to the peer's limits, checked by the same functions that the peer uses (limits.py). Errors
are raised before anything is sent.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import flatbuffers

from ..errors import LimitError, SettingError, shown
from . import message_generated as gen
from .attrs import Packed, as_dict, check_names, check_texts, is_unicode, min_nbytes, number_error, split
from .descriptor import (
    CACHED_SHAPES,
    CACHED_STRUCTURES,
    FILE_IDENTIFIER,
    MAX_CACHED_NBYTES,
    Attrs,
    Tail,
    inline_placements,
    keep,
)
from .dtypes import BY_CODE
from .limits import Limits, over

__all__ = ["Encoder", "Templates"]


class Templates(Protocol):
    """A compiled table of shapes that were built before (native/templates.c)."""

    def encode(
        self, op: str, tensors: Any, attrs: Any, placements: Sequence[int], returns: Sequence[int], /
    ) -> tuple[bytearray, int] | None:
        """What Encoder.encode returns; None if this shape is not known here, or cannot be."""

    def add(self, op: str, tensors: Any, attrs: Any, returns: int, metadata: bytes, varying_nbytes: int, /) -> None:
        """Keeps what was built for this shape, if it can. `returns`: numbers."""

    def clear(self) -> None:
        """Forgets all shapes."""


_INTS = gen.AttrType.Ints


class _Template(NamedTuple):
    metadata: bytes
    varying_nbytes: int  # bytes at the end that hold ints, floats, placements and returns
    numbers: struct.Struct | None  # of these bytes, None if there are none
    at: int  # where they begin
    is_final: bool  # whether nothing is to be patched if all tensors are inline
    inline: tuple[int, ...]
    dims_at: tuple[int, ...]  # where each tensor's dimensions lie; it does not matter of one that has none
    lists_at: dict[int, int]  # where lists of ints lie, by attribute
    placements_at: int
    gaps: tuple[tuple[int, ...], ...]  # the length words before floats, placements and returns; () for none


class Encoder:
    """Writes metadata. One for each connection; not thread-safe (the sender's lock covers it).

    `headroom`: zero bytes at the front of each result, for the frame's header. `typed`: whether the peer knows
    attributes of the types Bool, Floats and Bools; if not, a bool goes as an int and a list of floats is refused.
    """

    compiled: Templates | None = None
    """Asked first, and told of each shape that was built."""

    def __init__(self, limits: Limits, headroom: int = 0, *, typed: bool = False) -> None:
        self.limits = limits
        self._headroom = headroom
        self._typed = typed
        self._templates: dict[tuple[Any, ...], _Template] = {}
        self._structures: dict[tuple[Any, ...], _Template] = {}
        """One of each kind of message, whatever the dimensions of its tensors."""

    def encode(
        self,
        op: str,
        tensors: Sequence[tuple[int, tuple[int, ...]]],
        attrs: Attrs,
        placements: Sequence[int] = (),
        returns: Sequence[int] = (),
    ) -> tuple[bytearray, int]:
        """The metadata of one message, and how many bytes at its end vary between messages of this shape.

        `tensors`: (dtype code, shape) of arrays that exist, so that they are valid. `placements`: segment (its coding
        in the upper half), offset and nbytes of each tensor, flat; empty if all are in the frame's payload, uncoded.
        `returns`: segment and offset, flat.

        Raises LimitError over the peer's caps, SettingError for an op or an attribute that cannot be sent.
        """
        if self.compiled is not None:
            found = self.compiled.encode(op, tensors, attrs, placements, returns)
            if found is not None:
                return found
        key: tuple[Any, ...]
        signature: Sequence[Any]
        ints: Sequence[int]
        floats: Sequence[float]
        names: tuple[str, ...] = ()
        if attrs:
            # A copy: a handler may have set its reply's to anything, also to what another thread changes meanwhile.
            attrs = dict(attrs) if type(attrs) is dict else as_dict("attributes", attrs)
            names = tuple(attrs)
            signature, ints, floats = split(attrs, self._typed)
            key = (op, tuple(tensors), len(returns), names, signature)
        else:
            signature = ints = floats = ()
            key = (op, tuple(tensors), len(returns))
        try:
            template = self._templates.get(key)
        except TypeError:  # not hashable: only `op` can be that
            raise _op_error(op) from None
        if template is None:
            ranks = tuple([(code, len(shape)) for code, shape in tensors])
            structure = (op, ranks, len(returns), names, tuple([_without_ints(value) for value in signature]))
            alike = self._structures.get(structure)
            if alike is None:
                template = self._build(op, tensors, names, signature, len(returns) // 2)
            else:
                template = self._reshape(alike, op, tensors, names, signature)
            if len(template.metadata) <= MAX_CACHED_NBYTES and not (alike and template.lists_at):
                keep(self._structures, structure, template, CACHED_STRUCTURES)
                keep(self._templates, key, template, CACHED_SHAPES)
                if self.compiled is not None:
                    self.compiled.add(op, tensors, attrs, len(returns), template.metadata, template.varying_nbytes)
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
                raise number_error(attrs, signature, ints) from None
        return out, template.varying_nbytes

    def forget(self) -> None:
        """Forgets all shapes: so that a benchmark sees a new one."""
        self._templates.clear()
        self._structures.clear()
        if self.compiled is not None:
            self.compiled.clear()

    def _build(
        self,
        op: str,
        tensors: Sequence[tuple[int, tuple[int, ...]]],
        names: Sequence[str],
        signature: Sequence[Any],
        returns: int,
    ) -> _Template:
        self._check(op, tensors, names, signature)
        ints, floats = (sum(kind in kinds for kind in signature) for kinds in ((int, bool), (float,)))
        builder = flatbuffers.Builder(512)
        inline = _inline(tensors)
        # A Builder writes from the end backwards: what is created first lies last.
        returns_vector = _build_returns(builder, returns)
        placements = _build_placements(builder, inline)
        floats_vector = _build_vector(builder, gen.MessageStartFloatsVector, builder.PrependFloat64, [0.0] * floats)
        ints_vector = _build_vector(builder, gen.MessageStartIntsVector, builder.PrependInt64, [0] * ints)
        dims, tensor_tables = [], []
        for code, shape in tensors:
            table, vector = _build_tensor(builder, code, shape)
            tensor_tables.append(table)
            dims.append(vector)
        attr_tables, lists = _build_attrs(builder, names, signature)
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
        self.limits.check_metadata("metadata", len(body), functools.partial(_over, op))
        tail = Tail(ints, floats, len(tensors), returns)
        metadata = bytes(self._headroom) + body
        gaps = tuple(
            (count << 32,) if count and before else ()
            for count, before in (
                (floats, ints),
                (len(tensors), ints + floats),
                (returns, ints + floats + len(tensors)),
            )
        )
        is_final = not (ints or floats or returns)
        return _Template(
            metadata,
            tail.nbytes,
            tail.numbers,
            len(metadata) - tail.nbytes,
            is_final,
            inline,
            tuple([len(metadata) - vector + 4 for vector in dims]),  # behind the length; vectors count from the end
            {index: len(metadata) - vector + 4 for index, vector in lists.items()},
            len(metadata) - tail.placements_back,
            gaps,
        )

    def _reshape(
        self,
        template: _Template,
        op: str,
        tensors: Sequence[tuple[int, tuple[int, ...]]],
        names: Sequence[str],
        signature: Sequence[Any],
    ) -> _Template:
        """The template of a message that differs from another one in the dimensions of its tensors, and in lists of
        ints of the same lengths."""
        self._check_tensors(op, tensors)
        metadata = bytearray(template.metadata)
        for at, (_, shape) in zip(template.dims_at, tensors):
            if shape:
                struct.pack_into(f"<{len(shape)}Q", metadata, at, *shape)
        inline = _inline(tensors)
        struct.pack_into(f"<{len(inline)}Q", metadata, template.placements_at, *inline)
        for index, at in template.lists_at.items():
            try:
                struct.pack_into(f"<{len(signature[index])}q", metadata, at, *signature[index])
            except struct.error:
                raise _ints_error(names[index], signature[index]) from None
        return template._replace(metadata=bytes(metadata), inline=inline)

    def _check(
        self, op: str, tensors: Sequence[tuple[int, tuple[int, ...]]], names: Sequence[str], signature: Sequence[Any]
    ) -> None:
        if not isinstance(op, str):
            raise _op_error(op)
        if not is_unicode(op):
            raise SettingError(f"op: {shown(op)}, expected valid Unicode")
        check_names(op, names)
        limits, excess = self.limits, functools.partial(_over, op)
        limits.check_tensors(len(tensors), excess)
        limits.check_attrs(len(names), excess)
        self._check_tensors(op, tensors)
        # before the Builder sees them: it has limits of its own
        sizes = list(map(min_nbytes, names, signature))
        for name, size in zip(names, sizes):
            limits.check_metadata(f"attribute {shown(name)}", size, excess)
        limits.check_metadata("texts and lists", len(op) + sum(sizes), excess)
        for name, value in zip(names, signature):
            check_texts(name, value)

    def _check_tensors(self, op: str, tensors: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        limits, excess = self.limits, functools.partial(_over, op)
        nbytes = 0
        for index, (code, shape) in enumerate(tensors):
            itemsize = BY_CODE[code].itemsize
            limits.check_dims(f"tensor {index}", len(shape), excess)
            limits.check_shape(f"tensor {index}", shape, itemsize, excess)
            nbytes += math.prod(shape) * itemsize
        limits.check_nbytes(nbytes, excess)


def _inline(tensors: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[int, ...]:
    return inline_placements([math.prod(shape) * BY_CODE[code].itemsize for code, shape in tensors])


def _over(op: str, field: str, came: str, accepted: str) -> LimitError:
    return over(f"{op!r}, {field}" if op else field, came, accepted)  # a reply has no op


def _op_error(op: object) -> SettingError:
    return SettingError(f"op: {shown(op)}, expected a string")


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


def _build_tensor(builder: Any, code: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """The offsets of its table and of its dimensions, from the end of the buffer; the latter 0 without any."""
    dims = _build_vector(builder, gen.TensorStartShapeVector, builder.PrependUint64, shape)
    gen.TensorStart(builder)
    gen.TensorAddDtype(builder, code)
    if dims is not None:
        gen.TensorAddShape(builder, dims)
    return int(gen.TensorEnd(builder)), dims or 0


def _build_attrs(builder: Any, names: Sequence[str], signature: Sequence[Any]) -> tuple[list[int], dict[int, int]]:
    """The offsets of the tables, and of lists of ints by attribute."""
    tables = []
    lists: dict[int, int] = {}
    ints = floats = 0
    for number, (name, value) in enumerate(zip(names, signature)):
        name_offset = builder.CreateString(str.__str__(name))
        index, add, offset = 0, None, None
        if value is int or value is bool:
            kind = gen.AttrType.Int if value is int else gen.AttrType.Bool
            index, ints = ints, ints + 1
        elif value is float:
            kind, index, floats = gen.AttrType.Float, floats, floats + 1
        elif isinstance(value, str):
            kind, add, offset = gen.AttrType.String, gen.AttrAddText, builder.CreateString(value)
        elif isinstance(value, bytes):
            kind, add, offset = gen.AttrType.Bytes, gen.AttrAddData, builder.CreateByteVector(value)
        elif isinstance(value, Packed) and value.kind == gen.AttrType.Bools:
            kind, add, offset = gen.AttrType.Bools, gen.AttrAddData, builder.CreateByteVector(value.data)
        elif isinstance(value, Packed):
            kind, add = gen.AttrType.Floats, gen.AttrAddFloatList
            numbers = [number for (number,) in struct.iter_unpack("<d", value.data)]
            offset = _build_vector(builder, gen.AttrStartFloatListVector, builder.PrependFloat64, numbers)
        elif value and isinstance(value[0], str):
            kind, add = gen.AttrType.Strings, gen.AttrAddTextList
            texts = [builder.CreateString(text) for text in value]
            offset = _build_vector(builder, gen.AttrStartTextListVector, builder.PrependUOffsetTRelative, texts)
        else:
            kind, add = gen.AttrType.Ints, gen.AttrAddIntList
            try:
                offset = _build_vector(builder, gen.AttrStartIntListVector, builder.PrependInt64, value)
            except (TypeError, ValueError, struct.error):  # flatbuffers', of an int beyond 64 bits or 4300 digits
                raise _ints_error(name, value) from None
            if offset is not None:
                lists[number] = offset
        gen.AttrStart(builder)
        gen.AttrAddName(builder, name_offset)
        gen.AttrAddType(builder, kind)
        gen.AttrAddIndex(builder, index)
        if add is not None and offset is not None:
            add(builder, offset)
        tables.append(int(gen.AttrEnd(builder)))
    return tables, lists


def _ints_error(name: str, value: Any) -> SettingError:
    return SettingError(f"attribute {shown(name)}: {shown(value)}, expected ints of 64 bits")


def _without_ints(value: Any) -> Any:
    """A value of a signature; of a list of ints its length alone."""
    is_ints = type(value) is tuple and (not value or type(value[0]) is int)
    return (_INTS, len(value)) if is_ints else value
