"""Which files a collection is made of: every way of naming them, their order, and the litter between them.

Every file here holds one row whose values are one number, so that the rows of a collection, read in order, say which
files it found and in which order.
"""

from __future__ import annotations

import io
import os
import re
import tracemalloc
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dask.sizeof import sizeof

from dask_embedding_reader import EmbeddingReader, get_file_list, write_embeddings
from dask_embedding_reader.errors import ArgumentError, FileChangedError, NoFilesError, ReadError
from dask_embedding_reader.storage.find import MANIFEST_NAME
from tests.support import servers


def npy(number: int) -> bytes:
    """An npy file of one row of this number."""
    with io.BytesIO() as f:
        np.save(f, np.full((1, 2), number, np.float32))
        return f.getvalue()


def plant(root: Path, files: dict[str, int]) -> Path:
    """Write files of one row each, named relative to ``root``."""
    for name, number in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(npy(number))
    return root


def numbers(where: Any, **options: Any) -> list[int]:
    """What a reader of ``where`` reads, in order."""
    rows = EmbeddingReader(where, **options).to_dask_array().compute()
    assert (rows[:, 0] == rows[:, 1]).all()
    return [int(number) for number in rows[:, 0]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files, one of them deeper."""
    return plant(tmp_path / "emb", {"a.npy": 1, "b.npy": 2, "deep/er/c.npy": 3})


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of a folder of one's own in fsspec's memory filesystem."""
    fs = fsspec.filesystem("memory")
    name = f"/finding-{uuid.uuid4().hex}"
    fs.makedirs(name)
    yield f"memory:/{name}"
    fs.rm(name, recursive=True)


@pytest.fixture
def walked(memory: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same where the storage cannot list a whole tree, so that its folders are listed one by one."""
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "find", fsspec.AbstractFileSystem.find)
    return memory


# --------------------------------------------------------------------------------------------------------------------
# One folder, one file


def test_options_that_are_no_keywords(tmp_path: Path) -> None:
    options: Any = {3: 4}
    with pytest.raises(ArgumentError, match="storage_options"):
        EmbeddingReader(tmp_path, storage_options=options)


def test_a_folder_is_read_recursively(folder: Path) -> None:
    assert numbers(str(folder)) == [1, 2, 3]


def test_a_pathlib_path_is_as_good_as_a_string(folder: Path) -> None:
    assert numbers(folder) == [1, 2, 3]
    assert numbers(folder / "b.npy") == [2]


def test_any_path_like_object_will_do(folder: Path) -> None:
    class Somewhere:
        def __fspath__(self) -> str:
            return str(folder)

    assert numbers(Somewhere()) == [1, 2, 3]


@pytest.mark.parametrize("slashes", ["/", "//", "///"])
def test_trailing_slashes_do_not_matter(folder: Path, slashes: str) -> None:
    assert numbers(f"{folder}{slashes}") == [1, 2, 3]


def test_dots_in_a_path_do_not_matter(folder: Path) -> None:
    assert numbers(f"{folder}/./deep/../") == [1, 2, 3]


def test_one_file_is_a_collection(folder: Path) -> None:
    assert numbers(str(folder / "deep" / "er" / "c.npy")) == [3]


def test_a_file_asked_for_by_name_is_read_even_if_it_looks_like_litter(tmp_path: Path) -> None:
    # Litter is what nobody asked for: who names a file, wants it.
    plant(tmp_path, {"_kept.npy": 1, ".hidden.npy": 2})
    assert numbers(tmp_path / "_kept.npy") == [1]
    assert numbers([tmp_path / ".hidden.npy", tmp_path / "_kept.npy"]) == [2, 1]


def test_a_relative_path_starts_at_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert numbers("emb") == [1, 2, 3]
    assert numbers("emb/a.npy") == [1]
    assert numbers("emb/*.npy") == [1, 2]
    assert numbers(Path("emb")) == [1, 2, 3]
    monkeypatch.chdir(folder)
    assert numbers(".") == [1, 2, 3]
    assert numbers("../emb/deep") == [3]
    assert numbers("./") == [1, 2, 3]


def test_a_relative_path_still_leads_there_after_a_change_of_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    reader = EmbeddingReader("emb")
    monkeypatch.chdir("/")
    assert reader.to_dask_array().compute()[:, 0].tolist() == [1, 2, 3]


def test_the_attribute_embeddings_folder_is_the_argument_as_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Programs write their results beside it, and compare it.
    monkeypatch.chdir(folder.parent)
    listed: list[Any] = ["emb/a.npy", folder / "b.npy"]
    for given in ("emb", "emb/", f"{folder}//", folder, "emb/*.npy", listed):
        assert EmbeddingReader(given).embeddings_folder == given


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_a_file_url_is_a_local_path(folder: Path, scheme: str) -> None:
    assert numbers(f"{scheme}{folder}") == [1, 2, 3]
    assert numbers(f"{scheme}{folder}/") == [1, 2, 3]
    assert numbers(f"{scheme}{folder}/deep/er/c.npy") == [3]
    assert numbers(f"{scheme}{folder}/*.npy") == [1, 2]


def test_only_files_of_the_format_are_taken(folder: Path) -> None:
    (folder / "notes.txt").write_text("not a vector")
    (folder / "a.npy.bak").write_bytes(b"junk")
    (folder / "a.npz").write_bytes(b"junk")
    (folder / "npy").write_bytes(b"junk")
    pq.write_table(pa.table({"caption": ["x"]}), folder / "a.parquet")
    assert numbers(folder) == [1, 2, 3]


def test_a_folder_named_like_a_file_is_a_folder(tmp_path: Path) -> None:
    plant(tmp_path, {"shard.npy/0.npy": 1, "shard.npy/1.npy": 2})
    assert numbers(tmp_path) == [1, 2]
    assert numbers(tmp_path / "shard.npy") == [1, 2]
    assert numbers(f"{tmp_path}/*.npy") == [1, 2]


# --------------------------------------------------------------------------------------------------------------------
# Globs


GLOBS = [
    ("*.npy", [1, 2]),
    ("*", [1, 2, 3]),
    ("**", [1, 2, 3]),
    ("**/*.npy", [1, 2, 3]),
    ("**/c.npy", [3]),
    ("deep/*/c.npy", [3]),
    ("dee*", [3]),
    ("[ab].npy", [1, 2]),
    ("?.npy", [1, 2]),
    ("[!a].npy", [2]),
]


@pytest.mark.parametrize(("pattern", "expected"), [*GLOBS, ("dee*/", [3])])
def test_a_glob_finds_what_it_matches(folder: Path, pattern: str, expected: list[int]) -> None:
    # A folder that matches stands for what is in it, as it does when named.
    (folder / "readme.md").write_text("matches * but is of no use")
    assert numbers(f"{folder}/{pattern}") == expected
    assert numbers(folder / pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [*GLOBS, ("**/er/*", [3]), ("deep/**/c.npy", [3]), ("d*/e?/", [3]), ("*/er/nothing/*.npy", [])],
)
def test_a_glob_finds_the_same_elsewhere(walked: str, pattern: str, expected: list[int]) -> None:
    fs = fsspec.filesystem("memory")
    for number, name in enumerate(["a.npy", "b.npy", "deep/er/c.npy"], 1):
        fs.pipe(f"{walked}/{name}", npy(number))
    fs.pipe(f"{walked}/readme.md", b"matches * but is of no use")
    if expected:
        assert numbers(f"{walked}/{pattern}") == expected
    else:
        with pytest.raises(NoFilesError):
            numbers(f"{walked}/{pattern}")


def fail_at(monkeypatch: pytest.MonkeyPatch, folder: str, error: OSError) -> None:
    """Make a folder one that cannot be listed, though the listing of its parent names it."""
    kind = type(fsspec.filesystem("memory"))
    listing = kind.ls

    def ls(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if path.rstrip("/").endswith(folder):
            raise error
        return listing(self, path, *args, **kwargs)

    monkeypatch.setattr(kind, "ls", ls)


@pytest.mark.parametrize("pattern", ["", "/", "/**", "/**/*.npy", "/*/er/*.npy", "/*/er"])
@pytest.mark.parametrize(
    ("error", "expected", "kind"),
    [
        (FileNotFoundError("no such folder"), r"deep/er: this was listed, but then .* rename", FileChangedError),
        (PermissionError("no entry"), "no entry", ReadError),
    ],
)
def test_a_folder_that_is_listed_but_cannot_be_found_is_not_left_out_in_silence(
    walked: str, monkeypatch: pytest.MonkeyPatch, pattern: str, error: OSError, expected: str, kind: type[ReadError]
) -> None:
    fs = fsspec.filesystem("memory")
    for number, name in enumerate(["a.npy", "deep/b.npy", "deep/er/c.npy"]):
        fs.pipe(f"{walked}/{name}", npy(number))
    fail_at(monkeypatch, "deep/er", error)
    with pytest.raises(kind, match=expected):
        EmbeddingReader(f"{walked}{pattern}")


def test_a_glob_asks_only_for_folders_that_it_may_match(walked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    for number, name in enumerate(["a1/b.npy", "a2/b.npy", "mine/b.npy", "a1/deep/er/b.npy"]):
        fs.pipe(f"{walked}/{name}", npy(number))
    for folder in ("mine", "deep"):
        fail_at(monkeypatch, folder, PermissionError("no entry"))
    assert numbers(f"{walked}/a*/*.npy") == [0, 1]
    assert numbers(f"{walked}/a2*/**/*.npy") == [1]


def test_a_temporary_folder_that_vanishes_is_of_no_importance(walked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Programs that write to a folder make such ones and remove them all the time.
    fs = fsspec.filesystem("memory")
    for number, name in enumerate(["a.npy", "_temporary/0/b.npy"]):
        fs.pipe(f"{walked}/{name}", npy(number))
    fail_at(monkeypatch, "_temporary/0", FileNotFoundError("gone"))
    assert numbers(walked) == [0]


def test_a_local_folder_that_vanishes_while_it_is_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FileChangedError, match=r"deep: this was listed, but then"):
        EmbeddingReader(folder)
    (folder / "deep").rename(folder / "_deep")
    assert numbers(folder) == [1, 2]


def test_links_that_lead_back_up_hide_no_folders(tmp_path: Path) -> None:
    plant(tmp_path, {f"{k}/a.npy": k for k in range(5)})
    for k in range(5):
        (tmp_path / str(k) / "up").symlink_to(tmp_path, target_is_directory=True)
    assert numbers(tmp_path) == [0, 1, 2, 3, 4]


def test_temporary_folders_that_vanish_hide_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, {f"{k}/{name}.npy": k for k in range(5) for name in ("a", "_temporary/b")})
    stat = os.stat

    def gone(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("_temporary"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", gone)
    assert numbers(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:1 link to nothing")
@pytest.mark.parametrize("pattern", ["", "/*.npy", "/**/*.npy"])
def test_a_local_file_that_vanishes_while_it_is_listed(
    pattern: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "0.npy").symlink_to("nowhere")  # a link to nothing is no file that was there
    stat = os.stat

    def gone(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(name):
            raise FileNotFoundError(2, "No such file or directory", path)
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", gone)
    name = "b.npy"
    with pytest.raises(FileChangedError, match=r"b\.npy: this was listed, but then"):
        EmbeddingReader(f"{folder}{pattern}")
    (folder / "b.npy").rename(folder / "_b.npy")  # what other programs write before they rename it
    name = "_b.npy"
    assert numbers(f"{folder}{pattern}") == ([1] if pattern == "/*.npy" else [1, 3])


def test_a_glob_in_the_middle_of_a_path_reaches_into_every_folder(tmp_path: Path) -> None:
    plant(tmp_path, {"run1/emb/0.npy": 1, "run2/emb/0.npy": 2, "run2/other/0.npy": 3, "run3/emb/0.npy": 4})
    assert numbers(f"{tmp_path}/run*/emb") == [1, 2, 4]
    assert numbers(f"{tmp_path}/run[12]/emb/*.npy") == [1, 2]


# --------------------------------------------------------------------------------------------------------------------
# Lists


def test_a_list_keeps_its_order(tmp_path: Path) -> None:
    plant(tmp_path, {"z/0.npy": 1, "z/1.npy": 2, "a/0.npy": 3, "m.npy": 4})
    assert numbers([f"{tmp_path}/z", f"{tmp_path}/a"]) == [1, 2, 3]
    assert numbers([f"{tmp_path}/a", f"{tmp_path}/z"]) == [3, 1, 2]
    assert numbers([f"{tmp_path}/z/1.npy", f"{tmp_path}/z/0.npy"]) == [2, 1]


def test_a_list_mixes_folders_files_globs_and_paths(tmp_path: Path) -> None:
    plant(tmp_path, {"z/0.npy": 1, "z/1.npy": 2, "a/0.npy": 3, "m.npy": 4})
    assert numbers([tmp_path / "m.npy", f"{tmp_path}/z/*.npy", f"file://{tmp_path}/a/"]) == [4, 1, 2, 3]


def test_a_tuple_is_a_list(folder: Path) -> None:
    assert numbers((folder / "b.npy", folder / "a.npy")) == [2, 1]


def test_a_file_reached_twice_is_read_once_at_its_first_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert numbers([folder / "b.npy", folder]) == [2, 1, 3]
    assert numbers([folder, folder / "a.npy", f"{folder}/*.npy", folder]) == [1, 2, 3]
    assert numbers(["b.npy", "./b.npy", f"{folder}/deep/../b.npy", f"file://{folder}/b.npy", f"{folder}//b.npy"]) == [2]


def test_folders_within_folders_are_not_read_twice(folder: Path) -> None:
    assert numbers([folder / "deep", folder]) == [3, 1, 2]


def test_two_file_systems_make_one_collection(folder: Path, memory: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe(f"{memory}/x.npy", npy(8))
    fs.pipe(f"{memory}/y.npy", npy(9))
    assert numbers([memory, folder]) == [8, 9, 1, 2, 3]
    assert numbers([folder / "b.npy", f"{memory}/y.npy", folder / "a.npy"]) == [2, 9, 1]
    reader = EmbeddingReader([folder, memory])
    batches = [rows[:, 0].tolist() for rows, _ in reader(batch_size=2, show_progress=False)]
    assert batches == [[1, 2], [3, 8], [9]]


def test_equal_paths_of_two_file_systems_are_two_files(tmp_path: Path) -> None:
    plant(tmp_path, {"x.npy": 1})
    fs = fsspec.filesystem("memory")
    fs.pipe(f"memory:/{tmp_path}/x.npy", npy(2))
    try:
        assert numbers([f"memory:/{tmp_path}/x.npy", tmp_path / "x.npy"]) == [2, 1]
    finally:
        fs.rm(f"memory:/{tmp_path}/x.npy")


# --------------------------------------------------------------------------------------------------------------------
# Order within a folder


def test_files_are_ordered_by_their_full_path_as_strings(tmp_path: Path) -> None:
    # The order of the reference. A walk folder by folder would give "a/" before "a-1.npy", since "a" < "a-1", and a
    # natural sort would give 2 before 10.
    plant(tmp_path, {"a/0.npy": 2, "a-1.npy": 1, "a1.npy": 3, "2.npy": 0, "10.npy": -1, "B.npy": 1, "é.npy": 4})
    assert numbers(tmp_path) == [-1, 0, 1, 1, 2, 3, 4]
    assert numbers(f"{tmp_path}/**/*.npy") == [-1, 0, 1, 1, 2, 3, 4]


def test_the_order_is_the_same_in_memory(memory: str) -> None:
    fs = fsspec.filesystem("memory")
    for name, number in {"a/0.npy": 2, "a-1.npy": 1, "a1.npy": 3, "2.npy": 0, "10.npy": -1}.items():
        fs.pipe(f"{memory}/{name}", npy(number))
    assert numbers(memory) == [-1, 0, 1, 2, 3]


def test_the_same_files_on_a_case_sensitive_path_are_different(tmp_path: Path) -> None:
    plant(tmp_path, {"x.npy": 2})
    if (tmp_path / "X.npy").exists():
        pytest.skip("this file system does not tell upper from lower case")
    plant(tmp_path, {"X.npy": 1})
    assert numbers(tmp_path) == [1, 2]


# --------------------------------------------------------------------------------------------------------------------
# Names

NAMES = [
    "with space",
    " leading and trailing ",
    "a[1]",
    "[",
    "]",
    "a]b[",
    "[a-z]",
    "part#1",
    "100%",
    "a%20b",
    "%2F",
    "a&b",
    "a+b",
    "a=1,b=2",
    "Größe",
    "日本語",
    "e\u0301",  # decomposed: must not be normalised on the way
    "🐈",
    "quote'd",
    'double"quoted',
    "{braces}",
    "{0}",
    "semi;colon",
    "co:lon",
    "dollar$HOME",
    "caret^tilde~",
    "bang!",
    "at@host",
    "back\\slash",
    "dotted.name.with.more",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    plant(tmp_path / name, {"0.npy": 1, "sub/1.npy": 2})
    # A neighbour that the name would match if it were read as a pattern, or decoded as a URL.
    plant(tmp_path, {"a1/0.npy": 99, "a b/0.npy": 99, "b/0.npy": 99})
    for where in (tmp_path / name, str(tmp_path / name), f"{tmp_path / name}/", [str(tmp_path / name)]):
        assert numbers(where) == [1, 2]
    assert numbers(f"file://{tmp_path / name}") == [1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    plant(tmp_path / "emb", {f"{name}.npy": 1})
    plant(tmp_path, {"a1.npy": 99, "a b.npy": 99, "b.npy": 99})
    assert numbers(tmp_path / "emb") == [1]
    assert numbers(tmp_path / "emb" / f"{name}.npy") == [1]
    assert numbers(f"{tmp_path}/emb/*.npy") == [1]
    reader = EmbeddingReader(tmp_path / "emb")
    assert reader.locate(0) == (str(tmp_path / "emb" / f"{name}.npy"), 0)
    assert [rows[0, 0] for rows, _ in reader(batch_size=1, show_progress=False)] == [1]


@pytest.mark.parametrize("name", [n for n in NAMES if "\\" not in n])
def test_a_folder_in_memory_may_have_any_name(memory: str, name: str) -> None:
    fsspec.filesystem("memory").pipe(f"{memory}/{name}/0.npy", npy(1))
    fsspec.filesystem("memory").pipe(f"{memory}/a1/0.npy", npy(99))
    assert numbers(f"{memory}/{name}") == [1]
    assert numbers(f"{memory}/{name}/") == [1]
    assert numbers(f"{memory}/{name}/0.npy") == [1]


@pytest.mark.parametrize("count", [3, 4])
def test_three_places_without_files_are_named_and_more_are_told_to_be(tmp_path: Path, count: int) -> None:
    folders = [tmp_path / f"empty{k}" for k in range(count)]
    for folder in folders:
        folder.mkdir()
    with pytest.raises(NoFilesError) as caught:
        EmbeddingReader(folders, "npy")
    assert [f"empty{k}" in str(caught.value) for k in range(count)] == [True, True, True, False][:count]
    assert str(caught.value).endswith("; …") is (count > 3)


def test_a_path_that_exists_wins_over_its_reading_as_a_glob(tmp_path: Path) -> None:
    plant(tmp_path, {"a1/0.npy": 1})
    assert numbers(f"{tmp_path}/a[1]") == [1]  # nothing has that name, so it is a pattern
    plant(tmp_path, {"a[1]/0.npy": 2})
    assert numbers(f"{tmp_path}/a[1]") == [2]
    assert numbers(f"{tmp_path}/a[1]/0.npy") == [2]
    assert numbers([f"{tmp_path}/a[1]/", tmp_path / "a1"]) == [2, 1]


@pytest.mark.parametrize("name", ["a::b", "zip::c", "http:", "s3:/x"])
def test_a_path_that_exists_wins_over_its_reading_as_a_url(tmp_path: Path, name: str) -> None:
    plant(tmp_path, {f"{name}/0.npy": 1})
    assert numbers(tmp_path / name) == [1]
    assert numbers(f"{tmp_path}/{name}/") == [1]
    assert numbers([f"{tmp_path}/{name}/0.npy"]) == [1]
    assert numbers(f"file://{tmp_path}/{name}/0.npy") == [1]
    assert numbers(f"{tmp_path}/{name}/*.npy") == [1]
    assert numbers(f"simplecache::file://{tmp_path}/{name}/0.npy") == [1]


def test_an_archive_whose_name_would_be_a_chain_is_refused(tmp_path: Path) -> None:
    plant(tmp_path, {"0.npy": 1})
    with zipfile.ZipFile(tmp_path / "a::b.zip", "w") as archive:
        archive.write(tmp_path / "0.npy", "c::0.npy")
    with pytest.raises(ArgumentError, match="'::' in the name of an archive"):
        EmbeddingReader(f"zip://*.npy::file://{tmp_path}/a::b.zip")
    (tmp_path / "a::b.zip").rename(tmp_path / "ab.zip")
    assert numbers(f"zip://*.npy::file://{tmp_path}/ab.zip") == [1]
    assert numbers(f"zip://*.npy::{tmp_path}/ab.zip") == [1]


def test_a_bracket_can_be_escaped_in_a_glob(tmp_path: Path) -> None:
    plant(tmp_path, {"a[1]/0.npy": 2, "a1/0.npy": 1})
    assert numbers(f"{tmp_path}/a[[]1]/*.npy") == [2]


def test_parquet_files_may_have_any_name_too(tmp_path: Path) -> None:
    # Parquet is opened by another library, which has its own ideas about URLs and brackets.
    for number, name in enumerate(["a [1] #%20é.parquet", "b&+.parquet"]):
        table = pa.table({"embedding": pa.array([[float(number)] * 2], pa.list_(pa.float32())), "n": [number]})
        pq.write_table(table, tmp_path / name)
    reader = EmbeddingReader(tmp_path, file_format="parquet", meta_columns="n")
    assert reader.to_dask_array().compute()[:, 0].tolist() == [0, 1]
    assert reader.to_dask_dataframe().compute()["n"].tolist() == [0, 1]


# --------------------------------------------------------------------------------------------------------------------
# Litter

LITTER = [
    ".hidden.npy",
    "._a.npy",  # written by macOS beside every file that it copies to a foreign disk
    "_a.npy",
    ".ipynb_checkpoints/a.npy",
    "_temporary/0/task/a.npy",
    "deep/_temporary/a.npy",
    "deep/.cache/er/a.npy",
    "deep/._c.npy",
    "_SUCCESS",
    "_metadata",
    "_common_metadata",
    ".DS_Store",
    "Thumbs.db",
]


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.npy", "/*"])
def test_litter_is_passed_over(folder: Path, pattern: str) -> None:
    for name in LITTER:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not even looked at: some would be readable, some not.
        path.write_bytes(npy(99) if name.endswith("/a.npy") else b"litter")
    assert numbers(f"{folder}{pattern}") == [1, 2, 3]


def test_litter_is_passed_over_in_memory_too(memory: str) -> None:
    fs = fsspec.filesystem("memory")
    for name in LITTER:
        fs.pipe(f"{memory}/{name}", b"litter")
    fs.pipe(f"{memory}/ok.npy", npy(1))
    assert numbers(memory) == [1]
    assert numbers(f"{memory}/**/*.npy") == [1]


@pytest.mark.parametrize("pattern", ["", "/**/*.npy", "/*"])
def test_a_zero_byte_file_is_litter(folder: Path, pattern: str) -> None:
    # What a writer leaves that died before its first byte, and what marks a folder in some object stores.
    for name in ("0.npy", "aa.npy", "deep/er/z.npy", "deep/empty.npy"):
        (folder / name).touch()
    assert numbers(f"{folder}{pattern}") == [1, 2, 3]


def test_parquet_litter_is_passed_over(tmp_path: Path) -> None:
    table = pa.table({"embedding": pa.array([[1.0, 1.0]], pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "part-0.parquet")
    for name in ("._part-0.parquet", "_metadata.parquet", ".part-0.parquet.crc", "_SUCCESS"):
        (tmp_path / name).write_bytes(b"litter")
    (tmp_path / "part-1.parquet").touch()
    assert numbers(tmp_path, file_format="parquet") == [1]


@pytest.mark.parametrize("name", [".cache", "_emb", "._odd", "_temporary"])
def test_the_folder_that_was_asked_for_is_never_litter(tmp_path: Path, name: str) -> None:
    # Only names below the given folder count: caches and scratch space often lie in hidden folders.
    plant(tmp_path / name / "emb", {"0.npy": 1, "sub/1.npy": 2})
    assert numbers(tmp_path / name) == [1, 2]
    assert numbers(tmp_path / name / "emb") == [1, 2]
    assert numbers(f"{tmp_path}/{name}/emb/*.npy") == [1]
    assert numbers(f"{tmp_path}/{name}/**/*.npy") == [1, 2]


def test_nothing_but_litter_is_nothing(tmp_path: Path) -> None:
    plant(tmp_path, {"_temporary/0.npy": 1, ".a.npy": 2})
    with pytest.raises(NoFilesError):
        EmbeddingReader(tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# Links


def test_a_linked_file_is_a_file(folder: Path, tmp_path: Path) -> None:
    plant(tmp_path / "elsewhere", {"x.npy": 9})
    os.symlink(tmp_path / "elsewhere" / "x.npy", folder / "linked.npy")
    assert numbers(folder) == [1, 2, 3, 9]
    assert numbers(folder / "linked.npy") == [9]
    assert numbers(f"{folder}/l*.npy") == [9]


def test_a_link_to_a_folder_can_be_asked_for(folder: Path, tmp_path: Path) -> None:
    os.symlink(folder, tmp_path / "link")
    assert numbers(tmp_path / "link") == [1, 2, 3]
    assert numbers(f"{tmp_path}/link/") == [1, 2, 3]
    assert numbers(f"{tmp_path}/link/*.npy") == [1, 2]
    assert numbers(f"{tmp_path}/link/deep") == [3]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", [1, 2, 3, 9, 8]),
        ("/*", [1, 2, 3, 9, 8]),
        ("/l*", [9, 8]),
        ("/link", [9, 8]),
        ("/*/*.npy", [8]),
        ("/*/er/*.npy", [3, 9]),
        ("/**/*.npy", [1, 2, 3, 9, 8]),
        ("/**", [1, 2, 3, 9, 8]),
        ("/l*/e*", [9]),
    ],
)
def test_a_linked_folder_is_a_folder(folder: Path, tmp_path: Path, pattern: str, expected: list[int]) -> None:
    plant(tmp_path / "elsewhere", {"x.npy": 8, "er/y.npy": 9})
    os.symlink(tmp_path / "elsewhere", folder / "link", target_is_directory=True)
    assert numbers(f"{folder}{pattern}") == expected


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.npy", "/*/*/*.npy"])
def test_links_that_lead_back_up_are_followed_once_by_no_pattern(folder: Path, tmp_path: Path, pattern: str) -> None:
    plant(tmp_path / "other" / "in", {"x.npy": 9})
    for link, there in ((folder / "o", tmp_path / "other"), (tmp_path / "other" / "back", folder)):
        os.symlink(there, link, target_is_directory=True)
    for name in ("deep/up", "deep/er/top", "itself"):
        os.symlink(folder, folder / name, target_is_directory=True)
    os.symlink("round", folder / "round")
    assert numbers(f"{folder}{pattern}") == ([3, 9] if pattern.startswith("/*/") else [1, 2, 3, 9])


def test_a_link_that_leads_in_a_circle_is_not_followed_for_ever(folder: Path) -> None:
    os.symlink(folder, folder / "deep" / "circle")
    assert numbers(folder) == [1, 2, 3]


@pytest.mark.parametrize("pattern", ["", "/*.npy", "/**/*.npy"])
def test_links_to_nothing_are_passed_over_with_a_warning(folder: Path, pattern: str) -> None:
    # As where a disk is not mounted, or git-annex has not fetched the content: rows are missing.
    os.symlink(folder / "round.npy", folder / "round.npy")
    os.symlink("nowhere", folder / "gone.npy")
    os.symlink("nowhere", folder / ".hidden.npy")
    os.symlink("nowhere", folder / "other.txt")
    os.symlink("b.npy", folder / "c.npy")
    os.symlink(os.devnull, folder / "device.npy")
    told = f"^2 links to nothing, such as {folder}/gone.npy: the rows of what is missing are left out; mount or fetch"
    with pytest.warns(UserWarning, match=told):
        assert numbers(f"{folder}{pattern}") == ([1, 2, 2] if pattern == "/*.npy" else [1, 2, 2, 3])
    with pytest.raises(NoFilesError, match="1 empty"):
        EmbeddingReader(folder / "gone.npy")


@pytest.mark.parametrize("pattern", ["", "/*", "/l*", "/*/*.npy", "/**/*.npy", "/**"])
def test_a_link_to_what_is_for_others_only_is_no_empty_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    os.symlink(plant(tmp_path / "private" / "in", {"x.npy": 9}), folder / "link", target_is_directory=True)

    def refusing(call: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(path: Any = ".", **options: Any) -> Any:
            if str(path).startswith(str(folder / "link")):  # as for users who may not enter the folder that it is in
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, **options)

        return refuse

    for name in ("stat", "scandir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    with pytest.raises(ReadError, match=r"cannot be listed: .*Permission denied: '[^']*/link.*check the permissions"):
        EmbeddingReader(f"{folder}{pattern}")
    assert numbers(f"{folder}/*.npy") == [1, 2]  # who asks for nothing in it needs no permission


# --------------------------------------------------------------------------------------------------------------------
# get_file_list


def test_get_file_list_gives_the_file_system_and_full_paths(folder: Path) -> None:
    fs, paths = get_file_list(str(folder), "npy")
    assert isinstance(fs, fsspec.AbstractFileSystem)
    assert paths == [f"{folder}/a.npy", f"{folder}/b.npy", f"{folder}/deep/er/c.npy"]
    # What programs do with them.
    for path, number in zip(paths, [1, 2, 3], strict=True):
        with fs.open(path) as f:
            assert np.load(f)[0, 0] == number


def test_get_file_list_keeps_the_protocol_that_it_was_given(folder: Path, memory: str) -> None:
    fsspec.filesystem("memory").pipe(f"{memory}/sub/x.npy", npy(1))
    fs, paths = get_file_list(memory, "npy")
    assert fs is fsspec.filesystem("memory")
    # However many slashes: fsspec's own spelling has three.
    assert paths[0].startswith("memory://")
    assert paths[0].endswith(memory.removeprefix("memory://") + "/sub/x.npy")
    assert len(paths) == 1
    assert fs.cat_file(paths[0]) == npy(1)
    _, paths = get_file_list(f"file://{folder}", "npy")
    assert paths == [f"file://{folder}/a.npy", f"file://{folder}/b.npy", f"file://{folder}/deep/er/c.npy"]


def test_get_file_list_makes_relative_paths_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    _, paths = get_file_list("emb/", "npy")
    assert paths == [f"{folder}/a.npy", f"{folder}/b.npy", f"{folder}/deep/er/c.npy"]


def test_get_file_list_takes_a_list_and_any_format(folder: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), folder / "meta.parquet")
    _, paths = get_file_list([str(folder)], "parquet")
    assert paths == [f"{folder}/meta.parquet"]
    _, paths = get_file_list([f"{folder}/a.npy", f"{folder}/deep"], "npy")
    assert paths == [f"{folder}/a.npy", f"{folder}/deep/er/c.npy"]


def test_get_file_list_of_nothing_is_empty_and_never_less_than_all(folder: Path) -> None:
    (folder / "none").mkdir()
    for nothing in (str(folder / "none"), str(folder / "missing"), [str(folder / "none"), str(folder / "none")]):
        filesystem, paths = get_file_list(nothing, "npy")
        assert (filesystem.exists(str(folder)), paths) == (True, [])
    assert get_file_list([str(folder / "none"), str(folder / "deep")], "npy")[1] == [f"{folder}/deep/er/c.npy"]
    assert get_file_list(str(folder / "a.npy"), "parquet")[1] == []  # unlike a reader, it is asked for a suffix
    with pytest.raises(NoFilesError, match="missing"):
        get_file_list([str(folder / "missing"), str(folder)], "npy")


# --------------------------------------------------------------------------------------------------------------------
# Files whose names do not end as those in a folder must

OTHER_NAMES = {
    "npy": ["0", "0.NPY", "0.npy.bak", "part-00000", "_0.npy", "v1.5"],
    "parquet": ["0", "0.PARQUET", "0.parquet.gzip", "0.pq", "0.parq", "0.snappy", "part-00000", ".0.parquet"],
}


def embeddings_file(file_format: str) -> bytes:
    if file_format == "npy":
        return npy(7)
    sink = io.BytesIO()
    pq.write_table(pa.table({"embedding": pa.array([[7.0, 7.0]], pa.list_(pa.float32()))}), sink)
    return sink.getvalue()


@pytest.mark.parametrize(("file_format", "name"), [(kind, name) for kind in OTHER_NAMES for name in OTHER_NAMES[kind]])
@pytest.mark.parametrize("place", ["local", "memory", "walked"])
def test_a_named_file_is_read_whatever_its_suffix(
    tmp_path: Path, request: pytest.FixtureRequest, place: str, file_format: str, name: str
) -> None:
    root = str(tmp_path) if place == "local" else request.getfixturevalue(place)
    fs, _ = fsspec.core.url_to_fs(root)
    fs.pipe_file(f"{root}/{name}", embeddings_file(file_format))
    fs.pipe_file(f"{root}/{'0.parquet' if file_format == 'npy' else '0.npy'}", b"of the other format")
    glob = f"{root}/{name[:-1]}?"
    for source in (f"{root}/{name}", [f"{root}/{name}"], glob):
        assert numbers(source, file_format=file_format) == [7], source


def test_files_of_a_web_server_are_ordered_by_the_names_that_people_see(tmp_path: Path) -> None:
    servers.require(servers.nginx_available, "nginx")
    names = ["a b", "a!b", "a+b", "b", "\u00e9", "~"]  # in the addresses: a%20b, a%2Bb, %C3%A9
    for number, name in enumerate(sorted(names)):
        (tmp_path / f"{name}.npy").write_bytes(npy(number))
    with servers.nginx(tmp_path) as server:
        assert numbers(f"{server.url}/") == numbers(tmp_path) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("scheme", ["MEMORY://", "Memory://", "simplecache::MEMORY://"])
def test_schemes_may_be_written_in_capitals(memory: str, scheme: str) -> None:
    fsspec.filesystem("memory").pipe_file(f"{memory}/0.npy", npy(5))
    assert numbers(memory.replace("memory://", scheme)) == [5]
    assert numbers(f"{memory}/0.npy".replace("memory://", scheme)) == [5]


@pytest.mark.parametrize("name", ["0.pq", "part-00000", "v1.5"])
def test_a_named_file_on_a_web_server_is_read_whatever_its_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(embeddings_file("parquet"))
    with servers.http_files(tmp_path) as server:
        assert numbers(f"{server.url}/{name}", file_format="parquet") == [7]
        assert numbers([f"{server.url}/{name}?signature=x"], file_format="parquet") == [7]


def test_nothing_is_found_in_an_empty_file_on_a_web_server(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with (
        servers.http_files(tmp_path) as server,
        pytest.raises(NoFilesError, match="/empty' holds no files; check the path"),
    ):
        EmbeddingReader(f"{server.url}/empty", "npy")


def test_a_glob_takes_what_is_called_otherwise_only_beside_no_other(folder: Path) -> None:
    plant(folder, {"d": 4, "e.NPY": 5, "f.txt": 6})
    assert numbers(f"{folder}/*") == [1, 2, 3]  # as the folder itself
    assert numbers(f"{folder}/[a-f]*") == [1, 2, 3, 5]
    assert numbers(f"{folder}/[d-e]*") == [3, 5]
    assert numbers(f"{folder}/[df]?txt") == [6]
    with pytest.raises(NoFilesError, match=r"file_format=\"parquet\"|found instead"):
        EmbeddingReader(f"{folder}/*", "parquet")


def test_pairs_of_files_that_are_called_otherwise(tmp_path: Path) -> None:
    (tmp_path / "e-1").write_bytes(npy(1))
    pq.write_table(pa.table({"x": [5]}), tmp_path / "m-1.pq")
    reader = EmbeddingReader(tmp_path / "e-1", "parquet_npy", meta_columns="x", metadata_folder=tmp_path / "m-1.pq")
    assert reader.to_dask_dataframe().compute()["x"].tolist() == [5]
    with pytest.raises(NoFilesError, match=r"holds no \.parquet file beside its npy files"):
        EmbeddingReader(tmp_path / "e-1", "parquet_npy", meta_columns="x")


@pytest.mark.parametrize("file_format", ["parquet", "auto"])
@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (("0.pq", "1.pq"), "*.pq"),
        (("0.PARQUET", "1.PARQUET"), "*.PARQUET"),
        (("df.parquet.gzip", "df2.parquet.gzip"), "*.parquet.gzip"),
        (("part-00000", "part-00001"), "part-*"),
        (("0.parquet.part1", "1.parquet.part1"), "*.parquet.part1"),
    ],
)
def test_files_that_a_folder_passes_over_for_their_suffix_can_be_named(
    tmp_path: Path, names: tuple[str, str], pattern: str, file_format: str
) -> None:
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_bytes(embeddings_file("parquet"))
    wanted = re.escape(f"{tmp_path}/in/{pattern}")
    for source in ("in", "*", "in/*"):
        with pytest.raises(NoFilesError, match=f"found instead 2 files: 2 .*; .* name them, as in '{wanted}'"):
            EmbeddingReader(f"{tmp_path}/{source}", file_format)
    assert numbers(f"{tmp_path}/in/{pattern}", file_format=file_format) == [7, 7]


# --------------------------------------------------------------------------------------------------------------------
# Folders without files


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_folder_without_files_in_a_list_is_passed_over_with_a_warning(
    folder: Path, request: pytest.FixtureRequest, place: str
) -> None:
    root = str(folder) if place == "local" else request.getfixturevalue(place)
    fs, _ = fsspec.core.url_to_fs(root)
    for name, content in {"none/README.md": b"x", "hollow/0.npy": b"", "full/0.npy": npy(1)}.items():
        fs.makedirs(f"{root}/{name.partition('/')[0]}", exist_ok=True)
        fs.pipe_file(f"{root}/{name}", content)
    for nothing in ("none", "hollow", "none/*.npy"):
        for sources in ([f"{root}/{nothing}", f"{root}/full"], [f"{root}/full", f"{root}/{nothing}"]):
            with pytest.warns(UserWarning, match=re.escape(f"'{root}/{nothing}' holds no file of this format")):
                assert numbers(sources) == [1]
    with pytest.raises(NoFilesError, match=r"README|1 \.md.*; no \.npy"):
        EmbeddingReader([f"{root}/none", f"{root}/hollow"])
    with pytest.raises(NoFilesError, match="gone"):  # what is not there at all may be a wrong name
        EmbeddingReader([f"{root}/gone", f"{root}/full"])


def test_a_metadata_folder_without_files_in_a_list_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    plant(tmp_path, {"e/0.npy": 1})
    (tmp_path / "none").mkdir()
    (tmp_path / "m").mkdir()
    pq.write_table(pa.table({"x": [5]}), tmp_path / "m/0.parquet")
    folders = [tmp_path / "none", tmp_path / "m"]
    with pytest.warns(UserWarning, match="none' holds no file"):
        reader = EmbeddingReader(tmp_path / "e", "parquet_npy", meta_columns="x", metadata_folder=folders)
    assert reader.to_dask_dataframe().compute()["x"].tolist() == [5]


def test_a_writer_that_ends_while_its_folder_is_listed_leaves_nothing_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(folder, {"_writing/incomplete": 0})
    walk = os.walk

    def end_of_the_job(top: str, **options: Any) -> Iterator[Any]:
        for number, found in enumerate(walk(top, **options)):
            yield found
            if not number and (folder / "_writing").exists():
                plant(folder, {"d.npy": 4})
                (folder / "_writing/incomplete").unlink()
                (folder / "_writing").rmdir()

    monkeypatch.setattr(os, "walk", end_of_the_job)
    assert numbers(folder) == [1, 2, 4, 3]


def _first(monkeypatch: pytest.MonkeyPatch, method: str, path: str, finish: Callable[[], object]) -> None:
    """Have a writer end just before a folder is listed for the first time."""
    kind, waiting = type(fsspec.filesystem("memory")), [finish]
    listing = getattr(kind, method)

    def listed(self: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
        if folder.rstrip("/").endswith(path) and waiting:
            waiting.pop()()
        return listing(self, folder, *args, **kwargs)

    monkeypatch.setattr(kind, method, listed)


def test_a_writer_that_ends_while_folders_are_listed_leaves_nothing_out(
    walked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe({f"{walked}/{name}": npy(k) for k, name in enumerate(("a.npy", "deep/b.npy", "_writing/incomplete"))})

    def end_of_the_job() -> None:
        fs.pipe(f"{walked}/c.npy", npy(2))
        fs.rm(f"{walked}/_writing", recursive=True)

    _first(monkeypatch, "ls", "_writing", end_of_the_job)
    assert numbers(walked) == [0, 2, 1]


@pytest.mark.parametrize("last_page", [MANIFEST_NAME, "_writing/commit.json"])
def test_a_writer_that_ends_while_pages_are_listed_leaves_nothing_out(
    memory: str, last_page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pages lack its last file, the last one tells of its manifest, or of a note and no mark any more."""
    fs = fsspec.filesystem("memory")
    write_embeddings(np.repeat(np.arange(6, dtype=np.float32), 2).reshape(6, 2), memory, rows_per_file=2)
    kind, pages = type(fs), [0]
    find = kind.find

    def find_by_pages(self: Any, path: str, **kwargs: Any) -> Any:
        pages[0] += 1
        found = find(self, path, **kwargs)
        if pages[0] > 1:
            return found
        seen = {name: info for name, info in found.items() if not name.endswith(("2.npy", MANIFEST_NAME))}
        manifest = next(info for name, info in found.items() if name.endswith(MANIFEST_NAME))
        name = f"{memory.removeprefix('memory:/')}/{last_page}"
        return {**seen, name: {**manifest, "name": name}}

    monkeypatch.setattr(kind, "find", find_by_pages)
    assert numbers(memory) == [0, 1, 2, 3, 4, 5]
    assert pages == [2]


def test_what_a_killed_writer_left_beside_whole_files_is_passed_over(folder: Path) -> None:
    plant(folder, {"_writing/files/a.npy": 9})
    assert numbers(folder) == [1, 2, 3]


def test_dask_is_told_how_much_memory_a_reader_holds(tmp_path: Path) -> None:
    for shard in range(1_000):
        (tmp_path / f"{shard:04}.npy").write_bytes(npy(shard))
    EmbeddingReader(tmp_path)  # what is made once
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        reader = EmbeddingReader(tmp_path)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.5 < sizeof(reader) / held < 1.5
    assert sizeof(reader.take(np.random.default_rng(0).permutation(1_000))) > sizeof(reader) + 1_000
