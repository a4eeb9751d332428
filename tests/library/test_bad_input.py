"""Whatever is wrong with the input ends in a clear error before wrong data can appear.

Each test names the exception, which must be the builtin one too, and the essentials of its message: the file, what was
found, what was expected. Whole sentences are not pinned.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import re
import stat
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_embedding_reader import EmbeddingReader, get_file_list, verify_embeddings, write_embeddings
from dask_embedding_reader.errors import (
    ArgumentError,
    ArgumentTypeError,
    ColumnError,
    EmbeddingReaderError,
    FileChangedError,
    FormatError,
    MismatchError,
    NoFilesError,
    ReadError,
)
from dask_embedding_reader.storage import store as storage
from dask_embedding_reader.storage.find import MANIFEST_NAME
from tests.support.collections import finishes, skipping_what_pyarrow_lacks
from tests.support.stores import Bucket, BucketFileSystem, Request, emptied_bucket

#: What a caller who knows Python would catch.
BUILTIN: dict[type[EmbeddingReaderError], type[Exception]] = {
    ArgumentError: ValueError,
    ArgumentTypeError: TypeError,
    ColumnError: KeyError,
    FileChangedError: OSError,
    FormatError: ValueError,
    MismatchError: ValueError,
    NoFilesError: FileNotFoundError,
    ReadError: OSError,
}
ANY_ARGUMENT_ERROR = (ArgumentError, ArgumentTypeError)

#: A piece of the message; of several in a tuple, one will do.
Fragment = str | tuple[str, ...]
Kind = type[EmbeddingReaderError] | tuple[type[EmbeddingReaderError], ...]


@contextmanager
def refused(kind: Kind, *fragments: Fragment) -> Iterator[pytest.ExceptionInfo[EmbeddingReaderError]]:
    """The block ends in an error of this kind that says these things."""
    with pytest.raises(kind) as info:
        yield info
    error = info.value
    assert isinstance(error, EmbeddingReaderError)
    assert all(isinstance(error, builtin) for own, builtin in BUILTIN.items() if isinstance(error, own))
    # 1,000 and 1_000 are 1000.
    text = re.sub(r"(?<=\d)[,_](?=\d{3})", "", str(error)).lower()
    assert len(text) > 15, "an error has to say more"
    if isinstance(error, KeyError):
        assert "\\n" not in text, "a KeyError must not show its message as a repr"
    for fragment in fragments:
        choices = (fragment,) if isinstance(fragment, str) else fragment
        assert any(choice.lower() in text for choice in choices), f"none of {choices} in: {error}"


#: All the ways of reading a collection to its end.
WAYS: dict[str, Callable[[EmbeddingReader], Any]] = {
    "array": lambda reader: reader.to_dask_array().compute(),
    "small pieces": lambda reader: reader.to_dask_array(max_piece_size=2).compute(),
    "batches": lambda reader: list(reader(batch_size=3, show_progress=False)),
}
every_way = pytest.mark.parametrize("way", list(WAYS))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An object store that does what a test tells it, and is asked again at once."""
    monkeypatch.setattr("dask_embedding_reader.storage.retries.FIRST_PAUSE_SECONDS", 0.001)
    with emptied_bucket() as store:
        yield store


def npy(rows: Any, dtype: Any = None, allow_pickle: bool = False) -> bytes:
    """An npy file."""
    with io.BytesIO() as f:
        np.save(f, np.asarray(rows, dtype), allow_pickle=allow_pickle)
        return f.getvalue()


def raw_npy(header: bytes | str, body: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """An npy file of any header."""
    header = header.encode() if isinstance(header, str) else header
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version[0] == 1 else "<I", len(header)) + header + body


def vectors(rows: int, dimension: int = 4) -> Any:
    """Some vectors."""
    return np.arange(rows * dimension, dtype=np.float32).reshape(rows, dimension)


