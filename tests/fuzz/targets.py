"""What is fed: each target makes an input, reads it, and compares what came with numpy or pyarrow.

``read(data)`` returns whether anything was read; a refusal is an exception of the library, everything else is a fault.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import dask
import dask.array as da
import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader import EmbeddingReader, iter_batches, write_embeddings
from dask_embedding_reader.collection.saved import decode_manifest
from dask_embedding_reader.errors import MismatchError
from dask_embedding_reader.formats import ipc_columns
from dask_embedding_reader.formats.base import Columns, FileFormat, FileHeader
from dask_embedding_reader.formats.columns import iter_columns
from dask_embedding_reader.formats.metadata import make_frame, merge_columns
from dask_embedding_reader.formats.npy import NPY
from dask_embedding_reader.formats.parquet import decode as parquet
from dask_embedding_reader.formats.parquet.format import PARQUET
from dask_embedding_reader.formats.registry import get_file_format
from dask_embedding_reader.formats.vector_columns import lengths_of
from dask_embedding_reader.storage.fsspec import FsspecStore
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.fuzz import mutate, seeds
from tests.fuzz.guard import Fault
from tests.support.collections import as_others_read, as_table

META = Columns(meta=seeds.COLUMNS)
MOST_NBYTES = 2**22
"""Arrays up to this size are read; a header may rightly claim more where the size of the file is not known."""


class Target(NamedTuple):
    """One way in."""

    make: Callable[[Random], bytes]
    """Makes an input."""
    read: Callable[[bytes], bool]
    """Reads it."""
    weight: int
    """Of a hundred inputs how many go here."""


class OneFile(AbstractFileSystem):  # type: ignore[misc]
    """A storage of files in memory, without anything between them and the library."""

    protocol = "onefile"
    cachable = False

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__()
        self.files = files

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.files[path]), "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        return self.files[path][start:end]


@contextmanager
def in_one_file(name: str, data: bytes) -> Iterator[StoredFile]:
    """Put an input into memory."""
    # Each input is another file: what is kept of one shall not answer for the next.
    yield StoredFile(FsspecStore(OneFile({name: data})), name, Version(len(data)))


@contextmanager
def on_disk(name: str, data: bytes) -> Iterator[StoredFile]:
    """Put an input into a local file."""
    with in_folder({name: data}) as root:
        path = f"{root}/{name}"
        version = Version(len(data), "mtime", str(os.stat(path).st_mtime_ns))
        yield StoredFile(LocalStore(LocalFileSystem()), path, version)


Put = Callable[[str, bytes], AbstractContextManager[StoredFile]]
"""Where an input is put."""


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_rows(kind: FileFormat, header: FileHeader, columns: Columns, part: slice) -> np.ndarray[Any, Any]:
    out = np.empty((part.stop - part.start, header.dimension), header.dtype.newbyteorder("="))
    if len(out):
        kind.open_rows(header, columns, part.start, part.stop)([out])
    return out


def read_npy(data: bytes, put: Put = in_one_file) -> bool:
    with put("0.npy", data) as file:
        header = NPY.read_header(file, Columns())
        if not header.rows:
            return False
        part = some_rows(data, header.rows)
        rows = read_rows(NPY, header, Columns(), part)
    expected = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False, max_header_size=2**20)
    same(header.rows, len(expected), "number of rows")
    same(rows.shape, expected[part].shape, "shape")
    same(rows.tobytes(), expected[part].astype(expected.dtype.newbyteorder("=")).tobytes(), "rows")
    return True


def some_rows(data: bytes, count: int) -> slice:
    """Nearly always all rows; chosen by the input itself, so that it does the same again."""
    chance = Random(zlib.crc32(data))
    if chance.random() < 0.8:
        return slice(0, count)
    start = chance.randrange(count)
    return slice(start, chance.randint(start + 1, count))


def read_parquet(
    data: bytes,
    embedding: str | None = "embedding",
    put: Put = in_one_file,
    names: Sequence[str] = seeds.COLUMNS,
) -> bool:
    """Vectors and metadata of one file; each may be refused alone."""
    with put("0.parquet", data) as file:
        header = PARQUET.read_header(file, Columns(embedding, None, tuple(names)))
        if not header.rows or header.rows * max(header.dimension, 1) > MOST_NBYTES:
            return False
        part = some_rows(data, header.rows)
        table: Any = None
        if names:
            table = pa.Table.from_batches(list(parquet.iter_tables(header, names, part.start, part.stop)))
            fields = merge_columns(names, [file.url], [header.meta])
            frame = make_frame(fields, table, pd.RangeIndex(part.start, part.stop), file.url)
            same([frame[f.name].dtype for f in fields], [f.dtype for f in fields], "dtypes")
        rows = None
        if embedding:
            rows = read_rows(PARQUET, header, Columns(embedding), part)
    try:
        expected = pq.read_table(
            io.BytesIO(data), columns=[*names, *([embedding] if embedding else [])], use_threads=False
        )
    except (pa.ArrowException, OSError):  # it looks at more than is needed, such as the types that chunks repeat
        return True
    if expected.num_rows != header.rows and part != slice(0, header.rows):
        return True  # levels are damaged that count rows: this shows where a row group ends, which was not reached
    same(expected.num_rows, header.rows, "number of rows")
    if (
        embedding
        and part.start
        and (lengths_of(expected[embedding].combine_chunks())[: part.start] != header.dimension).any()
    ):
        return True  # a page was passed over whose levels are damaged, but whose header counts its rows
    expected = expected.slice(part.start, part.stop - part.start)
    for name in names:
        if not _decoded(table[name]).equals(_decoded(expected[name])):
            raise Fault(f"column {name} is not what pyarrow reads")
    if rows is not None and embedding:
        lists = expected[embedding].combine_chunks()
        items = (lists.storage if isinstance(lists, pa.ExtensionArray) else lists).flatten()
        same(rows.tobytes(), items.to_numpy(zero_copy_only=False).tobytes(), embedding)
    return True


def make_other(rng: Random, name: str) -> bytes:
    """A file of another format, mostly with its header, or its end, damaged."""
    seed = rng.choice(seeds.other_seeds()[name])
    chance = rng.random()
    if chance < 0.05:
        return seed[: rng.randrange(len(seed))]
    if chance < 0.5:
        return mutate.damage(rng, seed, 0, 300)
    if chance < 0.8:
        return mutate.damage(rng, seed, max(0, len(seed) - 400), None)
    return mutate.damage(rng, seed, keep_length=chance > 0.85)


def read_other(data: bytes, name: str) -> bool:
    """Vectors of one file, and of Arrow metadata; where its own library reads it, too, they are the same."""
    kind = get_file_format(name)
    # Half of the inputs are read as if what is compressed were large.
    held_nbytes = 2**4 if zlib.crc32(data) % 2 else 2**25
    with patch.object(ipc_columns, "_HELD_NBYTES", held_nbytes), in_one_file(f"0.{name}", data) as file:
        columns = Columns("embedding", None, seeds.COLUMNS[:3] if kind.holds_columns else ())
        header = kind.read_header(file, columns)
        if not header.rows or header.rows * max(header.dimension, 1) > MOST_NBYTES:
            return False
        part = some_rows(data, header.rows)
        rows = read_rows(kind, header, columns, part)
        table = (
            pa.Table.from_batches(list(iter_columns(header, columns.meta, part.start, part.stop)))
            if columns.meta
            else None
        )
    with in_folder({f"0.{name}": data}) as root:
        try:
            expected = as_others_read(Path(root) / f"0.{name}")
            others = None if table is None else as_table(Path(root) / f"0.{name}").select(table.column_names)
        except Exception:
            return True
    if len(expected) != header.rows:
        raise Fault(f"{len(expected)} rows by its own library, {header.rows} here")
    if expected.dtype.name == "bfloat16":  # of ml_dtypes, where that is new enough for safetensors
        expected = expected.astype(np.float32)
    same(rows.tobytes(), np.ascontiguousarray(expected[part]).tobytes(), "rows")
    if table is not None and others is not None:
        for column in table.column_names:
            found, wanted = table[column], others[column].slice(part.start, part.stop - part.start)
            try:
                is_same = found.to_pylist() == wanted.to_pylist()
            except (OverflowError, ValueError):  # of a damaged type, whose values Python does not have
                continue
            if not is_same:
                raise Fault(f"column {column} is not what pyarrow reads")
    return True


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without dictionaries, of which each side makes its own."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def same(found: Any, expected: Any, what: str) -> None:
    # NaN is no reason to differ: the texts are compared then.
    if found != expected and repr(found) != repr(expected):
        raise Fault(f"{what}: {str(found)[:200]} where {str(expected)[:200]} was expected")


def read_pair(data: bytes, folder: Callable[[dict[str, bytes]], AbstractContextManager[str]]) -> bool:
    (length,) = struct.unpack("<I", data[:4])
    with folder({"e/0.npy": data[4 : 4 + length], "e/0.parquet": data[4 + length :]}) as root:
        reader = EmbeddingReader(f"{root}/e", "parquet_npy", meta_columns=list(seeds.COLUMNS))
        if reader.total_size > MOST_NBYTES:
            return False
        rows, frame = next(reader(reader.count, dtype=None, show_progress=False))
        expected = np.lib.format.read_array(io.BytesIO(data[4 : 4 + length]), allow_pickle=False, max_header_size=2**20)
        same(rows.tobytes(), expected.astype(expected.dtype.newbyteorder("=")).tobytes(), "rows")
        same(len(frame), len(rows), "rows of metadata")
    return True


def make_pair(rng: Random) -> bytes:
    vectors, metadata = seeds.npy_seeds()[0], rng.choice(seeds.metadata_seeds())
    if rng.random() < 0.5:
        vectors = mutate.npy(rng, [vectors])
    if rng.random() < 0.7:
        metadata = rng.choice((mutate.parquet_footer, mutate.parquet_pages))(rng, [metadata])
    return struct.pack("<I", len(vectors)) + vectors + metadata


@contextmanager
def in_memory(files: dict[str, bytes]) -> Iterator[str]:
    """Put files into fsspec's memory, where nothing else is."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name, data in files.items():
        memory.pipe_file(f"/fuzz/{name}", data)
    try:
        yield "memory://fuzz"
    finally:
        memory.store.clear()


