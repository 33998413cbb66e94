"""Tensor descriptions and message metadata: FlatBuffers out by template and patch, FlatBuffers in with full validation.

Why templates. Building a FlatBuffers message field by field in Python costs tens of microseconds, and nearly all
messages of a connection have one of a few shapes. So an Encoder builds each *shape* (op, tensor dtypes and dims,
attribute names and texts) once with the generated code, keeps the bytes, and per message only patches the attribute
numbers. A Decoder does the same in reverse: what stands before the numbers is looked up as one byte string that was
fully validated when it came first; only the numbers are read anew. Measured on a two-tensor message (benches/
bench_descriptor.py): encode + decode take 1 us, 2.6 us with three attributes; Builder + accessors 76 and 141 us.

Rules. Nothing else in fastsplit touches the generated code. Nothing from the peer is believed: every offset, length,
count, string and number is checked against the buffer and the limits before it is used, and an error names the field,
what came and what was expected. (flat.py reads FlatBuffers' primitives, this module what our schema makes of them.) A
cached head is only trusted if no part of what it describes lies in the bytes that vary, so a hit means what a full
decode would have meant. Caches are bounded; each connection has its own.
"""

from __future__ import annotations

import math
import numbers
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flatbuffers

from ..errors import LimitError, LocalProtocolError
from . import message_generated as gen
from .dtypes import BY_CODE, DType
from .flat import NO_VECTOR, U8, U32, Reader, Table, Vector
from .limits import Limits

__all__ = ["AttrValue", "Attrs", "Decoder", "Encoder", "Message", "TensorDesc"]

AttrValue = int | float | str | bytes | Sequence[int] | Sequence[str]
Attrs = Mapping[str, AttrValue]

_FILE_IDENTIFIER = b"FSM1"
_CACHED_SHAPES = 512  # per connection and direction; a few hundred bytes each, as a rule
_MAX_CACHED_NBYTES = 8 * 1024  # of metadata: larger ones are rare, and a hostile peer could make us keep many
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_PLACEMENT_NBYTES = 24
_PLACEMENT = struct.Struct("<IB3xQQ")  # segment, codec, offset, nbytes


class TensorDesc(NamedTuple):
    """What one tensor is: dtype, shape in elements, bytes in row-major order. Immutable."""

    dtype: DType
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, dtype: DType, shape: Sequence[int]) -> TensorDesc:
        """The description of a tensor of ours: `shape` is taken as it is."""
        return cls(dtype, tuple(shape), math.prod(shape) * dtype.itemsize)

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"


class Message(NamedTuple):
    """The metadata of one frame, decoded. `attrs` is the receiver's own, but for an empty one, which may be shared."""

    op: str
    tensors: tuple[TensorDesc, ...]
    attrs: dict[str, Any]
    payload_nbytes: int


# ---- out -------------------------------------------------------------------------------------------------------------


class _Template(NamedTuple):
    metadata: bytes
    varying_nbytes: int  # bytes at the end that hold ints, floats and placements
    numbers: struct.Struct | None  # ints and floats with what stands between them; None if there are none
    numbers_at: int
    gap: tuple[int, ...]  # the length word between the ints and the floats


