"""Batches of a reader as tensors, for training with PyTorch: ``pip install "dask-embedding-reader[torch]"``."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

try:
    import torch
    from torch import distributed
    from torch.utils.data import IterableDataset, get_worker_info
except ImportError as error:
    raise ImportError('batches as tensors need torch: pip install "dask-embedding-reader[torch]"') from error

from dask_embedding_reader._common.arguments import (
    check_columns,
    check_integer,
    check_nbytes,
    check_positive,
    likest_first,
)
from dask_embedding_reader.batches.read import read_batches
from dask_embedding_reader.collection.layout import ALL_COLUMNS
from dask_embedding_reader.collection.manifest import Manifest
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError, ColumnError
from dask_embedding_reader.formats.metadata import ROW_NUMBER
from dask_embedding_reader.reader import EmbeddingReader
from dask_embedding_reader.rows.section import deal
from dask_embedding_reader.rows.selection import Rows
from dask_embedding_reader.rows.shuffled import Shuffled, left_out

_EPOCH, _FIRST_EPOCH, _FIRST_ROW, _VERSION, _PASS = range(5)
"""What is shared with the workers: the epoch that was set; epoch and row at which the next pass begins, which a state
may have told; how often that was changed; and which pass of workers has begun there."""


_STATE = ("token", "epoch", "rows", "workers", "step_rows")
"""What a state holds; its rows are those of all ranks, or of one of several workers where its next step begins."""


class EmbeddingBatches(IterableDataset):
    """Batches of vectors and metadata as tensors, each rank with its own, resumed at any batch.

    For ``DataLoader(dataset, batch_size=None)``: the batches are made here. What a trainer needs to know:

    1. ``batch_size`` is of one rank: the ranks together take ``batch_size * world_size`` rows in a step, and all take
       equally many steps. The last batch may be smaller, of the same size on every rank.
    2. Shuffle the reader, and call ``set_epoch(epoch)`` before each epoch: which rows a step has depends on the data,
       seed and epoch alone, not on the number of ranks (of 1, 2, 4, …, 64) or workers, also when it changes midway.
    3. With several ranks the last rows of an epoch are left out: fewer than 64, or than ``world_size`` where that does
       not divide 64. ``reader.shuffle(seed, epoch=epoch)(batch_size, start=len(reader) // 64 * 64)`` has them.
    4. To resume, ``load_state_dict`` what ``state_dict`` said, or ``set_epoch(epoch, start=rows_done)``, which counts
       the rows of all ranks. With workers only ``StatefulDataLoader`` of torchdata knows a state, or who counts steps.
    5. Files are read ahead by threads: ``num_workers=0`` or 1 is fastest. More workers read the same blocks again.

    Parameters
    ----------
    reader : EmbeddingReader
        The rows, shuffled or in order, not yet sharded: every rank gives the same.
    batch_size : int
        Rows of a batch of one rank.
    columns : str or list of str, optional
        Which of the ``meta_columns`` of the reader each batch has; ``"i"`` is the row number, ``"*"`` all of them.
    dtype : str, dtype or torch.dtype, default "float32"
        Type of the vectors; None keeps the stored one.
    rank, world_size : int, optional
        By default those of ``torch.distributed`` if it is initialised, else one rank.
    max_piece_size, parallel_pieces, show_progress, max_ram_usage_in_bytes : optional
        As for batches of the reader. The memory is that of one rank: workers share it.

    Yields
    ------
    vectors : torch.Tensor
        Of shape ``(rows, dimension)``, in the memory that they were read into.
    columns : dict of str to torch.Tensor or list
        Numbers and booleans of columns that have no nulls as tensors, everything else as lists. A
        ``DataLoader`` looks at each item of a list, for 1 us; with ``collate_fn=tuple`` it leaves batches as they are.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument makes no sense.
    ColumnError
        If the reader was not opened with a column.

    Examples
    --------
    >>> import numpy as np, tempfile, os
    >>> from torch.utils.data import DataLoader
    >>> from dask_embedding_reader import EmbeddingReader
    >>> folder = tempfile.mkdtemp()
    >>> np.save(os.path.join(folder, "0.npy"), np.ones((1_000, 4), "float16"))
    >>> reader = EmbeddingReader(folder).shuffle(seed=1)
    >>> dataset = EmbeddingBatches(reader, 400, columns="i", rank=0, world_size=1)
    >>> for epoch in range(2):
    ...     dataset.set_epoch(epoch)
    ...     for vectors, columns in DataLoader(dataset, batch_size=None):
    ...         print(vectors.shape, vectors.dtype, len(columns["i"]))
    torch.Size([400, 4]) torch.float32 400
    torch.Size([400, 4]) torch.float32 400
    torch.Size([200, 4]) torch.float32 200
    torch.Size([400, 4]) torch.float32 400
    torch.Size([400, 4]) torch.float32 400
    torch.Size([200, 4]) torch.float32 200
    """

    def __init__(
        self,
        reader: EmbeddingReader,
        batch_size: int,
        *,
        columns: str | Sequence[str] = (),
        dtype: npt.DTypeLike | torch.dtype | None = "float32",
        rank: int | None = None,
        world_size: int | None = None,
        max_piece_size: int | str | None = None,
        parallel_pieces: int | None = None,
        show_progress: bool = False,
        max_ram_usage_in_bytes: int | str = 2**32,
    ) -> None:
        if not isinstance(reader, EmbeddingReader):
            raise ArgumentTypeError(f"reader must be an EmbeddingReader, not {type(reader).__name__}")
        if reader._shards:
            raise ArgumentError(
                f"this reader is a shard already (shard {reader._shards[1]} of {reader._shards[0]}), and would be "
                "shared out among the ranks again: give every rank the whole, and rank= and world_size="
            )
        self._batch_rows = check_positive("batch_size", batch_size)
        self._rank, self._ranks = _rank_of(rank, world_size)
        names = check_columns(columns, "columns")
        if names == ALL_COLUMNS:
            names = tuple(field.name for field in reader.manifest.fields)
        self._reader = reader._view(reader.rows)
        self._reader.manifest = _narrowed(reader.manifest, names)
        self._is_tensor = {name: name == ROW_NUMBER for name in names} | {
            field.name: _holds(field.dtype) for field in self._reader.manifest.fields
        }
        wanted = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
        self._options: dict[str, Any] = {
            "max_piece_size": max_piece_size,
            "parallel_pieces": parallel_pieces,
            "show_progress": show_progress,
            "max_ram_usage_in_bytes": check_nbytes("max_ram_usage_in_bytes", max_ram_usage_in_bytes),
            "dtype": wanted,
        }
        found = self._reader._request(self._batch_rows, 0, None, **self._options).dtype
        if not _holds(found):
            raise ArgumentError(f"dtype={found} has no equal in torch; give dtype=, such as float32")
        epoch = reader.rows.epoch if isinstance(reader.rows, Shuffled) else 0
        # Shared, so that workers that outlive an epoch learn of the next one.
        self._shared = torch.tensor([epoch, epoch, 0, 1, 0], dtype=torch.int64).share_memory_()
        self._seen = 0
        self._position: tuple[int, int] | None = None
        self._own: tuple[int, int, int] | None = None
        self._token = _order_token(self._reader)
        if isinstance(reader.rows, Shuffled):
            self._reader.shard(self._ranks, self._rank)._warn_of_order(self._batch_rows)

    def __len__(self) -> int:
        """Return how many batches an epoch has on each rank."""
        return math.ceil(self._end(0) // self._ranks / self._batch_rows)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Begin where the state says that was loaded last, else at the first row of the epoch."""
        worker = get_worker_info()
        workers, hand = (worker.num_workers, worker.id) if worker else (1, 0)
        epoch, first, hand = self._begin(worker.seed - worker.id or 1 if worker else 0, hand)
        step = self._batch_rows * self._ranks
        self._position = epoch, first + hand * step
        view = self._reader._view(self._rows(epoch, first, workers, hand))
        limit = max(1, self._options["max_ram_usage_in_bytes"] // workers)
        request = view._request(self._batch_rows, 0, None, **self._options | {"max_ram_usage_in_bytes": limit})
        return self._tensors(read_batches(view.manifest, request), self._position, workers)

    def _begin(self, number: int, hand: int) -> tuple[int, int, int]:
        """Return the epoch of this pass, its first row, and which of the steps from there on are this worker's.

        The first pass begins where the state said. Workers are made anew for each pass, and know by its number whether
        it is the first one.
        """
        shared = self._shared.tolist()
        is_first = self._seen != shared[_VERSION] and shared[_PASS] in (0, number)
        self._seen = shared[_VERSION]
        if self._own or is_first or not number:
            self._shared[_PASS] = number
        if self._own:
            begin, self._own = self._own, None
            return begin
        return (shared[_FIRST_EPOCH], shared[_FIRST_ROW], hand) if is_first else (shared[_EPOCH], 0, hand)

    def _end(self, first: int) -> int:
        """Return the row after the last one of an epoch, from ``first`` on equally many for each rank."""
        count = len(self._reader)
        rows = max(0, count - left_out(count, self._ranks) - first)
        return first + rows - rows % self._ranks

    def _rows(self, epoch: int, first: int, workers: int, hand: int) -> Rows:
        """Return the rows of this rank and worker from the row ``first`` of an epoch on."""
        rows, end = self._reader.rows, self._end(first)
        if isinstance(rows, Shuffled):
            own = replace(rows, epoch=epoch)[first + self._rank : end : self._ranks]
            return deal(own, self._batch_rows, workers, hand)
        # In order, each rank takes stretches of neighbours: of every other row each would read all.
        hands, index = self._ranks * workers, self._rank + self._ranks * hand
        return deal(rows[first:end], self._batch_rows, hands, index, round_of=self._ranks)

    def _tensors(
        self, batches: Iterator[tuple[npt.NDArray[Any], pd.DataFrame]], position: tuple[int, int], workers: int
    ) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        (epoch, row), step = position, self._batch_rows * self._ranks * workers
        end = self._end(row)
        for vectors, frame in batches:
            row += step
            self._position = epoch, row if workers > 1 else min(row, end)
            columns = {name: _column(frame[name], is_tensor) for name, is_tensor in self._is_tensor.items()}
            yield torch.from_numpy(vectors), columns

    def set_epoch(self, epoch: int, *, start: int | None = None) -> None:
        """Say which epoch the next passes have, also to workers that are there already.

        Parameters
        ----------
        epoch : int
            Another epoch is another order of a shuffled reader.
        start : int, optional
            How many rows of it all ranks together have done: the next pass goes on there, later ones begin with the
            first row. By default where a state of the same epoch says that was loaded before, else 0.
        """
        number = check_integer("epoch", epoch)
        first = 0 if start is None else self._checked_row("start", start)
        shared = self._shared.tolist()
        is_pending = self._seen != shared[_VERSION] and not shared[_PASS]
        if start is None and is_pending and shared[_FIRST_EPOCH] == number:
            first = shared[_FIRST_ROW]
        self._set(number, number, first)

    def state_dict(self) -> dict[str, Any]:
        """Return where the pass is, the same on every rank: for :meth:`load_state_dict` on any number of ranks.

        Returns
        -------
        dict of str to int or str
            The epoch, how many of its rows all ranks together have done, and the token of the data and their order.

        Raises
        ------
        ArgumentError
            If workers iterate, of which this process does not know how far they are.
        """
        worker, shared = get_worker_info(), self._shared.tolist()
        if worker is None and shared[_PASS]:
            raise ArgumentError(
                "workers of a DataLoader iterate over this dataset, and this process does not know how far they are: "
                "use StatefulDataLoader of torchdata, num_workers=0, or count the steps and go on with "
                f"set_epoch(epoch, start=steps * {self._batch_rows * self._ranks})"
            )
        epoch, row = self._position or (shared[_FIRST_EPOCH], shared[_FIRST_ROW])
        return {
            "token": self._token,
            "epoch": epoch,
            "rows": row,
            "workers": worker.num_workers if worker else 1,
            "step_rows": self._batch_rows * self._ranks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state says; only the next pass does so.

        Parameters
        ----------
        state : dict
            What :meth:`state_dict` returned, with any number of ranks and another ``batch_size`` or other columns.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If it is a state of other data or of another order, or is none.
        """
        if not isinstance(state, Mapping) or not state.keys() >= set(_STATE):
            raise ArgumentTypeError(f"state must be what state_dict returned, with {', '.join(_STATE)}, not {state!r}")
        if state["token"] != self._token:
            raise ArgumentError(
                f"the state is of other data or another order (token {state['token']!r}, here {self._token!r}): load "
                "it with the same files, the same rows of them, and the same seed and buffer_rows of shuffle"
            )
        epoch, workers = check_integer("epoch of the state", state["epoch"]), state["workers"]
        worker = get_worker_info()
        if workers == 1:
            row = self._checked_row("rows of the state", state["rows"])
        else:
            here = (worker.num_workers if worker else 1, self._batch_rows * self._ranks)
            if here != (workers, state["step_rows"]):
                raise ArgumentError(
                    f"the state is of one of {workers} workers, with steps of {state['step_rows']:,} rows: it tells "
                    f"nothing to {here[0]} with steps of {here[1]:,}; count the steps and go on with "
                    "set_epoch(epoch, start=rows_done), or use one worker, whose states fit any number of ranks"
                )
            row = check_integer("rows of the state", state["rows"])
        if worker:
            self._own = epoch, row, worker.id if workers == 1 else 0
        else:
            self._set(self._shared.tolist()[_EPOCH], epoch, row)

    def _checked_row(self, name: str, value: Any) -> int:
        row = check_integer(name, value)
        if not 0 <= row <= len(self._reader):
            raise ArgumentError(f"{name}={row:,} is out of range: an epoch has {len(self._reader):,} rows")
        return row

    def _set(self, epoch: int, first_epoch: int, first_row: int) -> None:
        version = int(self._shared[_VERSION]) + 1
        self._shared.copy_(torch.tensor([epoch, first_epoch, first_row, version, 0], dtype=torch.int64))
        self._position = None


def _rank_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return which rank of how many this is."""
    if (rank is None) != (world_size is None):
        raise ArgumentError(f"rank={rank} and world_size={world_size} go together: give both, or neither")
    if rank is not None:
        ranks, number = check_positive("world_size", world_size), check_integer("rank", rank)
        if not 0 <= number < ranks:
            raise ArgumentError(f"rank={number} is none: of world_size={ranks} they are 0 to {ranks - 1}")
        return number, ranks
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    told = os.environ.get("WORLD_SIZE", "1")
    if told != "1":  # as torchrun sets it: every rank would get all rows
        raise ArgumentError(
            f"WORLD_SIZE={told} in the environment, but torch.distributed is not initialised: call "
            "init_process_group first, or give rank= and world_size="
        )
    return 0, 1


def _narrowed(manifest: Manifest, names: Sequence[str]) -> Manifest:
    """Return a collection with some of its metadata columns, so that no other one is read."""
    known = {field.name: field for field in manifest.fields}
    for name in names:
        if name not in known and name != ROW_NUMBER:
            there = ", ".join(map(repr, likest_first(name, [*known, ROW_NUMBER])))
            raise ColumnError(
                f"the reader was not opened with the column {name!r}; those that it has are {there}: open it with "
                "meta_columns=[...]"
            )
    return manifest.with_columns([name for name in names if name != ROW_NUMBER])


def _order_token(reader: EmbeddingReader) -> str:
    """Return a hash of the rows and of their order in all epochs, whatever the columns."""
    rows = replace(reader.rows, epoch=0) if isinstance(reader.rows, Shuffled) else reader.rows
    parts = f"{reader.manifest.vectors.token} {rows.token}"
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


def _holds(dtype: Any) -> bool:
    """Tell whether torch has tensors of a dtype."""
    try:
        torch.from_numpy(np.empty(0, dtype))
    except TypeError:
        return False
    return True


def _column(values: pd.Series[Any], is_tensor: bool) -> Any:
    """Return a column of a batch as a tensor, or as a list with None for what is null."""
    if is_tensor:
        array = values.to_numpy()
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    if values.dtype == object:  # text, which has None there already
        return values.tolist()
    return values.astype(object).where(values.notna(), None).tolist()
