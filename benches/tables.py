"""Tables and figures in README.md and docs, generated from the stored JSON, so that none of them is typed.

    python -m benches.tables            writes them anew
    python -m benches.tables --check    exit code 1 if one is not what the JSON gives; nothing is written

In Markdown, what stands between `<!-- measured: NAME -->` and `<!-- end measured -->`, each a line of its own, is the
table NAME of `TABLES`. It ends with a line that names the files, when they were measured, and of which revision.

A figure in prose stands between `<!-- figure: FILE.json#selector|format -->` and `<!-- end figure -->`, in any line.
benches/stored.py says what a selector is. `a / b` is a ratio; either may be a number, and a second selector without a
file is of the same one. In a Markdown table the bar has to be written as `\\|`. The format is one of `seconds`,
`bytes`, `text`, `date`, `revision`, or a format of Python's and what follows it: `.2f s`, `.1f times`, `.0%`, `,d`.

What stands in fenced code is left alone, and so is a marker right behind a backtick. A selector that finds nothing, a
marker without an end, a table that is not known: an error with file and line, exit code 1; the rest is still written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .environment import RESULTS
from .report_links import LINK_TABLES
from .report_tables import TABLES as MODEL_TABLES
from .stored import Missing, bytes_text, load, seconds_text, select, split_outside_quotes

__all__ = ["DOCUMENTS", "figure", "main", "updated"]

TABLES = {**MODEL_TABLES, **LINK_TABLES}
"""What makes a table of a folder of results, by name."""
ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benches" / "README.md")

_BLOCK = re.compile(r"\s*<!-- measured: (.+?) -->\s*")
_BLOCK_END = re.compile(r"\s*<!-- end measured -->\s*")
_FENCE = re.compile(r"\s*(```+|~~~+)")
_FIGURE = re.compile(r"(?<!`)(<!-- figure: (?P<what>.+?) -->)(?P<shown>.*?)(<!-- end figure -->)", re.DOTALL)
_FIGURE_START = re.compile(r"(?<!`)<!-- figure:")
_FORMAT = re.compile(r"(?P<spec>,?(?:\.\d+)?[defg%])(?P<unit>.*)")
_NAMED: dict[str, Callable[[Any], str]] = {
    "seconds": seconds_text,
    "bytes": bytes_text,
    "text": str,
    "date": lambda text: str(text)[:10],
    "revision": lambda text: str(text)[:7],
}


def figure(what: str, results: Path) -> str:
    """The text of one figure, from what stands behind `figure:` in its marker."""
    expression, bar, form = " ".join(what.split()).rpartition("|")
    expression = expression.removesuffix("\\").strip()
    form = form.strip()
    if not bar:
        raise Missing(f"{what!r} has no format: FILE.json#selector|format")
    top, *below = split_outside_quotes(expression, " / ")
    if len(below) > 1:
        raise Missing(f"{what!r}: one ratio at most")
    name, _, _ = top.partition("#")
    value = _operand(top, name, results)
    if below:
        divisor = _operand(below[0], name, results)
        try:
            value = value / divisor
        except (TypeError, ZeroDivisionError) as error:
            raise Missing(f"{value!r} / {divisor!r}: {error}") from None
    try:
        if form in _NAMED:
            return _NAMED[form](value)
        matched = _FORMAT.fullmatch(form)
        if matched is None:
            raise Missing(f"{form!r} is no format: one of {', '.join(_NAMED)}, or .2f and a unit")
        spec, unit = matched.groups()
        return f"{round(value) if spec.endswith('d') else value:{spec}}{unit}"
    except (TypeError, ValueError) as error:
        raise Missing(f"{form!r} cannot be the format of {value!r}: {error}") from None


def _operand(text: str, name: str, results: Path) -> Any:
    text = text.strip()
    try:
        return float(text)
    except ValueError:
        pass
    before, hash_sign, path = text.partition("#")
    return select(load(results, before), path) if hash_sign else select(load(results, name), text)


def updated(text: str, name: str, results: Path) -> tuple[str, list[str]]:
    """`text` as the JSON has it, and what is wrong with it as "name:line: what"."""
    problems: list[str] = []
    parts: list[str] = []  # of the new text
    prose: list[str] = []  # lines that may have figures
    lines = text.splitlines(keepends=True)
    at = prose_at = 0

    def end_prose() -> None:
        new, wrong = _with_figures("".join(prose), results)
        parts.append(new)
        problems.extend(f"{name}:{prose_at + line}: {what}" for line, what in wrong)
        prose.clear()

    while at < len(lines):
        fence = _FENCE.match(lines[at])
        block = _BLOCK.fullmatch(lines[at])
        if not fence and not block:
            if _BLOCK_END.fullmatch(lines[at]):
                problems.append(f"{name}:{at + 1}: end measured, but no table has begun")
            if not prose:
                prose_at = at + 1
            prose.append(lines[at])
            at += 1
            continue
        end_prose()
        end = at + 1
        if fence:
            closing = re.compile(rf"\s*{re.escape(fence[1])}[`~]*\s*")
            while end < len(lines) and not closing.fullmatch(lines[end]):
                end += 1
            parts += lines[at : end + 1]
        else:
            while end < len(lines) and not _BLOCK_END.fullmatch(lines[end]):
                if _BLOCK.fullmatch(lines[end]):
                    end = len(lines)
                end += 1
            if end >= len(lines):
                problems.append(f"{name}:{at + 1}: measured: {block[1] if block else ''} has no end")
                parts += lines[at:]
                return "".join(parts), problems
            try:
                new = [_table(block[1] if block else "", results)]
            except Missing as error:
                problems.append(f"{name}:{at + 1}: {error}")
                new = lines[at + 1 : end]
            parts += [lines[at], *new, lines[end]]
        at = end + 1
    end_prose()
    return "".join(parts), problems


def _table(name: str, results: Path) -> str:
    if name not in TABLES:
        raise Missing(f"there is no table {name!r}, but {', '.join(TABLES)}")
    try:
        return "\n" + TABLES[name](results) + "\n"
    except (KeyError, TypeError) as error:
        raise Missing(f"{name}: the JSON is not as expected: {type(error).__name__} {error}") from None


def _with_figures(text: str, results: Path) -> tuple[str, list[tuple[int, str]]]:
    problems: list[tuple[int, str]] = []

    def line(position: int) -> int:
        return text.count("\n", 0, position)

    def replaced(found: re.Match[str]) -> str:
        if _FIGURE_START.search(found[0], 1):
            problems.append((line(found.start()), "a figure has no end"))
            return found[0]
        try:
            return found[1] + figure(found["what"], results) + found[4]
        except Missing as error:
            problems.append((line(found.start()), f"{' '.join(found['what'].split())}: {error}"))
            return found[0]

    new = _FIGURE.sub(replaced, text)
    ended = {found.start() for found in _FIGURE.finditer(text)}
    last_end = max((found.end() for found in _FIGURE.finditer(text)), default=0)
    problems += [
        (line(start.start()), "a figure has no end")
        for start in _FIGURE_START.finditer(text)
        if start.start() >= last_end and start.start() not in ended
    ]
    return new, sorted(problems)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="Markdown files (default: README.md, docs, this folder's)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the JSON is")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    args = parser.parse_args(argv)
    failed = False
    for path in args.files or DOCUMENTS:
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        text = path.read_text(encoding="utf-8")
        new, problems = updated(text, name, args.results)
        for problem in problems:
            print(problem, file=sys.stderr)
        failed |= bool(problems)
        if new == text:
            continue
        if not args.check:
            path.write_text(new, encoding="utf-8")
            print(f"{name}: written")
            continue
        failed = True
        before, after = text.splitlines(), new.splitlines()
        first = next(
            (n for n, pair in enumerate(zip(before, after)) if pair[0] != pair[1]), min(len(before), len(after))
        )
        print(f"{name}:{first + 1}: not what the JSON gives: run python -m benches.tables", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
