"""Faults planted in a room, each one alone, and the tests that reach it; what they do not notice is told.

Which tests reach which line is found by one run of the tests of the room, and kept until the room or they change.
"""

from __future__ import annotations

import argparse
import contextlib
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
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import coverage

from tests.mutants.child import CANNOT_SWAP, FAILED, Job, run_tests, serve
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

_MOST_SECONDS = 300.0
"""So long the tests of one fault may take where none notices it: the quickest of those that reach it.

It is the time they take while reach is found, a third or less without that."""

_PRELOADED = ["numpy", "pandas", "pyarrow.dataset", "pyarrow.parquet", "dask.array", "dask.dataframe", "distributed"]
_PRELOADED += ["fsspec", "s3fs", "pytest", "duckdb", "polars"]
"""What takes long to import, and starts no threads."""

_ALONE = "not in this process"
"""A fault that cannot be planted in a process that has imported the package."""

_PROCESSES = multiprocessing.get_context("forkserver")
"""Processes forked from one that has imported what takes long, and runs nothing."""


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
        contexts = measured.contexts_by_lineno(str(path))
        reached[str(path)] = {
            line: [context.partition("|")[0] for context in found if context] for line, found in contexts.items()
        }
    return Reach(reached, json.loads(kept.read_text()))


class Seat(NamedTuple):
    """Where faults are planted, one after the other: a copy of all files, and a process that has imported them."""

    tree: Path
    jobs: Connection
    """What it is asked for, and what it answers."""
    sound: set[str]
    """The tests that pass where no fault is planted."""

    def plant(self, fault: Fault, tests: Sequence[str], seconds: float) -> str:
        """Plant a fault, and tell what tests make of it: ``unseen`` where all pass, ``noticed`` where one fails.

        What is noticed by other means says nothing of the tests: ``hangs`` by the clock, ``breaks all`` where no test
        runs.
        """
        path = self.tree / fault.path
        before = path.read_text()
        after = fault.planted(before)
        try:
            path.write_text(after)  # for what tests run in processes of their own
            told = self._run(Job(tests, seconds, (str(path), before, after)))
            if told == _ALONE:
                return self._run_alone(tests, seconds)
        finally:
            path.write_text(before)
        return told if told != "noticed" or self._is_sound(seconds) else "fails without it too"

    def _is_sound(self, seconds: float) -> bool:
        """Tell whether the test that has failed passes where no fault is planted."""
        failed = (self.tree / FAILED).read_text()
        if failed not in self.sound and self._run(Job([failed], seconds)) == "unseen":
            self.sound.add(failed)
        return failed in self.sound

    def _run(self, job: Job) -> str:
        self.jobs.send(job)
        return self._told(self.jobs.recv())

    def _run_alone(self, tests: Sequence[str], seconds: float) -> str:
        process: Any = _PROCESSES.Process(target=run_tests, args=(str(self.tree), tests))
        process.start()
        process.join(seconds)
        code = process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return self._told(code)

    def _told(self, code: int | None) -> str:
        if code == CANNOT_SWAP:
            return _ALONE
        if code is None:
            return "hangs"
        if code != 1:
            return "breaks all" if code else "unseen"
        text = (self.tree / "log").read_text(errors="replace")
        if "from pytest-timeout" in text:
            return "hangs"
        return "noticed" if "FAILED" in text or "ERROR" in text else "breaks all"


def take_seat(number: int, tests: Sequence[str]) -> Seat:
    """Copy the files, and start a process that collects tests."""
    tree = _make_tree(number)
    ours, theirs = multiprocessing.Pipe()
    _PROCESSES.Process(target=serve, args=(str(tree), tests, theirs)).start()
    theirs.close()
    ours.recv()
    return Seat(tree, ours, set())


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
    parser.add_argument("--only", default="", help="places (path:line) that hold this alone")
    parser.add_argument("--also", action="append", default=[], metavar="TEST", help="run this too, before others")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    found = [path for part in ROOMS[given.room][0].split() for path in sorted(Path(PACKAGE).glob(part))]
    paths = [file for path in found for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    reach = find_reach(given.room, paths)
    every = [fault for path in paths for fault in faults(str(path), path.read_text())]
    every = [fault for fault in every if given.only in f"{fault.path}:{fault.line}"]
    shuffled = random.Random(given.seed).sample(every, len(every))
    drawn = list(islice((fault for fault in shuffled if fault.is_python(Path(fault.path).read_text())), given.sample))
    _PROCESSES.set_forkserver_preload(_PRELOADED)
    tests = sorted({test.partition("::")[0] for test in [*given.also, *reach.seconds]})
    seats: SimpleQueue[Seat] = SimpleQueue()
    for number in range(given.processes):
        seats.put(take_seat(number, tests))

    def seconds_for(tests: Sequence[str]) -> float:
        return 60 + sum(reach.seconds.get(test, 60.0) for test in tests)

    def plant_one(fault: Fault) -> str:
        tests = [*given.also, *reach.of(fault)]
        if not tests:
            return "unseen, as no test reaches it"
        seat = seats.get()
        try:
            return seat.plant(fault, tests, seconds_for(tests))
        finally:
            seats.put(seat)

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
