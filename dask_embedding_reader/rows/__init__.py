"""Which rows of a collection, in which order: pure arithmetic, no files, no Dask."""
