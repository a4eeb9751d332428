"""FTP, by fsspec's client, which has no error of its own for what is not there."""

from __future__ import annotations

import re


def is_missing(error: BaseException | None) -> bool:
    """Tell whether an error says that there is no such file or folder.

    fsspec 2024.12 to 2026.9 looks for a file in the listing of its folder, and stops; servers say it in words, as the
    same number stands for a lack of permission.
    """
    return isinstance(error, StopIteration) or (
        type(error).__name__ == "error_perm"
        and re.search("no such|not found|not exist", str(error), re.IGNORECASE) is not None
    )
