"""The kernel that sums a collective's operands: interpreted, and compiled for GPUs without one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.kernels.sparse import static_report
from trimtab.kernels.sparse.gpu_tiles import Tile
from trimtab.kernels.sums import add_rows, launch

pytestmark = pytest.mark.integration


def test_the_kernel_agrees_with_the_mathematics() -> None:
    how = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    script = Path(__file__).with_name("interpreted_sums.py")
    environment = {**os.environ, **how, "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (shown.returncode, shown.stdout) == (0, "right\n"), shown.stderr


@dataclass
class Launched:
    """The kernel as `launch` starts it."""

    dtype: str
    rows: int
    tile: Tile = field(default_factory=lambda: Tile(launch.BLOCK, launch.WARPS, 1))

    @property
    def function(self) -> Any:
        from trimtab.kernels.sums import triton_sums

        return triton_sums.add_rows

    @property
    def types(self) -> dict[str, str]:
        pointers = dict.fromkeys(("own", "rows"), f"*{self.dtype}")
        return {**pointers, **dict.fromkeys(("length", "stride", "count"), "i32")}

    @property
    def constants(self) -> dict[str, int]:
        return {"UNROLLED": min(self.rows, launch.UNROLLED), "BLOCK": launch.BLOCK}


@pytest.mark.parametrize(
    ("target", "dtype", "rows"),
    [
        ("sm_80", "bf16", 16),
        ("sm_90", "bf16", 40),
        ("sm_90", "fp64", 40),
        ("gfx942", "fp64", 40),
    ],
)
def test_it_compiles_and_does_not_spill(target, dtype, rows, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    used = static_report.measure(Launched(dtype, rows), target)
    assert used.spilled_bytes == 0
    assert used.registers <= static_report.TARGETS[target].registers_at(launch.WARPS)


def test_what_does_not_fit_is_refused() -> None:
    own, rows = torch.zeros(4), torch.zeros(2, 4)
    for wrong, told in (
        ((own, rows[0]), "not \\(K, L\\)"),
        ((own, rows[:, :3]), "not \\(K, L\\)"),
        ((own, rows.double()), "float64 on cpu"),
        ((own, torch.zeros(4, 2).t()), "contiguous"),
    ):
        with pytest.raises(ValueError, match=told):
            add_rows(*wrong)
