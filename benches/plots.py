"""The pictures of README.md and docs, drawn from the stored JSON: nothing in them is measured here, or typed.

    python -m benches.plots                        benches/results/*.json -> docs/pictures/*.svg
    python -m benches.plots --results DIR --docs DIR --only ladder bytes

    round-trip.svg, throughput.svg    transport.json: time and GB/s by size, a panel for each link
    serialization.svg                 serialization.json: encoding and decoding of hidden states
    prefill.svg                       split-prefill.json: where a prefill's time goes
    bytes.svg                         counts.json, and of the original split-prefill.json
    ladder.svg                        split-ladder.json: each step, and what was predicted of it

The same JSON gives the same bytes, with the same matplotlib. A picture whose JSON is missing is left out, and said so;
the exit code is 1 only if none could be drawn. References (a bare socket, a copy within one process) are grey and
dashed. Where a system was measured with readers that spin and with readers that sleep, the former are drawn.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .drawing import COLOURS, figure, label_ends, margins, plain, save, small_print, value_label
from .environment import RESULTS
from .stored import LINKS, Missing, bytes_text, is_memcpy, link_title, load, seconds_text, transport_rows

__all__ = ["PICTURES", "main"]

DOCS = Path(__file__).resolve().parents[1] / "docs"

_FAMILIES = (
    ("fastsplit", "blue"),
    ("iceoryx", "orange"),
    ("zmq", "ochre"),
    ("grpc", "pink"),
    ("flight", "teal"),
    ("gloo", "red"),
    ("torch", "green"),
    ("shared_memory", "purple"),
    ("pipe", "purple"),
    ("multiprocessing", "purple"),
)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
_MARKERS = "osD^"
_BARS_SHARE = 0.66  # of a panel's width, where notes stand in a column right of the bars
_PARTS = (
    ("gpu_compute_s", "GPU side's products", "grey"),
    ("tee_compute_s", "TEE side's own work", "teal"),
    ("serialization_s", "serialization", "orange"),
    ("communication_s", "communication", "blue"),
)


def _family(text: str) -> str:
    """A colour by what a system is built on: its variants differ by dashes."""
    return next((colour for word, colour in _FAMILIES if word in text.lower()), "ink")


def _transport(results: Path, path: Path, what: str) -> None:
    document = load(results, "transport.json")
    systems = document["systems"]
    rows = transport_rows(document, what)
    key = "p50_us" if what == "round trip" else "gbytes_per_s"
    links = [link for link in LINKS if any(systems[name]["link"] == link for name, _ in rows)]
    if not links:
        raise Missing(f"transport.json has no {what}")
    sizes = sorted({nbytes for _, nbytes in rows})
    drawn, panels = figure(len(links), 1, 0.95 + 3.05 * len(links))
    notes = {
        "round trip": "Median round trip, readers spinning but for those that only sleep (pale)",
        "one way": "One way, mean",
    }
    for axes, link in zip(panels, links):
        ends = []
        used: dict[str, int] = {}
        for name in [name for name, about in systems.items() if about["link"] == link]:
            about = systems[name]
            points = [(size, row["median"][key]) for size in sizes if (row := rows.get((name, size)))]
            points = [point for point in points if point[1]]
            if not points:
                continue
            label = about.get("label") or name
            asleep = what == "round trip" and rows[name, points[0][0]]["mode"] == "sleeping" and not is_memcpy(name)
            colour = "grey" if about["floor"] else _family(label)
            variant = used[colour] = used.get(colour, -1) + 1
            first = colour == "blue" and variant == 0
            axes.plot(
                *zip(*points),
                color=COLOURS[colour],
                linestyle="--" if about["floor"] else _DASHES[variant % 4],
                linewidth=2.6 if first else 1.3,
                alpha=0.55 if asleep else 1.0,
                marker="" if about["floor"] else _MARKERS[variant % 4],
                markersize=5 if first else 3,
                zorder=4 if first else 3 if colour == "blue" else 2,
            )
            ends.append(
                (*points[-1], label + ", sleeps" * asleep, COLOURS["muted" if about["floor"] else colour], first)
            )
        axes.set(xscale="log", yscale="log")
        axes.set_title(LINKS[link], fontweight="bold")
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: bytes_text(size, binary=True)))
        if what == "round trip":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: _short(seconds_text(us / 1e6))))
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
            axes.set_ylabel("GB/s")
        plain(axes, "both")
        margins(drawn, 0.75, 2.4, 0.35, 1.05, hspace=0.3)
        label_ends(axes, ends)
    panels[-1].set_xlabel("size of the message")
    placement = document.get("placement")
    small_print(drawn, {"transport.json": document}, notes[what] + (f"; {placement}" if placement else ""))
    save(drawn, path)


def _short(text: str) -> str:
    """10 us, where three digits would be 10.0 us."""
    number, unit = text.split()
    return f"{float(number):g} {unit}"


def _bars(rows: int) -> float:
    """Inches for so many bars."""
    return 0.24 * rows


def _legend(drawn: Figure, panels: list[Axes]) -> None:
    """Above all panels, each name once."""
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    drawn.legend(handles.values(), handles, ncols=len(handles), loc="upper left", bbox_to_anchor=(0.0, 1.0))


def _names(axes: Axes, names: list[str], emphasised: Callable[[str], bool] = lambda name: "fastsplit" in name) -> None:
    """One bar below the other, from the top, with names at the left."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    for text, name in zip(axes.get_yticklabels(), names):
        text.set_fontweight("bold" if emphasised(name) else "normal")


