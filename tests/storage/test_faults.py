"""What goes wrong between a reader and a remote storage, and what the reader does about it.

Every test reads through a proxy that fails on purpose (see ``faults``), over HTTP and over S3: what may pass is tried
again, what may not is an error that says so, and what comes out is exactly what was stored.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import FileChangedError, ReadError
from dask_embedding_reader.storage import retries
from dask_embedding_reader.storage.direct import read as direct
from tests.support import servers
from tests.support.faults import FAULTS, PAGES, Asked, Proxy, faulty
from tests.support.stores import Meeting

FILES, FILE_ROWS, DIMENSION = 3, 40, 16
ROWS = np.random.default_rng(0).standard_normal((FILES * FILE_ROWS, DIMENSION)).astype(np.float32)
IDS = np.arange(len(ROWS))
#: So long a client of these tests waits for a byte: on a busy machine, servers took more than half a second for one.
PATIENCE = 1.5


def rows_of(k: int) -> Any:
    return ROWS[k * FILE_ROWS : (k + 1) * FILE_ROWS]


@dataclass
class Place:
    """Files behind a proxy."""

    proxy: Proxy
    folder: Path
    #: The URLs of files, given their names.
    url: Callable[[str], str]
    #: Stores a file in place of another one.
    put: Callable[[str, bytes], None]
    options: dict[str, Any]
    replaced: bool = False

    def replace(self, content: bytes) -> None:
        """Put something else in the place of the second npy file, for the rest of a test."""
        self.replaced = True
        self.put("1.npy", content)

    def open(self, file_format: str = "npy", **kwargs: Any) -> EmbeddingReader:
        if file_format == "parquet":
            kwargs = {"meta_columns": ["id"], **kwargs}
        urls = [self.url(f"{k}.{file_format}") for k in range(FILES)]
        reader = EmbeddingReader(urls, file_format, storage_options=self.options, **kwargs)
        self.proxy.requests.clear()
        return reader


def http_patience(seconds: float) -> dict[str, Any]:
    import aiohttp

    return {"timeout": aiohttp.ClientTimeout(sock_read=seconds)}


def s3_patience(seconds: float) -> dict[str, Any]:
    return {"config_kwargs": {"read_timeout": seconds}}


@contextlib.contextmanager
def http_place(folder: Path) -> Iterator[Place]:
    def put(name: str, content: bytes) -> None:
        before = os.stat(folder / name).st_mtime
        (folder / name).write_bytes(content)
        os.utime(folder / name, (before + 60, before + 60))  # HTTP tells whole seconds

    with servers.http_files(folder) as server, faulty(server.url) as proxy:
        yield Place(proxy, folder, lambda name: f"{proxy.url}/{name}", put, http_patience(PATIENCE))


@contextlib.contextmanager
def s3_place(folder: Path) -> Iterator[Place]:
    servers.require(servers.s3_available, "moto")
    with servers.s3() as server, faulty(server.endpoint) as proxy:
        server.put_folder(folder, "emb")
        options = {
            **server.storage_options,
            "client_kwargs": {"endpoint_url": proxy.url, "region_name": "us-east-1"},
            **s3_patience(PATIENCE),
        }
        url = f"s3://{server.bucket}/emb"
        yield Place(
            proxy, folder, lambda name: f"{url}/{name}", lambda name, c: void(server.put(f"emb/{name}", c)), options
        )


def void(value: object) -> None:
    """Drop a value."""


@pytest.fixture(scope="module", params=["http", "s3"])
def running_place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("faults")
    for k in range(FILES):
        np.save(folder / f"{k}.npy", rows_of(k))
        table = {
            "id": pa.array(IDS[k * FILE_ROWS : (k + 1) * FILE_ROWS]),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(rows_of(k).reshape(-1)), DIMENSION),
        }
        pq.write_table(pa.table(table), folder / f"{k}.parquet", row_group_size=10)
    with (http_place if request.param == "http" else s3_place)(folder) as place:
        yield place


@pytest.fixture
def place(running_place: Place) -> Iterator[Place]:
    """Three files of each format, over HTTP and over S3, on a server that is healthy at first."""
    running_place.proxy.behave()
    # Else the threads of a test that ends in an error still ask the server during the next one.
    with dask.config.set(scheduler="synchronous"):
        yield running_place
    if running_place.replaced:
        running_place.proxy.behave()
        running_place.put("1.npy", npy(rows_of(1)))


def npy(rows: Any) -> bytes:
    with io.BytesIO() as stream:
        np.save(stream, rows)
        return stream.getvalue()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture(params=["direct", "fsspec"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads: sockets of our own, as usual, or fsspec's clients."""
    if request.param == "fsspec":
        monkeypatch.setattr(direct, "find_place", lambda filesystem, path: None)


