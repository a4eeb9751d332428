"""What the tests share: collections of any format with their oracle, exact comparison, and bounded waits.

The interface, all that a test file needs:

- ``write_collection(root, "npy", file_rows=[3, 0, 5], ...) -> Collection`` writes random files in one of ``FORMATS``
  and keeps what must come back: ``collection.rows`` (numpy), ``collection.frame(start, stop)`` and
  ``collection.batch_frame(start, stop)`` (pandas), ``collection.file_rows`` and ``collection.files``.
  ``collection.open()`` opens it with the right arguments.
- ``FORMATS``: every way of storing a collection, by name. A new format joins the contract suite and the properties by
  one line here. ``WITH_METADATA`` are the names of those that hold metadata columns.
- ``assert_same_rows`` and ``assert_same_frame`` compare exactly: values, dtypes, names, index.
- ``wait_until``, ``finishes``: bounded waits, so that a hang is a failed test and not a stuck run.
"""

from __future__ import annotations

import datetime as dt
import decimal
import gc
import itertools
import json
import operator
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

Rows = npt.NDArray[Any]
T = TypeVar("T")

# --------------------------------------------------------------------------------------------------------------------
# Rows and metadata columns


def random_rows(rng: np.random.Generator, rows: int, dimension: int, dtype: npt.DTypeLike) -> Rows:
    """Random vectors over the range where a cast to float32 overflows nothing; int64 values do not fit float64."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return rng.standard_normal((rows, dimension)).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, (rows, dimension), dtype=dtype, endpoint=True)


def _some_null(rng: np.random.Generator, values: Sequence[Any]) -> list[Any]:
    """About a third of the values become null, and the very first always does: a test must not depend on luck."""
    return [None if k == 0 or rng.random() < 0.3 else value for k, value in enumerate(values)]


def _ids(rng: np.random.Generator, rows: int) -> pa.Array:
    """int64 beyond what a float64 holds: one trip through float and the odd ones are off by one."""
    return pa.array(2**53 + 1 + 2 * rng.integers(0, 2**40, rows), pa.int64())


def _words(rng: np.random.Generator, rows: int) -> list[str]:
    vocabulary = ["", "cat", "Größe", "日本", "a,b\n", "🐈", "nan", "None", "0"]
    return [f"{vocabulary[int(k)]}{n}" if n % 2 else vocabulary[int(k)] for n, k in enumerate(rng.integers(0, 9, rows))]


def _instants(rng: np.random.Generator, rows: int, unit: str) -> npt.NDArray[Any]:
    return rng.integers(0, 2**31, rows).astype(f"M8[{unit}]")


def _days(rng: np.random.Generator, rows: int) -> list[dt.date]:
    return [dt.date(2001, 1, 1) + dt.timedelta(int(k)) for k in rng.integers(0, 9000, rows)]


#: One maker for every kind of metadata column that the specification treats in a way of its own.
COLUMNS: dict[str, Callable[[np.random.Generator, int], pa.Array]] = {
    "id": _ids,
    "rank": lambda rng, n: pa.array(_some_null(rng, rng.integers(0, 99, n).tolist()), pa.int32()),
    "big": lambda rng, n: pa.array(_some_null(rng, _ids(rng, n).to_pylist()), pa.int64()),
    "small": lambda rng, n: pa.array(rng.integers(0, 256, n), pa.uint8()),
    "score": lambda rng, n: pa.array(np.where(rng.random(n) < 0.2, np.nan, rng.random(n)), pa.float64()),
    "weight": lambda rng, n: pa.array(_some_null(rng, rng.random(n).tolist()), pa.float32()),
    "seen": lambda rng, n: pa.array(rng.random(n) < 0.5, pa.bool_()),
    "liked": lambda rng, n: pa.array(_some_null(rng, (rng.random(n) < 0.5).tolist()), pa.bool_()),
    "caption": lambda rng, n: pa.array(_some_null(rng, _words(rng, n)), pa.string()),
    "text": lambda rng, n: pa.array(_words(rng, n), pa.large_string()),
    "kind": lambda rng, n: pa.array(_some_null(rng, _words(rng, n)), pa.string()).dictionary_encode(),
    "taken": lambda rng, n: pa.array(_instants(rng, n, "ms"), pa.timestamp("ms")),
    "posted": lambda rng, n: pa.array(_some_null(rng, _instants(rng, n, "us").tolist()), pa.timestamp("us", "UTC")),
    "lasted": lambda rng, n: pa.array(rng.integers(0, 2**40, n).astype("m8[ns]"), pa.duration("ns")),
    "day": lambda rng, n: pa.array(_some_null(rng, _days(rng, n)), pa.date32()),
    "price": lambda rng, n: pa.array(
        [decimal.Decimal(int(k)) / 100 for k in rng.integers(0, 999, n)], pa.decimal128(9, 2)
    ),
    "tags": lambda rng, n: pa.array(
        _some_null(rng, [[w] * (k % 3) for k, w in enumerate(_words(rng, n))]), pa.list_(pa.string())
    ),
    "blob": lambda rng, n: pa.array([rng.bytes(k % 4) for k in range(n)], pa.binary()),
}


def random_table(rng: np.random.Generator, rows: int, columns: Sequence[str]) -> pa.Table:
    """Random metadata of so many rows: the named makers of ``COLUMNS``."""
    return pa.table({name: COLUMNS[name](rng, rows) for name in columns})


# --------------------------------------------------------------------------------------------------------------------
# The oracle of the metadata dtypes: written from the specification, sharing no code with the library

_MASKED_ARRAYS: dict[str, Any] = {
    "b": pd.arrays.BooleanArray,
    "i": pd.arrays.IntegerArray,
    "u": pd.arrays.IntegerArray,
}


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def expected_column(column: pa.ChunkedArray, *, nullable: bool | None = None) -> Any:
    """The pandas array that a metadata column must come back as.

    ``nullable`` says whether a null is possible anywhere in the collection; by default, whether ``column`` has one.
    """
    nullable = column.null_count > 0 if nullable is None else nullable
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if isinstance(kind, pa.BaseExtensionType):
        return expected_column(
            pa.chunked_array([c.storage for c in column.chunks], kind.storage_type), nullable=nullable
        )
    if pa.types.is_floating(kind):  # null is NaN
        return np.array(column.to_pylist(), dtype=np.dtype(kind.to_pandas_dtype()))
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        missing = np.array([value is None for value in column.to_pylist()], dtype=bool)
        dtype = np.dtype(kind.to_pandas_dtype())
        data = np.array([0 if value is None else value for value in column.to_pylist()], dtype=dtype)
        return _MASKED_ARRAYS[dtype.kind](data, missing) if nullable else data
    if _is_string(kind):
        return pd.array(column.to_pylist(), dtype=pd.StringDtype("pyarrow"))
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        letter = "M8" if pa.types.is_timestamp(kind) else "m8"
        nat = np.iinfo(np.int64).min
        ticks = [nat if value is None else value for value in column.cast(pa.int64()).to_pylist()]
        moments = np.array(ticks, dtype=np.int64).view(f"{letter}[{kind.unit}]")
        if pa.types.is_timestamp(kind) and kind.tz is not None:
            return pd.DatetimeIndex(moments).tz_localize("UTC").tz_convert(kind.tz).array
        return moments
    return pd.array(column, dtype=pd.ArrowDtype(kind))


def expected_frame(table: pa.Table, *, nullable: Mapping[str, bool] | None = None) -> pd.DataFrame:
    """All metadata as the library must return it: exact dtypes, rows numbered from 0 in an index named ``i``."""
    known = nullable or {}
    columns = {n: pd.Series(expected_column(table[n], nullable=known.get(n))) for n in table.column_names}
    frame = pd.DataFrame(columns, index=pd.RangeIndex(table.num_rows))
    frame.index = pd.Index(np.arange(table.num_rows, dtype=np.int64), name="i")
    return frame


def as_batch(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame as batches have it: text as Python's own strings, and None where it is null."""
    text = [name for name in frame if isinstance(frame[name].dtype, pd.StringDtype)]
    frame = frame.copy(deep=False)
    for name in text:
        values = [None if pd.isna(value) else value for value in frame[name]]
        frame[name] = pd.Series(values, frame.index, dtype=object)
    return frame


