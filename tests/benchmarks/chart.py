"""The chart: time, one panel for each work, and below it memory against the limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .floors import OURS, RAW, REFERENCE
from .report import duration, size

Json = dict[str, Any]
INK, FAINT, ALARM = "#1f2430", "#7d8490", "#c0392b"
BLUE, AMBER, GREY = "#1f6fc4", "#efb06a", "#ccd2da"
COLUMNS, PANEL_INCHES = 3, 1.6
TIMES = (
    "Time of the best run: shorter is better. In brackets, how many times ours. "
    "Blue: this library. Amber: what users would pick instead. Grey: the machine's limit. Red: a floor is missed."
)
MEMORY = "Growth of peak memory over the opened reader. The dashed line is the most that max_ram_usage_in_bytes allows."


def draw(results: Path) -> Path | None:
    """Draw what the JSON file holds as a PNG beside it; None when the library did not run."""
    document: Json = json.loads(results.read_text())
    works = [work for work in document["works"] if OURS in work["contenders"]]
    limited = [work for work in works if work["limit_nbytes"]]
    timed = [work for work in works if not work["limit_nbytes"]]
    if not works:
        return None
    lines = -(-len(timed) // COLUMNS)
    heights = [0.6 + PANEL_INCHES * lines, 3.0 if limited else 0.1]
    figure = Figure(figsize=(15.5, sum(heights)), layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.12))
    [above], [below] = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    draw_times(above, timed, lines)
    draw_memory(below, limited)
    figure.savefig(results.with_suffix(".png"), dpi=120, facecolor="white", bbox_inches="tight", pad_inches=0.25)
    return results.with_suffix(".png")


def draw_times(figure: SubFigure, works: list[Json], lines: int) -> None:
    """A grid of small panels."""
    if works:
        heading(figure, TIMES)
        panels = figure.subplots(lines, COLUMNS, squeeze=False).flatten().tolist()
        for panel, work in zip(panels, works, strict=False):
            draw_panel(panel, work)
        for panel in panels[len(works) :]:
            panel.set_axis_off()


def draw_panel(axes: Axes, work: Json) -> None:
    """Ours first, the machine's limit last; red where a floor is missed."""
    seconds = {name: contender["best_seconds"] for name, contender in work["contenders"].items()}
    missed = {floor["against"] for floor in work["floors"] if not floor["passed"]}
    names = sorted(seconds, key=lambda name: (name != OURS, name == RAW, seconds[name]))
    longest = max(seconds.values())
    for place, name in enumerate(names):
        axes.barh(place, seconds[name], height=0.72, color={OURS: BLUE, RAW: GREY}.get(name, AMBER))
        text = duration(seconds[name]) + ("" if name == OURS else f"  ({ratio(seconds[name] / seconds[OURS])})")
        label(axes, seconds[name] + 0.015 * longest, place, text, ALARM if name in missed else INK, bold=name == OURS)
    axes.set_xlim(0, longest * 1.38)
    axes.set_title(work["title"], loc="left", fontsize=10, fontweight="bold", color=INK)
    dress(axes, names, max(len(names), 3))


def draw_memory(figure: SubFigure, works: list[Json]) -> None:
    """One panel for each limit."""
    limits = sorted({work["limit_nbytes"] for work in works})
    if limits:
        heading(figure, MEMORY)
        panels = figure.subplots(1, max(COLUMNS, len(limits)), squeeze=False).flatten().tolist()
        for panel, limit in zip(panels, limits, strict=False):
            draw_limit(panel, [work for work in works if work["limit_nbytes"] == limit], limit)
        for panel in panels[len(limits) :]:
            panel.set_axis_off()


def draw_limit(axes: Axes, works: list[Json], limit: int) -> None:
    """One bar for each collection, and a line where all of them have to end."""
    bars = [(work["title"].partition(", limit")[0], work["contenders"]) for work in works]
    growths = [contenders[OURS]["growth_nbytes"] for _, contenders in bars]
    bound = 1.1 * limit + 64e6
    for place, (growth, (_, contenders)) in enumerate(zip(growths, bars, strict=True)):
        colour = ALARM if growth > bound else INK
        axes.barh(place, growth, height=0.72, color=BLUE)
        other = contenders.get(REFERENCE)
        text = size(growth) + (f"  (embedding_reader {size(other['growth_nbytes'])})" if other else "")
        label(axes, growth + 0.02 * bound, place, text, colour, bold=False)
    axes.axvline(bound, color=ALARM if max(growths) > bound else INK, linewidth=1.5, linestyle=(0, (3, 2)), zorder=0)
    axes.set_xlim(0, 1.7 * max(bound, *growths))
    axes.set_title(f"limit {size(limit)}, at most {size(bound)}", loc="left", fontsize=10, fontweight="bold", color=INK)
    dress(axes, [name for name, _ in bars], 5)


def ratio(value: float) -> str:
    """A ratio with no more digits than it means."""
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def label(axes: Axes, x: float, y: float, text: str, colour: str, *, bold: bool) -> None:
    """A figure at the end of a bar, on white so that no mark crosses it."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    weight = "bold" if bold else "normal"
    axes.text(x, y, text, va="center", fontsize=9, color=colour, fontweight=weight, bbox=box)


def dress(axes: Axes, names: list[str], places: int) -> None:
    """Names at the left, nothing else around the bars; the first at the top."""
    axes.set_yticks(range(len(names)), names, fontsize=9, color=INK)
    axes.set_ylim(places - 0.5, -0.5)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(FAINT)


def heading(figure: SubFigure, text: str) -> None:
    """A line over a part of the picture."""
    figure.suptitle(text, x=0.008, ha="left", fontsize=11, color=FAINT)
