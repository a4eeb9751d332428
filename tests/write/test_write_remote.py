"""Writing to clouds, with the servers themselves: from any storage to any, cut off, killed, refused, met by another."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec.core
import numpy as np
import pytest

from dask_embedding_reader import EmbeddingReader, verify_embeddings, write_embeddings
from dask_embedding_reader.errors import DestinationError, ReadError, WriteError
from tests.support import clouds, servers
from tests.support.collections import FORMATS, Collection, assert_batches, wait_until, write_collection
from tests.support.faults import Proxy, faulty

ROWS = np.random.default_rng(0).standard_normal((40, 128)).astype(np.float32)
PER_FILE = 8


class Cloud(NamedTuple):
    """A storage with a server behind it."""

    server: Any

    def new_url(self) -> str:
        return f"{self.server.root}/{uuid.uuid4().hex}"

    @contextmanager
    def behind_proxy(self) -> Iterator[tuple[Proxy, dict[str, Any]]]:
        """A proxy before the server, and the options that lead through it."""
        endpoint = self.server.endpoint
        host = "/".join(endpoint.split("/")[:3])
        with faulty(host) as proxy:
            options = json.loads(json.dumps(self.server.storage_options).replace(host, proxy.url))
            yield proxy, options


@pytest.fixture(params=["s3", "gcs", "azure"])
def cloud(request: pytest.FixtureRequest) -> Cloud:
    return Cloud(request.getfixturevalue(request.param))


def names_in(url: str, options: dict[str, Any]) -> set[str]:
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    filesystem.invalidate_cache()
    return {name[len(path) + 1 :] for name in filesystem.find(path)}


FINISHED = {f"{number:08d}.npy" for number in range(5)} | {".manifest.embeddings"}


def assert_finished(url: str, options: dict[str, Any]) -> None:
    """All rows, in files that are what they should be, and nothing else."""
    assert names_in(url, options) == FINISHED
    np.testing.assert_array_equal(EmbeddingReader(url, storage_options=options).to_dask_array().compute(), ROWS)
    assert verify_embeddings(url, storage_options=options).empty


# --------------------------------------------------------------------------------------------------------------------
# From any storage to any


@contextmanager
def stored(where: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Put a folder on a storage; yields its URL and options."""
    if where == "local":
        yield str(folder), None
    elif where == "http":
        servers.require(servers.nginx_available, "nginx")
        with servers.nginx(folder) as server:
            yield server.url + "/", None
    else:
        server = request.getfixturevalue(where)
        yield server.put_folder(folder, uuid.uuid4().hex), server.storage_options


PAIRS = [
    ("http", "npy", "s3", "npy"),
    ("http", "parquet-list", "gcs", "parquet_npy"),
    ("http", "parquet_npy", "azure", "parquet"),
    ("http", "parquet_npy", "local", "parquet_npy"),
    ("gcs", "parquet-list", "s3", "parquet"),
    ("gcs", "parquet_npy", "gcs", "parquet"),
    ("gcs", "npy", "local", "parquet"),
    ("s3", "parquet_npy", "azure", "parquet_npy"),
    ("s3", "parquet-list", "local", "parquet_npy"),
    ("azure", "parquet_npy", "s3", "parquet"),
    ("local", "parquet_npy", "gcs", "parquet_npy"),
    ("local", "parquet-list", "azure", "parquet"),
]


@pytest.mark.parametrize(("source", "format_name", "target", "file_format"), PAIRS)
def test_from_any_storage_to_any(
    tmp_path: Path, request: pytest.FixtureRequest, source: str, format_name: str, target: str, file_format: str
) -> None:
    columns = None if format_name == "npy" else ["id", "caption"]
    (tmp_path / "data").mkdir()
    collection: Collection = write_collection(tmp_path / "data", format_name, columns=columns)
    if target == "local":
        url, options = str(tmp_path / "out"), None
    else:
        server = request.getfixturevalue(target)
        url, options = f"{server.root}/{uuid.uuid4().hex}", server.storage_options
    with stored(source, tmp_path / "data", request) as (there, there_options):
        kind = FORMATS[format_name].file_format
        reader = EmbeddingReader(there, kind, meta_columns=collection.columns or None, storage_options=there_options)
        write_embeddings(reader, url, file_format, rows_per_file=6, storage_options=options)
    written = EmbeddingReader(url, file_format, meta_columns=collection.columns or None, storage_options=options)
    assert_batches(written(7, dtype=None, show_progress=False), collection, 7, dtype=None)
    assert verify_embeddings(url, storage_options=options).empty