@contextmanager
def in_folder(files: dict[str, bytes]) -> Iterator[str]:
    """Put files into a new local folder, in memory where the system has such folders."""
    with TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        for name, data in files.items():
            os.makedirs(os.path.dirname(f"{root}/{name}"), exist_ok=True)
            with open(f"{root}/{name}", "wb") as opened:
                opened.write(data)
            os.utime(f"{root}/{name}", ns=(0, 0))  # manifests tell the time of files
        yield root


# ---------------------------------------------------------------------------------------------------------------------
# Manifests


@cache
def manifests() -> list[bytes]:
    """Saved manifests of an npy and of a parquet collection, both of two files."""
    found = []
    for file_format, seed in (("npy", seeds.npy_seeds()[0]), ("parquet", seeds.parquet_seeds()[0])):
        with in_memory({f"e/{n}.{file_format}": seed for n in range(2)}) as root:
            meta = list(seeds.COLUMNS) if file_format == "parquet" else None
            EmbeddingReader(f"{root}/e", file_format, meta_columns=meta).save_manifest()
            table = pq.read_table(io.BytesIO(fsspec.filesystem("memory").cat_file("/fuzz/e/.manifest.embeddings")))
            # The time of the copies that are read is another one.
            sizes = pa.array([str(size) for size in table["size"].to_pylist()])
            table = table.set_column(table.schema.get_field_index("fingerprint"), "fingerprint", sizes)
            sink = io.BytesIO()
            pq.write_table(table, sink)
            found.append(sink.getvalue())
    return found


