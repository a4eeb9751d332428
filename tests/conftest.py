"""Settings of the whole test run: what failures show, how many examples hypothesis tries, and which."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Its assertions shall show their values too when they fail.
pytest.register_assert_rewrite("tests.support")

# Writing files makes examples slow to generate, which says nothing about the library.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile("default", max_examples=60, deadline=None, suppress_health_check=_SLOW, database=None)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=2_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))
