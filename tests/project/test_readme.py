"""The code in the README runs, and prints what the README says it prints; its commands, targets and links exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from dask_embedding_reader.cli.commands import command_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", README, re.DOTALL | re.MULTILINE)


def test_every_python_block_prints_the_text_block_after_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # for the folders that the blocks make
    blocks = [(code, expected) for language, code, expected in BLOCKS if language == "python"]
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)
        assert printed.getvalue().replace(f"{ROOT}/", "") == expected


def test_what_it_installs_and_makes_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for code in [code for language, code, _ in BLOCKS if language == "bash"]:
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            if program == "pip":
                name, _, named = arguments[-1].partition("[")
                assert name == "dask-embedding-reader"
                assert set(filter(None, named.rstrip("]").split(","))) <= set(extras)
            else:
                assert program == "make"
                assert set(arguments) <= set(targets)


def test_it_names_all_commands() -> None:
    [named] = re.findall(r"`dask-embedding-reader ([a-z |]+)`", README)
    assert sorted(named.split(" | ")) == sorted(command_line.commands)


def test_there_are_no_other_blocks_of_code() -> None:
    assert {language for language, _, _ in BLOCKS} == {"python", "bash", "text"}  # the rooms are no code


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert len(links) >= 4
    for link in links:
        assert (ROOT / link).is_file(), link
    assert (ROOT / "notebooks" / "overview.png").stat().st_size < 200_000
