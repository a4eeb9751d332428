"""When obstore reads in the place of fsspec's clients, and when it must not: whose keys, which server, which options.

Whether it reads as well as they do is for the tests of all storages to say: they read by it where it is installed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from dask_embedding_reader import EmbeddingReader, clients, obstore_client
from dask_embedding_reader.connections import connected
from tests import clouds, servers

obstore = pytest.importorskip("obstore")

ROWS = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def no_keys_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing but what a test says tells s3fs who it is."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("obstore")
    np.save(folder / "0.npy", ROWS)
    return folder


@pytest.fixture
def url(s3: servers.S3Server, folder: Path) -> str:
    """A file that only those may read who have a key."""
    return s3.put("obstore/0.npy", (folder / "0.npy").read_bytes())


@pytest.fixture
def only_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client of fsspec may read."""

    def read(*arguments: Any) -> Any:
        pytest.fail("fsspec's client read")

    monkeypatch.setattr(clients, "_request_of_fsspec", read)


@pytest.fixture
def only_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Obstore may not read."""

    def get(*arguments: Any) -> Any:
        pytest.fail("obstore read")

    monkeypatch.setattr(obstore_client, "get", get)


def check(url: str, **options: Any) -> None:
    """Read a file."""
    np.testing.assert_array_equal(EmbeddingReader([url], storage_options=options).to_dask_array().compute(), ROWS)


# --------------------------------------------------------------------------------------------------------------------
# S3


def ways_to_say_who(tmp_path: Path) -> dict[str, tuple[dict[str, str], dict[str, Any]]]:
    """Environment and storage options of each way."""
    keys = {"aws_access_key_id": servers.S3_KEY, "aws_secret_access_key": servers.S3_SECRET}
    lines = "\n".join(f"{name} = {value}" for name, value in keys.items())
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text(f"[somebody]\n{lines}\n")
    expiring = {
        "Version": 1,
        "AccessKeyId": servers.S3_KEY,
        "SecretAccessKey": servers.S3_SECRET,
        "SessionToken": "token",
        "Expiration": "2999-01-01T00:00:00Z",
    }
    (tmp_path / "keys.json").write_text(json.dumps(expiring))
    print_keys = f"{sys.executable} -c 'print(open(\"{tmp_path}/keys.json\").read())'"
    (tmp_path / "AWS_CONFIG_FILE").write_text(f"[profile expiring]\ncredential_process = {print_keys}\n")
    return {
        "options": ({}, {"key": servers.S3_KEY, "secret": servers.S3_SECRET}),
        "environment": ({name.upper(): value for name, value in keys.items()}, {}),
        "profile": ({}, {"profile": "somebody"}),
        "profile in the environment": ({"AWS_PROFILE": "somebody"}, {}),
        "keys that expire": ({}, {"profile": "expiring"}),
    }


@pytest.mark.parametrize("way", ["options", "environment", "profile", "profile in the environment", "keys that expire"])
@pytest.mark.usefixtures("only_obstore")
def test_keys_come_from_wherever_s3fs_takes_them(
    s3: servers.S3Server, url: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, options = ways_to_say_who(tmp_path)[way]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check(url, **options, client_kwargs=s3.client_options)


@pytest.mark.usefixtures("only_obstore")
def test_strangers_stay_strangers(s3: servers.S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Keys that are at hand are none that were asked for.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    public = replace(s3, bucket="public-for-obstore")
    public.make_bucket("public-read")
    address = public.put("0.npy", (folder / "0.npy").read_bytes())
    public.publish("0.npy")
    check(address, anon=True, client_kwargs=s3.client_options)


@pytest.mark.usefixtures("only_obstore")
def test_what_obstore_takes_from_the_environment_does_not_count(
    s3: servers.S3Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # s3fs is told otherwise, or does not know these.
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_REGION": "nowhere",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
        "AWS_SESSION_TOKEN": "token",
        "AWS_S3_EXPRESS": "true",
    }.items():
        monkeypatch.setenv(name, value)
    check(url, **s3.storage_options)


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ({"s3_additional_kwargs": {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}}, {}),
        ({"config_kwargs": {"signature_version": "s3"}}, {}),
        ({}, {"AWS_SSE_CUSTOMER_KEY_BASE64": "a"}),
        ({}, {"HTTP_PROXY": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}),
    ],
)
def test_what_obstore_is_not_known_to_do_is_left_to_s3fs(
    s3: servers.S3Server,
    url: str,
    options: dict[str, Any],
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    filesystem = connected(fsspec.filesystem("s3", **s3.storage_options, **options, skip_instance_cache=True))
    with caplog.at_level(logging.DEBUG, "dask_embedding_reader"):
        assert obstore_client.find_place(filesystem, url.removeprefix("s3://")) is None
    assert "s3://test-bucket is read by fsspec's client, not by obstore: " in caplog.text
    assert servers.S3_SECRET not in caplog.text


def test_signatures_are_right(folder: Path, tmp_path: Path) -> None:
    servers.require(clouds.rclone_available, "rclone")
    servers.require(servers.nginx_available, "nginx")
    bucket = tmp_path / "bucket" / "a b"
    bucket.mkdir(parents=True)
    np.save(bucket / "é+%.npy", ROWS)
    with clouds.signed_s3(tmp_path) as options, servers.nginx_before(options["client_kwargs"]["endpoint_url"]) as nginx:
        options["client_kwargs"]["endpoint_url"] = nginx.url
        live = connected(fsspec.filesystem("s3", **options))
        place = obstore_client.find_place(live, "bucket/a b/é+%.npy")
        assert place is not None
        with nginx.counting() as requests, pytest.raises(obstore_client.UnusualAnswer):
            obstore_client.get(place, 0, 10, len)  # a range with status 200 is what is unusual
        check("s3://bucket/a b/é+%.npy", **options)
    assert [r.status for r in requests] == [200]


# --------------------------------------------------------------------------------------------------------------------
# HTTP


@pytest.fixture
def server(folder: Path) -> Iterator[servers.HttpServer]:
    with servers.http_files(folder) as server:
        yield server


@pytest.mark.usefixtures("only_obstore")
def test_headers_are_sent(server: servers.HttpServer) -> None:
    server.password_needed = True
    headers = {"Authorization": "Bearer nobody-may-see"}
    check(f"{server.url}/0.npy", headers=headers)
    check(f"{server.url}/0.npy", client_kwargs={"headers": headers})


@pytest.mark.usefixtures("only_fsspec")
def test_signed_addresses_are_left_to_aiohttp(server: servers.HttpServer) -> None:
    check(f"{server.url}/0.npy?signature=x")


@pytest.mark.usefixtures("only_fsspec")
def test_other_options_are_left_to_aiohttp(server: servers.HttpServer) -> None:
    check(f"{server.url}/0.npy", client_kwargs={"cookies": {"name": "value"}})
    check(server.url.replace("://", "://user:password@") + "/0.npy")


def test_a_server_that_obstore_cannot_read_is_asked_by_it_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with servers.http_files(folder, ranges=False) as server, caplog.at_level(logging.DEBUG, "dask_embedding_reader"):
        check(f"{server.url}/0.npy")
        check(f"{server.url}/0.npy")
    # The first header twice, then once each: a header and a piece, a header and a piece.
    assert [method for method, _, _ in server.requests].count("GET") == 5
    assert caplog.text.count("obstore cannot") == 1
