"""Progress bars, where somebody watches."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

_DELAY_SECONDS = 1.0
"""Work that is done sooner shows no bar."""


def progress_bar(show: bool, total: int, description: str, unit: str) -> Any:
    """Return a tqdm bar where it is wanted and a terminal or notebook shows it, else something that stays silent."""
    if not (show and _somebody_watches()):
        return _Silent()
    from tqdm.auto import tqdm  # noqa: PLC0415 - in a notebook, importing it already looks for widgets

    return tqdm(total=total, desc=description, unit=unit, unit_scale=True, delay=_DELAY_SECONDS)


def _somebody_watches() -> bool:
    # Inside a Jupyter kernel stderr is no terminal, but what is written to it is seen.
    return "ipykernel" in sys.modules or bool(sys.stderr and sys.stderr.isatty())


class _Silent:
    """What is used of a bar. tqdm has a silent mode too, in which it still starts a thread that stays."""

    def update(self, n: int) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let exceptions pass."""