# --------------------------------------------------------------------------------------------------------------------
# Interrupted, met by another


def interrupted(parts: int) -> Iterator[tuple[Any, None]]:
    for number in range(parts):
        yield ROWS[number * PER_FILE : (number + 1) * PER_FILE], None
    raise KeyboardInterrupt


def whole(between: Callable[[], object] = lambda: None) -> Iterator[tuple[Any, None]]:
    for start in range(0, len(ROWS), PER_FILE):
        yield ROWS[start : start + PER_FILE], None
        between()


def test_what_is_finished_is_not_uploaded_again(cloud: Cloud) -> None:
    url = cloud.new_url()
    with cloud.behind_proxy() as (proxy, options):
        uploaded: list[str] = []

        def note(upload: str) -> bool:
            if ".manifest" not in upload:  # it tells the names too
                uploaded.extend(name for name in FINISHED if name in upload)
            return False

        proxy.halfway = note
        with pytest.raises(KeyboardInterrupt):
            write_embeddings(interrupted(3), url, rows_per_file=PER_FILE, storage_options=options)
        assert len(uploaded) == 3
        with pytest.raises(ReadError, match="run the writing again"):
            EmbeddingReader(url, storage_options=options)
        write_embeddings(whole(), url, rows_per_file=PER_FILE, storage_options=options)
        assert sorted(uploaded) == sorted(FINISHED - {".manifest.embeddings"})
    assert_finished(url, cloud.server.storage_options)


def test_a_second_writer_is_told_who_is_first(cloud: Cloud) -> None:
    url, options = cloud.new_url(), cloud.server.storage_options
    refused: list[BaseException] = []

    def meet() -> None:
        with pytest.raises(DestinationError, match=r"process \d+ on .* is writing to this folder") as caught:
            write_embeddings(ROWS + 1, url, rows_per_file=PER_FILE, overwrite=True, storage_options=options)
        refused.append(caught.value)

    write_embeddings(whole(meet), url, rows_per_file=PER_FILE, storage_options=options)
    assert len(refused) == 5
    assert_finished(url, options)
    with pytest.raises(DestinationError, match="overwrite=True"):
        write_embeddings(ROWS + 1, url, rows_per_file=PER_FILE + 1, storage_options=options)
    assert_finished(url, options)


# --------------------------------------------------------------------------------------------------------------------
# Uploads that break off in the middle


