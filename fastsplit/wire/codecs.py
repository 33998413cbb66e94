"""Compression of a tensor's bytes, for links that are slower than it: what a codec makes of them, and whether it pays.

    zlib      in the standard library, slow; run lengths and Huffman codes alone, which floating-point numbers want
    lz4       an LZ4 frame: finds what repeats, which is the zeros behind a softmax, and hardly anything else
    zstd      a Zstandard frame: Huffman codes for the exponents as well
    blosc2    bytes of the same significance side by side, then Zstandard in blocks that fit the cache

Rules. No codec is needed: lz4, zstandard and blosc2 are imported when they are first asked for, and what is not
installed is not offered (`installed`). What is compressed is always shorter than it was, or it is not compressed.
Several threads may compress and decompress at once; the libraries let others run meanwhile.

What comes from the peer is hostile until it is unpacked: the size that it declares must be the one that is expected,
before a byte is unpacked; nothing is ever written behind it; nothing may follow it. It must lie in private memory,
which the peer cannot change between a check and its use. blosc2 trusts its header, which can name other sizes, filters,
files and plugins: only the headers that we could have written ourselves are given to it.

What fails for lack of memory is an ArenaFull, not the peer's fault. blosc2 does not tell the two apart, so after an
error it is tried whether there is memory.
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
import struct
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArenaFull, RemoteProtocolError, ResourceError, SettingError
from ..schema.coding import CODEC_NAMES, CODECS
from ..system.shortage import import_shortage, no_memory, why
from ..tensors.pool import Memory

__all__ = [
    "DECOMPRESS_OVER_COMPRESS",
    "Estimate",
    "compress",
    "decompress",
    "installed",
    "probe",
]

DECOMPRESS_OVER_COMPRESS: dict[int, float] = {1: 1.5, 2: 2.0, 3: 1.2, 4: 3.0}
"""How many times as fast a codec unpacks what it packed: activations of a model, on one core (benches/codecs.py)."""

_PREFERRED = ("blosc2", "zstd", "lz4", "zlib")
_MODULES = {"blosc2": "blosc2", "zstd": "zstandard", "lz4": "lz4.frame"}

_CALL_S = 50e-6
"""What a message costs beside its bytes, both sides together."""

_CHUNK_NBYTES = 256 * 1024
"""What is unpacked at a time where a library cannot unpack into our memory: it stays in the cache."""

_ZSTD_LEVEL = 1  # the negative ones store floating-point numbers as they are; 3 takes twice the time for 1 %
_ZSTD_MIN_BLOCK_NBYTES = 1024

_ZLIB_LEVEL = 1
# Floating-point numbers do not repeat: to look for it takes two thirds of the time, and finds less than run lengths do.
_ZLIB_STRATEGY = zlib.Z_RLE
_ZLIB_WBITS, _ZLIB_MEM_LEVEL = 15, 9

_BLOSC2_STREAM_NBYTES = 64 * 1024
"""Bytes of one significance in a block."""
_BLOSC2_HEADER = struct.Struct("<4B3i6s2B6s2B")
_BLOSC2_FLAGS = {0x85: 5, 0x95: 5, 0x25: 1, 0x35: 1}
"""Zstandard and LZ4, each with blocks split by significance or not -> the number of the codec, which comes again."""
_BLOSC2_FILTERS = (bytes([1, 0, 0, 0, 0, 0]), bytes([2, 0, 0, 0, 0, 0]))  # shuffled by bytes, or by bits
_BLOSC2_NO_META = bytes(6)
_BLOSC2_ZEROS = 0x10
_BLOSC2_MAX_NBYTES = 2**31 - 1 - _BLOSC2_HEADER.size

_SAMPLE_PIECES = 4
_MIN_PIECE_NBYTES, _MAX_PIECE_NBYTES = 1024, 16 * 1024
_MIN_S = 1e-7  # a clock may not have moved
_NO_MEMORY = ("llocation", "Error -4 ")  # zstd's and lz4's words, and zlib's Z_MEM_ERROR
_SCRATCH_BLOCKS, _SCRATCH_NBYTES = 4, 16 * 1024**2
"""What a library may want beside its input and output: Blosc2 four of its blocks, and all of them something."""
_NOTHING_MUCH = memoryview(bytes(64))

Allocate = Callable[[int], Memory]


class Estimate(NamedTuple):
    """What a codec is expected to make of some bytes. `ratio`: compressed to uncompressed, 1 if it does not help."""

    ratio: float
    compress_bytes_per_s: float
    decompress_bytes_per_s: float
    """Both of uncompressed bytes."""

    def seconds(self, nbytes: int, bytes_per_s: float) -> float:
        """How long it takes to compress `nbytes`, send and unpack them: n / c + n * ratio / B + n / d + t.

        With n = nbytes, B = bytes_per_s of the link, c = the rate of compressing, d = that of unpacking, t = what a
        message costs beside.
        """
        work_s = nbytes / self.compress_bytes_per_s + nbytes / self.decompress_bytes_per_s
        return work_s + nbytes * self.ratio / bytes_per_s + _CALL_S


@functools.cache
def installed() -> tuple[str, ...]:
    """The codecs that can be used here, in the order in which tensors want them. Imports none: blosc2 takes 0.2 s.

    Raises ResourceError if the first look for them finds no descriptor left.
    """
    try:
        return tuple(name for name in _PREFERRED if _is_there(name))
    except OSError as error:
        raise ResourceError(f"codecs that are installed: {why(error)}") from None


def compress(codec: int, data: memoryview, itemsize: int, allocate: Allocate) -> memoryview | None:
    """The compressed bytes of `data`, flat, contiguous, and of one byte each; None if they would not be fewer.

    `itemsize`: of the tensor's dtype. They lie in memory from `allocate`, or in the library's. Raises ArenaFull.
    """
    if data.nbytes < 2:
        return None
    try:
        packed = _COMPRESS[codec](data, itemsize, allocate)
    except _errors(codec) as error:
        if _is_shortage(error, 0):
            raise _full(codec, "compress", data.nbytes) from None
        raise
    return packed if packed is not None and packed.nbytes < data.nbytes else None


def decompress(codec: int, data: memoryview, out: memoryview, itemsize: int) -> None:
    """Fills `out`, flat, writable, and of one byte each, with what `data` was compressed from.

    Raises RemoteProtocolError unless `data` is exactly one such stream, fewer bytes than `out` has, and ArenaFull if
    there is no memory to unpack it; then `out` may hold anything.
    """
    name = CODEC_NAMES.get(codec)
    if name not in installed():
        raise RemoteProtocolError(f"codec: {codec if name is None else name}, expected {' or '.join(installed())}")
    if not data.nbytes < out.nbytes:
        raise _wrong(codec, f"{data.nbytes} bytes compressed", f"fewer than {out.nbytes}")
    try:
        _DECOMPRESS[codec](data, out, itemsize)
    except _errors(codec) as error:
        block_nbytes = _BLOSC2_HEADER.unpack_from(data)[5] if codec == CODECS["blosc2"] else 0  # the peer's word
        if _is_shortage(error, min(max(block_nbytes, 0), out.nbytes)):
            raise _full(codec, "unpack", out.nbytes) from None
        raise _wrong(codec, f"corrupt data ({str(error) or type(error).__name__})", f"{out.nbytes} bytes") from None


def probe(codec: int, data: memoryview, itemsize: int) -> Estimate:
    """Compresses some of `data`, and times it: 4 pieces of 16 KiB or less, 2 % of it where these are 1 KiB or more.

    Takes less than 1 ms once a thread has used the codec before. How fast it unpacks is taken from that.
    """
    size = data.nbytes // (50 * _SAMPLE_PIECES)
    size = min(max(size, _MIN_PIECE_NBYTES), _MAX_PIECE_NBYTES) // itemsize * itemsize
    if size * _SAMPLE_PIECES < data.nbytes:
        quarter = data.nbytes // _SAMPLE_PIECES
        middle = (quarter - size) // 2  # what is at the very beginning is often not like the rest
        starts = [(quarter * piece + middle) // itemsize * itemsize for piece in range(_SAMPLE_PIECES)]
        data = memoryview(b"".join([data[start : start + size] for start in starts]))
    if data.nbytes < 2:
        return Estimate(1.0, 1.0, 1.0)
    start_s = _start_s(codec)
    duration_s, packed_nbytes = _timed(codec, data, itemsize)
    rate = data.nbytes / max(duration_s - start_s, duration_s / 2, _MIN_S)
    return Estimate(packed_nbytes / data.nbytes, rate, rate * DECOMPRESS_OVER_COMPRESS[codec])


def _is_shortage(error: Exception, block_nbytes: int) -> bool:
    """Whether a codec failed since there is no memory: it says so, or there is not what it may want for its blocks."""
    if isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY):
        return True
    try:
        mmap.mmap(-1, _SCRATCH_BLOCKS * block_nbytes + _SCRATCH_NBYTES).close()
    except OSError:
        return True
    return False


def _full(codec: int, verb: str, nbytes: int) -> ArenaFull:
    return ArenaFull(f"no memory to {verb} a tensor of {nbytes} bytes, {CODEC_NAMES[codec]}: {no_memory()}")


def _wrong(codec: int, found: str, expected: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"compressed tensor, {CODEC_NAMES[codec]}: {found}, expected {expected}")


def _private(nbytes: int) -> Memory:
    return np.empty(nbytes, np.uint8)


# ---- libraries -------------------------------------------------------------------------------------------------------

_local = threading.local()
"""A thread's own contexts: a Zstandard context must not be used by two at once, and takes 20 us or more to make."""


