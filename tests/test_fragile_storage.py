"""Every single call to the storage goes wrong once, in every way: what comes out is right, or an error that says so.

And nothing is left behind: no thread, no open file, no temporary file, no claim that would keep the next writer off.
"""

from __future__ import annotations

import gc
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest

from dask_embedding_reader import EmbeddingReader, iter_batches, retries, verify_embeddings, write_embeddings
from dask_embedding_reader.errors import EmbeddingReaderError, FileChangedError
from tests.fragile import FAULTS, Fault, broken_at, calls_of, changing
from tests.stores import BUCKET, emptied_bucket
from tests.support import finishes, open_descriptors, wait_until

ROWS = np.arange(48, dtype=np.float32).reshape(12, 4)
META = pd.DataFrame({"id": np.arange(12), "word": [f"word {k}" for k in range(12)]})
COLUMNS = ["id", "word"]
QUIET: dict[str, Any] = {"show_progress": False, "dtype": None}


@dataclass(frozen=True)
class Operation:
    """Something that people do, in two steps: what comes before, and what goes wrong."""

    run: Callable[[Any], Any]
    #: Given the URL of the collection, returns what ``run`` needs.
    prepare: Callable[[str], Any] = lambda url: url
    #: Whether it writes to ``out``.
    writes: bool = False


def open_(url: str, columns: list[str] | None = COLUMNS) -> EmbeddingReader:
    return EmbeddingReader(url, FORMATS[url.rpartition("/")[2]], meta_columns=columns)


def rows_of(batches: Iterator[Any]) -> tuple[Any, Any]:
    found = list(batches)
    frame = pd.concat([frame for _, frame in found], ignore_index=True)
    return np.concatenate([rows for rows, _ in found]), frame


def computed(reader: EmbeddingReader) -> tuple[Any, Any]:
    x, meta = reader.to_dask_array(max_piece_size=4), reader.to_dask_dataframe(max_piece_size=4)
    return x.compute(), meta.compute().reset_index()


def out(url: str) -> str:
    return f"{url.rpartition('/')[0]}/out"


def write(source: Any, url: str, meta: Any = None) -> None:
    write_embeddings(source, out(url), FORMATS[url.rpartition("/")[2]], meta, rows_per_file=5)


FORMATS = {"pairs": "parquet_npy", "tables": "parquet"}
OPERATIONS = {
    "open": Operation(lambda url: rows_of(open_(url)(5, **QUIET))),
    "open again": Operation(
        lambda url: rows_of(EmbeddingReader.from_manifest(f"{url}/_manifest.parquet")(5, **QUIET)),
        lambda url: (open_(url).save_manifest(), url)[1],
    ),
    "batches": Operation(lambda reader: rows_of(reader(5, max_piece_size=3, **QUIET)), open_),
    "array and frame": Operation(computed, open_),
    "batches of an array": Operation(
        lambda r: rows_of(iter_batches(r.to_dask_array(max_piece_size=4), r.to_dask_dataframe(max_piece_size=4), batch_size=5)),
        open_,
    ),
    "save the manifest": Operation(lambda reader: (reader.save_manifest(), rows_of(reader(5, **QUIET)))[1], open_),
    "verify": Operation(lambda url: verify_embeddings(out(url)), lambda url: (write(ROWS, url, META), url)[1]),
    "write": Operation(lambda url: write(ROWS, url, META), writes=True),
    "write lazily": Operation(
        lambda url: write(da.from_array(ROWS, chunks=(4, 4)), url, META), writes=True
    ),
    "convert": Operation(lambda reader: write(reader, reader.embeddings_folder), open_, writes=True),
}


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.0)
    with emptied_bucket(), dask.config.set(scheduler="synchronous"):
        yield


def fill(url: str) -> None:
    """Two files, or pairs of them."""
    BUCKET.reset()
    write_embeddings(ROWS, url, FORMATS[url.rpartition("/")[2]], META, rows_per_file=6)
    BUCKET.objects.pop(f"{url.partition('://')[2]}/_manifest.parquet")


def check_result(found: Any) -> None:
    """What was read is exactly what was stored."""
    if isinstance(found, tuple):
        np.testing.assert_array_equal(found[0], ROWS)
        assert found[1]["id"].tolist() == META["id"].tolist()
        assert found[1]["word"].tolist() == META["word"].tolist()
        assert found[1]["i"].tolist() == list(range(12))


def check_written(operation: Operation, subject: Any, url: str) -> None:
    """A reader sees all of it or an error; once the writing is done again, all, and nothing that does not belong."""
    try:
        check_result(rows_of(open_at(url)(5, **QUIET)))
    except EmbeddingReaderError:
        operation.run(subject)
        check_result(rows_of(open_at(url)(5, **QUIET)))
    assert verify_embeddings(out(url)).empty
    litter = [name for name in BUCKET.objects if ".tmp" in name or "_writing" in name]
    assert not litter


def open_at(url: str) -> EmbeddingReader:
    return EmbeddingReader(out(url), FORMATS[url.rpartition("/")[2]], meta_columns=COLUMNS)


class Left:
    """What is there now, to be compared with what is there later."""

    def __init__(self) -> None:
        self.threads, self.files = set(threading.enumerate()), len(open_descriptors())

    def check(self) -> None:
        assert wait_until(lambda: set(threading.enumerate()) <= self.threads), threading.enumerate()
        assert wait_until(lambda: len(open_descriptors()) <= self.files)


def outcomes(name: str, url: str, fault: Fault, for_good: bool = False) -> Iterator[tuple[str, Any]]:
    """Let one call after the other go wrong; yield each, and what came of it: checked rows, or an error of ours."""
    operation = OPERATIONS[name]
    fill(url)
    subject = operation.prepare(url)
    gc.collect()  # what other tests left
    prepared = dict(BUCKET.objects)
    calls = calls_of(lambda: operation.run(subject))
    assert calls
    for number in range(1, len(calls) + 1):
        BUCKET.objects = dict(prepared)
        left = Left()
        where = f"{name}, call {number} of {len(calls)}: {calls[number - 1]}"
        try:
            with broken_at(number, fault, for_good):
                found = finishes(lambda: operation.run(subject), 20)
        except EmbeddingReaderError as error:
            found = error
        except BaseException as error:
            raise AssertionError(where) from error
        yield where, found
        try:
            if not isinstance(found, EmbeddingReaderError):
                check_result(found)
            if operation.writes:
                check_written(operation, subject, url)
            left.check()
        except BaseException as error:
            raise AssertionError(f"{where}; it gave {found!r}") from error


@pytest.mark.parametrize("storage", ["fragile", "fragile-store"])
@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_a_call_that_goes_wrong_once(name: str, fault: str, storage: str) -> None:
    for where, found in outcomes(name, f"{storage}://in/pairs", FAULTS[fault]):
        if fault in ("late", "error", "error of a client", "short"):
            assert not isinstance(found, EmbeddingReaderError), where