@cache
def local_manifests() -> list[bytes]:
    """Saved manifests of two local files, whose vectors need no decoding, with and without metadata beside them."""
    found = []
    for file_format, files in LOCAL_FILES.items():
        with in_folder(files) as root:
            meta = list(seeds.COLUMNS) if file_format == "parquet_npy" else None
            EmbeddingReader(f"{root}/e", file_format, meta_columns=meta).save_manifest()
            with open(f"{root}/e/.manifest.embeddings", "rb") as opened:
                found.append(opened.read())
    return found


def make_manifest(rng: Random, saved: list[bytes]) -> bytes:
    seed = rng.choice(saved)
    if rng.random() < 0.5:
        return rng.choice((mutate.parquet_footer, mutate.parquet_pages))(rng, [seed])
    table = pq.read_table(pa.BufferReader(seed))
    facts = json.loads(table.schema.metadata[b"dask_embedding_reader"])
    columns = table.to_pydict()
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.3:
            facts[rng.choice(list(facts))] = mutate.odd_value(rng)
        else:
            values = columns[rng.choice(list(columns))]
            values[rng.randrange(len(values))] = mutate.odd_value(rng)
    if rng.random() < 0.3:
        columns["path"] = [mutate.odd_path(rng) for _ in columns["path"]]
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pa.array(values, table.schema.field(name).type)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            try:
                arrays[name] = pa.array([str(value) for value in values])
            except UnicodeEncodeError:
                arrays[name] = pa.nulls(len(values))
    text = json.dumps(facts)
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays).replace_schema_metadata({"dask_embedding_reader": text}), sink)
    return sink.getvalue()


