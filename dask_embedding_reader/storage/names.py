"""Names of files: which are litter, and where patterns start."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

GLOB_CHARACTERS = frozenset("*?[")

_LITTER = re.compile(r"(?:^|/)[._]")


def glob_root(pattern: str) -> str:
    """Return the folder that a pattern starts in."""
    return pattern[: min(pattern.index(c) for c in GLOB_CHARACTERS if c in pattern)].rpartition("/")[0]


def is_litter(name: str, root: str = "") -> bool:
    """Tell hidden files, ``_SUCCESS``, ``_temporary/…`` and their like, wherever they lie below the folder given."""
    return _LITTER.search(name, len(root.rstrip("/")) if name.startswith(root) else 0) is not None


def meant_path(path: str) -> str:
    """Return a path as its folders and files are called: of web servers, which write `%20` and the like, decoded.

    Examples
    --------
    >>> meant_path("http://host/lang%3Den/a%20b.npy?sign=a/b"), meant_path("data/a%20b.npy?")
    ('http://host/lang=en/a b.npy', 'data/a%20b.npy?')
    """
    return unquote(path.partition("?")[0]) if path.startswith(("http://", "https://")) else path


def suffixes_of(path: str) -> list[str]:
    """Return all suffixes of a file, in small letters, the last one first.

    Examples
    --------
    >>> suffixes_of("v1.2/base.1B.u8bin.crop_nb_10")
    ['.crop_nb_10', '.u8bin', '.1b']
    """
    return [f".{part.lower()}" for part in reversed(os.path.basename(path).split(".")[1:])]


def numbered_alike(path: str) -> str:
    """Return a glob for all files that are called as one is but for numbers; the path itself where it has none.

    Examples
    --------
    >>> numbered_alike("v2/train-00000-of-00002.parquet"), numbered_alike("part-00000"), numbered_alike("a.npy")
    ('v2/train-*.parquet', 'part-*', 'a.npy')
    """
    folder, slash, name = path.rpartition("/")
    return folder + slash + re.sub(r"[0-9].*?(?=\.[^.0-9]*$|$)", "*", name)
