"""Picked rows of a file: however near they are to each other and wherever they go, what numpy picks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader, FileChangedError
from dask_embedding_reader.formats import picking
from dask_embedding_reader.formats.base import Array, FileHeader, Stretch, StretchReader
from dask_embedding_reader.storage.read import try_read_in_turn
from dask_embedding_reader.storage.store import StoredFile
from dask_embedding_reader.storage.urls import resolve
from tests.support.collections import Collection, write_collection
from tests.support.scattered import watch_scattered

Int64s = npt.NDArray[np.int64]

ROWS, DIMENSION = 400, 4
ROW_NBYTES = 4 * DIMENSION

_PLAIN = {"compression": "none", "use_dictionary": False, "data_page_size": 700}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "npy": ("npy", {}),
    "fvecs": ("fvecs", {}),
    "compressed": ("parquet-list", {"row_group_rows": 150}),
    "plain pages": ("parquet-fixed-size-list", {"row_group_rows": 150, "parquet_options": _PLAIN}),
    "deflated": ("npz-deflated", {}),
}


@pytest.fixture(scope="module", params=list(KINDS))
def collection(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """One file of each kind that is read in a way of its own."""
    name, options = KINDS[request.param]
    folder = tmp_path_factory.mktemp("picking")
    return write_collection(folder, name, file_rows=[ROWS], dimension=DIMENSION, columns=[], **options)


@st.composite
def selections(draw: st.DrawFn) -> Int64s:
    """Rows that do not descend: here and there, in runs, nearly all, or some of them twice."""
    chosen = np.zeros(ROWS, np.bool_)
    for start, length, every in draw(
        st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(1, ROWS), st.integers(1, 40)), min_size=1, max_size=6)
    ):
        chosen[start : start + length : every] = True
    left_out = draw(st.lists(st.integers(0, ROWS - 1), max_size=10))
    chosen[left_out] = False
    rows = np.flatnonzero(chosen)
    again = draw(st.lists(st.sampled_from(rows.tolist()), max_size=3)) if len(rows) else []
    for place in draw(st.lists(st.integers(1, len(rows) - 1), max_size=5)) if len(rows) > 1 else []:
        rows[place] = rows[place - 1]  # twice, with a gap behind: as many rows as without
    return np.sort(np.concatenate([rows, np.array(again, np.int64)]))


@example(
    np.array([*range(0, 140, 14), 140, 140, 142]), 1, 5, 7, 1, np.float32, 1, "in order", 0, True
)  # one twice, one not
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=selections(),
    gap=st.sampled_from([0, 1, 3, 30]),
    long=st.sampled_from([2, 5, 100]),
    scratch=st.sampled_from([1, 7, 50, 1000]),
    run=st.sampled_from([1, 3]),
    dtype=st.sampled_from([np.float32, np.float64, np.float16]),
    arrays=st.integers(1, 4),
    order=st.sampled_from(["in order", "elsewhere", "anywhere", "two runs"]),
    seed=st.integers(0, 3),
    local=st.booleans(),
)
def test_rows_are_put_where_they_belong(
    collection: Collection,
    rows: Int64s,
    gap: int,
    long: int,
    scratch: int,
    run: int,
    dtype: npt.DTypeLike,
    arrays: int,
    order: str,
    seed: int,
    local: bool,
) -> None:
    rng = np.random.default_rng(seed)
    room = len(rows) + (50 if order == "elsewhere" else 0)
    places = {
        "in order": None,
        "elsewhere": np.arange(len(rows)) + 50,
        "anywhere": rng.permutation(len(rows)),
        "two runs": np.roll(np.arange(len(rows)), len(rows) // 3),
    }[order]
    cuts = np.sort(rng.integers(0, room + 1, arrays - 1)).tolist()
    outs = [np.full((stop - start, DIMENSION), 7, dtype) for start, stop in zip([0, *cuts], [*cuts, room], strict=True)]
    # Remote ones are asked for otherwise; how bytes come from there is tested elsewhere.
    manifest = collection.open().manifest
    header = manifest.vectors.header(0)
    cost = 0 if local else 1
    where = mock.patch.object(type(header.file.store), "request_nbytes", mock.PropertyMock(return_value=cost))
    with (
        where,
        mock.patch.multiple(
            picking,
            _GAP_NBYTES=gap * ROW_NBYTES,
            _LONG_NBYTES=long * ROW_NBYTES,
            _RUN_NBYTES=run * ROW_NBYTES,
            SCRATCH_NBYTES=scratch * ROW_NBYTES,
            _SHORT_ROWS=1 + seed,
        ),
    ):
        if len(rows):
            picking.read_picked(manifest.format.vectors, manifest.columns, header, rows, outs, places)
    expected = np.full((room, DIMENSION), 7, dtype)
    expected[slice(None) if places is None else places] = collection.rows[rows]
    np.testing.assert_array_equal(np.concatenate(outs), expected)


class _Noting:
    """A format that notes which rows it is asked for, call by call."""

    def __init__(self, vectors: Any) -> None:
        self._vectors = vectors
        self.calls: list[list[tuple[int, int]]] = []
        self.outs: list[Array] = []

    def raw_offset(self, header: FileHeader) -> None:
        """Tell that rows cannot be scattered: that is no call of this format."""

    def open_stretches(self, *args: Any) -> StretchReader:
        read = self._vectors.open_stretches(*args)

        def note(stretches: Sequence[Stretch]) -> None:
            self.calls.append([(row, row + len(out)) for row, out in stretches])
            self.outs += [out for _, out in stretches]
            read(stretches)

        return note


def _read_together(rows: Sequence[int], gap: int, most: int) -> list[tuple[int, int]]:
    """Rows between which no more than a gap lies, cut into windows from the first of them on."""
    together: list[list[int]] = []
    for row in rows:
        if not together or row - together[-1][-1] - 1 > gap:
            together.append([])
        together[-1].append(row)
    found = []
    for near in together:
        for window in range(0, near[-1] - near[0] + 1, most):
            here = [row for row in near if window <= row - near[0] < window + most]
            found += [(here[0], here[-1] + 1)] if here else []
    return found


@pytest.mark.parametrize("collection", ["npy"], indirect=True)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=selections().filter(len),
    gap=st.sampled_from([0, 3, 30]),
    worth=st.sampled_from([0, 1, 7, 8, 60]),
    scratch=st.sampled_from([1, 50, 1000]),
    requests=st.sampled_from([1, 5, 64]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_near_rows_are_read_together(
    collection: Collection, rows: Int64s, gap: int, worth: int, scratch: int, requests: int, dtype: npt.DTypeLike
) -> None:
    """Of remote files where less than half of what a request is worth lies between; of local ones no run is cut."""
    manifest = collection.open().manifest
    header, vectors = manifest.vectors.header(0), _Noting(manifest.format.vectors)
    out = np.empty((len(rows), DIMENSION), dtype)
    with (
        mock.patch.object(
            type(header.file.store), "request_nbytes", mock.PropertyMock(return_value=worth * ROW_NBYTES)
        ),
        mock.patch.multiple(
            picking,
            _GAP_NBYTES=gap * ROW_NBYTES,
            _REMOTE_REQUESTS=requests,
            SCRATCH_NBYTES=scratch * ROW_NBYTES,
        ),
    ):
        picking.read_picked(cast("Any", vectors), manifest.columns, header, rows, [out])
    np.testing.assert_array_equal(out, collection.rows[rows])
    asked = [stretch for call in vectors.calls for stretch in call]
    if worth:
        assert asked == _read_together(rows.tolist(), max(gap, worth // 2), max(scratch, 8 * worth))
        assert max(map(len, vectors.calls)) <= requests
    elif len(rows) > 16:
        runs = _read_together(np.unique(rows).tolist(), 0, len(collection.rows))
        windows = -(-len(collection.rows) // scratch)
        assert len(asked) <= len(runs) + windows + len(rows) - len(np.unique(rows))


@pytest.mark.parametrize("collection", ["npy"], indirect=True)
@pytest.mark.parametrize(
    ("long", "asked"),
    [(20, [(0, 49), (50, 100), (399, 400)]), (50, [(0, 49), (50, 100), (399, 400)]), (51, [(0, 100), (399, 400)])],
)
def test_many_neighbours_are_read_alone(collection: Collection, long: int, asked: list[tuple[int, int]]) -> None:
    rows = np.array([*range(0, 50, 3), *range(50, 100), 399])
    manifest = collection.open().manifest
    for dtype in (np.float32, np.float64):
        vectors, out = _Noting(manifest.format.vectors), np.empty((len(rows), DIMENSION), dtype)
        with mock.patch.multiple(picking, _GAP_NBYTES=3 * ROW_NBYTES, _LONG_NBYTES=long * ROW_NBYTES):
            picking.read_picked(cast("Any", vectors), manifest.columns, manifest.vectors.header(0), rows, [out])
        np.testing.assert_array_equal(out, collection.rows[rows])
        assert vectors.calls == [asked]
        # Straight to their place where they are wanted as they lie; the first are picked from memory.
        straight = [dtype == np.float32 and start > 0 for start, _ in asked]
        assert [np.shares_memory(out, read) for read in vectors.outs] == straight


@pytest.mark.parametrize("collection", ["npy"], indirect=True)
@pytest.mark.parametrize(
    ("places", "asked"),
    [
        (np.arange(100) + 7, [(0, 50), (200, 250)]),
        (np.roll(np.arange(100), 20), [(0, 20), (20, 50), (200, 250)]),
        (np.roll(np.arange(100), 70), [(0, 50), (200, 220), (220, 250)]),
    ],
)
def test_runs_far_apart_are_read_as_far_as_they_stay_together(
    collection: Collection, places: Int64s, asked: list[tuple[int, int]]
) -> None:
    rows = np.array([*range(50), *range(200, 250)])
    manifest = collection.open().manifest
    vectors, out = _Noting(manifest.format.vectors), np.zeros((110, DIMENSION), np.float32)
    with mock.patch.multiple(picking, _GAP_NBYTES=3 * ROW_NBYTES):
        picking.read_picked(cast("Any", vectors), manifest.columns, manifest.vectors.header(0), rows, [out], places)
    np.testing.assert_array_equal(out[places], collection.rows[rows])
    assert vectors.calls == [asked]


def _reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many bytes each call brings from now on."""
    counts: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        counts.append(preadv(descriptor, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    watch_scattered(monkeypatch)
    return counts


@pytest.mark.parametrize(
    ("every", "calls", "share"),
    [(500, 20, 1 / 500), (100, 100, 1 / 100), (20, 1, 1), (2, 10, 1)],  # for far ones, a call each; else for 512 runs
)
def test_a_file_is_read_in_few_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, every: int, calls: int, share: float
) -> None:
    np.save(tmp_path / "0.npy", np.arange(10_000 * 256, dtype=np.float32).reshape(-1, 256))
    view = EmbeddingReader(tmp_path).take(slice(None, None, every))
    counts = _reads(monkeypatch)
    rows = view.to_dask_array().compute(scheduler="sync")
    np.testing.assert_array_equal(rows[:, 0], np.arange(0, 10_000, every) * 256)
    assert len(counts) == calls
    assert sum(counts) <= share * 10_000 * 1024


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_neighbours_that_go_apart_are_read_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, order: str
) -> None:
    """Blocks of twenty rows far from each other, with a call for each block, not for each row."""
    np.save(tmp_path / "0.npy", np.arange(100_000 * 256, dtype=np.float32).reshape(-1, 256))
    blocks = np.random.default_rng(0).choice(1_000, 500, replace=False)[:, None] * 100 + np.arange(20)
    if order == "reversed":
        numbers = np.sort(blocks, axis=None)[::-1]
    else:
        numbers = np.random.default_rng(1).permuted(blocks.reshape(10, -1), axis=1).reshape(-1)
    view = EmbeddingReader(tmp_path).take(numbers)
    counts = _reads(monkeypatch)
    rows = view.to_dask_array(chunks=1_000).compute(scheduler="sync")
    np.testing.assert_array_equal(rows[:, 0], numbers * 256)
    assert len(counts) == 500
    assert sum(counts) == rows.nbytes


