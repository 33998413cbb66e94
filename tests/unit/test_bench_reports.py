"""Reports: tables in Markdown and pictures, from JSON made up here; the pages beside the JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benches import tables
from benches.environment import RESULTS
from benches.stored import Missing, bytes_text, seconds_text
from benches.tables import DOCUMENTS, TABLES

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"date": "2026-01-02T03:04:05Z", "git_revision": "abcdef0123", "cpu": "a CPU", "cores": 2}
KINDS = {"original-tcp": "rival", "hf-sdpa": "hf"}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """transport.json and split-prefill.json."""
    folder = tmp_path / "results"
    folder.mkdir()
    rows = []
    for system, seconds in {"shm-folded": 6.0, "original-tcp": 30.0, "hf-sdpa": 6.3}.items():
        median = {"wall_s": seconds, "bytes_sent": 10, "bytes_received": 20, "gpu_compute_s": seconds}
        median |= {"communication_s": 1.0, "serialization_s": 2.0, "rpc_calls": 7}
        row = {"phase": "prefill", "dtype": "float32", "system": system, "link": "shm", "tokens": 8, "median": median}
        rows.append(row | {"kind": KINDS.get(system, "fastsplit")})
    write(folder, "split-prefill.json", rows=rows)
    systems: dict[str, Any] = {}
    trips = []
    for label, us, how in (("fastsplit, torch", 5.0, "best"), ("zmq, tuned", 50.0, "best"), ("memcpy", 1.0, "floor")):
        said = {"link": "shm", "label": label, "floor": how == "floor", "how": how, "copies": "0", "writable": "yes"}
        systems[f"shm: {label}"] = said | {"safe": "yes"}
        for nbytes in (64, 65536):
            median = {"p50_us": us, "p99_us": 2 * us, "mean_us": us, "cpu_us": us, "gbytes_per_s": nbytes / us / 1e3}
            row = {"link": "shm", "system": f"shm: {label}", "nbytes": nbytes, "mode": "spinning", "median": median}
            trips += [row | {"what": "round trip"}, row | {"what": "one way"}]
    write(folder, "transport.json", placement="pinned", systems=systems, rows=trips)
    return folder


def write(folder: Path, name: str, **document: Any) -> None:
    (folder / name).write_text(json.dumps({"environment": ENVIRONMENT, **document}))


def test_units() -> None:
    shown = [seconds_text(value) for value in (5e-9, 7.321e-6, 0.99999, 112.4)]
    assert shown == ["5.00 ns", "7.32 us", "1.00 s", "112 s"]
    assert [bytes_text(64), bytes_text(6.7e9), bytes_text(2**20, binary=True)] == ["64 B", "6.70 GB", "1 MiB"]


def test_tables_are_written_and_checked(tmp_path: Path, results: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("one\n<!-- measured: prefill -->\nold\n<!-- end measured -->\ntwo\n")
    arguments = [str(page), "--results", str(results)]
    before = page.read_text()
    assert tables.main([*arguments, "--check"]) == 1
    assert page.read_text() == before
    assert tables.main(arguments) == 0
    text = page.read_text()
    assert text.startswith("one\n") and text.endswith("<!-- end measured -->\ntwo\n")
    assert "| shm-folded | **6.00 s** |" in text
    assert "`split-prefill.json`, 2026-01-02, revision abcdef0" in text
    assert tables.main([*arguments, "--check"]) == 0


@pytest.mark.parametrize(
    "marker",
    [
        "<!-- measured: none -->\n<!-- end measured -->",
        "<!-- measured: ladder -->\n<!-- end measured -->",
        "<!-- measured: prefill -->\n",
        "<!-- end measured -->",
    ],
)
def test_what_cannot_be_filled_in_is_an_error(
    tmp_path: Path, results: Path, marker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"one\n\n{marker}\n")
    assert tables.main([str(page), "--results", str(results), "--check"]) == 1
    assert f"{page}:" in capsys.readouterr().err


def test_the_winner_is_bold_and_no_floor(results: Path) -> None:
    text = TABLES["transport-round-trip"](results)
    assert "| fastsplit, torch | **5.00 us** |" in text
    assert "| *memcpy* | *1.00 us* |" in text


def test_what_a_pipelined_call_adds_wins_nothing(results: Path) -> None:
    document = json.loads((results / "transport.json").read_text())
    document["systems"]["shm: fastsplit, torch"]["latency"] = False
    (results / "transport.json").write_text(json.dumps(document))
    assert "| fastsplit, torch | 5.00 us |" in TABLES["transport-round-trip"](results)


def test_a_ladder_that_was_interrupted_has_the_links_that_it_climbed(tmp_path: Path) -> None:
    measured = {"rpc_calls": 3, "bytes_sent": 10, "bytes_received": 10, "wall_s": 2.0, "floor_s": 1.0, "rounds": 1}
    links = {link: {"executor": "real", "tokens": 8, "environment": ENVIRONMENT} for link in ("loopback", "1g")}
    row = {"row": "original", "step": "per-op", "predicted": None, "measured": {"loopback": measured}}
    write(tmp_path, "split-ladder.json", links=links, rows=[row])
    text = TABLES["ladder"](tmp_path)
    assert "**2.00 s** (2.00)" in text and "1 Gbit/s" not in text


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(Missing, match=r"\.json"):
        TABLES[name](tmp_path)


def test_every_table_of_this_project_is_what_its_json_says() -> None:
    assert tables.main(["--check"]) == 0


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_marker_within_a_sentence(page: Path) -> None:
    comments = re.findall(r"^.*<!--.*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert [
        line
        for line in comments
        if not re.fullmatch(r"<!-- (measured: [\w-]+|end measured|(end )?\w+_table) -->", line)
    ] == []


def test_stored_results_are_statistics_and_small() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json"} and {path.parent for path in files} == {RESULTS}
    assert sum(path.stat().st_size for path in files) < 1_000_000
    for path in files:
        assert '"data":' not in path.read_text() and not re.search(r'"rounds": \[', path.read_text())


def test_pictures_are_the_same_each_time(tmp_path: Path, results: Path) -> None:
    pytest.importorskip("matplotlib")
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
