"""How pictures look, and how they become SVG that can be read on light and on dark pages, the same bytes each time.

GitHub shows an SVG of a README as an image, in which CSS works and the page's own does not. So each colour here is a
pair: drawn is the light one, and a style sheet in the SVG replaces it by the dark one where the reader's system or
browser is dark. The background is the page's. A program that knows no CSS shows the light colours.

Text stays text, in the reader's own sans-serif font, which is narrower than the one that matplotlib measures with:
labels have the room that the wider one needs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .stored import environment, origin

__all__ = ["COLOURS", "WIDTH", "figure", "label_ends", "margins", "plain", "save", "small_print", "value_label"]

WIDTH = 8.6
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
COLOURS = dict(
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
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["grey"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def figure(rows: int, columns: int, height: float, **grid: Any) -> tuple[Figure, list[Axes]]:
    """A picture of README's width and `height` inches. `grid`: as `Figure.subplots` has it."""
    # a Figure of its own knows neither pyplot nor a display; the style is what the process draws with from here on
    matplotlib.rcParams.update(matplotlib.rcParamsDefault | _STYLE)
    drawn = Figure(figsize=(WIDTH, height), facecolor="none")
    axes = drawn.subplots(rows, columns, squeeze=False, subplot_kw={"facecolor": "none"}, **grid)
    return drawn, list(axes.flat)


def plain(axes: Axes, grid: str = "x") -> None:
    """Grid lines across `grid`, no ticks that the grid already shows."""
    axes.grid(True, axis=grid)  # type: ignore[arg-type]
    axes.tick_params(length=0)
    if grid == "x":
        axes.spines["bottom"].set_visible(False)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str, bool]], *, x: float = 1.025) -> None:
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
        axes.annotate(
            text,
            xy=(at_x, at_y),
            xytext=(x, y / height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=colour,
            fontweight="bold" if bold else "normal",
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0.0, 0.5),
                "color": colour,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 3,
                "alpha": 0.7,
            },
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


def value_label(axes: Axes, x: float, y: float, text: str) -> None:
    """Right of a bar that ends at x."""
    axes.annotate(text, (x, y), (4, -0.5), textcoords="offset points", va="center", fontsize=8)


def small_print(drawn: Figure, documents: dict[str, dict[str, Any]], note: str = "") -> None:
    """Below everything: `note`, then the machine, and of each file when and of which revision it was measured."""
    lines = [note] if note else []
    known = environment(next(iter(documents.values())))
    machine = f"{known.get('cpu', 'CPU not known')}, {known.get('cores', '?')} cores, {known.get('kernel', '')}".rstrip(
        ", "
    )
    origins: dict[str, list[str]] = {}
    for name, document in documents.items():
        origins.setdefault(origin(document), []).append(name)
    lines += [machine, *(f"{', '.join(names)}: {when}" for when, names in origins.items())]
    height = drawn.get_figheight()
    for number, line in enumerate(reversed(lines)):
        drawn.text(0.012, (0.07 + 0.14 * number) / height, line, fontsize=7, color=COLOURS["muted"], va="bottom")


def save(drawn: Figure, path: Path) -> None:
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


def margins(drawn: Figure, left: float, right: float, top: float, bottom: float, **spaces: float) -> None:
    """In inches around all axes; `spaces` between them as `subplots_adjust` has it."""
    width, height = drawn.get_size_inches()
    drawn.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, **spaces)
