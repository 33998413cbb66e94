"""The ladder that this project began with, as one table: what each step was expected to give, and what it gives.

Its steps, in this order: fewer calls, faster serialization, compression, several calls at a time; of each a note on the
original system predicted calls and seconds. Here every row is measured, on each of these links:

    loopback   with the real executor, on this machine's cores: what a whole prefill takes, its arithmetic included
    1g         1 Gbit/s each way, 5 ms round trip (benches/link.py), with the executor that computes nothing
               (benches/null_executor.py), so that what is left is the link and the TEE side's own work

Rows between and behind the predicted ones: the same calls by fastsplit, before anything else is done ("batched"), which
also has less to send, since kv heads go unrepeated and scores only up to the diagonal; plans of fewer calls, a cast,
what the library chooses by itself. benches/rungs.py has how a row is measured, and benches/ladder.py what its numbers
are, and any row on any link. What was predicted is of another machine: compare the steps, not the seconds.

What compression gives here. The null executor replies with normally distributed numbers, in which no codec finds more
than the exponents have in common: blosc2 makes them 1.2 times smaller, and at 1 Gbit/s costs more than that saves. The
real one's come from the model, and loopback shows what compressing them takes where bytes cost next to nothing. With a
random: model they are hardly better than random. benches.codecs has what codecs make of a trained model's.

What the columns are. predicted: by the note. Then by link: calls; GB through the socket, both directions; s, the wall
clock; x, how many times faster than the row "original" on the same link; /floor, how many times the least that these
bytes and calls can take there (of what a CPU computes meanwhile, loopback's floor has nothing); with a real executor,
error, the last row's logits against the first row's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .link import LINKS
from .measurements import Columns, Measurement, median, table
from .rungs import Climber, codecs_line
from .split_systems import Document, Setting
from .splits import parse_rung
from .workers import Workers

__all__ = ["EXECUTOR_OF", "STEPS", "climb"]

EXECUTOR_OF = {"loopback": "real", "1g": "null"}
"""Link -> the executor behind it."""

STEPS: dict[str, tuple[str, tuple[int, float, float] | None]] = {
    "original": ("per-op, msgpack, one call at a time", (200, 40.0, 1.0)),
    "original-batched": ("+ linear layers of one input in one call", (110, 22.0, 1.8)),
    "tuned-batched": ("+ faster serialization: tensors out of band", (110, 15.0, 2.7)),
    "batched": ("the same calls by fastsplit: kv heads go once, scores stop at the diagonal", None),
    "batched+blosc2": ("+ compression", (110, 8.0, 5.0)),
    "batched+blosc2+lanes4": ("+ asynchronous", (110, 4.0, 10.0)),
    "folded": ("plan folded alone: half of the calls", None),
    "linear+float16+lanes4": ("plan linear, cast to float16, asynchronous", None),
    "auto": ("what the library chooses", None),
}
"""Row -> what it is, and what was predicted: calls, seconds, and how many times faster than the original."""


def climb(
    names: Sequence[str],
    tokens: dict[str, int],
    dtype: str,
    setting: Setting,
    document: Document,
    workers: Workers,
    *,
    quick: bool,
) -> list[str]:
    """Measures these rows with so many `tokens` on each link. Returns the lines that say what came out."""
    rungs = [parse_rung(name) for name in names]
    document.content["links"] = {link: _about(link, tokens[link]) for link in tokens}
    rows = {name: _row(name) for name in names}
    document.rows += rows.values()
    for link, count in tokens.items():
        kind = EXECUTOR_OF[link]
        (executor,) = workers.get(setting.model, dtype, kind)
        climber = Climber.at(kind, executor, setting.model, count, quick=quick)
        rounds: dict[str, list[Measurement]] = {}
        for name, measured in climber.climb(link, rungs, rounds=setting.rounds, once_over_s=setting.once_over_s):
            rounds.setdefault(name, []).append(measured)
            rows[name]["measured"][link] = {**median(rounds[name]), "rounds": rounds[name]}
            original = rows.get("original", {"measured": {}})["measured"].get(link)
            for row in rows.values():
                if original is not None and link in row["measured"]:
                    row["measured"][link]["speed_up"] = original["wall_s"] / row["measured"][link]["wall_s"]
            document.write()
    lines = [f"ladder: {setting.model_name}, {dtype}, medians of {setting.rounds} at most"]
    lines += [
        f"{link}: {LINKS[link].text}; {EXECUTOR_OF[link]} executor; {count} tokens" for link, count in tokens.items()
    ]
    return [*lines, _table(rows, list(tokens))]


def _about(link: str, tokens: int) -> dict[str, Any]:
    kind = LINKS[link]
    return {
        "executor": EXECUTOR_OF[link],
        "tokens": tokens,
        "rate_bit_per_s": kind.rate_bit_per_s,
        "round_trip_s": kind.round_trip_s,
    }


def _row(name: str) -> dict[str, Any]:
    step, expected = STEPS[name]
    predicted = None if expected is None else dict(zip(("calls", "seconds", "speed_up"), expected))
    return {"row": name, "step": step, "predicted": predicted, "measured": {}}


# ---- the table -------------------------------------------------------------------------------------------------------


def _table(rows: dict[str, dict[str, Any]], links: Sequence[str]) -> str:
    columns: list[Any] = [
        ("predicted: calls", 18, lambda row: str(row["predicted"]["calls"])),
        ("s", 6, lambda row: f"{row['predicted']['seconds']:.0f}"),
        ("x", 6, lambda row: f"{row['predicted']['speed_up']:.1f}"),
    ]
    for link in links:
        columns += _columns_of(link)
    notes = {name: [row["step"], *_chosen(row)] for name, row in rows.items()}
    return table("row", columns, rows, notes)


def _columns_of(link: str) -> Columns:
    def of(row: Measurement) -> Measurement:
        found: Measurement = row["measured"][link]
        return found

    columns: Columns = (
        (f"{link}: calls", max(len(link) + 9, 14), lambda row: str(of(row)["rpc_calls"])),
        ("GB", 8, lambda row: f"{(of(row)['bytes_sent'] + of(row)['bytes_received']) / 1e9:.3f}"),
        ("s", 9, lambda row: f"{of(row)['wall_s']:.3f}"),
        ("x", 7, lambda row: f"{of(row)['speed_up']:.2f}"),
        ("/floor", 8, lambda row: f"{of(row)['wall_s'] / of(row)['floor_s']:.2f}"),
    )
    if EXECUTOR_OF[link] == "real":
        columns = (*columns, ("error", 9, lambda row: f"{of(row)['logits_error']:.1e}"))
    return columns


def _chosen(row: dict[str, Any]) -> list[str]:
    """What the library chose, by link."""
    lines = []
    for link, measured in row["measured"].items():
        said = measured["said"]
        if "choice" in said:
            lines += [f"{link}: {line}" for line in (*said["choice"], f"codecs: {codecs_line(said['codecs'])}")]
    return lines
