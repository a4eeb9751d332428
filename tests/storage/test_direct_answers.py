"""What is made of answers that come without fsspec's clients, and which connections are used again."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from dask_embedding_reader.errors import ReadError
from dask_embedding_reader.storage.connections import Asked
from dask_embedding_reader.storage.direct import http as direct_http
from dask_embedding_reader.storage.direct import read as direct
from dask_embedding_reader.storage.direct.http import Connections, Timeouts
from dask_embedding_reader.storage.direct.site import Site
from dask_embedding_reader.storage.ranges import ByteRange
from dask_embedding_reader.storage.retries import EndlessAnswerError

FILE = bytes(range(100))


FOR_EVER = Timeouts(1, 1, None)
ALL_TOLD = {"size": 100, "ETag": "e", "mimetype": "t", "Last-Modified": "m"}


class Answer:
    """An answer as ``http.client`` has it."""

    def __init__(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.status, self.reason = status, "said so"
        self.body, self.length = body, (len(body) if length is None else length)
        self.headers = Message()
        for name, value in headers.items():
            self.headers[name.replace("_", "-")] = value

    def getheader(self, name: str, default: str | None = None) -> str | None:
        return self.headers.get(name, default)

    def read(self, nbytes: int | None = None) -> bytes:
        data, self.body = self.body[:nbytes], self.body[len(self.body) if nbytes is None else nbytes :]
        self.length -= len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        data = self.read(min(buffer.nbytes, 7))
        buffer[: len(data)] = data
        return len(data)


@dataclass
class Asking:
    """Gives one answer after the other, or raises it."""

    answers: list[Any]
    timeouts: Timeouts = FOR_EVER
    asked: list[tuple[str, str, str, Mapping[str, str]]] = field(default_factory=list)

    def _give(self, way: str, method: str, url: str, headers: Mapping[str, str]) -> Iterator[Any]:
        self.asked.append((way, method, url, headers))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        yield answer

    @contextmanager
    def ask(self, method: str, url: str, headers: Mapping[str, str], _: Asked) -> Iterator[Any]:
        yield from self._give("plain", method, url, headers)

    @contextmanager
    def ask_and_follow(self, method: str, url: str, headers: Mapping[str, str], _: Asked) -> Iterator[Any]:
        yield from self._give("following", method, url, headers)


def place(asking: Asking, *, is_web: bool = True, has_answered: bool = False) -> direct.Place:
    connections: Any = asking
    site = Site("http://h", lambda url, part: {"url": url, "range": part}, connections, is_web, has_answered)
    return direct.Place(site, "http://h/a")


def part(first: int = 10, last: int = 29, status: int = 206, size: str = "100", **headers: Any) -> Answer:
    return Answer(status, FILE[first : last + 1], Content_Range=f"bytes {first}-{last}/{size}", **headers)


UNUSUAL = direct.UnusualAnswer


def cut(answer: Answer, missing: int) -> Answer:
    """Let an answer end early."""
    answer.body = answer.body[:-missing]
    return answer


@pytest.mark.parametrize(
    ("make", "before", "after"),
    [
        (lambda: part(), {"size": 100}, {"size": 100}),
        (lambda: part(size="*"), {"size": None}, {"size": None}),
        (lambda: part(status=200), {"size": 100}, {"size": 100}),
        (
            lambda: part(ETag="e", Content_Type="t", Last_Modified="m"),
            ALL_TOLD,
            ALL_TOLD,
        ),
        (lambda: part(ETag="", Content_Encoding="identity"), {"size": 100}, {"size": 100}),
        (lambda: part(Content_Encoding=""), {"size": 100}, {"size": 100}),
        (lambda: part(Content_Encoding="gzip"), UNUSUAL, UNUSUAL),
        (lambda: Answer(200, FILE), UNUSUAL, UNUSUAL),
        (lambda: part(9), ReadError, ReadError),
        (lambda: part(11), ReadError, ReadError),
        (lambda: part(10, 30), ReadError, ReadError),
        (lambda: part(10, 28), {"size": 100, "count": 19}, {"size": 100, "count": 19}),
        (lambda: cut(part(), 1), ConnectionError, ConnectionError),
        (lambda: Answer(206, b"", Content_Range="nonsense"), ReadError, ReadError),
        (lambda: Answer(302, b"", Location="x"), UNUSUAL, UNUSUAL),
        (lambda: Answer(300), UNUSUAL, UNUSUAL),
        (lambda: Answer(404), UNUSUAL, FileNotFoundError),
        (lambda: Answer(401), UNUSUAL, PermissionError),
        (lambda: Answer(403), UNUSUAL, PermissionError),
        (lambda: Answer(410), UNUSUAL, UNUSUAL),
        (lambda: Answer(416), UNUSUAL, UNUSUAL),
        (lambda: Answer(501), UNUSUAL, UNUSUAL),
        (lambda: Answer(429, b"", Retry_After="7"), direct.AnswerError, direct.AnswerError),
        (lambda: Answer(503), direct.AnswerError, direct.AnswerError),
        (lambda: ConnectionError("away"), UNUSUAL, ConnectionError),
        (lambda: TimeoutError("away"), UNUSUAL, TimeoutError),
        (lambda: EndlessAnswerError(), EndlessAnswerError, EndlessAnswerError),
        (lambda: ReadError("given up"), UNUSUAL, ReadError),
    ],
)
@pytest.mark.parametrize("is_web", [True, False])
@pytest.mark.parametrize("has_answered", [False, True])
def test_a_range_is_taken_from_an_answer_or_left_to_others(
    make: Any, before: Any, after: Any, is_web: bool, has_answered: bool
) -> None:
    asking, buffers = Asking([make()]), [bytearray(8), bytearray(12)]
    asked = place(asking, is_web=is_web, has_answered=has_answered)
    wanted = ByteRange(10, [memoryview(buffer) for buffer in buffers])
    result = after if has_answered else before
    if isinstance(result, dict):
        told = {**direct.get(asked, wanted, Asked())}
        count = result.get("count", 20)
        assert told == {name: value for name, value in result.items() if name != "count"}
        assert wanted.count == count
        assert b"".join(buffers)[:count] == FILE[10 : 10 + count]
        assert asked.site.has_answered
    else:
        # Where a site has answered once, all options were understood.
        answered = result is not UNUSUAL and isinstance(make(), Answer) and "Content-Range" in make().headers
        known = asked.site.has_answered
        expected = ConnectionError if result is ConnectionError else result
        with pytest.raises(expected) as caught:
            direct.get(asked, wanted, Asked())
        assert asked.site.has_answered is (known or answered)
        if isinstance(caught.value, direct.AnswerError):
            answer = make()
            assert (caught.value.status, str(caught.value)) == (answer.status, f"{answer.status} said so")
            assert caught.value.headers == dict(answer.headers)
        if isinstance(caught.value, FileNotFoundError | PermissionError):
            assert "said so" in str(caught.value)
    way = "following" if is_web else "plain"
    assert asking.asked == [(way, "GET", "http://h/a", {"url": "http://h/a", "range": "bytes=10-29"})]


def test_what_an_answer_says_of_its_faults() -> None:
    buffer = memoryview(bytearray(20))
    for answer, said in (
        (part(9), "the bytes from 9 on came where those from 10 on were asked for"),
        (part(10, 30), "more than the 20 bytes came that were asked for"),
        (cut(part(), 13), "the answer ended 13 bytes early"),
    ):
        with pytest.raises(OSError, match=said) if "early" in said else pytest.raises(ReadError, match=said):
            direct.get(place(Asking([answer])), ByteRange(10, [buffer]), Asked())


@pytest.mark.parametrize(("seconds", "is_late"), [(0, False), (4.5, False), (5, True)])
def test_an_answer_may_take_so_long_in_all(seconds: float, is_late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at before each block: at the beginning and after a while."""
    now = iter([0.0, 0.0, *[seconds + 0.5] * 20])
    monkeypatch.setattr(direct, "time", SimpleNamespace(monotonic=lambda: next(now)))
    asked = place(Asking([part()], Timeouts(1, 1, 5)))
    wanted = ByteRange(10, [memoryview(bytearray(20))])
    if is_late:
        with pytest.raises(TimeoutError, match="the answer did not come in 5 s"):
            direct.get(asked, wanted, Asked())
    else:
        assert direct.get(asked, wanted, Asked())["size"] == 100


