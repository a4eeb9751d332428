"""A tour of the library on real embeddings; `make demo` runs it.

The sample beside this file holds 8,000 definitions from WordNet, embedded with a sentence model (sample/README.md).
Each step is a function: the demo runs it, then prints its code and what came out of it.
"""

# ruff: noqa: RET504 (a step names what it returns, since its code is printed)

import inspect
import io
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import distributed  # noqa: F401 (dask would import it at the first compute, which would look slow)
import matplotlib as mpl
import numpy as np
import pandas as pd

from dask_embedding_reader import EmbeddingReader, __version__, nearest

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke

SAMPLE = Path(__file__).resolve().parent / "sample"
PICTURE = Path("demo.png")

# The categories in the picture, clockwise from the top: a readable name, a colour, and some words to label.
SHOWN = {
    "noun.animal": ("animals", "#c8553d", ["elephant", "lion", "horse", "dog", "cat", "bee", "owl", "snake"]),
    "noun.food": ("food", "#d9941a", ["coffee", "honey", "chocolate", "lemon", "cheese", "apple", "bread", "milk"]),
    "noun.time": ("time", "#3a6ea5", ["yesterday", "century", "Sunday", "midnight", "March", "decade"]),
    "noun.feeling": (
        "feelings",
        "#c2478f",
        ["joy", "fear", "love", "nostalgia", "envy", "guilt", "sympathy"],
    ),
    "verb.motion": ("motion", "#5f8a2f", ["walk", "climb", "run", "swim", "fly", "crawl", "stumble"]),
    "noun.location": ("places", "#239488", ["Texas", "city", "village", "Paris", "China", "suburb"]),
    "noun.body": ("the body", "#7d5ba6", ["heart", "finger", "brain", "eye", "knee", "blood", "thumb", "lung"]),
}

WIDTH = 104
COLOURED = sys.stdout.isatty() and "NO_COLOR" not in os.environ
BOLD, BLUE, PLAIN = ("\033[1m", "\033[34m", "\033[0m") if COLOURED else ("", "", "")