LOCAL_FILES = {
    "parquet": {"e/0.parquet": seeds.plain_seeds()[2], "e/1.parquet": seeds.plain_seeds()[2]},
    "parquet_npy": {"e/2.npy": seeds.npy_seeds()[0], "e/2.parquet": seeds.metadata_seeds()[0]},
}


def read_local_manifest(data: bytes) -> bool:
    with in_folder({**LOCAL_FILES["parquet"], **LOCAL_FILES["parquet_npy"], "e/.manifest.embeddings": data}) as root:
        return read_all_of(f"{root}/e/.manifest.embeddings")


def read_manifest(data: bytes) -> bool:
    asked: list[str] = []

    def locate(source: int, path: str) -> tuple[AbstractFileSystem, str]:
        asked.append(path)
        return fsspec.filesystem("memory"), f"/fuzz/e/{path}"

    decode_manifest(data, "m.parquet", locate)
    for path in asked:
        inside = posixpath.normpath(f"/fuzz/e/{path}")
        if not f"{inside}/".startswith("/fuzz/e/") or "://" in path:
            raise Fault(f"the manifest leads to {path!r}")
    npy, pq_file = seeds.npy_seeds()[0], seeds.parquet_seeds()[0]
    files = {"e/0.npy": npy, "e/1.npy": npy, "e/0.parquet": pq_file, "e/1.parquet": pq_file, "0.npy": npy}
    with in_memory({**files, "e/.manifest.embeddings": data}) as root:
        return read_all_of(f"{root}/e/.manifest.embeddings")


def read_all_of(url: str) -> bool:
    """Open a collection from its manifest, and read what it is said to hold."""
    reader = EmbeddingReader.from_manifest(url)
    if reader.total_size > MOST_NBYTES:
        return False
    for first in range(0, reader.count, 1000):
        if next(reader(1000, first, dtype=None, show_progress=False))[0].shape[1] != reader.dimension:
            raise Fault("another dimension than that of the reader")
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

