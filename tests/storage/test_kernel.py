"""Reading S3 in a real Jupyter kernel, whose main thread runs an event loop all the time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support import clouds, servers

ROWS = np.arange(240, dtype=np.float32).reshape(60, 4)

#: Cells as people write them: plain ones, and one that waits for a coroutine.
CELLS = [
    """
import asyncio
import numpy as np
from dask_embedding_reader import EmbeddingReader, iter_batches
assert asyncio.get_running_loop().is_running()
reader = EmbeddingReader("s3://bucket/emb", storage_options={options})
reader
""",
    "rows = np.arange(240, dtype=np.float32).reshape(60, 4)",
    "x = reader.to_dask_array(max_piece_size=7)",
    "np.testing.assert_array_equal(x.compute(), rows)",
    "got = np.concatenate([batch for batch, _ in reader(8, max_piece_size=5)])",
    "np.testing.assert_array_equal(got, rows)",
    "got = np.concatenate([batch for batch, _ in iter_batches(x * 2, batch_size=8)])",
    "np.testing.assert_array_equal(got, rows * 2)",
    "np.testing.assert_array_equal(await asyncio.to_thread(x[3:9].compute), rows[3:9])",
    "for batch, meta in reader(8):\n    break",
    "print('the end')",
]


@pytest.fixture
def options(tmp_path: Path) -> Iterator[dict[str, object]]:
    """The options of an S3 service with one bucket, which holds the rows in three files."""
    servers.require(clouds.rclone_available, "rclone")
    (tmp_path / "bucket" / "emb").mkdir(parents=True)
    for k in range(3):
        np.save(tmp_path / "bucket" / "emb" / f"{k}.npy", ROWS[k * 20 : (k + 1) * 20])
    with clouds.signed_s3(tmp_path) as found:
        yield found


@pytest.mark.filterwarnings("ignore")  # of jupyter_client and its sockets
def test_a_notebook_reads_s3(options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    manager, client = start_new_kernel(kernel_name="python3")
    printed: list[str] = []
    try:
        for cell in CELLS:
            reply = client.execute_interactive(
                cell.replace("{options}", repr(options)),
                timeout=60,
                output_hook=lambda message: printed.append(str(message["content"].get("text", ""))),
            )
            content = reply["content"]
            assert content["status"] == "ok", "\n".join(content.get("traceback", []))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "the end\n" in printed