# --------------------------------------------------------------------------------------------------------------------
# Writers


@dataclass(frozen=True, slots=True)
class Part:
    """One file (or pair of files) to be written."""

    #: Its place in the collection; names are made of it.
    number: int
    #: The vectors.
    rows: Rows
    #: The metadata, with as many rows; no columns where the format holds none.
    table: pa.Table
    #: Rows of one parquet row group, None for a single group.
    row_group_rows: int | None = None
    #: How pyarrow writes parquet: pages, compression.
    parquet_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """File name without suffix, in an order that sorting keeps."""
        return f"{self.number:04d}"


def write_npy(
    path: Path, rows: Rows, *, order: str = "C", version: tuple[int, int] = (1, 0), byteorder: str = "=", pad: int = 0
) -> None:
    """An npy file. ``pad`` adds that many blanks to the header, as writers that keep room for appending do."""
    rows = rows.astype(rows.dtype.newbyteorder(byteorder))  # type: ignore[arg-type]
    rows = np.asfortranarray(rows) if order == "F" else np.ascontiguousarray(rows)
    header = {
        "descr": np.lib.format.dtype_to_descr(rows.dtype),
        "fortran_order": order == "F",
        "shape": rows.shape,
    }
    text = repr(header).encode() + b" " * pad
    prefix = 6 + 2 + (2 if version == (1, 0) else 4)
    text += b" " * (-(prefix + len(text) + 1) % 64) + b"\n"
    with path.open("wb") as f:
        f.write(b"\x93NUMPY" + bytes(version))
        f.write(struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text)
        f.write(rows.tobytes(order="F" if order == "F" else "C"))


