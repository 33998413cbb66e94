"""Codings: how a tensor's bytes in a payload differ from its bytes in memory. The byte `codec` of a placement.

A coding has two steps, each optional: a cast of float32 to a dtype of 16 bits (the upper four bits), then compression
(the lower four). After decoding a tensor has its description's dtype again.

Rules. The numbers are the protocol's (docs/protocol.md). A cast halves the bytes exactly, and compression removes at
least one byte, so that no coding makes a payload larger than its description says.
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
    """The capability bit of a cast."""
    return 1 << 7 + cast


def codec_bit(codec: int) -> int:
    """The capability bit of a codec."""
    return 1 << 15 + codec


def coded_nbytes(nbytes: int, coding: int) -> int:
    """The bytes of a tensor of `nbytes` bytes after the cast of `coding`, before compression."""
    return nbytes // 2 if coding >> 4 else nbytes


def coding_name(coding: int) -> str:
    """A coding's name in reports: "float16", "zstd", or "float16+zstd"."""
    names = (CAST_NAMES.get(coding >> 4), CODEC_NAMES.get(coding & 15))
    return "+".join(name for name in names if name is not None)
