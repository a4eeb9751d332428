"""What a hostile file, manifest or server cannot do: lead elsewhere, run code, end the process, exhaust memory."""

from __future__ import annotations

import base64
import http.server
import io
import os
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_embedding_reader import EmbeddingReader
from dask_embedding_reader.errors import FormatError, NoFilesError, ReadError
from dask_embedding_reader.formats.parquet.footer import parse_footer
from dask_embedding_reader.storage import retries
from tests.fuzz.seeds import COLUMNS, npy_bytes, parquet_bytes

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


class Tripwire:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def with_footer(data: bytes, footer: bytes) -> bytes:
    nbytes = int.from_bytes(data[-8:-4], "little")
    return data[: -8 - nbytes] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def footer_of(data: bytes) -> bytes:
    return data[-8 - int.from_bytes(data[-8:-4], "little") : -8]


def test_no_damaged_byte_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    """Every seventh byte in turn, in a process of its own: what pyarrow does to one cannot be caught in it."""
    data = parquet_bytes("fixed_size_list", compression="none")
    (tmp_path / "seed").write_bytes(data)
    program = """
import sys
from pathlib import Path
from dask_embedding_reader.errors import EmbeddingReaderError
from tests.fuzz.targets import read_parquet
data = Path(sys.argv[1]).read_bytes()
start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
for place in range(start, len(data) - 8, 7):
    for value in (0, data[place] ^ 1):
        try:
            read_parquet(data[:place] + bytes([value]) + data[place + 1 :])
        except EmbeddingReaderError:
            pass
print("survived")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "seed"], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.stdout == "survived\n", done.stderr[-500:]


@pytest.mark.parametrize(
    ("footer", "says"),
    [
        (b"\x19\xfc\xff\xff\xff\xff\x0f", "claims a list of"),
        (b"\x1c" * 5_000, "nested deeper|cannot be read"),
        (b"\x19" * 5_000, "nested deeper|list"),
        (b"\x15" + b"\xff" * 50, "more than 64 bits|cannot be read"),
        (b"", "cannot be read"),
        (b"\x00", "cannot be read"),
        (b"\x18\xff\xff\xff\xff\x0f", "cannot be read"),
    ],
)
def test_footers_that_claim_the_world_are_refused(footer: bytes, says: str) -> None:
    whole = footer + len(footer).to_bytes(4, "little") + b"PAR1"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=says):
        parse_footer("odd.parquet", whole, 100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_a_schema_nested_without_end_is_refused(tmp_path: Path) -> None:
    node = b"\x35\x00\x18\x01a\x15\x02\x00"  # required, "a", one child
    footer = b"\x15\x02\x19" + b"\xfc\xa0\x9c\x01" + node * 20_000 + b"\x16\x00\x19\x0c\x00"
    (tmp_path / "0.parquet").write_bytes(with_footer(parquet_bytes("list"), footer))
    with pytest.raises(FormatError, match="nested deeper than 64 levels"):
        EmbeddingReader(tmp_path, "parquet")


def test_a_column_chunk_in_another_file_is_refused(tmp_path: Path) -> None:
    data = parquet_bytes("list")
    footer = footer_of(data)
    # The first column chunk: field 2, file_offset, now comes after field 1, file_path.
    place = footer.index(b"\x19\x7c\x26") + 2
    (tmp_path / "0.parquet").write_bytes(with_footer(data, footer[:place] + b"\x18\x04/etc\x16" + footer[place + 1 :]))
    with pytest.raises(FormatError, match=r"row group 0 is said to be in another file, b'/etc'"):
        EmbeddingReader(tmp_path / "0.parquet", "parquet", meta_columns=[COLUMNS[0]])
    # Whoever does not ask for it is not bothered.
    (tmp_path / "right").mkdir()
    (tmp_path / "right" / "0.parquet").write_bytes(data)
    expected = EmbeddingReader(tmp_path / "right", "parquet").to_dask_array().compute()
    np.testing.assert_array_equal(
        EmbeddingReader(tmp_path / "0.parquet", "parquet").to_dask_array().compute(), expected
    )


@pytest.mark.filterwarnings("ignore:pickle-based|pyarrow.PyExtensionType")  # pyarrow 19 warns that it unpickles nothing
@pytest.mark.parametrize("name", [b"arrow.py_extension_type", b"pandas.period", b"no.such.extension"])
def test_extension_types_run_no_code(tmp_path: Path, name: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    trip = tmp_path / "tripped"
    pickled = pickle.dumps(Tripwire(str(trip)))
    field = pa.field("embedding", pa.list_(pa.float32())).with_metadata(
        {b"ARROW:extension:name": name, b"ARROW:extension:metadata": pickled}
    )
    table = pa.table([pa.array(ROWS.tolist(), pa.list_(pa.float32()))], schema=pa.schema([field]))
    table = table.replace_schema_metadata({"pandas": "[" * 10_000, "PANDAS_ATTRS": pickled})
    folder = tmp_path / "emb"
    folder.mkdir()
    pq.write_table(table, folder / "0.parquet")
    try:
        np.testing.assert_array_equal(EmbeddingReader(folder, "parquet").to_dask_array().compute(), ROWS)
    except FormatError:
        assert name == b"pandas.period" or (name == b"arrow.py_extension_type" and hasattr(pa, "PyExtensionType"))
    assert not trip.exists()


def test_very_many_columns_are_opened_or_refused_in_little_memory(tmp_path: Path) -> None:
    leaf = b"\x15\x02\x25\x00\x18\x01a\x00"
    footer = b"\x15\x02\x19\xfc\x91\xa1\x0f\x48\x01r\x15\xa0\xc2\x1e\x00" + leaf * 250_000 + b"\x16\x00\x19\x0c\x00"
    whole = footer + len(footer).to_bytes(4, "little") + b"PAR1"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(FormatError):  # pyarrow has a limit of its own
        assert len(parse_footer("odd.parquet", whole, 100).schema.paths) == 250_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250 * len(whole) / 1024  # pyarrow 16: 212


def test_a_page_that_claims_two_gigabytes_is_given_none(tmp_path: Path) -> None:
    data = parquet_bytes("list", compression="none", use_dictionary=False)
    footer = footer_of(data)
    start = parse_footer("x", data[-8 - len(footer) :], len(data) - 8 - len(footer)).chunks(6)[0].start
    # The head of the page: its type, then the sizes of its content before and after compression.
    assert data[start : start + 3] == b"\x15\x00\x15"
    rest = data[start + 2 :].split(b"\x15", 3)[3]
    claim = b"\x15\xfe\xff\xff\xff\x0f"
    (tmp_path / "0.parquet").write_bytes(data[: start + 2] + claim + claim + b"\x15" + rest)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError):
        EmbeddingReader(tmp_path, "parquet").to_dask_array().compute(scheduler="sync")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


# ---------------------------------------------------------------------------------------------------------------------
# Listings


class _Listing(http.server.BaseHTTPRequestHandler):
    """A server whose page of links was written by somebody hostile."""

    links: ClassVar[list[str]] = []
    asked: ClassVar[list[str]] = []

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Tests have better use for stderr."""

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "*" in self.path or len(self.asked) > 100:
            self.send_error(404)
            return
        page = "".join(f'<a href="{link}">x</a>' for link in self.links).encode()
        is_file = self.path.partition("?")[0].endswith(".npy")
        body = npy_bytes(ROWS) if is_file else page
        self.send_response(200)
        self.send_header("Content-Type", "application/x" if is_file else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the name that the server asks for


@pytest.fixture
def listing() -> Iterator[str]:
    _Listing.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Listing)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/data/"
    server.shutdown()
    server.server_close()


