"""Parquet: footers parsed here for safety, plain pages copied without decoding, all else by pyarrow."""
