"""Compression of a tensor's bytes, for links that are slower than it, and the estimate of whether it pays.

    zlib      in the standard library, slow; run lengths and Huffman codes alone, which suit floating-point numbers
    lz4       an LZ4 frame: finds repetitions, such as the zeros behind a softmax, and little else
    zstd      a Zstandard frame: Huffman codes for the exponents as well
    blosc2    bytes of the same significance side by side, then Zstandard in blocks that fit the cache

Rules. All codecs are optional: lz4, zstandard and blosc2 are imported when they are first asked for, and only what is
installed is offered (`installed`). Bytes that compression does not shorten are sent uncompressed. Several threads may
compress and decompress at once; the libraries release the interpreter's lock.

Compressed bytes from the peer are hostile: the size that they declare is compared with the expected one before a byte
is unpacked, no byte is written behind that, and none may follow the stream. They must lie in private memory, which the
peer cannot change between a check and its use. blosc2 trusts its header, which can name other sizes, filters, files and
plugins: it gets only headers that this module could have written.

A lack of memory is an ArenaFull, not the peer's fault. blosc2 reports both alike, so that after an error this module
tries whether there is memory.
"""

from __future__ import annotations

import builtins
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
    "ROWS",
    "CodecRow",
    "Estimate",
    "compress",
    "decompress",
    "installed",
    "probe",
]

_CALL_S = 50e-6
"""The time of a message beside its bytes, both sides together."""

_CHUNK_NBYTES = 256 * 1024
"""Bytes that are unpacked at a time where a library cannot unpack into our memory: they stay in the cache."""

_ZSTD_LEVEL = 1  # the negative ones store floating-point numbers as they are; 3 takes twice the time for 1 %
_ZSTD_MIN_BLOCK_NBYTES = 1024

_ZLIB_LEVEL = 1
# Floating-point numbers do not repeat: a search for repetitions takes longer, and finds less than run lengths.
_ZLIB_STRATEGY = zlib.Z_RLE
_ZLIB_WBITS, _ZLIB_MEM_LEVEL = 15, 9

_BLOSC2_STREAM_NBYTES = 64 * 1024
"""Bytes of one significance in a block."""
_BLOSC2_HEADER = struct.Struct("<4B3i6s2B6s2B")
_BLOSC2_FLAGS = {0x85: 5, 0x95: 5, 0x25: 1, 0x35: 1}
"""Flags of Zstandard and LZ4, with blocks split by significance or not -> the number of the codec, a later field."""
_BLOSC2_FILTERS = (bytes([1, 0, 0, 0, 0, 0]), bytes([2, 0, 0, 0, 0, 0]))  # shuffled by bytes, or by bits
_BLOSC2_NO_META = bytes(6)
_BLOSC2_ZEROS = 0x10
_BLOSC2_MAX_NBYTES = 2**31 - 1 - _BLOSC2_HEADER.size

_SAMPLE_PIECES = 4
_MIN_PIECE_NBYTES, _MAX_PIECE_NBYTES = 1024, 16 * 1024
_MIN_S = 1e-7  # a clock may not have moved
_NO_MEMORY = ("llocation", "Error -4 ")  # in errors of zstd and lz4, and zlib's Z_MEM_ERROR
_SCRATCH_BLOCKS, _SCRATCH_NBYTES = 4, 16 * 1024**2
"""Memory that a library may need beside its input and output: four blocks (blosc2), and a constant."""
_FEW_BYTES = memoryview(bytes(64))

Allocate = Callable[[int], Memory]


class CodecRow(NamedTuple):
    """One row of ROWS."""

    module: str
    """The library."""
    compress: Callable[[memoryview, int, Allocate], memoryview | None]
    decompress: Callable[[memoryview, memoryview, int], None]
    errors: tuple[str, ...]
    """The exceptions that it raises for data that it cannot unpack and for a lack of memory, beside MemoryError: names
    in the library, or of built-in ones."""
    unpack_over_pack: float
    """Speed of unpacking over speed of packing, for activations of a model on one core (docs/notes.md)."""