def vectors_as(rows: Rows, storage: str) -> pa.Array:
    """The vectors as an Arrow column: list, large_list, fixed_size_list, tensor or binary."""
    count, dimension = rows.shape
    values = pa.array(np.ascontiguousarray(rows).reshape(-1))
    if storage == "binary":
        width = dimension * rows.dtype.itemsize
        return pa.array([row.tobytes() for row in np.ascontiguousarray(rows)], pa.binary(width))
    if storage == "list":
        return pa.ListArray.from_arrays(pa.array(np.arange(count + 1) * dimension, pa.int32()), values)
    if storage == "large_list":
        return pa.LargeListArray.from_arrays(pa.array(np.arange(count + 1) * dimension, pa.int64()), values)
    fixed = pa.FixedSizeListArray.from_arrays(values, dimension)
    if storage == "fixed_size_list":
        return fixed
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(values.type, [dimension]), fixed)


def write_parquet(path: Path, table: pa.Table, row_group_rows: int | None = None, **options: Any) -> None:
    """A parquet file; ``options`` go to pyarrow."""
    pq.write_table(table, path, row_group_size=row_group_rows or max(table.num_rows, 1), **options)


def _with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    """The table and one column more; a table of no columns has no length that could contradict."""
    return table.append_column(name, column) if table.column_names else pa.table({name: column})


def _npy_part(root: Path, part: Part, **how: Any) -> Path:
    path = root / "embeddings" / f"{part.name}.npy"
    write_npy(path, part.rows, **how)
    return path


#: Every way of writing an npy file that a collection of one dtype may mix.
_NPY_WAYS: list[dict[str, Any]] = [
    {},
    {"order": "F"},
    {"byteorder": ">", "version": (2, 0)},
    {"pad": 1000, "byteorder": "<"},
    {"order": "F", "byteorder": ">", "version": (3, 0)},
]


def _npy_mixed(root: Path, part: Part) -> Path:
    return _npy_part(root, part, **_NPY_WAYS[part.number % len(_NPY_WAYS)])


def _parquet_part(root: Path, part: Part, *, storage: str) -> Path:
    path = root / "embeddings" / f"{part.name}.parquet"
    # The vectors are not the first column: position must not matter.
    table = _with_column(part.table, "embedding", vectors_as(part.rows, storage))
    write_parquet(path, table, part.row_group_rows, **part.parquet_options)
    return path


