"""The report as text: what a reader must find in it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from fastsplit.tee.report import Recorder, codec_counts, table
from fastsplit.wire.stats import Stats


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
        "native": True,
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


def test_a_plan_that_was_not_asked_for_is_said_with_its_reason() -> None:
    assert "instead of" not in table(report(plan_wanted="batched", plan_reason=""))
    assert "instead of" not in table(report(plan="folded", plan_wanted="auto", plan_reason=""))
    text = table(report(plan="folded", plan_wanted="linear", plan_reason="qwen2: biases of q and k"))
    assert "\nplan folded instead of linear: qwen2: biases of q and k\n" in text


def test_what_was_chosen_is_said_with_its_reasons() -> None:
    chosen = {
        "plan": "folded",
        "plan_wanted": "auto",
        "plan_reason": "1 MB/s",
        "lanes": 4,
        "lanes_reason": "2 s at once",
        "cast": "float16",
        "cast_reason": "below 500 MB/s\x1b[2J",
    }
    text = table(report(**chosen))
    expected = ["plan folded: 1 MB/s", "lanes 4: 2 s at once"]
    assert "\n" + "\n".join([*expected, "cast float16: below 500 MB/s?[2J"]) + "\n" in text


def test_codecs_have_a_table_if_there_are_any() -> None:
    stats: Any = SimpleNamespace(
        codecs={
            "zstd": SimpleNamespace(tensors=2, raw_nbytes=3000, wire_nbytes=1000, encode_s=0.5, decode_s=0.25),
            "lz4": SimpleNamespace(tensors=0, raw_nbytes=0, wire_nbytes=0, encode_s=0.0, decode_s=0.0),
            "empty": SimpleNamespace(tensors=1, raw_nbytes=0, wire_nbytes=0, encode_s=0.0, decode_s=0.0),
        }
    )
    counts = codec_counts(stats)
    assert list(counts) == ["zstd", "empty"], "those that were used"
    assert (counts["zstd"]["ratio"], counts["empty"]["ratio"]) == (3.0, 0.0)
    lines = table(report(codecs=counts)).split("\n")
    (at,) = (index for index, line in enumerate(lines) if line.startswith("codec "))
    assert lines[at + 1].split() == ["zstd", "2", "3.0", "kB", "1.0", "kB", "3.00", "0.500", "0.250"]
    assert not any(line.startswith("codec") for line in table(report(codecs={})).split("\n"))


def test_operations_that_a_plan_put_together_have_their_own_rows() -> None:
    ops = {
        "matmul+linear": {"side": "gpu", "count": 2, "total_s": 0.5},
        "linear": {"side": "gpu", "count": 4, "total_s": 0.25},
        "softmax": {"side": "tee", "count": 2, "total_s": 0.125},
    }
    lines = table(report(ops=ops, gpu_compute_s=0.75, tee_compute_s=0.125, wall_s=1.0)).split("\n")
    at = {line.split()[0]: index for index, line in enumerate(lines) if line.strip()}
    assert at["GPU"] < at["linear"] < at["matmul+linear"] < at["TEE"] < at["softmax"]
    assert lines[at["matmul+linear"]].split() == ["matmul+linear", "2", "0.5000", "250.000", "50.0%"]
    assert sum("matmul+linear" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ("per-op", "plan per-op needs many calls; auto takes the one with the fewest that this model can have"),
        ("batched", "plan batched needs many calls; auto takes the one with the fewest that this model can have"),
        ("fused", "unix:// is the fastest link on one host; "),
        ("folded", "unix:// is the fastest link on one host; "),
        ("linear", "unix:// is the fastest link on one host; "),
    ],
)
def test_advice_where_communication_takes_the_most(plan: str, text: str) -> None:
    slow = report(plan=plan, wall_s=1.0, communication_s=0.75)
    assert f"\ncommunication is 75 % of the wall clock: {text}" in table(slow)
    assert "of the wall clock" not in table(report(plan=plan, wall_s=1.0, communication_s=0.25))


class _Work:
    """A connection that counts: so much serialization for what is sent, so much remote work for what comes."""

    def __init__(self) -> None:
        self.stats = Stats()

    def submit(self, op: str, *, flag: bool) -> str:
        assert flag
        time.sleep(0.002)
        self.stats.serialization_s += 0.001
        return op

    def result(self) -> int:
        time.sleep(0.01)
        self.stats.remote_s += 0.004
        return 7


def test_what_is_sent_early_and_waited_for_later_is_one_call_and_adds_up() -> None:
    recorder, work = Recorder(keep_spans=True), _Work()
    with recorder.phase("prefill"):
        assert recorder.sending(work.stats, work.submit, "x", flag=True) == "x"
        time.sleep(0.002)
        recorder.lap("softmax")
        assert recorder.call("linear", 3, work.stats, work.result) == 7
    found = recorder.as_dict()
    assert found["rpc_calls"] == 1
    assert found["serialization_s"] == pytest.approx(0.001)
    assert found["gpu_compute_s"] == pytest.approx(0.004)
    assert found["communication_s"] >= 0.001 + 0.006 - 1e-4
    parts = ("serialization_s", "communication_s", "gpu_compute_s", "tee_compute_s")
    assert sum(found[part] for part in parts) == pytest.approx(found["wall_s"], rel=1e-6)
    assert found["ops"]["linear"]["count"] == 3
    assert [name for track, name, _, _ in recorder.spans if track == "calls"] == ["sending", "linear"]


def test_outside_of_a_phase_nothing_is_counted() -> None:
    recorder, work = Recorder(), _Work()
    assert recorder.sending(work.stats, work.submit, "x", flag=True) == "x"
    assert recorder.call("linear", 3, work.stats, work.result) == 7
    recorder.lap("softmax")
    assert recorder.as_dict() == Recorder().as_dict()
