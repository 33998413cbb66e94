"""The tables of what lies between the two sides, each from stored JSON: links, codecs, casts, lanes, calls in flight.

As in `benches.report_tables` a bold figure is the best of its column or group. `LINK_TABLES` goes into the tables that
`benches.tables` knows. Whoever measured it says in its docstring what a figure is: `benches.ladder`, `benches.codecs`
and so on, as the source line below a table names the file.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .stored import Missing, link_title, load, origin, seconds_text

__all__ = ["LINK_TABLES"]

_Row = dict[str, Any]

_LADDER = ("loopback", "10g", "1g", "100m")
_STEPS = {
    "original": "the original: per-op, msgpack, pyzmq",
    "original-batched": "+ batched linear layers",
    "tuned-batched": "+ out-of-band buffers (tuned)",
    "batched": "fastsplit, batched",
    "fused": "fused",
    "folded": "folded",
    "linear": "linear",
    "folded+blosc2": "folded, blosc2",
    "folded+float16": "folded, float16",
    "folded+lanes4": "folded, 4 lanes",
    "linear+lanes4": "linear, 4 lanes",
    "linear+float16+lanes4": "linear, float16, 4 lanes",
    "linear+float16+blosc2+lanes4": "linear, float16, 4 lanes, blosc2",
    "auto": "auto",
}
_MODELS = {"smollm2-135m": "SmolLM2-135M's shape", "tinyllama-1.1b": "TinyLlama-1.1B's shape"}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], note: str, sources: dict[str, list[_Row]]) -> str:
    """`sources`: name of a file -> whatever has its environments."""
    if not rows:
        raise Missing(f"{', '.join(sources)}: no rows")
    named = "; ".join(f"`{name}`, {' / '.join(dict.fromkeys(map(origin, runs)))}" for name, runs in sources.items())
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", f"<sub>{note}; {named}</sub>", ""])


def _one(name: str, document: _Row) -> dict[str, list[_Row]]:
    return {name: [document]}


def _bold(shown: str, best: str | None) -> str:
    return f"**{shown}**" if shown and shown == best else shown


def _rounds(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    if most == 1:
        return "one round"
    return f"medians of {most} rounds" if least == most else f"medians of {least} to {most} rounds"


# ---- the ladder, between hosts ---------------------------------------------------------------------------------------


def _remote_ladder(results: Path) -> str:
    documents = {link: load(results, f"ladder-{link}.json") for link in _LADDER}
    medians = {
        link: {name: row["median"] for name, row in document["rows"].items() if name in _STEPS}
        for link, document in documents.items()
    }
    least = {link: min(m["wall_s"] for m in rows.values()) for link, rows in medians.items() if rows}
    head = ["step", "calls", f"GB ({link_title('1g', {})})", *(link_title(link, {}) for link in _LADDER)]
    rows = []
    for name, title in _STEPS.items():
        shown = medians["1g"].get(name)
        if shown is None:
            continue
        cells = [title, f"{shown['rpc_calls']:.0f}", f"{(shown['bytes_sent'] + shown['bytes_received']) / 1e9:.2f}"]
        for link in _LADDER:
            m = medians[link].get(name)
            if m is None:
                cells.append("")
                continue
            wall = _bold(seconds_text(m["wall_s"]), seconds_text(least[link]))
            cells.append(wall if link == "loopback" else f"{wall} ({m['wall_s'] / m['floor_s']:.2f})")
        rows.append(cells)
    subject = documents["1g"]["subject"]
    counts = [len(row["rounds"]) for document in documents.values() for row in document["rows"].values()]
    note = f"{subject['prefill']} tokens, {subject['dtype']}, an executor that computes nothing; {_rounds(counts)}"
    note += "; in parentheses how many times the floor; calls and GB are those of 1 Gbit/s"
    return _table(head, rows, note, {f"ladder-{link}.json": document["runs"] for link, document in documents.items()})


def _real_ladder(results: Path) -> str:
    """The same with an executor that computes, on the same cores."""
    name = "ladder-real-loopback.json"
    document = load(results, name)
    found = {row: document["rows"][row]["median"] for row in document["rows"] if row in _STEPS and "+" not in row}
    best = seconds_text(min((m["wall_s"] for m in found.values()), default=0.0))
    rows = [
        [
            title,
            f"{found[row]['rpc_calls']:.0f}",
            f"{(found[row]['bytes_sent'] + found[row]['bytes_received']) / 1e9:.2f}",
            _bold(seconds_text(found[row]["wall_s"]), best),
            f"{found[row]['logits_error']:.1e}" if found[row].get("logits_error") else "0",
        ]
        for row, title in _STEPS.items()
        if row in found
    ]
    counts = [len(document["rows"][row]["rounds"]) for row in found] or [1]
    subject = document["subject"]
    note = f"{subject['prefill']} tokens, {subject['dtype']}, the real executor, loopback; {_rounds(counts)}"
    return _table(["step", "calls", "GB", "wall", "error"], rows, note, {name: document["runs"]})


def _remote_decode(results: Path) -> str:
    document = load(results, "remote-decode-1g.json")
    models = document["models"]
    names = list(dict.fromkeys(name for found in models.values() for name in found["medians"]))
    best = {model: max(m["tokens_per_s"] for m in found["medians"].values()) for model, found in models.items()}
    head = ["tokens/s"]
    for model in models:
        head += [_MODELS.get(model, model), "calls a token"]
    rows = []
    for name in names:
        cells = [name]
        for model, found in models.items():
            m = found["medians"].get(name)
            if m is None:
                cells += ["", ""]
                continue
            shown = _bold(f"{m['tokens_per_s']:.2f}", f"{best[model]:.2f}")
            cells += [f"{shown} ({1 / m['floor_s']:.2f})", f"{m['calls']:.0f}"]
        rows.append(cells)
    counts = [len(rounds) for found in models.values() for rounds in found["rounds"].values()] or [1]
    note = f"{link_title('1g', document['link'])}, an executor that computes nothing; {_rounds(counts)}"
    note += "; in parentheses what the round trips allow, 1 / (calls x round trip)"
    return _table(head, rows, note, _one("remote-decode-1g.json", document))


def _relay(results: Path) -> str:
    document = load(results, "link.json")
    rows = []
    for link in document["links"]:
        stated = link["rate_bit_per_s"]
        if not stated:
            continue
        rate, both = (
            " / ".join(f"{statistics.median(link[f'{kind}{way}_bit_per_s']) / 1e6:,.0f}" for way in ("there", "back"))
            for kind in ("", "both_")
        )
        trip = statistics.median(link["round_trip_median_s"])
        stated_text = f"{stated / 1e6:,.0f} Mbit/s, {link['round_trip_s'] * 1e3:g} ms"
        rows.append([f"`{link['link']}`", stated_text, rate, both, seconds_text(trip)])
    head = ["link", "stated", "Mbit/s there / back", "both at once", "round trip of a few bytes"]
    return _table(head, rows, "medians of rounds", _one("link.json", document))


def _qkv(results: Path) -> str:
    document = load(results, "qkv.json")
    ways = ("in turn", "at once", "one call")
    found = {(row["link"], row["rows"]): row["seconds"] for row in document["results"]}
    counts = sorted({rows for _, rows in found})
    head = ["link", *(f"{rows:,} row{'s' if rows > 1 else ''}: {way}" for rows in counts for way in ways)]
    lines = []
    for link in dict.fromkeys(link for link, _ in found):
        cells = [link_title(link, {})]
        for rows in counts:
            seconds = found.get((link, rows))
            if seconds is None:
                cells += [""] * len(ways)
                continue
            best = seconds_text(min(seconds.values()))
            cells += [_bold(seconds_text(seconds[way]), best) for way in ways]
        lines.append(cells)
    return _table(head, lines, "medians of rounds, for q, k and v together", _one("qkv.json", document))


# ---- calls in flight -------------------------------------------------------------------------------------------------


def _inflight(results: Path) -> str:
    document = load(results, "inflight.json")
    links = list(dict.fromkeys(row["link"] for row in document["throughput"]))
    found = {(r["server"], r["connections"], r["size"], r["link"]): r for r in document["throughput"]}
    rows = []
    for server, connections, size in sorted(dict.fromkeys(key[:3] for key in found), key=lambda key: key[:2]):
        cells = [server, str(connections), size]
        for link in links:
            row = found.get((server, connections, size, link))
            if row is None:
                cells.append("")
                continue
            grown = sum(row[f"{side}_rss_in_flight"] - row[f"{side}_rss_before"] for side in ("client", "server"))
            cells.append(f"{row['calls_per_s'] / 1e3:.1f}k, {row['jain']:.3f}, {max(grown, 0) / 1e6:.0f} MB")
        rows.append(cells)
    about = document["parameters"]
    note = f"calls/s, Jain's index, what both sides' memory grew by; {about['calls_in_flight']:,} calls in flight, "
    note += f"medians of {about['rounds']} rounds of {about['seconds_a_round']:g} s"
    return _table(["server", "connections", "tensor", *links], rows, note, _one("inflight.json", document))


def _zerocopy(results: Path) -> str:
    document = load(results, "zerocopy.json")
    rows = []
    for row in document["results"]:
        plain, sent = row["plain"], row["zerocopy"]
        rates = [f"{way['bytes_per_s'] / 1e9:.2f}" for way in (plain, sent)]
        cpu = [f"{way['cpu_s_per_gb'] * 1e3:.0f}" for way in (plain, sent)]
        shown = [
            *(_bold(cell, max(rates, key=float)) for cell in rates),
            *(_bold(cell, min(cpu, key=float)) for cell in cpu),
        ]
        rows.append([row["path"], *shown, f"{sent['copied']} of {sent['completions']}"])
    head = ["path", "plain, GB/s", "zerocopy", "plain, CPU ms a GB", "zerocopy", "completions that copied"]
    return _table(head, rows, "tensors one way", _one("zerocopy.json", document))


# ---- codecs, casts, lanes --------------------------------------------------------------------------------------------


def _codecs(results: Path) -> str:
    document = load(results, "codecs.json")
    codecs = list(dict.fromkeys(row["codec"] for row in document["codecs"]))
    found = {(row["kind"], row["dtype"], row["codec"]): row for row in document["codecs"]}
    rows = []
    for dtype in dict.fromkeys(row["dtype"] for row in document["codecs"]):
        for kind in dict.fromkeys(row["kind"] for row in document["codecs"] if row["dtype"] == dtype):
            row_of = [found.get((kind, dtype, codec)) for codec in codecs]
            rows.append([kind, dtype, *(_coded(row) for row in row_of)])
    options = document["options"]
    layers = ", ".join(map(str, options["layers"]))
    note = "bytes left / MB/s to compress / to unpack / Mbit/s below which it pays; "
    note += f"{options['tokens']} tokens, layers {layers}"
    return _table(["tensor", "as", *codecs], rows, note, _one("codecs.json", document))


def _coded(row: _Row | None) -> str:
    if row is None:
        return ""
    if row["break_even_bits_per_s"] is None:
        return f"{row['ratio']:.2f}, never"
    speeds = (row["compress_bytes_per_s"], row["decompress_bytes_per_s"], row["break_even_bits_per_s"])
    return " / ".join([f"{row['ratio']:.2f}", *(f"{speed / 1e6:.0f}" for speed in speeds)])


def _precision(results: Path) -> str:
    document = load(results, "precision.json")
    ran = document["plans_that_ran"]
    dtypes = list(next(iter(document["errors"].values())))
    rows = []
    for plan, errors in document["errors"].items():
        cells = [plan]
        for dtype in dtypes:
            other = ran.get(plan, {}).get(dtype, plan)
            shown = f"{errors[dtype]:.1e}" if errors[dtype] else "0"
            cells.append(shown if other == plan else f"{shown} ({other} runs)")
        rows.append(cells)
    note = f"max |difference| / max |logit| against HF's float32, {len(document['prompts'])} prompts"
    return _table(["plan", *dtypes], _same_merged(rows), note, _one("precision.json", document))


def _casts(results: Path) -> str:
    document = load(results, "precision-casts.json")
    casts = list(next(iter(document["casts"].values())))
    rows = [
        [plan, *(f"{found[cast]['error']:.1e} ({found[cast]['same_tokens']})" for cast in casts)]
        for plan, found in document["casts"].items()
    ]
    total = next(iter(next(iter(document["casts"].values())).values()))["rows"]
    note = "max |difference| / max |logit| against HF's float32; in parentheses, "
    note += f"how many of the {total} most likely tokens are HF's"
    head = ["plan", *("no cast" if cast == "None" else cast for cast in casts)]
    return _table(head, _same_merged(rows), note, _one("precision-casts.json", document))


def _same_merged(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Plans next to each other whose figures are the same share a line."""
    merged: list[list[str]] = []
    for name, *cells in rows:
        if merged and merged[-1][1:] == cells:
            merged[-1][0] += f", {name}"
        else:
            merged.append([name, *cells])
    return merged