class Encoder:
    """Writes metadata. One for each connection and direction; not thread-safe (the sender's lock covers it).

    `headroom` zero bytes are left at the front of each result, for the frame header.
    """

    def __init__(self, limits: Limits, headroom: int = 0) -> None:
        self.limits = limits
        self._headroom = headroom
        self._templates: dict[tuple[Any, ...], _Template] = {}

    def encode(self, op: str, tensors: Sequence[tuple[int, tuple[int, ...]]], attrs: Attrs) -> tuple[bytearray, int]:
        """The metadata of one message, and how many bytes at its end vary between messages of this shape.

        `tensors` are (dtype code, shape) pairs, valid ones: they come from arrays that exist.
        Raises LimitError over the peer's caps, LocalProtocolError for an attribute that cannot travel.
        """
        key: tuple[Any, ...]
        ints: Sequence[int]
        floats: Sequence[float]
        if attrs:
            signature, ints, floats = _split_attrs(attrs)
            key = (op, tuple(tensors), tuple(attrs), signature)
        else:
            ints = floats = ()
            key = (op, tuple(tensors))
        template = self._templates.get(key)
        if template is None:
            try:
                template = self._build(op, tensors, attrs, ints, floats)
            except UnicodeEncodeError as error:
                raise LocalProtocolError(f"{op!r}: the text {error.object!r}, which is not valid Unicode") from None
            if len(template.metadata) <= _MAX_CACHED_NBYTES:
                if len(self._templates) >= _CACHED_SHAPES:
                    del self._templates[next(iter(self._templates))]
                self._templates[key] = template
        out = bytearray(template.metadata)
        if template.numbers is not None:
            try:
                template.numbers.pack_into(out, template.numbers_at, *ints, *template.gap, *floats)
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
    ) -> _Template:
        self._check(op, tensors, attrs)
        builder = flatbuffers.Builder(512)
        # A Builder writes from the end backwards, so what is created first lies last: placements, floats, ints.
        placements = _build_placements(builder, tensors)
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
        ):
            if offset is not None:
                add(builder, offset)
        builder.Finish(gen.MessageEnd(builder), file_identifier=_FILE_IDENTIFIER)
        body = bytes(builder.Output())
        if len(body) > self.limits.max_metadata_nbytes:
            raise LimitError(
                f"metadata of {op!r}: {len(body)} bytes, the peer accepts {self.limits.max_metadata_nbytes}"
            )
        tail = _Tail(len(ints), len(floats), len(tensors))
        metadata = bytes(self._headroom) + body
        gap = (len(floats) << 32,) if ints and floats else ()
        return _Template(metadata, tail.nbytes, tail.numbers, len(metadata) - tail.nbytes, gap)

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


def _build_placements(builder: Any, tensors: Sequence[tuple[int, tuple[int, ...]]]) -> int | None:
    if not tensors:
        return None
    rows, offset = [], 0
    for code, shape in tensors:
        nbytes = math.prod(shape) * BY_CODE[code].itemsize
        rows.append((offset, nbytes))
        offset += nbytes
    gen.MessageStartPlacementsVector(builder, len(rows))
    for offset, nbytes in reversed(rows):
        gen.CreatePlacement(builder, 0, 0, offset, nbytes)
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


class _Tail:
    """Where the numbers lie when ints, floats and placements are the last three vectors, in this order.

    Each vector is a uint32 length right before 8-aligned elements, so between two of them stand 8 bytes: four of
    padding and the length. Read as one uint64 that is `length << 32`.
    """

    def __init__(self, ints: int, floats: int, tensors: int) -> None:
        self.nbytes = _PLACEMENT_NBYTES * tensors
        self.placements_back = self.nbytes  # bytes from the start of the elements to the end of the buffer
        if floats:
            self.nbytes += 8 * floats + (8 if self.nbytes else 0)
        self.floats_back = self.nbytes
        if ints:
            self.nbytes += 8 * ints + (8 if self.nbytes else 0)
        self.ints_back = self.nbytes
        self.numbers: struct.Struct | None = None
        if ints or floats:
            self.numbers = struct.Struct(f"<{ints}q{'Q' if ints and floats else ''}{floats}d")


# ---- in --------------------------------------------------------------------------------------------------------------


class _Known(NamedTuple):
    """A head (all bytes before the numbers) that was validated, and what it means."""

    message: Message
    nbytes: int  # of the whole metadata
    slots: tuple[tuple[str, int | None, Any], ...]  # attr name, index into the unpacked numbers or None, fixed value
    numbers: struct.Struct | None
    gap_index: int | None  # where among the numbers the length word stands
    gap: int
    rest: bytes  # what must follow the numbers: padding, length and placements