def test_who_has_given_up_takes_no_more_of_an_answer() -> None:
    asked = Asked()
    asked.give_up()
    with pytest.raises(ReadError, match="nobody waits"):
        direct.get(place(Asking([part()])), ByteRange(10, [memoryview(bytearray(20))]), asked)


HEAD = {"range": "", "url": "http://h/a"}


@pytest.mark.parametrize(
    ("first_nbytes", "answers", "told"),
    [
        (0, [Answer(200, FILE, ETag="e", Content_Length="100")], {"size": 100, "ETag": "e"}),
        (0, [Answer(200), part(0, 0, ETag="e")], {"size": 100, "ETag": "e"}),
        (0, [Answer(200, Content_Length="0"), part(0, 0)], {"size": 100}),
        (0, [Answer(200, Content_Length="0"), Answer(416)], UNUSUAL),
        (0, [Answer(206, FILE, Content_Length="100")], UNUSUAL),
        (0, [Answer(404, Content_Length="0")], UNUSUAL),
        (0, [Answer(200, Content_Length="100", Content_Encoding="identity")], {"size": 100}),
        (0, [Answer(200, Content_Length="70", Content_Encoding="gzip")], UNUSUAL),
        (4, [part(0, 3)], {"size": 100, "head": FILE[:4]}),
        (4, [part(0, 2, size="3")], {"size": 3, "head": FILE[:3]}),
        (4, [part(0, 2)], UNUSUAL),
        (4, [part(0, 3, size="*")], UNUSUAL),
        (4, [part(0, 4)], ReadError),
        (4, [Answer(416), Answer(200, Content_Length="0"), Answer(416)], UNUSUAL),
        (4, [Answer(200, FILE), Answer(200, Content_Length="100")], {"size": 100}),
        (4, [Answer(200, FILE), Answer(403, Content_Length="100")], UNUSUAL),
        (4, [Answer(503)], direct.AnswerError),
    ],
)
def test_a_file_is_looked_up_with_its_first_bytes(first_nbytes: int, answers: list[Answer], told: Any) -> None:
    asking = Asking([*answers])
    if isinstance(told, dict):
        assert direct.look(place(asking), first_nbytes, Asked()) == told
    else:
        with pytest.raises(told):
            direct.look(place(asking), first_nbytes, Asked())
    methods = [(method, headers["range"]) for _, method, _, headers in asking.asked]
    # Where a file seems to be empty, its first byte tells.
    every = [("GET", "bytes=0-3"), ("HEAD", ""), ("GET", "bytes=0-0")]
    assert methods == every[0 if first_nbytes else 1 :][: len(answers)]
    assert not asking.answers


