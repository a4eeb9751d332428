"""What every format must do, run over every way of storing a collection in ``support.FORMATS``."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from dask.base import compute, tokenize

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import ArgumentError, ColumnError, MismatchError
from tests.support.collections import (
    FORMATS,
    WITH_METADATA,
    Collection,
    Part,
    assert_batches,
    assert_same_frame,
    assert_same_rows,
    expected_frame,
    vectors_as,
    write_collection,
    write_parquet,
)

#: Ranges over 40 rows in files of 7, 0, 12, 1 and 20: inside a file, across files, on edges, beyond the end, empty.
RANGES = [(0, None), (0, 1), (3, 6), (5, 29), (7, 19), (19, 20), (20, 40), (39, 40), (30, 1000), (12, 12), (40, 40)]


#: A few columns, of dtypes that go different ways: numpy, masked, string, time zone, Arrow.
SOME_COLUMNS = ["id", "rank", "score", "caption", "posted", "tags"]


@pytest.fixture(scope="module", params=FORMATS)
def collection(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """40 rows in files of 7, 0, 12, 1 and 20, row groups of at most 5, some metadata columns."""
    root = tmp_path_factory.mktemp("collection")
    return write_collection(root, request.param, row_group_rows=5, columns=SOME_COLUMNS)


@pytest.fixture
def reader(collection: Collection) -> EmbeddingReader:
    """A fresh reader of the collection."""
    opened: EmbeddingReader = collection.open()
    return opened


@pytest.fixture(scope="module", params=WITH_METADATA)
def described(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """The same of the formats that hold metadata, with every kind of metadata column."""
    return write_collection(tmp_path_factory.mktemp("described"), request.param, row_group_rows=5)


# ------------------------------------------------------------------------------------------------------- attributes


def test_attributes_describe_the_collection(collection: Collection, reader: EmbeddingReader) -> None:
    assert reader.count == len(reader) == 40
    assert reader.dimension == 4
    assert reader.dtype == np.dtype("float32")
    assert reader.dtype.isnative
    assert reader.byte_per_item == 16
    assert reader.total_size == 640
    assert reader.nb_files == 4, "the empty file does not count"
    assert reader.max_file_size == 320
    assert reader.embeddings_folder == str(collection.folder)


def test_attributes_are_plain_python_values(reader: EmbeddingReader) -> None:
    for name in ("count", "dimension", "byte_per_item", "total_size", "nb_files", "max_file_size"):
        assert type(getattr(reader, name)) is int, name
    assert isinstance(reader.dtype, np.dtype)


def test_headers_that_do_not_fit_their_file_are_seen(reader: EmbeddingReader) -> None:
    """As a saved manifest may hold them, which anybody can write."""
    vectors, files = reader.manifest.format.vectors, reader.manifest.vectors
    for number in range(len(files)):
        header = files.header(number)
        layout, file = header.layout, header.file
        assert vectors.check_header(header)
        wrong = [header._replace(layout=(*layout, 1)), header._replace(rows=header.rows + 1_000)]
        if len(layout) in (1, 2):
            wrong.append(header._replace(layout=layout[:-1]))
        if len(layout) == 2:  # where the vectors begin, and how they lie
            wrong += [header._replace(layout=other) for other in ((float(layout[0]), layout[1]), (layout[0], 1))]
            wrong += [header._replace(layout=(-1, layout[1]))]
        if len(layout) > 1:
            sizes = {
                size: header._replace(file=file._replace(version=file.version._replace(size=size)))
                for size in (-1, 0, 10)
            }
            assert vectors.check_header(sizes.pop(-1)), "storages need not tell it"
            wrong += sizes.values() if header.rows else ()
        assert not any(map(vectors.check_header, wrong))


def test_embeddings_folder_is_the_argument_itself(collection: Collection) -> None:
    for argument in (collection.folder, [str(collection.folder)], f"{collection.folder}/"):
        assert collection.open(embeddings_folder=argument).embeddings_folder is argument


def test_locate_finds_the_file_of_every_row(collection: Collection, reader: EmbeddingReader) -> None:
    def resolved(found: tuple[str, int]) -> tuple[str, int]:
        return os.path.realpath(found[0].removeprefix("file://")), found[1]

    assert [resolved(reader.locate(row)) for row in range(40)] == [collection.locate(row) for row in range(40)]
    assert reader.locate(-1) == reader.locate(39)
    assert reader.locate(-40) == reader.locate(0)
    assert type(reader.locate(np.int64(3))[1]) is int


@pytest.mark.parametrize("row", [40, -41, 10**12])
def test_locate_refuses_rows_that_are_not_there(reader: EmbeddingReader, row: int) -> None:
    with pytest.raises(ArgumentError, match="40"):
        reader.locate(row)


def test_repr_is_short_and_says_what_it_is(reader: EmbeddingReader) -> None:
    assert "40" in repr(reader)
    assert "float32" in repr(reader)
    assert len(repr(reader)) < 500


# ------------------------------------------------------------------------------------------------------------ array


def test_array_of_any_range_equals_the_rows(collection: Collection, reader: EmbeddingReader) -> None:
    for start, end in RANGES:
        x = reader.to_dask_array(start, end)
        expected = collection.rows[start:end]
        assert isinstance(x, da.Array)
        assert x.shape == expected.shape
        assert x.dtype == expected.dtype
        assert x.chunks[1] == (4,)
        assert_same_rows(x.compute(), expected)


def test_chunks_are_pieces_of_one_file_and_no_larger_than_asked(
    collection: Collection, reader: EmbeddingReader
) -> None:
    for max_piece_size in (None, 1, 3, 5, 8, 1000):
        x = reader.to_dask_array(2, 38, max_piece_size=max_piece_size)
        lengths = x.chunks[0]
        assert sum(lengths) == 36
        assert min(lengths) > 0
        assert max(lengths) <= (max_piece_size or 40)
        cuts = {2 + int(cut) for cut in np.cumsum((0, *lengths))}
        assert set(collection.boundaries) & set(range(2, 38)) <= cuts, "a chunk crosses from file to file"
        assert_same_rows(x.compute(), collection.rows[2:38])


def test_array_dtype_is_cast_lazily_when_asked(collection: Collection, reader: EmbeddingReader) -> None:
    for dtype in ("float16", "float64"):
        x = reader.to_dask_array(dtype=dtype)
        assert x.dtype == np.dtype(dtype)
        assert_same_rows(x.compute(), collection.rows.astype(dtype))
        assert_same_rows(x[3:9].compute(), collection.rows[3:9].astype(dtype))


SLICES: dict[str, Any] = {
    "range": slice(10, 20),
    "tail": slice(-5, None),
    "step": slice(None, None, 7),
    "reversed": slice(None, None, -3),
    "list": [3, 1, 2],
    "list with repeats across files": [39, 0, 0, 19, 20],
    "negative list": [-1, -40],
    "one row": 23,
    "last row": -1,
    "empty": slice(5, 5),
    "columns": (slice(None), slice(1, 3)),
    "one column": (slice(4, 30), 2),
    "one cell": (17, 3),
    "rows and listed columns": (slice(2, 33, 2), [2, 0]),
    "new axis": (slice(6, 9), None),
    "booleans": np.arange(40) % 3 == 0,
}


def test_array_slices_like_numpy(collection: Collection, reader: EmbeddingReader) -> None:
    x = reader.to_dask_array(max_piece_size=3)
    for name, index in SLICES.items():
        expected = collection.rows[index]
        actual = x[index].compute()
        assert actual.shape == expected.shape, name
        assert actual.dtype == expected.dtype, name
        np.testing.assert_array_equal(actual, expected, err_msg=name)


def test_slices_of_slices_and_of_casts(collection: Collection, reader: EmbeddingReader) -> None:
    x = reader.to_dask_array(max_piece_size=6)
    np.testing.assert_array_equal(x[5:35][::2][3:8].compute(), collection.rows[5:35][::2][3:8])
    np.testing.assert_array_equal((x.astype("f8") * 2)[[31, 4]].compute(), collection.rows.astype("f8")[[31, 4]] * 2)
    np.testing.assert_array_equal(x[x[:, 0] > 0].compute(), collection.rows[collection.rows[:, 0] > 0])


def test_reductions_and_products_match_numpy(collection: Collection, reader: EmbeddingReader) -> None:
    x = reader.to_dask_array(max_piece_size=5)
    rows = collection.rows.astype("float64")
    weights = np.arange(8.0).reshape(4, 2)
    mean, top, product, norms = compute(
        x.mean(axis=0, dtype="float64"), x.max(), x @ weights, da.linalg.norm(x, axis=1)
    )
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-12)
    assert top == collection.rows.max()
    np.testing.assert_allclose(product, rows @ weights, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ frame


def test_frame_of_any_range_equals_the_metadata(collection: Collection, reader: EmbeddingReader) -> None:
    for start, end in RANGES:
        frame = reader.to_dask_dataframe(start, end)
        assert isinstance(frame, dd.DataFrame)
        assert list(frame.columns) == collection.columns, "columns as asked; i is the index, not a column"
        assert_same_frame(frame.compute(), collection.frame(start, end))


def test_frame_has_every_kind_of_column_exactly(described: Collection) -> None:
    assert_same_frame(described.open().to_dask_dataframe().compute(), described.frame())
    assert_batches(described.open()(17), described, 17)


@pytest.mark.parametrize("max_piece_size", [None, 3, 8])
def test_chunk_and_partition_are_the_same_rows(
    collection: Collection, reader: EmbeddingReader, max_piece_size: int | None
) -> None:
    for start, end in ((0, None), (4, 33), (20, 20)):
        x = reader.to_dask_array(start, end, max_piece_size=max_piece_size)
        frame = reader.to_dask_dataframe(start, end, max_piece_size=max_piece_size)
        parts = compute(*frame.to_delayed())
        assert tuple(len(part) for part in parts) == x.chunks[0]
        place = start
        for part in parts:
            assert_same_frame(part, collection.frame(place, place + len(part)))
            place += len(part)


@pytest.mark.parametrize("format_name", WITH_METADATA)
def test_row_groups_and_pieces_of_equal_number_but_other_bounds(format_name: str, tmp_path: Path) -> None:
    # Two row groups, of 4 and 1; two pieces, of 3 and 2: as many partitions either way, so counting tells nothing.
    reader = write_collection(tmp_path, format_name, file_rows=[5], columns=["id"], row_group_rows=4).open()
    for max_piece_size in (3, 4):
        x = reader.to_dask_array(max_piece_size=max_piece_size)
        parts = compute(*reader.to_dask_dataframe(max_piece_size=max_piece_size).to_delayed())
        assert tuple(len(part) for part in parts) == x.chunks[0]


def test_divisions_are_known_and_are_the_rows_where_partitions_begin(reader: EmbeddingReader) -> None:
    frame = reader.to_dask_dataframe(4, 33, max_piece_size=3)
    lengths = reader.to_dask_array(4, 33, max_piece_size=3).chunks[0]
    assert frame.known_divisions
    starts = [4 + int(cut) for cut in np.cumsum((0, *lengths[:-1]))]
    # Dask's last division is the last row itself.
    assert list(frame.divisions) == [*starts, 32]
    assert frame.index.name == "i"


def test_rows_are_found_by_their_number(collection: Collection, reader: EmbeddingReader) -> None:
    frame = reader.to_dask_dataframe(max_piece_size=4)
    assert_same_frame(frame.loc[6:21].compute(), collection.frame(6, 22))


def test_empty_range_is_one_empty_partition_with_the_dtypes(described: Collection) -> None:
    frame = described.open().to_dask_dataframe(12, 12)
    assert frame.npartitions == 1
    assert frame.dtypes.to_dict() == described.metadata.dtypes.to_dict()
    assert_same_frame(frame.compute(), described.frame(12, 12))


def test_lazy_dtypes_are_those_of_every_partition(described: Collection) -> None:
    frame = described.open().to_dask_dataframe(max_piece_size=1)
    expected = described.metadata.dtypes.to_dict()
    assert frame.dtypes.to_dict() == expected
    assert len(frame.to_delayed()) == 40
    for part in compute(*frame.to_delayed()):
        assert part.dtypes.to_dict() == expected
        assert part.index.dtype == np.int64


def test_columns_can_be_chosen_filtered_and_counted(described: Collection) -> None:
    frame = described.open().to_dask_dataframe(max_piece_size=6)
    whole = described.frame()
    assert_same_frame(frame[["caption", "id"]].compute(), whole[["caption", "id"]])
    chosen = frame[frame["rank"] > 50][["id", "rank"]].compute()
    assert_same_frame(chosen, whole[(whole["rank"] > 50).fillna(False)][["id", "rank"]])
    assert frame["id"].sum().compute() == whole["id"].sum()
    assert frame["caption"].isna().sum().compute() == whole["caption"].isna().sum()
    assert len(frame) == 40


def test_columns_come_in_the_order_asked_for(described: Collection) -> None:
    names = ["text", "id", "liked"]
    reader = described.open(meta_columns=names)
    assert list(reader.to_dask_dataframe().columns) == names
    assert_same_frame(reader.to_dask_dataframe().compute(), described.frame()[names])
    _, metadata = next(reader(40))
    assert list(metadata.columns) == [*names, "i"]


def test_one_column_may_be_a_string(described: Collection) -> None:
    reader = described.open(meta_columns="caption")
    assert_same_frame(reader.to_dask_dataframe().compute(), described.frame()[["caption"]])
    assert list(next(reader(3))[1].columns) == ["caption", "i"]


def test_without_metadata_columns_there_is_only_the_row_number(collection: Collection) -> None:
    reader = collection.open(meta_columns=None)
    frame = reader.to_dask_dataframe(3, 30, max_piece_size=4)
    assert list(frame.columns) == []
    assert_same_frame(frame.compute(), collection.frame(3, 30)[[]])
    for _, metadata in reader(16, start=3):
        assert list(metadata.columns) == ["i"]
        assert metadata["i"].dtype == np.int64


def test_a_column_named_i_cannot_be_asked_for(described: Collection) -> None:
    with pytest.raises(ColumnError, match="row number"):
        described.open(meta_columns=["id", "i"])


# ---------------------------------------------------------------------------------------------------------- batches


def test_batches_have_exactly_the_size_and_the_last_what_is_left(
    collection: Collection, reader: EmbeddingReader
) -> None:
    for batch_size in (1, 7, 20, 39, 40, 41, 10**6):
        assert_batches(reader(batch_size), collection, batch_size)


def test_batches_of_any_range(collection: Collection, reader: EmbeddingReader) -> None:
    for start, end in RANGES:
        assert_batches(reader(6, start, end), collection, 6, start, end)


def test_pieces_and_their_number_change_nothing(collection: Collection, reader: EmbeddingReader) -> None:
    for max_piece_size in (1, 5, 100):
        for parallel_pieces in (1, 30):
            batches = reader(9, 1, 38, max_piece_size, parallel_pieces, False, 2**20)
            assert_batches(batches, collection, 9, 1, 38)


def test_any_memory_limit_gives_the_same_rows(collection: Collection, reader: EmbeddingReader) -> None:
    for limit in (1, 100, 2**12, 2**40):
        with warnings.catch_warnings():
            # A limit below one batch cannot be kept, and a warning may say so.
            warnings.filterwarnings("ignore", message=".*max_ram_usage_in_bytes", category=UserWarning)
            assert_batches(reader(11, max_ram_usage_in_bytes=limit), collection, 11)


def test_batches_have_the_dtype_asked_for(collection: Collection, reader: EmbeddingReader) -> None:
    for dtype in (None, "float64", np.float16, np.dtype("float32")):
        assert_batches(reader(13, dtype=dtype), collection, 13, dtype=dtype)


def test_batches_keep_their_values_while_the_reading_goes_on(collection: Collection, reader: EmbeddingReader) -> None:
    # Reused buffers must never be handed out twice.
    batches = list(reader(3, max_piece_size=2))
    np.testing.assert_array_equal(np.concatenate([embeddings for embeddings, _ in batches]), collection.rows)


def test_views_of_a_batch_keep_its_values(collection: Collection, reader: EmbeddingReader) -> None:
    # Only a view stays alive, as after torch.from_numpy(batch)[1:]: its memory is still in use.
    views = [(rows.data, rows[:, 1], rows.reshape(-1)[::2].view("u4")) for rows, _ in reader(4, max_piece_size=2)]
    for place, (block, column, bits) in zip(range(0, 40, 4), views, strict=True):
        expected = collection.rows[place : place + 4]
        np.testing.assert_array_equal(np.asarray(block), expected)
        np.testing.assert_array_equal(column, expected[:, 1])
        np.testing.assert_array_equal(bits, expected.reshape(-1)[::2].view("u4"))


def test_writing_into_a_batch_reaches_no_other(collection: Collection, reader: EmbeddingReader) -> None:
    for dtype in (np.float32, None):
        place = 0
        for embeddings, metadata in reader(4, dtype=dtype):
            np.testing.assert_array_equal(embeddings, collection.rows[place : place + 4])
            embeddings[:] = -7
            metadata["i"] = -1
            place += 4
        np.testing.assert_array_equal(reader.to_dask_array().compute(), collection.rows)


def test_naming_the_axes_of_a_batch_reaches_no_other(reader: EmbeddingReader) -> None:
    frames = [frame for _, frame in reader(batch_size=5, show_progress=False)]
    frames[0].index.name = frames[0].columns.name = "mine"
    assert {name for frame in frames[1:] for name in (frame.index.name, frame.columns.name)} == {None}


def test_an_iterator_is_its_own_iterator_and_ends_for_good(reader: EmbeddingReader) -> None:
    batches = reader(30)
    assert iter(batches) is batches
    assert [len(embeddings) for embeddings, _ in batches] == [30, 10]
    assert next(batches, None) is None
    assert next(batches, None) is None


def test_a_loop_left_and_taken_up_again_goes_on(collection: Collection, reader: EmbeddingReader) -> None:
    batches = reader(8)
    for _, metadata in batches:
        assert metadata["i"].iloc[0] == 0
        break
    np.testing.assert_array_equal(next(batches)[0], collection.rows[8:16])


def test_several_iterators_at_once(collection: Collection, reader: EmbeddingReader) -> None:
    settings = [(5, 0, None), (3, 8, 30), (40, 0, 40), (1, 17, 25)]
    iterators = [reader(size, start, end, max_piece_size=2) for size, start, end in settings]
    gathered: list[list[Any]] = [[] for _ in settings]
    alive = list(range(len(settings)))
    while alive:
        for k in list(alive):
            batch = next(iterators[k], None)
            if batch is None:
                alive.remove(k)
            else:
                gathered[k].append(batch)
    for batches, (size, start, end) in zip(gathered, settings, strict=True):
        assert_batches(iter(batches), collection, size, start, end)


def test_iterators_in_several_threads_at_once(collection: Collection, reader: EmbeddingReader) -> None:
    def read(batch_size: int) -> None:
        assert_batches(reader(batch_size, max_piece_size=3), collection, batch_size)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, [1, 7, 7, 20]))


def test_numpy_and_integral_float_arguments(collection: Collection) -> None:
    reader: Any = collection.open()  # type hints ask for int; programs compute their numbers with numpy
    assert_batches(reader(1e1, np.int64(2), np.uint8(30), np.int32(4), np.int8(2)), collection, 10, 2, 30)
    x = reader.to_dask_array(np.int64(2), np.int16(9), max_piece_size=np.int32(2))
    assert_same_rows(x.compute(), collection.rows[2:9])


def test_nothing_is_printed(collection: Collection, capfd: pytest.CaptureFixture[str]) -> None:
    reader = collection.open()
    for _ in reader(7, show_progress=True):
        pass
    reader.to_dask_array().compute()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", ""), "what takes a moment shows no progress"


# ------------------------------------------------------------------------------------------- pickles, keys, schedulers


def test_reader_array_and_frame_survive_pickling(collection: Collection, reader: EmbeddingReader) -> None:
    reader, x, frame = pickle.loads(
        pickle.dumps((reader, reader.to_dask_array(max_piece_size=9), reader.to_dask_dataframe(max_piece_size=9)))
    )
    assert (reader.count, reader.dimension, reader.nb_files) == (40, 4, 4)
    assert_batches(reader(7, 2), collection, 7, 2)
    assert_same_rows(x.compute(), collection.rows)
    assert_same_frame(frame.compute(), collection.frame())


def test_schedulers_agree(collection: Collection, reader: EmbeddingReader) -> None:
    x = reader.to_dask_array(max_piece_size=7)
    frame = reader.to_dask_dataframe(max_piece_size=7)
    for scheduler in ("synchronous", "threads"):
        # Separately: Dask warns when arrays and frames are computed in one call, whatever they are made of.
        assert_same_rows(x.compute(scheduler=scheduler), collection.rows)
        assert_same_frame(frame.compute(scheduler=scheduler), collection.frame())


def test_other_processes_compute_the_same(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for format_name in ("npy", "parquet-list", "parquet_npy"):
            collection = write_collection(tmp_path / format_name, format_name, file_rows=[3, 2])
            reader = collection.open()
            assert_same_rows(reader.to_dask_array().compute(pool=pool), collection.rows)
            assert_same_frame(reader.to_dask_dataframe().compute(pool=pool), collection.frame())


def test_keys_are_equal_for_equal_questions_only(collection: Collection, reader: EmbeddingReader) -> None:
    x = reader.to_dask_array(max_piece_size=7)
    assert x.name.startswith("embeddings-")
    assert collection.open().to_dask_array(max_piece_size=7).name == x.name
    others = [
        reader.to_dask_array(1, max_piece_size=7),
        reader.to_dask_array(0, 39, max_piece_size=7),
        reader.to_dask_array(max_piece_size=6),
        reader.to_dask_array(max_piece_size=7, dtype="float64"),
    ]
    assert len({x.name, *(other.name for other in others)}) == 5
    frame = reader.to_dask_dataframe(max_piece_size=7)
    assert collection.open().to_dask_dataframe(max_piece_size=7)._name == frame._name
    assert reader.to_dask_dataframe(max_piece_size=6)._name != frame._name


def test_readers_are_equal_for_equal_questions_only(collection: Collection, reader: EmbeddingReader) -> None:
    same = [collection.open(), pickle.loads(pickle.dumps(reader))]
    token = tokenize(reader)
    list(reader(5, show_progress=False))
    reader.to_dask_array()[:3].compute()
    list(reader(5, dtype=None, show_progress=False))
    for other in (*same, reader):
        assert tokenize(other) == token
        assert tokenize({"a": [other]}) == tokenize({"a": [reader]})
        assert other == reader
        assert len({other, reader}) == 1
        assert tokenize(other.manifest) == tokenize(reader.manifest)
    assert reader != reader.manifest
    if collection.columns:
        fewer = collection.open(meta_columns=collection.columns[:1])
        assert tokenize(fewer) != token
        assert fewer != reader


@pytest.mark.parametrize("format_name", ["npy", "parquet-list"])
def test_readers_differ_when_a_file_does(format_name: str, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, format_name)
    before = collection.open()
    changed = min(collection.folder.iterdir())
    os.utime(changed, ns=(1, 1))
    after = collection.open()
    assert tokenize(after) != tokenize(before)
    assert after != before


@pytest.mark.parametrize("format_name", FORMATS)
def test_keys_change_when_a_file_does(format_name: str, tmp_path: Path) -> None:
    before = write_collection(tmp_path, format_name, file_rows=[4, 5], columns=["id"])
    reader = before.open()
    names = reader.to_dask_array().name, reader.to_dask_dataframe()._name
    after = write_collection(tmp_path, format_name, file_rows=[4, 5], columns=["id"], seed=1)
    # Written in the same tick of a coarse clock, same size: only the time of change can tell.
    for path in tmp_path.rglob("*.*"):
        os.utime(path, ns=(10**18, 10**18))
    reader = after.open()
    assert reader.to_dask_array().name != names[0]
    if FORMATS[format_name].metadata:
        assert reader.to_dask_dataframe()._name != names[1]
    assert_same_rows(reader.to_dask_array().compute(), after.rows)


# ------------------------------------------------------------------------------------------------------ dtypes, nulls


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_stored_dtype_is_kept_and_cast_once(format_name: str, tmp_path: Path) -> None:
    for dtype in FORMATS[format_name].dtypes:
        collection = write_collection(tmp_path / dtype, format_name, file_rows=[5, 0, 6], dtype=dtype, columns=["id"])
        reader = collection.open()
        assert reader.dtype == np.dtype(dtype)
        assert reader.byte_per_item == 4 * np.dtype(dtype).itemsize
        assert_same_rows(reader.to_dask_array().compute(), collection.rows)
        assert_batches(reader(4), collection, 4)
        assert_batches(reader(4, dtype=None), collection, 4, dtype=None)


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_dimension(format_name: str, tmp_path: Path) -> None:
    for dimension in (1, 3, 513):
        root = tmp_path / str(dimension)
        collection = write_collection(root, format_name, file_rows=[1, 3], dimension=dimension, columns=["id"])
        reader = collection.open()
        assert reader.dimension == dimension
        assert_same_rows(reader.to_dask_array().compute(), collection.rows)
        assert_batches(reader(3), collection, 3)


@pytest.mark.parametrize("format_name", FORMATS)
def test_special_values_pass_unchanged(format_name: str, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, format_name, file_rows=[4], dimension=2, columns=[])
    special = np.array([[np.nan, -0.0], [np.inf, -np.inf], [1e-45, 3.4e38], [0.1, -1]], dtype=np.float32)

    FORMATS[format_name].write(tmp_path, Part(0, special, pa.table({"id": [1, 2, 3, 4]})))
    actual = collection.open().to_dask_array().compute()
    assert actual.tobytes() == special.tobytes(), "to the bit"


@pytest.mark.parametrize("format_name", FORMATS)
def test_empty_files_anywhere_leave_no_trace(format_name: str, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, format_name, file_rows=[0, 0, 3, 0, 2, 0], columns=["id", "rank"])
    reader = collection.open()
    assert (reader.count, reader.nb_files) == (5, 2)
    assert reader.to_dask_array().chunks[0] == (3, 2)
    assert_same_rows(reader.to_dask_array().compute(), collection.rows)
    assert_same_frame(reader.to_dask_dataframe().compute(), collection.frame())
    assert_batches(reader(2), collection, 2)


@pytest.mark.parametrize("format_name", WITH_METADATA)
def test_ids_beyond_2_to_the_53_survive_beside_floats(format_name: str, tmp_path: Path) -> None:
    tables = [
        pa.table({"id": [2**53 + 1, 2**63 - 1], "score": [0.5, 1.5]}),
        pa.table({"id": [-(2**63)], "score": [2.5]}),
    ]
    reader = write_collection(tmp_path, format_name, file_rows=[2, 1], tables=tables).open()
    ids = [2**53 + 1, 2**63 - 1, -(2**63)]
    assert reader.to_dask_dataframe()["id"].compute().tolist() == ids
    _, metadata = next(reader(3))
    assert metadata["id"].tolist() == ids
    assert metadata["id"].dtype == np.int64


@pytest.mark.parametrize("format_name", WITH_METADATA)
def test_a_null_anywhere_decides_the_dtype_everywhere(format_name: str, tmp_path: Path) -> None:
    plain = pa.table({"n": pa.array([1, 2], pa.int64()), "f": [0.5, 1.0], "b": [True, False], "s": ["a", "b"]})
    nulls = pa.table(
        {
            "n": pa.array([2**53 + 1, None], pa.int64()),
            "f": pa.array([None, 2.0], pa.float64()),
            "b": pa.array([None, True], pa.bool_()),
            "s": pa.array([None, ""], pa.string()),
        }
    )
    collection = write_collection(tmp_path, format_name, file_rows=[2, 2, 2], tables=[plain, plain, nulls])
    reader = collection.open()
    frame = reader.to_dask_dataframe()
    dtypes = {"n": pd.Int64Dtype(), "f": np.dtype(float), "b": pd.BooleanDtype(), "s": pd.StringDtype("pyarrow")}
    assert frame.dtypes.to_dict() == dtypes
    assert all(part.dtypes.to_dict() == dtypes for part in compute(*frame.to_delayed()))
    of_batches = {**dtypes, "s": np.dtype(object)}
    assert all(metadata.drop(columns="i").dtypes.to_dict() == of_batches for _, metadata in reader(1))
    assert_same_frame(frame.compute(), collection.frame())
    # A range that touches no null has the dtypes of the collection too.
    assert reader.to_dask_dataframe(0, 2).compute().dtypes.to_dict() == dtypes


@pytest.mark.parametrize("format_name", WITH_METADATA)
def test_types_that_differ_between_files_widen_as_one(format_name: str, tmp_path: Path) -> None:
    tables = [
        pa.table(
            {
                "n": pa.array([1, 2], pa.int32()),
                "u": pa.array([1, 255], pa.uint8()),
                "f": pa.array([0.5, 0.1], pa.float32()),
                "s": pa.array(["a", None], pa.string()),
                "late": pa.nulls(2),
                "when": pa.nulls(2),
            }
        ),
        pa.table(
            {
                "n": pa.array([2**53 + 1], pa.int64()),
                "u": pa.array([2**32 - 1], pa.uint32()),
                "f": pa.array([0.1], pa.float64()),
                "s": pa.array(["b"], pa.large_string()),
                "late": pa.array([3], pa.int8()),
                "when": pa.array([5], pa.timestamp("us")),
            }
        ),
    ]
    collection = write_collection(tmp_path, format_name, file_rows=[2, 1], tables=tables)
    expected = {"n": "int64", "u": "uint32", "f": "float64", "s": "string", "late": "Int8", "when": "datetime64[us]"}
    reader = collection.open()
    for part in compute(*reader.to_dask_dataframe().to_delayed()):
        assert {name: str(dtype) for name, dtype in part.dtypes.items()} == expected
    assert_same_frame(reader.to_dask_dataframe().compute(), collection.frame())
    assert_batches(reader(2), collection, 2)


@pytest.mark.parametrize("format_name", WITH_METADATA)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.array([1], pa.int64()), pa.array(["1"], pa.string())),
        (pa.array([True]), pa.array([1], pa.int8())),
    ],
    ids=["int and string", "bool and int"],
)
def test_types_that_do_not_fit_are_refused(format_name: str, first: pa.Array, second: pa.Array, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, format_name, file_rows=[1, 0], columns=[])
    for number, column in enumerate((first, second)):
        rows = np.ones((1, 4), dtype=np.float32)
        FORMATS[format_name].write(tmp_path, Part(number, rows, pa.table({"mixed": column})))
    with pytest.raises(MismatchError, match=r"(?s)mixed.*") as caught:
        collection.open(meta_columns=["mixed"]).to_dask_dataframe()
    assert str(first.type) in str(caught.value)
    assert str(second.type) in str(caught.value)
    assert re.search(r"1\.(parquet|arrow)", str(caught.value))


def test_without_statistics_no_null_can_be_ruled_out(tmp_path: Path) -> None:

    table = pa.table({"n": [1, 2], "embedding": vectors_as(np.ones((2, 3), dtype=np.float32), "list")})
    write_parquet(tmp_path / "a.parquet", table, write_statistics=False)
    reader = EmbeddingReader(str(tmp_path), "parquet", meta_columns=["n"])
    assert reader.to_dask_dataframe().compute().dtypes["n"] == pd.Int64Dtype()
    # A column that the schema itself declares free of nulls needs no statistics.
    schema = pa.schema([pa.field("n", pa.int64(), nullable=False), table.schema.field("embedding")])
    write_parquet(tmp_path / "a.parquet", table.cast(schema), write_statistics=False)
    reader = EmbeddingReader(str(tmp_path), "parquet", meta_columns=["n"])
    assert reader.to_dask_dataframe().compute().dtypes["n"] == np.int64


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Paris"])
def test_times_keep_their_unit_and_zone(unit: str, zone: str | None, tmp_path: Path) -> None:
    ticks = pa.array([0, None, 2**40 + 1], pa.int64())
    table = pa.table({"when": ticks.cast(pa.timestamp(unit, zone)), "long": ticks.cast(pa.duration(unit))})
    collection = write_collection(tmp_path, "parquet_npy", file_rows=[3], tables=[table])
    frame = collection.open().to_dask_dataframe().compute()
    assert_same_frame(frame, expected_frame(table))
    assert frame["when"].dt.unit == unit
    assert frame["long"].dt.unit == unit


def test_declared_dtype_of_binary_vectors_is_required_and_refused_elsewhere(tmp_path: Path) -> None:
    binary = write_collection(tmp_path / "binary", "parquet-binary", file_rows=[2], columns=[])
    with pytest.raises(ArgumentError, match="embedding_dtype"):
        binary.open(embedding_dtype=None)
    for name in ("npy", "parquet-list", "parquet_npy"):
        other = write_collection(tmp_path / name, name, file_rows=[2], columns=[])
        with pytest.raises(ArgumentError, match="embedding_dtype"):
            other.open(embedding_dtype="float32")


def test_another_name_of_the_vector_column(tmp_path: Path) -> None:

    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    columns = {"embedding": vectors_as(rows * 0, "list"), "image vector": vectors_as(rows, "list"), "id": [1, 2]}
    write_parquet(tmp_path / "a.parquet", pa.table(columns))
    reader = EmbeddingReader(str(tmp_path), "parquet", "image vector", ["id"])
    assert_same_rows(reader.to_dask_array().compute(), rows)