def test_nearly_all_rows_are_copied_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # As many calls as for all rows: what lies between runs is read, not passed over with a call for each.
    np.save(tmp_path / "0.npy", np.ones((20_000, 256), np.float32))
    view = EmbeddingReader(tmp_path).take(np.arange(20_000) % 50 > 0)
    counts = _reads(monkeypatch)
    assert sum(len(x) for x, _ in view(5_000, show_progress=False)) == len(view)
    assert len(counts) <= 10


def test_rows_that_lie_apart_are_read_straight_to_their_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((5_000, 256)).astype(np.float32)
    np.save(tmp_path / "0.npy", values)
    chosen = np.random.default_rng(1).random(5_000) < 0.7
    view = EmbeddingReader(tmp_path).take(chosen)
    counts = _reads(monkeypatch)
    np.testing.assert_array_equal(view.to_dask_array().compute(scheduler="sync"), values[chosen])
    first, last = np.flatnonzero(chosen)[[0, -1]].tolist()
    assert sum(counts) == (last + 1 - first) * 1024  # each byte once
    assert len(counts) > 1


@pytest.mark.parametrize("answer", [None, lambda *_: -1, lambda *_: 100])
def test_where_the_system_cannot_scatter_rows_are_picked_from_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: object
) -> None:
    values = np.random.default_rng(0).standard_normal((5_000, 256)).astype(np.float32)
    np.save(tmp_path / "0.npy", values)
    chosen = np.random.default_rng(1).random(5_000) < 0.7
    monkeypatch.setattr("dask_embedding_reader.storage.scatter._preadv", lambda: answer)
    array = EmbeddingReader(tmp_path).take(chosen).to_dask_array()
    np.testing.assert_array_equal(array.compute(scheduler="sync"), values[chosen])


