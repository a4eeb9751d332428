"""Where programs that were written for ``embedding_reader`` import ``get_file_list`` from.

Once this is imported the package knows the module by the name of the function; so it can be called, too.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from dask_embedding_reader.reader import get_file_list

__all__ = ["get_file_list"]


class _CallableModule(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return get_file_list(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
