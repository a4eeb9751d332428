"""The command line: ``dask-embedding-reader COMMAND URL``.

Each command finds facts (a dictionary of plain values) in a module of its own, which is imported when it runs, so
that help comes at once; here is what is printed of them.

Exit codes: 0 done; 1 the collection or the storage is at fault; 2 the command was wrong; 130 interrupted; 141 nobody
reads the output any more.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dask_embedding_reader import __version__
from dask_embedding_reader.cli.options import (
    FORMATS,
    JSON,
    QUIET,
    ROW_RANGE,
    STORAGE_OPTIONS,
    URLS,
    collection_options,
    json_mapping,
    row_options,
)
from dask_embedding_reader.cli.output import (
    echo,
    print_facts,
    print_json,
    print_table,
    short,
    shown_folders,
    shown_groups,
    shown_rows,
)
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError, EmbeddingReaderError, WriteError

if TYPE_CHECKING:
    from dask_embedding_reader.reader import EmbeddingReader

INTERRUPTED = 130
"""What shells report of a program that Ctrl-C ended."""

NOBODY_READS = 141
"""What shells report of a program whose output goes into a pipe that was closed, as `head` does when it has enough."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code; whatever goes wrong is told in a sentence."""
    show_warning, handler = warnings.showwarning, _LogHandler()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    logger = logging.getLogger("dask_embedding_reader")
    logger.addHandler(handler)
    try:
        _run(arguments)
    finally:
        # Those of who called this from Python.
        warnings.showwarning = show_warning
        logger.removeHandler(handler)


