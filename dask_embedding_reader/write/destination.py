"""The folder that a collection is written to, from its first file to its manifest.

Everything that is not finished lies in ``_writing/`` below it, which readers pass over: ``job.json`` (what is written),
``done/`` (a record of each complete part), claims of writers, temporary files. Where the folder holds data already, the
new files wait in ``_writing/files/`` until all are there, and only then take the place of the old ones; else they go
where they belong at once, and the mark ``_writing/incomplete`` keeps readers off. ``commit.json`` says that all is
written: whoever finds it does the rest. A writer may be killed at any point of this, and started again.

All that is changed is changed by the holder of the claim (see ``claim``). What another writer, which was taken for
dead, may still put there has its own name on it, and does not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from dask_embedding_reader._common.units import counted
from dask_embedding_reader.collection.reopen import save_manifest
from dask_embedding_reader.collection.saved import SavedManifest, decode_manifest
from dask_embedding_reader.errors import DestinationError, FormatError, MismatchError, WriteError
from dask_embedding_reader.formats.metadata import merge_columns
from dask_embedding_reader.formats.parquet.tables import meta_columns
from dask_embedding_reader.formats.registry import all_suffixes, get_format
from dask_embedding_reader.storage.find import INCOMPLETE_NAME, MANIFEST_NAME, MANIFEST_NAMES
from dask_embedding_reader.storage.names import is_litter
from dask_embedding_reader.storage.put import (
    get_file,
    in_threads,
    list_files,
    list_infos,
    list_linked,
    move_file,
    remove_files,
    remove_folder,
    stream_file,
)
from dask_embedding_reader.storage.store import Content, shown_url
from dask_embedding_reader.write.claim import Claim, is_of_claims
from dask_embedding_reader.write.folder import WRITING, Folder
from dask_embedding_reader.write.notes import (
    Commit,
    DamagedNoteError,
    Job,
    is_inside,
    is_own_name,
    read_commit,
    read_job,
    refuse,
)
from dask_embedding_reader.write.parts import (
    Part,
    Record,
    Settings,
    encode_part,
    measure,
    part_names,
    read_settings,
)
from dask_embedding_reader.write.written import Written, known_manifest, open_written

_JOB, _COMMIT = f"{WRITING}/job.json", f"{WRITING}/commit.json"
_DONE, _STAGED = f"{WRITING}/done", f"{WRITING}/files"
_ATTEMPTS = 4
"""A file that another writer put there, late, is replaced: so often."""

T = TypeVar("T")


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
    claim: Claim
    """The right to write to it."""
    job: str
    """The writer that began: what is its, and what another one wrote, are told apart by it."""

    @property
    def place(self) -> str:
        """Where in the folder new files go."""
        return _staging(self.job) if self.staged else ""


def _staging(job: str) -> str:
    return f"{_STAGED}/{job}/" if job else f"{_STAGED}/"  # of earlier releases


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
    strangers: tuple[str, ...] = ()
    """Files that somebody put among those of a finished collection: readers would find both."""


# ---------------------------------------------------------------------------------------------------------------------
# Before the first file


def prepare(folder: Folder, settings: Settings, overwrite: bool, claim: Claim) -> Prepared:
    """Look at what a folder holds, and decide how to write to it.

    Raises
    ------
    DestinationError
        If it holds other data, complete or not, and these may not be overwritten; or notes that cannot be read.
    """
    listing = list_files(folder.store, folder.path)
    if was_complete := _COMMIT in listing:
        complete(folder, claim, listing)
        listing = list_files(folder.store, folder.path)
    linked = set(list_linked(folder.store, folder.path, listing))
    data = [name for name in (*listing, *sorted(linked)) if name.endswith(all_suffixes()) and not is_litter(name)]
    job = _read_note(folder, _JOB, read_job) if _JOB in listing else None
    if job is not None and job.settings == _as_json(settings):
        if job.replaces and not overwrite:
            raise DestinationError(_occupied(folder, data))
        destination = Destination(folder, settings, bool(job.replaces), overwrite, claim, job.job)
        return Prepared(destination, _records(destination, listing), job.replaces, unfinished=True)
    if job is not None:
        of_job = [name for name in listing if _is_of_job(name)]
        # What ended before its first file, as a cast that is refused does, has left nothing that could be lost.
        if not overwrite and (len(of_job) > 1 or (data and not job.replaces)):
            raise DestinationError(_other_job(folder, job.settings, _as_json(settings)))
        claim.remove([folder.at(name) for name in of_job])
    manifest = next((name for name in MANIFEST_NAMES if name in listing), None)
    saved = None if manifest is None else _saved(folder, manifest)
    # Without a token only the rows tell whether they are the same, and may not be written in the place of others.
    goes_on = not overwrite or (was_complete and settings.token is not None)
    if saved is not None and saved.written == _as_json(settings) and goes_on:
        known = _finished(folder, saved, settings, listing)
        ours = {file.path for file in saved.files}
        strangers = tuple(name for name in data if name.endswith(_suffixes(settings)) and name not in ours)
        return Prepared(Destination(folder, settings, False, overwrite, claim, claim.job), known, strangers=strangers)
    if data and not overwrite:
        raise DestinationError(_occupied(folder, data))
    ours = {file.path for file in saved.files} - linked if saved else set()
    if foreign := [name for name in data if "/" in name and name not in ours]:
        raise DestinationError(
            f"{folder.shown}: {counted(len(foreign), 'file')} in folders below it would be read "
            "together with what is written, "
            f"such as {foreign[0]}, and are not replaced; remove them, or name another folder"
        )
    if odd := [name for name in data if not is_inside(name)]:
        raise DestinationError(
            f"{folder.shown}: {odd[0]!r} would be replaced, but a file of such a name may lie elsewhere on other "
            "storages; remove it, or name another folder"
        )
    return Prepared(Destination(folder, settings, bool(data), overwrite, claim, claim.job), {}, tuple(data))


def _read_note(folder: Folder, name: str, read: Callable[[bytes], T]) -> T:
    """Return what this or an interrupted run noted."""
    content = get_file(folder.store, folder.at(name))
    try:
        if content is not None:
            return read(content)
        problem = "has gone while it was needed"
    except DamagedNoteError as error:
        problem = f"is damaged: {error}"
    raise DestinationError(
        f"{folder.shown}/{name}: {problem}; run this again, and if that does not help, remove "
        f"{folder.shown}/{WRITING} and pass overwrite=True to begin anew"
    )


def _is_of_job(name: str) -> bool:
    return name.startswith((f"{_DONE}/", f"{_STAGED}/")) or name == _JOB


def _as_json(settings: Settings) -> dict[str, Any]:
    return dict(json.loads(json.dumps(settings._asdict())))


def _suffixes(settings: Settings) -> tuple[str, ...]:
    """Return what the names of its files end in: somebody may have put files of other kinds beside them."""
    return tuple(name[name.rfind(".") :] for name in part_names(settings, 0))


def _records(destination: Destination, listing: Mapping[str, int]) -> dict[int, Record]:
    """Return the records of parts whose files are really there."""
    folder, numbers = destination.folder, {}
    for name in listing:
        digits = name.removeprefix(f"{_DONE}/").removesuffix(".json")
        if is_own_name(f"{digits}.npy") and name == _record_name(int(digits)):
            numbers[name] = int(digits)
    contents = in_threads(lambda name: get_file(folder.store, folder.at(name)), list(numbers))
    records = {}
    for number, content in zip(numbers.values(), contents, strict=True):
        if content is None:
            continue
        try:
            record = Record.from_json(content, part_names(destination.settings, number), destination.job)
        except DamagedNoteError:  # cut short by a loss of power, or of another writer: the part is written again
            continue
        if all(listing.get(destination.place + file) == size for file, (size, _) in record.files.items()):
            records[number] = record
    return records


def _record_name(number: int) -> str:
    return f"{_DONE}/{number:08d}.json"


def _saved(folder: Folder, name: str) -> SavedManifest | None:
    data = get_file(folder.store, folder.at(name))
    try:
        return (
            None
            if data is None
            else decode_manifest(data, f"{folder.shown}/{name}", lambda _, path: (folder.store, folder.at(path)))
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
        f"{folder.shown}: holds {counted(len(data), 'file')} of other data already (such as "
        f"{min(data, default='')}); name "
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
    """Say what is written and by whom, before anything is.

    Raises
    ------
    DestinationError
        If there are files beside a finished collection that nobody said may be replaced.
    """
    destination = prepared.destination
    if prepared.strangers and not destination.overwrite:
        raise DestinationError(_occupied(destination.folder, list(prepared.strangers)))
    if not destination.staged:
        _mark_incomplete(destination)
    job = Job(_as_json(destination.settings), prepared.replaces, destination.job, destination.claim.job)
    _put_note(destination, _JOB, job)


def _mark_incomplete(destination: Destination) -> None:
    """Keep readers off. A mark that is there stays: where files are not replaced at once, there would be a gap."""
    path = destination.folder.at(INCOMPLETE_NAME)
    if get_file(destination.folder.store, path) is None:
        destination.claim.put(path, b"This collection is being written.\n")


def _put_note(destination: Destination, name: str, note: Job | Commit) -> None:
    destination.claim.put(destination.folder.at(name), json.dumps(note._asdict()).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def write_part(destination: Destination, part: Part, known: Record | None = None) -> Record:
    """Write the files of a part, and then the record that they are complete.

    Raises
    ------
    DestinationError
        If the part is there already (``known``) with other rows, or another writer took over.
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
        # The new files are as long as the old ones: what is killed before the new record must not find the old one.
        destination.claim.remove([folder.at(_record_name(part.number))])
    record = record._replace(
        files={name: _put_data(destination, destination.place + name, content) for name, content in contents.items()}
    )
    destination.claim.put(folder.at(_record_name(part.number)), record.to_json(destination.job))
    return record


