"""Which file of metadata belongs to which file of vectors, by their names alone."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest

from dask_embedding_reader.collection.pairing import describe_unpaired, pair_files
from dask_embedding_reader.errors import MismatchError
from dask_embedding_reader.storage.store import StoredFile, Version
from dask_embedding_reader.storage.urls import resolve

Roots = tuple[tuple[str, ...], tuple[str, ...]]

TWO_EACH: Roots = (("/a", "/b"), ("/m", "/n"))
"""Two folders of each kind, named one by one."""


def files(names: str, suffix: str) -> list[StoredFile]:
    store, _ = resolve("/")
    return [StoredFile(store, f"/{name}.{suffix}", Version(1)) for name in names.split()]


def test_files_of_web_servers_are_paired_by_the_names_that_people_see() -> None:
    # In addresses "%20" would be a number, and "%C3%A4" two.
    (store, _), metadata = resolve("/"), files("m/201 m/1", "parquet")
    vectors = [StoredFile(store, f"/e/ä {number}.npy", Version(1)) for number in (1, 201)]
    web = [StoredFile(store, f"http://host{quote(file.path)}?sign=x/2", file.version) for file in vectors]
    web_metadata = [StoredFile(store, f"http://host{quote(file.path)}", file.version) for file in metadata]
    for some in (vectors, web):
        for others in (metadata, web_metadata):
            assert pair_files(some, others) == others[::-1]


def paired(vectors: str, metadata: str, roots: Roots = ((), ())) -> str:
    """The partners, or what is said where there are none."""
    try:
        found = pair_files(files(vectors, "npy"), files(metadata, "parquet"), roots)
    except MismatchError as error:
        return str(error)
    return " ".join(file.path[1:].removesuffix(".parquet") for file in found)


@pytest.mark.parametrize(
    ("vectors", "metadata", "partners"),
    [
        # By name, by what in it is not the same in all, by numbers however they are padded.
        ("e/0 e/1", "m/1 m/0", "m/0 m/1"),
        ("e/x/0 e/y/0", "m/y/0 m/x/0", "m/x/0 m/y/0"),
        ("e/a-1 e/a_1", "m/a_1 m/a-1", "m/a-1 m/a_1"),
        ("e/emb_0002 e/emb_1", "m/meta_1 m/meta_2", "m/meta_2 m/meta_1"),
        ("e/a_x e/b_x", "m/b_y m/a_y", "m/a_y m/b_y"),
        ("e/10 e/9", "m/010 m/09", "m/010 m/09"),
        ("é_1 Ä_2", "é_2 ä_1", "ä_1 é_2"),
        ("e/STRASSE_x e/b_x", "m/b_y m/straße_y", "m/straße_y m/b_y"),
        # By numbers that differ, the last one, the first one.
        ("e/v2_0 e/v2_1", "m/v3_1 m/v3_0", "m/v3_0 m/v3_1"),
        ("e/v2_0 e/v2_1", "m/m_1 m/m_0", "m/m_0 m/m_1"),
        ("e/1_5 e/2_6", "m/4_6 m/3_5", "m/3_5 m/4_6"),
        ("e/1_5 e/2_6", "m/2_8 m/1_7", "m/1_7 m/2_8"),
        ("e/1_5 e/2_5", "m/2_6 m/1_6", "m/1_6 m/2_6"),
        ("e/s1_5 e/s2_5", "m/t2 m/t1", "m/t1 m/t2"),
        ("e/2_0_9 e/2_1_9", "m/3_1_8 m/3_0_8", "m/3_0_8 m/3_1_8"),
        ("e/0_a e/1_a", "m/1_b m/0_b", "m/0_b m/1_b"),
        # By position, where names say nothing; one of each whatever they are called; one for all.
        ("e/aa e/bb e/cc", "m/x m/y m/z", "m/x m/y m/z"),
        ("a/0 b/0", "a/1 b/1", "a/1 b/1"),
        ("e/x", "m/y", "m/y"),
        ("e/x1", "m/y1", "m/y1"),
        ("e/x1", "m/y", "m/y"),
        ("e/1/x", "m/2/y", "m/2/y"),
        ("e/x1_2", "m/y2_3", "m/y2_3"),
        ("e/p e/q", "m/r", "m/r"),
    ],
)
def test_files_are_paired_by_the_first_rule_that_tells(vectors: str, metadata: str, partners: str) -> None:
    assert paired(vectors, metadata) == partners
    assert paired(vectors, metadata, (("/e",), ("/m",))) == partners


@pytest.mark.parametrize(
    ("vectors", "metadata", "told"),
    [
        ("e/x1", "m/y2", "; without metadata: /e/x1.npy; without vectors: /m/y2.parquet"),
        ("e/p", "m/q m/r", "; without metadata: /e/p.npy; without vectors: /m/q.parquet, /m/r.parquet"),
        ("e/aa e/bb", "m/x m/bb", "; without metadata: /e/aa.npy; without vectors: /m/x.parquet"),
        ("e/x", "m/x m/y", "; without vectors: /m/y.parquet"),
        (
            "e/0 e/1",
            "m/2 m/3",
            "; without metadata: /e/0.npy, /e/1.npy; without vectors: /m/2.parquet, /m/3.parquet",
        ),
        ("e/0 e/1 e/2", "m/0 m/1", "; without metadata: /e/2.npy"),
        ("e/0 e/1", "m/0 m/1 m/2", "; without vectors: /m/2.parquet"),
        ("a/0 a/1 b/0", "m/0 m/1 n/0", "; alike in name and number: /a/0.npy, /b/0.npy"),
    ],
)
def test_files_without_a_partner_are_named(vectors: str, metadata: str, told: str) -> None:
    left, right = vectors.split(), metadata.split()
    counts = [
        f"{len(names)} {kind} file{'s' * (len(names) > 1)}" for names, kind in ((left, "npy"), (right, "parquet"))
    ]
    said = (
        f"{counts[0]} (/{left[0]}.npy is the first) cannot be paired with {counts[1]} (/{right[0]}.parquet is the "
        f"first), neither by name nor by number, nor by position, which is taken only where these say nothing{told}; "
    )
    for roots in (((), ()), (("/e",), ("/m",))):
        assert paired(vectors, metadata, roots).startswith(said + "each npy file needs one parquet file")
    assert describe_unpaired(files(vectors, "npy"), files(metadata, "parquet")).startswith(said)


@pytest.mark.parametrize(
    ("vectors", "metadata", "told"),
    [
        ("e/a_b e/c_d", "m/c m/a", "/e/a_b.npy and /m/c.parquet would be a pair .* only one of them has 'a', 'c' in "),
        ("e/0_a e/1_c", "m/0_c m/1_a", "/e/0_a.npy and /m/0_c.parquet would be a pair .* has 'a', 'c' in its path"),
        (
            "a/x b/y",
            "m/y n/x",
            "/a/x.npy and /m/y.parquet would be a pair .* only one of them has 'x', 'y' in its path",
        ),
        (
            "e/1_5 e/2_6",
            "m/2_5 m/1_6",
            "/e/1_5.npy would be a pair with /m/2_5.parquet by the last .* with /m/1_6.parquet by the first; give",
        ),
        ("e/3_5 e/2_6", "m/2_5 m/9_6", "/e/2_6.npy would .* with /m/9_6.parquet by the last .* /m/2_5.parquet by the"),
    ],
)
def test_files_that_two_rules_pair_otherwise_are_no_pairs(vectors: str, metadata: str, told: str) -> None:
    assert re.match(told, paired(vectors, metadata, TWO_EACH))


def test_first_numbers_that_are_not_each_those_of_one_file_say_nothing() -> None:
    assert paired("e/1_5 e/1_7_6", "m/1_8_5 m/3_6") == "m/1_8_5 m/3_6"
    assert paired("e/1_5 e/3_7_6", "m/1_8_5 m/1_9_6") == "m/1_8_5 m/1_9_6"


@pytest.mark.parametrize(
    ("vectors", "metadata", "roots", "partners"),
    [
        ("a/0 b/0", "m/0 n/0", TWO_EACH, "m/0 n/0"),
        ("a/0 b/0", "n/0 m/0", (("/a", "/b"), ("/n", "/m")), "n/0 m/0"),
        ("a/0 b/0", "m/0 n/0", (("/a/", "/b/"), ("/m", "/n")), "m/0 n/0"),
        ("a/0 b/0 b/1", "m/0 n/1 n/0", TWO_EACH, "m/0 n/0 n/1"),
        ("a/q/0 b/0 b/1", "m/0 n/z/1 n/z/0", TWO_EACH, "m/0 n/z/0 n/z/1"),
        ("a/x b/x", "m/p n/p", TWO_EACH, "m/p n/p"),
        ("a/x b/x c/x", "m/p n/p o/p", (("/a", "/b", "/c"), ("/m", "/n", "/o")), "m/p n/p o/p"),
        ("a/q/0 a/r/0", "m/r/0 m/q/0", (("/a",), ("/m",)), "m/q/0 m/r/0"),
        ("a/x1", "m/y2", (("/a/x1.npy",), ("/m/y2.parquet",)), "m/y2"),
    ],
)
def test_folders_that_are_named_one_by_one_are_paired_one_by_one(
    vectors: str, metadata: str, roots: Roots, partners: str
) -> None:
    assert paired(vectors, metadata, roots) == partners


@pytest.mark.parametrize(
    ("vectors", "metadata", "roots", "told"),
    [
        ("a/0 b/0", "m/0 n/0 n/1", TWO_EACH, "1 npy file .* 2 parquet files .*; without vectors: /n/1.parquet; each"),
        ("a/0 b/0 b/1", "m/5 n/0 n/1", TWO_EACH, "without metadata: /a/0.npy; without vectors: /m/5.parquet; each"),
        ("a/0 b/0", "m/0 n/0", (("/a", "/b"), ("/m", "/n", "/o")), "alike in name and number: /a/0.npy, /b/0.npy"),
        ("a/0 b/0", "m/0 n/0", (("/a", "/b", "/c"), ("/m", "/n")), "alike in name and number: /a/0.npy, /b/0.npy"),
        ("a/0 b/0", "m/0 n/0", (("/*",), ("/*",)), "alike in name and number: /a/0.npy, /b/0.npy"),
        ("a/0 b/0 a/1", "m/0 n/0 m/1", TWO_EACH, "alike in name and number: /a/0.npy, /b/0.npy; each"),
        ("a/x1", "m/y2", (("/a",), ("/m/y2.parquet",)), "without metadata: /a/x1.npy"),
        ("a/x1", "m/y2", (("/a/x1.npy",), ("/m",)), "without metadata: /a/x1.npy"),
    ],
)
def test_folders_that_are_not_named_one_by_one_do_not_tell(
    vectors: str, metadata: str, roots: Roots, told: str
) -> None:
    assert re.search(told, paired(vectors, metadata, roots))
