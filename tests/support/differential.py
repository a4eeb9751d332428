"""One collection in all the ways there are to read it: ``python -m tests.support.differential FIRST STOP`` tries seeds.

A ``Trial`` is made of an integer alone: which collection, and how it is read. ``check`` writes it and reads it by the
classic call, as array, as frame, by ``iter_batches`` and from a written copy. Each must be what numpy and pandas say,
bit for bit, and what the reference says where that one is right. ``check_pairs`` loses files of pairs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.base import compute

from dask_embedding_reader import EmbeddingReader, iter_batches, verify_embeddings, write_embeddings
from dask_embedding_reader.errors import MismatchError, NoFilesError
from tests.support.collections import (
    COLUMNS,
    FORMATS,
    Collection,
    Rows,
    assert_batches,
    assert_same_frame,
    assert_same_rows,
    expected_frame,
    random_rows,
    write_collection,
)


def _floats(rng: np.random.Generator, rows: int, dtype: str) -> pa.Array:
    """Null, NaN and numbers side by side."""
    values = rng.choice(np.array([np.nan, -0.0, 1.5, np.inf, 3e-5], dtype), rows)
    return pa.array(values, mask=rng.random(rows) < 0.3)


def _far(rng: np.random.Generator, rows: int, unit: str, zone: str | None = None) -> pa.Array:
    """Times of the years 10 to 9990, those of nanoseconds 1680 to 2260, with nulls."""
    years = (1680, 2260) if unit == "ns" else (10, 9990)
    first, last = (np.datetime64(f"{year:04d}", "us").astype(np.int64) for year in years)
    moments = rng.integers(first, last, rows).astype("M8[us]").astype(f"M8[{unit}]")  # INT96 is read in microseconds
    return pa.array(moments, pa.timestamp(unit), mask=rng.random(rows) < 0.2).cast(pa.timestamp(unit, zone))


def _uuids(rng: np.random.Generator, rows: int) -> pa.Array:
    values = [None if rng.random() < 0.2 else rng.bytes(16) for _ in range(rows)]
    return pa.ExtensionArray.from_storage(pa.uuid(), pa.array(values, pa.binary(16)))


def _json(rng: np.random.Generator, rows: int) -> pa.Array:
    values = [None if rng.random() < 0.2 else f'{{"k": {k}}}' for k in rng.integers(0, 99, rows).tolist()]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(values, pa.string()))


ODD_COLUMNS: dict[str, Callable[[np.random.Generator, int], pa.Array]] = {
    "half": lambda rng, n: _floats(rng, n, "f2"),
    "single": lambda rng, n: _floats(rng, n, "f4"),
    "double": lambda rng, n: _floats(rng, n, "f8"),
    "far_s": lambda rng, n: _far(rng, n, "s"),
    "far_ms": lambda rng, n: _far(rng, n, "ms", "UTC"),
    "far_us": lambda rng, n: _far(rng, n, "us", "Asia/Kathmandu"),
    "far_ns": lambda rng, n: _far(rng, n, "ns", "America/New_York"),
    "uuid": _uuids,
    "json": _json,
    "no_text": lambda rng, n: pa.nulls(n, pa.string()),
    "no_type": lambda rng, n: pa.nulls(n),
}
"""What is easily changed, or confused with something else."""

_COMPRESSIONS = ["none", "snappy", "gzip", "zstd"]
_MOST_CELLS = 60_000
"""Items of a collection at most: what the oracle of metadata does in Python takes its time."""


@dataclass(frozen=True)
class Trial:
    """What a seed stands for."""

    seed: int
    format_name: str
    file_rows: list[int]
    dimension: int
    dtype: str
    columns: list[str]
    row_group_rows: int | None
    parquet_options: dict[str, Any]
    #: Arguments of the classic call and of the lazy collections.
    start: int
    end: int | None
    batch_size: int
    max_piece_size: int | None
    parallel_pieces: int | None
    limit: int
    cast: str | None
    #: The format of the copy.
    copy_format: str
    copy_rows_per_file: int
    #: What the copy is made of.
    copy_source: str

    @property
    def is_whole(self) -> bool:
        """Whether the range is the whole collection."""
        return self.start == 0 and (self.end is None or self.end >= sum(self.file_rows))


def make_trial(seed: int) -> Trial:
    """What a seed stands for, always the same."""
    rng = np.random.default_rng(seed)

    def one_of(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    plain = int(seed % 5 == 0)  # such as the reference reads rightly
    format_name = one_of(sorted(_RIGHT_FORMATS if plain else FORMATS))
    dimension = one_of([1, 2, 3, 8, 17, 64])
    longest = one_of([3, 12, 40, 300, 3_000])
    longest = max(2, min(longest, _MOST_CELLS // (8 * dimension)))
    file_rows = [one_of([plain, 1, longest, int(rng.integers(plain, longest))]) for _ in range(one_of([1, 2, 3, 5, 8]))]
    file_rows[0] += not any(file_rows)
    rows = sum(file_rows)
    start, end = sorted(rng.integers(0, rows + 1, 2).tolist()) if rng.random() < 0.6 else (0, rows)
    dtype = one_of(sorted(_RIGHT_DTYPES) if plain else FORMATS[format_name].dtypes)
    wide = rng.integers(len(COLUMNS) + 1) if rng.random() < 0.2 else rng.integers(4)
    metadata = FORMATS[format_name].metadata
    pages = {
        "compression": one_of(_COMPRESSIONS),
        "use_dictionary": one_of([True, False]),
        "data_page_size": one_of([64, 4_096, 2**20]),
        "data_page_version": one_of(["1.0", "2.0"]),
        "write_page_index": one_of([True, False]),
        "use_deprecated_int96_timestamps": bool(rng.random() < 0.2),
    }
    names = sorted(_RIGHT_COLUMNS) if plain else rng.permutation([*COLUMNS, *ODD_COLUMNS]).tolist()
    return Trial(
        seed=seed,
        format_name=format_name,
        file_rows=file_rows,
        dimension=dimension,
        dtype=dtype,
        columns=names[:wide] if metadata else [],
        row_group_rows=one_of([None, 1 + longest // 7, 1 + longest // 2]),
        parquet_options=pages,
        start=start,
        end=None if end == rows and rng.random() < 0.5 else end,
        batch_size=1 + int(rng.integers(one_of([4, 50, rows + 3]))) if rows < 500 else 1 + int(rng.integers(rows)),
        max_piece_size=one_of([None, 1 + rows // 9, int(rng.integers(1, rows + 2))]),
        parallel_pieces=one_of([None, 1, 2, 5]),
        limit=one_of([1, 2_000, 30_000, 2**32]),
        cast=one_of([None, "float32", "float64"] if dtype != "float64" else [None, "float32", "float16"]),
        copy_format=one_of(["npy", "parquet", "parquet_npy"]),
        copy_rows_per_file=1 + int(rng.integers(rows)) if rows < 60 else 1 + rows // one_of([1, 3, 7]),
        copy_source=one_of(["reader", "array", "batches", "numpy"]),
    )


def _with_special_values(rng: np.random.Generator, rows: int, dimension: int, dtype: npt.DTypeLike) -> Rows:
    """Random vectors, with what compares or prints unlike other numbers among them."""
    vectors = random_rows(rng, rows, dimension, dtype)
    if vectors.dtype.kind == "f" and vectors.size:
        limits = np.finfo(vectors.dtype)
        odd = np.array(
            [np.nan, np.inf, -np.inf, -0.0, limits.tiny, limits.smallest_subnormal, limits.max], vectors.dtype
        )
        places = rng.integers(0, vectors.size, 1 + vectors.size // 20)
        vectors.reshape(-1)[places] = rng.choice(odd, len(places))
    return vectors


def check(trial: Trial, root: Path) -> None:
    """Write and read it in every way."""
    rng = np.random.default_rng(trial.seed)
    makers = {**COLUMNS, **ODD_COLUMNS}
    tables = [pa.table({name: makers[name](rng, rows) for name in trial.columns}) for rows in trial.file_rows]
    collection = write_collection(
        root,
        trial.format_name,
        file_rows=trial.file_rows,
        dimension=trial.dimension,
        dtype=trial.dtype,
        tables=tables if trial.columns else None,
        columns=[],
        row_group_rows=trial.row_group_rows,
        parquet_options=trial.parquet_options,
        vectors=_with_special_values,
        seed=trial.seed,
    )
    in_parquet = "parquet" in FORMATS[trial.format_name].file_format
    if in_parquet and trial.parquet_options["use_deprecated_int96_timestamps"]:
        table = _as_int96(collection.table)
        collection = replace(
            collection, table=table, metadata=expected_frame(table) if trial.columns else collection.metadata
        )
    reader = collection.open()
    with warnings.catch_warnings(), np.errstate(over="ignore"), dask.config.set(num_workers=2):
        # A limit below one batch or chunk cannot be kept; what a narrower dtype cannot hold is infinite, as in numpy.
        warnings.filterwarnings("ignore", message=".*max_ram_usage_in_bytes", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*became infinite", category=UserWarning)  # float16
        _check_classic_call(trial, collection, reader)
        _check_lazy(trial, collection, reader)
        _check_copy(trial, collection, reader, root / "copy")
    if _reference_is_right(trial):
        _check_reference(trial, collection)


def _as_int96(table: pa.Table) -> pa.Table:
    """What is read of times that are stored in 96 bits: microseconds, and no zone."""
    return table.cast(
        pa.schema([f.with_type(pa.timestamp("us")) if pa.types.is_timestamp(f.type) else f for f in table.schema])
    )


def _check_classic_call(trial: Trial, collection: Collection, reader: EmbeddingReader) -> None:
    part = (trial.start, trial.end)
    batches = reader(
        trial.batch_size,
        *part,
        max_piece_size=trial.max_piece_size,
        parallel_pieces=trial.parallel_pieces,
        max_ram_usage_in_bytes=trial.limit,
        show_progress=False,
        dtype=trial.cast,
    )
    assert_batches(
        _same_bits(batches, collection, trial.start, trial.cast), collection, trial.batch_size, *part, trial.cast
    )


def _check_lazy(trial: Trial, collection: Collection, reader: EmbeddingReader) -> None:
    part, size = (trial.start, trial.end), trial.max_piece_size
    expected = collection.rows[trial.start : trial.end]
    x, meta = reader.to_dask_array(*part, max_piece_size=size), reader.to_dask_dataframe(*part, max_piece_size=size)
    computed = x.compute(scheduler="threads")
    assert_same_rows(computed, expected)
    assert_same_bits(computed, expected)
    partitions = compute(*meta.to_delayed(), scheduler="threads")
    assert tuple(map(len, partitions)) == x.chunks[0]
    assert_same_frame(pd.concat(partitions) if len(partitions) > 1 else partitions[0], collection.frame(*part))
    if len(expected):
        step = 1 + len(expected) // 5
        some = x[::-step].compute(scheduler="synchronous")
        assert_same_bits(some, expected[::-step])
        one = len(expected) // 2
        assert_same_frame(
            meta.loc[trial.start + one : trial.start + one].compute(), collection.frame().iloc[trial.start + one :][:1]
        )
    batches = iter_batches(x, meta, batch_size=trial.batch_size, max_ram_usage_in_bytes=trial.limit)
    same_bits = _same_bits(batches, collection, trial.start, None)
    assert_batches(same_bits, collection, trial.batch_size, *part, None, of_frame=True)


def _check_copy(trial: Trial, collection: Collection, reader: EmbeddingReader, folder: Path) -> None:
    columns = [] if trial.copy_format == "npy" else collection.columns
    file_format = "npy" if not columns and trial.copy_format == "parquet_npy" else trial.copy_format
    reader = collection.open(meta_columns=columns or None)
    source: Any = reader
    meta: Any = None
    if trial.copy_source == "array":
        source = reader.to_dask_array(max_piece_size=trial.max_piece_size)
        meta = reader.to_dask_dataframe(max_piece_size=trial.max_piece_size) if columns else None
    elif trial.copy_source == "batches":
        batches = reader(trial.batch_size, dtype=None, show_progress=False)
        source = batches if columns else ((rows, None) for rows, _ in batches)
    elif trial.copy_source == "numpy":
        source, meta = collection.rows, collection.frame()[columns] if columns else None
    write_embeddings(source, folder, file_format, meta, rows_per_file=trial.copy_rows_per_file)
    copy = EmbeddingReader(folder, file_format, meta_columns=columns or None)
    assert_same_bits(np.concatenate([rows for rows, _ in copy(99, dtype=None, show_progress=False)]), collection.rows)
    expected = collection.frame()[columns]
    if trial.copy_source == "batches":  # where no batch has a string, Python's objects do not tell that it was text
        text = [name for name in columns if isinstance(expected[name].dtype, pd.StringDtype)]
        nothing: Any = pd.array(pa.nulls(len(expected)), dtype=pd.ArrowDtype(pa.null()))
        expected = expected.assign(**{name: nothing for name in text if expected[name].isna().all()})
    assert_same_frame(copy.to_dask_dataframe().compute(scheduler="threads"), expected)
    if trial.copy_source == "reader" and columns:
        _assert_same_nulls(folder, collection.table.select(columns))
    assert verify_embeddings(folder).empty
    assert EmbeddingReader.from_manifest(folder / ".manifest.embeddings").count == len(collection)


def _assert_same_nulls(folder: Path, expected: pa.Table) -> None:
    """What is converted keeps null and NaN apart, and every bit of a floating-point number."""
    written = pa.concat_tables(
        [pq.read_table(path, columns=expected.column_names) for path in sorted(folder.rglob("*.parquet"))]
    )
    for name in expected.column_names:
        found, wanted = written[name].combine_chunks(), expected[name].combine_chunks()
        assert found.is_null().to_pylist() == wanted.is_null().to_pylist(), name
        if pa.types.is_floating(wanted.type):
            assert found.drop_null().to_numpy().tobytes() == wanted.drop_null().to_numpy().tobytes(), name
        if isinstance(wanted.type, pa.BaseExtensionType):
            assert found.type == wanted.type, name


def _same_bits(batches: Iterator[Any], collection: Collection, start: int, cast: str | None) -> Iterator[Any]:
    """Pass batches on, once their bits have been looked at: NaN has many, and zero two."""
    for rows, frame in batches:
        assert_same_bits(rows, collection.rows[start : start + len(rows)].astype(cast or collection.rows.dtype))
        start += len(rows)
        yield rows, frame


def assert_same_bits(actual: Rows, expected: Rows) -> None:
    """Same dtype, shape and bits."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


