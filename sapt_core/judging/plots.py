"""Figures of a sequence as PNG bytes. Each is drawn on a canvas of its own: no state is shared, no window opened."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Ragged = Sequence[Sequence[float]]

DPI = 110
ANNOTATED = 16  # a larger map has no room for figures in its cells,
ANNOTATED_BESIDE = 8  # and one that stands beside others has less
CURVE_POINTS = 200
INK, PALE, ACCENT, WARN = "#1f2933", "#d5dbe1", "#1565a8", "#c2410c"
LINES = {"loss": (INK, "-", "loss (nats a token)"), "gate": (ACCENT, "-", "weight of the new block (right)")}
TERM_COLOURS = (WARN, "#6b21a8", "#166534")


def score_map(tasks: Sequence[str], rows: Ragged, lessons: Sequence[str]) -> bytes:
    """Heat map of a score matrix, 0 to 100: row i after lesson i, column j on task j."""
    figure = _figure(0.62 * len(tasks) + 3.2, 0.45 * len(rows) + 1.9)
    axes = figure.add_subplot()
    image = _map(axes, _square(rows, len(tasks)), tasks, [f"after {name}" for name in lessons], top=100, digits=0)
    axes.set_xlabel("score on")
    figure.colorbar(image, ax=axes, label="score", shrink=0.9)
    return _png(figure)


def weight_maps(tasks: Sequence[str], blocks: Sequence[str], maps: Sequence[tuple[str, Ragged]]) -> bytes:
    """Heat maps side by side of the mean weight of every block on every task, each with its title."""
    roomy = len(tasks) <= ANNOTATED_BESIDE
    size = 0.46 if roomy else 0.2
    figure = _figure(len(maps) * (size * len(blocks) + 0.7) + 2.2, size * len(tasks) + 2.0)
    every = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, (title, rows) in zip(every, maps, strict=True):
        image = _map(axes, _square(rows, len(blocks)), blocks, tasks, top=1, digits=2 if roomy else None)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("block of")
    every[0].set_ylabel("inputs of")
    figure.colorbar(image, ax=list(every), label="mean weight", shrink=0.9)
    return _png(figure)


def weight_history(tasks: Sequence[str], versions: Sequence[Ragged | None], lessons: Sequence[str]) -> bytes:
    """A small heat map a version, tasks down and blocks across, all with the axes of the last one."""
    figure, grid = _grid(len(versions), 1.4, 1.5, columns=min(8, len(versions)), gaps=(0.12, 0.3))
    for index, (axes, rows) in enumerate(zip(grid, versions, strict=True)):
        axes.set_title(f"after {_short(lessons[index])}", fontsize=8)
        if rows is None:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", fontsize=8, transform=axes.transAxes)
        _map(axes, _square(rows or [], len(tasks), len(tasks)), (), (), top=1, digits=None)
    return _png(figure)


def alignment_map(
    tasks: Sequence[str], versions: Sequence[Sequence[float] | None], limit: float, lessons: Sequence[str]
) -> bytes:
    """Heat map of the KL of every task's attention: row i after lesson i; bold where it is beyond ``limit``."""
    figure = _figure(0.62 * len(tasks) + 3.2, 0.45 * len(versions) + 1.9)
    axes = figure.add_subplot()
    values = _square([row or () for row in versions], len(tasks))
    image = _map(axes, values, tasks, [f"after {name}" for name in lessons], top=2 * limit, digits=2, bold=limit)
    image.set_cmap("Oranges")
    axes.set_xlabel("attention of")
    bar = figure.colorbar(image, ax=axes, label="KL, nats", shrink=0.9, extend="max")
    bar.ax.axhline(limit, color=INK, lw=1)
    return _png(figure)


def average_performance(rows: Sequence[tuple[str, Sequence[float]]]) -> bytes:
    """A line a row of a comparison: AP over the tasks so far, after each task."""
    figure = _figure(9.5, 4.6)
    axes = figure.add_subplot()
    for (name, values), style in zip(rows, cycle(("-", "--", ":")), strict=False):
        axes.plot(range(1, len(values) + 1), values, style, lw=1.5, marker=".", label=name)
    axes.set_xlabel("tasks learnt")
    axes.set_ylabel("AP on the tasks so far")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=PALE, lw=0.6)
    axes.spines[:].set_color(PALE)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    return _png(figure)


def grid_map(across: tuple[str, Sequence[str]], down: tuple[str, Sequence[str]], cells: Ragged, label: str) -> bytes:
    """Heat map of figures over the values of two fields, each given by its name and its values; NaN is left empty.

    Args:
        across, down: the fields.
        cells: a row for each value of ``down``, not all of them NaN.
        label: what the figures are.
    """
    (name_across, columns), (name_down, rows) = across, down
    figure = _figure(0.8 * len(columns) + 2.6, 0.55 * len(rows) + 1.6)
    axes = figure.add_subplot()
    values = _square(cells, len(columns))
    image = _map(axes, values, columns, rows, top=max(np.nanmax(values), 1.0), digits=1)
    axes.set_xlabel(name_across)
    axes.set_ylabel(name_down)
    figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    return _png(figure)


