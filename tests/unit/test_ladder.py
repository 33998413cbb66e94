"""The benchmarks' splits by name, the ladder's floors, medians and tables, and a file that keeps its other links."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benches.ladder import STEPS, _document, floor_s
from benches.rounds import median, table
from benches.split_systems import DEFAULT_PLANS, system_names
from benches.splits import PLAN_NAMES, RIVALS, Spec, parse
from fastsplit.split.plan import PLANS


def test_a_split_is_what_its_name_says() -> None:
    name = "folded+zstd+bfloat16+lanes4+blocks64"
    assert parse(name) == Spec(name, "fastsplit-tcp", "", "folded", "zstd", "bfloat16", 4, 64)
    assert parse("folded") == Spec("folded", "fastsplit-tcp", "", "folded", "off", None, 1)
    assert parse("unix-folded") == Spec("unix-folded", "fastsplit-unix", "?shm=off", "folded")
    assert parse("shm-per-op+float16").plan == "per-op"
    assert parse("original") == Spec("original", "original-tcp", plan="per-op", lanes=1)
    assert parse("tuned-batched") == Spec("tuned-batched", "tuned-tcp", plan="batched", lanes=1)
    assert parse("tuned-ipc").service == "tuned-ipc"
    assert parse("auto") == Spec("auto", "fastsplit-tcp")
    assert len({parse(name) for name in STEPS}) == len(STEPS)
    names = system_names(list(DEFAULT_PLANS), None, (), rivals=True)
    assert {parse(name).service for name in names} == {"fastsplit-unix", "fastsplit-tcp", *RIVALS}
    assert set(PLAN_NAMES) == set(PLANS)


@pytest.mark.parametrize(
    "name", ["", "folded+", "folded+lanes", "folded+lanes0", "folded+lz4+zlib", "original-fused", "shm-", "quic-folded"]
)
def test_what_is_no_split_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected one of|two of a kind"):
        parse(name)


def test_floors() -> None:
    measured = {"bytes_sent": 100, "bytes_received": 300, "rpc_calls": 8, "chain_calls": 4, "asynchronous": False}
    assert floor_s(measured, 100, 0.5) == 4 + 8 * 0.5
    several = {**measured, "asynchronous": True}
    assert floor_s(several, 100, 0.5) == 3 + 0.5
    assert floor_s(several, 100, 2.0) == 8.0  # the bytes hide behind the round trips


def test_medians_of_what_is_a_number() -> None:
    rounds = [
        {"wall_s": 1.0, "calls": 7, "same": True, "ops": {"a": {"total_s": 3.0, "side": "tee"}}, "said": None},
        {"wall_s": 4.0, "calls": 9, "same": False, "ops": {"a": {"total_s": 5.0, "side": "tee"}}, "said": ["x"]},
    ]
    ops = {"a": {"total_s": 4.0, "side": "tee"}}
    assert median(rounds) == {"wall_s": 2.5, "calls": 7, "same": False, "ops": ops, "said": ["x"]}
    assert median([{"wall_s": 1.0}, {"wall_s": 3.0, "ratio": 2.0}]) == {"wall_s": 2.0, "ratio": 2.0}


def test_a_table_has_dashes_for_what_a_row_lacks() -> None:
    columns = (("wall s", 8, lambda m: f"{m['wall_s']:.1f}"), ("calls", 7, lambda m: str(m["calls"])))
    shown = table("row", columns, {"a": {"wall_s": 1.0, "calls": 7}, "longer": {"wall_s": None}}, {"a": ["why"]})
    assert shown.splitlines() == [
        "row       wall s  calls",
        "a            1.0      7",
        "    why",
        "longer         -      -",
    ]


def test_a_file_keeps_the_links_of_earlier_runs_of_the_same(tmp_path: Path) -> None:
    path, options = tmp_path / "split-ladder.json", {"model": "m", "tokens": 8, "dtype": "float32", "rounds": 1}
    first = _document(path, {}, options, ["loopback", "1g"])
    first.content["links"].update({"loopback": {}, "1g": {}})
    first.rows.append({"row": "folded", "measured": {"loopback": {"wall_s": 1.0}, "1g": {"wall_s": 2.0}}})
    first.write()
    second = _document(path, {}, {**options, "rounds": 3}, ["1g"])
    second.write()
    kept = json.loads(path.read_text())
    assert list(kept["links"]) == ["loopback"] and kept["rows"][0]["measured"] == {"loopback": {"wall_s": 1.0}}
    assert _document(path, {}, {**options, "tokens": 9}, ["1g"]).rows == []
