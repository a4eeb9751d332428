"""Notes of writers are bytes that anybody may have put into a folder: they harm nothing, and no error is a raw one."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader, verify_embeddings, write_embeddings
from dask_embedding_reader.errors import DestinationError
from dask_embedding_reader.storage import local as writing
from dask_embedding_reader.write import claim
from dask_embedding_reader.write.notes import is_inside

ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)
SETTINGS: dict[str, Any] = {
    "token": None,
    "file_format": "npy",
    "embedding_column": "embedding",
    "rows": 20,
    "rows_per_file": 5,
    "dimension": 3,
    "dtype": "<f4",
    "scale": None,
}
JOB: dict[str, Any] = {"settings": SETTINGS, "replaces": [], "job": "0" * 32, "writer": "1" * 32}
COMMIT: dict[str, Any] = {
    "settings": SETTINGS,
    "columns": [],
    "files": {"00000000.npy": [188, "a" * 64]},
    "move": ["00000000.npy"],
    "remove": ["old.npy"],
    "rows": 20,
    "job": "0" * 32,
    "writer": "1" * 32,
}
RECORD: dict[str, Any] = {"rows": 5, "not_finite": 0, "files": {"00000000.npy": [188, "a" * 64]}, "columns": ""}
SIGN: dict[str, Any] = json.loads(claim._content("2" * 32))
NOTES = {"job.json": JOB, "commit.json": COMMIT, "done/00000000.json": RECORD, "writer-00000001.json": SIGN}

OUTSIDE = [
    *("../precious.npy", "a/../../precious.npy", "..", "", ".", "/", "./0.npy", "a//0.npy", "/precious.npy"),
    *("..\\precious.npy", "C:\\precious.npy", "C:precious.npy", "\\\\host\\precious.npy", "precious.npy\0", "\0"),
    *("file:///precious.npy", "s3://bucket/precious.npy", "zip://a::b.npy", "_writing/../../precious.npy"),
    *("../precious.npy/", "a/..", "x" * 5000 + ".npy", "_manifest.parquet", "README.txt", ".hidden.npy"),
]


def put(place: str, notes: dict[str, bytes], data: str = "old.npy") -> None:
    """A folder with a file of a stranger, notes, and something precious beside it."""
    filesystem, path = fsspec.core.url_to_fs(place)
    files = {data: b"old", **{f"_writing/{name}": content for name, content in notes.items()}}
    for name, content in {"../precious.npy": b"precious", **files}.items():
        target = os.path.normpath(f"{path}/{name}")
        filesystem.makedirs(os.path.dirname(target), exist_ok=True)
        filesystem.pipe_file(target, content)


def content(place: str) -> dict[str, bytes]:
    """All that is there, with what lies beside it; but for what tells of a claim."""
    filesystem, path = fsspec.core.url_to_fs(place)
    root = os.path.dirname(path)
    return {name: filesystem.cat_file(name) for name in filesystem.find(root)}


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}/out"


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("key", ["replaces", "remove", "move", "files", "job"])
def test_names_that_lead_out_are_refused_before_anything_is_touched(place: str, key: str, name: str) -> None:
    job, commit = dict(JOB), dict(COMMIT)
    note = job if key == "replaces" else commit
    note[key] = {"files": {name: [8, "a" * 64]}, "job": name}.get(key, [name])
    if key == "files":
        commit["move"] = []
    if key == "job" and name == "":
        pytest.skip("earlier releases name no job")
    notes = {"job.json": json.dumps(job).encode()}
    if key != "replaces":
        notes["commit.json"] = json.dumps(commit).encode()
    put(place, notes)
    before = content(place)
    for overwrite in (False, True):
        with pytest.raises(DestinationError, match=r"_writing/(job|commit).json: is damaged: .*; run this again, and"):
            write_embeddings(ROWS, place, rows_per_file=5, overwrite=overwrite)
        assert content(place) == before


@given(name=st.one_of(st.sampled_from(OUTSIDE), st.text("./\\:_a0\0~%", max_size=12).map(lambda text: text + ".npy")))
def test_a_name_that_passes_stays_inside(name: str) -> None:
    if is_inside(name):
        assert os.path.normpath(f"/root/{name}") == f"/root/{name}"
        assert "\\" not in name
        assert not (name[0].isalpha() and name[1] == ":")


def test_how_long_a_name_may_be() -> None:
    assert [is_inside(f"{'x' * (length - 4)}.npy") for length in (5, 4096, 4097)] == [True, True, False]


@pytest.mark.parametrize("link", ["_writing", "_writing/done", "_writing/files", "_writing/files/" + "0" * 32])
def test_links_among_notes_are_refused(tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "00000000.npy").write_text("precious")
    path = tmp_path / "out" / link
    path.parent.mkdir(parents=True)
    path.symlink_to(outside, target_is_directory=True)
    with pytest.raises(DestinationError, match=r"is a link among the notes of writers.*remove it"):
        write_embeddings(ROWS, tmp_path / "out", overwrite=True)
    assert (outside / "00000000.npy").read_text() == "precious"


def test_a_file_whose_name_means_something_else_elsewhere_is_not_replaced(tmp_path: Path) -> None:
    np.save(tmp_path / "a\\b.npy", ROWS)
    with pytest.raises(DestinationError, match="remove it, or name another folder"):
        write_embeddings(ROWS, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a\\b.npy"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
@pytest.mark.parametrize("name", NOTES)
def test_a_pipe_in_the_place_of_a_note_is_an_error_and_no_hang(tmp_path: Path, name: str) -> None:
    path = tmp_path / "_writing" / name
    path.parent.mkdir(parents=True)
    if name.startswith("done"):
        (tmp_path / "_writing" / "job.json").write_text(json.dumps({**JOB, "settings": {**SETTINGS, "rows": 20}}))
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        write_embeddings(ROWS, tmp_path, rows_per_file=5)


ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    [],
    {},
    [[]],
    [1],
    {"a": 1},
]
DEEP = b"[" * 100_000 + b"]" * 100_000


def damaged(note: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """What may stand where a note was: other types, fewer and more keys, half of it, anything."""
    values = st.sampled_from(ODD) | st.recursive(st.none() | st.text(max_size=3), st.lists, max_leaves=4)
    spelled = json.dumps(note).encode()
    changed = st.fixed_dictionaries({}, optional={**dict.fromkeys(note, values), "more": values})
    less = st.sets(st.sampled_from(sorted(note)), max_size=2)
    settings = st.fixed_dictionaries({}, optional=dict.fromkeys(SETTINGS, values))
    return st.one_of(
        st.builds(lambda new, gone: _spell({k: v for k, v in {**note, **new}.items() if k not in gone}), changed, less),
        settings.map(lambda new: _spell({**note, "settings": {**SETTINGS, **new}})),
        st.integers(0, len(spelled)).map(lambda stop: spelled[:stop]),
        st.binary(max_size=20),
        st.sampled_from([DEEP, b'{"settings": ' + DEEP + b"}", b"\xff\xfe", b"null", b'{"a": 1' + b"0" * 9999 + b"}"]),
    )


def _spell(note: Any) -> bytes:
    return json.dumps(note).replace(str(10**400), "1" + "0" * 400).encode()


@given(st.data())
def test_damaged_notes_are_errors_that_name_them_or_passed_over(data: st.DataObject) -> None:
    place = f"memory://{uuid.uuid4().hex}/out"
    name = data.draw(st.sampled_from(sorted(NOTES)))
    notes = {name: data.draw(damaged(NOTES[name]))}
    if name != "job.json" and data.draw(st.booleans()):
        notes["job.json"] = json.dumps(JOB).encode()
    put(place, notes, "README.txt")
    said = ""
    try:
        write_embeddings(ROWS, place, rows_per_file=5, overwrite=True)
    except DestinationError as error:
        said = str(error)
    if said:
        assert name in said or "is writing to this folder" in said
        assert "remove" in said
        assert len(said) < 1000
    else:
        np.testing.assert_array_equal(EmbeddingReader(place).to_dask_array().compute(), ROWS)
        assert verify_embeddings(place).empty
    memory = fsspec.filesystem("memory")
    assert memory.cat_file(f"{place.removeprefix('memory:/').removesuffix('/out')}/precious.npy") == b"precious"
    memory.rm(place.removesuffix("/out"), recursive=True)


@pytest.mark.parametrize(
    ("changed", "is_damaged"),
    [
        ({"pid": 2**31 - 1}, False),
        ({"pid": 2**31}, True),
        ({"pid": 1, "machine": "other"}, False),
        ({"pid": 0}, True),
        ({"alive_at": 0}, False),
        ({"alive_at": -0.5}, True),
        ({"alive_at": 2**40 - 1, "machine": "here", "pid": 2}, None),
        ({"alive_at": 2**40}, True),
    ],
)
def test_a_claim_of_no_process_or_no_time_is_damaged(
    tmp_path: Path, changed: dict[str, Any], is_damaged: bool | None
) -> None:
    (tmp_path / "_writing").mkdir()
    sign = {**SIGN, "pid": 2**31 - 1, "alive_at": 1, **changed}
    (tmp_path / "_writing" / "writer-00000001.json").write_text(json.dumps(sign))
    if is_damaged is False:
        write_embeddings(ROWS, tmp_path)
        return
    said = "cannot be read: .*; run this again" if is_damaged else "is writing to this folder"
    with pytest.raises(DestinationError, match=said):
        write_embeddings(ROWS, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        *((key, 0, "is 0, not an integer from 1 on") for key in ("rows", "rows_per_file", "dimension")),
        ("scale", 10**400, r"is 10{59}\.\.\., not a finite number"),
    ],
)
def test_a_commit_of_numbers_that_make_no_sense_is_damaged(place: str, key: str, value: int, told: str) -> None:
    notes = {"job.json": JOB, "commit.json": {**COMMIT, "settings": {**SETTINGS, key: value}}}
    put(place, {name: json.dumps(note).encode() for name, note in notes.items()})
    with pytest.raises(DestinationError, match=rf"commit.json: is damaged: {key} {told}"):
        write_embeddings(ROWS, place, overwrite=True)


def test_a_commit_of_columns_that_no_file_of_its_kind_has_is_damaged(place: str) -> None:
    notes = {"job.json": JOB, "commit.json": {**COMMIT, "columns": ["a"]}}
    put(place, {name: json.dumps(note).encode() for name, note in notes.items()})
    before = content(place)
    with pytest.raises(DestinationError, match=r"commit.json: is damaged: columns is \['a'\], not empty"):
        write_embeddings(ROWS, place, overwrite=True)
    assert content(place) == before


def test_nothing_is_removed_for_what_was_never_written(place: str) -> None:
    put(place, {"job.json": json.dumps(JOB).encode(), "commit.json": json.dumps(COMMIT).encode()})
    before = content(place)
    with pytest.raises(DestinationError, match=r"commit.json: says that 00000000.npy was written, but it has gone"):
        write_embeddings(ROWS, place, overwrite=True)
    assert content(place) == before


def test_a_job_of_the_release_before_is_gone_on_with(tmp_path: Path) -> None:
    """Its notes name no writer, and its files wait in another folder."""
    np.save(tmp_path / "old.npy", ROWS[:2])
    staged = tmp_path / "_writing" / "files"
    staged.mkdir(parents=True)
    np.save(staged / "00000000.npy", ROWS[:5])
    kept = (staged / "00000000.npy").stat()
    facts = {"settings": SETTINGS, "replaces": ["old.npy"]}
    (tmp_path / "_writing" / "job.json").write_text(json.dumps(facts))
    (tmp_path / "_writing" / "done").mkdir()
    checksum = hashlib.sha256((staged / "00000000.npy").read_bytes()).hexdigest()
    columns = base64.b64encode(pa.schema([]).serialize()).decode()
    record = {"rows": 5, "not_finite": 0, "files": {"00000000.npy": [kept.st_size, checksum]}, "columns": columns}
    (tmp_path / "_writing" / "done" / "00000000.json").write_text(json.dumps(record))
    write_embeddings(ROWS, tmp_path, rows_per_file=5, overwrite=True)
    assert (tmp_path / "00000000.npy").stat().st_mtime_ns == kept.st_mtime_ns
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)
    assert not (tmp_path / "_writing").exists()


# --------------------------------------------------------------------------------------------------------------------
# What a loss of power leaves


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    named: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_name(source: str, target: str) -> None:
        if target.endswith(".npy"):
            assert os.stat(source).st_ino in synced
            named.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_name)
    write_embeddings(ROWS, tmp_path, rows_per_file=5)
    assert sorted(named) == [f"{number:08d}.npy" for number in range(4)]


def test_what_the_system_writes_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_open(*arguments: Any, **options: Any) -> Any:
        file = open(*arguments, **options)  # noqa: SIM115 - whoever asked for it closes it
        if options.get("buffering") == 0:
            write = file.write
            file.write = lambda data: write(data[: max(1, len(data) // 2)])
        return file

    monkeypatch.setattr(writing, "open", slow_open, raising=False)
    write_embeddings(ROWS, tmp_path, rows_per_file=5)
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)
    assert verify_embeddings(tmp_path).empty


def test_a_part_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    def batches(stop: bool) -> Any:
        for number in range(4):
            if stop and number == 3:
                raise KeyboardInterrupt
            yield ROWS[5 * number : 5 * number + 5], None

    with pytest.raises(KeyboardInterrupt):
        write_embeddings(batches(stop=True), tmp_path, rows_per_file=5)
    with open(tmp_path / "00000001.npy", "r+b") as file:
        file.truncate(150)
    write_embeddings(batches(stop=False), tmp_path, rows_per_file=5)
    np.testing.assert_array_equal(EmbeddingReader(tmp_path).to_dask_array().compute(), ROWS)
