"""Ctrl-C, SIGTERM and ``kill -9`` in the midst of everything: the process ends at once, and nothing worse is left.

One Ctrl-C ends it, unless it arrives where Python runs a callback of its own because something died: of a thread that
was the last to go (``threading._dangling``), of a pool of threads (``concurrent.futures``), of an expression (Dask's
``WeakValueDictionary``). Python prints ``Exception ignored in`` then and goes on. Nor where it takes the lock of a
future or gives it back: that stays taken, and what waits for it would wait for ever. People press again, and so do
these tests. No code of this package may be where that happens: it runs none when something dies, and takes no lock by
way of a condition.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dask_embedding_reader import EmbeddingReader, verify_embeddings, write_embeddings
from dask_embedding_reader.cli.commands import main
from dask_embedding_reader.errors import ReadError
from tests.support.collections import wait_until

ROWS = np.arange(6_000, dtype=np.float32).reshape(1_500, 4)

#: Background jobs of some shells start with Ctrl-C ignored, and pass that on.
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from itertools import count
from threading import Event
import numpy as np
from dask_embedding_reader import EmbeddingReader, iter_batches, write_embeddings

def ready():
    print("ready", flush=True)

if __name__ == "__main__":
    source, target = sys.argv[1:]
"""

#: What goes on for ever, unless it is stopped; says when it is in the midst of it.
ACTIVITIES = {
    "reading": """
    for number in count():
        for batch in EmbeddingReader(source)(7, max_piece_size=3, show_progress=False):
            number or ready()
            number = 1
""",
    "computing": """
    for number in count():
        EmbeddingReader(source).to_dask_array(max_piece_size=3).sum().compute()
        number or ready()
""",
    "iterating over an array": """
    for number in count():
        for batch in iter_batches(EmbeddingReader(source).to_dask_array(max_piece_size=20), batch_size=7):
            number or ready()
            number = 1
""",
    "iterating on a cluster": """
    from distributed import Client, LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster):
        for number in count():
            for batch in iter_batches(EmbeddingReader(source).to_dask_array(max_piece_size=20), batch_size=7):
                number or ready()
                number = 1
""",
    "writing": """
    def batches():
        for number, (rows, _) in enumerate(EmbeddingReader(source)(1, show_progress=False)):
            number == 40 and ready()
            number == 1_000 and Event().wait()  # for ever, until it is interrupted
            yield rows, None
    write_embeddings(batches(), target, rows_per_file=1)
""",
    "converting": """
    import os
    from pathlib import Path
    from threading import Thread
    from dask_embedding_reader.cli.commands import main
    done, interrupted, replace = [], Event(), os.replace
    def interrupt(*_):
        interrupted.set()
        raise KeyboardInterrupt
    def replace_and_wait(temporary, path):
        replace(temporary, path)
        if path.endswith(".npy"):
            done.append(path)
            len(done) < 1_000 or interrupted.wait()
    signal.signal(signal.SIGINT, interrupt)
    os.replace = replace_and_wait
    def watch():
        while len(list(Path(target).glob("*.npy"))) < 20:
            Event().wait(0.005)
        ready()
    Thread(target=watch, daemon=True).start()
    main(["convert", source, target, "--rows-per-file", "1"])
""",
}
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]


def interrupted(activity: str, number: signal.Signals, *arguments: Any) -> tuple[int, str]:
    """Start something, interrupt it in the midst, return its exit code and what it said; no process is left of it."""
    command = [sys.executable, "-c", START + ACTIVITIES[activity], *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        # With patience: to end takes a second of processor time, which is ten seconds where others use the processor.
        for patience in (20, 30):
            try:
                said = process.communicate(timeout=patience)[1]
                break
            except subprocess.TimeoutExpired:
                process.send_signal(number)
        else:
            process.kill()
            raise AssertionError(f"{activity} did not end")
    assert wait_until(lambda: not any(child.is_running() for child in children), 30), children
    return process.returncode, said


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    np.save(folder / "0.npy", ROWS)
    return folder


def expected_code(activity: str, number: signal.Signals) -> int:
    # Python tells by its own end that Ctrl-C ended it; the command line says 130, as programs do.
    return 130 if (activity, number) == ("converting", signal.SIGINT) else -number


def convert(source: Path, target: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(source), str(target), "--rows-per-file", "1"])
    assert not ended.value.code


READING = ["reading", "computing", "iterating over an array", "iterating on a cluster"]


@pytest.mark.parametrize(
    ("activity", "number"),
    [
        # The others start a program each, for seconds.
        pytest.param(activity, number, marks=[] if number == signal.SIGINT else pytest.mark.slow)
        for activity in READING
        for number in SIGNALS
    ],
)
def test_reading_ends_at_once(activity: str, number: signal.Signals, source: Path, tmp_path: Path) -> None:
    code, said = interrupted(activity, number, source, tmp_path / "out")
    assert code == expected_code(activity, number), said
    if number == signal.SIGINT:
        assert said.rstrip().endswith(("KeyboardInterrupt", "KeyboardInterrupt:")), said  # the other is a second one
        dropped = re.findall("Exception ignored in.*?KeyboardInterrupt", said, re.DOTALL)
        assert not any("dask_embedding_reader" in text for text in dropped), said
        assert "Exception in thread" not in said or "cluster" in activity, said


FAST = [("writing", signal.SIGINT), ("converting", signal.SIGTERM)]  # the others start a program each, for seconds


@pytest.mark.parametrize(
    ("activity", "number"),
    [
        pytest.param(activity, number, marks=[] if (activity, number) in FAST else pytest.mark.slow)
        for activity in ("writing", "converting")
        for number in SIGNALS
    ],
)
def test_what_was_interrupted_while_writing_goes_on(
    activity: str, number: signal.Signals, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    code, said = interrupted(activity, number, source, target)
    assert code == expected_code(activity, number), said
    with suppress(ReadError):  # refused, or complete
        assert EmbeddingReader(target).count == len(ROWS)
    # Whatever has its name is whole; what is half written lies where nobody looks.
    for path in target.glob("*"):
        if path.is_file():
            assert np.load(path).shape == (1, 4)
    if number == signal.SIGINT:
        assert not [*target.rglob("*.tmp"), *target.rglob("writer-*")]
    if activity == "converting":
        convert(source, target)
    else:
        write_embeddings(((rows, None) for rows, _ in EmbeddingReader(source)(1)), target, rows_per_file=1)
    assert verify_embeddings(target).empty
    assert not (target / "_writing").exists()
    np.testing.assert_array_equal(EmbeddingReader(target).to_dask_array().compute(), ROWS)
