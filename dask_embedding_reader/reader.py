"""The reader: what people use."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.arguments import (
    Source,
    check_columns,
    check_dtype,
    check_integer,
    check_options,
    check_positive,
    check_sources,
    check_text,
)
from dask_embedding_reader._common.units import counted, human_size
from dask_embedding_reader.batches import read as batches
from dask_embedding_reader.collection.manifest import Manifest, read_manifest
from dask_embedding_reader.collection.reopen import check_place, reopen_manifest, save_manifest
from dask_embedding_reader.errors import ArgumentError, NoFilesError
from dask_embedding_reader.formats.base import Columns, default_piece_rows
from dask_embedding_reader.formats.registry import get_format
from dask_embedding_reader.lazy import graph
from dask_embedding_reader.show.card import card
from dask_embedding_reader.storage.connections import FileSystem
from dask_embedding_reader.storage.find import MANIFEST_NAME, Listings, find_files, resolve
from dask_embedding_reader.storage.read import file_url
from dask_embedding_reader.storage.retries import hide_secrets

if TYPE_CHECKING:
    import dask.array as da
    import dask.dataframe as dd
    from matplotlib.axes import Axes


class EmbeddingReader:
    """A collection of embeddings: thousands of files, read as one array.

    Opening reads the headers of all files and nothing else. The rows of the collection are numbered from 0, file after
    file, the files ordered by path.

    Parameters
    ----------
    embeddings_folder : str, os.PathLike or list of these
        Where the files are: a folder (searched recursively), a file, a glob, any fsspec URL (``s3://…``,
        ``https://…``, ``zip://…::…``), or a list of these, whose order is kept. A path that exists literally wins over
        its reading as a glob. Hidden files, names that start with ``_``, and empty files are passed over.
    file_format : {"npy", "parquet", "parquet_npy"}, default "npy"
        Files of vectors alone, parquet files with a column of vectors, or npy files with parquet metadata beside them.
    embedding_column : str, default "embedding"
        parquet: the column of vectors.
    meta_columns : str or list of str, optional
        parquet and parquet_npy: the metadata columns to read; none by default.
    metadata_folder : str, os.PathLike or list of these, optional
        parquet_npy: where the parquet files are; by default in ``embeddings_folder``. They are paired with the npy
        files by their path below the folder, else by the numbers or words that tell them apart, else folder by folder
        where these are named one by one. Only where no name and no number says anything it is by position.
    storage_options : dict, optional
        Passed to fsspec for ``embeddings_folder``: credentials, endpoints.
    metadata_storage_options : dict, optional
        The same for ``metadata_folder``; by default ``storage_options``.
    embedding_dtype : dtype-like, optional
        parquet: the type of the items of a binary column of vectors, which does not tell it itself.
    show_progress : bool, default False
        Whether to show a progress bar while many files are opened.

    Attributes
    ----------
    count : int
        Number of rows; also ``len(reader)``.
    dimension : int
        Number of items in a vector.
    dtype : numpy.dtype
        Type of the items as stored, in native byte order.
    byte_per_item : int
        Stored bytes of a vector.
    total_size : int
        Stored bytes of all vectors.
    nb_files : int
        Number of files that have rows.
    max_file_size : int
        Stored bytes of the vectors of the largest file.
    embeddings_folder : str, os.PathLike or list of these
        The argument as given.
    manifest : Manifest
        What is known of each file.

    Raises
    ------
    NoFilesError
        If a path does not exist or nothing in it matches.
    FormatError
        If a file is garbage, truncated or holds no vectors of numbers.
    MismatchError
        If files differ in dimension or dtype, or metadata in its number of rows.
    ColumnError
        If a column is missing.
    ArgumentError, ArgumentTypeError
        If an argument makes no sense.

    Examples
    --------
    >>> import numpy as np, tempfile, os
    >>> folder = tempfile.mkdtemp()
    >>> for shard in range(3):
    ...     np.save(os.path.join(folder, f"{shard}.npy"), np.full((4, 2), shard, "float16"))
    >>> reader = EmbeddingReader(folder)
    >>> reader.count, reader.dimension, reader.dtype
    (12, 2, dtype('float16'))
    >>> x = reader.to_dask_array()
    >>> x[3:5].compute()
    array([[0., 0.],
           [1., 1.]], dtype=float16)
    >>> for embeddings, meta in reader(batch_size=8, show_progress=False):
    ...     print(embeddings.shape, embeddings.dtype, meta["i"].tolist())
    (8, 2) float32 [0, 1, 2, 3, 4, 5, 6, 7]
    (4, 2) float32 [8, 9, 10, 11]
    """

    def __init__(
        self,
        embeddings_folder: Source | Sequence[Source],
        file_format: str = "npy",
        embedding_column: str = "embedding",
        meta_columns: str | Sequence[str] | None = None,
        metadata_folder: Source | Sequence[Source] | None = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
        metadata_storage_options: Mapping[str, Any] | None = None,
        embedding_dtype: npt.DTypeLike | None = None,
        show_progress: bool = False,
    ) -> None:
        self._open(
            embeddings_folder,
            file_format,
            embedding_column,
            meta_columns,
            metadata_folder,
            storage_options,
            metadata_storage_options,
            embedding_dtype,
            show_progress,
            {},
        )

    def _open(
        self,
        embeddings_folder: Source | Sequence[Source],
        file_format: str,
        embedding_column: str,
        meta_columns: str | Sequence[str] | None,
        metadata_folder: Source | Sequence[Source] | None,
        storage_options: Mapping[str, Any] | None,
        metadata_storage_options: Mapping[str, Any] | None,
        embedding_dtype: npt.DTypeLike | None,
        show_progress: bool,
        listings: Listings,
    ) -> None:
        """Open it; what was listed by who guessed the format is not listed again."""
        layout = get_format(check_text("file_format", file_format))
        columns = Columns(check_text("embedding_column", embedding_column), None, check_columns(meta_columns))
        # As by embedding_reader, in whose calls these may be left over.
        if layout.metadata == "none" and columns.meta:
            warnings.warn(
                f"meta_columns={list(columns.meta)} is passed over: {file_format} files have no columns; "
                'for metadata in parquet files beside them use file_format="parquet_npy"',
                stacklevel=3,
            )
            columns = columns._replace(meta=())
        if layout.metadata != "beside" and metadata_folder is not None:
            warnings.warn(
                f'metadata_folder is passed over: it is read with file_format="parquet_npy", not {file_format!r}',
                stacklevel=3,
            )
            metadata_folder = None
        if embedding_dtype is not None:
            if layout.name != "parquet":
                raise ArgumentError(f"embedding_dtype is only for parquet files; {file_format} files tell their dtype")
            columns = columns._replace(embedding_dtype=check_dtype("embedding_dtype", embedding_dtype))
        self.embeddings_folder = embeddings_folder
        self.manifest: Manifest = read_manifest(
            layout,
            check_sources("embeddings_folder", embeddings_folder),
            columns,
            None if metadata_folder is None else check_sources("metadata_folder", metadata_folder),
            check_options("storage_options", storage_options),
            check_options("metadata_storage_options", metadata_storage_options),
            show_progress,
            listings=listings,
        )
        self._take_facts()

    def _take_facts(self) -> None:
        vectors = self.manifest.vectors
        self.count = vectors.count
        self.dimension = vectors.dimension
        self.dtype = self.manifest.dtype
        self.byte_per_item = self.manifest.byte_per_item
        self.total_size = self.count * self.byte_per_item
        self.nb_files = int(np.count_nonzero(vectors.rows))
        self.max_file_size = int(vectors.rows.max()) * self.byte_per_item

    @classmethod
    def from_manifest(
        cls,
        url: Source,
        embeddings_folder: Source | Sequence[Source] | None = None,
        metadata_folder: Source | Sequence[Source] | None = None,
        *,
        meta_columns: str | Sequence[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        metadata_storage_options: Mapping[str, Any] | None = None,
        manifest_storage_options: Mapping[str, Any] | None = None,
    ) -> EmbeddingReader:
        """Open a collection from its saved manifest: one read, however many files.

        The files are not looked at. One that was replaced or deleted since the manifest was saved is noticed when it
        is read, by its size and its etag or time: ``FileChangedError`` names it. One that was added is not seen.
        ``EmbeddingReader(folder)`` uses the manifest beside the data too, but lists the folder first: it reads the
        headers of what was replaced or added, and names what was deleted.

        Parameters
        ----------
        url : str or os.PathLike
            The manifest that :meth:`save_manifest` wrote, or the folder that it or :func:`write_embeddings` saved one
            in.
        embeddings_folder : str, os.PathLike or list of these, optional
            Where the files are, by default the folder that the manifest is in. Nothing outside of what is named here
            is ever opened. In the place of a glob, the folder before its first wildcard.
        metadata_folder : str, os.PathLike or list of these, optional
            Where the metadata files are, if they were named when the collection was opened.
        meta_columns : str or list of str, optional
            The metadata columns to read; by default all that the manifest knows.
        storage_options : dict, optional
            Passed to fsspec for ``embeddings_folder``.
        metadata_storage_options, manifest_storage_options : dict, optional
            The same for ``metadata_folder`` and ``url``; by default ``storage_options``.

        Returns
        -------
        EmbeddingReader
            The same as when the manifest was saved.

        Raises
        ------
        NoFilesError
            If there is no manifest.
        FormatError
            If it is damaged, or names files outside of the folder.
        ColumnError
            If it does not know a column.
        ReadError
            If the storage does not deliver it.
        ArgumentError, ArgumentTypeError
            If an argument makes no sense.

        Examples
        --------
        >>> import numpy as np, tempfile, os
        >>> folder = tempfile.mkdtemp()
        >>> np.save(os.path.join(folder, "0.npy"), np.ones((3, 2), "float32"))
        >>> EmbeddingReader(folder).save_manifest()
        >>> EmbeddingReader.from_manifest(folder).count
        3
        """
        options = check_options("storage_options", storage_options)
        own_options = check_options("manifest_storage_options", manifest_storage_options)
        place = resolve(check_sources("url", url)[0], options if own_options is None else own_options)
        reader = cls.__new__(cls)
        reader.manifest, path = reopen_manifest(
            place,
            None if embeddings_folder is None else check_sources("embeddings_folder", embeddings_folder),
            None if metadata_folder is None else check_sources("metadata_folder", metadata_folder),
            None if meta_columns is None else check_columns(meta_columns),
            options,
            check_options("metadata_storage_options", metadata_storage_options),
        )
        own_folder = os.fspath(url) if path != place[1] else os.fspath(url).rpartition("/")[0]
        reader.embeddings_folder = own_folder if embeddings_folder is None else embeddings_folder
        reader._take_facts()
        return reader

    def save_manifest(self, url: Source | None = None, *, storage_options: Mapping[str, Any] | None = None) -> None:
        """Save what is known of the files, so that the collection opens at once next time.

        Parameters
        ----------
        url : str or os.PathLike, optional
            Where to: any name that is not one of data, such as ``laion.embeddings``. By default
            ``.manifest.embeddings`` in ``embeddings_folder``, where ``EmbeddingReader(embeddings_folder)`` finds it;
            one that is called ``_manifest.parquet`` there, as earlier releases did, is removed. :meth:`from_manifest`
            opens it from anywhere.
        storage_options : dict, optional
            Passed to fsspec for ``url``.

        Raises
        ------
        ArgumentError
            If no ``url`` is given and ``embeddings_folder`` is not one folder; if the manifest would be read as data
            there, or a file has a name that cannot be spelled.
        WriteError
            If it cannot be written.

        Examples
        --------
        >>> import numpy as np, tempfile, os
        >>> folder = tempfile.mkdtemp()
        >>> np.save(os.path.join(folder, "0.npy"), np.ones((3, 2), "float32"))
        >>> EmbeddingReader(folder).save_manifest()
        >>> sorted(os.listdir(folder))
        ['.manifest.embeddings', '0.npy']
        """
        if url is not None:
            options = check_options("storage_options", storage_options)
            place = resolve(check_sources("url", url)[0], options)
            check_place(self.manifest, *place)
            save_manifest(self.manifest, *place)
            return
        vectors = self.manifest.vectors
        root = vectors.roots[0]
        if len(vectors.roots) > 1 or not all(path.startswith(root.rstrip("/") + "/") for path in vectors.paths):
            raise ArgumentError(
                f"embeddings_folder={self.embeddings_folder!r} is not one folder; say where the manifest shall be "
                "saved (url=...)"
            )
        save_manifest(self.manifest, vectors.filesystems[0], f"{root.rstrip('/')}/{MANIFEST_NAME}")

    def __len__(self) -> int:
        return self.count

    def __eq__(self, other: object) -> bool:
        """Tell whether both read the same rows and columns of the same versions of the same files."""
        return isinstance(other, EmbeddingReader) and self.manifest.token == other.manifest.token

    def __hash__(self) -> int:
        return hash(self.manifest.token)

    def __dask_tokenize__(self) -> object:
        return "EmbeddingReader", self.manifest.token

    def __repr__(self) -> str:
        return (
            f"<EmbeddingReader: {self.count:,} x {self.dimension} {self.dtype} in "
            f"{counted(self.nb_files, f'{self.manifest.format.name} file')}, {human_size(self.total_size)}>"
        )

    def _repr_html_(self) -> str:
        return card(self.manifest)

    def locate(self, row: SupportsIndex, *, secrets: bool = False) -> tuple[str, int]:
        """Find the file that holds a row.

        Parameters
        ----------
        row : int
            Row number in the collection; a negative one counts from the end.
        secrets : bool, default False
            Whether to leave passwords and signatures in the addresses of web servers.

        Returns
        -------
        path : str
            The file, with its protocol unless it is local.
        row_in_file : int
            The row's number in that file.

        Raises
        ------
        ArgumentError
            If there is no such row.

        Examples
        --------
        >>> import numpy as np, tempfile, os
        >>> folder = tempfile.mkdtemp()
        >>> for shard in range(2):
        ...     np.save(os.path.join(folder, f"{shard}.npy"), np.ones((3, 2), "float32"))
        >>> path, row = EmbeddingReader(folder).locate(4)
        >>> os.path.basename(path), row
        ('1.npy', 1)
        """
        number = check_integer("row", row)
        if not -self.count <= number < self.count:
            raise ArgumentError(f"row {number:,} is out of range: the collection has {counted(self.count, 'row')}")
        number %= self.count
        vectors = self.manifest.vectors
        file = int(np.searchsorted(vectors.offsets, number, "right")) - 1
        url = vectors.url(file)
        if "://" in vectors.paths[file] and not secrets:
            url = hide_secrets(url)  # the path is an address itself
        return url, number - int(vectors.offsets[file])

    def to_dask_array(
        self,
        start: int = 0,
        end: int | None = None,
        *,
        max_piece_size: int | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> da.Array:
        """Return the vectors as a lazy Dask array; nothing is read until it is computed.

        Parameters
        ----------
        start, end : int, optional
            Which rows, ``[start, end)``; all by default. An ``end`` past the collection is clipped.
        max_piece_size : int, optional
            The most rows in a chunk; by default as many as are about 32 MB as stored. Chunks end where files end.
        dtype : dtype-like, optional
            The dtype wanted; by default the stored one. Integers that a narrower dtype cannot hold are a ``CastError``
            when they are read; floats that it cannot hold become infinite, with a warning that names the file.

        Returns
        -------
        dask.array.Array
            Of shape ``(end - start, dimension)``. Slices of rows read those rows only. The names of its chunks depend
            on the files and the rows alone, and change when a file changes.

        Examples
        --------
        >>> import numpy as np, tempfile, os
        >>> folder = tempfile.mkdtemp()
        >>> np.save(os.path.join(folder, "0.npy"), np.arange(12, dtype="float32").reshape(6, 2))
        >>> x = EmbeddingReader(folder).to_dask_array(max_piece_size=4)
        >>> x.chunks
        ((3, 3), (2,))
        >>> x.mean(axis=0).compute()
        array([5., 6.], dtype=float32)
        """
        start, end = self._row_range(start, end)
        wanted = self._wanted_dtype(dtype)
        return graph.make_array(self.manifest, start, end, self._piece_rows(max_piece_size), wanted)

    def to_dask_dataframe(
        self, start: int = 0, end: int | None = None, *, max_piece_size: int | None = None
    ) -> dd.DataFrame:
        """Return the metadata as a lazy Dask DataFrame, row for row beside the array.

        Parameters
        ----------
        start, end, max_piece_size : int, optional
            As in :meth:`to_dask_array`; with the same values, partition k has the rows of chunk k.

        Returns
        -------
        dask.dataframe.DataFrame
            With the columns ``meta_columns``, the global row number as index ``i`` (int64), and known divisions. Each
            column has one dtype everywhere: numpy's where no value is null, and for floating-point numbers, where null
            is NaN; else pandas' nullable one. Text is ``string[pyarrow]``, extension types are as they are stored.

        Notes
        -----
        To put a column beside it that is computed from the vectors, compute the column, which is small beside them, and
        look it up by row number: ``norms = norm.compute()``, then
        ``meta.map_partitions(lambda part: part.assign(norm=norms[part.index]))``. Where it does not fit into memory, or
        on a cluster, take both in batches: ``for norms, part in iter_batches(norm, meta, batch_size=100_000)``. (Dask's
        own ways, ``meta.assign(norm=norm)`` and ``dd.from_dask_array``, take milliseconds for every chunk, or fail.)

        Examples
        --------
        >>> import numpy as np, pandas as pd, tempfile, os
        >>> folder = tempfile.mkdtemp()
        >>> np.save(os.path.join(folder, "0.npy"), np.ones((3, 2), "float32"))
        >>> pd.DataFrame({"word": ["lion", "bear", "oak"]}).to_parquet(os.path.join(folder, "0.parquet"))
        >>> reader = EmbeddingReader(folder, "parquet_npy", meta_columns=["word"])
        >>> reader.to_dask_dataframe().compute()
           word
        i
        0  lion
        1  bear
        2   oak
        """
        start, end = self._row_range(start, end)
        return graph.make_metadata_frame(self.manifest, start, end, self._piece_rows(max_piece_size))

    def __call__(
        self,
        batch_size: int,
        start: int = 0,
        end: int | None = None,
        max_piece_size: int | None = None,
        parallel_pieces: int | None = None,
        show_progress: bool = True,
        max_ram_usage_in_bytes: int = 2**32,
        *,
        dtype: npt.DTypeLike | None = np.float32,
    ) -> Iterator[batches.Batch]:
        """Iterate over batches, in order, read ahead by threads within a memory limit.

        Parameters
        ----------
        batch_size : int
            Rows in each batch; the last one may have fewer.
        start, end : int, optional
            Which rows, ``[start, end)``; all by default. An ``end`` past the collection is clipped.
        max_piece_size : int, optional
            The most rows that are read at once; by default what suits the storage and the memory limit.
        parallel_pieces : int, optional
            How many pieces are read at the same time; by default what suits the storage.
        show_progress : bool, default True
            Whether to show a progress bar, in a terminal or notebook.
        max_ram_usage_in_bytes : int, default 4 GiB
            The memory that reading may hold, together with the batch that the loop is working on. A batch that is
            larger by itself is still read, with a warning.
        dtype : dtype-like, default float32
            Type of the vectors; None keeps the stored one.

        Returns
        -------
        iterator of (numpy.ndarray, pandas.DataFrame)
            The vectors, a writable array of shape ``(rows, dimension)`` in C order, and their metadata with the columns
            ``[*meta_columns, "i"]``, ``i`` being the global row number (int64). Their dtypes are those of
            :meth:`to_dask_dataframe`, but text comes as Python's own strings, and None where it is null.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            At the call, if an argument makes no sense.
        ReadError, FileChangedError, FormatError
            While iterating, if a file cannot be read, changed since it was opened, or holds null or ragged vectors.
        CastError
            While iterating, if ``dtype`` is an integer that cannot hold some of the values; the message counts them.

        Warns
        -----
        UserWarning
            If finite values became infinite, because ``dtype`` is too narrow for them: once for each file.

        Examples
        --------
        >>> import numpy as np, tempfile, os
        >>> folder = tempfile.mkdtemp()
        >>> np.save(os.path.join(folder, "0.npy"), np.ones((5, 2), "int8"))
        >>> for embeddings, meta in EmbeddingReader(folder)(batch_size=2, start=1, dtype=None):
        ...     print(embeddings.shape, embeddings.dtype, meta["i"].tolist())
        (2, 2) int8 [1, 2]
        (2, 2) int8 [3, 4]
        """
        start, end = self._row_range(start, end)
        request = batches.BatchRequest(
            batch_rows=check_positive("batch_size", batch_size),
            start=start,
            stop=end,
            max_piece_rows=None if max_piece_size is None else check_positive("max_piece_size", max_piece_size),
            threads=None if parallel_pieces is None else check_positive("parallel_pieces", parallel_pieces),
            limit_nbytes=check_positive("max_ram_usage_in_bytes", max_ram_usage_in_bytes),
            dtype=self._wanted_dtype(dtype),
            show_progress=bool(show_progress),
        )
        return batches.read_batches(self.manifest, request)

    def plot_plan(
        self,
        batch_size: int | None = None,
        start: int = 0,
        end: int | None = None,
        *,
        max_piece_size: int | None = None,
    ) -> Axes:
        """Plot where files, pieces and batches begin and end.

        Parameters
        ----------
        batch_size : int, optional
            Rows in a batch; by default no batches are shown.
        start, end, max_piece_size : int, optional
            As in :meth:`to_dask_array`, whose chunks the pieces are.

        Returns
        -------
        matplotlib.axes.Axes
            In a notebook the plot appears by itself; ``axes.figure.savefig(path)`` keeps it.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ArgumentError, ArgumentTypeError
            If an argument makes no sense.

        Examples
        --------
        >>> import matplotlib, numpy as np, tempfile, os
        >>> matplotlib.use("Agg")
        >>> folder = tempfile.mkdtemp()
        >>> np.save(os.path.join(folder, "0.npy"), np.ones((6, 2), "float32"))
        >>> axes = EmbeddingReader(folder).plot_plan(batch_size=4, max_piece_size=3)
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['batches', 'pieces', 'files']
        """
        from dask_embedding_reader.show.plots import plot_plan  # noqa: PLC0415 - needs matplotlib

        start, end = self._row_range(start, end)
        batch_rows = None if batch_size is None else check_positive("batch_size", batch_size)
        return plot_plan(self.manifest, start, end, self._piece_rows(max_piece_size), batch_rows)

    def _row_range(self, start: int, end: int | None) -> tuple[int, int]:
        first = check_integer("start", start)
        last = self.count if end is None else min(check_integer("end", end), self.count)
        if not 0 <= first <= self.count:
            raise ArgumentError(
                f"start={first:,} is out of range: the collection has {counted(self.count, 'row')}, from 0 on"
            )
        if last < first:
            raise ArgumentError(f"end={last:,} is before start={first:,}")
        return first, last

    def _piece_rows(self, max_piece_size: int | None) -> int:
        if max_piece_size is None:
            return default_piece_rows(self.byte_per_item)
        return check_positive("max_piece_size", max_piece_size)

    def _wanted_dtype(self, dtype: npt.DTypeLike | None) -> np.dtype[Any]:
        if dtype is None:
            return self.dtype
        wanted = check_dtype("dtype", dtype).newbyteorder("=")
        if not np.can_cast(self.dtype, wanted, "same_kind"):
            raise ArgumentError(
                f"dtype={wanted} cannot hold the stored {self.dtype}; read with dtype=None and convert the values"
            )
        return wanted


def get_file_list(
    path: Source | Sequence[Source], file_format: str, *, storage_options: Mapping[str, Any] | None = None
) -> tuple[FileSystem, list[str]]:
    """Find the files with a suffix, as the reader does.

    Parameters
    ----------
    path : str, os.PathLike or list of these
        Folders, files, globs, URLs.
    file_format : str
        The suffix without its dot, such as ``"npy"`` or ``"parquet"``.
    storage_options : dict, optional
        Passed to fsspec.

    Returns
    -------
    filesystem : fsspec.AbstractFileSystem
        Where the files are.
    paths : list of str
        The files, with their protocol; local ones without it, unless ``path`` has it. Empty if there are none.

    Raises
    ------
    NoFilesError
        If one of several paths does not exist.
    ArgumentError
        If the paths lie in different file systems.

    Examples
    --------
    >>> import numpy as np, tempfile, os
    >>> folder = tempfile.mkdtemp()
    >>> np.save(os.path.join(folder, "0.npy"), np.ones((3, 2)))
    >>> filesystem, paths = get_file_list(folder, "npy")
    >>> [os.path.basename(path) for path in paths]
    ['0.npy']
    """
    suffix = "." + check_text("file_format", file_format).lstrip(".")
    sources = check_sources("path", path)
    options = check_options("storage_options", storage_options)
    filesystem, _ = resolve(sources[0], options)
    empty: list[Source] = []
    try:
        files = find_files(sources, (suffix,), options, empty=empty, named=False)
    except NoFilesError:
        if len(sources) > 1 and len(empty) < len(sources):
            raise  # one of them does not exist: what the others hold is not all
        return filesystem, []
    filesystem = files[0].filesystem
    for file in files:
        if file.filesystem != filesystem:
            raise ArgumentError(f"the paths lie in different file systems: {files[0].url} and {file.url}")
    if all(os.fspath(source).startswith("file://") for source in sources):
        return filesystem, [filesystem.unstrip_protocol(file.path) for file in files]
    return filesystem, [file_url(filesystem, file.path) for file in files]