def write_npy(folder: Path, **files: Any) -> Path:
    """npy files of these arrays, or of these very bytes."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.npy").write_bytes(content if isinstance(content, bytes) else npy(content))
    return folder


def write_parquet(folder: Path, name: str, columns: dict[str, Any], **options: Any) -> Path:
    """A parquet file of these columns."""
    folder.mkdir(exist_ok=True)
    with skipping_what_pyarrow_lacks():  # such as null vectors of fixed size
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", **options)
    return folder


FLOATS = pa.list_(pa.float32())


# --------------------------------------------------------------------------------------------------------------------
# Nothing there


@pytest.mark.parametrize("file_format", ["npy", "parquet", "parquet_npy"])
def test_a_missing_folder_is_named(tmp_path: Path, file_format: str) -> None:
    with refused(NoFilesError, str(tmp_path / "nowhere")):
        EmbeddingReader(tmp_path / "nowhere", file_format)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_npy(tmp_path, a=vectors(2))
    with refused(NoFilesError, str(tmp_path / "b.npy")):
        EmbeddingReader(tmp_path / "b.npy")


def test_a_missing_folder_elsewhere_is_named(bucket: Bucket) -> None:
    with refused(NoFilesError, "bucket://no/where"):
        EmbeddingReader("bucket://no/where")
    with refused(NoFilesError, "no-such-folder"):
        EmbeddingReader("memory://no-such-folder")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with refused(NoFilesError, str(tmp_path), ".npy"):
        EmbeddingReader(tmp_path)


def test_a_glob_without_a_match_is_named(tmp_path: Path) -> None:
    write_npy(tmp_path, a=vectors(2))
    with refused(NoFilesError, f"{tmp_path}/b*.npy"):
        EmbeddingReader(f"{tmp_path}/b*.npy")


def test_the_missing_one_of_a_list_is_named(tmp_path: Path) -> None:
    # The others would be a collection, but not the one that was asked for.
    write_npy(tmp_path / "here", a=vectors(2))
    with refused(NoFilesError, str(tmp_path / "gone")):
        EmbeddingReader([tmp_path / "here", tmp_path / "gone"])


def test_empty_ones_of_a_list_are_named(tmp_path: Path) -> None:
    for name in ("hollow", "void"):
        (tmp_path / name).mkdir()
    with refused(NoFilesError, str(tmp_path / "hollow"), str(tmp_path / "void")):
        EmbeddingReader([tmp_path / "hollow", tmp_path / "void"])


def test_files_of_another_format_are_counted_and_the_format_suggested(tmp_path: Path) -> None:
    for k in range(10):
        (tmp_path / f"{k}.parquet").write_bytes(b"x")
    for k in range(2):
        (tmp_path / f"{k}.json").write_bytes(b"{}")
    with refused(
        NoFilesError, str(tmp_path), "12 files", "10 .parquet", "2 .json", 'did you mean file_format="parquet"?'
    ):
        EmbeddingReader(tmp_path, "npy")


def test_npy_files_suggest_the_npy_format(tmp_path: Path) -> None:
    write_npy(tmp_path, a=vectors(2), b=vectors(2))
    with refused(NoFilesError, "2 .npy", 'did you mean file_format="npy"?'):
        EmbeddingReader(tmp_path, "parquet")


@pytest.mark.parametrize("fields", [3, 120, 800])
def test_items_of_several_fields_are_said_to_be_no_numbers_in_a_line(tmp_path: Path, fields: int) -> None:
    np.save(tmp_path / "0.npy", np.zeros(5, [(f"alignment_{k}/field", "f4") for k in range(fields)]))
    with refused(FormatError, "0.npy", "fields", "not numbers; save the field that holds the vectors") as info:
        EmbeddingReader(tmp_path)
    said = str(info.value)
    assert len(said) < len(str(tmp_path)) + 400
    assert not [word for word in ("allow_pickle", "max_header_size", "\n") if word in said]


def test_a_damaged_header_is_said_to_be_so_in_a_line(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", vectors(2))
    content = (tmp_path / "0.npy").read_bytes()
    (tmp_path / "0.npy").write_bytes(content.replace(b"'descr': '<f4'", b"'desc\n': ('<' "))
    with refused(FormatError, "0.npy", "header is malformed") as info:
        EmbeddingReader(tmp_path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("content", "remedy"), [(b"PAR1" * 9, 'open it with file_format="parquet"'), (b"x" * 99, "npy")]
)
def test_a_named_file_of_another_kind_is_told_what_can_be_read(tmp_path: Path, content: bytes, remedy: str) -> None:
    (tmp_path / "x.h5").write_bytes(content)
    with refused(FormatError, "x.h5", remedy):
        EmbeddingReader(tmp_path / "x.h5", "npy")


@pytest.mark.parametrize("options", [{"embedding_column": "\ud800"}, {"meta_columns": ["\udcff"]}])
def test_names_of_columns_that_no_file_can_have(tmp_path: Path, options: Any) -> None:
    write_npy(tmp_path, a=vectors(2))
    with refused(ArgumentError, next(iter(options)), "half a character"):
        EmbeddingReader(tmp_path, "parquet", **options)


def test_of_files_of_no_known_format_the_known_ones_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"{}")
    known = "what can be read are .npy files", '.parquet files (file_format="parquet")'
    with refused(NoFilesError, "found instead 1 file: 1 .json", *known) as info:
        EmbeddingReader(tmp_path)
    assert "did you mean" not in str(info.value)


@pytest.mark.parametrize("place", ["local", "memory"])
def test_without_a_metadata_folder_the_likely_one_is_named(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path) if place == "local" else f"memory://{tmp_path.name}"
    fs, path = fsspec.core.url_to_fs(root)
    for name in ("clip/img_emb/0.npy", "clip/metadata/0.parquet", "clip/text_emb/0.npy"):
        fs.makedirs(f"{path}/{name.rpartition('/')[0]}", exist_ok=True)
        fs.pipe_file(f"{path}/{name}", b"x")
    monkeypatch.chdir(tmp_path / "clip" if place == "local" else tmp_path)
    names = [f"{root}/clip/img_emb", f"{root}/clip/img_emb/"] + ["img_emb", "./img_emb"] * (place == "local")
    for name in names:
        likely = f"{name.rstrip('/').removesuffix('img_emb')}metadata"
        with refused(NoFilesError, name, f"metadata_folder={likely!r}"):
            EmbeddingReader(name, "parquet_npy", meta_columns=["word"])
    with refused(NoFilesError, "say where it is: metadata_folder=..."):
        EmbeddingReader(f"{root}/clip/img_emb/0.npy", "parquet_npy", meta_columns=["word"])


@pytest.mark.parametrize(("file_format", "columns"), [("npy", ["x"]), ("npy", "x"), ("parquet", ["x"])])
def test_arguments_that_a_format_has_no_use_for_are_passed_over_with_a_warning(
    tmp_path: Path, file_format: str, columns: Any
) -> None:
    np.save(tmp_path / "0.npy", vectors(2))
    pq.write_table(pa.table({"embedding": vectors(2).tolist(), "x": [1, 2]}), tmp_path / "0.parquet")
    with pytest.warns(UserWarning, match="metadata_folder is passed over|meta_columns=.* is passed over") as told:
        reader = EmbeddingReader(tmp_path, file_format, meta_columns=columns, metadata_folder=tmp_path / "nowhere")
    assert len(told) == 1 + (file_format == "npy")
    assert {Path(warning.filename) for warning in told} == {Path(__file__)}
    meta = next(reader(2, show_progress=False))[1]
    assert list(meta.columns) == (["i"] if file_format == "npy" else ["x", "i"])


def test_the_metadata_folder_is_named_when_it_is_missing_or_empty(tmp_path: Path) -> None:
    write_npy(tmp_path / "emb", a=vectors(2))
    (tmp_path / "hollow").mkdir()
    for name in ("gone", "hollow"):
        with refused(NoFilesError, str(tmp_path / name)):
            EmbeddingReader(tmp_path / "emb", "parquet_npy", metadata_folder=tmp_path / name)


def test_a_pair_needs_metadata_in_its_own_folder_when_no_other_is_given(tmp_path: Path) -> None:
    write_npy(tmp_path, a=vectors(2))
    with refused((NoFilesError, MismatchError), str(tmp_path), "parquet"):
        EmbeddingReader(tmp_path, "parquet_npy", meta_columns=["caption"])


def test_a_collection_without_a_single_row_is_nothing(tmp_path: Path) -> None:
    write_npy(tmp_path, a=vectors(0), b=np.zeros(0, np.float32))
    with refused(NoFilesError, str(tmp_path), "row"):
        EmbeddingReader(tmp_path)
    write_parquet(tmp_path / "p", "a", {"embedding": pa.array([], FLOATS)})
    with refused(NoFilesError, str(tmp_path / "p")):
        EmbeddingReader(tmp_path / "p", "parquet")


def test_a_zero_byte_file_that_was_asked_for_is_named(tmp_path: Path) -> None:
    # Passed over in a folder, but who names a file wants it.
    (tmp_path / "a.npy").touch()
    for where in (tmp_path / "a.npy", [tmp_path / "a.npy"]):
        with refused((FormatError, NoFilesError), str(tmp_path / "a.npy"), ("empty", "0 bytes", "zero")):
            EmbeddingReader(where)


def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path: Path) -> None:
    # Reading it would block for ever.
    write_npy(tmp_path, a=vectors(2))
    os.mkfifo(tmp_path / "pipe.npy")
    assert finishes(lambda: EmbeddingReader(tmp_path).count, 20) == 2


# --------------------------------------------------------------------------------------------------------------------
# npy: files that are none

HEADER = "{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


def header(descr: str = "'<f4'", fortran: str = "False", shape: str = "(3, 4)") -> str:
    """The text of an npy header."""
    return HEADER.format(descr=descr, fortran=fortran, shape=shape)


BODY = vectors(3).tobytes()
GOOD = raw_npy(header(), BODY)

NOT_NPY: dict[str, bytes] = {
    "garbage": b"this is not a numpy file at all, but some text that is long enough for a header" * 3,
    "zeros": bytes(500),
    "parquet": b"PAR1" + bytes(300) + b"PAR1",
    "zip (npz)": b"PK\x03\x04" + bytes(300),
    "magic in part": b"\x93NUMP" + bytes(300),
    "magic of another case": b"\x93numpy\x01\x00" + GOOD[8:],
    "version 0": b"\x93NUMPY\x00\x00" + GOOD[8:],
    "version 4": b"\x93NUMPY\x04\x00" + GOOD[8:],
    "version 1.9": b"\x93NUMPY\x01\x09" + GOOD[8:],
    "only the magic": GOOD[:6],
    "only the version": GOOD[:8],
    "half the header length": GOOD[:9],
    "no header": GOOD[:10],
    "half a header": GOOD[:50],
    "one byte": b"\x93",
    "header length of zero": b"\x93NUMPY\x01\x00\x00\x00" + BODY,
    "header longer than the file": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + GOOD[10:],
    "header of version 1 longer than the file": b"\x93NUMPY\x01\x00\xff\xff" + GOOD[10:],
    "header is not Python": raw_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4", BODY),
    "header is a list": raw_npy("['<f4', False, (3, 4)]", BODY),
    "header is a number": raw_npy("5", BODY),
    "header is empty": raw_npy("", BODY),
    "header is bytes of no text": raw_npy(b"\xff\xfe\x00\x80" * 10, BODY),
    "header of version 3 is not UTF-8": raw_npy(b"{'descr': '<f4\xff'}", BODY, (3, 0)),
    "header of version 3 is not UTF-8 in a comment": raw_npy(header().encode() + b"  # \x89", BODY, (3, 0)),
    "header with null characters": raw_npy(header().replace("False", "Fal\0se"), BODY),
    "header without shape": raw_npy("{'descr': '<f4', 'fortran_order': False}", BODY),
    "header without descr": raw_npy("{'fortran_order': False, 'shape': (3, 4)}", BODY),
    "header with another key": raw_npy(header()[:-1] + "'more': 1}", BODY),
    "header nested too deep": raw_npy("[" * 60000, BODY),
    "header with signs without end": raw_npy("-" * 60000 + "1", BODY),
    "a number of 10000 digits": raw_npy(header(shape=f"({'9' * 10000}, 4)"), BODY),
    "shape is a list": raw_npy(header(shape="[3, 4]"), BODY),
    "shape is text": raw_npy(header(shape="'34'"), BODY),
    "shape is a number": raw_npy(header(shape="12"), BODY),
    "shape holds floats": raw_npy(header(shape="(3.0, 4)"), BODY),
    "shape holds None": raw_npy(header(shape="(None, 4)"), BODY),
    "shape holds text": raw_npy(header(shape="('3', 4)"), BODY),
    "negative rows": raw_npy(header(shape="(-3, 4)"), BODY),
    "negative dimension": raw_npy(header(shape="(3, -4)"), BODY),
    "twice negative": raw_npy(header(shape="(-3, -4)"), BODY),
    "fortran_order is text": raw_npy(header(fortran="'no'"), BODY),
    "descr is no dtype": raw_npy(header("'<q9'"), BODY),
    "descr is None": raw_npy(header("None"), BODY),
    "descr is a number": raw_npy(header("4"), BODY),
    "descr is empty": raw_npy(header("''"), BODY),
    "descr is a list of nonsense": raw_npy(header("[('a',)]"), BODY),
    "descr with a shape": raw_npy(header("('<f4', (2,))"), BODY + BODY),
}


@pytest.mark.parametrize("content", NOT_NPY.values(), ids=NOT_NPY.keys())
def test_a_file_that_is_no_npy_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    write_npy(tmp_path, good=GOOD, odd=content)
    with refused(FormatError, str(tmp_path / "odd.npy")):
        EmbeddingReader(tmp_path)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        pytest.param(npy(np.zeros((3, 4, 5))), ["(3, 4, 5)"], id="3-D"),
        pytest.param(npy(np.zeros((2, 3, 4, 5))), ["(2, 3, 4, 5)"], id="4-D"),
        pytest.param(npy(np.zeros(7)), ["(7,)"], id="1-D"),
        pytest.param(npy(5.0), ["()"], id="0-D"),
        pytest.param(npy([["a", "bcde"]], "U5"), [("<u5", "str")], id="text"),
        pytest.param(npy([[b"a", b"bcd"]], "S3"), [("s3", "bytes")], id="bytes"),
        pytest.param(npy([[b"a", b"bcd"]], "V4"), [("v4", "void")], id="void"),
        pytest.param(npy(np.zeros((3, 4), [("a", "<f4"), ("b", "<f4")])), ["a", "b"], id="records"),
        pytest.param(npy([["2001-01-01"]], "M8[s]"), [("m8[s]", "datetime64")], id="times"),
        pytest.param(npy(np.zeros((3, 4, 0))), ["(3, 4, 0)"], id="3-D of nothing"),
    ],
)
def test_arrays_that_are_no_vectors_are_refused_with_what_they_are(
    tmp_path: Path, content: bytes, fragments: list[Fragment]
) -> None:
    write_npy(tmp_path, odd=content)
    with refused(FormatError, str(tmp_path / "odd.npy"), *fragments):
        EmbeddingReader(tmp_path)


def test_vectors_without_a_dimension_are_refused(tmp_path: Path) -> None:
    # Five rows of nothing: no byte belongs to them, and every size would be divided by zero.
    write_npy(tmp_path, odd=np.zeros((5, 0), np.float32))
    with refused((FormatError, NoFilesError), str(tmp_path)):
        EmbeddingReader(tmp_path)


class TouchesAFile:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.mark, "w")


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    payload = pickle.dumps(TouchesAFile(str(mark)))
    pickle.loads(payload).close()
    assert mark.exists(), "the payload itself is broken"
    mark.unlink()
    rows = np.empty((3, 4), object)
    rows[:] = 1.0
    bad = write_npy(tmp_path / "bad", odd=raw_npy(header("'|O'"), payload))
    with refused(FormatError, "odd.npy", "object"):
        EmbeddingReader(bad)
    write_npy(tmp_path / "bad", odd=npy(rows, object, allow_pickle=True))
    with refused(FormatError, "odd.npy", "object"):
        EmbeddingReader(bad)
    # The same in a record, and where the size happens to fit.
    write_npy(tmp_path / "bad", odd=raw_npy(header("[('a', '|O')]"), payload))
    with refused(FormatError, "odd.npy"):
        EmbeddingReader(bad)
    write_npy(tmp_path / "bad", odd=raw_npy(header("'|O'", shape="(1, 1)"), payload[:8]))
    with refused(FormatError, "odd.npy"):
        EmbeddingReader(bad)
    assert not mark.exists()


@pytest.mark.parametrize("expression", ["__import__('pathlib').Path({mark!r}).touch()", "open({mark!r}, 'w')"])
@pytest.mark.parametrize("place", ["whole", "descr", "shape"])
def test_a_header_is_never_executed(tmp_path: Path, expression: str, place: str) -> None:
    mark = tmp_path / "mark"
    code = expression.format(mark=str(mark))
    text = {"whole": code, "descr": header(descr=code), "shape": header(shape=f"({code}, 4)")}[place]
    folder = write_npy(tmp_path / "bad", odd=raw_npy(text, BODY))
    with refused(FormatError, "odd.npy"):
        EmbeddingReader(folder)
    assert not mark.exists()


# --------------------------------------------------------------------------------------------------------------------
# npy: header and size disagree


@pytest.mark.parametrize("missing", [1, 15, 16, 47, 48])
@pytest.mark.parametrize("fortran", ["True", "False"])
def test_a_truncated_body_is_refused_with_both_sizes(tmp_path: Path, missing: int, fortran: str) -> None:
    content = raw_npy(header(fortran=fortran), BODY)
    write_npy(tmp_path, odd=content[:-missing], good=GOOD)
    sizes = [(str(len(content)), str(len(BODY)), "(3, 4)"), (str(len(content) - missing), str(len(BODY) - missing))]
    with refused(FormatError, "odd.npy", *sizes):
        EmbeddingReader(tmp_path)


@pytest.mark.parametrize("extra", [1, 16, 48, 1000])
def test_trailing_bytes_are_refused_and_not_lost(tmp_path: Path, extra: int) -> None:
    write_npy(tmp_path, odd=GOOD + bytes(extra), good=GOOD)
    with refused(FormatError, "odd.npy", (str(len(GOOD) + extra), str(extra))):
        EmbeddingReader(tmp_path)


def test_two_files_in_one_are_refused_and_not_lost(tmp_path: Path) -> None:
    write_npy(tmp_path, odd=GOOD + GOOD)
    with refused(FormatError, "odd.npy"):
        EmbeddingReader(tmp_path)


@pytest.mark.parametrize(
    "shape",
    [
        "(1000000000000, 4)",
        "(3, 1000000000000)",
        "(4611686018427387904, 4)",  # 2**62 rows: their bytes overflow int64 to 0
        "(4611686018427387904, 4611686018427387904)",
        "(18446744073709551616, 4)",  # 2**64
        "(18446744073709551619, 4)",  # 2**64 + 3 is 3 when cut to 64 bits
        f"({10**30}, {10**30})",
        f"(0, {2**70})",
    ],
)
def test_a_header_that_claims_the_world_is_refused_without_allocating(tmp_path: Path, shape: str) -> None:
    write_npy(tmp_path / "good", a=GOOD)
    EmbeddingReader(tmp_path / "good")  # what the first one imports is not counted
    folder = write_npy(tmp_path / "bad", odd=raw_npy(header(shape=shape), BODY))
    tracemalloc.start()
    try:
        with refused(FormatError, "odd.npy"):
            EmbeddingReader(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16_000_000


def test_a_header_length_that_claims_the_world_allocates_nothing(tmp_path: Path) -> None:
    folder = write_npy(tmp_path / "bad", odd=NOT_NPY["header longer than the file"])
    tracemalloc.start()
    try:
        with refused(FormatError, "odd.npy"):
            EmbeddingReader(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16_000_000


def test_a_file_cut_anywhere_is_refused(bucket: Bucket) -> None:
    for length in range(1, len(GOOD)):
        bucket.put("emb/odd.npy", GOOD[:length])
        with refused(FormatError, "odd.npy"):
            EmbeddingReader("bucket://emb")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(GOOD) - len(BODY) - 1), value=st.integers(0, 255))
def test_any_damage_to_a_header_is_a_clear_error_or_none(bucket: Bucket, place: int, value: int) -> None:
    content = bytearray(GOOD)
    content[place] = value
    bucket.put("emb/odd.npy", bytes(content))
    try:
        reader = EmbeddingReader("bucket://emb")
    except (FormatError, NoFilesError):  # (3, 4) may have become (0, 4)
        return
    # Still a header of vectors that fill the file: "<f4" may have become ">f4", and (3, 4) may not become (9, 4).
    assert reader.total_size == len(BODY)
    assert reader.to_dask_array().compute().nbytes == len(BODY)


# --------------------------------------------------------------------------------------------------------------------
# parquet: files that are none


def parquet_bytes(columns: dict[str, Any], **options: Any) -> bytes:
    """A parquet file of these columns."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, **options)
    return bytes(sink.getvalue())