HOSTILE = ["../secret.npy", "%2e%2e/secret.npy", "a/../../secret.npy", "/secret.npy", "//other.invalid/secret.npy"]


@pytest.mark.parametrize("before", ["", "simplecache::"])
@pytest.mark.parametrize("pattern", ["", "*.npy"])
def test_links_that_lead_elsewhere_are_not_followed(listing: str, pattern: str, before: str) -> None:
    _Listing.links = [
        *HOSTILE,
        "http://other.invalid/secret.npy",
        "https://u:p@other.invalid/data/secret.npy",
        "../",
        "0.npy",
    ]
    reader = EmbeddingReader(before + listing + pattern)
    assert [path.rpartition("/data/")[2] for path in reader.manifest.vectors.paths] == ["0.npy"]
    assert not [path for path in _Listing.asked if "secret" in path]


def test_a_listing_of_nothing_but_such_links_is_empty(listing: str) -> None:
    _Listing.links = HOSTILE[:3]
    with pytest.raises(NoFilesError):
        EmbeddingReader(listing)


@pytest.mark.parametrize("pattern", ["", "*.npy"])
@pytest.mark.parametrize(
    ("links", "found"),
    [
        (["./0.npy", "./.1.npy", "./_2.npy"], ["0.npy"]),
        (["0.npy", "./0.npy", "1.npy?v=1&amp;w=2", "././2.npy"], ["0.npy", "1.npy?v=1&w=2", "2.npy"]),
        (["0.npy", "0.npy?download=1", "0.npy#top"], ["0.npy"]),
        (["a&amp;b.npy", "c&#39;.npy", "d&copy.npy"], ["a&b.npy", "c'.npy", "d&copy.npy"]),
        (["./", ".", "", "?sort=name/", "#top/", "./?sort=name", "0.npy"], ["0.npy"]),
    ],
)
def test_links_are_taken_as_browsers_take_them(listing: str, pattern: str, links: list[str], found: list[str]) -> None:
    _Listing.links = links
    if "?" in "".join(found):
        found = [name for name in found if not pattern or "?" not in name]
    for before in ("", "simplecache::"):
        if before and "?" in "".join(found):
            continue  # a cache asks for names as they are
        reader = EmbeddingReader(before + listing + pattern)
        assert [path.rpartition("/data/")[2] for path in reader.manifest.vectors.paths] == found


