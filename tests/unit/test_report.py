"""The report as text: what a reader must find in it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from fastsplit.report import Recorder, table


def report(**changes: Any) -> dict[str, Any]:
    return {
        **Recorder().as_dict(),
        "prompt_tokens": 3,
        "new_tokens": 1,
        "plan": "batched",
        "uri": "unix:///tmp/gpu.sock",
        "bytes_sent": 1,
        "bytes_received": 1,
        "bytes_shared": 1,
        "bytes_copied": 24,
        "shm": True,
        "shm_reason": "memfd segments",
        **changes,
    }


def test_one_line_says_whether_memory_is_shared_and_why_not() -> None:
    assert "\nshared memory: yes, memfd segments\n" in table(report()) + "\n"
    text = table(report(shm=False, shm_reason="off: the two sides may be on different hosts"))
    assert "\nshared memory: no, off: the two sides may be on different hosts\n" in text + "\n"


def test_the_peers_words_stay_one_plain_line() -> None:
    (line,) = (
        line
        for line in table(report(shm_reason="\x1b[2J\r\n\u202e" + 9999 * "A")).split("\n")
        if "shared" in line and "memory" in line
    )
    assert line.startswith("shared memory: yes, ?[2J???AAA")
    assert len(line) < 300
