"""The table and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .floors import OURS, Summary, Verdict
from .run import Results
from .works import Work

HEADINGS = ("", "best", "worst/best", "CPU", "peak RSS", "growth", "ours is", "floor")
WIDTHS = (-26, 10, 10, 10, 9, 9, 8, -36)


def table(results: Results) -> str:
    """Everything for a human to read."""
    lines = [*facts(results.machine), "", line(HEADINGS)]
    for work in results.works:
        lines += ["", work.title, *rows(results, work)]
    lines += ["", *(f"{name} is left out: {why}" for name, why in results.missing.items()), *totals(results)]
    return "\n".join(lines)


def facts(machine: dict[str, Any]) -> Iterator[str]:
    """The machine and the versions."""
    gigabytes = machine["memory_nbytes"] / 1e9
    load = f"load {machine['load_before'][0]:.1f} before, {machine['load_after'][0]:.1f} after"
    yield f"{machine['cpu']}, {machine['cores']} cores, {gigabytes:.0f} GB, Linux {machine['kernel']}, {load}"
    yield ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    yield f"{machine['date']}, commit {machine['commit']}, {machine['rounds']} rounds in {machine['seconds']:.0f} s"


def rows(results: Results, work: Work) -> Iterator[str]:
    """One line for each contender, one more for each further floor that it sets."""
    summaries, verdicts = results.of(work), results.verdicts(work)
    for contender, summary in summaries.items():
        ratio = f"{summary.best / summaries[OURS].best:.2f}x" if OURS in summaries and contender != OURS else ""
        marks = [mark(verdict) for verdict in verdicts if verdict.against == contender] or [""]
        yield line((f"  {contender}", *cells(summary), ratio, marks[0]))
        yield from (line(("", *[""] * 6, text)) for text in marks[1:])
    for (name, contender), fault in results.faults.items():
        if name == work.name:
            yield f"  {contender} FAILED: {fault}"


def cells(summary: Summary) -> tuple[str, str, str, str, str]:
    """The figures of one contender."""
    spread = f"{summary.worst / summary.best:.2f}" if len(summary.runs) > 1 else ""
    return duration(summary.best), spread, duration(summary.cpu), size(summary.peak), size(summary.growth)


def mark(verdict: Verdict) -> str:
    """Pass or miss, and what was asked."""
    return f"{'pass' if verdict.passed else 'MISS'}  {verdict.text}"


def totals(results: Results) -> Iterator[str]:
    """How many floors hold, and the ones that do not."""
    verdicts = [(work, verdict) for work in results.works for verdict in results.verdicts(work)]
    missed = [f"{work.name}: {verdict.text}, {verdict.against}" for work, verdict in verdicts if not verdict.passed]
    yield f"{len(verdicts) - len(missed)} of {len(verdicts)} floors hold" + (", missed:" if missed else "")
    yield from (f"  {text}" for text in missed)


def line(texts: tuple[str, ...]) -> str:
    """One line of the table."""
    pairs = zip(texts, WIDTHS, strict=True)
    return "  ".join(text.ljust(-width) if width < 0 else text.rjust(width) for text, width in pairs).rstrip()


def duration(seconds: float) -> str:
    """Seconds with a fitting unit."""
    if seconds >= 0.1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} us"


def size(nbytes: float) -> str:
    """Megabytes."""
    return f"{nbytes / 1e6:,.0f} MB"


def save(results: Results, path: Path) -> None:
    """Write everything down for later comparison."""
    document = {
        "machine": results.machine,
        "missing": results.missing,
        "works": [entry(results, work) for work in results.works],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def entry(results: Results, work: Work) -> dict[str, Any]:
    """One work as JSON."""
    return {
        "name": work.name,
        "title": work.title,
        "limit_nbytes": work.limit,
        "contenders": {
            contender: {"best_seconds": summary.best, "worst_seconds": summary.worst, "peak_nbytes": summary.peak}
            | {"growth_nbytes": summary.growth, "runs": [run._asdict() for run in summary.runs]}
            for contender, summary in results.of(work).items()
        },
        "floors": [verdict._asdict() for verdict in results.verdicts(work)],
        "faults": {contender: fault for (name, contender), fault in results.faults.items() if name == work.name},
    }