# ---------------------------------------------------------------------------------------------------------------------
# Connections


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 200, 206, 300, 304, 404])
@pytest.mark.parametrize("times", [0, 1, 9, 10])
def test_so_often_a_server_may_point_elsewhere(status: int, times: int) -> None:
    connections: Any = Connections(Timeouts(1, 1, None))
    asked = list[tuple[str, list[str]]]()
    pages = [Answer(status, b"x" * 70_000, Location=f"../{k}?q") for k in range(times)]
    answers = [*pages, Answer(302, b"no location"), Answer(200)]

    @contextmanager
    def ask(method: str, url: str, headers: Mapping[str, str], _: Asked) -> Iterator[Any]:
        asked.append((f"{method} {url}", [*headers]))
        yield answers[len(asked) - 1]

    connections.ask = ask
    headers = {"range": "r", "authorization": "a"}
    is_followed = status in (301, 302, 303, 307, 308)
    if is_followed and times == 10:
        with (
            pytest.raises(ConnectionError, match="the server points elsewhere, more than 10 times"),
            connections.ask_and_follow("GET", "http://h/a/b", headers, Asked()),
        ):
            pytest.fail("there is no answer")
    else:
        with connections.ask_and_follow("GET", "http://h/a/b", headers, Asked()) as answer:
            assert answer is answers[times if is_followed else 0]
    steps = times if is_followed else 0
    urls = ["http://h/a/b", *(f"http://h/{k}?q" for k in range(steps))][: 10 if is_followed else 1]
    assert asked == [(f"GET {url}", [*headers]) for url in urls]
    if is_followed:
        assert {len(page.body) for page in pages} <= {70_000 - 2**16}


