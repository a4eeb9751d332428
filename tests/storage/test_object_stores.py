"""What object stores and HDFS are used for that a folder is not: odd keys, long listings, credentials."""

from __future__ import annotations

import io
import re
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import ArgumentError, EmbeddingReaderError, NoFilesError, ReadError
from tests.support import clouds, hadoop, servers
from tests.support.faults import faulty

#: One letter of each kind that some part of some URL gives a meaning to.
NAMES = [
    "a b",
    "a+b",
    "100%",
    "a%20b",
    "%2F",
    "a#b",
    "a?b=c",
    "x&y=z",
    "it's",
    "[a]",
    "a*b",
    "é日本",
    "a=b,c;d",
    "~a@b",
    "a::b",
    "::",
]

#: HDFS has no colons in names; and one of version 2 that is asked by HTTP decodes them twice.
CLIENT_CANNOT: dict[str, Sequence[str]] = {"hdfs": ":", "webhdfs": "%+:"}


def npy(number: int = 0) -> bytes:
    """A file of three vectors filled with a number."""
    content = io.BytesIO()
    np.save(content, vectors(number))
    return content.getvalue()


def vectors(number: int = 0) -> npt.NDArray[np.float32]:
    """What is in it."""
    return np.full((3, 4), number, np.float32)


