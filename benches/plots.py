"""The pictures of README.md and docs, drawn from the stored JSON: nothing in them is measured here, or typed.

    python -m benches.plots                        benches/results/*.json -> docs/pictures/*.svg
    python -m benches.plots --results DIR --docs DIR --only ladder prefill

    round-trip.svg, throughput.svg    transport.json: time and GB/s by size, a panel for each link
    prefill.svg                       split-prefill.json: where a prefill's time goes
    ladder.svg                        split-ladder.json: each step, and what was predicted of it

The same JSON gives the same bytes, with the same matplotlib. A picture whose JSON is missing is left out with a line
that says so; the exit code is 1 only if none could be drawn. References (a bare socket, a copy within one process) are
grey and dashed. Where a system was measured with readers that spin and with readers that sleep, the former are drawn.

Each colour is a pair: drawn is the light one, and a style sheet in the SVG replaces it by the dark one where the
reader's system is dark. Text stays text, in the reader's own sans-serif font.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .environment import RESULTS, ROOT
from .stored import LINKS, Missing, bytes_text, link_title, load, origin, seconds_text, transport_rows

__all__ = ["PICTURES", "main"]

DOCS = ROOT / "docs"
_WIDTH = 8.6
"""Inches: the 830 pixels of a README's column."""

_DARK = {
    "#1f2328": "#e6edf3",
    "#59636e": "#9198a1",
    "#d1d9e0": "#343b43",
    "#0969da": "#58a6ff",
    "#bc4c00": "#ffa657",
    "#8250df": "#d2a8ff",
    "#1a7f37": "#56d364",
    "#9a6700": "#e3b341",
    "#bf3989": "#ff9bce",
    "#0b7285": "#39c5cf",
    "#cf222e": "#ff7b72",
    "#8c959f": "#6e7681",
}
_COLOURS = dict(
    zip(
        ("ink", "muted", "grid", "blue", "orange", "purple", "green", "ochre", "pink", "teal", "red", "grey"),
        _DARK,
    )
)
"""Name -> the light colour. Each reads on white, and its dark one on a dark page."""

