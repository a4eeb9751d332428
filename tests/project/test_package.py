"""What an index shows of the package: addresses, and the README with them."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Message:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        [name] = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(files.read(name))


def test_the_description_is_the_readme_with_an_address_for_each_file_that_it_refers_to(metadata: Message) -> None:
    urls = dict(str(each).split(", ") for each in metadata.get_all("Project-URL", []))
    assert sorted(urls) == ["Changelog", "Documentation", "Homepage", "Issues", "Repository"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.*?\]\((?!https?:)(.+?)\)", readme)
    files = re.findall(r"(?<!!)\[[^]]*\]\((?!https?:)(.+?)\)", readme)
    assert len(pictures) >= 2
    assert len(files) >= 20
    expected = readme
    for kind, paths in (("raw", pictures), ("blob", files)):
        for path in set(paths):
            expected = expected.replace(f"]({path})", f"]({urls['Repository']}/{kind}/main/{path})")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert bytes(metadata.get_payload(decode=True)).decode().rstrip() == expected.rstrip()
    assert (ROOT / urls["Changelog"].removeprefix(f"{urls['Repository']}/blob/main/")).is_file()
