"""One small contract over every file system: adding one is one function, and one line in ``PLACES``.

The collection is the same everywhere: three files of 7, 5 and 3 vectors, the last one deeper, in npy and in parquet.
"""

from __future__ import annotations

import gc
import importlib.util
import io
import os
import pickle
import uuid
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cloudpickle
import fsspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dask.base import compute
from dask.core import flatten

from dask_embedding_reader import EmbeddingReader, get_file_list
from dask_embedding_reader.errors import (
    ColumnError,
    EmbeddingReaderError,
    FileChangedError,
    FormatError,
    NoFilesError,
    ReadError,
)
from dask_embedding_reader.storage import connections
from dask_embedding_reader.storage.connections import connected, sites
from dask_embedding_reader.storage.direct import read as direct
from tests.support import clouds, hadoop, servers
from tests.support.collections import as_batch

DIMENSION = 4
FILES = {"0": 7, "1": 5, "sub/2": 3}
ROWS: npt.NDArray[np.float32] = np.arange(sum(FILES.values()) * DIMENSION, dtype=np.float32).reshape(-1, DIMENSION)
CAPTIONS = [f"caption {row}, é" for row in range(len(ROWS))]
IDS = [2**53 + 1 + 2 * row for row in range(len(ROWS))]


def write_files(folder: Path) -> None:
    """The collection, in all formats."""
    start = 0
    for name, count in FILES.items():
        stop = start + count
        path = folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, ROWS[start:stop])
        table = pa.table(
            {
                "caption": CAPTIONS[start:stop],
                "embedding": pa.array(ROWS[start:stop].tolist(), pa.list_(pa.float32())),
                "id": pa.array(IDS[start:stop], pa.int64()),
            }
        )
        pq.write_table(table, folder / f"{name}.parquet")
        start = stop


@dataclass(frozen=True)
class Place:
    """Where the collection lies."""

    #: What to open for files of a suffix: nearly always one URL whatever the suffix.
    where: Callable[[str], Any]
    #: ``storage_options``.
    options: dict[str, Any] | None = None
    #: To be called when the test is over.
    clean: Callable[[], None] = field(default=lambda: None)

    def open(self, file_format: str, **changes: Any) -> EmbeddingReader:
        """A reader of the collection."""
        arguments: dict[str, Any] = {"file_format": file_format, "storage_options": self.options}
        if file_format != "npy":
            arguments["meta_columns"] = ["id", "caption"]
        if file_format == "parquet_npy" and isinstance(self.where("parquet"), list):
            arguments["metadata_folder"] = self.where("parquet")
            arguments["metadata_storage_options"] = self.options
        suffix = "parquet" if file_format == "parquet" else "npy"
        return EmbeddingReader(self.where(suffix), **{**arguments, **changes})


def _always(url: Any, options: dict[str, Any] | None = None, clean: Callable[[], None] = lambda: None) -> Place:
    return Place(lambda suffix: url, options, clean)


# --------------------------------------------------------------------------------------------------------------------
# The places. ``folder`` holds the files; ``request`` gives the servers, ``tmp_path`` room to work.


