"""Draw the picture of the README, from the sample and to scale: files, the array and frame made of them, their uses."""

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from dask_embedding_reader import EmbeddingReader

HERE = Path(__file__).resolve().parent
PICTURE = HERE / "overview.png"
INK, FAINT = "#2b3240", "#7d8490"
BLUES, AMBERS = ("#4a7fb5", "#86aed3"), ("#d08a2e", "#e9bd82")
USES = [
    ("lazy array maths", "x.mean(axis=0)   x[4000:4010]   x @ w", "reads what a result needs, piece by piece"),
    ("on a cluster", 'Client("tcp://scheduler:8786")', "workers read their own pieces"),
    ("in batches", "for vectors, frame in reader(100_000):", "in order, read ahead, memory stays flat"),
]


def main() -> None:
    reader = EmbeddingReader(
        HERE / "sample/embeddings",
        file_format="parquet_npy",
        metadata_folder=HERE / "sample/metadata",
        meta_columns=["word", "category"],
    )
    rows = np.array(reader.to_dask_array().chunks[0]) / reader.count
    figure, axes = plt.subplots(figsize=(8.6, 4.1))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 86), ylim=(1.5, 42.5))
    axes.set_axis_off()

    top, height, gap = 36.0, 33.0, 0.9
    for number, share in enumerate(rows):  # the files, apart
        low = top - height * rows[: number + 1].sum() + gap / 2
        axes.add_patch(Rectangle((1, low), 9, height * share - gap, color=BLUES[number % 2], linewidth=0))
        axes.add_patch(Rectangle((11, low), 3, height * share - gap, color=AMBERS[number % 2], linewidth=0))
        axes.text(
            5.5, low + height * share / 2 - gap / 2, f"{number:04}.npy", color="white", size=9, ha="center", va="center"
        )
    label(axes, 7.5, "files", f"{reader.nb_files} or thousands")

    arrow(axes, (15, 19.5), (24.5, 19.5), "open:\nheaders\nonly")

    for number, share in enumerate(rows):  # the array and the frame, in one
        low = top - height * rows[: number + 1].sum()
        axes.add_patch(Rectangle((25.5, low), 11, height * share, facecolor=BLUES[1], edgecolor="white", linewidth=0.8))
        axes.add_patch(
            Rectangle((37.5, low), 7.5, height * share, facecolor=AMBERS[1], edgecolor="white", linewidth=0.8)
        )
    middle = top - height * (rows[:3].sum() + rows[3] / 2)
    axes.text(31, middle, f"{reader.count:,} x {reader.dimension}", color=INK, size=12, ha="center", va="center")
    axes.text(41.2, middle, "word\ncategory", color=INK, size=9.5, ha="center", va="center")
    label(axes, 35, "one lazy array and its frame", "chunk for partition, row for row")

    for number, (title, code, why) in enumerate(USES):
        middle = 31 - 11.6 * number
        arrow(axes, (46, 19.5), (51, middle), "")
        axes.add_patch(FancyBboxPatch((52, middle - 4), 33, 8, boxstyle="round,pad=0.6", color="#eef2f7", linewidth=0))
        axes.text(53, middle + 2.6, title, color=INK, size=12, weight="bold", va="center")
        axes.text(53, middle - 0.3, code, color="#2f6fb0", size=10, family="monospace", va="center")
        axes.text(53, middle - 3, why, color=FAINT, size=10, va="center")
    figure.savefig(PICTURE, dpi=160, facecolor="white")


def label(axes: plt.Axes, x: float, title: str, text: str) -> None:
    axes.text(x, 40.6, title, color=INK, size=12, weight="bold", ha="center", va="center")
    axes.text(x, 38.1, text, color=FAINT, size=10, ha="center", va="center")


def arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=FAINT, linewidth=1.4))
    axes.text((start[0] + end[0]) / 2, start[1] + 3, text, color=FAINT, size=10, ha="center", va="center")


if __name__ == "__main__":
    main()
