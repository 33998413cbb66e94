"""The tables of which README.md and docs consist, each from stored JSON: `benches.tables` says where they go.

In all of them a bold figure is the best of its group; references (a bare socket, a copy within one process), with which
nobody competes, are in italics and never bold. Times are medians over rounds; what a column is, the benchmark's
docstring says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .stored import LINKS, Missing, bytes_text, is_memcpy, link_title, load, origin, seconds_text, transport_rows

__all__ = ["TABLES"]

_SIZES = (64, 65536, 2**20, 8 * 2**20, 128 * 2**20)
_CONTENTS = {
    "per-op": "q, k, v, scores, weighted values, o, gate, up, down",
    "batched": "q+k+v, scores, weighted values, o, gate+up, down",
    "fused": "q+k (v stays), scores, values+o, gate+up, down",
    "folded": "scores, values+o+gate+up, down+next q+k",
    "linear": "values+o+gate+up, down+next q+k+scores",
}
_Row = dict[str, Any]
_REFERENCE = "*italics*: a reference, which competes with nobody"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], source: str) -> str:
    lines = [_line(head), _line(["---"] * len(head)), *(_line(row) for row in rows), "", source, ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _source(document: _Row, name: str, note: str = "") -> str:
    return f"<sub>{note}{'; ' if note else ''}`{name}`, {origin(document)}</sub>"


def _best(rows: Sequence[_Row], value: Callable[[_Row], float | None]) -> float | None:
    return min((found for row in rows if (found := value(row)) is not None), default=None)


def _cell(value: float | None, best: float | None, text: Callable[[float], str]) -> str:
    """Everything that reads like the best is bold: below the last digit shown nobody wins."""
    if value is None:
        return ""
    shown = text(value)
    return f"**{shown}**" if best is not None and shown == text(best) else shown


# ---- transports ------------------------------------------------------------------------------------------------------


def _transport(results: Path, what: str, mode: str | None = None) -> str:
    document = load(results, "transport.json")
    systems = document["systems"]
    rows = transport_rows(document, what, mode)
    round_trip = what == "round trip"
    figure_name = "p50_us" if round_trip else "gbytes_per_s"
    sizes = [size for size in _SIZES if any(nbytes == size for _, nbytes in rows)]
    head = ["", *(bytes_text(size, binary=True) for size in sizes)]
    if round_trip:
        head += ["64 B, p99", "64 B, CPU"]

    def of(name: str, nbytes: int, key: str, among: dict[tuple[str, int], _Row]) -> float | None:
        found = among.get((name, nbytes), {}).get("median", {}).get(key)
        return None if found is None else float(found)

    def shown(value: float | None, best: float | None) -> str:
        if round_trip:
            return _cell(value, best, lambda us: seconds_text(us / 1e6))
        return _cell(
            value, best, lambda rate: bytes_text(rate * 1e9) + "/s" if rate < 1000 else f"{rate / 1e3:.3g} TB/s"
        )

    lines = []
    for link, title in LINKS.items():
        names = [name for name, about in systems.items() if about["link"] == link and any(n == name for n, _ in rows)]
        if not names:
            continue
        better = min if round_trip else max
        columns: list[tuple[int, str, dict[tuple[str, int], _Row]]] = [(size, figure_name, rows) for size in sizes]
        if round_trip:
            columns += [(64, "p99_us", rows), (64, "cpu_us", rows)]
        # what a pipelined call adds is no round trip, and nobody is compared with it
        apart = {n for n in names if systems[n]["floor"] or (round_trip and not systems[n].get("latency", True))}
        best = [
            better(
                (v for n in names if n not in apart and (v := of(n, size, key, among)) is not None),
                default=None,
            )
            for size, key, among in columns
        ]

        def place(name: str, columns: Any = columns) -> tuple[bool, bool, float]:
            """The quickest first, whoever was not measured at the first size last, references below all of them."""
            first = of(name, *columns[0])
            return systems[name]["floor"], first is None, (first or 0.0) * (1 if round_trip else -1)

        names.sort(key=place)
        lines.append([f"**{title}**", *[""] * len(columns)])
        for name in names:
            floor = systems[name]["floor"]
            label = (systems[name].get("label") or name) + " *" * (systems[name]["how"] == "common")
            cells = [shown(of(name, *column), None if name in apart else best[n]) for n, column in enumerate(columns)]
            lines.append([f"*{label}*" if floor else label, *(f"*{c}*" if floor and c else c for c in cells)])
    note = f"median round trip, {mode}" if round_trip else "one way, mean, each as it waits best"
    if document.get("placement"):
        note += f"; {document['placement']}"
    return _table(head, lines, _source(document, "transport.json", note + f"; {_REFERENCE}; \\*: as commonly written"))


def _properties(results: Path) -> str:
    """What each transport does and gives, links with the same together."""
    document = load(results, "transport.json")
    links: dict[tuple[str, ...], list[str]] = {}
    for about in document["systems"].values():
        said = tuple(about[key] for key in ("label", "how", "copies", "writable", "safe"))
        links.setdefault(said, []).append(about["link"])
    head = ["", "over", "measured as", "copies of a message", "writable", "safe with a hostile peer"]
    lines = [
        [label, ", ".join(over), how.replace("floor", "a reference"), *rest]
        for (label, how, *rest), over in links.items()
    ]
    return _table(head, lines, _source(document, "transport.json"))


# ---- serialization ---------------------------------------------------------------------------------------------------

_HIDDEN = "hidden float32"


def _serialization(results: Path) -> str:
    document = load(results, "serialization.json")
    found: dict[str, dict[str, _Row]] = {}
    for benchmark in document["benchmarks"]:
        message, _, direction = benchmark["group"].partition(": ")
        if message == _HIDDEN:
            found.setdefault(benchmark["extra_info"]["serializer"], {})[direction] = benchmark
    if not found:
        raise Missing(f"serialization.json has no group {_HIDDEN!r}")

    def seconds(name: str, direction: str) -> float | None:
        return float(found[name][direction]["stats"]["median"]) if direction in found[name] else None

    def about(name: str) -> _Row:
        return dict(next(iter(found[name].values()))["extra_info"])

    floors = [name for name in found if is_memcpy(name)]
    memcpy = seconds(floors[0], "both") if floors else None
    columns = ("encode", "decode", "both")
    rivals = [name for name in found if name not in floors and about(name)["general"]]
    best = {
        column: min((s for n in rivals if (s := seconds(n, column)) is not None), default=None) for column in columns
    }
    head = ["", *columns, "÷ memcpy", "bytes beside the tensor's", "copies: encode", "decode", "writable", "safe"]
    lines = []
    for name in sorted(found, key=lambda name: (name in floors, seconds(name, "both") or float("inf"))):
        info = about(name)
        both = seconds(name, "both")
        wire = info.get("wire_nbytes")
        cells = [
            *(
                _cell(seconds(name, column), best[column] if name in rivals else None, seconds_text)
                for column in columns
            ),
            "" if both is None or not memcpy else f"{both / memcpy:.2g}",
            "" if wire is None else f"{wire - info['payload_nbytes']:,}",
            *(_said(info.get(key)) for key in ("copies_encode", "copies_decode", "writable", "safe")),
        ]
        label = name + " *" * (info["how"] == "common") + " T" * (not info["general"])
        lines.append([f"*{name}*", *(f"*{c}*" if c else c for c in cells)] if name in floors else [label, *cells])
    note = (
        f"[1024, 2048] float32, medians; {_REFERENCE}; \\*: as commonly written; T: tensors alone, competes with nobody"
    )
    return _table(head, lines, _source(document, "serialization.json", note))


def _said(value: Any) -> str:
    """A word: the reasons behind "partly: ..." stay in the JSON."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value).partition(":")[0]


