"""Every single call to the operating system about local files goes wrong once, in every way: right data, or an error.

The same operations as in ``test_fragile_storage``, on a disk. Nothing is left behind: no thread, no descriptor.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pytest

from dask_embedding_reader import EmbeddingReader, iter_batches, verify_embeddings, write_embeddings
from dask_embedding_reader.errors import EmbeddingReaderError, FileChangedError, MismatchError, ReadError, WriteError
from dask_embedding_reader.formats.parquet.footers import FOOTERS
from dask_embedding_reader.storage import retries
from tests.storage.test_fragile_storage import COLUMNS, META, QUIET, ROWS, Left, check_result, computed, rows_of
from tests.support.collections import finishes
from tests.support.fragile import Fault
from tests.support.fragile_local import FAULTS, local_calls, replacing

FORMATS = ("npy", "parquet", "parquet_npy")


def open_(source: Any, file_format: str) -> EmbeddingReader:
    return EmbeddingReader(source, file_format, meta_columns=None if file_format == "npy" else COLUMNS)


def batches(reader: EmbeddingReader) -> Any:
    return rows_of(reader(5, max_piece_size=3, **QUIET))


def batches_of_an_array(reader: EmbeddingReader) -> Any:
    x, meta = reader.to_dask_array(max_piece_size=4), reader.to_dask_dataframe(max_piece_size=4)
    return rows_of(iter_batches(x, meta, batch_size=5))


#: What people do, given the place of the files and the format; and whether the reader is opened meanwhile.
OPERATIONS: dict[str, tuple[Callable[..., Any], bool]] = {
    "open": (lambda root, file_format: batches(open_(root / "data", file_format)), True),
    "open a pattern": (lambda root, file_format: batches(open_(f"{root}/data/part*/0*", file_format)), True),
    "open again": (
        lambda root, _: batches(EmbeddingReader.from_manifest(root / "data")),
        True,
    ),
    "verify": (lambda root, _: verify_embeddings(root / "written"), True),
    "batches": (batches, False),
    "array and frame": (computed, False),
    "batches of an array": (batches_of_an_array, False),
}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.0)
    with dask.config.set(scheduler="synchronous"):
        yield


def fill(root: Path, file_format: str) -> None:
    """Two folders of data with a manifest above, and beside them what is to be verified."""
    meta = None if file_format == "npy" else META
    for k in range(2):
        rows = slice(6 * k, 6 * k + 6)
        part = root / "data" / f"part{k}"
        write_embeddings(ROWS[rows], part, file_format, None if meta is None else meta[rows], rows_per_file=3)
        (part / ".manifest.embeddings").unlink()
    open_(root / "data", file_format).save_manifest()
    write_embeddings(ROWS, root / "written", file_format, meta, rows_per_file=6)


def check(found: Any, file_format: str, accepted: Sequence[Any]) -> None:
    """What was read is exactly what was stored."""
    if not isinstance(found, tuple):  # what verifying found, or an error
        assert not isinstance(found, pd.DataFrame) or found.empty or "damaged" not in str(found)
    elif file_format == "npy":
        assert any(np.array_equal(found[0], rows) for rows in accepted), found[0]
    else:
        check_result(found, accepted)


def run(operation: Callable[..., Any], *subject: Any) -> Any:
    FOOTERS.clear()  # footers are read again
    return finishes(lambda: operation(*subject), 20)


def outcomes(
    name: str,
    root: Path,
    file_format: str,
    fault: Fault,
    *,
    every: int,
    for_good: bool = False,
    accepted: Sequence[Any] = (ROWS,),
) -> Iterator[tuple[str, Any]]:
    """Let one call after the other go wrong; yield each, and what came of it: right rows, or an error of ours."""
    operation, opens = OPERATIONS[name]
    subject = (root, file_format) if opens else (open_(root / "data", file_format),)
    gc.collect()  # what other tests left
    with local_calls(root) as calls:
        seen = calls.of(lambda: run(operation, *subject))
        assert seen
        for number in range(1, len(seen) + 1, every):
            where = f"{name}, call {number} of {len(seen)}: {seen[number - 1]}"
            left = Left()
            try:
                with calls.broken_at(number, fault, for_good):
                    found = run(operation, *subject)
            except EmbeddingReaderError as error:
                found = type(error)(str(error))  # without the frames, which hold what was open
            except BaseException as error:
                raise AssertionError(where) from error
            try:
                check(found, file_format, accepted)
                left.check()
            except BaseException as error:
                raise AssertionError(f"{where}; it gave {found!r}") from error
            yield where, found


def go_wrong(name: str, file_format: str, fault: str, root: Path, every: int) -> None:
    fill(root, file_format)
    for where, found in outcomes(name, root, file_format, FAULTS[fault], every=every):
        if fault == "short":  # asked again for the rest
            assert not isinstance(found, EmbeddingReaderError), where
        elif isinstance(found, EmbeddingReaderError) and not isinstance(found, MismatchError):
            assert str(root) in str(found), where  # it names the file or the folder


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_some_call_goes_wrong(name: str, fault: str, tmp_path: Path) -> None:
    go_wrong(name, "parquet_npy", fault, tmp_path, every=13)


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_call_goes_wrong(name: str, file_format: str, fault: str, tmp_path: Path) -> None:
    go_wrong(name, file_format, fault, tmp_path, every=1)


def test_a_disk_that_cannot_list_a_folder_does_not_seem_empty(tmp_path: Path) -> None:
    fill(tmp_path, "npy")
    error = FAULTS["error"]
    with local_calls(tmp_path) as calls:
        for kind, work in (
            (ReadError, lambda: verify_embeddings(tmp_path / "written")),
            (WriteError, lambda: write_embeddings(ROWS + 1, tmp_path / "written", rows_per_file=6)),
        ):
            with (
                calls.broken_at(0, lambda call: error(call) if call.method == "scandir" else call.run(), for_good=True),
                pytest.raises(kind, match="cannot be listed"),
            ):
                work()
    assert verify_embeddings(tmp_path / "written").empty


@pytest.mark.parametrize("source", ["data/part0/00000000.npy", "data/part*/0*"])
def test_a_file_that_cannot_be_looked_up_is_named(tmp_path: Path, source: str) -> None:
    """Each matrix of calls found this: a raw error, of files that were named or found by a pattern."""
    fill(tmp_path, "npy")
    with local_calls(tmp_path) as calls:
        count = len(calls.of(lambda: EmbeddingReader(tmp_path / source)))
        for number in range(1, count + 1):
            with (
                calls.broken_at(number, FAULTS["error"], for_good=True),
                pytest.raises(EmbeddingReaderError, match=re.escape(f"{tmp_path}/data")),
            ):
                EmbeddingReader(tmp_path / source)


@pytest.mark.parametrize("fault", ["error", "refused", "stale"])
@pytest.mark.parametrize("source", ["folder", "pattern", "list", "links"])
def test_a_file_that_cannot_be_looked_up_is_not_taken_for_an_empty_one(tmp_path: Path, source: str, fault: str) -> None:
    """Its rows would be missing, and all later ones shifted, without a word."""
    fill(tmp_path, "npy")
    data = tmp_path / "data"
    sources: dict[str, Any] = {
        "folder": data,
        "pattern": f"{data}/part*/0*",
        "list": sorted(map(str, data.glob("part*/0*"))),
        "links": tmp_path / "links",
    }
    sources["links"].mkdir()
    for number, path in enumerate(sources["list"]):
        (sources["links"] / f"{number}.npy").symlink_to(path)
    tried = 0
    with local_calls(tmp_path) as calls:
        seen = calls.of(lambda: EmbeddingReader(sources[source]))
        for number, (function, path) in enumerate(seen, 1):
            if function == "stat" and path.endswith(".npy"):
                tried += 1
                with calls.broken_at(number, FAULTS[fault]), suppress(ReadError):
                    assert len(EmbeddingReader(sources[source])) == len(ROWS)
    assert tried >= 4


@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_a_disk_that_stays_away_is_an_error_and_no_hang(name: str, every: int, tmp_path: Path) -> None:
    fill(tmp_path, "parquet_npy")
    for where, found in outcomes(name, tmp_path, "parquet_npy", FAULTS["error"], every=every, for_good=True):
        assert isinstance(found, EmbeddingReaderError), where


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["open", "batches", "array and frame", "batches of an array"])
def test_a_file_that_is_replaced_before_a_call_is_never_mixed_in(name: str, every: int, tmp_path: Path) -> None:
    fill(tmp_path, "npy")
    path = tmp_path / "data" / "part1" / "00000001.npy"
    old, times = path.read_bytes(), path.stat()
    new = ROWS.copy()
    new[9:] += 100
    content = old[: -new[9:].nbytes] + new[9:].tobytes()
    # Whoever opened it before must not get the new rows.
    accepted = (ROWS, new) if name == "open" else (ROWS,)
    for _, found in outcomes(name, tmp_path, "npy", replacing(path, content), every=every, accepted=accepted):
        assert isinstance(found, FileChangedError | tuple)
        path.write_bytes(old)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
