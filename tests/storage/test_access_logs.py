"""What real servers are asked for, as the access log of nginx tells it: the requests, and the bytes of each.

``test_exact_reads`` counts on a store of its own, in every detail; here the clients of the real stores have their say.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import EmbeddingReader
from tests.support import clouds, servers
from tests.support.servers import Logged

FILES, FILE_ROWS, DIMENSION = 3, 1_000, 64
ROW_NBYTES, HEADER_NBYTES = DIMENSION * 4, 128
ROWS: npt.NDArray[np.float32] = (
    np.random.default_rng(0).standard_normal((FILES * FILE_ROWS, DIMENSION)).astype(np.float32)
)


def write_files(folder: Path) -> None:
    """The same rows in npy and in parquet, with columns of noise that nobody asks for around the vectors."""
    folder.mkdir()
    for k in range(FILES):
        rows = ROWS[k * FILE_ROWS : (k + 1) * FILE_ROWS]
        np.save(folder / f"{k}.npy", rows)
        noise = pa.array([np.random.default_rng([k, n]).bytes(200) for n in range(FILE_ROWS)])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), DIMENSION)
        ids = pa.array(np.arange(k * FILE_ROWS, (k + 1) * FILE_ROWS))
        table = pa.table({"before": noise, "embedding": vectors, "between": noise, "id": ids, "after": noise})
        pq.write_table(table, folder / f"{k}.parquet", row_group_size=500, use_dictionary=False, compression="none")


@dataclass(frozen=True)
class Counted:
    """A store behind nginx, which counts."""

    url: str
    options: dict[str, Any]
    counting: Callable[[], AbstractContextManager[list[Logged]]]
    #: Whether a listing tells the size of each file.
    tells_sizes: bool = True
    #: Requests of the client that asks for a single file: Google's looks for a folder of that name at the same time.
    requests_to_ask: int = 1

    def open(self, file_format: str = "npy", **arguments: Any) -> EmbeddingReader:
        """The collection."""
        return EmbeddingReader(self.url, file_format, storage_options=self.options, **arguments)


def _before(server: Any) -> Iterator[tuple[Any, servers.Nginx]]:
    """The same service, reached by nginx."""
    address = urllib.parse.urlsplit(server.endpoint)
    with servers.nginx_before(f"{address.scheme}://{address.netloc}") as nginx:
        yield replace(server, endpoint=f"{nginx.url}{address.path}"), nginx


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, on this machine."""
    path = tmp_path_factory.mktemp("counted") / "emb"
    write_files(path)
    return path


@pytest.fixture(scope="module", params=["http", "s3", "gs", "az"])
def store(request: pytest.FixtureRequest, folder: Path) -> Iterator[Counted]:
    """Each kind of store in turn."""
    servers.require(servers.nginx_available, "nginx")
    if request.param == "http":
        with servers.nginx(folder.parent) as nginx:
            yield Counted(f"{nginx.url}/emb", {}, nginx.counting, tells_sizes=False)
        return
    server = request.getfixturevalue({"gs": "gcs", "az": "azure"}.get(request.param, request.param))
    url = server.put_folder(folder, "counted/emb")
    for reached, nginx in _before(server):
        questions = 3 if request.param == "gs" else 1
        yield Counted(url, reached.storage_options, nginx.counting, requests_to_ask=questions)


def files(requests: list[Logged]) -> list[Logged]:
    """The requests about files; the others are about folders."""
    return [r for r in requests if re.search(r"\.(npy|parquet)$", r.path.partition("?")[0])]


def listings(requests: list[Logged]) -> list[Logged]:
    """The answered requests for names; not those that a web server sends on to the folder's address with a slash."""
    return [r for r in requests if r.method == "GET" and r.status == 200 and r not in files(requests)]


def questions(requests: list[Logged]) -> list[Logged]:
    """The requests for what a file is: HEAD, or Google's for the metadata of an object."""
    return [r for r in files(requests) if r.method == "HEAD" or re.search(r"/o/(?!.*alt=media)", r.path)]


def reads(requests: list[Logged]) -> list[Logged]:
    """The requests for the bytes of files."""
    return [r for r in files(requests) if r not in questions(requests)]


