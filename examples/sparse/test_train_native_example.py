"""The example trains over ZeRO with two processes, and learns as dense attention does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_native_sparse_attention_learns_as_dense_attention_does(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    plot = tmp_path / "losses.html"
    script = ["train_native.py", "--steps", "12", "--plot", str(plot)]
    done = subprocess.run(
        [sys.executable, *torchrun, *script, "--deepspeed_config", "deepspeed.json"],
        cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step \d+: native sparse (\S+) dense (\S+)$", done.stdout, re.MULTILINE)
    native, dense = ([float(pair[run]) for pair in lines] for run in (0, 1))
    assert len(native) == 12
    assert native != dense
    assert native[-1] < 0.9 * native[0]
    assert abs(native[-1] - dense[-1]) < 0.15 * dense[-1]
    assert plot.read_text().count('"name":') == 2
