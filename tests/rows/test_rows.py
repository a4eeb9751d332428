"""Which rows, in which order: every selection against a plain list of numbers, and what an epoch promises."""

from __future__ import annotations

import pickle
import tracemalloc
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_embedding_reader.rows import picked
from dask_embedding_reader.rows.picked import Picked, pack, pick, pick_all
from dask_embedding_reader.rows.section import Section, deal
from dask_embedding_reader.rows.selection import Rows
from dask_embedding_reader.rows.shuffled import LANES, Shuffled, left_out, sample, shard, shuffle
from dask_embedding_reader.rows.stretch import Stretch

Int64s = npt.NDArray[np.int64]

COUNT = st.integers(0, 700)
LISTS = st.lists(st.integers(0, 500), max_size=300)
MASKS = st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=30)


@st.composite
def selections(draw: st.DrawFn) -> Rows:
    """A selection of any kind, one upon the other."""
    kind = draw(st.sampled_from(["stretch", "list", "mask"]))
    found: Rows
    if kind == "stretch":
        found = Stretch(range(draw(COUNT)))[:: draw(st.sampled_from([-3, -1, 1, 2]))]
    elif kind == "list":
        found = pick(np.array(draw(LISTS), np.int64))
    else:
        found = pick(np.flatnonzero([keep for keep, count in draw(MASKS) for _ in range(count)]))
    if draw(st.booleans()):
        found = shuffle(found, draw(st.integers(0, 3)), 0, draw(st.integers(1, 9)), draw(st.integers(1, 300)))
        if draw(st.booleans()):
            ranks = draw(st.sampled_from([1, 2, 3, 64, 100]))
            found = shard(found, ranks, draw(st.integers(0, ranks - 1)))
    if draw(st.booleans()):
        hands = draw(st.integers(1, 5))
        found = deal(found, draw(st.integers(1, 50)), hands, draw(st.integers(0, hands - 1)))
    return found


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of few rows, so that small selections have many."""
    monkeypatch.setattr("dask_embedding_reader.rows.picked._PART_ROWS", 16)
    monkeypatch.setattr("dask_embedding_reader.rows.selection._STEP_ROWS", 50)


@settings(deadline=None, max_examples=300)
@given(selections(), st.data())
def test_a_selection_is_a_sequence_of_numbers(rows: Rows, data: st.DataObject) -> None:
    plain = list(rows)
    assert len(rows) == len(plain)
    assert np.asarray(rows).tolist() == plain
    assert np.asarray(rows).dtype == np.int64
    for index in (0, -1, len(plain) // 2):
        if plain:
            assert rows[index] == plain[index]
    with pytest.raises(IndexError):
        rows[len(plain)]
    cut = data.draw(st.slices(len(plain)))
    assert list(rows[cut]) == plain[cut]
    assert rows[cut].is_ascending or not (rows.is_ascending and (cut.step or 1) > 0)
    if isinstance(rows[cut], Section) and len(plain[cut]) < 2:
        assert rows[cut].is_ascending
    if isinstance(rows, Stretch | Picked):
        assert rows.is_ascending is bool((np.diff(plain) > 0).all())
    again = data.draw(st.slices(len(plain[cut])))
    assert list(rows[cut][again]) == plain[cut][again]
    positions = np.array(data.draw(st.lists(st.integers(0, len(plain) - 1))) if plain else [], np.int64)
    assert rows.at(positions).tolist() == [plain[position] for position in positions.tolist()]
    assert rows.is_ascending <= bool((np.diff(plain) > 0).all())


@settings(deadline=None)
@given(selections(), st.lists(st.integers(-3, 800)))
def test_an_ascending_selection_is_searched(rows: Rows, wanted: list[int]) -> None:
    for found in (rows, rows[1:-1], rows[::2]):
        if found.is_ascending:
            assert found.search(np.array(wanted, np.int64)).tolist() == np.searchsorted(list(found), wanted).tolist()


def test_sections_of_few_rows_are_searched_and_tell_whether_they_ascend() -> None:
    """All of them: of rows that were picked, which lie in several parts, in either order."""
    wanted = np.arange(-3, 130)
    for numbers in (np.arange(40) * 3 + 1, np.flatnonzero(np.arange(120) % 7 < 4), np.array([5, 4]), np.array([7])):
        whole = pick(numbers[numbers != 25])
        for step in (-3, -1, 1, 2):
            for start in range(0, len(whole), 5):
                for some in (whole[start::step], whole[start : start + 2][::step], deal(whole, 3, 2, 1)[start::step]):
                    assert some.is_ascending <= bool((np.diff(list(some)) > 0).all())
                    if some.is_ascending:
                        assert some.search(wanted).tolist() == np.searchsorted(list(some), wanted).tolist()


def test_windows_end_between_what_is_asked_for() -> None:
    epoch = shuffle(Stretch(range(1_000)), 0, 0, 1, 128)
    for rows in (epoch, epoch[3:-5], epoch[::7], shard(epoch, 4, 1), deal(epoch, epoch.window_rows, 3, 1)):
        windows = rows.windows(0, len(rows)).tolist()
        assert windows
        for start in range(0, len(rows), 5):
            for stop in (start, start + 1, *windows, *(window + 1 for window in windows), len(rows)):
                inside = [window for window in windows if start < window < stop]
                assert rows.windows(start, stop).tolist() == inside


@settings(deadline=None)
@given(st.integers(0, 2_000), st.integers(1, 9), st.integers(1, 600), st.sampled_from([1, 2, 3, 64]), st.data())
def test_windows_end_where_rows_of_the_next_one_follow(
    count: int, block: int, buffer: int, ranks: int, data: st.DataObject
) -> None:
    """In the whole epoch after so many rows each, and where lanes of full length end."""
    epoch = shuffle(Stretch(range(count)), 1, 0, block, buffer)
    regular = LANES * epoch.lane_rows
    bounds = [*range(epoch.window_rows, regular, epoch.window_rows), *([regular] if regular else [])]
    window_of = np.empty(count, np.int64)
    window_of[np.asarray(epoch)] = np.searchsorted(bounds, np.arange(count), "right")
    rank = shard(epoch, ranks, data.draw(st.integers(0, ranks - 1)))
    hands = data.draw(st.integers(1, 3))
    for rows in (epoch, rank, epoch[5::3], deal(rank, data.draw(st.integers(1, 99)), hands, hands - 1)):
        ends = np.flatnonzero(np.diff(window_of[np.asarray(rows)])) + 1
        for start, stop in ((0, len(rows)), (len(rows) // 5, len(rows) // 2), (0, 0), (len(rows), len(rows))):
            assert rows.windows(start, stop).tolist() == [end for end in ends.tolist() if start < end < stop]


@settings(deadline=None)
@given(selections(), st.integers(1, 50), st.integers(1, 3), st.integers(1, 4))
def test_hands_get_stretches_in_turn(rows: Rows, stretch: int, workers: int, round_of: int) -> None:
    """Of which the last ones share what is left after all whole rounds."""
    hands = round_of * workers
    plain = list(rows)
    full = len(plain) // (stretch * round_of) * round_of
    rest = (len(plain) - full * stretch) // round_of
    ends = np.cumsum([0, *[stretch] * full, *[rest] * round_of]).tolist()
    stretches = [plain[start:stop] for start, stop in pairwise(ends)]
    for index in range(hands):
        expected = [row for some in stretches[index::hands] for row in some]
        dealt = deal(rows, stretch, hands, index, round_of=round_of)
        assert list(dealt) == expected
        assert len(dealt) == len(expected)


@settings(deadline=None)
@given(selections(), selections())
def test_equal_rows_are_equal_and_survive_pickling(left: Rows, right: Rows) -> None:
    same = list(left) == list(right)
    assert (left == right) is same
    assert not same or hash(left) == hash(right)
    copy = pickle.loads(pickle.dumps(left))
    assert copy == left
    assert hash(copy) == hash(left)
    assert copy.token == left.token
    assert same or left.token != right.token
    assert left != list(left)


@given(st.integers(1, 300), st.integers(-9, 9), st.slices(300), st.slices(100))
def test_rows_at_equal_distances_are_the_same_however_they_are_spelled(
    count: int, first: int, cut: slice, again: slice
) -> None:
    rows = Stretch(range(first, first + count))[cut][again]
    assert isinstance(rows, Stretch)
    numbers = np.arange(first, first + count)[cut][again]
    assert rows.token == pick(numbers).token
    assert rows.is_contiguous is bool((np.diff(numbers) == 1).all())


@pytest.mark.parametrize("numbers", [[5, 5], [5, 5, 5], [4], [4, 3], [9, 6, 3], [3, 6, 9], [0, 3, 7], [2, 1, 1]])
def test_picked_rows_are_a_stretch_where_their_distances_are_equal(numbers: list[int]) -> None:
    distances = set(np.diff(numbers).tolist())
    rows = pick(np.array(numbers))
    assert isinstance(rows, Stretch) is (len(distances) < 2 and distances != {0})
    assert list(rows) == list(pick_all(np.array([number]) for number in numbers)) == numbers


@given(LISTS, MASKS, st.integers(1, 50))
def test_how_rows_come_decides_nothing(numbers: list[int], mask: list[tuple[bool, int]], step: int) -> None:
    for given_ in (np.array(numbers, np.int64), np.flatnonzero([keep for keep, count in mask for _ in range(count)])):
        whole = pick(given_)
        parted = pick_all(given_[start : start + step] for start in range(0, len(given_), step))
        assert whole.token == parted.token
        assert np.asarray(parted).tolist() == given_.tolist()
        assert pack(given_).numbers().tolist() == given_.tolist()


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_picked_rows_take_a_bit_each_at_most(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    mask = np.random.default_rng(0).random(1_000_000) < share
    picked = pick(np.flatnonzero(mask))
    assert np.array_equal(np.asarray(picked), np.flatnonzero(mask))
    assert picked.nbytes <= min(125_000, 2 * mask.sum()) * 1.01
    blocks = pick(np.flatnonzero(np.repeat(mask[:1000], 1000)))
    assert blocks.nbytes <= 16_000


def test_slices_of_nothing_hold_nothing() -> None:
    for rows in (Stretch(range(9, -1, -1)), shuffle(Stretch(range(10)), 0, 0, 1, 10)[::-1], pick(np.array([3, 1, 2]))):
        for nothing in (slice(-99, None, -1), slice(3, 3), slice(99, None), slice(0, 3, -2)):
            assert list(rows[nothing]) == list(rows)[nothing] == []
            assert list(rows[nothing][::-1]) == []


def test_a_selection_of_a_selection_holds_some_numbers_more() -> None:
    """Each of eight bytes, a range three of them."""
    of = pick(np.array([5, 3, 4] * 50))
    assert of.nbytes == sum(column.nbytes for column in vars(of).values() if isinstance(column, np.ndarray))
    epoch = shuffle(of, 0, 0, 1, 64)
    for rows, numbers in ((of[1:], 3), (epoch, 5), (deal(of, 7, 2, 1), 3 + 3), (shard(epoch, 2, 1), 5 + 3)):
        assert rows.nbytes == of.nbytes + 8 * numbers
    assert Stretch(range(9)).nbytes == 24


def assert_packed(some: Int64s, first: int = 0) -> None:
    """They take no more bytes than in any other form: runs, and steps or bits where they ascend, else offsets."""
    if not len(some):
        assert pack(some).data.nbytes == 0
        return
    lowest = int(some.min())
    ends = np.flatnonzero(np.diff(some) != 1).tolist()
    bounds = [0, *(end + 1 for end in ends), len(some)]
    runs = [(int(some[start]) - lowest, stop - start) for start, stop in pairwise(bounds)]
    steps = np.diff(some, prepend=lowest)
    ascends = bool((steps[1:] > 0).all())
    forms = [np.array(runs), steps if ascends else some - lowest]
    sizes = [form.astype(np.min_scalar_type(int(form.max()))).nbytes for form in forms]
    if ascends:
        sizes.append(-(-(int(some[-1]) - lowest + 1) // 8))
    packed = pack(some + first)
    assert packed.data.nbytes == min(sizes)
    assert packed.numbers().tolist() == (some + first).tolist()


@given(LISTS, MASKS, st.lists(st.tuples(st.integers(0, 70_000), st.integers(1, 9))), st.integers(0, 2**40))
def test_rows_are_packed_in_the_form_that_takes_the_fewest_bytes(
    numbers: list[int], mask: list[tuple[bool, int]], stretches: list[tuple[int, int]], first: int
) -> None:
    assert_packed(np.array(numbers, np.int64), first)
    assert_packed(np.flatnonzero([keep for keep, count in mask for _ in range(count)]), first)
    assert_packed(np.array([row for start, count in stretches for row in range(start, start + count)], np.int64), first)


def test_rows_are_packed_so_where_two_forms_take_nearly_as_many_bytes() -> None:
    for step in range(1, 20):
        for count in (1, 2, 3, 8, 9, 100):
            assert_packed(np.cumsum(np.arange(count) % 2 + step))
            assert_packed(np.flatnonzero(np.arange(count * step) % step < step // 2))
    for last in (254, 255, 256, 257, 2**16 - 1, 2**16, 2**16 + 1):
        for few in (np.arange(0, 40, 2), np.arange(0, 90, 3), np.arange(9)):
            assert_packed(np.concatenate([few, [last - 1, last]]))
            assert_packed(np.concatenate([[last - 1, last], few]))
            assert_packed(np.concatenate([[last], few]))


def test_the_parts_that_were_used_last_are_kept_unpacked() -> None:
    rows: Any = pick(np.array([3, 1, 2] * 200))
    assert len(rows.ends) > picked._MOST_UNPACKED
    for start in range(0, len(rows), 5):
        assert rows.numbers(start, start + 1).tolist() == [(3, 1, 2)[start % 3]]
        assert len(rows._unpacked) <= picked._MOST_UNPACKED
        assert rows._part(start // 16) is rows._part(start // 16)
    assert [*rows._unpacked] == [*range(len(rows.ends))][-picked._MOST_UNPACKED :]
    assert len(pickle.dumps(rows)) == len(pickle.dumps(pick(np.array([3, 1, 2] * 200))))


@pytest.mark.parametrize("window", [64, 128, 1_024])
@pytest.mark.parametrize("step", [1, 2, 3, -3, 64, 1_000])
def test_of_a_part_of_a_window_the_rows_are_read_in_one_go(window: int, step: int) -> None:
    epoch = shuffle(Stretch(range(10_000)), 0, 0, 1, window)
    assert epoch.window_rows == window
    assert epoch[::step].window_rows == -(-window // abs(step))
    if step > 0:
        assert deal(epoch, window, step, 0).window_rows == -(-window // step)
    assert Stretch(range(9)).window_rows == pick(np.array([3, 1]))[1:].window_rows == 0


def test_rows_beyond_32_bits_are_kept() -> None:
    numbers = np.array([0, 2**32, 2**32 + 1, 2**52, 5, 2**40], np.int64)
    for some in (numbers, np.sort(numbers), np.concatenate([numbers, np.arange(2**33, 2**33 + 1000)])):
        assert np.asarray(pick(some)).tolist() == some.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# An epoch


GOLDEN = [
    ((20, 0, 0, 1, 100), [1, 5, 19, 9, 4, 12, 7, 14, 15, 16, 6, 2, 3, 0, 17, 8, 11, 13, 10, 18]),
    ((100, 0, 0, 9, 100), [6, 97, 75, 89, 23, 74, 79, 62]),
    (
        (6000000000, 3, 1, 1, 83333),
        [5117689880, 2689033076, 3896643615, 5080628817, 219038502, 4496341640, 4598282438, 1762527000],
    ),
    (
        (1000000000, 0, 0, 1, 1000000),
        [538200378, 889636194, 293211054, 384300426, 396555552, 117480210],
    ),
    ((1000, 1, 2, 2, 256), [280, 491, 315, 747, 62, 72, 933, 334, 325, 574, 882, 982, 998, 724, 302, 124]),
    (
        (5800000000, 3, 1, 42, 83333),
        [1497576910, 905579565, 3728987284, 4419679506, 1950986550, 1950986557, 1950986559, 5799999997],
    ),
]


@pytest.mark.parametrize(
    ("count", "block", "buffer", "expected"),
    [
        # All rows are in one window: each is a block of its own.
        (1_000, 5, 1_000, (1, 15, 15)),
        (1_000, 5, 999, (5, 15, 15)),
        (64, 5, 64, (1, 1, 1)),
        (63, 5, 63, (1, 0, 1)),
        # At least a block of each lane is in a window.
        (10_000, 5, 63, (1, 156, 1)),
        (10_000, 5, 1, (1, 156, 1)),
        (10_000, 5, 64 * 4, (4, 156, 4)),
        (10_000, 5, 64 * 5 - 1, (4, 156, 4)),
        (10_000, 5, 64 * 5, (5, 155, 5)),
        (10_000, 5, 64 * 10 - 1, (5, 155, 5)),
        (10_000, 5, 64 * 10, (5, 155, 10)),
        (64 * 155, 5, 64 * 154, (5, 155, 150)),
        (64 * 155 - 1, 5, 64 * 154, (5, 150, 150)),
        (64 * 150 + 1, 5, 64 * 150, (5, 150, 150)),
    ],
)
def test_an_epoch_is_cut_into_lanes_of_blocks_and_these_into_windows(
    count: int, block: int, buffer: int, expected: tuple[int, int, int]
) -> None:
    epoch = shuffle(Stretch(range(count)), 0, 0, block, buffer)
    assert (epoch.block_rows, epoch.lane_rows, epoch.lane_window_rows) == expected
    assert (epoch.window_rows, epoch.blocks_mixed) == (64 * expected[2], 64 * expected[2] // expected[0])


@pytest.mark.parametrize(("case", "order"), GOLDEN)
def test_orders_never_change(case: tuple[int, int, int, int, int], order: list[int]) -> None:
    """Whoever resumes an epoch goes on in the order it was begun in, whatever the versions are."""
    rows = shuffle(Stretch(range(case[0])), *case[1:])
    half = len(order) // 2
    assert rows.numbers(0, half).tolist() == order[:half]
    assert rows.numbers(len(rows) - half, len(rows)).tolist() == order[half:]


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 5_000), st.integers(-(2**70), 2**70), st.integers(0, 9), st.integers(1, 40), st.integers(1, 6_000)
)
def test_an_epoch_has_every_row_once(count: int, seed: int, epoch: int, block: int, buffer: int) -> None:
    rows = shuffle(Stretch(range(count)), seed, epoch, block, buffer)
    assert sorted(rows) == list(range(count))


@settings(deadline=None)
@given(st.integers(0, 2_000), st.integers(1, 9), st.integers(1, 2_000), st.sampled_from([1, 2, 3, 4, 8, 16, 64, 70]))
def test_ranks_share_an_epoch(count: int, block: int, buffer: int, ranks: int) -> None:
    epoch = shuffle(Stretch(range(count)), 1, 2, block, buffer)
    shards = [shard(epoch, ranks, rank) for rank in range(ranks)]
    assert len({len(rows) for rows in shards}) == 1
    together = np.stack([np.asarray(rows) for rows in shards], axis=1).reshape(-1)
    assert together.tolist() == list(epoch)[: len(together)]
    lost = count - len(together)
    assert lost == left_out(count, ranks) == count % (1 if ranks == 1 else LANES if LANES % ranks == 0 else ranks)


def test_global_batches_are_the_same_on_any_number_of_ranks_changed_at_any_step() -> None:
    epoch = shuffle(Stretch(range(100_000)), 7, 0, 16, 8_192)
    batch_rows = 512
    expected = [
        set(epoch.numbers(start, start + batch_rows).tolist()) for start in range(0, 20 * batch_rows, batch_rows)
    ]
    for step, ranks in enumerate([1, 2, 4, 8, 16, 16, 8, 4, 2, 1, 1, 16, 2, 8, 4, 64, 32, 1, 2, 16]):
        own = batch_rows // ranks
        parts = [shard(epoch, ranks, rank).numbers(step * own, (step + 1) * own) for rank in range(ranks)]
        found = np.concatenate(parts).tolist()
        assert len(found) == batch_rows
        assert set(found) == expected[step]


def test_a_rank_reads_blocks_that_no_other_one_reads() -> None:
    epoch = shuffle(Stretch(range(200_000)), 7, 0, 16, 8_192)
    regular = LANES * epoch.lane_rows
    for ranks in (2, 4, 8, 16, 64):
        blocks = [set((shard(epoch, ranks, rank).numbers(0, regular // ranks) // 16).tolist()) for rank in range(ranks)]
        assert sum(map(len, blocks)) == len(set().union(*blocks)) == regular // 16


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 30), st.integers(1, 5_000), st.sampled_from([1, 2, 8, 64]), st.data())
def test_a_window_is_made_of_whole_blocks(count: int, block: int, buffer: int, ranks: int, data: st.DataObject) -> None:
    """So that each block is read once, in one go, by whoever reads window by window."""
    epoch = shuffle(Stretch(range(count)), 3, 1, block, buffer)
    rows = shard(epoch, ranks, data.draw(st.integers(0, ranks - 1)))
    regular = LANES * epoch.lane_rows // ranks
    bounds = [0, *rows.windows(0, len(rows)).tolist(), len(rows)]
    for start, stop in pairwise(bounds):
        assert stop - start <= max(buffer, LANES) // ranks + LANES * epoch.block_rows
        if stop <= regular:
            numbers = np.sort(rows.numbers(start, stop)).reshape(-1, epoch.block_rows)
            assert (numbers % epoch.block_rows == np.arange(epoch.block_rows)).all()
    inner = rows.windows(1, max(1, len(rows) - 1)).tolist()
    assert inner == [bound for bound in bounds[1:-1] if 1 < bound < len(rows) - 1]
    if ranks == 1:
        cut = rows[1:-1]
        assert cut.windows(0, len(cut)).tolist() == [bound - 1 for bound in bounds[1:-1] if 1 < bound < len(rows) - 1]


@pytest.mark.parametrize(("block", "buffer", "most"), [(64, 131_072, 1.6), (256, 262_144, 2.1), (1, 131_072, 1.1)])
def test_batches_mix_the_classes_of_sorted_rows(block: int, buffer: int, most: float) -> None:
    """chi2/df of the counts of 1,000 classes in batches of 1,024 rows: 1 is ideal, more by batch / blocks mixed."""
    count, classes, batch_rows = 2_000_000, 1_000, 1_024
    epoch = shuffle(Stretch(range(count)), 5, 0, block, buffer)
    assert epoch.blocks_mixed == buffer // block
    values = []
    for start in range(0, count - batch_rows, 37 * batch_rows):
        found = np.bincount(epoch.numbers(start, start + batch_rows) * classes // count, minlength=classes)
        values.append(((found - batch_rows / classes) ** 2 / (batch_rows / classes)).sum() / (classes - 1))
    assert 0.9 < np.mean(values) < most


def test_orders_have_nothing_to_do_with_each_other() -> None:
    count = 1_000_000
    orders = [
        np.asarray(shuffle(Stretch(range(count)), seed, epoch, 16, 65_536)) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    ranks = [np.arange(count), *map(np.argsort, orders)]
    for a, left in enumerate(ranks):
        for right in ranks[:a]:
            # Blocks of 16 rows move together: as if there were a sixteenth of the rows. Five standard deviations.
            assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(count / 16)


@pytest.mark.parametrize("count", [20, 100])
def test_neighbours_are_parted(count: int) -> None:
    """That a row follows the one before it happens once an order, nearly, by chance. Five standard deviations."""
    orders = [np.asarray(shuffle(Stretch(range(count)), seed, 0, 1, count)) for seed in range(2_000)]
    follow = np.mean([(np.diff(order) == 1).sum() for order in orders])
    assert abs(follow - (count - 1) / count) < 5 / np.sqrt(2_000)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_rows_come_in_every_order(count: int) -> None:
    orders = {tuple(shuffle(Stretch(range(count)), seed, 0, 1, 10)) for seed in range(300)}
    assert orders == {*permutations(range(count))}


def test_every_place_is_as_likely_for_every_row() -> None:
    found = np.zeros((10, 10))
    for seed in range(4_000):
        found[np.arange(10), np.asarray(shuffle(Stretch(range(10)), seed, 0, 1, 10))] += 1
    assert ((found - 400) ** 2 / 400).sum() / 81 < 1.5


@pytest.mark.parametrize("step", [1, 7, 64, 301])
def test_rows_far_apart_are_those_of_the_order(step: int) -> None:
    """What neighbours share is looked up once for all of them; rows that lie apart share nothing."""
    for count, block, buffer in ((20_000, 3, 2_000), (20_000, 16, 5_000), (300, 1, 300), (1_003, 7, 450)):
        epoch = shuffle(Stretch(range(count)), 1, 2, block, buffer)
        alone = np.concatenate([epoch.at(np.array([position])) for position in range(0, count, 101)])
        np.testing.assert_array_equal(alone, np.asarray(epoch)[::101])
        np.testing.assert_array_equal(np.asarray(epoch[::step]), np.asarray(epoch)[::step])


def test_an_epoch_of_billions_holds_nothing() -> None:
    tracemalloc.start()
    try:
        rows = shard(shuffle(Stretch(range(5_800_000_000)), 1, 3, 42, 83_333), 64, 7)
        batch = rows.numbers(600_000 * 64, 600_001 * 64)
        assert len(set(batch.tolist())) == 64
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        assert len(pickle.dumps(rows)) < 1_000
    finally:
        tracemalloc.stop()


def test_rows_far_apart_take_no_memory_for_those_between() -> None:
    epoch = shuffle(Stretch(range(10_000_000)), 1, 3, 1, 65_536)
    tracemalloc.start()
    try:
        epoch.at(np.arange(0, len(epoch), 10_000))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Samples and shards


@settings(deadline=None)
@given(selections(), st.integers(0, 3), st.data())
def test_samples_are_exact_in_order_and_lie_in_larger_ones(rows: Rows, seed: int, data: st.DataObject) -> None:
    few = data.draw(st.integers(0, len(rows)))
    many = data.draw(st.integers(few, len(rows)))
    positions = Stretch(range(len(rows)))
    small, large = sample(positions, few, seed), sample(positions, many, seed)
    assert len(small) == few
    assert small.is_ascending
    assert set(small) <= set(large)
    assert list(sample(rows, few, seed)) == np.asarray(rows)[np.asarray(small)].tolist()


def test_samples_are_drawn_from_everywhere() -> None:
    drawn = np.concatenate([np.asarray(sample(Stretch(range(1_000)), 100, seed)) for seed in range(500)])
    found = np.bincount(drawn, minlength=1_000)
    assert ((found - 50) ** 2 / 45).sum() / 999 < 1.25


@pytest.mark.parametrize("count", [0, 1, 5, 64, 1_000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_shards_of_rows_in_order_are_stretches_without_loss(count: int, ranks: int) -> None:
    shards = [shard(Stretch(range(count)), ranks, rank) for rank in range(ranks)]
    assert [row for rows in shards for row in rows] == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_what_is_dealt_is_read_in_the_windows_of_the_whole() -> None:
    epoch = shuffle(Stretch(range(100_000)), 7, 0, 16, 8_192)
    rank = shard(epoch, 2, 1)
    for stretch in (100, 5_000):
        for worker in range(3):
            rows = deal(rank, stretch, 3, worker)
            bounds = [0, *rows.windows(0, len(rows)).tolist(), len(rows)]
            spans = [rows.numbers(start, stop) // 16 for start, stop in pairwise(bounds)][:-1]
            assert len(spans) >= 5
            assert sum(len(np.unique(blocks)) for blocks in spans) == len(np.unique(np.concatenate(spans)))
            inner = rows.windows(1_000, 9_000).tolist()
            assert inner == [bound for bound in bounds if 1_000 < bound < 9_000]


@given(selections(), st.integers(1, 40), st.integers(1, 4), st.integers(1, 3))
def test_what_is_dealt_makes_the_whole_again(rows: Rows, stretch: int, ranks: int, workers: int) -> None:
    rows = rows[: len(rows) // ranks * ranks]
    hands = {
        (rank, worker): deal(rows, stretch, ranks * workers, rank + ranks * worker, round_of=ranks)
        for rank in range(ranks)
        for worker in range(workers)
    }
    numbers = np.asarray(rows)
    for step, start in enumerate(range(0, len(rows), stretch * ranks)):
        own = min(stretch, (len(rows) - start) // ranks)
        first = step // workers * stretch
        parts = [hands[rank, step % workers].numbers(first, first + own) for rank in range(ranks)]
        assert np.concatenate(parts).tolist() == numbers[start : start + own * ranks].tolist()
    assert sum(map(len, hands.values())) == len(rows)


def test_kinds_say_what_they_are() -> None:
    epoch: Any = shuffle(pick(np.array([5, 2, 9])), 0, 0, 1, 10)
    assert isinstance(epoch, Shuffled)
    assert isinstance(epoch[1:], Section)
    assert repr(Stretch(range(5_000))) == "<5,000 rows: 0, 1, 2, …, 4,998, 4,999>"
    assert repr(Stretch(range(2))) == "<2 rows: 0, 1>"
    assert repr(pick(np.array([3, 1_234, 2, 0, 9, 8]))) == "<6 rows: 3, 1,234, 2, 0, 9, 8>"
    assert repr(pick(np.array([3, 1_234, 2, 0, 9, 8, 7]))) == "<7 rows: 3, 1,234, 2, …, 8, 7>"