def _pair_part(root: Path, part: Part, *, metadata: str = "metadata", names: tuple[str, str] = ("", "")) -> Path:
    path = _npy_part(root, part)
    if names != ("", ""):
        path = path.rename(path.with_name(f"{names[0]}{part.number:04d}.npy"))
    # A table of no columns would lose its rows in the file, so there is always one more column than is asked for.
    table = _with_column(part.table, "_row", pa.array(np.arange(len(part.rows)), pa.int64()))
    name = f"{names[1]}{part.number}" if names != ("", "") else part.name
    write_parquet(root / metadata / f"{name}.parquet", table, part.row_group_rows, **part.parquet_options)
    return path


def _fbin_part(root: Path, part: Part) -> Path:
    suffix = {"<f4": "fbin", "<f2": "f16bin", "|u1": "u8bin", "|i1": "i8bin", "<i4": "ibin"}[part.rows.dtype.str]
    path = root / "embeddings" / f"{part.name}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.array(part.rows.shape, "<u4").tobytes() + part.rows.tobytes())
    return path


def _fvecs_part(root: Path, part: Part) -> Path:
    suffix = {"<f4": "fvecs", "|u1": "bvecs", "<i4": "ivecs"}[part.rows.dtype.str]
    path = root / "embeddings" / f"{part.name}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = np.array([part.rows.shape[1]], "<i4").tobytes()
    path.write_bytes(b"".join(prefix + row.tobytes() for row in part.rows))
    return path


def _npz_part(root: Path, part: Part, *, save: Callable[..., None] = np.savez, order: Any = "C") -> Path:
    path = root / "embeddings" / f"{part.name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, notes=np.arange(3), embedding=np.asarray(part.rows, order=order))
    return path


def _safetensors_part(root: Path, part: Part) -> Path:
    path = root / "embeddings" / f"{part.name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"f": "F", "i": "I", "u": "U"}
    dtype = f"{kinds[part.rows.dtype.kind]}{part.rows.dtype.itemsize * 8}"
    header = json.dumps(
        {
            "__metadata__": {"made by": "hand"},
            "bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "embedding": {"dtype": dtype, "shape": part.rows.shape, "data_offsets": [8, 8 + part.rows.nbytes]},
        }
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8) + part.rows.tobytes())
    return path


def _arrow_part(
    root: Path, part: Part, *, storage: str = "fixed_size_list", stream: bool = False, codec: Any = None
) -> Path:
    path = root / "embeddings" / f"{part.name}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = _with_column(part.table, "embedding", vectors_as(part.rows, storage))
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, part.row_group_rows)
    return path


def as_table(path: Path) -> pa.Table:
    """The content of a parquet or Arrow file, by pyarrow."""
    if path.suffix == ".parquet":
        return pq.read_table(path)
    is_file = path.read_bytes()[:6] == b"ARROW1"
    return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(path).read_all()


def as_others_read(path: Path) -> Rows:
    """The vectors of a file of any format but parquet, by the library that made it up, or as that reads them."""
    if path.suffix == ".arrow":
        vectors = as_table(path)["embedding"].combine_chunks()
        vectors = vectors.storage if isinstance(vectors, pa.ExtensionArray) else vectors
        return np.asarray(vectors.flatten().to_numpy(zero_copy_only=False)).reshape(
            len(vectors), -1 if len(vectors) else 0
        )
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return np.asarray(archive["embedding"])
    if path.suffix == ".safetensors":
        return np.asarray(safetensors.numpy.load_file(path)["embedding"])
    data = path.read_bytes()
    dtypes = {"fbin": "f4", "f16bin": "f2", "u8bin": "u1", "i8bin": "i1", "ibin": "i4"}
    if path.suffix[1:] in dtypes:
        rows, dimension = struct.unpack("<II", data[:8])
        return np.frombuffer(data[8:], dtypes[path.suffix[1:]]).reshape(rows, dimension)
    if not data:
        return np.empty((0, 0))
    # As faiss.contrib.vecs_io reads them.
    if path.suffix == ".bvecs":
        return np.frombuffer(data, np.uint8).reshape(-1, 4 + data[0])[:, 4:]
    whole = np.frombuffer(data, np.int32)
    items = whole.reshape(-1, whole[0] + 1)[:, 1:]
    return items if path.suffix == ".ivecs" else np.ascontiguousarray(items).view(np.float32)


