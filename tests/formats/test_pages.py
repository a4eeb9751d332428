"""Pages are put together here piece by piece: what is in them is found, or they are left to pyarrow as a whole."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem

from dask_embedding_reader.errors import ReadError
from dask_embedding_reader.formats.parquet import pages, values
from dask_embedding_reader.formats.parquet.compression import SNAPPY
from dask_embedding_reader.formats.parquet.page_headers import PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY, PageHeader
from dask_embedding_reader.formats.parquet.pages import PageSource, read_dictionary, read_page
from dask_embedding_reader.formats.parquet.place import Place
from dask_embedding_reader.formats.parquet.values import BLOCK_NBYTES, InFile, InMemory, Literals, Values, find_literals
from dask_embedding_reader.storage.local import LocalStore
from dask_embedding_reader.storage.store import StoredFile, Version
from tests.support.pages import BYTE_STREAM_SPLIT, dictionary_of, encode_page
from tests.support.thrift import BINARY, I32, STRUCT, Value, encoded_fields, varint

Array = npt.NDArray[Any]

BODY = 37
"""Where a page begins in its file."""

NARROW = {"i1": "i4", "u1": "i4", "i2": "i4", "u2": "i4"}

# ---------------------------------------------------------------------------------------------------------------------
# Pages


class Made(NamedTuple):
    """A page in a file."""

    file: StoredFile
    place: Place
    page: PageHeader
    before: int
    values: Array
    """What is in it."""
    dictionary: Array | None
    body: bytes

    def read(self, *, is_fetched: bool = False, as_stored: bool = True, **changes: Any) -> Values | None:
        """Its values, where its header says something else."""
        source = self.source(is_fetched=is_fetched)
        given = self.dictionary
        dictionary = None if given is None else lambda: given
        page = self.page._replace(**changes)
        return read_page(source, self.place, page, BODY, self.before, dictionary, as_stored=as_stored)

    def source(self, *, is_fetched: bool = False) -> PageSource:
        content = memoryview(Path(self.file.path).read_bytes())
        return PageSource(self.file, self.place, (lambda start, stop: content[start:stop]) if is_fetched else None)

    def rewritten(self, body: bytes) -> Made:
        """The same with other bytes."""
        content = bytes(BODY) + body + bytes(50)
        Path(self.file.path).write_bytes(content)
        return self._replace(file=self.file._replace(version=Version(len(content))), body=body)


def make(
    folder: Path,
    *,
    dtype: str = "f4",
    dimension: int = 6,
    rows: int = 50,
    before: int = 0,
    codec: int = 0,
    version: int = 1,
    encoding: int = PLAIN,
    is_list: bool = True,
    definition: int = 2,
    has_checksum: bool = False,
    is_compressed: bool = True,
    items: Array | None = None,
) -> Made:
    """A page of some rows, the first and the last of which may be in others in part."""
    item, stored = np.dtype(dtype), np.dtype(NARROW.get(dtype, dtype))
    if not is_list:
        stored = item
    place = Place(0, 10**6, 10**6, codec, stored, item, dimension, is_list, False, definition, True)
    if items is None:
        items = np.random.default_rng(rows).integers(-100 if item.kind != "u" else 0, 100, rows * dimension)
        items = items.astype(item)
    dictionary = dictionary_of(items, place) if encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY) else None
    page, body = encode_page(
        items,
        place,
        before,
        version=version,
        encoding=encoding,
        dictionary=dictionary,
        has_checksum=has_checksum,
        is_compressed=is_compressed,
    )
    file = StoredFile(LocalStore(LocalFileSystem()), str(folder / "page"), Version(0))
    made = Made(file, place, page, before, items, dictionary, body)
    return made.rewritten(body)


def assert_found(made: Made, found: Values | None) -> None:
    """Some bytes, and some vectors, at any place of the page."""
    assert found is not None
    place, whole = made.place, made.values.tobytes()
    assert found.nbytes == len(whole)
    chance = Random(len(whole))
    for _ in range(5):
        start, stop = sorted(chance.choices(range(len(whole) + 1), k=2))
        assert found.copy(start, stop) == whole[start:stop]
    first = -made.before % place.row_values * place.value_nbytes
    rows = (len(whole) - first) // place.row_nbytes
    for dtype in (place.dtype, np.dtype("f8")):
        row = chance.randrange(rows)
        lengths = [chance.randint(1, rows - row)]
        lengths += [rows - row - lengths[0]] if lengths[0] < rows - row else []
        outs = [np.empty((length, place.dimension), dtype) for length in lengths]
        start = first + row * place.row_nbytes
        assert found.fill(start, outs, 0)
        expected = np.frombuffer(whole[start:], place.dtype)[: sum(lengths) * place.dimension].astype(dtype)
        assert np.concatenate(outs).tobytes() == expected.tobytes()


ENCODINGS = [PLAIN, RLE_DICTIONARY, PLAIN_DICTIONARY, BYTE_STREAM_SPLIT]


@pytest.mark.parametrize("is_fetched", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("codec", [0, SNAPPY, 6])
@pytest.mark.parametrize("version", [1, 2])
def test_what_is_in_pages_is_found(tmp_path: Path, version: int, codec: int, encoding: int, is_fetched: bool) -> None:
    for (dtype, dimension), is_list, definition in product([("f4", 6), ("i1", 5), ("f8", 1)], (True, False), (0, 2)):
        if encoding == BYTE_STREAM_SPLIT and not is_list and dtype != "f8":
            continue
        for before in (0, 2 * dimension + 3) if is_list else (0, 5):
            for has_checksum, is_compressed in ((True, True), (False, True), (False, False)):
                if not is_compressed and version == 1:
                    continue
                made = make(
                    tmp_path,
                    dtype=dtype,
                    dimension=dimension,
                    before=before,
                    codec=codec,
                    version=version,
                    encoding=encoding,
                    is_list=is_list,
                    definition=definition,
                    has_checksum=has_checksum,
                    is_compressed=is_compressed,
                )
                found = made.read(is_fetched=is_fetched)
                is_plain = encoding == PLAIN and made.place.stored == made.place.dtype
                is_left = is_plain and not has_checksum and not is_fetched and (not codec or not is_compressed)
                assert type(found) is (InFile if is_left else InMemory)
                assert_found(made, found)


def test_what_is_kept_of_a_page_lasts_when_the_next_is_read(tmp_path: Path) -> None:
    for encoding, has_checksum, codec in product((PLAIN, BYTE_STREAM_SPLIT), (True, False), (0, SNAPPY, 6)):
        made = make(tmp_path, encoding=encoding, has_checksum=has_checksum, codec=codec)
        source = made.source()
        found = read_page(source, made.place, made.page, BODY, 0, None, as_stored=True)
        assert found is not None
        kept = found.kept()
        source.read(0, BODY + made.page.nbytes)
        source._memory[:] = bytes(len(source._memory))
        assert kept.copy(0, kept.nbytes) == made.values.tobytes()
        # Copied only where it has to be.
        assert (kept is found) is not (encoding == PLAIN and has_checksum and not codec)


WAYS = [
    {"codec": codec, "version": version, "encoding": encoding, "has_checksum": has_checksum}
    for codec, version, encoding, has_checksum in product((0, SNAPPY), (1, 2), (PLAIN, RLE_DICTIONARY), (True, False))
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_pages_that_are_not_as_they_say_are_left_to_pyarrow(tmp_path: Path, way: dict[str, Any]) -> None:
    made = make(tmp_path, **way)
    nbytes, plain_nbytes, count = made.page.nbytes, made.page.plain_nbytes, made.page.values
    assert made.read(encoding=5) is None
    assert made.read(values=count + 1) is None
    assert made.read(values=count - 1) is None
    assert made.read(plain_nbytes=plain_nbytes + 4) is None
    assert made.read(plain_nbytes=plain_nbytes - 4) is None
    assert made.read(nbytes=nbytes - 4) is None
    assert made.read(nbytes=2) is None
    if made.page.checksum is not None:
        assert made.read(checksum=made.page.checksum ^ 1) is None
        assert made.read(checksum=made.page.checksum + 2**32) is not None
        assert made.read(checksum=0) is None
        assert made.read(checksum=None) is not None
    if made.page.levels is not None:
        repetition, definition = made.page.levels
        assert made.read(levels=(repetition - 1, definition + 1)) is None
        assert made.read(levels=(repetition + 1, definition)) is None
        assert made.read(levels=(plain_nbytes - definition, definition)) is None
    assert made._replace(before=made.before + 1).read() is None
    if made.dictionary is not None:
        assert made._replace(dictionary=made.dictionary[:-1]).read() is None
        assert made._replace(dictionary=None).read() is None
    elif made.page.encoding == PLAIN:
        assert made.read(encoding=RLE_DICTIONARY) is None
    for place in range(4 if made.page.levels is None else 0, 7):
        body = bytearray(made.body)
        body[place] ^= 2
        if not made.place.codec:
            assert made.rewritten(bytes(body)).read() is None


def test_a_dictionary_that_is_none_is_asked_of_no_other(tmp_path: Path) -> None:
    made = make(tmp_path, encoding=RLE_DICTIONARY)
    source = made.source()
    assert read_page(source, made.place, made.page, BODY, 0, lambda: None, as_stored=True) is None


@pytest.mark.parametrize("encoding", [PLAIN, RLE_DICTIONARY, BYTE_STREAM_SPLIT])
@pytest.mark.parametrize("codec", [0, 6])
def test_pages_have_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: int, codec: int) -> None:
    """Plain ones another than those that take memory of several kinds."""
    made = make(tmp_path, rows=400, encoding=encoding, codec=codec, has_checksum=True)
    name, other = "_MOST_PAGE_NBYTES", "_MOST_PLAIN_PAGE_NBYTES"
    if encoding == PLAIN:
        name, other = other, name
    size = max(made.page.nbytes, made.page.plain_nbytes, made.values.nbytes)
    monkeypatch.setattr(pages, other, 0)
    monkeypatch.setattr(pages, name, size)
    assert_found(made, made.read())
    monkeypatch.setattr(pages, name, size - 1)
    assert made.read() is None


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("encoding", [PLAIN, RLE_DICTIONARY])
def test_narrow_integers_that_are_too_large_are_left_to_pyarrow(tmp_path: Path, dtype: str, encoding: int) -> None:
    info = np.iinfo(dtype)
    for number in (info.min, info.max):
        assert_found(
            made := make(tmp_path, dtype=dtype, items=np.full(300, number, dtype), encoding=encoding), made.read()
        )
    for number in (info.min - 1, info.max + 1):
        made = make(tmp_path, dtype="i4", items=np.full(300, number, "i4"), encoding=encoding)
        narrow = made._replace(place=made.place._replace(dtype=np.dtype(dtype)))
        assert narrow.read() is None


# ---------------------------------------------------------------------------------------------------------------------
# Dictionaries


@pytest.mark.parametrize("codec", [0, SNAPPY, 6])
@pytest.mark.parametrize(("dtype", "dimension"), [("f2", 1), ("f4", 1), ("f8", 1), ("i1", 1), ("f4", 3), ("i1", 2)])
def test_dictionaries_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: int, dtype: str, dimension: int
) -> None:
    made = make(tmp_path, dtype=dtype, dimension=dimension, is_list=False, definition=0, codec=codec)
    page = made.page._replace(is_dictionary=True)
    source = made.source()
    found = read_dictionary(source, made.place, page, BODY)
    assert found is not None
    assert found.tobytes() == made.values.tobytes()
    assert len(found) == 50
    assert (found.dtype.kind == "u") == (found.itemsize in (1, 2, 4, 8))
    source.read(0, 10)
    source._memory[:] = bytes(len(source._memory))
    assert found.tobytes() == made.values.tobytes(), "it is there as long as pages refer to it"
    wrongs: list[dict[str, Any]]
    wrongs = [{"values": 49}, {"values": 51}, {"plain_nbytes": page.plain_nbytes - 1}, {"nbytes": page.nbytes - 1}]
    for wrong in wrongs:
        assert read_dictionary(source, made.place, page._replace(**wrong), BODY) is None
    monkeypatch.setattr(pages, "_MOST_PAGE_NBYTES", page.plain_nbytes)
    assert read_dictionary(source, made.place, page, BODY) is not None
    monkeypatch.setattr(pages, "_MOST_PAGE_NBYTES", page.plain_nbytes - 1)
    assert read_dictionary(source, made.place, page, BODY) is None


# ---------------------------------------------------------------------------------------------------------------------
# What is read of files


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Where local files are read, and how many bytes."""
    found: list[tuple[int, int]] = []
    read = LocalStore.read

    def note(store: LocalStore, path: str, ranges: Any, **named: Any) -> Any:
        found.extend((start, sum(buffer.nbytes for buffer in buffers)) for start, buffers in ranges)
        return read(store, path, ranges, **named)

    monkeypatch.setattr(LocalStore, "read", note)
    return found


