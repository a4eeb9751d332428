"""What is measured, and the floors that the library must reach."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch

from .data import PAGES, PAGES_PROBES, PROBES
from .floors import (
    BY_HAND,
    CAT_FILE,
    COMPUTE,
    DASK_ALONE,
    DASK_PARQUET,
    DELAYED,
    DISK_AT_ONCE,
    DISK_READS,
    EVERYTHING,
    EXHAUSTIVE,
    GATHER,
    IN_ORDER,
    KNN,
    LANCE,
    LOOP,
    NPY_SAME,
    ONE_CONNECTION,
    PASS,
    PRODUCT,
    PYARROW,
    RAW,
    READ_TABLE,
    REFERENCE,
    SUM,
    XBATCHER,
    Beside,
    Bounded,
    Faster,
    Flat,
    Floor,
    Leaner,
    Quick,
    Scales,
    Smaller,
    Under,
    Within,
)


@dataclass(frozen=True, slots=True)
class Source:
    """Files, and how they are opened."""

    title: str
    """What a reader of the table sees."""
    data: str
    """Data set; "a+b" is vectors in one and metadata in the other."""
    file_format: str = "npy"
    """Format as EmbeddingReader names it."""
    meta_columns: tuple[str, ...] = ()
    """Metadata columns to read."""
    dtype: str | None = "float32"
    """Type of the yielded vectors; None keeps the stored one."""


@dataclass(frozen=True, slots=True)
class Work:
    """One piece of work that several contenders do."""

    name: str
    """Short name, for --only and for contenders' patterns."""
    title: str
    """What a reader of the table sees."""
    source: Source
    """What is read."""
    batch_size: int = 100_000
    """Rows of a batch."""
    limit: int | None = None
    """max_ram_usage_in_bytes, None for the default."""
    repeats: int = 1
    """How often one run does the work; times are of one."""
    rounds: int | None = None
    """Rounds if not the usual number."""
    floors: tuple[Floor, ...] = ()
    """What must hold."""
    optional: bool = False
    """Only with --all or when asked for by name."""

    @property
    def data(self) -> str:
        """Data set."""
        return self.source.data


NPY = Source("npy float32", "npy-f32")
HALF = Source("npy float16 -> float32", "npy-f16")
KEPT = Source("npy float16 kept", "npy-f16", dtype=None)
PARQUET = Source("parquet list<float32> + 2 columns", "parquet", "parquet", ("caption", "id"))
PAIRS = Source("parquet_npy + 2 string columns", "npy-f32+metadata", "parquet_npy", ("caption", "url"))
LIMITS = {"64 MB": 64 * 10**6, "256 MB": 256 * 10**6, "1 GB": 10**9, "4 GB": 4 * 10**9}


def batch_works() -> list[Work]:
    """Passes over whole collections."""
    return [
        whole("npy-f32-100000", NPY, 100_000, Faster(RAW, 0.95), Faster(REFERENCE, 3)),
        whole("npy-f32-1000", NPY, 1000, Faster(RAW, 0.7), Faster(REFERENCE, 2)),
        whole("npy-f32-256", NPY, 256, Faster(RAW, 0.7), Faster(REFERENCE, 3)),
        whole("npy-f16-to-f32", HALF, 100_000, Faster(REFERENCE, 2.5)),
        whole("npy-f16-kept", KEPT, 100_000, Faster(RAW, 0.85)),
        # Text comes as Python's own objects, as it does there, which may take a fifth more: 2.4 times was measured.
        whole("parquet-npy", PAIRS, 100_000, Faster(REFERENCE, 2.5 / 1.2)),
        whole("parquet", PARQUET, 100_000, Faster(REFERENCE, 2), Faster(PYARROW, 1), Smaller(PYARROW, 3)),
    ]


def whole(name: str, source: Source, batch_size: int, *floors: Floor) -> Work:
    """One pass over a whole collection."""
    title = f"{source.title}, batches of {batch_size:,}" if source.file_format == "npy" else source.title
    return Work(name, title, source, batch_size, floors=floors)