class Estimate(NamedTuple):
    """What a codec is expected to do to some bytes. `ratio`: compressed over uncompressed, 1 if it does not help."""

    ratio: float
    compress_bytes_per_s: float
    decompress_bytes_per_s: float
    """Both of uncompressed bytes."""

    def seconds(self, nbytes: int, bytes_per_s: float) -> float:
        """Seconds to compress, send and unpack `nbytes` bytes: n / c + n * ratio / B + n / d + t.

        n = nbytes, B = bytes_per_s of the link, c and d = the speeds of compressing and of unpacking, t = the time of a
        message beside its bytes.
        """
        work_s = nbytes / self.compress_bytes_per_s + nbytes / self.decompress_bytes_per_s
        return work_s + nbytes * self.ratio / bytes_per_s + _CALL_S


@functools.cache
def installed() -> tuple[str, ...]:
    """The codecs that are installed here, best for tensors first. Imports none of them.

    Raises ResourceError if there is no descriptor left for the first look.
    """
    try:
        return tuple(name for name in ROWS if _is_there(name))
    except OSError as error:
        raise ResourceError(f"codecs that are installed: {why(error)}") from None


def compress(codec: int, data: memoryview, itemsize: int, allocate: Allocate) -> memoryview | None:
    """The compressed bytes of `data`, None if they would not be fewer.

    `data` and the result are flat, contiguous, and of one byte for each item. `itemsize`: of the tensor's dtype. The
    result lies in memory from `allocate`, or of the library. Raises ArenaFull.
    """
    if data.nbytes < 2:
        return None
    try:
        packed = _row(codec).compress(data, itemsize, allocate)
    except _errors(codec) as error:
        if _is_shortage(error, 0):
            raise _full(codec, "compress", data.nbytes) from None
        raise
    return packed if packed is not None and packed.nbytes < data.nbytes else None


def decompress(codec: int, data: memoryview, out: memoryview, itemsize: int) -> None:
    """Unpacks `data` into `out`, which is flat, writable, of one byte for each item, and as long as the result.

    Raises RemoteProtocolError unless `data` is exactly one stream of that result, and shorter than it; ArenaFull if
    there is no memory to unpack it. After an error the content of `out` is undefined.
    """
    name = CODEC_NAMES.get(codec)
    if name not in installed():
        raise RemoteProtocolError(f"codec: {codec if name is None else name}, expected {' or '.join(installed())}")
    if not data.nbytes < out.nbytes:
        raise _wrong(codec, f"{data.nbytes} bytes compressed", f"fewer than {out.nbytes}")
    try:
        _row(codec).decompress(data, out, itemsize)
    except _errors(codec) as error:
        block_nbytes = _BLOSC2_HEADER.unpack_from(data)[5] if codec == CODECS["blosc2"] else 0  # the peer's word
        if _is_shortage(error, min(max(block_nbytes, 0), out.nbytes)):
            raise _full(codec, "unpack", out.nbytes) from None
        raise _wrong(codec, f"corrupt data ({str(error) or type(error).__name__})", f"{out.nbytes} bytes") from None


