"""Arrays, readers and batches into files: parts, a claim on the folder, the destination; and the check of it."""
