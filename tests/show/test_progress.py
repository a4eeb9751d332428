"""Progress is seen in terminals, notebooks and logs, tells what matters, and stays away where nobody asked."""

from __future__ import annotations

import io
import mmap
import os
import sys
import threading
from types import SimpleNamespace

import pytest

from dask_embedding_reader._common import progress
from dask_embedding_reader._common.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test turns."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "used_memory", lambda: 1_234_567_890)
    return clock


def test_a_log_has_whole_lines_of_plain_text(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with progress_bar(True, 4_000, "reading", " embeddings", unit_nbytes=2_000_000) as bar:
        for _ in range(40):
            clock.now += 0.5
            bar.update(100)
    printed = capsys.readouterr().err
    assert printed.isprintable() or printed.replace("\n", "").isprintable(), "no control characters"
    assert printed.splitlines() == [
        "reading: 2,000 of 4,000 embeddings (50%), 200 embeddings/s, 400 MB/s, 0:10 left, memory 1.23 GB",
        "reading: 4,000 of 4,000 embeddings (100%), 200 embeddings/s, 400 MB/s, 0:20 passed, memory 1.23 GB",
    ]


def test_a_log_of_long_work_has_few_lines_and_tells_where_it_broke_off(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)

    def work_for_hours() -> None:
        with progress_bar(True, 100_000, "converting", " rows") as bar:
            for _ in range(10_000):
                clock.now += 1
                bar.update(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work_for_hours()
    lines = capsys.readouterr().err.splitlines()
    assert 20 < len(lines) < 120
    assert lines[-1].startswith("converting: 10,000 of 100,000 rows (10%), 1 rows/s, 25:00:00 left")


@pytest.mark.parametrize("terminal", [True, False])
def test_work_of_unknown_size(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0)
    with progress_bar(True, 0, "writing", " embeddings", unit_nbytes=2_000) as bar:
        clock.now += 20
        bar.update(400)
    last = stderr.getvalue().split("\r")[-1]
    if terminal:
        assert last.startswith("writing: 400 embeddings [")
    else:
        assert last == "writing: 400 embeddings, 20 embeddings/s, 40 kB/s, 0:20 passed, memory 1.23 GB\n"


def test_work_that_is_soon_done_is_not_worth_a_line(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(True, 10, "reading", " embeddings") as bar:
        clock.now += 5
        bar.update(10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["terminal", "notebook"])
def test_a_bar_shows_rows_bytes_time_and_memory(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    stderr = Terminal() if where == "terminal" else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    if where == "notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0)
    monkeypatch.setattr(progress, "used_memory", lambda: 1_234_567_890)
    threads = threading.active_count()
    with progress_bar(True, 4_000, "reading", " embeddings", unit_nbytes=2_000) as bar:
        bar.update(4_000)
    last = stderr.getvalue().split("\r")[-1]
    assert last.startswith("reading: 100%|")
    assert "4.00k/4.00k embeddings" in last
    assert " embeddings/s, " in last
    assert "B/s, memory 1.23 GB]" in last
    assert threading.active_count() == threads, "tqdm's monitor must not stay"


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo terminals are those of Unix")
@pytest.mark.parametrize("columns", [0, 60, 130])
def test_a_bar_is_seen_in_terminals_of_any_width(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40 if columns else 0, columns, 0, 0))
    monkeypatch.setattr(progress, "_DELAY_SECONDS", 0)
    with open(theirs, "w", encoding="utf-8") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress_bar(True, 4_000, "reading", " embeddings", unit_nbytes=2_000) as bar:
            bar.update(4_000)
        print("END", file=stderr, flush=True)
        seen = b""
        while b"END" not in seen:
            seen += os.read(ours, 10_000)
    shown = seen.decode().partition("END")[0].rstrip().split("\r")[-1]
    os.close(ours)
    assert shown.startswith("reading: 100%|")
    assert len(shown) <= (columns or 110)


def test_no_bar_where_none_is_wanted_or_nothing_can_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress_bar(False, 10, "reading", " embeddings") as bar:
        bar.update(10)
    monkeypatch.setattr(sys, "stderr", None)  # as in a program without a console
    with progress_bar(True, 10, "reading", " embeddings") as bar:
        bar.update(10)
    assert stderr.getvalue() == ""


def test_memory_is_that_of_this_process() -> None:
    before = progress.used_memory()
    with mmap.mmap(-1, 50_000_000) as block:  # of the system's: the allocator may have as much left of other tests
        block.write(b"x" * len(block))
        assert progress.used_memory() - before > 0.8 * len(block)