@pytest.mark.parametrize("more", ["?token=secret", "#top"])
def test_a_folder_with_a_query_does_not_lead_into_itself_for_ever(listing: str, more: str) -> None:
    _Listing.links = ["0.npy", "in/"]
    with pytest.raises(NoFilesError, match="holds no files") as caught:
        EmbeddingReader(listing + more)
    assert "secret" not in str(caught.value)


def test_an_npy_file_that_would_have_to_be_unpickled_is_refused(tmp_path: Path) -> None:
    sink = io.BytesIO()
    np.save(sink, np.array([[Tripwire(str(tmp_path / "tripped"))] * 2] * 2, dtype=object), allow_pickle=True)
    (tmp_path / "0.npy").write_bytes(sink.getvalue())
    with pytest.raises(FormatError, match="Python objects"):
        EmbeddingReader(tmp_path)
    assert not (tmp_path / "tripped").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Answers


class Question(NamedTuple):
    """What a server is asked."""

    method: str
    path: str
    headers: Message

    def file(self, content: bytes) -> bytes:
        """The answer that brings a range of a file, or all of it."""
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(content)) + 1, len(content))
        head = f'HTTP/1.1 206 OK\r\nETag: "1"\r\nContent-Range: bytes {start}-{stop - 1}/{len(content)}\r\n'
        return f"{head}Content-Length: {stop - start}\r\n\r\n".encode() + content[start:stop] * (self.method == "GET")


class Answering(NamedTuple):
    """A server, and what it has been asked."""

    url: str
    questions: list[Question]