def _beside(write: Callable[[Path, Part], Path], root: Path, part: Part) -> Path:
    """A part in a format without metadata, and its metadata in a parquet file beside it."""
    write_parquet(
        root / "metadata" / f"{part.name}.parquet",
        _with_column(part.table, "_row", pa.array(np.arange(len(part.rows)), pa.int64())),
        part.row_group_rows,
        **part.parquet_options,
    )
    return write(root, part)


_FLOATS = ("float16", "float32", "float64")
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@dataclass(frozen=True, slots=True)
class Format:
    """One way of storing a collection."""

    #: What EmbeddingReader calls it.
    file_format: str
    #: Writes one part under ``root/embeddings`` (and ``root/metadata``) and returns the path of its vectors.
    write: Callable[[Path, Part], Path]
    #: Whether it holds metadata columns.
    metadata: bool = True
    #: Folder of the metadata files, under the root, where they are separate.
    metadata_folder: str | None = None
    #: The dtypes it can store.
    dtypes: tuple[str, ...] = _FLOATS + _INTEGERS
    #: Whether the reader must be told the dtype.
    declare_dtype: bool = False


#: Every way of storing a collection. The contract suite and the properties run over all of them.
FORMATS: dict[str, Format] = {
    "npy": Format("npy", _npy_part, metadata=False),
    "npy-fortran": Format("npy", partial(_npy_part, order="F"), metadata=False),
    "npy-big-endian": Format("npy", partial(_npy_part, byteorder=">"), metadata=False),
    "npy-header-2": Format("npy", partial(_npy_part, version=(2, 0)), metadata=False),
    "npy-header-3": Format("npy", partial(_npy_part, version=(3, 0)), metadata=False),
    "npy-long-header": Format("npy", partial(_npy_part, pad=1000), metadata=False),
    "npy-mixed": Format("npy", _npy_mixed, metadata=False),
    "fbin": Format("fbin", _fbin_part, metadata=False, dtypes=("float32", "float16", "uint8", "int8", "int32")),
    "parquet_fbin": Format(
        "parquet_fbin",
        partial(_beside, _fbin_part),
        metadata_folder="metadata",
        dtypes=("float32", "float16", "uint8", "int8", "int32"),
    ),
    "fvecs": Format("fvecs", _fvecs_part, metadata=False, dtypes=("float32", "uint8", "int32")),
    "npz": Format("npz", _npz_part, metadata=False),
    "npz-fortran": Format("npz", partial(_npz_part, order="F"), metadata=False),
    "npz-deflated": Format("npz", partial(_npz_part, save=np.savez_compressed), metadata=False),
    "parquet_npz": Format("parquet_npz", partial(_beside, _npz_part), metadata_folder="metadata"),
    "safetensors": Format("safetensors", _safetensors_part, metadata=False),
    "arrow": Format("arrow", _arrow_part),
    "arrow-stream-of-lists": Format("arrow", partial(_arrow_part, storage="list", stream=True)),
    "arrow-zstd": Format("arrow", partial(_arrow_part, storage="tensor", codec="zstd")),
    "parquet-list": Format("parquet", partial(_parquet_part, storage="list")),
    "parquet-large-list": Format("parquet", partial(_parquet_part, storage="large_list")),
    "parquet-fixed-size-list": Format("parquet", partial(_parquet_part, storage="fixed_size_list")),
    "parquet-tensor": Format("parquet", partial(_parquet_part, storage="tensor")),
    "parquet-binary": Format("parquet", partial(_parquet_part, storage="binary"), declare_dtype=True),
    "parquet_npy": Format("parquet_npy", _pair_part, metadata_folder="metadata"),
    "parquet_npy-one-folder": Format("parquet_npy", partial(_pair_part, metadata="embeddings")),
    "parquet_npy-numbered": Format(
        "parquet_npy", partial(_pair_part, names=("img_emb_", "metadata_")), metadata_folder="metadata"
    ),
}

WITH_METADATA: list[str] = [name for name, kind in FORMATS.items() if kind.metadata]


# --------------------------------------------------------------------------------------------------------------------
# Collections


