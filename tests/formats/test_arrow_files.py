"""Files of Arrow's IPC format: those of pyarrow and polars, what is read of them, and what is refused."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader import ColumnError, EmbeddingReader, FormatError, write_embeddings
from dask_embedding_reader._common.budget import cached_nbytes
from dask_embedding_reader.formats import arrow, ipc, ipc_columns
from dask_embedding_reader.formats.arrow_tables import iter_arrow_tables
from dask_embedding_reader.formats.ipc import read_index
from dask_embedding_reader.storage.local import LocalStore, file_info
from dask_embedding_reader.storage.store import StoredFile
from tests.support.collections import as_others_read, skipping_what_pyarrow_lacks
from tests.support.stores import Bucket, emptied_bucket

ROWS: npt.NDArray[Any] = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
WORDS = [None if row % 7 == 0 else f"a word that is longer than twelve letters {row}" for row in range(50)]


def vectors(rows: npt.NDArray[Any] = ROWS) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


def put(path: Path, batch_rows: int = 20, *, stream: bool = False, codec: Any = None, **columns: Any) -> Path:
    table = pa.table(columns)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, batch_rows)
    return path


@pytest.mark.parametrize("columns", [1, 50])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_kept_of_files_takes_no_more_than_is_counted(tmp_path: Path, stream: bool, columns: int) -> None:
    made: dict[str, Any] = {f"n{n}": pa.array(range(4_000)) for n in range(columns)}
    made["kind"] = pa.array(["a", "b"] * 2_000).dictionary_encode()
    path = put(tmp_path / "0.arrow", 2, stream=stream, **made)
    file = StoredFile(LocalStore(LocalFileSystem()), str(path), file_info(str(path)).version)
    read_index(file)  # imports
    ipc.INDICES.clear()
    before = cached_nbytes()
    tracemalloc.start()
    index = read_index(file)
    took, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index.batches) == 2_000
    assert took <= 1.2 * index.nbytes
    assert cached_nbytes() - before == index.nbytes  # it counts in every budget
    assert read_index(file) is index


def same(reader: EmbeddingReader, rows: npt.NDArray[Any] = ROWS) -> None:
    np.testing.assert_array_equal(reader.to_dask_array(max_piece_size=7).compute(), rows)
    [(got, _)] = reader.take([45, 3, 20, 19])(4, show_progress=False)
    np.testing.assert_array_equal(got, rows[[45, 3, 20, 19]])


@pytest.mark.parametrize("codec", ["uncompressed", "lz4", "zstd"])
def test_files_of_polars_and_pyarrow(tmp_path: Path, codec: Any) -> None:
    frame = pl.DataFrame(
        {
            "word": WORDS,
            "kind": pl.Series([f"k{row % 3}" for row in range(50)], dtype=pl.Categorical),
            "vector": pl.Series(ROWS.tolist(), dtype=pl.Array(pl.Float32, 4)),
        }
    )
    frame.write_ipc(tmp_path / "0.arrow", compression=codec)
    pyarrow.feather.write_feather(
        pa.table({"word": WORDS, "kind": frame["kind"].to_list(), "vector": vectors(ROWS + 1)}),
        str(tmp_path / "1.feather"),
        compression=codec,
        chunksize=20,
    )
    reader = EmbeddingReader(tmp_path, meta_columns="*")
    assert "100 x 4 float32 in 2 arrow files (column 'vector')" in repr(reader)
    np.testing.assert_array_equal(reader.to_dask_array().compute(), np.concatenate([ROWS, ROWS + 1]))
    read = reader.to_dask_dataframe().compute()
    assert [None if pd.isna(word) else word for word in read["word"]] == WORDS * 2
    assert read["kind"].tolist() == [f"k{row % 3}" for row in range(50)] * 2
    assert len(reader.filter([("kind", "==", "k1")])) == 34
    assert len(EmbeddingReader(tmp_path).filter([("kind", "==", "k1")])) == 34  # whose batches are not looked at


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_rows_of_text_of_polars_are_taken(tmp_path: Path, suffix: str) -> None:
    """Its text comes as views, here in two buffers, of which rows need but one."""
    frames = [
        pl.DataFrame({"n": range(first, first + 25), "word": WORDS[first : first + 25], "v": ROWS[first : first + 25]})
        for first in (0, 25)
    ]
    pl.concat(frames).rechunk().write_ipc(tmp_path / "0.arrow")
    if suffix == "parquet":
        with skipping_what_pyarrow_lacks():
            pq.write_table(pa.ipc.open_file(tmp_path / "0.arrow").read_all(), tmp_path / "0.parquet", 20)
        (tmp_path / "0.arrow").unlink()
    reader = EmbeddingReader(tmp_path, meta_columns="*")
    for rows in ([45, 3, 20, 19], [1, 2], [49]):
        taken = reader.take(rows).to_dask_dataframe().compute()
        assert taken["n"].tolist() == rows
        assert [None if pd.isna(word) else word for word in taken["word"]] == [WORDS[row] for row in rows]
    for _, frame in reader.shuffle(1)(7, show_progress=False):
        assert frame["word"].tolist() == [WORDS[row] for row in frame["n"]]


def test_files_for_pyarrow_and_polars(tmp_path: Path) -> None:
    words = pd.DataFrame({"word": WORDS, "n": pd.array([None, *range(49)], "Int64")})
    write_embeddings(ROWS, tmp_path, "arrow", words, dtype="float16", rows_per_file=30)
    paths = sorted(tmp_path.glob("*.arrow"))
    np.testing.assert_array_equal(np.concatenate([as_others_read(path) for path in paths]), ROWS.astype(np.float16))
    assert pl.concat([pl.read_ipc(path, columns=["word"]) for path in paths])["word"].to_list() == WORDS
    (tmp_path / ".manifest.embeddings").unlink()
    read = EmbeddingReader(tmp_path, meta_columns="*")
    assert read.to_dask_dataframe().dtypes.astype(str).to_dict() == {"word": "string", "n": "Int64"}
    assert read.dtype == np.float16


@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
def test_a_stream_as_datasets_save_it(tmp_path: Path, codec: Any) -> None:
    lists = pa.array(ROWS.tolist(), pa.list_(pa.float32()))
    put(tmp_path / "data-00000-of-00001.arrow", stream=True, codec=codec, emb=lists, word=pa.array(WORDS))
    (tmp_path / "state.json").write_text("{}")
    same(EmbeddingReader(tmp_path, meta_columns=["word"]))


def test_vectors_alone_are_not_held_back_by_batches(tmp_path: Path) -> None:
    put(tmp_path / "0.arrow", embedding=vectors(), n=range(50))
    reader = EmbeddingReader(tmp_path)
    assert not reader.manifest.vectors.has_groups
    assert reader.to_dask_array().numblocks == (1, 1)
    same(reader)
    same(EmbeddingReader(tmp_path, meta_columns="n"))
    reader.save_manifest()
    same(EmbeddingReader.from_manifest(tmp_path))


def test_a_piece_of_vectors_is_one_request(tmp_path: Path) -> None:
    content = put(tmp_path / "0.arrow", embedding=vectors(np.tile(ROWS, (1, 4000))), n=range(50)).read_bytes()
    with emptied_bucket() as bucket:
        bucket.put("emb/0.arrow", content)
        reader = EmbeddingReader("bucket://emb")
        assert bucket.nbytes < 2**17
        bucket.requests.clear()
        assert reader.to_dask_array()[3:5].compute().shape == (2, 16_000)
        assert [request.nbytes for request in bucket.reads] == [2 * 64_000]
        _columns_are_read_alone(bucket)


def _columns_are_read_alone(bucket: Bucket) -> None:
    reader = EmbeddingReader("bucket://emb", meta_columns="n")
    bucket.requests.clear()
    assert reader.to_dask_dataframe()["n"].sum().compute() == 49 * 25
    assert bucket.nbytes < 2**17  # and none of the vectors


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def twice(data: bytes) -> bytes:
    return data + data


def without_end(data: bytes) -> bytes:
    return data[:-8]


@pytest.mark.parametrize(
    ("columns", "options", "change", "told"),
    [
        ({"embedding": vectors()}, {}, cut, "it ends with .*: it was cut short; write it again"),
        ({"embedding": vectors()}, {"stream": True}, cut, "cut short; write it again"),
        ({"embedding": vectors()}, {"stream": True}, twice, "behind its end are [0-9,]+ bytes .* two streams in one"),
        ({"embedding": vectors()}, {}, twice, "between its batches and its footer are [0-9,]+ .* two files in one"),
        ({"embedding": vectors()}, {"stream": True}, without_end, "without the mark of its end"),
        ({"embedding": vectors()}, {}, lambda data: b"ARROW1" * 9, "its footer claims"),
        ({"embedding": vectors()}, {}, lambda data: b"nothing of the kind", "no message of a stream"),
        (
            {"embedding": vectors()},
            {},
            lambda data: b"FEA1" + data + b"FEA1",
            "first version of Feather; write_feather",
        ),
        ({"embedding": [[1.0, 2.0], None, [3.0, 4.0]]}, {}, None, "row 1: .*is null"),
        ({"embedding": [[1.0, 2.0], [1.0, 2.0], [3.0]]}, {}, None, "row 2: .*1 item where vectors of 2"),
        ({"embedding": [[1.0, 2.0], [3.0], [3.0, 2.0, 1.0]]}, {}, None, "row 1: .*1 item where vectors of 2"),
        ({"embedding": [[1.0, 2.0], [None, 2.0]]}, {"codec": "zstd"}, None, "row 1: .*null item"),
        ({"embedding": ["a", "b"]}, {}, None, "is string, not a list of numbers"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, columns: Any, options: Any, change: Callable[[bytes], bytes] | None, told: str
) -> None:
    path = put(tmp_path / "0.arrow", **options, **columns)
    if change is not None:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FormatError, match=rf"0\.arrow.*{told}"):
        EmbeddingReader(path).to_dask_array().compute()


def test_no_such_column(tmp_path: Path) -> None:
    put(tmp_path / "0.arrow", a=vectors(), b=vectors(), n=range(50))
    told = r"no column 'embedding'; .* such as 'a', 'b'; its columns are 'b', 'n', 'a'$"
    with pytest.raises(ColumnError, match=told):
        EmbeddingReader(tmp_path)
    with pytest.raises(ColumnError, match="no column 'm'"):
        EmbeddingReader(tmp_path, "arrow", "a", meta_columns="m")


@pytest.mark.parametrize("claim", [2**20, 2**62, -5])
def test_compressed_bytes_that_claim_to_be_others(tmp_path: Path, claim: int) -> None:
    path = put(tmp_path / "0.arrow", codec="zstd", embedding=vectors(np.zeros((50, 4), np.float32)))
    data, size = path.read_bytes(), struct.pack("<q", 20 * 16)
    assert size in data
    path.write_bytes(data.replace(size, struct.pack("<q", claim)))
    with pytest.raises(FormatError, match=r"0\.arrow.*claim|0\.arrow.*ends before"):
        EmbeddingReader(path).to_dask_array().compute()


def test_a_buffer_that_begins_in_its_batch_and_ends_behind_it_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "0.arrow", 50, embedding=vectors())
    data, place = path.read_bytes(), struct.pack("<qq", 0, ROWS.nbytes)  # all of the batch
    assert data.count(place) == 1
    path.write_bytes(data.replace(place, struct.pack("<qq", 1, ROWS.nbytes)))
    with pytest.raises(FormatError, match=r"0\.arrow: .*a record batch claims bytes beyond its body; write"):
        EmbeddingReader(path)


@pytest.mark.parametrize("codec", [None, "zstd"])
@pytest.mark.parametrize("claim", [0, 7, 9])
def test_nulls_are_those_that_are_counted(tmp_path: Path, claim: int, codec: Any) -> None:
    """A damaged count found this: where there are none by it, pyarrow reads what lies under them."""
    path = put(tmp_path / "0.arrow", 50, codec=codec, embedding=vectors(), word=WORDS)
    path.write_bytes(path.read_bytes().replace(struct.pack("<qq", 50, 8), struct.pack("<qq", 50, claim)))
    reader = EmbeddingReader(path, meta_columns="word")
    with pytest.raises(FormatError, match=rf"0\.arrow.*claims {claim} nulls, but marks 8 of its rows so"):
        reader.to_dask_dataframe().compute()


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_vectors_are_read_window_by_window(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, codec: str
) -> None:
    # Record batches may be of any size, and several are read at the same time.
    vectors = np.random.default_rng(0).standard_normal((8_000, 256)).astype(np.float32)
    table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 256)})
    with pa.ipc.new_file(tmp_path / "0.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as file:
        file.write_table(table)
    counts: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        counts.append(preadv(descriptor, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    reader = EmbeddingReader(tmp_path)
    np.testing.assert_array_equal(reader.take([1, 3]).to_dask_array().compute(scheduler="sync"), vectors[[1, 3]])
    assert sum(counts) < vectors.nbytes / 4
    np.testing.assert_array_equal(reader.to_dask_array().compute(scheduler="sync"), vectors)
    assert sum(counts) > vectors.nbytes / 2
    assert max(counts) <= 2**20


RESERVED = """
import sys
import pyarrow as pa
from dask_embedding_reader import EmbeddingReader, FormatError
try:
    print(*EmbeddingReader(sys.argv[1], meta_columns="text").to_dask_dataframe(0, 10).compute()["text"].str.len())