GOOD_PARQUET = parquet_bytes({"embedding": pa.array(vectors(3).tolist(), FLOATS), "caption": ["a", "b", "c"]})

NOT_PARQUET: dict[str, bytes] = {
    "garbage": b"this is not a parquet file at all, only some text, long enough for every footer" * 3,
    "one byte": b"P",
    "only the magic": b"PAR1",
    "twice the magic": b"PAR1PAR1",
    "npy": GOOD,
    "footer cut off": GOOD_PARQUET[:-1],
    "footer cut in half": GOOD_PARQUET[:-100],
    "first half": GOOD_PARQUET[: len(GOOD_PARQUET) // 2],
    "another magic at the end": GOOD_PARQUET[:-4] + b"PAR2",
    "footer longer than the file": GOOD_PARQUET[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1",
    "footer of a negative length": GOOD_PARQUET[:-8] + struct.pack("<i", -5) + b"PAR1",
    "footer of length 0": GOOD_PARQUET[:-8] + struct.pack("<I", 0) + b"PAR1",
    "footer of garbage": GOOD_PARQUET[:-60] + b"\xff" * 52 + GOOD_PARQUET[-8:],
    "encrypted footer": GOOD_PARQUET[:-4] + b"PARE",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("content", NOT_PARQUET.values(), ids=NOT_PARQUET.keys())
def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "good.parquet").write_bytes(GOOD_PARQUET)
    (tmp_path / "odd.parquet").write_bytes(content)
    with refused(FormatError, str(tmp_path / "odd.parquet")):
        EmbeddingReader(tmp_path, "parquet")


@pytest.mark.parametrize("content", NOT_PARQUET.values(), ids=NOT_PARQUET.keys())
def test_metadata_that_is_no_parquet_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    write_npy(tmp_path, a=vectors(3))
    (tmp_path / "a.parquet").write_bytes(content)
    with refused(FormatError, str(tmp_path / "a.parquet")):
        EmbeddingReader(tmp_path, "parquet_npy", meta_columns=["caption"])


def test_a_parquet_file_cut_anywhere_is_refused(bucket: Bucket) -> None:
    for length in range(1, len(GOOD_PARQUET), 7):
        bucket.put("emb/odd.parquet", GOOD_PARQUET[:length])
        with refused(FormatError, "odd.parquet"):
            EmbeddingReader("bucket://emb", "parquet")


PARQUET_FOOTER_NBYTES = struct.unpack("<I", GOOD_PARQUET[-8:-4])[0] + 8


# Only the pages are damaged: a footer with one wrong byte in the wrong place makes pyarrow abort the whole process.
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(GOOD_PARQUET) - PARQUET_FOOTER_NBYTES - 1), value=st.integers(0, 255))
def test_any_damage_to_the_pages_of_parquet_is_a_clear_error_or_none(bucket: Bucket, place: int, value: int) -> None:
    # Pages carry no checksum by default, so other values cannot be noticed; other shapes and crashes can.
    content = bytearray(GOOD_PARQUET)
    content[place] = value
    bucket.put("emb/odd.parquet", bytes(content))
    with suppress(FormatError):
        reader = EmbeddingReader("bucket://emb", "parquet", meta_columns=["caption"])
        assert reader.to_dask_array().compute().shape == (3, 4)
        assert len(reader.to_dask_dataframe().compute()) == 3


