"""The steps of a call's path that can be compiled: one name for each, and its contract.

The modules of wire/ take these names from here, so that `fastsplit._native` (native/, a small C extension, built where
there is a compiler) can stand behind them. Each name is bound at import, which costs a call nothing. The Python code
stays the reference, and all tests of the protocol run over both. FASTSPLIT_NATIVE=0 leaves the extension alone, =1
makes its absence an error.

Why here. All that call these names are in wire/, and what they name is in schema/ and tensors/, of which schema/ knows
nothing of tensors/. The module imports nothing else of wire/, so that shm/ may use it too.

    Encoder       `encode` finds a message's template by op, dtypes and shapes, patches its numbers, and returns the
                  metadata behind `headroom` zero bytes, and how many bytes at its end vary
    pack_header   writes a frame's header into the first 40 bytes of what `encode` returned
    parse_header  returns a frame's header as a tuple of ints, checked in full against the limits
    Decoder       `decode` compares metadata with what came before, and returns the message, validated in full
    share         finds the places of tensors in shared memory, copies those that lie elsewhere into it, and returns
                  descriptions and placements
    Lease         is a buffer over a part of shared memory; at the death of its last view, `token` goes to `home`
    parse_arrays  returns what makes tensors: `view(memory, desc)` over received memory or a Lease, without a copy

Compiled are: `Slots`, the slots of a ring (`compiled` gives the class; shm/ring.py takes it from there); headers;
`share`, for tensors that lie in shared memory; and tables of the shapes that an Encoder has built and of the heads that
a Decoder has validated before. Whatever is new, or is to be refused, goes through Python.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, TypeVar

from ..errors import MissingExtraError, SettingError, shown
from ..schema import decoder, encoder, header
from ..schema.descriptor import Message
from ..schema.limits import Limits
from ..tensors import Lease, outgoing, parse_arrays

__all__ = ["Decoder", "Encoder", "Lease", "compiled", "native", "pack_header", "parse_arrays", "parse_header", "share"]

_Any = TypeVar("_Any")


def _load() -> Any:
    """The extension, None where it is not installed or not wanted.

    Raises MissingExtraError, SettingError for another FASTSPLIT_NATIVE.
    """
    wanted = os.environ.get("FASTSPLIT_NATIVE", "")
    if wanted not in ("", "0", "1"):
        raise SettingError(f"FASTSPLIT_NATIVE: {shown(wanted)}, expected 0 or 1")
    if wanted == "0":
        return None
    try:
        return importlib.import_module("fastsplit._native")
    except (ImportError, AttributeError, LookupError) as error:  # the last two: one that was built for other sources
        if wanted == "1":
            text = f"FASTSPLIT_NATIVE=1, and fastsplit._native was not built when fastsplit was installed: {error}"
            raise MissingExtraError(text, name="fastsplit._native") from None
        return None


_native = _load()
native: bool = _native is not None
"""Whether the compiled steps are in use."""


def compiled(reference: _Any) -> _Any:
    """What the extension has of the same name, which does the same; `reference` itself where there is none in use."""
    return reference if _native is None else getattr(_native, reference.__name__)  # type: ignore[attr-defined]


pack_header = compiled(header.pack_header)
parse_header = compiled(header.parse_header)
share = compiled(outgoing.share)


class Encoder(encoder.Encoder):
    """Writes metadata: see schema/encoder.py."""

    def __init__(self, limits: Limits, headroom: int = 0, *, typed: bool = False) -> None:
        super().__init__(limits, headroom, typed=typed)
        if _native is not None:
            self.compiled = _native.Templates(typed=typed)


class Decoder(decoder.Decoder):
    """Reads metadata: see schema/decoder.py."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        if _native is not None:
            self.compiled = _native.Heads(Message)
