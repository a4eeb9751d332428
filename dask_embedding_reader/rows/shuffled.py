"""Rows at random: shuffled, sharded, sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_embedding_reader.rows.permutation import UInt32s, make_keys, mix, permute
from dask_embedding_reader.rows.picked import pick
from dask_embedding_reader.rows.section import Section
from dask_embedding_reader.rows.selection import Int64s, Rows, hash_of

Array = npt.NDArray[Any]

LANES = 64
"""The stretches that an epoch is dealt from, one row of each in turn: every number of ranks that divides it gets whole
stretches. A constant: another one would be another order."""

_STEP_POSITIONS = 2**15
"""So many are permuted at a time: their numbers stay in the processor's cache from one operation to the next."""


def _apart(
    values: Int64s, mask: npt.NDArray[np.bool_], yes: Callable[[Int64s], Int64s], no: Callable[[Int64s], Int64s]
) -> Int64s:
    """Map values by one function or another."""
    if not len(values):
        return values
    if mask.all() or not mask.any():
        return (yes if mask[0] else no)(values)
    found = np.empty_like(values)
    found[mask], found[~mask] = yes(values[mask]), no(values[~mask])
    return found


def _each_once(function: Callable[[Int64s], Array], values: Int64s) -> Array:
    """Map values by a function that costs more than to look them up: where they are near each other, each once."""
    low, high = int(values.min()), int(values.max())
    if 4 * (high - low) >= len(values):
        return function(values)
    found: Array = function(np.arange(low, high + 1))[values - low]
    return found


def _tweaks(numbers: Int64s) -> UInt32s:
    return mix(mix((numbers >> 32).astype(np.uint32)) ^ numbers.astype(np.uint32))


