"""How clients of storages are used: with which options, in which order, and what of them is renewed."""

from __future__ import annotations

import gc
import os
import posixpath
import re
import socket
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from dask_embedding_reader._common.threads import stoppable_pool
from dask_embedding_reader.errors import FileChangedError, ReadError
from dask_embedding_reader.storage import connections, retries
from dask_embedding_reader.storage.clients import any as any_client
from dask_embedding_reader.storage.clients import ftp, hf
from dask_embedding_reader.storage.connections import Asked, asking, connected, exclusive, run_apart
from dask_embedding_reader.storage.fsspec import FsspecStore, glob_walking

Call = tuple[Any, ...]


class Recorded(MemoryFileSystem):  # type: ignore[misc]  # fsspec is not typed
    """Keeps files of its own, and writes down what it is asked to do to them."""

    cachable = False
    store: dict[str, Any]

    def __init__(self, *protocol: str, failing: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.store, self.pseudo_dirs = {}, [""]
        self.protocol = protocol or ("recorded",)
        self.failing = failing
        self.calls: list[Call] = []

    def hold(self, path: str, value: bytes) -> None:
        """Hold a file that others have put there."""
        super().pipe_file(path, value)

    def held(self) -> dict[str, bytes]:
        """All files."""
        return {path: file.getvalue() for path, file in self.store.items()}

    def _note(self, name: str, *what: Any) -> None:
        self.calls.append((name, *what))
        if name == self.failing:
            raise OSError("no")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._note("pipe_file", path, {**options, **({} if mode == "overwrite" else {"mode": mode})})
        super().pipe_file(path, value)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._note("makedirs", path, exist_ok)

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        self._note("mv", path1, path2)
        self.store[path2] = self.store.pop(path1)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        self._note("cp_file", path1, path2)
        super().cp_file(path1, path2)

    def rm_file(self, path: str) -> None:
        self._note("rm_file", path)
        super().rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: Any = None) -> None:
        self._note("rm", path, recursive)
        super().rm(path, recursive, maxdepth)

    def invalidate_cache(self, path: str | None = None) -> None:
        self._note("invalidate_cache")


class Earlier(Recorded):
    """A client that cannot be told to put no file in the place of another."""

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:  # type: ignore[override]  # it has fewer
        super().pipe_file(path, value, **options)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Writing

WHOLE = {"chunksize": 5 * 2**30}
"""S3 keeps parts of uploads that were broken off, and charges for them."""


@pytest.mark.parametrize(
    ("client", "protocol", "put", "create"),
    [
        (Recorded, "s3", WHOLE, WHOLE | {"mode": "create"}),
        (Recorded, "s3a", WHOLE, WHOLE | {"mode": "create"}),
        (Earlier, "s3", WHOLE, WHOLE),
        (Recorded, "az", {"retry_total": 0}, {"retry_total": 0, "overwrite": False}),
        (Recorded, "abfs", {"retry_total": 0}, {"retry_total": 0, "overwrite": False}),
        (Recorded, "gs", {}, {"mode": "create"}),
        (Earlier, "gs", {}, {}),
        (Recorded, "memory", {}, {}),
        (Recorded, "oss", {}, {"mode": "create"}),
    ],
)
def test_a_file_is_stored_by_one_request_with_the_options_of_its_storage(
    client: type[Recorded], protocol: str, put: dict[str, Any], create: dict[str, Any]
) -> None:
    filesystem = client(protocol)
    store = FsspecStore(filesystem)
    assert store.is_object_store
    assert store.put("/a/b", lambda write: write(b"xyz")) == 3
    assert filesystem.calls == [("pipe_file", "/a/b", put)]
    filesystem.calls.clear()
    assert store.create("/a/c", b"x")
    is_looked_for = create == put
    assert filesystem.calls == [("invalidate_cache",)] * is_looked_for + [("pipe_file", "/a/c", create)]
    assert filesystem.held() == {"/a/b": b"xyz", "/a/c": b"x"}
    filesystem.calls.clear()
    store.move("/a/b", "/a/c")
    store.make_folder("/d")
    store.remove_folder("/a")
    assert filesystem.calls == [("cp_file", "/a/b", "/a/c"), ("rm_file", "/a/b")], "there are no folders"