def _is_there(name: str) -> bool:
    module = _MODULES.get(name)
    return module is None or importlib.util.find_spec(module.partition(".")[0]) is not None


@functools.cache
def _library(name: str) -> Any:
    module = _MODULES.get(name)
    try:
        library = zlib if module is None else importlib.import_module(module)
    except (ImportError, OSError) as error:  # one of its own libraries is not there, perhaps
        short = import_shortage(error)
        if short is not None:
            raise ResourceError(f"codec: {name!r} cannot be imported: {short}") from None
        raise SettingError(f"codec: {name!r}, which is installed and cannot be imported: {error}") from None
    if name == "blosc2":
        library.set_releasegil(True)
    return library


@functools.cache
def _errors(codec: int) -> tuple[type[Exception], ...]:
    """What a library raises for data that it cannot unpack, and without memory."""
    name = CODEC_NAMES[codec]
    if name == "zlib":
        return (MemoryError, zlib.error)
    if name == "zstd":
        return (MemoryError, _library(name).ZstdError)
    return (MemoryError, RuntimeError, ValueError)


def _start_s(codec: int) -> float:
    """How long this thread takes to begin with a codec, and to end, with nothing in between."""
    known: dict[int, float] | None = getattr(_local, "start_s", None)
    if known is None:
        known = _local.start_s = {}
    if codec not in known:
        # The first makes what a thread needs once.
        known[codec] = min(_timed(codec, _NOTHING_MUCH, 1)[0] for _ in range(4))
    return known[codec]


