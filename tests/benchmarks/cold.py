"""Files that the system holds nothing of: the disk's speed is the limit, however many threads read."""

from __future__ import annotations

from typing import Any

import numpy as np

from .contenders import Job, contends, open_reader, our_array, whole_pass
from .convert import at_once, prepare, reads
from .data import Data
from .floors import DISK_READS, OURS
from .works import Work


@contends(OURS, "cold-npy-*", "cold-parquet")
def our_pass(work: Work, data: Data) -> Job:
    """Every batch."""
    job = whole_pass("dask_embedding_reader", work, data)
    prepare(work, data)
    return job


@contends(OURS, "cold-sum")
def our_sum(work: Work, data: Data) -> Job:
    """Reduce the lazy array to a number."""
    x = our_array(work, data)
    prepare(work, data)
    return lambda: {"sum": float(x.sum(dtype=np.float64).compute())}


@contends(OURS, "cold-take")
def our_take(work: Work, data: Data) -> Job:
    """All rows but the first, as a view that is read by the call."""
    reader: Any = open_reader("dask_embedding_reader", work, data)
    view = reader.take(np.arange(1, reader.count))
    prepare(work, data)
    return lambda: {"rows_of_view": float(sum(len(batch) for batch, _ in view(work.batch_size, show_progress=False)))}


@contends(DISK_READS, "cold-*")
def bare_threads(work: Work, data: Data) -> Job:
    """Read the files, and do nothing with them."""
    prepare(work, data)
    return at_once(reads(work, data))
