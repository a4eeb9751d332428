"""The command: so many inputs, and what came of them."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.run import coverage_guided, fuzz, load_corpus, save_fault


def main() -> int:
    """Feed inputs; the exit code says whether a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="one target alone")
    parser.add_argument("--save", action="store_true", help="add what finds a fault to the corpus")
    parser.add_argument("--coverage", action="store_true", help="let atheris choose inputs by the code that they reach")
    given = parser.parse_args()
    if given.coverage:
        coverage_guided(given.target or "parquet footer", given.inputs, given.seed)
        return 0
    faults = 0
    for fault in fuzz(given.inputs, given.seed, given.target, report=sys.stdout):
        faults += 1
        sys.stdout.write(f"FAULT {fault.target} {fault.what}\n")
        if given.save and not any(known["what"] == fault.what for known in load_corpus()):
            save_fault(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