def _serialization(results: Path, path: Path) -> None:
    document = load(results, "serialization.json")
    messages = ("hidden float32", "row float32")
    both: dict[str, dict[str, float]] = {message: {} for message in messages}
    about: dict[str, dict[str, Any]] = {}
    for benchmark in document["benchmarks"]:
        message, _, task = benchmark["group"].partition(": ")
        if message in both and task == "both":
            name = benchmark["extra_info"]["serializer"]
            both[message][name] = benchmark["stats"]["median"]
            about[name] = benchmark["extra_info"]
    if not all(both.values()):
        raise Missing(f"serialization.json has not both of {', '.join(messages)}")
    order = sorted(both[messages[0]], key=lambda name: both[messages[0]][name])
    order = [name for name in order if not is_memcpy(name)]
    drawn, panels = figure(1, len(messages), 1.55 + _bars(len(order)), sharey=True)
    titles = ("hidden states, [1024, 2048] float32", "of one token, [1, 2048] float32")
    for axes, message, title in zip(panels, messages, titles):
        values = both[message]
        lowest = min(values[name] for name in values) / 2
        for at, name in enumerate(order):
            if name not in values:
                continue
            safe = not str(about[name].get("safe")).lower().startswith(("no", "false"))
            writable = not str(about[name].get("writable")).lower().startswith(("no", "false"))
            colour = "blue" if "fastsplit" in name else "teal" if safe else "red"
            axes.barh(at, values[name] - lowest, left=lowest, height=0.66, color=COLOURS[colour])
            note = seconds_text(values[name]) + ("" if safe else " · unsafe") + ("" if writable else " · read-only")
            axes.text(_BARS_SHARE + 0.04, at, note, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        seconds = next((seconds for name, seconds in values.items() if is_memcpy(name)), None)
        if seconds:
            axes.axvline(seconds, color=COLOURS["grey"], linestyle="--", linewidth=1.2, zorder=0)
            axes.text(seconds, -0.75, "memcpy", color=COLOURS["muted"], fontsize=7.5, ha="center", va="bottom")
        axes.set_xscale("log")
        longest = max(values.values())
        axes.set_xlim(lowest, lowest * (longest / lowest) ** (1 / _BARS_SHARE))  # right of the bars are their notes
        decades = [10.0**power for power in range(-9, 3) if lowest <= 10.0**power <= longest]
        axes.xaxis.set_major_locator(FixedLocator(decades[:: 1 if len(decades) < 5 else 2]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: _short(seconds_text(s))))
        axes.set_title(title, pad=16, fontweight="bold")
        plain(axes)
        _names(axes, order)
    margins(drawn, 1.9, 0.15, 0.55, 1.0, wspace=0.1)
    note = "Encoding and decoding together, medians, log scale; red: bytes of a stranger must not be decoded"
    small_print(drawn, {"serialization.json": document}, note)
    save(drawn, path)


def _prefill(results: Path, path: Path) -> None:
    document = load(results, "split-prefill.json")
    dtypes = list(dict.fromkeys(row["dtype"] for row in document["rows"]))
    panels_rows = [
        sorted((row for row in document["rows"] if row["dtype"] == dtype), key=lambda row: row["median"]["wall_s"])
        for dtype in dtypes
    ]
    ratios = [len(rows) for rows in panels_rows]
    drawn, panels = figure(len(dtypes), 1, 1.6 + 0.55 * (len(dtypes) - 1) + _bars(sum(ratios)), height_ratios=ratios)
    for axes, dtype, rows in zip(panels, dtypes, panels_rows):
        for at, row in enumerate(rows):
            median = row["median"]
            left = 0.0
            for key, label, colour in _PARTS if row["kind"] != "hf" else ():
                seconds = median.get(key) or 0.0
                axes.barh(at, seconds, left=left, height=0.68, color=COLOURS[colour], label=label)
                left += seconds
            if row["kind"] == "hf":
                axes.barh(at, median["wall_s"], height=0.68, color=COLOURS["purple"], label="Hugging Face, one process")
            end = max(left, median["wall_s"])
            value_label(axes, end, at, seconds_text(median["wall_s"]))
        axes.set_xlim(0, max(row["median"]["wall_s"] for row in rows) * 1.09)
        axes.set_title(dtype, fontweight="bold")
        plain(axes)
        _names(axes, [row["system"] for row in rows], lambda name: name.partition("-")[0] in LINKS)
    panels[-1].set_xlabel("seconds")
    _legend(drawn, panels)
    margins(drawn, 1.35, 0.15, 0.62, 0.95, hspace=0.55 / 0.24 / (sum(ratios) / len(ratios)))
    tokens = document["rows"][0].get("tokens") or document.get("options", {}).get("tokens")
    small_print(
        drawn, {"split-prefill.json": document}, f"Prefill of {tokens} tokens, medians; bold: fastsplit, link-plan"
    )
    save(drawn, path)


def _ladder(results: Path, path: Path) -> None:
    document = load(results, "split-ladder.json")
    rows = document["rows"]
    links = list(document["links"])
    drawn, panels = figure(1, len(links), 1.75 + 0.36 * len(rows), sharey=True)
    executors = {"real": "real executor", "null": "executor that computes nothing"}
    for axes, link in zip(panels, links):
        about = document["links"][link]
        predicted = [row["predicted"]["seconds"] for row in rows if row.get("predicted")]
        longest = max([row["measured"][link]["wall_s"] for row in rows if link in row["measured"]] + predicted)
        for at, row in enumerate(rows):
            if row.get("predicted"):
                seconds = row["predicted"]["seconds"]
                axes.plot(
                    seconds,
                    at + 0.3,
                    "D",
                    markersize=5,
                    color=COLOURS["ochre"],
                    label="predicted",
                    linestyle="none",
                    zorder=4,
                )
            if link not in row["measured"]:
                continue
            wall_s = row["measured"][link]["wall_s"]
            rival = row["row"].startswith(("original", "tuned"))
            colour = COLOURS["grey" if rival else "blue"]
            axes.barh(at, wall_s, height=0.6, color=colour, label="as the original" if rival else "fastsplit")
            floor_s = row["measured"][link].get("floor_s")
            if floor_s and about["executor"] != "real":
                axes.plot([floor_s] * 2, [at - 0.36, at + 0.36], color=COLOURS["ink"], linewidth=1.2, label="floor")
            value_label(axes, wall_s, at, seconds_text(wall_s))
        axes.set_xlim(0, longest * 1.15)
        axes.set_title(link_title(link, about), fontweight="bold", pad=18)
        subtitle = f"{about['tokens']} tokens, {executors.get(about['executor'], about['executor'])}"
        axes.text(0, 1.015, subtitle, transform=axes.transAxes, fontsize=8, color=COLOURS["muted"], va="bottom")
        axes.set_xlabel("seconds")
        plain(axes)
        _names(axes, ["\n".join(textwrap.wrap(row["step"], 28)) for row in rows], lambda name: False)
        axes.tick_params(axis="y", labelsize=8)
    _legend(drawn, panels)
    margins(drawn, 2.2, 0.15, 0.82, 0.9, wspace=0.08)
    note = "Medians; floor: the least that these bytes and calls take on this link"
    small_print(drawn, {"split-ladder.json": document}, note)
    save(drawn, path)


def _bytes(results: Path, path: Path) -> None:
    counts = load(results, "counts.json")
    documents = {"counts.json": counts}
    model, tokens = "tinyllama-1.1b", counts["options"]["prefill"]
    bars: dict[str, list[tuple[str, float, float]]] = {"prefill": [], "decode": []}
    for row in counts["counts"]:
        if row["model"] == model:
            bars[row["pass"]].append((row["plan"], row["counted"]["sent"], row["counted"]["received"]))
    # what the original really sends, and shared memory: only a prefill, as decoding is measured on another model
    name = "split-prefill.json"
    try:
        measured = load(results, name)
        dtype = counts["options"]["dtype"]
        same = [row for row in measured["rows"] if row["dtype"] == dtype and row.get("tokens", tokens) == tokens]
        for system, title in (("tuned-tcp", "tuned"), ("original-tcp", "original"), ("shm-folded", "shared memory")):
            if not any(row["system"] == system for row in same):
                print(f"bytes.svg: without {title}: {name} has no {system}", file=sys.stderr)
            for row in same:
                if row["system"] == system:
                    bar = (title, row["median"]["bytes_sent"], row["median"]["bytes_received"])
                    bars["prefill"].insert(len(bars["prefill"]) if system.startswith("shm") else 0, bar)
                    documents[name] = measured
    except Missing as missing:
        print(f"bytes.svg: without the original: {missing}", file=sys.stderr)
    drawn, panels = figure(1, 2, 1.7 + _bars(max(len(found) for found in bars.values())) * 1.1)
    titles = {"prefill": f"prefill of {tokens} tokens", "decode": f"one token after {tokens}"}
    for axes, (what, found) in zip(panels, bars.items()):
        scale, unit = (1e9, "GB") if what == "prefill" else (1e6, "MB")
        for at, (_, sent, received) in enumerate(found):
            axes.barh(at, sent / scale, height=0.66, color=COLOURS["blue"], label="TEE side to GPU side")
            axes.barh(
                at,
                received / scale,
                left=sent / scale,
                height=0.66,
                color=COLOURS["orange"],
                label="GPU side to TEE side",
            )
            value_label(axes, (sent + received) / scale, at, bytes_text(sent + received))
        axes.set_xlim(0, max(sent + received for _, sent, received in found) / scale * 1.24)
        axes.set_title(titles[what], fontweight="bold")
        axes.set_xlabel(unit)
        plain(axes)
        _names(axes, [plan for plan, _, _ in found], lambda plan: False)
    _legend(drawn, panels)
    margins(drawn, 1.4, 0.1, 0.62, 1.0, wspace=0.22)
    note = f"Through sockets: TinyLlama-1.1B's shape, {counts['options']['dtype']}"
    note += "; shared memory passes tensors by reference"
    small_print(drawn, documents, note)
    save(drawn, path)


PICTURES: dict[str, Callable[[Path, Path], None]] = {
    "round-trip": lambda results, path: _transport(results, path, "round trip"),
    "throughput": lambda results, path: _transport(results, path, "one way"),
    "serialization": _serialization,
    "prefill": _prefill,
    "bytes": _bytes,
    "ladder": _ladder,
}
"""Name -> what draws it: (results, where to). Raises Missing where the JSON is not there."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.plots", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the JSON is")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="pictures go to DIR/pictures/")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES), metavar="NAME")
    args = parser.parse_args(argv)
    drawn = 0
    for name in dict.fromkeys(args.only):
        path = args.docs / "pictures" / f"{name}.svg"
        try:
            PICTURES[name](args.results, path)
        except Missing as missing:
            print(f"{path.name} is left out: {missing}", file=sys.stderr)
            continue
        print(path)
        drawn += 1
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
