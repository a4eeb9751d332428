"""The parts that opening is made of: tables of files, which layout it is, what is joined, filters, what is said."""

from __future__ import annotations

import io
import re
import sys
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader._common.progress import progress_bar
from dask_embedding_reader.collection import beside, headers, layout, manifest, reopen, saved
from dask_embedding_reader.collection.files import FileTable, file_table
from dask_embedding_reader.errors import (
    ArgumentError,
    ArgumentTypeError,
    ColumnError,
    DestinationError,
    FileChangedError,
    FormatError,
    MismatchError,
    NoFilesError,
    ReadError,
)
from dask_embedding_reader.formats.base import Columns, FileHeader, FilePart, MetaColumn
from dask_embedding_reader.formats.parquet.page_headers import iter_page_heads
from dask_embedding_reader.formats.registry import get_format
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.put import put_file
from dask_embedding_reader.storage.store import StoredFile, Version
from dask_embedding_reader.storage.urls import resolve

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
STORE, _ = resolve("/")


def forked_store() -> LocalStore:
    """The same store as a process would make it that was forked from this one: fsspec calls its file system another."""
    filesystem = LocalFileSystem(skip_instance_cache=True)
    filesystem._fs_token_ = uuid.uuid4().hex
    assert filesystem != STORE.filesystem
    return LocalStore(filesystem)


