"""Reads and validates metadata from the peer (descriptor.py says how it lies and why).

Rules. Every offset, length, count, string and number from the peer is checked against the buffer and the limits before
it is used, and an error names the field, what came and what was expected. (flat.py reads FlatBuffers' primitives, this
module the tables of our schema.) A head is cached only if no part of what it describes lies in the bytes that vary, so
that a hit means what a full decode would mean. Caches are bounded; each connection has its own.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from . import message_generated as gen
from .coding import FLOAT32, coded_nbytes
from .descriptor import (
    CACHED_SHAPES,
    CACHED_STRUCTURES,
    FILE_IDENTIFIER,
    MAX_CACHED_NBYTES,
    PLACEMENT_NBYTES,
    RETURN_NBYTES,
    Message,
    Tail,
    TensorDesc,
    inline_placements,
    keep,
)
from .dtypes import BY_CODE
from .flat import NO_VECTOR, U8, U32, Reader, Table, Vector
from .limits import Limits

__all__ = ["Decoder", "Heads"]


_new = tuple.__new__  # a NamedTuple without its own constructor: 0.1 us less
_AMONG_INTS = (gen.AttrType.Int, gen.AttrType.Bool)
"""Types of attributes whose values are among the message's ints."""


class Heads(Protocol):
    """A compiled table of heads that were validated before (native/heads.c)."""

    def decode(self, metadata: bytes, varying_nbytes: int, /) -> Message | None:
        """What Decoder.decode returns; None for all that must be looked at."""

    def add(
        self,
        head: bytes,
        message: Message,
        plain: bytes | None,
        words: int,
        slots: tuple[tuple[str, int, int, Any], ...],
        gaps: tuple[tuple[int, int], ...],
        placements_at: int,
        returns_at: int,
        returns: int,
        /,
    ) -> None:
        """Keeps a head. `words`: numbers behind it, of 8 bytes. `slots`: name, kind (0 fixed, 1 int, 2 bool, 3 float),
        its number's index, its fixed value. `gaps`: a length's index among them, and its value."""

    def clear(self) -> None:
        """Forgets all heads."""


class _Known(NamedTuple):
    """A head (all bytes before the numbers) that was validated, and what it means."""

    message: Message  # the result if all tensors are inline and there are no attributes
    plain: bytes | None  # the numbers with which `message` is the result, None if there are attributes or returns
    slots: tuple[tuple[str, int | None, Any], ...]  # attr name, index into the unpacked numbers or None, fixed value
    bools: tuple[tuple[str, int], ...]  # those in `slots` that are bools: attr name, index into the unpacked numbers
    tail: Tail
    gaps: list[tuple[int, int]]
    inline: tuple[int, ...]
    inline_nbytes: int


class _Structure(NamedTuple):
    """A head whose dimensions and lists of ints may have other values. Ranks and lengths are part of it."""

    known: _Known
    parts: tuple[tuple[int, int, bytes], ...]  # start, end, the bytes that are there
    dims_at: tuple[tuple[int, int], ...]  # of each tensor: where its dimensions lie, how many there are
    lists_at: tuple[tuple[int, int, int], ...]  # of each list: its attribute, where it lies, how many there are


