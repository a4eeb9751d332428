"""The floors, each a value that judges the summaries of one work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

SLACK_NBYTES = 64 * 10**6
OURS = "dask_embedding_reader"
REFERENCE = "embedding_reader"
PYARROW = "pyarrow.dataset"
DELAYED = "dask.delayed(np.load)"
DASK_ALONE = "dask alone"
BY_HAND = "np.load + read_parquet"
NPY_SAME = "the same in npy"
RAW = "raw limit"
CAT_FILE = "bare cat_file"
READ_TABLE = "pq.read_table"
DASK_PARQUET = "dd.read_parquet"
ONE_CONNECTION = "one connection"
SUM, COMPUTE = "x.sum()", "x.compute()"
PRODUCT, KNN, EXHAUSTIVE, PASS = "products alone", "faiss.knn", "faiss exhaustive_search", "reading alone"
LOOP, XBATCHER = "x[a:b].compute()", "xbatcher"
GATHER = "client.compute and gather"
LANCE = "lance"
EVERYTHING, IN_ORDER = "all rows", "in order"
DISK_READS, DISK_WRITES, DISK_AT_ONCE = "the disk, read", "the disk, written", "the disk, both at once"


class Run(NamedTuple):
    """What one process measured."""

    seconds: float
    cpu_seconds: float
    peak_nbytes: int
    """Peak resident memory of the whole process."""
    opened_nbytes: int
    """Resident memory once the reader was open."""
    growth_nbytes: int
    """Peak resident memory while working, over opened_nbytes."""
    answer: dict[str, float]


class Summary(NamedTuple):
    """All the runs of one contender at one work."""

    runs: list[Run]

    @property
    def best(self) -> float:
        """Seconds of the fastest run."""
        return min(run.seconds for run in self.runs)

    @property
    def worst(self) -> float:
        """Seconds of the slowest run."""
        return max(run.seconds for run in self.runs)

    @property
    def cpu(self) -> float:
        """Least CPU seconds: steadier than the clock on a noisy machine."""
        return min(run.cpu_seconds for run in self.runs)

    @property
    def peak(self) -> int:
        """Greatest peak of all runs."""
        return max(run.peak_nbytes for run in self.runs)

    @property
    def growth(self) -> int:
        """Greatest growth of all runs."""
        return max(run.growth_nbytes for run in self.runs)


class Verdict(NamedTuple):
    """What became of a floor."""

    against: str
    """Whose line of the table it belongs to."""
    text: str
    value: float
    bound: float
    passed: bool


class Floor(Protocol):
    """Something that must hold; None when the contender it compares with is not there."""

    def judge(self, results: Mapping[str, Summary]) -> Verdict | None:
        """Hold it against the summaries by contender, ours among them."""


@dataclass(frozen=True, slots=True)
class Faster:
    """Ours is at least so many times as fast as another."""

    against: str
    bound: float

    def judge(self, results: Mapping[str, Summary]) -> Verdict | None:
        """Compare the best times."""
        if self.against not in results:
            return None
        value = results[self.against].best / results[OURS].best
        return Verdict(self.against, f"speed >= {self.bound:g}x", value, self.bound, value >= self.bound)


@dataclass(frozen=True, slots=True)
class Scales:
    """Ours reads at least so many times as many bytes a second as another, which reads only a share of them."""

    against: str
    share: int
    bound: float

    def judge(self, results: Mapping[str, Summary]) -> Verdict | None:
        """Compare the best times, each for the same bytes."""
        if self.against not in results:
            return None
        value = results[self.against].best * self.share / results[OURS].best
        text = f"throughput {value:.1f}x >= {self.bound:g}x"
        return Verdict(self.against, text, value, self.bound, value >= self.bound)


@dataclass(frozen=True, slots=True)
class Smaller:
    """Another's peak memory is at least so many times ours."""

    against: str
    bound: float

    def judge(self, results: Mapping[str, Summary]) -> Verdict | None:
        """Compare the peaks."""
        if self.against not in results:
            return None
        value = results[self.against].peak / results[OURS].peak
        text = f"peak {value:.2f}x ours >= {self.bound:g}x"
        return Verdict(self.against, text, value, self.bound, value >= self.bound)


