"""The examples run as they stand, and give what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fastsplit

ROOT = Path(fastsplit.__file__).parent.parent


def _run(example: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        check=True,
    )
    return done.stdout


def test_frames() -> None:
    # Two frames of 480 x 640 x 3 bytes there and one of 480 x 640 int16 back, 64 times: 157 MB.
    # The first square appears (100 x 100 pixels), then it moves by 8 columns: 8 are left and 8 are entered.
    printed = _run("frames.py")
    assert "64 pairs of frames, 157 MB by reference, 0 copied; pixels moved: [10000, 1600, 1600, 1600]" in printed


def test_qkv() -> None:
    lines = _run("qkv.py").splitlines()
    assert [line.split()[0] for line in lines] == ["1", "64", "1024"]
    assert all(line.endswith("the same numbers: yes") for line in lines)
