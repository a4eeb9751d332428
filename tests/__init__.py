"""Tests of dask_embedding_reader; ``support`` is what they share."""
