"""What writers say of rows, files and other writers; defaults are those that are told."""

from __future__ import annotations

import base64
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pytest

from dask_embedding_reader import EmbeddingReader, verify_embeddings, write_embeddings
from dask_embedding_reader.batches.read import read_table_batches
from dask_embedding_reader.errors import CastError, ColumnError, DestinationError, MismatchError, WriteError
from dask_embedding_reader.storage.put import list_files, make_folder, put_file
from dask_embedding_reader.storage.read import read_range
from dask_embedding_reader.storage.urls import resolve
from dask_embedding_reader.write import claim, destination, notes, parts, sources, verify
from dask_embedding_reader.write.folder import Folder
from dask_embedding_reader.write.written import open_written
from tests.support.collections import wait_until

ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)
FRAME = pd.DataFrame({"id": np.arange(20), "word": [f"word {k}" for k in range(20)]})
SIZES = (5, 3, 8, 4)
"""Rows of chunks and of batches."""
STARTS = (0, 5, 8, 16)


def of_parts(change: Callable[[int, Any], Any]) -> Iterator[Any]:
    """The frame in parts of these sizes, changed."""
    return (change(k, FRAME[a : a + n]) for k, (a, n) in enumerate(zip(STARTS, SIZES, strict=True)))


def lazy_frame(change: Callable[[int, Any], Any], **columns: Any) -> Any:
    made = list(of_parts(change))
    return dd.from_map(lambda k: made[k], range(4), meta=FRAME[:0].assign(**columns))


def lazy_rows(change: Callable[[Any], Any], number: int) -> da.Array:
    def block(chunk: Any, block_info: Any = None) -> Any:
        return change(chunk) if block_info[0]["chunk-location"][0] == number else chunk

    array: da.Array = da.from_array(ROWS, chunks=(SIZES, 3)).map_blocks(block, dtype=ROWS.dtype, meta=ROWS[:0])
    return array


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("rows_per_file", [4, 7, 20])
def test_a_chunk_that_is_not_as_told_is_named_by_its_first_row(tmp_path: Path, number: int, rows_per_file: int) -> None:
    start, count = STARTS[number], SIZES[number]
    for change, told in (
        (
            lambda chunk: chunk[1:],
            rf"was computed with the shape \({count - 1}, 3\), the array tells \({count}, 3\); g",
        ),
        (lambda chunk: np.ma.masked_array(chunk, chunk >= 0), "has masked values"),
        (lambda chunk: chunk * 1j, r"was computed as complex64, the array tells float32; give map_blocks .* dtype="),
        (lambda chunk: chunk.astype("S4"), r"was computed as \|S4, the array tells float32"),
    ):
        with (
            dask.config.set(scheduler="synchronous"),
            pytest.raises(Exception, match=rf"^a chunk of the rows from {start} on {told}"),
        ):
            write_embeddings(lazy_rows(change, number), tmp_path, rows_per_file=rows_per_file, overwrite=True)


@pytest.mark.parametrize("number", range(4))
def test_a_partition_that_is_not_as_told_is_named_by_its_rows(tmp_path: Path, number: int) -> None:
    start, count = STARTS[number], SIZES[number]

    def write(frame: Any, array: Any = None) -> None:
        array = da.from_array(ROWS, chunks=(SIZES, 3)) if array is None else array
        write_embeddings(array, tmp_path, "parquet", frame, rows_per_file=20, overwrite=True)

    def shorter(k: int, part: Any) -> Any:
        return part[1:] if k == number else part

    def odd(k: int, part: Any) -> Any:
        return part.assign(word=pd.Series([object() if k == number else ""] * len(part), dtype=object).to_numpy())

    def leaping(k: int, part: Any) -> Any:
        return part.assign(i=part["id"] + 1000 + 7 * (part["id"] == start + 2) * (k == number))

    with dask.config.set({"scheduler": "synchronous", "dataframe.convert-string": False}):
        said = rf"has {counted(count - 1)} where {count} were expected \(rows from {start} on\)"
        with pytest.raises(MismatchError, match=said):
            write(lazy_frame(shorter))
        with pytest.raises(ColumnError, match=rf"'word' .* cannot be stored, in rows {start} to {start + count}\b"):
            write(lazy_frame(odd))
        said = rf"is {1009 + start} beside row {start + 2} of the array, where {1002 + start:,} was expected"
        with pytest.raises(MismatchError, match=said):
            write(lazy_frame(leaping, i=0))
        with pytest.raises(MismatchError, match=said):
            write(pd.concat(of_parts(leaping)))
        with pytest.raises(MismatchError, match=said):
            write(pd.concat(of_parts(leaping)), ROWS)


def counted(rows: int) -> str:
    return f"{rows} row{'s' * (rows != 1)}"