def header_of(name: str, rows: int, groups: Sequence[int] = (), **facts: Any) -> FileHeader:
    return FileHeader(StoredFile(STORE, f"/{name}", Version(1)), rows, 3, np.dtype("f4"), (), tuple(groups))._replace(
        **facts
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tables of files


def tables() -> Iterator[tuple[list[int], list[tuple[int, ...]], FileTable]]:
    """All of few small files, of row groups or not."""
    kinds: list[tuple[int, ...]] = [(), (1,), (3,), (2, 2), (1, 3, 1)]
    for count in (1, 2, 3):
        for groups in product(kinds, repeat=count):
            made = [header_of(str(k), sum(sizes), sizes) for k, sizes in enumerate(groups)]
            yield [sum(sizes) for sizes in groups], list(groups), file_table(made, ["/"])
    for rows in product((0, 1, 3), repeat=3):
        yield list(rows), [()] * 3, file_table([header_of(str(k), n) for k, n in enumerate(rows)], ["/"])


def test_parts_of_files_hold_all_rows_and_know_their_row_groups() -> None:
    for rows, groups, table in tables():
        assert (table.rows.tolist(), table.count, len(table)) == (rows, sum(rows), len(rows))
        assert table.has_groups is any(groups)
        assert repr(table) == f"<FileTable of {counted(len(rows), 'file')}, {counted(sum(rows), 'row')}>"
        for start in range(sum(rows)):
            for stop in range(start + 1, sum(rows) + 1):
                wanted = []
                for file, first in enumerate(np.cumsum([0, *rows[:-1]]).tolist()):
                    a, b = max(start - first, 0), min(stop - first, rows[file])
                    if a < b:
                        wanted.append(FilePart(header_between(file, rows[file], groups[file], a, b), a, b))
                assert table.parts(start, stop) == tuple(wanted)
        for file, count in enumerate(rows):
            assert table.header(file) == header_of(str(file), count, groups[file])._replace(dimension=3 * any(rows))


def header_between(file: int, rows: int, groups: Sequence[int], start: int, stop: int) -> FileHeader:
    """What a task that reads these rows of a file has to know of it."""
    bounds = np.cumsum([0, *groups]).tolist()
    held = [k for k in range(len(groups)) if bounds[k] < stop and bounds[k + 1] > start]
    first = held[0] if held else 0
    chosen = [groups[k] for k in held]
    return header_of(str(file), rows, chosen, first_group=first, first_group_row=bounds[first])


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def test_tables_differ_by_all_that_makes_rows_others() -> None:
    other_store, _ = resolve("memory://x")
    plain = header_of("0", 4)
    made = [
        [plain],
        [plain, header_of("1", 4)],
        [header_of("1", 4)],
        [header_of("0", 5)],
        [plain._replace(dtype=np.dtype(">f4"))],
        [plain._replace(file=plain.file._replace(version=Version(2)))],
        [plain._replace(file=plain.file._replace(store=other_store))],
        [header_of("0", 3), header_of("1", 5)],
        [header_of("1", 3), header_of("0", 5)],
        [plain, header_of("1", 4)._replace(dtype=np.dtype("f8"))],
        [plain._replace(dtype=np.dtype("f8")), header_of("1", 4)],
    ]
    tokens = [file_table(one, ["/"]).token for one in made]
    assert len({*tokens}) == len(made)
    assert tokens == [file_table(one, ["/", "elsewhere"]).token for one in made]


def test_tables_say_what_they_hold_in_memory() -> None:
    few, many = (file_table([header_of(f"{k:06}", 4, [2, 2]) for k in range(n)], ["/"]) for n in (100, 1000))
    texts = sum(sys.getsizeof(path) for path in many.paths)
    arrays = sum(column.nbytes for column in vars(many).values() if isinstance(column, np.ndarray))
    assert texts + arrays < sys.getsizeof(many) < 5 * (texts + arrays)
    assert 9 < (sys.getsizeof(many) - 100) / (sys.getsizeof(few) - 100) < 10.5
    assert sys.getsizeof(file_table([], [])) < 1000
    one = file_table([header_of("0", 4)], ["/"])
    texts = sum(map(sys.getsizeof, (one.paths[0], one.versions[0], *one.versions[0])))
    arrays = sum(column.nbytes for column in vars(one).values() if isinstance(column, np.ndarray))
    assert one.__sizeof__() == object.__sizeof__(one) + texts + arrays


@pytest.mark.parametrize("known", [(), (0,), (1, 4), range(150)])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_headers_come_in_the_order_of_files_and_are_counted(
    monkeypatch: pytest.MonkeyPatch, where: str, known: Sequence[int], tmp_path: Path
) -> None:
    done: list[int] = []

    class Bar:
        def __init__(self, *given: Any) -> None:
            assert given[2:] == ("opening", " files")
            self.show, self.total = given[:2]

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            assert self.total == sum(done)

        def update(self, n: int) -> None:
            done.append(n)

    store, root = resolve(tmp_path if where == "local" else f"memory://{tmp_path.name}")
    files = []
    for number in range(150):
        content = io.BytesIO()
        np.save(content, np.zeros((number + 1, 2), np.float32))
        put_file(store, f"{root}/{number:03}.npy", content.getvalue())
        files.append(StoredFile(store, f"{root}/{number:03}.npy", Version(len(content.getvalue()))))
    monkeypatch.setattr(headers, "progress_bar", Bar)
    vectors = get_format("npy").vectors
    told = {files[k]: header_of(str(k), 1000 + k) for k in known}
    found = headers.read_headers(vectors, files, Columns(), True, told)
    assert [header.rows for header in found] == [1000 + k if k in known else k + 1 for k in range(150)]
    assert sum(done) == 150 - len(known)
    blocks = {size for size in done if size}
    assert blocks <= ({64, 150 - len(known) - 128} if where == "local" else {1}), "elsewhere a thread waits for each"


def test_opening_shows_nothing_unless_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bool] = []

    def bar(show: bool, *_: Any) -> Any:
        shown.append(show)
        return progress_bar(False, *_)

    monkeypatch.setattr(headers, "progress_bar", bar)
    np.save(tmp_path / "0.npy", ROWS)
    manifest.read_manifest(None, [tmp_path], Columns())
    manifest.read_manifest(None, [tmp_path], Columns(), show_progress=True)
    assert shown == [False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Which layout it is


def saved_as(file_format: str, embedding: Any = "embedding") -> saved.SavedManifest:
    return saved.SavedManifest(file_format, Columns(embedding), 1, 0, None, [])


@pytest.mark.parametrize(
    ("kinds", "told", "wants", "has_folder", "name"),
    [
        ("npy", "", False, False, "npy"),
        ("npy parquet", "", False, False, "npy"),
        ("npy parquet", "", True, False, "parquet_npy"),
        ("npy", "", True, False, "npy"),
        ("npy", "", False, True, "parquet_npy"),
        ("npy parquet", "parquet_npy", False, False, "parquet_npy"),
        ("npy parquet", "parquet_npy npy", False, False, "npy"),
        ("npy parquet", "parquet", True, True, "parquet"),
        ("npy parquet", "npy", False, False, "npy"),
        ("npy parquet", "arrow", False, False, "npy"),
        ("npy arrow npz", "", False, False, "npy"),
        ("npy arrow npz", "npz", False, False, "npz"),
        ("parquet", "", True, True, "parquet"),
        ("arrow", "", True, False, "arrow"),
        ("npz", "", False, False, "npz"),
        ("npz parquet", "", False, False, "npz"),
        ("npz parquet", "", True, False, "parquet_npz"),
        ("arrow parquet", "", True, False, "arrow and parquet"),
        ("npz arrow", "", False, False, "npz and arrow"),
        ("npz arrow parquet", "", False, False, "npz, arrow and parquet"),
        ("npz fbin parquet", "", False, False, "npz, fbin and parquet"),
    ],
)
def test_the_layout_is_chosen_by_what_there_is(kinds: str, told: str, wants: bool, has_folder: bool, name: str) -> None:
    manifests = [saved_as(each) for each in told.split()]

    def choose() -> str:
        found = layout.choose_layout(
            kinds.split(), manifests, "there", wants_metadata=wants, has_metadata_folder=has_folder
        )
        return found.name

    if " and " not in name:
        assert choose() == name
        return
    first = kinds.partition(" ")[0]
    said = f'there holds files of several kinds: {name}; say which are the collection, as in file_format="{first}", or'
    with pytest.raises(ArgumentError, match=f"^{re.escape(said)}.*there/\\*\\.{first}$"):
        choose()


def test_the_column_is_that_of_the_manifests_where_these_agree() -> None:
    parquet = get_format("parquet").vectors

    def choose(*named: Any, columns: Columns, vectors: Any = parquet) -> Columns:
        files = [saved_as(*one) if isinstance(one, tuple) else saved_as("parquet", one) for one in named]
        return layout.choose_column(vectors, [], {}, files, columns)

    assert choose("a", columns=Columns(None)).embedding == "a"
    assert choose("a", "a", columns=Columns(None)).embedding == "a"
    assert choose("a", "b", columns=Columns(None)).embedding == "embedding"
    assert choose(None, columns=Columns(None)).embedding == "embedding"
    assert choose("a", "b", columns=Columns("b")).embedding == "b"
    assert choose("a", columns=Columns("c")).embedding == "c"
    assert choose(("npy", "a"), columns=Columns(None)).embedding == "embedding"
    assert choose("a", columns=Columns(None), vectors=get_format("npy").vectors).embedding == "embedding"


@pytest.mark.parametrize("content", [b"x", b"12345678", b"123456789", b"1234567890", b"PAR", b"\x93NUMP"])
def test_a_file_of_no_kind_is_told_however_short_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    file = StoredFile(STORE, f"{tmp_path}/file", Version(len(content)))
    said = f"{tmp_path}/file: neither its name nor its first bytes, {content[:4]!r}, tell what kind of file it is; say"
    for head in (b"", content):
        with pytest.raises(FormatError, match=f"^{re.escape(said)}"):
            layout.tell_kind(file, head)


@pytest.mark.parametrize(("others", "name"), [(0, "emb"), (9, "emb"), (10, "embedding")])
def test_ten_files_are_looked_at_for_a_column_of_vectors(tmp_path: Path, others: int, name: str) -> None:
    """Those of no rows do not count."""
    tables = [pa.table({"emb": pa.array([], pa.string())})] * 3 + [pa.table({"text": ["a"]})] * others
    tables.append(pa.table({"emb": ROWS.tolist(), "id": range(4)}))
    files = []
    for number, table in enumerate(tables):
        path = tmp_path / f"{number:02}.parquet"
        pq.write_table(table, path)
        files.append(StoredFile(STORE, str(path), Version(path.stat().st_size)))
    heads: dict[StoredFile, bytes] = {}
    chosen = layout.choose_column(get_format("parquet").vectors, files, heads, [], Columns(None))
    assert chosen == Columns(name)
    assert len(heads) == 3 + min(others + 1, 10)


@pytest.mark.parametrize(
    ("folders", "joined"),
    [
        ({"train": 4, "test": 5}, True),
        ({"Train": 4, "TEST": 5}, True),
        ({"train": 4, "other": 5}, False),
        ({"train": 4}, False),
        ({"train": 4, "": 5}, False),
        ({"train": 4, "test": 5, "": 5}, False),
        ({"train": 4, "test": 5, "lang=en": 5}, False),
        ({"train=1": 4, "test=1": 4}, False),
        ({"img_emb": 4, "text_emb": 4}, True),
        ({"img_emb": 4, "text_emb": 5}, False),
        ({"img_emb": 4, "text_emb": 4, "other": 4}, False),
        ({"img_emb": 4, "text_emb": 4, "body": 4}, True),
        ({"emb_0": 4, "emb_1": 4}, False),
        ({"emb_0": 4, "emb_1": 4, "text": 4}, False),
        ({"IMAGE1": 4, "caption1": 4}, True),
        ({}, False),
    ],
)
def test_folders_are_collections_of_their_own_where_they_are_called_so(folders: dict[str, int], joined: bool) -> None:
    paths = [f"/root/{name}/{k}.npy".replace("//", "/") for name in folders for k in range(3)]
    rows = [count for rows in folders.values() for count in (0, 1, rows - 1)]
    elsewhere = ["/rooted/train/0.npy", "/other/test/1.npy"]
    for root in ("/root", "/root/"):
        found = layout.folders_within(root, paths + elsewhere, [*rows, 7, 7])
        assert found == {name: (2, count) for name, count in folders.items()}
        assert layout.joined_folders(found) == (found if joined else {})


def test_folders_are_those_right_below_the_root() -> None:
    found = layout.folders_within("/r", ["/r/a/b/0.npy", "/r/a/1.npy", "/r/2.npy"], [1, 2, 4])
    assert found == {"a": (2, 3), "": (1, 4)}


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("train-0.npy test-0.npy", {"train": (0, 1), "test": (1, 2)}),
        ("a-train-0.npy train-1.npy TEST_0.npy", {"train": (0, 3), "test": (2, 4)}),
        ("train.npy train-test.npy test.npy", {"train": (0, 3), "test": (2, 4)}),
        ("train-0.npy train-1.npy", {}),
        ("train-0.npy part-1.npy", {}),
        ("train/0.npy test/0.npy", {}),
        ("trains.npy tests.npy", {}),
        ("base.npy query.npy gt.npy", {"base": (0, 1), "query": (1, 2), "gt": (2, 4)}),
    ],
)
def test_splits_are_what_all_files_are_called(names: str, splits: dict[str, Any]) -> None:
    paths = [f"/root/{name}" for name in names.split()]
    rows = [2**k for k in range(len(paths))]
    for root in ("/root", "/root/"):
        # Files of no rows, and those elsewhere, say nothing.
        assert layout.joined_splits(root, ["/x/other.npy", "/root/none.npy", *paths], [5, 0, *rows]) == {
            name: (first + 2, count) for name, (first, count) in splits.items()
        }
    assert layout.joined_splits("/root/*.npy", paths, rows) == {}