def _memory_copy(folder: Path) -> tuple[str, Callable[[], None]]:
    fs = fsspec.filesystem("memory")
    name = f"/files-{uuid.uuid4().hex}"
    for path in folder.rglob("*.*"):
        fs.pipe(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return name, lambda: fs.rm(name, recursive=True)


def _zip_file(folder: Path, tmp_path: Path, top: str) -> Path:
    path = tmp_path / "a b.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, f"{top}{file.relative_to(folder).as_posix()}")
    return path


def _local(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return _always(str(folder))


def _file_url(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return _always(f"file://{folder}/")


def _memory(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    name, clean = _memory_copy(folder)
    return _always(f"memory:/{name}", clean=clean)


def _zip(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return _always(f"zip://emb::{_zip_file(folder, tmp_path, 'emb/')}")


def _zip_root(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return _always(f"zip://::file://{_zip_file(folder, tmp_path, '')}")


def _zip_in_memory(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    fs = fsspec.filesystem("memory")
    name = f"/{uuid.uuid4().hex}.zip"
    fs.pipe(name, _zip_file(folder, tmp_path, "emb/").read_bytes())
    return _always(f"zip://emb/::memory:/{name}", clean=lambda: fs.rm(name))


def _zip_over_http(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    _zip_file(folder, tmp_path, "emb/")
    server = ExitStack()
    url = server.enter_context(servers.http_files(tmp_path)).url
    return _always(f"zip://emb::{url}/a b.zip", clean=server.close)


def _zip_over_s3(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    server: servers.S3Server = request.getfixturevalue("s3")
    url = server.put(f"{uuid.uuid4().hex}.zip", _zip_file(folder, tmp_path, "emb/").read_bytes())
    return _always(f"zip://emb/::{url}", {"s3": server.storage_options})


def _simplecache_file(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return _always(f"simplecache::file://{folder}", {"simplecache": {"cache_storage": str(tmp_path / "cache")}})


def _simplecache_memory(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    name, clean = _memory_copy(folder)
    options = {"simplecache": {"cache_storage": str(tmp_path / "cache")}}
    return _always(f"simplecache::memory:/{name}", options, clean)


def _dir(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    options = {"path": str(folder.parent), "target_protocol": "file"}
    return _always(f"dir://{folder.name}", options)


def _require_references_to_local_files() -> None:
    if importlib.util.find_spec("fsspec.implementations.asyn_wrapper") is None:
        pytest.skip("this fsspec reads references to remote files only")


def _reference(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    _require_references_to_local_files()
    references = {
        f"emb/{path.relative_to(folder).as_posix()}": [f"file://{path}", 0, path.stat().st_size]
        for path in folder.rglob("*.*")
    }
    return _always("reference://emb", {"fo": references, "remote_protocol": "file"})


def _http_listing(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return _always(f"{request.getfixturevalue('nginx').url}/")


def _http_listing_without_ranges(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return _always(request.getfixturevalue("nginx_without_ranges").url)


def _http_urls(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    server: servers.HttpServer = request.getfixturevalue("http_files")
    return Place(lambda suffix: [f"{server.url}/{name}.{suffix}" for name in FILES])


def _http_urls_without_ranges(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    server: servers.Nginx = request.getfixturevalue("nginx_without_listing_and_ranges")
    return Place(lambda suffix: [f"{server.url}/{name}.{suffix}" for name in FILES])


def _cached_http(cache: str) -> Callable[[Path, Path, pytest.FixtureRequest], Place]:
    def place(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
        server: servers.HttpServer = request.getfixturevalue("http_files")
        options = {cache: {"cache_storage": str(tmp_path / "cache")}}
        return Place(lambda suffix: [f"{cache}::{server.url}/{name}.{suffix}" for name in FILES], options)

    return place


def _s3(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    server: servers.S3Server = request.getfixturevalue("s3_emb")
    return _always(f"s3://{server.bucket}/emb", server.storage_options)


def _s3_slash(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    # Lists nothing in the reference.
    server: servers.S3Server = request.getfixturevalue("s3_emb")
    return _always(f"s3://{server.bucket}/emb/", server.storage_options)


def _cached_s3(cache: str) -> Callable[[Path, Path, pytest.FixtureRequest], Place]:
    def place(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
        server: servers.S3Server = request.getfixturevalue("s3_emb")
        options = {cache: {"cache_storage": str(tmp_path / "cache")}, "s3": server.storage_options}
        return _always(f"{cache}::s3://{server.bucket}/emb", options)

    return place


def _s3_signed(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    # The folder is the bucket.
    return _always(f"s3://{folder.name}", request.getfixturevalue("signed_s3"))


def _gs(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    server: clouds.GcsServer = request.getfixturevalue("gcs_emb")
    return _always(f"gs://{server.bucket}/emb", server.storage_options)


def _gcs_slash(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    server: clouds.GcsServer = request.getfixturevalue("gcs_emb")
    return _always(f"gcs://{server.bucket}/emb/", server.storage_options)


def _az(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    server: clouds.AzureServer = request.getfixturevalue("azure_emb")
    return _always(f"az://{server.bucket}/emb", server.storage_options)


def _abfs_slash(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    server: clouds.AzureServer = request.getfixturevalue("azure_emb")
    return _always(f"abfs://{server.bucket}/emb/", server.storage_options)


def _hdfs(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return _always(f"{request.getfixturevalue('hdfs_emb').root}/emb")


def _webhdfs_slash(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    server: hadoop.HdfsServer = request.getfixturevalue("hdfs_emb")
    return _always(f"{replace(server, protocol='webhdfs').root}/emb/")


#: Every file system of the contract but ``blockcache``, which leaves closing its files to the garbage collector.
PLACES: dict[str, Callable[[Path, Path, pytest.FixtureRequest], Place]] = {
    "local": _local,
    "file-url": _file_url,
    "memory": _memory,
    "zip": _zip,
    "zip-root": _zip_root,
    "zip-in-memory": _zip_in_memory,
    "zip-over-http": _zip_over_http,
    "zip-over-s3": _zip_over_s3,
    "simplecache-file": _simplecache_file,
    "simplecache-memory": _simplecache_memory,
    "dir": _dir,
    "reference": _reference,
    "http-listing": _http_listing,
    "http-listing-no-ranges": _http_listing_without_ranges,
    "http-urls": _http_urls,
    "http-urls-no-ranges": _http_urls_without_ranges,
    "simplecache-http": _cached_http("simplecache"),
    "s3": _s3,
    "s3-trailing-slash": _s3_slash,
    "simplecache-s3": _cached_s3("simplecache"),
    "filecache-http": _cached_http("filecache"),
    "filecache-s3": _cached_s3("filecache"),
    "s3-signed": _s3_signed,
    "gs": _gs,
    "gcs-trailing-slash": _gcs_slash,
    "az": _az,
    "abfs-trailing-slash": _abfs_slash,
    "hdfs": _hdfs,
    "webhdfs-trailing-slash": _webhdfs_slash,
}
FILE_FORMATS = ["npy", "parquet", "parquet_npy"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, on this machine."""
    path = tmp_path_factory.mktemp("files") / "emb"
    write_files(path)
    return path


@pytest.fixture(scope="session")
def nginx(folder: Path) -> Iterator[servers.Nginx]:
    """A web server with listings."""
    servers.require(servers.nginx_available, "nginx")
    with servers.nginx(folder) as server:
        yield server


@pytest.fixture(scope="session")
def nginx_without_ranges(folder: Path) -> Iterator[servers.Nginx]:
    """One that answers every request with the whole file."""
    servers.require(servers.nginx_available, "nginx")
    with servers.nginx(folder, ranges=False) as server:
        yield server


@pytest.fixture(scope="session")
def nginx_without_listing_and_ranges(folder: Path) -> Iterator[servers.Nginx]:
    """One that does not even tell which files there are."""
    servers.require(servers.nginx_available, "nginx")
    with servers.nginx(folder, listing=False, ranges=False) as server:
        yield server


@pytest.fixture(scope="session")
def http_files(folder: Path) -> Iterator[servers.HttpServer]:
    """A web server without listings."""
    with servers.http_files(folder) as server:
        yield server


@pytest.fixture(scope="session")
def s3_emb(folder: Path, s3: servers.S3Server) -> servers.S3Server:
    """An S3 service that holds the files under ``emb``."""
    s3.put_folder(folder, "emb")
    return s3


@pytest.fixture(scope="session")
def signed_s3(folder: Path) -> Iterator[dict[str, Any]]:
    """One that checks signatures, and whose bucket is the folder."""
    servers.require(clouds.rclone_available, "rclone")
    with clouds.signed_s3(folder.parent) as options:
        yield options


@pytest.fixture(scope="session")
def gcs_emb(folder: Path, gcs: clouds.GcsServer) -> clouds.GcsServer:
    """Google Cloud Storage that holds the files under ``emb``."""
    gcs.put_folder(folder, "emb")
    return gcs


@pytest.fixture(scope="session")
def azure_emb(folder: Path, azure: clouds.AzureServer) -> clouds.AzureServer:
    """Azure Blob Storage that holds the files under ``emb``."""
    azure.put_folder(folder, "emb")
    return azure


@pytest.fixture(scope="session")
def hdfs_emb(folder: Path, hdfs: hadoop.HdfsServer) -> hadoop.HdfsServer:
    """HDFS that holds the files under ``emb``."""
    hdfs.put_folder(folder, "emb")
    return hdfs


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.hdfs if "hdfs" in name else ()) for name in PLACES])
def place(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    """Each of the places in turn."""
    made = PLACES[request.param](folder, tmp_path, request)
    yield made
    made.clean()


def inside(url: str, name: str) -> str:
    """URL of something in a folder; in a chain, the folder is in the part that holds files."""
    first, chain, rest = url.partition("::")
    if chain and "://" not in first and "://" in rest:  # a cache in front of the storage: simplecache::s3://...
        return f"{first}{chain}{inside(rest, name)}"
    return f"{first}{'' if first.endswith('/') else '/'}{name}{chain}{rest}"


def metadata(start: int = 0, stop: int | None = None) -> pd.DataFrame:
    """What the metadata of the rows must be, without ``i``."""
    return pd.DataFrame(
        {
            "id": np.array(IDS[start:stop], np.int64),
            "caption": pd.array(CAPTIONS[start:stop], dtype=pd.StringDtype("pyarrow")),
        }
    )


# --------------------------------------------------------------------------------------------------------------------
# The contract


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_it_opens_and_says_what_it_is(place: Place, file_format: str) -> None:
    reader = place.open(file_format)
    assert reader.count == len(reader) == 15
    assert reader.dimension == DIMENSION
    assert reader.dtype == np.dtype(np.float32)
    assert reader.byte_per_item == 16
    assert reader.total_size == 15 * 16
    assert reader.nb_files == 3
    assert reader.max_file_size == 7 * 16
    path, row = reader.locate(-1)
    assert path.endswith("sub/2.parquet" if file_format == "parquet" else "sub/2.npy")
    assert row == 2


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_the_array_and_its_slices_hold_every_value(place: Place, file_format: str) -> None:
    # Pieces of two rows: many reads at once, as some file systems cannot do without care.
    x = place.open(file_format).to_dask_array(max_piece_size=2)
    np.testing.assert_array_equal(x.compute(scheduler="threads"), ROWS)
    np.testing.assert_array_equal(x[6:13].compute(), ROWS[6:13])
    np.testing.assert_array_equal(x[::4, 1:3].compute(), ROWS[::4, 1:3])
    np.testing.assert_array_equal(x[11].compute(), ROWS[11])


@pytest.mark.parametrize("file_format", ["parquet", "parquet_npy"])
def test_the_frame_holds_every_value(place: Place, file_format: str) -> None:
    frame = place.open(file_format).to_dask_dataframe(max_piece_size=2)
    got = frame.compute()
    assert got.index.tolist() == list(range(15))
    pd.testing.assert_frame_equal(got.reset_index(drop=True), metadata())
    assert frame["id"].loc[6:12].compute().tolist() == IDS[6:13]


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_the_batches_hold_every_value(place: Place, file_format: str) -> None:
    reader = place.open(file_format)
    batches = list(reader(batch_size=4, start=1, end=12, show_progress=False))
    assert [len(rows) for rows, _ in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in batches]), ROWS[1:12])
    frame = pd.concat([m for _, m in batches], ignore_index=True)
    assert frame["i"].tolist() == list(range(1, 12))
    if file_format != "npy":
        pd.testing.assert_frame_equal(frame[["id", "caption"]], as_batch(metadata(1, 12)))


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_reader_and_array_can_be_sent_to_another_worker(place: Place, file_format: str) -> None:
    reader = place.open(file_format)
    sent = pickle.loads(pickle.dumps(reader))
    assert sent.count == 15
    np.testing.assert_array_equal(sent.to_dask_array()[5:9].compute(), ROWS[5:9])
    x = cloudpickle.loads(cloudpickle.dumps(reader.to_dask_array()))
    assert x.name == reader.to_dask_array().name == sent.to_dask_array().name
    np.testing.assert_array_equal(x.compute(), ROWS)


def test_opening_twice_gives_the_same_keys(place: Place) -> None:
    assert place.open("npy").to_dask_array().name == place.open("npy").to_dask_array().name


def test_one_file_and_a_glob_work_there(place: Place) -> None:
    where = place.where("npy")
    if isinstance(where, list):
        pytest.skip("this place cannot list its files")
    for name, rows in (("sub/2.npy", ROWS[12:]), ("*.npy", ROWS[:12]), ("**/*.npy", ROWS)):
        reader = EmbeddingReader(inside(where, name), storage_options=place.options)
        np.testing.assert_array_equal(reader.to_dask_array().compute(), rows)


def test_get_file_list_works_there(place: Place) -> None:
    where = place.where("npy")
    if place.options is not None or isinstance(where, list):
        pytest.skip("get_file_list takes no storage_options, as in the reference")
    fs, paths = get_file_list(where, "npy")
    assert [path[-5:] for path in paths] == ["0.npy", "1.npy", "2.npy"]
    assert isinstance(fs, fsspec.AbstractFileSystem)


def test_a_folder_that_is_missing_is_no_files(place: Place) -> None:
    where = place.where("npy")
    url = where[0].rpartition("/")[0] if isinstance(where, list) else where
    with pytest.raises(NoFilesError, match="missing-folder"):
        EmbeddingReader(inside(url, "missing-folder"), storage_options=place.options)


# --------------------------------------------------------------------------------------------------------------------
# HTTP: servers that do less than nginx


def test_a_server_that_ignores_ranges_never_gives_wrong_rows(folder: Path) -> None:
    # It answers a request for a few bytes with the whole file: fine if the reader takes its part, or says no.
    with servers.http_files(folder, ranges=False) as server:
        urls = [f"{server.url}/{name}.npy" for name in FILES]
        with suppress(ReadError):
            np.testing.assert_array_equal(EmbeddingReader(urls).to_dask_array(max_piece_size=2).compute(), ROWS)
        with suppress(ReadError):
            batches = [rows for rows, _ in EmbeddingReader(urls)(batch_size=4, show_progress=False)]
            np.testing.assert_array_equal(np.concatenate(batches), ROWS)


@pytest.mark.parametrize("way", ["direct", "fsspec"])
@pytest.mark.parametrize("etags", [True, False])
def test_a_server_that_compresses_uncalled_for_gives_the_right_rows(
    folder: Path, etags: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The length that it tells is that of what it sends: it was taken for that of a file that was cut short.
    if way == "fsspec":
        monkeypatch.setattr(direct, "find_place", lambda filesystem, path: None)
    with servers.http_files(folder, ranges=False, etags=etags, compresses=True) as server:
        reader = EmbeddingReader([f"{server.url}/{name}.npy" for name in FILES])
        np.testing.assert_array_equal(reader.to_dask_array(max_piece_size=2).compute(), ROWS)
        with pytest.raises(ReadError, match=r"0\.parquet: the storage does not tell its size"):
            EmbeddingReader([f"{server.url}/{name}.parquet" for name in FILES])


@pytest.mark.parametrize("fault", list(servers.FAULTS))
@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_one_failed_request_does_not_end_the_work(folder: Path, fault: str, file_format: str) -> None:
    with servers.http_files(folder) as server:
        urls = [f"{server.url}/{name}.{file_format}" for name in FILES]
        server.faults = [fault]  # hits a header
        reader = EmbeddingReader(urls, file_format=file_format)
        assert server.faults == []
        server.faults = [fault, fault]  # hits rows
        np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
        assert server.faults == []
        server.faults = [fault]
        batches = [rows for rows, _ in reader(batch_size=4, show_progress=False)]
        np.testing.assert_array_equal(np.concatenate(batches), ROWS)
        assert server.faults == []


def test_an_address_with_a_query_is_one_file(folder: Path) -> None:
    # Presigned URLs end in a signature, not in a suffix, and "?" must not be read as a pattern.
    with servers.http_files(folder) as server:
        urls = [f"{server.url}/{name}.npy?X-Signature=top-secret&part=1" for name in FILES]
        reader = EmbeddingReader(urls)
        np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
        assert all("X-Signature=top-secret" in path for _, path, _ in server.requests)
        assert "top-secret" not in repr(reader)


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_that_changes_on_a_web_server_is_noticed(tmp_path: Path, etags: bool) -> None:
    write_files(tmp_path)
    with servers.http_files(tmp_path, etags=etags) as server:
        info = fsspec.filesystem("http").info(f"{server.url}/1.npy")
        if not (etags or "Last-Modified" in info):
            pytest.skip("this version of fsspec does not tell when a file was modified")
        reader = EmbeddingReader([f"{server.url}/{name}.npy" for name in FILES])
        name = reader.to_dask_array().name
        path = tmp_path / "1.npy"
        np.save(path, ROWS[7:12] + 1)
        os.utime(path, (1.9e9, 1.9e9))
        with pytest.raises(FileChangedError, match=r"1\.npy"):
            reader.to_dask_array().compute()
        with pytest.raises(FileChangedError, match=r"1\.npy"):
            list(reader(batch_size=4, show_progress=False))
        assert EmbeddingReader([f"{server.url}/{name}.npy" for name in FILES]).to_dask_array().name != name


# --------------------------------------------------------------------------------------------------------------------
# Names within an archive say nothing about which archive


def _zip_of(path: Path, number: int) -> str:
    with io.BytesIO() as content, zipfile.ZipFile(path, "w") as archive:
        np.save(content, np.full((3, 2), number, np.float32))
        archive.writestr("emb/0.npy", content.getvalue())
    return f"zip://emb::{path}"


def test_equal_files_of_two_archives_are_different_files(tmp_path: Path) -> None:
    # Equal keys would make one of them stand for both in whatever is computed together.
    readers = [EmbeddingReader(_zip_of(tmp_path / f"{number}.zip", number)) for number in (1, 2)]
    arrays = [reader.to_dask_array() for reader in readers]
    assert arrays[0].name != arrays[1].name
    assert [rows.tolist() for rows in compute(*arrays)] == [[[1, 1]] * 3, [[2, 2]] * 3]
    both = EmbeddingReader([f"zip://emb::{tmp_path}/{number}.zip" for number in (1, 2)])
    assert both.to_dask_array().compute()[:, 0].tolist() == [1, 1, 1, 2, 2, 2]


def test_an_archive_that_is_written_again_has_other_keys(tmp_path: Path) -> None:
    before = EmbeddingReader(_zip_of(tmp_path / "a.zip", 1)).to_dask_array().name
    after = EmbeddingReader(_zip_of(tmp_path / "a.zip", 2)).to_dask_array()
    assert after.name != before
    assert after.compute().tolist() == [[2, 2]] * 3


def test_a_file_reached_twice_in_an_archive_is_read_once(tmp_path: Path) -> None:
    url = _zip_of(tmp_path / "a.zip", 1)
    assert EmbeddingReader([url, url, f"zip://emb/0.npy::{tmp_path}/a.zip"]).count == 3


def test_equal_names_of_two_sets_of_references_are_different_files(tmp_path: Path) -> None:
    _require_references_to_local_files()
    arrays = []
    for number in (1, 2):
        path = tmp_path / f"{number}.npy"
        np.save(path, np.full((3, 2), number, np.float32))
        options = {"fo": {"emb/0.npy": [f"file://{path}", 0, path.stat().st_size]}, "remote_protocol": "file"}
        arrays.append(EmbeddingReader("reference://emb", storage_options=options).to_dask_array())
    assert arrays[0].name != arrays[1].name
    assert [rows.tolist() for rows in compute(*arrays)] == [[[1, 1]] * 3, [[2, 2]] * 3]


# --------------------------------------------------------------------------------------------------------------------
# Secrets


def _every_text_of(reader: EmbeddingReader) -> Iterator[str]:
    """Where a secret could come to light."""
    yield repr(reader)
    yield str(reader)
    yield repr(reader.manifest)
    x, frame = reader.to_dask_array(), reader.to_dask_dataframe()
    yield repr(x)
    yield x.name
    yield from (repr(key) for key in flatten(x.__dask_keys__()))
    yield from (repr(key) for key in dict(x.dask))
    yield repr(frame)
    yield from (repr(key) for key in dict(frame.optimize().dask))


def _text_of_error(work: Callable[[], Any], kind: type[EmbeddingReaderError]) -> str:
    with pytest.raises(kind) as info:
        work()
    return f"{info.value} {info.value!r} {info.value.args}"


def test_secrets_of_s3_never_come_to_light(s3_emb: servers.S3Server) -> None:
    s3 = s3_emb
    options = s3.storage_options
    reader = EmbeddingReader(f"s3://{s3.bucket}/emb/", "parquet", meta_columns=["id"], storage_options=options)
    for text in _every_text_of(reader):
        assert servers.S3_SECRET not in text
        assert servers.S3_KEY not in text
    s3.put("broken/0.npy", b"garbage, more than ten bytes of it, so that a header could be there")
    for work, kind in (
        (lambda: EmbeddingReader(f"s3://{s3.bucket}/nowhere", storage_options=options), NoFilesError),
        (lambda: EmbeddingReader("s3://no-such-bucket/emb", storage_options=options), NoFilesError),
        (lambda: EmbeddingReader(f"s3://{s3.bucket}/broken", storage_options=options), FormatError),
        (
            lambda: EmbeddingReader(f"s3://{s3.bucket}/emb", "parquet", meta_columns=["idd"], storage_options=options),
            ColumnError,
        ),
    ):
        text = _text_of_error(work, kind)
        assert servers.S3_SECRET not in text
        assert servers.S3_KEY not in text


def test_an_object_that_vanishes_is_named_without_secrets(s3: servers.S3Server) -> None:
    with io.BytesIO() as content:
        np.save(content, ROWS)
        url = s3.put("vanishing/0.npy", content.getvalue())
    reader = EmbeddingReader(f"s3://{s3.bucket}/vanishing", storage_options=s3.storage_options)
    fs = fsspec.filesystem("s3", **s3.storage_options)
    fs.rm_file(url)
    text = _text_of_error(lambda: reader.to_dask_array().compute(), ReadError)
    assert "vanishing/0.npy" in text
    assert servers.S3_SECRET not in text


def test_a_password_in_an_address_never_comes_to_light(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "broken.npy").write_bytes(b"garbage, more than ten bytes of it, so that a header could be there")
    with servers.http_files(tmp_path, password_needed=True) as server:
        site = server.url.replace("http://", "http://user:top-secret@")
        urls = [f"{site}/{name}.npy" for name in FILES]
        reader = EmbeddingReader(urls)
        np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
        for text in _every_text_of(reader):
            assert "top-secret" not in text
        assert "top-secret" not in _text_of_error(lambda: EmbeddingReader(f"{site}/missing.npy"), NoFilesError)
        assert "top-secret" not in _text_of_error(lambda: EmbeddingReader(f"{site}/broken.npy"), FormatError)


# --------------------------------------------------------------------------------------------------------------------
# File systems that the rest of the program uses too


def test_nothing_is_put_into_the_file_systems_of_the_program(place: Place) -> None:
    where = place.where("npy")
    filesystem, path = fsspec.url_to_fs(where if isinstance(where, str) else where[0], **place.options or {})
    filesystem.exists(path)
    attributes: dict[str, Any] = object.__getattribute__(filesystem, "__dict__")
    before = set(attributes)
    assert (place.open("npy").to_dask_array().compute(scheduler="sync") == ROWS).all()
    assert set(attributes) == before


def test_the_client_of_the_program_keeps_its_options(azure_emb: clouds.AzureServer) -> None:
    filesystem, _ = fsspec.url_to_fs(f"{azure_emb.root}/emb/0.npy", **azure_emb.storage_options)
    before = filesystem.service_client._config.max_single_get_size
    reader = EmbeddingReader(f"{azure_emb.root}/emb", storage_options=azure_emb.storage_options)
    assert [store.filesystem for store in reader.manifest.vectors.stores] == [filesystem]
    np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
    assert filesystem.service_client._config.max_single_get_size == before


def test_what_is_known_of_a_file_system_goes_with_it(s3_emb: servers.S3Server) -> None:
    for url, options in ((f"{s3_emb.root}/emb", s3_emb.storage_options), ("memory://gone-with-it", {})):
        filesystem, _ = fsspec.url_to_fs(url, **options, skip_instance_cache=True)
        for used in (filesystem, connected(filesystem)):
            sites(used)
        if options:
            assert direct.find_place(filesystem, f"{s3_emb.bucket}/emb/0.npy") is not None
        gone = weakref.ref(filesystem)
        del filesystem, used
        gc.collect()
        assert gone() is None
    assert [found[0]() for found in connections._links.values()].count(None) == 0