@contextmanager
def answering(answer: Callable[[Question], bytes | None]) -> Iterator[Answering]:
    """Answer with these very bytes; with nothing but "still to come", for ever, instead of None."""
    questions: list[Question] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any, **kwargs: Any) -> None:
            """Tests have better use for stderr."""

        def do_GET(self) -> None:
            questions.append(Question(self.command, self.path, self.headers))
            answered = answer(questions[-1])
            with suppress(ConnectionError):  # the client has had enough
                while answered is None:
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n")
                self.wfile.write(answered)

        do_HEAD = do_GET  # noqa: N815 - the name that the server asks for

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield Answering(f"http://127.0.0.1:{server.server_port}", questions)
        server.shutdown()


PAGE = b'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 23\r\n\r\n<a href="0.npy">0</a>  '
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"

OTHER_OPTIONS: list[dict[str, Any]] = [{}, {"client_kwargs": {"trust_env": True}}]
"""With those of the second kind fsspec's own client asks."""


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("options", OTHER_OPTIONS)
@pytest.mark.parametrize("answered", [0, 1, 2])
def test_a_server_that_never_answers_but_always_says_that_it_will_is_an_error(
    answered: int, options: dict[str, Any]
) -> None:
    """When the folder is listed, when the file is looked up, when its rows are read."""

    def answer(question: Question) -> bytes | None:
        if len(server.questions) > answered:
            return None
        return PAGE if question.path == "/" else question.file(npy_bytes(ROWS))

    with answering(answer) as server, pytest.raises(ReadError, match="again and again, and never answers"):
        EmbeddingReader(server.url + "/", storage_options=options).to_dask_array().compute(scheduler="sync")


SECRETS = {"X-Api-Key": "a", "x-auth-token": "b", "Authorization": "c", "X-Whatever": "d", "Cookie": "e=f"}


class BasicAuth(NamedTuple):
    """What aiohttp's own, which later releases warn of, holds and does."""

    login: str
    password: str

    def encode(self) -> str:
        return "Basic " + base64.b64encode(f"{self.login}:{self.password}".encode()).decode()


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("to_itself", [False, True])
@pytest.mark.parametrize("given", ["headers", "client_kwargs", "auth", "auth of the client"])
@pytest.mark.parametrize("options", OTHER_OPTIONS)
def test_headers_stay_with_the_server_that_they_are_for(options: dict[str, Any], given: str, to_itself: bool) -> None:
    def answer(question: Question) -> bytes:
        if len(there.questions) % 3 == 0:
            return BUSY
        return PAGE if question.path == "/there/" else question.file(npy_bytes(ROWS))

    def point(question: Question) -> bytes:
        if question.path.startswith("/there"):
            there.questions.append(question)
            return answer(question)
        url = "" if to_itself else there.url
        return f"HTTP/1.1 302 There\r\nLocation: {url}/there{question.path}\r\nContent-Length: 0\r\n\r\n".encode()

    secrets: dict[str, Any] = {"headers": SECRETS}
    if given.startswith("auth"):  # the client makes the headers of these
        others = {name: value for name, value in SECRETS.items() if name not in ("Authorization", "Cookie")}
        secrets = {"headers": others, "auth": BasicAuth("user", "password"), "cookies": {"e": "f"}}
    if given in ("headers", "auth"):
        options = {**options, **secrets}
    else:
        options = {"client_kwargs": {**options.get("client_kwargs", {}), **secrets}}
    with answering(answer) as there, answering(point) as here:
        reader = EmbeddingReader(here.url + "/", storage_options=options)
        array = reader.to_dask_array(max_piece_size=1)
        np.testing.assert_array_equal(array.compute(scheduler="sync"), ROWS)
    assert len(there.questions) > 6
    for question in there.questions:
        assert [name for name in SECRETS if name in question.headers] == (list(SECRETS) if to_itself else [])
        assert not to_itself or question.headers["Cookie"] == "e=f"