def main() -> None:
    """Run the steps and print them."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the terminal has no "█", show "?" instead of failing
    began = perf_counter()
    print(f"\n{BOLD}dask-embedding-reader {__version__}{PLAIN}")
    print("a folder of embeddings as one lazy array, with its metadata beside it")

    reader = show("Open a folder of embeddings", open_folder)
    size = f"{reader.total_size / 1e6:.1f} MB in {reader.nb_files} files"
    result(f"{reader.count:,} vectors of {reader.dimension} numbers, stored as {reader.dtype}: {size}")

    x, meta = show("Get an array and a frame, both lazy, cut at the same rows", make_lazy, reader)
    result(f"x     {x.shape[0]} x {x.shape[1]} {x.dtype}, chunks of {', '.join(map(str, x.chunks[0]))} rows")
    result(f"meta  columns {', '.join(meta.columns)}; {meta.npartitions} partitions of the same rows")

    vectors, rows = show("Take any rows; only these are read", look, reader)
    for (i, row), vector in zip(rows.iterrows(), vectors, strict=True):
        gloss = textwrap.shorten(row["gloss"], 40, placeholder=" ...")
        numbers = " ".join(f"{number:+.3f}" for number in vector[:3])
        result(f"{i:4}  {row['word']:9} {row['category']:19} {gloss:41} {numbers} ...")

    norms, mean, covariance = show("Do maths on all of them", do_maths, x)
    variance = np.cumsum(np.linalg.eigvalsh(covariance)[::-1]) / np.trace(covariance)
    half, most = np.searchsorted(variance, [0.5, 0.9]) + 1
    result(f"norms       from {norms.min():.4f} to {norms.max():.4f}: unit vectors")
    result(f"mean        {np.linalg.norm(mean):.2f} long: they share a direction")
    result(f"covariance  half of the variance lies in {half} directions, 90 % in {most} of {len(mean)}")

    texts, scores, found = show("Search: describe a thing, find the word", search, reader)
    words = meta["word"].compute().to_numpy(dtype=object)
    for text, similarities, rows in zip(texts, scores, words[found], strict=True):
        # Several meanings of a word may be found: its best counts.
        first = [k for k, word in enumerate(rows) if word not in rows[:k]][:4]
        result(f"{text:32}  " + "  ".join(f"{similarities[k]:.2f} {rows[k]:10}" for k in first).rstrip())

    names, accuracy = show("Classify without training: which of 41 descriptions is nearest?", classify, x, meta)
    result(f"{accuracy:.0%} are right, where guessing gives {1 / len(names):.0%}")

    train, test = show("Split the rows at random: to learn from, and to test on", split, reader)
    result(f"{train}")
    result(f"{test}")

    centroids = show("Stream batches in bounded memory: learn from the one part ...", learn, train, names)
    result(f"the mean vectors of {len(centroids)} categories")

    score = show("... and test on the other", evaluate, test, names, centroids)
    result(f"{score['right'].sum() / score['of'].sum():.0%} are right now; of the categories in the picture below:")
    for category, (name, _, _) in SHOWN.items():
        share = score.loc[category, "right"] / score.loc[category, "of"]
        result(f"{name:9} {'█' * round(40 * share):40} {share:4.0%}")

    shown = centroids[[list(names).index(category) for category in SHOWN]]
    axes, corners = find_axes(mean, covariance, shown)
    points = show("Draw them: a projection to the plane is one more product", project, x, mean, axes)
    draw(points, corners, words, meta["category"].compute().to_numpy(dtype=object))
    result(f"{PICTURE.resolve()}")
    print(f"\n\nAll of it took {perf_counter() - began:.1f} s. The same lines read a billion vectors from S3.\n")


# The steps: what they say is what is printed


def open_folder() -> EmbeddingReader:
    reader = EmbeddingReader(
        SAMPLE / "embeddings",
        file_format="parquet_npy",
        metadata_folder=SAMPLE / "metadata",
        meta_columns=["word", "category", "gloss"],
    )
    return reader


def make_lazy(reader: EmbeddingReader) -> tuple[da.Array, dd.DataFrame]:
    x = reader.to_dask_array(dtype=np.float32)
    meta = reader.to_dask_dataframe()
    return x, meta


def look(reader: EmbeddingReader) -> tuple[np.ndarray, pd.DataFrame]:
    chosen = reader.take([7913, 4013, 4014, 22])
    vectors = chosen.to_dask_array(dtype=np.float32).compute()
    rows = chosen.to_dask_dataframe().compute()
    return vectors, rows


def do_maths(x: da.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    norms, mean = dask.compute(da.linalg.norm(x, axis=1), x.mean(axis=0))
    covariance = ((x - mean).T @ (x - mean) / len(x)).compute()
    return norms, mean, covariance


def search(reader: EmbeddingReader) -> tuple[pd.Series, np.ndarray, np.ndarray]:
    queries = EmbeddingReader(SAMPLE / "queries", file_format="parquet_npy", meta_columns="text")
    texts = queries.to_dask_dataframe()["text"].compute()
    scores, rows = nearest(reader, queries.to_dask_array().compute(), k=10)
    return texts, scores, rows


def classify(x: da.Array, meta: dd.DataFrame) -> tuple[np.ndarray, float]:
    prompts = EmbeddingReader(SAMPLE / "categories", file_format="parquet_npy", meta_columns="category")
    names = prompts.to_dask_dataframe()["category"].compute().to_numpy(dtype=object)
    best = (x @ prompts.to_dask_array(dtype=np.float32).T).argmax(axis=1).compute()
    accuracy = np.mean(meta["category"].compute() == names[best])
    return names, accuracy


def split(reader: EmbeddingReader) -> tuple[EmbeddingReader, EmbeddingReader]:
    train = reader.sample(6_000, seed=0)
    test = reader.take(~np.isin(reader.rows, train.rows))
    return train, test


def learn(train: EmbeddingReader, names: np.ndarray) -> np.ndarray:
    sums, counts = np.zeros((len(names), train.dimension)), np.zeros((len(names), 1))
    for vectors, rows in train(batch_size=500, show_progress=False):
        members = rows["category"].to_numpy()[:, None] == names  # 500 rows, 41 categories
        sums += members.T @ vectors
        counts += members.sum(axis=0)[:, None]
    centroids = sums / counts
    return centroids


def evaluate(test: EmbeddingReader, names: np.ndarray, centroids: np.ndarray) -> pd.DataFrame:
    directions = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    parts = []
    for vectors, rows in test(batch_size=500, show_progress=False):
        right = rows["category"] == names[np.argmax(vectors @ directions.T, axis=1)]
        parts.append(right.groupby(rows["category"]).agg(right="sum", of="size"))
    score = pd.concat(parts).groupby(level=0).sum()
    return score


def project(x: da.Array, mean: np.ndarray, axes: np.ndarray) -> np.ndarray:
    points = ((x - mean) @ axes).compute()
    return points


# Printing and drawing


def show(title: str, step: Callable[..., Any], *args: Any) -> Any:
    """Run a step; print its title, its time and its code, without the lines of `def` and `return`."""
    start = perf_counter()
    output = step(*args)
    seconds = f"{perf_counter() - start:.2f} s"
    code = textwrap.dedent("\n".join(inspect.getsource(step).splitlines()[1:-1]))
    print(f"\n\n{BOLD}{title}{PLAIN} {'─' * (WIDTH - len(title) - len(seconds) - 2)} {seconds}\n")
    print(textwrap.indent(code, f"    {BLUE}"), end=f"{PLAIN}\n\n")
    return output


def result(text: str) -> None:
    """Print a line of what a step gave."""
    print(f"  → {text}")


def find_axes(mean: np.ndarray, covariance: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The linear map that sends the centroids to the corners of a polygon and spreads all vectors the least."""
    angles = np.pi / 2 - np.linspace(0, 2 * np.pi, len(centroids), endpoint=False)
    corners = np.column_stack([np.cos(angles), np.sin(angles)])
    shrunk = covariance + np.trace(covariance) / len(mean) * np.eye(len(mean))
    directions = np.linalg.solve(shrunk, (centroids - mean).T)
    return directions @ np.linalg.solve((centroids - mean) @ directions, corners), corners