# --------------------------------------------------------------------------------------------------------------------
# parquet: columns

COLUMNS: dict[str, Any] = {
    "alpha": [1, 2, 3],
    "caption": ["a", "b", "c"],
    "embedding": pa.array(vectors(3).tolist(), FLOATS),
    "zeta": [1.0, 2.0, 3.0],
}


@pytest.mark.parametrize(
    ("asked", "nearest"), [("embeding", "embedding"), ("captions", "caption"), ("Zeta", "zeta"), ("alhpa", "alpha")]
)
def test_a_missing_column_is_refused_with_those_there_are_nearest_first(
    tmp_path: Path, asked: str, nearest: str
) -> None:
    write_parquet(tmp_path, "0", COLUMNS)
    with refused(ColumnError, asked, "0.parquet", *COLUMNS) as info:
        EmbeddingReader(tmp_path, "parquet", meta_columns=[asked])
    # What was asked for may stand anywhere; of the names that exist, the nearest stands first.
    text = str(info.value).replace(str(tmp_path), "").replace(repr(asked), "").replace(f'"{asked}"', "")
    assert min(COLUMNS, key=text.index) == nearest


def test_a_column_missing_in_a_later_file_is_refused_by_that_file(tmp_path: Path) -> None:
    write_parquet(tmp_path, "0", COLUMNS)
    write_parquet(tmp_path, "1", {name: column for name, column in COLUMNS.items() if name != "caption"})
    with refused(ColumnError, "1.parquet", "caption"):
        EmbeddingReader(tmp_path, "parquet", meta_columns=["caption"])
    write_parquet(tmp_path, "1", {name: column for name, column in COLUMNS.items() if name != "embedding"})
    with refused(ColumnError, "1.parquet", "embedding"):
        EmbeddingReader(tmp_path, "parquet")


def test_a_missing_metadata_column_of_a_pair_is_refused(tmp_path: Path) -> None:
    write_npy(tmp_path, a=vectors(3))
    write_parquet(tmp_path, "a", {"caption": ["a", "b", "c"]})
    with refused(ColumnError, "a.parquet", "captoin", "caption"):
        EmbeddingReader(tmp_path, "parquet_npy", meta_columns=["captoin"])


@pytest.mark.parametrize("meta_columns", ["i", ["i"], ["caption", "i"]])
@pytest.mark.parametrize("file_format", ["parquet", "parquet_npy"])
def test_the_name_of_the_row_number_is_taken(tmp_path: Path, meta_columns: Any, file_format: str) -> None:
    # The reference overwrites such a column without a word.
    write_npy(tmp_path, a=vectors(3))
    write_parquet(tmp_path, "a", {**COLUMNS, "i": [7, 8, 9]})
    with refused(ColumnError, ("'i'", '"i"', "`i`"), ("row", "number")):
        EmbeddingReader(tmp_path, file_format, meta_columns=meta_columns)


UNUSABLE: dict[str, Any] = {
    "string": pa.array(["a", "b", "c"]),
    "float": pa.array([1.0, 2.0, 3.0], pa.float32()),
    "int": pa.array([1, 2, 3], pa.int64()),
    "list<string>": pa.array([["a"], ["b"], ["c"]], pa.list_(pa.string())),
    "list<bool>": pa.array([[True], [True], [False]], pa.list_(pa.bool_())),
    "list of lists of lists": pa.array([[[[1.0]]]] * 3, pa.list_(pa.list_(pa.list_(pa.float32())))),
    "struct": pa.array([{"x": 1.0}] * 3, pa.struct([("x", pa.float32())])),
    "map": pa.array([[("a", 1.0)]] * 3, pa.map_(pa.string(), pa.float32())),
    "null": pa.nulls(3),
}


