"""Where benchmarks write: to build/bench/, unless a file is named; and a part of a run replaces no stored result."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path

import pytest

from benches import environment
from benches.environment import OUTPUT, RESULTS, add_output, keep_whole, save

ROOT = Path(__file__).resolve().parents[2]
STORED = {
    "bench_transport": ("transport.json", ["--quick"], ["--only", "memcpy"], ["--links", "shm"], ["--sizes", "64"]),
    "bench_serialization": ("serialization.json", ["--quick"], ["--only", "pickle"]),
    "bench_link": ("link.json", ["--only", "1g"]),
    "ladder": ("split-ladder.json", ["--rows", "folded"]),
    "counts": ("counts.json", ["--plan", "folded"]),
}
STORED_IN_A_FOLDER = {
    "bench_split": (["prefill", "--quick"], ["decode", "--only", "shm"], ["--plans", "folded"]),
}
PARTS = [
    *(
        (module, [*flags, "--output", str(RESULTS / file)])
        for module, (file, *runs) in STORED.items()
        for flags in runs
    ),
    *(
        (module, [*flags, "--output-dir", str(RESULTS)])
        for module, runs in STORED_IN_A_FOLDER.items()
        for flags in runs
    ),
]


@pytest.mark.parametrize(("module", "argv"), PARTS, ids=[f"{module} {argv[0]}" for module, argv in PARTS])
def test_a_part_of_a_run_replaces_no_stored_result(
    module: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"benches.{module}").main
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"benches/results/[\w-]+\.json has a whole run, and with .* this is a part of one", said), said
    assert said.endswith("choose where else it goes, or give --force")


def test_results_go_to_the_build_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benches import bench_transport

    assert OUTPUT == ROOT / "build" / "bench"
    before = (RESULTS / "transport.json").read_bytes()
    monkeypatch.setattr(environment, "OUTPUT", tmp_path)
    options = ["--quick", "--only", "shm: memcpy", "--sizes", "64", "--rounds", "1", "--round-s", "0.001"]
    assert bench_transport.main([*options, "--not-pinned", "--links", "shm"]) == 0
    assert json.loads((tmp_path / "transport.json").read_text())["systems"].keys() == {"shm: memcpy"}
    assert (RESULTS / "transport.json").read_bytes() == before


def test_only_readers_know_where_stored_results_are() -> None:
    files = [path for path in (ROOT / "benches").rglob("*.py") if re.search(r"\bRESULTS\b", path.read_text("utf-8"))]
    assert {path.name for path in files} == {"environment.py", "plots.py", "tables.py"}


def _parsed(parser: argparse.ArgumentParser, *argv: str) -> argparse.Namespace:
    parser.add_argument("--only", nargs="+", default=["a", "b"])
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "refused"),
    [
        ([], ""),
        (["--only", "a", "b"], ""),
        (["--only", "a"], "with only this"),
        (["--only", "a", "--quick"], "with only, quick this"),
        (["--only", "a", "--force"], ""),
    ],
)
@pytest.mark.parametrize("where", ["stored", "new", "elsewhere"])
def test_what_is_a_part(
    argv: list[str],
    refused: str,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored = tmp_path / "results"
    stored.mkdir()
    monkeypatch.setattr(environment, "RESULTS", stored)
    path = {"stored": stored / "a.json", "new": stored / "b.json", "elsewhere": tmp_path / "a.json"}[where]
    for kept in (stored / "a.json", tmp_path / "a.json"):
        kept.write_text("{}")
    parser = argparse.ArgumentParser()
    add_output(parser, "a.json")
    args = _parsed(parser, *argv, "--output", str(path))
    if refused and where == "stored":
        with pytest.raises(SystemExit):
            keep_whole(parser, args, ("only", "quick"), [args.output])
        assert refused in " ".join(capsys.readouterr().err.split())
    else:
        keep_whole(parser, args, ("only", "quick"), [args.output])


def test_defaults_of_a_folder() -> None:
    parser = argparse.ArgumentParser()
    add_output(parser, "a-PART.json")
    args = parser.parse_args([])
    assert (args.output_dir, args.force) == (OUTPUT, False)


def test_a_result_has_six_digits_and_a_row_a_line(tmp_path: Path) -> None:
    rows = [{"a": 1.23456789, "b": 123456789, "c": None}, {"a": [1e-9, "x"]}]
    path = save({"environment": {"cores": 2}, "rows": rows}, tmp_path / "new" / "a.json")
    assert json.loads(path.read_text())["rows"] == [{"a": 1.23457, "b": 123456789, "c": None}, {"a": [1e-9, "x"]}]
    assert len(path.read_text().splitlines()) == 7
    assert list(path.parent.iterdir()) == [path]