@pytest.mark.parametrize("number", range(1, 4))
def test_a_batch_that_is_not_as_the_others_is_named_by_its_number_and_first_row(tmp_path: Path, number: int) -> None:
    """Batches of no rows count."""
    start, count = STARTS[number], SIZES[number]
    where = rf"^batch {number + 1} \(from row {start} on\) "

    def write(change: Callable[[Any, Any], Any]) -> None:
        def batches() -> Iterator[Any]:
            for k, frame in enumerate(of_parts(lambda _, part: part)):
                rows = ROWS[STARTS[k] : STARTS[k] + SIZES[k]]
                yield change(rows, frame) if k == number else (rows, frame)
                if k == 0:
                    yield rows[:0], frame[:0]

        write_embeddings(batches(), tmp_path, "parquet", rows_per_file=6, overwrite=True)

    changes: list[tuple[Callable[[Any, Any], Any], str]] = [
        (lambda rows, frame: [rows], where + "must be a pair"),
        (
            lambda rows, frame: (rows, frame.to_numpy()),
            where + "has metadata of type numpy.ndarray, not a pandas DataFrame",
        ),
        (lambda rows, frame: (rows[0], frame), where + r"has the shape \(3,\); embeddings are 2-D"),
        (lambda rows, frame: (rows, frame[1:]), f"{where}has {count} vectors, but {counted(count - 1)} of metadata"),
        (lambda rows, frame: (rows[:, 1:], frame), where + r"holds vectors of 2 x float32, those before it are 3 x fl"),
        (lambda rows, frame: (rows, frame[["word"]]), where + r"has the metadata columns \['word'\], those before it"),
        (lambda rows, frame: (np.ma.masked_array(rows, True), frame), where + "has masked values"),
        (lambda rows, frame: (rows, frame.assign(i=-1)), where + "has metadata called 'i' that are no row numbers"),
        (
            lambda rows, frame: (rows, frame.assign(word=[object()] * count)),
            rf"'word' .* cannot be stored, in rows {start} to {start + count}\b",
        ),
    ]
    for change, told in changes:
        with pytest.raises(Exception, match=told):
            write(change)
    with pytest.warns(UserWarning, match=f"{where}has a column of integers 'i'"):
        write(lambda rows, frame: (rows, frame.assign(i=np.arange(count, dtype="i4"))))


def sources_of(rows: np.ndarray, folder: Path) -> dict[str, Any]:
    """The same rows in all that is written."""
    np.save(folder / "0.npy", rows)
    return {
        "numpy": rows,
        "dask": da.from_array(rows, chunks=(SIZES, 3)),
        "batches": iter([(rows[:3], None), (rows[3:], None)]),
        "reader": EmbeddingReader(folder / "0.npy"),
    }


@pytest.mark.parametrize("source", ["numpy", "dask", "batches", "reader"])
def test_a_value_that_cannot_be_cast_is_named_by_its_row_in_the_collection(tmp_path: Path, source: str) -> None:
    rows = ROWS.copy()
    rows[13, 1] = 1e9
    array = sources_of(rows, tmp_path)[source]
    with pytest.raises(CastError, match=r"^1 of 15 values .*; the first is in row 13 "):
        write_embeddings(array, tmp_path / "out", dtype="float16", rows_per_file=5)


def test_a_part_whose_rows_do_not_fit_together_is_named_by_them() -> None:
    settings = parts.Settings(None, "parquet", "embedding", 20, 4, 3, "<f4", None)
    table = pa.table({"id": range(4)})
    parts.encode_part(settings, parts.Part(2, 8, ROWS[:4], table))
    for array, columns, told in (
        (
            ROWS[:4],
            table[:3],
            "rows 8 to 12: 3 rows of metadata for an array of shape (4, 3), where 4 vectors of 3 items",
        ),
        (
            ROWS[:4, :1],
            table,
            "rows 8 to 12: 4 rows of metadata for an array of shape (4, 1), where 4 vectors of 3 items",
        ),
        (ROWS[:1, :1], None, "rows 8 to 9: 1 row of metadata for an array of shape (1, 1), where 1 vector of 3 items"),
    ):
        with pytest.raises(MismatchError, match=f"^{re.escape(told)} were expected$"):
            parts.encode_part(settings, parts.Part(2, 8, array, columns))


def test_rows_that_were_written_before_with_other_values_are_named(tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path, rows_per_file=6)
    rows = ROWS.copy()
    rows[13] += 1
    told = r"rows 12 to 18 were written before with other values: this is other data; name another folder, or"
    with pytest.raises(DestinationError, match=told):
        write_embeddings(rows, tmp_path, rows_per_file=6)


@pytest.mark.parametrize("source", ["numpy", "dask", "batches", "reader", "row numbers"])
def test_warnings_are_shown_where_the_writer_is_called(tmp_path: Path, source: str) -> None:
    rows = ROWS.copy()
    rows[13] = np.nan
    array = {
        **sources_of(rows, tmp_path),
        "row numbers": iter([(rows[:13], FRAME[:13].assign(i=np.arange(13, dtype="i4")))]),
    }[source]
    file_format = "parquet" if source == "row numbers" else "npy"
    with pytest.warns(UserWarning, match=r"kept as such \(in 1 file, the first is number 2\)|is taken for row") as told:
        write_embeddings(array, tmp_path / "out", file_format, dtype="float16", rows_per_file=5)
    assert [Path(one.filename) for one in told] == [Path(__file__)]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and notes


@pytest.mark.parametrize("function", [write_embeddings, verify_embeddings])
def test_defaults_are_those_that_are_told(tmp_path: Path, function: Callable[..., Any]) -> None:
    write_embeddings(ROWS, tmp_path)
    assert len(verify_embeddings(tmp_path)) == 0
    told = dict(re.findall(r"^(\w+) : .*, default (.*)$", inspect.getdoc(function) or "", re.MULTILINE))
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default not in (None, inspect.Parameter.empty)
    }
    values: dict[str, Any] = {"4 GiB": 4 * 2**30, "True": True, "False": False}
    assert found == {name: values[value] if value in values else json.loads(value) for name, value in told.items()}