@pytest.mark.parametrize("column", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_column_that_holds_no_vectors_is_refused_with_its_type(tmp_path: Path, column: Any) -> None:
    write_parquet(tmp_path, "0", {"caption": ["a", "b", "c"], "embedding": column})
    kind = str(column.type).split("<")[0].split("[")[0]
    with refused((ColumnError, FormatError), "0.parquet", "embedding", kind):
        WAYS["array"](EmbeddingReader(tmp_path, "parquet"))


def test_columns_that_nobody_asked_for_may_be_anything(tmp_path: Path) -> None:
    write_parquet(tmp_path, "0", {**COLUMNS, "i": [1, 2, 3], "odd": pa.nulls(3)})
    write_parquet(tmp_path, "1", {**COLUMNS, "zeta": ["now", "a", "string"]})
    reader = EmbeddingReader(tmp_path, "parquet", meta_columns=["caption"])
    assert reader.to_dask_dataframe().compute()["caption"].tolist() == ["a", "b", "c"] * 2


# --------------------------------------------------------------------------------------------------------------------
# parquet: vectors with holes

TYPES: dict[str, Any] = {
    "list": pa.list_(pa.float32()),
    "large_list": pa.large_list(pa.float32()),
    "fixed_size_list": pa.list_(pa.float32(), 2),
}
FULL = [[1.0, 2.0]] * 4

HOLES: dict[str, tuple[list[Any], Fragment]] = {
    "a null vector": ([[1.0, 2.0], None, [5.0, 6.0], [7.0, 8.0]], ("null", "missing")),
    "a null vector at the end": ([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], None], ("null", "missing")),
    "only null vectors": ([None, None, None, None], ("null", "missing")),
    "a null item": ([[1.0, 2.0], [3.0, None], [5.0, 6.0], [7.0, 8.0]], ("null", "missing")),
    "a null item at the start": ([[None, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], ("null", "missing")),
}
RAGGED: dict[str, list[Any]] = {
    "one short": [[1.0, 2.0], [3.0], [5.0, 6.0], [7.0, 8.0]],
    "one long": [[1.0, 2.0], [3.0, 4.0, 5.0], [5.0, 6.0], [7.0, 8.0]],
    "one empty": [[1.0, 2.0], [3.0, 4.0], [], [7.0, 8.0]],
    # As many values as four vectors of two: only the offsets tell.
    "the total divides": [[1.0, 2.0], [3.0, 4.0, 5.0], [6.0], [7.0, 8.0]],
    "the total divides by an empty one": [[1.0, 2.0], [3.0, 4.0, 5.0, 6.0], [], [7.0, 8.0]],
    "the total divides at the ends": [[1.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0, 9.0]],
    # A null vector has no values, a long one makes up for it.
    "the total divides by a null": [[1.0, 2.0], None, [5.0, 6.0, 7.0, 8.0], [7.0, 8.0]],
}


def _refuse_holes(tmp_path: Path, table: dict[str, Any], way: str, *fragments: Fragment, **options: Any) -> None:
    folder = write_parquet(tmp_path, "odd", table, **options)
    write_parquet(tmp_path, "a", {"embedding": pa.array(FULL, table["embedding"].type)})
    with refused(FormatError, "odd.parquet", "embedding", *fragments):
        WAYS[way](EmbeddingReader(folder, "parquet"))


@every_way
@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize("hole", list(HOLES))
def test_nulls_in_vectors_are_refused(tmp_path: Path, kind: str, hole: str, way: str) -> None:
    rows, fragment = HOLES[hole]
    _refuse_holes(tmp_path, {"embedding": pa.array(rows, TYPES[kind])}, way, fragment)


@every_way
@pytest.mark.parametrize("kind", ["list", "large_list"])
@pytest.mark.parametrize("rows", RAGGED.values(), ids=RAGGED.keys())
def test_ragged_vectors_are_refused(tmp_path: Path, kind: str, rows: list[Any], way: str) -> None:
    _refuse_holes(tmp_path, {"embedding": pa.array(rows, TYPES[kind])}, way)


@every_way
@pytest.mark.parametrize("rows", [*RAGGED.values(), HOLES["a null vector"][0], HOLES["a null item"][0]])
def test_holes_in_a_later_row_group_are_refused(tmp_path: Path, rows: list[Any], way: str) -> None:
    table = {"embedding": pa.array(FULL * 2 + rows + FULL, FLOATS)}
    _refuse_holes(tmp_path, table, way, row_group_size=4)


@every_way
def test_raggedness_across_row_groups_is_refused(tmp_path: Path, way: str) -> None:
    # Each row group is even in itself, and so is the total.
    table = {"embedding": pa.array([[1.0]] * 4 + [[1.0, 2.0, 3.0]] * 4, FLOATS)}
    _refuse_holes(tmp_path, table, way, row_group_size=4)


def test_rows_that_hold_a_hole_are_named(tmp_path: Path) -> None:
    rows = [[1.0, 2.0]] * 20
    rows[13] = [1.0]
    rows[14] = [1.0, 2.0, 3.0]
    write_parquet(tmp_path, "odd", {"embedding": pa.array(rows, FLOATS)})
    with pytest.raises(FormatError) as info:
        WAYS["array"](EmbeddingReader(tmp_path, "parquet"))
    text = str(info.value).replace(str(tmp_path), "")
    found = [int(number) for number in re.findall(r"\d+", text)]
    assert "row" in text
    assert 13 in found or any(a <= 13 <= b for a, b in pairwise(found)), text


@every_way
def test_nulls_among_binary_and_tensor_vectors_are_refused(tmp_path: Path, way: str) -> None:
    binary = pa.array([bytes(8), None, bytes(8)], pa.binary(8))
    write_parquet(tmp_path / "binary", "odd", {"embedding": binary})
    with refused(FormatError, "odd.parquet", ("null", "missing")):
        WAYS[way](EmbeddingReader(tmp_path / "binary", "parquet", embedding_dtype="float32"))
    fixed = pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2))
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [2]), fixed)
    write_parquet(tmp_path / "tensor", "odd", {"embedding": tensors})
    with refused(FormatError, "odd.parquet", ("null", "missing")):
        WAYS[way](EmbeddingReader(tmp_path / "tensor", "parquet"))


def test_a_column_that_could_hold_nulls_but_does_not_is_fine(tmp_path: Path) -> None:
    # The neighbour of the refusals above: nullable is the default of every writer.
    schema = pa.schema([pa.field("embedding", FLOATS, nullable=True)])
    pq.write_table(pa.table({"embedding": pa.array(FULL, FLOATS)}, schema), tmp_path / "a.parquet")
    assert WAYS["array"](EmbeddingReader(tmp_path, "parquet")).tolist() == FULL


# --------------------------------------------------------------------------------------------------------------------
# parquet: binary vectors and embedding_dtype


@pytest.fixture
def binary_folder(tmp_path: Path) -> Path:
    """Vectors of ten bytes."""
    return write_parquet(tmp_path / "emb", "0", {"embedding": pa.array([bytes(10)] * 3, pa.binary(10))})


def test_binary_vectors_need_a_declared_dtype(binary_folder: Path) -> None:
    with refused(ArgumentError, "embedding_dtype", "0.parquet", ("fixed_size_binary", "binary")):
        EmbeddingReader(binary_folder, "parquet")
    assert EmbeddingReader(binary_folder, "parquet", embedding_dtype="int16").dimension == 5


def test_a_declared_dtype_must_divide_the_width(binary_folder: Path) -> None:
    with refused((ArgumentError, FormatError), "10", "float32"):
        EmbeddingReader(binary_folder, "parquet", embedding_dtype="float32")


@pytest.mark.parametrize("dtype", ["object", "str", "S4", "V2", "M8[s]", [("a", "f4")], "florp", 17, 3.5])
def test_a_declared_dtype_must_be_numeric(binary_folder: Path, dtype: Any) -> None:
    with refused(ANY_ARGUMENT_ERROR, "embedding_dtype"):
        EmbeddingReader(binary_folder, "parquet", embedding_dtype=dtype)


@pytest.mark.parametrize("file_format", ["npy", "parquet", "parquet_npy"])
def test_a_declared_dtype_is_refused_where_files_say_their_own(tmp_path: Path, file_format: str) -> None:
    write_npy(tmp_path, a=vectors(3))
    write_parquet(tmp_path, "a", COLUMNS)
    with refused(ArgumentError, "embedding_dtype"):
        EmbeddingReader(tmp_path, file_format, embedding_dtype="float32")


# --------------------------------------------------------------------------------------------------------------------
# Files that do not belong together


@pytest.mark.parametrize("odd", ["a", "b", "c"])
def test_mixed_dimensions_are_refused_with_both(tmp_path: Path, odd: str) -> None:
    for name in "abc":
        write_npy(tmp_path, **{name: vectors(2, 5 if name == odd else 4)})
    other = "a.npy" if odd == "c" else "c.npy"
    with refused(MismatchError, ("4",), ("5",), (f"{odd}.npy", other), "dimension"):
        EmbeddingReader(tmp_path)


@pytest.mark.parametrize("odd", ["b", "c"])
@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint8, np.int32])
def test_mixed_dtypes_are_refused_with_both(tmp_path: Path, odd: str, dtype: Any) -> None:
    # int32 has the width of float32: read as such, the numbers would be wrong and nothing else would show it.
    for name in "abc":
        write_npy(tmp_path, **{name: vectors(2).astype(dtype if name == odd else np.float32)})
    with refused(MismatchError, f"{odd}.npy", "float32", np.dtype(dtype).name):
        EmbeddingReader(tmp_path)


def test_equal_widths_of_other_dimension_and_dtype_are_refused(tmp_path: Path) -> None:
    write_npy(tmp_path, a=np.zeros((2, 4), np.float32), b=np.zeros((2, 8), np.float16))
    with refused(MismatchError, "b.npy"):
        EmbeddingReader(tmp_path)


def test_byte_orders_may_mix(tmp_path: Path) -> None:
    write_npy(tmp_path, a=vectors(2).astype("<f4"), b=vectors(2).astype(">f4"))
    rows = EmbeddingReader(tmp_path).to_dask_array().compute()
    np.testing.assert_array_equal(rows, np.concatenate([vectors(2)] * 2))


@pytest.mark.parametrize(
    ("column", "fragments"),
    [
        pytest.param(pa.array([[1.0] * 5] * 3, FLOATS), ("4", "5"), id="dimension"),
        pytest.param(pa.array([[1.0] * 5] * 3, pa.list_(pa.float32(), 5)), ("4", "5"), id="fixed dimension"),
        pytest.param(pa.array([[1.0] * 4] * 3, pa.list_(pa.float64())), ("float32", ("float64", "double")), id="dtype"),
        pytest.param(pa.array([[1] * 4] * 3, pa.list_(pa.int32())), ("float32", "int32"), id="integers"),
    ],
)
def test_mixed_vectors_in_parquet_are_refused_with_both(
    tmp_path: Path, column: Any, fragments: tuple[Fragment, ...]
) -> None:
    for name in "ab":
        write_parquet(tmp_path, name, {"embedding": pa.array(vectors(3).tolist(), FLOATS)})
    write_parquet(tmp_path, "odd", {"embedding": column})
    with refused(MismatchError, "odd.parquet", *fragments):
        WAYS["array"](EmbeddingReader(tmp_path, "parquet"))


def test_mixed_vectors_of_several_folders_are_refused(tmp_path: Path) -> None:
    write_npy(tmp_path / "x", a=vectors(2, 4))
    write_npy(tmp_path / "y", a=vectors(2, 6))
    with refused(MismatchError, "y/a.npy", "4", "6"):
        EmbeddingReader([tmp_path / "x", tmp_path / "y"])


