"""Stored results, for what is written about them: read, looked up, and put into units that people read.

Whoever draws or tabulates uses these, so that one figure looks the same everywhere, and every picture and table says
the same about where it comes from: the file, the date, the revision that was measured.

A selector names one value of a file: `split-prefill.json#rows[system=shm-folded,dtype=float32].median.wall_s`. Behind
`#` come keys with dots between, `[3]` is an item of a list, `[key=value,...]` the one item that has all of these; more
than one, or none, is an error. What has a dot, a comma, a bracket or ` / ` in it goes in double quotes:
`rows[system="unix: zmq, tuned",nbytes=64]`, `systems."shm: iceoryx2"`. A filter's key may itself be a path of keys:
`benchmarks[group="hidden float32: encode",extra_info.contestant=pickle]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "LINKS",
    "Missing",
    "bytes_text",
    "environment",
    "is_memcpy",
    "link_title",
    "load",
    "origin",
    "preferred_mode",
    "seconds_text",
    "select",
    "split_outside_quotes",
    "transport_rows",
]

LINKS = {"shm": "shared memory", "unix": "unix sockets", "tcp": "tcp, loopback"}
"""What the links of transport.json are called, in the order in which they are shown."""

_STEP = re.compile(r"""\.?(?:"(?P<quoted>[^"]*)"|(?P<key>[^."\[\]]+)|\[(?P<inside>(?:"[^"]*"|[^"\]])*)\])""")


class Missing(LookupError):
    """A file that is not there, or something that is not in it."""

    def __str__(self) -> str:
        return str(self.args[0])


def load(results: Path, name: str) -> dict[str, Any]:
    try:
        document = json.loads((results / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Missing(f"there is no {results / name}") from None
    except ValueError as error:
        raise Missing(f"{results / name} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Missing(f"{results / name} is not a JSON object")
    return document


def environment(document: dict[str, Any]) -> dict[str, Any]:
    """What `environment.describe` said; pytest-benchmark keeps it in machine_info."""
    found = document.get("environment") or document.get("machine_info", {}).get("environment") or {}
    return dict(found)


def origin(document: dict[str, Any]) -> str:
    """When and of which revision: "2026-11-23, revision 3ab25d6"."""
    known = environment(document)
    changed = known.get("git_changed_files")
    date = str(known.get("date") or "no date")[:10]
    revision = str(known.get("git_revision") or "not known")[:7]
    return f"{date}, revision {revision}" + (
        f" and {changed} changed file{'s' if changed > 1 else ''}" if changed else ""
    )


def select(document: Any, path: str) -> Any:
    """The value that a selector's part behind `#` names. Raises Missing, which says how far it got."""
    found = document
    at = 0
    while at < len(path):
        step = _STEP.match(path, at)
        if step is None:
            raise Missing(f"{path!r} cannot be read from {path[at:]!r} on")
        here = path[:at] or "the file"
        at = step.end()
        if step["inside"] is not None:
            found = _item(found, step["inside"], here)
            continue
        key = step["key"] if step["quoted"] is None else step["quoted"]
        if not isinstance(found, dict) or key not in found:
            raise Missing(f"{here} has no {key!r}, but {_shown(list(found) if isinstance(found, dict) else [found])}")
        found = found[key]
    return found


def _item(items: Any, inside: str, here: str) -> Any:
    if not isinstance(items, list):
        raise Missing(f"{here} is not a list")
    if re.fullmatch(r"-?\d+", inside):
        try:
            return items[int(inside)]
        except IndexError:
            raise Missing(f"{here} has {len(items)} items, no [{inside}]") from None
    wanted = []
    for part in split_outside_quotes(inside, ","):
        key, equals, value = part.partition("=")
        if not equals:
            raise Missing(f"[{inside}]: expected key=value, not {part!r}")
        wanted.append((key.strip(), value.strip().strip('"')))
    matching = [item for item in items if all(_is(_under(item, key), value) for key, value in wanted)]
    if len(matching) != 1:
        values = {key: list(dict.fromkeys(str(_under(item, key)) for item in items)) for key, _ in wanted}
        there = "; ".join(f"{key} is one of {_shown(there)}" for key, there in values.items())
        raise Missing(f"{here}: {len(matching)} items have [{inside}], expected 1 ({there})")
    return matching[0]


