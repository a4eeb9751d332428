"""Passwords, keys and signatures: needed to read, never to be seen, whatever goes wrong.

Each test opens a collection with a secret in its URL or in ``storage_options`` and looks for it in everything that the
library hands out, prints, logs or raises, tracebacks with all their causes included.
"""

from __future__ import annotations

import ast
import json
import logging
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dask.base import tokenize

import dask_embedding_reader
from dask_embedding_reader import EmbeddingReader, write_embeddings
from dask_embedding_reader.cli.commands import main
from dask_embedding_reader.errors import EmbeddingReaderError
from dask_embedding_reader.storage import retries
from dask_embedding_reader.storage.connections import headers_for
from dask_embedding_reader.storage.find import INCOMPLETE_NAME
from tests.support import servers
from tests.support.faults import FAULTS, REFUSALS, Proxy, faulty

ROWS = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
SECRET = "tOp-SeCrEt"


@dataclass
class Place:
    """Two files behind a server that may fail, and the secret needed to reach them."""

    proxy: Proxy
    #: URLs, given the names of files.
    url: Callable[[str], str]
    options: dict[str, Any]
    secret: str

    def open(self, *names: str) -> EmbeddingReader:
        return EmbeddingReader([self.url(name) for name in names or ("0.npy", "1.npy")], storage_options=self.options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    for k in range(2):
        np.save(folder / f"{k}.npy", ROWS[k * 30 : (k + 1) * 30])
    (folder / "broken.npy").write_bytes(b"garbage, more than ten bytes of it, so that a header could be there")
    return folder


@pytest.fixture(scope="module", params=["signed URL", "password in URL", "headers", "s3"])
def running_place(request: pytest.FixtureRequest, folder: Path) -> Iterator[Place]:
    if request.param == "s3":
        servers.require(servers.s3_available, "moto")
        with servers.s3() as s3, faulty(s3.endpoint) as proxy:
            url = s3.put_folder(folder, "emb")
            client = {"endpoint_url": proxy.url, "region_name": "us-east-1"}
            options = {**s3.storage_options, "client_kwargs": client, "config_kwargs": {"read_timeout": 0.3}}
            yield Place(proxy, lambda name: f"{url}/{name}", options, servers.S3_SECRET)
        return
    import aiohttp

    options = {"timeout": aiohttp.ClientTimeout(sock_read=0.3)}
    with servers.http_files(folder) as server, faulty(server.url) as proxy:
        urls: dict[str, Callable[[str], str]] = {
            "signed URL": lambda name: f"{proxy.url}/{name}?X-Amz-Expires=600&X-Amz-Signature={SECRET}",
            "password in URL": lambda name: f"{proxy.url.replace('://', f'://user:{SECRET}@')}/{name}",
            "headers": lambda name: f"{proxy.url}/{name}",
        }
        if request.param == "headers":
            options["headers"] = {"Authorization": f"Bearer {SECRET}", "X-Api-Key": SECRET}
        yield Place(proxy, urls[request.param], options, SECRET)


@pytest.fixture
def place(running_place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)
    running_place.proxy.behave()
    return running_place


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all that tracebacks and debuggers show with it, suppressed contexts left out."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def text_of_failure(work: Callable[[], Any]) -> str:
    """What a user sees of an error, with everything that caused it."""
    try:
        work()
    except EmbeddingReaderError as error:
        return "".join(traceback.format_exception(error)) + "".join(map(repr, chain_of(error)))
    pytest.fail("nothing went wrong")


def test_what_is_handed_out_holds_no_secret(place: Place) -> None:
    reader = place.open()
    x = reader.to_dask_array(max_piece_size=7)
    frame = reader.to_dask_dataframe(max_piece_size=7)
    graph = dict(x.__dask_graph__())
    seen = [
        reader,
        reader.locate(0),
        x,
        frame,
        reader.manifest,
        reader.manifest.vectors,
        reader.manifest.vectors.header(0),
    ]
    texts = [*map(repr, seen), *map(str, seen), *map(str, graph), *map(repr, graph.values())]
    texts += [x.name, tokenize(x), tokenize(frame)]
    assert [text for text in texts if place.secret in text] == []


def test_who_asks_for_an_address_with_its_secrets_gets_one_that_can_be_opened(place: Place) -> None:
    url, row = place.open().locate(35, secrets=True)
    assert (url, row) == (place.url("1.npy"), 5)


def test_what_is_kept_holds_no_secret(place: Place, tmp_path: Path) -> None:
    """Manifests, and the keys of tasks, which dashboards and logs of a cluster show."""
    reader = place.open()
    path = tmp_path / "kept.parquet"
    reader.save_manifest(path)
    table = pq.read_table(path)
    assert place.secret.encode() not in path.read_bytes()
    assert place.secret not in f"{table.to_pydict()} {table.schema.metadata}"
    write_embeddings(reader, tmp_path / "written", rows_per_file=20)
    for kept in (tmp_path / "written").rglob("*"):
        assert kept.is_dir() or place.secret.encode() not in kept.read_bytes(), kept
    table = pq.read_table(tmp_path / "written" / ".manifest.embeddings")
    assert place.secret not in f"{table.to_pydict()} {table.schema.metadata}"
    x, frame = reader.to_dask_array(max_piece_size=7), reader.to_dask_dataframe(max_piece_size=7)
    keys = [*x.__dask_graph__(), *frame.__dask_graph__()]
    assert place.secret.encode() not in pickle.dumps(keys)
    assert place.secret not in repr(keys)


@pytest.mark.parametrize("extra", [[], ["--json"]])
@pytest.mark.parametrize("command", ["info", "head", "plan", "stats", "verify", "convert"])
@pytest.mark.parametrize("fault", [None, "403"])
def test_commands_print_no_secret(
    place: Place,
    command: str,
    extra: list[str],
    fault: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    place.proxy.every = fault
    options = {key: value for key, value in place.options.items() if key not in ("timeout", "config_kwargs")}
    target = [str(tmp_path / "out")] if command == "convert" else []
    if command in ("convert", "verify"):
        extra = []
    with caplog.at_level(logging.DEBUG, "dask_embedding_reader"), pytest.raises(SystemExit) as ended:
        main([command, place.url("0.npy"), *target, *extra, "--storage-options", json.dumps(options)])
    printed = capsys.readouterr()
    assert (not ended.value.code) == (fault is None and command != "verify"), printed.err
    assert place.secret not in printed.out + printed.err + caplog.text


def test_pickles_work_although_nobody_sees_the_secret(place: Place) -> None:
    reader = pickle.loads(pickle.dumps(place.open()))
    np.testing.assert_array_equal(reader.to_dask_array().compute(), ROWS)


@pytest.mark.parametrize("fault", [*FAULTS, *REFUSALS])
def test_no_failed_read_tells_the_secret(place: Place, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    reader = place.open()
    place.proxy.faults = [fault] * 1000
    with caplog.at_level(logging.DEBUG, "dask_embedding_reader"):
        text = text_of_failure(lambda: reader.to_dask_array(0, 5).compute())
    assert "0.npy" in text
    assert place.secret not in text + caplog.text


@pytest.mark.parametrize("names", [("missing.npy",), ("broken.npy",), ("folder/",), ("*.npy",), ("[x].npy",)])
def test_nothing_that_cannot_be_opened_tells_the_secret(place: Place, names: tuple[str, ...]) -> None:
    assert place.secret not in text_of_failure(lambda: place.open(*names))


@pytest.mark.parametrize("fault", ["503", "reset", "truncated", "stalled", "403"])
def test_no_failed_opening_tells_the_secret(place: Place, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    place.proxy.every = fault
    with caplog.at_level(logging.DEBUG, "dask_embedding_reader"):
        text = text_of_failure(place.open)
    assert place.secret not in text + caplog.text


def test_a_replaced_file_does_not_tell_the_secret(place: Place) -> None:
    reader = place.open()
    place.proxy.silent_about = frozenset({"etag", "last-modified"})
    place.proxy.before = lambda asked: setattr(place.proxy, "ranges", False)
    place.proxy.faults = ["shorter"] * 1000
    assert place.secret not in text_of_failure(lambda: reader.to_dask_array(0, 5).compute())


@pytest.mark.parametrize("fault", ["404", "403", "503"])
def test_looking_a_file_up_after_it_was_read_does_not_tell_the_secret(place: Place, fault: str) -> None:
    """As is done where answers do not tell which version they are of."""
    reader = place.open()
    place.proxy.requests.clear()
    place.proxy.silent_about = frozenset({"etag", "last-modified"})
    place.proxy.before = lambda asked: setattr(place.proxy, "every", fault)
    text = text_of_failure(lambda: reader.to_dask_array(0, 5).compute())
    assert len(place.proxy.reads) == 1
    assert "0.npy" in text
    assert place.secret not in text


WRONG: list[tuple[str, dict[str, Any]]] = [
    (f"nonsense://user:{SECRET}@host/emb", {}),
    (f"s3://bucket/emb?versionId={SECRET}", {"key": SECRET, "username": SECRET}),
    (f"ftp://user:{SECRET}@127.0.0.1:9/emb", {}),
    (f"http://user:{SECRET}@127.0.0.1:9/emb", {}),
]


@pytest.mark.parametrize(("url", "options"), WRONG)
def test_wrong_options_do_not_tell_the_secret(
    url: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)
    assert SECRET not in text_of_failure(lambda: EmbeddingReader(url, storage_options=options))


LOCAL = {"local.py", "local_input"}
"""Modules and functions in whose errors no address can be."""


@pytest.mark.parametrize(
    ("asked", "there", "is_same"),
    [
        ("http://a/x", "http://a/y", True),
        ("http://a/x", "http://A:80/y", True),
        ("http://a:80/x", "https://a/y", True),
        ("http://a/x", "https://a:443/y", True),
        ("https://a/x", "https://a:443/y", True),
        ("https://a/x", "http://a/y", False),
        ("http://a/x", "http://a:81/y", False),
        ("http://a:81/x", "https://a/y", False),
        ("http://a/x", "https://a:444/y", False),
        ("http://a:8080/x", "https://a:8080/y", False),
        ("https://a/x", "https://b/y", False),
        ("https://a/x", "https://b.a/y", False),
        ("http://a/x", "ftp://a:80/y", False),
    ],
)
def test_headers_go_to_the_server_that_they_are_for_and_to_no_other(asked: str, there: str, is_same: bool) -> None:
    headers = {"Authorization": "Bearer x", "X-Own": "1", "Cookie": "c=1", "range": "bytes=0-9", "User-Agent": "x"}
    kept = {"range", "User-Agent"} if not is_same else {*headers}
    assert set(headers_for(there, asked, headers)) == kept


def test_what_tells_a_secret_is_no_cause() -> None:
    """Errors of other libraries name addresses, and tracebacks show causes: each is looked at before it becomes one.

    Most of these places are reached by a few of all clients only: so the code is read.
    """
    storage = Path(dask_embedding_reader.__file__).parent / "storage"
    causes = 0
    for path in sorted(storage.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or {path.name, function.name} & LOCAL:
                continue
            for node in ast.walk(function):
                # What clients raise is caught by those who ask them.
                if isinstance(node, ast.Raise) and node.cause is not None and path.parent.name != "clients":
                    told = ast.unparse(node.cause)
                    assert told == "None" or told.startswith("shown_cause("), f"{path.name}:{node.lineno}: {told}"
                    causes += told != "None"
    assert causes >= 10


RETOLD = {"asking", "ask", "_make", "_read_sign"}
"""Functions that raise what is described by who catches it, or say what is the library's own."""


def test_what_other_libraries_say_is_described_and_never_told_as_it_is() -> None:
    """With its secrets hidden. The code is read here too."""
    package, described = Path(dask_embedding_reader.__file__).parent, 0
    for path in [*sorted((package / "storage").rglob("*.py")), package / "write" / "claim.py"]:
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or {path.name, function.name} & (LOCAL | RETOLD):
                continue
            for handler in ast.walk(function):
                if isinstance(handler, ast.ExceptHandler) and handler.name is not None:
                    for node in ast.walk(handler):
                        told = [ast.unparse(value) for value in told_by(node)]
                        assert handler.name not in told, f"{path.name}:{handler.lineno}: {ast.unparse(node)}"
                        ways = f"describe({handler.name})", f"explain({handler.name}"  # which describes it, too
                        described += any(each.startswith(ways) for each in told)
    assert described >= 15


def told_by(node: ast.AST) -> list[ast.expr]:
    """What an expression makes text of."""
    if isinstance(node, ast.FormattedValue):
        return [node.value]
    makes_text = isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("str", "repr", "logger."))
    return node.args if makes_text and isinstance(node, ast.Call) else []


# --------------------------------------------------------------------------------------------------------------------
# Messages that name what the user has named


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of folders, with the password in it."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("alone", "text", "empty", "meta", "both", "kinds", "begun"):
        (root / name).mkdir()
    table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(ROWS.reshape(-1), 8), "caption": ["a"] * 60})
    for name in ("alone", "both"):
        np.save(root / name / "0.npy", ROWS)
    pq.write_table(table, root / "both" / "0.parquet")
    np.savez(root / "kinds" / "0.npz", ROWS)
    (root / "kinds" / "0.fbin").write_bytes(np.array([60, 8], "<u4").tobytes() + ROWS.tobytes())
    pq.write_table(table.select(["caption"]), root / "meta" / "0.parquet")
    (root / "begun" / INCOMPLETE_NAME).parent.mkdir()
    (root / "begun" / INCOMPLETE_NAME).touch()
    (root / "text" / "notes.txt").write_text("nothing to read")
    with servers.ftp_files(root) as server:
        assert servers.FTP_PASSWORD in server.url
        yield server.url


NAMING: dict[str, tuple[str, Callable[[str, Path], Any]]] = {
    "no such folder": ("does not exist", lambda url, _: EmbeddingReader(f"{url}/alon")),
    "no such file": ("does not exist", lambda url, _: EmbeddingReader(f"{url}/alone/1.npy")),
    "no files": ("holds no files", lambda url, _: EmbeddingReader(f"{url}/empty")),
    "files being written": ("is being written", lambda url, _: EmbeddingReader(f"{url}/begun", "npy")),
    "files of another kind": ("found instead 1 file", lambda url, _: EmbeddingReader(f"{url}/text")),
    "no file matches": ("", lambda url, _: EmbeddingReader(f"{url}/alone/*.parquet")),
    "several formats": ("files of several kinds", lambda url, _: EmbeddingReader(f"{url}/kinds")),
    "no metadata": (
        "is it metadata_folder='ftp://127.0.0.1",
        lambda url, _: EmbeddingReader(f"{url}/alone", "parquet_npy", meta_columns=["caption"]),
    ),
    "one source is empty": ("is passed over", lambda url, _: EmbeddingReader([f"{url}/alone", f"{url}/text"], "npy")),
    "no such column": ("caption", lambda url, _: EmbeddingReader(f"{url}/both", "parquet", meta_columns=["captions"])),
    "a chain is written to": (
        "only read",
        lambda url, _: write_embeddings(EmbeddingReader(f"{url}/alone"), f"simplecache::{url}/out"),
    ),
    "nothing may be written": ("", lambda url, _: write_embeddings(EmbeddingReader(f"{url}/alone"), f"{url}/out")),
    "no manifest": ("", lambda url, _: EmbeddingReader.from_manifest(f"{url}/text")),
    "no such client": ("cannot open", lambda url, _: EmbeddingReader(url.replace("ftp", "ftq", 1))),
}


@pytest.mark.parametrize("case", list(NAMING))
def test_no_message_tells_the_password_of_what_the_user_named(
    tree: str, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)
    expected, work = NAMING[case]
    text = ""
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG, "dask_embedding_reader"):
        warnings.simplefilter("always")
        try:
            work(tree, tmp_path)
        except EmbeddingReaderError as error:
            text = "".join(traceback.format_exception(error)) + "".join(map(repr, chain_of(error)))
    text += " ".join(str(each.message) for each in warned)
    assert expected in text
    assert "127.0.0.1" in text
    assert servers.FTP_PASSWORD not in text + caplog.text
