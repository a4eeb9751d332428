"""A real HDFS of one node for the tests, out of the Hadoop that pyspark carries.

``make test-hdfs`` installs it and runs the tests on it. It needs Java, and Debian for
the few jars that pyspark lacks.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from tests.support.servers import ObjectStore, free_port, process

#: One folder for all environments.
_HADOOP = Path(__file__).parents[2] / ".venv" / "servers" / "hadoop"

#: The last pyspark with a Hadoop whose web interface, and with it webhdfs, needs few other jars.
_PYSPARK = "pyspark==2.4.8"
_PYSPARK_SHA256 = "3a19b71b8dc8dd91ebc943604a05e1ab01bce052456d42937035632d852d78dc"
_JARS = (
    *(
        "activation",
        "commons-cli",
        "commons-codec",
        "commons-collections",
        "commons-configuration",
        "commons-httpclient",
    ),
    *("commons-io", "commons-lang-", "commons-logging", "guava", "hadoop-annotations", "hadoop-auth", "hadoop-common"),
    *("hadoop-hdfs", "htrace-core", "httpclient", "httpcore", "jackson-core-asl", "jackson-mapper-asl"),
    *("javax.annotation-api", "javax.servlet-api", "jaxb-api", "jetty-", "jsr305", "leveldbjni-all", "log4j", "netty"),
    *("protobuf-java", "slf4j-api", "slf4j-log4j12", "xbean", "xercesImpl", "xmlenc"),
)
_DEBIAN = (
    *("libjersey1-core-java", "libjersey1-json-java", "libjersey1-server-java", "libjersey1-servlet-java"),
    "libjsr311-api-java",
)
_DEBIAN_JARS = ("jersey1-core", "jersey1-json", "jersey1-server", "jersey1-servlet", "jsr311-api")

_OPENED = ("java.lang", "java.util", "java.io", "java.net", "java.nio", "sun.nio.ch", "jdk.internal.misc")
_KERBEROS = "java.security.jgss/sun.security.krb5=ALL-UNNAMED"
_JAVA = [
    *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in (*_OPENED, "jdk.internal.ref")),
    f"--add-exports={_KERBEROS}",
    f"--add-opens={_KERBEROS}",
    "-Djava.net.preferIPv4Stack=true",
    "-Xmx256m",
]

hdfs_available = (
    (_HADOOP / "jars").exists()
    and shutil.which("java") is not None
    and all(importlib.util.find_spec(name) is not None for name in ("hdfs_native", "requests"))
)


# --------------------------------------------------------------------------------------------------------------------
# Installation


def install() -> None:
    """Put the jars into the folder of the servers, whole or not at all."""
    if (_HADOOP / "jars").exists():
        return
    shutil.rmtree(_HADOOP, ignore_errors=True)
    partial = _HADOOP / "partial"
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="hadoop-") as name:
        work = Path(name)
        with tarfile.open(_download_pyspark(work)) as archive:
            for member in archive:
                path = Path(member.name)
                if path.parent.name == "jars" and path.suffix == ".jar" and path.name.startswith(_JARS):
                    content = archive.extractfile(member)
                    assert content is not None
                    (partial / path.name).write_bytes(content.read())
        # Unpacked and not installed: nothing of the system changes, and nobody has to be root.
        subprocess.run(["apt-get", "-qq", "download", *_DEBIAN], cwd=work, check=True)
        for package in work.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, work / "debian"], check=True)
        for jar in _DEBIAN_JARS:
            shutil.copy(work / "debian" / "usr" / "share" / "java" / f"{jar}.jar", partial)  # follows links
    partial.rename(_HADOOP / "jars")


def _download_pyspark(work: Path) -> Path:
    # Its build asks for an old pypandoc, which pip finds only when told.
    (work / "constraints").write_text("pypandoc==1.7.5\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--dest", str(work)]
    environment = {**os.environ, "PIP_CONSTRAINT": str(work / "constraints")}
    subprocess.run([*command, _PYSPARK], check=True, env=environment)
    (archive,) = work.glob("pyspark-*.tar.gz")
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != _PYSPARK_SHA256:
        raise RuntimeError(f"{archive.name} has the SHA-256 {found}, expected {_PYSPARK_SHA256}")
    return archive


# --------------------------------------------------------------------------------------------------------------------
# The server


@dataclass(frozen=True, slots=True)
class HdfsServer(ObjectStore):
    """An HDFS that lets everybody in."""

    #: Without a slash at the end.
    address: str
    #: Of its web interface, without protocol.
    web_address: str
    protocol: str = "hdfs"

    @property
    def root(self) -> str:
        """URL of the root folder."""
        return f"hdfs://{self.address}" if self.protocol == "hdfs" else f"webhdfs://{self.web_address}"

    @property
    def storage_options(self) -> dict[str, Any]:
        """None are needed."""
        return {}

    def put(self, key: str, content: bytes) -> str:
        """Store a file."""
        from hdfs_native import Client, WriteOptions

        client = Client(f"hdfs://{self.address}")
        with client.create(f"/{key}", WriteOptions(overwrite=True)) as file:
            file.write(content)
        return f"{self.root}/{key}"


def _settings(path: Path, values: Mapping[str, Any]) -> None:
    rows = "".join(f"<property><name>{k}</name><value>{escape(str(v))}</value></property>" for k, v in values.items())
    path.write_text(f"<configuration>{rows}</configuration>")


def _wait_for_datanode(web_address: str) -> None:
    """Wait until the namenode knows of it: before, nothing can be written."""
    query = f"http://{web_address}/jmx?qry=Hadoop:service=NameNode,name=FSNamesystemState"
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(query, timeout=10) as answer:
            if json.load(answer)["beans"][0]["NumLiveDataNodes"]:
                return
        assert time.monotonic() < deadline, "the datanode does not report to the namenode"
        time.sleep(0.1)


@contextmanager
def hdfs() -> Iterator[HdfsServer]:
    """A namenode and a datanode."""
    with tempfile.TemporaryDirectory(prefix="hdfs-") as name:
        work = Path(name)
        for app in ("static", "hdfs/WEB-INF", "datanode/WEB-INF"):
            (work / "webapps" / app).mkdir(parents=True)
        for app in ("hdfs", "datanode"):
            (work / "webapps" / app / "WEB-INF" / "web.xml").write_text('<web-app version="2.4"></web-app>')
        port, web_port, data_port, data_web_port, data_ipc_port = (free_port() for _ in range(5))
        configuration = work / "conf"
        configuration.mkdir()
        _settings(
            configuration / "core-site.xml",
            {"fs.defaultFS": f"hdfs://127.0.0.1:{port}", "hadoop.tmp.dir": work / "tmp"},
        )
        _settings(
            configuration / "hdfs-site.xml",
            {
                "dfs.namenode.name.dir": f"file://{work}/name",
                "dfs.datanode.data.dir": f"file://{work}/data",
                "dfs.namenode.http-address": f"127.0.0.1:{web_port}",
                "dfs.datanode.address": f"127.0.0.1:{data_port}",
                "dfs.datanode.http.address": f"127.0.0.1:{data_web_port}",
                "dfs.datanode.ipc.address": f"127.0.0.1:{data_ipc_port}",
                "dfs.replication": 1,
                "dfs.permissions.enabled": "false",
                "dfs.webhdfs.enabled": "true",
                "dfs.namenode.datanode.registration.ip-hostname-check": "false",
                "dfs.namenode.safemode.threshold-pct": 0,
            },
        )
        class_path = ":".join(map(str, [configuration, work, *sorted((_HADOOP / "jars").glob("*.jar"))]))
        java = ["java", *_JAVA, "-cp", class_path]
        node = "org.apache.hadoop.hdfs.server"
        subprocess.run(
            [*java, f"{node}.namenode.NameNode", "-format"], cwd=work, check=True, capture_output=True, timeout=60
        )
        with (
            process([*java, f"{node}.namenode.NameNode"], port, work / "namenode.log"),
            process([*java, f"{node}.datanode.DataNode"], data_web_port, work / "datanode.log"),
        ):
            _wait_for_datanode(f"127.0.0.1:{web_port}")
            yield HdfsServer(f"127.0.0.1:{port}", f"127.0.0.1:{web_port}")


if __name__ == "__main__":
    install()
