"""Kill a writer at every step: ``python -m tests.support.killing SOURCE EXISTING FOLDER EVERY``.

Each attempt is a fork of this process, which has imported everything already, and which kills itself (``SIGKILL``)
before its n-th change of the disk: a write, a rename, a removal. Every EVERY-th step is tried. Prints how many steps a
whole run has, and how each attempt ended.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd

from dask_embedding_reader import EmbeddingReader, write_embeddings

ROWS, ROWS_PER_FILE = 50, 10
VECTORS = np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3)
META = pd.DataFrame({"id": np.arange(ROWS), "word": [f"word {k}" for k in range(ROWS)]})
FORMAT = "parquet_npy"


def write(source: str, folder: Path, overwrite: bool = False) -> None:
    """Write the data from one kind of source."""
    array: Any = VECTORS
    meta: Any = META
    if source == "dask":
        array = da.from_array(VECTORS, chunks=(10, 3))
    elif source == "batches":
        array, meta = ((VECTORS[a : a + 7], META[a : a + 7]) for a in range(0, ROWS, 7)), None
    elif source == "reader":
        array, meta = EmbeddingReader(folder.parent / "source", "parquet_npy", meta_columns=["id", "word"]), None
    write_embeddings(array, folder, FORMAT, meta, rows_per_file=ROWS_PER_FILE, overwrite=overwrite)


def old_data(folder: Path) -> None:
    """What is there before: another collection, and something that belongs to somebody else."""
    write_embeddings(VECTORS[:30] + 1, folder, rows_per_file=4)
    (folder / "README.txt").write_text("keep me")


def content(folder: Path) -> dict[str, str]:
    """A checksum of every file of data. The manifest holds times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".manifest.embeddings"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def _count_steps(limit: int) -> list[int]:
    """Kill this process before the step of that number; return where steps are counted."""
    steps, making, plain_mkdir = [0], threading.Lock(), os.mkdir

    def step() -> None:
        steps[0] += 1
        if steps[0] == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            step()
            return change(*args, **kwargs)

        return wrapper

    def counted_mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        # Of threads that try to make one folder, as chance has it, one changes something.
        with making:
            if not os.path.isdir(path):
                step()
            plain_mkdir(path, *args, **kwargs)

    for name in ("replace", "remove", "fsync", "rmdir", "link"):
        setattr(os, name, counted(getattr(os, name)))
    os.mkdir = counted_mkdir
    from dask_embedding_reader.storage import local as writing

    plain_open = open

    def counted_open(*args: Any, **kwargs: Any) -> Any:
        opened = plain_open(*args, **kwargs)
        if "x" in str(args[1:2]):  # half a file may be there when it comes to it
            opened.write(b"")
            step()
        return opened

    writing.open = counted_open  # type: ignore[attr-defined]
    return steps


def attempt(source: str, folder: Path, overwrite: bool, limit: int = 0) -> str:
    """Run in a fork, killed at a step (0: never); return how many steps there were, ``killed`` or ``failed``."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            steps = _count_steps(limit)
            write(source, folder, overwrite)
            os.write(write_end, str(steps[0]).encode())
        except BaseException:
            traceback.print_exc()
            os.write(write_end, b"failed")
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as told:
        said = told.read().decode()
    os.waitpid(child, 0)
    return said or "killed"


def readable(folder: Path) -> str:
    """What a reader sees: the new data, the old ones, or an error, but never a part of either."""
    try:
        rows = EmbeddingReader(folder).to_dask_array().compute()  # not in threads, which would be there at the fork
    except OSError:
        return "error"
    return {True: "new"}.get(np.array_equal(rows, VECTORS)) or (
        "old" if np.array_equal(rows, VECTORS[:30] + 1) else "WRONG"
    )


def main() -> None:
    """Do what the command line says."""
    dask.config.set(scheduler="synchronous")  # threads of a pool do not survive a fork
    source, existing, root = sys.argv[1], sys.argv[2] == "existing", Path(sys.argv[3])
    if source == "reader":
        write("numpy", root / "source")
    if source == "dask":
        # Dask imports more at the first compute(): half a second in each fork, minutes in all, where tests time out.
        write(source, root / "first")
    folder = root / "whole"
    if existing:
        old_data(folder)
    steps = int(attempt(source, folder, existing))
    sys.stdout.write(f"{steps}\n")
    for step in range(2, steps + 1, int(sys.argv[4])):
        folder = root / f"killed-at-{step}"
        if existing:
            old_data(folder)
        ends = [attempt(source, folder, existing, step)]
        seen = readable(folder)
        ends.append(attempt(source, folder, existing, step))  # and once more, in what was left
        ends.append(attempt(source, folder, existing))
        same = content(folder) == content(root / "whole")
        tidy = not (folder / "_writing").exists()
        told = (step, ends[0], seen, ends[-1], "same" if same else "DIFFERENT", "tidy" if tidy else "LITTER")
        sys.stdout.write(" ".join(map(str, told)) + "\n")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
