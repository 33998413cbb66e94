"""The tables of README.md and docs, generated from the stored JSON, so that none of them is typed.

    python -m benches.tables            writes them anew
    python -m benches.tables --check    exit code 1 if one is not what the JSON gives; nothing is written

The lines between `<!-- measured: NAME -->` and `<!-- end measured -->`, each a line of its own, are the table NAME of
`TABLES`. A table ends with a line that names the file, when it was measured, and of which revision.

In all tables a bold figure is the best of its group. References (a bare socket, a copy within one process) are in
italics and never bold. Times are medians over rounds; the benchmark's docstring says what a column is.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastsplit.split.plan import PLANS

from .environment import RESULTS, ROOT
from .stored import LINKS, Missing, bytes_text, link_title, load, origin, seconds_text, transport_rows

__all__ = ["DOCUMENTS", "TABLES", "main", "updated"]

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(
    r"(^<!-- measured: (?P<name>[^\n]+) -->\n)(?P<table>.*?)(^<!-- end measured -->$)", re.DOTALL | re.MULTILINE
)
_MARKER = re.compile(r"^<!-- (?:end )?measured", re.MULTILINE)
_MODES = ("spinning", "sleeping")
_SIZES = (64, 65536, 2**20, 8 * 2**20, 128 * 2**20)
_REFERENCE = "*italics*: a reference, out of competition"
_NULL = "an executor that computes nothing"
_Row = dict[str, Any]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], name: str, document: _Row, note: str = "") -> str:
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, ["---"] * len(head), *rows)
    ]
    source = f"<sub>{note}{'; ' if note else ''}`{name}`, {origin(document)}</sub>"
    return "\n".join(["", *lines, "", source, ""])


def _cell(value: float | None, best: float | None, text: Callable[[float], str] = seconds_text) -> str:
    """Everything that reads like the best is bold: below the last digit shown nothing wins."""
    if value is None:
        return ""
    return f"**{text(value)}**" if best is not None and text(value) == text(best) else text(value)


def _shown(value: float | None, text: Callable[[float], str] = "{:.2f}".format) -> str:
    return "" if value is None else text(value)


# ---- transports and serializers --------------------------------------------------------------------------------------


def _us_text(us: float) -> str:
    return seconds_text(us / 1e6)


def _round_trips(results: Path) -> str:
    document = load(results, "transport.json")
    systems, rows = document["systems"], {mode: transport_rows(document, "round trip", mode) for mode in _MODES}
    columns = [(mode, size) for mode in _MODES for size in _SIZES]
    lines = []

    def figure(name: str, column: tuple[str, int]) -> float | None:
        found: float | None = rows[column[0]].get((name, column[1]), {}).get("median", {}).get("p50_us")
        return found

    def place(name: str) -> tuple[Any, ...]:
        """References last. By the first figure, those that only sleep behind those that spin."""
        first = [figure(name, column) for column in (columns[0], columns[len(_SIZES)])]
        return systems[name]["floor"], first[0] is None, *(value or 0.0 for value in first)

    for link, title in LINKS.items():
        names = sorted((name for name in systems if systems[name]["link"] == link), key=place)
        # a pipelined call's figure is what it adds, which is no round trip: it competes with none of them
        compared = [name for name in names if not systems[name]["floor"] and systems[name].get("latency", True)]
        best = [min((v for name in compared if (v := figure(name, c)) is not None), default=None) for c in columns]
        lines += [[f"**{title}**", *[""] * len(columns)]] if names else []
        for name in names:
            label = systems[name]["label"] + " *" * (systems[name]["how"] == "common")
            cells = [_cell(figure(name, c), b if name in compared else None, _us_text) for c, b in zip(columns, best)]
            floor = systems[name]["floor"]
            lines.append([f"*{cell}*" if cell and floor else cell for cell in (label, *cells)])
    note = f"medians; {document['placement']}; {_REFERENCE}; \\*: as commonly written"
    head = [f"{mode}: " * (size == _SIZES[0]) + bytes_text(size, binary=True) for mode, size in columns]
    return _table(["", *head], lines, "transport.json", document, note)


def _core(results: Path) -> str:
    """Round trips with the compiled core beside those without, and beside what they are compared with: a line for each
    system and mode."""
    document = load(results, "transport-core.json")
    sizes = sorted({row["nbytes"] for row in document["rows"]})
    found: dict[tuple[str, str], dict[int, _Row]] = {}
    for row in document["rows"]:
        if row["what"] == "round trip":
            found.setdefault((row["system"], row["mode"]), {})[row["nbytes"]] = row["median"]
    lines = []
    for (system, mode), by_size in sorted(found.items(), key=lambda each: (each[0][1] == "sleeping", each[0][0])):
        cells = []
        for nbytes in sizes:
            median = by_size.get(nbytes)
            figures = [median[key] for key in ("p50_us", "p99_us", "p999_us", "cpu_us")] if median else []
            cells.append(" / ".join(map(_us_text, figures)))
        lines.append([system, mode, *cells])
    head = ["", "", *(bytes_text(nbytes, binary=True) for nbytes in sizes)]
    note = f"p50 / p99 / p99.9 / CPU of both sides; {document['placement']}"
    return _table(head, lines, "transport-core.json", document, note)


def _properties(results: Path) -> str:
    """What each transport does and gives, those with the same together."""
    document = load(results, "transport.json")
    same: dict[tuple[str, ...], tuple[dict[str, None], dict[str, None]]] = {}
    for about in document["systems"].values():
        labels, links = same.setdefault(tuple(about[key] for key in ("how", "copies", "writable", "safe")), ({}, {}))
        labels[about["label"]] = links[about["link"]] = None
    head = ["", "over", "measured as", "copies of a message", "writable", "safe with a hostile peer"]
    lines = [
        ["; ".join(labels), ", ".join(links), how.replace("floor", "a reference"), *rest]
        for (how, *rest), (labels, links) in same.items()
    ]
    return _table(head, lines, "transport.json", document)


def _serialization(results: Path) -> str:
    document = load(results, "serialization.json")
    about, tasks = document["serializers"], ("encode", "decode", "both")
    found: dict[str, dict[str, float]] = {}
    extra: dict[str, _Row] = {}
    for one in document["benchmarks"]:
        message, _, task = one["group"].partition(": ")
        if message == "hidden float32":
            extra[name := one["extra_info"]["serializer"]] = one["extra_info"]
            found.setdefault(name, {})[task] = one["stats"]["median"]
    compared = [name for name in found if about[name]["general"]]
    best = {task: min((found[n][task] for n in compared if task in found[n]), default=None) for task in tasks}
    memcpy = found.get("memcpy", {}).get("both")
    lines = []
    for name in sorted(found, key=lambda name: (name == "memcpy", found[name].get("both", 9e9))):
        both, said = found[name].get("both"), about[name]
        cells = [_cell(found[name].get(task), best[task] if name in compared else None) for task in tasks]
        cells += [
            f"{both / memcpy:.2g}" if both and memcpy else "",
            f"{extra[name]['wire_nbytes'] - extra[name]['payload_nbytes']:,}",
        ]
        # the reasons behind "partly: ..." stay in the JSON
        cells += [f"{said['copies_encode']} / {said['copies_decode']}", str(said["safe"]).partition(":")[0]]
        label = name + " *" * (said["how"] == "common") + " T" * (not said["general"])
        lines.append([f"*{cell}*" for cell in (name, *cells)] if name == "memcpy" else [label, *cells])
    note = (
        f"[1024, 2048] float32, medians; {_REFERENCE}; \\*: as commonly written; T: tensors alone, out of competition"
    )
    head = ["", *tasks, "÷ memcpy", "bytes beside the tensor's", "copies: encode / decode", "safe"]
    return _table(head, lines, "serialization.json", document, note)


# ---- the split -------------------------------------------------------------------------------------------------------

_SYSTEMS = {
    "hf-sdpa": "Hugging Face in one process, sdpa",
    "shm-folded": "fastsplit over shared memory (`folded`)",
    "tcp-folded": "fastsplit over tcp (`folded`)",
    "hf-eager": "Hugging Face in one process, eager",
    "original-tcp": "the original",
}


def _system(row: _Row) -> str:
    return str(row["system"]) + {"hf": ", one process", "rival": " (rival)"}.get(row["kind"], "")


def _of_split(document: _Row, figure: str, dtype: str) -> list[_Row]:
    rows = [row for row in document["rows"] if row["dtype"] == dtype and figure in row["median"]]
    return sorted(rows, key=lambda row: float(row["median"][figure]))


def _prefill_short(results: Path) -> str:
    document = load(results, "split-prefill.json")
    rows = [row for row in _of_split(document, "wall_s", "float32") if row["system"] in _SYSTEMS]
    head = ["1024 tokens, TinyLlama-1.1B's shape", "time", "÷ sdpa", "of it communication and serialization", "calls"]
    lines = []
    for row in rows:
        m = row["median"]
        moved = _shown(None if row["kind"] == "hf" else m["communication_s"] + m["serialization_s"], seconds_text)
        lines.append(
            [
                _SYSTEMS[row["system"]],
                seconds_text(m["wall_s"]),
                _shown(m.get("wall_to_sdpa")),
                moved,
                _shown(m.get("rpc_calls"), str),
            ]
        )
    return _table(head, lines, "split-prefill.json", document, "float32, both sides on the same two cores, medians")


def _split(results: Path, name: str, wall: str, part: str, ratios: dict[str, str], calls: str) -> str:
    """By system the time in float32 and where it goes, and beside it the time in bfloat16."""
    document = load(results, name)
    rows = _of_split(document, wall, "float32")
    other = {row["system"]: row["median"] for row in _of_split(document, wall, "bfloat16")}
    if not rows:
        raise Missing(f"{name} has nothing in float32")
    best, best_other = rows[0]["median"][wall], min((m[wall] for m in other.values()), default=None)
    error = any("logits_error" in row["median"] for row in rows)
    head = [
        "",
        "float32",
        *ratios,
        "GPU side",
        "TEE side",
        "serialization",
        "communication",
        "calls",
        *["through sockets", "error"] * error,
    ]
    head += ["bfloat16", next(iter(ratios))] * bool(other)
    lines = []
    for row in rows:
        m, b = row["median"], other.get(row["system"], {})
        cells = [_system(row), _cell(m[wall], best), *(_shown(m.get(key)) for key in ratios.values())]
        parts = ("gpu_compute", "tee_compute", "serialization", "communication")
        cells += [_shown(m.get(f"{part}{one}_s"), seconds_text) for one in parts]
        cells.append(_shown(m.get(calls), "{:.0f}".format))
        if error:
            moved = None if row["kind"] == "hf" else m["bytes_sent"] + m["bytes_received"]
            cells += [_shown(moved, bytes_text), _shown(m.get("logits_error"), "{:.1e}".format)]
        if other:
            cells += [_cell(b.get(wall), best_other), _shown(b.get(next(iter(ratios.values()))))]
        lines.append(cells)
    return _table(head, lines, name, document, f"{rows[0]['tokens']} tokens; medians")


def _decode_far(results: Path) -> str:
    name = "split-decode-1g.json"
    document = load(results, name)
    round_trip_s, rows = document["relay"]["round_trip_s"], _of_split(document, "step_s", "float32")
    lines = [
        [
            row["system"],
            f"{1 / m['step_s']:.2f}",
            f"{1 / (m['calls_per_token'] * round_trip_s):.2f}",
            f"{m['calls_per_token']:.0f}",
        ]
        for row in rows
        if (m := row["median"]).get("calls_per_token")
    ]
    options = document["options"]
    note = f"{options['model']}, {link_title('', document['relay'])}" + f", {_NULL}" * (
        options.get("executor") == "null"
    )
    return _table(["", "tokens/s", "what the round trips allow", "calls a token"], lines, name, document, note)


_HERE = (
    "split-prefill-256.json",
    "split-prefill-tee-attention.json",
    "split-prefill-4096.json",
    "split-prefill-256-bfloat16.json",
    "split-prefill-bfloat16.json",
)
_FAR = "split-ladder-tee-attention.json"


def _attention_here(results: Path) -> str:
    """tee-attention beside other plans: in shared memory beside Hugging Face, on links beside minimal."""
    documents = {name: load(results, name) for name in _HERE}
    lines: list[list[str]] = []
    for document in documents.values():
        (dtype, *_), model = document["options"]["dtype"], document["options"]["model"]
        rows = sorted(_of_split(document, "wall_s", dtype), key=lambda row: row["system"] != "hf-sdpa")
        rounds = f"{rows[0]['rounds']} round" + "s" * (rows[0]["rounds"] > 1)
        where = f"{model.removeprefix('random:')}, {rows[0]['tokens']} tokens, {dtype}, {rounds}"
        for row in rows:
            m = row["median"]
            peaks = (m[key] for key in ("tee_peak_rss_bytes", "worker_peak_rss_bytes") if key in m)
            memory = " + ".join(f"{nbytes / 1e9:.2f}" for nbytes in peaks) + " GB"
            moved = _shown(m.get("bytes_shared"), bytes_text)
            lines.append([where, row["system"], seconds_text(m["wall_s"]), f"{m['wall_to_sdpa']:.2f}", moved, memory])
            where = ""
    far = load(results, _FAR)
    for link, about in sorted(far["links"].items(), key=lambda item: -item[1]["rate_bit_per_s"]):
        found = {row["row"]: row["measured"][link] for row in far["rows"] if link in row["measured"]}
        first_s = found["minimal+float16+lanes4"]["wall_s"]
        where = (
            f"{far['options']['model'].removeprefix('random:')}, {about['tokens']} tokens, {link_title(link, about)}"
        )
        for name, m in found.items():
            label = f"auto: {m['plan']}+float16+lanes{m['lanes']}" if name == "auto" else name
            moved = bytes_text(m["bytes_sent"] + m["bytes_received"])
            lines.append([where, label, seconds_text(m["wall_s"]), f"{m['wall_s'] / first_s:.2f}", moved, ""])
            where = ""
    sources = "; ".join(f"`{name}`, {origin(document)}" for name, document in documents.items())
    note = "ratios to sdpa: of the same round; peaks of resident memory: TEE side + executor, shared memory in both"
    return _table(["", "system", "time", "ratio", "moved", "memory"], lines, _FAR, far, f"{note}; {sources}")


_CONTEXTS = (16, 1024, 4000)


def _decode_contexts(results: Path) -> str:
    """A token's time by the length of the context before it."""
    documents = {count: load(results, f"split-decode-{count}.json") for count in _CONTEXTS}
    systems = [row["system"] for row in documents[_CONTEXTS[0]]["rows"]]
    lines = []
    for system in systems:
        line = [system]
        for document in documents.values():
            (m,) = (row["median"] for row in document["rows"] if row["system"] == system)
            line += [seconds_text(m["step_s"]), f"{m['step_to_sdpa']:.2f}"]
        lines.append(line)
    head = ["SmolLM2-135M, float32", *(cell for count in _CONTEXTS for cell in (f"after {count:,}", "÷ sdpa"))]
    *others, last = ((f"split-decode-{count}.json", document) for count, document in documents.items())
    sources = "; ".join(f"`{name}`, {origin(document)}" for name, document in others)
    return _table(head, lines, *last, f"tokens after a context, shared memory; {sources}")


