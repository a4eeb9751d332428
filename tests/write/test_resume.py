"""A writer may be killed anywhere, started again, or meet another one: the folder is never worse for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import dask.array as da
import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pytest

from dask_embedding_reader import EmbeddingReader, iter_batches, verify_embeddings, write_embeddings
from dask_embedding_reader.errors import CastError, DestinationError, NoFilesError, ReadError, WriteError
from dask_embedding_reader.storage.find import MANIFEST_NAME, Finder
from dask_embedding_reader.storage.put import get_file, move_file
from dask_embedding_reader.write import destination
from dask_embedding_reader.write.claim import Claim
from dask_embedding_reader.write.notes import Job

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="killing a writer takes fork()")
ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)


CASES = [(source, existing) for source in ("numpy", "batches", "dask", "reader") for existing in ("new", "existing")]


def run_killing(*arguments: Any) -> list[str]:
    command = [sys.executable, "-m", "tests.support.killing", *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True, timeout=590).stdout.split("\n")


@needs_fork
@pytest.mark.parametrize(
    ("source", "existing", "every"),
    [
        ("dask", "new", 29),
        ("reader", "existing", 29),
        *(pytest.param(*which, 1, marks=[pytest.mark.slow, pytest.mark.timeout(1_800)]) for which in CASES),
    ],
)
def test_killed_at_any_step_and_started_again(tmp_path: Path, source: str, existing: str, every: int) -> None:
    steps, *lines, _ = run_killing(source, existing, tmp_path, every)
    assert int(steps) > 30
    assert len(lines) == len(range(2, int(steps) + 1, every))
    for line in lines:
        _, first_end, seen, last_end, same, tidy = line.split()
        assert first_end == "killed", line
        # A reader between the runs sees all of one collection or is refused, never a part.
        assert seen in (("error", "new") if existing == "new" else ("old", "error", "new")), line
        assert last_end.isdigit(), line
        assert (same, tidy) == ("same", "tidy"), line


def written_at(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("0*")}


def interrupted(batches: int) -> Iterator[tuple[Any, None]]:
    for number in range(batches):
        yield ROWS[number * 5 : number * 5 + 5], None
    raise KeyboardInterrupt


def whole(shift: float = 0) -> Iterator[tuple[Any, None]]:
    for number in range(4):
        yield ROWS[number * 5 : number * 5 + 5] + np.float32(shift), None


def test_only_what_is_missing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(interrupted(2), folder, rows_per_file=5)
    before = written_at(folder)
    assert len(before) == 2
    write_embeddings(whole(), folder, rows_per_file=5)
    after = written_at(folder)
    assert len(after) == 4
    assert before.items() <= after.items()
    write_embeddings(whole(), folder, rows_per_file=5)  # complete: nothing is left to do
    assert written_at(folder) == after
    (folder / "00000002.npy").unlink()
    write_embeddings(whole(), folder, rows_per_file=5)
    assert {name for name, time in written_at(folder).items() if time != after[name]} == {"00000002.npy"}
    np.testing.assert_array_equal(EmbeddingReader(folder).to_dask_array().compute(), ROWS)


@pytest.mark.parametrize("damage", ["cut", "of another job", "gone since it was listed", "gone"])
def test_a_part_whose_record_is_of_no_use_is_the_only_one_that_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(interrupted(4), tmp_path, rows_per_file=5)
    before, record = written_at(tmp_path), tmp_path / "_writing" / "done" / "00000001.json"
    content = record.read_bytes()
    if damage == "cut":
        record.write_bytes(content[:-5])
    elif damage == "of another job":
        record.write_text(json.dumps({**json.loads(content), "job": "f" * 32}))
    elif damage == "gone":
        record.unlink()
    else:
        monkeypatch.setattr(
            destination, "get_file", lambda store, path: None if path == str(record) else get_file(store, path)
        )
    write_embeddings(whole(), tmp_path, rows_per_file=5)
    after = written_at(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {"00000001.npy"}
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)


@pytest.mark.parametrize("existing", [False, True])
def test_a_file_on_an_object_store_that_no_record_tells_of_is_written_again(existing: bool) -> None:
    """There nothing is put in the place of another file, which might be that of who took over."""
    memory, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    if existing:
        write_embeddings(ROWS[:3], f"memory:/{root}")
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(interrupted(3), f"memory:/{root}", rows_per_file=5, overwrite=existing)
    for number in (0, 1):
        memory.rm_file(f"{root}/_writing/done/0000000{number}.json")
    write_embeddings(whole(), f"memory:/{root}", rows_per_file=5, overwrite=existing)
    np.testing.assert_array_equal(EmbeddingReader(f"memory:/{root}").to_dask_array().compute(), ROWS)
    memory.rm(root, recursive=True)


def test_a_name_that_something_else_writes_to_all_the_time_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def put(_: Any, path: str, *__: Any, **___: Any) -> Any:
        tried.append(path)
        raise FileExistsError(path)

    monkeypatch.setattr(destination, "stream_file", put)
    with pytest.raises(DestinationError, match=r"00000000\.npy: something else writes files of this name; stop it"):
        write_embeddings(ROWS, tmp_path)
    assert tried == [str(tmp_path / "00000000.npy")] * 4


def test_no_manifest_is_there_while_files_take_the_place_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_embeddings(ROWS[:7], tmp_path, rows_per_file=5)
    assert (tmp_path / MANIFEST_NAME).exists()
    is_there: list[bool] = []

    def move(*given: Any) -> None:
        is_there.append((tmp_path / MANIFEST_NAME).exists())
        move_file(*given)

    monkeypatch.setattr(destination, "move_file", move)
    write_embeddings(whole(), tmp_path, rows_per_file=5, overwrite=True)
    assert is_there == [False] * 4


def test_who_finishes_while_another_writer_begins_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_note = destination._put_note

    def put_and_be_replaced(there: Any, name: str, note: Any) -> None:
        put_note(there, name, note)
        if name == destination._COMMIT:
            put_note(there, destination._JOB, Job(note.settings, (), note.job, "f" * 32))

    monkeypatch.setattr(destination, "_put_note", put_and_be_replaced)
    with pytest.raises(WriteError, match=r"_writing/job\.json: is of another writer now; look what it has written"):
        write_embeddings(ROWS, tmp_path, rows_per_file=5)


def test_finished_files_are_not_even_computed(tmp_path: Path) -> None:
    computed: list[int] = []

    def note(block: Any, fail: bool, block_info: Any = None) -> Any:
        number = block_info[0]["chunk-location"][0]
        if fail and number == 2:
            raise ZeroDivisionError
        computed.append(number)
        return block

    class Note:
        """A function whose token is the same whether it fails or not."""

        def __init__(self, fail: bool) -> None:
            self.fail = fail

        def __call__(self, block: Any, block_info: Any = None) -> Any:
            return note(block, self.fail, block_info)

        def __dask_tokenize__(self) -> str:
            return "note"

    def lazy(fail: bool) -> da.Array:
        noted: da.Array = da.from_array(ROWS, chunks=(5, 3)).map_blocks(Note(fail), dtype=ROWS.dtype, meta=ROWS[:0])
        return noted

    import dask

    with dask.config.set(scheduler="synchronous"):
        with pytest.raises(ZeroDivisionError):
            write_embeddings(lazy(True), tmp_path, rows_per_file=5)
        assert 0 < len(computed) < 4
        write_embeddings(lazy(False), tmp_path, rows_per_file=5)
    assert sorted(computed) == [0, 1, 2, 3]
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)


def test_a_collection_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(interrupted(2), folder, rows_per_file=5)
    with pytest.raises(ReadError, match=r"interrupted.*run the writing again"):
        EmbeddingReader(folder)
    # What is there can be had by name.
    assert EmbeddingReader(f"{folder}/*.npy").count == 10


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_collection_without_a_file_yet_is_said_to_be_unfinished(tmp_path: Path, where: str) -> None:
    folder = str(tmp_path / "out") if where == "local" else f"memory://{tmp_path}"
    with pytest.raises(CastError):
        write_embeddings(ROWS + 1e9, folder, dtype="float16", rows_per_file=5)
    for file_format in ("npy", "parquet"):
        with pytest.raises(NoFilesError, match=r"interrupted or failed.*run the writing again"):
            EmbeddingReader(folder, file_format)
    write_embeddings(ROWS, folder, dtype="float16", rows_per_file=5, overwrite=True)
    assert EmbeddingReader(folder).count == len(ROWS)


@pytest.mark.parametrize("rows_per_file", [None, 3, 4])
def test_pairs_that_are_replaced_while_they_are_opened_are_never_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_file: int | None
) -> None:
    """A killed writer found this: old vectors met new metadata. Both are listed at once now."""
    table = pd.DataFrame({"id": np.arange(len(ROWS))})
    write_embeddings(ROWS, tmp_path, "parquet_npy", table, rows_per_file=5)
    (tmp_path / ".manifest.embeddings").unlink()  # so that every header is read
    listings = count()

    find = Finder.find

    def replacing(*args: Any, **kwargs: Any) -> Any:
        if next(listings) == 1:
            if rows_per_file:
                write_embeddings(
                    ROWS[:12], tmp_path, "parquet_npy", table[:12], rows_per_file=rows_per_file, overwrite=True
                )
            else:
                (tmp_path / "_writing").mkdir()
                (tmp_path / "_writing" / "incomplete").touch()
        return find(*args, **kwargs)

    monkeypatch.setattr(Finder, "find", replacing)
    reader = EmbeddingReader(tmp_path, "parquet_npy", meta_columns=["id"])
    assert reader.count == (12 if rows_per_file else len(ROWS))
    [(rows, frame)] = reader(100, show_progress=False)
    np.testing.assert_array_equal(rows, ROWS[frame["id"]])


@pytest.mark.parametrize("what", ["rows", "settings", "shorter"])
def test_other_data_is_never_mixed_in(tmp_path: Path, what: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(interrupted(3), tmp_path, rows_per_file=5)

    def other(overwrite: bool) -> None:
        if what == "rows":
            write_embeddings(whole(shift=1), tmp_path, rows_per_file=5, overwrite=overwrite)
        elif what == "settings":
            write_embeddings(whole(), tmp_path, rows_per_file=4, overwrite=overwrite)
        else:
            write_embeddings(list(whole())[:2], tmp_path, rows_per_file=5, overwrite=overwrite)

    expected = {
        "rows": "rows 0 to 5 were written before with other values",
        "settings": r"interrupted run wrote something else here.*rows_per_file was 5, now 4",
        "shorter": "3 files written before, 2 now",
    }
    with pytest.raises(DestinationError, match=expected[what]):
        other(overwrite=False)
    other(overwrite=True)
    rows = EmbeddingReader(tmp_path).to_dask_array().compute()
    np.testing.assert_array_equal(rows, ROWS[:10] if what == "shorter" else ROWS + (what == "rows"))


def test_a_record_does_not_tell_of_a_file_that_took_the_place_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other rows, in files of the same size, were stopped before the record of the first one."""
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(interrupted(1), tmp_path, rows_per_file=5)
    put = Claim.put

    def stop(held: Claim, path: str, data: bytes) -> None:
        if "/done/" in path:
            raise KeyboardInterrupt
        put(held, path, data)

    with monkeypatch.context() as patches:
        patches.setattr(Claim, "put", stop)
        with pytest.raises(KeyboardInterrupt):
            write_embeddings(whole(shift=1), tmp_path, rows_per_file=5, overwrite=True)
    write_embeddings(whole(), tmp_path, rows_per_file=5)
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)
    assert verify_embeddings(tmp_path).empty