@pytest.mark.parametrize("scratch", [None, "/tmp"])
@pytest.mark.parametrize("is_there", [False, True])
def test_elsewhere_a_file_is_stored_under_another_name_and_renamed(scratch: str | None, is_there: bool) -> None:
    filesystem = Recorded()
    store = FsspecStore(filesystem)
    if is_there:
        filesystem.hold("/a/b", b"other")
    store.put("/a/b", lambda write: write(b"xyz"), scratch=scratch, is_new=True)
    [(_, temporary, _)] = [call for call in filesystem.calls if call[0] == "pipe_file"]
    assert re.fullmatch(rf"{scratch or '/a'}/\.b\.[0-9a-f]{{32}}\.tmp", temporary)
    folder = ("makedirs", "/a", True)
    assert filesystem.calls == [
        *([folder] if scratch is None else []),
        ("pipe_file", temporary, {}),
        folder,
        *([("rm_file", "/a/b")] if is_there else []),
        ("mv", temporary, "/a/b"),
    ]
    assert filesystem.held() == {"/a/b": b"xyz"}


@pytest.mark.parametrize("failing", ["pipe_file", "makedirs", "mv"])
def test_of_what_cannot_be_renamed_nothing_is_left(failing: str) -> None:
    filesystem = Recorded(failing=failing)
    with pytest.raises(ReadError, match=r"recorded:///a/b: failed after 5 attempts: OSError: no"):
        FsspecStore(filesystem).put("/a/b", lambda write: write(b"xyz"), scratch="/tmp")
    assert filesystem.store == {}
    # After each attempt, and once more by the connection that is made when the last one has failed.
    assert [call[0] for call in filesystem.calls].count("rm_file") == 6


def test_a_file_stays_where_what_shall_replace_it_has_gone() -> None:
    filesystem = Recorded()
    filesystem.hold("/to", b"of another")
    with pytest.raises(FileNotFoundError, match="/from"):
        FsspecStore(filesystem).move("/from", "/to")
    assert filesystem.held() == {"/to": b"of another"}
    assert filesystem.calls == []


def test_a_copy_whose_source_has_gone_meanwhile_is_moved() -> None:
    class Hasty(Recorded):
        def cp_file(self, path1: str, path2: str, **_: Any) -> None:
            self.store[path2] = self.store.pop(path1)

    filesystem = Hasty("s3")
    filesystem.hold("/from", b"x")
    FsspecStore(filesystem).move("/from", "/to")
    assert filesystem.held() == {"/to": b"x"}


@pytest.mark.parametrize("failing", ["", "rm", "invalidate_cache"])
def test_what_is_left_of_a_folder_is_removed_if_it_can_be(failing: str) -> None:
    filesystem = Recorded(failing=failing)
    filesystem.hold("/a/b", b"x")
    FsspecStore(filesystem).remove_folder("/a")
    assert filesystem.held() == ({"/a/b": b"x"} if failing else {})
    assert filesystem.calls[:2] == [("invalidate_cache",), ("rm", "/a", True)][: 1 + (failing != "invalidate_cache")]


class Exclusive(Recorded):
    """Refuses to make a file that is there, as servers of SFTP do."""

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "xb":
            self._note("open", path)
            if path in self.store:
                raise FileExistsError(path)
        return super().open(path, mode.replace("x", "w"), **options)


@pytest.mark.parametrize("protocol", ["sftp", "ssh", "smb"])
def test_servers_that_refuse_to_replace_a_file_are_asked_to(protocol: str) -> None:
    filesystem = Exclusive(protocol)
    store = FsspecStore(filesystem)
    assert [store.create("/a/b", data) for data in (b"first", b"second")] == [True, False]
    assert store.read_whole("/a/b") == b"first"
    assert [call[0] for call in filesystem.calls] == ["makedirs", "open"] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Finding

NAMES = st.sampled_from(["a", "ab", "b", "c.npy", "a.npy"])
PARTS = st.sampled_from(["*", "**", "a*", "?", "[ab]", "a", "*.npy", "ab", "c"])


