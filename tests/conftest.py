"""Settings of the whole test run: what failures show, how many examples hypothesis tries, and which.

And the servers that several test files use, each started once for all of them.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Generator, Iterator
from unittest import mock

import pytest
import s3fs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dask_embedding_reader.formats import ipc
from dask_embedding_reader.formats.parquet import page_index
from dask_embedding_reader.formats.parquet.footers import FOOTERS
from tests.support import clouds, hadoop, servers

# Its assertions shall show their values too when they fail.
pytest.register_assert_rewrite("tests.support.collections")

# Writing files makes examples slow to generate, which says nothing about the library.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile("default", max_examples=60, deadline=None, suppress_health_check=_SLOW, database=None)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=2_000)
# That something fails is enough where faults are planted: to find the smallest example for it may take minutes.
_WITHOUT_SHRINKING = [Phase.explicit, Phase.generate]
settings.register_profile("mutants", settings.get_profile("ci"), phases=_WITHOUT_SHRINKING)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


def pytest_collection_finish() -> None:
    """Spare the garbage collector all that was imported, which takes it 0.2 s each time, often for a single test."""
    # When its first test begins, hypothesis looks for what refers to its random generators, and does not see what is
    # frozen: older releases warn then, which is an error here.
    given(st.none())(lambda _: None)()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _nothing_of_other_files_is_collected() -> None:
    """Spare the garbage collector what earlier tests have imported and made, too.

    Tests that look for what is left have it collect after each call, thousands of times: 220 of 1,230 s that all tests
    took together were spent in it.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_kept_of_other_tests() -> None:
    """What is kept counts against the memory limit of a pass, and limits of tests are small."""
    for kept in (FOOTERS, ipc.INDICES, page_index.INDICES):
        kept.clear()


class _DoctestFolders:
    """The examples of docstrings make folders and leave them, which reads best: this removes them."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        if not isinstance(item, pytest.DoctestItem):
            return (yield)
        with tempfile.TemporaryDirectory() as folder, mock.patch("tempfile.tempdir", folder):
            return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Let it see the examples too: hooks of this file itself are asked about the tests beside it only."""
    config.pluginmanager.register(_DoctestFolders())
    if s3fs.__version__ < "2025.3.1":
        # It closes no session outside of an event loop, but leaves it to the garbage collector, at any time.
        config.addinivalue_line("filterwarnings", "ignore:Unclosed:ResourceWarning")


@pytest.fixture(scope="session")
def s3() -> Iterator[servers.S3Server]:
    """An S3 service."""
    servers.require(servers.s3_available, "moto")
    with servers.s3() as server:
        yield server


@pytest.fixture(scope="session")
def gcs() -> Iterator[clouds.GcsServer]:
    """Google Cloud Storage."""
    servers.require(clouds.gcs_available, "fake-gcs-server")
    with clouds.gcs() as server:
        yield server


@pytest.fixture(scope="session")
def azure() -> Iterator[clouds.AzureServer]:
    """Azure Blob Storage."""
    servers.require(clouds.azure_available, "azurite")
    with clouds.azure() as server:
        yield server


@pytest.fixture(scope="session")
def hdfs() -> Iterator[hadoop.HdfsServer]:
    """HDFS."""
    servers.require(hadoop.hdfs_available, "HDFS", "make test-hdfs")
    with hadoop.hdfs() as server:
        yield server
