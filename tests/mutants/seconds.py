"""A plugin of pytest that writes down how long each test takes."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

_seconds: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add the time of a test, of what it needs, and of clearing up."""
    _seconds[report.nodeid] += report.duration  # type: ignore[assignment]


def pytest_sessionfinish() -> None:
    """Write all of them, in the process that has the reports of all."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        Path(os.environ["SECONDS_FILE"]).write_text(json.dumps(_seconds))
