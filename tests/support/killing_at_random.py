"""Kill a writer again and again, at random moments: ``python -m tests.support.killing_at_random`` with a JSON job.

Each attempt is a fork of this process, which has imported everything already and started no thread. It is killed
(``SIGKILL``) from outside after a random time, and another one goes on with what it left, until one comes to its end by
chance, or is let to. All the while another process opens the collection, and between the attempts a third one looks at
what is there. Prints what was seen, as JSON.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import random
import select
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import dask.array as da
import fsspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from dask_embedding_reader import EmbeddingReader, EmbeddingReaderError, verify_embeddings, write_embeddings

FILES, ROWS_PER_FILE, DIMENSION = 40, 50, 256
ROWS = FILES * ROWS_PER_FILE
VECTORS = np.random.default_rng(0).standard_normal((ROWS, DIMENSION)).astype(np.float32)
OLD = VECTORS[:450] + 1
META = pd.DataFrame({"id": np.arange(ROWS), "word": [f"word {k}" for k in range(ROWS)]})
COLUMNS = list(META.columns)
FIRST_SECONDS = {False: 0.05, True: 0.5}
"""The first attempts are killed within this time, on a local disk and elsewhere."""
MOST_KILLS = 25
"""The next attempt comes to its end: on a busy machine chance alone might never let one."""


class Job:
    """What is written, and where to."""

    def __init__(self, source: str, file_format: str, folder: str, options: dict[str, Any] | None) -> None:
        self.source, self.file_format, self.folder, self.options = source, file_format, folder, options
        self.columns = None if file_format == "npy" else COLUMNS

    def write_source(self) -> None:
        """Write what a reader converts: other sizes of files, another format."""
        write_embeddings(VECTORS, f"{self.folder}-source", "parquet", META, rows_per_file=330, **self._storage)

    def write_old(self) -> None:
        """Write what is there before."""
        meta = None if self.columns is None else META[: len(OLD)]
        write_embeddings(OLD, self.folder, self.file_format, meta, rows_per_file=40, **self._storage)

    def write(self) -> None:
        """Write it, whatever is there."""
        array: Any = VECTORS
        meta: Any = META if self.columns else None
        if self.source == "dask":
            array = da.from_array(VECTORS, chunks=(50, DIMENSION))
        elif self.source == "batches":
            steps = range(0, ROWS, 70)
            array, meta = ((VECTORS[a : a + 70], META[a : a + 70] if self.columns else None) for a in steps), None
        elif self.source == "reader":
            source = f"{self.folder.removesuffix('-whole')}-source"
            array = EmbeddingReader(source, "parquet", meta_columns=self.columns, storage_options=self.options)
            meta = None
        write_embeddings(
            array, self.folder, self.file_format, meta, rows_per_file=ROWS_PER_FILE, overwrite=True, **self._storage
        )

    def read(self) -> str:
        """What a reader sees: all of the new rows, or of the old ones, or an error; anything else is wrong."""
        try:
            reader = EmbeddingReader(self.folder, self.file_format, storage_options=self.options)
            rows = next(reader(10 * ROWS, show_progress=False))[0]
        except (EmbeddingReaderError, OSError) as error:
            return type(error).__name__
        return "new" if np.array_equal(rows, VECTORS) else "old" if np.array_equal(rows, OLD) else "WRONG"

    def files(self) -> dict[str, dict[str, Any]]:
        """Every file there is, by its name in the folder."""
        filesystem, path = fsspec.url_to_fs(self.folder, **(self.options or {}))
        filesystem.invalidate_cache()
        return {name[len(path) + 1 :]: info for name, info in filesystem.find(path, detail=True).items()}

    def look(self) -> dict[str, list[Any]]:
        """What tells whether a finished file was written anew, once it is recorded as complete."""
        files = self.files()
        # A disk renames a file, which stays the same; on an object store the one that is moved is another.
        shown = str if self.options else os.path.basename
        done = {name.rpartition("/")[2].partition(".")[0] for name in files if name.startswith("_writing/done/0")}
        return {
            shown(name): [str(info.get(key)) for key in ("ino", "mtime", "ETag", "LastModified")]
            for name, info in files.items()
            if name.rpartition("/")[2].partition(".")[0] in done
            and name.endswith((".npy", ".parquet"))
            and (name.startswith("_writing/files/") or "_writing/files" not in str(list(files)))
        }

    def half_written(self) -> list[str]:
        """Files under the names of finished ones that numpy and pyarrow cannot read."""
        filesystem, path = fsspec.url_to_fs(self.folder, **(self.options or {}))
        bad = []
        for name in self.files():
            if name.startswith("_") or "/." in f"/{name}":
                continue
            try:
                content = io.BytesIO(filesystem.cat_file(f"{path}/{name}"))
                np.load(content) if name.endswith(".npy") else pq.read_table(content)
            except FileNotFoundError:  # old files go
                continue
            except Exception as error:
                bad.append(f"{name}: {error}")
        return bad

    def content(self) -> dict[str, str]:
        """A checksum of every file but the manifest, which holds times."""
        filesystem, path = fsspec.url_to_fs(self.folder, **(self.options or {}))
        names = sorted(name for name in self.files() if name != ".manifest.embeddings")
        return {name: hashlib.sha256(filesystem.cat_file(f"{path}/{name}")).hexdigest() for name in names}

    def damaged(self) -> list[str]:
        """What differs from the manifest."""
        return [str(problem) for problem in verify_embeddings(self.folder, **self._storage)["problem"]]

    @property
    def _storage(self) -> dict[str, Any]:
        return {"storage_options": self.options}


class Fork:
    """A fork of this process that does something; what it returns comes back as JSON."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._told, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._told)
            try:
                with os.fdopen(write_end, "w") as told:
                    json.dump(work(), told)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(write_end)

    def ends_within(self, seconds: float | None) -> bool:
        """Wait for its end, so long at most; for ever if that is None."""
        return bool(select.select([self._told], [], [], seconds)[0])

    def kill(self) -> None:
        """End it as nothing else does."""
        os.kill(self.pid, signal.SIGKILL)

    def result(self) -> Any:
        """Wait for what it returns; None if it was killed."""
        with os.fdopen(self._told) as told:
            text = told.read()
        status = os.waitpid(self.pid, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise SystemExit("a process failed, see above")
        return json.loads(text) if os.WIFEXITED(status) else None


def in_fork(work: Callable[[], Any]) -> Any:
    """Do something elsewhere, so that this process never has a thread."""
    return Fork(work).result()


def import_all(names: list[str]) -> None:
    """Import what a writer imports, so that attempts need not."""
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)


