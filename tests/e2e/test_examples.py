"""The examples run as they stand, and give what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fastsplit

ROOT = Path(fastsplit.__file__).parent.parent


def test_frames() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "frames.py")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        check=True,
    )
    # The first square appears (100 x 100 pixels), then it moves by 8 columns: 8 are left and 8 are entered.
    assert "64 pairs of frames, 118 MB sent, 0 bytes copied; pixels moved: [10000, 1600, 1600, 1600]" in done.stdout
