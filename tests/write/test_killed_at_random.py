"""A writer is killed at random moments, over and over in one job, until one comes to its end."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.support import servers
from tests.write.test_resume import needs_fork

REFUSED = {"NoFilesError", "ReadError", "FileChangedError"}
"""How a reader is kept off what is not complete, or notices that it was replaced meanwhile."""

# By chance a job takes ten seconds or, on a busy machine, minutes: ``test_resume`` kills at chosen moments.
pytestmark = [needs_fork, pytest.mark.slow, pytest.mark.timeout(1_800)]

SOURCES, FORMATS = ("dask", "reader", "batches"), ("npy", "parquet", "parquet_npy")


def kill_again_and_again(**job: Any) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.killing_at_random", json.dumps(job)]
    ended = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1_700, check=False
    )
    assert ended.returncode == 0, ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    sys.stdout.write(f"{result}\n")  # pytest -rP shows it
    return result


def assert_unharmed(result: dict[str, Any], existing: bool) -> None:
    """Killed while it wrote, and still all is as if it had never been."""
    assert result["kills"] >= 5, result
    assert result["rewritten"] == result["half_written"] == result["damaged"] == [], result
    allowed = REFUSED | {"new"} | ({"old"} if existing else set())
    assert set(result["between"]) | set(result["meanwhile"]) <= allowed, result
    assert result["at_last"] == "new"
    assert result["same"]


@pytest.mark.parametrize(("source", "file_format", "existing"), list(product(SOURCES, FORMATS, (False, True))))
def test_killed_at_random(tmp_path: Path, source: str, file_format: str, existing: bool) -> None:
    folder = str(tmp_path / "out")
    result = kill_again_and_again(
        source=source, file_format=file_format, existing=existing, folder=folder, options=None, seed=5
    )
    assert_unharmed(result, existing)


@pytest.mark.parametrize(
    ("source", "file_format", "existing"),
    [("dask", "parquet_npy", False), ("reader", "npy", True)],
)
def test_killed_at_random_on_s3(s3: servers.S3Server, source: str, file_format: str, existing: bool) -> None:
    folder = f"{s3.root}/{uuid.uuid4().hex}"
    result = kill_again_and_again(
        source=source, file_format=file_format, existing=existing, folder=folder, options=s3.storage_options, seed=5
    )
    assert_unharmed(result, existing)
