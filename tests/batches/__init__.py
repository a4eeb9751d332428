"""Batches under a limit of memory: what is held, and what is left behind; tensors of them."""