def header_of(nbytes: int) -> bytes:
    """A header of a page of 9 plain values, of a length."""
    said = {1: Value(I32, 9), 2: Value(I32, 0), 3: Value(I32, 3), 4: Value(I32, 3)}
    head = {1: Value(I32, 0), 2: Value(I32, 40), 3: Value(I32, 40)}
    shortest = len(encoded_fields({**head, 5: Value(STRUCT, said)}))
    if nbytes > shortest:
        for more in range(max(0, nbytes - shortest - 20), nbytes):
            statistics = Value(STRUCT, {5: Value(BINARY, bytes(more))})
            found = encoded_fields({**head, 5: Value(STRUCT, {**said, 5: statistics})})
            if len(found) == nbytes:
                return found
    return encoded_fields({**head, 5: Value(STRUCT, said)})


@pytest.mark.parametrize("codec", [0, SNAPPY])
def test_headers_are_looked_for_in_few_bytes_first(tmp_path: Path, asked: list[tuple[int, int]], codec: int) -> None:
    """In more where they are longer, and from then on always."""
    first = 2**9 if codec else 2**13
    for nbytes, reads in ((100, 1), (first, 1), (first + 1, 1 if first > 2**9 else 2), (2**13, 1 + (first < 2**13))):
        head = header_of(nbytes)
        content = bytes(20) + head + bytes(2 * 2**13)
        path = tmp_path / "page"
        path.write_bytes(content)
        file = StoredFile(LocalStore(LocalFileSystem()), str(path), Version(len(content)))
        item = np.dtype("f4")
        place = Place(20, 20 + 2**14, 9, codec, item, item, 9, True, False, 1, True)
        source = PageSource(file, place, None)
        asked.clear()
        found = source.header(20)
        if nbytes > 2**13:
            assert found is None
            continue
        assert found is not None
        assert found[1] == len(head)
        assert asked == [(20, first), (20, 2**13)][:reads]
        asked.clear()
        source.read(10**4, 10**4 + 1)
        asked.clear()
        assert source.header(20) is not None
        assert asked == [(20, 2**13 if reads == 2 else first)]
        # Nothing is read behind the chunk.
        near = PageSource(file, place._replace(stop=20 + len(head)), None)
        asked.clear()
        assert near.header(20) is not None
        assert asked[-1] == (20, min(2**13 if reads == 2 else first, len(head)))
        asked.clear()
        assert near.header(20 + len(head)) is None
        assert near.header(20 + len(head) + 1) is None
        assert not asked
        assert PageSource(file, place._replace(stop=20 + len(head) - 1), None).header(20) is None


