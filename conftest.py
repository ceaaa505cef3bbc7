"""Settings of every test run: hypothesis profiles, and the marker of tests that name none."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=100, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as unit tests those that are not integration tests."""
    for item in items:
        if not item.get_closest_marker("integration"):
            item.add_marker(pytest.mark.unit)