def test_an_upload_that_is_cut_off_is_tried_again(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dask_embedding_reader.storage.retries.FIRST_PAUSE_SECONDS", 0.001)
    url = cloud.new_url()
    with cloud.behind_proxy() as (proxy, options):
        cuts = iter([True, False, True])
        proxy.halfway = lambda upload: ".npy" in upload and next(cuts, False)
        write_embeddings(ROWS, url, rows_per_file=PER_FILE, storage_options=options)
        assert [asked.fault for asked in proxy.failed] == ["cut", "cut"]
    assert_finished(url, cloud.server.storage_options)


@pytest.mark.parametrize(
    "cloud",
    # gcsfs tries six times by itself, for half a minute, and cannot be told not to.
    ["s3", "azure", pytest.param("gcs", marks=[pytest.mark.slow, pytest.mark.timeout(300)])],
    indirect=True,
)
def test_a_connection_that_is_lost_in_the_middle_of_an_upload(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dask_embedding_reader.storage.retries.FIRST_PAUSE_SECONDS", 0.001)
    url, direct = cloud.new_url(), cloud.server.storage_options
    with cloud.behind_proxy() as (proxy, options):
        proxy.halfway = lambda upload: "00000002.npy" in upload
        with pytest.raises(WriteError, match=r"00000002.npy: cannot be written.*running the same again") as caught:
            write_embeddings(whole(), url, rows_per_file=PER_FILE, storage_options=options)
        assert clouds.AZURE_KEY not in str(caught.value)
        assert servers.S3_SECRET not in str(caught.value)
        assert len(proxy.failed) > 1  # it was tried more than once
    there = names_in(url, direct)
    assert "00000000.npy" in there
    assert "00000002.npy" not in there
    with pytest.raises(ReadError, match="run the writing again"):
        EmbeddingReader(url, storage_options=direct)
    write_embeddings(whole(), url, rows_per_file=PER_FILE, storage_options=direct)
    assert_finished(url, direct)


WRITER = """
import json, sys
import numpy as np
from dask_embedding_reader import write_embeddings
rows = np.random.default_rng(0).standard_normal((40, 128)).astype(np.float32)
batches = ((rows[start : start + 8], None) for start in range(0, 40, 8))
write_embeddings(batches, sys.argv[1], rows_per_file=8, overwrite=True, storage_options=json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize("existing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_writer_that_is_killed_in_the_middle_of_an_upload(cloud: Cloud, existing: bool) -> None:
    url, direct = cloud.new_url(), cloud.server.storage_options
    if existing:
        write_embeddings(ROWS[:3], url, storage_options=direct)
    with cloud.behind_proxy() as (proxy, options):
        started = threading.Event()
        running: list[subprocess.Popen[bytes]] = []

        def kill(upload: str) -> bool:
            if "00000002.npy" in upload and started.wait(60):
                # Files are sent side by side, and before one of them is there, the error is another one.
                assert wait_until(lambda: any(name.endswith(".npy") for name in names_in(url, direct)))
                running[0].kill()
                return True
            return False

        proxy.halfway = kill
        running.append(subprocess.Popen([sys.executable, "-c", WRITER, url, json.dumps(options)]))
        started.set()
        assert running[0].wait(100) == -9
    if existing:  # the old collection is there, as it was
        np.testing.assert_array_equal(EmbeddingReader(url, storage_options=direct).to_dask_array().compute(), ROWS[:3])
    else:
        with pytest.raises(ReadError, match="run the writing again"):
            EmbeddingReader(url, storage_options=direct)
    write_embeddings(whole(), url, rows_per_file=PER_FILE, overwrite=True, storage_options=direct)
    assert_finished(url, direct)


def test_s3_gets_large_files_in_one_request(s3: servers.S3Server) -> None:
    """Of an upload in parts that is killed the parts would stay, unseen and charged for."""
    servers.require(servers.nginx_available, "nginx")
    rows = np.zeros((110, 250_000), np.float32)  # 110 MB; s3fs sends from 100 MiB on in parts
    url = f"{s3.root}/{uuid.uuid4().hex}"
    with servers.nginx_before(s3.endpoint) as front, front.counting() as requests:
        options = {**s3.storage_options, "client_kwargs": {**s3.client_options, "endpoint_url": front.url}}
        write_embeddings(rows, url, storage_options=options)
    assert [r.method for r in requests if "00000000.npy" in r.path and r.method != "GET"] == ["PUT"]


# --------------------------------------------------------------------------------------------------------------------
# Refused


def test_s3_that_checks_signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers.require(clouds.rclone_available, "rclone")
    # This server answers a range with the checksum of the whole object.
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    (tmp_path / "bucket").mkdir()
    with clouds.signed_s3(tmp_path) as options:
        with pytest.raises(WriteError, match=r"s3://bucket/out.*cannot be (written|listed).*") as caught:
            write_embeddings(ROWS, "s3://bucket/out", storage_options={**options, "secret": "wrong"})
        assert "get the permission" in str(caught.value)
        assert servers.S3_SECRET not in str(caught.value)
        write_embeddings(whole(), "s3://bucket/out", rows_per_file=PER_FILE, storage_options=options)
        assert_finished("s3://bucket/out", options)
