"""Faults planted in a room, each one alone, and the tests that reach it; what they do not notice is told.

Which tests reach which line is found by one run of the tests of the room, and kept until the room or they change.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import coverage

from tests.mutants.child import run_tests
from tests.mutants.plant import Fault, faults

PACKAGE, KEPT = "dask_embedding_reader", Path(".mutants")

SELECTED = "not slow and not hdfs and not torch"
"""What `make test` runs."""

ROOMS = {
    "rows": ("rows", "rows/test_rows.py"),
    "plan": (
        "collection/plan.py",
        "collection/test_small_files.py rows/test_views.py lazy/test_lazy_use.py lazy/test_names.py",
    ),
    "formats": ("formats", "collection/test_layouts.py formats write/test_write.py"),
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

_MOST_SECONDS = 60.0
"""So long the tests of one fault may take where none notices it: the quickest of those that reach it."""

_PRELOADED = ["numpy", "pandas", "pyarrow.dataset", "pyarrow.parquet", "dask.array", "dask.dataframe", "distributed"]
_PRELOADED += ["fsspec", "s3fs", "pytest", "duckdb", "polars"]
"""What takes long to import, and starts no threads."""

_PROCESSES = multiprocessing.get_context("forkserver")
"""A process for each fault, forked from one that has imported what takes long, and runs nothing."""


class Reach(NamedTuple):
    """What the tests of a room reach."""

    tests: Mapping[str, Mapping[int, Sequence[str]]]
    """By file and line: the tests."""
    seconds: Mapping[str, float]
    """How long each takes."""

    def of(self, fault: Fault) -> list[str]:
        """Return the tests that reach a fault, the quickest first; of what runs at import all of the file's."""
        lines = self.tests[fault.path]
        begin = max((line for line in lines if line <= fault.line), default=0)  # of the statement
        found = set(lines.get(begin) or [test for tests in lines.values() for test in tests])
        taken: list[str] = []
        seconds = 0.0
        for test in sorted(found & self.seconds.keys(), key=lambda test: (self.seconds[test], test)):
            seconds += self.seconds[test]
            if taken and seconds > _MOST_SECONDS:
                break
            taken.append(test)
        return taken


def find_reach(room: str, paths: Sequence[Path]) -> Reach:
    """Return which tests reach which lines, from what is kept of an earlier run if there is one."""
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
        contexts = measured.contexts_by_lineno(str(path.resolve()))
        reached[str(path)] = {
            line: [context.partition("|")[0] for context in found if context] for line, found in contexts.items()
        }
    return Reach(reached, json.loads(kept.read_text()))


def run(tree: Path, tests: Sequence[str], seconds: float) -> str:
    """Run some tests, and tell what came of it: ``unseen`` where all pass, ``noticed`` where one fails.

    What is noticed by other means says nothing of the tests: ``hangs`` by the clock, ``breaks all`` where no test runs.
    """
    log = tree / "log"
    process: Any = _PROCESSES.Process(target=run_tests, args=(str(tree), tests, str(log)))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return "hangs"
    if process.exitcode != 1:
        return "breaks all" if process.exitcode else "unseen"
    text = log.read_text()
    if "from pytest-timeout" in text:
        return "hangs"
    return "noticed" if "FAILED" in text or "ERROR" in text else "breaks all"


def plant(tree: Path, fault: Fault, tests: Sequence[str], seconds: float) -> str:
    """Plant a fault, and tell what tests make of it, as :func:`run` does."""
    path = tree / fault.path
    source = path.read_text()
    try:
        path.write_text(fault.planted(source))
        return run(tree, tests, seconds)
    finally:
        path.write_text(source)


def _make_tree(number: int) -> Path:
    """Copy all that git does not ignore: the faults are planted there."""
    tree = (KEPT / f"tree-{number}").resolve()
    shutil.rmtree(tree, ignore_errors=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.splitlines():
        if not Path(name).is_file():  # removed, or a link to a folder
            continue
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, tree / name)
    (tree / ".venv").symlink_to(Path(".venv").resolve())  # where the servers of tests are
    # What is not changed is compiled once.
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(tree / PACKAGE)], check=True)
    return tree


def main() -> int:
    """Plant faults, and list those that no test notices."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--sample", type=int, default=100, help="so many faults, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path holds this alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    found = [path for part in ROOMS[given.room][0].split() for path in sorted(Path(PACKAGE).glob(part))]
    paths = [file for path in found for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    reach = find_reach(given.room, paths)
    every = [fault for path in paths if given.only in str(path) for fault in faults(str(path), path.read_text())]
    shuffled = random.Random(given.seed).sample(every, len(every))
    drawn = list(islice((fault for fault in shuffled if fault.is_python(Path(fault.path).read_text())), given.sample))
    trees: SimpleQueue[Path] = SimpleQueue()
    for tree in map(_make_tree, range(given.processes)):
        trees.put(tree)
    _PROCESSES.set_forkserver_preload(_PRELOADED)

    def seconds_for(tests: Sequence[str]) -> float:
        return 60 + 5 * sum(reach.seconds[test] for test in tests)

    tests = sorted({test for fault in drawn for test in reach.of(fault)})
    if run(tree, tests, seconds_for(tests)) != "unseen":
        parser.error(f"tests fail where no fault is planted: see {tree / 'log'}")

    def plant_one(fault: Fault) -> str:
        tests = reach.of(fault)
        if not tests:
            return "unseen, as no test reaches it"
        tree = trees.get()
        try:
            return plant(tree, fault, tests, seconds_for(tests))
        finally:
            trees.put(tree)

    begun, counts = time.monotonic(), Counter[str]()
    with ThreadPoolExecutor(given.processes) as pool:
        for fault, what in zip(drawn, pool.map(plant_one, drawn), strict=True):
            counts[what.partition(",")[0]] += 1
            if what != "noticed":
                before = Path(fault.path).read_text()
                now = fault.planted(before).splitlines()[fault.line - 1].strip()
                sys.stdout.write(f"{fault.path}:{fault.line}: {what}: {fault.operator}: {now}\n")
                sys.stdout.flush()
    told = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    sys.stdout.write(
        f"{given.room}: of {len(drawn)} ({len(every):,} in all) {told}; {time.monotonic() - begun:.0f} s\n"
    )
    return 0
