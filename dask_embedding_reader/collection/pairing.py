"""npy files with parquet metadata beside them: which metadata file belongs to which file of vectors."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from dask_embedding_reader._common.units import counted
from dask_embedding_reader.errors import MismatchError
from dask_embedding_reader.storage.names import meant_path
from dask_embedding_reader.storage.store import StoredFile

Files = Sequence[StoredFile]
Roots = Sequence[str]
Key = tuple[str | int, ...]
"""Words, in small letters, and numbers: ``0002`` is 2."""


def pair_files(vectors: Files, metadata: Files, roots: tuple[Roots, Roots] = ((), ())) -> list[StoredFile]:
    """Return the metadata file of each file of vectors.

    One rule holds for the whole collection, the first under which any of the files belong together:

    - the path below the folder that was named, without the suffix (``a/0.npy`` and ``a/0.parquet``), where neither the
      padding of numbers counts nor words that all files of a kind have (``train/emb_0002.npy`` and
      ``train_meta/2.parquet``);
    - the numbers in it; those in the name that are not the same in all files; the last or the first one in the name,
      unless both pair files, and in other pairs;
    - the words in it.

    Where there is one file of metadata and several of vectors, it is that of all of them, row after row.

    Files that share a number in several folders, or whose folders differ in a word, are paired folder by folder, if
    these were named one by one (``roots``). The position in the order of paths pairs files in whose names nothing
    tells. A single file of each kind is a pair, too, unless both have numbers, and none that is the same
    (``emb_2.npy`` and ``meta_3.parquet``): these two may be what is left of several shards. Who names the two files
    themselves knows better.

    Raises
    ------
    MismatchError
        If that rule does not pair every file, or pairs files whose words say otherwise.
    """
    if len(metadata) == 1 < len(vectors):
        return list(metadata)  # by row number, if it has as many rows as they have together
    return _pair_each(vectors, metadata, roots)


def _pair_each(vectors: Files, metadata: Files, roots: tuple[Roots, Roots]) -> list[StoredFile]:
    """Return one metadata file for each file of vectors."""
    left, right = (_relative_names(files, names) for files, names in zip((vectors, metadata), roots, strict=True))
    partners = dict(zip(right, metadata, strict=True))
    if len(partners) == len(metadata) == len(vectors) and partners.keys() == set(left):
        return [partners[name] for name in left]
    names, others = _Names(left), _Names(right)
    if len(vectors) == len(metadata) == 1:
        are_named = tuple(map(list, roots)) == ([vectors[0].path], [metadata[0].path])
        (numbers,), (other_numbers,) = names.own_numbers, others.own_numbers
        if not are_named and numbers and other_numbers and not set(numbers) & set(other_numbers):
            raise MismatchError(_unpaired(vectors, metadata, names.own_numbers, others.own_numbers))
        return list(metadata)
    try:
        paired, is_told = _pair_by_names(vectors, metadata, names, others)
    except MismatchError:
        paired, is_told = _pair_by_roots(vectors, metadata, roots), True
        if not paired:
            raise
    paired = paired or _pair_by_roots(vectors, metadata, roots)
    if not paired:
        if is_told or len(vectors) != len(metadata) or partners.keys() & set(left):
            raise MismatchError(_unpaired(vectors, metadata, *_closest_keys(names, others)))
        paired = list(metadata)
    _check_words(vectors, names, paired, dict(zip(metadata, others.words, strict=True)))
    return paired


def describe_unpaired(vectors: Files, metadata: Files) -> str:
    """Say which files have no partner, by what their names tell best."""
    names, others = (_Names(_relative_names(files, ())) for files in (vectors, metadata))
    return _unpaired(vectors, metadata, *_closest_keys(names, others))


def _pair_by_names(vectors: Files, metadata: Files, left: _Names, right: _Names) -> tuple[list[StoredFile], bool]:
    """Pair files by what their names are made of, if that can be done; and tell whether names say anything."""
    is_told = left.have_numbers and right.have_numbers
    for rule in _RULES:
        keys, others = rule(left), rule(right)
        if not set(keys) & set(others) - {()}:
            continue
        is_told = True
        partners = dict(zip(others, metadata, strict=True))
        if len(partners) < len(others) or len(set(keys)) < len(keys):
            continue  # a later rule may tell apart what shares a key
        if partners.keys() != set(keys):
            raise MismatchError(_unpaired(vectors, metadata, keys, others))
        paired = [partners[key] for key in keys]
        if rule is _last_number:
            _check_first_numbers(vectors, metadata, paired, _first_number(left), _first_number(right))
        return paired, True
    return [], is_told


def _check_first_numbers(
    vectors: Files, metadata: Files, paired: Files, left: Sequence[Key], right: Sequence[Key]
) -> None:
    """Raise an error for files that their last numbers pair with one file, and their first ones with another."""
    partners = dict(zip(right, metadata, strict=True))
    if len(partners) < len(right) or len(set(left)) < len(left):
        return  # these do not tell files apart
    for file, partner, number in zip(vectors, paired, left, strict=True):
        other = partners.get(number, partner)
        if other != partner:
            raise MismatchError(
                f"{file.url} would be a pair with {partner.url} by the last number in their names, but with "
                f"{other.url} by the first; give the two files of each pair the same name"
            )


def _pair_by_roots(vectors: Files, metadata: Files, roots: tuple[Roots, Roots]) -> list[StoredFile]:
    """Pair files folder by folder, where as many of both were named and each file lies in one of them."""
    groups, others = (_split(files, names) for files, names in zip((vectors, metadata), roots, strict=True))
    if len(groups) < 2 or len(groups) != len(others):
        return []
    pairs = zip(groups.items(), others.items(), strict=True)
    return [partner for (root, of), (other, by) in pairs for partner in _pair_each(of, by, ([root], [other]))]


def _split(files: Files, roots: Roots) -> Mapping[str, Files]:
    """Return the files of each root; nothing if a root has none or a file lies elsewhere, as those of a glob."""
    groups: dict[str, list[StoredFile]] = {root.rstrip("/"): [] for root in roots}
    for file in files:
        path = file.path
        while path and path not in groups:
            path = path.rpartition("/")[0]
        groups.setdefault(path, []).append(file)
    in_order = [file for group in groups.values() for file in group] == list(files)
    return groups if in_order and all(groups.values()) else {}


def _check_words(vectors: Files, left: _Names, paired: Files, words_of: dict[StoredFile, frozenset[str]]) -> None:
    """Raise an error for files that were paired though a word found in both kinds tells them apart."""
    shared = frozenset().union(*left.words) & frozenset().union(*words_of.values())
    for file, words, partner in zip(vectors, left.words, paired, strict=True):
        if words & shared != words_of[partner] & shared:
            said = ", ".join(map(repr, sorted((words ^ words_of[partner]) & shared)))
            raise MismatchError(
                f"{file.url} and {partner.url} would be a pair by number or position, but only one of them has {said} "
                "in its path, as others of both kinds have; give the two files of each pair the same name"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Names


class _Names:
    """What the names of the files of one kind are made of."""

    def __init__(self, names: Sequence[str]) -> None:
        found = [re.findall(r"\d+|[^\W\d_]+", name.casefold()) for name in names]
        tokens: list[Key] = [tuple(int(t) if t.isdecimal() else t for t in name) for name in found]
        common = set(tokens[0]).intersection(*tokens)
        common = {token for token in common if isinstance(token, str) and len(names) > 1}
        self.keys = [tuple(token for token in name if token not in common) for name in tokens]
        self.words = [frozenset(token for token in name if isinstance(token, str)) for name in tokens]
        self.numbers = [tuple(token for token in key if isinstance(token, int)) for key in self.keys]
        self.own_numbers = [tuple(map(int, re.findall(r"\d+", os.path.basename(name)))) for name in names]

    @property
    def have_numbers(self) -> bool:
        """Whether numbers may tell the files apart."""
        return len(set(self.numbers)) > 1

    @property
    def varying_numbers(self) -> list[Key]:
        """The numbers in the names below their folders that differ; nothing if the names are not alike."""
        if len(set(map(len, self.own_numbers))) > 1:
            return [()] * len(self.own_numbers)
        columns = [column for column in zip(*self.own_numbers, strict=True) if len(set(column)) > 1]
        return list(zip(*columns, strict=True)) or [()] * len(self.own_numbers)


def _last_number(names: _Names) -> list[Key]:
    return [numbers[-1:] for numbers in names.own_numbers]


def _first_number(names: _Names) -> list[Key]:
    return [numbers[:1] for numbers in names.own_numbers]


_RULES: tuple[Callable[[_Names], list[Key]], ...] = (
    lambda names: names.keys,
    lambda names: list(names.numbers),
    lambda names: names.varying_numbers,
    _last_number,
    _first_number,
    lambda names: [tuple(token for token in key if isinstance(token, str)) for key in names.keys],
)


def _relative_names(files: Files, roots: Roots) -> list[str]:
    paths = [meant_path(file.path) for file in files]
    folder = f"{meant_path(roots[0]).rstrip('/')}/" if len(roots) == 1 else ""
    if not folder or not all(path.startswith(folder) for path in paths):
        folder = _common_folder(paths)
    return [os.path.splitext(path)[0][len(folder) :] for path in paths]


def _common_folder(paths: Sequence[str]) -> str:
    folders = [os.path.dirname(path) + "/" for path in paths]
    common = os.path.commonprefix([min(folders), max(folders)])  # noqa: RUF071 - cut at a slash below
    return common[: common.rfind("/") + 1]


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be paired


def _closest_keys(left: _Names, right: _Names) -> tuple[list[Key], list[Key]]:
    """Return the keys by which most files belong together."""
    keys = [(rule(left), rule(right)) for rule in _RULES]
    return max(keys, key=lambda pair: len(set(pair[0]) & set(pair[1]) - {()}))


def _unpaired(vectors: Files, metadata: Files, left: Sequence[Key], right: Sequence[Key]) -> str:
    known_left, known_right = Counter(left), Counter(right)
    lonely = [file.url for file, key in zip(vectors, left, strict=True) if not known_right[key]]
    spare = [file.url for file, key in zip(metadata, right, strict=True) if not known_left[key]]
    equal = [file.url for file, key in zip(vectors, left, strict=True) if max(known_left[key], known_right[key]) > 1]
    details = "".join(
        f"; {what}: {', '.join(urls[:3])}{' …' if len(urls) > 3 else ''}"
        for what, urls in (
            ("without metadata", lonely),
            ("without vectors", spare),
            ("alike in name and number", [] if lonely or spare else equal),
        )
        if urls
    )
    kind = os.path.splitext(vectors[0].path)[1].lstrip(".")
    folders = {os.path.dirname(file.url) for file in vectors}
    if equal and not lonely and not spare and len(folders) > len({os.path.dirname(file.url) for file in metadata}):
        details += f"; the {kind} files are from {len(folders)} folders: open each by itself, as in {min(folders)!r}"
    return (
        f"{counted(len(vectors), f'{kind} file')} ({vectors[0].url} is the first) cannot be paired with "
        f"{counted(len(metadata), 'parquet file')} ({metadata[0].url} is the first), neither by name nor by number, "
        f"nor by position, which is taken only where these say nothing{details}; each {kind} file needs one parquet "
        "file of its name or number, with as many rows, or the folders (or the two files) have to be named one by one, "
        "in the same order"
    )
