"""Exact nearest neighbours: what is asked for, the best so far, blocks of rows, and where these are computed."""
