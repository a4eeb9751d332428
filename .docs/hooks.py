"""Hooks of mkdocs: pages that are made from what there is, so that nothing is written twice.

The README is the first page; others are the notebooks, the help of the commands, and the figures of the benchmarks.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from dask_embedding_reader.cli.commands import command_line

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from something else, and the pictures of the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.png")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "reference/command_line.md", content="\n".join(command_help())))
    pictures = []
    for path in NOTEBOOKS:
        text, resources = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor]).from_filename(str(path))
        for name, content in resources["outputs"].items():
            picture = f"{path.stem}_{name}"
            text = text.replace(f"]({name})", f"]({picture})")
            files.append(File.generated(config, f"notebooks/{picture}", content=content))
            pictures.append((path.stem, picture))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=without_styles(text)))
    files.append(File.generated(config, "gallery.md", content="\n".join(gallery(pictures))))
    return files


def without_styles(markdown: str) -> str:
    """Leave out what notebooks bring to look as in Jupyter: the site has a look of its own."""
    markdown = markdown.replace(' border="1" class="dataframe"', ' class="dataframe"').replace("text-align: right;", "")
    return re.sub(r"<style scoped>.*?</style>\n?", "", markdown, flags=re.DOTALL)


def gallery(pictures: list[tuple[str, str]]) -> list[str]:
    """Return the page of all pictures, each of which leads to its notebook."""
    lines = ["# Gallery", "", "Each picture leads to the notebook that draws it.", ""]
    return lines + [
        f'<a class="thumbnail" href="notebooks/{stem}.html"><img src="notebooks/{picture}" alt="{title(stem)}"></a>'
        for stem, picture in pictures
        if picture.endswith((".png", ".svg"))
    ]


def title(stem: str) -> str:
    """Return the name of a notebook for people."""
    return stem.partition("_")[2].replace("_", " ")


def command_help() -> list[str]:
    """Return the help of all commands as Markdown."""
    context = click.Context(command_line, info_name="dask-embedding-reader", max_content_width=100)
    parts = ["# Command line", "", "```text", command_line.get_help(context), "```", ""]
    for name, command in sorted(command_line.commands.items()):
        inner = click.Context(command, parent=context, info_name=name, max_content_width=100)
        parts += [f"## {name}", "", "```text", command.get_help(inner), "```", ""]
    return parts


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links into the repository into links within the site, and figures into charts."""
    published = json.loads((ROOT / "notebooks" / "bench.json").read_text(encoding="utf-8"))
    works = {work["name"]: work for work in published["works"]}
    markdown = markdown.replace("<!-- charts -->", charts(works))
    markdown = re.sub(
        r"!\[.*?\]\(notebooks/bench\.png\)", "\n".join(chart(works[name]) for name in published["shown"]), markdown
    )
    depth = "../" * page.file.src_path.count("/")
    markdown = re.sub(r"\]\((?:\.\./)*\.docs/pages/", f"]({depth}", markdown)
    markdown = re.sub(r"\]\((?:\.\./)*notebooks/", f"]({depth}notebooks/", markdown)
    return re.sub(r"\]\(([\w./]+)\.ipynb\)", r"](\1.md)", markdown)


GROUPS = {
    "Batches": ("npy-", "parquet-npy"),
    "Parquet": ("parquet",),
    "Other formats": ("format-",),
    "Chosen rows": ("rows-",),
    "Opening, first batches, single rows": ("first-", "open-", "row"),
    "Small files": ("small-",),
    "Lazy arrays": ("sum", "mean", "iter-"),
    "Neighbours": ("nearest-",),
    "Remote storages": ("remote-",),
    "Memory": ("memory-", "sparse-"),
}
"""Headings of the charts, and how the names of the works begin; the first that fits counts."""


def charts(works: dict[str, dict[str, Any]]) -> str:
    """Return the figures of the benchmarks as bars, as wide as the screen allows, in the colours of the page."""
    found: dict[str, list[str]] = {heading: [] for heading in GROUPS}
    for name, work in works.items():
        heading = next(heading for heading, begins in GROUPS.items() if name.startswith(begins))
        found[heading].append(memory_chart(work) if work["limit_nbytes"] else chart(work))
    return "\n\n".join("\n".join([f"## {heading}", "", *lines]) for heading, lines in found.items() if lines)


def chart(work: dict[str, Any]) -> str:
    """Return the bars of one piece of work: ours first, the limit of the machine last."""
    ours = work["contenders"]["dask_embedding_reader"]["best_seconds"]
    seconds = {name: contender["best_seconds"] for name, contender in work["contenders"].items()}
    ranked = sorted(seconds, key=lambda name: (seconds[name] != ours, name == "raw limit", seconds[name]))
    labels = {name: shown(each) + ("" if each == ours else f" ({each / ours:.2g}x)") for name, each in seconds.items()}
    return bars(work["title"], {name: (seconds[name], labels[name]) for name in ranked})


def memory_chart(work: dict[str, Any]) -> str:
    """Return how much memory grew by, and how much it may grow by."""
    [growth] = [contender["growth_nbytes"] for contender in work["contenders"].values()]
    most = 1.1 * work["limit_nbytes"] + 64e6
    found = {"dask_embedding_reader": (growth, f"{growth / 1e6:,.0f} MB"), "at most": (most, f"{most / 1e6:,.0f} MB")}
    return bars(work["title"], found)


def bars(title: str, found: dict[str, tuple[float, str]]) -> str:
    """Return bars under a title, and what is written at their ends."""
    longest = max(length for length, _ in found.values())
    lines = [f'<div class="chart"><strong>{html.escape(title)}</strong>']
    for name, (length, label) in found.items():
        kind = {"dask_embedding_reader": "ours", "raw limit": "limit", "at most": "limit"}.get(name, "other")
        lines.append(
            f'<div><span>{html.escape(name)}</span><span><i class="{kind}" '
            f'style="width:{70 * length / longest:.1f}%"></i>{label}</span></div>'
        )
    return "\n".join([*lines, "</div>"])


def shown(seconds: float) -> str:
    """Return a time for people."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2g} ms"


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of reST in docstrings, such as ``:meth:``, which Markdown does not know."""
    return re.sub(r":(?:class|func|meth|mod):(?=<code>)", "", html)
