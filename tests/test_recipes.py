"""The recipes of the site run, and print what their pages say."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest

from dask_embedding_reader.cli.commands import main

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / ".docs" / "pages" / "recipes").glob("*.md"))
NEEDED = ("faiss", "sklearn", "torch")
"""What recipes import that the tests do not install; `make notebooks` or `make test-torch` does."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_recipe_prints_what_its_page_says(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, re.DOTALL | re.MULTILINE)
    assert {language for language, _, _ in blocks} <= {"python", "bash"}
    missing = [name for name in NEEDED if re.search(rf"^(import|from) {name}\b", text, re.MULTILINE)]
    if lacking := [name for name in missing if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {lacking}")
    monkeypatch.chdir(tmp_path)  # recipes write beside them
    monkeypatch.setattr("warnings.showwarning", None)  # put back afterwards
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    names: dict[str, object] = {}
    for language, code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if language == "python":
                exec(compile(code, page.name, "exec"), names)
            else:
                run(code)
        if language == "python":
            assert printed.getvalue() == expected


def run(code: str) -> None:
    for line in code.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "dask-embedding-reader"
        with pytest.raises(SystemExit, match=r"^0$"):
            main(arguments)


def test_every_recipe_is_in_the_menu_of_the_site() -> None:
    menu = (ROOT / ".docs" / "mkdocs.yml").read_text(encoding="utf-8")
    assert PAGES
    assert sorted(re.findall(r"recipes/(\w+)\.md", menu)) == [page.stem for page in PAGES]