PAGES_FLOORS = {"plain": 4, "split": 2.5}
"""How many times as fast as pyarrow.dataset; all others three times.

Three cannot be reached for fixed-size binary: pyarrow decodes no levels there either, it decompresses and copies once,
as is done here; and what it makes stays in memory (1.2 GB), where batches are filled again. 400 MB took 0.06 s there
and 0.09 s here, npy files 0.07 s. zstd is bound by its decoder, which alone takes 0.15 s of 0.27.
"""

_PASSES = 5
"""So many a process where one takes 0.03 to 0.3 s, of which 0.02 to 0.1 s are what its first one takes."""

_PAGE_NBYTES = 2**20


def pages_works() -> list[Work]:
    """Passes over all kinds of parquet files, and looks at few rows."""
    columns, works = ("caption", "id"), []
    for kind in PAGES:
        floors: tuple[Floor, ...] = (Faster(PYARROW, PAGES_FLOORS.get(kind, 3)), Leaner(PYARROW, 4))
        if kind == "default":
            floors = (*floors, Faster(REFERENCE, 6))
        for share, groups in {"whole": "one row group", "fifths": "five row groups"}.items():
            title = f"parquet, {kind}, {groups} a file"
            source = Source(title, f"pages-{kind}-{share}", "parquet", columns, None if kind == "half" else "float32")
            optional = kind not in ("default", "zstd", "v2", "binary") or (share == "fifths" and kind != "default")
            name = f"parquet-{kind}-{share}"
            work = Work(name, title, source, 10_000, repeats=_PASSES, floors=floors, optional=optional)
            works.append(work)
    vectors = Source("parquet default", "pages-default-whole", "parquet")
    floor: tuple[Floor, ...] = (Faster(DASK_PARQUET, 3),)
    works.append(Work("parquet-sum", "lazy x.sum(), parquet default", vectors, floors=floor))
    for kind in ("default", "zstd", "v2"):
        source = replace(vectors, data=f"pages-{kind}-whole")
        title, few = f"ten rows of a row group, parquet {kind}", (Quick(0.03, 20 * _PAGE_NBYTES),)
        optional = kind != "default"
        works.append(
            Work(f"parquet-rows-{kind}", title, source, 10, repeats=PAGES_PROBES, floors=few, optional=optional)
        )
    return works


def other_works() -> list[Work]:
    """Everything but whole passes."""
    many, large = Source("10,000 npy files", "many"), Source("npy of 8 GB", "large")
    call, lazy = Within(RAW, 0.002), Within(DASK_ALONE, 0.002)  # dask alone takes some 3 ms for a task
    return [
        Work("first-npy", "first batch of 1,000, npy float32", NPY, 1000),
        Work("first-parquet", "first batch of 1,000, parquet", PARQUET, 1000),
        Work("open-10000", "opening 10,000 npy files", many, floors=(Faster(REFERENCE, 2),)),
        Work("sum", "lazy x.sum(), npy float32", NPY, floors=(Faster(DELAYED, 1),)),
        Work("mean", "lazy x.mean(axis=0), npy float32", NPY, floors=(Faster(DELAYED, 1),)),
        Work("row", "one random row of a large npy", large, 1, repeats=PROBES, floors=(call,)),
        Work("row-lazy", "one random row of a large npy, x[i].compute()", large, 1, repeats=PROBES, floors=(lazy,)),
    ]


FORMATS = dict.fromkeys(["fbin", "npz", "safetensors", "arrow", "fvecs"], 0.95)
"""How fast files are read, as a share of npy. Missed by fvecs, which has four bytes before each row: what is read has
to be copied once more, to where rows lie side by side, or the system has to be told a place for each row. Blocks that
stay in the second-level cache, read and copied in one thread without anything else, take 0.21 to 0.23 s/GB for rows of
128 to 960 floats, where npy takes 0.13 to 0.16: 0.6 to 0.74 is the bound. A place for each row takes 0.65 of the rate
of npy for 512 floats, 0.75 for 960, and 0.45 for 128."""


