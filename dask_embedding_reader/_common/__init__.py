"""What knows nothing of embeddings: arguments, memory used again, threads that stop, progress, units.

It imports nothing of this package but ``errors``.
"""