def test_what_has_been_read_is_not_read_again(tmp_path: Path, asked: list[tuple[int, int]]) -> None:
    made = make(tmp_path, rows=100)
    content = Path(made.file.path).read_bytes()
    source = made.source()
    for start, stop, is_read in (
        (100, 200, True),
        (100, 200, False),
        (120, 199, False),
        (150, 150, False),
        (99, 150, True),
        (99, 151, True),
        (20, 30, True),
        (300, 400, True),
        (399, 401, True),
    ):
        asked.clear()
        assert bytes(source.read(start, stop)) == content[start:stop]
        assert asked == ([(start, stop - start)] if is_read else [])


def test_after_a_read_that_failed_nothing_is_taken_for_what_was_read(tmp_path: Path) -> None:
    made = make(tmp_path)
    source = made.source()
    before = bytes(source.read(0, 100))
    path = Path(made.file.path)
    content = path.read_bytes()
    path.write_bytes(content[:50])
    with pytest.raises(Exception, match="page"):
        source.read(100, 300)
    path.write_bytes(content)
    assert bytes(source.read(0, 100)) == before


# ---------------------------------------------------------------------------------------------------------------------
# Pages that snappy could not shrink


def literal(content: bytes) -> bytes:
    if len(content) <= 60:
        return bytes([len(content) - 1 << 2]) + content
    width = 1 if len(content) <= 256 else 2
    return bytes([59 + width << 2]) + (len(content) - 1).to_bytes(width, "little") + content


