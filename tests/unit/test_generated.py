"""message_generated.py is what flatc makes of message.fbs, byte for byte."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastsplit.schema.message_generated as generated

FLATC = shutil.which("flatc") or shutil.which("flatc", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(FLATC is None, reason="flatc is not installed")
def test_generated_code_is_current(tmp_path: Path) -> None:
    checked_in = Path(generated.__file__)
    schema = checked_in.with_name("message.fbs")
    assert FLATC is not None
    subprocess.run([FLATC, "--python", "--gen-onefile", "-o", str(tmp_path), str(schema)], check=True, timeout=60)
    assert (tmp_path / "message_generated.py").read_text() == checked_in.read_text()
