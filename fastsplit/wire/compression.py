"""Casts and compression on one connection: what both sides can do, what is done to a message, and what it saved.

A cast changes numbers, so that the caller asks for it, for a connection or a call. Compression changes no number, and
may be chosen here: "auto" compresses a large tensor if the link's speed is known and a sample of its bytes predicts a
shorter time. A codec's name compresses all large tensors.

Rules. Tensors in shared memory are never coded. Each side decides about what it sends; what it accepts was agreed on in
the handshake. A tensor decodes to the same bits with every codec.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from ..errors import SettingError, shown
from ..schema.coding import CAST_NAMES, CASTS, CODEC_NAMES, CODECS, cast_bit, codec_bit, coded_nbytes, coding_name
from ..schema.descriptor import TensorDesc
from ..schema.dtypes import BY_CODE
from ..schema.limits import ARRAYS, Limits
from ..tensors import Cast, Outgoing, collect_cast, widen
from ..tensors.pool import Pool, Tenant
from . import codecs
from .stats import Coded

__all__ = [
    "AUTO",
    "MIN_CAST_NBYTES",
    "OFF",
    "THRESHOLD_NBYTES",
    "Codec",
    "Coder",
    "parse_cast",
    "parse_codec",
]

AUTO = None
OFF = 0
Codec = int | None
"""A number of schema/coding.py, OFF, or AUTO."""

THRESHOLD_NBYTES = 1024**2
MIN_CAST_NBYTES = 64 * 1024
"""The smallest float32 tensor that is cast. A smaller one is sent faster than it is cast (at 1 Gbit/s), and may be a
scale whose precision matters."""
_SAMPLE_EVERY = 16  # messages of an operation that use one sample's result
_MAX_KNOWN = 256
_KEEPS_UP, _WORTH = 1.5, 0.9
"""While one message travels, another can be compressed on a core that is idle. For that a codec must be at least
_KEEPS_UP times as fast as the link, and leave at most _WORTH of the bytes."""


def parse_cast(wire_dtype: object) -> int:
    """The argument `wire_dtype`: the number of a cast, 0 for none. Raises SettingError."""
    if wire_dtype is None:
        return 0
    if not isinstance(wire_dtype, str) or wire_dtype not in CASTS:
        raise SettingError(f"wire_dtype: {shown(wire_dtype)}, expected None, {' or '.join(map(repr, CASTS))}")
    return CASTS[wire_dtype]


def parse_codec(codec: object) -> Codec:
    """The argument `codec`: "auto", "off", or a codec's name. Raises SettingError also for one that is not
    installed."""
    if isinstance(codec, str) and codec == "auto":
        return AUTO
    if isinstance(codec, str) and codec == "off":
        return OFF
    if not isinstance(codec, str) or codec not in CODECS:
        raise SettingError(f"codec: {shown(codec)}, expected 'auto', 'off', {', '.join(map(repr, CODECS))}")
    if codec not in codecs.installed():
        raise SettingError(f"codec: {codec!r}, which is not installed here: pip install 'fastsplit[codecs]'")
    return CODECS[codec]


class Coder:
    """One connection's codings. `threshold_nbytes`: bytes of the smallest tensor that is compressed, after its cast."""

    def __init__(self, pool: Pool | Tenant, threshold_nbytes: int = THRESHOLD_NBYTES) -> None:
        self.threshold_nbytes = threshold_nbytes
        self.accepted: frozenset[int] = frozenset()
        """The codings that both sides know."""
        self.overlaps = False
        """Whether several messages are under way at once, so that one travels while another is compressed."""
        self.stats: dict[str, Coded] = {}
        self.too_large = 0
        self.lock = threading.RLock()  # several threads may send for one connection, and a finalizer inside of one
        self._allocate = pool.allocate
        self._codecs: tuple[int, ...] = ()  # both sides', best first
        self._known: dict[tuple[str, int], tuple[int, int]] = {}  # op, index -> codec, and messages since the sample

    @property
    def least_nbytes(self) -> int:
        """Smaller tensors are never coded."""
        return min(self.threshold_nbytes, MIN_CAST_NBYTES)

    # ---- the handshake ----

    @staticmethod
    def capabilities() -> int:
        """The codings that this side knows, as capability bits of a HELLO."""
        return sum(map(cast_bit, CASTS.values())) + sum(codec_bit(CODECS[name]) for name in codecs.installed())

    def agree(self, capabilities: int) -> None:
        """Sets the codings from the capabilities that both sides have."""
        numbers = [CODECS[name] for name in codecs.installed()]
        self._codecs = tuple(number for number in numbers if capabilities & codec_bit(number))
        casts = [number for number in CASTS.values() if capabilities & cast_bit(number)]
        self.accepted = frozenset(
            cast << 4 | codec for cast in (0, *casts) for codec in (0, *self._codecs) if cast or codec
        )

    def check(self, cast: int, codec: Codec) -> None:
        """Raises SettingError for a cast or a codec that the peer does not know."""
        if cast and cast << 4 not in self.accepted:
            raise SettingError(f"wire_dtype: {CAST_NAMES[cast]!r}, which the peer does not know")
        if codec and codec not in self.accepted:
            theirs = ", ".join(CODEC_NAMES[number] for number in self._codecs) or "none"
            raise SettingError(f"codec: {CODEC_NAMES[codec]!r}, which the peer does not have; both have: {theirs}")

    # ---- out ----

    def collect(
        self,
        op: str,
        tensors: Sequence[Any],
        cast: int,
        codec: Codec,
        bytes_per_s: float | None,
        limits: Limits = ARRAYS,
    ) -> Outgoing:
        """Prepares tensors for a stream, as tensors.collect does, and codes them.

        `bytes_per_s`: the link's speed, None if it is not known. `limits`: the peer's. Raises TensorError, LimitError,
        ArenaFull.
        """
        if codec and codec not in self.accepted:
            codec = OFF  # the server's choice for all of its clients, and this one does not have it
        found = collect_cast(tensors, cast, self._allocate, MIN_CAST_NBYTES, limits)
        if found.cast_s:
            self._count_casts(found)
        buffers: list[Any] = []
        placements: list[int] = []
        offset = 0
        is_coded = False
        for index, (desc, buffer, used) in enumerate(zip(found.descs, found.buffers, found.casts)):
            size, coding = buffer.nbytes, used << 4
            if size >= self.threshold_nbytes and codec != OFF:
                data = memoryview(buffer).cast("B") if size else buffer
                itemsize = 2 if used else BY_CODE[desc[0]].itemsize
                number = codec or self._choose((op, index), data, itemsize, bytes_per_s)
                if number:
                    packed = self._compress(number, data, itemsize)
                    if packed is not None:
                        buffer, size, coding = packed, len(packed), coding | number
            placements += (coding << 32, offset, size)
            is_coded = is_coded or coding != 0
            offset += size
            if size:
                buffers.append(buffer)
        return Outgoing(found.descs, buffers, offset, found.copied_nbytes, placements if is_coded else ())

    def _count_casts(self, found: Cast) -> None:
        with self.lock:
            self.too_large += found.too_large
        for cast in set(found.casts) - {0}:
            sizes = [buffer.nbytes for buffer, used in zip(found.buffers, found.casts) if used == cast]
            share = len(sizes) / sum(used != 0 for used in found.casts)
            self._count(cast << 4, 2 * sum(sizes), sum(sizes), len(sizes), encode_s=found.cast_s * share)

    def _compress(self, number: int, data: memoryview, itemsize: int) -> memoryview | None:
        started_s = perf_counter()
        packed = codecs.compress(number, data, itemsize, self._allocate)
        elapsed_s = perf_counter() - started_s
        if packed is None:
            self._count(number, 0, 0, 0, encode_s=elapsed_s)
        else:
            self._count(number, len(data), len(packed), encode_s=elapsed_s)
        return packed

    def _choose(self, key: tuple[str, int], data: memoryview, itemsize: int, bytes_per_s: float | None) -> int:
        """The codec with which the whole takes the least time, OFF if none is faster than no codec."""
        if not bytes_per_s or not self._codecs:
            return OFF
        number, times = self._known.get(key, (OFF, _SAMPLE_EVERY))
        if times >= _SAMPLE_EVERY:
            best_s = len(data) / bytes_per_s
            number = times = 0
            for candidate in self._codecs:
                estimate = codecs.probe(candidate, data, itemsize)
                needed_s = estimate.seconds(len(data), bytes_per_s)
                if self.overlaps and estimate.compress_bytes_per_s >= _KEEPS_UP * bytes_per_s:
                    needed_s = min(needed_s, len(data) * estimate.ratio / bytes_per_s / _WORTH)
                if needed_s < best_s:
                    number, best_s = candidate, needed_s
        if len(self._known) >= _MAX_KNOWN and key not in self._known:
            self._known.clear()
        self._known[key] = (number, times + 1)
        return number

    # ---- in ----

    def decode(self, coding: int, data: Any, desc: TensorDesc) -> Any:
        """The memory of a tensor whose coded bytes are in `data`, flat uint8.

        Raises RemoteProtocolError, ArenaFull.
        """
        cast, number = coding >> 4, coding & 15
        if number:
            started_s = perf_counter()
            size = coded_nbytes(desc.nbytes, coding)
            unpacked = self._allocate(size)
            codecs.decompress(number, data.data, unpacked.data, 2 if cast else desc.dtype.itemsize)
            self._count(number, size, len(data), decode_s=perf_counter() - started_s)
            data = unpacked
        if cast:
            started_s = perf_counter()
            memory = self._allocate(desc.nbytes)
            widen(data, cast, memory)
            self._count(cast << 4, desc.nbytes, desc.nbytes // 2, decode_s=perf_counter() - started_s)
            data = memory
        return data

    def _count(
        self, coding: int, raw: int, wire: int, tensors: int = 1, *, encode_s: float = 0.0, decode_s: float = 0.0
    ) -> None:
        name = coding_name(coding)
        with self.lock:
            counted = self.stats.get(name)
            if counted is None:
                counted = Coded()
                self.stats = {**self.stats, name: counted}  # a new dict: another thread may be reading the old one
            counted.tensors += tensors
            counted.raw_nbytes += raw
            counted.wire_nbytes += wire
            counted.encode_s += encode_s
            counted.decode_s += decode_s
