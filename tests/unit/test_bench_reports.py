"""Reports: selectors, tables and figures in Markdown, two runs compared, pictures; all from small JSON made up here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benches import compare, tables
from benches.stored import Missing, bytes_text, seconds_text, select

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"date": "2026-01-02T03:04:05Z", "git_revision": "abcdef0123", "cpu": "a CPU", "cores": 2}
ROWS = {"shm-folded": 6.0, "original": 30.0, "hf-sdpa": 6.3}
KINDS = {"original": "rival", "hf-sdpa": "hf"}


def write(results: Path, **wall_s: float) -> Path:
    """transport.json and split-prefill.json; `wall_s` other than in ROWS, dashes being underscores."""
    results.mkdir(exist_ok=True)
    rows = []
    for system, seconds in (ROWS | {name.replace("_", "-"): value for name, value in wall_s.items()}).items():
        median = {"wall_s": seconds, "bytes_sent": 10, "bytes_received": 20, "gpu_compute_s": seconds}
        rows.append(
            {"phase": "prefill", "dtype": "float32", "system": system, "link": "shm", "tokens": 8, "median": median}
            | {"kind": KINDS.get(system, "fastsplit")}
        )
    save(results / "split-prefill.json", {"environment": ENVIRONMENT, "rows": rows})
    systems: dict[str, Any] = {}
    trips = []
    for label, us, floor in (("fastsplit, torch", 5.0, False), ("zmq, tuned", 50.0, False), ("memcpy", 1.0, True)):
        systems[f"shm: {label}"] = {
            "link": "shm",
            "label": label,
            "floor": floor,
            "how": "floor" if floor else "best",
            "copies": "0",
            "writable": "yes",
            "safe": "yes",
        }
        for nbytes in (64, 65536):
            median = {"p50_us": us, "p99_us": 2 * us, "mean_us": us, "cpu_us": us, "gbytes_per_s": nbytes / us / 1e3}
            row = {"what": "round trip", "link": "shm", "system": f"shm: {label}", "nbytes": nbytes, "mode": "spinning"}
            trips += [row | {"median": median}, row | {"median": median, "what": "one way"}]
    save(results / "transport.json", {"environment": ENVIRONMENT, "systems": systems, "rows": trips})
    return results


def save(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document))


def test_units() -> None:
    assert [seconds_text(value) for value in (5e-9, 7.321e-6, 0.99999, 112.4)] == [
        "5.00 ns",
        "7.32 us",
        "1.00 s",
        "112 s",
    ]
    assert [bytes_text(64), bytes_text(6.7e9), bytes_text(2**20, binary=True)] == ["64 B", "6.70 GB", "1 MiB"]


def test_a_selector_finds_one_value(tmp_path: Path) -> None:
    document = json.loads((write(tmp_path / "results") / "transport.json").read_text())
    assert select(document, 'rows[system="shm: zmq, tuned",nbytes=64,what=round trip].median.p50_us') == 50.0
    assert select(document, 'systems."shm: memcpy".floor') is True
    assert select(document, "rows[0].nbytes") == 64


@pytest.mark.parametrize(
    "path", ["rows[nbytes=64].median", "rows[nbytes=65]", "rows[99]", "rows.x", "nowhere", "rows["]
)
def test_what_is_not_one_value_is_an_error(tmp_path: Path, path: str) -> None:
    document = json.loads((write(tmp_path / "results") / "transport.json").read_text())
    with pytest.raises(Missing):
        select(document, path)


def test_tables_and_figures_are_written_and_checked(tmp_path: Path) -> None:
    results = write(tmp_path / "results")
    row = "rows[system=shm-folded,dtype=float32].median.wall_s"
    page = tmp_path / "page.md"
    page.write_text(
        f"<!-- measured: prefill-float32 -->\nold\n<!-- end measured -->\n\n"
        f"In <!-- figure: split-prefill.json#{row}|.2f s -->?<!-- end figure -->, "
        f"<!-- figure: split-prefill.json#rows[system=original].median.wall_s\n"
        f"/ {row}|.1f times -->?<!-- end figure -->.\n"
        "```\n<!-- figure: none.json#x|d -->left alone<!-- end figure -->\n```\n"
    )
    arguments = [str(page), "--results", str(results)]
    before = page.read_text()
    assert tables.main([*arguments, "--check"]) == 1
    assert page.read_text() == before
    assert tables.main(arguments) == 0
    text = page.read_text()
    assert "| shm-folded | **6.00 s** |" in text
    assert "`split-prefill.json`, 2026-01-02, revision abcdef0" in text
    assert "-->6.00 s<!--" in text
    assert "-->5.0 times<!--" in text
    assert "left alone" in text
    assert tables.main([*arguments, "--check"]) == 0


@pytest.mark.parametrize(
    "marker",
    [
        "<!-- figure: none.json#x|d -->1<!-- end figure -->",
        "<!-- figure: split-prefill.json#rows[system=x]|d -->1<!-- end figure -->",
        "<!-- figure: split-prefill.json#rows[0].system|.2f -->1<!-- end figure -->",
        "<!-- figure: split-prefill.json#rows[0].system|text -->1",
        "<!-- measured: none -->\n<!-- end measured -->",
        "<!-- measured: ladder -->\n<!-- end measured -->",
        "<!-- measured: prefill-float32 -->\n",
    ],
)
def test_what_cannot_be_filled_in_is_an_error_with_its_line(
    tmp_path: Path, marker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"one\n\n{marker}\n")
    assert tables.main([str(page), "--results", str(write(tmp_path / "results")), "--check"]) == 1
    assert f"{page}:3: " in capsys.readouterr().err


def test_the_winner_is_bold_and_no_floor(tmp_path: Path) -> None:
    text = tables.TABLES["transport-round-trip"](write(tmp_path / "results"))
    assert "| fastsplit, torch | **5.00 us** |" in text
    assert "| *memcpy* | *1.00 us* |" in text


def test_what_a_pipelined_call_adds_wins_nothing(tmp_path: Path) -> None:
    results = write(tmp_path / "results")
    document = json.loads((results / "transport.json").read_text())
    document["systems"]["shm: fastsplit, torch"]["latency"] = False
    (results / "transport.json").write_text(json.dumps(document))
    assert "| fastsplit, torch | 5.00 us |" in tables.TABLES["transport-round-trip"](results)


def test_every_table_and_figure_of_this_project_is_what_its_json_says() -> None:
    assert tables.main(["--check"]) == 0


def test_conclusions_hold_flip_or_are_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a")
    second = write(tmp_path / "b", hf_sdpa=9.0, original=4.0)
    found = compare.compare(first, second, 0.1)["files"]
    verdicts = {(one["first"], one["second"]): one["verdict"] for one in found["split-prefill.json"]["conclusions"]}
    assert verdicts == {("shm-folded", "original"): "flipped", ("shm-folded", "hf-sdpa"): "noise"}
    assert found["transport.json"]["counts"] == {"holds": 4, "noise": 0, "flipped": 0}
    assert found["split-prefill.json"]["spread_worst"]["ratio"] == 7.5
    assert compare.main([str(first), str(second), "--output", str(tmp_path / "compare.json")]) == 0
    assert "Flipped outright: 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "compare.json").read_text())["margin"] == 0.1
    assert compare.main([str(tmp_path / "none"), str(second)]) == 1


def test_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = write(tmp_path / "results")
    # a process of its own: matplotlib keeps its fonts' files open
    script = (
        "import sys; from benches.plots import main\n"
        "codes = [main(['--results', sys.argv[1], '--docs', sys.argv[2] + docs]) for docs in ('/one', '/two')]\n"
        "assert codes == [0, 0]; assert main(['--results', sys.argv[2], '--docs', sys.argv[2]]) == 1"
    )
    ran = subprocess.run([sys.executable, "-c", script, results, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "ladder.svg is left out" in ran.stderr
    one, two = (sorted((tmp_path / docs / "pictures").iterdir()) for docs in ("one", "two"))
    assert [path.name for path in one] == ["prefill.svg", "round-trip.svg", "throughput.svg"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert "prefers-color-scheme: dark" in one[0].read_text()


def test_a_ladder_that_was_interrupted_has_the_links_that_it_climbed(tmp_path: Path) -> None:
    measured = {"rpc_calls": 3, "bytes_sent": 10, "bytes_received": 10, "wall_s": 2.0, "floor_s": 1.0, "rounds": [{}]}
    ladder = {
        "environment": {},
        "links": {"loopback": {"executor": "real", "tokens": 8}, "1g": {"executor": "null", "tokens": 8}},
        "rows": [{"row": "original", "step": "per-op", "predicted": None, "measured": {"loopback": measured}}],
    }
    (tmp_path / "split-ladder.json").write_text(json.dumps(ladder))
    text = tables.TABLES["ladder"](tmp_path)
    assert "**2.00 s**" in text
    assert "1 Gbit/s" not in text