@dataclass(frozen=True, eq=False, repr=False)
class Shuffled(Rows):
    """Another selection in an order that only seed and epoch tell, nothing of which is held.

    The selection is cut into blocks, and these are permuted: neighbours are read at once, from anywhere. What results
    is cut into lanes, of equally many blocks. Of each lane the rows of a few blocks, its window, are permuted; then the
    next ones. An epoch takes one row of each lane in turn. So a batch has rows of all lanes, and of all blocks of their
    windows; and rank r of W, which reads every W-th row, reads some of the lanes, and no block that another one reads.

    Blocks that do not fill a round of lanes come last, and are dealt in the same way, cut into as many parts.
    """

    of: Rows
    """The other selection."""
    seed: int
    """Orders of two seeds have nothing to do with each other."""
    epoch: int
    """Nor have those of two epochs."""
    block_rows: int
    """Rows of a block."""
    lane_rows: int
    """Rows of a lane: whole blocks."""
    lane_window_rows: int
    """Rows of a window of one lane: whole blocks."""

    is_ascending = False

    @property
    def window_rows(self) -> int:  # type: ignore[override]  # a value of the class elsewhere
        """How many rows are best read in one go: the windows of all lanes."""
        return LANES * self.lane_window_rows

    @property
    def token(self) -> str:
        """A hash of the other selection and of what makes the order."""
        return hash_of("shuffled", self.of.token, self.seed, self.epoch, self.block_rows, self.lane_window_rows)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.of.nbytes + 40

    def __len__(self) -> int:
        return len(self.of)

    @property
    def blocks_mixed(self) -> int:
        """How many blocks the rows of a batch may come from."""
        return self.window_rows // self.block_rows

    def at(self, positions: Int64s) -> Int64s:
        """Return the rows at positions."""
        found = np.empty(len(positions), np.int64)
        for start in range(0, len(positions), _STEP_POSITIONS):
            here = slice(start, start + _STEP_POSITIONS)
            found[here] = self._places(positions[here])
        return self.of.at(found)

    def _places(self, positions: Int64s) -> Int64s:
        """Return the positions in the other selection."""
        regular = LANES * self.lane_rows
        short = (len(self) - regular) // LANES
        dealt = regular + LANES * short

        def irregular(tail: Int64s) -> Int64s:
            places = _apart(tail, tail < dealt, in_short_lanes, last)
            return _apart(places, places < self._block_rows_in_all, self._in_blocks, lambda rest: rest)

        def in_short_lanes(tail: Int64s) -> Int64s:
            number, row = self._in_lanes(tail - regular, regular, short, short)
            return regular + number * short + row

        def last(tail: Int64s) -> Int64s:
            return dealt + permute(tail - dealt, len(self) - dealt, make_keys(f"tail {self.seed} {self.epoch}"))

        return _apart(positions, positions < regular, self._regular, irregular)

    def _regular(self, positions: Int64s) -> Int64s:
        """Return the positions in the other selection of those in lanes of full length."""
        number, row = self._in_lanes(positions, 0, self.lane_rows, self.lane_window_rows)
        window_blocks = self.lane_window_rows // self.block_rows

        def first_places(blocks: Int64s) -> Int64s:
            numbers = blocks // window_blocks
            windows = numbers // LANES
            places = (numbers - windows * LANES) * self.lane_rows + windows * self.lane_window_rows
            places += (blocks - numbers * window_blocks) * self.block_rows
            # The last windows have fewer blocks: of the next lane some are looked up too, and not asked for.
            return self._in_blocks(places)

        block = row // self.block_rows
        found: Int64s = _each_once(first_places, number * window_blocks + block) + (row - block * self.block_rows)
        return found

    def _in_lanes(self, positions: Int64s, start: int, lane_rows: int, window_rows: int) -> tuple[Int64s, Int64s]:
        """Return in which window of which lane rows are, as one number, and which of its rows they are.

        They are counted from where the lanes begin, which is at ``start``.
        """
        window = positions // (LANES * window_rows)
        here = positions - window * (LANES * window_rows)
        row = here // LANES
        number = here - row * LANES + window * LANES
        tweaks = _each_once(_tweaks, number + start)  # those of no other window of a lane
        keys = make_keys(f"rows {self.seed} {self.epoch}")
        full = window < lane_rows // window_rows  # from there on, windows have fewer rows
        if full.all():
            return number, permute(row, window_rows, keys, tweaks)
        inner = np.empty_like(row)
        for size, some in ((window_rows, full), (lane_rows % window_rows, ~full)):
            inner[some] = permute(row[some], size, keys, tweaks[some])
        return number, inner

    @property
    def _block_rows_in_all(self) -> int:
        """Rows of all blocks."""
        return len(self) // self.block_rows * self.block_rows

    def _in_blocks(self, places: Int64s) -> Int64s:
        """Return which positions of the other selection lie at places among all full blocks in their order."""
        slots = places // self.block_rows
        blocks = len(self) // self.block_rows
        moved = permute(slots, blocks, make_keys(f"blocks {self.seed} {self.epoch}"))
        return places + (moved - slots) * self.block_rows

    def windows(self, start: int, stop: int) -> Int64s:
        """Return which of the positions between ``start`` and ``stop`` end what is best read in one go."""
        step = self.window_rows
        bounds = np.arange(start // step + 1, -(-min(stop, LANES * self.lane_rows) // step) + 1) * step
        bounds = np.minimum(bounds, LANES * self.lane_rows)
        return bounds[(bounds > start) & (bounds < stop)]

    def _cut(self, positions: range) -> Rows:
        return Section(self, positions)


def shuffle(of: Rows, seed: int, epoch: int, block_rows: int, buffer_rows: int) -> Shuffled:
    """Shuffle a selection.

    Parameters
    ----------
    of
        The selection.
    seed, epoch
        What tells the order.
    block_rows
        Rows that are neighbours and are read at once.
    buffer_rows
        Rows that are mixed: a window of all lanes.
    """
    # Where all rows are in one window, they are read in one go, however they are ordered.
    block = 1 if len(of) <= buffer_rows else max(1, min(block_rows, buffer_rows // LANES))
    lane = len(of) // (LANES * block) * block
    window = max(1, buffer_rows // (LANES * block)) * block
    return Shuffled(of, seed, epoch, block, lane, min(window, max(lane, 1)))


def epoch_of(rows: Rows) -> Shuffled | None:
    """Return the shuffled selection that rows are, or are a part of; None if they are in no such order."""
    whole = rows.of if isinstance(rows, Section) else rows
    return whole if isinstance(whole, Shuffled) else None


def shard(of: Rows, num_shards: int, index: int) -> Rows:
    """Return one of several shards of a selection.

    Of a shuffled one every ``num_shards``-th row: all shards together read it in its order, however many there are. All
    have equally many rows, for which the last ones, fewer than ``LANES``, are left out (fewer than ``num_shards``,
    where that does not divide ``LANES``). Of another selection a stretch, without loss.
    """
    count = len(of)
    if isinstance(of, Shuffled):
        return of[index : count - left_out(count, num_shards) : num_shards]
    return of[index * count // num_shards : (index + 1) * count // num_shards]


def left_out(count: int, num_shards: int) -> int:
    """Return how many rows of an epoch are left out, so that all shards have equally many and end at the same one."""
    return count % (1 if num_shards == 1 else LANES if LANES % num_shards == 0 else num_shards)


def sample(of: Rows, count: int, seed: int) -> Rows:
    """Return as many rows of a selection, drawn at random, in their order: more of the same seed include them."""
    chosen = permute(np.arange(count, dtype=np.int64), len(of), make_keys(f"sample {seed}"))
    chosen.sort()
    return pick(of.at(chosen))
