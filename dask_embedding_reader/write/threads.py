"""Parts encoded and written by the threads of this process, a few at a time."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from dask_embedding_reader._common.progress import progress_bar
from dask_embedding_reader._common.units import counted
from dask_embedding_reader.errors import DestinationError
from dask_embedding_reader.write.destination import Prepared, begin, check_columns, finish, write_part
from dask_embedding_reader.write.parts import Record, warn_of_not_finite
from dask_embedding_reader.write.request import Request, count_writers
from dask_embedding_reader.write.sources import PartSource


def write_source(source: PartSource, prepared: Prepared, request: Request) -> None:
    """Write the parts that are missing, and finish the collection.

    Raises
    ------
    DestinationError
        If what was written before is of other data.
    """
    destination, known = prepared.destination, prepared.known
    # Without a token the rows themselves show whether a part is the same: they are taken, encoded and compared.
    skipped = set(known) if source.settings.token is not None else set()
    records = {number: known[number] for number in skipped}
    begun = False
    writers = count_writers(request, source.part_nbytes)
    running: deque[tuple[int, Future[Record]]] = deque()
    progress = progress_bar(
        request.show_progress, source.settings.rows or 0, "writing", " embeddings", source.settings.row_nbytes
    )
    progress.update(sum(record.rows for record in records.values()))
    if prepared.unfinished:  # another one goes on now
        begin(prepared)
        begun = True
    parts = source.parts(skipped)

    def collect() -> None:
        number, future = running.popleft()
        record = future.result()
        if record.columns not in {other.columns for other in records.values()}:
            check_columns(destination, {**records, number: record})
        records[number] = record
        progress.update(record.rows)

    pool = ThreadPoolExecutor(writers, thread_name_prefix="embedding-writer")
    try:
        for part in parts:
            while len(running) >= writers:
                collect()
            if not begun and part.number not in known:
                while running:  # other data than those that are complete must not make these unreadable
                    collect()
                begin(prepared)
                begun = True
            running.append((part.number, pool.submit(write_part, destination, part, known.get(part.number))))
            del part  # waiting for the next one, this must not hold on to it
        while running:
            collect()
    finally:
        pool.shutdown()  # what has been read is written, though it may be for another run to go on from
        parts.close()
        progress.close()
    # By the last number: of what is there, one in the middle may have gone.
    before = 1 + max(known, default=-1)
    if before > len(records) and not request.overwrite:
        raise DestinationError(
            f"{request.folder.shown}: {counted(before, 'file')} written before, "
            f"{len(records):,} now: this is other "
            "data; name another folder, or pass overwrite=True to replace it"
        )
    if begun:
        finish(destination, records)
    warn_of_not_finite(records)
