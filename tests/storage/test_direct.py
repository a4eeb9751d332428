"""When files are read without fsspec's clients, and when they must not: whose keys, which server, which options.

Whether they are read as well is for the tests of all storages to say.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import aiohttp
import fsspec
import numpy as np
import pytest
from fsspec.asyn import sync

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import ReadError
from dask_embedding_reader.storage import requests as clients
from dask_embedding_reader.storage import retries
from dask_embedding_reader.storage.connections import Asked, connected
from dask_embedding_reader.storage.direct import http as http_requests
from dask_embedding_reader.storage.direct import read as direct
from dask_embedding_reader.storage.direct import s3 as direct_s3
from dask_embedding_reader.storage.ranges import ByteRange
from tests.support import clouds, servers

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
    folder = tmp_path_factory.mktemp("direct")
    np.save(folder / "0.npy", ROWS)
    return folder


@pytest.fixture
def url(s3: servers.S3Server, folder: Path) -> str:
    """A file that only those may read who have a key."""
    return s3.put("direct/0.npy", (folder / "0.npy").read_bytes())


@pytest.fixture
def only_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client of fsspec may read."""

    def read(*arguments: Any) -> Any:
        pytest.fail("fsspec's client read")

    monkeypatch.setattr(clients, "_request_of_fsspec", read)


@pytest.fixture
def only_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a client of fsspec may read."""

    def get(*arguments: Any) -> Any:
        pytest.fail("read directly")

    monkeypatch.setattr(direct, "get", get)


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
@pytest.mark.usefixtures("only_direct")
def test_keys_come_from_wherever_s3fs_takes_them(
    s3: servers.S3Server, url: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, options = ways_to_say_who(tmp_path)[way]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check(url, **options, client_kwargs=s3.client_options)


@pytest.mark.usefixtures("only_direct")
def test_strangers_stay_strangers(s3: servers.S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Keys that are at hand are none that were asked for.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    public = replace(s3, bucket="public-for-direct")
    public.make_bucket("public-read")
    address = public.put("0.npy", (folder / "0.npy").read_bytes())
    public.publish("0.npy")
    check(address, anon=True, client_kwargs=s3.client_options)


@pytest.mark.usefixtures("only_direct")
def test_options_of_a_request_are_kept(s3: servers.S3Server, url: str) -> None:
    check(url, requester_pays=True, **s3.storage_options)
    live = connected(fsspec.filesystem("s3", requester_pays=True, **s3.storage_options))
    place = direct.find_place(live, url.removeprefix("s3://"))
    assert place is not None
    headers = place.site.headers(place.url, "bytes=0-9")
    assert headers["x-amz-request-payer"] == "requester"
    assert re.search("SignedHeaders=[^ ]*x-amz-request-payer", headers["authorization"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"config_kwargs": {"signature_version": "s3"}}, "signs in another way"),
        ({"config_kwargs": {"proxies": {"http": "http://127.0.0.1:9"}}}, "uses a proxy"),
        ({"s3_additional_kwargs": {"SSECustomerKey": "0" * 32}}, "uses SSECustomerKey"),
        ({"config_kwargs": {"client_cert": "a.pem"}}, "shows a certificate"),
        ({"client_kwargs": {"endpoint_url": "https://127.0.0.1:1", "verify": False}}, "does not check certificates"),
    ],
)
def test_what_is_out_of_the_ordinary_is_left_to_s3fs(
    s3: servers.S3Server, url: str, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {**s3.storage_options, **options, "skip_instance_cache": True}
    filesystem = connected(fsspec.filesystem("s3", **options))
    with caplog.at_level(logging.INFO, "dask_embedding_reader"):
        for _ in range(2):
            assert direct.find_place(filesystem, url.removeprefix("s3://")) is None
    said = "s3://test-bucket is read by fsspec's client, which takes more processor time"
    assert [record.getMessage() for record in caplog.records] == [f"{said}: it {reason}"]


def test_a_client_that_signs_with_other_keys_than_its_session_tells_is_left_to_s3fs(
    s3: servers.S3Server, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def others(_: Any) -> Any:
        return import_module("aiobotocore.credentials").AioCredentials("other", "secret")

    monkeypatch.setattr(direct_s3, "_credentials", others)
    filesystem = connected(fsspec.filesystem("s3", **s3.storage_options, skip_instance_cache=True))
    with caplog.at_level(logging.INFO, "dask_embedding_reader"):
        assert direct.find_place(filesystem, url.removeprefix("s3://")) is None
    assert caplog.text.count("it signs with keys of its own") == 1


@pytest.mark.parametrize("named", ["nowhere", "in the environment", "in the options"])
def test_certificates_are_checked_unless_somebody_says_otherwise(
    s3: servers.S3Server, url: str, named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = {**s3.client_options, "endpoint_url": "https://127.0.0.1:1"}
    bundle = tmp_path / "trusted.pem"
    trusted = ssl.create_default_context().get_ca_certs(binary_form=True)[:1]
    bundle.write_text("".join(map(ssl.DER_cert_to_PEM_cert, trusted)))
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    if named == "in the environment":
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    elif named == "in the options":
        client["verify"] = str(bundle)
    options = {**s3.storage_options, "client_kwargs": client, "skip_instance_cache": True}
    place = direct.find_place(connected(fsspec.filesystem("s3", **options)), url.removeprefix("s3://"))
    assert place is not None
    tls = place.site.connections._tls
    assert tls is not None
    assert tls.verify_mode is ssl.CERT_REQUIRED
    assert (len(tls.get_ca_certs()) > 1) is (named == "nowhere")


@pytest.mark.usefixtures("only_fsspec")
def test_one_switch_turns_it_off(
    s3: servers.S3Server,
    url: str,
    server: servers.HttpServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DASK_EMBEDDING_READER_DIRECT", "0")
    monkeypatch.setattr(direct, "look", direct.get)
    with caplog.at_level(logging.INFO, "dask_embedding_reader"):
        check(url, **s3.storage_options)
        check(f"{server.url}/0.npy")
    said = "is read by fsspec's client, which takes more processor time: DASK_EMBEDDING_READER_DIRECT=0"
    assert [record.getMessage() for record in caplog.records] == [f"{site} {said}" for site in (s3.root, server.url)]


async def sent(filesystem: Any, bucket: str) -> tuple[str, str]:
    """What s3fs's client would send: the address of a file, and the region that it signs for."""
    await filesystem.set_session()
    client, caught = await filesystem.get_s3(bucket), []

    def catch(request: Any, **_: Any) -> None:
        caught.append((request.url, str(request.headers["Authorization"]).split("/")[2]))
        raise ConnectionError

    client.meta.events.register_first("before-send.s3.GetObject", catch)
    with suppress(Exception):
        await client.get_object(Bucket=bucket, Key="0.npy")
    return caught[0]


