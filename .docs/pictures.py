"""Draw the pictures of the recipes anew, by the code that they show: ``python .docs/pictures.py``."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import matplotlib as mpl

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run each page that shows a picture in a folder of its own, and take the pictures from there."""
    mpl.use("Agg")
    for page in sorted((ROOT / ".docs" / "pages" / "recipes").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if not (pictures := re.findall(r"!\[.*?\]\((\w+\.png)\)", text)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            Path("notebooks").symlink_to(ROOT / "notebooks")
            names: dict[str, object] = {}
            for code in re.findall(r"^```python\n(.*?)^```\n", text, re.DOTALL | re.MULTILINE):
                exec(compile(code, page.name, "exec"), names)  # noqa: S102 - the code of our own pages
            for picture in pictures:
                shutil.copy(picture, page.parent)
            os.chdir(ROOT)


if __name__ == "__main__":
    main()