class Decoder:
    """Reads and validates metadata from the peer. One for each connection; not thread-safe (one thread reads).

    Raises RemoteProtocolError for anything that is not exactly as it must be, and never allocates more than a small
    multiple of the metadata's own size, which the frame header's cap bounds.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._known: dict[bytes, _Known] = {}

    def decode(self, metadata: bytes, varying_nbytes: int) -> Message:
        """The message that `metadata` holds.

        `varying_nbytes` is the sender's hint of how many bytes at the end are numbers; a wrong one only costs time.
        """
        cut = len(metadata) - varying_nbytes
        known = self._known.get(metadata[:cut]) if cut > 0 else None
        if known is None or len(metadata) != known.nbytes or not metadata.endswith(known.rest):
            return self._decode_new(metadata, cut)
        if not known.slots:
            return known.message
        attrs: dict[str, Any] = {}
        if known.numbers is None:
            for name, _, value in known.slots:
                attrs[name] = value if not isinstance(value, list) else value.copy()
        else:
            values = known.numbers.unpack_from(metadata, cut)
            if known.gap_index is not None and values[known.gap_index] != known.gap:
                return self._decode_new(metadata, cut)
            for name, index, value in known.slots:
                if index is not None:
                    attrs[name] = values[index]
                else:
                    attrs[name] = value if not isinstance(value, list) else value.copy()
        message = known.message
        return Message(message.op, message.tensors, attrs, message.payload_nbytes)

    def _decode_new(self, metadata: bytes, cut: int) -> Message:
        reader = _MessageReader(metadata, self._limits)
        message = reader.read()
        tail = _Tail(reader.ints.count, reader.floats.count, len(message.tensors))
        cacheable = len(metadata) <= _MAX_CACHED_NBYTES and reader.is_canonical(tail)
        if cacheable and cut == len(metadata) - tail.nbytes:
            if len(self._known) >= _CACHED_SHAPES:
                del self._known[next(iter(self._known))]
            self._known[metadata[:cut]] = self._remember(metadata, cut, message, reader, tail)
        return message

    @staticmethod
    def _remember(metadata: bytes, cut: int, message: Message, reader: _MessageReader, tail: _Tail) -> _Known:
        both = bool(reader.ints.count and reader.floats.count)
        slots = tuple(
            (name, index if kind == gen.AttrType.Int else index + reader.ints.count + both, None)
            if index is not None
            else (name, None, value.copy() if isinstance(value, list) else value)
            for name, kind, index, value in reader.slots
        )
        rest_at = cut + (tail.numbers.size if tail.numbers is not None else 0)
        return _Known(
            Message(message.op, message.tensors, {} if slots else message.attrs, message.payload_nbytes),
            len(metadata),
            slots,
            tail.numbers,
            reader.ints.count if both else None,
            reader.floats.count << 32,
            metadata[rest_at:],
        )


class _MessageReader:
    """One full decode. After `read`, `slots`, `ints` and `floats` say how the attributes were laid out."""

    def __init__(self, metadata: bytes, limits: Limits) -> None:
        self._reader = Reader(metadata)
        self._nbytes = len(metadata)
        self._limits = limits
        self._identifier = metadata[4:8]
        self.slots: list[tuple[str, int, int | None, Any]] = []  # name, type, index among ints or floats, fixed value
        self.ints = self.floats = self._placements = NO_VECTOR

    def read(self) -> Message:
        reader = self._reader
        if self._identifier != _FILE_IDENTIFIER:
            raise reader.error("file identifier", repr(self._identifier), repr(_FILE_IDENTIFIER))
        root = reader.table(reader.indirect(0, "root"), "Message")
        op = root.text(0, "op")
        tensors = self._read_tensors(root)
        self.ints = self._varying(root, 3, 8, "ints")
        self.floats = self._varying(root, 4, 8, "floats")
        self._read_attrs(root)
        payload_nbytes = self._read_placements(root, tensors)
        return Message(op, tensors, {name: value for name, _, _, value in self.slots}, payload_nbytes)

    def is_canonical(self, tail: _Tail) -> bool:
        """Whether the numbers lie last, as `_Tail` says, and nothing else was read from among them."""
        return (
            (not self._placements.count or self._placements.at == self._nbytes - tail.placements_back)
            and (not self.floats.count or self.floats.at == self._nbytes - tail.floats_back)
            and (not self.ints.count or self.ints.at == self._nbytes - tail.ints_back)
            and self._reader.extent <= self._nbytes - tail.nbytes
        )

    def _varying(self, root: Table, slot: int, element_nbytes: int, field: str) -> Vector:
        # The length word may stand among the bytes that vary; the Decoder compares it itself (gap, rest).
        extent = self._reader.extent
        vector = root.vector(slot, element_nbytes, 8, field)
        self._reader.extent = extent
        return vector

    def _tables(self, vector: Vector, name: str) -> list[tuple[str, Table]]:
        tables = []
        for index in range(vector.count):
            field = f"{name} {index}"
            at = self._reader.indirect(vector.at + 4 * index, field)
            tables.append((field, self._reader.table(at, field)))
        return tables

    def _read_tensors(self, root: Table) -> tuple[TensorDesc, ...]:
        vector = root.vector(1, 4, 4, "tensors")
        limits = self._limits
        if vector.count > limits.max_tensors:
            raise self._reader.error("tensors", str(vector.count), f"at most {limits.max_tensors}")
        descs = []
        for field, table in self._tables(vector, "tensor"):
            code = table.scalar(0, U8, f"{field} dtype")
            dtype = BY_CODE.get(code)
            if dtype is None:
                raise self._reader.error(f"{field} dtype", str(code), f"a code from 1 to {max(BY_CODE)}")
            dims = table.vector(1, 8, 8, f"{field} shape")
            if dims.count > limits.max_dims:
                raise self._reader.error(f"{field} dimensions", str(dims.count), f"at most {limits.max_dims}")
            shape = struct.unpack(f"<{dims.count}Q", self._reader.read(dims.at, 8 * dims.count))
            # Zero counts as one here: an empty tensor's other dims must not overflow what numpy and torch can hold.
            extent = math.prod([dim or 1 for dim in shape]) * dtype.itemsize
            if extent > limits.max_message_nbytes:
                raise self._reader.error(
                    f"{field} shape", f"{list(shape)}, {extent} bytes", f"at most {limits.max_message_nbytes} bytes"
                )
            descs.append(TensorDesc.of(dtype, shape))
        return tuple(descs)

    def _read_placements(self, root: Table, tensors: tuple[TensorDesc, ...]) -> int:
        reader = self._reader
        vector = self._placements = self._varying(root, 5, _PLACEMENT_NBYTES, "placements")
        if vector.count != len(tensors):
            raise reader.error("placements", str(vector.count), f"{len(tensors)}, one for each tensor")
        extent = reader.extent
        raw = reader.read(vector.at, vector.count * _PLACEMENT_NBYTES)
        reader.extent = extent  # these bytes are the varying part itself
        total = 0
        for index, (desc, row) in enumerate(zip(tensors, _PLACEMENT.iter_unpack(raw))):
            expected = (0, 0, total, desc.nbytes)
            if row != expected:
                raise reader.error(f"tensor {index} (segment, codec, offset, nbytes)", str(row), str(expected))
            total += desc.nbytes
        if total > self._limits.max_message_nbytes:
            raise reader.error("bytes of all tensors", str(total), f"at most {self._limits.max_message_nbytes}")
        return total

    def _read_attrs(self, root: Table) -> None:
        reader = self._reader
        vector = root.vector(2, 4, 4, "attrs")
        if vector.count > self._limits.max_attrs:
            raise reader.error("attrs", str(vector.count), f"at most {self._limits.max_attrs}")
        for field, table in self._tables(vector, "attr"):
            name = table.text(0, f"{field} name")
            if not name or any(name == known for known, _, _, _ in self.slots):
                raise reader.error(f"{field} name", repr(name), "a name that is not empty and comes once")
            kind = table.scalar(1, U8, f"{field} type")
            index = table.scalar(2, U32, f"{field} index")
            self.slots.append((name, kind, *self._read_value(table, kind, index, f"attr {name!r}")))

    def _read_value(self, table: Table, kind: int, index: int, field: str) -> tuple[int | None, Any]:
        reader = self._reader
        if kind in (gen.AttrType.Int, gen.AttrType.Float):
            vector, layout = (self.ints, "<q") if kind == gen.AttrType.Int else (self.floats, "<d")
            if index >= vector.count:
                raise reader.error(f"{field} index", str(index), f"less than {vector.count}")
            extent = reader.extent
            (value,) = struct.unpack(layout, reader.read(vector.at + 8 * index, 8))
            reader.extent = extent  # these bytes are the varying part itself
            return index, value
        if kind == gen.AttrType.String:
            return None, table.text(3, field)
        if kind == gen.AttrType.Bytes:
            data = table.vector(4, 1, 1, field)
            return None, reader.read(data.at, data.count)
        if kind == gen.AttrType.Ints:
            ints = table.vector(5, 8, 8, field)
            return None, list(struct.unpack(f"<{ints.count}q", reader.read(ints.at, 8 * ints.count)))
        if kind == gen.AttrType.Strings:
            texts = table.vector(6, 4, 4, field)
            reader.charge(4 * texts.count)
            return None, [
                reader.text(reader.indirect(texts.at + 4 * index, field), field) for index in range(texts.count)
            ]
        raise reader.error(f"{field} type", str(kind), "1 to 6")
