"""A program written for the reference runs here with only its import changed, and prints the same.

What it must print is computed with numpy from the files, so that the proof holds where the reference is not installed;
where it is, the very same program runs over it too.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem

import dask_embedding_reader
from dask_embedding_reader import EmbeddingReader, get_file_list
from tests.support.collections import Collection, write_collection

REFERENCE = "embedding_reader"
OURS = "dask_embedding_reader"

#: How clients use the reference: an index builder, a training loader and a script of one's own.
PROGRAM = '''
import json
import pickle
import sys

import numpy as np
from embedding_reader import EmbeddingReader


def describe(reader):
    """What an index builder looks at before it starts."""
    if not isinstance(reader, EmbeddingReader):
        raise TypeError("not a reader")
    return {
        "count": int(reader.count),
        "dimension": int(reader.dimension),
        "byte_per_item": int(reader.byte_per_item),
        "total_size": int(reader.total_size),
        "beside": reader.embeddings_folder + "/knn.index",
        "megabytes": "%.3f" % (reader.total_size / 2**20),
        "batches": len(range(0, reader.count, 8)),
    }


def as_tensor(batch):
    """What torch.from_numpy and faiss ask of an array: one writable block of float32."""
    view = memoryview(batch)
    assert not view.readonly and view.c_contiguous and view.format == "f" and view.ndim == 2
    return batch


def train(reader, size):
    """Training takes one batch and forgets the iterator."""
    vectors, _ = next(reader(batch_size=size, start=0, end=size, show_progress=False))
    as_tensor(vectors)
    vectors /= 2  # in place, as normalising does
    return vectors.tolist()


def build(reader):
    """Indexing takes all batches, with their ids."""
    added = []
    for batch_id, (vectors, ids) in enumerate(reader(batch_size=8, start=0, show_progress=False)):
        as_tensor(vectors)
        assert len(vectors) == len(ids)
        added.append([batch_id, vectors.tolist(), ids["i"].tolist(), list(ids.columns)])
    return added


def load(reader, rank, world):
    """A training loader: every worker reads its own range, arguments by position, from a pickled reader."""
    reader = pickle.loads(pickle.dumps(reader))
    start = reader.count * rank // world
    end = reader.count * (rank + 1) // world
    seen = []
    for vectors, captions in reader(5, start, end, 3, 2, False, 2**25):
        captions = captions["caption"].to_list() if "caption" in captions else None
        seen.append([as_tensor(vectors).tolist(), captions])
    return seen


def main(folder, file_format, metadata_folder):
    if file_format == "npy":
        reader = EmbeddingReader(folder, file_format)
    elif file_format == "parquet":
        reader = EmbeddingReader(folder, "parquet", "embedding", ["id", "caption"])
    else:
        reader = EmbeddingReader(
            embeddings_folder=folder,
            file_format="parquet_npy",
            meta_columns=["id", "caption"],
            metadata_folder=metadata_folder,
        )
    a, b = reader(7, show_progress=False), reader(batch_size=7, start=7, show_progress=False)
    together = [next(a)[0].tolist(), next(b)[0].tolist(), next(a)[0].tolist()]
    for _ in a:
        pass
    for _ in b:
        pass
    clipped = [len(vectors) for vectors, _ in reader(batch_size=100, end=10**9, show_progress=False)]
    ids = []
    if file_format != "npy":
        for _, meta in reader(batch_size=9, show_progress=False):
            ids.extend(zip(meta["id"].tolist(), meta["caption"].tolist(), meta["i"].tolist()))
    return {
        "describe": describe(reader),
        "train": train(reader, 10),
        "build": build(reader),
        "load": [load(reader, rank, 3) for rank in range(3)],
        "together": together,
        "clipped": clipped,
        "ids": ids,
    }


print(json.dumps([main(*sys.argv[k : k + 3]) for k in range(1, len(sys.argv), 3)]))
'''


def expectations(collection: Collection) -> Any:
    """What the program prints, by numpy."""
    rows = collection.rows
    count = len(rows)
    described = bool(collection.columns)
    captions: list[str] = collection.table["caption"].to_pylist() if described else []
    ids: list[int] = collection.table["id"].to_pylist() if described else []

    def loaded(rank: int) -> list[Any]:
        start, end = count * rank // 3, count * (rank + 1) // 3
        cuts = [(k, min(k + 5, end)) for k in range(start, end, 5)]
        return [[rows[a:b].tolist(), captions[a:b] if described else None] for a, b in cuts]

    return {
        "describe": {
            "count": count,
            "dimension": 4,
            "byte_per_item": 16,
            "total_size": count * 16,
            "beside": f"{collection.folder}/knn.index",
            "megabytes": f"{count * 16 / 2**20:.3f}",
            "batches": -(-count // 8),
        },
        "train": (rows[:10] / 2).tolist(),
        "build": [
            [k, rows[start : start + 8].tolist(), list(range(start, min(start + 8, count))), [*collection.columns, "i"]]
            for k, start in enumerate(range(0, count, 8))
        ],
        "load": [loaded(rank) for rank in range(3)],
        "together": [rows[:7].tolist(), rows[7:14].tolist(), rows[7:14].tolist()],
        "clipped": [count],
        "ids": [list(row) for row in zip(ids, captions, range(count), strict=False)],
    }


def run(program: str, collections: list[Collection]) -> Any:
    """Run a program over the collections in an interpreter of its own and return what it printed of each."""
    arguments = [
        argument
        for collection in collections
        for argument in (collection.folder, collection.options["file_format"], collection.metadata_folder or "")
    ]
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def collections(tmp_path_factory: pytest.TempPathFactory) -> list[Collection]:
    """One of each format: 38 rows in three files that the reference can read (no empty file, no null, small ids)."""
    counts = [11, 9, 18]
    tables = [
        pa.table({"id": np.arange(count) * 10 + number, "caption": [f"a cat {number} {k}" for k in range(count)]})
        for number, count in enumerate(counts)
    ]
    return [
        write_collection(tmp_path_factory.mktemp(name), name, file_rows=counts, tables=tables if described else None)
        for name, described in (("npy", False), ("parquet-list", True), ("parquet_npy", True))
    ]


def test_the_program_runs_with_only_its_import_changed(collections: list[Collection]) -> None:
    assert PROGRAM.count(REFERENCE) == 1
    printed = run(PROGRAM.replace(REFERENCE, OURS), collections)
    assert printed == [expectations(collection) for collection in collections]


@pytest.mark.skipif(importlib.util.find_spec(REFERENCE) is None, reason="the reference is not installed")
def test_the_program_is_one_that_the_reference_runs(collections: list[Collection]) -> None:
    # Otherwise it would prove nothing about programs written for the reference.
    assert run(PROGRAM, collections) == [expectations(collection) for collection in collections]


def test_arguments_have_the_names_order_and_defaults_of_the_reference() -> None:
    def positional(function: Any) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}

    opened = positional(EmbeddingReader.__init__)
    assert list(opened) == ["embeddings_folder", "file_format", "embedding_column", "meta_columns", "metadata_folder"]
    # There "npy" and "embedding": where these are, they are what is taken here.
    assert list(opened.values())[1:] == ["auto", None, None, None]
    called = positional(EmbeddingReader.__call__)
    assert list(called) == [
        "batch_size",
        "start",
        "end",
        "max_piece_size",
        "parallel_pieces",
        "show_progress",
        "max_ram_usage_in_bytes",
    ]
    assert list(called.values())[1:] == [0, None, None, None, True, 2**32]


def test_the_two_attributes_that_only_the_inner_reader_of_the_reference_has(collections: list[Collection]) -> None:
    # There they are found at reader.reader; programs that know them get them without the detour.
    for collection in collections:
        reader = collection.open()
        assert (reader.nb_files, reader.max_file_size) == (3, 18 * 16)


def test_get_file_list_returns_the_filesystem_and_sorted_paths(tmp_path: Path) -> None:
    for name in ("b/2.npy", "a/10.npy", "a/9.npy", "a/deep/er/0.npy", "c.npy", "a/meta.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    expected = [str(tmp_path / name) for name in ("a/10.npy", "a/9.npy", "a/deep/er/0.npy", "b/2.npy", "c.npy")]
    filesystem, paths = get_file_list(str(tmp_path), "npy")
    assert paths == expected
    with filesystem.open(paths[0]) as f:
        assert f.read() == b"x"
    assert get_file_list(str(tmp_path), "parquet")[1] == [str(tmp_path / "a/meta.parquet")]
    assert get_file_list(f"file://{tmp_path}", "npy")[1] == [f"file://{path}" for path in expected]


@pytest.mark.skipif(importlib.util.find_spec(REFERENCE) is None, reason="the reference is not installed")
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_get_file_list_returns_what_the_reference_returns(scheme: str, tmp_path: Path) -> None:
    collection = write_collection(tmp_path, "parquet_npy", file_rows=[1] * 11, columns=["id"])
    reference = pytest.importorskip("embedding_reader.get_file_list").get_file_list
    for folder, file_format in ((collection.folder, "npy"), (tmp_path, "npy"), (tmp_path, "parquet")):
        filesystem, paths = get_file_list(f"{scheme}{folder}", file_format)
        expected_filesystem, expected_paths = reference(f"{scheme}{folder}", file_format)
        assert paths == expected_paths
        assert type(filesystem) is type(expected_filesystem)
        assert type(paths) is list


def test_get_file_list_of_several_folders(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.npy").write_bytes(b"x")
    _, paths = get_file_list([str(tmp_path / "b"), str(tmp_path / "a")], "npy")
    # Which order: as for the reader itself, the one of the list.
    assert paths == [str(tmp_path / "b/0.npy"), str(tmp_path / "a/0.npy")]


@pytest.fixture
def alias(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the reference, under which programs and its own tests find this library."""
    for name in [name for name in sys.modules if name.partition(".")[0] == REFERENCE]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, REFERENCE, dask_embedding_reader)
    monkeypatch.setattr(dask_embedding_reader, "get_file_list", get_file_list)  # what is imported takes its place
    return REFERENCE