_STARTS = (
    *(
        "memory://fuzz/e",
        "memory://",
        "memory://fuzz/e/*.npy",
        "e",
        "e/*.npy",
        "e/**",
        "e/[0-9].npy",
        "file://e",
        "./e",
    ),
    *("zip://0.npy::memory://fuzz/e/0.npy", "simplecache::memory://fuzz/e", "reference::memory://fuzz/e/0.npy"),
    *(
        "dir::memory://fuzz/e",
        "tar://x::memory://fuzz/e/0.npy",
        "data:,x",
        "data:application/x;base64,AAAA",
        "nonsense://x",
    ),
    *("filecache::memory://fuzz/e", "blockcache::memory://fuzz/e/0.npy", "generic://memory://fuzz/e", "asynclocal://e"),
)
_ENDS = (
    "",
    "",
    "/",
    "//",
    "?",
    "*",
    "**",
    "[",
    "]",
    "[!",
    "{a,b}",
    "::",
    "\0",
    "%2e%2e",
    " ",
    "#",
    "\ud800",
    "é",
    "x" * 300,
    "[a",
    "\n",
)
_NUMBERS: tuple[Any, ...] = (
    0,
    1,
    -1,
    20,
    19,
    21,
    1.5,
    1e5,
    1e400,
    float("nan"),
    2**63,
    -(2**63),
    10**30,
    True,
    None,
    "1",
    b"1",
    [],
    "x",
    3,
)
_NAMES = ("embedding", "id", "i", "", "\0", None, 3, ["id"], ["id", "id"], [None], {"a": 1}, "é", b"id", [["id"]])


def make_arguments(rng: Random) -> bytes:
    return str(rng.getrandbits(60)).encode()


def read_arguments(data: bytes) -> bool:
    """The input is the seed of the arguments: not all of these can be spelled as bytes."""
    rng = Random(data)
    source: Any = rng.choice(_STARTS) + rng.choice(_ENDS) + rng.choice(_ENDS)
    if rng.random() < 0.5:
        source = "memory://fuzz/e"
    elif rng.random() < 0.2:
        source = rng.choice(
            ([source, source], [], [None], None, 3, b"e", {"e": 1}, "", " ", [""], ("memory://fuzz/e",))
        )
    npy, file = seeds.npy_seeds()[0], seeds.parquet_seeds()[0]
    with in_memory({"e/0.npy": npy, "e/1.npy": npy, "e/0.parquet": file, "e/1.parquet": file}):
        file_format: Any = rng.choice(("npy", "npy", "parquet", "parquet_npy", "pickle", None, 3))
        options: dict[str, Any] = {}
        for name, values in (
            ("embedding_column", _NAMES),
            ("meta_columns", _NAMES),
            ("metadata_folder", ("memory://fuzz/e", "memory://none", 3, "")),
            ("embedding_dtype", ("float32", "O", "x", 3, "f4,f4")),
            ("storage_options", ({}, {"auto_mkdir": True}, {"x": 1}, {3: 4}, "x", None)),
        ):
            if rng.random() < 0.15:
                options[name] = rng.choice(values)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* passed over", category=UserWarning)
            reader = EmbeddingReader(source, file_format, **options)
        batches: dict[str, Any] = {
            name: rng.choice(_NUMBERS)
            for name in ("start", "end", "max_piece_size", "parallel_pieces")
            if rng.random() < 0.3
        }
        if rng.random() < 0.2:
            batches["dtype"] = rng.choice((None, "f2", "O", "x", int, "S3", "c8"))
        size: Any = rng.choice((*_NUMBERS, 3, 3, 3))
        rows = [each for each, _ in reader(size, show_progress=False, **batches)]
        first, last = int(batches.get("start") or 0), batches.get("end")
        stop = reader.count if last is None else min(int(last), reader.count)
        same(sum(map(len, rows)), max(0, stop - first), "rows of batches")
        if rng.random() < 0.2:
            same(len(reader.to_dask_array(first, last).compute(scheduler="sync")), max(0, stop - first), "rows")
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Notes of a writer

