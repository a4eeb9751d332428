"""Valid files, made from code: small, and of every kind that the library reads."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

from tests.support.collections import random_rows, random_table, vectors_as

COLUMNS = ("id", "rank", "caption", "kind", "tags", "posted")
"""The metadata columns of each parquet seed."""

ROWS, DIMENSION = 20, 3


def npy_bytes(rows: np.ndarray[Any, Any], version: tuple[int, int] = (1, 0)) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array(sink, rows, version=version)
    return sink.getvalue()


def parquet_bytes(storage: str | None, **options: Any) -> bytes:
    """A parquet file of vectors, stored in one of Arrow's ways, and metadata; or of metadata alone."""
    rng = np.random.default_rng(1)
    table = random_table(rng, ROWS, COLUMNS)
    if storage:
        rows = random_rows(rng, ROWS, DIMENSION, np.float32)
        table = table.append_column("embedding", vectors_as(rows, storage))
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=8, **options)
    return sink.getvalue()


@cache
def npy_seeds() -> list[bytes]:
    rng = np.random.default_rng(0)
    rows = [random_rows(rng, ROWS, DIMENSION, dtype) for dtype in ("<f4", "<f2", "<f8", "i1", "<i8", "<u2")]
    rows += [rows[0].astype(">f4"), np.asfortranarray(rows[0]), np.empty((0, DIMENSION), "<f4")]
    return [npy_bytes(each) for each in rows] + [npy_bytes(rows[0], (2, 0)), npy_bytes(rows[0], (3, 0))]


@cache
def parquet_seeds() -> list[bytes]:
    return [
        parquet_bytes("list"),
        parquet_bytes("fixed_size_list", compression="zstd", write_page_index=True),
        parquet_bytes("large_list", compression="none", use_dictionary=False),
        parquet_bytes("tensor", data_page_version="2.0", compression="gzip"),
        parquet_bytes("list", store_schema=False, write_statistics=False, version="1.0"),
        parquet_bytes("fixed_size_list", write_page_checksum=True, compression="lz4"),
    ]


@cache
def plain_seeds() -> list[bytes]:
    """Parquet files of vectors alone that lie plainly in many small pages."""
    return [
        plain_bytes(storage, dimension, dtype, nullable)
        for storage in ("list", "large_list", "fixed_size_list", "tensor")
        for dimension, dtype in ((1, "<f4"), (3, "<f4"), (5, "<f8"), (4, "<f2"), (12, "<i4"))
        for nullable in (False, True)
    ] + [plain_bytes("fixed_size_list", 3, "<f4", True, write_page_checksum=True)]


@cache
def packed_seeds() -> list[bytes]:
    """The same, compressed, with dictionaries at the beginning, in pages of both versions."""
    dictionaries: list[dict[str, Any]] = [
        {},
        {"use_dictionary": True},
        {"use_dictionary": True, "dictionary_pagesize_limit": 40},
        {"column_encoding": {"embedding.list.element": "BYTE_STREAM_SPLIT"}},
    ]
    return [
        plain_bytes(storage, dimension, dtype, nullable, compression=codec, data_page_version=version, **dictionary)
        for codec in ("none", "snappy", "zstd", "lz4", "gzip", "brotli")
        for version in ("1.0", "2.0")
        for dictionary in dictionaries
        for storage, dimension, dtype, nullable in (("list", 3, "<f4", True), ("fixed_size_list", 5, "<i4", False))
    ]


@cache
def literal_seeds() -> list[bytes]:
    """Pages that snappy left as they are but for the first of their blocks of 64 KB."""
    found = []
    for storage, version in (("list", "1.0"), ("list", "2.0"), ("fixed_size_list", "1.0")):
        rows = np.random.default_rng(1).standard_normal((700, 64)).astype("<f4")
        rows[:20] = 0
        sink = io.BytesIO()
        table = pa.table({"embedding": vectors_as(rows, storage)})
        pq.write_table(table, sink, data_page_version=version, use_dictionary=False, data_page_size=150_000)
        found.append(sink.getvalue())
    return found


def plain_bytes(storage: str, dimension: int, dtype: str, nullable: bool, **options: Any) -> bytes:
    """A parquet file of vectors alone that are neither compressed nor encoded."""
    rows = random_rows(np.random.default_rng(1), ROWS, dimension, dtype)
    vectors = vectors_as(rows, storage)
    if not nullable and storage != "tensor":
        items = vectors.type.value_field.with_nullable(False)
        kind = {"list": pa.list_, "large_list": pa.large_list}.get(storage, lambda field: pa.list_(field, dimension))
        vectors = vectors.cast(kind(items))
    table = pa.Table.from_arrays([vectors], schema=pa.schema([pa.field("embedding", vectors.type, nullable=nullable)]))
    sink = io.BytesIO()
    small = {"row_group_size": 8, "data_page_size": 40, "write_batch_size": 4}
    pq.write_table(table, sink, **{"compression": "none", "use_dictionary": False, **small, **options})
    return sink.getvalue()


def arrow_bytes(storage: str, *, stream: bool = False, codec: Any = None, **columns: Any) -> bytes:
    """An Arrow file, or stream, of vectors and metadata in batches of eight rows."""
    rng = np.random.default_rng(1)
    table = random_table(rng, ROWS, COLUMNS)
    table = table.append_column("embedding", vectors_as(random_rows(rng, ROWS, DIMENSION, np.float32), storage))
    sink = io.BytesIO()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, 8)
    return sink.getvalue()


@cache
def other_seeds() -> dict[str, list[bytes]]:
    """Files of other formats: of each format those of one suffix."""
    rows = random_rows(np.random.default_rng(1), ROWS, DIMENSION, np.float32)
    archives = [io.BytesIO() for _ in range(4)]
    np.savez(archives[0], embedding=rows)
    np.savez_compressed(archives[1], notes=np.arange(3), embedding=rows)
    np.savez(archives[2], embedding=np.asfortranarray(rows))
    # More than is looked at when it is opened.
    np.savez_compressed(archives[3], embedding=random_rows(np.random.default_rng(1), 300, DIMENSION, np.float32))
    bfloat16 = b'{"embedding":{"dtype":"BF16","shape":[20,3],"data_offsets":[0,120]}}'
    prefix = np.array([DIMENSION], "<i4").tobytes()
    return {
        "arrow": [
            arrow_bytes("fixed_size_list"),
            arrow_bytes("list", codec="zstd"),
            arrow_bytes("large_list", stream=True),
            arrow_bytes("tensor", stream=True, codec="lz4"),
        ],
        "fbin": [np.array(rows.shape, "<u4").tobytes() + rows.tobytes()],
        "fvecs": [b"".join(prefix + row.tobytes() for row in rows)],
        "npz": [archive.getvalue() for archive in archives],
        "safetensors": [
            safetensors.numpy.save({"embedding": rows}),
            safetensors.numpy.save({"bias": rows[0], "embedding": rows.astype(np.float16)}, {"a": "b"}),
            len(bfloat16).to_bytes(8, "little") + bfloat16 + rows.tobytes()[:120],
        ],
    }


@cache
def metadata_seeds() -> list[bytes]:
    return [parquet_bytes(None), parquet_bytes(None, compression="none")]