@pytest.mark.parametrize("file_format", ["npy", "parquet", "parquet_npy"])
@pytest.mark.parametrize("seed", range(3))
def test_one_call_for_all_formats_reads_all_in_batches(alias: str, tmp_path: Path, file_format: str, seed: int) -> None:
    # As the reference's own tests, and those of autofaiss: the same arguments whatever the format has.
    opened = importlib.import_module(alias).EmbeddingReader
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 300, size=5)
    rows = rng.random((sizes.sum(), 16), dtype=np.float32)
    meta = pd.DataFrame({"id": rng.integers(0, 10**6, len(rows)), "id2": rng.integers(0, 10**6, len(rows))})
    for number, stop in enumerate(np.cumsum(sizes)):
        part = slice(stop - sizes[number], stop)
        if file_format != "parquet":
            np.save(tmp_path / f"{number}.npy", rows[part])
        if file_format == "parquet_npy":
            meta[part].to_parquet(tmp_path / f"{number}.parquet")
        if file_format == "parquet":
            meta[part].assign(embedding=list(rows[part])).to_parquet(tmp_path / f"{number}.parquet")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is passed over", UserWarning)
        reader = opened(
            str(tmp_path),
            file_format=file_format,
            embedding_column="embedding",
            meta_columns=["id", "id2"],
            metadata_folder=str(tmp_path),
        )
    assert (reader.dimension, reader.count, reader.byte_per_item) == (16, len(rows), 64)
    assert reader.total_size == reader.count * reader.byte_per_item
    batch_size = int(rng.integers(1, 300))
    vectors, frames = zip(*reader(batch_size=batch_size), strict=True)
    assert {len(some) for some in vectors[:-1]} <= {batch_size}
    assert len(vectors[-1]) <= batch_size
    np.testing.assert_array_equal(np.vstack(vectors), rows)
    expected = meta.assign(i=np.arange(len(rows)))
    pd.testing.assert_frame_equal(
        pd.concat(frames).reset_index(drop=True), expected if file_format != "npy" else expected[["i"]]
    )


