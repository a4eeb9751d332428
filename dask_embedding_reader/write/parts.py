"""One part of a collection that is written: a file, or a pair of files, and the record that it is complete."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dask_embedding_reader._common.notices import warn
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.errors import MismatchError
from dask_embedding_reader.formats.base import Array
from dask_embedding_reader.formats.parquet.encode import write_parquet
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.parquet.tables import described
from dask_embedding_reader.formats.registry import format_names, get_format
from dask_embedding_reader.formats.vectors import Casting, Vectors, check_casting
from dask_embedding_reader.storage.store import Buffer, Content, Write
from dask_embedding_reader.write.notes import (
    DamagedNoteError,
    files_of_part,
    id_of,
    integer,
    load,
    number,
    refuse,
    text,
)


class Settings(NamedTuple):
    """All that decides what is written. Equal settings and equal data give equal bytes."""

    token: str | None
    """Stands for the data; None where only the rows themselves can tell."""
    file_format: str
    """How they are laid out."""
    embedding_column: str
    """parquet: the column of vectors."""
    rows: int | None
    """Rows of the collection; None where that is not known before its end."""
    rows_per_file: int
    """Rows of each file but the last."""
    dimension: int
    """Items in a vector."""
    dtype: str
    """What is stored."""
    scale: float | None
    """For integers made of floating-point vectors: what a step of one stands for."""

    @property
    def row_nbytes(self) -> int:
        """Stored bytes of a vector."""
        return self.dimension * np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int | None:
        """Stored bytes of all vectors, where their number is known."""
        return None if self.rows is None else self.rows * self.row_nbytes


class Record(NamedTuple):
    """That a part is complete, and what is in it."""

    rows: int
    """Its rows."""
    not_finite: int
    """How many NaN and infinite values were cast to a narrower dtype, and kept."""
    files: dict[str, tuple[int, str]]
    """The size and the SHA-256 of each of its files, by name."""
    columns: str
    """Its metadata columns, as :func:`described` tells them, in base64."""

    def to_json(self, job: str) -> bytes:
        """Write it out, as a part of what a job writes."""
        return json.dumps({**self._asdict(), "job": job}).encode()

    @staticmethod
    def from_json(data: bytes, names: list[str], job: str) -> Record:
        """Read what :meth:`to_json` wrote of a part that has these files.

        Raises
        ------
        DamagedNoteError
            If it is something else, or of another job.
        """
        note = load(data)
        if id_of(note, "job") != job:
            raise DamagedNoteError("it is of another job")
        files = files_of_part(note, names)
        record = Record(integer(note, "rows", 1), integer(note, "not_finite"), files, text(note, "columns"))
        try:
            record.schema  # noqa: B018 - whether there is one
        except (ValueError, pa.ArrowException, OSError) as error:
            raise DamagedNoteError("its columns cannot be read") from error
        return record

    @property
    def schema(self) -> pa.Schema:
        """Its metadata columns."""
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.columns)))


class Part(NamedTuple):
    """The rows of one part, before they are encoded."""

    number: int
    """Its place in the collection; its files are named by it."""
    first_row: int
    """Its first row in the collection."""
    array: Array
    """The vectors."""
    table: pa.Table | None
    """Their metadata, where there is any."""


def read_settings(note: Mapping[str, Any]) -> Settings:
    """Return settings that were noted.

    Raises
    ------
    DamagedNoteError
        If they are others than writers have.
    """
    if set(note) != set(Settings._fields):
        refuse("settings", sorted(note), f"a note of {', '.join(Settings._fields)}")
    settings = Settings(
        None if note["token"] is None else text(note, "token"),
        text(note, "file_format"),
        text(note, "embedding_column"),
        None if note["rows"] is None else integer(note, "rows", 1),
        integer(note, "rows_per_file", 1),
        integer(note, "dimension", 1),
        text(note, "dtype"),
        None if note["scale"] is None else number(note, "scale"),
    )
    if settings.file_format not in format_names():
        refuse("file_format", settings.file_format, f"one of {', '.join(format_names())}")
    try:
        is_number = len(settings.dtype) < 10 and np.dtype(settings.dtype).kind in "biufc"
    except (TypeError, ValueError, SyntaxError):
        is_number = False
    if not is_number or get_format(settings.file_format).vectors.suffix_for(np.dtype(settings.dtype)) is None:
        refuse("dtype", settings.dtype, "a dtype of numbers that such files can hold")
    return settings


def part_names(settings: Settings, number: int) -> list[str]:
    """Return the names of the files of a part, in the order in which they are written: vectors last."""
    layout = get_format(settings.file_format)
    suffix = layout.vectors.suffix_for(np.dtype(settings.dtype))
    assert suffix is not None, "what no file can hold is refused before"
    suffixes = (*PARQUET.suffixes, suffix) if layout.metadata == "beside" else (suffix,)
    return [f"{number:08d}{suffix}" for suffix in suffixes]


def encode_part(settings: Settings, part: Part) -> tuple[Record, dict[str, Content]]:
    """Return the record of a part, which does not know its files yet, and the content of these by name.

    Raises
    ------
    CastError
        If the dtype cannot hold the vectors.
    MismatchError
        If there are not as many rows of metadata as of vectors.
    """
    last_row = part.first_row + len(part.array)
    rows = len(part.array) if part.table is None else part.table.num_rows
    if rows != len(part.array) or part.array.shape[1:] != (settings.dimension,):
        raise MismatchError(
            f"rows {part.first_row:,} to {last_row:,}: {counted(rows, 'row')} of metadata for an array of shape "
            f"{part.array.shape}, where {counted(len(part.array), 'vector')} of "
            f"{counted(settings.dimension, 'item')} were expected"
        )
    vectors = Vectors(part.array, Casting(np.dtype(settings.dtype), settings.scale))
    not_finite = check_casting(vectors, part.first_row)
    layout = get_format(settings.file_format)
    contents: list[Content] = [
        partial(layout.vectors.write, vectors=vectors, table=part.table, embedding_column=settings.embedding_column)
    ]
    if layout.metadata == "beside":
        contents.insert(0, partial(write_parquet, table=part.table))
    columns = base64.b64encode(described(part.table).serialize()).decode()
    record = Record(rows, not_finite, {}, columns)
    return record, dict(zip(part_names(settings, part.number), contents, strict=True))


def _drop(_: Buffer) -> None:
    """Write nothing."""


def measure(content: Content, write: Write = _drop) -> tuple[int, str]:
    """Return the size and the SHA-256 of the content of a file, while it is written somewhere."""
    digest, nbytes = hashlib.sha256(), 0

    def take(buffer: Buffer) -> None:
        nonlocal nbytes
        digest.update(buffer)
        nbytes += len(buffer)
        write(buffer)

    content(take)
    return nbytes, digest.hexdigest()


def warn_of_not_finite(records: Mapping[int, Record]) -> None:
    """Report values that a cast could only keep as what they were."""
    if count := sum(record.not_finite for record in records.values()):
        parts = [number for number, record in sorted(records.items()) if record.not_finite]
        warn(
            f"{count:,} of the values that were cast to a narrower dtype are NaN or infinite, and were kept as such "
            f"(in {counted(len(parts), 'file')}, the first is number {parts[0]})",
        )