# --------------------------------------------------------------------------------------------------------------------
# The reference

_RIGHT_FORMATS = {"npy", "npy-header-2", "parquet-list", "parquet_npy", "parquet_npy-one-folder"}
_RIGHT_DTYPES = {"float16", "float32"}
_RIGHT_COLUMNS = {"text", "caption"}
"""Strings: of numbers it makes others, where columns of other types are beside them."""


def _reference_is_right(trial: Trial) -> bool:
    """Not with empty files, other dtypes, other columns and other formats: see ``test_reference_failings``."""
    return (
        importlib.util.find_spec("embedding_reader") is not None
        and trial.format_name in _RIGHT_FORMATS
        and trial.dtype in _RIGHT_DTYPES
        and all(trial.file_rows)
        and set(trial.columns) <= _RIGHT_COLUMNS
        and (bool(trial.columns) or not trial.format_name.startswith("parquet_npy"))
        and trial.start < (sum(trial.file_rows) if trial.end is None else trial.end)
    )


def _check_reference(trial: Trial, collection: Collection) -> None:
    from embedding_reader import EmbeddingReader as Reference

    options = {**collection.options, "metadata_folder": str(collection.metadata_folder or collection.folder)}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be silenced
        theirs = Reference(str(collection.folder), **options)
    assert theirs.count == len(collection)
    sizes = {"batch_size": trial.batch_size, "start": trial.start, "end": trial.end, "show_progress": False}
    ours = collection.open()
    for (rows, frame), (their_rows, their_frame) in itertools.zip_longest(ours(**sizes), theirs(**sizes)):
        assert_same_bits(rows, their_rows)
        assert list(frame.columns) == list(their_frame.columns)
        for name in frame:
            known = frame[name].notna()
            assert known.tolist() == their_frame[name].notna().tolist()
            assert frame[name][known].tolist() == their_frame[name][known].tolist()


