"""Plant faults in a room, each one alone, and tell which no test notices; or which tests notice none."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.plant import Fault, faults
from tests.mutants.reach import ROOMS, Reach, files_of, find_reach
from tests.mutants.seat import Seat, take_seats

_MOST_FAULTS = 20
"""A test that notices none of so many faults in what it reaches is told."""


def main() -> int:
    """Plant faults, and list those that no test notices; or the tests that notice none."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--sample", type=int, default=100, help="so many faults, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="places (path:line), or tests, that hold this alone")
    parser.add_argument("--also", action="append", default=[], metavar="TEST", help="run this too, before others")
    parser.add_argument("--teeth", action="store_true", help="list the tests that notice nothing")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    reach = find_reach(given.room)
    every = [fault for path in files_of(given.room) for fault in faults(str(path), path.read_text())]
    shuffled = random.Random(given.seed).sample(every, len(every))
    seats = take_seats(given.processes, sorted({test.partition("::")[0] for test in [*given.also, *reach.seconds]}))
    with ThreadPoolExecutor(given.processes) as pool:
        if given.teeth:
            _tell_toothless(pool, seats, reach, shuffled, given.only)
        else:
            wanted = (fault for fault in shuffled if given.only in f"{fault.path}:{fault.line}" and _is_python(fault))
            _tell_unseen(pool, seats, reach, list(islice(wanted, given.sample)), given.also)
    return 0


def _is_python(fault: Fault) -> bool:
    return fault.is_python(Path(fault.path).read_text())


def _tell_unseen(
    pool: ThreadPoolExecutor, seats: SimpleQueue[Seat], reach: Reach, drawn: Sequence[Fault], also: Sequence[str]
) -> None:
    """Tell which faults are not noticed, and how many are."""

    def plant(fault: Fault) -> str:
        tests = [*also, *reach.of(fault)]
        return _plant(seats, reach, fault, tests) if tests else "unseen, as no test reaches it"

    begun, counts = time.monotonic(), Counter[str]()
    for fault, what in zip(drawn, pool.map(plant, drawn), strict=True):
        counts[what.partition(",")[0]] += 1
        if what != "noticed":
            now = fault.planted(Path(fault.path).read_text()).splitlines()[fault.line - 1].strip()
            _say(f"{fault.path}:{fault.line}: {what}: {fault.operator}: {now}")
    told = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    _say(f"of {len(drawn)} {told}; {time.monotonic() - begun:.0f} s")


def _tell_toothless(
    pool: ThreadPoolExecutor, seats: SimpleQueue[Seat], reach: Reach, every: Sequence[Fault], only: str
) -> None:
    """Tell which tests notice none of the faults in lines that they reach: those first that few others do.

    Of a test with parameters the quickest case is tried.
    """
    at = defaultdict(list)
    for fault in every:
        at[fault.path, reach.first_line(fault)].append(fault)
    lines = defaultdict(list)
    for path, tests_of in reach.tests.items():
        for line, tests in tests_of.items():
            for test in tests if (path, line) in at else ():
                lines[test].append((len(tests), path, line))
    cases: dict[str, str] = {}
    for test in sorted(lines.keys() & reach.seconds.keys(), key=lambda test: (reach.seconds[test], test)):
        cases.setdefault(test.partition("[")[0], test)

    def notices(test: str) -> bool:
        places = sorted(lines[test])
        # One in each line, then another one in each.
        tried = (at[path, line][turn] for turn in range(3) for _, path, line in places if turn < len(at[path, line]))
        drawn = islice(filter(_is_python, tried), _MOST_FAULTS)
        return any(_plant(seats, reach, fault, [test]) in ("noticed", "hangs") for fault in drawn)

    wanted = [test for test in cases.values() if only in test]
    for test, found in zip(wanted, pool.map(notices, wanted), strict=True):
        if not found:
            _say(f"{test} notices nothing")
    _say(f"of {len(wanted)} tests")


def _plant(seats: SimpleQueue[Seat], reach: Reach, fault: Fault, tests: Sequence[str]) -> str:
    """Plant a fault at the next seat that is free, and tell what tests make of it."""
    seat = seats.get()
    try:
        return seat.plant(fault, tests, 60 + sum(reach.seconds.get(test, 60.0) for test in tests))
    finally:
        seats.put(seat)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