class Decoder:
    """Reads and validates metadata from the peer. One for each connection; not thread-safe (one thread reads).

    Allocates at most a small multiple of the metadata's own size, which the header's cap bounds. Placements are checked
    as far as the message goes: tensors in the payload lie there in order, and each placement has its tensor's size.
    The arena checks segments. Raises RemoteProtocolError.
    """

    compiled: Heads | None = None
    """Asked first, and told of each head that is kept."""

    def __init__(self, limits: Limits) -> None:
        self.codings: frozenset[int] = frozenset()
        """Codings that tensors in the payload may have (coding.py), beside none."""
        self.typed = False
        """Whether attributes may be of the types Bool, Floats and Bools."""
        self._limits = limits
        self._known: dict[tuple[bytes, int], _Known] = {}
        """By the head, and the bytes of the numbers behind it."""
        self._structures: dict[tuple[int, int], list[_Structure]] = {}
        """By the bytes of the metadata and of its head."""

    def decode(self, metadata: bytes, varying_nbytes: int) -> Message:
        """The message that `metadata` holds.

        `varying_nbytes`: bytes of numbers at its end, the sender's hint. A wrong one costs time and changes nothing.
        """
        if self.compiled is not None:
            found = self.compiled.decode(metadata, varying_nbytes)
            if found is not None:
                return found
        cut = len(metadata) - varying_nbytes
        known = None
        if cut > 0:
            known = self._known.get((metadata[:cut], varying_nbytes)) or self._reshaped(metadata, cut)
        if known is None:
            return self._decode_new(metadata, cut)
        message, plain, slots, bools, tail, gaps, inline, inline_nbytes = known
        if plain is not None and metadata.endswith(plain):
            return message
        if tail.numbers is None and not slots:
            return message
        values: tuple[Any, ...] = () if tail.numbers is None else tail.numbers.unpack_from(metadata, cut)
        for index, gap in gaps:
            if values[index] != gap:
                return self._decode_new(metadata, cut)
        placements = values[tail.placements]
        if placements == inline:
            placements, payload_nbytes = (), inline_nbytes
        else:
            payload_nbytes = _check_placements(placements, message.tensors, self.codings)
        attrs: dict[str, Any] = {}
        for name, number, value in slots:
            if number is not None:
                attrs[name] = values[number]
            else:
                attrs[name] = value if not isinstance(value, list) else value.copy()
        for name, number in bools:
            attrs[name] = _bool(f"attr {name!r}", values[number])
        returns = values[tail.returns]
        if returns:
            _check_returns(returns)
        return _new(Message, (message[0], message[1], attrs, payload_nbytes, placements, returns))

    def forget(self) -> None:
        """Forgets all heads: so that a benchmark sees a new one."""
        self._known.clear()
        self._structures.clear()
        if self.compiled is not None:
            self.compiled.clear()

    def _decode_new(self, metadata: bytes, cut: int) -> Message:
        reader = _MessageReader(metadata, self._limits, self.codings, self.typed)
        message = reader.read()
        tail = Tail(reader.ints.count, reader.floats.count, len(message.tensors), len(message.returns) // 2)
        cacheable = len(metadata) <= MAX_CACHED_NBYTES and reader.is_canonical(tail)
        if cacheable and cut == len(metadata) - tail.nbytes:
            known = self._remember(metadata, cut, message, reader, tail)
            self._keep(metadata[:cut], known)
            if reader.is_flexible():
                self._keep_structure(metadata, cut, known, reader)
        return message

    def _keep(self, head: bytes, known: _Known) -> None:
        keep(self._known, (head, known.tail.nbytes), known, CACHED_SHAPES)
        if self.compiled is not None:
            self._teach(self.compiled, head, known, known.tail)

    def _keep_structure(self, metadata: bytes, cut: int, known: _Known, reader: _MessageReader) -> None:
        holes = sorted([*reader.dims_at, *(hole[1:] for hole in reader.lists_at)])
        starts = [0, *(at + 8 * count for at, count in holes)]
        ends = [*(at for at, _ in holes), cut]
        parts = tuple([(start, end, metadata[start:end]) for start, end in zip(starts, ends)])
        alike = self._structures.setdefault((len(metadata), cut), [])
        if sum(map(len, self._structures.values())) >= CACHED_STRUCTURES:
            self._structures.clear()
            alike = self._structures[len(metadata), cut] = []
        alike.append(_Structure(known, parts, tuple(reader.dims_at), tuple(reader.lists_at)))

    def _reshaped(self, metadata: bytes, cut: int) -> _Known | None:
        """A head that differs from one that was validated in dimensions, which are checked here, and in lists of ints.
        None if there is no such head."""
        for structure in self._structures.get((len(metadata), cut), ()):
            if all(metadata[start:end] == part for start, end, part in structure.parts):
                break
        else:
            return None
        known = structure.known
        descs = []
        for index, (before, (at, count)) in enumerate(zip(known.message.tensors, structure.dims_at)):
            shape = struct.unpack_from(f"<{count}Q", metadata, at)
            self._limits.check_shape(f"tensor {index}", shape, before.dtype.itemsize, Reader.error)
            descs.append(TensorDesc.of(before.dtype, shape))
        sizes = [desc.nbytes for desc in descs]
        self._limits.check_nbytes(sum(sizes), Reader.error)
        inline = inline_placements(sizes)
        known = known._replace(
            message=known.message._replace(tensors=tuple(descs), payload_nbytes=sum(sizes)),
            plain=None if known.plain is None else struct.pack(f"<{len(inline)}Q", *inline),
            inline=inline,
            inline_nbytes=sum(sizes),
        )
        if not structure.lists_at:
            self._keep(metadata[:cut], known)
            return known
        slots = list(known.slots)
        for index, at, count in structure.lists_at:
            slots[index] = (slots[index][0], None, list(struct.unpack_from(f"<{count}q", metadata, at)))
        return known._replace(slots=tuple(slots))

    @staticmethod
    def _remember(metadata: bytes, cut: int, message: Message, reader: _MessageReader, tail: Tail) -> _Known:
        starts = dict.fromkeys(_AMONG_INTS, tail.ints.start) | {gen.AttrType.Float: tail.floats.start}
        slots = tuple(
            (name, starts[kind] + index, None)
            if index is not None
            else (name, None, value.copy() if isinstance(value, list) else value)
            for name, kind, index, value in reader.slots
        )
        bools = tuple(
            (name, starts[kind] + index)
            for name, kind, index, _ in reader.slots
            if kind == gen.AttrType.Bool and index is not None
        )
        sizes = [desc.nbytes for desc in message.tensors]
        is_plain = not (slots or message.placements or message.returns or reader.ints.count or reader.floats.count)
        return _Known(
            Message(message.op, message.tensors, {}, sum(sizes)),
            metadata[cut:] if is_plain else None,
            slots,
            bools,
            tail,
            tail.gaps,
            inline_placements(sizes),
            sum(sizes),
        )

    @staticmethod
    def _teach(compiled: Heads, head: bytes, known: _Known, tail: Tail) -> None:
        bools = {name for name, _ in known.bools}
        slots = tuple(
            (name, 0, 0, value)
            if number is None
            else (name, 3 if number >= tail.floats.start else 2 if name in bools else 1, number, None)
            for name, number, value in known.slots
        )
        returns = (tail.returns.stop - tail.returns.start) // 2
        compiled.add(
            head,
            known.message,
            known.plain,
            tail.nbytes // 8,
            slots,
            tuple(tail.gaps),
            tail.placements.start,
            tail.returns.start,
            returns,
        )


def _check_placements(flat: Sequence[int], tensors: Sequence[TensorDesc], codings: frozenset[int]) -> int:
    """Checks placements against the tensors. Returns the bytes that the frame's payload must have."""
    payload_nbytes = 0
    for index, desc in enumerate(tensors):
        segment, offset, nbytes = flat[3 * index : 3 * index + 3]
        if segment >= 2**32 and codings:
            _check_coded(index, desc, segment, offset, nbytes, payload_nbytes, codings)
            payload_nbytes += nbytes
            continue
        if nbytes != desc.nbytes or segment >= 2**32 or (segment == 0 and offset != payload_nbytes):
            expected = (segment % 2**32, 0, offset if segment % 2**32 else payload_nbytes, desc.nbytes)
            raise Reader.error(
                f"tensor {index} (segment, codec, offset, nbytes)",
                str((segment % 2**32, segment >> 32, offset, nbytes)),
                str(expected),
            )
        if segment == 0:
            payload_nbytes += nbytes
    return payload_nbytes


def _check_coded(
    index: int, desc: TensorDesc, segment: int, offset: int, nbytes: int, payload_nbytes: int, codings: frozenset[int]
) -> None:
    segment, coding = segment % 2**32, segment >> 32
    field = f"tensor {index}"
    if segment:
        raise Reader.error(f"{field} segment", str(segment), f"0, since its codec is {coding}")
    if coding not in codings:
        raise Reader.error(f"{field} codec", str(coding), f"one that was agreed on: {', '.join(map(str, codings))}")
    if offset != payload_nbytes:
        raise Reader.error(f"{field} offset", str(offset), str(payload_nbytes))
    if coding >> 4 and desc.dtype.code != FLOAT32:
        raise Reader.error(f"{field} codec", f"{coding}, a cast, of {desc.dtype.name}", "a cast of float32 alone")
    uncompressed = coded_nbytes(desc.nbytes, coding)
    if not (1 <= nbytes < uncompressed if coding & 15 else nbytes == uncompressed > 0):
        expected = f"1 to {uncompressed - 1}" if coding & 15 else str(uncompressed)
        raise Reader.error(f"{field} nbytes", str(nbytes), f"{expected} with codec {coding}")


def _bool(field: str, number: int) -> bool:
    if number not in (0, 1):
        raise Reader.error(field, str(number), "0 or 1, a bool")
    return number == 1


def _check_returns(flat: Sequence[int]) -> None:
    for segment in flat[::2]:
        if not 1 <= segment < 2**32:
            raise Reader.error("returns, segment", str(segment), "a segment's number and zero padding")


class _MessageReader:
    """One full decode. After `read`, `slots`, `ints` and `floats` say how the attributes lie in the buffer."""

    def __init__(self, metadata: bytes, limits: Limits, codings: frozenset[int], typed: bool) -> None:
        self._codings = codings
        self._last_type = gen.AttrType.Bools if typed else gen.AttrType.Strings
        self._reader = Reader(metadata)
        self._nbytes = len(metadata)
        self._limits = limits
        self._identifier = metadata[4:8]
        self.slots: list[tuple[str, int, int | None, Any]] = []  # name, type, index among ints or floats, fixed value
        self.ints = self.floats = self._placements = self._returns = NO_VECTOR
        self.dims_at: list[tuple[int, int]] = []  # of each tensor: where, how many
        self.lists_at: list[tuple[int, int, int]] = []  # of each list of ints: its slot, where, how many

    def read(self) -> Message:
        reader = self._reader
        if self._identifier != FILE_IDENTIFIER:
            raise reader.error("file identifier", repr(self._identifier), repr(FILE_IDENTIFIER))
        root = reader.table(reader.indirect(0, "root"), "Message")
        op = root.text(0, "op")
        tensors = self._read_tensors(root)
        self.ints = self._varying(root, 3, 8, "ints")
        self.floats = self._varying(root, 4, 8, "floats")
        self._read_attrs(root)
        placements = self._read_placements(root, tensors)
        payload_nbytes = _check_placements(placements, tensors, self._codings)
        if placements == inline_placements([desc.nbytes for desc in tensors]):
            placements = ()
        attrs = {name: value for name, _, _, value in self.slots}
        return Message(op, tensors, attrs, payload_nbytes, placements, self._read_returns(root))

    def is_canonical(self, tail: Tail) -> bool:
        """Whether the numbers lie last, as `Tail` says, and nothing else was read from their bytes."""
        return (
            (not self._returns.count or self._returns.at == self._nbytes - tail.returns_back)
            and (not self._placements.count or self._placements.at == self._nbytes - tail.placements_back)
            and (not self.floats.count or self.floats.at == self._nbytes - tail.floats_back)
            and (not self.ints.count or self.ints.at == self._nbytes - tail.ints_back)
            and self._reader.extent <= self._nbytes - tail.nbytes
        )

    def is_flexible(self) -> bool:
        """Whether there are dimensions or lists of ints, and nothing else was read from their bytes: they may change,
        and all else means what it did."""
        holes = [
            (at, at + 8 * count, True) for at, count in [*self.dims_at, *(at[1:] for at in self.lists_at)] if count
        ]
        end = holes_end = 0
        for start, stop, is_hole in sorted([*holes, *((*span, False) for span in self._reader.spans)]):
            if start < (end if is_hole else holes_end) and start < stop:
                return False
            end = max(end, stop)
            holes_end = max(holes_end, stop) if is_hole else holes_end
        return bool(holes)

    def _varying(self, root: Table, slot: int, element_nbytes: int, field: str) -> Vector:
        # The length word may stand among the bytes that vary: the Decoder compares it (`gaps`).
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
        limits, error = self._limits, self._reader.error
        limits.check_tensors(vector.count, error)
        descs = []
        for field, table in self._tables(vector, "tensor"):
            code = table.scalar(0, U8, f"{field} dtype")
            dtype = BY_CODE.get(code)
            if dtype is None:
                raise error(f"{field} dtype", str(code), f"a code from 1 to {max(BY_CODE)}")
            dims = table.vector(1, 8, 8, f"{field} shape")
            limits.check_dims(field, dims.count, error)
            shape = struct.unpack(f"<{dims.count}Q", self._reader.read(dims.at, 8 * dims.count))
            self._reader.spans.pop()  # for `is_flexible`
            self.dims_at.append((dims.at, dims.count))
            limits.check_shape(field, shape, dtype.itemsize, error)
            descs.append(TensorDesc.of(dtype, shape))
        return tuple(descs)

    def _read_placements(self, root: Table, tensors: tuple[TensorDesc, ...]) -> tuple[int, ...]:
        vector = self._placements = self._varying(root, 5, PLACEMENT_NBYTES, "placements")
        if vector.count != len(tensors):
            raise self._reader.error("placements", str(vector.count), f"{len(tensors)}, one for each tensor")
        self._limits.check_nbytes(sum(desc.nbytes for desc in tensors), self._reader.error)
        return self._read_varying(vector, 3)

    def _read_returns(self, root: Table) -> tuple[int, ...]:
        self._returns = self._varying(root, 6, RETURN_NBYTES, "returns")
        returns = self._read_varying(self._returns, 2)
        _check_returns(returns)
        return returns

    def _read_varying(self, vector: Vector, words: int) -> tuple[int, ...]:
        extent = self._reader.extent
        raw = self._reader.read(vector.at, vector.count * words * 8)
        self._reader.extent = extent  # these bytes are the varying part itself
        return struct.unpack(f"<{vector.count * words}Q", raw)

    def _read_attrs(self, root: Table) -> None:
        reader = self._reader
        vector = root.vector(2, 4, 4, "attrs")
        self._limits.check_attrs(vector.count, reader.error)
        for field, table in self._tables(vector, "attr"):
            name = table.text(0, f"{field} name")
            if not name or any(name == known for known, _, _, _ in self.slots):
                raise reader.error(f"{field} name", repr(name), "a name that is not empty and comes once")
            kind = table.scalar(1, U8, f"{field} type")
            index = table.scalar(2, U32, f"{field} index")
            self.slots.append((name, kind, *self._read_value(table, kind, index, f"attr {name!r}")))

    def _read_value(self, table: Table, kind: int, index: int, field: str) -> tuple[int | None, Any]:
        reader = self._reader
        if not gen.AttrType.Int <= kind <= self._last_type:
            raise reader.error(f"{field} type", str(kind), f"1 to {self._last_type}")
        if kind == gen.AttrType.Float or kind in _AMONG_INTS:
            vector, layout = (self.floats, "<d") if kind == gen.AttrType.Float else (self.ints, "<q")
            if index >= vector.count:
                raise reader.error(f"{field} index", str(index), f"less than {vector.count}")
            extent = reader.extent
            (value,) = struct.unpack(layout, reader.read(vector.at + 8 * index, 8))
            reader.extent = extent  # these bytes are the varying part itself
            return index, _bool(field, value) if kind == gen.AttrType.Bool else value
        if kind == gen.AttrType.String:
            return None, table.text(3, field)
        if kind in (gen.AttrType.Bytes, gen.AttrType.Bools):
            data = table.vector(4, 1, 1, field)
            raw = reader.read(data.at, data.count)
            return None, raw if kind == gen.AttrType.Bytes else [_bool(field, number) for number in raw]
        if kind in (gen.AttrType.Ints, gen.AttrType.Floats):
            slot, code = (5, "q") if kind == gen.AttrType.Ints else (7, "d")
            numbers = table.vector(slot, 8, 8, field)
            raw = reader.read(numbers.at, 8 * numbers.count)
            if kind == gen.AttrType.Ints and numbers.count:
                reader.spans.pop()  # for `is_flexible`
                self.lists_at.append((len(self.slots), numbers.at, numbers.count))
            return None, list(struct.unpack(f"<{numbers.count}{code}", raw))
        texts = table.vector(6, 4, 4, field)
        reader.charge(4 * texts.count)
        return None, [reader.text(reader.indirect(texts.at + 4 * index, field), field) for index in range(texts.count)]