_IDS = {"job": "0" * 32, "writer": "1" * 32}
_SETTINGS: dict[str, Any] = {
    "token": None,
    "file_format": "npy",
    "embedding_column": "embedding",
    "rows": 20,
    "rows_per_file": 5,
    "dimension": 3,
    "dtype": "<f4",
    "scale": None,
}
_FILES = {"00000000.npy": [188, "a" * 64]}
_SIGN = {"host": "a", "machine": "a", "pid": 9, "process_started": 0.0, "alive_at": 0.0, "job": "2" * 32}
NOTES: dict[str, dict[str, Any]] = {
    "job.json": {"settings": _SETTINGS, "replaces": ["old.npy"], **_IDS},
    "commit.json": {
        "settings": _SETTINGS,
        "columns": [],
        "files": _FILES,
        "move": ["00000000.npy"],
        "remove": ["old.npy"],
        "rows": 20,
        **_IDS,
    },
    "done/00000000.json": {"rows": 5, "not_finite": 0, "files": _FILES, "columns": "", "job": "0" * 32},
    "writer-00000001.json": _SIGN,
}
NOTED_ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)


def make_notes(rng: Random) -> bytes:
    """A line for each note: its name, and what it holds."""
    notes = {}
    for name in rng.sample(list(NOTES), rng.choice((1, 2, 3))):
        note = json.loads(json.dumps(NOTES[name]))
        for _ in range(rng.choice((0, 1, 2))):
            inner = note.get("settings") if rng.random() < 0.4 else note
            if isinstance(inner, dict):
                inner[rng.choice(list(inner))] = rng.choice((mutate.odd_value, mutate.odd_path))(rng)
        for key in ("replaces", "remove", "move"):
            if isinstance(note.get(key), list) and rng.random() < 0.3:
                note[key] = [mutate.odd_path(rng)]
        text = json.dumps(note).encode()
        notes[name] = mutate.damage(rng, text) if rng.random() < 0.2 else text
    return b"\n".join(name.encode() + b" " + text.replace(b"\n", b" ") for name, text in notes.items())


def read_notes(data: bytes) -> bool:
    """Write to a folder that has such notes; what lies beside the folder stays."""
    notes = dict(line.split(b" ", 1) for line in data.split(b"\n") if b" " in line)
    files = {f"e/_writing/{name.decode('latin1')}": text for name, text in notes.items()}
    with in_memory({"0.npy": b"precious", "README.txt": b"precious", **files}) as root:
        try:
            write_embeddings(NOTED_ROWS, f"{root}/e", rows_per_file=5, overwrite=True)
            same(EmbeddingReader(f"{root}/e").count, len(NOTED_ROWS), "rows")
        finally:
            for name in ("0.npy", "README.txt"):
                same(fsspec.filesystem("memory").cat_file(f"/fuzz/{name}"), b"precious", name)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Frames beside arrays

_BESIDE_ROWS = 23


@cache
def beside() -> tuple[TemporaryDirectory[str], EmbeddingReader]:
    """A collection of three files whose n-th row is (n, -n, 1), beside an ``id`` that is n, and a ``name``."""
    folder = TemporaryDirectory(prefix="fuzz-")
    for number, (start, stop) in enumerate([(0, 9), (9, 10), (10, _BESIDE_ROWS)]):
        rows = np.arange(start, stop, dtype=np.float32)
        np.save(f"{folder.name}/{number}.npy", np.stack([rows, -rows, np.ones_like(rows)], axis=1))
        table = pa.table({"id": np.arange(start, stop), "name": [f"n{n % 5}" for n in range(start, stop)]})
        pq.write_table(table, f"{folder.name}/{number}.parquet", row_group_size=4)
    return folder, EmbeddingReader(folder.name, "parquet_npy", meta_columns=["id", "name"])


def _some_slice(rng: Random, rows: int) -> slice:
    start, stop = sorted((rng.randint(0, rows), rng.randint(0, rows)))
    return slice(start, stop)


