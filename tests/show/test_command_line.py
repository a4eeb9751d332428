"""The command line: what it prints for people and programs, its exit codes, and that it leaves no mess."""

from __future__ import annotations

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import time
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import EmbeddingReader, errors, write_embeddings
from dask_embedding_reader._common import progress
from dask_embedding_reader.cli import bench as cli_bench
from dask_embedding_reader.cli import facts as cli_facts
from dask_embedding_reader.cli import output as cli_output
from dask_embedding_reader.cli import stats as cli_stats
from dask_embedding_reader.cli.commands import main
from dask_embedding_reader.cli.opening import parse_condition
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError
from tests.support.collections import wait_until

Run = Callable[..., tuple[int, str, str]]

PUBLIC_ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; return its exit code and what it printed."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        code = exited.value.code
        assert isinstance(code, int)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three npy files with metadata beside them: 20 rows."""
    folder = tmp_path / "shards"
    folder.mkdir()
    vectors = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    words = [f"word {row}" for row in range(20)]
    for shard, (start, stop) in enumerate([(0, 5), (5, 12), (12, 20)]):
        np.save(folder / f"{shard}.npy", vectors[start:stop])
        pd.DataFrame({"word": words[start:stop], "n": range(start, stop)}).to_parquet(folder / f"{shard}.parquet")
    return folder


def vectors_of(folder: Path) -> Any:
    return np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])


def show_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have logs of progress show a line for each step, however long some steps take."""
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 0.0))


def test_info(run: Run, shards: Path) -> None:
    code, out, err = run("info", shards, "-m", "word")
    assert (code, err) == (0, "")
    facts = dict(line.split("  ", 1) for line in out.splitlines())
    assert {name: value.strip() for name, value in facts.items()} == {
        "rows": "20",
        "dimension": "4",
        "dtype": "float32",
        "size": "320 bytes, 16 bytes a row",
        "files": "3 parquet_npy, of 5 to 8 rows",
        "row groups": "none",
        "metadata": "word (string)",
        "columns": "word, n",
        "problems": "none",
    }
    code, out, err = run("info", shards, "--json")
    facts = json.loads(out)
    assert (facts["rows"], facts["file_format"], facts["nbytes"]) == (20, "npy", 320)
    assert facts["rows_per_file"] == {"count": 3, "min_rows": 5, "max_rows": 8}


def test_several_folders_are_one_collection_in_the_order_given(run: Run, shards: Path, tmp_path: Path) -> None:
    other, meta = tmp_path / "other", tmp_path / "meta"
    other.mkdir()
    meta.mkdir()
    np.save(other / "0.npy", np.zeros((3, 4), np.float32))
    pd.DataFrame({"word": ["x", "y", "z"], "n": [0, 0, 0]}).to_parquet(meta / "0.parquet")
    code, out, err = run("info", shards, other)
    assert (code, err) == (0, "")
    assert "rows        23" in out
    assert f"folders     {shards} (20 rows), {other} (3 rows)" in out
    named = ["--metadata-folder", shards, "--metadata-folder", meta, "-m", "word"]
    _, out, _ = run("head", shards, other, *named, "--start", 19, "-n", 2, "--json")
    assert [(row["row"], row["word"]) for row in json.loads(out)] == [(19, "word 19"), (20, "x")]
    _, out, _ = run("stats", other, shards, "--json")
    assert json.loads(out)["rows"] == 23
    _, out, _ = run("plan", other, shards, "--json")
    assert json.loads(out)["files"] == 4
    _, out, _ = run("nearest", other, shards, "--row", 3, "--metric", "l2", "-k", 2, "--json")
    assert json.loads(out)[0]["nearest"][0]["row"] == 3
    code, _, err = run("bench", other, shards, "--seconds", 0.1, "--quiet", "--json")
    assert (code, err) == (0, "")
    code, out, _ = run("convert", other, shards, tmp_path / "joined", "--to", "npy", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 23)
    assert (np.load(next((tmp_path / "joined").glob("*.npy")))[:3] == 0).all()


def test_a_manifest_that_is_named_as_the_collection_is_told_from_vectors(run: Run, shards: Path) -> None:
    EmbeddingReader(shards).save_manifest()
    code, _, err = run("info", shards / ".manifest.embeddings")
    assert code == 2
    assert f"{shards}/.manifest.embeddings is a manifest" in err
    assert "open its folder" in err