@pytest.mark.parametrize(
    ("value", "pause"),
    [
        *[(value, 0) for value in ("\xb2", "", "-5", "nan", "inf", "soon", "0x10", "Mon, 99 Foo 2020", "1e3", "5 s")],
        *[(value, 0) for value in ("Thu, 01 Jan 1970 00:00:00 GMT", "Mon, 01 Jan 0001 00:00:00 -0000")],
        *[(value, retries.LONGEST_PAUSE_SECONDS) for value in ("9" * 5_000, "Fri, 31 Dec 9999 23:59:59 GMT")],
        ("Fri, 31 Dec 99999 23:59:59 GMT", 0),
        (" 7 ", 7),
        ("7.5", 7.5),
    ],
)
def test_no_retry_after_prevents_the_retry(value: str, pause: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retries, "pause", pauses.append)

    class BusyError(OSError):
        status, headers = 429, MappingProxyType({"Retry-After": value})

    answers = [BusyError()]

    def attempt() -> str:
        if answers:
            raise answers.pop()
        return "came"

    assert retries.with_retries(attempt, "reading") == "came"
    assert pauses == [pytest.approx(pause, abs=0.31)]


@pytest.mark.parametrize("location", ["/\u00fc.npy", "/%C3%BC.npy", "/\u00fc b.npy"])
def test_a_redirect_is_followed_to_a_name_as_it_is_written(location: str) -> None:
    def answer(question: Question) -> bytes:
        if question.path == "/0.npy":
            return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
        return question.file(npy_bytes(ROWS))

    with answering(answer) as server:
        array = EmbeddingReader(f"{server.url}/0.npy").to_dask_array()
        np.testing.assert_array_equal(array.compute(scheduler="sync"), ROWS)
    there = "/%C3%BC%20b.npy" if " " in location else "/%C3%BC.npy"
    assert {question.path for question in server.questions} == {"/0.npy", there}


def test_a_part_that_does_not_tell_where_it_is_from_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for the beginning of the file: rows were made of the heads between its parts, of the same etag."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0)

    def answer(question: Question) -> bytes:
        whole = question.file(npy_bytes(ROWS))
        if question.headers.get("Range", "").startswith("bytes=0-") or question.method != "GET":
            return whole
        body = b"--x\r\n" + b"a: b\r\n" * 30 + b"\r\n" + whole.partition(b"\r\n\r\n")[2] + b"\r\n--x--\r\n"
        kind = "Content-Type: multipart/byteranges; boundary=x"
        head = f'HTTP/1.1 206 Some\r\nETag: "1"\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n'
        return head.encode() + body

    with answering(answer) as server:
        array = EmbeddingReader(f"{server.url}/0.npy").to_dask_array()
        with pytest.raises(ReadError, match="does not tell which bytes of the file it brings"):
            array.compute(scheduler="sync")


@pytest.mark.parametrize("date", [f"Mon, 01 Jan 2026 00:00:00 +{10**20}", f"{10**11} Jan 2026 00:00:00", "soon", ""])
def test_no_date_of_a_server_prevents_that_its_file_is_read(date: str) -> None:
    def answer(question: Question) -> bytes:
        return question.file(npy_bytes(ROWS)).replace(b'ETag: "1"', b"Last-Modified: " + date.encode())

    with answering(answer) as server:
        array = EmbeddingReader(f"{server.url}/0.npy").to_dask_array()
        np.testing.assert_array_equal(array.compute(scheduler="sync"), ROWS)


def test_secrets_of_a_long_text_are_found_in_one_pass() -> None:
    """A web server may link to whatever it likes; to look at each question mark anew took minutes."""
    long = "a?" * 200_000
    assert retries.hide_secrets(f"({long})") == f"({long})"
    assert retries.hide_secrets(f"http://user:p@ss@host/x?{long}=1 'http://h/?a=b', s3://x@{long}") == (
        f"http://host/x 'http://h/', s3://{long}"
    )
    many = "http://" * 50_000
    assert retries.hide_secrets(many) == many