@pytest.mark.parametrize(
    ("region", "bucket", "options"),
    [
        ("us-east-1", "bucket", {}),
        ("eu-west-1", "bucket", {}),  # where URLs are presigned in an earlier way
        ("eu-central-1", "bucket", {"addressing_style": "path"}),
        ("eu-central-1", "bucket", {"use_accelerate_endpoint": True}),
        ("eu-west-1", "bucket", {"use_dualstack_endpoint": True}),
        ("eu-west-1", "arn:aws:s3:us-west-2:123456789012:accesspoint/name", {}),
    ],
)
def test_the_same_address_is_asked_for_the_same_region(
    region: str | None, bucket: str, options: dict[str, Any]
) -> None:
    filesystem = fsspec.filesystem(
        "s3",
        key="key",
        secret="secret",
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={"s3": options},
    )
    place = direct.find_place(filesystem, f"{bucket}/0.npy")
    assert place is not None
    signed = place.site.headers(place.url, "bytes=0-9")["authorization"]
    assert (place.url, signed.split("/")[2]) == sync(filesystem.loop, sent, filesystem, bucket)


def test_no_address_with_a_signature_is_sent_or_logged(
    s3: servers.S3Server, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    servers.require(servers.nginx_available, "nginx")
    with (
        servers.nginx_before(s3.endpoint) as counted,
        counted.counting() as requests,
        caplog.at_level(logging.DEBUG),
    ):
        check(url, **{**s3.storage_options, "client_kwargs": {**s3.client_options, "endpoint_url": counted.url}})
    assert requests
    signed = re.compile("(AWSAccessKeyId|Signature|X-Amz-Credential)=", re.IGNORECASE)
    assert not [request for request in requests if signed.search(request.path)]
    logged = [record.getMessage() for record in caplog.records]
    assert not [text for text in logged if "://" in text and re.search(r"[?&](AWSAccessKeyId|X-Amz-)", text)]


@pytest.mark.usefixtures("only_direct")
def test_signatures_are_right(tmp_path: Path) -> None:
    servers.require(clouds.rclone_available, "rclone")
    bucket = tmp_path / "bucket" / "a b"
    bucket.mkdir(parents=True)
    np.save(bucket / "é+%=&?~.npy", ROWS)
    with clouds.signed_s3(tmp_path) as options:
        check("s3://bucket/a b/é+%=&?~.npy", **options)
        with pytest.raises(ReadError, match="PermissionError"):  # rclone looks
            check("s3://bucket/a b/é+%=&?~.npy", **{**options, "secret": "wrong"})


# --------------------------------------------------------------------------------------------------------------------
# HTTP


@pytest.fixture
def server(folder: Path) -> Iterator[servers.HttpServer]:
    with servers.http_files(folder) as server:
        yield server


@pytest.mark.usefixtures("only_direct")
def test_headers_are_sent(server: servers.HttpServer) -> None:
    server.password_needed = True
    headers = {"Authorization": "Bearer nobody-may-see"}
    check(f"{server.url}/0.npy", headers=headers)
    check(f"{server.url}/0.npy", client_kwargs={"headers": headers, "cookies": {"name": "value"}})


@pytest.mark.usefixtures("only_direct")
def test_signed_addresses_are_asked_for_as_they_are(server: servers.HttpServer) -> None:
    check(f"{server.url}/0.npy?signature=a%3D%26")
    assert {path for _, path, _ in server.requests} == {"/0.npy?signature=a%3D%26"}


@pytest.mark.usefixtures("only_fsspec")
def test_other_options_are_left_to_aiohttp(server: servers.HttpServer) -> None:
    check(f"{server.url}/0.npy", client_kwargs={"max_line_size": 2**14})
    check(server.url.replace("://", "://user:password@") + "/0.npy")


@pytest.mark.parametrize(
    ("given", "waits"),
    [
        ({}, (retries.STALL_SECONDS, retries.STALL_SECONDS, None)),
        ({"total": 7.0}, (7.0, 7.0, 7.0)),
        ({"total": None, "sock_connect": 2.0, "sock_read": 3.0}, (2.0, 3.0, None)),
        ({"total": 7.0, "sock_connect": 2.0}, (2.0, 7.0, 7.0)),
        ({"total": 7.0, "connect": 2.0}, None),  # for a pool, which there is not
    ],
)
def test_as_long_is_waited_as_the_options_of_aiohttp_say(
    server: servers.HttpServer, given: dict[str, Any], waits: tuple[float | None, ...] | None
) -> None:
    options = {"timeout": aiohttp.ClientTimeout(**given)} if given else {}
    for where in (options, {"client_kwargs": options}):
        live = connected(fsspec.filesystem("http", **where, skip_instance_cache=True))
        place = direct.find_place(live, f"{server.url}/0.npy")
        assert (None if place is None else tuple(place.site.connections.timeouts)) == waits


@pytest.mark.usefixtures("only_direct")
def test_an_answer_that_comes_in_time_is_taken(server: servers.HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"timeout": aiohttp.ClientTimeout(total=60)}
    check(f"{server.url}/0.npy", client_kwargs=options)
    place = direct.find_place(connected(fsspec.filesystem("http", client_kwargs=options)), f"{server.url}/0.npy")
    assert place is not None
    now = iter([0.0, 60.0, 60.5])
    monkeypatch.setattr(direct, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with pytest.raises(TimeoutError, match=r"the answer did not come in 60 s"):  # more than a block is asked for
        direct.get(place, ByteRange(0, [memoryview(bytearray(10)), memoryview(bytearray(10))]), Asked())


def test_a_server_that_is_busy_is_not_asked_twice_at_once(server: servers.HttpServer) -> None:
    server.faults = ["503"]
    place = direct.find_place(connected(fsspec.filesystem("http")), f"{server.url}/0.npy")
    assert place is not None
    with pytest.raises(direct.AnswerError, match="503"):  # although it never answered before
        direct.get(place, ByteRange(0, [memoryview(bytearray(4))]), Asked())


def test_a_server_whose_answers_are_unusual_is_left_to_aiohttp(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with servers.http_files(folder, ranges=False) as server, caplog.at_level(logging.DEBUG, "dask_embedding_reader"):
        check(f"{server.url}/0.npy")
        check(f"{server.url}/0.npy")
    # The first header twice, then once each: a header and a piece, a header and a piece.
    assert [method for method, _, _ in server.requests].count("GET") == 5
    assert caplog.text.count("its answers are unusual") == 1


def test_a_file_is_looked_up_and_its_header_read_in_one_request(server: servers.HttpServer, only_direct: None) -> None:
    reader = EmbeddingReader(f"{server.url}/0.npy")
    assert server.requests == [("GET", "/0.npy", "bytes=0-511")]
    np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)


def test_a_server_that_is_busy_when_a_file_is_looked_up_is_asked_again_later(
    server: servers.HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dask_embedding_reader.storage.retries.FIRST_PAUSE_SECONDS", 0.001)
    server.faults = ["503"]
    assert EmbeddingReader(f"{server.url}/0.npy").count == len(ROWS)
    assert server.requests == [("GET", "/0.npy", "bytes=0-511")] * 2


def test_an_empty_file_changes_nothing_for_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "1.npy", ROWS)
    (tmp_path / "0.npy").touch()
    servers.require(servers.nginx_available, "nginx")
    with servers.nginx(tmp_path) as server, caplog.at_level(logging.DEBUG, "dask_embedding_reader"):
        with server.counting() as requests:
            reader = EmbeddingReader(f"{server.url}/")
        np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
    assert [request.method for request in requests if request.path == "/1.npy"] == ["GET"]
    assert "unusual" not in caplog.text


# --------------------------------------------------------------------------------------------------------------------
# Connections


def test_a_server_may_point_elsewhere(server: servers.HttpServer) -> None:
    servers.require(servers.nginx_available, "nginx")
    with servers.nginx_server(f"return 302 {server.url}$request_uri;") as pointing:
        check(f"{pointing.url}/0.npy")
        headers = {"Authorization": "Bearer for the one that was asked"}
        server.password_needed = True
        check(f"{server.url}/0.npy", headers=headers)
        with pytest.raises(ReadError, match="Unauthorized"):
            check(f"{pointing.url}/0.npy", headers=headers)


def test_one_connection_serves_many_requests_and_another_takes_over_where_it_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers.require(servers.nginx_available, "nginx")
    with servers.nginx(folder, extra="keepalive_requests 3;") as server:
        live = connected(fsspec.filesystem("http"))
        place = direct.find_place(live, f"{server.url}/0.npy")
        assert place is not None
        connect = Mock(wraps=place.site.connections._connect)
        monkeypatch.setattr(place.site.connections, "_connect", connect)
        for _ in range(7):
            buffer = bytearray(960)
            direct.get(place, ByteRange(128, [memoryview(buffer)]), Asked())
            assert buffer == ROWS.tobytes()
    assert connect.call_count == 3


def test_a_connection_that_the_server_has_closed_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_requests, "_FRESH_SECONDS", 0.0)
    answer = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\nContent-Range: bytes 0-3/4\r\n\r\nabcd"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(3):
                connection, _ = server.accept()
                with connection:
                    connection.recv(10_000)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        live = connected(fsspec.filesystem("http"))
        place = direct.find_place(live, f"http://127.0.0.1:{server.getsockname()[1]}/0.npy")
        assert place is not None
        for _ in range(3):
            buffer = bytearray(4)
            direct.get(place, ByteRange(0, [memoryview(buffer)]), Asked())
            assert buffer == b"abcd"
            (idle,) = place.site.connections._idle.values()
            select.select([idle[0][1].sock], [], [])  # until it is closed
        thread.join()
        place.site.connections.close()


def test_a_connection_that_is_used_again_waits_for_a_late_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_requests, "_FRESH_SECONDS", 0.0)  # it is looked at, without waiting, whether it stands
    answer = HEAD.format("206 Partial Content", 4, "").encode() + b"abcd"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                for _ in range(2):
                    connection.recv(10_000)
                    time.sleep(0.05)
                    connection.sendall(answer)
                connection.recv(10_000)

        thread = threading.Thread(target=serve)
        thread.start()
        connections = http_requests.Connections(http_requests.Timeouts(10, 10, None))
        for _ in range(2):
            with connections.ask("GET", f"http://127.0.0.1:{server.getsockname()[1]}/", {}, Asked()) as found:
                assert found.read() == b"abcd"
        connections.close()
        thread.join(60)


