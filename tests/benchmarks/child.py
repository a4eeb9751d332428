"""One contender at one work, measured in this process; the outcome goes to stdout as one line of JSON.

Used as `python -m tests.benchmarks.child WORK CONTENDER FOLDER ROWS`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from . import remote  # noqa: F401 - enters its contenders
from .contenders import REGISTRY
from .data import Data
from .floors import Run
from .memory import reset_peak, status
from .works import WORKS


def measure(work_name: str, contender: str, data: Data) -> Run:
    """Open, take stock, do the job, take stock."""
    work = WORKS[work_name]
    job = REGISTRY[work_name, contender](work, data)
    opening_peak = status("VmHWM")
    reset_peak()
    opened, cpu, clock = status("VmRSS"), time.process_time(), time.perf_counter()
    answer = job()
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    peak = status("VmHWM")
    return Run(
        seconds / work.repeats,
        cpu_seconds / work.repeats,
        max(opening_peak, peak),
        opened,
        max(0, peak - opened),
        answer,
    )


def main() -> None:
    """Print the run, or why there is none."""
    work, contender, folder, rows = sys.argv[1:]
    try:
        outcome = {"run": measure(work, contender, Data(Path(folder), int(rows)))._asdict()}
    except ImportError as error:
        outcome = {"missing": str(error)}  # type: ignore[dict-item]
    print(json.dumps(outcome), flush=True)
    os._exit(0)  # the reference leaves threads that never end when an iterator is left early


if __name__ == "__main__":
    main()