# ---- the split -------------------------------------------------------------------------------------------------------


def _systems(document: _Row, dtype: str, figure: str, name: str) -> list[_Row]:
    rows = [row for row in document["rows"] if row["dtype"] == dtype and row["median"].get(figure) is not None]
    if not rows:
        raise Missing(f"{name} has nothing in {dtype}")
    return sorted(rows, key=lambda row: float(row["median"][figure]))


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else seconds_text(value)


def _system(row: _Row) -> str:
    return str(row["system"]) + {"hf": ", one process", "rival": " (rival)"}.get(row["kind"], "")


def _prefill(results: Path, dtype: str) -> str:
    document = load(results, "split-prefill.json")
    rows = _systems(document, dtype, "wall_s", "split-prefill.json")
    best = _best(rows, lambda row: row["median"]["wall_s"])
    head = ["", "wall", "÷ sdpa", "÷ eager", "GPU side", "TEE side", "serialization", "communication", "calls"]
    head += ["through sockets", "by reference", "error"]
    lines = []
    for row in rows:
        m = row["median"]
        split = row["kind"] != "hf"
        moved = (m.get("bytes_sent") or 0) + (m.get("bytes_received") or 0)
        error = m.get("logits_error")
        lines.append(
            [
                _system(row),
                _cell(m["wall_s"], best, seconds_text),
                _ratio(m.get("wall_to_sdpa")),
                _ratio(m.get("wall_to_eager")),
                *(
                    _seconds(m.get(f"{part}_s"))
                    for part in ("gpu_compute", "tee_compute", "serialization", "communication")
                ),
                "" if m.get("rpc_calls") is None else f"{m['rpc_calls']:.0f}",
                bytes_text(moved) if split else "",
                bytes_text(m.get("bytes_shared") or 0) if split else "",
                "" if error is None else f"{error:.1e}",
            ]
        )
    note = f"{rows[0].get('tokens') or document.get('options', {}).get('tokens')} tokens, {dtype}"
    return _table(head, lines, _source(document, "split-prefill.json", note))


