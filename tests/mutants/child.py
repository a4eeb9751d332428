"""What runs in processes of their own: tests collected once, and forks of that process, one for each fault."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.mutants.swap import swap

CANNOT_SWAP = 100
"""The exit code of a process that cannot plant a fault in itself: the others are pytest's."""

FAILED = "failed"
"""The file that holds the name of the test that has failed."""

_FORKS = multiprocessing.get_context("fork")

_OPTIONS = ["-q", "-s", "-n0", "-p", "no:cacheprovider", "--no-cov", "--timeout=60"]
_OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins may have been imported before


class Job(NamedTuple):
    """Tests to run."""

    tests: Sequence[str]
    """Their names, or what the names of several begin with."""
    seconds: float
    """So long they may take."""
    swapped: tuple[str, str, str] | None = None
    """A file, what it holds, and what it holds with a fault."""


def run_tests(tree: str, tests: Sequence[str]) -> None:
    """Run tests in a process of their own, and end it with their exit code."""
    _begin(tree)
    code = int(pytest.main([*_OPTIONS, "-x", *tests]))
    sys.stdout.flush()
    os._exit(code)


def serve(tree: str, tests: Sequence[str], jobs: Connection) -> None:
    """Collect tests once, then run those that are asked for, each time in a fork, until nothing asks."""
    _begin(tree)
    pytest.main([*_OPTIONS, f"--basetemp={tree}/temporary", *tests], plugins=[_Forks(jobs)])


def _begin(tree: str) -> None:
    os.setpgrp()  # no session: what runs nicely goes on to
    os.chdir(tree)
    sys.path.insert(0, tree)
    for name in [name for name in sys.modules if name.startswith("tests") and "mutants" not in name]:
        del sys.modules[name]  # of the other tree
    sys.modules["tests"] = importlib.import_module("tests")
    sys.dont_write_bytecode = True  # the next fault may come in the same second, in a file of the same size
    os.environ |= {"PYTHONPATH": tree, "PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_PROFILE": "mutants"}
    _write_to_log()


def _write_to_log() -> None:
    with open("log", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


class _Forks:
    """A plugin of pytest that runs of the collected tests what it is asked for."""

    def __init__(self, jobs: Connection) -> None:
        self.jobs = jobs

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        import dask_embedding_reader

        for module in pkgutil.walk_packages(dask_embedding_reader.__path__, "dask_embedding_reader."):
            if module.name.rpartition(".")[2] not in ("__main__", "torch"):
                importlib.import_module(module.name)
        items = {item.nodeid: item for item in session.items}
        self.jobs.send("begun")
        with contextlib.suppress(EOFError):
            while True:
                self.jobs.send(self._fork(session, items, self.jobs.recv()))
        return True

    def _fork(self, session: pytest.Session, items: dict[str, pytest.Item], job: Job) -> int | None:
        """Return the exit code of the tests, or None where their time was up."""
        chosen = [
            items[name] for test in job.tests for name in ([test] if test in items else items) if name.startswith(test)
        ]
        process: Any = _FORKS.Process(target=_run_here, args=(session, chosen, job))
        process.start()
        process.join(job.seconds)
        code: int | None = process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it has left behind
        process.join()
        return code


def _run_here(session: pytest.Session, items: Sequence[pytest.Item], job: Job) -> None:
    os.setpgrp()
    _write_to_log()
    if job.swapped and not swap(*job.swapped):
        os._exit(CANNOT_SWAP)
    session.config.option.maxfail = 1
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            Path(FAILED).write_text(item.nodeid)
            break
    code = pytest.ExitCode.TESTS_FAILED if session.testsfailed else pytest.ExitCode.OK
    session.config.hook.pytest_sessionfinish(session=session, exitstatus=code)
    sys.stdout.flush()
    os._exit(code)
