"""What writers note in a folder, read as what it is: bytes that anybody may have put there.

A note of another shape than that of its kind is a :class:`DamagedNoteError`, whatever it holds; and so is one with a
name that leads out of the folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from dask_embedding_reader.formats.registry import all_suffixes

_OWN_NAME = re.compile(r"[0-9]{8}\.[a-z0-9]+", re.ASCII)
_ID = re.compile(r"([0-9a-f]{32})?", re.ASCII)
_CHECKSUM = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:")
_SHOWN_CHARACTERS = 60


class DamagedNoteError(ValueError):
    """A note is not what writers write."""


class Job(NamedTuple):
    """What is being written to a folder, and by whom."""

    settings: Mapping[str, Any]
    """All that decides what is written, as JSON writes it."""
    replaces: tuple[str, ...] = ()
    """The files that the new ones take the place of."""
    job: str = ""
    """The writer that began it; what it wrote is under this name. Empty of releases that did not tell."""
    writer: str = ""
    """The writer that goes on with it. What another one says of it later does not count."""


class Commit(NamedTuple):
    """That all is written, and what is left to do."""

    settings: Mapping[str, Any]
    """All that decided what was written, as JSON writes it."""
    columns: tuple[str, ...]
    """The metadata columns."""
    files: dict[str, tuple[int, str]]
    """The size and SHA-256 of each file."""
    move: tuple[str, ...]
    """The files that take the place of others."""
    remove: tuple[str, ...]
    """What is no part of it."""
    rows: int
    """How many there are."""
    job: str = ""
    """As in the job."""
    writer: str = ""
    """As in the job."""


def is_own_name(name: str) -> bool:
    """Tell whether a file has a name such as parts are given."""
    return _OWN_NAME.fullmatch(name) is not None and name.endswith(all_suffixes())


def is_inside(name: str) -> bool:
    """Tell whether a name of data leads to a file in the folder, on every kind of storage."""
    return (
        0 < len(name) <= 4096
        and name.endswith(all_suffixes())
        and not any(part == "" or part.startswith((".", "_")) for part in name.split("/"))
        and not any(sign in name for sign in ("\\", "\0", "::", "://"))
        and not _DRIVE.match(name)
    )


def read_job(content: bytes) -> Job:
    """Read ``job.json``."""
    note = load(content)
    replaces = tuple(_inside(name, "replaces") for name in _list(note, "replaces"))
    return Job(_settings(note), replaces, id_of(note, "job"), id_of(note, "writer"))


def read_commit(content: bytes) -> Commit:
    """Read ``commit.json``."""
    note = load(content)
    settings = _settings(note)
    files = _files(note)
    move = tuple(_one_of(name, "move", files) for name in _list(note, "move"))
    remove = tuple(_inside(name, "remove") for name in _list(note, "remove"))
    if common := files.keys() & set(remove):
        refuse("remove", min(common), "a file that is no part of the collection")
    columns = tuple(_is(name, "columns", str, "a text") for name in _list(note, "columns"))
    ids = id_of(note, "job"), id_of(note, "writer")
    return Commit(settings, columns, files, move, remove, integer(note, "rows"), *ids)


def _settings(note: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = _is(note.get("settings"), "settings", dict, "a note in the note")
    for name, value in settings.items():
        if not (value is None or isinstance(value, str | bool | int) or _is_finite(value)):
            refuse(f"settings: {name}", value, "a text or a number")
    return settings


def _files(note: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    files: dict[str, Any] = _is(note.get("files"), "files", dict, "a note in the note")
    return {name: _facts(name, value) for name, value in files.items()}


def _facts(name: str, value: Any) -> tuple[int, str]:
    if not is_own_name(name):
        refuse("files", name, "a name such as 00000000.npy")
    if not isinstance(value, list) or len(value) != 2:
        refuse(name, value, "a size and a checksum")
    facts = {"size": value[0], "checksum": value[1]}
    if not _CHECKSUM.fullmatch(text(facts, "checksum")):
        refuse(name, value[1], "a SHA-256")
    return integer(facts, "size"), value[1]


# ---------------------------------------------------------------------------------------------------------------------
# Values of notes


def load(content: bytes) -> dict[str, Any]:
    """Read a note of any kind."""
    try:
        note = json.loads(content)
    except RecursionError:
        raise DamagedNoteError("it is nested too deeply") from None
    except ValueError as error:
        raise DamagedNoteError(f"it is no JSON ({error})") from None
    return dict(_is(note, "it", dict, "a JSON object"))


def text(note: Mapping[str, Any], key: str) -> str:
    """Return a text of a note."""
    return str(_is(note.get(key), key, str, "a text"))


def integer(note: Mapping[str, Any], key: str, least: int = 0) -> int:
    """Return an integer of a note."""
    value = note.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        refuse(key, value, f"an integer from {least} on")
    return value


def number(note: Mapping[str, Any], key: str) -> float:
    """Return a number of a note."""
    value: Any = note.get(key)
    if not _is_finite(value):
        refuse(key, value, "a finite number")
    return float(value)


def id_of(note: Mapping[str, Any], key: str) -> str:
    """Return who it is that a note names; nobody where it is of an earlier release."""
    value = note.get(key, "")
    if not isinstance(value, str) or not _ID.fullmatch(value):
        refuse(key, value, "32 hexadecimal digits")
    return value


def files_of_part(note: Mapping[str, Any], names: list[str]) -> dict[str, tuple[int, str]]:
    """Return the files of a record, which must have these names."""
    files = _files(note)
    if list(files) != names:
        refuse("files", list(files), ", ".join(names))
    return files


def _list(note: Mapping[str, Any], key: str) -> list[Any]:
    return list(_is(note.get(key), key, list, "a list"))


def _inside(name: Any, key: str) -> str:
    if not isinstance(name, str) or not is_inside(name):
        refuse(key, name, "the name of a file of data in this folder")
    return name


def _one_of(name: Any, key: str, names: Mapping[str, Any]) -> str:
    if not isinstance(name, str) or name not in names:
        refuse(key, name, "one of its files")
    return name


def _is_finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _is(value: Any, key: str, kind: type, expected: str) -> Any:
    if not isinstance(value, kind):
        refuse(key, value, expected)
    return value


def refuse(key: str, value: Any, expected: str) -> NoReturn:
    """Say what is wrong with a value of a note."""
    try:
        shown = ascii(value)
    except (RecursionError, ValueError):  # nested deeply; an integer of thousands of digits
        shown = f"a value of type {type(value).__name__}"
    if len(shown) > _SHOWN_CHARACTERS:
        shown = f"{shown[:_SHOWN_CHARACTERS]}..."
    raise DamagedNoteError(f"{key} is {shown}, not {expected}")
