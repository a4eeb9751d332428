"""Writing and conversions: what is written, by whom, and what a writer that dies leaves."""
