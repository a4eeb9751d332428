"""One collection in all the ways there are to read it: ``python -m tests.differential FIRST STOP`` tries seeds.

A ``Trial`` is made of an integer alone: which collection, and how it is read. ``check`` writes it and reads it by the
classic call, as array, as frame, by ``iter_batches`` and from a written copy. Each must be what numpy and pandas say,
bit for bit, and what the reference says where that one is right.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from dask.base import compute

from dask_embedding_reader import EmbeddingReader, iter_batches, verify_embeddings, write_embeddings
from tests.support import (
    COLUMNS,
    FORMATS,
    Collection,
    Rows,
    assert_batches,
    assert_same_frame,
    assert_same_rows,
    random_rows,
    write_collection,
)

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
    }
    return Trial(
        seed=seed,
        format_name=format_name,
        file_rows=file_rows,
        dimension=dimension,
        dtype=dtype,
        columns=rng.permutation(sorted(_RIGHT_COLUMNS if plain else COLUMNS))[:wide].tolist() if metadata else [],
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
    collection = write_collection(
        root,
        trial.format_name,
        file_rows=trial.file_rows,
        dimension=trial.dimension,
        dtype=trial.dtype,
        columns=trial.columns,
        row_group_rows=trial.row_group_rows,
        parquet_options=trial.parquet_options,
        vectors=_with_special_values,
        seed=trial.seed,
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
    assert verify_embeddings(folder).empty
    assert EmbeddingReader.from_manifest(folder / ".manifest.embeddings").count == len(collection)


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
    sys.stdout.write(f"{stop - first} collections, {compared} compared with the reference, {failed} failed\n")


if __name__ == "__main__":
    main()