@pytest.mark.parametrize("is_lazy", [False, True])
def test_what_ended_before_its_first_file_is_in_nobodys_way(tmp_path: Path, is_lazy: bool) -> None:
    """A cast that is refused advises another dtype: with that it goes."""
    rows = ROWS * np.float32(1e6)
    array = da.from_array(rows, chunks=(20, 3)) if is_lazy else rows
    with pytest.raises(CastError, match="choose a wider dtype"):
        write_embeddings(array, tmp_path, dtype="float16")
    write_embeddings(array, tmp_path)
    with pytest.raises(CastError, match="choose a wider dtype"):
        write_embeddings(array, tmp_path, dtype="float16", overwrite=True)
    with pytest.raises(DestinationError, match="holds 1 file of other data"):
        write_embeddings(array, tmp_path, dtype="float64")
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), rows)
    write_embeddings(array, tmp_path, dtype="float64", overwrite=True)
    assert EmbeddingReader(tmp_path).dtype == np.float64
    assert verify_embeddings(tmp_path).empty


@pytest.mark.parametrize("npartitions", [None, 2])
def test_a_lazy_array_with_other_metadata_is_other_data(tmp_path: Path, npartitions: int | None) -> None:
    """Only its name tells that nothing is left to do."""
    array = da.from_array(ROWS, chunks=(10, 3))
    for shift in (0, 1):
        frame: Any = pd.DataFrame({"id": np.arange(20) + shift})
        if npartitions is not None:
            frame = dd.from_pandas(frame, npartitions=npartitions)
        if shift:
            with pytest.raises(DestinationError, match=r"2 files of other data"):
                write_embeddings(array, tmp_path, "parquet", frame, rows_per_file=10)
        write_embeddings(array, tmp_path, "parquet", frame, rows_per_file=10, overwrite=bool(shift))
        [(_, found)] = EmbeddingReader(tmp_path, meta_columns=["id"])(20, show_progress=False)
        assert found["id"].tolist() == [*range(shift, 20 + shift)]


