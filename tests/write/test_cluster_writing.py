"""Writing from a cluster whose workers die, and by two who want the same folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_embedding_reader import EmbeddingReader, verify_embeddings, write_embeddings
from dask_embedding_reader.errors import EmbeddingReaderError
from dask_embedding_reader.storage import local as writing
from tests.support import servers
from tests.support.faults import faulty
from tests.support.killing import content

ROWS = np.arange(120, dtype=np.float32).reshape(40, 3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two workers, each a process that is started again by its nanny when it dies."""
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as started:
        yield started


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as made:
        yield made


class Deadly:
    """Kills the worker that computes the fifth chunk: once, or always. Its token is the same in either case."""

    def __init__(self, marker: Path, always: bool) -> None:
        self.marker, self.always = str(marker), always

    def __call__(self, block: Any, block_info: Any = None) -> Any:
        if block_info[0]["chunk-location"][0] == 4 and (self.always or not Path(self.marker).exists()):
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return block

    def __dask_tokenize__(self) -> str:
        return "deadly"


def fragile(marker: Path, always: bool) -> da.Array:
    x: da.Array = da.from_array(ROWS, chunks=(4, 3)).map_blocks(Deadly(marker, always), dtype=ROWS.dtype, meta=ROWS[:0])
    return x


def test_a_worker_that_dies_costs_its_file_and_not_the_collection(client: Client, tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path / "whole", rows_per_file=4)
    write_embeddings(fragile(tmp_path / "died", always=False), tmp_path / "out", rows_per_file=4)
    assert (tmp_path / "died").exists()
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert verify_embeddings(tmp_path / "out").empty


# Workers start one after the other, and each imports everything: minutes on a busy machine.
@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_workers_that_die_again_and_again_leave_what_can_be_resumed(cluster: LocalCluster, tmp_path: Path) -> None:
    # A cluster of its own: on a busy machine nannies of workers that died often may give up, and it has none any more.
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as dying,
        Client(dying),
        pytest.raises(Exception, match="worker"),
    ):
        write_embeddings(fragile(tmp_path / "died", always=True), tmp_path / "out", rows_per_file=4)
    with pytest.raises(EmbeddingReaderError, match="run the writing again"):
        EmbeddingReader(tmp_path / "out")
    cured = fragile(tmp_path / "died", always=False)  # it has died before
    with Client(cluster):
        write_embeddings(ROWS, tmp_path / "whole", rows_per_file=4)
        write_embeddings(cured, tmp_path / "out", rows_per_file=4)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert verify_embeddings(tmp_path / "out").empty


class DeadlyFile:
    """As the fifth chunk is computed, has its worker die once, when half of the bytes of the file are written."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __call__(self, block: Any, block_info: Any = None) -> Any:
        if block_info[0]["chunk-location"][0] == 4 and not Path(self.marker).exists():
            writing.open = self.open  # type: ignore[attr-defined] # this process has no future
        return block

    def open(self, path: str, *arguments: Any, **options: Any) -> Any:
        file = open(path, *arguments, **options)  # noqa: SIM115 - whoever asked for it closes it
        write = file.write

        def die(data: bytes | memoryview) -> int:
            if len(data) != ROWS[:4].nbytes:  # what comes before the vectors
                return int(write(data))
            write(data[: len(data) // 2])
            Path(self.marker).write_text(f"{os.path.getsize(path)}")
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

        if "00000004" in str(path):  # or a descriptor, of what is read
            file.write = die
        return file

    def __dask_tokenize__(self) -> str:
        return "deadly file"


def test_a_worker_that_dies_in_the_middle_of_a_file(client: Client, tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path / "whole", rows_per_file=4)
    x = da.from_array(ROWS, chunks=(4, 3)).map_blocks(DeadlyFile(tmp_path / "died"), dtype=ROWS.dtype, meta=ROWS[:0])
    write_embeddings(x, tmp_path / "out", rows_per_file=4)
    assert int((tmp_path / "died").read_text()) == (tmp_path / "whole" / "00000004.npy").stat().st_size - 24
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert verify_embeddings(tmp_path / "out").empty


@pytest.mark.slow
def test_workers_that_die_in_the_middle_of_an_upload(client: Client, s3: servers.S3Server) -> None:
    rows = np.random.default_rng(0).standard_normal((40, 128)).astype(np.float32)
    url, workers = f"{s3.root}/{uuid.uuid4().hex}", list(client.run(os.getpid).values())
    with faulty(s3.endpoint) as proxy:
        options = {**s3.storage_options, "client_kwargs": {**s3.client_options, "endpoint_url": proxy.url}}

        def kill(upload: str) -> bool:
            """Whichever of the workers it is that sends this."""
            if "00000002.npy" not in upload or not workers:
                return False
            while workers:
                os.kill(workers.pop(), signal.SIGKILL)
            return True

        proxy.halfway = kill
        write_embeddings(da.from_array(rows, chunks=(8, 128)), url, rows_per_file=8, storage_options=options)
    assert [asked.fault for asked in proxy.requests].count("cut") == 1
    reader = EmbeddingReader(url, storage_options=s3.storage_options)
    np.testing.assert_array_equal(reader.to_dask_array().compute(), rows)
    assert verify_embeddings(url, storage_options=s3.storage_options).empty


TWO_WRITERS = """
import sys
import dask.array as da, numpy as np
from distributed import Client
from dask_embedding_reader import DestinationError, write_embeddings
client = Client(sys.argv[1])
rows = np.arange(120, dtype=np.float32).reshape(40, 3) + float(sys.argv[3])
try:
    write_embeddings(da.from_array(rows, chunks=(4, 3)), sys.argv[2], rows_per_file=4)
    print("wrote")
except DestinationError as error:
    print("refused", error)
"""


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_of_two_programs_on_one_cluster_one_writes(cluster: LocalCluster, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", TWO_WRITERS, cluster.scheduler_address, str(tmp_path / "out")]
    running = [
        subprocess.Popen([*command, str(shift)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        for shift in (0, 1000)
    ]
    said = [process.communicate(timeout=500)[0] for process in running]
    assert sorted(text.split()[0] for text in said) == ["refused", "wrote"], said
    shift = 1000 if said[1].startswith("wrote") else 0
    np.testing.assert_array_equal(EmbeddingReader(tmp_path / "out").to_dask_array().compute(), ROWS + shift)
    assert verify_embeddings(tmp_path / "out").empty