@pytest.mark.parametrize(("characters", "shown"), [(57, 57), (58, 58), (59, 58)])
def test_long_values_of_notes_are_shown_in_part(characters: int, shown: int) -> None:
    with pytest.raises(notes.DamagedNoteError) as caught:
        notes.refuse("key", "x" * characters, "a number")
    assert (
        str(caught.value) == f"key is 'x{'x' * (shown - 1)}{chr(39) if shown == characters else 'x...'}, not a number"
    )
    with pytest.raises(notes.DamagedNoteError, match=r"^key is a value of type int, not a text$"):
        notes.refuse("key", 10**5000, "a text")


SETTINGS: dict[str, Any] = {
    "token": None,
    "file_format": "npy",
    "embedding_column": "embedding",
    "rows": 1,
    "rows_per_file": 1,
    "dimension": 1,
    "dtype": "<f4",
    "scale": None,
}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, ""),
        ({"rows": None, "token": "t", "scale": 2}, ""),
        ({"rows": 2**63 - 1, "dimension": 2**63 - 1, "rows_per_file": 2**63 - 1}, ""),
        *(
            ({key: value}, f"{key} is {value}, not an integer from 1 on")
            for key in ("rows", "dimension", "rows_per_file")
            for value in (0, 2**63, True)
        ),
        ({"dtype": "complex64"}, ""),
        *(
            ({"dtype": dtype}, f"dtype is '{dtype}', not a dtype of numbers that such files can hold")
            for dtype in ("complex128", "O", "M8[s]", "f4,f4", "nonsense")
        ),
        ({"file_format": "parquet", "dtype": "c8"}, "dtype is 'c8', not a dtype of numbers that such files can hold"),
        ({"file_format": "none"}, "file_format is 'none', not one of"),
        ({"scale": "1"}, "scale is '1', not a finite number"),
        ({"scale": True}, "scale is True, not a finite number"),
        ({"token": 1}, "token is 1, not a text"),
        (
            {"more": 1},
            "settings is ['dimension', 'dtype', 'embedding_column', 'file_format', 'm..., not a note of token, f",
        ),
    ],
)
def test_settings_that_were_noted_are_read_if_they_are_such(changed: dict[str, Any], told: str) -> None:
    given = {**SETTINGS, **changed}
    if not told:
        assert parts.read_settings(given)._asdict() == given
    else:
        with pytest.raises(notes.DamagedNoteError, match=f"^{re.escape(told)}"):
            parts.read_settings(given)


SHA = "a" * 64
NAME = "00000000.npy"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, ""),
        ({"move": [], "remove": ["x.npy", "a/b.npy"], "columns": ["a", ""], "rows": 0, "job": ""}, ""),
        ({"files": {"a.npy": [1, SHA]}}, "files is 'a.npy', not a name such as 00000000.npy"),
        ({"files": {NAME: [1]}}, "00000000.npy is [1], not a size and a checksum"),
        ({"files": {NAME: [1, SHA, 2]}}, "00000000.npy is [1, 'aaaa"),
        ({"files": {NAME: {"0": 1, "1": SHA}}}, "00000000.npy is {'0': 1, '1'"),
        ({"files": {NAME: [1, "A" * 64]}}, "00000000.npy is 'AAAA"),
        ({"files": {NAME: [1, "x"]}}, "00000000.npy is 'x', not a SHA-256"),
        ({"files": {NAME: [1, 7]}}, "checksum is 7, not a text"),
        ({"files": {NAME: [-1, SHA]}}, "size is -1, not an integer from 0 on"),
        ({"files": {NAME: ["1", SHA]}}, "size is '1', not an integer from 0 on"),
        ({"files": []}, "files is [], not a note in the note"),
        ({"move": ["1.npy"]}, "move is '1.npy', not one of its files"),
        ({"move": [1]}, "move is 1, not one of its files"),
        ({"move": NAME}, "move is '00000000.npy', not a list"),
        ({"remove": ["../x.npy"]}, "remove is '../x.npy', not the name of a file of data in this folder"),
        ({"remove": [NAME]}, "remove is '00000000.npy', not a file that is no part of the collection"),
        ({"columns": [1]}, "columns is 1, not a text"),
        ({"rows": -1}, "rows is -1, not an integer from 0 on"),
        ({"job": "a" * 31}, "job is 'aaaa"),
        ({"writer": None}, "writer is None, not 32 hexadecimal digits"),
        ({"settings": []}, "settings is [], not a note in the note"),
        ({"settings": {"a": [1]}}, "settings: a is [1], not a text or a number"),
        ({"settings": {"a": float("nan")}}, "settings: a is nan, not a text or a number"),
    ],
)
def test_what_is_wrong_with_a_commit_is_told(changed: dict[str, Any], told: str) -> None:
    note: dict[str, Any] = {
        "settings": {"a": 1, "b": "x", "c": None, "d": 1.5},
        "columns": [],
        "files": {NAME: [0, SHA]},
        "move": [NAME],
        "remove": [],
        "rows": 1,
        "job": "a" * 32,
        "writer": "b" * 32,
        **changed,
    }
    if told:
        with pytest.raises(notes.DamagedNoteError, match=f"^{re.escape(told)}"):
            notes.read_commit(json.dumps(note).encode())
    else:
        read = notes.read_commit(json.dumps(note).encode())
        files = {NAME: (0, SHA)}
        lists = [tuple(note[key]) for key in ("move", "remove", "columns")]
        assert (read.settings, read.files, read.rows) == (note["settings"], files, note["rows"])
        assert [read.move, read.remove, read.columns] == lists
        assert (read.job, read.writer) == (note["job"], note["writer"])


