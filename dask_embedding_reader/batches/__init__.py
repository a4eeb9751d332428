"""Rows into memory, ahead of who wants them, in order, within a memory limit."""