_FONTS = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastsplit",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": _COLOURS["ink"],
    "axes.labelcolor": _COLOURS["ink"],
    "axes.edgecolor": _COLOURS["grey"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _COLOURS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
    "xtick.labelcolor": _COLOURS["ink"],
    "ytick.labelcolor": _COLOURS["ink"],
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def _figure(rows: int, columns: int, height: float, **grid: Any) -> tuple[Figure, list[Axes]]:
    """A picture of README's width and `height` inches. `grid`: as `Figure.subplots` has it."""
    matplotlib.rcParams.update(matplotlib.rcParamsDefault | _STYLE)
    drawn = Figure(figsize=(_WIDTH, height), facecolor="none")
    axes = drawn.subplots(rows, columns, squeeze=False, subplot_kw={"facecolor": "none"}, **grid)
    return drawn, list(axes.flat)


def _plain(axes: Axes, grid: str = "x") -> None:
    """Grid lines across `grid`, no ticks that the grid already shows."""
    axes.grid(True, axis=grid)  # type: ignore[arg-type]
    axes.tick_params(length=0)
    if grid == "x":
        axes.spines["bottom"].set_visible(False)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str, bool]], *, x: float = 1.025) -> None:
    """Labels right of lines that end at (x, y) in data: (x, y, text, colour, bold), apart from each other."""
    gap = 11.0  # pixels at 72 a inch, as all measures of SVG here
    axes.figure.canvas.draw()  # the scales are final from here on
    height = axes.bbox.height
    ends = sorted(ends, key=lambda end: end[1])
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((end[0], end[1]))[1]) * height for end in ends]
    gap *= axes.figure.dpi / 72
    # none above the panel, where the next one's labels or the page's end may be
    placed = [min(y, height - gap * (len(ends) - 1 - number)) for number, y in enumerate(_apart(wanted, gap))]
    for (at_x, at_y, text, colour, bold), y in zip(ends, placed):
        arrow = {"arrowstyle": "-", "relpos": (0.0, 0.5), "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            text,
            (at_x, at_y),
            (x, y / height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=colour,
            fontweight="bold" if bold else "normal",
            arrowprops={**arrow, "alpha": 0.7},
            annotation_clip=False,
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending positions at least `gap` apart, together as near as can be to the wanted ones, ascending as well."""
    groups: list[tuple[float, int]] = []  # of labels that touch: the first one's best position, and how many
    for one in wanted:
        groups.append((one, 1))
        while len(groups) > 1 and groups[-2][0] + groups[-2][1] * gap > groups[-1][0]:
            (lower, some), (upper, others) = groups[-2:]
            groups[-2:] = [((lower * some + (upper - some * gap) * others) / (some + others), some + others)]
    return [start + number * gap for start, count in groups for number in range(count)]


def _value_label(axes: Axes, x: float, y: float, text: str) -> None:
    """Right of a bar that ends at x."""
    axes.annotate(text, (x, y), (4, -0.5), textcoords="offset points", va="center", fontsize=8)


def _small_print(drawn: Figure, name: str, document: dict[str, Any], note: str) -> None:
    """Below everything: `note`, the machine, and when and of which revision the file was measured."""
    known = document.get("environment") or {}
    machine = f"{known.get('cpu', 'CPU not known')}, {known.get('cores', '?')} cores, {known.get('kernel', '')}"
    for number, line in enumerate((f"{name}: {origin(document)}", machine, note)):
        y = (0.07 + 0.14 * number) / drawn.get_figheight()
        drawn.text(0.012, y, line, fontsize=7, color=_COLOURS["muted"], va="bottom")


def _save(drawn: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    drawn.savefig(path, format="svg", metadata=metadata, transparent=True)
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"'?DejaVu Sans'?(?:, *(?:'[^']*'|[\w-]+))*", _FONTS, text)
    rules = "".join(
        f'[style*="fill: {light}"]{{fill:{dark}!important}}[style*="stroke: {light}"]{{stroke:{dark}!important}}\n'
        for light, dark in _DARK.items()
        if light in text
    )
    style = f"<style>\n@media (prefers-color-scheme: dark) {{\n{rules}}}\n</style>\n"
    text = re.sub(r"(<svg[^>]*>\n?)", lambda found: found[1] + style, text, count=1)
    path.write_text(re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE), encoding="utf-8")


def _margins(drawn: Figure, left: float, right: float, top: float, bottom: float, **spaces: float) -> None:
    """In inches around all axes; `spaces` between them as `subplots_adjust` has it."""
    width, height = drawn.get_size_inches()
    drawn.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, **spaces)


# ---- transports and serializers --------------------------------------------------------------------------------------

_FAMILIES = dict(
    zip(
        ("fastsplit", "iceoryx", "zmq", "grpc", "flight", "gloo", "torch", "shared_memory", "pipe"),
        ("blue", "orange", "ochre", "pink", "teal", "red", "green", "purple", "purple"),
    )
)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
_MARKERS = "osD^"
_LADDER_LINKS = ("loopback", "1g")
_PARTS = (
    ("gpu_compute_s", "GPU side's products", "grey"),
    ("tee_compute_s", "TEE side's own work", "teal"),
    ("serialization_s", "serialization", "orange"),
    ("communication_s", "communication", "blue"),
)


def _family(text: str) -> str:
    """A colour by what a system is built on: its variants differ by dashes."""
    return next((colour for word, colour in _FAMILIES.items() if word in text.lower()), "ink")


def _transport(results: Path, path: Path, what: str) -> None:
    document = load(results, "transport.json")
    systems = document["systems"]
    rows = transport_rows(document, what)
    key = "p50_us" if what == "round trip" else "gbytes_per_s"
    links = [link for link in LINKS if any(systems[name]["link"] == link for name, _ in rows)]
    if not links:
        raise Missing(f"transport.json has no {what}")
    sizes = sorted({nbytes for _, nbytes in rows})
    drawn, panels = _figure(len(links), 1, 0.95 + 3.05 * len(links))
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
            asleep = (
                what == "round trip" and rows[name, points[0][0]]["mode"] == "sleeping" and not name.endswith("memcpy")
            )
            colour = "grey" if about["floor"] else _family(label)
            variant = used[colour] = used.get(colour, -1) + 1
            first = colour == "blue" and variant == 0
            axes.plot(
                *zip(*points),
                color=_COLOURS[colour],
                linestyle="--" if about["floor"] else _DASHES[variant % 4],
                linewidth=2.6 if first else 1.3,
                alpha=0.55 if asleep else 1.0,
                marker="" if about["floor"] else _MARKERS[variant % 4],
                markersize=5 if first else 3,
                zorder=4 if first else 3 if colour == "blue" else 2,
            )
            ends.append(
                (*points[-1], label + ", sleeps" * asleep, _COLOURS["muted" if about["floor"] else colour], first)
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
        _plain(axes, "both")
        _margins(drawn, 0.75, 2.4, 0.35, 1.05, hspace=0.3)
        _label_ends(axes, ends)
    panels[-1].set_xlabel("size of the message")
    placement = document.get("placement")
    _small_print(drawn, "transport.json", document, notes[what] + (f"; {placement}" if placement else ""))
    _save(drawn, path)


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


def _prefill(results: Path, path: Path) -> None:
    document = load(results, "split-prefill.json")
    dtypes = list(dict.fromkeys(row["dtype"] for row in document["rows"]))
    panels_rows = [
        sorted((row for row in document["rows"] if row["dtype"] == dtype), key=lambda row: row["median"]["wall_s"])
        for dtype in dtypes
    ]
    ratios = [len(rows) for rows in panels_rows]
    drawn, panels = _figure(len(dtypes), 1, 1.6 + 0.55 * (len(dtypes) - 1) + _bars(sum(ratios)), height_ratios=ratios)
    for axes, dtype, rows in zip(panels, dtypes, panels_rows):
        for at, row in enumerate(rows):
            median = row["median"]
            left = 0.0
            for key, label, colour in _PARTS if row["kind"] != "hf" else ():
                seconds = median.get(key) or 0.0
                axes.barh(at, seconds, left=left, height=0.68, color=_COLOURS[colour], label=label)
                left += seconds
            if row["kind"] == "hf":
                axes.barh(
                    at, median["wall_s"], height=0.68, color=_COLOURS["purple"], label="Hugging Face, one process"
                )
            end = max(left, median["wall_s"])
            _value_label(axes, end, at, seconds_text(median["wall_s"]))
        axes.set_xlim(0, max(row["median"]["wall_s"] for row in rows) * 1.09)
        axes.set_title(dtype, fontweight="bold")
        _plain(axes)
        _names(axes, [row["system"] for row in rows], lambda name: name.partition("-")[0] in LINKS)
    panels[-1].set_xlabel("seconds")
    _legend(drawn, panels)
    _margins(drawn, 1.35, 0.15, 0.62, 0.95, hspace=0.55 / 0.24 / (sum(ratios) / len(ratios)))
    tokens = document["rows"][0]["tokens"]
    note = f"Prefill of {tokens} tokens, medians; bold: fastsplit, link-plan"
    _small_print(drawn, "split-prefill.json", document, note)
    _save(drawn, path)


def _ladder(results: Path, path: Path) -> None:
    document = load(results, "split-ladder.json")
    rows = document["rows"]
    links = [link for link in _LADDER_LINKS if any(link in row["measured"] for row in rows)]
    if not links:
        raise Missing(f"split-ladder.json has none of {', '.join(_LADDER_LINKS)}")
    drawn, panels = _figure(1, len(links), 1.75 + 0.36 * len(rows), sharey=True)
    executors = {"real": "real executor", "null": "executor that computes nothing"}
    for axes, link in zip(panels, links):
        about = document["links"][link]
        predicted = [row["predicted"]["seconds"] for row in rows if row.get("predicted")]
        longest = max([row["measured"][link]["wall_s"] for row in rows if link in row["measured"]] + predicted)
        for at, row in enumerate(rows):
            if row.get("predicted"):
                seconds = row["predicted"]["seconds"]
                axes.plot(seconds, at + 0.3, "D", markersize=5, color=_COLOURS["ochre"], label="predicted", zorder=4)
            if link not in row["measured"]:
                continue
            wall_s = row["measured"][link]["wall_s"]
            rival = row["row"].startswith(("original", "tuned"))
            colour = _COLOURS["grey" if rival else "blue"]
            axes.barh(at, wall_s, height=0.6, color=colour, label="as the original" if rival else "fastsplit")
            floor_s = row["measured"][link].get("floor_s")
            if floor_s and about["executor"] != "real":
                axes.plot([floor_s] * 2, [at - 0.36, at + 0.36], color=_COLOURS["ink"], linewidth=1.2, label="floor")
            _value_label(axes, wall_s, at, seconds_text(wall_s))
        axes.set_xlim(0, longest * 1.15)
        axes.set_title(link_title(link, about), fontweight="bold", pad=18)
        subtitle = f"{about['tokens']} tokens, {executors.get(about['executor'], about['executor'])}"
        axes.text(0, 1.015, subtitle, transform=axes.transAxes, fontsize=8, color=_COLOURS["muted"], va="bottom")
        axes.set_xlabel("seconds")
        _plain(axes)
        _names(axes, ["\n".join(textwrap.wrap(row["step"], 28)) for row in rows], lambda name: False)
        axes.tick_params(axis="y", labelsize=8)
    _legend(drawn, panels)
    _margins(drawn, 2.2, 0.15, 0.82, 0.9, wspace=0.08)
    note = "Medians; floor: the least that these bytes and calls take on this link"
    _small_print(drawn, "split-ladder.json", document, note)
    _save(drawn, path)


PICTURES: dict[str, Callable[[Path, Path], None]] = {
    "round-trip": lambda results, path: _transport(results, path, "round trip"),
    "throughput": lambda results, path: _transport(results, path, "one way"),
    "prefill": _prefill,
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