def test_rows_of_a_file_that_changed_are_not_scattered(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros((5_000, 256), np.float32))
    view = EmbeddingReader(tmp_path).take(np.random.default_rng(1).random(5_000) < 0.7)
    np.save(tmp_path / "0.npy", np.ones((5_000, 256), np.float32))
    with pytest.raises(FileChangedError, match=r"0\.npy"):
        view.to_dask_array().compute(scheduler="sync")


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> StoredFile:
    """A file of 4,000 bytes."""
    store, path = resolve(tmp_path_factory.mktemp("noise") / "0.bin")
    Path(path).write_bytes(np.random.default_rng(0).bytes(4_000))
    return StoredFile(store, path, store.look_up(path).version)


@given(
    lengths=st.lists(st.integers(0, 9), max_size=60),
    start=st.integers(0, 3_990),
    keeps_others=st.booleans(),
)
def test_runs_are_read_to_two_places_in_turn(
    noise: StoredFile, lengths: list[int], start: int, keeps_others: bool
) -> None:
    data = Path(noise.path).read_bytes()
    ends = np.cumsum([start, *lengths]).tolist()
    runs = [data[a:b] for a, b in pairwise(ends)]
    kept, others = bytearray(sum(lengths[::2])), bytearray(sum(lengths[1::2]))
    places = memoryview(kept), np.array(lengths[::2], int), memoryview(others) if keeps_others else None
    done = try_read_in_turn(noise, start, *places, np.array(lengths[1::2], int))
    assert done is (not lengths or ends[-1] <= len(data))
    if done:
        assert kept == b"".join(runs[::2])
        assert others == (b"".join(runs[1::2]) if keeps_others else bytes(len(others)))
        changed = noise._replace(version=noise.version._replace(size=3_999))
        assert not lengths or not try_read_in_turn(changed, start, *places, np.array(lengths[1::2], int))


def test_runs_that_do_not_fill_the_memory_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros((10, 4), np.float32))
    header = EmbeddingReader(tmp_path).manifest.vectors.header(0)
    room = memoryview(bytearray(32))
    for kept, others in (([16, 17], [16]), ([48, -16], [16]), ([16, 16], [-16]), ([16], [16])):
        with pytest.raises(ValueError, match="exactly"):
            try_read_in_turn(header.file, 128, room, np.array(kept), None, np.array(others))
    with pytest.raises(ValueError, match="exactly"):
        try_read_in_turn(header.file, 128, room, np.array([32]), room, np.array([16]))


def test_a_window_has_its_rows_in_their_order(tmp_path: Path) -> None:
    values = np.arange(3_000 * 64, dtype=np.float32).reshape(-1, 64)
    np.save(tmp_path / "0.npy", values[:1_000])
    np.save(tmp_path / "1.npy", values[1_000:])
    picks = np.random.default_rng(0).permutation(3_000)[:2_500]
    for rows in (picks, np.append(picks, picks[:9])):
        batches = [x.copy() for x, _ in EmbeddingReader(tmp_path).take(rows)(700, show_progress=False)]
        np.testing.assert_array_equal(np.concatenate(batches), values[rows])
