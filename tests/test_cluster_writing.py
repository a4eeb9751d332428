"""Writing from a cluster whose workers die, and by two who want the same folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_embedding_reader import EmbeddingReader, verify_embeddings, write_embeddings
from dask_embedding_reader.errors import EmbeddingReaderError
from tests.killing import content

ROWS = np.arange(120, dtype=np.float32).reshape(40, 3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two workers, each a process that is started again by its nanny when it dies."""
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as started:
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


@pytest.mark.slow
def test_workers_that_die_again_and_again_leave_what_can_be_resumed(client: Client, tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path / "whole", rows_per_file=4)
    with pytest.raises(Exception, match="worker"):
        write_embeddings(fragile(tmp_path / "died", always=True), tmp_path / "out", rows_per_file=4)
    with pytest.raises(EmbeddingReaderError, match="run the writing again"):
        EmbeddingReader(tmp_path / "out")
    cured = fragile(tmp_path / "died", always=False)  # it has died before
    write_embeddings(cured, tmp_path / "out", rows_per_file=4)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert verify_embeddings(tmp_path / "out").empty


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
def test_of_two_programs_on_one_cluster_one_writes(cluster: LocalCluster, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", TWO_WRITERS, cluster.scheduler_address, str(tmp_path / "out")]
    running = [
        subprocess.Popen([*command, str(shift)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        for shift in (0, 1000)
    ]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert sorted(text.split()[0] for text in said) == ["refused", "wrote"], said
    shift = 1000 if said[1].startswith("wrote") else 0
    np.testing.assert_array_equal(EmbeddingReader(tmp_path / "out").to_dask_array().compute(), ROWS + shift)
    assert verify_embeddings(tmp_path / "out").empty
