"""Feeding targets with inputs, in order of a seed or guided by coverage, and keeping what finds a fault."""

from __future__ import annotations

import base64
import json
import logging
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, NoReturn, TextIO

from dask_embedding_reader.errors import EmbeddingReaderError
from dask_embedding_reader.storage import retries
from tests.fuzz.guard import Fault, guarded, most_reserved_nbytes
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus.json")
_TRACED_EVERY = 500


class Found(NamedTuple):
    """An input that did what no input may do."""

    target: str
    data: bytes
    what: str


def fuzz(inputs: int, seed: int, only: str | None = None, report: TextIO | None = None) -> Iterator[Found]:
    """Feed so many inputs, chosen by a seed; hand out what finds a fault, each kind of fault once."""
    names = [only] if only else list(TARGETS)
    weights = [TARGETS[name].weight for name in names]
    outcomes: Counter[str] = Counter()
    seen: set[str] = set()
    began = time.monotonic()
    # Nothing here passes by waiting.
    logger = logging.getLogger("dask_embedding_reader")
    level = logger.level
    logger.setLevel(logging.ERROR)
    pause, retries.FIRST_PAUSE_SECONDS = retries.FIRST_PAUSE_SECONDS, 0.0
    try:
        with guarded() as run:
            for number in range(inputs):
                rng = Random(seed * 2**40 + number)
                (name,) = rng.choices(names, weights)
                data = TARGETS[name].make(rng)
                outcome = feed(run, name, data, traced=number % _TRACED_EVERY == 0)
                outcomes[f"{name}: {outcome.split(':')[0]}"] += 1
                if outcome.startswith("fault") and (kind := f"{name} {outcome[:90]}") not in seen:
                    seen.add(kind)
                    yield Found(name, data, outcome)
                if report and number % 20_000 == 0:
                    report.write(f"{number:,} inputs in {time.monotonic() - began:.0f} s\n")
                    report.flush()
    finally:
        retries.FIRST_PAUSE_SECONDS = pause
        logger.setLevel(level)
    if report:
        lines = "".join(f"  {kind}: {count:,}\n" for kind, count in sorted(outcomes.items()))
        report.write(f"{inputs:,} inputs, seed {seed}, in {time.monotonic() - began:.0f} s\n{lines}")
        report.write(f"pyarrow reserved {most_reserved_nbytes():,} bytes at most\n")


def feed(run: Any, name: str, data: bytes, *, traced: bool = False) -> str:
    """Return ``read``, ``empty``, ``refused``, or what the fault is."""
    try:
        return "read" if run(lambda: TARGETS[name].read(data), len(data), traced) else "empty"
    except EmbeddingReaderError:
        return "refused"
    except Fault as fault:
        return f"fault: {fault}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.name}"
        return f"fault: {type(error).__name__} in {where}: {str(error)[:120]!r}"


def coverage_guided(name: str, inputs: int, seed: int) -> NoReturn:
    """Hand the loop to atheris: it keeps inputs that reach new code and changes them; ours are where it starts.

    It ends the process. The library must have been imported within ``atheris.instrument_imports``.
    """
    import atheris  # type: ignore[import-untyped]

    seeds = [TARGETS[name].make(Random(seed * 2**40 + number)) for number in range(2_000)]

    def mutated(data: bytes, most: int, number: int) -> bytes:
        rng = Random(number)
        return (atheris.Mutate(data, most) if rng.random() < 0.7 and data else rng.choice(seeds))[:most]

    seen: set[str] = set()
    logging.getLogger("dask_embedding_reader").setLevel(logging.ERROR)
    retries.FIRST_PAUSE_SECONDS = 0.0
    with guarded() as run:

        def one(data: bytes) -> None:
            outcome = feed(run, name, data)
            if outcome.startswith("fault") and (kind := outcome[:90]) not in seen:
                seen.add(kind)
                sys.stdout.write(f"FAULT {name} {outcome} {_packed(data)}\n")
                sys.stdout.flush()

        options = [f"-runs={inputs}", f"-seed={seed + 1}", "-max_len=20000", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutated)
        atheris.Fuzz()
    raise SystemExit


# ---------------------------------------------------------------------------------------------------------------------
# The corpus


def load_corpus() -> list[dict[str, str]]:
    """Every input that has found a fault, with what it was."""
    found: list[dict[str, str]] = json.loads(CORPUS.read_text()) if CORPUS.exists() else []
    return found


def save_fault(fault: Found) -> None:
    entries = [*load_corpus(), {"target": fault.target, "what": fault.what, "data": _packed(fault.data)}]
    CORPUS.write_text(json.dumps(entries, indent=1) + "\n")


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def unpack(entry: dict[str, str]) -> bytes:
    return zlib.decompress(base64.b64decode(entry["data"]))
