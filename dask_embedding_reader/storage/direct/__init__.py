"""Byte ranges from S3 and web servers without fsspec's clients: connections, redirects, addresses and signatures."""
