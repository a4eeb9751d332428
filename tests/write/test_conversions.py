"""From every format to every other one: what each can hold arrives, what it cannot is refused before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dask_embedding_reader import ArgumentError, EmbeddingReader, write_embeddings
from dask_embedding_reader.formats.registry import format_names, get_format
from tests.support.collections import assert_same_frame

FORMATS = format_names()
ROWS = np.random.default_rng(0).standard_normal((23, 5)).astype(np.float32)
FRAME = pd.DataFrame(
    {
        "text": pd.array([None if row % 5 == 1 else f"row {row} 🐎" for row in range(23)], "string"),
        "count": pd.array([pd.NA if row % 4 == 1 else row - 9 for row in range(23)], "Int16"),
        "day": pd.date_range("2024-02-27", periods=23, freq="D", unit="ms"),
    }
)
CASTS: dict[Any, dict[str, Any]] = {
    np.float32: {},
    np.float16: {"dtype": "float16"},
    np.int8: {"dtype": "int8", "scale": 0.05},
}


def expected(dtype: Any) -> np.ndarray[Any, Any]:
    """The vectors of another dtype; numbers of an integer one are steps of 0.05."""
    return np.rint(ROWS / np.float64(0.05)).astype(np.int8) if dtype is np.int8 else ROWS.astype(dtype)


def write(folder: Path, file_format: str, rows: np.ndarray[Any, Any]) -> EmbeddingReader:
    """Some files of a format, with all metadata that it holds."""
    with_frame = get_format(file_format).metadata != "none"
    write_embeddings(rows, folder, file_format, FRAME if with_frame else None, rows_per_file=9)
    return EmbeddingReader(folder, meta_columns="*" if with_frame else None)


@pytest.mark.parametrize("source", FORMATS)
def test_from_every_format_to_every_other_one(source: str, tmp_path: Path) -> None:
    whole = write(tmp_path / "source", source, ROWS)
    frame = whole.to_dask_dataframe().compute()
    assert list(frame.columns) == ([] if get_format(source).metadata == "none" else list(FRAME.columns))
    for number, target in enumerate(FORMATS, FORMATS.index(source)):
        layout, folder = get_format(target), tmp_path / f"to {target}"
        if layout.metadata == "none" and len(frame.columns):
            with pytest.raises(ArgumentError, match=rf'{target} files hold no metadata; write file_format="parquet_'):
                write_embeddings(whole, folder, target)
            assert not folder.exists()
            reader = EmbeddingReader(tmp_path / "source")
        elif layout.metadata == "beside" and not len(frame.columns):
            with pytest.raises(ArgumentError, match=f'no metadata to be written .*file_format="{layout.vectors.name}"'):
                write_embeddings(whole, folder, target)
            assert not folder.exists()
            continue
        else:
            reader = whole
        dtype = list(CASTS)[number % len(CASTS)]
        if layout.vectors.suffix_for(np.dtype(dtype)) is None:
            with pytest.raises(ArgumentError, match=f"hold no vectors of {np.dtype(dtype)}; .*npy"):
                write_embeddings(reader, folder, target, **CASTS[dtype])
            assert not folder.exists()
            dtype = np.float32
        write_embeddings(reader, folder, target, rows_per_file=7, **CASTS[dtype])
        written = EmbeddingReader(folder, meta_columns="*" if layout.metadata != "none" else None)
        assert (written.manifest.format.name, written.dtype) == (target, dtype)
        np.testing.assert_array_equal(written.to_dask_array().compute(), expected(dtype), strict=True)
        if layout.metadata != "none":
            assert_same_frame(written.to_dask_dataframe().compute(), frame)


@pytest.mark.parametrize("dtype", ["float64", "uint16", "complex64"])
def test_numbers_that_a_format_has_not_are_refused_before_anything_is_written(dtype: str, tmp_path: Path) -> None:
    rows, refused = np.abs(ROWS).astype(dtype), []
    source = write(tmp_path / "source", "npy", rows)
    for target in FORMATS:
        if get_format(target).metadata == "beside":
            continue
        if get_format(target).vectors.suffix_for(np.dtype(dtype)) is None:
            refused.append(target)
            remedy = "write" if dtype == "complex64" else "give dtype=, or write"
            with pytest.raises(ArgumentError, match=f'hold no vectors of {dtype}; {remedy} file_format="npy"'):
                write_embeddings(source, tmp_path / target, target)
            assert not (tmp_path / target).exists()
            continue
        write_embeddings(source, tmp_path / target, target)
        np.testing.assert_array_equal(EmbeddingReader(tmp_path / target).to_dask_array().compute(), rows, strict=True)
    assert {"fbin", "fvecs"} <= set(refused) <= {"fbin", "fvecs", "parquet", "arrow", "safetensors"}


VECTORS_ALONE = [name for name in FORMATS if get_format(name).metadata == "none"]


@pytest.mark.parametrize("file_format", VECTORS_ALONE)
def test_what_has_no_metadata_names_the_format_that_has_it_beside_the_same_files(
    file_format: str, tmp_path: Path
) -> None:
    reader = write(tmp_path / "source", file_format, ROWS)
    told = f'the {file_format} files of this reader have no columns .* read with file_format="parquet_{file_format}"'
    with pytest.raises(ArgumentError, match=told):
        reader.filter([("n", ">", 1)])
    with pytest.raises(ArgumentError, match=f'hold no metadata; write file_format="parquet_{file_format}" or "parq'):
        write_embeddings(ROWS, tmp_path / "out", file_format, FRAME)
    with pytest.warns(UserWarning, match=f'beside them use file_format="parquet_{file_format}"'):
        EmbeddingReader(tmp_path / "source", file_format, meta_columns=["n"])
    with pytest.warns(UserWarning, match=f'it is read with file_format="parquet_{file_format}"'):
        EmbeddingReader(tmp_path / "source", file_format, metadata_folder=str(tmp_path))
    for target in FORMATS:
        if get_format(target).vectors.suffix_for(np.dtype("complex64")) is None:
            told = 'hold no vectors of complex64; write file_format="parquet_npy"'
            with pytest.raises(ArgumentError, match=told):
                write_embeddings(ROWS.astype("complex64"), tmp_path / "out", target, FRAME)
    assert not (tmp_path / "out").exists()
