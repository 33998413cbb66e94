"""What is compiled: the extension `fastsplit._native` (native/), built where there is a compiler, and its stand-ins.

The Python code is the reference, and does all that is new or is to be refused; the extension does again what was done
before, and finds in it nothing to object to. FASTSPLIT_NATIVE=0 leaves the extension alone, =1 makes its absence an
error. The tests of the protocol run over both.

    Encoder    asks a table of the shapes of messages that it has built before (native/templates.c)
    Decoder    asks a table of the heads of messages that it has validated before (native/heads.c)
    compiled   gives the compiled class of a ring's `Slots` (native/slots.c, shm/slots.py) in the place of Python's
    lease      makes the lease on a new block of the arena (native/tensors.c): its end runs no Python code, where an
               interrupt would be lost; None without the extension
    FastPath   makes a whole call in one step (native/fastpath.c, fastpath.py); None without the extension

The module imports nothing else of wire/, so that shm/ may use it, too.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, TypeVar

from ..errors import MissingExtraError, SettingError, shown
from ..schema import decoder, encoder
from ..schema.descriptor import Message
from ..schema.limits import Limits

__all__ = ["Decoder", "Encoder", "FastPath", "compiled", "knows_torch", "lease", "native"]

_REVISION = 4  # of the extension's interface: NATIVE_REVISION of native/native.h
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
        found = importlib.import_module("fastsplit._native")
        revision = getattr(found, "REVISION", 1)
        if revision == _REVISION:
            return found
        why = f"was built for other sources (revision {revision}, expected {_REVISION}): install fastsplit again"
    except (ImportError, AttributeError, LookupError) as error:  # the last two: of one that was built for other sources
        why = f"was not built when fastsplit was installed: {error}"
    if wanted == "1":
        raise MissingExtraError(f"FASTSPLIT_NATIVE=1, and fastsplit._native {why}", name="fastsplit._native")
    return None


_native = _load()
native: bool = _native is not None
"""Whether the extension is in use."""


def compiled(reference: _Any) -> _Any:
    """What the extension has of the same name, which does the same; `reference` itself where there is none in use."""
    return reference if _native is None else getattr(_native, reference.__name__)  # type: ignore[attr-defined]


lease: Any = None if _native is None else _native.lease
FastPath: Any = None if _native is None else _native.FastPath


def knows_torch() -> bool:
    """Whether the extension can exchange tensors with the torch that is imported here."""
    return _native is not None and bool(_native.knows_torch())


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
