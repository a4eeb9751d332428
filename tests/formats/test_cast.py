"""Vectors in another dtype: as numpy casts them, but for what would be lost, which is told.

Half floats become float32, and the other way round, faster than with numpy: each of them as numpy converts it.
"""

from __future__ import annotations

import ctypes
import io
import platform
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import EmbeddingReader, iter_batches, write_embeddings
from dask_embedding_reader.errors import ArgumentError, ArgumentTypeError, CastError, FormatError
from dask_embedding_reader.formats.casting import CheckedCast, cast_into, outside
from dask_embedding_reader.formats.vectors import Vectors, check_casting, plan_casting

ALL = np.arange(2**16, dtype=np.uint16).view(np.float16)


def assert_cast(values: np.ndarray) -> None:
    """Compare bit by bit: NaNs and the sign of zero count too."""
    out = np.full(values.shape, 7, np.float32)
    cast_into(out, values)
    np.testing.assert_array_equal(out.view(np.uint32), values.astype(np.float32).view(np.uint32))


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Let the processor take denormal numbers for zero, as libraries built with -ffast-math do."""
    libm = ctypes.CDLL(None)
    environment = (ctypes.c_uint32 * 8)()
    libm.fegetenv(environment)
    before, environment[7] = environment[7], environment[7] | 0x8040
    libm.fesetenv(environment)
    try:
        yield
    finally:
        environment[7] = before
        libm.fesetenv(environment)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(ALL[np.isfinite(ALL)].reshape(-1, 8), id="finite"),
        pytest.param(ALL.reshape(-1, 8), id="infinities and NaNs too"),
        pytest.param(ALL[np.isfinite(ALL)].reshape(8, -1).T, id="column after column"),
        pytest.param(np.tile(ALL, 20).reshape(-1, 16), id="more than a block"),
        pytest.param(ALL[:12].reshape(1, 12), id="one row"),
        pytest.param(ALL[:0].reshape(0, 4), id="no rows"),
        pytest.param(ALL.byteswap().view(ALL.dtype.newbyteorder()).reshape(-1, 8), id="other byte order"),
    ],
)
def test_half_floats_are_converted_as_numpy_does(values: np.ndarray) -> None:
    assert_cast(values)


# Whatever is rounded off: nothing, a little, just under and over a half, a half, all but a little.
REST = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF], np.uint32)
NARROWED = ((np.arange(2**19, dtype=np.uint32) << 13)[:, np.newaxis] | REST).view(np.float32)
"""Every sign, exponent and fraction that half floats keep, with each rest: all that can make a difference."""


def assert_narrowed(values: np.ndarray) -> None:
    out = np.full(values.shape, 7, np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        cast_into(out, values)
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(NARROWED, id="all"),
        pytest.param(np.where(np.arange(2**16) % 60, np.float32(0.3), NARROWED.reshape(-1, 2**16)), id="few odd ones"),
        pytest.param(NARROWED[::16].reshape(8, -1).T, id="column after column"),
        pytest.param(NARROWED[::7, 1:4], id="parts of rows"),
        pytest.param(np.random.default_rng(0).standard_normal((5_000, 64), np.float32) / 8, id="unit vectors"),
        pytest.param(NARROWED.reshape(1, -1)[:, 2**20 : 2**20 + 2**18], id="one row, longer than a block"),
        pytest.param(NARROWED[:0], id="no rows"),
        pytest.param(NARROWED[::16].byteswap().view(NARROWED.dtype.newbyteorder()), id="other byte order"),
    ],
)
def test_half_floats_are_made_as_numpy_makes_them(values: np.ndarray) -> None:
    assert_narrowed(values)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2**8, 2**5))  # a minute or two each
def test_every_float32_becomes_the_half_float_that_numpy_makes_of_it(first: int) -> None:
    bits = np.arange(2**24, dtype=np.uint32).reshape(-1, 512)
    for high in range(first, first + 2**5):
        assert_narrowed((bits | np.uint32(high << 24)).view(np.float32))


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the flags are those of x86-64, set through glibc"
)
def test_the_smallest_half_floats_survive_in_a_process_that_flushes_denormals() -> None:
    small = ALL[:1024].reshape(-1, 8)
    expected, out = small.astype(np.float32), np.empty(small.shape, np.float32)
    with denormals_flushed():
        flushed = not (np.array([1e-40], np.float32) * np.float32(1e30)).any()
        cast_into(out, small)
    assert flushed, "the processor should have flushed"
    np.testing.assert_array_equal(out, expected)


#: Two dtypes, and what the second does not hold of the first.
TOO_NARROW: list[tuple[str, str, list[int]]] = [
    ("i4", "i1", [-129, 128]),
    (">i8", "u4", [-1, 2**32]),
    ("u2", "i2", [2**15, 2**15]),
]


@pytest.mark.parametrize("in_order", [False, True])
def test_all_that_an_integer_dtype_cannot_hold_is_counted_and_the_first_told(in_order: bool) -> None:
    """Of rows that come in parts, some of them picked."""
    numbers = np.random.default_rng(0)
    for stored, narrow, beyond in TOO_NARROW:
        dtype, limits = np.dtype(narrow), np.iinfo(narrow)
        for bad in (0, 1, 5):
            rows = np.arange(1_000, 1_020) if in_order else np.sort(numbers.choice(10_000, 20, replace=False))
            values = np.full((20, 3), limits.max).astype(stored)
            values[2, 0] = max(limits.min, int(np.iinfo(stored).min))
            places = sorted(zip(numbers.choice(20, bad, replace=False).tolist(), [2, 0, 1, 2, 0], strict=False))
            for number, place in enumerate(places):
                values[place] = beyond[number % 2]
            cast = CheckedCast("url", int(rows[0]))
            for start, stop in ((0, 0), (0, 7), (7, 8), (8, 20)):
                out = np.empty((stop - start, 3), dtype)
                cast.into(out, values[start:stop], None if in_order else rows[start:stop])
            if not bad:
                cast.report()
                continue
            with pytest.raises(CastError) as told:
                cast.report()
            first, last = rows[[0, -1]].tolist()
            assert str(told.value) == (
                f"url, rows {first:,} to {last + 1:,}: {bad:,} of 60 values cannot be read as {dtype}, which holds "
                f"{limits.min:,} to {limits.max:,}; the first is {beyond[0]:,} in row {rows[places[0][0]]:,}; read "
                "with a wider dtype, or with dtype=None as they are stored"
            )


def test_what_becomes_infinite_is_told() -> None:
    cast = CheckedCast("url", 0)
    out = np.empty((1, 2), np.float32)
    cast.into(out, np.array([[1e38, np.inf]], ">f8"))
    cast.report()
    cast.into(out, np.array([[1e39, 1.0]], ">f8"))
    assert np.isinf(out[0, 0])
    with pytest.warns(UserWarning, match="became infinite") as told:
        cast.report()
    [warning] = told
    assert str(warning.message) == (
        "url: some of its float64 values are too large for float32 and became infinite; read with a wider dtype, or "
        "with dtype=None as they are stored"
    )
    assert warning.filename == __file__


def test_the_least_that_becomes_infinite_as_a_half_float_is_told() -> None:
    values = np.full((10, 20), 0.25, np.float32)
    out = np.empty(values.shape, np.float16)
    for value in (65520.0, -65520.0, 65535.0, 65536.0):
        values[3, 4] = value
        cast = CheckedCast(f"half of {value}", 0)
        cast.into(out, values)
        with pytest.warns(UserWarning, match="float32 values are too large for float16 and became infinite"):
            cast.report()
        assert np.argwhere(np.isinf(out)).tolist() == [[3, 4]]
    values[3, 4] = np.nextafter(np.float32(65520), np.float32(0))
    cast = CheckedCast("half", 0)
    cast.into(out, values)
    cast.report()
    assert out[3, 4] == 65504


def test_limits_of_integers_are_within_them() -> None:
    values = np.array([-129, -128, 0, 127, 128, np.nan, np.inf, -np.inf])
    assert outside(values, np.dtype("i1")).tolist() == [True, False, False, False, True, True, True, True]
    assert outside(np.array([-1, 0, 255, 256]), np.dtype("u1")).tolist() == [True, False, False, True]
    assert outside(np.array([-1, 0, 1, 2]), np.dtype("?")).tolist() == [True, False, False, True]


# ---------------------------------------------------------------------------------------------------------------------
# While writing


def test_which_casts_are_asked_for_with_what() -> None:
    for stored, dtype, scale in (
        ("f4", None, None),
        (">f4", None, None),
        ("f8", "f2", None),
        ("f8", "c8", None),
        ("i8", "i1", None),
        ("u1", "?", None),
        ("i8", "f2", None),
        ("f4", "i1", 0.5),
        ("f8", "u2", 1e-3),
    ):
        wanted = np.dtype(dtype or stored).newbyteorder("=")
        assert plan_casting(np.dtype(stored), None if dtype is None else np.dtype(dtype), scale) == (wanted, scale)
    for stored, dtype, scale, told in (
        (
            "f4",
            "i1",
            None,
            "dtype=int8 cannot hold vectors of float32; give scale=, the value that a step of one stand",
        ),
        ("c8", "f4", None, "dtype=float32 cannot hold vectors of complex64; choose another"),
        ("f4", "?", None, "dtype=bool cannot hold vectors of float32; choose another"),
        (
            "f4",
            "f2",
            0.5,
            "scale=0.5 is only for floating-point vectors that are stored as integers, not for float32 as",
        ),
        (
            "f4",
            None,
            0.5,
            "scale=0.5 is only for floating-point vectors that are stored as integers, not for float32 as",
        ),
        (
            "i4",
            "i1",
            0.5,
            "scale=0.5 is only for floating-point vectors that are stored as integers, not for int32 as i",
        ),
        ("f4", "i1", 0.0, "scale=0.0 must be a positive number: what a step of one stands for"),
        ("f4", "i1", -1.0, "scale=-1.0 must be a positive number"),
        ("f4", "i1", np.inf, "scale=inf must be a positive number"),
        ("f4", "i1", np.nan, "scale=nan must be a positive number"),
    ):
        with pytest.raises(ArgumentError) as refused:
            plan_casting(np.dtype(stored), None if dtype is None else np.dtype(dtype), scale)
        assert str(refused.value).startswith(told)


#: Stored, written as, scale, values that fit, some that do not, and what is said of the limits.
LIMITS: list[tuple[str, str, float | None, list[Any], list[Any], str]] = [
    ("f8", "f2", None, [65504, -65504, 65519.9, 1e-9], [65520, -65520, 1e300], "float16, which holds -65504 to 65504;"),
    ("f8", "f4", None, [3.4e38, -3.4e38], [3.5e38, -1e300], "float32, which holds -3.40282e+38 to 3.40282e+38;"),
    ("i8", "i1", None, [127, -128], [128, -129, 2**62], "int8, which holds -128 to 127, and neither NaN nor infinity;"),
    ("u1", "?", None, [0, 1], [2, 255], "bool, which holds 0 to 1, and neither NaN nor infinity;"),
    ("i2", "u1", None, [0, 255], [-1, 256], "uint8, which holds 0 to 255, and neither NaN nor infinity;"),
    ("i8", "f2", None, [65504, -65519], [65520, -(2**40)], "float16, which holds -65504 to 65504;"),
    (
        "f4",
        "i1",
        0.5,
        [63.5, -64, 63.7, -64.25],
        [63.75, -64.3, 1e30, np.nan, np.inf],
        "int8 with scale=0.5, which holds -64 to 63.5, and neither NaN nor infinity;",
    ),
    ("c16", "c8", None, [1 + 1j], [1e300 + 1j, 1 - 1e300j], "complex64, which holds -3.40282e+38 to 3.40282e+38;"),
]


@pytest.mark.parametrize("case", LIMITS, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_values_that_would_be_lost_are_counted_and_the_first_row_told(case: Any) -> None:
    stored, dtype, scale, fitting, lost, told = case
    casting = plan_casting(np.dtype(stored), np.dtype(dtype), scale)
    block_rows = 2**18 // 3
    rows = np.resize(np.array(fitting, stored), (2 * block_rows + 5, 3))
    assert check_casting(Vectors(rows, casting)) == 0
    assert check_casting(Vectors(rows[:0], casting)) == 0
    out = Vectors(rows, casting).stored(2, 9)
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, (np.rint(rows[2:9] / scale) if scale else rows[2:9]).astype(dtype), strict=True)
    places = [[0], [7, 9], [block_rows - 1, block_rows], [2 * block_rows + 4], [block_rows + 1, block_rows + 2]]
    for value, bad in [*((lost[0], some) for some in places), *((value, [7, 9]) for value in lost)]:
        few = slice(None) if bad != [7, 9] else slice(0, 20)
        harmed = rows[few].copy()
        harmed[bad, 1] = value
        with pytest.raises(CastError) as refused:
            check_casting(Vectors(harmed, casting), 1_000)
        assert str(refused.value) == (
            f"{len(bad):,} of {harmed.size:,} values cannot be stored as {told} the first is in row {1_000 + bad[0]:,} "
            f"(largest magnitude there: {np.abs(harmed[bad[0]].astype('c16')).max():g}); choose a wider dtype or scale "
            "the vectors"
        )


def test_values_that_are_not_finite_are_counted_where_they_are_narrowed() -> None:
    rows = np.zeros((2**18, 2))
    rows[[0, 5, -1], 1] = np.nan, np.inf, -np.inf
    for dtype, count in (("f2", 3), ("f4", 3), ("f8", 0), ("c16", 0), ("c8", 3)):
        assert check_casting(Vectors(rows, plan_casting(rows.dtype, np.dtype(dtype), None))) == count
    assert check_casting(Vectors(np.zeros((3, 2), bool), plan_casting(np.dtype("?"), None, None))) == 0


# ---------------------------------------------------------------------------------------------------------------------
# While reading


TYPES = [np.dtype(name) for name in ("i2", "i8", "u2", "u8", "f4", "f8", "c16")]
NARROWER = [(a, np.dtype(b)) for a in TYPES for b in ("i1", "i4", "u1", "i8", "f2", "f4", "c8")]
NARROWER = [(a, b) for a, b in NARROWER if np.can_cast(a, b, "same_kind") and not np.can_cast(a, b, "safe")]
ROWS, BAD_ROW = 120, 73


def _npy(path: Path, rows: np.ndarray) -> None:
    np.save(path, rows)


def _npy_in_columns(path: Path, rows: np.ndarray) -> None:
    np.save(path, np.asfortranarray(rows))


def _npy_of_other_bytes(path: Path, rows: np.ndarray) -> None:
    np.save(path, rows.astype(rows.dtype.newbyteorder(">")))


def _pages(path: Path, rows: np.ndarray, **how: Any) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    pq.write_table(pa.table({"embedding": vectors}), path, row_group_size=50, **how)


FILES: dict[str, tuple[str, Callable[[Path, np.ndarray], None]]] = {
    "npy": ("npy", _npy),
    "in columns": ("npy", _npy_in_columns),
    "big-endian": ("npy", _npy_of_other_bytes),
    "decoded": ("parquet", _pages),
    "plain pages": ("parquet", partial(_pages, compression="none", use_dictionary=False)),
}


def _call(reader: EmbeddingReader, dtype: np.dtype) -> np.ndarray:
    return np.concatenate([x for x, _ in reader(50, max_piece_size=20, show_progress=False, dtype=dtype)])


WAYS: dict[str, Callable[[EmbeddingReader, np.dtype], np.ndarray]] = {
    "call": _call,
    "array": lambda r, dtype: r.to_dask_array(dtype=dtype).compute(),
    "view": lambda r, dtype: np.insert(_call(r.take(np.arange(len(r)) != 5), dtype), 5, 1, axis=0),
    "array of a view": lambda r, dtype: r.take(slice(None, None, -1)).to_dask_array(dtype=dtype).compute()[::-1],
    "shuffled": lambda r, dtype: _call(r.shuffle(), dtype)[np.argsort(r.shuffle().rows)],
    "batches": lambda r, dtype: np.concatenate(
        [x for x, _ in iter_batches(r.to_dask_array(dtype=dtype), batch_size=7)]
    ),
}


def largest(dtype: np.dtype) -> Any:
    return 1 if dtype.kind == "b" else np.iinfo(dtype).max if dtype.kind in "iu" else np.finfo(dtype).max


def read(way: str, reader: EmbeddingReader, dtype: np.dtype) -> tuple[np.ndarray | None, str, list[str]]:
    """What is read, the error and the warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            rows, error = WAYS[way](reader, dtype), ""
        except CastError as raised:
            rows, error = None, str(raised)
    return rows, error, [str(warning.message) for warning in told]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", FILES)