def _overlap(results: Path) -> str:
    document = load(results, "overlap.json")
    rows = []
    for plan in dict.fromkeys(row["plan"] for row in document["medians"]):
        found = [row for row in document["medians"] if row["plan"] == plan]
        best = min(row["wall_s"] for row in found)
        for row in found:
            wall = _bold(seconds_text(row["wall_s"]), seconds_text(best))
            sides = [seconds_text(row["gpu_s"]), seconds_text(row["tee_s"])]
            rows.append([plan, str(row["lanes"]), wall, *sides, f"{row['wall_to_max']:.2f}", f"{row['rpc_calls']:.0f}"])
    options = document["options"]
    note = f"{options['layers']} layers of TinyLlama's shape, {options['prefill']} tokens, "
    note += f"{options['us_per_row']:g} us a row slept; medians of {options['rounds']} rounds"
    head = ["plan", "lanes", "wall", "GPU side", "TEE side", "wall ÷ the greater of the two", "calls"]
    return _table(head, rows, note, _one("overlap.json", document))


# ---- metadata --------------------------------------------------------------------------------------------------------


def _metadata(results: Path) -> str:
    document = load(results, "descriptor.json")
    contents = {"no attrs": "two tensors", "3 attrs": "and three attributes"}
    ways = {
        "fastsplit": "fastsplit",
        "fastsplit_new_shape": "fastsplit, a shape seen for the first time",
        "flatbuffers_builder": "FlatBuffers' Builder and accessors",
        "msgpack": "msgpack",
    }
    medians = {
        way: [document["systems"][f"test_{way}[{what}]"]["median"] * 1e-6 for what in contents]
        for way in ways
        if all(f"test_{way}[{what}]" in document["systems"] for what in contents)
    }
    best = (
        [seconds_text(min(found[at] for found in medians.values())) for at in range(len(contents))] if medians else []
    )
    rows = [
        [title, *(_bold(seconds_text(value), best[at]) for at, value in enumerate(medians[way])), _validates(way)]
        for way, title in ways.items()
        if way in medians
    ]
    head = ["", *contents.values(), "validates"]
    return _table(head, rows, "encode + decode, medians", _one("descriptor.json", document))


def _validates(way: str) -> str:
    return "yes" if way.startswith("fastsplit") else "no"


LINK_TABLES: dict[str, Callable[[Path], str]] = {
    "remote-ladder": _remote_ladder,
    "ladder-real": _real_ladder,
    "remote-decode": _remote_decode,
    "relay": _relay,
    "qkv": _qkv,
    "inflight": _inflight,
    "zerocopy": _zerocopy,
    "codecs": _codecs,
    "precision": _precision,
    "precision-casts": _casts,
    "overlap": _overlap,
    "metadata": _metadata,
}
"""Name -> what makes it of a folder of results. Raises Missing where a file or all of a table's rows are not there."""
