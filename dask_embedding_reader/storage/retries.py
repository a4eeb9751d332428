"""Trying again where that can help, and saying what went wrong without telling secrets."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from dask_embedding_reader._common.threads import is_stopped, pause
from dask_embedding_reader.errors import EmbeddingReaderError, FileChangedError, ReadError

logger = logging.getLogger("dask_embedding_reader")

ATTEMPTS = 5
"""How often a storage is asked before that fails."""

FIRST_PAUSE_SECONDS = 0.2
"""The pause after the first failed attempt; it doubles each time, with jitter."""

LONGEST_PAUSE_SECONDS = 60.0
"""The longest that a server's ``Retry-After`` is obeyed."""


STALL_SECONDS = 30.0
"""A read that makes no progress for so long has failed; `storage_options` may say otherwise where a client has such an
option (S3: ``config_kwargs={"read_timeout": ...}``, 15 s by default; HTTP: ``timeout=aiohttp.ClientTimeout(...)``)."""


class EndlessAnswerError(ConnectionError):
    """A server says that its answer is still to come, again and again."""

    def __init__(self, *_: Any) -> None:
        super().__init__('the server says "100 Continue" or the like again and again, and never answers')


_CANNOT_HELP = (FileChangedError, PermissionError, IsADirectoryError, NotADirectoryError, EndlessAnswerError)
_FAULTS_OF_A_PROGRAM = (TypeError, ValueError, AttributeError, KeyError, NotImplementedError)
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})
"""Names of exceptions of botocore and google-auth, which need not be installed."""

_SECRET = re.compile("key|secret|token|pass|cred|auth|user|sas|cookie|sign|connection_string", re.IGNORECASE)
"""Names of options that may hold secrets."""

T = TypeVar("T")


def with_retries(attempt: Callable[[], T], what: str) -> T:
    """Call, and call again with growing pauses when it fails in a way that may pass.

    Raises
    ------
    ReadError
        If it has failed so often that it is given up. What cannot pass is raised as it is, after the first attempt,
        and so is whatever went wrong when nobody waits for the result any more.
    """
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except Exception as error:
            if not may_pass(error) or is_stopped():
                raise
            if number == ATTEMPTS:
                raise ReadError(
                    f"{what}: failed after {number} attempts: {describe(error)}; check the address and the connection, "
                    "and run this again"
                ) from shown_cause(error)
            seconds = max(FIRST_PAUSE_SECONDS * 2 ** (number - 1) * random.uniform(0.5, 1.5), _asked_pause(error))  # noqa: S311 - jitter
            logger.warning(
                "%s: attempt %d of %d failed (%s); again in %.1f s", what, number, ATTEMPTS, describe(error), seconds
            )
            pause(seconds)
            if is_stopped():
                raise
    raise AssertionError("unreachable")


def may_pass(error: BaseException) -> bool:
    """Tell whether trying again may help: not for what is a plain refusal or a fault of the program."""
    if isinstance(error, _CANNOT_HELP):
        return False
    if isinstance(error, TimeoutError):  # S3 says so of a slow connection, with 400
        return True
    if status := http_status(error):
        return status_may_pass(status)
    if isinstance(error, FileNotFoundError):
        # fsspec says of every file that it could not ask for over HTTP that it does not exist.
        return error.__cause__ is not None and may_pass(error.__cause__)
    return not isinstance(error, _FAULTS_OF_A_PROGRAM) and type(error).__name__ not in _NO_CREDENTIALS


def status_may_pass(status: int) -> bool:
    """Tell whether a server that answers with this status may answer otherwise next time."""
    return status in (408, 425, 429) or (status >= 500 and status not in (501, 505))


def http_status(error: BaseException) -> int:
    """Return the status of the answer that an exception stands for, 0 where there was none."""
    for cause in _chain(error):
        status = _boto_metadata(cause).get("HTTPStatusCode") or getattr(cause, "status", None)  # S3, aiohttp
        status = status or getattr(cause, "status_code", None)  # Azure
        status = status or getattr(getattr(cause, "response", None), "status_code", None)  # requests
        if type(cause).__name__ == "HttpError":  # Google; what other clients call so is none of the server's
            status = status or getattr(cause, "code", None)
        if re.fullmatch("[0-9]{3}", str(status)) and int(str(status)) >= 400:
            return int(str(status))
    return 0


