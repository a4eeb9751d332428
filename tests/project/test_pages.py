"""The pages of the site run, and print what they say; its messages, links and menu lead to what there is."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from dask_embedding_reader.cli.commands import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".docs" / "pages"
PAGES = sorted(FOLDER.rglob("*.md"))
RUN = [page for page in PAGES if page.parent.name in ("guide", "recipes")]
NEEDED = ("faiss", "jax", "sklearn", "torch")
"""What recipes import that the tests do not install; `make notebooks` or `make test-torch` does."""


def name_of(page: Path) -> str:
    return page.relative_to(FOLDER).as_posix()


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_a_page_prints_what_it_says(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, re.DOTALL | re.MULTILINE)
    assert {language for language, _, _ in blocks} <= {"python", "bash"}
    needed = [name for name in NEEDED if re.search(rf"^(import|from) {name}\b", text, re.MULTILINE)]
    if lacking := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {lacking}")
    monkeypatch.chdir(tmp_path)  # pages write beside them
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("warnings.showwarning", None)  # put back afterwards
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # else commands show their progress
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    names: dict[str, object] = {}
    for language, code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if language == "python":
                exec(compile(code, page.name, "exec"), names)
            else:
                run(code)
        if language == "python" or expected:
            assert printed.getvalue().replace(f"{tmp_path}/", "") == expected
    for picture in re.findall(r"!\[.*?\]\((\w+\.png)\)", text):
        assert (tmp_path / picture).is_file(), f"no code of the page draws {picture}"
        assert (page.parent / picture).is_file(), "python .docs/pictures.py draws it"


def run(code: str) -> None:
    for line in code.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "dask-embedding-reader"
        with pytest.raises(SystemExit, match=r"^0$"):
            main(arguments)


def test_every_picture_beside_a_page_is_shown() -> None:
    for picture in FOLDER.rglob("*.png"):
        assert any(f"]({picture.name})" in page.read_text(encoding="utf-8") for page in picture.parent.glob("*.md"))


def test_every_page_is_in_the_menu_of_the_site() -> None:
    menu = (ROOT / ".docs" / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": ([\w/]+\.md)$", menu, re.MULTILINE))
    assert {name_of(page) for page in PAGES} <= named


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_its_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
        made = link == "../reference/command_line.md"  # from the help of the commands, when the site is built
        assert made or (page.parent / link).is_file(), link


def test_the_messages_to_look_for_are_ones_that_there_are() -> None:
    text = (FOLDER / "guide" / "errors.md").read_text(encoding="utf-8")
    table = text.split("| message | what to do |")[1].split("\n\n")[0]
    messages = re.findall(r"^\| `(.*?)`(.*?)\|", table, re.MULTILINE)
    assert len(messages) >= 5
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dask_embedding_reader").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    for message, whose in messages:
        assert message in joined or "of Dask" in whose, message
