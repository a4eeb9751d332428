"""Damaged and hostile input: only right data or an exception of the library may come of it (see ``tests.fuzz``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from dask_embedding_reader.errors import FormatError
from dask_embedding_reader.formats.metadata import MetaField, make_frame
from tests.fuzz.guard import guarded
from tests.fuzz.run import feed, fuzz, load_corpus, unpack
from tests.fuzz.targets import TARGETS

pytestmark = [
    # Some damaged headers look like those of Python 2, which numpy reads with a warning.
    pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),
]


@pytest.fixture(autouse=True)
def small_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths among the arguments shall lead to nothing large."""
    (tmp_path / "a" / "e").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")


@pytest.fixture
def run() -> Iterator[Any]:
    with guarded() as run:
        yield run


@pytest.mark.parametrize("target", TARGETS)
def test_undamaged_input_is_read(run: Any, target: str) -> None:
    from tests.fuzz import seeds, targets

    inputs = {
        "npy": seeds.npy_seeds()[:1],
        "parquet footer": seeds.parquet_seeds(),
        "local npy": seeds.npy_seeds()[:1],
        "local parquet": [*seeds.plain_seeds(), *seeds.parquet_seeds()],
        **seeds.other_seeds(),
        "manifest": targets.manifests(),
        "local manifest": targets.local_manifests(),
    }
    for data in inputs.get(target, []):
        assert feed(run, target, data) == "read"


@pytest.mark.parametrize("target", TARGETS)
def test_a_few_hundred_inputs_find_no_fault(target: str) -> None:
    count = {"npy": 1_000, "parquet footer": 500, "local parquet": 500}.get(target, 100)
    assert [found.what for found in fuzz(count, 7, target)] == []


@pytest.mark.parametrize("entry", load_corpus(), ids=lambda entry: entry["what"][:60])
def test_what_once_found_a_fault_finds_none_now(run: Any, entry: dict[str, str]) -> None:
    assert not feed(run, entry["target"], unpack(entry)).startswith("fault")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_damaged_inputs_by_the_thousand_find_no_fault(seed: int) -> None:
    """A million at once takes two hours of one core: ``python -m tests.fuzz --inputs 1000000 --seed 1``."""
    assert [found.what for found in fuzz(20_000, seed)] == []


def test_nulls_that_the_statistics_deny_are_no_floats() -> None:
    """A damaged page found this: integers came back as floating-point numbers."""
    table = pa.table({"id": pa.array([1, None, 3], pa.int64())})
    with pytest.raises(FormatError, match=r"a\.parquet: column 'id' holds nulls, but its statistics .* none"):
        make_frame([MetaField("id", pa.int64(), has_nulls=False)], table, pd.RangeIndex(3), "a.parquet")


@pytest.mark.parametrize(
    ("promised", "stored"),
    [
        (pa.duration("s"), pa.array(["1", "2"])),  # a damaged manifest found this: pyarrow's own error
        (pa.int64(), pa.array(["1", "2"])),  # these would have become other values, or the same in another type
        (pa.timestamp("ns"), pa.array([1, 2])),
        (pa.int8(), pa.array([1, 2])),
        (pa.large_string(), pa.array([1, 2])),
        (pa.timestamp("s"), pa.array([1_000, 1_500], pa.timestamp("ms"))),
        (pa.list_(pa.int8()), pa.array([[1], [300]], pa.list_(pa.int64()))),
    ],
    ids=str,
)
def test_metadata_of_another_type_than_was_promised(promised: pa.DataType, stored: pa.Array) -> None:
    fields = [MetaField("id", promised, has_nulls=True)]
    with pytest.raises(FormatError, match=r"a\.parquet: column 'id' is .*, which does not hold the promised"):
        make_frame(fields, pa.table({"id": stored}), pd.RangeIndex(2), "a.parquet")
