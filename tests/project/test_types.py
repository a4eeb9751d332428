"""Users' programs are checked against the library's types, and editors complete its names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dask_embedding_reader

ROOT = Path(dask_embedding_reader.__file__).parent.parent

PROGRAM = """\
from dask_embedding_reader import BatchRecorder, EmbeddingReader, NoFilesError, get_file_list, iter_batches

def total(folder: str) -> float:
    try:
        reader = EmbeddingReader(folder, meta_columns=["word"], storage_options={"anon": True})
    except NoFilesError as error:
        raise SystemExit(str(error)) from error
    rows: int = reader.count + len(reader)
    path, row = reader.locate(5)
    print(path.upper(), row + 1)
    found = 0.0
    for embeddings, meta in reader(batch_size=100, show_progress=False):
        found += float(embeddings.sum()) + len(meta)
    recorder = BatchRecorder(iter_batches(reader.to_dask_array(max_piece_size=10), batch_size=5))
    for embeddings, meta in recorder:
        found += float(embeddings.sum()) + len(meta)
    print(get_file_list(folder, "npy")[1], recorder.table)
    return found
"""

# Dask's own sources take mypy a minute, and are not what is checked here.
CONFIG = """\
[mypy]
[mypy-dask.*,distributed.*,matplotlib.*]
follow_imports = skip
"""

WRONG = {
    'EmbeddingReader("x", embedding_colum="v")': "Unexpected keyword argument",
    'EmbeddingReader("x").cuont': 'has no attribute "cuont"; maybe "count"?',
    'EmbeddingReader("x")(batch_size="many")': 'has incompatible type "str"; expected "int"',
    "from dask_embedding_reader import EmbedingReader": 'has no attribute "EmbedingReader"',
    'number: int = EmbeddingReader("x").locate(0)': "Incompatible types in assignment",
}


def test_mypy_strict_checks_a_users_program(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + "\n" + "\n".join(WRONG), encoding="utf-8")
    # On the path of the interpreter, where installed packages are: mypy heeds them only if they have py.typed.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "mypy.ini").write_text(CONFIG)
    arguments = ["--strict", "--no-error-summary", f"--cache-dir={ROOT / '.mypy_cache' / 'user'}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments, program.name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.stderr == ""
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    first = len(PROGRAM.splitlines()) + 2
    assert len(errors) == len(WRONG), done.stdout
    for line, message, error in zip(range(first, first + len(WRONG)), WRONG.values(), errors, strict=True):
        assert error.startswith(f"program.py:{line}: error: ")
        assert message in error


def test_every_public_name_is_there_and_is_listed() -> None:
    for name in dask_embedding_reader.__all__:
        assert getattr(dask_embedding_reader, name) is not None
    assert set(dask_embedding_reader.__all__) <= set(dir(dask_embedding_reader))
    package: Any = dask_embedding_reader
    with pytest.raises(AttributeError, match="has no attribute 'EmbedingReader'"):
        package.EmbedingReader  # noqa: B018


def test_the_marker_of_types_is_in_the_package() -> None:
    assert (ROOT / "dask_embedding_reader" / "py.typed").is_file()