def _ladder(results: Path) -> str:
    document = load(results, "split-ladder.json")
    rows = document["rows"]  # an interrupted run names links without rows
    links = {link: about for link, about in document["links"].items() if any(link in row["measured"] for row in rows)}
    least = {link: min(row["measured"][link]["wall_s"] for row in rows if link in row["measured"]) for link in links}
    titles = {link: link_title(link, about) for link, about in links.items()}
    lines = []
    for row in rows:
        expected, found = row.get("predicted"), row["measured"]
        last = next(iter(found.values()))
        moved = f"{(last['bytes_sent'] + last['bytes_received']) / 1e9:.2f}"
        cells = [
            f"{row['step']} (`{row['row']}`)",
            f"{expected['speed_up']:.1f}x" if expected else "",
            str(last["rpc_calls"]),
            moved,
        ]
        for link in links:
            m = found.get(link)
            faster = f"{m['speed_up']:.1f}x; " if m and "speed_up" in m else ""
            cells.append(f"{_cell(m['wall_s'], least[link])} ({faster}{m['wall_s'] / m['floor_s']:.2f})" if m else "")
        lines.append(cells)
    executors = {"null": _NULL, "real": "the real executor"}
    notes = [
        f"{titles[link]}: {about['tokens']} tokens, {executors[about['executor']]}, {origin(about)}"
        for link, about in links.items()
    ]
    notes.append(
        "in parentheses: times faster than the original; times the floor; calls and GB: those of the first link"
    )
    return _table(
        ["step", "predicted", "calls", "GB", *titles.values()], lines, "split-ladder.json", document, "; ".join(notes)
    )


