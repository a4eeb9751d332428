"""Chosen rows: filters, samples, orders and shards, and readers of them."""
