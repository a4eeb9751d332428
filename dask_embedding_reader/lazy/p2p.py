"""Arrays without Dask's P2P, by which the workers of a cluster send each other the parts of what is rechunked."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
from dask.highlevelgraph import HighLevelGraph

from dask_embedding_reader.lazy._dask import P2P_RECHUNK, Alias


def rechunked_by_tasks(array: da.Array) -> da.Array:
    """Return the same array, with tasks that rechunk it where Dask would have used P2P.

    P2P looks for its tasks on the scheduler by their keys; batches are computed under other ones, band by band.
    """
    graph: Any = array.__dask_graph__()
    layers, dependencies = dict(getattr(graph, "layers", {})), dict(getattr(graph, "dependencies", {}))
    by_p2p = {name: layer for name, layer in layers.items() if type(layer).__name__ == P2P_RECHUNK}
    for name, layer in by_p2p.items():
        source = da.Array(graph, layer.name_input, layer.chunks_input, array.dtype)
        rechunked = source.rechunk(layer.chunks, method="tasks")
        layers = {**rechunked.dask.layers, **layers}
        dependencies = {**rechunked.dask.dependencies, **dependencies}
        places = np.ndindex(*rechunked.numblocks)
        layers[name] = {(name, *place): Alias((name, *place), (rechunked.name, *place)) for place in places}
        dependencies[name] = {rechunked.name}
    return da.Array(HighLevelGraph(layers, dependencies), array.name, array.chunks, array.dtype) if by_p2p else array
