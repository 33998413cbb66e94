"""Compression: what goes in comes out, what is hostile is refused before it costs memory, and whether it pays."""

from __future__ import annotations

import itertools
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsplit.errors import RemoteProtocolError, SettingError
from fastsplit.schema.coding import CODEC_NAMES, CODECS
from fastsplit.tensors.pool import pool
from fastsplit.wire import codecs as codec
from fastsplit.wire.codecs import Estimate, compress, decompress, installed, probe

ROOT = Path(__file__).resolve().parents[2]
ITEMSIZES = (1, 2, 4, 8, 16)


@pytest.fixture(params=CODECS)
def number(request: pytest.FixtureRequest) -> int:
    if request.param not in installed():
        pytest.skip(f"{request.param} is not installed")
    return CODECS[request.param]


def need(name: str) -> Any:
    if name not in installed():
        pytest.skip(f"{name} is not installed")
    return codec._library(name)


def activations(count: int = 50_000, dtype: str = "float32") -> memoryview:
    """Numbers as a model has them: few exponents, any mantissa, and zeros as behind a softmax."""
    values = np.random.default_rng(1).standard_normal(count).astype(dtype)
    values[::3] = 0
    values[: count // 4] = 0
    return values.view(np.uint8).data


def pack(number: int, data: memoryview, itemsize: int = 4) -> bytes:
    packed = compress(number, data, itemsize, pool.allocate)
    assert packed is not None and packed.nbytes < data.nbytes and packed.format == "B" and packed.ndim == 1
    return bytes(packed)


def unpack(number: int, packed: bytes, nbytes: int, itemsize: int = 4) -> bytes:
    """What comes out, of memory with a margin that must stay as it is."""
    memory = memoryview(bytearray(b"\xa5" * (nbytes + 128)))
    try:
        decompress(number, memoryview(packed), memory[64 : 64 + nbytes], itemsize)
    finally:
        assert bytes(memory[:64]) == bytes(memory[64 + nbytes :]) == b"\xa5" * 64
    return bytes(memory[64 : 64 + nbytes])


def refused(number: int, packed: bytes, nbytes: int, *, itemsize: int = 4, match: str | None = None) -> None:
    with pytest.raises(RemoteProtocolError, match=match):
        unpack(number, packed, nbytes, itemsize)


# ---- what goes in comes out ------------------------------------------------------------------------------------------


def test_numbers_and_names() -> None:
    assert CODECS == {"zlib": 1, "lz4": 2, "zstd": 3, "blosc2": 4}
    assert {name: CODEC_NAMES[number] for name, number in CODECS.items()} == {name: name for name in CODECS}
    assert set(installed()) <= set(CODECS) and "zlib" in installed()
    assert set(codec.ROWS) == set(CODECS)


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_round_trip(number: int, itemsize: int) -> None:
    data = activations()
    # multiples of the item's size and not, below and above a block of any codec
    for size in (*range(24), 63, 64, 65, 129, 1000, 4099, 65536, 65537, 65536 + 16 * 3, 150_001, data.nbytes):
        for start in (0, 51_000 // 16 * 16):
            piece = data[start : start + size]
            packed = compress(number, piece, itemsize, pool.allocate)
            if packed is not None:
                assert packed.nbytes < piece.nbytes
                assert unpack(number, bytes(packed), piece.nbytes, itemsize) == bytes(piece)


def test_large(number: int) -> None:
    data = activations(800_000)
    assert unpack(number, pack(number, data), data.nbytes) == bytes(data)
    half = activations(800_000, "float16")
    assert unpack(number, pack(number, half, 2), half.nbytes, 2) == bytes(half)


def test_zeros_and_one_value(number: int) -> None:
    for value in (0, 1.5) if CODEC_NAMES[number] != "zlib" else (0,):  # which looks for single bytes that repeat
        data = np.full(100_000, value, np.float32).view(np.uint8).data
        packed = pack(number, data)
        assert len(packed) < 5000
        assert unpack(number, packed, data.nbytes) == bytes(data)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 64, 1000, 300_001])
def test_what_does_not_get_shorter_is_left(number: int, size: int) -> None:
    data = memoryview(np.random.default_rng(2).integers(0, 256, size, np.uint8)).cast("B")
    assert compress(number, data, 4, pool.allocate) is None


def test_does_not_change_what_it_is_given(number: int) -> None:
    data = activations().toreadonly()
    before = bytes(data)
    packed = pack(number, data)
    kept = bytes(packed)
    unpack(number, packed, data.nbytes)
    assert bytes(data) == before and packed == kept


