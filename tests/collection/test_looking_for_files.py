"""What is looked for once, what is said where nothing is found, and which folder beside one may be meant."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dask_embedding_reader.errors import NoFilesError, ReadError
from dask_embedding_reader.storage.find import Finder, find_sibling
from dask_embedding_reader.storage.fsspec import FsspecStore
from dask_embedding_reader.storage.store import ObjectInfo

READABLE = (
    'what can be read are .npy files (file_format="npy", or "parquet_npy" with metadata in .parquet files), .parquet '
    'files (file_format="parquet"), and those of "arrow", "npz", "fbin", "fvecs" and "safetensors"'
)
NAMED = "to read files that are called otherwise, name them, as in '{folder}/"
FIVE = (".npy", ".parquet", ".fbin", ".f16bin", ".u8bin")


def plant(folder: Path, names: str) -> None:
    """Make files of one byte, or none where the name ends in a zero in brackets."""
    for name in names.split():
        path = folder / name.removesuffix("(0)")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if name.endswith("(0)") else b"x")


@pytest.mark.parametrize(
    ("names", "suffixes", "said"),
    [
        ("", ".npy", " file found: '{folder}' holds no files; check the path"),
        ("_SUCCESS .x.npy", ".npy", " file found: '{folder}' holds no files; check the path"),
        ("a.parquet", ".npy", '1 file: 1 .parquet; did you mean file_format="parquet"?'),
        ("a.npy b.fbin", ".parquet", '2 files: 1 .npy, 1 .fbin; did you mean file_format="npy"?'),
        ("a.fbin b.txt c.txt", ".npy", '3 files: 2 .txt, 1 .fbin; did you mean file_format="fbin"?'),
        ("a.fvecs", ".npy", '1 file: 1 .fvecs; did you mean file_format="fvecs"?'),
        ("a.npz", ".npy", '1 file: 1 .npz; did you mean file_format="npz"?'),
        ("a.safetensors", ".npy", '1 file: 1 .safetensors; did you mean file_format="safetensors"?'),
        ("a.arrow", ".npy", '1 file: 1 .arrow; did you mean file_format="arrow"?'),
        ("a.feather", ".npy", '1 file: 1 .feather; did you mean file_format="arrow"?'),
        ("a.npy(0)", ".npy", f"1 file: 1 empty .npy; {READABLE}"),
        ("a.npy(0) b.txt c.txt d/e", ".npy", f"4 files: 2 .txt, 1 empty .npy, 1 without suffix; {READABLE}"),
        ("a.a b.b c.c d.d e.e f.f", ".npy", f"6 files: 1 .a, 1 .b, 1 .c, 1 .d, 1 .e; {READABLE}"),
        ("a.txt", FIVE, f"1 file: 1 .txt; {READABLE}"),
        ("a.txt", (*FIVE, ".npz"), f"1 file: 1 .txt; {READABLE}"),
        ("a.txt", ".json", "1 file: 1 .txt; check the path"),
        ("a.csv", ".npy", f"1 file: 1 .csv; {READABLE}"),
        ("b a.csv", ".parquet", "2 files: 1 .csv, 1 without suffix; make parquet of them: pandas.read_csv(path)"),
        ("a.tsv.gz", ".parquet", '1 file: 1 .gz; make parquet of them: pandas.read_csv(path, sep="\\t").to_parquet('),
        ("a.jsonl", (".npy", ".parquet"), "1 file: 1 .jsonl; make parquet of them: pandas.read_json(path, lines=True)"),
        ("a.ndjson.xz", ".parquet", 'read_json(path, lines=True).to_parquet(path.replace(".ndjson.xz", ".parquet"))'),
        ("b.x a.h5", ".npy", "iter_batches(da.from_array(h5py.File(path)"),
        (
            "a.PTH",
            ".npy",
            "1 file: 1 .PTH; it is pickled Python, which is not loaded from files here; where you trust",
        ),
        (
            "a.pickle",
            ".npy",
            "1 file: 1 .pickle; it is pickled Python, which is not loaded from files here; where you ",
        ),
        ("0.NPY", ".npy", f"1 file: 1 .NPY; {NAMED}*.NPY'"),
        ("b.txt a.PQ", ".parquet", f"2 files: 1 .PQ, 1 .txt; {NAMED}*.PQ'"),
        ("b.txt a.PQ", ".npy", f"2 files: 1 .PQ, 1 .txt; {READABLE}"),
        ("a.npy.bak", ".npy", f"1 file: 1 .bak; {NAMED}*.npy.bak'"),
        ("a.1.npy.b2.c", ".npy", f"1 file: 1 .c; {NAMED}*.b2.c'"),
        ("a.parquet.bak", ".npy", f"1 file: 1 .bak; {READABLE}"),
        ("d/part-7", ".npy", f"1 file: 1 without suffix; {NAMED}d/part-*'"),
        ("part-x", ".npy", f"1 file: 1 without suffix; {READABLE}"),
        ("d7/part-x", ".npy", f"1 file: 1 without suffix; {READABLE}"),
        ("00000", ".npy", f"1 file: 1 without suffix; {NAMED}00000'"),
        ("_writing/incomplete(0)", ".npy", " file found: '{folder}' is being written, or its writing was interrupted"),
        ("_writing/incomplete(0) a.npy(0)", ".npy", " file found: '{folder}' is being written, or its writing was"),
        ("_writing/incomplete(0) a.txt", ".npy", " file found: '{folder}' is being written, or its writing was inter"),
        ("x_writing/incomplete a.txt", ".npy", f"2 files: 1 .txt, 1 without suffix; {READABLE}"),
    ],
)
def test_where_nothing_is_found_what_is_there_instead_is_told(
    tmp_path: Path, names: str, suffixes: str | tuple[str, ...], said: str
) -> None:
    plant(tmp_path, names)
    wanted = (suffixes,) if isinstance(suffixes, str) else suffixes
    with pytest.raises(NoFilesError) as caught:
        Finder().find([tmp_path], wanted)
    told = " or ".join(wanted) if len(wanted) <= 5 else ".npy, .parquet or other readable"
    if not said.startswith(" file"):
        assert str(caught.value).startswith(f"no {told} file found in '{tmp_path}'; found instead ")
    else:
        assert str(caught.value).startswith(f"no {told} file found: ")
    assert said.format(folder=tmp_path) in str(caught.value)
    if said.endswith(("?", "'", '"', "path")):
        assert str(caught.value).endswith(said.format(folder=tmp_path))


@pytest.mark.parametrize(
    ("source", "name", "wanted"),
    [
        ("{top}/emb", "meta", "{top}/a-meta"),
        ("{top}/emb//", "meta", "{top}/a-meta"),
        ("{top}/a-meta", "meta", "{top}/b-meta"),
        ("{top}/emb", "^b", "{top}/b-meta"),
        ("{top}/emb", "emb", None),  # itself
        ("{top}/emb", "meta.txt", None),  # a file
        ("{top}/emb", "none", None),
        ("{top}/em?", "meta", None),
        ("{top}/*", "meta", None),
        ("{top}/[e]mb", "meta", None),
        ("{top}/gone/emb", "meta", None),
        ("http://127.0.0.1:9/emb", "meta", None),
        ("nothing://{top}/emb", "meta", None),
        ("emb", "meta", "a-meta"),
        ("./emb", "meta", "./a-meta"),
        ("../top/emb/", "meta", "../top/a-meta"),
    ],
)
def test_a_folder_beside_one_is_named_as_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str, wanted: str | None
) -> None:
    top = tmp_path / "top"
    for folder in ("emb", "b-meta", "a-meta"):
        (top / folder).mkdir(parents=True)
    (top / "a-meta.txt").touch()
    monkeypatch.chdir(top)
    found = find_sibling(source.format(top=top), re.compile(name))
    assert found == (wanted and wanted.format(top=top))


def test_a_folder_beside_one_at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    from dask_embedding_reader.storage.local import LocalStore

    listed = list[str]()

    def list_folder(_: LocalStore, folder: str) -> list[ObjectInfo]:
        listed.append(folder)
        return [ObjectInfo("/meta", is_folder=True)]

    monkeypatch.setattr(LocalStore, "list_folder", list_folder)
    assert find_sibling("/emb", re.compile("meta")) == "/meta"
    assert find_sibling("emb", re.compile("meta")) == "meta"
    assert listed == ["/", os.getcwd()]


class Listed:
    """Counts how often folders are listed and files looked up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name in ("list_files", "look_up", "glob"):
            plain = getattr(FsspecStore, name)

            def counted(store: Any, path: str, *args: Any, name: str = name, plain: Any = plain, **more: Any) -> Any:
                self.calls.append(f"{name} {path}")
                return plain(store, path, *args, **more)

            monkeypatch.setattr(FsspecStore, name, counted)


