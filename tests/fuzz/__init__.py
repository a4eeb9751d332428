"""Damaged and hostile files, manifests and arguments, by the million: ``python -m tests.fuzz --inputs 1000000``.

Whatever comes in, only two things may come out: what numpy or pyarrow read of the very same bytes, or an exception of
``dask_embedding_reader.errors``. ``seeds`` makes what is valid, ``mutate`` damages it, ``targets`` reads it and
compares, ``guard`` watches time, memory and unpickling, ``corpus.json`` keeps every input that has ever found a fault.
"""