def _make_array(rng: Random, view: EmbeddingReader) -> tuple[da.Array, bool]:
    """An array whose first column tells the rows of the collection, and whether its graph does."""
    array, is_told = view.to_dask_array(max_piece_size=rng.choice((None, 2, 5))), True
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        rows = len(array)
        if not rows:
            break
        step = rng.randrange(13)
        if step == 0:
            array = array[_some_slice(rng, rows)]
        elif step == 1:
            array = array[:: rng.choice((2, 3, -1, -2))]
        elif step == 2:
            array = array[[rng.randrange(rows) for _ in range(rng.randint(1, rows))]]
        elif step == 3:
            array = array[np.array([rng.random() < 0.6 for _ in range(rows)])]
        elif step == 4:
            array = array.rechunk((rng.randint(1, rows), rng.choice((1, 3))))
        elif step == 5:
            cut = rng.randint(0, rows)
            array = da.concatenate(rng.choice(([array[:cut], array[cut:]], [array[cut:], array[:cut]], [array, array])))
        elif step == 6:
            array, is_told = array.persist(scheduler="sync"), False
        elif step == 7:
            array = da.from_array(array.compute(scheduler="sync"), chunks=(rng.randint(1, rows), 3))
            is_told = False
        elif step == 8:
            array = array * 2 / 2
        elif step == 9:
            mean = array.mean(axis=0)
            array = da.rint(array - mean + mean)
        elif step == 10:
            array = da.map_blocks(np.ascontiguousarray, array, dtype=array.dtype)
        elif step == 11:
            array = array.T.T
        else:
            elsewhere = da.from_array(np.full((rng.randint(1, 3), 3), 7, np.float32))
            array, is_told = da.concatenate(rng.choice(([array, elsewhere], [elsewhere, array]))), False
    return array, is_told


def _make_frame(rng: Random, view: EmbeddingReader) -> dd.DataFrame | pd.DataFrame:
    frame = view.to_dask_dataframe(max_piece_size=rng.choice((None, 2, 5)))
    for _ in range(rng.choice((0, 1, 1, 2))):
        step = rng.randrange(13)
        if step == 0:
            some = _some_slice(rng, _BESIDE_ROWS)
            frame = frame.loc[some.start : some.stop]
        elif step == 1:
            frame = frame.sample(frac=rng.choice((1, 0.5)), random_state=rng.randrange(99))
        elif step == 2:
            frame = frame.sort_values("id", ascending=rng.random() < 0.5)
        elif step == 3:
            frame = frame.merge(pd.DataFrame({"name": ["n1", "n2", "n4"], "more": [1, 2, 3]}), on="name", how="inner")
        elif step == 4:
            frame = frame[frame["id"] % 3 != 1]
        elif step == 5:
            frame = frame.reset_index(drop=True)
        elif step == 6:
            frame = frame.reset_index()
        elif step == 7:
            frame = frame.repartition(npartitions=rng.randint(1, 5))
        elif step == 8:
            frame = frame.persist(scheduler="sync")
        elif step == 9:
            frame = dd.concat([frame, frame]) if rng.random() < 0.3 else frame.assign(twice=frame["id"] * 2)
        elif step == 10:
            frame = frame.partitions[rng.randrange(frame.npartitions) :]
        elif step == 11:
            frame = frame.head(rng.randint(0, _BESIDE_ROWS), npartitions=-1, compute=False)
        else:
            frame = frame[["id"]]
    return frame.compute(scheduler="sync") if rng.random() < 0.2 else frame


def read_beside(data: bytes) -> bool:
    """Rows at the same position come together, those that the frame numbers, or it is refused before."""
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):  # by way of files Dask unpickles
        return _read_beside(Random(data))