def _put_data(destination: Destination, name: str, content: Content) -> tuple[int, str]:
    """Write a file of data; return its size and SHA-256."""
    store, path, claim = destination.folder.store, destination.folder.at(name), destination.claim
    written: list[tuple[int, str]] = []

    def put() -> tuple[int, str]:
        nbytes = destination.settings.nbytes
        written.append(stream_file(store, path, partial(measure, content), claim.scratch, of_nbytes=nbytes))
        return written[-1]

    for _ in range(_ATTEMPTS):
        try:
            return claim.keep(put)
        except DestinationError:
            # Where nothing else stops it, a file may have come late, among those of who took over.
            if written and store.is_object_store:
                there = get_file(store, path)
                if there is not None and (len(there), hashlib.sha256(there).hexdigest()) == written[-1]:
                    remove_files(store, [path])
            raise
        except FileExistsError:  # it is of an interrupted run, or has just come late
            claim.remove([path])
    raise DestinationError(
        f"{shown_url(store, path)}: something else writes files of this name; stop it, and run this again"
    )


def count_done(destination: Destination) -> int:
    """Return how many parts are complete."""
    folder = destination.folder
    return sum(not is_litter(name) for name in list_files(folder.store, folder.at(_DONE)))


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


def finish(destination: Destination, records: Mapping[int, Record]) -> None:
    """Make a collection of the parts, all of which are complete.

    Raises
    ------
    MismatchError
        If they do not fit together.
    DestinationError
        If another writer took over.
    WriteError
        If something else has changed what was written.
    """
    folder, settings, claim = destination.folder, destination.settings, destination.claim
    columns = check_columns(destination, records)
    rows = sum(record.rows for record in records.values())
    if settings.rows not in (None, rows) or sorted(records) != list(range(len(records))):
        raise MismatchError(f"{counted(rows, 'row')} written where {settings.rows or 'others'} were expected")
    files = {name: facts for record in records.values() for name, facts in record.files.items()}
    job = _read_note(folder, _JOB, read_job)
    infos = list_infos(folder.store, folder.path)
    listing = {name: max(info.size, 0) for name, info in infos.items()}
    if others := [name for name, (size, _) in files.items() if listing.get(destination.place + name) != size]:
        claim.check()  # who lost it may have lost these, too
        size = listing.get(destination.place + others[0])
        found = "has gone" if size is None else f"has {counted(size, 'byte')}"
        raise WriteError(
            f"{folder.shown}/{destination.place}{others[0]}: {found}, and was written with {files[others[0]][0]:,} "
            "bytes: something else changes this folder; run this again"
        )
    # What was there before, and what an interrupted run wrote of data that were longer then, or one that came late.
    own = {name for name in listing if is_own_name(name) and name.endswith(_suffixes(settings))}
    remove = sorted({*job.replaces, *own} - set(files))
    move = tuple(files) if destination.staged else ()
    claim.check()
    _mark_incomplete(destination)
    commit = Commit(_as_json(settings), columns, files, move, tuple(remove), rows, destination.job, claim.job)
    _put_note(destination, _COMMIT, commit)
    if not complete(folder, claim, listing, Written(records, infos)):
        raise WriteError(f"{folder.at(_JOB)}: is of another writer now; look what it has written, and run this again")