def test_the_manifest_in_the_folder_tells_the_layout(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    pq.write_table(pa.table({"n": range(4)}), tmp_path / "0.parquet")
    assert EmbeddingReader(tmp_path).manifest.format.name == "npy"
    EmbeddingReader(tmp_path, "parquet_npy", meta_columns=["n"]).save_manifest()
    assert EmbeddingReader(tmp_path).manifest.format.name == "parquet_npy"


def test_metadata_that_is_passed_over_is_known(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    assert not EmbeddingReader(tmp_path).manifest.passes_over
    pq.write_table(pa.table({"n": range(4)}), tmp_path / "0.parquet")
    assert EmbeddingReader(tmp_path).manifest.passes_over
    assert not EmbeddingReader(tmp_path, "npy").manifest.passes_over
    assert not EmbeddingReader(tmp_path, meta_columns=["n"]).manifest.passes_over


@pytest.mark.parametrize(
    ("wanted", "other", "glob"),
    [
        ("a/train-0.npy", "a/test-0.npy", "/a/train-*.npy"),
        ("a/x.npy", "a/y.npy", "/a/x.npy"),
        ("a/0.npy", "a/1.npy", ""),
        ("a/0.npy", "b/1.npy", "/a/*.npy"),
        ("a/x.npy", "b/x.npy", "/a/*.npy"),
        ("a/x.npy", "b/y.npy", "/a/*.npy"),
        ("a/v1-0.npy", "b/w0.npy", "/a/v*.npy"),
        ("a/v1-0.npy", "b/v0.npy", "/a/*.npy"),
    ],
)
def test_a_glob_tells_files_from_others(wanted: str, other: str, glob: str) -> None:
    files = (StoredFile(STORE, f"/{name}", Version(1)) for name in (wanted, other))
    assert manifest._named_alike(*files) == glob


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit together


def make(vectors: Sequence[FileHeader], metadata: Sequence[FileHeader] | None = None, name: str = "npy") -> Any:
    partners = None if metadata is None else (metadata, ["/"])
    return manifest.make_manifest(get_format(name), Columns(), (vectors, ["/"]), partners)


def test_files_of_other_vectors_are_named_with_how_many_are_alike() -> None:
    many = [header_of(f"train-{k}.npy", 2) for k in range(3)]
    swapped = many[1]._replace(dtype=np.dtype(">f4"))
    empty = header_of("empty-0.npy", 0)._replace(dimension=9, dtype=np.dtype("i1"))
    assert make([empty, many[0], swapped, many[2]]).dtype == np.dtype("=f4")
    for changed, told in (({"dimension": 4}, "4 x float32"), ({"dtype": np.dtype(">f8")}, "3 x float64")):
        odd = header_of("test-7.npy", 1)._replace(**changed)
        said = (
            f"/test-7.npy holds 1 vector of {told}, but 3 of 4 files hold 3 x float32 (such as /train-0.npy); open "
            "them as separate collections, such as '/train-*.npy', or write the file again"
        )
        for order in ([odd, empty, *many], [*many, empty, odd]):
            with pytest.raises(MismatchError, match=f"^{re.escape(said)}$"):
                make(order)
    with pytest.raises(MismatchError, match=r"open them as separate collections, or write the file again$"):
        make([*many, header_of("train-8.npy", 1)._replace(dimension=4)])


def test_files_of_no_rows_alone_are_no_collection() -> None:
    with pytest.raises(NoFilesError, match=r"^no embeddings: 2 npy files without rows \(such as /0\.npy\)$"):
        make([header_of("0.npy", 0), header_of("1.npy", 0)])


def test_files_of_other_numbers_of_rows_are_no_pairs() -> None:
    vectors = [header_of(f"{k}.npy", 4) for k in range(3)]
    metadata = [header_of(f"{k}.parquet", 4) for k in range(3)]
    assert make(vectors, metadata, "parquet_npy").metadata_files.count == 12
    assert make(vectors, [header_of("all.parquet", 12)], "parquet_npy").metadata_files.count == 12
    said = r"^/1\.npy has 4 rows, but its metadata /1\.parquet has 5; they must be row for row the same"
    with pytest.raises(MismatchError, match=said):
        make(vectors, [metadata[0], header_of("1.parquet", 5), metadata[2]], "parquet_npy")
    said = (
        r"^/all\.parquet is the only file of metadata, and has 11 rows, but the 3 files of vectors have 12 together; "
    )
    with pytest.raises(MismatchError, match=said + r"3 npy files \(/0\.npy is the first\) cannot"):
        make(vectors, [header_of("all.parquet", 11)], "parquet_npy")
    with pytest.raises(MismatchError, match=r"^/0\.npy has 4 rows, but its metadata /0\.parquet has 5"):
        make(vectors[:1], [header_of("0.parquet", 5)], "parquet_npy")


def test_files_of_row_groups_beside_others_are_all_of_groups() -> None:
    made = make([header_of("0.npy", 3), header_of("1.npy", 4, (3, 1)), header_of("2.npy", 0)]).vectors
    assert [made.header(k).group_rows for k in range(3)] == [(3,), (3, 1), ()]
    assert not make([header_of("0.npy", 3), header_of("1.npy", 4)]).vectors.has_groups


def warned_line(action: Any) -> str:
    """The line of this file that a warning is shown with."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        action()
    assert [Path(one.filename).name for one in told] == [Path(__file__).name]
    return Path(__file__).read_text().splitlines()[told[0].lineno - 1].strip()


def test_warnings_are_shown_where_the_reader_is_made(tmp_path: Path) -> None:
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "0.npy", ROWS)
    (tmp_path / "none").mkdir()

    def joined() -> None:
        EmbeddingReader(tmp_path)  # joined

    def empty() -> None:
        EmbeddingReader([tmp_path / "none", tmp_path / "train"], "npy")  # empty

    assert warned_line(joined).endswith("# joined")
    assert warned_line(empty).endswith("# empty")


def test_the_likely_folder_of_metadata_is_that_beside_the_first_source(tmp_path: Path) -> None:
    for name in ("a/emb", "a/meta", "b/emb"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a", "b"):
        np.save(tmp_path / name / "emb" / f"{name}.npy", ROWS)
    with pytest.raises(NoFilesError, match=r"'[^']*/a/emb' holds no \.parquet file .*; is it metadata_folder='.*/a/me"):
        EmbeddingReader([tmp_path / "a/emb", tmp_path / "b/emb"], "parquet_npy", meta_columns=["n"])
    with pytest.raises(NoFilesError, match=r"'[^']*/b/emb' holds no \.parquet .*; say where it is: metadata_folder"):
        EmbeddingReader([tmp_path / "b/emb", tmp_path / "a/emb"], "parquet_npy", meta_columns=["n"])


# ---------------------------------------------------------------------------------------------------------------------
# What lies beside the data


def test_files_that_have_gone_are_named_up_to_five(tmp_path: Path) -> None:
    for number in range(8):
        np.save(tmp_path / f"{number}.npy", ROWS)
    EmbeddingReader(tmp_path).save_manifest()
    for number in range(7):
        (tmp_path / f"{number}.npy").unlink()
        names = [f"{tmp_path}/{k}.npy" for k in range(number + 1)]
        shown = ", ".join(names[:5]) + ", …" * (number >= 5)
        said = (
            f"{number + 1} of the 8 files that {tmp_path}/.manifest.embeddings names have gone: {shown}; restore them, "
            "or remove the manifest to read what is left"
        )
        with pytest.raises(FileChangedError, match=f"^{re.escape(said)}$"):
            EmbeddingReader(tmp_path)


def test_a_manifest_is_read_up_to_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    np.save(tmp_path / "0.npy", ROWS)
    EmbeddingReader(tmp_path).save_manifest()
    size = (tmp_path / ".manifest.embeddings").stat().st_size
    monkeypatch.setattr(beside, "MOST_FILE_NBYTES", size)
    assert EmbeddingReader(tmp_path).count == 4
    assert not caplog.records
    monkeypatch.setattr(beside, "MOST_FILE_NBYTES", size - 1)
    assert EmbeddingReader(tmp_path).count == 4
    said = f"{tmp_path}/.manifest.embeddings: has {size:,} bytes, more than any manifest; remove it; it is not used"
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.fixture
def pair(tmp_path: Path) -> manifest.Manifest:
    """Vectors in one folder, metadata in another."""
    for name in ("emb", "meta"):
        (tmp_path / name / "inner").mkdir(parents=True)
    np.save(tmp_path / "emb" / "0.npy", ROWS)
    pq.write_table(pa.table({"n": range(4)}), tmp_path / "meta" / "0.parquet")
    reader = EmbeddingReader(
        tmp_path / "emb", "parquet_npy", meta_columns=["n"], metadata_folder=f"{tmp_path}/meta/*.parquet"
    )
    return reader.manifest


def test_metadata_is_read_with_the_options_of_its_own_storage_or_else_with_those_of_the_vectors(tmp_path: Path) -> None:
    for name in ("emb", "meta"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "emb" / "0.npy", ROWS)
    pq.write_table(pa.table({"n": range(4)}), tmp_path / "meta" / "0.parquet")
    ours: dict[str, Any] = {"auto_mkdir": True}
    folders: Any = {"metadata_folder": tmp_path / "meta", "storage_options": ours}
    for given, expected in ((None, ours), ({}, {}), ({"auto_mkdir": False}, {"auto_mkdir": False})):
        reader = EmbeddingReader(
            tmp_path / "emb", "parquet_npy", meta_columns=["n"], metadata_storage_options=given, **folders
        )
        reader.save_manifest(tmp_path / "m.embeddings")
        again = EmbeddingReader.from_manifest(
            tmp_path / "m.embeddings", tmp_path / "emb", metadata_storage_options=given, **folders
        )
        for each in (reader, again):
            tables = each.manifest.vectors, each.manifest.metadata
            assert [table and table.stores[0].filesystem.storage_options for table in tables] == [ours, expected]


@pytest.mark.parametrize(
    ("vectors", "metadata", "folder", "root"),
    [
        ("emb", "meta", "emb/inner", "emb"),
        ("emb", "meta", "meta/inner/deep", "meta"),
        ("emb", "meta", "emb", None),
        ("emb", "meta", "embeddings", None),
        ("emb/", "meta", "emb/inner", "emb"),
        ("emb/0.npy", "meta/*.parquet", "emb/inner", None),
        ("emb/0.npy", "meta/*.parquet", "meta/inner", None),
        ("emb/**/*.npy", "meta/*.parquet", "emb/inner", "emb/**/*.npy"),
        ("emb/0.npy", "meta/**/*.parquet", "meta/inner", "meta/**/*.parquet"),
    ],
)
def test_nothing_is_written_to_where_a_collection_would_find_it(
    tmp_path: Path, pair: manifest.Manifest, vectors: str, metadata: str, folder: str, root: str | None
) -> None:
    assert pair.metadata is not None
    tables = (
        replace(pair.vectors, roots=(f"{tmp_path}/{vectors}",)),
        replace(pair.metadata, roots=(f"{tmp_path}/{metadata}",)),
    )
    read = replace(pair, vectors=tables[0], metadata=tables[1])
    where = f"{tmp_path}/{folder}"
    for store in (STORE, forked_store()):
        if root is None:
            reopen.check_outside(read, store, where)
        else:
            said = rf"^{re.escape(where)}: lies in {re.escape(f'{tmp_path}/{root}')}/?, which is read: who opens that"
            with pytest.raises(DestinationError, match=said):
                reopen.check_outside(read, store, where)
    other, _ = resolve("memory://x")
    reopen.check_outside(read, other, where)
    reopen.check_outside(replace(read, vectors=replace(read.vectors, roots=()), metadata=None), STORE, where)


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("emb/m.npy", "emb"),
        ("emb/inner/m.npy", "emb"),
        ("meta/m.parquet", "meta/*.parquet"),
        ("emb/m.parquet", None),
        ("meta/m.npy", None),
        ("emb/m.embeddings", None),
        ("emb/.m.npy", None),
        ("emb/_inner/m.npy", None),
        ("embeddings/m.npy", None),
    ],
)
def test_no_manifest_is_saved_where_it_would_be_read_as_data(
    tmp_path: Path, pair: manifest.Manifest, name: str, root: str | None
) -> None:
    said = f"{tmp_path}/{name} would be read as data of {tmp_path}/{root}; let its name end in .embeddings, or save"
    for store in (STORE, forked_store()):
        if root is None:
            reopen.check_place(pair, store, f"{tmp_path}/{name}")
        else:
            with pytest.raises(ArgumentError, match=f"^{re.escape(said)}"):
                reopen.check_place(pair, store, f"{tmp_path}/{name}")
    reopen.check_place(pair, resolve("memory://x")[0], f"{tmp_path}/{name}")


def test_a_mark_of_writing_is_told_with_its_folder() -> None:
    files = [StoredFile(STORE, path, Version(1)) for path in ("/a/.manifest.embeddings", "/a/b/_writing/incomplete")]
    beside.check_finished(files[:1])
    with pytest.raises(
        ReadError, match=r"^/a/b: this collection is being written.* naming the files, as in /a/b/\*\.\*$"
    ):
        beside.check_finished(files)


# ---------------------------------------------------------------------------------------------------------------------
# Saved manifests: limits, and what they say


def encoded(**changed: Any) -> bytes:
    files = []
    for name in ("0.npy", "1.npy", "2.npy"):
        header = header_of(f"r/{name}", 4)._replace(layout=(128, False))._replace(**changed)
        header = header._replace(file=header.file._replace(version=Version(128 + 12 * header.dtype.itemsize)))
        files.append(saved.SavedFile("vectors", 0, name, header))
    return saved.encode_manifest(saved.SavedManifest("npy", Columns("embedding"), 1, 0, None, files))


def decoded(content: bytes) -> saved.SavedManifest:
    return saved.decode_manifest(content, "m", lambda _, path: (STORE, f"/r/{path}"))


def test_what_is_saved_is_what_is_read() -> None:
    for columns, sources, written in (
        (Columns("embedding", None, ()), (1, 0), None),
        (Columns(None, np.dtype("f2"), ("n", "m")), (2, 3), {"x": 1}),
        (Columns(("a", "b"), None, ("n", "m")), (3, 0), {}),
    ):
        meta = tuple(MetaColumn(kind, nulls) for kind, nulls in ((pa.int8(), True), (pa.string(), False)))
        files = []
        for number in range(4):
            header = header_of(f"{number}.parquet", 4 + number, (4, number) if number else (4,))
            version = Version(1000 + number)
            header = header._replace(
                file=StoredFile(STORE, f"/r/{number % 2}/{number}.parquet", version),
                dtype=np.dtype("f4" if number else ">f8"),
                checksum=f"{number}" * 64,
                meta=meta[: len(columns.meta)],
            )
            files.append(saved.SavedFile("vectors", number % sum(sources), f"{number % 2}/{number}.parquet", header))
        given = saved.SavedManifest("parquet", columns, *sources, written, files)
        assert decoded(saved.encode_manifest(given)) == given


@pytest.mark.parametrize("kind", ["vectors", "metadata"])
def test_a_manifest_that_names_no_file_of_a_kind_is_of_no_use(tmp_path: Path, kind: str) -> None:
    meta = (MetaColumn(pa.int8(), False),)
    headers = {
        "vectors": header_of("r/0.npy", 4)._replace(
            file=StoredFile(STORE, "/r/0.npy", Version(128 + 48)), layout=(128, False), meta=meta * (kind == "metadata")
        ),
        "metadata": header_of("r/0.parquet", 4, (4,))._replace(dimension=0, meta=meta),
    }
    files = [saved.SavedFile(each, 0, header.file.path[3:], header) for each, header in headers.items() if each != kind]
    given = saved.SavedManifest("parquet_npy", Columns("embedding", None, ("n",)), 1, 0, None, files)
    (tmp_path / ".manifest.embeddings").write_bytes(saved.encode_manifest(given))
    said = (
        rf"^{tmp_path}/\.manifest\.embeddings: not a usable manifest: it names no file of {kind}; remove it, and save"
    )
    with pytest.raises(FormatError, match=said):
        EmbeddingReader.from_manifest(tmp_path)
    if kind == "metadata":  # which nobody asks for
        assert EmbeddingReader.from_manifest(tmp_path, meta_columns=[]).count == 4


def test_what_is_no_parquet_file_is_told() -> None:
    content = encoded()
    for cut in (b"", b"PAR1", content[:-1], content[:-4], content + b" ", content[:20]):
        with pytest.raises(FormatError, match=r"^m: not a usable manifest: it is no parquet file, or was cut short; "):
            decoded(cut)
    # Of no files, and so of nothing before the footer.
    sink = pa.BufferOutputStream()
    table = pq.read_table(pa.BufferReader(content))
    with pq.ParquetWriter(sink, table.schema):
        pass
    empty = bytes(sink.getvalue())
    assert len(empty) - 8 - int.from_bytes(empty[-8:-4], "little") == 4
    assert decoded(empty).files == []
    with pytest.raises(FormatError, match="cut short"):
        decoded(empty[1:])


@pytest.mark.parametrize("size", [-1, 0])
def test_files_whose_size_no_storage_tells_are_saved(size: int) -> None:
    header = header_of("r/0.parquet", 4, (4,))
    header = header._replace(file=header.file._replace(version=Version(size)))
    files = [saved.SavedFile("vectors", 0, "0.parquet", header)]
    given = saved.SavedManifest("parquet", Columns("embedding"), 1, 0, None, files)
    assert decoded(saved.encode_manifest(given)).files[0].header == header


@pytest.mark.parametrize("rows", [2**53, 2**53 + 1])
def test_no_file_has_more_rows_than_are_counted_exactly(rows: int) -> None:
    header = header_of("r/0.parquet", rows, (rows,))
    files = [saved.SavedFile("vectors", 0, "0.parquet", header)]
    content = saved.encode_manifest(saved.SavedManifest("parquet", Columns("embedding"), 1, 0, None, files))
    if rows == 2**53:
        assert decoded(content).files[0].header.rows == rows
        content = saved.encode_manifest(saved.SavedManifest("parquet", Columns("embedding"), 1, 0, None, files * 2))
        with pytest.raises(FormatError, match=r"^m: not a usable manifest: it claims 18,014,398,509,481,984 rows; "):
            decoded(content)
    else:
        said = (
            r"^m: not a usable manifest: it holds numbers for '0\.parquet' that cannot be: 9,007,199,254,740,993 rows"
        )
        with pytest.raises(FormatError, match=said):
            decoded(content)


def test_a_manifest_takes_no_more_than_its_size_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Just as much is read, and one byte more is not; nor is one file more."""
    content = encoded(checksum="a" * 64)
    group = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0)
    chunks = [group.column(k) for k in range(group.num_columns)]
    starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    stops = [start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True)]
    pages = [page for bounds in zip(starts, stops, strict=True) for page in iter_page_heads(content, *bounds)]
    monkeypatch.setattr(saved, "_MOST_TIMES", 0)
    least, most = 0, 2**20
    while most - least > 1:
        limit = (least + most) // 2
        monkeypatch.setattr(saved, "_MOST_NBYTES", limit)
        said = ""
        try:
            decoded(content)
        except FormatError as error:
            said = str(error)
        if said:
            least = limit
            told = f"m: not a usable manifest: it claims to hold more than {limit:,} bytes, but has {len(content):,}; r"
            assert said.startswith(told)
        else:
            most = limit
    assert len(pages) > len(chunks)
    assert most == sum(page.nbytes + 8 * page.values for page in pages)
    # Of its own size it may take three times as much, and some bytes more.
    monkeypatch.setattr(saved, "_MOST_TIMES", 3)
    monkeypatch.setattr(saved, "_MOST_NBYTES", most - 3 * len(content))
    decoded(content)
    monkeypatch.setattr(saved, "_MOST_NBYTES", most - 3 * len(content) - 1)
    with pytest.raises(FormatError, match=rf"it claims to hold more than {most - 1:,} bytes, but has"):
        decoded(content)
    monkeypatch.setattr(saved, "_MOST_NBYTES", 2**20)
    monkeypatch.setattr(saved, "_MOST_FILES", 0)
    with pytest.raises(FormatError, match=rf"it claims to name 3 files, but has {len(content):,} bytes"):
        decoded(content)