def test_what_a_narrower_dtype_cannot_hold_is_told_when_it_is_read(kind: str, way: str, tmp_path: Path) -> None:
    file_format, write = FILES[kind]
    for number, stored in enumerate(TYPES):
        if file_format == "parquet" and stored.kind in "bc":
            continue
        rows = np.ones((ROWS, 3), stored)
        fitting, too_large = (tmp_path / f"{number}-{name}.{file_format}" for name in ("fitting", "large"))
        write(fitting, rows)
        rows[BAD_ROW, 1:] = largest(stored)
        write(too_large, rows)
        for dtype in (b for a, b in NARROWER if a == stored):
            read_rows, error, told = read(way, EmbeddingReader(fitting, file_format), dtype)
            assert (error, told) == ("", [])
            np.testing.assert_array_equal(read_rows, np.ones((ROWS, 3), dtype), strict=True)
            read_rows, error, told = read(way, EmbeddingReader(too_large, file_format), dtype)
            with np.errstate(over="ignore"):
                expected = rows.astype(dtype)
            if dtype.kind in "iu" and (expected != rows).any():
                assert f"{too_large}, rows " in error
                assert f"in row {BAD_ROW}" in error
                assert re.search(rf": 2 of [\d,]+ values cannot be read as {dtype}, which holds", error)
                continue
            assert error == ""
            np.testing.assert_array_equal(read_rows, expected, strict=True)
            lost = not np.isfinite(expected).all()
            assert len(told) == lost
            assert not lost or told[0].startswith(f"{too_large}: some of its {stored} values are too large for {dtype}")


