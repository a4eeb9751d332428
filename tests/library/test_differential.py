"""Random collections, read in all the ways there are: each equals numpy, pandas and, where it is right, the reference.

A trial that fails names its seed: ``python -m tests.support.differential SEED SEED+1`` runs it alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.differential import check, check_pairs, make_trial


@pytest.mark.parametrize("seed", range(25))
def test_all_ways_to_read_a_collection_agree(seed: int, tmp_path: Path) -> None:
    check(make_trial(seed), tmp_path)


def test_files_of_which_some_are_lost_are_paired_rightly_or_not_at_all(tmp_path: Path) -> None:
    outcomes = {check_pairs(seed, tmp_path / str(seed)) for seed in range(150)}
    assert outcomes == {"paired", "refused", "nothing"}


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("first", range(0, 2_000, 200))
def test_all_ways_to_read_two_thousand_collections_agree(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 200):
        trial = make_trial(seed)
        try:
            check(trial, tmp_path / str(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {trial}") from error
