"""Files found: what folders, globs and lists of them hold, listed once, looked up at once."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple
from urllib.parse import unquote

from dask_embedding_reader._common.arguments import Source
from dask_embedding_reader._common.notices import warn
from dask_embedding_reader._common.threads import map_at_once
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.errors import EmbeddingReaderError, NoFilesError, ReadError
from dask_embedding_reader.storage.connections import protocols
from dask_embedding_reader.storage.names import GLOB_CHARACTERS, glob_root, is_litter, numbered_alike, suffixes_of
from dask_embedding_reader.storage.retries import explain, hide_secrets, shown_cause
from dask_embedding_reader.storage.store import ObjectInfo, Store, StoredFile, shown_url, vanished
from dask_embedding_reader.storage.urls import pin, resolve

_THREADS = 64
"""Answers are waited for, not computed."""

MANIFEST_NAME = ".manifest.embeddings"
INCOMPLETE_NAME = "_writing/incomplete"
"""What this library keeps in a collection beside the data: what is known of it, a mark while it is being written.

No suffix of data and a dot in front: whatever else reads the folder, or a glob in it, passes over the manifest."""

EARLIER_MANIFEST_NAME = "_manifest.parquet"
"""What it was called before: dask, pandas, polars, duckdb and embedding_reader took it for data."""

MANIFEST_NAMES = (MANIFEST_NAME, EARLIER_MANIFEST_NAME)
"""Where both are, the first one is newer."""

_OWN_FILES = tuple(f"/{name}" for name in (*MANIFEST_NAMES, INCOMPLETE_NAME))

_WRITERS = f"/{os.path.dirname(INCOMPLETE_NAME)}/"
"""In the names of files that a writer keeps while it writes: the mark is the last but one of them to go."""

_SUFFIXES = {
    ".npy": re.compile(r"\.npy$", re.IGNORECASE),
    ".parquet": re.compile(r"\.(parquet|parq|pq)(\.(gzip|gz|snappy|zstd|zst|brotli|br|lz4))?$", re.IGNORECASE),
    **{
        suffix: re.compile(re.escape(suffix) + "$", re.IGNORECASE)
        for suffix in (
            *(".fbin", ".f16bin", ".u8bin", ".i8bin", ".ibin"),
            *(".fvecs", ".ivecs", ".bvecs"),
            *(".npz", ".safetensors"),
            *(".arrow", ".feather", ".ipc"),
        )
    },
}
"""How others write a suffix. In a folder only files with the suffix itself are data; those that are named are taken as
they are called."""

_VERSION = re.compile(r"\?(?:versionid|generation)=[^/]*$|#\d+$", re.IGNORECASE)
"""At the end of a path: which version of it is wanted, for S3, Azure and Google in turn."""


class Listing(NamedTuple):
    """What was found in some sources."""

    files: list[StoredFile]
    """Ordered by full path within a source, sources in the order given, nothing twice."""
    own: list[StoredFile]
    """The files of this library that were passed over in folders (``MANIFEST_NAME``, ``INCOMPLETE_NAME``)."""
    roots: list[str]
    """The paths of the sources within their storages."""
    empty: list[Source]
    """The sources without such files."""
    heads: dict[StoredFile, bytes]
    """The first bytes of files that had to be asked for one by one, where they came in the same answer."""


class _Source(NamedTuple):
    """What there is of one source."""

    infos: Sequence[ObjectInfo]
    """Its files, ordered by path, litter left out."""
    own: Sequence[ObjectInfo] = ()
    """Of the litter, our own files."""
    named: frozenset[str] = frozenset()
    """The files that the source names, by itself or by a glob, rather than a folder that they are in."""


class Finder:
    """Finds files. What it has listed it does not list again: who looks for files of several kinds lists once."""

    def __init__(self) -> None:
        self._commits: dict[Any, str] = {}
        self._resolved: dict[tuple[str, str], tuple[Store, str]] = {}
        self._stores: dict[tuple[Any, ...], Store] = {}
        self._listed: dict[tuple[Store, str], _Source] = {}

    def find(
        self,
        sources: Sequence[Source],
        suffixes: tuple[str, ...],
        storage_options: Mapping[str, Any] | None = None,
        *,
        first_nbytes: int = 0,
        named: bool = True,
        required: bool = True,
    ) -> Listing:
        """Find the files with one of some suffixes in folders (searched recursively), globs and lists of these.

        A path that exists literally wins over its reading as a glob. A file that is named, by itself or by a glob, is
        taken whatever its suffix if ``named``, unless that is the one of another format. Hidden files and names that
        start with an underscore (``_SUCCESS``, ``_temporary/``) and files of zero bytes are passed over; so are links
        to nothing, with a warning.

        Raises
        ------
        NoFilesError
            If a source does not exist, or is being written and has no file yet; if nothing in any of them matches,
            where that is ``required``.
        """
        listed = self._list(sources, suffixes, storage_options, first_nbytes)
        found, taken = list[tuple[Store, list[ObjectInfo]]](), defaultdict[Store, set[str]](set)
        own, empty, problems, dangling = list[StoredFile](), list[Source](), list[str](), list[str]()
        for source, (store, _, (infos, of_ours, are_named)) in zip(sources, listed, strict=True):
            own += [_stored(store, info) for info in of_ours]
            paths = [info.path for info in infos]
            chosen = set(_choose(store, paths, suffixes, are_named if named else None))
            wanted = {info.path: info for info in infos if info.path in chosen and info.size != 0}
            dangling += [shown_url(store, info.path) for info in infos if info.leads_nowhere and info.path in chosen]
            if not wanted:
                if any(info.path.endswith(f"/{INCOMPLETE_NAME}") for info in of_ours):
                    raise NoFilesError(_nothing_written(source, suffixes))
                problems.append(_nothing_found(store, source, suffixes, paths))
                empty.append(source)
            before = taken[store]
            found.append((store, [info for path, info in wanted.items() if path not in before]))
            before.update(wanted)
        if required and not any(infos for _, infos in found):
            raise NoFilesError("; ".join([*problems[:3], "…"] if len(problems) > 3 else problems))
        # An HTTP listing tells names only.
        unknown = [(store, infos, n) for store, infos in found for n, info in enumerate(infos) if info.size < 0]
        known = map_at_once(_THREADS, lambda at: _known(at[0], at[1][at[2]], first_nbytes), unknown)
        for (_, infos, n), info in zip(unknown, known, strict=True):
            infos[n] = info
        files, heads = list[StoredFile](), dict[StoredFile, bytes]()
        for store, infos in found:
            for info in infos:
                if info.size != 0:
                    files.append(_stored(store, info))
                    if info.head:
                        heads[files[-1]] = info.head
        if not files and required:
            paths = [info.path for _, infos in found for info in infos]
            raise NoFilesError(_nothing_found(listed[0][0], sources[0], suffixes, paths))
        if dangling:
            warn(
                f"{counted(len(dangling), 'link')} to nothing, such as {min(dangling)}: the rows of what is missing "
                "are left out; mount or fetch it, or remove the link"
            )
        return Listing(files, own, [path for _, path, _ in listed], empty, heads)

    def find_kinds(
        self,
        sources: Sequence[Source],
        kinds: Mapping[str, tuple[str, ...]],
        storage_options: Mapping[str, Any] | None,
        *,
        first_nbytes: int,
    ) -> tuple[list[str], list[StoredFile]]:
        """Tell of which kinds there are files, each of which has its suffixes, and which files are our own.

        An empty name stands for files that are named, and called as none of the kinds.
        """
        kind_of = {suffix: name for name, suffixes in kinds.items() for suffix in suffixes}
        found, own = set[str](), list[StoredFile]()
        for store, _, (infos, of_ours, named) in self._list(sources, tuple(kind_of), storage_options, first_nbytes):
            own += [_stored(store, info) for info in of_ours]
            paths = [info.path for info in infos if info.size != 0]
            plain = _without_query(store)
            suffixes = {os.path.splitext(plain(path))[1] for path in paths}
            of_named = {_suffix_of(plain(path)) for path in paths if path in named} if named else set()
            kinds_here = {kind_of[suffix] for suffix in suffixes | of_named if suffix in kind_of}
            found |= kinds_here or ({""} if None in of_named else set())
        return sorted(found), own

    def names(self, source: Source, storage_options: Mapping[str, Any] | None) -> list[str]:
        """Return the paths of all files that were listed of a source."""
        listed = self._listed.get(self._resolve(source, storage_options), _Source(()))
        return [info.path for info in listed.infos]

    def _list(
        self,
        sources: Sequence[Source],
        suffixes: tuple[str, ...],
        storage_options: Mapping[str, Any] | None,
        first_nbytes: int,
    ) -> list[tuple[Store, str, _Source]]:
        """List what is in each source, as far as that is not known; return where it is, too."""
        where = [self._resolve(source, storage_options) for source in sources]

        def list_source(source: Source, place: tuple[Store, str]) -> _Source:
            if place not in self._listed:
                found = _list_source(*place, suffixes, source, first_nbytes)
                self._listed[place] = found._replace(own=[_known(place[0], info) for info in found.own])
            return self._listed[place]

        if all(store.is_local for store, _ in where):
            listed = list(map(list_source, sources, where))
        else:
            listed = map_at_once(_THREADS, list_source, sources, where)
        return [(*place, found) for place, found in zip(where, listed, strict=True)]

    def _resolve(self, source: Source, storage_options: Mapping[str, Any] | None) -> tuple[Store, str]:
        """Resolve a source, once, and use one storage for all that are made alike.

        fsspec makes one for each URL of some kinds, such as FTP, and these connect. In a forked process, releases of
        fsspec up to 2026.7 make one, then another one that they call unequal.
        """
        key = os.fspath(source), repr(storage_options)
        if key not in self._resolved:
            store, path = resolve(source, storage_options)
            made = store.filesystem
            alike = type(made), repr(made.storage_args), repr(made.storage_options)
            store = self._stores.setdefault(alike, store)
            self._resolved[key] = store, pin(store, path, self._commits)
        return self._resolved[key]


def find_sibling(source: Source, name: re.Pattern[str], storage_options: Mapping[str, Any] | None = None) -> str | None:
    """Return a folder beside a folder, if there is one whose name matches; written as the source is, without secrets.

    Meant for messages: whatever goes wrong, there is none.
    """
    text = os.fspath(source).rstrip("/")
    parent, _, own = text.rpartition("/")
    if not GLOB_CHARACTERS.isdisjoint(text) or "?" in text:
        return None
    try:
        store, path = resolve(parent or (os.sep if text.startswith("/") else "."), storage_options)
        entries = store.list_folder(path)
    except Exception:  # noqa: BLE001 - such as no permission to list it
        return None
    folders = [entry.path.rpartition("/")[2] for entry in entries if entry.is_folder]
    likely = sorted(folder for folder in folders if name.search(folder) and folder != own)
    return hide_secrets(f"{parent}/{likely[0]}" if parent or text.startswith("/") else likely[0]) if likely else None


def _known(store: Store, info: ObjectInfo, first_nbytes: int = 0) -> ObjectInfo:
    """Look a file up whose size a listing does not tell."""
    return info if info.size >= 0 else _look_up(store, info.path, first_nbytes) or info


def _stored(store: Store, info: ObjectInfo) -> StoredFile:
    return StoredFile(store, info.path, info.version)


def _list_source(store: Store, path: str, suffixes: tuple[str, ...], source: Source, first_nbytes: int) -> _Source:
    """List the files of one source."""
    shown = hide_secrets(os.fspath(source))
    named: frozenset[str] = frozenset()
    pinned = _VERSION.search(path) if getattr(store.filesystem, "version_aware", False) else None
    try:
        info = None
        if pinned or _without_query(store)(path).endswith(suffixes):
            info = _look_up(store, path, first_nbytes)
        elif _may_be_web_file(store, path):
            with suppress(Exception):  # listing it will tell
                info = _look_up(store, path, max(first_nbytes, 16))
        if info and not info.is_folder and not _is_page(info):
            # A file that is named is wanted, whatever its name starts with.
            return _Source([info], named=frozenset([path]))
        if pinned:
            raise NoFilesError(
                f"there is no {_any_of(suffixes)} file {shown!r} of the version that is asked for; check both. "
                "Versions can be told of files, not of folders"
            )
        if GLOB_CHARACTERS.isdisjoint(path) or store.exists(path):
            infos = _find(store, path)
            root = path
            if not infos and not store.exists(path):
                raise FileNotFoundError(path)
            if not infos and (info := _look_up(store, path)) and not info.is_folder and not _is_page(info):
                infos = [info] if info.size > 0 else []
            if [info.path for info in infos] == [path]:
                return _Source(infos, named=frozenset([path]))
        else:
            infos, named = _glob(store, path)
            root = glob_root(path)
            if is_litter(path, root):  # the pattern itself names such files: they are wanted
                return _Source(_ordered(store, infos), named=named)
    except EmbeddingReaderError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoFilesError(
            f"{shown!r} does not exist (searched {shown_url(store, path)!r}); check the spelling of the path"
        ) from shown_cause(error)
    except Exception as error:  # noqa: BLE001 - raised again
        raise ReadError(f"{shown!r} cannot be listed: {explain(error, asks_first=True)}") from shown_cause(error)
    own = [info for info in infos if info.path.endswith(_OWN_FILES)]
    return _Source(_ordered(store, [info for info in infos if not is_litter(info.path, root)]), own, named)


def _without_query(store: Store) -> Callable[[str], str]:
    """Return what leaves out of a path what signed URLs end in, or those of one version."""
    if "http" in protocols(store.filesystem):
        return lambda path: path.partition("?")[0]
    return partial(_VERSION.sub, "") if getattr(store.filesystem, "version_aware", False) else str


def _may_be_web_file(store: Store, path: str) -> bool:
    """Tell by its name whether a URL may be one of a file: to list it as a folder would be to read all of it."""
    return "http" in protocols(store.filesystem) and re.search(r"://.*/[^/]*[.?][^/]*$", path) is not None


def _is_page(info: ObjectInfo) -> bool:
    """Tell whether what a web server knows by a name is a page of links rather than data."""
    return info.is_page or info.head.lstrip()[:1] == b"<"


def _choose(store: Store, paths: Sequence[str], suffixes: tuple[str, ...], named: Set[str] | None) -> list[str]:
    """Return the paths that are wanted: those with a suffix, and of those that are named which are called otherwise.

    A glob may name more than the data: files without any suffix of a format are meant if there are no others.
    """
    plain = _without_query(store)
    chosen = [path for path in paths if plain(path).endswith(suffixes)]
    if named:
        kinds = {path: _suffix_of(plain(path)) for path in paths if path in named}
        chosen += [path for path, kind in kinds.items() if kind in suffixes]
        if not chosen:
            chosen = [path for path, kind in kinds.items() if kind is None]
    return chosen


def _suffix_of(path: str) -> str | None:
    """Return the suffix that the name of a file ends in, however it is written."""
    return next((suffix for suffix, pattern in _SUFFIXES.items() if pattern.search(path)), None)


def _ordered(store: Store, infos: Sequence[ObjectInfo]) -> list[ObjectInfo]:
    """Order files by path: of web servers, which write it with `%20` and the like, by the path that is meant."""
    if "http" in protocols(store.filesystem):
        return sorted(infos, key=lambda info: (unquote(info.path), info.path))
    return sorted(infos, key=attrgetter("path"))


def _look_up(store: Store, path: str, first_nbytes: int = 0) -> ObjectInfo | None:
    try:
        return store.look_up(path, first_nbytes)
    except FileNotFoundError:
        return None
    except (EmbeddingReaderError, NotADirectoryError):
        raise
    except Exception as error:  # noqa: BLE001 - raised again
        raise ReadError(
            f"{shown_url(store, path)}: cannot be looked up: {explain(error, asks_first=True)}"
        ) from shown_cause(error)


def _find(store: Store, folder: str, root: str | None = None) -> Sequence[ObjectInfo]:
    """List the files below a folder; anew where a writer may have come to its end behind our back.

    What it wrote after its folder had been looked at would be missing, and its mark would be gone already. ``root`` is
    the folder that was given, if this one was found in it: whether that is there is looked up later.
    """
    root = folder if root is None else root
    before: Sequence[ObjectInfo] | None = None
    while True:
        try:
            infos = store.list_files(folder, may_vanish=partial(is_litter, root=folder))
        except (FileNotFoundError, NotADirectoryError) as error:
            if folder == root:
                return []
            raise vanished(shown_url(store, folder)) from shown_cause(error)
        found = [info for info in infos if not info.is_folder]
        # Folders have an entry where they are walked through, else the files in them tell.
        is_written_to = any(_WRITERS in f"{info.path}/" for info in infos)
        if not is_written_to or any(info.path.endswith(f"/{INCOMPLETE_NAME}") for info in found) or found == before:
            return found
        before = found


def _glob(store: Store, pattern: str) -> tuple[Sequence[ObjectInfo], frozenset[str]]:
    """List what a pattern matches, and tell which files it names: those that it does not merely find in folders.

    Folders that it matches are searched as if they had been given themselves.
    """
    matches = store.glob(pattern)
    infos = {info.path: info for info in matches if not info.is_folder}
    named = frozenset(infos) if pattern.rpartition("/")[2].strip("*") else frozenset[str]()
    if "**" not in pattern:
        for folder in (info.path for info in matches if info.is_folder):
            infos.update((info.path, info) for info in _find(store, folder, glob_root(pattern)))
    return list(infos.values()), named


def _nothing_written(source: Source, suffixes: tuple[str, ...]) -> str:
    where = repr(hide_secrets(os.fspath(source)))
    return (
        f"no {_any_of(suffixes)} file found: {where} is being written, or its writing was interrupted or failed before "
        "a file was complete; wait, or run the writing again to finish it"
    )


def _nothing_found(store: Store, source: Source, suffixes: tuple[str, ...], passed_over: Sequence[str]) -> str:
    """Say what was searched, what was there instead, and the likely remedy."""
    where = repr(hide_secrets(os.fspath(source)))
    if not passed_over:
        return f"no {_any_of(suffixes)} file found: {where} holds no files; check the path"
    kinds = Counter("empty " + _suffix(name) if name.endswith(suffixes) else _suffix(name) for name in passed_over)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
    message = (
        f"no {_any_of(suffixes)} file found in {where}; found instead {counted(len(passed_over), 'file')}: {counts}"
    )
    if ".parquet" in suffixes and (remedy := text_remedy(passed_over)):
        return f"{message}; {remedy}"
    for other, file_format in _LIKELY.items():
        if other not in suffixes and kinds[other]:
            return f'{message}; did you mean file_format="{file_format}"?'
    if not any(suffix in _SUFFIXES for suffix in suffixes):
        return f"{message}; check the path"
    alike = (name for name in passed_over if _called_alike(name, suffixes) and not elsewhere_remedy(name))
    if named := next(alike, ""):
        return f"{message}; to read files that are called otherwise, name them, as in {_naming(store, named)!r}"
    if remedy := next((remedy for name in passed_over if (remedy := elsewhere_remedy(name))), ""):
        return f"{message}; {remedy}"
    return (
        f'{message}; what can be read are .npy files (file_format="npy", or "parquet_npy" with metadata in .parquet '
        'files), .parquet files (file_format="parquet"), and those of "arrow", "npz", "fbin", "fvecs" and "safetensors"'
    )


def _called_alike(name: str, suffixes: tuple[str, ...]) -> bool:
    """Tell whether a file that was passed over may be data: a suffix is written otherwise, or it is a number alone."""
    if name.endswith(suffixes):  # it is empty
        return False
    patterns = [pattern for suffix, pattern in _SUFFIXES.items() if suffix in suffixes]
    others = suffixes_of(name)
    is_numbered = not others and re.search("[0-9]", os.path.basename(name)) is not None
    return is_numbered or not set(others).isdisjoint(suffixes) or any(pattern.search(name) for pattern in patterns)


def _naming(store: Store, path: str) -> str:
    """Write out a glob for files that are called like one."""
    folder, _, name = shown_url(store, path).rpartition("/")
    suffix = "".join(re.findall(r"\.[^.0-9][^.]*", name)[-2:])
    pattern = f"*{suffix}" if suffix else numbered_alike(name)
    return f"{folder}/{pattern if pattern.strip('*') else name}"


def text_remedy(names: Sequence[str]) -> str:
    """Say how to make parquet of metadata that is text; nothing where there is none among some files."""
    for name in names:
        if found := _TEXT.search(name):
            read = _TEXTS[found[1]]
            return f'make parquet of them: pandas.{read}.to_parquet(path.replace("{found[0]}", ".parquet"))'
    return ""


def elsewhere_remedy(name: str) -> str:
    """Say how to open a file that is read by other means, by its name; nothing where it is none of these."""
    # The chunks of zarr are files that are called by numbers (0/0, 0.0, c.0.0); files of other names may be anything.
    name = re.sub(r"\.zarr/(?:.*/)?(?:c\.)?[0-9.]+$", ".zarr", name.lower())
    return next((remedy for suffixes, remedy in _ELSEWHERE.items() if name.endswith(suffixes)), "")


_MOST_SUFFIXES = 5
"""No format has more; more are those of all formats."""


_TEXT = re.compile(r"(\.(?:csv|tsv|jsonl|ndjson))(?:\.(?:gz|bz2|xz|zip|zst))?$")

_TEXTS = {
    ".csv": "read_csv(path)",
    ".tsv": 'read_csv(path, sep="\\t")',
    ".jsonl": "read_json(path, lines=True)",
    ".ndjson": "read_json(path, lines=True)",
}
"""What of pandas reads metadata as text, compressed or not."""

_ELSEWHERE: dict[tuple[str, ...], str] = {
    (".pt", ".pth"): (
        "it is pickled Python, which is not loaded from files here; where you trust it: "
        'safetensors.torch.save_file({"embedding": torch.load(path, weights_only=True)}, "0.safetensors")'
    ),
    (".pkl", ".pickle"): (
        "it is pickled Python, which is not loaded from files here; where you trust it, load it, and save it by "
        "np.save or frame.to_parquet"
    ),
    (".h5", ".hdf5"): (
        'iter_batches(da.from_array(h5py.File(path)["name"])) reads it, and write_embeddings takes such arrays, too'
    ),
    (".zarr",): "iter_batches(da.from_zarr(path)) reads it, and write_embeddings takes such arrays, too",
    (".lance",): (
        "read it by lance.dataset(path).to_batches(), and give write_embeddings the (vectors, frame) of each batch"
    ),
    (".faiss", ".index"): "save the vectors of a faiss index by np.save(..., faiss.read_index(path).reconstruct_n())",
    (".tar",): (
        '"tar://::" before its path opens the files in it; of one file a sample, give write_embeddings batches of them'
    ),
}
"""How to open what this library does not read."""

_LIKELY = {
    ".parquet": "parquet",
    ".npy": "npy",
    ".fbin": "fbin",
    ".fvecs": "fvecs",
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".arrow": "arrow",
    ".feather": "arrow",
}
"""The format of files of a suffix."""


def _any_of(suffixes: tuple[str, ...]) -> str:
    return " or ".join(suffixes) if len(suffixes) <= _MOST_SUFFIXES else ".npy, .parquet or other readable"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1] or "without suffix"
