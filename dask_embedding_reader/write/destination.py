"""The folder that a collection is written to, from its first file to its manifest.

Everything that is not finished lies in ``_writing/`` below it, which readers pass over: ``job.json`` (what is written),
``done/`` (a record of each complete part), claims of writers, temporary files. Where the folder holds data already, the
new files wait in ``_writing/files/`` until all are there, and only then take the place of the old ones; else they go
where they belong at once, and the mark ``_writing/incomplete`` keeps readers off. ``commit.json`` says that all is
written: whoever finds it does the rest. A writer may be killed at any point of this, and started again.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from dask_embedding_reader.connections import FileSystem
from dask_embedding_reader.errors import DestinationError, FormatError, MismatchError, WriteError
from dask_embedding_reader.finding import INCOMPLETE_NAME, MANIFEST_NAME
from dask_embedding_reader.formats import Columns, get_format
from dask_embedding_reader.formats.metadata import merge_columns
from dask_embedding_reader.manifest import FileTable, Manifest, read_manifest
from dask_embedding_reader.reopen import save_manifest
from dask_embedding_reader.retries import describe
from dask_embedding_reader.saved_manifest import SavedManifest, decode_manifest
from dask_embedding_reader.storage import shown_url
from dask_embedding_reader.write.claim import is_claim
from dask_embedding_reader.write.encoding import meta_columns
from dask_embedding_reader.write.parts import Part, Record, Settings, encode_part, measure, part_names
from dask_embedding_reader.writing import (
    get_file,
    in_threads,
    list_files,
    move_file,
    put_file,
    remove_empty_folder,
    remove_files,
    remove_folder,
    stream_file,
)

_WRITING = "_writing"
_JOB, _COMMIT = f"{_WRITING}/job.json", f"{_WRITING}/commit.json"
_DONE, _STAGED = f"{_WRITING}/done", f"{_WRITING}/files"
_SUFFIXES = (".npy", ".parquet")
_OWN_NAME = re.compile(r"[0-9]{8}\.(npy|parquet)")


class Folder(NamedTuple):
    """Where a collection is written to."""

    filesystem: FileSystem
    """The storage."""
    path: str
    """The folder in it."""
    url: str
    """The same as it can be opened again."""
    storage_options: Mapping[str, Any] | None
    """What fsspec needs for that."""

    @property
    def work(self) -> str:
        """The folder of what is not finished."""
        return f"{self.path}/{_WRITING}"

    @property
    def shown(self) -> str:
        """How messages spell it."""
        return shown_url(self.filesystem, self.path)

    def at(self, name: str) -> str:
        """Return the path of something in it."""
        return f"{self.path}/{name}"


class Destination(NamedTuple):
    """A folder that is ready to be written to. Small and picklable: it travels in every task."""

    folder: Folder
    """The folder."""
    settings: Settings
    """What is written to it."""
    staged: bool
    """Whether new files wait until all are there, because there is something that they replace."""
    overwrite: bool
    """Whether what is there may be replaced."""

    @property
    def place(self) -> str:
        """Where in the folder new files go."""
        return f"{_STAGED}/" if self.staged else ""


class Prepared(NamedTuple):
    """What a look at a folder says about writing to it."""

    destination: Destination
    """How."""
    known: dict[int, Record]
    """The parts that are complete already."""
    replaces: tuple[str, ...] = ()
    """The files that the new ones take the place of."""
    unfinished: bool = False
    """Whether an interrupted run has begun this."""


# ---------------------------------------------------------------------------------------------------------------------
# Before the first file


def prepare(folder: Folder, settings: Settings, overwrite: bool) -> Prepared:
    """Look at what a folder holds, and decide how to write to it.

    Raises
    ------
    DestinationError
        If it holds other data, complete or not, and these may not be overwritten.
    """
    listing = list_files(folder.filesystem, folder.path)
    if was_complete := _COMMIT in listing:
        complete(folder)
        listing = list_files(folder.filesystem, folder.path)
    data = [name for name in listing if name.endswith(_SUFFIXES) and not _is_hidden(name)]
    job = _read_note(folder, _JOB) if _JOB in listing else None
    if job is not None and job["settings"] == _spelled(settings):
        if job["replaces"] and not overwrite:
            raise DestinationError(_occupied(folder, data))
        destination = Destination(folder, settings, bool(job["replaces"]), overwrite)
        return Prepared(destination, _records(folder, job, listing), tuple(job["replaces"]), unfinished=True)
    if job is not None:
        if not overwrite:
            raise DestinationError(_other_job(folder, job["settings"], _spelled(settings)))
        remove_files(folder.filesystem, [folder.at(name) for name in listing if _is_of_job(name)])
    saved = _saved(folder) if MANIFEST_NAME in listing else None
    if saved is not None and saved.written == _spelled(settings) and (was_complete or not overwrite):
        known = _finished(folder, saved, settings, listing)
        return Prepared(Destination(folder, settings, False, overwrite), known)
    if data and not overwrite:
        raise DestinationError(_occupied(folder, data))
    ours = {file.path for file in saved.files} if saved else set()
    if foreign := [name for name in data if "/" in name and name not in ours]:
        raise DestinationError(
            f"{folder.shown}: {len(foreign):,} files in folders below it would be read together with what is written, "
            f"such as {foreign[0]}, and are not replaced; remove them, or name another folder"
        )
    return Prepared(Destination(folder, settings, bool(data), overwrite), {}, tuple(data))


def _read_note(folder: Folder, name: str) -> dict[str, Any]:
    """Return what this or an interrupted run noted."""
    content = get_file(folder.filesystem, folder.at(name))
    try:
        if content is not None:
            return dict(json.loads(content))
        problem = "has gone while it was needed"
    except (ValueError, TypeError) as error:
        problem = f"is damaged ({describe(error)})"
    raise DestinationError(
        f"{folder.shown}/{name}: {problem}; run this again, and if that does not help, remove "
        f"{folder.shown}/{_WRITING} and pass overwrite=True to begin anew"
    )


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _is_of_job(name: str) -> bool:
    return name.startswith((f"{_DONE}/", f"{_STAGED}/")) or name == _JOB


def _spelled(settings: Settings) -> dict[str, Any]:
    return dict(json.loads(json.dumps(settings._asdict())))


def _records(folder: Folder, job: Mapping[str, Any], listing: Mapping[str, int]) -> dict[int, Record]:
    """Return the records of parts whose files are really there."""
    names = [name for name in listing if name.startswith(f"{_DONE}/") and not _is_hidden(name.rpartition("/")[2])]
    contents = in_threads(lambda name: get_file(folder.filesystem, folder.at(name)), names)
    place = f"{_STAGED}/" if job["replaces"] else ""
    records = {}
    for name, content in zip(names, contents, strict=True):
        if content is None:
            continue
        try:
            record = Record.from_json(content)
        except ValueError:  # cut short by a loss of power: the part is written again
            continue
        if all(listing.get(place + file) == size for file, (size, _) in record.files.items()):
            records[int(name.rpartition("/")[2].partition(".")[0])] = record
    return records


def _saved(folder: Folder) -> SavedManifest | None:
    data = get_file(folder.filesystem, folder.at(MANIFEST_NAME))
    try:
        return (
            None
            if data is None
            else decode_manifest(
                data, f"{folder.shown}/{MANIFEST_NAME}", lambda _, path: (folder.filesystem, folder.at(path))
            )
        )
    except FormatError:
        return None


def _finished(
    folder: Folder, saved: SavedManifest, settings: Settings, listing: Mapping[str, int]
) -> dict[int, Record]:
    """Return the parts of a finished collection that are still there."""
    facts = {file.path: file.header for file in saved.files}
    records = {}
    for number in range(len(facts)):
        names = part_names(settings, number)
        if any(name not in facts for name in names):
            break
        headers = [facts[name] for name in names]
        for name, header in zip(names, headers, strict=True):
            if name in listing and listing[name] != header.file.size:
                raise DestinationError(
                    f"{folder.at(name)}: has {listing[name]:,} bytes, and was written with {header.file.size:,}: it "
                    "was changed or damaged; remove it to have it written again, or pass overwrite=True"
                )
        if all(name in listing for name in names):
            files = {name: (h.file.size, h.checksum) for name, h in zip(names, headers, strict=True)}
            records[number] = Record(headers[0].rows, 0, files, "")
    return records


def _occupied(folder: Folder, data: list[str]) -> str:
    return (
        f"{folder.shown}: holds {len(data):,} files of other data already (such as {min(data, default='')}); name "
        "another folder, or pass overwrite=True to replace them once all the new ones are written"
    )


def _other_job(folder: Folder, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    names = {"token": "the data"}
    differences = [
        names.get(key, f"{key} was {there.get(key)!r}, now {here[key]!r}")
        for key in here
        if there.get(key) != here[key]
    ]
    return (
        f"{folder.shown}: an interrupted run wrote something else here (another: {', '.join(differences)}); run that "
        "again to finish it, or pass overwrite=True to throw away what it wrote"
    )


def begin(prepared: Prepared) -> None:
    """Say what is written, before anything is."""
    destination = prepared.destination
    folder = destination.folder
    if not destination.staged:
        _mark_incomplete(folder)
    job = {"settings": _spelled(destination.settings), "replaces": prepared.replaces}
    put_file(folder.filesystem, folder.at(_JOB), json.dumps(job).encode(), folder.work)


def _mark_incomplete(folder: Folder) -> None:
    """Keep readers off. A mark that is there stays: where files are not replaced at once, there would be a gap."""
    if get_file(folder.filesystem, folder.at(INCOMPLETE_NAME)) is None:
        put_file(folder.filesystem, folder.at(INCOMPLETE_NAME), b"This collection is being written.\n")


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def write_part(destination: Destination, part: Part, known: Record | None = None) -> Record:
    """Write the files of a part, and then the record that they are complete.

    Raises
    ------
    DestinationError
        If the part is there already (``known``) with other rows.
    """
    folder = destination.folder
    record, contents = encode_part(destination.settings, part)
    if known is not None:
        files = {name: measure(content) for name, content in contents.items()}
        if known.files == files:
            return record._replace(files=files)
        if not destination.overwrite:
            raise DestinationError(
                f"{folder.shown}: rows {part.first_row:,} to {part.first_row + record.rows:,} were written before with "
                "other values: this is other data; name another folder, or pass overwrite=True to replace it"
            )
    files = {
        name: stream_file(
            folder.filesystem,
            folder.at(destination.place + name),
            partial(measure, content),
            folder.work,
            of_nbytes=destination.settings.nbytes,
        )
        for name, content in contents.items()
    }
    record = record._replace(files=files)
    put_file(folder.filesystem, folder.at(f"{_DONE}/{part.number:08d}.json"), record.to_json(), folder.work)
    return record


def count_done(destination: Destination) -> int:
    """Return how many parts are complete."""
    folder = destination.folder
    return sum(not _is_hidden(name) for name in list_files(folder.filesystem, folder.at(_DONE)))


def check_columns(destination: Destination, records: Mapping[int, Record]) -> tuple[str, ...]:
    """Check that the parts agree about their metadata columns; return their names.

    Raises
    ------
    MismatchError
        If they do not.
    """
    distinct = {record.columns: number for number, record in sorted(records.items(), reverse=True) if record.columns}
    schemas = [(records[number].schema, part_names(destination.settings, number)[0]) for number in distinct.values()]
    if not schemas:
        return ()
    first, first_name = schemas[-1]
    for schema, name in schemas:
        if schema.names != first.names:
            raise MismatchError(
                f"{name} has the metadata columns {schema.names}, but {first_name} has {first.names}; all parts of the "
                "data need the same columns in the same order"
            )
    merge_columns(first.names, [name for _, name in schemas], [meta_columns(schema) for schema, _ in schemas])
    return tuple(first.names)


# ---------------------------------------------------------------------------------------------------------------------
# After the last file


def finish(destination: Destination, records: Mapping[int, Record], check_claim: Callable[[], None]) -> None:
    """Make a collection of the parts, all of which are complete.

    Raises
    ------
    MismatchError
        If they do not fit together.
    """
    folder = destination.folder
    columns = check_columns(destination, records)
    rows = sum(record.rows for record in records.values())
    if destination.settings.rows not in (None, rows) or sorted(records) != list(range(len(records))):
        raise MismatchError(f"{rows:,} rows were written where {destination.settings.rows:,} were expected")
    files = {name: facts for record in records.values() for name, facts in record.files.items()}
    job = _read_note(folder, _JOB)
    own = [name for name in list_files(folder.filesystem, folder.path) if _OWN_NAME.fullmatch(name)]
    commit = {
        "settings": _spelled(destination.settings),
        "columns": columns,
        "files": files,
        "move": list(files) if destination.staged else [],
        # What was there before, and what an interrupted run wrote of data that were longer then.
        "remove": sorted({*job["replaces"], *own} - set(files)),
        "rows": rows,
    }
    check_claim()
    _mark_incomplete(folder)
    put_file(folder.filesystem, folder.at(_COMMIT), json.dumps(commit).encode(), folder.work)
    complete(folder)


def complete(folder: Folder) -> None:
    """Put new files in the place of old ones, write the manifest, tidy up. May be interrupted and done again."""
    filesystem = folder.filesystem
    commit = _read_note(folder, _COMMIT)
    settings = Settings(**commit["settings"])
    staged = {name for name in list_files(filesystem, folder.at(_STAGED)) if not _is_hidden(name)}
    if staged:  # what is found without a manifest is read as it is; with one, it would be missed
        remove_files(filesystem, [folder.at(MANIFEST_NAME)])
    # Those that are not there have been moved before.
    moved = [name for name in commit["move"] if name in staged]
    in_threads(lambda name: move_file(filesystem, folder.at(f"{_STAGED}/{name}"), folder.at(name)), moved)
    remove_files(filesystem, [folder.at(name) for name in commit["remove"]])
    manifest = _open_written(folder, settings, commit)
    save_manifest(manifest, filesystem, folder.at(MANIFEST_NAME), _spelled(settings), folder.work)
    # By their names too: should a listing miss the mark, nobody could read what is complete.
    names = {folder.at(f"{_WRITING}/{name}") for name in list_files(filesystem, folder.work) if not is_claim(name)}
    last = folder.at(_COMMIT)  # it says how to go on, should this be the moment to be killed
    remove_files(filesystem, sorted({*names, folder.at(INCOMPLETE_NAME), folder.at(_JOB)} - {last}))
    remove_folder(filesystem, folder.at(_DONE))
    remove_folder(filesystem, folder.at(_STAGED))
    remove_files(filesystem, [folder.at(_COMMIT)])
    remove_empty_folder(filesystem, folder.work)


def _open_written(folder: Folder, settings: Settings, commit: Mapping[str, Any]) -> Manifest:
    """Open the collection as any reader would, and add what only the writer knows."""
    columns = Columns(settings.embedding_column, None, tuple(commit["columns"]))
    manifest = read_manifest(
        get_format(settings.file_format), [folder.url], columns, None, folder.storage_options, unfinished=True
    )
    if manifest.count != commit["rows"]:
        raise WriteError(
            f"{folder.shown}: {commit['rows']:,} rows were written, but {manifest.count:,} are found there: something "
            "else wrote to this folder; remove what does not belong there, and run this again"
        )
    checksums = {name: checksum for name, (_, checksum) in commit["files"].items()}

    def known(table: FileTable) -> FileTable:
        found = tuple(checksums.get(path.rpartition("/")[2], "") for path in table.paths)
        return dataclasses.replace(table, checksums=found)

    vectors = known(manifest.vectors)
    metadata = manifest.metadata and (vectors if manifest.metadata is manifest.vectors else known(manifest.metadata))
    return dataclasses.replace(manifest, vectors=vectors, metadata=metadata)