def _read_beside(rng: Random) -> bool:
    reader = beside()[1]
    view = rng.choice(
        (reader, reader, reader.take(slice(2, 19)), reader.take([5, 3, 3, 20, 11]), reader.shuffle(seed=3))
    )
    other = view if rng.random() < 0.8 else reader
    array, is_told = _make_array(rng, view)
    vectors = array.compute(scheduler="sync")
    try:
        frame = _make_frame(rng, other)
        table = frame.compute(scheduler="sync") if isinstance(frame, dd.DataFrame) else frame
    except (KeyError, IndexError, AssertionError):  # a label or a column is missing, or Dask has lost count itself
        return False
    numbers: Any = table.index if table.index.name == "i" else table.get("i", None)
    numbers = None if numbers is None else numbers.to_numpy()
    rows = 0
    try:
        if rng.random() < 0.3:
            batches: Any = _written(array, frame, len(vectors))
        else:
            batches = iter_batches(array, frame, batch_size=rng.choice((1, 4, 50)))
        for part, metadata in batches:
            stop = rows + len(part)
            same(part.tolist(), vectors[rows:stop].tolist(), "vectors")
            same(metadata["id"].tolist(), table["id"].iloc[rows:stop].tolist(), "metadata")
            for row in range(rows, stop) if numbers is not None else ():
                follows = row == 0 or numbers[row] == numbers[row - 1] + 1
                if numbers[row] != vectors[row, 0] and (is_told or not follows):
                    raise Fault(f"row {vectors[row, 0]} beside the metadata of row {numbers[row]}")
            rows = stop
    except MismatchError as error:
        counts_on = numbers is not None and (np.diff(numbers) == 1).all()
        if counts_on and "'i' of the frame" in str(error) and numbers.tolist() == vectors[:, 0].tolist():
            raise Fault(f"pairs are refused: {error}") from error
        raise
    same(rows, len(vectors), "rows")
    return rows > 0


def _written(array: da.Array, frame: Any, rows: int) -> Iterator[tuple[Any, Any]]:
    """Write both, and read them back."""
    with in_memory({}) as root:
        write_embeddings(array, f"{root}/e", "parquet", frame, rows_per_file=6)
        yield from EmbeddingReader(f"{root}/e", "parquet", meta_columns=["id"])(rows, show_progress=False)


def _parquet(mutator: Callable[[Random, list[bytes]], bytes]) -> Callable[[Random], bytes]:
    return lambda rng: mutator(rng, seeds.parquet_seeds())


def make_local_parquet(rng: Random) -> bytes:
    """Mostly vectors that pyarrow need not decode."""
    if rng.random() < 0.1:
        return mutate.snappy_literals(rng, seeds.literal_seeds())
    kinds = seeds.plain_seeds, seeds.packed_seeds, seeds.parquet_seeds
    files = rng.choices(kinds, (45, 45, 10))[0]()
    return rng.choice((mutate.parquet_footer, mutate.parquet_pages, mutate.parquet_pages))(rng, files)


def read_local_parquet(data: bytes) -> bool:
    """Vectors alone, or with a column of metadata where the footer names one."""
    return read_parquet(data, "embedding", on_disk, ("id",) if b"caption" in data else ())


TARGETS = {
    "npy": Target(lambda rng: mutate.npy(rng, seeds.npy_seeds()), read_npy, 21),
    "parquet footer": Target(_parquet(mutate.parquet_footer), read_parquet, 24),
    "parquet pages": Target(_parquet(mutate.parquet_pages), read_parquet, 10),
    **{
        name: Target(partial(make_other, name=name), partial(read_other, name=name), weight)
        for name, weight in {"arrow": 8, "npz": 4, "safetensors": 3, "fbin": 1, "fvecs": 1}.items()
    },
    "pair": Target(make_pair, lambda data: read_pair(data, in_memory), 2),
    "manifest": Target(lambda rng: make_manifest(rng, manifests()), read_manifest, 4),
    "arguments": Target(make_arguments, read_arguments, 2),
    "notes": Target(make_notes, read_notes, 2),
    "frames beside arrays": Target(make_arguments, read_beside, 1),
    "local npy": Target(lambda rng: mutate.npy(rng, seeds.npy_seeds()), lambda data: read_npy(data, on_disk), 4),
    "local parquet": Target(make_local_parquet, read_local_parquet, 12),
    "local pair": Target(make_pair, lambda data: read_pair(data, in_folder), 2),
    "local manifest": Target(lambda rng: make_manifest(rng, local_manifests()), read_local_manifest, 2),
}