def _plans(results: Path) -> str:
    document = load(results, "counts.json")
    found = {(row["plan"], row["pass"]): row for row in document["counts"] if row["model"] == "tinyllama-1.1b"}
    lines = []
    for plan in dict.fromkeys(plan for plan, _ in found):
        both = [found[plan, what] for what in ("prefill", "decode")]
        moved = [bytes_text(one["sent"] + one["received"]) for one in both]
        lines.append([f"`{plan}`", ", ".join(PLANS[plan].contents), str(both[0]["calls"]), *moved])
    options = document["options"]
    head = [
        "plan",
        "what goes in one call",
        "calls, 22 layers",
        f"prefill, {options['prefill']} tokens",
        "one token after it",
    ]
    note = f"TinyLlama-1.1B's shape, {options['dtype']}, bytes of both directions"
    return _table(head, lines, "counts.json", document, note)


def _relay(results: Path) -> str:
    document = load(results, "link.json")
    lines = []
    for link in document["links"]:
        if link["rate_bit_per_s"]:
            stated = f"{link['rate_bit_per_s'] / 1e6:,.0f} Mbit/s, {link['round_trip_s'] * 1e3:g} ms"
            rates = (
                " / ".join(f"{link[f'{kind}{way}_bit_per_s'] / 1e6:,.0f}" for way in ("there", "back"))
                for kind in ("", "both_")
            )
            lines.append([f"`{link['link']}`", stated, *rates, seconds_text(link["round_trip_median_s"])])
    head = ["link", "stated", "Mbit/s there / back", "both at once", "round trip of 64 bytes"]
    return _table(head, lines, "link.json", document, "medians of rounds")