def watch(job: Job, ended: int) -> dict[str, int]:
    """Read the collection over and over until a pipe is closed; return how often what was seen."""
    seen: Counter[str] = Counter()
    while not select.select([ended], [], [], 0.02)[0]:
        seen[job.read()] += 1
    return seen


def main() -> None:
    """Do what the command line says."""
    what = json.loads(sys.argv[1])
    chance = random.Random(what["seed"])
    parts = what["source"], what["file_format"]
    job, whole = (Job(*parts, what["folder"] + end, what["options"]) for end in ("", "-whole"))
    if what["source"] == "reader":
        in_fork(job.write_source)
    for one in (job, whole):
        if what["existing"]:
            in_fork(one.write_old)

    def write_whole() -> list[str]:
        whole.write()
        return list(sys.modules)

    import_all(in_fork(write_whole))

    stop_end, hold_end = os.pipe()

    def watched() -> dict[str, int]:
        os.close(hold_end)  # else it would wait for itself
        return watch(job, stop_end)

    watcher = Fork(watched)
    before: dict[str, list[Any]] = {}
    replaced: dict[str, list[Any]] = {}
    finished: set[str] = set()
    kills, survived, rewritten, half_written, between = 0, 0, [], [], []
    longest = FIRST_SECONDS[what["options"] is not None]
    while True:
        attempt = Fork(job.write)
        if attempt.ends_within(chance.uniform(0, longest) if kills < MOST_KILLS else None):
            attempt.result()
            break
        attempt.kill()
        attempt.result()
        kills += 1
        now = in_fork(job.look)
        rewritten += [name for name in before if name in now and now[name] != before[name]]
        # Nothing was finished: the next gets more time. Else less, so that many are killed while they write. What was
        # there after the attempt before counts, not ``before``: that is emptied where all is written anew, and attempts
        # that did nothing got less and less time, for ever.
        longest *= 1.2 if now.keys() <= finished else 0.8
        finished = set(now)
        before |= {name: state for name, state in now.items() if replaced.get(name) != state}
        survived = max(survived, len(before))
        half_written += in_fork(job.half_written)
        between.append(in_fork(job.read))
        # It had written all when it was killed, or all but the last marks: overwrite=True begins anew now.
        if between[-1] == "new" or "_writing/commit.json" in in_fork(lambda: list(job.files())):
            before.clear()
            replaced = now
    os.close(hold_end)
    result = {
        "kills": kills,
        "files_that_survived": survived,
        "rewritten": rewritten,
        "half_written": half_written,
        "between": Counter(between),
        "meanwhile": watcher.result(),
        "at_last": in_fork(job.read),
        "same": in_fork(job.content) == in_fork(whole.content),
        "damaged": in_fork(job.damaged),
    }
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
