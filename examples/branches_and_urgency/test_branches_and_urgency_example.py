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
    # One without a deadline waits behind the branches of all questions that came before it; a due
    # call gets the first seat that is free.
    before = {name: crowd["questions_answered_before"] for name, crowd in found.items()}
    assert before["with_deadline"] < before["without_deadline"]