def _run(arguments: Sequence[str] | None) -> NoReturn:
    try:
        # Not standalone: click would turn Ctrl-C into exit code 1.
        result = command_line.main(arguments, standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        echo("Interrupted", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show(shown := io.StringIO())
        for line in shown.getvalue().splitlines():
            echo(line, err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(_drop_output())
    except Exception as error:
        if os.environ.get("DASK_EMBEDDING_READER_TRACEBACK"):
            raise
        known = isinstance(error, EmbeddingReaderError | ImportError)
        from dask_embedding_reader.storage.retries import describe  # noqa: PLC0415 - help needs none of it

        told = _as_options(str(error) if known else describe(error))
        if isinstance(error, WriteError):
            told = told.replace("--storage-options", "--target-storage-options")
        echo(f"Error: {told}", err=True)
        sys.exit(2 if isinstance(error, ArgumentError | ArgumentTypeError) else 1)
    sys.exit(result if isinstance(result, int) else 0)


def _drop_output() -> int:
    """Let go of what could not be printed, which Python would try again at its end, and return the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return NOBODY_READS


def _as_options(message: str) -> str:
    """Write out the arguments that a message names as the options of the command."""
    named = re.sub(r'(?<= write )file_format="(\w+)"', r"--to \1", message)
    # After a blank or a bracket: folders may be called `dtype=float16`.
    named = re.sub(rf"(?<![^ (])(({_ARGUMENTS})\b|({_WORDS})(?==))", _as_option, named)
    named = re.sub(r'(?<![^ (])(--[a-z-]+)="(\w+)"', r"\1 \2", named)
    named = re.sub(r"(?<![^ (])(--[a-z-]+)=(True\b|\.\.\.|(?=[,;)]|$))", r"\1", named)
    return re.sub(r"(?<![^ (])-m=(?:\[\.\.\.\])?", lambda found: "-m NAME" if "]" in found[0] else "-m ", named)


_ARGUMENTS = (
    "embeddings_folder|metadata_folder|meta_columns|embedding_column|embedding_dtype|file_format|storage_options|"
    "target_storage_options|max_piece_size|batch_size|rows_per_file"
)
_WORDS = "overwrite|scale|dtype|metric|start|end"
"""Arguments that are words of other sentences, too, unless a value follows."""


def _as_option(found: re.Match[str]) -> str:
    special = {"embeddings_folder": "URL", "meta_columns": "-m"}
    return special.get(found[0]) or "--" + found[0].replace("_", "-")


def _show_warning(message: Warning | str, *_: Any) -> None:
    echo(f"Warning: {_as_options(str(message))}", err=True)


class _LogHandler(logging.Handler):
    """Shows what Python would show of a log that nobody takes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Show a line, unless the program that called this takes the log itself."""
        if not logging.getLogger().handlers:
            echo(_as_options(record.getMessage()), err=True)


class _Commands(click.Group):
    """Leaves a closed pipe to ``main``: click would make exit code 1 of it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise click.exceptions.Exit(_drop_output()) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="dask-embedding-reader")
def command_line() -> None:
    """Look at, check, convert and measure collections of embeddings.

    URL is a folder, a file, a glob (in quotes) or any URL that fsspec knows: s3://, https://, gs://, hdfs:// ...
    Several are one collection, in this order.

    Exit codes: 0 done, 1 the files or the storage are at fault, 2 the command is wrong, 130 interrupted. Set
    DASK_EMBEDDING_READER_TRACEBACK=1 to see where an error comes from.
    """


def _open(urls: tuple[str, ...], **options: Any) -> EmbeddingReader:
    from dask_embedding_reader.cli.opening import open_collection  # noqa: PLC0415 - takes seconds

    return open_collection(urls, **options)


@command_line.command(short_help="Tell what it is, and its problems.")
@URLS
@collection_options
@JSON
def info(urls: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Tell what a collection is: rows, dimension, dtype, sizes, files, row groups, problems."""
    from dask_embedding_reader.cli.facts import collection_facts  # noqa: PLC0415

    facts = collection_facts(_open(urls, **options))
    if as_json:
        print_json(facts)
        return
    from dask_embedding_reader._common.units import counted, human_size  # noqa: PLC0415

    per_file = facts["rows_per_file"]
    groups = facts["row_groups"]
    nothing = "none read" + (", but there are parquet files, too: -m '*' tells" if facts["passes_over"] else "")
    shown = {
        "rows": f"{facts['rows']:,}",
        "dimension": f"{facts['dimension']:,}",
        "dtype": facts["dtype"],
        "size": f"{human_size(facts['nbytes'])}, {counted(facts['row_nbytes'], 'byte')} a row",
        "files": f"{facts['files']:,} {facts['file_format']}, of {shown_rows(per_file)}",
        "folders": shown_folders(facts["folders"]),
        "vectors": facts["embedding_column"],
        "row groups": f"{groups['count']:,}, of {shown_rows(groups)}" if groups else "none",
        "metadata": ", ".join(f"{name} ({dtype})" for name, dtype in facts["metadata"].items()) or nothing,
        "columns": ", ".join(facts["columns"]) or None,
        "problems": "none" if not facts["problems"] else "",
    }
    print_facts(shown)
    for problem in facts["problems"]:
        echo(f"  - {problem}")


@command_line.command(short_help="Print some rows.")
@URLS
@click.option("--rows", "-n", type=click.IntRange(min=1), default=5, show_default=True, help="How many rows.")
@click.option("--start", type=click.IntRange(min=0), default=0, show_default=True, help="The first row.")
@row_options
@collection_options
@JSON
def head(urls: tuple[str, ...], rows: int, start: int, as_json: bool, **options: Any) -> None:
    """Print some rows: number, metadata and vector. Only these are read."""
    from dask_embedding_reader.cli.facts import read_head, shown_vector  # noqa: PLC0415
    from dask_embedding_reader.cli.opening import check_start  # noqa: PLC0415

    reader = _open(urls, **options)
    check_start(reader, start)
    found = read_head(reader, start, rows)
    if as_json:
        print_json(found)
    else:
        print_table([{**row, "embedding": shown_vector(row["embedding"])} for row in found])


@command_line.command(short_help="Tell its pieces and batches, draw them.")
@URLS
@click.option("--max-piece-size", type=click.IntRange(min=1), metavar="ROWS", help="The most rows in a piece.")
@click.option("--batch-size", type=click.IntRange(min=1), metavar="ROWS", help="Also count batches of so many rows.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, writable=True), metavar="FILE", help="Draw it: a PNG, PDF or SVG."
)
@ROW_RANGE
@row_options
@collection_options
@JSON
def plan(
    urls: tuple[str, ...],
    max_piece_size: int | None,
    batch_size: int | None,
    plot: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Tell how a collection is cut into pieces (the chunks of the lazy array) and batches. Reads no vectors."""
    from dask_embedding_reader._common.units import human_size  # noqa: PLC0415
    from dask_embedding_reader.cli.facts import draw_plan, plan_facts  # noqa: PLC0415

    reader = _open(urls, **options)
    facts = plan_facts(reader, max_piece_size, batch_size)
    if plot is not None:
        draw_plan(reader, max_piece_size, batch_size, plot)
    if as_json:
        print_json(facts)
        return
    pieces, batches = facts["pieces"], facts["batches"]
    shown = {
        "files": f"{facts['files']:,}",
        "pieces": f"{pieces['count']:,}, of {shown_rows(pieces)}, up to {human_size(pieces['max_nbytes'])}",
    }
    if facts["row_groups"]:
        shown["row groups"] = (
            f"{facts['row_groups']['count']:,}, of {shown_rows(facts['row_groups'])}; {facts['decoding']}"
        )
    if batches:
        shown["batches"] = (
            f"{batches['count']:,}, of {shown_rows(batches)}, {human_size(batches['max_nbytes'])} as float32"
        )
    print_facts(shown)
    if plot is not None:
        echo(f"drawn in {plot}")


@command_line.command(short_help="Norms, NaNs, zero vectors, duplicates.")
@URLS
@click.option("--start", type=click.IntRange(min=0), default=0, help="The first row.")
@click.option("--end", type=click.IntRange(min=0), default=None, help="The row after the last one.")
@ROW_RANGE
@row_options
@collection_options
@QUIET
@JSON
def stats(urls: tuple[str, ...], start: int, end: int | None, quiet: bool, as_json: bool, **options: Any) -> None:
    """Read all rows once: norms, NaNs, infinities, zero vectors, duplicates. In bounded memory."""
    from dask_embedding_reader.cli.opening import check_start  # noqa: PLC0415
    from dask_embedding_reader.cli.stats import row_statistics  # noqa: PLC0415

    reader = _open(urls, **options)
    check_start(reader, start)
    facts = row_statistics(reader, start, end, show_progress=not quiet)
    if as_json:
        print_json(facts)
        return
    norms, duplicates = facts["norms"], facts["duplicates"]

    def norm(which: str) -> str:
        return "beyond float64" if norms[which] is None else f"{norms[which]:.6g}"

    def rows_of(kind: str) -> str:
        found = facts[kind]
        named = ", ".join(f"{row:,}" for row in found["first_rows"])
        more = ", …" if found["rows"] > len(found["first_rows"]) else ""
        return f"{found['rows']:,}" + (
            f" ({'row' if found['rows'] == 1 else 'rows'} {named}{more})" if found["rows"] else ""
        )

    print_facts(
        {
            "rows": f"{facts['rows']:,}",
            "norms": "none is finite"
            if norms is None
            else f"{norm('min')} to {norm('max')}, mean {norm('mean')}"
            + ("" if norms["std"] is None else f", deviation {norms['std']:.3g}"),
            "NaN": rows_of("nan"),
            "infinite": rows_of("infinite"),
            "zero vectors": rows_of("zero"),
            "duplicates": f"{'' if duplicates['exact'] else 'about '}{duplicates['rows']:,}"
            + ("" if duplicates["exact"] else " (estimated: there are too many rows to remember each)")
            + shown_groups(duplicates["groups"]),
        }
    )


@command_line.command(short_help="Find the rows nearest to a vector.")
@URLS
@click.option(
    "--row", "-r", "rows", type=click.IntRange(min=0), multiple=True, help="A row to search for; may be repeated."
)
@click.option(
    "--queries",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="An .npy file of vectors to search for.",
)
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="How many rows to find.")
@click.option("--metric", type=click.Choice(["cosine", "ip", "l2"]), default="cosine", show_default=True)
@collection_options
@QUIET
@JSON
def nearest(
    urls: tuple[str, ...],
    rows: tuple[int, ...],
    queries: str | None,
    k: int,
    metric: str,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the rows that are nearest to rows of the collection, or to the vectors of a file. Exact: reads all rows."""
    from dask_embedding_reader.cli.facts import shown_vector  # noqa: PLC0415
    from dask_embedding_reader.cli.nearest import find_nearest  # noqa: PLC0415

    found = find_nearest(_open(urls, **options), rows, queries, k, metric, show_progress=not quiet)
    if as_json:
        print_json(found)
        return
    for query in found:
        if len(found) > 1:
            click.echo(f"nearest to {'row' if rows else 'query'} {query['query']:,}")
        hits = [
            hit | {"score": short(hit["score"]), "embedding": shown_vector(hit["embedding"])}
            for hit in query["nearest"]
        ]
        print_table(hits)


@command_line.command(short_help="Write it in another format or dtype.")
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
@click.argument("target", metavar="DST")
@ROW_RANGE
@row_options
@collection_options
@click.option("--to", "target_format", type=FORMATS, metavar="FORMAT", help="Format to write; by default that of SRC.")
@click.option("--rows-per-file", type=click.IntRange(min=1), metavar="ROWS", help="By default about 200 MB a file.")
@click.option("--dtype", metavar="DTYPE", help="dtype to write; by default that of SRC.")
@click.option("--scale", type=float, help="For an integer dtype: what a step of one stands for.")
@click.option("--overwrite", is_flag=True, help="Replace data that DST holds, once the new ones are complete.")
@click.option("--target-storage-options", metavar="JSON", callback=json_mapping, help="Passed to fsspec for DST.")
@QUIET
@JSON
def convert(sources: tuple[str, ...], target: str, quiet: bool, as_json: bool, **options: Any) -> None:
    """Write a collection, or some rows of it, anew: another format, dtype or size of files.

    All metadata columns come along, unless some are named with -m. Started again after an interruption, it goes on
    where it was.
    """
    from dask_embedding_reader.cli.convert import convert_collection  # noqa: PLC0415

    facts = convert_collection(sources, target, show_progress=not quiet, **options)
    if as_json:
        print_json(facts)
        return
    if facts["left_out"]:
        columns = ", ".join(facts["left_out"])
        kind = facts["file_format"]
        echo(f"Not converted, since {kind} files hold no metadata: {columns}. --to parquet_{kind} keeps it.", err=True)
    print_facts(
        {
            "rows": f"{facts['rows']:,}",
            "dtype": facts["dtype"],
            "files": f"{facts['files']:,} {facts['file_format']}",
            "metadata": ", ".join(facts["metadata"]) or "none",
        }
    )


@command_line.command(short_help="Compare what was written with its checksums.")
@click.argument("url")
@STORAGE_OPTIONS
@QUIET
@JSON
def verify(url: str, storage_options: dict[str, Any] | None, quiet: bool, as_json: bool) -> int:
    """Read a collection that `convert` or write_embeddings wrote, and compare it with its checksums.

    Exits with 1 if a file is damaged, missing, or does not belong there.
    """
    from dask_embedding_reader.write.verify import verify_embeddings  # noqa: PLC0415

    table = verify_embeddings(url, storage_options=storage_options, show_progress=not quiet)
    problems = [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
    if as_json:
        print_json(problems)
    elif problems:
        for problem in problems:
            echo(f"{problem['path']}: {problem['problem']}")
    else:
        echo("all files are as they were written")
    return 1 if problems else 0


@command_line.command(short_help="Measure how fast its storage reads.")
@URLS
@click.option("--seconds", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="How long to read.")
@collection_options
@QUIET
@JSON
def bench(urls: tuple[str, ...], seconds: float, quiet: bool, as_json: bool, **options: Any) -> None:
    """Measure how fast this storage really reads, and which parallel_pieces suits it."""
    from dask_embedding_reader._common.units import human_size  # noqa: PLC0415
    from dask_embedding_reader.cli.bench import measure_reading  # noqa: PLC0415

    facts = measure_reading(_open(urls, **options), seconds, show_progress=not quiet)
    if as_json:
        print_json(facts)
        return
    print_table(
        [
            {
                "parallel_pieces": f"{run['parallel_pieces']}",
                "speed": f"{human_size(float(format(run['nbytes_per_second'], '.3g')))}/s",
                "rows/s": f"{run['rows_per_second']:,.0f}",
                "read": human_size(float(format(run["nbytes"], ".3g"))),
                "": "<- suits it" if run["parallel_pieces"] == facts["suits"] else "",
            }
            for run in facts["runs"]
        ]
    )
    if facts["read_again"]:
        echo("The collection was read more than once: memory of the system may have answered.", err=True)


if __name__ == "__main__":
    main()