def span(request: Logged) -> tuple[int, int]:
    """The bytes ``[start, stop)`` that were asked for."""
    start, stop = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range).groups()  # type: ignore[union-attr]
    return int(start), int(stop) + 1


def file_of(request: Logged) -> str:
    """The name of the file, without its folders."""
    return urllib.parse.unquote(request.path).partition("?")[0].rpartition("/")[2]


def chunks(folder: Path, column: str) -> list[tuple[str, int, int]]:
    """Where the chunks of a column lie: file, start, stop."""
    found = []
    for path in sorted(folder.glob("*.parquet")):
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            for k in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(k)
                if chunk.path_in_schema.split(".")[0] == column:
                    start = chunk.data_page_offset
                    found.append((path.name, start, start + chunk.total_compressed_size))
    return found


# --------------------------------------------------------------------------------------------------------------------
# Opening


def test_opening_is_one_listing_and_one_small_read_a_file(store: Counted) -> None:
    with store.counting() as requests:
        assert store.open().count == len(ROWS)
    assert len(listings(requests)) == 1
    assert sorted(map(file_of, reads(requests))) == ["0.npy", "1.npy", "2.npy"]
    assert all(span(r)[0] == 0 and r.nbytes <= 4096 for r in reads(requests))
    assert not questions(requests)  # where the listing tells no sizes, the read does


def test_opening_parquet_is_one_listing_and_one_footer_a_file(store: Counted) -> None:
    with store.counting() as requests:
        assert store.open("parquet", meta_columns=["id"]).count == len(ROWS)
    assert len(listings(requests)) == 1
    assert sorted(map(file_of, reads(requests))) == ["0.parquet", "1.parquet", "2.parquet"]
    assert all(r.nbytes <= 128 * 1024 for r in reads(requests))
    assert len(questions(requests)) == (0 if store.tells_sizes else FILES)


def test_a_list_of_addresses_is_one_question_and_one_small_read_a_file(store: Counted) -> None:
    urls = [f"{store.url}/{k}.npy" for k in range(FILES)]
    with store.counting() as requests:
        EmbeddingReader(urls, storage_options=store.options)
    assert sorted(map(file_of, reads(requests))) == ["0.npy", "1.npy", "2.npy"]
    assert len(requests) <= (1 + store.requests_to_ask) * FILES


@pytest.mark.parametrize("name", ["s3", "gcs", "azure"])
def test_a_tree_of_folders_is_one_listing(name: str, folder: Path, request: pytest.FixtureRequest) -> None:
    servers.require(servers.nginx_available, "nginx")
    server = request.getfixturevalue(name)
    content = (folder / "0.npy").read_bytes()
    for k in range(8):
        server.put(f"tree/{k % 4}/{k}/x.npy", content)
    for reached, nginx in _before(server):
        with nginx.counting() as requests:
            assert EmbeddingReader(f"{server.root}/tree", storage_options=reached.storage_options).nb_files == 8
    assert len(listings(requests)) == 1


def test_a_listing_of_many_names_is_one_request_a_page(tmp_path: Path) -> None:
    servers.require(servers.nginx_available, "nginx")
    servers.require(clouds.rclone_available, "rclone")
    emb = tmp_path / "bucket" / "emb"
    emb.mkdir(parents=True)
    for k in range(2_500):
        (emb / f"{k:04}.txt").touch()
    np.save(emb / "z.npy", ROWS)
    with clouds.signed_s3(tmp_path) as options, servers.nginx_before(options["client_kwargs"]["endpoint_url"]) as nginx:
        options["client_kwargs"]["endpoint_url"] = nginx.url
        with nginx.counting() as requests:
            assert EmbeddingReader("s3://bucket/emb", storage_options=options).count == len(ROWS)
    assert len(listings(requests)) == 3
    assert [file_of(r) for r in requests[3:]] == ["z.npy"]


# --------------------------------------------------------------------------------------------------------------------
# Reading


def read_spans(requests: list[Logged]) -> list[tuple[str, int, int]]:
    """File, start and stop of what was read, in the order of the files."""
    return sorted((file_of(r), *span(r)) for r in reads(requests))


