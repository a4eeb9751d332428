"""The safetensors format: named tensors after a header of JSON.

The length of the header as a little-endian ``uint64``, the header ``{name: {dtype, shape, data_offsets}}``, and the
data, from whose beginning offsets are counted [1]_.

References
----------
.. [1] https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa

from dask_embedding_reader.errors import ColumnError, FormatError
from dask_embedding_reader.formats.base import (
    DEFAULT_COLUMN,
    Array,
    Columns,
    FileHeader,
    RowReader,
    StretchReader,
    in_order,
)
from dask_embedding_reader.formats.raw import RawVectors, open_block_stretches, write_rows
from dask_embedding_reader.formats.vectors import Vectors
from dask_embedding_reader.storage.read import read_range
from dask_embedding_reader.storage.store import StoredFile, Write

_LENGTH_NBYTES = 8
_MOST_NBYTES = 2**22
"""The largest header that is read, of some 50,000 tensors; as Python's objects it takes up to 100 MB. Safetensors
itself reads 25 times as much."""

_BF16 = "BF16"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    # The upper half of a float32, which numpy has no name for: it becomes one, exactly.
    _BF16: np.dtype("<f4"),
}


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_vectors(self) -> bool:
        return len(self.shape) == 2 and self.dtype in _DTYPES and self.shape[1] > 0


class _Safetensors(RawVectors):
    name = "safetensors"
    suffixes: tuple[str, ...] = (".safetensors",)
    first_nbytes = 512  # a header of one tensor has some 100; a longer one costs a second read
    holds_columns = False
    tells_dtype = True

    def find_vectors(self, file: StoredFile, columns: Columns, head: bytes) -> tuple[Sequence[str] | None, bytes]:
        """Find the tensors of two axes."""
        del columns
        head = _read_head(file, head)
        tensors, _ = _parse_tensors(file, head)
        if DEFAULT_COLUMN in tensors:
            return [DEFAULT_COLUMN], head
        return [name for name, tensor in tensors.items() if tensor.is_vectors], head

    def read_header(self, file: StoredFile, columns: Columns, head: bytes = b"") -> FileHeader:
        """Read where the wanted tensor lies."""
        tensors, data_offset = _parse_tensors(file, _read_head(file, head))
        name = columns.column
        if name not in tensors:
            shown = ", ".join(map(repr, list(tensors)[:10])) or "none"
            raise ColumnError(
                f"{file.url}: has no tensor {name!r}; its tensors are {shown}: name one with embedding_column="
            )
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            _fail(file, f"its tensor {name!r} holds {tensor.dtype}; {', '.join(_DTYPES)} can be read: save it as F16")
        if not tensor.is_vectors:
            _fail(
                file,
                f"its tensor {name!r} has the shape {tensor.shape}; a collection holds (rows, dimension): reshape it",
            )
        rows, dimension = tensor.shape
        return FileHeader(
            file, rows, dimension, _DTYPES[tensor.dtype], (data_offset + tensor.start, tensor.dtype == _BF16)
        )

    def check_header(self, header: FileHeader) -> bool:
        """Tell whether the vectors lie within the file."""
        if len(header.layout) != 2 or header.group_rows:
            return False
        data_offset, is_bf16 = header.layout
        nbytes = header.rows * header.dimension * (2 if is_bf16 is True else header.dtype.itemsize)
        return (
            type(data_offset) is int
            and type(is_bf16) is bool
            and data_offset >= _LENGTH_NBYTES
            and not 0 <= header.file.size < data_offset + nbytes
        )

    def open_rows(self, header: FileHeader, columns: Columns, start: int, stop: int) -> RowReader:
        """Return a function that reads the next rows."""
        if not header.layout[1]:
            return super().open_rows(header, columns, start, stop)
        return in_order(self.open_stretches(header, columns, start, stop), start)

    def open_stretches(self, header: FileHeader, columns: Columns, start: int, stop: int) -> StretchReader:
        """Return a function that reads stretches of rows."""
        data_offset, is_bf16 = header.layout
        if not is_bf16:
            return super().open_stretches(header, columns, start, stop)
        row_type = np.dtype(("<u2", (header.dimension,)))
        return open_block_stretches(header.file, data_offset, row_type, lambda blocks, _: map(_widen, blocks))

    def raw_offset(self, header: FileHeader) -> int | None:
        """Return the first number of the layout, unless the vectors have to be widened."""
        return None if header.layout[1] else super().raw_offset(header)

    def suffix_for(self, dtype: np.dtype[Any]) -> str | None:
        """Return the suffix, for dtypes that the format has."""
        return ".safetensors" if dtype.newbyteorder("<") in _DTYPES.values() else None

    def write(self, write: Write, vectors: Vectors, table: pa.Table | None, embedding_column: str) -> None:
        """Write the content of a file of one tensor."""
        del table  # such a file has no columns
        dtype = next(name for name, stored in _DTYPES.items() if stored == vectors.dtype)
        shape = list(vectors.array.shape)
        facts = {"dtype": dtype, "shape": shape, "data_offsets": [0, shape[0] * shape[1] * vectors.dtype.itemsize]}
        header = json.dumps({embedding_column: facts}).encode()
        header += b" " * (-len(header) % 8)  # the data are aligned
        write(len(header).to_bytes(_LENGTH_NBYTES, "little") + header)
        write_rows(write, vectors)

    def written_header(self, file: StoredFile, rows: int, dimension: int, dtype: np.dtype[Any]) -> FileHeader | None:
        return FileHeader(file, rows, dimension, dtype, (file.size - rows * dimension * dtype.itemsize, False))


SAFETENSORS = _Safetensors()


def _widen(values: Array) -> Array:
    """Return bfloat16 as float32: the lower half is zeros."""
    wide = values.astype("<u4")
    np.left_shift(wide, 16, out=wide)
    return wide.view("<f4")


def _read_head(file: StoredFile, head: bytes) -> bytes:
    """Return the header of a file, of which some bytes may be known."""
    if 0 <= file.size < _LENGTH_NBYTES:
        _fail(file, f"it has {file.size} bytes, less than the 8 of its length; write it again")
    # Of a file of unknown size no more can be asked for than tells how long its header is.
    first = min(SAFETENSORS.first_nbytes, file.size) if file.size >= 0 else _LENGTH_NBYTES
    head = head or read_range(file, 0, first)
    nbytes = int.from_bytes(head[:_LENGTH_NBYTES], "little")
    data_offset = _LENGTH_NBYTES + nbytes
    if 0 <= file.size < data_offset or data_offset > 2**62:
        _fail(
            file,
            f"its header claims {nbytes:,} of the file's {file.size:,} bytes; it is none, or cut short: write it again",
        )
    if nbytes > _MOST_NBYTES:
        _fail(
            file,
            f"its header takes {nbytes:,} bytes, more than the {_MOST_NBYTES:,} that are read; save the vectors as one "
            "tensor",
        )
    if data_offset > len(head):
        head += read_range(file, len(head), data_offset)
    return head[:data_offset]


def _parse_tensors(file: StoredFile, head: bytes) -> tuple[dict[str, _Tensor], int]:
    """Return the tensors of a file by name, and where their data begin; trust none of it."""
    data_offset = len(head)
    try:
        facts = json.loads(head[_LENGTH_NBYTES:data_offset])
        tensors = {name: _parse(tensor) for name, tensor in facts.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{file.url}: not a readable safetensors file: its header is malformed ({error}); write it again"
        ) from error
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start < end or 0 <= file.size < data_offset + tensor.stop:
            _fail(file, f"its tensor {name!r} lies over another, or beyond the end of the file; write it again")
        if tensor.start > end:
            _fail(file, f"before its tensor {name!r} are {tensor.start - end:,} bytes of no tensor; write it again")
        end = tensor.stop
        if tensor.dtype in _DTYPES:
            itemsize = 2 if tensor.dtype == _BF16 else _DTYPES[tensor.dtype].itemsize
            if tensor.stop - tensor.start != math.prod(tensor.shape) * itemsize:
                _fail(
                    file,
                    f"its tensor {name!r} of {tensor.shape} {tensor.dtype} has {tensor.stop - tensor.start:,} bytes; "
                    "write it again",
                )
    if file.size > data_offset + end:
        _fail(file, f"behind its tensors are {file.size - data_offset - end:,} bytes more; write it again")
    return tensors, data_offset


def _parse(facts: Any) -> _Tensor:
    start, stop = facts["data_offsets"]
    numbers = (*facts["shape"], start, stop)
    if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers) or stop < start:
        raise ValueError(f"a shape and offsets of {numbers}")
    return _Tensor(str(facts["dtype"]), tuple(facts["shape"]), start, stop)


def _fail(file: StoredFile, what: str) -> NoReturn:
    raise FormatError(f"{file.url}: not a readable safetensors file: {what}")