@given(
    st.sets(st.lists(NAMES, min_size=1, max_size=4).map(tuple), max_size=8),
    st.lists(PARTS, min_size=1, max_size=4),
    st.sampled_from(["", "/", "/a/", "/a/b/"]),
)
def test_a_pattern_finds_what_fsspec_finds(paths: set[tuple[str, ...]], parts: list[str], start: str) -> None:
    pattern = start + "/".join(parts)
    if fsspec.AbstractFileSystem._strip_protocol(pattern).strip("*?[]") == pattern or not set(pattern) & set("*?["):
        return
    filesystem = Recorded()
    folders = {"/".join(path[:depth]) for path in paths for depth in range(1, len(path))}
    for path in paths - {tuple(folder.split("/")) for folder in folders}:
        filesystem.hold("/" + "/".join(path), b"x")
    store = FsspecStore(filesystem)
    entries = glob_walking(store, pattern, store.list_entries)
    found: Any = {entry["name"].rstrip("/"): entry["type"] for entry in entries}
    wanted: Any = {name.rstrip("/"): entry["type"] for name, entry in filesystem.glob(pattern, detail=True).items()}
    if "**" in parts:  # what such a pattern finds are files, however deep
        found, wanted = ({name for name in names if names[name] == "file"} for names in (found, wanted))
    assert found == wanted


class Pages(Recorded):
    """A web server's pages of links, which may name what they like."""

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[dict[str, Any]]:
        self._note("ls", path)
        names = {
            "/top": ["a/", "b.npy", "../up.npy", "%2e%2e/up.npy", "..\\up.npy", "x..npy", "/top/"],
            "/top/a/": ["c.npy", "/top/", "/top/a/", "/top/b.npy"],
        }
        found = [name if name.startswith("/") else posixpath.join(path, name) for name in names[path]]
        kinds = {True: "directory", False: "file"}
        return [{"name": name, "type": kinds[name.endswith("/")], "size": None} for name in found]

    find = fsspec.AbstractFileSystem.find


@pytest.mark.parametrize("protocol", ["http", "other"])
def test_pages_of_links_are_followed_once_and_lead_to_nothing_above(protocol: str) -> None:
    filesystem = Pages(protocol)
    found = FsspecStore(filesystem).list_files("/top", may_vanish=lambda _: False)
    above = {"/top/../up.npy", "/top/%2e%2e/up.npy", "/top/..\\up.npy"}
    names = {"/top/a/", "/top/b.npy", "/top/x..npy", "/top/a/c.npy"} | (above if protocol != "http" else set())
    assert {info.path for info in found} == names
    assert len(found) == len(names)
    assert {info.path for info in found if info.is_folder} == {"/top/a/"}
    assert [call for call in filesystem.calls if call[0] == "ls"] == [("ls", "/top"), ("ls", "/top/a/")]
    assert filesystem.calls[0] == ("invalidate_cache",)


def test_a_folder_that_vanishes_is_an_error_unless_it_may() -> None:
    class Vanishing(Pages):
        def ls(self, path: str, detail: bool = True, **more: Any) -> list[dict[str, Any]]:
            if path != "/top":
                raise NotADirectoryError(path)
            return super().ls(path, detail, **more)

    asked = list[str]()

    def may_vanish(path: str) -> bool:
        asked.append(path)
        return len(asked) == 1

    store = FsspecStore(Vanishing("http"))
    assert [info.path for info in store.list_files("/top", may_vanish=may_vanish)] == [
        "/top/a/",
        "/top/b.npy",
        "/top/x..npy",
    ]
    with pytest.raises(FileChangedError, match=r"/top/a/: this was listed, but then it could not be found"):
        store.list_files("/top", may_vanish=may_vanish)
    assert asked == ["/top/a/"] * 2
    with pytest.raises(NotADirectoryError):
        store.list_files("/none", may_vanish=may_vanish)


