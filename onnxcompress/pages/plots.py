"""Plots as SVG elements, drawn by matplotlib: static, small, sharp in print, and there without a script.

Colours are those of Okabe and Ito, which are told apart with any kind of colour vision; what they tell is told by a
label, a marker or a hatching too. Figures are narrow, so that their text can be read on a telephone. Names are text,
never formulas.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

import numpy as np

from onnxcompress.errors import RuntimeUnavailableError
from onnxcompress.pages.document import Figure
from onnxcompress.units import printable, seconds_text

__all__ = [
    "Hill",
    "Point",
    "Spread",
    "bars",
    "check_plotting",
    "distributions",
    "lines",
    "pareto",
    "ratios",
    "scatter",
    "shorten",
    "stacked",
]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
HATCHES = ("", "//", "--", "xx", "\\\\", "++", "||")  # of lines only: dots make a file ten times as large
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_WIDTH = 5.2
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7ec",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Point:
    """A variant by its time in seconds (lower is better) and its accuracy (higher is better)."""

    label: str
    seconds: float
    accuracy: float


@dataclass(frozen=True)
class Spread:
    """A ratio with its interval."""

    label: str
    value: float
    low: float
    high: float


#: label, edges of the bins in seconds, counts, median in seconds
Hill = tuple[str, Sequence[float], Sequence[int], float]


def check_plotting() -> None:
    """Look for matplotlib.

    Raises:
        RuntimeUnavailableError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeUnavailableError(
            "matplotlib is not installed, and the plots of a page need it; install it with: "
            "pip install 'onnxcompress[report]', or write a Markdown page (--page FILE.md)"
        ) from error


def shorten(text: str, most: int = 30) -> str:
    """``text`` with its middle left out where it is long: the ends of names tell most."""
    text = printable(text)
    head = (most - 1) // 3
    return text if len(text) <= most else f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def _drawn(title: str, caption: str, height: float, draw: Callable[[Any], None]) -> Figure:
    """A figure of ``height`` inches whose axes ``draw`` fills, when it is needed."""
    return Figure(lambda: _svg(title, caption, height, draw), title, caption)


