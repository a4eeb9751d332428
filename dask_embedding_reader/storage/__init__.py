"""Bytes, wherever they are: find files, read exact ranges of them, put files in place.

The only room that speaks fsspec, and the clients of S3, web servers, Google and Azure.
"""