def format_works() -> list[Work]:
    """Passes over files that lie on disk as in memory, and over many small ones."""
    works = []
    for name, bound in FORMATS.items():
        source = Source(f"{name} float32", f"format-{name}+format-npy", name)
        floor = Faster(NPY_SAME, bound)
        works.append(Work(f"format-{name}", source.title, source, 10_000, repeats=_PASSES, floors=(floor,)))
    small, pairs = Source("5,000 npy files of four rows", "small"), "small+small-metadata"
    return [
        *works,
        Work("small-mean", f"lazy x.mean(axis=0), {small.title}", small, floors=(Faster(BY_HAND, 0.5),)),
        Work("small-pairs", f"{small.title}, parquet beside", replace(small, data=pairs), floors=(Faster(BY_HAND, 1),)),
    ]


LIMITED_SHARE = 8
"""One connection reads one of so many shares of the rows: it takes its time."""


def remote_works() -> list[Work]:
    """Passes over a collection on a server on this machine, 16 pieces in flight."""
    files = Source("npy float32", "remote")
    fast: tuple[Floor, ...] = (Faster(REFERENCE, 2.3), Faster(CAT_FILE, 0.95))
    scales: tuple[Floor, ...] = (Scales(ONE_CONNECTION, LIMITED_SHARE, 12),)
    titles = {
        "remote-s3": ("npy float32 over S3", fast),
        "remote-http": ("npy float32 over HTTP", fast),
        "remote-s3-limited": ("npy float32 over S3, 60 MB/s a connection", scales),
    }
    pages = Source("parquet default", "remote-pages", "parquet")
    # The floor of four times `pq.read_table` is missed where the bare ranges, dropped on arrival, are below it too: on
    # two cores, which the server shares, they take 0.45 s over HTTP and 0.65 to 0.8 over S3, where it takes 1.0 to 1.3.
    works = [Work(name, title, files, 8_192, floors=floors) for name, (title, floors) in titles.items()]
    parquet = {
        "s3": ("S3", Faster(READ_TABLE, 4)),
        "http": ("HTTP", Faster(READ_TABLE, 4)),
        "limited": ("HTTP, 60 MB/s a connection", Faster(CAT_FILE, 0.8)),
    }
    return works + [
        Work(f"remote-parquet-{name}", f"parquet default over {where}", pages, 8_192, floors=(floor,))
        for name, (where, floor) in parquet.items()
    ]


def lazy_works() -> list[Work]:
    """Batches of lazy arrays."""
    passes = Faster(SUM, 1 / 1.3)
    loop = Faster(LOOP, 20)
    # xbatcher slices our array: such slices reach into the read, so that it reads no more than it hands out.
    plain, derived = (loop, Faster(XBATCHER, 5)), (loop, Faster(XBATCHER, 10))
    apart = Faster(LOOP, 5)  # the loop takes as many passes as there are batches, here twenty; ours takes two
    return [
        Work("iter-1000", "iter_batches(x, batch_size=1,000), npy float32", NPY, 1000, floors=(passes,)),
        Work(
            "iter-100000",
            "iter_batches(x, batch_size=100,000), npy float32",
            NPY,
            100_000,
            rounds=2,  # here and below: the others take long, and most floors are far
            floors=(Faster(COMPUTE, 1),),
        ),
        Work("iter-part-1000", "iter_batches(x), 50,000 rows by 1,000", NPY, 1000, rounds=2, floors=plain),
        Work("iter-unit-1000", "iter_batches(unit vectors), 50,000 rows by 1,000", NPY, 1000, floors=derived),
        Work(
            "iter-standardised",
            "iter_batches(standardised), 100,000 rows by 5,000",
            NPY,
            5_000,
            rounds=2,
            floors=(apart,),
        ),
        Work(
            "iter-cluster",
            "two workers, 200,000 rows by 10,000",
            NPY,
            10_000,
            rounds=2,
            floors=(Faster(GATHER, 1 / 1.2),),
        ),
    ]


def nearest_works() -> list[Work]:
    """Exact nearest neighbours: of many queries, which processors limit, and of one, which reading does."""
    memory: tuple[Floor, ...] = (Faster(PRODUCT, 0.8), Faster(KNN, 1))
    return [
        Work("nearest-memory", "1,000 queries, 100,000 vectors in memory", NPY, floors=memory),
        Work("nearest-files", "100 queries, npy float32", NPY, floors=(Faster(EXHAUSTIVE, 1),)),
        Work("nearest-one", "one query, npy float32", NPY, floors=(Faster(PASS, 0.9),)),
    ]