def draw(points: np.ndarray, corners: np.ndarray, words: np.ndarray, categories: np.ndarray) -> None:
    """Save the picture: every vector a dot, the categories of `SHOWN` in colour, some words beside their dots."""
    figure, axes = plt.subplots(figsize=(10, 11), dpi=150)
    axes.scatter(*points[~np.isin(categories, list(SHOWN))].T, s=5, color="#dcdcdc", linewidth=0)
    outline = [withStroke(linewidth=2.5, foreground="white")]
    for (category, (name, colour, labelled)), corner in zip(SHOWN.items(), corners, strict=True):
        members = np.flatnonzero(categories == category)
        axes.scatter(*points[members].T, s=20, color=colour, alpha=0.6, linewidth=0)
        axes.text(*1.95 * corner, name, color=colour, size=20, weight="bold", ha="center", va="center")
        for word in labelled:
            point = points[members[words[members] == word][0]]
            axes.scatter(*point, s=32, color=colour, edgecolor="#222222", zorder=3)
            text = axes.annotate(word, point, (4, 4), textcoords="offset points", color="#222222", size=10.5, zorder=4)
            text.set_path_effects(outline)
    axes.set(xlim=(-2.25, 2.25), ylim=(-2.1, 2.1), aspect="equal")
    axes.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 0.94)
    figure.text(0.05, 0.955, f"{len(points):,} definitions on a plane", size=20, weight="bold")
    about = (
        "Each dot is a definition from WordNet, embedded in 384 dimensions. A linear map sends the means of seven\n"
        "categories to the corners of a heptagon; the other 34 categories are grey."
    )
    figure.text(0.05, 0.945, about, size=11.5, color="#555555", va="top", linespacing=1.4)
    figure.savefig(PICTURE)
    plt.close(figure)


if __name__ == "__main__":
    main()