# ---- precision -------------------------------------------------------------------------------------------------------


def _precision(results: Path) -> str:
    document = load(results, "precision.json")
    ran, dtypes = document["plans_that_ran"], list(document["errors"]["HF"])
    rows = []
    for plan, errors in document["errors"].items():
        others = {dtype: ran.get(plan, {}).get(dtype, plan) for dtype in dtypes}
        runs = {dtype: f" ({other} runs)" * (other != plan) for dtype, other in others.items()}
        rows.append([plan, *((f"{errors[dtype]:.1e}" if errors[dtype] else "0") + runs[dtype] for dtype in dtypes)])
    note = f"max |difference| / max |logit| against HF's float32, {len(document['prompts'])} prompts"
    return _table(["plan", *dtypes], _same_merged(rows), "precision.json", document, note)


def _casts(results: Path) -> str:
    document = load(results, "precision-casts.json")
    found = document["casts"]
    first = next(iter(found.values()))
    rows = [
        [plan, *(f"{one['error']:.1e} ({one['same_tokens']})" for one in by_cast.values())]
        for plan, by_cast in found.items()
    ]
    note = "max |difference| / max |logit| against HF's float32; in parentheses, how many of the "
    note += f"{next(iter(first.values()))['rows']} most likely tokens are HF's"
    head = ["plan", *("no cast" if cast == "None" else cast for cast in first)]
    return _table(head, _same_merged(rows), "precision-casts.json", document, note)