# --------------------------------------------------------------------------------------------------------------------
# Pairs that are none


def _pairs(tmp_path: Path, npy_rows: dict[str, int], parquet_rows: dict[str, int]) -> EmbeddingReader:
    for name, count in npy_rows.items():
        write_npy(tmp_path / "emb", **{name: vectors(count)})
    for name, count in parquet_rows.items():
        write_parquet(tmp_path / "meta", name, {"n": list(range(count))})
    return EmbeddingReader(tmp_path / "emb", "parquet_npy", meta_columns=["n"], metadata_folder=tmp_path / "meta")


def test_pairs_of_different_length_are_refused_with_both(tmp_path: Path) -> None:
    with refused(MismatchError, "emb/b.npy", "meta/b.parquet", "13", "17"):
        _pairs(tmp_path, {"a": 5, "b": 13}, {"a": 5, "b": 17})


def test_pairs_whose_lengths_only_add_up_are_refused(tmp_path: Path) -> None:
    # The totals agree, but from the first file on every row would have its neighbour's caption.
    with refused(MismatchError, "a.npy", "a.parquet", "15", "14"):
        _pairs(tmp_path, {"a": 15, "b": 14}, {"a": 14, "b": 15})


def test_an_empty_partner_is_no_partner(tmp_path: Path) -> None:
    with refused(MismatchError, "b.npy", "b.parquet"):
        _pairs(tmp_path, {"a": 5, "b": 13}, {"a": 5, "b": 0})


@pytest.mark.parametrize("extra", ["npy", "parquet"])
def test_files_without_a_partner_are_named(tmp_path: Path, extra: str) -> None:
    names = {"0": 3, "1": 3}
    more = {**names, "27": 3}
    with refused(MismatchError, f"27.{extra}"):
        _pairs(tmp_path, more if extra == "npy" else names, more if extra == "parquet" else names)


def test_names_that_say_nothing_need_equal_counts(tmp_path: Path) -> None:
    with refused(MismatchError, "2", "3"):
        _pairs(tmp_path, {"x": 3, "y": 3}, {"p": 3, "q": 3, "r": 3})


def test_pairs_are_checked_even_when_no_column_is_asked_for(tmp_path: Path) -> None:
    write_npy(tmp_path, a=vectors(3))
    write_parquet(tmp_path, "a", {"n": [1, 2]})
    with refused(MismatchError, "a.npy", "a.parquet"):
        EmbeddingReader(tmp_path, "parquet_npy")


# --------------------------------------------------------------------------------------------------------------------
# Metadata of incompatible types

A_FLOAT = pa.array([0.5, 1.5], pa.float64())
INCOMPATIBLE: dict[str, tuple[Any, Any]] = {
    "int and string": (pa.array([1, 2]), pa.array(["a", "b"])),
    "bool and int": (pa.array([True, False]), pa.array([1, 2])),
    "string and float": (pa.array(["a", "b"]), A_FLOAT),
    "time and int": (pa.array([1, 2], pa.timestamp("us")), pa.array([1, 2])),
    "time with and without zone": (pa.array([1, 2], pa.timestamp("us", "UTC")), pa.array([1, 2], pa.timestamp("us"))),
    "list and string": (pa.array([["a"], ["b"]]), pa.array(["a", "b"])),
    "dictionary of strings and int": (pa.array(["a", "b"]).dictionary_encode(), pa.array([1, 2])),
}


@pytest.mark.parametrize(("first", "second"), INCOMPATIBLE.values(), ids=INCOMPATIBLE.keys())
@pytest.mark.parametrize("file_format", ["parquet", "parquet_npy"])
@pytest.mark.parametrize("turned", [False, True])
def test_metadata_of_incompatible_types_is_refused_with_both(
    tmp_path: Path, first: Any, second: Any, file_format: str, turned: bool
) -> None:
    for name, column in zip("ab", (second, first) if turned else (first, second), strict=True):
        write_npy(tmp_path, **{name: vectors(2)})
        table = {"score": column, "embedding": pa.array(vectors(2).tolist(), FLOATS)}
        write_parquet(tmp_path, name, table)
    kinds = [re.split(r"[<\[]", str(column.type))[0] for column in (first, second)]
    # Arrow's double is numpy's float64, and a dictionary column counts as what its values are.
    synonyms = {"double": ("double", "float64"), "dictionary": ("dictionary", "string")}
    fragments = [synonyms.get(kind, kind) for kind in kinds]
    with refused(MismatchError, "b.parquet", "score", *fragments):
        reader = EmbeddingReader(tmp_path, file_format, meta_columns=["score"])
        reader.to_dask_dataframe().compute()


# --------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten rows, in all formats."""
    write_npy(tmp_path / "emb", a=vectors(6), b=vectors(4))
    for name, count in (("a", 6), ("b", 4)):
        columns = {"embedding": pa.array(vectors(count).tolist(), FLOATS), "n": list(range(count))}
        write_parquet(tmp_path / "emb", name, columns)
    return tmp_path / "emb"


@pytest.fixture
def reader(folder: Path) -> EmbeddingReader:
    """Ten rows."""
    return EmbeddingReader(folder)


@pytest.mark.parametrize("where", [None, 5, 2.5, True, b"bytes", object(), [5], [None], ["x", 5]])
def test_a_folder_of_another_type_is_refused(where: Any) -> None:
    with refused(ArgumentTypeError, "embeddings_folder"):
        EmbeddingReader(where)


@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_of_folders_is_refused(kind: type, folder: Path) -> None:
    """Python orders it otherwise in each process, and rows would have other numbers."""
    with refused(ArgumentTypeError, "no order", "sorted(embeddings_folder)"):
        EmbeddingReader(kind([str(folder)]))


@pytest.mark.parametrize("where", ["", [], [""]])
def test_an_empty_folder_argument_is_refused(where: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An empty string would be the working directory to fsspec.
    monkeypatch.chdir(folder)
    with refused((ArgumentError, NoFilesError)):
        EmbeddingReader(where)


@pytest.mark.parametrize("file_format", ["csv", "", "NPY", ".npy", "pt", "parquet-npy", "parquet_parquet"])
def test_an_unknown_format_is_refused_with_the_known_ones(folder: Path, file_format: str) -> None:
    with refused(ArgumentError, "file_format", "npy", "parquet", "parquet_npy"):
        EmbeddingReader(folder, file_format)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("file_format", 5),
        ("file_format", None),
        ("embedding_column", 5),
        ("embedding_column", ["embedding", 5]),
        ("meta_columns", 5),
        ("meta_columns", [5]),
        ("meta_columns", ["n", None]),
        ("meta_columns", b"n"),
        ("metadata_folder", 5),
        ("metadata_folder", b"meta"),
        ("storage_options", "key"),
        ("storage_options", [("key", "x")]),
        ("metadata_storage_options", "key"),
    ],
)
def test_constructor_arguments_of_another_type_are_refused(folder: Path, name: str, value: Any) -> None:
    arguments: dict[str, Any] = {"file_format": "parquet_npy", name: value}
    with refused(ArgumentTypeError, name):
        EmbeddingReader(folder, **arguments)


@pytest.mark.parametrize("name", ["", "a\0b", "é" * 20_000, "\ud800"])
def test_names_that_files_cannot_hold_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with refused(ArgumentError, "embedding_column"):
        write_embeddings(np.ones((3, 2), "f4"), tmp_path / "new", "npz", embedding_column=name)
    assert not (tmp_path / "new").exists()


def test_a_protocol_that_nobody_knows_is_refused() -> None:
    with refused((ArgumentError, NoFilesError, ReadError), "florp"):
        EmbeddingReader("florp://bucket/emb")


#: What makes no sense as a number of things, at least one.
BAD_COUNTS: list[tuple[Any, type[EmbeddingReaderError]]] = [
    (0, ArgumentError),
    (-1, ArgumentError),
    (np.int64(0), ArgumentError),
    (-1.0, ArgumentError),
    ("10", ArgumentTypeError),
    (2.5, ArgumentTypeError),
    (True, ArgumentTypeError),
    (np.True_, ArgumentTypeError),
    ([1], ArgumentTypeError),
    (1j, ArgumentTypeError),
]
BAD_STARTS: list[tuple[Any, type[EmbeddingReaderError]]] = [
    (-1, ArgumentError),
    (np.int32(-1), ArgumentError),
    ("0", ArgumentTypeError),
    (0.5, ArgumentTypeError),
    (False, ArgumentTypeError),
]
BAD_ENDS: list[tuple[Any, type[EmbeddingReaderError]]] = [
    (-1, ArgumentError),
    ("5", ArgumentTypeError),
    (5.5, ArgumentTypeError),
    (True, ArgumentTypeError),
]
CALL_ARGUMENTS = [
    *[("batch_size", value, kind) for value, kind in [*BAD_COUNTS, (None, ArgumentTypeError)]],
    *[
        (name, value, kind)
        for name in ("max_piece_size", "parallel_pieces", "max_ram_usage_in_bytes")
        for value, kind in BAD_COUNTS
    ],
    *[("start", value, kind) for value, kind in BAD_STARTS],
    *[("end", value, kind) for value, kind in BAD_ENDS],
]
LAZY_ARGUMENTS = [
    *[("max_piece_size", value, kind) for value, kind in BAD_COUNTS],
    *[("start", value, kind) for value, kind in BAD_STARTS],
    *[("end", value, kind) for value, kind in BAD_ENDS],
]


