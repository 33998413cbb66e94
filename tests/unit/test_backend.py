"""What is compiled: which names backend.py has, what stands behind them, and that wire/ takes them from there."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastsplit.errors import MissingExtraError
from fastsplit.schema import decoder, encoder
from fastsplit.wire import backend
from fastsplit.wire.shm import ring, slots

WIRE = Path(backend.__file__).parent


def test_what_the_module_names() -> None:
    assert backend.__doc__ is not None
    assert sorted(re.findall(r"^    (\w+) +\S", backend.__doc__, re.MULTILINE)) == [
        "Decoder",
        "Encoder",
        "FastPath",
        "compiled",
        "lease",
    ]
    assert issubclass(backend.Encoder, encoder.Encoder) and issubclass(backend.Decoder, decoder.Decoder)
    assert (ring.Slots is slots.Slots) is not backend.native
    assert (backend.FastPath is None) is not backend.native


def test_wire_takes_encoders_and_decoders_from_there() -> None:
    elsewhere = []
    for path in WIRE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and path.name != "backend.py":
                names = {alias.name for alias in node.names} & {"Encoder", "Decoder"}
                if names and node.module != "backend":
                    elsewhere.append((path.name, node.module, names))
    assert elsewhere == []


def test_an_extension_of_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left alone, as one that was not built."""
    old = ModuleType("fastsplit._native")
    monkeypatch.setitem(sys.modules, "fastsplit._native", old)
    monkeypatch.setenv("FASTSPLIT_NATIVE", "")
    assert backend._load() is None
    monkeypatch.setenv("FASTSPLIT_NATIVE", "1")
    with pytest.raises(MissingExtraError, match=r"other sources \(revision 1, expected \d+\)"):
        backend._load()