@pytest.mark.parametrize("damage", [{"columns": "x"}, {"columns": 1}, {"rows": 0}, {"not_finite": -1}, {"files": {}}])
def test_records_that_say_nothing_of_use_are_passed_over(tmp_path: Path, damage: dict[str, Any]) -> None:
    def batches(stop: bool) -> Iterator[Any]:
        yield from ((ROWS[k : k + 5], FRAME[k : k + 5]) for k in range(0, 20, 5))
        if stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_embeddings(batches(stop=True), tmp_path, "parquet", rows_per_file=5)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    record = tmp_path / "_writing" / "done" / "00000001.json"
    record.write_text(json.dumps({**json.loads(record.read_bytes()), **damage}))
    write_embeddings(batches(stop=False), tmp_path, "parquet", rows_per_file=5)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    assert {name for name in after if after[name] != before[name]} == {"00000001.parquet"}
    assert EmbeddingReader(tmp_path, meta_columns=["id"]).to_dask_dataframe()["id"].compute().tolist() == [*range(20)]


def test_records_tell_what_is_in_a_part() -> None:
    settings = parts.Settings(None, "parquet_npy", "embedding", 20, 4, 3, "<f2", None)
    rows = np.array([[np.nan, 1, 2], [np.inf, 3, -np.inf]], np.float32)
    record, contents = parts.encode_part(settings, parts.Part(7, 28, rows, pa.table({"id": [1, 2]})))
    assert (record.rows, record.not_finite, record.schema.names) == (2, 3, ["id"])
    assert list(contents) == ["00000007.parquet", "00000007.npy"] == parts.part_names(settings, 7)
    files = {name: parts.measure(content) for name, content in contents.items()}
    assert all(nbytes > 0 for nbytes, _ in files.values())
    again = parts.Record.from_json(record._replace(files=files).to_json("a" * 32), list(files), "a" * 32)
    assert again == record._replace(files=files)
    for names, job in ((list(files)[::-1], "a" * 32), (list(files), "b" * 32)):
        with pytest.raises(notes.DamagedNoteError):
            parts.Record.from_json(record._replace(files=files).to_json("a" * 32), names, job)
    assert (settings.row_nbytes, settings.nbytes, settings._replace(rows=None).nbytes) == (6, 120, None)


# ---------------------------------------------------------------------------------------------------------------------
# Claims