def test_the_package_runs_as_the_command(shards: Path) -> None:
    program = [sys.executable, "-m", "dask_embedding_reader", "info", "--json", str(shards)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["rows"] == 20


HOSTILE = "\x1b]0;taken\x07\x9b2J\u202e\udcff"
"""Sets the title of a terminal, wipes it, turns text around, and is no UTF-8 as the name of a file."""


@pytest.mark.filterwarnings("always:meta_columns")
def test_no_name_and_no_value_commands_the_terminal(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else pytest keeps what is logged, and cannot send it from one of its processes to another.
    monkeypatch.setattr(logging.getLogger("dask_embedding_reader"), "propagate", False)
    folder = tmp_path / HOSTILE
    folder.mkdir()
    text, column = HOSTILE[:-1], f"w{HOSTILE[:-1]}"  # columns and values are UTF-8
    np.save(folder / f"{HOSTILE}0.npy", np.ones((3, 2), np.float32))
    np.save(folder / f"{HOSTILE}1.npy", np.ones((0, 2), np.float32))
    np.save(tmp_path / "f.npy", np.asfortranarray(np.ones((3, 2), np.float32)))
    (tmp_path / f"{HOSTILE}.npy").write_bytes(b"garbage" * 30)
    pd.DataFrame({column: [text, "b\nc", "d"]}).to_parquet(tmp_path / "0.parquet")
    pd.DataFrame({column: pd.Series([], dtype="str")}).to_parquet(tmp_path / "1.parquet")
    for name in ("0", "1"):
        (tmp_path / f"{name}.parquet").rename(folder / f"{HOSTILE}{name}.parquet")
    (folder / ".manifest.embeddings").write_bytes(b"damaged")
    out = tmp_path / f"out{HOSTILE}"
    seen = []
    for code, command in (
        (0, ["info", folder, "-m", column]),
        (0, ["head", folder, "-m", column]),
        (0, ["plan", folder, "--batch-size", "2"]),
        (0, ["stats", folder]),
        (0, ["bench", folder, "--seconds", "0.1"]),
        (0, ["convert", folder, out]),
        (1, ["convert", folder, out, "--dtype", "float16"]),
        (1, ["info", f"{tmp_path / HOSTILE}.npy"]),
        (1, ["info", tmp_path / f"gone{HOSTILE}"]),
        (1, ["info", folder, "-m", text]),
        (2, ["info", folder, "-m", HOSTILE]),
        (2, ["verify", HOSTILE, HOSTILE]),
        (2, ["info", folder, "--dtype", HOSTILE]),
        (2, ["plan", folder, "--plot", folder]),
        (0, ["info", folder, "-f", "npy", "-m", text]),
    ):
        got, *printed = run(*command)
        assert got == code, printed
        for shown in printed:
            assert not set(shown) & set("\x1b\x07\x9b\u202e\udcff"), (command, shown)
        seen.append("taken" in printed[0] + printed[1])
    assert seen.count(True) >= 9  # they are shown, though escaped
    (out / "00000000.npy").write_bytes(b"")
    (out / f"{HOSTILE}.npy").write_bytes(b"x")
    got, listed, _ = run("verify", out)
    assert got == 1
    assert "\\x1b]0;taken\\x07\\x9b2J\\u202e\\udcff.npy: not in the manifest" in listed


def test_json_holds_what_files_hold_and_no_command_for_the_terminal(run: Run, tmp_path: Path) -> None:
    write_embeddings(np.ones((2, 2), np.float32), tmp_path, "parquet", pd.DataFrame({"w": [HOSTILE[:-1], "\u00e9\n"]}))
    _, out, _ = run("head", tmp_path, "-m", "w", "--json")
    assert [row["w"] for row in json.loads(out)] == [HOSTILE[:-1], "\u00e9\n"]
    assert "\u00e9" in out
    assert not set(out) & set("\x1b\x07\x9b\u202e")
    (tmp_path / f"{HOSTILE}.parquet").write_bytes(b"x")
    _, out, _ = run("verify", tmp_path, "--json")
    assert json.loads(out)[0]["path"] == f"{tmp_path}/{HOSTILE}.parquet"


def test_a_command_called_from_python_leaves_warnings_and_logs_as_they_were(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import logging
    import warnings

    show, handlers, filters = (
        warnings.showwarning,
        [*logging.getLogger("dask_embedding_reader").handlers],
        [*warnings.filters],
    )
    for arguments in (["--help"], ["info", str(tmp_path)], ["no such command"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert warnings.showwarning is show
        assert logging.getLogger("dask_embedding_reader").handlers == handlers
        assert warnings.filters == filters


def test_info_tells_of_parquet_files_that_are_passed_over(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.ones((3, 2), np.float32))
    assert "none read\n" in run("info", tmp_path)[1]
    assert json.loads(run("info", tmp_path, "--json")[1])["passes_over"] is False
    pd.DataFrame({"word": list("abc")}).to_parquet(tmp_path / "0.parquet")
    assert "metadata    none read, but there are parquet files, too: -m '*' tells" in run("info", tmp_path)[1]
    assert json.loads(run("info", tmp_path, "--json")[1])["passes_over"] is True
    assert "columns     word\n" in run("info", tmp_path, "-m", "*")[1]
    assert "too" not in run("info", tmp_path, "-f", "npy")[1]  # who says so knows


def test_info_names_what_makes_a_collection_slow(run: Run, shards: Path) -> None:
    np.save(shards / "3.npy", np.empty((0, 4), np.float32))
    np.save(shards / "4.npy", np.asfortranarray(np.ones((3, 4), np.float32)))
    code, out, _ = run("info", shards, "-f", "npy")
    assert code == 0
    assert f"1 of 5 files have no rows (such as {shards / '3.npy'})" in out
    assert f"1 file (such as {shards / '4.npy'}) in Fortran order" in out
    facts = json.loads(run("info", shards, "-f", "npy", "--json")[1])
    assert (facts["files"], facts["empty_files"]) == (4, 1)


def test_the_format_is_guessed_from_the_names_of_the_files(run: Run, shards: Path, tmp_path: Path) -> None:
    pd.DataFrame({"v": [[1.0, 2.0]] * 3}).to_parquet(tmp_path / "vectors.parquet")
    code, out, _ = run("info", tmp_path / "vectors.parquet", "--embedding-column", "v", "--json")
    assert (code, json.loads(out)["file_format"]) == (0, "parquet")
    assert json.loads(out)["row_groups"] == {"count": 1, "min_rows": 3, "max_rows": 3}
    assert json.loads(run("info", shards, "--metadata-folder", shards, "--json")[1])["file_format"] == "parquet_npy"


def test_head_prints_some_rows_and_reads_no_others(run: Run, shards: Path) -> None:
    vectors = vectors_of(shards)
    code, out, _ = run("head", shards, "-m", "word", "--start", 4, "-n", 2, "--json")
    assert code == 0
    assert json.loads(out) == [
        {"row": row, "word": f"word {row}", "embedding": [pytest.approx(x) for x in vectors[row]]} for row in (4, 5)
    ]
    _, out, _ = run("head", shards, "-n", 3)
    assert out.splitlines()[0].split() == ["row", "embedding"]
    assert out.splitlines()[1].split() == ["0", *(f"{x:.4g}" for x in vectors[0])]


def test_json_has_null_for_what_is_no_number(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.array([[np.nan, 1, -np.inf]]))
    when = pd.Series([pd.Timestamp("2024-05-06 07:08:09")])
    frame = {"a": pd.array([None], "Int64"), "b": [float("nan")], "c": when, "d": [[1, None]], "e": [None]}
    pd.DataFrame(frame).to_parquet(tmp_path / "0.parquet")
    _, out, _ = run("head", tmp_path, *(f"-m{name}" for name in frame), "--json")
    [row] = json.loads(out)
    assert row["embedding"] == [None, 1.0, None]
    assert (row["a"], row["b"], row["c"], row["e"]) == (None, None, "2024-05-06 07:08:09", None)
    assert row["d"][0] == 1


def test_json_is_printed_for_people_too_unless_others_cannot_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    cli_output.print_json({"a": ["\u00e9"]})
    assert capsys.readouterr().out == '{\n  "a": [\n    "\u00e9"\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        cli_output.print_json([float("nan")])


def test_opening_many_files_shows_how_far_it_is(run: Run, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show_each_step(monkeypatch)
    code, _, err = run("info", shards)
    assert code == 0
    assert "3 of 3 files (100%)" in err


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("stats {shards}", "reading"),
        ("nearest {shards} --row 1", "searching"),
        ("convert {shards} {out}", "writing"),
        ("verify {done}", "verifying"),
        ("bench {shards} --seconds 0.1", "measuring"),
    ],
)
def test_how_far_a_command_is_is_shown_unless_it_is_to_be_quiet(
    run: Run, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, shown: str
) -> None:
    assert run("convert", shards, tmp_path / "done", "--to", "npy", "--rows-per-file", 5)[0] == 0
    show_each_step(monkeypatch)
    for number, quiet in enumerate([[], ["--quiet"], ["-q"]]):
        words = command.format(shards=shards, out=tmp_path / f"out-{number}", done=tmp_path / "done").split()
        code, _, err = run(*words, *quiet)
        told = {line.partition(":")[0] for line in err.splitlines() if "%)" in line}
        assert (code, told - {"opening"}) == (0, set() if quiet else {shown})


def test_plan(run: Run, shards: Path, tmp_path: Path) -> None:
    code, out, _ = run("plan", shards, "--max-piece-size", 4, "--batch-size", 6, "--json")
    facts = json.loads(out)
    assert (code, facts["files"]) == (0, 3)
    assert facts["pieces"] == {"count": 6, "min_rows": 2, "max_rows": 4, "max_nbytes": 64}
    assert facts["batches"] == {"count": 4, "min_rows": 2, "max_rows": 6, "max_nbytes": 96}
    picture = tmp_path / "plan.png"
    plt.close("all")  # what others left; the lowest matplotlib warns of them when it changes its backend
    plt.switch_backend("svg")
    code, out, _ = run("plan", shards, "--plot", picture)
    assert (code, picture.read_bytes()[:4]) == (0, b"\x89PNG")
    figure: Any = EmbeddingReader(shards).plot_plan().figure
    inches = figure.get_size_inches()
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == pytest.approx(120 * inches, abs=1)
    assert plt.get_backend().lower() == "agg", "no window is opened"
    assert f"drawn in {picture}" in out


def test_a_plan_is_drawn_in_formats_that_matplotlib_knows(run: Run, shards: Path) -> None:
    code, out, err = run("plan", shards, "--plot", shards / "plan.xyz")
    assert (code, out) == (2, "")
    assert "plan.xyz': nothing draws .xyz files; those that can be are" in err
    assert "png" in err
    assert run("plan", shards, "--plot", shards / "plan.SVG")[0] == 0


def test_a_plan_is_not_drawn_without_matplotlib(run: Run, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("plan", shards, "--plot", shards / "plan.png")
    assert (code, out) == (1, "")
    assert err == 'Error: --plot needs matplotlib: pip install "dask-embedding-reader[plot]"\n'


def test_stats_are_those_of_numpy(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((500, 8)).astype(np.float32)
    vectors[[3, 400]] = 0
    vectors[[10, 11, 499]] = vectors[5]
    vectors[20, 3], vectors[21, 0], vectors[22, 1] = np.nan, np.inf, np.nan
    for shard in range(5):
        np.save(tmp_path / f"{shard}.npy", vectors[shard * 100 : shard * 100 + 100])
    code, out, err = run("stats", tmp_path, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    norms = np.linalg.norm(vectors[np.isfinite(vectors).all(axis=1)].astype(float), axis=1)
    wanted = {"min": norms.min(), "max": norms.max(), "mean": norms.mean(), "std": norms.std()}
    assert facts["norms"] == {name: pytest.approx(value) for name, value in wanted.items()}
    assert facts["nan"] == {"rows": 2, "first_rows": [20, 22]}
    assert facts["infinite"] == {"rows": 1, "first_rows": [21]}
    assert facts["zero"] == {"rows": 2, "first_rows": [3, 400]}
    assert facts["duplicates"] == {"rows": 4, "exact": True, "groups": [[3, 400], [5, 10, 11, 499]]}
    _, out, _ = run("stats", tmp_path, "--start", 0, "--end", 100)
    assert "zero vectors  1 (row 3)\n" in out
    assert "duplicates    2 (rows 5 = 10 = 11)\n" in out


@pytest.mark.parametrize("dtype", ["int8", "uint64", "float64", "complex64", "bool", ">f4"])
def test_stats_of_any_dtype_in_many_batches(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(cli_stats, "_BATCH_NBYTES", 40)
    vectors = np.random.default_rng(1).integers(0, 2, (80, 3)).astype(dtype)
    np.save(tmp_path / "0.npy", vectors)
    facts = json.loads(run("stats", tmp_path, "--json")[1])
    norms = np.linalg.norm(vectors.astype(complex), axis=1)
    assert facts["norms"]["mean"] == pytest.approx(norms.mean())
    assert facts["norms"]["std"] == pytest.approx(norms.std())
    assert facts["duplicates"]["rows"] == 80 - len(np.unique(vectors, axis=0))
    equal = (vectors[:, None] == vectors).all(axis=2)
    groups = {tuple(np.flatnonzero(same).tolist()) for same in equal if same.sum() > 1}
    assert facts["duplicates"]["groups"] == [list(group) for group in sorted(groups)]
    zero = np.flatnonzero(~vectors.any(axis=1)).tolist()
    assert len(zero) > 5
    assert facts["zero"] == {"rows": len(zero), "first_rows": zero[:5]}


def test_norms_neither_overflow_nor_vanish(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.array([[3e200, 4e200], [3e-200, 4e-200]]))
    norms = json.loads(run("stats", tmp_path, "--json")[1])["norms"]
    assert norms["max"] == pytest.approx(5e200, rel=1e-12)
    assert norms["min"] == pytest.approx(5e-200, rel=1e-12, abs=0)
    assert norms["std"] is None, "the squares of these do overflow"


def test_norms_at_the_end_of_float64(run: Run, tmp_path: Path) -> None:
    largest = np.finfo(np.float64).max
    np.save(tmp_path / "0.npy", np.array([[largest, 0], [largest / 2, 0], [largest / 2, 0]]))
    code, out, err = run("stats", tmp_path, "--json", "-q")
    assert (code, err) == (0, "")
    assert json.loads(out)["norms"]["mean"] == pytest.approx(largest * (2 / 3)), "their sum is infinite"
    assert "norms         8.98847e+307 to 1.79769e+308, mean 1.19846e+308\n" in run("stats", tmp_path, "-q")[1]
    np.save(tmp_path / "1.npy", np.array([[largest, largest]]))
    code, out, err = run("stats", tmp_path, "-q")
    assert (code, err) == (0, "")
    assert "norms         8.98847e+307 to beyond float64, mean beyond float64\n" in out
    norms = json.loads(run("stats", tmp_path, "--json", "-q")[1])["norms"]
    assert norms == {"min": largest / 2, "max": None, "mean": None, "std": None}


def test_duplicates_of_more_rows_than_are_remembered_are_estimated(tmp_path: Path) -> None:
    distinct = np.random.default_rng(2).standard_normal((10_000, 2))
    np.save(tmp_path / "0.npy", np.concatenate([distinct, distinct]))
    facts = cli_stats.row_statistics(EmbeddingReader(tmp_path), most_hashes=3_000)
    assert facts["duplicates"]["exact"] is False
    assert facts["duplicates"]["rows"] == pytest.approx(10_000, rel=0.15)


@pytest.mark.parametrize("most", [1, 7, 30, 99, 100, 149, 150])
def test_rows_whose_hashes_are_multiples_of_a_power_of_two_stand_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Of the smallest power with which they are few enough after each batch."""
    vectors = np.random.default_rng(3).integers(0, 100, (150, 1))
    np.save(tmp_path / "0.npy", vectors)
    hashes = [int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), sys.byteorder) for row in vectors]
    step = next(2**k for k in range(64) if sum(each % 2**k == 0 for each in hashes) <= most)
    kept = [each for each in hashes if each % step == 0]
    groups = [[row for row, other in enumerate(hashes) if other == each] for each in dict.fromkeys(kept)]
    for nbytes in (8, 400, 10**6):
        monkeypatch.setattr(cli_stats, "_BATCH_NBYTES", nbytes)
        assert cli_stats.row_statistics(EmbeddingReader(tmp_path), most_hashes=most)["duplicates"] == {
            "rows": (len(kept) - len(set(kept))) * step,
            "exact": step == 1,
            "groups": [group for group in groups if len(group) > 1],
        }


def test_nearest(run: Run, shards: Path, tmp_path: Path) -> None:
    vectors = vectors_of(shards)
    cosines = vectors @ vectors[7] / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[7])
    wanted = np.argsort(-cosines)[:3].tolist()
    code, out, err = run("nearest", shards, "--row", 7, "-k", 3, "-m", "word", "--json")
    [found] = json.loads(out)
    assert (code, err, found["query"]) == (0, "", 7)
    assert [(hit["row"], hit["word"]) for hit in found["nearest"]] == [(row, f"word {row}") for row in wanted]
    assert [hit["score"] for hit in found["nearest"]] == pytest.approx(cosines[wanted].tolist(), rel=1e-5)
    np.save(tmp_path / "queries.npy", vectors[[7, 9]])
    code, out, _ = run(
        "nearest", shards, "--queries", tmp_path / "queries.npy", "-k", 1, "--metric", "l2", "-m", "word"
    )
    assert code == 0
    assert out.splitlines()[0] == "nearest to query 0"
    assert [line.split()[:4] for line in out.splitlines() if line[0].isdigit()] == [
        ["0", "7", "word", "7"],
        ["0", "9", "word", "9"],
    ]


def test_nearest_names_the_row_that_cannot_be_searched_for(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.array([[1, 0], [0, 0], [1, 1], [np.nan, 1]], np.float32))
    for rows, message in ([(2, 3), "row 3 holds NaN"], [(0, 1), "row 1 is of length 0"]):
        code, _, err = run("nearest", tmp_path, "-r", rows[0], "-r", rows[1], "-q")
        assert (code, err.startswith(f"Error: {message}")) == (2, True), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to search for"),
        (["--row", 1, "--queries", __file__], "--row and --queries cannot be combined"),
        (["--row", 20], "--row 20 is out of range: the collection has 20 rows"),
        (["--row", 1, "-k", 0], "0 is not in the range"),
        (["--queries", __file__], 'not an npy file, as it begins with b\'"""The\''),
        (["--queries", "cut.npy"], "cut.npy: "),
        (["--queries", "queries.npz"], "an npz archive; save one of its arrays as an npy file"),
    ],
)
def test_nearest_says_what_is_wrong(
    run: Run, shards: Path, arguments: list[Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards.parent)
    np.savez("queries.npz", np.ones((1, 4)))
    np.save("cut.npy", np.ones((1, 4)))
    os.truncate("cut.npy", 140)
    code, _, err = run("nearest", shards, *arguments)
    assert code == 2
    assert message in err


def test_bench_reads_for_a_while_and_recommends(run: Run, shards: Path) -> None:
    code, out, err = run("bench", shards, "--seconds", 0.2, "--json")
    facts = json.loads(out)
    assert code == 0
    assert [each["parallel_pieces"] for each in facts["runs"]] == [1, 2, 4, 8]
    assert facts["suits"] in (1, 2, 4, 8)
    assert all(each["nbytes"] == 16 * each["rows"] > 0 for each in facts["runs"])
    code, out, err = run("bench", shards, "--seconds", 0.2)
    assert out.count("suits it") == 1
    assert "read more than once" in err


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A file of vectors of each kind, and a parquet file of three row groups: 4, 4 and 2 rows."""
    folder = tmp_path / "odd"
    folder.mkdir()
    vectors = np.arange(1, 53, dtype=np.float32).reshape(13, 4)
    vectors[3], vectors[7], vectors[[4, 5]], vectors[[6, 8]] = np.nan, np.inf, 0, vectors[0]
    np.save(folder / "0.npy", vectors)
    np.save(folder / "one.npy", vectors[:1])
    frame = pd.DataFrame(
        {"word": [f"w{k}" for k in range(10)], "embedding": [np.array([k, 0.5], np.float32) for k in range(10)]}
    )
    frame.to_parquet(folder / "groups.parquet", row_group_size=4)
    return folder


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        (
            "info groups.parquet -m word",
            """
            rows        10
            dimension   2
            dtype       float32
            size        80 bytes, 8 bytes a row
            files       1 parquet, of 10 rows
            vectors     embedding
            row groups  3, of 2 to 4 rows
            metadata    word (string)
            columns     word
            problems    none
            """,
        ),
        (
            "info one.npy",
            """
            rows        1
            dimension   4
            dtype       float32
            size        16 bytes, 16 bytes a row
            files       1 npy, of 1 row
            row groups  none
            metadata    none read
            problems    none
            """,
        ),
        (
            "head groups.parquet -n 2 --start 8 -m word",
            """
            row  word  embedding
            8    w8    8 0.5
            9    w9    9 0.5
            """,
        ),
        (
            "plan groups.parquet",
            """
            files       1
            pieces      1, of 10 rows, up to 80 bytes
            row groups  3, of 2 to 4 rows; none is cut
            """,
        ),
        (
            "plan groups.parquet --max-piece-size 4",
            """
            files       1
            pieces      3, of 2 to 4 rows, up to 32 bytes
            row groups  3, of 2 to 4 rows; none is cut
            """,
        ),
        (
            "plan groups.parquet --max-piece-size 3 --batch-size 4",
            """
            files       1
            pieces      5, of 2 rows, up to 16 bytes
            row groups  3, of 2 to 4 rows; the largest is cut into several pieces, after it was decoded once
            batches     3, of 2 to 4 rows, 32 bytes as float32
            """,
        ),
        (
            "stats 0.npy",
            """
            rows          13
            norms         0 to 101.025, mean 36.9868, deviation 40.1
            NaN           1 (row 3)
            infinite      1 (row 7)
            zero vectors  2 (rows 4, 5)
            duplicates    3 (rows 0 = 6 = 8, 4 = 5)
            """,
        ),
        (
            "stats 0.npy --start 3 --end 4",
            """
            rows          1
            norms         none is finite
            NaN           1 (row 3)
            infinite      0
            zero vectors  0
            duplicates    0
            """,
        ),
        (
            "nearest groups.parquet --row 2 -k 2",
            """
            score   row  embedding
            1       2    2 0.5
            0.9968  3    3 0.5
            """,
        ),
        (
            "nearest groups.parquet -r 2 -r 3 -k 2 -m word --metric l2",
            """
            nearest to row 2
            score  row  word  embedding
            0      2    w2    2 0.5
            1      1    w1    1 0.5
            nearest to row 3
            score  row  word  embedding
            0      3    w3    3 0.5
            1      2    w2    2 0.5
            """,
        ),
        (
            "convert groups.parquet out",
            """
            rows      10
            dtype     float32
            files     1 parquet
            metadata  word
            """,
        ),
    ],
)
def test_what_people_read(run: Run, odd: Path, monkeypatch: pytest.MonkeyPatch, command: str, printed: str) -> None:
    monkeypatch.chdir(odd)
    assert run(*command.split()) == (0, textwrap.dedent(printed).lstrip(), "")


def test_long_lists_are_cut_where_they_say_so() -> None:
    assert [cli_output.shown_groups([[1, 2]] * count) for count in (0, 1, 5, 6)] == [
        "",
        " (rows 1 = 2)",
        " (rows 1 = 2, 1 = 2, 1 = 2, 1 = 2, 1 = 2)",
        " (rows 1 = 2, 1 = 2, 1 = 2, 1 = 2, 1 = 2, …)",
    ]
    assert cli_output.shown_groups([[1, 2, 3, 4], [5, 6, 7, 8, 9]]) == " (rows 1 = 2 = 3 = 4, 5 = 6 = 7 = 8 = …)"
    folders = {f"f{k}": {"rows": 1_000 + k} for k in range(9)}
    eight = ", ".join(f"f{k} (1,00{k} rows)" for k in range(8))
    assert cli_output.shown_folders(dict(list(folders.items())[:8])) == eight
    assert cli_output.shown_folders(folders) == f"{eight} and more"
    assert cli_output.shown_folders({}) is None
    assert cli_facts.shown_vector([1.0, 2, 3.00009, 4]) == "1 2 3 4"
    assert cli_facts.shown_vector([1.0, 2, 3.00009, 4, 5]) == "1 2 3 4 …"
    assert (cli_output.short(None), cli_output.short(0.123456)) == ("none", "0.1235")


def test_a_cell_of_a_table_is_no_longer_than_48_characters(capsys: pytest.CaptureFixture[str]) -> None:
    cli_output.print_table([])
    cli_output.print_table([{"a": "x" * 48, "b": 1}, {"a": "x" * 49, "b": 2}, {"a": " y  z\n", "b": None}])
    blanks = " " * 45
    table = ["a" + " " * 47 + "  b", "x" * 48 + "  1", "x" * 47 + "…  2", f"y z{blanks}  None", ""]
    assert capsys.readouterr().out.split("\n") == table


def test_as_many_rows_of_a_kind_are_named_as_there_is_room_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_stats, "_BATCH_NBYTES", 3 * 8)
    np.save(tmp_path / "0.npy", np.zeros((5, 2), np.float32))
    assert "zero vectors  5 (rows 0, 1, 2, 3, 4)\n" in run("stats", tmp_path)[1]
    np.save(tmp_path / "0.npy", np.zeros((6, 2), np.float32))
    assert "zero vectors  6 (rows 0, 1, 2, 3, 4, …)\n" in run("stats", tmp_path)[1]


@pytest.mark.parametrize(("nbytes", "batches"), [(1, [1] * 5), (15, [1] * 5), (16, [2, 2, 1]), (10**6, [5])])
def test_as_many_rows_are_looked_at_together_as_make_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int, batches: list[int]
) -> None:
    seen: list[int] = []
    norms = cli_stats._norms

    def noting(rows: Any) -> Any:
        seen.append(len(rows))
        return norms(rows)

    monkeypatch.setattr(cli_stats, "_BATCH_NBYTES", nbytes)
    monkeypatch.setattr(cli_stats, "_norms", noting)
    np.save(tmp_path / "0.npy", np.ones((5, 2), np.float32))
    assert cli_stats.row_statistics(EmbeddingReader(tmp_path))["rows"] == 5
    assert seen == batches


def test_how_many_groups_of_duplicates_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_stats, "_MOST_GROUPS", 2)
    monkeypatch.setattr(cli_stats, "_MOST_OF_GROUP", 3)
    np.save(tmp_path / "0.npy", np.repeat([[1], [2], [3]], [5, 2, 3], axis=0))
    facts = cli_stats.row_statistics(EmbeddingReader(tmp_path))["duplicates"]
    assert facts == {"rows": 7, "exact": True, "groups": [[0, 1, 2], [5, 6]]}


def test_duplicates_are_counted_exactly_as_long_as_all_rows_are_remembered(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.arange(100).reshape(50, 2))
    exact, estimated = (
        cli_stats.row_statistics(EmbeddingReader(tmp_path), most_hashes=most)["duplicates"] for most in (50, 49)
    )
    assert exact == {"rows": 0, "exact": True, "groups": []}
    assert estimated == {"rows": 0, "exact": False, "groups": []}


@pytest.mark.parametrize("batch_size", [1, 3, 12, 13, 14, 26])
def test_the_batches_of_a_plan_are_those_that_come(odd: Path, batch_size: int) -> None:
    reader = EmbeddingReader(odd / "0.npy")
    rows = [len(vectors) for vectors, _ in reader(batch_size, show_progress=False)]
    assert cli_facts.plan_facts(reader, None, batch_size)["batches"] == {
        "count": len(rows),
        "min_rows": min(rows),
        "max_rows": max(rows),
        "max_nbytes": max(rows) * 16,
    }


@pytest.mark.parametrize(
    ("limits", "problems"),
    [
        ({"_MANY_FILES": 3, "_SMALL_FILE_NBYTES": 107}, ["3 files of 106 bytes on average: opening each"]),
        ({"_MANY_FILES": 4, "_SMALL_FILE_NBYTES": 107}, []),
        ({"_MANY_FILES": 3, "_SMALL_FILE_NBYTES": 320 / 3}, []),
    ],
)
def test_many_small_files_are_a_problem(
    shards: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, float], problems: list[str]
) -> None:
    for name, limit in limits.items():
        monkeypatch.setattr(cli_facts, name, limit)
    found = cli_facts.collection_facts(EmbeddingReader(shards))["problems"]
    assert [problem.partition(" costs")[0] for problem in found] == problems


def test_row_groups_without_rows_are_not_counted(tmp_path: Path) -> None:
    table = pa.table({"embedding": pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2))})
    with pq.ParquetWriter(tmp_path / "0.parquet", table.schema) as writer:
        for rows in (0, 2, 0, 1):
            writer.write_table(table.slice(0, rows))
    facts = cli_facts.collection_facts(EmbeddingReader(tmp_path, "parquet"))
    assert facts["row_groups"] == {"count": 2, "min_rows": 1, "max_rows": 2}


def test_large_row_groups_are_a_problem(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = EmbeddingReader(odd / "groups.parquet", "parquet")
    monkeypatch.setattr(cli_facts, "_LARGE_GROUP_NBYTES", 32)
    assert cli_facts.collection_facts(reader)["problems"] == []
    monkeypatch.setattr(cli_facts, "_LARGE_GROUP_NBYTES", 31)
    [problem] = cli_facts.collection_facts(reader)["problems"]
    assert problem.startswith("row groups of up to 4 rows, 32 bytes: each can only be decoded whole")


def test_bench_reads_on_where_it_stopped_and_takes_the_fewest_pieces_that_are_as_fast(
    odd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock that moves when somebody looks at it, by so much for each number of pieces."""
    ticks = {1: 2.0, 2: 1.25, 4: 1.125, 8: 1.5}
    calls, now = list[tuple[int, int]](), [0.0]
    read = EmbeddingReader.__call__

    def recorded(reader: EmbeddingReader, batch_rows: int, row: int = 0, **options: Any) -> Any:
        calls.append((options["parallel_pieces"], row))
        return read(reader, batch_rows, row, **options)

    def look() -> float:
        now[0] += ticks[calls[-1][0]] if calls else 0.0
        return now[0]

    monkeypatch.setattr(EmbeddingReader, "__call__", recorded)
    monkeypatch.setattr(cli_bench, "_BATCH_NBYTES", 3 * 16)
    monkeypatch.setattr(cli_bench, "time", SimpleNamespace(perf_counter=look))
    show_each_step(monkeypatch)
    facts = cli_bench.measure_reading(EmbeddingReader(odd / "0.npy"), 16.0, show_progress=True)
    wanted = [(1, 6, 4.0), (2, 10, 5.0), (4, 10, 4.5), (8, 9, 4.5)]
    assert facts == {
        "runs": [
            {
                "parallel_pieces": pieces,
                "seconds": seconds,
                "rows": rows,
                "nbytes": rows * 16,
                "rows_per_second": rows / seconds,
                "nbytes_per_second": rows * 16 / seconds,
            }
            for pieces, rows, seconds in wanted
        ],
        "suits": 2,  # nine tenths of the best
        "read_again": True,
    }
    assert calls == [(1, 0), (2, 6), (2, 0), (4, 3), (8, 0)]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        f"measuring: {k} of 4 settings ({k / 4:.0%})" for k in (1, 2, 3, 4)
    ]
    calls.clear()
    assert not cli_bench.measure_reading(EmbeddingReader(odd / "0.npy"), 0.1)["read_again"], "twelve of thirteen rows"
    assert calls == [(1, 0), (2, 3), (4, 6), (8, 9)]
    monkeypatch.setattr(cli_bench, "_BATCH_NBYTES", 1)
    calls.clear()
    facts = cli_bench.measure_reading(EmbeddingReader(odd / "one.npy"), 0.1)
    assert [run["rows"] for run in facts["runs"]] == [1, 1, 1, 1], "a row is larger than what is read at once"
    assert calls == [(1, 0), (2, 0), (4, 0), (8, 0)]
    calls.clear()
    facts = cli_bench.measure_reading(EmbeddingReader(odd / "0.npy"), 0.1)
    assert [run["rows"] for run in facts["runs"]] == [1, 1, 1, 1]
    assert calls == [(1, 0), (2, 1), (4, 2), (8, 3)]
    for rows, is_again in ((3, True), (4, False)):
        np.save(odd / "few.npy", np.ones((rows, 4), np.float32))
        assert cli_bench.measure_reading(EmbeddingReader(odd / "few.npy"), 0.1)["read_again"] is is_again


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "no/such/folder"], 1, "Error: 'no/such/folder' does not exist"),
        (["info", "{shards}", "-m", "wrod"], 1, "has no column 'wrod'; its columns are 'word', 'n'"),
        (["info", "nosuchprotocol://x"], 2, "nosuchprotocol"),
        (["info", "{shards}", "--embedding-dtype", "float32"], 2, "--embedding-dtype is only for files that do not"),
        (["stats", "{shards}", "--start", "30"], 2, "--start 30 is out of range: there are 20 rows, from 0 on"),
        (["stats", "{shards}", "--start", "20"], 2, "--start 20 is out of range: there are 20 rows, from 0 on"),
        (["head", "{shards}", "--start", "20"], 2, "--start 20 is out of range: there are 20 rows, from 0 on"),
        (["head", "{shards}", "--rows", "0"], 2, "x>=1"),
        (["info", "{shards}", "--storage-options", "{{"], 2, "not JSON"),
        (["info", "{shards}", "--storage-options", "[]"], 2, "a JSON object is expected"),
        (["info", "{shards}", "--embedding-dtype", "5:2"], 2, "--embedding-dtype='5:2' is no dtype that numpy knows"),
        (["info", ""], 2, "URL holds an empty path"),
        (["plan", "{shards}", "--plot", "no/folder.png"], 2, "--plot 'no/folder.png' cannot be written: FileNotFound"),
        (["convert", "{shards}", "nosuchprotocol://x"], 2, "check the URL and --target-storage-options"),
        (["convert", "nosuchprotocol://x", "y"], 2, "check the URL and --storage-options"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["info"], 2, "Missing argument 'URL...'"),
    ],
)
def test_what_goes_wrong_is_told_in_a_sentence(
    run: Run, shards: Path, arguments: list[str], code: int, message: str
) -> None:
    found, out, err = run(*(argument.format(shards=shards) for argument in arguments))
    assert found == code
    assert message in err
    assert out == ""
    assert "Traceback" not in err


FAILURES: list[tuple[BaseException, int]] = [
    *((kind("it is so"), 2 if issubclass(kind, ArgumentError | ArgumentTypeError) else 1) for kind in PUBLIC_ERRORS),
    (ImportError("it is so"), 1),
    (OSError("it is so"), 1),
    (MemoryError("it is so"), 1),
    (click.UsageError("it is so"), 2),
    (KeyboardInterrupt(), 130),
    (click.Abort(), 130),
]


@pytest.mark.parametrize(("error", "code"), FAILURES, ids=lambda value: type(value).__name__)
def test_each_kind_of_failure_has_its_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    """Scripts decide by it: 1 the data or the storage, 2 the command itself, 130 interrupted."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("dask_embedding_reader.cli.opening.open_collection", fail)
    found, out, err = run("info", "somewhere")
    assert (found, out) == (code, "")
    assert err.splitlines()[-1].endswith("Interrupted" if code == 130 else "it is so")


@pytest.mark.parametrize("kind", [OSError, ValueError, RuntimeError])
def test_what_another_library_says_is_printed_without_its_secrets(
    run: Run, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise kind("cannot GET https://user:SECRET@host/a.npy?X-Amz-Signature=SECRET&x=1 (SECRET is no word of it)")

    monkeypatch.setattr("dask_embedding_reader.cli.opening.open_collection", fail)
    code, _, err = run("info", "somewhere")
    assert code == 1
    assert err.count("SECRET") == 1
    assert "https://host/a.npy" in err


def test_a_damaged_file_is_named(run: Run, shards: Path) -> None:
    (shards / "1.npy").write_bytes((shards / "1.npy").read_bytes()[:-4])
    code, _, err = run("info", shards)
    assert code == 1
    assert str(shards / "1.npy") in err


def test_an_error_of_a_storage_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a file system throws: here one that cannot be reached."""
    code, _, err = run("info", "http://127.0.0.1:9/x.npy")
    assert code == 1
    assert err.startswith("Error: ")
    assert "Traceback" not in err
    monkeypatch.setenv("DASK_EMBEDDING_READER_TRACEBACK", "1")
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        main(["info", "http://127.0.0.1:9/x.npy"])


def test_warnings_are_sentences_too(run: Run, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def warn(*_: Any, **__: Any) -> dict[str, Any]:
        warnings.warn("something is odd", stacklevel=1)
        return {"runs": [], "suits": 1, "read_again": False}

    monkeypatch.setattr("dask_embedding_reader.cli.bench.measure_reading", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("bench", shards)[2] == "Warning: something is odd\n"


def test_what_is_logged_is_shown_beside_the_output_unless_the_program_takes_it(
    run: Run, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log(*_: Any, **__: Any) -> dict[str, Any]:
        logger = logging.getLogger("dask_embedding_reader")
        logger.info("of no importance")
        logger.warning("slow: %d s", 5)
        return {"runs": [], "suits": 1, "read_again": False}

    monkeypatch.setattr("dask_embedding_reader.cli.bench.measure_reading", log)
    assert run("bench", shards)[2] == "", "pytest takes it"
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    code, out, err = run("bench", shards)
    assert (code, err) == (0, "slow: 5 s\n")
    assert "slow" not in out


def test_convert_keeps_rows_and_metadata(run: Run, shards: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    code, out, err = run(
        "convert", shards, target, "-f", "parquet_npy", "--to", "parquet", "--rows-per-file", 8, "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "rows": 20,
        "dimension": 4,
        "dtype": "float32",
        "nbytes": 320,
        "file_format": "parquet",
        "files": 3,
        "metadata": ["word", "n"],
        "left_out": [],
    }
    written = EmbeddingReader(target, "parquet", meta_columns=["word", "n"])
    [(vectors, meta)] = written(100, show_progress=False)
    np.testing.assert_array_equal(vectors, vectors_of(shards))
    assert meta["n"].tolist() == list(range(20))
    assert meta["word"].tolist() == [f"word {row}" for row in range(20)]


@pytest.fixture
def typed(tmp_path: Path) -> Path:
    """Twelve vectors, each of its number, with a column of each kind."""
    folder = tmp_path / "typed"
    folder.mkdir()
    np.save(folder / "0.npy", np.arange(12, dtype=np.float32).reshape(12, 1))
    frame = pd.DataFrame(
        {
            "n": pd.array([*range(11), None], "Int64"),
            "x": np.arange(12) / 2,
            "kind": pd.Categorical(["a", "b", "c, d"] * 4),
            "word": ["in", None, "is null", "it's"] * 3,
            "seen": [True, False, False] * 4,
            "day": pd.date_range("2024-01-01", periods=12),
            "hour": [time(k, 30) for k in range(12)],
            "length": pd.to_timedelta([30 * k for k in range(12)], "min"),
            "full name": [f"{k}" for k in range(12)],
            "list": [[k] for k in range(12)],
            "small": np.arange(-6, 6, dtype=np.int8),
            "float": np.array([np.inf, -np.inf, 0.1, *range(9)], np.float32),
            "price": [Decimal(k) / 4 for k in range(12)],
        }
    )
    frame.to_parquet(folder / "0.parquet")
    return folder


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["--where", "n == 3"], [3]),
        (["--where", "n!=3", "--where", "n < 5"], [0, 1, 2, 4]),
        (["--where", "n > 8.5"], [9, 10]),
        (["--where", " x<=0.5 "], [0, 1]),
        (["--where", "x >= 5"], [10, 11]),
        (["--where", "kind == b", "--where", "seen == false"], [1, 4, 7, 10]),
        (["--where", "kind in [ b, 'c, d' ]", "--where", "n < 3"], [1, 2]),
        (["--where", "kind not in [a,b]", "--where", "n < 6"], [2, 5]),
        (["--where", "n in [1, 11, 2]"], [1, 2]),
        (["--where", "word == in", "--where", "n<5"], [0, 4]),
        (["--where", "word == 'is null'"], [2, 6, 10]),
        (["--where", "word is null"], [1, 5, 9]),
        (["--where", "n is  not null ", "--where", "word is not null", "--rows", "8:"], [8, 10]),
        (["--where", "word == it's", "--rows", ":5"], [3]),
        (["--where", "day < 2024-01-03"], [0, 1]),
        (["--where", "day == '2024-01-03 00:00:00'"], [2]),
        (["--where", "hour < 01:30", "--where", "hour in [00:30, 02:30:00]"], [0]),
        (["--where", "length > 5h"], [11]),
        (["--where", "length in [90s, 90min, 0 days 02:00:00]"], [3, 4]),
        (["--where", '"full name" in [7, 5]'], [5, 7]),
        (["--where", "full name == 7"], [7]),
        (["--where", "small <= 300", "--where", "small > -1000", "--where", "small == +5"], [11]),
        (["--where", "small in [300, -6]"], [0]),
        (["--where", "float >= 8"], [0, 11]),
        (["--where", "float >= 1e39"], [0]),
        (["--where", "float in [1e39, 0.1, -inf]"], [1, 2]),
        (["--where", "float <= 1e39", "--where", "float > -1e39", "--where", "float < 1"], [2, 3]),
        (["--where", "price < 0.505", "--where", "price > -1e9", "--where", "price != inf"], [0, 1, 2]),
        (["--where", "price in [.25, +5e-1, 0.505, 100000, nan]"], [1, 2]),
        (["--rows", "10:20"], [10, 11]),
        (["--rows", "11:12"], [11]),
        (["--rows", "2:5", "--sample", "3"], [2, 3, 4]),
        (["--rows", "7:", "--where", "n > 9", "--sample", "1"], [10]),
        (["--rows", "rows.npy"], [7, 7, 0]),
        (["--rows", "mask.npy", "--where", "n > 1"], [2, 4, 7, 9]),
    ],
)
def test_rows_are_chosen(
    run: Run, typed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], rows: list[int]
) -> None:
    np.save(tmp_path / "rows.npy", [7, 7, 0])
    np.save(tmp_path / "mask.npy", np.arange(12) % 2 == np.arange(12) // 6)
    monkeypatch.chdir(tmp_path)
    code, out, err = run("convert", typed, "out", "-m", "x", "--json", *options)
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["rows"], facts["metadata"], facts["left_out"]) == (len(rows), ["x"], [])
    written = EmbeddingReader("out", "parquet_npy", meta_columns="*")
    [(vectors, meta)] = written(100, show_progress=False)
    assert vectors[:, 0].tolist() == rows == (2 * meta["x"]).tolist()


def test_every_command_chooses_rows(run: Run, typed: Path, tmp_path: Path) -> None:
    where = ["--where", "kind == b", "--where", "n > 3"]
    head = json.loads(run("head", typed, *where, "--json")[1])
    assert head == [{"row": row, "embedding": [row]} for row in (4, 7, 10)]
    assert json.loads(run("head", typed, "-m", "kind", *where, "--start", 1, "-n", 1, "--json")[1]) == [
        {"row": 7, "kind": "b", "embedding": [7]}
    ]
    stats = json.loads(run("stats", typed, *where, "--rows", ":10", "--json")[1])
    assert (stats["rows"], stats["norms"]["min"], stats["norms"]["max"]) == (2, 4, 7)
    np.save(tmp_path / "rows.npy", [7, 0, 7])
    stats = json.loads(run("stats", typed, "--rows", tmp_path / "rows.npy", "--json")[1])
    assert (stats["zero"], stats["duplicates"]["groups"]) == ({"rows": 1, "first_rows": [0]}, [[7, 7]])
    plan = json.loads(run("plan", typed, *where, "--batch-size", 2, "--json")[1])
    assert (plan["pieces"]["max_rows"], plan["batches"]["count"]) == (3, 2)
    assert run("plan", typed, *where, "--plot", tmp_path / "plan.png")[0] == 0
    sample = [json.loads(run("head", typed, "--sample", 4, "--seed", seed, "--json")[1]) for seed in (1, 1, 2)]
    assert len(sample[0]) == 4
    assert sample[0] == sample[1] != sample[2]
    assert run("convert", typed, tmp_path / "out", "--to", "npy", *where)[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "00000000.npy"), [[4], [7], [10]])
    assert run("convert", typed, tmp_path / "out", "--to", "npy", *where)[0] == 0, "done already"
    code, _, err = run("convert", typed, tmp_path / "out", "--to", "npy", "--where", "kind == a")
    assert code == 1
    assert "pass --overwrite" in err


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("word == '", ("'",)),
        ("word == ''", ("",)),
        ("word == 'a", ("'a",)),
        ("word == 'a\"", ("'a\"",)),
        ("word == 'a'", ("a",)),
        ("word == \"'a'\"", ("'a'",)),
        ("word == level-l", ("level-l",)),
        ("word in []", ()),
        ("word in [a]", ("a",)),
        ("word not  in ['a, b' , \"c'\",d e]", ("a, b", "c'", "d e")),
        ("word in [#a, b\\c]", ("#a", "b\\c")),
        ("word in [' a', \"b \", '', ' ']", (" a", "b ", "", " ")),
        ("word not in [O'Neill, D'Arcy, 5\" disk, a 'b]", ("O'Neill", "D'Arcy", '5" disk', "a 'b")),
        ("word in [ ]", ()),
        ("word in [a,, b, ]", ("a", "b")),
    ],
)
def test_quotes_are_taken_off_values_that_stand_in_them(text: str, values: tuple[str, ...]) -> None:
    assert parse_condition(text).values == values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "n"], "--where 'n' is no condition: a condition is COLUMN OPERATOR VALUE with ==, !=,"),
        (["--where", "n = 3"], "is no condition"),
        (["--where", "n =="], "names no value to compare with"),
        (["--where", "nn == 3"], "there is no column 'nn'; the columns are 'n', 'kind'"),
        (["--where", "n == three"], "--where 'n == three': the column is int64, and 'three' cannot be read as that"),
        (["--where", "price == 1_0"], "the column is decimal128(3, 2), and '1_0' cannot be read as that"),
        (["--where", "day == soon"], "the column is timestamp"),
        (["--where", "hour == noon"], "the column is time64[us], and 'noon' is none; write it like 03:30"),
        (["--where", "length > 5"], "and '5' is none; write it like 90s, 3h"),
        (["--where", "seen == perhaps"], "the column is bool"),
        (["--where", "list == 1"], "the column is list<"),
        (["--where", "n in 3"], "--where 'n in 3': after in a list is expected, such as [3]"),
        (["--where", "n in [3"], "after in a list is expected, such as [[3]"),
        (["--where", "n not in 3]"], "after not in a list is expected, such as [3]]"),
        (["--where", "n in "], "after in a list is expected, such as [a, b]"),
        (["--where", "kind in [a, 'b]"], "a quote of the list is not closed"),
        (["--where", "kind not in ['a' b]"], "a quote of the list is not closed"),
        (["--where", "n > 100"], "--where 'n > 100': none of 12 rows satisfies it"),
        (["-f", "npy", "--where", "n > 1"], "Error: --where 'n > 1': the npy files of this reader have no columns to "),
        (["--rows", "12:20"], "--rows 12:20 is no row: there are those from 0 to 11"),
        (["--rows", "5:2"], "--rows 5:2 is no row"),
        (["--rows", "some"], "expected are START:STOP, such as 10:20, or an .npy file of row numbers"),
        (["--rows", "gone.npy"], "--rows gone.npy: "),
        (["--rows", "none.npy"], "--rows none.npy holds no row number"),
        (["--rows", "{typed}/0.npy"], "must be a slice, a list of row numbers or a mask"),
        (["--sample", "13"], "--sample 13 draws no row twice, and there are 12 rows"),
        (["--sample", "0"], "0 is not in the range x>=1"),
        (["--seed", "1"], "give --sample too"),
    ],
)
def test_choices_that_make_no_sense_are_refused(
    run: Run, typed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("none.npy", np.empty(0, int))
    code, out, err = run("convert", typed, tmp_path / "out", *(option.format(typed=typed) for option in options))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert "Warning" not in err, "of -m, which was not given"
    assert not (tmp_path / "out").exists()


def test_a_column_that_is_not_there_is_told_of_the_option_that_names_it(run: Run, typed: Path) -> None:
    missing = "has no column 'nn'"
    for options in (["--where", "nn == 3"], ["-m", "n", "--where", "n == 3", "--where", "nn == 3"]):
        code, _, err = run("head", typed, *options)
        assert (code, missing in err) == (2, True)
        assert err.startswith("Error: --where 'nn == 3': ")
    code, _, err = run("head", typed, "-m", "nn", "--where", "nn == 3")
    assert (code, missing in err) == (1, True)
    assert "--where" not in err


def test_convert_says_what_npy_files_cannot_hold(run: Run, shards: Path, tmp_path: Path) -> None:
    code, out, err = run("convert", shards, tmp_path / "out", "-m", "word", "--to", "npy")
    assert (code, out) == (2, "")
    assert "npy files hold no metadata, which is asked for (word): --to parquet_npy keeps it" in " ".join(err.split())
    assert not (tmp_path / "out").exists()
    code, out, err = run("convert", shards, tmp_path / "out", "--to", "npy", "--dtype", "float16")
    assert code == 0
    assert "files     1 npy\n" in out
    assert run("convert", shards, tmp_path / "both", "-m", "word", "--to", "parquet")[0] == 0
    code, _, err = run("convert", tmp_path / "both", tmp_path / "alone", "--to", "npy")
    assert code == 0
    assert err.startswith("Not converted, since npy files hold no metadata: word. --to parquet_npy keeps it.")
    code, _, err = run("convert", shards, tmp_path / "out", "--to", "npy")
    assert code == 1
    assert "holds 1 file of other data already" in err
    assert "pass --overwrite to replace them" in err
    assert run("convert", shards, tmp_path / "out", "--to", "npy", "--overwrite")[0] == 0
    assert EmbeddingReader(tmp_path / "out").dtype == np.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "--dtype=int8 cannot hold vectors of float32; give --scale, the value that a step"),
        (["--to", "npy", "--dtype", "int8", "--scale", "-1"], "--scale=-1.0 must be a positive number"),
        (["--to", "parquet", "--dtype", "float128"], "give --dtype, or write --to parquet_npy"),
    ],
)
def test_what_is_refused_is_explained_in_options(
    run: Run, shards: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    code, _, err = run("convert", shards, tmp_path / "dtype=float32", "-f", "parquet_npy", *options)
    assert code in (1, 2)
    assert message in err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["nearest", "{folder}", "-r", "0"], "use --metric ip or --metric l2"),
        (["convert", "{folder}", "{out}", "--scale", "1"], "as float32; leave it out, or ask for --dtype int8"),
        (["head", "{folder}/i.parquet", "-m", "i"], "or leave it out of -m\n"),
        (["convert", "{folder}/0.npy", "{out}", "--to", "parquet_npy"], "that it was opened with: -m NAME)"),
        (["info", "{folder}", "-f", "npy", "-m", "word"], "for those elsewhere --metadata-folder\n"),
        (["info", "{folder}", "-f", "npy", "-m", "word"], "Warning: -m ['word'] is passed over: npy files have no"),
    ],
)
def test_errors_and_warnings_name_options_not_arguments(
    run: Run, tmp_path: Path, command: list[str], message: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    np.save(folder / "0.npy", np.zeros((2, 3), np.float32))
    pd.DataFrame({"embedding": [[0.0], [1.0]], "i": [0, 1]}).to_parquet(folder / "i.parquet")
    _, _, err = run(*(argument.format(folder=folder, out=tmp_path / "out") for argument in command))
    assert message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "--dtype=int8 cannot hold vectors of complex64; choose another\n"),
        (["--dtype", "int8", "--scale", "1"], "not for complex64 as int8; leave it out\n"),
        (["--to", "parquet"], "parquet files hold no vectors of complex64; write --to npy\n"),
    ],
)
def test_no_remedy_for_complex_vectors_is_refused_in_turn(
    run: Run, tmp_path: Path, options: list[str], message: str
) -> None:
    np.save(tmp_path / "complex.npy", np.ones((2, 3), np.complex64))
    code, _, err = run("convert", tmp_path / "complex.npy", tmp_path / "out", *options)
    assert (code, message in err) == (2, True)


