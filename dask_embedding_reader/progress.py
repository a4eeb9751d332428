"""Progress bars, where somebody watches."""

from __future__ import annotations

import sys
from typing import Any

_DELAY_SECONDS = 1.0
"""Work that is done sooner shows no bar."""


def progress_bar(show: bool, total: int, description: str, unit: str) -> Any:
    """Return a tqdm bar, silent unless it is wanted, the work is long, and a terminal or notebook shows it."""
    from tqdm.auto import tqdm  # noqa: PLC0415 - in a notebook, importing it already looks for widgets

    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        delay=_DELAY_SECONDS,
        disable=not (show and _somebody_watches()),
    )


def _somebody_watches() -> bool:
    # Inside a Jupyter kernel stderr is no terminal, but what is written to it is seen.
    return "ipykernel" in sys.modules or bool(sys.stderr and sys.stderr.isatty())