def piece_spans(piece_rows: int) -> list[tuple[str, int, int]]:
    """What the pieces of the npy files are, in bytes."""
    return [
        (
            f"{k}.npy",
            HEADER_NBYTES + start * ROW_NBYTES,
            HEADER_NBYTES + min(start + piece_rows, FILE_ROWS) * ROW_NBYTES,
        )
        for k in range(FILES)
        for start in range(0, FILE_ROWS, piece_rows)
    ]


def test_a_piece_is_one_request_for_exactly_its_bytes(store: Counted) -> None:
    x = store.open().to_dask_array(max_piece_size=250)
    with store.counting() as requests:
        np.testing.assert_array_equal(x.compute(), ROWS)
    assert read_spans(requests) == sorted(piece_spans(250))
    assert sum(r.nbytes for r in reads(requests)) == ROWS.nbytes


def test_a_piece_is_one_request_and_no_other(store: Counted) -> None:
    reader = store.open()
    with store.counting() as requests:
        reader.to_dask_array().compute()
    assert len(requests) == FILES
    assert {r.method for r in requests} == {"GET"}


def test_ten_rows_are_ten_rows(store: Counted) -> None:
    x = store.open().to_dask_array()
    with store.counting() as requests:
        np.testing.assert_array_equal(x[1_500:1_510].compute(), ROWS[1_500:1_510])
    start = HEADER_NBYTES + 500 * ROW_NBYTES
    assert read_spans(requests) == [("1.npy", start, start + 10 * ROW_NBYTES)]


@pytest.mark.parametrize("batch_size", [256, 999, 2_500])
def test_the_size_of_batches_does_not_multiply_requests(store: Counted, batch_size: int) -> None:
    reader = store.open()
    with store.counting() as requests:
        batches = [rows for rows, _ in reader(batch_size, show_progress=False)]
    np.testing.assert_array_equal(np.concatenate(batches), ROWS)
    assert read_spans(requests) == piece_spans(FILE_ROWS)


@pytest.mark.parametrize("columns", [[], ["id"]])
def test_parquet_is_its_footer_and_the_chunks_that_are_asked_for(
    store: Counted, folder: Path, columns: list[str]
) -> None:
    reader = store.open("parquet", meta_columns=columns or None)
    with store.counting() as requests:
        batches = list(reader(256, show_progress=False))
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in batches]), ROWS)
    wanted = [chunk for column in ("embedding", *columns) for chunk in chunks(folder, column)]
    footers = {path.name: path.stat().st_size for path in folder.glob("*.parquet")}
    spans = read_spans(requests)
    # Footers end at the end of the file; chunks are read alone, or together with what lies right beside them.
    data = [(name, start, stop) for name, start, stop in spans if stop != footers[name]]
    assert sum(stop - start for _, start, stop in data) == sum(stop - start for _, start, stop in wanted)
    for name, start, stop in wanted:
        assert any(n == name and a <= start and stop <= b for n, a, b in data)
    assert len(data) <= len(wanted)


def test_one_column_of_a_frame_reads_no_vectors(store: Counted, folder: Path) -> None:
    frame = store.open("parquet", meta_columns=["id"]).to_dask_dataframe()
    with store.counting() as requests:
        assert frame["id"].sum().compute() == sum(range(len(ROWS)))
    vectors = chunks(folder, "embedding")
    for name, start, stop in read_spans(requests):
        assert not any(n == name and a < stop and start < b for n, a, b in vectors)


def test_a_server_without_ranges_is_asked_once_a_piece(folder: Path) -> None:
    servers.require(servers.nginx_available, "nginx")
    with servers.nginx(folder, listing=False, ranges=False) as nginx:
        reader = EmbeddingReader([f"{nginx.url}/{k}.npy" for k in range(FILES)])
        with nginx.counting() as requests:
            np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
    # Each answer is the whole file, of which the piece is taken.
    assert sorted(map(file_of, reads(requests))) == ["0.npy", "1.npy", "2.npy"]
    assert {r.status for r in reads(requests)} == {200}