def test_a_file_that_overflows_is_named_once_a_pass(tmp_path: Path) -> None:
    rows = np.full((1_000, 100), 1e300)
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", rows)
    reader = EmbeddingReader(tmp_path)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in reader(30, max_piece_size=10, show_progress=False):
                pass
        named = sorted(str(warning.message).partition(": ")[0] for warning in told)
        assert named == [str(tmp_path / f"{number}.npy") for number in range(2)]


def test_infinities_and_nans_are_no_overflow(tmp_path: Path) -> None:
    rows = np.array([[np.inf, -np.inf, np.nan, 1e-300]])
    np.save(tmp_path / "0.npy", rows)
    [(read_rows, _)] = EmbeddingReader(tmp_path)(1, show_progress=False)
    np.testing.assert_array_equal(read_rows, rows.astype(np.float32))


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes_of_others_are_refused_by_name(name: str, tmp_path: Path) -> None:
    dtype = getattr(pytest.importorskip("ml_dtypes"), name)
    x = np.ones((3, 2), np.float32)
    np.save(tmp_path / "0.npy", x)
    with pytest.raises(ArgumentError, match=name):
        EmbeddingReader(tmp_path)(3, dtype=dtype)
    with pytest.raises(ArgumentError, match=name):
        EmbeddingReader(tmp_path).to_dask_array(dtype=dtype)
    with pytest.raises(ArgumentError, match=name):
        write_embeddings(x, tmp_path / "out", dtype=dtype)
    for array in (x.astype(dtype), da.from_array(x.astype(dtype)), iter([(x.astype(dtype), None)])):
        with pytest.raises(ArgumentTypeError, match=name):
            write_embeddings(array, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    [(rows, _)] = iter_batches(da.from_array(x.astype(dtype)), batch_size=3)
    np.testing.assert_array_equal(rows, x.astype(dtype), strict=True)


@pytest.mark.parametrize(
    ("descr", "names"),
    [
        ("<V1", "float8, int4.*view.ml_dtypes.float8_e4m3fn"),
        ("|V1", "float8, int4.*view.ml_dtypes.float8_e4m3fn"),
        ("<V2", "bfloat16 of ml_dtypes.*view.ml_dtypes.bfloat16"),
        ("<f1", "float8_e5m2 of ml_dtypes.*np.save"),
    ],
)
@pytest.mark.parametrize("file_format", ["npy", "npz"])
def test_what_numpy_writes_of_dtypes_of_others_is_called_by_its_name(
    file_format: str, descr: str, names: str, tmp_path: Path
) -> None:
    """Their names are not in the files, and ``float8_e5m2`` cannot even be loaded."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": descr, "fortran_order": False, "shape": (3, 2)})
    data = head.getvalue() + bytes(6 * int(descr[-1]))
    if file_format == "npy":
        (tmp_path / "0.npy").write_bytes(data)
    else:
        with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive:
            archive.writestr("embedding.npy", data)
    with pytest.raises(FormatError, match=rf"0\.{file_format}: .*{names}"):
        EmbeddingReader(tmp_path, file_format)
