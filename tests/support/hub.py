"""A local imitation of Hugging Face's hub: the endpoints that its client asks for repositories, folders and files."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.support.servers import QuietServer

TOKEN = "hf_secret-that-nobody-may-see"
#: What the addresses of the servers that have the bytes are signed with.
SIGNATURE = "signature-that-nobody-may-see"
REPOSITORY = "owner/name"
LARGE = (".npy", ".parquet", ".arrow")


class Asked(NamedTuple):
    """One request."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    """One data set with its commits."""

    url: str = ""
    is_private: bool = False
    #: By commit: the content of files by path.
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    requests: list[Asked] = field(default_factory=list)
    #: Statuses and headers of the next answers, by the first part of the paths that they are for.
    faults: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)
    #: What comes behind the bytes of a range.
    surplus: bytes = b""
    #: What takes the place of files: a page for people, or nothing if it is empty.
    page: bytes = b""
    #: Whether answers tell which bytes they bring.
    tells_range: bool = True

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add files to a branch, or replace them; return the commit."""
        content = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        commit = hashlib.sha1(repr((sorted(content.items()), len(self.commits))).encode()).hexdigest()
        self.commits[commit] = content
        self.branches[branch] = commit
        return commit

    def storage_options(self) -> dict[str, Any]:
        """What the client needs."""
        return {"endpoint": self.url, "token": TOKEN if self.is_private else False}

    def asked(self, start: str) -> list[Asked]:
        """The requests whose paths start so."""
        return [asked for asked in self.requests if asked.path.startswith(start)]


def entry(path: str, content: bytes) -> dict[str, Any]:
    """What a listing says of a file."""
    pointer = f"oid sha256:{hashlib.sha256(content).hexdigest()} size {len(content)}".encode()
    is_large = path.endswith(LARGE)
    told = pointer if is_large else content
    oid = hashlib.sha1(b"blob %d\0" % len(told) + told).hexdigest()
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "oid": oid, "size": len(content), **({"lfs": lfs} if is_large else {})}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Tests have better use for stderr."""

    def _send(self, status: int, body: bytes = b"", /, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _fail(self, status: int, code: str) -> None:
        self._send(status, json.dumps({"error": code}).encode(), X_Error_Code=code, X_Error_Message=code)

    def _answer(self) -> None:
        hub, path = self.hub, urllib.parse.urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(
            Asked(self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        for number, (start, status, headers) in enumerate(hub.faults):
            if path.startswith(start):
                del hub.faults[number]
                self._send(status, **headers)
                return
        if path.startswith("/storage/"):  # another server, in truth: signed addresses, no tokens
            contents = {hashlib.sha256(c).hexdigest(): c for files in hub.commits.values() for c in files.values()}
            if SIGNATURE not in self.path or self.headers.get("Authorization"):
                self._send(403)
            else:
                self._send_content(contents[path.removeprefix("/storage/")], '"of-the-storage"')
            return
        if hub.is_private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._fail(401, "RepoNotFound")
            return
        found = re.fullmatch(
            f"(/api)?/datasets/{REPOSITORY}(?:/(revision|tree|paths-info|resolve)/([^/]+)(?:/(.*))?)?", path
        )
        if found is None:
            self._fail(404, "RepoNotFound")
            return
        verb, revision, inner = found[2], urllib.parse.unquote(found[3] or "main"), urllib.parse.unquote(found[4] or "")
        commit = hub.branches.get(revision, revision)
        if commit not in hub.commits:
            self._fail(404, "RevisionNotFound")
            return
        files = hub.commits[commit]
        if verb in (None, "revision"):
            self._send_json({"id": REPOSITORY, "sha": commit, "siblings": []})
        elif verb == "tree":
            self._send_tree(files, inner)
        elif verb == "paths-info":
            wanted = urllib.parse.parse_qs(body.decode())["paths"]
            self._send_json([entry(name, files[name]) for name in wanted if name in files])
        elif inner not in files:
            self._fail(404, "EntryNotFound")
        else:
            self._send_file(commit, inner, files[inner])

    def _send_tree(self, files: Mapping[str, bytes], folder: str) -> None:
        start = f"{folder}/" if folder else ""
        below = {name: content for name, content in files.items() if name.startswith(start)}
        if folder and not below:
            self._fail(404, "EntryNotFound")
            return
        is_deep = "recursive=true" in self.path.lower()
        folders = {
            name[: match.start()]
            for name in below
            for match in re.finditer("/", name)
            if match.start() > len(start) and (is_deep or "/" not in name[len(start) : match.start()])
        }
        listed = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        listed += [entry(*item) for item in sorted(below.items()) if is_deep or "/" not in item[0][len(start) :]]
        self._send_json(listed)

    def _send_file(self, commit: str, name: str, content: bytes) -> None:
        told = entry(name, content)
        if "lfs" not in told:
            self._send_content(content, f'"{told["oid"]}"', X_Repo_Commit=commit)
            return
        address = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/storage/{told['lfs']['oid']}?Signature={SIGNATURE}"
        linked = {"X_Linked_Etag": f'"{told["lfs"]["oid"]}"', "X_Linked_Size": str(len(content))}
        self._send(302, Location=address, X_Repo_Commit=commit, **linked)

    def _send_content(self, content: bytes, etag: str, **headers: str) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if self.hub.page:
            self._send(200, self.hub.page)
            return
        if found is None:
            self._send(200, content, ETag=etag, **headers)
            return
        start, stop = int(found[1]), min(len(content), int(found[2]) + 1)
        if start >= stop:
            self._send(416)
            return
        if self.hub.tells_range:
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop] + self.hub.surplus, ETag=etag, **headers)

    do_GET = do_HEAD = do_POST = _answer  # noqa: N815


@contextmanager
def hub() -> Iterator[Hub]:
    """The imitation, on a free port."""
    served = Hub()
    handler = type("_HandlerOfOneHub", (_Handler,), {"hub": served})
    with QuietServer(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
