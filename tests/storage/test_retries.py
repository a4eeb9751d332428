"""How often a storage is asked again, after which pauses, and of what: the numbers that users are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader._common.threads import stoppable_pool
from dask_embedding_reader.errors import EmbeddingReaderError, FileChangedError, ReadError
from dask_embedding_reader.storage import retries
from dask_embedding_reader.storage.retries import may_pass, with_retries


class RefusedError(Exception):
    """As clients spell an answer of a server."""

    def __init__(self, status: int, headers: Any = None) -> None:
        super().__init__(f"answered {status}")
        self.status, self.headers = status, headers or {}


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def failing(error: Exception, times: int = 1_000) -> Callable[[], str]:
    left = iter(range(times))

    def attempt() -> str:
        if next(left, None) is None:
            return "done"
        raise error

    return attempt


def test_five_attempts_with_pauses_that_double_and_differ(pauses: list[float]) -> None:
    for _ in range(50):
        with pytest.raises(ReadError, match="x: failed after 5 attempts: ConnectionError: away; check the address "):
            with_retries(failing(ConnectionError("away")), "x")
    assert len(pauses) == 50 * 4
    for number in range(4):
        shares = [pause / (0.2 * 2**number) for pause in pauses[number::4]]
        assert 0.5 <= min(shares) < 0.9, "jitter: else all that failed together ask again together"
        assert 1.1 < max(shares) <= 1.5


@pytest.mark.parametrize("when", ["asked", "paused"])
def test_who_is_stopped_meanwhile_asks_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    stopped, attempts = threading.Event(), []

    def attempt() -> None:
        attempts.append(1)
        if when == "asked":
            stopped.set()
        raise ConnectionError("away")

    if when == "paused":
        monkeypatch.setattr(retries, "pause", lambda _: stopped.set())
    with stoppable_pool(1, stopped) as pool, pytest.raises(ConnectionError, match="away"):
        pool.submit(with_retries, attempt, "x").result()
    assert len(attempts) == 1
    assert len(caplog.records) == (when == "paused"), "it is not said that there will be another one"


@pytest.mark.parametrize("times", range(5))
def test_what_comes_in_the_end_is_returned(pauses: list[float], times: int) -> None:
    assert with_retries(failing(RefusedError(503), times), "x") == "done"
    assert len(pauses) == times


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        ("7", 7, 7),
        (" 7.5 ", 7.5, 7.5),
        ("1000", 60, 60),
        ("0", 0, 0.3),
        ("soon", 0, 0.3),
        ("-5", 0, 0.3),
        (lambda: formatdate(time.time() + 30, usegmt=True), 1, 30),
        (lambda: formatdate(time.time() + 3_000, usegmt=True), 60, 60),
        (lambda: formatdate(time.time() - 30, usegmt=True), 0, 0.3),
    ],
    ids=["seconds", "in blanks", "long", "nothing", "a word", "negative", "a date", "a far date", "a past date"],
)
@pytest.mark.parametrize("name", ["Retry-After", "retry-after"])
def test_a_server_is_left_alone_as_long_as_it_asks_but_not_for_hours(
    pauses: list[float], name: str, asked: Any, least: float, most: float
) -> None:
    error = RefusedError(429, {name: asked() if callable(asked) else asked})
    assert with_retries(failing(error, 1), "x") == "done"
    assert len(pauses) == 1
    assert least <= pauses[0] <= most


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("no"),
        IsADirectoryError("no"),
        NotADirectoryError("no"),
        FileNotFoundError("no"),
        FileChangedError("no"),
        retries.EndlessAnswerError(),
        TypeError("no"),
        KeyError("no"),
        NotImplementedError("no"),
        caused(FileNotFoundError("no"), RefusedError(404)),
        *map(RefusedError, (400, 401, 403, 404, 410, 412, 416, 501, 505)),
    ],
    ids=repr,
)
def test_what_cannot_pass_is_raised_at_once_as_it_is(pauses: list[float], error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        with_retries(failing(error), "x")
    assert caught.value is error
    assert not pauses


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("away"),
        TimeoutError("away"),
        OSError("away"),
        ReadError("short"),
        RuntimeError("odd"),
        caused(TimeoutError("as s3fs says of RequestTimeout"), RefusedError(400)),
        caused(FileNotFoundError("as fsspec says"), ConnectionError("away")),
        caused(FileNotFoundError("as fsspec says"), RefusedError(503)),
        *map(RefusedError, (408, 425, 429, 500, 502, 503, 504, 599)),
    ],
    ids=repr,
)
def test_what_may_pass_is_tried_again(pauses: list[float], error: Exception) -> None:
    assert may_pass(error)
    assert with_retries(failing(error, 4), "x") == "done"
    assert len(pauses) == 4


SECRETS = [
    "https://user:SECRET@host/a?b=1",
    "https://host/a.npy?X-Signature=SECRET&x=1",
    "s3://bucket/k?versionId=1&token=SECRET",
    "ftp://u:SECRET@[::1]:21/x",
]


@given(st.sampled_from(SECRETS), st.sampled_from(["", "'", "(", "before "]), st.sampled_from(["", "'", ")", " after"]))
def test_no_message_holds_what_an_address_hides(url: str, before: str, after: str) -> None:
    """Whatever exception of another library tells it, itself or as the cause of ours."""
    for error in (OSError(f"{before}{url}{after}"), Exception(f"{before}{url}{after}")):
        assert "SECRET" not in retries.describe(error)
        assert retries.describe(error).startswith(type(error).__name__)
        assert retries.shown_cause(error) is None, "a traceback would show it"
        assert retries.shown_cause(caused(ValueError("x"), error)) is None
    plain = OSError("nothing to hide")
    assert retries.shown_cause(plain) is plain
    told = caused(FileNotFoundError("x"), EmbeddingReaderError(f"{before}{url}{after}"))
    assert "SECRET" not in retries.describe(told)


# ---------------------------------------------------------------------------------------------------------------------
# What clients make of answers


def error(kind: str = "Error", text: str = "", cause: BaseException | None = None, **attributes: Any) -> Exception:
    """As some client has it."""
    made: Exception = type(kind, (Exception,), {})(text)
    for name, value in attributes.items():
        setattr(made, name, value)
    made.__cause__ = cause
    return made


def of_boto(status: Any = None, headers: Any = None) -> dict[str, Any]:
    return {"ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers}}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (error(), 0),
        (error(response=of_boto(503)), 503),
        (error(response=of_boto()), 0),
        (error(response={}), 0),
        (error(response={"ResponseMetadata": None}), 0),
        (error(status=404), 404),
        (error(status="404"), 404),
        (error(status_code=412), 412),
        (error(response=SimpleNamespace(status_code=416)), 416),
        (error("HttpError", code=429), 429),
        (error("HttpError", code="429"), 429),
        (error("HttpError", status=500, code=429), 500),
        (error("OtherError", code=429), 0),
        (error(status=200), 0),
        (error(status=399), 0),
        (error(status=400), 400),
        (error(status=1000), 0),
        (error(status="Busy"), 0),
        (error(cause=error(status=503)), 503),
        (error(status=200, cause=error(cause=error(status_code=503))), 503),
        (error(status=404, cause=error(status=503)), 404),
    ],
)
def test_the_status_of_an_answer_is_found_wherever_a_client_keeps_it(found: Exception, status: int) -> None:
    assert retries.http_status(found) == status


def test_errors_that_cause_each_other_are_looked_at_once() -> None:
    first = error()
    first.__cause__ = error(cause=first)
    assert retries.http_status(first) == 0
    assert retries.shown_cause(first) is first


ASKED = {"Retry-After": "7"}


@pytest.mark.parametrize(
    ("found", "seconds"),
    [
        (error(status=503), None),
        (error(status=503, headers=ASKED), 7),
        (error(status=503, headers={"retry-after": "7"}), 7),
        (error(status=503, headers="Retry-After: 7"), None),
        (error(response=of_boto(503, ASKED)), 7),
        (error(response=of_boto(503, ASKED), headers={"Retry-After": "9"}), 7),
        (error(response=SimpleNamespace(status_code=503, headers=ASKED)), 7),
        (error(headers={"x": "y"}, response=SimpleNamespace(status_code=503, headers=ASKED)), 7),
        (error(cause=error(status=503, headers=ASKED)), 7),
        (error(status=503, headers={"Retry-After": "Tue, 02 Jan 9999999 03:04:05 GMT"}), None),
    ],
)
def test_the_pause_that_a_server_asks_for_is_found_wherever_a_client_keeps_it(
    pauses: list[float], found: Exception, seconds: float | None
) -> None:
    assert with_retries(failing(found, 1), "x") == "done"
    assert pauses == [seconds] if seconds is not None else 0.1 <= pauses[0] <= 0.3


@pytest.mark.parametrize("name", ["NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"])
def test_who_has_no_credentials_is_not_asked_again(name: str) -> None:
    assert not may_pass(error(name))
    assert may_pass(error(f"{name}s"))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (OSError("a  b\nc"), "OSError: a b c"),
        (OSError(), "OSError"),
        (ReadError("as it is"), "as it is"),
        (error("Odd", "http://u:p@h/a?b=c&d"), "Odd: http://h/a"),
        (caused(FileNotFoundError("x"), OSError("y")), "OSError: y"),
        (caused(OSError("x"), OSError("y")), "OSError: x"),
    ],
)
def test_an_error_is_described_in_a_line(found: Exception, said: str) -> None:
    assert retries.describe(found) == said


@pytest.mark.parametrize(
    ("found", "remedy"),
    [
        (error("NoCredentialsError"), "; give credentials in storage_options or in the environment; a public bucket"),
        (PermissionError("x"), "; check the permissions, and the credentials in storage_options"),
        (error("Odd", "x", status=403), "; check the permissions, and the credentials in storage_options"),
        (TypeError("unexpected keyword argument 'endpoint'"), "; check the URL and storage_options"),
        (OSError("x"), ""),
    ],
)
def test_what_is_missing_is_said_with_the_remedy(found: Exception, remedy: str) -> None:
    said = retries.explain(found, asks_first=True)
    assert said.startswith(retries.describe(found) + remedy)
    assert remedy or said == retries.describe(found)
    later = retries.explain(found)
    assert later == (retries.describe(found) if isinstance(found, TypeError) else said)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nothing", "nothing"),
        ("", ""),
        ("what? a=b", "what? a=b"),
        ("a?b", "a?b"),
        ("s3://b/a?versionId=1", "s3://b/a"),
        ("see (https://u:p@h:1/a/?x=1) and 's3://b/c?d=e', ok", "see (https://h:1/a/) and 's3://b/c', ok"),
        ("https://u@h/a@b", "https://h/a@b"),
        ("mail me@home", "mail me@home"),
        ("/a*?b=c", "/a*?b=c"),
        ("/a?b?c=d", "/a"),
        ("http://h/f(1)?sig=S, HTTPS://h/[01]*?a(b)=S) http://h/a?b", "http://h/f(1), HTTPS://h/[01]*) http://h/a?b"),
    ],
)
def test_what_is_hidden_in_a_text(text: str, shown: str) -> None:
    assert retries.hide_secrets(text) == shown


@pytest.mark.parametrize(
    ("headers", "is_shown"),
    [({}, True), ({"User-Agent": "x"}, True), ({"X-Api-Key": "x"}, False), ({"accept": "x", "Cookie": "x"}, False)],
)
def test_an_error_that_keeps_the_headers_that_were_sent_is_no_cause(headers: dict[str, str], is_shown: bool) -> None:
    found = error(request_info=SimpleNamespace(headers=headers))
    outer = ValueError("x")
    outer.__context__ = found
    for each in (found, error(cause=found), outer):
        assert (retries.shown_cause(each) is each) is is_shown
    assert retries.is_secret("aws_SECRET_access_key")
    assert not retries.is_secret("region")
