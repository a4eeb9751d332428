"""What a notebook shows of a reader: its facts, and its files as a strip, to scale."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import pairwise

import numpy as np

from dask_embedding_reader._common.units import counted, human_size
from dask_embedding_reader.collection.files import FileTable, Int64s
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.storage.retries import hide_secrets
from dask_embedding_reader.storage.urls import shown_from_here

_MOST_BLOCKS = 150
"""Blocks of the strip; where there are more files, neighbours share a block."""

_SHADES = ("#4a7fb5", "#86aed3")
"""Of neighbouring blocks. They can be seen on white and on black."""

_PALEST = 0.15
"""How opaque a block is of which nothing is selected."""

_WIDTH, _HEIGHT, _GAP = 1000, 30, 1.5
"""The strip in units of its own; the browser stretches it."""

_LONGEST_PLACE = 90
"""Characters of the folder."""


def card(manifest: Manifest, rows: int, order: str, file_rows: Int64s) -> str:
    """Return a reader as HTML, a few kilobytes however many files there are; without secrets.

    Of the collection so many rows are selected, in an order that has a name, or none if it is that of the files;
    ``file_rows`` tells how many each file has of them.
    """
    # A table for who drops styles; who keeps them puts its cells in several lines where there is little room.
    cells = "".join(
        '<td style="display:inline-block;text-align:left;padding:2px 24px 6px 0;vertical-align:top;background:none">'
        f'<div style="font-size:11px;opacity:.65">{escape(name)}</div>'
        f'<div style="font-size:15px;white-space:nowrap">{escape(value)}</div></td>'
        for name, value in _facts(manifest, rows, order)
    )
    return (
        '<div style="border:1px solid rgba(128,128,128,.4);border-radius:6px;padding:10px 14px;max-width:760px;'
        'font-family:sans-serif">'
        '<div style="font-weight:600">EmbeddingReader <span style="font-weight:400;opacity:.65">'
        f"{escape(_place(manifest.vectors))}</span></div>"
        '<table style="border:none;margin:6px 0 4px 0;border-collapse:collapse">'
        f'<tr style="background:none">{cells}</tr></table>{_strip(manifest, file_rows)}{_columns(manifest)}</div>'
    )


def _facts(manifest: Manifest, rows: int, order: str) -> Iterator[tuple[str, str]]:
    vectors = manifest.vectors
    yield "rows", f"{rows:,}" if rows == manifest.count else f"{rows:,} of {manifest.count:,}"
    if order:
        yield "order", order
    yield "dimension", f"{manifest.dimension:,}"
    yield "dtype", str(manifest.dtype)
    yield "size", human_size(rows * manifest.byte_per_item)
    yield "a row", human_size(manifest.byte_per_item)
    files = int(np.count_nonzero(vectors.rows))
    yield "files", f"{files:,} {manifest.format.name}"
    if manifest.vectors_name is not None:
        yield "vectors", manifest.vectors_name
    if vectors.has_groups:
        yield "row groups", f"{len(vectors.group_rows):,}"


def _place(vectors: FileTable) -> str:
    """Return the folder that all files are in."""
    if len(vectors.stores) > 1:
        return f"{len(vectors.stores)} storages"
    folder = vectors.paths[0] if len(vectors) == 1 else _common_folder(min(vectors.paths), max(vectors.paths))
    place = shown_from_here(vectors.stores[0], folder)
    return place if len(place) <= _LONGEST_PLACE else "…" + place[-_LONGEST_PLACE:]


def _common_folder(first: str, last: str) -> str:
    # Not os.path.commonpath, which takes the two slashes of a URL for one.
    same = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, same) + 1]


def _strip(manifest: Manifest, file_rows: Int64s) -> str:
    """Draw the files from left to right, each as wide as it has rows, paler where few of these are selected."""
    vectors = manifest.vectors
    blocks = []
    for number, (first, last) in enumerate(_blocks(vectors.offsets)):
        start, stop = int(vectors.offsets[first]), int(vectors.offsets[last])
        left, right = (_WIDTH * row / vectors.count for row in (start, stop))
        name = hide_secrets(vectors.url(first)).rsplit("/", 1)[-1]
        if last > first + 1:
            name += f" and {counted(last - first - 1, 'more file')}"
        told = (
            f"{name}: {counted(stop - start, 'row')}, "
            f"{human_size((stop - start) * manifest.byte_per_item)}, from row {start:,}"
        )
        width = max(right - left - _GAP, 0.7)
        selected = int(file_rows[first:last].sum())
        shade = ""
        if selected != stop - start:
            told += f"; {selected:,} selected"
            shade = f' opacity="{min(1, _PALEST + (1 - _PALEST) * selected / (stop - start)):.2f}"'
        blocks.append(
            f'<rect x="{left:.1f}" width="{width:.1f}" height="{_HEIGHT}" fill="{_SHADES[number % 2]}"{shade}>'
            f"<title>{escape(told)}</title></rect>"
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="the files, to scale" style="width:100%;height:{_HEIGHT}px;display:block">{"".join(blocks)}</svg>'
        '<div style="display:flex;justify-content:space-between;font-size:11px;opacity:.65">'
        f"<span>row 0</span><span>files in order, to scale</span><span>{vectors.count:,}</span></div>"
    )


def _blocks(offsets: Int64s) -> Iterator[tuple[int, int]]:
    """Return ranges of neighbouring files that have rows, at most `_MOST_BLOCKS`, of about as many rows each."""
    full = np.flatnonzero(np.diff(offsets))
    if len(full) <= _MOST_BLOCKS:
        return ((int(file), int(file) + 1) for file in full)
    wanted = np.linspace(0, offsets[-1], _MOST_BLOCKS + 1)
    cuts = np.unique([0, *np.searchsorted(offsets, wanted[1:-1]), len(offsets) - 1])
    return ((int(a), int(b)) for a, b in pairwise(cuts))


def _columns(manifest: Manifest) -> str:
    if not manifest.fields:
        return ""
    names = ", ".join(f"{escape(field.name)} <i>{escape(str(field.dtype))}</i>" for field in manifest.fields)
    return f'<div style="margin-top:6px;font-size:12px"><span style="opacity:.65">metadata</span> {names}</div>'
