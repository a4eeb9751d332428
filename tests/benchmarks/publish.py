"""What the README and the site show: ``python -m tests.benchmarks.publish RESULTS.json ...``, later ones first of all.

Writes ``notebooks/bench.json``, of which the site makes its charts, and ``notebooks/bench.png``, the picture of the
README: few bars, which can be read at half of its size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from .chart import COLUMNS, Json, draw_panel
from .floors import OURS

FOLDER = Path(__file__).parents[2] / "notebooks"
SHOWN = ("npy-f32-100000", "npy-f32-256", "parquet-default-whole", "open-10000", "iter-part-1000", "remote-s3")


def collect(paths: list[Path]) -> Json:
    """Return the works of some results, each as it was measured last, without its single runs."""
    found: dict[str, Json] = {}
    documents = [json.loads(path.read_text()) for path in paths]
    for work in (work for document in documents for work in document["works"] if OURS in work["contenders"]):
        contenders = {
            name: {key: value for key, value in contender.items() if key != "runs"}
            for name, contender in work["contenders"].items()
        }
        found[work["name"]] = {**work, "contenders": contenders}
    return {"machine": documents[-1]["machine"], "works": list(found.values())}


def draw_few(works: dict[str, Json], path: Path) -> None:
    """Draw the works that are shown first."""
    shown = [works[name] for name in SHOWN if name in works]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(-(-len(shown) // COLUMNS), COLUMNS, squeeze=False).flatten().tolist()
    for panel, work in zip(panels, shown, strict=False):
        draw_panel(panel, work)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=130, facecolor="white", bbox_inches="tight", pad_inches=0.15)


def main() -> None:
    """Collect, save and draw."""
    document = collect([Path(argument) for argument in sys.argv[1:]])
    (FOLDER / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
    draw_few({work["name"]: work for work in document["works"]}, FOLDER / "bench.png")


if __name__ == "__main__":
    main()
