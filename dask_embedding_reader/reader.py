"""The reader: what people use."""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from dask_embedding_reader._common.arguments import (
    Source,
    check_columns,
    check_dtype,
    check_integer,
    check_nbytes,
    check_options,
    check_piece_rows,
    check_positive,
    check_range,
    check_rows,
    check_share,
    check_slice,
    check_sources,
    check_text,
    check_vector_column,
)
from dask_embedding_reader._common.units import counted, human_size
from dask_embedding_reader.batches.read import read_batches
from dask_embedding_reader.batches.request import Batch, BatchRequest, span_of
from dask_embedding_reader.collection.filters import check_mask, select
from dask_embedding_reader.collection.layout import ALL_COLUMNS, metadata_types
from dask_embedding_reader.collection.manifest import Manifest, likely_metadata_folder, read_manifest
from dask_embedding_reader.collection.plan import count_by_file
from dask_embedding_reader.collection.reopen import check_place, reopen_manifest, save_manifest
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError, NoFilesError, RowError
from dask_embedding_reader.formats.base import DEFAULT_COLUMN, Columns, default_piece_rows
from dask_embedding_reader.formats.registry import AUTO, BESIDE, FileFormatName, get_format
from dask_embedding_reader.lazy import graph
from dask_embedding_reader.rows.picked import pick, pick_all
from dask_embedding_reader.rows.selection import Int64s, Rows
from dask_embedding_reader.rows.shuffled import Shuffled, epoch_of, sample, shard, shuffle
from dask_embedding_reader.rows.stretch import Stretch
from dask_embedding_reader.show.card import card
from dask_embedding_reader.storage.connections import FileSystem
from dask_embedding_reader.storage.find import MANIFEST_NAME, Finder
from dask_embedding_reader.storage.retries import hide_secrets
from dask_embedding_reader.storage.urls import resolve

if TYPE_CHECKING:
    import dask.array as da
    import dask.dataframe as dd
    import pandas as pd
    import pyarrow as pa
    from matplotlib.axes import Axes


BUFFER_NBYTES = 128_000_000
"""Vectors that a shuffled reader mixes, as stored. A constant: another one would be another order."""

