"""The code in the README runs, and prints what the README says it prints; its messages and commands exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from dask_embedding_reader.cli.commands import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
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


def test_every_command_is_there_and_prints_the_text_block_after_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("warnings.showwarning", None)  # put back afterwards
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # in notebooks what takes a second shows its progress
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    blocks = [(code, expected) for language, code, expected in BLOCKS if language == "bash"]
    ran = 0
    for code, expected in blocks:
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            if program == "dask-embedding-reader":
                with pytest.raises(SystemExit, match=r"^0$"):
                    main(arguments)
                assert capsys.readouterr() == (expected, "")
                ran += 1
            elif program == "pip":
                name, _, named = arguments[-1].partition("[")
                assert name == "dask-embedding-reader"
                assert set(filter(None, named.rstrip("]").split(","))) <= set(extras)
            else:
                assert program == "make"
                assert set(arguments) <= set(targets)
    assert ran >= 2


def test_there_are_no_other_blocks_of_code() -> None:
    assert {language for language, _, _ in BLOCKS} == {"python", "bash", "text"}  # the rooms are no code


def test_the_messages_to_look_for_are_ones_that_there_are() -> None:
    table = README.split("| message | what to do |")[1].split("\n\n")[0]
    messages = re.findall(r"^\| `(.*?)`(.*?)\|", table, re.MULTILINE)
    assert len(messages) >= 5
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dask_embedding_reader").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    for message, whose in messages:
        assert message in joined or "of Dask" in whose, message


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert len(links) >= 4
    for link in links:
        assert (ROOT / link).is_file(), link
    assert (ROOT / "notebooks" / "overview.png").stat().st_size < 200_000
