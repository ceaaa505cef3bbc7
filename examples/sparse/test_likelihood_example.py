"""The example says what dense attention and each share give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.hosts.vllm.small_model import small_model

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent


def test_it_prints_a_line_for_each_share(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((HERE / "likelihood.py").read_text())
    ran = subprocess.run(
        [sys.executable, HERE / "likelihood.py", small_model(), text],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # two threads spin where a core is busy
        capture_output=True,
        text=True,
        check=True,
    )
    lines = ran.stdout.splitlines()
    assert "dense attention" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["mass 0.9", "mass 0.97", "mass 0.99"]
    shares = [int(line.split(", ")[1].split("%")[0]) for line in lines[1:]]
    assert shares == sorted(shares)