def as_text(value: Any) -> tuple[str, ...]:
    """How a message may show a value."""
    return str(value), repr(value), str(value).removesuffix(".0")


@pytest.mark.parametrize(("name", "value", "kind"), CALL_ARGUMENTS)
def test_arguments_of_the_call_are_checked_at_the_call(
    reader: EmbeddingReader, name: str, value: Any, kind: type[EmbeddingReaderError]
) -> None:
    # There is no next() here: the call itself must refuse.
    with refused(kind, name, as_text(value)):
        reader(**{"batch_size": 5, name: value})


@pytest.mark.parametrize(("name", "value", "kind"), LAZY_ARGUMENTS)
@pytest.mark.parametrize("method", ["to_dask_array", "to_dask_dataframe"])
def test_arguments_of_array_and_frame_are_checked(
    reader: EmbeddingReader, method: str, name: str, value: Any, kind: type[EmbeddingReaderError]
) -> None:
    with refused(kind, name, as_text(value)):
        getattr(reader, method)(**{name: value})


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["batch_size", "start", "end", "max_piece_size", "parallel_pieces"])
def test_numbers_that_are_none_are_refused(reader: EmbeddingReader, name: str, value: float) -> None:
    arguments: dict[str, Any] = {"batch_size": 5, name: value}
    with refused(ANY_ARGUMENT_ERROR, name):
        reader(**arguments)


def test_a_range_that_ends_before_it_starts_is_refused(reader: EmbeddingReader) -> None:
    with refused(ArgumentError, "start", "end", "7", "3"):
        reader(5, 7, 3)
    with refused(ArgumentError, "start", "end", "7", "3"):
        reader.to_dask_array(7, 3)
    with refused(ArgumentError, "start", "end", "7", "3"):
        reader.to_dask_dataframe(7, 3)


@pytest.mark.parametrize("dtype", ["florp", "object", "str", "S4", "M8[s]", [("a", "f4")], 5])
def test_a_dtype_that_holds_no_numbers_is_refused(reader: EmbeddingReader, dtype: Any) -> None:
    with refused(ANY_ARGUMENT_ERROR, "dtype"):
        reader(5, dtype=dtype)
    with refused(ANY_ARGUMENT_ERROR, "dtype"):
        reader.to_dask_array(dtype=dtype)


@pytest.mark.parametrize("value", [2.0, np.int64(2), np.uint8(2), np.float64(2.0)])
def test_whole_numbers_of_any_type_are_accepted(reader: EmbeddingReader, value: Any) -> None:
    # The neighbour of the refusals above: programs write batch_size=1e5 and pass what numpy gave them.
    batches = list(reader(value, value, max_piece_size=value, parallel_pieces=value, show_progress=False))
    assert [len(rows) for rows, _ in batches] == [2, 2, 2, 2]
    assert all(type(i) is int for i in reader.to_dask_array(value, max_piece_size=value).shape)
    row: Any = np.int64(7)
    assert reader.locate(row)[1] == 1


@pytest.mark.parametrize("row", [10, 11, -11, 10**30, -(10**30)])
def test_a_row_out_of_range_cannot_be_located(reader: EmbeddingReader, row: int) -> None:
    with refused(ArgumentError, str(row), "10"):
        reader.locate(row)


@pytest.mark.parametrize("row", ["1", 1.5, True, None, [1], slice(1)])
def test_a_row_that_is_no_number_cannot_be_located(reader: EmbeddingReader, row: Any) -> None:
    with refused(ArgumentTypeError, "row"):
        reader.locate(row)


@pytest.mark.parametrize(
    ("row", "name", "place"), [(0, "a.npy", 0), (5, "a.npy", 5), (6, "b.npy", 0), (-1, "b.npy", 3), (-10, "a.npy", 0)]
)
def test_rows_at_the_limits_can_be_located(reader: EmbeddingReader, row: int, name: str, place: int) -> None:
    path, number = reader.locate(row)
    assert (Path(path).name, number) == (name, place)
    assert type(number) is int


def test_get_file_list_refuses_what_is_no_path() -> None:
    with refused(ArgumentTypeError):
        get_file_list(5, "npy")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------------
# Storage that fails


def _put_rows(bucket: Bucket) -> None:
    bucket.put("emb/a.npy", npy(vectors(6)))
    bucket.put("emb/b.npy", npy(vectors(4)))


def _always_fail(error: Exception) -> Callable[[Request], None]:
    def fail(request: Request) -> None:
        if request.path.endswith("b.npy"):
            raise error

    return fail


@pytest.mark.parametrize("error", [PermissionError("no entry"), OSError(5, "Input/output error")])
def test_a_file_that_cannot_be_read_at_opening_is_named(bucket: Bucket, error: OSError) -> None:
    _put_rows(bucket)
    bucket.before_read = _always_fail(error)
    with refused(ReadError, "bucket://emb/b.npy", str(error)):
        EmbeddingReader("bucket://emb")


@every_way
@pytest.mark.parametrize("error", [PermissionError("no entry"), OSError(5, "Input/output error")])
def test_a_file_that_cannot_be_read_later_is_named_with_its_rows(bucket: Bucket, error: OSError, way: str) -> None:
    _put_rows(bucket)
    reader = EmbeddingReader("bucket://emb")
    bucket.before_read = _always_fail(error)
    with refused(ReadError, "bucket://emb/b.npy", "row", str(error)):
        WAYS[way](reader)


def test_the_cause_of_a_read_error_is_kept(bucket: Bucket) -> None:
    _put_rows(bucket)
    bucket.before_read = _always_fail(PermissionError("no entry"))
    with pytest.raises(ReadError) as info:
        EmbeddingReader("bucket://emb")
    assert isinstance(info.value.__cause__, PermissionError)


def test_a_local_file_without_permission_is_named(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / "b.npy").chmod(0)
    with refused(ReadError, str(folder / "b.npy"), "permission"):
        EmbeddingReader(folder)


@pytest.mark.parametrize("error", [PermissionError("no entry"), OSError(5, "Input/output error")])
def test_a_folder_that_cannot_be_listed_is_no_empty_folder(
    bucket: Bucket, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put_rows(bucket)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    for name in ("ls", "find", "walk", "glob", "info"):
        monkeypatch.setattr(BucketFileSystem, name, fail)
    with refused(ReadError, "bucket://emb", str(error)):
        EmbeddingReader("bucket://emb")


@every_way
def test_a_connection_that_breaks_once_does_not_end_the_work(bucket: Bucket, way: str) -> None:
    _put_rows(bucket)
    failures = iter(range(2))

    def fail(request: Request) -> None:
        if next(failures, None) is not None:
            raise ConnectionResetError(104, "Connection reset by peer")

    bucket.before_read = fail
    reader = EmbeddingReader("bucket://emb")
    failures = iter(range(2))
    WAYS[way](reader)
    assert next(failures, None) is None, "the failures were never met"


@every_way
def test_a_body_that_breaks_off_once_is_fetched_again(bucket: Bucket, way: str) -> None:
    _put_rows(bucket)
    reader = EmbeddingReader("bucket://emb")
    breaks = iter(range(1))
    bucket.on_the_way = lambda request, content: content if next(breaks, None) is None else content[:-3]
    rows = WAYS[way](reader)
    rows = np.concatenate([batch for batch, _ in rows]) if way == "batches" else rows
    np.testing.assert_array_equal(rows, np.concatenate([vectors(6), vectors(4)]))


@every_way
@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_a_body_that_always_breaks_off_is_an_error(bucket: Bucket, way: str, file_format: str) -> None:
    _put_rows(bucket)
    bucket.put("emb/a.parquet", GOOD_PARQUET)
    reader = EmbeddingReader("bucket://emb", file_format)
    bucket.on_the_way = lambda request, content: content[:-1] if "/a." in request.path else content
    with refused(ReadError, f"bucket://emb/a.{file_format}"):
        WAYS[way](reader)


# --------------------------------------------------------------------------------------------------------------------
# Files that change between opening and reading


def _touch_later(path: Path, seconds: int = 10) -> None:
    """Another time, whatever the resolution of the clock."""
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + seconds * 10**9))


def _overwrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x00", b"\x01") if path.suffix == ".npy" else content)
    _touch_later(path)


