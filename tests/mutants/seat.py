"""Where faults are planted: copies of all files, and processes that have collected the tests."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from tests.mutants.child import CANNOT_SWAP, FAILED, Job, run_tests, serve
from tests.mutants.plant import Fault
from tests.mutants.reach import KEPT, PACKAGE

_PRELOADED = ["numpy", "pandas", "pyarrow.dataset", "pyarrow.parquet", "dask.array", "dask.dataframe", "distributed"]
_PRELOADED += ["fsspec", "s3fs", "pytest", "duckdb", "polars"]
"""What takes long to import, and starts no threads."""

_ALONE = "not in this process"
"""A fault that cannot be planted in a process that has imported the package."""

_PROCESSES = multiprocessing.get_context("forkserver")
"""Processes forked from one that has imported what takes long, and runs nothing."""


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


def take_seats(count: int, files: Sequence[str]) -> SimpleQueue[Seat]:
    """Make some seats with the tests of some files."""
    _PROCESSES.set_forkserver_preload(_PRELOADED)
    seats: SimpleQueue[Seat] = SimpleQueue()
    for number in range(count):
        seats.put(_take_seat(number, files))
    return seats


def _take_seat(number: int, files: Sequence[str]) -> Seat:
    tree = _make_tree(number)
    ours, theirs = multiprocessing.Pipe()
    _PROCESSES.Process(target=serve, args=(str(tree), files, theirs)).start()
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
