"""Plots of what is read, and of how the reading went. They need matplotlib, which the extra ``plot`` installs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from dask_embedding_reader._common.units import counted, human_size
from dask_embedding_reader.collection.files import Int64s
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.collection.plan import make_plan, plan_selection
from dask_embedding_reader.errors import ArgumentError
from dask_embedding_reader.rows.selection import Rows
from dask_embedding_reader.rows.stretch import Stretch

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BLOCKS = 250
"""Blocks of a lane that can be told apart; a lane of more is drawn as one, and says how many."""

_INK, _FAINT = "#3b4252", "#8a919e"
_BLUE, _AMBER = "#2f6fb0", "#d08a2e"


class _Lane(NamedTuple):
    """Blocks side by side."""

    name: str
    bounds: Int64s
    """Where each block starts, and where the last one ends."""
    colours: tuple[str, str]
    """Of neighbouring blocks."""


def plot_plan(manifest: Manifest, rows: Rows, start: int, stop: int, piece_rows: int, batch_rows: int | None) -> Axes:
    """Plot files, pieces and batches of the rows at ``[start, stop)`` of a selection, over their positions in it."""
    if start == stop:
        raise ArgumentError(f"no rows to plot: start and end are both {start:,}")
    vectors = manifest.vectors
    is_all = rows == Stretch(range(vectors.count))
    if is_all:
        pieces = make_plan(vectors, start, stop, piece_rows).bounds
    else:
        pieces = start + plan_selection(vectors, rows[start:stop], piece_rows).bounds
    lanes = [_Lane("pieces", pieces, ("#4f9d83", "#8fc6b2"))]
    if rows.is_ascending:  # else rows come from all files in turn
        files = np.unique(vectors.offsets if is_all else rows.search(vectors.offsets))
        inside = files[(files > start) & (files < stop)]
        lanes.insert(0, _Lane("files", np.unique([start, *inside, stop]), ("#4a7fb5", "#86aed3")))
    if batch_rows is not None:
        bounds = np.append(np.arange(start, stop, batch_rows), stop)
        lanes.append(_Lane("batches", bounds, ("#d08a2e", "#e9bd82")))
    _, panels = _subplots(1, (7.5, 0.9 + 0.75 * len(lanes)))  # wider, its letters are too small on phones
    axes: Axes = panels[0]
    for height, lane in enumerate(reversed(lanes)):
        _draw_lane(axes, height, lane, manifest.byte_per_item)
    axes.set_yticks(range(len(lanes)), [lane.name for lane in reversed(lanes)], fontsize=11, color=_INK)
    axes.set_ylim(-0.55, len(lanes) - 0.45 + 0.15)
    axes.set_xlim(start, stop)
    axes.tick_params(length=0, colors=_INK)
    axes.locator_params(axis="x", integer=True)  # there is no row 2.5
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("row" if is_all else "row of the selection", color=_INK)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _draw_lane(axes: Axes, height: int, lane: _Lane, byte_per_item: int) -> None:
    rows = np.diff(lane.bounds)
    count = len(rows)
    starts = lane.bounds[:-1]
    if count <= _MOST_BLOCKS:
        for parity, colour in enumerate(lane.colours):
            blocks = list(zip(starts[parity::2].tolist(), rows[parity::2].tolist(), strict=True))
            axes.broken_barh(blocks, (height - 0.22, 0.44), facecolors=colour, linewidth=0)
    else:
        axes.broken_barh(
            [(int(starts[0]), int(rows.sum()))], (height - 0.22, 0.44), facecolors=lane.colours[1], linewidth=0
        )
    name = lane.name if count > 1 else {"batches": "batch"}.get(lane.name, lane.name[:-1])
    least, most = int(rows.min()), int(rows.max())
    sizes = counted(most, "row") if least == most else f"{least:,} to {most:,} rows"
    told = f"{count:,} {name} of {sizes}, {'up to ' if least < most else ''}{human_size(most * byte_per_item)}"
    left = int(lane.bounds[0])
    axes.annotate(told, (left, height + 0.22), (0, 3), textcoords="offset points", fontsize=9, color=_FAINT)


def plot_recording(table: pd.DataFrame) -> npt.NDArray[Any]:
    """Plot what :class:`BatchRecorder` noted: throughput above, memory below, over the same seconds."""
    if table.empty:
        raise ArgumentError("nothing to plot: no batch has come yet; iterate over the recorder first")
    _, panels = _subplots(2, (10, 4.2))
    above, below = panels
    seconds, speed = _throughput(table["seconds"].to_numpy(), table["nbytes"].to_numpy())
    above.step(seconds, speed / 1e6, where="pre", color=_BLUE, linewidth=1.6)
    above.fill_between(seconds, speed / 1e6, step="pre", color=_BLUE, alpha=0.15, linewidth=0)
    total, elapsed = float(table["nbytes"].sum()), float(table["seconds"].iloc[-1])
    facts = [f"{table['rows'].sum():,.0f} rows, {human_size(total)} in {elapsed:.3g} s"]
    facts.append(f"{total / max(elapsed, 1e-9) / 1e6:,.0f} MB/s on average")
    facts.append(f"{table['waited'].sum() / max(elapsed, 1e-9):.0%} of the time the loop waited")
    below.plot(table["seconds"], table["memory_nbytes"] / 1e6, color=_AMBER, linewidth=1.6)
    below.fill_between(table["seconds"], table["memory_nbytes"] / 1e6, color=_AMBER, alpha=0.15, linewidth=0)
    most, growth = table["memory_nbytes"].max(), table["memory_nbytes"].max() - table["memory_nbytes"].iloc[0]
    _finish_panel(above, "MB/s", "throughput: " + ", ".join(facts))
    _finish_panel(
        below,
        "MB",
        f"memory of the process: at most {human_size(_round(most))}, grown by "
        f"{human_size(_round(growth))} since the first batch",
    )
    below.set_xlabel("seconds", color=_INK)
    below.set_xlim(0, max(elapsed, 1e-9))
    return panels


def _throughput(seconds: npt.NDArray[Any], nbytes: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the ends of at most 100 equal spans of time and the bytes a second in each."""
    spans = int(np.clip(len(seconds) // 2, 1, 100))
    edges = np.linspace(0, max(float(seconds[-1]), 1e-9), spans + 1)
    done = np.interp(edges, np.concatenate([[0], seconds]), np.concatenate([[0], np.cumsum(nbytes)]))
    speed = np.diff(done) / np.diff(edges)
    return edges, np.concatenate([speed[:1], speed])


def _finish_panel(axes: Axes, unit: str, title: str) -> None:
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.set_ylabel(unit, color=_INK)
    axes.set_ylim(bottom=0)
    axes.tick_params(colors=_INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _subplots(count: int, size: tuple[float, float]) -> tuple[Figure, npt.NDArray[Any]]:
    """Return a figure and its panels, one above the other."""
    try:
        import matplotlib.pyplot as plt  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "dask-embedding-reader[plot]"') from error
    figure, panels = plt.subplots(count, 1, sharex=True, squeeze=False, figsize=size, layout="constrained")
    return figure, panels[:, 0]


def _round(number: float) -> float:
    return float(f"{number:.3g}")
