"""Names of files: which are litter, and where patterns start."""

from __future__ import annotations

import re

GLOB_CHARACTERS = frozenset("*?[")

_LITTER = re.compile(r"(?:^|/)[._]")


def glob_root(pattern: str) -> str:
    """Return the folder that a pattern starts in."""
    return pattern[: min(pattern.index(c) for c in GLOB_CHARACTERS if c in pattern)].rpartition("/")[0]


def is_litter(name: str, root: str = "") -> bool:
    """Tell hidden files, ``_SUCCESS``, ``_temporary/…`` and their like, wherever they lie below the folder given."""
    return _LITTER.search(name, len(root.rstrip("/")) if name.startswith(root) else 0) is not None