def test_threads(number: int) -> None:
    """Contexts are not shared, whoever comes first."""
    pieces = [activations()[start : start + 60_000 + 4 * start] for start in range(0, 8000, 1000)]
    together = threading.Barrier(4)

    def work(index: int) -> None:
        together.wait(timeout=10)
        for piece in pieces[index:] + pieces[:index]:
            assert unpack(number, pack(number, piece), piece.nbytes) == bytes(piece)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))


# ---- hostile ---------------------------------------------------------------------------------------------------------


def test_truncated(number: int) -> None:
    data = activations(5000)
    packed = pack(number, data)
    for size in {*range(40), *range(40, len(packed), 997), *range(len(packed) - 12, len(packed))}:
        refused(number, packed[:size], data.nbytes)


def test_trailing(number: int) -> None:
    data = activations(5000)
    packed = pack(number, data)
    for trailing in (b"\0", b"\0\0\0\0", b"x" * 100, packed):
        refused(number, packed + trailing, data.nbytes)


def test_another_size(number: int) -> None:
    data = activations(5000)
    packed = pack(number, data)
    for nbytes in (0, 1, len(packed), len(packed) + 1, data.nbytes - 1, data.nbytes + 1, 2 * data.nbytes):
        refused(number, packed, nbytes)


def test_not_fewer_bytes(number: int) -> None:
    packed = pack(number, activations(5000))
    refused(number, packed, len(packed), match="expected fewer than")


def test_random(number: int) -> None:
    numbers = random.Random(3)
    for size in [*range(100), 1000, 10_000]:
        refused(number, numbers.randbytes(size), 20_000)


def test_a_codec_that_there_is_not() -> None:
    for number in (0, 5, 255):
        refused(number, b"x" * 10, 100, match=f"codec: {number}, expected .*zlib")


def test_a_codec_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "installed", lambda: ("zlib",))
    refused(CODECS["blosc2"], b"x" * 40, 100, match="codec: blosc2, expected zlib")


def test_messages_say_what_came(number: int) -> None:
    data = activations(5000)
    name = CODEC_NAMES[number]
    refused(number, pack(number, data), data.nbytes + 4, match=rf"^compressed tensor, {name}: .*expected {20_004}")


def test_flipped_bits_never_crash() -> None:
    """In a process of its own, since what it is about is that this lives."""
    program = """
import random
from tests.unit.test_codecs import CODECS, RemoteProtocolError, activations, decompress, installed, pack
numbers = random.Random(4)
for name in installed():
    for count in (200, 5000, 30_000):
        data = activations(count)
        packed = pack(CODECS[name], data)
        out = memoryview(bytearray(data.nbytes))
        for _ in range(150):
            bad = bytearray(packed)
            for _ in range(numbers.choice((1, 1, 8))):
                bad[numbers.randrange(min(len(bad), numbers.choice((64, 400, 10**6))))] ^= 1 << numbers.randrange(8)
            try:
                decompress(CODECS[name], memoryview(bad), out, 4)
            except RemoteProtocolError:
                pass
print("lives")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "lives\n", done.stderr


def zlib_bomb(nbytes: int) -> bytes:
    packer = zlib.compressobj(9)
    zeros = bytes(2**20)
    return b"".join([packer.compress(zeros) for _ in range(nbytes // len(zeros))]) + packer.flush()


def lz4_bomb(nbytes: int) -> bytes:
    block = bytes(4 * 2**20)
    library = need("lz4")
    context = library.create_compression_context()
    parts = [library.compress_begin(context, block_size=7, block_linked=False)]
    part = library.compress_chunk(context, block)
    parts += [part] * (nbytes // len(block))
    parts.append(bytes(4))  # the end
    return b"".join(parts)


def lz4_bomb_of_another_size(nbytes: int) -> bytes:
    """What it declares is what is expected."""
    library = need("lz4")
    honest = library.compress(bytes(100_000), block_linked=False, store_size=True)
    header = 4 + 2 + 8 + 1
    return bytes(honest[:header]) + lz4_bomb(nbytes)[7:]


def zstd_bomb(nbytes: int) -> bytes:
    """A frame of repeated bytes: 4 bytes for 128 KiB."""
    header = struct.pack("<IBBQ", 0xFD2FB528, 0b1100_0000, 0x80, nbytes)  # with a window of 64 MiB
    block = 128 * 1024
    return header + b"".join(
        (last | 1 << 1 | block << 3).to_bytes(3, "little") + b"\0"
        for last in itertools.chain([0] * (nbytes // block - 1), [1])
    )


def zstd_bomb_of_another_size(nbytes: int) -> bytes:
    bomb = bytearray(zstd_bomb(nbytes))
    struct.pack_into("<Q", bomb, 6, 100_000)
    return bytes(bomb)


def blosc2_bomb(nbytes: int) -> bytes:
    data = np.zeros(100_000, np.uint8).data
    need("blosc2")
    bomb = bytearray(pack(CODECS["blosc2"], data))
    struct.pack_into("<i", bomb, 4, nbytes)
    return bytes(bomb)


@pytest.mark.parametrize(
    ("name", "bomb", "nbytes"),
    [
        ("zlib", zlib_bomb, 2**26),
        ("lz4", lz4_bomb, 2**30),
        ("lz4", lz4_bomb_of_another_size, 2**24),
        ("zstd", zstd_bomb, 2**30),
        ("zstd", zstd_bomb_of_another_size, 2**30),
        ("blosc2", blosc2_bomb, 2**30),
    ],
)
def test_bombs(name: str, bomb: Callable[[int], bytes], nbytes: int) -> None:
    need(name)
    large = bomb(nbytes)
    expected = 100_000 if len(large) < 100_000 else len(large) + 1
    out = memoryview(bytearray(expected))
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match=f"compressed tensor, {name}"):
            decompress(CODECS[name], memoryview(large), out, 4)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_bombs_take_no_memory_of_the_libraries() -> None:
    """What tracemalloc does not see: the process's own peak."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    program = """
