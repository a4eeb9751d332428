"""Lazy arrays and frames, and clusters."""
