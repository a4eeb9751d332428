"""What the README and the site show: ``python -m tests.benchmarks.publish RESULTS.json ...``, the last one counts most.

Writes ``notebooks/bench.json``, of which the site makes its charts, and ``notebooks/bench.png``, the picture of the
README: few bars, which can be read on a phone. What these results lack stays as it was published, and is told.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from .chart import Json, draw_panel
from .floors import OURS

FOLDER = Path(__file__).parents[2] / "notebooks"
PUBLISHED = FOLDER / "bench.json"
SHOWN = ("npy-f32-100000", "parquet-default-whole", "iter-part-1000", "remote-s3")
"""Of the picture; the first page of the site shows the same as charts."""


def collect(documents: list[Json]) -> Json:
    """Return the works of some results, each as it was measured last, and when, without its single runs."""
    found: dict[str, Json] = {}
    for document in documents:
        for work in document["works"]:
            if OURS in work["contenders"]:
                contenders = {
                    name: {key: value for key, value in contender.items() if key != "runs"}
                    for name, contender in work["contenders"].items()
                }
                found[work["name"]] = {"date": document["machine"]["date"], **work, "contenders": contenders}
    return {"machine": documents[-1]["machine"], "shown": SHOWN, "works": list(found.values())}


def draw_few(works: dict[str, Json], path: Path) -> None:
    """Draw the works that are shown first, below each other: as wide as a phone, each letter can be read there."""
    shown = [{**works[name], "floors": []} for name in SHOWN if name in works]
    bars = [max(3, len(work["contenders"])) for work in shown]
    figure = Figure(figsize=(5.2, 0.24 * sum(bars) + 0.42 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=bars).flatten().tolist()
    for panel, work in zip(panels, shown, strict=True):
        draw_panel(panel, work)
    figure.savefig(path, dpi=200, facecolor="white", bbox_inches="tight", pad_inches=0.1)


def main() -> None:
    """Collect, save and draw."""
    documents = [json.loads(path.read_text()) for path in (PUBLISHED, *map(Path, sys.argv[1:]))]
    document = collect(documents)
    for work in document["works"]:
        if work["date"] != document["machine"]["date"]:
            print(f"{work['name']} is that of {work['date']}: the last results lack it")
    PUBLISHED.write_text(json.dumps(document, indent=1) + "\n")
    draw_few({work["name"]: work for work in document["works"]}, FOLDER / "bench.png")


if __name__ == "__main__":
    main()