def test_existing_data_needs_overwrite_and_goes_last(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep")
    np.save(tmp_path / "old.npy", ROWS[:2])
    with pytest.raises(DestinationError, match=r"1 file of other data.*old.npy.*overwrite=True"):
        write_embeddings(ROWS, tmp_path)
    seen = []

    def watched() -> Iterator[tuple[Any, None]]:
        for batch in whole():
            seen.append(EmbeddingReader(tmp_path).count)  # the old data are there, and alone, to the end
            yield batch

    write_embeddings(watched(), tmp_path, rows_per_file=5, overwrite=True)
    assert seen == [2, 2, 2, 2]
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)
    assert not (tmp_path / "old.npy").exists()
    assert (tmp_path / "notes.txt").read_text() == "keep"


def test_a_collection_can_take_its_own_place(tmp_path: Path) -> None:
    write_embeddings(ROWS, tmp_path, rows_per_file=3)
    write_embeddings(EmbeddingReader(tmp_path), tmp_path, rows_per_file=7, dtype="float64", overwrite=True)
    reader = EmbeddingReader(tmp_path)
    assert reader.nb_files == 3
    np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS.astype(np.float64))


def test_data_in_folders_below_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    np.save(tmp_path / "theirs" / "x.npy", ROWS)
    with pytest.raises(DestinationError, match=r"theirs/x.npy.*not replaced"):
        write_embeddings(ROWS, tmp_path, overwrite=True)
    assert (tmp_path / "theirs" / "x.npy").exists()


