"""Command line of the benchmark suite."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import chart, report
from .data import Data
from .run import run
from .works import select


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure against others.")
    parser.add_argument("--only", metavar="PATTERN", action="append", help="works whose name matches, e.g. 'npy-*'")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds of every timed work (default: 5)")
    parser.add_argument("--dir", type=Path, default=Path(".bench"), help="where the data is kept (default: .bench)")
    parser.add_argument("--output", type=Path, help="JSON to write, charts beside it (default: DIR/results.json)")
    parser.add_argument("--rows", type=positive, default=100_000, help="rows a file; fewer is for trying the suite out")
    parser.add_argument(
        "--all",
        action="store_true",
        help="optional works too: conversion, rarer kinds of parquet, 200 GB of sparse files",
    )
    parser.add_argument("--list", action="store_true", help="list the works and stop")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A count of at least one."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; the exit code is 1 when a contender failed or two of them disagree."""
    options = parse(arguments)
    works = select(options.only, optional=options.all)
    if options.list:
        print("\n".join(f"{work.name:28} {work.title}" for work in works))
        return 0
    if not works:
        print(f"no work matches {options.only}; --list shows them", file=sys.stderr)
        return 2
    data = Data(options.dir.resolve(), options.rows)
    data.make({work.data for work in works})
    output = (options.output or options.dir / "results.json").resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    for results in run(works, options.rounds, data):
        report.save(results, output)
    print(report.table(results))
    print(f"\nsaved {output}, {chart.draw(output) or 'no chart'}")
    return 1 if results.faults else 0


if __name__ == "__main__":
    sys.exit(main())
