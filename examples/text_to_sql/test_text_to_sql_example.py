"""The example answers by its own pool, and its pieces hold what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.integration
@pytest.mark.slow
def test_it_answers_through_the_router_and_leaves_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, HERE / "run.py", "--workflows", "4", "--concurrency", "4"],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["workflows"] == figures["queries_that_run"] == 4
    assert figures["calls"] >= 4 * 3
    left = subprocess.run(["pgrep", "-f", "pool.yaml"], capture_output=True, text=True, check=False)
    assert not left.stdout
