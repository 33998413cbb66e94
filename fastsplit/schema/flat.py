"""FlatBuffers' primitives, read with every bound checked: the verifier that Python's flatbuffers package lacks.

Rules. An offset, a length or a vtable is compared with the buffer before it is followed, and an error names the field.
Bytes become objects only through `read` and `charge`, which bound the total: in a hostile buffer many parts share the
same few bytes.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ..errors import RemoteProtocolError

__all__ = ["NO_VECTOR", "U8", "U32", "Reader", "Table", "Vector"]

U8, U16, U32, I32 = (struct.Struct(layout) for layout in ("<B", "<H", "<I", "<i"))

_MAX_REREADS = 4  # how often the parts of one buffer may overlap on average


class Vector(NamedTuple):
    at: int  # of the first element
    count: int  # type: ignore[assignment]  # not tuple.count


NO_VECTOR = Vector(0, 0)


class Reader:
    """Bounds-checked reads. `extent`: the end of the furthest byte that was read. Raises RemoteProtocolError."""

    def __init__(self, buffer: bytes) -> None:
        self._buffer = buffer
        self._end = len(buffer)
        self._budget_nbytes = _MAX_REREADS * len(buffer)
        self.extent = 0
        self.spans: list[tuple[int, int]] = []
        """Where what was read lies: start and end."""

    def scalar(self, layout: struct.Struct, at: int, field: str) -> int:
        if at < 0 or at + layout.size > self._end:
            raise self.error(field, f"{layout.size} bytes at {at}", f"a place within {self._end} bytes")
        if at % layout.size:
            raise self.error(field, f"offset {at}", f"a multiple of {layout.size}")
        self.extent = max(self.extent, at + layout.size)
        self.spans.append((at, at + layout.size))
        return int(layout.unpack_from(self._buffer, at)[0])

    def indirect(self, at: int, field: str) -> int:
        return at + self.scalar(U32, at, field)

    def table(self, at: int, field: str) -> Table:
        vtable = at - self.scalar(I32, at, field)
        vtable_nbytes = self.scalar(U16, vtable, field)
        table_nbytes = self.scalar(U16, vtable + 2, field)
        if vtable_nbytes < 4 or vtable_nbytes % 2 or vtable + vtable_nbytes > self._end:
            raise self.error(field, f"a vtable of {vtable_nbytes} bytes at {vtable}", "one inside the buffer")
        if table_nbytes < 4 or at + table_nbytes > self._end:
            raise self.error(field, f"a table of {table_nbytes} bytes at {at}", "one inside the buffer")
        self.extent = max(self.extent, vtable + vtable_nbytes, at + table_nbytes)
        return Table(self, at, table_nbytes, vtable, vtable_nbytes, field)

    def vector(self, at: int, element_nbytes: int, align: int, field: str) -> Vector:
        count = self.scalar(U32, at, field)
        start = at + 4
        if start + count * element_nbytes > self._end:
            raise self.error(field, f"{count} elements at {start}", f"no more than fit {self._end} bytes")
        if start % align:
            raise self.error(field, f"elements at {start}", f"a multiple of {align}")
        return Vector(start, count)

    def read(self, at: int, nbytes: int) -> bytes:
        """The bytes of a vector that `vector` has checked."""
        self.charge(nbytes)
        self.extent = max(self.extent, at + nbytes)
        self.spans.append((at, at + nbytes))
        return self._buffer[at : at + nbytes]

    def charge(self, nbytes: int) -> None:
        """Counts bytes that are about to become objects against the buffer's budget."""
        self._budget_nbytes -= nbytes
        if self._budget_nbytes < 0:
            raise self.error("overlaps", "parts that share their bytes too often", f"{_MAX_REREADS} times on average")

    def text(self, at: int, field: str) -> str:
        vector = self.vector(at, 1, 1, field)
        raw = self.read(vector.at, vector.count + 1)
        if len(raw) != vector.count + 1 or raw[-1] != 0:
            raise self.error(field, "a string without its end", "a zero byte after it")
        try:
            return raw[:-1].decode()
        except UnicodeDecodeError as error:
            raise self.error(field, str(error), "UTF-8") from None

    @staticmethod
    def error(field: str, came: str, expected: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"metadata, {field}: {came}, expected {expected}")


class Table(NamedTuple):
    reader: Reader
    at: int
    nbytes: int
    vtable: int
    vtable_nbytes: int
    name: str

    def field(self, slot: int, nbytes: int) -> int:
        """The offset of a field's inline part in the buffer, 0 if the field is absent."""
        entry = 4 + 2 * slot
        if entry + 2 > self.vtable_nbytes:
            return 0
        offset = self.reader.scalar(U16, self.vtable + entry, self.name)
        if offset == 0:
            return 0
        if offset < 4 or offset + nbytes > self.nbytes:
            raise self.reader.error(self.name, f"a field at {offset}", f"one within {self.nbytes} bytes")
        return self.at + offset

    def scalar(self, slot: int, layout: struct.Struct, field: str) -> int:
        at = self.field(slot, layout.size)
        return self.reader.scalar(layout, at, field) if at else 0

    def text(self, slot: int, field: str) -> str:
        at = self.field(slot, 4)
        return self.reader.text(self.reader.indirect(at, field), field) if at else ""

    def vector(self, slot: int, element_nbytes: int, align: int, field: str) -> Vector:
        at = self.field(slot, 4)
        if not at:
            return NO_VECTOR
        return self.reader.vector(self.reader.indirect(at, field), element_nbytes, align, field)