# --------------------------------------------------------------------------------------------------------------------
# Shards that are lost

_PAIR_FORMATS = {"parquet_npy": ".npy", "parquet_npz": ".npz", "parquet_fbin": ".fbin"}
_WORDS = ["cats", "dogs", "emus", "fish", "gnus", "hens", "ibex", "jays", "kiwi", "lynx", "mice", "newt"]
_WORDS_ALONE: list[tuple[Callable[[int], str], Callable[[int], str]]] = [
    (lambda n: _WORDS[n], lambda n: f"{_WORDS[n]}_meta"),
    (lambda n: f"{_WORDS[n]}/0", lambda n: f"{_WORDS[n]}/m0"),
]
_IN_FOLDERS: list[tuple[Callable[[int], str], Callable[[int], str]]] = [
    (lambda n: f"{n // 3}/emb_{n % 3}", lambda n: f"{n // 3}/meta_{n % 3}"),
    (lambda n: f"{'ba'[n % 2]}_{_WORDS[n % 2]}/{n // 2}", lambda n: f"{'ab'[n % 2]}_{_WORDS[n % 2]}/{n // 2}"),
]
_NAMES: list[tuple[Callable[[int], str], Callable[[int], str]]] = [
    (lambda n: f"emb_{n}", lambda n: f"meta_{n}"),
    (lambda n: f"img_emb_{n:04d}", lambda n: f"metadata_{n}"),
    (lambda n: f"{n:05d}", lambda n: f"{n}"),
    (lambda n: f"emb_{n}_512", lambda n: f"part-{n:03d}"),
    (lambda n: f"2024-{n}", lambda n: f"{n}-rows"),
    (lambda n: f"x/part{n}", lambda n: f"part{n}.snappy"),
    *_WORDS_ALONE,
    *_IN_FOLDERS,
]
"""What files of vectors and of metadata are called, by the number of the shard."""


