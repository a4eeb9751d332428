"""Hooks of mkdocs: the README is the first page, the help of the commands another. Neither is written twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

from dask_embedding_reader.cli.commands import command_line

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from something else, and the pictures of the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in sorted(set(re.findall(r"\]\((notebooks/[^)]+)\)", readme))):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "index.md", content=readme.replace("](.docs/pages/", "](")))
    files.append(File.generated(config, "command_line.md", content="\n".join(command_help())))
    return files


def command_help() -> list[str]:
    """Return the help of all commands as Markdown."""
    context = click.Context(command_line, info_name="dask-embedding-reader", max_content_width=100)
    parts = ["# Command line", "", "```text", command_line.get_help(context), "```", ""]
    for name, command in sorted(command_line.commands.items()):
        inner = click.Context(command, parent=context, info_name=name, max_content_width=100)
        parts += [f"## {name}", "", "```text", command.get_help(inner), "```", ""]
    return parts


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of reST in docstrings, such as ``:meth:``, which Markdown does not know."""
    return re.sub(r":(?:class|func|meth|mod):(?=<code>)", "", html)