def complete(folder: Folder, claim: Claim, listing: Mapping[str, int], written: Written | None = None) -> bool:
    """Put new files in the place of old ones, write the manifest, tidy up. May be interrupted and done again.

    ``listing`` is what the folder holds.

    Returns whether there was something to be completed: what a writer says late, of a job that is no more, is removed.
    """
    store = folder.store
    commit, settings = _read_note(folder, _COMMIT, _read_commit)
    job = _read_note(folder, _JOB, read_job) if _JOB in listing else None
    is_due = job is not None and (job.job, job.writer) == (commit.job, commit.writer)
    staging, moved = _staging(commit.job), list[str]()
    if is_due:
        if gone := [
            n for n, (size, _) in commit.files.items() if size not in (listing.get(n), listing.get(staging + n))
        ]:
            raise DestinationError(
                f"{folder.shown}/{_COMMIT}: says that {gone[0]} was written, but it has gone or is another one; "
                f"restore it, or remove {folder.shown}/{WRITING} and pass overwrite=True to begin anew"
            )
        staged = {name for name in listing if name.startswith(staging)}
        if staged:  # what is found without a manifest is read as it is; with one, it would be missed
            claim.remove([folder.at(name) for name in MANIFEST_NAMES])
        # Those that are not there have been moved before.
        moved = [name for name in commit.move if staging + name in staged]
        claim.keep(lambda: in_threads(lambda name: move_file(store, folder.at(staging + name), folder.at(name)), moved))
        claim.remove([folder.at(name) for name in commit.remove if name in listing])
        if written is not None and moved:  # where these are, the storage tells of them as of other files
            written = written._replace(infos=list_infos(store, folder.path))
        manifest = written and known_manifest(folder, settings, commit, written)
        manifest = manifest or claim.keep(lambda: open_written(folder, settings, commit))
        path = folder.at(MANIFEST_NAME)
        claim.keep(lambda: save_manifest(manifest, store, path, _as_json(settings), claim.scratch))
    if is_due or job is None:  # all that is left is litter
        ours = {name for name in listing if name.startswith(f"{WRITING}/")}
        litter = {name for name in ours if not is_of_claims(name.removeprefix(f"{WRITING}/"))}
        # By its name too: should a listing miss the mark, nobody could read what is complete.
        names = {*litter, INCOMPLETE_NAME} - {_JOB, _COMMIT, *(staging + name for name in moved)}
        claim.remove([folder.at(name) for name in sorted(names)])
        if not store.is_object_store:
            for path in (folder.at(_DONE), folder.at(_STAGED)):
                claim.keep(partial(remove_folder, store, path, claim.scratch))
        # Each of the two says that all before it is done, should this be the moment to be killed.
        claim.remove([folder.at(_JOB)])
    claim.remove([folder.at(_COMMIT)])
    return is_due


def _read_commit(content: bytes) -> tuple[Commit, Settings]:
    commit = read_commit(content)
    settings = read_settings(commit.settings)
    if commit.columns and get_format(settings.file_format).metadata == "none":
        refuse("columns", list(commit.columns), f"empty, as {settings.file_format} has no metadata")
    return commit, settings
