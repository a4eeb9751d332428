"""Warnings in the line of whoever calls this library, from however deep inside it they come."""

from __future__ import annotations

import inspect
import warnings


def warn(message: str) -> None:
    """Show a warning with the innermost line that is not of this library."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
