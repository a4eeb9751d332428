"""Which storage an address means, and what is said where it means none."""

from __future__ import annotations

import importlib.util
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from dask_embedding_reader import EmbeddingReader, write_embeddings
from dask_embedding_reader.errors import ArgumentError, EmbeddingReaderError, NoFilesError, ReadError
from dask_embedding_reader.storage import urls
from dask_embedding_reader.storage.fsspec import FsspecStore
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.urls import make_store, resolve, shown_from_here


@pytest.mark.parametrize(
    ("source", "is_local", "path"),
    [
        ("a", True, "{here}/a"),
        ("./there//", True, "{here}/there"),
        ("x/../there", True, "{here}/there"),
        ("there", True, "{here}/there"),
        ("there/", True, "{here}/there"),
        ("file://{here}/a/", True, "{here}/a"),
        ("FILE://{here}/there", True, "{here}/there"),
        ("/", True, "/"),
        ("Memory://a/b/", False, "/a/b"),
        ("memory://", False, ""),
        ("memory://a::b", False, "/a::b"),
        ("http://h/a/", False, "http://h/a/"),
        ("HTTP://h/a", False, "http://h/a"),
        ("a::b", True, "{here}/a::b"),
        ("c::there", True, "{here}/c::there"),
        ("there::x/there::y", True, "{here}/there::x/there::y"),
    ],
)
def test_an_address_means_a_storage_and_a_path_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, is_local: bool, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    (tmp_path / "x").mkdir()
    store, found = resolve(source.format(here=tmp_path))
    assert (store.is_local, found) == (is_local, path.format(here=tmp_path))
    assert isinstance(store, LocalStore if is_local else FsspecStore)
    assert "://" in source or resolve(Path(source), {"skip_instance_cache": True})[1]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            "s3://bucket/a",
            "cannot open 's3:/bucket/a': .* write 's3://bucket/a' as a .* or './s3:/bucket/a' if a local",
        ),
        ("GS://b", "write 'gs://b' as"),
        ("simplecache::https://h/a.npy", "write 'simplecache::https://h/a.npy' as"),
        ("ftp://user:secret@h/a", "cannot open 'ftp:/h/a': .* write 'ftp://h/a' as a string, or './ftp:/h/a' if"),
    ],
)
def test_a_url_that_lost_a_slash_is_no_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    writing = () if "::" in url else (partial(write_embeddings, np.ones((2, 3))),)  # chains are only read
    for use in (resolve, EmbeddingReader, *writing):
        with pytest.raises(ArgumentError, match=f"(?i:{told})") as caught:
            use(Path(url))
        assert "secret" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    store, path = resolve(f"./{Path(url)}")
    assert (store.is_local, path) == (True, str(tmp_path / Path(url)))
    assert resolve("nosuch:/a")[0].is_local
    assert resolve("file:/a") == (LocalStore(LocalFileSystem()), "/a")


@pytest.mark.parametrize("name", ["zip::there", "s3://there", "a::b::c"])
def test_what_is_there_is_taken_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).symlink_to("nothing")
    if "://" in name:
        name = name.replace("://", ":/")
    assert resolve(name) == (LocalStore(LocalFileSystem()), str(tmp_path / name))


def test_a_file_system_stands_for_a_storage() -> None:
    class Own(LocalFileSystem):  # type: ignore[misc]  # fsspec is not typed
        """Does what it likes."""

    assert make_store(LocalFileSystem()) == LocalStore(LocalFileSystem())
    assert make_store(Own()) == FsspecStore(Own())
    assert make_store(MemoryFileSystem()) == FsspecStore(MemoryFileSystem())


def test_paths_below_the_working_directory_are_shown_as_people_write_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    local, remote = LocalStore(LocalFileSystem()), FsspecStore(MemoryFileSystem())
    assert shown_from_here(local, f"{tmp_path}/in/a/b") == os.path.join("a", "b")
    assert shown_from_here(local, f"{tmp_path}/other") == f"{tmp_path}/other"
    assert shown_from_here(remote, f"{tmp_path}/in/a") == f"memory://{tmp_path}/in/a"


PIP = 'pip install "dask-embedding-reader[{}]"'


@pytest.mark.parametrize(
    ("url", "error", "kind", "said"),
    [
        (
            "nosuch://u:p@a",
            None,
            ArgumentError,
            "cannot open 'nosuch://a': ValueError: .*; check the URL and storage_",
        ),
        ("gs://a", ImportError("x"), ArgumentError, f"cannot open 'gs://a': ImportError: x; {PIP.format('gcs')}"),
        ("simplecache::abfss://a", ImportError("x"), ArgumentError, f": ImportError: x; {PIP.format('azure')}"),
        ("az://a", ValueError("x"), ArgumentError, "ValueError: x; check the URL and storage_options"),
        ("filecache::simplecache::hf://a", ImportError("x"), ArgumentError, PIP.format("hf")),
        ("webhdfs://a", ImportError("x"), ArgumentError, PIP.format("hdfs")),
        ("ftp://gs/az", ImportError("x"), ArgumentError, "ImportError: x; check the URL and storage_options"),
        (
            "s3://a?b=c",
            TypeError("x"),
            ArgumentError,
            "cannot open 's3://a': TypeError: x; check the URL and storage_",
        ),
        ("s3://a", KeyError("x"), ArgumentError, "KeyError: 'x'; check the URL"),
        (
            "s3://a",
            FileNotFoundError("x"),
            NoFilesError,
            r"'s3://a' does not exist \(FileNotFoundError: x\); check the ",
        ),
        ("s3://a", OSError("x"), ReadError, "'s3://a' cannot be opened: OSError: x$"),
        ("hdfs://a", OSError("x"), ReadError, f"'hdfs://a' cannot be opened: OSError: x; {PIP.format('hdfs')}"),
        ("webhdfs://a", OSError("x"), ReadError, "'webhdfs://a' cannot be opened: OSError: x$"),
    ],
)
def test_what_cannot_be_opened_is_told_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, url: str, error: Exception | None, kind: type[EmbeddingReaderError], said: str
) -> None:
    if error is not None:

        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(urls, "url_to_fs", fail)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(kind, match=said.replace("[", r"\[").replace("]", r"\]")) as caught:
        resolve(url)
    assert type(caught.value) is kind


def test_hdfs_that_is_installed_need_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("x")

    monkeypatch.setattr(urls, "url_to_fs", fail)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(ReadError, match=r"OSError: x$"):
        resolve("hdfs://a")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("zip://x::memory://a::b", "'::' in the name of an archive cannot be told from a chain of file systems"),
    ],
)
def test_a_name_that_cannot_be_told_from_a_chain_is_refused(url: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(said)):
        resolve(url)