@pytest.fixture
def memory() -> Any:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    client = MemoryFileSystem()
    for name in ("emb/0.npy", "emb/1.npy", "emb/1.parquet", "emb/e.npy", "emb/_s", "emb/.manifest.embeddings"):
        client.pipe_file(f"/{name}", b"" if "e.npy" in name else b"x")
    yield client
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_what_was_listed_is_not_listed_again(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Listed(monkeypatch).calls
    finder = Finder()
    source = "memory://emb"
    assert finder.names(source, None) == []
    for suffixes, names in (((".npy",), ["0.npy", "1.npy"]), ((".parquet",), ["1.parquet"])):
        found = finder.find([source], suffixes)
        assert [file.path for file in found.files] == [f"/emb/{name}" for name in names]
        assert [file.path for file in found.own] == ["/emb/.manifest.embeddings"]
        assert (found.roots, found.empty, found.heads) == (["/emb"], [], {})
    kinds = {"npy": (".npy",), "parquet": (".parquet", ".pq"), "arrow": (".arrow",)}
    names, own = finder.find_kinds([source], kinds, None, first_nbytes=0)
    assert (names, [file.path for file in own]) == (["npy", "parquet"], ["/emb/.manifest.embeddings"])
    assert calls == ["list_files /emb"]
    assert finder.names(source, None) == [f"/emb/{name}" for name in ("0.npy", "1.npy", "1.parquet", "e.npy")]
    memory.pipe_file("/emb/2.npy", b"x")
    assert len(finder.find([source], (".npy",)).files) == 2
    assert len(Finder().find([source], (".npy",)).files) == 3


def test_nothing_need_be_found_if_it_is_not_required(memory: Any, tmp_path: Path) -> None:
    sources: list[str | Path] = ["memory://emb", tmp_path, "memory://emb/e.npy"]
    found = Finder().find(sources, (".arrow",), required=False)
    assert (found.files, found.empty) == ([], sources)
    found = Finder().find(sources, (".npy",))
    assert ([file.path for file in found.files], found.empty) == (["/emb/0.npy", "/emb/1.npy"], sources[1:])
    with pytest.raises(NoFilesError):
        Finder().find(sources[1:], (".npy",))


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ("memory://emb", ["npy", "parquet"]),
        ("memory://emb/0.npy", ["npy"]),
        ("memory://emb/e.npy", []),
        ("memory://odd/?", [""]),
        ("memory://odd/*", []),
        ("memory://odd", []),
        ("memory://odd/A.NPY", ["npy"]),
        ("memory://odd/*A*", ["npy"]),
        ("memory://odd/b", [""]),
    ],
)
def test_kinds_are_told_by_names(memory: Any, source: str, kinds: list[str]) -> None:
    for name in ("A.NPY", "b"):
        memory.pipe_file(f"/odd/{name}", b"x")
    known = {"npy": (".npy",), "parquet": (".parquet", ".pq")}
    assert Finder().find_kinds([source], known, None, first_nbytes=0)[0] == kinds