TAKEN = (10, 100, 1_000, 10_000)
FILTERED = {"0.1": 1, "1": 10, "10": 100, "50": 500, "90": 900}
"""Percentages, and how many of a thousand values of the column ``share`` are below the limit."""


def rows_works() -> list[Work]:
    """Rows that are picked, filtered and shuffled, of 1 GB of vectors of 1 kB."""
    vectors, beside = Source("npy", "rows+rows-lance"), Source("npy", "rows+rows-metadata+rows-lance", "parquet_npy")
    pairs = replace(beside, meta_columns=("share", "caption"))
    parquet = Source("parquet", "parquet", "parquet", ("caption", "id"))
    works = []
    for count in TAKEN:
        repeats, bound = max(1, 2_000 // count), 1 if count < TAKEN[-1] else 1 / 1.3
        title = f"{count:,} random rows of 1 GB"
        # To compute the smallest array takes Dask 1 ms, three times as long as Lance takes for ten rows: only what is
        # ours can be held against it.
        lazy = Beside(LANCE, DASK_ALONE, bound)
        works += [
            Work(
                f"rows-take-{count}",
                f"{title}, a batch",
                vectors,
                count,
                repeats=repeats,
                floors=(Faster(LANCE, bound),),
            ),
            Work(f"rows-lazy-{count}", f"{title}, an array", vectors, count, repeats=repeats, floors=(lazy,)),
        ]
    # No floor: of such metadata a row is decoded with all before it in its row group, of 100,000 rows here.
    works.append(Work("rows-pairs-100", "100 random rows of 1 GB, with a frame", pairs, 100, repeats=5))
    for name in FILTERED:
        floors = (Faster(LANCE, 1 / 1.5), Faster(EVERYTHING, 1 / (1.15 if name == "90" else 1.25)))
        works.append(Work(f"rows-filter-{name}", f"{name} % of the rows at random", beside, 100_000, floors=floors))
    # Missed where rows in order come at 11 GB/s, as two threads copy them once: shuffled ones are copied twice. Bare
    # threads that read blocks while rows are picked from those before reach 0.45. To read each row straight to its
    # place in a batch (`storage.scatter`) takes the 0.14 s a GB of picking off the caller's thread, but as much time of
    # processors in all, as batches are new memory in small pages: 0.33 to 0.37 instead of 0.31 to 0.34, and nothing
    # where the caller computes too.
    shuffled = (Faster(IN_ORDER, 0.5),)
    remote = Source("npy", "remote")
    far = (Faster(IN_ORDER, 0.8),)
    return [
        *works,
        Work("rows-shuffle-npy", "a shuffled epoch, npy, rows of 1 kB", vectors, 1_000, floors=shuffled),
        # Chunks are new memory, of 128 MB where rows are shuffled: what matters is that no row is read by itself.
        Work("rows-array-shuffled", "x.max() of shuffled rows of 1 kB", vectors, 1, floors=(Faster(IN_ORDER, 0.1),)),
        Work("rows-array-reversed", "x.max() of reversed rows of 1 kB", vectors, 1, floors=(Faster(IN_ORDER, 0.25),)),
        # No floor: 128 MB of rows are mixed, for which row groups are decoded whole, each once for each such window.
        Work("rows-shuffle-parquet", "a shuffled epoch, snappy parquet", parquet, 1_000, rounds=2),
        Work(
            "rows-remote-http",
            "a shuffled epoch over HTTP, 30 ms away, 60 MB/s a connection",
            remote,
            1_000,
            rounds=3,
            floors=far,
        ),
        Work(
            "rows-remote-s3",
            "a shuffled epoch over S3, 30 ms away, 60 MB/s a connection",
            remote,
            1_000,
            rounds=3,
            floors=far,
        ),
        *scale_works(),
    ]


SHARDS, SHARD, STEP = 64, 7, 600_000


def scale_works() -> list[Work]:
    """What grows with the number of rows, on 6 G rows of 5,800 sparse files."""
    scale = Source("sparse npy", "sparse-6G")

    def work(name: str, title: str, seconds: float, repeats: int = 1) -> Work:
        title = f"6 G rows: {title}"
        return Work(f"rows-scale-{name}", title, scale, 128, repeats=repeats, rounds=3, floors=(Under(seconds),))

    return [
        work("take", "ten random rows, an array", 0.02, 20),
        work("shuffle", f"shuffle().shard({SHARDS}, {SHARD}) is made", 0.01, 20),
        work("resume", f"its batch {STEP:,}", 0.5),
        work("filter", "the array of 1 % of the rows is made", 2),
    ]


def memory_works() -> list[Work]:
    """The memory limit, format by format, and memory over time."""
    sources = {"npy-f32": NPY, "npy-f16": HALF, "parquet": PARQUET, "parquet-npy": PAIRS}
    limited = [bounded(name, source, size) for size in LIMITS for name, source in sources.items()]
    return [*limited, sparse("20 GB"), replace(sparse("200 GB"), optional=True)]


def bounded(name: str, source: Source, size: str) -> Work:
    """One pass under a limit."""
    return Work(
        f"memory-{name}-{size.replace(' ', '')}",
        f"{source.title}, limit {size}",
        source,
        10_000,
        LIMITS[size],
        rounds=1,
        floors=(Bounded(LIMITS[size]),),
        optional=size == "4 GB",
    )


def sparse(size: str) -> Work:
    """One pass over more bytes than anyone would hold."""
    name, limit = f"sparse-{size.replace(' ', '')}", LIMITS["256 MB"]
    title = f"{size} of sparse npy, limit 256 MB"
    return Work(name, title, Source("sparse npy", name), 10_000, limit, rounds=1, floors=(Flat(32 * 10**6),))


def cold_works() -> list[Work]:
    """Passes over files of which nothing is in memory.

    Missed where several files at once come faster than one: 1.2 GB on a disk of a virtual machine in 0.44 s by two
    threads with a file each, in 0.55 by one thread, in 0.64 by two that read the same file. Rows come in order here, so
    that they read the same one; the disk never idles meanwhile.
    """
    floors, sizes = (Faster(DISK_READS, 0.95),), (256, 1_000, 10_000, 100_000)
    passes = [Work(f"cold-npy-{size}", f"cold npy float32, batches of {size:,}", NPY, size) for size in sizes]
    pages = Source("parquet default", "pages-default-whole", "parquet")
    others = [
        Work("cold-parquet", "cold parquet default, batches of 10,000", pages, 10_000),
        Work("cold-sum", "lazy x.sum() of cold npy float32", NPY),
        Work("cold-take", "a stretch of cold npy float32 by take", NPY, 10_000),
    ]
    return [replace(work, floors=floors, optional=True) for work in (*passes, *others)]


def convert_works() -> list[Work]:
    """Whole collections from a disk, with nothing of them in memory, and to it."""
    floors = (Faster(DISK_AT_ONCE, 0.6),)
    sources = {
        "npy": (Source("npy float32", "npy-converted"), ("npy", "parquet", "float16", "int8")),
        "parquet": (Source("plain parquet", "parquet-converted", "parquet", dtype=None), ("npy", "parquet", "float16")),
    }
    return [
        Work(f"convert-{name}-{to}", f"{source.title} to {to}", source, rounds=3, floors=floors, optional=True)
        for name, (source, targets) in sources.items()
        for to in targets
    ]


_ALL = (
    *batch_works(),
    *pages_works(),
    *other_works(),
    *lazy_works(),
    *nearest_works(),
    *format_works(),
    *remote_works(),
    *rows_works(),
    *memory_works(),
    *convert_works(),
    *cold_works(),
)
WORKS = {work.name: work for work in _ALL}


def select(patterns: list[str] | None, *, optional: bool) -> list[Work]:
    """Works that match one of the patterns; without patterns, all of them (optional ones if asked for)."""
    if patterns:
        return [work for work in WORKS.values() if any(fnmatch(work.name, pattern) for pattern in patterns)]
    return [work for work in WORKS.values() if optional or not work.optional]
