"""Who is asked for byte ranges: servers directly, the client that tells the version, or any client of fsspec."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from dask_embedding_reader.errors import ReadError
from dask_embedding_reader.storage import requests
from dask_embedding_reader.storage.clients import any as any_client
from dask_embedding_reader.storage.clients import azure, gcs, hf, http, s3
from dask_embedding_reader.storage.direct import read as direct
from dask_embedding_reader.storage.ranges import ByteRange
from dask_embedding_reader.storage.requests import ask_info, request
from dask_embedding_reader.storage.retries import STALL_SECONDS, EndlessAnswerError

FILE = bytes(range(100))
SPANS = [(0, 10), (20, 25), (90, 100)]


def ranges(spans: Sequence[tuple[int, int]] = SPANS) -> list[ByteRange]:
    return [ByteRange(start, [memoryview(bytearray(stop - start))]) for start, stop in spans]


def came(wanted: Sequence[ByteRange]) -> list[bytes]:
    return [b"".join(each.buffers) for each in wanted]


WANTED = [FILE[start:stop] for start, stop in SPANS]


class Plain(MemoryFileSystem):  # type: ignore[misc]  # fsspec is not typed
    """Holds one file."""

    cachable = False

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        if start == 20 and path == "/broken":
            raise TimeoutError("away")
        return FILE[start:end] + (b"more" if start == 20 and path == "/longer" else b"")


class Asynchronous(AsyncFileSystem):  # type: ignore[misc]  # fsspec is not typed
    """The same, in an event loop."""

    cachable = False

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return bytes(Plain().cat_file(path, start, end))

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": 7}


@pytest.mark.parametrize("kind", [Plain, Asynchronous])
def test_of_any_client_come_bytes_or_what_went_wrong(kind: type[Any]) -> None:
    wanted = ranges()
    assert request(kind(), "/a", wanted) == [None] * 3
    assert came(wanted) == WANTED
    for path, error in (("/broken", TimeoutError), ("/longer", ReadError)):
        wanted = ranges()
        answers = request(kind(), path, wanted)
        assert [type(answer) for answer in answers] == [type(None), error, type(None)]
        assert came(wanted)[::2] == WANTED[::2]


def test_an_unknown_client_may_take_so_long_for_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[Any, ...]]()

    def cat_ranges(_: Any, path: str, starts: list[int], stops: list[int], seconds: float) -> list[bytes]:
        asked.append((path, starts, stops, seconds))
        return [FILE[start:stop] for start, stop in zip(starts, stops, strict=True)]

    monkeypatch.setattr(any_client, "cat_ranges", cat_ranges)
    assert request(Asynchronous(), "/a", ranges()) == [None] * 3
    assert asked == [("/a", [0, 20, 90], [10, 25, 100], STALL_SECONDS + 25 / 100_000)]
    of_folder = Asynchronous()
    of_folder.protocol = "dir"  # which says that it is asynchronous whatever it stands on
    of_folder.cat_file = Plain().cat_file
    assert request(of_folder, "/a", ranges()) == [None] * 3
    assert len(asked) == 1


UNUSUAL = direct.UnusualAnswer()


@pytest.mark.parametrize(
    ("answers", "others", "asked", "is_left"),
    [
        ([1, 2, 3], [], [], False),
        ([1, KeyError, 3], [], [], False),
        ([1, UNUSUAL, 3], [20], [1], True),
        ([1, UNUSUAL, 3], [KeyError], [1], False),
        ([UNUSUAL, 2, UNUSUAL], [10, 30], [0, 2], True),
        ([UNUSUAL, 2, UNUSUAL], [KeyError, 30], [0, 2], True),
        ([UNUSUAL, 2, UNUSUAL], [KeyError, KeyError], [0, 2], False),
        ([UNUSUAL, UNUSUAL, UNUSUAL], [None, KeyError, 30], [0, 1, 2], True),
    ],
)
def test_what_is_unusual_is_left_to_fsspec_and_all_else_too_where_that_succeeds(
    monkeypatch: pytest.MonkeyPatch, answers: list[Any], others: list[Any], asked: list[int], is_left: bool
) -> None:
    filesystem, place, left = Plain(), object(), list[tuple[Any, Any]]()
    wanted: Any = ranges()
    given: list[Any] = [answer() if isinstance(answer, type) else answer for answer in answers]
    instead: list[Any] = [answer() if isinstance(answer, type) else answer for answer in others]

    def get(where: object, each: ByteRange, _: object) -> Any:
        assert where is place
        answer = given[wanted.index(each)]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def request_of_fsspec(_: object, live: object, path: str, some: list[ByteRange]) -> list[Any]:
        assert (live, path) == (filesystem, "/a")
        assert [wanted.index(each) for each in some] == (asked if not again else [0, 1, 2])
        return instead if not again else by_fsspec

    again, by_fsspec = False, list[Any]([7, 8, 9])
    monkeypatch.setattr(direct, "find_place", lambda *_: place)
    monkeypatch.setattr(direct, "get", get)
    monkeypatch.setattr(direct, "leave_to_fsspec", lambda *arguments: left.append(arguments))
    monkeypatch.setattr(requests, "_request_of_fsspec", request_of_fsspec)
    whole = [*given]
    for position, answer in zip(asked, instead, strict=True):
        whole[position] = answer
    assert request(filesystem, "/a", wanted) == whole
    assert left == [(filesystem, place)] * is_left
    again = True
    assert [*request(filesystem, "/a", wanted, again=True)] == by_fsspec
    monkeypatch.setattr(direct, "find_place", lambda *_: None)
    assert [*request(filesystem, "/a", wanted)] == by_fsspec


@pytest.mark.parametrize(
    ("first_nbytes", "told", "info", "is_left"),
    [
        (0, {"size": 3}, {"size": 3}, False),
        (4, {"size": 3, "head": b"abc"}, {"size": 3, "head": b"abc"}, False),
        (4, {"size": 3}, {"size": 3}, True),
        (4, {"size": 0}, {"size": 0}, False),
        (4, KeyError(), None, False),
        (4, EndlessAnswerError(), EndlessAnswerError, False),
    ],
)
def test_a_web_server_is_asked_what_a_file_is(
    monkeypatch: pytest.MonkeyPatch, first_nbytes: int, told: Any, info: Any, is_left: bool
) -> None:
    filesystem, left = Plain(), list[Any]()
    place = SimpleNamespace(is_web=True)

    def look(where: object, nbytes: int, _: object) -> Any:
        assert (where, nbytes) == (place, first_nbytes)
        if isinstance(told, Exception):
            raise told
        return told

    monkeypatch.setattr(direct, "find_place", lambda *_: place)
    monkeypatch.setattr(direct, "look", look)
    monkeypatch.setattr(direct, "leave_to_fsspec", lambda *_: left.append(1))
    monkeypatch.setattr(Plain, "info", lambda _, path: {"name": path, "size": 99})
    if isinstance(info, type):
        with pytest.raises(info):
            ask_info(filesystem, "/a", first_nbytes)
    else:
        wanted = {"name": "/a", "size": 99} if info is None else {"name": "/a", "type": "file", **info}
        assert ask_info(filesystem, "/a", first_nbytes) == wanted
    assert left == [1] * is_left
    place.is_web = False
    assert ask_info(filesystem, "/a", first_nbytes) == {"name": "/a", "size": 99}


@pytest.mark.parametrize("error", [AttributeError, ImportError, KeyError])
@pytest.mark.parametrize("client", ["web", "hub"])
def test_a_client_of_another_release_is_asked_as_any_other(
    monkeypatch: pytest.MonkeyPatch, client: str, error: type[Exception]
) -> None:
    def fail(*_: Any) -> Any:
        raise error("no such name")

    async def fail_later(*arguments: Any) -> Any:
        return fail(*arguments)

    name = requests._HUB if client == "hub" else "some.Client"
    monkeypatch.setattr(requests, "class_name", lambda _: name)
    monkeypatch.setattr(hf, "get", fail)
    monkeypatch.setitem(requests._CLIENTS, "some.Client", fail_later)
    wanted = ranges()
    answers = request(Asynchronous(), "/a", wanted)
    is_left = error is AttributeError or (error is ImportError and client == "hub")
    assert [type(answer) for answer in answers] == [type(None) if is_left else error] * 3
    assert not is_left or came(wanted) == WANTED


# ---------------------------------------------------------------------------------------------------------------------
# Clients that tell the version


def in_loop(get: Any, filesystem: Any, wanted: ByteRange, path: str = "b/k") -> Any:
    return asyncio.run(get(filesystem, path, wanted))


class Session:
    """Answers one request for a page."""

    def __init__(self, status: int, body: bytes, **headers: str) -> None:
        self.status, self.reason, self.body = status, "said so", body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.asked: list[Any] = []
        self.taken = 0

    @asynccontextmanager
    async def get(self, url: str, **options: Any) -> AsyncIterator[Any]:
        self.asked.append((url, options))
        yield SimpleNamespace(**vars(self), raise_for_status=self.refuse, content=SimpleNamespace(iter_any=self.blocks))

    def refuse(self) -> None:
        if self.status >= 400:
            raise OSError(f"{self.status}")

    async def blocks(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self.body), 4):
            self.taken += 1
            yield self.body[start : start + 4]


MARKS = {"ETag": "e", "Last-Modified": "m"}
RANGE = {"Content_Range": "bytes 20-24/100"}


@pytest.mark.parametrize(
    ("session", "result"),
    [
        (Session(206, FILE[20:25], **RANGE), {"size": 100}),
        (
            Session(206, FILE[20:25], **RANGE, ETag="e", Last_Modified="m"),
            {"size": 100, "ETag": "e", "Last-Modified": "m"},
        ),
        (Session(200, FILE, Content_Length="100"), {"size": 100}),
        (Session(200, FILE, Content_Type="text/html"), {"size": 100, "mimetype": "text/html"}),
        (Session(416, b"no", Content_Range="bytes */7"), {"size": 7}),
        (Session(206, FILE[20:26], **RANGE), ReadError),
        (Session(206, FILE[21:26], Content_Range="bytes 21-25/100"), ReadError),
        (Session(404, b""), FileNotFoundError),
        (Session(410, b""), FileNotFoundError),
        (Session(401, b""), PermissionError),
        (Session(403, b""), PermissionError),
        (Session(500, b""), OSError),
    ],
)
def test_a_page_of_a_web_server_tells_its_version(session: Session, result: Any) -> None:
    async def set_session() -> Session:
        return session

    def encode_url(path: str) -> str:
        return f"encoded {path}"

    settings: list[tuple[dict[str, Any], dict[str, Any], Any]] = [
        ({"timeout": 1, "headers": {"a": "b"}}, {}, 1),
        ({}, {"timeout": 2}, None),
        ({}, {}, http.stall_timeout()),
    ]
    for kwargs, client, timeout in settings:
        session.taken, session.asked = 0, []
        (wanted,) = ranges([(20, 25)])
        filesystem = SimpleNamespace(
            set_session=set_session, encode_url=encode_url, kwargs=kwargs, client_kwargs=client
        )
        if isinstance(result, dict):
            assert in_loop(http.get, filesystem, wanted) == result
            assert came([wanted]) == [FILE[20:25] if session.status != 416 else bytes(5)]
            is_counted = session.status == 200 and "Content-Length" not in session.headers
            taken = 25 if is_counted else {200: 7, 206: 2, 416: 0}[session.status]
            assert session.taken == taken, "no more than is needed"
        else:
            with pytest.raises(result) as caught:
                in_loop(http.get, filesystem, wanted)
            assert not isinstance(caught.value, PermissionError) or str(caught.value) == f"{session.status} said so"
        headers = {**kwargs.get("headers", {}), "Range": "bytes=20-24", "Accept-Encoding": "identity"}
        options = {"headers": headers, **({} if timeout is None else {"timeout": timeout})}
        assert session.asked == [("encoded b/k", options)]
    stall = http.stall_timeout()
    assert (stall.total, stall.sock_connect, stall.sock_read) == (None, STALL_SECONDS, STALL_SECONDS)


@pytest.mark.parametrize("timeout", [None, 3])
@pytest.mark.parametrize("kind", ["plain", "extended", "zonal"])
def test_google_is_asked_with_the_parameters_of_its_client(timeout: int | None, kind: str) -> None:
    class Client(SimpleNamespace):
        async def _set_session(self) -> None:
            self.session = Session(206, FILE[20:25], Content_Range="bytes 20-24/100", ETag="e")

        def _get_params(self, given: Mapping[str, str]) -> dict[str, str]:
            return {**given, "project": "p"}

        def _get_headers(self, given: object) -> dict[str, str]:
            return {"authorization": f"{given}"}

        def _format_path(self, url: str, parts: object) -> str:
            return f"{url}{parts}"

        def url(self, path: str) -> str:
            return f"http://{path}"

        def split_path(self, path: str) -> list[str]:
            return path.split("/")

        async def _is_zonal_bucket(self, bucket: str) -> bool:
            assert bucket == "b"
            return kind == "zonal"

        async def _cat_file(self, path: str, start: int, end: int) -> bytes:
            return FILE[start:end]

    client = Client(requests_timeout=timeout)
    (wanted,) = ranges([(20, 25)])
    told = in_loop(gcs.get if kind == "plain" else gcs.get_of_any_bucket, client, wanted)
    assert came([wanted]) == [FILE[20:25]]
    assert told == (None if kind == "zonal" else {"size": 100, "ETag": "e"})
    if kind != "zonal":
        headers = {"authorization": "None", "Range": "bytes=20-24", "Accept-Encoding": "identity"}
        options = {"params": {"project": "p"}, "timeout": timeout or http.stall_timeout(), "headers": headers}
        assert client.session.asked == [("http://b/k()", options)]


@pytest.mark.parametrize("version", [None, "v"])
@pytest.mark.parametrize("is_whole", [False, True])
def test_s3_is_asked_with_the_options_of_its_client(version: str | None, is_whole: bool) -> None:
    asked, closed = list[Any](), list[bool]()

    class Body:
        rest = FILE if is_whole else FILE[20:25]

        async def read(self, nbytes: int) -> bytes:
            assert nbytes >= 2**16
            data, self.rest = self.rest[:7], self.rest[7:]
            return data

        def close(self) -> None:
            closed.append(True)

    body = Body()

    class Client(SimpleNamespace):
        async def _call_s3(self, name: str, **options: Any) -> dict[str, Any]:
            asked.append((name, options))
            told = {"ContentLength": 100} if is_whole else {"ContentRange": "bytes 20-24/100", "ContentLength": 5}
            metadata = {"HTTPStatusCode": 200 if is_whole else 206}
            return {
                **told,
                "ResponseMetadata": metadata,
                "Body": body,
                "ContentType": "c",
                "ETag": "e",
                "LastModified": "m",
            }

        def split_path(self, path: str) -> tuple[str, str, str | None]:
            return (*path.split("/"), version)  # type: ignore[return-value]

    (wanted,) = ranges([(20, 25)])
    told = in_loop(s3.get, Client(req_kw={"RequestPayer": "x"}), wanted)
    assert told == {"size": 100, "mimetype": "c", "ETag": "e", "LastModified": "m"}
    assert came([wanted]) == [FILE[20:25]]
    options = {"Bucket": "b", "Key": "k", "Range": "bytes=20-24", "RequestPayer": "x"}
    assert asked == [("get_object", options | ({"VersionId": version} if version else {}))]
    assert closed == [True]
    assert len(body.rest) == (100 - 28 if is_whole else 0), "no more than is needed"


@pytest.mark.parametrize("error", [None, 404, 500, "odd"])
def test_azure_is_asked_in_one_part_without_retries(error: Any) -> None:
    asked = list[Any]()
    shared = SimpleNamespace(max_single_get_size=2**25)

    class Blob:
        _config = shared

        async def __aenter__(self) -> Blob:
            return self

        async def __aexit__(self, *_: object) -> None:
            asked.append("closed")

        async def download_blob(self, **options: Any) -> Any:
            asked.append((self._config.max_single_get_size, options))
            if error is not None:
                raise type("AzureError", (OSError,), {"status_code": error} if error != "odd" else {})("no")

            async def readall() -> bytes:
                return FILE[20:25]

            told = SimpleNamespace(content_range="bytes 20-24/100", etag="e", last_modified="m")
            return SimpleNamespace(readall=readall, properties=told)

    def get_blob_client(container: str, blob: str) -> Blob:
        asked.append((container, blob))
        return Blob()

    client = SimpleNamespace(
        split_path=lambda path: (*path.split("/"), "v"),
        _strip_protocol=lambda path: path,
        _timeout_kwargs={"connection_timeout": 4},
        service_client=SimpleNamespace(get_blob_client=get_blob_client),
    )
    (wanted,) = ranges([(20, 25)])
    if error is None:
        assert in_loop(azure.get, client, wanted) == {"size": 100, "etag": "e", "last_modified": "m"}
        assert came([wanted]) == [FILE[20:25]]
    else:
        with pytest.raises(
            FileNotFoundError if error == 404 else OSError, match="b/k" if error == 404 else "no"
        ) as caught:
            in_loop(azure.get, client, wanted)
        assert isinstance(caught.value, FileNotFoundError) is (error == 404)
    options = {"offset": 20, "length": 5, "version_id": "v", "max_concurrency": 1}
    options |= {"read_timeout": int(STALL_SECONDS), "connection_timeout": 4, "retry_total": 0}
    assert asked[0] == ("b", "k")
    assert asked[1][0] > 2**32
    assert asked[1:] == [(asked[1][0], options), "closed"]
    assert shared.max_single_get_size == 2**25, "it is the program's"