import re
from tests.unit.test_codecs import *
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
bombs = [("zlib", zlib_bomb), ("lz4", lz4_bomb), ("zstd", zstd_bomb), ("zstd", zstd_bomb_of_another_size)]
bombs = [(CODECS[name], bomb(2**26)) for name, bomb in bombs if name in installed()]
before = peak()
for number, bomb in bombs:
    try:
        decompress(number, memoryview(bomb), memoryview(bytearray(max(100_000, len(bomb) + 1))), 4)
    except RemoteProtocolError:
        continue
    raise AssertionError(number)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 2**20


# ---- what one codec alone has ----------------------------------------------------------------------------------------


def test_lz4_frames_of_others() -> None:
    library = need("lz4")
    number, data = CODECS["lz4"], bytes(activations())
    for options in ({"block_linked": True}, {"content_checksum": True, "block_checksum": True}, {"block_size": 7}):
        assert unpack(number, library.compress(data, **options), len(data)) == data
    refused(number, library.compress(data, store_size=False), len(data), match="a frame of 0 bytes")
    skippable = struct.pack("<II", 0x184D2A50, 20) + bytes(20)
    refused(number, skippable, 1000)
    refused(number, skippable + library.compress(data), len(data))


def test_zstd_frames_of_others() -> None:
    library = need("zstd")
    number, data = CODECS["zstd"], bytes(activations())
    for options in ({"level": 9}, {"level": -5}, {"write_checksum": True}):
        assert unpack(number, library.ZstdCompressor(**options).compress(data), len(data)) == data
    unsized = library.ZstdCompressor(write_content_size=False).compress(data)
    refused(number, unsized, len(data), match="a frame of")
    checked = bytearray(library.ZstdCompressor(write_checksum=True).compress(data))
    checked[-1] ^= 1
    refused(number, bytes(checked), len(data))
    skippable = struct.pack("<II", 0x184D2A50, 20) + bytes(20)
    refused(number, skippable, 1000)
    refused(number, skippable + library.ZstdCompressor().compress(data), len(data))


def test_zstd_frames_of_very_small_blocks() -> None:
    """Each costs Python a turn."""
    need("zstd")
    blocks = [(0 << 1 | 1 << 3).to_bytes(3, "little") + b"x" for _ in range(20_000)]
    frame = struct.pack("<IBI", 0xFD2FB528, 0b1010_0000, 100_000) + b"".join(blocks)
    refused(CODECS["zstd"], frame, 100_000, match="more than 113 blocks")