def test_texts_of_a_manifest_take_no_more_than_its_size_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts as often as it is used, though it is stored once."""
    content = encoded(checksum="a" * 10_000)
    table = pq.read_table(pa.BufferReader(content))
    texts = [column for column in table.columns if pa.types.is_string(column.type) or pa.types.is_binary(column.type)]
    nbytes = sum(len(text) for column in texts for text in column.to_pylist())
    assert nbytes > 30_000
    monkeypatch.setattr(saved, "_MOST_TIMES", 0)
    monkeypatch.setattr(saved, "_MOST_NBYTES", nbytes)
    assert len(decoded(content).files) == 3
    monkeypatch.setattr(saved, "_MOST_NBYTES", nbytes - 1)
    with pytest.raises(FormatError, match=rf"it claims to hold {nbytes:,} bytes of text, but has {len(content):,}; "):
        decoded(content)


@pytest.mark.parametrize(
    ("dtype", "is_read"), [("?", True), ("c16", True), ("f8", True), ("O", False), ("M8[s]", False), ("S4", False)]
)
def test_dtypes_of_manifests_are_numbers(dtype: str, is_read: bool) -> None:
    content = encoded(dtype=np.dtype(dtype))
    if is_read:
        assert decoded(content).files[0].header.dtype == dtype
    else:
        with pytest.raises(FormatError, match=r"^m: not a usable manifest: it names the dtype .* which is not numeric"):
            decoded(content)


# ---------------------------------------------------------------------------------------------------------------------
# Filters

VALUES = pd.DataFrame(
    {
        "n": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8],
        "some": pd.array([1, None, 2, None, 3, 1, 2, 3, None, 1, 2, 3], dtype="Int64"),
        "word": ["a", "b", None, "a", "b", "c", None, "a", "b", "c", "a", "b"],
    }
)


@pytest.fixture(scope="module", params=[3, 12])
def filtered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingReader:
    """Twelve rows in files of seven and five."""
    folder = tmp_path_factory.mktemp("filtered")
    for number, part in enumerate((VALUES[:7], VALUES[7:])):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2 * len(part), np.float32)), 2)
        table = pa.Table.from_pandas(part, preserve_index=False).append_column("embedding", vectors)
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=request.param)
    return EmbeddingReader(folder, meta_columns="n")


CONDITIONS: list[tuple[Any, Any]] = [
    ([("n", "==", 5)], VALUES["n"] == 5),
    ([("n", "=", 5)], VALUES["n"] == 5),
    ([("n", "!=", 5)], VALUES["n"] != 5),
    ([("n", "<", 5)], VALUES["n"] < 5),
    ([("n", "<=", 5)], VALUES["n"] <= 5),
    ([("n", ">", 5)], VALUES["n"] > 5),
    ([("n", ">=", 5)], VALUES["n"] >= 5),
    ([("n", "in", {1, 5})], VALUES["n"].isin([1, 5])),
    ([("n", "not in", np.array([1, 5]))], ~VALUES["n"].isin([1, 5])),
    ([("n", ">", 2), ("n", "<", 6)], (VALUES["n"] > 2) & (VALUES["n"] < 6)),
    ([[("n", ">", 8)], [("n", "<", 2)]], (VALUES["n"] > 8) | (VALUES["n"] < 2)),
    ([[("n", ">", 2), ("some", "==", 1)], (("word", "==", "c"),)], (VALUES["n"] > 2) & (VALUES["some"] == 1)),
    ([("some", "!=", 1)], VALUES["some"] != 1),
    ([("some", "in", [1, None])], VALUES["some"] == 1),
    ([("some", "not in", [1])], VALUES["some"].isin([2, 3])),
    ([("some", "==", None)], VALUES["n"] < 0),
    ([("word", ">=", "b")], VALUES["word"].isin(["b", "c"])),
    ([("word", "in", [])], VALUES["n"] < 0),
]


@pytest.mark.parametrize("number", range(len(CONDITIONS)))
def test_conditions_hold_for_the_rows_for_which_they_hold_in_pandas(filtered: EmbeddingReader, number: int) -> None:
    condition, holds = CONDITIONS[number]
    mask = holds.fillna(False).to_numpy(bool) | ((VALUES["word"] == "c").to_numpy() & (number == 11))
    for rows in (
        *(np.arange(a, b) for a in range(12) for b in (a + 1, a + 2, a + 5, 12) if b <= 12),
        np.array([0, 1, 3, 4]),
        np.array([0, 2, 3, 7, 8, 11]),
        np.array([5, 7]),
        np.array([11, 0, 5, 5, 3]),
        np.arange(12)[::-1],
    ):
        found = np.asarray(filtered.take(rows).filter(condition).rows)
        assert found.tolist() == rows[mask[rows]].tolist()
    for name in ("n", "some", "word"):
        picked = filtered.filter(lambda frame: frame[frame.columns[0]].notna(), columns=[name, name])
        assert np.asarray(picked.rows).tolist() == np.flatnonzero(VALUES[name].notna()).tolist()
    picked = filtered.filter(lambda frame: frame["some"] == 1, columns="some")  # null where that is null
    assert np.asarray(picked.rows).tolist() == [0, 5, 9]


def test_what_a_filter_needs_is_read_once(filtered: EmbeddingReader) -> None:
    seen: Counter[int] = Counter()
    every: list[str] = []

    def keep(frame: pd.DataFrame) -> Any:
        seen.update(frame["n"].tolist())
        every.append(",".join(frame.columns))
        return frame["n"] > 4

    assert np.asarray(filtered.filter(keep, columns=["n", "word"]).rows).tolist() == [4, 5, 7, 8, 10, 11]
    assert seen == Counter(VALUES["n"].tolist())
    assert {*every} == {"n,word"}


_CONDITIONS = (
    'conditions are (column, operator, value), such as [("width", ">=", 512), ("nsfw", "==", "UNLIKELY")], or a list '
    "of such lists, of which one has to hold"
)
_LISTS = "the value of 'in' must be a list, tuple or set"
_COLUMNS = "a function as filter needs columns=[...], the metadata columns that it looks at, not "

NO_LISTS: tuple[Any, ...] = ("n", b"n", [], 3)
NO_NAMES: tuple[Any, ...] = (None, [], 3, [3], ["n", 3], {"n": 1})

#: What holds no conditions, and what of it is told.
NO_CONDITIONS: list[tuple[Any, Any]] = [
    ([[]], []),
    ([()], ()),
    ([3], 3),
    ([("n", ">", 3), 3], "n"),
    ([[("n", ">", 3)], []], []),
    ([[("n", ">", 3)], 3], 3),
    ([("n", 3)], ("n", 3)),
    ([("n", ">", 3, 4)], ("n", ">", 3, 4)),
    ([(3, ">", 3)], (3, ">", 3)),
    ([["n>3"]], "n>3"),
    ([["abc"]], "abc"),
]

#: What is no filter: a condition and columns, and what is said of it.
NO_FILTERS: list[tuple[Any, Any, type[Exception], str]] = [
    *((given, None, ArgumentTypeError, f"filters={given!r}: {_CONDITIONS}, or a fu") for given in NO_LISTS),
    *((given, None, ArgumentTypeError, f"filters holds {told!r}: {_CONDITIONS}") for given, told in NO_CONDITIONS),
    ([("n", "~", 3)], None, ArgumentError, "('n', '~', 3): the operator '~' is none of =, ==, !=, <, <=, >, >=, in, n"),
    ([("n", "in", 3)], None, ArgumentTypeError, f"('n', 'in', 3): {_LISTS}"),
    ([("n", "in", "ab")], None, ArgumentTypeError, f"('n', 'in', 'ab'): {_LISTS}"),
    ([("n", "not in", {3: 4})], None, ArgumentTypeError, "('n', 'not in', {3: 4}): the value of 'not in' must be"),
    ([("n", ">", "a")], None, ArgumentError, "the column 'n' is int64, which cannot be compared with 'a' (>): "),
    ([("n", ">", 1j)], None, ArgumentError, "the column 'n' is int64, which cannot be compared with 1j (>): "),
    ([("n", ">", len)], None, ArgumentError, f"the column 'n' is int64, which cannot be compared with {len!r} (>): "),
    ([("i", ">", 3)], None, ColumnError, "'i' is the row number, not a column; take(slice(start, stop)) picks"),
    ([("n", ">", 3)], ["n"], ArgumentError, "columns= names what a function looks at; conditions name their columns"),
    *((len, given, ArgumentError, f"{_COLUMNS}{given!r}") for given in NO_NAMES),
    (len, ["i"], ColumnError, "'i' is the row number, not a column; take(slice(start, stop)) picks rows by it"),
    (len, "n", ArgumentTypeError, "the filter returned int of shape () and dtype int64; expected is a mask: a boolean"),
    (
        lambda frame: frame["n"].to_numpy()[:-1] > 3,
        "n",
        ArgumentTypeError,
        "the filter returned ndarray of shape (2,) and dtype bool; expected is a mask: a boolean for each of the 3 ro",
    ),
    (
        lambda frame: frame[["n"]] > 3,
        "n",
        ArgumentTypeError,
        "the filter returned DataFrame of shape (3, 1) and dtype bool; expected is a mask: a boolean for each of the 3",
    ),
    (
        lambda frame: frame["n"],
        "n",
        ArgumentTypeError,
        "the filter returned Series of shape (3,) and dtype int64; expected is a mask: a boolean for each of the 3 row",
    ),
]


def test_what_is_no_filter_is_told(filtered: EmbeddingReader) -> None:
    some = filtered.take(slice(0, 3))
    for condition, columns, error, message in NO_FILTERS:
        with pytest.raises(error) as told:
            some.filter(condition, columns=columns)
        assert str(told.value).startswith(message), condition
    for reader in (filtered.take([]), filtered):
        with pytest.raises(ArgumentError, match="cannot be compared"):  # though no row may be looked at
            reader.filter([("n", ">", "a")])