def put_all(store: servers.ObjectStore, contents: dict[str, bytes]) -> None:
    """Store many objects."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store.put, contents, contents.values()))


def first_items(reader: EmbeddingReader) -> list[float]:
    """Which files were read, in order: one number of each."""
    items: list[float] = reader.to_dask_array().compute()[::3, 0].tolist()
    return items


@pytest.fixture(
    params=["s3", "gs", "az", *(pytest.param(name, marks=pytest.mark.hdfs) for name in ("hdfs", "webhdfs"))]
)
def store(request: pytest.FixtureRequest) -> servers.ObjectStore:
    """Each of the stores in turn."""
    name = {"gs": "gcs", "az": "azure", "webhdfs": "hdfs"}.get(request.param, request.param)
    server: servers.ObjectStore = request.getfixturevalue(name)
    return (
        replace(server, protocol="webhdfs")
        if isinstance(server, hadoop.HdfsServer) and request.param == "webhdfs"
        else server
    )


@pytest.fixture
def prefix() -> str:
    """A folder that no other test uses."""
    return f"t-{uuid.uuid4().hex}"


# --------------------------------------------------------------------------------------------------------------------
# Keys


def test_keys_of_any_spelling(store: servers.ObjectStore, prefix: str) -> None:
    cannot = CLIENT_CANNOT.get(store.root.partition(":")[0], "")
    names = sorted(name for name in NAMES if not set(name) & set(cannot))
    put_all(store, {f"{prefix}/{name}/{name}.npy": npy(k) for k, name in enumerate(names)})
    reader = EmbeddingReader(f"{store.root}/{prefix}", storage_options=store.storage_options)
    assert first_items(reader) == list(range(len(names)))
    for k, name in enumerate(names):
        for url in (f"{store.root}/{prefix}/{name}", f"{store.root}/{prefix}/{name}/", reader.locate(3 * k)[0]):
            assert first_items(EmbeddingReader(url, storage_options=store.storage_options)) == [k], url


def test_a_prefix_is_a_folder_and_not_the_beginning_of_a_name(store: servers.ObjectStore, prefix: str) -> None:
    names = [f"{prefix}/a/b/0.npy", f"{prefix}/a/b/c/d/e/1.npy", f"{prefix}/a/b.npy", f"{prefix}/a/bb/2.npy"]
    put_all(store, {name: npy(k) for k, name in enumerate(names)})
    for url, files in (
        (f"{prefix}/a/b", [0, 1]),
        (f"{prefix}/a/b/", [0, 1]),
        (f"{prefix}/a/b/c", [1]),
        (f"{prefix}/a", [2, 0, 1, 3]),
        (f"{prefix}/a/b.npy", [2]),
        (f"{prefix}/a/b*/*.npy", [0, 3]),
        (f"{prefix}/**/1.npy", [1]),
    ):
        reader = EmbeddingReader(f"{store.root}/{url}", storage_options=store.storage_options)
        assert first_items(reader) == files, url


def test_a_whole_bucket(s3: servers.S3Server) -> None:
    other = replace(s3, bucket="a-whole-bucket")
    other.make_bucket()
    put_all(other, {"1.npy": npy(1), "deep/er/2.npy": npy(2)})
    for url in (other.root, f"{other.root}/"):
        assert first_items(EmbeddingReader(url, storage_options=s3.storage_options)) == [1, 2]


def test_markers_of_folders_are_passed_over(store: servers.ObjectStore, prefix: str) -> None:
    if "hdfs" in store.root:
        pytest.skip("HDFS has real folders")
    # Web consoles and other clients leave objects without bytes that stand for folders.
    put_all(store, {f"{prefix}/": b"", f"{prefix}/sub/": b"", f"{prefix}/sub/0.npy": npy(7)})
    for url in (f"{store.root}/{prefix}", f"{store.root}/{prefix}/sub/"):
        assert first_items(EmbeddingReader(url, storage_options=store.storage_options)) == [7]


def write_many(folder: Path, others: int) -> None:
    """Three files that are read, far apart among many that are not."""
    folder.mkdir(parents=True)
    for k in range(others):
        (folder / f"m{k:05}.txt").touch()
    for k, name in enumerate(["a", "m01050", "z"]):
        (folder / f"{name}.npy").write_bytes(npy(k))


def test_listings_of_many_pages_of_s3(tmp_path: Path) -> None:
    servers.require(clouds.rclone_available, "rclone")
    write_many(tmp_path / "test-bucket" / "emb", 2_500)
    with clouds.signed_s3(tmp_path) as options:
        assert first_items(EmbeddingReader("s3://test-bucket/emb", storage_options=options)) == [0, 1, 2]


def test_listings_of_many_pages_of_google(tmp_path: Path) -> None:
    servers.require(clouds.gcs_available, "fake-gcs-server")
    write_many(tmp_path / "many" / "emb", 2_500)
    with clouds.gcs("-data", str(tmp_path)) as server:
        assert first_items(EmbeddingReader("gs://many/emb", storage_options=server.storage_options)) == [0, 1, 2]


def test_listings_of_many_pages_of_azure(
    azure: clouds.AzureServer, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from azure.storage.blob.aio import ContainerClient

    # Azure hands out 5,000 names at a time, and azurite takes minutes to store so many: smaller pages are pages too.
    small = partialmethod(ContainerClient.list_blobs, results_per_page=100)
    monkeypatch.setattr(ContainerClient, "list_blobs", small)
    servers.require(servers.nginx_available, "nginx")
    write_many(tmp_path / "emb", 250)
    azure.put_all({f"{prefix}/{path.name}": path.read_bytes() for path in (tmp_path / "emb").iterdir()})
    address = urllib.parse.urlsplit(azure.endpoint)
    with servers.nginx_before(f"{address.scheme}://{address.netloc}") as nginx:
        reached = replace(azure, endpoint=f"{nginx.url}{address.path}")
        with nginx.counting() as requests:
            reader = EmbeddingReader(f"{azure.root}/{prefix}", storage_options=reached.storage_options)
        assert first_items(reader) == [0, 1, 2]
    assert len([request for request in requests if "comp=list" in request.path]) == 3


@pytest.mark.hdfs
@pytest.mark.parametrize("protocol", ["hdfs", "webhdfs"])
def test_listings_of_many_pages_of_hdfs(hdfs: hadoop.HdfsServer, prefix: str, tmp_path: Path, protocol: str) -> None:
    write_many(tmp_path / "emb", 1_100)
    put_all(hdfs, {f"{prefix}/{path.name}": path.read_bytes() for path in (tmp_path / "emb").iterdir()})
    assert first_items(EmbeddingReader(f"{replace(hdfs, protocol=protocol).root}/{prefix}")) == [0, 1, 2]


@pytest.mark.hdfs
@pytest.mark.parametrize("protocol", ["hdfs", "webhdfs"])
def test_names_that_a_chain_would_cut_are_refused(hdfs: hadoop.HdfsServer, prefix: str, protocol: str) -> None:
    # Clients of HDFS take these for the query or the fragment of a URL, and a chain leaves the names to them.
    server = replace(hdfs, protocol=protocol)
    put_all(hdfs, {f"{prefix}/0.npy": npy(3), f"{prefix}/a#b/1.npy": npy(4)})
    for name in ("?.npy", "a#b", "a;b"):
        with pytest.raises(ArgumentError, match=re.escape("cut names at '#', '?' and ';'; open the URL without what")):
            EmbeddingReader(f"simplecache::{server.root}/{prefix}/{name}")
    # All else goes through a chain, and without one there is nothing to cut.
    assert first_items(EmbeddingReader(f"simplecache::{server.root}/{prefix}/*.npy")) == [3]
    assert first_items(EmbeddingReader(f"{server.root}/{prefix}/?.npy")) == [3]
    assert first_items(EmbeddingReader(f"{server.root}/{prefix}/a#b")) == [4]


def test_an_object_that_is_replaced_has_another_key(store: servers.ObjectStore, prefix: str) -> None:
    # Of the same size: only its version can tell.
    names = []
    for k in range(2):
        store.put(f"{prefix}/0.npy", npy(k))
        reader = EmbeddingReader(f"{store.root}/{prefix}", storage_options=store.storage_options)
        assert first_items(reader) == [k]
        names.append(reader.to_dask_array().name)
    assert names[0] != names[1]


# --------------------------------------------------------------------------------------------------------------------
# Who may read


def refused(url: str, options: dict[str, Any], kind: type[EmbeddingReaderError] = ReadError) -> str:
    """All that the error tells, from the first to the last of its causes."""
    # A client that has asked before would answer from memory.
    fsspec.AbstractFileSystem.clear_instance_cache()
    with pytest.raises(kind) as caught:
        EmbeddingReader(url, storage_options=options)
    assert url in str(caught.value)
    return str(caught.value)


def test_a_version_that_is_asked_for_is_the_one_that_is_read(s3: servers.S3Server, prefix: str) -> None:
    versioned = replace(s3, bucket="versioned")
    versioned.make_bucket()
    filesystem = fsspec.filesystem("s3", version_aware=True, **s3.storage_options)
    filesystem.make_bucket_versioned("versioned", True)
    urls = []
    for number in range(3):
        filesystem.pipe_file(f"versioned/{prefix}/0.npy", npy(number))
        version = filesystem.info(f"versioned/{prefix}/0.npy", refresh=True)["VersionId"]
        urls.append(f"s3://versioned/{prefix}/0.npy?versionId={version}")
    for number, url in enumerate(urls):
        for where in (url, [url], f"simplecache::{url}"):
            options = {"s3": s3.storage_options} if "::" in str(where) else s3.storage_options
            reader = EmbeddingReader(where, storage_options=options)
            np.testing.assert_array_equal(reader.to_dask_array().compute(), vectors(number))
            assert reader.locate(0)[0] == url
    for url in (urls[0].replace("0.npy", "1.npy"), urls[0].replace("/0.npy", "")):
        with pytest.raises(NoFilesError, match="of the version that is asked for"):
            EmbeddingReader(url, storage_options=s3.storage_options)


@pytest.mark.parametrize("name", ["a::b.npy", "c::d/0.npy", "::/0.npy", "s3::e.npy"])
def test_two_colons_in_a_key_are_no_chain(s3: servers.S3Server, prefix: str, name: str) -> None:
    url = s3.put(f"{prefix}/{name}", npy())
    for where in (url, f"{s3.root}/{prefix}", f"{url[:-1]}?", f"simplecache::{url}"):
        options = {"s3": s3.storage_options} if where.startswith("simple") else s3.storage_options
        reader = EmbeddingReader(where, storage_options=options)
        np.testing.assert_array_equal(reader.to_dask_array().compute(), vectors())
        assert reader.locate(0) == (url, 0)


def test_a_bucket_that_is_missing(store: servers.ObjectStore) -> None:
    if "hdfs" in store.root:
        pytest.skip("HDFS has no buckets")
    url = f"{store.root.replace('test-', 'no-such-')}/emb"
    message = refused(url, store.storage_options, NoFilesError)
    assert not any(secret in message for secret in (servers.S3_SECRET, servers.S3_KEY, clouds.AZURE_KEY))


def test_strangers_read_what_is_public(s3: servers.S3Server) -> None:
    public = replace(s3, bucket="public-bucket")
    public.make_bucket("public-read")
    # The bucket may be listed by everybody; each object has to say so for itself.
    public.put("emb/0.npy", npy(5))
    public.publish("emb/0.npy")
    options = {"anon": True, "client_kwargs": s3.client_options}
    assert first_items(EmbeddingReader(f"{public.root}/emb", storage_options=options)) == [5]


def test_strangers_read_nothing_else(s3: servers.S3Server) -> None:
    s3.put("private/0.npy", npy())
    message = refused(f"{s3.root}/private", {"anon": True, "client_kwargs": s3.client_options})
    assert "denied" in message.lower() or "forbidden" in message.lower()


def test_strangers_read_a_public_container(azure: clouds.AzureServer) -> None:
    public = replace(azure, bucket="public-container")
    public.make_bucket("container")
    public.put("emb/0.npy", npy(5))
    assert first_items(EmbeddingReader(f"{public.root}/emb", storage_options=azure.options(None))) == [5]
    azure.put("private/0.npy", npy())
    refused(f"{azure.root}/private", azure.options(None), EmbeddingReaderError)


@pytest.mark.parametrize("cloud", ["gcs", "azure"])
def test_more_bytes_than_were_asked_for_are_asked_for_again(
    cloud: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    server: clouds.GcsServer | clouds.AzureServer = request.getfixturevalue(cloud)
    url = server.put("longer/0.npy", npy(5))
    with faulty(server.endpoint) as proxy:
        there = replace(server, endpoint=proxy.url + urllib.parse.urlsplit(server.endpoint).path)
        reader = EmbeddingReader(url, storage_options=there.storage_options)
        proxy.every = "longer"
        proxy.before = lambda _: proxy.behave()  # once
        assert first_items(reader) == [5]
    assert "more than the 48 bytes came" in caplog.text


@pytest.fixture
def signed_s3(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The options of an S3 service that checks signatures, with one bucket."""
    servers.require(clouds.rclone_available, "rclone")
    (tmp_path / "test-bucket").mkdir()
    np.save(tmp_path / "test-bucket" / "0.npy", vectors(5))
    with clouds.signed_s3(tmp_path) as options:
        yield options


