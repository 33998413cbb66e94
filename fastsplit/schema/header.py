"""The fixed header of every frame: 40 bytes, little-endian. docs/protocol.md has it as a byte table.

Rules. A frame is this header, then `metadata_nbytes` bytes of FlatBuffers metadata, then `payload_nbytes` bytes of
tensors. A header is checked in full before any of its fields is used.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from ..errors import RemoteProtocolError
from .limits import Limits

__all__ = [
    "HEADER_NBYTES",
    "MAGIC",
    "REPLY_FLAGS",
    "VERSION",
    "Header",
    "Kind",
    "pack_header",
    "parse_header",
    "reply_flags",
    "wanted_reply",
]

MAGIC = b"FSPL"
VERSION = 1
_HEADER = struct.Struct("<4sBBHQIIQQ")
HEADER_NBYTES = _HEADER.size


class Kind(IntEnum):
    """The kinds of frames; wire/rules.py says when each may come.

    Requests and cancellations go from client to server, replies and errors back. SEGMENT to RETURN are about shared
    memory: a segment to map, the answer if that is a ring, a segment to unmap, and returns in a frame of their own.
    PROBE measures the link.
    """

    HELLO = 1
    REQUEST = 2
    REPLY = 3
    ERROR = 4
    CANCEL = 5
    GOODBYE = 6
    ABORT = 7
    SEGMENT = 8
    ATTACHED = 9
    RETIRE = 10
    RETURN = 11
    PROBE = 12


_LAST_KIND = int(max(Kind))
_REQUEST = int(Kind.REQUEST)
REPLY_FLAGS = 0xFF
"""The bits that say how a reply is wanted, where both sides can code: 0 to 3 the cast, 4 to 7 the codec."""
_NO_CODEC = 15


Header = tuple[int, int, int, int, int, int, int]
"""kind, request_id, metadata_nbytes, varying_nbytes, payload_nbytes, time_ns, flags.

`time_ns`: in a request the time left to its deadline (0 for none), in a reply the time that the handler took. `flags`:
how the reply to a request is wanted, see `reply_flags`. A plain tuple, since every frame makes one."""


def pack_header(
    out: bytearray,
    kind: int,
    request_id: int,
    varying_nbytes: int,
    payload_nbytes: int,
    time_ns: int = 0,
    flags: int = 0,
) -> None:
    """Writes the header into the first 40 bytes of `out`; the rest of `out` is the metadata."""
    _HEADER.pack_into(
        out,
        0,
        MAGIC,
        VERSION,
        kind,
        flags,
        request_id,
        len(out) - HEADER_NBYTES,
        varying_nbytes,
        payload_nbytes,
        time_ns,
    )


def reply_flags(cast: int, codec: int | None) -> int:
    """The flags of a request: its reply's cast (coding.py; 0 for none) and codec (0 for none, None for the server's
    choice)."""
    return cast | (0 if codec is None else (codec or _NO_CODEC) << 4)


def wanted_reply(flags: int) -> tuple[int, int | None]:
    """The cast and the codec of a request's flags: the arguments of `reply_flags`."""
    codec = flags >> 4
    return flags & 15, None if not codec else 0 if codec == _NO_CODEC else codec


def parse_header(buffer: bytes | bytearray | memoryview, at: int, limits: Limits, known_flags: int = 0) -> Header:
    """The header at byte `at` of `buffer`. `known_flags`: bits that may be set in a request's `flags`.

    Raises RemoteProtocolError for another magic or version, an unknown kind or flag, and a size over a limit.
    """
    magic, version, kind, flags, request_id, metadata_nbytes, varying_nbytes, payload_nbytes, time_ns = (
        _HEADER.unpack_from(buffer, at)
    )
    if (
        magic != MAGIC
        or version != VERSION
        or not 1 <= kind <= _LAST_KIND
        or (flags and (flags & ~known_flags or kind != _REQUEST))
        or varying_nbytes > metadata_nbytes
        or metadata_nbytes > limits.max_metadata_nbytes
        or payload_nbytes > limits.max_message_nbytes
    ):
        raise _explain(
            magic, version, kind, flags, known_flags, metadata_nbytes, varying_nbytes, payload_nbytes, limits
        )
    return kind, request_id, metadata_nbytes, varying_nbytes, payload_nbytes, time_ns, flags


def _explain(
    magic: bytes,
    version: int,
    kind: int,
    flags: int,
    known_flags: int,
    metadata_nbytes: int,
    varying_nbytes: int,
    payload_nbytes: int,
    limits: Limits,
) -> RemoteProtocolError:
    if magic != MAGIC:
        text = f"magic: {magic!r}, expected {MAGIC!r}; the peer does not speak fastsplit"
    elif version != VERSION:
        text = f"version: {version}, expected {VERSION}"
    elif not 1 <= kind <= _LAST_KIND:
        text = f"kind: {kind}, expected 1 to {_LAST_KIND}"
    elif flags and (flags & ~known_flags or kind != _REQUEST):
        text = f"flags: {flags:#06x}, expected 0: none was negotiated"
    elif varying_nbytes > metadata_nbytes:
        text = f"varying_nbytes: {varying_nbytes}, expected at most {metadata_nbytes}"
    elif metadata_nbytes > limits.max_metadata_nbytes:
        text = f"metadata_nbytes: {metadata_nbytes}, expected at most {limits.max_metadata_nbytes}"
    else:
        text = f"payload_nbytes: {payload_nbytes}, expected at most {limits.max_message_nbytes}"
    return RemoteProtocolError(f"header, {text}")
