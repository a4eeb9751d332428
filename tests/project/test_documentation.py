"""What is public is explained, with examples that run (the suite runs all doctests); so are the notebooks."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dask_embedding_reader

ROOT = Path(dask_embedding_reader.__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def public_callables() -> Iterator[tuple[str, Any]]:
    for name in dask_embedding_reader.__all__:
        value = getattr(dask_embedding_reader, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value) and not issubclass(value, Exception):
            yield name, value
            for method, function in vars(value).items():
                function = getattr(function, "__func__", function)  # of a classmethod
                if inspect.isfunction(function) and (method == "__call__" or not method.startswith("_")):
                    yield f"{name}.{method}", function


@pytest.mark.parametrize("name", dict(public_callables()))
def test_public_names_have_a_complete_docstring(name: str) -> None:
    value = dict(public_callables())[name]
    text = inspect.getdoc(value) or ""
    parameters = [each for each in inspect.signature(value).parameters if each not in ("self", "cls")]
    if not parameters:
        assert text
        return
    assert "\nParameters\n----------\n" in text
    assert ">>> " in text, "an example is missing"
    explained = text.split("\nParameters\n----------\n")[1].split("\n\n")[0]
    names = re.findall(r"^(\w[\w, ]*?) :", explained, re.MULTILINE)
    assert [each for group in names for each in group.split(", ")] == parameters


def test_the_site_shows_every_public_name() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / ".docs" / "pages").rglob("*.md"))
    shown = set(re.findall(r"^::: dask_embedding_reader\.(\w+)", pages, re.MULTILINE))
    errors = {name for name in dask_embedding_reader.__all__ if name in vars(dask_embedding_reader.errors)}
    assert shown - {"errors", "torch"} == set(dask_embedding_reader.__all__) - errors - {"__version__"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_committed_with_the_outputs_of_one_clean_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    assert str(ROOT) not in text
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"], "a warning"
    assert sum(cell["cell_type"] == "markdown" for cell in notebook["cells"]) >= 5


def test_there_are_five_notebooks() -> None:
    assert len(NOTEBOOKS) == 5
