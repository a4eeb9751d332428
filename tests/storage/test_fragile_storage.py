"""Every single call to the storage goes wrong once, in every way: what comes out is right, or an error that says so.

And nothing is left behind: no thread, no open file, no temporary file, no claim that would keep the next writer off.
"""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest

from dask_embedding_reader import EmbeddingReader, iter_batches, verify_embeddings, write_embeddings
from dask_embedding_reader.errors import EmbeddingReaderError, FileChangedError
from dask_embedding_reader.formats.parquet.footers import FOOTERS
from dask_embedding_reader.storage import retries
from dask_embedding_reader.write import claim
from tests.support.collections import finishes, open_descriptors, wait_until
from tests.support.fragile import FAULTS, Call, Fault, broken_at, calls_of, changing
from tests.support.stores import BUCKET, emptied_bucket

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


def void(work: Callable[[], None], result: Any) -> Any:
    """Do something first."""
    work()
    return result


def out(url: str) -> str:
    return f"{url.rpartition('/')[0]}/out"


def write(source: Any, url: str, meta: Any = None) -> None:
    write_embeddings(source, out(url), FORMATS[url.rpartition("/")[2]], meta, rows_per_file=5)


FORMATS = {"pairs": "parquet_npy", "tables": "parquet"}
OPERATIONS = {
    "open": Operation(lambda url: rows_of(open_(url)(5, **QUIET))),
    "open again": Operation(
        lambda url: rows_of(EmbeddingReader.from_manifest(f"{url}/.manifest.embeddings")(5, **QUIET)),
        lambda url: void(open_(url).save_manifest, url),
    ),
    "batches": Operation(lambda reader: rows_of(reader(5, max_piece_size=3, **QUIET)), open_),
    "array and frame": Operation(computed, open_),
    "batches of an array": Operation(
        lambda r: rows_of(
            iter_batches(r.to_dask_array(max_piece_size=4), r.to_dask_dataframe(max_piece_size=4), batch_size=5)
        ),
        open_,
    ),
    "save the manifest": Operation(lambda reader: rows_of(void(reader.save_manifest, reader)(5, **QUIET)), open_),
    "verify": Operation(lambda url: verify_embeddings(out(url)), lambda url: void(lambda: write(ROWS, url, META), url)),
    "write": Operation(lambda url: write(ROWS, url, META), writes=True),
    "write lazily": Operation(lambda url: write(da.from_array(ROWS, chunks=(4, 4)), url, META), writes=True),
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
    BUCKET.objects.pop(f"{url.partition('://')[2]}/.manifest.embeddings")


def check_result(found: Any, accepted: Sequence[Any] = (ROWS,)) -> None:
    """What was read is exactly what was stored."""
    if isinstance(found, tuple):
        assert any(np.array_equal(found[0], rows) for rows in accepted), found[0]
        assert found[1]["id"].tolist() == META["id"].tolist()
        assert found[1]["word"].tolist() == META["word"].tolist()
        assert found[1]["i"].tolist() == list(range(12))


def check_written(operation: Operation, subject: Any, url: str, failed: bool) -> None:
    """A reader sees all of it or an error; once the writing is done again, all, and nothing that does not belong."""
    if failed:
        with suppress(EmbeddingReaderError):
            check_result(rows_of(open_at(url)(5, **QUIET)))
        operation.run(subject)
    check_result(rows_of(open_at(url)(5, **QUIET)))
    assert verify_embeddings(out(url)).empty
    # A claim that could not be taken back may stay: the next writer removes it.
    assert not [name for name in BUCKET.objects if ".tmp" in name or ("_writing/" in name and "/writer-" not in name)]


def open_at(url: str) -> EmbeddingReader:
    return EmbeddingReader(out(url), FORMATS[url.rpartition("/")[2]], meta_columns=COLUMNS)


class Left:
    """What is there now, to be compared with what is there later."""

    def __init__(self) -> None:
        self.threads, self.files = set(threading.enumerate()), len(open_descriptors())

    def check(self) -> None:
        assert wait_until(lambda: set(threading.enumerate()) <= self.threads), threading.enumerate()
        assert wait_until(lambda: len(open_descriptors()) <= self.files)


def outcomes(
    name: str, url: str, fault: Fault, *, for_good: bool = False, every: int = 1, accepted: Sequence[Any] = (ROWS,)
) -> Iterator[tuple[str, Any]]:
    """Let one call after the other go wrong; yield each, and what came of it: a result that is right, or our error."""
    operation = OPERATIONS[name]
    fill(url)
    subject = operation.prepare(url)
    gc.collect()  # what other tests left
    prepared = dict(BUCKET.objects)
    FOOTERS.clear()
    calls = calls_of(lambda: operation.run(subject))
    assert calls
    for number in range(1, len(calls) + 1, every):
        BUCKET.objects = dict(prepared)
        FOOTERS.clear()  # of the last time: what is known already is not asked for
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
                check_result(found, accepted)
            if operation.writes:
                check_written(operation, subject, url, isinstance(found, EmbeddingReaderError))
            left.check()
        except BaseException as error:
            raise AssertionError(f"{where}; it gave {found!r}") from error


#: What a second attempt puts right. Small files that come short are not asked for again: they cannot be made sense of.
PASSING = ("error", "error of a client", "late")


@pytest.mark.parametrize("fault", ["error", "refused", "gone", "lost answer", "short"])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_some_call_goes_wrong(name: str, fault: str) -> None:
    for where, found in outcomes(name, "fragile://in/pairs", FAULTS[fault], every=11):
        assert fault not in PASSING or not isinstance(found, EmbeddingReaderError), where
        assert fault != "short" or not isinstance(found, EmbeddingReaderError) or ".npy" not in str(found), where


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("url", ["fragile://in/pairs", "fragile-store://in/pairs", "fragile-store://in/tables"])
@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_call_goes_wrong(name: str, fault: str, url: str) -> None:
    for where, found in outcomes(name, url, FAULTS[fault]):
        assert fault not in PASSING or not isinstance(found, EmbeddingReaderError), where
        assert fault != "short" or not isinstance(found, EmbeddingReaderError) or ".npy" not in str(found), where


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1_800)])])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_a_storage_that_stays_away_is_an_error_and_no_hang(name: str, every: int) -> None:
    for where, found in outcomes(name, "fragile://in/pairs", FAULTS["error"], for_good=True, every=every):
        # The last things to be done are to take back the claim and to remove an empty folder, which nobody needs.
        late = re.search(r"_writing/writer-|\('(find|rm)', 'in/out/_writing/scratch-", where)
        assert isinstance(found, EmbeddingReaderError) or late, where


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["open", "batches", "array and frame", "batches of an array"])
def test_a_file_that_is_replaced_before_a_call_is_never_mixed_in(name: str, every: int) -> None:
    url, path = "fragile://in/pairs", "in/pairs/00000001.npy"
    fill(url)
    new = np.concatenate([ROWS[:6], ROWS[6:] + 100])
    content = BUCKET.objects[path].content[:-96] + new[6:].tobytes()
    # Whoever opened it before must not get the new rows.
    accepted = (ROWS, new) if name == "open" else (ROWS,)
    seen = {type(found) for _, found in outcomes(name, url, changing(path, content), every=every, accepted=accepted)}
    assert seen <= {FileChangedError, tuple}


def test_a_temporary_file_that_could_not_be_removed_is_by_the_next_writer() -> None:
    """Its claim was given back, but then the server was away."""
    url = "fragile://in/pairs"
    BUCKET.put("in/out/_writing/scratch-0123/.00000000.npy.0123.tmp", b"half a file")
    write(ROWS, url, META)
    check_result(rows_of(open_at(url)(5, **QUIET)))
    assert [name for name in BUCKET.objects if "_writing" in name] == []


@pytest.mark.parametrize("storage", ["fragile", "fragile-store"])
def test_a_claim_outlives_a_storage_that_fails_for_a_while(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_BEAT_SECONDS", 0.001)
    url = f"{storage}://in/pairs"
    beats: list[Call] = []

    def failing(call: Call) -> Any:
        if threading.current_thread().name == "embedding-writer-claim" and len(beats) < 20:
            beats.append(call)
            raise OSError("away")
        return call.run()

    def batches() -> Iterator[Any]:
        yield ROWS[:5], META[:5]
        assert wait_until(lambda: len(beats) == 20)
        yield ROWS[5:], META[5:]

    with broken_at(1, failing, for_good=True):
        write(batches(), url)
    check_result(rows_of(open_at(url)(5, **QUIET)))
