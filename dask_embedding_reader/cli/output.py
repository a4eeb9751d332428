"""What commands print: lines, facts, tables and JSON, which do no more to a terminal than be shown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

_NOT_SHOWN = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""What terminals take for commands, or for the end of a line, or that turns around what comes after it; and halves of
characters, which stand for bytes of a name that are no text."""


def _printable(text: str) -> str:
    """Write out names of files, and what files hold, so that a terminal does no more than show them."""
    return _NOT_SHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def echo(line: str, *, err: bool = False) -> None:
    """Print a line. All that is printed passes through here, or through :func:`print_json`."""
    click.echo(_printable(line), err=err)


def short(score: float | None) -> str:
    """Write out a score."""
    return "none" if score is None else f"{score:.4g}"


def shown_groups(groups: Sequence[Sequence[int]]) -> str:
    """Write out the first groups of equal rows."""
    named = ", ".join(
        " = ".join(f"{row:,}" for row in group[:4]) + (" = …" if group[4:] else "") for group in groups[:5]
    )
    return f" (rows {named}{', …' if groups[5:] else ''})" if groups else ""


def shown_folders(folders: Mapping[str, Mapping[str, int]], most: int = 8) -> str | None:
    """Write out the first folders, with their rows."""
    shown = ", ".join(f"{name} ({folder['rows']:,} rows)" for name, folder in list(folders.items())[:most])
    return f"{shown}{' and more' if len(folders) > most else ''}" or None


def shown_rows(counts: Mapping[str, int]) -> str:
    """Write out how many rows there are in each."""
    from dask_embedding_reader._common.units import counted  # noqa: PLC0415

    least, most = counts["min_rows"], counts["max_rows"]
    return counted(most, "row") if least == most else f"{least:,} to {most:,} rows"


def print_facts(facts: Mapping[str, str | None]) -> None:
    """Print facts under each other, but for those that are None."""
    shown = {name: value for name, value in facts.items() if value is not None}
    width = max(map(len, shown))
    for name, value in shown.items():
        echo(f"{name:{width}}  {value}".rstrip())


def print_table(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print rows under their names; a cell that is too long for a line of text ends in dots."""
    cells = [{_printable(name): _cell(value) for name, value in row.items()} for row in rows]
    if not cells:
        return
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in cells[0]}
    for line in ({name: name for name in widths}, *cells):
        echo("  ".join(f"{line[name]:{width}}" for name, width in widths.items()).rstrip())


def _cell(value: Any, longest: int = 48) -> str:
    text = _printable(" ".join(str(value).split()))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def print_json(facts: Any) -> None:
    """Print facts for programs."""
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
    # The same text to who reads JSON, which has no such character outside of strings but the ends of its lines.
    click.echo("\n".join(_NOT_SHOWN.sub(lambda found: f"\\u{ord(found[0]):04x}", line) for line in text.split("\n")))