def test_wrong_credentials_of_s3(signed_s3: dict[str, Any]) -> None:
    url = "s3://test-bucket"
    assert first_items(EmbeddingReader(url, storage_options=signed_s3)) == [5]
    for wrong in ({"secret": "another-secret"}, {"key": "another-key"}):
        message = refused(url, {**signed_s3, **wrong})
        assert not any(secret in message for secret in (servers.S3_SECRET, servers.S3_KEY, "another-"))


def test_wrong_credentials_of_azure(azure: clouds.AzureServer) -> None:
    key = "d3Jvbmcga2V5IHRoYXQgbm9ib2R5IG1heSBzZWU="
    message = refused(f"{azure.root}/emb", azure.options(key))
    assert key not in message


def test_wrong_credentials_of_google(gcs: clouds.GcsServer, tmp_path: Path) -> None:
    # The server asks nobody who he is; the client reads what it is given.
    token = tmp_path / "key.json"
    token.write_text('{"type": "service_account", "private_key": "top-secret"}')
    message = refused(f"{gcs.root}/emb", {**gcs.storage_options, "token": str(token)}, EmbeddingReaderError)
    assert "top-secret" not in message


def test_a_wrong_password_of_a_web_server(tmp_path: Path) -> None:
    servers.require(servers.nginx_available, "nginx")
    np.save(tmp_path / "0.npy", vectors(5))
    passwords = tmp_path / "passwords"
    passwords.write_text("user:{PLAIN}top-secret\n")
    with servers.nginx(tmp_path, extra=f'auth_basic "test"; auth_basic_user_file "{passwords}";') as server:
        site = server.url.replace("http://", "http://{}@")
        assert first_items(EmbeddingReader(site.format("user:top-secret"))) == [5]
        for url in (site.format("user:wr0ng"), f"{site.format('user:wr0ng')}/0.npy"):
            with pytest.raises(EmbeddingReaderError, match=server.url) as caught:
                EmbeddingReader(url)
            assert "401" in str(caught.value)
            assert "wr0ng" not in str(caught.value)