def waiting(place: Place, seconds: float) -> Place:
    """The same place, for a client that waits so long for a byte."""
    patience = http_patience if place.url("").startswith("http") else s3_patience
    return replace(place, options={**place.options, **patience(seconds)})


def read_all(reader: EmbeddingReader) -> None:
    """Read a collection in every way; each must give exactly what was stored."""
    np.testing.assert_array_equal(reader.to_dask_array(max_piece_size=5).compute(scheduler="threads"), ROWS)
    batches = list(reader(batch_size=11, max_piece_size=5, show_progress=False))
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in batches]), ROWS)
    frame = pd.concat([frame for _, frame in batches], ignore_index=True)
    np.testing.assert_array_equal(frame["i"], IDS)
    if "id" in frame:
        np.testing.assert_array_equal(frame["id"], IDS)
        np.testing.assert_array_equal(reader.to_dask_dataframe(max_piece_size=5).compute()["id"], IDS)


# --------------------------------------------------------------------------------------------------------------------
# What passes


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_request_that_fails_once_is_made_again(place: Place, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    reader = place.open()
    place.proxy.faults = [fault]
    with caplog.at_level(logging.WARNING, "dask_embedding_reader"):
        np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
    assert [asked.fault for asked in place.proxy.failed] == [fault]
    assert len(place.proxy.requests) == FILES + 1
    for message in caplog.messages:  # a connection that was reset before the answer is opened again by aiohttp itself
        assert re.search(r"\d\.npy, bytes [\d,]+ to [\d,]+: attempt 1 of 5 failed \(.+\); again in [\d.]+ s", message)
    assert len(caplog.messages) == 1 or fault == "reset"


@pytest.mark.parametrize("fault", ["503", "reset halfway", "shorter"])
def test_opening_survives_a_failed_request(place: Place, fault: str) -> None:
    place.proxy.faults = [fault, fault]
    assert place.open().count == len(ROWS)
    assert place.proxy.faults == []


def test_column_chunks_are_fetched_again_one_by_one(place: Place) -> None:
    reader = place.open("parquet")
    place.proxy.faults = ["truncated", "500", "reset"]
    read_all(reader)
    assert place.proxy.faults == []


@pytest.mark.parametrize(
    ("client", "file_format"),
    [
        ("direct", "npy"),
        ("fsspec", "parquet"),
        pytest.param("direct", "parquet", marks=pytest.mark.slow),
        pytest.param("fsspec", "npy", marks=pytest.mark.slow),
    ],
    indirect=["client"],
)
def test_a_full_read_is_right_where_one_request_in_twenty_fails(place: Place, client: None, file_format: str) -> None:
    place = waiting(place, 1.0)  # what comes too late is asked for again, too
    place.proxy.share = 0.05
    failed: set[str | None] = set()
    passes = 0
    while failed != set(FAULTS):
        read_all(place.open(file_format))
        failed |= {asked.fault for asked in place.proxy.failed}
        passes += 1
        assert passes < 20


@pytest.mark.usefixtures("client")
def test_a_server_is_left_alone_as_long_as_it_asks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("dask_embedding_reader._common.threads.time.sleep", pauses.append)
    reader = place.open()
    place.proxy.faults = ["busy", "busy"]
    np.testing.assert_array_equal(reader.to_dask_array(0, 5).compute(), ROWS[:5])
    assert pauses == [7.0, 7.0]


# --------------------------------------------------------------------------------------------------------------------
# What does not pass


async def get_plain_client(**options: Any) -> Any:
    """A client that asks once. aiohttp asks again by itself, once and at once, where a connection was closed on it."""
    from fsspec.implementations.http import get_client

    session = await get_client(**options)
    session._retry_connection = False
    return session


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize(
    ("fault", "cause"), [("503", "Service Unavailable"), ("stalled", "imeout"), ("shorter", "bytes came where")]
)
def test_a_fault_that_stays_is_an_error_with_file_rows_cause_and_attempts(
    place: Place, fault: str, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    is_http = place.url("").startswith("http")
    if fault == "stalled":  # each time: there is nothing to be patient for
        place = waiting(place, 0.4)
    options = {**place.options, "get_client": get_plain_client} if is_http else place.options
    reader = replace(place, options=options).open()
    caplog.clear()
    place.proxy.faults = [fault] * 100
    with pytest.raises(ReadError) as caught, caplog.at_level(logging.WARNING, "dask_embedding_reader"):
        reader.to_dask_array(45, 60).compute(scheduler="synchronous")
    message = str(caught.value)
    assert "rows 5 to 20" in message
    assert place.url("1.npy") in message
    assert f"failed after {retries.ATTEMPTS} attempts" in message
    assert cause in message
    assert len(caplog.messages) == retries.ATTEMPTS - 1
    # As often as it says: no client tries more behind the scenes. The client of S3 stands on aiohttp, which opens a
    # connection again that was closed on it.
    most = retries.ATTEMPTS if is_http else 2 * retries.ATTEMPTS
    asked = [request.path for request in place.proxy.failed if request.path.endswith("1.npy")]
    assert retries.ATTEMPTS <= len(asked) <= most


@pytest.mark.parametrize("read", ["batches", "frame", "array"])
def test_an_error_in_a_parquet_file_names_its_rows(place: Place, read: str) -> None:
    reader = place.open("parquet")
    place.proxy.faults = ["500"] * 1000
    ways: dict[str, Callable[[], Any]] = {
        "batches": lambda: next(iter(reader(batch_size=10, parallel_pieces=1, show_progress=False))),
        "array": lambda: reader.to_dask_array(0, 20).compute(),
        "frame": lambda: reader.to_dask_dataframe(0, 20).compute(),
    }
    with pytest.raises(ReadError, match=r"rows [\d,]+ to [\d,]+.*0\.parquet.*failed after 5 attempts"):
        ways[read]()


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("page", list(PAGES))
def test_a_page_is_not_taken_for_a_file(place: Place, page: str) -> None:
    reader = place.open()
    place.proxy.faults = [page]
    np.testing.assert_array_equal(reader.to_dask_array().compute(scheduler="synchronous"), ROWS)
    assert [asked.fault for asked in place.proxy.failed] == [page]
    place.proxy.every = page
    with pytest.raises(ReadError, match=r"rows 5 to 20: .*1\.npy, bytes .* 5 attempts: a web page came \(70006\)"):
        reader.to_dask_array(45, 60).compute(scheduler="synchronous")


@pytest.mark.usefixtures("client")
def test_a_part_that_does_not_tell_its_place_is_not_taken(place: Place) -> None:
    reader = place.open()
    place.proxy.every = "no content-range"
    with pytest.raises(ReadError, match=r"rows 5 to 20: .*1\.npy, bytes .* 5 attempts: .*\(no Content-Range\)"):
        reader.to_dask_array(45, 60).compute(scheduler="synchronous")


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("refusal", ["401", "403", "404"])
def test_a_refusal_is_not_repeated(place: Place, refusal: str) -> None:
    reader = place.open()
    place.proxy.faults = [refusal] * 100
    with pytest.raises(FileChangedError if refusal == "404" else ReadError, match=r"0\.npy"):
        reader.to_dask_array(0, 5).compute()
    assert len(place.proxy.requests) == 1


# --------------------------------------------------------------------------------------------------------------------
# Versions


@pytest.mark.usefixtures("client")
def test_a_piece_costs_one_request(place: Place) -> None:
    reader = place.open()
    np.testing.assert_array_equal(reader.to_dask_array(max_piece_size=10).compute(), ROWS)
    assert len(place.proxy.requests) == len(ROWS) // 10
    assert [asked for asked in place.proxy.requests if asked.method != "GET"] == []
    assert sum(asked.nbytes for asked in place.proxy.requests) == ROWS.nbytes


@pytest.mark.usefixtures("client")
def test_a_file_that_was_replaced_is_noticed_without_another_request(place: Place) -> None:
    reader = place.open()
    place.replace(npy(-rows_of(1)))
    with pytest.raises(FileChangedError, match=r"1\.npy.*changed since it was opened.*open the reader again"):
        reader.to_dask_array(FILE_ROWS, FILE_ROWS + 5).compute()
    assert [asked.method for asked in place.proxy.requests] == ["GET"]


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("silent_about", [("etag",), ("last-modified",)])
def test_whatever_tells_of_versions_is_used(place: Place, silent_about: tuple[str, ...]) -> None:
    place.proxy.silent_about = frozenset(silent_about)
    reader = place.open()
    np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
    assert len(place.proxy.requests) == FILES
    if not reader.manifest.vectors.versions[0].kind:
        pytest.skip("this release of fsspec hides when a file was changed")
    place.replace(npy(-rows_of(1)))
    if silent_about == ("etag",) and place.url("").startswith("s3://"):
        return  # moto replaces an object within the same second, which is all that is told
    with pytest.raises(FileChangedError):
        reader.to_dask_array().compute()


@pytest.mark.usefixtures("client")
def test_answers_that_do_not_tell_the_version_are_checked(place: Place) -> None:
    reader = place.open()
    place.proxy.silent_about = frozenset({"etag", "last-modified"})
    place.proxy.before = lambda asked: setattr(
        place.proxy, "silent_about", frozenset({"etag", "last-modified"} if asked.range else ())
    )
    np.testing.assert_array_equal(reader.to_dask_array(max_piece_size=FILE_ROWS).compute(scheduler="sync"), ROWS)
    place.replace(npy(-rows_of(1)))
    with pytest.raises(FileChangedError):
        reader.to_dask_array(FILE_ROWS, FILE_ROWS + 5).compute()


def test_a_file_that_became_longer_or_shorter_is_noticed(place: Place) -> None:
    reader = place.open()
    place.proxy.silent_about = frozenset({"etag", "last-modified"})
    whole = (place.folder / "1.npy").read_bytes()
    for content in (whole + bytes(64), whole[:-64], whole[:150]):
        place.replace(content)
        with pytest.raises(FileChangedError, match=r"1\.npy"):
            reader.to_dask_array(2 * FILE_ROWS - 5, 2 * FILE_ROWS).compute()


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("way", ["array", "batches"])
def test_a_file_that_is_replaced_while_it_is_read_never_comes_out_mixed(place: Place, way: str) -> None:
    reader = place.open()
    seen: list[Asked] = []

    def replace_later(asked: Asked) -> None:
        seen.append(asked)
        if len(seen) == 6:
            place.replace(npy(-rows_of(1)))

    place.proxy.before = replace_later

    def read() -> None:
        if way == "array":
            reader.to_dask_array(max_piece_size=10).compute(scheduler="synchronous")
        for rows, frame in reader(batch_size=8, max_piece_size=10, parallel_pieces=1, show_progress=False):
            np.testing.assert_array_equal(rows, ROWS[frame["i"]])

    with pytest.raises(FileChangedError, match=r"1\.npy"):
        read()


# --------------------------------------------------------------------------------------------------------------------
# Servers that are no faults, only odd


@pytest.mark.usefixtures("client")
def test_a_server_without_ranges_gives_the_right_rows(place: Place) -> None:
    place.proxy.ranges = False
    read_all(place.open())
    read_all(place.open("parquet"))


def test_files_of_a_list_are_looked_up_at_once(place: Place) -> None:
    meeting, seen = Meeting(FILES), Counter[str]()

    def look_up(asked: Asked) -> None:  # by HEAD, or with the first bytes
        seen[asked.path] += 1
        if seen[asked.path] == 1:
            meeting.arrive(asked)  # type: ignore[arg-type] # it only counts

    place.proxy.before = look_up
    # Longer than they wait for each other: a client that gave up would ask for the next one meanwhile.
    assert waiting(place, 60).open().count == len(ROWS)
    assert meeting.peak == FILES