@dataclass(frozen=True, slots=True)
class Leaner:
    """Another's memory grows at least so many times as much as ours."""

    against: str
    bound: float

    def judge(self, results: Mapping[str, Summary]) -> Verdict | None:
        """Compare the growths."""
        if self.against not in results:
            return None
        value = results[self.against].growth / max(1, results[OURS].growth)
        text = f"growth {value:.2f}x ours >= {self.bound:g}x"
        return Verdict(self.against, text, value, self.bound, value >= self.bound)


@dataclass(frozen=True, slots=True)
class Quick:
    """Ours takes less than so many seconds, and reads less than so many bytes, which it reports itself."""

    seconds: float
    nbytes: int

    def judge(self, results: Mapping[str, Summary]) -> Verdict | None:
        """Look at the best time, and the most bytes."""
        value, nbytes = results[OURS].best, max(run.answer["read_nbytes"] for run in results[OURS].runs)
        text = f"< {self.seconds * 1e3:g} ms, {nbytes / 1e6:.1f} MB read < {self.nbytes / 1e6:.0f} MB"
        return Verdict(OURS, text, value, self.seconds, value < self.seconds and nbytes < self.nbytes)


@dataclass(frozen=True, slots=True)
class Within:
    """Ours costs at most so many seconds more than another."""

    against: str
    bound: float

    def judge(self, results: Mapping[str, Summary]) -> Verdict | None:
        """Take the difference of the best times."""
        if self.against not in results:
            return None
        value = results[OURS].best - results[self.against].best
        text = f"{value * 1e3:.2f} ms over it < {self.bound * 1e3:g} ms"
        return Verdict(self.against, text, value, self.bound, value < self.bound)


@dataclass(frozen=True, slots=True)
class Beside:
    """Ours, but for what a third one costs, is at least so many times as fast as another."""

    against: str
    alone: str
    bound: float

    def judge(self, results: Mapping[str, Summary]) -> Verdict | None:
        """Compare the best times."""
        if self.against not in results or self.alone not in results:
            return None
        ours = results[OURS].best - results[self.alone].best
        value = results[self.against].best / max(ours, 1e-6)
        text = f"beside {self.alone} {value:.2f}x >= {self.bound:.2g}x"
        return Verdict(self.against, text, value, self.bound, value >= self.bound)


@dataclass(frozen=True, slots=True)
class Under:
    """Ours takes less than so many seconds."""

    bound: float

    def judge(self, results: Mapping[str, Summary]) -> Verdict | None:
        """Look at the best time."""
        value = results[OURS].best
        return Verdict(OURS, f"< {self.bound * 1e3:g} ms", value, self.bound, value < self.bound)


@dataclass(frozen=True, slots=True)
class Bounded:
    """Ours grows by no more than 1.1 times the limit and 64 MB."""

    limit_nbytes: int

    def judge(self, results: Mapping[str, Summary]) -> Verdict | None:
        """Look at the growth over the opened reader."""
        value, bound = results[OURS].growth, 1.1 * self.limit_nbytes + SLACK_NBYTES
        return Verdict(OURS, f"growth <= {bound / 1e6:.0f} MB", value, bound, value <= bound)


@dataclass(frozen=True, slots=True)
class Flat:
    """Ours grows by no more than so much after the first gigabyte."""

    bound_nbytes: int

    def judge(self, results: Mapping[str, Summary]) -> Verdict | None:
        """Look at the growth that the contender itself reports."""
        value = max(run.answer["late_growth_nbytes"] for run in results[OURS].runs)
        text = f"{value / 1e6:.1f} MB after the first GB <= {self.bound_nbytes / 1e6:.0f} MB"
        return Verdict(OURS, text, value, self.bound_nbytes, value <= self.bound_nbytes)
