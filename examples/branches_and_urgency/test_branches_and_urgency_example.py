"""The example, run: both policies at work in one server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration


def test_branches_end_early_and_the_workflow_passes_those_that_wait() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run.py")), "--json"],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for crowd in found.values():
        assert sum(crowd["fates"].values()) == 24
        assert crowd["fates"]["finished"] >= 4
        assert {"stopped", "withheld"} & crowd["fates"].keys()
    # A due call is the first to get a seat; one without a deadline waits behind branches for it.
    assert found["with_deadline"]["workflow_s"] < found["with_deadline"]["questions_s"]
