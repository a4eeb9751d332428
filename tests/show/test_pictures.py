"""What people see of a collection: the card in a notebook, the plan, and how the reading went."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from dask_embedding_reader import ArgumentError, BatchRecorder, EmbeddingReader, iter_batches


@pytest.fixture(autouse=True)
def _no_windows() -> Iterator[None]:
    plt.close("all")  # what others left; the lowest matplotlib warns of them when it changes its backend
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def write_shards(folder: Path, rows: list[int]) -> EmbeddingReader:
    folder.mkdir(exist_ok=True)
    for shard, count in enumerate(rows):
        np.save(folder / f"{shard:05}.npy", np.full((count, 4), shard, "float16"))
    return EmbeddingReader(folder)


class Rectangles(HTMLParser):
    """The blocks of a card, and what they tell when pointed at; every tag must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.spans: list[tuple[float, float]] = []
        self.titles: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        if tag == "rect":
            given: dict[str, Any] = dict(attributes)
            self.spans.append((float(given["x"]), float(given["x"]) + float(given["width"])))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1] == "title":
            self.titles.append(data)


def test_the_card_draws_the_files_to_scale(tmp_path: Path) -> None:
    card = write_shards(tmp_path, [10, 0, 30, 60])._repr_html_()
    blocks = Rectangles(card)
    np.testing.assert_allclose([a for a, _ in blocks.spans], [0, 100, 400])
    np.testing.assert_allclose([b for _, b in blocks.spans], [100, 400, 1000], atol=2)
    assert blocks.titles[1] == "00002.npy: 30 rows, 240 bytes, from row 10"
    for fact in ("100", "4", "float16", "800 bytes", "8 bytes", "3 npy"):
        assert f">{fact}</div>" in card


def test_the_card_of_many_files_stays_small(tmp_path: Path) -> None:
    card = write_shards(tmp_path, [1 + shard % 3 for shard in range(1000)])._repr_html_()
    blocks = Rectangles(card)
    assert len(blocks.spans) <= 150
    assert len(card) < 40_000
    assert sum(int(title.split(": ")[1].split(" rows")[0]) for title in blocks.titles) == 1999
    assert re.fullmatch(r"00000\.npy and \d more files: .*", blocks.titles[0])


def test_the_card_of_a_selection_shows_where_its_rows_are(tmp_path: Path) -> None:
    reader = write_shards(tmp_path, [10, 30, 60])
    assert "opacity=" not in reader._repr_html_()
    assert "selected" not in reader._repr_html_()
    card = reader.take([99, 0, 1, 2, 3, 4])._repr_html_()
    for told in ("from row 0; 5 selected", "from row 10; 0 selected", "from row 40; 1 selected"):
        assert told in card
    assert re.findall(r' opacity="([0-9.]+)"', card) == ["0.57", "0.15", "0.16"]
    assert "opacity=" not in reader.shuffle()._repr_html_()


def test_the_card_escapes_names_and_keeps_secrets(tmp_path: Path) -> None:
    card = write_shards(tmp_path / "<script>alert(1)</script> & co".replace("/", "_"), [2, 2])._repr_html_()
    assert "<script>" not in card
    assert "&lt;script&gt;" in card
    np.save(tmp_path / "<b> & co.npy", np.ones((2, 2)))
    assert "&lt;b&gt; &amp; co.npy: 2 rows" in EmbeddingReader(tmp_path / "<b> & co.npy")._repr_html_()
    import fsspec

    memory = fsspec.filesystem("memory")
    with memory.open("/shown/0.npy", "wb") as out:
        np.save(out, np.ones((2, 2)))
    reader = EmbeddingReader("memory://shown", storage_options={"secret": "hunter2"})
    assert "memory://" in reader._repr_html_()
    assert "hunter2" not in reader._repr_html_()


def test_the_card_tells_metadata_columns_and_row_groups(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"embedding": [[1.0, 2.0]] * 6, "word": list("abcdef"), "n": range(6)})
    frame.to_parquet(tmp_path / "0.parquet", row_group_size=2)
    card = EmbeddingReader(tmp_path, "parquet", meta_columns=["word", "n"])._repr_html_()
    assert "word <i>string</i>, n <i>" in card
    assert re.search(r"row groups</div><div[^>]*>3</div>", card)


