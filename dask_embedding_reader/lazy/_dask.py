"""The private names of Dask that this package uses, all in one place.

Seen in Dask 2025.4 to 2026.8. Where a later version lacks what is imported here, ``to_dask_array`` and
``to_dask_dataframe`` go on; ``iter_batches``, and writing of lazy collections, fail at this import, with the name that
is gone. Some functions are known by their names alone: one that is renamed is one more that does not tell which rows it
makes, as functions of users do not, so ``iter_batches`` refuses frames that tell theirs.
"""

from dask._task_spec import Alias, DataNode, GraphNode, List, Task, TaskRef, convert_legacy_graph

__all__ = [
    "JOINING_IN_ORDER",
    "JOINING_SHUFFLED",
    "LISTING",
    "P2P_BARRIER",
    "P2P_RECHUNK",
    "PICKING",
    "PICKING_BY_PAIR",
    "TURNING",
    "Alias",
    "DataNode",
    "GraphNode",
    "List",
    "Task",
    "TaskRef",
    "convert_legacy_graph",
]

PICKING_BY_PAIR = "dask.array._shuffle._getitem"
"""Picks rows with the second of a pair of indices."""

PICKING = frozenset(
    {
        "_operator.getitem",
        "dask.array.chunk.getitem",
        "dask.array.core.getter",
        "dask.array.core.getter_inline",
        "dask.array.core.getter_nofancy",
        PICKING_BY_PAIR,
    }
)
"""Functions that pick rows with an index."""

LISTING = "dask._task_spec._identity_cast"
"""Makes a list of results."""

TURNING = "numpy.transpose"
"""Exchanges rows and items."""

JOINING_IN_ORDER = "dask.array.core.concatenate_shaped"
"""Joins a list of blocks, given how many there are on each axis."""

JOINING_SHUFFLED = "dask.array._shuffle.concatenate_arrays"
"""Joins parts of blocks, and then puts them into an order."""

P2P_RECHUNK = "P2PRechunkLayer"
"""The layer of chunks that workers cut anew by sending each other the parts."""

P2P_BARRIER = "shuffle-barrier-"
"""Begins the key by which workers look for the task that waits until they have sent each other everything."""
