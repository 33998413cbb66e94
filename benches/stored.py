"""Stored results, for pictures and tables: read, and put into units that people read.

Both use these, so that one figure looks the same everywhere, and every picture and table says the same about its
origin: the file, the date, the revision that was measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["LINKS", "Missing", "bytes_text", "link_title", "load", "origin", "seconds_text", "transport_rows"]

LINKS = {"shm": "shared memory", "unix": "unix sockets", "tcp": "tcp, loopback"}
"""What the links of transport.json are called, in the order in which they are shown."""


class Missing(LookupError):
    """A file that is not there, or something that is not in it."""


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


def origin(document: dict[str, Any]) -> str:
    """When and of which revision: "2026-11-23, revision 3ab25d6"."""
    known = document.get("environment") or {}
    changed = known.get("git_changed_files")
    date, revision = str(known.get("date") or "no date")[:10], str(known.get("git_revision") or "not known")[:7]
    return f"{date}, revision {revision}" + (f" and {changed} changed file" + "s" * (changed > 1) if changed else "")


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


def transport_rows(document: dict[str, Any], what: str, mode: str = "") -> dict[tuple[str, int], dict[str, Any]]:
    """transport.json's rows of one kind by system and size, in a `mode`, else with spinning readers where a system has
    them. memcpy waits for no peer, and is in every mode."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in document["rows"]:
        key = row["system"], row["nbytes"]
        wanted = not mode or row["mode"] == mode or row["system"].endswith("memcpy")
        if row["what"] == what and wanted and (key not in found or row["mode"] == "spinning"):
            found[key] = row
    return found


def link_title(link: str, about: dict[str, Any]) -> str:
    """A link of the ladder: its rate and round trip."""
    rate = about.get("rate_bit_per_s")
    if not rate:
        return link
    return (
        f"{rate / 1e9:g} Gbit/s" if rate >= 1e9 else f"{rate / 1e6:g} Mbit/s"
    ) + f", {about['round_trip_s'] * 1e3:g} ms"