def test_the_connection_that_was_used_last_is_used_next() -> None:
    """And of too many the one is closed that was not used for longest."""
    connections = http_requests.Connections(http_requests.Timeouts(None, None, None))
    origin = http_requests._Origin("http", "somewhere", None)
    used = [Mock() for _ in range(http_requests._MOST_IDLE + 2)]
    for connection in used:
        connections._keep(origin, connection)
    assert [connection.close.called for connection in used] == [True] * 2 + [False] * http_requests._MOST_IDLE
    assert [connections._take(origin) for _ in used] == [*used[:1:-1], None, None]


def test_a_connection_with_the_rest_of_a_long_redirect_is_not_used_again() -> None:
    page = HEAD.format("302 Found", 100_000, "Location: /1.npy\r\n").encode() + b"HTTP/1.1 206 " * 7_692 + b"1234"
    right = HEAD.format("206 Partial Content", 4, "").encode() + b"abcd"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answer in (page, right):
                connection, _ = server.accept()
                with connection, suppress(ConnectionError):
                    connection.recv(10_000)
                    connection.sendall(answer)
                    served.append(connection.recv(10_000))

        served: list[bytes] = []
        thread = threading.Thread(target=serve)
        thread.start()
        connections = http_requests.Connections(http_requests.Timeouts(10, 10, None))
        url = f"http://127.0.0.1:{server.getsockname()[1]}/0.npy"
        with connections.ask_and_follow("GET", url, {}, Asked()) as found:
            assert found.read() == b"abcd"
        connections.close()
        thread.join(60)
    assert not any(served), "asked again over the same connection"


