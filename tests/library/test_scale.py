"""Collections of billions of rows, and of a million files: small graphs, small tasks, little memory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STATUS = """
import gc, pickle, sys

def resident(key="VmRSS"):
    gc.collect()
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
"""

BILLIONS = """
import cloudpickle
from dask_embedding_reader import EmbeddingReader, iter_batches

reader = EmbeddingReader(sys.argv[1])
assert reader.count == 5_800_000_000
x, meta = reader.to_dask_array(), reader.to_dask_dataframe()
assert len(cloudpickle.dumps(x.__dask_graph__())) < 8_000_000
part = x[5_000_000_000:5_000_000_010]
tasks = dict(part.__dask_optimize__(part.dask, part.__dask_keys__()))
assert max(len(pickle.dumps(task)) for task in tasks.values()) < 2_000
assert part.compute().shape == (10, 768)
assert meta.loc[5_000_000_000:5_000_000_009].compute().index.tolist() == list(range(5_000_000_000, 5_000_000_010))
rows, numbers = next(reader(1_000, start=5_000_000_000, show_progress=False))
assert rows.shape == (1_000, 768) and numbers["i"][0] == 5_000_000_000
rows, _ = next(iter_batches(x[5_000_000_000:5_001_000_000], batch_size=1_000))
assert rows.shape == (1_000, 768)
print(resident("VmHWM"))
"""

MILLION = """
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from dask_embedding_reader.formats.base import Columns, FileHeader
from dask_embedding_reader.formats.registry import get_format
from dask_embedding_reader.lazy.graph import make_array, make_metadata_frame
from dask_embedding_reader.collection.files import file_table
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.storage.store import StoredFile, Version
from dask_embedding_reader.storage.local import LocalStore

before, storage, dtype = resident(), LocalStore(LocalFileSystem()), np.dtype(np.float16)

def header(number):
    path = f"/data/collection/embeddings/shard-{number // 1000:05}/part-{number:08}.npy"
    version = Version(15_488, "mtime", str(10**18 + number), f"host {number} {10**18 + number}")
    return FileHeader(StoredFile(storage, path, version), 10, 768, dtype, (128, False))

files = file_table([header(number) for number in range(1_000_000)], ["/data/collection"])
manifest = Manifest(get_format("npy"), Columns(), files, None, (), dtype)
x = make_array(manifest, 0, manifest.count, 32_000, dtype)
meta = make_metadata_frame(manifest, 0, manifest.count, 32_000)
assert x.numblocks == (15_625, 1) and meta.npartitions == 15_625
print(resident("VmHWM") - before)
"""


def peak(program: str, *arguments: str) -> int:
    """Run a program in a process of its own, and return the bytes that it says it took."""
    command = [sys.executable, "-c", STATUS + program, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
def test_billions_of_rows_take_little_memory_and_small_tasks(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    shape = (1_000_000, 768)
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f2", "fortran_order": False, "shape": shape})
    header = buffer.getvalue()
    for number in range(5_800):  # sparse: 9 TB that take no room
        path = tmp_path / f"{number:05}.npy"
        path.write_bytes(header)
        os.truncate(path, len(header) + shape[0] * shape[1] * 2)
    assert peak(BILLIONS, str(tmp_path)) < 500_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
def test_a_million_files_take_less_than_a_gigabyte() -> None:
    assert peak(MILLION) < 1_000_000_000