@pytest.fixture
def other() -> Iterator[psutil.Process]:
    """Another process, which lives."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as started:
        yield psutil.Process(started.pid)
        started.kill()


def sign_of(process: psutil.Process, **changed: Any) -> bytes:
    own = json.loads(claim._content())
    facts = {"pid": process.pid, "process_started": process.create_time(), "host": "there"}
    return json.dumps({**own, **facts, **changed}).encode()


def test_processes_are_told_apart_by_host_container_and_boot() -> None:
    told = [socket.gethostname()]
    if os.path.exists("/proc/self/ns/pid"):
        told += [os.readlink("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    assert claim._machine() == " ".join(told)
    sign = json.loads(claim._content("a" * 32))
    process = psutil.Process()
    assert 0 <= time.time() - sign.pop("alive_at") < 600
    assert sign == {
        "job": "a" * 32,
        "host": socket.gethostname(),
        "machine": claim._machine(),
        "pid": os.getpid(),
        "process_started": process.create_time(),
    }


@pytest.mark.parametrize(
    ("name", "following"),
    [
        ("writer-00000041.json", 42),
        ("writer-41.json", 1),
        ("writer-000000041.json", 1),
        ("writer-0000004x.json", 1),
        ("writer-0000004².json", 1),
        ("writer-0000004٣.json", 1),
    ],
)
def test_claims_are_numbered_from_the_last_one_on(
    tmp_path: Path, other: psutil.Process, name: str, following: int
) -> None:
    """A dead one is passed over, and counts until it is removed; one whose process lives is left as it is."""
    store, folder = resolve(tmp_path / "_writing")
    put_file(store, f"{folder}/{name}", sign_of(other))
    with pytest.raises(DestinationError) as caught, claim.claimed(store, folder):
        pass
    said = (
        rf"{tmp_path}: process {other.pid} on there is writing to this folder \(last sign of life \d+ s ago\); wait for"
    )
    assert re.match(said, str(caught.value))
    assert str(caught.value).endswith(f"If it is surely dead, remove {folder}/{name}")
    assert list(list_files(store, folder)) == [name]
    put_file(store, f"{folder}/{name}", sign_of(other, process_started=1))
    if following == 1:  # nothing is there under the name that the first one takes
        with claim.claimed(store, folder) as held:
            assert held.number == following
    else:
        put_file(store, f"{folder}/writer-00000001.json", sign_of(other, process_started=1))
        with claim.claimed(store, folder) as held:
            assert held.path == f"{folder}/writer-{following:08d}.json"
            assert list(list_files(store, folder)) == [f"writer-{following:08d}.json"]
    assert list_files(store, folder) == {}


@pytest.mark.parametrize(("silent", "is_alive"), [(100, True), (350, False)])
def test_who_is_silent_on_another_machine_is_dead_after_five_minutes(
    tmp_path: Path, other: psutil.Process, silent: float, is_alive: bool
) -> None:
    """Its last sign of life counts, whatever it says in its claim."""
    store, folder = resolve(tmp_path / "_writing")
    job, now = "a" * 32, time.time()
    put_file(store, f"{folder}/writer-00000001.json", sign_of(other, job=job, machine="m", alive_at=now - 5000))
    for number, seconds in enumerate((900, silent, 800)):
        sign = sign_of(other, job=job, machine="m", alive_at=now - seconds, pid=100 + number)
        put_file(store, f"{folder}/alive-{job}-{number}.json", sign)
    put_file(store, f"{folder}/alive-{'b' * 32}-0.json", sign_of(other, job="b" * 32, machine="m", alive_at=now))
    if is_alive:
        with pytest.raises(DestinationError, match=r"process 101 on there .*\(last sign of life [12]\d\d s ago\)"):
            claim.take(store, folder, "c" * 32)
        assert len(list_files(store, folder)) == 5
    else:
        claim.take(store, folder, "c" * 32).give_back()
        assert list(list_files(store, folder)) == [f"alive-{'b' * 32}-0.json"]


def test_a_clock_that_is_ahead_shows_no_negative_time(tmp_path: Path, other: psutil.Process) -> None:
    store, folder = resolve(tmp_path / "_writing")
    put_file(store, f"{folder}/writer-00000001.json", sign_of(other, alive_at=time.time() + 1e6))
    with pytest.raises(DestinationError, match=r"\(last sign of life 0 s ago\)"):
        claim.take(store, folder, "c" * 32)


def test_who_takes_over_removes_all_that_the_dead_could_use(
    tmp_path: Path, other: psutil.Process, caplog: pytest.LogCaptureFixture
) -> None:
    store, folder = resolve(tmp_path / "_writing")
    for number, job in enumerate(("a" * 32, "b" * 32), 1):
        make_folder(store, f"{folder}/scratch-{job}")
        Path(f"{folder}/scratch-{job}/half.tmp").write_text("half")
        for name in (f"writer-0000000{number}.json", f"alive-{job}-0.json"):
            put_file(store, f"{folder}/{name}", sign_of(other, job=job, process_started=1))
    make_folder(store, f"{folder}/scratch-{'d' * 32}")  # of which there is no claim any more
    with caplog.at_level("WARNING", "dask_embedding_reader"), claim.claimed(store, folder) as held:
        assert sorted(os.listdir(folder)) == sorted([os.path.basename(held.scratch), "writer-00000003.json"])
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}/writer-0000000{number}.json: a writer left its claim when it died (process {other.pid}); "
        "this one takes its place"
        for number in (1, 2)
    ]
    assert not os.path.exists(folder)


@pytest.mark.parametrize("is_done", [False, True])
def test_who_shares_a_claim_leaves_the_signs_of_others_until_all_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: psutil.Process, is_done: bool
) -> None:
    monkeypatch.setattr(claim, "_HANDOVER_SECONDS", 0)
    store, folder = resolve(tmp_path / "_writing")
    held = claim.Claim(store, folder, "a" * 32, 1)
    make_folder(store, held.scratch)
    own, theirs = (f"{folder}/alive-{held.job}-{number}.json" for number in (1, 2))
    for path in (held.path, own):
        put_file(store, path, claim._content(held.job))
    put_file(store, theirs, sign_of(other, job=held.job))
    claim._end(held, [own], is_done=is_done, is_shared=True)
    if is_done:
        assert not os.path.exists(folder)
    else:
        assert sorted(list_files(store, folder)) == [os.path.basename(theirs), os.path.basename(held.path)]
        assert held.is_held()


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_holder_shows_signs_of_life_again_and_again_and_says_if_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_shared: bool
) -> None:
    monkeypatch.setattr(claim, "_BEAT_SECONDS", 0.01)
    store, folder = resolve(tmp_path / "_writing")
    lease = claim.take(store, folder, "a" * 32, is_shared=is_shared)

    def sign() -> Path | None:
        return next(Path(folder).glob(f"alive-{'a' * 32}-*.json"), None)

    def last() -> float:
        path = sign()
        return 0.0 if path is None else float(json.loads(path.read_bytes())["alive_at"])

    try:
        assert wait_until(lambda: last() > 0, 20)
        first = last()
        assert wait_until(lambda: last() > first, 20)
        assert len(list(Path(folder).glob("alive-*"))) == 1
        with monkeypatch.context() as patches, caplog.at_level("WARNING", "dask_embedding_reader"):
            patches.setattr(claim, "_content", lambda _: 1 / 0)
            # Those of other tests may still be ending, on a server that is no more: they say so, too.
            said = f"{lease.claim.path}: cannot be renewed: "
            assert wait_until(lambda: any(told.startswith(said) for told in caplog.messages), 20)
        first = last()
        assert wait_until(lambda: last() > first, 20), "one that failed does no harm"
    finally:
        lease.give_back()
    assert not os.path.exists(folder)


def test_a_holder_that_lost_its_claim_shows_no_more_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_BEAT_SECONDS", 0.01)
    store, folder = resolve(tmp_path / "_writing")
    lease = claim.take(store, folder, "a" * 32, is_shared=True)
    assert wait_until(lambda: bool(list(Path(folder).glob("alive-*"))), 20)
    store.remove(lease.claim.path)
    lease._thread.join(20)
    assert not lease._thread.is_alive()
    assert not os.path.exists(folder)


def test_of_one_job_there_is_one_lease_here(tmp_path: Path) -> None:
    store, folder = resolve(tmp_path / "_writing")
    lease = claim.take(store, folder, "a" * 32, is_shared=True)
    try:
        assert claim.take(store, folder, "a" * 32) is lease
        assert claim._lease_here(lease.claim) is lease
    finally:
        lease.give_back()
    assert not os.path.exists(folder)


@pytest.mark.parametrize(("seconds", "is_alive"), [(0.5, True), (-0.5, True), (1, False), (-1, False)])
def test_a_process_of_the_same_number_is_another_one_if_it_began_at_another_time(
    other: psutil.Process, seconds: float, is_alive: bool
) -> None:
    began = float(round(other.create_time()))
    sign = claim._Sign("a" * 32, "h", claim._machine(), other.pid, began + seconds, 0.0)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(psutil.Process, "create_time", lambda _: began)
        assert sign.is_alive is is_alive


def test_what_fails_as_nobody_can_tell_whether_the_claim_is_held_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder = resolve(tmp_path / "_writing")

    def fail(said: str) -> None:
        raise WriteError(said)

    with claim.claimed(store, folder) as held:

        def work() -> None:
            patches.setattr(claim, "get_file", lambda *_: fail("no connection"))
            fail("no room")

        with monkeypatch.context() as patches, pytest.raises(WriteError, match="no room"):
            held.keep(work)


def test_who_cannot_take_over_leaves_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder = resolve(tmp_path / "_writing")

    def fail(*_: Any) -> None:
        raise WriteError("no permission")

    with monkeypatch.context() as patches:
        patches.setattr(claim, "_disarm", fail)
        with pytest.raises(WriteError, match="no permission"):
            claim.take(store, folder, "a" * 32)
    assert not os.path.exists(folder)


def test_who_cannot_read_another_claim_leaves_none_itself(tmp_path: Path) -> None:
    """It would keep off all other processes for as long as this one lives, once the damaged one is removed."""
    store, folder = resolve(tmp_path / "_writing")
    put_file(store, f"{folder}/writer-00000002.json", b"no claim")
    with pytest.raises(DestinationError, match=r"writer-00000002.json: this claim of a writer cannot be read"):
        claim.take(store, folder, "a" * 32)
    assert os.listdir(folder) == ["writer-00000002.json"]


# ---------------------------------------------------------------------------------------------------------------------
# The folder


@pytest.mark.parametrize("is_lazy", [False, True])
def test_who_overwrites_writes_anew_but_for_what_is_only_to_be_tidied_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_lazy: bool
) -> None:
    def write() -> dict[str, int]:
        array = da.from_array(ROWS, chunks=(SIZES, 3)) if is_lazy else ROWS
        write_embeddings(array, tmp_path, rows_per_file=10, overwrite=True)
        return {path.name: path.stat().st_ino for path in tmp_path.glob("0*.npy")}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    first = write()
    second = write()
    assert not {*first.values()} & {*second.values()}
    with monkeypatch.context() as patches:
        patches.setattr(destination, "complete", stop)
        with pytest.raises(KeyboardInterrupt):
            write()
    waiting = {path.stat().st_ino for path in tmp_path.rglob("0*.npy")} - {*second.values()}
    assert len(waiting) == 2
    found = write()
    # Of numpy arrays only the rows themselves tell whether they are the same.
    assert ({*found.values()} == waiting) is is_lazy
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)


@pytest.mark.parametrize(
    ("rows_per_file", "limit", "left"), [(5, 1000, 640), (5, 245, 125), (10, 500, 260), (1, 30, 18), (1, 1, 12)]
)
def test_a_reader_is_read_in_the_memory_that_writers_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_file: int, limit: int, left: int
) -> None:
    """And in that of a file, which is a batch."""
    asked: list[Any] = []

    def noting(manifest: Any, request: Any) -> Any:
        asked.append(request)
        return read_table_batches(manifest, request)

    np.save(tmp_path / "0.npy", ROWS)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(sources, "read_table_batches", noting)
    reader = EmbeddingReader(tmp_path / "0.npy")
    write_embeddings(reader, tmp_path / "out", rows_per_file=rows_per_file, max_ram_usage_in_bytes=limit)
    [request] = asked
    assert request.limit_nbytes == left
    assert (request.batch_rows, request.dtype, request.show_progress) == (rows_per_file, np.dtype("f4"), False)


def test_what_another_job_left_is_removed_before_anything_is_written(tmp_path: Path) -> None:
    """It may take as much of the disk as the collection."""
    write_embeddings(ROWS[:2], tmp_path)

    def batches(stop: bool, seen: list[set[str]]) -> Iterator[Any]:
        for number in range(4):
            seen.append({path.name for path in tmp_path.rglob("0*.npy")})
            yield ROWS[5 * number : 5 * number + 5], None
        if stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_embeddings(batches(True, []), tmp_path, rows_per_file=5, overwrite=True)
    assert len(list(tmp_path.rglob("0*.npy"))) == 5
    seen: list[set[str]] = []
    with pytest.raises(
        DestinationError, match=r"holds 1 file of other data already \(such as 00000000\.npy\); name an"
    ):
        write_embeddings(batches(False, seen), tmp_path, rows_per_file=5)
    assert len(list(tmp_path.rglob("0*.npy"))) == 5
    with pytest.raises(DestinationError) as caught:
        write_embeddings(batches(False, seen), tmp_path, rows_per_file=4, dtype="f8")
    assert str(caught.value) == (
        f"{tmp_path}: an interrupted run wrote something else here (another: rows_per_file was 5, now 4, dtype was "
        "'<f4', now '<f8'); run that again to finish it, or pass overwrite=True to throw away what it wrote"
    )
    seen.clear()
    write_embeddings(batches(False, seen), tmp_path, rows_per_file=10, overwrite=True)
    assert seen[1] == {"00000000.npy"}, "the old collection is all that is left"
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)


def test_a_finished_file_of_another_size_is_named(tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path, rows_per_file=5)
    with open(tmp_path / "00000002.npy", "ab") as file:
        file.write(b"12345")
    told = r"00000002\.npy: has 193 bytes, and was written with 188: it was changed or damaged; remove it to have it"
    with pytest.raises(DestinationError, match=told):
        write_embeddings(ROWS, tmp_path, rows_per_file=5)
    (tmp_path / "00000002.npy").unlink()
    write_embeddings(ROWS, tmp_path, rows_per_file=5)
    assert verify_embeddings(tmp_path).empty


@pytest.mark.parametrize("change", ["longer", "gone"])
def test_what_something_else_changes_while_it_is_written_is_named(tmp_path: Path, change: str) -> None:
    def batches() -> Iterator[Any]:
        for number in range(4):
            yield ROWS[5 * number : 5 * number + 5], None
        path = tmp_path / "00000000.npy"
        assert wait_until(lambda: (tmp_path / "_writing" / "done" / "00000000.json").exists(), 20)
        if change == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes() + b"!")

    found = {"longer": "189 bytes", "gone": "gone"}[change]
    told = rf"00000000\.npy: has {found}, and was written with 188 bytes: something else changes this folder; run this"
    with pytest.raises(Exception, match=told):
        write_embeddings(batches(), tmp_path, rows_per_file=5)


def test_parts_that_are_not_all_there_make_no_collection(tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path, rows_per_file=5)
    store, path = resolve(tmp_path)
    where = Folder(store, path, path, None)
    settings = parts.Settings(None, "npy", "embedding", 20, 5, 3, "<f4", None)
    record = parts.Record(5, 0, {}, "")
    with claim.claimed(store, where.work) as held:
        there = destination.Destination(where, settings, False, False, held, held.job)
        for numbers, told in (
            ((0, 1, 2), "15 rows written where 20 were expected"),
            ((0, 1, 2, 4), "20 rows written where 20 were expected"),
        ):
            with pytest.raises(MismatchError, match=f"^{told}$"):
                destination.finish(there, dict.fromkeys(numbers, record))
        unknown = there._replace(settings=settings._replace(rows=None))
        with pytest.raises(MismatchError, match=r"^5 rows written where others were expected$"):
            destination.finish(unknown, {1: record})


def test_parts_of_other_columns_are_told_by_the_first_file_of_each(tmp_path: Path) -> None:
    store, path = resolve(tmp_path)
    held = claim.Claim(store, path, "a" * 32, 1)
    settings = parts.Settings(None, "parquet", "embedding", 20, 5, 3, "<f4", None)
    there = destination.Destination(Folder(store, path, path, None), settings, False, False, held, "")

    def record(*names: str, kind: Any = None) -> parts.Record:
        schema = pa.schema([(name, kind or pa.int64()) for name in names])
        return parts.Record(5, 0, {}, base64.b64encode(schema.serialize()).decode())

    assert destination.check_columns(there, {}) == ()
    assert destination.check_columns(there, {0: parts.Record(5, 0, {}, "")}) == ()
    assert destination.check_columns(there, {0: record("a", "b"), 1: parts.Record(5, 0, {}, "")}) == ("a", "b")
    told = r"00000002\.parquet has the metadata columns \['b', 'a'\], but 00000001\.parquet has \['a', 'b'\]; all parts"
    with pytest.raises(MismatchError, match=told):
        destination.check_columns(there, {3: record("b", "a"), 2: record("b", "a"), 1: record("a", "b")})
    with pytest.raises(MismatchError, match=r"'a' is .*00000001\.parquet"):
        destination.check_columns(there, {0: record("a"), 1: record("a", kind=pa.string())})


# ---------------------------------------------------------------------------------------------------------------------
# Verifying


@pytest.mark.parametrize("block", [1, 60, 94, 188, 1000])
def test_every_byte_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(verify, "_BLOCK_NBYTES", block)
    write_embeddings(ROWS, tmp_path, rows_per_file=5)
    content = (tmp_path / "00000001.npy").read_bytes()
    assert len(content) == 188
    assert verify_embeddings(tmp_path).empty
    for place in (0, 59, 60, 93, 94, 187):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "00000001.npy").write_bytes(changed)
        found = verify_embeddings(tmp_path)
        assert found.to_numpy().tolist() == [
            [f"{tmp_path}/00000001.npy", "damaged: its content is not what was written"]
        ]


def test_problems_are_told_in_the_order_of_files_and_those_of_strangers_last(tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path, "parquet_npy", FRAME, rows_per_file=4)
    (tmp_path / "00000003.npy").write_bytes(b"!")
    (tmp_path / "00000000.npy").unlink()
    for name in ("z.npy", "a.parquet", ".hidden.npy", "README.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = verify_embeddings(tmp_path)
    assert list(found.columns) == ["path", "problem"]
    size = (tmp_path / "00000001.npy").stat().st_size
    stranger = "not in the manifest: it is read with the others"
    assert found.to_numpy().tolist() == [
        [f"{tmp_path}/00000000.npy", "missing"],
        [f"{tmp_path}/00000003.npy", f"has 1 byte, was written with {size}"],
        [f"{tmp_path}/a.parquet", stranger],
        [f"{tmp_path}/z.npy", stranger],
    ]


def test_a_file_that_changes_while_it_is_compared_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_BLOCK_NBYTES", 100)
    write_embeddings(ROWS, tmp_path, rows_per_file=10)

    def cut(file: Any, start: int, stop: int) -> Any:
        if start and file.path.endswith("1.npy"):
            os.truncate(file.path, 150)
        return read_range(file, start, stop)

    monkeypatch.setattr(verify, "read_range", cut)
    found = verify_embeddings(tmp_path)
    assert found.to_numpy().tolist() == [[f"{tmp_path}/00000001.npy", "was changed or removed while it was read"]]


@pytest.mark.parametrize("file_format", ["npy", "npz", "safetensors", "fvecs"])
def test_what_cannot_be_read_back_is_an_error_of_the_destination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    out = tmp_path / "out"
    damaged = out / f"00000001.{file_format}"
    contents: list[bytes] = []

    def damage(*given: Any) -> Any:
        contents.append(damaged.read_bytes())
        damaged.write_bytes(b"?" * len(contents[0]))
        return open_written(*given)

    with monkeypatch.context() as patches:
        patches.setattr(destination, "open_written", damage)
        patches.setattr(destination, "known_manifest", lambda *_: None)  # of most formats, the writer knows it all
        with pytest.raises(WriteError) as caught:
            write_embeddings(ROWS, out, file_format, rows_per_file=5)
    told = (
        rf"^{re.escape(str(out))}: what was written cannot be read back: .*{damaged.name}.* remove {out}/_writing and"
    )
    assert re.search(told, str(caught.value))
    with pytest.raises(WriteError, match="cannot be read back"):
        write_embeddings(ROWS, out, file_format, rows_per_file=5)
    damaged.write_bytes(contents[0])
    write_embeddings(ROWS, out, file_format, rows_per_file=5)
    np.testing.assert_array_equal(EmbeddingReader(out).to_dask_array().compute(), ROWS)
    damaged.write_bytes(b"?" * len(contents[0]))
    (out / "_writing").mkdir()
    write_embeddings(ROWS + 1, out, file_format, rows_per_file=5, overwrite=True)
    np.testing.assert_array_equal(EmbeddingReader(out).to_dask_array().compute(), ROWS + 1)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.decimal128(5, -2), Decimal("1E+2")),
        (pa.decimal256(50, -3), Decimal("1E+3")),
        (pa.list_(pa.decimal128(5, -2)), [Decimal("1E+2")]),
        (pa.month_day_nano_interval(), (1, 2, 3)),
    ],
    ids=str,
)
def test_a_column_of_a_type_that_parquet_has_not_is_named_before_anything_is_written(
    tmp_path: Path, kind: pa.DataType, value: Any
) -> None:
    vectors = pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2))
    table = pa.table({"embedding": vectors, "n": [1, 2, 3], "price": pa.array([value, None, value], kind)})
    (tmp_path / "in").mkdir()
    with pa.ipc.new_file(tmp_path / "in" / "0.arrow", table.schema) as file:
        file.write_table(table)
    reader = EmbeddingReader(tmp_path / "in", "arrow", meta_columns=["n", "price"])
    type_ = re.escape(str(kind))
    told = rf"column 'price' \({type_}\) cannot be stored: parquet has no {type_}: .* file_format=\"arrow\""
    for file_format in ("parquet", "parquet_npy"):
        with pytest.raises(ColumnError, match=told):
            write_embeddings(reader, tmp_path / "out", file_format)
    assert not (tmp_path / "out").exists()
    if not pa.types.is_interval(kind):  # pandas takes no such type
        frame = pd.DataFrame({"price": pd.Series(table["price"].combine_chunks(), dtype=pd.ArrowDtype(kind))})
        with pytest.raises(ColumnError, match=rf"column 'price' \({type_}.* rows 0 to 3: .* parquet has no {type_}"):
            write_embeddings(np.ones((3, 2), np.float32), tmp_path / "out", "parquet", frame)
    write_embeddings(reader, tmp_path / "out", "arrow")
    written = EmbeddingReader(tmp_path / "out", meta_columns="*").to_dask_dataframe().compute()
    assert written["price"].equals(reader.to_dask_dataframe().compute()["price"])


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_a_file_that_is_too_large_for_the_file_system_has_its_remedy(tmp_path: Path) -> None:
    program = (
        "import resource, sys, numpy as np, dask_embedding_reader as d\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: d.write_embeddings(np.ones((30_000, 4), 'float32'), sys.argv[1], rows_per_file=int(sys.argv[2]))\n"
        "except d.WriteError as error: print(error)\n"
    )

    def told(rows_per_file: int) -> str:
        command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path), str(rows_per_file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    large = r"0000000[012]\.npy: cannot be written: .*allows no file so large: choose fewer rows_per_file"
    assert re.search(large, told(10_000))
    assert list(tmp_path.glob("*.npy")) == []
    assert told(5_000) == ""
    assert verify_embeddings(tmp_path).empty
    assert EmbeddingReader(tmp_path).count == 30_000
