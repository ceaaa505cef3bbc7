"""The example trains by ZeRO and Ulysses with two processes, and learns as dense attention does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STEPS = 9

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_native_sparse_attention_learns_as_dense_attention_does(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    plot = tmp_path / "losses.html"
    script = ["train_native.py", "--steps", str(STEPS), "--plot", str(plot)]
    done = subprocess.run(
        [sys.executable, *torchrun, *script, "--deepspeed_config", "deepspeed.json"],
        cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step \d+: (.*)$", done.stdout, re.MULTILINE)
    assert len(lines) == STEPS
    names = ("native sparse", "native sparse, sequences shared", "dense")
    runs = {name: [] for name in names}
    for line in lines:
        for name, told in zip(names, line.split("; "), strict=True):
            assert told.rpartition(" ")[0] == name
            runs[name].append(float(told.rpartition(" ")[2]))
    native, shared, dense = runs.values()
    assert shared == pytest.approx(native, rel=1e-4)  # the same rows, cut the other way
    assert native != dense
    assert native[-1] < 0.9 * native[0]
    assert abs(native[-1] - dense[-1]) < 0.15 * dense[-1]
    drawn = plot.read_text()
    assert [f'"name":"{name}"' in drawn for name in names] == [True] * 3
