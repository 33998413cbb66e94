"""How a tensor's bytes may differ in a frame's payload from what they are in memory: the byte `codec` of a placement.

Two steps, either of which may be missing: a cast of float32 to a dtype of 16 bits (the upper four bits), and after it
compression (the lower four). What arrives has the description's dtype again.

Rules. The numbers are the wire's (docs/protocol.md). A cast halves the bytes exactly, and compression takes at least
one byte away, so that no coding can make a payload larger than the description says.
"""

from __future__ import annotations

from .dtypes import BY_NAME

__all__ = [
    "CASTS",
    "CAST_NAMES",
    "CODECS",
    "CODEC_NAMES",
    "FLOAT32",
    "cast_bit",
    "codec_bit",
    "coded_nbytes",
    "coding_name",
]

CASTS = {"bfloat16": 1, "float16": 2}
CAST_NAMES = {number: name for name, number in CASTS.items()}
CODECS = {"zlib": 1, "lz4": 2, "zstd": 3, "blosc2": 4}
CODEC_NAMES = {number: name for name, number in CODECS.items()}
FLOAT32 = BY_NAME["float32"].code
"""The only dtype that is cast."""


def cast_bit(cast: int) -> int:
    """The capability of a cast."""
    return 1 << 7 + cast


def codec_bit(codec: int) -> int:
    """The capability of a codec."""
    return 1 << 15 + codec


def coded_nbytes(nbytes: int, coding: int) -> int:
    """The bytes of a tensor of `nbytes` after its cast, before it is compressed."""
    return nbytes // 2 if coding >> 4 else nbytes


def coding_name(coding: int) -> str:
    """For people: "float16", "zstd", or both with a + between them."""
    names = (CAST_NAMES.get(coding >> 4), CODEC_NAMES.get(coding & 15))
    return "+".join(name for name in names if name is not None)
