"""Which tests reach which lines: found by one run of the tests of a room, and kept until the room or they change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import coverage

from tests.mutants.plant import Fault

PACKAGE, KEPT = "dask_embedding_reader", Path(".mutants")

SELECTED = "not slow and not hdfs and not torch"
"""What `make test` runs."""

ROOMS = {
    "rows": ("rows", "rows/test_rows.py"),
    "plan": (
        "collection/plan.py",
        "collection/test_small_files.py rows/test_views.py lazy/test_lazy_use.py lazy/test_names.py",
    ),
    "formats": ("formats", "collection/test_layouts.py formats library/test_bad_input.py write/test_write.py"),
    "batches": (
        "batches _common/memory.py",
        (
            "batches rows collection/test_small_files.py formats/test_buffers.py library/test_properties.py "
            "library/test_search.py"
        ),
    ),
    "lazy": ("lazy", "batches/test_streaming.py lazy"),
    "storage": (
        "storage",
        (
            "storage collection/test_finding_files.py formats/test_picking.py library/test_platforms.py "
            "write/test_write.py"
        ),
    ),
    "collection": (
        "collection",
        "collection library/test_bad_input.py library/test_reference_failings.py rows/test_views.py",
    ),
    "write": ("write", "write"),
    "cli": ("cli", "show/test_command_line.py"),
}
"""What is in each room, and where its tests are."""

_MOST_SECONDS = 300.0
"""So long the tests of one fault may take where none notices it: the quickest of those that reach it.

It is the time they take while reach is found, a third or less without that."""


class Reach(NamedTuple):
    """What the tests of a room reach."""

    tests: Mapping[str, Mapping[int, Sequence[str]]]
    """By file and line: the tests."""
    seconds: Mapping[str, float]
    """How long each takes."""

    def first_line(self, fault: Fault) -> int:
        """Return the line where the statement begins that holds a fault."""
        return max((line for line in self.tests[fault.path] if line <= fault.line), default=0)

    def of(self, fault: Fault) -> list[str]:
        """Return the tests that reach a fault, the quickest first; of what runs at import all of the file's."""
        lines = self.tests[fault.path]
        found = set(lines.get(self.first_line(fault)) or [test for tests in lines.values() for test in tests])
        taken: list[str] = []
        seconds = 0.0
        for test in sorted(found & self.seconds.keys(), key=lambda test: (self.seconds[test], test)):
            seconds += self.seconds[test]
            if taken and seconds > _MOST_SECONDS:
                break
            taken.append(test)
        return taken


def files_of(room: str) -> list[Path]:
    """Return the files of a room."""
    found = [path for part in ROOMS[room][0].split() for path in sorted(Path(PACKAGE).glob(part))]
    return [file for path in found for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


def find_reach(room: str) -> Reach:
    """Return which tests reach which lines of a room, from what is kept of an earlier run if there is one."""
    paths = files_of(room)
    code, of_room = ROOMS[room]
    tests = [f"tests/{path}" for path in of_room.split()] + [f"{PACKAGE}/{path}" for path in code.split()]  # examples
    kept, data = KEPT / f"{room}.json", KEPT / f"{room}.coverage"
    files = [file for path in map(Path, tests) for file in ([path] if path.is_file() else path.rglob("*.py"))]
    if not kept.exists() or kept.stat().st_mtime < max(path.stat().st_mtime for path in [*paths, *files]):
        KEPT.mkdir(exist_ok=True)
        run = [sys.executable, "-m", "pytest", "-q", "-m", SELECTED, "-p", "tests.mutants.seconds", *tests]
        run += ["--cov", "--cov-context=test", "--cov-report=", "--cov-fail-under=0"]
        run += ["--timeout=600"]  # counting takes long, and where one test fails all of them are run again
        try:
            subprocess.run(run, check=True, env={**os.environ, "COVERAGE_FILE": str(data), "SECONDS_FILE": str(kept)})
        except subprocess.CalledProcessError:
            kept.unlink(missing_ok=True)  # of tests that fail nothing is known
            raise
    measured = coverage.CoverageData(str(data))
    measured.read()
    reached = {}
    for path in paths:
        contexts = measured.contexts_by_lineno(str(path))
        reached[str(path)] = {
            line: [context.partition("|")[0] for context in found if context] for line, found in contexts.items()
        }
    return Reach(reached, json.loads(kept.read_text()))
