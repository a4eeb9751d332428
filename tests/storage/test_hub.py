"""Hugging Face's hub: what is read is of one commit, few questions are asked, and nobody sees the token."""

from __future__ import annotations

import io
import logging
import pickle
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from dask.base import tokenize

from dask_embedding_reader import EmbeddingReader, FileChangedError, NoFilesError, ReadError, write_embeddings
from dask_embedding_reader.storage import retries
from tests.support.hub import REPOSITORY, SIGNATURE, TOKEN, Asked, Hub, hub

ROWS = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
HOME = f"hf://datasets/{REPOSITORY}"


def npy(rows: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, rows)
    return sink.getvalue()


def parquet(rows: Any) -> bytes:
    sink = io.BytesIO()
    pd.DataFrame({"embedding": list(rows), "n": range(len(rows))}).to_parquet(sink)
    return sink.getvalue()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)
    with hub() as served:
        served.commit({f"emb/{k}.npy": npy(ROWS[k * 20 : (k + 1) * 20]) for k in range(3)} | {"README.md": b"# Data"})
        yield served


def open_hub(served: Hub, path: str = "/emb", **options: Any) -> EmbeddingReader:
    return EmbeddingReader(HOME + path, storage_options=served.storage_options(), **options)


def read_all(reader: EmbeddingReader) -> Any:
    return reader.to_dask_array().compute(scheduler="threads")


def listings(served: Hub) -> list[Asked]:
    return served.asked(f"/api/datasets/{REPOSITORY}/tree")


def test_a_folder_is_listed_once_and_its_commit_is_the_version(served: Hub) -> None:
    first = served.branches["main"]
    reader = open_hub(served)
    np.testing.assert_array_equal(read_all(reader), ROWS)
    assert reader.locate(25) == (f"{HOME}@{first}/emb/1.npy", 5)
    assert len(listings(served)) == 1
    reads = served.asked(f"/datasets/{REPOSITORY}/resolve/")
    assert len(reads) == 6, "a header and the rows of each of three files"
    assert all(f"/resolve/{first}/" in asked.path and asked.range for asked in reads)


def test_a_branch_that_moves_is_neither_mixed_nor_missed(served: Hub) -> None:
    reader = open_hub(served)
    served.commit({f"emb/{k}.npy": npy(-ROWS[k * 20 : (k + 1) * 20]) for k in range(3)})
    np.testing.assert_array_equal(read_all(reader), ROWS)
    again = open_hub(served)
    np.testing.assert_array_equal(read_all(again), -ROWS)
    assert tokenize(again) != tokenize(reader)


def test_a_branch_is_looked_up_once_for_all_that_is_opened_together(served: Hub) -> None:
    sources = [f"{HOME}/emb/{k}.npy" for k in range(3)]
    reader = EmbeddingReader(sources, storage_options=served.storage_options())
    assert len([asked for asked in served.requests if asked.path.endswith("expand=sha")]) == 1
    np.testing.assert_array_equal(read_all(reader), ROWS)


def test_a_manifest_of_another_commit_is_noticed(served: Hub, tmp_path: Path) -> None:
    path = tmp_path / "saved.embeddings"
    open_hub(served).save_manifest(path)
    again = EmbeddingReader.from_manifest(path, f"{HOME}/emb", storage_options=served.storage_options())
    np.testing.assert_array_equal(read_all(again), ROWS)
    served.commit({"emb/1.npy": npy(-ROWS[20:40])})
    with pytest.raises(FileChangedError, match=r"emb/1\.npy.*sha256"):
        read_all(again)


@pytest.mark.parametrize("spelled", ["refs/convert/parquet", "refs%2Fconvert%2Fparquet"])
def test_parquet_that_the_hub_made_of_a_data_set(served: Hub, spelled: str) -> None:
    made = served.commit({"default/train/0000.parquet": parquet(ROWS)}, "refs/convert/parquet")
    reader = open_hub(served, f"@{spelled}/default/train", meta_columns="n")
    assert reader.locate(0)[0] == f"{HOME}@{made}/default/train/0000.parquet"
    np.testing.assert_array_equal(read_all(reader), ROWS)
    assert reader.to_dask_dataframe()["n"].compute().tolist() == list(range(60))