def _under(item: Any, key: str) -> Any:
    for part in key.split("."):
        item = item.get(part) if isinstance(item, dict) else None
    return item


def _is(value: Any, text: str) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    return json.dumps(value) == text if value is None or isinstance(value, bool) else str(value) == text


def _shown(values: Sequence[Any], most: int = 12) -> str:
    return ", ".join(repr(value) for value in values[:most]) + (", ..." if len(values) > most else "") or "nothing"


def split_outside_quotes(text: str, separator: str) -> list[str]:
    """`text.split(separator)`, but for what stands in double quotes."""
    parts = [""]
    for number, piece in enumerate(text.split('"')):
        if number % 2:
            parts[-1] += f'"{piece}"'
        else:
            first, *others = piece.split(separator)
            parts[-1] += first
            parts += others
    return parts


def seconds_text(seconds: float) -> str:
    """Three digits, and the unit that goes with them: 7.32 us, 1.24 ms, 112 s."""
    for limit, scale, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if seconds < limit * 0.9995:
            return f"{_digits(seconds * scale)} {unit}"
    return f"{_digits(seconds)} s"


def bytes_text(nbytes: float, binary: bool = False) -> str:
    """Three digits of decimal units, as bytes on a link are counted; `binary` for sizes that are powers of two."""
    base, units = (1024, ("B", "KiB", "MiB", "GiB")) if binary else (1000, ("B", "kB", "MB", "GB"))
    power = 0
    while power < 3 and nbytes >= base * (1 if binary else 0.9995):
        nbytes /= base
        power += 1
    if power == 0 or (binary and nbytes == int(nbytes)):
        return f"{nbytes:.0f} {units[power]}"
    return f"{_digits(nbytes)} {units[power]}"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def preferred_mode(modes: Sequence[str]) -> str:
    """Readers that spin are what a table or a picture shows, where a system was measured both ways."""
    return next((mode for mode in ("spinning", "as it is") if mode in modes), modes[0])


def transport_rows(
    document: dict[str, Any], what: str, mode: str | None = None
) -> dict[tuple[str, int], dict[str, Any]]:
    """transport.json's rows of one kind by system and size: those of a `mode`, or each system's preferred one.

    memcpy, which waits for nobody, is in every mode.
    """
    modes: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in document["rows"]:
        if row["what"] == what:
            modes.setdefault((row["system"], row["nbytes"]), {})[row["mode"]] = row
    if mode is not None:
        chosen = {
            key: next(iter(rows.values())) if is_memcpy(key[0]) else rows.get(mode) for key, rows in modes.items()
        }
        return {key: row for key, row in chosen.items() if row is not None}
    return {key: rows[preferred_mode(list(rows))] for key, rows in modes.items()}


def link_title(link: str, about: dict[str, Any]) -> str:
    """A link of the ladder: its rate and round trip, and what computes behind it."""
    title = "loopback"
    if about.get("rate_bit_per_s"):
        rate = about["rate_bit_per_s"]
        title = f"{rate / 1e9:g} Gbit/s" if rate >= 1e9 else f"{rate / 1e6:g} Mbit/s"
        title += f", {about.get('round_trip_s', 0) * 1e3:g} ms"
    elif link != "loopback":
        title = {"1g": "1 Gbit/s, 5 ms", "10g": "10 Gbit/s, 0.2 ms", "100m": "100 Mbit/s, 20 ms"}.get(link, link)
    return title


def is_memcpy(name: str) -> bool:
    return "memcpy" in name.lower()