def probe(codec: int, data: memoryview, itemsize: int) -> Estimate:
    """The estimate for `data`, from compressing a sample: 2 % of it in four pieces, of 1 to 16 KiB each.

    Takes less than 1 ms once the thread has used the codec. The speed of unpacking is derived from that of packing.
    """
    size = data.nbytes // (50 * _SAMPLE_PIECES)
    size = min(max(size, _MIN_PIECE_NBYTES), _MAX_PIECE_NBYTES) // itemsize * itemsize
    if size * _SAMPLE_PIECES < data.nbytes:
        quarter = data.nbytes // _SAMPLE_PIECES
        middle = (quarter - size) // 2  # the very beginning is often unlike the rest
        starts = [(quarter * piece + middle) // itemsize * itemsize for piece in range(_SAMPLE_PIECES)]
        data = memoryview(b"".join([data[start : start + size] for start in starts]))
    if data.nbytes < 2:
        return Estimate(1.0, 1.0, 1.0)
    start_s = _start_s(codec)
    duration_s, packed_nbytes = _timed(codec, data, itemsize)
    rate = data.nbytes / max(duration_s - start_s, duration_s / 2, _MIN_S)
    return Estimate(packed_nbytes / data.nbytes, rate, rate * _row(codec).unpack_over_pack)


def _is_shortage(error: Exception, block_nbytes: int) -> bool:
    """Whether a codec failed for lack of memory: its error says so, or there is no memory for its blocks."""
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
"""A thread's own contexts: a Zstandard context is for one thread at a time, and slow to make (20 us)."""


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(ROWS[name].module.partition(".")[0]) is not None


@functools.cache
def _library(name: str) -> Any:
    try:
        library = importlib.import_module(ROWS[name].module)
    except (ImportError, OSError) as error:  # perhaps one of its own libraries is missing
        short = import_shortage(error)
        if short is not None:
            raise ResourceError(f"codec: {name!r} cannot be imported: {short}") from None
        raise SettingError(f"codec: {name!r}, which is installed and cannot be imported: {error}") from None
    if name == "blosc2":
        library.set_releasegil(True)
    return library


@functools.cache
def _errors(codec: int) -> tuple[type[Exception], ...]:
    """The errors of a library, for data that it cannot unpack and for a lack of memory."""
    row, library = _row(codec), _library(CODEC_NAMES[codec])
    return MemoryError, *(getattr(library, name, None) or getattr(builtins, name) for name in row.errors)


def _start_s(codec: int) -> float:
    """Seconds that this thread takes for a few bytes: the constant part of a codec's time."""
    known: dict[int, float] | None = getattr(_local, "start_s", None)
    if known is None:
        known = _local.start_s = {}
    if codec not in known:
        # The first run makes the thread's context.
        known[codec] = min(_timed(codec, _FEW_BYTES, 1)[0] for _ in range(4))
    return known[codec]


def _timed(codec: int, data: memoryview, itemsize: int) -> tuple[float, int]:
    """Seconds to compress, and the compressed bytes."""
    start_s = time.perf_counter()
    packed = _row(codec).compress(data, itemsize, _private)
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
        # One byte more than there is room for shows an excess.
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
        # One byte more than there is room for lets the frame end, and shows an excess.
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
    # The library does not report where the frame ends.
    size = _zstd_frame_nbytes(
        data, library.frame_header_size(data), frame.has_checksum, 16 + out.nbytes // _ZSTD_MIN_BLOCK_NBYTES
    )
    if size != data.nbytes:
        raise _wrong(codec, f"a frame of {size} bytes in {data.nbytes}", "one that fills them")
    found = _zstd_decompressor().stream_reader(data).readinto(out)
    if found != out.nbytes:
        raise _wrong(codec, f"{found} bytes", f"{out.nbytes}")


def _zstd_frame_nbytes(data: memoryview, header_nbytes: int, has_checksum: bool, max_blocks: int) -> int:
    """Bytes of the frame at the start of `data`; more than `data` has if it is cut off. RFC 8878, 3.1.1.2."""
    codec = CODECS["zstd"]
    end = header_nbytes
    for _ in range(max_blocks):
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
    raise _wrong(codec, f"more than {max_blocks} blocks", "blocks of 1 KiB or more")


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
    """Bytes of an item for the shuffle: blosc2 4.14 loses the bytes behind the last whole item of 16 bytes."""
    return 1 if nbytes % itemsize else itemsize


def _blosc2_decompress(data: memoryview, out: memoryview, itemsize: int) -> None:
    _check_blosc2_header(data, out.nbytes, _blosc2_itemsize(out.nbytes, itemsize))
    # The library takes the size of `out` from the header, which was compared with it.
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


ROWS: dict[str, CodecRow] = {
    "blosc2": CodecRow("blosc2", _blosc2_compress, _blosc2_decompress, ("RuntimeError", "ValueError"), 3.0),
    "zstd": CodecRow("zstandard", _zstd_compress, _zstd_decompress, ("ZstdError",), 1.2),
    "lz4": CodecRow("lz4.frame", _lz4_compress, _lz4_decompress, ("RuntimeError", "ValueError"), 2.0),
    "zlib": CodecRow("zlib", _zlib_compress, _zlib_decompress, ("error",), 1.5),
}
"""The codecs by name, best for tensors first. Their numbers are the protocol's (schema/coding.py)."""


def _row(codec: int) -> CodecRow:
    return ROWS[CODEC_NAMES[codec]]
