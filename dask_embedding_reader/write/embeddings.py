"""Arrays, readers and batches back to files: a collection that opens to exactly what was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.arguments import (
    Source,
    check_column_name,
    check_dtype,
    check_nbytes,
    check_options,
    check_positive,
    check_text,
)
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError
from dask_embedding_reader.formats.registry import get_format
from dask_embedding_reader.reader import EmbeddingReader
from dask_embedding_reader.write.claim import claimed
from dask_embedding_reader.write.destination import prepare
from dask_embedding_reader.write.request import Request, check_folder
from dask_embedding_reader.write.sources import of_batches, of_numpy, of_reader
from dask_embedding_reader.write.tasks import write_array
from dask_embedding_reader.write.threads import write_source

if TYPE_CHECKING:
    import dask.dataframe as dd
    import pandas as pd
    from dask.delayed import Delayed


def write_embeddings(
    array: npt.NDArray[Any] | da.Array | EmbeddingReader | Iterable[tuple[npt.NDArray[Any], pd.DataFrame | None]],
    folder: Source,
    file_format: str = "npy",
    meta: pd.DataFrame | dd.DataFrame | None = None,
    *,
    rows_per_file: int | None = None,
    dtype: npt.DTypeLike | None = None,
    scale: float | None = None,
    embedding_column: str = "embedding",
    overwrite: bool = False,
    compute: bool = True,
    show_progress: bool = False,
    max_ram_usage_in_bytes: int | str = 2**32,
    storage_options: Mapping[str, Any] | None = None,
) -> Delayed | None:
    """Write embeddings to a folder, in files that ``EmbeddingReader`` opens to exactly the same rows.

    A reader as source converts: other formats, dtypes and sizes of files, with the metadata columns that the reader was
    opened with.

    Files appear whole or not at all. A run that was interrupted, killed even, and is started again with the same
    arguments writes what is missing, and leaves the same bytes as if nothing had happened. While a new folder is being
    written, ``EmbeddingReader`` refuses to open it.

    Parameters
    ----------
    array : numpy.ndarray, dask.array.Array, EmbeddingReader, or iterable of (numpy.ndarray, pandas.DataFrame)
        The vectors, of shape ``(rows, dimension)``: an array, a reader, or batches such as :func:`iter_batches` yields
        (a frame may be None), whose memory may be used again for the next. A Dask array is computed on the active
        scheduler, one task a file.
    folder : str or os.PathLike
        Where to: a path, or an fsspec URL of a storage that can be written to.
    file_format : {"npy", "parquet", "parquet_npy", …}, default "npy"
        Files of vectors alone (``"npy"``, ``"npz"``, ``"fbin"``, ``"fvecs"``, ``"safetensors"``), with metadata in them
        (``"parquet"``, ``"arrow"``), or the former with parquet metadata beside them (``"parquet_npy"``, …). What a
        format cannot hold is refused before anything is written.
    meta : pandas.DataFrame or dask.dataframe.DataFrame, optional
        Metadata of an array, row for row. A Dask frame needs a Dask array, and partitions that match its chunks, or
        divisions that number the rows. Row numbers (an index or a column named ``i``) must be those of the array, as
        in :func:`iter_batches`; a frame without them is paired by position. They are not stored, as readers make them
        anew: those of batches may leave out rows and be in any order, in which the rows are written. Values and nulls
        come back as they were, in the dtypes that readers have for them: numbers, booleans and times in those that were
        given, text (``object``, ``str``, ``category``) as ``string``, and other Python objects (dates, decimals, lists)
        as Arrow types.
    rows_per_file : int, optional
        Rows in each file; the last one may have fewer. By default as many as are about 200 MB, or some number of whole
        chunks near that.
    dtype : str or dtype, optional
        What is stored; by default the dtype of the vectors.
    scale : float, optional
        For an integer ``dtype`` of floating-point vectors: what a step of one stands for. ``round(value / scale)`` is
        stored, so that ``stored * scale`` is nearly the value. The manifest keeps it.
    embedding_column : str, default "embedding"
        What the column of vectors is called in parquet and arrow files, the array in npz files, the tensor in
        safetensors files.
    overwrite : bool, default False
        Whether data that the folder holds may be replaced. That is done when the new ones are complete. Also what the
        same call has finished before is written anew.
    compute : bool, default True
        Dask arrays: False returns a lazy object that writes when it is computed.
    show_progress : bool, default False
        Whether to show a progress bar, in a terminal or notebook.
    max_ram_usage_in_bytes : int or str, default 4 GiB
        The memory that writing may hold, as a number or as text (``"1GiB"``).
    storage_options : dict, optional
        Passed to fsspec: credentials, endpoints.

    Returns
    -------
    dask.delayed.Delayed or None
        None, once all is written; the lazy object with ``compute=False``.

    Raises
    ------
    DestinationError
        If the folder holds other data, or another process is writing to it; if it lies in the folder that a reader
        reads.
    WriteError
        If the storage does not take a file: no room, no permission, no connection. What is finished is kept.
    CastError
        If ``dtype`` cannot hold some of the values; the message counts them.
    MismatchError
        If vectors and metadata differ in their rows or the order of these, or batches in their dtype, dimension or
        columns.
    ColumnError
        If a metadata column cannot be stored.
    ArgumentError, ArgumentTypeError
        If an argument makes no sense.

    Warns
    -----
    UserWarning
        If NaN or infinite values were cast to a narrower dtype: they are kept, and counted.

    Notes
    -----
    A global reduction in the array (``x - x.mean(axis=0)``) makes Dask hold all of ``x`` until it is known. With more
    data than memory, write batches: ``write_embeddings(iter_batches(x - x.mean(axis=0), batch_size=10_000), folder)``.

    On a local disk, a collection of more than a sixteenth of the memory of the machine, or of batches, whose number is
    not known, does not stay in the memory of the system: who reads it next reads from the disk.

    Examples
    --------
    >>> import numpy as np, pandas as pd, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> words = pd.DataFrame({"word": ["lion", "bear", "oak"]})
    >>> write_embeddings(np.eye(3, dtype="float32"), folder + "/single", "parquet", words)
    >>> reader = EmbeddingReader(folder + "/single", "parquet", meta_columns=["word"])
    >>> write_embeddings(reader, folder + "/half", "parquet_npy", dtype="float16")
    >>> EmbeddingReader(folder + "/half", "parquet_npy", meta_columns="word").dtype
    dtype('float16')
    """
    request = Request(
        folder=check_folder(folder, check_options("storage_options", storage_options)),
        file_format=get_format(check_text("file_format", file_format)).name,
        embedding_column=check_column_name("embedding_column", embedding_column),
        rows_per_file=None if rows_per_file is None else check_positive("rows_per_file", rows_per_file),
        dtype=None if dtype is None else check_dtype("dtype", dtype),
        scale=None if scale is None else float(scale),
        overwrite=bool(overwrite),
        show_progress=bool(show_progress),
        limit_nbytes=check_nbytes("max_ram_usage_in_bytes", max_ram_usage_in_bytes),
    )
    if isinstance(array, da.Array):
        return write_array(array, meta, request, compute=bool(compute))
    if not compute:
        raise ArgumentError(
            "compute=False is only for Dask arrays; da.from_array makes one of a numpy array, reader.to_dask_array() "
            "of a reader"
        )
    if isinstance(array, EmbeddingReader):
        _refuse_meta(meta, "a reader brings its own: open it with meta_columns=[...]")
        source = of_reader(array, request)
    elif isinstance(array, np.ndarray):
        source = of_numpy(array, meta, request)
    # A frame (of pandas, Dask or polars) would give the names of its columns.
    elif isinstance(array, Iterable) and not (isinstance(array, str | bytes | Mapping) or hasattr(array, "columns")):
        _refuse_meta(meta, "batches bring their own, as pairs (array, frame)")
        source = of_batches(iter(array), request)
    else:
        remedy = "; np.stack(frame[column]) makes an array of a column of vectors" if hasattr(array, "columns") else ""
        raise ArgumentTypeError(
            f"array must be a numpy or Dask array, an EmbeddingReader or an iterable of batches, not "
            f"{type(array).__name__}{remedy}"
        )
    with claimed(request.folder.store, request.folder.work) as claim:
        prepared = prepare(request.folder, source.settings, request.overwrite, claim)
        write_source(source, prepared, request)
    return None


def _refuse_meta(meta: Any, why: str) -> None:
    if meta is not None:
        raise ArgumentError(f"meta= is only for arrays: {why}")
