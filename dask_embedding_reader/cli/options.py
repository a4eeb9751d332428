"""Options that several commands have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def json_mapping(_: click.Context, __: click.Parameter, text: str | None) -> dict[str, Any] | None:
    """Read the value of an option that is a JSON object."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise click.BadParameter('a JSON object is expected, such as {"anon": true}')
    return value


KINDS = ("npy", "parquet", "arrow", "fbin", "fvecs", "npz", "safetensors")
"""As the registry of formats has them, which takes a second to import."""

FORMATS = click.Choice([*KINDS, *(f"parquet_{kind}" for kind in KINDS if kind not in ("parquet", "arrow"))])
STORAGE_OPTIONS = click.option(
    "--storage-options", metavar="JSON", callback=json_mapping, help="Passed to fsspec, such as '{\"anon\": true}'."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
QUIET = click.option("--quiet", "-q", is_flag=True, help="Show no progress.")


URLS = click.argument("urls", metavar="URL...", nargs=-1, required=True)


def collection_options(command: F) -> F:
    """Add the options that say how a collection is to be opened."""
    for option in (
        STORAGE_OPTIONS,
        click.option(
            "--embedding-dtype",
            metavar="DTYPE",
            help="Item type where files do not tell it: a binary column of parquet, fbin and fvecs files of other "
            "names.",
        ),
        click.option(
            "--metadata-folder",
            "metadata_folders",
            multiple=True,
            metavar="URL",
            help="parquet_npy and its like: where the parquet files are; may be repeated, as often as URL.",
        ),
        click.option(
            "--meta-column",
            "-m",
            "meta_columns",
            multiple=True,
            metavar="NAME",
            help="Metadata column, or * for all; may be repeated.",
        ),
        click.option(
            "--embedding-column",
            metavar="NAME",
            help="parquet, arrow, npz, safetensors: what holds the vectors, or 'emb_*' for a column each item; by "
            "default `embedding`, else the only one.",
        ),
        click.option(
            "--file-format",
            "-f",
            type=FORMATS,
            metavar="FORMAT",
            help=f"One of {', '.join(KINDS)}, or parquet_npy and its like, with metadata in parquet files beside them. "
            "By default what a manifest or the names of the files say.",
        ),
    ):
        command = option(command)
    return command


ROW_RANGE = click.option(
    "--rows",
    "row_range",
    metavar="START:STOP",
    help="Only these rows, counted from 0: a range, or an .npy file of row numbers, in their order.",
)


def row_options(command: F) -> F:
    """Add the options that choose rows by what they are."""
    for option in (
        click.option("--seed", type=int, help="Which sample, by default 0; the same everywhere."),
        click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Only so many rows, drawn at random."),
        click.option(
            "--where",
            multiple=True,
            metavar="CONDITION",
            help="Only rows with such metadata: 'width >= 512', 'kind in [a, b]', 'caption is not null'. If repeated, "
            "all have to hold.",
        ),
    ):
        command = option(command)
    return command
