"""A bucket or web server, and how it is asked without a client of fsspec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dask_embedding_reader.storage.direct.http import Connections


class NotDirectError(Exception):
    """Something that is not known to be done here just as fsspec's client does it."""


@dataclass(slots=True)
class Site:
    """A bucket or web server, and how it is asked."""

    address: str
    """What the addresses of all its files start with."""
    headers: Callable[[str, str], Mapping[str, str]]
    """Returns the headers of a request for a range of an address."""
    connections: Connections
    is_web: bool
    """Whether it is a web server, which may point elsewhere, and not a bucket."""
    has_answered: bool = False
    """Whether it ever did. If so, all options were understood."""


class Address(NamedTuple):
    """Where a file is, as a file system writes it."""

    site: str
    """The name of its site: a URL without secrets."""
    rest: str
    """What of its address comes after that of the site."""
    make: Callable[[], Site]
    """Makes the site."""