def _svg(title: str, caption: str, height: float, draw: Callable[[Any], None]) -> str:
    check_plotting()
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    # The salt makes the names inside the file repeatable, and different from those of the page's other figures.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has its own fonts
        canvas = Canvas(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(canvas)
        draw(canvas.add_subplot())
        out = StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    label = escape(printable(f"{title}. {caption}" if caption else title), quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def ratios(title: str, caption: str, rows: Sequence[Spread], floor: tuple[float, float] | None) -> Figure:
    """Speed ratios with their intervals, 1 being as fast as the reference; the noise floor is a grey band."""

    def draw(axes: Any) -> None:
        if floor is not None:
            axes.axvspan(*floor, color="#9aa4b1", alpha=0.35, linewidth=0)
        axes.axvline(1.0, color="#57606a", linewidth=1)
        for index, row in enumerate(rows):
            colour = COLOURS[0] if row.low > 1 else COLOURS[5] if row.high < 1 else "#57606a"
            marker = ">" if row.low > 1 else "<" if row.high < 1 else "o"
            reach = [[max(0.0, row.value - row.low)], [max(0.0, row.high - row.value)]]
            axes.errorbar(row.value, index, xerr=reach, fmt=marker, color=colour, capsize=4, markersize=7)
            axes.annotate(
                f"{row.value:.2f}x", (row.value, index), xytext=(0, 8), textcoords="offset points", ha="center"
            )
        _labels(axes, [row.label for row in rows])
        low, high = min([1.0, *(r.low for r in rows)]), max([1.0, *(r.high for r in rows)])
        margin = 0.12 * max(high - low, 0.05)
        axes.set_xlim(max(0.0, low - margin), high + margin)
        axes.set_xlabel("speed ratio, above 1 is faster")

    return _drawn(title, caption, 1.2 + 0.55 * len(rows), draw)


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in time and accuracy at once, the fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.seconds, -p.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def scatter(title: str, caption: str, points: Sequence[Point], accuracy: str) -> Figure:
    """Accuracy against time, with the line of the points that nothing beats in both."""

    def draw(axes: Any) -> None:
        front = pareto(points)
        axes.step(
            [p.seconds * 1e3 for p in front],
            [p.accuracy for p in front],
            where="post",
            color="#57606a",
            linestyle="--",
            linewidth=1,
            zorder=1,
        )
        for index, point in enumerate(points):
            axes.scatter(
                point.seconds * 1e3,
                point.accuracy,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                s=64,
                edgecolors="#1b1f24" if point in front else "none",
                zorder=2,
                label=shorten(point.label, 44),
            )
        values = [point.accuracy for point in points]
        space = max(0.25 * (max(values) - min(values)), 0.005 * max(map(abs, values)), 1e-6)
        axes.set_ylim(min(values) - space, max(values) + space)
        axes.margins(x=0.15)
        axes.set_xlabel("median time, ms (left is faster)")
        axes.set_ylabel(shorten(accuracy, 50))
        _legend(axes)

    return _drawn(title, caption, 3.0 + 0.22 * len(points), draw)


def distributions(title: str, caption: str, rows: Sequence[Hill]) -> Figure:
    """Each as a hill on a line of its own, the median marked."""

    def draw(axes: Any) -> None:
        widest = max(max(*edges, median) for _, edges, _, median in rows) * 1e3
        for index, (_, edges, counts, median) in enumerate(reversed(rows)):
            heights = np.array(counts[:-1], float)  # the last bin has no end
            heights *= 0.8 / max(float(heights.max(initial=0.0)), 1.0)
            left = np.array(edges) * 1e3
            colour = COLOURS[(len(rows) - 1 - index) % len(COLOURS)]
            axes.axhline(index, color="#d0d7de", linewidth=0.8)
            axes.stairs(index + heights, left, baseline=index, fill=True, color=colour, alpha=0.65)
            axes.plot([median * 1e3] * 2, [index, index + 0.85], color="#1b1f24", linewidth=1.2)
            place = (median * 1e3, index + 0.85)
            side = ("left", 3) if median * 1e3 < 0.7 * widest else ("right", -3)  # where there is room
            axes.annotate(
                seconds_text(median), place, (side[1], -4), textcoords="offset points", ha=side[0], fontsize=9
            )
        axes.set_yticks(
            [i + 0.35 for i in range(len(rows))], [_row_label(row[0]) for row in reversed(rows)], fontsize=9
        )
        axes.grid(visible=False, axis="y")
        axes.set_ylim(-0.1, len(rows))
        axes.set_xlim(0, 1.05 * widest)
        axes.set_xlabel("time of a run, ms")

    return _drawn(title, caption, 1.2 + 0.75 * len(rows), draw)


def bars(
    title: str, caption: str, groups: Mapping[str, Sequence[float | None]], series: Sequence[str], unit: str
) -> Figure:
    """{group: one value a series} as horizontal bars beside each other; None: no bar."""

    def draw(axes: Any) -> None:
        thickness = 0.8 / len(series)
        for number, name in enumerate(series):
            places = [index - 0.4 + (number + 0.5) * thickness for index in range(len(groups))]
            values = [row[number] for row in groups.values()]
            axes.barh(
                places,
                [0.0 if value is None else value for value in values],
                thickness * 0.92,
                color=COLOURS[number % len(COLOURS)],
                hatch=HATCHES[number % len(HATCHES)],
                edgecolor="white",
                linewidth=0,
                label=shorten(name, 44),
            )
        _labels(axes, list(groups))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(shorten(unit, 50))
        if len(series) > 1:
            _legend(axes)

    height = 1.1 + len(groups) * (0.12 + 0.16 * max(len(series), 1.2))
    return _drawn(title, caption, height + (0.22 * len(series) if len(series) > 1 else 0), draw)


def stacked(title: str, caption: str, rows: Mapping[str, Sequence[float]], parts: Sequence[str], unit: str) -> Figure:
    """{row: one value a part} as one horizontal bar a row, its parts after each other."""

    def draw(axes: Any) -> None:
        begin = np.zeros(len(rows))
        for number, part in enumerate(parts):
            values = np.array([row[number] for row in rows.values()], float)
            axes.barh(
                range(len(rows)),
                values,
                0.6,
                left=begin,
                color=COLOURS[number % len(COLOURS)],
                hatch=HATCHES[number % len(HATCHES)],
                edgecolor="white",
                linewidth=0,
                label=shorten(part, 44),
            )
            begin += values
        _labels(axes, list(rows))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(shorten(unit, 50))
        _legend(axes)

    return _drawn(title, caption, 1.5 + 0.45 * len(rows), draw)


def lines(title: str, caption: str, series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> Figure:
    """{name: (x, y) points} as lines with markers; the x axis counts in powers of two."""

    def draw(axes: Any) -> None:
        for index, (name, points) in enumerate(series.items()):
            axes.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                linestyle=("-", "--", ":", "-.")[index % 4],
                label=shorten(name, 44),
            )
        places = sorted({p[0] for points in series.values() for p in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(shorten(x, 50))
        axes.set_ylabel(shorten(y, 50))
        _legend(axes)

    return _drawn(title, caption, 3.0 + 0.22 * len(series), draw)


def _labels(axes: Any, labels: Sequence[str]) -> None:
    """Names of rows, the first at the top."""
    axes.set_yticks(range(len(labels)), [_row_label(label) for label in labels], fontsize=9)
    axes.set_ylim(len(labels) - 0.45, -0.55)


def _row_label(label: str) -> str:
    """A model and the runtime that it is on stand on a line each."""
    model, on, runtime = label.rpartition(" on ")
    return f"{shorten(model, 26)}\non {shorten(runtime, 26)}" if on else shorten(label)


def _legend(axes: Any) -> None:
    """What colours and markers mean, below the axes."""
    axes.figure.legend(loc="outside lower center", fontsize=9)