@dataclass(frozen=True, eq=False)
class Collection:
    """Files on disk and what must come back from them."""

    #: The key of ``FORMATS``.
    format_name: str
    #: The folder of the embeddings.
    folder: Path
    #: The folder of the metadata, where it is another one.
    metadata_folder: Path | None
    #: Files in order, the empty ones too.
    files: tuple[Path, ...]
    #: Rows of each of ``files``.
    file_rows: tuple[int, ...]
    #: All vectors, stored dtype in native byte order.
    rows: Rows
    #: All metadata as Arrow; without columns where there are none.
    table: pa.Table
    #: Keyword arguments that open it, the folder apart.
    options: Mapping[str, Any]
    #: All metadata as pandas: see ``frame``.
    metadata: pd.DataFrame = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of the metadata columns."""
        return list(self.table.column_names)

    @property
    def boundaries(self) -> list[int]:
        """Row numbers where files with rows begin, and the end."""
        return sorted({0, *np.cumsum(self.file_rows).tolist()})

    def frame(self, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Metadata of the rows, index ``i``: what ``to_dask_dataframe(start, stop).compute()`` must be."""
        return self.metadata.iloc[start:stop]

    def batch_frame(self, start: int, stop: int, *, of_frame: bool = False) -> pd.DataFrame:
        """Metadata of a batch of these rows: ``i`` is the last column, the index counts from 0, text is Python's."""
        frame = self.frame(start, stop)
        frame = frame.assign(i=frame.index.to_numpy()).reset_index(drop=True)
        return frame if of_frame else as_batch(frame)

    def locate(self, row: int) -> tuple[str, int]:
        """Path of the file that holds the row, and the row's place in it."""
        ends = np.cumsum(self.file_rows)
        k = int(np.searchsorted(ends, row, side="right"))
        return str(self.files[k]), row - int(ends[k] - self.file_rows[k])

    def open(self, **changes: Any) -> Any:
        """An EmbeddingReader of this collection; ``changes`` replace arguments."""
        from dask_embedding_reader import EmbeddingReader

        return EmbeddingReader(**{"embeddings_folder": str(self.folder), **self.options, **changes})


def write_collection(
    root: Path,
    format_name: str = "npy",
    *,
    file_rows: Sequence[int] = (7, 0, 12, 1, 20),
    dimension: int = 4,
    dtype: npt.DTypeLike = np.float32,
    columns: Sequence[str] | None = None,
    tables: Sequence[pa.Table] | None = None,
    row_group_rows: int | None = None,
    parquet_options: Mapping[str, Any] | None = None,
    vectors: Callable[[np.random.Generator, int, int, npt.DTypeLike], Rows] = random_rows,
    seed: int = 0,
) -> Collection:
    """Write a random collection under ``root`` and return it with its oracle.

    ``columns`` names makers of ``COLUMNS`` (all of them by default, none where the format holds no metadata);
    ``tables`` gives the metadata of each file instead. ``vectors`` makes the vectors of a file; ``parquet_options`` go
    to pyarrow.
    """
    kind = FORMATS[format_name]
    rng = np.random.default_rng(seed)
    names = list(COLUMNS if columns is None else columns) if kind.metadata else []
    for folder in ("embeddings", kind.metadata_folder or "embeddings"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    parts = [
        Part(
            number,
            vectors(rng, count, dimension, dtype),
            random_table(rng, count, names) if tables is None else tables[number],
            row_group_rows,
            parquet_options or {},
        )
        for number, count in enumerate(file_rows)
    ]
    files = tuple(kind.write(root, part) for part in parts)
    if kind.metadata and (names or tables is not None):
        table = pa.concat_tables([part.table for part in parts], promote_options="permissive")
    else:
        table = pa.table({})
    options: dict[str, Any] = {"file_format": kind.file_format}
    if table.column_names:
        options["meta_columns"] = list(table.column_names)
    if kind.metadata_folder is not None:
        options["metadata_folder"] = str(root / kind.metadata_folder)
    if kind.declare_dtype:
        options["embedding_dtype"] = np.dtype(dtype).name
    if table.column_names:
        metadata = expected_frame(table)
    else:
        metadata = pd.DataFrame(index=pd.Index(np.arange(sum(file_rows), dtype=np.int64), name="i"))
    return Collection(
        format_name=format_name,
        folder=root / "embeddings",
        metadata_folder=None if kind.metadata_folder is None else root / kind.metadata_folder,
        files=files,
        file_rows=tuple(file_rows),
        rows=np.concatenate([part.rows for part in parts]),
        table=table,
        options=options,
        metadata=metadata,
    )


# --------------------------------------------------------------------------------------------------------------------
# Exact comparison


def assert_same_rows(actual: Any, expected: Rows) -> None:
    """Same dtype, shape and values; NaN equals NaN."""
    assert isinstance(actual, np.ndarray)
    assert actual.dtype == expected.dtype
    assert actual.dtype.isnative
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)


