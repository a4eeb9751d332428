"""``python -m dask_embedding_reader``: the command line."""

from dask_embedding_reader.cli import main

if __name__ == "__main__":
    main()