def curves(tasks: Sequence[str], every: Sequence[Sequence[dict[str, float]]]) -> bytes:
    """A panel a task: loss and a method's terms (left axis) and the new block's weight (right axis) over the steps."""
    lines = LINES | {
        name: (colour, "--", name) for name, colour in zip(terms(every), cycle(TERM_COLOURS), strict=False)
    }
    figure, grid = _grid(len(tasks), 2.6, 1.8, columns=min(4, len(tasks)), gaps=(0.55, 0.5), foot=0.4)
    for axes, name, curve in zip(grid, tasks, every, strict=True):
        right = axes.twinx()
        for label, (colour, style, _) in lines.items():
            if label in curve[0]:
                (right if label == "gate" else axes).plot(*_binned(curve, label), color=colour, ls=style, lw=1.2)
        right.set_ylim(-0.02, 1.02)
        right.tick_params(colors=ACCENT)
        axes.set_ylim(bottom=0)
        axes.set_title(_short(name), fontsize=9)
        axes.grid(axis="y", color=PALE, lw=0.6)
        axes.set_axisbelow(True)
        for side in (axes, right):
            side.tick_params(labelsize=7)
            side.locator_params(nbins=4)
            side.spines[:].set_color(PALE)
    handles = [Line2D([], [], color=colour, ls=style, label=text) for colour, style, text in lines.values()]
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=8, frameon=False)
    return _png(figure)


def terms(every: Sequence[Sequence[dict[str, float]]]) -> list[str]:
    """Names of the terms that a method added to the loss of any of these training curves."""
    known = {"step", "loss", "gate", "dev"}
    return list(dict.fromkeys(name for curve in every for name in curve[0] if name not in known))


def _binned(curve: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values, averaged over neighbours where there are more than ``CURVE_POINTS``."""
    width = math.ceil(len(curve) / CURVE_POINTS)
    parts = [curve[start : start + width] for start in range(0, len(curve), width)]
    return [part[-1]["step"] for part in parts], [sum(entry[name] for entry in part) / len(part) for part in parts]


def _square(rows: Ragged, columns: int, height: int | None = None) -> NDArray[np.float64]:
    """Ragged rows as an array, NaN where there is nothing."""
    square = np.full((len(rows) if height is None else height, columns), np.nan)
    for index, row in enumerate(rows):
        square[index, : len(row)] = row
    return square


def _map(
    axes: Axes,
    values: NDArray[np.float64],
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    top: float,
    digits: int | None,
    bold: float = math.inf,
) -> AxesImage:
    """A heat map from 0 to ``top``, with its values in the cells, bold above ``bold``, unless ``digits`` is None."""
    image = axes.imshow(values, vmin=0, vmax=top, cmap="Blues", aspect="auto")
    axes.set_facecolor("#f1f3f5")
    axes.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows[: len(values)])), [_short(name) for name in rows[: len(values)]], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if digits is not None and max(values.shape) <= ANNOTATED:
        for (i, j), value in np.ndenumerate(values):
            if not math.isnan(value):
                text = f"{value:.{digits}f}"
                if digits:
                    text = text.strip("0").rstrip(".") or "0"  # .5, 1 and 0, for there is little room
                colour, weight = "white" if value > 0.6 * top else INK, "bold" if value > bold else "normal"
                axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour, weight=weight)
    return image


def _grid(
    panels: int, width: float, height: float, *, columns: int, gaps: tuple[float, float], foot: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, row by row; all in inches. Placed by hand: solving for it takes seconds."""
    lines = math.ceil(panels / columns)
    across, down = gaps
    size = columns * (width + across) + across, lines * (height + down) + 0.3 + foot
    figure = Figure(figsize=size, dpi=DPI)
    every = list(figure.subplots(lines, columns, squeeze=False).flat)
    figure.subplots_adjust(
        left=across / size[0],
        right=1 - across / size[0],
        bottom=(0.25 + foot) / size[1],
        top=1 - down / size[1],
        wspace=across / width,
        hspace=down / height,
    )
    for axes in every[panels:]:
        axes.set_visible(False)
    return figure, every[:panels]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _short(name: str) -> str:
    """The number of a SuperNI task stands for its name."""
    head = "after " if name.startswith("after ") else ""
    name = name.removeprefix(head)
    return head + (name.partition("_")[0] if name.startswith("task") else name)


def _png(figure: Figure) -> bytes:
    """The figure as PNG; every text as it is, where matplotlib would read what stands between two ``$`` as TeX."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)  # noqa: S101 - narrows what findobj gives
        text.set_parse_math(False)
    file = io.BytesIO()
    with rc_context({"text.parse_math": False}):  # of those that drawing makes
        figure.savefig(file, format="png")
    return file.getvalue()
