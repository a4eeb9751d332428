"""Local files, object stores and servers: one contract for all, requests counted, and everything that goes wrong."""
