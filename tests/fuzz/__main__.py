"""The command: so many inputs, and what came of them."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    """Feed inputs; the exit code says whether a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="one target alone")
    parser.add_argument("--save", action="store_true", help="add what finds a fault to the corpus")
    parser.add_argument("--coverage", action="store_true", help="let atheris (pip install atheris) choose inputs")
    given = parser.parse_args()
    if given.coverage:
        import atheris  # type: ignore[import-untyped]

        # What is imported here, and not before, tells which of its code is reached.
        with atheris.instrument_imports(include=["dask_embedding_reader"]):
            from tests.fuzz.run import coverage_guided

        coverage_guided(given.target or "parquet footer", given.inputs, given.seed)
    from tests.fuzz.run import fuzz, load_corpus, save_fault

    faults = 0
    for fault in fuzz(given.inputs, given.seed, given.target, report=sys.stdout):
        faults += 1
        sys.stdout.write(f"FAULT {fault.target} {fault.what}\n")
        if given.save and not any(known["what"] == fault.what for known in load_corpus()):
            save_fault(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