def check_pairs(seed: int, root: Path) -> str:
    """Lose some files of a collection of pairs: what is left are pairs, or it is refused. Returns which of these."""
    rng = np.random.default_rng(seed)
    names = _NAMES[int(rng.integers(len(_NAMES)))]
    file_format = str(rng.choice(sorted(_PAIR_FORMATS)))
    count, first = int(rng.integers(1, 8)), int(rng.integers(3))
    # As where one side counts from zero and the other from one; of folders nobody knows what their numbers mean.
    shift = 0 if names in _IN_FOLDERS else int(rng.choice([0, 0, 0, 1, 3]))
    shards, partners = (
        {*range(start, start + count)} - {*rng.choice(range(start, start + count), rng.choice([0, 0, 1, 2]))}
        for start in (first, first + shift)
    )
    vectors, metadata = ({name(n): n for n in numbers} for name, numbers in zip(names, (shards, partners), strict=True))
    folder = "emb" if rng.random() < 0.3 else "meta"
    for path, shard in vectors.items():
        _write_vectors(root / f"emb/{path}{_PAIR_FORMATS[file_format]}", np.full((2, 3), shard, np.float32))
    for path, shard in metadata.items():
        target = root / folder / f"{path}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"shard": np.full(2, shard)}), target)
    beside: dict[str, Any] = {} if folder == "emb" else {"metadata_folder": root / folder}
    try:
        reader = EmbeddingReader(root / "emb", file_format, meta_columns="shard", **beside)
    except NoFilesError:
        return "nothing" if not vectors or not metadata else "lost"
    except MismatchError as error:
        lonely = [
            path
            for side, other in ((vectors, partners), (metadata, shards))
            for path in side
            if side[path] not in other
        ]
        if shards & partners and names not in _IN_FOLDERS:  # which word or number counts is not told in these
            is_named = [path in str(error) for path in lonely[:3]]
            return "refused" if lonely and (all(is_named) or len(lonely) > 3) else f"refused wrongly: {error}"
        return "refused"
    [(rows, frame)] = reader(reader.count, show_progress=False)
    is_pair = rows[:, 0].tolist() == frame["shard"].tolist() and shards == partners
    is_untold = names in _WORDS_ALONE + _IN_FOLDERS and not shards & partners  # cats beside dogs_meta
    return "paired" if is_pair or is_untold else f"paired wrongly: {vectors} {metadata}"


def _write_vectors(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, rows)
    elif path.suffix == ".npz":
        np.savez(path, embedding=rows)
    else:
        path.write_bytes(np.array(rows.shape, "<u4").tobytes() + rows.tobytes())


# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Try seeds; say which fail, and how many were compared with the reference."""
    first, stop = map(int, sys.argv[1:])
    warnings.simplefilter("error")
    failed, compared = 0, 0
    for seed in range(first, stop):
        trial = make_trial(seed)
        compared += _reference_is_right(trial)
        with tempfile.TemporaryDirectory() as root:
            try:
                check(trial, Path(root))
            except Exception as error:
                failed += 1
                sys.stdout.write(f"seed {seed}: {type(error).__name__}: {error}\n{trial}\n")
                sys.stdout.flush()
            outcome = check_pairs(seed, Path(root) / "pairs")
            if outcome not in ("paired", "refused", "nothing"):
                failed += 1
                sys.stdout.write(f"pairs {seed}: {outcome}\n")
    sys.stdout.write(f"{stop - first} collections, {compared} compared with the reference, {failed} failed\n")


if __name__ == "__main__":
    main()