def test_what_says_who_asks_does_not_go_elsewhere() -> None:
    connections: Any = Connections(Timeouts(1, 1, None))
    asked = list[dict[str, str]]()

    @contextmanager
    def ask(_: str, url: str, headers: Mapping[str, str], __: Asked) -> Iterator[Any]:
        asked.append({**headers})
        yield Answer(302, Location="http://other/") if url == "http://h/" else Answer(200)

    connections.ask = ask
    with connections.ask_and_follow("GET", "http://h/", {"range": "r", "authorization": "a"}, Asked()):
        assert asked == [{"range": "r", "authorization": "a"}, {"range": "r"}]


@pytest.mark.parametrize(
    ("seconds", "stands", "is_taken"),
    [(0.9, False, True), (1.0, False, False), (1.0, True, True), (14.9, True, True), (15.0, True, False)],
)
def test_a_connection_is_used_again_for_a_while_if_it_stands(
    seconds: float, stands: bool, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(direct_http, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(direct_http, "_stands", lambda sock: sock.stands)
    connections = Connections(Timeouts(1, 9, None))
    origin, older, kept = direct_http._Origin("http", "h", None), Mock(), Mock()
    kept.sock.stands, older.sock.stands = stands, True
    connections._keep(origin, older)
    now[0] += 0.5
    connections._keep(origin, kept)
    now[0] += seconds
    assert connections._take(origin._replace(port=81)) is None
    taken = connections._take(origin)
    is_older_in_time = seconds + 0.5 < 15
    assert taken is (kept if is_taken else older if is_older_in_time else None)
    assert kept.close.called is not is_taken
    if is_taken and seconds >= 1:
        kept.sock.settimeout.assert_called_once_with(9)
    connections.close()
    assert older.close.called is (is_taken or not is_older_in_time)
    assert connections._take(origin) is None


def test_a_connection_stands_as_long_as_nothing_came_over_it() -> None:
    for change, stands in (
        (lambda _: None, True),
        (lambda there: there.send(b"x"), False),
        (lambda there: there.close(), False),
        (lambda there: there.shutdown(socket.SHUT_WR), False),
    ):
        here, there = socket.socketpair()
        with here, there:
            change(there)
            assert direct_http._stands(here) is stands
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert not direct_http._stands(listening), "it is an error to ask"


@pytest.mark.parametrize(("scheme", "port"), [("ftp", None), ("file", None), ("", 80)])
def test_servers_point_to_web_servers_alone(scheme: str, port: int | None) -> None:
    connections = Connections(Timeouts(1, 1, None))
    with pytest.raises(ConnectionError, match=f"the server points to an address of the kind '{scheme}'"):
        connections._connect(direct_http._Origin(scheme, "h", port))


HTTP_ANSWER = "HTTP/1.1 {} X\r\nContent-Length: 3\r\n\r\nabc"
INTERIM = "HTTP/1.1 {} X\r\n\r\n"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (HTTP_ANSWER.format(200), 200),
        (INTERIM.format(100) + HTTP_ANSWER.format(206), 206),
        ((INTERIM.format(103) + INTERIM.format(199)) * 9 + INTERIM.format(100) + HTTP_ANSWER.format(404), 404),
        (INTERIM.format(102) * 20 + HTTP_ANSWER.format(200), None),
        (INTERIM.format(101), 101),
    ],
)
def test_a_server_may_say_so_often_that_its_answer_is_still_to_come(said: str, status: int | None) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(said.encode())
        answer = direct_http._Answer(here)
        if status is None:
            with pytest.raises(EndlessAnswerError):
                answer.begin()
        else:
            answer.begin()
            assert answer.status == status
            assert answer.read() == (b"" if status == 101 else b"abc")
        answer.close()