BLOCK_NBYTES, REMOTE_BLOCK_NBYTES = 64_000, 1_000_000
"""Vectors that stay neighbours in a shuffled reader until they are mixed: large enough to be read at once, locally and
from elsewhere. Constants too."""


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
    file_format : {"auto", "npy", "parquet", "parquet_npy", …}, default "auto"
        Files of vectors alone (``"npy"``, ``"npz"``, ``"fbin"``, ``"fvecs"``, ``"safetensors"``), parquet files with a
        column of vectors, or the former with parquet metadata beside them (``"parquet_npy"``, …). ``"auto"`` is what a
        manifest beside the files says, else npy where there are .npy files, else the one kind that there is; with
        metadata beside if ``meta_columns`` or ``metadata_folder`` ask for it.
    embedding_column : str or list of str, optional
        The column of vectors of parquet, the array of npz, the tensor of safetensors files. By default the one that a
        manifest names, else ``embedding`` where there is one, else the only one that can be it: a column of lists of
        numbers of one length, an array or a tensor of two axes. Which it is, ``manifest.columns.embedding`` says.
        Where each item of the vectors has its own column: these columns in order, or ``"emb_*"`` for all that are
        numbered so. ``"outer.inner"`` is a field of a struct.
    meta_columns : str or list of str, optional
        The metadata columns to read; none by default, ``"*"`` for all.
    metadata_folder : str, os.PathLike or list of these, optional
        parquet_npy and the like: where the parquet files are; by default in ``embeddings_folder``. They are paired
        with the npy files by their path below the folder, else by the numbers or words that tell them apart, else
        folder by folder where these are named one by one. Only where no name and no number says anything it is by
        position.
    storage_options : dict, optional
        Passed to fsspec for ``embeddings_folder``: credentials, endpoints.
    metadata_storage_options : dict, optional
        The same for ``metadata_folder``; by default ``storage_options``.
    embedding_dtype : str or dtype, optional
        The type of the items where files do not tell it: a binary column of parquet, fbin and fvecs files of other
        names.
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
        If an argument makes no sense, or there are files of several kinds.

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
        file_format: FileFormatName | str = "auto",
        embedding_column: str | Sequence[str] | None = None,
        meta_columns: str | Sequence[str] | None = None,
        metadata_folder: Source | Sequence[Source] | None = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
        metadata_storage_options: Mapping[str, Any] | None = None,
        embedding_dtype: npt.DTypeLike | None = None,
        show_progress: bool = False,
    ) -> None:
        layout = None if check_text("file_format", file_format) == AUTO else get_format(file_format)
        column = None if embedding_column is None else check_vector_column(embedding_column)
        dtype = None if embedding_dtype is None else check_dtype("embedding_dtype", embedding_dtype)
        columns = Columns(column, dtype, check_columns(meta_columns))
        self.embeddings_folder = embeddings_folder
        self.manifest: Manifest = read_manifest(
            layout,
            check_sources("embeddings_folder", embeddings_folder),
            columns,
            None if metadata_folder is None else check_sources("metadata_folder", metadata_folder),
            check_options("storage_options", storage_options),
            check_options("metadata_storage_options", metadata_storage_options),
            show_progress,
        )
        self._warn_of_unused(columns.meta, metadata_folder is not None, storage_options)
        self._take_facts()

    def _warn_of_unused(
        self, meta_columns: Sequence[str], has_metadata_folder: bool, storage_options: Mapping[str, Any] | None
    ) -> None:
        """Name the arguments that the format has no use for; in calls of embedding_reader they may be left over."""
        layout = self.manifest.format
        if layout.metadata == "none" and meta_columns not in ((), ALL_COLUMNS):
            sources = check_sources("embeddings_folder", self.embeddings_folder)
            likely = None if has_metadata_folder else likely_metadata_folder(sources[0], storage_options)
            warnings.warn(
                f"meta_columns={list(meta_columns)} is passed over: {layout.name} files have no columns; for metadata "
                f'in parquet files beside them use file_format="{BESIDE}{layout.name}", for those elsewhere '
                f"metadata_folder={'...' if likely is None else repr(likely)}",
                stacklevel=3,
            )
        if layout.metadata == "same" and has_metadata_folder:
            warnings.warn(
                f"metadata_folder is passed over: {layout.name} files hold their metadata themselves", stacklevel=3
            )
        if layout.metadata == "none" and has_metadata_folder:
            warnings.warn(
                f'metadata_folder is passed over: it is read with file_format="{BESIDE}{layout.name}", not '
                f"{layout.name!r}",
                stacklevel=3,
            )

    def _take_facts(self, rows: Rows | None = None) -> None:
        vectors = self.manifest.vectors
        self.rows: Rows = Stretch(range(vectors.count)) if rows is None else rows
        self.count = len(self.rows)
        self.dimension = vectors.dimension
        self.dtype = self.manifest.dtype
        self.byte_per_item = self.manifest.byte_per_item
        self.total_size = self.count * self.byte_per_item
        self._rows_of_files: Int64s | None = None
        self._shards: tuple[int, int] | None = None

    @property
    def nb_files(self) -> int:
        """Number of files that have rows of this reader."""
        return int(np.count_nonzero(self._file_rows()))

    @property
    def max_file_size(self) -> int:
        """Stored bytes of the vectors of this reader in the file that has the most."""
        return int(self._file_rows().max()) * self.byte_per_item

    def _file_rows(self) -> Int64s:
        """Return how many rows of this reader each file has."""
        if self._rows_of_files is None:
            self._rows_of_files = count_by_file(self.manifest.vectors.offsets, self.rows)
        return self._rows_of_files

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
            The metadata columns to read; by default, and as ``"*"``, all that the manifest knows.
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
        names = None if meta_columns is None else check_columns(meta_columns)
        place = resolve(check_sources("url", url)[0], options if own_options is None else own_options)
        reader = cls.__new__(cls)
        reader.manifest, path = reopen_manifest(
            place,
            None if embeddings_folder is None else check_sources("embeddings_folder", embeddings_folder),
            None if metadata_folder is None else check_sources("metadata_folder", metadata_folder),
            None if names == ALL_COLUMNS else names,
            options,
            check_options("metadata_storage_options", metadata_storage_options),
        )
        folder, slash, _ = os.fspath(url).rpartition("/")
        own_folder = os.fspath(url) if path != place[1] else folder or slash or "."
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
            there, or a file has a name that cannot be written.
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
        save_manifest(self.manifest, vectors.stores[0], f"{root.rstrip('/')}/{MANIFEST_NAME}")

    @property
    def token(self) -> str:
        """A hash of the files, the columns and the rows, equal in every process."""
        if self.rows == Stretch(range(self.manifest.count)):
            return self.manifest.token
        return hashlib.blake2b(f"{self.manifest.token} {self.rows.token}".encode(), digest_size=16).hexdigest()

    def __eq__(self, other: object) -> bool:
        """Tell whether both read the same rows and columns of the same versions of the same files."""
        return isinstance(other, EmbeddingReader) and (self.manifest.token, self.rows) == (
            other.manifest.token,
            other.rows,
        )

    def __hash__(self) -> int:
        return hash((self.manifest.token, self.rows))

    def __sizeof__(self) -> int:
        """Return the bytes that are held: Dask's schedulers ask for it where a reader is the result of a task."""
        return object.__sizeof__(self) + sys.getsizeof(self.manifest) + self.rows.nbytes

    def __dask_tokenize__(self) -> object:
        return "EmbeddingReader", self.token

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The metadata columns that ``meta_columns`` may name, and their Arrow types.

        Of those that are read, the types hold the values of all files; of others they are those of the first file.
        The row number, and names that occur twice, are left out.
        """
        files = self.manifest.metadata_files
        if files is None:
            return {}
        first = files.header(int(np.argmax(files.rows > 0))).file
        found = metadata_types(self.manifest.format, [first], self.manifest.columns.vectors)
        return found | {field.name: field.type for field in self.manifest.fields}

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and items of a vector: the shape of :meth:`to_dask_array`."""
        return self.count, self.dimension

    @property
    def chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows of each chunk, and items of a vector: the chunks of :meth:`to_dask_array` where none are asked for."""
        return self.to_dask_array().chunks  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        of = f"{self.count:,} of {self.manifest.count:,}" if self._noun == "selection" else f"{self.count:,}"
        name = self.manifest.vectors_name
        column = "" if name in (None, DEFAULT_COLUMN) else f" (column {name!r})"
        order = self._order and f", {self._order},"
        return (
            f"<EmbeddingReader: {of} x {self.dimension} {self.dtype}{order} in "
            f"{counted(self.nb_files, f'{self.manifest.format.name} file')}{column}, {human_size(self.total_size)}>"
        )

    def _repr_html_(self) -> str:
        return card(self.manifest, self.count, self._order, self._file_rows())

    @property
    def _order(self) -> str:
        """In which order the rows are; empty for that of the collection."""
        shuffled = isinstance(self.rows, Shuffled) or self.rows.window_rows
        return "shuffled" if shuffled else "" if self.rows.is_ascending else "as picked"

    def _view(self, rows: Rows) -> EmbeddingReader:
        view = copy.copy(self)
        view._take_facts(rows)
        return view

    def _before_shuffling(self, verb: str) -> None:
        if isinstance(self.rows, Shuffled) or self._shards:
            done = "shuffled" if isinstance(self.rows, Shuffled) and not self._shards else "a shard"
            later = "comes once, and before shard" if verb == "shuffle" else "comes before shuffle and shard"
            raise ArgumentError(
                f"{verb} {later}, but this reader is {done}: the steps are "
                "filter, take and sample in any order, then shuffle, then shard, then start= and end="
            )

    def take(self, rows: slice | Sequence[int] | npt.NDArray[Any] | Rows) -> EmbeddingReader:
        """Return a reader of some rows, in the order given.

        Nothing is read, unless the rows are a Dask collection, which is computed. What is computed from the new reader
        reads these rows only, near ones at once; ``x[list]`` of a Dask array reads whole chunks.

        Parameters
        ----------
        rows : slice, sequence of int or of bool
            A slice; positions in this reader, in any order and more than once; or a mask, a boolean for each row. A
            mask of pandas picks by position too, and its index may not tell of another order; a null is false.

        Returns
        -------
        EmbeddingReader
            Its arrays, frames and batches have these rows; ``i`` is still the row number in the collection.

        Raises
        ------
        RowError
            If there is no such row: an ``ArgumentError`` and an ``IndexError``. Negative ones do not count from the
            end: searches give them for hits that they did not find.
        ArgumentError, ArgumentTypeError
            If a mask has another length, or these are no rows.
        MismatchError
            If a mask of pandas is of other rows, or of these in another order.

        Examples
        --------
        >>> import numpy as np, tempfile, os
        >>> folder = tempfile.mkdtemp()
        >>> np.save(os.path.join(folder, "0.npy"), np.arange(12).reshape(6, 2))
        >>> hits = EmbeddingReader(folder).take([5, 0, 3])
        >>> hits.to_dask_array().compute()
        array([[10, 11],
               [ 0,  1],
               [ 6,  7]])
        """
        self._before_shuffling("take")
        if isinstance(rows, slice):
            return self._view(self.rows[check_slice("rows", rows)])
        if isinstance(rows, range):
            return self._view(self.rows[check_range("rows", rows, self.count)])
        if isinstance(rows, Rows):
            return self._view(pick_all(map(self.rows.at, self._checked_parts(rows))))
        given = check_mask(graph.computed(rows), self.rows)
        return self._view(pick(self.rows.at(check_rows("rows", given, self.count))))

    def _checked_parts(self, rows: Rows) -> Iterator[Int64s]:
        """Yield positions in this reader part by part: those that a filter has found are never all in memory."""
        for part in rows.parts():
            if int(part.min()) < 0 or int(part.max()) >= self.count:
                check_rows("rows", rows, self.count)  # which tells of all that are wrong
            yield part

    def filter(
        self,
        filters: Sequence[Any] | Callable[[pd.DataFrame], Any],
        *,
        columns: str | Sequence[str] | None = None,
    ) -> EmbeddingReader:
        """Return a reader of the rows whose metadata satisfy a condition. The columns that it names are read, now.

        Parameters
        ----------
        filters : list of tuple, list of list of tuple, or callable
            Conditions ``(column, operator, value)`` that all have to hold, with the operators ``==``, ``=``, ``!=``,
            ``<``, ``<=``, ``>``, ``>=``, ``in`` and ``not in``; a list of such lists, of which one has to hold (as in
            ``dask.dataframe.read_parquet``); or a function that gets a frame of ``columns`` and returns a boolean for
            each row. It is called for part after part of the rows, in threads; the index of each frame begins at 0.
            Conditions compare numbers exactly, of whatever type they and the column are; with decimals, floats as they
            are written.
        columns : str or list of str, optional
            What the function looks at. They need not be among ``meta_columns``.

        Returns
        -------
        EmbeddingReader
            The number of its rows is known. A null satisfies no condition.

        Raises
        ------
        ColumnError
            If a column is missing.
        ArgumentError, ArgumentTypeError
            If a column cannot be compared with a value, or the function returns something else.
        MismatchError
            If the function returns a mask with another index than its frame has.

        Examples
        --------
        >>> import numpy as np, pandas as pd, tempfile, os
        >>> folder = tempfile.mkdtemp()
        >>> np.save(os.path.join(folder, "0.npy"), np.ones((3, 2), "float32"))
        >>> pd.DataFrame({"word": ["lion", "bear", "oak"]}).to_parquet(os.path.join(folder, "0.parquet"))
        >>> reader = EmbeddingReader(folder, "parquet_npy", meta_columns=["word"])
        >>> reader.filter([("word", "in", ["oak", "lion"])]).to_dask_dataframe().compute()
           word
        i
        0  lion
        2   oak
        >>> len(reader.filter(lambda frame: frame["word"].str.startswith("b"), columns="word"))
        1
        """
        self._before_shuffling("filter")
        return self._view(select(self.manifest, self.rows, filters, columns))

    def sample(self, n: int | None = None, *, frac: float | None = None, seed: int = 0) -> EmbeddingReader:
        """Return a reader of rows drawn at random, without replacement, in the order of this reader.

        Parameters
        ----------
        n : int, optional
            How many rows, exactly. Those of a smaller sample are among those of a larger one with the same seed.
        frac : float, optional
            How many, as a share of all rows.
        seed : int, default 0
            Equal seeds draw equal rows, on every machine.

        Returns
        -------
        EmbeddingReader
            Nothing is read.

        Examples
        --------
        >>> import numpy as np, tempfile, os
        >>> folder = tempfile.mkdtemp()
        >>> np.save(os.path.join(folder, "0.npy"), np.arange(200).reshape(100, 2))
        >>> len(EmbeddingReader(folder).sample(frac=0.1, seed=1))
        10
        """
        self._before_shuffling("sample")
        if (n is None) == (frac is None):
            raise ArgumentError(f"sample takes either n= or frac=, not n={n!r} and frac={frac!r}")
        if isinstance(n, float | np.floating) and 0 < n < 1:
            raise ArgumentTypeError(f"n must be a whole number, not {n!r}; a share of the rows is frac={n!r}")
        count = round(check_share("frac", frac) * self.count) if n is None else check_integer("n", n)
        if not 0 <= count <= self.count:
            raise ArgumentError(f"n={count:,} rows cannot be drawn from {self.count:,}, none of them twice")
        return self._view(sample(self.rows, count, check_integer("seed", seed)))

    def shuffle(self, seed: int = 0, *, epoch: int = 0, buffer_rows: int | None = None) -> EmbeddingReader:
        """Return a reader of the same rows in a random order. Nothing is read or held, however many rows there are.

        Every epoch has every row once. The order depends on the data, ``seed``, ``epoch`` and ``buffer_rows`` alone,
        not on machines, threads, ranks or versions. To resume is ``start=``: ``epoch(batch_size, start=rows_done)``
        goes on where it was, at once. With :meth:`shard`, any number of ranks that divides 64 gets the same batches
        (all ranks together), also when it changes in the middle.

        Rows are mixed as widely as memory allows: blocks of 64 kB (1 MB of remote files) come from all over the
        collection, and their rows are mixed in a window of ``buffer_rows``. With batches of B rows and a window of
        K blocks, the classes of sorted rows are spread over the batches as by chance, but for an excess of B / K.

        Parameters
        ----------
        seed : int, default 0
            Another seed is another order.
        epoch : int, default 0
            Another epoch too.
        buffer_rows : int, optional
            Rows that are mixed with each other; by default as many as are 128 MB as stored. Batches hold two such
            windows in memory.

        Returns
        -------
        EmbeddingReader
            Batches of it are the fastest way to read it; the chunks of its array are windows.

        Notes
        -----
        Row groups of parquet files that are compressed or encoded are decoded whole, by each window that has some of
        their rows: where they are larger than a block, convert the files to npy first.

        Examples
        --------
        >>> import numpy as np, tempfile, os
        >>> folder = tempfile.mkdtemp()
        >>> np.save(os.path.join(folder, "0.npy"), np.arange(12).reshape(6, 2))
        >>> reader = EmbeddingReader(folder)
        >>> epoch = reader.shuffle(seed=1, epoch=3)
        >>> sorted(epoch.rows) == list(reader.rows)
        True
        >>> epoch.rows[4:] == reader.shuffle(seed=1, epoch=3).rows[4:]
        True
        """
        self._before_shuffling("shuffle")
        row_nbytes = max(1, self.byte_per_item)
        buffer = default_piece_rows(row_nbytes, BUFFER_NBYTES) if buffer_rows is None else buffer_rows
        block_nbytes = BLOCK_NBYTES if self.manifest.vectors.is_local else REMOTE_BLOCK_NBYTES
        block = default_piece_rows(row_nbytes, block_nbytes)
        return self._view(
            shuffle(
                self.rows,
                check_integer("seed", seed),
                check_integer("epoch", epoch),
                block,
                check_positive("buffer_rows", buffer),
            )
        )

    def shard(self, num_shards: int, index: int) -> EmbeddingReader:
        """Return a reader of one of several shards, one for each rank or worker.

        Parameters
        ----------
        num_shards : int
            How many shards there are.
        index : int
            Which one, from 0 on.

        Returns
        -------
        EmbeddingReader
            Of a shuffled reader, every ``num_shards``-th row: batch k of all shards together is the same for every
            number of shards. All shards have equally many rows, so that no rank waits for another one. For that the
            last rows are left out, fewer than 64 where ``num_shards`` divides 64, else fewer than ``num_shards``:
            ``epoch(batch_size, start=num_shards * len(shard))`` of the whole epoch has them. Of another reader,
            a stretch of rows; all shards together have every row.

        Examples
        --------
        >>> import numpy as np, tempfile, os
        >>> folder = tempfile.mkdtemp()
        >>> np.save(os.path.join(folder, "0.npy"), np.arange(256).reshape(128, 2))
        >>> reader = EmbeddingReader(folder)
        >>> [list(reader.shard(3, rank).rows[:2]) for rank in range(3)]
        [[0, 1], [42, 43], [85, 86]]
        >>> epoch = reader.shuffle(seed=1)
        >>> epoch.shard(2, 1).rows[:3] == epoch.rows[1:6:2]
        True
        """
        if self._shards:
            raise ArgumentError(f"this reader is a shard already (shard {self._shards[1]} of {self._shards[0]})")
        shards, number = check_positive("num_shards", num_shards), check_integer("index", index)
        if not 0 <= number < shards:
            raise ArgumentError(f"index={number} is no shard: of num_shards={shards} they are 0 to {shards - 1}")
        view = self._view(shard(self.rows, shards, number))
        view._shards = shards, number
        return view

    def locate(self, row: SupportsIndex, *, secrets: bool = False) -> tuple[str, int]:
        """Find the file that holds a row.

        Parameters
        ----------
        row : int
            Position in this reader: of a whole collection the row number. A negative one counts from the end.
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
        RowError
            If there is no such row: an ``ArgumentError`` and an ``IndexError``.

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
        position = check_integer("row", row)
        if not -self.count <= position < self.count:
            raise RowError(f"row {position:,} is out of range: the {self._noun} has {counted(self.count, 'row')}")
        number = self.rows[position]
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
        max_piece_size: int | str | None = None,
        chunks: int | str | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> da.Array:
        """Return the vectors as a lazy Dask array; nothing is read until it is computed.

        Parameters
        ----------
        start, end : int, optional
            Which rows, ``[start, end)``; all by default. An ``end`` past the collection is clipped.
        max_piece_size, chunks : int or str, optional
            The most rows in a chunk, or its most bytes as stored, as text (``"128MiB"``). By default (``"auto"``)
            about 32 MB as stored. Chunks end where files end; of many small files, consecutive ones share a chunk, up
            to 64 of them and as long as 16 chunks are left. ``chunks`` is what Dask calls it, where ``-1`` is a chunk a
            file, always; give one of them.
        dtype : str or dtype, optional
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
        rows = self._selected(start, end)
        wanted = self._wanted_dtype(dtype)
        piece_rows = self._piece_rows(max_piece_size, chunks)
        if isinstance(rows, Stretch) and rows.is_contiguous:
            first = rows.values.start
            return graph.make_array(self.manifest, first, first + len(rows), piece_rows, wanted)
        return graph.make_selected_array(self.manifest, rows, piece_rows, wanted)

    def to_dask_dataframe(
        self,
        start: int = 0,
        end: int | None = None,
        *,
        max_piece_size: int | str | None = None,
        chunks: int | str | None = None,
    ) -> dd.DataFrame:
        """Return the metadata as a lazy Dask DataFrame, row for row beside the array.

        Parameters
        ----------
        start, end, max_piece_size, chunks : int or str, optional
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
        rows = self._selected(start, end)
        piece_rows = self._piece_rows(max_piece_size, chunks)
        if isinstance(rows, Stretch) and rows.is_contiguous:
            first = rows.values.start
            return graph.make_metadata_frame(self.manifest, first, first + len(rows), piece_rows)
        return graph.make_selected_frame(self.manifest, rows, piece_rows)

    def __call__(
        self,
        batch_size: int,
        start: int = 0,
        end: int | None = None,
        max_piece_size: int | str | None = None,
        parallel_pieces: int | None = None,
        show_progress: bool = True,
        max_ram_usage_in_bytes: int | str = 2**32,
        *,
        dtype: npt.DTypeLike | None = np.float32,
    ) -> Iterator[Batch]:
        """Iterate over batches, in order, read ahead by threads within a memory limit.

        Parameters
        ----------
        batch_size : int
            Rows in each batch; the last one may have fewer.
        start, end : int, optional
            Which rows, ``[start, end)``; all by default. An ``end`` past the collection is clipped.
        max_piece_size : int or str, optional
            The most rows that are read at once, or their bytes (``"128MiB"``); by default what suits the storage and
            the memory limit.
        parallel_pieces : int, optional
            How many pieces are read at the same time; by default what suits the storage.
        show_progress : bool, default True
            Whether to show a progress bar, in a terminal or notebook.
        max_ram_usage_in_bytes : int or str, default 4 GiB
            The memory that reading may hold, together with the batch that the loop is working on; as a number or as
            text (``"1GiB"``). Two batches that are larger are still read, with a warning.
        dtype : str or dtype, default float32
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
        request = self._request(
            batch_size,
            start,
            end,
            max_piece_size=max_piece_size,
            parallel_pieces=parallel_pieces,
            show_progress=show_progress,
            max_ram_usage_in_bytes=max_ram_usage_in_bytes,
            dtype=dtype,
        )
        self._warn_of_order(request.batch_rows)
        return read_batches(self.manifest, request)

    def _request(
        self,
        batch_size: int,
        start: int,
        end: int | None,
        *,
        max_piece_size: int | str | None,
        parallel_pieces: int | None,
        show_progress: bool,
        max_ram_usage_in_bytes: int | str,
        dtype: npt.DTypeLike | None,
    ) -> BatchRequest:
        """Check what batches are asked for."""
        first, stop, selected = span_of(self._selected(start, end))
        return BatchRequest(
            batch_rows=check_positive("batch_size", batch_size),
            start=first,
            stop=stop,
            rows=selected,
            max_piece_rows=check_piece_rows("max_piece_size", max_piece_size, self.byte_per_item),
            threads=None if parallel_pieces is None else check_positive("parallel_pieces", parallel_pieces),
            limit_nbytes=check_nbytes("max_ram_usage_in_bytes", max_ram_usage_in_bytes),
            dtype=self._wanted_dtype(dtype),
            show_progress=bool(show_progress),
        )

    def _warn_of_order(self, batch_rows: int) -> None:
        """Say what is left of chance where a batch is larger than the window has blocks."""
        whole = epoch_of(self.rows)
        if whole is None or whole.block_rows == 1:
            return
        rows = batch_rows * (self._shards[0] if self._shards else 1)
        if whole.blocks_mixed < rows < len(whole):
            # Blocks that are in a batch as a whole vary so many times as much.
            times = min(1 + rows / whole.blocks_mixed, whole.block_rows)
            warnings.warn(
                f"batches of {rows:,} rows{' (of all shards)' if self._shards else ''} are mixed from "
                f"{whole.blocks_mixed:,} blocks of {whole.block_rows:,} neighbouring rows: where neighbours are alike, "
                f"what a batch has of each kind varies {times:.3g} times as much as by chance "
                "(chi2/df); a larger buffer_rows (of shuffle), or a smaller batch_size, mixes more",
                stacklevel=3,
            )

    def plot_plan(
        self,
        batch_size: int | None = None,
        start: int = 0,
        end: int | None = None,
        *,
        max_piece_size: int | str | None = None,
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
        return plot_plan(self.manifest, self.rows, start, end, self._piece_rows(max_piece_size), batch_rows)

    @property
    def _noun(self) -> str:
        return "collection" if self.rows == Stretch(range(self.manifest.count)) else "selection"

    def _selected(self, start: int, end: int | None) -> Rows:
        """Return the rows ``[start, end)`` of this reader."""
        first, last = self._row_range(start, end)
        return self.rows[first:last] if first < last else Stretch(range(0))

    def _row_range(self, start: int, end: int | None) -> tuple[int, int]:
        first = check_integer("start", start)
        last = self.count if end is None else min(check_integer("end", end), self.count)
        if not 0 <= first <= self.count:
            raise ArgumentError(
                f"start={first:,} is out of range: the {self._noun} has {counted(self.count, 'row')}, from 0 on"
            )
        if last < first:
            raise ArgumentError(f"end={last:,} is before start={first:,}")
        return first, last

    def _piece_rows(self, max_piece_size: int | str | None, chunks: int | str | None = None) -> int:
        if chunks is not None and max_piece_size is not None:
            raise ArgumentError("chunks= and max_piece_size= are the same: give one of them")
        name, given = ("max_piece_size", max_piece_size) if chunks is None else ("chunks", chunks)
        rows = check_piece_rows(name, given, self.byte_per_item)
        # Of a shuffled selection a window: to read a part of it takes as long as all of it.
        return max(default_piece_rows(self.byte_per_item), self.rows.window_rows) if rows is None else rows

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
    try:
        files = Finder().find(sources, (suffix,), options, named=False, required=False).files
    except NoFilesError:
        if len(sources) > 1:
            raise  # one of them does not exist: what the others hold is not all
        files = []
    store = files[0].store if files else resolve(sources[0], options)[0]
    for file in files:
        if file.store != store:
            raise ArgumentError(f"the paths lie in different file systems: {files[0].url} and {file.url}")
    if all(os.fspath(source).startswith("file://") for source in sources):
        return store.filesystem, [store.filesystem.unstrip_protocol(file.path) for file in files]
    return store.filesystem, [store.url(file.path) for file in files]
