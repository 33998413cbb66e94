"""The names that can be compiled: what they are now, and that wire/ takes them from one module."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from fastsplit import tensors
from fastsplit.schema import decoder, encoder, header
from fastsplit.wire import backend

WIRE = Path(backend.__file__).parent


NOT_STEPS = {"compiled", "native"}


def test_every_name_has_a_contract_and_does_what_the_python_code_does() -> None:
    assert backend.__doc__ is not None
    assert sorted(re.findall(r"^    (\w+) +\S", backend.__doc__, re.MULTILINE)) == sorted(
        {*backend.__all__} - NOT_STEPS
    )
    assert issubclass(backend.Encoder, encoder.Encoder) and issubclass(backend.Decoder, decoder.Decoder)
    for name in ("Lease", "parse_arrays"):
        assert getattr(backend, name) is getattr(tensors, name)
    for reference in (header.pack_header, header.parse_header, tensors.share):
        assert (getattr(backend, reference.__name__) is reference) is not backend.native


def test_wire_takes_them_from_there() -> None:
    elsewhere = []
    for path in WIRE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and path.name != "backend.py":
                names = {alias.name for alias in node.names} & set(backend.__all__)
                if names and node.module != "backend":
                    elsewhere.append((path.name, node.module, names))
    assert elsewhere == []