def assert_same_frame(actual: Any, expected: pd.DataFrame) -> None:
    """Same columns in the same order, dtypes, index and values, nulls in the same places."""
    assert isinstance(actual, pd.DataFrame)
    assert list(actual.columns) == list(expected.columns)
    assert actual.dtypes.to_dict() == expected.dtypes.to_dict()
    assert actual.index.name == expected.index.name
    assert actual.index.dtype == expected.index.dtype
    np.testing.assert_array_equal(actual.index.to_numpy(), expected.index.to_numpy())
    for name in expected.columns:
        got, want = actual[name].array, expected[name].array
        nulls = want.isna().tolist()
        assert got.isna().tolist() == nulls, name
        # Python objects: neither rounding nor a common dtype can make different values equal.
        assert _python_values(got, nulls) == _python_values(want, nulls), name


def _python_values(column: Any, nulls: list[bool]) -> list[Any]:
    if isinstance(column.dtype, pd.DatetimeTZDtype):
        column = column.tz_convert("UTC")  # pandas 2 crashes at times of some zones that are far away
    known = itertools.compress(column.tolist(), map(operator.not_, nulls))
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in known]


def assert_batches(
    batches: Iterator[Any],
    collection: Collection,
    batch_size: int,
    start: int = 0,
    end: int | None = None,
    dtype: npt.DTypeLike | None = np.float32,
    *,
    of_frame: bool = False,
) -> None:
    """The batches of ``reader(batch_size, start, end, dtype=dtype)``, each checked to the last bit, none missing.

    Those of ``iter_batches`` are those ``of_frame``: their text is that of the lazy frame.
    """
    dtype = collection.rows.dtype if dtype is None else np.dtype(dtype)
    end = len(collection) if end is None else min(end, len(collection))
    place = min(start, end)
    for embeddings, metadata in batches:
        stop = min(place + batch_size, end)
        assert place < stop, "a batch beyond the range"
        assert_same_rows(embeddings, collection.rows[place:stop].astype(dtype))
        assert embeddings.flags.writeable
        assert embeddings.flags.c_contiguous
        assert_same_frame(metadata, collection.batch_frame(place, stop, of_frame=of_frame))
        assert isinstance(metadata.index, pd.RangeIndex)
        place = stop
    assert place == end, "rows missing at the end"


# --------------------------------------------------------------------------------------------------------------------
# Bounded waits


def python_calls(work: Callable[[], object]) -> list[str]:
    """Run something in C; return the names of the functions written in Python that it calls in this thread."""
    called: list[str] = []
    sys.setprofile(lambda frame, what, _: called.append(frame.f_code.co_name) if what == "call" else None)
    try:
        work()
    finally:
        sys.setprofile(None)
    return called


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait until the condition holds, at most so long; whether it did."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        gc.collect()
        time.sleep(0.01)
    return True


def finishes(work: Callable[[], T], seconds: float = 60.0) -> T:
    """Run the work in a thread of its own and return its result; a hang fails the test instead of stopping the run."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the test below
            errors.append(error)

    thread = threading.Thread(target=run, name="test-work", daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still running after {seconds:.0f} s: this is a hang"
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def skipping_what_pyarrow_lacks() -> Iterator[None]:
    """Skip a test whose file the older ones of the supported versions of pyarrow cannot write."""
    try:
        yield
    except pa.ArrowNotImplementedError as error:
        pytest.skip(f"this pyarrow cannot write it: {error}")


def open_descriptors() -> dict[str, str]:
    """Open file descriptors of this process and what they lead to (Linux)."""
    found: dict[str, str] = {}
    for name in os.listdir("/proc/self/fd"):
        # The one that listed the directory is closed again.
        with suppress(OSError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found