def _decode(results: Path, dtype: str) -> str:
    document = load(results, "split-decode.json")
    rows = _systems(document, dtype, "step_s", "split-decode.json")
    best = _best(rows, lambda row: row["median"]["step_s"])
    head = [
        "",
        "a token",
        "tokens/s",
        "÷ sdpa",
        "÷ bare loop",
        "GPU side",
        "TEE side",
        "serialization",
        "communication",
        "calls",
    ]
    lines = []
    for row in rows:
        m = row["median"]
        calls = m.get("calls_per_token")
        lines.append(
            [
                _system(row),
                _cell(m["step_s"], best, seconds_text),
                "" if m.get("tokens_per_s") is None else f"{m['tokens_per_s']:.1f}",
                _ratio(m.get("step_to_sdpa")),
                _ratio(m.get("step_to_loop")),
                *(
                    _seconds(m.get(f"step_{part}_s"))
                    for part in ("gpu_compute", "tee_compute", "serialization", "communication")
                ),
                "" if calls is None else f"{calls:.0f}",
            ]
        )
    return _table(head, lines, _source(document, "split-decode.json", dtype))


def _ladder(results: Path) -> str:
    document = load(results, "split-ladder.json")
    rows = document["rows"]  # an interrupted run names links of which it has none
    links = {link: about for link, about in document["links"].items() if any(link in row["measured"] for row in rows)}
    head = ["step", "predicted: calls", "time", "faster by"]
    for link, about in links.items():
        head += [f"{link_title(link, about)}: calls", "GB", "time", "faster by", "÷ floor"]
    least = {
        link: min(row["measured"][link]["wall_s"] for row in document["rows"] if link in row["measured"])
        for link in links
    }
    lines = []
    for row in document["rows"]:
        expected = row.get("predicted")
        cells = [f"{row['step']} (`{row['row']}`)"]
        cells += (
            [str(expected["calls"]), seconds_text(expected["seconds"]), f"{expected['speed_up']:.1f}x"]
            if expected
            else [""] * 3
        )
        for link in links:
            m = row["measured"].get(link)
            if m is None:
                cells += [""] * 5
                continue
            cells += [
                f"{m['rpc_calls']:.0f}",
                f"{(m['bytes_sent'] + m['bytes_received']) / 1e9:.2f}",
                _cell(m["wall_s"], least[link], seconds_text),
                "" if m.get("speed_up") is None else f"{m['speed_up']:.1f}x",
                f"{m['wall_s'] / m['floor_s']:.2f}" if m.get("floor_s") else "",
            ]
        lines.append(cells)
    executors = {"real": "the real executor", "null": "an executor that computes nothing"}
    notes = []
    for link, about in links.items():
        rounds = max(len(row["measured"][link]["rounds"]) for row in document["rows"] if link in row["measured"])
        executor = executors.get(about["executor"], about["executor"])
        times = "one round" if rounds == 1 else f"{rounds} rounds at most"
        notes.append(f"{link_title(link, about)}: {about['tokens']} tokens, {executor}, {times}")
    note = "; ".join(notes)
    return _table(head, lines, _source(document, "split-ladder.json", note))