def test_what_is_neither_file_nor_folder_is_not_listed() -> None:
    class Links(Recorded):
        def find(self, path: str, **_: Any) -> dict[str, Any]:
            kinds = {"a": "file", "b": "directory", "c": "link", "d": "other"}
            return {f"{path}/{name}": {"name": "", "type": kind, "size": 3} for name, kind in kinds.items()}

    found = FsspecStore(Links()).list_files("/top", may_vanish=lambda _: False)
    assert [(info.path, info.is_folder) for info in found] == [("/top/a", False), ("/top/b", True)]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "Named {}"),
        ({"host": "a", "port": 1}, 'Named {"host": "a", "port": 1}'),
        ({"host": "a", "password": "x", "api_key": "y"}, 'Named {"host": "a"}'),
        ({"client_kwargs": {"url": "u", "secret": "x", "more": [{"token": 1, "b": 2}, 3]}}, None),
        ({"client": object(), "b": 1}, 'Named {"b": 1, "client": "object"}'),
    ],
)
def test_the_key_of_a_storage_holds_no_secret(options: dict[str, Any], key: str | None) -> None:
    class Named(Recorded):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__()

    found = FsspecStore(Named(**options)).key
    assert found == (key or 'Named {"client_kwargs": {"more": [{"b": 2}, 3], "url": "u"}}')
    assert FsspecStore(Named("an argument", **options)).key.startswith('Named {"0": "an argument"')


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({}, "named:///a/b"),
        ({"host": "h"}, "named://h/a/b"),
        ({"host": "h", "port": 21}, "named://h:21/a/b"),
        ({"port": 21}, "named:///a/b"),
    ],
)
def test_an_address_names_the_host(options: dict[str, Any], url: str) -> None:
    class Named(Recorded):
        protocol = ("named",)

        def __init__(self, **_: Any) -> None:
            super().__init__("named")

    assert FsspecStore(Named(**options)).url("/a/b") == url


# ---------------------------------------------------------------------------------------------------------------------
# Connections


class Client(Recorded):
    """A client with what those of S3, SFTP and HDFS have."""

    def __init__(self, *protocol: str, config_kwargs: Any = None, **more: Any) -> None:
        super().__init__(*protocol)
        if "s3" in protocol:
            self.config_kwargs, self.retries = config_kwargs or {}, 5
        channel = SimpleNamespace(settimeout=lambda seconds: self.calls.append(("settimeout", seconds)))
        self.ftp = SimpleNamespace(get_channel=lambda: channel)
        self.session = SimpleNamespace(request=lambda *_, **options: options)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, {"max_pool_connections": 64, "retries": {"total_max_attempts": 1}}),
        (
            {"max_pool_connections": 3, "read_timeout": 2},
            {"max_pool_connections": 3, "retries": {"total_max_attempts": 1}, "read_timeout": 2},
        ),
    ],
)
def test_s3_is_asked_over_connections_enough_and_once(given: dict[str, Any], used: dict[str, Any]) -> None:
    filesystem = Client("s3", config_kwargs=given)
    own = connected(filesystem)
    assert own is connected(filesystem) is not filesystem
    assert (own.config_kwargs, own.retries) == (used, 1)
    assert (filesystem.config_kwargs, filesystem.retries) == (given, 5), "it is the program's"
    without = Client("s3")
    del without.config_kwargs
    assert connected(without) is without


@pytest.mark.parametrize("protocol", ["sftp", "ssh"])
def test_who_waits_for_sftp_waits_no_longer_than_for_others(protocol: str) -> None:
    filesystem = Client(protocol)
    own = connected(filesystem)
    assert own is not filesystem
    assert own.calls == [("settimeout", retries.STALL_SECONDS)]
    assert filesystem.calls == []


@pytest.mark.parametrize("protocol", ["hdfs", "webhdfs", "viewfs"])
def test_who_waits_for_hdfs_waits_no_longer_and_keeps_its_names(protocol: str) -> None:
    own = connected(Client(protocol))
    assert own._strip_protocol(f"{protocol}://host:1/a#b?c;d") == "/a#b?c;d"
    assert own.session.request("GET") == {"timeout": retries.STALL_SECONDS}
    without = Client(protocol)
    assert connections.cuts_paths(without)
    assert not connections.cuts_paths(Client("s3"))


@pytest.mark.parametrize(
    ("url", "path"), [("hdfs://h:1/a/b", "/a/b"), ("hdfs://h", "/"), ("/a://b", "/a://b"), ("", "/")]
)
def test_a_path_within_a_url(url: str, path: str) -> None:
    assert connections.path_within(url) == path


ONE_AT_A_TIME = [
    "ftp",
    "sftp",
    "ssh",
    "smb",
    "tar",
    "libarchive",
    "git",
    "simplecache",
    "filecache",
    "blockcache",
    "cached",
    "dir",
]


