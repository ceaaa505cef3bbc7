"""Settings of every test run: hypothesis profiles, signals, the marker of tests that name none."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=100, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


def pytest_configure() -> None:
    """Undoes what nohup or a background job has ignored: the tests' processes would inherit it."""
    for number, usual in (
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as unit tests those that are not integration tests."""
    for item in items:
        if not item.get_closest_marker("integration"):
            item.add_marker(pytest.mark.unit)
