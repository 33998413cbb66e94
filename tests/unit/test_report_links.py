"""The tables of benches.report_links, of JSON that is made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benches.report_links import LINK_TABLES
from benches.stored import Missing

ENVIRONMENT = {"date": "2026-01-02T03:04:05Z", "git_revision": "0123456789abcdef", "git_changed_files": 0}
SUBJECT = {"link": "1g", "executor": "null", "model": "random:tiny", "prefill": 16, "dtype": "float32"}


def _row(wall_s: float, **more: Any) -> dict[str, Any]:
    median = {"wall_s": wall_s, "floor_s": wall_s / 2, "rpc_calls": 7, "bytes_sent": 1e9, "bytes_received": 5e8, **more}
    return {"run": 0, "rounds": [median] * 3, "median": median}


def _ladder(**rows: dict[str, Any]) -> dict[str, Any]:
    return {"subject": SUBJECT, "runs": [{"environment": ENVIRONMENT}], "rows": rows}


def _keep(results: Path, name: str, document: dict[str, Any]) -> None:
    (results / name).write_text(json.dumps({"environment": ENVIRONMENT, **document}), encoding="utf-8")


def _cells(table: str) -> dict[str, list[str]]:
    lines = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")][2:]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_the_ladder_has_a_column_for_each_link_and_the_floor_in_parentheses(tmp_path: Path) -> None:
    for link in ("loopback", "10g", "100m"):
        _keep(tmp_path, f"ladder-{link}.json", _ladder(linear=_row(3.0)))
    _keep(tmp_path, "ladder-1g.json", _ladder(linear=_row(3.0), auto=_row(2.0), other=_row(1.0)))
    table = LINK_TABLES["remote-ladder"](tmp_path)
    rows = _cells(table)
    assert rows["linear"] == ["7", "1.50", "**3.00 s**", "**3.00 s** (2.00)", "3.00 s (2.00)", "**3.00 s** (2.00)"]
    assert rows["auto"] == ["7", "1.50", "", "", "**2.00 s** (2.00)", ""]
    assert "other" not in rows
    assert "`ladder-1g.json`, 2026-01-02, revision 0123456" in table


def test_a_missing_file_is_said_by_name(tmp_path: Path) -> None:
    for name, table in LINK_TABLES.items():
        with pytest.raises(Missing, match=r"\.json"):
            table(tmp_path)
        assert name


def test_tokens_per_second_stand_beside_what_round_trips_allow(tmp_path: Path) -> None:
    medians = {"folded": {"tokens_per_s": 2.0, "floor_s": 0.25, "calls": 7.0}}
    model = {"medians": medians, "rounds": {"folded": [{}]}}
    link = {"rate_bit_per_s": 1e9, "round_trip_s": 0.005}
    _keep(tmp_path, "remote-decode-1g.json", {"link": link, "models": {"tiny": model}})
    table = LINK_TABLES["remote-decode"](tmp_path)
    assert _cells(table)["folded"] == ["**2.00** (4.00)", "7"]
    assert "1 Gbit/s, 5 ms, an executor that computes nothing; one round" in table


def test_a_codec_that_never_pays_says_so(tmp_path: Path) -> None:
    common = {"kind": "x", "dtype": "float32", "compress_bytes_per_s": 2e8, "decompress_bytes_per_s": 3e8}
    rows = [
        {**common, "codec": "zstd", "ratio": 0.5, "break_even_bits_per_s": 4e8},
        {**common, "codec": "lz4", "ratio": 1.0, "break_even_bits_per_s": None},
    ]
    _keep(tmp_path, "codecs.json", {"codecs": rows, "options": {"tokens": 8, "layers": [1]}})
    assert _cells(LINK_TABLES["codecs"](tmp_path))["x"] == ["float32", "0.50 / 200 / 300 / 400", "1.00, never"]


def test_plans_of_the_same_error_share_a_line_and_another_plan_is_named(tmp_path: Path) -> None:
    errors = {
        "HF": {"float32": 0.0},
        "fused": {"float32": 1e-3},
        "folded": {"float32": 1e-3},
        "linear": {"float32": 1e-3},
    }
    ran = {"fused": {"float32": "fused"}, "folded": {"float32": "folded"}, "linear": {"float32": "folded"}}
    _keep(tmp_path, "precision.json", {"errors": errors, "plans_that_ran": ran, "prompts": ["a"]})
    rows = _cells(LINK_TABLES["precision"](tmp_path))
    assert rows == {"HF": ["0"], "fused, folded": ["1.0e-03"], "linear": ["1.0e-03 (folded runs)"]}