def test_a_second_writer_is_told_who_is_first(tmp_path: Path) -> None:
    second: list[BaseException] = []

    def meets_another() -> Iterator[tuple[Any, None]]:
        for number, batch in enumerate(whole()):
            if number == 2:
                for array in (ROWS, da.from_array(ROWS), whole()):
                    with pytest.raises(DestinationError, match=rf"process {os.getpid()} on .* is writing") as caught:
                        write_embeddings(array, tmp_path, rows_per_file=5, overwrite=True)
                    second.append(caught.value)
            yield batch

    write_embeddings(meets_another(), tmp_path, rows_per_file=5)
    assert len(second) == 3
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)


def test_of_many_that_start_together_no_two_write(tmp_path: Path) -> None:
    won = 0
    lock = threading.Lock()

    def write(number: int) -> None:
        nonlocal won
        try:
            write_embeddings(whole(number), tmp_path, rows_per_file=5)
            with lock:
                won += 1
        except DestinationError:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == 1
    rows = EmbeddingReader(tmp_path).to_dask_array().compute()
    shift = rows[0, 0]
    np.testing.assert_array_equal(rows, ROWS + shift)


def test_the_claim_of_a_dead_writer_and_of_a_silent_one_are_passed_over(tmp_path: Path) -> None:
    work = tmp_path / "_writing"
    work.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    from dask_embedding_reader.write import claim

    own = json.loads(claim._content())
    (work / "writer-1.json").write_text(json.dumps({**own, "pid": dead.pid}))
    (work / "writer-2.json").write_text(json.dumps({**own, "process_started": own["process_started"] - 100}))
    (work / "writer-3.json").write_text(json.dumps({**own, "machine": "other", "alive_at": own["alive_at"] - 1000}))
    write_embeddings(ROWS, tmp_path)
    assert not work.exists()
    work.mkdir()
    (work / "writer-4.json").write_text(json.dumps({**own, "machine": "other", "host": "far-away"}))
    with pytest.raises(DestinationError, match=r"on far-away is writing.*remove .*writer-4.json"):
        write_embeddings(ROWS + 1, tmp_path, overwrite=True)