def lane_texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_plan_shows_files_pieces_and_batches(tmp_path: Path) -> None:
    axes = write_shards(tmp_path, [10, 30]).plot_plan(16, max_piece_size=10)
    assert sorted(lane_texts(axes)) == [
        "2 files of 10 to 30 rows, up to 240 bytes",
        "3 batches of 8 to 16 rows, up to 128 bytes",
        "4 pieces of 10 rows, 80 bytes",
    ]
    widths = [np.asarray(path.vertices)[:, 0] for collection in axes.collections for path in collection.get_paths()]
    assert sorted(int(x.max() - x.min()) for x in widths) == [8, 10, 10, 10, 10, 10, 16, 16, 30]


def test_the_plan_of_a_part_and_of_very_many_pieces(tmp_path: Path) -> None:
    reader = write_shards(tmp_path, [600, 600])
    axes = reader.plot_plan(400, start=100, end=1_100, max_piece_size=1)
    assert sorted(lane_texts(axes)) == [
        "1,000 pieces of 1 row, 8 bytes",
        "2 files of 500 rows, 4 kB",
        "3 batches of 200 to 400 rows, up to 3.2 kB",
    ]
    assert axes.get_xlim() == (100, 1_100)
    with pytest.raises(ArgumentError, match="no rows"):
        reader.plot_plan(start=5, end=5)
    with pytest.raises(ArgumentError, match="batch_size"):
        reader.plot_plan(0)


def test_a_recorder_changes_nothing_and_notes_every_batch(tmp_path: Path) -> None:
    reader = write_shards(tmp_path, [10, 30])
    recorder = BatchRecorder(reader(16, show_progress=False))
    batches = list(recorder)
    for (rows, meta), (expected_rows, expected_meta) in zip(batches, reader(16, show_progress=False), strict=True):
        np.testing.assert_array_equal(rows, expected_rows)
        assert meta.equals(expected_meta)
    table = recorder.table
    assert table["rows"].tolist() == [16, 16, 8]
    assert table["nbytes"].tolist() == [256, 256, 128]
    assert table["seconds"].is_monotonic_increasing
    assert (table["waited"] >= 0).all()
    assert table["waited"].sum() <= table["seconds"].iloc[-1] * 1.001
    assert (table["memory_nbytes"] > 1e7).all()


def test_closing_a_recorder_stops_the_reading(tmp_path: Path) -> None:
    recorder = BatchRecorder(write_shards(tmp_path, [100])(10, show_progress=False))
    next(recorder)
    recorder.close()
    assert list(recorder) == []


def test_the_plot_of_a_recording(tmp_path: Path) -> None:
    recorder = BatchRecorder(iter_batches(write_shards(tmp_path, [100]).to_dask_array(), batch_size=10))
    with pytest.raises(ArgumentError, match="no batch"):
        recorder.plot()
    for _ in recorder:
        pass
    above, below = recorder.plot()
    assert "100 rows, 800 bytes in " in above.get_title(loc="left")
    assert "memory of the process: at most " in below.get_title(loc="left")
    # The area under the curve of bytes a second is the bytes that came.
    [curve] = above.lines
    seconds, speed = curve.get_data()
    assert float((np.diff(seconds) * speed[1:]).sum()) * 1e6 == pytest.approx(800)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path) -> None:
    write_shards(tmp_path, [4])
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from dask_embedding_reader import EmbeddingReader\n"
        f"EmbeddingReader({str(tmp_path)!r}).plot_plan()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'ImportError: plots need matplotlib: pip install "dask-embedding-reader[plot]"' in done.stderr


def test_the_plan_of_a_view_is_drawn_over_its_rows(tmp_path: Path) -> None:
    reader = write_shards(tmp_path, [10, 30])
    axes = reader.take(range(0, 40, 2)).plot_plan(8)
    assert axes.get_xlim() == (0, 20)
    assert axes.get_xlabel() == "row of the selection"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["batches", "pieces", "files"]
    assert "2 files of 5 to 15 rows, up to 120 bytes" in lane_texts(axes)
    assert all(tick == int(tick) for tick in axes.get_xticks()), "ticks of half rows would be called by other rows"
    shuffled = reader.shuffle().plot_plan()
    assert [label.get_text() for label in shuffled.get_yticklabels()] == ["pieces"]
