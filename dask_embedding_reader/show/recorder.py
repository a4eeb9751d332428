"""How fast batches came, and in how much memory."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd

from dask_embedding_reader._common.progress import used_memory

if TYPE_CHECKING:
    import numpy.typing as npt

T = TypeVar("T")
COLUMNS = ("seconds", "waited", "rows", "nbytes", "memory_nbytes")


class BatchRecorder(Iterator[tuple[T, pd.DataFrame]]):
    """Hands on batches as they come, and notes for each when it came and what memory the process had.

    Parameters
    ----------
    batches : iterable of (array, pandas.DataFrame)
        What a reader's call or :func:`iter_batches` returns.

    Attributes
    ----------
    table : pandas.DataFrame
        A row for each batch so far: ``seconds`` from the first request to when it was handed on, of which the loop
        ``waited`` for it so many, its ``rows``, the bytes of its vectors ``nbytes``, and ``memory_nbytes``, the memory
        of the whole process (its resident set) then, all float64.

    Examples
    --------
    >>> import numpy as np, tempfile, os
    >>> from dask_embedding_reader import EmbeddingReader
    >>> folder = tempfile.mkdtemp()
    >>> np.save(os.path.join(folder, "0.npy"), np.ones((10, 4), "float32"))
    >>> recorder = BatchRecorder(EmbeddingReader(folder)(batch_size=6, show_progress=False))
    >>> for embeddings, meta in recorder:
    ...     pass
    >>> recorder.table[["rows", "nbytes"]]
       rows  nbytes
    0   6.0    96.0
    1   4.0    64.0
    """

    def __init__(self, batches: Iterable[tuple[T, pd.DataFrame]]) -> None:
        self._batches = iter(batches)
        self._columns = {name: array("d") for name in COLUMNS}
        self._start: float | None = None

    def __next__(self) -> tuple[T, pd.DataFrame]:
        asked = time.perf_counter()
        if self._start is None:
            self._start = asked
        batch = next(self._batches)
        came = time.perf_counter()
        vectors: Any = batch[0]
        values = (came - self._start, came - asked, len(vectors), vectors.nbytes, used_memory())
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        return batch

    @property
    def table(self) -> pd.DataFrame:
        """A row for each batch so far."""
        return pd.DataFrame({name: np.array(column) for name, column in self._columns.items()})

    def close(self) -> None:
        """Stop reading, as leaving the loop and letting go of the recorder does."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()

    def plot(self) -> npt.NDArray[Any]:
        """Plot throughput and memory over time.

        Returns
        -------
        numpy.ndarray of matplotlib.axes.Axes
            The panel of throughput and that of memory.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        from dask_embedding_reader.show.plots import plot_recording  # noqa: PLC0415 - needs matplotlib

        return plot_recording(self.table)