def test_a_writer_that_was_taken_for_dead_does_not_finish(tmp_path: Path) -> None:
    def loses_its_claim() -> Iterator[tuple[Any, None]]:
        yield from whole()
        for path in (tmp_path / "_writing").glob("writer-*"):
            path.unlink()

    with pytest.raises(DestinationError, match="took this one for dead"):
        write_embeddings(loses_its_claim(), tmp_path, rows_per_file=5)
    write_embeddings(whole(), tmp_path, rows_per_file=5)
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)


def test_a_pass_over_a_lazy_expression_can_be_resumed(tmp_path: Path) -> None:
    x = da.from_array(ROWS, chunks=(5, 3))
    frame = pd.DataFrame({"n": np.arange(20)})

    def batches(stop_after: int) -> Iterator[Any]:
        for number, batch in enumerate(iter_batches(x - x.mean(axis=0), frame, batch_size=6)):
            if number == stop_after:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        write_embeddings(batches(2), tmp_path, "parquet", rows_per_file=5)
    write_embeddings(batches(99), tmp_path, "parquet", rows_per_file=5)
    reader = EmbeddingReader(tmp_path, "parquet", meta_columns="n")
    np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS - ROWS.mean(axis=0))
    assert reader.to_dask_dataframe()["n"].compute().tolist() == list(range(20))


@pytest.mark.parametrize("file_format", ["parquet", "arrow", "parquet_npy"])
def test_batches_that_are_cut_otherwise_are_the_same_data(tmp_path: Path, file_format: str) -> None:
    frame = pd.DataFrame(
        {"word": [f"word {'s' * (n % 4)}" for n in range(20)], "none": [None, "a"] * 10, "n": np.arange(20)}
    )
    frame["kind"] = pd.Categorical(["a", "b", "c", "a"] * 5)
    for step in (10, 20, 3, 7):
        batches = ((ROWS[start : start + step], frame[start : start + step]) for start in range(0, 20, step))
        write_embeddings(batches, tmp_path, file_format, rows_per_file=8)
    reader = EmbeddingReader(tmp_path, file_format, meta_columns="*")
    pd.testing.assert_frame_equal(
        reader.to_dask_dataframe().compute().reset_index(drop=True)[["word", "n"]].astype({"word": object}),
        frame[["word", "n"]].astype({"word": object}),
    )