HEAD = "HTTP/1.1 {}\r\nContent-Length: {}\r\nContent-Range: bytes 0-3/4\r\n{}\r\n"

ANSWERS: dict[str, bytes] = {
    "longer than asked": HEAD.format("206 Partial Content", 8, "").encode() + b"abcdefgh",
    "longer, the rest on its way": HEAD.format("206 Partial Content", 4_000, "").encode() + b"abcdefgh",
    "longer, of no length": HEAD.format("206 Partial Content", 0, "Transfer-Encoding: chunked\r\n").encode()
    + b"8\r\nabcdefgh\r\n0\r\n\r\n",
    "of another place": HEAD.format("206 Partial Content", 4, "").replace("0-3/4", "4-7/8").encode() + b"efgh",
    "compressed": HEAD.format("206 Partial Content", 4, "Content-Encoding: gzip\r\n").encode() + b"abcd",
    "busy": HEAD.format("503 Busy", 4, "").encode() + b"wait",
    "gone": HEAD.format("404 Not Found", 4, "").encode() + b"gone",
    "not for you": HEAD.format("403 Forbidden", 4, "").encode() + b"none",
    "the whole file": b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nabcdefgh",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_connection_with_an_unread_body_is_not_used_again(answer: str) -> None:
    """The next answer would begin with what is left of this one."""
    right = HEAD.format("206 Partial Content", 4, "").encode() + b"abcd"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answers in ([right, ANSWERS[answer]], [right]):
                connection, _ = server.accept()
                with connection:
                    for each in answers:
                        connection.recv(10_000)
                        connection.sendall(each)
                    served.append(connection.recv(10_000))

        served: list[bytes] = []
        thread = threading.Thread(target=serve)
        thread.start()
        live = connected(fsspec.filesystem("http"))
        place = direct.find_place(live, f"http://127.0.0.1:{server.getsockname()[1]}/0.npy")
        assert place is not None

        def ask() -> bytes:
            buffer = bytearray(4)
            direct.get(place, ByteRange(0, [memoryview(buffer)]), Asked())
            return bytes(buffer)

        assert ask() == b"abcd"
        with pytest.raises((OSError, ReadError, direct.UnusualAnswer)):
            ask()
        assert ask() == b"abcd"
        place.site.connections.close()
        thread.join(60)
    assert served == [b"", b""], "asked again over the same connection"


def test_a_question_that_is_given_up_ends_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        live = connected(fsspec.filesystem("http"))
        place = direct.find_place(live, f"http://127.0.0.1:{server.getsockname()[1]}/0.npy")
        assert place is not None
        asked = Asked()
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(direct.get, place, ByteRange(0, [memoryview(bytearray(4))]), asked)
            connection, _ = server.accept()
            connection.recv(10_000)  # a server that never answers
            asked.give_up()
            assert isinstance(answer.exception(), direct.UnusualAnswer)
            connection.close()
