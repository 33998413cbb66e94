"""docs/architecture.md: its diffs apply, its addresses exist, its glossary is short."""

from __future__ import annotations

import re
from pathlib import Path

import fastsplit

ROOT = Path(fastsplit.__file__).parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def _hunks() -> list[tuple[str, list[str], list[str]]]:
    """Each hunk of the page: its file, the lines it finds there, and those that it adds."""
    found = []
    for block in re.findall(r"^```diff\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        for name, body in re.findall(
            r"^--- a/(\S+)\n\+\+\+ b/\1\n(.*?)(?=^--- a/|\Z)", block, re.MULTILINE | re.DOTALL
        ):
            for hunk in body.split("@@\n")[1:]:
                lines = hunk.splitlines()
                before = [line[1:] for line in lines if line[:1] in " -"]
                found.append((name, before, [line[1:] for line in lines if line.startswith("+")]))
    return found


def test_diffs_apply() -> None:
    hunks = _hunks()
    assert {name for name, *_ in hunks} == {
        "fastsplit/wire/transport/address.py",
        "fastsplit/wire/options.py",
        "fastsplit/schema/coding.py",
        "fastsplit/wire/codecs.py",
        "fastsplit/schema/dtypes.py",
    }
    for name, before, added in hunks:
        assert before and added
        assert ("\n".join(before) + "\n") in (ROOT / name).read_text(), f"{name}: {before}"


def test_addresses_exist() -> None:
    paths = re.findall(r"`((?:wire|tensors|schema|system)/[\w/]+\.py)`", TEXT) + re.findall(r"`(tests/\w+\.py)`", TEXT)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "fastsplit" / path).exists(), path
    for module, names in re.findall(r"`(wire/\w+\.py)`, (?:the table )?`(\w+)`", TEXT):
        assert re.search(rf"^(class |def )?{names}\b", (ROOT / "fastsplit" / module).read_text(), re.MULTILINE), (
            module,
            names,
        )


def test_the_glossary_is_short() -> None:
    glossary = TEXT.partition("## Glossary")[2].partition("\n## ")[0]
    words = re.findall(r"^\| (\w[\w ]*) \|", glossary, re.MULTILINE)[1:]
    assert 20 <= len(words) <= 30 and words == sorted(words)
