"""How much memory a pass over a collection takes: measured in a fork of a process that has imported everything.

Run as a program it answers one line of JSON for each: what to open and how to read it, then by how many bytes the peak
of resident memory rose, what was projected, and whether there was a warning.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dask_embedding_reader._common.budget import Projection
from tests.support.collections import Collection

CAN_MEASURE = os.path.exists("/proc/self/clear_refs")


class Peak(NamedTuple):
    """What a pass took."""

    #: By how many bytes the peak of resident memory rose.
    grown: int
    #: What arithmetic says.
    projected: Projection
    #: Whether a warning said that the limit is not kept.
    warned: bool


class Meter:
    """Measures passes, one after the other, each in a process of its own."""

    def __init__(self, program: subprocess.Popen[str]) -> None:
        self._program = program

    def measure(self, collection: Collection, how: str, batch_size: int, limit: int) -> Peak:
        """One pass over a collection."""
        asked = {"folder": str(collection.folder), "options": collection.options, "how": how}
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(json.dumps(asked | {"batch_size": batch_size, "limit": limit}) + "\n")
        self._program.stdin.flush()
        answer = json.loads(self._program.stdout.readline())
        assert "fault" not in answer, answer["fault"]
        return Peak(answer["grown"], Projection(*answer["projected"]), answer["warned"])


@contextmanager
def meter() -> Iterator[Meter]:
    """Start the program that measures."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.peaks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    ) as program:
        yield Meter(program)
        assert program.stdin
        program.stdin.close()


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _batches(reader: Any, how: str, batch_size: int, limit: int) -> Iterator[Any]:
    from dask_embedding_reader import iter_batches

    if how == "lazy":
        frame = reader.to_dask_dataframe() if reader.manifest.fields else None
        return iter_batches(reader.to_dask_array(), frame, batch_size=batch_size, max_ram_usage_in_bytes=limit)
    if how == "every second":
        reader = reader.take(slice(None, None, 2))
    elif how == "shuffled":
        reader = reader.shuffle(seed=0)
    batches: Iterator[Any] = reader(batch_size, show_progress=False, max_ram_usage_in_bytes=limit)
    return batches


def _project(reader: Any, batches: Any) -> Projection:
    """What the pass holds that makes batches, which has not begun."""
    from dask.system import CPU_COUNT

    from dask_embedding_reader.batches.pace import project_batches

    request = batches.gi_frame.f_locals["request"]
    lazy = hasattr(request, "project")
    projected = request.project(2 * CPU_COUNT) if lazy else project_batches(reader.manifest, request)
    assert isinstance(projected, Projection)
    return projected


def _measure(asked: dict[str, Any]) -> dict[str, Any]:
    import fsspec

    from dask_embedding_reader import EmbeddingReader

    folder = asked["folder"]
    if asked["how"] == "remote":  # for the reader it is; all of it is in memory before that is measured
        for file in Path(folder).iterdir():
            fsspec.filesystem("memory").pipe_file(f"/peaks/{file.name}", file.read_bytes())
        folder = "memory://peaks"
    reader = EmbeddingReader(folder, **asked["options"])
    next(iter(reader(1, end=1, show_progress=False)))  # threads, and what is imported when it is first used
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        batches = _batches(reader, asked["how"], asked["batch_size"], asked["limit"])
        projected = _project(reader, batches)
        rows = 0
        for vectors, _ in batches:
            rows += len(vectors)
            del vectors
        assert rows >= reader.count // 2
    warned = any("max_ram_usage" in str(each.message) for each in told)
    return {"grown": _status("VmHWM") - before, "projected": projected, "warned": warned}


def main() -> None:
    """Answer."""
    import pyarrow.dataset
    import pyarrow.parquet  # noqa: F401 - in the memory of all forks

    import dask_embedding_reader.lazy.graph  # noqa: F401

    for line in sys.stdin:
        if os.fork() == 0:
            try:
                answer = _measure(json.loads(line))
            except BaseException as error:
                answer = {"fault": repr(error)}
            os.write(1, json.dumps(answer).encode() + b"\n")
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    main()
