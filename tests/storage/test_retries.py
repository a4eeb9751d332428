"""How often a storage is asked again, after which pauses, and of what: the numbers that users are told."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        with pytest.raises(ReadError, match="x: failed after 5 attempts: ConnectionError: away"):
            with_retries(failing(ConnectionError("away")), "x")
    assert len(pauses) == 50 * 4
    for number in range(4):
        shares = [pause / (0.2 * 2**number) for pause in pauses[number::4]]
        assert 0.5 <= min(shares) < 0.9, "jitter: else all that failed together ask again together"
        assert 1.1 < max(shares) <= 1.5


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