def _timed(codec: int, data: memoryview, itemsize: int) -> tuple[float, int]:
    """How long it takes to compress, and how many bytes it becomes."""
    start_s = time.perf_counter()
    packed = _COMPRESS[codec](data, itemsize, _private)
    return time.perf_counter() - start_s, data.nbytes if packed is None else min(packed.nbytes, data.nbytes)


# ---- zlib ------------------------------------------------------------------------------------------------------------


def _zlib_compress(data: memoryview, itemsize: int, allocate: Allocate) -> memoryview | None:
    packer = zlib.compressobj(_ZLIB_LEVEL, zlib.DEFLATED, _ZLIB_WBITS, _ZLIB_MEM_LEVEL, _ZLIB_STRATEGY)
    packed = allocate(data.nbytes - 1).data
    end = 0
    for start in range(0, data.nbytes + 1, _CHUNK_NBYTES):
        piece = data[start : start + _CHUNK_NBYTES]
        done = start + _CHUNK_NBYTES > data.nbytes
        part = packer.compress(piece) + packer.flush() if done else packer.compress(piece)
        if end + len(part) > packed.nbytes:
            return None
        packed[end : end + len(part)] = part
        end += len(part)
    return packed[:end]


def _zlib_decompress(data: memoryview, out: memoryview, itemsize: int) -> None:
    codec = CODECS["zlib"]
    unpacker = zlib.decompressobj(_ZLIB_WBITS)
    start = end = 0
    rest: Any = b""
    while not unpacker.eof:
        if not rest:
            rest = data[start : start + _CHUNK_NBYTES // 4]
            start += rest.nbytes
            if not rest:
                raise _wrong(codec, f"the end after {end} bytes", f"{out.nbytes} bytes")
        # One byte more than there is room for shows that there are too many.
        part = unpacker.decompress(rest, min(_CHUNK_NBYTES, out.nbytes - end + 1))
        rest = unpacker.unconsumed_tail
        if end + len(part) > out.nbytes:
            raise _wrong(codec, "more bytes", f"{out.nbytes}")
        out[end : end + len(part)] = part
        end += len(part)
    trailing = len(unpacker.unused_data) + len(rest) + data.nbytes - start
    if end != out.nbytes or trailing:
        raise _wrong(codec, f"{end} bytes and {trailing} behind the stream", f"{out.nbytes} bytes")


# ---- LZ4 -------------------------------------------------------------------------------------------------------------


def _lz4_compress(data: memoryview, itemsize: int, allocate: Allocate) -> memoryview | None:
    return memoryview(_library("lz4").compress(data, block_linked=False, store_size=True))


def _lz4_decompress(data: memoryview, out: memoryview, itemsize: int) -> None:
    codec = CODECS["lz4"]
    library = _library("lz4")
    described = library.get_frame_info(data)
    if described["skippable"] or described["content_size"] != out.nbytes:
        raise _wrong(codec, f"a frame of {described['content_size']} bytes", f"{out.nbytes}")
    context = library.create_decompression_context()
    start = end = 0
    ended = False
    while not ended:
        # One byte more than there is room for lets the frame end, and shows that there are too many.
        room = min(_CHUNK_NBYTES, out.nbytes - end + 1)
        part, read, ended = library.decompress_chunk(context, data[start:], max_length=room)
        if end + len(part) > out.nbytes:
            raise _wrong(codec, "more bytes", f"{out.nbytes}")
        out[end : end + len(part)] = part
        start, end = start + read, end + len(part)
        if not ended and start == data.nbytes and len(part) < room:
            raise _wrong(codec, f"the end after {end} bytes", f"{out.nbytes} bytes")
    if end != out.nbytes or start != data.nbytes:
        trailing = data.nbytes - start
        raise _wrong(codec, f"{end} bytes and {trailing} behind the frame", f"{out.nbytes} bytes")


# ---- Zstandard -------------------------------------------------------------------------------------------------------


def _zstd_compressor() -> Any:
    compressor = getattr(_local, "compressor", None)
    if compressor is None:
        compressor = _local.compressor = _library("zstd").ZstdCompressor(level=_ZSTD_LEVEL)
    return compressor


def _zstd_decompressor() -> Any:
    decompressor = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = _library("zstd").ZstdDecompressor()
    return decompressor


def _zstd_compress(data: memoryview, itemsize: int, allocate: Allocate) -> memoryview | None:
    return memoryview(_zstd_compressor().compress(data))


def _zstd_decompress(data: memoryview, out: memoryview, itemsize: int) -> None:
    codec = CODECS["zstd"]
    library = _library("zstd")
    frame = library.get_frame_parameters(data)
    if frame.content_size != out.nbytes or frame.dict_id:
        raise _wrong(
            codec, f"a frame of {frame.content_size} bytes, dictionary {frame.dict_id}", f"{out.nbytes} bytes, none"
        )
    # The reader does not say where the frame ends, and a frame that is all there is unpacked without a second buffer.
    size = _zstd_frame_nbytes(
        data, library.frame_header_size(data), frame.has_checksum, 16 + out.nbytes // _ZSTD_MIN_BLOCK_NBYTES
    )
    if size != data.nbytes:
        raise _wrong(codec, f"a frame of {size} bytes in {data.nbytes}", "one that fills them")
    found = _zstd_decompressor().stream_reader(data).readinto(out)
    if found != out.nbytes:
        raise _wrong(codec, f"{found} bytes", f"{out.nbytes}")


def _zstd_frame_nbytes(data: memoryview, header_nbytes: int, has_checksum: bool, most_blocks: int) -> int:
    """Of the frame at the beginning of `data`, more than there are if it is cut off. RFC 8878, 3.1.1.2."""
    codec = CODECS["zstd"]
    end = header_nbytes
    for _ in range(most_blocks):
        header = data[end : end + 3]
        if header.nbytes < 3:
            return data.nbytes + 1
        bits = header[0] | header[1] << 8 | header[2] << 16
        last, kind, size = bits & 1, bits >> 1 & 3, bits >> 3
        if kind == 3:
            raise _wrong(codec, "a block of a kind that there is not", "raw, repeated or compressed")
        end += 3 + (1 if kind == 1 else size)
        if last:
            return end + (4 if has_checksum else 0)
    raise _wrong(codec, f"more than {most_blocks} blocks", "blocks of 1 KiB or more")


# ---- Blosc2 ----------------------------------------------------------------------------------------------------------


def _blosc2_compress(data: memoryview, itemsize: int, allocate: Allocate) -> memoryview | None:
    if data.nbytes > _BLOSC2_MAX_NBYTES:
        return None
    library = _library("blosc2")
    itemsize = _blosc2_itemsize(data.nbytes, itemsize)
    packed = library.compress2(
        data,
        codec=library.Codec.ZSTD,
        clevel=1,
        typesize=itemsize,
        filters=[library.Filter.SHUFFLE],
        filters_meta=[0],
        blocksize=_BLOSC2_STREAM_NBYTES * itemsize,
        splitmode=library.SplitMode.AUTO_SPLIT,
        nthreads=1,
    )
    return memoryview(packed)


def _blosc2_itemsize(nbytes: int, itemsize: int) -> int:
    """What is shuffled by: Blosc2 4.14 loses what is behind the last whole item where these have 16 bytes."""
    return 1 if nbytes % itemsize else itemsize


def _blosc2_decompress(data: memoryview, out: memoryview, itemsize: int) -> None:
    _check_blosc2_header(data, out.nbytes, _blosc2_itemsize(out.nbytes, itemsize))
    # It takes the size of `out` from the header, which is why that was compared.
    _library("blosc2").decompress2(data, dst=out, nthreads=1)


def _check_blosc2_header(data: memoryview, nbytes: int, itemsize: int) -> None:
    codec = CODECS["blosc2"]
    if data.nbytes < _BLOSC2_HEADER.size:
        raise _wrong(codec, f"{data.nbytes} bytes", f"{_BLOSC2_HEADER.size} or more")
    (
        version,
        inner_version,
        flags,
        typesize,
        declared,
        block_nbytes,
        packed_nbytes,
        filters,
        inner,
        inner_meta,
        filters_meta,
        more_flags,
        special,
    ) = _BLOSC2_HEADER.unpack_from(data)
    if declared != nbytes or packed_nbytes != data.nbytes:
        found = f"a header of {declared} bytes, {packed_nbytes} compressed"
        raise _wrong(codec, found, f"{nbytes} bytes, {data.nbytes} compressed")
    if (
        (version, inner_version, typesize) != (5, 1, itemsize)
        or _BLOSC2_FLAGS.get(flags) != inner
        or filters not in _BLOSC2_FILTERS
        or filters_meta != _BLOSC2_NO_META
        or inner_meta
        or more_flags
    ):
        raise _wrong(codec, f"a header {bytes(data[: _BLOSC2_HEADER.size]).hex()}", "one of a shuffled chunk")
    if special == _BLOSC2_ZEROS and data.nbytes == _BLOSC2_HEADER.size:
        return
    if special or not 0 < block_nbytes <= nbytes:
        raise _wrong(codec, f"blocks of {block_nbytes} bytes, {special:#x}", f"1 to {nbytes}, 0x0")
    blocks = -(-nbytes // block_nbytes)
    if data.nbytes < _BLOSC2_HEADER.size + 4 * blocks:
        raise _wrong(codec, f"{data.nbytes} bytes for {blocks} blocks", f"their offsets in {nbytes}")


_COMPRESS: dict[int, Callable[[memoryview, int, Allocate], memoryview | None]] = {
    1: _zlib_compress,
    2: _lz4_compress,
    3: _zstd_compress,
    4: _blosc2_compress,
}
_DECOMPRESS: dict[int, Callable[[memoryview, memoryview, int], None]] = {
    1: _zlib_decompress,
    2: _lz4_decompress,
    3: _zstd_decompress,
    4: _blosc2_decompress,
}
