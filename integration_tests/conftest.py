"""What all integration tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

UNQUOTED = pytest.mark.skip(
    reason="DeepSpeed's launcher quotes no path: neither Python's nor the folder's may have a space"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what DeepSpeed itself cannot do in a folder whose path has a space."""
    if " " in sys.executable or " " in str(Path.cwd()):
        for item in items:
            if item.get_closest_marker("integration") and "deepspeed" in item.nodeid:
                item.add_marker(UNQUOTED)
