"""Tests of dask_embedding_reader, in folders by what they are about; ``support`` is what they share."""
