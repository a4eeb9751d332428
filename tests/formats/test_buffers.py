"""Memory that is used again: never while anything still refers to it, and never more than is worth keeping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import dask.array as da
import numpy as np
import numpy.typing as npt
import pytest

from dask_embedding_reader import EmbeddingReader, iter_batches
from dask_embedding_reader._common.memory import Buffers, Slot, has_own_memory, new_array, used_again
from dask_embedding_reader.batches.jobs import Lane, Pool
from tests.support.collections import finishes, python_calls, wait_until

FLOAT32 = np.dtype(np.float32)
LARGE = 1_000 * 64 * 4


def address(array: npt.NDArray[np.float32]) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.fixture
def buffers() -> Buffers:
    return Buffers(2 * LARGE)


@pytest.mark.parametrize("rows", [1_125, 1_050, 1_000])
def test_memory_of_what_is_gone_is_used_again(buffers: Buffers, rows: int) -> None:
    """As long as an eighth of it lies idle at most."""
    first = buffers.take((1_125, 64), FLOAT32)
    place = address(first)
    del first
    assert not buffers.has_free(999 * 64 * 4)
    assert address(buffers.take((rows, 64), FLOAT32)) == place


def test_a_small_array_takes_no_large_memory(buffers: Buffers) -> None:
    large = buffers.take((1_000, 64), FLOAT32)
    del large
    small = buffers.take((800, 64), FLOAT32)
    assert (buffers.lent_nbytes, buffers.free_nbytes) == (small.nbytes, LARGE)


def test_a_part_keeps_memory_from_being_used_again(buffers: Buffers) -> None:
    array = buffers.take((1_000, 64), FLOAT32)
    array[:] = 7
    part = array[5:6, 3:].T
    del array
    buffers.take((1_000, 64), FLOAT32)[:] = 0
    assert (part == 7).all()


def test_what_was_used_last_is_kept(buffers: Buffers) -> None:
    older, old = [buffers.take((1_000, 64), FLOAT32) for _ in range(2)]
    new = buffers.take((700, 64), FLOAT32)
    places = address(new), address(old)
    del older
    assert buffers.free_nbytes == LARGE
    del old
    assert buffers.free_nbytes == 2 * LARGE
    del new  # with it there is more than may be kept
    assert buffers.free_nbytes == LARGE + 700 * 64 * 4
    assert (address(buffers.take((700, 64), FLOAT32)), address(buffers.take((1_000, 64), FLOAT32))) == places


def test_closed_buffers_keep_nothing(buffers: Buffers) -> None:
    array, free = [buffers.take((1_000, 64), FLOAT32) for _ in range(2)]
    del free
    buffers.close()
    assert not buffers.has_free(LARGE)
    array[:] = 1
    late = buffers.take((1_000, 64), FLOAT32)  # of a thread that has not been told
    assert not np.shares_memory(array, late)
    assert (buffers.lent_nbytes, buffers.free_nbytes) == (0, 0)
    del array, late
    assert (buffers.lent_nbytes, buffers.free_nbytes) == (0, 0)


def test_no_python_runs_when_an_array_ends(buffers: Buffers) -> None:
    """Python drops a Ctrl-C that arrives in a finalizer: the program would go on as if it had not been pressed."""
    arrays = [buffers.take((1_000, 64), FLOAT32)]
    assert python_calls(arrays.clear) == []
    assert buffers.free_nbytes == LARGE


@pytest.mark.parametrize("change", ["an array ends", "another thread makes the batch", "all is closed"])
def test_who_waits_for_memory_goes_on_when_it_is_there(buffers: Buffers, change: str) -> None:
    arrays = [buffers.take((1_000, 64), FLOAT32)]
    slot = Slot(buffers, (1_000, 64), FLOAT32, most_nbytes=LARGE)
    threads = [threading.Thread(target=buffers.wait_while, args=(slot.lacks_memory, 60)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert slot.lacks_memory()
    assert slot.wait() is None
    if change == "an array ends":
        place = address(arrays.pop())
        assert wait_until(lambda: not slot.lacks_memory(), 30)
        assert address(slot.make()) == place
    elif change == "another thread makes the batch":
        slot.make()
    else:
        buffers.close()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def test_a_batch_lacks_memory_where_others_hold_it_and_none_is_free(buffers: Buffers) -> None:
    arrays = [buffers.take((1_000, 64), FLOAT32) for _ in range(2)]
    shape = (1_000, 64)
    unlimited, wide, narrow = (Slot(buffers, shape, FLOAT32, most) for most in (None, 3 * LARGE, 3 * LARGE - 1))
    assert [slot.lacks_memory() for slot in (unlimited, wide, narrow)] == [False, False, True]
    assert unlimited.wait() is not None
    assert [slot.lacks_memory() for slot in (unlimited, wide, narrow)] == [False, True, True]
    arrays.clear()
    buffers.take(shape, FLOAT32)  # of one of two that are free: narrow has the other one
    kept = [buffers.take(shape, FLOAT32), wide.wait(), wide.wait()]
    assert kept[1] is kept[2] is wide.hand_over()
    assert [slot.lacks_memory() for slot in (unlimited, wide, narrow)] == [False, True, True]
    kept.pop(0)
    place = address(narrow.make())
    assert not narrow.lacks_memory()
    assert place == address(narrow.hand_over())


def test_all_who_wait_go_on_when_an_array_ends_each_time(buffers: Buffers) -> None:
    """One of them sees it end, and tells the others; nobody else looks meanwhile."""
    for _ in range(2):
        arrays = [buffers.take((1_000, 64), FLOAT32)]
        asked: list[bool] = []

        def lacking(asked: list[bool] = asked) -> bool:
            asked.append(True)
            return True

        threads = [threading.Thread(target=buffers.wait_while, args=(lacking, 60)) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert wait_until(lambda asked=asked: len(asked) == 3)  # type: ignore[misc]
        with buffers.lock:  # each of them waits by now
            arrays.clear()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        assert (buffers.lent_nbytes, buffers.free_nbytes) == (0, LARGE)


class _OnlyWaits(threading.Condition):
    def __enter__(self) -> bool:
        raise AssertionError("the lock is taken by way of the condition")


def test_no_lock_is_taken_by_way_of_a_condition(buffers: Buffers) -> None:
    """That is Python: a Ctrl-C that arrives there leaves the lock taken, and who reads waits for ever."""
    buffers._changed = _OnlyWaits(buffers.lock)
    slot = Slot(buffers, (1_000, 64), FLOAT32, LARGE)
    assert not slot.lacks_memory()
    assert slot.wait() is slot.make()
    assert (buffers.lent_nbytes, buffers.free_nbytes, buffers.has_free(LARGE)) == (LARGE, 0, False)
    del slot
    buffers.wait_while(lambda: False, 1e9)
    buffers.wait_while(lambda: True, 0.01)
    buffers.wake()
    buffers.close()


@pytest.mark.parametrize("watched", [False, True])
def test_who_waits_for_memory_sleeps(buffers: Buffers, watched: bool) -> None:
    """Whether or not somebody else waits, too: else threads that read would ask all the time."""
    buffers._is_watched = watched
    begun = time.monotonic()
    buffers.wait_while(lambda: True, 0.1)
    assert time.monotonic() - begun >= 0.09
    buffers.wait_while(lambda: False, 1e9)
    held = buffers.take((1_000, 64), FLOAT32)
    begun = time.monotonic()
    assert Slot(buffers, held.shape, FLOAT32, LARGE).wait() is None
    assert time.monotonic() - begun >= 0.09


@pytest.mark.parametrize("look", ["lent_nbytes", "free_nbytes", "has_free"])
def test_what_has_ended_is_seen_by_whoever_looks_first(buffers: Buffers, look: str) -> None:
    array = buffers.take((1_000, 64), FLOAT32)
    del array
    if look == "has_free":
        assert buffers.has_free(LARGE)
    else:
        assert getattr(buffers, look) == (LARGE if look == "free_nbytes" else 0)


def test_memory_is_there_before_the_thread_that_watches_has_said_so(buffers: Buffers) -> None:
    array = buffers.take((1_000, 64), FLOAT32)
    place = address(array)
    buffers._is_watched = True
    del array
    buffers._ended.get_nowait()  # as the thread that watches does, which then waits for its turn
    assert buffers.lent_nbytes == 0
    assert address(buffers.take((1_000, 64), FLOAT32)) == place


def test_only_the_thread_that_asked_for_it_uses_memory_again(buffers: Buffers) -> None:
    with used_again(buffers):
        ours = new_array((3, 4), FLOAT32)
        theirs: list[npt.NDArray[np.float32]] = []
        thread = threading.Thread(target=lambda: theirs.append(new_array((3, 4), FLOAT32)))
        thread.start()
        thread.join()
    assert buffers.lent_nbytes == ours.nbytes == 48
    assert not ours.flags.owndata
    assert has_own_memory(ours)
    assert theirs[0].flags.owndata
    assert new_array((3, 4), FLOAT32).flags.owndata


def test_chunks_are_read_into_the_memory_of_earlier_ones(tmp_path: Path) -> None:
    rows = np.arange(40_000 * 64, dtype=np.float32).reshape(-1, 64)
    np.save(tmp_path / "a.npy", rows)
    places: set[int] = set()

    def look(chunk: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        assert not chunk.flags.owndata  # else the same places may be chance
        places.add(address(chunk))
        return chunk

    x = EmbeddingReader(tmp_path).to_dask_array(max_piece_size=500)
    x = da.map_blocks(look, x, meta=np.empty((0, 0), FLOAT32))
    for number, (batch, _) in enumerate(iter_batches(x, batch_size=500, max_ram_usage_in_bytes=2**24)):
        np.testing.assert_array_equal(batch, rows[500 * number : 500 * (number + 1)])
    assert len(places) < x.numblocks[0] / 2


def test_a_piece_that_waits_for_memory_is_not_overtaken() -> None:
    """Those read meanwhile could only wait too: for the batch that the loop holds until the overtaken one is there."""
    pool = Pool(threads=1)
    read: list[int] = []
    first, second = (Lane(pool, lambda: read.append) for _ in range(2))
    both_wait = threading.Event()
    memory = iter([None, None, 1])
    pieces = [first.submit(lambda: next(memory) if both_wait.wait(60) else None), second.submit(lambda: 2)]
    both_wait.set()
    for piece in pieces:
        piece.result(60)
    pool.close()
    assert read == [1, 2]


def test_parts_of_a_row_group_are_filled_at_the_same_time() -> None:
    """They are looked up one after the other; each waits here until the next one is there."""
    pool = Pool(threads=2)
    looked_up: list[int] = []
    met = threading.Barrier(2, timeout=60)

    def read(number: int) -> Callable[[], int]:
        looked_up.append(number)
        return lambda: met.wait()

    lane = Lane(pool, lambda: read)
    parts = [lane.submit(partial(int, number)) for number in range(4)]
    assert sorted(part.result(60) for part in parts) == [0, 0, 1, 1]
    assert looked_up == [0, 1, 2, 3]
    met.abort()
    with pytest.raises(threading.BrokenBarrierError):
        lane.submit(partial(int, 4)).result(60)
    pool.close()


def test_parts_are_read_before_what_waits_for_memory_until_they_are_there() -> None:
    """Of a row group that was begun the next parts are looked up when others have long been submitted."""
    pool = Pool(threads=2)
    submitted, filled = threading.Event(), threading.Event()

    def look_up(number: int) -> Callable[[], None]:
        submitted.wait(60)
        return filled.set if number == 4 else lambda: None

    group = Lane(pool, lambda: look_up)
    parts = [group.submit(partial(int, number)) for number in range(5)]
    others = [Lane(pool, lambda: lambda _: None) for _ in range(3)]
    waiting = [lane.submit(lambda: 1 if filled.wait(0.01) else None) for lane in others]
    submitted.set()
    for part in parts + waiting:
        part.result(60)
    pool.close()


def test_no_piece_waits_until_its_time_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait for memory ends because there is some; where only the clock ended it, a loop took 20 times as long."""
    monkeypatch.setattr("dask_embedding_reader._common.memory._WAIT_SECONDS", 100.0)
    rows = 400_000
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (rows, 64)).flush()
    reader = EmbeddingReader(tmp_path)

    def read() -> int:
        return sum(len(batch) for batch, _ in reader(4_000, max_piece_size=500, show_progress=False))

    assert finishes(read, 50) == rows


def test_large_arrays_begin_where_they_are_copied_to_fast(buffers: Buffers) -> None:
    arrays = [buffers.take((1_000, 64), FLOAT32), *(new_array((2**18, columns), FLOAT32) for columns in (1, 1, 3))]
    assert not np.shares_memory(arrays[1], arrays[2])  # each holds what it lies in
    for array in arrays:
        assert address(array) % 64 == 0
        assert array.flags.writeable
        assert array.flags.c_contiguous
        assert has_own_memory(array)
