"""One contender at one work, measured in this process, which does nothing else."""

from __future__ import annotations

import gc
import os
import time
from multiprocessing.connection import Connection

from . import cold, convert, formats, lazy, neighbours, pages, remote, rows  # noqa: F401 - they enter their contenders
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


def run(work: str, contender: str, data: Data, answers: Connection, environment: dict[str, str]) -> None:
    """Send the run, or why there is none; end the process."""
    gc.freeze()  # what was imported before the fork is shared with it: a collection would copy it page by page
    os.environ.update(environment)  # a fork has that of when the first was made
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    try:
        answers.send({"run": measure(work, contender, data)._asdict()})
    except ImportError as error:
        answers.send({"missing": str(error)})
    except Exception as error:
        answers.send({"fault": f"{type(error).__name__}: {error}"})
    os._exit(0)  # the reference leaves threads that never end when an iterator is left early