def test_a_file_that_was_named_is_taken_whatever_its_suffix_if_that_is_wanted(memory: Any) -> None:
    memory.pipe_file("/odd/b", b"x")
    for source in ("memory://odd/b", "memory://odd/b*"):
        assert [file.path for file in Finder().find([source], (".npy",)).files] == ["/odd/b"]
        assert Finder().find([source], (".npy",), named=False, required=False).files == []
    assert Finder().find(["memory://emb/1.parquet"], (".npy",), required=False).files == [], "of another format"


def test_what_cannot_be_listed_or_looked_up_is_named(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise PermissionError("no entry")

    with pytest.raises(
        NoFilesError, match=r"'memory://gone' does not exist \(searched 'memory:///gone'\); check the sp"
    ):
        Finder().find(["memory://gone"], (".npy",))
    monkeypatch.setattr(MemoryFileSystem, "info", fail)
    with pytest.raises(
        ReadError, match=r"^memory:///emb/0.npy: cannot be looked up: PermissionError: no entry; check the"
    ):
        Finder().find(["memory://emb/0.npy"], (".npy",))
    monkeypatch.setattr(MemoryFileSystem, "find", fail)
    with pytest.raises(ReadError, match=r"^'memory://emb' cannot be listed: PermissionError: no entry; check the"):
        Finder().find(["memory://emb"], (".npy",))


def test_files_are_ordered_within_a_source_and_found_once(tmp_path: Path) -> None:
    for name in ("b/0.npy", "a/1.npy", "a/0.npy", "a.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, np.ones((1, 1)))
    found = Finder().find([tmp_path / "b", tmp_path, tmp_path / "a" / "1.npy"], (".npy",))
    assert [os.path.relpath(file.path, tmp_path) for file in found.files] == ["b/0.npy", "a.npy", "a/0.npy", "a/1.npy"]
    assert found.roots == [str(tmp_path / "b"), str(tmp_path), str(tmp_path / "a" / "1.npy")]
