"""Fuzzing of the compiled core: inputs are changed at random, and those that reach code that is new are changed again.

`make fuzz` builds the extension with coverage (coverage.c), AddressSanitizer and UBSan, and gives each target of
targets.py its share of a minute; `make fuzz INPUTS=1000000` that many inputs each. tests/hostile/test_fuzz.py runs some
with the extension as it is installed: without coverage nothing is kept, and the seeds lead the way alone.

Rules. A target takes bytes, and raises for whatever is a finding; it is made anew every RENEW_AFTER inputs. A run is
repeated by its seed and its number of inputs. The input under way may be had from a file, so that it outlives a crash.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastsplit.wire import backend

__all__ = ["RENEW_AFTER", "Report", "Target", "fuzz"]

RENEW_AFTER = 5000
_MAX_NBYTES = 4096
_FIELDS = ((0, 4), (4, 1), (5, 1), (6, 2), (8, 8), (16, 4), (20, 4), (24, 8), (32, 8))  # of a frame's header
_NUMBERS = {2**bits + more for bits in (0, 3, 5, 10, 16, 31, 32, 33, 63) for more in (-1, 0, 1)}
_NUMBERS |= {2**64 - 8, 2**64 - 1, *(count << 32 for count in (2, 3, 4))}  # the last: lengths among a message's numbers


class Target(Protocol):
    seeds: Sequence[bytes]
    numbers: Sequence[int]
    """What is worth a try, beside what always is."""

    def run(self, data: bytes) -> object: ...
    def close(self) -> None: ...


class Report(NamedTuple):
    inputs: int
    per_s: float
    kept: int
    edges: int
    """Of all that ran in this process, as `blocks`. 0 without coverage."""
    blocks: int


def _mutate(rng: random.Random, data: bytes, other: bytes, words: Sequence[bytes]) -> bytes:
    """`data` with one to eight changes. Its last byte is the target's own; what is before it is a frame, perhaps."""
    out = bytearray(data)
    for _ in range(1 << (rng.getrandbits(2) & rng.getrandbits(2))):
        out = out or bytearray(1)
        what, draw, end = rng.getrandbits(5), rng.getrandbits(32), len(out) - 1
        word = words[draw % len(words)]
        at = (draw >> 8) % max(end, 1)
        if what < 18:  # the numbers that a message ends with
            at = max(end - 8 * (1 + (draw >> 8) % (12 if what < 14 else 100)), 0)
            if what < 6:
                word = ((int.from_bytes(out[at : at + 8], "little") + at % 17 - 8) % 2**64).to_bytes(8, "little")
            out[at : at + 8] = word
        elif what < 20:
            at, nbytes = _FIELDS[at % len(_FIELDS)]
            out[at : at + nbytes] = word[:nbytes]
        elif what < 22:
            out[at & ~3 : (at & ~3) + 4] = word[:4]
        elif what < 24:
            out[at] ^= 1 << (draw & 7)
        elif what < 26:
            out[at] = draw & 255
        elif what < 28:
            out[:at] = other[:at]
        elif what < 30:
            at &= ~7
            out[at : at + (draw & 8)] = out[at : at + 8] if draw & 16 else b""
        else:
            out[-1] = draw & 255
    return bytes(out[:_MAX_NBYTES]) or b"\0"


def fuzz(
    make: Callable[[], Target], seed: int, inputs: int, seconds: float = 1e9, last: Path | None = None
) -> Iterator[Report]:
    """Runs a target; a report every RENEW_AFTER inputs. `last`: a file for the input under way, after its length."""
    native: Any = backend._native
    library: Any = ctypes.PyDLL(native.__file__)
    take, edges, blocks = (getattr(library, f"fuzz_{name}", lambda: 0) for name in ("take", "edges", "blocks"))
    memory = mmap.mmap(-1, _MAX_NBYTES + 4)
    if last is not None:
        last.write_bytes(bytes(_MAX_NBYTES + 4))
        with last.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
    rng, corpus, done, started = random.Random(seed), list[bytes](), 0, time.monotonic()
    while done < inputs and time.monotonic() - started < seconds:
        target = make()
        try:
            words = [number.to_bytes(8, "little") for number in sorted({*_NUMBERS, *target.numbers})]
            for data in target.seeds:
                target.run(data)
            take()
            for _ in range(min(RENEW_AFTER, inputs - done)):
                pick = rng.getrandbits(61)
                parents = corpus if corpus and pick & 1 else target.seeds
                data = parents[(pick >> 1) % len(parents)]
                data = _mutate(rng, data, target.seeds[(pick >> 31) % len(target.seeds)], words)
                memory[: len(data) + 4] = len(data).to_bytes(4, "little") + data
                target.run(data)
                done += 1
                if take():
                    corpus.append(data)
        finally:
            target.close()
        yield Report(done, done / (time.monotonic() - started), len(corpus), edges(), blocks())