def with_literals(made: Made, first: bytes | None = None) -> Made:
    """The page compressed into literals, one for each block; the first may be compressed in another way."""
    apart = sum(made.page.levels or ())
    plain = made.body[apart:]
    blocks = [plain[start : start + BLOCK_NBYTES] for start in range(0, len(plain), BLOCK_NBYTES)]
    first = literal(blocks[0]) if first is None else first
    body = made.body[:apart] + varint(len(plain)) + first + b"".join(map(literal, blocks[1:]))
    place = made.place._replace(codec=SNAPPY)
    page = made.page._replace(nbytes=len(body), is_compressed=True)
    return made._replace(place=place, page=page).rewritten(body)


@pytest.mark.parametrize("is_fetched", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("rows", "before"), [(700, 0), (1_000, 5), (1_366, 0), (2_100, 7), (2_731, 0)])
def test_values_between_tags_of_snappy_are_found(
    tmp_path: Path, asked: list[tuple[int, int]], rows: int, before: int, version: int, is_fetched: bool
) -> None:
    made = with_literals(make(tmp_path, dimension=24, rows=rows, before=before, version=version))
    found = made.read(is_fetched=is_fetched)
    assert type(found) is Literals
    assert_found(made, found)
    assert found.kept() is found
    assert type(made.read(is_fetched=is_fetched, as_stored=False)) is InMemory
    assert_found(made, made.read(is_fetched=is_fetched, as_stored=False))
    # Any stretch of bytes, into any number of buffers.
    whole = made.values.tobytes()
    chance = Random(rows)
    edges = [0, 1, BLOCK_NBYTES - 1, BLOCK_NBYTES, BLOCK_NBYTES + 1, 2 * BLOCK_NBYTES, len(whole) - 1, len(whole)]
    edges += [edge - (len(made.body) - len(whole)) % BLOCK_NBYTES for edge in edges]
    edges = sorted({edge for edge in edges if 0 <= edge <= len(whole)})
    for start, stop in product(edges, edges):
        if start < stop:
            asked.clear()
            assert found.copy(start, stop) == whole[start:stop]
            # No more than what is wanted and tags, as the first block has been opened.
            assert sum(nbytes for _, nbytes in asked) <= stop - start + 3 * len(whole) // BLOCK_NBYTES + 3
    first = -before % 24 * 4
    for _ in range(20):
        row = chance.randrange((len(whole) - first) // 96)
        lengths = [chance.choice([1, 3, 300]) for _ in range(3)]
        start = first + 96 * row
        if start + 96 * sum(lengths) <= len(whole):
            outs = [np.empty((length, 24), "f4") for length in lengths]
            assert found.fill(start, outs, 0)
            assert np.concatenate(outs).tobytes() == whole[start : start + 96 * sum(lengths)]


@pytest.mark.parametrize("is_fetched", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_a_first_block_that_shrank_is_decompressed_alone(tmp_path: Path, version: int, is_fetched: bool) -> None:
    array = np.random.default_rng(0).standard_normal(40_000).astype("f4")
    array[:5_000] = 1
    made = make(tmp_path, dimension=8, rows=5_000, items=array, version=version)
    plain = made.body[sum(made.page.levels or ()) :]
    block = pa.Codec("snappy").compress(plain[:BLOCK_NBYTES], asbytes=True)
    made = with_literals(made, block[len(varint(BLOCK_NBYTES)) :])
    found = made.read(is_fetched=is_fetched)
    assert type(found) is Literals
    assert_found(made, found)


def test_pages_whose_blocks_are_no_literals_are_decompressed(tmp_path: Path) -> None:
    for version, is_fetched in product((1, 2), (False, True)):
        made = with_literals(make(tmp_path, dimension=24, rows=2_000, version=version))
        apart = sum(made.page.levels or ())
        body = made.body
        second = find_literals(len(body) - apart, made.page.plain_nbytes - apart)
        assert second is not None
        place = apart + second
        damaged = bytearray(body)
        damaged[place] ^= 4
        broken = made.rewritten(bytes(damaged)).read(is_fetched=is_fetched)
        assert type(broken) is Literals
        assert broken.copy(100, 200) == made.values.tobytes()[100:200], "what comes before is whole"
        assert broken.copy(100, 80_000) is None
        assert not broken.fill(0, [np.empty((2_000, 24), "f4")], 0)
        # A first block that is of another size, or whose levels are wrong.
        for position in (apart, apart + 8, 4 if version == 1 else 1):
            damaged = bytearray(body)
            damaged[position] ^= 1
            wrong = made.rewritten(bytes(damaged)).read(is_fetched=is_fetched)
            assert wrong is None or wrong.copy(0, 8) is None or wrong.copy(0, 8) != made.values.tobytes()[:8]


@pytest.mark.parametrize("version", [1, 2])
def test_a_page_with_a_byte_too_many_is_left_to_pyarrow(tmp_path: Path, version: int) -> None:
    made = make(tmp_path, dimension=24, rows=2_000, version=version)
    apart = sum(made.page.levels or ())
    longer = made._replace(
        page=made.page._replace(plain_nbytes=made.page.plain_nbytes + 1),
        body=made.body[:apart] + b"\0" + made.body[apart:],
    )
    found = with_literals(longer).read()
    assert found is None or found.copy(0, 4) is None


@pytest.mark.parametrize("more", [0, 1])
def test_where_the_second_block_is_follows_from_sizes(more: int) -> None:
    for nbytes in (1, 60, 61, 256, 257, BLOCK_NBYTES - 1, BLOCK_NBYTES):
        tag = literal(bytes(nbytes))[:-nbytes]
        assert values._tag(nbytes) == tag
        stored = varint(nbytes) + tag + bytes(nbytes)
        assert pa.Codec("snappy").decompress(stored, nbytes).to_pybytes() == bytes(nbytes)
        for blocks in (2, 3, 20):
            plain = (blocks - 1) * BLOCK_NBYTES + nbytes
            rest = (blocks - 2) * (3 + BLOCK_NBYTES) + len(tag) + nbytes
            for first in (1, 5_000, 32 + BLOCK_NBYTES + BLOCK_NBYTES // 6):
                assert find_literals(first + rest, plain) == first
            for first in (0, -1, 33 + BLOCK_NBYTES + BLOCK_NBYTES // 6):
                assert find_literals(first + rest, plain) is None
    for plain in (0, 1, BLOCK_NBYTES):
        assert find_literals(plain + 10 + more, plain) is None


def test_the_rows_that_could_not_be_read_are_named(tmp_path: Path) -> None:
    made = with_literals(make(tmp_path, dimension=24, rows=2_000))
    found = made.read()
    assert found is not None
    Path(made.file.path).unlink()
    with pytest.raises(ReadError, match=r"^rows 70 to 75: "):
        found.fill(0, [np.empty((2, 24), "f4"), np.empty((3, 24), "f4")], 70)