def _asked_pause(error: BaseException) -> float:
    """Return how many seconds the server asks to be left alone, 0 where it asks for nothing."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        for headers in (_boto_metadata(cause).get("HTTPHeaders"), getattr(cause, "headers", None), response):
            found = getattr(headers, "headers", headers)
            value = found.get("Retry-After") or found.get("retry-after") if isinstance(found, Mapping) else None
            if value is not None:
                return min(_seconds(str(value)), LONGEST_PAUSE_SECONDS)
    return 0.0


def _seconds(retry_after: str) -> float:
    """Read a number of seconds, or a date; what is neither asks for nothing."""
    if re.fullmatch(r"\s*[0-9]+(\.[0-9]*)?\s*", retry_after):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):  # no date, or one that the system cannot count to
        return 0.0


def _boto_metadata(error: BaseException) -> Mapping[str, Any]:
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata") if isinstance(response, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Go from an exception to what caused it: clients translate what they got."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def describe(error: BaseException) -> str:
    """One line about an exception: its type, and its text where it has one."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # what fsspec took for a missing file
    text = hide_secrets(" ".join(str(error).split()))
    if isinstance(error, EmbeddingReaderError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def explain(error: BaseException, *, asks_first: bool = False) -> str:
    """Describe why a storage does not answer, with the remedy where the error shows what is missing.

    ``asks_first`` is for the first requests, which fail where the URL or an option is at fault.
    """
    remedy = credentials_remedy(error)
    if not remedy and asks_first and isinstance(error, TypeError | ValueError):
        remedy = "check the URL and storage_options"
    return f"{describe(error)}; {remedy}" if remedy else describe(error)


def credentials_remedy(error: BaseException) -> str:
    """Say what to do where credentials are missing or give no permission; nothing where they are not at fault."""
    if type(error).__name__ in _NO_CREDENTIALS:
        return (
            "give credentials in storage_options or in the environment; a public bucket needs none, with "
            '{"anon": True} on S3 and {"token": "anon"} on Google'
        )
    if isinstance(error, PermissionError) or http_status(error) in {401, 403}:
        return "check the permissions, and the credentials in storage_options"
    return ""


def hide_secrets(text: str) -> str:
    """Leave out what may be secret in the URLs of a text: passwords, and queries, which may be signatures.

    In a time that grows with the length of the text: a web server may link to whatever it likes.
    """
    text = re.sub(r"(?i)https?://[^\s'\"]+", _without_web_query, re.sub(r"(://)[^/\s]+@", r"\1", text))
    return re.sub(r"[^\s'\")]+", _without_query, text)


def _without_web_query(found: re.Match[str]) -> str:
    """Cut a URL at its query, wherever that begins: names may end in a bracket, patterns in a star."""
    url, _, query = found[0].partition("?")
    return f"{url}{query[len(query.rstrip('),.;:')) :]}" if "=" in query else found[0]


def _without_query(found: re.Match[str]) -> str:
    word = found[0]
    query = re.search(r"(?<=[\w/])\?", word)
    return word if query is None or "=" not in word[query.end() :] else word[: query.start()]


def is_secret(name: str) -> bool:
    """Tell whether an option of this name may hold a secret."""
    return _SECRET.search(name) is not None


def shown_cause(error: BaseException) -> BaseException | None:
    """Return the cause to raise an error from: none where a traceback, or its ``repr``, would show a secret of it."""
    contexts = {id(e): e for cause in _chain(error) for e in (cause, cause.__context__) if e is not None}
    return None if any(map(_tells_secrets, contexts.values())) else error


def _tells_secrets(error: BaseException) -> bool:
    # aiohttp's exceptions keep the headers that were sent.
    headers = getattr(getattr(error, "request_info", None), "headers", None) or ()
    named = any(is_secret(name) for name in headers if name.lower() != "user-agent")
    return named or hide_secrets(str(error)) != str(error)
