"""Vectors and metadata as parquet that reads fast.

The same rows always give the same bytes, so that a file can be told by its checksum.
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dask_embedding_reader.errors import ColumnError
from dask_embedding_reader.formats.base import FileHeader, default_piece_rows
from dask_embedding_reader.formats.parquet.tables import is_masked
from dask_embedding_reader.formats.parquet.write import empty_file, write_plain_parquet
from dask_embedding_reader.formats.vectors import Vectors
from dask_embedding_reader.storage.put import WritableFile
from dask_embedding_reader.storage.retries import describe
from dask_embedding_reader.storage.store import StoredFile, Write

_GROUP_NBYTES = 50_000_000
"""The size of a row group of vectors: what readers decode at once, enough of them to decode several at a time."""

_METADATA_GROUP_ROWS = 100_000
"""Rows of a row group of a file of metadata alone."""


def group_rows(rows: int, row_nbytes: int | None) -> tuple[int, ...]:
    """Return the rows of each row group of a parquet file; of one of metadata alone where no vector has any bytes."""
    most = _METADATA_GROUP_ROWS if row_nbytes is None else default_piece_rows(row_nbytes, _GROUP_NBYTES)
    return tuple(min(most, rows - start) for start in range(0, rows, most))


def metadata_header(file: StoredFile, rows: int) -> FileHeader:
    """Return what the header of a file of metadata alone says, but for its columns."""
    return FileHeader(file, rows, 0, np.dtype(np.float32), group_rows=group_rows(rows, None))


def write_parquet(
    write: Write, table: pa.Table | None, vectors: Vectors | None = None, embedding_column: str = ""
) -> None:
    """Write the content of a parquet file, a page at a time: vectors, if there are any, and a row of metadata for each.

    Vectors are neither compressed nor in a dictionary, nor is any of them null: there is nothing to decode then, and
    pyarrow takes less than half the time too. Row groups are what readers decode as a whole, and hold about 50 MB.

    Raises
    ------
    ColumnError
        If parquet cannot hold what is in the metadata.
    """
    if vectors is None:
        assert table is not None
        _write_table(write, table, group_rows(table.num_rows, None)[0])
        return
    in_group = group_rows(len(vectors.array), vectors.dimension * vectors.dtype.itemsize)[0]
    fields, metadata = [_vector_field(vectors, embedding_column)], None
    if table is not None:
        fields += [field.remove_metadata() for field in table.schema]
        sink = io.BytesIO()
        _write_table(sink.write, table, in_group)
        metadata = sink.getvalue()
    write_plain_parquet(write, vectors, pa.schema(fields), metadata, in_group)


def _write_table(write: Write, table: pa.Table, in_group: int) -> None:
    names = _leaves(table.schema)
    # A masked pandas column without a null would come back as a numpy one: without statistics nothing proves it.
    known = [path for path, name in names.items() if not is_masked(table.schema.field(name))]
    try:
        pq.write_table(
            table.replace_schema_metadata(None),
            WritableFile(write),
            row_group_size=in_group,
            compression="zstd",
            use_dictionary=True,
            write_statistics=known or False,
            write_page_index=True,
        )
    except pa.ArrowException as error:
        raise ColumnError(
            f"the metadata columns {table.schema.names} cannot be stored: {describe(error)}; convert them"
        ) from error


def _vector_field(vectors: Vectors, name: str) -> pa.Field:
    element = pa.field("element", pa.from_numpy_dtype(vectors.dtype), nullable=False)
    return pa.field(name, pa.list_(element, vectors.dimension), nullable=False)


def _leaves(schema: pa.Schema) -> dict[str, str]:
    """Return the path of each leaf in the file and the name of its column; pyarrow takes options by these paths."""
    leaves = pq.ParquetFile(pa.BufferReader(empty_file(schema))).schema
    names = sorted(schema.names, key=len, reverse=True)  # `a.b` before `a`
    paths = [leaves.column(position).path for position in range(len(leaves))]
    return {path: next(name for name in names if f"{path}.".startswith(f"{name}.")) for path in paths}