def _replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    _touch_later(other)
    os.replace(other, path)


def _replace_keeping_time(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)


def _overwrite_keeping_time(path: Path) -> None:
    _resize(path, path.stat().st_size)


def _resize(path: Path, size: int) -> None:
    """Another size and the same time, as a copy that keeps times would leave."""
    state = path.stat()
    os.truncate(path, size)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], None], type[EmbeddingReaderError]]] = {
    "overwritten": (_overwrite, FileChangedError),
    "replaced": (_replace, FileChangedError),
    "replaced by one of its size and time": (_replace_keeping_time, FileChangedError),
    "overwritten and set back": (_overwrite_keeping_time, FileChangedError),
    "cut short": (lambda path: _resize(path, path.stat().st_size - 8), FileChangedError),
    "appended to": (lambda path: _resize(path, path.stat().st_size + 8), FileChangedError),
    "emptied": (lambda path: _resize(path, 0), FileChangedError),
    "deleted": (lambda path: path.unlink(), ReadError),
}


@every_way
@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_a_file_that_changed_since_opening_is_noticed(folder: Path, way: str, change: str, file_format: str) -> None:
    reader = EmbeddingReader(folder, file_format)
    alter, kind = CHANGES[change]
    alter(folder / f"b.{file_format}")
    with refused(kind, str(folder / f"b.{file_format}")):
        WAYS[way](reader)


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("file_format", ["parquet", "parquet_npy"])
def test_metadata_that_changed_since_opening_is_noticed(folder: Path, change: str, file_format: str) -> None:
    reader = EmbeddingReader(folder, file_format, meta_columns=["n"])
    alter, kind = CHANGES[change]
    frame = reader.to_dask_dataframe()
    alter(folder / "b.parquet")
    with refused(kind, str(folder / "b.parquet")):
        frame.compute()
    with refused(kind, str(folder / "b.parquet")):
        list(reader(batch_size=3, show_progress=False))


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_lazy_array_notices_a_change_too(folder: Path, change: str) -> None:
    x = EmbeddingReader(folder).to_dask_array()
    alter, kind = CHANGES[change]
    alter(folder / "b.npy")
    with refused(kind, str(folder / "b.npy")):
        x.compute()
    # What lies in the other file is still right.
    np.testing.assert_array_equal(x[:6].compute(), vectors(6))


def test_what_else_was_changed_of_a_file_is_said(folder: Path) -> None:
    """The system does not tell permissions from content that was set back to its old time."""
    reader = EmbeddingReader(folder)
    before = reader.to_dask_array().compute()
    (folder / "b.npy").chmod(0o600)
    with refused(FileChangedError, str(folder / "b.npy"), "same size and time", "permissions", "open the reader again"):
        list(reader(batch_size=3, show_progress=False))
    np.testing.assert_array_equal(EmbeddingReader(folder).to_dask_array().compute(), before)


def test_another_machine_compares_what_a_copy_has_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = EmbeddingReader(folder)
    before = reader.to_dask_array().compute()
    _replace_keeping_time(folder / "b.npy")
    monkeypatch.setattr(storage, "_HOST", "another")
    np.testing.assert_array_equal(reader.to_dask_array().compute(), before)
    _touch_later(folder / "b.npy")
    with refused(FileChangedError, str(folder / "b.npy")):
        reader.to_dask_array().compute()


@pytest.mark.parametrize(
    ("was", "now", "another"),
    [
        ((7, 5), (7, 5), False),
        ((7, 5), (8, 5), False),  # of a mount that numbers what it is asked for; ctime repeats mtime
        ((7, 6), (8, 6), True),
        ((7, 5), (7, 6), True),
    ],
)
def test_inodes_count_where_they_last(was: tuple[int, int], now: tuple[int, int], another: bool) -> None:
    before, after = (
        storage.ObjectInfo("x", 100, {"mtime": "5"}, here="host {} {}".format(*numbers)) for numbers in (was, now)
    )
    assert storage.is_same(before.version, after) is not another


# --------------------------------------------------------------------------------------------------------------------
# What is no file


NO_FILES: dict[str, Callable[[Path], None]] = {
    "pipe": lambda path: os.mkfifo(path),
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.timeout(30)  # a pipe would be waited for
@every_way
@pytest.mark.parametrize("kind", list(NO_FILES))
@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_what_is_no_file_any_more_is_an_error(folder: Path, way: str, kind: str, file_format: str) -> None:
    saved = folder.parent / "saved.parquet"
    EmbeddingReader(folder, file_format).save_manifest(saved)
    readers = [
        EmbeddingReader(folder, file_format),
        EmbeddingReader.from_manifest(saved, embeddings_folder=folder),
    ]
    path = folder / f"b.{file_format}"
    path.unlink()
    NO_FILES[kind](path)
    for reader in readers:
        with refused(ReadError, str(path)):
            WAYS[way](reader)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", list(NO_FILES))
def test_what_is_no_file_is_neither_data_nor_a_note(folder: Path, kind: str) -> None:
    written = folder / "written"
    write_embeddings(vectors(6), written, rows_per_file=3)
    NO_FILES[kind](written / "c.npy")
    assert EmbeddingReader(written).count == 6
    with pytest.raises(NoFilesError):
        EmbeddingReader(written / "c.npy")
    manifest = written / MANIFEST_NAME
    manifest.unlink()
    NO_FILES[kind](manifest)
    works: list[Callable[[], Any]] = [
        lambda: EmbeddingReader.from_manifest(manifest),
        lambda: verify_embeddings(written),
    ]
    if kind != "folder":  # which a listing does not show
        works += [
            lambda: EmbeddingReader(written),
            lambda: write_embeddings(vectors(6), written, rows_per_file=3),
        ]
    for work in works:
        with refused(EmbeddingReaderError, str(written)):
            work()


def test_a_reader_sent_elsewhere_notices_a_change(folder: Path) -> None:
    sent = pickle.dumps(EmbeddingReader(folder))
    _overwrite(folder / "b.npy")
    with refused(FileChangedError, str(folder / "b.npy")):
        WAYS["array"](pickle.loads(sent))


@every_way
@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_a_new_version_of_an_object_is_noticed(bucket: Bucket, way: str, file_format: str) -> None:
    # Of the same size: only ETag and time tell.
    _put_rows(bucket)
    bucket.put("emb/b.parquet", GOOD_PARQUET)
    reader = EmbeddingReader("bucket://emb", file_format)
    content = npy(vectors(4) + 1) if file_format == "npy" else GOOD_PARQUET
    bucket.put(f"emb/b.{file_format}", content)
    with refused(FileChangedError, f"bucket://emb/b.{file_format}"):
        WAYS[way](reader)


@pytest.mark.parametrize("batch_size", [7, 30])
def test_a_change_in_the_middle_of_the_batches_never_gives_wrong_rows(bucket: Bucket, batch_size: int) -> None:
    # What was read before is still right; the rest must be refused. A mixture of versions is neither.
    rows = {f"{k:02}.npy": vectors(50) + k for k in range(20)}
    for name, content in rows.items():
        bucket.put(f"emb/{name}", npy(content))
    expected = np.concatenate(list(rows.values()))
    reader = EmbeddingReader("bucket://emb")
    changes = iter([npy(vectors(50) * -1)])

    def change_the_last(request: Request) -> None:
        if request.path == "emb/10.npy" and (content := next(changes, None)):
            bucket.put("emb/19.npy", content)

    bucket.before_read = change_the_last
    place = 0
    with refused(FileChangedError, "bucket://emb/19.npy"):
        for batch, _ in reader(batch_size, max_piece_size=10, parallel_pieces=1, show_progress=False):
            np.testing.assert_array_equal(batch, expected[place : place + batch_size])
            place += batch_size
    assert 500 < place <= 950


@every_way
@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_a_change_in_the_middle_of_a_read_is_noticed(bucket: Bucket, way: str, file_format: str) -> None:
    # The request is on its way when the new version arrives: to have looked at the file just before is not enough.
    contents = {"npy": (npy(vectors(6)), npy(vectors(6) + 1)), "parquet": (GOOD_PARQUET, GOOD_PARQUET)}
    old, new = contents[file_format]
    bucket.put(f"emb/a.{file_format}", old)
    reader = EmbeddingReader("bucket://emb", file_format)

    def replace(request: Request) -> None:
        bucket.put(request.path, new)

    bucket.before_read = replace
    with refused(FileChangedError, f"bucket://emb/a.{file_format}"):
        WAYS[way](reader)


def test_tensors_without_torch_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)  # cannot be imported
    monkeypatch.delitem(sys.modules, "dask_embedding_reader.torch", raising=False)
    with pytest.raises(ImportError, match=r'pip install "dask-embedding-reader\[torch\]"'):
        importlib.import_module("dask_embedding_reader.torch")