@pytest.mark.parametrize("protocol", [*ONE_AT_A_TIME, "zip", "memory", "http", "gs"])
def test_what_takes_one_question_is_asked_alone(protocol: str) -> None:
    filesystem = Client("other", protocol)
    lock: Any = exclusive(filesystem)
    assert hasattr(lock, "acquire") is (protocol in ONE_AT_A_TIME)
    assert exclusive(filesystem) is lock
    assert connections.remembers_files(filesystem) is (protocol.endswith("cache") or protocol == "cached")
    with asking(filesystem), asking(filesystem) as again:  # the same thread may
        assert again is connected(filesystem)


@pytest.mark.parametrize("protocol", ["ftp", "sftp", "memory", "tar"])
@pytest.mark.parametrize("error", [OSError("away"), FileNotFoundError("a"), StopIteration(), KeyboardInterrupt()])
def test_after_a_failure_another_connection_is_used_where_the_old_one_is_of_no_use(
    protocol: str, error: BaseException
) -> None:
    filesystem = Client(protocol)
    before = connected(filesystem)
    wanted = FileNotFoundError if isinstance(error, StopIteration) else type(error)
    with pytest.raises(wanted), asking(filesystem):
        raise error
    is_failed = isinstance(error, OSError | StopIteration) and not isinstance(error, FileNotFoundError)
    assert (connected(filesystem) is before) is not (is_failed and protocol in ("ftp", "sftp"))


def error_perm(text: str) -> Exception:
    """As ``ftplib`` has it."""
    error: Exception = type("error_perm", (Exception,), {})(text)
    return error


@pytest.mark.parametrize(
    ("error", "is_missing"),
    [
        (error_perm("550 No such file"), True),
        (error_perm("550 File not found"), True),
        (error_perm("550 a does Not Exist"), True),
        (error_perm("550 Permission denied"), False),
        (OSError("no such file"), False),
        (StopIteration(), True),
        (None, False),
    ],
)
def test_servers_say_in_words_what_is_not_there(error: Exception | None, is_missing: bool) -> None:
    assert ftp.is_missing(error) is is_missing
    if error is None:
        return
    for raised in (error, FileNotFoundError("as fsspec says")):
        raised.__cause__ = None if raised is error else error
        told = is_missing or isinstance(raised, FileNotFoundError)
        with pytest.raises(FileNotFoundError if told else type(error)) as caught, asking(Client("ftp")):
            raise raised
        assert str(caught.value) == str(raised)
        assert (caught.value is raised) is not is_missing


def test_what_is_known_of_a_client_goes_with_it_and_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem = Client("memory")
    connections.sites(filesystem)["a"] = 1
    assert connected(filesystem) is filesystem
    assert connections.sites(filesystem) == {"a": 1}
    monkeypatch.setattr(os, "getpid", lambda: -7)
    monkeypatch.setattr(filesystem, "_pid", -6)
    own = connected(filesystem)
    assert own is not filesystem, "it shares its sockets with another process"
    assert own is connected(filesystem)
    assert connections.sites(filesystem) == {}
    monkeypatch.undo()
    gone, known = weakref.ref(filesystem), id(filesystem)
    assert known in connections._links
    del filesystem, own
    gc.collect()
    assert gone() is None
    assert known not in connections._links


class Auth(NamedTuple):
    """As aiohttp has had it."""

    name: str
    password: str

    def encode(self) -> str:
        """Return it as a header."""
        return f"Basic {self.name}-{self.password}"


@pytest.mark.parametrize(
    ("options", "in_headers"),
    [
        ({}, {}),
        ({"timeout": 1}, {"timeout": 1}),
        ({"headers": {"a": "b"}}, {"headers": {"a": "b"}}),
        ({"auth": Auth("u", "p")}, {"headers": {"Authorization": "Basic u-p"}}),
        (
            {"auth": Auth("u", "p"), "headers": {"a": "b"}, "timeout": 1},
            {"timeout": 1, "headers": {"a": "b", "Authorization": "Basic u-p"}},
        ),
        (
            {"auth": Auth("u", "p"), "headers": {"AUTHORIZATION": "own"}},
            {"auth": Auth("u", "p"), "headers": {"AUTHORIZATION": "own"}},
        ),
        ({"auth": "odd"}, {"auth": "odd"}),
        ({"auth": ("u", "p")}, {"auth": ("u", "p")}),
        ({"cookies": {"a": "b", "c": "d e"}}, {"headers": {"Cookie": 'a=b; c="d e"'}}),
        ({"cookies": {"a": "b"}, "headers": {"cookie": "c"}}, {"cookies": {"a": "b"}, "headers": {"cookie": "c"}}),
        ({"cookies": {}}, {"cookies": {}}),
        ({"headers": None}, {"headers": None}),
    ],
)
def test_what_says_who_asks_is_among_the_headers(options: dict[str, Any], in_headers: dict[str, Any]) -> None:
    given = {**options}
    filesystem = fsspec.filesystem("http", client_kwargs=options, skip_instance_cache=True, **options)
    assert connected(filesystem).client_kwargs == in_headers
    assert connected(filesystem).kwargs == in_headers
    assert options == given


