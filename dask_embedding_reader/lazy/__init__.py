"""Dask: a plan as an array and a frame, and batches of whatever is computed from them.

The only room, with ``write.tasks``, that knows Dask.
"""
