"""The contenders at files of other formats than npy and parquet, against npy, and at many small files."""

from __future__ import annotations

from importlib import import_module

import numpy as np

from .contenders import Answer, Job, consume, contends, import_dask, import_libraries, options, repeated
from .data import Data
from .floors import BY_HAND, NPY_SAME, OURS
from .works import Work


def _pass(work: Work, data: Data, name: str, file_format: str) -> Job:
    reader = import_module(OURS).EmbeddingReader(str(data.folder(name)), file_format)
    return repeated(work, lambda: consume(reader(work.batch_size, **options(work))))


@contends(OURS, "format-*")
def our_pass(work: Work, data: Data) -> Job:
    """Every batch."""
    return _pass(work, data, work.data.partition("+")[0], work.source.file_format)


@contends(NPY_SAME, "format-*")
def npy_pass(work: Work, data: Data) -> Job:
    """Every batch of the same vectors in npy files."""
    return _pass(work, data, "format-npy", "npy")


@contends(OURS, "small-mean")
def our_mean(work: Work, data: Data) -> Job:
    """The lazy mean, from the opened reader on."""
    import_dask()
    reader = import_module(OURS).EmbeddingReader(str(data.folder(work.data)))
    return lambda: {"sum": float(reader.to_dask_array().mean(axis=0).compute().sum())}


@contends(BY_HAND, "small-mean")
def mean_by_hand(work: Work, data: Data) -> Job:
    """One np.load after the other."""
    files = data.files(work.data)
    return lambda: {"sum": float(np.concatenate([np.load(file) for file in files]).mean(axis=0).sum())}


@contends(OURS, "small-pairs")
def our_pairs(work: Work, data: Data) -> Job:
    """Every batch, with metadata."""
    import_libraries(work)
    vectors, metadata = (str(data.folder(name)) for name in work.data.split("+"))
    reader = import_module(OURS).EmbeddingReader(vectors, metadata_folder=metadata, meta_columns=["caption", "url"])
    return lambda: consume(reader(work.batch_size, **options(work)))


@contends(BY_HAND, "small-pairs")
def pairs_by_hand(work: Work, data: Data) -> Job:
    """One np.load and one read_table after the other."""
    parquet = import_module("pyarrow.parquet")
    files, tables = (data.files(name) for name in work.data.split("+"))

    def job() -> Answer:
        pairs = ((np.load(file), parquet.read_table(table)) for file, table in zip(files, tables, strict=True))
        return consume((vectors, table.to_pandas()) for vectors, table in pairs)

    return lambda: {"rows": job()["rows"]}