def _same_merged(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Plans next to each other whose figures are the same share a line."""
    merged: list[list[str]] = []
    for name, *cells in rows:
        if merged and merged[-1][1:] == cells:
            merged[-1][0] += f", {name}"
        else:
            merged.append([name, *cells])
    return merged


# ---- the pages -------------------------------------------------------------------------------------------------------

_TO_HF = {"÷ sdpa": "wall_to_sdpa", "÷ eager": "wall_to_eager"}
_STEP_TO_HF = {"÷ sdpa": "step_to_sdpa", "÷ bare loop": "step_to_loop"}
TABLES: dict[str, Callable[[Path], str]] = {
    "transport-round-trip": _round_trips,
    "transport-properties": _properties,
    "transport-core": _core,
    "serialization": _serialization,
    "prefill-short": _prefill_short,
    "prefill": lambda results: _split(results, "split-prefill.json", "wall_s", "", _TO_HF, "rpc_calls"),
    "decode": lambda results: _split(results, "split-decode.json", "step_s", "step_", _STEP_TO_HF, "calls_per_token"),
    "decode-1g": _decode_far,
    "tee-attention": _attention_here,
    "decode-contexts": _decode_contexts,
    "ladder": _ladder,
    "plans": _plans,
    "relay": _relay,
    "precision": _precision,
    "precision-casts": _casts,
}
"""Name -> what makes it of a folder of results. Raises Missing where the file is not there."""


def updated(text: str, name: str, results: Path) -> tuple[str, list[str]]:
    """`text` as the JSON has it, and what is wrong with it as "name:line: what"."""
    problems = []

    def written(block: re.Match[str]) -> str:
        try:
            if block["name"] not in TABLES:
                raise Missing(f"there is no table {block['name']!r}, but {', '.join(TABLES)}")
            return block[1] + TABLES[block["name"]](results) + block[4]
        except (Missing, KeyError, TypeError) as error:
            problems.append(f"{name}:{text.count(chr(10), 0, block.start()) + 1}: {type(error).__name__} {error}")
            return block[0]

    new = _BLOCK.sub(written, text)
    outside = _BLOCK.sub("", text)
    problems += [f"{name}: a marker without its other end: {found[0]}" for found in _MARKER.finditer(outside)]
    return new, problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="Markdown files (default: README.md and docs)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the JSON is")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    args = parser.parse_args(argv)
    failed = False
    for path in args.files or DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        new, problems = updated(text, str(path), args.results)
        if new != text and args.check:
            problems.append(f"{path}: a table is not what the JSON gives: run python -m benches.tables")
        elif new != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path}: written")
        print(*problems, sep="\n", end="\n" * bool(problems), file=sys.stderr)
        failed |= bool(problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