def test_credentials_that_a_destination_needs_are_those_of_its_option(
    run: Run, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise errors.WriteError("check the credentials in storage_options")

    monkeypatch.setattr("dask_embedding_reader.cli.convert.write_embeddings", fail)
    code, _, err = run("convert", shards, tmp_path / "out", "-q")
    assert (code, err) == (1, "Error: check the credentials in --target-storage-options\n")


def test_verify_names_damaged_files_and_fails(run: Run, shards: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert run("convert", shards, target, "--rows-per-file", 10)[0] == 0
    assert run("verify", target) == (0, "all files are as they were written\n", "")
    damaged = target / "00000001.npy"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    code, out, _ = run("verify", target)
    assert (code, out) == (1, f"{damaged}: damaged: its content is not what was written\n")
    code, out, _ = run("verify", target, "--json")
    assert (code, [each["path"] for each in json.loads(out)]) == (1, [str(damaged)])
    assert "has no .manifest.embeddings" in run("verify", shards)[2]


INTERRUPTED_AT_FILE_20 = """
import os, threading
count, counting, interrupted, replace = 0, threading.Lock(), threading.Event(), os.replace

def interrupt(*_):
    if not interrupted.is_set():
        interrupted.set()
        raise KeyboardInterrupt

def replace_and_wait(source, target):
    global count
    replace(source, target)
    if target.endswith(".npy"):
        with counting:
            count += 1
        while count >= 20 and not interrupted.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            interrupted.wait(1)  # and again: the main thread sleeps on if it comes just as that falls asleep

signal.signal(signal.SIGINT, interrupt)
os.replace = replace_and_wait
"""
"""However busy the machine is, Ctrl-C comes when so many files have their names, and before many more have."""


@contextmanager
def start(*arguments: Any, before: str = "") -> Iterator[subprocess.Popen[str]]:
    # Background jobs of some shells start with Ctrl-C ignored, and pass that on.
    code = (
        f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{before}"
        "from dask_embedding_reader.cli.commands import main; main()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()  # if it hangs, no more than this test fails


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc")
def test_ctrl_c_ends_it_at_once_and_says_so(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.ones((20_000, 100), np.float32))
    with start("bench", tmp_path, "--seconds", 100) as process:

        def has_read_the_file_often() -> bool:
            return int(Path(f"/proc/{process.pid}/io").read_text().split()[1]) > 200_000_000

        assert wait_until(lambda: process.poll() is not None or has_read_the_file_often(), 60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err.strip()) == (130, "", "Interrupted")
    assert os.listdir(tmp_path) == ["0.npy"]


def test_a_conversion_that_ctrl_c_ended_goes_on(run: Run, tmp_path: Path) -> None:
    rows = np.arange(1_500, dtype=np.float32).reshape(750, 2)
    np.save(tmp_path / "0.npy", rows)
    target = tmp_path / "out"
    arguments = ["convert", tmp_path / "0.npy", target, "--rows-per-file", 1]

    with start(*arguments, before=INTERRUPTED_AT_FILE_20) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "Interrupted")
    assert 20 <= len(list(target.rglob("*.npy"))) < 750
    assert not list(target.rglob("*.tmp"))
    assert run("head", target)[0] == 1, "what is half written is not opened"
    assert run(*arguments)[0] == 0
    assert run("verify", target)[0] == 0
    [(vectors, _)] = EmbeddingReader(target)(750, show_progress=False)
    np.testing.assert_array_equal(vectors, rows)


def test_a_closed_pipe_is_no_error_to_talk_about(shards: Path) -> None:
    with start("head", shards, "--json") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 141  # what shells make of SIGPIPE


def test_help_imports_nothing_heavy() -> None:
    """What makes `--help` start at once; with numpy alone it would take twice as long."""
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(sorted({'numpy', 'pandas', 'dask', 'pyarrow', 'fsspec'} & set(sys.modules))))\n"
        "from dask_embedding_reader.cli.commands import main; main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["info", "head", "plan", "stats", "convert", "verify", "bench"])
def test_every_command_explains_itself(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "--json" in out
    assert "Traceback" not in out