except FormatError as error:
    print(error)
print(pa.default_memory_pool().max_memory())
"""


def read_in_a_process(path: Path) -> tuple[str, int]:
    """What ten rows are, and how much pyarrow has reserved at most, which it tells of the whole life of a process."""
    done = subprocess.run([sys.executable, "-c", RESERVED, str(path)], check=True, capture_output=True, text=True)
    told, reserved = done.stdout.splitlines()
    return told, int(reserved)


def test_metadata_that_claims_the_world_reserves_nothing(tmp_path: Path) -> None:
    # As much as could be in so many bytes: text of random letters, which no codec makes smaller by much.
    letters = np.random.default_rng(0).integers(97, 123, (50, 1040), np.uint8)
    texts = [row.tobytes().decode() for row in letters]
    path = put(tmp_path / "0.arrow", codec="zstd", embedding=vectors(), text=texts)
    data, size = path.read_bytes(), struct.pack("<q", 20 * 1040)
    assert size in data
    path.write_bytes(data.replace(size, struct.pack("<q", 2**30)))
    told, reserved = read_in_a_process(path)
    assert "0.arrow" in told
    assert f"claim to be {2**30:,}, where" in told
    assert reserved < 2**26


def test_long_texts_that_are_compressed_to_nothing_are_not_inflated_as_a_whole(tmp_path: Path) -> None:
    texts = pa.array(["x" * 10**6] * 400, pa.large_string())
    path = put(tmp_path / "0.arrow", 400, codec="zstd", embedding=vectors(np.ones((400, 2), np.float32)), text=texts)
    told, reserved = read_in_a_process(path)
    assert told == " ".join(["1000000"] * 10)
    assert reserved < 2**27


def test_a_long_value_of_a_dictionary_is_repeated_for_few_rows(tmp_path: Path) -> None:
    rows, value = 5_000, "x" * 10**6
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([value]))
    path = put(tmp_path / "0.arrow", batch_rows=rows, embedding=vectors(np.ones((rows, 2), np.float32)), text=text)
    told, reserved = read_in_a_process(path)
    assert told == " ".join(["1000000"] * 10)
    assert reserved < 2**27


def some_null(values: list[Any]) -> list[Any]:
    return [None if row % 5 == 3 else value for row, value in enumerate(values)]


def columns_of_all_kinds() -> dict[str, pa.Array]:
    """Fifty rows of each type that lies in buffers in a way of its own."""
    words = [word or "" for word in WORDS]
    texts = pa.array(some_null(words))
    numbers = pa.array(some_null(list(range(50))), pa.int16())
    few = [words[row : row + row % 4] for row in range(50)]
    pairs = pa.StructArray.from_arrays(
        [texts, numbers], ["text", "n"], mask=pa.array([row % 6 == 1 for row in range(50)])
    )
    kinds = pa.array([row % 2 for row in range(50)], pa.int8())
    places = pa.array([row // 2 for row in range(50)], pa.int32())
    return {
        "bit": pa.array(some_null([row % 3 == 0 for row in range(50)])),
        "number": numbers,
        "all": pa.array(range(50)),
        "text": texts,
        "large": pa.array(some_null(words), pa.large_string()),
        "bytes": pa.array([word.encode() for word in words], pa.large_binary()),
        "view": pa.array(some_null([word[row % 30 :] for row, word in enumerate(words)]), pa.string_view()),
        "views": pa.concat_arrays(
            [pa.array(part, pa.string_view()) for part in (words[:13], words[13:30], words[30:])]
        ),
        "fixed": pa.array(some_null([bytes([row] * 3) for row in range(50)]), pa.binary(3)),
        "decimal": pa.array(some_null([None if row == 4 else row for row in range(50)]), pa.decimal128(9, 2)),
        "list": pa.array(some_null(few), pa.list_(pa.string())),
        "deep": pa.array(some_null([[each, None, each[:1]] for each in few]), pa.large_list(pa.list_(pa.string()))),
        "square": pa.array(some_null([[row, row + 1, None] for row in range(50)]), pa.list_(pa.int32(), 3)),
        "list view": pa.array(some_null(few), pa.list_view(pa.string())),
        "large list view": pa.array(few, pa.large_list_view(pa.string())),
        "no items": pa.array([[], None] * 25, pa.list_view(pa.string())),
        "no letters": pa.array(["", None] * 25),
        "empty lists": pa.array([[], None] * 25, pa.list_(pa.string())),
        "empty lists beside nulls": pa.array([[], [None, "a"]] * 25, pa.list_(pa.string())),
        "map": pa.array(some_null([[(word, 1)] * (row % 3) for row, word in enumerate(words)]), pa.map_("str", "i8")),
        "struct": pairs,
        "structs": pa.ListArray.from_arrays(pa.array(range(51), pa.int32()), pairs),
        "null": pa.nulls(50),
        "category": texts.dictionary_encode(),
        "sparse": pa.UnionArray.from_sparse(kinds, [numbers, texts]),
        "dense": pa.UnionArray.from_dense(kinds, places, [numbers, texts]),
        "runs": pa.RunEndEncodedArray.from_arrays(pa.array([7, 30, 50], pa.int32()), pa.array(["a", None, "b"])),
    }


@pytest.mark.parametrize(("codec", "held_nbytes"), [(None, 2**25), ("zstd", 2**25), ("zstd", 1), ("lz4", 1)])
@pytest.mark.parametrize("window_nbytes", [1, 500, 2**23])
def test_any_rows_of_any_column_are_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, window_nbytes: int, codec: Any, held_nbytes: int
) -> None:
    monkeypatch.setattr(ipc_columns, "WINDOW_NBYTES", window_nbytes)
    monkeypatch.setattr(ipc_columns, "_HELD_NBYTES", held_nbytes)
    columns = columns_of_all_kinds()
    path = put(tmp_path / "0.arrow", 37, codec=codec, embedding=vectors(), **columns)
    header = EmbeddingReader(path, meta_columns="all").manifest.vectors.header(0)
    for start, stop, step in ((0, 50, 50), (0, 50, 7), (0, 1, 1), (3, 4, 1), (9, 41, 16), (36, 50, 5), (13, 29, 100)):
        for name, column in columns.items():
            plain = column.dictionary_decode() if name == "category" else column
            if plain.slice(1).to_pylist() != plain.to_pylist()[1:]:  # of sparse unions, before pyarrow 25
                continue
            read = pa.Table.from_batches(list(iter_arrow_tables(header, [name], start, stop, step)))
            assert all(chunk.num_rows <= step for chunk in read.to_batches())
            assert read[name].to_pylist() == plain.slice(start, stop - start).to_pylist(), name


def test_columns_that_no_frame_holds_are_refused_and_left_out_of_all(tmp_path: Path) -> None:
    odd = ("sparse", "dense", "runs")
    columns = {name: column for name, column in columns_of_all_kinds().items() if name in (*odd, "text")}
    put(tmp_path / "0.arrow", embedding=vectors(), **columns)
    reader = EmbeddingReader(tmp_path, meta_columns="*")
    assert list(reader.columns) == ["text"]
    assert reader.take([3, 2]).to_dask_dataframe().compute()["text"].notna().tolist() == [False, True]
    for name in odd:
        with pytest.raises(
            FormatError, match=rf"0\.arrow: .*column '{name}' is .*, which no frame holds; write its values"
        ):
            EmbeddingReader(tmp_path, meta_columns=name)


def test_little_is_read_of_a_large_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ipc_columns, "WINDOW_NBYTES", 2**14)
    words = [f"{row:06}" * 100 for row in range(2_000)]
    content = put(tmp_path / "0.arrow", 2_000, embedding=np.zeros((2_000, 1)).tolist(), word=words).read_bytes()
    with emptied_bucket() as bucket:
        bucket.put("emb/0.arrow", content)
        reader = EmbeddingReader("bucket://emb", meta_columns="word").take([1_500, 1_501])
        bucket.requests.clear()
        assert reader.to_dask_dataframe().compute()["word"].tolist() == words[1_500:1_502]
        assert bucket.nbytes < 2**17


@pytest.mark.parametrize("codec", [None, "zstd"])
@pytest.mark.parametrize("kind", ["items", "lists", "fixed", "bytes"])
@pytest.mark.parametrize("block_rows", [1, 3, 1_000])
def test_the_row_that_holds_no_vector_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, codec: Any, block_rows: int
) -> None:
    """Counted in the file, in whichever record batch and block of it that is decoded it lies."""
    monkeypatch.setattr(arrow, "_BLOCK_NBYTES", 8 * block_rows)
    fixed = pa.list_(pa.float32(), 2)
    made: dict[str, Any] = {
        "items": lambda row: {name: [None if k == row else 1.0 for k in range(50)] for name in ("e0", "e1")},
        "lists": lambda row: {"e": [None if k == row else [1.0, 2.0] for k in range(50)]},
        "fixed": lambda row: {"e": pa.array([None if k == row else [1.0, 2.0] for k in range(50)], fixed)},
        "bytes": lambda row: {"e": [b"12345678"[: 8 - (k == row)] for k in range(50)]},
    }
    column = "e*" if kind == "items" else "e"
    dtype = "float32" if kind == "bytes" else None
    for row in (0, 6, 19, 20, 39, 40, 49):
        put(tmp_path / "0.arrow", 20, codec=codec, **made[kind](row))
        with pytest.raises(FormatError, match=rf"0\.arrow.*\brow {row}\b"):
            EmbeddingReader(tmp_path, "arrow", column, embedding_dtype=dtype).to_dask_array(max_piece_size=11).compute(
                scheduler="synchronous"
            )


@pytest.mark.parametrize(("rows", "batch_rows"), [(50, 20), (50, 25), (50, 50), (51, 50), (1, 1), (7, 1)])
def test_vectors_that_lie_evenly_end_within_their_file(tmp_path: Path, rows: int, batch_rows: int) -> None:
    """As a saved manifest may tell of them, which anybody can write."""
    path = put(tmp_path / "0.arrow", batch_rows, embedding=vectors(np.zeros((rows, 3), np.float32)))
    manifest = EmbeddingReader(path).manifest
    header, check = manifest.vectors.header(0), manifest.format.vectors.check_header
    name, first, stride, count = header.layout
    assert (name, count) == ("arrow", batch_rows)
    end = first + (rows - 1) // count * stride + ((rows - 1) % count + 1) * 12

    def of_size(nbytes: int) -> Any:
        return header._replace(file=header.file._replace(version=header.file.version._replace(size=nbytes)))

    assert check(header)
    assert check(header._replace(group_rows=(rows,)))
    assert check(of_size(end))
    assert check(of_size(-1))
    wrong = [of_size(end - 1), of_size(0), header._replace(group_rows=(rows - 1, 1)), header._replace(rows=0)]
    layouts: list[Any] = [
        (first, 12 * count - 1, count),
        (first, stride, 0),
        (first, -stride, count),
        (0, stride, count),
    ]
    layouts += [(first, stride, True), (float(first), stride, count), (first, stride)]
    wrong += [header._replace(layout=(name, *other)) for other in layouts]
    wrong.append(header._replace(layout=("other", first, stride, count)))
    assert not any(map(check, wrong))
    assert check(header._replace(layout=(name,), group_rows=(rows,)))
    assert not check(header._replace(layout=(name,), group_rows=(rows + 1,)))
