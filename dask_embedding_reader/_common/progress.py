"""Progress: how far, how fast, how much longer, in how much memory. In terminals, notebooks and logs."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any, Protocol

from dask_embedding_reader._common.units import human_count, human_size, human_time

_DELAY_SECONDS = 1.0
"""Work that is done sooner shows no bar."""

_LOG_SECONDS = 10.0
"""Between two lines of a log at least; and a twentieth of the time that has passed, so that long work has few lines."""

_COLUMNS = 110
"""How wide a bar is in a notebook, and in a terminal that does not say how wide it is, as those of containers."""


class Progress(Protocol):
    """What shows progress. Leaving its ``with`` block, or closing it, shows where the work ended."""

    def update(self, n: int) -> Any:
        """Note that n more units are done."""

    def close(self) -> None:
        """Show the end."""

    def __enter__(self) -> Progress:
        """Return itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""


def progress_bar(show: bool, total: int, description: str, unit: str, unit_nbytes: int = 0) -> Progress:
    """Return what shows progress: a bar in a terminal or notebook, a line now and then in a log, or nothing.

    The total is 0 where it is not known. How many bytes are done a second is shown if a unit has any.
    """
    if not show or sys.stderr is None:
        return _Silent()
    if sys.stderr.isatty() or in_notebook():
        return _make_bar(total, description, unit, unit_nbytes)
    return _Log(total, description, unit, unit_nbytes)


def in_notebook() -> bool:
    """Tell whether this is a Jupyter kernel: its stderr is no terminal, but what is written to it is seen."""
    return "ipykernel" in sys.modules


def used_memory() -> int:
    """Return the bytes of memory that this process has now (its resident set)."""
    import psutil  # noqa: PLC0415 - only where progress is shown

    return int(psutil.Process().memory_info().rss)


def _make_bar(total: int, description: str, unit: str, unit_nbytes: int) -> Progress:
    from tqdm.std import tqdm  # noqa: PLC0415 - only where somebody watches

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread that stays

        @property
        def format_dict(self) -> dict[str, Any]:
            shown: dict[str, Any] = super().format_dict
            rate = shown["rate"] or (shown["n"] - shown["initial"]) / (shown["elapsed"] or 1)
            speed = f", {human_size(_round(rate * unit_nbytes))}/s" if unit_nbytes else ""
            return {**shown, "speed": speed, "memory": human_size(_round(used_memory()))}

    has_width = _has_width()
    bar: Progress = Bar(
        total=total or None,
        desc=description,
        unit=unit,
        unit_scale=True,
        delay=_DELAY_SECONDS,
        # In a notebook text, not a widget: it is still there when the notebook is saved, and it needs no extension.
        ncols=None if has_width else _COLUMNS,
        nrows=None if has_width else 1_000,
        dynamic_ncols=has_width,
        bar_format=(
            "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit} " if total else "{desc}: {n_fmt}{unit} "
        )
        + ("[{elapsed}<{remaining}" if total else "[{elapsed}")
        + ", {rate_fmt}{speed}, memory {memory}]",
    )
    return bar


def _has_width() -> bool:
    """Tell whether this is a terminal that says how wide it is: in a bar of 0 columns tqdm shows nothing."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # a notebook, or what has no file descriptor
        return False


class _Log:
    """Whole lines of plain text, for files that collect what a program says."""

    def __init__(self, total: int, description: str, unit: str, unit_nbytes: int) -> None:
        self._total, self._description, self._unit, self._unit_nbytes = total, description, unit, unit_nbytes
        self._done = 0
        self._start = time.monotonic()
        self._next = self._start + _LOG_SECONDS
        self._shown = -1

    def update(self, n: int) -> None:
        self._done += n
        now = time.monotonic()
        if now >= self._next:
            self._show(now)
            self._next = now + max(_LOG_SECONDS, (now - self._start) / 20)

    def close(self) -> None:
        # Where nothing was worth a line, neither is the end.
        if self._shown not in (-1, self._done):
            self._show(time.monotonic())

    def _show(self, now: float) -> None:
        self._shown = self._done
        seconds = now - self._start
        rate = self._done / seconds if seconds else 0.0
        facts = [f"{human_count(rate)}{self._unit}/s"]
        if self._unit_nbytes:
            facts.append(f"{human_size(_round(rate * self._unit_nbytes))}/s")
        left = self._total - self._done
        facts.append(f"{human_time(left / rate)} left" if left > 0 and rate else f"{human_time(seconds)} passed")
        facts.append(f"memory {human_size(_round(used_memory()))}")
        of, share = (f" of {self._total:,}", f" ({self._done / self._total:.0%})") if self._total else ("", "")
        done = f"{self._done:,}{of}{self._unit}{share}"
        print(f"{self._description}: {done}, {', '.join(facts)}", file=sys.stderr, flush=True)  # noqa: T201

    def __enter__(self) -> _Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Silent:
    """Shows nothing."""

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


def _round(number: float) -> float:
    """Keep three digits: more only flicker."""
    return float(f"{number:.3g}")