def _plans(results: Path) -> str:
    document = load(results, "counts.json")
    name = "tinyllama-1.1b"
    rows = {(row["plan"], row["pass"]): row for row in document["counts"] if row["model"] == name}
    if not rows:
        raise Missing(f"counts.json has no {name}")
    first = next(iter(rows.values()))
    tokens = next(row["rows"] for (_, what), row in rows.items() if what == "prefill")
    head = ["plan", "what goes in one call", "calls for L layers", f"L = {first['layers']}"]
    head += [f"prefill, {tokens} tokens", "one token after it"]
    lines = []
    for plan, (a, b) in document["plans"].items():
        if (plan, "prefill") not in rows:
            continue
        counted = [rows[plan, what]["counted"] for what in ("prefill", "decode")]
        lines.append(
            [
                f"`{plan}`",
                _CONTENTS.get(plan, ""),
                f"{a}L + {b}",
                str(counted[0]["calls"]),
                *(bytes_text(one["sent"] + one["received"]) for one in counted),
            ]
        )
    note = f"TinyLlama-1.1B's shape, {document['options']['dtype']}, bytes of both directions"
    return _table(head, lines, _source(document, "counts.json", note))


_LONGEST = 12


def _compared(results: Path) -> str:
    """What `benches.compare` found: by file, and the conclusions that turned round."""
    document = load(results, "compare.json")
    rows, turned = [], []
    for name, found in document["files"].items():
        counts, worst = found["counts"], found["spread_worst"]
        total = sum(counts.values())
        rows.append(
            [
                name,
                str(total),
                f"{counts['holds']} ({counts['holds'] / total:.0%})" if total else "0",
                str(counts["noise"]),
                str(counts["flipped"]),
                f"{found['spread_median']:.2f}",
                f"{worst['ratio']:.2f} ({worst['of']})",
            ]
        )
        turned += [one for one in found["conclusions"] if one["verdict"] == "flipped"]
    head = ["file", "conclusions", "hold", "noise", "turned round", "spread, median", "worst"]
    source = _source(document, "compare.json", f"a tie is within {document['margin']:.0%}")
    if not turned:
        return _table(head, rows, source)
    turned.sort(key=lambda one: -abs(math.log(one["ratios"][0] / one["ratios"][1])))
    listed = [
        [one["group"], one["first"], one["second"], *(f"{ratio:.2f}" for ratio in one["ratios"])]
        for one in turned[:_LONGEST]
    ]
    title = (
        f"the {_LONGEST} furthest apart of {len(turned)} that turned round"
        if len(turned) > _LONGEST
        else "turned round"
    )
    more = _table([title, "this", "beside", "times it", "in the other run"], listed, source)
    return _table(head, rows, "") + "\n" + more


TABLES: dict[str, Callable[[Path], str]] = {
    "transport-round-trip": lambda results: _transport(results, "round trip", "spinning"),
    "transport-round-trip-sleeping": lambda results: _transport(results, "round trip", "sleeping"),
    "transport-properties": _properties,
    "transport-one-way": lambda results: _transport(results, "one way"),
    "serialization": _serialization,
    "prefill-float32": lambda results: _prefill(results, "float32"),
    "prefill-bfloat16": lambda results: _prefill(results, "bfloat16"),
    "decode-float32": lambda results: _decode(results, "float32"),
    "decode-bfloat16": lambda results: _decode(results, "bfloat16"),
    "ladder": _ladder,
    "plans": _plans,
    "compare": _compared,
}
"""Name -> what makes it of a folder of results. Raises Missing where a file or all of a table's rows are not there."""
