"""Plants a fault in a process that has imported the package: its functions are given other code."""

from __future__ import annotations

import gc
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FunctionType

_Functions = Mapping[CodeType, Sequence[FunctionType]]
"""All functions of a file that this process holds, by their code."""


class _CannotSwapError(Exception):
    """More than the body of a function has changed: what runs at import, or what nothing holds."""


def swap(path: str, before: str, after: str) -> bool:
    """Give the functions of a file the code of a changed one; where that does not do, do nothing and return False.

    What a function made while modules were imported stays as it is: its faults have to be planted by hand.
    """
    try:
        pairs = list(_in_imported(compile(before, path, "exec"), compile(after, path, "exec"), _functions_of(path)))
    except _CannotSwapError:
        return False
    for function, code in pairs:
        function.__code__ = code
    return bool(pairs)


def _functions_of(path: str) -> _Functions:
    gc.unfreeze()  # what is frozen is not told of
    found = defaultdict(list)
    for one in gc.get_objects():
        if isinstance(one, FunctionType) and one.__code__.co_filename == path:
            found[one.__code__].append(one)
    return found


def _in_imported(old: CodeType, new: CodeType, functions: _Functions) -> Iterator[tuple[FunctionType, CodeType]]:
    """Yield what changes in a module or in the body of a class."""
    if _own(old) != _own(new):
        raise _CannotSwapError
    for before, after in zip(_inner(old), _inner(new), strict=True):
        if before == after:
            continue
        if not before.co_flags & inspect.CO_OPTIMIZED:  # a class
            yield from _in_imported(before, after, functions)
        elif functions[before]:
            yield from _in_function(before, after, functions)
        else:
            raise _CannotSwapError


def _in_function(old: CodeType, new: CodeType, functions: _Functions) -> Iterator[tuple[FunctionType, CodeType]]:
    """Yield what changes in a function and in those that were made in it."""
    if functions[old] and len(old.co_freevars) != len(new.co_freevars):
        raise _CannotSwapError
    yield from ((function, new) for function in functions[old])
    for before, after in zip(_inner(old), _inner(new), strict=False):
        if before != after:
            yield from _in_function(before, after, functions)


def _inner(code: CodeType) -> list[CodeType]:
    return [one for one in code.co_consts if isinstance(one, CodeType)]


def _own(code: CodeType) -> object:
    return code.co_code, code.co_names, [one for one in code.co_consts if not isinstance(one, CodeType)]
