"""What runs in a process of its own for each fault: it imports nothing but what it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def run_tests(tree: str, tests: Sequence[str], log: str) -> None:
    """Run tests in a process of their own, and end it with their exit code."""
    os.setpgrp()  # no session: what runs nicely goes on to
    os.chdir(tree)
    sys.path.insert(0, tree)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:  # of the other tree
        del sys.modules[name]
    sys.dont_write_bytecode = True  # the next fault may come in the same second, in a file of the same size
    os.environ |= {"PYTHONPATH": tree, "PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_PROFILE": "mutants"}
    with open(log, "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    import pytest

    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--no-cov", "--timeout=60"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins may have been imported before
    code = int(pytest.main([*options, *tests]))
    sys.stdout.flush()
    os._exit(code)
