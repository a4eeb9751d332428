"""Storages that only one thread may use at a time: FTP and SFTP, by real servers, and caches of whole files."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paramiko
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.core import url_to_fs

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader._common.threads import stoppable_pool
from dask_embedding_reader.errors import FileChangedError, ReadError
from dask_embedding_reader.storage import retries
from dask_embedding_reader.storage.connections import exclusive
from dask_embedding_reader.storage.read import read_range
from tests.support import servers

ROWS = np.random.default_rng(0).standard_normal((120, 16)).astype(np.float32)
USER, PASSWORD = servers.FTP_USER, servers.FTP_PASSWORD


@dataclass
class Place:
    """A folder behind a server."""

    url: str
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    #: Sockets of clients, which a test may cut.
    clients: list[socket.socket] = field(default_factory=list)

    def open(self, file_format: str = "npy") -> EmbeddingReader:
        meta_columns = "id" if file_format == "parquet" else None
        return EmbeddingReader(self.url, file_format, meta_columns=meta_columns, storage_options=self.options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "emb" / "sub").mkdir(parents=True)
    for k, name in enumerate(("0", "1", "sub/2")):
        rows = ROWS[k * 40 : (k + 1) * 40]
        np.save(tmp_path / "emb" / f"{name}.npy", rows)
        table = {
            "id": pa.array(np.arange(k * 40, (k + 1) * 40)),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), 16),
        }
        pq.write_table(pa.table(table), tmp_path / "emb" / f"{name}.parquet", row_group_size=10)
    return tmp_path


@pytest.fixture
def ftp(folder: Path) -> Iterator[Place]:
    with servers.ftp_files(folder) as server:
        yield Place(f"{server.url}/emb", folder, clients=server.clients)


@pytest.fixture
def sftp(folder: Path) -> Iterator[Place]:
    class Door(paramiko.ServerInterface):  # type: ignore[misc]
        def check_auth_password(self, username: str, password: str) -> Any:
            right = (username, password) == (USER, PASSWORD)
            return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED

        def check_channel_request(self, kind: str, chanid: int) -> Any:
            return paramiko.OPEN_SUCCEEDED

    class Files(paramiko.SFTPServerInterface):  # type: ignore[misc]
        def list_folder(self, path: str) -> Any:
            return [
                paramiko.SFTPAttributes.from_stat(entry.stat(), entry.name) for entry in (folder / path[1:]).iterdir()
            ]

        def stat(self, path: str) -> Any:
            found = folder / path[1:]
            return paramiko.SFTPAttributes.from_stat(found.stat()) if found.exists() else paramiko.SFTP_NO_SUCH_FILE

        lstat = stat

        def open(self, path: str, flags: int, attr: Any) -> Any:
            handle = paramiko.SFTPHandle(flags)
            handle.filename = path
            handle.readfile = (folder / path[1:]).open("rb")
            handle.stat = lambda: self.stat(path)
            return handle

    key = paramiko.RSAKey.generate(2048)
    transports: list[Any] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(client)
            transport.add_server_key(key)
            transport.set_subsystem_handler("sftp", paramiko.SFTPServer, Files)
            transport.start_server(server=Door())
            transports.append(transport)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    options = {"username": USER, "password": PASSWORD, "look_for_keys": False, "allow_agent": False}
    try:
        yield Place(f"sftp://127.0.0.1:{listener.getsockname()[1]}/emb", folder, options)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        for transport in transports:
            transport.close()


@pytest.fixture(params=["ftp", "sftp"])
def place(request: pytest.FixtureRequest) -> Place:
    made: Place = request.getfixturevalue(request.param)
    return made


def read(place: Place, file_format: str) -> None:
    """Read a collection with many threads at once, in every way."""
    reader = place.open(file_format)
    x = reader.to_dask_array(max_piece_size=7)
    np.testing.assert_array_equal(x.compute(scheduler="threads", num_workers=8), ROWS)
    batches = list(reader(batch_size=11, max_piece_size=5, parallel_pieces=8, show_progress=False))
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in batches]), ROWS)
    if file_format == "parquet":
        ids = reader.to_dask_dataframe(max_piece_size=7).compute(scheduler="threads", num_workers=8)["id"]
        np.testing.assert_array_equal(ids, np.arange(len(ROWS)))


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_many_threads_read_the_right_rows_over_one_connection(place: Place, file_format: str) -> None:
    read(place, file_format)


def test_those_who_wait_for_the_connection_do_not_ask_when_nobody_waits_any_more(place: Place) -> None:
    file = place.open().manifest.vectors.header(0).file
    stopped = threading.Event()
    with exclusive(file.store.filesystem):
        asked = [stoppable_pool(4, stopped).submit(read_range, file, 0, 10) for _ in range(4)]
        stopped.set()
    for each in asked:
        with pytest.raises(ReadError, match="nobody waits"):
            each.result(60)


def test_opening_logs_in_once_for_each_source(ftp: Place) -> None:
    assert ftp.open().nb_files == 3
    assert len(ftp.clients) == 1
    ftp.clients.clear()
    urls = [f"{ftp.url}/{name}.npy" for name in ("0", "1", "sub/2")]
    assert EmbeddingReader(urls).nb_files == 3
    assert len(ftp.clients) <= len(urls)


def test_a_connection_that_the_server_has_closed_is_opened_again(
    ftp: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)
    reader = ftp.open()
    for client in ftp.clients:  # as servers do with clients that were idle for some minutes
        with suppress(OSError):  # some are closed already
            client.shutdown(socket.SHUT_RDWR)
    with caplog.at_level(logging.WARNING, "dask_embedding_reader"):
        np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
    assert any("attempt 1 of 5 failed" in message for message in caplog.messages)
    assert PASSWORD not in caplog.text


def test_a_replaced_file_is_noticed(place: Place) -> None:
    reader = place.open()
    np.save(place.folder / "emb" / "1.npy", ROWS[:41])
    with pytest.raises(FileChangedError, match=r"1\.npy") as caught:
        reader.to_dask_array().compute(scheduler="sync")  # threads would read on while the server ends
    assert PASSWORD not in str(caught.value)


# The block cache of fsspec leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("cache", ["simplecache", "filecache", "blockcache"])
def test_threads_that_share_a_cache_never_see_a_file_before_it_is_whole(cache: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(1).standard_normal((20_000, 16)).astype(np.float32)
    (tmp_path / "emb").mkdir()
    np.save(tmp_path / "emb" / "0.npy", rows)
    with servers.http_files(tmp_path / "emb") as server:
        options = {cache: {"cache_storage": str(tmp_path / "cache")}}
        x = EmbeddingReader(f"{cache}::{server.url}/0.npy", storage_options=options).to_dask_array(max_piece_size=1000)
        with ThreadPoolExecutor(2) as pool:
            passes = [pool.submit(lambda: x.compute(scheduler="threads", num_workers=8)) for _ in range(2)]
            for finished in passes:
                np.testing.assert_array_equal(finished.result(60), rows)


def test_the_connection_of_the_program_keeps_its_timeout(sftp: Place) -> None:
    filesystem, _ = url_to_fs(sftp.url, **sftp.options)
    np.testing.assert_array_equal(sftp.open().to_dask_array().compute(), ROWS)
    assert filesystem.ftp.get_channel().gettimeout() is None


def test_who_reads_through_a_cache_is_told_of_it(tmp_path: Path) -> None:
    (tmp_path / "emb").mkdir()
    np.save(tmp_path / "emb" / "0.npy", ROWS)
    with servers.http_files(tmp_path / "emb") as server:
        options = {"simplecache": {"cache_storage": str(tmp_path / "cache")}}
        reader = EmbeddingReader(f"simplecache::{server.url}/0.npy", storage_options=options)
        np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)
        np.save(tmp_path / "emb" / "0.npy", ROWS[::-1])
        with pytest.raises(FileChangedError, match=r"0\.npy.*clear the cache in front of it"):
            reader.to_dask_array().compute()