def test_each_question_is_answered_in_its_place() -> None:
    def fail() -> None:
        raise KeyError("no")

    def ask(number: int) -> Callable[[Asked], int]:
        def call(asked: Asked) -> int:
            assert not asked.given_up
            if number == 3:
                fail()
            barrier.wait(60)
            return number

        return call

    barrier = threading.Barrier(5)  # none waits for another one
    answers = run_apart([ask(number) for number in range(6)])
    assert [answer for answer in answers if isinstance(answer, int)] == [0, 1, 2, 4, 5]
    assert isinstance(answers[3], KeyError)
    barrier = threading.Barrier(1)
    assert run_apart([ask(7)]) == [7]
    assert isinstance(run_apart([ask(3)])[0], KeyError)
    assert run_apart([]) == []
    names = run_apart([lambda _: threading.current_thread().name, lambda _: threading.current_thread().name])
    assert names == ["asking-storage"] * 2
    assert run_apart([lambda _: threading.current_thread()]) == [threading.current_thread()]


def test_who_is_not_waited_for_any_more_is_woken_up() -> None:
    stopped = threading.Event()
    ours, theirs = socket.socketpair()
    given_up = list[bool]()

    def ask(asked: Asked) -> bytes:
        with asked.wakes(ours):
            stopped.set()
            data = ours.recv(1)
        given_up.append(asked.given_up)
        with pytest.raises(ReadError, match="nobody waits for the answer any more"), asked.wakes(ours):
            pytest.fail("it was given up")
        asked.check()
        return data

    with ours, theirs, stoppable_pool(1, stopped) as pool:
        error = pool.submit(run_apart, [ask]).exception(60)
    assert isinstance(error, ReadError)
    assert given_up == [True]


def test_a_socket_that_is_not_waited_for_any_more_is_left_alone() -> None:
    asked = Asked()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with asked.wakes(ours):
            pass
        asked.check()
        asked.give_up()
        theirs.send(b"x")
        assert ours.recv(1) == b"x"
        with pytest.raises(ReadError, match="nobody waits"):
            asked.check()


# ---------------------------------------------------------------------------------------------------------------------
# What clients have


def test_who_finds_files_by_a_walk_is_known() -> None:
    plain = type("Plain", (fsspec.AbstractFileSystem,), {})
    own = type("Own", (fsspec.AbstractFileSystem,), {"find": lambda *_, **__: {}})
    assert any_client.walks(plain(skip_instance_cache=True))
    assert not any_client.walks(own(skip_instance_cache=True))
    asynchronous = type("Asynchronous", (fsspec.asyn.AsyncFileSystem,), {})
    assert any_client.walks(asynchronous(skip_instance_cache=True))

    async def find(*_: Any, **__: Any) -> dict[str, Any]:
        return {}

    lists = type("Lists", (fsspec.asyn.AsyncFileSystem,), {"_find": find})
    assert not any_client.walks(lists(skip_instance_cache=True))


def test_who_takes_a_mode_is_known() -> None:
    assert any_client.takes_mode(Recorded())
    assert not any_client.takes_mode(Earlier())


@pytest.mark.parametrize(
    ("kind", "path", "wanted"),
    [
        ("dataset", "a/b.npy", "datasets/o/n@c0/a/b.npy"),
        ("dataset", "", "datasets/o/n@c0"),
        ("space", "a", "spaces/o/n@c0/a"),
        ("model", "a", "o/n@c0/a"),
    ],
)
def test_paths_on_the_hub_are_at_a_commit(kind: str, path: str, wanted: str) -> None:
    assert hf.path_at(hf.Branch(kind, "o/n", "main"), "c0", path) == wanted