def test_longer_batches_that_are_refused_leave_what_is_complete(tmp_path: Path) -> None:
    """The last file of what is there is a shorter one: more rows are other data, and no file may be begun for them."""
    rows = np.arange(40, dtype=np.float32).reshape(20, 2)
    write_embeddings(iter([(rows[:3], None)]), tmp_path, rows_per_file=5)
    with pytest.raises(DestinationError, match="with other values"):
        write_embeddings(iter([(rows, None)]), tmp_path, rows_per_file=5)
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), rows[:3])


def test_fewer_batches_do_not_remove_the_last_file_of_a_collection_that_lost_another_one(tmp_path: Path) -> None:
    write_embeddings(whole(), tmp_path, rows_per_file=5)
    os.remove(tmp_path / "00000001.npy")
    with pytest.raises(DestinationError, match="4 files written before, 3 now: this is other data"):
        write_embeddings(list(whole())[:3], tmp_path, rows_per_file=5)
    np.testing.assert_array_equal(np.load(tmp_path / "00000003.npy"), ROWS[15:])
    write_embeddings(whole(), tmp_path, rows_per_file=5)
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)


@pytest.mark.parametrize("stranger", ["00000002.npy", "more.npy"])
def test_files_that_somebody_put_beside_a_finished_collection_are_kept(tmp_path: Path, stranger: str) -> None:
    for attempt in range(2):
        write_embeddings(ROWS, tmp_path, rows_per_file=10)
        (tmp_path / "00000000.parquet").write_bytes(b"metadata that belong to the first file")
        if attempt == 0:
            (tmp_path / "00000001.npy").unlink()  # as verify_embeddings advises of damaged ones
    np.testing.assert_array_equal(EmbeddingReader(tmp_path, "npy").to_dask_array(), ROWS)
    assert (tmp_path / "00000000.parquet").exists()

    np.save(tmp_path / stranger, ROWS[:5])
    write_embeddings(ROWS, tmp_path, rows_per_file=10)  # nothing is missing
    (tmp_path / "00000001.npy").unlink()
    with pytest.raises(DestinationError, match=rf"holds 1 file of other data already \(such as {stranger}\)"):
        write_embeddings(ROWS, tmp_path, rows_per_file=10)
    np.testing.assert_array_equal(np.load(tmp_path / stranger), ROWS[:5])

    write_embeddings(ROWS, tmp_path, rows_per_file=10, overwrite=True)
    assert not (tmp_path / stranger).exists()
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array(), ROWS)


@pytest.mark.parametrize("file_format", ["npy", "parquet", "parquet_fbin"])
def test_what_is_there_of_a_collection_is_read_as_the_error_says(tmp_path: Path, file_format: str) -> None:
    def batches() -> Iterator[tuple[np.ndarray, pd.DataFrame | None]]:
        for start in range(0, 20, 5):
            frame = None if file_format == "npy" else pd.DataFrame({"word": np.arange(start, start + 5)})
            yield ROWS[start : start + 5], frame
        raise ConnectionError

    with pytest.raises(ConnectionError):
        write_embeddings(batches(), tmp_path, file_format, rows_per_file=5)
    with pytest.raises(ReadError, match="being written") as caught:
        EmbeddingReader(tmp_path)
    written = EmbeddingReader(str(caught.value).rpartition(" ")[2])
    assert written.count in (15, 20)
    np.testing.assert_array_equal(written.to_dask_array().compute(), ROWS[: written.count])