@pytest.mark.parametrize(
    ("offset", "value", "match"),
    [
        (0, b"\x06", "a header"),  # a version with blocks of any size
        (1, b"\x02", "a header"),
        (2, b"\x87", "a header"),  # not compressed
        (2, b"\x8d", "a header"),  # lazy: the rest is in a file
        (2, b"\xa5", "a header"),  # another codec
        (2, b"\xe5", "a header"),  # a plugin
        (2, b"\x25", "a header"),  # not the one that is named below
        (3, b"\x00", "a header"),
        (3, b"\x02", "a header"),
        (4, struct.pack("<i", 10**9), "a header of 1000000000 bytes"),
        (4, struct.pack("<i", -1), "a header of -1 bytes"),
        (8, struct.pack("<i", 0), "blocks of 0 bytes"),
        (8, struct.pack("<i", -1), "blocks of -1 bytes"),
        (8, struct.pack("<i", 10**9), "blocks of 1000000000 bytes"),
        (8, struct.pack("<i", 1), "blocks"),
        (12, struct.pack("<i", 50), "a header of .* 50 compressed"),
        (16, b"\xa0", "a header"),  # a filter that somebody registered
        (17, b"\x01", "a header"),
        (22, b"\xa0", "a header"),  # a codec that somebody registered
        (23, b"\x01", "a header"),
        (24, b"\x01", "a header"),
        (30, b"\x01", "a header"),
        (31, b"\x10", "blocks"),  # zeros, and something behind them
        (31, b"\x20", "blocks"),  # NaN
        (31, b"\x30", "blocks"),  # one value
        (31, b"\x40", "blocks"),  # whatever was in memory
        (31, b"\x01", "blocks"),  # a dictionary
    ],
)
def test_blosc2_headers_that_we_do_not_write(offset: int, value: bytes, match: str) -> None:
    need("blosc2")
    data = activations(100_000)
    packed = bytearray(pack(CODECS["blosc2"], data))
    packed[offset : offset + len(value)] = value
    refused(CODECS["blosc2"], bytes(packed), data.nbytes, match=match)


def test_blosc2_with_lz4_and_shuffled_by_bits() -> None:
    library = need("blosc2")
    data = bytes(activations())
    for inner, shuffle in itertools.product(("LZ4", "ZSTD"), ("SHUFFLE", "BITSHUFFLE")):
        options = {"codec": library.Codec[inner], "filters": [library.Filter[shuffle]], "filters_meta": [0]}
        packed = library.compress2(data, typesize=4, clevel=1, nthreads=1, **options)
        assert unpack(CODECS["blosc2"], packed, len(data)) == data


def test_blosc2_takes_only_what_its_sizes_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    need("blosc2")
    monkeypatch.setattr(codec, "_BLOSC2_MAX_NBYTES", 1000)
    assert compress(CODECS["blosc2"], memoryview(bytes(1004)), 4, pool.allocate) is None
    assert compress(CODECS["blosc2"], memoryview(bytes(1000)), 4, pool.allocate) is not None


# ---- whether it pays -------------------------------------------------------------------------------------------------


def test_probe_is_near_what_comes_out(number: int) -> None:
    data = np.random.default_rng(5).standard_normal(1_000_000).astype(np.float32).view(np.uint8).data
    estimate = probe(number, data, 4)
    packed = compress(number, data, 4, pool.allocate)
    assert estimate.ratio == pytest.approx(1.0 if packed is None else packed.nbytes / data.nbytes, abs=0.05)
    assert estimate.compress_bytes_per_s > 0 and estimate.decompress_bytes_per_s > 0


@pytest.mark.parametrize("size", [0, 1, 7, 100, 4096, 5000, 100_000])
def test_probe_of_little(number: int, size: int) -> None:
    for itemsize in ITEMSIZES:
        estimate = probe(number, memoryview(bytes(size)), itemsize)
        assert 0 < estimate.ratio <= 1 and estimate.compress_bytes_per_s > 0


def test_probe_looks_at_little(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    name = CODEC_NAMES[number]
    row = codec.ROWS[name]

    def watch(data: memoryview, itemsize: int, allocate: Any) -> memoryview | None:
        seen.append(data.nbytes)
        return row.compress(data, itemsize, allocate)

    monkeypatch.setitem(codec.ROWS, name, row._replace(compress=watch))
    for size in (2**20, 2**26):
        seen.clear()
        probe(number, memoryview(bytearray(size)), 4)
        assert max(seen) <= min(size / 50, 64 * 1024)


def test_what_it_takes_is_the_sum_of_all_steps() -> None:
    half = Estimate(0.5, 1e9, 2e9)
    assert half.seconds(10**9, 1e8) == pytest.approx(1 + 0.5 + 5, rel=1e-4)
    assert half.seconds(0, 1e8) == pytest.approx(50e-6)


def test_without_the_libraries() -> None:
    program = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("lz4", "zstandard", "blosc2") else find_spec(name)
from fastsplit.wire.codecs import installed
assert installed() == ("zlib",), installed()
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


def test_one_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    need("zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    codec._library.cache_clear()
    with pytest.raises(SettingError, match="codec: 'zstd', which is installed and cannot be imported: "):
        codec._library("zstd")


def test_importing_brings_none_of_them() -> None:
    program = "import fastsplit.wire.codecs as codec, sys; codec.installed(); "
    program += "assert not {'lz4', 'zstandard', 'blosc2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
