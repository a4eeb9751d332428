"""Rounds of processes, alternating between the contenders."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from . import child, cold, convert, formats, lazy, neighbours, pages, remote, rows  # noqa: F401 - they enter their contenders
from .contenders import contenders_of
from .data import Data
from .floors import OURS, Run, Summary, Verdict
from .works import Work

TIMEOUT_SECONDS = 300
FORKS = multiprocessing.get_context("forkserver")
"""Importing takes longer than most of the works. But a fork has its libraries still to page in: where memory or
milliseconds count, a new process does the work."""
SPAWNS = multiprocessing.get_context("spawn")
SPAWNED = ("memory-*", "open-*", "row", "row-*")
MODULES = [
    *("dask_embedding_reader.reader", "embedding_reader", "numpy", "pandas", "pyarrow.parquet", "pyarrow.dataset"),
    *("dask.array", "dask.dataframe", "fsspec.implementations.local", f"{__package__}.child"),
]
PACKAGES = ("dask-embedding-reader", "embedding_reader", "numpy", "pandas", "pyarrow", "pylance", "dask", "fsspec")


@dataclass
class Results:
    """Everything that was measured."""

    works: list[Work]
    machine: dict[str, Any]
    runs: dict[str, dict[str, list[Run]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    """By work and contender."""
    missing: dict[str, str] = field(default_factory=dict)
    """Contenders that cannot be imported, and why."""
    faults: dict[tuple[str, str], str] = field(default_factory=dict)
    """Contenders that failed at a work or disagree with the others, and how."""

    def of(self, work: Work) -> dict[str, Summary]:
        """Summaries by contender."""
        return {contender: Summary(runs) for contender, runs in self.runs[work.name].items() if runs}

    def verdicts(self, work: Work) -> list[Verdict]:
        """What became of the floors; nothing when the library did not run."""
        summaries = self.of(work)
        verdicts = [floor.judge(summaries) for floor in work.floors] if OURS in summaries else []
        return [verdict for verdict in verdicts if verdict]


def run(works: list[Work], rounds: int, data: Data) -> Iterator[Results]:
    """Go round by round through all the works, so that a noisy minute spoils one round and not one work.

    After every round the results so far are handed out.
    """
    os.environ["PYTHONPYCACHEPREFIX"] = str(data.root / "pycache")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # without cached bytecode each start costs seconds
    FORKS.set_forkserver_preload(MODULES)  # what is not installed is passed over
    results = Results(works, {**machine(), "rows_per_file": data.rows, "rounds": rounds})
    started = time.perf_counter()
    for number in range(rounds):
        for work in works:
            if number < (work.rounds or rounds):
                progress(f"round {number + 1}/{rounds} {work.name} ({time.perf_counter() - started:.0f} s)")
                data.warm(work.data)
                alternate(results, work, number, data)
        results.machine.update(seconds=time.perf_counter() - started, load_after=os.getloadavg())
        for work in works:
            compare(results, work)
        yield results
    progress("")


def alternate(results: Results, work: Work, number: int, data: Data) -> None:
    """Run every contender once, each round beginning with another."""
    if why := remote.why_not(work):
        results.missing[work.name] = why
        return
    contenders = contenders_of(work)
    shift = number % len(contenders)
    with remote.served(work, data):
        for contender in contenders[shift:] + contenders[:shift]:
            if contender in results.missing or (work.name, contender) in results.faults:
                continue
            outcome = spawn(work.name, contender, data)
            if "run" in outcome:
                results.runs[work.name][contender].append(Run(**outcome["run"]))
            elif "missing" in outcome:
                results.missing[contender] = outcome["missing"]
            else:
                results.faults[work.name, contender] = outcome["fault"]


def spawn(work: str, contender: str, data: Data) -> dict[str, Any]:
    """One contender in a process of its own, forked from one that has only imported what they need, or new."""
    context: Any = SPAWNS if any(fnmatch(work, pattern) for pattern in SPAWNED) else FORKS
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child.run, args=(work, contender, data, sender, dict(os.environ)))
    process.start()
    sender.close()
    try:
        if receiver.poll(TIMEOUT_SECONDS):
            outcome: dict[str, Any] = receiver.recv()
        else:
            process.kill()
            outcome = {"fault": f"not done after {TIMEOUT_SECONDS} s"}
    except EOFError:
        process.join()
        outcome = {"fault": f"ended with exit code {process.exitcode}"}
    process.join()
    return outcome


def compare(results: Results, work: Work) -> None:
    """Contenders that give another answer than the first of them are at fault."""
    answers = {contender: summary.runs[0].answer for contender, summary in results.of(work).items()}
    for contender, answer in answers.items():
        for other, wanted in answers.items():
            for key in answer.keys() & wanted.keys():
                if not math.isclose(answer[key], wanted[key], rel_tol=1e-3):
                    text = f"{key} is {answer[key]:g} where {other} has {wanted[key]:g}"
                    results.faults[work.name, contender] = text


def progress(text: str) -> None:
    """Say on stderr what is being done, on one line where that is a terminal."""
    begin, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n" if text else "")
    print(f"{begin}{text}", end=end, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """Facts without which the figures mean nothing."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_nbytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that is measured, marked when the work tree differs."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip() or None
