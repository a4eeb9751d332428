"""Where the vectors of a column chunk are, and what they look like there."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where vectors are, and what tells a vector from the next."""

    start: int
    """The first byte of the column chunk."""
    stop: int
    """The byte after its last one."""
    values: int
    """The values in it."""
    codec: int
    """How its pages are compressed; 0 for not at all."""
    stored: np.dtype[Any]
    """What items are in pages."""
    dtype: np.dtype[Any]
    """What they are read as: narrow integers are stored as wide ones."""
    dimension: int
    """Items in a vector."""
    is_list: bool
    """Whether items are counted one by one, with levels of repetition; else a vector is one value."""
    is_fixed: bool
    """Whether no vector can be of another length."""
    definition: int
    """The level of definition of what is not null; 0 where nothing can be."""
    is_counted: bool
    """Whether it has as many values as its row group should have."""

    @property
    def row_values(self) -> int:
        """The values in a vector."""
        return self.dimension if self.is_list else 1

    @property
    def row_nbytes(self) -> int:
        """The bytes of a vector."""
        return self.dimension * self.dtype.itemsize

    @property
    def value_nbytes(self) -> int:
        """The bytes of a value."""
        return self.row_nbytes // self.row_values

    @property
    def stored_nbytes(self) -> int:
        """The bytes of a value in a page."""
        return self.value_nbytes // self.dtype.itemsize * self.stored.itemsize
