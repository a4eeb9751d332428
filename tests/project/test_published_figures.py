"""Figures that are published: the newest of each piece of work, none lost, each in a group of the site."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.benchmarks.publish import collect

ROOT = Path(__file__).parents[2]


def results(date: str, **seconds: float) -> dict[str, Any]:
    works = [
        {"name": name, "contenders": {"dask_embedding_reader": {"best_seconds": each, "runs": [each]}}}
        for name, each in seconds.items()
    ]
    return {"machine": {"date": date}, "works": works}


def test_figures_that_a_later_run_lacks_stay_with_their_date() -> None:
    once = collect([results("Sunday", old=1), results("Monday", both=2)])
    found = collect([once, results("Tuesday", both=3, new=4)])
    assert found["machine"] == {"date": "Tuesday"}
    assert [(work["name"], work["date"]) for work in found["works"]] == [
        ("old", "Sunday"),
        ("both", "Tuesday"),
        ("new", "Tuesday"),
    ]
    assert [work["contenders"]["dask_embedding_reader"] for work in found["works"]] == [
        {"best_seconds": 1},
        {"best_seconds": 3},
        {"best_seconds": 4},
    ]


def test_the_site_has_a_group_for_each_published_figure() -> None:
    hooks = (ROOT / ".docs" / "hooks.py").read_text(encoding="utf-8")
    groups = hooks.split("GROUPS = {")[1].split("\n}")[0]
    begins = tuple(re.findall(r'"([a-z-]+)"', groups))
    published = json.loads((ROOT / "notebooks" / "bench.json").read_text(encoding="utf-8"))
    assert len(published["works"]) >= 77
    for work in published["works"]:
        assert work["name"].startswith(begins), work["name"]
    assert set(published["shown"]) <= {work["name"] for work in published["works"]}