@pytest.mark.parametrize("where", ["embedding_reader", "embedding_reader.get_file_list"])
def test_get_file_list_is_found_where_the_reference_has_it(alias: str, tmp_path: Path, where: str) -> None:
    for folder in ("a", "b", "a/1", "a/1/2"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            (tmp_path / folder / f"{number}.parquet").write_bytes(b"x")
    (tmp_path / "none").mkdir()
    found = importlib.import_module(where).get_file_list
    for path, count in (("a", 6), (["b", "a"], 8), ("b", 2), ("none", 0)):
        folders = str(tmp_path / path) if isinstance(path, str) else [str(tmp_path / name) for name in path]
        filesystem, paths = found(path=folders, file_format="parquet")
        assert isinstance(filesystem, LocalFileSystem)
        assert len(paths) == count
    # The module is called like the function, and so the package has it instead, once it is imported.
    assert callable(dask_embedding_reader.get_file_list)
    assert len(dask_embedding_reader.get_file_list(str(tmp_path / "b"), "parquet")[1]) == 2


def test_a_folder_without_files_is_the_reference_s_error(alias: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.npy file"):
        importlib.import_module(alias).EmbeddingReader(str(tmp_path), file_format="npy")


def test_names_are_exported() -> None:
    for name in ("EmbeddingReader", "get_file_list", "__version__"):
        assert hasattr(dask_embedding_reader, name)
    assert isinstance(dask_embedding_reader.__version__, str)