@pytest.mark.parametrize("path", ["/**/*.npy", "/emb/[012].npy", "", "@main/emb", "/emb/"])
def test_globs_files_and_roots(served: Hub, path: str) -> None:
    np.testing.assert_array_equal(read_all(open_hub(served, path)), ROWS)
    np.testing.assert_array_equal(read_all(open_hub(served, "/emb/1.npy")), ROWS[20:40])


def test_it_is_sent_to_other_processes(served: Hub) -> None:
    np.testing.assert_array_equal(read_all(pickle.loads(pickle.dumps(open_hub(served)))), ROWS)


@pytest.mark.parametrize("start", ["/api/datasets", f"/datasets/{REPOSITORY}/resolve", "/storage"])
@pytest.mark.parametrize("status", [429, 503])
def test_the_pause_that_the_hub_asks_for_is_kept(
    served: Hub, monkeypatch: pytest.MonkeyPatch, start: str, status: int
) -> None:
    pauses = list[float]()
    monkeypatch.setattr(retries, "pause", pauses.append)
    served.faults = [(start, status, {"Retry-After": "7"})]
    np.testing.assert_array_equal(read_all(open_hub(served)), ROWS)
    assert pauses == [7]


def test_more_bytes_than_were_asked_for_are_refused(served: Hub) -> None:
    reader = open_hub(served)
    served.surplus = b"more"
    with pytest.raises(ReadError, match=r"more than the 320 bytes came"):
        read_all(reader)


def test_answers_that_do_not_tell_which_bytes_they_bring_are_refused(served: Hub) -> None:
    reader = open_hub(served)
    served.tells_range = False
    with pytest.raises(ReadError, match="no Content-Range"):
        read_all(reader)


def test_a_page_is_not_taken_for_a_file(served: Hub) -> None:
    reader = open_hub(served)
    served.page = b"log in " * 1_000
    with pytest.raises(FileChangedError, match="now '7000 "):
        read_all(reader)


def test_a_listing_that_is_put_off_comes_later(served: Hub) -> None:
    served.faults = [(f"/api/datasets/{REPOSITORY}/tree", 429, {"Retry-After": "0"})]
    np.testing.assert_array_equal(read_all(open_hub(served)), ROWS)
    assert len(listings(served)) == 2


@pytest.mark.parametrize("path", ["/nothing", "@no-branch/emb", "/emb/7.npy", "x/emb"])
def test_what_is_not_there_is_named(served: Hub, path: str) -> None:
    with pytest.raises(NoFilesError, match=f"{HOME}{path}"):
        open_hub(served, path)


@pytest.mark.parametrize("status", [403, 500])
def test_a_hub_that_does_not_tell_the_commit_is_named(served: Hub, status: int) -> None:
    served.faults = [("/api/datasets", status, {})] * 20
    with pytest.raises(ReadError, match=f"looking up {HOME}/emb: .*{status}"):
        open_hub(served)


def test_a_private_data_set_needs_the_token_and_nobody_sees_it(
    served: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served.is_private = True
    with pytest.raises(NoFilesError, match="check the spelling, and the token"):
        EmbeddingReader(f"{HOME}/emb", storage_options={**served.storage_options(), "token": False})
    with caplog.at_level(logging.DEBUG, "dask_embedding_reader"):
        reader = open_hub(served)
        np.testing.assert_array_equal(read_all(reader), ROWS)
        served.faults = [("/storage", 403, {})]
        with pytest.raises(ReadError) as failed:
            read_all(reader)
        served.faults = [("/storage", 503, {})]
        np.testing.assert_array_equal(read_all(reader), ROWS)
    reader.save_manifest(tmp_path / "kept.embeddings")
    write_embeddings(reader, tmp_path / "written")
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    x = reader.to_dask_array(max_piece_size=7)
    texts = [
        repr(reader),
        str(reader.manifest.vectors.header(0)),
        reader.locate(0, secrets=True)[0],
        x.name,
        tokenize(x),
    ]
    texts += map(repr, x.__dask_graph__().items())
    texts += ["".join(traceback.format_exception(failed.value)), caplog.text]
    for secret in (TOKEN, SIGNATURE):
        assert [text for text in texts if secret in text] == []
        assert [content for content in files if secret.encode() in content] == []
    # The servers that have the bytes are others: they get signed addresses, and no token.
    assert {asked.token for asked in served.asked("/storage")} == {None}
    assert {asked.token for asked in served.asked("/datasets")} == {f"Bearer {TOKEN}"}
