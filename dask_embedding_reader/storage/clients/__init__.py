"""What fsspec's clients can do beyond fsspec: one request for exactly the bytes asked for, with their version."""
