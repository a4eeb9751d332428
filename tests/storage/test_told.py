"""What clients of storages say of files, in all their words, and what follows from it for who reads and writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from dask_embedding_reader.storage import put
from dask_embedding_reader.storage.fsspec import FsspecStore
from dask_embedding_reader.storage.store import ObjectInfo, Version, told_info
from dask_embedding_reader.storage.urls import resolve

SECOND = 1_704_164_645
WHEN = datetime.fromtimestamp(SECOND + 0.5, timezone.utc)
"""Half a second after that, which no head of an answer tells."""

HEAD_DATE = "Tue, 02 Jan 2024 03:04:05 GMT"


@pytest.mark.parametrize(
    ("told", "info"),
    [
        ({}, ObjectInfo("a")),
        ({"size": 5, "type": "file"}, ObjectInfo("a", 5)),
        ({"size": "5"}, ObjectInfo("a", 5)),
        ({"size": 0}, ObjectInfo("a", 0)),
        ({"size": None, "type": "other"}, ObjectInfo("a")),
        ({"size": 0, "type": "directory"}, ObjectInfo("a", 0, is_folder=True)),
        ({"mimetype": "text/html; charset=utf-8"}, ObjectInfo("a", is_page=True)),
        ({"mimetype": "text/plain"}, ObjectInfo("a")),
        ({"mimetype": None}, ObjectInfo("a")),
        ({"head": b"ab"}, ObjectInfo("a", head=b"ab")),
    ],
)
def test_what_a_file_is(told: Mapping[str, Any], info: ObjectInfo) -> None:
    assert told_info(told, "a") == info
    assert told_info(told) == info._replace(path="")


@pytest.mark.parametrize(
    ("told", "marks"),
    [
        ({"ETag": '"a"'}, {"etag": "a"}),
        ({"etag": 'W/"a"'}, {"etag": "a"}),
        ({"ETag": "a-W/"}, {"etag": "a-W/"}),
        ({"ETag": ""}, {}),
        ({"ETag": '""'}, {}),
        ({"ETag": None, "etag": "b"}, {"etag": "b"}),
        ({"ETag": "a", "etag": "b"}, {"etag": "a"}),
        ({"ETag": "", "etag": "b"}, {"etag": "b"}),
        ({"mtime": 0}, {"mtime": "0"}),
        ({"mtime": 1.5}, {"mtime": "1.5"}),
        ({"mtime": WHEN}, {"mtime": f"{SECOND}.5"}),
        ({"CRC": 7}, {"crc": "7"}),
        ({"blob_id": "y", "lfs": {"sha256": "x", "size": 3}}, {"sha256": "x", "blobid": "y"}),
        ({"blob_id": "y", "lfs": None}, {"blobid": "y"}),
        ({"Last-Modified": HEAD_DATE}, {"lastmodified": str(SECOND)}),
        ({"LastModified": WHEN}, {"lastmodified": str(SECOND)}),
        ({"last_modified": WHEN}, {"lastmodified": str(SECOND)}),
        ({"LastModified": WHEN.astimezone(timezone(timedelta(hours=5)))}, {"lastmodified": str(SECOND)}),
        ({"Last-Modified": "soon"}, {"lastmodified": "soon"}),
        ({"Last-Modified": "Tue, 02 Jan 9999999 03:04:05 GMT"}, {"lastmodified": "Tue, 02 Jan 9999999 03:04:05 GMT"}),
        ({"updated": WHEN}, {"updated": f"{SECOND}.5"}),
        ({"updated": HEAD_DATE}, {"updated": HEAD_DATE}),
        (
            {"created": 3, "modify": "2", "modificationTime": 1},
            {"modify": "2", "modificationtime": "1", "created": "3"},
        ),
        ({"modification_time": 1, "modified": 2, "name": "x"}, {"modified": "2", "modificationtime": "1"}),
        ({"mtime": 1, "LastModified": "x", "ETag": "a"}, {"etag": "a", "mtime": "1", "lastmodified": "x"}),
    ],
)
def test_what_marks_its_version_the_best_mark_first(told: Mapping[str, Any], marks: dict[str, str]) -> None:
    info = told_info({"size": 5, **told})
    assert list(info.marks.items()) == list(marks.items())
    assert info.version == Version(5, *next(iter(marks.items()), ("", "")))


@pytest.mark.parametrize(
    ("pages", "nbytes", "are_kept"),
    [(256, 4096 * 16, True), (256, 4096 * 16 + 1, False), (256, None, False), (257, 4096 * 16 + 1, True), (0, 0, True)],
)
def test_the_system_keeps_what_is_written_where_that_is_little_of_its_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pages: int, nbytes: int | None, are_kept: bool
) -> None:
    """What fills a sixteenth of it, at most."""
    told = {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}
    asked = list[tuple[int, int, int]]()
    monkeypatch.setattr(os, "sysconf", told.__getitem__)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *arguments: asked.append(arguments))
    store, path = resolve(tmp_path / "a")
    put.stream_file(store, path, lambda write: write(b"abc"), None, of_nbytes=nbytes)
    assert (not asked) is are_kept
    monkeypatch.delattr(os, "sysconf")
    asked.clear()
    put.stream_file(store, path, lambda write: write(b"abc"), None, of_nbytes=None)
    assert not asked, "nobody knows how much memory there is"


def test_as_many_files_are_put_at_once_as_suits_the_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    local, remote = resolve(tmp_path)[0], resolve("memory://")[0]
    for processors, writers in ((6, 12), (1, 2), (None, 2)):
        monkeypatch.setattr(os, "cpu_count", lambda processors=processors: processors)
        assert put.most_writers(local) == writers
    assert put.most_writers(remote) == 16
    assert [put.put_nbytes(store, 7) for store in (local, remote)] == [0, 7]


def test_files_whose_sizes_nobody_tells_count_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert put.list_files(*resolve(tmp_path)) == {"empty": 0}
    store, folder = resolve("memory://told")
    infos = [ObjectInfo(f"{folder}/b"), ObjectInfo(f"{folder}/c", 3), ObjectInfo(f"{folder}/d", is_folder=True)]
    monkeypatch.setattr(FsspecStore, "list_files", lambda *_, **__: infos)
    assert put.list_files(store, folder) == {"b": 0, "c": 3}
